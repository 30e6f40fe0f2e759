"""The probe of hidden layers: each measure against its definition or another package, and where it looks."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import RidgeClassifierCV
from sklearn.neighbors import NearestCentroid
from torch import Tensor, nn

from leantrain.analysis.hidden import INPUT, look, places, pooled
from leantrain.analysis.probe import MEASURES, Probed, draw_probes, probe
from leantrain.analysis.read_out import STRENGTHS, ReadOut, fit_ridge
from leantrain.errors import RunError, UsageError
from leantrain.nn import MLP, Llama, ResNetCifar, ViT

Batches = list[tuple[Tensor, Tensor]]


def drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def classed(examples: int = 300, width: int = 12, classes: int = 4, noise: float = 1.0, size: int = 64) -> Batches:
    """Clouds around the classes' means, in batches."""
    labels = torch.randint(classes, (examples,), generator=drawn(1))
    means = 2 * torch.randn(classes, width, generator=drawn(2))
    inputs = means[labels] + noise * torch.randn(examples, width, generator=drawn(3))
    return list(zip(inputs.split(size), labels.split(size), strict=True))


def mlp(hidden: int = 3, width: int = 12, classes: int = 4) -> MLP:
    torch.manual_seed(0)
    return MLP(features=width, classes=classes, hidden=[16] * hidden)


def halves(model: nn.Module, batches: Batches) -> Tensor:
    """Which examples the probe fits with."""
    fitting = look(model, batches, None, 2048).fitting
    assert 0.3 < fitting.float().mean() < 0.7
    return fitting


def only(batches: Batches) -> tuple[Tensor, Tensor]:
    """All examples of all batches."""
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


# The measures. That of the raw input needs no network.


def test_the_linear_probe_is_scikit_learns_ridge_with_its_strength_chosen_by_leaving_one_out() -> None:
    for width, examples in ((12, 300), (90, 120)):  # with more examples than features, and with fewer
        x, y = only(batches := classed(examples, width, noise=4.0))
        fit = halves(mlp(width=width), batches)
        centre = x[fit].double().mean(0)
        centred = (x[fit].double() - centre).numpy()
        s = np.linalg.svd(centred, compute_uv=False)
        scale = (s[s > 1e-9] ** 2).mean()
        peer = RidgeClassifierCV([scale * each for each in STRENGTHS], store_cv_results=False)
        peer.fit(centred, y[fit].numpy())
        ours = fit_ridge(x[fit], y[fit], 4)
        assert ours.strength == pytest.approx(peer.alpha_, rel=1e-9)
        others = (x[~fit].double() - centre).numpy()
        assert ours.predicted(x[~fit]).tolist() == peer.predict(others).tolist()
        found = probe(mlp(width=width), batches, examples=examples).places[0]
        assert found.linear_probe == pytest.approx(peer.score(others, y[~fit].numpy()))
        assert 0.4 < found.linear_probe < 1  # neither hopeless nor too easy to tell


@pytest.mark.parametrize(("width", "noise"), [(5, 3.0), (40, 3.0), (5, 0.1)])
def test_the_strength_is_that_with_the_least_error_of_fits_without_one_example(width: int, noise: float) -> None:
    x, y = only(classed(24, width, noise=noise))
    x, onehot = x.double(), F.one_hot(y, 4).double()

    def fitted(rows: Tensor, targets: Tensor, strength: float) -> tuple[Tensor, Tensor]:
        centre, mean = rows.mean(0), targets.mean(0)
        gram = (rows - centre).T @ (rows - centre) + strength * torch.eye(width, dtype=rows.dtype)
        weight = torch.linalg.solve(gram, (rows - centre).T @ (targets - mean))
        return weight, mean - centre @ weight

    def error(strength: float) -> float:
        total = 0.0
        for each in range(len(x)):
            rest = torch.arange(len(x)) != each
            weight, bias = fitted(x[rest], onehot[rest], strength)
            total += float((onehot[each] - x[each] @ weight - bias).square().sum())
        return total

    ours = fit_ridge(x, y, 4)
    s = torch.linalg.svdvals(x - x.mean(0))
    scale = float(s[s > 1e-9].square().mean())
    best = min((each * scale for each in STRENGTHS), key=error)
    assert ours.strength == pytest.approx(best, rel=1e-9)
    weight, bias = fitted(x, onehot, best)
    torch.testing.assert_close(ours.weight, weight.T, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(ours.bias, bias, rtol=1e-6, atol=1e-9)


def test_the_nearest_mean_is_scikit_learns() -> None:
    x, y = only(batches := classed(noise=4.0))
    fit = halves(mlp(), batches)
    peer = NearestCentroid().fit(x[fit].numpy(), y[fit].numpy())
    assert probe(mlp(), batches).places[0].nearest_mean == pytest.approx(peer.score(x[~fit].numpy(), y[~fit].numpy()))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(24, 60), st.integers(1, 30), st.integers(2, 4), st.integers(0, 99))
