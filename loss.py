"""The SEA loss: sampling pairs of patch and label (Eq. 9), word features (Eq. 10), Eq. 11, Eq. 13.

Tensors in, tensors out: nothing here knows a model, a file or a config.

Dimensions, in this file and all others:

    B images   m patches of an image (H x W grid)   n labels of a patch   q words   k window side
    N pairs    M tokens of a word                   d CLIP width          D LLM width
    S candidates for pairs: one for each window of the batch

Terms, with one meaning everywhere:

    word           an entry of the word list; `words` is the list of strings
    label          a word that CLIP gave to a patch, as its index into `words`; -1 means no label
    pair           a visual token and the word feature of the label drawn for its patch
    visual token   the adapter's output for one patch, x_v [D]
    word feature   the LLM's embedding of a word, Ψ(w) [D]
    targets        the token ids that the LLM learns to predict

Label tensors usually live on the CPU: without gather, choosing pairs costs no synchronisation.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Shard

# ----------------------------------------------------------------------------- the SEA loss


def sea_loss(
    visual_tokens,
    label_ids,
    label_scores,
    word_features_of,
    log_scale,
    grid,
    window=2,
    generator=None,
    gather=False,
    sampling="similarity",
    one_per_label=True,
    to_words=0.5,
):
    """Eq. 9 to 11 in order: one patch per window, one label each, one patch per label, the loss.

    visual_tokens: [B, m, D], the adapter's output.
    label_ids, label_scores: [B, m, n], as LabelStore returns them.
    word_features_of: a function from label ids [N] to word features [N, D] (Eq. 10).
    log_scale: one element, log(1/τ).
    grid: (H, W) with H * W = m; otherwise reshaping fails.
    generator: one torch.Generator of the CPU, or a list with one per image.
    For ablations: sampling="uniform" draws all labels of a patch alike, without one_per_label every
    patch that is drawn makes a pair, and to_words goes to contrastive_loss.

    Returns the loss and a dict for the log: `pairs`, the number of this rank's pairs, and
    `matched`, for how many of them no other word feature is nearer to the visual token.

    PAPER: "one batch" is the micro-batch of one rank. With gather it is the micro-batches of all
    ranks. Each rank then returns its share of the whole loss, times the number of ranks: DDP's mean
    adds the shares up. Ranks may hold different numbers of images.
    """
    if visual_tokens.shape[:2] != label_ids.shape[:2]:
        raise ValueError(f"visual tokens {visual_tokens.shape} for labels {label_ids.shape}")
    if sampling == "uniform":
        label_scores = label_scores.sign()
    patches, labels, priority = sample_pairs(label_ids, label_scores, grid, window, generator)
    patches = patches.to(visual_tokens.device, non_blocking=True)
    x = visual_tokens.flatten(0, 1)[patches]  # (S, D), S = B * windows
    is_own = torch.ones_like(labels, dtype=torch.bool)
    if gather:
        x, labels, priority, is_own = gather_pairs(x, labels, priority)

    # Equal inputs and stable sorts: with gather, every rank keeps the same pairs.
    if one_per_label:
        kept = one_patch_per_label(labels, priority=priority)
    else:
        kept = (labels >= 0).nonzero().flatten()
    x = x[kept.to(x.device, non_blocking=True)]  # (N, D)
    t = word_features_of(labels[kept])
    own_rows = is_own[kept].nonzero().flatten().to(x.device, non_blocking=True)
    loss = contrastive_loss(x, t, log_scale, own_rows, to_words)
    if gather:
        loss = loss * dist.get_world_size()

    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        cosine = F.normalize(x[own_rows].float(), dim=-1) @ F.normalize(t.float(), dim=-1).T
        is_nearest = (cosine <= cosine.gather(1, own_rows.unsqueeze(1))).all(-1)
    return loss, {"pairs": len(own_rows), "matched": is_nearest.sum()}


def total_loss(loss_g, loss_a, sea_weight):
    """L = L_g + λ L_a (Eq. 13)."""
    return loss_g + sea_weight * loss_a


# ----------------------------------------------------------------------------- which pairs


def sample_labels(label_ids, label_scores, generator=None):
    """Draw one label per patch with probability s_i / sum(s) (Eq. 9).

    label_ids [..., n] int64 (-1 = none), label_scores [..., n] -> [...] int64, -1 where a patch
    has no label. A label whose score is not positive is never drawn.
    """
    scores = label_scores.double().masked_fill(label_ids < 0, 0).clamp(min=0)
    cumulative = scores.cumsum(-1)
    total = cumulative[..., -1:]

    # Inverse of the cumulative distribution. Float32 noise is at most 1 - 2^-24, so the threshold
    # is below the total, and right=True skips scores of zero.
    noise = _uniform(label_ids[..., 0], generator)
    threshold = noise.double().unsqueeze(-1) * total
    first_above = torch.searchsorted(cumulative, threshold, right=True)
    drawn = label_ids.gather(-1, first_above.clamp(max=label_ids.shape[-1] - 1))
    return drawn.masked_fill(total <= 0, -1).squeeze(-1)


def sample_windows(valid, window, generator=None):
    """Choose one valid patch of each k x k window, uniformly (the localized sampling of Sec. 3.2).

    valid [B, H, W] bool -> [B, ceil(H/k) * ceil(W/k)] int64: flat patch index (row * W + column),
    -1 where a window has no valid patch.

    PAPER: a grid that k does not divide (27 x 27) has smaller windows at its edges, so that no
    patch is left out for ever.
    """
    noise = _uniform(valid, generator).masked_fill(~valid, -1)
    largest, patches = F.max_pool2d(noise, window, ceil_mode=True, return_indices=True)
    return patches.masked_fill(largest < 0, -1).flatten(1)


def one_patch_per_label(labels, generator=None, priority=None):
    """Keep one patch of each distinct label, uniformly chosen (Sec. 3.2).

    labels [N] int64 (-1 = none, never kept) -> indices [U] int64, one for each distinct label.
    priority [N] replaces the noise that decides; the lowest wins. Ranks that share it decide alike.
    """
    if priority is None:
        priority = _uniform(labels, generator)
    order = priority.argsort(stable=True)
    sorted_labels, by_label = labels[order].sort(stable=True)  # equal labels stay in that order
    # The first row of each label. Those of -1 stand first of all and equal the prepended -1.
    is_first = sorted_labels.diff(prepend=sorted_labels.new_tensor([-1])) > 0
    return order[by_label[is_first]]


def sample_pairs(label_ids, label_scores, grid, window, generator=None):
    """Candidates for pairs: one labelled patch of each window and one label for it.

    PAPER: the patch is drawn first, among the labelled ones, then its label.

    label_ids, label_scores [B, m, n], grid (H, W) -> patches (indices into B * m), labels (-1 where
    a window gives no pair), priority (noise for one_patch_per_label), each [B * windows].
    """
    B, m, _ = label_ids.shape
    has_label = ((label_ids >= 0) & (label_scores > 0)).any(-1)
    patches = sample_windows(has_label.view(B, *grid), window, generator)  # (B, windows)
    is_empty = patches < 0
    patches = patches.clamp(min=0) + m * torch.arange(B, device=patches.device).unsqueeze(1)

    ids = label_ids.flatten(0, 1)[patches]  # (B, windows, n)
    scores = label_scores.flatten(0, 1)[patches]
    labels = sample_labels(ids, scores, generator).masked_fill(is_empty, -1)
    priority = _uniform(labels, generator)
    return patches.flatten(), labels.flatten(), priority.flatten()


def _uniform(like, generator):
    """Uniform noise in [0, 1), of the shape and on the device of `like`, drawn on the CPU.

    A list holds one generator per image (dimension 0): what is drawn for an image then depends
    neither on the other images of the batch nor on the rank that holds it.
    """
    if isinstance(generator, list):
        noise = torch.stack([torch.rand(like.shape[1:], generator=g) for g in generator])
    else:
        noise = torch.rand(like.shape, generator=generator)
    return noise.to(like.device)


# ----------------------------------------------------------------------------- Eq. 10 and 11


def word_features(embedding_weight, token_ids, offsets):
    """The feature of a word: the mean of the LLM's input embeddings of its tokens (Eq. 10).

    embedding_weight [V, D]; token_ids [sum of M] int64, the tokens of all words one after another;
    offsets [N], where each word starts in them -> [N, D], in float32 or better.
    """
    token_embeds = _at_least_float32(F.embedding(token_ids, embedding_weight))
    # embedding_bag adds in the dtype of its table, so the table is not embedding_weight but
    # token_embeds, in which token i has row i.
    rows = torch.arange(len(token_ids), device=token_ids.device)
    return F.embedding_bag(rows, token_embeds, offsets, mode="mean")


def contrastive_loss(x, t, log_scale, rows=slice(None), to_words=0.5):
    """The symmetric alignment loss L_a (Eq. 11) with 1/τ = exp(log_scale).

    x [N, D] visual tokens, t [N, D] word features, log_scale one element -> scalar. It is 0, and
    has a backward pass, when N = 0. Computed in float32 or better, even under autocast (on a GPU
    in TF32 if that is on).
    rows: the pairs whose terms are added up, in ascending order; all by default. Losses over
    disjoint rows add up to the whole loss.
    to_words: the weight of finding the word of a visual token. Finding the visual token of a word
    has the rest.
    """
    with torch.autocast(x.device.type, enabled=False):
        x = F.normalize(_at_least_float32(x), dim=-1)
        t = F.normalize(_at_least_float32(t), dim=-1)
        scale = _at_least_float32(log_scale).exp()
        diagonal = torch.arange(len(x), device=x.device)[rows]
        logits = scale * x[rows] @ t.T
        transposed = logits.T if len(logits) == len(x) else scale * t[rows] @ x.T
        x_to_t = F.cross_entropy(logits, diagonal, reduction="sum")
        t_to_x = F.cross_entropy(transposed, diagonal, reduction="sum")
    return (to_words * x_to_t + (1 - to_words) * t_to_x) / max(1, len(x))


def _at_least_float32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ----------------------------------------------------------------------------- across ranks


def gather_pairs(x, labels, priority):
    """The candidates (see sample_pairs) of all ranks, on every rank, with a graph through x.

    x [S, D], labels and priority [S], S of each rank's own -> the same with the rows of all ranks,
    and is_own, which of them are this rank's. Ranks with fewer candidates than others are
    filled up with rows without a label.
    """
    slots = torch.tensor(len(x), device=x.device)
    dist.all_reduce(slots, dist.ReduceOp.MAX)
    missing = int(slots) - len(x)
    x = all_rows(F.pad(x, (0, 0, 0, missing)))
    labels = all_rows(F.pad(labels, (0, missing), value=-1).to(x.device))
    priority = all_rows(F.pad(priority, (0, missing)).to(x.device))
    is_own = torch.arange(len(x), device=x.device) // slots == dist.get_rank()
    return x, labels, priority, is_own


def all_rows(x):
    """[S, ...] of each of R ranks -> [R * S, ...] on every rank, with a graph."""
    mesh = init_device_mesh(x.device.type, (dist.get_world_size(),))
    rows_of_ranks = DTensor.from_local(x, mesh, [Shard(0)])
    # Partial: every rank has used this rank's rows, and their gradients are added up.
    return rows_of_ranks.full_tensor(grad_placements=[Partial()])
