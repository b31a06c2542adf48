"""Semantic labels for image patches: words -> CLIP -> nearest words -> label store.

    python labels.py words   --data train.json --out words.txt
    python labels.py extract --data train.json --image_folder images --words words.txt --out labels
    python labels.py show    --labels labels --out labels.html

`torchrun --nproc_per_node=8 -- labels.py extract ...` divides the images among processes; several
nodes need a shared filesystem. (The -- keeps torchrun from reading --n as its own flag.) Training
only reads the store, without open_clip. Dimensions as in loss.py.
"""

import collections
import functools
import hashlib
import itertools
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
import torch.distributed as dist
import torch.nn.functional as F
from torch.func import functional_call
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import (
    UserError,
    cli,
    control_tokens,
    geometry,
    load_samples,
    read_image,
    run_command,
)

# short name -> model/weights of open_clip
ENCODERS = {
    "clip-l-336": "ViT-L-14-336-quickgelu/openai",
    "clip-l-224": "ViT-L-14-quickgelu/openai",
    "siglip-384": "ViT-SO400M-14-SigLIP-384/webli",
}
PROMPT = "a photo of a {}."  # PAPER: the prompt around a word is not given; this is CLIP's own
SURGERY_BLOCKS = 6  # how many of the last blocks the path `vv` sums over, as CLIP Surgery does

# Words that name nothing visible: Appendix C keeps "meaningful and attribute" words.
STOP_WORDS = """
    a about above across after again against all along also an and another any are around as at
    away back be because been before behind being below beside between both but by can could did
    do does doing down during each either even every few for from further had has have having he
    her here his how if in instead into is it its just least less like made make makes many may
    more most much must my near neither no nor not of off often on once one only onto or other
    our out over own rather really same several she should since so some something still such
    than that the their them then there these they this those though through to together too
    toward towards under until up upon us very was we well were what when where whether which
    while who whose why will with within without would yes yet you your
"""

# ---------------------------------------------------------------------------------------- word list


def write_words(
    data: str,
    out: str,
    extra: str = "",
    min_count: int = 5,
    tagger: str = "",
    phrase_length: Literal[1, 2, 3] = 1,
):
    """Write the word list of Appendix C: the words of the captions, then those of the file `extra`.

    A word of the captions, in lower case, is kept if it occurs min_count times or more and is
    neither a stop word nor a single letter; frequent words come first, ties in alphabetical order.
    extra: another list, one word a line (such as 2of12 of the 12dicts). tagger: a spaCy pipeline
    (en_core_web_sm); with it only common nouns, adjectives, verbs and participles are kept.
    phrase_length: with 3, sequences of two and three such words in a row are counted too.

    PAPER: words stay as they are written: the lemma of "striped", an attribute, would be "stripe",
    a thing. How rare a word may be is not said; min_count 5 drops typing errors. The paper speaks
    of about 4 million words, which single words of 0.6 million captions cannot be; with phrases
    and a low min_count one comes closer.
    """
    counts = collections.Counter()
    captions = (sample["conversations"][1]["value"] for sample in load_samples(data))
    for tokens in tqdm(_caption_tokens(captions, tagger), "reading captions"):
        counts.update(_phrases(tokens, phrase_length))
    stop_words = set(STOP_WORDS.split())
    words = []
    for phrase, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        parts = phrase.split()
        if count >= min_count and stop_words.isdisjoint(parts) and min(map(len, parts)) > 1:
            words.append(phrase)
    if extra:
        words = list(dict.fromkeys(words + read_words(extra)))
    if not words:
        raise UserError(f"{data}: no word is left; lower --min_count")
    write_file(Path(out), "\n".join(words) + "\n")
    print(f"{len(words):,} words in {out}: {', '.join(words[:20])} ...")


