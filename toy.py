"""The zero-download world: pictures, captions, questions, the truth of every patch, a tiny CLIP and a tiny LM.

    python toy.py build      # minutes on two CPU cores; train.py --preset toy calls it when ./toy is missing
    python toy.py report     # baseline against SEA over three seeds: the tables and figures of the README

Everything is ordinary files, so that the toy goes through exactly the code that the full scale goes through: images,
LLaVA JSON (train, val: captions; _qa: questions; _text: questions about an image in words), pope/, words.txt,
truth.json (the true words of a patch), clip (an open_clip folder), vision (the same ViT for transformers), llm (a Llama
with its tokenizer), labels. CLIP sees whole images and text, never the truth of a patch; the LM sees text only.
"""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from math import cos, pi, sin
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from tqdm import tqdm

from data import UserError, cli, run_command

# ---------------------------------------------------------------- the world
SIDE, PATCH = 64, 8  # pixels
GRID = SIDE // PATCH  # patches along a side


def ring(*radii: float) -> list:
    """A polygon in the unit square whose corners are this far from the middle, at equal angles."""
    return [
        (0.5 + r * sin(2 * pi * k / len(radii)), 0.5 - r * cos(2 * pi * k / len(radii)))
        for k, r in enumerate(radii)
    ]


COLORS = {
    "red": (215, 30, 35),
    "yellow": (250, 225, 30),
    "green": (20, 190, 60),
    "blue": (30, 60, 220),
    "purple": (130, 40, 170),
    "black": (25, 25, 28),
}
# where the second color goes: patterns repeat within 8 pixels, so a patch shows them (a shape it does not: no truth)
PATTERNS = {
    "plain": lambda x, y: 0 * x > 0,
    "striped": lambda x, y: y % 4 < 2,
    "dotted": lambda x, y: (x % 4 < 2) & (y % 4 < 2),
    "checked": lambda x, y: (x // 4 + y // 4) % 2 == 0,
}
SHAPES = {
    "circle": ring(*[0.5] * 40),
    "star": ring(*[0.5, 0.24] * 5),
    "square": [(0, 0), (1, 0), (1, 1), (0, 1)],
    "triangle": [(0.5, 0), (1, 1), (0, 1)],
}
BACKGROUNDS = {
    "grass": (60, 115, 45),
    "water": (40, 120, 150),
    "brick": (150, 75, 60),
    "snow": (232, 238, 246),
    "wood": (125, 82, 45),
}
OTHERS = (
    "dog",
    "cat",
    "tree",
    "house",
    "car",
    "road",
    "cloud",
    "river",
    "bird",
    "metal",
    "glass",
    "paper",
    "chair",
)
WORDS = (
    *COLORS,
    *PATTERNS,
    *SHAPES,
    *BACKGROUNDS,
    *OTHERS,
)  # no picture shows the last: labels must avoid them

Thing = namedtuple(
    "Thing", "color pattern shape x y size"
)  # x, y and size of its bounding square in pixels
Scene = namedtuple(
    "Scene", "things background"
)  # no two share a color, pattern or shape: "the circle" is one


def make_scene(rng: random.Random) -> Scene:
    """One to three objects whose bounding squares do not touch."""
    count, things = rng.randint(1, 3), []
    for names in zip(*(rng.sample(list(field), count) for field in (COLORS, PATTERNS, SHAPES))):
        for _ in range(30):  # a crowded scene keeps fewer objects
            size = rng.randint(*{1: (28, 52), 2: (24, 36), 3: (20, 30)}[count])
            x, y = rng.randint(0, SIDE - size), rng.randint(0, SIDE - size)
            if all(
                x + size < t.x or t.x + t.size < x or y + size < t.y or t.y + t.size < y
                for t in things
            ):
                things.append(Thing(*names, x, y, size))
                break
    return Scene(sorted(things, key=lambda t: (t.y, t.x)), rng.choice(list(BACKGROUNDS)))


def shape_mask(thing: Thing) -> np.ndarray:
    """[64, 64] bool, the pixels of an object."""
    image, span = Image.new("L", (SIDE, SIDE)), thing.size - 1
    ImageDraw.Draw(image).polygon(
        [(thing.x + u * span, thing.y + v * span) for u, v in SHAPES[thing.shape]], 255
    )
    return np.asarray(image) > 0


def draw(scene: Scene, rng: random.Random) -> np.ndarray:
    """[64, 64, 3] uint8."""
    dice = np.random.default_rng(rng.getrandbits(32))
    (y, x), noise = np.mgrid[:SIDE, :SIDE], dice.normal(size=(SIDE, SIDE))
    texture = {
        "grass": 24 * np.repeat(noise[::4], 4, axis=0),
        "snow": 10 * noise,
        "water": 28 * np.sin(1.2 * y + 2 * np.sin(0.3 * x + 6 * rng.random())),
        "wood": 22 * noise[:1] + 4 * noise,
        "brick": 90 * ((y % 4 == 3) | ((x + 4 * (y // 4 % 2)) % 8 == 7)),
    }[scene.background]
    pixels = np.add(BACKGROUNDS[scene.background], texture[..., None], dtype=float)
    for thing in scene.things:
        mask = shape_mask(thing)
        pixels[mask] = COLORS[thing.color]
        pixels[mask & PATTERNS[thing.pattern](x - thing.x, y - thing.y)] = (245, 245, 240)
    return (
        (pixels * rng.uniform(0.9, 1.1) + dice.normal(0, 5, pixels.shape))
        .clip(0, 255)
        .astype(np.uint8)
    )


def patch_truth(scene: Scene) -> dict:
    """{"object": {patch: words}, "background": {patch: words}}, patch = 8 row + col.

    Half covered by an object: its color or pattern is true; 90 % background: its word; the mixed rest is not judged.
    """
    truth = {"object": {}, "background": {}}
    covered = [
        shape_mask(t).reshape(GRID, PATCH, GRID, PATCH).mean((1, 3)).ravel() for t in scene.things
    ]
    for patch, objects in enumerate(zip(*covered)):
        if max(objects) >= 0.5:
            truth["object"][patch] = scene.things[int(np.argmax(objects))][:2]
        elif sum(objects) <= 0.1:
            truth["background"][patch] = [scene.background]
    return truth


# ---------------------------------------------------------------- text
def caption(scene: Scene, rng: random.Random) -> str:
    listed = " and ".join(f"a {t.color} {t.pattern} {t.shape}" for t in scene.things)
    return rng.choice(["", "", "a picture of ", "there is "]) + f"{listed} on {scene.background}."


def questions(scene: Scene, rng: random.Random) -> list[tuple[str, str]]:
    """Every kind of question once, shuffled: [(question, answer)]; yes and no are equally likely."""
    thing, ground = rng.choice(scene.things), scene.background
    pairs = [
        (f"What color is the {thing.shape}?", thing.color),
        (f"What pattern is the {thing.shape}?", thing.pattern),
        (f"What shape is the {thing.color} object?", thing.shape),
        ("What is in the background?", ground),
        ("How many objects are there?", ("one", "two", "three")[len(scene.things) - 1]),
    ]
    colors, patterns, shapes, *_ = zip(*scene.things)
    for text, names, true in (
        ("Is there a {} object?", COLORS, colors),
        ("Is there a {} object?", PATTERNS, patterns),
        ("Is there a {}?", SHAPES, shapes),
        ("Is the background {}?", BACKGROUNDS, [ground]),
        (f"Is the {thing.shape} {{}}?", COLORS, [thing.color]),
    ):
        answer = rng.choice(("yes", "no"))
        pairs.append(
            (
                text.format(rng.choice([n for n in names if (n in true) == (answer == "yes")])),
                answer,
            )
        )
    return rng.sample(pairs, len(pairs))


def write_world(folder: Path, n_train: int, n_val: int, seed: int) -> None:
    """Draw the images and write everything that is not a model."""
    truth, pope = {}, {"color": [], "pattern": [], "shape": []}
    for split, count in (("train", n_train), ("val", n_val)):
        rng, samples = (
            random.Random(f"{seed} {split}"),
            {split: [], f"{split}_qa": [], f"{split}_text": []},
        )
        (folder / "images" / split).mkdir(parents=True)
        for i in tqdm(range(count), desc=f"draw {split}"):
            scene, image = make_scene(rng), f"{split}/{i:06d}.png"
            Image.fromarray(draw(scene, rng)).save(folder / "images" / image, compress_level=1)
            truth[image] = patch_truth(scene)
            pairs = [("Describe the image.", caption(scene, rng)), *questions(scene, rng)[:4]]
            for k, (question, answer) in enumerate(pairs):
                turns = [
                    {"from": "human", "value": f"<image>\n{question}"},
                    {"from": "gpt", "value": answer},
                ]
                samples[f"{split}_qa" if k else split].append(
                    {"id": f"{split}-{i}-{k}", "image": image, "conversations": turns}
                )
            turns = [turns[0] | {"value": in_words(scene, rng) + question}, turns[1]]
            samples[f"{split}_text"].append({"id": f"{split}-{i}-text", "conversations": turns})
            for field, names in zip(
                pope, (COLORS, PATTERNS, SHAPES)
            ):  # POPE: as often something there as not
                there = [getattr(t, field) for t in scene.things]
                for label, words in (("yes", there), ("no", [w for w in names if w not in there])):
                    text = f"Is there a {rng.choice(words)}{'' if field == 'shape' else ' object'}?"
                    pope[field] += [{"image": image, "text": text, "label": label}] * (
                        split == "val"
                    )
        for name, rows in samples.items():
            (folder / f"{name}.json").write_text(json.dumps(rows, indent=1))
    (folder / "pope").mkdir()
    for field, lines in pope.items():
        (folder / f"pope/toy_pope_{field}.json").write_text(
            "".join(json.dumps(line) + "\n" for line in lines)
        )
    (folder / "truth.json").write_text(json.dumps(truth))
    (folder / "words.txt").write_text("\n".join(WORDS) + "\n")


def optimize(
    model: torch.nn.Module, loss_of, lr: float, steps: int, name: str, position: int
) -> None:
    """Minimise loss_of() with AdamW (fused: most of CLIP's 49408 token rows idle), warm-up and cosine."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    for step in (bar := tqdm(range(steps), desc=f"train {name}", position=position, mininterval=1)):
        optimizer.param_groups[0]["lr"] = (
            lr * min(1, (step + 1) / 40) * (1.02 + cos(pi * step / steps)) / 2.02
        )
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


# ---------------------------------------------------------------- CLIP
VISION = {
    "image_size": SIDE,
    "patch_size": PATCH,
    "width": 96,
    "layers": 3,
    "head_width": 32,
    "pool_type": "avg",
}
CLIP = {
    "embed_dim": 128,
    "vision_cfg": VISION,
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}
MEAN, STD = 0.5, 0.25  # of every channel


def clip_text(text: str, rng: random.Random) -> str:
    """A caption, or a part of it: CLIP has to know single words as well as sentences."""
    *found, ground = [
        w for w in re.findall(r"\w+", text) if w in WORDS
    ]  # color, pattern, shape, color, ...
    start = 3 * rng.randrange(len(found) // 3)
    color, pattern, shape = found[start : start + 3]
    word = rng.choices([color, pattern, shape, ground], [0.3, 0.3, 0.1, 0.3])[0]
    parts = [word, f"a photo of a {word}.", f"a {color} {shape}", f"a {pattern} {shape}", text]
    return rng.choices(parts, [0.15, 0.15, 0.1, 0.1, 0.5])[0]


def train_clip(folder: Path, seed: int, steps: int, batch: int = 64) -> None:
    """Contrastive training on (image, text); writes clip/ and vision/.

    What makes single patches mean something: the image embedding is their average, and three quarters of them are
    dropped in training (which also makes it faster), so that each must speak for what it shows.
    """
    import open_clip
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    rng, data = random.Random(seed), json.loads((folder / "train.json").read_text())
    images = torch.stack(
        [torch.from_numpy(np.array(Image.open(folder / "images" / d["image"]))) for d in data]
    )
    model = open_clip.model.CLIP(**{**CLIP, "vision_cfg": {**VISION, "patch_dropout": 0.75}})
    tokenizer = open_clip.tokenizer.SimpleTokenizer(
        context_length=CLIP["text_cfg"]["context_length"]
    )

    def loss_of() -> torch.Tensor:
        rows = torch.randint(len(data), (batch,))
        pixels = (images[rows].permute(0, 3, 1, 2) / 255 - MEAN) / STD
        pixels = (
            pixels.flip(-1) if rng.random() < 0.5 else pixels
        )  # no text speaks of left and right
        texts = tokenizer([clip_text(data[i]["conversations"][1]["value"], rng) for i in rows])
        image, text, scale = model(pixels, texts)
        logits, same = scale * image @ text.T, (texts[:, None] == texts).all(-1).float()
        same /= same.sum(1)  # a word that many images of a batch share is right for them all
        return (F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same)) / 2

    optimize(model, loss_of, 1.5e-3, steps, "clip", 0)
    (folder / "clip").mkdir()
    pixel_format = {"size": SIDE, "mean": [MEAN] * 3, "std": [STD] * 3, "interpolation": "bicubic"}
    (folder / "clip/open_clip_config.json").write_text(
        json.dumps(
            {"model_cfg": CLIP, "preprocess_cfg": {**pixel_format, "resize_mode": "shortest"}}
        )
    )
    save_file(model.state_dict(), folder / "clip/open_clip_model.safetensors")
    export_vision(model.visual.state_dict(), folder / "vision")


def export_vision(weights: dict, folder: Path) -> None:
    """Write open_clip's ViT as a transformers CLIPVisionModel with equal hidden states."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    width = VISION["width"]
    tower = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=VISION["layers"],
            hidden_act="gelu",
            num_attention_heads=width // VISION["head_width"],
            image_size=SIDE,
            patch_size=PATCH,
        )
    )
    renames = {
        "class_e": "embeddings.class_e",
        "conv1": "embeddings.patch_embedding",
        "ln_pre": "pre_layrnorm",
        "positional_embedding": "embeddings.position_embedding.weight",
        "ln_post": "post_layernorm",
        "transformer.resblocks": "encoder.layers",
        ".ln_": ".layer_norm",
        ".attn.": ".self_attn.",
        "c_fc": "fc1",
        "c_proj": "fc2",
    }
    state = {}
    for key, value in weights.items():
        for old, new in renames.items():
            key = key.replace(old, new)
        if "in_proj" in key:  # open_clip keeps q, k and v in one matrix
            state.update(
                {
                    key.replace("in_proj_", f"{q}_proj."): part
                    for q, part in zip("qkv", value.chunk(3))
                }
            )
        elif key != "proj":  # into CLIP's joint space; the tower ends before it
            state[key] = value
    tower.load_state_dict(state)
    tower.save_pretrained(folder)
    CLIPImageProcessor(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        resample=Image.BICUBIC,
        image_mean=[MEAN] * 3,
        image_std=[STD] * 3,
    ).save_pretrained(folder)


# ---------------------------------------------------------------- language model
SPECIAL = ("<pad>", "<s>", "</s>", "<image>")  # tokens 0 to 3
CHAT = """{%- macro text(c) -%}{%- if c is string -%}{{ c }}{%- else -%}{%- for part in c -%}
{{ '<image>\n' if part.type == 'image' else part.text }}{%- endfor -%}{%- endif -%}{%- endmacro -%}
{%- for message in messages -%}{%- if message.role == 'assistant' -%}
{{ 'ASSISTANT:' }}{% generation %}{{ ' ' + text(message.content) + '</s>' }}{% endgeneration %}
{%- else -%}{{ ('USER: ' if message.role == 'user' else '') + text(message.content) + ' ' }}{%- endif -%}
{%- endfor -%}{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}"""


def make_tokenizer(corpus: list[str]):
    """Byte-level BPE in which every word of the corpus, with the space before it, is one token."""
    from tokenizers import (
        AddedToken,
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
        processors,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast

    tokenizer, level = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel
    tokenizer.pre_tokenizer, tokenizer.decoder = level(add_prefix_space=False), decoders.ByteLevel()
    special = [AddedToken(s, special=True, normalized=False) for s in SPECIAL]
    tokenizer.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=4096,
            special_tokens=special,
            show_progress=False,
            initial_alphabet=level.alphabet(),
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
        chat_template=CHAT,
        model_max_length=256,
    )


def in_words(scene: Scene, rng: random.Random) -> str:
    """What stands for the image when there is none: phrases, or 6 to 40 of the scene's words, in any order.

    Text as the LM would meet it, not a word for each patch: an LM that can read nothing else leaves the adapter no
    choice but to write words, and there would be no misalignment for SEA to mend. It ends with a newline, as images do.
    """
    if rng.random() < 0.5:
        wordings = ("a {0} {1} {2}", "a {2}, {0} and {1}", "a {1} {0} {2}")
        phrases = [rng.choice(wordings).format(*t) for t in scene.things]
        return ", ".join(rng.sample([*phrases, scene.background], len(phrases) + 1)) + ".\n"
    words = [w for t in scene.things for w in t[:3]] + [scene.background] * 3
    words = list(dict.fromkeys(words)) + rng.choices(words, k=rng.randint(0, 30))
    return " ".join(rng.sample(words, len(words))) + "\n"


def document(tokenizer, rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
    """A scene in words, then what is in it and what is not, or its caption, or a chat about it -> ids and loss weights
    [T]."""
    scene, kind = make_scene(rng), rng.random()
    told = in_words(scene, rng)
    if kind < 0.25:  # of questions alone, yes and no take far longer to learn
        listed = ", ".join(
            f"{w} {'yes' if w in told else 'no'}" for w in rng.sample(WORDS[: -len(OTHERS)], 12)
        )
        ids = tokenizer(f"{told}seen: {listed}\n").input_ids
        answers = tokenizer(" yes no", add_special_tokens=False).input_ids
        mask = [i in answers for i in ids]
    elif kind < 0.4:
        ids = tokenizer(told + caption(scene, rng) + "\n").input_ids
        before = len(tokenizer(told.rstrip()).input_ids)
        mask = [k >= before for k in range(len(ids))]
    else:
        (first, answer), *pairs = questions(scene, rng)[:4]
        turns = [
            {"role": role, "content": text}
            for pair in [(told + first, answer), *pairs]
            for role, text in zip(("user", "assistant"), pair)
        ]
        chat = tokenizer.apply_chat_template(
            turns, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = [tokenizer.bos_token_id, *chat["input_ids"]], [0, *chat["assistant_masks"]]
    # scenes and questions cannot be foreseen: with full weight they would drown the answers
    return torch.tensor(ids), torch.tensor(mask).float().clamp(0.02)


def train_lm(folder: Path, seed: int, steps: int, batch: int = 24) -> None:
    """Next-token training on text about scenes; writes llm/."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    rng = random.Random(f"{seed} text")
    corpus = [
        turn["value"]
        for name in ("train", "train_qa")
        for d in json.loads((folder / f"{name}.json").read_text())
        for turn in d["conversations"]
    ]
    tokenizer = make_tokenizer(
        [*corpus, *(f" {w}" for w in (*corpus, *WORDS)), "USER: ASSISTANT: seen:"]
    )
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=3,
            num_attention_heads=4,
            initializer_range=0.025,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    torch.nn.init.normal_(
        model.model.embed_tokens.weight, std=0.1
    )  # far apart, as the words of large LMs
    for attention in (layer.self_attn for layer in model.model.layers):
        # "mimetic": a token attends to its like and passes on what it finds; it saves thousands of steps
        torch.nn.init.normal_(attention.q_proj.weight, std=128**-0.5)
        torch.nn.init.normal_(attention.v_proj.weight, std=128**-0.5)
        attention.k_proj.weight.data.copy_(attention.q_proj.weight)
        attention.o_proj.weight.data.copy_(0.7 * attention.v_proj.weight.T)

    def loss_of() -> torch.Tensor:
        ids, weight = (
            torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # with 0, which is <pad>
            for rows in zip(*(document(tokenizer, rng) for _ in range(batch)))
        )
        losses = F.cross_entropy(model(ids).logits[:, :-1].mT, ids[:, 1:], reduction="none")
        return (losses * weight[:, 1:]).sum() / weight[:, 1:].sum()

    optimize(model, loss_of, 2e-3, steps, "lm", 1)
    model.save_pretrained(folder / "llm")
    tokenizer.save_pretrained(folder / "llm")


# ---------------------------------------------------------------- build
def build(
    folder: Path = Path("toy"),
    seed: int = 0,
    images: int = 3000,
    clip_steps: int = 800,
    lm_steps: int = 800,
):
    """Make the world and train its models: the folder appears only when it is complete."""
    if folder.exists():
        raise UserError(f"{folder} exists: remove it to build the toy again")
    work = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(work, ignore_errors=True)  # what an interrupted build left
    write_world(work, images, 250, seed)
    # both at once, one thread each: with two threads each they would fight over two cores
    with ProcessPoolExecutor(2, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        jobs = [
            pool.submit(train_clip, work, seed, clip_steps),
            pool.submit(train_lm, work, seed, lm_steps),
        ]
        for job in as_completed(jobs):
            job.result()  # or its error
    work.rename(folder)


def ensure(folder: Path = Path("toy")) -> None:
    """Build what is missing of the toy, its labels included."""
    if not folder.exists():
        print(f"building the toy world in {folder}/, once; some minutes on two cores")
        build(folder)
    label(folder, folder / "labels", n=1)  # of so few words the second best is nearly always wrong


def label(folder: Path, out: Path, **settings) -> None:
    """Make a label store of the toy, if it is not there. Not OpenAI's CLIP: +cos, on the value path."""
    from labels import LabelStore, extract

    try:
        LabelStore(out)
    except UserError:
        extract(
            f"{folder}/train.json",
            f"{folder}/images",
            f"{folder}/words.txt",
            str(out),
            encoder=f"{folder}/clip",
            path="value",
            sign=1,
            workers=0,
            **settings,
        )


# ---------------------------------------------------------------- report
KINDS = (
    "baseline",
    "SEA",
    "SEA_truth",
    "SEA_n10",
    "SEA_mass0.5",
)  # the first three go through stage 2 too


def true_labels(folder: Path, out: Path) -> None:
    """The store of the toy's labels with, in the place of CLIP's, the true words of each judged patch."""
    from labels import LabelStore, record_type

    shutil.copytree(folder / "labels", out, dirs_exist_ok=True)
    store, truth = LabelStore(out), json.loads((folder / "truth.json").read_text())
    samples, meta = (
        json.loads((folder / "train.json").read_text()),
        store.meta | {"n": 2, "path": "truth"},
    )
    for k, path in enumerate(store.shards):
        old = np.load(path)
        new = np.zeros(len(old), record_type(len(WORDS), GRID**2, 2))
        new["ids"], new["crc"] = 65535, old["crc"]
        for row, sample in zip(new, samples[k * meta["shard"] :]):
            for patch, words in {
                **truth[sample["image"]]["object"],
                **truth[sample["image"]]["background"],
            }.items():
                row["ids"][int(patch), : len(words)] = [WORDS.index(w) for w in words]
                row["scores"][int(patch), : len(words)] = 1
        np.save(path, new)
    (out / "meta.json").write_text(json.dumps(meta))


def run_all(*commands) -> None:
    """Run Python commands one after the other, silently, with one thread."""
    for argv in commands:
        job = subprocess.run(
            [sys.executable, *map(str, argv)],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        if job.returncode:
            raise UserError(
                f"{' '.join(map(str, argv))}: exit status {job.returncode}\n{job.stderr.strip()[-500:]}"
            )


def report(seeds: int = 3, out: Path = Path("out/report")):
    """The README's tables and figures: baseline, SEA, SEA with true labels, both stages, from the same seeds; SEA with
    ten labels a patch and with --mass 0.5, stage 1. Two runs at a time. Finished runs in `out` are used again: remove
    it after a change of the toy or the code."""
    import eval as evaluation

    evaluation.need("matplotlib"), evaluation.need("sklearn")
    toy, here = Path("toy"), Path(__file__).parent
    ensure(toy)
    label(toy, out / "labels_n10", n=10)
    label(toy, out / "labels_mass0.5", n=10, mass=0.5)
    true_labels(toy, out / "labels_truth")

    def both_stages(run) -> None:
        kind, seed, folder = *run, out / f"{run[0]}_{run[1]}"
        two, measure, train = (
            Path(f"{folder}_finetune"),
            here / "eval.py",
            [here / "train.py", "--preset", "toy"],
        )
        labels = {"baseline": ["--sea_weight", 0], "SEA": []}.get(
            kind, ["--labels", out / kind.replace("SEA", "labels")]
        )
        pope = [
            "--data",
            toy / "pope",
            "--image_folder",
            toy / "images",
            "--workers",
            0,
            "--prompt",
            "",
        ]
        if not (folder / "done").exists():
            shutil.rmtree(folder, ignore_errors=True)
            run_all(
                [*train, "--seed", seed, "--out_dir", folder, *labels],
                *([measure, name, "--model", folder, "--samples", 250] for name in ("tacs", "gap")),
                [
                    measure,
                    "words",
                    "--model",
                    folder,
                    "--samples",
                    250,
                    "--truth",
                    toy / "truth.json",
                    "--out",
                    folder / "words.png",
                ],
                *(
                    [measure, "pope", "--model", folder / f"checkpoints/step_{n}", *pope]
                    for n in (60, 120, 180)
                ),
            )
            (folder / "done").touch()
        if kind in KINDS[:3] and not (two / "done").exists():
            shutil.rmtree(two, ignore_errors=True)
            text = ["--data", toy / "val_text.json", "--workers", 0, "--prompt", ""]
            run_all(
                [
                    *train,
                    "--stage",
                    "finetune",
                    "--seed",
                    seed,
                    "--init",
                    folder,
                    "--out_dir",
                    two,
                    "--keep",
                    0,
                ],
                [measure, "pope", "--model", two, *pope],
                [measure, "vqa", "--model", two, "--data", toy / "val_qa.json", *pope[2:]],
                *(
                    [measure, "vqa", "--model", two / f"checkpoints/step_{n}", *text]
                    for n in (60, 120, 180)
                ),
            )
            (two / "done").touch()

    with ThreadPoolExecutor(2) as pool:
        runs = [(kind, seed) for seed in range(seeds) for kind in KINDS]
        list(tqdm(pool.map(both_stages, runs), total=len(runs), desc="runs"))
    one, two = (
        {
            kind: [evaluation.history(out / f"{kind}_{seed}{stage}") for seed in range(seeds)]
            for kind in kinds
        }
        for kinds, stage in ((KINDS, ""), (KINDS[:3], "_finetune"))
    )
    evaluation.print_table(
        one,
        {
            "tacs": "TACS (more is better)",
            "D_of_unit_vectors": "D of unit vectors (less is better)",
            "true object": "nearest word true, object patches",
            "true background": "the same, background patches",
            "caption_loss": "caption loss",
            "pope f1": "POPE, F1",
        },
    )
    evaluation.print_table(
        two,
        {
            "pope f1": "POPE, F1",
            "pope accuracy": "POPE, accuracy",
            "val_qa open": "open questions",
            "val_qa yes/no": "yes/no questions",
            "val_text all": "text only",
        },
    )
    figures = out / "figures"
    figures.mkdir(exist_ok=True)
    main_kinds = {kind: one[kind] for kind in KINDS[:3]}
    evaluation.draw_curves(
        main_kinds, {"val_tacs": "TACS", "pope f1": "POPE, F1"}, figures / "pretraining.png"
    )
    evaluation.draw_curves(
        two, {"val_text all": "language: text-only questions"}, figures / "language.png"
    )
    benchmarks = {
        "pope f1": "POPE",
        "val_qa open": "open",
        "val_qa yes/no": "yes/no",
        "val_text all": "text only",
    }
    means = {
        kind: {
            title: float(np.mean(evaluation.last(of, name))) for name, title in benchmarks.items()
        }
        for kind, of in two.items()
    }
    evaluation.draw_radar(means, figures / "radar.png")
    evaluation.draw_tsne(
        {kind: evaluation.token_groups(str(out / f"{kind}_0")) for kind in KINDS[:2]},
        figures / "tsne.png",
    )
    evaluation.eval_words(
        str(out / "SEA_0"), str(out / "baseline_0"), samples=2, out=str(figures / "words.png")
    )


def main(argv=None):
    run_command(__doc__, {"build": build, "report": report}, argv)


if __name__ == "__main__":
    cli(main)
