import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPVisionModel

import data
import labels
import train
from data import UserError
from tools import look, toy


def test_the_truth_of_a_patch_is_what_its_pixels_show():
    """The share of a patch in each object, counted pixel by pixel on a picture of their numbers."""
    rng, judged = random.Random(0), 0
    for _ in range(40):
        scene = toy.make_scene(rng)
        image = np.full((64, 64), -1)
        for k, thing in enumerate(scene.things):
            image[toy.shape_mask(thing)] = k
        truth = toy.patch_truth(scene)
        for patch in range(64):
            y, x = 8 * (patch // 8), 8 * (patch % 8)
            counts = {
                k: (image[y : y + 8, x : x + 8] == k).sum() for k in range(-1, len(scene.things))
            }
            owners = [k for k in counts if k >= 0 and counts[k] >= 32]
            if owners:
                assert tuple(truth["object"][patch]) in [scene.things[k][:2] for k in owners]
            elif counts[-1] >= 57.6:
                assert truth["background"][patch] == [scene.background]
            else:
                assert patch not in truth["object"] and patch not in truth["background"]
            judged += patch in truth["object"] or patch in truth["background"]
    assert 0.7 < judged / 40 / 64 < 1


def test_captions_and_answers_follow_from_the_scene():
    thing = toy.Thing("red", "striped", "circle", 4, 4, 30)
    scene = toy.Scene([thing, toy.Thing("blue", "plain", "star", 40, 40, 20)], "grass")
    rng = random.Random(0)
    assert toy.caption(scene, rng).endswith("a red striped circle and a blue plain star on grass.")
    answers = dict(pair for _ in range(200) for pair in toy.questions(scene, rng))
    assert (
        answers["What color is the circle?"] == "red"
        and answers["What shape is the blue object?"] == "star"
    )
    assert (
        answers["How many objects are there?"] == "two"
        and answers["What is in the background?"] == "grass"
    )
    assert (
        answers["Is there a dotted object?"] == "no"
        and answers["Is there a striped object?"] == "yes"
    )
    assert answers["Is the background grass?"] == "yes" and answers["Is there a square?"] == "no"


def test_the_files_are_ordinary_ones(small):
    samples = data.load_samples(small / "train.json")
    assert len(samples) == 40 and len(data.load_samples(small / "val_qa.json")) == 1000
    assert set(json.loads((small / "truth.json").read_text())) >= {s["image"] for s in samples}
    assert labels.read_words(small / "words.txt") == list(toy.WORDS)
    clip = labels.load_encoder(str(small / "clip"))
    pixels = torch.randn(3, 3, 64, 64)
    tower = CLIPVisionModel.from_pretrained(small / "vision")
    hidden = tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    ours = clip.visual.forward_intermediates(pixels, indices=[1], output_fmt="NLC")[
        "image_intermediates"
    ][0]
    assert torch.allclose(hidden, ours, atol=1e-5)
    assert data.vision_preprocess(str(small / "vision")) == labels.encoder_preprocess(clip)
    assert open_clip.get_tokenizer(f"local-dir:{small}/clip")(["red"]).shape == (1, 32)


def test_the_tokenizer_has_a_token_for_every_word_and_a_chat_template(small):
    tokenizer = AutoTokenizer.from_pretrained(small / "llm")
    for word in toy.WORDS:
        assert len(tokenizer(f" {word}", add_special_tokens=False).input_ids) == 1, word
    assert len(tokenizer) == AutoModelForCausalLM.from_pretrained(small / "llm").config.vocab_size
    data.prepare_tokenizer(tokenizer)
    turns = [
        {"role": "user", "content": "<image>\nWhat color?"},
        {"role": "assistant", "content": "red"},
    ]
    chat = tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
    answer = [i for i, m in zip(chat["input_ids"], chat["assistant_masks"]) if m]
    assert tokenizer.decode(answer) == " red</s>"
    as_trained = tokenizer(
        "USER: <image>\nWhat color? ASSISTANT: red</s>", add_special_tokens=False
    )
    assert chat["input_ids"] == as_trained.input_ids
    parts = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What color?"}]},
        turns[1],
    ]
    assert tokenizer.apply_chat_template(parts, tokenize=False) == tokenizer.apply_chat_template(
        turns, tokenize=False
    )


