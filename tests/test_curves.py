"""What pictures show, read back from pixels and axes, and the histories they are drawn from."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import eval as evaluation
import train
from data import UserError, read_json_lines
from tools import curves
from tools.curves import SCORES, draw_curves, draw_tsne, history

# ------------------------------------------------------------------------ measures of training runs


@pytest.fixture
def run_folder(tmp_path):
    folder = tmp_path / "two_step_9"  # no step of this run
    (folder / "vqa").mkdir(parents=True)
    metrics = [{"step": 1, "val_tacs": 0.1}, {"step": 2, "val_tacs": 0.2}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    return folder


def test_a_history_joins_what_runs_and_tools_wrote(run_folder):
    assert history(run_folder)["val_tacs"] == {1: 0.1, 2: 0.2}  # without an eval.jsonl
    lines = [
        {"step": 1, "pope": {"f1": 0.5, "coco": {"f1": 0.4}}},
        {"step": 1, "pope": {"f1": 0.6}},
        {"step": 2, "qa": {"all": 1}, "D": 3.0},
    ]
    (run_folder / "eval.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    mmlu = {
        "mmlu": {"alias": "mmlu", "sample_len": 9, "acc_stderr,none": 0.1, "acc,none": 0.35},
        "mmlu_stem": {"acc,none": 0.1},
        "mmlu_virology": {"acc,none": 0.2},
    }
    groups = {"mmlu": ["mmlu_stem"], "mmlu_stem": ["mmlu_virology"]}
    pope = {
        "alias": "pope",
        "pope_accuracy,none": 0.7,
        "pope_accuracy_stderr,none": "N/A",
        "pope_f1_score,none": 0.75,
        "pope_f1_score_stderr_clt,none": 0.0,
    }
    newer = {
        "pope": pope | {"pope_f1_score,none": 0.8},
        "coco": {"coco_Bleu_4,none": 0.2, "coco_CIDEr,none": 0.9},
        "mmvp": {"mmvp_accuracy,none": 0.6, "mmvp_pair_accuracy,none": 0.3},
        "broken": {"alias": "x", "submission,none": None},
    }
    files = {
        "lmms/x__model/20261124_081430_results.json": {"results": {"pope": pope}},
        "lmms/a__model/20261124_081431_results.json": {"results": newer},
        "lm/step_7__step_1/results_2026-11-24T00-15-22.398486.json": {
            "results": mmlu,
            "group_subtasks": groups,
        },
    }
    for name, content in files.items():
        (run_folder / name).parent.mkdir(parents=True, exist_ok=True)
        (run_folder / name).write_text(json.dumps(content))
    found = history(run_folder)
    assert found["val_tacs"] == {1: 0.1, 2: 0.2} and found["D"] == {2: 3.0}
    assert found["pope f1"] == {1: 0.6}
    assert {name: steps for name, steps in found.items() if name.endswith(" all")} == {
        "pope all": {2: 0.8},
        "coco all": {2: 0.9},
        "mmvp all": {2: 0.3},
        "mmlu all": {1: 0.35},
        "qa all": {2: 1},
    }


@pytest.mark.parametrize(
    "text", ['{"id": 1}\n{"id": 2}', '{"results": 3}', '{"results": {"a": 3}}']
)
def test_a_file_that_only_looks_like_results_is_named(run_folder, text):
    (run_folder / "vqa/my_results.json").write_text(text)
    with pytest.raises(UserError, match="my_results.json: not what lmms-eval .* move it out"):
        history(run_folder)


def test_which_measures_figures_show():
    shown = ("val_tacs", "tacs", "pope f1", "gqa all", "loss_g", "loss_a", "val_loss")
    hidden = ("true all", "words all", "pope coco_pope_random f1", "qa open", "D", "lr")
    assert all(re.fullmatch(SCORES, name) for name in shown)
    assert not any(re.fullmatch(SCORES, name) for name in hidden)


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, by file name."""
    from matplotlib.figure import Figure

    found = {}
    save = Figure.savefig

    def record(self, file, **kwargs):
        found[Path(file).name] = self
        save(self, file, **kwargs)

    monkeypatch.setattr(Figure, "savefig", record)
    return found


