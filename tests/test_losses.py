"""Equations (i) to (iv) against arithmetic in NumPy and float64 that shares no code with them."""

import numpy as np
import pytest
import torch
from fastai.losses import CrossEntropyLossFlat, FocalLossFlat
from hypothesis import given, settings
from hypothesis import strategies as st

from dms_fastai import DMSLoss, UserError
from dms_fastai.training.equations import (
    cross_entropy,
    dist_divergence,
    dkd_divergence,
    kd_divergence,
    kd_loss,
    mixup_kd_loss,
    mixup_loss,
)
from dms_fastai.training.losses import DKD, KL, check_class_weights

settings.register_profile("losses", max_examples=60, deadline=None)
settings.load_profile("losses")


def log_softmax(z):
    z = z - z.max(1, keepdims=True)
    return z - np.log(np.exp(z).sum(1, keepdims=True))


def ref_cross_entropy(z, y, weight=None, smoothing=0.0):
    """-sum_c w_c q_c log p_c with q = (1 - s) onehot + s / C; the mean over indices is weighted by w_y."""
    c = z.shape[1]
    q = np.eye(c)[y] if y.ndim == 1 else y
    q = (1 - smoothing) * q + smoothing / c
    w = np.ones(c) if weight is None else weight
    total = -(w * q * log_softmax(z)).sum()
    return total / (w[y].sum() if y.ndim == 1 else len(z))


def ref_divergence(z_s, z_t, T):
    log_s, log_t = log_softmax(z_s / T), log_softmax(z_t / T)
    return T**2 * (np.exp(log_t) * (log_t - log_s)).sum() / len(z_s)


