"""Train the adapter with SEA: L = L_g + λ L_a (Eq. 13).

    python train.py --stage pretrain --preset toy                     a laptop: builds its own world, takes minutes
    python train.py --stage pretrain --preset toy --sea_weight 0      the baseline
    torchrun --nproc_per_node=8 train.py --stage pretrain             the paper's run: Vicuna-7B, CLIP-L@336

Every flag is a field of TrainConfig. A run leaves in --out_dir: config.json, metrics.jsonl (a line per logged step),
checkpoints/step_N/ (all that --resume needs) and at the end model/.
"""

import argparse
import contextlib
import dataclasses
import functools
import inspect
import itertools
import json
import math
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup
from transformers.utils.logging import disable_progress_bar

from data import IGNORE, LlavaDataset, UserError, add_flags, cli, collate, load_samples, micro_batches
from eval import alignment_sums
from labels import LabelStore
from loss import total_loss
from model import SEAModel

# ---------------------------------------------------------------------------------------------------- config


def flag(default, help):
    return dataclasses.field(default=default, metadata={"help": f"{help} (default: {default!r})"})


@dataclass(frozen=True)
class TrainConfig:
    stage: Literal["pretrain"] = flag("pretrain", "pretrain: the adapter alone is trained, on captions")
    preset: Literal["", "toy"] = flag("", "toy: the zero-download world, made on first use in ./toy")
    # what
    llm: str = flag("lmsys/vicuna-7b-v1.5", "causal LM: hub name, folder or GGUF file")
    vision: str = flag("openai/clip-vit-large-patch14-336", "CLIP, SigLIP or DINOv2 tower: hub name or folder")
    data: str = flag("data/blip_laion_cc_sbu_558k.json", "captions in LLaVA's format, .json or .jsonl")
    image_folder: str = flag("data/images", "where the samples' image paths begin")
    labels: str = flag("data/labels", "label store of labels.py extract, for the same data and vision tower")
    val_data: str = flag("", "held-out image-caption pairs for TACS and caption loss; '' = none")
    val_image_folder: str = flag("", "'' = image_folder")
    out_dir: str = flag("", "'' = out/<stage>, out/<preset>, or the same with a number that is still free")
    # SEA
    sea_weight: float = flag(1.0, "λ of Eq. 13; 0 is the LLaVA baseline and needs no labels")
    window: int = flag(2, "k: one patch of each k x k window is drawn")
    tau: float = flag(1.0, "initial temperature of Eq. 11, then learned")
    gather_pairs: bool = flag(False, "contrast over the micro-batches of all ranks instead of the rank's own")
    # recipe, LLaVA-1.5 stage 1: a global batch of 256 = 8 GPUs x 32
    batch_size: int = flag(32, "samples per GPU in one forward pass")
    grad_accum: int = flag(1, "forward passes per optimizer step; multiply it when there are fewer GPUs")
    lr: float = flag(1e-3, "peak learning rate, cosine to 0")
    warmup_ratio: float = flag(0.03, "share of the steps with linear warmup")
    weight_decay: float = flag(0.0, "of the adapter's matrices; τ never decays")
    epochs: float = flag(1.0, "passes over the data")
    max_steps: int = flag(0, "steps instead of epochs; 0 = by epochs")
    max_length: int = flag(2048, "positions per sample, image included")
    seed: int = flag(0, "of initialisation, order and sampling")
    # machine
    dtype: Literal["auto", "float32", "bfloat16"] = flag("auto", "of frozen weights and autocast; bfloat16 on GPUs")
    grad_checkpoint: bool = flag(False, "recompute the LLM's activations in backward: less memory, more time")
    workers: int = flag(4, "image-decoding processes per rank")
    # log
    log_every: int = flag(1, "steps per line of metrics.jsonl")
    val_every: int = flag(100, "steps between evaluations on val_data; the last step always is one")
    val_samples: int = flag(100, "pairs of val_data to use")
    save_every: int = flag(500, "steps between checkpoints; 0 = none")
    resume: bool = flag(False, "go on from the newest checkpoint in out_dir")


PRESETS = {
    "toy": dict(llm="toy/llm", vision="toy/vision", data="toy/train.json", image_folder="toy/images",
                labels="toy/labels", val_data="toy/val.json", batch_size=16, max_steps=180, val_every=30,
                save_every=60, workers=0),
}


