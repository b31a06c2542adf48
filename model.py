"""The multimodal LLM: a vision tower, the adapter and an LLM inside transformers' Llava.

SEAModel.forward takes a batch of data.collate and returns L_g (Eq. 12) and L_a (Eq. 11). Below
it: where models come from (parts, runs, checkpoints, Llava folders), and how they are saved.
Generating, tied weights, and the format of a saved folder are transformers' own.
"""

import contextlib
import copy
import json
import math
import os
import re
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from adapter import Adapter
from data import (
    IMAGE_TOKEN,
    UserError,
    digest,
    image_processor,
    prepare_tokenizer,
    vision_preprocess,
    word_tokens,
)
from loss import sea_loss, word_features

# The paper's parts by short name (Tables 1, 2 and 5), and a small LLM of today for a single GPU.
# Any other hub name, folder or GGUF file is taken as it is.
# PAPER: "Gemma-2B" and "Llama-3-8B" are taken to be the models that are tuned to instructions, as
# Vicuna and Phi-3-mini are. "DINOv2" is taken to be its large model at 224 pixels, which has the
# 16 x 16 patches of CLIP-L/14 at 224 pixels; its labels are made by that.
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

# ----------------------------------------------------------------------------- the model


class Temperature(nn.Module):
    """τ of Eq. 11 as log_scale = log(1/τ). A module of its own: FSDP shards it in float32.

    PAPER: "zero temperature" is a learnable log_scale that starts at 0, i.e. τ = 1.
    """

    def __init__(self, tau):
        super().__init__()
        self.log_scale = nn.Parameter(torch.full((1,), -math.log(tau)))

    def forward(self):
        return self.log_scale.clone()  # FSDP may free its own tensor after forward


