"""Semantic labels for image patches: a word list, CLIP's nearest words of each patch (Eq. 6-8), the store of them.

    python labels.py words   --data train.json --out words.txt
    python labels.py extract --data train.json --image_folder images --words words.txt --out labels
    python labels.py show    --labels labels --out labels.png

Training reads the store; only `extract` needs open_clip. Dimensions as in loss.py.
"""

import collections
import functools
import hashlib
import json
import math
import os
import re
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import UserError, cli, geometry, load_samples, read_image, run_command

# short name -> open_clip model, its weights, how patches are read.
# PAPER: Eq. 8 negates the cosine because OpenAI's CLIP, read at its raw last-layer tokens, favours the background
# (CLIP Surgery). That belongs to this encoder and this path: where each patch is read alone (`value`, and SigLIP's
# attention pooling) or attends by likeness (`vv`), the cosine is used as it is.
ENCODERS = {
    "clip-l-336": ("ViT-L-14-336-quickgelu", "openai", "last"),
    "clip-l-224": ("ViT-L-14-quickgelu", "openai", "last"),
    "siglip-384": ("ViT-SO400M-14-SigLIP-384", "webli", "value"),
}
PROMPT = "a photo of a {}."  # PAPER: the prompt around a word is not given; CLIP's own
SURGERY_DEPTH = 6  # blocks of the v-v path, as in CLIP Surgery

# Words that name nothing one can see: Appendix C keeps "meaningful and attribute" words.
STOP_WORDS = set("""
a about above across after again against all along also an and another any are around as at away back be because been
before behind being below beside between both but by can could did do does doing down during each either even every
few for from further had has have having he her here his how if in instead into is it its just least less like made
make makes many may more most much must my near neither no nor not of off often on once one only onto or other our out
over own rather really same several she should since so some something still such than that the their them then there
these they this those though through to together too toward towards under until up upon us very was we well were what
when where whether which while who whose why will with within without would yes yet you your
""".split())


# ------------------------------------------------------------------------------------------------- word list


def write_words(data: str, out: str, extra: str = "", min_count: int = 2):
    """Appendix C by a plain rule: the words of the captions (letters and inner hyphens, lower case, surface forms)
    that occur min_count times or more and are no stop words; frequent ones first, ties by the alphabet. Then the
    words of the file `extra` (such as a 2of12 list)."""
    captions = [turn["value"] for s in load_samples(data) for turn in s["conversations"] if turn["from"] == "gpt"]
    counts = collections.Counter(w for c in captions for w in re.findall(r"[a-z]+(?:[-'][a-z]+)*", c.lower()))
    kept = [w for w, c in counts.items() if c >= min_count and len(w) > 1 and "'" not in w and w not in STOP_WORDS]
    kept.sort(key=lambda w: (-counts[w], w))
    merged = list(dict.fromkeys(kept + (read_words(extra) if extra else [])))
    if not merged:
        raise UserError(f"{data}: no word is left; lower --min_count")
    Path(out).write_text("\n".join(merged) + "\n", encoding="utf-8")
    print(f"{len(counts):,} distinct words in the captions, {len(counts) - len(kept):,} of them dropped (stop words, "
          f"letters, rarer than {min_count}); {len(merged) - len(kept):,} added -> {len(merged):,} words in {out}")


