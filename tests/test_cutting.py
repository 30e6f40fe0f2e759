"""Cutting: the blocks together are the model, each computes and trains only its own part, and where a model cannot be
cut is found out, against what autograd itself says of gradients that are stopped there."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from leantrain.cutting import Cut, sensible, survey
from leantrain.errors import UsageError
from leantrain.layers import output_layer
from leantrain.learn import checkpoint_activations
from leantrain.nn import MLP, HuggingFaceLM, Llama, ResNetCifar, ViT, from_config
from leantrain.outputs import logits_of

VOCABULARY, CONTEXT = 61, 12


def huggingface(kind: str, **more: Any) -> HuggingFaceLM:
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    sizes = {
        "GPT2": {"n_positions": CONTEXT, "n_embd": 16, "n_layer": 4, "n_head": 2},
        "Llama": {
            "max_position_embeddings": CONTEXT, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4,
            "num_attention_heads": 2,
        },
    }  # fmt: skip
    special = {"bos_token_id": 0, "eos_token_id": 0}
    config = getattr(transformers, f"{kind}Config")
    return from_config(
        config(vocab_size=VOCABULARY, **sizes[kind], **special, **{"tie_word_embeddings": False, **more})
    )


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2,
        max_position_embeddings=CONTEXT, num_labels=3,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


class Positions(nn.Module):
    """A transformer in the manner of small teaching repositories: positions are looked up by number, [T, C]; batch and
    time are one axis inside; and tensors are changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.where = nn.Embedding(VOCABULARY, 8), nn.Embedding(CONTEXT, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.head = nn.Linear(8, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        hidden += self.where(torch.arange(tokens.shape[1]))
        for layer in self.layers:
            hidden = layer(hidden.reshape(-1, 8)).view(*tokens.shape, 8)
            hidden.relu_()
        return self.head(hidden)


def tokens(examples: int, length: int = CONTEXT - 4) -> Tensor:
    return torch.randint(VOCABULARY, (examples, length))


def images(examples: int, size: int = 16) -> Tensor:
    return torch.randn(examples, 3, size, size)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "MLP": (lambda: MLP(12, classes=3, hidden=(8,) * 6), lambda n: torch.randn(n, 12)),
    "Llama": (lambda: Llama(VOCABULARY, CONTEXT, hidden=16, mlp_hidden=24, layers=4, heads=2), tokens),
    "ResNet": (lambda: ResNetCifar(classes=4), images),
    "ViT": (lambda: ViT(16, classes=4, hidden=16, layers=4, heads=2), images),
    "positions": (Positions, tokens),
    "Hugging Face GPT-2": (partial(huggingface, "GPT2"), tokens),
    "Hugging Face Llama": (partial(huggingface, "Llama"), tokens),
    "Hugging Face BERT": (bert, tokens),
}
OTHER_SHAPES = {
    "Llama": lambda: tokens(3, 5), "positions": lambda: tokens(3, 5), "Hugging Face GPT-2": lambda: tokens(3, 5),
    "Hugging Face Llama": lambda: tokens(3, 5), "Hugging Face BERT": lambda: tokens(3, 5),
    "ResNet": lambda: images(3, 24),
}  # fmt: skip
"""Inputs of which more than the number of examples is other than the sample's."""


def built(name: str) -> tuple[nn.Module, Callable[[int], Tensor]]:
    torch.manual_seed(0)
    build, inputs = MODELS[name]
    return build().eval(), inputs


def chained(cut: Cut, inputs: Tensor) -> list[Tensor]:
    """Every block's output, each run alone on the one before's."""
    outputs: list[Tensor] = []
    for block in range(len(cut)):
        outputs.append(cut.run(block, inputs, outputs[-1] if outputs else None))
    return outputs


# --- the blocks are the model ---


@pytest.mark.parametrize("blocks", [1, 2, 3, 5])
@pytest.mark.parametrize("name", MODELS)
def test_blocks_run_one_by_one_make_the_models_output(name: str, blocks: int) -> None:
    model, inputs = built(name)
    cut = Cut(model, inputs(2), blocks=blocks)
    assert len(cut) == blocks == len(cut.parameters) == len(cut.described())
    others = [OTHER_SHAPES[name]()] if name in OTHER_SHAPES else []
    for given_inputs in [inputs(2), inputs(5), inputs(1), *others, inputs(5)]:
        assert torch.equal(chained(cut, given_inputs)[-1], logits_of(model(given_inputs)))


@pytest.mark.parametrize("name", MODELS)
def test_hooks_do_nothing_of_themselves_and_see_the_features_on_the_way(name: str) -> None:
    model, inputs = built(name)
    batch = inputs(4)
    plain = logits_of(model(batch))
    sample = inputs(2)
    cut = Cut(model, sample, blocks=4)
    assert torch.equal(logits_of(model(batch)), plain)
    seen: list[tuple[int, Tensor]] = []

    def at(number: int, features: Tensor) -> Tensor:
        seen.append((number, features))
        return features

    with cut.stops(at):
        assert torch.equal(logits_of(model(batch)), plain)
    assert [number for number, _ in seen] == [0, 1, 2]
    for (_, features), alone in zip(seen, chained(cut, batch), strict=False):
        assert torch.equal(features, alone)
    logits_of(model(batch))
    assert len(seen) == 3
    assert torch.equal(cut.output, logits_of(model(sample)))
    assert all(torch.equal(a, b) for a, b in zip(cut.features, chained(cut, sample), strict=False))


@pytest.mark.parametrize("name", MODELS)
def test_a_block_reaches_its_own_parameters_and_no_others(name: str) -> None:
    model, inputs = built(name)
    cut = Cut(model, inputs(2), blocks=4)
    params = list(model.parameters())
    assert sorted(id(p) for block in cut.parameters for p in block) == sorted(map(id, params))  # each in one block
    batch = inputs(3)
    features = None
    for block, own in enumerate(cut.parameters):
        output = cut.run(block, batch, features)
        found = torch.autograd.grad(output.square().sum(), params, allow_unused=True)
        reached = {id(p) for p, gradient in zip(params, found, strict=True) if gradient is not None}
        assert reached <= set(map(id, own))
        if block < len(cut) - 1:  # the last one also has what the pass does not touch
            assert reached == set(map(id, own))
        features = output.detach()


@pytest.mark.parametrize("name", MODELS)
def test_a_block_alone_computes_nothing_of_the_others(name: str) -> None:
    model, inputs = built(name)
    cut = Cut(model, inputs(2), blocks=4)
    batch = inputs(3)
    outputs = chained(cut, batch)  # also shows it the batch's shape
    each = [flops(partial(cut.run, k, batch, outputs[k - 1] if k else None)) for k in range(len(cut))]
    assert sum(each) == flops(partial(model, batch))
    assert all(each[1:])  # the first may be a look-up alone


def flops(call: Callable[[], object]) -> int:
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        call()
    return int(counter.get_total_flops())


def test_a_block_alone_draws_and_counts_nothing_for_those_before_it() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 4), nn.Linear(4, 2))
    cut = Cut(model, torch.randn(2, 4), cut=["3"])
    inputs, features = torch.randn(7, 4), torch.randn(7, 4)
    random, counted = torch.get_rng_state(), model[1].num_batches_tracked.clone()
    cut.run(1, inputs, features)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(model[1].num_batches_tracked, counted)
    assert all(module.training for module in model.modules())
    cut.run(0, inputs, None)
    assert model[1].num_batches_tracked == counted + 1


