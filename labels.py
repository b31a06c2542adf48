"""Semantic labels: the words whose CLIP embeddings are nearest to a patch (Sec. 3.1, Eq. 6 to 8).

    python labels.py words   --data train.json --out words.txt
    python labels.py extract --data train.json --image_folder images --words words.txt --out labels

`torchrun --nproc_per_node=8 -- labels.py extract ...` divides the images among processes; several
nodes need a shared filesystem. (The -- keeps torchrun from reading --n as its own flag.) Training
only reads the store, without open_clip. `python -m tools.look labels` shows it.

    B images   m patches of an image   n labels of a patch   q words   d CLIP's width
"""

import collections
import functools
import json
import math
import os
import pickle
import time
import unicodedata
import uuid
from pathlib import Path
from typing import Literal

import numpy as np
import regex
import torch
import torch.nn.functional as F
from torch.func import functional_call
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import (
    UserError,
    check_first_image,
    cli,
    digest,
    geometry,
    load_samples,
    rank,
    rank_device,
    read_image,
    run_command,
    world_size,
)

# short name -> model/weights of open_clip
ENCODERS = {
    "clip-l-336": "ViT-L-14-336-quickgelu/openai",
    "clip-l-224": "ViT-L-14-quickgelu/openai",
    "siglip-384": "ViT-SO400M-14-SigLIP-384/webli",
}
PROMPT = "a photo of a {}."  # PAPER: the prompt around a word is not given; this is CLIP's own
SURGERY_BLOCKS = 6  # how many of the last blocks the path `vv` sums over, as CLIP Surgery does
EXTRA = 22  # spare candidates that the search in bf16 keeps, so that rounding loses no word

# -------------------------------------------------------------------------------------------- CLIP


def load_encoder(name, device="cpu"):
    """An open_clip model with its .tokenizer, and .default_path for patch_embeddings.

    name: a short name of ENCODERS, a folder with open_clip_config.json and weights, or open_clip's
    MODEL/WEIGHTS, such as ViT-B-16/laion2b_s34b_b88k.
    """
    import open_clip

    model, _, weights = ENCODERS.get(name, name).partition("/")
    if Path(name).is_dir():
        model = f"local-dir:{name}"
        weights = None
    elif open_clip.get_pretrained_cfg(model, weights).get("quick_gelu") and not (
        open_clip.get_model_config(model).get("quick_gelu")
    ):  # open_clip only warns
        raise UserError(
            f"--encoder {name}: these weights were trained with QuickGELU, this model has GELU; "
            f"use {model}-quickgelu/{weights}"
        )
    try:
        encoder = open_clip.create_model(
            model, pretrained=weights, device=device, require_pretrained=True
        )
        encoder.tokenizer = open_clip.get_tokenizer(model)
    except Exception as e:  # open_clip and torch have many ways to say it
        reason = (str(e).strip() or repr(e)).splitlines()[0]
        if isinstance(e, pickle.UnpicklingError):
            reason = "its weights are damaged or a pickle of more than tensors; use safetensors"
        raise UserError(
            f"--encoder {name}: cannot be loaded ({reason}); give {', '.join(ENCODERS)}, a folder, "
            "or MODEL/WEIGHTS of open_clip"
        ) from e
    # PAPER: Eq. 8 is about OpenAI's CLIP, read after its last block. Nothing is said of other
    # weights: they are read by `value`, or by the only path they have.
    is_openai = weights is not None and weights.lower() == "openai"  # in any case, as in open_clip
    paths = patch_paths(encoder)
    encoder.default_path = "last" if is_openai else paths[0]
    return encoder.eval().requires_grad_(False)


def encoder_preprocess(encoder):
    """The keywords of data.geometry for an open_clip model, from its own preprocessing config."""
    config = encoder.visual.preprocess_cfg
    for field, built in (("resize_mode", ("shortest", "squash")), ("interpolation", ("bicubic",))):
        if config[field] not in built:
            raise UserError(f"--encoder: its {field} is {config[field]}, which is not built")
    return dict(
        size=np.max(config["size"]).item(),  # one number, or a pair of the same
        mode="square" if config["resize_mode"] == "shortest" else "squash",
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
    )


