"""What a run will cost on N GPUs: parameters, steps, hours, memory, disk. Runs on any computer.

    python -m tools.plan 8 --stage pretrain             the paper's run on 8 GPUs
    python -m tools.plan 8 --stage finetune --fsdp

All flags are train.py's. The model is built on the meta device: config, tokenizer and preprocessor
files are read, weights are not (but those of an adapter), and nothing is written. Counts are exact.
Memory is estimated by the formulas below, for bf16 on GPUs unless --dtype float32.
"""

import argparse
import math
import os
import sys
from pathlib import Path

import torch

import train
from data import UserError, cli, load_samples, world_size

# Number of samples in the recipes' files, to plan before the download. The last two are rounded.
SAMPLES = {
    "blip_laion_cc_sbu_558k.json": 558_128,
    "llava_v1_5_mix665k.json": 665_298,
    "alignment_2.5m.jsonl": 2_500_000,
    "Cambrian7M_withsystemprompt.jsonl": 7_070_000,
}
TEXT_LENGTH = {"pretrain": 64, "finetune": 512}  # text positions of a typical sample
TRAINED_SHARE = {"pretrain": 1.0, "finetune": 0.5}  # of them, how many are targets
LABELS = 10  # per patch, the default of labels.py extract
SPEED = 0.4 * 989e12  # operations a second: a share, assumed, of what an H100 or H800 does in bf16

# ----------------------------------------------------------------------------- the plan


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return
    if not argv or not argv[0].isdigit() or int(argv[0]) == 0:
        raise UserError("usage: python -m tools.plan GPUS [flags of train.py]")
    os.environ.update(RANK="0", WORLD_SIZE=argv[0])  # as torchrun would
    cfg, model, dtype = shapes_of_run(argv[1:])
    return plan(cfg, model, dtype)


