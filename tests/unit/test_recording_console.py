"""What rank 0 prints: plain lines into a pipe, a table and a bar on a terminal."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from locsgd_dist.formatting import describe_event, format_bytes, format_count, format_duration, format_percent
from locsgd_dist.recording import Recorder, RunConfig
from locsgd_dist.recording.console import PlainConsole, RichConsole, open_console

EPOCH = {
    "epoch": 2,
    "boundary": 4,
    "num_layers": 21,
    "world_size": 2,
    "per_gpu_batch": 64,
    "train_loss": 0.51234,
    "val_top1": 0.9612,
    "images_per_second": 12345.6,
    "footprint_bytes": 3 * 2**29,
    "grad_all_reduce_bytes": 30 * 2**20,
    "replica_sync_bytes": 2 * 2**20,
    "seconds": 185,
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (format_bytes(0), "0 B"),
        (format_bytes(1023), "1023 B"),
        (format_bytes(1024), "1.00 KiB"),
        (format_bytes(1536), "1.50 KiB"),
        (format_bytes(1024**2 - 1), "1.00 MiB"),
        (format_bytes(123.4 * 2**20), "123 MiB"),
        (format_bytes(9.996 * 2**30), "10.0 GiB"),
        (format_bytes(float("nan")), "–"),
        (format_count(12345.6), "12,346"),
        (format_count(3.14159), "3.14"),
        (format_count(None), "–"),
        (format_percent(0.96125), "96.12 %"),
        (format_duration(4.2), "4.2 s"),
        (format_duration(59.96), "1 min 00 s"),
        (format_duration(185), "3 min 05 s"),
        (format_duration(3599.6), "1 h 00 min"),
        (format_duration(7620), "2 h 07 min"),
    ],
)
def test_numbers_as_people_read_them(text: str, expected: str) -> None:
    assert text == expected


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        ({"type": "shift", "boundary_from": 4, "boundary_to": 6}, "boundary 4 → 6"),
        ({"type": "batch", "per_gpu_from": 64, "per_gpu_to": 128, "trial": "ok"}, "batch per GPU 64 → 128: trial=ok"),
        ({"type": "oom", "epoch": 3, "time": 1.5, "message": "rank 1"}, "out of memory: rank 1"),
        ({"type": "resume", "samples_seen": 5, "path": "last.pt"}, "path=last.pt"),
        ({"type": "preempt"}, ""),
    ],
)
def test_events_in_words(event: dict[str, object], expected: str) -> None:
    assert describe_event(event) == expected


def test_a_pipe_gets_one_plain_line_per_epoch_and_event(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = RunConfig(console="auto", report_every=0)
    with Recorder.open(tmp_path, config, rank=0, config_yaml="train: {epochs: 12}") as recorder:
        recorder.step(epoch=2, fraction=0.5, loss=1.0, images_per_second=10.0)
        recorder.epoch(EPOCH)
        recorder.event("shift", epoch=3, samples_seen=300, boundary_from=4, boundary_to=6)
        recorder.event("checkpoint", epoch=3, samples_seen=300, path="x")
    assert capsys.readouterr().out.splitlines() == [
        "epoch 3/12  boundary 4/21  batch 2×64  loss 0.5123  val top-1 96.12 %  img/s 12,346  "
        "footprint 1.50 GiB  exchanged 32.0 MiB  time 3 min 05 s",
        "shift: boundary 4 → 6",
    ]


def test_missing_numbers_leave_the_line_whole() -> None:
    out = io.StringIO()
    PlainConsole(file=out).epoch({"epoch": 0, "val_top1": None})
    assert out.getvalue().startswith("epoch 1  boundary –/–  batch –×–  loss –  val top-1 –")


def test_quiet_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    console = open_console("quiet")
    console.epoch(dict(EPOCH))
    console.event({"type": "oom"})
    assert not console.step_due
    assert capsys.readouterr() == ("", "")


def test_steps_are_throttled() -> None:
    console = RichConsole(console=Console(file=io.StringIO(), force_terminal=True, width=100))
    assert console.step_due
    console.step(epoch=0, fraction=0.1, loss=None, images_per_second=5.0)
    assert not console.step_due
    console.close()
    assert not PlainConsole(file=io.StringIO()).step_due


@pytest.mark.parametrize("width", [40, 100])
def test_a_terminal_gets_a_table_that_never_wraps(width: int) -> None:
    out = io.StringIO()
    console = RichConsole(12, Console(file=out, force_terminal=True, width=width, color_system=None))
    console.epoch(EPOCH)
    console.epoch({**EPOCH, "epoch": 3})
    console.event({"type": "oom", "message": "[b]text[/b]"})
    console.close()
    header, first, second, event = out.getvalue().splitlines()
    assert header.split()[:4] == ["epoch", "boundary", "batch", "loss"]
    assert first.split()[:4] == ["3/12", "4/21", "2×64", "0.5123"]
    assert second.split()[0] == "4/12"
    assert max(map(len, (header, first, second))) <= width
    assert ("footprint" in header) == (width == 100)
    assert event == "oom: out of memory: [b]text[/b]"


def test_the_progress_bar_is_gone_when_the_recorder_is_closed() -> None:
    out = io.StringIO()
    console = RichConsole(12, Console(file=out, force_terminal=True, width=100))
    console.step(epoch=0, fraction=0.25, loss=1.25, images_per_second=1234.0)
    console.close()
    assert "epoch 1/12" in out.getvalue()
    assert "1,234 img/s" in out.getvalue()
    hide, show = "\x1b[?25l", "\x1b[?25h"
    assert out.getvalue().count(hide) == out.getvalue().count(show) == 1  # the cursor is back
    assert out.getvalue().endswith("\x1b[2K")  # the bar's line is erased