def test_the_preset_labels_the_toy_and_trains_on_it(small, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(small.parent)
    run = ["--preset", "toy", "--max_steps", "3", "--out_dir", str(tmp_path / "run")]
    with pytest.raises(UserError, match="no label store"):
        train.main(run)
    toy.ensure()
    train.main(run)
    assert len(labels.LabelStore("toy/labels")) == 40
    capsys.readouterr()
    page = str(tmp_path / "l.html")
    truth = ["--truth", "toy/truth.json", "--compare"]
    look.main(["labels", "--labels", "toy/labels", "--out", page, *truth])
    shares = re.findall(
        r"(\w+, sign [+-]1|labels): .* lift (\S+) .* (\S+) words of each caption .*\n"
        r"true: {'object': (\S+), 'background': (\S+), 'all': (\S+)}",
        capsys.readouterr().out,
    )
    assert [name for name, *_ in shares] == [
        "labels",
        *(f"{path}, sign {sign}" for path in ("value", "last", "vv") for sign in ("+1", "-1")),
    ]
    assert shares[0][1:] == shares[1][1:]  # the toy's labels are of its value path, +cos
    # without the truth, the lift tells which sign is right
    for right, wrong in zip(shares[1::2], shares[2::2]):
        assert float(right[1]) > 1.5 > 1 > float(wrong[1])
        assert float(right[2]) > 0 and float(wrong[2]) >= 0  # words of each caption
        assert float(right[-1]) > float(wrong[-1])
    with pytest.raises(UserError, match="toy exists: remove it"):
        toy.build(small)


def test_what_the_lm_is_trained_on(small):
    """Whole documents of each kind: full weight is on the answers, and on nothing else."""
    tokenizer = AutoTokenizer.from_pretrained(small / "llm")
    rng = random.Random(0)
    kinds = set()
    for _ in range(60):
        ids, weights = toy.document(tokenizer, rng)
        text = tokenizer.decode(ids)
        heavy = tokenizer.decode(ids[weights == 1])
        assert tokenizer(text, add_special_tokens=False).input_ids == ids.tolist()
        assert set(weights.tolist()) == {1.0, torch.tensor(0.02).item()}
        told, rest = text.removeprefix("<s>").removeprefix("USER: ").split("\n", 1)
        if rest.startswith("seen:"):
            kinds.add("seen")
            for word, answer in re.findall(r"(\w+) (yes|no)[,\n]", rest):
                assert answer == ("yes" if word in re.findall(r"\w+", told) else "no")
            assert heavy == "".join(f" {answer}" for answer in re.findall(r"\b(?:yes|no)\b", rest))
        elif "ASSISTANT:" in rest:
            kinds.add("chat")
            assert heavy == "".join(re.findall(r"ASSISTANT:( \w+</s>)", rest))
            assert heavy.count("</s>") == 4
        else:
            kinds.add("caption")
            assert heavy == "\n" + rest
    assert kinds == {"seen", "chat", "caption"}


def test_a_build_that_fails_leaves_no_folder(tmp_path):
    with pytest.raises(TypeError):
        toy.build(tmp_path / "toy", images=4, clip_steps="many", lm_steps=1)
    assert not (tmp_path / "toy").exists()


def test_workers_end_with_a_killed_parent(tmp_path):
    (tmp_path / "parent.py").write_text(
        "import os, time\n"
        "from tools import toy\n"
        "if __name__ == '__main__':\n"
        "    pool = toy.two_workers()\n"
        "    print(pool.submit(os.getpid).result(), flush=True)\n"
        "    pool.submit(time.sleep, 600)\n"
        "    pool.submit(time.sleep, 600)\n"
        "    time.sleep(600)\n"
    )
    env = os.environ | {"PYTHONPATH": str(Path(toy.__file__).parents[1])}
    command = [sys.executable, tmp_path / "parent.py"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as parent:
        worker = int(parent.stdout.readline())
        os.kill(worker, 0)  # it lives
        parent.send_signal(signal.SIGKILL)
    for _ in range(100):
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        if "Z" in Path(f"/proc/{worker}/stat").read_text().rsplit(")")[1].split()[:1]:
            return  # ended, and only waits for someone to ask how
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker outlived its parent")


def test_the_demonstration_shows_what_was_measured(small, tmp_path, monkeypatch, capsys):
    """The four steps on a small toy, three steps of training each; again, it trains nothing."""
    shutil.copytree(small, tmp_path / "toy")
    monkeypatch.chdir(tmp_path)
    for file in (Path("toy/val.json"), Path("toy/pope/toy_pope_color.json")):  # fewer
        is_list = file.name == "val.json"
        text = file.read_text()
        few = json.dumps(json.loads(text)[:8]) if is_list else "\n".join(text.splitlines()[:8])
        file.write_text(few)
    trained = []
    main = train.main

    def train_briefly(argv):
        trained.append(argv)
        main([*argv, "--max_steps", "3"])

    monkeypatch.setattr(train, "main", train_briefly)
    toy.main([])
    assert [argv[argv.index("--out_dir") + 1] for argv in trained] == [
        "out/toy_baseline",
        "out/toy",
    ]
    assert ["--sea_weight" in argv for argv in trained] == [True, False]
    said = capsys.readouterr().out
    assert re.findall(r"^(\d) of 4: ", said, re.MULTILINE) == ["1", "2", "3", "4"]
    assert "{" not in said and not re.search(r"\d\.\d{4}", said.split("4 of 4")[1])

    measured = []
    for run in ("out/toy_baseline", "out/toy"):
        lines = map(json.loads, Path(run, "eval.jsonl").read_text().splitlines())
        measured.append({name: value for line in lines for name, value in line.items()})
    for title, value in (
        ("true words, objects", lambda run: f"{run['true']['object']:.0%}"),
        ("true words, backgrounds", lambda run: f"{run['true']['background']:.0%}"),
        ("TACS (at most 1)", lambda run: f"{run['tacs']:.2f}"),
        ("colours, yes or no (chance: 50%)", lambda run: f"{run['pope']['accuracy']:.0%}"),
    ):
        [line] = [line for line in said.splitlines() if line.startswith(title)]
        assert line.removeprefix(title).split() == [value(run) for run in measured]
        readme = Path(toy.__file__).parents[1] / "README.md"
        assert f"\n{line[:32]}" in readme.read_text()
    page = Path("words.html").read_text()
    assert "captions only: out/toy_baseline" in page and "SEA: out/toy" in page

    toy.main([])
    assert len(trained) == 2
