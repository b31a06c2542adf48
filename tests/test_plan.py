"""The plan against published sizes, sums by hand, and real steps on the CPU."""

import contextlib
import json
import os
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from conftest import tiny_tokenizer
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import model
import train
from adapter import Adapter
from data import UserError
from model import adapter_state, save_adapter
from tools import plan

LLAMA = dict(
    model_type="llama",
    architectures=["LlamaForCausalLM"],
    hidden_act="silu",
    rms_norm_eps=1e-5,
    bos_token_id=1,
    eos_token_id=2,
    tie_word_embeddings=False,
)
LLMS = {
    "vicuna-7b": LLAMA
    | dict(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        vocab_size=32000,
        max_position_embeddings=4096,
        pad_token_id=0,
    ),
    "vicuna-13b": LLAMA
    | dict(
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=40,
        num_attention_heads=40,
        num_key_value_heads=40,
        vocab_size=32000,
        max_position_embeddings=4096,
        pad_token_id=0,
    ),
    "llama-3-8b": LLAMA
    | dict(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=8192,
        rope_theta=500000.0,
        bos_token_id=128000,
        eos_token_id=128009,
    ),
    "gemma-2b": dict(
        model_type="gemma",
        architectures=["GemmaForCausalLM"],
        hidden_act="gelu",
        hidden_activation="gelu_pytorch_tanh",
        hidden_size=2048,
        intermediate_size=16384,
        num_hidden_layers=18,
        num_attention_heads=8,
        num_key_value_heads=1,
        head_dim=256,
        vocab_size=256000,
        max_position_embeddings=8192,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=0,
    ),
    "phi-3-mini": dict(
        model_type="phi3",
        architectures=["Phi3ForCausalLM"],
        hidden_act="silu",
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        vocab_size=32064,
        max_position_embeddings=4096,
        original_max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        sliding_window=2047,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=32000,
        pad_token_id=32000,
    ),
    "qwen3-0.6b": dict(
        model_type="qwen3",
        architectures=["Qwen3ForCausalLM"],
        hidden_act="silu",
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        max_position_embeddings=40960,
        rms_norm_eps=1e-6,
        rope_theta=1000000,
        tie_word_embeddings=True,
        bos_token_id=151643,
        eos_token_id=151645,
    ),
}
CLIP_STATS = dict(
    image_mean=[0.48145466, 0.4578275, 0.40821073], image_std=[0.26862954, 0.26130258, 0.27577711]
)
# config.json, preprocessor_config.json
TOWERS = {
    "clip-l-336": (
        dict(
            model_type="clip",
            architectures=["CLIPModel"],
            projection_dim=768,
            text_config=dict(
                model_type="clip_text_model",
                hidden_size=768,
                intermediate_size=3072,
                num_attention_heads=12,
                num_hidden_layers=12,
                projection_dim=768,
            ),
            vision_config=dict(
                model_type="clip_vision_model",
                hidden_size=1024,
                intermediate_size=4096,
                num_attention_heads=16,
                num_hidden_layers=24,
                image_size=336,
                patch_size=14,
                projection_dim=768,
            ),
        ),
        dict(
            image_processor_type="CLIPImageProcessor",
            feature_extractor_type="CLIPFeatureExtractor",
            size=336,
            crop_size=336,
            do_resize=True,
            do_center_crop=True,
            do_normalize=True,
            resample=3,
            **CLIP_STATS,
        ),
    ),
    "siglip-384": (
        dict(
            model_type="siglip",
            architectures=["SiglipModel"],
            text_config=dict(
                model_type="siglip_text_model",
                hidden_size=1152,
                intermediate_size=4304,
                num_attention_heads=16,
                num_hidden_layers=27,
            ),
            vision_config=dict(
                model_type="siglip_vision_model",
                hidden_size=1152,
                intermediate_size=4304,
                num_attention_heads=16,
                num_hidden_layers=27,
                image_size=384,
                patch_size=14,
            ),
        ),
        dict(
            image_processor_type="SiglipImageProcessor",
            processor_class="SiglipProcessor",
            do_resize=True,
            do_rescale=True,
            do_normalize=True,
            rescale_factor=1 / 255,
            resample=3,
            size=dict(height=384, width=384),
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        ),
    ),
    "dinov2-224": (
        dict(
            model_type="dinov2",
            architectures=["Dinov2Model"],
            hidden_size=1024,
            num_hidden_layers=24,
            num_attention_heads=16,
            mlp_ratio=4,
            image_size=518,
            patch_size=14,
            hidden_act="gelu",
            qkv_bias=True,
            layerscale_value=1.0,
            use_swiglu_ffn=False,
        ),
        dict(
            image_processor_type="BitImageProcessor",
            do_resize=True,
            do_center_crop=True,
            do_convert_rgb=True,
            do_rescale=True,
            do_normalize=True,
            rescale_factor=1 / 255,
            resample=3,
            size=dict(shortest_edge=256),
            crop_size=dict(height=224, width=224),
            image_mean=[0.485, 0.456, 0.406],
            image_std=[0.229, 0.224, 0.225],
        ),
    ),
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Folders as the hub has them, less the weights: true config.json files, any tokenizer."""
    root = tmp_path_factory.mktemp("hub")
    tokenizer = tiny_tokenizer(["a red door", "a blue wall"])
    for name, config in LLMS.items():
        tokenizer.save_pretrained(root / name)
        (root / name / "config.json").write_text(json.dumps(config))
    for name, (config, processor) in TOWERS.items():
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps(config))
        (root / name / "preprocessor_config.json").write_text(json.dumps(processor))
    return root


@pytest.fixture(autouse=True)
def short_names(hub, monkeypatch, tmp_path):
    """The short names mean those folders, and the working folder is an empty one."""
    monkeypatch.setattr(model, "LLMS", {name: str(hub / name) for name in LLMS})
    monkeypatch.setattr(model, "VISION", {name: str(hub / name) for name in TOWERS})
    monkeypatch.chdir(tmp_path)


def planned(gpus, flags="", dry_run=None):
    """What the plan returns. dry_run: stands in for the real one where counts are asked alone."""
    with patch.dict(os.environ), contextlib.ExitStack() as stack:  # it sets torchrun's variables
        if dry_run:
            stack.enter_context(patch.object(plan, "dry_run", dry_run))
        return plan.main([str(gpus), *flags.split()])


def counted(gpus, flags=""):
    return planned(gpus, flags, lambda *_: ({}, 0))


# Published: the safetensors index of each model on the hub.
LLM_SIZES = {
    "vicuna-7b": 6_738_415_616,
    "vicuna-13b": 13_015_864_320,
    "gemma-2b": 2_506_172_416,
    "phi-3-mini": 3_821_079_552,
    "llama-3-8b": 8_030_261_248,
    "qwen3-0.6b": 596_049_920,
}
# From the papers' shapes: a block has 4 d (d + 1) for attention, 2 d i + i + d for the MLP, 4 d for
# two norms, and DINOv2 2 d for two layer scales.
CLIP_BLOCK = 4 * 1024 * 1025 + 2 * 1024 * 4096 + 4096 + 1024 + 4 * 1024
SIGLIP_MLP = 2 * 1152 * 4304 + 4304 + 1152
SIGLIP_BLOCK = 4 * 1152 * 1153 + SIGLIP_MLP + 4 * 1152
# class token, patches without bias, positions
CLIP_EMBED = 1024 + 1024 * 3 * 14 * 14 + (24 * 24 + 1) * 1024
SIGLIP_EMBED = 1152 * 3 * 14 * 14 + 1152 + 27 * 27 * 1152
SIGLIP_POOLING = 1152 + 4 * 1152 * 1153 + 2 * 1152 + SIGLIP_MLP  # query, attention, norm, MLP
TOWER_SIZES = {
    "clip-l-336": CLIP_EMBED + 24 * CLIP_BLOCK + 4 * 1024,  # a norm before the blocks, one after
    "siglip-384": SIGLIP_EMBED + 27 * SIGLIP_BLOCK + 2 * 1152 + SIGLIP_POOLING,  # a norm after them
    "dinov2-224": 304_368_640,  # published; positions of 37 x 37 patches, whatever the crop
}
WIDTHS = {
    "vicuna-7b": 4096,
    "vicuna-13b": 5120,
    "gemma-2b": 2048,
    "phi-3-mini": 3072,
    "llama-3-8b": 4096,
    "qwen3-0.6b": 1024,
    "clip-l-336": 1024,
    "siglip-384": 1152,
    "dinov2-224": 1024,
}
PATCHES = {"clip-l-336": 24 * 24, "siglip-384": 27 * 27, "dinov2-224": 16 * 16}


def test_tower_sizes_by_hand_are_the_published_ones():
    assert TOWER_SIZES["clip-l-336"] == 303_507_456 and TOWER_SIZES["siglip-384"] == 428_225_600


@pytest.mark.parametrize(
    "llm, vision",
    [
        ("vicuna-7b", "dinov2-224"),
        *((llm, vision) for vision in ("clip-l-336", "siglip-384") for llm in LLM_SIZES),
    ],
)
def test_sizes_and_steps_of_every_pair_of_parts(llm, vision):
    d, D = WIDTHS[vision], WIDTHS[llm]
    adapter = d * D + D + D * D + D
    for stage, steps, warmup, batch in (("pretrain", 2181, 66, 256), ("finetune", 5198, 156, 128)):
        costs = counted(8, f"--stage {stage} --llm {llm} --vision {vision}")
        tuned = stage == "finetune"
        assert costs["params"]["all"] == {
            "vision": TOWER_SIZES[vision],
            "adapter": adapter,
            "llm": LLM_SIZES[llm],
            "total": TOWER_SIZES[vision] + adapter + LLM_SIZES[llm] + 1,  # 1: the temperature
        }
        assert costs["params"]["trained"] == {
            "vision": 0,
            "adapter": adapter,
            "llm": LLM_SIZES[llm] * tuned,
            "total": adapter + (LLM_SIZES[llm] if tuned else 1),
        }
        assert costs["steps"] == {
            "samples": 665_298 if tuned else 558_128,
            "samples a step": batch,
            "steps": steps,
            "warmup steps": warmup,
            "image tokens a step": batch * PATCHES[vision],
            "positions a step, at most": batch * 2048,
        }


def test_the_papers_run_as_printed(capsys):
    costs = counted(8)
    out = capsys.readouterr().out
    assert costs["params"]["all"]["total"] == 7_062_902_784 + 1  # the temperature
    assert costs["params"]["trained"]["total"] == 20_979_712 + 1
    assert " 7,062,902,785 " in out and " 20,979,713\n" in out
    assert "is not here; it has about 558,128 samples" in out
    labels = 558_128 * 576 * 10  # 19.29 GB at 6 bytes each, an int32 and a float16
    assert costs["disk"]["labels"] == labels * 6 and "19.29" in out
    costs = counted(8, "--sea_weight 0")
    assert "labels" not in costs["disk"]
    assert costs["params"]["trained"]["total"] == 20_979_712


@pytest.mark.parametrize("flags", ["--llm vicuna-13b", "--stage finetune --preset prime"])
def test_nothing_is_loaded_or_written(flags, tmp_path, hub):
    """There are no weights to load."""
    before = {p: p.stat().st_mtime_ns for p in hub.rglob("*")}
    counted(8, flags)
    _, built, _ = plan.shapes_of_run(flags.split())
    assert {t.device.type for t in [*built.parameters(), *built.buffers()]} == {"meta"}
    assert not list(tmp_path.iterdir())
    assert before == {p: p.stat().st_mtime_ns for p in hub.rglob("*")}


def test_memory_of_a_node_and_disk_by_hand():
    llm, vision, adapter = LLM_SIZES["vicuna-7b"], TOWER_SIZES["clip-l-336"], 20_979_712
    loading = 2 * (llm + vision) + 4 * (adapter + 1)  # the temperature
    assert counted(1)["cpu"] == {"while loading": loading}
    assert counted(8)["cpu"] == {"while loading": 8 * loading}
    costs = counted(16, "--stage finetune --fsdp")
    total = llm + vision + adapter + 1
    tuned = llm + adapter
    assert costs["cpu"] == {"while loading": 8 * 4 * total}  # 8 GPUs a node, all in fp32
    assert costs["disk"] == {
        "a checkpoint": 12 * tuned + 2 * total,
        "checkpoints, at most": 2 * (12 * tuned + 2 * total),  # the last is written, then one goes
        "model": 2 * total,
    }


def test_checkpoints_and_models_on_disk():
    adapter, total = 20_979_712 + 1, 7_062_902_784 + 1  # with the temperature
    checkpoint = 16 * adapter  # weight, two moments, adapter again
    disk = counted(8)["disk"]  # of 2181 steps every 100th and the last, all kept
    assert disk["a checkpoint"] == checkpoint and disk["checkpoints, at most"] == 22 * checkpoint
    assert disk["model"] == 4 * adapter
    disk = counted(8, "--keep 3 --export")["disk"]
    assert disk["model"] == 4 * adapter + 2 * total
    assert disk["checkpoints, at most"] == 4 * checkpoint
    for flags, saved in (
        ("0", 0),
        ("500 --max_steps 499", 1),
        ("500 --max_steps 500", 1),
        ("500 --max_steps 501 --keep 3", 2),
    ):
        disk = counted(8, f"--save_every {flags}")["disk"]
        assert disk["checkpoints, at most"] == saved * checkpoint


def test_a_tuned_tower_trains_all_but_its_last_block():
    def trained_vision(flags):
        costs = counted(8, f"--stage finetune {flags}")
        return costs["params"]["trained"]["vision"]

    assert trained_vision("--tune_vision") == CLIP_EMBED + 2 * 1024 + 23 * CLIP_BLOCK
    assert trained_vision("--preset prime") == SIGLIP_EMBED + 26 * SIGLIP_BLOCK
    block = CLIP_BLOCK + 2 * 1024
    # not the mask token, the last block, the last norm
    used = TOWER_SIZES["dinov2-224"] - 1024 - block - 2 * 1024
    assert trained_vision("--tune_vision --vision dinov2-224 --llm qwen3-0.6b") == used


def test_the_plan_of_sea_prime(capsys):
    costs = counted(8, "--stage finetune --preset prime")
    assert costs["params"]["all"]["vision"] == TOWER_SIZES["siglip-384"]
    assert costs["steps"]["samples"] == 7_070_000
    assert costs["steps"]["image tokens a step"] == 128 * 729
    assert "it has about 7,070,000 samples" in capsys.readouterr().out


def test_samples_of_a_file_that_is_here(tmp_path):
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "A door."}]
    lines = [json.dumps({"image": "a.jpg", "conversations": turns})] * 100
    # the file counts, not its name
    Path("blip_laion_cc_sbu_558k.json").write_text("[" + ",".join(lines) + "]")
    Path("own.jsonl").write_text("\n".join(lines[:50]))

    def counts(gpus, flags):
        run = counted(gpus, flags)["steps"]
        return [run[k] for k in ("samples", "samples a step", "steps", "warmup steps")]

    steps = "--batch_size 4 --grad_accum 2"
    assert counts(3, f"--data blip_laion_cc_sbu_558k.json {steps}") == [100, 24, 5, 1]
    assert counts(1, "--data own.jsonl --max_steps 70") == [50, 32, 70, 3]
    with pytest.raises(UserError, match="nowhere.json: no such data file"):
        counted(1, "--data nowhere.json")


def test_stage_2_finds_its_parts(tmp_path, hub, capsys):
    def parts(flags=""):
        params = counted(8, f"--stage finetune {flags}")["params"]["all"]
        return params["vision"], params["llm"]

    assert parts() == (TOWER_SIZES["clip-l-336"], LLM_SIZES["vicuna-7b"])
    assert parts("--preset prime") == (TOWER_SIZES["siglip-384"], LLM_SIZES["vicuna-7b"])
    assert parts("--llm gemma-2b") == (TOWER_SIZES["clip-l-336"], LLM_SIZES["gemma-2b"])

    folder = tmp_path / "out/pretrain/model"
    folder.mkdir(parents=True)
    adapter = Adapter(1152, 3072).state_dict()
    weights = {f"adapter.{name}": weight for name, weight in adapter.items()}
    weights["log_scale"] = torch.zeros(1)
    names = dict(vision="siglip-384", llm="phi-3-mini", image_mode="pad")
    save_adapter(folder, weights, names)
    found = parts("--init out/pretrain")
    assert found == (TOWER_SIZES["siglip-384"], LLM_SIZES["phi-3-mini"])
    assert "phi-3-mini" in capsys.readouterr().out.lower()
    assert parts("--init=out/pretrain") == found
    found = parts("--llm=gemma-2b --vision siglip-384")
    assert found == (TOWER_SIZES["siglip-384"], LLM_SIZES["gemma-2b"])

    Path("toy").mkdir()
    Path("toy/llm").symlink_to(hub / "qwen3-0.6b")
    Path("toy/vision").symlink_to(hub / "dinov2-224")
    found = parts("--preset toy --data llava_v1_5_mix665k.json --max_length 300")
    assert found == (TOWER_SIZES["dinov2-224"], LLM_SIZES["qwen3-0.6b"])


def test_flags_that_need_torchrun_have_a_plan():
    """But contrasting over all ranks needs more than one."""
    assert counted(1, "--stage finetune --fsdp") == counted(1, "--stage=finetune --fsdp")
    assert counted(2, "--gather_pairs")["steps"]["samples a step"] == 64
    with pytest.raises(UserError, match="needs several ranks"):
        counted(1, "--gather_pairs")


@pytest.mark.parametrize("argv", [[], ["0"], ["-8"], ["--stage", "pretrain"], ["eight"]])
def test_a_plan_needs_a_number_of_gpus(argv):
    with pytest.raises(UserError, match="usage: python -m tools.plan GPUS"):
        plan.main(argv)


def test_stage_2_of_a_llava_folder_has_a_plan(flags, world, tmp_path):
    """Such as one from the hub, which no run of ours has left."""
    train.main([*flags, "--export", "--max_steps", "1", "--out_dir", str(tmp_path)])
    adapter = tmp_path / "model/adapter.safetensors"
    of_run = counted(2, f"--stage finetune --init {tmp_path} --data {world}/train.json")
    adapter.unlink()
    costs = counted(2, f"--stage finetune --init {tmp_path} --data {world}/train.json")
    assert costs == of_run and costs["params"]["trained"]["llm"] > 1000


@pytest.mark.parametrize(
    "flags",
    [
        "--sea_weight 1",
        "--sea_weight 0",
        "--dtype bfloat16",
        "--stage finetune",
        "--stage finetune --dtype bfloat16",
        "--stage finetune --tune_vision",
    ],
)
def test_the_plan_is_of_what_a_run_builds(flags, world, tmp_path):
    parts = f"--vision {world}/vision --llm {world}/llm"
    model, _ = train.build_model(train.parse_config(parts.split()), torch.device("cpu"))
    save_adapter(tmp_path, adapter_state(model), model.parts | {"image_mode": "square"})
    flags += f" --init {tmp_path}" if "finetune" in flags else f" {parts}"
    flags += "" if "dtype" in flags else " --dtype float32"
    real, _ = train.build_model(train.parse_config(flags.split()), torch.device("cpu"))
    costs = planned(1, f"{flags} --data {world}/train.json")
    tuned = [p for p in real.parameters() if p.requires_grad]
    assert costs["steps"]["samples"] == 24
    assert costs["params"]["trained"]["total"] == sum(p.numel() for p in tuned)
    assert costs["params"]["all"]["total"] == sum(p.numel() for p in real.parameters())
    for memory in costs["gpu"].values():
        for phase in memory.values():
            assert phase["frozen"] == sum(
                p.nbytes for p in real.parameters() if not p.requires_grad
            )
            assert phase["trained"] == sum(p.nbytes for p in tuned)


# the dry run


class TorchsTracker(MemTracker):
    """torch's own, which cannot follow the gradients of frozen parameters."""

    def _track_module_params_and_buffers(self, module, install_grad_hooks=True):
        return super()._track_module_params_and_buffers(module, False)


class TrackedRun(train.Run):
    def forward(self, **batch):
        self.tracker.reset_mod_stats()  # it takes one forward pass
        return super().forward(**batch)


@pytest.fixture(scope="module")
def medium(tmp_path_factory):
    """Flags of parts whose activations outweigh what small things there are."""
    root = tmp_path_factory.mktemp("medium")
    vision = CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=6,
        image_size=56,
        patch_size=14,
    )
    CLIPVisionModel(vision).save_pretrained(root / "vision")
    square = {"height": 56, "width": 56}
    CLIPImageProcessor(size={"shortest_edge": 56}, crop_size=square).save_pretrained(
        root / "vision"
    )
    tokenizer = tiny_tokenizer(["a red door"])
    tokenizer.save_pretrained(root / "llm")
    llm = Qwen3Config(
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
        vocab_size=400,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    Qwen3ForCausalLM(llm).save_pretrained(root / "llm")
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "red " * 100}]
    (root / "data.jsonl").write_text(json.dumps({"image": "a.jpg", "conversations": turns}))
    return f"--llm {root}/llm --vision {root}/vision --data {root}/data.jsonl"


