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
import re
import sys
import typing
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import (
    AddedToken,
    AutoImageProcessor,
    CLIPImageProcessor,
    LlavaImageProcessor,
    SiglipImageProcessor,
)

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
        kwargs = dict(
            required=p.default is p.empty,
            default=None if p.default is p.empty else p.default,
            help=help.get(name, "default: %(default)s"),
        )
        if p.annotation is bool:
            parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, **kwargs)
        else:
            kind = type(choices[0]) if choices else p.annotation
            parser.add_argument(f"--{name}", type=kind, choices=choices, **kwargs)


def run_command(doc, functions, argv=None):
    """functions {subcommand: function}: call the one that argv names, its parameters as flags."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, f in functions.items():
        add_flags(
            commands.add_parser(
                name, help=f.__doc__.split(":")[0], description=f.__doc__, allow_abbrev=False
            ),
            inspect.signature(f),
        )
    args = vars(parser.parse_args(argv))
    return functions[args.pop("command")](**args)


# --------------------------------------------------------------------------------------------------- samples


class JsonLines:
    """A .jsonl file of any size as a sequence: line offsets stay in memory, a line is parsed when it is asked for.
    Opening it reads it once, to check every sample and count its words (lengths)."""

    def __init__(self, path, captions):
        self.path, offsets, lengths = path, [0], []
        with (
            open(path, "rb") as f,
            tqdm(
                total=path.stat().st_size,
                desc=f"reading {path.name}",
                unit="B",
                unit_scale=True,
                disable=path.stat().st_size < 2**28,
            ) as bar,
        ):
            for number, line in enumerate(f, 1):
                sample = _parse(line, path, number)
                _check(sample, captions, f"{path}, line {number}")
                lengths.append(sample_length(sample))
                offsets.append(offsets[-1] + len(line))
                bar.update(len(line))
        self.offsets, self.lengths = np.array(offsets), np.array(lengths)

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(i)
        with open(self.path, "rb") as f:
            f.seek(self.offsets[i])
            return json.loads(f.read(self.offsets[i + 1] - self.offsets[i]))


def _parse(text, path, line=None):
    try:
        return json.loads(text)
    except ValueError as e:  # of JSON or of UTF-8
        raise UserError(
            f"{path}, line {line or getattr(e, 'lineno', '?')}: not valid JSON "
            f"({getattr(e, 'msg', e)}); mend or remove it"
        ) from e


def load_samples(path, captions=True):
    """A LLaVA .json or .jsonl file -> sequence of dicts, checked; errors name the file and the line or the sample.
    captions: each must be an image and its caption, as stage 1 and the labels need it."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such data file (--data takes a LLaVA-format .json or .jsonl)")
    samples = (
        JsonLines(path, captions) if path.suffix == ".jsonl" else _parse(path.read_bytes(), path)
    )
    if not isinstance(samples, (list, JsonLines)) or not len(samples):
        raise UserError(f"{path}: expected a list of samples, at least one")
    if isinstance(samples, list):
        for number, sample in enumerate(samples, 1):
            _check(sample, captions, f"{path}, sample {number}")
    return samples


def image_of(sample):
    """The image path of a sample, or None if it is text alone: Cambrian writes '', "None" and "nan" for that."""
    image = sample.get("image")
    return image if isinstance(image, str) and image.lower() not in ("", "none", "nan") else None


def sample_length(sample):
    """Words of all turns, LLaVA's measure for grouping: positive with an image, negative without."""
    words = max(1, sum(len(turn["value"].split()) for turn in sample["conversations"]))
    return words if image_of(sample) else -words


