"""labels.py against full stable sorts, open_clip's and timm's own outputs, formulas written out, and hand counts."""

import json
import re
import shutil
import zlib

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data import UserError, cli, geometry, load_samples
from labels import (
    LabelStore,
    _open_store,
    digest,
    encoder_geometry,
    extract,
    load_encoder,
    main,
    nearest_words,
    patch_embeddings,
    read_words,
    word_embeddings,
)

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)  # of the tiny world, whose images are 30 x 30, patches 6 x 6


# ---------------------------------------------------------------------------------------------- nearest words


def sorted_words(patches, words, n, sign, min_score):
    """A full stable sort of all scores, in float64."""
    scores = sign * (patches.double() @ words.double().T).numpy()
    order = np.argsort(-scores, axis=1, kind="stable")[:, :n]
    best = np.take_along_axis(scores, order, 1)
    rows, columns = max(0, n - len(words)), best > min_score
    pad = ((0, 0), (0, rows))
    return (torch.from_numpy(np.pad(np.where(columns, order, -1), pad, constant_values=-1)),
            torch.from_numpy(np.pad(np.where(columns, best, 0), pad)))


def vectors(kind, P, q, seed=0):
    """integers: few different scores, hence ties everywhere, and all of them exact. random: hardly ever a tie."""
    g = torch.Generator().manual_seed(seed)
    if kind == "integers":
        return [torch.randint(-2, 3, (rows, 3), generator=g).float() for rows in (P, q)]
    return [F.normalize(torch.randn(rows, 6, generator=g, dtype=torch.float64), dim=-1) for rows in (P, q)]


@pytest.mark.parametrize("kind", ["integers", "random"])
@pytest.mark.parametrize("P, q, n, sign, min_score", [
    (40, 1, 10, 1, 0), (40, 9, 10, -1, 0), (40, 10, 10, 1, 0), (40, 10, 1, -1, 0), (40, 11, 10, 1, 0.5),
    (40, 5000, 10, -1, 0), (40, 5000, 10, 1, 7.5), (40, 5000, 4200, 1, 0), (12, 50_000, 10, 1, 0.9),
    (12, 50_000, 1, -1, 0), (4100, 7, 4, 1, 0.3), (4096, 5, 5, -1, 0), (1, 4097, 3, 1, 0),
])
def test_nearest_words_equal_a_full_stable_sort(kind, P, q, n, sign, min_score):
    patches, words = vectors(kind, P, q)
    ids, scores = nearest_words(patches, words, n, sign, min_score)
    expected_ids, expected_scores = sorted_words(patches, words, n, sign, min_score)
    assert ids.dtype == torch.int64 and scores.dtype == torch.float32 and ids.shape == scores.shape == (P, n)
    assert ids.equal(expected_ids)
    torch.testing.assert_close(scores.double(), expected_scores, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sign, expected_ids, expected_scores", [
    (1, [[1, 3, 5, 0], [2, -1, -1, -1]], [[0.75, 0.75, 0.75, 0.25], [0.5, 0, 0, 0]]),
    (-1, [[2, 4, -1, -1], [1, 3, 5, 0]], [[0.5, 0.5, 0, 0], [0.75, 0.75, 0.75, 0.25]]),
])
def test_nearest_words_by_hand(sign, expected_ids, expected_scores):
    """Words 1, 3 and 5 are the same, so are 2 and 4; the second patch is the opposite of the first, but for word 4."""
    words = torch.tensor([[0.25, 0], [0.75, 0], [-0.5, 0], [0.75, 0], [-0.5, 0.5], [0.75, 0]])
    ids, scores = nearest_words(torch.tensor([[1.0, 0], [-1.0, -1.0]]), words, 4, sign)
    assert ids.tolist() == expected_ids and scores.tolist() == expected_scores


def test_a_word_at_min_score_is_left_out():
    ids, scores = nearest_words(torch.ones(1, 1), torch.tensor([[0.5], [0.25], [0.125], [0.0]]), 4, 1, min_score=0.25)
    assert ids.tolist() == [[0, -1, -1, -1]] and scores.tolist() == [[0.5, 0, 0, 0]]


