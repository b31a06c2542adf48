"""Pictures of training runs: curves over their steps, gains (Table 2), t-SNE (Figure 2).

    python -m tools.curves out/pretrain                           one run
    python -m tools.curves out/pretrain_baseline out/pretrain     the baseline beside SEA
    python -m tools.curves out/pretrain_baseline out/pretrain --tsne      and their embeddings

Needs matplotlib, and scikit-learn for --tsne.
"""

import collections
import json
import math
import re
from pathlib import Path

import numpy as np
import torch

from data import UserError, cli, run_command
from eval import encode_images, find_run, open_captions, read_log, step_in

# ---------------------------------------------------------------------------------------- commands


def draw(
    runs: list[str],
    out: str = "figures",
    tsne: bool = False,
    data: str = "",
    image_folder: str = "",
    samples: int = 100,
    llm: str = "",
    vision: str = "",
):
    """Draw what was measured in training runs, and print how far the others are above the first.

    curves.png has the losses and whatever was measured at several steps: TACS, and what eval.py,
    lmms-eval or lm-evaluation-harness found for several checkpoints (Figures 3a and 5). The average
    relative gain is that over Table 2's benchmarks, where it is 7.61 % for Gemma-2B.

    PAPER: how MMLU is asked for Figure 3a is not said; 5 examples before each question are usual.

    runs: folders of training runs, the baseline first
    out: the folder of the pictures
    tsne: draw tsne.png, too (Figure 2): visual tokens among the LLM's embeddings
    data: captions of the t-SNE's images; by default those of the run
    samples: how many of them
    """
    import matplotlib  # noqa: F401  fails here rather than after the models are loaded

    if tsne:
        import sklearn  # noqa: F401
    folder = Path(out)
    histories = {path: history(folder_of_run(path)) for path in runs}
    first, *others = runs
    for other in others:
        print_gains(first, histories[first], other, histories[other])

    folder.mkdir(parents=True, exist_ok=True)
    untitled = set().union(*histories.values()) - TITLES.keys()
    names = [*TITLES, *sorted(untitled)]
    measures = {name: TITLES.get(name, name) for name in names if re.fullmatch(SCORES, name)}
    each_alone = {path: [values] for path, values in histories.items()}  # lists of one seed
    draw_curves(each_alone, measures, folder / "curves.png")
    if tsne:
        found = {path: find_run(path, llm, vision) for path in runs}
        groups = {
            path: token_groups(run, data, image_folder, samples) for path, run in found.items()
        }
        draw_tsne(groups, folder / "tsne.png")


def folder_of_run(path):
    """The out_dir of a run, which may have no model yet, or the one that a model is of."""
    if Path(path, "metrics.jsonl").is_file():
        return Path(path)
    run = find_run(path)
    if not run.folder:
        raise UserError(f"{path}: not of a training run, whose metrics.jsonl can be drawn")
    return run.folder


@torch.no_grad()
def token_groups(run, data="", image_folder="", samples=100):
    """The embeddings of Figure 2, each [N, D]: of images, of all tokens, of captions' tokens."""
    sea, captions = open_captions(run, data, image_folder, samples)
    texts = [sample["conversations"][1]["value"] for sample in captions.samples]
    caption_ids = sea.tokenizer(texts, add_special_tokens=False).input_ids
    text_ids = torch.tensor(sum(caption_ids, [])).unique()
    embeddings = sea.embed_tokens(torch.arange(sea.vocabulary_size, device=sea.device))
    return {
        "visual tokens": encode_images(sea, captions),
        "LLM's embeddings": embeddings,
        "text tokens": embeddings[text_ids],
    }


# ------------------------------------------------------------------------ measures of training runs