@st.composite
def batches(draw):
    """Logits of student and teacher, two targets, lambda, and class weights, all drawn at random."""
    n, c = draw(st.integers(1, 7)), draw(st.integers(2, 12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scale = draw(st.sampled_from([0.1, 3.0, 30.0]))
    z_s, z_t = rng.normal(0, scale, (2, n, c))
    y_a = rng.integers(0, c, n)
    return {
        "z_s": z_s,
        "z_t": z_t,
        "y_a": y_a,
        "y_b": y_a[rng.permutation(n)],
        "lam": draw(st.floats(0, 1)),
        "weight": draw(st.sampled_from([None, rng.uniform(0.1, 3, c).astype(np.float32).astype(float)])),
        "smoothing": draw(st.sampled_from([0.0, 0.1, 1.0])),
        "alpha": draw(st.floats(0, 1)),
        "T": draw(st.floats(0.5, 20)),
    }


def tensor(value):
    return None if value is None else torch.from_numpy(np.asarray(value))


def close(value, reference):
    assert value.item() == pytest.approx(reference, rel=1e-9, abs=1e-9)


@given(batches())
def test_equation_iii_cross_entropy(b):
    value = cross_entropy(tensor(b["z_s"]), tensor(b["y_a"]), tensor(b["weight"]), b["smoothing"])
    close(value, ref_cross_entropy(b["z_s"], b["y_a"], b["weight"], b["smoothing"]))


@given(batches())
def test_equation_i_mixup_loss(b):
    hard = (tensor(b["weight"]), b["smoothing"])
    value = mixup_loss(tensor(b["z_s"]), tensor(b["y_a"]), tensor(b["y_b"]), b["lam"], *hard)
    a, b_ = (ref_cross_entropy(b["z_s"], b[y], b["weight"], b["smoothing"]) for y in ("y_a", "y_b"))
    close(value, b["lam"] * a + (1 - b["lam"]) * b_)


@given(batches())
def test_equation_ii_kd_loss(b):
    value = kd_loss(tensor(b["z_s"]), tensor(b["z_t"]), tensor(b["y_a"]), b["alpha"], b["T"])
    hard = ref_cross_entropy(b["z_s"], b["y_a"])
    close(value, b["alpha"] * ref_divergence(b["z_s"], b["z_t"], b["T"]) + (1 - b["alpha"]) * hard)


@given(batches())
def test_equation_iv_mixup_kd_loss(b):
    targets = (tensor(b["y_a"]), tensor(b["y_b"]), b["lam"])
    value = mixup_kd_loss(tensor(b["z_s"]), tensor(b["z_t"]), *targets, b["alpha"], b["T"])
    a, b_ = (ref_cross_entropy(b["z_s"], b[y]) for y in ("y_a", "y_b"))
    hard = b["lam"] * a + (1 - b["lam"]) * b_
    close(value, b["alpha"] * ref_divergence(b["z_s"], b["z_t"], b["T"]) + (1 - b["alpha"]) * hard)


@given(batches())
def test_the_authors_divergence_is_the_textbooks_over_the_number_of_classes(b):
    value = kd_divergence(tensor(b["z_s"]), tensor(b["z_t"]), b["T"], kl="mean")
    close(value, ref_divergence(b["z_s"], b["z_t"], b["T"]) / b["z_s"].shape[1])


@given(batches())
def test_lambda_one_a_sample(b):
    rng = np.random.default_rng(0)
    lam, n = rng.uniform(size=len(b["z_s"])), len(b["z_s"])
    value = mixup_loss(tensor(b["z_s"]), tensor(b["y_a"]), tensor(b["y_b"]), tensor(lam))
    by_sample = [
        lam[i] * ref_cross_entropy(b["z_s"][[i]], b["y_a"][[i]])
        + (1 - lam[i]) * ref_cross_entropy(b["z_s"][[i]], b["y_b"][[i]])
        for i in range(n)
    ]
    close(value, np.mean(by_sample))


@given(batches())
def test_soft_targets(b):
    rng = np.random.default_rng(1)
    soft = rng.dirichlet(np.ones(b["z_s"].shape[1]), len(b["z_s"]))
    value = cross_entropy(tensor(b["z_s"]), tensor(soft), tensor(b["weight"]), b["smoothing"])
    close(value, ref_cross_entropy(b["z_s"], soft, b["weight"], b["smoothing"]))
    one_hot = np.eye(b["z_s"].shape[1])[b["y_a"]]
    mixed = mixup_loss(tensor(b["z_s"]), tensor(one_hot), tensor(soft), b["lam"])
    close(mixed, ref_cross_entropy(b["z_s"], b["lam"] * one_hot + (1 - b["lam"]) * soft))


@given(batches())
def test_gradient_of_equation_ii_is_the_textbooks(b):
    """d/dZ_s = alpha T (softmax(Z_s / T) - softmax(Z_t / T)) / B + (1 - alpha) (softmax(Z_s) - onehot) / B."""
    z = tensor(b["z_s"]).requires_grad_()
    kd_loss(z, tensor(b["z_t"]), tensor(b["y_a"]), b["alpha"], b["T"]).backward()
    n, c = b["z_s"].shape
    soft = np.exp(log_softmax(b["z_s"] / b["T"])) - np.exp(log_softmax(b["z_t"] / b["T"]))
    hard = np.exp(log_softmax(b["z_s"])) - np.eye(c)[b["y_a"]]
    expected = (b["alpha"] * b["T"] * soft + (1 - b["alpha"]) * hard) / n
    np.testing.assert_allclose(z.grad.numpy(), expected, rtol=1e-8, atol=1e-10)


@given(batches(), st.sampled_from(["batchmean", "mean"]))
def test_the_learners_loss_chooses_by_what_the_batch_carries(b, kl):
    loss = DMSLoss(b["alpha"], b["T"], KL(kl), weight=tensor(b["weight"]), label_smoothing=b["smoothing"])
    hard, soft = (tensor(b["weight"]), b["smoothing"]), (b["alpha"], b["T"], kl)
    z_s, z_t, y_a, y_b = (tensor(b[key]) for key in ("z_s", "z_t", "y_a", "y_b"))
    assert loss(z_s, y_a) == cross_entropy(z_s, y_a, *hard)
    assert loss(z_s, y_a, y_b, b["lam"]) == mixup_loss(z_s, y_a, y_b, b["lam"], *hard)
    assert loss(z_s, y_a, None, None, z_t) == kd_loss(z_s, z_t, y_a, *soft, *hard)
    assert loss(z_s, y_a, y_b, b["lam"], z_t) == mixup_kd_loss(z_s, z_t, y_a, y_b, b["lam"], *soft, *hard)


@given(batches())
def test_unreduced_losses_add_up(b):
    each, total = DMSLoss(b["alpha"], b["T"], reduction="none"), DMSLoss(b["alpha"], b["T"], reduction="sum")
    mean = DMSLoss(b["alpha"], b["T"])
    args = (tensor(b["z_s"]), tensor(b["y_a"]), tensor(b["y_b"]), b["lam"], tensor(b["z_t"]))
    assert each(*args).shape == (len(b["z_s"]),)
    close(each(*args).sum(), total(*args).item())
    close(each(*args).mean(), mean(*args).item())


def test_known_values():
    zeros = torch.zeros(1, 10, dtype=torch.float64)
    assert cross_entropy(zeros, torch.tensor([3])).item() == pytest.approx(np.log(10))
    assert kd_divergence(zeros, zeros, 6.0).item() == pytest.approx(0, abs=1e-12)
    # Two classes, student undecided, teacher at 3:1 before a temperature of 2: sqrt(3):1.
    teacher = torch.tensor([[np.log(3.0), 0.0]])
    p = 3**0.5 / (3**0.5 + 1)
    expected = 4 * (p * np.log(2 * p) + (1 - p) * np.log(2 * (1 - p)))
    assert kd_divergence(torch.zeros(1, 2, dtype=torch.float64), teacher, 2.0).item() == pytest.approx(expected)


def test_half_precision_logits_are_computed_in_float32():
    logits = torch.randn(8, 10).bfloat16()
    y = torch.randint(0, 10, (8,))
    assert cross_entropy(logits, y).dtype == torch.float32
    assert cross_entropy(logits, y) == cross_entropy(logits.float(), y)


def test_activation_and_decodes():
    loss, logits = DMSLoss(), torch.randn(5, 4)
    torch.testing.assert_close(loss.activation(logits).sum(1), torch.ones(5))
    assert torch.equal(loss.decodes(loss.activation(logits)), logits.argmax(1))


@pytest.mark.parametrize(
    ("setting", "words"),
    [({"alpha": 1.1}, "alpha is 1.1"), ({"alpha": -0.1}, "alpha"), ({"alpha": float("nan")}, "alpha"),
     ({"T": 0}, "T is 0"), ({"T": -1}, "above 0"), ({"label_smoothing": 2}, "2")],
)  # fmt: skip
def test_values_out_of_range_are_refused(setting, words):
    with pytest.raises(UserError, match=words):
        DMSLoss(**setting)


@given(batches())
def test_decoupled_distillation(b):
    """TCKD and NCKD from the probabilities themselves, class by class."""
    tckd = nckd = 0.0
    true = np.eye(b["z_s"].shape[1], dtype=bool)[b["y_a"]]
    for z_s, z_t, mask in zip(b["z_s"], b["z_t"], true, strict=True):
        log_s, log_t = (log_softmax(z[None] / b["T"])[0] for z in (z_s, z_t))
        binary = [(lp[mask][0], np.logaddexp.reduce(lp[~mask])) for lp in (log_s, log_t)]
        tckd += sum(np.exp(t) * (t - s) for s, t in zip(*binary, strict=True))
        others = [log_softmax(z[~mask][None] / b["T"])[0] for z in (z_s, z_t)]
        nckd += (np.exp(others[1]) * (others[1] - others[0])).sum()
    expected = b["T"] ** 2 * (tckd + 8 * nckd) / len(true)
    value = dkd_divergence(tensor(b["z_s"]), tensor(b["z_t"]), tensor(b["y_a"]), b["T"])
    np.testing.assert_allclose(value, expected, rtol=1e-6, atol=1e-9)


def test_decoupled_distillation_with_a_weight_of_the_others_left_is_the_ordinary_one():
    """KL = TCKD + (1 - p_t(y)) NCKD (Zhao et al., equation 6): one sample, beta = 1 - p_t(y)."""
    z_s, z_t, y = torch.randn(1, 7).double(), torch.randn(1, 7).double(), torch.tensor([2])
    beta = 1 - (z_t / 3).softmax(1)[0, 2].item()
    torch.testing.assert_close(dkd_divergence(z_s, z_t, y, 3.0, beta), kd_divergence(z_s, z_t, 3.0))


def test_dist_is_one_minus_the_correlations():
    rng = np.random.default_rng(0)
    z_s, z_t = rng.normal(0, 2, (2, 9, 5))
    p_s, p_t = (np.exp(log_softmax(z / 4)) for z in (z_s, z_t))
    inter = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(p_s, p_t, strict=True)])
    intra = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(p_s.T, p_t.T, strict=True)])
    np.testing.assert_allclose(dist_divergence(tensor(z_s), tensor(z_t), 4.0), 16 * (inter + intra), rtol=1e-6)
    np.testing.assert_allclose(dist_divergence(tensor(z_t), tensor(z_t), 4.0), 0, atol=1e-6)


