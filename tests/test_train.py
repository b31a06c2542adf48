import collections
import errno
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import get_cosine_schedule_with_warmup

import train
from data import UserError, collate, load_samples
from labels import LabelStore
from loss import contrastive_loss
from model import checkpoints

ROOT = Path(__file__).parent.parent
TIMING = {"samples_per_s"}


def metrics(out):
    """All values of each step. A resumed run logs the steps after its checkpoint again."""
    steps = collections.defaultdict(dict)
    for line in (out / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        steps[values["step"]] |= values
    return [{k: v for k, v in line.items() if k not in TIMING} for line in steps.values()]


def weights(out):
    return load_file(out / "model/adapter.safetensors")


def test_a_run_leaves_what_it_promises_and_learns(flags, tmp_path, world):
    before = {p: p.read_bytes() for p in (world / "llm").iterdir()}
    train.main([*flags, "--out_dir", str(tmp_path), "--max_steps", "40", "--lr", "0.01"])
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 41))
    assert sum(m["loss_g"] for m in lines[-5:]) < sum(m["loss_g"] for m in lines[:5]) - 1
    assert sum(m["loss_a"] for m in lines[-5:]) < sum(m["loss_a"] for m in lines[:5])
    # 10 words: at most 10 pairs
    assert all(0 < m["pairs"] <= 10 and 0 <= m["matched"] <= 1 for m in lines)
    assert all(-1 <= m["val_tacs"] <= 1 for m in lines[2::3])
    assert lines[-1]["tau"] != 1
    assert json.loads((tmp_path / "config.json").read_text())["lr"] == 0.01
    assert before == {p: p.read_bytes() for p in (world / "llm").iterdir()}


def test_schedule_is_linear_warmup_then_cosine_to_zero(flags, tmp_path):
    train.main([*flags, "--out_dir", str(tmp_path), "--max_steps", "20", "--warmup_ratio", "0.15"])
    warmup = [1e-3 * i / 3 for i in range(3)]
    cosine = [1e-3 * (1 + math.cos(math.pi * i / 17)) / 2 for i in range(17)]
    assert [m["lr"] for m in metrics(tmp_path)] == pytest.approx(warmup + cosine)


def test_the_learning_rates_of_a_run_by_transformers_schedule():
    """The paper's 2,181 steps, and runs so short that the warmup is all or none."""
    for steps, ratio in ((2181, 0.03), (20, 0.15), (3, 0.0), (2, 1.0), (1, 0.03)):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        schedule = get_cosine_schedule_with_warmup(optimizer, math.ceil(ratio * steps), steps)
        for step in range(1, steps + 1):
            exact = schedule.get_last_lr()[0]
            assert train.lr_at(step, steps, ratio) == pytest.approx(exact, abs=1e-12)
            optimizer.step()
            schedule.step()


def test_the_baseline_needs_no_labels_and_has_no_alignment_loss(flags, tmp_path):
    train.main([*flags, "--out_dir", str(tmp_path), "--sea_weight", "0", "--labels", "nowhere"])
    assert all("loss_a" not in m and "tau" not in m for m in metrics(tmp_path))
    assert weights(tmp_path)["log_scale"] == 0


def test_accumulation_takes_the_mean_over_all_tokens(flags, tmp_path):
    """Ragged captions: two micro-batches of 4 have the loss_g of one batch of 8.

    Without SEA they have its weights too.
    """
    for name, batch, accum in (("one", 8, 1), ("two", 4, 2)):
        own = f"--out_dir {tmp_path}/{name} --batch_size {batch} --grad_accum {accum}".split()
        train.main([*flags, "--sea_weight", "0", *own])
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two")):
        assert a["loss_g"] == pytest.approx(b["loss_g"], rel=1e-5)
    for name, w in weights(tmp_path / "one").items():
        assert torch.allclose(w, weights(tmp_path / "two")[name], atol=1e-5), name


