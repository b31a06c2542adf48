"""Semantic labels for image patches: a word list, CLIP's nearest words of each patch (Eq. 6-8), the store of them.

    python labels.py words   --data train.json --out words.txt
    python labels.py extract --data train.json --image_folder images --words words.txt --out labels
    python labels.py show    --labels labels --out labels.png

`torchrun --nproc_per_node=8 -- labels.py extract ...` shares the images out, over several nodes too if they see the
same folder (the -- keeps torchrun from reading --n as its own flag). Training reads the store and needs no open_clip.
Dimensions as in loss.py.
"""

import collections
import colorsys
import functools
import hashlib
import json
import math
import os
import re
import time
import zlib
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
STOP_WORDS = set(
    [
        "a",
        "about",
        "above",
        "across",
        "after",
        "again",
        "against",
        "all",
        "along",
        "also",
        "an",
        "and",
        "another",
        "any",
        "are",
        "around",
        "as",
        "at",
        "away",
        "back",
        "be",
        "because",
        "been",
        "before",
        "behind",
        "being",
        "below",
        "beside",
        "between",
        "both",
        "but",
        "by",
        "can",
        "could",
        "did",
        "do",
        "does",
        "doing",
        "down",
        "during",
        "each",
        "either",
        "even",
        "every",
        "few",
        "for",
        "from",
        "further",
        "had",
        "has",
        "have",
        "having",
        "he",
        "her",
        "here",
        "his",
        "how",
        "if",
        "in",
        "instead",
        "into",
        "is",
        "it",
        "its",
        "just",
        "least",
        "less",
        "like",
        "made",
        "make",
        "makes",
        "many",
        "may",
        "more",
        "most",
        "much",
        "must",
        "my",
        "near",
        "neither",
        "no",
        "nor",
        "not",
        "of",
        "off",
        "often",
        "on",
        "once",
        "one",
        "only",
        "onto",
        "or",
        "other",
        "our",
        "out",
        "over",
        "own",
        "rather",
        "really",
        "same",
        "several",
        "she",
        "should",
        "since",
        "so",
        "some",
        "something",
        "still",
        "such",
        "than",
        "that",
        "the",
        "their",
        "them",
        "then",
        "there",
        "these",
        "they",
        "this",
        "those",
        "though",
        "through",
        "to",
        "together",
        "too",
        "toward",
        "towards",
        "under",
        "until",
        "up",
        "upon",
        "us",
        "very",
        "was",
        "we",
        "well",
        "were",
        "what",
        "when",
        "where",
        "whether",
        "which",
        "while",
        "who",
        "whose",
        "why",
        "will",
        "with",
        "within",
        "without",
        "would",
        "yes",
        "yet",
        "you",
        "your",
    ]
)


# ------------------------------------------------------------------------------------------------- word list


def write_words(data: str, out: str, extra: str = "", min_count: int = 5, tagger: str = ""):
    """The word list of Appendix C: the words of the captions, in lower case, that are no stop words and occur min_count
    times or more; frequent ones first, ties by the alphabet; then those of the file `extra` (such as a 2of12 list).
    tagger: a spaCy pipeline (en_core_web_sm) that leaves only nouns, adjectives, verbs and participles.

    PAPER: words stay as they are written: the lemma of "striped", an attribute, would be "stripe", a thing.
    """
    captions = (
        turn["value"]
        for s in load_samples(data)
        for turn in s["conversations"]
        if turn["from"] == "gpt"
    )
    counts, other = collections.Counter(), collections.Counter()
    for content, rest in tqdm(_tagged(captions, tagger), desc="reading captions", unit=" captions"):
        counts.update(content)
        other.update(rest)
    groups = {
        "kept": [],
        f"rarer than {min_count}": [],
        "stop words": [],
        "single letters": [],
        "other parts of speech": [word for word, _ in other.most_common() if word not in counts],
    }
    for word in sorted(counts, key=lambda w: (-counts[w], w)):
        groups[
            "single letters"
            if len(word) == 1
            else "stop words"
            if word in STOP_WORDS
            else "kept"
            if counts[word] >= min_count
            else f"rarer than {min_count}"
        ].append(word)
    extra_words = read_words(extra) if extra else []
    merged = list(dict.fromkeys(groups["kept"] + extra_words))
    if not merged:
        raise UserError(f"{data}: no word is left; lower --min_count")
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(out).write_text("\n".join(merged) + "\n", encoding="utf-8")
    for reason, group in groups.items():
        print(f"{len(group):9,} {reason}: {', '.join(group[:8])} ...")
    print(
        f"{len(extra_words):9,} of {extra or 'no extra list'}, {len(merged) - len(groups['kept']):,} of them new\n"
        f"{len(merged):9,} words in {out}"
    )


