"""Command lines: what --help says, and that files are looked for before a model is loaded."""

import importlib
import inspect
import json

import pytest

import data
import eval
import labels
import train
from data import UserError, parse_docstring, run_command
from tools import ablate, curves, look, speed

FUNCTIONS = [
    labels.write_words,
    labels.extract,
    eval.eval_tacs,
    eval.eval_gap,
    eval.eval_words,
    eval.eval_pope,
    eval.eval_vqa,
    eval.chat,
    look.look_at_labels,
    look.look_at_words,
    curves.draw,
    ablate.ablate,
    speed.time_steps,
    speed.time_search,
    speed.time_packing,
    speed.gpu,
]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_parameter_is_explained(function):
    text, said = parse_docstring(function)
    for name in inspect.signature(function).parameters:
        assert name in said or name in data.HELP, name
    assert text


@pytest.mark.parametrize("module", ["labels", "eval", "tools.look", "tools.speed"])
def test_all_commands_are_looked_at_here(module, monkeypatch):
    module = importlib.import_module(module)
    found = []
    monkeypatch.setattr(module, "run_command", lambda doc, functions, argv: found.append(functions))
    module.main([])
    assert set(found[0].values()) <= set(FUNCTIONS)


def test_help_has_a_line_for_each_flag(capsys):
    def measure(
        runs: list[str], words: int, share: float = 0.5, name: str = "", fast: bool = False
    ):
        """Measure runs.

        It takes 100 % of an hour.

        runs: 100 % of them
        words: how many,
            and no fewer
        share: 50 % of them
        name: of nobody
        """
        return runs, words, share, name, fast

    with pytest.raises(SystemExit):
        run_command("What it is.", {"measure": measure}, ["measure", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "Measure runs. It takes 100 % of an hour. positional arguments: runs 100 % of them" in said
    )
    assert "--words WORDS how many, and no fewer (required)" in said
    assert "--share SHARE 50 % of them (default: 0.5)" in said
    assert "--name NAME of nobody --fast" in said
    argv = ["measure", "a", "b", "--words", "3", "--fast"]
    assert run_command("", {"measure": measure}, argv) == (["a", "b"], 3, 0.5, "", True)
    with pytest.raises(SystemExit):
        run_command("", {"measure": measure}, ["measure", "--words", "3"])
    assert "the following arguments are required: runs" in capsys.readouterr().err


@pytest.fixture(scope="module")
def run(flags, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    train.main([*flags, "--out_dir", str(out)])
    return out


@pytest.mark.parametrize(
    "module, line",
    [
        (eval, "tacs --model {run} --data nowhere.json"),
        (eval, "tacs --model {run} --image_folder nowhere"),
        (eval, "gap --model {run} --words nowhere.txt"),
        (eval, "words --model {run} --words nowhere.txt"),
        (eval, "words --model {run} --image_folder nowhere"),
        (eval, "pope --model {run} --data nowhere --image_folder {world}/images"),
        (eval, "pope --model {run} --data {tmp}/pope.json --image_folder nowhere"),
        (eval, "vqa --model {run} --data {world}/train.json --image_folder nowhere"),
        (eval, "chat --model {run} --image nowhere.png"),
        (look, "words --model {run} --truth nowhere.json"),
        (look, "words --model {run} --baseline nowhere"),
        (labels, "extract {captions} --words nowhere.txt --out {tmp}/out"),
        (
            labels,
            "extract {captions} --image_folder nowhere --words {world}/words.txt --out {tmp}/o",
        ),
        (train, "{train} --val_data nowhere.json"),
        (train, "{train} --image_folder nowhere"),
        (train, "{chats} --image_folder nowhere"),
        (eval, "vqa --model {run} --data {tmp}/chats.jsonl --image_folder nowhere"),
        (train, "{train} --labels nowhere"),
        (train, "{train} --data nowhere.json"),
    ],
)
def test_files_are_looked_for_before_a_model_is_loaded(
    module, line, run, flags, world, tmp_path, monkeypatch
):
    def load(*args, **kwargs):
        raise AssertionError("a model is loaded")

    for place, name in (
        (eval, "load_model"),
        (train, "load_model"),
        (train, "new_model"),
        (labels, "load_encoder"),
        (look, "load_encoder"),
    ):
        monkeypatch.setattr(place, name, load)
    (tmp_path / "pope.json").write_text('{"image": "0.png", "text": "a door?", "label": "yes"}\n')
    captions = f"--data {world}/train.json --image_folder {world}/images"
    chats = (world / "chats.jsonl").read_text().splitlines()[::-1]
    assert not json.loads(chats[0])["image"]  # the first is text only
    (tmp_path / "chats.jsonl").write_text("\n".join(chats))
    words = {"run": run, "world": world, "tmp": tmp_path, "captions": captions}
    words["train"] = f"{' '.join(flags)} --out_dir {tmp_path}/new"
    words["chats"] = f"--stage finetune --init {run} --data {tmp_path}/chats.jsonl"
    with pytest.raises(UserError, match="nowhere"):
        module.main(line.format(**words).split())
