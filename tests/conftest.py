"""A tiny world with random weights, built once per test session: all files that a run reads."""

import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here may reach for the network
os.environ["OMP_NUM_THREADS"] = "1"  # fastest for what is this small; child processes inherit it
sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
)
from transformers.convert_slow_tokenizer import TikTokenConverter

import data

SIZE, PATCH = 30, 6
WORDS = ["red", "blue", "green", "dark", "striped", "wall", "sky", "door", "tall", "ocean"]
MEAN, STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]


def tiny_tokenizer(text):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def whole_input(model, input_ids, pixels, **_):
    """X_input (Eq. 3) as model.forward gives it to the LLM: [B, L, D]."""
    ids = input_ids.flatten()
    rows, length = input_ids.shape
    positions = torch.arange(length).repeat(rows)
    places = torch.where(ids == model.llava.config.image_token_id)[0]
    out = model(ids, positions, [length] * rows, places, torch.arange(0), pixels)
    return out["inputs"].view(rows, length, -1)


def pytest_collection_modifyitems(items):
    """The longest tests first: beside the others they cost no time of their own."""
    items.sort(key=lambda item: "real" not in item.keywords)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Folder with vision/ llm/ clip/ images/ train.json chats.jsonl words.txt.

    Images are 5 x 5 patches, so that 2 x 2 windows do not fit.
    """
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("world")
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=SIZE,
        patch_size=PATCH,
    )
    CLIPVisionModel(vision).save_pretrained(root / "vision")
    CLIPImageProcessor(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=MEAN,
        image_std=STD,
    ).save_pretrained(root / "vision")

    rng = np.random.default_rng(0)
    samples = []
    (root / "images").mkdir()
    for i in range(24):
        color, thing = WORDS[rng.integers(4)], WORDS[4 + rng.integers(5)]
        caption = f"a {color} {thing} beside the {WORDS[rng.integers(10)]} door."
        shape = (rng.integers(31, 60), rng.integers(31, 60), 3)
        pixels = rng.integers(0, 256, shape, dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"images/{i}.png")
        turns = [
            {"from": "human", "value": "<image>\nDescribe the image."},
            {"from": "gpt", "value": caption},
        ]
        samples.append({"id": str(i), "image": f"{i}.png", "conversations": turns})
    (root / "train.json").write_text(json.dumps(samples))
    (root / "words.txt").write_text("\n".join(WORDS) + "\n")
    chats = []  # for stage 2: 10 with an image, 7 without, of one to three rounds
    for i in range(17):
        turns = [
            {"from": who, "value": f"{word} {WORDS[rng.integers(10)]}" * int(rng.integers(1, 5))}
            for _ in range(rng.integers(1, 4))
            for who, word in (("human", "which"), ("gpt", "the"))
        ]
        chats.append({"id": str(i), "image": f"{i}.png" if i < 10 else "", "conversations": turns})
    (root / "chats.jsonl").write_text("".join(json.dumps(s) + "\n" for s in chats))

    tokenizer = tiny_tokenizer(s["conversations"][1]["value"] for s in samples)
    tokenizer.save_pretrained(root / "llm")
    llm = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    LlamaForCausalLM(llm).save_pretrained(root / "llm")

    config = {
        "embed_dim": 16,
        "vision_cfg": {
            "image_size": SIZE,
            "patch_size": PATCH,
            "width": 32,
            "layers": 3,
            "head_width": 16,
            "mlp_ratio": 1.5,
        },
        "text_cfg": {
            "context_length": 77,
            "vocab_size": 49408,
            "width": 16,
            "heads": 2,
            "layers": 1,
        },
    }
    clip = open_clip.CLIP(**config)
    (root / "clip").mkdir()
    save_file(clip.state_dict(), root / "clip/open_clip_model.safetensors")
    preprocess = {
        "size": SIZE,
        "mean": MEAN,
        "std": STD,
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    (root / "clip/open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": preprocess})
    )
    return root


@pytest.fixture(scope="session")
def labels(world):
    """The label store of the tiny world."""
    from labels import extract

    extract(
        str(world / "train.json"),
        str(world / "images"),
        str(world / "words.txt"),
        str(world / "labels"),
        encoder=str(world / "clip"),
        path="last",
        sign=1,
        n=3,
    )
    return world / "labels"


@pytest.fixture(scope="session")
def flags(world, labels):
    """The flags of a short training run in the tiny world, without --out_dir."""
    parts = f"--llm {world}/llm --vision {world}/vision"
    samples = f"--data {world}/train.json --image_folder {world}/images --labels {labels}"
    val = f"--val_data {world}/train.json --val_samples 4 --val_every 3"
    short = "--batch_size 4 --max_steps 6 --save_every 0 --workers 0"
    return f"{parts} {samples} {val} {short}".split()


@pytest.fixture(scope="session")
def finetune_flags(world, flags, tmp_path_factory):
    """The flags of a short stage 2 in the tiny world, after a stage 1, without --out_dir.

    In its fourth step one micro-batch holds images and the other text only.
    """
    import train

    one = tmp_path_factory.mktemp("one") / "run"
    train.main([*flags, "--out_dir", str(one)])
    samples = f"--data {world}/chats.jsonl --image_folder {world}/images"
    val = f"--val_data {world}/chats.jsonl --val_samples 5 --val_every 3"
    short = "--batch_size 2 --max_steps 6 --save_every 0 --keep 0 --workers 0"
    rates = "--lr 1e-3 --tune_vision --vision_lr 1e-3"
    return f"--stage finetune --init {one} {samples} {val} {short} {rates}".split()


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A toy that was trained for a moment: all its files, nothing learnt."""
    from tools import toy

    folder = tmp_path_factory.mktemp("small") / "toy"
    toy.build(folder, images=40, clip_steps=2, lm_steps=2)
    return folder


