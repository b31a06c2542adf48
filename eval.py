"""Measure a model: how well its visual tokens align with the LLM's words, and how well it answers.

    python eval.py tacs    --model out/toy      TACS (Eq. 14): visual tokens against caption tokens
    python eval.py gap     --model out/toy      D (Eq. 5): distance of visual tokens to words
    python eval.py words   --model out/toy --baseline out/toy_baseline      nearest words (Fig. 1a)
    python eval.py pope    --model out/finetune --data pope/ --image_folder val2014
    python eval.py vqa     --model out/finetune --data questions.json --image_folder images
    python eval.py chat    --model out/finetune --image photo.jpg
    python eval.py figures --model out/toy --baseline out/toy_baseline      Figures 2, 3 and 5

--model takes the --out_dir of a training run, its model/, one of its checkpoints, or any Hugging
Face Llava model; for tacs, gap, pope and vqa also checkpoints/, to measure all of them. By default,
tacs, gap and words measure on the captions and words of the training run, on its held-out captions
if it has any. Results are appended to the run's eval.jsonl, which `figures` reads. Dimensions as in
loss.py.
"""

import collections
import contextlib
import functools
import itertools
import json
import re
import string
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import (
    IMAGE_TOKEN,
    LlavaDataset,
    UserError,
    cli,
    collate,
    image_of,
    load_samples,
    read_json_lines,
    read_object,
    run_command,
)
from figures import (
    draw_comparison,
    draw_words,
    history,
    read_log,
    step_in,
)
from labels import (
    all_sum,
    append_json_line,
    nearest_words,
    rank,
    rank_device,
    read_words,
    true_share,
    with_words,
    world_size,
    write_file,
)
from model import checkpoints, find_model, load_model

# --------------------------------------------------------------------------------------- measures


def tacs(x_v, x_t, k=10):
    """Token Alignment Consistency Score (Eq. 14, 17): cosine of each visual token with its nearest
    text token, averaged over the k visual tokens where it is highest (all, if there are fewer).

    x_v [m, D] visual tokens, x_t [n, D] text tokens -> scalar.
    """
    nearest = (F.normalize(x_v.float()) @ F.normalize(x_t.float()).T).amax(1)
    return nearest.topk(min(k, len(nearest))).values.mean()


def modality_gap(x_v, word_features):
    """D (Eq. 5): mean distance of visual tokens to their nearest word. [P, D], [q, D] -> scalar."""
    parts = word_features.split(4096)  # [P, q] distances at once would not fit in memory
    minima = [torch.cdist(x_v.float(), words.float()).amin(1) for words in parts]
    return torch.stack(minima).amin(0).mean()


def nearest_word(x_v, word_features):
    """Index of the word closest in cosine to each visual token (Eq. 4). [P, D], [q, D] -> [P]."""
    ids, _ = nearest_words(F.normalize(x_v.float()), F.normalize(word_features.float()), 1, 1, -2)
    return ids[:, 0]


@torch.no_grad()
def alignment_sums(model, dataset, device):
    """Sums over a LlavaDataset -> [TACS of all images, images, loss of all tokens, trained tokens].

    The loss is L_g (Eq. 12) before it is divided by the trained tokens. model: a SEAModel, or what
    DDP or FSDP made of one; the ranks share the samples.
    """
    sums = torch.zeros(4, dtype=torch.float64)
    # All ranks must join each forward pass: FSDP gathers weights in it, DDP sends buffers.
    for first in range(0, len(dataset), world_size()):
        own = first + rank()
        i = own % len(dataset)
        batch = to_device(collate([dataset[i]], pad_id=0), device)  # one sample: no padding
        del batch["attention_mask"]
        out = model(**batch, num_targets=1)  # divided by 1, loss_g stays a sum over tokens

        x_v = out["inputs"][batch["image_places"]]
        x_t = out["inputs"][batch["trained"][:-1]]  # a caption ends with a newline
        score = tacs(x_v, x_t) if len(x_v) and len(x_t) else 0.0
        if own == i:
            found = (float(score), len(x_v) > 0, float(out["loss_g"]), len(batch["trained"]))
            sums += torch.tensor(found)
    return all_sum(sums, device).tolist()


