"""Two gloo processes against one: the same losses, gradients and weights."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_train import metrics, weights

import train
from loss import sea_loss


def ragged_inputs():
    """Name -> visual tokens [B, 9, D], ids, scores, word vectors, log-scale, images per rank."""
    cases = {}
    for name, counts, q in (("even", (2, 2), 30), ("ragged", (3, 1), 6), ("one_rank_unlabelled", (2, 1), 12),
                            ("unlabelled", (1, 1), 5)):
        g = torch.Generator().manual_seed(len(name))
        B = sum(counts)
        ids = torch.randint(-1, q, (B, 9, 3), generator=g)
        if name.endswith("unlabelled"):
            ids[0 if name == "unlabelled" else counts[0]:] = -1
        cases[name] = (torch.randn(B, 9, 8, generator=g), ids, torch.rand(B, 9, 3, generator=g),
                       torch.randn(q, 8, generator=g), torch.tensor([0.7]), counts)
    return cases


@pytest.fixture(scope="module")
def two_ranks(flags, tmp_path_factory):
    out = tmp_path_factory.mktemp("two_ranks")
    worker = Path(__file__).parent / "distributed_worker.py"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    run = subprocess.run([*torchrun, str(worker), str(out), *flags], capture_output=True, text=True,
                         env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert (out / "unlabelled_1.pt").exists(), run.stderr[-12000:]
    return out


@pytest.mark.parametrize("name, batch_size, grad_accum", [("local", 4, 2), ("gathered", 8, 1)])
def test_two_ranks_train_as_one(two_ranks, flags, tmp_path, name, batch_size, grad_accum):
    """DDP is one process that accumulates the same micro-batches; with --gather_pairs, one that holds them whole."""
    train.main([*flags, "--out_dir", str(tmp_path), "--batch_size", str(batch_size), "--grad_accum", str(grad_accum)])
    one, two = metrics(tmp_path), metrics(two_ranks / name)
    assert len(one) == len(two) == 6
    for a, b in zip(one, two):
        assert a.keys() == b.keys() and a == pytest.approx(b, rel=2e-4), (a, b)
    for key, w in weights(tmp_path).items():
        assert torch.allclose(w, weights(two_ranks / name)[key], atol=2e-5), key


@pytest.mark.parametrize("case", ragged_inputs())
def test_gathered_loss_and_gradients_are_those_of_the_whole_batch(two_ranks, case):
    tokens, ids, scores, table, log_scale, counts = ragged_inputs()[case]
    tokens.requires_grad_()
    log_scale.requires_grad_()
    generators = [torch.Generator().manual_seed(i) for i in range(len(ids))]
    loss, stats = sea_loss(tokens, ids, scores, table.__getitem__, log_scale, (3, 3), 2, generators)
    loss.backward()
    ranks = [torch.load(two_ranks / f"{case}_{r}.pt", weights_only=True) for r in range(2)]
    assert sum(r["pairs"] for r in ranks) == stats["pairs"] and (stats["pairs"] > 0) == (case != "unlabelled")
    mean = {k: (ranks[0][k] + ranks[1][k]) / 2 for k in ("loss", "s")}  # as DDP averages
    assert torch.allclose(mean["loss"], loss, atol=1e-6) and torch.allclose(mean["s"], log_scale.grad, atol=1e-6)
    assert torch.allclose(torch.cat([r["x"] for r in ranks]) / 2, tokens.grad, atol=1e-7)
