"""Train with SEA. Stage 1, pretrain: the adapter, L = L_g + λ L_a (Eq. 13). Stage 2, finetune: LLM and adapter, L_g.

    python train.py --stage pretrain --preset toy                     a laptop: builds its own world, takes minutes
    python train.py --stage pretrain --preset toy --sea_weight 0      the baseline
    python train.py --stage finetune --preset toy --init out/toy      stage 2 of either
    torchrun --nproc_per_node=8 train.py --stage pretrain             the paper's run: Vicuna-7B, CLIP-L@336
    torchrun --nproc_per_node=8 train.py --stage finetune --init out/pretrain --fsdp
    python train.py --stage finetune --world_size 8 --dry_run         what that would cost; nothing is loaded

Every flag is a field of TrainConfig. A run leaves in --out_dir: config.json, metrics.jsonl (a line per logged step),
checkpoints/step_N/ (all that --resume needs) and at the end model/: the adapter after stage 1, a Hugging Face Llava
folder after stage 2 or with --export.
"""

import argparse
import contextlib
import dataclasses
import datetime
import functools
import inspect
import itertools
import json
import math
import os
import shutil
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup
from transformers.utils.logging import disable_progress_bar

from bench import plan
from data import (
    IGNORE,
    LlavaDataset,
    UserError,
    add_flags,
    cli,
    collate,
    load_samples,
    micro_batches,
    sample_length,
)
from eval import alignment_sums
from labels import LabelStore
from loss import total_loss
from model import SEAModel, newest_checkpoints

warnings.filterwarnings(
    "ignore", message="torch.distributed is disabled"
)  # dcp, when plain python saves or loads

# ---------------------------------------------------------------------------------------------------- config


def flag(default, help):
    return dataclasses.field(default=default, metadata={"help": f"{help} (default: {default!r})"})


@dataclass(frozen=True)
class TrainConfig:
    stage: Literal["pretrain", "finetune"] = flag(
        "pretrain", "pretrain: the adapter, on captions; finetune: the LLM too, on conversations"
    )
    recipe: Literal["llava15", "prime"] = flag(
        "llava15", "llava15: Tables 2 to 5; prime: SEA-PRIME of Table 1"
    )
    preset: Literal["", "toy", "small"] = flag(
        "",
        "toy: the zero-download world, made on first use in ./toy; small: "
        "Qwen3-0.6B on one 24 GB GPU",
    )
    # what
    llm: str = flag(
        "vicuna-7b",
        "pretrain: causal LM, a short name (see model.py), hub name, folder or GGUF file",
    )
    vision: str = flag(
        "clip-l-336", "pretrain: CLIP, SigLIP or DINOv2 tower, a short name, hub name or folder"
    )
    init: str = flag(
        "", "finetune: the out_dir of stage 1, or a Hugging Face Llava folder or hub name"
    )
    data: str = flag(
        "data/blip_laion_cc_sbu_558k.json", "samples in LLaVA's format, .json or .jsonl"
    )
    image_folder: str = flag("data/images", "where the samples' image paths begin")
    image_mode: Literal["", "pad"] = flag(
        "", "'' = the tower's own crop or squash, pad = to a square first"
    )
    labels: str = flag(
        "data/labels", "label store of labels.py extract, for the same data and vision tower"
    )
    val_data: str = flag("", "held-out samples for the loss and, in pretrain, TACS; '' = none")
    val_image_folder: str = flag("", "'' = image_folder")
    out_dir: str = flag(
        "", "'' = out/<stage>, out/<preset>, or the same with a number that is still free"
    )
    # SEA
    sea_weight: float = flag(
        1.0, "λ of Eq. 13, pretrain only; 0 is the LLaVA baseline and needs no labels"
    )
    window: int = flag(2, "k: one patch of each k x k window is drawn")
    tau: float = flag(1.0, "initial temperature of Eq. 11, then learned")
    gather_pairs: bool = flag(
        False, "contrast over the micro-batches of all ranks instead of the rank's own"
    )
    # recipe, LLaVA-1.5 stage 1: a global batch of 256 = 8 GPUs x 32; RECIPES says what stage 2 changes
    batch_size: int = flag(32, "samples per GPU in one forward pass")
    grad_accum: int = flag(
        1, "forward passes per optimizer step; multiply it when there are fewer GPUs"
    )
    lr: float = flag(1e-3, "peak learning rate, cosine to 0")
    tune_vision: bool = flag(False, "finetune: train the vision tower too (Table 4)")
    vision_lr: float = flag(2e-6, "peak learning rate of the vision tower")
    warmup_ratio: float = flag(0.03, "share of the steps with linear warmup")
    weight_decay: float = flag(0.0, "of all that is trained but τ")
    clip_grad: float = flag(0.0, "largest norm of the gradient; 0 = no clipping, as LLaVA")
    epochs: float = flag(1.0, "passes over the data")
    max_steps: int = flag(0, "steps instead of epochs; 0 = by epochs")
    max_length: int = flag(2048, "positions per sample, image included")
    seed: int = flag(0, "of initialisation, order and sampling")
    # machine
    dtype: Literal["auto", "float32", "bfloat16"] = flag(
        "auto", "of frozen weights, autocast, export; bf16 on GPUs"
    )
    fsdp: bool = flag(False, "shard the model over the ranks (FSDP2) instead of copying it (DDP)")
    grad_checkpoint: bool = flag(
        True, "recompute activations in backward, as LLaVA: less memory, more time"
    )
    compile: bool = flag(False, "torch.compile each transformer block of the LLM")
    workers: int = flag(4, "image-decoding processes per rank")
    # log
    log_every: int = flag(1, "steps per line of metrics.jsonl")
    val_every: int = flag(100, "steps between evaluations on val_data; the last step always is one")
    val_samples: int = flag(100, "samples of val_data to use")
    save_every: int = flag(500, "steps between checkpoints; 0 = none")
    keep: int = flag(0, "how many checkpoints stay on disk, the newest; 0 = all")
    resume: bool = flag(False, "go on from the newest checkpoint in out_dir")
    export: bool = flag(
        False, "pretrain: write model/ as a Hugging Face Llava folder too, as finetune always does"
    )
    dry_run: bool = flag(
        False, "print what the run would cost and stop; nothing is loaded or written"
    )
    world_size: int = flag(0, "dry_run: the number of GPUs; 0 = of this launch")


