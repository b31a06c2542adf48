"""LLaVA-format data: samples, text -> ids and targets, images and their geometry, batches, order.

A sample is {"id": ..., "image": "folder/name.jpg", "conversations": [
{"from": "human", "value": "<image>\\nDescribe it."}, {"from": "gpt", "value": "A caption."}]}.
A data file is a JSON list of samples, or holds one sample on each line (.jsonl).
"""

import argparse
import dataclasses
import functools
import inspect
import io
import json
import re
import sys
import typing
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.distributed.checkpoint import CheckpointException
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import (
    AddedToken,
    AutoImageProcessor,
    CLIPImageProcessor,
    LlavaImageProcessor,
    SiglipImageProcessor,
    dynamic_module_utils,
)

# transformers never runs Python code that comes with a model, and does not ask about it
dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
IMAGE_TOKEN = "<image>"
# Others, such as EPS, are not for files of unknown origin. JPEG includes the MPO of phones.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
IGNORE = -100  # the target of a position that is not trained, as cross_entropy expects it


class UserError(Exception):
    """Something outside the program is wrong, such as a file or a flag; says which, and the fix."""


# ----------------------------------------------------------------------------- samples


def load_samples(file, captions=True):
    """A LLaVA .json or .jsonl file -> a sequence of dicts, all of them checked.

    captions: every sample must be an image and its caption, as stage 1 and the labels need it.
    """
    file = Path(file)
    if not file.is_file():
        raise UserError(f"{file}: no such data file (--data takes a LLaVA-format .json or .jsonl)")
    if file.suffix == ".jsonl":
        samples = JsonLines(file, captions)
    else:
        samples = parse_json(file.read_bytes(), file)
        if not isinstance(samples, list):
            raise UserError(f"{file}: expected a list of samples")
        for number, sample in enumerate(samples, 1):
            check_sample(sample, captions, f"{file}, sample {number}")
    if not len(samples):
        raise UserError(f"{file}: expected at least one sample")
    return samples


class JsonLines:
    """A .jsonl file of any size as a sequence: only the places of its lines stay in memory.

    Opening it reads it once, to check every sample and to measure its length.
    """

    def __init__(self, file, captions):
        self.file = file
        offsets = []
        lengths = []
        offset = 0
        with open(file, "rb") as lines:
            for number, line in enumerate(tqdm(lines, f"reading {file.name}", delay=5), 1):
                if line.strip():
                    sample = parse_json(line, file, number)
                    check_sample(sample, captions, f"{file}, line {number}")
                    lengths.append(sample_length(sample))
                    offsets.append(offset)
                offset += len(line)
        self.offsets = np.array(offsets)
        self.lengths = np.array(lengths)

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, i):
        with open(self.file, "rb") as lines:
            lines.seek(self.offsets[i])
            return json.loads(lines.readline())


def read_json_lines(file, keys=()):
    """The objects of a small file that holds one on each line, such as metrics.jsonl."""
    lines = enumerate(Path(file).read_bytes().splitlines(), 1)
    return [read_object(line, file, number, keys) for number, line in lines if line.strip()]


def read_object(text, file, line=None, keys=()):
    """A JSON object, or UserError, which says what is damaged. keys: what it must have."""
    content = parse_json(text, file, line)
    if not isinstance(content, dict) or not content.keys() >= set(keys):
        raise UserError(
            f"{file}, line {line or 1}: not an object {{{', '.join(keys)} ...}}; damaged"
        )
    return content


def parse_json(text, file, line=None):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:  # of JSON or of UTF-8; too deep
        line = line or getattr(e, "lineno", "?")
        reason = getattr(e, "msg", e)
        raise UserError(f"{file}, line {line}: not valid JSON ({reason}); mend or remove it") from e


def image_of(sample):
    """The image path of a sample, or None. Cambrian writes '', "None" or "nan" for no image."""
    image = sample.get("image")
    return None if str(image).lower() in ("", "none", "nan") else image


def sample_length(sample):
    """The words of all turns, LLaVA's measure for grouping: negative if there is no image."""
    words = max(1, sum(len(turn["value"].split()) for turn in sample["conversations"]))
    return words if image_of(sample) else -words


def sample_lengths(samples):
    """[n] int64, sample_length of each sample."""
    if isinstance(samples, JsonLines):
        return samples.lengths
    return np.array([sample_length(sample) for sample in samples])


