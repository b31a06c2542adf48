"""runs/*.sh from an empty disk to their last line, with the tiny world in place of the downloads.

The scripts are run by bash as they are. Programs that they call stand in a folder of stand-ins:
downloads copy files of the tiny world; our own programs are run by the test's process, where names
such as vicuna-7b or clip-l-336 mean tiny models. Of a training command only --fsdp, which needs
torchrun, is dropped, and --max_steps is added.
"""

import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from unittest.mock import patch

import pytest

import labels
import model
import train
from data import UserError

ROOT = Path(__file__).parent.parent

# Hands its arguments to the test, and waits for an exit status.
OURS = """#!/bin/sh
printf '%s\\n' "$(basename "$0")" "$@" > calls/$$.new
mv calls/$$.new calls/$$.call
while [ ! -e calls/$$.status ]; do sleep 0.02; done
exit "$(cat calls/$$.status)"
"""
# hf download REPO FILE --repo-type dataset --local-dir data
HF = """#!/bin/sh
echo "hf $3" >> downloads.txt
cp "hub/$3" data/
"""
# wget [-c] -O FILE URL
WGET = """#!/bin/sh
[ "$1" != -c ] || shift
echo "wget $3" >> downloads.txt
cp "hub/$(basename "$2" .part)" "$2"
"""
# unzip -qo ARCHIVE -d FOLDER. The archives of the tiny world are lists of its image files.
UNZIP = """#!/bin/sh
mkdir -p "$4"
while read -r file; do
    mkdir -p "$4/$(dirname "$file")"
    cp "images/$(basename "$file")" "$4/$file"
done < "$2"
"""


@pytest.fixture
def disk(world, tmp_path, monkeypatch):
    """A disk with the scripts and 2of12.txt: all that is there before the downloads."""
    shutil.copytree(ROOT / "runs", tmp_path / "runs")
    shutil.copytree(world / "images", tmp_path / "images")
    for folder in ("bin", "calls", "hub", "data"):
        (tmp_path / folder).mkdir()
    shutil.copy(world / "words.txt", tmp_path / "data/2of12.txt")
    stand_ins = {"python": OURS, "torchrun": OURS, "hf": HF, "wget": WGET, "unzip": UNZIP}
    for name, script in stand_ins.items():
        (tmp_path / "bin" / name).write_text(script)
        (tmp_path / "bin" / name).chmod(0o755)
    fill_hub(tmp_path / "hub", world)
    for name in ("vicuna-7b", "gemma-2b", "qwen3-0.6b", "llama-3-8b"):
        monkeypatch.setitem(model.LLMS, name, str(world / "llm"))
    for name in ("clip-l-336", "siglip-384"):
        monkeypatch.setitem(model.VISION, name, str(world / "vision"))
    load = labels.load_encoder

    def load_tiny(name, device):
        return load(name if os.path.isdir(name) else f"{world}/clip", device)

    monkeypatch.setattr(labels, "load_encoder", load_tiny)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fill_hub(hub, world):
    """What the downloads bring, by the names that the recipe gives it."""
    captions = json.loads((world / "train.json").read_text())
    for sample in captions:
        sample["image"] = f"00000/{sample['image']}"
    (hub / "blip_laion_cc_sbu_558k.json").write_text(json.dumps(captions))
    (hub / "images.zip").write_text("".join(f"{sample['image']}\n" for sample in captions))

    chats = [json.loads(line) for line in (world / "chats.jsonl").read_text().splitlines()]
    with_image = (chat for chat in chats if chat["image"])
    for archive, folder, inside in (  # LLaVA's mix names FOLDER/INSIDE/FILE
        ("train2017.zip", "coco", "train2017"),
        ("gqa.zip", "gqa", "images"),
        ("ocr_vqa_images_llava_v15.zip", "ocr_vqa", "images"),
        ("textvqa.zip", "textvqa", "train_images"),
        ("vg.zip", "vg", "VG_100K"),
        ("vg2.zip", "vg", "VG_100K_2"),
    ):
        chat = next(with_image)
        (hub / archive).write_text(f"{inside}/{chat['image']}\n")
        chat["image"] = f"{folder}/{inside}/{chat['image']}"
    for chat in with_image:
        chat["image"] = captions[0]["image"]
    (hub / "llava_v1_5_mix665k.json").write_text(json.dumps(chats))

    question = {"image": "3.png", "text": "Is there a door?", "label": "yes"}
    for kind in ("random", "popular", "adversarial"):
        (hub / f"coco_pope_{kind}.json").write_text(json.dumps(question) + "\n")
    (hub / "val2014.zip").write_text("val2014/3.png\n")