def _caption_tokens(captions, tagger=""):
    """Yield the words of each caption, in lower case.

    A single character, such as ".", stands for whatever is not a word, or whose part of speech is
    not wanted: there a phrase ends.
    """
    word = r"[^\W\d_]+(?:-[^\W\d_]+)*"
    if not tagger:
        # don't as a whole, and the 's of dog's
        contraction = r"\w+n['\u2019]t\b|['\u2019](s|re|ve|ll|d|m)\b"
        for caption in captions:
            yield re.findall(rf"{word}|\S", re.sub(contraction, ".", caption.lower()))
        return

    import spacy

    pipeline = spacy.load(tagger, exclude=["parser", "ner", "lemmatizer"])
    for caption in pipeline.pipe(captions, batch_size=1000):
        texts = [t.lower_ if t.pos_ in ("NOUN", "ADJ", "VERB") else "." for t in caption]
        yield [text if re.fullmatch(word, text) else "." for text in texts]


def _phrases(words, length):
    """All sequences of up to `length` words in a row, as strings."""
    for start in range(len(words)):
        for end in range(start, min(start + length, len(words))):
            yield " ".join(words[start : end + 1])


def read_words(file):
    """One word or short phrase a line -> list of strings; an error names the line."""
    try:
        words = Path(file).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(
            f"{file}: cannot read the word list ({e}); make one with labels.py words"
        ) from e
    if not words:
        raise UserError(f"{file}: the word list is empty")
    seen = set()
    for number, word in enumerate(words, 1):
        if not word.strip() or word in seen:
            raise UserError(
                f"{file}, line {number}: {word!r} is empty or repeats a line above; remove the line"
            )
        seen.add(word)
    return words


def word_tokens(words, tokenizer):
    """The LLM's token ids of each word as it stands inside a sentence, with its leading space.

    PAPER: Eq. 10 does not say whether a word has one. For Llama-3 and Gemma " dog" and "dog" are
    different tokens, and it is the first that the LLM has nearly always read. Encoding " dog" alone
    would give some SentencePiece tokenizers a second space. "a dog" is encoded instead, and the
    tokens of "a" are removed from it.
    """
    prefix = tokenizer("a", add_special_tokens=False)["input_ids"]
    rows = tokenizer([f"a {word}" for word in words], add_special_tokens=False)["input_ids"]
    control = control_tokens(tokenizer).keys()
    for word, ids in zip(words, rows):
        if ids[: len(prefix)] != prefix or len(ids) == len(prefix) or control & set(ids):
            raise UserError(
                f"the LLM's tokenizer has no text tokens for the word {word!r} alone; remove it "
                "from the list"
            )
    return [ids[len(prefix) :] for ids in rows]


# --------------------------------------------------------------------------------------------- CLIP


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
    try:
        encoder = open_clip.create_model(
            model, pretrained=weights, device=device, require_pretrained=True
        )
        encoder.tokenizer = open_clip.get_tokenizer(model)
    except (OSError, RuntimeError, ValueError) as e:
        reason = str(e).strip().splitlines()[0]
        raise UserError(
            f"--encoder {name}: cannot be loaded ({reason}); give {', '.join(ENCODERS)}, a folder, "
            "or MODEL/WEIGHTS of open_clip"
        ) from e
    # PAPER: Eq. 8 is about OpenAI's CLIP, read after its last block. Nothing is said of other
    # weights: they are read by `value`, or by the only path they have.
    encoder.default_path = "last" if weights == "openai" else patch_paths(encoder)[0]
    return encoder.eval().requires_grad_(False)


def weights_crc(encoder):
    """A fingerprint of every weight."""
    crc = 0
    for weight in encoder.state_dict().values():
        crc = zlib.crc32(weight.cpu().contiguous().numpy(), crc)
    return f"{crc:08x}"


def encoder_preprocess(encoder):
    """The keywords of data.geometry for an open_clip model, from its own preprocessing config."""
    config = encoder.visual.preprocess_cfg
    if config["resize_mode"] not in ("shortest", "squash"):
        raise UserError(f"--encoder: resizes images by {config['resize_mode']}, which is not built")
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

    last: the tokens after the last block, as in the paper. What attention brought them from the
        rest of the image can outweigh what they show themselves.
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
        x = torch.stack([trunk.attn_pool(patches.unsqueeze(1)) for patches in x])
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


