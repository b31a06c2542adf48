"""Speed and memory as ratios, each against a peer or a limit in the same run.

    python -m tools.speed step      a step of stage 1 against transformers' own Llava: its time and
                                    memory; 4 x (576 + 40) positions, on two CPU cores
    python -m tools.speed step --llm vicuna-7b --batch_size 16 --grad_checkpoint          on a GPU
    python -m tools.speed words     labels.nearest_words against the bare matrix product, and faiss
    python -m tools.speed packing   a step of stage 2 against one with padded sequences
    python -m tools.speed gpu       all of it, with Gemma-2B and Vicuna-7B, on one GPU of 80 GB
    python -m tools.speed gpu --tiny                      the same in miniature, to see that it runs

The models have the true shapes and random weights; nothing is downloaded. A step is train.py's own:
forward, backward, AdamW, and what is logged.
"""

import functools
import io
import json
import resource
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, CLIPVisionConfig, CLIPVisionModel

import train
from data import IGNORE, cli, collate, geometry, grouped_order, rank_device, run_command
from labels import nearest_words
from model import SEAModel, assemble
from tools.toy import make_tokenizer

SHAPES = {
    "tiny": dict(
        model_type="llama",
        vocab_size=1000,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
    ),
    "gemma-3-270m": dict(
        model_type="gemma3_text",
        vocab_size=262_144,
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=18,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
    ),
    "gemma-2b": dict(
        model_type="gemma",
        vocab_size=256_000,
        hidden_size=2048,
        intermediate_size=16384,
        num_hidden_layers=18,
        num_attention_heads=8,
        num_key_value_heads=1,
        head_dim=256,
    ),
    "vicuna-7b": dict(model_type="llama"),  # the defaults of LlamaConfig
}
CLIP_L = dict(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
)
WORDS = 20_000  # of the label store that is imitated
LLM = Literal["tiny", "gemma-3-270m", "gemma-2b", "vicuna-7b"]


def random_run(llm, tower_layers, cfg):
    """A train.Run of true shapes."""
    device = rank_device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    vision = CLIP_L | {"num_hidden_layers": tower_layers}
    if llm == "tiny":
        vision |= {"num_hidden_layers": 2, "hidden_size": 64}
    config = AutoConfig.for_model(**SHAPES[llm])
    with torch.device(device):
        tower = CLIPVisionModel(CLIPVisionConfig(**vision)).to(dtype)
        frozen = dtype if cfg.stage == "pretrain" else torch.float32
        causal_lm = AutoModelForCausalLM.from_config(config, dtype=frozen)
        tokenizer = make_tokenizer(["a red circle"])
        llava = assemble(tower, causal_lm, tokenizer, 336)
        preprocess = dict(size=336, mode="square", mean=(0.5,) * 3, std=(0.25,) * 3)
        model = SEAModel(llava, tokenizer, preprocess, {})
    if cfg.stage == "finetune":
        model.thaw_llm(False, dtype)
    model.log_scale.requires_grad_(cfg.sea_weight > 0)
    model.word_token_ids = [[i % 900, (7 * i + 3) % 900] for i in range(WORDS)]
    train.wrap_blocks(cfg, model)
    parallel_model = train.parallelize(cfg, model, dtype)
    optimizer = train.build_optimizer(cfg, model)
    return train.Run(cfg, device, dtype, model, parallel_model, optimizer, 1000)


def random_item(model, i, text_length, is_trained=1.0):
    """What LlavaDataset gives of a caption or, without labels, a chat."""
    rng = torch.Generator().manual_seed(i)
    m = model.image_tokens
    is_image = torch.arange(m + text_length) < m
    ids = torch.randint(10, 900, is_image.shape, generator=rng)
    ids[is_image] = model.llava.config.image_token_id
    trains = torch.rand(is_image.shape, generator=rng) < is_trained
    return {
        "index": i,
        "input_ids": ids,
        "is_image": is_image,
        "targets": ids.masked_fill(is_image | ~trains, IGNORE),
        "pixels": torch.randn(3, 336, 336, generator=rng),
        "label_ids": torch.randint(WORDS, (m, 10), generator=rng),
        "label_scores": torch.rand(m, 10, generator=rng),
    }