def read_words(path):
    """One word (or short phrase) a line -> list; errors name the line."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: cannot read the word list ({e}); make one with labels.py words") from e
    if not lines:
        raise UserError(f"{path}: the word list is empty")
    seen = set()
    for number, word in enumerate(lines, 1):
        if not word.strip() or word in seen:
            raise UserError(f"{path}, line {number}: {word!r} is empty or stands above already; remove the line")
        seen.add(word)
    return lines


# -------------------------------------------------------------------------------------------- CLIP embeddings


def load_encoder(name, pretrained="", device="cpu"):
    """An open_clip model with its .tokenizer. name: a short name of ENCODERS, a folder with open_clip_config.json
    and weights, or any open_clip name together with its `pretrained` tag."""
    import open_clip

    if name in ENCODERS:
        name, pretrained = ENCODERS[name][:2]
    elif Path(name).is_dir():
        name = f"local-dir:{name}"
    elif not pretrained:
        raise UserError(f"--encoder {name}: neither a folder nor one of {', '.join(ENCODERS)}; an open_clip name needs "
                        "its weights too (--pretrained)")
    try:
        encoder = open_clip.create_model(name, pretrained=pretrained or None, device=device, require_pretrained=True)
        encoder.tokenizer = open_clip.get_tokenizer(name)
    except (OSError, RuntimeError, ValueError) as e:
        raise UserError(f"--encoder {name}: cannot be loaded ({str(e).strip().splitlines()[0]})") from e
    return encoder.eval().requires_grad_(False)


def encoder_geometry(encoder):
    """The keywords of data.geometry for an open_clip model, from its own preprocessing config."""
    cfg = encoder.visual.preprocess_cfg
    size = cfg["size"] if isinstance(cfg["size"], int) else cfg["size"][0]
    return dict(size=size, mode="square" if cfg["resize_mode"] == "shortest" else "squash",
                mean=tuple(cfg["mean"]), std=tuple(cfg["std"]))


@torch.no_grad()
def patch_embeddings(encoder, pixels, path="last"):
    """V = f(X_image) (Eq. 6): pixels [B, 3, S, S] -> [B, m, d], each patch L2-normalised, in the text's space.

    last: the raw tokens after the last block, as the paper.
    value: in the last block every token attends to itself alone, so its own value reaches the output (MaskCLIP).
    vv: the outputs of v-v attention in the last 6 blocks, summed, without their MLPs (CLIP Surgery).
    SigLIP's towers pool by attention: there each patch is pooled alone (`value`).
    """
    visual = encoder.visual
    if hasattr(visual, "trunk"):  # timm
        if path != "value" or getattr(visual.trunk, "attn_pool", None) is None:
            raise UserError(f"--path {path}: a timm tower has only `value`, and only with attention pooling")
        trunk = visual.trunk
        tokens = trunk.forward_features(pixels)[:, trunk.num_prefix_tokens:]
        alone = trunk.attn_pool(tokens.flatten(0, 1).unsqueeze(1))  # softmax over one key is 1
        return F.normalize(visual.head(trunk.head(trunk.fc_norm(alone))).unflatten(0, tokens.shape[:2]), dim=-1)

    if path not in ("last", "value", "vv"):
        raise UserError(f"--path {path}: use last, value or vv")
    blocks = visual.transformer.resblocks
    x = visual._embeds(pixels)  # (B, 1 + m, width)
    alone = torch.full((x.shape[1], x.shape[1]), -torch.inf, device=x.device).fill_diagonal_(0)
    surgery = None
    for left, block in zip(range(len(blocks), 0, -1), blocks):
        if path == "vv" and left <= SURGERY_DEPTH:
            surgery = (x if surgery is None else surgery) + _vv_attention(block.attn, block.ln_1(x))
        x = block(x, attn_mask=alone if path == "value" and left == 1 else None)
    x = surgery if path == "vv" else x
    return F.normalize(visual.ln_post(x)[:, 1:] @ visual.proj, dim=-1)


def _vv_attention(attn, x):
    """Self-attention with the values in place of queries and keys: [B, tokens, width] -> the same."""
    value_weight, value_bias = attn.in_proj_weight.chunk(3)[2], attn.in_proj_bias.chunk(3)[2]
    v = F.linear(x, value_weight, value_bias).unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)
    return attn.out_proj(F.scaled_dot_product_attention(v, v, v).transpose(1, 2).flatten(2))


@torch.no_grad()
def word_embeddings(encoder, words, prompt=PROMPT, batch_size=256):
    """T = h(W) (Eq. 7): words (q strings) -> [q, d], each L2-normalised. prompt: a text with {} for the word."""
    device = next(encoder.parameters()).device
    bar = tqdm(range(0, len(words), batch_size), desc="embedding words", disable=len(words) <= batch_size)
    texts = ([prompt.replace("{}", w) for w in words[i:i + batch_size]] for i in bar)
    return torch.cat([encoder.encode_text(encoder.tokenizer(t).to(device), normalize=True) for t in texts])


# ---------------------------------------------------------------------------------------------- nearest words


def nearest_words(patch_embeds, word_embeds, n, sign, min_score=0.0):
    """The top n words of each patch by score = sign * cosine (Eq. 8), exactly; equal scores: the lower id first.

    patch_embeds [P, d] and word_embeds [q, d], both L2-normalised, sign +1 or -1 -> ids [P, n] int64, -1 where fewer
    than n words score above min_score, and scores [P, n] float32, descending, padded with 0. Works through blocks of
    the P x q scores: its memory does not grow with q.
    """
    block = 4096
    parts = []
    for patches in patch_embeds.split(block):
        ids = torch.full((len(patches), n), -1, device=patches.device)
        scores = torch.full((len(patches), n), -torch.inf, device=patches.device)
        for start in range(0, len(word_embeds), block):
            new_scores, new_ids = _top(sign * (patches @ word_embeds[start:start + block].T).float(), n)
            # what came before has lower ids, and a stable sort keeps it first among equals
            scores, order = torch.cat([scores, new_scores], 1).sort(dim=1, descending=True, stable=True)
            ids, scores = torch.cat([ids, new_ids + start], 1).gather(1, order)[:, :n], scores[:, :n]
        parts.append((ids, scores))
    ids, scores = map(torch.cat, zip(*parts))
    none = (scores <= min_score) | (ids < 0)
    return ids.masked_fill(none, -1), scores.masked_fill(none, min(0.0, min_score))


def _top(scores, n):
    """The first n columns of a stable descending sort of each row, without sorting the row."""
    n = min(n, scores.shape[1])
    best, at = scores.topk(min(n + 1, scores.shape[1]), dim=1)
    cut = best[:, n - 1] == best[:, -1] if best.shape[1] > n else torch.zeros(len(best), dtype=torch.bool)
    at = at[:, :n].sort(dim=1)[0]
    best, order = scores.gather(1, at).sort(dim=1, descending=True, stable=True)
    at = at.gather(1, order)
    if cut.any():  # topk chose among equals at the edge as it liked: rare, so these rows may cost a full sort
        full = scores[cut].sort(dim=1, descending=True, stable=True)
        best[cut], at[cut] = full[0][:, :n], full[1][:, :n]
    return best, at


# -------------------------------------------------------------------------------------------------- the store


def digest(texts):
    """A short fingerprint of a list of strings."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