@pytest.mark.parametrize("divergence", ["kl", "dkd", "dist"])
@pytest.mark.parametrize("mixed", [False, True])
def test_the_one_loss_with_every_divergence(divergence, mixed):
    torch.manual_seed(0)
    pred = (40 * torch.randn(6, 4)).requires_grad_()
    teacher, y_a, y_b, lam = 40 * torch.randn(6, 4), torch.arange(6) % 4, torch.arange(6).flip(0) % 4, torch.tensor(0.3)
    loss = DMSLoss(0.7, 2.0, divergence=DKD(beta=5.0) if divergence == "dkd" else divergence)
    value = loss(pred, y_a, y_b, lam, teacher) if mixed else loss(pred, y_a, teacher_logits=teacher)
    hard = mixup_loss(pred, y_a, y_b, lam) if mixed else cross_entropy(pred, y_a)
    if divergence == "dkd":
        soft = dkd_divergence(pred, teacher, y_a, 2.0, 5.0)
        if mixed:
            soft = 0.3 * soft + 0.7 * dkd_divergence(pred, teacher, y_b, 2.0, 5.0)
    else:
        soft = kd_divergence(pred, teacher, 2.0) if divergence == "kl" else dist_divergence(pred, teacher, 2.0)
    torch.testing.assert_close(value, 0.7 * soft + 0.3 * hard)
    torch.testing.assert_close(loss.parts, {"cross_entropy": hard.detach(), "distillation": soft.detach()})
    value.backward()
    assert pred.grad.isfinite().all()


