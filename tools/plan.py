"""What a run will cost on N GPUs: two of its steps are executed on tensors that hold no numbers.

    python -m tools.plan 8 --stage pretrain             the paper's run on 8 GPUs
    python -m tools.plan 8 --stage finetune --fsdp

All flags are train.py's. Any computer will do: the model is built without weights (only config,
tokenizer and preprocessor files are read), the other ranks are not there, and nothing is written.
What would fail in the first step on a GPU, such as a wrong shape or dtype, fails here. --compile
is left out.

Memory is what the run's own code allocates on the first GPU, for bf16 unless --dtype float32. Left
out, some GiB: the CUDA context, gaps of the allocator, kernels' workspaces, buffers of NCCL.
Hours are counted operations at an assumed speed, if loading images keeps pace.
"""

import argparse
import contextlib
import dataclasses
import functools
import math
import os
import sys
import weakref
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from torch.utils.weak import WeakIdKeyDictionary

import train
from data import IGNORE, UserError, cli, collate, load_samples, sample_lengths, world_size
from model import made_of

# Number of samples in the recipes' files, to plan before the download. The last two are rounded.
SAMPLES = {
    "blip_laion_cc_sbu_558k.json": 558_128,
    "llava_v1_5_mix665k.json": 665_298,
    "alignment_2.5m.jsonl": 2_500_000,
    "Cambrian7M_withsystemprompt.jsonl": 7_070_000,
}
TEXT_LENGTH = {"pretrain": 64, "finetune": 320}  # positions of a text: a guess for these files
TOKENS_PER_WORD = 1.35
TRAINED_SHARE = {"pretrain": 1.0, "finetune": 0.5}  # of them, how many are targets
LABELS = 10  # per patch, the default of labels.py extract
PEAK = 989e12  # operations a second of an H100 or H800 in bf16
UTILISATION = 0.4  # the share of it that is assumed

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
    # Compiled blocks take no tensors without numbers.
    cfg = dataclasses.replace(cfg, dtype=cfg.dtype or "bfloat16", compile=False)
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
    samples, text = data_of(cfg)
    steps = plan_steps(cfg, samples, model.image_tokens)
    disk = plan_disk(cfg, steps, params, dtype, model.image_tokens)
    print(f"{cfg.stage} on {ranks} GPUs: {' and '.join(made_of(model.parts))}; {cfg.data}")
    if not Path(cfg.data).is_file():
        print(f"{cfg.data} is not here; it has about {steps['samples']:,} samples")
    print_table("parameters", params)
    print_table("steps", {"": steps})

    mean = min(cfg.max_length, model.image_tokens + text)
    longest = cfg.max_length if not is_pretrain else mean  # captions are short
    if mean <= model.image_tokens + 1:
        raise UserError(f"--max_length {cfg.max_length} leaves no room for text beside an image")
    gpu, operations = dry_run(cfg, model, dtype, list(dict.fromkeys([mean, longest])))
    for positions, phases in gpu.items():
        title = f"GPU memory, GiB: {cfg.batch_size} x {positions:,}"
        print_table(title, phases, 2**30)
    hours = steps["steps"] * operations / (UTILISATION * PEAK * 3600)
    print(
        f"\n{hours:.1f} hours: {operations:.2e} operations a step and GPU, at "
        f"{UTILISATION:.0%} of {PEAK / 1e12:.0f} TFLOP/s (H100)"
    )
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


def data_of(cfg):
    """-> number of samples, mean positions of a text: of the data file, or what is known of it."""
    file = Path(cfg.data)
    if not file.is_file() and file.name in SAMPLES:
        return SAMPLES[file.name], TEXT_LENGTH[cfg.stage]
    lengths = sample_lengths(load_samples(file, captions=cfg.stage == "pretrain"))
    words = abs(lengths).mean()
    return len(lengths), math.ceil(TOKENS_PER_WORD * words) + 8  # and what the chat format writes


def plan_steps(cfg, samples, image_tokens):
    batch = cfg.global_batch()
    steps = cfg.max_steps or math.ceil(samples / batch)
    return {
        "samples": samples,
        "samples a step": batch,
        "steps": steps,
        "warmup steps": math.ceil(cfg.warmup_ratio * steps),
        "image tokens a step": batch * image_tokens,
        "positions a step, at most": batch * cfg.max_length,
    }


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


# ----------------------------------------------------------------------------- the dry run

