"""Train with SEA: stage 1 (pretrain) the adapter with L_g + λ L_a, stage 2 (finetune) the LLM too.

    torchrun --nproc_per_node=8 train.py --stage pretrain             the paper's standard run
    torchrun --nproc_per_node=8 train.py --stage finetune --init out/pretrain --fsdp
    torchrun --nproc_per_node=8 train.py --stage pretrain --sea_weight 0          its baseline
    python train.py --preset toy --out_dir out/mine   a laptop, a minute, after python -m tools.toy
    python -m tools.plan 8 --stage finetune --fsdp    what stage 2 would cost on 8 GPUs

Every flag is a field of TrainConfig. A run leaves in --out_dir: config.json, metrics.jsonl (a line
for each step and each validation; the last one counts if --resume has repeated a step),
checkpoints/step_N/ (all that --resume needs, and the model) and at the end model/. The model is the
adapter in stage 1, a Hugging Face Llava folder in stage 2 (--export: at the end of stage 1, too).

However a run ends, by Ctrl-C too, it loses at most the steps since its last checkpoint: the same
command with --resume goes on from there, or starts where there is none.
"""

import argparse
import collections
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
import signal
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from data import (
    LlavaDataset,
    UserError,
    add_flag,
    check_first_image,
    cli,
    collate,
    digest,
    find_data,
    image_of,
    load_samples,
    micro_batches,
    rank,
    rank_device,
    read_object,
    sample_lengths,
    world_size,
)
from eval import alignment_sums, all_sum, append_json_line, to_device
from labels import LabelStore, wait_for, write_file
from loss import total_loss
from model import (
    SEAModel,
    adapter_state,
    checkpoints,
    find_model,
    full_state,
    load_model,
    made_of,
    new_model,
    refuse_other_parts,
    save_adapter,
    save_llava,
)

# Said when plain python saves or loads a checkpoint, and when a plan, whose model has only shapes,
# meets an adapter's weights. Both are fine.
warnings.filterwarnings(
    "ignore", message="torch.distributed is disabled|for .*: copying from a non-meta"
)

# ----------------------------------------------------------------------------- config


def flag(default, help, only="", least=0, most=10**9):
    """A field of TrainConfig. only: the stage that takes it, or SEA. A number has a range."""
    metadata = {"help": help, "only": only, "least": least, "most": most}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class TrainConfig:
    """Defaults are stage 1 of LLaVA-1.5. SETTINGS has those of other presets and of stage 2."""

    # which run
    stage: Literal["pretrain", "finetune"] = flag(
        "pretrain", "pretrain: the adapter, on captions; finetune: the LLM too, on conversations"
    )
    preset: Literal["llava15", "prime", "toy"] = flag(
        "llava15", "llava15: Tables 2 to 5; prime: SEA-PRIME, Table 1; toy: the world in toy/"
    )

    # what is trained, on what
    llm: str = flag("vicuna-7b", "short name (see model.py), hub name, folder or GGUF file")
    vision: str = flag("clip-l-336", "CLIP, SigLIP or DINOv2; short name, hub name or folder")
    init: str = flag(
        "",
        "the out_dir of stage 1, or a Llava folder or hub name; with the former, --llm and "
        "--vision say where its parts are if they have moved",
        "finetune",
    )
    data: str = flag("data/blip_laion_cc_sbu_558k.json", "samples in LLaVA's format, .json(l)")
    image_folder: str = flag("data/images", "where the samples' image paths begin")
    image_mode: Literal["", "pad"] = flag("", "'': the tower's crop or squash; pad: to a square")
    labels: str = flag("data/labels", "label store of the same data and vision tower", "pretrain")
    val_data: str = flag("", "held-out samples for the loss and, in pretrain, TACS; '': none")
    out_dir: str = flag("", "'': a folder below out/ that is named after the run")

    # SEA. PAPER: λ is not given; 1 weighs both losses alike.
    sea_weight: float = flag(1.0, "λ of Eq. 13; 0: the LLaVA baseline, without labels", "pretrain")
    window: int = flag(2, "k; one patch of each k x k window is drawn", "SEA", least=1)
    tau: float = flag(
        1.0, "initial temperature of Eq. 11, then learned", "SEA", least=0.01, most=100
    )
    sharpness: float = flag(
        0.0, "s > 0: labels are drawn by softmax(s x score), CLIP's s is 100; 0: Eq. 9", "SEA"
    )
    gather_pairs: bool = flag(False, "contrast over the micro-batches of all ranks", "SEA")

    # optimization; a global batch of 256 is 8 GPUs x 32, as in LLaVA. N of Eq. 11 is of one
    # micro-batch: with a smaller batch_size and more grad_accum, fewer words are told apart.
    batch_size: int = flag(32, "samples per GPU in one forward pass", least=1)
    grad_accum: int = flag(1, "forward passes per step; more of them for fewer GPUs", least=1)
    lr: float = flag(
        1e-3, "peak learning rate; linear warmup, then cosine to 0", least=1e-15, most=1
    )
    tune_vision: bool = flag(False, "train the vision tower too (Table 4)", "finetune")
    # PAPER: Appendix B has 2e-6 for SEA-PRIME, Table 4 does not say; LLaVA freezes the tower.
    vision_lr: float = flag(2e-6, "peak learning rate of the vision tower", "finetune", most=1)
    warmup_ratio: float = flag(0.03, "share of the steps with linear warmup", most=1)
    max_steps: int = flag(0, "how many steps; 0: one pass over the data")
    max_length: int = flag(2048, "positions per sample, image included", least=1)
    seed: int = flag(0, "of initialisation, order and sampling")

    # machine
    dtype: Literal["", "float32", "bfloat16"] = flag(
        "", "of frozen weights, autocast and export; '': bfloat16 on GPUs, else float32"
    )
    fsdp: bool = flag(False, "shard the model over the ranks (FSDP2) instead of copying it (DDP)")
    grad_checkpoint: bool = flag(True, "recompute activations: less memory, more time, as LLaVA")
    compile: bool = flag(False, "torch.compile each transformer block of the LLM")
    workers: int = flag(4, "image-decoding processes per rank")

    # log
    val_every: int = flag(100, "steps between validations; the last step is one", least=1)
    val_samples: int = flag(100, "how many samples of val_data to use")
    save_every: int = flag(100, "steps between checkpoints; the last step is one; 0: none")
    keep: int = flag(0, "how many checkpoints stay on disk, the newest; 0: all")
    resume: bool = flag(
        False, "go on from out_dir's newest checkpoint, if it has any, with the flags of its run"
    )
    export: bool = flag(False, "make model/ a Llava folder too, as in finetune", "pretrain")

    def global_batch(self):
        return self.batch_size * self.grad_accum * world_size()