def test_curves_are_the_mean_and_the_range_over_seeds(tmp_path, drawn, capsys):
    seeds = [{"m": {1: value, 2: 2 * value}, "once": {1: 1.0}} for value in (1.0, 3.0)]
    seeds[0]["m"][3] = 9.0  # only one seed has got this far
    runs = {"a": seeds, "b": [{"m": {1: 5.0, 2: 5.0}, "once": {1: 1.0, 2: 2.0}}]}
    draw_curves(runs, {"m": "Title", "once": "Once", "none": "None"}, tmp_path / "c.png")
    axes, other = drawn["c.png"].axes
    assert axes.get_title() == "Title" and other.get_title() == "Once"
    [line] = other.lines  # a has it only once
    assert line.get_label() == "b" and line.get_color() == axes.lines[1].get_color()
    curves = {line.get_label(): [*zip(*line.get_data())] for line in axes.lines}
    assert curves == {"a": [(1, 2), (2, 4)], "b": [(1, 5), (2, 5)]}
    heights = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == (1, 6)
    del runs["b"]
    draw_curves(runs, {"once": "Once"}, tmp_path / "none.png")
    assert "none.png: it takes a measure at several steps" in capsys.readouterr().out
    assert not (tmp_path / "none.png").exists()


def test_many_steps_are_drawn_as_averages(tmp_path, drawn):
    many = {"loss_g": {step: float(step % 2) for step in range(1, 1001)}}
    draw_curves({"run": [many]}, {"loss_g": "Loss"}, tmp_path / "c.png")
    steps, values = drawn["c.png"].axes[0].lines[0].get_data()
    assert [*steps] == [i * 20 + 10.5 for i in range(50)] and [*values] == [0.5] * 50


def test_tsne_parts_what_points_elsewhere_whatever_its_norm(tmp_path, drawn):
    """Visual tokens of a run point where words do, but are ten times as long; those of the other
    point away from them."""
    g = torch.Generator().manual_seed(0)
    words = torch.randn(60, 8, generator=g) * 0.1 + torch.eye(8)[0]
    near = (torch.randn(150, 8, generator=g) * 0.1 + torch.eye(8)[0]) * 10
    away = torch.randn(150, 8, generator=g) * 0.1 - torch.eye(8)[0]
    groups = {
        kind: {"visual tokens": x.bfloat16(), "LLM's embeddings": words, "text tokens": words[:9]}
        for kind, x in (("SEA", near), ("baseline", away))
    }
    draw_tsne(groups, tmp_path / "t.png", max_points=50)
    places = {}
    for axes in drawn["t.png"].axes:
        for dots in axes.collections:
            places[axes.get_title(), dots.get_label()] = np.array(dots.get_offsets())
    counts = {name: len(found) for (_, name), found in places.items()}
    assert counts == {"visual tokens": 50, "LLM's embeddings": 30, "text tokens": 9}

    def distance(kind):
        middle = places[kind, "LLM's embeddings"].mean(0)
        spread = places[kind, "LLM's embeddings"].std()
        return np.linalg.norm(places[kind, "visual tokens"].mean(0) - middle) / spread

    assert distance("baseline") > 1.5 > 3 * distance("SEA")


def test_figures_are_drawn_from_what_runs_left(flags, world, tmp_path, capsys, drawn):
    folders = {"baseline": tmp_path / "base", "SEA": tmp_path / "sea"}
    without_sea = ["--sea_weight", "0", "--labels", ""]
    for kind, folder in folders.items():
        more = without_sea if kind == "baseline" else []
        train.main([*flags, "--out_dir", str(folder), "--save_every", "3", "--keep", "0", *more])
    for name in "abc":
        shutil.copy(world / "train.json", tmp_path / f"{name}.json")
    data = ["--image_folder", f"{world}/images", "--max_new_tokens", "2", "--workers", "0"]
    scores = {kind: [] for kind in folders}
    for kind, folder in folders.items():
        for step in (3, 6):
            checkpoint = ["--model", f"{folder}/checkpoints/step_{step}"]
            for name in "abc":
                file = f"{tmp_path}/{name}.json"
                result = evaluation.main(["vqa", *checkpoint, *data, "--data", file])
            scores[kind].append(result["c"]["all"])

    for score, folder in zip((0.25, 0.75), folders.values()):
        with open(folder / "eval.jsonl", "a") as f:
            f.write(json.dumps({"step": 6, "d": {"all": score}}) + "\n")
            f.write(json.dumps({"step": 3, "d": {"all": 0.5}}) + "\n")

    both = [str(folders["baseline"]), str(folders["SEA"])]
    curves.main([*both, "--out", f"{tmp_path}/f", "--tsne", "--samples", "4"])
    assert {file.name for file in (tmp_path / "f").iterdir()} == set(drawn)
    assert set(drawn) == {"tsne.png", "curves.png"}
    out = capsys.readouterr().out
    assert re.search(r"d all +0.250 -> 0.750 at step 6", out)  # the last
    assert f"{both[0]} -> {both[1]}\n" in out and "Table 2" not in out
    assert len(re.findall(r"-> [\d.]+ at step 6", out)) == 5
    panels = {axes.get_title(): axes for axes in drawn["curves.png"].axes}
    assert [*panels] == [
        "caption loss L_g",
        "contrastive loss L_a",
        "caption loss, held-out samples",
        "TACS, held-out samples",
        "a all",
        "b all",
        "c all",
        "d all",
    ]
    lines = {line.get_label(): line for line in panels["c all"].lines}
    assert {path: [*line.get_ydata()] for path, line in lines.items()} == {
        str(folders[kind]): values for kind, values in scores.items()
    }
    for title, measure, runs in (
        ("TACS, held-out samples", "val_tacs", both),
        ("caption loss L_g", "loss_g", both),
        ("contrastive loss L_a", "loss_a", both[1:]),
    ):
        assert [line.get_label() for line in panels[title].lines] == runs
        for line in panels[title].lines:
            metrics = read_json_lines(Path(line.get_label()) / "metrics.jsonl")
            assert [*line.get_ydata()] == [m[measure] for m in metrics if measure in m]
    assert [axes.get_title() for axes in drawn["tsne.png"].axes] == both
    for axes in drawn["tsne.png"].axes:
        counts = {dots.get_label(): len(dots.get_offsets()) for dots in axes.collections}
        assert counts["visual tokens"] == 4 * 25
    shutil.copytree(folders["SEA"] / "model", tmp_path / "elsewhere/alone")
    with pytest.raises(UserError, match="alone: not of a training run"):
        curves.main([both[0], str(tmp_path / "elsewhere/alone")])

    curves.main([both[1], "--out", f"{tmp_path}/alone"])  # a run alone
    assert len(drawn["curves.png"].axes) == 8 and "->" not in capsys.readouterr().out
    assert not (tmp_path / "alone/tsne.png").exists()


