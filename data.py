"""LLaVA-format data: samples, text -> ids and targets, images and their geometry, batches, order.

A sample is {"id": ..., "image": "folder/name.jpg", "conversations": [
{"from": "human", "value": "<image>\\nDescribe it."}, {"from": "gpt", "value": "A caption."}]}.
A data file is a JSON list of samples, or holds one sample on each line (.jsonl).
"""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import inspect
import io
import json
import os
import pickle
import re
import string
import sys
import typing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch.distributed.checkpoint import CheckpointException
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

# transformers refuses Python code that comes with a model, and does not ask about it
dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0

IMAGE_TOKEN = "<image>"
# No others, such as EPS: files come from anywhere. JPEG includes the MPO of phones.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
IGNORE = -100  # the target of a position that is not trained, as cross_entropy expects it


class UserError(Exception):
    """Something outside the program is wrong, such as a file or a flag; says which, and the fix."""


# ----------------------------------------------------------------------------- samples

FORMAT = (
    '{"image": "a/1.jpg", "conversations": [{"from": "human", "value": "<image>\\nDescribe it."}, '
    '{"from": "gpt", "value": "A red door."}]}'
)
# Signs of a picture or a video elsewhere than under "image": a key that has a value, a value that
# is the name of a file, a placeholder where a human turn begins or ends.
PICTURE_KEY = "image|img|picture|photo|video"
PICTURE_FILE = r"\S+\.(jpe?g|png|webp|gif|bmp|tiff?|heic|avif|mp4|avi|mkv|mov|webm)"
PICTURE_TEXT = r"^\s*<(img|video)>|<(img|video)>\s*$|<img>[^<\s]+</img>"


def load_samples(file, captions=True):
    """A LLaVA .json or .jsonl file -> a sequence of dicts, all of them checked.

    captions: every sample must be an image and its caption, as stage 1 and the labels need it.
    """
    file = find_data(file)
    if file.suffix.lower() == ".jsonl":
        samples = JsonLines(file, captions)
    else:
        samples = read_list(file)
        for number, sample in enumerate(samples, 1):
            check_sample(sample, captions, f"{file}, sample {number}")
    if not len(samples):
        raise UserError(f"{file}: expected at least one sample")
    return samples


def find_data(file):
    """The Path of a data file, or UserError if there is none or its name says another format."""
    file = Path(file)
    if not os.path.isfile(file):  # unlike Path's, no error if the name is too long
        raise UserError(f"{file}: no such data file (--data takes a LLaVA-format .json or .jsonl)")
    if file.suffix.lower() not in (".json", ".jsonl"):
        raise UserError(
            f"{file}: not LLaVA's format, a .json with a list of samples, or a .jsonl with a "
            f"sample on each line: {FORMAT}"
        )
    return file


def read_list(file):
    """The samples of a .json file, unchecked."""
    samples = parse_json(file.read_bytes(), file)
    if not isinstance(samples, list):
        raise UserError(f"{file}: not LLaVA's format, expected a list of samples such as {FORMAT}")
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

    def __iter__(self):
        with open(self.file, "rb") as lines:
            for line in lines:
                if line.strip():
                    yield json.loads(line)

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
        raise UserError(
            f"{file}, line {line}: not valid JSON ({reason}); mend it, or remove the line"
        ) from e


