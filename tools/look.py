"""Look at words over images: a web page, and how true the words are.

    python -m tools.look labels --labels data/labels            CLIP's labels, before training
    python -m tools.look labels --labels data/labels --compare  beside other paths and signs
    python -m tools.look words --model out/pretrain --baseline out/pretrain_baseline    Figure 1a

In the page, hover over a patch for its words and scores; click a word to light up its patches.
"""

import base64
import collections
import io
import itertools
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ImageColor
from torchvision.transforms.functional import to_pil_image

from data import UserError, cli, geometry, load_samples, rank_device, read_image, run_command
from eval import (
    encode_images,
    encode_words,
    find_captions,
    find_run,
    find_words,
    open_captions,
    save_result,
    word_shares,
)
from labels import (
    LabelStore,
    caption_agreement,
    image_list,
    label_images,
    load_array,
    load_encoder,
    load_images,
    nearest_words,
    patch_paths,
    refuse_other,
    top_words,
    write_file,
)

# ---------------------------------------------------------------------------------------- commands


def look_at_labels(
    labels: str,
    out: str = "labels.html",
    images: int = 20,
    truth: str = "",
    compare: bool = False,
    data: str = "",
    image_folder: str = "",
):
    """Write a page with some images and their labels, and print what up to 500 images' are like.

    That is how many patches have a label, the most frequent top words, and how well they agree with
    the captions (caption_agreement), which judges labels without knowing the truth.

    labels: a label store
    out: the web page to write
    images: how many are on the page, at most
    truth: a JSON file of true words, as tools/toy.py writes it, to say how many top words are true
    compare: print the same of new labels by each path and sign of the encoder; takes minutes on a
        GPU
    data: the samples that were labelled, if they have moved
    image_folder: their images, if they have moved
    """
    store = LabelStore(labels)
    meta = store.meta
    samples = load_samples(data or meta["data"])
    refuse_other(store.folder, meta, image_list(samples))
    image_folder = image_folder or meta["image_folder"]
    rows, ids, scores = store.sample()
    files = [samples[row]["image"] for row in rows]
    labels_of = with_words(files, store.words, ids, scores)

    drawn = files[:: math.ceil(len(files) / images)]
    panels_of = {file: {"labels": labels_of[file]} for file in drawn}
    seen = {"size": meta["size"], "mode": meta["mode"]}
    truth_of = read_truth(truth, files, math.prod(meta["grid"]))
    draw_words(panels_of, image_folder, seen, meta["grid"], out, truth_of)

    captions = [samples[row]["conversations"][1]["value"] for row in rows]
    print(f"{len(store):,} images, {len(store.words):,} words; of {len(rows)} of the images:")
    trials = [("these labels", ids, scores)]
    if compare:
        trials = itertools.chain(trials, try_paths(store, samples, image_folder, rows))
    for name, ids, scores in trials:
        words = top_words(store.words, ids)
        counts = collections.Counter(itertools.chain(*words))
        lifts, found = caption_agreement(captions, words)
        print(
            f"{name}: {counts.total() / ids[..., 0].numel():.1%} labelled, "
            f"lift {np.median(lifts):.2f} ({min(lifts):.2f} to {max(lifts):.2f}), "
            f"{found[0] / len(captions):.2f} words of each caption "
            f"({found[1:].mean() / len(captions):.2f} of another), "
            f"{len(counts):,} top words: {dict(counts.most_common(8))}"
        )
        if truth:
            labels_of = with_words(files, store.words, ids, scores)
            print("true:", true_share(truth_of, labels_of))


def try_paths(store, samples, image_folder, rows):
    """Yield (name, ids, scores), both [images, m, 1], for each path and sign of the encoder."""
    clip = load_encoder(store.meta["encoder"], rank_device())
    word_embeds = torch.tensor(load_array(store.folder / "words.npy"), device=rank_device())
    for path, sign in itertools.product(patch_paths(clip), (1, -1)):
        trial = store.meta | dict(path=path, sign=sign, n=1)
        found = []
        for i in range(0, len(rows), 32):
            batch = [samples[row] for row in rows[i : i + 32]]
            pixels = load_images(image_folder, trial, batch)
            found.append(label_images(clip, pixels, word_embeds, trial))
        ids, scores = (torch.cat(parts).cpu() for parts in zip(*found))
        yield f"{path}, sign {sign:+}", ids, scores


