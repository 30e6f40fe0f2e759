"""The GPU's kernels give the bits that NumPy gives: in Triton's interpreter everywhere, on a GPU where there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from leantrain.exchange.codecs import signs

KERNELS = """
import sys, torch
from leantrain.exchange.codecs import signs_triton as kernels
from leantrain.exchange.codecs.signs import majority, pack_signs, unpack_signs

device = torch.device(sys.argv[1])
generator = torch.Generator().manual_seed(0)
for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
    for length in (1, 7, 8, 203, 8193):
        x = torch.randn(length, generator=generator).to(dtype)
        x[::5], x[1::7], x[2::11] = -0.0, torch.inf, -torch.inf
        packed, has_nan = kernels.pack(x.to(device))
        assert torch.equal(packed.cpu(), pack_signs(x)) and not has_nan, (dtype, length)
        out = torch.empty(len(packed), 8, dtype=dtype, device=device)
        kernels.unpack(packed, out)
        assert torch.equal(out.view(-1)[:length].cpu(), unpack_signs(pack_signs(x), length, dtype)), (dtype, length)
        x[length // 2] = torch.nan
        assert kernels.pack(x.to(device))[1], (dtype, length)
for voters in (1, 2, 3, 8, 9):
    for length in (70, 1030):
        stack = torch.randint(256, (voters, length), dtype=torch.uint8, generator=generator)
        ties = torch.randint(256, (length,), dtype=torch.uint8, generator=generator)
        assert torch.equal(kernels.majority(stack.to(device), None).cpu(), majority(stack)), (voters, length)
        assert torch.equal(kernels.majority(stack.to(device), ties.to(device)).cpu(), majority(stack, ties))
print("equal")
"""


def run(device: str, **environment: str) -> None:
    # The interpreter is chosen when a kernel is defined, so before anything of this process has imported it.
    done = subprocess.run(
        [sys.executable, "-c", KERNELS, device],
        env={**os.environ, **environment},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "equal" in done.stdout, done.stderr[-3000:]


def test_triton_kernels_equal_numpy_in_its_interpreter() -> None:
    pytest.importorskip("triton")
    run("cpu", TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_triton_kernels_equal_numpy_on_a_gpu() -> None:
    pytest.importorskip("triton")
    run("cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_tensors_on_a_gpu_are_packed_and_voted_on_there() -> None:
    x = torch.randn(3, 1001)
    there = torch.stack([signs.pack_signs(row.cuda()) for row in x])
    here = torch.stack([signs.pack_signs(row) for row in x])
    assert there.is_cuda and torch.equal(there.cpu(), here)
    vote = signs.majority(there)
    assert vote.is_cuda and torch.equal(vote.cpu(), signs.majority(here))
    back = signs.unpack_signs(vote, 1001, torch.bfloat16)
    assert back.is_cuda and torch.equal(back.cpu(), signs.unpack_signs(signs.majority(here), 1001, torch.bfloat16))
