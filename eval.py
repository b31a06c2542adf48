"""Measure a model: how well its visual tokens align with the LLM's words, and how well it answers.

    python eval.py tacs    --model out/toy      TACS (Eq. 14): visual tokens against caption tokens
    python eval.py gap     --model out/toy      D (Eq. 5): distance of visual tokens to words
    python eval.py words   --model out/toy      nearest words of visual tokens (Eq. 4)
    python eval.py pope    --model out/pretrain_finetune --data data/pope --image_folder val2014
    python eval.py vqa     --model out/pretrain_finetune --data questions.json --image_folder images
    python eval.py chat    --model out/pretrain_finetune --image photo.jpg

--model takes the --out_dir of a training run, its model/, one of its checkpoints, or any Hugging
Face Llava model. --llm and --vision say where the parts of a stage 1 are, if they have moved since.
By default, tacs, gap and words measure on the captions and words of the training run, on its
held-out captions if it has any. Results are appended to the run's eval.jsonl, which
`python -m tools.curves` draws; `python -m tools.look words` draws words over the images.

    D: the LLM's width   m visual tokens of an image, P of all images   n text tokens   q words
"""

import collections
import contextlib
import functools
import itertools
import json
import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import (
    IMAGE_TOKEN,
    LlavaDataset,
    UserError,
    check_first_image,
    cli,
    collate,
    image_of,
    load_samples,
    parse_json,
    rank,
    rank_device,
    read_image,
    read_json_lines,
    read_object,
    run_command,
    stack_pixels,
    world_size,
)
from labels import read_words, write_file
from model import find_model, load_model

# --------------------------------------------------------------------------------------- measures


def tacs(x_v, x_t, k=10):
    """Token Alignment Consistency Score (Eq. 14, 17): cosine of each visual token with its nearest
    text token, averaged over the k visual tokens where it is highest (all, if there are fewer).

    x_v [m, D] visual tokens, x_t [n, D] text tokens -> scalar.
    """
    nearest = (F.normalize(x_v.float()) @ F.normalize(x_t.float()).T).amax(1)
    return nearest.topk(min(k, len(nearest))).values.mean()


def modality_gap(x_v, word_features):
    """The paper's D (Eq. 5): mean distance of visual tokens to their nearest word.

    [P, D], [q, D] -> scalar.
    """
    parts = word_features.split(4096)  # [P, q] distances at once would not fit in memory
    minima = [torch.cdist(x_v.float(), words.float()).amin(1) for words in parts]
    return torch.stack(minima).amin(0).mean()


def nearest_word(x_v, word_features):
    """Index of the word closest in cosine to each visual token (Eq. 4). [P, D], [q, D] -> [P]."""
    words = F.normalize(word_features.float())
    parts = x_v.float().split(1024)  # [P, q] cosines at once would not fit in memory
    return torch.cat([(part @ words.T).argmax(1) for part in parts])


@torch.no_grad()
def alignment_sums(model, dataset, device):
    """Sums over a LlavaDataset -> [TACS of all images, images, loss of all tokens, trained tokens].

    The loss is L_g (Eq. 12) before it is divided by the trained tokens. model: a SEAModel, or a
    function that calls one, as DDP or FSDP made it; the ranks share the samples.
    """
    sums = torch.zeros(4, dtype=torch.float64)
    for first in range(0, len(dataset), world_size()):
        own = first + rank()
        # A rank that has no sample left repeats one: FSDP gathers weights in each forward pass.
        i = own % len(dataset)
        batch = to_device(collate([dataset[i]]), device)
        del batch["index"]
        out = model(**batch, num_targets=1)  # divided by 1, loss_g stays a sum over tokens

        x_v = out["inputs"][batch["image_places"]]
        x_t = out["inputs"][batch["trained"][:-1]]  # without the newline that ends a caption
        score = tacs(x_v, x_t) if len(x_v) and len(x_t) else 0.0
        if own < len(dataset):
            has_score = len(x_v) > 0 and len(x_t) > 0
            values = (float(score), has_score, float(out["loss_g"]), len(batch["trained"]))
            sums += torch.tensor(values)
    return all_sum(sums, device).tolist()


def to_device(batch, device):
    """A batch with its tensors on the device."""
    return {
        name: x.to(device, non_blocking=True) if torch.is_tensor(x) else x
        for name, x in batch.items()
    }


