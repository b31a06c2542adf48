"""Kill training runs at random moments, again and again, and compare what they end with.

    python tests/kills.py 60        60 kills: a quarter of an hour; needs Linux; not run by pytest

Both stages, in the tiny world, alone and with two ranks. A run is killed several times and started
again with the same command line. It must end with the log and the weights of a run that was never
disturbed, bit for bit. A kill is SIGKILL, to all processes or to one rank, or Ctrl-C, as a terminal
sends it to all processes; most wait for a checkpoint to be written.
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import pytest
import torch
from test_distributed import all_weights
from test_train import ROOT, heed_ctrl_c, metrics

STEPS, KEEP, KILLS_PER_RUN = 30, 2, 5
# When a kill comes: while a checkpoint is written; once it has its name and old ones are removed;
# at any time, that of loading too; or it is Ctrl-C, in one of the first steps.
MOMENTS = ["write"] * 5 + ["rename"] * 3 + ["any"] * 2 + ["ctrl-c"] * 2
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
KINDS = {  # name: stage, what stands before train.py, further flags
    "stage 1, alone": ("pretrain", [], []),
    "stage 2, alone": ("finetune", [], []),
    "stage 1, two ranks": ("pretrain", TORCHRUN, []),
    "stage 2, two ranks, --fsdp": ("finetune", TORCHRUN, ["--fsdp"]),
}


class Start:
    """A command line as a process of its own, and what it does in its --out_dir."""

    def __init__(self, command, out):
        self.out = out
        self.before = self.folders()
        self.lines_before = self.lines()
        self.log = Path(f"{out}.log")
        self.log_before = self.log.stat().st_size if self.log.exists() else 0
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(
                [sys.executable, *command],
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=heed_ctrl_c,
            )

    def folders(self):
        """{name in checkpoints/: (time of its last change, how many files it holds)}."""
        found = {}
        for folder in self.out.glob("checkpoints/*"):
            try:
                found[folder.name] = folder.stat().st_ctime_ns, len(os.listdir(folder))
            except FileNotFoundError:  # removed meanwhile
                continue
        return found

    def changed(self):
        """The names of folders that this start has made, changed or begun to remove."""
        return {name for name, state in self.folders().items() if self.before.get(name) != state}

    def unfinished(self):
        """The name of the folder that is being written, or None."""
        return next((name for name in self.changed() if name.endswith(".tmp")), None)

    def lines(self):
        file = self.out / "metrics.jsonl"
        return file.read_bytes().count(b"\n") if file.exists() else 0

    def wait(self, condition, pause=0.001):
        """Until the condition is true or the process has ended -> whether it still runs."""
        while self.process.poll() is None and not condition():
            time.sleep(pause)
        return self.process.poll() is None

    def tree(self):
        """The ids of the process and of all below it, in the order of their birth."""
        parents = {}
        for file in Path("/proc").glob("[0-9]*/stat"):
            try:
                parents[int(file.parent.name)] = int(file.read_text().rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):  # it has just ended
                continue
        found = [self.process.pid]
        for pid in found:
            found += sorted(child for child, parent in parents.items() if parent == pid)
        return found

    def text(self):
        return self.log.read_bytes()[self.log_before :].decode().replace("\r", "\n")


def send_kill(pids):
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def kill(start, moment, seconds, rng):
    """SIGKILL at the moment -> what it has interrupted, or None if the run had ended before.

    seconds: how long an undisturbed run takes, and writing one of its checkpoints.
    """
    if moment == "any":
        end = time.monotonic() + rng.uniform(0, seconds["run"])
        start.wait(lambda: time.monotonic() > end)
        pids = start.tree()
    else:
        start.wait(lambda: start.lines() > start.lines_before)
        pids = start.tree()  # takes a while, so it is done before what must be quick
        for _ in range(rng.randint(1, 2)):
            start.wait(lambda: not start.unfinished())
            start.wait(start.unfinished)
        folder = start.out / "checkpoints" / (start.unfinished() or "none")
        if moment == "write":
            time.sleep(rng.uniform(0, seconds["write"]))
        else:
            start.wait(lambda: not folder.exists(), pause=0)
    if start.process.poll() is not None:
        return None
    if len(pids) > 2 and rng.random() < 0.3:
        send_kill([rng.choice(pids[1:])])  # torchrun then ends the other rank, and itself
        start.process.wait(timeout=60)
    send_kill(reversed(pids))
    send_kill(reversed(start.tree()[1:]))
    start.process.wait()
    if start.unfinished():
        return "writing"
    kept = [name for name in start.folders() if name[5:].isdigit()]
    torn = [name for name in kept if not Path(start.out, "checkpoints", name, "state").exists()]
    if len(kept) > KEEP or start.changed().intersection(torn):
        return "removing"
    return "training" if start.lines() > start.lines_before else "loading"


def press_ctrl_c(start, launcher, rng):
    """Ctrl-C in one of the first steps -> None if the run had ended before."""
    first = start.lines_before + rng.randint(1, 4)
    start.wait(lambda: start.lines() >= first)
    time.sleep(rng.uniform(0, 0.1))
    if start.process.poll() is not None:
        return None
    os.killpg(start.process.pid, signal.SIGINT)
    assert start.process.wait(timeout=60) != 0
    # torchrun shows a traceback of its own.
    assert launcher or "Traceback" not in start.text(), start.text()[-3000:]
    assert "stopped" in start.text(), start.text()[-3000:]
    return "ctrl-c"


def differences(out, reference):
    """What a run has left that the undisturbed one has not, in words; none: []."""
    found = []
    ours, theirs = ({m["step"]: m for m in metrics(folder)} for folder in (out, reference))
    missing = sorted(theirs.keys() - ours.keys())
    if missing:
        found.append(f"no line of steps {missing}")
    steps = [step for step in ours if ours[step] != theirs.get(step)]
    if steps:
        found.append(f"other lines of steps {steps}")
    ours, theirs = all_weights(out), all_weights(reference)
    names = [n for n in theirs if n not in ours or not torch.equal(ours[n], theirs[n])]
    if names or ours.keys() != theirs.keys():
        found.append(f"other weights {names}")
    for part in ("model", "checkpoints"):
        ours, theirs = (set(os.listdir(folder / part)) for folder in (out, reference))
        if ours != theirs:
            found.append(f"{part}/ has also {sorted(ours - theirs)}, not {sorted(theirs - ours)}")
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_killed_runs_end_as_undisturbed_ones(kind, flags, finetune_flags, tmp_path, capsys):
    stage, launcher, extra = KINDS[kind]
    own = f"--max_steps {STEPS} --save_every 2 --keep {KEEP} --resume".split()
    stage_flags = dict(pretrain=flags, finetune=finetune_flags)[stage]
    command = [*launcher, str(ROOT / "train.py"), *stage_flags, *own, *extra, "--out_dir"]
    reference = tmp_path / "reference"
    times = [time.monotonic()]
    start = Start([*command, str(reference)], reference)
    for wanted in (True, False, True, False):  # the second checkpoint: the first takes longer
        start.wait(lambda: bool(start.unfinished()) == wanted)  # noqa: B023
        times.append(time.monotonic())
    assert start.process.wait() == 0, start.text()
    seconds = dict(run=time.monotonic() - times[0], write=times[4] - times[3])

    share = int(os.environ["KILLS"]) // len(KINDS)
    counts, wrong, runs = Counter(), [], 0
    moments = MOMENTS * (share // len(MOMENTS) + 1)
    random.Random(kind).shuffle(moments)
    while counts.total() < share:
        rng = random.Random(f"{kind} {runs}")
        out = tmp_path / f"run_{runs}"
        runs += 1
        history = []
        for moment in moments[counts.total() :][: min(KILLS_PER_RUN, share - counts.total())]:
            start = Start([*command, str(out)], out)
            if moment == "ctrl-c":
                met = press_ctrl_c(start, launcher, rng)
                history.append(f"Ctrl-C, line {start.lines()}")
            else:
                met = kill(start, moment, seconds, rng)
                where = start.unfinished() or f"line {start.lines()}"
                history.append(f"SIGKILL while {met}, {where}")
            if met is None:
                break
            counts[met] += 1
        start = Start([*command, str(out)], out)
        if start.process.wait() != 0:
            wrong.append(f"{out}: {history}; then {start.text()[-2000:]}")
        else:
            wrong += [f"{out}: {history}: {what}" for what in differences(out, reference)]
    shown = ", ".join(f"{n} {met}" for met, n in counts.most_common())
    summary = f"{kind}: {counts.total()} kills ({shown}) in {runs} runs: "
    with capsys.disabled():
        print("\n" + summary + ("\n  ".join(["", *wrong]) if wrong else "all equal"))
    assert not wrong, "see above"


if __name__ == "__main__":
    os.environ["KILLS"] = sys.argv[1]
    sys.exit(pytest.main([__file__, "--quiet", "--tb=line", "--disable-warnings"]))
