"""LLaVA-format data: samples, images and their geometry, text -> ids and mask, batches.

One sample is {"id": ..., "image": "folder/name.jpg", "conversations": [{"from": "human", "value": "<image>\\nDescribe
it."}, {"from": "gpt", "value": "A caption."}]}; a file is a JSON list of samples, or a sample on each line (.jsonl).
"""

import argparse
import functools
import inspect
import io
import itertools
import json
import sys
import typing
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers import AddedToken, AutoImageProcessor, CLIPImageProcessor, SiglipImageProcessor

IMAGE_TOKEN = "<image>"
IGNORE = -100  # the label of a position that is not trained, as cross_entropy expects it


class UserError(Exception):
    """Something outside the program is wrong (a file, a flag); the text names it and the fix."""


def cli(main):
    """Run a command line: a UserError ends it with one line, anything else is a bug and keeps its traceback."""
    try:
        main()
    except UserError as e:  # from a DataLoader worker it comes wrapped in the worker's traceback
        sys.exit("error: " + str(e).rsplit("UserError: ", 1)[-1].strip())


def add_flags(parser, signature, **help):
    """Give an argparse parser one flag for each parameter of a signature: its name, annotated type and default."""
    for name, p in signature.parameters.items():
        choices = typing.get_args(p.annotation) or None  # of a Literal
        kwargs = dict(required=p.default is p.empty, default=None if p.default is p.empty else p.default,
                      help=help.get(name, "default: %(default)s"))
        if p.annotation is bool:
            parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, **kwargs)
        else:
            kind = type(choices[0]) if choices else p.annotation
            parser.add_argument(f"--{name}", type=kind, choices=choices, **kwargs)


def run_command(doc, functions, argv=None):
    """functions {subcommand: function}: call the one that argv names, its parameters as flags."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, f in functions.items():
        add_flags(commands.add_parser(name, help=f.__doc__.split(":")[0], description=f.__doc__, allow_abbrev=False),
                  inspect.signature(f))
    args = vars(parser.parse_args(argv))
    return functions[args.pop("command")](**args)


# --------------------------------------------------------------------------------------------------- samples


def load_samples(path):
    """A LLaVA .json or .jsonl file -> list of dicts, checked; errors name the file and the line or the sample."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such data file (--data takes a LLaVA-format .json or .jsonl)")
    with open(path, encoding="utf-8") as f:
        if path.suffix == ".jsonl":
            samples = []
            for number, line in enumerate(f, 1):
                try:
                    samples.append(json.loads(line))
                except json.JSONDecodeError as e:
                    raise UserError(f"{path}, line {number}: not valid JSON ({e.msg}); mend or remove the line") from e
        else:
            try:
                samples = json.load(f)
            except json.JSONDecodeError as e:
                raise UserError(f"{path}, line {e.lineno}: not valid JSON ({e.msg})") from e
    if not isinstance(samples, list) or not samples:
        raise UserError(f"{path}: expected a list of samples, at least one")
    for number, sample in enumerate(samples, 1):
        problem = _problem(sample)
        if problem:
            raise UserError(f"{path}, sample {number}: {problem}")
    return samples


def _problem(sample):
    turns = sample.get("conversations") if isinstance(sample, dict) else None
    if not isinstance(turns, list) or len(turns) < 2:
        return 'needs "conversations", a list of at least two turns'
    for turn in turns:
        if not isinstance(turn, dict) or not all(isinstance(turn.get(k), str) for k in ("from", "value")):
            return 'each turn of "conversations" needs the strings "from" and "value"'
    if not isinstance(sample.get("image"), str) or not sample["image"]:
        return 'needs "image", a path below --image_folder'  # text-only samples belong to stage 2


def epoch_order(n, seed, epoch):
    """The order of the n samples in an epoch: a permutation that depends on nothing else."""
    return np.random.default_rng([seed, epoch]).permutation(n)


def micro_batches(n, batch_size, grad_accum, steps, seed=0, first_step=0, rank=0, world=1):
    """Yield this rank's micro-batches, `grad_accum` lists of sample indices for each step in [first_step, steps).

    The samples of a step depend only on (seed, step) and the global batch; micro-batch a of rank r is number
    a * world + r of the step, so ranks and accumulation are interchangeable. Epochs follow on one another without
    a gap: the last batch of one is filled from the next, and no sample is dropped.
    """
    global_batch = batch_size * grad_accum * world
    order = functools.lru_cache(maxsize=2)(lambda epoch: epoch_order(n, seed, epoch))
    for step in range(first_step, steps):
        for a in range(grad_accum):
            start = step * global_batch + (a * world + rank) * batch_size
            yield [int(order(p // n)[p % n]) for p in range(start, start + batch_size)]


# ---------------------------------------------------------------------------------------------------- images


def read_image(path):
    """-> (RGB image, CRC-32 of the file's bytes); UserError with the path if it is missing or cannot be decoded."""
    try:
        data = Path(path).read_bytes()
    except OSError as e:
        raise UserError(f"{path}: cannot read the image ({e.strerror}); check --image_folder") from e
    try:
        return Image.open(io.BytesIO(data)).convert("RGB"), zlib.crc32(data)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        raise UserError(f"{path}: not a readable image ({e}); replace the file or remove its sample") from e


@functools.cache
def _processor(size, mode, mean, std):
    common = dict(image_mean=mean, image_std=std, resample=Image.Resampling.BICUBIC)
    if mode == "square":
        return CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size}, **common)
    if mode == "squash":
        return SiglipImageProcessor(size={"height": size, "width": size}, **common)
    raise UserError(f"unknown image geometry {mode!r}: use square or squash")


def geometry(image, size, mode, mean, std):
    """The one function that decides which pixels an encoder sees; labelling and training both call it.

    PIL image -> [3, size, size] float32, normalised. square: shortest edge to `size`, bicubic, centre crop (CLIP,
    LLaVA's stage 1). squash: both edges to `size`, no crop (SigLIP). mean, std: three floats each, of the encoder.
    """
    processor = _processor(size, mode, tuple(mean), tuple(std))
    return processor(image, return_tensors="pt")["pixel_values"][0]


def vision_geometry(vision):
    """The geometry keywords of a transformers vision tower, from its preprocessor_config.json."""
    try:
        p = AutoImageProcessor.from_pretrained(vision)
    except (OSError, ValueError) as e:
        raise UserError(f"{vision}: no image processor found ({str(e).splitlines()[0]}); a vision tower needs a "
                        "preprocessor_config.json") from e
    square = "shortest_edge" in p.size
    # PAPER: a resize edge larger than the crop (DINOv2's 256 for 224) would show another region than the labels saw
    size = p.crop_size["height"] if square else p.size["height"]
    return dict(size=size, mode="square" if square else "squash", mean=tuple(p.image_mean), std=tuple(p.image_std))


# ------------------------------------------------------------------------------------------------------ text


def add_image_token(tokenizer):
    """Make `<image>` one token -> its id. It never reaches the embedding layer: visual tokens take its place."""
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)])
    return tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)


