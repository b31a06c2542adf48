"""The zero-download world: drawn images with captions and questions, a tiny CLIP, a tiny LM.

    python -m tools.toy     builds it, trains an adapter without and with SEA, and compares them

Whatever is there already is not made again. The toy is ordinary files in toy/, so that it goes
through exactly the code of the full scale:

    images/                         scenes of one to three objects, 64x64 pixels
    train.json, val.json            captions of them, in LLaVA's format
    train_qa.json, val_qa.json      questions about them
    train_text.json, val_text.json  questions about scenes described in words: text only, no image
    pope/                           questions about val's images in POPE's format
    words.txt, truth.json           the word list; the words that are true of each patch
    clip/, vision/                  CLIP for open_clip; its vision tower for transformers
    llm/                            a Llama with its tokenizer
    labels/                         CLIP's labels of train.json's images

CLIP is trained on whole images and text, never on the truth of a patch; the LM on text only.
"""

import io
import json
import os
import random
import shutil
import threading
from collections import defaultdict, namedtuple
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from math import cos, pi
from multiprocessing import get_context, parent_process
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw
from safetensors.torch import save_file
from tokenizers import ByteLevelBPETokenizer, processors
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from torchvision.transforms.functional import normalize, to_tensor
from tqdm import tqdm
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils.logging import disable_progress_bar

import train
from data import UserError, cli, image_processor, load_samples, run_command
from eval import eval_pope, eval_tacs
from labels import LabelStore, extract
from tools.look import look_at_words

# ---------------------------------------------------------------------------------- demonstration


def demonstrate():
    """Build the toy, train an adapter on captions alone and another with SEA, compare the two."""
    disable_progress_bar()  # of transformers
    print(
        "SEA on a laptop: the same adapter, trained on captions alone and with SEA. Four steps, "
        "about three minutes on two cores.\n"
    )
    print(
        "1 of 4: draw a world, train its CLIP and its language model, label its patches; "
        "about a minute and a half."
    )
    ensure()
    print("\n2 of 4: train the adapter on captions alone; about half a minute.")
    train_once("out/toy_baseline", "--sea_weight", "0")
    print("\n3 of 4: train it with SEA; about half a minute.")
    train_once("out/toy")
    print(
        "\n4 of 4: which word of the language model is nearest to each visual token? And does it "
        "know which colours are there? Seconds."
    )
    runs = {"captions only": "out/toy_baseline", "SEA": "out/toy"}
    colors = dict(data="toy/pope/toy_pope_color.json", image_folder="toy/images", prompt="")
    with redirect_stdout(io.StringIO()):  # each run's own numbers are in its eval.jsonl
        found = look_at_words(runs["SEA"], runs["captions only"], truth="toy/truth.json")
        scores = [eval_tacs(path, samples=250)["tacs"] for path in runs.values()]
        answers = [eval_pope(path, **colors, workers=0)["pope"] for path in runs.values()]
    print(f"\n{'on held-out images':32}" + "".join(f"{kind:>15}" for kind in runs))
    for part in ("object", "background"):
        shares = "".join(f"{found[path]['true'][part]:15.0%}" for path in runs.values())
        print(f"{'true words, ' + part + 's':32}{shares}")
    print(f"{'TACS (at most 1)':32}" + "".join(f"{score:15.2f}" for score in scores))
    right = "".join(f"{answer['accuracy']:15.0%}" for answer in answers)
    print(f"{'colours, yes or no (chance: 50%)':32}{right}")
    print(
        "\nOpen words.html in a browser to see the words. Then teach it to answer, and ask:\n"
        "  python train.py --stage finetune --preset toy --init out/toy\n"
        "  python eval.py chat --model out/toy_finetune --image toy/images/val/000000.png\n"
        "  > Is there a red object?"
    )


def train_once(out_dir, *flags):
    """Train stage 1 of the toy, unless its model is there."""
    if not Path(out_dir, "model").exists():
        train.main(["--preset", "toy", *flags, "--out_dir", out_dir, "--resume"])


# -------------------------------------------------------------------------------------------- build


