"""model.py against every row by hand, transformers' own classes and step-by-step decoding."""

import dataclasses
import itertools
import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Dinov2Config,
    Dinov2Model,
    GemmaConfig,
    GemmaForCausalLM,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
    SiglipVisionModel,
)

import data
import eval as evaluation
import train
from data import LlavaDataset, UserError, collate
from labels import LabelStore
from model import (
    SEAModel,
    absolute,
    adapter_state,
    assemble,
    fit_llm,
    full_state,
    load_llm,
    load_model,
    load_vision,
    new_model,
    part_digest,
    save_adapter,
    save_llava,
)


@pytest.fixture(scope="module")
def model(world, labels):
    torch.manual_seed(0)
    model = new_model(world / "vision", world / "llm")
    model.set_words(LabelStore(labels).words)
    return model


@pytest.fixture(scope="module")
def batch(world, labels, model):
    dataset = LlavaDataset(
        data.load_samples(world / "train.json"),
        world / "images",
        model.preprocess,
        model.tokenizer,
        model.image_tokens,
        label_store=LabelStore(labels),
    )
    batch = collate([dataset[i] for i in range(4)])
    batch.pop("index")
    return batch


@pytest.fixture(scope="module")
def llm(world):
    """The LLM alone, by transformers."""
    return AutoModelForCausalLM.from_pretrained(world / "llm")


def by_hand(model, llm, batch, b):
    """Row b alone: all pieces by themselves, embeddings spliced by position, logits everywhere."""
    ids = batch["input_ids"].split(batch["lengths"])[b]
    start = sum(batch["lengths"][:b])
    trained = [int(i) - start for i in batch["trained"] if start <= i < start + len(ids)]
    hidden = model.vision_tower(batch["pixels"][b : b + 1], output_hidden_states=True).hidden_states
    x_v = model.adapter(hidden[-2][0, 1:])
    x = []
    for token in ids.tolist():
        if token == model.llava.config.image_token_id:
            x.append(x_v[len([i for i in ids[: len(x)] if i == model.llava.config.image_token_id])])
        else:
            x.append(llm.get_input_embeddings().weight[token])
    logits = llm(inputs_embeds=torch.stack(x)[None]).logits[0]
    rows = [logits[i - 1].double().log_softmax(-1)[ids[i]] for i in trained]
    return -sum(rows), len(trained)


def test_losses_equal_those_of_every_row_by_hand(model, llm, batch):
    out = model(**{k: v for k, v in batch.items() if not k.startswith("label_")})
    rows = [by_hand(model, llm, batch, b) for b in range(4)]
    tokens = sum(count for _, count in rows)
    reference = sum(loss for loss, _ in rows) / tokens
    assert torch.allclose(out["loss_g"].double(), reference, rtol=1e-5) and "loss_a" not in out
    model.zero_grad()
    out["loss_g"].backward()
    grads = [p.grad.clone() for p in model.adapter.parameters()]
    model.zero_grad()
    reference.backward()
    for ours, p in zip(grads, model.adapter.parameters()):
        assert torch.allclose(ours, p.grad, rtol=1e-3, atol=1e-6)
    for frozen in (model.vision_tower, model.llava.model.language_model):
        assert all(p.grad is None for p in frozen.parameters())


def test_num_targets_is_what_the_sum_is_divided_by(model, batch):
    plain = {k: v for k, v in batch.items() if not k.startswith("label_")}
    tokens = len(batch["trained"])
    mean, fifth = model(**plain)["loss_g"], model(**plain, num_targets=5)["loss_g"]
    assert torch.allclose(mean * tokens, fifth * 5, rtol=1e-5)


def test_a_batch_without_trained_tokens_has_loss_0_and_a_graph(model, batch):
    plain = {k: v for k, v in batch.items() if not k.startswith("label_")}
    loss = model(**plain | {"trained": torch.arange(0)})["loss_g"]
    loss.backward()
    assert loss == 0


def test_word_features_are_means_of_embeddings(model, llm):
    features = model.label_features(torch.tensor([8, 0, 8]))
    for feature, j in zip(features, (8, 0, 8)):
        rows = [llm.get_input_embeddings().weight[t] for t in model.word_token_ids[j]]
        assert torch.allclose(feature, sum(rows) / len(rows))
    assert model.label_features(torch.empty(0, dtype=torch.int64)).shape == (0, 24)


def test_alignment_loss_reaches_the_adapter_and_the_temperature(model, batch):
    model.zero_grad()
    out = model(**batch, generator=torch.Generator().manual_seed(0))
    out["loss_a"].backward()
    assert out["pairs"] > 1 and model.log_scale.grad.abs() > 0
    assert all(p.grad.abs().sum() > 0 for p in model.adapter.parameters())


