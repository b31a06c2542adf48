"""Train with SEA: stage 1 (pretrain) the adapter with L_g + λ L_a, stage 2 (finetune) the LLM too.

    python train.py --stage pretrain --preset toy                     a laptop, minutes, no download
    python train.py --stage pretrain --preset toy --sea_weight 0      the baseline
    python train.py --stage finetune --preset toy --init out/toy      stage 2 of the first
    torchrun --nproc_per_node=8 train.py --stage pretrain             the paper's standard run
    torchrun --nproc_per_node=8 train.py --stage finetune --init out/pretrain --fsdp
    python train.py --stage finetune --fsdp --dry_run 8               its cost on 8 GPUs

Every flag is a field of TrainConfig. A run leaves in --out_dir: config.json, metrics.jsonl (a line
for each step and each validation; the last one counts if --resume has repeated a step),
checkpoints/step_N/ (all that --resume needs, and the model) and at the end model/. The model is the
adapter in stage 1, a Hugging Face Llava folder in stage 2 or with --export.
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
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup
from transformers.utils.logging import disable_progress_bar

from bench import plan
from data import (
    LlavaDataset,
    UserError,
    add_flags,
    cli,
    collate,
    load_samples,
    micro_batches,
    read_object,
    sample_lengths,
)
from eval import alignment_sums
from labels import (
    LabelStore,
    all_sum,
    append_json_line,
    barrier,
    file_crc,
    rank,
    rank_device,
    wait_for,
    world_size,
    write_file,
)
from loss import total_loss
from model import (
    adapter_state,
    checkpoints,
    full_state,
    load_model,
    new_model,
    save_adapter,
    save_llava,
)

# Said when plain python saves or loads a checkpoint, and when a plan, whose model has only shapes,
# meets an adapter's weights. Both are fine.
warnings.filterwarnings(
    "ignore", message="torch.distributed is disabled|for .*: copying from a non-meta"
)

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # Ctrl-C, and what schedulers send

# ----------------------------------------------------------------------------- config


def flag(default, help, only="", least=0, most=10**9):
    """A field of TrainConfig. only: the stage that takes it, or SEA. A number has a range."""
    prefix = f"{only} only: " if only else ""
    help = f"{prefix}{help} (default: {default!r})"
    metadata = {"help": help, "only": only, "least": least, "most": most}
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
    preset: Literal["", "toy"] = flag("", "toy: the zero-download world, built in ./toy")

    # what is trained, on what
    llm: str = flag("vicuna-7b", "short name (see model.py), hub name, folder or GGUF file")
    vision: str = flag("clip-l-336", "CLIP, SigLIP or DINOv2; short name, hub name or folder")
    init: str = flag("", "the out_dir of stage 1, or a Llava folder or hub name", "finetune")
    data: str = flag("data/blip_laion_cc_sbu_558k.json", "samples in LLaVA's format, .json(l)")
    image_folder: str = flag("data/images", "where the samples' image paths begin")
    image_mode: Literal["", "pad"] = flag("", "'': the tower's crop or squash; pad: to a square")
    labels: str = flag("data/labels", "label store of the same data and vision tower", "pretrain")
    val_data: str = flag("", "held-out samples for the loss and, in pretrain, TACS; '': none")
    out_dir: str = flag("", "'': a folder below out/ that is named after the run")

    # SEA
    sea_weight: float = flag(1.0, "λ of Eq. 13; 0: the LLaVA baseline, without labels", "pretrain")
    window: int = flag(2, "k; one patch of each k x k window is drawn", "SEA", least=1)
    tau: float = flag(
        1.0, "initial temperature of Eq. 11, then learned", "SEA", least=0.01, most=100
    )
    gather_pairs: bool = flag(False, "contrast over the micro-batches of all ranks", "SEA")

    # the parts of SEA, for ablations (python toy.py ablate)
    sampling: Literal["similarity", "uniform"] = flag(
        "similarity", "how a patch's label is drawn: by the scores of Eq. 9, or all alike", "SEA"
    )
    max_labels: int = flag(0, "how many of a patch's labels to use; 1: the best; 0: all", "SEA")
    one_per_label: bool = flag(True, "one patch for each label of a batch, not all", "SEA")
    to_words: float = flag(
        0.5, "weight in Eq. 11 of patches that find words; the rest: the reverse", "SEA", most=1
    )
    learn_tau: bool = flag(True, "learn the temperature", "SEA")
    max_word_tokens: int = flag(0, "use a word's first so many tokens; 0: all", "SEA")

    # optimization; a global batch of 256 is 8 GPUs x 32, as in LLaVA. N of Eq. 11 is of one
    # micro-batch: with a smaller batch_size and more grad_accum, fewer words are told apart.
    batch_size: int = flag(32, "samples per GPU in one forward pass", least=1)
    grad_accum: int = flag(1, "forward passes per step; more of them for fewer GPUs", least=1)
    lr: float = flag(
        1e-3, "peak learning rate; linear warmup, then cosine to 0", least=1e-15, most=1
    )
    tune_vision: bool = flag(False, "train the vision tower too (Table 4)", "finetune")
    # PAPER: Table 4 tunes the tower at 2e-6; LLaVA freezes it
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
    save_every: int = flag(500, "steps between checkpoints; 0: none")
    keep: int = flag(0, "how many checkpoints stay on disk, the newest; 0: all")
    resume: bool = flag(False, "continue from the newest checkpoint in out_dir")
    export: bool = flag(False, "write model/ as a Llava folder too, as finetune does", "pretrain")
    dry_run: int = flag(0, "print what the run would cost on so many GPUs; nothing is loaded")
    check_data: str = flag(
        "", "read all samples and images, list the bad, write the good to this .jsonl; no training"
    )

    def global_batch(self):
        return self.batch_size * self.grad_accum * world_size()


# The flags that a recipe and then a preset stand for. Those of the command line override them.
_FINETUNE = "--sea_weight 0 --labels= --image_mode pad --batch_size 16 --lr 2e-5 --keep 1"
_TOY = """
    --llm toy/llm --vision toy/vision --image_folder toy/images --batch_size 16 --max_steps 180
    --val_every 30 --save_every 60 --workers 0 --no-grad_checkpoint
