"""Sequences that lie one after another, without padding, against transformers' padded batches."""

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForCausalLM

from data import UserError
from model import decode, fit_llm

SHAPE = dict(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    initializer_range=0.2,
)
HEADS = dict(head_dim=8)
LAYERS = dict(layer_types=["sliding_attention", "full_attention"] * 2)
# The LLMs of the paper, and those that one would take today. Windows are shorter than sequences.
FAMILIES = {
    "llama": dict(num_key_value_heads=4),  # Vicuna
    "llama-3": dict(model_type="llama"),
    "phi3": dict(sliding_window=5),
    "gemma": HEADS | dict(num_key_value_heads=1),
    "gemma3_text": HEADS | LAYERS | dict(sliding_window=5, query_pre_attn_scalar=3),
    "mistral": HEADS | dict(sliding_window=4),
    "qwen2": dict(use_sliding_window=True, sliding_window=3, max_window_layers=2),
    "qwen3": HEADS,
}
LENGTHS = [7, 12, 1, 6, 12, 2]


def tiny_llm(family):
    """The same weights each time, in float64, with transformers' own attention."""
    options = dict(model_type=family) | SHAPE | FAMILIES[family]
    torch.manual_seed(0)
    config = AutoConfig.for_model(options.pop("model_type"), **options)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()


def gradients(llm, x):
    return [x.grad.clone(), *(p.grad for p in llm.model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_and_gradients_are_those_of_a_padded_batch(family):
    """Padded on the right, where causal attention never looks; windows are transformers' masks."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(sum(LENGTHS), 16, dtype=torch.float64, generator=generator, requires_grad=True)
    weights = torch.randn(x.shape, dtype=torch.float64, generator=generator)

    theirs = tiny_llm(family)
    padded = pad_sequence(x.split(LENGTHS), batch_first=True)
    hidden = theirs.model(inputs_embeds=padded).last_hidden_state
    expected = torch.cat([row[:n] for row, n in zip(hidden, LENGTHS)])
    (expected * weights).sum().backward()
    expected_gradients = gradients(theirs, x)

    ours = tiny_llm(family)
    fit_llm(ours)
    x.grad = None
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    packed = decode(ours.model, x, positions, LENGTHS)
    (packed * weights).sum().backward()
    error = 1e-5 if "gemma" in family else 1e-10  # Gemma's norms are in float32 whatever it gets
    torch.testing.assert_close(packed, expected, rtol=error, atol=error)
    torch.testing.assert_close(gradients(ours, x), expected_gradients, rtol=error, atol=error)


def test_an_llm_that_mixes_positions_by_other_means_is_refused():
    """Such as one with state from token to token, or whose layers do not hand on the lengths."""
    llm = tiny_llm("llama")

    def drop_lengths(attention, args, kwargs):
        return args, kwargs | {"lengths": [kwargs["hidden_states"].shape[1]]}

    for layer in llm.model.layers:
        layer.self_attn.register_forward_pre_hook(drop_lengths, with_kwargs=True)
    with pytest.raises(UserError, match="does not keep sequences apart"):
        fit_llm(llm)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_any_other_attention_gives_nan(attention):
    """It would mix the sequences, or not be causal."""
    llm = tiny_llm("llama-3")
    fit_llm(llm)
    llm.model.set_attn_implementation(attention)
    hidden = decode(llm.model, torch.randn(6, 16).double(), torch.arange(3).repeat(2), [3, 3])
    assert hidden.isnan().all()


def test_the_attention_reaches_a_decoder_in_another_llm():
    """As in a Llava folder, whose decoder has a config of its own."""
    outer, inner = tiny_llm("llama"), tiny_llm("llama")
    outer.model = inner.model
    fit_llm(outer)
    assert inner.model.config._attn_implementation == "packed"


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_padded_on_the_left_generate_as_alone(family):
    """Longer than the windows."""
    llm = tiny_llm(family)
    fit_llm(llm)
    prompts = [torch.arange(3, 3 + n) for n in (9, 4)]
    ids = pad_sequence(prompts, batch_first=True, padding_side="left")
    mask = pad_sequence(
        [torch.ones_like(p) for p in prompts], batch_first=True, padding_side="left"
    )
    options = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False)
    together = llm.generate(ids, attention_mask=mask, **options)[:, 9:]
    plain = tiny_llm(family)
    for prompt, new in zip(prompts, together):
        mask = torch.ones(1, len(prompt))
        alone = plain.generate(prompt[None], attention_mask=mask, **options)
        assert alone[0, len(prompt) :].tolist() == new.tolist()
