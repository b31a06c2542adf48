"""What a GPU would see: a GPU's code paths without one, and, where there is one, steps on it.

Without a GPU the tensors on "cuda:0" are fakes that have a shape, a dtype and a device and hold no
numbers; those on the CPU are real. Operations that mix devices or dtypes fail as they would on a
GPU. Autograd refuses fakes, so backward is run on the meta device instead.
"""

import collections
import contextlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.utils import _to_kwargs
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import data
import eval as evaluation
import labels
import train

GPU = torch.device("cuda:0")
aten = torch.ops.aten


class FakeGPU(TorchDispatchMode):
    """Run what touches the GPU with fakes and all else for real; note what makes the CPU wait.

    waits: {operation: how often}. Numbers that are read from the GPU are ones. A mask chooses all.
    """

    def __init__(self, fakes=None, device=GPU):
        super().__init__()
        self.fakes = fakes
        self.device = device
        self.waits = collections.Counter()

    def is_remote(self, x):
        if isinstance(x, torch.Tensor):
            return x.device.type == self.device.type
        return isinstance(x, torch.device) and x.type == self.device.type

    def as_fake(self, x):
        is_real = isinstance(x, torch.Tensor) and not isinstance(x, FakeTensor)
        return self.fakes.from_tensor(x) if is_real else x

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        remote = [x for x in tree_leaves((args, kwargs)) if self.is_remote(x)]
        if not remote:
            with _disable_current_modes():
                return func(*args, **kwargs)

        to = kwargs.get("device")
        if func is aten._local_scalar_dense.default:
            self.waits["a number is read"] += 1
            return {torch.bool: True}.get(args[0].dtype, 1)
        if func is aten._to_copy.default and self.is_remote(args[0]) and to and to.type == "cpu":
            self.waits["a tensor is read"] += 1
            with _disable_current_modes():
                return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        is_copy = func in (aten._to_copy.default, aten.copy_.default)
        local = [x for x in tensors if not self.is_remote(x)]
        local = [x for x in local if x.dim()]  # a single number goes along with the operation
        if is_copy and local and not kwargs.get("non_blocking"):
            self.waits["a tensor is written"] += 1
        elif local and not is_copy:
            raise AssertionError(f"{func} mixes devices: {[(x.device, x.shape) for x in tensors]}")
        if self.fakes is not None:
            args, kwargs = tree_map(self.as_fake, (args, kwargs))
        if func is aten.index.Tensor and any(
            x is not None and x.dtype == torch.bool for x in args[1]
        ):
            self.waits["a mask"] += 1
            rows = [torch.arange(len(x), device=self.device) for x in args[1]]
            return func(args[0], rows)
        return func(*args, **kwargs)


def attention(module, query, key, value, attention_mask, scaling, **kwargs):
    """In place of sdpa, which would ask the driver which kernel to take."""
    if query.device != GPU:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    weights = (query @ key.mT * scaling).softmax(-1)
    return (weights @ value).transpose(1, 2).contiguous(), None


@contextlib.contextmanager
def fake_gpu(monkeypatch):
    """A FakeGPU, and code that finds it."""
    monkeypatch.setattr("model.sdpa_attention_forward", attention)
    amp = torch.cuda.amp.common
    monkeypatch.setattr(amp, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args: True)
    for module in (labels, train, evaluation):
        monkeypatch.setattr(module, "rank_device", lambda: GPU)
    to_list = torch.Tensor.tolist  # reads a fake number by number
    monkeypatch.setattr(FakeTensor, "tolist", lambda x: to_list(x.cpu()))
    with FakeTensorMode() as fakes, FakeGPU(fakes) as gpu:
        yield gpu


def move(module, device=GPU):
    """The parameters and buffers of a module, on the device."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, x in tensors.items():
                if x is not None:
                    moved = torch.empty(x.shape, dtype=x.dtype, device=device)
                    if isinstance(x, torch.nn.Parameter):
                        moved = torch.nn.Parameter(moved, requires_grad=x.requires_grad)
                    tensors[name] = moved
    return module


def make_run(argv, device, dtype=torch.bfloat16):
    """A train.Run on the device, and its first micro-batch."""
    cfg = train.parse_config([*argv, "--dtype", "bfloat16"])
    with _disable_current_modes():
        model, _ = train.build_model(cfg, torch.device("cpu"))
        samples = train.load_samples(cfg.data, captions=cfg.stage == "pretrain")
        store = train.LabelStore(cfg.labels) if cfg.sea_weight > 0 else None
        train_set, val_set = train.build_data(cfg, model, samples, store)
    items = [train_set[i] for i in range(cfg.batch_size)]
    batch = data.collate(items)
    model.vision_tower.set_attn_implementation("eager")  # sdpa would ask the driver
    move(model, device)
    run = train.Run(cfg, device, dtype, model, model, train.build_optimizer(cfg, model), 10)
    return run, batch, val_set


STAGES = ["pretrain", "finetune"]


def with_inputs_moved(model):
    """The model's forward as FSDP2 calls it: it has moved all tensors of the arguments."""

    def forward(**batch):
        _, [moved] = _to_kwargs((), batch, GPU, False)
        return model(**moved)

    return forward


