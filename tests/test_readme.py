"""README.md: its Python block gives SEAModel's loss, its lines are short, its flags exist."""

import functools
import importlib
import re
import shlex
from pathlib import Path

import pytest
import torch

from data import load_samples, run_command
from labels import LabelStore
from model import new_model
from train import parse_config

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def test_the_loss_in_a_trainer_of_ones_own(world, labels, tmp_path, monkeypatch):
    model = new_model(world / "vision", world / "llm")
    store = LabelStore(labels)
    model.set_words(store.words)
    index = [3, 0, 7, 12]
    pixels = torch.rand(len(index), 3, 30, 30)
    visual_tokens = model.visual_tokens(pixels).detach().requires_grad_()
    (tmp_path / "data").mkdir()
    (tmp_path / "data/labels").symlink_to(labels)
    monkeypatch.chdir(tmp_path)

    [code] = blocks("python")
    names = dict(
        tokenizer=model.tokenizer,
        embedding=model.embed_tokens,
        visual_tokens=visual_tokens,
        index=index,
        loss_g=torch.tensor(2.0),
    )
    torch.manual_seed(0)  # of the patches and labels that are drawn
    exec(code, names)
    names["loss"].backward()
    assert names["loss"].isfinite() and names["counts"]["pairs"] > 1
    assert visual_tokens.grad.abs().sum() > 0 and names["log_scale"].grad.abs() > 0

    rows = [store[i] for i in index]
    prompt = model.tokenizer("<image>" * model.image_tokens + "a door", return_tensors="pt")
    ids = prompt["input_ids"].expand(len(index), -1)
    torch.manual_seed(0)
    out = model(
        ids,
        torch.where(ids.flatten() == model.llava.config.image_token_id)[0],
        torch.arange(0),
        pixels,
        torch.stack([label_ids for label_ids, _ in rows]),
        torch.stack([label_scores for _, label_scores in rows]),
    )
    assert torch.allclose(names["loss"] - 2, out["loss_a"], rtol=1e-5)
    assert names["counts"]["pairs"] == out["pairs"]


def test_the_sample_is_one_that_can_be_loaded(tmp_path):
    [sample] = blocks("json")
    (tmp_path / "data.jsonl").write_text(sample.replace("\n", " "))
    assert load_samples(tmp_path / "data.jsonl")[0]["image"] == "a/1.jpg"


def test_length():
    lines = README.splitlines()
    assert len(lines) <= 300 and max(map(len, lines)) <= 120


def commands():
    """The commands that run one of our files: (file, arguments)."""
    text = re.sub(r"^```.*?^```", "", README, flags=re.DOTALL | re.MULTILINE)
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    for line in [*lines, *spans]:
        if found := re.search(r"\b(?:python|torchrun) .*?\b(\w+)\.py (.*)", line):
            yield found[1], shlex.split(found[2], comments=True)


@pytest.mark.parametrize("program, argv", list(commands()))
def test_the_flags_of_every_command_exist(program, argv, monkeypatch):
    monkeypatch.setenv("RANK", "0")  # as torchrun does
    module = importlib.import_module("speed" if program == "bench" else program)
    if program == "choices":
        assert len(argv) == 3
        return
    if program == "train":
        module.parse_config(argv)
        return
    called = []

    def parse_only(doc, functions, argv):
        stubs = {
            name: functools.wraps(f)(lambda **_: called.append(1)) for name, f in functions.items()
        }
        run_command(doc, stubs, argv)

    monkeypatch.setattr(module, "run_command", parse_only)
    module.main(argv)
    assert called


@pytest.mark.parametrize(
    "flags, folder",
    [
        ("", "pretrain"),
        ("--sea_weight 0", "pretrain_baseline"),
        ("--llm gemma-2b", "pretrain_gemma-2b"),
        ("--vision siglip-384 --labels data/labels-siglip", "pretrain_siglip-384"),
        ("--vision dinov2-224 --labels data/labels-224", "pretrain_dinov2-224"),
        ("--recipe prime --llm llama-3-8b", "prime_llama-3-8b"),
    ],
)
def test_the_folders_of_the_papers_runs(flags, folder):
    assert flags in README and f"`{folder}`" in README
    assert parse_config(flags.split()).out_dir == f"out/{folder}"
    finetune = parse_config(["--stage", "finetune", "--init", f"out/{folder}"])
    assert finetune.out_dir == f"out/{folder}_finetune"