def parse_config(argv=None):
    """Flags -> TrainConfig: a preset fills in what the flags leave open; what contradicts itself is refused."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser, inspect.signature(TrainConfig), **{f.name: f.metadata["help"] for f in
                                                         dataclasses.fields(TrainConfig)})
    preset = PRESETS.get(parser.parse_args(argv).preset, {})
    parser.set_defaults(**preset)
    cfg = TrainConfig(**vars(parser.parse_args(argv)))
    for name in ("batch_size", "grad_accum", "window", "log_every", "val_every", "max_length", "epochs", "tau", "lr"):
        if getattr(cfg, name) <= 0:
            raise UserError(f"--{name} must be positive, not {getattr(cfg, name)}")
    if cfg.sea_weight < 0:
        raise UserError(f"--sea_weight must not be negative, not {cfg.sea_weight}")
    if cfg.gather_pairs and cfg.sea_weight == 0:
        raise UserError("--gather_pairs contradicts --sea_weight 0: the baseline has no pairs")
    if cfg.gather_pairs and world_size() == 1:
        raise UserError("--gather_pairs needs several ranks: start with torchrun, or leave it out")
    if cfg.resume and not cfg.out_dir:
        raise UserError("--resume needs --out_dir, the folder of the run to go on with")
    return cfg


# ----------------------------------------------------------------------------------------------- distributed


def rank():
    return int(os.environ.get("RANK", 0))


def world_size():
    return int(os.environ.get("WORLD_SIZE", 1))


def setup_distributed():
    """-> device. Under torchrun joins the group (nccl on GPUs, gloo on CPUs); plain python is one process."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
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


# ----------------------------------------------------------------------------------------------------- build


def prepare_out_dir(cfg):
    """-> out_dir, created; a folder that holds another run is never written over."""
    if cfg.out_dir:
        out = Path(cfg.out_dir)
        if (out / "metrics.jsonl").exists() and not cfg.resume:
            raise UserError(f"{out} holds a run already: add --resume to go on with it, or choose another --out_dir")
    else:
        base = f"out/{cfg.preset or cfg.stage}" + ("" if cfg.sea_weight else "_baseline")
        out = next(p for i in range(1, 10**6) if not (p := Path(base if i == 1 else f"{base}_{i}")).exists())
    return out


def build_model(cfg, device):
    """The model on its device, everything frozen but the adapter and, with SEA, log_scale."""
    auto = "bfloat16" if device.type == "cuda" else "float32"
    dtype = getattr(torch, auto if cfg.dtype == "auto" else cfg.dtype)
    torch.manual_seed(cfg.seed)
    model = SEAModel.from_parts(cfg.vision, cfg.llm, dtype, cfg.tau).to(device)
    model.log_scale.requires_grad_(cfg.sea_weight > 0)
    if cfg.grad_checkpoint:
        model.llm.gradient_checkpointing_enable({"use_reentrant": False})
        model.llm.train()  # transformers checkpoints in training mode only; the LLMs named here have no dropout
    return model, dtype


def build_data(cfg, model):
    """-> training set with its labels checked, validation set or None."""
    def dataset(path, image_folder, **kwargs):
        return LlavaDataset(load_samples(path), image_folder, model.geometry, model.tokenizer, model.image_tokens,
                            cfg.max_length, **kwargs)

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
    """AdamW as in LLaVA, linear warmup and cosine to 0."""
    groups = [dict(params=list(model.adapter.parameters()), weight_decay=cfg.weight_decay)]
    if cfg.sea_weight > 0:
        groups.append(dict(params=[model.log_scale], weight_decay=0.0))
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.999), eps=1e-8)
    return optimizer, get_cosine_schedule_with_warmup(optimizer, math.ceil(cfg.warmup_ratio * steps), steps)


# ----------------------------------------------------------------------------------------------- checkpoints


def save_checkpoint(folder, cfg, model, optimizer, schedule, step, seen):
    """Write checkpoints/step_N whole or not at all: the data position is the step, for the order depends on nothing
    else; all random numbers are keyed by (seed, step, sample), torch's own state is kept for good measure."""
    tmp = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    model.save_adapter(tmp)
    state = dict(step=step, optimizer=optimizer.state_dict(), schedule=schedule.state_dict(), seen=seen,
                 rng=torch.get_rng_state(), config=dataclasses.asdict(cfg), world=world_size())
    torch.save(state, tmp / "training.pt")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(tmp, folder)