@pytest.mark.parametrize("is_fsdp", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_a_step_waits_for_the_gpu_once(
    flags, finetune_flags, stage, is_fsdp, tmp_path, monkeypatch
):
    """For the numbers that are logged: forward, AdamW and all that is around them."""
    argv = flags if stage == "pretrain" else finetune_flags
    trained = []

    def backward(loss):
        """Autograd refuses fakes."""
        assert loss.device == GPU and loss.dtype != torch.bfloat16
        for parameter in run.model.parameters():
            if parameter.requires_grad:
                assert parameter.dtype == torch.float32
                parameter.grad = torch.empty_like(parameter)
                trained.append(parameter)

    with fake_gpu(monkeypatch) as gpu:
        run, batch, _ = make_run([*argv, "--out_dir", str(tmp_path / "new")], GPU)
        if is_fsdp:
            run.parallel_model = with_inputs_moved(run.model)
        monkeypatch.setattr(torch.Tensor, "backward", backward)
        gpu.waits.clear()
        metrics = train.train_step(run, [batch], 1)
    assert dict(gpu.waits) == {"a tensor is read": 1} and trained
    assert metrics["loss_g"] == 1 and ("loss_a" in metrics) == (stage == "pretrain")


@pytest.mark.parametrize("stage", STAGES)
def test_validation_on_a_gpu(flags, finetune_flags, stage, tmp_path, monkeypatch):
    argv = flags if stage == "pretrain" else finetune_flags
    with fake_gpu(monkeypatch):
        run, _, val_set = make_run([*argv, "--out_dir", str(tmp_path / "new")], GPU)
        with torch.no_grad():
            metrics = train.validate(run, val_set)
    assert metrics["val_loss"] == 1


@pytest.mark.parametrize("path", ["value", "last", "vv"])
def test_labels_on_a_gpu(world, path, tmp_path, monkeypatch):
    load_encoder = labels.load_encoder

    def load(name, device):
        with _disable_current_modes():
            encoder = load_encoder(name, "cpu")
        return move(encoder, device)

    monkeypatch.setattr(labels, "load_encoder", load)
    files = [str(world / name) for name in ("train.json", "images", "words.txt")]
    with fake_gpu(monkeypatch):
        labels.extract(
            *files, str(tmp_path / "labels"), str(world / "clip"), path=path, n=3, workers=0
        )
    store = labels.LabelStore(tmp_path / "labels")
    assert len(store) == 24 and store.meta["dtype"] == "bfloat16"


@pytest.mark.parametrize("command", ["tacs", "gap", "words"])
def test_alignment_on_a_gpu(world, flags, command, tmp_path, monkeypatch):
    train.main([*flags, "--max_steps", "1", "--out_dir", str(tmp_path / "run")])
    load_model = evaluation.load_model

    def load(path, dtype, **parts):
        with _disable_current_modes():
            model = load_model(path, dtype, **parts)
        model.vision_tower.set_attn_implementation("eager")
        monkeypatch.setattr(type(model), "to", lambda model, device: move(model, device))
        return model

    monkeypatch.setattr(evaluation, "load_model", load)
    argv = f"{command} --model {tmp_path}/run --samples 2".split()
    with fake_gpu(monkeypatch):
        assert evaluation.main(argv)


@pytest.mark.parametrize("stage", STAGES)
def test_backward_mixes_no_devices(flags, finetune_flags, stage, tmp_path, monkeypatch):
    """On the meta device, which has shapes and dtypes, and where autograd works."""
    argv = flags if stage == "pretrain" else finetune_flags
    meta = torch.device("meta")
    autocast = torch.autocast
    monkeypatch.setattr(
        torch, "autocast", lambda kind, *args, **kwargs: autocast("cpu", *args, **kwargs)
    )
    run, batch, _ = make_run([*argv, "--out_dir", str(tmp_path / "new")], meta, dtype=torch.float32)
    for parameter in run.model.parameters():
        parameter.data = parameter.data.float()
    with FakeGPU(device=meta) as gpu:
        train.train_step(run, [batch], 1)
    assert gpu.waits["a tensor is read"] == 1
    moments = run.optimizer.state.values()
    assert moments and all(state["exp_avg"].device == meta for state in moments)
    trained = [p for p in run.model.parameters() if p.requires_grad]
    assert len(moments) == len(trained)


def test_a_mask_on_the_gpu_is_noticed():
    with FakeTensorMode() as fakes, FakeGPU(fakes) as gpu:
        x = torch.randn(4, 3, device=GPU)
        assert x[x[:, 0] > 0].shape == (4, 3) and gpu.waits["a mask"] == 1
        x.sum().item()
        assert gpu.waits["a number is read"] == 1
        x + torch.ones(3).to(GPU, non_blocking=True)
        assert "a tensor is written" not in gpu.waits
        torch.ones(3).to(GPU)
        assert gpu.waits["a tensor is written"] == 1
        with pytest.raises(AssertionError, match="mixes devices"):
            x + torch.ones(3)
        assert torch.ones(3).sum().item() == 3  # the CPU's are real


# ----------------------------------------------------------------------------------- on a real one


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("more", [[], ["--grad_checkpoint"], ["--compile"]])
def test_both_stages_on_a_gpu(flags, finetune_flags, world, tmp_path, more):
    """Losses of bf16 on the GPU are about those of float32 on the CPU, for which see test_train."""
    for name, argv in (("one", flags), ("two", finetune_flags)):
        train.main([*argv, *more, "--out_dir", str(tmp_path / name)])
        lines = data.read_json_lines(tmp_path / name / "metrics.jsonl")
        losses = [line["loss_g"] for line in lines if "loss_g" in line]
        assert len(losses) == 6 and all(0 < loss < 10 for loss in losses)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_search_on_a_gpu_is_that_of_the_cpu():
    rng = torch.Generator().manual_seed(0)
    unit = torch.nn.functional.normalize
    patches, words = (unit(torch.randn(n, 64, generator=rng), dim=1) for n in (300, 50_000))
    expected = labels.nearest_words(patches, words, 10, 1)
    found = labels.nearest_words(patches.cuda(), words.cuda(), 10, 1)
    assert torch.equal(found[0].cpu(), expected[0])
    assert torch.allclose(found[1].cpu(), expected[1], atol=1e-6)