def build(
    folder: Path = Path("toy"),
    seed: int = 0,
    images: int = 3000,
    clip_steps: int = 800,
    lm_steps: int = 800,
):
    """Make the world and train its models. The folder appears only when it is complete."""
    if folder.exists():
        raise UserError(f"{folder} exists: remove it to build the toy again")
    work = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(work, ignore_errors=True)  # what an interrupted build left
    write_world(work, images, seed)
    with two_workers() as pool:
        clip = pool.submit(train_clip, work, seed, clip_steps)
        lm = pool.submit(train_lm, work, seed, lm_steps)
    clip.result()  # raises what went wrong
    lm.result()
    work.rename(folder)


def two_workers():
    """Two processes of one thread each: with two threads each they would fight over two cores."""
    return ProcessPoolExecutor(2, get_context("spawn"), start_worker)


def start_worker():
    """Use one thread, and exit when the parent process ends, even if it is killed."""

    def end_with_parent():
        parent_process().join()
        os._exit(1)

    torch.set_num_threads(1)
    threading.Thread(target=end_with_parent, daemon=True).start()


def ensure():
    """Build what is missing of toy/, its labels included."""
    if not Path("toy").exists():
        build()
    label("labels", n=1)  # the best word only: CLIP's second is nearly always wrong


def label(name, **settings):
    """Make, or finish, the label store `name` in toy/."""
    try:
        LabelStore(f"toy/{name}")
    except UserError:
        extract(
            data="toy/train.json",
            image_folder="toy/images",
            words="toy/words.txt",
            out=f"toy/{name}",
            encoder="toy/clip",
            workers=0,
            **settings,
        )


# ------------------------------------------------------------------------------------------- scenes

SIDE = 64  # pixels of an image
PATCH = 8  # pixels of a patch
GRID = SIDE // PATCH  # patches along a side
Y, X = np.mgrid[:SIDE, :SIDE]  # row and column of each pixel, both [64, 64]


def ring(radii):
    """A polygon in the unit square: corners at these distances from its centre, at equal angles."""
    angles = 2 * np.pi * np.arange(len(radii)) / len(radii)
    return np.stack([0.5 + radii * np.sin(angles), 0.5 - radii * np.cos(angles)], 1)


