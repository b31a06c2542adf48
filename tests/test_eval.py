import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sklearn.metrics
import torch
from PIL import Image

import eval as evaluation
import train
from data import LlavaDataset, UserError, geometry, load_samples
from eval import (
    chosen,
    modality_gap,
    nearest_word,
    normalize,
    pope_metrics,
    says_yes,
    tacs,
    vqa_question,
)
from model import load_model


def cosine(a, b):
    dot, aa, bb = (
        math.fsum(float(x) * float(y) for x, y in zip(p, q)) for p, q in ((a, b), (a, a), (b, b))
    )
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
    assert modality_gap(x_v, words).item() == pytest.approx(
        sum(distances) / len(distances), rel=1e-5
    )
    many = x_v.repeat(100, 1)  # more rows than one block
    assert modality_gap(many, words).item() == pytest.approx(
        sum(distances) / len(distances), rel=1e-5
    )


def test_nearest_word_is_the_argmax_of_the_cosine(vectors):
    x_v, words = vectors
    reference = [max(range(len(words)), key=lambda j: cosine(v, words[j])) for v in x_v]
    assert nearest_word(x_v.repeat(60, 1), words).tolist() == reference * 60
    away = torch.tensor([[-2.0, -1]])  # from every word
    assert nearest_word(away, torch.tensor([[1.0, 0], [1, 1], [0, 3]])).tolist() == [2]


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
    assert (
        gap["D"] > abs(gap["visual_norm"] - gap["word_norm"]) - 1e-4
    )  # the triangle inequality, on average
    flags = [
        "words",
        "--model",
        str(run),
        "--baseline",
        str(run / "checkpoints/step_3"),
        "--samples",
        "4",
    ]
    frequent = evaluation.main([*flags, "--out", str(tmp_path / "w.html")])["words"]
    shares = {}
    for word in frequent:  # let it be what every patch shows
        truth = {f"{i}.png": {"patches": {str(p): [word] for p in range(25)}} for i in range(4)}
        (tmp_path / "truth.json").write_text(json.dumps(truth))
        words = evaluation.main(
            [*flags, "--truth", str(tmp_path / "truth.json"), "--out", str(tmp_path / "w.html")]
        )
        shares[word] = words["true"]["patches"]
    assert shares == pytest.approx(frequent, abs=6e-4) and sum(shares.values()) > 0.5
    recorded = [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]
    assert recorded[-1] == {"step": 6} | words and recorded[-2]["step"] == 3
    assert recorded[-2]["words"] != words["words"]  # the baseline's
    page = (tmp_path / "w.html").read_text()
    data = json.loads(re.search("const data = (.*);\n", page)[1])
    assert len(data["images"]) == 4 and len(data["images"][0]["panels"]) == 2


def test_alignment_is_that_of_the_captions_own_tokens_and_of_the_words(run, world, tmp_path):
    """Every measure of two captions again, from transformers' Llava and lists of numbers."""
    model = load_model(run)
    embeddings = model.embed_tokens.weight.detach().tolist()

    def features(text):
        ids = model.tokenizer(text, add_special_tokens=False).input_ids
        return [embeddings[i] for i in ids]

    words = (world / "words.txt").read_text().split()
    word_features = [[sum(x) / len(x) for x in zip(*features(" " + word))] for word in words]
    scores, losses, visual, names = [], [], [], []
    for sample in json.loads((world / "train.json").read_text())[:2]:
        caption = sample["conversations"][1]["value"]
        image = geometry(Image.open(world / "images" / sample["image"]), **model.preprocess)[None]
        with torch.no_grad():
            x_v = model.visual_tokens(image)[0].tolist()
            ids = model.tokenizer("<image>" * model.image_tokens + caption + "\n").input_ids
            logits = model.llava(input_ids=torch.tensor([ids]), pixel_values=image).logits[0]
        x_t = features(caption)
        scores += [torch.tensor([max(cosine(v, t) for t in x_t) for v in x_v]).topk(10)[0].mean()]
        log_probs = logits[:, : model.vocabulary_size].log_softmax(-1)
        first = ids.index(model.llava.config.image_token_id) + model.image_tokens
        losses += [-float(log_probs[i - 1, ids[i]]) for i in range(first, len(ids))]
        visual += x_v
        names += [max(words, key=lambda w: cosine(v, word_features[words.index(w)])) for v in x_v]

    flags = ["--model", str(run), "--samples", "2"]
    result = evaluation.main(["tacs", *flags])
    assert result["tacs"] == pytest.approx(float(np.mean(scores)), abs=1e-5)
    assert result["caption_loss"] == pytest.approx(np.mean(losses), abs=1e-5)

    def unit(vectors):
        return [[x / math.hypot(*vector) for x in vector] for vector in vectors]

    def gap(vectors, words):
        return np.mean([min(math.dist(v, w) for w in words) for v in vectors])

    expected = dict(
        D=gap(visual, word_features),
        visual_norm=np.mean([math.hypot(*v) for v in visual]),
        word_norm=np.mean([math.hypot(*w) for w in word_features]),
        D_of_unit_vectors=gap(unit(visual), unit(word_features)),
    )
    assert evaluation.main(["gap", *flags]) == pytest.approx(expected, rel=1e-4)
    shares = evaluation.main(["words", *flags, "--out", str(tmp_path / "w.html")])["words"]
    expected = {name: names.count(name) / len(names) for name in shares}
    assert shares == pytest.approx(expected, abs=6e-4)