def all_sum(values, device):
    """Sum numbers over the ranks -> float64 tensor on the device."""
    numbers = [torch.as_tensor(value, dtype=torch.float64).flatten() for value in values]
    total = torch.cat([number.to(device, non_blocking=True) for number in numbers])
    if world_size() > 1:
        dist.all_reduce(total)
    return total


# ---------------------------------------------------------------------- what they are measured on


class Run(NamedTuple):
    """A path given as --model, and the training run it belongs to, if it belongs to one."""

    path: str
    folder: Path | None = None  # the run's --out_dir
    config: dict = {}  # its config.json
    step: int | None = None
    parts: dict = {}  # load_model's arguments llm and vision


def find_run(path, llm="", vision=""):
    """The Run of an out_dir, its model/, a checkpoint, or any Llava model.

    llm, vision: as of load_model.
    """
    parts = {"llm": llm, "vision": vision}
    found = find_model(path).resolve()
    is_checkpoint = found.parent.name == "checkpoints"
    folder = found.parents[1] if is_checkpoint else found.parent
    is_of_run = (folder / "metrics.jsonl").is_file()
    if not is_of_run or not (is_checkpoint or found.name == "model"):
        return Run(path, parts=parts)
    config = read_object((folder / "config.json").read_bytes(), folder / "config.json")
    last_step = read_log(folder / "metrics.jsonl")[-1]["step"]
    step = step_in(found.name)
    return Run(path, folder, config, last_step if step is None else step, parts)


def open_model(run):
    """The SEAModel of a Run."""
    device = rank_device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return load_model(run.path, dtype, **run.parts).to(device)


def find_captions(run, data, image_folder):
    """-> data and image_folder, by default the run's held-out captions, else its training data.

    PAPER: the 100 captioned images of COCO (Sec. 2.2, Appendix D) were not published; these stand
    in their place.
    """
    config = run.config
    if not data and config.get("stage") == "pretrain":  # stage 2's data are no captions
        data = config["val_data"] or config["data"]
        if not config["val_data"]:
            print("measured on the training data: the run has no held-out captions (--val_data)")
    image_folder = image_folder or config.get("image_folder")
    if not data or not image_folder:
        raise UserError(f"{run.path}: its run has no captions: give --data and --image_folder")
    return data, image_folder


def open_captions(run, data, image_folder, samples):
    """-> the SEAModel of a Run, and a LlavaDataset of the first `samples` of find_captions."""
    data, image_folder = find_captions(run, data, image_folder)
    first_samples = list(itertools.islice(load_samples(data), samples))
    check_first_image(first_samples, image_folder)
    model = open_model(run)
    return model, LlavaDataset(
        first_samples,
        image_folder,
        model.preprocess,
        model.tokenizer,
        model.image_tokens,
        min(2048, model.max_positions),
    )


@torch.no_grad()
def encode_images(model, dataset):
    """X_v (Eq. 1) of all images: [images * m, D]."""
    x_v = []
    for i in tqdm(range(len(dataset)), "encoding images"):
        x_v.append(model.visual_tokens(dataset[i]["pixels"][None].to(model.device))[0])
    return torch.cat(x_v)


def find_words(run, file):
    """The words of a file, by default those of the run's labels."""
    if not file and not run.config.get("labels"):
        raise UserError("the run of --model has no labels: give --words, a file with a word a line")
    return read_words(file or Path(run.config["labels"]) / "words.txt")


@torch.no_grad()
def encode_words(model, words):
    """Ψ(w) (Eq. 10) of all words: [q, D]."""
    model.set_words(words)
    parts = torch.arange(len(words)).split(8192)  # their tokens at once might not fit in memory
    return torch.cat([model.label_features(ids) for ids in parts])


# ---------------------------------------------------------------------------------------- results


def save_result(run, result):
    """Print a result and append it, with the step, to the run's eval.jsonl, if there is a run."""
    print(json.dumps(result))
    if run.folder:
        append_json_line(run.folder / "eval.jsonl", {"step": run.step} | result)
    return result


def append_json_line(file, content):
    with open(file, "a") as f:
        f.write(json.dumps(content) + "\n")


def read_log(file):
    """The lines of a run's metrics.jsonl or eval.jsonl, each with the number of its step."""
    lines = read_json_lines(file, ["step"])
    if not lines or not all(isinstance(line["step"], int) for line in lines):
        raise UserError(f"{file}: empty, or a line whose step is no number; mend or remove it")
    return lines