def digest(texts):
    """A short fingerprint of a list of strings."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


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
        raise UserError(
            f'{where}: needs "conversations", a list of at least two turns, as in {FORMAT}'
        )
    try:
        pickle.dumps(sample)  # as data loaders do, far from its file and line
    except RecursionError as e:
        raise UserError(f"{where}: its lists or objects are nested too deep; remove them") from e
    image = image_of(sample)
    for turn in turns:
        texts = [turn.get("from"), turn.get("value")] if isinstance(turn, dict) else [None]
        if not all(isinstance(text, str) for text in texts):
            raise UserError(
                f'{where}: each turn of "conversations" needs the strings "from" and "value"'
            )
        if turn["from"] == "gpt" and not turn["value"].strip():
            raise UserError(f"{where}: an answer is empty; nothing could be trained; remove it")
        if image is not None and IMAGE_TOKEN in turn["value"].replace(IMAGE_TOKEN, ""):
            raise UserError(f"{where}: one {IMAGE_TOKEN} stands in another")
        if re.search("[\0\ud800-\udfff]", f"{turn['from']}{turn['value']}{image}"):
            raise UserError(f"{where}: a NUL or half a UTF-16 pair stands in a text or in the path")
    if image is None and (sign := sign_of_picture(sample)):
        raise UserError(
            f'{where}: has no "image", but {sign}; give its picture, a single one, as "image", a '
            "path below --image_folder, or remove the sample"
        )
    is_path = isinstance(image, str) and image[0] != "/" and ".." not in image.split("/")
    if not is_path and (captions or image is not None):
        raise UserError(f'{where}: needs "image", one path below --image_folder, not {image!r}')

    speakers = [turn["from"] for turn in turns]
    letters = {"system": "s", "human": "h", "gpt": "g"}
    pattern = "hg" if captions else "s?g?(hg)+h?"
    if not re.fullmatch(pattern, "".join(letters.get(speaker, "?") for speaker in speakers)):
        raise UserError(
            f"{where}: the turns are from {speakers}; they must be a caption's "
            "(human gpt) in stage 1, and alternate between human and gpt, after a system turn if "
            "any, in stage 2"
        )
    with_image = [turn["from"] for turn in turns if IMAGE_TOKEN in turn["value"]]
    if with_image and with_image != ["human"] and image is not None:
        raise UserError(
            f"{where}: {IMAGE_TOKEN} may stand in one human turn of a sample with an image; here "
            f"it is in turns of {with_image}"
        )


def sign_of_picture(sample):
    """What shows that a sample without "image" has a picture or a video all the same, or None."""
    for key, value in sample.items():
        if not value or str(value).lower() in ("none", "nan") or key in ("id", "conversations"):
            continue
        first = value[0] if isinstance(value, list) else value
        is_file = isinstance(first, str) and re.fullmatch(PICTURE_FILE, first, re.IGNORECASE)
        if is_file or re.search(PICTURE_KEY, key, re.IGNORECASE):
            return f"it has {key!r}: {str(value)[:80]!r}"
    for turn in sample["conversations"]:
        if turn["from"] == "human" and (found := re.search(PICTURE_TEXT, turn["value"])):
            return f"a question has {found[0].strip()[:80]!r}"
    return None


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
    kept = () if image_of(sample) is None else (IMAGE_TOKEN,)
    for message in messages:
        message["content"] = as_text(message["content"], tokenizer, kept)
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
            f"sample {sample.get('id')}: {marked} of its {answers} answers begin with a token; "
            "remove the first character of the others, which the tokenizer leaves out"
        )
    # Some templates leave BOS to the tokenizer, as Vicuna's.
    bos = bos_of(tokenizer)
    if encoded["input_ids"][:1] == bos:
        bos = []
    return bos + encoded["input_ids"], [0] * len(bos) + is_trained


def bos_of(tokenizer):
    """[BOS] if the tokenizer begins texts with it, else []."""
    return [i for i in tokenizer("")["input_ids"] if i == tokenizer.bos_token_id]


def as_text(text, tokenizer, kept=()):
    """Break the control tokens in a text, but those in `kept`, by a zero-width space.

    They may come only from the template, never from a sample's text: not from "</s>" in a caption,
    nor from "<image>" in the code of a sample without an image, which LLaVA reads as text too.
    """
    for token in control_tokens(tokenizer).values():
        if token not in kept:
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
    stripped. Unlike in LLaVA, the chat is encoded as a whole, as the exported processor does it:
    LLaVA encodes the text after the image apart, which with SentencePiece adds an untrained piece.
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


# ----------------------------------------------------------------------------- chat formats

_LLAVA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
# LLaVA's format, for LLMs whose tokenizer has no chat template.
_VICUNA = r"""
{%- if messages[0].role != "system" -%}{{ "LLAVA_SYSTEM USER: " }}{%- endif -%}
{%- for message in messages -%}
{%- if message.role == "system" -%}{{ message.content ~ " USER: " }}
{%- elif message.role == "user" -%}{{ message.content ~ " ASSISTANT:" }}
{%- else -%}{{ " " ~ message.content ~ eos_token ~ "USER: " }}
{%- endif -%}
{%- endfor -%}""".replace("LLAVA_SYSTEM", _LLAVA_SYSTEM)
# The template that is trained with and exported, after the strings of chat_format. A chat is
#     begin Q1 to_answer [space A1 end] to_question Q2 to_answer [space A2 end]
# of which the parts in brackets are trained. With a system turn S, begin is
#     begin_system S after_system
# Contents are a string, or a list of {"type": "image"} and {"type": "text", "text": ...}.
_TEMPLATE = r"""
{%- macro text(message) -%}
{%- if message.content is string -%}{{ message.content | trim }}
{%- else -%}
{%- set parts = namespace(all="") -%}
{%- for part in message.content -%}
{%- set parts.all = parts.all ~ ("<image>\n" if part.type == "image" else part.text) -%}
{%- endfor -%}
{{ parts.all | trim }}
{%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
{%- if message.role == "system" -%}{{ begin_system ~ text(message) ~ after_system }}
{%- elif message.role == "user" -%}
{{ (begin if loop.first else "") ~ text(message) }}
{%- if add_generation_prompt or not loop.last -%}{{ to_answer }}{%- endif -%}
{%- else -%}
{%- generation -%}{{ space ~ text(message) ~ end }}{%- endgeneration -%}
{%- if not loop.last -%}{{ to_question }}{%- endif -%}
{%- endif -%}
{%- endfor -%}"""
_USE_VICUNA = (
    "remove chat_template from its tokenizer_config.json (or its chat_template.jinja) to train "
    "with Vicuna's format"
)


def prepare_tokenizer(tokenizer):
    """Make a tokenizer fit for training -> the id of <image>.

    It gets <image> as one token, a pad token, and a chat template that marks answers, in the format
    of its own or, if it has none, in Vicuna's. The token that ends answers becomes EOS. Raises
    UserError if the format cannot be read, or if it would be trained otherwise than it is asked.
    """
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)])
    if isinstance(tokenizer.chat_template, dict):  # several, by name
        tokenizer.chat_template = tokenizer.chat_template.get("default")
    strings, eos = chat_format(tokenizer)
    written = "".join(strings.values())
    markers = [token for token in added_tokens(tokenizer) if token.content in written]
    tokenizer.add_tokens(markers, special_tokens=True)  # so that no text of a sample makes a turn
    tokenizer.eos_token = eos
    lines = [
        f"{{%- set {name} = {json.dumps(text, ensure_ascii=False)} -%}}\n"
        for name, text in strings.items()
    ]
    tokenizer.chat_template = "".join(lines) + _TEMPLATE
    if tokenizer.pad_token is None:  # any token will do: masks are made from lengths
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    check_chat_format(tokenizer)
    return tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)


def chat_format(tokenizer):
    """The format of the tokenizer's chat template -> the strings of _TEMPLATE by name, and EOS.

    They are what it writes around the turns of a chat of three rounds.
    PAPER: where LLaVA has a system text of its own for Llama 3 and Phi-3, a chat without a system
    turn begins as the LLM's template begins it. Only what is written in each round is kept: Qwen3's
    empty thoughts before the last answer and the newline after it are not.
    """
    rounds = ["user", "assistant"] * 3
    begin, to_answer, rest, *later = around_turns(tokenizer, rounds)
    if later[:2] != [to_answer, rest] or not later[2].startswith(to_answer):
        raise UserError(
            f"{tokenizer.name_or_path}: its chat template writes {to_answer!r} and {rest!r} around "
            f"the first answer, {later[:3]} around later ones; {_USE_VICUNA}"
        )

    tokens = sorted((token.content for token in added_tokens(tokenizer)), key=len, reverse=True)
    ended = re.fullmatch(f"(.*?({'|'.join(map(re.escape, tokens))}))(.*)", rest, re.DOTALL)
    # PAPER: as in LLaVA, EOS ends the answers of a format that is plain text, though the published
    # template of LLaVA-1.5 leaves it out. Gemma's end without LLaVA's trained newline.
    if ended:
        end, eos, to_question = ended.groups()
    else:
        end = eos = tokenizer.eos_token
        to_question = rest
    if eos is None:
        raise UserError(
            f"{tokenizer.name_or_path}: its tokenizer has no token that ends an answer; name an "
            "eos_token in its tokenizer_config.json"
        )

    # PAPER: a system turn that the template refuses (Gemma), leaves out or moves (Mistral) stands
    # before the first question.
    begin_system = begin
    after_system = "\n\n"
    with contextlib.suppress(UserError):
        before, after, *others = around_turns(tokenizer, ["system", *rounds])
        if others == [to_answer, rest, *later]:
            begin_system = before
            after_system = after

    # A space becomes one token with the first word of the answer. PAPER: where plain text leads up
    # to the answer, as Mistral's first "[/INST]", a space is put between them, for "](" would be
    # one token. So answers have the ids of Mistral's own code, which encodes them apart.
    prompt = to_answer.rstrip(" ")
    space = to_answer[len(prompt) :]
    if not prompt.endswith(("\n", *tokens)):
        space = space or " "
    strings = {
        "begin": begin,
        "begin_system": begin_system,
        "after_system": after_system,
        "to_answer": prompt,
        "space": space,
        "end": end,
        "to_question": to_question,
    }
    return strings, eos


def around_turns(tokenizer, roles):
    """The texts that the chat template writes before, between and after turns of these roles.

    PAPER: where a template writes the day's date, it always writes the same, or ids would change.
    """
    template = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}\n"  # as Llama 3.1's own
    template += tokenizer.chat_template or _VICUNA
    turns = [f"(turn {i})" for i in range(len(roles))]
    reasons = []
    for is_list in (False, True):  # LLaVA-1.5's takes only lists, most take only strings
        contents = [[{"type": "text", "text": turn}] for turn in turns] if is_list else turns
        messages = [{"role": r, "content": content} for r, content in zip(roles, contents)]
        try:
            text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
        except Exception as e:  # of a template, which can fail in any way
            reasons.append(e)
            continue
        if re.findall(r"\(turn \d\)", text) == turns:
            return re.split(r"\(turn \d\)", text)
        reasons.append("it leaves one out or moves it")
    raise UserError(
        f"{tokenizer.name_or_path}: its chat template does not write the turns {', '.join(roles)} "
        f"({reasons[0]}); {_USE_VICUNA}"
    )


def check_chat_format(tokenizer):
    """Raise UserError unless prompts begin their chats, and answers are marked whole.

    Also unless exported processors make the same ids. Tried with answers that begin with each
    ASCII character, for a character may become one token with what stands before it.
    """
    for character in string.digits + string.ascii_letters + string.punctuation:
        turns = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": character}] * 2
        sample = {"conversations": turns, "image": "a.png"}
        ids, is_trained = encode_chat(sample, tokenizer, 1, is_prompt=False)
        sample = sample | {"conversations": turns[:-1]}
        prompt, _ = encode_chat(sample, tokenizer, 1, is_prompt=True)
        n = len(prompt)
        if ids[:n] != prompt or is_trained[n - 1 :] != [0] + [1] * (len(ids) - n):
            raise UserError(
                f"{tokenizer.name_or_path}: the prompt, which ends in "
                f"{tokenizer.decode(prompt[-4:])!r}, and an answer that begins with {character!r} "
                "do not part into tokens of their own; let its chat template write a space between "
                "them"
            )

    messages = chat_messages(sample)
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    has_bos = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    if tokenizer(text, add_special_tokens=not has_bos)["input_ids"] != prompt:
        raise UserError(
            f"{tokenizer.name_or_path}: its tokenizer adds "
            f"{tokenizer.decode(tokenizer('')['input_ids'])!r} to each text, and with it the "
            "processor of the exported model to each prompt; let it add nothing but BOS, in its "
            "tokenizer_config.json or tokenizer.json"
        )


def added_tokens(tokenizer):
    """The tokens that a tokenizer finds before it splits a text, except for runs of spaces."""
    return [token for token in tokenizer.added_tokens_decoder.values() if token.content.strip()]


# ----------------------------------------------------------------------------- words


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
    if processor.resample != Image.Resampling.BICUBIC:
        raise UserError(f"{name}: resizes images by filter {processor.resample}, not bicubic (3)")
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


def check_first_image(samples, image_folder):
    """UserError if the first image of samples cannot be read: said before a model is loaded."""
    images = (image_of(sample) for sample in samples)
    first = next((image for image in images if image is not None), None)
    if first:
        read_image(Path(image_folder, first))


def read_image(file):
    """-> RGB image; a UserError names a missing or broken file.

    Images are turned upright as their EXIF says, as transformers' and viewers do.
    """
    if not os.path.isfile(file):  # unlike Path's, no error if the name is too long
        raise UserError(f"{file}: cannot read the image (no such file); check --image_folder")
    try:
        content = Path(file).read_bytes()
        image = Image.open(io.BytesIO(content), formats=IMAGE_FORMATS)
        if image.mode[0] in "IF" or max(image.size) > 100 * min(image.size):
            raise ValueError(f"{image.mode}, {image.size}: 8 bits a channel, 100:1 at most")
        image.load()  # first, for EXIF may come after the pixels
        return upright(on_white(image), orientation(image))
    except Exception as e:  # decoders raise nearly everything
        is_unknown = isinstance(e, UnidentifiedImageError)
        reason = f"none of {', '.join(IMAGE_FORMATS)}, or damaged" if is_unknown else e
        raise UserError(
            f"{file}: not a readable image ({reason}); replace the file, or remove its sample "
            "and make labels and runs anew"
        ) from e


def on_white(image):
    """An image as RGB.

    PAPER: what is transparent becomes white, as browsers show it. LLaVA drops the alpha channel: a
    black logo on nothing would be a black image.
    """
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def orientation(image):
    """The orientation that an image's EXIF names. Without one that can be read it is 1, upright."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # as decoders; damaged EXIF must not cost the image
        return 1


def upright(image, orientation):
    """Turn an image from an orientation of EXIF."""
    image.info.clear()  # exif_transpose would write the other tags again, and fail on damaged ones
    image.getexif()[ExifTags.Base.Orientation] = orientation
    return ImageOps.exif_transpose(image)


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
            "is_image": ids == self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
            "targets": targets,
        }
        if item["is_image"].any():
            file = Path(self.image_folder, image_of(sample))
            item["pixels"] = geometry(read_image(file), **self.preprocess)
        if self.label_store is not None:
            item["label_ids"], item["label_scores"] = self.label_store[i]
        return item