def check_sample(sample, captions, where):
    """Raise UserError, which begins with `where`, if a sample is malformed."""
    turns = sample.get("conversations") if isinstance(sample, dict) else None
    if not isinstance(turns, list) or len(turns) < 2:
        raise UserError(f'{where}: needs "conversations", a list of at least two turns')
    image = image_of(sample)
    for turn in turns:
        texts = [turn.get("from"), turn.get("value")] if isinstance(turn, dict) else [None]
        if not all(isinstance(text, str) for text in texts):
            raise UserError(
                f'{where}: each turn of "conversations" needs the strings "from" and "value"'
            )
        if turn["from"] == "gpt" and not turn["value"].strip():
            raise UserError(f"{where}: an answer is empty; nothing could be trained; remove it")
        if IMAGE_TOKEN in turn["value"].replace(IMAGE_TOKEN, ""):
            raise UserError(f"{where}: without {IMAGE_TOKEN}, another {IMAGE_TOKEN} remains")
        if re.search("[\0\ud800-\udfff]", f"{turn['from']}{turn['value']}{image}"):
            raise UserError(f"{where}: a NUL or half a UTF-16 pair stands in a text or in the path")
    is_path = isinstance(image, str) and image[0] != "/" and ".." not in image.split("/")
    if not is_path and (captions or image is not None):
        raise UserError(f'{where}: needs "image", one path below --image_folder, not {image!r}')

    speakers = "\0".join(turn["from"] for turn in turns)  # NUL is in none of them
    chat = "(system\0)?(gpt\0)?human\0gpt(\0human\0gpt)*(\0human)?"
    if not re.fullmatch("human\0gpt" if captions else chat, speakers):
        raise UserError(
            f"{where}: the turns are from {speakers.split(chr(0))}; they must be a caption's "
            "(human gpt) in stage 1, and alternate between human and gpt, after a system turn if "
            "any, in stage 2"
        )
    with_image = [turn["from"] for turn in turns if IMAGE_TOKEN in turn["value"]]
    if with_image and (with_image != ["human"] or not image):
        raise UserError(
            f"{where}: {IMAGE_TOKEN} may stand in one human turn of a sample with an image; here "
            f"it is in turns of {with_image}, and the image is {image!r}"
        )


# ----------------------------------------------------------------------------- text


def encode_conversation(
    sample, tokenizer, image_tokens, max_length=2048, chat=False, is_prompt=False
):
    """-> ids [L], with image_tokens times <image>, and targets [L], IGNORE where not trained.

    Stage 1, LLaVA's `plain`: <image>, the caption and a newline, without the human turn and without
    EOS. Caption and newline are trained. PAPER: that the human turn is dropped is LLaVA's recipe.
    chat, stage 2: the tokenizer's chat template. Answers and the tokens that end them are trained.
    is_prompt: the last turn is a human's, and the ids end where its answer begins.
    Ids beyond max_length are cut off. An image that the cut would split is dropped whole.
    """
    image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    if chat:
        ids, is_trained = encode_chat(sample, tokenizer, image_tokens, is_prompt)
    else:
        caption = as_text(sample["conversations"][1]["value"], tokenizer)
        # By itself, as in LLaVA: a SentencePiece tokenizer gives its first word a leading space.
        text = tokenizer(caption + "\n", add_special_tokens=False)["input_ids"]
        prefix = bos_of(tokenizer) + [image_token_id] * image_tokens
        ids = prefix + text
        is_trained = [0] * len(prefix) + [1] * len(text)

    if image_token_id in ids:
        if max_length <= image_tokens + 1:
            raise UserError(
                f"max_length {max_length} leaves no room for text beside {image_tokens} image "
                "tokens"
            )
        start = ids.index(image_token_id)
        if start < max_length < start + image_tokens:
            max_length = start
    ids = torch.tensor(ids[:max_length])
    is_trained = torch.tensor(is_trained[:max_length])
    is_trained[0] = 0  # nothing comes before it
    return ids, ids.masked_fill(is_trained == 0, IGNORE)


def encode_chat(sample, tokenizer, image_tokens, is_prompt):
    """-> ids and is_trained, lists of equal length; arguments as of encode_conversation."""
    messages = chat_messages(sample, image_tokens)
    for message in messages:
        message["content"] = as_text(message["content"], tokenizer)
    encoded = tokenizer.apply_chat_template(
        messages,
        return_dict=True,
        return_assistant_tokens_mask=True,
        add_generation_prompt=is_prompt,
    )
    is_trained = encoded["assistant_masks"]
    answers = sum(message["role"] == "assistant" for message in messages)
    marked = sum(np.diff([0, *is_trained]) > 0)
    if marked != answers:
        raise UserError(
            f"sample {sample.get('id')}: the chat template marks {marked} of {answers} answers; "
            "its {% generation %} must enclose each of them"
        )
    # Our templates leave BOS to the tokenizer.
    bos = bos_of(tokenizer)
    if encoded["input_ids"][:1] == bos:
        bos = []
    return bos + encoded["input_ids"], [0] * len(bos) + is_trained


