"""Train with SEA: stage 1 (pretrain) the adapter with L_g + λ L_a, stage 2 (finetune) the LLM too.

    python train.py --stage pretrain --preset toy                     a laptop, minutes, no download
    python train.py --stage pretrain --preset toy --sea_weight 0      the baseline
    python train.py --stage finetune --preset toy --init out/toy      stage 2 of the first
    torchrun --nproc_per_node=8 train.py --stage pretrain             the paper's standard run
    torchrun --nproc_per_node=8 train.py --stage finetune --init out/pretrain --fsdp
    python train.py --stage finetune --world_size 8 --dry_run         its cost; nothing is loaded

Every flag is a field of TrainConfig. A run leaves in --out_dir: config.json, metrics.jsonl (a line
per logged step; the last one counts if --resume has repeated a step), checkpoints/step_N/ (all that
--resume needs, and the model) and at the end model/. The model is the adapter in stage 1, a Hugging
Face Llava folder in stage 2 or with --export.
"""

import argparse
import collections
import dataclasses
import datetime
import functools
import inspect
import json
import math
import os
import shutil
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
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
    append_json_line,
    cli,
    collate,
    load_samples,
    micro_batches,
    sample_lengths,
)
from eval import alignment_sums
from labels import LabelStore
from loss import total_loss
from model import (
    adapter_state,
    full_state,
    load_model,
    new_model,
    newest_checkpoints,
    save_adapter,
    save_llava,
)

# Said when plain python saves or loads a checkpoint, which is fine.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")

# ----------------------------------------------------------------------------- config


