import io
import json
import os
import random
import re
import struct
import zlib
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

import data
from data import (
    IGNORE,
    UserError,
    collate,
    encode_conversation,
    geometry,
    load_samples,
    micro_batches,
)


def sample(value="a red door.", image="0.png", **kwargs):
    return {
        "id": "7",
        "image": image,
        "conversations": [
            {"from": "human", "value": "<image>\nDescribe."},
            {"from": "gpt", "value": value},
        ],
    } | kwargs


# samples


def test_json_and_jsonl_hold_the_same_samples(tmp_path):
    samples = [sample(), sample("a blue door.", "1.png")]
    (tmp_path / "a.json").write_text(json.dumps(samples))
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(s) for s in samples) + "\n")
    assert load_samples(tmp_path / "a.json") == list(load_samples(tmp_path / "a.jsonl")) == samples
    assert load_samples(tmp_path / "a.jsonl")[1] == samples[1]


NO_VALUE = [{"from": "human"}, {"from": "gpt", "value": "x"}]


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.jsonl", json.dumps(sample()) + "\n{broken\n", r"a.jsonl, line 2: not valid JSON"),
        ("a.json", '[{"id": 1},\n', r"a.json, line 2: not valid JSON"),
        ("a.json", "[]", "at least one"),
        ("a.json", json.dumps([sample(), {"id": "8"}]), r"sample 2: needs \"conversations\""),
        ("a.json", json.dumps([sample(image=None)]), r"sample 1: needs \"image\""),
        ("a.json", json.dumps([sample(conversations=NO_VALUE)]), r"sample 1: each turn"),
    ],
)
def test_a_malformed_file_is_named_with_its_line_or_sample(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        load_samples(tmp_path / name)


def test_a_missing_file(tmp_path):
    with pytest.raises(UserError, match="no such data file"):
        load_samples(tmp_path / "none.json")


def test_blank_lines_of_a_jsonl_are_no_samples(tmp_path):
    lines = [json.dumps(sample(value)) for value in ("one", "two", "three")]
    (tmp_path / "a.jsonl").write_text("\n" + "\n\n".join(lines) + "\n \n\n")
    found = load_samples(tmp_path / "a.jsonl")
    assert [s["conversations"][1]["value"] for s in found] == ["one", "two", "three"]
    assert data.sample_lengths(found).tolist() == [3, 3, 3]


@pytest.mark.parametrize(
    "text, message",
    [
        (json.dumps([sample("a\0b")]), "sample 1: a NUL or half a UTF-16 pair"),
        (json.dumps([sample("a \ud800 b")]), "sample 1: a NUL or half a UTF-16 pair"),
        (json.dumps([sample(), sample(image="a\0.png")]), "sample 2: a NUL or half"),
        ("[" * 100_000, "line .*: not valid JSON"),
    ],
)
def test_texts_that_no_tokenizer_or_file_system_takes_are_refused(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=message):
        load_samples(tmp_path / "a.json")


def text_sample(question="Q", **more):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "A"}]
    return {"id": "8", "conversations": turns} | more


@pytest.mark.parametrize(
    "bad, sign",
    [
        (text_sample("<image>\nQ", images=["a.jpg"]), "'images': \"['a.jpg']\""),
        (text_sample("Q", video="v.mp4", data_source="x"), "'video': 'v.mp4'"),
        (text_sample("Q", videos=["v"], image=""), "'videos'"),
        (text_sample("Q", image_path="a", image=None), "'image_path'"),
        (text_sample("Q", Img=7), "'Img'"),
        (text_sample("Q", picture={"bytes": "x"}), "'picture'"),
        (text_sample("Q", has_image=True), "'has_image'"),
        (text_sample("Q", file="train/0001.JPEG"), "'file': 'train/0001.JPEG'"),
        (text_sample("Q", media=["v.webm"]), "'media'"),
        (text_sample("<video>\nWhat happens?"), "'<video>'"),
        (text_sample("What happens?\n<video> "), "'<video>'"),
        (text_sample("Picture 1: <img>a/b.jpg</img>\nQ"), "'<img>a/b.jpg</img>'"),
    ],
)
@pytest.mark.parametrize("captions", [False, True])
def test_a_picture_or_a_video_elsewhere_than_in_image_is_refused(tmp_path, bad, sign, captions):
    """It would be left out, and the rest trained as a text, without a word."""
    rows = [sample(), bad]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    for name, place in (("a.json", "sample 2"), ("a.jsonl", "line 2")):
        expected = rf'{name}, {place}: has no "image", but .*{re.escape(sign)}.* as "image"'
        with pytest.raises(UserError, match=expected):
            load_samples(tmp_path / name, captions=captions)