class SEAModel(nn.Module):
    """transformers' Llava with our Adapter as its projector, and the temperature of Eq. 11.

    llava: from assemble or load_llava. preprocess: the keywords of data.geometry for its tower.
    parts: where vision tower and LLM came from, and their digests: the adapter's file keeps them.
    """

    def __init__(self, llava, tokenizer, preprocess, parts, tau=1.0):
        super().__init__()
        self.llava = llava.eval().requires_grad_(False)
        self.adapter.requires_grad_(True)
        self.temperature = Temperature(tau)
        self.tokenizer = tokenizer
        self.preprocess = preprocess
        self.parts = parts
        self.image_tokens = llava.config.image_seq_length
        self.grid = (math.isqrt(self.image_tokens),) * 2
        positions = getattr(llava.config.text_config, "max_position_embeddings", None)
        self.max_positions = positions or math.inf  # of position embeddings that have no end
        # assemble suppresses the rows that it appends to the embedding: they are not predicted.
        # Suppressed ids anywhere else (in a foreign Llava) are real tokens and stay.
        suppressed = llava.generation_config.suppress_tokens or []
        rows = self.embed_tokens.num_embeddings
        are_added = sorted(suppressed) == list(range(rows - len(suppressed), rows))
        self.vocabulary_size = rows - len(suppressed) if are_added else rows

    def forward(
        self,
        input_ids,
        position_ids,
        lengths,
        image_places,
        trained,
        pixels,
        label_ids=None,
        label_scores=None,
        num_targets=None,
        **sea_options,
    ):
        """A batch of data.collate -> dict of loss_g (Eq. 12) and, with labels, loss_a (Eq. 11).

        input_ids and position_ids [L] of B sequences, one after another; lengths: how long each is.
        image_places [images * m] and trained [T]: indices into input_ids, of <image> and of the
        tokens to be predicted. pixels [images, 3, size, size]. label_ids and label_scores
        [B, m, n], on the CPU.
        Also in the dict: with labels pairs and matched (see loss.sea_loss) and tau; under no_grad
        inputs [L, D], which is X_input (Eq. 3).

        PAPER: L_g is a mean over the trained tokens. num_targets is what their sum is divided by,
        for a mean over several micro-batches and ranks; by default the number in this batch.
        sea_options: keywords of loss.sea_loss.
        """
        visual_tokens = self.visual_tokens(pixels)  # Eq. 1
        text = self.embed_tokens(input_ids)  # Eq. 2, with a row to be replaced for each <image>
        rows = visual_tokens.flatten(0, 1).to(text.dtype)
        inputs = text.index_copy(0, image_places, rows)  # Eq. 3
        hidden = decode(self.llava.model.language_model, inputs, position_ids, lengths)

        # Position i predicts token i + 1. Positions that predict nothing never meet the LM head.
        logits = self.llava.lm_head(hidden[trained - 1])[:, : self.vocabulary_size]
        total = F.cross_entropy(logits.float(), input_ids[trained], reduction="sum")
        if num_targets is None:
            num_targets = max(1, len(trained))
        out = {"loss_g": total / num_targets}  # Eq. 12
        if not torch.is_grad_enabled():
            out["inputs"] = inputs  # in training it would be kept for nothing

        if label_ids is not None:
            log_scale = self.temperature()
            out["loss_a"], counts = sea_loss(  # Eq. 9 to 11
                visual_tokens,
                torch.as_tensor(label_ids),
                torch.as_tensor(label_scores),
                self.label_features,
                log_scale,
                self.grid,
                **sea_options,
            )
            out.update(counts, tau=torch.exp(-log_scale[0]))
        return out

    def visual_tokens(self, pixels):
        """X_v = g_θ(f(X_image)) (Eq. 1): pixels [images, 3, size, size] -> [images, m, D].

        PAPER: f is not specified. It is the output of the tower's second-to-last layer without the
        class token, as in LLaVA.
        """
        images = len(pixels)
        if not images:
            # A batch of text only. A blank image keeps the adapter in the graph: ranks whose
            # adapter got no gradient would leave the others waiting for it.
            size = self.preprocess["size"]
            pixels = torch.zeros(1, 3, size, size, device=self.device)
        pixels = pixels.to(self.vision_tower.dtype)
        hidden = self.vision_tower(pixels, output_hidden_states=True).hidden_states
        features = hidden[self.llava.config.vision_feature_layer][:, -self.image_tokens :]
        return self.adapter(features)[:images]

    def set_words(self, words):
        """Say which words the label ids stand for."""
        self.word_token_ids = word_tokens(words, self.tokenizer)

    def label_features(self, labels):
        """Ψ(w) of the words with these ids (Eq. 10), as the LLM's first layer sees them.

        labels [N] -> [N, D].
        """
        rows = [self.word_token_ids[label] for label in labels.tolist()]
        offsets = torch.tensor([0, *map(len, rows)]).cumsum(0)[:-1]
        token_ids = torch.tensor([i for row in rows for i in row], dtype=torch.int64)
        token_ids, offsets = (x.to(self.device, non_blocking=True) for x in (token_ids, offsets))
        features = word_features(self.embed_tokens.weight, token_ids, offsets)
        return features * self.adapter.output_scale  # calling the layer scales; .weight does not

    @torch.no_grad()
    def generate(self, batch, **kwargs):
        """Greedy continuations of prompts, a batch of eval.pad_left.

        -> new token ids [B, at most max_new_tokens]. kwargs go to transformers' generate.
        """
        prompts = batch["input_ids"]
        if len(batch["pixels"]):
            kwargs["pixel_values"] = batch["pixels"]
        mask = batch["attention_mask"]
        ids = self.llava.generate(prompts, attention_mask=mask, do_sample=False, **kwargs)
        return ids[:, prompts.shape[1] :]

    def thaw_llm(self, tune_vision, dtype):
        """Thaw what stage 2 trains: the LLM with its embeddings and head, and the adapter.

        tune_vision: the vision tower too; otherwise it stays frozen and is cast to dtype.
        """
        self.llava.requires_grad_(True)
        if not tune_vision:
            self.vision_tower.to(dtype).requires_grad_(False)
            return
        # What comes after layer -2 gets no gradient, and DDP would wait for one. visual_tokens([])
        # runs a blank image: what took part has a gradient of 0 after it, the rest None.
        self.visual_tokens([]).sum().backward()
        for parameter in self.vision_tower.parameters():
            parameter.requires_grad_(parameter.grad is not None)
        self.zero_grad()

    @property
    def vision_tower(self):
        return self.llava.model.vision_tower

    @property
    def adapter(self):
        return self.llava.model.multi_modal_projector

    @property
    def embed_tokens(self):
        """Ψ, the LLM's input embedding layer. Gemma's multiplies its rows by √D when called."""
        return self.llava.get_input_embeddings()

    @property
    def log_scale(self):
        return self.temperature.log_scale

    @property
    def device(self):
        return self.log_scale.device

    def blocks(self):
        """(vision tower's, LLM's) transformer blocks: the units of sharding and compiling."""
        towers = self.vision_tower, self.llava.model.language_model
        return [next(m for m in t.modules() if isinstance(m, nn.ModuleList)) for t in towers]