def make_steps(llm, tower_layers, stage, batch_size, text, grad_checkpoint, compile):
    """-> the run, and {name: a function that does a step and returns its loss_g}."""
    # with a rate of next to nothing all see the same weights and have the same loss
    flags = f"--stage {stage} --batch_size {batch_size} --llm x --lr 1e-15"
    flags += "" if grad_checkpoint else " --no-grad_checkpoint"
    run = random_run(llm, tower_layers, train.parse_config(flags.split() + ["--compile"] * compile))
    model = run.model
    share = 1.0 if stage == "pretrain" else 0.5
    items = [random_item(model, i, text, share) for i in range(batch_size)]
    batch = collate(items)
    baseline = {name: x for name, x in batch.items() if not name.startswith("label")}
    input_ids = torch.stack([item["input_ids"] for item in items])
    inputs = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "pixel_values": batch["pixels"].to(run.dtype),
        "labels": torch.stack([item["targets"] for item in items]),
    }
    inputs = {name: x.to(run.device) for name, x in inputs.items()}

    def llava():
        is_bfloat16 = run.dtype == torch.bfloat16
        with torch.autocast(run.device.type, torch.bfloat16, enabled=is_bfloat16):
            loss = model.llava(**inputs).loss
        loss.backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        return loss.item()

    def ours(batch):
        return train.train_step(run, [dict(batch)], 1)["loss_g"]

    def ours_uncompiled():
        with torch.compiler.set_stance("force_eager"):
            return ours(baseline)

    if compile:
        return run, {"compiled": lambda: ours(baseline), "not compiled": ours_uncompiled}
    steps = {"with SEA": lambda: ours(batch), "without SEA": lambda: ours(baseline)}
    if stage == "finetune":
        steps = {"ours": steps["without SEA"]}
    return run, steps | {"transformers' Llava": llava}


def peak_memory(step, device):
    """The most bytes that a step holds beyond those that are held before it."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    Path("/proc/self/clear_refs").write_text("5")  # Linux forgets the peak
    step()
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024 - before


def memory_of(name, *settings):
    """In a process of its own, as the CPU's allocator keeps what others have used."""
    run, steps = make_steps(*settings)
    return peak_memory(steps[name], run.device)


def loader_speed():
    """Images of COCO's size that one process reads, decodes and resizes in a second."""
    jpeg = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (15, 20, 3), np.uint8)
    Image.fromarray(noise).resize((640, 480), Image.Resampling.BICUBIC).save(jpeg, "JPEG")
    start = time.perf_counter()
    for _ in range(50):
        image = Image.open(io.BytesIO(jpeg.getvalue())).convert("RGB")
        geometry(image, 336, "square", (0.5,) * 3, (0.25,) * 3)
    return 50 / (time.perf_counter() - start)


def compare(functions, repeats):
    """Run functions in turn, once to warm up and `repeats` times -> {name: seconds of each run}.

    Prints each median time, and how much of it the first function takes: the median, and the least
    to greatest, of the ratios within a turn.
    """
    seconds = {name: [] for name in functions}
    names = list(functions)
    for turn in range(1 + repeats):
        names.append(names.pop(0))  # else one would always follow the one that needs most memory
        for name in names:
            start = time.perf_counter()
            functions[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn > 0:
                seconds[name].append(time.perf_counter() - start)
    first = next(iter(seconds))
    for name, values in seconds.items():
        ratios = sorted(a / b for a, b in zip(seconds[first], values))
        print(
            f"{name:24}{statistics.median(values):9.3f} s   {first} takes "
            f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) of it"
        )
    return seconds