"""
SETTINGS = {
    # PAPER: Appendix B has "the same data as LLaVA-1.5, specifically the CC-595K". That is the
    # first LLaVA's; LLaVA-1.5 has these 558K.
    ("llava15", "pretrain"): "",
    ("llava15", "finetune"): f"{_FINETUNE} --data data/llava_v1_5_mix665k.json",
    # PAPER: SEA-PRIME follows LLaVA's hyperparameters. Cambrian-1's 4e-5 at a batch of 512, scaled
    # by √(128/512), is LLaVA's 2e-5 at 128.
    ("prime", "pretrain"): "--vision siglip-384 --data data/alignment_2.5m.jsonl",
    ("prime", "finetune"): f"""
        {_FINETUNE} --vision siglip-384 --data data/Cambrian7M_withsystemprompt.jsonl --tune_vision
    """,
    ("toy", "pretrain"): f"""
        {_TOY} --data toy/train.json --val_data toy/val.json --labels toy/labels
    """,
    ("toy", "finetune"): f"""
        {_TOY} --data toy/train_qa.json --val_data toy/val_qa.json --lr 3e-4 --image_mode=
    """,
}
MAY_CHANGE_ON_RESUME = """
    resume out_dir image_folder val_data val_every val_samples save_every keep export
    fsdp compile grad_checkpoint workers grad_accum
