"""compare.html, compare.md and compare.json, and the command that writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from comparison_runs import HEBBIAN, SGD, write_run
from report_page import Page

from locsgd_dist.cli import main
from locsgd_dist.reporting.comparison import Comparison, write_comparison
from locsgd_dist.reporting.comparison.grouping import Benchmark, Variant
from locsgd_dist.reporting.comparison.plots import looks

CIFAR = {"data.name": "cifar10"}
FIGURES = {"frontier-flops", "frontier-time", "frontier-cpu", "accuracy-time", "accuracy-samples"}

# With pytest-xdist on one worker: the page is written once.
pytestmark = pytest.mark.xdist_group("comparison")


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweeps") / "small"
    cpu = {"cpu_seconds": 3.0}
    for seed in (0, 1):
        noise = 0.01 * seed
        write_run(folder / f"sgd/seed-{seed}", [0.5, None, 0.9 - noise], settings=SGD | CIFAR, every_epoch=cpu)
        write_run(folder / f"sgd-2/seed-{seed}", [0.5, 0.8 - noise], settings=SGD | CIFAR, every_epoch=cpu)
        write_run(
            folder / f"<local>/seed-{seed}",
            [0.4, 0.6, 0.84 - noise],
            seconds=0.8,
            boundary=[0, 5, 15],
            settings=HEBBIAN | CIFAR,
            every_epoch=cpu,
        )
    write_run(folder / "late/seed-0", [0.4], epochs=3, settings=HEBBIAN | CIFAR | {"localized.lr": 0.3})
    write_comparison([folder], folder)
    return folder


@pytest.fixture(scope="module")
def content(sweep: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((sweep / "compare.json").read_text())
    return loaded


def test_the_page_stands_alone_and_shows_every_figure(sweep: Path) -> None:
    page = Page.of(sweep / "compare.html")
    assert page.figures.keys() == FIGURES
    assert all(figure.title and figure.caption and figure.texts for figure in page.figures.values())
    assert not {"script", "link", "iframe", "object", "img"} & set(page.tags)
    assert "http" not in (sweep / "compare.html").read_text()
    assert {path.stem for path in (sweep / "compare-plots").glob("*.png")} == FIGURES
    assert len(page.ids) == len(set(page.ids))
    targets = {ref.strip("#\"'") for ref in page.references if ref.startswith(("#", '"#', "'#"))}
    assert targets <= set(page.ids)


def test_what_is_left_out_is_on_the_page(sweep: Path) -> None:
    page = Page.of(sweep / "compare.html")
    (item,) = page.text["li"]
    assert "late/seed-0 is left out: unfinished, 1 of 3 epochs" in item
    assert "late/seed-0 is left out" in (sweep / "compare.md").read_text()


def test_every_number_of_a_variant_has_its_n(content: dict[str, Any]) -> None:
    (benchmark,) = content["benchmarks"]
    assert (benchmark["network"], benchmark["dataset"], benchmark["baseline"]) == ("resnet18", "cifar10", "sgd")
    assert benchmark["sgd_schedules"] == ["sgd-2", "sgd"]
    variants = {v["name"]: v for v in benchmark["variants"]}
    assert list(variants) == ["sgd", "sgd-2", "<local>"]
    local = variants["<local>"]
    for summary in local["figures"].values():
        assert summary.keys() == {"mean", "sd", "n", "per_seed"}
        assert summary["n"] == len(summary["per_seed"])
    assert local["figures"]["final_error"]["n"] == 2
    assert local["figures"]["final_error"]["mean"] == pytest.approx(0.165)
    assert local["figures"]["speed_up"]["per_seed"] == {"0": pytest.approx(1.25), "1": pytest.approx(1.25)}
    assert local["iso_cost"].keys() == {"flops", "seconds", "cpu_seconds"}
    # At 2.4 s: between 80 % at 2 s and 90 % at 3 s.
    assert local["iso_cost"]["seconds"]["sgd_error"]["mean"] == pytest.approx(1 - 0.84 + 0.005)
    assert local["iso_cost"]["seconds"]["advantage"]["mean"] == pytest.approx(0.0)
    assert variants["sgd"]["iso_cost"] == {}
    assert [run["path"] for run in local["runs"]] == ["<local>/seed-0", "<local>/seed-1"]
    assert variants["sgd"]["runs"][0]["curve"]["epochs"] == [1, 3]  # the second epoch was not evaluated


def test_papers_rows_are_matched_or_not_run(content: dict[str, Any]) -> None:
    tables = {table["number"]: table["rows"] for table in content["paper"]["tables"]}
    assert sorted(tables) == list(range(1, 9))
    by_label = {(r["network"], r["dataset"], r["label"]): r for r in tables[2]}
    row = by_label["resnet18", "cifar10", "LoCal+SGD"]
    (match,) = row["matches"]
    assert (row["status"], match["variant"]) == ("run", "<local>")
    assert match["cells"]["top1_error"]["paper"] == 6.23
    assert match["cells"]["top1_error"]["ours"]["mean"] == pytest.approx(16.5)
    assert match["cells"]["top1_error"]["difference"] == pytest.approx(16.5 - 6.23)
    assert match["cells"]["speed_up"]["difference"] == pytest.approx(1.25 - 1.51)
    assert {"model.width=4 (paper: 64)", "train.epochs=3 (paper: 90)"} <= set(match["departures"])
    (baseline,) = by_label["resnet18", "cifar10", "Baseline SGD"]["matches"]
    assert baseline["variant"] == "sgd"  # not the shorter schedule
    unmatched = [r for r in tables[2] if (r["network"], r["dataset"]) != ("resnet18", "cifar10")]
    assert {r["status"] for r in [*unmatched, *tables[1], *tables[3]]} == {"not run"}


def test_markdown_holds_the_tables(sweep: Path) -> None:
    text = (sweep / "compare.md").read_text()
    (row,) = [line for line in text.splitlines() if line.startswith("| <local> | local_sgd")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:5] == ["<local>", "local_sgd", "2", "3", "16.50 ± 0.71 %"]
    assert "1.25×" in cells
    (row,) = [line for line in text.splitlines() if "| LoCal+SGD | 6.23 |" in line and "resnet18 | cifar10" in line]
    assert "| 16.50 ± 0.71 | +10.27 | 1.51× | 1.25× | −0.26 |" in row
    assert row.endswith("| <local> (n=2) |")
    assert any("not run |" in line and "vgg13" in line for line in text.splitlines())
    widths = {len(block[0].split(" | ")) - len(line.split(" | ")) for block in _tables(text) for line in block}
    assert widths == {0}


def _tables(text: str) -> list[list[str]]:
    blocks = [block.splitlines() for block in text.split("\n\n")]
    return [block for block in blocks if block[0].startswith("| ")]


def test_command_writes_into_the_sweep_and_warns(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(sweep), "--table", "3"]) == 0
    out, err = capsys.readouterr()
    assert out.split() == [str(sweep / f"compare.{suffix}") for suffix in ("html", "md", "json")]
    assert err.splitlines() == [
        f"locsgd compare: warning: {sweep / 'late/seed-0'} is left out: unfinished, 1 of 3 epochs are recorded"
    ]
    text = (sweep / "compare.md").read_text()
    assert "### Table 3" in text
    assert "### Table 2" not in text


def test_runs_given_one_by_one_are_written_to_a_folder_of_their_own(sweep: Path, tmp_path: Path) -> None:
    runs = [str(sweep / name / "seed-0") for name in ("sgd", "<local>")]
    assert main(["compare", *runs, "--output", str(tmp_path / "out"), "--baseline", "<local>"]) == 0
    (benchmark,) = json.loads((tmp_path / "out/compare.json").read_text())["benchmarks"]
    assert benchmark["baseline"] == "<local>"
    figures = {v["name"]: v["figures"] for v in benchmark["variants"]}
    assert figures["sgd"]["speed_up"]["mean"] == pytest.approx(0.8)


def test_a_comparison_of_other_data_has_no_row_of_the_paper(tmp_path: Path) -> None:
    write_run(tmp_path / "digits", [0.9], settings=SGD)
    comparison = Comparison.of([tmp_path])
    assert not any(table.is_matched for table in comparison.tables)
    write_comparison([tmp_path], tmp_path)
    assert "Not run, no row of it: table 1, 2, 3, 4, 5, 6, 7, 8" in (tmp_path / "compare.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{}/nowhere"], "is not a directory"),
        (["{}/empty"], "is not a run directory and holds none"),
        (["{}/runs", "--baseline", "nobody"], "--baseline must be one of local, sgd, got nobody"),
        (["{}/unfinished"], "unfinished, 1 of 2 epochs are recorded"),
        (["{}/runs", "--output", "{}/file/below"], "--output must be a folder that can be written"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    write_run(tmp_path / "runs/sgd", [0.9], settings=SGD)
    write_run(tmp_path / "runs/local", [0.9], settings=HEBBIAN)
    write_run(tmp_path / "unfinished/sgd", [0.9], epochs=2, settings=SGD)
    assert main(["compare", *(argument.format(tmp_path) for argument in arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert words in line


def test_twenty_variants_look_different() -> None:
    variants = tuple(Variant(str(number), ()) for number in range(20))
    drawn = looks(Benchmark("", variants, variants[0], variants[:1]))
    assert len({(look.color, look.marker) for look in drawn.values()}) == 20