def starts(batch, rows):
    """The image and one word of some rows."""
    return torch.stack([ids[:27] for ids in batch["input_ids"].split(batch["lengths"])[:rows]])


def prompt(batch, rows, padding=0, pad_id=0):
    """The start of some rows, the image and one word, as a batch padded on the left."""
    ids = F.pad(starts(batch, rows), (padding, 0), value=pad_id)
    mask = F.pad(torch.ones(rows, 27, dtype=torch.int64), (padding, 0))
    return {"input_ids": ids, "attention_mask": mask, "pixels": batch["pixels"][:rows]}


def test_generate_is_greedy_decoding_step_by_step(model, llm, batch):
    new = model.generate(prompt(batch, 2), max_new_tokens=5, min_new_tokens=5)
    ids = starts(batch, 2)
    with torch.no_grad():
        x = llm.get_input_embeddings()(ids.masked_fill(ids == model.llava.config.image_token_id, 0))
        x[:, 1:26] = model.visual_tokens(batch["pixels"][:2])
        for step in range(5):
            logits = llm(inputs_embeds=x).logits[:, -1]
            logits[:, model.tokenizer.eos_token_id] = -torch.inf
            token = logits.argmax(-1)
            assert torch.equal(token, new[:, step])
            x = torch.cat([x, llm.get_input_embeddings()(token)[:, None]], 1)


def test_left_padded_prompts_generate_as_alone(model, batch):
    lengths = dict(max_new_tokens=4, min_new_tokens=4)
    alone = model.generate(prompt(batch, 1), **lengths)
    padded = model.generate(prompt(batch, 1, 3, model.tokenizer.pad_token_id), **lengths)
    assert torch.equal(alone, padded)


def test_adapter_file_round_trip_and_refusals(model, tmp_path, world):
    names = model.parts | {"image_mode": "pad"}
    save_adapter(tmp_path, adapter_state(model), names)
    loaded = load_model(tmp_path)
    assert loaded.preprocess == model.preprocess | {"mode": "pad"}  # not the tower's own
    for (name, a), b in zip(adapter_state(model).items(), adapter_state(loaded).values()):
        assert torch.equal(a, b), name
    whole = (tmp_path / "adapter.safetensors").read_bytes()
    (tmp_path / "adapter.safetensors").write_bytes(whole[:-40])
    with pytest.raises(UserError, match="cannot be loaded .*, none of them truncated"):
        load_model(tmp_path)
    state = adapter_state(model)
    for other in (
        state | {"adapter.linear_1.weight": torch.zeros(24, 31)},
        {name: w for name, w in state.items() if name != "log_scale"},
    ):
        save_adapter(tmp_path, other, names)
        with pytest.raises(UserError, match="cannot be loaded .*(size mismatch|log_scale)"):
            load_model(tmp_path)
    with pytest.raises(UserError, match="no adapter.safetensors"):
        load_model(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="cannot be loaded"):
        new_model(world / "vision", world / "nothing-here")
    (tmp_path / "llm").symlink_to(world / "llm")
    (tmp_path / "llm/processor_config.json").touch()
    with pytest.raises(UserError, match="a llama; neither one of our runs nor a Llava"):
        load_model(tmp_path / "llm")
    (world / "llm/processor_config.json").unlink()
    with pytest.raises(UserError, match="a llama, none of clip_vision_model, "):
        new_model(world / "llm", world / "llm")


