"""Checkpoints: whole or not at all, the newest readable one, and when a run may not go on."""

import pytest
import torch
import yaml

from locsgd_dist.checkpoint import CheckpointStore, changed_keys, check_resume, load_state, save_atomically


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
        store.save(state(epoch), epochs=epoch, is_best=epoch == 2)
    assert [p.name for p in store.paths()] == ["epoch-0004.pt", "epoch-0005.pt"]
    assert load_state(store.best)["epoch"] == 2
    path, newest = store.load_newest()
    assert (path.name, newest["epoch"]) == ("epoch-0005.pt", 5)


@pytest.mark.parametrize("keep_bytes", [0, 10, -1])
def test_a_torn_newest_checkpoint_is_passed_over(tmp_path, keep_bytes: int, caplog):
    store = CheckpointStore(tmp_path, keep=3)
    store.save(state(1), epochs=1, is_best=False)
    torn = store.save(state(2), epochs=2, is_best=False)
    torn.write_bytes(torn.read_bytes()[: keep_bytes if keep_bytes >= 0 else -200])
    _, newest = store.load_newest()
    assert newest["epoch"] == 1
    assert "epoch-0002.pt" in caplog.text


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
    CheckpointStore(path / "checkpoints").save(state(epochs), epochs=epochs, is_best=False)


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


def test_changed_keys_are_named_whichever_side_has_them():
    a = {"x": {"a": 1, "b": 2}, "y": {"c": 3}}
    b = {"x": {"a": 1, "b": 5}, "z": {"d": 4}}
    assert changed_keys(a, b) == ["x.b", "y.c", "z.d"]
