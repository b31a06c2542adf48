"""Questions with four lettered choices from a folder of class folders, such as Stanford Dogs'.

    python -m tools.choices Images dogs.json "Which breed is this dog?"
    python eval.py vqa --model out/pretrain_finetune --data dogs.json --image_folder Images

PAPER: Table 3 asks Stanford Dogs with four choices. Neither the question nor the wrong choices are
given; here they are three other classes, which depend on nothing but the names of the files.
"""

import json
import random
import re
import sys
from pathlib import Path

from data import UserError, cli
from labels import write_file

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def questions(folder, text):
    """One sample in LLaVA's format for each image: the question with its choices, and the letter.

    The name of a class is that of its folder, with spaces for underscores and without a number of
    ImageNet (n02085620-Chihuahua). Raises UserError for fewer than four names.
    """
    files = sorted(path for path in Path(folder).glob("*/*") if path.suffix.lower() in IMAGES)
    names = {path.parent: re.sub(r"^n\d+-", "", path.parent.name) for path in files}
    names = {place: name.replace("_", " ") for place, name in names.items()}
    if not 4 <= len(names) == len(set(names.values())):
        raise UserError(
            f"{folder}: needs four or more class folders of different names with images, not "
            f"{sorted(names.values())}"
        )
    samples = []
    for file in files:
        true = names[file.parent]
        others = sorted(set(names.values()) - {true})
        choices = sorted([true, *random.Random(file.name).sample(others, 3)])
        lines = [f"{letter}. {choice}" for letter, choice in zip("ABCD", choices)]
        turns = [
            {"from": "human", "value": "\n".join([text, *lines])},
            {"from": "gpt", "value": "ABCD"[choices.index(true)]},
        ]
        samples.append({"image": f"{file.parent.name}/{file.name}", "conversations": turns})
    return samples


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return
    if len(argv) != 3:
        raise UserError("usage: python -m tools.choices FOLDER NEW.json QUESTION")
    folder, out, text = argv
    samples = questions(folder, text)
    write_file(Path(out), json.dumps(samples, indent=1))
    print(f"{len(samples):,} images in {out}; ask with --image_folder {folder}")


if __name__ == "__main__":
    cli(main)
