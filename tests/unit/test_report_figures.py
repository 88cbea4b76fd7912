"""What the figures draw, read off the artists and compared with the numbers that went in."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from report_run import START, epoch_metrics, write_run

from locsgd_dist.reporting import layer_figures, learning_figures, memory_trace, resource_figures, style
from locsgd_dist.reporting.drawing import byte_scale, relative_change
from locsgd_dist.reporting.memory_trace import load_memory_traces
from locsgd_dist.reporting.run_data import RunData

EPOCHS, LAYERS, RANKS = 20, 10, 2


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunData:
    return RunData.load(
        write_run(tmp_path_factory.mktemp("runs") / "r", num_epochs=EPOCHS, num_layers=LAYERS, ranks=RANKS)
    )


@pytest.fixture(scope="module")
def truth() -> list[dict]:
    return [epoch_metrics(epoch, EPOCHS, LAYERS, RANKS) for epoch in range(EPOCHS)]


def column(truth: list[dict], key: str) -> np.ndarray:
    return np.array([row[key] for row in truth], dtype=float)


def test_footprint_and_batch(run: RunData, truth: list[dict]) -> None:
    with style.house_style():
        figure, _ = resource_figures.draw_footprint(run)
    upper, lower = figure.axes
    footprint, half, change = upper.get_lines()
    np.testing.assert_allclose(footprint.get_ydata(), column(truth, "footprint_bytes") / 2**30)
    np.testing.assert_array_equal(footprint.get_xdata(), np.arange(EPOCHS))
    np.testing.assert_allclose(half.get_ydata(), truth[0]["footprint_bytes"] / 2 / 2**30)
    np.testing.assert_allclose(change.get_xdata(), 9.5)  # epoch 10 is the first with 128
    np.testing.assert_array_equal(lower.patches[0].get_data().values, column(truth, "per_gpu_batch"))
    assert upper.get_ylim()[0] == lower.get_ylim()[0] == 0
    assert upper.get_title(loc="left") == "footprint, GiB"


def test_boundary(run: RunData, truth: list[dict]) -> None:
    with style.house_style():
        figure, _ = learning_figures.draw_boundary(run)
    (axes,) = figure.axes
    values, edges, _ = axes.patches[0].get_data()
    np.testing.assert_array_equal(values, column(truth, "boundary"))
    np.testing.assert_array_equal(edges, np.arange(EPOCHS + 1) - 0.5)
    assert axes.get_ylim() == (0, LAYERS)
    assert axes.get_lines()[0].get_ydata()[0] == 0.75 * LAYERS


def test_replicas_lie_on_top_of_gradients(run: RunData, truth: list[dict]) -> None:
    with style.house_style():
        figure, _ = resource_figures.draw_traffic(run)
    upper, lower = figure.axes
    gradients, _, replicas, _, plain = upper.patches
    scale = 2**30
    np.testing.assert_allclose(gradients.get_data().values, column(truth, "grad_all_reduce_bytes") / scale)
    np.testing.assert_allclose(replicas.get_data().baseline, gradients.get_data().values)
    height = replicas.get_data().values - replicas.get_data().baseline
    np.testing.assert_allclose(height, column(truth, "replica_sync_bytes") / scale, atol=1e-12)
    np.testing.assert_allclose(plain.get_data().values, column(truth, "plain_ddp_bytes") / scale)
    np.testing.assert_array_equal(lower.patches[0].get_data().values, column(truth, "grad_all_reduce_count"))


def test_validation_that_skips_epochs_is_one_line(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", num_epochs=6)
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    for row in rows[::2]:
        row["val_top1"] = None
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with style.house_style():
        figure, caption = learning_figures.draw_accuracy(RunData.load(path))
    lines = {line.get_label(): line for line in figure.axes[0].get_lines()}
    np.testing.assert_array_equal(lines["validation"].get_xdata(), [1, 3, 5])
    np.testing.assert_allclose(lines["validation"].get_ydata(), [100 * rows[i]["val_top1"] for i in (1, 3, 5)])
    assert "in epoch 5, last" in caption


def test_norms_relative_to_the_first_epoch(run: RunData, truth: list[dict]) -> None:
    with style.house_style():
        figure, caption = layer_figures.draw_norm(run)
    image = figure.axes[0].get_images()[0]
    norms = np.array([row["layer_norm"] for row in truth]).T
    ratio = norms / norms[:, :1]
    rgba = np.asarray(image.get_array())
    assert rgba.shape == (LAYERS, EPOCHS, 4)
    assert image.origin == "lower"
    opacity = rgba[..., 3]
    np.testing.assert_array_equal(opacity == 0, ratio == 1)  # what has not changed is the page itself
    order = np.argsort(ratio, axis=None)
    assert (np.diff(opacity.ravel()[order]) >= 0).all()  # the more growth, the stronger
    assert f"×{ratio[:, -1].max():.2g} in layer {ratio[:, -1].argmax()}" in caption
    line = figure.axes[0].patches[0].get_data().values
    np.testing.assert_array_equal(
        line, column(truth, "boundary") - 0.5
    )  # between the last local and the first SGD layer


def test_rank_that_falls_has_the_other_colour(run: RunData) -> None:
    with style.house_style():
        grown = np.asarray(layer_figures.draw_norm(run)[0].axes[0].get_images()[0].get_array())
        shrunk = np.asarray(layer_figures.draw_effective_rank(run)[0].axes[0].get_images()[0].get_array())
    assert grown[0, -1, 0] > grown[0, -1, 2], "growth is orange"
    assert shrunk[0, -1, 2] > shrunk[0, -1, 0], "loss is blue"


def test_alignment_is_drawn_where_it_was_measured(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", num_epochs=3)
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    num_layers = rows[0]["num_layers"]
    with style.house_style():
        assert layer_figures.draw_alignment(RunData.load(path)) is None
    cosines = [[None] * num_layers, [0.03, None] + [0.0] * (num_layers - 2), [-0.04] + [None] * (num_layers - 1)]
    for row, values in zip(rows, cosines, strict=True):
        row["layer_alignment"] = values
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with style.house_style():
        figure, caption = layer_figures.draw_alignment(RunData.load(path))
    image = np.asarray(figure.axes[0].get_images()[0].get_array())
    assert image[0, :, 3] == pytest.approx([0, 0.03 / 0.05, 0.04 / 0.05])
    assert not image[1:, :, 3].any()
    assert image[0, 1, 0] > image[0, 1, 2], "downhill is orange"
    assert image[0, 2, 2] > image[0, 2, 0], "uphill is blue"
    assert [label.get_text() for label in figure.axes[1].get_yticklabels()] == ["-0.05", "0", "+0.05"]
    assert "-0.04 to +0.03" in caption


def brute_force_peaks(path: Path, rank: int, source: str) -> dict[float, float]:
    header, *rows = [line.split(",") for line in path.read_text().splitlines()]
    picked = [row for row in rows if int(row[header.index("rank")]) == rank and row[header.index(source)]]
    return {float(row[header.index("time")]): float(row[header.index(source)]) for row in picked}


def test_trace_keeps_every_peak(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", num_epochs=5, ranks=3, memory_hz=10) / "memory.csv"
    assert path.stat().st_size < memory_trace.MAX_BYTES
    traces = load_memory_traces(path)
    assert [(trace.rank, trace.source) for trace in traces] == [(rank, "nvml_process_used") for rank in range(3)]
    for trace in traces:
        samples = brute_force_peaks(path, trace.rank, "nvml_process_used")
        assert len(trace.times) <= memory_trace.NUM_BUCKETS < len(samples)
        assert trace.values.max() == max(samples.values())
        ends = [*trace.times[1:], np.inf]
        for start, end, value in zip(trace.times, ends, trace.values, strict=True):
            assert value == max(v for t, v in samples.items() if start <= t < end)


def test_a_long_trace_is_sampled_without_losing_its_shape(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", num_epochs=5, ranks=2, memory_hz=300) / "memory.csv"
    assert path.stat().st_size > 2 * memory_trace.MAX_BYTES
    for trace in load_memory_traces(path):
        samples = brute_force_peaks(path, trace.rank, trace.source)
        times, values = np.array(list(samples)), np.array(list(samples.values()))
        assert len(trace.times) == memory_trace.NUM_BUCKETS
        assert set(trace.times) <= set(samples)
        assert trace.times[0] < times[0] + 1
        assert trace.times[-1] > times[-1] - 2
        pieces = np.split(values, np.searchsorted(times, trace.times))[1:]
        peaks = np.array([piece.max() for piece in pieces])
        assert (trace.values <= peaks).all()
        assert (trace.values == peaks).mean() > 0.95  # all but those at the edge of two epochs


def test_trace_falls_back_source_by_source(tmp_path: Path) -> None:
    path = tmp_path / "memory.csv"
    header = "time,rank,nvml_process_used,nvml_device_used,cuda_allocated,host_rss"
    path.write_text(f"{header}\n1.0,0,,,5,90\n1.1,1,,,,80\n2.0,0,,,7,9")  # the last line is whole, but for its end
    (trace,) = load_memory_traces(path)
    assert (trace.rank, trace.source, trace.values.tolist()) == (0, "cuda_allocated", [5, 7])


def test_trace_survives_what_a_crash_leaves(tmp_path: Path) -> None:
    path = tmp_path / "memory.csv"
    path.write_text("time,rank,host_rss\n1,0,10\n2,0\n\ntime,rank,host_rss\nx,0,9\n3,0,30\n4,0,4e\n,0,7\n5,")
    (trace,) = load_memory_traces(path)
    assert (trace.times.tolist(), trace.values.tolist()) == ([1, 3], [10, 30])
    path.write_text("something,else\n1,2\n")
    assert load_memory_traces(path) == []
    path.write_text("")
    assert load_memory_traces(path) == []


def test_a_pause_interrupts_the_curve(tmp_path: Path) -> None:
    path = tmp_path / "memory.csv"
    stamps = [*range(100), *range(5000, 5100)]
    path.write_text("time,rank,host_rss\n" + "".join(f"{START + t},0,{t}\n" for t in stamps))
    (trace,) = load_memory_traces(path)
    gaps = np.flatnonzero(np.isnan(trace.values))
    assert gaps.size == 1
    assert trace.times[gaps[0] - 1] < START + 100 <= START + 5000 <= trace.times[gaps[0] + 1]


@pytest.mark.parametrize(
    ("largest", "expected"),
    [(0, (1, "B")), (1023, (1, "B")), (1024, (1024, "KiB")), (5e6, (2**20, "MiB")), (2**60, (2**50, "PiB"))],
)
def test_byte_scale(largest: float, expected: tuple[float, str]) -> None:
    assert byte_scale(np.array([np.nan, largest, 0])) == expected


def test_relative_change() -> None:
    assert relative_change(10, 5) == "−50 %"
    assert relative_change(10, 10.4) == "+4 %"
    assert relative_change(0, 5) == "from zero"