def flag(default, help, stage="", positive=False, most=10**9):
    """A field of TrainConfig. stage: the only stage that takes it.

    A number must be from 0 to `most`; positive: above 0.
    """
    only = f"{stage} only: " if stage else ""
    help = f"{only}{help} (default: {default!r})"
    metadata = {"help": help, "stage": stage, "positive": positive, "most": most}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class TrainConfig:
    """Defaults are stage 1 of LLaVA-1.5. SETTINGS overrides them by recipe, preset and stage."""

    stage: Literal["pretrain", "finetune"] = flag(
        "pretrain", "pretrain: the adapter, on captions; finetune: the LLM too, on conversations"
    )
    recipe: Literal["llava15", "prime"] = flag(
        "llava15", "llava15: Tables 2 to 5; prime: SEA-PRIME of Table 1"
    )
    preset: Literal["", "toy", "small"] = flag(
        "", "toy: the zero-download world, built in ./toy; small: Qwen3-0.6B on one 24 GB GPU"
    )

    # what is trained, on what
    llm: str = flag("vicuna-7b", "short name (see model.py), hub name, folder or GGUF", "pretrain")
    vision: str = flag("clip-l-336", "CLIP, SigLIP or DINOv2; short name, hub, folder", "pretrain")
    init: str = flag("", "the out_dir of stage 1, or a Llava folder or hub name", "finetune")
    data: str = flag("data/blip_laion_cc_sbu_558k.json", "samples in LLaVA's format, .json(l)")
    image_folder: str = flag("data/images", "where the samples' image paths begin")
    image_mode: Literal["", "pad"] = flag("", "'': the tower's crop or squash; pad: to a square")
    labels: str = flag("data/labels", "label store of the same data and vision tower", "pretrain")
    val_data: str = flag("", "held-out samples for the loss and, in pretrain, TACS; '': none")
    out_dir: str = flag("", "'': a folder below out/ that is named after the run")

    # SEA
    sea_weight: float = flag(1.0, "λ of Eq. 13; 0: the LLaVA baseline, without labels", "pretrain")
    window: int = flag(2, "k; one patch of each k x k window is drawn", "pretrain", positive=True)
    tau: float = flag(
        1.0, "initial temperature of Eq. 11, then learned", "pretrain", positive=True, most=100
    )
    gather_pairs: bool = flag(False, "contrast over the micro-batches of all ranks", "pretrain")

    # optimization; a global batch of 256 is 8 GPUs x 32, as in LLaVA
    batch_size: int = flag(32, "samples per GPU in one forward pass", positive=True)
    grad_accum: int = flag(1, "forward passes per step; more of them for fewer GPUs", positive=True)
    lr: float = flag(
        1e-3, "peak learning rate; linear warmup, then cosine to 0", positive=True, most=1
    )
    tune_vision: bool = flag(False, "train the vision tower too (Table 4)", "finetune")
    vision_lr: float = flag(2e-6, "peak learning rate of the vision tower", "finetune", most=1)
    warmup_ratio: float = flag(0.03, "share of the steps with linear warmup", most=1)
    clip_grad: float = flag(0.0, "largest norm of the gradient; 0: no clipping, as LLaVA")
    epochs: float = flag(1.0, "passes over the data", positive=True)
    max_steps: int = flag(0, "steps instead of epochs; 0: by epochs")
    max_length: int = flag(2048, "positions per sample, image included", positive=True)
    seed: int = flag(0, "of initialisation, order and sampling")

    # machine
    dtype: Literal["auto", "float32", "bfloat16"] = flag(
        "auto", "of frozen weights, autocast and export; auto: bfloat16 on GPUs"
    )
    fsdp: bool = flag(False, "shard the model over the ranks (FSDP2) instead of copying it (DDP)")
    grad_checkpoint: bool = flag(True, "recompute activations: less memory, more time, as LLaVA")
    compile: bool = flag(False, "torch.compile each transformer block of the LLM")
    workers: int = flag(4, "image-decoding processes per rank")

    # log
    log_every: int = flag(1, "steps per line of metrics.jsonl", positive=True)
    val_every: int = flag(100, "steps between validations; the last step is one", positive=True)
    val_samples: int = flag(100, "how many samples of val_data to use")
    save_every: int = flag(500, "steps between checkpoints; 0: none")
    keep: int = flag(0, "how many checkpoints stay on disk, the newest; 0: all")
    resume: bool = flag(False, "continue from the newest checkpoint in out_dir")
    export: bool = flag(False, "write model/ as a Llava folder too, as finetune does", "pretrain")
    dry_run: bool = flag(False, "print what the run would cost and stop; nothing is loaded")
    world_size: int = flag(0, "dry_run: the number of GPUs; 0: of this launch")

    def global_batch(self):
        return self.batch_size * self.grad_accum * world_size()