def test_a_shape_seen_first_under_autocast_leaves_no_weights_without_gradients() -> None:
    model, inputs = built("Llama")
    cut = Cut(model, inputs(2), blocks=2)
    features = cut.run(0, inputs(5), None).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = cut.run(1, inputs(5), features).float().square().mean()
    loss.backward()
    assert all(param.grad is not None for param in cut.parameters[1])


def test_running_a_block_leaves_activation_checkpointing_in_place() -> None:
    model, inputs = built("Llama")
    checkpoint_activations(model)
    wrapped = [layer.forward for layer in model.layers]
    cut = Cut(model, inputs(2), blocks=4)
    batch = inputs(3)
    assert torch.equal(chained(cut, batch)[-1], model(batch))
    assert [layer.forward for layer in model.layers] == wrapped
    plain, _ = built("Llama")
    assert all("forward" not in vars(module) for module in plain.modules())
    chained(Cut(plain, inputs(2), blocks=4), batch)
    assert all("forward" not in vars(module) for module in plain.modules())


def test_an_error_in_the_model_leaves_it_as_it_was() -> None:
    model, inputs = built("Llama")
    cut = Cut(model, inputs(2), blocks=2)
    with pytest.raises(RuntimeError):
        cut.run(1, inputs(3), torch.randn(3, 8, 5))  # of another width
    with pytest.raises(ZeroDivisionError), cut.stops(lambda number, features: features / (1 // 0)):
        model(inputs(3))
    batch = inputs(3)
    assert torch.equal(chained(cut, batch)[-1], model(batch))


def test_two_cuts_of_one_model_and_a_copy_of_it_do_not_meet() -> None:
    model, inputs = built("Llama")
    two, four = Cut(model, inputs(2), blocks=2), Cut(model, inputs(2), blocks=4)
    other = copy.deepcopy(model)
    batch = inputs(3)
    expected = chained(four, batch)[-1]
    assert torch.equal(chained(two, batch)[-1], expected)
    with two.stops(lambda number, features: features * 0):
        changed = model(batch)
        assert torch.equal(other(batch), expected)
    assert not torch.equal(changed, expected)
    assert torch.equal(model(batch), expected)


def test_looking_at_a_model_changes_nothing_of_it() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    model[1].eval()
    before = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    Cut(model, torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), blocks=2)
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model] == [True, False, True, True]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(param.grad is None for param in model.parameters())