# ------------------------------------------------------------------------------------ nearest words


def nearest_words(patch_embeds, word_embeds, n, sign, min_score=0.0):
    """The n words of highest score = sign * cosine (Eq. 8) for each patch, exactly.

    patch_embeds [P, d] and word_embeds [q, d], both L2-normalised; sign +1 or -1 -> ids [P, n]
    int64, scores [P, n] float32, descending, of equal scores the lower id first. Where fewer than n
    words score above min_score, ids are padded with -1 and scores with 0.

    A search picks candidates by fast products in bf16 and scores these in float64. It also returns
    a bound that no other word's score exceeds. A patch is done if its n-th best candidate scores
    above the bound, or if the bound is below min_score. The rest are searched again with products
    in float32; what is left then (very many equal scores) is sorted. Memory does not grow with q.
    """
    _use_full_precision()
    patches = sign * patch_embeds
    ids = torch.full((len(patches), n), -1, device=patches.device)
    scores = torch.zeros_like(ids, dtype=torch.float64)
    k = min(n, len(word_embeds))

    bf16_is_fast = patches.is_cuda or torch.cpu._is_avx512_bf16_supported()
    dtypes = [torch.bfloat16, torch.float32] if bf16_is_fast else [torch.float32]
    unsure = torch.arange(len(patches), device=ids.device)
    for dtype in dtypes:
        ids[unsure, :k], scores[unsure, :k], bound = _search(patches[unsure], word_embeds, n, dtype)
        unsure = unsure[bound >= scores[unsure, k - 1].clamp(min=min_score)]
        if len(unsure) == 0:
            break

    for i in unsure:
        ids[i, :k], scores[i, :k] = _sort(patches[i], word_embeds, n)

    too_low = scores <= min_score
    return ids.masked_fill(too_low, -1), scores.float().masked_fill(too_low, 0)