def encode_conversation(sample, tokenizer, image_tokens, max_length=2048):
    """LLaVA's `plain` format of stage 1: `<image>` + caption + newline; the human turn is discarded.

    -> ids [L] with the image token `image_tokens` times, labels [L] with IGNORE on BOS and image: the caption and
    its newline are trained, there is no EOS. Too long a caption is cut at the end, never inside the image.
    """
    turns = sample["conversations"]
    if [t["from"] for t in turns] != ["human", "gpt"] or IMAGE_TOKEN in turns[1]["value"]:
        raise UserError(f"sample {sample.get('id', sample['image'])}: stage 1 needs one human turn and one gpt turn, "
                        f"{IMAGE_TOKEN} not in the latter")
    ids = tokenizer(IMAGE_TOKEN + turns[1]["value"] + "\n")["input_ids"]
    at = ids.index(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
    if at + image_tokens >= max_length:
        raise UserError(f"max_length {max_length} leaves no room for text beside {image_tokens} image tokens")
    ids = (ids[:at] + [ids[at]] * image_tokens + ids[at + 1:])[:max_length]
    ids = torch.tensor(ids)
    labels = ids.clone()
    labels[: at + image_tokens] = IGNORE
    return ids, labels


def word_tokens(words, tokenizer):
    """The LLM's tokens of each word as it stands inside a sentence, with its leading space -> (ids, offsets).

    ids [sum of M] int64, offsets [q + 1] int64: word j is ids[offsets[j]:offsets[j + 1]]. Encoding " dog" alone
    would give some SentencePiece tokenizers a second space; the words are encoded behind another one instead.
    """
    before = tokenizer("a", add_special_tokens=False)["input_ids"]
    rows = tokenizer([f"a {w}" for w in words], add_special_tokens=False)["input_ids"]
    for word, row in zip(words, rows):
        if row[: len(before)] != before or len(row) == len(before):
            raise UserError(f"the LLM's tokenizer has no tokens for the word {word!r} alone; remove it from the list")
    rows = [row[len(before):] for row in rows]
    offsets = np.cumsum([0, *map(len, rows)])
    return torch.tensor(list(itertools.chain.from_iterable(rows))), torch.from_numpy(offsets)


# --------------------------------------------------------------------------------------------------- batches


class LlavaDataset(Dataset):
    """Samples -> tensors. labels: a LabelStore of the same samples (row i is sample i), or None without SEA."""

    def __init__(self, samples, image_folder, geometry, tokenizer, image_tokens, max_length=2048, labels=None):
        if not Path(image_folder).is_dir():
            raise UserError(f"{image_folder}: no such image folder (--image_folder)")
        self.samples, self.image_folder, self.geometry = samples, Path(image_folder), geometry
        self.tokenizer, self.image_tokens, self.max_length = tokenizer, image_tokens, max_length
        self.labels = labels

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        sample = self.samples[i]
        path = self.image_folder / sample["image"]
        image, crc = read_image(path)
        ids, targets = encode_conversation(sample, self.tokenizer, self.image_tokens, self.max_length)
        item = dict(index=i, input_ids=ids, labels=targets, pixels=geometry(image, **self.geometry))
        if self.labels is not None:
            if self.labels.records["crc"][i] != crc:
                raise UserError(f"{path}: the file has changed since it was labelled; run labels.py extract again "
                                f"into another folder than {self.labels.folder}")
            item["label_ids"], item["label_scores"] = self.labels[i]
        return item


def collate(items, pad_id):
    """-> index (list of B), input_ids, labels, attention_mask [B, L] (padded right), pixels [B, 3, S, S] and, with
    SEA, label_ids and label_scores [B, m, n]. The mask comes from lengths: pad and EOS may be the same token."""
    pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    ids = [item["input_ids"] for item in items]
    batch = dict(index=[item["index"] for item in items], input_ids=pad(ids, padding_value=pad_id),
                 labels=pad([item["labels"] for item in items], padding_value=IGNORE),
                 attention_mask=pad([torch.ones_like(x) for x in ids], padding_value=0),
                 pixels=torch.stack([item["pixels"] for item in items]))
    for key in ("label_ids", "label_scores"):
        if key in items[0]:
            batch[key] = torch.stack([item[key] for item in items])
    return batch