aten = torch.ops.aten


def attention_operations(q, k, v, *_, **__):
    return sdpa_flop_count(q, all_heads(k, q), all_heads(v, q))


def attention_backward_operations(grad, q, k, v, *_, **__):
    return sdpa_backward_flop_count(grad, q, all_heads(k, q), all_heads(v, q))


def all_heads(shape, q):
    """Keys and values have as many heads as queries: each counts for every query it meets."""
    return (*q[:2], *shape[2:])


ATTENTION_OPERATIONS = {
    aten._scaled_dot_product_flash_attention_for_cpu: attention_operations,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_operations,
}


# Without numbers these take operands of several dtypes.
MATRIX_PRODUCTS = (
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
)
PHASES = "forward", "backward", "optimizer"


def dry_run(cfg, model, dtype, lengths):
    """Execute steps of the run as its rank 0 -> memory, operations.

    model: on the meta device. lengths: of the samples of a step, image included. Memory is that of
    a step when AdamW has its moments, at the peak of each phase: {length: {phase: {kind: bytes}}}.
    Operations are those of this rank in a step of the first length: a multiplication and its
    addition are two, recomputed ones count again.
    """
    ranks = world_size()
    batches = {length: make_batch(cfg, model, length) for length in lengths}
    micro_batches = min(cfg.grad_accum, 2)  # further ones take no more memory
    # Labels are words of two tokens, as many as a batch has patches.
    model.word_token_ids = [[1, 1]] * (ranks * cfg.batch_size * model.image_tokens)
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    mesh = init_device_mesh("cpu", (ranks,))  # before the mode, for it holds numbers
    patches = (
        mock.patch.object(train, "fully_shard", functools.partial(fully_shard, mesh=mesh)),
        # DDP needs numbers. It adds no memory: its buckets are the gradients (see as_on_gpus).
        mock.patch.object(train, "DistributedDataParallel", lambda model, **_: model),
        # Numbers that are read are 0, 1, 2 ...: labels, so that all differ, and what is logged.
        mock.patch.object(FakeTensor, "tolist", lambda x: list(range(len(x)))),
    )
    with contextlib.ExitStack() as stack:
        stack.callback(dist.destroy_process_group)
        for patch in patches:
            stack.enter_context(patch)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        make_fake(model)
        device = torch.device("cpu")
        parallel_model = train.parallelize(cfg, model, dtype)
        optimizer = as_on_gpus(train.build_optimizer(cfg, model), cfg)
        run = MeasuredRun(cfg, device, dtype, model, parallel_model, optimizer, steps=1000)
        run.meter = meter = Meter(model, optimizer)
        # DTensor works out shapes on tensors that are not sharded.
        name = "_propagate_tensor_meta_non_cached"
        shapes = meter.pausing(getattr(ShardingPropagator, name))
        stack.enter_context(mock.patch.object(ShardingPropagator, name, shapes))
        optimizer.register_step_pre_hook(lambda *_: meter.enter("optimizer"))

        def step(length):
            train.train_step(run, [dict(batches[length]) for _ in range(micro_batches)], step=1)

        memory = {}
        with meter:
            step(lengths[0])  # makes the moments
            for length in lengths:
                meter.peaks = {}
                step(length)
                memory[length] = {phase: meter.peaks[phase] for phase in PHASES}
        # Not under the meter, for which it would keep alive what is recomputed.
        with FlopCounterMode(display=False, custom_mapping=ATTENTION_OPERATIONS) as counter:
            step(lengths[0])
    return memory, counter.get_total_flops() * cfg.grad_accum // micro_batches


def as_on_gpus(optimizer, cfg):
    """AdamW as it is on GPUs, where it goes over all weights at once, which takes memory.

    And as it is with DDP, whose buckets, which are the gradients, stay when they are zeroed.
    """
    for group in optimizer.param_groups:
        group["foreach"] = True
    if world_size() > 1 and not cfg.fsdp:
        optimizer.zero_grad = functools.partial(optimizer.zero_grad, set_to_none=False)
    return optimizer


