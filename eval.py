"""How well are the visual tokens aligned with the LLM's words, and how well does the model answer?

    python eval.py tacs    --model out/toy                 TACS (Eq. 14): visual tokens against their caption's tokens
    python eval.py gap     --model out/toy                 D (Eq. 5): distance to the nearest word
    python eval.py words   --model out/toy --baseline out/toy_baseline       nearest words (Eq. 4, Figure 1a)
    python eval.py pope    --model out/finetune --data pope/ --image_folder val2014
    python eval.py vqa     --model out/finetune --data questions.json --image_folder images
    python eval.py chat    --model out/finetune --image photo.jpg
    python eval.py export  --model out/finetune/checkpoints/step_1000 --out step_1000       a Hugging Face Llava folder
    python eval.py figures --model out/toy --baseline out/toy_baseline       Figures 2, 3 and 5 of what runs have left

--model takes a training run's --out_dir, its model/, one of its checkpoints, or any Hugging Face Llava model. Data,
images and words are those of the run's config.json, held-out ones if it has any, unless flags say otherwise. Results
are added to the run's eval.jsonl, from which `figures` draws. Dimensions as in loss.py.
"""

import collections
import contextlib
import functools
import json
import math
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from data import IGNORE, LlavaDataset, UserError, cli, collate, load_samples, run_command
from labels import draw_words, nearest_words, read_words, true_share
from model import SEAModel, find_model

# --------------------------------------------------------------------------------------------------- measures


def tacs(x_v, x_t, k=10):
    """Token Alignment Consistency Score (Eq. 14, 17): the cosine of each visual token with its nearest text token,
    averaged over the k best visual tokens. x_v [m, D], x_t [n, D] -> scalar. Fewer than k visual tokens: all of them.
    """
    best = (F.normalize(x_v.float(), dim=-1) @ F.normalize(x_t.float(), dim=-1).T).amax(1)
    return best.topk(min(k, len(best)))[0].mean()


def modality_gap(x_v, words):
    """D (Eq. 5): the mean distance of visual tokens to their nearest word. x_v [P, D], words [q, D] -> scalar."""
    return torch.cat(
        [
            torch.stack([torch.cdist(x, w.float()).amin(1) for w in words.split(65536)]).amin(0)
            for x in x_v.float().split(1024)
        ]
    ).mean()


def nearest_word(x_v, words):
    """The word of highest cosine with each visual token (Eq. 4). x_v [P, D], words [q, D] -> ids [P]."""
    return nearest_words(
        F.normalize(x_v.float(), dim=-1), F.normalize(words.float(), dim=-1), 1, 1, -2.0
    )[0][:, 0]


@torch.no_grad()
def alignment_sums(model, dataset, device):
    """-> sum of TACS, number of samples with an image, sum of L_g, number of trained tokens; over a LlavaDataset.

    model: a SEAModel, or what DDP or FSDP made of it.
    """
    total = [0.0, 0, 0.0, 0]
    for item in (dataset[i] for i in range(len(dataset))):
        ids, labels = item["input_ids"].to(device)[None], item["labels"].to(device)[None]
        pixels = item["pixels"].to(device)[None] if "pixels" in item else torch.zeros(0)
        out = model(ids, torch.ones_like(ids), labels, pixels, num_targets=1)
        x, is_text = out["inputs"][0], labels[0] != IGNORE
        x_v, x_t = x[out["is_image"][0]], x[is_text][:-1]  # without the newline that ends a caption
        score = float(tacs(x_v, x_t)) if len(x_v) and len(x_t) else 0.0
        total = [
            a + b
            for a, b in zip(
                total, (score, int(len(x_v) > 0), float(out["loss_g"]), int(is_text.sum()))
            )
        ]
    return total


# ---------------------------------------------------------------------------------------------------- answers

# LLaVA-1.5's, behind the question
SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."