# Where the groups above begin, for --help
GROUPS = {
    "stage": "which run",
    "llm": "what is trained, on what",
    "sea_weight": "SEA",
    "batch_size": "optimization",
    "dtype": "machine",
    "val_every": "log",
}
_FINETUNE = dict(
    sea_weight=0.0, labels="", image_mode="pad", batch_size=16, lr=2e-5, save_every=500, keep=1
)
_TOY = dict(
    llm="toy/llm",
    vision="toy/vision",
    image_folder="toy/images",
    batch_size=16,
    max_steps=180,
    max_length=256,
    val_every=30,
    save_every=60,
    workers=0,
    grad_checkpoint=False,
)
# (preset, stage) -> the defaults that differ from TrainConfig's
SETTINGS = {
    # PAPER: Appendix B has "the same data as LLaVA-1.5, specifically the CC-595K". That is the
    # first LLaVA's; LLaVA-1.5 has these 558K.
    ("llava15", "pretrain"): {},
    ("llava15", "finetune"): dict(_FINETUNE, data="data/llava_v1_5_mix665k.json"),
    # PAPER: SEA-PRIME takes Cambrian-1's data and, as Appendix B says, LLaVA's hyperparameters.
    # Cambrian-1's own stage 1 pads images, speaks in the LLM's chat template and warms up for 6 %
    # of the steps. Its 4e-5 at a batch of 512 is, scaled by √(128/512), LLaVA's 2e-5 at 128.
    ("prime", "pretrain"): dict(vision="siglip-384", data="data/alignment_2.5m.jsonl"),
    ("prime", "finetune"): dict(
        _FINETUNE,
        vision="siglip-384",
        data="data/Cambrian7M_withsystemprompt.jsonl",
        tune_vision=True,
    ),
    ("toy", "pretrain"): dict(
        _TOY, data="toy/train.json", val_data="toy/val.json", labels="toy/labels"
    ),
    ("toy", "finetune"): dict(
        _FINETUNE | _TOY,
        data="toy/train_qa.json",
        val_data="toy/val_qa.json",
        lr=3e-4,
        image_mode="",
    ),
}
# What changes no result: where files lie, what is logged and kept, how the machine is used.
# grad_accum: for another number of GPUs (refuse_other_batches).
MAY_CHANGE_ON_RESUME = str.split("""
    resume out_dir data image_folder labels val_data val_every val_samples save_every keep export
    fsdp compile grad_checkpoint workers grad_accum
""")