def _tagged(captions, tagger):
    """Yield of each caption its words, and with a tagger apart from them those of other parts of speech."""
    word, shortened = (
        r"[^\W\d_]+(?:-[^\W\d_]+)*",
        r"\w+n['\u2019]t\b|['\u2019](s|re|ve|ll|d|m)\b",
    )  # don't, dog's
    if not tagger:
        yield from (
            (re.findall(word, re.sub(shortened, "", caption.lower())), ()) for caption in captions
        )
        return
    try:
        import spacy

        nlp = spacy.load(tagger, exclude=["parser", "ner", "lemmatizer"])
    except (ImportError, OSError) as e:
        raise UserError(
            f"--tagger {tagger}: cannot be loaded ({e}); pip install spacy, then python -m spacy download "
            "en_core_web_sm"
        ) from e
    for doc in nlp.pipe(captions, batch_size=1000):
        tokens = [
            (t.lower_, t.pos_ in ("NOUN", "ADJ", "VERB"))
            for t in doc
            if re.fullmatch(word, t.lower_)
        ]
        yield [w for w, content in tokens if content], [w for w, content in tokens if not content]


def read_words(path):
    """One word (or short phrase) a line -> list; errors name the line."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(
            f"{path}: cannot read the word list ({e}); make one with labels.py words"
        ) from e
    if not lines:
        raise UserError(f"{path}: the word list is empty")
    seen = set()
    for number, word in enumerate(lines, 1):
        if not word.strip() or word in seen:
            raise UserError(
                f"{path}, line {number}: {word!r} is empty or stands above already; remove the line"
            )
        seen.add(word)
    return lines


# -------------------------------------------------------------------------------------------- CLIP embeddings


def load_encoder(name, pretrained="", device="cpu"):
    """An open_clip model with its .tokenizer. name: a short name of ENCODERS, a folder with open_clip_config.json
    and weights, or any open_clip name together with its `pretrained` tag."""
    import open_clip

    if pretrained and (name in ENCODERS or Path(name).is_dir()):
        raise UserError(f"--encoder {name} brings its weights; leave out --pretrained")
    if name in ENCODERS:
        name, pretrained = ENCODERS[name][:2]
    elif Path(name).is_dir():
        name = f"local-dir:{name}"
    elif not pretrained:
        raise UserError(
            f"--encoder {name}: neither a folder nor one of {', '.join(ENCODERS)}; an open_clip name needs "
            "its weights too (--pretrained)"
        )
    try:
        encoder = open_clip.create_model(
            name, pretrained=pretrained or None, device=device, require_pretrained=True
        )
        encoder.tokenizer = open_clip.get_tokenizer(name)
    except (OSError, RuntimeError, ValueError) as e:
        raise UserError(
            f"--encoder {name}: cannot be loaded ({str(e).strip().splitlines()[0]})"
        ) from e
    return encoder.eval().requires_grad_(False)


def weights_crc(encoder):
    """A fingerprint of every weight."""
    crc = 0
    for weight in encoder.state_dict().values():
        crc = zlib.crc32(weight.cpu().contiguous().flatten().view(torch.uint8).numpy(), crc)
    return f"{crc:08x}"


def encoder_geometry(encoder):
    """The keywords of data.geometry for an open_clip model, from its own preprocessing config."""
    cfg = encoder.visual.preprocess_cfg
    size = cfg["size"] if isinstance(cfg["size"], int) else cfg["size"][0]
    return dict(
        size=size,
        mode="square" if cfg["resize_mode"] == "shortest" else "squash",
        mean=tuple(cfg["mean"]),
        std=tuple(cfg["std"]),
    )


def patch_paths(encoder):
    """The ways patch_embeddings can read this encoder's patches, the usual one first; none if it is no ViT or, as
    CoCa, mixes patches after its last block."""
    visual = encoder.visual
    if hasattr(visual, "transformer"):
        return ["value", "last", "vv"] if visual.attn_pool is None else []
    trunk = getattr(visual, "trunk", None)  # of timm
    if not hasattr(trunk, "num_prefix_tokens"):
        return []
    return ["last"] if getattr(trunk, "attn_pool", None) is None else ["value"]


def usual_sign(encoder, path):
    """Of the cosine, as said at ENCODERS; where patches are averaged to the image's embedding, nothing is inverted."""
    visual = encoder.visual
    pooling = visual.trunk.global_pool if hasattr(visual, "trunk") else visual.pool_type
    return -1 if path == "last" and pooling != "avg" else 1


