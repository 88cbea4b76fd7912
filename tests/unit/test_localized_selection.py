"""Learning mode selection against sequences worked out by hand."""

from __future__ import annotations

import itertools
import json
import math
import random
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from locsgd_dist.localized import SelectionConfig, Selector, criterion_values, make_selector
from locsgd_dist.localized.selection import DynamicSelector, shift_interval


def observe(selector: Selector, norms: list[float] | list[list[float]], num_layers: int = 8) -> list[int]:
    """Boundaries after each epoch; a single number stands for the norm of every layer."""
    return [
        selector.observe(epoch, norm if isinstance(norm, list) else [norm] * num_layers)
        for epoch, norm in enumerate(norms)
    ]


def dynamic(window: str = "mean", *, shift: int = 2, limit: int = 6, interval: int = 2) -> DynamicSelector:
    return DynamicSelector(shift, limit, interval, alpha=0.95, window=window)


# --- algorithm 1, K = 2, t_shift 2, limit 6 ---------------------------------------------------------------------------


def test_mean_window_by_hand() -> None:
    # Epoch: u, mean of the last two, alpha * mean.
    # 0: 1.00, one epoch since the start                -> stays
    # 1: 0.90, .95, .9025: .90 is below                 -> 2
    # 2: 0.10, one epoch since the shift                -> stays
    # 3: 0.20, .15, .1425: .20 is above                 -> stays
    # 4: 0.18, .19, .1805: .18 is below                 -> 4
    # 5: 0.18, one epoch since the shift                -> stays
    # 6: 0.17, .175, .16625: .17 is above               -> stays
    # 7: 0.15, .16, .152: below                         -> 6, the limit
    # 8, 9, 10: at the limit                            -> stays
    norms = [1.0, 0.9, 0.1, 0.2, 0.18, 0.18, 0.17, 0.15, 0.01, 0.01, 0.01]
    assert observe(dynamic("mean"), norms) == [0, 2, 2, 2, 4, 4, 4, 6, 6, 6, 6]


def test_printed_window_by_hand() -> None:
    # Sum of the last three over a divisor of two.
    # 0: 1.0                                            -> stays (one epoch)
    # 1: 1.0: sum 2.0 (two terms there are), .95        -> stays: 1.0 is above
    # 2: 1.0: sum 3.0, 1.425: a flat norm fires         -> 2
    # 3: 4.0                                            -> stays (one epoch)
    # 4: 3.0: sum 8.0, 3.8                              -> 4
    # 5: 1.0                                            -> stays (one epoch)
    # 6: 9.0: sum 13, 6.175                             -> stays: 9.0 is above
    # 7: 9.0: sum 19, 9.025                             -> 6
    norms = [1.0, 1.0, 1.0, 4.0, 3.0, 1.0, 9.0, 9.0]
    assert observe(dynamic("printed"), norms) == [0, 0, 2, 2, 4, 4, 4, 6]


def test_equality_fires() -> None:
    selector = DynamicSelector(1, 4, 2, alpha=1.0, window="mean")
    assert observe(selector, [1.0, 1.0, 1.0, 1.0]) == [0, 1, 1, 2]


def test_the_window_speaks_of_the_present_transition_layer_also_right_after_a_shift() -> None:
    # Layer 0 falls and lets the boundary pass; from then on layer 2 decides, over its own past.
    norms = [
        [1.0, 0.0, 0.4, 0.0],
        [0.5, 0.0, 0.4, 0.0],  # .5 <= .95 * .75: to 2
        [9.0, 0.0, 0.4, 0.0],
        [0.0, 0.0, 0.5, 0.0],  # .5 > .95 * .45 although layer 0 fell: stays
        [9.0, 0.0, 0.1, 0.0],  # .1 <= .95 * .3 although layer 0 rose: to 4
    ]
    selector = DynamicSelector(2, 4, 2, alpha=0.95, window="mean")
    assert observe(selector, norms) == [0, 2, 2, 2, 4]
    # The first window after a shift reaches back before it: with K = 3, epochs 1 to 3 of layer 2.
    selector = DynamicSelector(2, 4, 1, alpha=0.95, window="mean")
    assert observe(selector, [[1.0, 0.0, 1.0], [0.5, 0.0, 1.0], [0.5, 0.0, 0.8]]) == [0, 2, 4]