def test_ten_steps_killed_and_ten_more_are_twenty(flags, tmp_path):
    """Bit for bit: ended by SIGKILL in its 14th step, resumed from the checkpoint of step 10."""
    flags = [*flags, "--max_steps", "20", "--save_every", "5", "--grad_accum", "2"]
    train.main([*flags, "--out_dir", str(tmp_path / "whole")])
    killed = [*flags, "--out_dir", str(tmp_path / "killed")]
    code = f"""if True:
        import os, signal, sys
        sys.path.insert(0, {str(ROOT)!r})
        import train
        step = train.train_step
        def until_killed(*args):
            if args[2] == 14:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(*args)
        train.train_step = until_killed
        train.main({killed!r})"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    assert len(metrics(tmp_path / "killed")) == 13 and not (tmp_path / "killed/model").exists()
    # as if the kill had come while a checkpoint was written
    (tmp_path / "killed/checkpoints/unfinished.tmp").mkdir()
    train.main([*killed, "--resume"])
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
    for name, w in weights(tmp_path / "whole").items():
        assert torch.equal(w, weights(tmp_path / "killed")[name]), name


def test_gradient_checkpointing_changes_nothing(flags, tmp_path):
    for name, extra in (("plain", ["--no-grad_checkpoint"]), ("checkpointed", [])):
        train.main([*flags, "--out_dir", str(tmp_path / name), *extra])
    for name, w in weights(tmp_path / "plain").items():
        assert torch.allclose(w, weights(tmp_path / "checkpointed")[name], atol=1e-6), name


def test_recomputed_blocks_drop_nothing_out(flags, tmp_path, world):
    """An LLM with dropout, which is frozen and trained as it answers: without."""
    shutil.copytree(world / "llm", tmp_path / "llm")
    config = json.loads((world / "llm/config.json").read_text())
    (tmp_path / "llm/config.json").write_text(json.dumps(config | {"attention_dropout": 0.9}))
    for name, llm in (("none", world / "llm"), ("dropout", tmp_path / "llm")):
        own = f"--out_dir {tmp_path}/{name} --llm {llm} --max_steps 1 --workers 0"
        train.main([*flags, *own.split()])
    assert metrics(tmp_path / "none") == metrics(tmp_path / "dropout")


@pytest.mark.parametrize("flag, times", [("--grad_checkpoint", 2), ("--no-grad_checkpoint", 1)])
def test_blocks_are_recomputed(flags, flag, times):
    cfg = train.parse_config([*flags, flag])
    model, _ = train.build_model(cfg, torch.device("cpu"))
    calls = []
    _, llm_blocks = model.blocks()
    for block in llm_blocks:
        block.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    ids = torch.full((30,), model.llava.config.image_token_id)
    ids[model.image_tokens :] = 5
    places = torch.arange(model.image_tokens)
    trained = torch.arange(model.image_tokens, 30)
    out = model(ids, torch.arange(30), [30], places, trained, torch.rand(1, 3, 30, 30))
    out["loss_g"].backward()
    assert len(calls) == times * len(llm_blocks)


def test_the_image_mode_of_stage_1_is_kept(flags, tmp_path, world):
    own = f"--out_dir {tmp_path}/one --sea_weight 0 --image_mode pad --max_steps 1".split()
    train.main([*flags, *own])
    cfg = train.parse_config(["--stage", "finetune", "--init", f"{tmp_path}/one", "--image_mode="])
    model, _ = train.build_model(cfg, torch.device("cpu"))
    assert model.preprocess["mode"] == "pad"


def test_stage_2_without_a_stage_1(finetune_flags, flags, tmp_path):
    """The blue line of Figure 3a: a new adapter, and an LLM as it came."""
    rest = finetune_flags[4:]  # without --stage and --init
    given = dict(zip(flags[::2], flags[1::2]))
    parts = ["--llm", given["--llm"], "--vision", given["--vision"]]
    own = ["--stage", "finetune", *parts, "--out_dir", str(tmp_path), "--max_steps", "2"]
    train.main([*rest, *own])
    assert (tmp_path / "model/processor_config.json").exists()


def test_bfloat16_keeps_fp32_masters_and_follows_fp32(flags, tmp_path):
    for name in ("float32", "bfloat16"):
        train.main([*flags, *f"--out_dir {tmp_path}/{name} --dtype {name} --max_steps 12".split()])
    a, b = (metrics(tmp_path / name) for name in ("float32", "bfloat16"))
    assert all(w.dtype == torch.float32 for w in weights(tmp_path / "bfloat16").values())
    assert [m["loss_g"] for m in a] == pytest.approx([m["loss_g"] for m in b], rel=0.02)
    assert [m["loss_a"] for m in a] == pytest.approx([m["loss_a"] for m in b], rel=0.02)
    assert a[0]["loss_g"] != b[0]["loss_g"]


def make_run(argv):
    """A train.Run of one process on the CPU, its validation set and its loader."""
    cfg = train.parse_config(argv)
    cpu = torch.device("cpu")
    model, dtype = train.build_model(cfg, cpu)
    samples = load_samples(cfg.data)
    train_set, val_set = train.build_data(cfg, model, samples, LabelStore(cfg.labels))
    parallel_model = train.parallelize(cfg, model, dtype)
    run = train.Run(cfg, cpu, dtype, model, parallel_model, train.build_optimizer(cfg, model), 6)
    return run, val_set, iter(train.micro_batch_loader(train_set, run, 0))


def exact_alignment_loss(x, t, log_scale):
    """Eq. 11 by loops over the pairs, in float64, and its gradients by x [N, D] and log_scale."""
    x, t, log_scale = (v.detach().double().requires_grad_() for v in (x, t, log_scale))
    loss = 0
    for i in range(len(x)):
        to_words = [torch.cosine_similarity(x[i], word, dim=0) for word in t]
        to_patches = [torch.cosine_similarity(patch, t[i], dim=0) for patch in x]
        for cosines in (to_words, to_patches):
            logits = torch.stack(cosines) * log_scale.exp()
            loss = loss + (logits.logsumexp(0) - logits[i]) / (2 * len(x))
    return loss.detach(), *torch.autograd.grad(loss, (x, log_scale))


def test_the_alignment_loss_has_its_gradients_in_float32(flags, monkeypatch):
    """With bfloat16 compute, in a step of training: autocast must not reach into the loss."""
    seen = {}

    def watched(x, t, log_scale, *rest):
        x.retain_grad()
        seen.update(x=x, t=t.detach(), log_scale=log_scale.detach().clone())
        return contrastive_loss(x, t, log_scale, *rest)

    monkeypatch.setattr("loss.contrastive_loss", watched)
    run, _, loader = make_run([*flags, "--dtype", "bfloat16", "--tau", "0.1", "--out_dir", "none"])

    def keep(*_):
        seen["log_scale_grad"] = run.model.log_scale.grad.clone()

    run.optimizer.register_step_pre_hook(keep)
    line = train.train_step(run, [next(loader)], 1)
    exact, x_grad, log_scale_grad = exact_alignment_loss(
        *(seen[k] for k in ("x", "t", "log_scale"))
    )
    assert len(x_grad) > 1 and seen["x"].dtype == torch.bfloat16
    assert line["loss_a"] == pytest.approx(exact.item(), rel=1e-5)
    torch.testing.assert_close(seen["log_scale_grad"].double(), log_scale_grad, rtol=1e-5, atol=0)
    # x is in bfloat16, and so is its gradient: rounded once, by at most half of 2^-7
    error = (seen["x"].grad.double() - x_grad).norm() / x_grad.norm()
    assert error < 2**-9


def test_validation_takes_its_cosines_in_float32(flags):
    """With bfloat16 compute: TACS (Eq. 14) of the model's own embeddings, in float64."""
    run, val_set, _ = make_run([*flags, "--dtype", "bfloat16", "--out_dir", "none"])
    scores = []
    for item in val_set:
        batch = collate([item])
        del batch["index"]
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            out = run.model(**batch)
        inputs = out["inputs"].double()
        words = inputs[batch["trained"]][:-1]
        best = [
            torch.cosine_similarity(x[None], words).max() for x in inputs[batch["image_places"]]
        ]
        scores.append(sum(sorted(best)[-10:]).item() / 10)
    assert train.validate(run, val_set)["val_tacs"] == pytest.approx(sum(scores) / 4, rel=1e-6)


