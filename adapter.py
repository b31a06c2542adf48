"""The adapter g_θ: visual features -> the LLM's input space (Eq. 1)."""

import torch.nn as nn


class Adapter(nn.Module):
    """LLaVA-1.5's projector: Linear(d_vision -> d_llm), GELU (exact), Linear(d_llm -> d_llm).

    features [..., d_vision] -> visual tokens [..., d_llm]. PyTorch's default initialisation.

    PAPER: output_scale is the factor by which the LLM multiplies its own embeddings (Gemma: √D), so
    that text and image keep the relative scale of LLaVA, where the LLM multiplied both. Cosines do
    not see it.
    """

    def __init__(self, d_vision, d_llm, output_scale=1.0):
        super().__init__()
        self.linear_1 = nn.Linear(d_vision, d_llm)
        self.act = nn.GELU()
        self.linear_2 = nn.Linear(d_llm, d_llm)
        self.output_scale = output_scale

    def forward(self, features):
        features = features.to(self.linear_1.weight.dtype)  # a frozen tower gives bfloat16
        return self.linear_2(self.act(self.linear_1(features))) * self.output_scale