def to_device(batch, device):
    """The tensors of a batch, on the device."""
    return {name: x.to(device) for name, x in batch.items() if torch.is_tensor(x)}


# ------------------------------------------------------------------------------- what is measured


class Run(NamedTuple):
    """A path given as --model, and the training run it belongs to, if it belongs to one."""

    path: str
    folder: Path | None = None  # the run's --out_dir
    config: dict = {}  # its config.json
    step: int | None = None


def find_run(path):
    """The Run of an out_dir, its model/, a checkpoint, or any Llava model."""
    found = find_model(path).resolve()
    is_checkpoint = found.parent.name == "checkpoints"
    folder = found.parents[1] if is_checkpoint else found.parent
    is_of_run = (folder / "metrics.jsonl").is_file()
    if not is_of_run or not (is_checkpoint or found.name == "model"):
        return Run(path)
    config = read_object((folder / "config.json").read_bytes(), folder / "config.json")
    last_step = read_log(folder / "metrics.jsonl")[-1]["step"]
    return Run(path, folder, config, step_in(found.name) or last_step)


def for_checkpoints(command):
    """The command for --model RUN/checkpoints too: for all of them, in the order of their steps."""

    @functools.wraps(command)
    def measure(model, **flags):
        is_folder_of_all = Path(model).name == "checkpoints"
        found = checkpoints(Path(model).parent) if is_folder_of_all else {}
        if found and "out" in flags:
            raise UserError("--out holds the answers of one model: name a single checkpoint")
        for path in found.values() or [model]:
            result = command(str(path), **flags)
        return result

    return measure


def open_model(run):
    """The SEAModel of a Run."""
    device = rank_device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return load_model(run.path, dtype).to(device)


def save_result(run, result):
    """Print a result and append it, with the step, to the run's eval.jsonl, if there is a run."""
    print(json.dumps(result))
    if run.folder:
        append_json_line(run.folder / "eval.jsonl", {"step": run.step} | result)
    return result


