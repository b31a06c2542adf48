"""The page of words, also in a browser."""

import base64
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train
from data import UserError, geometry
from model import load_model
from tools import look
from tools.look import draw_words, read_truth, true_share

# ---------------------------------------------------------------------------------------- the page


@pytest.fixture
def page(tmp_path):
    """A page of a red and a blue image of 2 x 2 patches with two panels -> its file."""
    panels_of = {}
    for name, color in ("a.png", "red"), ("b.png", "blue"):
        image = Image.new("RGB", (60, 40), "white")
        image.paste(color, (10, 0, 50, 40))  # what a square crop leaves
        image.save(tmp_path / name)
        sky = [[("sky", 0.9), ("blue", 0.5)], [("blue", 0.4)], [], [("sky", 0.3)]]
        wall = [[("</script>", 0.2)], [("blue", 0.1), ("sky", 0.1)], [], []]
        panels_of[name] = {"baseline": sky, "SEA": wall}
    true = {0: ["wall", "sky"], 1: ["blue"]}  # sky is not true of 1, although it is among its words
    truth = {"a.png": {"there": {0: ["sky"], 1: ["sky"]}}, "b.png": {"there": true}}
    seen = {"size": 40, "mode": "square"}
    draw_words(panels_of, tmp_path, seen, (2, 2), tmp_path / "new/out.html", truth)
    return tmp_path / "new/out.html"


def test_a_page_holds_images_words_and_colors(page):
    text = page.read_text()
    assert text.count("</script>") == 1 and "http" not in text  # self-contained
    data = json.loads(re.search("const data = (.*);\n", text)[1])
    assert data["grid"] == [2, 2]
    # blue is a color, and frequent; of the others the one with the highest scores comes first
    grey = {"sky": "hsl(0 0% 30.00%)", "</script>": "hsl(0 0% 46.80%)"}
    assert data["colors"] == {"blue": "blue"} | grey
    for image, name, color in zip(data["images"], ("a.png", "b.png"), ((255, 0, 0), (0, 0, 255))):
        assert image["name"] == name
        content = base64.b64decode(image["picture"].removeprefix("data:image/png;base64,"))
        picture = np.asarray(Image.open(io.BytesIO(content)))
        assert picture.shape == (40, 40, 3) and (picture == color).all()
        assert image["panels"]["baseline"][0] == [["sky", 0.9], ["blue", 0.5]]


def test_words_that_are_colors_get_them_and_no_color_is_used_twice(tmp_path):
    words = [f"word{i // 2}" for i in range(600)] + ["red", "chocolate", "rare"]
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    for more_red, other in (0, "hsl(0.0 45% 45%)"), (100, "hsl(0 0% 30.00%)"):
        labels = [[(word, 1.0)] for word in words] + [[("red", 0.1)]] * more_red
        grid = (1, len(labels))
        seen = {"size": 8, "mode": "square"}
        draw_words({"a.png": {"labels": labels}}, tmp_path, seen, grid, tmp_path / "a.jpg")
        text = (tmp_path / "a.jpg.html").read_text()  # it is no picture
        colors = json.loads(re.search("const data = (.*);\n", text)[1])["colors"]
        assert colors["red"] == "red" and colors["chocolate"] == "chocolate"
        assert colors["word0"] == other and len(colors) == len(set(colors.values())) == 303


@pytest.mark.skipif(not shutil.which("chromium"), reason="looks at the page in Chromium")
def test_a_page_in_a_browser(page):
    """The second image, its labels as the mouse enters a patch, what lights up at a click."""
    acts = """slider.value = 1; show();
        document.querySelectorAll(".words")[1].querySelectorAll(".patches div")[1].onmouseenter();
        [...document.querySelectorAll(".word")].find(e => e.textContent == "sky 0.100").onclick();
        """
    page.write_text(page.read_text().replace("\nshow();\n", f"\nshow(); {acts}\n"))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", "--window-size=900,600"]
    browser = subprocess.run(
        ["chromium", *flags, f"file://{page}"], capture_output=True, text=True, timeout=60
    )
    dom = browser.stdout.split("<script>")[0]
    assert ">2 of 2: b.png</b>" in dom
    assert dom.count('class="panel words"') == 2 and dom.count("<img") == 3
    assert dom.count("Row 0, column 1: ") == 2  # in both panels at once
    baseline, sea = dom.split('class="panel words"')[1:]
    # where it is the top word, and where it is another of the patch's words
    lit = r'style="background: rgb[^;]*; opacity: ([\d.]+)'
    assert re.findall(lit, baseline) == ["0.8", "0.8"] and re.findall(lit, sea) == ["0.4"]
    assert "sky 2" in baseline and "blue 1" in sea  # how often each is the top word
    # framed where the word that is shown is true
    assert [baseline.count('class="true'), sea.count('class="true')] == [1, 0]
    assert "hidden" not in re.search('<span id="frames"[^>]*>', dom)[0]


def test_the_page_of_words_needs_no_matplotlib(tmp_path):
    """Run where importing matplotlib or scikit-learn fails."""
    code = (
        "import sys; sys.modules['matplotlib'] = sys.modules['sklearn'] = None\n"
        "from tools import look\n"
        "panels = {'x': [[('a', 1.0)]]}\n"
        "seen = {'size': 8, 'mode': 'square'}\n"
        "look.draw_words({'a.png': panels}, sys.argv[1], seen, (1, 1), sys.argv[2])"
    )
    Image.new("RGB", (9, 8)).save(tmp_path / "a.png")
    root = Path(__file__).parent.parent
    command = [sys.executable, "-c", code, tmp_path, tmp_path / "o.html"]
    subprocess.run(command, cwd=root, check=True)
    assert (tmp_path / "o.html").exists()