def load_checkpoint(out_dir, cfg, model, optimizer, schedule):
    """Restore the newest checkpoint -> (step, samples seen)."""
    folders = sorted(out_dir.glob("checkpoints/step_*[0-9]"), key=lambda p: int(p.name.split("_")[1]))
    if not folders:
        raise UserError(f"{out_dir}: no checkpoint to resume from")
    try:
        state = torch.load(folders[-1] / "training.pt", map_location="cpu", weights_only=True)
        model.load_adapter(folders[-1] / "adapter.safetensors")
    except (OSError, RuntimeError, EOFError, ValueError) as e:
        raise UserError(f"{folders[-1]}: truncated or corrupt ({str(e).splitlines()[0]}); remove this folder to resume "
                        "from the one before") from e
    free = {"resume", "out_dir", "workers", "log_every", "val_every", "save_every", "val_samples"}
    for name, value in dataclasses.asdict(cfg).items():
        old = state["config"].get(name)
        if name not in free and old != value:
            raise UserError(f"--resume: this run has {name} = {value}, the checkpoint {folders[-1]} {name} = {old}")
    if state["world"] != world_size():
        raise UserError(f"--resume: the checkpoint was written by {state['world']} ranks, this run has {world_size()}")
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    torch.set_rng_state(state["rng"])
    return state["step"], state["seen"]


# ------------------------------------------------------------------------------------------------------ step


def sample_generators(seed, step, index):
    """One generator per sample, keyed by (seed, step, sample): what is drawn does not depend on the rank."""
    seeds = [int(np.random.SeedSequence([seed, step, i]).generate_state(1, np.uint64)[0] >> 1) for i in index]
    return [torch.Generator().manual_seed(s) for s in seeds]


def train_step(cfg, model, forward, batches, optimizer, schedule, step, device, autocast):
    """One optimizer step over this rank's micro-batches -> dict of metrics, summed or averaged over ranks."""
    trained = sum(int((b["labels"][:, 1:] != IGNORE).sum()) for b in batches)
    num_targets = max(1.0, *all_sum([trained], device))
    lr = schedule.get_last_lr()[0]
    loss_g = loss_a = pairs = matched = torch.zeros((), device=device)
    for i, batch in enumerate(batches):
        index = batch.pop("index")
        batch = {k: v if k.startswith("label_") else v.to(device, non_blocking=True) for k, v in batch.items()}
        last = i == len(batches) - 1
        with contextlib.nullcontext() if last or forward is model else forward.no_sync():
            with autocast():
                # DDP averages gradients over ranks: a per-rank share of the mean over all ranks' tokens
                out = forward(**batch, num_targets=num_targets / world_size(), window=cfg.window,
                              generator=sample_generators(cfg.seed, step, index), gather_pairs=cfg.gather_pairs)
            part_a = out.get("loss_a", loss_a * 0) / len(batches)
            total_loss(out["loss_g"], part_a, cfg.sea_weight).backward()
        loss_g, loss_a = loss_g + out["loss_g"].detach(), loss_a + part_a.detach()
        pairs, matched = pairs + out.get("pairs", 0), matched + out.get("matched", 0)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        model.log_scale.clamp_(max=math.log(100))  # PAPER: τ is kept above 0.01, as CLIP does
    positions = sum(int(b["attention_mask"].sum()) for b in batches)
    images = sum(len(b["pixels"]) for b in batches)
    loss_g, loss_a, pairs, matched, positions, images = all_sum(
        [loss_g, loss_a, pairs, matched, positions, images], device)
    metrics = dict(step=step + 1, loss_g=loss_g / world_size(), lr=lr, tokens=int(positions), images=int(images))
    if cfg.sea_weight > 0:
        metrics.update(loss_a=loss_a / world_size(), tau=float((-model.log_scale.detach()).exp()), pairs=int(pairs),
                       matched=matched / max(pairs, 1))
    return metrics


# ------------------------------------------------------------------------------------------------------ main


def batches_of(dataset, cfg, model, steps, first_step):
    """Yield the list of this rank's micro-batches of each step."""
    order = micro_batches(len(dataset), cfg.batch_size, cfg.grad_accum, steps, cfg.seed, first_step, rank(),
                          world_size())
    padded = functools.partial(collate, pad_id=model.tokenizer.pad_token_id or 0)
    loader = iter(DataLoader(dataset, batch_sampler=order, num_workers=cfg.workers, collate_fn=padded,
                             pin_memory=torch.cuda.is_available()))
    for _ in range(first_step, steps):
        yield list(itertools.islice(loader, cfg.grad_accum))


