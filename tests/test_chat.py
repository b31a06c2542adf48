"""Stage 2's chat formats: what is fed, what is trained, and that inference builds the same."""

import copy
import json

import numpy as np
import pytest
import torch
from conftest import MEAN, STD
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers import AutoProcessor, AutoTokenizer, LlavaProcessor

import data
from data import (
    IGNORE,
    UserError,
    chat_messages,
    encode_chat,
    encode_conversation,
    image_processor,
    load_samples,
    prepare_tokenizer,
)

FAMILIES = ("vicuna", "llama-3", "phi-3", "gemma", "chatml")
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
# the formats as their owners publish them, a turn a line, for: system text "Be brief.", image,
# "Q1", "A1", "Q2", "A2"
PUBLISHED = {
    "vicuna": "Be brief. USER: <image>\nQ1 ASSISTANT: A1</s>USER: Q2 ASSISTANT: A2</s>",
    "llama-3": (
        "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n<image>\nQ1<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nA1<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nQ2<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nA2<|eot_id|>"
    ),
    "phi-3": (
        "<|system|>\nBe brief.<|end|>\n"
        "<|user|>\n<image>\nQ1<|end|>\n"
        "<|assistant|>\nA1<|end|>\n"
        "<|user|>\nQ2<|end|>\n"
        "<|assistant|>\nA2<|end|>\n"
    ),
    "gemma": (
        "<start_of_turn>user\nBe brief.\n\n<image>\nQ1<end_of_turn>\n"
        "<start_of_turn>model\nA1<end_of_turn>\n"
        "<start_of_turn>user\nQ2<end_of_turn>\n"
        "<start_of_turn>model\nA2<end_of_turn>\n"
    ),
    "chatml": (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\n<image>\nQ1<|im_end|>\n"
        "<|im_start|>assistant\nA1<|im_end|>\n"
        "<|im_start|>user\nQ2<|im_end|>\n"
        "<|im_start|>assistant\nA2<|im_end|>\n"
    ),
}
DEFAULT_SYSTEM = {
    "vicuna": SYSTEM,
    "llama-3": SYSTEM,
    "phi-3": "You are a helpful AI assistant.",
    "gemma": None,
    "chatml": None,
}
END = {
    "vicuna": "</s>",
    "llama-3": "<|eot_id|>",
    "phi-3": "<|end|>",
    "gemma": "<end_of_turn>\n",
    "chatml": "<|im_end|>",
}
GEOMETRY = dict(size=28, mode="pad", mean=tuple(MEAN), std=tuple(STD))  # 2 x 2 patches of 14


@pytest.fixture(scope="module")
def tokenizers(tokenizer_folders):
    found = {name: AutoTokenizer.from_pretrained(tokenizer_folders[name]) for name in FAMILIES}
    for tokenizer in found.values():
        prepare_tokenizer(tokenizer)
    return found


@pytest.fixture(scope="module")
def processors(tokenizers, tmp_path_factory):
    """Saved and loaded again, as an exported folder brings them."""
    found = {}
    for name, tokenizer in tokenizers.items():
        folder = tmp_path_factory.mktemp(name)
        LlavaProcessor(
            image_processor(**GEOMETRY),
            tokenizer,
            patch_size=14,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=tokenizer.chat_template,
        ).save_pretrained(folder)
        found[name] = AutoProcessor.from_pretrained(folder)
    return found


def conversation(*turns, image="a.png", system=None):
    turns = [
        {"from": who, "value": text} for who, text in zip(["human", "gpt"] * len(turns), turns)
    ]
    turns = [{"from": "system", "value": system}, *turns] if system else turns
    return {"id": "1", "conversations": turns} | ({"image": image} if image else {})


def trained_spans(ids, labels, tokenizer):
    """The texts of the runs of trained tokens."""
    spans, last = [], False
    for token, label in zip(ids.tolist(), labels.tolist()):
        if label != IGNORE:
            assert label == token
            spans = [*spans, [token]] if not last else [*spans[:-1], [*spans[-1], token]]
        last = label != IGNORE
    return [tokenizer.decode(span) for span in spans]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_text_is_the_published_format(tokenizers, name):
    def text_of(sample):
        return tokenizers[name].apply_chat_template(chat_messages(sample), tokenize=False)

    published = PUBLISHED[name]
    sample = conversation("Q1\n<image>", "A1", "Q2", "A2", system="Be brief.")
    assert text_of(sample) == published
    default = text_of(conversation("Q1", "A1", "Q2", "A2"))
    if DEFAULT_SYSTEM[name]:
        assert default == published.replace("Be brief.", DEFAULT_SYSTEM[name])
    else:
        assert default in published.replace("Be brief.\n\n", "")
        assert default.startswith(published[:9])


