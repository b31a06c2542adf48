"""What matters in SEA: the toy's runs with parts of it changed, one at a time, and its controls.

    python -m tools.ablate              all variants, three seeds, both stages; docs/toy.md's tables
    python -m tools.ablate --group labels       those of one group beside the baseline and SEA
    python -m tools.ablate --report     captions only beside SEA: their tables and figures
    torchrun --nproc_per_node=8 -m tools.ablate words_exchanged --out_dir out/words_exchanged
                                        a variant, with train.py's flags

A variant has flags of stage 1, or puts a function of its own in the place of one of the method's.
A finished run has a file `done` in its folder and is not repeated: remove the folder after a change
of the toy or the code.
"""

import json
import math
import random
import shlex
import shutil
import sys
import traceback
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Literal, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import train
from data import UserError, cli, load_samples, run_command
from eval import (
    encode_images,
    encode_words,
    find_run,
    open_captions,
    pope_metrics,
    read_pope,
    save_result,
    tacs,
)
from labels import LabelStore, label_files, write_file
from loss import contrastive_loss, cosines, sample_labels
from model import SEAModel, checkpoints
from tools.curves import draw_curves, draw_tsne, history, token_groups
from tools.look import look_at_words
from tools.toy import WORDS, ensure, label, two_workers

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


# Labels that are wrong on purpose, in place of sample_labels. [B, m, n] each.


def of_another_patch(label_ids, label_scores, generator=None):
    """Labels of the same image, shuffled among its patches: of the image, not of the token."""
    noise = torch.rand(label_ids.shape[:2], generator=generator)
    order = noise.argsort(1).unsqueeze(2).expand_as(label_ids)
    return sample_labels(label_ids.gather(1, order), label_scores.gather(1, order), generator)


def of_another_image(label_ids, label_scores, generator=None):
    """Labels of the same patch in another image of the batch."""
    return sample_labels(label_ids.roll(1, 0), label_scores.roll(1, 0), generator)


def random_words(label_ids, label_scores, generator=None):
    """Labels of any patch of any image: words as frequent as they were, and nothing more."""
    order = torch.randperm(label_ids[..., 0].numel(), generator=generator)
    label_ids, label_scores = (x.flatten(0, 1)[order].view_as(x) for x in (label_ids, label_scores))
    return sample_labels(label_ids, label_scores, generator)


def without_every_third_word(label_ids, label_scores, generator=None):
    """Every third word of the list is never a label: whether alignment reaches it, too."""
    return sample_labels(label_ids.masked_fill(label_ids % 3 == 0, -1), label_scores, generator)


set_words = SEAModel.set_words


def exchange_words(model, words):
    """Each word has the meaning of another, always the same: clusters stay, meaning does not."""
    set_words(model, random.Random(0).sample(words, len(words)))


# ---------------------------------------------------------------------------------------- variants


class Variant(NamedTuple):
    flags: str = ""  # of train.py, stage 1
    part: str = ""  # the name of a function of the method,
    function: object = None  # and what takes its place


MAIN_VARIANTS = {"baseline": Variant("--sea_weight 0"), "SEA": Variant()}
LONG = "--max_steps 360"
FAST = "--lr 3e-3"
SLOW = "--lr 3.3e-4"
TEN_LABELS = "--labels toy/labels_n10"
# What is compared with baseline and SEA, by the question that it asks
GROUPS = {
    "parts": {
        "weight_0.1": Variant("--sea_weight 0.1"),
        "weight_10": Variant("--sea_weight 10"),
        "no_windows": Variant("--window 1"),
        "repeated_labels": Variant("", "loss.one_patch_per_label", keep_all),
        "fixed_tau": Variant("", "loss.contrastive_loss", with_fixed_tau),
        "patches_find_words": Variant("", "loss.contrastive_loss", patches_find_words),
        "words_find_patches": Variant("", "loss.contrastive_loss", words_find_patches),
    },
    "labels": {
        "true_labels": Variant("--labels toy/labels_truth"),
        "another_patch": Variant("", "loss.sample_labels", of_another_patch),
        "another_image": Variant("", "loss.sample_labels", of_another_image),
        "words_exchanged": Variant("", "model.SEAModel.set_words", exchange_words),
        "random_words": Variant("", "loss.sample_labels", random_words),
        "without_a_third": Variant("", "loss.sample_labels", without_every_third_word),
    },
    "drawing": {
        "labels_10": Variant(TEN_LABELS),
        "labels_10_uniform": Variant(TEN_LABELS, "loss.sample_labels", sample_uniformly),
        "labels_10_sharp": Variant(f"{TEN_LABELS} --sharpness 100"),
        "labels_3": Variant(TEN_LABELS, "loss.sample_labels", three_best_labels),
    },
    "effort": {
        "baseline_long": Variant(f"--sea_weight 0 {LONG}"),
        "SEA_long": Variant(LONG),
        "baseline_fast": Variant(f"--sea_weight 0 {FAST}"),
        "SEA_fast": Variant(FAST),
        "baseline_slow": Variant(f"--sea_weight 0 {SLOW}"),
        "SEA_slow": Variant(SLOW),
    },
    "batch": {
        "batch_2": Variant("--batch_size 2 --grad_accum 8"),
        "batch_4": Variant("--batch_size 4 --grad_accum 4"),
        "window_4": Variant("--window 4"),
        "tau_0.34": Variant("--tau 0.34"),
        "tau_0.07": Variant("--tau 0.07"),
    },
}
# The blue line of Figure 3a: stage 2 begins with an adapter that has learnt nothing.
NO_STAGE_1 = "no_stage_1"
VARIANTS = MAIN_VARIANTS | {NO_STAGE_1: Variant()}
for _variants in GROUPS.values():
    VARIANTS |= _variants


