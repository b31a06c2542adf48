"""Every picture, and the histories of training runs that curves are drawn from.

draw_words writes a web page and needs no other package. The others need matplotlib, and draw_tsne
scikit-learn; they are imported where they are used.
"""

import base64
import collections
import io
import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import torch
from PIL import ImageColor
from torchvision.transforms.functional import to_pil_image

from data import UserError, geometry, read_image, read_json_lines
from labels import write_file

# ------------------------------------------------------------------------------- words over patches


def draw_words(panels_of, image_folder, size, mode, grid, file):
    """Patches in the colors of their words (Figure 1a): a web page in one file, for any browser.

    panels_of: {image: {title: the labels of each patch, as of labels.with_words}}. size, mode: of
    data.geometry, which gives the pixels that the encoder saw. grid: (H, W) patches.
    """
    counts = collections.Counter()
    for panels in panels_of.values():
        for labels in itertools.chain(*panels.values()):
            counts.update(dict(labels))  # adds up scores
    colors = {}
    for number, (word, _) in enumerate(counts.most_common()):
        # "red" is red. The golden angle parts the hues of the first of the other words best.
        is_color = word in ImageColor.colormap
        colors[word] = word if is_color else f"hsl({137.508 * number % 360:.1f} 45% 45%)"

    shown = []
    for name, panels in panels_of.items():
        image, _ = read_image(Path(image_folder, name))
        pixels = geometry(image, size, mode, mean=(0, 0, 0), std=(1, 1, 1))
        png = io.BytesIO()
        to_pil_image(pixels.clamp(0, 1)).save(png, "PNG")
        picture = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
        shown.append({"name": name, "picture": picture, "panels": panels})
    content = json.dumps({"grid": grid, "colors": colors, "images": shown})
    content = content.replace("<", r"\u003c")  # no word ends the script
    page = Path(f"{file}".removesuffix(".html") + ".html")
    write_file(page, PAGE.replace("DATA", content))
    print(f"wrote {page}")


PAGE = r"""<!doctype html>
<title>Words of patches</title>
<style>
  body { font: 14px sans-serif; margin: 16px }
  #panels { display: flex; gap: 16px }
  .panel { flex: 1; max-width: 640px; min-width: 0 }
  .image { position: relative }
  img { width: 100%; display: block; image-rendering: pixelated }
  .words img { filter: grayscale(1) }
  .patches { position: absolute; inset: 0; display: grid }
  .patches div { display: grid; place-items: center; overflow: hidden; cursor: pointer;
    font-size: 11px; color: white; text-shadow: 0 0 2px black, 0 0 2px black }
  .word { display: inline-block; margin: 2px; padding: 1px 5px; border-left: 12px solid;
    background: #e8e8e8; cursor: pointer }
  .here, .chosen { outline: 2px solid black; outline-offset: -2px }
  .labels { min-height: 5em }
</style>
<input id="slider" type="range" min="0" value="0"> <b id="name"></b>
<p>Hover over a patch for its words and scores. Click a patch or a word to light up where the word
  is; click again for all words.</p>
<div id="panels"></div>
<script>
const data = DATA;
const [H, W] = data.grid;
const slider = document.getElementById("slider");
const panels = document.getElementById("panels");
let chosen = "";  // the word whose patches are lit
let here = 0;  // the patch whose labels are listed
slider.max = data.images.length - 1;
slider.oninput = show;

function add(parent, className, textContent = "", tag = "div") {
  const element = parent.appendChild(document.createElement(tag));
  return Object.assign(element, { className, textContent });
}

function addWord(parent, word, number) {
  const element = add(parent, "word", `${word} ${number}`, "span");
  element.classList.toggle("chosen", word === chosen);
  element.style.borderColor = data.colors[word];
  element.onclick = () => choose(word);
}

function choose(word) {
  chosen = chosen === word ? "" : word;
  show();
}

function showLabels(patch) {
  here = patch;
  for (const panel of document.querySelectorAll(".words")) {
    panel.querySelector(".here")?.classList.remove("here");
    panel.querySelectorAll(".patches div")[patch].classList.add("here");
    const labels = panel.querySelector(".labels");
    labels.textContent = `Row ${Math.floor(patch / W)}, column ${patch % W}: `;
    for (const [word, score] of panel.patches[patch]) addWord(labels, word, score.toFixed(3));
  }
}

function addPanel(image, title, patches) {
  const panel = add(panels, "panel words", title);
  const picture = add(panel, "image");
  add(picture, "", "", "img").src = image.picture;
  panel.patches = patches;
  const grid = add(picture, "patches");
  grid.style.gridTemplate = `repeat(${H}, 1fr) / repeat(${W}, 1fr)`;
  const counts = new Map();
  patches.forEach((labels, patch) => {
    const top = labels.length ? labels[0][0] : "";
    if (top) counts.set(top, (counts.get(top) || 0) + 1);
    const word = chosen || top;
    const isLit = labels.some(([label]) => label === word);
    const cell = add(grid, "", isLit && W <= 12 ? word : "");
    cell.style.background = isLit ? data.colors[word] : "";
    cell.style.opacity = word === top ? 0.8 : 0.4;
    cell.onmouseenter = () => showLabels(patch);
    cell.onclick = () => choose(top);
  });
  add(panel, "labels");
  for (const [word, count] of [...counts].sort((a, b) => b[1] - a[1])) addWord(panel, word, count);
}

function show() {
  const image = data.images[slider.value];
  document.getElementById("name").textContent = image.name;
  panels.textContent = "";
  const panel = add(panels, "panel", "image");
  add(panel, "", "", "img").src = image.picture;
  for (const [title, patches] of Object.entries(image.panels)) addPanel(image, title, patches);
  showLabels(here);
}

show();
</script>
"""

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


# Names of the measures that figures show: TACS, POPE's F1, and "... all" of each benchmark, but not
# what eval_words finds: "true all" and, if the word "all" is frequent, "words all".
SCORES = r"(val_)?tacs|pope f1|(?!words |true ).* all"


def draw_comparison(histories, groups, folder):
    """All that eval.py figures makes: folder/tsne.png, folder/curves.png and the gains.

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
