"""report.html of whole, broken and hostile run directories."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from subprocess import run as run_process

import pytest
from report_page import Page
from report_run import epoch_metrics, write_run

from locsgd_dist.recording import RunDirectory
from locsgd_dist.reporting import style, write_report
from locsgd_dist.reporting.report import FIGURES, render
from locsgd_dist.reporting.run_data import RunData

TITLES = {
    "footprint": "Footprint and batch",
    "boundary": "Boundary",
    "traffic": "Bytes exchanged",
    "memory-trace": "Memory over wall time",
    "accuracy": "Accuracy",
    "loss": "Loss",
    "throughput": "Throughput",
    "learning-rate": "Learning rates",
    "update-norm": "Update norm at the boundary",
    "layer-norm": "Norm per layer",
    "layer-rank": "Effective rank per layer",
    "layer-drift": "Drift per layer",
}

# With pytest-xdist on one worker: the report is written once.
pytestmark = pytest.mark.xdist_group("report")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_run(tmp_path_factory.mktemp("runs") / "full")
    write_report(path)
    return path


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    return Page.of(run / "report.html")


def test_every_figure_is_there_with_title_caption_and_alternative_text(page: Page) -> None:
    assert {key: figure.title for key, figure in page.figures.items()} == TITLES
    assert page.tags.count("svg") == len(TITLES)
    for figure in page.figures.values():
        assert figure.caption.strip()
        plain = figure.caption.strip().replace("\u00a0", " ")
        assert figure.label == f"{figure.title}. {plain}"
        assert figure.texts, "axes without any text"


def test_it_says_what_kept_outputs_have_saved(tmp_path: Path, page: Page) -> None:
    path = write_run(tmp_path / "kept", num_epochs=4)
    epochs = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    for number, epoch in enumerate(epochs):
        epoch |= {"num_kept_layers": 8 if number else 0, "num_kept_samples": 25_000 if number > 1 else 0}
    (path / "metrics.jsonl").write_text("".join(json.dumps(epoch) + "\n" for epoch in epochs))
    write_report(path)
    said = "the first 8 layers did not run for 25.00 % of the images"
    assert said in [cell.replace("\u00a0", " ") for cell in Page.of(path / "report.html").cells()]
    assert not any("did not run" in cell for cell in page.cells())


def test_the_page_stands_alone(run: Path, page: Page) -> None:
    assert not {"script", "link", "iframe", "object", "base"} & set(page.tags)
    assert "http" not in (run / "report.html").read_text()
    for reference in page.references:
        assert reference.startswith(("#", "data:image/png;base64,")), reference
    sources = [value for _, name, value in page.attributes if name in ("src", "srcset", "action", "data")]
    assert sources == []
    assert not any("@import" in text for text in page.text["style"])


def test_ids_are_unique_and_references_lead_somewhere(page: Page) -> None:
    assert [key for key, count in Counter(page.ids).items() if count > 1] == []
    inside = {reference[1:] for reference in page.references if reference.startswith("#")}
    assert inside
    assert inside <= set(page.ids)


def test_colours_follow_the_scheme(page: Page) -> None:
    styles = [value for tag, name, value in page.attributes if name in ("style", "fill", "stroke") and tag != "svg"]
    assert any("var(--ink)" in value for value in styles)
    assert not any("#" in value.replace("url(#", "") for value in styles), "a fixed colour"


def test_headline_and_captions_say_what_was_recorded(page: Page) -> None:
    first, last = epoch_metrics(0, 12, 21, 2), epoch_metrics(11, 12, 21, 2)
    values = page.text["dd"]
    assert "92.99 %" in values  # 0.94 − 0.55·e⁻⁴
    assert f"{last['footprint_bytes'] / 2**30:.2f} GiB" in values
    assert "128" in values
    caption = page.figures["footprint"].caption.replace("\u00a0", " ")
    assert f"{first['footprint_bytes'] / 2**30:.2f} GiB in the first epoch" in caption
    assert "Batch 64 → 128 at epoch 6." in caption
    assert (
        "0 of 21 layers learn locally in the first epoch, 15 in the last; 11 shifts."
        in page.figures["boundary"].caption
    )
    epochs = [epoch_metrics(epoch, 12, 21, 2) for epoch in range(12)]
    exchanged = sum(epoch["grad_all_reduce_bytes"] + epoch["replica_sync_bytes"] for epoch in epochs)
    share = 100 * exchanged / sum(epoch["plain_ddp_bytes"] for epoch in epochs)
    assert f"{share:.2f} % of what plain DDP exchanges" in page.figures["traffic"].caption.replace("\u00a0", " ")
    assert "shift 11× (green tick), change of batch 1× (dashed orange), out of memory 1× (red)" in (
        page.figures["memory-trace"].caption
    )


def test_tables(page: Page) -> None:
    cells = page.cells()
    assert "hebbian, lr 0.01" in cells
    assert "boundary 0 → 1" in cells
    assert "batch per GPU 64 → 128" in cells
    assert "out of memory: rank 1 while trying 256" in cells
    assert "layer5.0.conv" in cells
    assert "12, the last in epoch 11" in cells
    assert not any("checkpoints/epoch" in cell for cell in cells)


def test_a_pruned_run_shows_when_channels_went_and_what_is_left(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", num_epochs=4)
    directory = RunDirectory(path)
    shift = next(event for event in directory.load_events() if event["type"] == "shift")
    sizes = {"num_parameters_from": 1000, "num_parameters_to": 640, "forward_macs_from": 9000, "forward_macs_to": 4500}
    prune = {**shift, "type": "prune", "removed_channels": 12} | sizes
    with directory.events.open("a") as file:
        for event in (prune, prune | {"time": prune["time"] + 1, "removed_channels": 3}):
            file.write(json.dumps({k: v for k, v in event.items() if not k.startswith("boundary")}) + "\n")
    page = Page.of(write_report(path, plots=False))
    assert set(page.figures) == set(TITLES)
    assert "removal of channels 2× (dash-dotted green)" in page.figures["memory-trace"].caption
    assert page.cells().count("prune") == 2
    spelled = ", ".join(f"{key}={value}" for key, value in ({"removed_channels": 12} | sizes).items())
    assert spelled in page.cells()


def test_configuration_is_shown_word_for_word(run: Path, page: Page) -> None:
    assert "".join(page.text["pre"]) == (run / "config.yaml").read_text()


def test_plots_are_files_too(run: Path) -> None:
    plots = RunDirectory(run).plots
    assert {path.stem for path in plots.iterdir()} == set(TITLES)
    for path in plots.iterdir():
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG")
        assert int.from_bytes(content[16:20]) > 800  # pixels wide


def test_writing_again_gives_the_same_figures(run: Path, page: Page) -> None:
    before = (run / "plots" / "loss.png").stat().st_mtime_ns
    again = Page.of(write_report(run, plots=False))
    assert again.figures == page.figures
    assert (run / "plots" / "loss.png").stat().st_mtime_ns == before


def test_no_run_directory(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no run directory at .*nowhere"):
        write_report(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "events.jsonl", "memory.csv"])
def test_a_missing_file_costs_only_what_it_held(tmp_path: Path, name: str) -> None:
    path = write_run(tmp_path / "run", num_epochs=3)
    (path / name).unlink()
    page = Page.of(write_report(path, plots=False))
    lost = {"metrics.jsonl": set(TITLES) - {"memory-trace"}, "memory.csv": {"memory-trace"}}.get(name, set())
    assert set(page.figures) == set(TITLES) - lost
    assert ("No epoch has been completed yet." in page.text["p"]) == (name == "metrics.jsonl")


def test_an_empty_directory_has_a_report(tmp_path: Path) -> None:
    page = Page.of(write_report(tmp_path))
    assert page.figures == {}
    assert "No epoch has been completed yet." in page.text["p"]
    assert not (tmp_path / "plots").exists()
    assert any(all(title in text for title in TITLES.values()) for text in page.text["p"]), "what is not drawn is named"


NEEDS = {
    "footprint_bytes": "footprint",
    "boundary": "boundary",
    "val_top1": None,
    "per_gpu_batch": None,
    "plain_ddp_bytes": None,
    "num_layers": None,
    "layer_names": None,
    "footprint_source": None,
    "seconds": None,
    "transition_update_norm": "update-norm",
    "images_per_second": "throughput",
    "layer_effective_rank": "layer-rank",
}


@pytest.mark.parametrize("key", NEEDS)
def test_a_missing_column_costs_only_its_figure(tmp_path: Path, key: str) -> None:
    """Absent in one epoch, null in the next, no number in the last."""
    path = write_run(tmp_path / "run", num_epochs=3, memory_hz=0.05)
    absent, null, nonsense = RunDirectory(path).load_metrics()
    del absent[key]
    rows = [absent, null | {key: None}, nonsense | {key: "nonsense"}]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = RunData.load(path)
    with style.house_style():
        drawn = {spec.key for spec in FIGURES if spec.draw(run) is not None}
    assert set(TITLES) - drawn == ({NEEDS[key]} if NEEDS[key] else set())
    assert "h1" in Page(render(run, [], [])).tags


def test_one_epoch_has_all_figures_but_changes(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", num_epochs=1)
    page = Page.of(write_report(path))
    assert set(TITLES) - set(page.figures) == {"layer-norm", "layer-rank"}  # they show ratios to the first epoch
    assert any(text.startswith("1 of 1 epochs") for text in page.text["p"])


def test_gaps_torn_lines_and_repeated_epochs(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", num_epochs=6)
    rows = (path / "metrics.jsonl").read_text().splitlines()
    kept = [rows[0], rows[1], rows[4], rows[4].replace('"val_top1": 0.', '"val_top1": 0.00'), rows[5][:40]]
    (path / "metrics.jsonl").write_text("\n".join(kept))
    page = Page.of(write_report(path, plots=False))
    assert set(page.figures) == set(TITLES)
    assert any(text.startswith("3 of 6 epochs") for text in page.text["p"])
    assert "last 0." in page.figures["accuracy"].caption, "of an epoch that stands twice the later record counts"


def test_all_zero_and_constant_runs(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", num_epochs=3)
    rows = RunDirectory(path).load_metrics()
    zeros = [
        {
            k: 0
            if isinstance(v, (int, float)) and k != "epoch"
            else [0] * len(v)
            if k.startswith("layer_") and k != "layer_names"
            else v
            for k, v in row.items()
        }
        for row in rows
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in zeros))
    page = Page.of(write_report(path, plots=False))
    assert {"footprint", "boundary", "traffic", "accuracy", "loss", "learning-rate"} <= set(page.figures)


def test_text_of_the_run_is_escaped(tmp_path: Path) -> None:
    evil = '</td></pre><script>alert("1 & 2")</script>'
    path = write_run(
        tmp_path / "<b>R&D $x_{1$ run",
        num_epochs=2,
        model={"name": evil, "width": "<i>"},
        note="& < > \" ' {{ 7 * 7 }}",
    )
    rows = [row | {"layer_names": [evil] * 21, "footprint_source": "<u>"} for row in RunDirectory(path).load_metrics()]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    event = {"type": "<script>", "epoch": "<p>", "samples_seen": 1, "time": 0.0, "message": evil, "<a>": "<img src=x>"}
    with (path / "events.jsonl").open("a") as file:
        file.write(json.dumps(event) + "\n")
    page = Page.of(write_report(path))
    assert not {"script", "b", "i", "u", "img", "a"} & set(page.tags)
    assert page.text["h1"] == ["<b>R&D $x_{1$ run"]
    assert f"{evil}, width <i>" in page.cells()
    assert page.cells().count(evil) == 21
    assert f"{evil}: <a>=<img src=x>" in page.cells()
    assert "Measured by <u>," in page.figures["footprint"].caption
    assert "Measured by <u>," in page.figures["footprint"].label
    assert "".join(page.text["pre"]) == (path / "config.yaml").read_text()


def test_an_older_report_stays_when_a_new_one_cannot_be_made(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", num_epochs=1)
    write_report(path, plots=False)
    before = (path / "report.html").read_bytes()
    (path / "metrics.jsonl").unlink()
    (path / "metrics.jsonl").mkdir()
    with pytest.raises(IsADirectoryError):
        write_report(path, plots=False)
    assert (path / "report.html").read_bytes() == before


def test_importing_the_trainers_part_does_not_import_matplotlib() -> None:
    code = "import sys, locsgd_dist.recording, locsgd_dist.reporting; print('matplotlib' in sys.modules)"
    assert run_process([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_the_callers_matplotlib_settings_survive(tmp_path: Path) -> None:
    import matplotlib

    path = write_run(tmp_path / "run", num_epochs=1)
    with matplotlib.rc_context({"font.size": 33, "axes.grid": False}):
        write_report(path, plots=False)
        assert matplotlib.rcParams["font.size"] == 33
        assert not matplotlib.rcParams["axes.grid"]