def bos_of(tokenizer):
    """[BOS], or [] of a tokenizer that does not begin texts with it."""
    return [i for i in tokenizer("")["input_ids"] if i == tokenizer.bos_token_id]


def as_text(text, tokenizer):
    """A text without control tokens but <image>, for only a template makes them.

    A zero-width space parts the "</s>" of a caption.
    """
    for token in control_tokens(tokenizer).values():
        if token != IMAGE_TOKEN:
            text = text.replace(token, f"{token[0]}\u200b{token[1:]}")
    return text


@functools.cache
def control_tokens(tokenizer):
    """{id: string} of a tokenizer's control tokens, <image> among them."""
    return {
        i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special
    }


def chat_messages(sample, image_tokens=1):
    """LLaVA's turns -> the messages of a chat template, with <image> image_tokens times.

    As in LLaVA the image is moved to the start of its turn. If no turn has <image>, it goes to the
    start of the first human turn. An answer before the first question is dropped. Texts are
    stripped. Unlike LLaVA, the chat is encoded as a whole, as the exported processor does it:
    LLaVA's own code has one untrained piece more after the image with SentencePiece tokenizers.
    """
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    messages = []
    users = []
    for turn in sample["conversations"]:
        message = {"role": roles[turn["from"]], "content": turn["value"].strip()}
        if message["role"] == "user":
            users.append(message)
        if message["role"] != "assistant" or users:
            messages.append(message)
    if image_of(sample):
        with_image = [message for message in users if IMAGE_TOKEN in message["content"]]
        message = (with_image or users)[0]
        text = message["content"].replace(IMAGE_TOKEN, "").strip()
        message["content"] = f"{IMAGE_TOKEN * image_tokens}\n{text}".strip()
    return messages


# ----------------------------------------------------------------------------- chat templates

_LLAVA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
# Message contents are a string, or a list of {"type": "image"} and {"type": "text", "text": ...}.
_MACROS = r"""
{%- macro text(message) -%}
{%- if message.content is string -%}{{ message.content | trim }}
{%- else -%}
{%- set parts = namespace(all="") -%}
{%- for part in message.content -%}
{%- set parts.all = parts.all ~ ("<image>\n" if part.type == "image" else part.text) -%}
{%- endfor -%}
{{ parts.all | trim }}
{%- endif -%}
{%- endmacro -%}"""
_VICUNA = r"""
{%- if messages[0].role != "system" -%}{{ llava_system ~ " " }}{%- endif -%}
{%- for message in messages -%}
{%- if message.role == "system" -%}{{ text(message) ~ " " }}
{%- elif message.role == "user" -%}{{ "USER: " ~ text(message) ~ " " }}
{%- else -%}
{{ "ASSISTANT:" }}{%- generation -%}{{ " " ~ text(message) ~ eos_token }}{%- endgeneration -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ "ASSISTANT:" }}{%- endif -%}"""
_LLAMA_3 = r"""
{%- macro head(role) -%}{{ "<|start_header_id|>" ~ role ~ "<|end_header_id|>\n\n" }}{%- endmacro -%}
{%- if messages[0].role != "system" -%}{{ head("system") ~ llava_system ~ eos_token }}{%- endif -%}
{%- for message in messages -%}
{{ head(message.role) }}
{%- if message.role == "assistant" -%}
{%- generation -%}{{ text(message) ~ eos_token }}{%- endgeneration -%}
{%- else -%}{{ text(message) ~ eos_token }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ head("assistant") }}{%- endif -%}"""
_PHI_3 = r"""
{%- if messages[0].role != "system" -%}
{{ "<|system|>\nYou are a helpful AI assistant.<|end|>\n" }}
{%- endif -%}
{%- for message in messages -%}
{{ "<|" ~ message.role ~ "|>\n" }}
{%- if message.role == "assistant" -%}
{%- generation -%}{{ text(message) ~ eos_token }}{%- endgeneration -%}{{ "\n" }}
{%- else -%}{{ text(message) ~ eos_token ~ "\n" }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ "<|assistant|>\n" }}{%- endif -%}"""
# As published, the newline after an answer is trained too.
_GEMMA = r"""
{%- for message in messages -%}
{%- if message.role == "user" -%}
{{ "<start_of_turn>user\n" }}
{%- if loop.previtem and loop.previtem.role == "system" -%}
{{ text(loop.previtem) ~ "\n\n" }}
{%- endif -%}
{{ text(message) ~ eos_token ~ "\n" }}
{%- elif message.role == "assistant" -%}
{{ "<start_of_turn>model\n" }}
{%- generation -%}{{ text(message) ~ eos_token ~ "\n" }}{%- endgeneration -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ "<start_of_turn>model\n" }}{%- endif -%}"""
_CHATML = r"""
{%- for message in messages -%}
{{ "<|im_start|>" ~ message.role ~ "\n" }}
{%- if message.role == "assistant" -%}
{%- generation -%}{{ text(message) ~ eos_token }}{%- endgeneration -%}{{ "\n" }}
{%- else -%}{{ text(message) ~ eos_token ~ "\n" }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ "<|im_start|>assistant\n" }}{%- endif -%}"""
# Chat formats: a token that only vocabularies of the format have, the token that ends a turn
# (eos_token in the template), the template. All other LLMs get Vicuna's, with their own EOS.
CHAT_FORMATS = [
    ("<|start_header_id|>", "<|eot_id|>", _LLAMA_3),
    ("<|assistant|>", "<|end|>", _PHI_3),
    ("<start_of_turn>", "<end_of_turn>", _GEMMA),
    ("<|im_start|>", "<|im_end|>", _CHATML),
]


