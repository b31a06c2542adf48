"""What --compile compiles, and that the real compiler's blocks train like plain ones."""

import collections
import subprocess
import sys

import pytest
import torch
from test_packing import tiny_llm
from test_train import ROOT, metrics
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters

import train
from model import decode, fit_llm
from tools import speed

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
    counters.clear()
    counting = CountingBackend()
    compile = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda *args, **kwargs: compile(*args, **kwargs, backend=counting)
    )
    yield counting
    torch._dynamo.reset()


@pytest.mark.parametrize("flag, forwards", list(zip(CHECKPOINT, (2, 1))))
def test_each_block_is_one_graph(finetune_flags, backend, flag, forwards):
    """No block runs outside of its graph, in forward or recomputed; any lengths fit into it."""
    cfg = train.parse_config([*finetune_flags, "--compile", flag])
    model, _ = train.build_model(cfg, torch.device("cpu"))
    layers = len(model.blocks()[1])
    graphs = []
    for lengths in ([30, 30], [37, 12], [41, 9]):
        ids = torch.full((sum(lengths),), 5)
        positions = torch.cat([torch.arange(n) for n in lengths])
        trained = torch.arange(1, lengths[0])
        out = model(ids, positions, lengths, torch.arange(0), trained, torch.zeros(0, 3, 0, 0))
        out["loss_g"].backward()
        graphs.append(len(backend.graphs))
    assert backend.runs == 3 * layers * forwards
    assert graphs[0] == graphs[2]
    # the block as a whole: attention of two sequences, seven matrices
    for graph in backend.graphs:
        assert sum(n for name, n in graph.items() if "linear" in name) == 7
        assert sum(n for name, n in graph.items() if "scaled_dot_product" in name) == 2


def test_blocks_with_windows_are_graphs_around_their_attention(backend):
    """However many sequences are longer than the window: none of these compiles anew."""
    llm = tiny_llm("mistral").float()
    fit_llm(llm)
    for block in llm.model.layers:
        block.forward = torch.compile(block.forward, dynamic=True)
    graphs = []
    for lengths in ([9, 2, 2], [9, 9, 9], [2, 9, 2], [2, 2, 2]):
        positions = torch.cat([torch.arange(n) for n in lengths])
        with torch.no_grad():
            decode(llm.model, torch.randn(sum(lengths), 16), positions, lengths)
        graphs.append(len(backend.graphs))
    assert graphs[0] == graphs[-1]
    assert all("attend_within" in reason for reason in counters["graph_break"])
    names = collections.Counter(name for graph in backend.graphs for name in graph)
    assert any("linear" in name for name in names)
    assert not any("scaled_dot_product" in name for name in names)


def test_speed_compares_compiled_steps_with_plain_ones(backend):
    _, steps = speed.make_steps("tiny", 2, "pretrain", 1, 8, False, True)
    losses = {}
    for name, step in steps.items():
        before = backend.runs
        losses[name] = step()
        assert (backend.runs > before) == (name == "compiled")
    assert losses["compiled"] == pytest.approx(losses["not compiled"], rel=1e-5)


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
