import json
import math

import pytest
import torch
from PIL import Image

import eval as evaluation
import train
from data import UserError
from eval import modality_gap, nearest_word, tacs


def cosine(a, b):
    dot, aa, bb = (math.fsum(float(x) * float(y) for x, y in zip(p, q)) for p, q in ((a, b), (a, a), (b, b)))
    return dot / math.sqrt(aa * bb)


@pytest.fixture
def vectors():
    g = torch.Generator().manual_seed(0)
    return torch.randn(23, 6, generator=g) * 3, torch.randn(9, 6, generator=g)


@pytest.mark.parametrize("k", [1, 10, 23, 50])
def test_tacs_is_the_mean_of_the_k_best_maxima(vectors, k):
    x_v, x_t = vectors
    best = sorted((max(cosine(v, t) for t in x_t) for v in x_v), reverse=True)[:k]
    assert tacs(x_v, x_t, k).item() == pytest.approx(sum(best) / len(best), abs=1e-6)
    assert tacs(x_v.bfloat16(), x_t.bfloat16(), k).dtype == torch.float32


def test_tacs_by_hand():
    x_v, x_t = torch.tensor([[1.0, 0], [0, 2], [-1, 0]]), torch.tensor([[1.0, 1], [3, 0]])
    assert tacs(x_v, x_t, k=2).item() == pytest.approx((1 + 0.5**0.5) / 2)  # cosines 1, √½, -√½


def test_gap_is_the_mean_smallest_distance(vectors):
    x_v, words = vectors
    distances = [min(math.dist(v.tolist(), w.tolist()) for w in words) for v in x_v]
    assert modality_gap(x_v, words).item() == pytest.approx(sum(distances) / len(distances), rel=1e-5)
    many = x_v.repeat(100, 1)  # more rows than one block
    assert modality_gap(many, words).item() == pytest.approx(sum(distances) / len(distances), rel=1e-5)


def test_nearest_word_is_the_argmax_of_the_cosine(vectors):
    x_v, words = vectors
    reference = [max(range(len(words)), key=lambda j: cosine(v, words[j])) for v in x_v]
    assert nearest_word(x_v.repeat(60, 1), words).tolist() == reference * 60


@pytest.fixture(scope="module")
def run(flags, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    train.main([*flags, "--out_dir", str(out), "--save_every", "3"])
    return out


def test_the_three_commands_on_an_out_dir_a_model_and_a_checkpoint(run, tmp_path, world, capsys):
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    for path in (run, run / "model", run / "checkpoints/step_6"):
        result = evaluation.main(["tacs", "--model", str(path), "--samples", "4"])
        assert result["tacs"] == pytest.approx(last["val_tacs"]) and result["pairs"] == 4
        assert result["caption_loss"] == pytest.approx(last["val_loss"])
    early = evaluation.main(["tacs", "--model", str(run / "checkpoints/step_3"), "--samples", "4"])
    assert early["tacs"] != result["tacs"]
    gap = evaluation.main(["gap", "--model", str(run), "--samples", "4"])
    assert gap["D"] > abs(gap["visual_norm"] - gap["word_norm"]) - 1e-4  # the triangle inequality, on average
    truth = {f"{i}.png": {"object": {"3": ["red", "dark"]}, "background": {"0": []}} for i in range(4)}
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    words = evaluation.main(["words", "--model", str(run), "--baseline", str(run / "checkpoints/step_3"), "--samples",
                             "4", "--truth", str(tmp_path / "truth.json"), "--out", str(tmp_path / "w.png")])
    assert words[str(run)]["true"]["background"] == 0 and 0 <= words[str(run)]["true"]["object"] <= 1
    width, height = Image.open(tmp_path / "w.png").size  # two images, each plain, of the baseline, and of SEA
    assert width == 3 * (5 * 89 + 12) + 12 and height > 2 * (5 * 89 + 12) + 12  # words stand below


def test_errors_name_what_is_missing(run, tmp_path):
    with pytest.raises(UserError, match="no adapter.safetensors"):
        evaluation.main(["tacs", "--model", str(tmp_path)])
    with pytest.raises(UserError, match="cannot read the word list"):
        evaluation.main(["gap", "--model", str(run), "--words", str(tmp_path / "none.txt")])
    with pytest.raises(SystemExit):
        evaluation.main(["tacs", "--model", str(run), "--sample", "4"])


def test_on_a_run_of_stage_2(finetune_flags, world, tmp_path):
    """It has neither captions nor words of its own: both are asked for; then .jsonl will do."""
    train.main([*finetune_flags, "--out_dir", str(tmp_path), "--max_steps", "1"])
    run = ["--model", str(tmp_path)]
    with pytest.raises(UserError, match="named no captions to look at; give --data and --image_folder"):
        evaluation.main(["tacs", *run])
    lines = [json.dumps(s) for s in json.loads((world / "train.json").read_text())]
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    run += ["--data", str(tmp_path / "captions.jsonl"), "--image_folder", str(world / "images"), "--samples", "3"]
    assert evaluation.main(["tacs", *run])["pairs"] == 3
    with pytest.raises(UserError, match="give --words"):
        evaluation.main(["gap", *run])
    assert evaluation.main(["gap", *run, "--words", str(world / "words.txt")])["D"] > 0
