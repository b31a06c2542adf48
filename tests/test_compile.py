"""What --compile compiles, and that the real compiler's blocks train like plain ones."""

import collections
import subprocess
import sys

import pytest
import torch
from test_train import ROOT, metrics
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters

import train

CHECKPOINT = ["--grad_checkpoint", "--no-grad_checkpoint"]


class CountingBackend:
    """A compiler that runs what it is given as it is, and counts graphs and how often each runs."""

    def __init__(self):
        self.graphs = []
        self.runs = 0

    def __call__(self, graph, inputs):
        self.graphs.append(collections.Counter(str(node.target) for node in graph.graph.nodes))
        compiled = aot_eager(graph, inputs)

        def run(*args):
            self.runs += 1
            return compiled(*args)

        return run


@pytest.fixture
def backend(monkeypatch):
    """The compiler's front end is the real one; only what it hands its graphs to counts them."""
    torch._dynamo.reset()
    counting = CountingBackend()
    compile = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda *args, **kwargs: compile(*args, **kwargs, backend=counting)
    )
    yield counting
    torch._dynamo.reset()


@pytest.mark.parametrize("flag, forwards", list(zip(CHECKPOINT, (2, 1))))
def test_each_block_is_one_graph(finetune_flags, backend, flag, forwards):
    """No block runs outside of its graph, in forward or recomputed; any length fits into it."""
    cfg = train.parse_config([*finetune_flags, "--compile", flag])
    model, _ = train.build_model(cfg, torch.device("cpu"))
    layers = len(model.blocks()[1])
    graphs = []
    for length in (30, 37, 41):
        ids = torch.full((2, length), 5)
        pixels = torch.zeros(0, 3, 0, 0)
        out = model(ids, torch.arange(0), torch.arange(1, length), pixels)
        out["loss_g"].backward()
        graphs.append(len(backend.graphs))
    assert backend.runs == 3 * layers * forwards
    assert graphs[0] == graphs[2]
    # the block as a whole: attention, seven matrices
    for graph in backend.graphs:
        assert sum(n for name, n in graph.items() if "linear" in name) == 7
        assert sum(n for name, n in graph.items() if "scaled_dot_product" in name) == 1


@pytest.mark.real
@pytest.mark.parametrize("flag", CHECKPOINT)
def test_compiled_blocks_train_like_plain_ones(finetune_flags, tmp_path, flag):
    torch._dynamo.reset()
    counters.clear()
    for name, extra in (("plain", []), ("compiled", ["--compile"])):
        assert not counters["stats"]["unique_graphs"]
        train.main([*finetune_flags, "--out_dir", str(tmp_path / name), flag, *extra])
    assert counters["stats"]["unique_graphs"] >= 1 and not counters["graph_break"]
    for a, b in zip(metrics(tmp_path / "plain"), metrics(tmp_path / "compiled")):
        assert a == pytest.approx(b, rel=1e-4)


@pytest.mark.real
@pytest.mark.parametrize("parallel", ["--no-fsdp", "--fsdp"])
def test_two_ranks_compile_too(finetune_flags, tmp_path, parallel):
    """DDP and FSDP, whose hooks stay outside of the graphs."""
    train.main([*finetune_flags, "--out_dir", str(tmp_path / "one"), "--grad_accum", "2"])
    argv = [*finetune_flags, "--out_dir", str(tmp_path / "two"), "--compile", parallel]
    (tmp_path / "worker.py").write_text(f"""if True:
        import sys
        sys.path.insert(0, {str(ROOT)!r})
        import train
        from torch._dynamo.utils import counters
        train.main({argv!r})
        assert counters["stats"]["unique_graphs"] and not counters["graph_break"], counters
        train.dist.destroy_process_group()""")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    subprocess.run([*torchrun, str(tmp_path / "worker.py")], check=True)
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert len(one) == len(two) == 6
    for a, b in zip(one, two):
        assert a == pytest.approx(b, rel=2e-4)
