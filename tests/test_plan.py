"""The plan against published sizes, sums by hand, real models on the CPU, what train.py builds."""

import dataclasses
import json
import os
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from conftest import tiny_tokenizer
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    GemmaConfig,
    LlamaConfig,
    Phi3Config,
    Qwen3Config,
)

import model
import train
from adapter import Adapter
from data import UserError
from model import SEAModel, adapter_state, assemble, save_adapter
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


def planned(gpus, flags=""):
    with patch.dict(os.environ):  # the plan sets torchrun's variables
        return plan.main([str(gpus), *flags.split()])


def first_gpu(costs):
    """The memory of the first case that the plan gives for a GPU."""
    return next(iter(costs["gpu"].values()))


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
        costs = planned(8, f"--stage {stage} --llm {llm} --vision {vision}")
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
    costs = planned(8)
    out = capsys.readouterr().out
    assert costs["params"]["all"]["total"] == 7_062_902_784 + 1  # the temperature
    assert costs["params"]["trained"]["total"] == 20_979_712 + 1
    assert " 7,062,902,785 " in out and " 20,979,713\n" in out
    assert "is not here; it has about 558,128 samples" in out
    labels = 558_128 * 576 * 10  # 19.29 GB at 6 bytes each, an int32 and a float16
    assert costs["disk"]["labels"] == labels * 6 and "19.29" in out
    costs = planned(8, "--sea_weight 0")
    assert "labels" not in costs["disk"]
    assert costs["params"]["trained"]["total"] == 20_979_712


@pytest.mark.parametrize("flags", ["--llm vicuna-13b", "--stage finetune --preset prime"])
def test_nothing_is_loaded_or_written(flags, tmp_path, hub):
    """There are no weights to load."""
    before = {p: p.stat().st_mtime_ns for p in hub.rglob("*")}
    planned(8, flags)
    _, built, _ = plan.shapes_of_run(flags.split())
    assert {t.device.type for t in [*built.parameters(), *built.buffers()]} == {"meta"}
    assert not list(tmp_path.iterdir())
    assert before == {p: p.stat().st_mtime_ns for p in hub.rglob("*")}


def test_memory_of_weights_by_hand():
    llm, vision, adapter = LLM_SIZES["vicuna-7b"], TOWER_SIZES["clip-l-336"], 20_979_712
    one, eight = (planned(n) for n in (1, 8))
    trained = adapter + 1  # the temperature
    # copies: autocast's in bf16; DDP's buckets are the gradients themselves
    for mem in eight["gpu"].values():
        assert mem["frozen"] == 2 * (llm + vision)
        assert mem["trained"] == mem["gradients"] == 4 * trained
        assert mem["moments"] == 8 * trained and mem["copies"] == 2 * trained
        assert mem["total"] == sum(v for k, v in mem.items() if k != "total")
    assert first_gpu(one)["copies"] == 2 * trained
    loading = 2 * (llm + vision) + 4 * trained
    assert one["cpu"] == {"while loading": loading}
    assert eight["cpu"] == {"while loading": 8 * loading}

    finetune, tuned = "--stage finetune --fsdp", llm + adapter
    mem = first_gpu(planned(16, finetune))
    accumulated = first_gpu(planned(16, f"{finetune} --grad_accum 2"))
    assert mem["trained"] == mem["gradients"] == 4 * tuned / 16
    assert mem["moments"] == 8 * tuned / 16
    assert mem["frozen"] == (2 * vision + 4) / 16  # 4: the temperature
    assert accumulated == mem  # gradients are reduced after each pass
    block = 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096
    outside = 2 * 32000 * 4096 + 4096 + adapter  # embeddings, head, last norm
    # in use and prefetched; gradients of one, in bf16 and in fp32
    gathered = 2 * 2 * block + (2 + 4) * block
    held = 2 * (outside + CLIP_EMBED + 4 * 1024 + 1)  # all in bf16, the temperature too
    assert mem["copies"] == gathered + held + (2 + 4) * outside
    costs = planned(16, finetune)
    total = llm + vision + adapter + 1
    assert costs["cpu"] == {"while loading": 8 * 4 * total}  # 8 GPUs a node, all in fp32
    assert costs["disk"] == {
        "a checkpoint": 12 * tuned + 2 * total,
        "checkpoints, at most": 2 * (12 * tuned + 2 * total),  # the last is written, then one goes
        "model": 2 * total,
    }
    wide = first_gpu(planned(16, f"{finetune} --dtype float32"))
    assert wide["frozen"] == (4 * vision + 4) / 16 and wide["trained"] == mem["trained"]