def test_equal_words_more_than_a_block_apart_come_by_id():
    words = F.normalize(torch.randn(20_000, 4, generator=torch.Generator().manual_seed(0)), dim=-1) * 0.9
    words[[17, 4095, 4096, 9000, 19_999]] = torch.tensor([0.0, 0, 0, 1])
    ids, _ = nearest_words(torch.tensor([[0.0, 0, 0, 1]]), words, 4, 1)
    assert ids.tolist() == [[17, 4095, 4096, 9000]]


class PeakMemory(TorchDispatchMode):
    """The most bytes that were alive at a time, of what operators returned."""

    def __enter__(self):
        self.peak, self.alive = 0, {}
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        ours = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in ours:  # not a view of an argument
                self.alive[StorageWeakRef(t.untyped_storage())] = t.untyped_storage().nbytes()
        self.alive = {ref: size for ref, size in self.alive.items() if not ref.expired()}
        self.peak = max(self.peak, sum(self.alive.values()))
        return out


def test_memory_does_not_grow_with_the_number_of_words():
    peaks = []
    for q in (8192, 65_536):
        patches, words = (v.float() for v in vectors("random", 128, q))
        with PeakMemory() as memory:
            nearest_words(patches, words, 3, 1)
        peaks.append(memory.peak)
    assert peaks[0] > 128 * 4096 * 4  # it did see a block of scores
    assert peaks[1] < 1.1 * peaks[0]


# ------------------------------------------------------------------------------------------- patch embeddings


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
    hooks = [block.register_forward_pre_hook(lambda _, args, kwargs: inputs.append(args[0] if args else kwargs["q_x"]),
                                             with_kwargs=True) for block in visual.transformer.resblocks]
    visual(pixels)
    for hook in hooks:
        hook.remove()
    return inputs


def finish(visual, x):
    return F.normalize(visual.ln_post(x)[:, 1:] @ visual.proj, dim=-1)


def value_weights(attn):
    width = attn.embed_dim
    return attn.in_proj_weight[2 * width:], attn.in_proj_bias[2 * width:]


@pytest.fixture(scope="module")
def encoder(world):
    return shaken(load_encoder(str(world / "clip")))


def test_last_is_open_clips_tokens_in_the_texts_space(encoder, monkeypatch):
    visual, pixels = encoder.visual, random_pixels()
    monkeypatch.setattr(visual, "output_tokens", True)
    _, tokens = visual(pixels)
    torch.testing.assert_close(patch_embeddings(encoder, pixels, "last"), F.normalize(tokens @ visual.proj, dim=-1))


def test_last_of_an_image_of_one_patch_is_encode_image(world):
    """Pooled over its patches, a tower with a single patch must return just this patch's embedding."""
    clip = tiny_clip(world, patch_size=30, pool_type="avg")
    patches = patch_embeddings(clip, random_pixels(), "last")
    assert patches.shape == (4, 1, 16)
    torch.testing.assert_close(patches[:, 0], clip.encode_image(random_pixels(), normalize=True))


def test_value_is_the_last_blocks_formula_for_one_token(encoder):
    visual, block = encoder.visual, encoder.visual.transformer.resblocks[-1]
    x = block_inputs(visual, random_pixels())[-1]
    y = x + block.attn.out_proj(F.linear(block.ln_1(x), *value_weights(block.attn)))
    y = y + block.mlp(block.ln_2(y))
    torch.testing.assert_close(patch_embeddings(encoder, random_pixels(), "value"), finish(visual, y))


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
    torch.testing.assert_close(patch_embeddings(clip, random_pixels(), "vv"), finish(visual, surgery))


