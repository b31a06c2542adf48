"""labels.py against full stable sorts, open_clip's and timm's own outputs, formulas written out,
and hand counts."""

import inspect
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import open_clip
import pytest
import spacy
import torch
import torch.distributed.run
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import labels
from data import UserError, cli, digest, geometry, load_samples
from labels import (
    LabelStore,
    encoder_preprocess,
    extract,
    load_encoder,
    main,
    nearest_words,
    patch_embeddings,
    patch_paths,
    read_words,
    word_embeddings,
)
from tools import look

MEAN, STD = (
    (0.48, 0.46, 0.41),
    (0.27, 0.26, 0.28),
)  # of the tiny world, whose images are 30 x 30, patches 6 x 6


# ------------------------------------------------------------------------------------ nearest words


def sorted_words(patches, words, n, sign, min_score):
    """A full sort of all scores, in float64."""
    scores = sign * (patches.double() @ words.double().T).numpy()
    order = np.argsort(-scores, axis=1, kind="stable")[:, :n]
    best = np.take_along_axis(scores, order, 1)
    rows, columns = max(0, n - len(words)), best > min_score
    pad = ((0, 0), (0, rows))
    return (
        torch.from_numpy(np.pad(np.where(columns, order, -1), pad, constant_values=-1)),
        torch.from_numpy(np.pad(np.where(columns, best, 0), pad)),
    )


