import os
from pathlib import Path

import numpy as np
import pytest

import train

PROC = Path("/proc/self")


@pytest.mark.skipif(not (PROC / "statm").exists(), reason="reads Linux's /proc")
def test_a_longer_run_needs_no_more_memory_or_files(flags, tmp_path, monkeypatch):
    """Over 300 steps with six checkpoints and validations, of which the first 100 may add some."""
    used = []
    train_step = train.train_step

    def watched(*args):
        metrics = train_step(*args)
        pages = int((PROC / "statm").read_text().split()[1])
        used.append((pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(os.listdir(PROC / "fd"))))
        return metrics

    monkeypatch.setattr(train, "train_step", watched)
    own = f"--out_dir {tmp_path} --max_steps 300 --save_every 50 --keep 2 --val_every 50"
    train.main([*flags, *own.split()])
    mib, files = np.array(used).T
    assert len(used) == 300 and mib[200:].mean() < mib[100:200].mean() + 8
    assert set(files[100:]) == {files[1]}
