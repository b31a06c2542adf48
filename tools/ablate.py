"""What matters in SEA: the toy's runs with parts of it changed, one at a time.

    python -m tools.ablate              all variants, three seeds, both stages; docs/toy.md's table
    python -m tools.ablate --report     captions only beside SEA: their tables and figures
    torchrun --nproc_per_node=8 -m tools.ablate repeated_labels --out_dir out/repeated_labels
                                        a variant, with train.py's flags

A variant has flags of stage 1, or puts a function of its own in the place of one of the method's.
A finished run has a file `done` in its folder and is not repeated: remove the folder after a change
of the toy or the code.
"""

import shlex
import shutil
import sys
import traceback
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import loss
import train
from data import UserError, cli, run_command
from eval import find_run
from loss import contrastive_loss, cosines, sample_labels
from model import checkpoints
from tools.curves import draw_curves, draw_tsne, history, token_groups
from tools.look import look_at_words
from tools.toy import ensure, label, two_workers

# ----------------------------------------------------------------------- what takes a part's place


def keep_all(labels, generator=None, priority=None):
    """Every patch with a label makes a pair, in place of one_patch_per_label."""
    return (labels >= 0).nonzero().flatten()


def sample_uniformly(label_ids, label_scores, generator=None):
    """All labels of a patch are as likely, in place of Eq. 9."""
    return sample_labels(label_ids, label_scores.sign(), generator)


def with_fixed_tau(x, t, log_scale):
    """Eq. 11 without learning τ. Times zero, for DDP waits for a gradient of log_scale."""
    return contrastive_loss(x, t, log_scale.detach()) + 0 * log_scale.sum()


def three_best_labels(label_ids, label_scores, generator=None):
    """Of the three best labels of a patch, in place of all."""
    return sample_labels(label_ids[..., :3], label_scores[..., :3], generator)


def patches_find_words(x, t, log_scale):
    """The first sum of Eq. 11 alone."""
    with torch.autocast(x.device.type, enabled=False):  # as in contrastive_loss
        logits = log_scale.exp() * cosines(x, t)
        own = torch.arange(len(x), device=x.device)
        return F.cross_entropy(logits, own, reduction="sum") / max(1, len(x))


def words_find_patches(x, t, log_scale):
    """The second sum of Eq. 11 alone."""
    return patches_find_words(t, x, log_scale)


# ---------------------------------------------------------------------------------------- variants


class Variant(NamedTuple):
    flags: str = ""  # of train.py, stage 1
    part: str = ""  # the name of a function of loss.py,
    function: object = None  # and what takes its place


MAIN_VARIANTS = {"baseline": Variant("--sea_weight 0"), "SEA": Variant()}
TEN_LABELS = "--labels toy/labels_n10"
VARIANTS = MAIN_VARIANTS | {
    "weight_0.1": Variant("--sea_weight 0.1"),
    "weight_10": Variant("--sea_weight 10"),
    "no_windows": Variant("--window 1"),
    "repeated_labels": Variant("", "one_patch_per_label", keep_all),
    "fixed_tau": Variant("", "contrastive_loss", with_fixed_tau),
    "tau_0.07": Variant("--tau 0.07"),
    "patches_find_words": Variant("", "contrastive_loss", patches_find_words),
    "words_find_patches": Variant("", "contrastive_loss", words_find_patches),
    "labels_10": Variant(TEN_LABELS),
    "labels_10_uniform": Variant(TEN_LABELS, "sample_labels", sample_uniformly),
    "labels_3": Variant(TEN_LABELS, "sample_labels", three_best_labels),
}


def changed(variant):
    """A context in which the variant's function stands in the place of the method's."""
    if not variant.part:
        return ExitStack()  # nothing is changed
    return patch.object(loss, variant.part, variant.function)


# -------------------------------------------------------------------------------------------- runs

# The commands of a run: its training, and what is measured of it. One that names step_* is for all
# checkpoints, in the order of their steps.
SCRIPT = """\
train --preset toy --seed {seed} --out_dir '{run}/pretrain' {flags} --val_every {val_every}
eval tacs --model '{run}/pretrain' --samples 250
eval gap --model '{run}/pretrain' --samples 250
tools.look words --model '{run}/pretrain' --samples 250 --truth toy/truth.json \
    --out '{run}/words.html'
train --preset toy --stage finetune --seed {seed} --keep 0 --val_every {val_every} \
    --init '{run}/pretrain' --out_dir '{run}/finetune'
eval pope --model '{run}/finetune' --data toy/pope {common}
eval vqa --model '{run}/finetune' --data toy/val_qa.json {common}
eval vqa --model '{run}/finetune' --data toy/val_text.json {common}
"""
CURVES = """\
eval pope --model '{run}/pretrain/checkpoints/step_*' --data toy/pope {common}
eval vqa --model '{run}/finetune/checkpoints/step_*' --data toy/val_text.json {common}
"""
COMMON = "--image_folder toy/images --workers 0 --prompt ''"
ALIGNMENT = {  # after stage 1
    "tacs": "TACS",
    "D_of_unit_vectors": "D, unit vectors",
    "true object": "true words, objects",
    "true background": "background",
    "caption_loss": "caption loss",
}
ANSWERS = {  # after stage 2
    "pope f1": "POPE F1",
    "pope accuracy": "POPE accuracy",
    "val_qa yes/no": "yes/no questions",
    "val_qa open": "open questions",
    "val_text all": "text only",
}