def shapes_of_run(argv):
    """The config of a command line of train.py, and its model on the meta device, without weights.

    A stage 2 that names no parts gets those of its preset's stage 1, which need not exist yet.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", default=train.TrainConfig.preset)
    for name in ("--stage", "--init", "--llm", "--vision"):
        parser.add_argument(name)
    given = parser.parse_known_args(argv)[0]
    if given.stage == "finetune" and not (given.init or given.llm or given.vision):
        stage_1 = train.parse_config(["--preset", given.preset])
        argv = [*argv, "--llm", stage_1.llm, "--vision", stage_1.vision]
    cfg = train.parse_config(argv)
    with torch.device("meta"):
        model, dtype = train.build_model(cfg, torch.device("meta"))
    return cfg, model, dtype


def plan(cfg, model, dtype):
    """Print and return what a run of this config needs; figures of memory and disk are in bytes."""
    ranks = world_size()
    is_pretrain = cfg.stage == "pretrain"
    loaded = sum(p.numel() * (p.itemsize if is_pretrain else 4) for p in model.parameters())
    cpu = {"while loading": loaded * min(ranks, 8)}  # a node has up to 8 ranks; each loads all

    params = {"all": count_parameters(model), "trained": count_parameters(model, trained=True)}
    steps = plan_steps(cfg, ranks, model.image_tokens)
    typical = min(cfg.max_length, model.image_tokens + TEXT_LENGTH[cfg.stage])
    gpu = {length: gpu_memory(cfg, model, ranks, length) for length in (typical, cfg.max_length)}
    disk = plan_disk(cfg, steps, params, dtype, model.image_tokens)

    print(f"{cfg.stage} on {ranks} GPUs: {model.parts}; {cfg.data}")
    if not Path(cfg.data).is_file():
        print(f"{cfg.data} is not here; it has about {steps['samples']:,} samples")
    print_table("parameters", params)
    print_table("steps", {"": steps})
    print_table("GPU memory by positions, GiB", gpu, 2**30)
    operations = steps["steps"] * steps["samples a step"] * plan_operations(cfg, model, typical)
    hours = operations / (ranks * SPEED * 3600)
    print(f"\n{hours:.1f} hours at 40 % of an H100's speed, if loading images keeps pace")
    print_table("CPU memory of a node, GiB", {"": cpu}, 2**30)
    print_table("disk, GB", {"": disk}, 10**9)
    return dict(params=params, steps=steps, gpu=gpu, cpu=cpu, disk=disk, hours=hours)


def count_parameters(model, trained=False):
    """{part: number of parameters}, all or those that are trained. The total includes τ."""
    vision = numel(model.vision_tower.parameters(), trained)
    adapter = numel(model.adapter.parameters(), trained)
    llava = numel(model.llava.parameters(), trained)
    total = numel(model.parameters(), trained)
    return {"vision": vision, "adapter": adapter, "llm": llava - vision - adapter, "total": total}


def numel(parameters, trained=False):
    return sum(p.numel() for p in parameters if p.requires_grad or not trained)


def plan_steps(cfg, ranks, image_tokens):
    file = Path(cfg.data)
    if not file.is_file() and file.name in SAMPLES:
        samples = SAMPLES[file.name]
    else:
        samples = len(load_samples(file, captions=cfg.stage == "pretrain"))
    batch = cfg.batch_size * cfg.grad_accum * ranks
    steps = cfg.max_steps or math.ceil(samples / batch)
    return {
        "samples": samples,
        "samples a step": batch,
        "steps": steps,
        "warmup steps": math.ceil(cfg.warmup_ratio * steps),
        "image tokens a step": batch * image_tokens,
        "positions a step, at most": batch * cfg.max_length,
    }


def plan_operations(cfg, model, positions):
    """Multiplications and additions for a sample: two for each weight, position and pass.

    Backward is one pass, and another for trained weights; --grad_checkpoint adds one. Left out: the
    LM head, attention (3 % in stage 1 of Vicuna-7B) and SEA (0.1 %).
    """
    vision, llm = (numel(blocks.parameters()) for blocks in model.blocks())
    llm_passes = 2 + (cfg.stage == "finetune") + cfg.grad_checkpoint
    vision_passes = 3 + cfg.grad_checkpoint if cfg.tune_vision else 1
    return 2 * (vision * vision_passes * model.image_tokens + llm * llm_passes * positions)


def plan_disk(cfg, steps, params, dtype, image_tokens):
    """What the run's files take: {name: bytes}."""
    is_pretrain = cfg.stage == "pretrain"
    trained = params["trained"]["total"]
    model_bytes = 4 * trained if is_pretrain else 0  # the adapter, in float32
    if cfg.export or not is_pretrain:
        model_bytes += dtype.itemsize * params["all"]["total"]  # the Llava folder
    in_checkpoint = 4 * trained if is_pretrain else model_bytes  # --export is for the end
    checkpoint = 12 * trained + in_checkpoint  # 12: a weight and two moments in float32
    saved = math.ceil(steps["steps"] / cfg.save_every) if cfg.save_every else 0
    at_once = cfg.keep + 1 if cfg.keep else saved  # the oldest goes when the newest is whole
    disk = {
        "a checkpoint": checkpoint,
        "checkpoints, at most": checkpoint * min(saved, at_once),
        "model": model_bytes,
    }
    if cfg.sea_weight > 0:
        disk["labels"] = 6 * steps["samples"] * image_tokens * LABELS  # int32 ids, float16 scores
    return disk


def print_table(title, columns, unit=1):
    """columns: {heading: {row: number}}, all with the same rows. Numbers are printed in units."""
    print(f"\n{title:32}" + "".join(f"{heading:>20}" for heading in columns))
    decimals = 0 if unit == 1 else 2
    for row in next(iter(columns.values())):
        cells = [f"{column[row] / unit:20,.{decimals}f}" for column in columns.values()]
        print(f"{row:32}" + "".join(cells))


# ----------------------------------------------------------------------------- GPU memory


