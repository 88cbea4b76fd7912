"""Runs carried out by real processes, with a stand-in for the trainer."""

from __future__ import annotations

import itertools
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from sweep_files import leave, plan, records, stand_in, write_sweep

from locsgd_dist.sweeping.command import sweep
from locsgd_dist.sweeping.execution import Progress, run_here
from locsgd_dist.sweeping.launching import Launch, RunProcess, shared_environment, train_command
from locsgd_dist.sweeping.manifest import write_manifest
from locsgd_dist.sweeping.resolution import resolve

SGD = {"configs": ["strategies/sgd"]}
LOCAL = {"configs": ["strategies/local_static"]}
DEPENDENT = {
    "short": {"configs": ["strategies/short_sgd"], "cost_of": "local"},
    "freezing": {"configs": ["strategies/freezing"], "trace_of": "local"},
    "local": LOCAL,
    "sgd": SGD,
}


def read_times(plan, name: str) -> tuple[float, float]:
    directory = plan.run_of(name, 0).directory
    return float((directory / "started").read_text().split()[0]), float((directory / "ended").read_text())


def is_alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@contextmanager
def stopped_when(is_so: Callable[[], bool], folder: Path, *signals: signal.Signals) -> Iterator[None]:
    """Sends this process ``signals``, half a second apart, once ``is_so``; after two minutes in any case, so that the
    runs under ``folder`` end, and says so. Sends none any more when the block has been left."""
    came, left = threading.Event(), threading.Event()

    def stop() -> None:
        deadline = time.monotonic() + 120
        while not is_so() and time.monotonic() < deadline and not left.is_set():
            time.sleep(0.01)
        if is_so():
            came.set()
        for number in signals:
            if not left.is_set():
                os.kill(os.getpid(), number)
                left.wait(0.5)

    thread = threading.Thread(target=stop)
    thread.start()
    try:
        yield
    finally:
        left.set()
        thread.join()
    said = "\n".join(f"{log}: {log.read_text()}" for log in folder.rglob("*.log"))
    assert came.is_set(), f"the runs have not got so far\n{said}"


def test_runs_wait_for_what_they_need_and_take_it_over(tmp_path: Path, capsys):
    p = plan(tmp_path, variants=DEPENDENT)
    progress = Progress.of(p)
    run_here(progress, nproc=1, jobs=4, command=stand_in(tmp_path, seconds=0.1))
    assert progress.summary() == 0
    times = {name: read_times(p, name) for name in DEPENDENT}
    assert times["freezing"][0] >= times["local"][1]
    assert times["short"][0] >= max(times["local"][1], times["sgd"][1])
    assert len((p.run_of("short", 0).directory / "metrics.jsonl").read_text().splitlines()) == 3  # 3/4 of 4 epochs
    out = capsys.readouterr().out
    assert "short/seed-0: started, 3 epochs cost what local did" in out
    assert "sgd/seed-0: finished in" in out
    assert "4 of 4 runs are finished, 0 were before" in out