def patch_paths(encoder):
    """The paths of this encoder; the first is the default for weights that are not OpenAI's.

    UserError if there is none: it is no ViT or, as CoCa, mixes the patches after its last block.
    """
    visual = encoder.visual
    if hasattr(visual, "transformer") and visual.attn_pool is None:
        return ["value", "last", "vv"]
    trunk = getattr(visual, "trunk", None)  # a tower of timm
    if hasattr(trunk, "num_prefix_tokens"):
        return ["last"] if getattr(trunk, "attn_pool", None) is None else ["value"]
    raise UserError(
        "--encoder: the patches of this model cannot be read one by one; use a ViT such as CLIP's "
        "or SigLIP's (no ResNet, no CoCa)"
    )


def default_sign(encoder, path):
    """The sign of the cosine in Eq. 8 for patches that are read by this path.

    PAPER: Eq. 8 negates the cosine. CLIP trains only its class token to match the text; its raw
    patch tokens (`last`) turn out closer to the words of the background than to those of the
    object (CLIP Surgery). The cosine keeps its sign where this does not hold: on the other paths,
    and in towers that average their patches, which trains each patch to match the text.
    """
    visual = encoder.visual
    pooling = visual.trunk.global_pool if hasattr(visual, "trunk") else visual.pool_type
    return -1 if path == "last" and pooling != "avg" else 1


@torch.no_grad()
def patch_embeddings(encoder, pixels, path="last"):
    """V = f(X_image) (Eq. 6): pixels [B, 3, S, S] -> [B, m, d] in the text's space, L2-normalised.

    last: the tokens after the last block, as in the paper. Attention mixes in the rest of the
        image, which can outweigh the patch itself.
    value: the same, but in the last block each token attends to itself alone, so that it keeps its
        own value (MaskCLIP).
    vv: the tokens before the last SURGERY_BLOCKS plus the outputs of v-v attention in each of these
        blocks, without their MLPs (CLIP Surgery). Values take the place of queries and keys:
        tokens attend to tokens of similar content.
    A tower of timm has one path. If it pools by attention, as SigLIP does, this is `value`: each
    patch is pooled alone. Otherwise it is `last`.
    """
    paths = patch_paths(encoder)
    if path not in paths:
        raise UserError(f"--path {path}: this encoder has {' and '.join(paths)}")
    visual = encoder.visual
    read = _timm_patches if hasattr(visual, "trunk") else _open_clip_patches
    return F.normalize(read(visual, pixels, path).float(), dim=-1)


def _timm_patches(visual, pixels, path):
    """patch_embeddings of a tower of timm, before normalisation."""
    trunk = visual.trunk
    x = trunk.forward_features(pixels)[:, trunk.num_prefix_tokens :]
    if path == "value":  # the pooling sees each patch as a sequence of length 1
        x = trunk.attn_pool(x.flatten(0, 1).unsqueeze(1)).unflatten(0, x.shape[:2])
    return visual.head(trunk.head(trunk.fc_norm(x)))


def _open_clip_patches(visual, pixels, path):
    """patch_embeddings of a tower of open_clip, before normalisation."""
    blocks = visual.transformer.resblocks
    x = visual._embeds(pixels)  # [B, 1 + m, width], the class token first
    if path == "vv":
        for block in blocks[:-SURGERY_BLOCKS]:
            x = block(x)
        tokens = x
        for block in blocks[-SURGERY_BLOCKS:]:
            tokens = tokens + _vv_attention(block.attn, block.ln_1(x))
            x = block(x)
    else:
        for block in blocks[:-1]:
            x = block(x)
        only_itself = x.new_full((x.shape[1], x.shape[1]), -torch.inf).fill_diagonal_(0)
        tokens = blocks[-1](x, attn_mask=only_itself if path == "value" else None)
    return visual.ln_post(tokens)[:, 1:] @ visual.proj