@pytest.mark.parametrize(
    "extra, message",
    [
        (["--batch_size", "0"], "--batch_size must be from 1 to 1000000000"),
        (["--sea_weight", "-1"], "--sea_weight must be from 0 to 1000000000"),
        (["--gather_pairs", "--sea_weight", "0"], "--gather_pairs is for SEA, not for pretrain"),
        (["--gather_pairs"], "--gather_pairs needs several ranks"),
        (["--out_dir", "{tmp}", "--labels", "{tmp}/none"], "none: no label store"),
        (["--out_dir", "{tmp}", "--data", "{tmp}/none.json"], "none.json: no such data file"),
        (
            ["--out_dir", "{tmp}", "--image_folder", "{tmp}/none"],
            "none/.* cannot read the image .*check --image_folder",
        ),
        (["--out_dir", "{tmp}", "--llm", "{tmp}/none.gguf"], "none.gguf: no such GGUF file"),
        (["--out_dir", "{tmp}", "--vision", "{tmp}"], "cannot be loaded .*model_type"),
    ],
)
def test_bad_flags_and_bad_paths_are_refused_in_one_line(flags, tmp_path, extra, message):
    with pytest.raises(UserError, match=message) as e:
        train.main([*flags, *(x.format(tmp=tmp_path) for x in extra)])
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--init", "x"], "--init is for finetune, not for pretrain"),
        (["--tune_vision"], "--tune_vision is for finetune"),
        (["--image_mode", "pad"], "--image_mode pad has no labels"),
        (["--fsdp"], "--fsdp needs torchrun"),
        (["--stage", "finetune"], "--stage finetune needs --init"),
        (
            ["--stage", "finetune", "--sea_weight", "1"],
            "--sea_weight is for pretrain, not for finetune",
        ),
        (["--keep", "-1"], "--keep must be from 0 to 1000000000"),
        (["--save_every", "-1"], "--save_every must be from 0 to 1000000000"),
    ],
)
def test_flags_of_the_other_stage_are_refused(flags, message):
    with pytest.raises(UserError, match=message):
        train.parse_config(flags)