def test_code_that_comes_with_a_model_is_neither_run_nor_asked_about(tmp_path, world, monkeypatch):
    shutil.copytree(world / "llm", tmp_path / "llm")
    config = json.loads((tmp_path / "llm/config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}
    (tmp_path / "llm/config.json").write_text(json.dumps(config))
    (tmp_path / "llm/own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")

    def ask(question=""):
        raise AssertionError("asked: " + question)

    monkeypatch.setattr("builtins.input", ask)
    with pytest.raises(UserError, match="cannot be loaded .*trust_remote_code"):
        new_model(world / "vision", tmp_path / "llm")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["siglip", "dinov2"])
def test_other_towers_give_all_patches_and_no_class_token(kind, model, world):
    """m patch features of layer -2, in order: SigLIP has no class token to drop, DINOv2 has one."""
    config = dict(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=30,
        patch_size=6,
    )
    torch.manual_seed(1)
    if kind == "siglip":
        tower = SiglipVisionModel(SiglipVisionConfig(**config))
    else:
        tower = Dinov2Model(Dinov2Config(**config))
    llm = AutoModelForCausalLM.from_pretrained(world / "llm")
    tokenizer = AutoTokenizer.from_pretrained(world / "llm")
    llava = assemble(tower, llm, tokenizer, 30)
    other = SEAModel(llava, tokenizer, model.preprocess, {})
    pixels = torch.rand(2, 3, 30, 30)
    hidden = tower(pixels, output_hidden_states=True).hidden_states[-2]
    features = hidden if kind == "siglip" else hidden[:, 1:]
    assert features.shape[1] == 25
    assert torch.allclose(other.visual_tokens(pixels), other.adapter(features))


SMALL = dict(
    vocab_size=400, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
)


def test_gemma_scales_inside_its_embedding_and_so_does_the_adapter(world):
    llm = GemmaForCausalLM(GemmaConfig(**SMALL, num_key_value_heads=1, head_dim=8))
    tokenizer = AutoTokenizer.from_pretrained(world / "llm")
    tower, preprocess = load_vision(world / "vision", torch.float32)
    model = SEAModel(assemble(tower, llm, tokenizer, 30), tokenizer, preprocess, {})
    assert model.adapter.output_scale == 4  # √16
    model.set_words(["red"])
    rows = llm.get_input_embeddings().weight[model.word_token_ids[0]]
    feature = model.label_features(torch.tensor([0]))[0]
    assert torch.allclose(feature, 4 * rows.mean(0))
    seen = llm.get_input_embeddings()(torch.tensor(model.word_token_ids[0]))
    assert torch.allclose(feature, seen.mean(0))


# Logits as large as a trained LLM's, where softcapping is seen.
LARGE = SMALL | dict(num_key_value_heads=1, head_dim=8, initializer_range=0.3, pad_token_id=0)
CHANGED = "takes the logits from the LM head as they are"
PER_LAYER = dict(hidden_size_per_layer_input=8, vocab_size_per_layer_input=400)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "kind, own, reason",
    [
        ("gemma2", {}, "without ids.*softcap"),
        ("recurrent_gemma", dict(lru_width=16), CHANGED),
        ("granite", dict(logits_scaling=8.0), CHANGED),
        ("cohere", {}, CHANGED),
        ("gemma4_text", PER_LAYER, "runs the decoder on embeddings of any kind, without ids"),
        ("phimoe", {}, "needs windows that attention functions are told"),
        ("gpt2", {}, "takes a decoder with"),
        ("opt", dict(ffn_dim=32, word_embed_proj_dim=16), "takes a decoder with"),
        ("phi", {}, "LM head without bias"),
    ],
)
def test_an_llm_that_llava_would_compute_otherwise_is_refused(kind, own, reason, dtype):
    config = AutoConfig.for_model(kind, **LARGE | own)
    llm = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with pytest.raises(UserError, match=f"{type(llm).__name__} does not fit .*{reason}") as e:
        fit_llm(llm)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "kind",
    # Granite's scaling is 1 by default
    ["llama", "gemma", "gemma3_text", "phi3", "qwen2", "qwen3", "qwen3_moe", "mistral", "granite"],
)
def test_an_llm_that_llava_computes_alike_is_taken(kind, dtype):
    config = AutoConfig.for_model(kind, **LARGE)
    fit_llm(AutoModelForCausalLM.from_config(config, dtype=dtype).eval())


# ----------------------------------------------------------------------------- where parts lie


def another_llm(world, folder):
    """The same LLM with other weights, in a folder."""
    shutil.copytree(world / "llm", folder)
    torch.manual_seed(5)
    config = AutoConfig.from_pretrained(world / "llm")
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


@pytest.fixture
def moved(world, tmp_path, monkeypatch):
    """A folder with toy/llm, toy/vision and out/, an adapter that was trained there.

    We stand in elsewhere/, where another toy/llm lies.
    """
    shutil.copytree(world / "llm", tmp_path / "toy/llm")
    shutil.copytree(world / "vision", tmp_path / "toy/vision")
    monkeypatch.chdir(tmp_path)
    model = new_model("toy/vision", "toy/llm")
    (tmp_path / "out").mkdir()
    save_adapter(tmp_path / "out", adapter_state(model), model.parts | {"image_mode": "square"})
    another_llm(world, tmp_path / "elsewhere/toy/llm")
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path