def _use_full_precision():
    """No TF32 and no sums in bf16 from here on: the bound of _search counts on it."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def _search(patches, word_embeds, n, dtype, word_block=16384):
    """The n best of each patch's candidates: the 4n + 24 words of largest products in `dtype`.

    -> ids [P, n], float64 scores [P, n], descending, and a bound [P] for the score of other words.
    """
    num_candidates = min(4 * n + 24, len(word_embeds))
    # Subtracting the mean word changes no patch's order of words, but makes the words shorter, and
    # with them their rounding errors
    mean_word = word_embeds.mean(0)
    rounded_patches = patches.to(dtype)
    products = rounded_patches.new_full((len(patches), num_candidates), -torch.inf)
    candidates = torch.zeros_like(products, dtype=torch.int64)
    word_norm = 0.0
    for start in range(0, len(word_embeds), word_block):
        centred = word_embeds[start : start + word_block] - mean_word
        word_norm = max(word_norm, centred.norm(dim=1).max().item())
        values = rounded_patches @ centred.to(dtype).T
        values, columns = values.topk(min(num_candidates, len(centred)), sorted=False)
        products = torch.cat([products, values], 1)
        candidates = torch.cat([candidates, start + columns], 1)
        products, order = products.topk(num_candidates, sorted=False)
        candidates = candidates.gather(1, order)

    candidates = candidates.sort()[0]  # so that a stable sort leaves the lower id first
    block = 512 if patches.is_cuda else 8  # few launches, or what the CPU's cache holds
    scores = [
        (word_embeds[ids].double() * part.double().unsqueeze(1)).sum(-1)
        for part, ids in zip(patches.split(block), candidates.split(block))
    ]
    scores, order = torch.cat(scores).sort(descending=True, stable=True)
    ids = candidates.gather(1, order)

    # No other word's product is above the last candidate's. Its exact score is its product, plus
    # the score of the mean word, plus at most the three rounding errors.
    last_product = products.amin(1).double()
    norms = patches.double().norm(dim=1) * word_norm
    eps = torch.finfo(dtype).eps
    mean_score = patches.double() @ mean_word.double()
    product_error = last_product.abs() * eps
    factor_error = norms * (eps + eps**2)  # every number is rounded by at most eps / 2 of itself
    sum_error = norms * patches.shape[1] * 2**-22  # d additions in float32
    bound = last_product + mean_score + product_error + factor_error + sum_error
    if num_candidates == len(word_embeds):
        bound.fill_(-torch.inf)  # there is no other word
    return ids[:, :n], scores[:, :n], bound


def _sort(patch, word_embeds, n):
    """The n best words of one patch [d] by a stable sort of all float64 scores -> ids, scores."""
    # not a matrix product, whose rounding depends on the row: equal words have equal scores
    products = [(part.double() * patch.double()).sum(-1) for part in word_embeds.split(4096)]
    scores = torch.cat(products)
    scores, ids = scores.sort(descending=True, stable=True)
    return ids[:n], scores[:n]


# -------------------------------------------------------------------------------------- label store


class LabelStore:
    """The labels of a data file, on disk: store[i] holds those of sample i's image.

    folder/ meta.json         all that labels depend on (words: a digest), and where the data was
            words.txt         the words that ids stand for
            words.npy         their embeddings, float32 [q, d]; only labels.py needs them
            labels-00000.npy  a record for each of the first `shard` images (00001: of the next):
                              ids [m, n] uint16 or int32 (none = 65535 or -1), scores [m, n]
                              float16, crc, the CRC-32 of the image file
    store[i] -> ids [m, n] int64 (-1 = none), scores [m, n] float32. Only the words are in memory.
    max_labels: how many of the n to return, the best ones; None for all.
    """

    def __init__(self, folder, max_labels=None):
        self.folder = Path(folder)
        self.max_labels = max_labels
        self.meta, self.files = _read_meta(self.folder)
        if max_labels and max_labels > self.meta["n"]:
            raise UserError(f"{folder}: has {self.meta['n']} labels per patch, not {max_labels}")
        done = sum(len(_load(file)) for file in self.files if file.exists())
        if done < len(self):
            raise UserError(
                f"{folder}: only {done} of {len(self)} images are labelled; run the same labels.py "
                "extract again to finish"
            )
        self.words = read_words(self.folder / "words.txt")
        if digest(self.words) != self.meta["words"]:
            raise UserError(f"{folder}/words.txt: not the words that were labelled; put them back")

    def __len__(self):
        return self.meta["images"]

    def record(self, i):
        """What the file says of image i: a numpy record with ids, scores and crc."""
        return _load(self.files[i // self.meta["shard"]])[i % self.meta["shard"]]

    def __getitem__(self, i):
        return self.as_tensors(self.record(i))

    def as_tensors(self, record):
        """A record's ids [m, n] int64 (-1 = none) and scores [m, n] float32."""
        ids = record["ids"][:, : self.max_labels].astype(np.int64)
        if record["ids"].dtype == np.uint16:
            ids[ids == 65535] = -1
        scores = record["scores"][:, : self.max_labels].astype(np.float32)
        return torch.from_numpy(ids), torch.from_numpy(scores)

    def sample(self):
        """-> the rows of up to 500 images, evenly spaced, and their ids and scores [rows, m, n]."""
        rows = range(0, len(self), math.ceil(len(self) / 500))
        ids, scores = map(torch.stack, zip(*(self[i] for i in rows)))
        return rows, ids, scores

    def check(self, samples, preprocess, grid):
        """Refuse other samples, another geometry of their images, or another grid of patches.

        Labels that would hardly train anything are refused too.
        """
        _read_meta(
            self.folder,
            manifest=_manifest(samples),
            size=preprocess["size"],
            mode=preprocess["mode"],
            grid=list(grid),
        )
        _, ids, scores = self.sample()
        is_label = (ids >= 0) & (scores > 0)
        share = is_label.any(-1).float().mean()
        if share < 0.01 or len(ids[is_label].unique()) < 2:
            raise UserError(
                f"{self.folder}: {share:.1%} of the patches have a label; SEA needs 1 % at least, "
                "and two different ones; look at them with labels.py show"
            )