def find_captions(run, data, image_folder):
    """-> data and image_folder, by default the run's held-out captions, else its training data."""
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
    model = open_model(run)
    return model, LlavaDataset(
        first_samples, image_folder, model.preprocess, model.tokenizer, model.image_tokens
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
    return torch.cat([model.word_features(ids) for ids in parts])


# ------------------------------------------------------------------------------ commands: alignment


@for_checkpoints
def eval_tacs(model: str, data: str = "", image_folder: str = "", samples: int = 100):
    """Mean TACS and caption loss of image-caption pairs: the first `samples` of `data`."""
    run = find_run(model)
    sea, captions = open_captions(run, data, image_folder, samples)
    score, pairs, loss, tokens = alignment_sums(sea, captions, sea.device)
    return save_result(run, dict(tacs=score / pairs, caption_loss=loss / tokens, pairs=int(pairs)))


@for_checkpoints
def eval_gap(
    model: str, words: str = "", data: str = "", image_folder: str = "", samples: int = 100
):
    """D of Eq. 5, the norms it depends on (of visual tokens and words), and D of unit vectors."""
    run = find_run(model)
    sea, captions = open_captions(run, data, image_folder, samples)
    x_v = encode_images(sea, captions)
    features = encode_words(sea, find_words(run, words))

    result = dict(
        D=modality_gap(x_v, features),
        visual_norm=x_v.norm(dim=1).mean(),
        word_norm=features.norm(dim=1).mean(),
        D_of_unit_vectors=modality_gap(F.normalize(x_v), F.normalize(features)),
    )
    return save_result(run, {name: value.item() for name, value in result.items()})


def eval_words(
    model: str,
    baseline: str = "",
    words: str = "",
    truth: str = "",
    data: str = "",
    image_folder: str = "",
    samples: int = 100,
    images: int = 20,
    out: str = "words.html",
):
    """Nearest word of every visual token, as in Figure 1a: the shares of the most frequent words.

    words, data and image_folder are by default those of --model, for the baseline too. truth: a
    truth.json, for the share of true words. out: a web page with the first `images` images, and the
    ten nearest words of each visual token, baseline and model side by side.
    """
    runs = [find_run(path) for path in (baseline, model) if path]
    word_list = find_words(runs[-1], words)
    data, image_folder = find_captions(runs[-1], data, image_folder)
    labels_of_runs = {}
    for run in runs:
        sea, captions = open_captions(run, data, image_folder, samples)
        files = [sample["image"] for sample in captions.samples]
        x_v = F.normalize(encode_images(sea, captions))
        ids, scores = nearest_words(x_v, F.normalize(encode_words(sea, word_list)), 10, 1, -2)
        shape = (len(files), -1, 10)
        labels_of_runs[run.path] = with_words(files, word_list, ids.view(shape), scores.view(shape))

        counts = collections.Counter(ids[:, 0].tolist()).most_common(8)
        result = {"words": {word_list[i]: round(n / len(ids), 3) for i, n in counts}}
        if truth:
            result["true"] = true_share(truth, labels_of_runs[run.path])
        print(run.path)
        save_result(run, result)

    panels_of = collections.defaultdict(dict)
    for path, labels_of in labels_of_runs.items():
        for file in files[:images]:
            panels_of[file][path] = labels_of[file]
    seen = sea.preprocess  # by --model
    draw_words(panels_of, image_folder, seen["size"], seen["mode"], sea.grid, out)
    return result


# ---------------------------------------------------------------------------------------- answers

# What LLaVA-1.5 appends to a question, and to one with lettered choices
SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."


@torch.no_grad()
def answer(model, samples, image_folder, batch_size=16, max_new_tokens=16, workers=0):
    """Greedy answers (strings) to samples: LLaVA's dicts whose last turn is a human's."""
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
    pad_left = functools.partial(collate, pad_id=tokenizer.pad_token_id, side="left")
    loader = DataLoader(dataset, batch_size, collate_fn=pad_left, num_workers=workers)

    answers = []
    for batch in tqdm(loader, "answering", disable=len(samples) == 1):
        batch = to_device(batch, model.device)
        ids = model.generate(batch, max_new_tokens=max_new_tokens)
        answers += tokenizer.batch_decode(ids, skip_special_tokens=True)
    return [text.strip() for text in answers]


def question_sample(text, image):
    """A sample for `answer`. image: a path below the image folder, or None."""
    return {"image": image, "conversations": [{"from": "human", "value": text}]}


def says_yes(text):
    """An answer as POPE and LLaVA read it: no if its first sentence has "no" or "not", else yes."""
    first_sentence = text.lower().split(".")[0].replace(",", "")
    return {"no", "not"}.isdisjoint(first_sentence.split())


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


# What VQA's evaluation writes as digits
NUMBERS = "zero one two three four five six seven eight nine ten"


def normalize(text):
    """An answer without what does not count, as in VQA's own evaluation: upper case, punctuation,
    articles, spaces, and whether a number is a word. But signs of numbers count.

    What would be empty then, such as "A" or "+", stays as it is.
    """
    text = text.lower().strip()
    joined = re.sub(r"'|(?<=\d),(?=\d)", "", text)  # don't, 1,000
    words = re.sub(r"[^\w\s.+-]|[.+-](?!\d)", " ", joined).split()
    numbers = NUMBERS.split()
    digits = [str(numbers.index(word)) if word in numbers else word for word in words]
    return " ".join(word for word in digits if word not in ("a", "an", "the")) or text


def chosen(text, choices):
    """The index of the choice that an answer names, by its text or else by its letter, or None.

    An answer with the letter may be "B", "(B)" or "B. a cat".
    """
    texts = [normalize(str(choice)) for choice in choices]
    if normalize(text) in texts:
        return texts.index(normalize(text))
    letters = string.ascii_uppercase[: len(choices)]
    letter = re.match(rf"\(?([{letters}])([).:]|$)", text.strip())
    return letters.index(letter[1]) if letter else None


# -------------------------------------------------------------------------------- commands: answers


@for_checkpoints
def eval_pope(
    model: str,
    data: str,
    image_folder: str,
    batch_size: int = 16,
    workers: int = 4,
    prompt: str = SHORT,
):
    """POPE: does the model see objects that are not there?

    data: one of its files, such as coco_pope_random.json (each line a JSON object with image, text
    and label), or a folder of them. LLaVA and the paper report the mean F1 over the files.
    """
    files = sorted(Path(data).glob("*.json*")) or [Path(data)]
    rows_of = {file.stem: read_pope(file) for file in files}  # all checked before any is asked
    run = find_run(model)
    sea = open_model(run)
    result = {}
    for name, rows in rows_of.items():
        asked = [question_sample(f"{row['text']}\n{prompt}".strip(), row["image"]) for row in rows]
        answers = answer(sea, asked, image_folder, batch_size, workers=workers)
        said_yes = [says_yes(text) for text in answers]
        result[name] = pope_metrics(said_yes, [row["label"] == "yes" for row in rows])

    mean = {}
    for metric in result[name]:  # every file has the same metrics
        mean[metric] = np.mean([metrics[metric] for metrics in result.values()])
    return save_result(run, {"pope": mean | result})


def read_pope(file):
    """The questions of a POPE file: dicts of image, text and label."""
    if not file.is_file():
        raise UserError(
            f"{file}: no file of POPE, such as coco_pope_random.json, and no folder of them"
        )
    rows = read_json_lines(file, ["image", "text", "label"])
    for number, row in enumerate(rows, 1):
        has_texts = isinstance(row["text"], str) and isinstance(image_of(row), str)
        if not has_texts or row["label"] not in ("yes", "no"):
            raise UserError(
                f'{file}, line {number}: not a question of POPE, which has "image", "text" and '
                '"label", yes or no'
            )
    return rows


@for_checkpoints
def eval_vqa(
    model: str,
    data: str,
    image_folder: str = "",
    batch_size: int = 16,
    workers: int = 4,
    prompt: str = SHORT,
    max_new_tokens: int = 16,
    out: str = "",
):
    """Exact match: the share of questions that get the answer written in the data.

    data: samples in LLaVA's format; the first question of each is asked. Its answer is one of the
    "choices" if the sample has that list, and these are shown with letters. A file without images
    measures language alone. out: a .jsonl file of the questions with their answers.
    """
    questions = [vqa_question(sample, prompt) for sample in load_samples(data, captions=False)]
    run = find_run(model)
    sea = open_model(run)
    answers = answer(sea, questions, image_folder, batch_size, max_new_tokens, workers)

    scores = collections.defaultdict(list)
    for question, text in zip(questions, answers):
        true = question["true"]
        if choices := question.get("choices"):
            kind = "choice"
            right = chosen(text, choices) == chosen(true, choices)
        else:
            kind = "yes/no" if normalize(true) in ("yes", "no") else "open"
            right = normalize(text) == normalize(true)
        question.update(answer=text, right=right)
        for group in (kind, "all"):
            scores[group].append(right)
    if out:
        write_file(Path(out), "".join(json.dumps(question) + "\n" for question in questions))
    shares = {kind: np.mean(rights) for kind, rights in scores.items()}
    return save_result(run, {Path(data).stem: shares})


def vqa_question(sample, prompt):
    """A sample that ends with its first question, to which its choices and the prompt are added.

    It gets two keys: "question", this text, and "true", the answer in the data.
    """
    turns = sample["conversations"]
    first = next(i for i, turn in enumerate(turns) if turn["from"] == "human")
    question = turns[first]["value"].replace(IMAGE_TOKEN, "").strip()
    true = turns[first + 1]["value"]
    if choices := sample.get("choices"):
        where = f"--data, sample {sample.get('id')}"
        if not isinstance(choices, list) or chosen(true, choices) is None:
            raise UserError(f"{where}: the answer {true!r} is none of its choices {choices!r}")
        letters = string.ascii_uppercase[: len(choices)]
        if [chosen(letter, choices) for letter in letters] != list(range(len(choices))):
            raise UserError(f"{where}: a letter must not be the text of another choice: {choices}")
        for letter, choice in zip(letters, choices):
            question += f"\n{letter}. {choice}"
        prompt = LETTER if prompt == SHORT else prompt
    question = f"{question}\n{prompt}".strip()
    turns = [*turns[:first], {"from": "human", "value": question}]
    return sample | {"conversations": turns, "question": question, "true": true}


def chat(model: str, image: str = "", max_new_tokens: int = 512):
    """Ask about an image, or about nothing: one question a line, an empty line or Ctrl-D ends."""
    sea = open_model(find_run(model))
    turns = []
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while text := input("> ").replace(IMAGE_TOKEN, "").strip():
            turns.append({"from": "human", "value": text})
            sample = {"image": image, "conversations": turns}
            [reply] = answer(sea, [sample], ".", 1, max_new_tokens)
            print(reply)
            turns.append({"from": "gpt", "value": reply})
    return turns


# -------------------------------------------------------------------------------- commands: figures


def figures(
    model: str,
    baseline: str,
    out: str = "figures",
    data: str = "",
    image_folder: str = "",
    samples: int = 100,
):
    """Compare the baseline with SEA, by the results in the folders of their training runs.

    Prints all benchmarks measured for both, and the average of their relative gains (Table 2, where
    it is 7.61 % for Gemma-2B). Draws, of stage 1, tsne.png (Figure 2) and curves.png (Figure 5:
    TACS, and POPE if eval.py measured it for several checkpoints); of stage 2 curves.png (Figure
    3a: what eval.py or lm-evaluation-harness measured for several checkpoints).

    PAPER: how MMLU is asked for Figure 3a is not said; 5 examples before each question are usual.
    """
    histories = {}
    groups = {}
    for kind, path in (("baseline", baseline), ("SEA", model)):
        run = find_run(path)
        if not run.folder:
            raise UserError(f"{path}: not of a training run, whose metrics.jsonl can be drawn")
        histories[kind] = history(run.folder)
        if data or run.config["stage"] == "pretrain":
            groups[kind] = token_groups(run, data, image_folder, samples)
    draw_comparison(histories, groups, Path(out))


@torch.no_grad()
def token_groups(run, data="", image_folder="", samples=100):
    """The embeddings of Figure 2, each [N, D]: of images, of all tokens, of captions' tokens."""
    sea, captions = open_captions(run, data, image_folder, samples)
    texts = [sample["conversations"][1]["value"] for sample in captions.samples]
    caption_ids = sea.tokenizer(texts, add_special_tokens=False).input_ids
    text_ids = torch.tensor(sum(caption_ids, [])).unique()
    embeddings = sea.embed_tokens(torch.arange(sea.vocabulary_size, device=sea.device))
    return {
        "visual tokens": encode_images(sea, captions),
        "LLM's embeddings": embeddings,
        "text tokens": embeddings[text_ids],
    }


def main(argv=None):
    commands = {
        "tacs": eval_tacs,
        "gap": eval_gap,
        "words": eval_words,
        "pope": eval_pope,
        "vqa": eval_vqa,
        "chat": chat,
        "figures": figures,
    }
    return run_command(__doc__, commands, argv)


if __name__ == "__main__":
    cli(main)
