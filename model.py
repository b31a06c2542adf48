"""The multimodal LLM: a transformers vision tower, the adapter, a transformers causal LM (Eq. 1-3, 12).

`SEAModel.forward` takes a batch of data.py and returns the losses. Only the adapter and log_scale (1/τ = exp) are
trained; the vision tower and the LLM are frozen.
"""

from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionModel,
    Dinov2Model,
    SiglipVisionModel,
)

from adapter import Adapter
from data import IGNORE, UserError, add_image_token, vision_geometry, word_tokens
from loss import sea_loss, word_features

TOWERS = {"clip": CLIPVisionModel, "clip_vision_model": CLIPVisionModel, "siglip": SiglipVisionModel,
          "siglip_vision_model": SiglipVisionModel, "dinov2": Dinov2Model}


# --------------------------------------------------------------------------------------------------- loading


def _from_pretrained(cls, name, **kwargs):
    """cls.from_pretrained, for a hub name or a local folder; refuses weights that do not fill the model."""
    try:
        if not issubclass(cls, nn.Module):
            return cls.from_pretrained(name, **kwargs)
        model, info = cls.from_pretrained(name, output_loading_info=True, **kwargs)
    except (OSError, ValueError, SafetensorError) as e:
        raise UserError(f"{name}: cannot be loaded as {cls.__name__} ({str(e).strip().splitlines()[0]}); give a "
                        "local folder or a hub name") from e
    if info["missing_keys"]:
        raise UserError(f"{name}: no weights for {sorted(info['missing_keys'])[:3]} ... of {cls.__name__}")
    return model


def load_vision(name, dtype=torch.float32):
    """A CLIP, SigLIP or DINOv2 vision tower."""
    kind = _from_pretrained(AutoConfig, name).model_type
    if kind not in TOWERS:
        raise UserError(f"{name}: not a vision tower of a known kind (model_type {kind!r}; known: {', '.join(TOWERS)})")
    return _from_pretrained(TOWERS[kind], name, dtype=dtype)


def load_llm(name, dtype=torch.float32):
    """A causal LM and its tokenizer: hub name, folder, GGUF file, or a folder that holds one GGUF file."""
    path, kwargs = Path(name), {}
    gguf = sorted(path.glob("*.gguf")) if path.is_dir() and not (path / "config.json").exists() else []
    if path.suffix == ".gguf" or len(gguf) == 1:
        path = gguf[0] if gguf else path
        if not path.is_file():
            raise UserError(f"{path}: no such GGUF file (--llm)")
        name, kwargs = path.parent, {"gguf_file": path.name}
    return (_from_pretrained(AutoModelForCausalLM, name, dtype=dtype, **kwargs),
            _from_pretrained(AutoTokenizer, name, **kwargs))


def find_adapter(path):
    """The folder with adapter.safetensors in an out_dir, its model/, its newest checkpoint, or path itself."""
    path = Path(path)
    newest = sorted(path.glob("checkpoints/step_*[0-9]"), key=lambda p: int(p.name.split("_")[1]))[-1:]
    for folder in (path, path / "model", *newest):
        if (folder / "adapter.safetensors").is_file():
            return folder
    raise UserError(f"{path}: no adapter.safetensors here, in model/ or in checkpoints/step_N/; give the --out_dir "
                    "of a training run")


# ----------------------------------------------------------------------------------------------------- model


