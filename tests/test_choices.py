"""Class folders become questions with lettered choices, as Stanford Dogs is asked in Table 3."""

import shutil
from pathlib import Path

import pytest
from PIL import Image

import eval as evaluation
from data import UserError, load_samples
from tools import choices

CLASSES = {
    "n02085620-Chihuahua": "Chihuahua",
    "n02113799-standard_poodle": "standard poodle",
    "n1-x-y": "x-y",
    "n2-pug": "pug",
    "n3-boxer": "boxer",
}


@pytest.fixture
def images(tmp_path):
    """A folder of five class folders, each with three images and a file that is none."""
    for name in CLASSES:
        (tmp_path / "Images" / name).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (8, 8)).save(tmp_path / f"Images/{name}/{name[:3]}_{i}.png")
        (tmp_path / "Images" / name / ".DS_Store").touch()
    return tmp_path / "Images"


def test_questions_show_four_choices_and_the_answer_is_the_letter_of_the_true_one(
    images, tmp_path, capsys
):
    choices.main([str(images), f"{tmp_path}/new/dogs.json", "Which?"])
    assert "15 images in" in capsys.readouterr().out
    samples = load_samples(tmp_path / "new/dogs.json", captions=False)
    letters = set()
    for sample in samples:
        question, answer = (turn["value"] for turn in sample["conversations"])
        assert (images / sample["image"]).is_file()
        first, *lines = question.splitlines()
        assert first == "Which?" and [line[:3] for line in lines] == ["A. ", "B. ", "C. ", "D. "]
        shown = {line[0]: line[3:] for line in lines}
        assert len(set(shown.values())) == 4 and set(shown.values()) < set(CLASSES.values())
        assert shown[answer] == CLASSES[Path(sample["image"]).parent.name]
        letters.add(answer)
    assert len({sample["image"] for sample in samples}) == 15
    assert letters == set("ABCD")  # none of them is always right


def test_plain_exact_match_scores_them_by_the_letter(images):
    samples = choices.questions(images, "Which?")
    asked = [evaluation.vqa_question(sample, evaluation.SHORT) for sample in samples]
    assert {question["kind"] for question in asked} == {"choice"}
    assert all(question["question"].endswith(f"\n{evaluation.LETTER}") for question in asked)


def test_an_image_less_changes_no_other_question(images):
    """A question depends on the names of its image and of the classes alone."""
    before = choices.questions(images, "Which?")
    removed = images / before[0]["image"]
    removed.unlink()
    assert choices.questions(images, "Which?") == before[1:]


def test_fewer_than_four_classes_or_two_of_one_name_are_refused(images, tmp_path):
    shutil.copytree(images / "n2-pug", images / "n4-pug")
    with pytest.raises(UserError, match="four or more class folders of different names"):
        choices.questions(images, "Which?")
    for name in ("n2-pug", "n3-boxer", "n4-pug"):
        shutil.rmtree(images / name)
    with pytest.raises(UserError, match="Images: needs four or more class folders"):
        choices.main([str(images), f"{tmp_path}/few.json", "Which?"])
    assert not (tmp_path / "few.json").exists()
    with pytest.raises(UserError, match="usage: python -m tools.choices FOLDER"):
        choices.main([str(images)])
