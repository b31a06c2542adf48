import json
import math
import shutil

import numpy as np
import pytest
import sklearn.metrics
import torch
from PIL import Image

import eval as evaluation
import train
from data import LlavaDataset, UserError, geometry
from eval import (
    letter_of,
    modality_gap,
    nearest_word,
    plain,
    pope_metrics,
    says_neither,
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


def test_the_commands_on_an_out_dir_a_model_and_a_checkpoint(run):
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    for path in (run, run / "model", run / "checkpoints/step_6"):
        result = evaluation.main(["tacs", "--model", str(path), "--samples", "4"])
        assert result["tacs"] == pytest.approx(last["val_tacs"]) and result["pairs"] == 4
        assert result["caption_loss"] == pytest.approx(last["val_loss"])
    early = evaluation.main(["tacs", "--model", f"{run}/checkpoints/step_3", "--samples", "4"])
    assert early["tacs"] != result["tacs"]
    words = evaluation.main(["words", "--model", str(run), "--samples", "4"])
    recorded = [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]
    assert recorded[-2:] == [{"step": 3} | early, {"step": 6} | words]


def test_alignment_is_that_of_the_captions_own_tokens_and_of_the_words(run, world):
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
    shares = evaluation.main(["words", *flags])["words"]
    counts = sorted((names.count(name) for name in set(names)), reverse=True)[:8]
    assert list(shares.values()) == pytest.approx([n / len(names) for n in counts], abs=6e-4)
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
    captions = f"--data {tmp_path}/captions.jsonl --image_folder {world}/images --samples 3"
    run += captions.split()
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


@pytest.mark.parametrize(
    "text, neither",
    [
        ("Yes", False),
        ("Yes!", False),
        ("Well, yes, a dog", False),
        ("no", False),
        ("There is not a dog.", False),
        ("red", True),
        ("", True),
        ("There is a dog. Yes.", True),
        ("eyes", True),
        ("No!", True),  # by POPE's rule a yes
    ],
)
def test_answers_that_count_as_yes_without_saying_so(text, neither):
    assert says_neither(text) == neither


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
    """As torchrun would start eval.py: each would measure its share, or all of it twice."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="eval.py measures in one process: run it without torchrun"):
        evaluation.main(["tacs", "--model", str(run), "--samples", "4"])


def test_pope_metrics_by_hand():
    said, true = [True, True, True, False, False], [True, False, True, True, False]
    assert pope_metrics(said, true) == pytest.approx(
        dict(accuracy=3 / 5, precision=2 / 3, recall=2 / 3, f1=2 / 3, yes_ratio=3 / 5)
    )


@pytest.mark.parametrize(
    "text, same",
    [
        (" Red.\n", "red"),
        ("RED !", "red"),
        ("red, door:", "red, door"),
        ("The red", "the red"),  # an article counts
        ("two", "two"),  # not 2
        ("3.5", "3.5"),
        ("-1.", "-1"),
        ("don't", "don't"),
        ("C++", "c++"),
        ("", ""),
    ],
)
def test_exact_match_forgives_case_outer_spaces_and_final_punctuation(text, same):
    assert plain(text) == same


@pytest.mark.parametrize(
    "text, letter",
    [
        ("B", "B"),
        ("b.", "B"),
        ("B.\n", "B"),
        ("(B)", "B"),
        ("(b) a cat", "B"),
        ("B. a cat", "B"),
        ("B: cat", "B"),
        ("H", "H"),
        ("I", None),
        ("A dog", None),
        ("A's", None),
        ("Bird", None),
        ("The answer is B", None),
        ("", None),
    ],
)
def test_the_letter_that_an_answer_names(text, letter):
    assert letter_of(text) == letter


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
    files = f"--image_folder {world}/images --batch_size 2 --workers 0"
    flags = f"--model {finetuned}/checkpoints/step_3 {files}".split()
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
        UserError, match=f"coco_pope_popular.json, question {number}: not a POPE question"
    ):
        evaluation.main(["pope", *flags, "--data", f"{tmp_path}/pope"])
    with pytest.raises(UserError, match="images: not a POPE file"):
        evaluation.main(["pope", *flags, "--data", str(world / "images")])
    with pytest.raises(UserError, match="none.json: not a POPE file"):
        evaluation.main(["pope", *flags, "--data", "none.json"])


QUESTION = {"image": "0.png", "text": "Is there a door?", "label": "yes"}


@pytest.mark.parametrize(
    "content",
    ['{\n "gqa": 0.5\n}', '{"gqa": 0.5}', "[1]", "3", "", "[]", json.dumps([{"image": "0.png"}])],
)
def test_a_file_in_popes_folder_that_is_not_popes_has_to_leave(tmp_path, content):
    (tmp_path / "coco_pope_random.json").write_text(json.dumps(QUESTION) + "\n")
    (tmp_path / "notes.json").write_text(content)
    argv = ["pope", "--model", "none", "--data", str(tmp_path), "--image_folder", "x"]
    with pytest.raises(UserError, match="notes.json.* not POPE's has to leave the f") as error:
        evaluation.main(argv)
    assert "damaged" not in str(error.value)


def test_pope_takes_a_list_and_counts_what_is_neither(finetuned, world, tmp_path, monkeypatch):
    rows = [QUESTION | {"label": label} for label in ("yes", "no", "yes", "no")]
    (tmp_path / "coco_pope_random.json").write_text(json.dumps(rows, indent=1))
    monkeypatch.setattr(evaluation, "answer", lambda *args, **kwargs: ["Yes.", "No", "red", "a"])
    flags = ["--model", str(finetuned), "--image_folder", f"{world}/images"]
    result = evaluation.main(["pope", *flags, "--data", str(tmp_path)])["pope"]
    expected = dict(accuracy=0.75, precision=2 / 3, recall=1, f1=0.8, yes_ratio=0.75, neither=0.5)
    assert result["coco_pope_random"] == pytest.approx(expected)
    assert result["neither"] == 0.5


LISTED = "Which is farthest north?\nContext: N/A\nOptions: (A) Maine (B) Ohio (C) Iowa"


@pytest.mark.parametrize(
    "question, true, is_letter",
    [
        (LISTED, "C", True),
        ("<image>\nWhich?\nA. a cat\nB. a dog", "B\n", True),
        ("Which? A: cat B: dog", "A", True),
        (LISTED, "D", False),  # not among them
        (LISTED, "Iowa", False),
        ("Which letter is on the shirt?", "A", False),
        ("Is it vitamin A. or C?", "C", False),
    ],
)
def test_letters_of_choices_in_the_question_are_letters(question, true, is_letter):
    """As in ScienceQA's file in LLaVA's format."""
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": true}]
    asked = vqa_question({"image": "0.png", "conversations": turns}, evaluation.SHORT)
    prompt = evaluation.LETTER if is_letter else evaluation.SHORT
    shown = question.replace("<image>\n", "")
    assert asked["question"] == f"{shown}\n{prompt}"
    assert (asked["kind"] == "choice") == is_letter
    assert vqa_question({"conversations": turns}, "Say.")["question"].endswith("\nSay.")


def test_image_in_a_question_without_an_image_is_asked():
    turns = [{"from": "human", "value": "What is <image> in SVG?"}, {"from": "gpt", "value": "A"}]
    assert vqa_question({"conversations": turns}, "")["question"] == "What is <image> in SVG?"


def known(rows, said, finetuned, folder, monkeypatch):
    """What vqa finds, and writes, for rows of (question, true answer) and what the model said."""
    samples = []
    for question, true in rows:
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": true}]
        samples.append({"conversations": turns})
    (folder / "q.json").write_text(json.dumps(samples))
    monkeypatch.setattr(evaluation, "answer", lambda *args: said)
    files = f"--data {folder}/q.json --out {folder}/new/said.jsonl"
    result = evaluation.main(f"vqa --model {finetuned} {files}".split())["q"]
    lines = (folder / "new/said.jsonl").read_text().splitlines()
    return result, [json.loads(line) for line in lines]


def test_vqa_compares_letters_as_letters(finetuned, tmp_path, monkeypatch):
    said = ["B. Ohio", "(C)", "A", "b", "Ohio", "Because"]
    rows = [(LISTED, "B")] * len(said)
    result, lines = known(rows, said, finetuned, tmp_path, monkeypatch)
    assert result == {"choice": 2 / 6, "all": 2 / 6}
    assert [line["right"] for line in lines] == [True, False, False, True, False, False]


def test_vqa_scores_each_kind_of_question(finetuned, tmp_path, monkeypatch):
    said = ["No.", "yes", "blue", " Red!", "a red", "(B) Ohio", "B"]
    true = ["no", "no", "red", "red", "red", "B", " B\n"]
    rows = [("?", answer) for answer in true[:5]] + [(LISTED, answer) for answer in true[5:]]
    result, lines = known(rows, said, finetuned, tmp_path, monkeypatch)
    assert [line["right"] for line in lines] == [True, False, False, True, False, True, True]
    assert result == {"yes/no": 1 / 2, "open": 1 / 3, "choice": 1, "all": 4 / 7}
    assert [(line["answer"], line["true"]) for line in lines] == list(zip(said, true))


def test_vqa_asks_the_first_question_with_its_image_and_the_prompt(finetuned, world, tmp_path):
    model = load_model(finetuned)
    texts = [f"{word}?\n{evaluation.SHORT}" for word in ("red", "blue")]
    asked = [evaluation.question_sample(text, "1.png") for text in texts]
    said = evaluation.answer(model, asked, world / "images")
    rows = []
    for question, answer in (("red?\n<image>", said[0]), ("<image>\nblue?", "zebra")):
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        later = [{"from": "human", "value": "why?"}, {"from": "gpt", "value": "so"}]
        rows.append({"image": "1.png", "conversations": turns + later})
    (tmp_path / "q.json").write_text(json.dumps(rows))
    files = f"--data {tmp_path}/q.json --image_folder {world}/images --out {tmp_path}/said.jsonl"
    result = evaluation.main(f"vqa --model {finetuned} --workers 0 {files}".split())
    assert result == {"q": {"open": 0.5, "all": 0.5}}
    lines = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    assert [line["answer"] for line in lines] == said
    assert [line["question"] for line in lines] == texts


def test_chat_says_what_generate_says_and_remembers(finetuned, world, monkeypatch, capsys):
    lines = iter(["red?", "the wall?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    flags = f"--image {world}/images/3.png --max_new_tokens 9"
    turns = evaluation.main(f"chat --model {finetuned} {flags}".split())
    model = load_model(finetuned)
    printed = capsys.readouterr().out
    for n in (1, 3):
        asked = [{"from": "human", "value": f"<image>\n{turns[0]['value']}"}, *turns[1:n]]
        sample = {"image": "3.png", "conversations": asked}
        [said] = evaluation.answer(model, [sample], world / "images", 1, 9)
        assert turns[n]["value"] == said and said in printed
    assert [turn["value"] for turn in turns[::2]] == ["red?", "the wall?"]


def test_chat_goes_as_far_as_the_positions_of_the_llm(finetuned, tmp_path, monkeypatch, capsys):
    """Without flags, where the LLM has fewer positions than an answer may have tokens."""
    folder = shutil.copytree(finetuned / "model", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 200
    (folder / "config.json").write_text(json.dumps(config))
    lines = iter(["dark striped wall?", "why?"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    with pytest.raises(UserError, match="leaves 0 of the LLM's 200 for an answer of 512: shorten"):
        evaluation.main(["chat", "--model", str(folder)])

    model = load_model(finetuned)
    ids = model.tokenizer.apply_chat_template(
        [{"role": "user", "content": "dark striped wall?"}],
        add_generation_prompt=True,
        return_dict=True,
    ).input_ids
    prompt = torch.tensor([[model.tokenizer.bos_token_id, *ids]])
    whole = model.llava.generate(prompt, max_length=200, do_sample=False)[0]
    assert len(whole) == 200  # it did not end of itself
    said = model.tokenizer.decode(whole[prompt.shape[1] :], skip_special_tokens=True)
    assert capsys.readouterr().out.rstrip().endswith(said.strip())
