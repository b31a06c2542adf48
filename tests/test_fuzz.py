"""Seeded fuzzing: bad input ends in one clear error line, or it changes nothing.

Samples, images, the files that runs and label stores leave, and command lines are damaged at
random, always in the same way. Every case must either work, as what is checked here defines it,
or be refused by what data.cli turns into one line that names the file or flag. A traceback, a hang,
and a result that differs without a word are failures; check_all lists each kind of them once.
"""

import collections
import contextlib
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import traceback
import typing
from pathlib import Path

import pytest
import torch
from conftest import PATCH, SIZE
from PIL import Image
from safetensors.torch import load_file

import data
import eval
import labels as labelling
import train
from data import IGNORE, IMAGE_TOKEN, LlavaDataset, load_samples, read_image
from model import load_model
from tools import curves, look

ROOT = Path(__file__).parent.parent
IMAGE_TOKENS = (SIZE // PATCH) ** 2
SECONDS = 20  # a case that takes longer hangs
LONGEST_LINE = 1000  # characters of an error message
UNCUT = 10**6  # a max_length that cuts nothing off


# ----------------------------------------------------------------------------- what may happen


class Hang(BaseException):
    """Not an Exception, for readers of images catch those."""


def stop(*_):
    raise Hang(f"no end after {SECONDS} s")


def attempt(call):
    """-> (what call() returns, ""), or (None, the error line) if it is refused as it should be."""
    results = []
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            data.cli(lambda: results.append(call()))
    except SystemExit as e:
        line = e.code
        if not isinstance(line, str):  # argparse has printed its usage and the error
            assert e.code == 2, f"exit status {e.code}"
            line = errors.getvalue().splitlines()[-1]
        assert "error: " in line and "\n" not in line, f"no error line: {line!r}"
        assert len(line) <= LONGEST_LINE, f"an error line of {len(line)} characters: {line[:200]}"
        return None, line
    return results[0], ""


def check_all(check, cases):
    """check(*case) for each case. Fails at the end, with one case for each place of an error."""
    failures = collections.defaultdict(list)
    before = signal.signal(signal.SIGALRM, stop)
    for case in cases:
        signal.alarm(SECONDS)
        try:
            check(*case)
        except (Exception, Hang) as e:
            frames = traceback.extract_tb(e.__traceback__)
            frame = [f for f in frames if Path(f.filename).is_relative_to(ROOT)][-1]
            place = f"{type(e).__name__} in {Path(frame.filename).name}, {frame.name}"
            what = str(e).strip().split("\n")[0]
            failures[f"{place}: {frame.line}"].append(f"{what[:300]}\n    {repr(case)[:600]}")
        finally:
            signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    listed = sorted(failures.items(), key=lambda item: -len(item[1]))
    text = "\n\n".join(f"{len(f)} x {place}\n    {min(f, key=len)}" for place, f in listed)
    assert not failures, f"{len(failures)} kinds of failures\n\n{text}"


# ----------------------------------------------------------------------------- damage

DEEP = "@deep@"  # becomes a list in a list in a list ...
STRANGE_TEXTS = [
    *("", " ", "\n", "\0", "\ud800", "\u200b", "\u2028", "e\u0301", "\U0001f600", "x" * 50_000),
    *("<s>", "</s>", "<pad>", "< /s>", "<</s>/s>", "{{ 1 }}", "{% generation %}"),
    *(IMAGE_TOKEN, 2 * IMAGE_TOKEN, "<im<image>age>", "<<image>/s>", "<image"),
    *("nan", "None", "null", "/etc/passwd", "../images/0.png", "a/../0.png", ".", "./1.png"),
    *("human", "gpt", "system", "human gpt", "gpt human", "Human", "USER", DEEP),
]
STRANGE_VALUES = [
    *(None, True, False, 0, -1, 3, 1.5, 1e300, math.nan, math.inf, -math.inf, 10**30, 2**63),
    *([], {}, [[]], [None], ["0.png"], {"a": 1}, ["</s>"]),
]
OTHER_JSON = ["", "[]", "3", "null", '"x"', "{}", "[3]", '{"a": 1}', "NaN", "[" * 10**5]


def strange_value(rng):
    value = rng.choice(STRANGE_TEXTS if rng.random() < 0.5 else STRANGE_VALUES)
    return json.loads(json.dumps(value))  # a copy


def places(node):
    """Every (container, key) inside a JSON value."""
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, child in items:
        yield node, key
        if isinstance(child, (dict, list)):
            yield from places(child)


def mutate(rng, value):
    """A copy of a JSON object or list in which one or two places are changed."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.randint(1, 2)):
        found = list(places(value))
        if not found:
            break
        container, key = rng.choice(found)
        old = container[key]
        kind = rng.choice(["replace", "replace", "insert", "remove", "repeat", "nest"])
        if kind == "remove":
            del container[key]
        elif kind == "repeat" and isinstance(container, list):
            container.insert(key, json.loads(json.dumps(old)))
        elif kind == "nest":
            container[key] = [old]
        elif kind == "insert" and isinstance(old, str):
            at = rng.randint(0, len(old))
            container[key] = old[:at] + rng.choice(STRANGE_TEXTS) + old[at:]
        else:
            container[key] = strange_value(rng)
    return value


def to_json(rng, value):
    """JSON text as bytes, sometimes with UTF-8 instead of escapes, deep where it says so."""
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5)
    depth = rng.choice([10, 300, 900, 10**5])
    text = text.replace(f'"{DEEP}"', "[" * depth + "]" * depth)
    return text.encode("utf-8", "surrogatepass")


def damage_bytes(rng, content):
    """A copy of bytes that is cut off, or with some bytes flipped, inserted, zeroed or removed."""
    if not content:
        return b"\0"
    at = rng.randrange(len(content))
    end = at + rng.choice([1, 2, 8, 100])
    flipped = bytes([content[at] ^ 1 << rng.randrange(8)])
    return rng.choice(
        [
            content[:at],
            content[:at] + flipped + content[at + 1 :],
            content[:at] + flipped + content[at + 1 :],
            content[:at] + rng.randbytes(end - at) + content[at:],
            content[:at] + bytes(len(content[at:end])) + content[end:],
            content[:at] + content[end:],
        ]
    )


def damage_lines(rng, text):
    """What editors and broken copies make of a text file."""
    return rng.choice(
        [
            text,
            text,
            text,
            b"\xef\xbb\xbf" + text,
            text.replace(b"\n", b"\r\n"),
            b"\n \n" + text.replace(b"\n", b"\n\n"),
            text.replace(b"\n", b"\r"),
            text + b"{",
            text[: rng.randint(0, len(text))],
            text.decode(errors="replace").encode("utf-16"),
            damage_bytes(rng, text),
        ]
    )


# ----------------------------------------------------------------------------- samples


@pytest.fixture(scope="module")
def sea(finetune_flags):
    """The model of a stage 1, whose tokenizer has Vicuna's chat template."""
    return load_model(finetune_flags[finetune_flags.index("--init") + 1])


def sample_cases(rng, captions, chats, n):
    """Yield (suffix, content of a file, captions): three samples, most often one of them bad."""
    for _ in range(n):
        is_caption = rng.random() < 0.4
        samples = rng.sample(captions if is_caption else chats, 3)
        samples[rng.randrange(3)] = mutate(rng, rng.choice(samples))
        lines = [to_json(rng, sample) for sample in samples]
        if rng.random() < 0.5:
            yield ".jsonl", damage_lines(rng, b"\n".join(lines) + b"\n"), is_caption
        else:
            yield ".json", damage_lines(rng, b"[" + b",\n".join(lines) + b"]"), is_caption


def plain(sample):
    """The sample with texts that hold no control tokens, <image> where it was."""
    turns = [
        turn | {"value": IMAGE_TOKEN if IMAGE_TOKEN in turn["value"] else "x"}
        for turn in sample["conversations"]
    ]
    return sample | {"conversations": turns}


def check_item(item, sample, sea, is_caption, max_length):
    ids = item["input_ids"]
    targets = item["targets"]
    is_trained = targets != IGNORE
    is_image = ids == sea.llava.config.image_token_id
    assert is_image.sum() == (IMAGE_TOKENS if "pixels" in item else 0)
    assert (item["is_image"] == is_image).all() and not is_trained[0]
    assert not is_trained[is_image].any() and (targets == ids)[is_trained].all()
    assert len(ids) == len(targets) <= max_length
    if "pixels" in item:
        assert item["pixels"].shape == (3, SIZE, SIZE) and item["pixels"].isfinite().all()
    if max_length == UNCUT:
        assert is_trained.any(), "nothing is trained"
        assert ("pixels" in item) == bool(data.image_of(sample))
        control = data.control_tokens(sea.tokenizer).keys()
        plain_ids, _ = data.encode_conversation(
            plain(sample), sea.tokenizer, IMAGE_TOKENS, chat=not is_caption
        )
        found, expected = ([i for i in x.tolist() if i in control] for x in (ids, plain_ids))
        assert found == expected, "control tokens in the text"


@pytest.mark.parametrize("part", range(2))
def test_samples_are_refused_or_give_what_training_expects(world, sea, tmp_path, part):
    rng = random.Random(part)
    captions = load_samples(world / "train.json")
    chats = captions[:3] + list(load_samples(world / "chats.jsonl", captions=False))
    turns = ("system", "gpt", "human", "gpt", "human", "gpt", "human")
    turns = [{"from": who, "value": f"about {who} {i}"} for i, who in enumerate(turns)]
    chats.append({"id": "all", "image": "1.png", "conversations": turns})
    for choices in (["a cat", "about gpt 3"], "about gpt 3", 3, {"about gpt 3": 1}, [None, [3]]):
        chats.append({"id": "choices", "choices": choices, "conversations": turns[2:]})
    joined = [{"from": "human gpt", "value": "x"}] * 2  # joined with a space they look right
    chats.append({"id": "joined", "image": "1.png", "conversations": joined})
    loaded = collections.Counter()

    def check(suffix, content, is_caption):
        file = tmp_path / f"samples{suffix}"
        file.write_bytes(content)
        samples, line = attempt(lambda: load_samples(file, captions=is_caption))
        if line:
            assert file.name in line, f"the file is not named: {line}"
            return
        loaded[suffix] += 1
        assert len(data.sample_lengths(samples)) == len(samples)
        for max_length in (UNCUT, 40):
            dataset = LlavaDataset(
                samples,
                world / "images",
                sea.preprocess,
                sea.tokenizer,
                IMAGE_TOKENS,
                max_length,
                text="caption" if is_caption else "chat",
            )
            for i in range(len(dataset)):
                item, _ = attempt(lambda: dataset[i])  # noqa: B023
                if item:
                    check_item(item, samples[i], sea, is_caption, max_length)
        if not is_caption:
            for sample in samples:
                attempt(lambda: eval.vqa_question(sample, eval.SHORT))  # noqa: B023

    check_all(check, sample_cases(rng, captions, chats, 500))
    assert min(loaded.values()) > 15


def test_questions_of_pope_are_refused_or_asked(world, sea, tmp_path):
    rng = random.Random(0)
    row = {"question_id": 1, "image": "0.png", "text": "Is there a door?", "label": "yes"}
    file = tmp_path / "coco_pope_random.json"

    def check(content):
        file.write_bytes(content)
        rows, line = attempt(lambda: eval.read_pope(file))
        if line:
            assert file.name in line, f"the file is not named: {line}"
            return
        asked, _ = attempt(lambda: [eval.question_sample(r["text"], r["image"]) for r in rows])
        dataset = LlavaDataset(
            asked, world / "images", sea.preprocess, sea.tokenizer, IMAGE_TOKENS, text="prompt"
        )
        for i in range(len(asked)):
            item, _ = attempt(lambda: dataset[i])  # noqa: B023
            if item:
                assert (item["input_ids"] == sea.llava.config.image_token_id).sum() == IMAGE_TOKENS
                assert item["pixels"].isfinite().all()

    lines = (b"\n".join([to_json(rng, row), to_json(rng, mutate(rng, row))]) for _ in range(150))
    check_all(check, ((damage_lines(rng, text),) for text in lines))


# ----------------------------------------------------------------------------- images

MODES = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I", "I;16", "F"]
SIZES = [
    (1, 1),
    (2, 2),
    (3, 3),
    (1, 100),
    (100, 1),
    (3, 40),
    (40, 3),
    (1, 150),
    (3000, 1),
    (37, 23),
]


def images(rng):
    """Yield the bytes of valid images: each format with each mode that it takes, and EXIF."""
    for kind, mode in itertools.product(data.IMAGE_FORMATS, MODES):
        noise = Image.frombytes("RGB", (64, 64), rng.randbytes(3 * 64**2))
        for size in rng.sample(SIZES, 3):
            exif = Image.Exif()
            exif[0x0112] = rng.choice([*range(10), 1000])  # orientation
            options = rng.choice([{}, {"exif": exif}, {"exif": b"Exif\0\0" + rng.randbytes(30)}])
            file = io.BytesIO()
            with contextlib.suppress(OSError, ValueError, KeyError, SyntaxError):  # no such file
                grey = noise.resize(size).convert("L")
                (grey if mode in ("I;16", "F", "1") else grey.convert("RGB")).convert(mode).save(
                    file, kind, **options
                )
                yield file.getvalue()


def check_image(file):
    read, line = attempt(lambda: read_image(file))
    if line:
        assert file.name[:50] in line, f"the file is not named: {line}"
        return
    assert read.mode == "RGB" and max(read.size) <= 100 * min(read.size)
    for mode in ("square", "squash", "pad"):
        pixels = data.geometry(read, SIZE, mode, (0.5,) * 3, (0.2,) * 3)
        assert pixels.shape == (3, SIZE, SIZE) and pixels.isfinite().all()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::Warning:PIL")
def test_images_are_refused_or_read(tmp_path):
    rng = random.Random(0)
    valid = list(images(rng))
    assert len(valid) > 100
    counts = collections.Counter()

    def check(number, content):
        file = tmp_path / f"{number}{rng.choice(['.jpg', '.png', '.gif', '.tif', ''])}"
        file.write_bytes(content)
        check_image(file)
        counts[bool(attempt(lambda: read_image(file))[1])] += 1

    damaged = [damage_bytes(rng, rng.choice(valid)) for _ in range(600)]
    check_all(check, enumerate([*valid, *damaged]))
    assert min(counts[True], counts[False]) > 100


def test_what_is_no_image_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    Image.new("RGB", (9, 9)).save(tmp_path / "eps.jpg", "EPS")
    names = ["pipe", "folder", "empty", "loop", "eps", "missing", "empty.jpg/in", "n" * 300]

    def check(name):
        file = tmp_path / f"{name}.jpg"
        check_image(file)
        assert attempt(lambda: read_image(file))[1], "it was read"

    check_all(check, ([name] for name in names))


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_an_encoder_of_pickles_is_read_as_tensors_or_refused_and_runs_nothing(world, tmp_path):
    weights = load_file(world / "clip/open_clip_model.safetensors")
    shutil.copy(world / "clip/open_clip_config.json", tmp_path)
    file = tmp_path / "open_clip_pytorch_model.bin"
    torch.save(weights, file)
    found = labelling.load_encoder(str(tmp_path)).state_dict()
    assert found.keys() == weights.keys() and all(found[k].equal(weights[k]) for k in weights)

    ran = tmp_path / "ran"
    whole = file.read_bytes()

    def check(content):
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            torch.save(content, file)
        line = attempt(lambda: labelling.load_encoder(str(tmp_path)))[1]
        assert str(tmp_path) in line and "cannot be loaded (" in line, line
        assert not ran.exists()

    strange = [{}, [1], 3, None, torch.ones(2), {"a": 1}, {"state_dict": weights, "x": Touch(ran)}]
    check_all(check, ([content] for content in [*strange, b"", b"no pickle", whole[:-999]]))


# ----------------------------------------------------------------------------- our files


@pytest.fixture(scope="module")
def made(world, flags, tmp_path_factory):
    """A folder with labels/, three shards, and out/, a run of three steps, measured.

    All that damage leaves as it was must give what `expected` holds: {command: its result}.
    """
    root = tmp_path_factory.mktemp("made")
    labelling.main(extract_flags(world, root))
    train.main([*run_flags(flags, root), "--out_dir", f"{root}/out"])
    eval.main(["tacs", "--model", f"{root}/out", "--samples", "3"])
    scores = {"results": {"gqa": {"exact_match,none": 0.5}}, "group_subtasks": {"gqa": []}}
    (root / "out/lmms_results.json").write_text(json.dumps(scores))
    expected = {}
    for name, command in COMMANDS.items():
        copy = root.with_name(f"expected_{name}")
        shutil.copytree(root, copy)
        expected[name] = command(copy, world, flags)
    return root, expected


def extract_flags(world, root):
    files = f"--data {world}/train.json --image_folder {world}/images --words {world}/words.txt"
    options = "--path last --sign 1 --n 3 --shard 8 --workers 0"
    return f"extract {files} --out {root}/labels --encoder {world}/clip {options}".split()


def run_flags(flags, root):
    own = f"--labels {root}/labels --max_steps 3 --save_every 2 --val_samples 0"
    return [*flags, *own.split()]


def adapter(out):
    """The bytes of the tensors, without the header, whose order varies."""
    weights = load_file(out / "model/adapter.safetensors")
    return {name: w.numpy().tobytes() for name, w in weights.items()}


def resume(root, world, flags):
    """Goes on with the last step, as after a kill."""
    for later in ("checkpoints/step_3", "model"):
        shutil.rmtree(root / "out" / later)
    train.main([*run_flags(flags, root), "--out_dir", f"{root}/out", "--resume"])
    return adapter(root / "out")


def new_run(root, world, flags):
    train.main([*run_flags(flags, root), "--out_dir", f"{root}/new", "--save_every", "0"])
    return adapter(root / "new")


def tacs(root, world, flags):
    return eval.main(["tacs", "--model", f"{root}/out/model", "--samples", "3"])


def words(root, world, flags):
    argv = f"words --model {root}/out/model --samples 3 --out {root}/words.html".split()
    return list(look.main(argv).values()), (root / "words.html").read_text().replace(str(root), "")


def show(root, world, flags):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        look.main(f"labels --labels {root}/labels --out {root}/labels.html --images 2".split())
    return printed.getvalue().split("wrote")[0], (root / "labels.html").read_bytes()


def store(root, world, flags):
    labels = labelling.LabelStore(root / "labels")
    _, ids, scores = labels.sample()
    return labels.words, ids.tolist(), scores.tolist()


def extract(root, world, flags):
    """Goes on with the labels after an interruption."""
    (root / "labels/labels-00001.npy").unlink(missing_ok=True)
    labelling.main(extract_flags(world, root))
    return [file.read_bytes() for file in sorted((root / "labels").glob("labels-*.npy"))]


def history(root, world, flags):
    """A number for each step. The numbers themselves may be others: logs have no checksum."""
    measures = curves.history(root / "out")
    for name, values in measures.items():
        assert all(isinstance(step, int) for step in values), f"a step of {name!r} is no number"
        if re.fullmatch(curves.SCORES, name):  # what is drawn
            assert all(isinstance(value, (int, float)) for value in values.values()), f"{name!r}"
    curves.draw_curves({"SEA": [measures]}, {"val_loss": "loss"}, "curves.png")


COMMANDS = {f.__name__: f for f in (resume, new_run, tacs, words, show, store, extract, history)}
# file -> how often it is damaged, and the commands that read it
READERS = {
    "out/config.json": (24, "resume tacs words"),
    "out/metrics.jsonl": (24, "resume tacs history"),
    "out/eval.jsonl": (40, "history"),
    "out/lmms_results.json": (40, "history"),
    "out/checkpoints/step_2/adapter.safetensors": (5, "resume"),
    "out/checkpoints/step_2/state/shard-00001-model-00001-of-00001.safetensors": (10, "resume"),
    "out/model/adapter.safetensors": (20, "tacs"),
    "labels/meta.json": (40, "new_run show"),
    "labels/words.txt": (12, "new_run words store"),
    "labels/words.npy": (16, "extract"),
    "labels/labels-00000.npy": (24, "new_run show store"),
}


# A bit that flips in them, or a field that a person changes, is not noticed; a lost end is.
WITHOUT_CHECKSUM = ("config.json", "meta.json", "words.npy", "labels-00000.npy")
WITHOUT_CHECKSUM += ("adapter.safetensors", "shard-00001-model-00001-of-00001.safetensors")

# Changes of single fields that mutate draws too rarely
CHANGES = {
    "meta.json": [{"shard": 0}, {"shard": -8}, {"images": math.inf}, {"images": "24"}],
    "metrics.jsonl": [{"step": None}, {"step": "3"}, {"step": [3]}, {"loss_g": "x"}],
}


def damage_file(rng, file, case):
    """Damage a file -> in words, how."""
    content = file.read_bytes()
    if case < 0:
        change = CHANGES[file.name][case]
        *lines, last = content.splitlines() if file.suffix == ".jsonl" else [content]
        changed = json.dumps(json.loads(last) | change).encode()
        file.write_bytes(b"\n".join([*lines, changed]) + b"\n")
        return f"{change}"
    is_lines = file.suffix == ".jsonl"
    kind = rng.choice(["bytes", "bytes", "json", "json", "other", "removed"])
    if file.name in WITHOUT_CHECKSUM and kind in ("bytes", "json"):
        kind = "cut"
    if kind == "removed":
        file.unlink()
        return kind
    if kind == "cut":
        content = content[: rng.randrange(len(content))]
    elif kind == "other":
        content = rng.choice(OTHER_JSON).encode()
    elif kind == "json" and file.suffix in (".json", ".jsonl"):
        lines = [json.loads(line) for line in (content.splitlines() if is_lines else [content])]
        at = rng.randrange(len(lines))
        lines[at] = mutate(rng, lines[at])
        content = b"\n".join(to_json(rng, line) for line in lines) + b"\n"
    else:
        before = content
        content = damage_bytes(rng, content)
        differs = [i for i, (a, b) in enumerate(zip(before, content)) if a != b]
        kind = f"{len(before)} bytes to {len(content)}, the first change at {differs[:1]}"
    file.write_bytes(content)
    return f"{kind}: {content[:800]}" if file.suffix in (".json", ".jsonl", ".txt") else kind


@pytest.mark.parametrize("name", READERS, ids=lambda name: Path(name).name)
def test_damaged_files_change_nothing_or_are_refused(
    made, world, flags, tmp_path, monkeypatch, name
):
    monkeypatch.chdir(tmp_path)
    root, expected = made
    number, commands = READERS[name]
    first = -len(CHANGES.get(Path(name).name, []))

    def cases():
        for case, command in itertools.product(range(first, number), commands.split()):
            copy = tmp_path / str(case)
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(root, copy)
            rng = random.Random(f"{name} {case}")  # the same damage for every command
            yield copy, command, damage_file(rng, copy / name, case)

    def check(copy, command, damage):
        result, line = attempt(lambda: COMMANDS[command](copy, world, flags))
        if line:
            parts = [Path(name).name, Path(name).parent.name, str(copy), "--model"]
            assert any(part in line for part in parts), f"the file is not named: {line}"
        else:
            assert result == expected[command], "another result, without a word"

    check_all(check, cases())


# ----------------------------------------------------------------------------- command lines

NUMBERS = ["-1", "0", "1", "2.5", "1e3", "nan", "inf", "-inf", "9" * 20, "1e308", "x", ""]
TEXTS = ["", "x", ".", "none/there", "x.y", "-1", "n" * 300, "a b", "--seed"]


def test_training_flags_are_refused_or_in_range():
    rng = random.Random(0)
    fields = {field.name: field for field in train.dataclasses.fields(train.TrainConfig)}

    def lines():
        for _ in range(1500):
            argv = []
            for name in rng.sample(sorted(fields), rng.randint(1, 4)):
                name = rng.choice([name, name, name, name, name[:-1], f"no-{name}"])
                choices = typing.get_args(getattr(fields.get(name), "type", None))
                values = rng.choice([NUMBERS, TEXTS, choices or NUMBERS])
                value = rng.choice(values)
                argv += rng.choice([[f"--{name}", value], [f"--{name}={value}"], [f"--{name}"]])
            yield (argv,)

    def check(argv):
        cfg, line = attempt(lambda: train.parse_config(argv))
        if line:
            return
        for name, field in fields.items():
            value = getattr(cfg, name)
            if not isinstance(value, str):
                assert field.metadata["least"] <= value <= field.metadata["most"], name
                assert math.isfinite(value), name

    check_all(check, lines())


# Not fuzzed: what would start many processes or long work, or write outside of the test's folder
LEFT_ALONE = {"folder", "workers", "shard", "model", "encoder", "repeats"}


def command_lines(world, root, flags):
    """Short command lines that work: {name: (main, its command, argv)}."""
    captions = f"--data {world}/train.json --image_folder {world}/images"
    model = f"--model {root}/out --samples 2"
    (root / "pope.json").write_text('{"image": "0.png", "text": "a door?", "label": "yes"}\n')
    return [
        (eval, eval.eval_tacs, f"tacs {model}"),
        (eval, eval.eval_gap, f"gap {model}"),
        (eval, eval.eval_words, f"words {model}"),
        (
            eval,
            eval.eval_pope,
            f"pope --model {root}/out --data {root}/pope.json --image_folder {world}/images "
            "--workers 0",
        ),
        (
            eval,
            eval.eval_vqa,
            f"vqa --model {root}/out {captions} --workers 0 --max_new_tokens 1",
        ),
        (labelling, labelling.write_words, f"words --data {world}/train.json --out w.txt"),
        (labelling, labelling.extract, " ".join(extract_flags(world, "new"))),
        (look, look.look_at_labels, f"labels --labels {root}/labels --out l.png"),
        (look, look.look_at_words, f"words {model} --out w.png"),
    ]


def test_flags_of_commands_are_refused_or_work(made, world, flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = random.Random(0)
    root = tmp_path / "made"
    shutil.copytree(made[0], root)
    commands = command_lines(world, root, flags)

    def lines():
        for module, function, line in commands:
            parameters = data.inspect.signature(function).parameters
            for name in sorted(parameters.keys() - LEFT_ALONE):
                kind = parameters[name].annotation
                for value in rng.sample(NUMBERS if kind in (int, float) else TEXTS, 4):
                    yield module, [*line.split(), f"--{name}={value}"]
            yield module, [*line.split(), "--nothing=1"]
            yield module, [*line.split(), "more"]
            yield module, []
            yield module, line.split()[:2]

    def check(module, argv):
        shutil.rmtree(tmp_path / "new", ignore_errors=True)
        with contextlib.redirect_stdout(io.StringIO()):
            attempt(lambda: module.main(argv))

    check_all(check, lines())
