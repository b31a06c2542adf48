import json

import pytest
from conftest import tiny_tokenizer

import model

LLAMA = dict(model_type="llama", architectures=["LlamaForCausalLM"], hidden_act="silu", rms_norm_eps=1e-5,
             bos_token_id=1, eos_token_id=2, tie_word_embeddings=False)
LLMS = {
    "vicuna-7b": LLAMA | dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
                              num_key_value_heads=32, vocab_size=32000, max_position_embeddings=4096, pad_token_id=0),
    "vicuna-13b": LLAMA | dict(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40,
                               num_key_value_heads=40, vocab_size=32000, max_position_embeddings=4096, pad_token_id=0),
    "llama-3-8b": LLAMA | dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                               num_key_value_heads=8, vocab_size=128256, max_position_embeddings=8192,
                               rope_theta=500000.0, bos_token_id=128000, eos_token_id=128009),
    "gemma-2b": dict(model_type="gemma", architectures=["GemmaForCausalLM"], hidden_act="gelu",
                     hidden_activation="gelu_pytorch_tanh", hidden_size=2048, intermediate_size=16384,
                     num_hidden_layers=18, num_attention_heads=8, num_key_value_heads=1, head_dim=256,
                     vocab_size=256000, max_position_embeddings=8192, rms_norm_eps=1e-6, rope_theta=10000.0,
                     bos_token_id=2, eos_token_id=1, pad_token_id=0),
    "phi-3-mini": dict(model_type="phi3", architectures=["Phi3ForCausalLM"], hidden_act="silu", hidden_size=3072,
                       intermediate_size=8192, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32,
                       vocab_size=32064, max_position_embeddings=4096, original_max_position_embeddings=4096,
                       rms_norm_eps=1e-5, rope_theta=10000.0, sliding_window=2047, tie_word_embeddings=False,
                       bos_token_id=1, eos_token_id=32000, pad_token_id=32000),
    "qwen3-0.6b": dict(model_type="qwen3", architectures=["Qwen3ForCausalLM"], hidden_act="silu", hidden_size=1024,
                       intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8,
                       head_dim=128, vocab_size=151936, max_position_embeddings=40960, rms_norm_eps=1e-6,
                       rope_theta=1000000, tie_word_embeddings=True, bos_token_id=151643, eos_token_id=151645),
}
CLIP_STATS = dict(image_mean=[0.48145466, 0.4578275, 0.40821073], image_std=[0.26862954, 0.26130258, 0.27577711])
# config.json, preprocessor_config.json
TOWERS = {
    "clip-l-336": (
        dict(model_type="clip", architectures=["CLIPModel"], projection_dim=768,
             text_config=dict(model_type="clip_text_model", hidden_size=768, intermediate_size=3072,
                              num_attention_heads=12, num_hidden_layers=12, projection_dim=768),
             vision_config=dict(model_type="clip_vision_model", hidden_size=1024, intermediate_size=4096,
                                num_attention_heads=16, num_hidden_layers=24, image_size=336, patch_size=14,
                                projection_dim=768)),
        dict(image_processor_type="CLIPImageProcessor", feature_extractor_type="CLIPFeatureExtractor", size=336,
             crop_size=336, do_resize=True, do_center_crop=True, do_normalize=True, resample=3, **CLIP_STATS)),
    "siglip-384": (
        dict(model_type="siglip", architectures=["SiglipModel"],
             text_config=dict(model_type="siglip_text_model", hidden_size=1152, intermediate_size=4304,
                              num_attention_heads=16, num_hidden_layers=27),
             vision_config=dict(model_type="siglip_vision_model", hidden_size=1152, intermediate_size=4304,
                                num_attention_heads=16, num_hidden_layers=27, image_size=384, patch_size=14)),
        dict(image_processor_type="SiglipImageProcessor", processor_class="SiglipProcessor", do_resize=True,
             do_rescale=True, do_normalize=True, rescale_factor=1 / 255, resample=3, size=dict(height=384, width=384),
             image_mean=[0.5] * 3, image_std=[0.5] * 3)),
    "dinov2-224": (
        dict(model_type="dinov2", architectures=["Dinov2Model"], hidden_size=1024, num_hidden_layers=24,
             num_attention_heads=16, mlp_ratio=4, image_size=518, patch_size=14, hidden_act="gelu", qkv_bias=True,
             layerscale_value=1.0, use_swiglu_ffn=False),
        dict(image_processor_type="BitImageProcessor", do_resize=True, do_center_crop=True, do_convert_rgb=True,
             do_rescale=True, do_normalize=True, rescale_factor=1 / 255, resample=3, size=dict(shortest_edge=256),
             crop_size=dict(height=224, width=224), image_mean=[0.485, 0.456, 0.406],
             image_std=[0.229, 0.224, 0.225])),
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Folders as the hub has them, less the weights: the true config.json of the parts, any tokenizer for the LLMs."""
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


def test_x():
    import train
    train.main("--stage pretrain --dry_run --world_size 8".split())
    train.main("--stage finetune --dry_run --world_size 8 --fsdp".split())
    assert 0