@pytest.mark.parametrize(
    "text",
    [
        text_sample(model="", source="sharegpt"),  # LLaVA's keys, Cambrian's, others' empty ones
        text_sample(image="None", source="code_feedback.json", text="see a.jpg"),
        text_sample(image=float("nan"), images=[], video=None, num_images=0, image_path="nan"),
        text_sample("How do I use <video> and <img> in HTML? <img src='a.png'>"),
        text_sample("<video controls></video> shows nothing"),
        text_sample("Say <image>!", id="000000123.jpg"),
    ],
)
def test_texts_are_not_taken_for_pictures(tmp_path, text):
    (tmp_path / "a.json").write_text(json.dumps([text, sample()]))
    samples = load_samples(tmp_path / "a.json", captions=False)
    assert [data.image_of(s) for s in samples] == [None, "0.png"]
    assert np.sign(data.sample_lengths(samples)).tolist() == [-1, 1]


@pytest.mark.parametrize(
    "name, content",
    [
        ("captions.txt", b"image,caption\n1000268201.jpg,A child in a pink dress .\n"),
        ("captions.csv", b"image,caption\na.jpg,A child\n"),
        ("train.parquet", b"PAR1\x15\x04\xff\xfe"),
        ("captions.json", b'{"info": {}, "images": [{"id": 1}], "annotations": []}'),
    ],
)
def test_other_formats_are_told_what_llavas_is(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}: not LLaVA's format, ") as error:
        load_samples(tmp_path / name)
    shown = str(error.value)
    turns = json.loads(shown[shown.index("{") :])["conversations"]
    assert [turn["from"] for turn in turns] == ["human", "gpt"] and "\n" not in shown


@pytest.mark.parametrize("levels", [30, 300, 900, 980, 1000, 5000])
def test_what_is_nested_too_deep_is_refused(tmp_path, levels):
    """Some hundreds of levels are read, and then no process can hand them to another."""
    deep = json.dumps(sample())[:-1] + ', "extra": ' + "[" * levels + "]" * levels + "}"
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(sample(extra=[[{'a': []}]]))}\n{deep}\n")
    (tmp_path / "a.json").write_text(f"[{json.dumps(sample())}, {deep}]")
    expected = "(sample 2|line 2): its lists .* too deep|not valid JSON .maximum recursion"
    for name in ("a.json", "a.jsonl"):
        if levels <= 300:
            ForkingPickler.dumps(load_samples(tmp_path / name)[1])  # as DataLoader does
            continue
        with pytest.raises(UserError, match=f"{name}, .*({expected})"):
            load_samples(tmp_path / name)


def test_a_name_that_no_file_can_have_is_of_no_file(tmp_path):
    with pytest.raises(UserError, match="cannot read the image .no such file"):
        data.read_image(tmp_path / ("n" * 300 + ".png"))
    with pytest.raises(UserError, match="no such data file"):
        load_samples(tmp_path / ("n" * 300 + ".json"))


# images


@pytest.mark.parametrize("width, height", [(640, 427), (41, 300), (336, 336), (335, 900)])
def test_square_is_what_clip_and_llava_do(width, height):
    """Shortest edge to 336 with Pillow's bicubic, the long one rounded down, the centre cut out.

    Another implementation of bicubic rounds differently: two of 255 levels are allowed, 0.3 on
    average.
    """
    noise = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    image = Image.fromarray(noise).resize((width, height), Image.Resampling.BILINEAR)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    short = min(width, height)
    w, h = int(336 * width / short), int(336 * height / short)
    left, top = (w - 336) // 2, (h - 336) // 2
    resized = image.resize((w, h), Image.Resampling.BICUBIC)
    pixels = np.asarray(resized.crop((left, top, left + 336, top + 336)))
    ours = geometry(image, 336, "square", mean, std).permute(1, 2, 0).double().numpy()
    levels = np.abs((ours * std + mean) * 255 - pixels)
    assert ours.shape == (336, 336, 3) and levels.max() < 2.01 and levels.mean() < 0.3


