"""The table of kept outputs, as another process finds it."""

from __future__ import annotations

import multiprocessing as mp
import os
from pathlib import Path

import pytest
import torch

from locsgd_dist.distributed.output_store import OutputStore, row_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_come_back_as_they_were_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    store = OutputStore(tmp_path / "rows", 10, (2, 3, 4), dtype)
    keys = torch.tensor([7, 0, 3])
    assert not store.has(torch.arange(10)).any()
    rows = torch.randn(3, 2, 3, 4).to(dtype)
    store.write(keys, rows)
    assert store.has(torch.arange(10)).nonzero().flatten().tolist() == [0, 3, 7]
    assert torch.equal(store.read(torch.tensor([3, 7, 3])), rows[[2, 0, 2]])
    # A row that is read is a copy: what trains on it may work in place.
    store.read(keys).zero_()
    assert torch.equal(store.read(keys), rows)


def write_from_another_process(path: Path) -> None:
    OutputStore(path, 10, (5,), torch.float32).write(torch.tensor([4]), torch.full((1, 5), 2.5))


def test_one_process_reads_what_another_has_kept_and_the_name_may_go(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    store = OutputStore(path, 10, (5,), torch.float32)
    process = mp.get_context("spawn").Process(target=write_from_another_process, args=(path,))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert store.has(torch.arange(10)).nonzero().flatten().tolist() == [4]
    path.unlink()
    assert store.read(torch.tensor([4])).tolist() == [[2.5] * 5]


def test_room_is_taken_at_once_and_where_there_is_none_it_is_said(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    OutputStore(path, 100, (1000,), torch.float32)
    status = os.stat(path)
    assert status.st_size == 100 * (row_bytes((1000,), torch.float32) + 1)
    assert status.st_blocks * 512 >= status.st_size
    path.unlink()
    with pytest.raises(OSError, match=r"no room for [\d.]+ GiB in .*"):
        OutputStore(path, 2**48, (8,), torch.float32)


def mapped_by(process: str, path: Path) -> int:
    return Path(f"/proc/{process}/maps").read_text().count(str(path))


def test_a_process_that_is_forked_does_not_hold_the_room(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    store = OutputStore(path, 100, (1000,), torch.float32)
    assert mapped_by("self", path) == 1
    assert not store.has(torch.arange(100)).any()
    child = os.fork()
    if child == 0:
        os._exit(mapped_by("self", path))
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    del store
    assert mapped_by("self", path) == 0
