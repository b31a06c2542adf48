"""tools/ablate.py: what variants put in the place of parts of SEA, and the runs end to end."""

import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch

import loss
import train
from data import UserError, load_samples
from eval import find_run, open_captions
from labels import LabelStore
from model import new_model
from tools import ablate
from tools.toy import ensure, two_workers

# ---------------------------------------------------------------------------------------- variants


@pytest.fixture
def batch():
    """Two images of 2 x 2 patches with three labels each, and the loss of a variant on them."""
    g = torch.Generator().manual_seed(0)
    ids = torch.tensor([[4, 1, 3], [1, 0, -1], [-1, -1, -1], [4, 2, 0]]).expand(2, -1, -1)
    scores = torch.tensor([0.6, 0.3, 0.1]).expand(2, 4, -1)
    x = torch.randn(2, 4, 6, generator=g, dtype=torch.float64).requires_grad_()
    table = torch.randn(5, 6, generator=g, dtype=torch.float64)
    log_scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    seen = []

    def words(labels):
        seen.append(labels.tolist())
        return table[labels]

    def run(name, ids=ids, seed=1):
        g = torch.Generator().manual_seed(seed)
        with ablate.changed(ablate.VARIANTS[name]):
            value, log = loss.sea_loss(
                x, ids, scores[..., : ids.shape[-1]], words, log_scale, (2, 2), 1, g
            )
        return value, log, seen[-1]

    run.x, run.table, run.log_scale, run.ids = x, table, log_scale, ids
    return run


def test_repeated_labels_keep_every_labelled_patch(batch):
    one = batch.ids[..., :1]  # nothing is left to chance
    value, log, labels = batch("repeated_labels", one)
    assert labels == [4, 1, 4, 4, 1, 4] and log["pairs"] == 6
    assert batch("SEA", one)[1]["pairs"] == 2
    rows = batch.x[:, [0, 1, 3]].flatten(0, 1)
    cos = torch.cosine_similarity(rows[:, None], batch.table[labels][None], dim=-1)
    logits = cos * batch.log_scale.exp()
    exact = -(logits.log_softmax(1).diagonal() + logits.log_softmax(0).diagonal()).mean() / 2
    torch.testing.assert_close(value, exact)


@pytest.mark.parametrize("name, dim", [("patches_find_words", 1), ("words_find_patches", 0)])
def test_one_direction_of_equation_11(name, dim):
    g = torch.Generator().manual_seed(0)
    x, t = (torch.randn(5, 6, generator=g, dtype=torch.float64).requires_grad_() for _ in "xt")
    log_scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    with ablate.changed(ablate.VARIANTS[name]):
        value = loss.contrastive_loss(x, t, log_scale)
    cos = torch.cosine_similarity(x[:, None], t[None], dim=-1) * log_scale.exp()
    exact = -cos.log_softmax(dim).diagonal().mean()
    torch.testing.assert_close(value, exact)
    inputs = (x, t, log_scale)
    for ours, theirs in zip(torch.autograd.grad(value, inputs), torch.autograd.grad(exact, inputs)):
        torch.testing.assert_close(ours, theirs)
    assert abs(value + cos.log_softmax(1 - dim).diagonal().mean()) > 0.01


def test_a_fixed_temperature_has_a_gradient_of_zero(batch):
    value, _, _ = batch("fixed_tau")
    torch.testing.assert_close(value, batch("SEA")[0])
    grads = torch.autograd.grad(value, (batch.x, batch.log_scale))
    assert grads[0].abs().sum() > 0 and grads[1] == 0


def test_labels_drawn_uniformly():
    ids = torch.arange(3).expand(20_000, -1)
    scores = torch.tensor([0.75, 0.25, 0.0]).expand(20_000, -1)
    drawn = ablate.sample_uniformly(ids, scores, torch.Generator().manual_seed(0))
    counts = drawn.bincount(minlength=3).tolist()
    assert counts[2] == 0 and abs(counts[0] - 10_000) < 5 * 70.7  # five standard deviations


def test_the_three_best_labels():
    ids = torch.arange(5).expand(20_000, -1)
    scores = torch.tensor([0.5, 0.3, 0.2, 0.1, 0.1]).expand(20_000, -1)
    drawn = ablate.three_best_labels(ids, scores, torch.Generator().manual_seed(0))
    counts = drawn.bincount(minlength=5).tolist()
    assert counts[3:] == [0, 0] and abs(counts[0] - 10_000) < 5 * 70.7  # five standard deviations


def image_labels(images=4, patches=6, n=2, seed=0):
    """Labels of which each says its image and patch: 100 i + 10 p + rank."""
    i = torch.arange(images)[:, None, None]
    p = torch.arange(patches)[None, :, None]
    ids = 100 * i + 10 * p + torch.arange(n)
    return ids, torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)) + 0.1