def test_square_keeps_the_centre_and_squash_keeps_everything():
    image = Image.new("RGB", (120, 60), "red")
    image.paste("blue", (30, 0, 90, 60))
    unit = dict(mean=(0, 0, 0), std=(1, 1, 1))
    square = geometry(image, 30, "square", **unit)
    assert square[2, :, 2:-2].min() == 1 and square[0, :, 2:-2].max() == 0
    squash = geometry(image, 30, "squash", **unit)
    assert squash[0, :, 0].min() == 1 and squash[0, :, -1].min() == 1
    assert squash[2, :, 15].min() == 1
    with pytest.raises(UserError, match="unknown image geometry"):
        geometry(image, 30, "stretch", **unit)


def test_an_unreadable_image_is_named(tmp_path):
    (tmp_path / "text.jpg").write_text("not an image")
    Image.new("RGB", (64, 64)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:70])
    for name in ("text.jpg", "cut.png", "missing.png"):
        with pytest.raises(UserError, match=name):
            data.read_image(tmp_path / name)


def test_only_listed_formats_of_8_bits_and_usual_shape_are_read(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *args: ran.append(args))
    Image.new("RGB", (64, 64)).save(tmp_path / "postscript.jpg", "EPS")
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(tmp_path / "16_bits.png")
    Image.fromarray(np.ones((8, 8), np.float32)).save(tmp_path / "float.tiff")
    Image.new("RGB", (1, 101)).save(tmp_path / "narrow.png")  # an edge of 336 would take 30 MB
    os.mkfifo(tmp_path / "pipe.png")  # whose reader waits
    (tmp_path / "folder.png").mkdir()
    for name in ("postscript.jpg", "16_bits.png", "float.tiff", "narrow.png", "folder.png"):
        with pytest.raises(UserError, match=name):
            data.read_image(tmp_path / name)
    assert not ran
    with pytest.raises(UserError, match="pipe.png: cannot read the image .no such file"):
        data.read_image(tmp_path / "pipe.png")


def test_images_are_turned_upright_as_their_exif_says(tmp_path):
    image = Image.new("RGB", (8, 4), "red")
    exif = image.getexif()
    exif[0x0112] = 6  # a camera held upright
    image.save(tmp_path / "a.jpg", exif=exif)
    assert data.read_image(tmp_path / "a.jpg").size == (4, 8)


def with_chunk(png, name, body, at=33):
    """A PNG with one more chunk, by default after the header's."""
    crc = struct.pack(">I", zlib.crc32(name + body))
    return png[:at] + struct.pack(">I", len(body)) + name + body + crc + png[at:]


def exif(*entries):
    """EXIF with tags (number, type, count, four bytes), big-endian."""
    tags = b"".join(struct.pack(">HHI", *entry[:3]) + entry[3] for entry in entries)
    return b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">H", len(entries)) + tags + bytes(4)


TURNED = (0x112, 3, 1, b"\0\6\0\0")  # orientation 6
RAW = b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n   4\nno hexadecimal\n")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "name, add, turns",
    [
        ("a.png", lambda png: with_chunk(png, b"eXIf", b"garbage"), 0),
        ("a.png", lambda png: with_chunk(png, b"eXIf", b"garbage", -12), 0),  # after the pixels
        ("a.png", lambda png: with_chunk(png, b"eXIf", b"MM\0*\0\0\0\x08\0\5"), 0),
        ("a.png", lambda png: with_chunk(png, b"zTXt", RAW), 0),
        ("a.png", lambda png: with_chunk(png, b"eXIf", exif(TURNED)[6:]), 1),
        ("a.png", lambda png: with_chunk(png, b"eXIf", exif(TURNED)[6:], -12), 1),
        # a resolution that is a text, and one that is missing
        ("a.jpg", exif(TURNED, (0x11A, 2, 4, b"abc\0")), 1),
        ("a.jpg", exif(TURNED, (0x11A, 5, 1, b"\xff\xff\xff\0")), 1),
        ("a.jpg", exif((0x112, 2, 2, b"6\0\0\0")), 0),  # an orientation that is a text
        ("a.jpg", b"Exif\0\0garbage", 0),
    ],
)
def test_pixels_are_read_whatever_the_exif_is(tmp_path, name, add, turns):
    """Turned if the orientation at least can be read; a quarter turn clockwise."""
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:8, :16] = 200  # the left upper corner
    file = io.BytesIO()
    if callable(add):
        Image.fromarray(pixels).save(file, "PNG")
        content = add(file.getvalue())
    else:
        Image.fromarray(pixels).save(file, "JPEG", exif=add, quality=100)
        content = file.getvalue()
    (tmp_path / name).write_bytes(content)
    image = data.read_image(tmp_path / name)
    expected = np.rot90(pixels, -turns).astype(int)
    assert image.size == expected.shape[1::-1]
    assert abs(np.asarray(image) - expected).max() < 5


