"""What a run will cost (train.py --dry_run), and how fast the labels are found.

    python train.py --stage pretrain --world_size 8 --dry_run      the paper's run, on any computer
    python train.py --stage finetune --world_size 8 --fsdp --dry_run
    python bench.py words               labels.nearest_words against the bare matrix product

For a plan the model is built on the meta device: config, tokenizer and preprocessor files are read,
weights are not, and nothing is written. Counts are exact. Memory is estimated by the formulas
below, for bf16 on GPUs unless --dtype float32.
"""

import dataclasses
import json
import math
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from data import UserError, cli, load_samples, run_command
from labels import nearest_words
from model import find_model, new_model, part_names

# Samples of the files that the recipes name, for a plan before the download (two of them, about).
SAMPLES = {
    "blip_laion_cc_sbu_558k.json": 558_128,
    "llava_v1_5_mix665k.json": 665_298,
    "alignment_2.5m.jsonl": 2_500_000,
    "Cambrian7M_withsystemprompt.jsonl": 7_070_000,
}
TEXT_LENGTH = {"pretrain": 64, "finetune": 512}  # text positions of a typical sample
TRAINED_SHARE = {"pretrain": 1.0, "finetune": 0.5}  # of them
LABELS = 10  # per patch, the default of labels.py extract
GIB = 2**30

# ----------------------------------------------------------------------------- the plan


def plan(cfg, ranks, pretrain_cfg):
    """Print what a run of this config on `ranks` GPUs needs.

    pretrain_cfg: the config of the first stage, for a stage 2 whose --init does not exist yet.
    Returns the printed figures; those of memory and disk are in bytes.
    """
    vision, llm, origin = find_parts(cfg, pretrain_cfg)
    dtype = torch.float32 if cfg.dtype == "float32" else torch.bfloat16
    is_pretrain = cfg.stage == "pretrain"
    model = new_model(vision, llm, dtype if is_pretrain else torch.float32, cfg.tau, meta=True)
    ranks_per_node = min(ranks, 8)
    loading = ranks_per_node * sum(p.nbytes for p in model.parameters())  # each holds all of it
    model.log_scale.requires_grad_(cfg.sea_weight > 0)
    if not is_pretrain:
        model.thaw_llm(cfg.tune_vision, dtype)

    params = count_parameters(model)
    run = plan_steps(cfg, ranks, model.image_tokens)
    gpu = {}
    typical = min(cfg.max_length, model.image_tokens + TEXT_LENGTH[cfg.stage])
    for length in (typical, cfg.max_length):
        for checkpoint in (True, False):
            gpu[length, checkpoint] = gpu_memory(cfg, model, ranks, length, checkpoint)
    disk = plan_disk(cfg, run, params["total"], dtype, model.image_tokens)

    print(f"{cfg.stage} on {ranks} GPUs: {vision} and {llm} ({origin}); {cfg.data}")
    if not Path(cfg.data).is_file():
        print(f"{cfg.data} is not here; it has about {run['samples']:,} samples")
    print_table("parameters", ["all", "trained"], params)
    print_table("steps", [""], {name: [count] for name, count in run.items()})
    columns = [f"{length}{' checkpointed' * checkpoint}" for length, checkpoint in gpu]
    parts = next(iter(gpu.values())).keys()
    rows = {part: [memory[part] / GIB for memory in gpu.values()] for part in parts}
    print_table("GPU memory by positions, GiB", columns, rows)
    print_table("CPU memory of a node, GiB", [""], {"while loading": [loading / GIB]})
    print_table("disk, GB", [""], {name: [size / 1e9] for name, size in disk.items()})
    print("\n" + json.dumps(dataclasses.asdict(cfg)))
    return dict(params=params, run=run, gpu=gpu, cpu=loading, disk=disk)