def parse_config(argv=None):
    """Flags -> TrainConfig. Flags of the other stage and contradictions are refused.

    With --resume, what is not given is as in config.json of the run, if out_dir holds one.
    """
    fields = {field.name: field for field in dataclasses.fields(TrainConfig)}
    parameters = inspect.signature(TrainConfig).parameters
    options = dict(allow_abbrev=False, argument_default=argparse.SUPPRESS)
    first = argparse.ArgumentParser(add_help=False, **options)
    for name in ("stage", "preset"):
        add_flag(first, parameters[name], "")
    which = {"stage": "pretrain", "preset": "llava15"} | vars(first.parse_known_args(argv)[0])
    cfg = TrainConfig(**which, **SETTINGS[which["preset"], which["stage"]])

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, **options
    )
    for name, field in fields.items():
        if name in GROUPS:
            group = parser.add_argument_group(GROUPS[name])
        only = field.metadata["only"]
        default = f"{only} only" if only not in uses(cfg) else repr(getattr(cfg, name))
        add_flag(group, parameters[name], f"{field.metadata['help']} (default: {default})")
    given = vars(parser.parse_args(argv))  # the flags of this command line, without defaults
    cfg = dataclasses.replace(cfg, **given)
    if cfg.init:  # whose folder says which LLM and tower it was trained with
        parts = {name: given.get(name, "") for name in ("llm", "vision")}
        cfg = dataclasses.replace(cfg, **parts)
    if not cfg.out_dir:
        cfg = dataclasses.replace(cfg, out_dir=default_out_dir(cfg, given))
    saved = saved_config(cfg.out_dir) if cfg.resume else {}
    if saved:
        refuse_other_flags(given, saved)
        flags = {name: saved[name] for name in fields} | given
        cfg = TrainConfig(**(flags | dict(out_dir=cfg.out_dir)))  # it may have moved
        refuse_other_batches(cfg, saved)

    for name, field in fields.items():
        value = getattr(cfg, name)
        only = field.metadata["only"]
        if name in given and only not in uses(cfg):
            instead = f"{cfg.stage} with --sea_weight {cfg.sea_weight}"
            raise UserError(f"--{name} is for {only}, not for {instead}")
        least = field.metadata["least"]
        most = field.metadata["most"]
        if not isinstance(value, str) and not least <= value <= most:  # or NaN
            raise UserError(f"--{name} must be from {least} to {most}, not {value}")
    refuse_contradictions(cfg, given, is_new=not saved)
    return cfg


def uses(cfg):
    """The values of `only` that this run accepts."""
    return ("", cfg.stage, "SEA") if cfg.sea_weight > 0 else ("", cfg.stage)


def refuse_contradictions(cfg, given, is_new):
    parts = {"llm", "vision"} & given.keys()
    for is_wrong, message in (
        (
            cfg.gather_pairs and world_size() == 1,
            "--gather_pairs needs several ranks: torchrun",
        ),
        (cfg.image_mode and cfg.sea_weight, "--image_mode pad has no labels: use --sea_weight 0"),
        ("vision_lr" in given and not cfg.tune_vision, "--vision_lr is for --tune_vision"),
        (
            cfg.stage == "finetune" and is_new and not (cfg.init or parts),
            "--stage finetune needs --init, the --out_dir of its stage 1 (such as out/pretrain), "
            "or --llm and --vision to train without a stage 1",
        ),
        (
            cfg.init and checkpoints(cfg.init) and not Path(cfg.init, "model").exists(),
            f"--init {cfg.init} has not finished: name one of its checkpoints",
        ),
        (
            cfg.fsdp and "RANK" not in os.environ,
            "--fsdp needs torchrun, on a single GPU too: torchrun --nproc_per_node=1 train.py",
        ),
    ):
        if is_wrong:
            raise UserError(message)


def default_out_dir(cfg, given):
    """A name below out/ that tells the run from others, such as out/pretrain_gemma-2b_baseline."""
    if cfg.init:
        places = [part for part in Path(cfg.init).parts if part not in ("model", "checkpoints")]
        places = places or ["init"]
        is_step = places[-1].startswith("step_")
        return f"out/{'_'.join(places[-2:] if is_step else places[-1:])}_finetune"
    parts = [cfg.stage if cfg.preset == "llava15" else cfg.preset]
    parts += [Path(given[part]).name for part in ("llm", "vision") if part in given]
    if cfg.stage == "pretrain" and cfg.sea_weight == 0:
        parts.append("baseline")
    return "out/" + "_".join(parts)


# ----------------------------------------------------------------------------- the run


@dataclass
class Run:
    """What every step of a run works on; built by main."""

    cfg: TrainConfig
    device: torch.device
    dtype: torch.dtype  # of frozen weights and of compute
    model: SEAModel
    parallel_model: torch.nn.Module  # the same, as DDP or FSDP makes it: its forward is called
    optimizer: torch.optim.Optimizer
    steps: int  # of the whole run

    def forward(self, **batch):
        """The model's forward pass. Autocast covers it, but not backward.

        FSDP casts by itself: with autocast too, recomputation would use another dtype.
        """
        use_bfloat16 = self.dtype == torch.bfloat16 and not self.cfg.fsdp
        with torch.autocast(self.device.type, torch.bfloat16, use_bfloat16):
            return self.parallel_model(**batch)


