"""Pictures of training runs: curves over their steps, the embeddings of Figure 2, gains (Table 2).

    python -m tools.curves --model out/pretrain --baseline out/pretrain_baseline

Needs matplotlib, and scikit-learn for t-SNE.
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


def compare(
    model: str,
    baseline: str,
    out: str = "figures",
    data: str = "",
    image_folder: str = "",
    samples: int = 100,
    llm: str = "",
    vision: str = "",
):
    """Compare the baseline with SEA, by the results in the folders of their training runs.

    Prints all benchmarks measured for both, and the average of their relative gains (Table 2, where
    it is 7.61 % for Gemma-2B). Draws, of stage 1, tsne.png (Figure 2) and curves.png (Figure 5:
    TACS, and POPE if eval.py measured it for several checkpoints); of stage 2 curves.png (Figure
    3a: what eval.py or lm-evaluation-harness measured for several checkpoints).

    PAPER: how MMLU is asked for Figure 3a is not said; 5 examples before each question are usual.
    """
    histories = {}
    groups = {}
    for kind, path in (("baseline", baseline), ("SEA", model)):
        run = find_run(path, llm, vision)
        if not run.folder:
            raise UserError(f"{path}: not of a training run, whose metrics.jsonl can be drawn")
        histories[kind] = history(run.folder)
        if data or run.config["stage"] == "pretrain":
            groups[kind] = token_groups(run, data, image_folder, samples)
    draw_comparison(histories, groups, Path(out))


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


# Names of the measures that are drawn: TACS, POPE's F1, and "... all" of each benchmark, but not
# what is said of words: "true all" and, if the word "all" is frequent, "words all".
SCORES = r"(val_)?tacs|pope f1|(?!words |true ).* all"


def draw_comparison(histories, groups, folder):
    """Draw folder/tsne.png and folder/curves.png, and print the gains.

    histories: {"baseline": history, "SEA": history}. groups: of draw_tsne; there may be none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if groups:
        draw_tsne(groups, folder / "tsne.png")
    measures = {name: name for name in histories["SEA"] if re.fullmatch(SCORES, name)}
    seeds = {kind: [values] for kind, values in histories.items()}  # a list of one
    draw_curves(seeds, measures, folder / "curves.png")
    benchmarks = [name for name in measures if "tacs" not in name]
    print_gains(histories["baseline"], histories["SEA"], benchmarks)


def print_gains(before, after, measures):
    """Print what two histories have of these measures at their last common step, and the mean of
    the relative gains; measures that were 0 have none."""
    gains = []
    for name in measures:
        for step in sorted(before.get(name, {}).keys() & after[name].keys())[-1:]:
            old = before[name][step]
            new = after[name][step]
            print(f"{name:30} {old:8.3f} -> {new:.3f} at step {step}")
            if old:
                gains.append(new / old - 1)
    if gains:
        print(f"average relative gain of {len(gains)} benchmarks: {np.mean(gains):+.2%}")


def draw_curves(runs, measures, file):
    """Measures over the steps of training, a panel each: mean over seeds, their range as a band.

    runs: {kind: [history of each seed]}, measures: {measure: title}. Measures that any run has at
    fewer than two steps are left out.
    """
    import matplotlib.pyplot as plt

    all_seeds = sum(runs.values(), [])
    names = [name for name in measures if all(len(seed.get(name, ())) > 1 for seed in all_seeds)]
    if not names:
        print(f"no {file}: it takes a measure at several steps of every run (--val_data)")
        return

    width = 5 * len(names)
    figure, panels = plt.subplots(1, len(names), squeeze=False, figsize=(width, 4))
    for axes, name in zip(panels[0], names):
        for kind, seeds in runs.items():
            steps = sorted(set.intersection(*(set(seed[name]) for seed in seeds)))
            values = np.array([[seed[name][step] for step in steps] for seed in seeds])
            axes.plot(steps, values.mean(0), marker="o", markersize=3, label=kind)
            axes.fill_between(steps, values.min(0), values.max(0), alpha=0.2)
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
    run_command(__doc__, compare, argv)


if __name__ == "__main__":
    cli(main)