def _check(sample, captions, where):
    turns = sample.get("conversations") if isinstance(sample, dict) else None
    if not isinstance(turns, list) or len(turns) < 2:
        raise UserError(f'{where}: needs "conversations", a list of at least two turns')
    if not all(
        isinstance(turn, dict) and isinstance(turn.get(k), str)
        for turn in turns
        for k in ("from", "value")
    ):
        raise UserError(
            f'{where}: each turn of "conversations" needs the strings "from" and "value"'
        )
    if isinstance(sample.get("image"), (list, dict)) or (captions and not image_of(sample)):
        raise UserError(
            f'{where}: needs "image", one path below --image_folder, not {sample.get("image")!r}'
        )
    speakers = " ".join(turn["from"] for turn in turns)
    shape = "human gpt" if captions else "(system )?(gpt )?human gpt( human gpt)*( human)?"
    if not re.fullmatch(shape, speakers):
        raise UserError(
            f"{where}: the turns are from {speakers!r}; they must be a caption's (human gpt) in stage 1,"
            " and alternate between human and gpt, after a system turn if any, in stage 2"
        )
    marked = [turn["from"] for turn in turns if IMAGE_TOKEN in turn["value"]]
    if marked and (marked != ["human"] or not image_of(sample)):
        raise UserError(
            f"{where}: {IMAGE_TOKEN} may stand in one human turn of a sample with an image; here it is in "
            f"turns of {marked}, and the image is {sample.get('image')!r}"
        )


def epoch_order(n, seed, epoch):
    """The order of the n samples in an epoch: a permutation that depends on nothing else."""
    return np.random.default_rng([seed, epoch]).permutation(n)


def grouped_order(lengths, batch_size, micro_batches, seed, epoch):
    """LLaVA's order for stage 2: every step holds samples of one kind (with image, or text only), shared out so that
    its micro-batches are about equally long. lengths as of sample_length -> a permutation. What does not fill a step
    of its own kind comes last, mixed. A recipe of one epoch: in a second one, steps begin inside the groups."""
    rng, step_size, steps, rest = (
        np.random.default_rng([seed, epoch]),
        batch_size * micro_batches,
        [],
        [],
    )
    for kind in (lengths > 0, lengths < 0):
        index = rng.permutation(np.flatnonzero(kind))
        whole = len(index) // step_size * step_size
        steps, rest = [*steps, *index[:whole].reshape(-1, step_size)], [*rest, *index[whole:]]
    for i, step in enumerate(steps):
        rows = step[np.argsort(-abs(lengths[step]), kind="stable")].reshape(
            batch_size, micro_batches
        )
        rows[1::2] = rows[1::2, ::-1]  # dealt out to and fro, longest first
        steps[i] = rows.T.ravel()
    return np.concatenate([*(steps[i] for i in rng.permutation(len(steps))), rest]).astype(np.int64)


def micro_batches(
    n, batch_size, grad_accum, steps, seed=0, first_step=0, rank=0, world=1, lengths=None
):
    """Yield this rank's micro-batches, `grad_accum` lists of sample indices for each step in [first_step, steps).

    The samples of a step depend only on (seed, step) and the global batch; micro-batch a of rank r is number
    a * world + r of the step, so ranks and accumulation are interchangeable. Epochs follow on one another without
    a gap: the last batch of one is filled from the next, and no sample is dropped. lengths: grouped_order with them.
    """
    global_batch = batch_size * grad_accum * world

    @functools.lru_cache(maxsize=2)
    def order(epoch):
        return (
            epoch_order(n, seed, epoch)
            if lengths is None
            else grouped_order(lengths, batch_size, grad_accum * world, seed, epoch)
        )

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
        raise UserError(
            f"{path}: cannot read the image ({e.strerror}); check --image_folder"
        ) from e
    try:
        return Image.open(io.BytesIO(data)).convert("RGB"), zlib.crc32(data)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        raise UserError(
            f"{path}: not a readable image ({e}); replace the file or remove its sample"
        ) from e


@functools.cache
def image_processor(size, mode, mean, std):
    """The transformers image processor that does `geometry`; exported models carry it."""
    common = dict(image_mean=mean, image_std=std, resample=Image.Resampling.BICUBIC)
    if mode == "square":
        return CLIPImageProcessor(
            size={"shortest_edge": size}, crop_size={"height": size, "width": size}, **common
        )
    if mode == "squash":
        return SiglipImageProcessor(size={"height": size, "width": size}, **common)
    if mode == "pad":
        return LlavaImageProcessor(
            do_pad=True,
            size={"shortest_edge": size},
            crop_size={"height": size, "width": size},
            **common,
        )
    raise UserError(f"unknown image geometry {mode!r}: use square, squash or pad")


