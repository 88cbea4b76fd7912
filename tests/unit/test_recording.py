"""The run directory: what is written, what a crash leaves, what a resumed run keeps."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from locsgd_dist.recording import Recorder, RunConfig, RunDirectory, Sink, check_run, read_jsonl, write_atomically
from locsgd_dist.recording.sinks import JsonlSink

QUIET = RunConfig(console="quiet", report_every=0)


def open_recorder(
    path: Path, *, rank: int = 0, config: RunConfig = QUIET, yaml: str = "train:\n  epochs: 4\n"
) -> Recorder:
    return Recorder.open(path, config, rank=rank, config_yaml=yaml)


def open_files(path: Path) -> Recorder:
    """A recorder of metrics and events alone."""
    path.mkdir(exist_ok=True)
    return Recorder([JsonlSink(RunDirectory(path))])


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dir": " "}, "run.dir must not be empty"),
        ({"resume": ""}, "run.resume must not be empty"),
        ({"console": "loud"}, "run.console must be auto, rich, plain or quiet, got 'loud'"),
        ({"report_every": -1}, "run.report_every must be at least 0 (or null), got -1"),
    ],
)
def test_impossible_settings_name_their_key(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        RunConfig(**fields)


def test_run_dir_must_not_be_a_file(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(ValueError, match=r"^run\.dir must be a folder, but .*taken is a file$"):
        check_run(RunConfig(dir=str(tmp_path / "taken")))
    check_run(RunConfig(dir=str(tmp_path / "new"), tensorboard=True))


def test_every_kind_of_number_becomes_json(tmp_path: Path) -> None:
    with open_files(tmp_path / "run") as recorder:
        recorder.epoch(
            {
                "epoch": 0,
                "val_loss": math.nan,
                "train_loss": torch.tensor(0.5),
                "lr": np.float32(0.25),
                "samples_seen": np.int64(2**40),
                "layer_norm": torch.tensor([1.0, math.inf, -2.0]),
                "layer_names": ["conv1", "fc"],
                "nested": {"path": tmp_path / "x", "flag": True, "none": None},
            }
        )
    assert lines(tmp_path / "run" / "metrics.jsonl") == [
        {
            "epoch": 0,
            "val_loss": None,
            "train_loss": 0.5,
            "lr": 0.25,
            "samples_seen": 2**40,
            "layer_norm": [1.0, None, -2.0],
            "layer_names": ["conv1", "fc"],
            "nested": {"path": str(tmp_path / "x"), "flag": True, "none": None},
        }
    ]


def test_a_value_that_is_no_data_is_refused(tmp_path: Path) -> None:
    with (
        open_files(tmp_path / "run") as recorder,
        pytest.raises(TypeError, match="cannot record a value of type object"),
    ):
        recorder.epoch({"epoch": 0, "what": object()})
    assert not lines(tmp_path / "run" / "metrics.jsonl")


def test_events_carry_the_time(tmp_path: Path) -> None:
    with open_files(tmp_path / "run") as recorder:
        recorder.event("shift", epoch=3, samples_seen=90, boundary_from=2, boundary_to=4)
    (event,) = lines(tmp_path / "run" / "events.jsonl")
    written = (tmp_path / "run" / "events.jsonl").stat().st_mtime
    assert isinstance(event.pop("time"), float)
    assert abs(lines(tmp_path / "run" / "events.jsonl")[0]["time"] - written) < 60
    assert event == {"type": "shift", "epoch": 3, "samples_seen": 90, "boundary_from": 2, "boundary_to": 4}


def test_a_line_is_on_disk_when_the_call_returns(tmp_path: Path) -> None:
    with open_files(tmp_path / "run") as recorder:
        recorder.epoch({"epoch": 0})
        assert lines(tmp_path / "run" / "metrics.jsonl") == [{"epoch": 0}]


def test_only_rank_0_writes(tmp_path: Path) -> None:
    with open_recorder(tmp_path / "run", rank=1, config=RunConfig(tensorboard=True)) as recorder:
        recorder.epoch({"epoch": 0, "what": object()})
        recorder.event("shift", epoch=0, samples_seen=0)
        recorder.step(epoch=0, fraction=0.5, loss=1.0, images_per_second=10.0)
        recorder.truncate_to(0)
        assert not recorder.step_due
    assert list(tmp_path.iterdir()) == []


def test_configuration_is_written_as_given(tmp_path: Path) -> None:
    text = "# merged\nmodel:\n  name: resnet18\n"
    open_recorder(tmp_path / "run", yaml=text).close()
    directory = RunDirectory(tmp_path / "run")
    assert directory.config.read_text() == text
    assert directory.load_config() == {"model": {"name": "resnet18"}}


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "a: [1, 2\n"])
def test_unusable_configuration_is_an_empty_one(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    assert RunDirectory(tmp_path).load_config() == {}
    assert RunDirectory(tmp_path / "nowhere").load_config() == {}


def test_a_torn_last_line_is_left_out_and_not_continued(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with open_files(run) as recorder:
        recorder.epoch({"epoch": 0, "val_top1": 0.5})
        recorder.epoch({"epoch": 1, "val_top1": 0.6})
    whole = (run / "metrics.jsonl").read_bytes()
    for cut in range(1, len(whole.splitlines(keepends=True)[1])):
        (run / "metrics.jsonl").write_bytes(whole[:-cut])
        complete = cut == 1  # only the line's end is missing
        assert [m["epoch"] for m in RunDirectory(run).load_metrics()] == ([0, 1] if complete else [0])
        with open_files(run) as recorder:
            recorder.epoch({"epoch": 2})
        assert [m["epoch"] for m in lines(run / "metrics.jsonl")] == ([0, 1, 2] if complete else [0, 2])


def test_a_broken_line_inside_costs_no_other_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"epoch": 0}\n\x00\xff\x00\n[1, 2]\n\n{"epoch": 3}\n')
    assert read_jsonl(path) == [{"epoch": 0}, {"epoch": 3}]
    assert [record.args[1] for record in caplog.records] == [2, 3]  # type: ignore[index]


def test_missing_files_are_empty(tmp_path: Path) -> None:
    assert RunDirectory(tmp_path).load_metrics() == []
    assert RunDirectory(tmp_path).load_events() == []


def record_epochs(recorder: Recorder, epochs: range, note: str) -> None:
    """100 samples an epoch: an event in the middle, the epoch, a shift at its end."""
    for epoch in epochs:
        recorder.event("warning", epoch=epoch, samples_seen=100 * epoch + 50, message=note)
        recorder.epoch({"epoch": epoch, "samples_seen": 100 * (epoch + 1), "note": note})
        recorder.event("shift", epoch=epoch, samples_seen=100 * (epoch + 1), note=note)


def test_a_resumed_run_has_every_epoch_and_event_once(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with open_files(run) as recorder:
        record_epochs(recorder, range(4), "first")
        recorder.event("preempt", epoch=4, samples_seen=430)
    with open_files(run) as recorder:
        recorder.truncate_to(1)
        recorder.event("resume", epoch=2, samples_seen=200)
        record_epochs(recorder, range(2, 4), "second")
    metrics, events = lines(run / "metrics.jsonl"), lines(run / "events.jsonl")
    assert [(m["epoch"], m["note"]) for m in metrics] == [(0, "first"), (1, "first"), (2, "second"), (3, "second")]
    planned = [(e["type"], e["samples_seen"]) for e in events if e["type"] in ("warning", "shift")]
    assert planned == [(t, s) for e in range(4) for t, s in (("warning", 100 * e + 50), ("shift", 100 * (e + 1)))]
    # what happened to the first process stays on record, and happened once
    assert [e["type"] for e in events if e["type"] in ("preempt", "resume")] == ["preempt", "resume"]


def test_a_checkpoint_inside_an_epoch_keeps_what_came_before_it(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with open_files(run) as recorder:
        record_epochs(recorder, range(3), "first")
        recorder.truncate_to(1, samples_seen=250)
    assert [m["epoch"] for m in lines(run / "metrics.jsonl")] == [0, 1]
    assert [e["samples_seen"] for e in lines(run / "events.jsonl")] == [50, 100, 150, 200, 250]


def test_a_checkpoint_behind_the_last_sample_of_an_epoch_keeps_nothing_that_follows_the_epoch(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with open_files(run) as recorder:
        recorder.event("shift", epoch=0, samples_seen=0)
        record_epochs(recorder, range(2), "first")
        recorder.event("batch", epoch=1, samples_seen=160)  # by a start inside the epoch: this one will not repeat it
        recorder.event("frozen_layers", epoch=1, samples_seen=200)
        recorder.event("collapse", epoch=1, samples_seen=200)
        recorder.event("batch", epoch=1, samples_seen=200)
    with open_files(run) as recorder:
        recorder.truncate_to(0, samples_seen=200)  # epoch 1 has been trained, and not yet evaluated
        recorder.event("frozen_layers", epoch=1, samples_seen=200)
        recorder.event("collapse", epoch=1, samples_seen=200)
        recorder.event("batch", epoch=1, samples_seen=200)
    kept = [(event["type"], event["samples_seen"]) for event in lines(run / "events.jsonl")]
    before = [("shift", 0), ("warning", 50), ("shift", 100), ("warning", 150)]
    assert kept == [*before, ("batch", 160), ("frozen_layers", 200), ("collapse", 200), ("batch", 200)]


def test_nothing_is_left_before_the_first_epoch(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with open_files(run) as recorder:
        record_epochs(recorder, range(2), "first")
        recorder.truncate_to(-1)
        recorder.epoch({"epoch": 0, "samples_seen": 100})
    assert lines(run / "metrics.jsonl") == [{"epoch": 0, "samples_seen": 100}]
    assert lines(run / "events.jsonl") == []
    assert sorted(p.name for p in run.iterdir()) == ["events.jsonl", "metrics.jsonl"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "new \ud800")
    assert path.read_text() == "old"


class Closing(Sink):
    """Notes when it is closed, and fails at it if told to."""

    def __init__(self, log: list[str], name: str, error: Exception | None = None) -> None:
        self._log, self._name, self._error = log, name, error

    def close(self) -> None:
        self._log.append(self._name)
        if self._error:
            raise self._error


def test_all_sinks_are_closed_in_order_even_if_one_fails() -> None:
    log: list[str] = []
    sinks = [Closing(log, "files"), Closing(log, "console", ValueError("gone")), Closing(log, "report")]
    recorder = Recorder(sinks)
    with pytest.raises(ValueError, match="gone"):
        recorder.close()
    assert log == ["files", "console", "report"]
    recorder.close()
    assert len(log) == 3


def test_a_full_disk_at_the_end_is_warned_of_and_every_sink_is_closed(caplog: pytest.LogCaptureFixture) -> None:
    log: list[str] = []
    full = OSError(28, "No space left on device")
    recorder = Recorder([Closing(log, "files", full), Closing(log, "console"), Closing(log, "report", full)])
    recorder.close()
    assert log == ["files", "console", "report"]
    assert [record.getMessage() for record in caplog.records] == [
        "Closing could not write: [Errno 28] No space left on device"
    ] * 2


def test_report_is_refreshed_and_written_at_the_end(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with open_recorder(run, config=RunConfig(console="quiet", report_every=1)) as recorder:
        recorder.epoch({"epoch": 0, "train_loss": 1.0})
        first = (run / "report.html").read_text()
        assert "1 of 4 epochs" in first
        assert not (run / "plots").exists()
        recorder.epoch({"epoch": 1, "train_loss": 0.5})
    assert "2 of 4 epochs" in (run / "report.html").read_text()
    assert (run / "plots" / "loss.png").exists()


def test_a_report_that_cannot_be_written_does_not_stop_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    with open_recorder(run) as recorder:
        (run / "report.html").mkdir()
        recorder.epoch({"epoch": 0, "train_loss": 1.0})
    assert "report.html could not be written" in caplog.text
    assert lines(run / "metrics.jsonl") == [{"epoch": 0, "train_loss": 1.0}]