def changed(variant):
    """A context in which the variant's function stands in the place of the method's."""
    if not variant.part:
        return ExitStack()  # nothing is changed
    return patch(variant.part, variant.function)


# -------------------------------------------------------------------------------------------- runs

# The commands of a run: its training, and what is measured of it. One that names step_* is for all
# checkpoints, in the order of their steps.
SCRIPT = """\
train --preset toy --seed {seed} --out_dir '{run}/pretrain' {flags} --val_every {val_every}
eval tacs --model '{run}/pretrain' --samples 250
eval gap --model '{run}/pretrain' --samples 250
tools.ablate tacs_of_parts --model '{run}/pretrain'
tools.look words --model '{run}/pretrain' --samples 250 --truth toy/truth_parts.json \
    --out '{run}/words.html'
train --preset toy --stage finetune --seed {seed} --keep 0 --val_every {val_every} \
    {start} --out_dir '{run}/finetune'
eval pope --model '{run}/finetune' --data toy/pope {common}
eval vqa --model '{run}/finetune' --data toy/val_qa.json {common}
eval vqa --model '{run}/finetune' --data toy/val_text.json {common}
eval tacs --model '{run}/finetune' {captions}
eval gap --model '{run}/finetune' {captions} --words toy/words.txt
tools.look words --model '{run}/finetune' {captions} --words toy/words.txt \
    --truth toy/truth_parts.json --out '{run}/words_finetune.html'
"""
CURVES = """\
eval pope --model '{run}/pretrain/checkpoints/step_*' --data toy/pope {common}
eval vqa --model '{run}/pretrain' --data toy/val_text.json {common}
eval vqa --model '{run}/finetune/checkpoints/step_*' --data toy/val_text.json {common}
"""
COMMON = "--image_folder toy/images --workers 0 --prompt ''"
CAPTIONS = "--data toy/val.json --image_folder toy/images --samples 250"
ALIGNMENT = {
    "tacs": "TACS",
    "D_of_unit_vectors": "D, unit vectors",
    "true object": "true words, objects",
    "true background": "background",
}
PARTS = {
    "true every third word": "true words, every third",
    "true other words": "true words, others",
    "tacs every third word": "TACS, every third word",
    "tacs other words": "TACS, others",
}
BEFORE = ALIGNMENT | {"caption_loss": "caption loss"}
ANSWERS = {
    "pope f1": "POPE F1",
    "pope accuracy": "POPE accuracy",
    "pope toy_pope_color accuracy": "colours",
    "pope toy_pope_pattern accuracy": "patterns",
    "pope toy_pope_shape accuracy": "shapes",
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
            is_stage_1 = command.startswith("train ") and "finetune" not in command
            try:
                with changed(VARIANTS[name]) if is_stage_1 else ExitStack():
                    do_command(command)
            except (Exception, SystemExit) as error:
                traceback.print_exc()
                end = log.read_text()[-800:]
                raise UserError(f"{command}\nfailed; the end of {log}:\n{end}") from error
    (run / "done").touch()


def tacs_of_parts(model: str):
    """TACS where the text tokens are one part of a caption's words: those that
    without_every_third_word leaves out, or the others. Captions without such words do not count."""
    run = find_run(model)
    sea, captions = open_captions(run, "", "", 250)
    features = encode_words(sea, WORDS)
    x_v = encode_images(sea, captions).unflatten(0, (len(captions), -1))
    scores = {part: [] for part in words_in_parts()}
    for visual_tokens, sample in zip(x_v, captions.samples):
        caption = sample["conversations"][1]["value"].rstrip(".").split()
        for part, words in words_in_parts().items():
            numbers = [i for i, word in enumerate(WORDS) if word in words.intersection(caption)]
            if numbers:
                scores[part].append(tacs(visual_tokens, features[numbers]).item())
    return save_result(run, {"tacs": {part: np.mean(values) for part, values in scores.items()}})


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
            runs.append((name, run, script_of(name, seed, run)))
    with two_workers() as pool:
        list(tqdm(pool.map(do_run, *zip(*runs)), desc="runs", total=len(runs)))

    histories = {}
    for stage in ("pretrain", "finetune"):
        folders = {
            name: [out / f"{name}_{seed}" / stage for seed in range(seeds)] for name in names
        }
        histories[stage] = {
            name: [history(folder) for folder in of_seeds]
            for name, of_seeds in folders.items()
            if of_seeds[0].exists()
        }
    print_table("after stage 1", histories["pretrain"], BEFORE)
    print_table("after stage 1, by word", histories["pretrain"], PARTS)
    print_table("after stage 2: answers", histories["finetune"] | always(), ANSWERS)
    print_table("after stage 2: alignment", histories["finetune"], ALIGNMENT)
    return histories["pretrain"], histories["finetune"]


def script_of(name, seed, run):
    """The commands of a variant."""
    has_curves = name in (*MAIN_VARIANTS, NO_STAGE_1)
    lines = (SCRIPT + CURVES * has_curves).replace("\\\n", "").splitlines()
    start = f"--init '{run}/pretrain'"
    if name == NO_STAGE_1:
        lines = [line for line in lines if "/pretrain" not in line]
        start = "--llm toy/llm --vision toy/vision"
    return "\n".join(lines).format(
        seed=seed,
        run=run,
        flags=VARIANTS[name].flags,
        start=start,
        val_every=30 if has_curves else 360,
        common=COMMON,
        captions=CAPTIONS,
    )


def always():
    """What is measured where all answers are alike: {"always yes": [history], ...}."""
    questions = {file.stem: read_pope(file) for file in sorted(Path("toy/pope").glob("*.json"))}
    histories = {}
    for said in ("yes", "no"):
        measures = {}
        for name, rows in questions.items():
            truths = [row["label"] == "yes" for row in rows]
            measures[name] = pope_metrics([said == "yes"] * len(truths), truths)
        mean = {
            metric: np.mean([values[metric] for values in measures.values()])
            for metric in ("f1", "accuracy")
        }
        scores = {f"pope {metric}": {0: value} for metric, value in mean.items()}
        for name, values in measures.items():
            scores[f"pope {name} accuracy"] = {0: values["accuracy"]}
        histories[f"always {said}"] = [scores]
    return histories


def print_table(title, runs, measures):
    """Print the last value of each measure as Markdown: mean ± half the range over the seeds.

    runs: {variant: [history of each seed]}, measures: {name: title}.
    """
    print(f"\n| {title} | {' | '.join(measures.values())} |\n|---|{'---|' * len(measures)}")
    for variant, histories in runs.items():
        cells = []
        for measure in measures:
            curves = [of_seed[measure] for of_seed in histories if measure in of_seed]
            values = [curve[max(curve)] for curve in curves]  # {step: value} each
            cells.append(f"{np.mean(values):.3f} ± {np.ptp(values) / 2:.3f}" if values else "")
        print(f"| {variant} | {' | '.join(cells)} |")


# ---------------------------------------------------------------------------------- what they need


def prepare():
    """The label stores of the variants, and the truth by whether a word is ever a label."""
    label("labels_n10", n=10)
    if not Path("toy/labels_truth/meta.json").exists():
        write_true_labels(Path("toy/labels_truth"))
    write_file(Path("toy/truth_parts.json"), json.dumps(truth_in_parts()))


def write_true_labels(folder):
    """A store like toy/labels of the truth: an object's patch has its colour and its pattern."""
    store = LabelStore("toy/labels")
    truth = json.loads(Path("toy/truth.json").read_text())
    number = {word: i for i, word in enumerate(store.words)}
    meta = store.meta | {"n": 2}
    labels_shape = (math.prod(meta["grid"]), meta["n"])
    record = np.dtype([("ids", np.int32, labels_shape), ("scores", np.float16, labels_shape)])
    labels = np.zeros(len(store), record)
    labels["ids"] = -1
    for row, sample in enumerate(load_samples("toy/train.json")):
        for patches in truth[sample["image"]].values():
            for place, words in patches.items():
                labels["ids"][row, int(place), : len(words)] = [number[word] for word in words]
    labels["scores"] = labels["ids"] >= 0
    size = meta["shard"]
    for k, file in enumerate(label_files(folder, meta)):
        write_file(file, labels[k * size : (k + 1) * size])
    for file in ("words.txt", "words.npy"):
        shutil.copy(store.folder / file, folder)
    write_file(folder / "meta.json", json.dumps(meta))  # last: now the store is one


def words_in_parts():
    """The words that without_every_third_word leaves out, and the others."""
    left_out = set(WORDS[::3])
    return {"every third word": left_out, "other words": set(WORDS) - left_out}


def truth_in_parts():
    """toy/truth.json, also with the words of each part by themselves.

    A patch counts for a part if one of its words is among them, and then only that word is true.
    """
    truth = json.loads(Path("toy/truth.json").read_text())
    for kinds in truth.values():
        parts = {part: {} for part in words_in_parts()}
        for patches in list(kinds.values()):
            for place, words in patches.items():
                for part, of_part in words_in_parts().items():
                    if found := of_part.intersection(words):
                        parts[part][place] = sorted(found)
        kinds.update(parts)
    return truth


# ---------------------------------------------------------------------------------------- commands


def ablate(
    seeds: int = 3,
    out: Path = Path("out/ablate"),
    group: Literal["all", "parts", "labels", "drawing", "effort", "batch"] = "all",
    report: bool = False,
):
    """Train and measure variants beside the baseline and SEA; print their tables.

    Labels are CLIP's best word of each patch; labels_10 are its ten best words, of which most are
    wrong. labels_10_uniform, _sharp and labels_3, the three best of these ten, are to be compared
    with it.

    seeds: how many runs of each variant
    out: the folder of the runs
    group: which variants
    report: only the baseline, SEA and stage 2 without a stage 1, with the figures of docs/toy.md
    """
    if report:
        import matplotlib  # noqa: F401
        import sklearn  # noqa: F401  fails here rather than after the training
    ensure()
    prepare()
    if not report:
        groups = GROUPS.values() if group == "all" else [GROUPS[group]]
        names = [*MAIN_VARIANTS, NO_STAGE_1, *(name for group in groups for name in group)]
        do_runs(names, seeds, out)
        return

    pretrained, finetuned = do_runs([*MAIN_VARIANTS, NO_STAGE_1], seeds, out)
    figures = out / "figures"
    figures.mkdir(exist_ok=True)
    learning = {"val_tacs": "TACS", "pope f1": "POPE, F1"}
    draw_curves(pretrained, learning, figures / "pretraining.png")
    # Before stage 2: the LLM is as it was before stage 1, and these questions have no image.
    for of_seeds in finetuned.values():
        for of_seed, first in zip(of_seeds, pretrained["baseline"]):
            of_seed["val_text all"][0] = next(iter(first["val_text all"].values()))
    language = {"val_text all": "language: text-only questions"}
    draw_curves(finetuned, language, figures / "language.png")
    folders = {name: f"{out}/{name}_0/pretrain" for name in MAIN_VARIANTS}
    groups = {name: token_groups(find_run(run)) for name, run in folders.items()}
    draw_tsne(groups, figures / "tsne.png")
    look_at_words(
        folders["SEA"], folders["baseline"], truth="toy/truth.json", out=f"{figures}/words.html"
    )


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0].startswith("-"):
        return run_command(__doc__, ablate, argv)
    if argv[0] == "tacs_of_parts":  # a line of SCRIPT
        return run_command(__doc__, tacs_of_parts, argv[1:])
    if argv[0] not in VARIANTS:
        raise UserError(f"{argv[0]}: no variant; there are {', '.join(VARIANTS)}")
    variant = VARIANTS[argv[0]]
    with changed(variant):
        train.main([*shlex.split(variant.flags), *argv[1:]])


if __name__ == "__main__":
    cli(main)
    if dist.is_initialized():
        dist.destroy_process_group()