@pytest.mark.parametrize(
    "stage, more",
    [
        ("pretrain", ""),
        ("pretrain", "--no-grad_checkpoint"),
        ("finetune", ""),
        ("finetune", "--grad_accum 2"),
        ("finetune", "--fsdp"),
        ("finetune --tune_vision", "--fsdp"),
    ],
)
def test_memory_is_what_a_real_step_takes(stage, more, medium, tmp_path, monkeypatch):
    """Numbers and all, as torch's own tracker sees it."""
    monkeypatch.setenv("RANK", "0")  # as under torchrun
    flags = f"--stage {stage} {medium} --batch_size 3 --max_length 60 --dtype bfloat16 {more}"
    phases = planned(1, flags)["gpu"][60]
    planned_peak = max(phase["total"] for phase in phases.values())

    cfg = train.parse_config(flags.split())
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        real, dtype = train.build_model(cfg, torch.device("cpu"))
        parallel = train.parallelize(cfg, real, dtype) if cfg.fsdp else real
        optimizer = plan.as_on_gpus(train.build_optimizer(cfg, real), cfg)
        run = TrackedRun(cfg, torch.device("cpu"), dtype, real, parallel, optimizer, 100)
        batch = plan.make_batch(cfg, real, 60)
        patches = cfg.batch_size * real.image_tokens
        real.word_token_ids = [[1, 1]] * patches
        if cfg.sea_weight:  # as many pairs as there can be
            ids = np.arange(patches).reshape(cfg.batch_size, -1, 1)
            batch["label_ids"] = np.broadcast_to(ids, batch["label_ids"].shape)
        run.tracker = tracker = TorchsTracker()
        for step in (1, 2):
            batches = [dict(batch) for _ in range(cfg.grad_accum)]
            if step == 1:
                train.train_step(run, batches, step)
                continue
            tracker.track_external(real, optimizer)
            with tracker:
                train.train_step(run, batches, step)
        [peak] = tracker.get_tracker_snapshot("peak").values()
    finally:
        torch.distributed.destroy_process_group()
    total = next(size for kind, size in peak.items() if str(kind) == "Total")
    assert planned_peak == pytest.approx(total, rel=0.02)


