"""loss.py against naive float64 loops of Eq. 9 to 11, open_clip's loss, probabilities by hand."""

import math

import open_clip.loss
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from loss import (
    contrastive_loss,
    one_patch_per_label,
    sample_labels,
    sample_windows,
    sea_loss,
    sharpened,
    total_loss,
    word_features,
)

few = settings(max_examples=60, deadline=None, derandomize=True)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def check_frequencies(drawn, probability):
    """Each value of drawn occurs as often as probability {value: p} says.

    Within five standard deviations.
    """
    N = drawn.numel()
    assert set(drawn.unique().tolist()) == {value for value, p in probability.items() if p > 0}
    for value, p in probability.items():
        off = abs((drawn == value).sum().item() - N * p)
        assert off < 5 * math.sqrt(N * p * (1 - p)) + 1e-9, (value, p)


# ---------------------------------------------------------------------------------- sample_labels


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "ids, scores, probability",
    [
        ([7, 3, 5], [0.5, 0.25, 0.25], {7: 0.5, 3: 0.25, 5: 0.25}),
        # the sum leaves out -1's score
        ([7, 3, 5, -1], [0.03125, 0.09375, 0.125, 0.75], {7: 0.125, 3: 0.375, 5: 0.5}),
        ([-1, 4, 9, 2, 8], [0.5, 0.0, 0.75, -0.5, 0.25], {9: 0.75, 8: 0.25, 4: 0, 2: 0, -1: 0}),
        ([6], [0.001], {6: 1}),
        ([-1, -1], [0.5, 0.5], {-1: 1}),
        ([1, 2], [0.0, -0.5], {-1: 1}),
    ],
)
def test_labels_are_drawn_in_proportion_to_their_scores(ids, scores, probability, dtype):
    ids = torch.tensor(ids).expand(20_000, -1)
    scores = torch.tensor(scores, dtype=dtype).expand(20_000, -1)
    drawn = sample_labels(ids, scores, seeded(0))
    assert drawn.dtype == torch.int64
    check_frequencies(drawn, probability)


def test_float16_scores_do_not_lose_an_unlikely_label():
    """In float16, 1 + 0.0004 is 1."""
    scores = torch.tensor([1, 0.0004], dtype=torch.float16).expand(40_000, -1)
    drawn = sample_labels(torch.arange(2).expand(40_000, -1), scores, seeded(0))
    check_frequencies(drawn, {0: 0.9996, 1: 0.0004})


@few
@given(st.data())
def test_any_leading_shape_and_mixed_entries(d):
    shape = tuple(d.draw(st.lists(st.integers(1, 4), max_size=3)))
    n = d.draw(st.integers(1, 5))
    g = seeded(d.draw(st.integers(0, 999)))
    ids = torch.where(torch.rand(*shape, n, generator=g) < 0.4, -1, torch.arange(100, 100 + n))
    scores = (torch.rand(*shape, n, generator=g) - 0.4).round(decimals=1)
    drawn = sample_labels(ids, scores, g)
    assert drawn.shape == shape
    rows = zip(drawn.flatten().tolist(), ids.view(-1, n).tolist(), scores.view(-1, n).tolist())
    for choice, row_ids, row_scores in rows:
        possible = [i for i, s in zip(row_ids, row_scores) if i >= 0 and s > 0]
        assert choice in (possible or [-1])


@pytest.mark.parametrize("sharpness", [1.0, 20.0, 100.0])
def test_sharpened_scores_draw_by_their_softmax(sharpness):
    ids = torch.tensor([7, 3, 5, -1, 9])
    scores = torch.tensor([0.30, 0.29, 0.2, 0.9, 0.0])
    shares = (sharpness * scores[:3].double()).softmax(0).tolist()
    sharp = sharpened(ids, scores, sharpness).double()
    torch.testing.assert_close((sharp / sharp.sum()).tolist()[:3], shares, rtol=1e-4, atol=1e-9)
    assert sharp[3] == sharp[4] == 0
    drawn = sample_labels(ids.expand(40_000, -1), sharp.expand(40_000, -1), seeded(0))
    check_frequencies(drawn, dict(zip(ids[:3].tolist(), shares)) | {9: 0, -1: 0})