# LLaVA-1.5's table and Cambrian's data, by hand; at 8 GPUs the global batches are 256 and 128
@pytest.mark.parametrize(
    "flags, expected",
    [
        (
            ["--stage", "pretrain"],
            dict(
                llm="vicuna-7b",
                vision="clip-l-336",
                data="data/blip_laion_cc_sbu_558k.json",
                lr=1e-3,
                batch_size=32,
                sea_weight=1.0,
                image_mode="",
                tune_vision=False,
            ),
        ),
        (
            ["--stage", "finetune", "--init", "out/pretrain"],
            dict(
                data="data/llava_v1_5_mix665k.json",
                lr=2e-5,
                batch_size=16,
                sea_weight=0.0,
                image_mode="pad",
                tune_vision=False,
            ),
        ),
        (
            ["--stage", "finetune", "--init", "x", "--tune_vision"],
            dict(tune_vision=True, vision_lr=2e-6, lr=2e-5),
        ),
        (
            ["--preset", "prime"],
            dict(vision="siglip-384", data="data/alignment_2.5m.jsonl", lr=1e-3, sea_weight=1.0),
        ),
        (
            ["--preset", "prime", "--stage", "finetune", "--init", "x"],
            dict(
                vision="",  # the stage 1 knows its tower
                data="data/Cambrian7M_withsystemprompt.jsonl",
                tune_vision=True,
                vision_lr=2e-6,
                image_mode="pad",
            ),
        ),
        (
            ["--preset", "toy", "--stage", "finetune", "--lr", "0.1", "--llm", "toy/llm"],
            dict(init="", vision="toy/vision", lr=0.1, sea_weight=0.0),
        ),
    ],
)
def test_recipes(flags, expected):
    cfg = train.parse_config(flags)
    common = dict(warmup_ratio=0.03, max_length=256 if cfg.preset == "toy" else 2048)
    for name, value in (common | expected).items():
        assert getattr(cfg, name) == value, name


def test_an_unknown_flag_is_refused(flags, capsys):
    with pytest.raises(SystemExit):
        train.main([*flags, "--learning_rate", "1"])
    assert "unrecognized arguments: --learning_rate" in capsys.readouterr().err


def test_labels_of_other_samples_are_refused_by_field(flags, world, tmp_path):
    fewer = json.loads((world / "train.json").read_text())[:-1]
    (tmp_path / "fewer.json").write_text(json.dumps(fewer))
    own = f"--out_dir {tmp_path}/run --data {tmp_path}/fewer.json".split()
    with pytest.raises(UserError, match="made with images = .*run labels.py extract"):
        train.main([*flags, *own])


@pytest.mark.parametrize(
    "extra, message",
    [
        ("--lr nan", "--lr must be from 1e-15 to 1, not nan"),
        ("--lr 1e6", "--lr must be from 1e-15 to 1, not 1000000.0"),
        ("--tau inf", "--tau must be from 0.01 to 100, not inf"),
        ("--sea_weight nan", "--sea_weight must be from 0 to .*, not nan"),
        ("--warmup_ratio 7", "--warmup_ratio must be from 0 to 1, not 7.0"),
    ],
)
def test_numbers_out_of_range_are_refused(flags, extra, message):
    with pytest.raises(UserError, match=message):
        train.parse_config([*flags, *extra.split()])


def test_a_max_length_that_leaves_nothing_to_train_is_refused(finetune_flags, tmp_path):
    with pytest.raises(
        UserError, match="step 1: .*raise --max_length if it cuts off all that is trained"
    ):
        train.main([*finetune_flags, "--out_dir", str(tmp_path), "--max_length", "27"])


def test_a_gradient_that_is_not_finite_stops_the_run_before_the_step(flags, tmp_path, monkeypatch):
    """The loss is finite: only a check of the gradient keeps NaN out of weights and checkpoints."""
    step = train.train_step
    models = []

    def poisoned(run, batches, number):
        if number == 5:
            models.append(run.model)
            run.model.adapter.linear_1.weight.register_hook(lambda grad: grad * float("nan"))
        return step(run, batches, number)

    monkeypatch.setattr(train, "train_step", poisoned)
    with pytest.raises(
        UserError, match=r"step 5: .* is not finite: .* samples \[\[\d+, \d+, \d+, \d+\]\]"
    ):
        train.main([*flags, "--out_dir", str(tmp_path), "--save_every", "2", "--keep", "1"])
    assert models[0].adapter.linear_1.weight.isfinite().all()
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == ["step_4"]
    assert all(m["grad_norm"] > 0 for m in metrics(tmp_path))


def test_a_broken_validation_image_ends_a_run_before_it_begins(flags, tmp_path, world):
    samples = json.loads((world / "train.json").read_text())[:4]
    samples[2]["image"] = "none.png"
    (tmp_path / "val.json").write_text(json.dumps(samples))
    own = [*flags, *f"--out_dir {tmp_path}/run --val_data {tmp_path}/val.json".split()]
    with pytest.raises(UserError, match="none.png: cannot read the image"):
        train.main(own)
    assert not (tmp_path / "run/config.json").exists()
    train.main([*own, "--val_samples", "2"])


def test_a_validation_image_that_goes_away_loses_no_step(flags, tmp_path, world):
    """The last step has its checkpoint before its validation."""
    flags = [*flags, "--image_folder", f"{tmp_path}/images", "--save_every", "4", "--val_every"]
    shutil.copytree(world / "images", tmp_path / "images")
    own = [*flags, "100", "--out_dir", f"{tmp_path}/run"]

    def step_and_lose(*args):
        if args[2] == 6:
            (tmp_path / "images/0.png").unlink()
        return step(*args)

    step, train.train_step = train.train_step, step_and_lose
    try:
        with pytest.raises(UserError, match="0.png: cannot read the image"):
            train.main(own)
    finally:
        train.train_step = step
    assert sorted(os.listdir(tmp_path / "run/checkpoints")) == ["step_4", "step_6"]
    shutil.copy(world / "images/0.png", tmp_path / "images")
    train.main([*own, "--resume"])
    train.main([*own[:-1], f"{tmp_path}/whole"])
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert (tmp_path / "run/model").is_dir()


