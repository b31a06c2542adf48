"""tools.speed in miniature."""

import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

import model
from tools import speed

ROOT = Path(__file__).parent.parent


def test_times_of_the_search():
    """As a program."""
    program = [sys.executable, "-m", "tools.speed"]
    program += ["words", "--patches", "3", "--words", "9000", "--dim", "8", "--repeats", "2"]
    said = subprocess.run(program, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert "nearest_words takes 1.00 (1.00 to 1.00) of it" in said
    assert "product in float32" in said and "product in bfloat16" in said


@pytest.mark.parametrize("stage, count", [("pretrain", 3), ("finetune", 2)])
def test_all_steps_have_the_same_loss(stage, count, capsys):
    speed.main(f"step --stage {stage} --llm tiny --batch_size 1 --text 8 --repeats 1".split())
    losses = re.findall(r"loss (\S+)", capsys.readouterr().out)
    assert len(losses) == count and max(map(float, losses)) - min(map(float, losses)) < 2e-3


def test_packing_has_the_loss_of_padding(monkeypatch):
    """And takes the same micro-batches."""
    losses = {"packed": [], "padded": []}
    compare = speed.compare

    def keep_losses(steps, repeats):
        def kept(name):
            return lambda: losses[name].append(steps[name]())

        return compare({name: kept(name) for name in steps}, repeats)

    labelled = []
    monkeypatch.setattr(model, "sea_loss", lambda *args, **kwargs: labelled.append(1))
    with patch.object(speed, "compare", keep_losses):
        result = speed.main(["packing", "--llm", "tiny", "--batch_size", "3", "--repeats", "2"])
    assert 0.5 < result["useful"] < 1
    assert not labelled  # SEA is for stage 1
    assert len(losses["packed"]) == 3 and len(set(losses["packed"])) == 3
    assert losses["packed"] == pytest.approx(losses["padded"], rel=1e-4)


def test_padding_is_to_the_longest():
    items = [dict(input_ids=torch.arange(n), is_image=torch.ones(n) > 0) for n in (2, 4)]
    for item in items:
        item["targets"] = item["input_ids"]
    padded = speed.pad(items)
    assert padded[0]["input_ids"].tolist() == [0, 1, 0, 0]
    assert padded[0]["targets"].tolist() == [0, 1, -100, -100]
    assert padded[0]["is_image"].tolist() == [True, True, False, False]
    assert padded[1]["input_ids"].tolist() == [0, 1, 2, 3]