def test_a_run_that_has_no_model_yet_is_drawn(run_folder, tmp_path, drawn):
    curves.main([str(run_folder), "--out", str(tmp_path / "f")])
    [axes] = drawn["curves.png"].axes
    assert [*axes.lines[0].get_ydata()] == [0.1, 0.2]


def test_what_cannot_be_compared_is_said_before_models_are_loaded(run_folder, monkeypatch):
    monkeypatch.setattr(curves, "token_groups", None)  # is not called
    with pytest.raises(UserError, match="nowhere"):
        curves.main([str(run_folder), "nowhere", "--tsne"])


def test_tsne_of_llms_of_several_widths(tmp_path):
    groups = {"a": {"text tokens": torch.ones(3, 4)}, "b": {"text tokens": torch.ones(3, 5)}}
    with pytest.raises(UserError, match="several widths"):
        draw_tsne(groups, tmp_path / "t.png")


def test_the_papers_average_gain(tmp_path, capsys):
    """7.61 % on Gemma-2B, from the eight scores of Table 2; what else was measured is no part."""
    names = ["vqav2_val", "textvqa_val", "gqa", "scienceqa_img", "mmbench_en_dev_static", "pope"]
    names += ["vizwiz_vqa_val", "mmvet"]
    scores = {
        "baseline": (72.5, 43.7, 56.0, 61.3, 54.0, 84.4, 38.7, 23.9),
        "SEA": (76.6, 49.7, 60.9, 62.5, 59.5, 87.0, 39.5, 27.6),
    }
    for kind, values in scores.items():
        (tmp_path / kind / "model").mkdir(parents=True)
        (tmp_path / kind / "model/processor_config.json").touch()
        (tmp_path / kind / "config.json").write_text('{"stage": "finetune"}')
        (tmp_path / kind / "metrics.jsonl").write_text('{"step": 1}\n')
        lines = [json.dumps({"step": 1, name: {"all": v}}) for name, v in zip(names, values)]
        lines.append(json.dumps({"step": 1, "ocrbench": {"all": len(kind)}, "pope": {"f1": 0.1}}))
        (tmp_path / kind / "eval.jsonl").write_text("\n".join(lines))
    both = [f"{tmp_path}/baseline", f"{tmp_path}/SEA"]
    curves.main([*both, "--out", f"{tmp_path}/f"])
    out = capsys.readouterr().out
    assert "average relative gain of 8 of Table 2's 8 benchmarks: +7.6" in out
    assert "ocrbench all" in out


def test_gains_are_of_the_same_step_and_not_of_nothing(capsys):
    before = {"gqa all": {10: 0.5, 20: 1.0}, "pope f1": {20: 0.0}, "mmvet all": {10: 1.0}}
    after = {"gqa all": {10: 1.0, 30: 9.0}, "pope f1": {20: 0.5}, "mmvet all": {30: 2.0}}
    losses = {"val_loss": {10: 1.0}}
    curves.print_gains("a", before | losses, "b", after | losses)
    out = capsys.readouterr().out
    assert re.search("gqa all +0.500 -> 1.000 at step 10\n", out)
    assert re.search("pope f1 +0.000 -> 0.500 at step 20\n", out)
    assert "mmvet" not in out and "loss" not in out
    assert "gain of 1 of Table 2's 8 benchmarks: +100.00%" in out