"""


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
    cfg = TrainConfig()
    for name in (given.get("recipe", "llava15"), given.get("preset")):
        flags = SETTINGS.get((name, stage), "").split()
        cfg = dataclasses.replace(cfg, **vars(parser.parse_args(flags)))
    cfg = dataclasses.replace(cfg, **given)

    uses = ("", stage, "SEA" if cfg.sea_weight > 0 else stage)
    for field in fields:
        name = field.name
        value = getattr(cfg, name)
        only = field.metadata["only"]
        if name in given and only not in uses:
            raise UserError(
                f"--{name} is for {only}, not for {stage} with --sea_weight {cfg.sea_weight}"
            )
        if isinstance(value, str):
            continue
        least = field.metadata["least"]
        most = field.metadata["most"]
        if not least <= value <= most:  # or NaN
            raise UserError(f"--{name} must be from {least} to {most}, not {value}")
    refuse_contradictions(cfg, given)
    if not cfg.out_dir:
        cfg = dataclasses.replace(cfg, out_dir=default_out_dir(cfg, given))
    return cfg


def refuse_contradictions(cfg, given):
    is_dry = cfg.dry_run or cfg.check_data
    parts = {"llm", "vision"} & given.keys()
    for is_wrong, message in (
        (
            cfg.gather_pairs and max(cfg.dry_run, world_size()) == 1,
            "--gather_pairs needs several ranks: torchrun",
        ),
        (cfg.image_mode and cfg.sea_weight, "--image_mode pad has no labels: use --sea_weight 0"),
        (
            cfg.stage == "finetune" and not (cfg.init or parts or is_dry),
            "--stage finetune needs --init, the --out_dir of its stage 1 (such as out/pretrain), "
            "or --llm and --vision to train without a stage 1",
        ),
        (cfg.init and parts, "--init names a model, whose parts --llm and --vision are not needed"),
        (
            cfg.init and checkpoints(cfg.init) and not Path(cfg.init, "model").exists(),
            f"--init {cfg.init} has not finished: name one of its checkpoints",
        ),
        (
            cfg.fsdp and "RANK" not in os.environ and not is_dry,
            "--fsdp needs torchrun, on a single GPU too: torchrun --nproc_per_node=1 train.py",
        ),
    ):
        if is_wrong:
            raise UserError(message)


def default_out_dir(cfg, given):
    """A name below out/ that tells the run from others, such as out/pretrain_gemma-2b_baseline."""
    if cfg.init:
        return f"out/{Path(cfg.init).name}_finetune"
    parts = [cfg.preset or (cfg.stage if cfg.recipe == "llava15" else cfg.recipe)]
    parts += [Path(given[part]).name for part in ("llm", "vision") if part in given]
    if cfg.sea_weight == 0:
        parts.append("baseline")
    return "out/" + "_".join(parts)


# ----------------------------------------------------------------------------- the run


@dataclass
class Run:
    """What every step of a run works on; built by main."""

    cfg: TrainConfig
    device: torch.device
    dtype: torch.dtype  # of frozen weights and of compute
    model: object  # the SEAModel
    parallel_model: object  # the same model as DDP or FSDP makes it, whose forward is called
    optimizer: object
    schedule: object

    def autocast(self):
        """FSDP casts by itself; with autocast too, recomputation would use another dtype."""
        use_bfloat16 = self.dtype == torch.bfloat16 and not self.cfg.fsdp
        return torch.autocast(self.device.type, torch.bfloat16, use_bfloat16)


def main(argv=None):
    cfg = parse_config(argv)
    if cfg.dry_run or cfg.check_data:
        with torch.device("meta"):  # shapes without weights
            model, dtype = build_model(cfg, torch.device("meta"))
        return plan(cfg, model, dtype)
    device = setup_distributed()
    if cfg.preset == "toy" and rank() == 0:
        import toy

        toy.ensure()
    barrier()  # the toy is there
    settings = fixed_settings(cfg)
    check_out_dir(cfg, settings)
    barrier()  # all ranks have checked before one writes

    model, dtype = build_model(cfg, device)
    train_set, val_set = build_data(cfg, model)
    train_set[0]  # fails here, before there is a run, if the images are elsewhere
    steps = cfg.max_steps or math.ceil(len(train_set) / cfg.global_batch())
    parallel_model = parallelize(cfg, model, dtype)
    saved = checkpoints(cfg.out_dir) if cfg.resume else {}
    first_step = max(saved, default=0)
    optimizer, schedule = build_optimizer(cfg, model, steps, first_step)
    run = Run(cfg, device, dtype, model, parallel_model, optimizer, schedule)
    if saved:
        load_checkpoint(run, saved[first_step])

    if rank() == 0:
        write_config(cfg, settings)
        print(f"{model.parts}: {len(train_set):,} samples, {steps:,} steps of {cfg.global_batch()}")
    barrier()
    wait_for(Path(cfg.out_dir, "config.json"), hours=0.05)
    with noted_signals() as signals:
        train(run, train_set, val_set, first_step, steps, signals)
    save_model(run, Path(cfg.out_dir, "model"))
    if rank() == 0:
        print(f"wrote {cfg.out_dir}/model")


@contextlib.contextmanager
def noted_signals():
    """A list of the signals that have come, each of which asks the run to end."""
    received = []
    before = [signal.signal(number, lambda *args: received.append(args)) for number in STOP_SIGNALS]
    try:
        yield received
    finally:
        for number, handler in zip(STOP_SIGNALS, before):
            signal.signal(number, handler)


def ignore_signals(worker):
    """In a process that loads data: Ctrl-C and a scheduler's notice are for the one that trains."""
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def train(run, train_set, val_set, first_step, steps, signals):
    """The loop: steps, and where they are due a line of the log, a checkpoint and a validation.

    signals: a list; when it is no longer empty on any rank, the run saves a checkpoint and ends.
    """
    cfg = run.cfg
    loader = iter(micro_batch_loader(train_set, run, first_step, steps))
    bar = tqdm(total=steps, initial=first_step, disable=rank() > 0, desc="train")
    shown = {}

    def log(metrics):
        if rank() == 0:
            append_json_line(Path(cfg.out_dir, "metrics.jsonl"), metrics)
            for name in metrics.keys() & {"loss_g", "loss_a", "val_loss", "val_tacs"}:
                shown[name] = f"{metrics[name]:.3f}"
            bar.set_postfix(**shown)

    for done in range(first_step, steps + 1):
        # A resumed run begins with it where it is due: the kill may have come before its line.
        if val_set and done and (done % cfg.val_every == 0 or done == steps):
            log({"step": done} | validate(run, val_set))
        if done == steps:
            break

        step = done + 1
        start = time.perf_counter()
        batches = [next(loader) for _ in range(cfg.grad_accum)]
        metrics = train_step(run, batches, step, len(signals))
        seconds = time.perf_counter() - start
        is_interrupted = metrics.pop("signals")
        metrics["samples_per_s"] = cfg.global_batch() / seconds
        bar.update()
        log(metrics)
        if is_interrupted or (cfg.save_every and step % cfg.save_every == 0):
            save_checkpoint(run, step)
        if is_interrupted:
            raise UserError(f"a signal ended the run; step {step} is saved: go on with --resume")
    bar.close()