@pytest.mark.parametrize(("window", "flat_fires"), [("printed", True), ("mean", False)])
@pytest.mark.parametrize("interval", [1, 2, 5, 11, 18])
def test_a_flat_norm_fires_in_the_printed_window_only(window: str, flat_fires: bool, interval: int) -> None:
    """alpha (K + 1) / K >= 1 up to K = 19; a mean of equal numbers never exceeds them by alpha."""
    found = observe(dynamic(window, interval=interval), [1.0] * (2 * interval + 2))
    assert (found[-1] > 0) is flat_fires


def test_beyond_k_19_a_flat_norm_does_not_fire_in_the_printed_window_either() -> None:
    assert observe(dynamic("printed", interval=20), [1.0] * 60)[-1] == 0
    assert observe(dynamic("printed", interval=20), [0.9975**e for e in range(60)])[-1] > 0


@pytest.mark.parametrize("window", ["printed", "mean"])
def test_less_than_two_epochs_are_no_window(window: str) -> None:
    """K = 1: the first epoch alone would always fire in the printed window's sense of 1 <= .95 * 1 / 1, or u = 0."""
    assert observe(dynamic(window, interval=1), [0.0, 0.0, 0.0]) == [0, 2, 4]


def test_k_1_compares_two_epochs() -> None:
    # mean of two: .9 <= .95 * .95 fires; 1.0 after .9 does not; printed: sum of two over one.
    assert observe(dynamic("mean", interval=1), [1.0, 0.9, 1.0, 0.99, 0.5]) == [0, 2, 2, 2, 4]
    assert observe(dynamic("printed", interval=1), [1.0, 0.9, 1.0, 30.0, 1.0]) == [0, 2, 4, 4, 6]


def test_at_most_one_shift_in_k_epochs_and_never_past_the_limit() -> None:
    found = observe(dynamic(shift=4, limit=6, interval=3), [0.5**e for e in range(14)])
    assert found == [0, 0, 4, 4, 4, 6, *[6] * 8]


def test_a_norm_that_is_not_a_number_does_not_fire() -> None:
    assert observe(dynamic(), [1.0, float("nan"), float("nan"), 0.5, 0.4])[:4] == [0, 0, 0, 0]


def test_resnet50_over_90_epochs() -> None:
    """L = 54, t_shift 5: K = 11; falling at every chance the boundary stands at 15 in epoch 33, half the footprint."""
    config = SelectionConfig(tshift=5, window="printed")
    assert shift_interval(config, num_layers=54, block_size=3, epochs=90) == 11
    selector = make_selector(config, num_layers=54, block_size=3, epochs=90)
    in_force = [0, *observe(selector, [0.5**e for e in range(90)], num_layers=54)]
    assert [in_force[e] for e in (10, 11, 21, 22, 32, 33)] == [0, 5, 5, 10, 10, 15]
    assert in_force[90] == 40


@pytest.mark.parametrize(
    ("epochs", "lmax", "num_layers", "shift", "interval"),
    [
        (90, 0.75, 54, 3, 6),  # 90 * 3 / 40.5 = 6.67
        (24, 0.75, 21, 2, 3),  # 24 * 2 / 15.75 = 3.05
        (90, 0.75, 37, 2, 6),  # 6.49
        (3, 0.75, 21, 2, 1),  # .38: at least 1
        (30, 0.5, 20, 1, 3),  # 3 exactly
        (90, 0.02, 54, 3, 250),  # 250 exactly, 249.99999999999997 in floating point
        (10, 1.0, 1, 1, 10),
        (12, 0.0, 21, 2, 12),  # no layer may shift: any K does
    ],
)
def test_k(epochs: int, lmax: float, num_layers: int, shift: int, interval: int) -> None:
    config = SelectionConfig(lmax=lmax, tshift=shift)
    assert shift_interval(config, num_layers=num_layers, block_size=7, epochs=epochs) == interval
    later = SelectionConfig(lmax=lmax, tshift=shift, start_epoch=5)
    assert shift_interval(later, num_layers=num_layers, block_size=7, epochs=epochs + 5) == interval