def validate(model, val_set, device, autocast):
    """TACS and caption loss on val_set, its samples shared out over the ranks."""
    own = Subset(val_set, range(rank(), len(val_set), world_size()))
    with autocast():
        tacs, samples, loss, tokens = all_sum(alignment_sums(model, own, device), device)
    return dict(val_tacs=tacs / samples, val_loss=loss / tokens)


def open_log(out_dir, cfg, first_step):
    """Write config.json and open metrics.jsonl behind the line of `first_step`; later lines were not checkpointed."""
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / "config.json").write_text(json.dumps(dataclasses.asdict(cfg), indent=1))
    path = out_dir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if first_step else []
    path.write_text("".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= first_step))
    return path.open("a", buffering=1)


def main(argv=None):
    cfg = parse_config(argv)
    device = setup_distributed()
    if cfg.preset == "toy":
        import toy
        on_rank_0_first(toy.ensure)
    out_dir = prepare_out_dir(cfg)
    barrier()
    torch.set_float32_matmul_precision("high")  # tf32 for what is left in fp32, as in LLaVA

    model, dtype = build_model(cfg, device)
    train_set, val_set = build_data(cfg, model)
    global_batch = cfg.batch_size * cfg.grad_accum * world_size()
    steps = cfg.max_steps or math.ceil(cfg.epochs * len(train_set) / global_batch)
    optimizer, schedule = build_optimizer(cfg, model, steps)
    first_step, seen = load_checkpoint(out_dir, cfg, model, optimizer, schedule) if cfg.resume else (0, 0)
    forward = model
    if dist.is_initialized():
        forward = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None,
                                          broadcast_buffers=False)
    autocast = functools.partial(torch.autocast, device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)

    main_rank = rank() == 0
    if main_rank:
        log = open_log(out_dir, cfg, first_step)
        print(json.dumps(dataclasses.asdict(cfg)))
        print(f"{len(train_set):,} samples, {steps:,} steps of {global_batch}; trained: "
              f"{sum(p.numel() for p in model.parameters() if p.requires_grad):,} of "
              f"{sum(p.numel() for p in model.parameters()):,} parameters -> {out_dir}")
    with tqdm(total=steps, initial=first_step, disable=not main_rank, desc="train") as bar:
        start = time.perf_counter()
        for step, batches in enumerate(batches_of(train_set, cfg, model, steps, first_step), first_step):
            metrics = train_step(cfg, model, forward, batches, optimizer, schedule, step, device, autocast)
            seconds = time.perf_counter() - start
            seen += metrics["images"]
            metrics.update(seen=seen, tokens_per_s=metrics.pop("tokens") / seconds,
                           images_per_s=metrics.pop("images") / seconds)
            if not math.isfinite(metrics["loss_g"] + metrics.get("loss_a", 0)):
                raise UserError(f"step {step + 1}: the loss is {metrics['loss_g']}; lower --lr, or use --dtype float32")
            done = step + 1
            if val_set and (done % cfg.val_every == 0 or done == steps):
                metrics.update(validate(model, val_set, device, autocast))
            if main_rank:
                bar.update()
                bar.set_postfix({k: f"{metrics[k]:.3f}" for k in ("loss_g", "loss_a", "val_tacs") if k in metrics})
                if done % cfg.log_every == 0 or done == steps or "val_tacs" in metrics:
                    log.write(json.dumps(metrics) + "\n")
                if cfg.save_every and done % cfg.save_every == 0:
                    save_checkpoint(out_dir / f"checkpoints/step_{done}", cfg, model, optimizer, schedule, done, seen)
            start = time.perf_counter()
    if main_rank:
        (out_dir / "model").mkdir(exist_ok=True)
        model.save_adapter(out_dir / "model")
        print(f"wrote {out_dir}/model. Look at what the visual tokens say, and measure them:\n"
              f"    python eval.py words --model {out_dir}\n    python eval.py tacs --model {out_dir}\n"
              f"    python eval.py gap --model {out_dir}")
        if cfg.preset == "toy":
            print("Baseline against SEA, over three seeds:\n    python toy.py compare")
    barrier()


if __name__ == "__main__":
    cli(main)
    if dist.is_initialized():
        dist.destroy_process_group()