def gpu_memory(cfg, model, ranks, positions):
    """Bytes on one GPU as backward begins, by part. positions: of a sample, image included.

    frozen: weights in the compute dtype. trained, gradients, moments: 4, 4 and 8 bytes for each
    trained weight. --fsdp divides these four by the ranks.
    copies: autocast's bf16 copy of each trained weight, or what --fsdp gathers.
    activations: what all blocks keep; with --grad_checkpoint, their inputs and what one keeps.
    logits: of trained positions, their log-probabilities in fp32, and the gradients of both.
    Left out: some GiB for the CUDA context, the allocator's gaps and the kernels' buffers.
    """
    size = 4 if cfg.dtype == "float32" else 2  # bytes of a number in the compute dtype
    shards = ranks if cfg.fsdp else 1
    trained = numel(model.parameters(), trained=True)
    autocast_copies = 2 * trained if size == 2 else 0
    text = max(0, positions - model.image_tokens)
    targets = cfg.batch_size * text * TRAINED_SHARE[cfg.stage]
    memory = {
        "frozen": sum(p.nbytes for p in model.parameters() if not p.requires_grad) / shards,
        "trained": 4 * trained / shards,
        "gradients": 4 * trained / shards,
        "moments": 8 * trained / shards,
        "copies": gathered_bytes(model, size) if cfg.fsdp else autocast_copies,
        "activations": activation_bytes(cfg, model, positions, size),
        "logits": (8 + 2 * size) * targets * model.llava.lm_head.weight.shape[0],
    }
    memory["total"] = sum(memory.values())
    return memory


def gathered_bytes(model, size):
    """What FSDP2 holds unsharded: the block in use, the next block, and all that is in no block.

    Their weights, in the compute dtype; and for all but the next block the gradients of trained
    weights, in that dtype and in fp32.
    """
    outside = numel(model.parameters())
    trained_outside = numel(model.parameters(), trained=True)
    largest = 0
    for blocks in model.blocks():
        for block in blocks:
            weights = numel(block.parameters())
            trained = numel(block.parameters(), trained=True)
            outside -= weights
            trained_outside -= trained
            largest = max(largest, 2 * size * weights + (size + 4) * trained)
    return size * outside + (size + 4) * trained_outside + largest


def activation_bytes(cfg, model, positions, size):
    """What the blocks keep for backward. A frozen vision tower keeps nothing."""
    vision_blocks, llm_blocks = model.blocks()
    parts = [(llm_blocks, model.embed_tokens.embedding_dim, positions)]
    if cfg.tune_vision:
        parts.append((vision_blocks, model.vision_tower.config.hidden_size, model.image_tokens))
    kept = []
    inputs = 0
    for blocks, width, length in parts:
        rows = cfg.batch_size * length
        kept += [rows * kept_bytes(block, width, size) for block in blocks]
        # The residual stream has the dtype of the weights: FSDP casts them, autocast only copies.
        itemsize = size if cfg.fsdp else next(blocks[0].parameters()).itemsize
        inputs += rows * width * len(blocks) * itemsize
    if cfg.grad_checkpoint:
        return inputs + max(kept)
    return sum(kept)


def kept_bytes(block, width, size):
    """Bytes that a transformer block keeps for backward, for each position.

    The input of each norm, in fp32. In the compute dtype, `size` bytes a number: the output of each
    matrix, the input of each trained matrix, and once more the widest of them, for the output of
    the activation function.
    """
    names = [name for name, _ in block.named_parameters()]
    norms = sum("norm" in name and name.endswith("weight") for name in names)
    matrices = [p for p in block.parameters() if p.dim() == 2]
    numbers = max(max(matrix.shape) for matrix in matrices)
    for matrix in matrices:
        numbers += sum(matrix.shape) if matrix.requires_grad else matrix.shape[0]
    return 4 * width * norms + size * numbers


if __name__ == "__main__":
    cli(main)