@pytest.fixture
def samples(world):
    return data.load_samples(world / "train.json")


def sentencepiece_tokenizer(folder, bos):
    """Mistral's first tokenizer: SentencePiece, 32,000 pieces, byte fallback.

    Vicuna's and Phi-3's are of this kind.
    """
    import mistral_common

    folder.mkdir(exist_ok=True)
    source = Path(mistral_common.__file__).parent / "data/tokenizer.model.v1"
    (folder / "tokenizer.model").write_bytes(source.read_bytes())
    return LlamaTokenizer.from_pretrained(folder, add_bos_token=bos)


def llama3_tokenizer():
    import llama_models

    source = Path(llama_models.__file__).parent / "llama3/tokenizer.model"
    reserved = [f"<|reserved_special_token_{i}|>" for i in range(251)]
    special = ["<|begin_of_text|>", "<|end_of_text|>", *reserved[:4]]
    special += ["<|start_header_id|>", "<|end_header_id|>", reserved[4], "<|eot_id|>"]
    special += reserved[5:]
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tokenizer = TikTokenConverter(
        vocab_file=str(source), pattern=pattern, extra_special_tokens=special
    ).converted()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 128000)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>"
    )


# Chat templates in the shape of the published ones: what they write is theirs, how is not.
HEADS = "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + "
HEADS += "'<|end_header_id|>\n\n' + m.content + '<|eot_id|>' }}{% endfor %}"
CHATML = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
CHATML += "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
# of Zephyr and OLMo 2, where these are no tokens
BARS = "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}"
TEMPLATES = {
    "llama-3": HEADS,
    # without a system turn too, there is a system head with the day's date
    "llama-3.1": r"""
{%- if messages[0].role == "system" -%}
{%- set system = messages[0].content -%}{%- set messages = messages[1:] -%}
{%- else -%}{%- set system = "" -%}
{%- endif -%}
{{- bos_token + "<|start_header_id|>system<|end_header_id|>\n\nToday Date: " -}}
{{- (strftime_now("%d %b %Y") if strftime_now is defined else "26 Jul 2024") + "\n\n" -}}
{{- system + "<|eot_id|>" -}}"""
    + HEADS.replace("{{ bos_token }}", ""),
    "hermes": "{{ bos_token }}" + CHATML,
    "phi-3": (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
    ),
    "phi-4": CHATML.replace("\n", "<|im_sep|>", 1).replace("<|im_end|>\n", "<|im_end|>"),
    "gemma": r"""
{{- bos_token -}}
{%- if messages[0].role == "system" -%}{{ raise_exception("no system turns") }}{%- endif -%}
{%- for m in messages -%}
{{ "<start_of_turn>" + ("model" if m.role == "assistant" else m.role) + "\n" -}}
{{ m.content | trim + "<end_of_turn>\n" }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ "<start_of_turn>model\n" }}{%- endif -%}""",
    "zephyr-gemma": "{{ bos_token }}" + CHATML,
    "chatml": (
        "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe Qwen.<|im_end|>\n' }}"
        "{% endif %}" + CHATML
    ),
    # thoughts, empty if need be, stand before the last answer only
    "qwen3": CHATML.replace(
        "m.content",
        "('<think>\n\n</think>\n\n' if m.role == 'assistant' and loop.last else '') + m.content",
    ),
    "mistral-v1": r"""
{{- bos_token -}}
{%- for m in messages -%}
{%- if m.role == "system" -%}{{ raise_exception("only user and assistant turns") }}{%- endif -%}
{{ "[INST] " + m.content + " [/INST]" if m.role == "user" else " " + m.content + eos_token }}
{%- endfor -%}""",
    # a system turn stands in the last question
    "mistral-v3": r"""
{{- bos_token -}}
{%- set start = "" -%}
{%- if messages[0].role == "system" -%}
{%- set start = messages[0].content + "\n\n" -%}{%- set messages = messages[1:] -%}
{%- endif -%}
{%- set last = messages | selectattr("role", "equalto", "user") | list | last -%}
{%- for m in messages -%}
{%- if m.role == "assistant" -%}{{ " " + m.content + eos_token }}
{%- else -%}{{ "[INST] " + (start if m == last else "") + m.content + "[/INST]" }}
{%- endif -%}
{%- endfor -%}""",
    "zephyr": BARS + "{{ eos_token + '\n' }}{% endfor %}",
    "olmo-2": (
        "{{ bos_token }}" + BARS + "{{ eos_token if m.role == 'assistant' else '' }}"
        "{{ '' if loop.last else '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\n<|assistant|>\n' }}{% endif %}"
    ),
    # a prompt asks for thoughts that no chat holds
    "deepseek": r"""
{{- bos_token -}}
{%- for m in messages -%}
{%- if m.role == "system" -%}{{ m.content }}
{%- elif m.role == "user" -%}{{ "<｜User｜>" + m.content }}
{%- else -%}{{ "<｜Assistant｜>" + m.content + eos_token }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ "<｜Assistant｜><think>\n" }}{%- endif -%}""",
    # the next question ends an answer
    "glm": (
        "[gMASK]<sop>{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    ),
    "cohere": r"""
{{- bos_token -}}
{%- set names = {"system": "SYSTEM", "user": "USER", "assistant": "CHATBOT"} -%}
{%- for m in messages -%}
{{ "<|START_OF_TURN_TOKEN|><|" + names[m.role] + "_TOKEN|>" + m.content -}}
{{ "<|END_OF_TURN_TOKEN|>" }}
{%- endfor -%}""",
    # takes lists only; no token ends an answer
    "llava-1.5": r"""
{%- for m in messages -%}
{{ "" if m.role == "system" else m.role | upper + ": " }}
{%- for part in m.content -%}{{ "<image>\n" if part.type == "image" }}{%- endfor -%}
{%- for part in m.content | selectattr("type", "equalto", "text") -%}
{%- if m.role == "assistant" -%}{% generation %}{{ part.text + " " }}{% endgeneration %}
{%- else -%}{{ part.text + " " }}
{%- endif -%}
{%- endfor -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ "ASSISTANT:" }}{%- endif -%}""",
}
# Turn markers that are tokens, by format. The formats of these names and "olmo-2" have small BPEs.
MARKERS = {
    "llama-3.1": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "hermes": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    + ["<|im_start|>", "<|im_end|>"],
    "gemma": ["<start_of_turn>", "<end_of_turn>"],
    "zephyr-gemma": ["<start_of_turn>", "<end_of_turn>", "<|im_start|>", "<|im_end|>"],
    "chatml": ["<|im_start|>", "<|im_end|>"],
    "qwen3": ["<|im_start|>", "<|im_end|>"],
    "phi-4": ["<|im_start|>", "<|im_sep|>", "<|im_end|>"],
    "deepseek": ["<｜User｜>", "<｜Assistant｜>"],
    "glm": ["[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>"],
    "cohere": ["<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>"]
    + ["<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"],
}


@pytest.fixture(scope="session")
def tokenizer_folders(tmp_path_factory):
    """{chat format: folder of a tokenizer with a chat template, but for Vicuna's}.

    Real ones for the LLMs that have Llama's, Llama 3's or Mistral's, small byte-level BPEs with the
    families' turn markers for the others (Gemma's real tokenizer is in test_real.py).
    """
    root = tmp_path_factory.mktemp("tokenizers")
    found = {}
    for name in ("vicuna", "llava-1.5", "mistral-v1", "mistral-v3", "zephyr"):
        found[name] = sentencepiece_tokenizer(root / "sp", bos=True)
    found["mistral-v3"].add_tokens(["[INST]", "[/INST]"], special_tokens=True)
    found["phi-3"] = sentencepiece_tokenizer(root / "sp", bos=False)
    found["phi-3"].add_special_tokens({"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"})
    markers = ("<|assistant|>", "<|system|>", "<|end|>", "<|user|>")
    found["phi-3"].add_tokens(
        [AddedToken(t, special=True, rstrip=True, normalized=False) for t in markers]
    )

    found["llama-3"] = llama3_tokenizer()
    for name, markers in MARKERS.items():
        found[name] = tiny_tokenizer(["what is on the table? a red cup."])
        is_special = name != "deepseek"
        found[name].add_tokens(
            [AddedToken(t, special=is_special, normalized=False) for t in markers]
        )
    found["olmo-2"] = tiny_tokenizer(["what is on the table? a red cup."])
    found["olmo-2"].add_special_tokens({"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"})
    found["olmo-2"]._tokenizer.post_processor = processors.ByteLevel()
    for name, tokenizer in found.items():
        tokenizer.chat_template = TEMPLATES.get(name)
        tokenizer.save_pretrained(root / name)
    return {name: root / name for name in found}