def prepare_tokenizer(tokenizer):
    """Make a tokenizer fit for training -> the id of <image>.

    It gets <image> as one token, a pad token, and a chat template that marks answers, whose
    end-of-turn token becomes EOS. A template of its own that marks answers is kept.
    """
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)])
    if isinstance(tokenizer.chat_template, dict):  # several, by name
        tokenizer.chat_template = tokenizer.chat_template.get("default")
    if not marks_answers(tokenizer):
        vocabulary = tokenizer.get_vocab()
        template = _VICUNA
        for marker, end, its_template in CHAT_FORMATS:
            if marker in vocabulary and end in vocabulary:
                template = its_template
                tokenizer.eos_token = end
                break
        if template == _VICUNA and tokenizer.chat_template:
            raise UserError(
                "--llm: the format of its chat template is unknown; enclose the answers in the "
                "template in {% generation %}, or remove the template to use Vicuna's"
            )
        system = f"{{%- set llava_system = {json.dumps(_LLAVA_SYSTEM)} -%}}"
        tokenizer.chat_template = system + _MACROS + template
    if tokenizer.pad_token is None:  # any token will do: masks are made from lengths
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)


def marks_answers(tokenizer):
    """Does the tokenizer's own chat template mark answers, and the EOS that ends them?"""
    if not re.search(r"\{%-?\s*generation", tokenizer.chat_template or ""):
        return False
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    encoded = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    return (tokenizer.eos_token_id, 1) in zip(encoded["input_ids"], encoded["assistant_masks"])


# ----------------------------------------------------------------------------- images


def geometry(image, size, mode, mean, std):
    """The one function that decides which pixels an encoder sees; labelling and training call it.

    PIL image -> [3, size, size] float32, normalised with mean and std, three floats each.
    square: shortest edge to `size`, bicubic, centre crop (CLIP, and LLaVA's stage 1).
    squash: both edges to `size`, no crop (SigLIP).
    pad: to a square with the mean colour, then to `size` (LLaVA's stage 2).
    """
    processor = image_processor(size, mode, tuple(mean), tuple(std))
    return processor(image, return_tensors="pt")["pixel_values"][0]


@functools.cache
def image_processor(size, mode, mean, std):
    """The transformers image processor that does `geometry`; exported models carry it."""
    common = dict(image_mean=mean, image_std=std, resample=Image.Resampling.BICUBIC)
    square = {"height": size, "width": size}
    if mode == "square":
        return CLIPImageProcessor(size={"shortest_edge": size}, crop_size=square, **common)
    if mode == "squash":
        return SiglipImageProcessor(size=square, **common)
    if mode == "pad":
        return LlavaImageProcessor(
            do_pad=True, size={"shortest_edge": size}, crop_size=square, **common
        )
    raise UserError(f"unknown image geometry {mode!r}: use square, squash or pad")


