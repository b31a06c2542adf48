"""Stage 2's chat formats: what is fed, what is trained, and that inference builds the same."""

import copy
import datetime
import json
from pathlib import Path

import mistral_common
import numpy as np
import pytest
import torch
from conftest import MEAN, STD, TEMPLATES
from hypothesis import given, settings
from hypothesis import strategies as st
from mistral_common.protocol.instruct.messages import AssistantMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers import AutoProcessor, AutoTokenizer, LlavaProcessor
from transformers.utils import chat_template_utils

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

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
HEAD = "<|start_header_id|>{}<|end_header_id|>\n\n"
TURN = "<|START_OF_TURN_TOKEN|><|{}_TOKEN|>"
TODAY = "Today Date: 26 Jul 2024\n\n"
# the formats as their owners publish them: what a chat begins with if its system text is "Be
# brief.", if it has none, and an image, "Q1", "A1", "Q2", "A2"
PUBLISHED = {
    "vicuna": (
        "Be brief. USER: ",
        f"{SYSTEM} USER: ",
        "<image>\nQ1 ASSISTANT: A1</s>USER: Q2 ASSISTANT: A2</s>",
    ),
    # which writes no </s>
    "llava-1.5": (
        "Be brief. USER: ",
        "USER: ",
        "<image>\nQ1 ASSISTANT: A1</s> USER: Q2 ASSISTANT: A2</s>",
    ),
    "llama-3": (
        f"<|begin_of_text|>{HEAD.format('system')}Be brief.<|eot_id|>{HEAD.format('user')}",
        f"<|begin_of_text|>{HEAD.format('user')}",
        f"<image>\nQ1<|eot_id|>{HEAD.format('assistant')}A1<|eot_id|>"
        f"{HEAD.format('user')}Q2<|eot_id|>{HEAD.format('assistant')}A2<|eot_id|>",
    ),
    "llama-3.1": (
        f"<s>{HEAD.format('system')}{TODAY}Be brief.<|eot_id|>{HEAD.format('user')}",
        f"<s>{HEAD.format('system')}{TODAY}<|eot_id|>{HEAD.format('user')}",
        f"<image>\nQ1<|eot_id|>{HEAD.format('assistant')}A1<|eot_id|>"
        f"{HEAD.format('user')}Q2<|eot_id|>{HEAD.format('assistant')}A2<|eot_id|>",
    ),
    "hermes": (
        "<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n",
        "<s><|im_start|>user\n",
        "<image>\nQ1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n"
        "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\nA2<|im_end|>",
    ),
    "phi-3": (
        "<|system|>\nBe brief.<|end|>\n<|user|>\n",
        "<|user|>\n",
        "<image>\nQ1<|end|>\n<|assistant|>\nA1<|end|>\n"
        "<|user|>\nQ2<|end|>\n<|assistant|>\nA2<|end|>",
    ),
    "phi-4": (
        "<|im_start|>system<|im_sep|>Be brief.<|im_end|><|im_start|>user<|im_sep|>",
        "<|im_start|>user<|im_sep|>",
        "<image>\nQ1<|im_end|><|im_start|>assistant<|im_sep|>A1<|im_end|>"
        "<|im_start|>user<|im_sep|>Q2<|im_end|><|im_start|>assistant<|im_sep|>A2<|im_end|>",
    ),
    "gemma": (
        "<s><start_of_turn>user\nBe brief.\n\n",
        "<s><start_of_turn>user\n",
        "<image>\nQ1<end_of_turn>\n<start_of_turn>model\nA1<end_of_turn>\n"
        "<start_of_turn>user\nQ2<end_of_turn>\n<start_of_turn>model\nA2<end_of_turn>",
    ),
    "zephyr-gemma": (
        "<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n",
        "<s><|im_start|>user\n",
        "<image>\nQ1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n"
        "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\nA2<|im_end|>",
    ),
    "chatml": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n",
        "<|im_start|>system\nBe Qwen.<|im_end|>\n<|im_start|>user\n",
        "<image>\nQ1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n"
        "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\nA2<|im_end|>",
    ),
    # which writes empty thoughts before A2
    "qwen3": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n",
        "<|im_start|>user\n",
        "<image>\nQ1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n"
        "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\nA2<|im_end|>",
    ),
    "mistral-v1": (
        "<s>[INST] Be brief.\n\n",
        "<s>[INST] ",
        "<image>\nQ1 [/INST] A1</s>[INST] Q2 [/INST] A2</s>",
    ),
    # which writes the system text before Q2
    "mistral-v3": (
        "<s>[INST] Be brief.\n\n",
        "<s>[INST] ",
        "<image>\nQ1[/INST] A1</s>[INST] Q2[/INST] A2</s>",
    ),
    "zephyr": (
        "<|system|>\nBe brief.</s>\n<|user|>\n",
        "<|user|>\n",
        "<image>\nQ1</s>\n<|assistant|>\nA1</s>\n<|user|>\nQ2</s>\n<|assistant|>\nA2</s>",
    ),
    "olmo-2": (
        "<|endoftext|><|system|>\nBe brief.\n<|user|>\n",
        "<|endoftext|><|user|>\n",
        "<image>\nQ1\n<|assistant|>\nA1<|endoftext|>\n<|user|>\nQ2\n<|assistant|>\nA2<|endoftext|>",
    ),
    "deepseek": (
        "<s>Be brief.<｜User｜>",
        "<s><｜User｜>",
        "<image>\nQ1<｜Assistant｜>A1</s><｜User｜>Q2<｜Assistant｜>A2</s>",
    ),
    # which writes nothing after A2
    "glm": (
        "[gMASK]<sop><|system|>\nBe brief.<|user|>\n",
        "[gMASK]<sop><|user|>\n",
        "<image>\nQ1<|assistant|>\nA1<|user|>\nQ2<|assistant|>\nA2<|user|>",
    ),
    "cohere": (
        f"<s>{TURN.format('SYSTEM')}Be brief.<|END_OF_TURN_TOKEN|>{TURN.format('USER')}",
        f"<s>{TURN.format('USER')}",
        f"<image>\nQ1<|END_OF_TURN_TOKEN|>{TURN.format('CHATBOT')}A1<|END_OF_TURN_TOKEN|>"
        f"{TURN.format('USER')}Q2<|END_OF_TURN_TOKEN|>{TURN.format('CHATBOT')}A2"
        "<|END_OF_TURN_TOKEN|>",
    ),
}
END = {
    "vicuna": "</s>",
    "llava-1.5": "</s>",
    "llama-3": "<|eot_id|>",
    "llama-3.1": "<|eot_id|>",
    "hermes": "<|im_end|>",
    "phi-3": "<|end|>",
    "phi-4": "<|im_end|>",
    "gemma": "<end_of_turn>",
    "zephyr-gemma": "<|im_end|>",
    "chatml": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "mistral-v1": "</s>",
    "mistral-v3": "</s>",
    "zephyr": "</s>",
    "olmo-2": "<|endoftext|>",
    "deepseek": "</s>",
    "glm": "<|user|>",
    "cohere": "<|END_OF_TURN_TOKEN|>",
}
FORMATS = list(PUBLISHED)
NO_SYSTEM = ("gemma", "mistral-v1", "mistral-v3")
SPACE = ("vicuna", "llava-1.5", "mistral-v1", "mistral-v3")  # between the prompt and an answer
GEOMETRY = dict(size=28, mode="pad", mean=tuple(MEAN), std=tuple(STD))  # 2 x 2 patches of 14