def _vv_attention(attention, x):
    """Self-attention with the values in place of queries and keys: [B, 1 + m, width] -> same."""
    names = ("in_proj_weight", "in_proj_bias")  # query, key and value, stacked
    vvv = {name: torch.cat([getattr(attention, name).chunk(3)[2]] * 3) for name in names}
    return functional_call(attention, vvv, (x, x, x), dict(need_weights=False))[0]


@torch.no_grad()
def word_embeddings(encoder, words, prompt=PROMPT):
    """T = h(W) (Eq. 7): q words -> [q, d], L2-normalised. prompt: a text with {} for the word."""
    embeds = []
    for start in tqdm(range(0, len(words), 256), "embedding words"):
        texts = [prompt.replace("{}", word) for word in words[start : start + 256]]
        tokens = encoder.tokenizer(texts).to(encoder.logit_scale.device)
        embeds.append(F.normalize(encoder.encode_text(tokens).float(), dim=-1))
        if not embeds[-1].isfinite().all():
            raise UserError("--encoder: gives NaN or inf for a word; try --dtype float32")
    return torch.cat(embeds)


# ----------------------------------------------------------------------------------- nearest words


def nearest_words(patch_embeds, word_embeds, n, sign, min_score=0.0, word_block=16384):
    """The n words of highest score = sign * cosine (Eq. 8) of each patch, descending.

    patch_embeds [P, d] and word_embeds [q, d], both L2-normalised; sign +1 or -1 -> ids [P, n]
    int64, scores [P, n] float32. Where fewer than n words score above min_score, ids are padded
    with -1 and scores with 0. Memory does not grow with q.

    Fast products in bf16 pick n + EXTRA candidates, which are scored in float32. A word is missed
    only if more than EXTRA others score within bf16's rounding of it (0.002 at a cosine of 0.3).
    """
    patches = sign * patch_embeds.float()
    best = patches.new_empty(len(patches), 0, dtype=torch.bfloat16)
    candidates = torch.empty_like(best, dtype=torch.int64)
    for start in range(0, len(word_embeds), word_block):
        words = word_embeds[start : start + word_block]
        products = patches.bfloat16() @ words.bfloat16().T
        products, ids = products.topk(min(n + EXTRA, len(words)))  # the best of this block
        best = torch.cat([best, products], 1)
        candidates = torch.cat([candidates, start + ids], 1)
        best, columns = best.topk(min(n + EXTRA, best.shape[1]))  # the best so far
        candidates = candidates.gather(1, columns)

    scores = [
        (word_embeds[ids].float() * part.unsqueeze(1)).sum(-1)
        for part, ids in zip(patches.split(64), candidates.split(64))
    ]
    scores, columns = torch.cat(scores).topk(min(n, candidates.shape[1]))
    ids = candidates.gather(1, columns)
    too_low = scores <= min_score
    padding = (0, n - ids.shape[1])  # where the list has fewer than n words
    ids = F.pad(ids.masked_fill(too_low, -1), padding, value=-1)
    return ids, F.pad(scores.masked_fill(too_low, 0), padding)


# ------------------------------------------------------------------------------------- label store


