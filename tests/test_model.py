"""model.py against every row by hand, transformers' own classes and step-by-step decoding."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CohereConfig,
    Dinov2Config,
    Dinov2Model,
    Gemma2Config,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GraniteConfig,
    OPTConfig,
    PhiConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
)

import data
from data import LlavaDataset, UserError, collate
from labels import LabelStore
from model import (
    SEAModel,
    adapter_state,
    assemble,
    load_model,
    load_vision,
    new_model,
    refuse_llm,
    save_adapter,
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
    batch = collate([dataset[i] for i in range(4)], model.tokenizer.pad_token_id)
    batch.pop("index")
    batch.pop("attention_mask")
    return batch


@pytest.fixture(scope="module")
def llm(world):
    """The LLM alone, by transformers."""
    return AutoModelForCausalLM.from_pretrained(world / "llm")


def by_hand(model, llm, batch, b):
    """Row b alone: all pieces by themselves, embeddings spliced by position, logits everywhere."""
    L = batch["input_ids"].shape[1]
    trained = [int(i) - b * L for i in batch["trained"] if i // L == b]
    ids = batch["input_ids"][b, : trained[-1] + 1]  # the last token of a caption is trained
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
    features = model.word_features(torch.tensor([8, 0, 8]))
    for feature, j in zip(features, (8, 0, 8)):
        rows = [llm.get_input_embeddings().weight[t] for t in model.word_token_ids[j]]
        assert torch.allclose(feature, sum(rows) / len(rows))
    assert model.word_features(torch.empty(0, dtype=torch.int64)).shape == (0, 24)


def test_the_feature_of_a_word_may_be_its_first_token(model, llm, labels):
    words = ["red", "redred red"]
    model.set_words(words, max_tokens=1)
    both = model.word_features(torch.tensor([0, 1]))
    model.set_words(words)
    first_token = llm.get_input_embeddings().weight[model.word_token_ids[1][0]]
    assert len(model.word_token_ids[1]) > 1 and torch.equal(both[1], first_token)
    assert not torch.equal(both[1], model.word_features(torch.tensor([1]))[0])
    model.set_words(LabelStore(labels).words)


def test_alignment_loss_reaches_the_adapter_and_the_temperature(model, batch):
    model.zero_grad()
    out = model(**batch, generator=[torch.Generator().manual_seed(i) for i in range(4)])
    out["loss_a"].backward()
    assert out["pairs"] > 1 and model.log_scale.grad.abs() > 0
    assert all(p.grad.abs().sum() > 0 for p in model.adapter.parameters())


def prompt(batch, rows, padding=0, pad_id=0):
    """The start of some rows, the image and one word, as a batch padded on the left."""
    ids = F.pad(batch["input_ids"][:rows, :27], (padding, 0), value=pad_id)
    mask = F.pad(torch.ones(rows, 27, dtype=torch.int64), (padding, 0))
    return {"input_ids": ids, "attention_mask": mask, "pixels": batch["pixels"][:rows]}


def test_generate_is_greedy_decoding_step_by_step(model, llm, batch):
    new = model.generate(prompt(batch, 2), max_new_tokens=5, min_new_tokens=5)
    ids = batch["input_ids"][:2, :27]
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
    feature = model.word_features(torch.tensor([0]))[0]
    assert torch.allclose(feature, 4 * rows.mean(0))
    seen = llm.get_input_embeddings()(torch.tensor(model.word_token_ids[0]))
    assert torch.allclose(feature, seen.mean(0))


@pytest.mark.parametrize(
    "config, reason",
    [
        (Gemma2Config(**SMALL, num_key_value_heads=1, head_dim=8), "final_logit_softcapping"),
        (GraniteConfig(**SMALL, logits_scaling=8.0), "logits_scaling"),
        (CohereConfig(**SMALL), "logit_scale"),
        (GPT2Config(vocab_size=400, n_embd=16, n_layer=1, n_head=2), "takes a decoder with"),
        (OPTConfig(vocab_size=400, hidden_size=16, ffn_dim=32, num_hidden_layers=1,
                   num_attention_heads=2, word_embed_proj_dim=16), "takes a decoder with"),
        (PhiConfig(**SMALL), "LM head without bias"),
    ],
)  # fmt: skip
def test_an_llm_that_llava_would_compute_otherwise_is_refused(config, reason):
    llm = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UserError, match=f"{type(llm).__name__} does not fit .*{reason}") as e:
        refuse_llm(llm)
    assert "\n" not in str(e.value)


def test_an_llm_whose_settings_change_nothing_is_taken():
    refuse_llm(AutoModelForCausalLM.from_config(GraniteConfig(**SMALL, logits_scaling=1.0)))