@torch.no_grad()
def answer(
    model,
    samples,
    image_folder,
    batch_size=16,
    max_new_tokens=16,
    workers=0,
    desc="answering",
    **kwargs,
):
    """Greedy answers (strings) to samples, LLaVA's dicts whose last turn is a human's; image may be missing. kwargs: of
    transformers' generate."""
    tokenizer, device, said = model.tokenizer, model.embed_tokens.weight.device, []
    dataset = LlavaDataset(
        samples, image_folder, model.geometry, tokenizer, model.image_tokens, chat="prompt"
    )
    padded = functools.partial(collate, pad_id=tokenizer.pad_token_id, side="left")
    with tqdm(total=len(samples), desc=desc, unit=" answers", disable=len(samples) == 1) as bar:
        for batch in DataLoader(dataset, batch_size, collate_fn=padded, num_workers=workers):
            ids, mask, pixels = (
                batch[k].to(device) for k in ("input_ids", "attention_mask", "pixels")
            )
            new = model.generate(ids, mask, pixels, max_new_tokens=max_new_tokens, **kwargs)
            said += [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
            bar.update(len(ids))
    return said


def ask(text, image):
    """A sample for `answer`."""
    return {"image": image, "conversations": [{"from": "human", "value": text}]}


def says_yes(text):
    """POPE's and LLaVA's reading of an answer: no if its first sentence has "no" or "not" in it, else yes."""
    return not {"no", "not"} & set(text.lower().split(".")[0].replace(",", "").split())


def pope_metrics(said, true):
    """said, true: lists of bool, yes is positive -> dict of accuracy, precision, recall, f1, yes_ratio."""
    both = sum(s and t for s, t in zip(said, true))
    precision, recall = both / max(1, sum(said)), both / max(1, sum(true))
    return dict(
        accuracy=sum(s == t for s, t in zip(said, true)) / len(said),
        precision=precision,
        recall=recall,
        f1=2 * both / max(1, sum(said) + sum(true)),
        yes_ratio=sum(said) / len(said),
    )


def normalize(text):
    """An answer as it is compared: lower case, without punctuation, articles and spare spaces."""
    return " ".join(
        w for w in re.sub(r"[^\w\s]", " ", text.lower()).split() if w not in ("a", "an", "the")
    )


def chosen(text, choices):
    """The index of the choice that an answer names by its text or its letter ("B", "(B)", "B. a cat"), else None."""
    texts = [normalize(str(choice)) for choice in choices]
    if normalize(text) in texts:
        return texts.index(normalize(text))
    letter = re.match(r"\(?([A-Z])([).:]|$)", text.strip())
    return (
        ord(letter[1]) - ord("A") if letter and ord(letter[1]) - ord("A") < len(choices) else None
    )


# ------------------------------------------------------------------------------------------------------ a run


def run_folder(path):
    """The folder of the training run that `path` (an out_dir, its model/ or a checkpoint) belongs to, or None."""
    folder = Path(find_model(path)).resolve()
    for parent in (folder, *folder.parents[:3]):
        config = parent / "config.json"  # Llava models have one too
        if config.is_file() and "stage" in json.loads(config.read_text()):
            return parent


def run_config(path):
    folder = run_folder(path)
    return json.loads((folder / "config.json").read_text()) if folder else {}


def load_model(path):
    """A SEAModel on its device, in bf16 on a GPU."""
    device, dtype = (
        ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    )
    return SEAModel.from_run(path, dtype).to(device)


def load_run(model, data, image_folder, samples):
    """-> SEAModel, LlavaDataset of the first `samples` samples, config of the run."""
    config = run_config(model)
    if config.get("stage") == "pretrain":  # stage 2's data are no captions
        image_folder = (
            image_folder
            or config["val_data"]
            and config["val_image_folder"]
            or config["image_folder"]
        )
        data = data or config["val_data"] or config["data"]
    if samples < 1:
        raise UserError("--samples must be at least 1")
    if not data or not image_folder:
        raise UserError(
            f"{model}: its run named no captions to look at; give --data and --image_folder"
        )
    model, rows = load_model(model), load_samples(data)
    rows = [rows[i] for i in range(min(samples, len(rows)))]
    dataset = LlavaDataset(rows, image_folder, model.geometry, model.tokenizer, model.image_tokens)
    return model, dataset, config


@torch.no_grad()
def visual_tokens(model, dataset, desc="encoding images"):
    """X_v of every image: [images, m, D]."""
    device = model.embed_tokens.weight.device
    return torch.stack(
        [
            model.encode_image(dataset[i]["pixels"].to(device)[None])[0]
            for i in tqdm(range(len(dataset)), desc=desc)
        ]
    )


@torch.no_grad()
def word_matrix(model, words, config):
    """-> the list's words and Ψ(w) of each: [q, D]."""
    if not words and not config.get("labels"):
        raise UserError(
            "this model's run had no labels: give --words, a file with a word on each line"
        )
    words = read_words(words or Path(config["labels"]) / "words.txt")
    model.set_words(words)
    return words, torch.cat(
        [model.word_vectors(ids) for ids in torch.arange(len(words)).split(8192)]
    )


def record(model, result):
    """Print a result and, if `model` belongs to a run, add it to that run's eval.jsonl, with its step."""
    print(json.dumps(result))
    if folder := run_folder(model):
        step = _step(Path(find_model(model)).name)
        step = step or max((line["step"] for line in _lines(folder / "metrics.jsonl")), default=0)
        with open(folder / "eval.jsonl", "a") as f:
            f.write(json.dumps(dict(step=step) | result) + "\n")
    return result


def _step(path):
    steps = re.findall(r"step_(\d+)", path)
    return int(steps[-1]) if steps else None


def _lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# --------------------------------------------------------------------------------------------------- commands


def eval_tacs(model: str, data: str = "", image_folder: str = "", samples: int = 100):
    """Mean TACS and caption loss over image-caption pairs: the first `samples` of `data`."""
    sea, dataset, _ = load_run(model, data, image_folder, samples)
    device = sea.embed_tokens.weight.device
    sums = [
        alignment_sums(sea, Subset(dataset, [i]), device)
        for i in tqdm(range(len(dataset)), desc="TACS")
    ]
    score, n, loss, tokens = map(sum, zip(*sums))
    return record(model, dict(tacs=score / n, caption_loss=loss / tokens, pairs=n))


def eval_gap(
    model: str, words: str = "", data: str = "", image_folder: str = "", samples: int = 100
):
    """D of Eq. 5 and the norms that it depends on: of the visual tokens, of the words, and D of unit vectors."""
    sea, dataset, config = load_run(model, data, image_folder, samples)
    x_v, (_, w) = visual_tokens(sea, dataset).flatten(0, 1), word_matrix(sea, words, config)
    return record(
        model,
        dict(
            D=float(modality_gap(x_v, w)),
            visual_norm=float(x_v.norm(dim=-1).mean()),
            word_norm=float(w.norm(dim=-1).mean()),
            D_of_unit_vectors=float(modality_gap(F.normalize(x_v, dim=-1), F.normalize(w, dim=-1))),
        ),
    )


def eval_words(
    model: str,
    baseline: str = "",
    words: str = "",
    truth: str = "",
    data: str = "",
    image_folder: str = "",
    samples: int = 100,
    images: int = 2,
    out: str = "words.png",
):
    """The nearest word of every visual token, as in Figure 1a: the most frequent ones, with a truth.json the share
    that is true, and a picture of `images` images, then the baseline's words, then the model's."""
    results, columns = {}, []
    for name in filter(None, (baseline, model)):
        sea, dataset, config = load_run(name, data, image_folder, samples)
        x_v, (word_list, w) = visual_tokens(sea, dataset), word_matrix(sea, words, config)
        nearest = nearest_word(x_v.flatten(0, 1), w).view(len(x_v), -1).tolist()
        nearest = {
            s["image"]: [word_list[i] for i in row] for s, row in zip(dataset.samples, nearest)
        }
        counts = collections.Counter(word for row in nearest.values() for word in row)
        results[name] = {
            "words": {w: round(c / counts.total(), 3) for w, c in counts.most_common(8)}
        }
        if truth:
            results[name]["true"] = true_share(truth, nearest)
        print(name, end=" ")
        record(name, results[name])
        mean, std = (torch.tensor(sea.geometry[k])[:, None, None] for k in ("mean", "std"))
        pixels = [dataset[i]["pixels"] * std + mean for i in range(min(images, len(dataset)))]
        columns = columns or [[(image, []) for image in pixels]]
        columns.append(
            [(image, nearest[sample["image"]]) for image, sample in zip(pixels, dataset.samples)]
        )
    draw_words([picture for row in zip(*columns) for picture in row], sea.grid, len(columns), out)
    return results


def eval_pope(
    model: str,
    data: str,
    image_folder: str,
    batch_size: int = 16,
    workers: int = 4,
    prompt: str = SHORT,
):
    """POPE: does the model see objects that are not there? data: one of its files (a JSON object on each line: image,
    text, label) or a folder of them (coco_pope_random.json, ...); the mean F1 is what LLaVA and the paper report."""
    files = sorted(Path(data).glob("*.json*")) if Path(data).is_dir() else [Path(data)]
    questions = {path.stem: _pope_lines(path) for path in files}
    if not questions:
        raise UserError(
            f"{data}: no .json file in this folder; POPE's are named coco_pope_random.json and so on"
        )
    sea, result = load_model(model), {}
    for name, rows in questions.items():
        asked = [ask(f"{row['text']}\n{prompt}".strip(), row["image"]) for row in rows]
        said = answer(sea, asked, image_folder, batch_size, workers=workers, desc=name)
        result[name] = pope_metrics([says_yes(text) for text in said], [row["yes"] for row in rows])
    mean = {
        k: sum(r[k] for r in result.values()) / len(result) for k in next(iter(result.values()))
    }
    return record(model, {"pope": mean | result})


def _pope_lines(path):
    rows = []
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            rows.append(
                dict(
                    image=str(row["image"]),
                    text=str(row["text"]),
                    yes=("no", "yes").index(row["label"]),
                )
            )
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e})") from e
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(
            f'{path}, line {len(rows) + 1}: no question of POPE, which is an object with "image", "text" '
            f'and "label", yes or no ({e!r})'
        ) from e
    if not rows:
        raise UserError(f"{path}: no questions in this file")
    return rows