@pytest.mark.parametrize("path", ["last", "value", "vv"])
def test_patch_embeddings_are_normalised_and_without_gradient(encoder, path):
    patches = patch_embeddings(encoder.requires_grad_(True), random_pixels(), path)
    encoder.requires_grad_(False)
    assert patches.shape == (4, 25, 16) and not patches.requires_grad
    torch.testing.assert_close(patches.norm(dim=-1), torch.ones(4, 25))


def siglip(name="test_vit", width=64, **trunk):
    """A CLIP whose tower is timm's and pools by attention; trunk: a shape that timm has no name for."""
    clip = open_clip.CustomTextCLIP(
        embed_dim=width, text_cfg=dict(context_length=77, vocab_size=100, width=16, heads=2, layers=1),
        vision_cfg=dict(timm_model_name=name, timm_pool="map", timm_proj="none", image_size=160))
    if trunk:
        clip.visual.trunk = VisionTransformer(**trunk, embed_dim=width, depth=2, num_heads=2, class_token=False,
                                              global_pool="map", num_classes=0)
    return shaken(clip)


def pooled_alone(trunk, pixels):
    """timm's pooling of one patch token at a time."""
    tokens = trunk.forward_features(pixels)[:, trunk.num_prefix_tokens:]
    return torch.stack([trunk.attn_pool(tokens[:, i:i + 1]) for i in range(tokens.shape[1])], dim=1)


def test_siglip_pools_each_patch_alone():
    clip, pixels = siglip(img_size=32, patch_size=8), random_pixels(32)
    patches = patch_embeddings(clip, pixels, "value")
    assert patches.shape == (4, 16, 64)
    torch.testing.assert_close(patches, F.normalize(pooled_alone(clip.visual.trunk, pixels), dim=-1))


def test_siglip_of_an_image_of_one_patch_is_encode_image():
    clip, pixels = siglip(img_size=32, patch_size=32), random_pixels(32)
    torch.testing.assert_close(patch_embeddings(clip, pixels, "value")[:, 0], clip.encode_image(pixels, normalize=True))


@pytest.mark.parametrize("name, width", [("test_vit", 64), ("test_vit3", 96)])
def test_prefix_tokens_of_a_timm_tower_are_no_patches(name, width):
    """10 x 10 patches and, in the one, a class token that pooling leaves out, in the other a register that it reads."""
    clip, pixels = siglip(name, width), random_pixels(160)
    try:
        patches = patch_embeddings(clip, pixels, "value")
    except UserError:
        return  # to refuse such a tower is as good
    assert patches.shape == (4, 100, width)
    torch.testing.assert_close(patches, F.normalize(pooled_alone(clip.visual.trunk, pixels), dim=-1))


def test_paths_that_a_tower_does_not_have_are_refused(encoder):
    with pytest.raises(UserError, match="nonsense"):
        patch_embeddings(encoder, random_pixels(), "nonsense")
    for path in ("last", "vv"):
        with pytest.raises(UserError, match=f"--path {path}"):
            patch_embeddings(siglip(img_size=32, patch_size=8), random_pixels(32), path)


# -------------------------------------------------------------------------------------------- word embeddings


@pytest.mark.parametrize("keywords, prompt", [({}, "a photo of a {}."), (dict(prompt="{}"), "{}"),
                                              (dict(prompt="some {} here", batch_size=2), "some {} here")])
def test_word_embeddings_equal_encode_text_one_by_one(encoder, keywords, prompt):
    words = ["red", "polka-dot", "traffic light", "a", "sky"]
    tokenize = open_clip.SimpleTokenizer()
    expected = torch.cat([encoder.encode_text(tokenize([prompt.replace("{}", word)])) for word in words])
    torch.testing.assert_close(word_embeddings(encoder, words, **keywords), F.normalize(expected, dim=-1))


def test_encoder_geometry_is_the_encoders_own(encoder):
    assert encoder_geometry(encoder) == dict(size=30, mode="square", mean=MEAN, std=STD)


# -------------------------------------------------------------------------------------------------- the store