def vision_preprocess(name):
    """The keywords of `geometry` for a vision tower or Llava model, from its processor's config."""
    processor = AutoImageProcessor.from_pretrained(name)
    if "shortest_edge" not in processor.size:
        mode = "squash"
        size = processor.size["height"]
    else:
        # PAPER: the edge is resized to the crop's size, even where a processor resizes to a larger
        # one (DINOv2: 256 for 224): training must see the region that was labelled.
        size = processor.crop_size["height"]
        mode = "pad" if getattr(processor, "do_pad", False) else "square"
    mean, std = map(tuple, (processor.image_mean, processor.image_std))
    return dict(size=size, mode=mode, mean=mean, std=std)


def read_image(file):
    """-> (RGB image, CRC-32 of the file's bytes); a UserError names a missing or broken file.

    Images are turned upright as their EXIF says, as transformers' and viewers do.
    """
    if not Path(file).is_file():
        raise UserError(f"{file}: cannot read the image (no such file); check --image_folder")
    try:
        content = Path(file).read_bytes()
        image = Image.open(io.BytesIO(content), formats=IMAGE_FORMATS)
        if image.mode[0] in "IF" or max(image.size) > 100 * min(image.size):
            raise ValueError(f"{image.mode}, {image.size}: 8 bits a channel, 100:1 at most")
        return ImageOps.exif_transpose(image).convert("RGB"), zlib.crc32(content)
    except Exception as e:  # decoders raise nearly everything
        raise UserError(
            f"{file}: not a readable image ({e}); replace the file or remove its sample"
        ) from e


# ----------------------------------------------------------------------------- batches


@dataclasses.dataclass(eq=False)
class LlavaDataset(Dataset):
    """Samples -> tensors.

    preprocess: the keywords of `geometry`. text: "caption" (stage 1), "chat" (stage 2), or "prompt"
    for a chat to be answered. label_store: a LabelStore of the same samples, its row i for sample
    i. An item has no "pixels" if its sample has no image, or if max_length has cut the image off.
    """

    samples: Any
    image_folder: str
    preprocess: dict
    tokenizer: Any
    image_tokens: int
    max_length: int = 2048
    label_store: Any = None
    text: str = "caption"

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        sample = self.samples[i]
        ids, targets = encode_conversation(
            sample,
            self.tokenizer,
            self.image_tokens,
            self.max_length,
            chat=self.text != "caption",
            is_prompt=self.text == "prompt",
        )
        item = {
            "index": i,
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "is_image": ids == self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
            "targets": targets,
        }
        if item["is_image"].any():
            file = Path(self.image_folder, image_of(sample))
            image, crc = read_image(file)
            item["pixels"] = geometry(image, **self.preprocess)
        if self.label_store is not None:
            record = self.label_store.record(i)
            if record["crc"] != crc:  # which is known: the image of a caption is never cut off
                raise UserError(
                    f"{file}: the file has changed since it was labelled; run labels.py extract "
                    f"again into another folder than {self.label_store.folder}"
                )
            item["label_ids"], item["label_scores"] = self.label_store.as_tensors(record)
        return item


def collate(items, pad_id, side="right"):
    """Items of LlavaDataset -> a batch, sequences padded at `side`.

    index (list of B), input_ids and attention_mask [B, L], pixels [images, 3, size, size] and, with
    labels, label_ids and label_scores [B, m, n]. As places in the flattened input_ids, so that a
    GPU need not look for them: image_places [images * m], where <image> stands, and trained [T],
    the tokens to be predicted, of which none is the first of its sequence.
    """

    def pad(key, value):
        rows = [item[key] for item in items]
        return pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)

    pixels = [item["pixels"] for item in items if "pixels" in item]
    batch = {
        "index": [item["index"] for item in items],
        "input_ids": pad("input_ids", pad_id),
        # not from the ids: the pad token may be EOS
        "attention_mask": pad("attention_mask", 0),
        "image_places": torch.where(pad("is_image", False).flatten())[0],
        "trained": torch.where(pad("targets", IGNORE).flatten() != IGNORE)[0],
        "pixels": torch.stack(pixels) if pixels else torch.zeros(0, 3, 0, 0),
    }
    for key in ("label_ids", "label_scores"):
        if key in items[0]:
            batch[key] = torch.stack([item[key] for item in items])
    return batch


# ----------------------------------------------------------------------------- order


