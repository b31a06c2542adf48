"""Every picture, and the histories of training runs that curves and radars are drawn from.

draw_words needs only Pillow. The others need matplotlib, and draw_tsne scikit-learn; they are
imported where they are used.
"""

import collections
import json
import math
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.functional import to_pil_image, to_tensor
from torchvision.utils import save_image

from data import UserError, read_json_lines

# ------------------------------------------------------------------------------- words over patches

# Colours of the most frequent words of a sheet, the most frequent first.
PALETTE = (
    "#ff0000 #00d000 #0040ff #ffe000 #ff00ff #00e0ff #ff8000 #8000ff #006000 #a0ff00 #ff80c0 "
    "#008080 #804000 #0000a0 #ffb060 #a00060 #00ffa0 #80a0ff #808000 #c060ff"
)
GREY = "#808080"  # of all other words
CELL = 48  # pixels along the side of a patch: room for a word


def draw_words(pictures, grid, columns, file):
    """A sheet of pictures in `columns` columns, each patch in the colour of its word (Figure 1a).

    pictures: pairs of pixels [3, S, S] in 0..1 and a list of m words, "" for a patch without one.
    An empty list leaves the image plain. grid: (H, W) patches.
    """
    counts = collections.Counter(word for _, words in pictures for word in words if word)
    by_frequency = sorted(counts, key=counts.get, reverse=True)
    colors = collections.defaultdict(lambda: GREY, zip(by_frequency, PALETTE.split()))
    tiles = [draw_tile(pixels, words, grid, colors) for pixels, words in pictures]
    save_image(tiles, file, nrow=columns, padding=12, pad_value=1, format="png")
    print(f"wrote {file}")


def draw_tile(pixels, words, grid, colors):
    """One picture, and below it a legend: its W most frequent words and their counts."""
    H, W = grid
    image = to_pil_image(pixels.clamp(0, 1)).resize((W * CELL, H * CELL), Image.Resampling.LANCZOS)
    tile = Image.new("RGB", (W * CELL, (H + 1) * CELL + 8), "white")
    tile.paste(image.convert("L") if words else image)  # grey below the colors of words
    draw = ImageDraw.Draw(tile, "RGBA")

    for patch, word in enumerate(words):
        if word:
            row, column = divmod(patch, W)
            draw_cell(draw, column * CELL, row * CELL, word, colors[word])
    legend = collections.Counter(filter(None, words)).most_common(W)
    for column, (word, count) in enumerate(legend):
        draw_cell(draw, column * CELL, H * CELL + 8, f"{word}\n{count}", colors[word])
    return to_tensor(tile)


def draw_cell(draw, left, top, text, color):
    """A square of CELL pixels in a transparent color, with text in the middle."""
    draw.rectangle((left, top, left + CELL - 1, top + CELL - 1), color + "64")  # hex: 40 % opaque
    word = text.split("\n")[0]
    draw.text(
        (left + CELL / 2, top + CELL / 2),
        text,
        "white",
        ImageFont.load_default(min(CELL / 4, 1.7 * CELL / len(word))),  # long words are small
        anchor="mm",
        align="center",
        stroke_width=1,
        stroke_fill="black",
    )


# ------------------------------------------------------------------------ measures of training runs


def history(folder):
    """All measurements of a training run -> {measure: {step: value}}; later ones win.

    They come from metrics.jsonl, from eval.jsonl ({"pope": {"f1": ...}} is named "pope f1"), and
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
        for name, value in line.items():
            parts = value if isinstance(value, dict) else {"": value}
            for part, number in parts.items():
                if isinstance(number, (int, float)):
                    measures[f"{name} {part}".strip()][line["step"]] = number
    return measures


def read_log(file):
    """The lines of a run's metrics.jsonl or eval.jsonl, each with the number of its step."""
    lines = read_json_lines(file, ["step"])
    if not lines or not all(isinstance(line["step"], int) for line in lines):
        raise UserError(f"{file}: empty, or a line whose step is no number; mend or remove it")
    return lines


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


def step_in(path):
    """The number of the last step_N in a path, or None."""
    steps = re.findall(r"step_(\d+)", str(path))
    return int(steps[-1]) if steps else None


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


def draw_radar(scores, file):
    """Benchmarks around a circle (Figure 3b), each as a share of its best score, from 0 in the
    middle to 1; the labels give the scores. scores: {kind: {benchmark: score}}."""
    import matplotlib.pyplot as plt

    names = sorted(set.intersection(*map(set, scores.values())))
    if len(names) < 3:
        print(f"no {file}: it takes three benchmarks that were measured for every run")
        return

    values = np.array([[scores[kind][name] for name in names] for kind in scores])
    shares = values / values.max(0).clip(1e-9)
    angles = np.linspace(0, 2 * np.pi, len(names), endpoint=False)
    figure, axes = plt.subplots(figsize=(8, 6), subplot_kw={"projection": "polar"})
    for i, kind in enumerate(scores):
        axes.fill(angles, shares[i], fill=False, edgecolor=f"C{i}", label=kind)
    labels = []
    for name, of_each_kind in zip(names, values.T):
        labels.append(f"{name}\n" + " / ".join(f"{value:.3g}" for value in of_each_kind))
    axes.set_ylim(0, 1)
    axes.set_xticks(angles, labels)
    for label, angle in zip(axes.get_xticklabels(), angles):  # beside the circle, not over it
        label.set_horizontalalignment("left" if np.cos(angle) > 0 else "right")
    figure.legend(loc="lower left", title="share of the best score")
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