def train_step(run, batches, step, signals=0):
    """One optimizer step over this rank's micro-batches -> metrics, of all ranks together.

    Metrics are the only thing a GPU is waited for, once; with --gather_pairs the pairs, too.
    """
    cfg = run.cfg
    targets = sum(len(batch["trained"]) for batch in batches)
    [num_targets] = all_sum([targets], run.device)
    sums = collections.defaultdict(float, signals=signals)
    samples = [batch.pop("index") for batch in batches]
    for i, batch in enumerate(batches):
        del batch["attention_mask"]
        for name in ("input_ids", "image_places", "trained", "pixels"):  # not labels
            batch[name] = batch[name].to(run.device, non_blocking=True)

        # DDP averages gradients in the last micro-batch only; FSDP in each.
        run.parallel_model.require_backward_grad_sync = i == len(batches) - 1
        with run.autocast():
            out = run.parallel_model(
                **batch,
                # Averaging over ranks divides by their number once more.
                num_targets=num_targets / world_size(),
                window=cfg.window,
                generator=sample_generators(cfg.seed, step - 1, samples[i]),
                gather=cfg.gather_pairs,
                sampling=cfg.sampling,
                one_per_label=cfg.one_per_label,
                to_words=cfg.to_words,
            )
            # num_targets has averaged loss_g over the micro-batches. The baseline has no loss_a.
            loss_a = out.get("loss_a", 0) / len(batches)
            total_loss(out["loss_g"], loss_a, cfg.sea_weight).backward()
        with torch.no_grad():
            for name in out:
                sums[name] += out[name]

    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), math.inf)
    sums["grad_norm"] = norm.full_tensor() if isinstance(norm, DTensor) else norm
    metrics = dict(zip(sums, all_sum(sums.values(), run.device).tolist()))
    n = world_size()
    counts = dict(loss_g=n, grad_norm=n, loss_a=n * len(batches), tau=n * len(batches))
    counts["matched"] = max(metrics.get("pairs", 0), 1)
    for name in counts.keys() & metrics.keys():  # sums become means
        metrics[name] /= counts[name]
    if not math.isfinite(sum(metrics.values())):
        raise UserError(
            f"step {step}: loss or gradient is not finite: {metrics}, samples {samples}; lower "
            "--lr, use --dtype float32, or raise --max_length if it cuts off all that is trained"
        )
    metrics["lr"] = run.schedule.get_last_lr()[0]

    run.optimizer.step()
    run.schedule.step()
    run.optimizer.zero_grad()
    with torch.no_grad():
        # PAPER: τ is kept above 0.01, as in CLIP. The paper's 2,181 steps of stage 1 let it fall to
        # 0.34 at most.
        run.model.log_scale.clamp_(max=math.log(100))
    return {"step": step} | metrics


