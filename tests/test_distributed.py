"""Two gloo processes against one: the same losses, gradients and weights."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_train import exact_alignment_loss, metrics
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

import train
from data import UserError, load_samples

COLD = 0.0103  # a temperature that bfloat16 cannot hold: log 1/τ would be 4.5625, τ 0.01043


def gathered_inputs():
    """Name -> visual tokens [4, 9, D], ids [4, 9, 1], word vectors, log-scale; two images a rank.

    Nothing is left to chance: each 2 x 2 window has at most one labelled patch, with one label. In
    "shared" each label stands on both ranks, on patches of equal visual tokens.
    """
    g = torch.Generator().manual_seed(0)
    tokens = torch.randn(4, 9, 8, generator=g)
    table = torch.randn(40, 8, generator=g)
    of_windows = [0, 2, 6, 8]
    distinct = torch.full((4, 9), -1)
    distinct[:, of_windows] = torch.randperm(40, generator=g)[:16].view(4, 4)
    shared = distinct.clone()
    shared[2:] = distinct[:2]
    shared_tokens = tokens.clone()
    shared_tokens[2:] = tokens[:2]
    one_rank = distinct.clone()
    one_rank[2:] = -1
    cases = {
        "distinct": (tokens, distinct),
        "shared": (shared_tokens, shared),
        "one_rank_unlabelled": (tokens, one_rank),
        "unlabelled": (tokens, torch.full((4, 9), -1)),
    }
    return {
        name: (x, ids.unsqueeze(-1), table, torch.tensor([0.7])) for name, (x, ids) in cases.items()
    }


def record_gradients(train, folder):
    """Have the next run of train.main write the whole gradients of its fourth step, by name.

    They go to folder/gradients_RANK.pt.
    """
    build = train.build_optimizer if not hasattr(train, "_build") else train._build
    train._build = build

    def recording(cfg, model):
        optimizer = build(cfg, model)

        def write(*_):
            if now.get("step") == 4:
                grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
                for name, g in grads.items():
                    whole = g.full_tensor() if hasattr(g, "full_tensor") else g
                    grads[name] = whole.clone()
                torch.save(grads, folder / f"gradients_{train.rank()}.pt")

        optimizer.register_step_pre_hook(write)
        return optimizer

    train.build_optimizer = recording
    step = train.train_step if not hasattr(train, "_step") else train._step
    train._step = step
    now = {}

    def noting(run, batches, number):
        now["step"] = number
        return step(run, batches, number)

    train.train_step = noting


def all_weights(folder):
    found = {}
    for path in sorted((folder / "model").glob("*.safetensors")):
        found |= load_file(path)
    return found


@pytest.fixture(scope="module")
def flags_of(world, flags, finetune_flags, tmp_path_factory):
    """Stage -> flags. Those of odd_ have parts with rows that two ranks cannot divide evenly."""
    folder = tmp_path_factory.mktemp("odd")
    vision = CLIPVisionConfig.from_pretrained(world / "vision", patch_size=5)
    CLIPVisionModel(vision).save_pretrained(folder / "vision")
    shutil.copy(world / "vision/preprocessor_config.json", folder / "vision")
    shutil.copytree(world / "llm", folder / "llm")
    heads = dict(num_attention_heads=5, num_key_value_heads=5, head_dim=4)
    llm = LlamaConfig.from_pretrained(world / "llm", hidden_size=25, vocab_size=301, **heads)
    LlamaForCausalLM(llm).save_pretrained(folder / "llm")
    parts = ["--llm", str(folder / "llm"), "--vision", str(folder / "vision")]
    init = finetune_flags.index("--init")
    return {
        "pretrain": flags,
        "finetune": finetune_flags,
        "odd_pretrain": [*flags, *parts, "--sea_weight", "0"],
        "odd_finetune": [*finetune_flags[:init], *parts, *finetune_flags[init + 2 :]],
    }


@pytest.fixture(scope="module")
def two_ranks(flags_of, tmp_path_factory):
    out = tmp_path_factory.mktemp("two_ranks")
    (out / "flags.json").write_text(json.dumps(flags_of))
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
        ("pretrain_fsdp", "pretrain", 4, 2, ["--export"]),
        ("finetune", "finetune", 2, 2, []),
        ("finetune_fsdp", "finetune", 2, 2, []),
        ("odd_pretrain_fsdp", "odd_pretrain", 4, 2, ["--export"]),
        ("odd_finetune_fsdp", "odd_finetune", 2, 2, []),
        ("odd_resumed", "odd_finetune", 2, 2, []),
    ],
)
def test_two_ranks_train_as_one(
    two_ranks,
    flags_of,
    tmp_path,
    monkeypatch,
    name,
    stage,
    batch_size,
    grad_accum,
    extra,
):
    """DDP and FSDP are one process that accumulates the same micro-batches.

    Stage 2 has ragged answers, and in its fourth step a rank without an image. odd_resumed goes on
    from the checkpoint of step 3.
    """
    for function in ("build_optimizer", "train_step"):  # to be put back
        monkeypatch.setattr(train, function, getattr(train, function))
    record_gradients(train, tmp_path)
    own = f"--out_dir {tmp_path} --batch_size {batch_size} --grad_accum {grad_accum}".split()
    train.main([*flags_of[stage], *own, *extra])
    one, two = metrics(tmp_path), metrics(two_ranks / name)
    assert len(one) == len(two) == 6
    for a, b in zip(one, two):
        assert a.keys() == b.keys() and a == pytest.approx(b, rel=2e-4), (a, b)
    expected = torch.load(tmp_path / "gradients_0.pt")
    for part in ("vision_tower", "language_model"):
        assert any(part in k for k in expected) == ("finetune" in stage)
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


def test_fsdp_keeps_the_temperature_in_float32(two_ranks):
    """With bfloat16 compute: τ in the log, the loss and the gradient, against float64."""
    log_scale = torch.tensor([COLD]).log().neg()
    losses, gradients = [], []
    for rank in range(2):
        for x, t in torch.load(two_ranks / f"cold/pairs_{rank}.pt"):
            assert x.dtype == torch.bfloat16 and len(x) > 1
            loss, _, gradient = exact_alignment_loss(x, t, log_scale)
            losses.append(loss.item())
            gradients.append(gradient.item())
    lines = metrics(two_ranks / "cold")
    assert [line["tau"] for line in lines] == pytest.approx([COLD] * 6, rel=1e-6)
    means = [(a + b) / 2 for a, b in zip(losses[:6], losses[6:])]
    assert [line["loss_a"] for line in lines] == pytest.approx(means, rel=1e-5)
    for rank in range(2):
        found = torch.load(two_ranks / f"cold/gradients_{rank}.pt")["temperature.log_scale"]
        assert found.item() == pytest.approx((gradients[3] + gradients[9]) / 2, rel=1e-5)


def test_a_rank_with_other_settings_is_refused(two_ranks):
    assert not (two_ranks / "differs_0").exists()
    message = (two_ranks / "differs_1").read_text()
    assert message == "data is 1, but 0 on rank 0; this is rank 1"


def test_no_rank_leaves_before_the_model_is_written(two_ranks):
    assert [(two_ranks / f"slowly_{rank}").read_text() for rank in range(2)] == ["True", "True"]


def test_a_micro_batch_without_images_stands_beside_one_with(finetune_flags):
    cfg = train.parse_config([*finetune_flags, "--grad_accum", "2"])
    model, dtype = train.build_model(cfg, torch.device("cpu"))
    run = train.Run(cfg, torch.device("cpu"), dtype, model, model, None, 6)
    samples = load_samples(cfg.data, captions=False)
    train_set, _ = train.build_data(cfg, model, samples, None)
    loader = train.micro_batch_loader(train_set, run, 0)
    images = [len(batch["pixels"]) for batch in loader]
    assert images[6:8] in ([2, 0], [0, 2])  # of the fourth step


def test_a_sharded_checkpoint_goes_on_with_any_number_of_ranks(two_ranks, finetune_flags, tmp_path):
    """Saved by two ranks in step 4, resumed by two and by one: the same steps 5 and 6."""
    whole = metrics(two_ranks / "finetune_fsdp")
    shutil.copytree(two_ranks / "finetune_fsdp", tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step_6")
    again = [*finetune_flags, "--out_dir", str(tmp_path / "run"), "--resume", "--no-fsdp"]
    message = "--grad_accum 1 on 1 ranks makes steps of 2 samples, .* of 4: use --grad_accum 2"
    with pytest.raises(UserError, match=message):
        train.main(again)
    train.main([*again, "--grad_accum", "2"])
    for resumed in (two_ranks / "resumed", tmp_path / "run"):
        assert [line["step"] for line in metrics(resumed)] == [1, 2, 3, 4, 5, 6]
        for a, b in zip(whole[4:], metrics(resumed)[4:]):
            assert a == pytest.approx(b, rel=1e-5)


def test_gathered_pairs_are_those_of_both_ranks(two_ranks):
    """The pairs, the logged loss and the gradient of a run with --gather_pairs, against float64."""
    pairs = [torch.load(two_ranks / f"gathered/pairs_{rank}.pt") for rank in range(2)]
    lines, local = metrics(two_ranks / "gathered"), metrics(two_ranks / "local")
    for step, (line, (x, t), (other_x, other_t)) in enumerate(zip(lines, *pairs)):
        assert x.equal(other_x) and t.equal(other_t) and len(x) == line["pairs"]
        log_scale = torch.tensor([-math.log(line["tau"])])
        exact, _, gradient = exact_alignment_loss(x, t, log_scale)
        assert line["loss_a"] == pytest.approx(exact.item(), rel=1e-5)
        if step == 3:
            for rank in range(2):
                found = torch.load(two_ranks / f"gathered/gradients_{rank}.pt")
                found = found["temperature.log_scale"].item()
                assert found == pytest.approx(gradient.item(), rel=1e-4)
    assert sum(line["pairs"] for line in lines) > sum(line["pairs"] for line in local)


@pytest.mark.parametrize("case", gathered_inputs())
def test_gathered_loss_and_gradients_are_those_of_the_whole_batch(two_ranks, case):
    tokens, ids, table, log_scale = gathered_inputs()[case]
    labels = ids[..., 0]
    first_of = {}
    for place in (labels >= 0).nonzero().tolist():
        first_of.setdefault(labels[tuple(place)].item(), place)
    x = torch.stack([tokens[i, j] for i, j in first_of.values()]) if first_of else tokens[0, :0]
    t = table[list(first_of)]
    ranks = [torch.load(two_ranks / f"{case}_{r}.pt", weights_only=True) for r in range(2)]
    assert ranks[0]["pairs"] == ranks[1]["pairs"] == len(x)
    # DDP takes the mean of the ranks' gradients.
    found = torch.cat([rank["x"] for rank in ranks]) / 2
    if not first_of:
        assert ranks[0]["loss"] == 0 and (found == 0).all() and ranks[0]["s"] == 0
        return
    exact, x_grad, scale_grad = exact_alignment_loss(x, t, log_scale)
    for rank in ranks:
        assert rank["loss"].item() == pytest.approx(exact.item(), rel=1e-5)
        assert rank["s"].item() == pytest.approx(scale_grad.item(), rel=1e-4)
    for label, grad in zip(first_of, x_grad):
        patches = found[labels == label].double()
        kept = patches[patches.abs().sum(1) > 0]
        assert len(kept) == 1  # one patch of each label, and the same on both ranks
        torch.testing.assert_close(kept[0], grad, rtol=1e-4, atol=1e-7)
    assert (found[labels < 0] == 0).all()