# What a recipe, then a preset, changes in TrainConfig's defaults. Flags have the last word.
_FINETUNE = dict(
    init="out/pretrain",
    llm="",
    vision="",
    labels="",
    sea_weight=0.0,
    image_mode="pad",
    batch_size=16,
    lr=2e-5,
    keep=1,
)
_TOY = dict(
    image_folder="toy/images",
    batch_size=16,
    max_steps=180,
    val_every=30,
    save_every=60,
    workers=0,
    grad_checkpoint=False,
)
SETTINGS = {
    ("llava15", "pretrain"): {},
    ("llava15", "finetune"): dict(_FINETUNE, data="data/llava_v1_5_mix665k.json"),
    # PAPER: SEA-PRIME follows LLaVA's hyperparameters. Cambrian-1's 4e-5 at a batch of 512, scaled
    # by √(128/512), is LLaVA's 2e-5 at 128.
    ("prime", "pretrain"): dict(vision="siglip-384", data="data/alignment_2.5m.jsonl"),
    ("prime", "finetune"): dict(
        _FINETUNE,
        init="out/prime",
        data="data/Cambrian7M_withsystemprompt.jsonl",
        tune_vision=True,
    ),
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
MAY_CHANGE_ON_RESUME = {
    *("resume", "out_dir", "fsdp", "compile", "grad_checkpoint", "workers", "grad_accum"),
    *("log_every", "val_every", "val_samples", "save_every", "keep", "export"),
}


def parse_config(argv=None):
    """Flags -> TrainConfig. Flags of the other stage and contradictions are refused."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    fields = dataclasses.fields(TrainConfig)
    help = {field.name: field.metadata["help"] for field in fields}
    add_flags(parser, inspect.signature(TrainConfig), help)
    given = vars(parser.parse_args(argv))  # the flags of this command line, without defaults
    stage = given.get("stage", "pretrain")
    recipe = SETTINGS[given.get("recipe", "llava15"), stage]
    preset = SETTINGS.get((given.get("preset"), stage), {})
    cfg = TrainConfig(**recipe | preset | given)

    for field in fields:
        name = field.name
        value = getattr(cfg, name)
        only = field.metadata["stage"]
        # --dry_run of stage 2 may name the parts, for a stage 1 that has not run yet.
        is_planned = cfg.dry_run and name in ("llm", "vision")
        if name in given and only not in ("", stage) and not is_planned:
            raise UserError(f"--{name} belongs to --stage {only}, not to --stage {stage}")
        if isinstance(value, str):
            continue
        least = "above 0" if field.metadata["positive"] else "at least 0"
        most = field.metadata["most"]
        if not (0 < value <= most or (value == 0 and least == "at least 0")):
            raise UserError(f"--{name} must be {least} and at most {most}, not {value}")
    refuse_contradictions(cfg)
    if not cfg.out_dir:
        cfg = dataclasses.replace(cfg, out_dir=default_out_dir(cfg, given))
    return cfg


def refuse_contradictions(cfg):
    is_single = max(cfg.world_size, world_size()) == 1
    for is_wrong, message in (
        (cfg.gather_pairs and not cfg.sea_weight, "--gather_pairs needs SEA: --sea_weight above 0"),
        (cfg.gather_pairs and is_single, "--gather_pairs needs several ranks: use torchrun"),
        (cfg.image_mode and cfg.sea_weight, "--image_mode pad has no labels: use --sea_weight 0"),
        (cfg.world_size and not cfg.dry_run, "--world_size belongs to --dry_run: use torchrun"),
        (
            Path(cfg.init, "checkpoints").exists() and not Path(cfg.init, "model").exists(),
            f"--init {cfg.init} has not finished: name one of its checkpoints",
        ),
        (
            cfg.fsdp and "RANK" not in os.environ and not cfg.dry_run,
            "--fsdp needs torchrun, on a single GPU too: torchrun --nproc_per_node=1 train.py",
        ),
    ):
        if is_wrong:
            raise UserError(message)


def default_out_dir(cfg, given):
    """A name below out/ that tells the run from others, such as out/pretrain_gemma-2b_baseline."""
    if cfg.stage == "finetune":
        return f"out/{Path(cfg.init).name}_finetune"
    name = cfg.preset or ("pretrain" if cfg.recipe == "llava15" else cfg.recipe)
    parts = [Path(given[part]).name for part in ("llm", "vision") if part in given]
    if cfg.sea_weight == 0:
        parts.append("baseline")
    return "out/" + "_".join([name, *parts])


# ----------------------------------------------------------------------------- the run


@dataclass
class Run:
    """What every step of a run works on; built by main."""

    cfg: TrainConfig
    device: torch.device
    dtype: torch.dtype  # of frozen weights and of compute
    model: Any  # the SEAModel
    parallel_model: Any  # the same model as DDP or FSDP makes it, whose forward is called
    optimizer: Any
    schedule: Any

    def autocast(self):
        """FSDP casts by itself; with autocast too, recomputation would use another dtype."""
        is_enabled = self.dtype == torch.bfloat16 and not self.cfg.fsdp
        return torch.autocast(self.device.type, torch.bfloat16, enabled=is_enabled)


def main(argv=None):
    cfg = parse_config(argv)
    if cfg.dry_run:
        stage_1 = parse_config(["--recipe", cfg.recipe, "--preset", cfg.preset])
        return plan(cfg, cfg.world_size or world_size(), stage_1)
    device = setup_distributed()
    if cfg.preset == "toy" and rank() == 0:
        import toy

        toy.ensure()
    check_out_dir(cfg)
    barrier()  # the toy is there, and all ranks have checked before one writes

    model, dtype = build_model(cfg, device)
    train_set, val_set = build_data(cfg, model)
    train_set[0]  # fails here, before there is a run, if the images are elsewhere
    steps = cfg.max_steps or math.ceil(cfg.epochs * len(train_set) / cfg.global_batch())
    parallel_model = parallelize(cfg, model, dtype)
    optimizer, schedule = build_optimizer(cfg, model, steps)
    run = Run(cfg, device, dtype, model, parallel_model, optimizer, schedule)
    first_step = load_checkpoint(run) if cfg.resume else 0

    if rank() == 0:
        write_config(cfg)
        print(cfg)
        print(f"{len(train_set):,} samples, {steps:,} steps of {cfg.global_batch()}")
    train(run, train_set, val_set, first_step, steps)
    save_model(run, Path(cfg.out_dir, "model"))
    if rank() == 0:
        print(f"wrote {cfg.out_dir}/model")
        if cfg.stage == "pretrain":
            print(f"Look at its visual tokens: python eval.py words --model {cfg.out_dir}")
        if cfg.preset == "toy":
            print("Compare with the baseline, over three seeds: python toy.py report")
    barrier()


def train(run, train_set, val_set, first_step, steps):
    """The loop: a step, a checkpoint and a validation where they are due, a line of the log."""
    cfg = run.cfg
    loader = iter(micro_batch_loader(train_set, run, first_step, steps))
    with tqdm(total=steps, initial=first_step, disable=rank() > 0, desc="train") as bar:
        for step in range(first_step + 1, steps + 1):
            start = time.perf_counter()
            batches = [next(loader) for _ in range(cfg.grad_accum)]
            metrics = train_step(run, batches, step)
            seconds = time.perf_counter() - start
            metrics["samples_per_s"] = cfg.global_batch() / seconds
            metrics["positions_per_s"] = metrics.pop("positions") / seconds
            if cfg.save_every and step % cfg.save_every == 0:  # whatever validation meets
                save_checkpoint(run, step)
            is_last = step == steps
            if val_set and (step % cfg.val_every == 0 or is_last):
                metrics.update(validate(run, val_set))
            if rank() == 0:
                shown = ("loss_g", "loss_a", "val_loss", "val_tacs")
                bar.update()
                bar.set_postfix({k: f"{metrics[k]:.3f}" for k in shown if k in metrics})
                if step % cfg.log_every == 0 or is_last or "val_loss" in metrics:
                    append_json_line(Path(cfg.out_dir, "metrics.jsonl"), metrics)


def train_step(run, batches, step):
    """One optimizer step over this rank's micro-batches -> metrics, of all ranks together."""
    cfg = run.cfg
    lr = run.schedule.get_last_lr()[0]
    own_targets = sum((batch["targets"][:, 1:] != IGNORE).sum() for batch in batches)
    [num_targets] = all_sum([own_targets], run.device)
    if num_targets == 0:
        raise UserError(f"step {step}: --max_length {cfg.max_length} cuts off all that is trained")
    sums = collections.defaultdict(float)
    samples = []
    for i, batch in enumerate(batches):
        index = batch.pop("index")
        samples += index
        sums["positions"] += batch["attention_mask"].sum()
        for name in ("input_ids", "attention_mask", "targets", "pixels"):  # not labels
            batch[name] = batch[name].to(run.device, non_blocking=True)

        # DDP averages gradients in the last micro-batch only; FSDP in each.
        run.parallel_model.require_backward_grad_sync = i == len(batches) - 1
        with run.autocast():
            out = run.parallel_model(
                **batch,
                # Averaging over ranks divides by their number once more.
                num_targets=num_targets / world_size(),
                window=cfg.window,
                generator=sample_generators(cfg.seed, step - 1, index),
                gather=cfg.gather_pairs,
            )
            # num_targets has averaged loss_g over the micro-batches. The baseline has no loss_a.
            loss_a = out.get("loss_a", 0) / len(batches)
            total_loss(out["loss_g"], loss_a, cfg.sea_weight).backward()
        for name in ("loss_g", "loss_a", "pairs", "matched"):
            sums[name] += torch.as_tensor(out.get(name, 0)).detach()

    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), cfg.clip_grad or math.inf)
    grad_norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    total = dict(zip(sums, all_sum(sums.values(), run.device)))
    loss_g = total["loss_g"] / world_size()
    metrics = dict(
        step=step, loss_g=loss_g, lr=lr, grad_norm=grad_norm, positions=total["positions"]
    )
    if cfg.sea_weight > 0:
        metrics.update(
            loss_a=total["loss_a"] / len(batches) / world_size(),
            tau=float(out["tau"]),
            pairs=int(total["pairs"]),
            matched=total["matched"] / max(total["pairs"], 1),
        )
    if not math.isfinite(loss_g + metrics.get("loss_a", 0) + grad_norm):
        raise UserError(
            f"loss or gradient is not finite: {metrics}, samples {samples}; lower --lr, or use "
            "--dtype float32"
        )

    run.optimizer.step()
    run.schedule.step()
    run.optimizer.zero_grad()
    with torch.no_grad():
        run.model.log_scale.clamp_(max=math.log(100))  # PAPER: τ is kept above 0.01, as CLIP does
    return metrics