def test_checkpoints_and_models_on_disk():
    adapter, total = 20_979_712 + 1, 7_062_902_784 + 1  # with the temperature
    checkpoint = 16 * adapter  # weight, two moments, adapter again
    disk = planned(8)["disk"]  # of 2181 steps every 100th and the last, all kept
    assert disk["a checkpoint"] == checkpoint and disk["checkpoints, at most"] == 22 * checkpoint
    assert disk["model"] == 4 * adapter
    disk = planned(8, "--keep 3 --export")["disk"]
    assert disk["model"] == 4 * adapter + 2 * total
    assert disk["checkpoints, at most"] == 4 * checkpoint
    for flags, saved in (
        ("0", 0),
        ("500 --max_steps 499", 1),
        ("500 --max_steps 500", 1),
        ("500 --max_steps 501 --keep 3", 2),
    ):
        disk = planned(8, f"--save_every {flags}")["disk"]
        assert disk["checkpoints, at most"] == saved * checkpoint


def test_a_tuned_tower_trains_all_but_its_last_block():
    def trained_vision(flags):
        costs = planned(8, f"--stage finetune {flags}")
        return costs["params"]["trained"]["vision"]

    assert trained_vision("--tune_vision") == CLIP_EMBED + 2 * 1024 + 23 * CLIP_BLOCK
    assert trained_vision("--preset prime") == SIGLIP_EMBED + 26 * SIGLIP_BLOCK
    block = CLIP_BLOCK + 2 * 1024
    # not the mask token, the last block, the last norm
    used = TOWER_SIZES["dinov2-224"] - 1024 - block - 2 * 1024
    assert trained_vision("--tune_vision --vision dinov2-224 --llm qwen3-0.6b") == used


def test_the_plan_of_sea_prime(capsys):
    costs = planned(8, "--stage finetune --preset prime")
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
        run = planned(gpus, flags)["steps"]
        return [run[k] for k in ("samples", "samples a step", "steps", "warmup steps")]

    steps = "--batch_size 4 --grad_accum 2"
    assert counts(3, f"--data blip_laion_cc_sbu_558k.json {steps}") == [100, 24, 5, 1]
    assert counts(1, "--data own.jsonl --max_steps 70") == [50, 32, 70, 3]
    with pytest.raises(UserError, match="nowhere.json: no such data file"):
        planned(1, "--data nowhere.json")


def test_stage_2_finds_its_parts(tmp_path, hub, capsys):
    def parts(flags=""):
        params = planned(8, f"--stage finetune {flags}")["params"]["all"]
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
    found = parts("--preset toy --data llava_v1_5_mix665k.json")
    assert found == (TOWER_SIZES["dinov2-224"], LLM_SIZES["qwen3-0.6b"])


def test_flags_that_need_torchrun_have_a_plan():
    """But contrasting over all ranks needs more than one."""
    assert planned(1, "--stage finetune --fsdp") == planned(1, "--stage=finetune --fsdp")
    assert planned(2, "--gather_pairs")["steps"]["samples a step"] == 64
    with pytest.raises(UserError, match="needs several ranks"):
        planned(1, "--gather_pairs")


@pytest.mark.parametrize("argv", [[], ["0"], ["-8"], ["--stage", "pretrain"], ["eight"]])
def test_a_plan_needs_a_number_of_gpus(argv):
    with pytest.raises(UserError, match="usage: python -m tools.plan GPUS"):
        plan.main(argv)


def test_stage_2_of_a_llava_folder_has_a_plan(flags, world, tmp_path):
    """Such as one from the hub, which no run of ours has left."""
    train.main([*flags, "--export", "--max_steps", "1", "--out_dir", str(tmp_path)])
    adapter = tmp_path / "model/adapter.safetensors"
    of_run = planned(2, f"--stage finetune --init {tmp_path} --data {world}/train.json")
    adapter.unlink()
    costs = planned(2, f"--stage finetune --init {tmp_path} --data {world}/train.json")
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
    mem = first_gpu(costs)
    assert mem["frozen"] == sum(p.nbytes for p in real.parameters() if not p.requires_grad)
    assert mem["trained"] == sum(p.nbytes for p in tuned)


SMALL = dict(
    hidden_size=128,
    intermediate_size=344,
    num_hidden_layers=8,
    num_attention_heads=8,
    vocab_size=400,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=2,
)


