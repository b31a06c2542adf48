"""What tools.check_data lists as bad, what it writes as good, and what it says."""

import json
import os
from unittest.mock import patch

import pytest
import torch

import data
import train
from data import UserError
from tools import check_data


def check(*argv):
    with patch.dict(os.environ):  # the check sets torchrun's variables
        check_data.main(list(argv))


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_every_bad_sample_is_listed_and_the_good_ones_are_written(
    flags, samples, world, tmp_path, suffix, capsys
):
    """All at once: turns, an empty answer, a missing and a broken image, what is no sample."""
    rows = [json.loads(json.dumps(sample)) for sample in samples[:12]]
    rows[1]["conversations"][1]["value"] += " word" * 50  # good, and longer than --max_length
    rows[3]["image"] = "nowhere.png"
    rows[4]["image"] = "broken.png"
    (world / "images/broken.png").write_bytes(b"no image")
    rows[6]["conversations"][1]["value"] = " "
    rows[7] = {"id": "7"}
    rows[9] = 5
    rows[10]["image"] = "n" * 300 + ".png"  # no file can have this name
    rows[11]["extra"] = json.loads("[" * 900 + "]" * 900)  # no process could hand it to another
    lines = [json.dumps(row) for row in rows]
    text = f"[{','.join(lines)}]"
    if suffix == ".jsonl":
        text = "\n".join([*lines, "{"]) + "\n\n"  # a blank line is no sample
    (tmp_path / f"data{suffix}").write_text(text)
    given = [*flags, "--data", f"{tmp_path}/data{suffix}", "--out_dir", f"{tmp_path}/out"]
    given += ["--max_length", "60", "--workers", "1"]
    count = 7 + (suffix == ".jsonl")
    with pytest.raises(
        UserError, match=f"{count} bad samples, all in .*good.jsonl.txt; the first: "
    ):
        check(f"{tmp_path}/good.jsonl", *given)
    (world / "images/broken.png").unlink()
    good = [row for i, row in enumerate(rows) if i not in (3, 4, 6, 7, 9, 10, 11)]
    found = [json.loads(line) for line in (tmp_path / "good.jsonl").read_text().splitlines()]
    assert found == good and len(data.load_samples(tmp_path / "good.jsonl")) == 5
    problems = (tmp_path / "good.jsonl.txt").read_text().splitlines()
    assert len(problems) == count
    unit = "line" if suffix == ".jsonl" else "sample"
    for number, problem in (
        (4, "nowhere.png: cannot read the image"),
        (5, "broken.png: not a readable image"),
        (7, "an answer is empty"),
        (8, "needs"),
        (10, "needs"),
        (11, "nnn.png: cannot read the image"),
        (12, "nested too deep"),
        (13, "not valid JSON"),
    )[:count]:
        [found] = [line for line in problems if f"data{suffix}, {unit} {number}: " in line]
        assert problem in found
    printed = capsys.readouterr().out
    assert "5 good samples in " in printed and "good.jsonl, 5 with an image" in printed
    assert not (tmp_path / "out").exists()

    with pytest.raises(UserError, match="good.jsonl: exists already"):  # no overwriting
        check(f"{tmp_path}/good.jsonl", *given)
    given = [*flags, "--data", f"{tmp_path}/good.jsonl", "--max_length", "60", "--workers", "2"]
    check(f"{tmp_path}/again.jsonl", *given)
    built, _ = train.build_model(train.parse_config(flags), torch.device("cpu"))
    longest, _ = data.encode_conversation(good[1], built.tokenizer, built.image_tokens, 999)
    expected = f"the longest has {len(longest)} positions; --max_length 60 cuts 1"
    assert expected in capsys.readouterr().out
    assert not (tmp_path / "again.jsonl.txt").exists()


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("data.json", "[]", "expected at least one sample"),
        ("data.json", "{}", "expected a list of samples"),
        ("data.json", "5", "expected a list of samples"),
        ("data.json", "", "not valid JSON"),
        ("data.jsonl", "\n \n", "expected at least one sample"),
        ("captions.txt", "image,caption\n", "not LLaVA's format"),
    ],
)
def test_a_file_without_samples_is_refused_by_the_check(flags, tmp_path, name, content, expected):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=f"{name}.*{expected}"):
        check(f"{tmp_path}/good.jsonl", *flags, "--data", f"{tmp_path}/{name}")
    assert not (tmp_path / "good.jsonl").exists()


@pytest.mark.parametrize("argv", [[], ["good.json"], ["--data=a.jsonl"], ["--stage", "pretrain"]])
def test_a_check_needs_the_name_of_a_new_file(argv):
    with pytest.raises(UserError, match="usage: python -m tools.check_data NEW.jsonl"):
        check(*argv)


@pytest.mark.parametrize("flag", ["--fsdp", "--gather_pairs"])
def test_flags_that_need_torchrun_are_taken(flags, tmp_path, flag):
    check(f"{tmp_path}/good.jsonl", *flags, flag)
    assert len(data.load_samples(tmp_path / "good.jsonl")) == 24


def test_data_of_stage_2_are_checked_as_chats(flags, world, tmp_path, capsys):
    texts = [
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}
    ] * 3
    (tmp_path / "data.json").write_text(json.dumps(texts))
    parts = f"--llm {world}/llm --vision {world}/vision --data {tmp_path}/data.json"
    check(f"{tmp_path}/good.jsonl", *f"--stage finetune {parts}".split())
    assert f"3 good samples in {tmp_path}/good.jsonl, 0 with an image" in capsys.readouterr().out


def test_check_and_training_say_how_many_samples_have_an_image(
    finetune_flags, world, tmp_path, capsys
):
    """Ten of the seventeen."""
    rows = list(data.load_samples(world / "chats.jsonl", captions=False))
    rows.append(rows[16] | {"images": ["0.png"]})  # which would be no image
    (tmp_path / "more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match='1 bad samples.*line 18: has no "image", but it has'):
        check(f"{tmp_path}/good.jsonl", *finetune_flags, "--data", f"{tmp_path}/more.jsonl")
    printed = capsys.readouterr().out
    assert "17 good samples in" in printed and "good.jsonl, 10 with an image;" in printed
    train.main([*finetune_flags, "--out_dir", f"{tmp_path}/out", "--max_steps", "1"])
    assert "17 samples, 10 with an image, 1 steps" in capsys.readouterr().out