def run_script(name, **variables):
    """-> the exit status of a script, what it printed, and the commands of ours that it ran."""
    path = f"{Path('bin').absolute()}:{os.environ['PATH']}"
    commands = []
    with open("printed.txt", "w+") as printed:
        script = subprocess.Popen(
            ["bash", f"runs/{name}"],
            env=os.environ | variables | {"PATH": path},
            stdout=printed,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            while script.poll() is None:
                for call in Path("calls").glob("*.call"):
                    words = call.read_text().splitlines()
                    commands.append(" ".join(words))
                    status = call_main(words)
                    call.unlink()
                    call.with_suffix(".status").write_text(str(status))
                time.sleep(0.02)
        finally:  # also if a command failed in a way of its own: stand-ins wait for an answer
            if script.poll() is None:
                os.killpg(script.pid, signal.SIGKILL)
        printed.seek(0)
        return script.returncode, printed.read(), commands


def shorten(file, count):
    """Keep the first samples of a list, or lines, of a file."""
    text = file.read_text()
    if text.startswith("["):
        file.write_text(json.dumps(json.loads(text)[:count]))
    else:
        file.write_text("\n".join(text.splitlines()[:count]))


def call_main(words):
    """Do what `python` or `torchrun` would do with these words -> an exit status."""
    words = [word for word in words[1:] if word not in ("--", "-m")]
    words = [word for word in words if not word.startswith("--nproc_per_node=")]
    program, *argv = words
    module = importlib.import_module(program.removesuffix(".py"))
    if program in ("train.py", "eval.py") or argv[:1] == ["extract"]:
        argv += ["--workers", "0"]
    if program == "train.py":
        argv = [word for word in argv if word != "--fsdp"] + ["--max_steps", "2"]
    try:
        with patch.dict(os.environ):  # a process of its own would not leave its variables behind
            module.main(argv)
    except (UserError, SystemExit) as error:
        print(error)
        return 1
    return 0


@pytest.mark.parametrize("llm, folder", [("", "pretrain"), ("gemma-2b", "pretrain_gemma-2b")])
def test_llava15_from_an_empty_disk(disk, llm, folder):
    variables = {"LLM": llm} if llm else {}
    status, printed, commands = run_script("llava15.sh", **variables)
    assert status == 0, printed
    assert len(commands) == 10 and len(Path("downloads.txt").read_text().split("\n")) == 14
    pictures = {f"{path.parent}" for path in Path("data").rglob("*.png")}
    assert len(pictures) == 8  # 00000, six of the mix, val2014
    for run in (folder, f"{folder}_baseline"):
        adapter, llava = Path(f"out/{run}"), Path(f"out/{run}_finetune")
        assert (adapter / "model/adapter.safetensors").exists()
        config = json.loads((adapter / "config.json").read_text())
        assert (config["llm"], config["sea_weight"] > 0) == (llm or "vicuna-7b", run == folder)
        assert (llava / "model/model.safetensors").exists()
        assert json.loads((llava / "config.json").read_text())["init"] == str(adapter)
        [measured] = map(json.loads, (llava / "eval.jsonl").read_text().splitlines())
        assert len([name for name in measured["pope"] if name.startswith("coco_pope_")]) == 3

    # Again: nothing is downloaded or trained once more.
    downloads = Path("downloads.txt").read_text()
    status, printed, commands = run_script("llava15.sh", **variables)
    assert status == 0, printed
    assert [re.search(r"\w+\.py \w+", command)[0] for command in commands] == [
        "labels.py extract",
        "eval.py pope",
        "eval.py pope",
    ]
    more = Path("downloads.txt").read_text().removeprefix(downloads)
    assert "images" not in more, more


def test_llava15_stops_at_a_bad_image_and_goes_on_with_the_good_ones(disk):
    shutil.copy(disk / "data/2of12.txt", disk / "images/5.png")
    status, printed, commands = run_script("llava15.sh")
    assert status == 1 and len(commands) == 2 and not Path("out").exists()
    status, printed, commands = run_script("llava15.sh")
    assert status == 0, printed
    for run, samples in ("pretrain", 23), ("pretrain_finetune", 16):
        assert json.loads(Path(f"out/{run}/config.json").read_text())["samples"] == samples


def test_small(disk):
    status, printed, commands = run_script("small.sh")
    assert status == 0, printed
    for run in ("pretrain_qwen3-0.6b", "pretrain_qwen3-0.6b_baseline"):
        assert Path(f"out/{run}/model/adapter.safetensors").exists()
        assert Path(f"out/{run}_finetune/model/model.safetensors").exists()
    assert len(commands) == 8


def test_prime(disk):
    """Its data, and its word list, which takes spaCy, are there before it."""
    captions = json.loads(Path("hub/blip_laion_cc_sbu_558k.json").read_text())
    chats = json.loads(Path("hub/llava_v1_5_mix665k.json").read_text())
    for chat in chats:
        chat["image"] = chat["image"] and captions[0]["image"]
    for name, samples in (
        ("alignment_2.5m.jsonl", captions),
        ("Cambrian7M_withsystemprompt.jsonl", chats),
    ):
        lines = [json.dumps(sample) + "\n" for sample in samples]
        Path("data", name).write_text("".join(lines))
    shutil.copy("data/2of12.txt", "data/words_prime.txt")
    shutil.copytree("images", "pictures/00000")
    folders = {"ALIGNMENT_IMAGES": "pictures", "CHAT_IMAGES": "pictures"}
    status, printed, commands = run_script("prime.sh", **folders)
    assert status == 0, printed
    assert Path("out/prime_llama-3-8b_finetune/model/model.safetensors").exists()
    config = json.loads(Path("out/prime_llama-3-8b_finetune/config.json").read_text())
    assert config["tune_vision"] and len(commands) == 3


def test_toy(disk, small, monkeypatch):
    shutil.copytree(small, "toy")
    for file in [*Path("toy").glob("val*.json"), *Path("toy/pope").iterdir()]:
        shorten(file, 8)
    main = train.main
    monkeypatch.setattr(train, "main", lambda argv: main([*argv, "--max_steps", "2"]))
    status, printed, commands = run_script("toy.sh")
    assert status == 0, printed
    assert len(commands) == 5 and Path("words.html").exists()
    for run in ("toy_baseline_finetune", "toy_finetune"):
        assert "pope" in Path(f"out/{run}/eval.jsonl").read_text()


def test_llava15_ends_where_a_check_cannot_be_made(disk, monkeypatch):
    """Also after Ctrl-C: the next check takes as long."""
    monkeypatch.setitem(model.LLMS, "vicuna-7b", "nowhere")
    status, printed, commands = run_script("llava15.sh")
    assert status == 1 and len(commands) == 1


def test_scripts_stop_without_the_word_list(disk):
    Path("data/2of12.txt").unlink()
    status, printed, commands = run_script("llava15.sh")
    assert status == 1 and "put 2of12.txt" in printed and not commands