class LabelStore:
    """The labels of a data file, on disk: store[i] holds those of sample i's image.

    folder/ meta.json         all that the labels depend on, and where the data was
            words.txt         the words that ids stand for
            words.npy         their embeddings, float32 [q, d]; only labels.py needs them
            labels-00000.npy  ids [m, n] int32 (-1 = none) and scores [m, n] float16 of each of the
                              first `shard` images (00001: of the next)
    store[i] -> ids [m, n] int64, scores [m, n] float32. Only the words are in memory.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        self.meta = read_meta(self.folder)
        self.files = label_files(self.folder, self.meta)
        missing = sum(not file.exists() for file in self.files)
        if missing:
            raise UserError(
                f"{folder}: {missing} of {len(self.files)} files are missing; run the same "
                "labels.py extract again to finish"
            )
        for file in self.files:
            load_array(file)  # a damaged one is refused here rather than in the middle of training
        self.words = read_words(self.folder / "words.txt")
        if digest(self.words) != self.meta["words"]:
            raise UserError(f"{folder}/words.txt: not the words that were labelled; put them back")

    def __len__(self):
        return self.meta["images"]

    def __getitem__(self, i):
        shard = self.meta["shard"]
        record = load_array(self.files[i // shard])[i % shard]
        ids = torch.from_numpy(record["ids"].astype(np.int64))
        scores = torch.from_numpy(record["scores"].astype(np.float32))
        labelled = scores[ids >= 0]
        is_cosine = (labelled > 0) & (labelled < 1.01)  # float16 rounds 1.0005 up; false for NaN
        if not is_cosine.all():
            raise UserError(
                f"{self.folder}: a label of image {i} has the score {labelled[~is_cosine][0]}, no "
                "cosine above 0; the store is damaged: run labels.py extract with another --out"
            )
        return ids, scores

    def sample(self):
        """-> the rows of up to 500 images, evenly spaced, and their ids and scores [rows, m, n]."""
        rows = range(0, len(self), math.ceil(len(self) / 500))
        ids, scores = map(torch.stack, zip(*(self[i] for i in rows)))
        return rows, ids, scores

    def check(self, samples, preprocess, grid):
        """Refuse other samples, another geometry of their images, or another grid of patches."""
        asked = image_list(samples) | dict(size=preprocess["size"], mode=preprocess["mode"])
        refuse_other(self.folder, self.meta, asked | dict(grid=list(grid)))


def image_list(samples):
    """How many images there are, and a fingerprint of which, in which order."""
    return dict(images=len(samples), image_list=digest(sample["image"] for sample in samples))


def read_meta(folder):
    """meta.json of a store -> its fields."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        if not label_files(folder, meta):
            raise ValueError("no images")
    except Exception as e:  # no such file, no JSON, no such field, no number
        raise UserError(
            f"{folder}: no label store, or a damaged one ({e!r}); make one with labels.py "
            "extract and another --out"
        ) from e
    return meta


def label_files(folder, meta):
    shards = math.ceil(meta["images"] / meta["shard"])
    return [folder / f"labels-{k:05}.npy" for k in range(shards)]


def refuse_other(folder, meta, asked):
    """UserError if a field of a store's meta.json is not as asked; it names the field."""
    for field, value in asked.items():
        if meta.get(field) != value:
            raise UserError(
                f"{folder}: made with {field} = {meta.get(field)}, this run has {field} = {value}; "
                "run labels.py extract for this data and encoder with another --out"
            )


def load_array(file):
    """An array of a store, left on the disk."""
    try:
        return np.load(file, mmap_mode="r")
    except Exception as e:  # numpy has many ways to say that a file is incomplete
        raise UserError(
            f"{file}: missing or damaged ({e}); remove it and run the same labels.py extract again"
        ) from e


