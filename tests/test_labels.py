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
import zlib
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

import figures
import labels
from data import UserError, cli, geometry, load_samples
from labels import (
    LabelStore,
    _search,
    digest,
    encoder_preprocess,
    extract,
    load_encoder,
    main,
    nearest_words,
    patch_embeddings,
    patch_paths,
    read_words,
    record_type,
    weights_crc,
    word_embeddings,
)

MEAN, STD = (
    (0.48, 0.46, 0.41),
    (0.27, 0.26, 0.28),
)  # of the tiny world, whose images are 30 x 30, patches 6 x 6


# ------------------------------------------------------------------------------------ nearest words


def sorted_words(patches, words, n, sign, min_score):
    """A full stable sort of all scores, in float64."""
    scores = sign * (patches.double() @ words.double().T).numpy()
    order = np.argsort(-scores, axis=1, kind="stable")[:, :n]
    best = np.take_along_axis(scores, order, 1)
    rows, columns = max(0, n - len(words)), best > min_score
    pad = ((0, 0), (0, rows))
    return (
        torch.from_numpy(np.pad(np.where(columns, order, -1), pad, constant_values=-1)),
        torch.from_numpy(np.pad(np.where(columns, best, 0), pad)),
    )


def vectors(kind, P, q, seed=0):
    """integers: few different scores, hence ties everywhere, and all of them exact. random:
    hardly ever a tie."""
    g = torch.Generator().manual_seed(seed)
    if kind == "integers":
        return [torch.randint(-2, 3, (rows, 3), generator=g).float() for rows in (P, q)]
    return [
        F.normalize(torch.randn(rows, 6, generator=g, dtype=torch.float64), dim=-1)
        for rows in (P, q)
    ]


@pytest.mark.parametrize("kind", ["integers", "random"])
@pytest.mark.parametrize(
    "P, q, n, sign, min_score",
    [
        (40, 1, 10, 1, 0),
        (40, 9, 10, -1, 0),
        (40, 10, 10, 1, 0),
        (40, 10, 1, -1, 0),
        (40, 11, 10, 1, 0.5),
        (40, 5000, 10, -1, 0),
        (40, 5000, 10, 1, 7.5),
        (40, 5000, 4200, 1, 0),
        (12, 50_000, 10, 1, 0.9),
        (12, 50_000, 1, -1, 0),
        (4100, 7, 4, 1, 0.3),
        (4096, 5, 5, -1, 0),
        (1, 4097, 3, 1, 0),
    ],
)
def test_nearest_words_equal_a_full_stable_sort(kind, P, q, n, sign, min_score):
    patches, words = vectors(kind, P, q)
    ids, scores = nearest_words(patches, words, n, sign, min_score)
    expected_ids, expected_scores = sorted_words(patches, words, n, sign, min_score)
    assert (
        ids.dtype == torch.int64
        and scores.dtype == torch.float32
        and ids.shape == scores.shape == (P, n)
    )
    assert ids.equal(expected_ids)
    torch.testing.assert_close(scores.double(), expected_scores, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "sign, expected_ids, expected_scores",
    [
        (1, [[1, 3, 5, 0], [2, -1, -1, -1]], [[0.75, 0.75, 0.75, 0.25], [0.5, 0, 0, 0]]),
        (-1, [[2, 4, -1, -1], [1, 3, 5, 0]], [[0.5, 0.5, 0, 0], [0.75, 0.75, 0.75, 0.25]]),
    ],
)
def test_nearest_words_by_hand(sign, expected_ids, expected_scores):
    """Words 1, 3 and 5 are the same, so are 2 and 4; the second patch is the opposite of the
    first, but for word 4."""
    words = torch.tensor([[0.25, 0], [0.75, 0], [-0.5, 0], [0.75, 0], [-0.5, 0.5], [0.75, 0]])
    ids, scores = nearest_words(torch.tensor([[1.0, 0], [-1.0, -1.0]]), words, 4, sign)
    assert ids.tolist() == expected_ids and scores.tolist() == expected_scores


def test_a_word_at_min_score_is_left_out():
    ids, scores = nearest_words(
        torch.ones(1, 1), torch.tensor([[0.5], [0.25], [0.125], [0.0]]), 4, 1, min_score=0.25
    )
    assert ids.tolist() == [[0, -1, -1, -1]] and scores.tolist() == [[0.5, 0, 0, 0]]