def step_in(path):
    """The number of the last step_N in a path, or None."""
    steps = re.findall(r"step_(\d+)", str(path))
    return int(steps[-1]) if steps else None


# ------------------------------------------------------------------------------ commands: alignment


def eval_tacs(
    model: str,
    data: str = "",
    image_folder: str = "",
    samples: int = 100,
    llm: str = "",
    vision: str = "",
):
    """Mean TACS (Eq. 14) and caption loss of image-caption pairs."""
    run = find_run(model, llm, vision)
    sea, captions = open_captions(run, data, image_folder, samples)
    score, pairs, loss, tokens = alignment_sums(sea, captions, sea.device)
    return save_result(run, dict(tacs=score / pairs, caption_loss=loss / tokens, pairs=int(pairs)))


def eval_gap(
    model: str,
    words: str = "",
    data: str = "",
    image_folder: str = "",
    samples: int = 100,
    llm: str = "",
    vision: str = "",
):
    """D of Eq. 5, the norms it depends on (of visual tokens and words), and D of unit vectors."""
    run = find_run(model, llm, vision)
    word_list = find_words(run, words)
    sea, captions = open_captions(run, data, image_folder, samples)
    x_v = encode_images(sea, captions).float()
    features = encode_words(sea, word_list).float()

    result = dict(
        D=modality_gap(x_v, features),
        visual_norm=x_v.norm(dim=1).mean(),
        word_norm=features.norm(dim=1).mean(),
        D_of_unit_vectors=modality_gap(F.normalize(x_v), F.normalize(features)),
    )
    return save_result(run, {name: value.item() for name, value in result.items()})


def eval_words(
    model: str,
    words: str = "",
    data: str = "",
    image_folder: str = "",
    samples: int = 100,
    llm: str = "",
    vision: str = "",
):
    """Nearest word of every visual token (Eq. 4, Figure 1a): the shares of the most frequent words.

    python -m tools.look words draws these words over the images.
    """
    run = find_run(model, llm, vision)
    word_list = find_words(run, words)
    sea, captions = open_captions(run, data, image_folder, samples)
    ids = nearest_word(encode_images(sea, captions), encode_words(sea, word_list))
    return save_result(run, {"words": word_shares(ids, word_list)})


def word_shares(ids, words):
    """The shares of the eight most frequent of words[ids]: {word: share}. ids: [P]."""
    counts = collections.Counter(ids.tolist()).most_common(8)
    return {words[i]: round(count / len(ids), 3) for i, count in counts}


# ---------------------------------------------------------------------------------------- answers

# What LLaVA-1.5 appends to a question, and to one with lettered choices
SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."


@torch.no_grad()
def answer(
    model, samples, image_folder, batch_size=16, max_new_tokens=16, workers=0, shorten=False
):
    """Greedy answers (strings) to samples: LLaVA's dicts whose last turn is a human's.

    Prompt and answer have to fit into the LLM's positions, or UserError is raised. shorten: answers
    end where the positions do, and only a prompt that leaves none is an error.
    """
    tokenizer = model.tokenizer
    dataset = LlavaDataset(
        samples,
        image_folder,
        model.preprocess,
        tokenizer,
        model.image_tokens,
        max_length=10**9,  # nothing may be cut off
        text="prompt",
    )
    pad = functools.partial(pad_left, pad_id=tokenizer.pad_token_id)
    loader = DataLoader(dataset, batch_size, collate_fn=pad, num_workers=workers)

    answers = []
    for batch in tqdm(loader, "answering", disable=len(samples) == 1):
        batch = to_device(batch, model.device)
        length = batch["input_ids"].shape[1]
        room = model.max_positions - length
        if room < (1 if shorten else max_new_tokens):
            raise UserError(
                f"a prompt of {length} positions leaves {max(room, 0)} of the LLM's "
                f"{model.max_positions} for an answer of {max_new_tokens}: shorten the prompt"
            )
        ids = model.generate(batch, max_new_tokens=min(max_new_tokens, room))
        answers += tokenizer.batch_decode(ids, skip_special_tokens=True)
    return [text.strip() for text in answers]