def geometry(image, size, mode, mean, std):
    """The one function that decides which pixels an encoder sees; labelling and training both call it.

    PIL image -> [3, size, size] float32, normalised. square: shortest edge to `size`, bicubic, centre crop (CLIP,
    LLaVA's stage 1). squash: both edges to `size`, no crop (SigLIP). pad: to a square with the mean colour, then to
    `size` (LLaVA's stage 2). mean, std: three floats each, of the encoder.
    """
    processor = image_processor(size, mode, tuple(mean), tuple(std))
    return processor(image, return_tensors="pt")["pixel_values"][0]


def vision_geometry(vision):
    """The geometry keywords of a transformers vision tower or Llava folder, from its preprocessor or processor config."""
    try:
        p = AutoImageProcessor.from_pretrained(vision)
    except (OSError, ValueError) as e:
        raise UserError(
            f"{vision}: no image processor found ({str(e).splitlines()[0]}); a vision tower needs a "
            "preprocessor_config.json"
        ) from e
    square = "shortest_edge" in p.size
    # PAPER: a resize edge larger than the crop (DINOv2's 256 for 224) would show another region than the labels saw
    size = p.crop_size["height"] if square else p.size["height"]
    mode = (
        "pad"
        if isinstance(p, LlavaImageProcessor) and p.do_pad
        else "square"
        if square
        else "squash"
    )
    return dict(size=size, mode=mode, mean=tuple(p.image_mean), std=tuple(p.image_std))


# ------------------------------------------------------------------------------------------------------ text


_LLAVA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions."
)
# format -> the token whose presence in a vocabulary tells it; its end-of-turn token (None: the tokenizer's EOS); the
# texts: [before, after] a system turn and a user turn, what prompts an answer, and where they are not as in _PLAIN ...
CHATS = {
    "llama-3": (
        "<|start_header_id|>",
        "<|eot_id|>",
        dict(
            system_turn=["<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"],
            default=_LLAVA_SYSTEM,
            user_turn=["<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"],
            prompt="<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
    ),
    "phi-3": (
        "<|assistant|>",
        "<|end|>",
        dict(
            system_turn=["<|system|>\n", "<|end|>\n"],
            default="You are a helpful AI assistant.",
            user_turn=["<|user|>\n", "<|end|>\n"],
            prompt="<|assistant|>\n",
            after="\n",
        ),
    ),
    "gemma": (
        "<start_of_turn>",
        "<end_of_turn>",
        dict(
            system_turn=["", "\n\n"],
            inside=True,
            user_turn=["<start_of_turn>user\n", "<end_of_turn>\n"],
            prompt="<start_of_turn>model\n",
            tail="\n",
        ),
    ),
    "chatml": (
        "<|im_start|>",
        "<|im_end|>",
        dict(
            system_turn=["<|im_start|>system\n", "<|im_end|>\n"],
            user_turn=["<|im_start|>user\n", "<|im_end|>\n"],
            prompt="<|im_start|>assistant\n",
            after="\n",
        ),
    ),
    "vicuna": (
        None,
        None,
        dict(
            system_turn=["", " "],
            default=_LLAVA_SYSTEM,
            user_turn=["USER: ", " "],
            prompt="ASSISTANT:",
            lead=" ",
        ),
    ),
}
# ... the system text of a conversation that brings none, whether it stands inside the first user turn, what is before
# and after the answer with its end-of-turn token and trained like them, and what follows untrained
_PLAIN = dict(default="", inside=False, lead="", tail="", after="")
# content: a string, or a list of {"type": "image"} and {"type": "text", "text": ...}; BOS is left to the tokenizer
_TEMPLATE = """{%- macro text(content) -%}
{%- if content is string -%}{{ content }}{%- else -%}{%- for part in content -%}
{{ "<image>\n" if part.type == "image" else part.text }}{%- endfor -%}{%- endif -%}{%- endmacro -%}
{%- set given = messages[0].role == "system" -%}
{%- set system = text(messages[0].content) | trim if given else default -%}
{%- for message in messages -%}{%- if message.role == "user" -%}
{%- set s = system_turn[0] ~ system ~ system_turn[1] if system and loop.index0 == given | int else "" -%}
{{ user_turn[0] ~ s if inside else s ~ user_turn[0] }}{{ text(message.content) | trim }}{{ user_turn[1] }}
{%- elif message.role == "assistant" -%}
{{ prompt }}{%- generation -%}{{ lead ~ text(message.content) | trim ~ end ~ tail }}{%- endgeneration -%}{{ after }}
{%- endif -%}{%- endfor -%}{%- if add_generation_prompt -%}{{ prompt }}{%- endif -%}"""


def marks_answers(tokenizer):
    """Does the tokenizer's own chat template mark answers and what ends them by {% generation %}?"""
    if not re.search(r"\{%-?\s*generation", tokenizer.chat_template or ""):
        return False
    chat = tokenizer.apply_chat_template(
        [dict(role="user", content="Q"), dict(role="assistant", content="A")],
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    return tokenizer.eos_token_id in [
        i for i, mask in zip(chat["input_ids"], chat["assistant_masks"]) if mask
    ]


def prepare_tokenizer(tokenizer):
    """Give it `<image>` as one token, a chat template that marks answers, a pad token; EOS becomes the end of a turn.

    A template that already marks answers is kept; otherwise the vocabulary tells the format. The image token never
    reaches the embedding layer in training: visual tokens take its place. -> its id
    """
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)])
    if not marks_answers(tokenizer):
        vocabulary = tokenizer.get_vocab().keys() | {None}
        end, texts = next(
            (end, texts) for marker, end, texts in CHATS.values() if {marker, end} <= vocabulary
        )
        tokenizer.eos_token = end or tokenizer.eos_token
        texts = _PLAIN | texts | dict(end=tokenizer.eos_token)
        tokenizer.chat_template = (
            "".join(f"{{%- set {k} = {json.dumps(v)} -%}}" for k, v in texts.items()) + _TEMPLATE
        )
    if tokenizer.pad_token is None:  # any token will do: masks are made from lengths
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)