def sample_generators(seed, step, index):
    """One generator per sample, keyed by (seed, step, sample): draws do not depend on the rank."""
    generators = []
    for i in index:
        key = np.random.SeedSequence([seed, step, i]).generate_state(1, np.uint64)[0]
        generators.append(torch.Generator().manual_seed(int(key >> 1)))
    return generators


def micro_batch_loader(train_set, run, first_step, steps):
    """This rank's micro-batches, step after step; in stage 2 grouped by modality and length."""
    cfg = run.cfg
    order = micro_batches(
        len(train_set),
        cfg.batch_size,
        cfg.grad_accum,
        steps,
        cfg.seed,
        first_step,
        rank(),
        world_size(),
        lengths=sample_lengths(train_set.samples) if cfg.stage == "finetune" else None,
    )
    return DataLoader(
        train_set,
        batch_sampler=order,
        num_workers=cfg.workers,
        collate_fn=functools.partial(collate, pad_id=run.model.tokenizer.pad_token_id),
        pin_memory=torch.cuda.is_available(),
    )


def validate(run, val_set):
    """Loss and, in stage 1, TACS on val_set, whose samples are shared out over the ranks."""
    own = Subset(val_set, range(rank(), len(val_set), world_size()))
    with run.autocast():
        sums = alignment_sums(run.parallel_model, own, run.device)
        if len(own) < math.ceil(len(val_set) / world_size()):
            # All ranks must join each forward pass: FSDP gathers weights in it, DDP sends buffers.
            alignment_sums(run.parallel_model, Subset(val_set, [0]), run.device)
    if run.cfg.fsdp:
        run.parallel_model.reshard()  # as a backward pass would; checkpoints hold shards
    tacs, images, loss, tokens = all_sum(sums, run.device)
    metrics = {"val_loss": loss / max(tokens, 1)}
    if run.cfg.stage == "pretrain":
        metrics["val_tacs"] = tacs / images
    return metrics