def pad_left(items, pad_id):
    """Prompts, items of LlavaDataset -> input_ids and attention_mask [B, L], pixels, to generate.

    Each prompt ends where its answer begins: at the right.
    """
    ids = [item["input_ids"] for item in items]
    masks = [torch.ones_like(i) for i in ids]  # not from the ids: the pad token may be EOS
    pad = functools.partial(pad_sequence, batch_first=True, padding_side="left")
    return {
        "input_ids": pad(ids, padding_value=pad_id),
        "attention_mask": pad(masks),
        "pixels": stack_pixels(items),
    }


def question_sample(text, image):
    """A sample for `answer`. image: a path below the image folder, or None."""
    return {"image": image, "conversations": [{"from": "human", "value": text}]}


def first_sentence(text):
    """The first sentence of an answer as POPE reads it, in lower case and without commas."""
    return text.lower().split(".")[0].replace(",", "")


def says_yes(text):
    """An answer as POPE and LLaVA read it: no if its first sentence has "no" or "not", else yes."""
    return {"no", "not"}.isdisjoint(first_sentence(text).split())


def says_neither(text):
    """Does POPE's rule take an answer for a yes although its first sentence does not say "yes"?"""
    return says_yes(text) and not re.search(r"\byes\b", first_sentence(text))


def pope_metrics(answers, truths):
    """Two lists of bool, where True is yes -> accuracy, precision, recall, f1, yes_ratio."""
    answers = np.array(answers)
    truths = np.array(truths)
    hits = sum(answers & truths)
    return dict(
        accuracy=np.mean(answers == truths),
        precision=hits / max(1, sum(answers)),
        recall=hits / max(1, sum(truths)),
        f1=2 * hits / max(1, sum(answers) + sum(truths)),
        yes_ratio=np.mean(answers),
    )


def plain(text):
    """An answer as exact match compares it: lower case, no outer spaces, no final punctuation."""
    return text.lower().strip().rstrip(" .,:;!?")


def letter_of(text):
    """The letter of the choice that an answer names: "B", "b.", "(B)" or "B. a cat"; or None."""
    found = re.match(r"\(?([A-H])([.):\n]|$)", text.strip().upper())
    return found and found[1]


# -------------------------------------------------------------------------------- commands: answers


def eval_pope(
    model: str,
    data: str,
    image_folder: str,
    batch_size: int = 16,
    workers: int = 4,
    prompt: str = SHORT,
    llm: str = "",
    vision: str = "",
):
    """POPE: does the model see objects that are not there?

    LLaVA and the paper report the mean F1 over the files. It also prints `neither`: the share of
    answers that count as yes without saying so.

    data: one of its files, such as coco_pope_random.json (each line a JSON object with image, text
        and label, or a list of these), or a folder of them
    image_folder: where the questions' image names begin
    """
    files = sorted(Path(data).glob("*.json*")) or [Path(data)]
    rows_of = {file.stem: read_pope(file) for file in files}  # all checked before any is asked
    check_first_image(rows_of[files[0].stem], image_folder)
    run = find_run(model, llm, vision)
    sea = open_model(run)
    result = {}
    for name, rows in rows_of.items():
        asked = [question_sample(f"{row['text']}\n{prompt}".strip(), row["image"]) for row in rows]
        answers = answer(sea, asked, image_folder, batch_size, workers=workers)
        said_yes = [says_yes(text) for text in answers]
        result[name] = pope_metrics(said_yes, [row["label"] == "yes" for row in rows])
        result[name]["neither"] = np.mean([says_neither(text) for text in answers])

    of_files = list(result.values())
    mean = {key: np.mean([metrics[key] for metrics in of_files]) for key in of_files[0]}
    return save_result(run, {"pope": mean | result})


def read_pope(file):
    """The questions of a POPE file, a list or one on each line: dicts of image, text and label."""
    if not os.path.isfile(file):
        raise UserError(
            f"{file}: not a POPE file, such as coco_pope_random.json, nor a folder of them"
        )
    others = "a file that is not POPE's has to leave the folder"
    content = file.read_bytes()
    try:
        if content.lstrip().startswith(b"["):
            rows = parse_json(content, file)
        else:
            lines = enumerate(content.splitlines(), 1)
            rows = [parse_json(line, file, number) for number, line in lines if line.strip()]
    except UserError as e:
        raise UserError(f"{e}; {others}") from e
    if not rows:
        raise UserError(f"{file}: no POPE questions; {others}")
    for number, row in enumerate(rows, 1):
        if not is_pope_question(row):
            raise UserError(
                f'{file}, question {number}: not a POPE question, which has "image", "text" and '
                f'"label", yes or no; {others}'
            )
    return rows