def test_equal_words_more_than_a_block_apart_come_by_id():
    words = (
        F.normalize(torch.randn(20_000, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
        * 0.9
    )
    words[[17, 4095, 4096, 9000, 19_999]] = torch.tensor([0.0, 0, 0, 1])
    ids, _ = nearest_words(torch.tensor([[0.0, 0, 0, 1]]), words, 4, 1)
    assert ids.tolist() == [[17, 4095, 4096, 9000]]


@pytest.fixture
def stages(monkeypatch):
    """[stage, rows] of each search that nearest_words makes, of any rows."""
    seen, search, sort = [], labels._search, labels._sort

    def spied_search(patches, words, n, dtype):
        seen.append([str(dtype), len(patches)])
        return search(patches, words, n, dtype)

    def spied_sort(patch, words, n):
        if seen[-1][0] != "sort":
            seen.append(["sort", 0])
        seen[-1][1] += 1
        return sort(patch, words, n)

    monkeypatch.setattr(labels, "_search", spied_search)
    monkeypatch.setattr(labels, "_sort", spied_sort)
    return seen


@pytest.fixture(params=[True, False], ids=["bf16", "fp32"])
def fast(request, monkeypatch):
    """Whether this CPU is taken for one that multiplies bf16 fast."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: request.param)
    return request.param


def spread(P, q, sigma=None, d=768, seed=0):
    """Random unit vectors [P, d], [q, d]. With sigma the words are one vector or its opposite,
    but for what moves scores by so much: their mean tells nothing."""
    g = torch.Generator().manual_seed(seed)
    patches, words = torch.randn(P, d, generator=g), torch.randn(q, d, generator=g)
    if sigma:
        common = F.normalize(torch.randn(d, generator=g), dim=0)
        opposite = torch.randint(0, 2, (q, 1), generator=g) * 2 - 1
        patches, words = common + 0.03 * patches, opposite * common + sigma * words
    return F.normalize(patches, dim=-1), F.normalize(words, dim=-1)


def assert_sorted(found, patches, words, n, sign=1, min_score=0.0):
    expected_ids, expected_scores = sorted_words(patches, words, n, sign, min_score)
    assert found[0].equal(expected_ids)
    torch.testing.assert_close(found[1].double(), expected_scores, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sign", [1, -1])
def test_random_words_are_found_by_the_first_search(fast, stages, sign):
    patches, words = spread(70, 20_000)
    assert_sorted(nearest_words(patches, words, 10, sign), patches, words, 10, sign)
    assert stages == [[str(torch.bfloat16 if fast else torch.float32), 70]]


def test_words_that_share_a_component_are_found_by_the_first_search(fast, stages):
    """Their mean, which changes no order, is not what is rounded."""
    patches, words = spread(70, 20_000)
    words = F.normalize(5 * patches.mean(0) / patches.mean(0).norm() + words, dim=-1)
    assert_sorted(nearest_words(patches, words, 10, 1, -1.0), patches, words, 10, 1, -1.0)
    assert len(stages) == 1


def test_words_too_close_together_for_bf16_are_found_in_float32(fast, stages):
    patches, words = spread(40, 20_000, sigma=1e-3)
    assert_sorted(nearest_words(patches, words, 10, 1), patches, words, 10)
    assert stages == [["torch.bfloat16", 40]] * fast + [["torch.float32", 40]]


def test_words_too_close_together_for_float32_are_sorted(fast, stages):
    patches, words = spread(20, 20_000, sigma=2e-6)
    assert_sorted(nearest_words(patches, words, 10, 1), patches, words, 10)
    assert stages == [["torch.bfloat16", 20]] * fast + [["torch.float32", 20], ["sort", 20]]


@pytest.mark.parametrize("q, d", [(20_000, 768), (12_289, 768), (8195, 33), (4097, 1024)])
def test_more_equal_best_words_than_candidates_are_sorted(fast, stages, q, d):
    """Words 0 to 3 are the best of a patch each, 60 times over, where 5 n have 44 candidates;
    patch 4 has no such."""
    patches, words = spread(5, q, d=d)
    index = np.arange(q)
    copies = np.random.default_rng(0).permutation(np.arange(4, q))[:240].reshape(4, 60)
    for word, places in enumerate(copies):
        words[word] = F.normalize(patches[word] + 0.01 * words[word], dim=0)
        words[places], index[places] = words[word].clone(), word
    scores = np.stack([(words.double() * p).sum(1).numpy() for p in patches.double()])[
        :, index
    ]  # of copies, the same
    expected = np.argsort(-scores, axis=1, kind="stable")[:, :5]
    for word in range(4):
        assert expected[word].tolist() == sorted([word, *copies[word]])[:5]
    assert nearest_words(patches, words, 5, 1)[0].tolist() == expected.tolist()
    assert stages[-1] == ["sort", 4]


def test_a_bound_that_is_reached_is_no_proof():
    """Every score is 0, and so is the bound: words with lower ids than those found may score as
    much."""
    ids, scores = nearest_words(torch.zeros(2, 8), spread(1, 500, d=8)[1], 3, 1, min_score=-0.5)
    assert ids.tolist() == [[0, 1, 2]] * 2 and scores.tolist() == [[0.0] * 3] * 2


def test_what_cannot_pass_min_score_is_not_searched_again(fast, stages):
    patches, words = spread(40, 20_000, sigma=1e-3)
    ids, scores = nearest_words(patches, words, 10, 1, min_score=1.1)
    assert (ids == -1).all() and (scores == 0).all() and len(stages) == 1


class Candidates(TorchDispatchMode):
    """The ids of the words that are scored in float64."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if (
            func is torch.ops.aten.index.Tensor
            and len(args[1]) == 1
            and args[1][0].dtype == torch.int64
            and args[0].is_floating_point()
        ):
            self.ids.append(args[1][0])
        return func(*args, **(kwargs or {}))

    def __enter__(self):
        self.ids = []
        return super().__enter__()


def hidden_by_rounding(kind):
    """A patch and words, most of them the same, that score more than their product tells; the mean
    word is 0.

    In bf16, whose numbers near 1 are multiples of 1/128: just less than half of that is rounded off
    patch and word ("factors") and, more than these alone explain, off their product as well. In
    float32: small numbers are lost where they are added to 1 ("addition").
    """
    step, half = 2**-7, 2**-7 * 0.4999
    small = torch.full((32_768,), 2.0**-25)
    small[0], small[-1] = 1, -1
    patch, word = {
        "factors": (torch.tensor([1 + half]), torch.tensor([1 + half])),
        "product": (torch.tensor([1 + 7 * step + half]), torch.tensor([1 + 9 * step + half])),
        "negative product": (
            torch.tensor([1 + 7 * step - half]),
            torch.tensor([-1 - 10 * step + half]),
        ),
        "addition": (torch.ones(32_768), small),
    }[kind]
    others = -8 * word.expand(25, -1) if kind == "negative product" else -word.expand(200, -1)
    return patch.expand(3, -1).clone(), torch.cat([word.expand(200, -1), others])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "kind",
    [
        "random",
        "close",
        "closest",
        "few",
        "double",
        "long",
        "factors",
        "addition",
        "product",
        "negative product",
    ],
)
def test_no_word_beyond_the_candidates_scores_more_than_the_bound(kind, dtype):
    n = 2  # 32 candidates
    if kind in ("random", "close", "closest", "few", "double", "long"):
        patches, words = spread(
            50, 9000, {"close": 1e-3, "closest": 1e-7}.get(kind), d=3 if kind == "few" else 768
        )
        if kind == "double":
            patches, words = (F.normalize(v.double() + 1e-9, dim=-1) for v in (patches, words))
        if kind == "long":
            patches, words = patches * 7.3, words * torch.linspace(0.1, 9, 9000)[:, None]
    else:
        patches, words = hidden_by_rounding(kind)
    with Candidates() as candidates:
        ids, scores, bound = _search(patches, words, n, dtype)
    chosen = torch.cat(candidates.ids)
    assert chosen.shape == (len(patches), 4 * n + 24) and all(
        len(set(row)) == 32 for row in chosen.tolist()
    )
    exact = patches.double() @ words.double().T
    assert (exact.scatter(1, chosen, -torch.inf).amax(1) <= bound).all()
    assert (
        bound - exact.gather(1, chosen).amin(1)
        < 0.1 * patches.norm(dim=1) * words.norm(dim=1).max()
    ).all()
    torch.testing.assert_close(scores, exact.gather(1, chosen).topk(n)[0])
    torch.testing.assert_close(exact.gather(1, ids), scores)


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