def collate(items):
    """Items of LlavaDataset -> a batch: its sequences in one row, without padding between them.

    index (list of B); lengths (list of B): the positions of each sequence; input_ids and
    position_ids [L], where positions restart with each sequence; pixels [images, 3, size, size];
    with labels, label_ids and label_scores [B, m, n]. As indices into input_ids, so that a GPU need
    not look for them: image_places [images * m], where <image> stands, and trained [T], the tokens
    to be predicted, of which none is the first of its sequence.

    The CPU alone reads lengths and labels. They are a list and arrays, for FSDP would move tensors
    to the GPU, where reading waits.
    """
    lengths = [len(item["input_ids"]) for item in items]
    targets = torch.cat([item["targets"] for item in items])
    batch = {
        "index": [item["index"] for item in items],
        "lengths": lengths,
        "input_ids": torch.cat([item["input_ids"] for item in items]),
        "position_ids": torch.cat([torch.arange(n) for n in lengths]),
        "image_places": torch.where(torch.cat([item["is_image"] for item in items]))[0],
        "trained": torch.where(targets != IGNORE)[0],
        "pixels": stack_pixels(items),
    }
    for key in ("label_ids", "label_scores"):
        if key in items[0]:
            batch[key] = np.stack([item[key] for item in items])
    return batch