# What a recipe changes, by stage. A global batch of 128 = 8 GPUs x 16 in stage 2.
_FINETUNE = dict(
    llm="",
    vision="",
    init="out/pretrain",
    sea_weight=0.0,
    labels="",
    image_mode="pad",
    batch_size=16,
    lr=2e-5,
    keep=1,
)
RECIPES = {
    ("llava15", "pretrain"): {},
    ("llava15", "finetune"): dict(_FINETUNE, data="data/llava_v1_5_mix665k.json"),
    # PAPER: SEA-PRIME follows LLaVA's hyperparameters; 2e-5 at 128 is Cambrian-1's 4e-5 at 512, for lr ~ √batch
    ("prime", "pretrain"): dict(vision="siglip-384", data="data/alignment_2.5m.jsonl"),
    ("prime", "finetune"): dict(
        _FINETUNE, data="data/Cambrian7M_withsystemprompt.jsonl", tune_vision=True
    ),
}
_TOY = dict(
    image_folder="toy/images",
    batch_size=16,
    max_steps=180,
    val_every=30,
    save_every=60,
    workers=0,
    grad_checkpoint=False,
)
PRESETS = {
    ("toy", "pretrain"): dict(
        _TOY,
        llm="toy/llm",
        vision="toy/vision",
        data="toy/train.json",
        labels="toy/labels",
        val_data="toy/val.json",
    ),
    ("toy", "finetune"): dict(
        _TOY,
        init="out/toy",
        data="toy/train_qa.json",
        val_data="toy/val_qa.json",
        lr=3e-4,
        image_mode="",
    ),
    ("small", "pretrain"): dict(llm="qwen3-0.6b", batch_size=8, grad_accum=32),
    ("small", "finetune"): dict(init="out/small", batch_size=4, grad_accum=32),
}