def time_search(patches: int = 4096, words: int = 400_000, dim: int = 768, repeats: int = 5):
    """Time nearest_words on random unit vectors against the bare products of the same shapes.

    patches: how many
    words: how many
    dim: numbers of each vector
    """
    device = rank_device()
    patch_embeds = F.normalize(torch.randn(patches, dim, device=device), dim=-1)
    word_embeds = F.normalize(torch.randn(words, dim, device=device), dim=-1)
    bf16_patches = patch_embeds.bfloat16()
    bf16_words = word_embeds.bfloat16()
    print(f"{patches:,} patches, {words:,} words, {dim} numbers each, {device}")
    searches = {
        "nearest_words": lambda: nearest_words(patch_embeds, word_embeds, 10, sign=1),
        "product in float32": lambda: multiply(patch_embeds, word_embeds),
        "product in bfloat16": lambda: multiply(bf16_patches, bf16_words),
    }
    try:
        import faiss
    except ModuleNotFoundError:
        print("faiss is not installed: it is left out")
    else:  # on the CPU, whatever the device
        index = faiss.IndexFlatIP(dim)
        index.add(word_embeds.cpu().numpy())
        queries = patch_embeds.cpu().numpy()
        searches["faiss, exact, CPU"] = lambda: index.search(queries, 10)
    return compare(searches, repeats)


def multiply(patch_embeds, word_embeds):
    """All products of the rows of both, block by block: together they might not fit in memory."""
    for rows in word_embeds.split(8192):
        patch_embeds @ rows.T


def time_steps(
    llm: LLM = "gemma-3-270m",
    stage: Literal["pretrain", "finetune"] = "pretrain",
    batch_size: int = 4,
    text: int = 40,
    repeats: int = 3,
    grad_checkpoint: bool = False,
    compile: bool = False,
    tower_layers: int = 24,
):
    """Time a step against transformers' Llava of the same weights on the same batch.

    Memory is the peak over what a step finds: weights and optimizer.

    llm: its shape
    stage: pretrain or finetune
    batch_size: samples of a micro-batch
    text: positions of a text
    grad_checkpoint: as in train.py
    compile: a step with --compile against one without, in place of Llava's
    tower_layers: CLIP-L has 24; with fewer of them, what both do alike hides less of the rest
    """
    settings = (llm, tower_layers, stage, batch_size, text, grad_checkpoint, compile)
    run, steps = make_steps(*settings)
    positions = batch_size * (run.model.image_tokens + text)
    print(f"\n{stage}, {llm}, {positions:,} positions, {run.device}, {run.dtype}")
    print(f"{len(run.model.blocks()[0])} layers in the tower, ", end="")
    print(f"checkpoint {grad_checkpoint}, compile {compile}", flush=True)
    peaks = {}
    losses = {}
    flops = {}
    for name, step in steps.items():
        if run.device.type == "cuda":
            step()  # AdamW has its moments from the first step on
            peaks[name] = peak_memory(step, run.device)
        else:
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                peaks[name] = pool.submit(memory_of, name, *settings).result()
        with FlopCounterMode(display=False) as counter:
            losses[name] = step()
        flops[name] = counter.get_total_flops()
    seconds = compare(steps, repeats)
    table = {}
    for name in steps:
        time_of_one = statistics.median(seconds[name])
        table[name] = dict(
            seconds=time_of_one,
            tokens_per_s=positions / time_of_one,
            tflops=flops[name] / time_of_one / 1e12,
            peak_mib=peaks[name] / 2**20,
            loss=losses[name],
        )
        print(f"{name:24}" + "".join(f"  {key} {value:,.3f}" for key, value in table[name].items()))
    images = loader_speed()
    fed = batch_size / next(iter(table.values()))["seconds"]
    print(f"one worker prepares {images:.0f} images a second; this step takes {fed:.1f} a second")
    return table | {
        "settings": settings,
        "images_per_s_and_worker": images,
        "step_images_per_s": fed,
    }


def mix_lengths(samples):
    """Lengths like those of LLaVA's mix for stage 2 -> has_image, words, positions: [samples] each.

    94 % have an image; texts are log-normal, cut at 2,048 positions.
    """
    rng = np.random.default_rng(0)
    has_image = rng.random(samples) < 0.94
    words = rng.lognormal(5.0, 0.8, samples).clip(5, 1400).astype(int)
    positions = np.minimum(2048, (1.35 * words).astype(int) + 40 + 576 * has_image)
    return has_image, words, positions