def test_a_patch_without_labels_has_none_when_sharpened():
    sharp = sharpened(torch.full((2, 3), -1), torch.rand(2, 3), 100.0)
    assert sharp.abs().sum() == 0


def test_the_loss_draws_by_sharpened_scores():
    """Sharp enough, each patch draws its best label; by default it often draws the other."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 64, 5, generator=generator)
    ids = torch.arange(128).view(1, 64, 2)
    scores = torch.tensor([0.3, 0.29]).expand(1, 64, 2)
    table = torch.randn(128, 5, generator=generator)
    seen = []

    def words(labels):
        seen.append(labels)
        return table[labels]

    for sharpness in (1000.0, 0.0):
        sea_loss(x, ids, scores, words, torch.zeros(1), (8, 8), 1, seeded(0), sharpness=sharpness)
    assert (seen[0] % 2 == 0).float().mean() > 0.95 and (seen[1] % 2 == 1).sum() > 20


def test_the_generator_decides_the_labels():
    ids, scores = torch.arange(1000).expand(50, -1), torch.ones(50, 1000)
    first, again, other = (sample_labels(ids, scores, seeded(s)) for s in (1, 1, 2))
    assert first.equal(again) and not first.equal(other)


# --------------------------------------------------------------------------------- sample_windows


@few
@given(
    B=st.integers(1, 3),
    H=st.integers(1, 7),
    W=st.integers(1, 7),
    k=st.integers(1, 9),
    seed=st.integers(0, 999),
    density=st.sampled_from([0.0, 0.2, 0.7, 1.0]),
)
def test_a_valid_patch_of_each_window(B, H, W, k, seed, density):
    g = seeded(seed)
    valid = torch.rand(B, H, W, generator=g) < density
    chosen = sample_windows(valid, k, g)
    assert chosen.dtype == torch.int64 and chosen.shape == (B, math.ceil(H / k) * math.ceil(W / k))
    for b in range(B):
        windows = [(top, left) for top in range(0, H, k) for left in range(0, W, k)]
        for at, (top, left) in zip(chosen[b].tolist(), windows):
            rows, columns = range(top, min(top + k, H)), range(left, min(left + k, W))
            cells = [r * W + c for r in rows for c in columns]
            assert at in ([cell for cell in cells if valid[b, cell // W, cell % W]] or [-1])


def test_every_valid_patch_of_a_window_is_as_likely():
    valid = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 0, 1, 0], [1, 1, 0, 0, 1]], dtype=torch.bool)
    chosen = sample_windows(valid.expand(20_000, -1, -1), 2, seeded(0))
    for window, cells in enumerate([[0, 1, 5], [2, 3, 8], [4], [10, 11], [-1], [14]]):
        check_frequencies(chosen[:, window], dict.fromkeys(cells, 1 / len(cells)))


def test_windows_are_chosen_independently():
    # {0, 1} and {2, 3}
    chosen = sample_windows(torch.ones(20_000, 1, 4, dtype=torch.bool), 2, seeded(0))
    check_frequencies(chosen[:, 0] * 10 + chosen[:, 1], dict.fromkeys([2, 3, 12, 13], 0.25))


# ---------------------------------------------------------------------------- one_patch_per_label


@few
@given(
    labels=st.lists(st.integers(-1, 5), max_size=30),
    seed=st.integers(0, 999),
    with_priority=st.booleans(),
)
def test_each_label_once_and_none_never(labels, seed, with_priority):
    priority = torch.rand(len(labels), generator=seeded(seed + 1)) if with_priority else None
    ids = torch.tensor(labels, dtype=torch.int64)
    kept = one_patch_per_label(ids, seeded(seed), priority).tolist()
    assert sorted(labels[i] for i in kept) == sorted(set(labels) - {-1})
    if with_priority:
        for i in kept:
            assert priority[i] == priority[ids == labels[i]].max()


def test_every_patch_of_a_label_is_as_likely():
    groups = torch.arange(4000).unsqueeze(1)  # 4000 times two labels of their own
    labels = torch.tensor([0, 1, 0, -1, 0, 1]) + 2 * groups
    labels[:, 3] = -1
    kept = one_patch_per_label(labels.flatten(), seeded(0)).sort()[0].view(4000, 2) - 6 * groups
    expected = {10 * min(a, b) + max(a, b): 1 / 6 for a in (0, 2, 4) for b in (1, 5)}
    check_frequencies(kept[:, 0] * 10 + kept[:, 1], expected)


def test_highest_priority_wins_and_of_equal_ones_the_last():
    labels = torch.tensor([8, 2, 8, 2, -1, 8, 4, 4])
    priority = torch.tensor([0.5, 0.9, 0.8, 0.1, 1.0, 0.7, 0.3, 0.3])
    assert sorted(one_patch_per_label(labels, priority=priority).tolist()) == [1, 2, 7]


# ---------------------------------------------------------------------------------- word features

# words of 1 to 5 tokens, some of them repeated
WORD_TOKENS = [[3], [0, 1], [4, 4, 2], [6, 0, 0, 5], [1, 3, 5, 7, 1]]
TOKEN_IDS = torch.tensor(sum(WORD_TOKENS, []))
OFFSETS = torch.tensor([0, 1, 3, 6, 10])


@pytest.mark.parametrize(
    "dtype, result",
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_a_word_is_the_mean_of_its_tokens(dtype, result):
    table = torch.randn(9, 6, generator=seeded(0)).to(dtype).requires_grad_()
    upstream = torch.randn(5, 6, generator=seeded(1), dtype=torch.float64)
    features = word_features(table, TOKEN_IDS, OFFSETS)
    features.backward(upstream.to(result))

    rows = table.detach().double()
    exact = torch.stack([sum(rows[token] for token in word) / len(word) for word in WORD_TOKENS])
    assert features.dtype == result
    # the mean has the precision of the table
    rounding = torch.finfo(dtype).eps if dtype.itemsize == 2 else 1e-6
    torch.testing.assert_close(features.double(), exact, rtol=rounding, atol=1e-6)
    grad = torch.zeros(9, 6, dtype=torch.float64)
    for word, up in zip(WORD_TOKENS, upstream):
        for token in word:
            grad[token] += up / len(word)
    tolerance = 1e-6 if dtype.itemsize > 2 else 2e-2  # the gradient adds up in the table's own type
    torch.testing.assert_close(table.grad.double(), grad, rtol=tolerance, atol=tolerance)
    assert (table.grad[8] == 0).all()


def test_no_words_give_no_features():
    none = torch.tensor([], dtype=torch.int64)
    assert word_features(torch.randn(4, 3), none, none).shape == (0, 3)


# ------------------------------------------------------------------------------- contrastive loss


def naive_loss(x, t, log_scale):
    """Eq. 11 one pair at a time, as it is printed."""
    N, tau, loss = len(x), torch.exp(-log_scale), 0.0
    cos = [[(x[i] @ t[j]) / (x[i].norm() * t[j].norm()) for j in range(N)] for i in range(N)]
    for i in range(N):
        numerator = torch.exp(cos[i][i] / tau)
        over_texts = sum(torch.exp(cos[i][j] / tau) for j in range(N))
        over_patches = sum(torch.exp(cos[j][i] / tau) for j in range(N))
        loss = loss + torch.log(numerator / over_texts) + torch.log(numerator / over_patches)
    return -loss / (2 * N)


def pairs(N, D=5, dtype=torch.float32, scale=1 / 0.07, seed=0):
    """x, t, log_scale, for which the gradient is asked."""
    g = seeded(seed)
    x = torch.randn(N, D, generator=g, dtype=dtype) * 3
    t = torch.randn(N, D, generator=g, dtype=dtype) * 0.1
    return [v.requires_grad_() for v in (x, t, torch.tensor(math.log(scale), dtype=dtype))]


def in_float64(*values):
    return [v.detach().double().requires_grad_() for v in values]


def gradients(loss, inputs):
    return torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("N, scale", [(2, 1), (3, 1 / 0.07), (8, 1 / 0.07), (5, 100)])
def test_loss_and_gradients_are_those_of_equation_11(N, scale, dtype):
    inputs = pairs(N, dtype=dtype, scale=scale)
    exact_inputs = in_float64(*inputs)
    loss, exact = contrastive_loss(*inputs), naive_loss(*exact_inputs)
    rtol, atol = (1e-9, 1e-12) if dtype == torch.float64 else (2e-4, 2e-5)
    tolerance = dict(rtol=rtol, atol=atol)
    assert loss.dtype == dtype
    torch.testing.assert_close(loss.double(), exact, **tolerance)
    for grad, exact_grad in zip(gradients(loss, inputs), gradients(exact, exact_inputs)):
        torch.testing.assert_close(grad.double(), exact_grad, **tolerance)


def test_gradcheck():
    assert torch.autograd.gradcheck(contrastive_loss, pairs(4, 3, torch.float64, scale=3))


@pytest.mark.parametrize("N", [1, 2, 17])
def test_equals_open_clips_loss(N):
    x, t, log_scale = pairs(N)
    unit_x, unit_t = F.normalize(x, dim=-1), F.normalize(t, dim=-1)
    expected = open_clip.loss.ClipLoss()(unit_x, unit_t, log_scale.exp())
    torch.testing.assert_close(contrastive_loss(x, t, log_scale), expected)


@pytest.mark.parametrize("N", [0, 1])
def test_no_pair_or_one_pair_gives_zero_with_a_graph(N):
    inputs = pairs(N)
    loss = contrastive_loss(*inputs)
    assert loss.shape == () and loss == 0
    loss.backward()
    for v in inputs:
        assert v.grad.shape == v.shape and (v.grad.abs() < 1e-6).all()


def test_log_scale_may_have_a_dimension():
    x, t, log_scale = pairs(4)
    loss = contrastive_loss(x, t, log_scale.view(1))
    exact = naive_loss(*in_float64(x, t, log_scale))
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)


def test_autocast_changes_nothing():
    inputs = pairs(9)
    plain = contrastive_loss(*inputs)
    plain_grads = gradients(plain, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert (inputs[0] @ inputs[1].T).dtype == torch.bfloat16  # autocast is on
        loss = contrastive_loss(*inputs)
    assert loss.dtype == torch.float32 and loss == plain
    assert all(a.equal(b) for a, b in zip(gradients(loss, inputs), plain_grads))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_computed_in_float32(dtype):
    x, t, log_scale = (v.detach().to(dtype) for v in pairs(9))
    loss = contrastive_loss(x, t, log_scale)
    assert loss.dtype == torch.float32
    exact = naive_loss(*in_float64(x, t, log_scale))
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)


def test_order_of_the_pairs_does_not_matter():
    x, t, log_scale = pairs(11, dtype=torch.float64)
    order = torch.randperm(11, generator=seeded(1))
    loss = contrastive_loss(x, t, log_scale)
    torch.testing.assert_close(contrastive_loss(x[order], t[order], log_scale), loss)
    assert abs(contrastive_loss(x[order], t, log_scale) - loss) > 0.1


def test_where_the_loss_begins_and_where_it_ends_at_tau_1():
    """4,608 pairs: no cosine but 0, then those of pairs 1 and all others 0, by hand."""
    N = 4608
    words = torch.eye(N + 1)
    begin = contrastive_loss(words[-1].expand(N, -1), words[:N], torch.tensor(0.0))
    end = contrastive_loss(words[:N], words[:N], torch.tensor(0.0))
    assert abs(begin - math.log(N)) < 1e-3 and abs(begin - 8.4) < 0.05
    assert abs(end - (math.log(N - 1 + math.e) - 1)) < 1e-3 and abs(end - 7.4) < 0.05


# --------------------------------------------------------------------------------------- sea_loss


class Words:
    """word_vectors that remembers the labels it was asked for."""

    def __init__(self, table):
        self.table = table

    def __call__(self, labels):
        self.labels = labels.tolist()
        return self.table[labels]


def matched(x, t):
    """The share of x that have their own t as the nearest."""
    cos = F.normalize(x, dim=-1) @ F.normalize(t, dim=-1).T
    return pytest.approx(sum(int(row.argmax()) == i for i, row in enumerate(cos)) / len(x))


# B = 2 images of 3 x 5 patches. window 1: five labelled patches in each; 2 and 4: one labelled
# patch in a window
LABELLED = {
    1: [[0, 1, 6, 7, 14], [2, 3, 8, 9, 13]],
    2: [[6, 7, 4, 10, 12, 14], [0, 3, 9, 11]],
    4: [[8, 14], [0, 9]],
}


@pytest.mark.parametrize("window", LABELLED)
def test_sea_loss_is_the_loss_of_all_labelled_patches_when_nothing_is_left_to_chance(window):
    g = seeded(0)
    patches = [15 * b + p for b in (0, 1) for p in LABELLED[window][b]]
    label_of = torch.randperm(40, generator=g)[: len(patches)]
    ids = torch.full((30, 3), -1)
    scores = torch.rand(30, 3, generator=g)  # a score beside -1 means nothing
    for i, (p, label) in enumerate(zip(patches, label_of)):
        ids[p, i % 3] = label
        # no probability: as if it were not there
        ids[p, (i + 1) % 3], scores[p, (i + 1) % 3] = 39, [0, -0.5][i % 2]
    ids[5, 0], scores[5, 0] = 38, 0  # so this patch has no label
    ids, scores = ids.view(2, 15, 3), scores.view(2, 15, 3)
    x = torch.randn(2, 15, 6, generator=g).requires_grad_()
    table = torch.randn(40, 6, generator=g).requires_grad_()
    log_scale = torch.tensor(2.0, requires_grad=True)
    words = Words(table)

    loss, log = sea_loss(x, ids, scores, words, log_scale, (3, 5), window, seeded(1))
    exact_inputs = x64, table64, scale64 = in_float64(x, table, log_scale)
    exact = naive_loss(x64.flatten(0, 1)[patches], table64[label_of], scale64)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)
    ours, theirs = gradients(loss, (x, table, log_scale)), gradients(exact, exact_inputs)
    for grad, exact_grad in zip(ours, theirs):
        torch.testing.assert_close(grad.double(), exact_grad, rtol=1e-4, atol=1e-5)
    assert sorted(words.labels) == sorted(label_of.tolist())
    assert log["pairs"] == len(patches)
    assert log["matched"] == matched(x.flatten(0, 1)[patches], table[label_of])


@few
@given(st.data())
def test_sea_loss_of_random_labels(d):
    """All patches of one label have the same visual token.

    So the loss tells which labels, not which patches.
    """
    B, H, W, k = (d.draw(st.integers(1, high)) for high in (3, 5, 5, 3))
    labels = d.draw(st.lists(st.integers(-1, 6), min_size=B * H * W, max_size=B * H * W))
    seed = d.draw(st.integers(0, 999))
    g, label = seeded(seed), torch.tensor(labels).view(B, H * W)
    table, base = (torch.randn(7, 8, generator=g, dtype=torch.float64) for _ in range(2))
    base.requires_grad_()
    # whatever a patch without label holds (base[-1]) must not matter
    x = base.detach()[label].requires_grad_()
    slot = torch.randint(3, label.shape, generator=g).unsqueeze(-1)
    ids = torch.full((B, H * W, 3), -1).scatter(2, slot, label.unsqueeze(-1))
    scores = torch.rand(ids.shape, generator=g) + 0.1
    words, log_scale = Words(table), torch.tensor(0.5, dtype=torch.float64)
    loss, log = sea_loss(x, ids, scores, words, log_scale, (H, W), k, g)
    (grad,) = gradients(loss, x)

    kept, present = words.labels, set(labels) - {-1}
    assert len(kept) == len(set(kept)) == log["pairs"] and set(kept) <= present
    windows = [
        set(label.view(B, H, W)[b, top : top + k, left : left + k].flatten().tolist()) - {-1}
        for b in range(B)
        for top in range(0, H, k)
        for left in range(0, W, k)
    ]
    windows = [window for window in windows if window]
    # each window drew a label, and here or elsewhere it is kept
    assert all(window & set(kept) for window in windows)
    assert len(kept) <= len(windows)
    if k == 1:
        assert set(kept) == present
    if not kept:
        assert loss == 0 and (grad == 0).all()
        return
    exact = naive_loss(base[kept], table[kept], log_scale)
    (exact_grad,) = gradients(exact, base)
    torch.testing.assert_close(loss, exact)
    assert log["matched"] == matched(base[kept], table[kept])

    used = (grad != 0).any(-1)  # a single pair has no gradient
    assert not used[label < 0].any()
    if len(kept) > 1:
        assert sorted(label[used].tolist()) == sorted(kept)  # exactly one patch for each label
        used_by_place = used.view(B, H, W).double()
        per_window = F.avg_pool2d(used_by_place, k, ceil_mode=True, divisor_override=1)
        assert per_window.max() == 1
        torch.testing.assert_close(grad[used], exact_grad[label[used]])


def test_the_patch_that_keeps_a_shared_label_is_chosen_uniformly():
    """600 images with two labels of their own, the first of them on three patches."""
    g = seeded(0)
    x = torch.randn(600, 4, 16, generator=g).requires_grad_()
    table = torch.randn(1200, 16, generator=g)
    ids = (torch.tensor([0, 1, 0, 0]) + 2 * torch.arange(600).unsqueeze(1)).unsqueeze(-1)
    scores, log_scale = torch.ones(ids.shape), torch.tensor(0.0)
    loss, log = sea_loss(x, ids, scores, Words(table), log_scale, (1, 4), 1, g)
    used = (gradients(loss, x)[0] != 0).any(-1)
    assert log["pairs"] == 1200 and used[:, 1].all() and used.sum() == 1200
    check_frequencies(used[:, [0, 2, 3]].int().argmax(1), dict.fromkeys(range(3), 1 / 3))


def test_labels_follow_their_scores_within_sea_loss():
    """1500 images of one patch, with two labels of their own."""
    words = Words(torch.randn(3000, 4, generator=seeded(0)))
    x = torch.randn(1500, 1, 4, generator=seeded(1))
    ids = torch.arange(3000).view(1500, 1, 2)
    scores = torch.tensor([0.75, 0.25]).expand(1500, 1, 2)
    sea_loss(x, ids, scores, words, torch.tensor(0.0), (1, 1), 2, seeded(2))
    check_frequencies(torch.tensor(words.labels) % 2, {0: 0.75, 1: 0.25})


def test_the_generator_decides_sea_loss():
    g = seeded(0)
    ids, scores = torch.randint(50, (2, 16, 5), generator=g), torch.rand(2, 16, 5, generator=g)
    x, words = torch.randn(2, 16, 8, generator=g), Words(torch.randn(50, 8, generator=g))
    log_scale = torch.tensor(1.0)
    a, b, c = (
        sea_loss(x, ids, scores, words, log_scale, (4, 4), 2, seeded(seed))[0] for seed in (1, 1, 2)
    )
    assert a == b != c


def test_no_labels_at_all_give_zero_with_a_graph():
    x, table, log_scale = (
        torch.ones(shape, requires_grad=True) for shape in [(2, 6, 4), (3, 4), ()]
    )
    ids, scores = torch.full((2, 6, 3), -1), torch.zeros(2, 6, 3)
    loss, log = sea_loss(x, ids, scores, Words(table), log_scale, (2, 3))
    assert loss == 0 and log["pairs"] == 0 and log["matched"] == 0
    loss.backward()
    for v in (x, table, log_scale):
        assert v.grad.shape == v.shape and (v.grad == 0).all()


def test_bfloat16_visual_tokens_give_a_float32_loss():
    x = torch.randn(1, 6, 4, generator=seeded(0)).bfloat16()
    table = torch.randn(6, 4, generator=seeded(1)).bfloat16()
    ids, scores, log_scale = torch.arange(6).view(1, 6, 1), torch.ones(1, 6, 1), torch.tensor(1.0)
    loss, _ = sea_loss(x, ids, scores, Words(table), log_scale, (2, 3), 1)
    exact = naive_loss(*in_float64(x[0], table, log_scale))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "tokens, labels, grid",
    [
        ((2, 6), (2, 6), (2, 2)),
        ((2, 5), (2, 6), (2, 3)),
        ((2, 6), (2, 5), (2, 3)),
        ((3, 6), (2, 6), (2, 3)),
        ((2, 7), (2, 7), (2, 3)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(tokens, labels, grid):
    x, words = torch.zeros(*tokens, 4), Words(torch.ones(1, 4))
    ids, scores = torch.zeros(*labels, 3, dtype=torch.int64), torch.ones(*labels, 3)
    with pytest.raises((ValueError, RuntimeError), match="visual tokens .* for labels|unflatten"):
        sea_loss(x, ids, scores, words, torch.tensor(0.0), grid)


def test_total_loss():
    assert total_loss(torch.tensor(2.0), torch.tensor(3.0), 0.5) == 3.5
