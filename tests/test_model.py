import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoTokenizer,
    Dinov2Config,
    Dinov2Model,
    SiglipVisionConfig,
    SiglipVisionModel,
)

import data
from data import IGNORE, LlavaDataset, UserError, collate
from labels import LabelStore
from model import SEAModel


@pytest.fixture(scope="module")
def model(world, labels):
    torch.manual_seed(0)
    model = SEAModel.from_parts(world / "vision", world / "llm")
    model.set_words(LabelStore(labels).words)
    return model


@pytest.fixture(scope="module")
def batch(world, labels, model):
    dataset = LlavaDataset(
        data.load_samples(world / "train.json"),
        world / "images",
        model.geometry,
        model.tokenizer,
        model.image_tokens,
        labels=LabelStore(labels),
    )
    batch = collate([dataset[i] for i in range(4)], model.tokenizer.pad_token_id)
    batch.pop("index")
    return batch


def by_hand(model, batch, b):
    """Row b alone: every piece called by itself, the embeddings spliced by position, logits at all positions."""
    n = int(batch["attention_mask"][b].sum())
    ids = batch["input_ids"][b, :n]
    features = model.vision(batch["pixels"][b : b + 1], output_hidden_states=True).hidden_states[
        -2
    ][0, 1:]
    x_v = model.adapter(features)
    x, j = [], 0
    for token in ids.tolist():
        if token == model.image_token_id:
            x.append(x_v[j])
            j += 1
        else:
            x.append(model.llm.get_input_embeddings().weight[token])
    assert j == len(x_v)
    logits = model.llm(inputs_embeds=torch.stack(x)[None]).logits[0]
    targets = batch["labels"][b, 1:n]
    return (
        x_v,
        F.cross_entropy(logits[:-1].double(), targets, ignore_index=IGNORE, reduction="sum"),
        targets,
    )


def test_losses_equal_those_of_every_row_by_hand(model, batch):
    out = model(**{k: v for k, v in batch.items() if not k.startswith("label_")})
    rows = [by_hand(model, batch, b) for b in range(4)]
    tokens = sum(int((t != IGNORE).sum()) for _, _, t in rows)
    reference = sum(loss for _, loss, _ in rows) / tokens
    assert torch.allclose(out["loss_g"].double(), reference, rtol=1e-5) and "loss_a" not in out
    model.zero_grad()
    out["loss_g"].backward()
    grads = [p.grad.clone() for p in model.adapter.parameters()]
    model.zero_grad()
    reference.backward()
    for ours, p in zip(grads, model.adapter.parameters()):
        assert torch.allclose(ours, p.grad, rtol=1e-3, atol=1e-6)
    assert all(p.grad is None for p in [*model.vision.parameters(), *model.llm.parameters()])


def test_num_targets_is_what_the_sum_is_divided_by(model, batch):
    plain = {k: v for k, v in batch.items() if not k.startswith("label_")}
    tokens = int((batch["labels"][:, 1:] != IGNORE).sum())
    assert torch.allclose(
        model(**plain)["loss_g"] * tokens, model(**plain, num_targets=5)["loss_g"] * 5, rtol=1e-5
    )


def test_a_batch_without_trained_tokens_has_loss_0_and_a_graph(model, batch):
    plain = {k: v for k, v in batch.items() if not k.startswith("label_")}
    loss = model(**plain | {"labels": torch.full_like(batch["labels"], IGNORE)})["loss_g"]
    loss.backward()
    assert loss == 0


def test_word_vectors_are_means_of_embeddings(model):
    ids, offsets = model.words
    vectors = model.word_vectors(torch.tensor([8, 0, 8]))
    for vector, j in zip(vectors, (8, 0, 8)):
        rows = [
            model.llm.get_input_embeddings().weight[t]
            for t in ids[offsets[j] : offsets[j + 1]].tolist()
        ]
        assert torch.allclose(vector, sum(rows) / len(rows))
    assert model.word_vectors(torch.empty(0, dtype=torch.int64)).shape == (0, 24)