class SEAModel(nn.Module):
    """names: where vision tower and LLM came from, kept beside the adapter's weights. geometry: keywords of
    data.geometry. tau: the initial temperature of Eq. 11.

    PAPER: "zero temperature" is a learnable log-scale that starts at 0, i.e. τ = 1.
    """

    def __init__(self, vision, llm, tokenizer, geometry, names, tau=1.0, feature_layer=-2):
        super().__init__()
        self.vision, self.llm = vision.eval().requires_grad_(False), llm.eval().requires_grad_(False)
        self.tokenizer, self.geometry, self.names, self.feature_layer = tokenizer, geometry, names, feature_layer
        self.image_token_id = add_image_token(tokenizer)
        self.grid = (geometry["size"] // vision.config.patch_size,) * 2
        self.image_tokens = self.grid[0] * self.grid[1]
        scale = float(getattr(self.embed_tokens, "embed_scale", 1.0))
        self.adapter = Adapter(vision.config.hidden_size, self.embed_tokens.weight.shape[1], scale)
        self.log_scale = nn.Parameter(torch.full((1,), -float(torch.tensor(tau).log())))
        self.words = None  # token ids and offsets of the label words, see set_words

    @classmethod
    def from_parts(cls, vision, llm, dtype=torch.float32, tau=1.0):
        """A new model from the names or folders of its parts; the adapter is freshly initialised, in fp32."""
        names = dict(vision=str(vision), llm=str(llm))
        tower, geometry = load_vision(vision, dtype), vision_geometry(vision)
        llm, tokenizer = load_llm(llm, dtype)
        return cls(tower, llm, tokenizer, geometry, names, tau)

    @classmethod
    def from_run(cls, path, dtype=torch.float32):
        """The model of a training run: its out_dir, its model/, or one checkpoint."""
        path = find_adapter(path) / "adapter.safetensors"
        try:
            with safe_open(path, "pt") as f:
                names = f.metadata()
        except SafetensorError as e:
            raise UserError(f"{path}: truncated or corrupt ({e}); use an earlier checkpoint") from e
        model = cls.from_parts(names["vision"], names["llm"], dtype)
        model.load_adapter(path)
        return model

    @property
    def embed_tokens(self):
        """Ψ: the LLM's input embedding layer. Called, not indexed: some models scale inside it."""
        return self.llm.get_input_embeddings()

    def trained_state(self):
        """Name -> tensor of all that stage 1 trains."""
        return {name: p.detach() for name, p in self.named_parameters() if name.startswith(("adapter.", "log_scale"))}

    def save_adapter(self, folder):
        """Write folder/adapter.safetensors: the adapter, log_scale, and in its header the names of the parts."""
        state = {name: p.cpu().contiguous() for name, p in self.trained_state().items()}
        save_file(state, Path(folder) / "adapter.safetensors", metadata=self.names)

    def load_adapter(self, path):
        own, saved = self.trained_state(), load_file(path)
        shapes = [{name: tuple(t.shape) for name, t in state.items()} for state in (own, saved)]
        if shapes[0] != shapes[1]:
            raise UserError(f"{path}: holds {shapes[1]}, this vision tower and LLM need {shapes[0]}")
        for name, p in own.items():
            p.copy_(saved[name])

    # ----------------------------------------------------------------------------------------------- forward

    def encode_image(self, pixels):
        """X_v = g_θ(f(X_image)) (Eq. 1): pixels [B, 3, S, S] -> visual tokens [B, m, D].

        f is the tower's second-to-last layer without class or register tokens, as in LLaVA.
        """
        with torch.no_grad():
            hidden = self.vision(pixels.to(self.vision.dtype), output_hidden_states=True).hidden_states
        features = hidden[self.feature_layer][:, -self.image_tokens:]
        return self.adapter(features.to(self.adapter.linear_1.weight.dtype))

    def embed(self, input_ids, visual_tokens):
        """X_input (Eq. 3): text embeddings [B, L, D] with the visual tokens in the places of the image token."""
        is_image = input_ids == self.image_token_id
        x = self.embed_tokens(input_ids.masked_fill(is_image, 0))
        return x.masked_scatter(is_image.unsqueeze(-1), visual_tokens.to(x.dtype))

    def forward(self, input_ids, attention_mask, labels, pixels, label_ids=None, label_scores=None, num_targets=None,
                window=2, generator=None, gather_pairs=False):
        """A batch of data.collate -> dict of loss_g (Eq. 12), and with labels loss_a (Eq. 11), pairs, matched.

        PAPER: L_g is a mean over trained tokens. num_targets is what the sum is divided by, for a mean over several
        micro-batches and ranks; by default the number in this batch.
        """
        visual_tokens = self.encode_image(pixels)
        x = self.embed(input_ids, visual_tokens)
        hidden = self.llm.get_decoder()(inputs_embeds=x, attention_mask=attention_mask, use_cache=False)[0]
        trained = labels[:, 1:] != IGNORE  # position i predicts token i + 1; the others never meet the LM head
        logits = self.llm.get_output_embeddings()(hidden[:, :-1][trained]).float()
        if cap := getattr(self.llm.config.get_text_config(), "final_logit_softcapping", None):
            logits = cap * torch.tanh(logits / cap)
        total = F.cross_entropy(logits, labels[:, 1:][trained], reduction="sum")
        out = dict(loss_g=total / (trained.sum().clamp(min=1) if num_targets is None else num_targets))
        if label_ids is not None:
            out["loss_a"], pairs = sea_loss(visual_tokens, label_ids, label_scores, self.word_vectors, self.log_scale,
                                            self.grid, window, generator, gather_pairs)
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
        kwargs = dict(do_sample=False, pad_token_id=self.tokenizer.pad_token_id or 0) | kwargs
        return self.llm.generate(inputs_embeds=x, attention_mask=attention_mask, **kwargs)