def test_an_adapter_finds_its_parts_from_another_folder(moved, llm):
    loaded = load_model("../out")
    assert torch.equal(loaded.embed_tokens.weight[: llm.vocab_size], llm.model.embed_tokens.weight)
    with safe_open(moved / "out/adapter.safetensors", "pt") as header:
        saved = header.metadata()
    assert saved["llm"] == f"{moved}/toy/llm" and saved["vision"] == f"{moved}/toy/vision"
    # a GGUF file in the hub's cache is a link to a file of another name
    (moved / "a.gguf").symlink_to(moved / "out/adapter.safetensors")
    assert absolute("../a.gguf").endswith("/a.gguf") and absolute("org/name") == "org/name"


@pytest.mark.parametrize("part", ["llm", "vision"])
def test_parts_that_have_moved_are_named_and_found_by_a_flag(moved, llm, world, part):
    (moved / "toy" / part).rename(moved / "new")
    gone = f"its {part} {moved}/toy/{part} is gone; say where it is: --{part}"
    captions = f"--data {world}/train.json --image_folder {world}/images"
    command = f"tacs --model {moved}/out {captions} --samples 1"
    finetune = f"--stage finetune --init {moved}/out"
    cfg = train.parse_config(finetune.split())
    for run in (
        lambda: load_model("../out"),
        lambda: evaluation.main(command.split()),
        lambda: train.build_model(cfg, torch.device("cpu")),
    ):
        with pytest.raises(UserError, match=gone):
            run()
    new = f"--{part} {moved}/new"
    assert evaluation.main(f"{command} {new}".split())["pairs"] == 1
    cfg = train.parse_config(f"{finetune} {new}".split())
    saved = dataclasses.asdict(cfg) | {"llm": "", "vision": ""}
    train.refuse_other_flags({"llm": cfg.llm, "vision": cfg.vision}, saved)  # --resume may say it
    model, _ = train.build_model(cfg, torch.device("cpu"))
    assert torch.equal(model.embed_tokens.weight[: llm.vocab_size], llm.model.embed_tokens.weight)


def test_another_part_at_the_same_place_is_refused(moved, world, capsys):
    (moved / "toy/llm").rename(moved / "kept")
    (moved / "elsewhere/toy/llm").rename(moved / "toy/llm")
    with pytest.raises(UserError, match=f"{moved}/toy/llm is not the llm .*where .*: --llm"):
        load_model("../out")
    assert load_model("../out", llm="../kept").parts["llm"].endswith("/kept")

    tokenizer = AutoTokenizer.from_pretrained(moved / "kept")
    tokenizer.add_tokens(["door"])
    tokenizer.save_pretrained(moved / "kept")
    with pytest.raises(UserError, match="/kept is not the llm that the adapter"):
        load_model("../out", llm="../kept")

    # as older versions wrote it
    names = {"llm": f"{moved}/toy/llm", "vision": f"{moved}/toy/vision", "image_mode": "square"}
    save_adapter(moved / "out", adapter_state(new_model("../toy/vision", "../toy/llm")), names)
    capsys.readouterr()
    load_model("../out")
    assert f"whether {moved}/toy/llm is its llm is unknown" in capsys.readouterr().out


def test_a_run_is_not_resumed_with_another_llm(flags, world, tmp_path):
    shutil.copytree(world / "llm", tmp_path / "llm")
    argv = [*flags, "--llm", f"{tmp_path}/llm", "--out_dir", f"{tmp_path}/run"]
    argv += ["--max_steps", "2", "--save_every", "1"]
    train.main(argv)
    shutil.rmtree(tmp_path / "run/checkpoints/step_2")
    train.main([*argv, "--resume"])
    shutil.rmtree(tmp_path / "run/checkpoints/step_2")
    shutil.rmtree(tmp_path / "llm")
    another_llm(world, tmp_path / "llm")
    with pytest.raises(UserError, match=f"step_1/.*: {tmp_path}/llm is not the llm"):
        train.main([*argv, "--resume"])


def test_a_digest_is_of_numbers_alone(world, tmp_path):
    """Not of dtypes, names and order, which others may choose."""
    llm, tokenizer = load_llm(world / "llm", torch.float32)
    vocabulary = tokenizer.get_vocab()
    expected = part_digest(llm, vocabulary)
    for source, dtype in itertools.product(
        (torch.float32, torch.float16, torch.bfloat16), (torch.float32, torch.bfloat16)
    ):
        # in numbers that all three can hold
        for p in llm.parameters():
            p.data = p.data.bfloat16().to(source)
        llm.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        loaded, _ = load_llm(tmp_path, dtype)
        assert part_digest(loaded, vocabulary) == expected
    renamed = torch.nn.ParameterList(reversed([p.detach() for p in llm.parameters()]))
    assert part_digest(renamed, dict(reversed(vocabulary.items()))) == expected
    assert part_digest(llm, vocabulary | {"<s>": 1}) != expected
    for p in llm.parameters():
        p.data.flatten()[0] += 1
        assert part_digest(llm, vocabulary) != expected
        p.data.flatten()[0] -= 1


