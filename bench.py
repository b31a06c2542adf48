"""What a run will cost, before it (train.py --dry_run): parameters, steps, memory, disk. What labels cost, measured.

    python train.py --stage pretrain --world_size 8 --dry_run             the paper's run, planned on any computer
    python train.py --stage finetune --world_size 8 --fsdp --dry_run
    python bench.py words                                                 labels.nearest_words against its limits

The model is built on the meta device: config, tokenizer and preprocessor files are read, weights are not, and nothing
is written. Counts are exact. Memory is an estimate by the formulas below, for bf16 on GPUs unless --dtype float32.
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
from model import SEAModel, find_model, part_names

# Samples of the files that the recipes name, for a plan before the download; those of Cambrian-1 are approximate.
SAMPLES = {
    "blip_laion_cc_sbu_558k.json": 558_128,
    "llava_v1_5_mix665k.json": 665_298,
    "alignment_2.5m.jsonl": 2_500_000,
    "Cambrian7M_withsystemprompt.jsonl": 7_070_000,
}
TEXT = {
    "pretrain": (64, 1.0),
    "finetune": (512, 0.5),
}  # text positions of a typical sample, the share that is trained
LABELS = 10  # per patch, the default of labels.py extract


def find_parts(cfg, stage_1):
    """-> names of vision tower and LLM, and where they are from. Stage 2 has those of --vision and --llm, else of the
    run in --init, or, while that folder does not exist, of stage_1, the config of its first stage."""
    if cfg.stage == "pretrain" or cfg.vision and cfg.llm:
        return cfg.vision, cfg.llm, "as given"
    if Path(cfg.init).is_dir():
        folder = find_model(cfg.init)
        if not (folder / "adapter.safetensors").is_file():
            raise UserError(
                f"{folder}: a Llava model, whose parts --dry_run does not read; add --vision and --llm"
            )
        names, origin = part_names(folder), f"of {folder}"
    else:
        names = vars(stage_1)
        origin = (
            f"{cfg.init} is no folder, so stage 1's defaults; --vision and --llm plan for others"
        )
    return cfg.vision or names["vision"], cfg.llm or names["llm"], origin


def numel(parameters, trained=False):
    return sum(p.numel() for p in parameters if p.requires_grad or not trained)


def kept_bytes(block, width, size):
    """Bytes that a transformer block keeps for backward, per position: the input of each norm in fp32, and `size` for
    each number that a matrix puts out (attention, activation and product take it up again), once more for the widest
    (what the activation puts out), and for each that goes into a matrix which is trained."""
    norms = sum("norm" in name and name.endswith("weight") for name, _ in block.named_parameters())
    matrices = [p for p in block.parameters() if p.dim() == 2]
    return 4 * width * norms + size * (
        max(max(p.shape) for p in matrices)
        + sum(sum(p.shape) if p.requires_grad else p.shape[0] for p in matrices)
    )


def gpu_memory(cfg, model, world, positions, checkpoint):
    """Bytes on one GPU as backward begins, by part; positions: of a sample, image included. Rough, and without some
    GiB for the CUDA context, the allocator's gaps and the kernels' buffers.

    frozen: weights in the compute dtype. trained, gradients, moments: 4, 4 and 8 bytes for each trained weight. --fsdp
    divides the four by the ranks. copies: autocast's bf16 copy of each trained weight; with --fsdp instead what is
    whole for a time, in the compute dtype: what is in no block (embeddings, head, adapter) and two blocks, and the
    gradients of the former and of one block in that dtype and in fp32.
    activations: batch x positions x kept_bytes of all blocks; with checkpoint their inputs, and kept_bytes of one. The
    vision tower has some only if it is trained. logits: of trained positions, log-probabilities and two gradients.
    """
    size, shards = 4 if cfg.dtype == "float32" else 2, world if cfg.fsdp else 1
    vision_blocks, llm_blocks = model.blocks()
    whole = list(model.parameters())
    n = numel(whole, trained=True)
    mem = dict(
        frozen=sum(p.nbytes for p in whole if not p.requires_grad) / shards,
        trained=4 * n / shards,
        gradients=4 * n / shards,
        moments=8 * n / shards,
        copies=0,
    )
    if cfg.fsdp:
        blocks = [*vision_blocks, *llm_blocks]
        sharded = {id(p) for block in blocks for p in block.parameters()}
        whole = [p for p in whole if id(p) not in sharded]
        mem["copies"] = (
            size * numel(whole)
            + (size + 4) * numel(whole, trained=True)
            + max(
                2 * size * numel(b.parameters()) + (size + 4) * numel(b.parameters(), trained=True)
                for b in blocks
            )
        )
    elif size == 2:
        mem["copies"] = 2 * n

    kept, inputs = [], 0
    parts = [(model.llm, llm_blocks, positions)] + [
        (model.vision, vision_blocks, model.image_tokens)
    ] * cfg.tune_vision
    for part, part_blocks, length in parts:
        rows, width = cfg.batch_size * length, part.config.get_text_config().hidden_size
        kept += [rows * kept_bytes(block, width, size) for block in part_blocks]
        # between blocks numbers have the dtype of the weights, which only FSDP casts
        inputs += (
            rows
            * width
            * len(part_blocks)
            * (size if cfg.fsdp else next(part_blocks[0].parameters()).itemsize)
        )
    mem["activations"] = inputs + max(kept) if checkpoint else sum(kept)
    targets = cfg.batch_size * max(0, positions - model.image_tokens) * TEXT[cfg.stage][1]
    mem["logits"] = 12 * targets * model.llm.get_output_embeddings().weight.shape[0]
    return mem | dict(total=sum(mem.values()))


def table(*rows):
    """Print rows of a name and its values."""
    print()
    for name, *values in rows:
        cells = (
            v if isinstance(v, str) else f"{v:,}" if isinstance(v, int) else f"{v:,.2f}"
            for v in values
        )
        print(f"{name:32}" + "".join(f"{cell:>17}" for cell in cells))


def plan(cfg, world, stage_1):
    """Print what a run of this config on `world` ranks needs -> the same figures; memory and disk in bytes."""
    pretrain = cfg.stage == "pretrain"
    dtype = torch.float32 if cfg.dtype == "float32" else torch.bfloat16
    vision, llm, origin = find_parts(cfg, stage_1)
    model = SEAModel.from_parts(
        vision, llm, dtype if pretrain else torch.float32, cfg.tau, meta=True
    )
    loading = min(world, 8) * sum(
        p.nbytes for p in model.parameters()
    )  # each rank of a node holds all of it
    model.log_scale.requires_grad_(cfg.sea_weight > 0)  # from here on as train.build_model
    if not pretrain:
        model.llm.requires_grad_(True)
        model.tune_vision() if cfg.tune_vision else model.vision.to(dtype)
    parts = {name: list(getattr(model, name).parameters()) for name in ("vision", "adapter", "llm")}
    params = {name: (numel(p), numel(p, trained=True)) for name, p in parts.items()}
    total, trained = (
        sum(n for n, _ in params.values()),
        numel(model.parameters(), trained=True),
    )  # τ among the latter
    params["total"] = total, trained

    known = not Path(cfg.data).is_file() and SAMPLES.get(Path(cfg.data).name)
    samples, batch = (
        known or len(load_samples(cfg.data, pretrain)),
        cfg.batch_size * cfg.grad_accum * world,
    )
    steps = cfg.max_steps or math.ceil(cfg.epochs * samples / batch)
    run = {
        "samples": samples,
        "samples a step": batch,
        "steps": steps,
        "warmup steps": math.ceil(cfg.warmup_ratio * steps),
        "image tokens a step": batch * model.image_tokens,
        "positions a step, at most": batch * cfg.max_length,
    }
    typical = min(cfg.max_length, model.image_tokens + TEXT[cfg.stage][0])
    gpu = {
        (length, checkpoint): gpu_memory(cfg, model, world, length, checkpoint)
        for length in (typical, cfg.max_length)
        for checkpoint in (False, True)
    }
    # a checkpoint: weight and two moments in fp32, in stage 1 the adapter once more; a label: uint16 and fp16
    checkpoint, labels = trained * (16 if pretrain else 12), samples * model.image_tokens * LABELS
    saved = steps // cfg.save_every if cfg.save_every else 0
    disk = {
        "a checkpoint": checkpoint,
        "checkpoints that stay": checkpoint * min(saved, cfg.keep or saved),
        "model": total * dtype.itemsize if cfg.export or not pretrain else 4 * trained,
    }
    if cfg.sea_weight > 0:
        disk |= {"labels": 4 * labels, "labels of 65,535 words or more": 6 * labels}

    print(
        f"{cfg.stage} on {world} GPUs: {vision} and {llm} ({origin}); {cfg.data}"
        + (
            f" (not here; it has {'about ' if samples % 1000 == 0 else ''}{samples:,} samples)"
            if known
            else ""
        )
    )
    table(
        ("parameters", "all", "trained"),
        *((name, *n) for name, n in params.items()),
        ("", f"{total / 1e9:.2f} B", f"{trained / 1e6:.2f} M"),
    )
    table(*run.items())
    table(
        (
            "GPU memory, about, GiB",
            *(f"{'longest' if n == cfg.max_length else 'typical'} {n}" for n, _ in gpu),
        ),
        ("--grad_checkpoint", *("with" if c else "without" for _, c in gpu)),
        *((name, *(mem[name] / 2**30 for mem in gpu.values())) for name in gpu[typical, True]),
    )
    table(
        (f"CPU memory, {min(world, 8)} ranks load, GiB", loading / 2**30),
        ("disk, GB",),
        *((name, n / 1e9) for name, n in disk.items()),
    )
    print("\n" + json.dumps(dataclasses.asdict(cfg)))
    return dict(params=params, run=run, gpu=gpu, cpu=loading, disk=disk)


def words(patches: int = 4096, words: int = 400_000, dim: int = 768, n: int = 10, repeats: int = 5):
    """Time nearest_words: against the bare products of the same shapes and, if faiss is installed, its exact search.
    Medians (least to most) over repeats in turn, of random unit vectors."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    v, t = (F.normalize(torch.randn(rows, dim, device=device), dim=-1) for rows in (patches, words))
    half = v.bfloat16(), t.bfloat16()

    def product(
        v, t, rows=2048, block=8192
    ):  # in blocks: whole, the scores might not fit into memory
        out = v.new_empty(rows, block)
        for part in t.split(block):
            for some in v.split(rows):
                torch.mm(some, part.T, out=out[: len(some)] if len(part) == block else None)

    timed = {
        "nearest_words": lambda: nearest_words(v, t, n, 1),
        "product in float32": lambda: product(v, t),
        "product in bfloat16": lambda: product(*half),
    }
    try:
        import faiss

        index = faiss.IndexFlatIP(dim)
        index.add(t.cpu().numpy())
        timed["faiss.IndexFlatIP, CPU"] = lambda: index.search(v.cpu().numpy(), n)
    except ImportError:
        print("faiss is not installed (pip install faiss-cpu): left out")
    seconds = {name: [] for name in timed}
    for _ in range(repeats):
        for name, run in timed.items():
            start = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    print(f"{patches:,} patches, {words:,} words, {dim} numbers each, top {n}, {device}")
    for name, values in seconds.items():
        ratios = sorted(a / b for a, b in zip(seconds["nearest_words"], values))
        print(
            f"{name:24}{statistics.median(values):9.3f} s   nearest_words takes {statistics.median(ratios):.2f} "
            f"({ratios[0]:.2f} to {ratios[-1]:.2f}) of it"
        )
    return seconds


def main(argv=None):
    return run_command(__doc__, {"words": words}, argv)


if __name__ == "__main__":
    cli(main)