def eval_vqa(
    model: str,
    data: str,
    image_folder: str = "",
    batch_size: int = 16,
    workers: int = 4,
    prompt: str = SHORT,
    max_new_tokens: int = 16,
    name: str = "",
    out: str = "",
):
    """Exact match: the share of samples (LLaVA's format) whose first question gets the answer that is written there.
    A sample with "choices", a list, is asked with their letters; its answer is one of them. A text-only file measures
    language alone. name: of the result, data's if left out; out: a file for what was said."""
    rows, asked, kinds, log = list(load_samples(data, captions=False)), [], {}, []
    for row in rows:
        at = next(i for i, turn in enumerate(row["conversations"]) if turn["from"] == "human")
        (question, true), choices = row["conversations"][at : at + 2], row.get("choices")
        if choices and chosen(true["value"], choices) is None:
            raise UserError(
                f"{data}, sample {row.get('id')}: the answer {true['value']!r} is none of its choices "
                f"{choices}"
            )
        text = (
            question["value"].replace("<image>", "").strip()
        )  # the image comes first, as in training
        listed = "".join(
            f"\n{chr(ord('A') + i)}. {choice}" for i, choice in enumerate(choices or [])
        )
        text = f"{text}{listed}\n{LETTER if choices and prompt == SHORT else prompt}".strip()
        asked.append(
            row
            | {
                "conversations": [*row["conversations"][:at], question | {"value": text}],
                "true": true,
            }
        )
    for row, text in zip(
        asked, answer(load_model(model), asked, image_folder, batch_size, max_new_tokens, workers)
    ):
        true, choices = row["true"]["value"], row.get("choices")
        if choices:
            kind, right = "choice", chosen(text, choices) == chosen(true, choices)
        else:
            kind, right = (
                "yes/no" if normalize(true) in ("yes", "no") else "open",
                normalize(text) == normalize(true),
            )
        for of in (kind, "all"):
            kinds.setdefault(of, []).append(right)
        log.append(
            dict(
                id=row.get("id"),
                question=row["conversations"][-1]["value"],
                answer=text,
                true=true,
                right=right,
            )
        )
    result = record(
        model,
        {name or Path(data).stem: {kind: sum(of) / len(of) for kind, of in sorted(kinds.items())}},
    )
    if out:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text("".join(json.dumps(line) + "\n" for line in log), encoding="utf-8")
    return result