def do_run(name, run, script):
    """Run the commands of a variant in this process and log what they print, unless `run` is done.

    Raises UserError with the end of the log where a command fails.
    """
    if (run / "done").exists():
        return
    shutil.rmtree(run, ignore_errors=True)  # what was interrupted
    run.mkdir(parents=True)
    log = run / "log.txt"
    with open(log, "w", buffering=1) as file, redirect_stdout(file), redirect_stderr(file):
        for command in script.splitlines():
            try:
                with changed(VARIANTS[name]):
                    do_command(command)
            except (Exception, SystemExit) as error:
                traceback.print_exc()
                end = log.read_text()[-800:]
                raise UserError(f"{command}\nfailed; the end of {log}:\n{end}") from error
    (run / "done").touch()


def do_command(command):
    """Call the main function of a program, once or for every checkpoint of a step_*."""
    program, *argv = shlex.split(command)
    main_function = import_module(program).main
    pattern = next((Path(word) for word in argv if word.endswith("step_*")), None)
    if not pattern:
        main_function(argv)
        return
    for folder in checkpoints(pattern.parents[1]).values():
        main_function([str(folder) if word.endswith("step_*") else word for word in argv])


def do_runs(names, seeds, out):
    """Train and measure variants, two at a time, and print their tables.

    -> {name: [history of each seed]} of stage 1 and of stage 2.
    """
    runs = []
    for seed in range(seeds):
        for name in names:
            run = out / f"{name}_{seed}"
            has_curves = name in MAIN_VARIANTS
            script = (SCRIPT + CURVES * has_curves).format(
                seed=seed,
                run=run,
                flags=VARIANTS[name].flags,
                val_every=30 if has_curves else 180,
                common=COMMON,
            )
            runs.append((name, run, script))
    with two_workers() as pool:
        list(tqdm(pool.map(do_run, *zip(*runs)), desc="runs", total=len(runs)))

    stages = []
    for stage, measures in (("pretrain", ALIGNMENT), ("finetune", ANSWERS)):
        histories = {}
        for name in names:
            histories[name] = [history(out / f"{name}_{seed}/{stage}") for seed in range(seeds)]
        print_table(stage, histories, measures)
        stages.append(histories)
    return stages


def print_table(title, runs, measures):
    """Print the last value of each measure as Markdown: mean ± half the range over the seeds.

    runs: {variant: [history of each seed]}, measures: {name: title}.
    """
    print(f"\n| {title} | {' | '.join(measures.values())} |\n|---|{'---|' * len(measures)}")
    for variant, histories in runs.items():
        row = f"| {variant} |"
        for measure in measures:
            curves = [seed_history[measure] for seed_history in histories]  # {step: value} each
            values = [curve[max(curve)] for curve in curves]
            row += f" {np.mean(values):.3f} ± {np.ptp(values) / 2:.3f} |"
        print(row)


# ---------------------------------------------------------------------------------------- commands


def ablate(seeds: int = 3, out: Path = Path("out/ablate"), report: bool = False):
    """Train and measure all variants; print their tables.

    Labels are CLIP's best word of each patch; labels_10 are its ten best words, of which most are
    wrong. labels_10_uniform and labels_3, the three best of these ten, are to be compared with it.
    report: only baseline and SEA, with the figures of docs/toy.md.
    """
    if report:
        import matplotlib  # noqa: F401
        import sklearn  # noqa: F401  fails here rather than after the training
    ensure()
    if not report:
        label("labels_n10", n=10)
        do_runs(VARIANTS, seeds, out)
        return

    pretrained, finetuned = do_runs(MAIN_VARIANTS, seeds, out)
    figures = out / "figures"
    figures.mkdir(exist_ok=True)
    learning = {"val_tacs": "TACS", "pope f1": "POPE, F1"}
    draw_curves(pretrained, learning, figures / "pretraining.png")
    language = {"val_text all": "language: text-only questions"}
    draw_curves(finetuned, language, figures / "language.png")
    folders = {name: f"{out}/{name}_0/pretrain" for name in MAIN_VARIANTS}
    groups = {name: token_groups(find_run(run)) for name, run in folders.items()}
    draw_tsne(groups, figures / "tsne.png")
    look_at_words(folders["SEA"], folders["baseline"], out=f"{figures}/words.html")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0].startswith("-"):
        return run_command(__doc__, ablate, argv)
    if argv[0] not in VARIANTS:
        raise UserError(f"{argv[0]}: no variant; there are {', '.join(VARIANTS)}")
    variant = VARIANTS[argv[0]]
    with changed(variant):
        train.main([*shlex.split(variant.flags), *argv[1:]])


if __name__ == "__main__":
    cli(main)
    if dist.is_initialized():
        dist.destroy_process_group()