def test_as_many_runs_at_once_as_allowed_sharing_the_cores(tmp_path: Path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    p = plan(tmp_path, variants=dict.fromkeys("abcd", SGD))
    run_here(Progress.of(p), nproc=1, jobs=2, command=stand_in(tmp_path, meets=2))
    spans = [read_times(p, name) for name in "abcd"]
    overlaps = [sum(a[0] < b[1] and b[0] < a[1] for b in spans) - 1 for a in spans]
    assert max(overlaps) >= 1
    for point in itertools.chain.from_iterable(spans):
        assert sum(start < point < end for start, end in spans) <= 2
    threads = (p.run_of("a", 0).directory / "started").read_text().split()[1]
    assert int(threads) == max(1, len(os.sched_getaffinity(0)) // 2)


def test_what_is_finished_is_skipped_and_what_is_not_goes_on(tmp_path: Path, capsys):
    p = plan(tmp_path)
    sgd, local = p.run_of("sgd", 0), p.run_of("local", 0)
    leave(sgd, resolve(p, sgd).arguments, records(4))
    leave(local, resolve(p, local).arguments, records(2))
    run_here(progress := Progress.of(p), nproc=1, jobs=1, command=stand_in(tmp_path))
    assert not (sgd.directory / "started").exists()
    assert (local.directory / "ended").exists()
    assert progress.summary() == 0
    out = capsys.readouterr().out
    assert "local/seed-0: goes on" in out
    assert "sgd/seed-0" not in out
    assert "2 of 2 runs are finished, 1 were before" in out


def test_a_failing_run_stops_only_what_needs_it_and_is_listed_with_its_log(tmp_path: Path, capsys):
    p = plan(tmp_path, variants=DEPENDENT)
    progress = Progress.of(p)
    run_here(progress, nproc=1, jobs=1, command=stand_in(tmp_path, fails=["local"]))
    assert progress.summary() == 1
    assert set(progress.failed) == {"local/seed-0", "freezing/seed-0", "short/seed-0"}
    end = capsys.readouterr().out.partition("1 of 4 runs are finished")[2]
    assert "local/seed-0: ended with exit code 3" in end
    assert "    no such luck" in end
    assert "freezing/seed-0: not started: it needs local/seed-0, which is not finished" in end


def test_a_run_that_ends_early_without_an_error_is_not_taken_for_finished(tmp_path: Path):
    p = plan(tmp_path, only=["sgd"])
    progress = Progress.of(p)
    run_here(progress, nproc=1, jobs=1, command=lambda arguments, nproc: ["true"])
    assert progress.summary() == 1
    assert progress.failed["sgd/seed-0"][0] == "stopped before its last epoch"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_signal_ends_the_runs_in_good_order(number, tmp_path: Path, capsys):
    p = plan(tmp_path, variants=dict.fromkeys("abc", SGD))
    progress = Progress.of(p)
    started = [p.run_of(name, 0).directory / "started" for name in "ab"]

    before = signal.getsignal(number)
    with stopped_when(lambda: all(path.exists() and path.read_text() for path in started), tmp_path, number):
        run_here(progress, nproc=1, jobs=2, command=stand_in(tmp_path, hangs=["a", "b"]))
    assert progress.summary() == 128 + number
    assert signal.getsignal(number) is before
    assert [(p.run_of(name, 0).directory / "stopped").exists() for name in "abc"] == [True, True, False]
    assert not progress.failed
    assert "the same command goes on" in capsys.readouterr().out


def test_a_second_stop_signal_kills_what_does_not_stop_and_its_children(tmp_path: Path):
    p = plan(tmp_path, only=["sgd"])
    child = tmp_path / "child"
    # Like torchrun's ranks, the child is in a session of its own.
    script = f"trap '' TERM; setsid sleep 600 & echo $! > {child}.tmp; mv {child}.tmp {child}; wait; wait"
    progress = Progress.of(p)
    with stopped_when(child.exists, tmp_path, signal.SIGTERM, signal.SIGTERM):
        run_here(progress, nproc=1, jobs=1, command=lambda arguments, nproc: ["sh", "-c", script])
    assert progress.interrupted == signal.SIGTERM
    deadline = time.monotonic() + 30
    while is_alive(int(child.read_text())):
        assert time.monotonic() < deadline, "the child lives"
        time.sleep(0.01)


def test_a_run_under_way_elsewhere_is_not_started_twice(tmp_path: Path):
    p = plan(tmp_path, only=["sgd"])
    run = p.run_of("sgd", 0)
    command = stand_in(tmp_path, hangs=["sgd"])
    other = RunProcess(Launch(run.name, command(resolve(p, run).arguments, 1), run.log, {"OMP_NUM_THREADS": "1"}))
    try:
        progress = Progress.of(p)
        run_here(progress, nproc=1, jobs=1, command=command)
        assert progress.failed["sgd/seed-0"] == ["sgd/seed-0 is being carried out by another process"]
    finally:
        other.kill()
        assert other.wait() == -signal.SIGKILL


def test_what_another_sweep_has_finished_meanwhile_is_not_started(tmp_path: Path, capsys):
    p = plan(tmp_path, variants={"sgd": SGD, "local": LOCAL})
    progress = Progress.of(p)
    (local,) = (run for run in p.runs if run.variant.name == "local")
    # As the first run starts, another machine leaves the second one finished.
    arguments = resolve(p, local).arguments
    leave(local, arguments, records(4), checkpoint=4)
    run_here(progress, nproc=1, jobs=1, command=stand_in(tmp_path, seconds=0.1))
    assert progress.summary() == 0
    out = capsys.readouterr().out
    assert "local/seed-0: finished by another process" in out
    assert "local/seed-0: started" not in out
    assert "2 of 2 runs are finished, 0 were before" in out


def test_the_lock_outlives_a_sweep_that_is_killed_for_as_long_as_its_run_lives(tmp_path: Path):
    log = tmp_path / "a" / "seed-0.log"
    first = RunProcess(Launch("a", ["sleep", "60"], log))
    first._lock.close()  # what the kernel does for a killed sweep; the run's own descriptor is still open
    with pytest.raises(ValueError, match="a is being carried out by another process"):
        RunProcess(Launch("a", ["true"], log))
    first.kill()
    first.wait()
    assert RunProcess(Launch("a", ["true"], log)).wait() == 0


def test_more_than_one_rank_runs_under_torchrun():
    assert train_command(["--a.b=1"], 1)[1:] == ["-m", "locsgd_dist.train", "--a.b=1"]
    command = train_command(["--a.b=1"], 4)
    assert command[1:3] == ["-m", "torch.distributed.run"]
    assert {"--standalone", "--nproc-per-node=4"} <= set(command)
    assert command[-3:] == ["-m", "locsgd_dist.train", "--a.b=1"]


def test_gpus_are_dealt_out_to_places(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    gpus = ["0", "1", "4", "5"]
    dealt = [shared_environment(2, 2, slot, gpus)["CUDA_VISIBLE_DEVICES"] for slot in (0, 1)]
    assert dealt == ["0,1", "4,5"]
    assert "OMP_NUM_THREADS" not in shared_environment(2, 2, 0, gpus)  # the user's own stays
    assert "CUDA_VISIBLE_DEVICES" not in shared_environment(2, 2, 0, [])
    with pytest.raises(ValueError, match="--jobs 3 runs of 2 ranks need 6 GPUs, but there are 4"):
        shared_environment(2, 3, 0, gpus)


def test_nothing_starts_before_everything_is_checked(tmp_path: Path, capsys):
    file = str(write_sweep(tmp_path, variants={"sgd": SGD, "b": {"overrides": {"localized.rule": "hebian"}}}))
    output = tmp_path / "out"
    for arguments, named in (
        ([], "variant b: localized.rule"),
        (["--only", "sgd", "--jobs", "0"], "--jobs must be at least 1"),
        (["--only", "sgd", "--nproc", "many"], "--nproc must be"),
        (["--only", "sgd", "--optim.lr=-1"], "optim.lr must be > 0"),
    ):
        with pytest.raises(ValueError, match=named):
            sweep([file, "--output", str(output), *arguments])
    assert not output.exists()
    assert capsys.readouterr().out == ""


def test_a_selection_without_what_it_needs_is_refused(tmp_path: Path):
    file = str(write_sweep(tmp_path, variants=DEPENDENT))
    with pytest.raises(
        ValueError, match="freezing/seed-0 needs local/seed-0, which is not finished: add local to --only"
    ):
        sweep([file, "--output", str(tmp_path / "out"), "--only", "freezing"])


def test_a_dry_run_shows_commands_and_states_and_leaves_nothing(tmp_path: Path, capsys):
    file = str(write_sweep(tmp_path, variants=DEPENDENT))
    assert sweep([file, "--output", str(tmp_path / "out"), "--dry-run", "--model.width=4"]) == 0
    out = capsys.readouterr().out
    assert "freezing/seed-0 [missing]  (boundary of local)" in out
    assert "short/seed-0 [missing]  (as many epochs as cost what local did)" in out
    assert out.count("--model.width=4 ") == 4
    assert f"4 runs, 0 of them finished, in {tmp_path / 'out'}" in out
    assert not (tmp_path / "out").exists()


def test_a_sweep_whose_runs_are_done_starts_nothing(tmp_path: Path, capsys):
    p = plan(tmp_path)
    for run in p.runs:
        leave(run, resolve(p, run).arguments, records(4))
    file = str(write_sweep(tmp_path))
    assert sweep([file, "--output", str(tmp_path / "out"), "--no-report"]) == 0
    assert "2 of 2 runs are finished, 2 were before" in capsys.readouterr().out
    content = json.loads((tmp_path / "out/sweep.json").read_text())
    assert [run["state"] for v in content["variants"] for run in v["runs"]] == ["finished"] * 2
    assert not list((tmp_path / "out").rglob("*.log"))


def test_sweeps_that_share_a_folder_take_turns_at_its_manifest(tmp_path: Path):
    p = plan(tmp_path)
    with ThreadPoolExecutor(4) as pool:
        writes = [pool.submit(write_manifest, p) for _ in range(200)]
    assert [write.exception() for write in writes] == [None] * 200
    assert json.loads((tmp_path / "out/sweep.json").read_text())["name"] == p.sweep.name
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".sweep.lock", "sweep.json"]