@pytest.fixture(scope="module")
def settings(world):
    """Arguments of extract, other than the encoder's defaults throughout."""
    return dict(data=str(world / "train.json"), image_folder=str(world / "images"), words=str(world / "words.txt"),
                encoder=str(world / "clip"), path="last", sign=-1, prompt="the {}", n=4, min_score=0.05, batch_size=7)


@pytest.fixture(scope="module")
def store(settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("store") / "labels"
    extract(**settings, out=str(folder))
    return folder


@pytest.fixture
def copy(store, tmp_path):
    return shutil.copytree(store, tmp_path / "copy")


def records(folder, mode="r"):
    return np.load(folder / "labels.npy", mmap_mode=mode)


def same(folder, other):
    return (records(folder) == records(other)).all()


@pytest.mark.parametrize("path, sign", [("last", -1), ("value", 1), ("vv", 1)])
def test_the_store_holds_what_each_image_alone_would_get(world, settings, tmp_path, path, sign):
    chosen = settings | dict(path=path, sign=sign)
    extract(**chosen, out=str(tmp_path / "labels"))
    store, clip, seen_none = LabelStore(tmp_path / "labels"), load_encoder(str(world / "clip")), set()
    samples = load_samples(world / "train.json")
    words = (world / "words.txt").read_text().split()
    assert len(store) == len(samples) == 24 and store.words == words
    for i, sample in enumerate(samples):
        image = Image.open(world / "images" / sample["image"]).convert("RGB")
        pixels = geometry(image, size=30, mode="square", mean=MEAN, std=STD).unsqueeze(0)
        expected_ids, expected_scores = sorted_words(patch_embeddings(clip, pixels, path)[0],
                                                     word_embeddings(clip, words, "the {}"), 4, sign, 0.05)
        ids, scores = store[i]
        assert (ids.dtype, scores.dtype, ids.shape) == (torch.int64, torch.float32, (25, 4))
        assert ids.equal(expected_ids)
        torch.testing.assert_close(scores.double(), expected_scores, rtol=1e-3, atol=1e-6)
        seen_none |= set((ids < 0).flatten().tolist())
    assert seen_none == {True, False}


@pytest.mark.parametrize("encoder_default, path, sign", [({}, "value", 1), (dict(path="last"), "last", -1),
                                                         (dict(path="vv"), "vv", 1)])
def test_default_path_and_sign(settings, tmp_path, encoder_default, path, sign):
    chosen = {k: v for k, v in settings.items() if k not in ("path", "sign")} | encoder_default
    extract(**chosen, out=str(tmp_path / "labels"))
    meta = LabelStore(tmp_path / "labels").meta
    assert (meta["path"], meta["sign"]) == (path, sign)


@pytest.mark.parametrize("count, dtype", [(10, np.uint16), (65_534, np.uint16), (65_535, np.int32), (70_000, np.int32)])
def test_no_label_stays_apart_from_the_last_word(tmp_path, count, dtype):
    words = [f"w{i}" for i in range(count)]
    wanted = np.array([[-1, 0, count - 1], [count - 2, -1, min(count - 1, 65_535)]])
    rows = _open_store(tmp_path / "labels", dict(n=3), words, 1, 2)
    assert (rows["ids"].dtype, rows["scores"].dtype) == (dtype, np.float16)
    rows["ids"], rows["scores"], rows["done"] = wanted.astype(dtype), 0.25, True
    store = LabelStore(tmp_path / "labels")
    assert store[0][0].tolist() == wanted.tolist() and store.words == words and (store[0][1] == 0.25).all()


def test_missing_and_damaged_folders_are_refused(copy, tmp_path):
    with pytest.raises(UserError, match=r"nowhere.*labels\.py extract"):
        LabelStore(tmp_path / "nowhere")
    for name, damage in [("labels.npy", b""), ("labels.npy", b"nonsense"), ("meta.json", b'{"size": ')]:
        whole = (copy / name).read_bytes()
        (copy / name).write_bytes(damage)
        with pytest.raises(UserError, match="no label store"):
            LabelStore(copy)
        (copy / name).write_bytes(whole)
    LabelStore(copy)


def test_an_interrupted_run_is_refused_and_goes_on_where_it_stopped(settings, store, copy):
    rows = records(copy, "r+")
    for i in (3, 20):  # batches are 7 images
        rows[i] = (1, 1, 1, False)  # what was written of an unfinished row does not count
    rows["crc"][10] = 0  # a finished row of another batch is not made again
    with pytest.raises(UserError, match="only 22 of 24"):
        LabelStore(copy)
    extract(**settings, out=str(copy))
    assert rows["crc"][10] == 0
    rows["crc"][10] = records(store)["crc"][10]
    assert same(copy, store)


def test_a_run_killed_before_the_store_was_complete_starts_again(settings, store, copy):
    (copy / "meta.json").unlink()  # it is written last
    records(copy, "r+")["ids"] = 2
    extract(**settings, out=str(copy))
    assert same(copy, store)


def test_the_store_fingerprints_the_image_files(world, store, samples):
    files = [(world / "images" / s["image"]).read_bytes() for s in samples]
    assert records(store)["crc"].tolist() == [zlib.crc32(content) for content in files]


def test_check_names_what_differs(store, samples):
    geo = dict(size=30, mode="square", mean=MEAN, std=STD)
    LabelStore(store).check(samples, geo, (5, 5))
    for field, *arguments in [("manifest", samples[::-1], geo, (5, 5)), ("size", samples, geo | {"size": 60}, (5, 5)),
                              ("mode", samples, geo | {"mode": "squash"}, (5, 5)), ("grid", samples, geo, (5, 6))]:
        with pytest.raises(UserError, match=f"made with {field} = "):
            LabelStore(store).check(*arguments)


@pytest.mark.parametrize("field, other", [
    ("n", 3), ("sign", 1), ("path", "value"), ("prompt", "a {}"), ("min_score", 0.1), ("words", "more"),
    ("manifest", "fewer"), ("encoder", "copied"), ("weights", "changed"),
])
def test_extract_into_labels_of_another_setting_is_refused(world, settings, store, copy, tmp_path, field, other):
    chosen = dict(settings)
    if field == "words":
        chosen["words"] = str(tmp_path / "words.txt")
        (tmp_path / "words.txt").write_text((world / "words.txt").read_text() + "extra\n")
    elif field == "manifest":
        chosen["data"] = str(tmp_path / "data.json")
        (tmp_path / "data.json").write_text(json.dumps(load_samples(world / "train.json")[:23]))
    elif field == "encoder":
        chosen["encoder"] = str(shutil.copytree(world / "clip", tmp_path / "clip"))
    elif field == "weights":
        meta = json.loads((copy / "meta.json").read_text())
        (copy / "meta.json").write_text(json.dumps(meta | {"weights": "0123"}))
    else:
        chosen[field] = other
    with pytest.raises(UserError, match=rf"labels with {field} = .* asked for are {field} = "):
        extract(**chosen, out=str(copy))
    assert same(copy, store)


def test_other_weights_have_another_fingerprint(world, settings, store, tmp_path):
    clip = shutil.copytree(world / "clip", tmp_path / "clip")
    weights = load_file(clip / "open_clip_model.safetensors")
    weights["visual.transformer.resblocks.1.mlp.c_fc.weight"][0, 0] += 1
    save_file(weights, clip / "open_clip_model.safetensors")
    extract(**settings | dict(encoder=str(clip)), out=str(tmp_path / "labels"))
    assert LabelStore(tmp_path / "labels").meta["weights"] != LabelStore(store).meta["weights"]


def test_data_that_has_moved_is_the_same_data(world, settings, copy, tmp_path):
    moved = shutil.copy(world / "train.json", tmp_path / "moved.json")
    extract(**settings | dict(data=str(moved)), out=str(copy))
    assert len(LabelStore(copy)) == 24


# -------------------------------------------------------------------------------------------------- word list

CAPTIONS = ["A red-hot Dog runs; the dog's tail!", "Dog and cat, cat and DOG.", "The red-hot stove -- x x x",
            "zebra apple: zebra apple tree"]
# dog 4 times; apple, cat, red-hot and zebra twice; tail, runs, stove and tree once; no single letters, no stop words
OFTEN, ONCE = ["dog", "apple", "cat", "red-hot", "zebra"], ["runs", "stove", "tail", "tree"]


def captions_file(path, captions=CAPTIONS):
    path.write_text(json.dumps([{"image": "0.png", "conversations": [
        {"from": "human", "value": "<image>\nhorse horse horse"}, {"from": "gpt", "value": caption}]}
        for caption in captions]))
    return str(path)


@pytest.mark.parametrize("flags, extra, expected", [
    ([], None, OFTEN), (["--min_count", "1"], None, OFTEN + ONCE), (["--min_count", "3"], None, ["dog"]),
    (["--min_count", "2"], ["zebra", "the", "Ice cream", "cat", "ant"], OFTEN + ["the", "Ice cream", "ant"]),
])
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


@pytest.mark.parametrize("text, line", [("red\nblue\nred\n", "line 3: 'red'"), ("red\n\nblue\n", "line 2: "),
                                        ("red\n  \n", "line 2: "), ("red\nblue\n\n", "line 3: ")])
def test_read_words_names_the_line(tmp_path, text, line):
    (tmp_path / "words.txt").write_text(text)
    with pytest.raises(UserError, match=f"words.txt, {line}"):
        read_words(tmp_path / "words.txt")


# --------------------------------------------------------------------------------------------------- pictures


def test_show_prints_the_shares_and_draws_the_images(tmp_path, capsys):
    """Two images of 2 x 2 patches, one red, one blue, with labels and truth by hand."""
    samples = [{"image": name, "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "x"}]}
               for name in ("red.png", "blue.png")]
    (tmp_path / "data.json").write_text(json.dumps(samples))
    for color in ("red", "blue"):
        Image.new("RGB", (40, 40), color).save(tmp_path / f"{color}.png")
    meta = dict(manifest=digest(s["image"] for s in samples), size=8, mode="square", grid=[2, 2], n=2,
                data=str(tmp_path / "data.json"), image_folder=str(tmp_path))
    rows = _open_store(tmp_path / "labels", meta, ["sky", "wall", "door"], 2, 4)
    ids = np.array([[[0, 1], [1, -1], [2, 0], [-1, -1]], [[2, -1], [2, 1], [-1, -1], [1, -1]]])
    rows["ids"] = ids.astype(np.uint16)
    rows["scores"], rows["done"] = 0.5, True
    truth = {"red.png": {"object": {"0": ["sky", "door"], "1": ["sky"]}, "background": {"3": ["wall"]}},
             "blue.png": {"object": {"1": ["door"], "3": ["sky", "wall"]}, "background": {"0": ["door"], "2": ["sky"]}}}
    (tmp_path / "truth.json").write_text(json.dumps(truth))

    main(["show", "--labels", f"{tmp_path}/labels", "--out", f"{tmp_path}/out.png", "--truth",
          f"{tmp_path}/truth.json"])
    printed = capsys.readouterr().out
    assert "2 images, 3 words" in printed and "75.0% of the patches" in printed  # 6 of 8 patches have a label
    assert re.search(r"\b1\.1 of at most 2\b", printed)  # 9 labels on 8 patches
    assert "0.750 of object patches, 0.333 of background patches" in printed

    sheet = np.asarray(Image.open(tmp_path / "out.png").convert("RGB")).astype(int)
    assert sheet.shape == (136, 260, 3)  # cells of 56, two pictures side by side, 12 between and around them
    assert (sheet[:12] == 255).all() and (sheet[:, 124:136] == 255).all()
    for left, color, unlabelled in [(12, (255, 0, 0), 3), (136, (0, 0, 255), 2)]:
        for patch in range(4):
            y, x = 12 + patch // 2 * 56, left + patch % 2 * 56
            assert (np.abs(sheet[y:y + 56, x:x + 56] - color) <= 1).all() == (patch == unlabelled)


def test_show_of_the_tiny_world(store, tmp_path, capsys):
    main(["show", "--labels", str(store), "--out", f"{tmp_path}/out.png", "--images", "3"])
    assert Image.open(tmp_path / "out.png").size == (2 * 280 + 3 * 12, 2 * 280 + 3 * 12)
    share = np.mean([(LabelStore(store)[i][0] >= 0).any(-1).float().mean().item() for i in range(24)])
    assert f"{share:.1%} of the patches have a label" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------- CLI


def command(settings, out, **changed):
    return ["extract", "--out", str(out), *(f"--{k}={v}" for k, v in (settings | changed).items())]


def test_extract_from_the_command_line(settings, store, tmp_path):
    main(command(settings, tmp_path / "labels", workers=1))
    assert same(tmp_path / "labels", store)


@pytest.mark.parametrize("arguments, message", [
    (["words", "--data", "x", "--out", "y", "--min_cuont", "3"], "unrecognized arguments: --min_cuont"),
    (["words", "--data", "x", "--out", "y", "--min", "3"], "unrecognized arguments: --min"),
    (["words", "--data", "x"], "required: --out"),
    (["show", "--labels", "x", "--images", "many"], "--images: invalid int"),
    (["extract", "--data", "x", "--words", "x", "--out", "x", "--path", "v"], "invalid choice: 'v'"),
    (["label"], "invalid choice: 'label'"),
])
def test_flags_that_do_not_exist_are_refused(capsys, arguments, message):
    with pytest.raises(SystemExit) as e:
        main(arguments)
    assert e.value.code == 2 and message in capsys.readouterr().err


def test_errors_name_the_file_or_the_flag(settings, tmp_path):
    (tmp_path / "empty").mkdir()
    for arguments, message in [
        (["show", "--labels", f"{tmp_path}/nowhere"], "nowhere: no label store"),
        (command(settings, tmp_path / "out", data=tmp_path / "no.json"), "no.json: no such data file"),
        (command(settings, tmp_path / "out", words=tmp_path / "no.txt"), "no.txt: cannot read the word list"),
        (command(settings, tmp_path / "out", encoder="ViT-B-32"), "--encoder ViT-B-32: .*--pretrained"),
        (command(settings, tmp_path / "out", encoder="ViT-B-32", pretrained="none"), "--encoder ViT-B-32: .*'none'"),
        (command(settings, tmp_path / "out", encoder=tmp_path / "empty"), "--encoder .*empty: cannot be loaded"),
        (command(settings, tmp_path / "out", min_score=-0.1), "--min_score"),
    ]:
        with pytest.raises(UserError, match=message):
            main(arguments)
    assert not (tmp_path / "out").exists()


def test_a_folder_without_weights_is_refused(world, settings, tmp_path):
    shutil.copytree(world / "clip", tmp_path / "clip", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(UserError, match="--encoder .*clip: cannot be loaded"):
        extract(**settings | dict(encoder=str(tmp_path / "clip")), out=str(tmp_path / "out"))


def test_extract_runs_as_one_process(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="one process"):
        extract(**settings, out=str(tmp_path / "out"))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("content", [None, b"nonsense"], ids=["missing", "unreadable"])
def test_a_bad_image_ends_the_command_with_one_line_that_names_it(world, settings, tmp_path, content, workers):
    images = shutil.copytree(world / "images", tmp_path / "images")
    (images / "9.png").unlink() if content is None else (images / "9.png").write_bytes(content)
    with pytest.raises(SystemExit) as e:
        cli(lambda: main(command(settings, tmp_path / "out", image_folder=images, workers=workers)))
    assert re.fullmatch(rf"error: {re.escape(str(images))}/9.png: (cannot read|not a readable) .*", e.value.code)
    with pytest.raises(UserError, match="only 7 of 24"):  # the first batch; images 7 to 13 are not marked as finished
        LabelStore(tmp_path / "out")