@pytest.mark.parametrize(
    ("lmax", "num_layers", "final"),
    [
        (0.75, 21, 15),  # 15.75
        (0.75, 1, 0),
        (1.0, 1, 1),
        (1.0, 7, 7),
        (0.0, 21, 0),
        (0.3, 10, 3),
        (0.7, 10, 7),  # .7 * 10 is 7 only by rounding
        (0.29, 100, 29),  # .29 * 100 = 28.999999999999996
    ],
)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_the_last_boundary(kind: Any, lmax: float, num_layers: int, final: int) -> None:
    config = SelectionConfig(kind=kind, lmax=lmax, tshift=2)
    selector = make_selector(config, num_layers=num_layers, block_size=1, epochs=40)
    found = [selector.boundary, *observe(selector, [0.5**e for e in range(200)], num_layers=num_layers)]
    assert found[-1] == final
    assert max(found) == final
    assert found == sorted(found)


def test_a_shift_is_one_block_or_a_number_of_layers() -> None:
    for tshift, block_size, step in (("block", 3, 3), ("block", 2, 2), (5, 3, 5)):
        config = SelectionConfig(tshift=tshift)  # type: ignore[arg-type]
        selector = make_selector(config, num_layers=54, block_size=block_size, epochs=30)
        found = observe(selector, [0.5**e for e in range(30)], num_layers=54)
        assert sorted(set(found))[:3] == [0, step, 2 * step]


def test_the_boundary_never_falls_whatever_the_norms_do() -> None:
    draw = random.Random(0)
    for window in ("printed", "mean"):
        for interval in (1, 2, 3):
            found = observe(dynamic(window, interval=interval), [draw.expovariate(1.0) for _ in range(60)])
            assert found == sorted(found)
            assert found[-1] == 6
            shifts = [e for e, (a, b) in enumerate(itertools.pairwise([0, *found])) if a != b]
            assert all(later - earlier >= interval for earlier, later in itertools.pairwise(shifts))


# --- static, fixed, replay --------------------------------------------------------------------------------------------