def export(model: str, out: str):
    """A model, such as a checkpoint of stage 2, as a Hugging Face Llava folder, for tools that read no checkpoints."""
    sea = load_model(model)
    if reason := sea.no_llava():
        raise UserError(f"{model}: transformers' Llava cannot hold this LLM ({reason})")
    Path(out).mkdir(parents=True, exist_ok=True)
    sea.save_llava(Path(out), sea.full_state(), sea.embed_tokens.weight.dtype)
    print(f"wrote {out}")


def chat(model: str, image: str = "", max_new_tokens: int = 512):
    """Ask about an image, or about nothing: each line is a question, an empty line or Ctrl-D ends it."""
    from transformers import TextStreamer

    sea, turns = load_model(model), []
    streamer = TextStreamer(sea.tokenizer, skip_prompt=True, skip_special_tokens=True)
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while text := input("> ").replace("<image>", "").strip():
            turns.append({"from": "human", "value": text})
            [said] = answer(
                sea,
                [{"image": image, "conversations": turns}],
                ".",
                1,
                max_new_tokens,
                streamer=streamer,
            )
            turns.append({"from": "gpt", "value": said})
    return turns


# ---------------------------------------------------------------------------------------------------- figures


def history(run):
    """All that a run's files say of it -> {measure: {step: value}}: metrics.jsonl, eval.jsonl (its nested names joined
    by a space), and the results of lmms-eval and lm-evaluation-harness below the run's folder, of the step that stands
    in their path, else of the last one; newer ones replace older ones, groups their parts."""
    found, run = {}, Path(run)
    lines = _lines(run / "metrics.jsonl") + _lines(run / "eval.jsonl")
    last = max((line["step"] for line in lines), default=0)
    for path in sorted(
        run.rglob("*results*.json"), key=lambda path: path.name
    ):  # with the time in their names
        step = _step(str(path.relative_to(run))) or last
        lines += [{"step": step, task: {"all": score}} for task, score in _tool_scores(path)]
    for line in lines:
        for name, value in _flat(line):
            found.setdefault(name, {})[line["step"]] = value
    return found