def test_an_unknown_divergence():
    with pytest.raises(UserError, match="unknown divergence 'js': known: dist, dkd, kl"):
        DMSLoss(divergence="js")
    for make in (lambda: KL("sum"), lambda: DKD(-1.0), lambda: DMSLoss(divergence=3), lambda: DMSLoss(divergence=KL)):
        with pytest.raises(UserError):
            make()


@pytest.mark.parametrize("made", [list, np.array, torch.tensor, lambda w: torch.tensor(w, dtype=torch.float64)])
def test_class_weights_in_any_form_are_the_same(made):
    """Three samples by hand: sum of w_y * loss, divided by the sum of w_y."""
    weight, z, y = [0.5, 2.0, 0.0], np.array([[1.0, 0.0, 2.0], [0.0, 1.0, 0.0], [3.0, 0.0, 0.0]]), np.array([0, 1, 2])
    w = np.array(weight)[y]
    expected = -(w * log_softmax(z)[np.arange(3), y]).sum() / w.sum()
    loss = DMSLoss(weight=made(weight))
    assert loss.weight.dtype == torch.float32
    logits, targets = torch.tensor(z, dtype=torch.float32), torch.tensor(y)
    np.testing.assert_allclose(loss(logits, targets), expected, rtol=1e-6)
    np.testing.assert_allclose(loss(logits, targets, targets, 0.3), expected, rtol=1e-6)
    np.testing.assert_allclose(loss(logits.bfloat16(), targets), expected, rtol=1e-6)


def test_what_another_loss_calls_its_weight_is_its_own_affair():
    class Own(torch.nn.Module):
        weight = 2.0

    loss = Own()
    check_class_weights(loss, 10)
    assert loss.weight == 2.0
    check_class_weights(stock := CrossEntropyLossFlat(weight=torch.ones(10, dtype=torch.float64)), 10)
    assert stock.func.weight.dtype == torch.float32
    for wrong in (torch.nn.CrossEntropyLoss(torch.ones(3)), FocalLossFlat(weight=torch.ones(3))):
        with pytest.raises(UserError, match="weights for 3 classes"):
            check_class_weights(wrong, 10)


@pytest.mark.parametrize(
    "weight", [[1.0, -1.0], [1.0, float("nan")], [float("inf"), 1.0], [0.0, 0.0], [[1.0, 2.0]], [], 3.0, ["a"], "ab"]
)
def test_what_are_no_class_weights_is_refused(weight):
    with pytest.raises(UserError, match="weight") as error:
        DMSLoss(weight=weight)
    assert "\n" not in error.value.message


def test_dkd_refuses_targets_without_a_class():
    logits = torch.randn(4, 3)
    with pytest.raises(UserError, match="dkd needs a class for each image"):
        DMSLoss(divergence="dkd")(logits, logits.softmax(1), teacher_logits=logits)


@pytest.mark.parametrize("weight", [None, [1.0, 2.0, 3.0]])
@pytest.mark.parametrize("lam", [0.3, [0.3, 0.6, 0.9, 0.2]])
def test_images_without_a_label_do_not_count_in_the_mean_of_mixed_ones(lam, weight):
    z = torch.tensor([[1.0, 2.0, 0.5], [0.1, -1.0, 3.0], [2.0, 0.0, -0.5], [0.3, 0.2, 0.1]], dtype=torch.float64)
    y_a, y_b = torch.tensor([0, -100, 1, -100]), torch.tensor([-100, 2, -100, 0])
    p, expected = z.softmax(1), 0.0
    shares = [lam] * 4 if isinstance(lam, float) else lam
    for y, own in ((y_a, shares), (y_b, [1 - share for share in shares])):
        known = [i for i in range(4) if y[i] != -100]
        weights = [1.0 if weight is None else weight[y[i]] for i in known]
        losses = [-w * own[i] * float(p[i, y[i]].log()) for i, w in zip(known, weights, strict=True)]
        expected += sum(losses) / sum(weights)
    found = DMSLoss(weight=weight)(z, y_a, y_b, lam if isinstance(lam, float) else torch.tensor(lam))
    assert float(found) == pytest.approx(expected, rel=1e-6)