def test_scatter_rank_and_alignment_are_their_definitions(examples: int, width: int, classes: int, seed: int) -> None:
    x = torch.randn(examples, width, generator=drawn(seed))
    y = torch.arange(examples) // 2 % classes
    model = mlp(width=width, classes=classes)
    found = probe(model, [(x, y)]).places[0]
    rows = x.double()
    means = {c: rows[y == c].mean(0) for c in range(classes)}
    within = sum(float((row - means[int(c)]).square().sum()) for row, c in zip(rows, y, strict=True))
    between = sum(float((means[int(c)] - rows.mean(0)).square().sum()) for c in y)
    assert found.scatter == pytest.approx(within / between, rel=1e-6)

    fit = rows[halves(model, [(x, y)])]
    s = torch.linalg.svdvals(fit - fit.mean(0))
    p = s[s > 1e-9] / s.sum()
    assert found.effective_rank == pytest.approx(math.exp(-float((p * p.log()).sum())), rel=1e-6)

    vectors = rows - rows.mean(1, keepdim=True)
    cosines = F.cosine_similarity(vectors[:, None], vectors[None], dim=-1) if width > 1 else torch.zeros(1)
    same = (y[:, None] == y[None]).double()
    if width > 1:
        centring = torch.eye(examples, dtype=torch.float64) - 1 / examples
        k, l = centring @ cosines @ centring, centring @ same @ centring
        assert found.alignment == pytest.approx(float((k * l).sum() / (k.norm() * l.norm())), abs=1e-9)
    else:
        assert found.alignment == 0  # a row less its mean is nothing


def test_what_is_collapsed_onto_its_class_measures_so() -> None:
    labels = torch.arange(40) % 4
    found = probe(mlp(width=4), [(F.one_hot(labels, 4).float(), labels)], examples=40).places[0]
    assert (found.linear_probe, found.nearest_mean) == (1, 1)
    assert found.scatter == pytest.approx(0, abs=1e-12) and found.alignment == pytest.approx(1)
    assert 2.8 < found.effective_rank <= 3 + 1e-9  # not quite as many of each class


def test_labels_that_mean_nothing_are_not_found_in_the_features() -> None:
    """The probe is judged by examples that it was not fitted to: here it could learn all of them by heart."""
    y = torch.randint(2, (400,), generator=drawn(5))
    found = probe(mlp(width=300, classes=2), [(torch.randn(400, 300, generator=drawn(6)), y)])
    assert all(abs(place.linear_probe - 0.5) < 0.12 and abs(place.nearest_mean - 0.5) < 0.12 for place in found.places)