def _tool_scores(path):
    """Of each task in a results file of lmms-eval or lm-evaluation-harness its name and what the paper reports."""
    try:
        file = json.loads(path.read_text())
        parts = {part for parts in file.get("group_subtasks", {}).values() for part in parts}
        for task, values in file["results"].items():
            metrics = [
                k
                for k, v in values.items()
                if "," in k and "stderr" not in k and isinstance(v, (int, float))
            ]
            if metrics and task not in parts:
                yield (
                    task,
                    values[next((k for k in metrics if re.search("CIDEr|pair|f1", k)), metrics[0])],
                )
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(
            f"{path}: not what lmms-eval or lm-evaluation-harness writes ({e!r}); move it out of the run's "
            "folder"
        ) from e


def _flat(values, before=""):
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{name} ")
        elif isinstance(value, (int, float)):
            yield before + name, value


def need(name):
    """A module that only figures need."""
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise UserError(
            f"figures need {name.split('.')[0]}: pip install matplotlib scikit-learn"
        ) from e


def draw_curves(runs, measures, path):
    """Measures over the steps of training, one panel each. runs {kind: [{measure: {step: value}}, one for each seed]},
    measures {name: title}: a line is the mean over seeds, the band reaches from the least to the most."""
    plt = need("matplotlib.figure")
    figure = plt.Figure(figsize=(5 * len(measures), 3.6), layout="constrained")
    for axes, (measure, title) in zip(
        figure.subplots(1, len(measures), squeeze=False)[0], measures.items()
    ):
        for kind, seeds in runs.items():
            steps = sorted(set.intersection(*(set(seed.get(measure, ())) for seed in seeds)))
            values = [[seed[measure][step] for seed in seeds] for step in steps]
            axes.plot(
                steps, [sum(v) / len(v) for v in values], marker="o", markersize=3, label=kind
            )
            axes.fill_between(steps, [*map(min, values)], [*map(max, values)], alpha=0.2)
        axes.set(title=title, xlabel="steps")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    print(f"wrote {path}")