def sample_generators(seed, step, index):
    """One generator per sample, keyed by (seed, step, sample): draws do not depend on the rank."""
    keys = [np.random.SeedSequence([seed, step, i]).generate_state(1, np.uint64) for i in index]
    return [torch.Generator().manual_seed(int(key) >> 1) for [key] in keys]


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
        worker_init_fn=ignore_signals,
    )


def validate(run, val_set):
    """Loss and, in stage 1, TACS on val_set."""
    with run.autocast():
        tacs, images, loss, tokens = alignment_sums(run.parallel_model, val_set, run.device)
    if run.cfg.fsdp:
        run.parallel_model.reshard()  # as a backward pass would; checkpoints hold shards
    metrics = {"val_loss": loss / max(tokens, 1)}
    if run.cfg.stage == "pretrain":
        metrics["val_tacs"] = tacs / images
    return metrics


# ----------------------------------------------------------------------------- distributed


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
    dtype = getattr(torch, cfg.dtype or ("float32" if device.type == "cpu" else "bfloat16"))
    torch.manual_seed(cfg.seed)
    is_pretrain = cfg.stage == "pretrain"
    if cfg.init:
        model = load_model(cfg.init)
    else:
        model = new_model(cfg.vision, cfg.llm, dtype if is_pretrain else torch.float32, cfg.tau)
    if not is_pretrain:
        model.thaw_llm(cfg.tune_vision, dtype)
    model.log_scale.requires_grad_(cfg.sea_weight > 0 and cfg.learn_tau)
    if cfg.image_mode:
        model.preprocess["mode"] = cfg.image_mode
    if cfg.grad_checkpoint:
        for block in itertools.chain(*model.blocks()):
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
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
        store = LabelStore(cfg.labels, cfg.max_labels or None)
        store.check(train_set.samples, model.preprocess, model.grid)
        train_set.label_store = store
        model.set_words(store.words, cfg.max_word_tokens or None)
    if not cfg.val_data:
        return train_set, None
    val_set = dataset(cfg.val_data)
    return train_set, Subset(val_set, range(len(val_set))[: cfg.val_samples])


def build_optimizer(cfg, model, steps, first_step):
    """AdamW without weight decay, as in LLaVA; the vision tower has a rate of its own."""
    groups = [{"params": [], "lr": lr, "initial_lr": lr} for lr in (cfg.lr, cfg.vision_lr)]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[".vision_tower." in name]["params"].append(parameter)
    groups = [group for group in groups if group["params"]]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)  # PyTorch's betas and eps are LLaVA's
    warmup_steps = math.ceil(cfg.warmup_ratio * steps)
    schedule = get_cosine_schedule_with_warmup(
        optimizer, warmup_steps, steps, last_epoch=first_step - 1
    )
    return optimizer, schedule


# ----------------------------------------------------------------------------- files