def chat_messages(sample):
    """LLaVA's turns -> messages of a chat template. As in LLaVA the image comes first in its turn, here in the first
    one if no turn names it, and an answer before the first question is dropped."""
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    turns = [
        dict(role=roles[turn["from"]], content=turn["value"].strip())
        for turn in sample["conversations"]
    ]
    first = next(i for i, turn in enumerate(turns) if turn["role"] == "user")
    turns = [turn for i, turn in enumerate(turns) if i >= first or turn["role"] == "system"]
    if image_of(sample):
        marked = [turn for turn in turns if IMAGE_TOKEN in turn["content"]]
        turn = (marked or [turn for turn in turns if turn["role"] == "user"])[0]
        turn["content"] = (
            f"{IMAGE_TOKEN}\n{turn['content'].replace(IMAGE_TOKEN, '').strip()}".strip()
        )
    return turns


def encode_conversation(sample, tokenizer, image_tokens, max_length=2048, chat=False):
    """-> ids [L] with the image token `image_tokens` times, labels [L] with IGNORE where nothing is trained.

    Stage 1, LLaVA's `plain`: `<image>` + caption + newline; the human turn is discarded, caption and newline are
    trained, there is no EOS. chat, stage 2: the tokenizer's chat template; answers and what ends them are trained.
    What is too long is cut at the end, and before an image that would be cut in two.
    """
    image = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    if chat:
        messages = chat_messages(sample)
        encoded = tokenizer.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True
        )
        start = _start(tokenizer)
        ids, mask = start + encoded["input_ids"], [0] * len(start) + encoded["assistant_masks"]
        answers, found = (
            sum(m["role"] == "assistant" for m in messages),
            sum(np.diff([0, *mask]) > 0),
        )
        if found != answers:
            raise UserError(
                f"sample {sample.get('id')}: the chat template marks {found} of {answers} answers; its "
                "{% generation %} must enclose each of them"
            )
    else:
        ids = tokenizer(IMAGE_TOKEN + sample["conversations"][1]["value"] + "\n")["input_ids"]
        at = ids.index(image)
        mask = [0] * (at + 1) + [1] * (len(ids) - at - 1)
    if image in ids:
        at = ids.index(image)
        if image_tokens + (0 if chat else at) >= max_length:
            raise UserError(
                f"max_length {max_length} leaves no room for text beside {image_tokens} image tokens"
            )
        ids = ids[:at] + [image] * image_tokens + ids[at + 1 :]
        mask = mask[:at] + [0] * image_tokens + mask[at + 1 :]
        max_length = at if at < max_length < at + image_tokens else max_length
    ids, mask = torch.tensor(ids[:max_length]), torch.tensor(mask[:max_length])
    return ids, ids.masked_fill(mask == 0, IGNORE)