def parse_config(argv=None):
    """Flags -> TrainConfig: recipe and preset fill in what the flags leave open; contradictions are refused."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_flags(
        parser,
        inspect.signature(TrainConfig),
        **{f.name: f.metadata["help"] for f in dataclasses.fields(TrainConfig)},
    )
    args = parser.parse_args(argv)
    parser.set_defaults(
        **RECIPES[args.recipe, args.stage] | PRESETS.get((args.preset, args.stage), {})
    )
    cfg = TrainConfig(**vars(parser.parse_args(argv)))
    for name in (
        "batch_size",
        "grad_accum",
        "window",
        "log_every",
        "val_every",
        "max_length",
        "epochs",
        "tau",
        "lr",
    ):
        if getattr(cfg, name) <= 0:
            raise UserError(f"--{name} must be positive, not {getattr(cfg, name)}")
    for name in (
        "sea_weight",
        "clip_grad",
        "keep",
        "vision_lr",
        "max_steps",
        "save_every",
        "warmup_ratio",
        "workers",
    ):
        if getattr(cfg, name) < 0:
            raise UserError(f"--{name} must not be negative, not {getattr(cfg, name)}")
    for name, needs, why in (
        (
            "gather_pairs",
            cfg.sea_weight > 0,
            "contradicts --sea_weight 0: the baseline has no pairs",
        ),
        (
            "gather_pairs",
            max(cfg.world_size, world_size()) > 1,
            "needs several ranks: start with torchrun",
        ),
        ("resume", cfg.out_dir, "needs --out_dir, the folder of the run to go on with"),
        (
            "fsdp",
            "RANK" in os.environ or cfg.dry_run,
            "needs torchrun, for one GPU too: --nproc_per_node=1",
        ),
        ("world_size", cfg.dry_run, "belongs to --dry_run; a run gets its ranks from torchrun"),
        (
            "init",
            cfg.stage == "finetune",
            "belongs to --stage finetune: pretrain starts from --llm and --vision",
        ),
        (
            "tune_vision",
            cfg.stage == "finetune",
            "belongs to --stage finetune: labels are of the tower as it is",
        ),
        (
            "llm",
            cfg.stage == "pretrain",
            "belongs to --stage pretrain: finetune takes its parts from --init",
        ),
        (
            "vision",
            cfg.stage == "pretrain",
            "belongs to --stage pretrain: finetune takes its parts from --init",
        ),
        (
            "sea_weight",
            cfg.stage == "pretrain",
            "belongs to --stage pretrain: SEA aligns the adapter alone",
        ),
        (
            "image_mode",
            cfg.sea_weight == 0,
            "pad has no labels: they are of the tower's own crop or squash",
        ),
    ):
        if getattr(cfg, name) and not needs and not (cfg.dry_run and name in ("llm", "vision")):
            raise UserError(f"--{name} {why}")
    return cfg


# ----------------------------------------------------------------------------------------------- distributed


def rank():
    return int(os.environ.get("RANK", 0))


def world_size():
    return int(os.environ.get("WORLD_SIZE", 1))


def setup_distributed():
    """-> device. Under torchrun joins the group (nccl on GPUs, gloo on CPUs); plain python is one process."""
    cuda = torch.cuda.is_available()
    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    )
    if cuda:
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            device_id=device if cuda else None,
            timeout=datetime.timedelta(hours=1),
        )  # rank 0 may take long to write the model
    if rank() != 0:
        disable_progress_bar()  # of transformers, which shows one for each file that it loads
    return device


def all_sum(values, device):
    """Sum a list of numbers over the ranks."""
    total = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=device) for v in values])
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.tolist()


def barrier():
    if dist.is_initialized():
        dist.barrier()


def on_rank_0_first(f):
    """Run f on rank 0 while the others wait, so that files are made once."""
    if rank() == 0:
        f()
    barrier()


def wrap(cfg, model, dtype):
    """Compile, then shard or copy over the ranks -> what to call forward on. Plain python: the model itself.

    FSDP2 block by block; the rest (embeddings and head, which may be tied, adapter, τ) is one group of its own. It
    casts weights to `dtype` by itself, so that autocast is off: torch 2.11 would recompute a block in another dtype.
    Towers are not wrapped whole: they would lose hidden_states.
    """
    if cfg.compile:
        for block in model.blocks()[1]:
            block.compile(dynamic=True)
    if cfg.fsdp:
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        for block in itertools.chain(*model.blocks()):
            fully_shard(block, mp_policy=policy)
        return fully_shard(model, mp_policy=dataclasses.replace(policy, cast_forward_inputs=False))
    return (
        DistributedDataParallel(model, gradient_as_bucket_view=True)
        if dist.is_initialized()
        else model
    )


# ----------------------------------------------------------------------------------------------------- build


def prepare_out_dir(cfg):
    """-> out_dir; a folder that holds another run is never written over."""
    if cfg.out_dir:
        out = Path(cfg.out_dir)
        if (out / "metrics.jsonl").exists() and not cfg.resume:
            raise UserError(
                f"{out} holds a run already: add --resume to go on with it, or choose another --out_dir"
            )
    else:
        base = f"out/{cfg.preset or cfg.stage}"
        if cfg.stage == "pretrain":
            base += "" if cfg.sea_weight else "_baseline"
        elif cfg.preset:
            base += "_finetune"
        out = next(
            p
            for i in range(1, 10**6)
            if not (p := Path(base if i == 1 else f"{base}_{i}")).exists()
        )
    return out


def build_model(cfg, device):
    """-> the model, with fp32 weights where it is trained, and the dtype of compute and of what is frozen."""
    auto = "bfloat16" if device.type == "cuda" else "float32"
    dtype = getattr(torch, auto if cfg.dtype == "auto" else cfg.dtype)
    torch.manual_seed(cfg.seed)
    if cfg.stage == "pretrain":
        model = SEAModel.from_parts(cfg.vision, cfg.llm, dtype, cfg.tau)
        model.log_scale.requires_grad_(cfg.sea_weight > 0)
    else:
        model = SEAModel.from_run(cfg.init)
        model.log_scale.requires_grad_(False)
        model.llm.requires_grad_(True)  # its embeddings and head included
        model.tune_vision() if cfg.tune_vision else model.vision.to(dtype)
    if cfg.image_mode:
        model.geometry["mode"] = cfg.image_mode
    if cfg.grad_checkpoint:
        for part in (model.llm, model.vision)[: 1 + cfg.tune_vision]:
            # the name before transformers 5.23 and the name since
            enable = getattr(
                part, "activation_checkpointing_enable", part.gradient_checkpointing_enable
            )
            enable({"use_reentrant": False})
            part.train()  # transformers checkpoints in training mode only; the models named here have no dropout
    return (model if cfg.fsdp else model.to(device)), dtype  # FSDP moves each shard by itself


def build_data(cfg, model):
    """-> training set with its labels checked, validation set or None."""

    def dataset(path, image_folder, **kwargs):
        return LlavaDataset(
            load_samples(path, cfg.stage == "pretrain"),
            image_folder,
            model.geometry,
            model.tokenizer,
            model.image_tokens,
            cfg.max_length,
            chat=cfg.stage == "finetune",
            **kwargs,
        )

    train_set, val_set = dataset(cfg.data, cfg.image_folder), None
    if cfg.sea_weight > 0:
        train_set.labels = LabelStore(cfg.labels)
        train_set.labels.check(train_set.samples, model.geometry, model.grid)
        model.set_words(train_set.labels.words)
    if cfg.val_data:
        val_set = dataset(cfg.val_data, cfg.val_image_folder or cfg.image_folder)
        val_set = Subset(val_set, range(min(cfg.val_samples, len(val_set))))
    return train_set, val_set


def build_optimizer(cfg, model, steps):
    """AdamW as in LLaVA, linear warmup and cosine to 0; the vision tower at its own rate, τ without decay."""
    groups = {
        "": dict(weight_decay=cfg.weight_decay),
        "vision": dict(weight_decay=cfg.weight_decay, lr=cfg.vision_lr),
        "log_scale": dict(weight_decay=0.0),
    }
    for name, p in model.named_parameters():
        if p.requires_grad:
            part = name.split(".")[0]
            groups[part if part in groups else ""].setdefault("params", []).append(p)
    optimizer = torch.optim.AdamW(
        [g for g in groups.values() if "params" in g], lr=cfg.lr, betas=(0.9, 0.999), eps=1e-8
    )
    return optimizer, get_cosine_schedule_with_warmup(
        optimizer, math.ceil(cfg.warmup_ratio * steps), steps
    )


# ----------------------------------------------------------------------------------------------- checkpoints


def training_state(model, optimizer):
    return dict(
        model={name: p.detach() for name, p in model.named_parameters() if p.requires_grad},
        optimizer=get_optimizer_state_dict(model, optimizer),
    )


def save_checkpoint(folder, cfg, model, optimizer, schedule, step):
    """Write checkpoints/step_N whole or not at all, every rank its shards. The data position is the step, for the
    order depends on nothing else, and all random numbers are keyed by (seed, step, sample)."""
    tmp, adapter = folder.with_name(folder.name + ".tmp"), model.trained_state()
    on_rank_0_first(lambda: (shutil.rmtree(tmp, ignore_errors=True), tmp.mkdir(parents=True)))
    dcp.save(training_state(model, optimizer), checkpoint_id=tmp, no_dist=not dist.is_initialized())
    barrier()
    if rank() == 0:
        if cfg.stage == "pretrain":  # for eval.py
            model.save_adapter(tmp, adapter)
        (tmp / "state.json").write_text(
            json.dumps(
                dict(
                    step=step,
                    schedule=schedule.state_dict(),
                    config=dataclasses.asdict(cfg),
                    world=world_size(),
                )
            )
        )
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(tmp, folder)
        for old in newest_checkpoints(folder.parent.parent)[cfg.keep or 10**6 :]:
            shutil.rmtree(old)
    barrier()


def load_checkpoint(out_dir, cfg, model, optimizer, schedule):
    """Restore the newest checkpoint, of any number of ranks -> the step to go on with."""
    folder = next(iter(newest_checkpoints(out_dir)), None)
    if not folder:
        raise UserError(f"{out_dir}: no checkpoint to resume from")
    saved = json.loads(
        (folder / "state.json").read_text()
    )  # written last: a checkpoint has it or is none
    free = {
        "resume",
        "out_dir",
        "workers",
        "log_every",
        "val_every",
        "save_every",
        "val_samples",
        "keep",
        "fsdp",
        "compile",
        "grad_checkpoint",
        "grad_accum",
        "export",
    }
    old, new = (
        config | {"grad_accum x ranks": config["grad_accum"] * world}
        for config, world in (
            (saved["config"], saved["world"]),
            (dataclasses.asdict(cfg), world_size()),
        )
    )
    for name in new:
        if name not in free and old.get(name) != new[name]:
            raise UserError(
                f"--resume: this run has {name} = {new[name]}, the checkpoint {folder} {name} = "
                f"{old.get(name)}"
            )
    state = training_state(model, optimizer)
    try:
        dcp.load(state, checkpoint_id=folder, no_dist=not dist.is_initialized())
    except dcp.CheckpointException as e:
        reason = next(iter(e.failures.values()))[0]
        raise UserError(
            f"{folder}: truncated or corrupt ({reason}); remove this folder to resume from the one "
            "before"
        ) from e
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    schedule.load_state_dict(saved["schedule"])
    return saved["step"]


# ------------------------------------------------------------------------------------------------------ step


def sample_generators(seed, step, index):
    """One generator per sample, keyed by (seed, step, sample): what is drawn does not depend on the rank."""
    seeds = [
        int(np.random.SeedSequence([seed, step, i]).generate_state(1, np.uint64)[0] >> 1)
        for i in index
    ]
    return [torch.Generator().manual_seed(s) for s in seeds]


def train_step(cfg, model, forward, batches, optimizer, schedule, step, device, autocast):
    """One optimizer step over this rank's micro-batches -> dict of metrics, summed or averaged over ranks."""
    trained = sum(int((b["labels"][:, 1:] != IGNORE).sum()) for b in batches)
    num_targets = max(1.0, *all_sum([trained], device))
    lr = schedule.get_last_lr()[0]
    loss_g = loss_a = pairs = matched = torch.zeros((), device=device)
    for i, batch in enumerate(batches):
        index = batch.pop("index")
        batch = {
            k: v if k.startswith("label_") else v.to(device, non_blocking=True)
            for k, v in batch.items()
        }
        # DDP averages gradients after the last micro-batch; FSDP after each, or it would hold them whole
        wait = isinstance(forward, DistributedDataParallel) and i < len(batches) - 1
        with forward.no_sync() if wait else contextlib.nullcontext():
            with autocast():
                # DDP and FSDP average gradients over ranks: a per-rank share of the mean over all ranks' tokens
                out = forward(
                    **batch,
                    num_targets=num_targets / world_size(),
                    window=cfg.window,
                    generator=sample_generators(cfg.seed, step, index),
                    gather_pairs=cfg.gather_pairs,
                )
            part_a = out.get("loss_a", loss_a * 0) / len(batches)
            total_loss(out["loss_g"], part_a, cfg.sea_weight).backward()
        loss_g, loss_a = loss_g + out["loss_g"].detach(), loss_a + part_a.detach()
        pairs, matched = pairs + out.get("pairs", 0), matched + out.get("matched", 0)
    if cfg.clip_grad:
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip_grad)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        model.log_scale.clamp_(max=math.log(100))  # PAPER: τ is kept above 0.01, as CLIP does
    positions = sum(int(b["attention_mask"].sum()) for b in batches)
    samples = sum(len(b["input_ids"]) for b in batches)
    loss_g, loss_a, pairs, matched, positions, samples = all_sum(
        [loss_g, loss_a, pairs, matched, positions, samples], device
    )
    metrics = dict(
        step=step + 1,
        loss_g=loss_g / world_size(),
        lr=lr,
        tokens=int(positions),
        samples=int(samples),
    )
    if cfg.sea_weight > 0:
        metrics.update(
            loss_a=loss_a / world_size(),
            tau=float(out["tau"]),
            pairs=int(pairs),
            matched=matched / max(pairs, 1),
        )
    return metrics