def test_the_newline_that_ends_a_caption_is_not_among_its_tokens(run, world):
    model = load_model(run)
    sample = json.loads((world / "train.json").read_text())[0]
    dataset = LlavaDataset(
        [sample], world / "images", model.preprocess, model.tokenizer, model.image_tokens
    )
    score, *_ = evaluation.alignment_sums(model, dataset, "cpu")
    item = dataset[0]
    assert model.tokenizer.decode(item["targets"][-1:]) == "\n"
    x_v = model.visual_tokens(item["pixels"][None])[0]
    model.embed_tokens.weight.data[item["targets"][-1]] = x_v[0]  # a cosine of 1
    assert evaluation.alignment_sums(model, dataset, "cpu")[0] == pytest.approx(score, abs=1e-6)
    assert score < 0.9


def test_without_held_out_data_the_training_data_are_measured(run, tmp_path, world, capsys):
    shutil.copytree(run, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    lines = [json.dumps(sample) for sample in json.loads((world / "train.json").read_text())[:3]]
    (tmp_path / "three.jsonl").write_text("\n".join(lines))
    for change, pairs in (
        (dict(val_data="", data=f"{tmp_path}/three.jsonl"), 3),
        (dict(val_data=f"{tmp_path}/three.jsonl", data="gone"), 3),
    ):
        (tmp_path / "run/config.json").write_text(json.dumps(config | change))
        assert evaluation.main(["tacs", "--model", f"{tmp_path}/run"])["pairs"] == pairs
        is_said = "measured on the training data" in capsys.readouterr().out
        assert is_said == (change.get("val_data") == "")


def test_a_model_that_only_lies_in_a_run_is_not_of_the_run(run, tmp_path):
    """Its results would be written beside those of another model."""
    shutil.copytree(run, tmp_path / "run")
    shutil.copytree(run / "model", tmp_path / "run/foreign")
    for path in ("run", "run/model", "run/checkpoints/step_3"):
        assert evaluation.find_run(tmp_path / path).folder == tmp_path / "run"
    assert evaluation.find_run(tmp_path / "run/foreign").folder is None


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
    with pytest.raises(UserError, match="its run has no captions: give --data and --image_folder"):
        evaluation.main(["tacs", *run])
    lines = [json.dumps(s) for s in json.loads((world / "train.json").read_text())]
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    run += [
        "--data",
        str(tmp_path / "captions.jsonl"),
        "--image_folder",
        str(world / "images"),
        "--samples",
        "3",
    ]
    assert evaluation.main(["tacs", *run])["pairs"] == 3
    with pytest.raises(UserError, match="give --words"):
        evaluation.main(["gap", *run])
    assert evaluation.main(["gap", *run, "--words", str(world / "words.txt")])["D"] > 0


# ----------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize(
    "text, yes",
    [
        ("Yes", True),
        ("yes, there is a dog.", True),
        ("No", False),
        ("no.", False),
        ("No, there is none.", False),
        ("There is not a dog in the image.", False),
        ("There is a dog. It is not brown.", True),
        ("", True),
        ("A notable north wall", True),
        ("I do not see one", False),
    ],
)
def test_reading_yes_and_no_as_llava_does(text, yes):
    assert says_yes(text) == yes


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_pope_metrics_are_those_of_scikit_learn(share):
    rng = np.random.default_rng(0)
    for n in (1, 7, 200):
        said, true = (rng.random(n) < share).tolist(), (rng.random(n) < 0.5).tolist()
        precision, recall, f1, _ = sklearn.metrics.precision_recall_fscore_support(
            true, said, average="binary", zero_division=0
        )
        expected = dict(
            accuracy=sklearn.metrics.accuracy_score(true, said),
            precision=precision,
            recall=recall,
            f1=f1,
            yes_ratio=np.mean(said),
        )
        assert pope_metrics(said, true) == pytest.approx(expected)