def find_parts(cfg, pretrain_cfg):
    """-> vision tower, LLM, and a text that says where their names are from."""
    if cfg.stage == "pretrain" or (cfg.vision and cfg.llm):
        return cfg.vision, cfg.llm, "as given"
    if not Path(cfg.init).is_dir():
        names = {"vision": pretrain_cfg.vision, "llm": pretrain_cfg.llm}
        origin = f"{cfg.init} is no folder, so stage 1's defaults; or give --vision and --llm"
    else:
        folder = find_model(cfg.init)
        if not (folder / "adapter.safetensors").is_file():
            raise UserError(f"{folder}: a Llava model; for its plan add --vision and --llm")
        names = part_names(folder)
        origin = f"of {folder}"
    return cfg.vision or names["vision"], cfg.llm or names["llm"], origin


def count_parameters(model):
    """{part: (all, trained)}; τ is counted among the trained of the total only."""
    vision = numel(model.vision_tower.parameters())
    adapter = numel(model.adapter.parameters())
    total = numel(model.llava.parameters())
    trained_vision = numel(model.vision_tower.parameters(), trained=True)
    trained = numel(model.llava.parameters(), trained=True)
    return {
        "vision": (vision, trained_vision),
        "adapter": (adapter, adapter),
        "llm": (total - vision - adapter, trained - trained_vision - adapter),
        "total": (total, numel(model.parameters(), trained=True)),
    }


def numel(parameters, trained=False):
    return sum(p.numel() for p in parameters if p.requires_grad or not trained)


def plan_steps(cfg, ranks, image_tokens):
    file = Path(cfg.data)
    if not file.is_file() and file.name in SAMPLES:
        samples = SAMPLES[file.name]
    else:
        samples = len(load_samples(file, captions=cfg.stage == "pretrain"))
    batch = cfg.batch_size * cfg.grad_accum * ranks
    steps = cfg.max_steps or math.ceil(cfg.epochs * samples / batch)
    return {
        "samples": samples,
        "samples a step": batch,
        "steps": steps,
        "warmup steps": math.ceil(cfg.warmup_ratio * steps),
        "image tokens a step": batch * image_tokens,
        "positions a step, at most": batch * cfg.max_length,
    }


def plan_disk(cfg, run, parameters, dtype, image_tokens):
    """{name: bytes}. parameters: (all, trained)."""
    total, trained = parameters
    is_pretrain = cfg.stage == "pretrain"
    # Weight and two moments in fp32; in stage 1 the adapter once more.
    checkpoint = trained * (16 if is_pretrain else 12)
    saved = run["steps"] // cfg.save_every if cfg.save_every else 0
    is_exported = cfg.export or not is_pretrain
    disk = {
        "a checkpoint": checkpoint,
        "checkpoints that stay": checkpoint * min(saved, cfg.keep or saved),
        "model": total * dtype.itemsize if is_exported else 4 * trained,
    }
    if cfg.sea_weight > 0:
        labels = run["samples"] * image_tokens * LABELS
        disk["labels"] = 4 * labels  # ids in uint16, scores in fp16
        disk["labels of 65,535 words or more"] = 6 * labels  # ids in int32
    return disk


def print_table(title, columns, rows):
    """rows {name: values}."""
    print(f"\n{title:32}" + "".join(f"{column:>20}" for column in columns))
    for name, values in rows.items():
        cells = [f"{v:,}" if isinstance(v, int) else f"{v:,.2f}" for v in values]
        print(f"{name:32}" + "".join(f"{cell:>20}" for cell in cells))


# ----------------------------------------------------------------------------- GPU memory