# ----------------------------------------------------------------------------- attention


def decode(decoder, inputs, position_ids, lengths):
    """The hidden states [L, D] of sequences that lie one after another in inputs [L, D].

    position_ids [L] restart with each sequence; lengths, a list, says how long each is.
    """
    out = decoder(
        inputs_embeds=inputs[None],
        position_ids=position_ids[None],
        # Without a mask transformers would make its own, and wait for the GPU to see the positions.
        # One of four dimensions is passed on as it is. packed_attention does not look at it; with
        # NaN any other attention, which would mix the sequences, gives NaN.
        attention_mask=torch.full((1, 1, 1, 1), math.nan, device=inputs.device),
        lengths=lengths,
        use_cache=False,
    )
    return out.last_hidden_state[0]


def packed_attention(
    module, query, key, value, attention_mask, lengths=None, sliding_window=None, **kwargs
):
    """Attention within each of the sequences that lie one after another, for transformers.

    query, key, value [1, heads, L, width of a head] -> [1, L, heads, width], None. Without lengths,
    as in generating, attention_mask counts.
    """
    if lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    attend = attend_in_windows if sliding_window else attend_within
    return attend(module, query, key, value, lengths, sliding_window, **kwargs), None


def attend_within(module, query, key, value, lengths, sliding_window, **kwargs):
    """-> [1, L, heads, width]; arguments as of packed_attention."""
    outputs = []
    for q, k, v in zip(*(x.split(lengths, dim=2) for x in (query, key, value))):
        mask = None  # plainly causal
        n = q.shape[2]
        if sliding_window and n > sliding_window:  # a position sees so many, itself included
            is_near = torch.ones(n, n, dtype=torch.bool, device=q.device)
            mask = is_near.tril().triu(1 - sliding_window)[None, None]
        outputs.append(sdpa_attention_forward(module, q, k, v, mask, **kwargs)[0])
    return torch.cat(outputs, dim=1)


# --compile would compile it anew for each set of sequences that are longer than the window.
attend_in_windows = torch.compiler.disable(attend_within)
AttentionInterface.register("packed", packed_attention)
AttentionMaskInterface.register("packed", sdpa_mask)  # for generating


# ----------------------------------------------------------------------------- from parts


# Vision towers by the model_type of their config. Of a tower with a class token Llava drops the
# first token ("default"), otherwise none ("full").
TOWERS = {"clip_vision_model": "default", "siglip_vision_model": "full", "dinov2": "default"}


def new_model(vision, llm, dtype=torch.float32, tau=1.0):
    """A model from the names or folders of its parts. The adapter is new and in float32.

    With torch.device("meta") as the default device it has only shapes; no weights are read.
    """
    parts = {
        "vision": absolute(VISION.get(vision, str(vision))),
        "llm": absolute(LLMS.get(llm, str(llm))),
    }
    tower, preprocess = load_vision(parts["vision"], dtype)
    causal_lm, tokenizer = load_llm(parts["llm"], dtype)
    if causal_lm.device.type != "meta":
        parts["vision_digest"] = part_digest(tower)
        parts["llm_digest"] = part_digest(causal_lm, tokenizer.get_vocab())
    llava = assemble(tower, causal_lm, tokenizer, preprocess["size"])
    return SEAModel(llava, tokenizer, preprocess, parts, tau)