def time_packing(llm: LLM = "gemma-3-270m", batch_size: int = 4, ranks: int = 8, repeats: int = 3):
    """Time a step of stage 2 as it is against one whose sequences are padded to the longest.

    Micro-batches are the first of stage 2's order, of lengths like LLaVA's mix.

    llm: its shape
    batch_size: samples of a micro-batch
    ranks: whose order it is
    """
    has_image, words, positions = mix_lengths(200_000)
    order = grouped_order(np.where(has_image, words, -words), batch_size, ranks, 0, 0)
    rows = order[: len(order) // batch_size * batch_size].reshape(-1, batch_size)
    share = positions[rows].sum() / (positions[rows].max(1) * batch_size).sum()
    print(f"\npadding would be {1 - share:.1%} of the positions of a whole epoch")

    cfg = train.parse_config(f"--stage finetune --batch_size {batch_size} --llm x".split())
    run = random_run(llm, tower_layers=2, cfg=cfg)
    batches = {"packed": [], "padded": []}
    with_image = [row for row in rows if has_image[row].all()]
    for row in with_image[: repeats + 1]:
        items = [random_item(run.model, int(i), int(positions[i]) - 576, 0.5) for i in row]
        for item in items:  # stage 2 has no labels
            del item["label_ids"], item["label_scores"]
        batches["packed"].append(collate(items))
        batches["padded"].append(collate(pad(items)))
    print(f"{llm}, {[batch['lengths'] for batch in batches['packed']]}, {run.device}", flush=True)

    def step_with(queue):
        return train.train_step(run, [dict(queue.pop(0))], 1)["loss_g"]

    steps = {name: functools.partial(step_with, queue) for name, queue in batches.items()}
    return {"useful": share} | compare(steps, repeats)


def pad(items):
    """Items of LlavaDataset, as long as the longest of them."""
    longest = max(len(item["input_ids"]) for item in items)
    padded = []
    for item in items:
        more = longest - len(item["input_ids"])
        fills = {"input_ids": 0, "is_image": False, "targets": IGNORE}
        longer = {key: F.pad(item[key], (0, more), value=value) for key, value in fills.items()}
        padded.append(item | longer)
    return padded


def gpu(out: str = "gpu.json", tiny: bool = False):
    """The tests marked gpu, the search, packing, steps of two LLMs; writes a JSON file.

    out: that file
    tiny: at shapes for a CPU, to try the command itself
    """
    tests = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests"]
    results = {"device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"}
    results["tests"] = subprocess.run(tests).returncode
    for words in (400, 4000) if tiny else (40_000, 4_000_000):
        patches = 64 if tiny else 32 * 576
        results[f"{words} words"] = time_search(patches, words, repeats=3)
    results["packing"] = time_packing(
        "tiny" if tiny else "gemma-2b", 2 if tiny else 16, repeats=1 if tiny else 3
    )
    llms = ["tiny"] if tiny else ["gemma-2b", "vicuna-7b"]
    size = dict(batch_size=2, repeats=1) if tiny else dict(batch_size=16, repeats=5)
    runs = [(llm, "pretrain", more, 64) for llm in llms for more in ({}, {"grad_checkpoint": True})]
    runs += [(llms[0], "finetune", {"grad_checkpoint": True}, 448)]
    runs += [(llms[0], "pretrain", {"compile": True}, 64)]
    for llm, stage, more, text in runs:
        try:
            result = time_steps(llm, stage, text=text, **size, **more)
        except torch.OutOfMemoryError as e:
            result = str(e)
            print(f"{llm}, {stage}, {more}: {e}")
        results[f"{stage} {llm} {more}"] = result
        Path(out).write_text(json.dumps(results, indent=1))
    print(f"wrote {out}")
    return results


def main(argv=None):
    commands = {"step": time_steps, "words": time_search, "packing": time_packing, "gpu": gpu}
    return run_command(__doc__, commands, argv)


if __name__ == "__main__":
    cli(main)