# ----------------------------------------------------------------------------- distributed


def rank():
    return int(os.environ.get("RANK", 0))


def world_size():
    return int(os.environ.get("WORLD_SIZE", 1))


def setup_distributed():
    """-> device. Under torchrun it joins the group; plain python is a single process."""
    torch.set_float32_matmul_precision("high")  # TF32 for what is left in float32, as in LLaVA
    if rank() != 0:
        disable_progress_bar()  # of transformers, one for each file that it loads
    device = None
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        an_hour = datetime.timedelta(hours=1)  # rank 0 may take long to write the model
        dist.init_process_group(timeout=an_hour, device_id=device)
    return device or torch.device("cpu")


def all_sum(values, device):
    """Sum numbers over the ranks -> list of floats."""
    total = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=device) for v in values])
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.tolist()


def barrier():
    if dist.is_initialized():
        dist.barrier()


def parallelize(cfg, model, dtype):
    """Compile, then shard (FSDP2) or copy (DDP) over the ranks -> the module to call.

    FSDP2 shards block by block. The rest is one group of its own: embeddings and head, which may be
    tied, the adapter and τ. The vision tower is not wrapped as a whole: that changes its class, and
    transformers then returns no hidden states.
    """
    vision_blocks, llm_blocks = model.blocks()
    if cfg.compile:
        for block in llm_blocks:
            block.compile(dynamic=True)
    if cfg.fsdp:
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        for block in [*vision_blocks, *llm_blocks]:
            fully_shard(block, mp_policy=policy)
        return fully_shard(model, mp_policy=dataclasses.replace(policy, cast_forward_inputs=False))
    if dist.is_initialized():
        return DistributedDataParallel(model, gradient_as_bucket_view=True)
    return model