def test_units_that_never_change_are_dead() -> None:
    model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4))
    with torch.no_grad():
        model[0].bias[:3] = -1e6  # never above 0
        model[0].bias[3] = 1e3
        model[0].weight[3] = 0  # always the same
    assert probe(model, classed()).places[-1].dead == 0.5
    maps = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2))
    with torch.no_grad():
        maps[0].bias[0] = -1e6
    x = torch.randn(20, 1, 8, 8, generator=drawn())
    assert probe(maps, [(x, torch.arange(20) // 2 % 2)], names=["2"]).places[0].dead == 0.25  # of the channels


def test_features_are_those_that_arrive_though_the_module_changes_them_in_place() -> None:
    model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(inplace=True), nn.Linear(8, 4))
    x, _ = only(batches := classed())
    seen = look(model, batches, ["1"], 2048).features["1"]
    torch.testing.assert_close(seen, model[0](x).detach())
    assert bool((seen < 0).any())


def test_constant_features_have_no_directions() -> None:
    model = mlp()
    with torch.no_grad():
        model.layers[1].bias.fill_(-1e6)
    place = next(place for place in probe(model, classed()).places if place.name == "layers.2")
    assert (place.dead, place.effective_rank, place.alignment, place.scatter) == (1, 0, 0, math.inf)
    assert 0.1 < place.linear_probe < 0.5  # the most frequent class


def test_the_models_own_accuracy_is_that_of_the_judging_half() -> None:
    model, (x, y) = mlp(), only(classed())
    found = probe(model, [(x, y)])
    assert found.accuracy == pytest.approx(float((model(x).argmax(1) == y)[~halves(model, [(x, y)])].float().mean()))
    assert (found.examples, found.classes) == (300, 4)


# Where it looks.


@pytest.mark.parametrize("frozen", [False, True])
def test_places_are_found_whatever_is_trained(frozen: bool) -> None:
    model = mlp().requires_grad_(not frozen)
    assert places(model, torch.zeros(2, 12)) == ["layers.1", "layers.2", "head"]
    assert all(param.requires_grad != frozen for param in model.parameters())


def test_places_lie_between_the_blocks_of_known_networks() -> None:
    assert places(ResNetCifar(20), torch.zeros(2, 3, 32, 32))[1:4] == ["layers.0", "layers.1", "layers.2"]
    vit = ViT(image_size=8, channels=3, classes=5, patch=4, hidden=16, layers=2, heads=2)
    assert [name for name in places(vit, torch.zeros(2, 3, 8, 8)) if name.startswith("layers")] == [
        "layers.0", "layers.1",
    ]  # fmt: skip


@pytest.mark.parametrize("tied", [False, True])
def test_weights_that_input_and_output_share_hide_nothing(tied: bool) -> None:
    model = Llama(40, context=16, hidden=16, mlp_hidden=32, layers=2, heads=2, tied=tied)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = places(model, torch.zeros(2, 16, dtype=torch.int64))
    assert found[:3] == ["layers.0", "layers.1", "norm"] and len(found) == (3 if tied else 4)
    assert all(param.requires_grad for param in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_text_is_looked_at_by_position_and_a_sequence_is_on_one_side() -> None:
    model = Llama(40, context=20, hidden=16, mlp_hidden=32, layers=1, heads=2)
    tokens = torch.randint(40, (30, 20), generator=drawn())
    found = probe(model, [(tokens[:10], tokens[:10]), (tokens[10:], tokens[10:])], examples=30 * 16)
    assert found.examples == 30 * 16 and found.places[0].linear_probe > 0.9  # the embedding knows its token
    # Every sequence repeats a token of its own: what is known of one half's tokens says nothing of the other's.
    own = torch.arange(30)[:, None].expand(30, 20) + 5
    assert probe(model, [(own, own)]).places[0].linear_probe == 0


def test_targets_that_do_not_count_are_left_out() -> None:
    x, y = only(classed())
    y[::3] = -100
    kept = torch.arange(300) % 3 != 0
    assert probe(mlp(), [(x, y)]).examples == int(kept.sum())
    assert probe(mlp(), [(x, y)]).classes == 4


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 3), st.integers(1, 2000), st.integers(1, 40), st.integers(1, 40))
def test_maps_are_pooled_to_what_a_probe_can_take(batch: int, channels: int, height: int, width: int) -> None:
    maps = torch.ones(1).expand(batch, channels, height, width)
    found = pooled(maps)
    assert len(found) == batch and found.shape[1] <= max(1024, channels) and bool((found == 1).all())
    if channels * height * width <= 1024:
        assert found.shape[1] == channels * height * width


def test_other_features_become_rows() -> None:
    x = torch.randn(3, 7, 5)
    torch.testing.assert_close(pooled(x), x.mean(1))
    assert torch.equal(pooled(x, torch.tensor([0, 6])), x[:, [0, 6]].reshape(6, 5))
    assert pooled(torch.randn(3, 2, 2, 2, 2)).shape == (3, 16)
    assert ReadOut(torch.ones(2, 5), torch.zeros(2), every_position=True)(x).shape == (3, 7, 2)
    assert ReadOut(torch.ones(2, 5), torch.zeros(2))(x).shape == (3, 2)


def test_looking_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 4))
    model[2].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    first = probe(model, classed())
    assert first == probe(model, classed())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model] == [True, True, False, True, True] and model.training
    assert all(param.grad is None and param.requires_grad for param in model.parameters())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert torch.equal(generator, torch.get_rng_state())


def test_it_stops_when_it_has_seen_enough() -> None:
    asked = 0

    def loader():
        nonlocal asked
        for batch in classed(size=30):
            asked += 1
            yield batch

    assert probe(mlp(), loader(), examples=50).examples == 50
    assert asked == 3  # one more, only to see that it is not needed


