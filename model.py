"""The multimodal LLM: a transformers vision tower, the adapter, a transformers causal LM (Eq. 1-3, 12).

`SEAModel.forward` takes a batch of data.py and returns the losses. A new model trains the adapter and log_scale
(1/τ = exp); stage 2 thaws the LLM, `tune_vision` the tower. `save_llava` writes a Hugging Face Llava folder.
"""

import contextlib
import copy
import json
import math
import re
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
import torch.nn as nn
import torch.nn.functional as F
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionModel,
    Dinov2Model,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    SiglipVisionModel,
)

from adapter import Adapter
from data import IGNORE, UserError, image_processor, prepare_tokenizer, vision_geometry, word_tokens
from loss import sea_loss, word_features

# The paper's parts by short name (Tables 1, 2, 5), and one LLM of today for a single GPU; any other hub name, folder
# or GGUF file is taken as it is.
LLMS = {
    "vicuna-7b": "lmsys/vicuna-7b-v1.5",
    "vicuna-13b": "lmsys/vicuna-13b-v1.5",
    "gemma-2b": "google/gemma-2b-it",
    "phi-3-mini": "microsoft/Phi-3-mini-4k-instruct",
    "llama-3-8b": "meta-llama/Meta-Llama-3-8B-Instruct",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
}
VISION = {
    "clip-l-336": "openai/clip-vit-large-patch14-336",
    "siglip-384": "google/siglip-so400m-patch14-384",
    "dinov2-224": "facebook/dinov2-large",
}
# model_type -> class of the tower, whether its first token is a class token, where Llava's format keeps its weights
TOWERS = {
    "clip": (CLIPVisionModel, True, "vision_model."),
    "siglip": (SiglipVisionModel, False, "vision_model."),
    "dinov2": (Dinov2Model, True, ""),
}


# --------------------------------------------------------------------------------------------------- loading


def _from_pretrained(cls, name, **kwargs):
    """cls.from_pretrained, for a hub name or a local folder; refuses weights that do not fill the model."""
    try:
        if cls in (AutoConfig, AutoTokenizer):
            return cls.from_pretrained(name, **kwargs)
        model, info = cls.from_pretrained(name, output_loading_info=True, **kwargs)
    except (OSError, ValueError, RuntimeError, SafetensorError) as e:
        raise UserError(
            f"{name}: cannot be loaded as {cls.__name__} ({str(e).strip().splitlines()[0]}); give a "
            "folder with all its files or the name of a hub model that you have access to"
        ) from e
    if info["missing_keys"]:
        raise UserError(
            f"{name}: no weights for {sorted(info['missing_keys'])[:3]} ... of {cls.__name__}"
        )
    return model


def tower_kind(config):
    """The entry of TOWERS for a vision tower's config."""
    return TOWERS.get(config.model_type.removesuffix("_vision_model"))


def load_vision(name, dtype=torch.float32, meta=False):
    """A CLIP, SigLIP or DINOv2 vision tower. meta: its shapes alone, no weights are read."""
    config = _from_pretrained(AutoConfig, VISION.get(name, name))
    if not tower_kind(config):
        raise UserError(
            f"{name}: not a vision tower of a known kind (model_type {config.model_type!r}; known: "
            f"{', '.join(TOWERS)})"
        )
    cls = tower_kind(config)[0]
    if meta:
        with torch.device("meta"):
            return cls(getattr(config, "vision_config", config)).to(dtype)
    return _from_pretrained(cls, VISION.get(name, name), dtype=dtype)


def load_llm(name, dtype=torch.float32, meta=False):
    """A causal LM and its tokenizer: short or hub name, folder, GGUF file, or a folder that holds one GGUF file."""
    name = LLMS.get(name, name)
    path, kwargs = Path(name), {}
    gguf = (
        sorted(path.glob("*.gguf")) if path.is_dir() and not (path / "config.json").exists() else []
    )
    if path.suffix == ".gguf" or len(gguf) == 1:
        path = gguf[0] if gguf else path
        if not path.is_file():
            raise UserError(f"{path}: no such GGUF file (--llm)")
        name, kwargs = path.parent, {"gguf_file": path.name}
    tokenizer = _from_pretrained(AutoTokenizer, name, **kwargs)
    if meta:
        with torch.device("meta"):
            config = _from_pretrained(AutoConfig, name, **kwargs)
            return AutoModelForCausalLM.from_config(config, dtype=dtype), tokenizer
    llm = _from_pretrained(AutoModelForCausalLM, name, dtype=dtype, **kwargs)
    if kwargs:  # its weights are plain numbers now, but transformers would refuse to save them
        llm.hf_quantizer = None
        del llm.config.quantization_config
    return llm, tokenizer


