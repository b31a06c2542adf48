"""How well are the visual tokens aligned with the LLM's words? TACS (Eq. 14), D (Eq. 5), nearest words (Eq. 4).

    python eval.py tacs  --model out/toy
    python eval.py gap   --model out/toy
    python eval.py words --model out/toy --baseline out/toy_baseline --out words.png

--model takes a training run's --out_dir, its model/, or one of its checkpoints. Data, images and words are those the
run's config.json names for validation, unless flags say otherwise. Dimensions as in loss.py.
"""

import contextlib
import io
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import Subset
from tqdm import tqdm

from data import IGNORE, LlavaDataset, UserError, cli, load_samples, run_command
from labels import draw_words, read_words, true_share
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
    return torch.cat([torch.cdist(x, words.float()).amin(1) for x in x_v.float().split(1024)]).mean()


def nearest_word(x_v, words):
    """The word of highest cosine with each visual token (Eq. 4). x_v [P, D], words [q, D] -> ids [P]."""
    words = F.normalize(words.float(), dim=-1)
    return torch.cat([(F.normalize(x, dim=-1) @ words.T).argmax(1) for x in x_v.float().split(1024)])


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
        total = [a + b for a, b in zip(total, (score, int(len(x_v) > 0), float(out["loss_g"]), int(is_text.sum())))]
    return total


# ------------------------------------------------------------------------------------------------ command line


def run_config(path):
    """The config.json of the run that `path` (an out_dir, its model/ or a checkpoint) belongs to."""
    folder = Path(find_model(path)).resolve()
    for parent in (folder, *folder.parents[:3]):
        if (parent / "config.json").is_file():
            config = json.loads((parent / "config.json").read_text())
            if "stage" in config:  # another one is of the Llava model
                return config
    return {}