def test_memory_does_not_grow_with_the_number_of_words(fast):
    peaks = []
    for q in (16_384, 131_072):
        patches, words = (v.float() for v in vectors("random", 128, q))
        with PeakMemory() as memory:
            nearest_words(patches, words, 3, 1)
        peaks.append(memory.peak)
    assert peaks[0] >= 128 * 4096 * (2 if fast else 4)  # it did see a block of scores
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
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def world_store(settings, folder, **changed):
    extract(**settings | changed, out=str(folder))
    return folder


@pytest.mark.parametrize(
    "path, sign, more",
    [
        ("last", -1, {}),
        ("value", 1, {}),
        ("vv", 1, {}),
        ("value", 1, dict(center=True)),
        ("vv", -1, dict(center=True, n=20)),
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
    if "center" in more:
        embeds = F.normalize(embeds - embeds.mean(0), dim=-1)
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
    assert (found["crc"] == expected["crc"]).all() and not same(half, store)
    agree = (found["ids"] == expected["ids"]).mean()
    print(f"bfloat16: {agree:.1%} of the labels are those of float32")
    assert agree > 0.8
    np.testing.assert_allclose(found["scores"], expected["scores"], atol=0.06)
    assert ((found["ids"] < 10) | (found["ids"] == 65535)).all()
    assert ((found["ids"] == 65535) == (found["scores"] == 0)).all() and (
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


def hand_store(folder, words, ids, scores=0.25, id_type=np.uint16, shard=2, **meta):
    """A store written file by file; ids [images, m, n] with -1 for none."""
    ids = np.asarray(ids)
    folder.mkdir()
    (folder / "words.txt").write_text("\n".join(words) + "\n")
    meta = dict(images=len(ids), shard=shard, n=ids.shape[2], words=digest(words)) | meta
    (folder / "meta.json").write_text(json.dumps(meta))
    rows = np.zeros(
        len(ids),
        [
            ("ids", id_type, ids.shape[1:]),
            ("scores", np.float16, ids.shape[1:]),
            ("crc", np.uint32),
        ],
    )
    rows["ids"], rows["scores"] = ids.astype(id_type), np.where(ids < 0, 0, scores)
    rows["crc"] = np.arange(len(ids)) + 7
    for k in range(-(-len(ids) // shard)):
        np.save(folder / f"labels-{k:05}.npy", rows[k * shard : (k + 1) * shard])
    return folder


@pytest.mark.parametrize(
    "count, dtype", [(10, np.uint16), (65_534, np.uint16), (65_535, np.int32), (70_000, np.int32)]
)
def test_no_label_stays_apart_from_the_last_word(tmp_path, count, dtype):
    words = [f"w{i}" for i in range(count)]
    wanted = [[[-1, 0, count - 1], [count - 2, -1, min(count - 1, 65_535)]]]
    assert record_type(count, 2, 3)["ids"] == np.dtype((dtype, (2, 3)))
    store = LabelStore(hand_store(tmp_path / "labels", words, wanted, id_type=dtype))
    assert [store[0][0].tolist()] == wanted and store.words == words
    assert (store[0][1] == torch.tensor(wanted[0]).ge(0) * 0.25).all()


@pytest.mark.parametrize("shard", [1, 2, 3, 4, 7])
def test_label_i_is_row_i_of_the_files_together(tmp_path, shard):
    ids = np.random.default_rng(0).integers(-1, 9, (7, 4, 2))
    store = LabelStore(hand_store(tmp_path / "labels", "abcdefghi", ids, shard=shard))
    assert len(store) == 7
    for i in range(7):
        assert store[i][0].tolist() == ids[i].tolist() and store.record(i)["crc"] == i + 7


def test_a_store_may_return_the_best_labels_only(tmp_path):
    ids = np.random.default_rng(0).integers(-1, 9, (3, 4, 5))
    folder = hand_store(tmp_path / "labels", "abcdefghi", ids)
    with pytest.raises(UserError, match="labels: has 5 labels per patch, not 6"):
        LabelStore(folder, max_labels=6)
    for best, whole in zip(LabelStore(folder, max_labels=2), LabelStore(folder)):
        assert [x.shape for x in best] == [(4, 2)] * 2 and whole[0].shape == (4, 5)
        assert all(torch.equal(x, y[:, :2]) for x, y in zip(best, whole))


def test_the_labels_of_558_128_images_need_14_gigabytes():
    for q, itemsize in [(60_000, 576 * 10 * (2 + 2) + 4), (70_000, 576 * 10 * (4 + 2) + 4)]:
        assert record_type(q, 576, 10).itemsize == itemsize
    assert 558_128 * record_type(60_000, 576, 10).itemsize < 14e9


def test_an_open_store_costs_no_memory(tmp_path):
    """Two files of 1 GB, of which the disk holds only what is written."""
    kind, images = record_type(10, 576, 10), 2 * 45_000
    folder = hand_store(
        tmp_path / "labels", "abcdefghij", np.zeros((1, 1, 1)), images=images, shard=images // 2
    )
    for k in range(2):
        rows = np.lib.format.open_memmap(folder / f"labels-{k:05}.npy", "w+", kind, (images // 2,))
        rows[-1] = (3, 0.5, 77)
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
    assert (
        len(store) == images
        and (ids == 3).all()
        and (scores == 0.5).all()
        and store.record(images - 1)["crc"] == 77
    )
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
    (copy / "labels-00001.npy.part").write_bytes(b"half")  # of a process that was killed
    finished = np.load(copy / "labels-00002.npy")
    finished["ids"][0] = 1  # a finished file is not made again
    np.save(copy / "labels-00002.npy", finished)
    with pytest.raises(UserError, match="only 14 of 24 images are labelled; run the same"):
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


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("rank", [0, 1])
def test_word_embeddings_come_from_the_store(
    world, settings, encoder, tmp_path, monkeypatch, center, rank
):
    """From its file, whoever wrote it; centred with --center, though the file is not."""
    chosen = settings | dict(center=center, path="value", sign=1)
    stored = torch.randn(10, 16, generator=torch.Generator().manual_seed(0))
    out = world_store(chosen, tmp_path / "labels")
    for file in out.glob("labels-*"):
        file.unlink()
    np.save(out / "words.npy", stored.numpy())
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(rank + 1))
    extract(**chosen, out=str(out))
    assert np.array_equal(np.load(out / "words.npy"), stored.numpy())

    expected = stored.double()
    if center:
        expected = expected - expected.mean(0)
        expected = expected / expected.norm(dim=1, keepdim=True)
    row = 10 * rank  # the first of the rank's first file
    sample = load_samples(world / "train.json")[row]
    image = Image.open(world / "images" / sample["image"]).convert("RGB")
    pixels = geometry(image, size=30, mode="square", mean=MEAN, std=STD).unsqueeze(0)
    clip = load_encoder(str(world / "clip"))
    ids, scores = sorted_words(patch_embeddings(clip, pixels, "value")[0], expected, 4, 1, 0.05)
    record = np.load(out / f"labels-0000{rank}.npy")[0]
    assert (record["ids"] == ids.numpy().astype(np.uint16)).all()
    np.testing.assert_allclose(record["scores"], scores, rtol=1e-3, atol=1e-6)


# Ranks are processes that share nothing but the folder. A server that has imported all forks them.
server = multiprocessing.get_context("forkserver")


def rank_process(settings, rank, world, die):
    """Extract as one of `world` ranks. die: ("before" | "after", k): be killed before, or after,
    the k-th renaming."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    replace, seen = os.replace, []

    def fatal(*args):
        seen.append(args)
        if die == ("before", len(seen)):
            os.kill(os.getpid(), signal.SIGKILL)
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

    def start(out, rank=0, world=1, die=None, **changed):
        process = server.Process(
            target=rank_process, args=(settings | changed | dict(out=str(out)), rank, world, die)
        )
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
    parts = [{name for name in found if name.endswith(".part")} for found in names]
    assert set().union(*parts) == {f"{name}.part" for name in expected}
    assert [len(found) for found in parts] == [1, 0] * 6
    for found, part in zip(names, parts):
        assert not part & {
            f"{name}.part" for name in found
        }  # what is unfinished does not bear its name
    assert [len(found) for found in names[1::2]] == [1, 2, 3, 4, 5, 6]
    assert contents(out) == expected
    finish_all([launch(out, shard=8)])
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


def test_the_store_fingerprints_the_image_files(world, store, samples):
    files = [(world / "images" / s["image"]).read_bytes() for s in samples]
    assert records(store)["crc"].tolist() == [zlib.crc32(content) for content in files]


def test_check_names_what_differs(store, samples):
    geo = dict(size=30, mode="square", mean=MEAN, std=STD)
    LabelStore(store).check(samples, geo, (5, 5))
    for field, *arguments in [
        ("manifest", samples[::-1], geo, (5, 5)),
        ("size", samples, geo | {"size": 60}, (5, 5)),
        ("mode", samples, geo | {"mode": "squash"}, (5, 5)),
        ("grid", samples, geo, (5, 6)),
    ]:
        with pytest.raises(UserError, match=f"made with {field} = "):
            LabelStore(store).check(*arguments)


@pytest.mark.parametrize(
    "ids, scores", [(65535, 0.5), (3, 0.0), (3, -0.5), (3, float("nan")), (3, 0.5)]
)
def test_labels_that_train_nothing_are_refused(copy, samples, ids, scores):
    """None at all, scores of zero, negative or NaN, and one word everywhere."""
    for file in copy.glob("labels-*.npy"):
        found = np.load(file)
        found["ids"] = ids
        found["scores"] = scores
        np.save(file, found)
    geo = dict(size=30, mode="square", mean=MEAN, std=STD)
    with pytest.raises(UserError, match="of the patches have a label; SEA needs 1 % at least, and"):
        LabelStore(copy).check(samples, geo, (5, 5))


def test_equal_words_are_sorted_by_their_ids():
    """Of 4,097 words the last is alone in its block, where a matrix product rounds otherwise."""
    rng = torch.Generator().manual_seed(0)
    for _ in range(20):
        word = F.normalize(torch.randn(1, 768, generator=rng), dim=1)
        patch = F.normalize(torch.randn(768, generator=rng), dim=0)
        ids, scores = labels._sort(patch, word.expand(4097, -1), 4097)
        assert ids.tolist() == list(range(4097)) and len(scores.unique()) == 1


FLAGS = dict(
    n=3,
    sign=1,
    path="value",
    prompt="a {}",
    center=True,
    min_score=0.1,
    shard=5,
    dtype="bfloat16",
)
PREPROCESSING = dict(mean=[0.4] * 3, std=[0.5] * 3, mode="squash")
EDITED = dict(size=60, grid=[6, 6])  # nothing but another model could change these
FILES = {"images", "manifest", "words", "weights"}


def test_a_damaged_description_is_refused(settings, copy):
    (copy / "meta.json").write_text("{")
    with pytest.raises(UserError, match="copy: no label store, or a damaged one .*another --out"):
        extract(**settings, out=str(copy))


def test_every_setting_of_a_store_is_compared(store):
    tested = [*FLAGS, *PREPROCESSING, *EDITED, *FILES]
    assert sorted(tested) == sorted(
        json.loads((store / "meta.json").read_text()).keys() - {"data", "image_folder", "encoder"}
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
    elif field in ("images", "manifest"):
        chosen["data"], samples = str(tmp_path / "data.json"), load_samples(world / "train.json")
        (tmp_path / "data.json").write_text(
            json.dumps(samples[:23] if field == "images" else samples[::-1])
        )
    else:
        meta["encoder"] = chosen["encoder"] = str(clip)
        weights = load_file(clip / "open_clip_model.safetensors")
        weights["visual.proj"].view(-1).view(torch.int32)[-1] ^= 1  # the last bit of a weight
        save_file(weights, clip / "open_clip_model.safetensors")
    (copy / "meta.json").write_text(json.dumps(meta))
    (copy / "labels-00001.npy").unlink()
    before = contents(copy)
    with pytest.raises(
        UserError,
        match=rf"copy: made with {field} = .*, this run has {field} = .* another --out",
    ):
        extract(**chosen, out=str(copy))
    assert contents(copy) == before


def test_other_weights_have_another_fingerprint(world, settings, store, tmp_path):
    clip = shutil.copytree(world / "clip", tmp_path / "clip")
    weights = load_file(clip / "open_clip_model.safetensors")
    weights["visual.transformer.resblocks.1.mlp.c_fc.weight"][0, 0] += 1
    save_file(weights, clip / "open_clip_model.safetensors")
    extract(**settings | dict(encoder=str(clip)), out=str(tmp_path / "labels"))
    assert LabelStore(tmp_path / "labels").meta["weights"] != LabelStore(store).meta["weights"]


def test_data_that_has_moved_is_the_same_data(world, settings, copy, tmp_path):
    moved = shutil.copy(world / "train.json", tmp_path / "moved.json")
    clip = shutil.copytree(world / "clip", tmp_path / "clip")  # whose weights are compared
    extract(**settings | dict(data=str(moved), encoder=str(clip)), out=str(copy))
    assert len(LabelStore(copy)) == 24


@pytest.mark.parametrize("what", ["resize_mode", "nan"])
def test_an_encoder_that_would_label_wrongly_is_refused(world, settings, tmp_path, what):
    clip = shutil.copytree(world / "clip", tmp_path / "clip")
    message = "resizes images by longest"
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
            OFTEN + ["the", "Ice cream", "ant"],
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


def test_words_reports_what_it_keeps_and_drops(tmp_path, capsys):
    (tmp_path / "extra.txt").write_text("cat\nant\nbee\n")
    main(
        [
            "words",
            "--data",
            captions_file(tmp_path / "data.json"),
            "--out",
            f"{tmp_path}/words.txt",
            "--min_count",
            "2",
            "--extra",
            f"{tmp_path}/extra.txt",
        ]
    )
    out = capsys.readouterr().out
    words = "dog, apple, cat, red-hot, zebra, ant, bee"
    assert f"7 words in {tmp_path}/words.txt: {words} ..." in out


def test_words_of_any_language_and_possessives(tmp_path):
    """Dog's, cats\u2019 and its kind count as dog and cats; digits and underscores part words;
    hyphens only inside."""
    text = (
        "A dog's tail, the DOG’S tail; cats' café Über naïve-éclair "
        "3d r2d2 under_score -edge- o'clock don't we'll"
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


def test_phrases_are_words_in_a_row(tmp_path):
    """Stop words, single characters, numbers and punctuation end them, and so does a possessive."""
    captions = ["A red striped circle, on the green grass", "Red striped circle 5 dog's tail"]
    flags = ["--out", f"{tmp_path}/words.txt", "--min_count", "1", "--phrase_length"]
    data = captions_file(tmp_path / "data.json", captions)
    twice = ["circle", "red", "red striped", "red striped circle", "striped", "striped circle"]
    once = ["dog", "grass", "green", "green grass", "tail"]
    main(["words", "--data", data, *flags, "3"])
    assert read_words(tmp_path / "words.txt") == twice + once
    main(["words", "--data", data, *flags, "2"])
    twice.remove("red striped circle")
    assert read_words(tmp_path / "words.txt") == twice + once


def test_a_tagger_leaves_nouns_adjectives_and_verbs(tmp_path, capsys):
    """Light is a noun after `the`, elsewhere an adverb."""
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
    ]:
        ruler.add([[{"LOWER": word}]], {"POS": pos})
    ruler.add([[{"LOWER": "the"}, {"LOWER": "light"}]], {"POS": "NOUN"}, index=1)
    nlp.to_disk(tmp_path / "pipeline")
    captions = [
        "The Dog's red dog ran.",
        "The light ran quickly, light, light!",
        "Two striped dog in Paris",
    ]
    main(
        [
            "words",
            "--data",
            captions_file(tmp_path / "data.json", captions),
            "--out",
            f"{tmp_path}/words.txt",
            "--min_count",
            "1",
            "--tagger",
            f"{tmp_path}/pipeline",
            "--phrase_length",
            "2",
        ]
    )
    expected = ["dog", "ran", "dog ran", "light", "light ran", "red", "red dog", "striped"]
    assert read_words(tmp_path / "words.txt") == [*expected, "striped dog"]
    assert ": dog, ran, dog ran, light, light ran, red, " in capsys.readouterr().out


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
    "text, line",
    [
        ("red\nblue\nred\n", "line 3: 'red'"),
        ("red\n\nblue\n", "line 2: "),
        ("red\n  \n", "line 2: "),
        ("red\nblue\n\n", "line 3: "),
    ],
)
def test_read_words_names_the_line(tmp_path, text, line):
    (tmp_path / "words.txt").write_text(text)
    with pytest.raises(UserError, match=f"words.txt, {line}"):
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
        manifest=digest(s["image"] for s in samples),
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
        center=True,
        dtype="float32",
        weights=weights_crc(load_encoder(str(tmp_path / "clip"))),
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
    main(["show", "--labels", str(red_and_blue()), "--out", f"{tmp_path}/out.png"])
    printed = capsys.readouterr().out
    assert "2 images, 3 words" in printed
    assert "these labels: 75.0% labelled, lift" in printed  # 6 of 8 patches have a label
    assert "0.00 words of each caption (0.00 of another), " in printed
    assert "3 top words: {'door': 3, 'wall': 2, 'sky': 1}" in printed
    assert "true:" not in printed


def test_show_of_one_word_and_of_none(red_and_blue, tmp_path, capsys):
    for word, share in ((1, "100.0%"), (-1, "0.0%")):
        folder = red_and_blue(f"labels{word}", ids=np.full((2, 4, 2), word))
        main(["show", "--labels", str(folder), "--out", f"{tmp_path}/out.html"])
        printed = capsys.readouterr().out
        assert f"these labels: {share} labelled" in printed
        assert f"{int(word >= 0)} top words" in printed


def test_caption_agreement_by_hand():
    """Of three images two have a word of their own caption, and the first one of the last's."""
    captions = ["A dog, a cat.", "The red car", "one bird and a dog"]
    words = [["dog", "dog", "sky"], ["red car", "", "car"], ["dog cat", "tree", "car red"]]
    patches = [[[(word, 0.5)] if word else [] for word in of_image] for of_image in words]
    # own: dog twice, car twice. The next one's: none. The one's after it: dog twice.
    lifts, found = labels.caption_agreement(captions, patches)
    assert lifts.tolist() == [4, 2]
    # of their own captions: dog; car and red car; nothing. Of the others': nothing; dog
    assert found.tolist() == [3, 0, 1]
    nothing = [[[] for _ in of_image] for of_image in words]
    assert [x.tolist() for x in labels.caption_agreement(captions, nothing)] == [[0, 0], [0, 0, 0]]
    assert len(labels.caption_agreement(captions * 3, patches * 3)[0]) == 5
    assert labels.caption_agreement(captions[:1], patches[:1])[0].tolist() == [1]  # says nothing


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
    main(
        [
            "show",
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
    words = F.normalize(words - words.mean(0), dim=-1)
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
    """The arguments of each call of figures.draw_words."""
    calls = []
    draw_words = figures.draw_words

    def noted(*arguments):
        draw_words(*arguments)
        calls.append(arguments)

    monkeypatch.setattr(figures, "draw_words", noted)
    return calls


def test_show_draws_each_image_with_all_its_words(red_and_blue, tmp_path, drawn):
    folder = red_and_blue()
    main(["show", "--labels", str(folder), "--out", f"{tmp_path}/out.html"])
    [(panels_of, image_folder, *seen, file)] = drawn
    assert (image_folder, file) == (str(tmp_path), f"{tmp_path}/out.html")
    assert seen == [8, "square", [2, 2]]  # as they were labelled
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
    main(["show", "--labels", str(store), "--out", f"{tmp_path}/o.html", "--images", str(images)])
    [(panels_of, image_folder, size, mode, *_)] = drawn
    assert list(panels_of) == [samples[row]["image"] for row in rows]
    assert (image_folder, size, mode) == (str(world / "images"), 30, "square")


def test_show_refuses_other_samples(world, store, samples, tmp_path, drawn):
    (tmp_path / "data.json").write_text(json.dumps(samples[::-1]))
    with pytest.raises(UserError, match="made with manifest = .*, this run has manifest = "):
        main(["show", "--labels", str(store), "--data", f"{tmp_path}/data.json"])
    assert not drawn


def test_show_finds_data_that_has_moved(world, settings, samples, tmp_path, drawn):
    images = shutil.copytree(world / "images", tmp_path / "images")
    shutil.copy(world / "train.json", tmp_path / "data.json")
    changed = dict(data=str(tmp_path / "data.json"), image_folder=str(images))
    store = world_store(settings, tmp_path / "labels", **changed)
    shutil.move(images, tmp_path / "elsewhere")
    shutil.move(tmp_path / "data.json", tmp_path / "moved.json")
    arguments = ["show", "--labels", str(store), "--data", f"{tmp_path}/moved.json"]
    arguments += ["--out", f"{tmp_path}/out.html"]
    with pytest.raises(UserError, match="images/0.png: cannot read the image"):
        main(arguments)
    main([*arguments, "--image_folder", f"{tmp_path}/elsewhere"])
    assert len(drawn) == 1


def test_show_of_the_tiny_world(store, tmp_path, capsys):
    main(["show", "--labels", str(store), "--out", f"{tmp_path}/out.html", "--images", "3"])
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
        (["show", "--labels", "x", "--images", "many"], "--images: invalid int"),
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
        (["show", "--labels", f"{tmp_path}/nowhere"], "nowhere: no label store"),
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
        (command(settings, tmp_path / "out", min_score=-0.1), "--min_score"),
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
        UserError, match="only 8 of 24"
    ):  # the files before that of the bad image are there
        LabelStore(tmp_path / "out")
    shutil.copy(world / "images/9.png", images)
    main(command(settings, tmp_path / "out", image_folder=images, workers=workers, shard=4))
    assert same(tmp_path / "out", world_store(settings, tmp_path / "whole", shard=4))
