"""README.md, docs/ and runs/: the Python block gives SEAModel's loss; all flags exist."""

import functools
import importlib
import operator
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch

from data import load_samples, run_command
from labels import LabelStore
from model import new_model
from train import parse_config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")}
SCRIPTS = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "runs").glob("*.sh")}


def blocks(language, text=README):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


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
    assert names["loss"].isfinite() and names["log"]["pairs"] > 1
    assert visual_tokens.grad.abs().sum() > 0 and names["log_scale"].grad.abs() > 0

    rows = [store[i] for i in index]
    prompt = model.tokenizer("<image>" * model.image_tokens + "a door", return_tensors="pt")
    length = prompt["input_ids"].shape[1]
    ids = prompt["input_ids"][0].repeat(len(index))
    torch.manual_seed(0)
    out = model(
        ids,
        torch.arange(length).repeat(len(index)),
        [length] * len(index),
        torch.where(ids == model.llava.config.image_token_id)[0],
        torch.arange(0),
        pixels,
        torch.stack([label_ids for label_ids, _ in rows]),
        torch.stack([label_scores for _, label_scores in rows]),
    )
    assert torch.allclose(names["loss"] - 2, out["loss_a"], rtol=1e-5)
    assert names["log"]["pairs"] == out["pairs"]


def test_the_sample_is_one_that_can_be_loaded(tmp_path):
    [sample] = blocks("json", PAGES["questions.md"])
    (tmp_path / "data.jsonl").write_text(sample.replace("\n", " "))
    assert load_samples(tmp_path / "data.jsonl")[0]["image"] == "a/1.jpg"


def test_the_lines_of_each_file_are_as_the_table_says():
    for name, lines in re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", README, re.MULTILINE):
        true = len((ROOT / name).read_text().splitlines())
        assert abs(true - int(lines)) <= 10, f"{name} has {true} lines"


def test_the_code_that_the_readme_points_to_exists():
    section = README.split("## Read the code")[1].split("What is in `tools/`")[0]
    found = []
    for name in re.findall(r"`([\w.]+)`", section):
        if name.endswith(".py"):  # the names that follow are in it
            module = importlib.import_module(name.removesuffix(".py"))
            continue
        operator.attrgetter(name)(module)
        found.append(name)
    assert {"SEAModel.forward", "nearest_words", "sea_loss", "train_step"} <= set(found)


def test_links_lead_somewhere():
    pages = {"README.md": README} | {f"docs/{name}": text for name, text in PAGES.items()}
    for page, text in pages.items():
        for target in re.findall(r"\]\(([^)#]+)", text):
            if "://" not in target:
                assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"


def lines_of_shell(text):
    """The command lines of a shell script: continued lines joined, variables filled in."""
    values = {"gpus": "8", "accum": "1", "llm": "gemma-2b", "run": "pretrain", "name": "pretrain"}
    values |= {"alignment_images": "images", "chat_images": "images", "out": "out", "steps": "9"}
    values |= {
        "captions": "captions.jsonl",
        "all_captions": "all.jsonl",
        "chats": "chats.jsonl",
        "checkpoint": "out/pretrain",
    }
    text = text.replace("\\\n", " ").replace('"${flags[@]}"', "")
    text = re.sub(r"\$\{?(\w+)\}?", lambda m: values.get(m[1], m[0]), text)
    return text.replace(" ||", "\n").splitlines()


def commands():
    """The commands that run one of our files: (module, arguments)."""
    text = "\n".join([README, *PAGES.values()])
    outside = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", outside)]
    lines = [line for block in blocks("bash", text) for line in lines_of_shell(block)]
    for script in SCRIPTS.values():
        lines += lines_of_shell(script)
    for line in [*lines, *spans]:
        found = re.search(r"\b(?:python|torchrun) .*?(?:\b(\w+)\.py|-m (tools\.\w+))( .*)?$", line)
        if found and "..." not in line and "NAME" not in line:
            words = shlex.split(found[3] or "", comments=True)
            yield found[1] or found[2], tuple(words)


COMMANDS = sorted(set(commands()))


def test_there_are_many_commands():
    programs = {program for program, _ in COMMANDS}
    assert {"train", "labels", "eval", "tools.toy", "tools.plan", "tools.look"} <= programs
    assert len(COMMANDS) > 30


@pytest.mark.parametrize("program, argv", COMMANDS)
def test_the_flags_of_every_command_exist(program, argv, monkeypatch):
    monkeypatch.setenv("RANK", "0")  # as torchrun does
    module = importlib.import_module(program)
    if program in ("tools.plan", "tools.check_data"):
        assert argv[0].isdigit() or argv[0].endswith(".jsonl")
        parse_config([*argv[1:], *(["--llm", "x"] if "--init" not in argv else [])])
        return
    if program == "tools.choices":
        assert len(argv) == 3
        return
    if program == "train":
        parse_config(argv)
        return
    if program == "tools.ablate" and argv and not argv[0].startswith("-"):
        assert argv[0] in module.VARIANTS
        return
    called = []

    def parse_only(doc, functions, argv):
        stub = lambda f: functools.wraps(f)(lambda **_: called.append(1))  # noqa: E731
        stubs = (
            stub(functions) if callable(functions) else {n: stub(f) for n, f in functions.items()}
        )
        run_command(doc, stubs, argv)

    monkeypatch.setattr(module, "run_command", parse_only)
    module.main(list(argv))
    assert called


@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_scripts_are_whole_and_stop_at_the_first_error(script):
    assert "set -euo pipefail" in SCRIPTS[script]
    subprocess.run(["bash", "-n", ROOT / "runs" / script], check=True)


@pytest.mark.parametrize(
    "flags, folder",
    [
        ("", "pretrain"),
        ("--sea_weight 0", "pretrain_baseline"),
        ("--llm gemma-2b", "pretrain_gemma-2b"),
        ("--vision siglip-384 --labels data/labels_siglip", "pretrain_siglip-384"),
        ("--vision dinov2-224 --labels data/labels_224", "pretrain_dinov2-224"),
        ("--preset prime --llm llama-3-8b", "prime_llama-3-8b"),
    ],
)
def test_the_folders_of_the_papers_runs(flags, folder):
    page = PAGES["reproduce.md"]
    assert flags in page and f"`{folder}`" in page
    assert parse_config(flags.split()).out_dir == f"out/{folder}"
    finetune = parse_config(["--stage", "finetune", "--init", f"out/{folder}"])
    assert finetune.out_dir == f"out/{folder}_finetune"
