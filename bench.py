"""What a run will cost, before it (train.py --dry_run): parameters, steps, memory, disk.

    python train.py --stage pretrain --world_size 8 --dry_run             the paper's run, from any computer
    python train.py --stage finetune --world_size 8 --fsdp --dry_run

The model is built on the meta device: config, tokenizer and preprocessor files are read, weights are not. Counts are
exact; memory is an estimate by the formulas below, for bf16 unless --dtype float32.
"""

import dataclasses
import json
import math
from pathlib import Path

import torch
from safetensors import safe_open

from data import UserError, load_samples
from model import SEAModel, find_model
from train import parse_config, world_size

# Samples of the files that the recipes name, for a plan before the download; those of Cambrian-1 are approximate.
SAMPLES = {"blip_laion_cc_sbu_558k.json": 558_128, "llava_v1_5_mix665k.json": 665_298,
           "alignment_2.5m.jsonl": 2_500_000, "Cambrian7M_withsystemprompt.jsonl": 7_070_000}
TEXT = {"pretrain": (64, 64), "finetune": (512, 256)}  # of a typical sample: text positions, how many are trained
LABELS = 10  # per patch, the default of labels.py extract


def find_parts(cfg):
    """-> names of vision tower and LLM, and a remark on where they come from. Stage 2 takes them from --llm and
    --vision, from the run in --init, or, as long as that folder does not exist, from stage 1 of the same recipe."""
    if cfg.stage == "pretrain" or cfg.vision and cfg.llm:
        return cfg.vision, cfg.llm, "as given"
    if Path(cfg.init).is_dir():
        folder = find_model(cfg.init)
        if not (folder / "adapter.safetensors").is_file():
            raise UserError(f"{folder}: a Llava model, whose parts --dry_run does not look up; add --llm and --vision")
        with safe_open(folder / "adapter.safetensors", "pt") as f:
            names = {k: str(folder / v) if v.startswith("./") else v for k, v in f.metadata().items()}
        remark = f"of {folder}"
    else:
        names = vars(parse_config(["--stage", "pretrain", "--recipe", cfg.recipe, "--preset", cfg.preset]))
        remark = f"stage 1's defaults, for there is no folder {cfg.init}; --llm and --vision plan for others"
    return cfg.vision or names["vision"], cfg.llm or names["llm"], remark


def numel(parameters):
    return sum(p.numel() for p in parameters)


def trained(parameters):
    return [p for p in parameters if p.requires_grad]


def kept_bytes(block, width, size):
    """Bytes that a transformer block keeps for backward, per position: the input of each norm in fp32, and `size` for
    each number that a matrix puts out (attention, activation and product take it up again), once more for the widest
    (what the activation puts out), and for each that goes into a matrix which is trained."""
    norms = sum("norm" in name and name.endswith("weight") for name, _ in block.named_parameters())
    matrices = [p for p in block.parameters() if p.dim() == 2]
    return 4 * width * norms + size * (max(max(p.shape) for p in matrices) + sum(
        sum(p.shape) if p.requires_grad else p.shape[0] for p in matrices))


def gpu_memory(cfg, model, world, positions, targets):
    """Bytes on one GPU, by part, while backward begins; `positions` a sample, `targets` of them trained.

    frozen: weights in the compute dtype. weights, gradients, moments: 4, 4 and 8 bytes for each trained one. --fsdp
    divides all four by the ranks, but for gradients with --grad_accum, which stay whole until the last micro-batch.
    copies: --fsdp gathers a block and prefetches another (2 x the largest, in the compute dtype; if trained also its
    gradients, once in that dtype and once in fp32), and holds what is in no block (embeddings, head, adapter) whole,
    with fp32 gradients. DDP holds the gradients twice. Autocast keeps a copy of trained fp32 weights in bf16.
    activations: batch x positions x blocks x (kept_values + 2 norms' inputs in fp32); of the vision tower only with
    --tune_vision. checkpointed: each block's input, and one block's activations. logits: 12 bytes a trained
    position and vocabulary entry: log-probabilities and two gradients, in fp32.
    Left out: the CUDA context, the allocator's fragments, buffers of kernels; 2 to 4 GiB.
    """
    size, shards = 4 if cfg.dtype == "float32" else 2, world if cfg.fsdp else 1
    everything = list(model.parameters())
    tuned, blocks = trained(everything), [b for part in model.blocks() for b in part]
    mem = dict(frozen=sum(p.nbytes for p in everything if not p.requires_grad) / shards,
               weights=4 * numel(tuned) / shards, gradients=4 * numel(tuned) / (1 if cfg.grad_accum > 1 else shards),
               moments=8 * numel(tuned) / shards)
    cast = tuned
    if cfg.fsdp:
        inside = {id(p) for b in blocks for p in b.parameters()}
        root = [p for p in everything if id(p) not in inside]
        cast = trained(root)
        mem["copies"] = sum(p.nbytes for p in root) + 4 * numel(cast) + max(
            2 * size * numel(b.parameters()) + (size + 4) * numel(trained(b.parameters())) for b in blocks)
    else:
        mem["copies"] = 4 * numel(tuned) if world > 1 else 0
    mem["copies"] += 2 * numel(cast) if size == 2 else 0

    kept = inputs = largest = 0
    for part, part_blocks, length in zip((model.vision, model.llm), model.blocks(), (model.image_tokens, positions)):
        if part is model.llm or cfg.tune_vision:
            width = part.config.get_text_config().hidden_size
            rows, one = cfg.batch_size * length, [kept_bytes(b, width, size) for b in part_blocks]
            kept, largest = kept + rows * sum(one), max(largest, rows * max(one))
            # between blocks: fp32 where fp32 weights are trained under autocast, the compute dtype elsewhere
            inputs += rows * len(one) * width * (size if cfg.fsdp else next(part_blocks[0].parameters()).element_size())
    logits = 12 * cfg.batch_size * targets * model.llm.get_output_embeddings().weight.shape[0]
    mem.update(logits=logits, activations=kept, checkpointed=inputs + largest)
    always = sum(mem[k] for k in ("frozen", "weights", "gradients", "moments", "copies", "logits"))
    return mem | dict(total=always + kept, total_checkpointed=always + inputs + largest)
