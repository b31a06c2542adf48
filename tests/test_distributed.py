"""Two gloo processes against one: the same losses, gradients and weights."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_train import metrics

import train
from data import UserError
from loss import sea_loss


def ragged_inputs():
    """Name -> visual tokens [B, 9, D], ids, scores, word vectors, log-scale, images per rank."""
    sizes = {
        "even": ((2, 2), 30),
        "ragged": ((3, 1), 6),
        "one_rank_unlabelled": ((2, 1), 12),
        "unlabelled": ((1, 1), 5),
    }
    cases = {}
    for name, (counts, q) in sizes.items():
        g = torch.Generator().manual_seed(len(name))
        B = sum(counts)
        ids = torch.randint(-1, q, (B, 9, 3), generator=g)
        if name.endswith("unlabelled"):
            ids[0 if name == "unlabelled" else counts[0] :] = -1
        cases[name] = (
            torch.randn(B, 9, 8, generator=g),
            ids,
            torch.rand(B, 9, 3, generator=g),
            torch.randn(q, 8, generator=g),
            torch.tensor([0.7]),
            counts,
        )
    return cases


def record_gradients(train, folder):
    """Have the next run of train.main write the whole gradients of its fourth step, by name.

    They go to folder/gradients_RANK.pt.
    """
    build = train.build_optimizer if not hasattr(train, "_build") else train._build
    train._build = build

    def recording(cfg, model, *args):
        optimizer, schedule = build(cfg, model, *args)

        def write(*_):
            if schedule.last_epoch == 3:
                grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
                for name, g in grads.items():
                    whole = g.full_tensor() if hasattr(g, "full_tensor") else g
                    grads[name] = whole.clone()
                torch.save(grads, folder / f"gradients_{train.rank()}.pt")

        optimizer.register_step_pre_hook(write)
        return optimizer, schedule

    train.build_optimizer = recording


def all_weights(folder):
    found = {}
    for path in sorted((folder / "model").glob("*.safetensors")):
        found |= load_file(path)
    return found


@pytest.fixture(scope="module")
def two_ranks(flags, finetune_flags, tmp_path_factory):
    out = tmp_path_factory.mktemp("two_ranks")
    (out / "flags.json").write_text(json.dumps(dict(pretrain=flags, finetune=finetune_flags)))
    worker = Path(__file__).parent / "distributed_worker.py"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    run = subprocess.run(
        [*torchrun, str(worker), str(out)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert (out / "unlabelled_1.pt").exists(), run.stderr[-12000:]
    return out


@pytest.mark.parametrize(
    "name, stage, batch_size, grad_accum, extra",
    [
        ("local", "pretrain", 4, 2, []),
        ("gathered", "pretrain", 8, 1, []),
        ("pretrain_fsdp", "pretrain", 4, 2, ["--export"]),
        ("finetune", "finetune", 2, 2, []),
        ("finetune_fsdp", "finetune", 2, 2, []),
    ],
)
def test_two_ranks_train_as_one(
    two_ranks,
    flags,
    finetune_flags,
    tmp_path,
    monkeypatch,
    name,
    stage,
    batch_size,
    grad_accum,
    extra,
):
    """DDP and FSDP are one process that accumulates the same micro-batches.

    With --gather_pairs they are one that holds them whole. Stage 2 has ragged answers, and in its
    fourth step a rank without an image.
    """
    monkeypatch.setattr(train, "build_optimizer", train.build_optimizer)  # to be put back
    record_gradients(train, tmp_path)
    own = f"--out_dir {tmp_path} --batch_size {batch_size} --grad_accum {grad_accum}".split()
    train.main([*dict(pretrain=flags, finetune=finetune_flags)[stage], *own, *extra])
    one, two = metrics(tmp_path), metrics(two_ranks / name)
    assert len(one) == len(two) == 6
    for a, b in zip(one, two):
        assert a.keys() == b.keys() and a == pytest.approx(b, rel=2e-4), (a, b)
    expected = torch.load(tmp_path / "gradients_0.pt")
    for part in ("vision_tower", "language_model"):
        assert any(part in k for k in expected) == (stage == "finetune")
    for rank in range(2):
        grads = torch.load(two_ranks / name / f"gradients_{rank}.pt")
        assert grads.keys() == expected.keys()
        for key, g in expected.items():
            assert torch.allclose(g, grads[key], atol=1e-5 * max(1, float(g.abs().max()))), key
    ours, theirs = all_weights(tmp_path), all_weights(two_ranks / name)
    assert ours.keys() == theirs.keys()
    for key, w in ours.items():
        assert torch.allclose(w, theirs[key], atol=1e-4), key


@pytest.mark.parametrize(
    "name, other",
    [("bf16", "finetune"), ("bf16_fsdp", "finetune"), ("pretrain_bf16_fsdp", "local")],
)
def test_bfloat16_follows_fp32(two_ranks, name, other):
    a, b = ([m["loss_g"] for m in metrics(two_ranks / run)] for run in (name, other))
    assert a == pytest.approx(b, rel=0.03) and a[0] != b[0]


def test_a_rank_with_other_settings_is_refused(two_ranks):
    assert not (two_ranks / "differs_0").exists()
    message = (two_ranks / "differs_1").read_text()
    assert message == "data is 1, but 0 on rank 0; this is rank 1"


def test_a_micro_batch_without_images_stands_beside_one_with(finetune_flags):
    cfg = train.parse_config([*finetune_flags, "--grad_accum", "2"])
    model, dtype = train.build_model(cfg, torch.device("cpu"))
    run = train.Run(cfg, torch.device("cpu"), dtype, model, model, None, None)
    loader = train.micro_batch_loader(train.build_data(cfg, model)[0], run, 0, 6)
    images = [len(batch["pixels"]) for batch in loader]
    assert images[6:8] in ([2, 0], [0, 2])  # of the fourth step


def test_a_sharded_checkpoint_goes_on_with_any_number_of_ranks(two_ranks, finetune_flags, tmp_path):
    """Saved by two ranks in step 4, resumed by two and by one: the same steps 5 and 6."""
    whole = metrics(two_ranks / "finetune_fsdp")
    shutil.copytree(two_ranks / "finetune_fsdp", tmp_path / "run")
    again = [*finetune_flags, "--out_dir", str(tmp_path / "run"), "--resume"]
    train.main([*again, "--grad_accum", "2"])
    for resumed in (two_ranks / "resumed", tmp_path / "run"):
        assert [line["step"] for line in metrics(resumed)] == [1, 2, 3, 4, 5, 6]
        for a, b in zip(whole[4:], metrics(resumed)[4:]):
            assert a == pytest.approx(b, rel=1e-5)
    message = "samples_per_step is 2, but 4 in"
    with pytest.raises(UserError, match=message):
        train.main(again)


@pytest.mark.parametrize("case", ragged_inputs())
def test_gathered_loss_and_gradients_are_those_of_the_whole_batch(two_ranks, case):
    tokens, ids, scores, table, log_scale, counts = ragged_inputs()[case]
    tokens.requires_grad_()
    log_scale.requires_grad_()
    generators = [torch.Generator().manual_seed(i) for i in range(len(ids))]
    loss, stats = sea_loss(tokens, ids, scores, table.__getitem__, log_scale, (3, 3), 2, generators)
    loss.backward()
    ranks = [torch.load(two_ranks / f"{case}_{r}.pt", weights_only=True) for r in range(2)]
    assert sum(r["pairs"] for r in ranks) == stats["pairs"]
    assert (stats["pairs"] > 0) == (case != "unlabelled")
    mean = {k: (ranks[0][k] + ranks[1][k]) / 2 for k in ("loss", "s")}  # as DDP averages
    assert torch.allclose(mean["loss"], loss, atol=1e-6)
    assert torch.allclose(mean["s"], log_scale.grad, atol=1e-6)
    assert torch.allclose(torch.cat([r["x"] for r in ranks]) / 2, tokens.grad, atol=1e-7)