def test_processes_without_a_group_do_not_measure_a_part_in_silence(run, monkeypatch):
    """As torchrun would start eval.py: each measures its share, and they cannot add it up."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="process group has not been initialized"):
        evaluation.main(["tacs", "--model", str(run), "--samples", "4"])


def test_pope_metrics_by_hand():
    said, true = [True, True, True, False, False], [True, False, True, True, False]
    assert pope_metrics(said, true) == pytest.approx(
        dict(accuracy=3 / 5, precision=2 / 3, recall=2 / 3, f1=2 / 3, yes_ratio=3 / 5)
    )


@pytest.mark.parametrize(
    "text, same",
    [
        ("The Red.", "red"),
        ("a  red, door", "red door"),
        ("Theatre", "theatre"),
        ("An apple!", "apple"),
        ("two-tone", "2 tone"),
        ("A", "a"),  # not nothing
        ("The", "the"),
        ("+", "+"),
        ("Don't", "dont"),
        ("1,000 dogs", "1000 dogs"),
        ("Two.", "2"),
        ("No.", "no"),
        ("3.5", "3.5"),
        ("-1", "-1"),
        ("1", "1"),
        ("", ""),
    ],
)
def test_answers_are_compared_without_case_punctuation_and_articles(text, same):
    assert normalize(text) == same


@pytest.mark.parametrize(
    "text, index",
    [
        ("B", 1),
        ("B.", 1),
        ("(B)", 1),
        ("B. a cat", 1),
        ("B: cat", 1),
        ("A cat", 1),
        ("a cat", 1),
        ("Cat.", 1),
        ("A", 0),
        ("A. dog", 0),
        ("A dog", None),
        ("C", None),
        ("Best", None),
        ("Bird", 0),
        ("A's", None),
        ("", None),
        ("dog", None),
    ],
)
def test_the_choice_that_an_answer_names(text, index):
    assert chosen(text, ["bird", "a cat"]) == index


def test_numbers_can_be_choices():
    assert chosen("7.", [3, 7]) == 1 and chosen("-1", [1, -1]) == 1


@pytest.mark.parametrize("choices", [["B", "A"], ["dog", "a"], ["x"] * 27])
def test_choices_that_their_letters_cannot_tell_apart_are_refused(choices):
    sample = {"id": 1, "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt"}]}
    sample["conversations"][1]["value"] = str(choices[0])
    with pytest.raises(UserError, match="sample 1: a letter must not be the text of another"):
        vqa_question(sample | {"choices": choices}, "")
    assert vqa_question(sample | {"choices": ["A", "B", choices[0]]}, "")["question"]


@pytest.mark.parametrize("flag", ["--samples 0", "--samples -3", "--batch_size 0"])
def test_numbers_of_commands_are_above_0(flag):
    command = "pope --data x --image_folder y" if "batch" in flag else "tacs"
    with pytest.raises(UserError, match="must be above 0 and below 1e9, not"):
        evaluation.main(f"{command} --model z {flag}".split())


@pytest.fixture(scope="module")
def finetuned(finetune_flags, tmp_path_factory):
    out = tmp_path_factory.mktemp("finetuned") / "out"
    train.main([*finetune_flags, "--out_dir", str(out), "--save_every", "3"])
    return out


def test_all_checkpoints_of_a_run_by_one_command(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "eval.jsonl").unlink(missing_ok=True)
    flags = ["--samples", "4"]
    last = evaluation.main(["tacs", "--model", f"{copy}/checkpoints", *flags])
    lines = [json.loads(line) for line in (copy / "eval.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6] and lines[1]["tacs"] == last["tacs"]
    early = evaluation.main(["tacs", "--model", f"{copy}/checkpoints/step_3", *flags])
    assert early["tacs"] == lines[0]["tacs"] != last["tacs"]

    questions = ["vqa", "--model", f"{copy}/checkpoints", "--data", "q.json", "--out", "o.jsonl"]
    with pytest.raises(UserError, match="--out holds the answers of one model"):
        evaluation.main(questions)
    (tmp_path / "none/checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="none/checkpoints: no adapter.safetensors"):
        evaluation.main(["tacs", "--model", f"{tmp_path}/none/checkpoints"])


def test_a_checkpoint_of_stage_2_is_the_model_of_that_step(finetuned):
    folders = ("checkpoints/step_6", "checkpoints/step_3", "model")
    models = [load_model(finetuned / folder) for folder in folders]
    assert [model.preprocess["mode"] for model in models] == ["pad"] * 3
    last, early, exported = (model.state_dict() for model in models)
    for name, w in last.items():
        assert name == "log_scale" or torch.equal(w, exported[name]), name
    moved = [name for name, w in last.items() if not torch.equal(w, early[name])]
    assert len(moved) > 20


def test_batches_answer_as_one_by_one(finetuned, world):
    """Prompts of very different lengths, with image and without, padded on the left."""
    model = load_model(finetuned)
    texts = [
        "red?",
        "which " * 20,
        "the",
        "dark striped wall? " * 5,
        "sky",
        "a tall red ocean beside the door?",
    ]
    samples = [
        evaluation.question_sample(
            f"<image>\n{text}" if i % 3 else text, f"{i}.png" if i % 3 else None
        )
        for i, text in enumerate(texts)
    ]
    one = evaluation.answer(model, samples, world / "images", batch_size=1, max_new_tokens=12)
    assert len(set(one)) > 2 and max(map(len, one)) > 5
    for size in (2, 6):
        assert (
            evaluation.answer(model, samples, world / "images", batch_size=size, max_new_tokens=12)
            == one
        )
    ids = model.tokenizer.apply_chat_template(
        [{"role": "user", "content": texts[3]}], add_generation_prompt=True, return_dict=True
    ).input_ids
    prompt = torch.tensor([[model.tokenizer.bos_token_id, *ids]])
    with torch.no_grad():
        new = model.llava.generate(prompt, max_new_tokens=12, do_sample=False)[0, len(ids) + 1 :]
    assert model.tokenizer.decode(new, skip_special_tokens=True).strip() == one[3]
    again = evaluation.answer(
        model, samples[::-1], world / "images", batch_size=4, max_new_tokens=12
    )
    assert again[::-1] == one


def test_answers_are_without_end_tokens_and_padding(finetuned, world, monkeypatch):
    model = load_model(finetuned)
    tokenizer = model.tokenizer
    ids = tokenizer(" red wall ", add_special_tokens=False).input_ids
    ids += [tokenizer.eos_token_id, tokenizer.pad_token_id]
    monkeypatch.setattr(model, "generate", lambda batch, **kwargs: torch.tensor([ids]))
    sample = evaluation.question_sample("what?", None)
    assert evaluation.answer(model, [sample], world / "images") == ["red wall"]


def test_pope_reads_its_three_files(finetuned, world, tmp_path, capsys):
    (tmp_path / "pope").mkdir()
    rng, rows = np.random.default_rng(0), {}
    for name in ("random", "popular", "adversarial"):
        rows[name] = [
            dict(
                question_id=i,
                image=f"{i}.png",
                text=f"Is there a {name} door in the image?",
                label=["yes", "no"][rng.integers(2)],
            )
            for i in range(5)
        ]
        (tmp_path / f"pope/coco_pope_{name}.json").write_text(
            "".join(json.dumps(r) + "\n" for r in rows[name])
        )
    flags = [
        "--model",
        f"{finetuned}/checkpoints/step_3",
        "--image_folder",
        f"{world}/images",
        "--batch_size",
        "2",
    ]
    result = evaluation.main(["pope", *flags, "--data", f"{tmp_path}/pope"])["pope"]
    model, f1 = load_model(finetuned / "checkpoints/step_3"), []
    for name in rows:
        asked = [
            evaluation.question_sample(f"{row['text']}\n{evaluation.SHORT}", row["image"])
            for row in rows[name]
        ]
        said = evaluation.answer(model, asked, world / "images", 1)
        true = [row["label"] == "yes" for row in rows[name]]
        yes = [
            not any(w in s.lower().split(".")[0].replace(",", "").split() for w in ("no", "not"))
            for s in said
        ]
        f1.append(sklearn.metrics.f1_score(true, yes, zero_division=0))
        assert result[f"coco_pope_{name}"]["f1"] == pytest.approx(f1[-1])
    assert result["f1"] == pytest.approx(np.mean(f1))
    one = evaluation.main(["pope", *flags, "--data", f"{tmp_path}/pope/coco_pope_random.json"])[
        "pope"
    ]
    assert one["coco_pope_random"] == result["coco_pope_random"]
    written = [json.loads(line) for line in (finetuned / "eval.jsonl").read_text().splitlines()]
    assert written[-2] == {"step": 3, "pope": result}
    lines = (tmp_path / "pope/coco_pope_popular.json").read_text().replace('"no"', '"maybe"', 1)
    (tmp_path / "pope/coco_pope_popular.json").write_text(lines)
    number = 1 + next(i for i, line in enumerate(lines.splitlines()) if "maybe" in line)
    with pytest.raises(
        UserError, match=f"coco_pope_popular.json, line {number}: not a question of POPE"
    ):
        evaluation.main(["pope", *flags, "--data", f"{tmp_path}/pope"])
    with pytest.raises(UserError, match="images: no file of POPE"):
        evaluation.main(["pope", *flags, "--data", str(world / "images")])
    with pytest.raises(UserError, match="none.json: no file of POPE"):
        evaluation.main(["pope", *flags, "--data", "none.json"])


def test_vqa_scores_each_kind_of_question(finetuned, world, tmp_path):
    def sample(question, answer, **more):
        return {
            "id": question,
            "conversations": [
                {"from": "human", "value": question},
                {"from": "gpt", "value": answer},
            ],
        } | more

    model = load_model(finetuned)
    texts = [f"{q}?\n{evaluation.SHORT}" for q in ("red", "blue")]
    said = evaluation.answer(
        model, [evaluation.question_sample(text, "1.png") for text in texts], world / "images"
    )
    listed = f"which?\nA. door\nB. wall\n{evaluation.LETTER}"
    [letter] = evaluation.answer(
        model, [evaluation.question_sample(listed, "2.png")], world / "images"
    )
    rows = [
        sample("red?\n<image>", said[0], image="1.png"),
        sample("<image>\nblue?", "no", image="1.png"),
        sample("<image>\nwhich?", "wall", image="2.png", choices=["door", "wall"]),
        sample("text?", "zebra"),
        sample("<image>\nwhich?", letter, image="2.png", choices=["door", letter]),
    ]
    (tmp_path / "q.json").write_text(json.dumps(rows))
    flags = [
        "--model",
        str(finetuned),
        "--image_folder",
        f"{world}/images",
        "--data",
        f"{tmp_path}/q.json",
    ]
    result = evaluation.main(["vqa", *flags, "--out", f"{tmp_path}/new/said.jsonl"])["q"]
    log = [json.loads(line) for line in (tmp_path / "new/said.jsonl").read_text().splitlines()]
    assert [line["answer"] for line in log[:2]] == said and log[0]["question"] == texts[0]
    assert (
        log[0]["right"] and not log[3]["right"] and log[1]["right"] == (normalize(said[1]) == "no")
    )
    assert log[2]["question"] == listed and log[2]["answer"] == letter
    assert log[2]["right"] == (chosen(letter, ["door", "wall"]) == 1)
    assert result == {
        "open": 0.5,
        "yes/no": float(log[1]["right"]),
        "choice": (log[2]["right"] + log[4]["right"]) / 2,
        "all": sum(line["right"] for line in log) / 5,
    }
    rows[2]["conversations"][1]["value"] = "cat"
    (tmp_path / "q.json").write_text(json.dumps(rows))
    with pytest.raises(UserError, match="the answer 'cat' is none of its choices"):
        evaluation.main(["vqa", *flags])


def test_vqa_scores_answers_that_are_known(finetuned, tmp_path, monkeypatch):
    said = ["B", "A. door", "The wall.", "C", "No.", "yes", "blue", "Red!"]
    true = ["wall", "B", "B", "wall", "no", "no", "red", "a red"]
    rows = [
        {
            "id": i,
            "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": answer}],
        }
        | ({"choices": ["door", "wall"]} if i < 4 else {})
        for i, answer in enumerate(true)
    ]
    (tmp_path / "q.json").write_text(json.dumps(rows))
    monkeypatch.setattr(evaluation, "answer", lambda *args: said)
    assert evaluation.main(["vqa", "--model", str(finetuned), "--data", f"{tmp_path}/q.json"]) == {
        "q": {"choice": 2 / 4, "yes/no": 1 / 2, "open": 1 / 2, "all": 4 / 8}
    }


def test_chat_says_what_generate_says_and_remembers(finetuned, world, monkeypatch, capsys):
    lines = iter(["red?", "the wall?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    turns = evaluation.main(
        [
            "chat",
            "--model",
            str(finetuned),
            "--image",
            f"{world}/images/3.png",
            "--max_new_tokens",
            "9",
        ]
    )
    model, streamed = load_model(finetuned), capsys.readouterr().out
    for n in (1, 3):
        asked = [{"from": "human", "value": f"<image>\n{turns[0]['value']}"}, *turns[1:n]]
        [said] = evaluation.answer(
            model, [{"image": "3.png", "conversations": asked}], world / "images", 1, 9
        )
        assert turns[n]["value"] == said and said in streamed
    assert [turn["value"] for turn in turns[::2]] == ["red?", "the wall?"]


def test_words_of_two_runs_are_those_of_the_same_images(run, world, tmp_path, monkeypatch):
    """The run's own, also for a baseline that held out others or has no word list."""
    other = shutil.copytree(run, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    samples = json.loads((world / "train.json").read_text())[::-1]
    (tmp_path / "reversed.json").write_text(json.dumps(samples))
    config |= {"val_data": str(tmp_path / "reversed.json"), "labels": ""}
    (other / "config.json").write_text(json.dumps(config))
    drawn = []
    monkeypatch.setattr(evaluation, "draw_words", lambda *args: drawn.append(args))
    for baseline in (run, other):
        flags = ["--model", str(run), "--baseline", str(baseline), "--samples", "3"]
        evaluation.main(["words", *flags])
    (one, *seen), (two, *same) = drawn
    assert seen == same == [str(world / "images"), 30, "square", (5, 5), "words.html"]
    assert list(one) == list(two) and len(one) == 3
    for panels, others in zip(one.values(), two.values()):
        assert list(others) == [str(other), str(run)]
        assert panels[str(run)] == others[str(run)] == others[str(other)]
        assert len(panels[str(run)]) == 25
        assert all(len(labels) == 10 for labels in panels[str(run)])


def test_class_folders_become_questions_with_four_choices(finetuned, world, tmp_path):
    """As Stanford Dogs is asked in Table 3: from folders to a score."""
    classes = ["n02085620-Chihuahua", "n02113799-standard_poodle", "n1-x-y", "n2-pug", "n3-boxer"]
    for name in classes:
        (tmp_path / "Images" / name).mkdir(parents=True)
        for i in range(3):
            shutil.copy(world / f"images/{i}.png", tmp_path / f"Images/{name}/{name[:3]}_{i}.png")
        (tmp_path / "Images" / name / ".DS_Store").touch()
    program = [sys.executable, Path(__file__).with_name("choices.py")]
    made = subprocess.run(
        [*program, "Images", "new/dogs.json", "Which?"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert "15 images in new/dogs.json" in made.stdout
    samples = load_samples(tmp_path / "new/dogs.json", captions=False)
    assert {len(set(sample["choices"])) for sample in samples} == {4}
    asked = [vqa_question(sample, "") for sample in samples]
    assert asked[3]["true"] == "standard poodle" and asked[3]["question"].startswith("Which?\nA. ")
    assert len({sample["choices"].index(one["true"]) for sample, one in zip(samples, asked)}) == 4
    flags = f"--data {tmp_path}/new/dogs.json --image_folder {tmp_path}/Images --workers 0".split()
    result = evaluation.main(["vqa", "--model", str(finetuned), *flags])["dogs"]
    assert result.keys() == {"choice", "all"}

    shutil.rmtree(tmp_path / "Images/n2-pug")
    shutil.rmtree(tmp_path / "Images/n3-boxer")
    few = subprocess.run(
        [*program, "Images", "few.json", "Which?"], cwd=tmp_path, capture_output=True
    )
    assert b"error: Images: needs four or more class folders" in few.stderr
    assert not (tmp_path / "few.json").exists()
