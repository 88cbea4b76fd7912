"""Checkpoints: whole or not at all, the newest readable one, and when a run may not go on."""

import errno
import time
from pathlib import Path

import pytest
import torch
import yaml
from file_limits import files_of_at_most

from locsgd_dist.checkpoint import (
    CheckpointConfig,
    CheckpointStore,
    Position,
    changed_keys,
    check_resume,
    load_state,
    save_atomically,
)


def state(value: float) -> dict:
    return {"model": {"w": torch.full((3,), value)}, "epoch": int(value)}


def test_round_trip_is_exact(tmp_path):
    save_atomically({"model": {"w": torch.randn(5)}, "nested": [1, 2.5, {"a": None}]}, tmp_path / "a.pt")
    loaded = load_state(tmp_path / "a.pt")
    assert loaded["nested"] == [1, 2.5, {"a": None}]
    assert list(tmp_path.iterdir()) == [tmp_path / "a.pt"]


def test_newest_are_kept_and_the_best_survives(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    for epoch in range(1, 6):
        store.save(state(epoch), Position(epoch), is_best=epoch == 2)
    assert [p.name for p in store.paths()] == ["epoch-0004.pt", "epoch-0005.pt"]
    assert load_state(store.best)["epoch"] == 2
    path, newest = store.load_newest()
    assert (path.name, newest["epoch"]) == ("epoch-0005.pt", 5)


@pytest.mark.parametrize("keep_bytes", [0, 10, -1])
def test_a_torn_newest_checkpoint_is_passed_over(tmp_path, keep_bytes: int, caplog):
    store = CheckpointStore(tmp_path, keep=3)
    store.save(state(1), Position(1))
    torn = store.save(state(2), Position(2))
    torn.write_bytes(torn.read_bytes()[: keep_bytes if keep_bytes >= 0 else -200])
    _, newest = store.load_newest()
    assert newest["epoch"] == 1
    assert "epoch-0002.pt" in caplog.text


def test_one_altered_bit_is_noticed(tmp_path, caplog):
    store = CheckpointStore(tmp_path, keep=3)
    store.save({"model": {"w": torch.zeros(10_000)}, "epoch": 1}, Position(1))
    altered = store.save({"model": {"w": torch.zeros(10_000)}, "epoch": 2}, Position(2))
    content = bytearray(altered.read_bytes())
    content[len(content) // 2] ^= 1  # among the zeros: the archive is as readable as before
    altered.write_bytes(content)
    assert torch.load(altered, weights_only=True)["model"]["w"].count_nonzero() == 1
    with pytest.raises(ValueError, match="does not match its checksum"):
        load_state(altered)
    _, newest = store.load_newest()
    assert newest["epoch"] == 1
    assert "epoch-0002.pt" in caplog.text


@pytest.mark.parametrize(
    "failure",
    [OSError(errno.EIO, "Input/output error"), RuntimeError("PytorchStreamReader failed reading file data/0")],
)
def test_a_file_that_fails_after_its_checksum_is_tried_again_too(tmp_path, monkeypatch, failure: Exception):
    save_atomically(state(3), tmp_path / "a.pt")
    load, failures = torch.load, [failure]

    def flaky(*args: object, **kwargs: object):
        if failures:
            raise failures.pop()
        return load(*args, **kwargs)

    monkeypatch.setattr(torch, "load", flaky)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    assert load_state(tmp_path / "a.pt")["epoch"] == 3


@pytest.mark.parametrize(("failures", "expected"), [(2, 2), (3, 1)])
def test_a_file_system_that_is_away_for_a_moment_costs_no_epoch(tmp_path, monkeypatch, failures: int, expected: int):
    store = CheckpointStore(tmp_path, keep=3)
    store.save(state(1), Position(1))
    newest = store.save(state(2), Position(2))
    open_file, left, pauses = Path.open, [failures], []

    def flaky(path: Path, *args: object, **kwargs: object):
        if path == newest and left[0]:
            left[0] -= 1
            raise OSError(errno.ESTALE, "Stale file handle")
        return open_file(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", flaky)
    monkeypatch.setattr(time, "sleep", pauses.append)
    _, loaded = store.load_newest()
    assert loaded["epoch"] == expected
    assert pauses == [1, 5]


@pytest.mark.parametrize("is_elsewhere", [True, False])
def test_only_what_another_rank_has_seen_is_awaited(tmp_path, monkeypatch, is_elsewhere: bool):
    late = tmp_path / "late.pt"
    monkeypatch.setattr(time, "sleep", lambda _: save_atomically(state(4), late))
    if is_elsewhere:
        assert load_state(late, is_elsewhere=True)["epoch"] == 4
    else:
        with pytest.raises(ValueError, match=r"late\.pt cannot be read: .*No such file"):
            load_state(late)


def test_checkpoints_inside_epochs_stand_between_those_at_their_edges(tmp_path):
    store = CheckpointStore(tmp_path, keep=9)
    for position in (Position(2), Position(1, 5000), Position(10), Position(1), Position(1, 300), Position(0, 64)):
        store.save(state(position.epochs), position)
    assert [p.name for p in store.paths()] == [
        "epoch-0000-sample-000000064.pt",
        "epoch-0001.pt",
        "epoch-0001-sample-000000300.pt",
        "epoch-0001-sample-000005000.pt",
        "epoch-0002.pt",
        "epoch-0010.pt",
    ]


def test_checkpoints_behind_the_one_gone_on_from_do_not_push_out_the_next_ones(tmp_path):
    """The newest is torn and only one is kept: without its being set aside nothing readable would be left."""
    store = CheckpointStore(tmp_path, keep=1)
    store.save(state(1), Position(1))
    (tmp_path / "epoch-0002.pt").write_bytes(b"torn")
    store.go_on_from(tmp_path / "epoch-0001.pt", Position(1))
    store.save(state(5), Position(1, 8))
    assert [path.name for path in store.paths()] == ["epoch-0001-sample-000000008.pt"]
    assert store.load_newest()[1]["epoch"] == 5
    assert (tmp_path / "epoch-0002.pt.old").read_bytes() == b"torn"


def test_a_file_from_elsewhere_becomes_the_newest_and_nothing_is_lost(tmp_path):
    elsewhere = CheckpointStore(tmp_path / "elsewhere")
    elsewhere.save(state(7), Position(2))
    store = CheckpointStore(tmp_path / "here")
    for epoch in (1, 2, 3):
        store.save(state(epoch), Position(epoch))
    for _ in range(2):  # gone back to twice, with another checkpoint of epoch 3 in between
        store.go_on_from(elsewhere.folder / "epoch-0002.pt", Position(2))
        assert store.load_newest()[1]["epoch"] == 7
        assert store.load_newest()[0].name == "epoch-0002.pt"
        store.save(state(30), Position(3))
    kept = {path.name: load_state(path)["epoch"] for path in store.folder.glob("*.old*")}
    assert kept == {"epoch-0002.pt.old": 2, "epoch-0003.pt.old": 3, "epoch-0003.pt.old-2": 30}
    assert elsewhere.load_newest()[1]["epoch"] == 7


def test_a_file_that_cannot_be_kept_here_leaves_everything_as_it_was(tmp_path):
    elsewhere = CheckpointStore(tmp_path / "elsewhere")
    elsewhere.save(state(7), Position(2))
    store = CheckpointStore(tmp_path / "here")
    for epoch in (2, 3):
        store.save(state(epoch), Position(epoch))
    (store.folder / ".epoch-0002.pt.tmp").mkdir()  # neither linked nor copied over
    with pytest.raises(ValueError, match=r"run.resume: checkpoint .*epoch-0002.pt cannot be kept in .*here: "):
        store.go_on_from(elsewhere.folder / "epoch-0002.pt", Position(2))
    assert [load_state(path)["epoch"] for path in store.paths()] == [2, 3]
    assert not list(store.folder.glob("*.old*"))


def test_what_a_killed_writer_left_is_cleared_away_and_never_loaded(tmp_path):
    store = CheckpointStore(tmp_path)
    left_over = tmp_path / ".epoch-0007.pt.tmp"
    left_over.write_bytes(b"half of a checkpoint")
    assert store.load_newest() is None
    store.save(state(1), Position(1))
    assert not left_over.exists()


def test_a_disk_that_takes_no_more_leaves_the_earlier_checkpoints(tmp_path):
    store = CheckpointStore(tmp_path, keep=1)
    store.save(state(1), Position(1), is_best=True)
    large = {"model": {"w": torch.randn(1 << 20)}, "epoch": 2}
    with files_of_at_most(1 << 20):
        store.start_saving(large, Position(2))
        written = store.wait()
        with pytest.raises(OSError, match="File too large"):
            store.save(large, Position(2))
    assert written is not None
    assert written.error == "File too large"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best.pt", "epoch-0001.pt"]
    assert load_state(store.best)["epoch"] == 1
    store.start_saving(large, Position(2))
    assert store.wait().error is None
    assert torch.equal(store.load_newest()[1]["model"]["w"], large["model"]["w"])
    store.close()


def test_a_link_that_leads_out_of_the_folder_is_not_followed(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints")
    store.save(state(1), Position(1))
    elsewhere = tmp_path / "elsewhere.pt"
    save_atomically(state(5), elsewhere)
    (store.folder / "epoch-0005.pt").symlink_to(elsewhere)
    assert store.load_newest()[1]["epoch"] == 1
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (store.folder / ".epoch-0002.pt.tmp").symlink_to(victim)
    store.save(state(2), Position(2))
    assert victim.read_text() == "mine"


@pytest.mark.parametrize(
    ("key", "value"), [("every_epochs", 0), ("keep", 0), ("every_steps", 0), ("every_minutes", 0.0)]
)
def test_bad_intervals_are_refused_by_name(key, value):
    with pytest.raises(ValueError, match=rf"checkpoint\.{key} must be"):
        CheckpointConfig(**{key: value})


def test_nothing_to_load_in_a_new_folder(tmp_path):
    assert CheckpointStore(tmp_path / "none").load_newest() is None


def test_code_in_a_checkpoint_is_not_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "touched"), "w"))

    torch.save({"model": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="cannot be read"):
        load_state(tmp_path / "evil.pt")
    assert not (tmp_path / "touched").exists()


def test_a_file_of_something_else_is_refused(tmp_path):
    torch.save({"weights": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="holds no model"):
        load_state(tmp_path / "other.pt")


CONFIG = {"optim": {"lr": 0.1}, "run": {"dir": "a"}, "train": {"epochs": 3, "device": "cpu"}}


def started_run(path, epochs: int) -> None:
    path.mkdir()
    (path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    CheckpointStore(path / "checkpoints").save(state(epochs), Position(epochs))


def test_an_unfinished_run_goes_on_also_on_another_device(tmp_path):
    started_run(tmp_path / "r", 2)
    moved = CONFIG | {"run": {"dir": "b"}, "train": {"epochs": 3, "device": "cuda"}}
    check_resume(tmp_path / "r", "auto", 3, moved)


def test_a_finished_run_and_another_configuration_are_refused(tmp_path):
    started_run(tmp_path / "r", 3)
    with pytest.raises(ValueError, match="finished run of 3 epochs"):
        check_resume(tmp_path / "r", "auto", 3, CONFIG)
    with pytest.raises(ValueError, match=r"another configuration \(optim\.lr\)"):
        check_resume(tmp_path / "r", "auto", 3, CONFIG | {"optim": {"lr": 0.2}})
    check_resume(tmp_path / "r", "never", 3, CONFIG)


def test_the_end_of_a_run_is_nothing_to_go_on_from(tmp_path):
    path = CheckpointStore(tmp_path).save(state(3) | {"progress": {"epoch": 3}}, Position(3))
    with pytest.raises(ValueError, match=r"after 3 epochs: nothing is left of train\.epochs=3"):
        check_resume(tmp_path / "r", str(path), 3, CONFIG)
    check_resume(tmp_path / "r", str(path), 4, CONFIG)


def test_a_finished_run_whose_ranks_torchrun_started_anew_may_end(tmp_path, monkeypatch):
    # A rank was killed between the last checkpoint and its exit.
    started_run(tmp_path / "r", 3)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    check_resume(tmp_path / "r", "auto", 3, CONFIG)
    with pytest.raises(ValueError, match=r"another configuration \(optim\.lr\)"):
        check_resume(tmp_path / "r", "auto", 3, CONFIG | {"optim": {"lr": 0.2}})


def test_changed_keys_are_named_whichever_side_has_them():
    a = {"x": {"a": 1, "b": 2}, "y": {"c": 3}}
    b = {"x": {"a": 1, "b": 5}, "z": {"d": 4}}
    assert changed_keys(a, b) == ["x.b", "y.c", "z.d"]