# ----------------------------------------------------------------------------- positions, padding


@pytest.fixture
def short_llm(world, tmp_path):
    """An LLM that has 384 positions."""
    shutil.copytree(world / "llm", tmp_path / "llm")
    file = tmp_path / "llm/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_position_embeddings": 384}))
    return tmp_path / "llm"


def test_a_run_longer_than_the_llm_is_refused(flags, short_llm):
    flags = [*flags, "--llm", str(short_llm)]
    train.build_model(train.parse_config([*flags, "--max_length", "384"]), torch.device("cpu"))
    with pytest.raises(UserError, match="LLM has 384 positions .*use --max_length 384$"):
        train.main([*flags, "--max_length", "385"])


def test_a_question_longer_than_the_llm_is_refused(world, short_llm):
    model = new_model(world / "vision", short_llm)
    asked = [evaluation.question_sample(f"<image>\n{'red ' * n}", "1.png") for n in (9, 1)]
    dataset = LlavaDataset(
        asked, world / "images", model.preprocess, model.tokenizer, 25, 10**9, text="prompt"
    )
    longest = len(dataset[0]["input_ids"])
    room = 384 - longest
    assert len(evaluation.answer(model, asked, world / "images", 2, room)) == 2
    with pytest.raises(
        UserError, match=f"prompt of {longest} positions leaves {room} of the LLM's"
    ):
        evaluation.answer(model, asked, world / "images", 2, room + 1)


def test_captions_are_measured_as_far_as_the_llm_goes(world, flags, short_llm, tmp_path):
    """The loss of a caption of 600 tokens is that of its first, which transformers computes too."""
    out = f"--out_dir {tmp_path}/run --max_steps 1 --max_length 384"
    train.main([*flags, "--llm", str(short_llm), *out.split()])
    [sample] = data.load_samples(world / "train.json")[:1]
    sample["conversations"][1]["value"] = "q" * 600
    (tmp_path / "long.json").write_text(json.dumps([sample]))
    captions = f"--data {tmp_path}/long.json --image_folder {world}/images"
    loss = evaluation.main(f"tacs --model {tmp_path}/run {captions}".split())["caption_loss"]

    model = load_model(tmp_path / "run")
    llm = AutoModelForCausalLM.from_pretrained(short_llm)
    q = model.tokenizer("q", add_special_tokens=False)["input_ids"][0]
    dataset = LlavaDataset([sample], world / "images", model.preprocess, model.tokenizer, 25)
    with torch.no_grad():
        rows = llm.get_input_embeddings()
        x = torch.cat(
            [
                rows(torch.tensor([model.tokenizer.bos_token_id])),
                model.visual_tokens(dataset[0]["pixels"][None])[0],
                rows(torch.tensor([q] * (384 - 26))),
            ]
        )
        scores = llm(inputs_embeds=x[None]).logits[0].double().log_softmax(-1)[25:-1, q]
    assert loss == pytest.approx(-scores.mean().item(), rel=1e-5)


@pytest.mark.parametrize("others, is_padding_too", [([], True), ([5, 7], False), ([5], True)])
def test_only_rows_at_the_end_are_taken_for_padding(model, batch, tmp_path, others, is_padding_too):
    """A Llava of others may never say some tokens, but its softmax has them."""
    padding = model.llava.generation_config.suppress_tokens
    assert padding[0] == model.llava.config.image_token_id == model.vocabulary_size
    unsaid = others + padding * is_padding_too
    save_llava(model, tmp_path, full_state(model), torch.float32)
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"suppress_tokens": unsaid}))
    loaded = load_model(tmp_path)
    assert loaded.llava.generation_config.suppress_tokens == unsaid

    theirs = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    with torch.no_grad():
        rows = zip(batch["input_ids"].split(batch["lengths"]), batch["pixels"])
        logits = [theirs(ids[None], pixel_values=pixels[None]).logits[0] for ids, pixels in rows]
        logits = torch.cat(logits).double()
        if unsaid == padding:
            logits[..., padding] = -torch.inf
        else:
            assert loaded.vocabulary_size == logits.shape[-1]
        scores = logits.log_softmax(-1)[batch["trained"] - 1]
        ids = batch["input_ids"][batch["trained"]]
        out = loaded(**{k: v for k, v in batch.items() if not k.startswith("label_")})
    expected = -scores[torch.arange(len(ids)), ids].mean()
    assert out["loss_g"].item() == pytest.approx(expected.item(), rel=1e-5)