def test_alignment_loss_reaches_the_adapter_and_the_temperature(model, batch):
    model.zero_grad()
    out = model(**batch, generator=[torch.Generator().manual_seed(i) for i in range(4)])
    out["loss_a"].backward()
    assert out["pairs"] > 1 and model.log_scale.grad.abs() > 0
    assert all(p.grad.abs().sum() > 0 for p in model.adapter.parameters())


def test_generate_is_greedy_decoding_step_by_step(model, batch):
    ids, n = batch["input_ids"][:2, :26], 5
    new = model.generate(
        ids, torch.ones_like(ids), batch["pixels"][:2], max_new_tokens=n, min_new_tokens=n
    )
    with torch.no_grad():
        x = model.embed(ids, model.encode_image(batch["pixels"][:2]))
        for step in range(n):
            logits = model.llm(inputs_embeds=x).logits[:, -1]
            logits[:, model.tokenizer.eos_token_id] = -torch.inf
            token = logits.argmax(-1)
            assert torch.equal(token, new[:, step])
            x = torch.cat([x, model.embed_tokens(token)[:, None]], 1)


def test_left_padded_prompts_generate_as_alone(model, batch):
    ids = batch["input_ids"][:1, :26]
    alone = model.generate(
        ids, torch.ones_like(ids), batch["pixels"][:1], max_new_tokens=4, min_new_tokens=4
    )
    padded = F.pad(ids, (3, 0), value=model.tokenizer.pad_token_id)
    mask = F.pad(torch.ones_like(ids), (3, 0))
    assert torch.equal(
        alone, model.generate(padded, mask, batch["pixels"][:1], max_new_tokens=4, min_new_tokens=4)
    )


def test_adapter_file_round_trip_and_refusals(model, tmp_path, world):
    model.save_adapter(tmp_path)
    loaded = SEAModel.from_run(tmp_path)
    for (name, a), b in zip(model.trained_state().items(), loaded.trained_state().values()):
        assert torch.equal(a, b), name
    whole = (tmp_path / "adapter.safetensors").read_bytes()
    (tmp_path / "adapter.safetensors").write_bytes(whole[:-40])
    with pytest.raises(UserError, match="truncated or corrupt"):
        SEAModel.from_run(tmp_path)
    with pytest.raises(UserError, match="no adapter.safetensors"):
        SEAModel.from_run(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="--llm|cannot be loaded"):
        SEAModel.from_parts(world / "vision", world / "nothing-here")
    with pytest.raises(UserError, match="not a vision tower"):
        SEAModel.from_parts(world / "llm", world / "llm")


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
    tower = (
        SiglipVisionModel(SiglipVisionConfig(**config))
        if kind == "siglip"
        else Dinov2Model(Dinov2Config(**config))
    )
    other = SEAModel(
        tower,
        copy.deepcopy(model.llm),
        AutoTokenizer.from_pretrained(world / "llm"),
        model.geometry,
        {},
    )
    pixels = torch.rand(2, 3, 30, 30)
    hidden = tower(pixels, output_hidden_states=True).hidden_states[-2]
    features = hidden if kind == "siglip" else hidden[:, 1:]
    assert features.shape[1] == 25 and torch.allclose(
        other.encode_image(pixels), other.adapter(features)
    )


def test_gemma_scales_inside_its_embedding_and_so_does_the_adapter(world):
    from transformers import GemmaConfig, GemmaForCausalLM

    llm = GemmaForCausalLM(
        GemmaConfig(
            vocab_size=400,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
        )
    )
    vision = SEAModel.from_parts(world / "vision", world / "llm").vision
    model = SEAModel(
        vision,
        llm,
        AutoTokenizer.from_pretrained(world / "llm"),
        data.vision_geometry(str(world / "vision")),
        {},
    )
    assert model.adapter.output_scale == 4  # √16
    model.set_words(["red"])
    ids = model.words[0]
    assert torch.allclose(
        model.word_vectors(torch.tensor([0]))[0], 4 * llm.get_input_embeddings().weight[ids].mean(0)
    )