def is_pope_question(row):
    """Is it a dict of image, text and label?"""
    if not isinstance(row, dict) or row.get("label") not in ("yes", "no"):
        return False
    texts = [row.get("text"), row.get("image")]
    return all(isinstance(text, str) for text in texts) and image_of(row) is not None


def eval_vqa(
    model: str,
    data: str,
    image_folder: str = "",
    batch_size: int = 16,
    workers: int = 4,
    prompt: str = SHORT,
    max_new_tokens: int = 16,
    out: str = "",
    llm: str = "",
    vision: str = "",
):
    """Exact match: the share of questions that get the answer written in the data.

    Both are put in lower case, without outer spaces and final punctuation, and nothing else is
    forgiven: official numbers are lmms-eval's. Where a question lists choices ("A. a cat") and the
    true answer is a letter of these, only the letter counts.

    data: samples in LLaVA's format, of which the first question is asked; without images they
        measure language alone
    image_folder: where the samples' image paths begin
    out: a .jsonl file for the questions with their answers
    """
    questions = [vqa_question(sample, prompt) for sample in load_samples(data, captions=False)]
    check_first_image(questions, image_folder)
    run = find_run(model, llm, vision)
    sea = open_model(run)
    answers = answer(sea, questions, image_folder, batch_size, max_new_tokens, workers)

    scores = collections.defaultdict(list)
    for question, text in zip(questions, answers):
        read = letter_of if question["kind"] == "choice" else plain
        right = read(text) == read(question["true"])
        question.update(answer=text, right=right)
        for group in (question["kind"], "all"):
            scores[group].append(right)
    if out:
        write_file(Path(out), "".join(json.dumps(question) + "\n" for question in questions))
    shares = {group: np.mean(rights) for group, rights in scores.items()}
    return save_result(run, {Path(data).stem: shares})


def vqa_question(sample, prompt):
    """A sample that ends with its first question, to which the prompt is added.

    It gets three keys: "question", the text asked, "true", the answer in the data, and "kind".
    """
    turns = sample["conversations"]
    first = next(i for i, turn in enumerate(turns) if turn["from"] == "human")
    question = turns[first]["value"].strip()
    if image_of(sample) is not None:
        question = question.replace(IMAGE_TOKEN, "").strip()
    true = turns[first + 1]["value"]
    kind = kind_of(question, true)
    if kind == "choice" and prompt == SHORT:
        prompt = LETTER
    if not question.endswith(prompt):  # LLaVA's own data have it
        question = f"{question}\n{prompt}"
    turns = [*turns[:first], {"from": "human", "value": question}]
    return sample | dict(conversations=turns, question=question, true=true, kind=kind)


def kind_of(question, true):
    """The kind of a question: "choice" if it lists choices and `true` is a letter of these, else
    "yes/no" or "open"."""
    shown = re.findall(r"(?:^|\s)\(?([A-H])[.):]\s", question)
    if {"A", "B", true.strip()} <= set(shown):
        return "choice"
    return "yes/no" if plain(true) in ("yes", "no") else "open"


def chat(model: str, image: str = "", max_new_tokens: int = 512, llm: str = "", vision: str = ""):
    """Ask about an image, or about nothing: one question a line, an empty line or Ctrl-D ends.

    An answer ends sooner than max_new_tokens where the LLM has no more positions.

    image: its file
    """
    if image and not os.path.isfile(image):
        raise UserError(f"--image {image}: no such file")
    if image:
        read_image(image)  # an error now rather than after the first question
    sea = open_model(find_run(model, llm, vision))
    turns = []
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while text := input("> ").replace(IMAGE_TOKEN, "").strip():
            turns.append({"from": "human", "value": text})
            sample = {"image": image, "conversations": turns}
            [reply] = answer(sea, [sample], ".", 1, max_new_tokens, shorten=True)
            print(reply)
            turns.append({"from": "gpt", "value": reply})
    return turns


def main(argv=None):
    commands = {
        "tacs": eval_tacs,
        "gap": eval_gap,
        "words": eval_words,
        "pope": eval_pope,
        "vqa": eval_vqa,
        "chat": chat,
    }
    if world_size() > 1:
        raise UserError("eval.py measures in one process: run it without torchrun")
    return run_command(__doc__, commands, argv)


if __name__ == "__main__":
    cli(main)