def stack_pixels(items):
    """The pixels of the items that have some: [images, 3, size, size]."""
    pixels = [item["pixels"] for item in items if "pixels" in item]
    return torch.stack(pixels) if pixels else torch.zeros(0, 3, 0, 0)


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


# ----------------------------------------------------------------------------- processes


def rank():
    """The number of this process among those that torchrun has started."""
    return int(os.environ.get("RANK", 0))


def world_size():
    return int(os.environ.get("WORLD_SIZE", 1))


def rank_device():
    """The GPU of this process, or the CPU."""
    gpu = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    return torch.device(gpu if torch.cuda.is_available() else "cpu")


# ----------------------------------------------------------------------------- command lines


def cli(main):
    """Run a command line. What the user can mend ends it with one line instead of a traceback."""
    try:
        main()
    except (UserError, OSError, CheckpointException) as e:
        failures = getattr(e, "failures", {}).values()  # of each rank, with its traceback
        if any(isinstance(failure, KeyboardInterrupt) for failure, _ in failures):
            sys.exit("stopped")
        # From a data loader's process or a checkpoint's writer, str(e) is a whole traceback: its
        # last message counts.
        message = re.split(r"(?m)^(?:data\.UserError|\w*(?:OS|File|Permission)\w*Error): ", str(e))[
            -1
        ]
        sys.exit(f"error: {' '.join(message.split())[:600]}")
    except KeyboardInterrupt:
        sys.exit("stopped")
    except ModuleNotFoundError as e:
        sys.exit(
            f"error: {e}; pip install matplotlib scikit-learn (pictures), open_clip_torch "
            "(labels.py) or spacy (--tagger)"
        )