def _start(tokenizer):
    return [
        i for i in tokenizer("")["input_ids"] if i == tokenizer.bos_token_id
    ]  # for those that want one


def encode_prompt(sample, tokenizer, image_tokens):
    """A chat whose last turn is the user's -> ids [L] that the model is to continue with its answer, as it was trained
    by encode_conversation."""
    chat = tokenizer.apply_chat_template(
        chat_messages(sample), return_dict=True, add_generation_prompt=True
    )
    ids, image = _start(tokenizer) + chat["input_ids"], tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    return torch.tensor([i for t in ids for i in ([t] * image_tokens if t == image else [t])])


def word_tokens(words, tokenizer):
    """The LLM's tokens of each word as it stands inside a sentence, with its leading space -> (ids, offsets).

    ids [sum of M] int64, offsets [q + 1] int64: word j is ids[offsets[j]:offsets[j + 1]]. Encoding " dog" alone
    would give some SentencePiece tokenizers a second space; the words are encoded behind another one instead.
    """
    before = tokenizer("a", add_special_tokens=False)["input_ids"]
    rows = tokenizer([f"a {w}" for w in words], add_special_tokens=False)["input_ids"]
    for word, row in zip(words, rows):
        if row[: len(before)] != before or len(row) == len(before):
            raise UserError(
                f"the LLM's tokenizer has no tokens for the word {word!r} alone; remove it from the list"
            )
    rows = [row[len(before) :] for row in rows]
    offsets = np.cumsum([0, *map(len, rows)])
    return torch.tensor(list(itertools.chain.from_iterable(rows))), torch.from_numpy(offsets)


# --------------------------------------------------------------------------------------------------- batches


class LlavaDataset(Dataset):
    """Samples -> tensors. labels: a LabelStore of the same samples (row i is sample i), or None without SEA. chat: as
    of encode_conversation, or "prompt": of encode_prompt, without targets. An item without image, or whose image fell
    to max_length, has no "pixels"."""

    def __init__(
        self,
        samples,
        image_folder,
        geometry,
        tokenizer,
        image_tokens,
        max_length=2048,
        labels=None,
        chat=False,
    ):
        if not Path(image_folder).is_dir():
            raise UserError(f"{image_folder}: no such image folder (--image_folder)")
        self.samples, self.image_folder, self.geometry = samples, Path(image_folder), geometry
        self.tokenizer, self.image_tokens, self.max_length = tokenizer, image_tokens, max_length
        self.labels, self.chat = labels, chat

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        sample = self.samples[i]
        if self.chat == "prompt":
            ids = encode_prompt(sample, self.tokenizer, self.image_tokens)
            targets = torch.full_like(ids, IGNORE)
        else:
            ids, targets = encode_conversation(
                sample, self.tokenizer, self.image_tokens, self.max_length, self.chat
            )
        item = dict(index=i, input_ids=ids, labels=targets)
        if (ids == self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)).any():
            path = self.image_folder / image_of(sample)
            image, crc = read_image(path)
            item["pixels"] = geometry(image, **self.geometry)
        if self.labels is not None:
            if self.labels.record(i)["crc"] != crc:
                raise UserError(
                    f"{path}: the file has changed since it was labelled; run labels.py extract again "
                    f"into another folder than {self.labels.folder}"
                )
            item["label_ids"], item["label_scores"] = self.labels[i]
        return item


def collate(items, pad_id, side="right"):
    """-> index (list of B), input_ids, labels, attention_mask [B, L] (padded at `side`), pixels [images, 3, S, S] and,
    with SEA, label_ids and label_scores [B, m, n]. The mask comes from lengths: pad and EOS may be the same token."""
    pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True, padding_side=side)
    ids = [item["input_ids"] for item in items]
    images = [item["pixels"] for item in items if "pixels" in item]
    batch = dict(
        index=[item["index"] for item in items],
        input_ids=pad(ids, padding_value=pad_id),
        labels=pad([item["labels"] for item in items], padding_value=IGNORE),
        attention_mask=pad([torch.ones_like(x) for x in ids], padding_value=0),
        pixels=torch.stack(images) if images else torch.zeros(0, 3, 0, 0),
    )
    for key in ("label_ids", "label_scores"):
        if key in items[0]:
            batch[key] = torch.stack([item[key] for item in items])
    return batch