def write_file(file, content):
    """Write text or an array; the file is complete or absent, whenever this process is killed.

    Processes may write the same file at once: each has a temporary file of its own.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    part = Path(f"{file}.{uuid.uuid4().hex}.part")
    try:
        with open(part, "wb") as f:
            if isinstance(content, str):
                f.write(content.encode())
            else:
                np.save(f, content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


def wait_for(file, hours):
    """Wait for a file that rank 0 writes."""
    end = time.monotonic() + 3600 * hours
    while not file.exists():
        if time.monotonic() > end:
            raise UserError(
                f"{file} does not appear: rank 0 has ended, or this node does not share the folder"
            )
        time.sleep(0.2)


# ----------------------------------------------------------------------------------------- extract


def extract(
    data: str,
    image_folder: str,
    words: str,
    out: str,
    encoder: str = "clip-l-336",
    path: Literal["", "last", "value", "vv"] = "",
    sign: Literal[0, -1, 1] = 0,
    prompt: str = PROMPT,
    n: int = 10,
    min_score: float = 0.0,
    batch_size: int = 32,
    workers: int = 4,
    shard: int = 512,
    dtype: Literal["", "float32", "bfloat16"] = "",
):
    """Label the images of a data file and write the store `out`; an interrupted run continues.

    It ends with how well a sample of the labels agrees with the captions.

    PAPER: the precision of the labels is not given.

    data: samples in LLaVA's format, an image and a caption each
    image_folder: where the samples' image paths begin
    words: the list, a word or short phrase a line
    out: the folder of the label store
    encoder: clip-l-336, clip-l-224, siglip-384, a folder, or MODEL/WEIGHTS of open_clip
    path: how patches are read: last, value or vv; by default last for OpenAI's weights, as in the
        paper, unless they come as a folder; for all others value, or the only path they have
    sign: of the cosines; 0 stands for 1, but for -1 with the path last unless the tower averages
        its patches
    prompt: what CLIP reads for a word, which stands for {}
    n: labels per patch, at most
    min_score: a label is kept when its score is above it
    shard: images per file, the most that a process which is interrupted can lose
    dtype: by default bfloat16 on a GPU, else float32
    """
    if not 0 <= min_score < 1:
        raise UserError(
            f"--min_score {min_score}: must be 0 or more, as scores become probabilities (Eq. 9), "
            "and below 1, as they are cosines"
        )
    if "{}" not in prompt:
        raise UserError(f"--prompt {prompt!r} has no {{}} for the word")
    samples = load_samples(data)
    word_list = read_words(words)
    check_first_image(samples, image_folder)
    clip = load_encoder(encoder, rank_device())
    path = path or clip.default_path
    meta = encoder_preprocess(clip) | dict(
        encoder=os.path.realpath(encoder) if os.path.isdir(encoder) else encoder,
        path=path,
        sign=sign or default_sign(clip, path),
        prompt=prompt,
        n=n,
        min_score=min_score,
        dtype=dtype or ("bfloat16" if rank_device().type == "cuda" else "float32"),
        shard=shard,
        words=digest(word_list),
        grid=patch_grid(clip, path),  # which also refuses a path that this encoder lacks
        **image_list(samples),
    )
    meta = json.loads(json.dumps(meta))  # tuples become lists, as when it is read

    folder = Path(out)
    if rank() == 0:
        start_store(folder, meta, data, image_folder, word_list, clip)
    wait_for(folder / "words.npy", hours=12)  # rank 0 embeds them
    refuse_other(folder, read_meta(folder), meta)
    label_shards(folder, meta, samples, image_folder, clip, batch_size, workers)
    if all(file.exists() for file in label_files(folder, meta)):
        report(folder, samples)
    else:
        print(f"rank {rank()} is done; the last one to finish says what the labels are like")


def label_shards(folder, meta, samples, image_folder, clip, batch_size, workers):
    """Write this rank's share of the files of labels that are not there yet."""
    size = meta["shard"]
    files = label_files(folder, meta)
    shards = [range(len(samples))[start : start + size] for start in range(0, len(samples), size)]
    # Shared out by number, not by what is missing now: other ranks are writing.
    missing = [k for k in range(rank(), len(files), world_size()) if not files[k].exists()]
    batches = []  # in the order of the loops below, which take one after another
    for k in missing:
        rows = shards[k]
        batches += [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    collate = functools.partial(load_images, image_folder, meta)
    images = iter(
        DataLoader(samples, batch_sampler=batches, num_workers=workers, collate_fn=collate)
    )

    word_embeds = torch.tensor(load_array(folder / "words.npy"), device=rank_device())
    labels_shape = (math.prod(meta["grid"]), meta["n"])
    record = np.dtype([("ids", np.int32, labels_shape), ("scores", np.float16, labels_shape)])
    for k in tqdm(missing, f"labelling (rank 0 of {world_size()})", disable=rank() > 0):
        labels = np.empty(len(shards[k]), record)
        for i in range(0, len(labels), batch_size):
            ids, scores = label_images(clip, next(images), word_embeds, meta)
            labels["ids"][i : i + batch_size] = ids.cpu()
            labels["scores"][i : i + batch_size] = scores.cpu()
        write_file(files[k], labels)


def start_store(folder, meta, data, image_folder, words, clip):
    """Write meta.json, words.txt and, if missing, words.npy; refuse a store of other settings."""
    holds_arrays = any(folder.glob("*.npy"))  # looked for first: another run may start it now
    if (folder / "meta.json").exists():
        refuse_other(folder, read_meta(folder), meta)
    elif holds_arrays:
        raise UserError(
            f"{folder}: holds files of unknown settings (no meta.json); choose another --out"
        )
    places = dict(data=os.path.realpath(data), image_folder=os.path.realpath(image_folder))
    write_file(folder / "words.txt", "\n".join(words) + "\n")
    write_file(folder / "meta.json", json.dumps(meta | places, indent=1))
    if not (folder / "words.npy").exists():
        with autocast(clip, meta["dtype"]):
            word_embeds = word_embeddings(clip, words, meta["prompt"])
        write_file(folder / "words.npy", word_embeds.cpu().numpy())


def patch_grid(clip, path):
    """[H, W] patches of an image."""
    size = encoder_preprocess(clip)["size"]
    blank = clip.logit_scale.new_zeros(1, 3, size, size)
    side = math.isqrt(patch_embeddings(clip, blank, path).shape[1])
    return [side, side]


def load_images(image_folder, meta, samples):
    """The images of a batch of samples -> pixels [B, 3, S, S], as the encoder sees them."""
    preprocess = {key: meta[key] for key in ("size", "mode", "mean", "std")}
    images = [read_image(Path(image_folder, sample["image"])) for sample in samples]
    return torch.stack([geometry(image, **preprocess) for image in images])


def label_images(clip, pixels, word_embeds, meta):
    """Eq. 6 and 8 with the settings of a store: pixels [B, 3, S, S] -> ids, scores [B, m, n]."""
    with autocast(clip, meta["dtype"]):
        patches = patch_embeddings(clip, pixels.to(word_embeds.device), meta["path"])
    if not patches.isfinite().all():
        raise UserError(f"--encoder {meta['encoder']}: gives NaN or inf; try --dtype float32")
    least = max(meta["min_score"], 2**-25)  # float16 stores this and less as 0
    ids, scores = nearest_words(patches.flatten(0, 1), word_embeds, meta["n"], meta["sign"], least)
    shape = (*patches.shape[:2], meta["n"])
    return ids.view(shape), scores.view(shape)


def autocast(clip, dtype):
    """The encoder's precision."""
    device = clip.logit_scale.device.type
    return torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16")


# ------------------------------------------------------------------------------- are labels right?


def report(folder, samples):
    """Say how well a sample of a finished store's labels agrees with the captions.

    UserError if there are hardly any labels.
    """
    store = LabelStore(folder)
    rows, ids, _ = store.sample()
    share = (ids >= 0).any(-1).float().mean()
    if share < 0.01:
        raise UserError(
            f"{folder}: {share:.1%} of the patches have a label; try another --path, --sign or "
            "--min_score, with another --out"
        )
    captions = [samples[row]["conversations"][1]["value"] for row in rows]
    lifts, _ = caption_agreement(captions, top_words(store.words, ids))
    lift = np.median(lifts)
    print(
        f"{folder}: {share:.1%} of the patches have a label; a top word stands {lift:.2f} times as "
        "often in its image's caption as in another's (lift)"
    )
    # PAPER: the sign of Eq. 8 rests on a claim about CLIP. On the toys right labels have a lift of
    # 3 or more, those of the wrong sign at most 0.43.
    if lift < 1.2 and len(captions) > 1:
        print(
            f"WARNING: a lift of 1 is chance, less is the wrong sign; before you train, try --sign "
            f"{-store.meta['sign']} or another --path, each with another --out: "
            f"python -m tools.look labels --labels {folder} --compare says which is best"
        )


def top_words(words, ids):
    """The best word of each patch that has a label: ids [images, m, n] -> a list for each image."""
    return [[words[i] for i in image[:, 0].tolist() if i >= 0] for image in ids]


def caption_agreement(captions, labels):
    """How well the top words of patches agree with captions: two measures that need no truth.

    lifts: how often a patch's top word stands in the caption of its image, over how often in that
    of another: 1 by chance, more if labels are right, wherever in the image they are. found: how
    many words of captions are the top word of some patch of their image, over all images; few if
    things get the labels of what is around them.

    captions [images], labels [images] (the top words of its patches) -> lifts, one for each shift s
    of 1 to 5, where the other caption is that of image i + s; and found, for shifts 0 to 5.
    """
    texts = [spaced(caption) for caption in captions]
    hits = np.zeros(max(2, min(6, len(texts))))  # one image alone says nothing
    found = np.zeros_like(hits)
    for i, words in enumerate(labels):
        counts = collections.Counter(words)
        phrases = {word: spaced(word) for word in counts}
        for shift in range(len(hits)):
            text = texts[(i + shift) % len(texts)]
            agreeing = [word for word in counts if phrases[word] in text]
            hits[shift] += sum(counts[word] for word in agreeing)
            found[shift] += len(agreeing)
    return hits[0] / hits[1:].clip(1), found


# --------------------------------------------------------------------------------------- word list

# Words that name nothing visible: Appendix C keeps "meaningful and attribute" words.
STOP_WORDS = set(
    str.split("""
    a about above across after again against ago all almost along already also although always am
    among amongst an and another any anybody anyhow anyone anything anyway anywhere are around as at
    away back be because been before behind being below beside besides between both but by can
    cannot could despite did do does doing done down during each either else etc even ever every
    everybody everyone everything everywhere except few for from further had has have having he
    hence her here hers herself him himself his how however if in instead into is it its itself just
    least less let like made make makes many may maybe me might more moreover most much must my
    myself near neither never nevertheless no nobody none nor not nothing nowhere of off often on
    once one oneself only onto or other others otherwise ought our ours ourselves out over own per
    perhaps quite rather really same several shall she should since so some somebody somehow someone
    something sometimes somewhere still such than that the their theirs them themselves then there
    therefore these they this those though through throughout thus to together too toward towards
    under unless unlike until up upon us very via was we well were what whatever when whenever where
    whereas wherever whether which whichever while who whoever whom whose why will with within
    without would yes yet you your yours yourself yourselves
    """)
)
# Combining marks and joiners belong to letters: Hindi and Persian have words with them.
LETTERS = r"\p{L}[\p{L}\p{M}\u200c\u200d]*"
# don't and the 's of dog's are tokens, but no words; the th of 20th is nothing.
TOKEN = regex.compile(
    rf"(?i:\w+n't\b|'(?:s|re|ve|ll|d|m)\b)|(?<![\p{{N}}\p{{L}}\p{{M}}])(?P<word>{LETTERS}(?:-{LETTERS})*)"
)
# A line of a word list: letters, with hyphens, apostrophes or single spaces between them.
LINE = regex.compile(rf"'?{LETTERS}(?:[-' ]{LETTERS}|(?:[-' ]['-]|' ){LETTERS})*'?")
LONGEST = 50  # characters of a line
NO_SPACES = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]")