def history(folder):
    """All measurements of a training run -> {measure: {step: value}}; later ones win.

    They come from metrics.jsonl, from eval.jsonl ({"pope": {"f1": 1}} is named "pope f1"), and
    from result files of lmms-eval and lm-evaluation-harness anywhere in the folder ("mmlu all").
    A result file belongs to the step of the last step_N in its path, or else to the run's last.
    """
    folder = Path(folder)
    lines = read_log(folder / "metrics.jsonl")
    last_step = lines[-1]["step"]
    if (folder / "eval.jsonl").exists():
        lines += read_log(folder / "eval.jsonl")
    # The tools put the time into the name: a newer result of the same step comes later.
    for file in sorted(folder.rglob("*results*.json"), key=lambda file: file.name):
        step = step_in(file.relative_to(folder)) or last_step
        lines.append({"step": step} | harness_scores(file))

    measures = collections.defaultdict(dict)
    for line in lines:
        for name, number in numbers_in(line):
            measures[name][line["step"]] = number
    return measures


def numbers_in(values, prefix=""):
    """Yield the name and value of each number in nested dicts: {"a": {"b": 1}} has "a b", 1."""
    for name, value in values.items():
        name = f"{prefix} {name}".strip()
        if isinstance(value, dict):
            yield from numbers_in(value, name)
        elif isinstance(value, (int, float)):
            yield name, value


def harness_scores(file):
    """A result file of lmms-eval or lm-evaluation-harness -> {task: {"all": score}}.

    The score is the first metric with CIDEr (captions), pair (MMVP) or f1 (POPE) in its name, or
    else the task's first. Tasks that belong to a group are left out: the group has its own score.
    """
    scores = {}
    try:
        content = json.loads(file.read_text())
        members = sum(content.get("group_subtasks", {}).values(), [])
        for task, values in content["results"].items():
            metrics = [k for k, v in values.items() if isinstance(v, float) and "stderr" not in k]
            metrics.sort(key=lambda name: not re.search("CIDEr|pair|f1", name))
            if metrics and task not in members:
                scores[task] = {"all": values[metrics[0]]}
    except Exception as e:  # any other shape
        raise UserError(
            f"{file}: not what lmms-eval or lm-evaluation-harness writes ({e!r}); move it out of "
            "the run's folder"
        ) from e
    return scores


# Names of the measures that are drawn: losses, TACS, POPE's F1, and "... all" of each benchmark,
# but not what is said of words: "true all" and, if the word "all" is frequent, "words all".
SCORES = r"loss_[ga]|val_loss|(val_)?tacs|pope f1|(?!words |true ).* all"
TITLES = {
    "loss_g": "caption loss L_g",
    "loss_a": "contrastive loss L_a",
    "val_loss": "caption loss, held-out samples",
    "val_tacs": "TACS, held-out samples",
    "tacs": "TACS",
    "pope f1": "POPE, F1",
}
# Table 2's benchmarks: the measures that count for each, the first that was measured. They have the
# names of lmms-eval's tasks; "pope f1" is of eval.py.
TABLE_2 = {
    "VQAv2": ["vqav2_val all"],
    "TextVQA": ["textvqa_val all"],
    "GQA": ["gqa all"],
    "ScienceQA-IMG": ["scienceqa_img all"],
    "MMBench": ["mmbench_en_dev_static all", "mmbench_en_dev all"],
    "POPE": ["pope all", "pope f1"],
    "VizWiz": ["vizwiz_vqa_val all"],
    "MM-Vet": ["mmvet all"],
}


def print_gains(first, before, other, after):
    """Print the scores of two runs at their last common step, and the mean of the relative gains
    of those in Table 2 that both were measured on. before, after: their histories."""
    gains = {}
    for name in before.keys() & after.keys():
        is_score = re.fullmatch(SCORES, name) and "loss" not in name
        steps = before[name].keys() & after[name].keys()
        if is_score and steps:
            gains[name] = (max(steps), before[name][max(steps)], after[name][max(steps)])
    if not gains:
        return
    print(f"{first} -> {other}")
    for name, (step, old, new) in sorted(gains.items()):
        print(f"{name:30} {old:8.3f} -> {new:.3f} at step {step}")

    of_table_2 = []
    for names in TABLE_2.values():
        found = [gains[name] for name in names if name in gains]
        if found and found[0][1]:  # of zero there is no share
            _, old, new = found[0]
            of_table_2.append(new / old - 1)
    if of_table_2:
        mean = np.mean(of_table_2)
        print(f"average relative gain of {len(of_table_2)} of Table 2's 8 benchmarks: {mean:+.2%}")


