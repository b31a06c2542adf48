"""Before a run: read all samples and images once, list what is bad, write the rest to a new file.

    python -m tools.check_data good.jsonl --stage pretrain
    python -m tools.check_data good.jsonl --stage finetune --data data/llava_v1_5_mix665k.json

All further flags are train.py's. What is wrong is listed in good.jsonl.txt, a sample a line. Of the
models only config, tokenizer and preprocessor files are read, as by tools.plan.
"""

import dataclasses
import functools
import json
import os
import sys
from pathlib import Path

from torch.utils.data import DataLoader
from tqdm import tqdm

from data import (
    LlavaDataset,
    UserError,
    check_sample,
    cli,
    find_data,
    image_of,
    parse_json,
    read_list,
)
from labels import write_file
from tools.plan import shapes_of_run


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return
    if not argv or argv[0].startswith("-") or not argv[0].endswith(".jsonl"):
        raise UserError("usage: python -m tools.check_data NEW.jsonl [flags of train.py]")
    out = Path(argv[0])
    if out.exists():
        raise UserError(f"{out}: exists already; give the name of a new file")
    # train.py refuses flags that need torchrun without it; here they change nothing.
    os.environ.update(RANK="0", WORLD_SIZE="2")
    cfg, model, _ = shapes_of_run(argv[1:])
    check_data(out, cfg, model)


def check_data(out, cfg, model):
    """Read all samples and images of --data; write those that can be trained on to the file `out`.

    UserError if there are others; each has a line in a file of that name and .txt.
    """
    file = find_data(cfg.data)
    is_lines = file.suffix.lower() == ".jsonl"
    rows = enumerate(file.read_bytes().split(b"\n") if is_lines else read_list(file), 1)
    numbered = [(i, row) for i, row in rows if not is_lines or row.strip()]
    if not numbered:
        raise UserError(f"{file}: expected at least one sample")
    dataset = LlavaDataset(
        [],
        cfg.image_folder,
        model.preprocess,
        model.tokenizer,
        model.image_tokens,
        max_length=10**9,
        text="caption" if cfg.stage == "pretrain" else "chat",
    )
    check = functools.partial(check_row, cfg, dataset)
    loader = DataLoader(numbered, batch_size=None, num_workers=cfg.workers, collate_fn=check)
    bad = []
    lengths = []
    images = 0
    part = Path(f"{out}.part")
    with open(part, "w") as good:
        for result, length in tqdm(loader, "checking"):
            lengths.append(length)
            if length:
                images += image_of(result) is not None
                good.write(json.dumps(result) + "\n")
            else:
                bad.append(result)
    part.replace(out)

    cut = sum(length > cfg.max_length for length in lengths)
    print(
        f"{len(lengths) - len(bad):,} good samples in {out}, {images:,} with an image; the longest "
        f"has {max(lengths):,} positions; --max_length {cfg.max_length} cuts {cut:,}"
    )
    if bad:
        report = Path(f"{out}.txt")
        write_file(report, "\n".join(bad) + "\n")
        raise UserError(f"{len(bad):,} bad samples, all in {report}; the first: {bad[0]}")


def check_row(cfg, dataset, numbered_row):
    """-> a sample and its positions, image included, or what is wrong with it and 0."""
    number, sample = numbered_row
    where = f"{cfg.data}, sample {number}"
    try:
        if isinstance(sample, bytes):  # a line of a .jsonl
            where = f"{cfg.data}, line {number}"
            sample = parse_json(sample, cfg.data, number)
        check_sample(sample, cfg.stage == "pretrain", where)
        return sample, len(dataclasses.replace(dataset, samples=[sample])[0]["input_ids"])
    except UserError as e:
        problem = " ".join(str(e).split())
        # An image's problem names its file alone, which many samples may share.
        return problem if problem.startswith(where) else f"{where}: {problem}", 0


if __name__ == "__main__":
    cli(main)