LEAST = {"workers": 0, "seed": 0, "sign": -1, "min_score": -1}  # of other numbers: above 0

# What parameters mean to several functions; docstrings with a line of their own override them.
HELP = {
    "model": "the --out_dir of a run, a checkpoint in it, or a Llava folder or hub name",
    "data": "samples in LLaVA's format; by default those that the run is validated or trained on",
    "image_folder": "where the samples' image paths begin; by default as in the run",
    "samples": "how many samples, the first",
    "words": "a file with a word a line; by default the list of the run's labels",
    "batch_size": "how many images at a time",
    "workers": "image-decoding processes",
    "prompt": "what follows each question",
    "max_new_tokens": "the length of an answer, at most",
    "llm": "where the LLM of a stage 1 is, if it has moved",
    "vision": "where the vision tower of a stage 1 is, if it has moved",
    "repeats": "how often each is timed; medians are printed",
}


def run_command(doc, functions, argv=None):
    """Call functions[subcommand] as argv says. The flags are the parameters of that function.

    functions may be a single function: there is no subcommand then. A list[str] is what stands
    without a flag. What --help says of a parameter is a line "name: ..." of the docstring, with
    indented lines that continue it, or else stands in HELP.
    """
    options = dict(
        formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS
    )
    parser = argparse.ArgumentParser(description=doc, allow_abbrev=False, **options)
    if callable(functions):
        parser.description += f"\n{parse_docstring(functions)[0]}"
        add_flags(parser, functions)
        function = functions
        args = vars(parser.parse_args(argv))
    else:
        commands = parser.add_subparsers(dest="command", required=True)
        for name, function in functions.items():
            text, _ = parse_docstring(function)
            command = commands.add_parser(
                name, help=text.split("\n")[0], description=text, allow_abbrev=False, **options
            )
            add_flags(command, function)
        args = vars(parser.parse_args(argv))
        function = functions[args.pop("command")]
    for name, value in args.items():
        if type(value) not in (int, float):
            continue
        is_in_range = LEAST[name] <= value < 1e9 if name in LEAST else 0 < value < 1e9
        if not is_in_range:
            bound = f"{LEAST[name]} or more" if name in LEAST else "above 0"
            raise UserError(f"--{name} must be {bound} and below 1e9, not {value}")
    return function(**args)


