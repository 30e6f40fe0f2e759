"""What every test shares: one thread, a cache of its own, and the folder of real data where there is one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent

# Before anything imports torch: the OpenMP pool takes its size when it starts.
os.environ["OMP_NUM_THREADS"] = "1"


def pytest_configure() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Point LEANTRAIN_CACHE at a folder of this test run: no test reads what an earlier one, or a user, left behind."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["LEANTRAIN_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the repository."""
    return REPOSITORY


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder with MNIST, CIFAR-10, Tiny Shakespeare and the tables; a test that needs it skips without it."""
    folder = Path(os.environ.get("LEANTRAIN_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"needs real data: no folder {folder} (set LEANTRAIN_DATA)")
    return folder