def look_at_words(
    model: str,
    baseline: str = "",
    words: str = "",
    truth: str = "",
    data: str = "",
    image_folder: str = "",
    samples: int = 100,
    images: int = 20,
    out: str = "words.html",
    llm: str = "",
    vision: str = "",
):
    """Nearest word of every visual token, as in Figure 1a: the shares of the most frequent words.

    words, data and image_folder are by default those of --model, for the baseline too.

    baseline: another run, to be shown beside --model
    truth: a JSON file of true words, as tools/toy.py writes it: how many words are true, and where
    images: how many are on the page, at most
    out: the web page: ten nearest words of each visual token, baseline and model side by side
    """
    runs = [find_run(path, llm, vision) for path in (baseline, model) if path]
    word_list = find_words(runs[-1], words)
    read_truth(truth, [], 0)  # is it there? said before a model is loaded
    data, image_folder = find_captions(runs[-1], data, image_folder)
    results = {}  # what is printed of each run
    panels_of = collections.defaultdict(dict)
    for run in runs:
        sea = None  # frees the baseline's memory
        sea, captions = open_captions(run, data, image_folder, samples)
        files = [sample["image"] for sample in captions.samples]
        ids, scores = words_of_images(sea, captions, word_list)
        labels_of = with_words(files, word_list, ids, scores)
        for file in files[:images]:
            panels_of[file][title_of(run)] = labels_of[file]

        result = {"words": word_shares(ids[..., 0].flatten(), word_list)}
        truth_of = read_truth(truth, files, math.prod(sea.grid))
        if truth:
            result["true"] = true_share(truth_of, labels_of)
        print(run.path)
        results[run.path] = save_result(run, result)

    seen = {name: sea.preprocess[name] for name in ("size", "mode")}  # by --model
    draw_words(panels_of, image_folder, seen, sea.grid, out, truth_of)
    return results


def words_of_images(model, captions, words):
    """The ten nearest words of each visual token: numbers and cosines, both [images, m, 10]."""
    x_v = F.normalize(encode_images(model, captions))
    found = nearest_words(x_v, F.normalize(encode_words(model, words)), 10, 1, -2)
    return (x.unflatten(0, (len(captions), -1)) for x in found)


def title_of(run):
    """What stands above a run's panel: its path, and in stage 1 whether it was trained with SEA."""
    if run.config.get("stage") != "pretrain":
        return run.path
    return f"{'SEA' if run.config['sea_weight'] else 'captions only'}: {run.path}"


# --------------------------------------------------------------------------------- words and truth


def with_words(files, words, ids, scores):
    """ids, scores [images, m, n] -> {file: of each of its m patches a list of (word, score)}."""
    labels_of = {}
    for file, image_ids, image_scores in zip(files, ids.tolist(), scores.tolist()):
        labels_of[file] = []
        for patch in zip(image_ids, image_scores):
            pairs = [(words[i], round(score, 3)) for i, score in zip(*patch) if i >= 0]
            labels_of[file].append(pairs)
    return labels_of


def read_truth(file, images, patches):
    """A JSON file of true words, as tools/toy.py writes it, of images of so many patches each.

    -> {image: {kind: {patch: [true words]}}}, nothing without a file.
    """
    if not file:
        return {}
    try:
        content = json.loads(Path(file).read_text())
        truth = {}
        for image in images:
            truth[image] = {
                kind: {range(patches)[int(patch)]: list(words) for patch, words in of_kind.items()}
                for kind, of_kind in content[image].items()
            }
    except Exception as e:  # any other shape
        raise UserError(f"--truth {file}: not a truth file of these images ({e!r})"[:300]) from e
    return truth