def file_crc(file):
    """The CRC-32 of a file of any size."""
    is_empty = os.path.getsize(file) == 0
    return 0 if is_empty else zlib.crc32(np.memmap(file, mode="r"))


def digest(texts):
    """A short fingerprint of a list of strings."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


def _manifest(samples):
    """A fingerprint of which images there are, in which order."""
    return digest(sample["image"] for sample in samples)


def record_type(q, m, n):
    """The numpy type of an image's record in a store of q words, m patches, n labels."""
    return np.dtype(
        [
            ("ids", np.uint16 if q < 65535 else np.int32, (m, n)),
            ("scores", np.float16, (m, n)),
            ("crc", np.uint32),
        ]
    )


def _read_meta(folder, **asked):
    """meta.json of a store -> its fields, and the files of labels that belong to it.

    UserError if it is damaged, or if a field is not as `asked`; the error names the field.
    """
    try:
        meta = json.loads((folder / "meta.json").read_text())
        shards = math.ceil(meta["images"] / meta["shard"])
    except Exception as e:  # no such file, no JSON, no such field, no number
        raise UserError(
            f"{folder}: no label store, or a damaged one ({e!r}); make one with labels.py "
            "extract and another --out"
        ) from e
    for field, value in asked.items():
        if meta.get(field) != value and field not in (
            "data",
            "image_folder",
            "encoder",
        ):  # may move
            raise UserError(
                f"{folder}: made with {field} = {meta.get(field)}, this run has {field} = {value}; "
                "run labels.py extract for this data and encoder with another --out"
            )
    return meta, [folder / f"labels-{k:05}.npy" for k in range(shards)]


def _load(file):
    """An array of a store, left on the disk."""
    try:
        return np.load(file, mmap_mode="r")
    except Exception as e:  # numpy has many ways to say that a file is incomplete
        raise UserError(
            f"{file}: missing or damaged ({e}); remove it and run the same labels.py extract again"
        ) from e


def append_json_line(file, content):
    with open(file, "a") as f:
        f.write(json.dumps(content) + "\n")