def newest_checkpoints(out_dir):
    """The checkpoints of a run, newest first."""
    return sorted(
        Path(out_dir).glob("checkpoints/step_*[0-9]"), key=lambda p: -int(p.name.split("_")[1])
    )


def find_model(path):
    """The folder with adapter.safetensors or a Llava model: path itself, its model/ or its newest checkpoint. An
    owner/name whose owner is no folder (nor out/, which is ours) is taken for a hub name."""
    owner = re.fullmatch(r"([\w-][\w.-]*)/[\w.-]+", str(path))
    if owner and owner[1] != "out" and not Path(owner[1]).exists():
        return str(path)
    path = Path(path)
    for folder in (path, path / "model", *newest_checkpoints(path)[:1]):
        if any(
            (folder / name).is_file()
            for name in ("adapter.safetensors", "processor_config.json", "state.json")
        ):
            return folder
    raise UserError(
        f"{path}: no adapter.safetensors and no Llava model here, in model/ or in checkpoints/step_N/; "
        "give the --out_dir of a training run or a Llava folder"
    )


def part_names(folder):
    """dict of vision and llm: where the parts of folder/adapter.safetensors are, beside it or as its header says."""
    path = folder / "adapter.safetensors"
    try:
        with safe_open(path, "pt") as f:
            names = f.metadata()
    except SafetensorError as e:
        raise UserError(f"{path}: truncated or corrupt ({e}); use an earlier checkpoint") from e
    if not {"vision", "llm"} <= (names or {}).keys():
        raise UserError(
            f"{path}: does not say which vision tower and LLM it belongs to; was it written by train.py?"
        )
    return {k: str(folder / k) if (folder / k).is_dir() else names[k] for k in ("vision", "llm")}


# ----------------------------------------------------------------------------------------------------- model