def load_run(model, data, image_folder, samples):
    """-> SEAModel on its device, LlavaDataset of the first `samples` samples, config of the run."""
    config = run_config(model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if config.get("stage") == "pretrain":  # stage 2's data are no captions
        data = data or config["val_data"]
        image_folder = image_folder or config["val_image_folder"] or config["image_folder"]
    if not data or not image_folder:
        raise UserError(f"{model}: its run named no captions to look at; give --data and --image_folder")
    model, rows = SEAModel.from_run(model).to(device), load_samples(data)
    rows = [rows[i] for i in range(min(samples, len(rows)))]
    dataset = LlavaDataset(rows, image_folder, model.geometry, model.tokenizer, model.image_tokens)
    return model, dataset, config


@torch.no_grad()
def visual_tokens(model, dataset, desc="encoding images"):
    """X_v of every image: [images, m, D]."""
    device = model.embed_tokens.weight.device
    return torch.stack([model.encode_image(dataset[i]["pixels"].to(device)[None])[0]
                        for i in tqdm(range(len(dataset)), desc=desc)])


@torch.no_grad()
def word_matrix(model, words, config):
    """-> the list's words and Ψ(w) of each: [q, D]."""
    if not words and not config.get("labels"):
        raise UserError("this model's run had no labels: give --words, a file with a word on each line")
    words = read_words(words or Path(config["labels"]) / "words.txt")
    model.set_words(words)
    return words, torch.cat([model.word_vectors(ids) for ids in torch.arange(len(words)).split(8192)])


def eval_tacs(model: str, data: str = "", image_folder: str = "", samples: int = 100):
    """Mean TACS and caption loss over image-caption pairs: the first `samples` of `data`."""
    model, dataset, _ = load_run(model, data, image_folder, samples)
    device = model.embed_tokens.weight.device
    sums = [alignment_sums(model, Subset(dataset, [i]), device) for i in tqdm(range(len(dataset)), desc="TACS")]
    score, n, loss, tokens = map(sum, zip(*sums))
    result = dict(tacs=score / n, caption_loss=loss / tokens, pairs=n)
    print(json.dumps(result))
    return result


def eval_gap(model: str, words: str = "", data: str = "", image_folder: str = "", samples: int = 100):
    """D of Eq. 5 and the norms that it depends on: of the visual tokens, of the words, and D of unit vectors."""
    model, dataset, config = load_run(model, data, image_folder, samples)
    x_v, (_, w) = visual_tokens(model, dataset).flatten(0, 1), word_matrix(model, words, config)
    result = dict(D=float(modality_gap(x_v, w)), visual_norm=float(x_v.norm(dim=-1).mean()),
                  word_norm=float(w.norm(dim=-1).mean()),
                  D_of_unit_vectors=float(modality_gap(F.normalize(x_v, dim=-1), F.normalize(w, dim=-1))))
    print(json.dumps(result))
    return result


def eval_words(model: str, baseline: str = "", words: str = "", truth: str = "", data: str = "", image_folder: str = "",
               samples: int = 100, images: int = 2, out: str = "words.png"):
    """The nearest word of every visual token, as in Figure 1a: the most frequent ones, with a truth.json the share
    that is true, and a picture of `images` images, then the baseline's words, then the model's."""
    results, columns = {}, []
    for name in filter(None, (baseline, model)):
        sea, dataset, config = load_run(name, data, image_folder, samples)
        x_v, (word_list, w) = visual_tokens(sea, dataset), word_matrix(sea, words, config)
        nearest = nearest_word(x_v.flatten(0, 1), w).view(len(x_v), -1).tolist()
        nearest = {s["image"]: [word_list[i] for i in row] for s, row in zip(dataset.samples, nearest)}
        flat = [word for row in nearest.values() for word in row]
        top = sorted(set(flat), key=lambda word: (-flat.count(word), word))[:8]
        results[name] = {"words": {word: round(flat.count(word) / len(flat), 3) for word in top}}
        if truth:
            results[name]["true"] = true_share(truth, nearest)
        print(name, json.dumps(results[name]))
        mean, std = (torch.tensor(sea.geometry[k])[:, None, None] for k in ("mean", "std"))
        pixels = [dataset[i]["pixels"] * std + mean for i in range(min(images, len(dataset)))]
        columns = columns or [[(image, []) for image in pixels]]
        columns.append([(image, nearest[sample["image"]]) for image, sample in zip(pixels, dataset.samples)])
    draw_words([picture for row in zip(*columns) for picture in row], sea.grid, len(columns), out)
    return results


def compare(runs, truth, samples):
    """Print a table of the measures above, one column for each kind of run: mean (least to most over its seeds).

    runs {kind: [folder of a run, ...]}, truth: a truth.json, samples: how many of the runs' val_data.
    """
    rows = {kind: [] for kind in runs}
    for kind, folders in runs.items():
        for folder in tqdm(folders, desc=f"measuring {kind}"):
            of = dict(model=str(folder), samples=samples)
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                pairs, gap = eval_tacs(**of), eval_gap(**of)
                words = eval_words(**of, truth=truth, out=f"{folder}/words.png")[str(folder)]["true"]
            rows[kind].append({"TACS": pairs["tacs"], "D": gap["D"], "D of unit vectors": gap["D_of_unit_vectors"],
                               **{f"nearest word true, {name} patches": share for name, share in words.items()},
                               "caption loss": pairs["caption_loss"]})
    print(f"| {samples} held-out images | {' | '.join(rows)} |\n|---|{'---|' * len(rows)}")
    for measure in next(iter(rows.values()))[0]:
        values = [[row[measure] for row in kind] for kind in rows.values()]
        cells = (f"{sum(v) / len(v):.3f} ({min(v):.3f} to {max(v):.3f})" for v in values)
        print(f"| {measure} | {' | '.join(cells)} |")


def main(argv=None):
    return run_command(__doc__, {"tacs": eval_tacs, "gap": eval_gap, "words": eval_words}, argv)


if __name__ == "__main__":
    cli(main)