def write_file(file, content):
    """Write text or an array; the file is complete or absent, whenever this process is killed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = Path(f"{file}.part")
    with open(part, "wb") as f:
        if isinstance(content, str):
            f.write(content.encode())
        else:
            np.save(f, content)
        f.flush()
        os.fsync(f.fileno())
    os.replace(part, file)


# --------------------------------------------------------------------------------------- processes


def rank():
    """The number of this process among those that torchrun has started."""
    return int(os.environ.get("RANK", 0))


def world_size():
    return int(os.environ.get("WORLD_SIZE", 1))


def rank_device():
    """The GPU of this process, or the CPU."""
    gpu = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    return torch.device(gpu if torch.cuda.is_available() else "cpu")


def barrier():
    if dist.is_initialized():
        dist.barrier()


def all_sum(values, device):
    """Sum numbers over the ranks -> float64 tensor on the device."""
    numbers = [torch.as_tensor(value, dtype=torch.float64).flatten() for value in values]
    # does not wait for the GPU
    total = torch.cat([number.to(device, non_blocking=True) for number in numbers])
    if world_size() > 1:  # an error where the processes form no group: they have shared the work
        dist.all_reduce(total)
    return total


def wait_for(file, hours):
    """Wait for a file that rank 0 writes."""
    end = time.monotonic() + 3600 * hours
    while not file.exists():
        if time.monotonic() > end:
            raise UserError(
                f"{file} does not appear: rank 0 has ended, or this node does not share the folder"
            )
        time.sleep(0.2)


# ------------------------------------------------------------------------------------------ extract


def extract(
    data: str,
    image_folder: str,
    words: str,
    out: str,
    encoder: str = "clip-l-336",
    path: Literal["", "last", "value", "vv"] = "",
    sign: Literal[0, -1, 1] = 0,
    prompt: str = PROMPT,
    center: bool = False,
    n: int = 10,
    min_score: float = 0.0,
    batch_size: int = 32,
    workers: int = 4,
    shard: int = 256,
    dtype: Literal["", "float32", "bfloat16"] = "",
):
    """Label the images of a data file and write the store `out`; an interrupted run continues.

    encoder: clip-l-336, clip-l-224, siglip-384, a folder, or MODEL/WEIGHTS of open_clip. path: how
    patches are read; by default `last` for OpenAI's weights, as in the paper, unless they come as a
    folder; for all others `value`, or the only path they have. sign: by default 1, but -1 for
    `last` unless the tower averages its patches. center: subtract the mean word from all words. n:
    labels per patch, at most. shard: images per file, the most work an interruption can lose.
    dtype: by default bfloat16 on a GPU.
    """
    settings = dict(locals())
    if min_score < 0:
        raise UserError("--min_score must not be negative: scores become probabilities (Eq. 9)")
    if "{}" not in prompt:
        raise UserError(f"--prompt {prompt!r} has no {{}} for the word")
    _use_full_precision()  # before the encoder's first batch, so that all are computed alike

    samples = load_samples(data)
    words = read_words(words)
    clip = load_encoder(encoder, rank_device())
    meta = _resolve(settings, samples, words, clip)

    folder = Path(out)
    if rank() == 0:
        _start_store(folder, meta, words, clip)
    wait_for(folder / "words.npy", hours=12)  # rank 0 embeds them
    _, files = _read_meta(folder, **meta)

    # Which shards are this rank's must not depend on what the others have done
    shards = torch.arange(len(samples)).split(shard)
    missing = [k for k in range(rank(), len(files), world_size()) if not files[k].exists()]
    batches = [batch.tolist() for k in missing for batch in shards[k].split(batch_size)]
    labelled = _label(folder, meta, clip, samples, batches, workers)
    # One (ids, scores, crc) for each image
    labelled_images = itertools.chain.from_iterable(zip(*batch) for batch in labelled)
    record_dtype = record_type(len(words), math.prod(meta["grid"]), n)
    for k in tqdm(missing, f"labelling (rank 0 of {world_size()})", disable=rank() > 0):
        records = list(itertools.islice(labelled_images, len(shards[k])))
        write_file(files[k], np.array(records, record_dtype))  # in uint16, -1 becomes 65535


def _resolve(settings, samples, words, clip):
    """The content of meta.json: the flags of extract with their defaults filled in, without those
    that change no label, and fingerprints of the data, words and weights."""
    meta = settings | encoder_preprocess(clip)
    for flag in ("out", "batch_size", "workers"):
        del meta[flag]
    for flag in ("data", "image_folder", "encoder"):
        if os.path.exists(meta[flag]):
            meta[flag] = os.path.realpath(meta[flag])

    meta["path"] = meta["path"] or clip.default_path
    blank = clip.logit_scale.new_zeros(1, 3, meta["size"], meta["size"])
    side = math.isqrt(patch_embeddings(clip, blank, meta["path"]).shape[1])
    meta |= dict(
        images=len(samples),
        manifest=_manifest(samples),
        words=digest(words),
        weights=weights_crc(clip),
        grid=[side, side],
        sign=meta["sign"] or default_sign(clip, meta["path"]),
        dtype=meta["dtype"] or ("bfloat16" if blank.is_cuda else "float32"),
    )
    return json.loads(json.dumps(meta))  # tuples become lists, as when it is read


def _start_store(folder, meta, words, clip):
    """Write meta.json, words.txt and, if missing, words.npy; refuse a store of other settings."""
    if (folder / "meta.json").exists():
        _read_meta(folder, **meta)
    elif any(folder.glob("*.npy")):
        raise UserError(
            f"{folder}: holds files of unknown settings (no meta.json); choose another --out"
        )
    write_file(folder / "words.txt", "\n".join(words) + "\n")
    write_file(folder / "meta.json", json.dumps(meta, indent=1))
    if not (folder / "words.npy").exists():
        with _autocast(clip, meta):
            word_embeds = word_embeddings(clip, words, meta["prompt"])
        write_file(folder / "words.npy", word_embeds.cpu().numpy())


def _autocast(clip, meta):
    """The encoder's precision."""
    device = clip.logit_scale.device.type
    return torch.autocast(device, torch.bfloat16, enabled=meta["dtype"] == "bfloat16")