def test_the_buckets_of_ddp_stay(medium):
    """From one step to the next; a single process frees gradients."""
    flags = f"--stage finetune {medium} --batch_size 2 --max_length 60"
    [alone] = planned(1, flags)["gpu"].values()
    [of_two] = planned(2, flags)["gpu"].values()
    assert alone["forward"]["gradients"] == 0
    assert of_two["forward"]["gradients"] == of_two["forward"]["trained"] > 0


def test_micro_batches_beyond_two_cost_operations_and_no_memory(medium):
    flags = f"{medium} --batch_size 2 --max_length 60 --max_steps 7"
    two, five = (planned(1, f"{flags} --grad_accum {n}") for n in (2, 5))
    assert five["gpu"] == two["gpu"]
    assert five["hours"] == pytest.approx(2.5 * two["hours"])


def test_operations_are_those_of_the_weights(medium):
    """Two for each weight, position and pass, by hand; attention and the adapter are small."""
    costs = {}
    for flags in ("", "--no-grad_checkpoint"):
        costs[flags] = planned(4, f"{medium} --batch_size 2 --max_length 60 {flags}")
    block = 2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 344
    head = 400 * 128 * 44  # of the text's positions
    tower = 4 * 12 * 96**2 * 16
    for flags, passes in (("", 3), ("--no-grad_checkpoint", 2)):
        by_hand = 2 * 2 * (4 * block * 60 * passes + 2 * head + tower)
        hours = costs[flags]["hours"]
        assert hours * 3600 * plan.UTILISATION * plan.PEAK == pytest.approx(by_hand, rel=0.25)


