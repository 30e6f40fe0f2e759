"""Storage arithmetic against sizes worked out by hand."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from leantrain.ledger.storages import reachable_tensors, storage_bytes, storage_keys

shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@given(st.lists(shapes, max_size=5), st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]))
def test_fresh_tensors_count_their_elements(sizes: list[tuple[int, ...]], dtype: torch.dtype) -> None:
    tensors = [torch.zeros(size, dtype=dtype) for size in sizes]
    assert storage_bytes(tensors) == sum(t.numel() for t in tensors) * dtype.itemsize


def test_a_view_counts_the_whole_storage_it_keeps_alive() -> None:
    assert storage_bytes([torch.zeros(10, 10)[:2, :3]]) == 400


def test_tensors_on_one_storage_count_once() -> None:
    whole = torch.zeros(6)
    assert storage_bytes([whole, whole, whole[:3], whole.view(2, 3).t(), whole.detach()]) == 24


def test_excluded_storages_do_not_count() -> None:
    a, b = torch.zeros(3), torch.zeros(5)
    assert storage_bytes([a, b[1:]], excluding=storage_keys([b])) == 12


def test_sparse_tensors_count_indices_and_values() -> None:
    coo = torch.sparse_coo_tensor(torch.tensor([[0, 2], [1, 0]]), torch.tensor([1.0, 2.0]), (3, 3))
    assert storage_bytes([coo]) == 2 * 2 * 8 + 2 * 4
    csr = torch.sparse_csr_tensor(torch.arange(4), torch.arange(3), torch.ones(3))
    assert storage_bytes([csr]) == 4 * 8 + 3 * 8 + 3 * 4


def test_meta_and_uninitialised_tensors_hold_nothing() -> None:
    assert storage_bytes([torch.zeros(9, device="meta"), nn.LazyLinear(3).weight]) == 0


def test_a_wrapped_tensor_counts_the_plain_tensors_inside() -> None:
    nested = torch.nested.nested_tensor([torch.zeros(2, 4), torch.zeros(3, 4)], layout=torch.jagged)
    assert storage_bytes([nested]) == 5 * 4 * 4 + 3 * 8  # values and offsets


class Projector:
    def __init__(self, basis: torch.Tensor) -> None:
        self.rank = 2
        self.ortho_matrix = basis


class Slotted:
    __slots__ = ("basis", "unset")

    def __init__(self, basis: torch.Tensor) -> None:
        self.basis = basis


@pytest.mark.parametrize(
    "wrap",
    [
        lambda t: t,
        lambda t: [1, ("x", t)],
        lambda t: {"a": {"b": t}},
        lambda t: OrderedDict(a=[t, t]),
        Projector,
        Slotted,
        lambda t: [Projector(t), Slotted(t)],
    ],
)
def test_a_tensor_is_found_wherever_a_state_hides_it(wrap: object) -> None:
    tensor = torch.zeros(4)
    found = list(reachable_tensors({"p": {"state": wrap(tensor)}}))  # type: ignore[operator]
    assert len(found) == 1
    assert found[0] is tensor


def test_modules_and_optimizers_are_not_entered_and_cycles_end() -> None:
    model = nn.Linear(2, 2)
    loop: dict[str, object] = {"model": model, "optimizer": torch.optim.SGD(model.parameters()), "class": Projector}
    loop["self"] = loop
    assert list(reachable_tensors(loop)) == []


def test_the_authors_galore_projectors_are_found() -> None:
    galore_torch = pytest.importorskip("galore_torch", reason="galore-torch is not installed")
    weight = nn.Parameter(torch.randn(12, 8))
    group = {"params": [weight], "rank": 3, "update_proj_gap": 5, "scale": 1.0, "proj_type": "std"}
    optimizer = galore_torch.GaLoreAdamW([group], lr=1e-2, no_deprecation_warning=True)
    weight.grad = torch.randn(12, 8)
    optimizer.step()
    projector = optimizer.state[weight]["projector"]
    moments = 2 * 12 * 3 * 4
    basis = projector.ortho_matrix.untyped_storage().nbytes()
    assert basis >= 3 * 8 * 4
    assert storage_bytes(reachable_tensors(optimizer.state)) == moments + basis