COLORS = {
    "red": "#d71e23",
    "yellow": "#fae11e",
    "green": "#14be3c",
    "blue": "#1e3cdc",
    "purple": "#8228aa",
    "black": "#19191c",
}
# Where an object is white. Each repeats within 8 pixels, so that a patch shows the whole pattern.
PATTERNS = {
    "plain": X < 0,  # nowhere
    "striped": Y % 4 < 2,
    "dotted": (X % 4 < 2) & (Y % 4 < 2),
    "checked": (X // 4 + Y // 4) % 2 == 0,
}
SHAPES = {
    "circle": ring([0.5] * 40),
    "star": ring([0.5, 0.24] * 5),
    "square": [(0, 0), (1, 0), (1, 1), (0, 1)],
    "triangle": [(0.5, 0), (1, 1), (0, 1)],
}
BACKGROUNDS = {
    "grass": "#3c732d",
    "water": "#287896",
    "brick": "#964b3c",
    "snow": "#e8eef6",
    "wood": "#7d522d",
}
FIELDS = {"color": COLORS, "pattern": PATTERNS, "shape": SHAPES}
SHOWN = (*COLORS, *PATTERNS, *SHAPES, *BACKGROUNDS)
# in the word list too, and in no image: a label that is one of these is wrong
NEVER_SHOWN = "dog cat tree house car road cloud river bird metal glass paper chair"
WORDS = (*SHOWN, *NEVER_SHOWN.split())

# An object of a scene. x, y, size: of its bounding square.
Thing = namedtuple("Thing", "color pattern shape x y size")
# No two things of a scene share a color, pattern or shape: only one can be "the circle".
Scene = namedtuple("Scene", "things background")


def make_scene(rng):
    """One to three objects whose bounding squares do not touch."""
    count = rng.randint(1, 3)
    sizes = ((28, 52), (24, 36), (20, 30))[count - 1]
    names = [rng.sample(list(field), count) for field in FIELDS.values()]
    taken = np.zeros((SIDE, SIDE), bool)
    things = []
    for words in zip(*names):
        for _ in range(30):  # tries; an object that finds no room is left out
            size = rng.randint(*sizes)
            x = rng.randint(0, SIDE - size)
            y = rng.randint(0, SIDE - size)
            room = taken[y : y + size + 1, x : x + size + 1]  # a view
            if not room.any():
                room[:] = True
                things.append(Thing(*words, x, y, size))
                break
    things.sort(key=lambda thing: (thing.y, thing.x))
    return Scene(things, rng.choice(list(BACKGROUNDS)))


def shape_mask(thing):
    """The pixels of an object: [64, 64] bool."""
    image = Image.new("1", (SIDE, SIDE))
    corners = np.array(SHAPES[thing.shape]) * (thing.size - 1) + (thing.x, thing.y)
    ImageDraw.Draw(image).polygon(corners.ravel().tolist(), 1)
    return np.array(image)


def render(scene, rng):
    """The image of a scene: [64, 64, 3] uint8."""
    noise_rng = np.random.default_rng(rng.getrandbits(32))
    noise = noise_rng.normal(size=(SIDE, SIDE))
    textures = {
        "grass": 24 * np.repeat(noise[::4], 4, axis=0),
        "snow": 10 * noise,
        "water": 28 * np.sin(1.2 * Y + 2 * np.sin(0.3 * X + 6 * rng.random())),
        "wood": 22 * noise[:1] + 4 * noise,
        "brick": 90 * ((Y % 4 == 3) | ((X + 4 * (Y // 4 % 2)) % 8 == 7)),
    }
    base = np.array(ImageColor.getrgb(BACKGROUNDS[scene.background]), float)
    pixels = base + textures[scene.background][..., None]
    for thing in scene.things:
        mask = shape_mask(thing)
        pixels[mask] = ImageColor.getrgb(COLORS[thing.color])
        white = np.roll(PATTERNS[thing.pattern], (thing.y, thing.x), (0, 1))
        pixels[mask & white] = (245, 245, 240)
    pixels *= rng.uniform(0.9, 1.1)
    pixels += noise_rng.normal(0, 5, pixels.shape)
    return pixels.clip(0, 255).astype(np.uint8)


def patch_truth(scene):
    """{"object": {patch: words}, "background": {patch: words}}, patch = 8 row + column.

    A patch at least half covered by an object has its color and pattern (a shape does not show in a
    single patch); one that is at least 90 % background has the background's word; others have none.
    """
    truth = {"object": {}, "background": {}}
    masks = np.stack([shape_mask(thing) for thing in scene.things], axis=-1)
    covered = masks.reshape(GRID, PATCH, GRID, PATCH, -1).mean((1, 3))  # [8, 8, things]
    for patch, shares in enumerate(covered.reshape(GRID**2, -1)):
        if shares.max() >= 0.5:
            thing = scene.things[shares.argmax()]
            truth["object"][patch] = [thing.color, thing.pattern]
        elif shares.sum() <= 0.1:
            truth["background"][patch] = [scene.background]
    return truth


# --------------------------------------------------------------------------------------------- text


def caption(scene, rng):
    """One sentence that names everything in a scene."""
    start = rng.choice(["", "", "a picture of ", "there is "])
    things = [f"a {thing.color} {thing.pattern} {thing.shape}" for thing in scene.things]
    return f"{start}{' and '.join(things)} on {scene.background}."


def scene_words(scene):
    """Every word that is true of a scene."""
    words = [word for thing in scene.things for word in thing[:3]]
    return [*words, scene.background]


def questions(scene, rng):
    """Four pairs (question, answer), of ten kinds; yes and no are equally likely."""
    thing = rng.choice(scene.things)
    count = ("one", "two", "three")[len(scene.things) - 1]
    asked = [
        (f"What color is the {thing.shape}?", thing.color),
        (f"What pattern is the {thing.shape}?", thing.pattern),
        (f"What shape is the {thing.color} object?", thing.shape),
        ("What is in the background?", scene.background),
        ("How many objects are there?", count),
    ]
    shown = scene_words(scene)
    for wording, names, true in (
        ("Is there a {} object?", COLORS, shown),
        ("Is there a {} object?", PATTERNS, shown),
        ("Is there a {}?", SHAPES, shown),
        ("Is the background {}?", BACKGROUNDS, shown),
        (f"Is the {thing.shape} {{}}?", COLORS, [thing.color]),
    ):
        answer = rng.choice(("yes", "no"))
        fitting = [name for name in names if (name in true) == (answer == "yes")]
        asked.append((wording.format(rng.choice(fitting)), answer))
    return rng.sample(asked, len(asked))[:4]


def description(scene, rng):
    """A text that takes the place of the image: phrases, or up to 40 words in any order.

    It does not have one word for each patch: an LM used to that would make any adapter write words,
    and SEA would have nothing to mend. It ends with the newline that follows <image> in prompts.
    """
    if rng.random() < 0.5:
        wordings = ("a {0} {1} {2}", "a {2}, {0} and {1}", "a {1} {0} {2}")
        phrases = [rng.choice(wordings).format(*thing) for thing in scene.things]
        phrases.append(scene.background)
        return ", ".join(rng.sample(phrases, len(phrases))) + ".\n"
    words = scene_words(scene)
    more = [*words, scene.background, scene.background]
    words += rng.choices(more, k=rng.randint(0, 30))
    return " ".join(rng.sample(words, len(words))) + "\n"


def pope_questions(scene, field, image, rng):
    """POPE's lines about one field of an image: something that is there, something that is not."""
    shown = [getattr(thing, field) for thing in scene.things]
    absent = [name for name in FIELDS[field] if name not in shown]
    noun = "" if field == "shape" else " object"
    return [
        {"image": image, "text": f"Is there a {rng.choice(words)}{noun}?", "label": label}
        for label, words in (("yes", shown), ("no", absent))
    ]


# -------------------------------------------------------------------------------------------- files


def conversation(question, answer):
    """The turns of a sample in LLaVA's format."""
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def write_world(folder, images, seed):
    """Draw the images and write everything that is not a model. images: how many to train on."""
    truth = {}
    files = defaultdict(list)
    for split, count in (("train", images), ("val", 250)):
        rng = random.Random(f"{seed} {split}")
        pope = defaultdict(list)
        (folder / "images" / split).mkdir(parents=True)
        for i in tqdm(range(count), desc=f"draw {split}"):
            scene = make_scene(rng)
            image = f"{split}/{i:06d}.png"
            Image.fromarray(render(scene, rng)).save(f"{folder}/images/{image}", compress_level=1)
            truth[image] = patch_truth(scene)

            asked = [("Describe the image.", caption(scene, rng)), *questions(scene, rng)]
            for k, (question, answer) in enumerate(asked):
                turns = conversation(f"<image>\n{question}", answer)
                row = {"id": f"{split}-{i}-{k}", "image": image, "conversations": turns}
                name = split if k == 0 else f"{split}_qa"  # the caption comes first
                files[name].append(row)
            # the last question again, about a description instead of the image
            turns = conversation(description(scene, rng) + question, answer)
            files[f"{split}_text"].append({"id": f"{split}-{i}-text", "conversations": turns})
            for field in FIELDS:
                pope[field] += pope_questions(scene, field, image, rng)

    for name, rows in files.items():
        (folder / f"{name}.json").write_text(json.dumps(rows, indent=1))
    (folder / "pope").mkdir()
    for field, rows in pope.items():  # only val's: it is the last split
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"pope/toy_pope_{field}.json").write_text(lines)
    (folder / "truth.json").write_text(json.dumps(truth))
    (folder / "words.txt").write_text("\n".join(WORDS) + "\n")


# --------------------------------------------------------------------------------------------- CLIP

MEAN = (0.5, 0.5, 0.5)
STD = (0.25, 0.25, 0.25)
CLIP = {  # what clip/open_clip_config.json holds
    "model_cfg": {
        "embed_dim": 128,
        "vision_cfg": {
            "image_size": SIDE,
            "patch_size": PATCH,
            "width": 96,
            "layers": 3,
            "head_width": 32,
            "pool_type": "avg",
        },
        "text_cfg": dict(context_length=32, vocab_size=49408, width=64, heads=2, layers=2),
    },
    "preprocess_cfg": {
        "size": SIDE,
        "mean": MEAN,
        "std": STD,
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    },
}


def train_clip(folder, seed, steps):
    """Contrastive training on images and text; writes clip/ and vision/.

    Single patches learn what they show because the image embedding is their average, and because
    three quarters of them are dropped in training, so that none can rely on the others.
    """
    import open_clip

    torch.manual_seed(seed)
    rng = random.Random(seed)
    samples = load_samples(folder / "train.json")
    captions = [sample["conversations"][1]["value"] for sample in samples]
    images = [to_tensor(Image.open(f"{folder}/images/{sample['image']}")) for sample in samples]
    pixels = normalize(torch.stack(images), MEAN, STD)
    model = open_clip.CLIP(**CLIP["model_cfg"])
    model.visual.patch_dropout = open_clip.transformer.PatchDropout(0.75)
    tokenizer = open_clip.SimpleTokenizer(context_length=32)

    def batch_loss():
        rows = torch.randint(len(samples), (64,))
        images = pixels[rows]
        if rng.random() < 0.5:  # no text speaks of left and right
            images = images.flip(-1)
        texts = tokenizer([clip_text(captions[i], rng) for i in rows])
        image, text, scale = model(images, texts)
        logits = scale * image @ text.T
        same = (texts[:, None] == texts).all(-1).float()
        same /= same.sum(1, keepdim=True)  # a word that many images share is right for them all
        return (cross_entropy(logits, same) + cross_entropy(logits.T, same)) / 2

    optimize(model, batch_loss, 1.5e-3, steps, "clip")
    (folder / "clip").mkdir()
    (folder / "clip/open_clip_config.json").write_text(json.dumps(CLIP))
    save_file(model.state_dict(), folder / "clip/open_clip_model.safetensors")
    export_vision(model.visual.state_dict(), folder / "vision")


def clip_text(text, rng):
    """A caption or a part of it: CLIP has to know single words as well as sentences."""
    words = [word for word in text.rstrip(".").split() if word in WORDS]
    # three words for each thing, and the background last
    start = 3 * rng.randrange(len(words) // 3)
    color, pattern, shape = words[start : start + 3]
    word = rng.choices([color, pattern, shape, words[-1]], [0.3, 0.3, 0.1, 0.3])[0]
    parts = [word, f"a photo of a {word}.", f"a {color} {shape}", f"a {pattern} {shape}", text]
    return rng.choices(parts, [0.15, 0.15, 0.1, 0.1, 0.5])[0]


def optimize(model, batch_loss, lr, steps, name):
    """Minimise batch_loss() with AdamW, warmup and cosine decay to 1 % of lr."""
    # fused is much faster where, as in CLIP, most token embeddings never occur
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    for step in tqdm(range(steps), desc=f"train {name}"):
        warmup = min(1, (step + 1) / 40)
        cosine = 1.02 + cos(pi * step / steps)  # from 2.02 to 0.02
        optimizer.param_groups[0]["lr"] = lr * warmup * cosine / 2.02
        optimizer.zero_grad()
        batch_loss().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def export_vision(weights, folder):
    """Write open_clip's ViT as a transformers CLIPVisionModel with the same hidden states."""
    config = CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=3,
        hidden_act="gelu",
        image_size=SIDE,
        patch_size=PATCH,
    )
    renames = {
        "class_embedding": "embeddings.class_embedding",
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
            for letter, part in zip("qkv", value.chunk(3)):
                state[key.replace("in_proj_", f"{letter}_proj.")] = part
        elif key != "proj":  # the map into CLIP's joint space, which the tower lacks
            state[key] = value
    tower = CLIPVisionModel(config)
    tower.load_state_dict(state)
    tower.save_pretrained(folder)
    image_processor(SIDE, "square", MEAN, STD).save_pretrained(folder)


# ----------------------------------------------------------------------------------- language model

# LLaVA's "USER: question ASSISTANT: answer</s>", without a system prompt
CHAT = """
{%- for message in messages -%}
  {%- if message.role == 'assistant' -%}
    {{ 'ASSISTANT: ' + message.content + '</s>' }}
  {%- else -%}
    {{ ('USER: ' if message.role == 'user' else '') + message.content + ' ' }}
  {%- endif -%}
{%- endfor -%}"""


def make_tokenizer(corpus):
    """Byte-level BPE in which every word of the corpus, with the space before it, is one token."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        corpus,
        vocab_size=4096,
        min_frequency=1,
        special_tokens=["<pad>", "<s>", "</s>", "<image>"],  # ids 0 to 3
        show_progress=False,
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
        chat_template=CHAT,
        model_max_length=256,
    )


def document(tokenizer, rng):
    """One training text of the LM -> ids, loss weights [T].

    A description, followed by words with "yes" or "no", by the scene's caption, or by a chat.
    Descriptions and questions, which cannot be foreseen, would drown the answers at full weight.
    """
    scene = make_scene(rng)
    kind = rng.random()
    described = description(scene, rng)
    # in `text` an answer stands between two bars
    if kind < 0.25:  # without such lists, yes and no take far longer to learn
        true = scene_words(scene)
        words = rng.sample(SHOWN, 12)
        seen = [f" {word}| {'yes' if word in true else 'no'}|" for word in words]
        text = f"{described}seen:{','.join(seen)}\n"
    elif kind < 0.4:
        text = f"{described.rstrip()}|\n{caption(scene, rng)}\n|"
    else:
        asked = questions(scene, rng)
        turns = [f"{question} ASSISTANT:| {answer}</s>|" for question, answer in asked]
        text = f"USER: {described}{'USER: '.join(turns)}"

    ids = []
    weights = []
    for i, part in enumerate(f"<s>{text}".split("|")):
        tokens = tokenizer(part, add_special_tokens=False).input_ids
        ids += tokens
        weights += [1.0 if i % 2 else 0.02] * len(tokens)
    return torch.tensor(ids), torch.tensor(weights)


def train_lm(folder, seed, steps):
    """Next-token training on text about scenes; writes llm/."""
    torch.manual_seed(seed)
    rng = random.Random(f"{seed} text")
    texts = []
    for name in ("train.json", "train_qa.json"):
        for sample in load_samples(folder / name, captions=False):
            texts += [turn["value"] for turn in sample["conversations"]]
    spaced = [f" {text}" for text in (*texts, *WORDS)]
    tokenizer = make_tokenizer([*texts, *spaced, "USER: ASSISTANT: seen:"])
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        initializer_range=0.025,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    # far apart, as the word embeddings of large LMs are
    model.model.embed_tokens.weight.data.normal_(0, 0.1)
    for layer in model.model.layers:
        # "mimetic": a token attends to its like and passes on what it finds; saves many steps
        attention = layer.self_attn
        attention.q_proj.weight.data.normal_(0, 128**-0.5)
        attention.v_proj.weight.data.normal_(0, 128**-0.5)
        attention.k_proj.weight.data.copy_(attention.q_proj.weight)
        attention.o_proj.weight.data.copy_(0.7 * attention.v_proj.weight.T)

    def batch_loss():
        documents = [document(tokenizer, rng) for _ in range(24)]
        ids, weights = (pad_sequence(rows, batch_first=True) for rows in zip(*documents))
        losses = cross_entropy(model(ids).logits[:, :-1].mT, ids[:, 1:], reduction="none")
        weights = weights[:, 1:]
        return (losses * weights).sum() / weights.sum()

    optimize(model, batch_loss, 2e-3, steps, "lm")
    model.save_pretrained(folder / "llm")
    tokenizer.save_pretrained(folder / "llm")


def main(argv=None):
    run_command(__doc__, demonstrate, argv)


if __name__ == "__main__":
    cli(main)
