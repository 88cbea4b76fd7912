"""A wrong option of any command is one line that names it."""

from __future__ import annotations

import pytest

from locsgd_dist.cli import main


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["compare"], "RUN_OR_SWEEP"),
        (["compare", "runs", "--table=9"], "--table"),
        (["sweep", "file.yaml", "--jobs=many"], "--jobs"),
        (["train", "--max-restarts=often"], "--max-restarts"),
        (["plan", "--gpus=0"], "--gpus"),
        (["launch", "local", "--gpus-per-node=-1"], "--gpus-per-node"),
        (["report"], "RUN"),
        (["export", "runs/r", "--output=w", "--format=tar"], "--format"),
        (["compute"], "compute"),
    ],
)
def test_a_wrong_option_is_one_line(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("locsgd: error: ")
    assert named in line


def test_no_command_shows_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    err = capsys.readouterr().err
    for command in ("train", "launch", "plan", "sweep", "compare", "evaluate", "export", "report"):
        assert command in err