def parse_docstring(function):
    """-> the docstring without its lines about parameters, and {parameter: what they say}."""
    text = inspect.getdoc(function) or ""
    names = "|".join(inspect.signature(function).parameters)
    line = rf"^({names}): (.*(?:\n    .*)*)\n?"
    said = {name: " ".join(words.split()) for name, words in re.findall(line, text, re.MULTILINE)}
    return re.sub(line, "", text, flags=re.MULTILINE).strip(), said


def add_flags(parser, function):
    said = HELP | parse_docstring(function)[1]
    for parameter in inspect.signature(function).parameters.values():
        help = said.get(parameter.name, "")
        if parameter.default is parameter.empty:
            help += " (required)"
        elif parameter.default != "":
            help += f" (default: {parameter.default})"
        add_flag(parser, parameter, help)


def add_flag(parser, parameter, help):
    """Add a flag for a parameter of inspect.signature: its name, its annotated type, a help text.

    A flag that is not given stays out of the parser's result, so that Python's defaults hold.
    """
    help = help.replace("%", "%%")
    if typing.get_origin(parameter.annotation) is list:
        parser.add_argument(parameter.name, nargs="+", help=help)
        return
    choices = typing.get_args(parameter.annotation) or None  # of a Literal
    kind = type(choices[0]) if choices else parameter.annotation
    options = {"type": kind, "choices": choices}
    if kind is bool:
        options = {"action": argparse.BooleanOptionalAction}
    is_required = parameter.default is parameter.empty
    parser.add_argument(f"--{parameter.name}", required=is_required, help=help, **options)