def _label(folder, meta, clip, samples, batches, workers=0):
    """Eq. 6 and 8 with the settings and words of a store. batches: lists of sample indices.
    Yields for each batch the arrays ids and scores [B, m, n] and the CRCs of the B image files."""
    word_embeds = torch.tensor(_load(folder / "words.npy"), device=clip.logit_scale.device)
    if meta["center"]:
        word_embeds = F.normalize(word_embeds - word_embeds.mean(0), dim=-1)
    collate = functools.partial(_load_images, meta)
    loader = DataLoader(samples, batch_sampler=batches, num_workers=workers, collate_fn=collate)
    for pixels, crcs in loader:
        with _autocast(clip, meta):
            patches = patch_embeddings(clip, pixels.to(word_embeds.device), meta["path"])
        if not patches.isfinite().all():
            raise UserError(f"--encoder {meta['encoder']}: gives NaN or inf; try --dtype float32")
        ids, scores = nearest_words(
            patches.flatten(0, 1), word_embeds, meta["n"], meta["sign"], meta["min_score"]
        )
        batch_shape = patches.shape[:2]  # B, m
        ids = ids.unflatten(0, batch_shape).cpu().numpy()
        yield ids, scores.unflatten(0, batch_shape).cpu().numpy(), crcs


def _load_images(meta, samples):
    """Read the images of a batch of samples -> pixels [B, 3, S, S] and the CRCs of the files."""
    folder = Path(meta["image_folder"])
    images, crcs = zip(*(read_image(folder / sample["image"]) for sample in samples))
    preprocess = {key: meta[key] for key in ("size", "mode", "mean", "std")}
    return torch.stack([geometry(image, **preprocess) for image in images]), crcs


# --------------------------------------------------------------------------------------------- show