@pytest.mark.parametrize("stage", ["pretrain", "finetune", "finetune --tune_vision"])
@pytest.mark.parametrize(
    "config",
    ids=lambda config: config.model_type,
    argvalues=[
        LlamaConfig(**SMALL),
        Phi3Config(**SMALL),
        Qwen3Config(**SMALL, num_key_value_heads=4, head_dim=16),
        GemmaConfig(**SMALL | dict(intermediate_size=1024), num_key_value_heads=1, head_dim=16),
    ],
)
def test_activations_are_about_what_autograd_keeps(config, stage):
    """All that a forward pass on the CPU keeps for backward, against the formulas."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=8,
        num_attention_heads=6,
        image_size=56,
        patch_size=14,
    )
    tower = CLIPVisionModel(vision)
    llm = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    preprocess = dict(size=56, mode="square", mean=(0.5,) * 3, std=(0.5,) * 3)
    tokenizer = tiny_tokenizer(["a red door"])
    built = SEAModel(assemble(tower, llm, tokenizer, 56), tokenizer, preprocess, {})
    if stage == "pretrain":
        llm.bfloat16()
        tower.bfloat16()
    else:
        built.thaw_llm("vision" in stage, torch.bfloat16)
    ids = torch.randint(3, 250, (4, 80))
    ids[:, :16] = built.llava.config.image_token_id
    labels = ids.clone()
    labels[:, : 16 if stage == "pretrain" else 48] = -100  # in stage 2 half of the text is trained
    weights = {p.untyped_storage().data_ptr() for p in built.parameters()}
    # of autocast's copies
    shapes = {s for p in built.parameters() if p.dim() > 1 for s in (p.shape, p.shape[::-1])}
    cfg = train.parse_config(f"--stage {stage} --llm x --batch_size 4".split())

    def kept():
        storages = {}

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights and tensor.shape not in shapes:
                storages[storage.data_ptr()] = storage
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", torch.bfloat16):
            places = torch.where(ids.flatten() == built.llava.config.image_token_id)[0]
            trained = torch.where(labels.flatten() != -100)[0]
            out = built(ids, places, trained, torch.randn(4, 3, 56, 56))
        assert out["loss_g"].requires_grad
        return sum(storage.nbytes() for storage in storages.values())

    def estimated(recompute):  # of the logits' 12 bytes a number, 4 are there before backward
        setting = dataclasses.replace(cfg, grad_checkpoint=recompute)
        mem = plan.gpu_memory(setting, built, 1, 80)
        assert mem["logits"] == 12 * 4 * (64 if stage == "pretrain" else 32) * 400
        return mem["activations"] + mem["logits"] / 3

    everything = kept()
    assert estimated(False) == pytest.approx(everything, rel=0.15)
    for part in (built.llava.model.language_model, tower)[: 1 + ("vision" in stage)]:
        # the name before transformers 5.23 and the name since
        old = part.gradient_checkpointing_enable
        getattr(part, "activation_checkpointing_enable", old)({"use_reentrant": False})
        part.train()
    # one of 8 blocks at a time
    assert estimated(True) == pytest.approx(kept() + everything / 8, rel=0.25)


@pytest.mark.parametrize("flags", ["", "--no-grad_checkpoint"])
@pytest.mark.parametrize("stage", ["pretrain", "finetune", "finetune --tune_vision"])
def test_operations_are_those_that_torch_counts(stage, flags):
    """Of a model in which the head and attention have a small share."""
    config = LlamaConfig(**SMALL | {"hidden_size": 512, "intermediate_size": 1376})
    vision = CLIPVisionConfig(
        hidden_size=384,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=6,
        image_size=56,
        patch_size=14,
    )
    tower = CLIPVisionModel(vision)
    llm = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    preprocess = dict(size=56, mode="square", mean=(0.5,) * 3, std=(0.5,) * 3)
    tokenizer = tiny_tokenizer(["a red door"])
    built = SEAModel(assemble(tower, llm, tokenizer, 56), tokenizer, preprocess, {})
    cfg = train.parse_config(f"--stage {stage} --llm x {flags}".split())
    if cfg.stage == "finetune":
        built.thaw_llm(cfg.tune_vision, torch.float32)
    train.wrap_blocks(cfg, built)
    ids = torch.randint(3, 250, (2, 80))
    ids[:, :16] = built.llava.config.image_token_id
    places = torch.where(ids.flatten() == built.llava.config.image_token_id)[0]
    with FlopCounterMode(display=False) as counter:
        built(ids, places, torch.arange(60, 80), torch.randn(2, 3, 56, 56))["loss_g"].backward()
    operations = 2 * plan.plan_operations(cfg, built, 80)
    # the tower's last block is run and its output is not used; the adapter and the head are small
    assert operations == pytest.approx(counter.get_total_flops(), rel=0.12)


def test_hours_of_the_papers_run():
    """By hand: 32 blocks of 202 M weights, 640 positions, forward, recomputed, backward."""
    costs = planned(8)
    block = 4 * 4096**2 + 3 * 4096 * 11008
    llm = 2 * 32 * block * 640 * 3
    vision = 2 * 24 * 12 * 1024**2 * 576
    seconds = 2181 * 256 * (llm + vision) / (8 * 0.4 * 989e12)
    assert costs["hours"] == pytest.approx(seconds / 3600, rel=0.01)
    assert 1 < costs["hours"] < 2