def micro_batches(
    n, batch_size, grad_accum, steps, seed=0, first_step=0, rank=0, ranks=1, lengths=None
):
    """Yield this rank's micro-batches: grad_accum lists of sample indices for each step.

    The samples of a step depend only on (seed, step) and the global batch: ranks and accumulation
    are interchangeable. Epochs follow one another without a gap: the last batch of one is filled up
    from the next. lengths: of sample_lengths, to use grouped_order; otherwise each epoch is a
    random permutation.
    """

    @functools.lru_cache(maxsize=2)
    def epoch_order(epoch):
        if lengths is not None:
            return grouped_order(lengths, batch_size, grad_accum * ranks, seed, epoch)
        return np.random.default_rng([seed, epoch]).permutation(n)

    for step in range(first_step, steps):
        for a in range(grad_accum):
            number = (step * grad_accum + a) * ranks + rank
            places = range(number * batch_size, (number + 1) * batch_size)
            yield [int(epoch_order(place // n)[place % n]) for place in places]


def grouped_order(lengths, batch_size, micro_batches_per_step, seed, epoch):
    """LLaVA's order for stage 2: the samples of a step are of one kind, with image or text only.

    Within a step they are dealt out so that its micro-batches are about equally long. What does not
    fill a step of its own kind comes last. lengths as of sample_lengths -> a permutation.
    Made for recipes of one epoch: in a second one, steps begin inside the groups.
    """
    rng = np.random.default_rng([seed, epoch])
    step_size = batch_size * micro_batches_per_step
    steps = []
    rest = []
    for of_kind in (lengths > 0, lengths < 0):  # with an image, text only
        index = rng.permutation(np.flatnonzero(of_kind))
        whole_steps = len(index) // step_size
        steps.extend(index[: whole_steps * step_size].reshape(-1, step_size))
        rest.append(index[whole_steps * step_size :])

    order = []
    for step in rng.permutation(steps):
        by_length = step[np.argsort(-abs(lengths[step]), kind="stable")]
        # A column becomes a micro-batch. Every second row runs backwards, so that no micro-batch
        # gets the longest of every row.
        rows = by_length.reshape(batch_size, micro_batches_per_step)
        rows[1::2] = rows[1::2, ::-1]
        order.append(rows.T.ravel())
    return np.concatenate([*order, *rest]).astype(np.int64)


# ----------------------------------------------------------------------------- command lines


def cli(main):
    """Run a command line. What the user can mend ends it with one line instead of a traceback."""
    try:
        main()
    except (UserError, OSError, CheckpointException) as e:
        # From a DataLoader worker, or as a checkpoint is written, it ends a traceback.
        message = re.split(r"(?m)^(?:data\.UserError|OSError): ", str(e))[-1]
        sys.exit(f"error: {' '.join(message.split())[:600]}")
    except ModuleNotFoundError as e:
        sys.exit(
            f"error: {e}; figures need pip install matplotlib scikit-learn, labels.py "
            "open_clip_torch, --tagger spacy"
        )


MAY_BE_0 = ("workers", "seed", "sign", "min_score")  # numbers that may be 0 or below


def run_command(doc, functions, argv=None):
    """Call functions[subcommand] as argv says. The flags are the parameters of that function."""
    options = dict(
        formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS
    )
    parser = argparse.ArgumentParser(description=doc, **options)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, function in functions.items():
        text = inspect.getdoc(function)
        command = commands.add_parser(
            name, help=text.splitlines()[0], description=text, allow_abbrev=False, **options
        )
        add_flags(command, inspect.signature(function), {})
    args = vars(parser.parse_args(argv))
    function = functions[args.pop("command")]
    for name, value in args.items():
        if type(value) in (int, float) and name not in MAY_BE_0 and not 0 < value < 1e9:
            raise UserError(f"--{name} must be above 0 and below 1e9, not {value}")
    return function(**args)


def add_flags(parser, signature, help):
    """Add a flag for each parameter: its name, annotated type, and help {parameter: text}.

    A flag that is not given stays out of the parser's result, so that Python's defaults hold.
    """
    for name, parameter in signature.parameters.items():
        choices = typing.get_args(parameter.annotation) or None  # of a Literal
        kind = type(choices[0]) if choices else parameter.annotation
        options = {"type": kind, "choices": choices}
        if kind is bool:
            options = {"action": argparse.BooleanOptionalAction}
        is_required = parameter.default is parameter.empty
        text = "required" if is_required else f"default: {parameter.default!r}"
        parser.add_argument(f"--{name}", required=is_required, help=help.get(name, text), **options)