class SEAModel(nn.Module):
    """names: where vision tower and LLM came from, kept beside the adapter's weights. geometry: keywords of
    data.geometry. tau: the initial temperature of Eq. 11.

    PAPER: "zero temperature" is a learnable log-scale that starts at 0, i.e. τ = 1.
    """

    def __init__(self, vision, llm, tokenizer, geometry, names, tau=1.0, feature_layer=-2):
        super().__init__()
        self.vision, self.llm = (
            vision.eval().requires_grad_(False),
            llm.eval().requires_grad_(False),
        )
        self.tokenizer, self.geometry, self.names, self.feature_layer = (
            tokenizer,
            geometry,
            names,
            feature_layer,
        )
        self.image_token_id = prepare_tokenizer(tokenizer)
        self.grid = (geometry["size"] // vision.config.patch_size,) * 2
        self.image_tokens = self.grid[0] * self.grid[1]
        scale = float(
            getattr(
                self.embed_tokens,
                "scalar_embed_scale",
                getattr(self.embed_tokens, "embed_scale", 1.0),
            )
        )
        self.adapter = Adapter(vision.config.hidden_size, self.embed_tokens.weight.shape[1], scale)
        self.log_scale = nn.Parameter(torch.full((1,), -math.log(tau)))
        self.words = None  # token ids and offsets of the label words, see set_words

    @classmethod
    def from_parts(cls, vision, llm, dtype=torch.float32, tau=1.0, meta=False):
        """A new model from the names or folders of its parts; the adapter is freshly initialised, in fp32."""
        names = dict(vision=str(vision), llm=str(llm))
        tower, geometry = (
            load_vision(names["vision"], dtype, meta),
            vision_geometry(VISION.get(vision, vision)),
        )
        llm, tokenizer = load_llm(names["llm"], dtype, meta)
        with torch.device("meta" if meta else "cpu"):
            return cls(tower, llm, tokenizer, geometry, names, tau)

    @classmethod
    def from_run(cls, path, dtype=torch.float32):
        """The model of a training run (its out_dir, its model/, or a checkpoint), or of any Hugging Face Llava folder
        or hub name."""
        folder = Path(find_model(path))
        if not (folder / "adapter.safetensors").is_file():
            checkpoint = (folder / "state.json").is_file()
            return (
                cls._from_finetune(folder, dtype)
                if checkpoint
                else cls.from_llava(str(folder), dtype)
            )
        model = cls.from_parts(**part_names(folder), dtype=dtype)
        model.load_adapter(folder / "adapter.safetensors")
        return model

    @classmethod
    def _from_finetune(cls, folder, dtype):
        """Of a checkpoint of stage 2: the model that its run started from, with the weights trained since."""
        config = json.loads((folder / "state.json").read_text())["config"]
        try:
            model = cls.from_run(config["init"], dtype)
            saved = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
            state = {name: w for name, w in model.state_dict().items() if f"model.{name}" in saved}
            if lost := sorted(
                {k for k in saved if k.startswith("model.")} - {f"model.{name}" for name in state}
            ):
                raise UserError(
                    f"{config['init']} has no {lost[0]}; it must be what the run started from (its --init)"
                )
            dcp.load({"model": state}, checkpoint_id=folder, no_dist=True)
        except UserError as e:
            raise UserError(f"{folder}: {e}") from e
        except (dcp.CheckpointException, OSError) as e:
            raise UserError(f"{folder}: truncated or corrupt; use another checkpoint") from e
        model.geometry["mode"] = config["image_mode"] or model.geometry["mode"]
        return model

    @classmethod
    def from_llava(cls, path, dtype=torch.float32):
        """The model of a Hugging Face Llava folder or hub name, such as save_llava writes."""
        llava = _from_pretrained(LlavaForConditionalGeneration, path, dtype=dtype)
        config = llava.config
        kind = tower_kind(config.vision_config) or (None, None, None)
        ours = (
            config.vision_config.model_type,
            "default" if kind[1] else "full",
            "gelu",
            True,
            int,
        )
        given = (
            kind[0] and ours[0],
            config.vision_feature_select_strategy,
            config.projector_hidden_act,
            config.multimodal_projector_bias,
            type(config.vision_feature_layer),
        )
        if given != ours:
            raise UserError(
                f"{path}: this Llava model has (tower, feature strategy, projector's activation, its bias, "
                f"type of feature layer) = {given}; only {ours} can be read, with the towers {[*TOWERS]}"
            )
        with torch.device("meta"):  # an empty frame, for Llava keeps the LLM without it
            llm = AutoModelForCausalLM.from_config(copy.deepcopy(config.text_config), dtype=dtype)
        llm.model, llm.lm_head = llava.model.language_model, llava.lm_head
        llm.generation_config = llava.generation_config
        model = cls(
            llava.model.vision_tower,
            llm,
            _from_pretrained(AutoTokenizer, path),
            vision_geometry(path),
            dict(llava=str(path)),
            feature_layer=config.vision_feature_layer,
        )
        projector = llava.model.multi_modal_projector.float().state_dict()
        scale = model.adapter.output_scale
        model.adapter.load_state_dict(
            {k: w / scale if "linear_2" in k else w for k, w in projector.items()}
        )
        return model

    @property
    def embed_tokens(self):
        """Ψ: the LLM's input embedding layer. Called, not indexed: some models scale inside it."""
        return self.llm.get_input_embeddings()

    def tune_vision(self):
        """Train the vision tower too, but for what its features do not depend on: the last block and what follows."""
        self.vision.requires_grad_(True)
        size = self.geometry["size"]
        features = self._features(torch.zeros(1, 3, size, size, device=self.vision.device))
        parameters = list(self.vision.parameters())
        for p, grad in zip(
            parameters, torch.autograd.grad(features.sum(), parameters, allow_unused=True)
        ):
            p.requires_grad_(grad is not None)  # DDP would wait for gradients that never come

    def blocks(self):
        """The transformer blocks of vision tower and LLM: the units of sharding and compiling."""
        return [
            [*next(m for m in part.modules() if isinstance(m, nn.ModuleList))]
            for part in (self.vision, self.llm)
        ]

    # ---------------------------------------------------------------------------------------- saving, loading

    def trained_state(self):
        """Name -> tensor of all that stage 1 trains, whole: every rank of a sharded model must call it."""
        own = {
            name: p.detach()
            for name, p in self.named_parameters()
            if name.startswith(("adapter.", "log_scale"))
        }
        return {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in own.items()}

    def full_state(self):
        """Name -> whole tensor on the CPU; of sharded models on rank 0 alone, but every rank must call it."""
        return get_model_state_dict(
            self, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
        )

    def save_adapter(self, folder, state=None):
        """Write folder/adapter.safetensors: the adapter, log_scale, and in its header the names of the parts. state:
        of trained_state, now if left out."""
        state = {name: p.cpu().contiguous() for name, p in (state or self.trained_state()).items()}
        save_file(state, Path(folder) / "adapter.safetensors", metadata=self.names)

    def load_adapter(self, path):
        own, saved = self.trained_state(), load_file(path)
        shapes = [{name: tuple(t.shape) for name, t in state.items()} for state in (own, saved)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"{path}: holds {shapes[1]}, this vision tower and LLM need {shapes[0]}"
            )
        for name, p in own.items():
            p.copy_(saved[name])

    def no_llava(self):
        """Why transformers' Llava cannot hold this LLM, or None."""
        if getattr(self.llm.config.get_text_config(), "final_logit_softcapping", None):
            return "its logits are soft-capped, which Llava would leave out"
        text_only = (
            self.llm.config.get_text_config() is self.llm.config
            and self.llm.base_model_prefix == "model"
        )
        if not text_only or self.llm.get_output_embeddings().bias is not None:
            return f"{type(self.llm).__name__} is built otherwise"

    def end_tokens(self):
        """The ids that end an answer: the chat format's, and those that the LLM had from the start."""
        own = self.llm.generation_config.eos_token_id
        own = own if isinstance(own, list) else [own]
        return list(dict.fromkeys(i for i in (self.tokenizer.eos_token_id, *own) if i is not None))

    def save_parts(self, folder, state, dtype):
        """Write the LLM and the vision tower as folders of their own and the adapter beside them; from_run loads it."""
        for name, part, beside in (
            ("llm", self.llm, self.tokenizer),
            ("vision", self.vision, image_processor(**self.geometry)),
        ):
            weights = {
                k.removeprefix(f"{name}."): w.to(dtype)
                for k, w in state.items()
                if k.startswith(f"{name}.")
            }
            part.save_pretrained(folder / name, state_dict=weights)
            beside.save_pretrained(folder / name)
        self.save_adapter(
            folder, {k: w for k, w in state.items() if not k.startswith(("llm.", "vision."))}
        )

    def save_llava(self, folder, state, dtype):
        """Write a folder that LlavaForConditionalGeneration and AutoProcessor load, weights in dtype.

        state: of full_state. The names of the weights are those that every transformers since 4.5 and vLLM know; the
        embedding and the head get rows of zeros for `<image>` and up to a multiple of 64.
        """
        text, vision = (
            copy.deepcopy(part.config) for part in (self.llm, self.vision)
        )  # Llava's would change ours
        _, class_token, prefix = tower_kind(vision)
        words, text.vocab_size = (
            text.vocab_size,
            -(-max(len(self.tokenizer), text.vocab_size) // 64) * 64,
        )
        weights = {}
        for name, w in state.items():
            part, _, key = name.partition(".")
            if part == "vision":
                weights[f"vision_tower.{prefix}{key.removeprefix(prefix)}"] = w
            elif part == "adapter":  # the scale of Gemma's visual tokens goes into the last layer
                scale = self.adapter.output_scale if key.startswith("linear_2") else 1.0
                weights[f"multi_modal_projector.{key}"] = w * scale
            elif key.endswith(("embed_tokens.weight", "lm_head.weight")):
                if not (key == "lm_head.weight" and text.tie_word_embeddings):
                    weights[f"language_model.{key}"] = F.pad(w, (0, 0, 0, text.vocab_size - len(w)))
            elif part == "llm":
                weights[f"language_model.{key}"] = w
        save_torch_state_dict({k: w.to(dtype) for k, w in weights.items()}, folder)

        strategy = "default" if class_token else "full"
        LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=self.image_token_id,
            dtype=dtype,
            image_seq_length=self.image_tokens,
            vision_feature_layer=self.feature_layer,
            vision_feature_select_strategy=strategy,
            tie_word_embeddings=text.tie_word_embeddings,
            architectures=["LlavaForConditionalGeneration"],
        ).save_pretrained(folder)
        empty = list(range(words, text.vocab_size)) or self.llm.generation_config.suppress_tokens
        GenerationConfig(
            bos_token_id=self.tokenizer.bos_token_id,
            eos_token_id=self.end_tokens(),
            pad_token_id=self.tokenizer.pad_token_id,  # rows without a word must never be said
            suppress_tokens=empty,
        ).save_pretrained(folder)
        LlavaProcessor(
            image_processor(**self.geometry),
            self.tokenizer,
            patch_size=vision.patch_size,
            vision_feature_select_strategy=strategy,
            num_additional_image_tokens=int(class_token),
            chat_template=self.tokenizer.chat_template,
        ).save_pretrained(folder)

    # ----------------------------------------------------------------------------------------------- forward

    def encode_image(self, pixels):
        """X_v = g_θ(f(X_image)) (Eq. 1): pixels [B, 3, S, S] -> visual tokens [B, m, D].

        f is the tower's second-to-last layer without class or register tokens, as in LLaVA.
        """
        if not len(
            pixels
        ):  # text only; ranks whose vision path got no gradient would leave the others waiting
            pixels = torch.zeros(
                1, 3, self.geometry["size"], self.geometry["size"], device=self.vision.device
            )
        frozen = not any(p.requires_grad for p in self.vision.parameters())
        with torch.no_grad() if frozen else contextlib.nullcontext():
            features = self._features(pixels)
        return self.adapter(features.to(self.adapter.linear_1.weight.dtype))

    def _features(self, pixels):
        hidden = self.vision(pixels.to(self.vision.dtype), output_hidden_states=True).hidden_states
        return hidden[self.feature_layer][:, -self.image_tokens :]

    def embed(self, input_ids, visual_tokens):
        """X_input (Eq. 3): text embeddings [B, L, D] with the visual tokens in the places of the image token."""
        is_image = input_ids == self.image_token_id
        x = self.embed_tokens(input_ids.masked_fill(is_image, 0))
        return x.masked_scatter(is_image.unsqueeze(-1), visual_tokens.to(x.dtype))

    def forward(
        self,
        input_ids,
        attention_mask,
        labels,
        pixels,
        label_ids=None,
        label_scores=None,
        num_targets=None,
        window=2,
        generator=None,
        gather_pairs=False,
    ):
        """A batch of data.collate -> dict of loss_g (Eq. 12), and with labels loss_a (Eq. 11), pairs, matched.

        PAPER: L_g is a mean over trained tokens. num_targets is what the sum is divided by, for a mean over several
        micro-batches and ranks; by default the number in this batch. inputs [B, L, D]: X_input, is_image [B, L].
        """
        visual_tokens = self.encode_image(pixels)
        x = self.embed(input_ids, visual_tokens)
        hidden = self.llm.get_decoder()(
            inputs_embeds=x, attention_mask=attention_mask, use_cache=False
        )[0]
        trained = (
            labels[:, 1:] != IGNORE
        )  # position i predicts token i + 1; the others never meet the LM head
        logits = self.llm.get_output_embeddings()(hidden[:, :-1][trained]).float()
        if cap := getattr(self.llm.config.get_text_config(), "final_logit_softcapping", None):
            logits = cap * torch.tanh(logits / cap)
        total = F.cross_entropy(logits, labels[:, 1:][trained], reduction="sum")
        out = dict(
            loss_g=total / (trained.sum().clamp(min=1) if num_targets is None else num_targets),
            tau=(-self.log_scale.detach()).exp(),
            inputs=x.detach(),
            is_image=input_ids == self.image_token_id,
        )
        if label_ids is not None:
            out["loss_a"], pairs = sea_loss(
                visual_tokens,
                label_ids,
                label_scores,
                self.word_vectors,
                self.log_scale,
                self.grid,
                window,
                generator,
                gather_pairs,
            )
            out.update(pairs)
        return out

    def set_words(self, words):
        """The words that label ids stand for."""
        self.words = word_tokens(words, self.tokenizer)

    def word_vectors(self, labels):
        """Ψ(w) of the words with these ids (Eq. 10), as the LLM's first layer receives them: [N] -> [N, D]."""
        ids, offsets = self.words
        labels = labels.cpu()
        start, length = offsets[labels], offsets[labels + 1] - offsets[labels]
        first = length.cumsum(0) - length
        at = torch.arange(int(length.sum())) + (start - first).repeat_interleave(length)
        device = self.embed_tokens.weight.device
        rows = self.embed_tokens(ids[at].to(device))
        return word_features(rows, torch.arange(len(rows), device=device), first.to(device))

    @torch.no_grad()
    def generate(self, input_ids, attention_mask, pixels, **kwargs):
        """Continue a prompt that holds the image tokens -> new token ids [B, at most max_new_tokens].

        Prompts of different lengths are padded on the left. kwargs go to transformers' generate.
        """
        x = self.embed(input_ids, self.encode_image(pixels))
        kwargs = (
            dict(
                do_sample=False,
                pad_token_id=self.tokenizer.pad_token_id,
                eos_token_id=self.end_tokens(),
            )
            | kwargs
        )
        return self.llm.generate(inputs_embeds=x, attention_mask=attention_mask, **kwargs)