# Of EXIF's definition: the side of the picture that row 0 is, and column 0
SIDES = "top left, top right, bottom right, bottom left, left top, right top, right bottom, "
SIDES += "left bottom"


@pytest.mark.parametrize("number, sides", list(enumerate(SIDES.split(", "), 1)))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_every_orientation_is_turned_upright(tmp_path, kind, number, sides):
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:8, :16] = 200
    pixels[8:, :16] = 100
    row, column = sides.split()
    stored = pixels if row in ("top", "bottom") else pixels.transpose(1, 0, 2)
    stored = stored[::-1] if row in ("bottom", "right") else stored
    stored = stored[:, ::-1] if column in ("bottom", "right") else stored
    tags = Image.Exif()
    tags[0x112] = number
    camera = Image.fromarray(np.ascontiguousarray(stored))
    camera.save(tmp_path / "a", kind, exif=tags, quality=100)
    image = np.asarray(data.read_image(tmp_path / "a")).astype(int)
    assert image.shape == pixels.shape and abs(image - pixels).max() < 5


def test_formats_that_are_not_read_are_told_those_that_are(tmp_path):
    (tmp_path / "page.jpg").write_text("<!DOCTYPE html><html></html>")
    (tmp_path / "heic.jpg").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99))
    (tmp_path / "avif.jpg").write_bytes(b"\0\0\0\x18ftypavif\0\0\0\0mif1avif" + bytes(99))
    for name in ("page.jpg", "heic.jpg", "avif.jpg"):
        with pytest.raises(UserError, match=f"{name}: .*none of JPEG, PNG, WEBP, GIF, BMP, TIFF"):
            data.read_image(tmp_path / name)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:-900])
    with pytest.raises(UserError, match="cut.jpg: .*truncated"):
        data.read_image(tmp_path / "cut.jpg")


def transparent_images():
    """{name: (image, how it is saved)}: pixel 0 is opaque and dark, pixel 1 black on nothing."""
    grey = np.array([[[40, 255], [0, 0]]], np.uint8)
    colours = np.array([[[40, 40, 40, 255], [0, 0, 0, 0]]], np.uint8)
    palette = Image.new("P", (2, 1))
    palette.putdata([0, 1])
    palette.putpalette([40, 40, 40, 0, 0, 0])
    opaque = Image.fromarray(colours[..., :3])
    return {
        "RGBA": (Image.fromarray(colours), dict(format="PNG")),
        "LA": (Image.fromarray(grey, "LA"), dict(format="PNG")),
        "P": (palette, dict(format="PNG", transparency=1)),
        "P with alpha": (palette, dict(format="PNG", transparency=b"\xff\0")),
        "RGB with tRNS": (opaque, dict(format="PNG", transparency=(0, 0, 0))),
        "L with tRNS": (opaque.convert("L"), dict(format="PNG", transparency=0)),
        "WebP": (Image.fromarray(colours), dict(format="WEBP", lossless=True)),
        "GIF": (palette, dict(format="GIF", transparency=1)),
        "TIFF": (Image.fromarray(colours), dict(format="TIFF")),
    }


@pytest.mark.parametrize("name", transparent_images())
def test_what_is_transparent_is_white_as_in_browsers(tmp_path, name):
    image, options = transparent_images()[name]
    image.save(tmp_path / "a", **options)
    read = data.read_image(tmp_path / "a")
    assert read.mode == "RGB"
    assert np.asarray(read).tolist() == [[[40, 40, 40], [255, 255, 255]]]