def test_a_sorted_loader_is_drawn_from_as_a_whole() -> None:
    x, y = only(classed())
    order = y.argsort(stable=True)
    batches = list(zip(x[order].split(32), y[order].split(32), strict=True))
    assert probe(mlp(), batches, examples=120).classes < 4
    found = look(mlp(), batches, None, 120, shuffle=True)
    assert len(found.labels) == 120 and bool((found.labels.bincount(minlength=4) > 12).all())
    rows = {tuple(row.tolist()) for row in found.features[INPUT]}
    assert len(rows) == 120 and rows <= {tuple(row.tolist()) for row in x}
    again = look(mlp(), batches, None, 120, shuffle=True)
    assert torch.equal(found.features["head"], again.features["head"])
    by_row = {tuple(row.tolist()): int(label) for row, label in zip(x, y, strict=True)}
    assert [by_row[tuple(row.tolist())] for row in found.features[INPUT]] == found.labels.tolist()
    everything = look(mlp(), batches, None, 2048, shuffle=True)
    assert sorted(everything.labels.tolist()) == sorted(y.tolist())


# What comes out.


def test_the_result_can_be_logged_read_and_drawn(tmp_path: Path) -> None:
    found = probe(mlp(), classed())
    scalars = found.scalars()
    assert list(scalars)[:2] == ["probe/input/linear_probe", "probe/input/nearest_mean"]
    assert scalars["probe/head/dead"] == found.places[-1].dead and scalars["probe/accuracy"] == found.accuracy
    assert len(scalars) == 4 * len(MEASURES) + 1 and all(isinstance(value, float) for value in scalars.values())
    assert found.to_dict()["places"][1]["name"] == "layers.1"
    assert found.best.linear_probe == max(place.linear_probe for place in found.places)
    lines = found.table().splitlines()
    assert len(lines) == 6 and lines[0].split()[1:] == ["width", *MEASURES] and lines[1].startswith("input ")
    assert len({len(line) for line in lines[:5]}) == 1
    found.plot(tmp_path / "one.png")
    draw_probes({"step 0": found, "step 9": Probed(found.places[1:], 0.5, 10, 4)}, tmp_path / "two.png")
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("one.png", "two.png"))


def test_the_report_names_the_same_measures() -> None:
    from leantrain.report import charts

    assert list(charts.MEASURES) == list(MEASURES)


def test_bad_input_is_named() -> None:
    model, batches = mlp(), classed()
    x, y = batches[0]
    twice = nn.Sequential(shared := nn.Linear(12, 12), nn.ReLU(), shared, nn.Linear(12, 4))
    for call, message in [
        (lambda: probe(model, batches, examples=3), "examples=3"),
        (lambda: probe(model, []), "at least one batch"),
        (lambda: probe(model, [(x, y.float())]), r"int64 \[B\].* got float32 \[64\]"),
        (lambda: probe(mlp(), [(x, y[:, None])], names=[]), "no place in MLP to look at"),
        (lambda: probe(mlp(), [(x, y[:, None])]), r"features for a target at every position must be \[B, T, C\]"),
        (lambda: probe(model, [(x, y[:9])]), "the same examples, got 64 and 9"),
        (lambda: probe(nn.Sequential(nn.Linear(12, 4), nn.Flatten(0)), [(x, y)], names=["0"]),
         r"targets \[64\] do not fit the model's output \[256\]"),
        (lambda: probe(model, batches, names=["layers.9"]), r"MLP has no module 'layers\.9'; did you mean"),
        (lambda: probe(model, batches, names=[""]), "MLP has no module ''"),
        (lambda: probe(model, batches, names=["layers"]), "in front of layers: the forward pass does not call it"),
        (lambda: probe(twice, batches, names=["0"]), "in front of 0: it is called several times"),
        (lambda: probe(Llama(40, 16, hidden=16, mlp_hidden=32, layers=1, heads=2), [(y[None, :16], y[None, :16])],
                       names=["embedding"]), "in front of embedding: no features go into it"),
        (lambda: probe(model, [(x, torch.zeros_like(y))]), "two classes"),
        (lambda: draw_probes({}, "x.png"), "no probes to draw"),
    ]:  # fmt: skip
        with pytest.raises(UsageError, match=message):
            call()
    with torch.no_grad():
        model.layers[0].weight[0, 0] = math.inf
    with pytest.raises(RunError, match=r"what goes into layers\.1 is not finite"):
        probe(model, batches)


def test_the_input_is_no_module_of_that_name() -> None:
    assert INPUT == "input"
    model = nn.Sequential()
    model.add_module("input", nn.Linear(12, 8))
    model.add_module("output", nn.Linear(8, 4))
    assert [place.name for place in probe(model, classed()).places] == ["input", "output"]
    assert [place.name for place in probe(model, classed(), names=["input"]).places] == ["input"]