def show(
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
    the captions (caption_agreement), which judges labels without knowing the truth. compare:
    also of new labels by each path and sign of the encoder, which takes minutes on a GPU. images:
    how many are on the page, at most. truth: a JSON file of true words, as toy.py writes it, for
    the share of top words that are true. data, image_folder: if they have moved.
    """
    from figures import draw_words

    store = LabelStore(labels)
    meta = store.meta
    samples = load_samples(data or meta["data"])
    _read_meta(store.folder, manifest=_manifest(samples))
    meta["image_folder"] = image_folder or meta["image_folder"]
    rows, ids, scores = store.sample()
    files = [samples[row]["image"] for row in rows]
    labels_of = with_words(files, store.words, ids, scores)

    drawn = files[:: math.ceil(len(files) / images)]
    panels_of = {file: {"labels": labels_of[file]} for file in drawn}
    draw_words(panels_of, meta["image_folder"], meta["size"], meta["mode"], meta["grid"], out)

    captions = [samples[row]["conversations"][1]["value"] for row in rows]
    captions = dict(zip(files, captions)).values()  # an image may occur twice
    print(f"{len(store):,} images, {len(store.words):,} words; of {len(captions)} of the images:")
    trials = [("these labels", ids, scores)]
    if compare:
        trials = itertools.chain(trials, _try_paths(store, samples, rows))
    for name, *trial in trials:
        labels_of = with_words(files, store.words, *trial)
        patches = list(itertools.chain(*labels_of.values()))
        counts = collections.Counter(labels[0][0] for labels in patches if labels)
        lifts, found = caption_agreement(captions, labels_of.values())
        print(
            f"{name}: {sum(counts.values()) / len(patches):.1%} labelled, "
            f"lift {np.median(lifts):.2f} ({min(lifts):.2f} to {max(lifts):.2f}), "
            f"{found[0] / len(captions):.2f} words of each caption "
            f"({found[1:].mean() / len(captions):.2f} of another), "
            f"{len(counts):,} top words: {dict(counts.most_common(8))}"
        )
        if truth:
            print("true:", true_share(truth, labels_of))


def caption_agreement(captions, labels):
    """How well the top words of patches agree with captions: two measures that need no truth.

    lifts: how often a patch's top word stands in the caption of its image, over how often in that
    of another: 1 by chance, more if labels are right, wherever in the image they are. found: how
    many words of captions are the top word of some patch of their image, over all images; few if
    things get the labels of what is around them.

    captions: of the images; labels: of their patches, as of with_words. -> lifts, up to five, with
    the caption of the next image, of the one after it, and so on as the other; and found, of the
    images' own captions and of each of these.
    """
    words = [set(_phrases(caption, 3)) for caption in _caption_tokens(captions)]
    hits = np.zeros(max(2, min(6, len(words))))  # of one image alone the lift is always 1
    found = np.zeros_like(hits)
    for i, patches in enumerate(labels):
        counts = collections.Counter(label[0][0] for label in patches if label)
        for shift in range(len(hits)):
            agreeing = counts.keys() & words[(i + shift) % len(words)]
            hits[shift] += sum(counts[word] for word in agreeing)
            found[shift] += len(agreeing)
    return hits[0] / hits[1:].clip(1), found


def with_words(files, words, ids, scores):
    """ids, scores [images, m, n] -> {file: of each of its m patches a list of (word, score)}."""
    labels_of = {}
    for file, image_ids, image_scores in zip(files, ids.tolist(), scores.tolist()):
        labels_of[file] = []
        for patch in zip(image_ids, image_scores):
            pairs = [(words[i], round(score, 3)) for i, score in zip(*patch) if i >= 0]
            labels_of[file].append(pairs)
    return labels_of


def _try_paths(store, samples, rows):
    """Yield (name, ids, scores), both [images, m, 1], for each path and sign of the encoder."""
    clip = load_encoder(store.meta["encoder"], rank_device())
    _read_meta(store.folder, weights=weights_crc(clip))
    batches = np.array_split(rows, math.ceil(len(rows) / 32))
    for path, sign in itertools.product(patch_paths(clip), (1, -1)):
        trial = store.meta | dict(path=path, sign=sign, n=1)
        ids, scores, _ = zip(*_label(store.folder, trial, clip, samples, batches))
        yield f"{path}, sign {sign:+}", np.concatenate(ids), np.concatenate(scores)


def true_share(truth, labels_of):
    """Share of the judged patches whose top word is true -> {kind: share, ..., "all": share}.

    labels_of: of with_words. truth: a JSON file {image: {kind: {patch: [true words]}}}, as toy.py
    writes it.
    """
    hits = collections.defaultdict(list)
    try:
        truth_of = json.loads(Path(truth).read_text())
        for image, labels in labels_of.items():
            for kind, patches in truth_of[image].items():
                for patch, accepted in patches.items():
                    top_word = [word for word, _ in labels[int(patch)]][:1]
                    hits[kind].append(not set(top_word).isdisjoint(accepted))
    except Exception as e:  # any other shape
        raise UserError(f"--truth {truth}: not a truth file of these images ({e!r})"[:300]) from e
    hits["all"] = sum(hits.values(), [])
    return {kind: round(float(np.mean(is_true)), 3) for kind, is_true in hits.items()}


def main(argv=None):
    run_command(__doc__, {"words": write_words, "extract": extract, "show": show}, argv)


if __name__ == "__main__":
    cli(main)