def main(argv=None):
    cfg = parse_config(argv)
    device = setup_distributed()
    cfg = dataclasses.replace(cfg, dtype=cfg.dtype or default_dtype(device))
    if cfg.preset == "toy" and not Path("toy").exists():
        raise UserError("toy/ is not here: python -m tools.toy builds it, in minutes")
    lock = lock_out_dir(cfg)
    samples = load_samples(cfg.data, captions=cfg.stage == "pretrain")
    store = LabelStore(cfg.labels) if cfg.sea_weight > 0 else None
    check_first_image(samples, cfg.image_folder)
    if cfg.val_data:
        find_data(cfg.val_data)
    facts = run_facts(samples, store)
    refuse_other_data(cfg, facts)
    refuse_differing_ranks(dataclasses.asdict(cfg) | facts)

    model, dtype = build_model(cfg, device)
    train_set, val_set = build_data(cfg, model, samples, store)
    check_images(train_set, val_set)
    barrier()  # all ranks have checked before one writes
    steps = cfg.max_steps or math.ceil(len(train_set) / cfg.global_batch())
    parallel_model = parallelize(cfg, model, dtype)
    optimizer = build_optimizer(cfg, model)
    run = Run(cfg, device, dtype, model, parallel_model, optimizer, steps)
    saved = checkpoints(cfg.out_dir) if cfg.resume else {}
    first_step = max(saved, default=0)
    if saved:
        load_checkpoint(run, saved[first_step])

    if rank() == 0:
        content = json.dumps(dataclasses.asdict(cfg) | facts, indent=1)
        write_file(Path(cfg.out_dir, "config.json"), content)
        drop_torn_line(Path(cfg.out_dir, "metrics.jsonl"))
        images = (sample_lengths(train_set.samples) > 0).sum()
        print(
            f"{' and '.join(made_of(model.parts))}: {len(train_set):,} samples, {images:,} with an "
            f"image, {steps:,} steps of {cfg.global_batch()}"
        )
    barrier()
    wait_for(Path(cfg.out_dir, "config.json"), hours=0.05)  # other nodes must see the folder too
    train(run, train_set, val_set, first_step)
    with whole_folder(Path(cfg.out_dir, "model")) as folder:
        save_model(run, folder, export=cfg.export)
    if rank() == 0:
        print(f"wrote {cfg.out_dir}/model")
        lock.close()


def train(run, train_set, val_set, first_step):
    """The loop: steps, and where they are due a line of the log, a checkpoint and a validation."""
    cfg = run.cfg
    batches = iter(micro_batch_loader(train_set, run, first_step))
    has_bar = rank() == 0 and sys.stderr.isatty()
    bar = tqdm(total=run.steps, initial=first_step, disable=not has_bar, desc="train")
    shown = {}

    def log(metrics):
        if rank() != 0:
            return
        append_json_line(Path(cfg.out_dir, "metrics.jsonl"), metrics)
        for name in metrics.keys() & {"loss_g", "loss_a", "val_loss", "val_tacs"}:
            shown[name] = f"{metrics[name]:.3f}"
        bar.set_postfix(**shown)
        if not has_bar:  # a log file: a line that grep can use
            numbers = [f"{name} {x:.4g}" for name, x in metrics.items() if name != "step"]
            print(f"step {metrics['step']}/{run.steps}: {', '.join(numbers)}", flush=True)

    def validate_if_due(step):
        if val_set and (step % cfg.val_every == 0 or step == run.steps):
            log({"step": step} | validate(run, val_set))

    with bar:  # so that what ends the run is said on a line of its own
        if first_step:  # resumed: the kill may have come before its line
            validate_if_due(first_step)
        for step in range(first_step + 1, run.steps + 1):
            start = time.perf_counter()
            metrics = train_step(run, [next(batches) for _ in range(cfg.grad_accum)], step)
            metrics["samples_per_s"] = cfg.global_batch() / (time.perf_counter() - start)
            if step == 1 and metrics.get("pairs", 2) < 2:
                raise UserError(
                    f"a micro-batch has {metrics['pairs']:.3g} pairs on average, and nothing to "
                    "tell apart: use a larger --batch_size, a smaller --window, or other labels, "
                    "with another --out_dir"
                )
            bar.update()
            log(metrics)
            # A checkpoint first: nothing is lost if the last validation fails.
            if cfg.save_every and (step % cfg.save_every == 0 or step == run.steps):
                save_checkpoint(run, step)
            validate_if_due(step)