def schedule(config: SelectionConfig, *, num_layers: int = 10, epochs: int = 5) -> list[int]:
    """Boundary in force in each epoch of a run."""
    selector = make_selector(config, num_layers=num_layers, block_size=2, epochs=epochs)
    return [selector.boundary, *observe(selector, [1.0] * (epochs - 1), num_layers=num_layers)]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        # c1 = 8, c2 = 8 / 4^2: 8 - .5 * (16, 9, 4, 1, 0) = 0, 3.5, 6, 7.5, 8.
        (SelectionConfig(kind="static", lmax=0.8), [0, 3, 6, 7, 8]),
        # 4 - (16, 9, 4, 1, 0), not below 0.
        (SelectionConfig(kind="static", c1=4, c2=1), [0, 0, 0, 3, 4]),
        (SelectionConfig(kind="static", c1=4.9, c2=0), [4, 4, 4, 4, 4]),
        # Never past lmax * L = 5.
        (SelectionConfig(kind="static", c1=8, c2=0.5, lmax=0.5), [0, 3, 5, 5, 5]),
        (SelectionConfig(kind="static", lmax=0.0), [0, 0, 0, 0, 0]),
        # From epoch 2 on: 8 - 2 * (4, 1, 0).
        (SelectionConfig(kind="static", lmax=0.8, start_epoch=2), [0, 0, 0, 6, 8]),
        (SelectionConfig(kind="static", c1=4, c2=0, start_epoch=3), [0, 0, 0, 4, 4]),
        # 8 * (0, 1/4, 1/2, 3/4, 1), in whole blocks of 2 and in threes; then the last epoch's boundary after half.
        (SelectionConfig(kind="linear", lmax=0.8), [0, 2, 4, 6, 8]),
        (SelectionConfig(kind="linear", lmax=0.8, tshift=3), [0, 0, 3, 6, 8]),
        (SelectionConfig(kind="linear", lmax=0.8, full_at=0.5), [0, 4, 8, 8, 8]),
        (SelectionConfig(kind="linear", lmax=0.8, tshift=1, full_at=0.75, start_epoch=1), [0, 0, 4, 8, 8]),
        (SelectionConfig(kind="linear", lmax=0.7, full_at=0.1, start_epoch=2), [0, 0, 7, 7, 7]),
        (SelectionConfig(kind="linear", lmax=0.0), [0, 0, 0, 0, 0]),
        (SelectionConfig(kind="fixed", boundary=4), [4, 4, 4, 4, 4]),
        (SelectionConfig(kind="fixed", boundary=10, start_epoch=3), [0, 0, 0, 10, 10]),
        (SelectionConfig(kind="fixed", boundary=None, lmax=0.85, start_epoch=1), [0, 8, 8, 8, 8]),
        (SelectionConfig(kind="fixed"), [0, 0, 0, 0, 0]),
    ],
)
def test_schedules(config: SelectionConfig, expected: list[int]) -> None:
    assert schedule(config) == expected


@pytest.mark.parametrize(("num_layers", "epochs"), [(21, 24), (54, 90), (11, 2), (53, 150)])
def test_the_default_static_schedule_rises_from_0_to_lmax(num_layers: int, epochs: int) -> None:
    found = schedule(SelectionConfig(kind="static"), num_layers=num_layers, epochs=epochs)
    assert (found[0], found[-1]) == (0, 3 * num_layers // 4)
    assert found == sorted(found)


def test_a_static_schedule_of_one_epoch() -> None:
    assert schedule(SelectionConfig(kind="static", lmax=0.8), epochs=1) == [8]


@pytest.mark.parametrize(
    ("num_layers", "epochs", "full_at"), [(21, 24, 0.5), (54, 90, 0.33), (11, 2, 1.0), (7, 1, 1.0)]
)
def test_a_linear_schedule_keeps_to_its_line(num_layers: int, epochs: int, full_at: float) -> None:
    """Against the line itself, in exact fractions: a shift at most below it, and on it from full_at on."""
    found = schedule(SelectionConfig(kind="linear", full_at=full_at), num_layers=num_layers, epochs=epochs)
    limit, full = 3 * num_layers // 4, Fraction(full_at).limit_denominator(100) * (epochs - 1)
    for epoch, boundary in enumerate(found):
        line = limit if epoch >= full else limit * epoch / full
        assert line - 2 < boundary <= line
        assert boundary % 2 == 0 or boundary == limit
    assert found == sorted(found)
    assert found[-1] == limit


# --- criteria, and a later start --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("criterion", "expected"),
    [
        ("update_norm", [3.0, 0.0, 1.0]),
        ("relative_drift", [1.5, math.nan, 0.25]),
        ("rate_normalised", [6.0, 0.0, 2.0]),
        ("loss_plateau", [0.7, 0.7, 0.7]),
    ],
)
def test_criteria_by_hand(criterion: Any, expected: list[float]) -> None:
    values = criterion_values(criterion, update_norms=[3.0, 0.0, 1.0], norms=[2.0, 0.0, 4.0], sum_of_lr=0.5, loss=0.7)
    assert values == pytest.approx(expected, nan_ok=True)


def test_without_learning_rates_nothing_can_be_normalised() -> None:
    values = criterion_values("rate_normalised", update_norms=[1.0], norms=[1.0], sum_of_lr=0.0, loss=0.0)
    assert math.isnan(values[0])