def heed_ctrl_c():
    """A shell has its background processes ignore it, and theirs."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(argv):
    """A training run as a process group of its own."""
    return subprocess.Popen(
        [sys.executable, ROOT / "train.py", *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=heed_ctrl_c,
    )


def wait_for_lines(process, log, lines):
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= lines):
        time.sleep(0.01)


def test_ctrl_c_ends_a_run_with_one_line(flags, tmp_path):
    """As a terminal sends it: to the processes that load data too."""
    own = f"--out_dir {tmp_path}/run --workers 2 --save_every 2 --max_steps 10000".split()
    run = start([*flags, *own])
    wait_for_lines(run, tmp_path / "run/metrics.jsonl", 5)
    os.killpg(run.pid, signal.SIGINT)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 1 and "Traceback" not in errors, errors[-3000:]
    assert errors.splitlines()[-1] == "stopped"
    assert (tmp_path / "run/checkpoints/step_2").is_dir()


def test_of_two_processes_one_gets_the_folder(flags, tmp_path):
    """Whether the second resumes or not, until the first has ended, here by SIGKILL."""
    own = [*flags, "--out_dir", f"{tmp_path}/run", "--save_every", "2"]
    first = start([*own, "--workers", "1", "--max_steps", "10000"])
    wait_for_lines(first, tmp_path / "run/metrics.jsonl", 3)
    for more in ([], ["--resume", "--max_steps", "10000"]):
        with pytest.raises(UserError, match="run: another process trains here"):
            train.main([*own, *more])
    assert first.poll() is None
    # The process that loads data lives on for some seconds.
    first.kill()
    first.wait()
    with pytest.raises(UserError, match="run holds a run"):
        train.main(own)
    steps = max(checkpoints(tmp_path / "run")) + 2
    config = json.loads((tmp_path / "run/config.json").read_text())
    (tmp_path / "run/config.json").write_text(json.dumps(config | {"max_steps": steps}))
    train.main(["--resume", "--out_dir", f"{tmp_path}/run"])
    assert metrics(tmp_path / "run")[-1]["step"] >= steps and (tmp_path / "run/model").is_dir()


def test_a_filesystem_without_locks_does_not_hinder_a_run(flags, tmp_path, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(train.fcntl, "lockf", no_locks)
    train.main([*flags, "--out_dir", f"{tmp_path}/run", "--max_steps", "1"])
    assert "run: its filesystem has no locks ([Errno" in capsys.readouterr().out


@pytest.mark.parametrize("killed_in", ["save_checkpoint", "validate"])
def test_no_line_is_lost_to_a_kill(flags, tmp_path, monkeypatch, killed_in):
    """Whether it comes as a checkpoint has just been written, or in the validation after it."""
    flags = [*flags, "--save_every", "3", "--out_dir"]  # and --val_every 3
    train.main([*flags, str(tmp_path / "whole")])
    function = getattr(train, killed_in)

    def killed(run, argument):
        if killed_in == "save_checkpoint":
            function(run, argument)
        raise KeyboardInterrupt

    monkeypatch.setattr(train, killed_in, killed)
    with pytest.raises(KeyboardInterrupt):
        train.main([*flags, str(tmp_path / "run")])
    monkeypatch.setattr(train, killed_in, function)
    train.main([*flags, str(tmp_path / "run"), "--resume"])
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert "val_loss" in metrics(tmp_path / "run")[2]


def test_files_may_move_but_must_be_the_same(flags, tmp_path, world, labels):
    given = dict(zip(flags[::2], flags[1::2]))
    shutil.copy(given["--data"], tmp_path / "data.json")
    shutil.copytree(given["--labels"], tmp_path / "labels")
    run = [*flags, "--out_dir", str(tmp_path / "run"), "--save_every", "2", "--resume"]
    moved = ["--data", f"{tmp_path}/data.json", "--labels", f"{tmp_path}/labels"]
    train.main(run)
    train.main([*run, *moved])
    before = (tmp_path / "run/metrics.jsonl").read_bytes()

    samples = json.loads((tmp_path / "data.json").read_text())
    for content, message in (
        (samples[1:], "data.json has 23 samples, but when the run in .*/run began it had 24: put "),
        (samples[::-1], "data.json lists other images than when the run in .*/run began, or in an"),
    ):
        (tmp_path / "data.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=f"{message}.* start again with another --out_dir"):
            train.main([*run, *moved])
    (tmp_path / "data.json").write_text(json.dumps(samples))
    meta = json.loads((tmp_path / "labels/meta.json").read_text())
    (tmp_path / "labels/meta.json").write_text(json.dumps(meta | {"prompt": "a {}"}))
    message = "labels in .*labels were made with prompt = a {}, but .* had prompt = a photo of a {}"
    with pytest.raises(UserError, match=f"{message}.: put the old labels back, or start again"):
        train.main([*run, *moved])
    assert before == (tmp_path / "run/metrics.jsonl").read_bytes()


def test_samples_without_an_image_are_compared_too(finetune_flags, tmp_path, world):
    lines = (world / "chats.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "chats.jsonl").write_text("".join(lines))
    run = f"--out_dir {tmp_path}/run --data {tmp_path}/chats.jsonl --save_every 2 --resume".split()
    train.main([*finetune_flags, *run])
    (tmp_path / "chats.jsonl").write_text("".join(lines[-1:] + lines[:-1]))
    with pytest.raises(UserError, match="chats.jsonl lists other images"):
        train.main([*finetune_flags, *run])


def test_resuming_needs_no_flag_but_the_folder(finetune_flags, tmp_path):
    """What is not given is as the run began; what may change may be given."""
    resume = ["--resume", "--out_dir", str(tmp_path)]
    train.main([*finetune_flags, *resume, "--save_every", "4"])
    whole = metrics(tmp_path)
    for more in ([], ["--keep", "1", "--workers", "1"]):
        for later in ("checkpoints/step_6", "model"):
            shutil.rmtree(tmp_path / later)
        train.main([*resume, *more])
        assert metrics(tmp_path) == whole
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step_6"]
    with pytest.raises(UserError, match="--stage is 'pretrain', but 'finetune' in the run that"):
        train.parse_config([*resume, "--stage", "pretrain"])
    with pytest.raises(UserError, match="--val_every must be from 1"):
        train.parse_config([*resume, "--val_every", "0"])


def test_a_run_goes_on_in_its_precision(flags, tmp_path):
    """Whatever the device's own is; a CPU's is float32."""
    flags = [*flags, "--save_every", "4", "--out_dir"]
    train.main([*flags, str(tmp_path / "own")])
    assert json.loads((tmp_path / "own/config.json").read_text())["dtype"] == "float32"
    train.main([*flags, str(tmp_path / "run"), "--dtype", "bfloat16"])
    whole = metrics(tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step_6")
    train.main([*flags, str(tmp_path / "run"), "--resume"])
    assert metrics(tmp_path / "run") == whole != metrics(tmp_path / "own")
    with pytest.raises(UserError, match="--dtype is 'float32', but 'bfloat16' in the run that"):
        train.main([*flags, str(tmp_path / "run"), "--resume", "--dtype", "float32"])


@pytest.mark.parametrize(
    "ranks, accum, message",
    [
        (2, 2, ""),
        (4, 1, ""),
        (1, 4, ""),
        (1, 2, "--grad_accum 2 on 1 ranks makes .* steps of 16: use --grad_accum 4"),
        (4, 2, "--grad_accum 2 on 4 ranks makes .* steps of 16: use --grad_accum 1"),
        (3, 2, "--grad_accum 2 on 3 ranks makes .* steps of 16: .* number of ranks that divides 4"),
    ],
)
@pytest.mark.parametrize("gather", [False, True])
def test_resuming_on_other_ranks_keeps_the_steps(
    flags, tmp_path, monkeypatch, ranks, accum, message, gather
):
    """Begun with 2 ranks x 2 micro-batches x 4 samples. Gathered, N of Eq. 11 is of two ranks."""
    own = [*flags, "--out_dir", str(tmp_path), "--grad_accum", "2"]
    train.main(own)
    file = tmp_path / "config.json"
    begun = json.loads(file.read_text()) | {"ranks": 2, "gather_pairs": gather}
    file.write_text(json.dumps(begun))
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    if gather and ranks != 2:
        message = f"--gather_pairs .* --resume this run on 2, as it began, not on {ranks}"
    resume = ["--resume", "--out_dir", str(tmp_path), "--grad_accum", str(accum)]
    if not message:
        assert train.parse_config(resume).global_batch() == 16
        return
    with pytest.raises(UserError, match=message):
        train.parse_config(resume)


def test_a_line_that_a_kill_has_cut_off_is_dropped(flags, tmp_path, capsys):
    flags = [*flags, "--save_every", "4", "--out_dir"]
    train.main([*flags, str(tmp_path)])
    whole = metrics(tmp_path)
    log = tmp_path / "metrics.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:6]) + '{"step": 6, "los')  # 5 steps and a validation
    shutil.rmtree(tmp_path / "checkpoints/step_6")
    train.main([*flags, str(tmp_path), "--resume"])
    assert metrics(tmp_path) == whole
    shown = capsys.readouterr().out
    assert """metrics.jsonl: the last line is not finished and is dropped: b'{"step": 6,""" in shown