def draw_radar(scores, path):
    """Benchmarks around a circle, each as a share of its best value. scores {kind: {benchmark: value}}."""
    names = [
        name
        for name in next(iter(scores.values()))
        if all(name in kind for kind in scores.values())
    ]
    best = {name: max(kind[name] for kind in scores.values()) or 1.0 for name in names}
    figure = need("matplotlib.figure").Figure(figsize=(7, 4.8))
    axes = figure.add_subplot(projection="polar")
    angles = [2 * math.pi * i / len(names) for i in range(len(names))]
    for kind, values in scores.items():
        radii = [values[name] / best[name] for name in names]
        axes.plot(angles + angles[:1], radii + radii[:1], label=kind)
        axes.fill(angles, radii, alpha=0.1)
    low = min(values[name] / best[name] for values in scores.values() for name in names)
    low = max(
        0.0, 2 * low - 1 - 0.02
    )  # the scale starts here, or small differences would not be seen
    axes.set_ylim(low, 1.02)
    axes.set_xticks(
        angles,
        [
            f"{name}\n" + " / ".join(f"{values[name]:.3g}" for values in scores.values())
            for name in names
        ],
    )
    for label, angle in zip(axes.get_xticklabels(), angles):  # away from the circle
        label.set(
            ha="left" if math.cos(angle) > 0.1 else "right" if math.cos(angle) < -0.1 else "center"
        )
    axes.set_yticklabels([])
    figure.legend(loc="lower left", frameon=False)
    figure.text(
        0.99,
        0.01,
        f"shares of the best value;\nin the middle {low:.0%}",
        ha="right",
        va="bottom",
        size=8,
    )
    figure.savefig(path, dpi=150, bbox_inches="tight")
    print(f"wrote {path}")


def draw_tsne(tokens, path, most=1000):
    """Figure 2: a panel for each kind, in one common t-SNE. tokens {kind: {"visual tokens" and others: [N, D]}}.

    PAPER: by cosine distance, the similarity of Eq. 4 and TACS; the norms of visual tokens would part them from words
    however well they are aligned. At most `most` of each, evenly spaced.
    """
    figures, manifold = need("matplotlib.figure"), need("sklearn.manifold")
    parts = {
        (kind, name): x[torch.linspace(0, len(x) - 1, min(most, len(x))).long()].float().cpu()
        for kind, groups in tokens.items()
        for name, x in groups.items()
    }
    tsne = manifold.TSNE(metric="cosine", init="random", random_state=0)
    places = torch.from_numpy(tsne.fit_transform(torch.cat([*parts.values()]).numpy()))
    places = dict(zip(parts, places.split([len(x) for x in parts.values()])))
    figure = figures.Figure(figsize=(5 * len(tokens), 4.6), layout="constrained")
    for axes, kind in zip(figure.subplots(1, len(tokens), squeeze=False)[0], tokens):
        for name, color, size in zip(tokens[kind], ("tab:orange", "gold", "tab:blue"), (5, 14, 14)):
            axes.scatter(
                *places[kind, name].T,
                s=size,
                c=color,
                label=name,
                linewidths=0,
                zorder=2 + (name == "text tokens"),
            )  # which are among the embeddings, in the same places
        axes.set(title=kind, xticks=[], yticks=[])
    figure.legend(
        *axes.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=3,
        markerscale=2,
        frameon=False,
    )
    figure.savefig(path, dpi=150)
    print(f"wrote {path}")