def gpu_memory(cfg, model, ranks, positions, checkpoint):
    """Bytes on one GPU as backward begins, by part. positions: of a sample, image included.

    frozen: weights in the compute dtype. trained, gradients, moments: 4, 4 and 8 bytes for each
    trained weight. --fsdp divides these by the ranks.
    copies: autocast's bf16 copy of each trained weight, or what --fsdp gathers.
    activations: what all blocks keep; with checkpoint, their inputs and what one keeps.
    logits: of trained positions, with log-probabilities and two gradients.
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
        "activations": activation_bytes(cfg, model, positions, checkpoint, size),
        "logits": (8 + 2 * size) * targets * model.llava.lm_head.weight.shape[0],
    }
    memory["total"] = sum(memory.values())
    return memory


def gathered_bytes(model, size):
    """What FSDP2 holds whole for a time: two blocks, and all that is in no block.

    Weights in the compute dtype; gradients of trained weights in that dtype and in fp32, of one
    block at a time.
    """
    largest = 0
    blocks = [block for part in model.blocks() for block in part]
    for block in blocks:
        weights = 2 * size * numel(block.parameters())
        largest = max(largest, weights + (size + 4) * numel(block.parameters(), trained=True))
    in_blocks = {id(p) for block in blocks for p in block.parameters()}
    others = [p for p in model.parameters() if id(p) not in in_blocks]
    return size * numel(others) + (size + 4) * numel(others, trained=True) + largest


def activation_bytes(cfg, model, positions, checkpoint, size):
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
        # Between blocks, numbers have the dtype of the weights, which only FSDP casts.
        itemsize = size if cfg.fsdp else next(blocks[0].parameters()).itemsize
        inputs += rows * width * len(blocks) * itemsize
    return inputs + max(kept) if checkpoint else sum(kept)


def kept_bytes(block, width, size):
    """Bytes that a transformer block keeps for backward, for each position.

    The input of each norm in fp32. `size` bytes for each number that a matrix puts out, once more
    for the widest (the activation's output), and for each that goes into a trained matrix.
    """
    names = [name for name, _ in block.named_parameters()]
    norms = sum("norm" in name and name.endswith("weight") for name in names)
    matrices = [p for p in block.parameters() if p.dim() == 2]
    numbers = max(max(matrix.shape) for matrix in matrices)
    for matrix in matrices:
        numbers += sum(matrix.shape) if matrix.requires_grad else matrix.shape[0]
    return 4 * width * norms + size * numbers


# ----------------------------------------------------------------------------- speed


def words(patches: int = 4096, words: int = 400_000, dim: int = 768, n: int = 10, repeats: int = 5):
    """Time nearest_words against the bare products of the same shapes, and faiss if installed.

    Medians (least to most) over repeats in turn, of random unit vectors.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    v = F.normalize(torch.randn(patches, dim, device=device), dim=-1)
    t = F.normalize(torch.randn(words, dim, device=device), dim=-1)
    half_v = v.bfloat16()
    half_t = t.bfloat16()
    candidates = {
        "nearest_words": lambda: nearest_words(v, t, n, 1),
        "product in float32": lambda: block_products(v, t),
        "product in bfloat16": lambda: block_products(half_v, half_t),
    }
    try:
        import faiss

        index = faiss.IndexFlatIP(dim)
        index.add(t.cpu().numpy())
        candidates["faiss.IndexFlatIP, CPU"] = lambda: index.search(v.cpu().numpy(), n)
    except ImportError:
        print("faiss is not installed (pip install faiss-cpu): left out")

    seconds = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    print(f"{patches:,} patches, {words:,} words, {dim} numbers each, top {n}, {device}")
    for name, values in seconds.items():
        ratios = sorted(a / b for a, b in zip(seconds["nearest_words"], values))
        print(
            f"{name:24}{statistics.median(values):9.3f} s   nearest_words takes "
            f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) of it"
        )
    return seconds


def block_products(v, t, rows=2048, block=8192):
    """All products, block by block into one buffer: as a whole they might not fit into memory."""
    out = v.new_empty(rows, block)
    for part in t.split(block):
        for some in v.split(rows):
            torch.mm(some, part.T, out=out[: len(some), : len(part)])


def main(argv=None):
    return run_command(__doc__, {"words": words}, argv)


if __name__ == "__main__":
    cli(main)