def train_step(run, batches, step):
    """One optimizer step over this rank's micro-batches -> metrics, of all ranks together.

    The GPU is waited for once, to read the metrics; with --gather_pairs for the pairs too.
    """
    cfg = run.cfg
    samples = [batch.pop("index") for batch in batches]
    # PAPER: Eq. 12 is a mean over all trained tokens of the step (in LLaVA, of each GPU's mean).
    # A micro-batch's sum is divided by num_targets, the tokens of an average micro-batch, so that
    # the plain mean over micro-batches and ranks, as of all numbers below, is Eq. 12.
    targets = sum(len(batch["trained"]) for batch in batches)
    num_targets = all_sum([targets], run.device)[0] / (len(batches) * world_size())
    means = collections.defaultdict(float)
    for i, batch in enumerate(batches):
        # DDP averages gradients in the last micro-batch only; FSDP in each.
        run.parallel_model.require_backward_grad_sync = i == len(batches) - 1
        out = run.forward(
            **to_device(batch, run.device),
            num_targets=num_targets,
            window=cfg.window,
            generator=micro_batch_generator(cfg, step, i),
            gather=cfg.gather_pairs,
            sharpness=cfg.sharpness,
        )
        loss = total_loss(out["loss_g"], out.get("loss_a", 0), cfg.sea_weight)  # Eq. 13
        (loss / len(batches)).backward()
        with torch.no_grad():
            for name in out:
                means[name] += out[name] / len(batches)

    grads = [p.grad for p in run.model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    means["grad_norm"] = norm.full_tensor() if isinstance(norm, DTensor) else norm
    of_ranks = all_sum(means.values(), run.device) / world_size()
    metrics = {"step": step} | dict(zip(means, of_ranks.tolist()))
    if not math.isfinite(sum(metrics.values())):
        raise UserError(
            f"step {step}: loss or gradient is not finite: {metrics}, this rank's samples "
            f"{samples}; lower --lr, use --dtype float32, or raise --max_length if it cuts off all "
            "that is trained, each with another --out_dir"
        )

    for group in run.optimizer.param_groups:
        group["lr"] = group["peak_lr"] * lr_at(step, run.steps, cfg.warmup_ratio)
    run.optimizer.step()
    run.optimizer.zero_grad()
    with torch.no_grad():
        # PAPER: this project keeps τ above 0.01, as CLIP does. In the 2,181 steps of stage 1, at
        # their learning rate, it falls to about 0.34 at most.
        run.model.log_scale.clamp_(max=math.log(100))
    return metrics | {"lr": run.optimizer.param_groups[0]["lr"]}


def lr_at(step, steps, warmup_ratio):
    """The learning rate of a step, 1 to steps, as a share of its peak: linear, then cosine to 0.

    As in LLaVA the first step of the warmup has rate 0.
    """
    warmup = math.ceil(warmup_ratio * steps)
    if step <= warmup:
        return (step - 1) / warmup
    progress = (step - 1 - warmup) / (steps - warmup)
    return (1 + math.cos(math.pi * progress)) / 2


def micro_batch_generator(cfg, step, i):
    """The generator of this rank's i-th micro-batch of a step, keyed by (seed, its number).

    Micro-batches are numbered as in data.micro_batches: what is drawn does not depend on how they
    are shared out over ranks and grad_accum.
    """
    number = ((step - 1) * cfg.grad_accum + i) * world_size() + rank()
    [key] = np.random.SeedSequence([cfg.seed, number]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(key) >> 1)


def micro_batch_loader(train_set, run, first_step):
    """This rank's micro-batches, step after step; in stage 2 grouped by modality and length."""
    cfg = run.cfg
    order = micro_batches(
        len(train_set),
        cfg.batch_size,
        cfg.grad_accum,
        run.steps,
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
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=end_quietly,
    )


def end_quietly(worker):
    """In a process that loads data: it gets a terminal's Ctrl-C too, but it ends with the run."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The thread that hands tensors over (multiprocessing.resource_sharer) reports through it when
    # the run is gone first.
    sys.excepthook = lambda *_: None


def validate(run, val_set):
    """Loss and, in stage 1, TACS on val_set."""
    tacs, images, loss, tokens = alignment_sums(run.forward, val_set, run.device)
    if run.cfg.fsdp:
        run.parallel_model.reshard()  # as a backward pass would; checkpoints hold shards
    metrics = {"val_loss": loss / max(tokens, 1)}
    if run.cfg.stage == "pretrain":
        metrics["val_tacs"] = tacs / images
    return metrics


# ----------------------------------------------------------------------------- distributed


def barrier():
    if dist.is_initialized():
        dist.barrier()


def setup_distributed():
    """-> device. Under torchrun it joins the group; plain python is a single process."""
    torch.set_float32_matmul_precision("high")  # TF32 for what is left in float32, as in LLaVA
    if rank() != 0:
        disable_progress_bar()  # of transformers, one for each file that it loads
    device = rank_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        an_hour = datetime.timedelta(hours=1)  # rank 0 may take long to write the model
        dist.init_process_group(timeout=an_hour)
    return device


def default_dtype(device):
    return "float32" if device.type == "cpu" else "bfloat16"


def parallelize(cfg, model, dtype):
    """Shard (FSDP2) or copy (DDP) over the ranks -> the module to call.

    FSDP2 shards block by block, and τ by itself, which stays in float32. The rest is one group:
    embeddings and head, which may be tied, and the adapter. The vision tower is not wrapped
    as a whole: that changes its class, and transformers then returns no hidden states.
    """
    if cfg.fsdp:
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        for block in itertools.chain(*model.blocks()):
            fully_shard(block, mp_policy=policy)
        fully_shard(model.temperature)
        return fully_shard(model, mp_policy=dataclasses.replace(policy, cast_forward_inputs=False))
    if dist.is_initialized():
        return DistributedDataParallel(model, gradient_as_bucket_view=True)
    return model


# ----------------------------------------------------------------------------- build


def build_model(cfg, device):
    """-> the model, with float32 weights where it is trained, and the dtype of all else."""
    dtype = getattr(torch, cfg.dtype or default_dtype(device))
    torch.manual_seed(cfg.seed)
    is_pretrain = cfg.stage == "pretrain"
    if cfg.init:
        model = load_model(cfg.init, llm=cfg.llm, vision=cfg.vision)
    else:
        model = new_model(cfg.vision, cfg.llm, dtype if is_pretrain else torch.float32, cfg.tau)
    if cfg.max_length > model.max_positions:
        raise UserError(
            f"--max_length {cfg.max_length}: the LLM has {model.max_positions} positions "
            f"(max_position_embeddings of its config); use --max_length {model.max_positions}"
        )
    if not is_pretrain:
        model.thaw_llm(cfg.tune_vision, dtype)
    model.log_scale.requires_grad_(cfg.sea_weight > 0)
    if cfg.image_mode:
        model.preprocess["mode"] = cfg.image_mode
    wrap_blocks(cfg, model)
    # FSDP moves each shard by itself.
    return (model if cfg.fsdp else model.to(device)), dtype


def wrap_blocks(cfg, model):
    """Compile the LLM's transformer blocks, and have all blocks recomputed in backward."""
    vision_blocks, llm_blocks = model.blocks()
    if cfg.compile:
        for block in llm_blocks:
            block.forward = torch.compile(block.forward, dynamic=True)
    if cfg.grad_checkpoint:
        # Around what is compiled: the compiler skips a checkpoint with all that is in it.
        # By hand: transformers' gradient_checkpointing_enable works in train mode alone, which
        # turns dropout on.
        for block in [*vision_blocks, *llm_blocks]:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def build_data(cfg, model, samples, store):
    """-> training set with its labels checked, validation set or None.

    samples: of load_samples. store: their LabelStore, or None for the baseline.
    """
    is_pretrain = cfg.stage == "pretrain"

    def dataset(samples):
        return LlavaDataset(
            samples,
            cfg.image_folder,
            model.preprocess,
            model.tokenizer,
            model.image_tokens,
            cfg.max_length,
            text="caption" if is_pretrain else "chat",
        )

    train_set = dataset(samples)
    if store:
        store.check(train_set.samples, model.preprocess, model.grid)
        train_set.label_store = store
        model.set_words(store.words)
    if not cfg.val_data:
        return train_set, None
    val_set = dataset(load_samples(cfg.val_data, captions=is_pretrain))
    return train_set, Subset(val_set, range(len(val_set))[: cfg.val_samples])


def check_images(train_set, val_set):
    """End a run before it begins if its first or a validation sample is broken."""
    train_set[0]
    for i in range(rank(), len(val_set or ()), world_size()):
        val_set[i]


def build_optimizer(cfg, model):
    """AdamW without weight decay, as in LLaVA; the vision tower has a rate of its own."""
    tower = []
    others = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            of_its_kind = tower if ".vision_tower." in name else others
            of_its_kind.append(parameter)
    groups = [{"params": others, "lr": cfg.lr, "peak_lr": cfg.lr}]
    if tower:
        groups.append({"params": tower, "lr": cfg.vision_lr, "peak_lr": cfg.vision_lr})
    return torch.optim.AdamW(groups, weight_decay=0.0)  # PyTorch's betas and eps are LLaVA's


# ----------------------------------------------------------------------------- resuming


def saved_config(out_dir):
    """config.json of the run in a folder: its flags and its facts (run_facts); {} if none is."""
    file = Path(out_dir, "config.json")
    if not file.exists():
        return {}
    fields = [field.name for field in dataclasses.fields(TrainConfig)]
    return read_object(file.read_bytes(), file, keys=[*fields, *FACTS])


def refuse_other_flags(given, saved):
    # With --init they only say where its parts are; the adapter knows their digests.
    may_change = [*MAY_CHANGE_ON_RESUME, *(["llm", "vision"] if saved["init"] else [])]
    for name, value in given.items():
        if value != saved[name] and name not in may_change:
            raise UserError(
                f"--{name} is {value!r}, but {saved[name]!r} in the run that --resume continues: "
                f"leave --{name} out, or start a new run with another --out_dir"
            )


def refuse_other_batches(cfg, saved):
    """A resumed step must have the samples that it had, in the same micro-batches.

    batch_size stays as it is, so that N of Eq. 11 does, which is of one micro-batch; with
    --gather_pairs it is of the micro-batches of all ranks, so that their number stays too.
    """
    ranks = world_size()
    if cfg.gather_pairs and ranks != saved["ranks"]:
        raise UserError(
            f"--gather_pairs contrasts over the pairs of all ranks: --resume this run on "
            f"{saved['ranks']}, as it began, not on {ranks}"
        )
    micro_batches_of_step = saved["grad_accum"] * saved["ranks"]
    if cfg.grad_accum * ranks != micro_batches_of_step:
        fix = f"--grad_accum {micro_batches_of_step // ranks}"
        if micro_batches_of_step % ranks:
            fix = f"a number of ranks that divides {micro_batches_of_step}"
        raise UserError(
            f"--grad_accum {cfg.grad_accum} on {ranks} ranks makes steps of {cfg.global_batch()} "
            f"samples, but the run that --resume continues has steps of "
            f"{saved['batch_size'] * micro_batches_of_step}: use {fix}"
        )


def lock_out_dir(cfg):
    """Refuse a folder that holds a run, or in which another process trains.

    -> on rank 0 the open lock file: the lock goes when it is closed or the process dies.
    """
    folder = Path(cfg.out_dir)
    lock = None
    if rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / "lock", "w")  # noqa: SIM115, which would have it closed
    if lock and fcntl:
        try:
            # Not flock: the processes that load data would hold it too, and they outlive a kill.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as e:
            raise UserError(
                f"{folder}: another process trains here; wait for its end, or use another --out_dir"
            ) from e
        except OSError as e:
            print(
                f"{folder}: its filesystem has no locks ({e}); never start this run twice at once"
            )
    if (folder / "config.json").exists() and not cfg.resume:
        raise UserError(f"{folder} holds a run: --resume it, or use another --out_dir")
    return lock