def write_words(data: str, out: str, extra: str = "", min_count: int = 5, tagger: str = ""):
    """Write the word list of Appendix C: the words of the captions, then those of the file `extra`.

    Frequent words come first. Of both lists, stop words and single letters are left out.

    Not all words name something visible. Of the 200 most frequent 95 % do in Flickr8k's captions,
    80 % in long captions that a model wrote, such as SEA-PRIME's: "appears", "possibly", "overall"
    get in.

    PAPER: the paper analyses the syntax of all captions; here that is an option (tagger), for it
    takes hours. It takes the frequent words of 2of12 and does not say which: here all. Words stay
    as they are written, in lower case: the lemma of "striped", an attribute, would be "stripe", a
    thing. min_count is not given; 5 drops typing errors. "About 4 million words" are taken for a
    slip: 0.6 million captions and 2of12 have some 40 thousand.

    data: samples in LLaVA's format, an image and a caption each
    out: the file to write, a word a line
    extra: another list, a word or short phrase a line, such as 2of12 of the 12dicts
    min_count: a word of the captions is kept if it occurs as often as this
    tagger: a spaCy pipeline (en_core_web_sm), to keep only common nouns, adjectives, verbs and
        participles; without it adverbs such as "quickly" stay
    """
    counts = collections.Counter()
    captions = (sample["conversations"][1]["value"] for sample in load_samples(data))
    for found in tqdm(find_words(captions, tagger), "reading captions"):
        counts.update(found)
    letters = sum(len(word) * count for word, count in counts.items())
    unparted = sum(len(w) * count for w, count in counts.items() if NO_SPACES.search(w))
    if unparted > letters / 2:
        raise UserError(
            f"{data}: the captions are in a script without spaces between words, which cannot be "
            "told apart; give extract a word list of your own as --words"
        )
    words = []
    for word, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if count >= min_count and len(word) <= LONGEST and not NO_SPACES.search(word):
            words.append(word)
    print(f"{len(words):,} words of the captions: {some(words)}")

    if extra:
        listed = list(dict.fromkeys(word.lower() for word in read_words(extra)))
        wanted = [word for word, found in zip(listed, find_words(listed, tagger)) if found]
        known = set(words)
        more = [word for word in wanted if word not in known]
        print(f"{len(more):,} more of the {len(listed):,} in {extra}: {some(more)}")
        words += more
    if not words:
        raise UserError(f"{data}: no word is left; lower --min_count")
    write_file(Path(out), "\n".join(words) + "\n")
    print(f"{len(words):,} words in {out}")


