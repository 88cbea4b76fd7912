"""Fixtures with two and four real gloo ranks, shared by all tests of a session."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from unittest import mock

import pytest
from rank_pool import RankPool

from locsgd_dist import saving
from locsgd_dist.checkpoint import store


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "distributed" in item.path.parts:
            item.add_marker(pytest.mark.distributed)
            # With pytest-xdist all of them go to one worker: each worker would start ranks of its own.
            item.add_marker(pytest.mark.xdist_group("ranks"))


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[RankPool]:
    pool = RankPool(2)
    yield pool
    pool.stop()


@pytest.fixture(scope="session")
def four_ranks() -> Iterator[RankPool]:
    pool = RankPool(4)
    yield pool
    pool.stop()


@pytest.fixture(params=[2, 4])
def ranks(request: pytest.FixtureRequest) -> RankPool:
    """Two ranks, then four."""
    return request.getfixturevalue("two_ranks" if request.param == 2 else "four_ranks")


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No checkpoint can be written, which is found out without a pause."""
    refused = mock.Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    monkeypatch.setattr(store, "save_atomically", refused)
    monkeypatch.setattr(saving, "_PAUSE_SECONDS", 0.0)