FACTS = ("ranks", "samples", "images", "label_store")  # of run_facts


def run_facts(samples, store):
    """What --resume must find again beside the flags: {name: value}, kept in config.json.

    Files may move; the list of images and the settings of the labels stand for their content.
    """
    return {
        "ranks": world_size(),
        "samples": len(samples),
        "images": digest(image_of(sample) or "" for sample in samples),
        "label_store": store.meta if store else {},
    }


def refuse_other_data(cfg, facts):
    """With --resume, refuse other samples or labels than the run in out_dir began with."""
    saved = saved_config(cfg.out_dir)
    if not saved:
        return
    began = f"when the run in {cfg.out_dir} began"
    fix = "put the old file back, or start again with another --out_dir"
    if facts["samples"] != saved["samples"]:
        raise UserError(
            f"{cfg.data} has {facts['samples']:,} samples, but {began} it had "
            f"{saved['samples']:,}: {fix}"
        )
    if facts["images"] != saved["images"]:
        raise UserError(f"{cfg.data} lists other images than {began}, or in another order: {fix}")
    for name, value in facts["label_store"].items():
        old = saved["label_store"].get(name)
        if value != old:
            raise UserError(
                f"the labels in {cfg.labels} were made with {name} = {value}, but {began} they had "
                f"{name} = {old}: put the old labels back, or start again with another --out_dir"
            )