@pytest.fixture(scope="module")
def tokenizers(tokenizer_folders):
    found = {name: AutoTokenizer.from_pretrained(tokenizer_folders[name]) for name in FORMATS}
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


@pytest.mark.parametrize("name", FORMATS)
def test_the_text_is_the_published_format(tokenizers, name):
    def text_of(sample):
        return tokenizers[name].apply_chat_template(chat_messages(sample), tokenize=False)

    with_system, without, turns = PUBLISHED[name]
    sample = conversation("Q1\n<image>", "A1", "Q2", "A2", system="Be brief.")
    assert text_of(sample) == with_system + turns
    assert text_of(conversation("Q1", "A1", "Q2", "A2")) == without + turns


@pytest.mark.parametrize(
    "name, system",
    [
        *((name, None) for name in TEMPLATES),
        # the others take no system turn, or write it later
        *((name, "Be brief.") for name in TEMPLATES if name not in NO_SYSTEM),
    ],
)
def test_a_chat_has_the_ids_of_the_llms_own_template(tokenizer_folders, tokenizers, name, system):
    """Up to its last answer, but for what is said beside PUBLISHED."""
    own = AutoTokenizer.from_pretrained(tokenizer_folders[name])
    own.add_tokens(["<image>"], special_tokens=True)
    if name == "llama-3.1":  # written today
        own.chat_template = own.chat_template.replace("strftime_now is defined", "false")
    own.chat_template = own.chat_template.replace("<think>\n\n</think>\n\n", "")  # of Qwen3
    sample = conversation("Q1", "A1 (so).", "Q2?", "A2", "Q3", "- A3", image=None, system=system)
    messages = chat_messages(sample)
    if name == "llava-1.5":
        for message in messages:
            message["content"] = [{"type": "text", "text": message["content"]}]
    theirs = own.apply_chat_template(messages, return_dict=False)
    ours, _ = encode_chat(sample, tokenizers[name], 1, is_prompt=False)
    if ours[0] != theirs[0]:  # as with their processors: BOS is the tokenizer's
        assert ours.pop(0) == own.bos_token_id
    if name == "llava-1.5":
        ours = [token for token in ours if token != own.eos_token_id]
    # what ends the last answer is apart: GLM's writes nothing
    assert len(ours) > 20 and ours[:-1] == theirs[: len(ours) - 1]