def test_labels_of_another_patch_stay_in_their_image():
    ids, scores = image_labels()
    drawn = ablate.of_another_patch(ids, scores, torch.Generator().manual_seed(0))
    assert torch.equal(drawn // 100, torch.arange(4)[:, None].expand(4, 6))
    patches = drawn % 100 // 10
    assert torch.equal(patches.sort(1).values, torch.arange(6).expand(4, 6))
    assert len(patches.unique(dim=0)) > 2


def test_labels_of_another_image_keep_their_patch():
    ids, scores = image_labels()
    drawn = ablate.of_another_image(ids, scores, torch.Generator().manual_seed(0))
    assert (drawn // 100 != torch.arange(4)[:, None]).all()
    assert torch.equal(drawn % 100 // 10, torch.arange(6).expand(4, 6))


def test_random_words_are_as_frequent_as_before():
    ids, scores = image_labels(n=1)
    drawn = ablate.random_words(ids, scores, torch.Generator().manual_seed(0))
    assert torch.equal(drawn.flatten().sort().values, ids.flatten().sort().values)
    assert (drawn // 100 != torch.arange(4)[:, None]).any(1).all()
    assert (drawn % 100 // 10 != torch.arange(6)).any(0).all()


def test_labels_go_with_their_scores():
    """A label whose score is 0 is never drawn, wherever it has been moved."""
    ids, scores = image_labels(images=30)
    scores[ids % 2 == 1] = 0
    for function in (ablate.of_another_patch, ablate.of_another_image, ablate.random_words):
        assert (function(ids, scores, torch.Generator().manual_seed(1)) % 2 == 0).all()


def test_words_that_are_left_out_are_never_labels():
    ids = torch.arange(30).view(1, 15, 2)
    drawn = ablate.without_every_third_word(ids, torch.ones(1, 15, 2))
    left_out = {i for i, word in enumerate(ablate.WORDS) if word in ablate.WORDS[::3]}
    assert not left_out & set(drawn.flatten().tolist())
    both = ids.expand(1000, -1, -1).flatten(0, 1)
    drawn = ablate.without_every_third_word(both, torch.ones(both.shape))
    assert set(drawn.tolist()) == set(range(30)) - left_out


def test_exchanged_words_are_the_same_words(world):
    model = new_model(world / "vision", world / "llm")
    words = ["red", "blue", "green", "dark", "door"]
    with ablate.changed(ablate.VARIANTS["words_exchanged"]):
        model.set_words(words)
        once = model.word_token_ids
        model.set_words(words)
        assert model.word_token_ids == once
    model.set_words(words)
    assert model.word_token_ids != once and sorted(model.word_token_ids) == sorted(once)


def test_true_labels_are_the_truth(small, tmp_path, monkeypatch):
    shutil.copytree(small, tmp_path / "toy")
    monkeypatch.chdir(tmp_path)
    ensure()
    ablate.write_true_labels(Path("toy/labels_truth"))
    store = LabelStore("toy/labels_truth")
    truth = json.loads(Path("toy/truth.json").read_text())
    samples = load_samples("toy/train.json")
    assert len(store) == len(samples)
    for i, sample in enumerate(samples):
        expected = truth[sample["image"]]
        words_of = expected["object"] | expected["background"]
        ids, scores = store[i]
        for place, patch in enumerate(ids):
            words = [store.words[j] for j in patch if j >= 0]
            assert words == words_of.get(str(place), [])
        assert ((scores > 0) == (ids >= 0)).all()


def test_the_truth_by_words_that_are_labels(small, tmp_path, monkeypatch):
    monkeypatch.chdir(small.parent)
    parts = ablate.truth_in_parts()
    truth = json.loads((small / "truth.json").read_text())
    left_out = set(ablate.WORDS[::3])
    for image, kinds in truth.items():
        words_of = kinds["object"] | kinds["background"]
        third = parts[image]["every third word"]
        other = parts[image]["other words"]
        for place, words in words_of.items():
            assert set(third.get(place, [])) == set(words) & left_out
            assert set(other.get(place, [])) == set(words) - left_out
        assert parts[image]["object"] == kinds["object"]


def test_what_always_the_same_answer_scores(small, monkeypatch):
    """Half of the questions are true: .5 of the answers, an F1 of 2/3 or 0."""
    monkeypatch.chdir(small.parent)
    yes, no = ablate.always().values()
    assert yes[0]["pope accuracy"][0] == no[0]["pope accuracy"][0] == 0.5
    assert yes[0]["pope f1"][0] == pytest.approx(2 / 3) and no[0]["pope f1"][0] == 0
    assert yes[0]["pope toy_pope_color accuracy"][0] == 0.5


def test_a_function_is_changed_in_stage_1_alone(program, tmp_path, monkeypatch):
    """What is measured is measured by the method's own functions."""
    seen = []
    monkeypatch.setattr(ablate, "do_command", lambda command: seen.append(loss.sample_labels))
    own = loss.sample_labels
    lines = "train --preset toy\neval tacs\ntrain --preset toy --stage finetune"
    ablate.do_run("another_image", tmp_path / "run", lines)
    assert seen == [ablate.of_another_image, own, own]


def test_without_a_stage_1_nothing_of_it_is_run():
    lines = ablate.script_of("no_stage_1", 0, Path("r")).splitlines()
    assert "--llm toy/llm --vision toy/vision" in lines[0] and "--init" not in lines[0]
    assert not any("/pretrain" in line for line in lines)
    assert len(lines) < len(ablate.script_of("SEA", 0, Path("r")).splitlines())


def test_a_variant_trains_by_its_name(flags, tmp_path, monkeypatch):
    out = ["--out_dir", str(tmp_path / "run"), "--max_steps", "2"]
    ablate.main(["fixed_tau", *flags, *out])
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert {line["tau"] for line in lines if "tau" in line} == {1.0}
    with pytest.raises(UserError, match="nothing: no variant; there are baseline, SEA"):
        ablate.main(["nothing"])


# ------------------------------------------------------------------------------------------- report


@pytest.fixture
def program(tmp_path, monkeypatch):
    """A program for scripts: it notes each call in a file, and fails where it is told to."""
    (tmp_path / "noting.py").write_text(
        "import os, pathlib, sys, torch\n"
        "def main(argv):\n"
        "    print('said', argv[0])\n"
        "    with open(pathlib.Path(__file__).with_name('calls.txt'), 'a') as f:\n"
        "        print(os.getpid(), torch.get_num_threads(), *argv, file=f)\n"
        "    if argv[0] == 'flag':\n"
        "        print('usage: noting', file=sys.stderr)\n"
        "        sys.exit(2)\n"
        "    if argv[0] == 'break':\n"
        "        raise ValueError('what broke')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "noting", raising=False)
    return lambda: (tmp_path / "calls.txt").read_text().splitlines()


def test_scripts_run_once_in_processes_that_are_kept(program, tmp_path, capfd):
    scripts = {tmp_path / f"run {i}": f"noting {i}\nnoting '{i} b' c" for i in range(5)}
    with two_workers() as pool:
        list(pool.map(ablate.do_run, ["SEA"] * 5, scripts, scripts.values()))
    calls = [line.split(" ", 2) for line in program()]
    assert sorted(words for *_, words in calls) == sorted(
        words for i in range(5) for words in (f"{i}", f"{i} b c")
    )
    assert {threads for _, threads, _ in calls} == {"1"}
    assert len({pid for pid, *_ in calls} - {str(os.getpid())}) in (1, 2)
    assert (tmp_path / "run 0/log.txt").read_text() == "said 0\nsaid 0 b\n"
    assert "said" not in "".join(capfd.readouterr())

    (tmp_path / "run 3/done").unlink()
    (tmp_path / "run 3/left").touch()
    for run, script in scripts.items():
        ablate.do_run("SEA", run, script)
    assert [line.split(" ", 2)[2] for line in program()[10:]] == ["3", "3 b c"]
    assert not (tmp_path / "run 3/left").exists() and (tmp_path / "run 3/done").exists()


@pytest.mark.parametrize("argument, said", [("break", "what broke"), ("flag", "usage: noting")])
def test_a_command_that_fails_shows_its_log(program, tmp_path, argument, said):
    run = tmp_path / "run"
    with pytest.raises(UserError) as error:
        ablate.do_run("SEA", run, f"noting 1\nnoting {argument}\nnoting 2")
    assert f"noting {argument}\nfailed" in str(error.value) and str(run) in str(error.value)
    assert "said 1" in str(error.value) and said in str(error.value)
    assert len(program()) == 2 and not (run / "done").exists()


@pytest.fixture
def short_runs(small, tmp_path, monkeypatch):
    """The real scripts in a folder of their own: three steps, few questions, two variants more."""
    folder = shutil.copytree(small, tmp_path / "toy")
    for file in folder.glob("val*.json"):
        file.write_text(json.dumps(json.loads(file.read_text())[:8]))
    for file in folder.glob("pope/*.json"):
        file.write_text("\n".join(file.read_text().splitlines()[:4]))
    monkeypatch.chdir(tmp_path)
    script = ablate.SCRIPT.replace("--seed", "--max_steps 3 --save_every 1 --seed")
    monkeypatch.setattr(ablate, "SCRIPT", script.replace("--samples 250", "--samples 8"))
    monkeypatch.setattr(ablate, "CAPTIONS", ablate.CAPTIONS.replace("250", "8"))
    some = ("fixed_tau", "labels_10_uniform")
    monkeypatch.setattr(ablate, "GROUPS", {"some": {name: ablate.VARIANTS[name] for name in some}})
    return Path("out/the report")


def test_report_and_ablate_end_to_end(short_runs, capsys):
    out = short_runs
    ablate.ablate(seeds=1, out=out, report=True)
    said = capsys.readouterr().out
    assert "| after stage 1 | TACS | D, unit vectors |" in said
    assert "| after stage 2: answers | POPE F1 |" in said and "| always yes | 0.667 " in said
    gap = of_eval(out / "SEA_0/pretrain", "D_of_unit_vectors")[-1]
    row = next(line for line in said.splitlines() if line.startswith("| SEA |"))
    assert row.split("|")[3].strip() == f"{gap:.3f} ± 0.000"
    drawn = {file.name for file in (out / "figures").iterdir()}
    assert drawn == {"pretraining.png", "language.png", "tsne.png", "words.html"}
    runs = sorted(run.name for run in out.glob("*_0"))
    assert runs == ["SEA_0", "baseline_0", "no_stage_1_0"]
    assert not (out / "no_stage_1_0/pretrain").exists()
    # --model RUN/checkpoints measures all of them, in the order of their steps
    steps = [line["step"] for line in lines_of(out / "SEA_0/pretrain") if "pope" in line]
    assert steps == [1, 2, 3]

    of_parts = of_eval(out / "SEA_0/pretrain", "tacs")[-1]
    assert of_parts == pytest.approx(naive_tacs_of_parts(out / "SEA_0/pretrain"), rel=1e-4)

    def times():
        return {run.name: (run / "done").stat().st_mtime for run in out.glob("*_0")}

    before = times()
    (out / "SEA_0/done").unlink()
    ablate.ablate(seeds=1, out=out)
    after = times()
    assert after["SEA_0"] > before["SEA_0"] and after["baseline_0"] == before["baseline_0"]
    said = capsys.readouterr().out
    names = ["baseline", "SEA", "no_stage_1", "fixed_tau", "labels_10_uniform"]
    assert [said.count(f"| {name} |") for name in names] == [4, 4, 2, 4, 4]

    def config(variant):
        return json.loads((out / f"{variant}_0/pretrain/config.json").read_text())

    assert config("labels_10_uniform")["labels"] == "toy/labels_n10"
    log = (out / "fixed_tau_0/pretrain/metrics.jsonl").read_text().splitlines()
    assert {json.loads(line).get("tau", 1) for line in log} == {1}  # in the process of its own


def naive_tacs_of_parts(run):
    """Eq. 14 in loops, with the words of captions that are, and that are not, every third one."""
    sea, captions = open_captions(find_run(run), "", "", 8)
    sums = {"every third word": [], "other words": []}
    for i, sample in enumerate(captions.samples):
        with torch.no_grad():
            visual = sea.visual_tokens(captions[i]["pixels"][None])[0].double()
        words = re.findall("[a-z]+", sample["conversations"][1]["value"])
        for part, values in sums.items():
            chosen = [w for w in words if w in ablate.WORDS]
            chosen = [w for w in chosen if (w in ablate.WORDS[::3]) == (part == "every third word")]
            ids = [sea.tokenizer(f" {w}", add_special_tokens=False).input_ids for w in chosen]
            if not ids:
                continue
            assert {len(tokens) for tokens in ids} == {1}
            table = sea.embed_tokens(torch.tensor(ids)[:, 0]).double()
            cosines = [[torch.cosine_similarity(v, t, 0).item() for t in table] for v in visual]
            best = sorted((max(row) for row in cosines), reverse=True)[:10]
            values.append(sum(best) / len(best))
    return {part: sum(values) / len(values) for part, values in sums.items()}


def test_every_variant_differs_from_all_others():
    configs = []
    for name, (flags, *replaced) in ablate.VARIANTS.items():
        if name == ablate.NO_STAGE_1:
            continue
        argv = ["--preset", "toy", "--out_dir", "x", *shlex.split(flags)]
        configs.append((train.parse_config(argv), *replaced))
    assert len(set(configs)) == len(configs)


def test_the_table_has_mean_and_half_the_range(capsys):
    runs = {"a": [{"m": {1: 9.0, 2: 1.0}}, {"m": {2: 4.0}}], "b": [{"m": {2: 0.5}}]}
    ablate.print_table("stage", runs, {"m": "Measure"})
    said = capsys.readouterr().out.split("\n")
    assert said[1:5] == [
        "| stage | Measure |",
        "|---|---|",
        "| a | 2.500 ± 1.500 |",
        "| b | 0.500 ± 0.000 |",
    ]


def lines_of(run):
    return [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]


def of_eval(run, measure):
    return [line[measure] for line in lines_of(run) if measure in line]