def test_model_appears_whole_or_not_at_all(flags, tmp_path, monkeypatch):
    """An end while it is written, here of stage 1 with --export, which writes the adapter first."""

    def killed(*_):
        assert list(tmp_path.rglob("adapter.safetensors"))
        raise KeyboardInterrupt

    own = [*flags, "--out_dir", str(tmp_path), "--export", "--resume"]
    with monkeypatch.context() as patch:
        patch.setattr(train, "save_llava", killed)
        with pytest.raises(KeyboardInterrupt):
            train.main(own)
    assert not (tmp_path / "model").exists()
    train.main(own)
    assert (tmp_path / "model/processor_config.json").exists()
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"stage": 1}', "\udcff"])
def test_a_damaged_config_is_named(flags, tmp_path, content):
    out = ["--out_dir", str(tmp_path)]
    train.main([*flags, *out])
    (tmp_path / "config.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match="config.json.*: .* damaged|config.json.*: not valid JSON"):
        train.main([*flags, *out, "--resume"])


def test_checkpoints_hold_no_pickles_and_are_for_all_to_read(finetune_flags, tmp_path):
    train.main([*finetune_flags, "--out_dir", str(tmp_path), "--save_every", "3"])
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert [f.name for f in files if not f.suffix] == ["lock"]
    suffixes = {"", ".json", ".jsonl", ".jinja", ".safetensors", ".md"}
    assert {f.suffix for f in files} == suffixes
    assert all(file.stat().st_mode & 0o777 == 0o644 for file in files)


def test_resuming_where_nothing_was_saved_starts_the_run(flags, tmp_path):
    """The same command line can be started again for ever."""
    for _ in range(2):
        train.main([*flags, "--out_dir", str(tmp_path / "run"), "--resume"])
    assert [m["step"] for m in metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_stage_2_of_a_stage_1_that_has_not_finished_names_the_checkpoint(flags, tmp_path):
    own = f"--out_dir {tmp_path}/one --save_every 3".split()
    train.main([*flags, *own])
    (tmp_path / "one/model").rename(tmp_path / "gone")
    stage = ["--stage", "finetune", "--init"]
    with pytest.raises(UserError, match="one has not finished: name one of its checkpoints"):
        train.parse_config([*stage, f"{tmp_path}/one"])
    train.parse_config([*stage, f"{tmp_path}/one/checkpoints/step_3"])


def test_a_run_is_never_written_over_and_resuming_checks_the_settings(flags, tmp_path):
    out = ["--out_dir", str(tmp_path), "--save_every", "3"]
    train.main([*flags, *out])
    with pytest.raises(UserError, match="holds a run"):
        train.main([*flags, *out])
    with pytest.raises(UserError, match="--lr is 0.5, but 0.001 in the run .* leave --lr out"):
        train.main([*flags, *out, "--resume", "--lr", "0.5"])
    [shard] = (tmp_path / "checkpoints/step_6/state").iterdir()
    content = shard.read_bytes()
    for kept in (len(content) - 200, 50, 0):
        shard.write_bytes(content[:kept])
        with pytest.raises(UserError, match="step_6: truncated or damaged .*; remove it"):
            train.main([*flags, *out, "--resume"])
    shard.unlink()
    with pytest.raises(UserError, match="step_6: truncated or damaged .*; remove it"):
        train.main([*flags, *out, "--resume"])


def test_a_micro_batch_with_a_single_pair_is_refused(flags, tmp_path):
    """Its loss_a is 0 in every step. Two images have two pairs at most."""
    own = f"--out_dir {tmp_path}/one --batch_size 1 --window 5 --save_every 2".split()
    with pytest.raises(UserError, match="has 1 pairs on average, and nothing to tell apart: use a"):
        train.main([*flags, *own])
    assert not (tmp_path / "one/checkpoints").exists()
    two = f"--out_dir {tmp_path}/two --batch_size 2 --window 5 --max_steps 1".split()
    train.main([*flags, *two])
    assert metrics(tmp_path / "two")[0]["pairs"] <= 2


def test_a_rate_of_a_frozen_tower_is_refused():
    with pytest.raises(UserError, match="--vision_lr is for --tune_vision"):
        train.parse_config(["--stage", "finetune", "--init", "x", "--vision_lr", "1e-5"])


def test_a_run_that_has_moved_goes_on_where_it_is(flags, tmp_path):
    train.main([*flags, "--out_dir", str(tmp_path / "before"), "--save_every", "3"])
    (tmp_path / "before").rename(tmp_path / "after")
    cfg = train.parse_config(["--resume", "--out_dir", str(tmp_path / "after")])
    assert cfg.out_dir == str(tmp_path / "after") and cfg.batch_size == 4


def test_the_norm_of_the_gradient_is_logged(finetune_flags, tmp_path, monkeypatch):
    norms, build = [], train.build_optimizer

    def watching(cfg, model):
        optimizer = build(cfg, model)
        grads = [p for p in model.parameters() if p.requires_grad]
        optimizer.register_step_pre_hook(
            lambda *_: norms.append(float(sum((p.grad**2).sum() for p in grads)) ** 0.5)
        )
        return optimizer

    monkeypatch.setattr(train, "build_optimizer", watching)
    train.main([*finetune_flags, "--out_dir", str(tmp_path), "--max_steps", "2"])
    assert [m["grad_norm"] for m in metrics(tmp_path)] == pytest.approx(norms, rel=1e-5)
    assert min(norms) > 0.02 and len(norms) == 2


def test_only_the_newest_checkpoints_are_kept(finetune_flags, tmp_path):
    (tmp_path / "checkpoints/step_2_best1").mkdir(parents=True)  # a copy that somebody made
    train.main([*finetune_flags, "--out_dir", str(tmp_path), "--save_every", "2", "--keep", "1"])
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["step_2_best1", "step_6"]


def test_stage_2_learns_what_stage_1_cannot(finetune_flags, tmp_path, world):
    """The answers are always "the", a word: the loss goes to nearly nothing.

    The LLM is what changes.
    """
    own = f"--out_dir {tmp_path} --max_steps 60 --val_every 60 --lr 0.01".split()
    train.main([*finetune_flags, *own])
    lines = metrics(tmp_path)
    losses = [m["loss_g"] for m in lines]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert "val_tacs" not in lines[-1] and lines[-1]["val_loss"] < losses[0]


def test_stage_2_starts_from_the_adapter_of_stage_1(finetune_flags, tmp_path):
    """With a rate of (almost) nothing the exported projector is the adapter that --init names."""
    train.main([*finetune_flags, "--out_dir", str(tmp_path), "--lr", "1e-12", "--max_steps", "1"])
    before = load_file(Path(finetune_flags[3]) / "model/adapter.safetensors")
    after = load_file(tmp_path / "model/model.safetensors")
    for name in ("linear_1.weight", "linear_2.bias"):
        exported = after[f"multi_modal_projector.{name}"]
        assert torch.allclose(before[f"adapter.{name}"], exported, atol=1e-8)


def test_a_missing_stage_1_is_named(finetune_flags, tmp_path):
    (tmp_path / "empty").mkdir()
    for init, message in (
        ("empty", "no adapter.safetensors and no Llava model"),
        ("none", "no adapter.safetensors"),
    ):
        own = f"--init {tmp_path}/{init} --out_dir {tmp_path}/run".split()
        with pytest.raises(UserError, match=message):
            train.main([*finetune_flags, *own])


def test_a_command_line_error_is_one_line(flags, tmp_path):
    """Through the interpreter: from a DataLoader worker too, no traceback reaches the user."""
    images = tmp_path / "images"
    images.mkdir()
    own = f"--out_dir {tmp_path}/run --workers 1 --image_folder {images}".split()
    run = subprocess.run(
        [sys.executable, ROOT / "train.py", *flags, *own], capture_output=True, text=True
    )
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert run.stderr.splitlines()[-1].startswith("error: ")
    assert ".png: cannot read the image" in run.stderr


@pytest.mark.parametrize(
    "flags, folder",
    [
        ([], "out/pretrain"),
        (["--sea_weight", "0"], "out/pretrain_baseline"),
        (["--llm", "gemma-2b", "--vision", "my/tower"], "out/pretrain_gemma-2b_tower"),
        (["--preset", "prime", "--llm", "llama-3-8b"], "out/prime_llama-3-8b"),
        (["--preset", "toy", "--sea_weight", "0"], "out/toy_baseline"),
        (
            ["--stage", "finetune", "--init", "out/pretrain_baseline/"],
            "out/pretrain_baseline_finetune",
        ),
        (["--stage", "finetune", "--init", "out/a/model"], "out/a_finetune"),
        (["--stage", "finetune", "--init", "out/a/checkpoints/step_3"], "out/a_step_3_finetune"),
        (["--stage", "finetune", "--llm", "gemma-2b"], "out/finetune_gemma-2b"),
        (["--out_dir", "mine"], "mine"),
    ],
)
def test_a_run_is_named_after_what_it_is(flags, folder):
    assert train.parse_config(flags).out_dir == folder


@pytest.mark.parametrize("kilobytes", [3, 10])  # too small for the adapter; for the moments
def test_a_disk_that_fills_up(flags, tmp_path, kilobytes):
    """One line, whichever file does not fit; the run goes on from the last whole checkpoint."""
    own = [*flags, "--out_dir", str(tmp_path), "--save_every", "2", "--max_steps", "6"]
    train.main(own)
    for later in ("model", "checkpoints/step_4", "checkpoints/step_6"):
        shutil.rmtree(tmp_path / later)
    log = tmp_path / "metrics.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:2]))
    # the largest file that may be written
    limit = f"import resource as r; r.setrlimit(r.RLIMIT_FSIZE, ({kilobytes * 1000},) * 2);"
    code = f"import sys; {limit} import train; train.cli(lambda: train.main(sys.argv[1:]))"
    root = Path(__file__).parent.parent
    run = subprocess.run(
        [sys.executable, "-c", code, *own, "--resume"], cwd=root, capture_output=True, text=True
    )
    assert run.returncode == 1 and "Traceback" not in run.stderr, run.stderr
    [line] = re.findall("error: .*", run.stderr)
    assert "File too large" in line
    assert [m["step"] for m in metrics(tmp_path)] == [1, 2, 3, 4]
    train.main([*own, "--resume"])
    assert [m["step"] for m in metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]