def find_words(texts, tagger=""):
    """Yield the words of each text, without stop words and single letters.

    tagger: a spaCy pipeline; words without a noun, adjective or verb in them go too.
    """
    if not tagger:
        for text in texts:
            words = [token["word"] for token in TOKEN.finditer(spelled(text).lower())]
            yield [word for word in words if word and may_be_visible(word)]
        return

    import spacy

    pipeline = spacy.load(tagger, exclude=["parser", "ner", "lemmatizer"])
    for doc in pipeline.pipe(map(spelled, texts), batch_size=1000):
        found = []
        for token in TOKEN.finditer(doc.text):
            # spaCy parts black-and-white into five.
            parts = doc.char_span(*token.span(), alignment_mode="expand")
            is_wanted = any(part.pos_ in ("NOUN", "ADJ", "VERB") for part in parts)
            if token["word"] and is_wanted and may_be_visible(token["word"].lower()):
                found.append(token["word"].lower())
        yield found


def spaced(text):
    """A text in lower case as its tokens, with a space before, between and after them."""
    text = NO_SPACES.sub(r" \g<0> ", spelled(text).lower())
    return " ".join(["", *(token[0] for token in TOKEN.finditer(text)), ""])


def spelled(text):
    """A text with one spelling of each letter (NFC), hyphen and apostrophe."""
    text = unicodedata.normalize("NFC", text)
    return regex.sub("[\u2010\u2011]", "-", text).replace("\u2019", "'")