class LabelStore:
    """The labels of a data file, on disk: row i holds those of sample i's image.

    folder/ meta.json   everything the labels depend on, and where the data was
            words.txt   the words that ids stand for
            labels.npy  records of ids [m, n] uint16 or int32 (65535 or -1 = none), scores [m, n] float16, the CRC-32
                        of the image file, done
    store[i] -> ids [m, n] int64 (-1 = none), scores [m, n] float32. The file is mapped, not read.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        try:
            self.meta = json.loads((self.folder / "meta.json").read_text())
            self.records = np.load(self.folder / "labels.npy", mmap_mode="r")
        except (OSError, ValueError, EOFError) as e:
            raise UserError(f"{folder}: no label store ({e}); make one with labels.py extract --out {folder}") from e
        done = self.records["done"]
        if not done.all():
            raise UserError(f"{folder}: only {done.sum()} of {len(done)} images are labelled; run the same labels.py "
                            "extract again to finish")
        self.words = read_words(self.folder / "words.txt")

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i):
        record = self.records[i]
        ids = record["ids"].astype(np.int64)
        if record["ids"].dtype == np.uint16:
            ids[ids == 65535] = -1
        return torch.from_numpy(ids), torch.from_numpy(record["scores"].astype(np.float32))

    def check(self, samples, geometry, grid):
        """Refuse to be used for other samples, another image geometry or another patch grid."""
        run = dict(manifest=digest(s["image"] for s in samples), size=geometry["size"], mode=geometry["mode"],
                   grid=list(grid))
        for field, value in run.items():
            if self.meta[field] != value:
                raise UserError(f"{self.folder}: made with {field} = {self.meta[field]}, this run has {field} = "
                                f"{value}; run labels.py extract for this data and vision tower with another --out")


def _read_batch(samples, image_folder, geo, rows):
    """In a worker: the row numbers, their pixels [B, 3, S, S], the CRCs of the files."""
    images, crcs = zip(*(read_image(Path(image_folder) / samples[i]["image"]) for i in rows))
    return rows, torch.stack([geometry(image, **geo) for image in images]), crcs


def _open_store(folder, meta, words, rows, m):
    """Create the records of a store, or open those of an interrupted run of the same settings, for writing."""
    if (folder / "meta.json").exists():
        old = json.loads((folder / "meta.json").read_text())
        for field in sorted(meta.keys() - {"data", "image_folder"}):
            if old.get(field) != meta[field]:
                raise UserError(f"{folder}: holds labels with {field} = {old.get(field)}, asked for are {field} = "
                                f"{meta[field]}; choose another --out or remove the folder")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "words.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
        record = [("ids", np.uint16 if len(words) < 65535 else np.int32, (m, meta["n"])),
                  ("scores", np.float16, (m, meta["n"])), ("crc", np.uint32), ("done", bool)]
        np.lib.format.open_memmap(folder / "labels.npy", "w+", record, (rows,))
        (folder / "meta.json.tmp").write_text(json.dumps(meta, indent=1))
        os.replace(folder / "meta.json.tmp", folder / "meta.json")  # last: with it, the files are all there
    return np.load(folder / "labels.npy", mmap_mode="r+")


def extract(data: str, image_folder: str, words: str, out: str, encoder: str = "clip-l-336", pretrained: str = "",
            path: Literal["", "last", "value", "vv"] = "", sign: Literal[0, -1, 1] = 0, prompt: str = PROMPT,
            n: int = 10, min_score: float = 0.0, batch_size: int = 32, workers: int = 0):
    """Label the images of a data file with the words of a list (one a line) and write the store `out`; run again after
    an interruption, it goes on from there. encoder: clip-l-336, clip-l-224, siglip-384, a folder, or an open_clip name
    with its `pretrained` tag; path and sign: by default the encoder's; n: labels a patch, at most."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("labels.py extract runs as one process")
    if min_score < 0:
        raise UserError("--min_score must not be negative: scores become sampling probabilities (Eq. 9)")
    if "{}" not in prompt:
        raise UserError(f"--prompt {prompt!r} has no {{}} for the word")
    samples, words, out = load_samples(data), read_words(words), Path(out)
    path = path or (ENCODERS[encoder][2] if encoder in ENCODERS else "value")
    sign = sign or (-1 if path == "last" else 1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    clip = load_encoder(encoder, pretrained, device)
    geo = encoder_geometry(clip)
    m = patch_embeddings(clip, torch.zeros(1, 3, geo["size"], geo["size"], device=device), path).shape[1]
    meta = dict(manifest=digest(s["image"] for s in samples), words=digest(words), encoder=f"{encoder} {pretrained}",
                weights=digest(str(p.flatten()[:16].tolist()) for p in clip.state_dict().values()), size=geo["size"],
                mode=geo["mode"], grid=[math.isqrt(m)] * 2, path=path, sign=sign, prompt=prompt, n=n,
                min_score=min_score, data=str(data), image_folder=str(image_folder))
    records = _open_store(out, meta, words, len(samples), m)

    word_embeds = word_embeddings(clip, words, prompt)
    batches = [list(range(i, min(i + batch_size, len(samples)))) for i in range(0, len(samples), batch_size)]
    todo = [rows for rows in batches if not records["done"][rows].all()]
    loader = DataLoader(range(len(samples)), batch_sampler=todo, num_workers=workers,
                        collate_fn=functools.partial(_read_batch, samples, image_folder, geo))
    with tqdm(total=len(samples), initial=len(samples) - sum(map(len, todo)), desc="labelling", unit="img") as bar:
        for rows, pixels, crcs in loader:
            patches = patch_embeddings(clip, pixels.to(device), path).flatten(0, 1)
            ids, scores = nearest_words(patches, word_embeds, n, sign, min_score)
            records["ids"][rows] = ids.view(-1, m, n).cpu().numpy().astype(records["ids"].dtype)  # -1 -> 65535
            records["scores"][rows], records["crc"][rows] = scores.view(-1, m, n).cpu().numpy(), crcs
            records.flush()
            records["done"][rows] = True  # only now: a row is marked when all of it is on disk
            bar.update(len(rows))


# --------------------------------------------------------------------------------------------------- pictures


def true_share(truth, words):
    """Share of the judged patches whose word is true -> {kind: share, "all": share}. words: {image: the m words of its
    patches}, truth: a JSON file {image: {kind: {patch: [words that are true]}}}, as toy.py writes it."""
    try:
        truth = json.loads(Path(truth).read_text())
        judged = [(kind, patch_words[int(at)] in accepted) for image, patch_words in words.items()
                  for kind, patches in truth[image].items() for at, accepted in patches.items()]
    except (OSError, ValueError, KeyError) as e:
        raise UserError(f"--truth {truth}: not a truth file of these images ({e!r})"[:300]) from e
    judged += [("all", hit) for _, hit in judged]
    return {kind: float(np.mean([hit for k, hit in judged if k == kind])) for kind in dict(judged)}


def draw_words(pictures, grid, columns, path, cell=56, gap=12):
    """Write a sheet of pictures, each with its patches' words on it.

    pictures: list of (pixels [3, S, S] in 0..1, the m words of the patches), grid (H, W).
    """
    (H, W), rows = grid, -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (W * cell + gap) + gap, rows * (H * cell + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet, "RGBA")
    for i, (pixels, words) in enumerate(pictures):
        left, top = gap + i % columns * (W * cell + gap), gap + i // columns * (H * cell + gap)
        image = Image.fromarray((pixels * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy())
        sheet.paste(image.resize((W * cell, H * cell), Image.Resampling.LANCZOS), (left, top))
        for at, word in enumerate(words):
            x, y = left + at % W * cell, top + at // W * cell
            font = ImageFont.load_default(min(cell / 4, 1.7 * cell / max(len(word), 1)))
            if word:
                draw.rectangle((x, y + cell * 0.34, x + cell - 2, y + cell * 0.66), fill=(20, 20, 30, 170))
                draw.text((x + cell / 2 - 1, y + cell / 2), word, font=font, fill="white", anchor="mm")
    sheet.save(path)
    print(f"wrote {path}")


def show(labels: str, out: str = "labels.png", images: int = 4, truth: str = "", data: str = "",
         image_folder: str = ""):
    """Print how many patches have labels, and with a truth.json how true they are; draw each patch's best word.
    data, image_folder: if they have moved since the labels were made."""
    store = LabelStore(labels)
    samples, meta = load_samples(data or store.meta["data"]), store.meta
    store.check(samples, meta, meta["grid"])
    rows = np.linspace(0, len(store) - 1, min(500, len(store))).astype(int)
    ids = torch.stack([store[i][0] for i in rows])  # (images, m, n)
    count = (ids >= 0).sum(-1).float()
    print(f"{len(store):,} images, {len(store.words):,} words; in {len(ids)} of the images "
          f"{(count > 0).float().mean():.1%} of the patches have a label, {count.mean():.1f} of at most {meta['n']}")
    best = {samples[i]["image"]: [store.words[w] if w >= 0 else "" for w in first]
            for i, first in zip(rows, ids[..., 0])}
    if truth:
        shares = true_share(truth, best)
        print("the best word is true: " + ", ".join(f"{share:.3f} of {kind} patches" for kind, share in shares.items()))
    pictures = []
    for name in list(best)[:: max(1, len(best) // max(images, 1))][: max(images, 1)]:
        image, _ = read_image(Path(image_folder or meta["image_folder"]) / name)
        pixels = geometry(image, meta["size"], meta["mode"], mean=(0,) * 3, std=(1,) * 3)
        pictures.append((pixels, best[name]))
    draw_words(pictures, meta["grid"], min(2, len(pictures)), out)


def main(argv=None):
    run_command(__doc__, {"words": write_words, "extract": extract, "show": show}, argv)


if __name__ == "__main__":
    cli(main)
