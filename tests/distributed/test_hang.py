"""A rank that hangs: the error of those that wait for it names it, and no other error is touched."""

from __future__ import annotations

import re
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_pool import free_ports, world_of_its_own

from locsgd_dist.distributed import DistributedConfig, Runtime
from locsgd_dist.faults import naming_silent_ranks

CPU = torch.device("cpu")


def hang(ports: list[int], silent: set[int], patience: float, folder: Path) -> tuple[str, str]:
    """The error of this rank and the one behind it; of a silent one, which waits until the others have failed, none."""
    with world_of_its_own(ports):
        runtime = Runtime(CPU, DistributedConfig(timeout_minutes=0.1))
        runtime.barrier()
        errors = ("", "")
        if runtime.rank in silent:
            while len(list(folder.iterdir())) < runtime.world_size - len(silent):
                time.sleep(0.05)
        else:
            try:
                with naming_silent_ranks(runtime, timedelta(seconds=patience)):
                    runtime.sum([1.0])
            except RuntimeError as error:
                errors = (str(error), str(error.__cause__))
            (folder / f"{runtime.rank}").touch()
        runtime.close()
    return errors


def test_the_rank_that_waits_names_the_one_that_hangs(two_ranks: Any, tmp_path: Path) -> None:
    (told, cause), of_silent = two_ranks.run(hang, free_ports(2), {1}, 1.0, tmp_path)
    assert told == "rank 0: a collective failed; these ranks hang or are gone: 1"
    assert re.search("gloo", cause, re.IGNORECASE), "the collective's own error is lost"
    assert of_silent == ("", "")


def test_of_four_ranks_the_two_that_hang_are_named(four_ranks: Any, tmp_path: Path) -> None:
    """Rank 0 calls the roll; the other that still answers says where to look."""
    errors = four_ranks.run(hang, free_ports(2), {1, 3}, 3.0, tmp_path)
    assert errors[0][0] == "rank 0: a collective failed; these ranks hang or are gone: 1, 3"
    assert errors[2][0] == (
        "rank 2: a collective failed; rank 0 hangs or is gone, or found that another rank is: see its message"
    )


def leave(ports: list[int]) -> str:
    """Rank 1 is gone, its connections closed; what rank 0 says of it."""
    with world_of_its_own(ports):
        runtime = Runtime(CPU, DistributedConfig(timeout_minutes=0.1))
        runtime.barrier()
        told = ""
        if runtime.is_main:
            try:
                with naming_silent_ranks(runtime, timedelta(seconds=5)):
                    runtime.sum([1.0])
                    runtime.sum([1.0])
            except RuntimeError as error:
                told = str(error)
        else:
            runtime.sum([1.0])
        runtime.close()
    return told


def test_rank_0_does_not_blame_itself_for_one_that_is_gone(two_ranks: Any) -> None:
    told, _ = two_ranks.run(leave, free_ports(2))
    assert told.startswith("rank 0: a collective failed; ")
    assert re.search("another rank is gone|hang or are gone: 1", told)


def fail_while_all_answer(ports: list[int]) -> str:
    with world_of_its_own(ports):
        runtime = Runtime(CPU)
        try:
            with naming_silent_ranks(runtime, timedelta(seconds=60)):
                raise RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer")
        except RuntimeError as error:
            told = str(error)
        runtime.close()
    return told


def test_where_all_ranks_answer_none_is_blamed(two_ranks: Any) -> None:
    for rank, told in enumerate(two_ranks.run(fail_while_all_answer, free_ports(2))):
        assert told.startswith(f"rank {rank}: a collective failed; all ranks answer, ")
        assert "distributed.timeout_minutes" in told


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("gloo")])
def test_an_error_of_no_collective_stays_as_it_is(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, naming_silent_ranks(Runtime(CPU)):
        raise error
    assert caught.value is error


@pytest.mark.parametrize(
    "text",
    [
        "NCCL error: unhandled system error",
        "callback: RuntimeError: Application timeout caused pair closure",  # what gloo says of a stopped process
    ],
)
def test_a_world_of_one_has_nobody_to_blame(text: str) -> None:
    with (
        pytest.raises(RuntimeError, match=r"^rank 0: a collective failed; there are no other ranks$"),
        naming_silent_ranks(Runtime(CPU)),
    ):
        raise RuntimeError(text)