def test_a_falling_rate_alone_fires_the_update_norm_but_not_what_is_normalised() -> None:
    """A layer that moves twice the learning rate in every epoch has not settled."""
    boundaries = {}
    for criterion in ("update_norm", "rate_normalised"):
        config = SelectionConfig(criterion=criterion, tshift=2)  # type: ignore[arg-type]
        selector = make_selector(config, num_layers=8, block_size=2, epochs=6)
        for epoch, rate in enumerate([0.6, 0.5, 0.4, 0.3, 0.2, 0.1]):
            values = criterion_values(
                config.criterion, update_norms=[2 * rate] * 8, norms=[1.0] * 8, sum_of_lr=rate, loss=1.0
            )
            boundaries[criterion] = selector.observe(epoch, values)
    assert boundaries == {"update_norm": 6, "rate_normalised": 0}


def test_a_loss_that_no_longer_falls_by_hand() -> None:
    # K = 2. Epoch: loss, .95 * mean of the last two; fires where the loss is at least that.
    # 0: 2.0: one epoch; 1: 1.0, 1.425: still falls; 2: .98, .9405: fires -> 2; 3: one epoch since
    # 4: .5, .70: falls; 5: .5, .475: fires -> 4; 7: risen, fires -> 6, the limit
    config = SelectionConfig(criterion="loss_plateau", tshift=2, lmax=0.75)
    selector = make_selector(config, num_layers=8, block_size=2, epochs=6)
    losses = [2.0, 1.0, 0.98, 0.98, 0.5, 0.5, 0.6, 0.7, 0.7]
    assert observe(selector, losses) == [0, 0, 2, 2, 2, 4, 4, 6, 6]


def test_dynamic_selection_starts_later() -> None:
    # Norms that fire at every chance; K = (24 - 6) * 2 / 15.75 = 2.28.
    config = SelectionConfig(tshift=2, start_epoch=6)
    selector = make_selector(config, num_layers=21, block_size=2, epochs=24)
    in_force = [0, *observe(selector, [0.5**e for e in range(23)], num_layers=21)]
    assert in_force[:11] == [0, 0, 0, 0, 0, 0, 2, 2, 4, 4, 6]
    assert in_force[-1] == 15


def test_replay_of_a_list_a_file_and_a_run(tmp_path: Path) -> None:
    trace = [0, 2, 2, 5]
    (tmp_path / "trace.json").write_text(json.dumps(trace))
    lines = [json.dumps({"epoch": e, "boundary": t, "boundary_next": 9}) for e, t in enumerate(trace)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n\n")
    for source in (tmp_path / "trace.json", tmp_path / "metrics.jsonl", tmp_path):
        config = SelectionConfig(kind="replay", trace=str(source))
        assert schedule(config, epochs=3) == [0, 2, 2]  # a shorter run
        assert schedule(config, epochs=6) == [0, 2, 2, 5, 5, 5]  # a longer one


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("missing.json", None, "selection.trace cannot be read"),
        ("torn.json", "[0, 1", "selection.trace must be a run's metrics.jsonl or a JSON list"),
        ("object.json", '{"boundary": 1}', "selection.trace must hold one boundary >= 0 per epoch"),
        ("empty.json", "[]", "selection.trace must hold one boundary >= 0 per epoch"),
        ("negative.json", "[0, -1]", "selection.trace must hold one boundary >= 0 per epoch"),
        ("bool.json", "[false, true]", "selection.trace must hold one boundary >= 0 per epoch"),
        ("float.json", "[0, 1.5]", "selection.trace must hold one boundary >= 0 per epoch"),
        ("falling.json", "[0, 3, 2]", "selection.trace holds a boundary that falls"),
        ("large.json", "[0, 11]", "selection.trace holds the boundary 11, but the network has 10 layers"),
        ("other.jsonl", '{"epoch": 0}\n', "selection.trace must be a run's metrics.jsonl or a JSON list"),
        ("list.jsonl", "[0]\n", "selection.trace must be a run's metrics.jsonl or a JSON list"),
        ("nothing.jsonl", "", "selection.trace must hold one boundary >= 0 per epoch"),
    ],
)
def test_a_trace_that_cannot_be_followed_is_named(tmp_path: Path, name: str, text: str | None, said: str) -> None:
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=r"^selection\.trace") as error:
        schedule(SelectionConfig(kind="replay", trace=str(path)))
    assert str(error.value).startswith(said)
    assert "\n" not in str(error.value)