# ------------------------------------------------------------------------------------------------------ main


def batches_of(dataset, cfg, model, steps, first_step):
    """Yield the list of this rank's micro-batches of each step; in stage 2 grouped by modality and length."""
    lengths = None
    if cfg.stage == "finetune":
        lengths = getattr(dataset.samples, "lengths", None)
        lengths = (
            np.array([sample_length(s) for s in dataset.samples]) if lengths is None else lengths
        )
    order = micro_batches(
        len(dataset),
        cfg.batch_size,
        cfg.grad_accum,
        steps,
        cfg.seed,
        first_step,
        rank(),
        world_size(),
        lengths,
    )
    padded = functools.partial(collate, pad_id=model.tokenizer.pad_token_id)
    loader = iter(
        DataLoader(
            dataset,
            batch_sampler=order,
            num_workers=cfg.workers,
            collate_fn=padded,
            pin_memory=torch.cuda.is_available(),
        )
    )
    for _ in range(first_step, steps):
        yield list(itertools.islice(loader, cfg.grad_accum))


def validate(cfg, forward, val_set, device, autocast):
    """Loss and, in stage 1, TACS on val_set, its samples shared out over the ranks."""
    own = list(range(rank(), len(val_set), world_size()))
    with autocast():
        sums = alignment_sums(forward, Subset(val_set, own), device)
        if len(own) < math.ceil(
            len(val_set) / world_size()
        ):  # sharded, all ranks have to run equally often
            alignment_sums(forward, Subset(val_set, [0]), device)
    if isinstance(forward, FSDPModule):
        forward.reshard()  # no backward does it here, and what is saved next must be the shards
    tacs, samples, loss, tokens = all_sum(sums, device)
    return dict(val_loss=loss / max(tokens, 1)) | (
        dict(val_tacs=tacs / samples) if cfg.stage == "pretrain" else {}
    )