@torch.no_grad()
def token_groups(model, data="", image_folder="", samples=100):
    """-> {"visual tokens": of `samples` images, "text tokens": of their captions, "LLM's embeddings"}, each [N, D]."""
    sea, dataset, _ = load_run(model, data, image_folder, samples)
    texts = sea.tokenizer(
        [s["conversations"][1]["value"] for s in dataset.samples], add_special_tokens=False
    ).input_ids
    vocabulary = torch.linspace(0, sea.embed_tokens.num_embeddings - 1, 2000).long().unique()
    text, words = (
        sea.embed_tokens(ids.to(sea.embed_tokens.weight.device))
        for ids in (torch.tensor(sorted({i for ids in texts for i in ids})), vocabulary)
    )
    return {
        "visual tokens": visual_tokens(sea, dataset).flatten(0, 1),
        "text tokens": text,
        "LLM's embeddings": words,
    }


def figures(
    model: str,
    baseline: str,
    out: str = "figures",
    data: str = "",
    image_folder: str = "",
    samples: int = 100,
):
    """Baseline beside SEA, from what their runs have left. Of stage 1: tsne.png (Figure 2), curves.png (Figure 5: TACS,
    and POPE where eval.py pope was called for several checkpoints). Of stage 2: curves.png (Figure 3a: what eval.py or
    lm-evaluation-harness measured for several checkpoints), radar.png (Figure 3b: every benchmark measured for both).
    """
    folders = {"baseline": run_folder(baseline), "SEA": run_folder(model)}
    if None in folders.values():
        raise UserError(
            "--model and --baseline must be training runs: figures are drawn from their metrics.jsonl and "
            "eval.jsonl"
        )
    Path(out).mkdir(parents=True, exist_ok=True)
    if data or run_config(model)["stage"] == "pretrain":
        draw_tsne(
            {
                kind: token_groups(str(folder), data, image_folder, samples)
                for kind, folder in folders.items()
            },
            f"{out}/tsne.png",
        )
    runs = {kind: [history(folder)] for kind, folder in folders.items()}
    measures = {
        name: name
        for name, values in runs["SEA"][0].items()
        if len(values) > 1 and is_score(name) and len(runs["baseline"][0].get(name, ())) > 1
    }
    if measures:
        draw_curves(runs, measures, f"{out}/curves.png")
    else:
        print(
            "no curves.png: it takes a measure at two steps or more of both runs: train with --val_data, or call "
            "eval.py for several checkpoints"
        )
    scores = {
        kind: {
            name: values[max(values)]
            for name, values in of[0].items()
            if is_score(name) and "tacs" not in name
        }
        for kind, of in runs.items()
    }
    if len(set.intersection(*map(set, scores.values()))) > 2:
        draw_radar(scores, f"{out}/radar.png")
    else:
        print(
            "no radar.png: it takes three benchmarks that were measured for both runs, by eval.py or lmms-eval"
        )


def is_score(name):
    """Of the measures in a history those that the paper's figures show: TACS, and one for each benchmark."""
    return (
        name in ("val_tacs", "tacs", "pope f1")
        or name.endswith(" all")
        and not name.startswith(("words", "true"))
    )


def last(seeds, measure):
    """The last value of a measure in each seed's history that has it."""
    return [seed[measure][max(seed[measure])] for seed in seeds if measure in seed]


def print_table(runs, measures):
    """Markdown: the last value of each measure, mean (least to most over seeds). runs: as of draw_curves."""
    print(f"| | {' | '.join(runs)} |\n|---|{'---|' * len(runs)}")
    for measure, title in measures.items():
        columns = (last(seeds, measure) for seeds in runs.values())
        cells = (
            f"{sum(v) / len(v):.3f} ({min(v):.3f} to {max(v):.3f})" if v else "" for v in columns
        )
        print(f"| {title} | {' | '.join(cells)} |")


def main(argv=None):
    return run_command(
        __doc__,
        {
            "tacs": eval_tacs,
            "gap": eval_gap,
            "words": eval_words,
            "pope": eval_pope,
            "vqa": eval_vqa,
            "chat": chat,
            "export": export,
            "figures": figures,
        },
        argv,
    )


if __name__ == "__main__":
    cli(main)