def refuse_differing_ranks(settings):
    """Every rank must have the flags and the data of rank 0."""
    of_rank_0 = [settings]
    if dist.is_initialized():
        dist.broadcast_object_list(of_rank_0)
    for name, value in settings.items():
        other = of_rank_0[0][name]
        if value != other:
            raise UserError(f"{name} is {value}, but {other} on rank 0; this is rank {rank()}")


def drop_torn_line(file):
    """Cut off the end of a log whose last line a kill or a full disk has left unfinished."""
    content = file.read_bytes() if file.exists() else b""
    *_, torn = content.split(b"\n")
    if torn:
        os.truncate(file, len(content) - len(torn))
        print(f"{file}: the last line is not finished and is dropped: {torn!r}")


# ----------------------------------------------------------------------------- checkpoints


def training_state(run):
    """Name -> tensor of what a checkpoint restores: the trained weights and AdamW's moments.

    The tensors are those of model and optimizer themselves: dcp.load writes into them.
    """
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    state = get_optimizer_state_dict(run.model, run.optimizer, options=options)
    for name, parameter in run.model.named_parameters():
        if parameter.requires_grad:
            state[f"model.{name}"] = parameter.detach()
    return {name: value for name, value in state.items() if torch.is_tensor(value)}


@contextlib.contextmanager
def whole_folder(folder):
    """Yield a temporary folder, and rename it to `folder` once all ranks have written to it.

    So `folder` is whole or not there, whenever a process is killed, and no rank goes on before.
    """
    unfinished = folder.with_name("unfinished.tmp")
    if rank() == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    barrier()
    yield unfinished
    barrier()
    if rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
    barrier()