def fixed_settings(cfg):
    """{name: value} of what --resume must not change. Files may move: their CRCs stand for them."""
    settings = dataclasses.asdict(cfg)
    for name in MAY_CHANGE_ON_RESUME.split():
        del settings[name]
    settings["samples_per_step"] = cfg.global_batch()
    files = {"data": Path(cfg.data), "labels": Path(cfg.labels, "meta.json")}
    if cfg.sea_weight == 0:
        del files["labels"]
    return settings | {name: file_crc(file) for name, file in files.items() if file.is_file()}


def check_out_dir(cfg, settings):
    """Refuse a folder that holds a run, other settings with --resume, and ranks that differ."""
    of_rank_0 = [settings]
    if dist.is_initialized():
        dist.broadcast_object_list(of_rank_0)
    others = {f"on rank 0; this is rank {rank()}": of_rank_0[0]}
    file = Path(cfg.out_dir, "config.json")
    if file.exists():
        if not cfg.resume:
            raise UserError(f"{cfg.out_dir} holds a run: --resume it, or use another --out_dir")
        others[f"in {file}"] = read_object(file.read_bytes(), file, keys=["fixed"])["fixed"]
    for where, other in others.items():
        for name, value in settings.items():
            if value != other.get(name):
                raise UserError(f"{name} is {value}, but {other.get(name)} {where}")


def write_config(cfg, settings):
    """Write config.json. Of two launches at the same moment, the second fails here."""
    file = Path(cfg.out_dir, "config.json")
    file.parent.mkdir(parents=True, exist_ok=True)
    if not cfg.resume:
        file.touch(exist_ok=False)
    write_file(file, json.dumps(dataclasses.asdict(cfg) | {"fixed": settings}, indent=1))


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


def save_checkpoint(run, step):
    """Write checkpoints/step_N whole or not at all, each rank its shards, as safetensors.

    The step is all there is to know of the data position, the learning rate and random numbers:
    the order depends on nothing else, and what is drawn is keyed by (seed, step, sample).
    """
    folder = Path(run.cfg.out_dir) / f"checkpoints/step_{step}"
    unfinished = folder.with_name("unfinished.tmp")
    if rank() == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    barrier()
    save_model(run, unfinished)
    writer = dcp.HuggingFaceStorageWriter(unfinished / "state", save_distributed=True)
    dcp.save(training_state(run), storage_writer=writer)
    barrier()
    if rank() == 0:
        (unfinished / "crc.json").write_text(json.dumps(weight_crcs(unfinished)))
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
        # --keep 0 removes none: [:0] is empty
        for old in list(checkpoints(run.cfg.out_dir).values())[: -run.cfg.keep]:
            shutil.rmtree(old)
    barrier()


def load_checkpoint(run, folder):
    """Restore a checkpoint, of any number of ranks."""
    file = folder / "crc.json"
    if rank() == 0 and read_object(file.read_bytes(), file) != weight_crcs(folder):
        raise UserError(f"{folder}: truncated or corrupt; remove it to resume from another")
    barrier()
    dcp.load(training_state(run), storage_reader=dcp.HuggingFaceStorageReader(folder / "state"))


def weight_crcs(folder):
    return {file.name: file_crc(file) for file in folder.rglob("*.safetensors")}


def save_model(run, folder):
    """Write the adapter of stage 1; in stage 2, and with --export, a Llava folder."""
    is_pretrain = run.cfg.stage == "pretrain"
    adapter = adapter_state(run.model)
    state = full_state(run.model) if run.cfg.export or not is_pretrain else None
    if rank() == 0:
        folder.mkdir(exist_ok=True)
        if is_pretrain:
            origin = run.model.parts | {"image_mode": run.model.preprocess["mode"]}
            save_adapter(folder, adapter, origin)
        if state:
            save_llava(run.model, folder, state, run.dtype)
        for file in folder.glob("*.safetensors"):
            file.chmod(folder.stat().st_mode & 0o666)  # safetensors lets only their owner read


if __name__ == "__main__":
    cli(main)
    if dist.is_initialized():
        dist.destroy_process_group()