@pytest.mark.parametrize("name", FAMILIES)
def test_one_bos_where_the_tokenizer_has_one_and_the_end_token_is_eos(tokenizers, name):
    tokenizer = tokenizers[name]
    ids, _ = encode_conversation(conversation("<image>\nQ1", "A1"), tokenizer, 4, chat=True)
    bos = (ids == tokenizer.bos_token_id).nonzero().flatten().tolist()
    assert bos == ([] if name == "phi-3" else [0])
    assert (ids == tokenizer.convert_tokens_to_ids("<image>")).sum() == 4
    assert tokenizer.eos_token == END[name].strip() and tokenizer.pad_token_id is not None


CHARACTERS = st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"], exclude_characters="<|▁")
TRICKY = ["Yes.", "a red door", "1, 2", "line\nbreak", "two\n\nbreaks", "  spaces  ", "\tindent"]
TRICKY += ["é", "中文", "🙂 ok", "- a\n- b\n", "x" * 50, "USER: no", "ASSISTANT:"]
TEXT = st.one_of(st.text(CHARACTERS, max_size=30), st.sampled_from(TRICKY))


@settings(max_examples=60, deadline=None)
@given(
    turns=st.lists(st.tuples(TEXT, TEXT.filter(str.strip)), min_size=1, max_size=4),
    image=st.booleans(),
    place=st.integers(0, 3),
    system=st.sampled_from([None, "Be brief."]),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("name", FAMILIES)
def test_training_feeds_what_the_exported_processor_builds(
    tokenizers, processors, name, turns, image, place, system, seed
):
    """Token for token and pixel for pixel, for random conversations.

    And what is trained is the answers, whole.
    """
    tokenizer, processor = tokenizers[name], processors[name]
    texts = [text for pair in turns for text in pair]
    if image:
        at = 2 * (place % len(turns))
        texts[at] = texts[at] + "\n<image>" if place % 2 else "<image>\n" + texts[at]
    sample = conversation(*texts, image="a.png" if image else None, system=system)
    data.check_sample(sample, captions=False, where="here")
    ids, labels = encode_conversation(sample, tokenizer, 4, chat=True)
    rng = np.random.default_rng(seed)
    picture = Image.fromarray(rng.integers(0, 256, (*rng.integers(5, 60, 2), 3), dtype=np.uint8))

    messages = []  # as a user of the exported model writes them
    for message in chat_messages(sample):
        text = message["content"].removeprefix("<image>").strip()
        content = [{"type": "text", "text": text}]
        if message["content"].startswith("<image>"):
            content.insert(0, {"type": "image", "image": picture})
        messages.append({"role": message["role"], "content": content})
    tensors = dict(tokenize=True, return_dict=True, return_tensors="pt")
    built = processor.apply_chat_template(messages, **tensors)
    assert built["input_ids"][0].tolist() == ids.tolist()
    if image:
        assert torch.equal(built["pixel_values"][0], data.geometry(picture, **GEOMETRY))
    asked = processor.apply_chat_template(messages[:-1], add_generation_prompt=True, **tensors)
    prompt = asked["input_ids"][0]
    assert prompt.tolist() == ids[: len(prompt)].tolist()
    assert (labels[len(prompt) :] != IGNORE).any()

    spans = trained_spans(ids, labels, tokenizer)
    start = " " if name == "vicuna" else ""
    assert len(spans) == len(turns)
    for span, (_, answer) in zip(spans, turns):
        # what a tokenizer cannot give back (Unicode that its normaliser rewrites) it cannot give
        # back alone either
        alone = tokenizer(start + answer.strip() + END[name], add_special_tokens=False)
        whole = tokenizer.decode(alone["input_ids"])
        assert span.strip(" ") == whole.strip(" ")
        if answer.isascii():
            assert span.lstrip(" ") == (answer.strip() + END[name]).lstrip(" ")


@pytest.mark.parametrize("name", FAMILIES)
def test_truncation_never_cuts_an_image(tokenizers, name):
    tokenizer = tokenizers[name]
    image = tokenizer.convert_tokens_to_ids("<image>")
    sample = conversation("Q1", "A1", "<image>\nQ2", "A2")
    whole, labels = encode_conversation(sample, tokenizer, 9, chat=True)
    at = whole.tolist().index(image)
    message = "max_length 9 leaves no room for text beside 9 image tokens"
    with pytest.raises(UserError, match=message):
        encode_conversation(sample, tokenizer, 9, 9, chat=True)
    for length in range(11, len(whole) + 2):
        ids, cut = encode_conversation(sample, tokenizer, 9, length, chat=True)
        n = at if at < length < at + 9 else min(length, len(whole))
        assert ids.tolist() == whole[:n].tolist() and cut.tolist() == labels[:n].tolist()
        assert int((ids == image).sum()) in (0, 9)


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_control_tokens_in_a_text_stay_text(tokenizers, name, chat):
    """Only the template makes turns: "</s>" in a caption, a question or an answer ends nothing."""
    tokenizer = tokenizers[name]
    control = data.control_tokens(tokenizer)
    strings = [token for token in control.values() if token != "<image>"]
    said = " ".join({*strings[:40], END[name].strip()})

    def found(*texts):
        ids, targets = encode_conversation(conversation(*texts), tokenizer, 4, chat=chat)
        return [[i for i in row.tolist() if i in control] for row in (ids, targets)]

    assert found(f"Q1 {said}", f"A1 {said}.") == found("Q1", "A1.")


def test_a_template_that_writes_bos_and_templates_by_name(tokenizers):
    tokenizer = copy.deepcopy(tokenizers["vicuna"])
    own = "{{ bos_token }}" + tokenizer.chat_template
    tokenizer.chat_template = {"default": own, "tool_use": "{{ messages }}"}
    prepare_tokenizer(tokenizer)
    assert tokenizer.chat_template == own
    ids, _ = encode_conversation(conversation("Q1", "A1"), tokenizer, 4, chat=True)
    assert ids.tolist().count(tokenizer.bos_token_id) == 1


def test_an_unknown_chat_format_is_refused_and_no_format_is_vicunas(tokenizers):
    tokenizer = copy.deepcopy(tokenizers["vicuna"])
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    with pytest.raises(UserError, match="its chat template is unknown; enclose the answers"):
        prepare_tokenizer(tokenizer)
    tokenizer.chat_template = None
    prepare_tokenizer(tokenizer)
    assert tokenizer.chat_template == tokenizers["vicuna"].chat_template


def test_an_end_token_that_the_tokenizer_adds_is_not_trained_in_stage_1(tokenizers):
    tokenizer = copy.deepcopy(tokenizers["vicuna"])
    whole, targets = encode_conversation(conversation("Q1", "A1"), tokenizer, 4)
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    assert tokenizer("A1")["input_ids"][-1] == tokenizer.eos_token_id
    again = encode_conversation(conversation("Q1", "A1"), tokenizer, 4)
    assert torch.equal(again[0], whole) and torch.equal(again[1], targets)


def test_an_image_that_no_turn_names_comes_first_and_an_early_answer_is_dropped():
    sample = conversation("Q1", "A1", "Q2", "A2")
    sample["conversations"].insert(0, {"from": "gpt", "value": "Hello."})
    messages = chat_messages(sample)
    assert messages[0] == {"role": "user", "content": "<image>\nQ1"} and len(messages) == 4
    first = chat_messages(conversation("Q1 <image> more", "A1"))[0]
    assert first["content"] == "<image>\nQ1  more"


def test_a_marker_without_its_end_token_is_no_format(tokenizers):
    """GLM's vocabulary has <|assistant|> but no <|end|>: the first alone would never stop."""
    tokenizer = copy.deepcopy(tokenizers["chatml"])
    tokenizer.chat_template = None
    vocabulary = {t: i for t, i in tokenizer.get_vocab().items() if not t.startswith("<|im_")}
    vocabulary["<|assistant|>"] = 7
    tokenizer.get_vocab = lambda: vocabulary
    tokenizer.eos_token = "</s>"
    prepare_tokenizer(tokenizer)
    assert tokenizer.eos_token == "</s>" and "ASSISTANT:" in tokenizer.chat_template


def test_a_template_that_marks_answers_is_kept(tokenizers):
    tokenizer = copy.deepcopy(tokenizers["chatml"])
    own = (
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content + eos_token }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    tokenizer.chat_template = own
    prepare_tokenizer(tokenizer)
    assert tokenizer.chat_template == own
    # what is trained by this would never end
    tokenizer.chat_template = own.replace(" + eos_token", "")
    prepare_tokenizer(tokenizer)
    assert tokenizer.chat_template == tokenizers["chatml"].chat_template
    tokenizer.chat_template = (
        "{% for m in messages %}{% if loop.index == 2 %}"
        "{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    with pytest.raises(UserError, match="marks 1 of 2 answers"):
        encode_conversation(conversation("Q1", "A1", "Q2", "A2"), tokenizer, 4, chat=True)


@pytest.mark.parametrize("image", ["", "None", "none", "nan", None, float("nan")])
def test_what_counts_as_no_image(tmp_path, image):
    sample = conversation("Q1", "A1") | {"image": image}
    (tmp_path / "a.jsonl").write_text(json.dumps(sample) + "\n")
    [loaded] = load_samples(tmp_path / "a.jsonl", captions=False)
    assert data.image_of(loaded) is None and data.sample_length(loaded) == -2
    with pytest.raises(UserError, match='line 1: needs "image"'):
        load_samples(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    "sample, message",
    [
        (
            conversation("<image>\nQ1", "A1", image=None),
            r"here it is in turns of \['human'\], and the image is None",
        ),
        (
            conversation("<image>\nQ1", "A1", "<image>", "A2"),
            r"one human turn .* in turns of \['human', 'human'\]",
        ),
        (conversation("Q1", "A1 <image>"), r"here it is in turns of \['gpt'\]"),
        (
            conversation("Q1", "A1") | {"image": ["a", "b"]},
            r"one path below --image_folder, not \['a', 'b'\]",
        ),
        (conversation("Q1", "A1") | {"image": 7}, "one path below --image_folder, not 7"),
        (conversation("Q1", "A1", image="/etc/a.png"), "one path below --image_folder"),
        (conversation("Q1", "A1", image="a/../../b.png"), "one path below --image_folder"),
        (conversation("Q1", "A1", "Q2", " \n"), "an answer is empty"),
        (conversation("<im<image>age>\nQ1", "A1"), "another <image> remains"),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "human", "value": "b"}]},
            r"from \['human', 'human'\]",
        ),
        (
            {"conversations": [{"from": "user", "value": "a"}, {"from": "gpt", "value": "b"}]},
            r"from \['user', 'gpt'\]",
        ),
    ],
)
def test_what_stage_2_refuses(tmp_path, sample, message):
    (tmp_path / "a.json").write_text(json.dumps([conversation("Q1", "A1"), sample]))
    with pytest.raises(UserError, match=f"sample 2: .*{message}"):
        load_samples(tmp_path / "a.json", captions=False)