# --- where it can be cut ---


class Graph(nn.Module):
    """Layers, each of which is given the sum of some earlier ones' outputs (-1: of the input)."""

    def __init__(self, parents: list[list[int]]) -> None:
        super().__init__()
        self.parents = parents
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in parents)

    def forward(self, inputs: Tensor) -> Tensor:
        values = [inputs]
        for layer, parents in zip(self.layers, self.parents, strict=True):
            values.append(layer(sum(values[parent + 1] for parent in parents)).tanh())
        return values[-1]


graphs = st.integers(2, 7).flatmap(
    lambda n: st.tuples(*(st.lists(st.integers(-1, i - 1), min_size=1, max_size=3, unique=True) for i in range(n)))
)


@given(parents=graphs, seed=st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_a_place_is_clean_if_and_only_if_stopping_gradients_there_stops_all(
    parents: tuple[list[int], ...], seed: int
) -> None:
    torch.manual_seed(seed)
    model = Graph([list(each) for each in parents]).double()
    inputs = torch.randn(2, 3, dtype=torch.float64)
    found = {place.name: place.problem is None for place in survey(model, inputs).places}
    for number, layer in enumerate(model.layers):
        before, after, features = gradients_stopped_at(model, layer, inputs)
        if not features.requires_grad:  # nothing that is trained comes before it
            assert f"layers.{number}" not in found
            continue
        matters = bool(torch.autograd.grad(model(inputs).sum(), layer.weight, allow_unused=True)[0] is not None)
        assert found[f"layers.{number}"] == (matters and not before & after), (number, before, after)


def gradients_stopped_at(model: Graph, layer: nn.Module, inputs: Tensor) -> tuple[set[int], set[int], Tensor]:
    """Which layers the features at `layer` depend on, which ones the output does once they are detached, and those."""
    kept: list[Tensor] = []

    def stop(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        kept.append(args[0])
        return (args[0].detach(),)

    handle = layer.register_forward_pre_hook(stop)
    output = model(inputs)
    handle.remove()
    return used(model, kept[0]), used(model, output), kept[0]


def used(model: Graph, value: Tensor) -> set[int]:
    if not value.requires_grad:
        return set()
    weights = [each.weight for each in model.layers]
    found = torch.autograd.grad(value.sum(), weights, allow_unused=True, retain_graph=True)
    return {number for number, gradient in enumerate(found) if gradient is not None}


@example(parents=([-1], [-1], [0], [1, 2]), blocks=2)  # a branch of its own, done before the cut and needed behind it
@given(parents=graphs, blocks=st.integers(1, 7))
@settings(max_examples=40, deadline=None)
def test_as_many_blocks_as_there_are_places_and_no_more(parents: tuple[list[int], ...], blocks: int) -> None:
    torch.manual_seed(0)
    model = Graph([list(each) for each in parents])
    inputs = torch.randn(2, 3)
    most = len(sensible(model, survey(model, inputs))) + 1
    if blocks > most:
        with pytest.raises(UsageError, match=rf"blocks must be 1 to {most}, as many as Graph can be cut into"):
            Cut(model, inputs, blocks=blocks)
        return
    cut = Cut(model, inputs, blocks=blocks)
    assert all(cut.parameters)
    assert torch.equal(chained(cut, inputs)[-1], model(inputs))


@pytest.mark.parametrize("name", MODELS)
def test_repeated_blocks_are_what_models_are_cut_between(name: str) -> None:
    model, inputs = built(name)
    cut = Cut(model, inputs(2), blocks=4)
    parents = {each.rpartition(".")[0] for each in cut.names}
    assert len(parents) == 1
    assert isinstance(model.get_submodule(parents.pop()), nn.ModuleList)


def test_blocks_are_balanced_by_parameters_or_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(4, 40), nn.Linear(40, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    sample = torch.randn(2, 4)
    assert Cut(model, sample, blocks=2).names == ("1",)
    monkeypatch.setattr("leantrain.cutting.seconds_between", lambda model, sample, names: [1.0, 1.0, 1.0, 9.0, 1.0])
    assert Cut(model, sample, blocks=2, balance="time").names == ("3",)
    assert Cut(model, sample, blocks=3, balance="time").names == ("3", "4")
    monkeypatch.undo()
    assert len(Cut(model, sample, blocks=3, balance="time")) == 3


def test_names_may_come_in_any_order_and_more_than_once() -> None:
    model, inputs = built("MLP")
    cut = Cut(model, inputs(2), cut=["head", "layers.2", "layers.4", "layers.2"])
    assert cut.names == ("layers.2", "layers.4", "head")
    assert [sum(p.numel() for p in block) for block in cut.parameters] == [
        12 * 8 + 8 + 8 * 8 + 8, 2 * (8 * 8 + 8), 2 * (8 * 8 + 8), 8 * 3 + 3,
    ]  # fmt: skip
    assert cut.described() == [
        f"from {a} to {b}"
        for a, b in pairwise(["the input", *(f"the input of {name}" for name in cut.names), "the output"])
    ]
    assert len(Cut(model, inputs(2), cut=[])) == 1


def test_features_given_by_keyword_or_beside_other_tensors_are_found() -> None:
    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), Masked()

        def forward(self, inputs: Tensor) -> Tensor:
            return self.second(torch.arange(4), scale=None, hidden=self.first(inputs))

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, positions: Tensor, scale: Tensor | None, hidden: Tensor) -> Tensor:
            return self.layer(hidden + positions)

    torch.manual_seed(0)
    model, inputs = Keywords(), torch.randn(3, 4)
    cut = Cut(model, inputs, cut=["second"])
    first, last = chained(cut, inputs)
    assert torch.equal(first, model.first(inputs))
    assert torch.equal(last, model(inputs))


def test_what_is_frozen_and_what_the_pass_does_not_touch() -> None:
    model, inputs = built("MLP")
    model.layers[0].requires_grad_(False)
    model.idle = nn.Linear(2, 2)
    cut = Cut(model, inputs(2), blocks=3)
    trained = [param for param in model.parameters() if param.requires_grad]
    assert sorted(id(p) for block in cut.parameters for p in block) == sorted(map(id, trained))
    assert {id(p) for p in model.idle.parameters()} <= {id(p) for p in cut.parameters[-1]}
    with pytest.raises(UsageError, match=r"cannot be cut before layers\.1: no features that something was trained"):
        Cut(model, inputs(2), cut=["layers.1"])


# --- what is refused ---


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)) for _ in range(3))
        self.head = nn.Linear(4, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.embed(inputs)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.head(hidden)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.again(self.again(self.first(inputs)).tanh()))