def draw_curves(runs, measures, file):
    """Measures over the steps of training, a panel each: mean over seeds, their range as a band.

    runs: {kind: [history of each seed]}, measures: {measure: title}. A run that has a measure at
    fewer than two steps has no line. Of more than 50 steps averages are drawn.
    """
    import matplotlib.pyplot as plt

    lines = collections.defaultdict(dict)
    for name in measures:
        for kind, seeds in runs.items():
            common = set.intersection(*(set(seed.get(name, ())) for seed in seeds))
            if len(common) > 1:
                lines[name][kind] = common
    if not lines:
        print(f"no {file}: it takes a measure at several steps of a run")
        return

    columns = min(4, len(lines))
    rows = math.ceil(len(lines) / columns)
    size = (5 * columns, 4 * rows)
    figure, panels = plt.subplots(rows, columns, squeeze=False, figsize=size, layout="constrained")
    for axes in panels.flat[len(lines) :]:
        axes.remove()
    for axes, (name, kinds) in zip(panels.flat, lines.items()):
        for number, (kind, seeds) in enumerate(runs.items()):
            if kind not in kinds:
                continue
            steps = np.array(sorted(kinds[kind]))
            values = np.array([[seed[name][step] for step in steps] for seed in seeds])
            parts = np.array_split(np.arange(len(steps)), min(50, len(steps)))
            steps = np.array([steps[part].mean() for part in parts])
            values = np.stack([values[:, part].mean(1) for part in parts], 1)
            color = f"C{number}"  # a run's is the same in all panels
            axes.plot(steps, values.mean(0), color, marker="o", markersize=3, label=kind)
            axes.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.2)
        axes.set(title=measures[name], xlabel="steps")
        axes.legend()
    save_figure(figure, file)


# --------------------------------------------------------------------------------- token embeddings


def draw_tsne(groups, file, max_points=1000):
    """Token embeddings in a common t-SNE (Figure 2), a panel for each kind of run.

    groups: {kind: {name: [N, D]}}; of each at most max_points are drawn, evenly spaced.

    PAPER: the distance is the cosine's, as in Eq. 4 and TACS. Under the Euclidean distance, visual
    tokens would be separate from words by their norms alone, however well they are aligned.
    """
    import matplotlib.pyplot as plt
    from sklearn.manifold import TSNE

    if len({x.shape[1] for tokens in groups.values() for x in tokens.values()}) > 1:
        raise UserError("t-SNE takes runs of the same LLM: these have embeddings of several widths")
    parts = []
    for tokens in groups.values():
        for x in tokens.values():
            parts.append(x[:: math.ceil(len(x) / max_points)].float().cpu())
    tsne = TSNE(metric="cosine", init="random", random_state=0)
    points = torch.from_numpy(tsne.fit_transform(torch.cat(parts)))
    points_of_parts = iter(points.split([len(part) for part in parts]))

    figure, panels = plt.subplots(1, len(groups), squeeze=False, figsize=(5 * len(groups), 5))
    for axes, (kind, tokens) in zip(panels[0], groups.items()):
        axes.set(title=kind, xticks=[], yticks=[])
        axes.set_prop_cycle(color=["tab:orange", "tab:blue", "gold"])
        for name in tokens:
            axes.scatter(*next(points_of_parts).T, s=8, label=name)
    figure.legend(*axes.get_legend_handles_labels(), loc="lower center", ncols=3)
    save_figure(figure, file)


def save_figure(figure, file):
    figure.savefig(file, dpi=150, bbox_inches="tight")
    print(f"wrote {file}")


def main(argv=None):
    run_command(__doc__, draw, argv)


if __name__ == "__main__":
    cli(main)