@torch.no_grad()
def patch_embeddings(encoder, pixels, path="last"):
    """V = f(X_image) (Eq. 6): pixels [B, 3, S, S] -> [B, m, d], each patch L2-normalised, in the text's space.

    last: the raw tokens after the last block, as the paper.
    value: in the last block every token attends to itself alone, so its own value reaches the output (MaskCLIP).
    vv: the outputs of v-v attention in the last 6 blocks, summed, without their MLPs (CLIP Surgery).
    Towers of timm have one path: `value` if they pool by attention (SigLIP), where each patch is pooled alone; else
    `last`.
    """
    visual = encoder.visual
    if path not in patch_paths(encoder):
        raise UserError(
            f"--path {path}: this encoder has {' and '.join(patch_paths(encoder)) or 'no patches to read'}"
        )
    if hasattr(visual, "trunk"):
        trunk = visual.trunk
        tokens = trunk.forward_features(pixels)[:, trunk.num_prefix_tokens :]
        x = tokens.flatten(0, 1)
        if (
            path == "value"
        ):  # softmax over one key is 1; in parts, for GPU kernels that take 65,535 sequences at most
            x = torch.cat([trunk.attn_pool(part) for part in x.unsqueeze(1).split(32768)])
        return F.normalize(
            visual.head(trunk.head(trunk.fc_norm(x))).unflatten(0, tokens.shape[:2]).float(), dim=-1
        )

    blocks, x, surgery = (
        visual.transformer.resblocks,
        visual._embeds(pixels),
        None,
    )  # x: (B, 1 + m, width)
    alone = torch.full((x.shape[1], x.shape[1]), -torch.inf, device=x.device).fill_diagonal_(0)
    for to_go, block in zip(range(len(blocks), 0, -1), blocks):
        if path == "vv" and to_go <= SURGERY_DEPTH:
            surgery = (x if surgery is None else surgery) + _vv_attention(block.attn, block.ln_1(x))
        x = block(x, attn_mask=alone if path == "value" and to_go == 1 else None)
    x = surgery if path == "vv" else x
    return F.normalize((visual.ln_post(x)[:, 1:] @ visual.proj).float(), dim=-1)


def _vv_attention(attn, x):
    """Self-attention with the values in place of queries and keys: [B, tokens, width] -> the same."""
    value_weight, value_bias = attn.in_proj_weight.chunk(3)[2], attn.in_proj_bias.chunk(3)[2]
    v = F.linear(x, value_weight, value_bias).unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)
    return attn.out_proj(F.scaled_dot_product_attention(v, v, v).transpose(1, 2).flatten(2))


@torch.no_grad()
def word_embeddings(encoder, words, prompt=PROMPT, batch_size=256):
    """T = h(W) (Eq. 7): words (q strings) -> [q, d], each L2-normalised. prompt: a text with {} for the word."""
    device = next(encoder.parameters()).device
    bar = tqdm(
        range(0, len(words), batch_size),
        desc="embedding words",
        disable=len(words) <= batch_size or os.environ.get("RANK", "0") != "0",
    )
    texts = ([prompt.replace("{}", w) for w in words[i : i + batch_size]] for i in bar)
    embeds = torch.cat(
        [_encode_text(encoder, encoder.tokenizer(t).to(device)).float() for t in texts]
    )
    return F.normalize(embeds, dim=-1)


def _encode_text(encoder, tokens):
    """encode_text. Where it is causal and takes what stands at the end token, what follows the last end
    token of the batch cannot matter: 10 positions instead of 77, for words."""
    tower, prefix = (encoder.text, "text.") if hasattr(encoder, "text") else (encoder, "")
    pool = getattr(tower, "text_pool_type", getattr(tower, "pool_type", None))
    if (
        pool != "argmax"
        or getattr(tower, "attn_mask", None) is None
        or getattr(tower, "cls_emb", None) is not None
    ):
        return encoder.encode_text(tokens, normalize=True)
    end = int(tokens.argmax(dim=1).max()) + 1
    shorter = {
        f"{prefix}positional_embedding": tower.positional_embedding[:end],
        f"{prefix}attn_mask": tower.attn_mask[:end, :end],
    }
    out = torch.func.functional_call(encoder, shorter, (None, tokens[:, :end]))
    return out["text_features"] if isinstance(out, dict) else out[1]


# ---------------------------------------------------------------------------------------------- nearest words


def nearest_words(patch_embeds, word_embeds, n, sign, min_score=0.0):
    """The top n words of each patch by score = sign * cosine (Eq. 8), exactly; equal scores: the lower id first.

    patch_embeds [P, d] and word_embeds [q, d], both L2-normalised, sign +1 or -1 -> ids [P, n] int64, -1 where fewer
    than n words score above min_score, and scores [P, n] float32, descending, padded with 0.

    Products in bf16, where that is fast, choose candidates, which are scored in float64. A patch of which a rounding
    error could have hidden a word is searched again with products in float32, and if that is not enough (very many
    equal scores), by sorting. Works through blocks of the P x q scores: its memory does not grow with q.
    """
    device, width = patch_embeds.device, min(n, len(word_embeds))
    patches, unsure = sign * patch_embeds, torch.arange(len(patch_embeds), device=device)
    ids = torch.full((len(patches), n), -1, device=device)
    scores = torch.zeros(len(patches), n, dtype=torch.float64, device=device)
    fast = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()
    for dtype in [torch.bfloat16, torch.float32] if fast else [torch.float32]:
        if len(unsure):
            ids[unsure, :width], scores[unsure, :width], bound = _search(
                patches[unsure], word_embeds, n, dtype
            )
            unsure = unsure[bound >= scores[unsure, width - 1].clamp(min=min_score)]
    for rows in unsure.split(1024) if len(unsure) else ():
        ids[rows, :width], scores[rows, :width] = _sort(patches[rows], word_embeds, n)
    none = (scores <= min_score) | (ids < 0)
    return ids.masked_fill(none, -1), scores.float().masked_fill(none, min(0.0, min_score))