# ------------------------------------------------------------------------------- words of models


@pytest.fixture(scope="module")
def run(flags, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    train.main([*flags, "--out_dir", str(out), "--save_every", "3"])
    return out


@pytest.fixture
def looked(tmp_path):
    """A function that calls the command with flags -> (what it returns, the images of its page)."""

    def look_at(flags):
        page = tmp_path / "new/words.html"
        result = look.main([*flags.split(), "--out", str(page)])
        return result, json.loads(re.search("const data = (.*);\n", page.read_text())[1])["images"]

    return look_at


def test_words_of_a_page_are_the_nearest_in_cosine(run, world, looked):
    """Those of two images again, in float64, from transformers' tower and mean embeddings."""
    _, [one, two] = looked(f"words --model {run} --samples 2")
    model = load_model(run)
    words = (world / "words.txt").read_text().split()
    texts = [model.tokenizer(" " + word, add_special_tokens=False).input_ids for word in words]
    features = [model.embed_tokens.weight[ids].double().mean(0) for ids in texts]
    features = torch.stack([x / x.norm() for x in features])
    for image in (one, two):
        pixels = geometry(Image.open(world / "images" / image["name"]), **model.preprocess)
        x_v = model.visual_tokens(pixels[None])[0].double()
        cosines = (x_v / x_v.norm(dim=1, keepdim=True)) @ features.T
        [(title, patches)] = image["panels"].items()
        assert title == f"SEA: {run}" and len(patches) == 25
        for patch, row in zip(patches, cosines.tolist()):
            assert [word for word, _ in patch] == sorted(words, key=lambda w: -row[words.index(w)])
            assert [score for _, score in patch] == pytest.approx(sorted(row)[::-1], abs=6e-4)


def test_two_models_side_by_side_and_their_true_words(run, tmp_path, looked, capsys):
    """Panels name how a run was trained; every word that is frequent is once what is true."""
    early = f"{run}/checkpoints/step_3"
    flags = f"words --model {run} --baseline {early} --samples 4 --truth {tmp_path}/truth.json"
    truth = {f"{i}.png": {"patches": {str(p): ["none"] for p in range(25)}} for i in range(4)}
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    found, images = looked(flags)
    assert [list(image["panels"]) for image in images] == [[f"SEA: {early}", f"SEA: {run}"]] * 4
    assert images[0]["truth"] == {"patches": {str(p): ["none"] for p in range(25)}}
    assert list(found) == [early, str(run)] and found[early] != found[str(run)]
    assert found[early]["true"] == {"patches": 0, "all": 0}
    printed = capsys.readouterr().out.splitlines()
    assert printed[:4] == [
        early,
        json.dumps(found[early]),
        str(run),
        json.dumps(found[str(run)]),
    ]
    recorded = [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]
    assert recorded[-2:] == [{"step": 3} | found[early], {"step": 6} | found[str(run)]]

    shares = {}
    for word in found[str(run)]["words"]:
        (tmp_path / "truth.json").write_text(json.dumps(truth).replace("none", word))
        result, _ = looked(flags)
        shares[word] = result[str(run)]["true"]["patches"]
    assert shares == pytest.approx(found[str(run)]["words"], abs=6e-4)
    assert sum(shares.values()) > 0.5


def test_words_of_two_runs_are_of_the_same_images(run, world, tmp_path, looked):
    """--model's, also for a baseline that held out others or has no word list."""
    other = shutil.copytree(run, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    samples = json.loads((world / "train.json").read_text())[::-1]
    (tmp_path / "reversed.json").write_text(json.dumps(samples))
    config |= {"val_data": str(tmp_path / "reversed.json"), "labels": "", "sea_weight": 0.0}
    (other / "config.json").write_text(json.dumps(config))
    flags = f"words --model {run} --samples 3 --images 2"
    _, alone = looked(flags)
    _, beside = looked(f"{flags} --baseline {other}")
    assert [image["name"] for image in beside] == ["0.png", "1.png"]
    for image, image_alone in zip(beside, alone):
        panels = image["panels"]
        assert image["picture"] == image_alone["picture"]
        assert list(panels) == [f"captions only: {other}", f"SEA: {run}"]
        first, second = panels.values()
        assert first == second == image_alone["panels"][f"SEA: {run}"]


def test_the_share_of_true_words_by_hand(tmp_path):
    labels_of = {
        "a.png": [[("sky", 0.9), ("blue", 0.5)], [("blue", 0.4)], []],
        "b.png": [[("wall", 0.2)], [("blue", 0.1)], []],
    }
    truth = {
        "a.png": {"object": {"0": ["sky", "cloud"]}, "background": {"1": ["sky"], "2": ["sky"]}},
        "b.png": {"object": {"0": ["blue"]}, "background": {"1": ["blue"]}},
        "c.png": {"object": {"0": ["sky"]}},  # not looked at
    }
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    shares = true_share(read_truth(tmp_path / "truth.json", labels_of, 3), labels_of)
    assert shares == {"object": 1 / 2, "background": round(1 / 3, 3), "all": 2 / 5}
    with pytest.raises(UserError, match="not a truth file of these images .*d.png"):
        read_truth(tmp_path / "truth.json", ["d.png"], 3)
    with pytest.raises(UserError, match="not a truth file of these images .*out of range"):
        read_truth(tmp_path / "truth.json", ["a.png"], 2)  # of a coarser grid