def may_be_visible(word):
    """False for stop words and single letters; one character of Chinese or Thai may be a word."""
    letters = regex.findall(r"\p{L}", unicodedata.normalize("NFD", word))  # a Korean syllable: 2
    is_word = len(letters) > 1 or NO_SPACES.search(word)
    return bool(is_word) and word not in STOP_WORDS


def some(words):
    """About 20 of the words, from all over the list."""
    return ", ".join(words[:: math.ceil(len(words) / 20) or 1])


def read_words(file):
    """A word list, a word or short phrase a line -> list of strings, each of them once.

    Spaces around a word and empty lines do not count. UserError names the line that is no word.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(
            f"{file}: cannot read the word list ({e}); make one with labels.py words"
        ) from e
    words = []
    for number, line in enumerate(lines, 1):
        word = spelled(line).strip()
        is_short = len(word) <= LONGEST and word.count(" ") < 5
        if word and not (is_short and LINE.fullmatch(word)):
            raise UserError(
                f"{file}, line {number}: {line[:LONGEST]!r} is no word: a line holds up to five "
                f"words, letters with hyphens, apostrophes or single spaces between, {LONGEST} "
                "characters at most; mend or remove it"
            )
        if word:
            words.append(word)
    if not words:
        raise UserError(f"{file}: the word list is empty")
    return list(dict.fromkeys(words))


def main(argv=None):
    run_command(__doc__, {"words": write_words, "extract": extract}, argv)


if __name__ == "__main__":
    cli(main)