class Beside(nn.Module):
    """Computes something that its output does not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.side, self.aside = nn.Linear(4, 4), nn.Linear(4, 4)
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        self.kept = self.aside(self.side(inputs))
        return self.head(self.layer(inputs))


@pytest.mark.parametrize(
    ("build", "arguments", "message"),
    [
        (Residual, {"cut": ["blocks.1.1"]}, r"before blocks\.1\.1: it lies inside a residual connection: another way "
         r"leads around it; cut before head instead"),
        (Residual, {"cut": ["blocks.1"]}, r"before blocks\.1: it lies inside a residual connection"),
        (Residual, {"cut": ["block.1"]}, r"Residual has no module 'block\.1'; did you mean 'blocks\.1'\?"),
        (Residual, {"cut": ["embed"]}, r"before embed: no features that something was trained for go into it; cut "
         r"before head instead"),
        (Residual, {"blocks": 3}, r"blocks must be 1 to 2, as many as Residual can be cut into; got 3"),
        (Residual, {"blocks": 0}, r"blocks must be 1 to 2"),
        (Twice, {"cut": ["again"]}, r"before again: it is called several times in one forward pass; cut before head"),
        (Beside, {"cut": ["aside"]}, r"before aside: the model's output does not depend on it"),
        (Beside, {"blocks": 3}, r"blocks must be 1 to 2"),
        (nn.ReLU, {"blocks": 1}, r"ReLU has nothing to train"),
        (Residual, {}, r"give cut=\[names of modules\] or blocks=number, one of the two; got cut=None, blocks=None"),
        (Residual, {"cut": ["head"], "blocks": 2}, r"one of the two; got cut=\['head'\], blocks=2"),
        (Residual, {"blocks": 2, "balance": "times"}, r"balance 'times' is unknown; did you mean 'time'\?"),
        (Residual, {"cut": ["head"], "frozen": "head"}, r"block 2 of 2 has nothing to train: from the input of head to "
         r"the output"),
    ],
)  # fmt: skip
def test_what_cannot_be_cut_is_refused_with_what_can_be(
    build: Callable[[], nn.Module], arguments: dict[str, Any], message: str
) -> None:
    model = build()
    if name := arguments.pop("frozen", None):
        model.get_submodule(name).requires_grad_(False)
    with pytest.raises(UsageError, match=message):
        Cut(model, torch.randn(2, 4), **arguments)


@pytest.mark.parametrize("kind", ["ours", "Hugging Face GPT-2"])
def test_a_tied_weight_is_named_with_a_way_out(kind: str) -> None:
    if kind == "ours":
        model: nn.Module = Llama(VOCABULARY, CONTEXT, hidden=16, mlp_hidden=24, layers=3, heads=2, tied=True)
        place = "layers.1"
    else:
        model, place = huggingface("GPT2", tie_word_embeddings=True), "model.transformer.h.1"
    assert output_layer(model) is not None
    weight = r"embedding\.weight|model\.transformer\.wte\.weight"
    untie = r"build it without tied weights \(in transformers, tie_word_embeddings=False\)"
    problem = rf"before {place}: ({weight}) is used before and after it \(a tied weight\); .*"
    with pytest.raises(UsageError, match=problem + untie):
        Cut(model, tokens(2), cut=[place])
    with pytest.raises(UsageError, match=rf"blocks must be 1 to 1, .*; got 2; {untie}"):
        Cut(model, tokens(2), blocks=2)
    assert len(Cut(model, tokens(2), blocks=1)) == 1
