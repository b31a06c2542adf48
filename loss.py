"""The SEA loss: sampling labels and patches (Eq. 9), word features (Eq. 10), the alignment loss (Eq. 11).

Tensors in, tensors out: nothing here knows a model, a file or a config. Dimensions, here and in every other file:

    B images   m patches of an image (H x W grid)   n labels of a patch   q words   k window side
    N pairs    M tokens of a word                   d CLIP width          D LLM width

Label tensors usually live on the CPU: choosing the pairs there costs no GPU synchronisation.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F


def _uniform(shape, generator, device):
    """Uniform noise in [0, 1). A list holds one generator per image (dimension 0): then what is drawn for an image
    does not depend on which other images are in the batch, nor on the rank that holds it."""
    if isinstance(generator, (list, tuple)):
        noise = [torch.rand(shape[1:], generator=g, device=g.device) for g in generator]
        return torch.stack(noise).to(device) if noise else torch.empty(shape, device=device)
    return torch.rand(
        shape, generator=generator, device=generator.device if generator else device
    ).to(device)


def _at_least_fp32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ------------------------------------------------------------------------------------------------ which pairs


def sample_labels(label_ids, label_scores, generator=None):
    """Draw one label per patch with probability s_i / sum(s) (Eq. 9).

    label_ids [..., n] int64 (-1 = none), label_scores [..., n] -> [...] int64, -1 where a patch has no label.
    A label whose score is not positive is never drawn.
    """
    p = label_scores.double().masked_fill(label_ids < 0, 0).clamp(min=0)
    cdf = p.cumsum(-1)
    total = cdf[..., -1:]
    # float32 noise stays below 1 by far more than float64 rounding: u * total < total, so an entry of probability
    # zero is never reached, not even a trailing one
    u = _uniform(label_ids.shape[:-1], generator, label_ids.device).double().unsqueeze(-1) * total
    drawn = (cdf <= u).sum(-1, keepdim=True).clamp(max=label_ids.shape[-1] - 1)
    return label_ids.gather(-1, drawn).masked_fill(total <= 0, -1).squeeze(-1)


def sample_windows(valid, window, generator=None):
    """Choose one valid patch of each k x k window, uniformly (the localized sampling of Sec. 3.2).

    valid [B, H, W] bool -> [B, ceil(H/k) * ceil(W/k)] int64: flat patch index (row * W + column), -1 where a
    window has no valid patch.
    PAPER: a grid that k does not divide (27 x 27) has smaller windows at its edges, so no patch is left out for ever.
    """
    noise = _uniform(valid.shape, generator, valid.device).masked_fill(~valid, -1)
    best, patch = F.max_pool2d(noise, window, ceil_mode=True, return_indices=True)
    return patch.masked_fill(best < 0, -1).flatten(1)


def one_patch_per_label(labels, generator=None, priority=None):
    """Keep one patch of each distinct label, uniformly chosen (Sec. 3.2: patches that share a label in one batch).

    labels [N] int64 (-1 = none, never kept) -> indices [U] int64. priority [N] replaces the noise that decides,
    for callers that must decide alike on every rank: the lowest wins.
    """
    if priority is None:
        priority = _uniform(labels.shape, generator, labels.device)
    order = priority.argsort(stable=True)
    grouped, by_label = labels[order].sort(
        stable=True
    )  # within a label, still in order of priority
    first = grouped >= 0
    first[1:] &= grouped[1:] != grouped[:-1]
    return order[by_label[first]]


def sample_pairs(label_ids, label_scores, grid, window, generator=None):
    """One labelled patch of each window, one label for it, and the priority that settles who keeps a shared label.

    PAPER: in this order: a window without a labelled patch gives no pair.
    label_ids, label_scores [B, m, n], grid (H, W) -> patch (into B*m), label, priority, each [B * windows];
    label is -1 where the window gives no pair.
    """
    B, m, n = label_ids.shape
    labelled = ((label_ids >= 0) & (label_scores > 0)).any(-1)
    patch = sample_windows(labelled.view(B, *grid), window, generator)  # (B, windows)
    at = patch.clamp(min=0).unsqueeze(-1).expand(-1, -1, n)
    label = sample_labels(
        label_ids.gather(1, at), label_scores.gather(1, at), generator
    ).masked_fill(patch < 0, -1)
    priority = _uniform(label.shape, generator, label.device)
    patch = patch.clamp(min=0) + m * torch.arange(B, device=patch.device).unsqueeze(1)
    return patch.flatten(), label.flatten(), priority.flatten()


# --------------------------------------------------------------------------------------------------- the loss


def word_features(embedding_weight, token_ids, offsets):
    """The text feature of a word: the mean of the LLM's input embeddings of its tokens (Eq. 10).

    embedding_weight [V, D], token_ids [sum of M] int64 of all words one after another, offsets [N] where each word
    starts -> [N, D], at least float32.
    """
    rows = _at_least_fp32(F.embedding(token_ids, embedding_weight))
    return F.embedding_bag(torch.arange(len(rows), device=rows.device), rows, offsets, mode="mean")


def contrastive_loss(x, t, log_scale, rows=slice(None)):
    """The symmetric alignment loss L_a (Eq. 11) with 1/τ = exp(log_scale), in fp32 even under autocast.

    x [N, D] visual tokens, t [N, D] text features, log_scale one element -> scalar: 0 with a graph when N = 0.
    rows: the part of the N pairs to answer for, as an index; over a partition the parts add up to the loss.
    """
    return _contrastive(x, t, log_scale, rows)[0]


def _contrastive(x, t, log_scale, rows=slice(None)):
    """-> loss, and how many of `rows` are nearest to their own text feature."""
    N = len(x)
    if N == 0:
        return (x.sum() + t.sum() + log_scale.sum()) * 0, torch.zeros((), device=x.device)
    with torch.autocast(x.device.type, enabled=False):
        x = F.normalize(_at_least_fp32(x), dim=-1)
        t = F.normalize(_at_least_fp32(t), dim=-1)
        scale = _at_least_fp32(log_scale).exp()
        target = torch.arange(N, device=x.device)[rows]
        x_to_t = scale * x[rows] @ t.T  # (rows, N)
        t_to_x = scale * t[rows] @ x.T
        loss = F.cross_entropy(x_to_t, target, reduction="sum") + F.cross_entropy(
            t_to_x, target, reduction="sum"
        )
    return loss / (2 * N), (x_to_t.argmax(-1) == target).sum()


class _AllGather(torch.autograd.Function):
    """[S, ...] of each of R ranks -> [R * S, ...] on every rank; backward adds up what all ranks ask of one's rows."""

    @staticmethod
    def forward(ctx, x):
        out = x.new_empty(dist.get_world_size() * len(x), *x.shape[1:])
        dist.all_gather_into_tensor(out, x.contiguous())
        return out

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def sea_loss(
    visual_tokens,
    label_ids,
    label_scores,
    word_vectors,
    log_scale,
    grid,
    window=2,
    generator=None,
    gather=False,
):
    """Eq. 9 to 11 in order: windows, labels, one patch per label, contrastive loss.

    visual_tokens [B, m, D] (the adapter's output), label_ids and label_scores [B, m, n], word_vectors a function
    labels [N] -> text features [N, D] (Eq. 10), grid (H, W) with H * W = m, generator one or a list of B.
    Returns the loss and a dict for the log: this rank's pairs, and how many of them are matched (of all text
    features in the batch, the visual token is nearest to its own label's).

    PAPER: "one batch" is the rank's micro-batch. With gather it is the micro-batch of all ranks: each rank answers
    for its own rows against all columns, times the world size, so that the mean which DDP takes over ranks is the
    loss, and the gradient, of one process that holds the whole batch. Ranks may hold different numbers of images.
    """
    if label_ids.shape[1] != grid[0] * grid[1] or visual_tokens.shape[:2] != label_ids.shape[:2]:
        raise ValueError(
            f"visual tokens {tuple(visual_tokens.shape)} and labels {tuple(label_ids.shape)} must both "
            f"be [B, {grid[0]} x {grid[1]}, ...]"
        )
    patch, label, priority = sample_pairs(label_ids, label_scores, grid, window, generator)
    x, rows, world = visual_tokens.flatten(0, 1)[patch.to(visual_tokens.device)], slice(None), 1
    if gather:
        world, slots = dist.get_world_size(), torch.tensor(len(x), device=x.device)
        dist.all_reduce(slots, dist.ReduceOp.MAX)
        pad = (
            0,
            int(slots) - len(x),
        )  # ragged ranks meet in a common number of slots, the empty ones labelled -1
        x = _AllGather.apply(F.pad(x, (0, 0, *pad)))
        label = _AllGather.apply(F.pad(label, pad, value=-1).to(x.device))
        priority = _AllGather.apply(F.pad(priority, pad).to(x.device))
    kept = one_patch_per_label(
        label, priority=priority
    )  # the same on every rank: equal inputs, stable sorts
    if gather:
        rows = (kept // slots == dist.get_rank()).nonzero().flatten()
    loss, matched = _contrastive(x[kept.to(x.device)], word_vectors(label[kept]), log_scale, rows)
    return loss * world, {"pairs": len(kept[rows]), "matched": matched}


def total_loss(loss_g, loss_a, sea_weight):
    """L = L_g + λ L_a (Eq. 13)."""
    return loss_g + sea_weight * loss_a