def make_batch(cfg, model, length):
    """A batch of data.collate whose samples have an image and `length` positions each."""
    place = torch.arange(length)
    is_image = (place >= 1) & (place <= model.image_tokens)
    text = length - model.image_tokens
    targets = place.masked_fill(place < length - TRAINED_SHARE[cfg.stage] * text + 1, IGNORE)
    size = model.preprocess["size"]
    item = {
        "index": 0,
        "input_ids": torch.zeros(length, dtype=torch.int64),
        "is_image": is_image,
        "targets": targets,
        "pixels": torch.zeros(3, size, size),
    }
    if cfg.sea_weight > 0:
        item["label_ids"] = torch.zeros(model.image_tokens, LABELS, dtype=torch.int64)
        item["label_scores"] = torch.ones(model.image_tokens, LABELS)
    return collate([item] * cfg.batch_size)


def make_fake(model):
    """Replace the tensors of a model, which are on the meta device, by fake ones of the CPU."""
    fakes = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, x in tensors.items():
                if x is None:
                    continue
                if x not in fakes:  # weights may be tied
                    fakes[x] = torch.empty(x.shape, dtype=x.dtype)
                    if isinstance(x, torch.nn.Parameter):
                        fakes[x] = torch.nn.Parameter(fakes[x], x.requires_grad)
                tensors[name] = fakes[x]


class MeasuredRun(train.Run):
    """A Run that tells its meter where forward begins and ends."""

    def forward(self, **batch):
        self.meter.enter("forward")
        out = super().forward(**batch)
        self.meter.enter("backward")
        return out


class Meter(TorchDispatchMode):
    """Follows the bytes of all tensors that live -> peaks: {phase: {kind: bytes}}.

    torch's own MemTracker fails on frozen parameters, and knows no phases.
    """

    def __init__(self, model, optimizer):
        super().__init__()
        self.optimizer = optimizer
        self.is_paused = False
        self.phase = "forward"
        self.peaks = {}
        self.now = 0
        self.sizes = WeakIdKeyDictionary()  # storage -> [its bytes]
        self.numbers = {}  # parameter -> how many of its numbers this rank has
        for parameter in model.parameters():
            shard = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            self.numbers[parameter] = shard.numel()
            self.see(shard)

    def enter(self, phase):
        self.phase = phase
        self.note_peak()

    def __enter__(self):
        original = torch.UntypedStorage.resize_

        def resize(storage, size):  # FSDP frees gathered weights so
            original(storage, size)
            if storage in self.sizes:
                self.set_size(self.sizes[storage], size)

        self.resizing = mock.patch.object(torch.UntypedStorage, "resize_", resize)
        self.resizing.start()
        return super().__enter__()

    def __exit__(self, *error):
        self.resizing.stop()
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # what it does to the shards comes by itself
        if func in MATRIX_PRODUCTS and len({x.dtype for x in args if torch.is_tensor(x)}) > 1:
            operands = [(x.dtype, tuple(x.shape)) for x in args if torch.is_tensor(x)]
            raise RuntimeError(f"{func} needs one dtype, and would fail on a GPU: {operands}")
        out = func(*args, **(kwargs or {}))
        if not self.is_paused:
            tree_map_only(torch.Tensor, self.see, out)
            self.note_peak()
        return out

    def pausing(self, function):
        """A function whose tensors are not there in the run."""

        def call(*args):
            self.is_paused = True
            try:
                return function(*args)
            finally:
                self.is_paused = False

        return call

    def see(self, tensor):
        storage = tensor.untyped_storage()
        if storage not in self.sizes:
            size = self.sizes[storage] = [0]
            weakref.finalize(storage, self.set_size, size, 0)
        self.set_size(self.sizes[storage], storage.nbytes())

    def set_size(self, size, new):
        self.now += new - size[0]
        size[0] = new

    def note_peak(self):
        most = self.peaks.get(self.phase, {"total": 0})["total"]
        if self.now <= 1.002 * most:  # finer than that is not worth its time
            return
        kinds = dict.fromkeys(("frozen", "trained", "gradients", "moments"), 0)
        for parameter, numbers in self.numbers.items():
            kinds["trained" if parameter.requires_grad else "frozen"] += (
                numbers * parameter.itemsize
            )
            if parameter.grad is not None:
                kinds["gradients"] += numbers * parameter.grad.itemsize
            for moment in self.optimizer.state.get(parameter, {}).values():
                kinds["moments"] += (numbers if moment.dim() else 1) * moment.itemsize
        kinds["activations, copies"] = self.now - sum(kinds.values())
        self.peaks[self.phase] = kinds | {"total": self.now}


if __name__ == "__main__":
    cli(main)
