"""tools.speed in miniature."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_padding_is_none_in_batches_of_one():
    useful = speed.time_padding(samples=400, batch_size=1, ranks=2)
    assert useful == {"grouped": 1.0, "random": 1.0}
    assert max(speed.time_padding(samples=400, batch_size=4, ranks=2).values()) < 1