def assemble(tower, llm, tokenizer, image_size):
    """Put a vision tower, a new Adapter and an LLM into transformers' Llava."""
    fit_llm(llm)
    image_token_id = prepare_tokenizer(tokenizer)
    vocabulary_size = llm.config.vocab_size  # resizing changes the config's
    if len(tokenizer) > vocabulary_size:  # <image> has no row in the embedding
        llm.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64, mean_resizing=False)

    # Copies, for LlavaConfig changes the configs it is given, and with them the running models.
    config = LlavaConfig(
        vision_config=copy.deepcopy(tower.config),
        text_config=copy.deepcopy(llm.config),
        image_token_index=image_token_id,
        image_seq_length=(image_size // tower.config.patch_size) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy=TOWERS[tower.config.model_type],
        tie_word_embeddings=llm.config.tie_word_embeddings,
        architectures=["LlavaForConditionalGeneration"],
    )
    with torch.device("meta"):  # a frame without weights
        llava = LlavaForConditionalGeneration(config)
    llava.model.vision_tower = tower
    llava.model.language_model = llm.model
    llava.lm_head = llm.lm_head
    llava.model.multi_modal_projector = new_adapter(tower.config.hidden_size, llm)
    padding_ids = list(range(vocabulary_size, llm.config.vocab_size))
    llava.generation_config = generation_config(llm, tokenizer, padding_ids or None)
    return llava


# Their layers limit attention by a mask alone, which does not reach packed_attention.
HIDDEN_WINDOWS = ("llama4_text", "qwen2_moe", "phimoe", "doge")


@torch.no_grad()
def fit_llm(llm, name="--llm"):
    """Give an LLM packed_attention. UserError if it would not compute what it did without.

    It is run on a few tokens, as a whole and as SEAModel.forward runs it; not on the meta device.
    What begins at longer sequences is not seen; HIDDEN_WINDOWS names the known cases.
    """
    misfit = f"{name}: {type(llm).__name__} does not fit into transformers' Llava, which"
    modules = list(dict(llm.named_children()))
    is_usual = modules == ["model", "lm_head"] and hasattr(llm.model, "embed_tokens")
    if not is_usual or llm.lm_head.bias is not None:
        raise UserError(f"{misfit} takes a decoder with embed_tokens and an LM head without bias")
    if llm.config.model_type in HIDDEN_WINDOWS:
        raise UserError(
            f"{misfit} needs windows that attention functions are told; use another LLM"
        )
    if llm.device.type == "meta":
        llm.model.set_attn_implementation("packed")
        return
    ids = torch.arange(1, 9, device=llm.device) * (llm.config.vocab_size // 9)
    own = llm(ids[None], use_cache=False).logits[0].float()
    llm.model.set_attn_implementation("packed")
    if llm.model.config._attn_implementation != "packed":  # transformers only warns
        raise UserError(f"{misfit} needs attention functions that can be chosen; use another LLM")
    embeds = llm.get_input_embeddings()(ids)
    positions = torch.arange(8, device=llm.device)
    try:
        hidden = decode(llm.model, embeds, positions, [8])
        twice = decode(llm.model, embeds.repeat(2, 1), positions.repeat(2), [8, 8])
        # The mean is no row of the embedding: a decoder that looks up the ids of rows fails here.
        decode(llm.model, embeds.mean(0, keepdim=True), positions[:1], [1])
    except Exception as e:  # each decoder has its own way to say it
        raise UserError(
            f"{misfit} runs the decoder on embeddings of any kind, without ids, by torch's "
            f"scaled_dot_product_attention ({str(e)[:200]}); use another LLM"
        ) from e
    # Rounding stays far below this; softcapping or scaling does not. NaN is refused too.
    most = max(1e-6, torch.finfo(llm.dtype).eps / 16)
    difference = (llm.lm_head(hidden).float() - own).norm() / own.norm()
    if not difference <= most:
        raise UserError(
            f"{misfit} takes the logits from the LM head as they are: this LLM's own differ from "
            f"them by {100 * difference:.2g} %, as with softcapping or scaling; use another LLM"
        )
    first, second = twice.float().chunk(2)
    if not (first - second).norm() <= most * first.norm():
        raise UserError(
            f"{name}: {type(llm).__name__} does not keep sequences apart that lie one after "
            "another: it mixes positions otherwise than by transformers' attention; use another LLM"
        )


def absolute(name):
    """The path of a folder or file, found from any working directory; else a hub name as it is.

    Not resolved: in the hub's cache a GGUF file is a link to a file without the suffix.
    """
    return str(Path(name).absolute()) if os.path.exists(name) else name


def made_of(parts):
    """Where LLM and vision tower came from, or the Llava that had both: a list of names."""
    return [parts[key] for key in ("llm", "vision", "llava") if key in parts]


def part_digest(model, vocabulary=()):
    """A short fingerprint of a model's weights, and of a tokenizer's vocabulary {token: id}.

    It holds the first numbers of each parameter, in bfloat16 so that the dtype they are loaded in
    does not count. Names and order do not either: they differ between versions of transformers.
    """
    firsts = [p.detach().flatten()[:64].bfloat16().tolist() for p in model.parameters()]
    tokens = dict(vocabulary).items()
    return digest([*sorted(map(str, firsts)), *sorted(map(str, tokens))])


def new_adapter(d_vision, llm):
    """An Adapter into the input space of an LLM, whose embedding layer may scale its rows."""
    layer = llm.get_input_embeddings()
    return Adapter(d_vision, layer.embedding_dim, getattr(layer, "scalar_embed_scale", 1.0))


def generation_config(llm, tokenizer, suppress_tokens):
    """Greedy generation that ends with the chat format's end token or any that the LLM had."""
    ends = llm.generation_config.eos_token_id  # an id, a list of them, or None
    ends = ends if isinstance(ends, list) else [ends]
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=sorted({tokenizer.eos_token_id, *ends} - {None}),
        pad_token_id=tokenizer.pad_token_id,
        suppress_tokens=suppress_tokens,
    )


def load_vision(name, dtype):
    """A CLIP, SigLIP or DINOv2 vision tower from a hub name or folder, and its preprocess."""
    with user_errors(name):
        config = AutoConfig.from_pretrained(name)
        config = getattr(config, "vision_config", config)  # of a whole CLIP, text tower and all
        if config.model_type not in TOWERS:
            raise UserError(f"{name}: a {config.model_type}, none of {', '.join(TOWERS)}")
        return load_weights(AutoModel, name, config, dtype), vision_preprocess(name)


def load_llm(name, dtype):
    """A causal LM and its tokenizer from a hub name, a folder or a GGUF file."""
    kwargs = {}
    file = Path(name)
    if file.suffix == ".gguf":
        if not file.is_file():
            raise UserError(f"{file}: no such GGUF file (--llm)")
        name = file.parent
        kwargs = {"gguf_file": file.name}
    with user_errors(name):
        tokenizer = AutoTokenizer.from_pretrained(name, **kwargs)
        config = AutoConfig.from_pretrained(name, **kwargs)
        llm = load_weights(AutoModelForCausalLM, name, config, dtype, **kwargs)
    if kwargs:  # the weights were dequantized
        vars(llm.config).pop("quantization_config", None)
    return llm, tokenizer


@contextlib.contextmanager
def user_errors(name):
    """Turn the errors of a model that cannot be read or written into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:  # transformers and safetensors have many ways to say it
        reason = " ".join(f"{type(e).__name__}: {e}".split())[:200]
        raise UserError(
            f"{name}: cannot be loaded or saved ({reason}); give a folder with all its files, none "
            "of them truncated, or the name of a hub model that you have access to"
        ) from e


def load_weights(auto_class, name, config, dtype, **kwargs):
    """A model with all its weights, or UserError; on the meta device without weights."""
    if torch.get_default_device().type == "meta":
        return auto_class.from_config(config, dtype=dtype)
    model, info = auto_class.from_pretrained(
        name, config=config, dtype=dtype, output_loading_info=True, **kwargs
    )
    if info["missing_keys"]:
        raise UserError(f"{name}: has no weights for {sorted(info['missing_keys'])[:3]} ...")
    return model


# ----------------------------------------------------------------------------- from runs


def load_model(path, dtype=torch.float32, llm="", vision=""):
    """The SEAModel of a run (its out_dir, model/ or a checkpoint), a Llava folder or hub name.

    llm, vision: where the parts of an adapter are now, if not where they were in training.
    """
    folder = find_model(path)
    if (folder / "adapter.safetensors").is_file():
        return load_adapter(folder, dtype, {"llm": llm, "vision": vision})
    if llm or vision:
        raise UserError(f"{path}: is a whole Llava; --llm and --vision are not needed")
    return load_llava(str(folder), dtype)


def find_model(path):
    """The folder that holds a model: path itself, its model/ or its newest checkpoint.

    A path whose parent folder does not exist is taken for a hub name.
    """
    path = Path(path)
    if not path.parent.exists():
        return path
    for folder in (path, path / "model", *reversed(checkpoints(path).values())):
        for file in ("adapter.safetensors", "processor_config.json"):  # our run's, any Llava's
            if (folder / file).is_file():
                return folder
    raise UserError(
        f"{path}: no adapter.safetensors and no Llava model here, in model/ or in "
        "checkpoints/step_N/; give the --out_dir of a training run or a Llava folder"
    )


def checkpoints(out_dir):
    """{step: folder} of a run's checkpoints, the newest last."""
    folders = Path(out_dir).glob("checkpoints/step_*")
    steps = {int(f.name[5:]): f for f in folders if f.name[5:].isdigit()}
    return dict(sorted(steps.items()))


def load_adapter(folder, dtype, moved):
    """A new model of the parts that folder/adapter.safetensors names, with its weights.

    moved: {part: where it is now, or ""}.
    """
    file = folder / "adapter.safetensors"
    with user_errors(folder):
        origin = read_origin(file)
        saved = load_file(file)
        names = {part: moved[part] or origin[part] for part in ("llm", "vision")}
    for part, name in names.items():
        if os.path.isabs(name) and not os.path.exists(name):
            raise UserError(f"{file}: its {part} {name} is gone; say where it is: --{part}")
    model = new_model(**names, dtype=dtype)
    refuse_other_parts(file, model.parts)
    with user_errors(folder):
        model.preprocess["mode"] = origin["image_mode"]
        model.log_scale.data.copy_(saved.pop("log_scale"))
        model.adapter.load_state_dict({k.removeprefix("adapter."): w for k, w in saved.items()})
    return model


def read_origin(file):
    """What save_adapter wrote into an adapter's header."""
    with safe_open(file, "pt") as header:
        return header.metadata()


def refuse_other_parts(file, parts):
    """Raise UserError if an adapter was trained with other weights or another vocabulary."""
    origin = read_origin(file)
    for part in ("vision", "llm"):
        key = f"{part}_digest"
        if key in parts and key not in origin:
            print(f"{file}: of an older version; whether {parts[part]} is its {part} is unknown")
        elif key in parts and parts[key] != origin[key]:
            raise UserError(
                f"{file}: {parts[part]} is not the {part} that the adapter was trained with "
                f"({origin[part]} at that time); say where that is: --{part}"
            )


def load_llava(name, dtype):
    """The model of a Llava folder or hub name, such as save_llava writes."""
    with user_errors(name):
        config = AutoConfig.from_pretrained(name)
        is_llava = config.model_type == "llava" and config.vision_config.model_type in TOWERS
        if not is_llava or not isinstance(config.vision_feature_layer, int):
            raise UserError(
                f"{name}: a {config.model_type}; neither one of our runs nor a Llava that reads "
                f"one layer of {' or '.join(TOWERS)}"
            )
        llava = load_weights(AutoModelForImageTextToText, name, config, dtype)
        tokenizer = AutoTokenizer.from_pretrained(name)
        with torch.device("meta"):  # fit_llm needs the LLM's own class, around these weights
            llm = AutoModelForCausalLM.from_config(config.text_config)
        llm.model, llm.lm_head = llava.model.language_model, llava.lm_head
        fit_llm(llm, name)

        projector = llava.model.multi_modal_projector.float()
        adapter = new_adapter(projector.linear_1.in_features, llava)
        adapter.act = projector.act
        adapter.load_state_dict(projector.state_dict())
        preprocess = vision_preprocess(name)
    adapter.linear_2.weight.data /= adapter.output_scale  # saved weights include the scale
    adapter.linear_2.bias.data /= adapter.output_scale
    llava.model.multi_modal_projector = adapter

    if prepare_tokenizer(tokenizer) != llava.config.image_token_id:
        raise UserError(f"{name}: its image token is not {IMAGE_TOKEN}")
    suppressed = llava.generation_config.suppress_tokens
    llava.generation_config = generation_config(llava, tokenizer, suppressed)
    return SEAModel(llava, tokenizer, preprocess, {"llava": str(name)})


# ----------------------------------------------------------------------------- saving


def adapter_state(model):
    """Name -> tensor of the adapter and log_scale, whole and on the CPU.

    Every rank of a sharded model must call it.
    """
    state = {f"adapter.{name}": p.detach() for name, p in model.adapter.named_parameters()}
    state["log_scale"] = model.log_scale.detach()
    for name, w in state.items():
        state[name] = (w.full_tensor() if isinstance(w, DTensor) else w).cpu()
    return state


def full_state(model):
    """Name -> whole tensor on the CPU, on rank 0; every rank of a sharded model must call it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    for name, w in state.items():
        state[name] = w.clone()  # of uneven shards it is a view of padded memory, not to be saved
    return state


def save_adapter(folder, state, names):
    """Write folder/adapter.safetensors: adapter_state, and names in its header."""
    with user_errors(folder):
        save_file(state, Path(folder) / "adapter.safetensors", metadata=names)


def save_llava(model, folder, state, dtype):
    """Write a folder that LlavaForConditionalGeneration and AutoProcessor load.

    state: of full_state; its weights are written in dtype.
    """
    weights = {name: w.to(dtype) for name, w in portable_names(model, state).items()}
    with user_errors(folder):
        save_torch_state_dict(weights, folder)

    config = model.llava.config
    config.dtype = dtype
    config.save_pretrained(folder)
    model.llava.generation_config.save_pretrained(folder)
    LlavaProcessor(
        image_processor(**model.preprocess),
        model.tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=int(TOWERS[config.vision_config.model_type] == "default"),
        chat_template=model.tokenizer.chat_template,
    ).save_pretrained(folder)
    write_for_older_versions(Path(folder))


def write_for_older_versions(folder):
    """Change the JSON files of a Llava folder so that transformers 4.57 reads them, too.

    They also lose where its parts were on the machine that trained.
    """
    file = folder / "tokenizer_config.json"
    content = json.loads(file.read_text())
    for name in ("extra_special_tokens", "backend", "is_local", "local_files_only"):
        content.pop(name, None)  # of version 5 alone; tokenizer.json has the special tokens
    content["tokenizer_class"] = "PreTrainedTokenizerFast"
    content["model_input_names"] = ["input_ids", "attention_mask"]
    content["padding_side"] = "left"  # as generating needs it
    file.write_text(json.dumps(content, indent=2))

    file = folder / "config.json"
    content = json.loads(file.read_text())
    for part in (content, content["text_config"], content["vision_config"]):
        part.pop("_name_or_path", None)
        if "rope_theta" in (part.get("rope_parameters") or {}):
            part["rope_theta"] = part["rope_parameters"]["rope_theta"]
    file.write_text(json.dumps(content, indent=2))


def portable_names(model, state):
    """The weights of full_state under the names that vLLM and all transformers since 4.57 read."""
    is_dinov2 = model.vision_tower.config.model_type == "dinov2"
    renames = {  # patterns of what a name begins with
        "llava.": "",
        "model.": "",
        "vision_tower.vision_model.": "vision_tower.",  # as transformers before 5.23 names them
        "(vision_tower.*attention).q_proj": r"\1.attention.query",  # DINOv2's before 5.18
        "(vision_tower.*attention).k_proj": r"\1.attention.key",
        "(vision_tower.*attention).v_proj": r"\1.attention.value",
        "(vision_tower.*attention).o_proj": r"\1.output.dense",
        "vision_tower.": "vision_tower." if is_dinov2 else "vision_tower.vision_model.",
        "language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
    }
    weights = {}
    for name, weight in state.items():
        if "multi_modal_projector.linear_2" in name:
            weight = weight * model.adapter.output_scale
        for old, new in renames.items():  # one after another, each on the last one's result
            name = re.sub(f"^{old}", new, name)
        weights[name] = weight
    del weights["temperature.log_scale"]
    if model.llava.config.tie_word_embeddings:
        weights.pop("language_model.lm_head.weight", None)
    return weights