# ----------------------------------------------------------------------------- build


def build_model(cfg, device):
    """-> the model, with float32 weights where it is trained, and the dtype of all else."""
    auto = "bfloat16" if device.type == "cuda" else "float32"
    dtype = getattr(torch, auto if cfg.dtype == "auto" else cfg.dtype)
    torch.manual_seed(cfg.seed)
    if cfg.stage == "pretrain":
        model = new_model(cfg.vision, cfg.llm, dtype, cfg.tau)
    else:
        model = load_model(cfg.init)
        model.thaw_llm(cfg.tune_vision, dtype)
    model.log_scale.requires_grad_(cfg.sea_weight > 0)
    if cfg.image_mode:
        model.preprocess["mode"] = cfg.image_mode
    if cfg.grad_checkpoint:
        enable = getattr(model.llava, "activation_checkpointing_enable", None)
        enable = enable or model.llava.gradient_checkpointing_enable  # before transformers 5.23
        enable({"use_reentrant": False})
        # transformers checkpoints in training mode only; no LLM here has dropout
        model.llava.model.language_model.train()
        model.vision_tower.train(cfg.tune_vision)
    # FSDP moves each shard by itself.
    return (model if cfg.fsdp else model.to(device)), dtype


def build_data(cfg, model):
    """-> training set with its labels checked, validation set or None."""
    is_pretrain = cfg.stage == "pretrain"

    def dataset(file):
        return LlavaDataset(
            load_samples(file, captions=is_pretrain),
            cfg.image_folder,
            model.preprocess,
            model.tokenizer,
            model.image_tokens,
            cfg.max_length,
            text="caption" if is_pretrain else "chat",
        )

    train_set = dataset(cfg.data)
    if cfg.sea_weight > 0:
        store = LabelStore(cfg.labels)
        store.check(train_set.samples, model.preprocess, model.grid)
        train_set.label_store = store
        model.set_words(store.words)
    if not cfg.val_data:
        return train_set, None
    val_set = dataset(cfg.val_data)
    return train_set, Subset(val_set, range(len(val_set))[: cfg.val_samples])


