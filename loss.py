"""SEA's alignment loss: which patch learns which word (Sec. 3.2, Eq. 9 to 11), and Eq. 13.

SEA is Supervised Embedding Alignment (EMNLP 2025). Tensors in, tensors out: nothing here knows a
model, a file or a config. Read sea_loss, then down. A comment that begins with "PAPER:" says, in
any file, where the paper is silent or is departed from, and what is done.

Dimensions, in this file and, unless it says otherwise, all others:

    B images   m patches of an image (H x W grid)   n labels of a patch   q words   k window side
    N pairs    M tokens of a word                   d CLIP width          D LLM width

Terms, with one meaning everywhere:

    word           an entry of the word list; `words` is the list of strings
    label          a word that CLIP gave to a patch, as its index into `words`; -1 means no label
    pair           a visual token and the word feature of the label drawn for its patch
    visual token   the adapter's output for one patch, x_v [D]
    word feature   the LLM's embedding of a word, Ψ(w) [D]
    targets        the token ids that the LLM learns to predict

Labels are on the CPU, visual tokens where the model is: without gather, choosing pairs never waits
for a GPU.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F


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
    sharpness=0.0,
):
    """L_a of one micro-batch: draw pairs of visual token and word, contrast them (Sec. 3.2).

    visual_tokens [B, m, D]; label_ids and label_scores [B, m, n], as LabelStore returns them;
    word_features_of: label ids [N] -> word features [N, D] (Eq. 10); log_scale: log(1/τ);
    grid: (H, W) with H * W = m.
    -> the loss and, for the log, {"pairs": N, "matched": the share of visual tokens whose nearest
    word, of all in the batch, is their own}.

    PAPER: "one batch", within which a label keeps one patch, is the micro-batch of a rank; with
    gather it is that of all ranks together, whose B must be equal.
    PAPER: every patch draws its label first; then only those that have one take part in windows.
    """
    if visual_tokens.shape[:2] != label_ids.shape[:2]:
        raise ValueError(f"visual tokens {visual_tokens.shape} for labels {label_ids.shape}")

    # One label of each patch (Eq. 9), -1 where it has none.
    if sharpness:
        label_scores = sharpened(label_ids, label_scores, sharpness)
    label = sample_labels(label_ids, label_scores, generator)  # (B, m)

    # One labelled patch of each k x k window. Where there is none, -1 reads the last patch: shapes
    # stay fixed for gather, and its label of -1 drops it below.
    patch = sample_windows((label >= 0).unflatten(1, grid), window, generator)  # (B, windows)
    image = torch.arange(len(patch)).unsqueeze(1)
    x = visual_tokens[to_device_of(visual_tokens, image), to_device_of(visual_tokens, patch)]
    x = x.flatten(0, 1)  # (B * windows, D)
    label = label[image, patch].masked_fill(patch < 0, -1).flatten()  # (B * windows)

    # One patch of each label.
    priority = torch.rand(len(label), generator=generator)
    if gather:
        label = all_rows(to_device_of(x, label)).cpu()
        priority = all_rows(to_device_of(x, priority)).cpu()
        x = all_rows(x)
    kept = one_patch_per_label(label, priority=priority)
    x = x[to_device_of(x, kept)]  # (N, D)
    t = word_features_of(label[kept])  # (N, D)

    # Each visual token finds its word among all N, and each word its visual token (Eq. 11).
    loss = contrastive_loss(x, t, log_scale)
    return loss, {"pairs": len(x), "matched": matched_share(x, t)}


def total_loss(loss_g, loss_a, sea_weight):
    """L = L_g + λ L_a (Eq. 13)."""
    return loss_g + sea_weight * loss_a


# ----------------------------------------------------------------------------- which pairs


def sample_windows(valid, window, generator=None):
    """Choose one valid patch of each k x k window, uniformly (the localized sampling of Sec. 3.2).

    valid [B, H, W] bool -> [B, ceil(H/k) * ceil(W/k)] int64: flat patch index (row * W + column),
    -1 where a window has no valid patch.

    PAPER: a grid that k does not divide (27 x 27) has smaller windows at its edges, so that their
    patches can be drawn too.
    """
    noise = torch.rand(valid.shape, generator=generator).masked_fill(~valid, -1)
    largest, patches = F.max_pool2d(noise, window, ceil_mode=True, return_indices=True)
    return patches.masked_fill(largest < 0, -1).flatten(1)


def sample_labels(label_ids, label_scores, generator=None):
    """Draw one label of each patch with probability s_i / sum(s) (Eq. 9).

    label_ids [..., n] int64 (-1 = none), label_scores [..., n] -> [...] int64, -1 where a patch has
    no label. A label whose score is not positive is never drawn.
    """
    scores = label_scores.float().masked_fill(label_ids < 0, 0).clamp(min=0)
    is_unlabelled = scores.sum(-1) == 0
    scores = scores.masked_fill(is_unlabelled.unsqueeze(-1), 1)  # multinomial takes no zero sums
    column = torch.multinomial(scores.reshape(-1, scores.shape[-1]), 1, generator=generator)
    drawn = label_ids.gather(-1, column.view(*is_unlabelled.shape, 1)).squeeze(-1)
    return drawn.masked_fill(is_unlabelled, -1)


def sharpened(label_ids, label_scores, sharpness):
    """Scores of which Eq. 9 draws with probability softmax(sharpness * s); [..., n] -> [..., n].

    PAPER: Eq. 9 draws by shares of cosines, which differ little from one label to the next: a
    patch's tenth word is drawn nearly as often as its first. 100 is the scale by which CLIP itself
    compares. An option: 0, the default, is Eq. 9 as it stands.
    """
    scores = label_scores.float().masked_fill(label_ids < 0, 0)
    best = scores.amax(-1, keepdim=True)
    return torch.exp(sharpness * (scores - best)) * (scores > 0)


def one_patch_per_label(labels, generator=None, priority=None):
    """Keep one patch of each distinct label, uniformly chosen (Sec. 3.2).

    labels [N] int64 (-1 = none, never kept) -> indices [U] int64, one for each distinct label.
    priority [N]: random numbers, of which the highest wins; ranks that share them decide alike.
    """
    if priority is None:
        priority = torch.rand(len(labels), generator=generator)
    labels = labels.tolist()
    patch_of = {}
    for i in priority.argsort(stable=True).tolist():
        if labels[i] >= 0:
            patch_of[labels[i]] = i  # a later one, of higher priority, takes its place
    return torch.tensor(list(patch_of.values()), dtype=torch.int64)


# ----------------------------------------------------------------------------- Eq. 10 and 11


def word_features(embedding_weight, token_ids, offsets):
    """The feature of a word: the mean of the LLM's input embeddings of its tokens (Eq. 10).

    embedding_weight [V, D]; token_ids [sum of M] int64, the tokens of all words one after another;
    offsets [N], where each word starts in them -> [N, D], averaged in the table's dtype, given in
    float32 or better.
    """
    features = F.embedding_bag(token_ids, embedding_weight, offsets, mode="mean")
    return at_least_float32(features)


def contrastive_loss(x, t, log_scale):
    """The symmetric alignment loss L_a (Eq. 11) with 1/τ = exp(log_scale).

    x [N, D] visual tokens, t [N, D] word features, log_scale one element -> scalar. It is 0, and
    has a backward pass, when N = 0. Computed in float32 or better, even under autocast: logits
    reach 1/τ. (TF32, where it is on, is left on.)

    At τ = 1 it begins near ln N and can hardly fall below ln N - 1, where every cosine of a pair is
    1 and all others are 0: 7.4 of 8.4 for 4,608 pairs, as many as 32 images of 144 windows have.
    """
    with torch.autocast(x.device.type, enabled=False):
        logits = at_least_float32(log_scale).exp() * cosines(x, t)  # (N, N)
        own = torch.arange(len(x), device=x.device)  # the pairs are on the diagonal
        x_to_t = F.cross_entropy(logits, own, reduction="sum")
        t_to_x = F.cross_entropy(logits.T, own, reduction="sum")
    return (x_to_t + t_to_x) / (2 * max(1, len(x)))


def cosines(x, t):
    """φ of Eq. 11 for every visual token and every word: [N, D], [N, D] -> [N, N]."""
    x = F.normalize(at_least_float32(x), dim=-1)
    t = F.normalize(at_least_float32(t), dim=-1)
    return x @ t.T


@torch.no_grad()
def matched_share(x, t):
    """The share of visual tokens whose nearest word is their own."""
    if not len(x):
        return torch.zeros((), device=x.device)
    with torch.autocast(x.device.type, enabled=False):
        cosine = cosines(x, t)
    return (cosine.diagonal() >= cosine.amax(1)).float().mean()


def at_least_float32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ----------------------------------------------------------------------------- devices and ranks


def to_device_of(like, x):
    """x, a tensor of the CPU, copied to the device of `like` without waiting for it."""
    return x.to(like.device, non_blocking=True)


class AllRows(torch.autograd.Function):
    """The rows of all R ranks, on every rank: [S, ...] -> [R * S, ...], with a graph.

    Every rank computes the same loss of all rows, so the whole gradient of a rank's own rows is
    there without a reduction. It is multiplied by R, because DDP's mean divides by R.
    """

    @staticmethod
    def forward(ctx, x):
        x = x.contiguous()
        rows = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, x)
        return torch.cat(rows)

    @staticmethod
    def backward(ctx, grad):
        ranks = dist.get_world_size()
        return ranks * grad.chunk(ranks)[dist.get_rank()]


all_rows = AllRows.apply