@pytest.mark.parametrize("name", FORMATS)
def test_one_bos_where_the_tokenizer_has_one_and_the_end_token_is_eos(tokenizers, name):
    tokenizer = tokenizers[name]
    ids, _ = encode_conversation(conversation("<image>\nQ1", "A1"), tokenizer, 4, chat=True)
    bos = (ids == tokenizer.bos_token_id).nonzero().flatten().tolist()
    if name == "olmo-2":  # it ends answers too
        assert bos == [0, len(ids) - 1]
    else:
        assert bos == ([] if name == "phi-3" else [0])
    assert (ids == tokenizer.convert_tokens_to_ids("<image>")).sum() == 4
    assert tokenizer.eos_token == END[name] and tokenizer.pad_token_id is not None


CHARACTERS = st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"], exclude_characters="<|▁")
TRICKY = ["Yes.", "a red door", "1, 2", "line\nbreak", "two\n\nbreaks", "  spaces  ", "\tindent"]
TRICKY += ["é", "中文", "🙂 ok", "- a\n- b\n", "x" * 50, "USER: no", "ASSISTANT:"]
TEXT = st.one_of(st.text(CHARACTERS, max_size=30), st.sampled_from(TRICKY))


@settings(max_examples=25, deadline=None)
@given(
    turns=st.lists(st.tuples(TEXT, TEXT.filter(str.strip)), min_size=1, max_size=4),
    image=st.booleans(),
    place=st.integers(0, 3),
    system=st.sampled_from([None, "Be brief."]),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("name", FORMATS)
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
    start = " " if name in SPACE else ""
    assert len(spans) == len(turns)
    for span, (_, answer) in zip(spans, turns):
        # what a tokenizer cannot give back (Unicode that its normaliser rewrites) it cannot give
        # back alone either
        alone = tokenizer(start + answer.strip() + END[name], add_special_tokens=False)
        whole = tokenizer.decode(alone["input_ids"])
        assert span.strip(" ") == whole.strip(" ")
        if answer.isascii():
            assert span.lstrip(" ") == (answer.strip() + END[name]).lstrip(" ")


@pytest.mark.parametrize("name", FORMATS)
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
@pytest.mark.parametrize("name", FORMATS)
def test_control_tokens_in_a_text_stay_text(tokenizers, name, chat):
    """Only the template makes turns: "</s>" in a caption, a question or an answer ends nothing."""
    tokenizer = tokenizers[name]
    control = data.control_tokens(tokenizer)
    strings = [token for token in control.values() if token != "<image>"]
    # those of the turns, which are no control tokens of DeepSeek's tokenizer
    turns = [token for token in tokenizer.get_added_vocab() if token in PUBLISHED[name][2]]
    said = " ".join({*strings[:40], *turns} - {"<image>"})

    def found(*texts):
        ids, targets = encode_conversation(conversation(*texts), tokenizer, 4, chat=chat)
        return [[i for i in row.tolist() if i in control] for row in (ids, targets)]

    assert found(f"Q1 {said}", f"A1 {said}.") == found("Q1", "A1.")


@pytest.mark.parametrize("name", FORMATS)
def test_image_is_text_in_a_sample_without_an_image(tokenizers, name, tmp_path):
    """Code has it, as in ShareGPT's; LLaVA takes it as text. No pixels are there for its token."""
    tokenizer = tokenizers[name]
    said = "<image>\nQ1 <im<image>age>", "A1 <image><image>", "Q2", "A2"
    texts = conversation(*said, image=None, system="Be <image>.")
    (tmp_path / "a.json").write_text(json.dumps([texts]))
    samples = load_samples(tmp_path / "a.json", captions=False)
    dataset = data.LlavaDataset(samples, tmp_path, GEOMETRY, tokenizer, 4, text="chat")
    item = dataset[0]
    control = data.control_tokens(tokenizer)
    plain = conversation("Q1", "A1", "Q2", "A2", image=None, system="Be.")
    expected, _ = encode_conversation(plain, tokenizer, 4, chat=True)
    found = [[i for i in ids.tolist() if i in control] for ids in (item["input_ids"], expected)]
    assert found[0] == found[1] and "pixels" not in item and not item["is_image"].any()
    written = tokenizer.decode(item["input_ids"]).replace("\u200b", "")
    assert written.count("<image>") == 5
    trained = tokenizer.decode(item["targets"][item["targets"] != IGNORE]).replace("\u200b", "")
    assert trained.count("<image>") == 2


def test_of_templates_by_name_the_default_is_read(tokenizers):
    tokenizer = copy.deepcopy(tokenizers["phi-4"])
    tokenizer.chat_template = {"tool_use": "{{ messages }}", "default": TEMPLATES["chatml"]}
    prepare_tokenizer(tokenizer)
    assert tokenizer.chat_template == tokenizers["chatml"].chat_template


@pytest.mark.parametrize("name", FORMATS)
def test_a_prepared_tokenizer_that_is_saved_and_prepared_again_is_the_same(
    tokenizers, processors, name
):
    """As stage 2 does after stage 1, and eval.py with a model of stage 2."""
    again = copy.deepcopy(processors[name].tokenizer)
    prepare_tokenizer(again)
    assert again.chat_template == tokenizers[name].chat_template
    assert (again.eos_token, again.pad_token) == (END[name], tokenizers[name].pad_token)
    sample = conversation("Q1?", "(A1).", "Q2?", "A2.")
    before, after = (encode_chat(sample, t, 4, False) for t in (tokenizers[name], again))
    assert before == after


def test_a_template_that_marks_answers_is_read_like_others(tokenizer_folders, tokenizers):
    """As a model that was exported by an older version brings one."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folders["gemma"])
    tokenizer.eos_token = "<end_of_turn>"
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}"
        "{{ '<start_of_turn>user\n' + m.content + '<end_of_turn>\n' }}"
        "{% elif m.role == 'assistant' %}{{ '<start_of_turn>model\n' }}"
        "{% generation %}{{ m.content + eos_token + '\n' }}{% endgeneration %}"
        "{% endif %}{% endfor %}"
    )
    prepare_tokenizer(tokenizer)
    sample = conversation("Q1?", "A1.", "Q2?", "A2.")
    assert encode_chat(sample, tokenizer, 4, False) == encode_chat(
        sample, tokenizers["gemma"], 4, False
    )


def test_a_template_that_writes_the_date_gives_the_same_ids_on_another_day(
    tokenizer_folders, tokenizers, monkeypatch
):
    class Tomorrow:
        @staticmethod
        def now():
            return datetime.datetime(2031, 5, 17)

    monkeypatch.setattr(chat_template_utils, "datetime", Tomorrow)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folders["llama-3.1"])
    messages = [{"role": "user", "content": "Q1"}]
    assert "17 May 2031" in tokenizer.apply_chat_template(messages, tokenize=False)
    prepare_tokenizer(tokenizer)
    assert tokenizer.chat_template == tokenizers["llama-3.1"].chat_template
    assert "26 Jul 2024" in tokenizer.apply_chat_template(messages, tokenize=False)


def test_a_template_may_begin_with_a_newline(tokenizer_folders):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folders["phi-4"])
    tokenizer.chat_template = "\n" + TEMPLATES["phi-4"]
    prepare_tokenizer(tokenizer)
    messages = [{"role": "user", "content": "Q1"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "\n<|im_start|>user<|im_sep|>Q1"


def test_an_answer_after_plain_text_has_the_ids_of_mistrals_own_code(tokenizer_folders):
    """Without the space, as the template has it, "](" would be one token."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folders["mistral-v1"])
    tokenizer.chat_template = TEMPLATES["mistral-v1"].replace('" " + m.content', "m.content")
    own = tokenizer.apply_chat_template([{"role": "user", "content": "Q1"}], tokenize=False)
    assert tokenizer.tokenize(own + "(a)")[-3:] == ["](", "a", ")"]
    prepare_tokenizer(tokenizer)
    source = Path(mistral_common.__file__).parent / "data/tokenizer.model.v1"
    for answer in ("(a) red.", "A1", "中"):
        ids, labels = encode_conversation(conversation("Q1", answer), tokenizer, 4, chat=True)
        turns = [UserMessage(content="Q1"), AssistantMessage(content=answer)]
        theirs = MistralTokenizer.from_file(str(source)).encode_chat_completion(
            ChatCompletionRequest(messages=[*turns, UserMessage(content="Q2")])
        )
        answer_ids = labels[labels != IGNORE].tolist()
        start = len(ids) - len(answer_ids) - 4 - 2  # 4 for the image, 2 for what follows it
        assert theirs.tokens[start:][: len(answer_ids)] == answer_ids


NO_TURNS = "{% for m in messages if m.role == 'user' %}{{ m.content }}</s>{% endfor %}"
REFUSED = {
    "answers left out": (NO_TURNS, r"does not write .* \(it leaves one out or moves it\); remove"),
    "its own error": ("{{ raise_exception('only pictures') }}", r"\(only pictures\); remove chat"),
    "no template": ("{% for", r"does not write the turns user, assistant.* \(.*end.*\); remove"),
    "other rounds": (
        "{% for m in messages %}{{ m.content + ('A:' if loop.first else '</s>') }}{% endfor %}",
        "writes 'A:' and '</s>' around the first answer, .* around later ones; remove chat",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_chat_template_that_cannot_be_read_is_refused(tokenizer_folders, name):
    template, message = REFUSED[name]
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folders["vicuna"])
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=f"vicuna: its chat template .*{message}"):
        prepare_tokenizer(tokenizer)
    tokenizer.chat_template = None  # which is the fix that it names
    prepare_tokenizer(tokenizer)


def test_a_prompt_that_swallows_the_start_of_an_answer_is_refused(tokenizer_folders):
    """Phi-3's markers take the spaces after them."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folders["phi-3"])
    tokenizer.chat_template = (
        TEMPLATES["phi-3"].replace(r"|>\n' +", "|> ' +").replace("|>\n", "|> ")
    )
    with pytest.raises(UserError, match="begins with '0' do not part into tokens of their own"):
        prepare_tokenizer(tokenizer)


def test_a_tokenizer_that_ends_texts_or_has_nothing_to_end_answers_is_refused(tokenizer_folders):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folders["vicuna"])
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    with pytest.raises(UserError, match="its tokenizer adds '<s></s>' to each text"):
        prepare_tokenizer(tokenizer)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folders["vicuna"])
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="has no token that ends an answer; name an eos_token"):
        prepare_tokenizer(tokenizer)


def test_an_answer_that_is_not_marked_is_named(tokenizers):
    tokenizer = copy.deepcopy(tokenizers["chatml"])
    tokenizer.chat_template = (
        "{% for m in messages %}{% if loop.index == 2 %}"
        "{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    with pytest.raises(UserError, match="sample 1: 1 of its 2 answers begin with a token"):
        encode_conversation(conversation("Q1", "A1", "Q2", "A2"), tokenizer, 4, chat=True)


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
        (conversation("<im<image>age>\nQ1", "A1"), "one <image> stands in another"),
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
    batch = data.collate([dataset[i] for i in range(3)])
    rows = batch["input_ids"].split(batch["lengths"])
    image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    assert batch["pixels"].shape == (1, 3, 28, 28)
    assert [(ids == image_token_id).sum() for ids in rows] == [0, 4, 0]
    assert batch["lengths"] == [len(dataset[i]["input_ids"]) for i in range(3)]
    # the end token is the pad token, and still every end token is trained
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    trained = batch["input_ids"][batch["trained"]]
    assert (trained == tokenizer.eos_token_id).sum() == 3
    assert data.collate([dataset[0]])["pixels"].shape[0] == 0


@pytest.mark.parametrize("name", FORMATS)
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


@pytest.mark.parametrize("name", FORMATS)
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
