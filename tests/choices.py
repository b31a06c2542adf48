"""Questions with four choices from a folder of class folders, such as Stanford Dogs' Images.

    python tests/choices.py Images dogs.json "Which breed is this dog?"
    python eval.py vqa --model out/pretrain_finetune --data dogs.json --image_folder Images

PAPER: Table 3 asks Stanford Dogs with four choices. Neither the question nor the wrong choices are
given; here they are three other classes, which depend on nothing but the names of the files.
"""

import json
import random
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from data import UserError, cli
from labels import write_file

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def questions(folder, text):
    """One sample in LLaVA's format for each image. The name of a class is that of its folder, with
    spaces for underscores and without a number of ImageNet (n02085620-Chihuahua).
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
        choices = [true, *random.Random(file.name).sample(others, 3)]
        turns = [{"from": "human", "value": text}, {"from": "gpt", "value": true}]
        image = f"{file.parent.name}/{file.name}"
        sample = {"image": image, "choices": sorted(choices), "conversations": turns}
        samples.append(sample)
    return samples


def main():
    if len(sys.argv) != 4:
        raise UserError(f"usage: {sys.argv[0]} FOLDER NEW.json QUESTION")
    folder, out, text = sys.argv[1:]
    samples = questions(folder, text)
    write_file(Path(out), json.dumps(samples, indent=1))
    print(f"{len(samples):,} images in {out}; ask with --image_folder {folder}")


if __name__ == "__main__":
    cli(main)