def test_a_fixed_boundary_beyond_the_network_is_named() -> None:
    with pytest.raises(ValueError, match=r"^selection\.boundary must be at most 10, the network's layers, got 11$"):
        schedule(SelectionConfig(kind="fixed", boundary=11))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0.0}, "selection.alpha must be > 0, got 0.0"),
        ({"alpha": float("nan")}, "selection.alpha must be > 0, got nan"),
        ({"lmax": 1.4}, "selection.lmax must lie in [0, 1], got 1.4"),
        ({"lmax": -0.1}, "selection.lmax must lie in [0, 1], got -0.1"),
        ({"tshift": 0}, "selection.tshift must be block or a whole number >= 1, got 0"),
        ({"c1": -1.0}, "selection.c1 must be >= 0, got -1.0"),
        ({"c2": float("inf")}, "selection.c2 must be >= 0, got inf"),
        ({"full_at": 0.0}, "selection.full_at must lie in (0, 1], got 0.0"),
        ({"full_at": 1.1}, "selection.full_at must lie in (0, 1], got 1.1"),
        ({"criterion": "loss_plateau", "window": "printed"}, "selection.criterion=loss_plateau needs selection.window"),
        ({"anneal": True}, "selection.anneal=true needs hand-overs known in advance"),
        ({"boundary": -1}, "selection.boundary must be >= 0 or null, got -1"),
        ({"start_epoch": -1}, "selection.start_epoch must be >= 0, got -1"),
        ({"kind": "replay"}, "selection.trace must name a run directory or a boundary trace"),
    ],
)
def test_impossible_settings_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"^selection\.") as error:
        SelectionConfig(**options)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


# --- state ------------------------------------------------------------------------------------------------------------

KINDS = [
    SelectionConfig(lmax=0.6, tshift=2),
    SelectionConfig(lmax=0.6, tshift=2, window="printed"),
    SelectionConfig(lmax=0.6, tshift=2, start_epoch=9),
    SelectionConfig(lmax=0.6, tshift=2, criterion="loss_plateau", alpha=0.8),
    SelectionConfig(kind="static", lmax=0.8),
    SelectionConfig(kind="linear", lmax=0.8, start_epoch=3, full_at=0.6),
    SelectionConfig(kind="fixed", boundary=4, start_epoch=7),
]


@pytest.mark.parametrize(
    "config", KINDS, ids=lambda config: f"{config.kind} {config.window} {config.criterion} {config.start_epoch}"
)
def test_a_restored_selector_goes_on_as_if_nothing_had_happened(config: SelectionConfig) -> None:
    draw = random.Random(1)
    norms = [[draw.uniform(0.5, 1.0) * 0.9**e for _ in range(10)] for e in range(20)]

    def fresh() -> Selector:
        return make_selector(config, num_layers=10, block_size=2, epochs=20)

    reference = fresh()
    expected = observe(reference, norms)
    assert len(set(expected)) > 1
    for split in range(1, 20):
        selector = fresh()
        observe(selector, norms[:split])
        restored = fresh()
        restored.load_state_dict(json.loads(json.dumps(selector.state_dict())))
        assert restored.boundary == expected[split - 1]
        assert [restored.observe(e, norms[e]) for e in range(split, 20)] == expected[split:]


def test_a_state_does_not_change_with_the_selector_it_was_taken_from() -> None:
    selector = dynamic()
    observe(selector, [1.0, 1.0])
    state = selector.state_dict()
    copied = json.loads(json.dumps(state))
    selector.observe(2, [0.1] * 8)
    assert state == copied
