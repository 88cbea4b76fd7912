"""``locsgd plan``: what is wrong with the command line is said in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from locsgd_dist.cli import main


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--gpus=0",), "--gpus: must be a whole number from 1 to 4096, got '0'"),
        (("--gpu-memory=10Gig",), "--gpu-memory must be a size such as 10GiB or 800MB, got '10Gig'"),
        (("--gpu-tflops=fast", "--link-gbps=1"), "--gpu-tflops: must be a number > 0, got 'fast'"),
        (("--gpu-tflops=1", "--gpus=2"), "--gpu-tflops needs --link-gbps on more than one GPU"),
        (("--pace=slow",), "--pace: invalid choice: 'slow'"),
        (("--boundary-trace=nowhere",), "--boundary-trace cannot be read: nowhere"),
        (("--boundary-trace=deep.json",), "--boundary-trace holds the boundary 22, but the network has 21 layers"),
        (("--pace=static", "--boundary-trace=deep.json"), "--pace and --boundary-trace exclude each other"),
        (("--data.name=mine:factory",), "--num-classes, --num-train and --data.image_size must be given"),
        (("--batch.per_gpus=3",), "unknown key batch.per_gpus; did you mean batch.per_gpu?"),
        (("--plots=deep.json/figures",), "--plots must be a folder that can be written"),
    ],
    ids=lambda value: value[0].lstrip("-") if isinstance(value, tuple) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    named: str,
) -> None:
    (tmp_path / "deep.json").write_text("[0, 22]")
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "--model.width=4", *arguments]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"locsgd: error: {named}")


def test_help_lists_both_kinds_of_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["plan", "--help"])
    out, _ = capsys.readouterr()
    assert "--gpu-memory SIZE" in out
    assert "--batch.per_gpu" in out


def test_what_does_not_fit_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model.width=4", "--train.epochs=2", "--gpu-memory=100KiB"]) == 0
    out, _ = capsys.readouterr()
    assert "Does not fit:" in out
    assert "100 KiB are there" in out
