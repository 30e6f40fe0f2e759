"""Unsquashed and boosted output losses, against their formulas, autograd, PyTorch's losses and a direct solve."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from leantrain.data import Batch
from leantrain.errors import UsageError
from leantrain.learn import Backprop, LocalUpdates
from leantrain.nn.output_loss import FORMS, BoostGrad, OutputLoss

KINDS = ("linear", "cubic", "exp", "cubic_error", "exp_error", "cross_entropy", "softmax_squared")
SUMS = tuple(FORMS)
ALPHA = 0.3
BETA = 0.2

# The table of the module once more, a number at a time: (alpha, beta) as below, no clip.
DELTA: dict[str, Callable[[float, float], float]] = {
    "linear": lambda z, t: z - t,
    "cubic": lambda z, t: ALPHA * z * z * z + BETA - t,
    "exp": lambda z, t: ALPHA * math.exp(z) + BETA - t,
    "cubic_error": lambda z, t: ALPHA * (z - t) ** 3,
    "exp_error": lambda z, t: math.copysign((math.exp(ALPHA * abs(z - t)) - 1) / ALPHA, z - t),
}
VALUE: dict[str, Callable[[float, float], float]] = {
    "linear": lambda z, t: (z - t) ** 2 / 2,
    "cubic": lambda z, t: ALPHA * z**4 / 4 + (BETA - t) * z,
    "exp": lambda z, t: ALPHA * math.exp(z) + (BETA - t) * z,
    "cubic_error": lambda z, t: ALPHA * (z - t) ** 4 / 4,
    "exp_error": lambda z, t: (math.exp(ALPHA * abs(z - t)) - ALPHA * abs(z - t) - 1) / ALPHA**2,
}


def drawn(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(*shape: int, below: int, seed: int = 0) -> Tensor:
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(seed))


def as_in_table(kind: str, **more: Any) -> OutputLoss:
    alpha = {"alpha": ALPHA} if kind != "linear" else {}
    beta = {"beta": BETA} if kind in ("cubic", "exp") else {}
    return OutputLoss(kind, **{"clip": None, **alpha, **beta, **more})


def gradient(loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, targets: Tensor) -> Tensor:
    logits = logits.detach().requires_grad_()
    return torch.autograd.grad(loss(logits, targets), logits)[0]


@pytest.mark.parametrize("kind", SUMS)
@given(
    rows=st.integers(1, 5), classes=st.integers(1, 6), seed=st.integers(0, 99), scale=st.sampled_from([0.1, 1.0, 3.0])
)
@settings(max_examples=20, deadline=None)
def test_loss_and_gradient_are_those_of_the_table(kind: str, rows: int, classes: int, seed: int, scale: float) -> None:
    z, y = drawn(rows, classes, seed=seed, scale=scale), labels(rows, below=classes, seed=seed)
    pairs = [[(float(z[n, c]), float(y[n] == c)) for c in range(classes)] for n in range(rows)]
    values = torch.tensor([sum(VALUE[kind](*pair) for pair in row) for row in pairs], dtype=torch.float64)
    deltas = torch.tensor([[DELTA[kind](*pair) for pair in row] for row in pairs], dtype=torch.float64)
    loss = as_in_table(kind)
    torch.testing.assert_close(loss(z, y), values.mean(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradient(loss, z, y), deltas / rows, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("clip", [None, 1.5])
def test_the_gradient_is_the_derivative_and_so_is_its_own(kind: str, clip: float | None) -> None:
    z, y = drawn(4, 5, scale=2.0).requires_grad_(), labels(4, below=5)
    loss = OutputLoss(kind, clip=clip, label_smoothing=0.1, class_weight=[1, 2, 0.5, 1, 3])
    assert torch.autograd.gradcheck(lambda logits: loss(logits, y), z)
    assert torch.autograd.gradgradcheck(lambda logits: loss(logits, y), z)


def test_the_gradient_of_softmax_and_squared_error_is_the_one_that_saturates() -> None:
    z, y = drawn(3, 4), labels(3, below=4)
    p, t = z.softmax(1), F.one_hot(y, 4).double()
    jacobians = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    expected = (jacobians @ (p - t)[:, :, None])[:, :, 0]
    torch.testing.assert_close(gradient(OutputLoss("softmax_squared", reduction="sum"), z, y), expected)


def test_the_exponential_with_alpha_1_is_the_poisson_loss() -> None:
    z, y = drawn(6, 4), labels(6, below=4)
    poisson = F.poisson_nll_loss(z, F.one_hot(y, 4).double(), log_input=True, full=False, reduction="none")
    torch.testing.assert_close(OutputLoss("exp", alpha=1.0, clip=None)(z, y), poisson.sum(1).mean())


def test_the_exponential_normalised_for_each_example_is_cross_entropy() -> None:
    z, y = drawn(7, 5, scale=3.0).float(), labels(7, below=5)
    normaliser = 1 / z.exp().sum(1, keepdim=True)
    mine = FORMS["exp"].delta(z, F.one_hot(y, 5).float(), normaliser, 0.0)
    expected = gradient(lambda logits, targets: F.cross_entropy(logits, targets, reduction="sum"), z, y)
    torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", SUMS)
def test_the_logit_of_an_error_is_where_the_error_is_found(kind: str) -> None:
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    for error in (0.0, 0.1, 2.0):
        wanted = torch.tensor(error, dtype=torch.float64)
        z = FORMS[kind].at(wanted, t, ALPHA, BETA if kind in ("cubic", "exp") else 0.0)
        found = FORMS[kind].delta(z, t, ALPHA, BETA if kind in ("cubic", "exp") else 0.0)
        reachable = z > -math.inf
        torch.testing.assert_close(found[reachable], wanted.expand(2)[reachable], atol=1e-9, rtol=1e-9)
    assert FORMS["cubic"].at(torch.zeros(1), torch.ones(1), 0.001, 0.0).item() == pytest.approx(10)


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_the_classes_does_not_matter(kind: str) -> None:
    z, y, order = drawn(6, 5), labels(6, below=5), torch.randperm(5, generator=torch.Generator().manual_seed(1))
    where = order.argsort()
    torch.testing.assert_close(
        gradient(OutputLoss(kind), z[:, order], where[y]), gradient(OutputLoss(kind), z, y)[:, order]
    )


SHAPES = [((6, 5), (6,)), ((4, 5, 3), (4, 3)), ((2, 5, 3, 4), (2, 3, 4)), ((5,), ())]


@pytest.mark.parametrize(("shape", "target_shape"), SHAPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.2}, {"class_weight": [1, 2, 0, 0.5, 3]}, {"ignore_index": 2}], ids=str
)
def test_cross_entropy_is_pytorchs(
    shape: tuple[int, ...], target_shape: tuple[int, ...], reduction: str, options: dict[str, Any]
) -> None:
    z, y = drawn(*shape), labels(*target_shape, below=5, seed=3)
    theirs = dict(options)
    weight = theirs.pop("class_weight", None)
    expected = F.cross_entropy(
        z, y, None if weight is None else torch.tensor(weight, dtype=torch.float64), reduction=reduction, **theirs
    )
    loss = OutputLoss("cross_entropy", reduction=reduction, **options).double()
    torch.testing.assert_close(loss(z, y), expected)


@pytest.mark.parametrize(("shape", "target_shape"), SHAPES)
@pytest.mark.parametrize("kind", [*SUMS, "softmax_squared"])
def test_every_kind_takes_these_shapes_and_options_as_cross_entropy_does(
    kind: str, shape: tuple[int, ...], target_shape: tuple[int, ...]
) -> None:
    weight = torch.tensor([1, 2, 0.25, 0.5, 3], dtype=torch.float64)
    z, y = drawn(*shape), labels(*target_shape, below=5, seed=3)
    flat_y = y.reshape(-1).clone()
    if len(flat_y) > 1:
        flat_y[1] = -100
    y = flat_y.view(target_shape)
    options: dict[str, Any] = {"class_weight": weight, "label_smoothing": 0.1}
    plain = OutputLoss(kind, label_smoothing=0.1, reduction="none")
    rows = z.movedim(min(1, z.dim() - 1), -1).reshape(-1, 5)
    counted = [n for n in range(len(rows)) if flat_y[n] != -100]
    each = torch.zeros(len(rows), dtype=torch.float64)
    for n in counted:
        each[n] = weight[flat_y[n]] * plain(rows[n : n + 1], flat_y[n : n + 1])[0]
    none, total, mean = (OutputLoss(kind, reduction=r, **options).double()(z, y) for r in ("none", "sum", "mean"))
    torch.testing.assert_close(none, each.view(target_shape))
    torch.testing.assert_close(total, each.sum())
    torch.testing.assert_close(mean, each.sum() / sum(float(weight[flat_y[n]]) for n in counted))


@pytest.mark.parametrize("kind", KINDS)
def test_ignored_targets_send_back_exactly_nothing(kind: str) -> None:
    z, y = drawn(2, 4, 3, 3, scale=20.0), labels(2, 3, 3, below=4)
    y[0, 1] = -100
    found = gradient(OutputLoss(kind), z, y)
    assert not found[0, :, 1].any() and found[1].any()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *((kind, options) for kind in KINDS for options in ({}, {"label_smoothing": 0.3})),
        *((kind, {"target_weight": 4.0}) for kind in SUMS),
    ],
)
def test_targets_may_be_probabilities(kind: str, options: dict[str, Any]) -> None:
    z, y = drawn(3, 4, 2), labels(3, 2, below=4)
    sure = F.one_hot(y, 4).movedim(-1, 1).double()
    loss, none = OutputLoss(kind, **options), OutputLoss(kind, reduction="none", **options)
    torch.testing.assert_close(loss(z, sure), loss(z, y))
    assert none(z, sure).shape == y.shape
    mixed = 0.3 * sure + 0.7 * sure.roll(1, dims=1)
    if kind not in ("exp", "cubic", "cross_entropy"):  # of these the loss is linear in the targets
        assert abs(loss(z, mixed) - 0.3 * loss(z, sure) - 0.7 * loss(z, sure.roll(1, dims=1))) > 1e-6


def test_the_term_of_the_true_class_may_weigh_more() -> None:
    z, y = drawn(3, 6), labels(3, below=6)
    t = F.one_hot(y, 6).double()
    expected = (0.5 * (1 + 4 * t) * (z - t) ** 2).sum(1).mean()
    torch.testing.assert_close(OutputLoss("linear", target_weight=5.0)(z, y), expected)


@pytest.mark.parametrize("kind", ["cubic", "exp", "cubic_error", "exp_error"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_error_is_clipped_and_the_loss_stays_finite(kind: str, dtype: torch.dtype) -> None:
    z = torch.tensor([[-1e4, -300.0, -50.0, 0.0, 1.0, 50.0, 300.0, 1e4]], dtype=dtype)
    loss = OutputLoss(kind, clip=10.0, reduction="sum")
    for y in range(8):
        assert loss(z, torch.tensor([y])).isfinite()
        found = gradient(loss, z, torch.tensor([y]))
        assert found.isfinite().all() and found.abs().max().item() == pytest.approx(10, rel=1e-2)
    # Without a bound it is what was asked for.
    assert (
        gradient(OutputLoss("cubic", 1.0, clip=None, reduction="sum"), z[:, 5:6].float(), torch.tensor([0]))
        == 50**3 - 1
    )


@pytest.mark.parametrize("kind", ["cubic", "exp", "cubic_error", "exp_error"])
def test_clipping_changes_nothing_within_and_keeps_the_loss_convex(kind: str) -> None:
    z = torch.linspace(-12, 12, 401, dtype=torch.float64)[:, None]
    y = torch.zeros(401, dtype=torch.int64)
    clipped, plain = (OutputLoss(kind, clip=clip, reduction="none")(z, y) for clip in (2.0, None))
    within = FORMS[kind].delta(z, torch.ones(1).double(), OutputLoss(kind).alpha, 0.0).abs()[:, 0] < 2
    assert 10 < within.sum() < 400
    assert torch.equal(clipped[within], plain[within]) and (clipped <= plain + 1e-9).all()
    assert (clipped[2:] - 2 * clipped[1:-1] + clipped[:-2] > -1e-9).all()


def test_linear_outputs_of_a_linear_model_become_the_least_squares_solution() -> None:
    x, y = drawn(40, 6), labels(40, below=3)
    model = nn.Linear(6, 3).double()
    solver = torch.optim.LBFGS(
        model.parameters(), max_iter=200, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )
    loss = OutputLoss("linear")

    def closure() -> Tensor:
        solver.zero_grad()
        value = loss(model(x), y)
        value.backward()
        return value

    solver.step(closure)
    design = torch.cat([x, torch.ones(40, 1).double()], 1)
    solution = torch.linalg.lstsq(design, F.one_hot(y, 3).double()).solution
    torch.testing.assert_close(torch.cat([model.weight.T, model.bias[None]]), solution, rtol=1e-5, atol=1e-6)


def test_a_confident_mistake_is_still_corrected_where_softmax_and_squared_error_saturate() -> None:
    z = 300 * drawn(500, 10, scale=0.3)
    y = labels(500, below=10)
    wrong = z.argmax(1) != y

    def stuck(kind: str) -> float:
        norms = gradient(OutputLoss(kind, reduction="sum"), z, y)[wrong].norm(dim=1)
        return (norms < 1e-3).double().mean().item()

    assert stuck("softmax_squared") > 0.5
    assert all(stuck(kind) == 0 for kind in KINDS if kind != "softmax_squared")


def test_the_losses_of_equal_micro_batches_average_to_that_of_the_batch() -> None:
    z, y, loss = drawn(8, 5), labels(8, below=5), OutputLoss("cubic")
    halves = torch.cat([gradient(loss, z[:4], y[:4]), gradient(loss, z[4:], y[4:])]) / 2
    torch.testing.assert_close(halves, gradient(loss, z, y))


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_computed_in_float32_whatever_the_model_computes_in(kind: str) -> None:
    z, y = drawn(6, 4, scale=2.0).bfloat16(), labels(6, below=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = OutputLoss(kind)(z, y)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, OutputLoss(kind)(z.float(), y))
    assert gradient(OutputLoss(kind), z, y).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", SUMS)
def test_it_keeps_logits_and_targets_for_the_backward_pass_and_nothing_else(kind: str) -> None:
    z, y, kept = drawn(32, 50).float().requires_grad_(), labels(32, below=50), []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        OutputLoss(kind)(z, y)
    large = [tensor for tensor in kept if tensor.numel() > 32]
    assert [tensor.data_ptr() for tensor in large] == [z.data_ptr()]


@pytest.mark.parametrize("kind", ["linear", "exp", "softmax_squared"])
def test_it_works_under_compile_and_for_one_example_at_a_time(kind: str) -> None:
    z, y, loss = drawn(5, 4).float(), labels(5, below=4), OutputLoss(kind)
    expected = gradient(loss, z, y)
    torch.testing.assert_close(gradient(torch.compile(loss, backend="eager", fullgraph=True), z, y), expected)
    alone = torch.func.vmap(torch.func.grad(lambda logits, target: loss(logits, target)))(z, y)
    torch.testing.assert_close(alone / 5, expected)


@pytest.mark.parametrize("kind", ["linear", "exp", "cubic"])
def test_boost_grad_tells_one_loss_and_learns_from_another(kind: str) -> None:
    z, y = drawn(6, 4), labels(6, below=4)
    boost = BoostGrad(kind)
    assert torch.equal(boost(z.requires_grad_(), y), F.cross_entropy(z, y))
    torch.testing.assert_close(gradient(boost, z, y), gradient(OutputLoss(kind), z, y))
    torch.testing.assert_close(gradient(lambda a, b: 0.25 * boost(a, b), z, y), gradient(OutputLoss(kind), z, y) / 4)
    with torch.no_grad():
        assert torch.equal(boost(z, y), F.cross_entropy(z, y))
    other = BoostGrad(kind, loss=lambda logits, targets: logits.square().mean())
    assert torch.equal(other(z, y), z.square().mean())
    torch.testing.assert_close(gradient(other, z, y), gradient(OutputLoss(kind), z, y))


def test_boost_grad_refuses_losses_of_two_shapes() -> None:
    boost = BoostGrad("linear", loss=lambda logits, targets: F.cross_entropy(logits, targets, reduction="none"))
    with pytest.raises(UsageError, match=r"the loss to tell gives \[3\], the one to learn from \[\]"):
        boost(torch.zeros(3, 2, requires_grad=True), torch.tensor([0, 1, 0]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "cubik"}, "kind 'cubik' is unknown; did you mean 'cubic'"),
        ({"reduction": "avg"}, "reduction 'avg' is unknown"),
        ({"kind": "linear", "alpha": 0.1}, "kind='linear' takes none, got 0.1"),
        ({"kind": "exp_error", "beta": 0.1}, "kind='exp_error' takes none, got 0.1"),
        ({"alpha": 0.0}, "alpha must be a number above 0, got 0.0"),
        ({"alpha": math.nan}, "alpha must be a number above 0, got nan"),
        ({"beta": math.inf}, "beta must be a finite number, got inf"),
        ({"clip": -1.0}, "clip must be a number above 0, got -1.0"),
        ({"kind": "softmax_squared", "target_weight": 2.0}, "not of 'softmax_squared', got 2.0"),
        ({"label_smoothing": 1.5}, r"label_smoothing must be in \[0, 1\], got 1.5"),
        ({"class_weight": [1.0, -1.0]}, "class_weight must be a list of numbers, 0 or more"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        OutputLoss(**arguments)


@pytest.mark.parametrize(
    ("logits", "targets", "message"),
    [
        ((4, 3), torch.zeros(4, 3, dtype=torch.int64), r"got logits \[4, 3\] and int64 targets \[4, 3\]"),
        ((4, 3), torch.zeros(4), r"got logits \[4, 3\] and float32 targets \[4\]"),
        ((4, 3), torch.zeros(4, dtype=torch.int32), "int32 targets"),
        ((), torch.zeros((), dtype=torch.int64), r"got logits \[\]"),
        ((4, 2), torch.zeros(4, dtype=torch.int64), "class_weight has 3 entries, the logits 2 classes"),
        ((2, 3), torch.tensor([0, 3]), "targets must be classes from 0 to 2, or -100: index 3 is out of bounds"),
    ],
)
def test_what_does_not_fit_is_refused(logits: tuple[int, ...], targets: Tensor, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        OutputLoss("cubic", class_weight=[1.0, 1.0, 1.0])(torch.zeros(logits), targets)


def test_learners_take_it_in_the_place_of_a_task() -> None:
    batch = Batch(drawn(8, 6).float(), labels(8, below=3), torch.arange(8))
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    loss = OutputLoss("cubic")
    found = Backprop(model, loss).step(batch).loss
    torch.testing.assert_close(found, loss(model(batch.inputs), batch.targets).detach())
    in_blocks = LocalUpdates(model, loss, sample=batch.inputs, blocks=2)
    in_blocks.step(batch)
    assert all(param.grad is not None and param.grad.any() for param in in_blocks.module.parameters())
    sums = in_blocks.evaluate(batch)
    torch.testing.assert_close(sums["loss_sum"] / sums["count"], found)


@pytest.mark.parametrize("kind", SUMS)
def test_a_network_learns_digits_by_it(kind: str) -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    images, classes = (torch.tensor(part) for part in datasets.load_digits(return_X_y=True))
    images, classes = images.float() / 16, classes.long()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer, loss = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9), OutputLoss(kind)
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        for rows in torch.randperm(1400, generator=generator).split(50):
            optimizer.zero_grad()
            value = loss(model(images[rows]), classes[rows])
            assert value.isfinite()
            value.backward()
            optimizer.step()
    accuracy = (model(images[1400:]).argmax(1) == classes[1400:]).double().mean()
    assert accuracy > (0.7 if kind == "cubic_error" else 0.85)