def _search(patches, words, n, dtype):
    """The 4n + 24 words of each patch whose products in `dtype` are largest, scored again in float64 -> ids and scores
    [P, n] of the best of these, and [P] a bound: none of the other words scores more."""
    cuda = patches.device.type == "cuda"
    patch_block, word_block, group, rescored = (
        (4096, 32768, 32, 512) if cuda else (2048, 8192, 16, 4)
    )
    k, block = min(4 * n + 24, len(words)), min(word_block, -(-len(words) // group) * group)
    coarse, mean = (
        patches.to(dtype),
        words.mean(0),
    )  # a shift of all words changes no order, but less is rounded
    best = torch.full((len(patches), k), -torch.inf, dtype=dtype, device=patches.device)
    ids = torch.zeros_like(best, dtype=torch.int64)
    # temporaries of this size are cheaper to reuse than to allocate
    buffer = best.new_empty(min(patch_block, len(patches)), block)
    centred, coarse_words = (
        words.new_empty(block, words.shape[1]),
        best.new_zeros(block, words.shape[1]),
    )
    inside = torch.arange(group, device=ids.device)[:, None] * (block // group)
    norm = error = patches.new_zeros(
        ()
    )  # the largest of any word, and of what rounding takes from it
    for start in range(0, len(words), block):
        part = words[start : start + block]
        part = torch.sub(part, mean, out=centred[: len(part)])
        coarse_words[: len(part)] = part
        norm = norm.maximum(part.norm(dim=1).amax())
        error = error.maximum(part.sub_(coarse_words[: len(part)]).norm(dim=1).amax())
        for at in range(0, len(patches), patch_block):
            here = slice(at, at + patch_block)
            products = torch.mm(coarse[here], coarse_words.T, out=buffer[: len(coarse[here])])
            products[:, len(part) :] = -torch.inf
            # the best k words are in the k groups with the best maxima: only these are looked at one by one
            groups = products.unflatten(1, (group, -1))
            maxima = groups.amax(1)
            better = (maxima > best[here].amin(1, keepdim=True)).sum(1).amax()
            top = maxima.topk(min(k, int(better)), dim=1, sorted=False)[1].unsqueeze(1)
            found = groups.gather(2, top.expand(-1, group, -1)).flatten(1)
            best[here], order = torch.cat([best[here], found], 1).topk(k, dim=1, sorted=False)
            ids[here] = torch.cat([ids[here], (start + inside + top).flatten(1)], 1).gather(
                1, order
            )

    ids = ids.sort(dim=1)[0]  # then a stable sort keeps the lower id first among equals
    scores = torch.cat(
        [
            words[i].double().mul_(p.double().unsqueeze(1)).sum(-1)
            for p, i in zip(patches.split(rescored), ids.split(rescored))
        ]
    )
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    if k == len(words):
        return (
            ids.gather(1, order)[:, :n],
            scores[:, :n],
            scores.new_full((len(scores),), -torch.inf),
        )
    # the mean's part and the last candidate's product; its rounding; that of the patch, of the word, and of d float32
    # additions
    last = best.amin(1).double()
    bound = (
        patches.double() @ mean.double()
        + last
        + last.abs() * torch.finfo(dtype).eps
        + (patches - coarse).norm(dim=1) * norm
        + coarse.double().norm(dim=1) * (error + norm * patches.shape[1] * 2**-22)
    )
    return ids.gather(1, order)[:, :n], scores[:, :n], bound


def _sort(patches, words, n, block=4096):
    """The first n columns of a stable descending sort of the float64 scores of each patch."""
    ids, scores = (
        torch.zeros(len(patches), 0, dtype=d, device=patches.device)
        for d in (torch.int64, torch.float64)
    )
    for start in range(0, len(words), block):
        new = patches.double() @ words[start : start + block].double().T
        new_ids = torch.arange(start, start + new.shape[1], device=ids.device).expand_as(new)
        scores, order = torch.cat([scores, new], 1).sort(dim=1, descending=True, stable=True)
        ids, scores = torch.cat([ids, new_ids], 1).gather(1, order)[:, :n], scores[:, :n]
    return ids, scores


# -------------------------------------------------------------------------------------------------- the store


def digest(texts):
    """A short fingerprint of a list of strings."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


class LabelStore:
    """The labels of a data file, on disk: label i is that of sample i's image.

    folder/ meta.json         everything the labels depend on, and where the data was
            words.txt         the words that ids stand for
            words-00000.npy   the embeddings of 65,536 of them; only labels.py needs them
            labels-00000.npy  records of `shard` images: ids [m, n] uint16 or int32 (65535 or -1 = none), scores [m, n]
                              float16, the CRC-32 of the image file
    store[i] -> ids [m, n] int64 (-1 = none), scores [m, n] float32. Nothing is held in memory but the words.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        try:
            self.meta = json.loads((self.folder / "meta.json").read_text())
            self.shards = _files(self.folder, "labels", self.meta["images"], self.meta["shard"])
        except (OSError, ValueError, KeyError) as e:
            raise UserError(
                f"{folder}: no label store ({e!r}); make one with labels.py extract --out {folder}"
            ) from e
        done = sum(len(_load(path)) for path in self.shards if path.exists())
        if done < len(self):
            raise UserError(
                f"{folder}: only {done} of {len(self)} images are labelled; run the same labels.py extract "
                "again to finish"
            )
        self.words = read_words(self.folder / "words.txt")
        if digest(self.words) != self.meta["words"]:
            raise UserError(f"{folder}/words.txt: not the words that were labelled; put them back")

    def __len__(self):
        return self.meta["images"]

    def record(self, i):
        return _load(self.shards[i // self.meta["shard"]])[i % self.meta["shard"]]

    def __getitem__(self, i):
        record = self.record(i)
        ids = record["ids"].astype(np.int64)
        if record["ids"].dtype == np.uint16:
            ids[ids == 65535] = -1
        return torch.from_numpy(ids), torch.from_numpy(record["scores"].astype(np.float32))

    def check(self, samples, geometry, grid):
        """Refuse to be used for other samples, another image geometry or another patch grid."""
        run = dict(
            manifest=digest(s["image"] for s in samples),
            size=geometry["size"],
            mode=geometry["mode"],
            grid=list(grid),
        )
        for field, value in run.items():
            if self.meta[field] != value:
                raise UserError(
                    f"{self.folder}: made with {field} = {self.meta[field]}, this run has {field} = "
                    f"{value}; run labels.py extract for this data and vision tower with another --out"
                )


def _files(folder, name, rows, size):
    return [folder / f"{name}-{k:05}.npy" for k in range(-(-rows // size))]


def record_type(q, m, n):
    """Of one image in a store: q words, m patches, n labels."""
    return np.dtype(
        [
            ("ids", np.uint16 if q < 65535 else np.int32, (m, n)),
            ("scores", np.float16, (m, n)),
            ("crc", np.uint32),
        ]
    )


def _load(path):
    try:
        return np.load(path, mmap_mode="r")
    except Exception as e:  # numpy has many ways to say that a file is not whole
        raise UserError(
            f"{path}: missing or damaged ({e}); remove it and run the same labels.py extract again"
        ) from e


def _write(path, content):
    """Write text or an array so that the file is there whole or not at all, whenever this process is killed."""
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as f:
        f.write(content.encode()) if isinstance(content, str) else np.save(f, content)
        f.flush()
        os.fsync(f.fileno())
    os.replace(part, path)


def _wait(path):
    while not path.exists():
        time.sleep(0.2)


def _device():
    """This rank's. Products must be rounded as the bound in _search says."""
    torch.backends.cuda.matmul.allow_tf32 = (
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    ) = False
    return torch.device(
        f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    )


def _start_store(folder, meta, words, rank):
    """Describe a store, or go on with one of the same settings; rank 0 writes, the others wait for it."""
    path = folder / "meta.json"
    if rank == 0 and not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.glob("*.npy")):
            raise UserError(
                f"{folder}: holds files of unknown settings (no meta.json); choose another --out"
            )
        _write(folder / "words.txt", "\n".join(words) + "\n")
        _write(path, json.dumps(meta, indent=1))  # last: with it, both are there
    _wait(path)
    try:
        old = json.loads(path.read_text())
    except ValueError as e:
        raise UserError(f"{path}: damaged ({e}); choose another --out or remove the folder") from e
    for field in sorted(meta.keys() - {"data", "image_folder"}):
        if old.get(field) != meta[field]:
            raise UserError(
                f"{folder}: holds labels with {field} = {old.get(field)}, asked for are {field} = "
                f"{meta[field]}; choose another --out or remove the folder"
            )
    if rank == 0:
        _write(path, json.dumps(meta, indent=1))  # where the data is now


def _word_matrix(folder, words, meta, encoder, rank=0, world=1):
    """The embeddings of all words [q, d]: from the store, where each rank first puts its part of what is missing."""
    size = 65_536
    files = _files(folder, "words", len(words), size)
    for k in range(rank, len(files), world):
        if not files[k].exists():
            _write(
                files[k],
                word_embeddings(encoder, words[k * size : (k + 1) * size], meta["prompt"])
                .cpu()
                .numpy(),
            )
    device, matrix = next(encoder.parameters()).device, None
    for k, path in enumerate(files):
        _wait(path)
        part = torch.from_numpy(_load(path).copy()).to(device)
        matrix = part.new_empty(len(words), part.shape[1]) if matrix is None else matrix
        matrix[k * size : (k + 1) * size] = part
    return (
        F.normalize(matrix.sub_(matrix.mean(0)), dim=-1, out=matrix) if meta["center"] else matrix
    )


def most_likely(ids, scores, mass, scale):
    """Beyond the paper: of each patch's labels the fewest whose probabilities, softmax(scale * score), add up to mass:
    few where CLIP is sure, many where it is not. ids, scores [P, n] as of nearest_words -> the same, cut short."""
    probability = torch.softmax(
        (scale * scores).masked_fill(ids < 0, -torch.inf), dim=-1
    ).nan_to_num()
    cut = probability.cumsum(-1) - probability >= mass
    return ids.masked_fill(cut, -1), scores.masked_fill(cut, 0)


def _read_batch(paths, geo, rows):
    """In a worker: the row numbers, their pixels [B, 3, S, S], the CRCs of the files."""
    images, crcs = zip(*(read_image(paths[i]) for i in rows))
    return rows, torch.stack([geometry(image, **geo) for image in images]), crcs


def extract(
    data: str,
    image_folder: str,
    words: str,
    out: str,
    encoder: str = "clip-l-336",
    pretrained: str = "",
    path: Literal["", "last", "value", "vv"] = "",
    sign: Literal[0, -1, 1] = 0,
    prompt: str = PROMPT,
    center: bool = False,
    n: int = 10,
    min_score: float = 0.0,
    mass: float = 1.0,
    batch_size: int = 32,
    workers: int = 4,
    shard: int = 256,
    dtype: Literal["", "float32", "bfloat16"] = "",
):
    """Label the images of a data file with the words of a list (one a line) and write the store `out`; run again after
    an interruption, it goes on from there. encoder: clip-l-336, clip-l-224, siglip-384, a folder, or an open_clip name
    with its `pretrained` tag; path and sign: by default the encoder's; center: subtract the mean word; n: labels a
    patch, at most; mass: below 1, as many of them as make up this probability; shard: images a file, what an
    interruption can cost; dtype: of the encoder, bfloat16 on a GPU."""
    if not min_score >= 0 or not 0 < mass <= 1 or min(n, batch_size, shard) < 1:
        raise UserError(
            "--min_score must not be negative (scores become sampling probabilities, Eq. 9), --mass must "
            "be above 0 and at most 1, --n, --batch_size and --shard at least 1"
        )
    if "{}" not in prompt:
        raise UserError(f"--prompt {prompt!r} has no {{}} for the word")
    if not Path(image_folder).is_dir():
        raise UserError(f"--image_folder {image_folder}: no such folder")
    rank, world = (
        int(os.environ.get("RANK", 0)),
        int(os.environ.get("WORLD_SIZE", 1)),
    )  # as torchrun sets them
    device = _device()
    dtype = dtype or ("bfloat16" if device.type == "cuda" else "float32")
    samples, words, out = load_samples(data), read_words(words), Path(out)
    clip = load_encoder(encoder, pretrained, device)
    path = path or (
        ENCODERS[encoder][2] if encoder in ENCODERS else next(iter(patch_paths(clip)), "")
    )
    if not path:
        raise UserError(
            f"--encoder {encoder}: has no patches to read; use a ViT without pooling of several queries"
        )
    sign = sign or usual_sign(clip, path)
    geo = encoder_geometry(clip)
    m = patch_embeddings(
        clip, torch.zeros(1, 3, geo["size"], geo["size"], device=device), path
    ).shape[1]
    meta = dict(
        images=len(samples),
        manifest=digest(s["image"] for s in samples),
        words=digest(words),
        encoder=str(Path(encoder).resolve()) if Path(encoder).is_dir() else encoder,
        pretrained=pretrained,
        weights=weights_crc(clip),
        **geo,
        grid=[math.isqrt(m)] * 2,
        path=path,
        sign=sign,
        prompt=prompt,
        center=center,
        n=n,
        min_score=min_score,
        mass=mass,
        shard=shard,
        dtype=dtype,
        data=str(Path(data).resolve()),
        image_folder=str(Path(image_folder).resolve()),
    )
    meta = json.loads(json.dumps(meta))  # as it will be read again
    _start_store(out, meta, words, rank)

    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        word_embeds = _word_matrix(out, words, meta, clip, rank, world)
    record = record_type(len(words), m, n)
    files = _files(out, "labels", len(samples), shard)
    # which files are this rank's must not depend on what the others have done
    todo = [
        range(k * shard, min((k + 1) * shard, len(samples)))
        for k in range(rank, len(files), world)
        if not files[k].exists()
    ]
    batches = [
        list(rows[i : i + batch_size]) for rows in todo for i in range(0, len(rows), batch_size)
    ]
    paths = [Path(image_folder) / sample["image"] for sample in samples]
    loader = DataLoader(
        range(len(paths)),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=functools.partial(_read_batch, paths, geo),
    )
    name = "labelling" if world == 1 else f"labelling (rank 0 of {world})"
    with tqdm(total=sum(map(len, todo)), desc=name, unit="img", disable=rank > 0) as bar:
        for rows, pixels, crcs in loader:
            at = rows[0] % shard
            if at == 0:
                records = np.zeros(min(shard, len(samples) - rows[0]), record)
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
                patches = patch_embeddings(clip, pixels.to(device), path).flatten(0, 1)
            if not patches.isfinite().all():
                raise UserError(
                    f"{paths[rows[0]]} to {paths[rows[-1]]}: the encoder's output is not finite"
                )
            ids, scores = nearest_words(patches, word_embeds, n, sign, min_score)
            if mass < 1:
                ids, scores = most_likely(ids, scores, mass, clip.logit_scale.exp())
            done = records[at : at + len(rows)]
            done["ids"] = ids.view(-1, m, n).cpu().numpy().astype(record["ids"].base)  # -1 -> 65535
            done["scores"], done["crc"] = scores.view(-1, m, n).cpu().numpy(), crcs
            if at + len(rows) == len(records):
                _write(files[rows[0] // shard], records)
            bar.update(len(rows))


# --------------------------------------------------------------------------------------------------- pictures


def true_share(truth, words):
    """Share of the judged patches whose word is true -> {kind: share, "all": share}. words: {image: the m words of its
    patches}, truth: a JSON file {image: {kind: {patch: [words that are true]}}}, as toy.py writes it."""
    try:
        truth = json.loads(Path(truth).read_text())
        judged = [
            (kind, patch_words[int(at)] in accepted)
            for image, patch_words in words.items()
            for kind, patches in truth[image].items()
            for at, accepted in patches.items()
        ]
    except (OSError, ValueError, KeyError) as e:
        raise UserError(f"--truth {truth}: not a truth file of these images ({e!r})"[:300]) from e
    judged += [("all", hit) for _, hit in judged]
    return {kind: float(np.mean([hit for k, hit in judged if k == kind])) for kind in dict(judged)}


def draw_words(pictures, grid, columns, path, named=16, gap=12):
    """Write a sheet of pictures. Those with words are grey, each patch in the colour of its word, which is the same all
    over the sheet; below them stand the words of most patches (up to `named`, which have colours of their own).

    pictures: list of (pixels [3, S, S] in 0..1, the m words of the patches, or none at all), grid (H, W).
    """
    (H, W), cell = grid, max(40, 448 // grid[1])
    counts = [collections.Counter(filter(None, words)) for _, words in pictures]
    color = {
        word: tuple(int(255 * c) for c in colorsys.hsv_to_rgb(k * 0.618 % 1, 1, 1))
        for k, (word, _) in enumerate(sum(counts, collections.Counter()).most_common(2 * named))
    }
    a_line, grey = W * cell // 112, (140, 140, 140)
    width = W * cell + gap
    height = H * cell + gap + 20 * -(-min(named, max(map(len, counts))) // a_line)
    sheet = Image.new(
        "RGB", (columns * width + gap, -(-len(pictures) // columns) * height + gap), "white"
    )
    draw = ImageDraw.Draw(sheet, "RGBA")
    for i, ((pixels, words), count) in enumerate(zip(pictures, counts)):
        left, top = gap + i % columns * width, gap + i // columns * height
        image = Image.fromarray(
            (pixels * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
        )
        image = image.resize((W * cell, H * cell), Image.Resampling.LANCZOS)
        sheet.paste(image.convert("L") if words else image, (left, top))
        for at, word in enumerate(words):
            x, y = left + at % W * cell, top + at // W * cell
            if word:
                draw.rectangle(
                    (x, y, x + cell - 1, y + cell - 1), fill=(*color.get(word, grey), 100)
                )
                draw.text(
                    (x + cell / 2, y + cell / 2),
                    word,
                    anchor="mm",
                    fill="white",
                    stroke_fill="black",
                    stroke_width=1,
                    font=ImageFont.load_default(min(cell / 4, 1.7 * cell / len(word))),
                )
        for k, (word, patches) in enumerate(count.most_common(named)):
            x, y = left + k % a_line * 112, top + H * cell + 4 + k // a_line * 20
            draw.rectangle((x, y, x + 14, y + 14), fill=color.get(word, grey))
            draw.text(
                (x + 19, y + 7),
                f"{word} {patches}",
                anchor="lm",
                fill="black",
                font=ImageFont.load_default(12),
            )
    sheet.save(path)
    print(f"wrote {path}")


def show(
    labels: str,
    out: str = "labels.png",
    images: int = 4,
    truth: str = "",
    data: str = "",
    image_folder: str = "",
    sample: int = 500,
):
    """Print what a sample of the labels is like: how many, how sure, which words; with a truth.json how true, for every
    path and sign that the encoder has. Draw images beside their patches' best words. data, image_folder: if they have
    moved since the labels were made."""
    store = LabelStore(labels)
    samples, meta = load_samples(data or store.meta["data"]), store.meta
    store.check(samples, meta, meta["grid"])
    rows = np.linspace(0, len(store) - 1, max(1, min(sample, len(store)))).astype(int)
    ids, scores = map(torch.stack, zip(*(store[i] for i in rows)))  # (images, m, n)
    count, filled = (ids >= 0).sum(-1), (ids >= 0).float().mean().item()
    best = {
        samples[i]["image"]: [store.words[w] if w >= 0 else "" for w in first]
        for i, first in zip(rows, ids[..., 0])
    }
    frequent = collections.Counter(word for words in best.values() for word in words if word)
    share = np.array(list(frequent.values())) / max(1, frequent.total())
    bits = float((share * np.log2(1 / share)).sum())
    print(
        f"{len(store):,} images, {len(store.words):,} words; in {len(ids)} of the images "
        f"{(count > 0).float().mean():.1%} of the patches have a label, {count.float().mean():.1f} of at most "
        f"{meta['n']}"
    )
    heights, edges = np.histogram(scores[ids >= 0].numpy(), bins=10)
    for height, low, high in zip(heights, edges, edges[1:]):
        print(
            f"  score {low:.3f} to {high:.3f} {height / max(1, heights.sum()):6.1%} "
            + "#" * round(50 * height / max(1, heights.max()))
        )
    print(
        f"{len(frequent):,} different best words, {bits:.1f} bits of entropy (as of {2**bits:.0f} equally frequent "
        f"ones): {', '.join(f'{w} {c / frequent.total():.1%}' for w, c in frequent.most_common(10))}"
    )
    if not 0.01 < filled < 0.99:
        print(
            f"warning: min_score {meta['min_score']} lets {'nearly all' if filled > 0.5 else 'hardly any'} of the "
            "best words pass; look at the scores above, and try another --min_score, --center, --sign or --path"
        )
    pictures = []
    place = Path(image_folder or meta["image_folder"])
    for name in list(best)[:: max(1, len(best) // max(images, 1))][: max(images, 1)]:
        pixels = geometry(
            read_image(place / name)[0], meta["size"], meta["mode"], mean=(0,) * 3, std=(1,) * 3
        )
        pictures += [(pixels, []), (pixels, best[name])]
    draw_words(pictures, meta["grid"], 4 if len(pictures) > 2 else 2, out)
    if truth:
        print("share of patches whose best word is true")
        print(f"    these labels: {_shares(truth, best)}")
        _try_paths(store, samples, rows, place, truth)


def _shares(truth, words):
    return ", ".join(f"{kind} {share:.3f}" for kind, share in true_share(truth, words).items())


@torch.no_grad()
def _try_paths(store, samples, rows, image_folder, truth):
    """Print how true the best words would be with each path and sign."""
    device, meta = _device(), store.meta
    clip = load_encoder(meta["encoder"], meta["pretrained"], device)
    if weights_crc(clip) != meta["weights"]:
        raise UserError(
            f"{meta['encoder']}: its weights have changed since {store.folder} was made"
        )
    word_embeds, geo = _word_matrix(store.folder, store.words, meta, clip), encoder_geometry(clip)
    paths = {i: image_folder / samples[i]["image"] for i in rows}
    for path in patch_paths(clip):
        best = {1: {}, -1: {}}
        for part in np.array_split(rows, -(-len(rows) // 32)):
            with torch.autocast(device.type, torch.bfloat16, enabled=meta["dtype"] == "bfloat16"):
                patches = patch_embeddings(
                    clip, _read_batch(paths, geo, part)[1].to(device), path
                ).flatten(0, 1)
            for sign in best:
                ids = nearest_words(patches, word_embeds, 1, sign)[0].view(len(part), -1)
                best[sign] |= {
                    samples[i]["image"]: [store.words[w] if w >= 0 else "" for w in row]
                    for i, row in zip(part, ids)
                }
        for sign, words in best.items():
            print(f"{path:>7}, sign {sign:+}: {_shares(truth, words)}")


def main(argv=None):
    run_command(__doc__, {"words": write_words, "extract": extract, "show": show}, argv)


if __name__ == "__main__":
    cli(main)
