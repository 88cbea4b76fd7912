"""The fault matrix: each fault at each moment on 1, 2 and 4 ranks, and whether the run ends as if nothing had been.

    OMP_NUM_THREADS=1 python benchmarks/reliability.py \\
        --json benchmarks/results/reliability.json --doc docs/reliability.md

Each cell is a run of its own (``small_run.py``) that a fault strikes once (``fault_strikes.py``), that is started anew
as torchrun or a launch script would (``rank_agent.py``), and that is then compared with an uninterrupted one on as many
ranks: every record but for times, and the weights, optimizer state and position that it ended with, bit by bit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from fault_strikes import MOMENTS, Strike, install
from measuring import command_line, write_json
from rank_agent import Launch, Rank, import_all, launch
from small_run import (
    EPOCHS,
    checkpoint_paths,
    equal,
    flags_for,
    is_readable,
    lost_and_repeated,
    result_of,
    without_footprint,
)

from locsgd_dist.recording import RunDirectory


@dataclass(frozen=True)
class Fault:
    name: str
    strike: str
    restarted: bool = False
    """The ranks fail and are started anew."""
    preempted: bool = False
    """The ranks leave by themselves, with the marker that asks for another start."""
    newest: str = "whole"
    """What is done to the newest checkpoint before that: torn, bits flipped."""
    not_finite: bool = False
    """Some steps of the run, of the uninterrupted one too, are not finite."""
    other_ranks: bool = False
    """The next start has another number of ranks."""


FAULTS = (
    Fault("kill -9 of one rank", "kill", restarted=True),
    Fault("a rank raises", "raise", restarted=True),
    Fault("SIGTERM to all ranks", "term all", preempted=True),
    Fault("SIGTERM to one rank", "term one", preempted=True),
    Fault("SIGUSR1 to one rank", "usr1 one", preempted=True),
    Fault("disk full", "disk full"),
    Fault("disk full, then kill -9", "disk full, kill", restarted=True),
    Fault("kill -9, newest checkpoint torn", "kill", restarted=True, newest="torn"),
    Fault("kill -9, newest checkpoint with flipped bits", "kill", restarted=True, newest="flipped"),
    Fault("kill -9, NaN in four steps", "kill", restarted=True, not_finite=True),
    Fault("kill -9, then another number of ranks", "kill", restarted=True, other_ranks=True),
    Fault("SIGTERM to all, then another number of ranks", "term all", preempted=True, other_ranks=True),
)
NEXT_RANKS = {1: 2, 2: 4, 4: 2}
MAX_STARTS = 4


@dataclass
class Cell:
    fault: str
    moment: str
    ranks: int
    victim: int
    starts: int
    outcome: str
    """``finished``, or what went wrong."""
    samples_lost: int
    samples_repeated: int
    bit_equal: bool | None
    """Records but for times and footprint, and final state; None where ranks have changed."""
    footprint_equal: bool | None
    skipped_steps: list[int]
    resumed_at: list[int]
    """Samples that the later starts went on from."""
    seconds: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 1, 4])
    parser.add_argument("--moments", nargs="+", default=list(MOMENTS))
    parser.add_argument("--faults", nargs="+", default=[fault.name for fault in FAULTS])
    parser.add_argument("--cells", nargs="+", metavar="FAULT@MOMENT", help="these alone, on each number of ranks")
    parser.add_argument("--minutes", type=float, help="start no further cell after this long")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--doc", type=Path, help="file whose part between <!-- matrix --> marks is written anew")
    parser.add_argument("--only-doc", action="store_true", help="write --doc from --json, run nothing")
    options = parser.parse_args()
    if options.only_doc:
        write_doc(options.doc, json.loads(options.json.read_text()))
        return 0
    start = time.monotonic()
    cells: list[Cell] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        import_all(flags_for(1, folder / "unused")[:-1])
        for ranks in options.ranks:
            references: dict[bool, dict[str, Any]] = {}
            for fault in FAULTS:
                for moment in MOMENTS:
                    if fault.name not in options.faults or moment not in options.moments:
                        continue
                    if options.cells is not None and f"{fault.name}@{moment}" not in options.cells:
                        continue
                    if fault.newest != "whole" and moment == "first step":
                        continue  # there is no checkpoint yet
                    if options.minutes is not None and time.monotonic() - start > 60 * options.minutes:
                        break
                    if fault.not_finite not in references:
                        whole = folder / f"whole-{ranks}-{fault.not_finite}"
                        references[fault.not_finite] = uninterrupted(whole, ranks, fault.not_finite)
                    run = folder / f"{len(cells)}"
                    cell = one_cell(run, fault, moment, ranks, references[fault.not_finite])
                    cells.append(cell)
                    show(len(cells), cell)
                    write_json(options.json, summary(cells))
                    if not passed(cell):
                        print((folder / f"{run.name}.log").read_text(errors="replace")[-6000:])
    result = summary(cells)
    print(in_words(result))
    if options.doc is not None:
        write_doc(options.doc, result)
    return int(result["passed"] < result["cells"])


def uninterrupted(run_dir: Path, ranks: int, not_finite: bool) -> dict[str, Any]:
    flags, log = flags_for(ranks, run_dir), run_dir.with_suffix(".log")

    def prepare(rank: Rank) -> None:
        install(rank, Strike(rank, 0, None, ""), raises=False, not_finite=not_finite)

    done = launch(flags, ranks=ranks, log=log, prepare=prepare)
    if done.failed or lost_and_repeated(steps_of([done])) != (0, 0):
        raise SystemExit(f"the uninterrupted run failed:\n{log.read_text()[-3000:]}")
    result = result_of(run_dir)
    assert len({record["boundary"] for record in result["records"]}) == EPOCHS, "the run has no shifts"
    assert len({record["per_gpu_batch"] for record in result["records"]}) == 2, "the run has no doubling"
    assert any(record["skipped_steps"] for record in result["records"]) == not_finite
    print(f"{ranks} ranks, uninterrupted: {done.seconds:.1f} s", flush=True)
    return result


def one_cell(run_dir: Path, fault: Fault, moment: str, ranks: int, reference: dict[str, Any]) -> Cell:
    # Only rank 0 writes; any other fault may strike any rank.
    is_of_the_writer = "disk" in fault.strike or (moment == "while saving" and fault.strike != "raise")
    victim = 0 if is_of_the_writer else random.Random(f"{fault.name}{moment}{ranks}").randrange(ranks)

    def prepare(rank: Rank) -> None:
        kind = fault.strike if rank.attempt == 0 else None
        strike = Strike(rank, victim, kind, moment)
        install(rank, strike, raises=fault.strike == "raise", not_finite=fault.not_finite)

    log = run_dir.parent / f"{run_dir.name}.log"
    flags, directory = flags_for(ranks, run_dir), RunDirectory(run_dir)
    start, launches, problem, restarts = time.monotonic(), [], "", 0
    while not launches or (len(launches) < MAX_STARTS and (launches[-1].failed or directory.preempted.exists())):
        attempt = len(launches)
        now = NEXT_RANKS[ranks] if attempt and fault.other_ranks else ranks
        launches.append(launch(flags, ranks=now, log=log, attempt=attempt, restarts=restarts, prepare=prepare))
        problem = problem or unexpected(fault, launches[-1], attempt, victim, directory.preempted.exists())
        restarts += launches[-1].failed
        if attempt == 0:
            problem = problem or damage(run_dir, fault.newest)
    if not problem and (launches[-1].failed or len(directory.load_metrics()) != EPOCHS):
        problem = "did not finish"
    if not problem and fault.newest != "whole" and "cannot be read" not in log.read_text(errors="replace"):
        problem = "the damaged checkpoint was not noticed"
    steps, result = steps_of(launches), result_of(run_dir)
    lost, repeated = lost_and_repeated(steps)
    records, expected = result["records"], reference["records"]
    same = without_footprint(records) == without_footprint(expected) and equal(result["state"], reference["state"])
    return Cell(
        fault.name,
        moment,
        ranks,
        victim,
        len(launches),
        problem or "finished",
        lost,
        repeated,
        None if fault.other_ranks else same,
        None if fault.other_ranks else records == expected,
        [record["skipped_steps"] for record in records],
        [event["samples_seen"] for event in directory.load_events() if event["type"] == "resume"],
        round(time.monotonic() - start, 1),
    )


def steps_of(launches: list[Launch]) -> list[dict[str, Any]]:
    return [note for done in launches for note in done.notes if "ids" in note]


def unexpected(fault: Fault, done: Launch, attempt: int, victim: int, has_marker: bool) -> str:
    """What did not go as this fault goes, or nothing."""
    if done.hung:
        return f"start {attempt} hung"
    if attempt:
        return f"start {attempt} failed: {done.exit_codes}" if done.failed else ""
    if not any("struck" in note for note in done.notes):
        return "the fault did not strike"
    if "disk" in fault.strike and not any("checkpoint_failed" in note for note in done.notes):
        return "no checkpoint failed on the full disk"
    if fault.restarted:
        code = 1 if fault.strike == "raise" else -9
        return "" if done.exit_codes[victim] == code else f"the rank that was struck ended with {done.exit_codes}"
    if done.failed:
        return f"ended with {done.exit_codes}"
    if has_marker != fault.preempted:
        return "left no marker" if fault.preempted else "left a marker"
    return ""


def damage(run_dir: Path, how: str) -> str:
    """Tears the newest checkpoint or flips bits of it."""
    if how == "whole":
        return ""
    paths = checkpoint_paths(run_dir)
    if len(paths) < 2:
        return "there were not two checkpoints"
    content = bytearray(paths[-1].read_bytes())
    if how == "torn":
        del content[len(content) // 2 :]
    else:
        draw = random.Random(0)
        for _ in range(3):
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    # A file of its own: best.pt may be another name of the same.
    paths[-1].unlink()
    paths[-1].write_bytes(content)
    return "the damage cannot be seen" if is_readable(paths[-1]) else ""


def passed(cell: Cell) -> bool:
    exact = cell.bit_equal is not False
    return cell.outcome == "finished" and exact and cell.samples_lost == 0 and cell.samples_repeated == 0


def show(number: int, cell: Cell) -> None:
    equality = {True: "bit-equal", False: "DIFFERS", None: "other ranks"}[cell.bit_equal]
    if cell.bit_equal and not cell.footprint_equal:
        equality += " but for the footprint"
    print(
        f"{number:3d} {'passed' if passed(cell) else 'FAILED'}  {cell.ranks} ranks, {cell.fault}, {cell.moment}: "
        f"{cell.outcome} after {cell.starts} starts from {cell.resumed_at}, {cell.samples_lost} lost, "
        f"{cell.samples_repeated} repeated, {equality} ({cell.seconds:.0f} s)",
        flush=True,
    )


def summary(cells: list[Cell]) -> dict[str, Any]:
    compared = [cell for cell in cells if cell.bit_equal is not None]
    return {
        "command": command_line(),
        "cells": len(cells),
        "passed": sum(passed(cell) for cell in cells),
        "finished": sum(cell.outcome == "finished" for cell in cells),
        "samples_lost": sum(cell.samples_lost for cell in cells),
        "samples_repeated": sum(cell.samples_repeated for cell in cells),
        "compared": len(compared),
        "bit_equal": sum(bool(cell.bit_equal) for cell in compared),
        "footprint_equal": sum(bool(cell.footprint_equal) for cell in compared),
        "torch": torch.__version__,
        "machine": f"{os.cpu_count()} cores, CPU, fp32, gloo",
        "matrix": [asdict(cell) for cell in cells],
    }


def in_words(result: dict[str, Any]) -> str:
    return (
        f"{result['cells']} runs: {result['finished']} finished; {result['samples_lost']} samples lost, "
        f"{result['samples_repeated']} repeated; {result['bit_equal']} of the {result['compared']} that went on "
        "with as many ranks bit-equal with the uninterrupted run "
        f"({result['footprint_equal']} in the measured footprint too)."
    )


def write_doc(path: Path, result: dict[str, Any]) -> None:
    """Replaces what stands between the marks."""
    mark, end = "<!-- matrix -->", "<!-- /matrix -->"
    before, _, rest = path.read_text(encoding="utf-8").partition(mark)
    after = rest.partition(end)[2]
    path.write_text(f"{before}{mark}\n\n{in_words(result)}\n\n{table(result)}\n\n{end}{after}", encoding="utf-8")


def table(result: dict[str, Any]) -> str:
    """A row per fault; in each moment's column the numbers of ranks that passed, those that failed crossed out."""
    cells = [Cell(**cell) for cell in result["matrix"]]
    lines = [f"| fault | {' | '.join(MOMENTS)} |", "|---" * (len(MOMENTS) + 1) + "|"]
    for fault in FAULTS:
        columns = []
        for moment in MOMENTS:
            here = [cell for cell in cells if (cell.fault, cell.moment) == (fault.name, moment)]
            here.sort(key=lambda cell: cell.ranks)
            columns.append(", ".join(in_table(cell, fault) for cell in here) or "–")
        lines.append(f"| {fault.name} | {' | '.join(columns)} |")
    return "\n".join(lines)


def in_table(cell: Cell, fault: Fault) -> str:
    text = f"{cell.ranks}→{NEXT_RANKS[cell.ranks]}" if fault.other_ranks else f"{cell.ranks}"
    return text if passed(cell) else f"~~{text}~~"


if __name__ == "__main__":
    sys.exit(main())