def open_log(out_dir, cfg, first_step):
    """Write config.json and open metrics.jsonl behind the line of `first_step`; later lines were not checkpointed."""
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / "config.json").write_text(json.dumps(dataclasses.asdict(cfg), indent=1))
    path = out_dir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if first_step else []
    path.write_text(
        "".join(
            line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= first_step
        )
    )
    return path.open("a", buffering=1)


def save_result(cfg, model, out_dir, dtype):
    """Write out_dir/model: the adapter, or the whole model for transformers."""
    folder, whole = out_dir / "model", cfg.stage == "finetune" or cfg.export
    adapter, state = model.trained_state(), model.full_state() if whole else None
    if rank() == 0:
        folder.mkdir(exist_ok=True)
        if cfg.stage == "pretrain":
            model.save_adapter(folder, adapter)
        if whole and (reason := model.no_llava()):
            print(
                f"{folder}: transformers' Llava cannot hold this LLM ({reason}); its parts are written instead"
            )
            model.save_parts(folder, state, dtype)
        elif whole:
            model.save_llava(folder, state, dtype)
        print(f"wrote {folder}")


def main(argv=None):
    cfg = parse_config(argv)
    if cfg.dry_run:
        stage_1 = parse_config(
            ["--stage", "pretrain", "--recipe", cfg.recipe, "--preset", cfg.preset]
        )
        return plan(cfg, cfg.world_size or world_size(), stage_1)
    device = setup_distributed()
    if cfg.preset == "toy":
        import toy

        on_rank_0_first(toy.ensure)
    out_dir = prepare_out_dir(cfg)
    barrier()
    torch.set_float32_matmul_precision("high")  # tf32 for what is left in fp32, as in LLaVA

    model, dtype = build_model(cfg, device)
    train_set, val_set = build_data(cfg, model)
    forward = wrap(cfg, model, dtype)
    global_batch = cfg.batch_size * cfg.grad_accum * world_size()
    steps = cfg.max_steps or math.ceil(cfg.epochs * len(train_set) / global_batch)
    optimizer, schedule = build_optimizer(cfg, model, steps)
    first_step = load_checkpoint(out_dir, cfg, model, optimizer, schedule) if cfg.resume else 0
    autocast = functools.partial(
        torch.autocast,
        device.type,
        dtype=torch.bfloat16,
        enabled=dtype == torch.bfloat16 and not cfg.fsdp,
    )

    main_rank = rank() == 0
    if main_rank:
        log = open_log(out_dir, cfg, first_step)
        print(json.dumps(dataclasses.asdict(cfg)))
        print(
            f"{len(train_set):,} samples, {steps:,} steps of {global_batch}; trained: "
            f"{sum(p.numel() for p in model.parameters() if p.requires_grad):,} of "
            f"{sum(p.numel() for p in model.parameters()):,} parameters -> {out_dir}"
        )
    with tqdm(total=steps, initial=first_step, disable=not main_rank, desc="train") as bar:
        start = time.perf_counter()
        for step, batches in enumerate(
            batches_of(train_set, cfg, model, steps, first_step), first_step
        ):
            metrics = train_step(
                cfg, model, forward, batches, optimizer, schedule, step, device, autocast
            )
            done, seconds = step + 1, time.perf_counter() - start
            metrics.update(
                seen=done * global_batch,
                tokens_per_s=metrics.pop("tokens") / seconds,
                samples_per_s=metrics.pop("samples") / seconds,
            )
            if not math.isfinite(metrics["loss_g"] + metrics.get("loss_a", 0)):
                raise UserError(
                    f"step {done}: the loss is {metrics['loss_g']}; lower --lr, or use --dtype float32"
                )
            if val_set and (done % cfg.val_every == 0 or done == steps):
                metrics.update(validate(cfg, forward, val_set, device, autocast))
            if main_rank:
                bar.update()
                bar.set_postfix(
                    {
                        k: f"{metrics[k]:.3f}"
                        for k in ("loss_g", "loss_a", "val_loss", "val_tacs")
                        if k in metrics
                    }
                )
                if done % cfg.log_every == 0 or done == steps or "val_loss" in metrics:
                    log.write(json.dumps(metrics) + "\n")
            if cfg.save_every and done % cfg.save_every == 0:
                save_checkpoint(
                    out_dir / f"checkpoints/step_{done}", cfg, model, optimizer, schedule, done
                )
            start = time.perf_counter()
    save_result(cfg, model, out_dir, dtype)
    if main_rank and cfg.stage == "pretrain":
        print(
            f"Look at what the visual tokens say, and measure them:\n    python eval.py words --model {out_dir}\n"
            f"    python eval.py tacs --model {out_dir}\n    python eval.py gap --model {out_dir}"
        )
        if cfg.preset == "toy":
            print(
                "Baseline against SEA, over three seeds, and stage 2:\n    python toy.py report\n"
                f"    python train.py --stage finetune --preset toy --init {out_dir}"
            )
    barrier()


if __name__ == "__main__":
    cli(main)
    if dist.is_initialized():
        dist.destroy_process_group()
