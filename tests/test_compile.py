"""The real compiler, in a file of its own: it takes more than a minute, beside the other tests."""

import pytest
from test_train import metrics

import train

pytestmark = pytest.mark.real


def test_compiled_blocks_train_like_plain_ones(finetune_flags, tmp_path):
    for name, extra in (("plain", []), ("compiled", ["--compile"])):
        train.main([*finetune_flags, "--out_dir", str(tmp_path / name), *extra])
    for a, b in zip(metrics(tmp_path / "plain"), metrics(tmp_path / "compiled")):
        assert a == pytest.approx(b, rel=1e-4)
