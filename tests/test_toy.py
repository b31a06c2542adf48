import json
import random
import re

import numpy as np
import open_clip
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPVisionModel

import data
import labels
import toy
import train
from data import UserError


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A toy that was trained for a moment: all its files, nothing learnt."""
    folder = tmp_path_factory.mktemp("small") / "toy"
    toy.build(folder, images=40, clip_steps=2, lm_steps=2)
    return folder


def test_the_truth_of_a_patch_is_what_its_pixels_show():
    """Without texture, noise and patterns the share of a patch in the object's color is counted pixel by pixel."""
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
    assert data.vision_geometry(str(small / "vision")) == labels.encoder_geometry(clip)
    assert open_clip.get_tokenizer(f"local-dir:{small}/clip")(["red"]).shape == (1, 32)


def test_the_tokenizer_has_a_token_for_every_word_and_a_chat_template(small):
    tokenizer = AutoTokenizer.from_pretrained(small / "llm")
    for word in toy.WORDS:
        assert len(tokenizer(f" {word}", add_special_tokens=False).input_ids) == 1, word
    assert len(tokenizer) == AutoModelForCausalLM.from_pretrained(small / "llm").config.vocab_size
    turns = [
        {"role": "user", "content": "<image>\nWhat color?"},
        {"role": "assistant", "content": "red"},
    ]
    chat = tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
    answer = [i for i, m in zip(chat["input_ids"], chat["assistant_masks"]) if m]
    assert tokenizer.decode(answer) == " red</s>"
    parts = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What color?"}]},
        turns[1],
    ]
    assert tokenizer.apply_chat_template(parts, tokenize=False) == tokenizer.apply_chat_template(
        turns, tokenize=False
    )


def test_the_preset_labels_the_toy_and_trains_on_it(small, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(small.parent)
    train.main(["--preset", "toy", "--max_steps", "3", "--out_dir", str(tmp_path / "run")])
    assert len(labels.LabelStore("toy/labels")) == 40
    assert "python toy.py report" in capsys.readouterr().out
    labels.main(
        [
            "show",
            "--labels",
            "toy/labels",
            "--truth",
            "toy/truth.json",
            "--out",
            str(tmp_path / "l.png"),
        ]
    )
    shares = re.findall(
        r"(\w+, sign [+-]1|labels): object (\S+), background (\S+), all (\S+)",
        capsys.readouterr().out,
    )
    assert [name for name, *_ in shares] == [
        "labels",
        *(f"{path}, sign {sign}" for path in ("value", "last", "vv") for sign in ("+1", "-1")),
    ]
    assert shares[0][1:] == shares[1][1:]  # the toy's labels are of its value path, +cos
    with pytest.raises(UserError, match="toy exists: remove it"):
        toy.build(small)


def test_a_build_that_fails_leaves_no_folder(tmp_path):
    with pytest.raises(TypeError):
        toy.build(tmp_path / "toy", images=4, clip_steps="many", lm_steps=1)
    assert not (tmp_path / "toy").exists()