def test_half_transparent_pixels_are_mixed_with_white(tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (9, 7, 4), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    read = np.asarray(data.read_image(tmp_path / "a.png"))
    alpha = pixels[..., 3:] / 255
    assert abs(read - (alpha * pixels[..., :3] + (1 - alpha) * 255)).max() <= 1


# text


@pytest.fixture(scope="module")
def tokenizer(world):
    tokenizer = AutoTokenizer.from_pretrained(world / "llm")
    data.prepare_tokenizer(tokenizer)
    return tokenizer


def test_plain_trains_the_caption_and_its_newline_and_nothing_else(tokenizer):
    ids, labels = encode_conversation(sample("a red wall."), tokenizer, 25)
    image = tokenizer.convert_tokens_to_ids("<image>")
    assert ids[0] == tokenizer.bos_token_id and tokenizer.eos_token_id not in ids
    assert (ids == image).nonzero().flatten().tolist() == list(range(1, 26))
    assert tokenizer.decode(ids[labels != IGNORE]) == "a red wall.\n"
    assert torch.equal(ids[labels != IGNORE], labels[labels != IGNORE])
    assert "Describe" not in tokenizer.decode(ids)  # the human turn is discarded


def test_truncation_cuts_the_caption_and_never_the_image(tokenizer):
    ids, labels = encode_conversation(sample("a red wall." * 30), tokenizer, 25, max_length=40)
    assert len(ids) == 40 and (labels != IGNORE).sum() == 14
    with pytest.raises(UserError, match="no room"):
        encode_conversation(sample(), tokenizer, 25, max_length=26)


@pytest.mark.parametrize(
    "turns, message",
    [
        (
            [("human", "<image>"), ("gpt", "a"), ("human", "b"), ("gpt", "c")],
            r"from \['human', 'gpt', 'human', 'gpt'\]; they must be a",
        ),
        ([("gpt", "a"), ("human", "<image>")], r"from \['gpt', 'human'\]"),
        ([("human", "<image>"), ("gpt", "an <image>")], "may stand in one human turn"),
    ],
)
def test_stage_1_refuses_what_is_no_caption(tmp_path, turns, message):
    bad = sample() | {"conversations": [{"from": f, "value": v} for f, v in turns]}
    (tmp_path / "a.json").write_text(json.dumps([sample(), bad]))
    with pytest.raises(UserError, match=f"sample 2: .*{message}"):
        load_samples(tmp_path / "a.json")


def test_word_tokens_are_those_of_the_word_inside_a_sentence(tokenizer):
    words = ["red", "unheard-of", "wall", "x"]
    rows = data.word_tokens(words, tokenizer)
    assert [tokenizer.decode(ids) for ids in rows] == [f" {word}" for word in words]

    class WithoutTheEmptyWord:
        added_tokens_decoder = {}

        def __call__(self, text, add_special_tokens):
            return {"input_ids": [1] if text == "a" else [[1, 5], [1]]}

    with pytest.raises(UserError, match="''"):
        data.word_tokens(["red", ""], WithoutTheEmptyWord())
    for word in ("</s>", "red</s>", "<image>"):
        with pytest.raises(UserError, match=f"no text tokens for the word '{word}'"):
            data.word_tokens(["red", word], tokenizer)


# batches


def test_collate_lays_sequences_one_after_another_and_finds_places():
    items = [
        dict(
            index=i,
            input_ids=torch.arange(n) + 10 * i,
            is_image=torch.arange(n) == 1,
            targets=torch.arange(n).masked_fill(torch.arange(n) < 2, IGNORE),
            pixels=torch.zeros(3, 4, 4),
        )
        for i, n in enumerate((3, 5))
    ]
    batch = collate(items)
    assert batch["input_ids"].tolist() == [0, 1, 2, 10, 11, 12, 13, 14]
    assert batch["position_ids"].tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    assert batch["lengths"] == [3, 5]
    assert batch["image_places"].tolist() == [1, 4]
    assert batch["trained"].tolist() == [2, 5, 6, 7]
    assert batch["index"] == [0, 1]


def test_micro_batches_visit_every_sample_once_an_epoch():
    flat = [i for batch in micro_batches(10, 3, 1, steps=10, seed=1) for i in batch]
    for epoch in range(3):
        assert sorted(flat[epoch * 10 : (epoch + 1) * 10]) == list(range(10))
    assert flat[:10] != flat[10:20]


def test_micro_batches_of_ranks_accumulation_and_resuming_are_the_same_samples():
    rng = random.Random(0)
    for _ in range(20):
        n, batch, accum, steps = rng.randint(5, 40), rng.randint(1, 4), rng.randint(1, 3), 6
        one = list(micro_batches(n, batch, 2 * accum, steps, seed=3))
        ranks = [
            list(micro_batches(n, batch, accum, steps, seed=3, rank=r, ranks=2)) for r in range(2)
        ]
        assert one == [b for pair in zip(*ranks) for b in pair]
        whole = [i for b in micro_batches(n, batch * 2 * accum, 1, steps, seed=3) for i in b]
        assert whole == [i for b in one for i in b]
        resumed = list(micro_batches(n, batch, 2 * accum, steps, seed=3, first_step=2))
        assert resumed == one[2 * 2 * accum :]


def test_grouped_order_keeps_kinds_and_lengths_together():
    """A permutation; but for the last, mixed part every step is of one kind.

    The micro-batches of a step are about as long.
    """
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 1000, 500) * rng.choice([1, 1, -1], 500)
    order = data.grouped_order(lengths, 4, 8, seed=3, epoch=1)
    assert sorted(order) == list(range(500)) and order.dtype == np.int64
    assert (order == data.grouped_order(lengths, 4, 8, 3, 1)).all()
    assert (order != data.grouped_order(lengths, 4, 8, 3, 2)).any()
    whole = 32 * ((lengths > 0).sum() // 32 + (lengths < 0).sum() // 32)
    assert whole > 400
    steps = lengths[order[:whole]].reshape(-1, 8, 4)
    kinds = []
    for step in steps:
        kinds.append(len(set(np.sign(step).ravel())))
        totals = abs(step).sum(1)
        dealt = abs(lengths[order[:whole]]).reshape(-1, 4).sum(1)
        assert totals.max() - totals.min() < 0.6 * (dealt.max() - dealt.min())
    assert set(kinds) == {1}
    signs = [np.sign(step[0, 0]) for step in steps]
    # shuffled, not one kind after the other
    assert signs not in (sorted(signs), sorted(signs, reverse=True))


def test_micro_batches_with_lengths_follow_the_grouped_order():
    lengths = np.array([3, -1, 4, -1, 5, 9, 2, -6, 5, 3])
    ranks = [
        list(micro_batches(10, 2, 1, 4, 7, rank=r, ranks=2, lengths=lengths)) for r in range(2)
    ]
    flat = [i for step in zip(*ranks) for batch in step for i in batch]
    assert flat == [
        *data.grouped_order(lengths, 2, 2, 7, 0),
        *data.grouped_order(lengths, 2, 2, 7, 1)[:6],
    ]
    assert flat == [i for batch in micro_batches(10, 2, 2, 4, 7, lengths=lengths) for i in batch]


@pytest.mark.parametrize("width, height", [(31, 50), (50, 31), (40, 40), (7, 300)])
def test_pad_is_what_llava_does(width, height):
    """LLaVA's expand2square: the image amid a square of the mean colour, then resized, with PIL."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    side = max(width, height)
    square = Image.new("RGB", (side, side), (122, 116, 104))
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    pixels = np.asarray(square.resize((28, 28), Image.Resampling.BICUBIC)) / 255
    ours = geometry(image, 28, "pad", mean, std).permute(1, 2, 0).numpy() * std + mean
    # torchvision rounds otherwise than PIL here and there
    assert abs(ours - pixels).max() < 2.1 / 255


@pytest.mark.parametrize(
    "mean, colour", [((0.5, 0.5, 0.5), 127), ((0.485, 0.456, 0.406), (123, 116, 103))]
)
def test_the_pad_colour_of_siglip_and_dinov2(mean, colour):
    pixels = geometry(Image.new("RGB", (10, 40), "black"), 28, "pad", mean, (1.0, 1.0, 1.0))
    corner = (pixels[:, 14, 0] + torch.tensor(mean)) * 255
    assert torch.allclose(corner, torch.tensor(colour, dtype=torch.float32).expand(3), atol=0.01)


def test_a_large_jsonl_is_read_by_offset(tmp_path):
    samples = [sample("é" * (i % 7) + f" {i}", f"{i}.png") for i in range(1000)]
    text = "".join(json.dumps(s, ensure_ascii=False) + "\n" for s in samples)
    (tmp_path / "a.jsonl").write_text(text, encoding="utf-8")
    lines = load_samples(tmp_path / "a.jsonl")
    assert len(lines) == 1000 and lines[999] == samples[999] and lines[3] == samples[3]
    assert lines.lengths.tolist() == [data.sample_length(s) for s in samples]
    with pytest.raises(IndexError):
        lines[1000]