def unit(*shape, seed=0):
    return F.normalize(torch.randn(shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def word_set(kind, P, q, d):
    """Patches [P, d] and words [q, d].

    random: any directions. copies: each word 20 times, 0.1 apart. clip: all words share a
    direction, so that their cosines are 0.7 and more, and patches lie away from them, at 0.2.
    """
    patches, words = unit(P, d, seed=1), unit(q, d)
    if kind == "copies":
        words = F.normalize(words[: q // 20].repeat(20, 1) + 0.1 * unit(q, d, seed=2), dim=-1)
    if kind == "clip":
        shared = unit(d, seed=3)
        words = F.normalize(1.6 * shared + words, dim=-1)
        patches = F.normalize(0.25 * shared + patches, dim=-1)
    return patches, words


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("q", [50_000, 200_000])
@pytest.mark.parametrize("kind", ["random", "copies", "clip"])
def test_the_search_finds_every_word_of_a_full_sort(kind, q, sign):
    patches, words = word_set(kind, 64, q, 256)
    ids, scores = nearest_words(patches, words, 10, sign, min_score=-1)
    expected_ids, expected_scores = sorted_words(patches, words, 10, sign, -1)
    recall = np.mean([len(np.intersect1d(a, b)) / 10 for a, b in zip(ids, expected_ids)])
    assert recall == 1
    torch.testing.assert_close(scores.double(), expected_scores, rtol=1e-6, atol=1e-6)
    own = (patches.unsqueeze(1) * words[ids]).double().sum(-1) * sign  # each the score of its id
    torch.testing.assert_close(scores.double(), own, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "P, q, n, sign, min_score",
    [
        (40, 1, 10, 1, 0),
        (40, 9, 10, -1, 0),
        (40, 10, 10, 1, 0),
        (40, 10, 1, -1, 0),
        (40, 11, 10, 1, 0.5),
        (40, 5000, 10, 1, 0.9),
        (40, 5000, 4200, 1, 0),
        (12, 40_000, 1, -1, 0),
        (4100, 7, 4, 1, 0.3),
        (1, 16_385, 3, 1, 0),
    ],
)
def test_nearest_words_equal_a_full_sort(P, q, n, sign, min_score):
    patches, words = unit(P, 6), unit(q, 6, seed=1)
    ids, scores = nearest_words(patches, words, n, sign, min_score)
    expected_ids, expected_scores = sorted_words(patches, words, n, sign, min_score)
    assert ids.dtype == torch.int64 and scores.dtype == torch.float32
    assert ids.shape == scores.shape == (P, n)
    assert (ids == expected_ids).float().mean() > 0.999  # the rest: float32 takes them for equal
    torch.testing.assert_close(scores.double(), expected_scores, rtol=1e-6, atol=1e-6)


def test_nearest_words_by_hand():
    """The second patch is the opposite of the first, but for word 3."""
    words = torch.tensor([[0.25, 0], [0.75, 0], [-0.5, 0], [-0.5, 0.5]])
    patches = torch.tensor([[1.0, 0], [-1.0, -1.0]])
    ids, scores = nearest_words(patches, words, 3, 1)
    assert ids.tolist() == [[1, 0, -1], [2, -1, -1]]
    assert scores.tolist() == [[0.75, 0.25, 0], [0.5, 0, 0]]
    ids, scores = nearest_words(patches[1:], words, 3, -1)
    assert ids.tolist() == [[1, 0, -1]] and scores.tolist() == [[0.75, 0.25, 0]]


def test_a_word_at_min_score_is_left_out():
    ids, scores = nearest_words(
        torch.ones(1, 1), torch.tensor([[0.5], [0.25], [0.125], [0.0]]), 4, 1, min_score=0.25
    )
    assert ids.tolist() == [[0, -1, -1, -1]] and scores.tolist() == [[0.5, 0, 0, 0]]


class PeakMemory(TorchDispatchMode):
    """The most bytes that were alive at a time, of what operators returned."""

    def __enter__(self):
        self.peak, self.alive = 0, {}
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        ours = {
            t.untyped_storage()._cdata
            for t in tree_leaves((args, kwargs))
            if isinstance(t, torch.Tensor)
        }
        for t in tree_leaves(out):
            if (
                isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in ours
            ):  # not a view of an argument
                self.alive[StorageWeakRef(t.untyped_storage())] = t.untyped_storage().nbytes()
        self.alive = {ref: size for ref, size in self.alive.items() if not ref.expired()}
        self.peak = max(self.peak, sum(self.alive.values()))
        return out


def test_memory_does_not_grow_with_the_number_of_words():
    peaks = []
    for q in (16_384, 131_072):
        with PeakMemory() as memory:
            nearest_words(unit(128, 6), unit(q, 6), 3, 1)
        peaks.append(memory.peak - 8 * q * 6)  # the words themselves
    assert peaks[0] >= 0.9 * 128 * 16_384 * 2  # it did see a block of scores
    assert peaks[1] < 1.1 * peaks[0]


# --------------------------------------------------------------------------------- patch embeddings


def shaken(module):
    """Every weight moved: biases that are all 0 and norms that are all 1 would hide mistakes."""
    g = torch.Generator().manual_seed(1)
    for p in module.parameters():
        p.data += 0.2 * torch.randn(p.shape, generator=g)
    return module.eval().requires_grad_(False)


def tiny_clip(world, **vision):
    config = json.loads((world / "clip/open_clip_config.json").read_text())["model_cfg"]
    return shaken(open_clip.CLIP(**config | {"vision_cfg": config["vision_cfg"] | vision}))


def random_pixels(size=30):
    return torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(2))


def block_inputs(visual, pixels):
    """What each block receives in open_clip's own forward pass."""
    inputs = []
    hooks = [
        block.register_forward_pre_hook(
            lambda _, args, kwargs: inputs.append(args[0] if args else kwargs["q_x"]),
            with_kwargs=True,
        )
        for block in visual.transformer.resblocks
    ]
    visual(pixels)
    for hook in hooks:
        hook.remove()
    return inputs


def finish(visual, x):
    return F.normalize(visual.ln_post(x)[:, 1:] @ visual.proj, dim=-1)


def value_weights(attn):
    width = attn.embed_dim
    return attn.in_proj_weight[2 * width :], attn.in_proj_bias[2 * width :]


@pytest.fixture(scope="module")
def encoder(world):
    return shaken(load_encoder(str(world / "clip")))


def test_last_is_open_clips_tokens_in_the_texts_space(encoder, monkeypatch):
    visual, pixels = encoder.visual, random_pixels()
    monkeypatch.setattr(visual, "output_tokens", True)
    _, tokens = visual(pixels)
    torch.testing.assert_close(
        patch_embeddings(encoder, pixels, "last"), F.normalize(tokens @ visual.proj, dim=-1)
    )


def test_last_of_an_image_of_one_patch_is_encode_image(world):
    """Pooled over its patches, a tower with a single patch must return just this patch's
    embedding."""
    clip = tiny_clip(world, patch_size=30, pool_type="avg")
    patches = patch_embeddings(clip, random_pixels(), "last")
    assert patches.shape == (4, 1, 16)
    torch.testing.assert_close(patches[:, 0], clip.encode_image(random_pixels(), normalize=True))


def test_value_is_the_last_blocks_formula_for_one_token(encoder):
    visual, block = encoder.visual, encoder.visual.transformer.resblocks[-1]
    x = block_inputs(visual, random_pixels())[-1]
    y = x + block.attn.out_proj(F.linear(block.ln_1(x), *value_weights(block.attn)))
    y = y + block.mlp(block.ln_2(y))
    torch.testing.assert_close(
        patch_embeddings(encoder, random_pixels(), "value"), finish(visual, y)
    )


@pytest.mark.parametrize("layers", [2, 6, 8])
def test_vv_is_clip_surgery(world, layers):
    clip = tiny_clip(world, layers=layers)
    visual, inputs, depth = clip.visual, block_inputs(clip.visual, random_pixels()), min(6, layers)
    surgery = inputs[-depth].clone()  # (B, 1 + m, width)
    for x, block in zip(inputs[-depth:], visual.transformer.resblocks[-depth:]):
        weight, bias = value_weights(block.attn)
        for b, tokens in enumerate(block.ln_1(x)):
            heads = []
            for w, c in zip(weight.split(16), bias.split(16)):  # heads of 16
                v = tokens @ w.T + c
                heads.append(torch.softmax(v @ v.T / 16**0.5, dim=-1) @ v)
            surgery[b] += block.attn.out_proj(torch.cat(heads, dim=-1))
    torch.testing.assert_close(
        patch_embeddings(clip, random_pixels(), "vv"), finish(visual, surgery)
    )


@pytest.mark.parametrize("path", ["last", "value", "vv"])
def test_patch_embeddings_are_normalised_and_without_gradient(encoder, path):
    patches = patch_embeddings(encoder.requires_grad_(True), random_pixels(), path)
    encoder.requires_grad_(False)
    assert patches.shape == (4, 25, 16) and not patches.requires_grad
    torch.testing.assert_close(patches.norm(dim=-1), torch.ones(4, 25))


def siglip(name="test_vit", width=64, **trunk):
    """A CLIP whose tower is timm's and pools by attention; trunk: a shape that timm has no name
    for."""
    clip = open_clip.CustomTextCLIP(
        embed_dim=width,
        text_cfg=dict(context_length=77, vocab_size=100, width=16, heads=2, layers=1),
        vision_cfg=dict(timm_model_name=name, timm_pool="map", timm_proj="none", image_size=160),
    )
    if trunk:
        clip.visual.trunk = VisionTransformer(
            **trunk,
            embed_dim=width,
            depth=2,
            num_heads=2,
            class_token=False,
            global_pool="map",
            num_classes=0,
        )
    return shaken(clip)


def pooled_alone(trunk, pixels):
    """timm's pooling of one patch token at a time."""
    tokens = trunk.forward_features(pixels)[:, trunk.num_prefix_tokens :]
    return torch.stack(
        [trunk.attn_pool(tokens[:, i : i + 1]) for i in range(tokens.shape[1])], dim=1
    )


def test_siglip_pools_each_patch_alone():
    clip, pixels = siglip(img_size=32, patch_size=8), random_pixels(32)
    patches = patch_embeddings(clip, pixels, "value")
    assert patches.shape == (4, 16, 64)
    torch.testing.assert_close(
        patches, F.normalize(pooled_alone(clip.visual.trunk, pixels), dim=-1)
    )


def test_siglip_of_an_image_of_one_patch_is_encode_image():
    clip, pixels = siglip(img_size=32, patch_size=32), random_pixels(32)
    torch.testing.assert_close(
        patch_embeddings(clip, pixels, "value")[:, 0], clip.encode_image(pixels, normalize=True)
    )


@pytest.mark.parametrize("name, width", [("test_vit", 64), ("test_vit3", 96)])
def test_prefix_tokens_of_a_timm_tower_are_no_patches(name, width):
    """10 x 10 patches and, in the one, a class token that pooling leaves out, in the other a
    register that it reads."""
    clip, pixels = siglip(name, width), random_pixels(160)
    patches = patch_embeddings(clip, pixels, "value")
    assert patches.shape == (4, 100, width)
    torch.testing.assert_close(
        patches, F.normalize(pooled_alone(clip.visual.trunk, pixels), dim=-1)
    )


@pytest.mark.parametrize("proj", ["linear", "mlp", "none"])
def test_a_timm_tower_that_pools_by_the_mean_has_the_path_last(proj):
    """Of an image of one patch the mean is this patch's embedding."""
    clip = open_clip.CustomTextCLIP(
        embed_dim=64,
        text_cfg=dict(context_length=77, vocab_size=100, width=16, heads=2, layers=1),
        vision_cfg=dict(
            timm_model_name="test_vit", timm_pool="avg", timm_proj=proj, image_size=160
        ),
    )
    clip.visual.trunk = VisionTransformer(
        img_size=32,
        patch_size=32,
        embed_dim=64,
        depth=2,
        num_heads=2,
        class_token=False,
        global_pool="avg",
        num_classes=0,
    )
    shaken(clip)
    assert patch_paths(clip) == ["last"]
    patches = patch_embeddings(clip, random_pixels(32), "last")
    assert patches.shape == (4, 1, 64)
    torch.testing.assert_close(patches[:, 0], clip.encode_image(random_pixels(32), normalize=True))


def test_patch_paths(encoder):
    assert patch_paths(encoder) == ["value", "last", "vv"]
    assert patch_paths(siglip(img_size=32, patch_size=8)) == ["value"]


@pytest.mark.parametrize(
    "vision, size",
    [
        (
            dict(layers=[1, 1, 1, 1], width=16, image_size=64),
            64,
        ),  # a ResNet with CLIP's attention pool
        (dict(attentional_pool=True), 30),
        (dict(attentional_pool=True, attn_pooler_queries=1), 30),  # as CoCa
        (dict(timm_model_name="resnet18", timm_pool="avg", timm_proj="linear", image_size=64), 64),
    ],
)
def test_towers_whose_patches_cannot_be_read_alone_are_refused(world, vision, size):
    clip = tiny_clip(world, **vision)
    for path in ("last", "value", "vv"):
        with pytest.raises(UserError, match="--encoder: .*use a ViT"):
            patch_embeddings(clip, random_pixels(size), path)


def test_paths_that_a_tower_does_not_have_are_refused(encoder):
    with pytest.raises(UserError, match="nonsense"):
        patch_embeddings(encoder, random_pixels(), "nonsense")
    for path in ("last", "vv"):
        with pytest.raises(UserError, match=f"--path {path}"):
            patch_embeddings(siglip(img_size=32, patch_size=8), random_pixels(32), path)


# ---------------------------------------------------------------------------------- word embeddings


@pytest.mark.parametrize(
    "keywords, prompt",
    [
        ({}, "a photo of a {}."),
        (dict(prompt="{}"), "{}"),
        (dict(prompt="some {} here"), "some {} here"),
    ],
)
def test_word_embeddings_equal_encode_text_one_by_one(encoder, keywords, prompt):
    words = ["red", "polka-dot", "traffic light", "a", "sky"]
    tokenize = open_clip.SimpleTokenizer()
    expected = torch.cat(
        [encoder.encode_text(tokenize([prompt.replace("{}", word)])) for word in words]
    )
    torch.testing.assert_close(
        word_embeddings(encoder, words, **keywords), F.normalize(expected, dim=-1)
    )


def test_the_text_tower_of_a_custom_clip_embeds_words(world):
    """open_clip has two classes of models; that of SigLIP keeps its text tower apart."""
    config = json.loads((world / "clip/open_clip_config.json").read_text())["model_cfg"]
    clip = shaken(open_clip.CustomTextCLIP(**config))
    clip.tokenizer = open_clip.SimpleTokenizer()
    tokens = clip.tokenizer(["a photo of a red.", "a photo of a traffic light."])
    expected = F.normalize(clip.encode_text(tokens), dim=-1)
    torch.testing.assert_close(word_embeddings(clip, ["red", "traffic light"]), expected)


def test_a_text_longer_than_the_context_is_cut_as_open_clip_cuts_it(encoder):
    expected = encoder.encode_text(open_clip.SimpleTokenizer()(["red " * 100]), normalize=True)
    torch.testing.assert_close(
        word_embeddings(encoder, ["red " * 100], "{}"), expected, rtol=0, atol=1e-5
    )


def test_encoder_preprocess_is_the_encoders_own(encoder):
    assert encoder_preprocess(encoder) == dict(size=30, mode="square", mean=MEAN, std=STD)


# ---------------------------------------------------------------------------------------- the store


@pytest.fixture(scope="module")
def settings(world):
    """Arguments of extract, other than the encoder's defaults throughout."""
    return dict(
        data=str(world / "train.json"),
        image_folder=str(world / "images"),
        words=str(world / "words.txt"),
        encoder=str(world / "clip"),
        path="last",
        sign=-1,
        prompt="the {}",
        n=4,
        min_score=0.05,
        batch_size=7,
        shard=10,
        workers=0,
    )


@pytest.fixture(scope="module")
def store(settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("store") / "labels"
    extract(**settings, out=str(folder))
    return folder


@pytest.fixture
def copy(store, tmp_path):
    return shutil.copytree(store, tmp_path / "copy")


def records(folder):
    """All records of a store, by what numpy alone reads."""
    return np.concatenate([np.load(path) for path in sorted(folder.glob("labels-*.npy"))])


def same(folder, other):
    return (records(folder) == records(other)).all()


def contents(folder):
    """What its files hold, but for what killed processes have left unfinished."""
    finished = [path for path in folder.iterdir() if path.suffix != ".part"]
    return {path.name: path.read_bytes() for path in finished}


def world_store(settings, folder, **changed):
    extract(**settings | changed, out=str(folder))
    return folder


@pytest.mark.parametrize(
    "path, sign, more",
    [
        ("last", -1, {}),
        ("value", 1, {}),
        ("vv", 1, {}),
        ("vv", -1, dict(n=20)),
    ],
)
def test_the_store_holds_what_each_image_alone_would_get(
    world, settings, tmp_path, path, sign, more
):
    chosen = settings | dict(path=path, sign=sign) | more
    extract(**chosen, out=str(tmp_path / "labels"))
    store, clip, seen_none = (
        LabelStore(tmp_path / "labels"),
        load_encoder(str(world / "clip")),
        set(),
    )
    samples = load_samples(world / "train.json")
    words = (world / "words.txt").read_text().split()
    assert len(store) == len(samples) == 24 and store.words == words
    embeds, n = word_embeddings(clip, words, "the {}").double(), chosen["n"]
    for i, sample in enumerate(samples):
        image = Image.open(world / "images" / sample["image"]).convert("RGB")
        pixels = geometry(image, size=30, mode="square", mean=MEAN, std=STD).unsqueeze(0)
        expected_ids, expected_scores = sorted_words(
            patch_embeddings(clip, pixels, path)[0], embeds, n, sign, 0.05
        )
        ids, scores = store[i]
        assert (ids.dtype, scores.dtype, ids.shape) == (torch.int64, torch.float32, (25, n))
        assert ids.equal(expected_ids)
        torch.testing.assert_close(scores.double(), expected_scores, rtol=1e-3, atol=1e-6)
        seen_none |= set((ids < 0).flatten().tolist())
    assert seen_none == {True, False}


def test_bfloat16_labels_are_about_those_of_float32(settings, store, tmp_path):
    half = world_store(settings, tmp_path / "half", dtype="bfloat16")
    assert json.loads((half / "meta.json").read_text())["dtype"] == "bfloat16"
    found, expected = records(half), records(store)
    assert not same(half, store)
    agree = (found["ids"] == expected["ids"]).mean()
    print(f"bfloat16: {agree:.1%} of the labels are those of float32")
    assert agree > 0.8
    np.testing.assert_allclose(found["scores"], expected["scores"], atol=0.06)
    assert found["ids"].min() == -1 and found["ids"].max() < 10
    assert ((found["ids"] == -1) == (found["scores"] == 0)).all() and (
        np.diff(found["scores"], axis=2) <= 0
    ).all()


@pytest.mark.parametrize(
    "encoder_default, path, sign",
    [({}, "value", 1), (dict(path="last"), "last", -1), (dict(path="vv"), "vv", 1)],
)
def test_default_path_and_sign(settings, tmp_path, encoder_default, path, sign):
    chosen = {k: v for k, v in settings.items() if k not in ("path", "sign")} | encoder_default
    extract(**chosen, out=str(tmp_path / "labels"))
    meta = LabelStore(tmp_path / "labels").meta
    assert (meta["path"], meta["sign"]) == (path, sign)


@pytest.mark.parametrize(
    "name, model, weights, path",
    [
        ("clip-l-336", "ViT-L-14-336-quickgelu", "openai", "last"),
        ("clip-l-224", "ViT-L-14-quickgelu", "openai", "last"),
        ("ViT-B-16-quickgelu/openai", "ViT-B-16-quickgelu", "openai", "last"),
        ("ViT-B-16/laion2b_s34b_b88k", "ViT-B-16", "laion2b_s34b_b88k", "value"),
        ("ViT-B-16//home/me/weights.pt", "ViT-B-16", "/home/me/weights.pt", "value"),
        ("siglip-384", "ViT-SO400M-14-SigLIP-384", "webli", "value"),
    ],
)
def test_the_default_path_belongs_to_the_weights(
    settings, encoder, tmp_path, monkeypatch, name, model, weights, path
):
    """Those of the name that open_clip is given stand in for what would be a download."""
    asked = []
    monkeypatch.setattr(
        open_clip,
        "create_model",
        lambda name, pretrained, **_: asked.append((name, pretrained)) or encoder,
    )
    monkeypatch.setattr(open_clip, "get_tokenizer", lambda name: open_clip.SimpleTokenizer())
    chosen = settings | dict(encoder=name, path="", sign=0)
    extract(**chosen, out=str(tmp_path / "labels"))
    meta = LabelStore(tmp_path / "labels").meta
    assert asked == [(model, weights)]
    assert (meta["path"], meta["sign"]) == (path, -1 if path == "last" else 1)


@pytest.mark.parametrize(
    "name, use",
    [
        *[
            (f"{model}/openai", f"{model}-quickgelu/openai")
            for model in open_clip.list_pretrained_models_by_tag("openai")
            if model.startswith("ViT") and not model.endswith("-quickgelu")
        ],
        ("ViT-L-14/OpenAI", "ViT-L-14-quickgelu/OpenAI"),
        ("ViT-B-32/laion400m_e32", "ViT-B-32-quickgelu/laion400m_e32"),
        ("ViT-H-14/dfn5b", "ViT-H-14-quickgelu/dfn5b"),
        ("ViT-L-14/metaclip-fullcc", "ViT-L-14-quickgelu/metaclip-fullcc"),
    ],
)
def test_weights_of_quick_gelu_are_refused_without_it(encoder, monkeypatch, name, use):
    """Nothing is loaded. With the name that the error gives, open_clip is asked for a model that
    has QuickGELU."""
    asked = []
    monkeypatch.setattr(
        open_clip, "create_model", lambda model, **_: asked.append(model) or encoder
    )
    monkeypatch.setattr(open_clip, "get_tokenizer", lambda name: open_clip.SimpleTokenizer())
    with pytest.raises(UserError, match=f"--encoder {name}: .*QuickGELU.* use {use}$"):
        load_encoder(name)
    assert asked == []
    load_encoder(use)
    [model] = asked
    assert open_clip.get_model_config(model)["quick_gelu"] is True
    if "openai" in name.lower():
        assert encoder.default_path == "last"


def record_type(m, n):
    """What a file of labels holds of an image."""
    return np.dtype([("ids", np.int32, (m, n)), ("scores", np.float16, (m, n))])


def hand_store(folder, words, ids, scores=0.25, shard=2, **meta):
    """A store written file by file; ids [images, m, n] with -1 for none."""
    ids = np.asarray(ids)
    folder.mkdir()
    (folder / "words.txt").write_text("\n".join(words) + "\n")
    meta = dict(images=len(ids), shard=shard, n=ids.shape[2], words=digest(words)) | meta
    (folder / "meta.json").write_text(json.dumps(meta))
    rows = np.zeros(len(ids), record_type(*ids.shape[1:]))
    rows["ids"], rows["scores"] = ids, np.where(ids < 0, 0, scores)
    for k in range(-(-len(ids) // shard)):
        np.save(folder / f"labels-{k:05}.npy", rows[k * shard : (k + 1) * shard])
    return folder


@pytest.mark.parametrize("shard", [1, 2, 3, 4, 7])
def test_label_i_is_row_i_of_the_files_together(tmp_path, shard):
    ids = np.random.default_rng(0).integers(-1, 9, (7, 4, 2))
    store = LabelStore(hand_store(tmp_path / "labels", "abcdefghi", ids, shard=shard))
    assert len(store) == 7
    for i in range(7):
        assert store[i][0].tolist() == ids[i].tolist()
        assert store[i][1].tolist() == np.where(ids[i] < 0, 0, 0.25).tolist()


def test_an_open_store_costs_no_memory(tmp_path):
    """Two files of 1 GB, of which the disk holds only what is written."""
    kind, images = record_type(576, 10), 2 * 30_000
    folder = hand_store(
        tmp_path / "labels", "abcdefghij", np.zeros((1, 1, 1)), images=images, shard=images // 2
    )
    for k in range(2):
        rows = np.lib.format.open_memmap(folder / f"labels-{k:05}.npy", "w+", kind, (images // 2,))
        rows[-1] = (3, 0.5)
        del rows

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    tracemalloc.start()
    before = resident()
    store = LabelStore(folder)
    ids, scores = store[images - 1]
    grown, peak = resident() - before, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(path.stat().st_size for path in folder.iterdir()) > 2e9
    assert len(store) == images and (ids == 3).all() and (scores == 0.5).all()
    assert grown < 50e6 and peak < 5e6


def test_missing_and_damaged_folders_are_refused(copy, tmp_path):
    with pytest.raises(UserError, match=r"nowhere.*labels\.py extract"):
        LabelStore(tmp_path / "nowhere")
    for name, damage, message in [
        ("meta.json", b'{"size": ', "no label store"),
        ("meta.json", b"{}", "no label store"),
        ("labels-00001.npy", b"", "labels-00001.npy: missing or damaged"),
        ("labels-00001.npy", b"nonsense", "labels-00001.npy: missing or damaged"),
        (
            "labels-00002.npy",
            (copy / "labels-00002.npy").read_bytes()[:-1],
            "labels-00002.npy: missing or damaged",
        ),
        ("words.txt", b"", "words.txt: the word list is empty"),
        (
            "words.txt",
            b"sky\n" + (copy / "words.txt").read_bytes().replace(b"sky", b"x"),
            "words.txt: not the words",
        ),
    ]:
        whole = (copy / name).read_bytes()
        (copy / name).write_bytes(damage)
        with pytest.raises(UserError, match=message):
            LabelStore(copy)
        (copy / name).write_bytes(whole)
    LabelStore(copy)


@pytest.mark.parametrize("keep", [0, 50, -1])
def test_extract_refuses_damaged_word_embeddings(settings, copy, keep):
    words = (copy / "words.npy").read_bytes()
    (copy / "words.npy").write_bytes(words[:keep])
    (copy / "labels-00001.npy").unlink()  # for which they are needed
    with pytest.raises(UserError, match=r"words.npy: missing or damaged .*remove it and run"):
        extract(**settings, out=str(copy))
    (copy / "words.npy").unlink()
    extract(**settings, out=str(copy))  # as it was told
    assert (copy / "words.npy").read_bytes() == words


def test_an_interrupted_run_is_refused_and_goes_on_where_it_stopped(settings, store, copy):
    (copy / "labels-00001.npy").unlink()
    (copy / "labels-00001.npy.0.part").write_bytes(b"half")  # of a process that was killed
    finished = np.load(copy / "labels-00002.npy")
    finished["ids"][0], finished["scores"][0] = 1, 0.5  # a finished file is not made again
    np.save(copy / "labels-00002.npy", finished)
    with pytest.raises(UserError, match="1 of 3 files are missing; run the same"):
        LabelStore(copy)
    extract(**settings, out=str(copy))
    assert contents(copy)["labels-00002.npy"] != contents(store)["labels-00002.npy"]
    (copy / "labels-00002.npy").unlink()
    extract(**settings, out=str(copy))
    assert contents(copy) == contents(store)


def test_labels_without_their_settings_are_refused(settings, copy):
    (copy / "meta.json").unlink()
    before = contents(copy)
    with pytest.raises(UserError, match="copy: holds files of unknown settings .*--out"):
        extract(**settings, out=str(copy))
    assert contents(copy) == before


def test_words_are_embedded_once(settings, store, copy, monkeypatch):
    calls, embed = [], labels.word_embeddings
    monkeypatch.setattr(
        labels,
        "word_embeddings",
        lambda encoder, words, prompt: calls.append(len(words)) or embed(encoder, words, prompt),
    )
    (copy / "labels-00001.npy").unlink()
    written = (copy / "words.npy").stat().st_mtime_ns
    extract(**settings, out=str(copy))
    assert calls == [] and (copy / "words.npy").stat().st_mtime_ns == written
    (copy / "words.npy").unlink()
    extract(**settings, out=str(copy))
    assert calls == [10] and contents(copy) == contents(store)


@pytest.mark.parametrize("rank", [0, 1])
def test_word_embeddings_come_from_the_store(world, settings, encoder, tmp_path, monkeypatch, rank):
    """From its file, whoever wrote it."""
    chosen = settings | dict(path="value", sign=1)
    stored = unit(10, 16)
    out = world_store(chosen, tmp_path / "labels")
    for file in out.glob("labels-*"):
        file.unlink()
    np.save(out / "words.npy", stored.numpy())
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(rank + 1))
    extract(**chosen, out=str(out))
    assert np.array_equal(np.load(out / "words.npy"), stored.numpy())

    expected = stored.double()
    row = 10 * rank  # the first of the rank's first file
    sample = load_samples(world / "train.json")[row]
    image = Image.open(world / "images" / sample["image"]).convert("RGB")
    pixels = geometry(image, size=30, mode="square", mean=MEAN, std=STD).unsqueeze(0)
    clip = load_encoder(str(world / "clip"))
    ids, scores = sorted_words(patch_embeddings(clip, pixels, "value")[0], expected, 4, 1, 0.05)
    record = np.load(out / f"labels-0000{rank}.npy")[0]
    assert (record["ids"] == ids.numpy()).all()
    np.testing.assert_allclose(record["scores"], scores, rtol=1e-3, atol=1e-6)


# Ranks are processes that share nothing but the folder. A server that has imported all forks them.
server = multiprocessing.get_context("forkserver")


def rank_process(settings, rank, world, die, meet):
    """Extract as one of `world` ranks. die: ("before" | "after", k): be killed before, or after,
    the k-th renaming. meet: a barrier at which to wait before each renaming."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    replace, seen = os.replace, []

    def fatal(*args):
        seen.append(args)
        if die == ("before", len(seen)):
            os.kill(os.getpid(), signal.SIGKILL)
        if meet:
            meet.wait(60)
        replace(*args)
        if die == ("after", len(seen)):
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = fatal
    extract(**settings)


@pytest.fixture(scope="module")
def launch(settings):
    """Start a rank that extracts, with `changed` settings."""
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [*sys.path[:3], path]))
    server.set_forkserver_preload([__name__])

    def start(out, rank=0, world=1, die=None, meet=None, **changed):
        chosen = settings | changed | dict(out=str(out))
        process = server.Process(target=rank_process, args=(chosen, rank, world, die, meet))
        process.start()
        return process

    yield start
    os.environ.pop("PYTHONPATH") if path is None else os.environ.update(PYTHONPATH=path)


def finish_all(processes):
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * len(processes)


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory):
    """The files of an undisturbed run of one process: meta, words, their embeddings, 6 files of 4
    images."""
    files = contents(world_store(settings, tmp_path_factory.mktemp("whole") / "labels", shard=4))
    assert sorted(files) == [
        *(f"labels-{k:05}.npy" for k in range(6)),
        "meta.json",
        "words.npy",
        "words.txt",
    ]
    return files


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_any_number_of_ranks_writes_the_same_files(launch, whole, tmp_path, ranks):
    finish_all([launch(tmp_path / "labels", rank, ranks, shard=4) for rank in range(ranks)])
    assert contents(tmp_path / "labels") == whole


@pytest.mark.parametrize(
    "rank, ranks, files", [(0, 2, {0, 2, 4}), (1, 2, {1, 3, 5}), (2, 3, {2, 5}), (7, 8, set())]
)
def test_which_files_are_a_ranks_does_not_depend_on_what_is_there(
    launch, whole, tmp_path, rank, ranks, files
):
    (tmp_path / "labels").mkdir()
    for name in ("meta.json", "words.txt", "words.npy", "labels-00002.npy"):
        (tmp_path / "labels" / name).write_bytes(whole[name])
    finish_all([launch(tmp_path / "labels", rank, ranks, shard=4)])
    assert {int(path.stem[-5:]) for path in (tmp_path / "labels").glob("labels-*")} == files | {2}


def test_waiting_for_rank_0_has_an_end(tmp_path):
    """And names what does not come: it may have ended, or the nodes share no folder."""
    labels.wait_for(tmp_path, hours=0)  # it is there
    with pytest.raises(
        UserError, match="words.npy does not appear: rank 0 has ended, or this node"
    ):
        labels.wait_for(tmp_path / "words.npy", hours=1e-4)


def test_torchrun(settings, whole, tmp_path):
    root = Path(labels.__file__).parent
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            "--",
            "labels.py",
            *command(settings, tmp_path / "labels", shard=4),
        ],
        cwd=root,
        timeout=100,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert contents(tmp_path / "labels") == whole
    assert "labelling (rank 0 of 2)" in run.stderr


@pytest.mark.parametrize("flag", list(inspect.signature(extract).parameters))
def test_torchrun_takes_no_flag_of_extract_for_its_own(flag):
    arguments = torch.distributed.run.get_args_parser().parse_args(
        ["--", "labels.py", "extract", f"--{flag}", "1"]
    )
    assert (arguments.training_script, arguments.training_script_args) == (
        "labels.py",
        ["extract", f"--{flag}", "1"],
    )


def test_a_run_killed_at_each_of_its_writes_goes_on(settings, launch, tmp_path):
    """Writes words.txt, meta.json, words.npy and 3 label files, one more each time: a run that
    goes on writes the first two again."""
    expected = contents(world_store(settings, tmp_path / "whole", shard=8))
    out, names = tmp_path / "labels", []
    for die in [(when, write) for write in (1, 2, 3, 3, 3, 3) for when in ("before", "after")]:
        process = launch(out, die=die, shard=8)
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        names.append(sorted(path.name for path in out.iterdir()))
    finished = [[name for name in found if not name.endswith(".part")] for found in names]
    assert [len(found) for found in finished] == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6]
    unfinished = {name.split(".npy")[0].split(".txt")[0].split(".json")[0] for name in names[-1]}
    assert unfinished == {name.split(".")[0] for name in expected}
    finish_all([launch(out, shard=8)])  # which also removes what the others left unfinished
    assert contents(out) == expected


def test_a_run_killed_twenty_times_makes_the_same_store(launch, samples, tmp_path):
    """Of 40 files of 3 images, so that much of the time is spent on writing them."""
    out, rng, kills, states = tmp_path / "labels", np.random.default_rng(0), 0, []
    (tmp_path / "data.json").write_text(json.dumps(samples * 5))
    changed = dict(shard=3, data=str(tmp_path / "data.json"))
    finish_all([launch(tmp_path / "first", **changed)])  # which may have to wait for the server
    start = time.time()
    finish_all([launch(tmp_path / "whole", **changed)])
    lasts, whole = time.time() - start, contents(tmp_path / "whole")
    for _ in range(100):
        process = launch(out, **changed)
        process.join(rng.uniform(0, lasts))
        kills += process.is_alive()
        process.kill()
        process.join()
        states.append(len(list(out.glob("labels-*.npy"))))
        if process.exitcode == 0:  # it was done before it could be killed: begin again
            assert contents(out) == whole
            shutil.rmtree(out)
        else:
            assert process.exitcode == -signal.SIGKILL
        if kills >= 20 and len(set(states) - {0, 40}) >= 3:
            break
    assert kills >= 20 and len(set(states) - {0, 40}) >= 3
    finish_all([launch(out, **changed)])
    assert contents(out) == whole


def test_ranks_killed_and_restarted_in_another_number_make_the_same_store(launch, whole, tmp_path):
    out, states = tmp_path / "labels", []
    for die in [[("after", 4), ("after", 1)], [None, ("before", 1), ("after", 1)], [("before", 1)]]:
        processes = [launch(out, rank, len(die), d, shard=4) for rank, d in enumerate(die)]
        for process in processes:
            process.join(60)
        assert any(process.exitcode == -signal.SIGKILL for process in processes)
        states.append(sum(path.suffix == ".npy" for path in out.glob("labels-*")))
    assert 0 < states[0] <= states[1] <= states[2] < 6
    finish_all([launch(out, rank, 2, shard=4) for rank in range(2)])
    assert contents(out) == whole


def test_two_runs_into_one_folder_make_the_same_store(launch, whole, tmp_path):
    """Each holds a file that it is about to rename while the other does."""
    meet = server.Barrier(2)
    finish_all([launch(tmp_path / "labels", meet=meet, shard=4) for _ in range(2)])
    assert contents(tmp_path / "labels") == whole


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch, error):
    def fail(_):
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(type(error)):
        labels.write_file(tmp_path / "words.npy", np.zeros(3))
    assert contents(tmp_path) == {}


def test_check_names_what_differs(store, samples):
    geo = dict(size=30, mode="square", mean=MEAN, std=STD)
    LabelStore(store).check(samples, geo, (5, 5))
    for field, *arguments in [
        ("images", samples[:9], geo, (5, 5)),
        ("image_list", samples[::-1], geo, (5, 5)),
        ("size", samples, geo | {"size": 60}, (5, 5)),
        ("mode", samples, geo | {"mode": "squash"}, (5, 5)),
        ("grid", samples, geo, (5, 6)),
    ]:
        with pytest.raises(UserError, match=f"made with {field} = "):
            LabelStore(store).check(*arguments)


@pytest.mark.parametrize("score", [np.nan, np.inf, -np.inf, 1.5, -0.5, 0.0])
def test_a_score_that_is_no_positive_cosine_is_refused(store, copy, samples, score):
    """As soon as it is read: one label of one image."""
    file = copy / "labels-00001.npy"
    found = np.load(file)
    ids = found["ids"][3]
    patch = np.flatnonzero(ids[:, 0] != -1)[0]
    found["scores"][3, patch, 0] = score
    np.save(file, found)
    damaged = LabelStore(copy)
    message = f"copy: a label of image 13 has the score {score}, no cosine above 0; the store is"
    with pytest.raises(UserError, match=message):
        damaged[13]
    for i in set(range(24)) - {13}:
        assert all(x.equal(y) for x, y in zip(damaged[i], LabelStore(store)[i]))


def test_a_score_may_be_1_and_what_rounding_adds(tmp_path):
    scores = np.float16([1, 1.001]).reshape(1, 1, 2)
    folder = hand_store(tmp_path / "labels", ["red", "sky"], np.array([[[0, 1]]]), scores)
    assert LabelStore(folder)[0][1].flatten().tolist() == [1, 1 + 2**-10]


def test_scores_that_float16_cannot_tell_from_0_are_no_labels(settings, tmp_path):
    """Unit vectors times 2e-8: of cosines above 0 float16 makes 0 or, from 3e-8 on, 6e-8."""
    out = world_store(settings, tmp_path / "labels")
    for file in out.glob("labels-*"):
        file.unlink()
    meta = json.loads((out / "meta.json").read_text())
    (out / "meta.json").write_text(json.dumps(meta | dict(min_score=0.0)))
    np.save(out / "words.npy", 2e-8 * np.load(out / "words.npy"))
    with pytest.raises(UserError, match=r"labels: 0.0% of the patches have a label; try another"):
        extract(**settings | dict(min_score=0.0), out=str(out))
    found = records(out)
    assert (found["ids"] == -1).all() and (found["scores"] == 0).all()


def test_extract_says_that_it_has_labelled_nothing(settings, tmp_path):
    with pytest.raises(UserError, match=r"labels: 0.0% of the patches have a label; try another"):
        world_store(settings, tmp_path / "labels", min_score=0.99)
    assert (records(tmp_path / "labels")["ids"] == -1).all()


def lift_by_hand(folder, captions):
    """The median of how often top words stand in their own caption over how often in that of the
    next image, of the one after it, and so on, five times."""
    found = records(folder)["ids"][:, :, 0]
    words = (folder / "words.txt").read_text().split()

    def agreeing(shift):
        total = 0
        for i, ids in enumerate(found):
            caption = re.findall("[a-z]+", captions[(i + shift) % len(captions)])
            total += sum(words[k] in caption for k in ids if k != -1)
        return total

    return float(np.median([agreeing(0) / agreeing(shift) for shift in range(1, 6)]))


def test_extract_ends_with_the_lift_of_the_captions(settings, samples, tmp_path, capsys):
    """Random weights label at random. Captions that say what the labels are raise the lift."""
    out = world_store(settings, tmp_path / "labels")
    printed = capsys.readouterr().out
    captions = [sample["conversations"][1]["value"] for sample in samples]
    lift, share = lift_by_hand(out, captions), (records(out)["ids"][:, :, 0] != -1).mean()
    assert 0 < lift < 1.2 and 0.1 < share < 0.9
    assert f"{out}: {share:.1%} of the patches have a label" in printed
    assert f"a top word stands {lift:.2f} times as often in its image's caption" in printed
    assert "WARNING" in printed and "--sign 1 or another --path, each with another --out" in printed

    words = (out / "words.txt").read_text().split()
    for sample, ids in zip(samples, records(out)["ids"][:, :, 0]):
        counts = np.bincount(ids[ids >= 0], minlength=10)
        sample["conversations"][1]["value"] = f"{words[counts.argmax()]}, what else?"
    (tmp_path / "data.json").write_text(json.dumps(samples))
    extract(**settings | dict(data=f"{tmp_path}/data.json"), out=str(out))
    printed = capsys.readouterr().out
    captions = [sample["conversations"][1]["value"] for sample in samples]
    lift = lift_by_hand(out, captions)
    assert lift > 1.2 and f"{lift:.2f} times as often" in printed and "WARNING" not in printed


def test_the_last_process_reports(settings, store, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        world_store(settings, tmp_path / "labels")
        printed = capsys.readouterr().out
        assert ("of the patches have a label" in printed) == (rank == 1)
        assert ("rank 0 is done; the last one to finish says" in printed) == (rank == 0)
    assert same(tmp_path / "labels", store)


def test_one_image_has_no_lift(settings, samples, tmp_path, capsys):
    (tmp_path / "data.json").write_text(json.dumps(samples[:1]))
    world_store(settings, tmp_path / "labels", data=f"{tmp_path}/data.json")
    assert "WARNING" not in capsys.readouterr().out


FLAGS = dict(
    n=3,
    sign=1,
    path="value",
    prompt="a {}",
    min_score=0.1,
    shard=5,
    dtype="bfloat16",
)
PREPROCESSING = dict(mean=[0.4] * 3, std=[0.5] * 3, mode="squash")
EDITED = dict(size=60, grid=[6, 6])  # nothing but another model could change these
FILES = {"images", "image_list", "words", "encoder"}


def test_a_damaged_description_is_refused(settings, copy):
    (copy / "meta.json").write_text("{")
    with pytest.raises(UserError, match="copy: no label store, or a damaged one .*another --out"):
        extract(**settings, out=str(copy))


def test_every_setting_of_a_store_is_compared(store):
    tested = [*FLAGS, *PREPROCESSING, *EDITED, *FILES]
    assert sorted(tested) == sorted(
        json.loads((store / "meta.json").read_text()).keys() - {"data", "image_folder"}
    )


@pytest.mark.parametrize("field", [*FLAGS, *PREPROCESSING, *EDITED, *sorted(FILES)])
def test_extract_into_labels_of_another_setting_is_refused(world, settings, copy, tmp_path, field):
    chosen, clip = dict(settings), shutil.copytree(world / "clip", tmp_path / "clip")
    meta = json.loads((copy / "meta.json").read_text())
    if field in FLAGS:
        chosen[field] = FLAGS[field]
    elif field in PREPROCESSING:
        meta["encoder"] = chosen["encoder"] = str(clip)
        config = json.loads((clip / "open_clip_config.json").read_text())
        config["preprocess_cfg"][{"mode": "resize_mode"}.get(field, field)] = PREPROCESSING[field]
        (clip / "open_clip_config.json").write_text(json.dumps(config))
    elif field in EDITED:
        meta[field] = EDITED[field]
    elif field == "words":
        chosen["words"] = str(tmp_path / "words.txt")
        (tmp_path / "words.txt").write_text((world / "words.txt").read_text() + "extra\n")
    elif field in ("images", "image_list"):
        chosen["data"], samples = str(tmp_path / "data.json"), load_samples(world / "train.json")
        (tmp_path / "data.json").write_text(
            json.dumps(samples[:23] if field == "images" else samples[::-1])
        )
    else:
        chosen["encoder"] = str(clip)
    (copy / "meta.json").write_text(json.dumps(meta))
    (copy / "labels-00001.npy").unlink()
    before = contents(copy)
    with pytest.raises(
        UserError,
        match=rf"copy: made with {field} = .*, this run has {field} = .* another --out",
    ):
        extract(**chosen, out=str(copy))
    assert contents(copy) == before


def test_data_that_has_moved_is_the_same_data(world, settings, copy, tmp_path):
    moved = shutil.copy(world / "train.json", tmp_path / "moved.json")
    extract(**settings | dict(data=str(moved)), out=str(copy))
    assert len(LabelStore(copy)) == 24


@pytest.mark.parametrize("what", ["resize_mode", "nan"])
def test_an_encoder_that_would_label_wrongly_is_refused(world, settings, tmp_path, what):
    clip = shutil.copytree(world / "clip", tmp_path / "clip")
    message = "its resize_mode is longest"
    if what == "nan":
        message = "gives NaN or inf for a word"
        weights = load_file(clip / "open_clip_model.safetensors")
        weights["token_embedding.weight"].fill_(float("nan"))
        save_file(weights, clip / "open_clip_model.safetensors")
    else:
        config = json.loads((clip / "open_clip_config.json").read_text())
        config["preprocess_cfg"]["resize_mode"] = "longest"
        (clip / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        extract(**settings | dict(encoder=str(clip)), out=str(tmp_path / "labels"))


# ---------------------------------------------------------------------------------------- word list

CAPTIONS = [
    "A red-hot Dog runs; the dog's tail!",
    "Dog and cat, cat and DOG.",
    "The red-hot stove -- x x x",
    "zebra apple: zebra apple tree",
]
# dog 4 times; apple, cat, red-hot and zebra twice; tail, runs, stove and tree once; no single
# letters, no stop words
OFTEN, ONCE = ["dog", "apple", "cat", "red-hot", "zebra"], ["runs", "stove", "tail", "tree"]


def captions_file(path, captions=CAPTIONS):
    path.write_text(
        json.dumps(
            [
                {
                    "image": "0.png",
                    "conversations": [
                        {"from": "human", "value": "<image>\nhorse horse horse"},
                        {"from": "gpt", "value": caption},
                    ],
                }
                for caption in captions
            ]
        )
    )
    return str(path)


@pytest.mark.parametrize(
    "flags, extra, expected",
    [
        (["--min_count", "2"], None, OFTEN),
        (["--min_count", "1"], None, OFTEN + ONCE),
        (["--min_count", "3"], None, ["dog"]),
        (
            ["--min_count", "2"],
            ["zebra", "the", "Ice cream", "cat", "ant"],
            OFTEN + ["ice cream", "ant"],
        ),
    ],
)
def test_word_list_of_captions(tmp_path, capsys, flags, extra, expected):
    if extra:
        (tmp_path / "extra.txt").write_text("\n".join(extra) + "\n")
        flags = [*flags, "--extra", str(tmp_path / "extra.txt")]
    for captions in (CAPTIONS, CAPTIONS[::-1]):  # the order of the samples does not matter
        data = captions_file(tmp_path / "data.json", captions)
        main(["words", "--data", data, "--out", f"{tmp_path}/words.txt", *flags])
        assert (tmp_path / "words.txt").read_bytes().decode() == "\n".join(expected) + "\n"
        assert read_words(tmp_path / "words.txt") == expected
        assert f"{len(expected)} words" in capsys.readouterr().out


def test_a_word_occurs_five_times_or_more(tmp_path):
    data = captions_file(tmp_path / "data.json", ["four five"] * 4 + ["five"])
    main(["words", "--data", data, "--out", f"{tmp_path}/words.txt"])
    assert read_words(tmp_path / "words.txt") == ["five"]
    with pytest.raises(UserError, match=r"data.json: no word is left; lower --min_count"):
        main(["words", "--data", data, "--out", f"{tmp_path}/none.txt", "--min_count", "6"])
    assert not (tmp_path / "none.txt").exists()


def write_list(tmp_path, captions, *flags, extra=None):
    """The words that labels.py words writes."""
    if extra is not None:
        (tmp_path / "extra.txt").write_text("\n".join(extra) + "\n", encoding="utf-8")
        flags = [*flags, "--extra", f"{tmp_path}/extra.txt"]
    data = captions_file(tmp_path / "data.json", captions)
    main(["words", "--data", data, "--out", f"{tmp_path}/words.txt", *flags])
    written = (tmp_path / "words.txt").read_text(encoding="utf-8").splitlines()
    assert read_words(tmp_path / "words.txt") == written
    return written


def test_words_reports_the_words_of_each_source(tmp_path, capsys):
    extra = ["cat", "ant", "bee", "the", "x"]
    write_list(tmp_path, CAPTIONS, "--min_count", "2", extra=extra)
    out = capsys.readouterr().out
    assert "5 words of the captions: dog, apple, cat, red-hot, zebra\n" in out
    assert f"2 more of the 5 in {tmp_path}/extra.txt: ant, bee\n" in out
    assert f"7 words in {tmp_path}/words.txt\n" in out


def test_stop_words_and_single_letters_of_neither_source_are_kept(tmp_path):
    """Lines of 2of12, single letters, contractions and what starts with an apostrophe among them; a
    phrase goes if it holds nothing else. Without a tagger, adverbs stay."""
    captions = ["him itself someone others her hers a b himself them themselves anyone dog"]
    dropped = "the a x will don't ain't we'd weren't would've y'all who've whom somebody Nobody"
    kept = "quickly 'twas jack-o'-lantern will-o'-the-wisp about-face air-to-air bird's-eye Dog's"
    extra = [*dropped.split(), *kept.split(), "bird of prey", "of the", "x y", "vitamin C"]
    expected = [*kept.lower().split(), "bird of prey", "vitamin c"]
    found = write_list(tmp_path, captions, "--min_count", "1", extra=extra)
    assert found == ["dog", *expected]


def test_marks_belong_to_letters(tmp_path):
    """Hindi and Bengali vowels, accents that are written apart, and the joiner of Persian."""
    hindi = ["\u0915\u0941\u0924\u094d\u0924\u093e", "\u0918\u093e\u0938"]  # dog, grass
    bengali = "\u09ac\u09bf\u09a1\u09bc\u09be\u09b2"  # cat, its ra in two parts, as in NFC
    persian = "\u0645\u06cc\u200c\u0631\u0648\u062f"  # goes
    caption = f"{hindi[0]} {hindi[1]}, {bengali}. {persian} cafe\u0301 CAF\u00c9"
    found = write_list(tmp_path, [caption], "--min_count", "1", extra=["cafe\u0301", hindi[1]])
    assert found == ["caf\u00e9", *sorted([*hindi, bengali, persian])]


def test_a_syllable_of_korean_is_no_single_letter(tmp_path):
    assert write_list(tmp_path, ["\uac1c a"], "--min_count", "1") == ["\uac1c"]


@pytest.mark.parametrize(
    "caption",
    [
        "\u4e00\u53ea\u72d7\u5728\u8349\u5730\u4e0a\u8dd1\u3002 LED",  # Chinese
        "\u0e2a\u0e38\u0e19\u0e31\u0e02\u0e27\u0e34\u0e48\u0e07",  # Thai
        "\u3053\u306e\u72ac\u306f\u30dc\u30fc\u30eb",  # Japanese
    ],
)
def test_captions_without_spaces_between_words_need_a_list(tmp_path, caption):
    with pytest.raises(UserError, match="data.json: .* without spaces between words.*--words"):
        write_list(tmp_path, [caption] * 5)
    assert not (tmp_path / "words.txt").exists()
    dog, sky = "\u72d7", "\u0e17\u0e49\u0e2d\u0e07\u0e1f\u0e49\u0e32"
    found = write_list(
        tmp_path, [caption, "red door, red door"], "--min_count", "1", extra=[dog, sky]
    )
    assert [word for word in found if word != "led"] == ["door", "red", dog, sky]


def test_words_of_any_language_and_possessives(tmp_path):
    """Dog's, cats\u2019 and its kind count as dog and cats; digits and underscores part words;
    hyphens only inside."""
    text = (
        "A dog's tail, the DOG’S tail; cats' café Über naïve-éclair "
        "3d r2d2 60mph 20th under_score -edge- o'clock don't we'll"
    )
    main(
        [
            "words",
            "--data",
            captions_file(tmp_path / "data.json", [text]),
            "--out",
            f"{tmp_path}/words.txt",
            "--min_count",
            "1",
        ]
    )
    assert set(read_words(tmp_path / "words.txt")) == {
        "dog",
        "tail",
        "cats",
        "caf\u00e9",
        "\u00fcber",
        "na\u00efve-\u00e9clair",
        "score",
        "edge",
        "clock",
    }
    assert read_words(tmp_path / "words.txt")[:2] == ["dog", "tail"]  # twice each


def test_a_tagger_leaves_nouns_adjectives_and_verbs(tmp_path):
    """Of captions and of the other list. Light is a noun after `the`, elsewhere an adverb. spaCy
    parts words at hyphens: one part that is wanted is enough."""
    nlp = spacy.blank("en")
    ruler = nlp.add_pipe("attribute_ruler")
    for word, pos in [
        ("dog", "NOUN"),
        ("light", "ADV"),
        ("quickly", "ADV"),
        ("red", "ADJ"),
        ("ran", "VERB"),
        ("striped", "VERB"),
        ("paris", "PROPN"),
        ("two", "NUM"),
        ("the", "DET"),
        ("hot", "ADJ"),
        ("one", "NUM"),
        ("twenty", "NUM"),
    ]:
        ruler.add([[{"LOWER": word}]], {"POS": pos})
    ruler.add([[{"LOWER": "the"}, {"LOWER": "light"}]], {"POS": "NOUN"}, index=1)
    nlp.to_disk(tmp_path / "pipeline")
    captions = [
        "The Dog's red dog ran.",
        "The light ran quickly, light, light!",
        "Two striped dog in Paris, red-hot, twenty-one",
    ]
    extra = ["hot dog", "quickly", "hot-red", "two twenty", "dog"]
    flags = ["--min_count", "1", "--tagger", f"{tmp_path}/pipeline"]
    found = write_list(tmp_path, captions, *flags, extra=extra)
    assert found == ["dog", "ran", "light", "red", "red-hot", "striped", "hot dog", "hot-red"]


def test_a_tagger_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(OSError, match="Can't find model 'no_such_pipeline'"):  # cli prints it
        main(
            [
                "words",
                "--data",
                captions_file(tmp_path / "data.json"),
                "--out",
                f"{tmp_path}/words.txt",
                "--tagger",
                "no_such_pipeline",
            ]
        )
    assert not (tmp_path / "words.txt").exists()


@pytest.mark.parametrize(
    "line",
    [
        "0, tench",
        "n01440764 tench",
        "['aerosol_can', 'air_conditioner'" + 900 * ", 'alarm_clock'" + "]",
        "air_conditioner",
        "St. Bernard",
        "hot  dog",
        "hot\tdog",
        "the dog runs over the grass",
        "dog-",
        "--",
        "\u0301",
        "m\u00b2",
        "d" * 51,
    ],
)
def test_a_line_that_is_no_word_is_refused(tmp_path, line):
    (tmp_path / "words.txt").write_text(f"red\n\nsky\n{line}\ndoor\n", encoding="utf-8")
    with pytest.raises(UserError, match="words.txt, line 4: ") as e:
        read_words(tmp_path / "words.txt")
    assert "is no word: a line holds up to five words" in str(e.value) and len(str(e.value)) < 400


def test_spaces_around_words_and_repeats_do_not_count(tmp_path):
    lines = ["\ufeffred", " dog", "dog ", "", "caf\u00e9", "cafe\u0301", "red", "ice cream", "\t"]
    lines += ["jack-o\u2019-lantern", "jack-o'-lantern", "t\u2011shirt", "t-shirt", "d" * 50]
    (tmp_path / "words.txt").write_text("\r\n".join(lines), encoding="utf-8")
    expected = ["red", "dog", "caf\u00e9", "ice cream", "jack-o'-lantern", "t-shirt", "d" * 50]
    assert read_words(tmp_path / "words.txt") == expected


def test_a_list_without_words_is_refused(tmp_path):
    (tmp_path / "words.txt").write_text(" \n\n")
    with pytest.raises(UserError, match="words.txt: the word list is empty"):
        read_words(tmp_path / "words.txt")


# --------------------------------------------------------------------------------------------- show


@pytest.fixture
def red_and_blue(tmp_path):
    """Two images of 2 x 2 patches, one red, one blue, with labels and truth by hand, and an
    encoder for them."""
    samples = [
        {
            "image": name,
            "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "x"}],
        }
        for name in ("red.png", "blue.png")
    ]
    (tmp_path / "data.json").write_text(json.dumps(samples))
    for color in ("red", "blue"):
        Image.new("RGB", (40, 40), color).save(tmp_path / f"{color}.png")
    torch.manual_seed(5)
    config = dict(
        embed_dim=16,
        vision_cfg=dict(image_size=8, patch_size=4, width=32, layers=2, head_width=16),
        text_cfg=dict(context_length=77, vocab_size=49408, width=16, heads=2, layers=1),
    )
    (tmp_path / "clip").mkdir()
    save_file(
        shaken(open_clip.CLIP(**config)).state_dict(), tmp_path / "clip/open_clip_model.safetensors"
    )
    (tmp_path / "clip/open_clip_config.json").write_text(
        json.dumps(
            {
                "model_cfg": config,
                "preprocess_cfg": {
                    "size": 8,
                    "mean": MEAN,
                    "std": STD,
                    "interpolation": "bicubic",
                    "resize_mode": "shortest",
                },
            }
        )
    )
    truth = {
        "red.png": {"object": {"0": ["sky", "door"], "1": ["sky"]}, "background": {"3": ["wall"]}},
        "blue.png": {
            "object": {"1": ["door"], "3": ["sky", "wall"]},
            "background": {"0": ["door"], "2": ["sky"]},
        },
    }
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    ids = np.array([[[0, 1], [1, -1], [2, 0], [-1, -1]], [[2, -1], [2, 1], [-1, -1], [1, -1]]])
    scores = np.full(ids.shape, 0.5)
    scores[:, :2, 0] = 0.75  # 4 of the 9 scores
    meta = dict(
        image_list=digest(s["image"] for s in samples),
        size=8,
        mode="square",
        mean=MEAN,
        std=STD,
        grid=[2, 2],
        min_score=0.1,
        data=str(tmp_path / "data.json"),
        image_folder=str(tmp_path),
        encoder=str(tmp_path / "clip"),
        prompt="the {}",
        dtype="float32",
    )

    def make(name="labels", ids=ids):
        words = ["sky", "wall", "door"]
        folder = hand_store(tmp_path / name, words, ids, scores, shard=1, **meta)
        word_embeds = word_embeddings(load_encoder(str(tmp_path / "clip")), words, "the {}")
        np.save(folder / "words.npy", word_embeds.numpy())
        return folder

    make.truth = truth
    return make


def test_show_prints_how_many_and_which_words(red_and_blue, tmp_path, capsys):
    look.main(["labels", "--labels", str(red_and_blue()), "--out", f"{tmp_path}/out.png"])
    printed = capsys.readouterr().out
    assert "2 images, 3 words" in printed
    assert "these labels: 75.0% labelled, lift" in printed  # 6 of 8 patches have a label
    assert "0.00 words of each caption (0.00 of another), " in printed
    assert "3 top words: {'door': 3, 'wall': 2, 'sky': 1}" in printed
    assert "true:" not in printed


def test_show_of_one_word_and_of_none(red_and_blue, tmp_path, capsys):
    for word, share in ((1, "100.0%"), (-1, "0.0%")):
        folder = red_and_blue(f"labels{word}", ids=np.full((2, 4, 2), word))
        look.main(["labels", "--labels", str(folder), "--out", f"{tmp_path}/out.html"])
        printed = capsys.readouterr().out
        assert f"these labels: {share} labelled" in printed
        assert f"{int(word >= 0)} top words" in printed


def test_caption_agreement_by_hand():
    """Of three images two have a word of their own caption, and the first one of the last's."""
    captions = ["A dog, a cat.", "The red car", "one bird and a dog"]
    words = [["dog", "dog", "sky"], ["red car", "", "car"], ["dog cat", "tree", "car red"]]
    words = [[word for word in of_image if word] for of_image in words]
    # own: dog twice, car twice. The next one's: none. The one's after it: dog twice.
    lifts, found = labels.caption_agreement(captions, words)
    assert lifts.tolist() == [4, 2]
    # of their own captions: dog; car and red car; nothing. Of the others': nothing; dog
    assert found.tolist() == [3, 0, 1]
    nothing = [[] for of_image in words]
    assert [x.tolist() for x in labels.caption_agreement(captions, nothing)] == [[0, 0], [0, 0, 0]]
    assert len(labels.caption_agreement(captions * 3, words * 3)[0]) == 5
    assert labels.caption_agreement(captions[:1], words[:1])[0].tolist() == [1]  # says nothing


def test_caption_agreement_of_words_that_are_no_plain_ones():
    """A word of Chinese stands anywhere in its caption; others as a whole, case and spelling of
    letters and apostrophes aside."""
    captions = ["Cafe\u0301: a shepherd\u2019s pie", "\u4e00\u53ea\u72d7\u5728\u8349\u5730"]
    words = [["caf\u00e9", "shepherd's pie", "shepherd", "pi", "herd"], ["\u72d7", "\u8349\u5730"]]
    _, found = labels.caption_agreement(captions, words)
    assert found.tolist() == [5, 0]


def share_by_hand(truth, best):
    """{kind: share}: of the patches that are judged, those whose best word is among the true
    ones."""
    hits = [
        (kind, best[image][int(at)] in true)
        for image, kinds in truth.items()
        for kind, patches in kinds.items()
        for at, true in patches.items()
    ]
    return {
        kind: np.mean([hit for k, hit in hits if kind in (k, "all")])
        for kind in ("object", "background", "all")
    }


def test_show_prints_how_true_the_labels_and_all_paths_are(red_and_blue, tmp_path, capsys):
    folder = red_and_blue()
    clip = load_encoder(str(tmp_path / "clip"))
    word_embeds = word_embeddings(clip, ["sky", "wall", "door"], "the {}")
    np.save(folder / "words.npy", word_embeds.numpy())
    look.main(
        [
            "labels",
            "--labels",
            str(folder),
            "--out",
            f"{tmp_path}/out.png",
            "--truth",
            f"{tmp_path}/truth.json",
            "--compare",
        ]
    )
    printed = capsys.readouterr().out
    lines = [line.strip() for line in printed.splitlines()]

    def shares_of(name):
        [at] = [i for i, line in enumerate(lines) if line.startswith(name)]
        return lines[at + 1]

    # 3 of 4, 1 of 3, 4 of 7
    expected = {"object": 0.75, "background": 0.333, "all": 0.571}
    assert shares_of("these labels:") == f"true: {expected}"
    words, rows = word_embeds.double(), set()
    for path in ("last", "value", "vv"):
        for sign in (1, -1):
            best = {}
            for name in ("red.png", "blue.png"):
                pixels = geometry(
                    Image.open(tmp_path / name), size=8, mode="square", mean=MEAN, std=STD
                )
                scores = (
                    sign
                    * (patch_embeddings(clip, pixels[None], path)[0].double() @ words.T).numpy()
                )
                best[name] = [
                    ["sky", "wall", "door"][s.argmax()] if s.max() > 0 else "" for s in scores
                ]
            by_hand = share_by_hand(red_and_blue.truth, best).items()
            shares = str({kind: round(float(share), 3) for kind, share in by_hand})
            assert shares_of(f"{path}, sign {sign:+}:") == f"true: {shares}"
            rows.add(shares)
    assert len(rows) > 2


@pytest.fixture
def drawn(monkeypatch):
    """The arguments of each call of look.draw_words."""
    calls = []
    draw_words = look.draw_words

    def noted(*arguments):
        draw_words(*arguments)
        calls.append(arguments)

    monkeypatch.setattr(look, "draw_words", noted)
    return calls


def test_show_draws_each_image_with_all_its_words(red_and_blue, tmp_path, drawn):
    folder = red_and_blue()
    look.main(["labels", "--labels", str(folder), "--out", f"{tmp_path}/out.html"])
    [(panels_of, image_folder, seen, grid, file, truth)] = drawn
    assert (image_folder, file, truth) == (str(tmp_path), f"{tmp_path}/out.html", {})
    assert (seen, grid) == ({"size": 8, "mode": "square"}, [2, 2])  # as they were labelled
    top_words = []
    for i, panels in enumerate(panels_of.values()):
        top_words.append([found[0][0] if found else "" for found in panels["labels"]])
        ids, scores = LabelStore(folder)[i]
        for found, patch_ids, patch_scores in zip(panels["labels"], ids, scores):
            assert len(found) == (patch_ids >= 0).sum()
            for (_, score), expected in zip(found, patch_scores):
                assert score == pytest.approx(expected.item(), abs=6e-4)
    assert top_words == [["sky", "wall", "door", ""], ["door", "door", "", "wall"]]


@pytest.mark.parametrize("images, rows", [(1, [0]), (3, [0, 8, 16]), (99, range(24))])
def test_show_draws_images_from_all_over_the_data(
    world, store, samples, tmp_path, drawn, images, rows
):
    look.main(
        ["labels", "--labels", str(store), "--out", f"{tmp_path}/o.html", "--images", str(images)]
    )
    [(panels_of, image_folder, seen, *_)] = drawn
    assert list(panels_of) == [samples[row]["image"] for row in rows]
    assert (image_folder, seen) == (str(world / "images"), {"size": 30, "mode": "square"})


def test_show_refuses_other_samples(world, store, samples, tmp_path, drawn):
    (tmp_path / "data.json").write_text(json.dumps(samples[::-1]))
    with pytest.raises(UserError, match="made with image_list = .*, this run has image_list = "):
        look.main(["labels", "--labels", str(store), "--data", f"{tmp_path}/data.json"])
    assert not drawn


def test_show_finds_data_that_has_moved(world, settings, samples, tmp_path, drawn):
    images = shutil.copytree(world / "images", tmp_path / "images")
    shutil.copy(world / "train.json", tmp_path / "data.json")
    changed = dict(data=str(tmp_path / "data.json"), image_folder=str(images))
    store = world_store(settings, tmp_path / "labels", **changed)
    shutil.move(images, tmp_path / "elsewhere")
    shutil.move(tmp_path / "data.json", tmp_path / "moved.json")
    arguments = ["labels", "--labels", str(store), "--data", f"{tmp_path}/moved.json"]
    arguments += ["--out", f"{tmp_path}/out.html"]
    with pytest.raises(UserError, match="images/0.png: cannot read the image"):
        look.main(arguments)
    look.main([*arguments, "--image_folder", f"{tmp_path}/elsewhere"])
    assert len(drawn) == 1


def test_show_of_the_tiny_world(store, tmp_path, capsys):
    look.main(["labels", "--labels", str(store), "--out", f"{tmp_path}/out.html", "--images", "3"])
    assert (tmp_path / "out.html").read_text().count("data:image/png") == 3
    share = np.mean(
        [(LabelStore(store)[i][0] >= 0).any(-1).float().mean().item() for i in range(24)]
    )
    assert re.search(f"these labels: +{share:.1%} labelled", capsys.readouterr().out)


# ---------------------------------------------------------------------------------------------- CLI


def command(settings, out, **changed):
    return ["extract", "--out", str(out), *(f"--{k}={v}" for k, v in (settings | changed).items())]


def test_extract_from_the_command_line(settings, store, tmp_path):
    main(command(settings, tmp_path / "labels", workers=1))
    assert same(tmp_path / "labels", store)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["words", "--data", "x", "--out", "y", "--min_cuont", "3"],
            "unrecognized arguments: --min_cuont",
        ),
        (["words", "--data", "x", "--out", "y", "--min", "3"], "unrecognized arguments: --min"),
        (["words", "--data", "x"], "required: --out"),
        (
            ["extract", "--data", "x", "--words", "x", "--out", "x", "--path", "v"],
            "invalid choice: 'v'",
        ),
        (["label"], "invalid choice: 'label'"),
    ],
)
def test_flags_that_do_not_exist_are_refused(capsys, arguments, message):
    with pytest.raises(SystemExit) as e:
        main(arguments)
    assert e.value.code == 2 and message in capsys.readouterr().err


def test_errors_name_the_file_or_the_flag(settings, tmp_path):
    (tmp_path / "empty").mkdir()
    for arguments, message in [
        (
            command(settings, tmp_path / "out", data=tmp_path / "no.json"),
            "no.json: no such data file",
        ),
        (
            command(settings, tmp_path / "out", words=tmp_path / "no.txt"),
            "no.txt: cannot read the word list",
        ),
        (
            command(settings, tmp_path / "out", encoder="ViT-B-32"),
            "--encoder ViT-B-32: .*MODEL/WEIGHTS",
        ),
        (
            command(settings, tmp_path / "out", encoder="ViT-B-32/none"),
            "--encoder ViT-B-32/none: .*'none'",
        ),
        (
            command(settings, tmp_path / "out", encoder=tmp_path / "empty"),
            "--encoder .*empty: cannot be loaded",
        ),
        *[
            (
                command(settings, tmp_path / "out", min_score=score),
                f"--min_score {score}: must be 0",
            )
            for score in (-0.1, 1.0, 5.0)
        ],
        (
            command(settings, tmp_path / "out", min_score="nan"),
            "--min_score must be .*, not nan",
        ),
    ]:
        with pytest.raises(UserError, match=message):
            main(arguments)
    assert not (tmp_path / "out").exists()


def test_a_folder_without_weights_is_refused(world, settings, tmp_path):
    shutil.copytree(
        world / "clip", tmp_path / "clip", ignore=shutil.ignore_patterns("*.safetensors")
    )
    with pytest.raises(UserError, match="--encoder .*clip: cannot be loaded"):
        extract(**settings | dict(encoder=str(tmp_path / "clip")), out=str(tmp_path / "out"))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("content", [None, b"nonsense"], ids=["missing", "unreadable"])
def test_a_bad_image_ends_the_command_with_one_line_that_names_it(
    world, settings, tmp_path, content, workers
):
    images = shutil.copytree(world / "images", tmp_path / "images")
    (images / "9.png").unlink() if content is None else (images / "9.png").write_bytes(content)
    with pytest.raises(SystemExit) as e:
        cli(
            lambda: main(
                command(settings, tmp_path / "out", image_folder=images, workers=workers, shard=4)
            )
        )
    assert re.fullmatch(
        rf"error: {re.escape(str(images))}/9.png: (cannot read|not a readable) .*", e.value.code
    )
    with pytest.raises(
        UserError, match="4 of 6 files are missing"
    ):  # the files before that of the bad image are there
        LabelStore(tmp_path / "out")
    shutil.copy(world / "images/9.png", images)
    main(command(settings, tmp_path / "out", image_folder=images, workers=workers, shard=4))
    assert same(tmp_path / "out", world_store(settings, tmp_path / "whole", shard=4))
