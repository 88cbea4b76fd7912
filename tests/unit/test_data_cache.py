"""The cache of decoded images: made once, found again, renewed when a file changes, never in the way."""

import logging
import multiprocessing
import os
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from data_sets import build, write_image_folder
from PIL import Image

from locsgd_dist.data import DataConfig
from locsgd_dist.data.cache import cached_array


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LOCSGD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    write_image_folder(tmp_path / "set")
    return DataConfig(name="imagefolder", root=str(tmp_path / "set"), image_size=16, augmentation="none")


def pixels(config: DataConfig) -> torch.Tensor:
    return torch.cat([batch.images for batch in build(config).val])


def test_a_second_start_needs_no_file_decoded(cache: Path, config: DataConfig) -> None:
    first = pixels(config)
    kept = sorted(cache.glob("*.npy"))
    assert len(kept) == 2
    # Files of the same size and time that are no images any more: only the cache can tell what they were.
    for path in Path(config.root).rglob("*.png"):
        status = path.stat()
        path.write_bytes(b"x" * status.st_size)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert torch.equal(pixels(config), first)
    assert sorted(cache.glob("*.npy")) == kept
    assert not list(cache.glob("*.part"))


def test_a_changed_file_and_another_size_are_decoded_anew(cache: Path, config: DataConfig) -> None:
    first = pixels(config)
    path = Path(config.root) / "val" / "class0" / "0000.png"
    Image.fromarray(np.full((16, 16, 3), 255, dtype=np.uint8)).save(path)
    changed = pixels(config)
    assert not torch.equal(changed[0], first[0])
    assert changed[0].unique().numel() == 3  # White, in each channel's normalisation.
    assert len(list(cache.glob("*.npy"))) == 3
    other = DataConfig(name="imagefolder", root=config.root, image_size=8)
    assert build(other).input_shape == (3, 8, 8)
    assert len(list(cache.glob("*.npy"))) == 5


def test_a_change_that_keeps_the_size_is_noticed_by_its_time(cache: Path, config: DataConfig) -> None:
    path = Path(config.root) / "val" / "class0" / "extra.bmp"
    for grey in (0, 255):
        Image.new("RGB", (16, 16), (grey,) * 3).save(path)
        os.utime(path, (grey, grey))
        assert (pixels(config)[5] > 0).all() == (grey == 255)
    assert path.stat().st_size == 54 + 16 * 16 * 3


def make_slowly(folder: Path) -> np.ndarray:
    """Leaves a mark for each time it is called."""
    os.close(os.open(folder / f"made-by-{os.getpid()}", os.O_CREAT | os.O_EXCL))
    return np.arange(5_000_000, dtype=np.uint32).view(np.uint8)


def ask(folder: Path, results: "multiprocessing.Queue[int]") -> None:
    results.put(int(cached_array("key", lambda: make_slowly(folder))[:4_000_000].view(np.uint32)[999_999]))


def test_of_the_ranks_of_a_machine_one_decodes(cache: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=ask, args=(tmp_path, results)) for _ in range(4)]
    for process in processes:
        process.start()
    assert [results.get(timeout=60) for _ in processes] == [999_999] * 4
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert len(list(tmp_path.glob("made-by-*"))) == 1


def test_a_cache_folder_that_cannot_be_made_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LOCSGD_CACHE", str(tmp_path / "file" / "cache"))
    images = np.arange(12, dtype=np.uint8)
    with caplog.at_level(logging.WARNING):
        assert (cached_array("key", lambda: images) == images).all()
    assert "decoded images are not cached" in caplog.text


def ask_without_room(results: "multiprocessing.Queue[int]") -> None:
    # Files of this process may not grow beyond 1000 bytes, as on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    results.put(int(cached_array("key", lambda: np.full(100_000, 7, dtype=np.uint8)).sum()))


def test_a_full_disk_is_done_without(cache: Path) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    process = context.Process(target=ask_without_room, args=(results,))
    process.start()
    assert results.get(timeout=60) == 700_000
    process.join()
    assert [path.name for path in cache.iterdir() if path.suffix != ".lock"] == []


def test_an_error_while_decoding_is_not_taken_for_one_of_the_cache(cache: Path) -> None:
    def make() -> np.ndarray:
        raise OSError("cannot decode a.png")

    with pytest.raises(OSError, match=r"cannot decode a\.png"):
        cached_array("key", make)
    assert not list(cache.glob("*.npy"))


def test_the_result_may_be_written_to_without_changing_the_file(cache: Path) -> None:
    first = cached_array("key", lambda: np.zeros(4, dtype=np.uint8))
    first[:] = 7
    assert (cached_array("key", lambda: np.ones(4, dtype=np.uint8)) == 0).all()