def build_optimizer(cfg, model, steps):
    """AdamW without weight decay, as in LLaVA; the vision tower has a rate of its own."""
    groups = [{"params": [], "lr": cfg.lr}, {"params": [], "lr": cfg.vision_lr}]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[".vision_tower." in name]["params"].append(parameter)
    groups = [group for group in groups if group["params"]]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)  # PyTorch's betas and eps are LLaVA's
    warmup_steps = math.ceil(cfg.warmup_ratio * steps)
    return optimizer, get_cosine_schedule_with_warmup(optimizer, warmup_steps, steps)


# ----------------------------------------------------------------------------- files


def check_out_dir(cfg):
    """Refuse a folder that holds a run or, with --resume, a run of other settings."""
    file = Path(cfg.out_dir, "config.json")
    if not file.exists():
        return
    if not cfg.resume:
        raise UserError(f"{cfg.out_dir} holds a run: --resume it, or use another --out_dir")
    saved = json.loads(file.read_text())
    for name, value in fixed_settings(cfg).items():
        if saved[name] != value:
            raise UserError(f"--resume: {name} is {value}, but {saved[name]} in {file}")


def write_config(cfg):
    """Write config.json. Of two launches at the same moment, the second fails here."""
    file = Path(cfg.out_dir, "config.json")
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "w" if cfg.resume else "x") as f:
        json.dump(dataclasses.asdict(cfg) | fixed_settings(cfg), f, indent=1)


def fixed_settings(cfg):
    """{name: value} of what --resume must not change."""
    settings = dataclasses.asdict(cfg) | {"samples_per_step": cfg.global_batch()}
    return {name: value for name, value in settings.items() if name not in MAY_CHANGE_ON_RESUME}


def training_state(run):
    """What a checkpoint restores. The weights are the model's own: dcp.load writes into them."""
    trained = {name: p.detach() for name, p in run.model.named_parameters() if p.requires_grad}
    optimizer = get_optimizer_state_dict(run.model, run.optimizer)
    return {"model": trained, "optimizer": optimizer, "schedule": run.schedule.state_dict()}


def save_checkpoint(run, step):
    """Write checkpoints/step_N whole or not at all, each rank its shards.

    The step is all there is to know of the data position and of random numbers: the order depends
    on nothing else, and what is drawn is keyed by (seed, step, sample).
    """
    folder = Path(run.cfg.out_dir) / f"checkpoints/step_{step}"
    unfinished = folder.with_name(folder.name + ".tmp")
    if rank() == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    barrier()
    save_model(run, unfinished)
    dcp.save(training_state(run), checkpoint_id=unfinished)
    barrier()
    if rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
        if run.cfg.keep:
            for old in newest_checkpoints(run.cfg.out_dir)[run.cfg.keep :]:
                shutil.rmtree(old)
    barrier()


def load_checkpoint(run):
    """Restore the newest checkpoint, of any number of ranks -> the number of steps done."""
    folder = next(iter(newest_checkpoints(run.cfg.out_dir)), None)
    if not folder:  # killed before the first one
        return 0
    state = training_state(run)
    try:
        dcp.load(state, checkpoint_id=folder)
    except dcp.CheckpointException as e:
        raise UserError(f"{folder}: truncated or corrupt; remove it to resume from another") from e
    set_optimizer_state_dict(run.model, run.optimizer, state["optimizer"])
    run.schedule.load_state_dict(state["schedule"])
    return int(folder.name.removeprefix("step_"))


def save_model(run, folder):
    """Write the adapter of stage 1; in stage 2, and with --export, a Llava folder."""
    is_pretrain = run.cfg.stage == "pretrain"
    adapter = adapter_state(run.model)
    state = full_state(run.model) if run.cfg.export or not is_pretrain else None
    if rank() == 0:
        folder.mkdir(exist_ok=True)
        if is_pretrain:
            save_adapter(folder, adapter, run.model.parts)
        if state:
            save_llava(run.model, folder, state, run.dtype)


if __name__ == "__main__":
    cli(main)
    if dist.is_initialized():
        dist.destroy_process_group()