def true_share(truth, labels_of):
    """Share of the judged patches whose top word is true -> {kind: share, ..., "all": share}.

    truth: of read_truth, labels_of: of with_words.
    """
    hits = collections.defaultdict(list)
    for image, labels in labels_of.items():
        for kind, patches in truth[image].items():
            for patch, accepted in patches.items():
                top_word = [word for word, _ in labels[patch]][:1]
                hits[kind].append(not set(top_word).isdisjoint(accepted))
    hits["all"] = sum(hits.values(), [])
    return {kind: round(float(np.mean(is_true)), 3) for kind, is_true in hits.items()}


# ---------------------------------------------------------------------------------------- the page


def draw_words(panels_of, image_folder, seen, grid, file, truth=None):
    """Patches in the colors of their words (Figure 1a): a web page in one file, for any browser.

    panels_of: {image: {title: the labels of each patch, as of with_words}}. seen: the size and mode
    of data.geometry, which give the pixels that the encoder saw. grid: (H, W) patches. truth: of
    read_truth; patches whose first word is true are framed.
    """
    shown = []
    for name, panels in panels_of.items():
        image = read_image(Path(image_folder, name))
        pixels = geometry(image, **seen, mean=(0, 0, 0), std=(1, 1, 1))
        png = io.BytesIO()
        to_pil_image(pixels.clamp(0, 1)).save(png, "PNG")
        picture = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
        true = truth[name] if truth else {}
        shown.append({"name": name, "picture": picture, "panels": panels, "truth": true})
    content = json.dumps({"grid": grid, "colors": colors_of(panels_of), "images": shown})
    content = content.replace("<", r"\u003c")  # no word ends the script
    page = Path(f"{file}".removesuffix(".html") + ".html")
    write_file(page, PAGE.replace("DATA", content))
    print(f"wrote {page}")


def colors_of(panels_of):
    """A CSS color for each word of a page: "red" is red.

    Where colors are among the frequent words, as on the toy, the others are grey, for a hue would
    say what they do not mean. Elsewhere they have hues.
    """
    scores = collections.Counter()
    tops = collections.Counter()
    for panels in panels_of.values():
        for labels in itertools.chain(*panels.values()):
            scores.update(dict(labels))  # adds up scores
            tops.update(word for word, _ in labels[:1])
    words = [word for word, _ in scores.most_common()]
    others = [word for word in words if word not in ImageColor.colormap]
    shows_colors = sum(tops[word] for word in others) < 0.9 * tops.total()

    colors = {word: word for word in words}
    for number, word in enumerate(others):
        if shows_colors:  # the golden ratio parts the first of the words best
            colors[word] = f"hsl(0 0% {30 + 61.8034 * number % 45:.2f}%)"
        else:  # and so does the golden angle
            colors[word] = f"hsl({137.508 * number % 360:.1f} 45% 45%)"
    return colors


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
  .true { box-shadow: inset 0 0 0 1px black, inset 0 0 0 3px white }
  .here, .chosen { outline: 2px solid black; outline-offset: -2px }
  .labels { min-height: 5em }
</style>
<label>Image <input id="slider" type="range" min="0" value="0"> <b id="name"></b></label>
<p>Hover over a patch for its words and scores. Click a patch or a word to light up where the word
  is; click again for all words. <span id="frames">A white frame: the word is true.</span></p>
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
    const isTrue = Object.values(image.truth).some((kind) => kind[patch]?.includes(word));
    cell.classList.toggle("true", isLit && isTrue);
    cell.onmouseenter = () => showLabels(patch);
    cell.onclick = () => choose(top);
  });
  add(panel, "labels");
  for (const [word, count] of [...counts].sort((a, b) => b[1] - a[1])) addWord(panel, word, count);
}

function show() {
  const image = data.images[slider.value];
  const place = `${Number(slider.value) + 1} of ${data.images.length}`;
  document.getElementById("name").textContent = `${place}: ${image.name}`;
  document.getElementById("frames").hidden = !Object.keys(image.truth).length;
  panels.textContent = "";
  const panel = add(panels, "panel", "image");
  add(panel, "", "", "img").src = image.picture;
  for (const [title, patches] of Object.entries(image.panels)) addPanel(image, title, patches);
  showLabels(here);
}

show();
</script>
"""


def main(argv=None):
    return run_command(__doc__, {"labels": look_at_labels, "words": look_at_words}, argv)


if __name__ == "__main__":
    cli(main)