def test_text_only_and_image_samples_in_one_batch(tokenizers, tmp_path):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    tokenizer = tokenizers["llama-3"]
    samples = [
        conversation("Q1", "A1", image=None),
        conversation("<image>\nQ1", "A1"),
        conversation("Q", "A", image=""),
    ]
    dataset = data.LlavaDataset(samples, tmp_path, GEOMETRY, tokenizer, 4, text="chat")
    batch = data.collate([dataset[i] for i in range(3)], tokenizer.pad_token_id)
    images = (batch["input_ids"] == tokenizer.convert_tokens_to_ids("<image>")).sum(1)
    assert batch["pixels"].shape == (1, 3, 28, 28) and images.tolist() == [0, 4, 0]
    lengths = [len(dataset[i]["input_ids"]) for i in range(3)]
    assert batch["attention_mask"].sum(1).tolist() == lengths
    # padding is the end token, and still every end token is seen and trained
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    trained = batch["input_ids"].flatten()[batch["trained"]]
    assert (trained == tokenizer.eos_token_id).sum() == 3
    assert data.collate([dataset[0]], 0)["pixels"].shape[0] == 0


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("image", ["a.png", None])
def test_a_prompt_is_what_stands_before_the_trained_answer(tokenizers, name, image):
    """Of the first and of the second answer, image tokens and BOS included."""
    sample = conversation("Q1?", "A1.", "Q2?", "A2.", image=image, system="Be brief.")
    ids, labels = encode_conversation(sample, tokenizers[name], 4, chat=True)
    trained = (labels != IGNORE).nonzero().flatten().tolist()
    second = next(b for a, b in zip(trained, trained[1:]) if b > a + 1)
    for turns, start in ((2, trained[0]), (4, second)):
        asked = sample | {"conversations": sample["conversations"][:turns]}
        prompt, _ = encode_chat(asked, tokenizers[name], 4, is_prompt=True)
        assert prompt == ids[:start].tolist()


@pytest.mark.parametrize("name", PUBLISHED)
def test_stage_1_is_llavas_plain(tokenizers, name):
    """LLaVA encodes what stands before and after <image> apart, and drops the second BOS."""
    tokenizer = tokenizers[name]
    image = tokenizer.convert_tokens_to_ids("<image>")
    before, after = (tokenizer(text)["input_ids"] for text in ("", "A red door.\n"))
    if before:  # BOS
        assert after[: len(before)] == before
        after = after[len(before) :]
    ids, targets = data.encode_conversation(conversation("<image>", "A red door."), tokenizer, 4)
    assert ids.tolist() == before + [image] * 4 + after
    assert targets.tolist() == [IGNORE] * (len(before) + 4) + after
    if name == "vicuna":  # SentencePiece: a leading space
        assert tokenizer.convert_ids_to_tokens(after)[0] in ("▁A", "▁")