def test_the_papers_stage_2():
    """Vicuna-7B over 8 GPUs, against sums by hand."""
    costs = planned(8, f"--stage finetune --fsdp --max_length {576 + 320}")
    llm, vision, adapter = LLM_SIZES["vicuna-7b"], TOWER_SIZES["clip-l-336"], 20_979_712
    tuned = llm + adapter
    for memory in costs["gpu"].values():
        for phase in memory.values():
            assert phase["frozen"] == pytest.approx(2 * vision / 8, rel=0.01)
            assert phase["trained"] == pytest.approx(4 * tuned / 8, rel=0.01)
            assert phase["moments"] == pytest.approx(8 * tuned / 8, rel=0.01)
        assert memory["optimizer"]["gradients"] == pytest.approx(4 * tuned / 8, rel=0.01)
        assert memory["forward"]["gradients"] == 0
        # embeddings and head are gathered in bf16 from forward to backward
        assert memory["forward"]["activations, copies"] > 2 * 2 * 32000 * 4096
    positions = 576 + plan.TEXT_LENGTH["finetune"]
    block = 4 * 4096**2 + 3 * 4096 * 11008
    passes = 4  # forward, recomputed, and two in backward
    by_hand = 2 * 32 * block * positions * passes + 2 * 24 * 12 * 1024**2 * 576
    hours = 5198 * 16 * by_hand / (plan.UTILISATION * plan.PEAK * 3600)
    # attention, head and adapter add to it
    assert 0.97 < costs["hours"] / hours < 1.1


@pytest.mark.parametrize(
    "wrong, message",
    [(lambda x: x[:, 1:], "size|shape|dimension"), (lambda x: x.double(), "dtype")],
    ids=["shape", "dtype"],
)
def test_what_would_fail_in_the_first_step_fails(wrong, message, medium, monkeypatch):
    """An LLM that gets embeddings of a wrong width, or float64, which autocast leaves."""
    decode = model.decode
    monkeypatch.setattr(model, "decode", lambda llm, x, *rest: decode(llm, wrong(x), *rest))
    flags = f"--stage finetune {medium} --batch_size 2 --max_length 60"
    with pytest.raises((RuntimeError, ValueError, IndexError), match=message):
        planned(1, flags)