def save_checkpoint(run, step):
    """Write checkpoints/step_N, each rank its shards, as safetensors; remove those beyond --keep.

    The step is all there is to know of the data position, the learning rate and random numbers:
    the order depends on nothing else, and what is drawn is keyed by (seed, micro-batch).
    """
    with whole_folder(Path(run.cfg.out_dir) / f"checkpoints/step_{step}") as folder:
        save_model(run, folder)
        writer = dcp.HuggingFaceStorageWriter(folder / "state", save_distributed=True)
        dcp.save(training_state(run), storage_writer=writer)
    if rank() == 0:
        # --keep 0 removes none: [:0] is empty
        for old in list(checkpoints(run.cfg.out_dir).values())[: -run.cfg.keep]:
            shutil.rmtree(old)
    barrier()


def load_checkpoint(run, folder):
    """Restore a checkpoint, of any number of ranks."""
    state = training_state(run)
    reader = dcp.HuggingFaceStorageReader(folder / "state")
    try:
        if run.cfg.stage == "pretrain":
            refuse_other_parts(folder / "adapter.safetensors", run.model.parts)
        dcp.load(state, storage_reader=reader)
    except UserError:
        raise
    except (Exception, CheckpointException) as e:  # there are many ways to say it
        reason = " ".join(str(e).split())[-200:]
        raise UserError(
            f"{folder}: truncated or damaged ({reason}); remove it to resume from an older one"
        ) from e


def save_model(run, folder, export=False):
    """Write the adapter of stage 1; in stage 2, and with export, a Llava folder."""
    is_pretrain = run.cfg.stage == "pretrain"
    adapter = adapter_state(run.model)
    state = full_state(run.model) if export or not is_pretrain else None
    if rank() == 0:
        if is_pretrain:
            origin = run.model.parts | {"image_mode": run.model.preprocess["mode"]}
            save_adapter(folder, adapter, origin)
        if state:
            save_llava(run.model, folder, state, run.dtype)
            write_file(folder / "README.md", model_card(run))
        for file in folder.glob("*.safetensors"):
            file.chmod(folder.stat().st_mode & 0o666)  # safetensors lets only their owner read


CARD = """\
---
library_name: transformers
pipeline_tag: image-text-to-text
---

A multimodal LLM in transformers' Llava format, made of {parts} and an adapter between
them; their licences apply. It was trained by nanoSEA, an implementation of Supervised Embedding
Alignment (EMNLP 2025):

{stages}

```python
from transformers import pipeline

ask = pipeline("image-text-to-text", model="THIS FOLDER")
image = {{"type": "image", "image": "photo.jpg"}}
turn = {{"role": "user", "content": [image, {{"type": "text", "text": "What is this?"}}]}}
print(ask(text=[turn], return_full_text=False)[0]["generated_text"])
```

transformers 4.57 and later read it; with a Gemma, 5.4 and later.
"""


def model_card(run):
    """README.md of a Llava folder: what it was made of, how it was trained, and how to ask it."""
    runs = [saved_config(run.cfg.out_dir)]
    if run.cfg.init:
        found = find_model(run.cfg.init).resolve()  # of a stage 1: its model/ or a checkpoint
        for folder in (found.parent, found.parent.parent):
            if (folder / "metrics.jsonl").exists():  # a run's, which may be of an older version
                file = folder / "config.json"
                runs.insert(0, read_object(file.read_bytes(), file))
                break
    lines = []
    for saved in runs:
        line = f"- {saved['stage']}: {saved['samples']:,} samples of {Path(saved['data']).name}"
        if saved["sea_weight"] > 0:
            line += f", with SEA (λ {saved['sea_weight']:g}, k {saved['window']})"
        lines.append(line)
    # Of a folder only its name: where it was says nothing to others.
    names = [Path(x).name if os.path.isabs(x) else x for x in made_of(run.model.parts)]
    return CARD.format(parts=" and ".join(names), stages="\n".join(lines))


if __name__ == "__main__":
    cli(main)
    if dist.is_initialized():
        dist.destroy_process_group()
