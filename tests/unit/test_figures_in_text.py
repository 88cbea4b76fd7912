"""Figures in the running text of the documentation are those of `benchmarks/results/`, rounded."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from documented_results import ROOT, result, spread, variants
from speed_tables import at_three_quarters, ranged


def soak() -> list[str]:
    measured = result("soak.json")
    runs = measured["runs"]
    per_ranks: Counter[int] = Counter()
    for run in runs:
        per_ranks[run["ranks"]] += len(run["kills"])
    return [
        str(number)
        for number in (
            sum(per_ranks.values()),
            max(len(run["kills"]) for run in runs),
            sum(run["bit_equal"] for run in runs),
            len(runs),
            sum(run["samples_lost"] for run in runs),
            sum(run["samples_repeated"] for run in runs),
            *(per_ranks[ranks] for ranks in (1, 2, 4)),
        )
    ]


BY_BAR = ("ResNet-18", "ResNet-34", "ResNet-50", "MobileNetV2", "VGG-13")


def added(step: dict[str, Any]) -> float:
    """Milliseconds by which replicas lengthen a step of the exchange's benchmark."""
    milliseconds: dict[str, float] = step["milliseconds"]
    return milliseconds["step"] - milliseconds["without replicas"]


def alone(network: str) -> dict[str, Any]:
    """A step with updates from an eighth of the batch, measured with nothing beside it."""
    size = 64 if network in ("ResNet-18", "VGG-13") else 32
    return at_three_quarters(f"step_time_alone_batch{size}.json")[network]["hebbian 1/8"]


def screen(rule: str) -> list[str]:
    last = result(f"screen_{rule}.json")["epochs"][-1]
    return [str(last["boundary"]), str(last["num_layers"]), f"{100 * last['val_top1']:.1f}"]


def prefix_gradients() -> list[str]:
    """Least and most of what true gradients have in common, over epochs."""
    epochs = result("gradient_change.json")["epochs"]
    figures = []
    for key, digits, scale in (("cosine", 2, 1), ("change", 2, 1), ("signal", 1, 100), ("epoch_cosine", 2, 1)):
        values = [scale * epoch[key] for epoch in epochs if epoch[key] is not None]
        figures += [f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"]
    return figures


def after_the_drops() -> list[str]:
    """Plain SGD under the paper's schedule: when it stands, where from then on, and what stopping would have saved."""
    (run,) = variants("bench_paper_5000.json")["images-5000-sgd"]["runs"]
    curve, at = run["curve"], 25.0
    index = curve["epochs"].index(at)
    later = [100 * top1 for top1 in curve["top1"][index:]]
    left = curve["epochs"][-1] - at
    saved = curve["flops"][-1] / curve["flops"][index]
    return [
        f"{later[0]:.1f}",
        f"{min(later):.1f}",
        f"{max(later):.1f}",
        f"{later[-1]:.1f}",
        f"{left:.0f}",
        f"{saved:.1f}",
    ]


def ratio(summary: dict[str, Any]) -> list[str]:
    return [f"{summary[key]:.2f}" for key in ("median", "min", "max")]


def behind_sgd(*names: str) -> list[str]:
    """How far variants fall short of plain SGD at the same number of operations, in points."""
    found = variants("table2_small.json")
    return [spread(found[name]["iso_cost"]["flops"]["advantage"], 1, scale=-100) for name in names]


def top1_and_saving(name: str, baseline: str, variant: str, *schedules: str) -> list[str]:
    """Accuracy of plain SGD and of a variant, how many times fewer operations that needs, accuracy of ``schedules``."""
    found = variants(name)

    def top1(of: str) -> str:
        return f"{100 - 100 * found[of]['figures']['final_error']['mean']:.1f}"

    ratio = f"{found[variant]['figures']['flops_ratio']['mean']:.2f}"
    return [top1(baseline), top1(variant), ratio, *(top1(schedule) for schedule in schedules)]


def changed_about() -> list[str]:
    """Both shares of resting layers, then plain SGD for as many operations as each."""
    plain, third, saved, like_third = top1_and_saving("bench_f_swapped.json", "few-sgd", "few-finetune", "few-sgd-15")
    return [
        plain,
        third,
        saved,
        *top1_and_saving("bench_f_swapped.json", "few-sgd", "few-frozen-50")[1:],
        like_third,
        *top1_and_saving("bench_f_swapped.json", "few-sgd", "few-finetune", "few-sgd-12")[3:],
    ]


def fewer_operations_than_20_epochs(name: str, variant: str) -> str:
    """How many times fewer a run on all of CIFAR-10 needs than 20 epochs of plain SGD."""
    plain = variants("bench_m_pairs.json")["sgd"]["figures"]["flops"]["mean"]
    return f"{plain / variants(name)[variant]['figures']['flops']['mean']:.2f}"


def beside_16_epochs() -> list[str]:
    """On all of CIFAR-10: accuracy of preset and shorter schedule, how far apart, operations of both."""
    figures = {name: variant["figures"] for name, variant in variants("bench_m_pairs.json").items()}
    ours, shorter = (figures[name]["final_error"] for name in ("recommended", "sgd-16"))
    cpu_seconds = [figures[name]["cpu_seconds"]["per_seed"] for name in ("sgd-16", "recommended")]
    return [
        *(f"{100 - 100 * error['mean']:.1f}" for error in (ours, shorter)),
        seed_by_seed(ours, shorter),
        *(fewer_operations_than_20_epochs("bench_m_pairs.json", name) for name in ("recommended", "sgd-16")),
        f"{statistics.mean(cpu_seconds[0][seed] / cpu_seconds[1][seed] for seed in cpu_seconds[0]):.2f}",
    ]


def seed_by_seed(error: dict[str, Any], other: dict[str, Any]) -> str:
    """Points by which one error lies above another, over the seeds of both."""
    both = error["per_seed"].keys() & other["per_seed"].keys()
    points = [100 * (error["per_seed"][seed] - other["per_seed"][seed]) for seed in both]
    return f"{statistics.mean(points):.1f} ± {statistics.stdev(points):.1f}"


def behind_20_epochs() -> list[str]:
    """On all of CIFAR-10: points lost to 20 epochs of plain SGD, by the preset and by 16 epochs."""
    errors = {name: variant["figures"]["final_error"] for name, variant in variants("bench_m_pairs.json").items()}
    return [seed_by_seed(errors[name], errors["sgd"]) for name in ("recommended", "sgd-16")]


def on_another_machine() -> list[str]:
    found = variants("bench_m.json")
    return [f"{100 - 100 * found[name]['figures']['final_error']['mean']:.1f}" for name in ("sgd", "recommended")]


def on_all_of_cifar10() -> list[str]:
    """Accuracy of plain SGD of 17 epochs, and how many times fewer operations it needs than 20."""
    short = variants("bench_m_17.json")["sgd-17"]["figures"]
    top1 = 100 - 100 * short["final_error"]["mean"]
    return [f"{top1:.1f}", fewer_operations_than_20_epochs("bench_m_17.json", "sgd-17")]


def to_saturation() -> list[str]:
    """On 90 epochs of a cosine: points lost and operations saved, by the preset and by fewer epochs."""
    found = variants("bench_l_cosine.json")
    return [figure for name in ("cosine-recommended", "cosine-sgd-72") for figure in lost_and_saved(found[name])]


def on_the_printed_schedule() -> list[str]:
    """Layers at rest, the preset, and plain SGD itself after 25 epochs."""
    found = variants("bench_l_step.json")
    curves = [run["curve"] for run in found["step-sgd"]["runs"]]
    after_25 = curves[0]["epochs"].index(25)
    samples = curves[0]["samples"]
    return [
        *lost_and_saved(found["step-rest-from-20"]),
        *lost_and_saved(found["step-recommended"]),
        f"{100 * statistics.mean(curve['top1'][after_25] for curve in curves):.1f}",
        f"{samples[-1] / samples[after_25]:.1f}",
        f"{100 * statistics.mean(curve['top1'][-1] for curve in curves):.1f}",
    ]


def lost_and_saved(variant: dict[str, Any]) -> tuple[str, str, str]:
    """Points lost, their standard deviation over seeds, and how many times fewer operations."""
    lost, saved = variant["figures"]["error_increase"], variant["figures"]["flops_ratio"]
    return *(f"{100 * lost[key]:.1f}".removeprefix("0") for key in ("mean", "sd")), f"{saved['mean']:.2f}"


def gained_by_a_cosine() -> list[str]:
    step, cosine = (
        variants(f"bench_l_{name}.json")[f"{name}-sgd"]["figures"]["final_error"]["mean"] for name in ("step", "cosine")
    )
    return [f"{100 * (step - cosine):.1f}"]


#: Page, what stands there (white space aside), and the groups that the results give.
IN_TEXT: list[tuple[str, str, Callable[[], list[str]]]] = [
    (
        "reliability.md",
        r"(\d+) kills of a random rank at a random moment, up to (\d+) in a row in one run, .* end: "
        r"(\d+) of (\d+) runs ended bit-equal with the uninterrupted one, with (\d+) samples lost and (\d+) repeated "
        r"\((\d+) kills on 1 rank, (\d+) on 2, (\d+) on 4\)",
        soak,
    ),
    (
        "../README.md",
        r"5 seeds \(`localized/finetune`\) \| ([\d.]+) % \| \*\*([\d.]+) % at ([\d.]+) × .*?\*\* \| ([\d.]+) % \|",
        lambda: top1_and_saving("bench_f_few.json", "few-sgd", "few-frozen-33", "few-sgd-15"),
    ),
    (
        "../README.md",
        r"5 seeds \(`localized/finetune_kept`\) \| ([\d.]+) % \| \*\*([\d.]+) % at ([\d.]+) × .*?\*\* "
        r"\| ([\d.]+) % at 2",
        lambda: top1_and_saving("bench_f_kept.json", "few-sgd", "few-kept-50", "few-sgd-10"),
    ),
    (
        "../README.md",
        r"each image in 3 ways, 3 seeds \| ([\d.]+) % \| ([\d.]+) % at ([\d.]+) ×, .*? \| ([\d.]+) % at 1",
        lambda: top1_and_saving("bench_f_many.json", "many-sgd", "many-kept-40-draws3", "many-sgd-4"),
    ),
    (
        "../README.md",
        r"no part in choosing it, 5 seeds \| ([\d.]+) % \| ([\d.]+) % at ([\d.]+) × \| ([\d.]+) % at 2",
        lambda: top1_and_saving("bench_f_kept_swapped.json", "few-sgd", "few-kept-50", "few-sgd-10"),
    ),
    (
        "../README.md",
        r"10,000 images, 5 seeds \(`localized/finetune`\) \| ([\d.]+) % \| ([\d.]+) % at ([\d.]+) × .*? \| ([\d.]+) %",
        lambda: top1_and_saving("bench_f_many.json", "many-sgd", "many-finetune", "many-sgd-4"),
    ),
    (
        "../README.md",
        r"half of the layers at rest, 5 seeds \| ([\d.]+) % \| ([\d.]+) % at ([\d.]+) ×, .*? \| ([\d.]+) % \|",
        lambda: top1_and_saving("bench_f_few.json", "few-sgd", "few-frozen-50", "few-sgd-12"),
    ),
    (
        "../README.md",
        r"with other classes, 5 seeds \| ([\d.]+) % \| ([\d.]+) % at ([\d.]+) ×; ([\d.]+) % at ([\d.]+) × "
        r"\| ([\d.]+) %; ([\d.]+) % \|",
        changed_about,
    ),
    (
        "../README.md",
        r"\(`localized/recommended`\) \| ([\d.]+) % \| ([\d.]+) % at ([\d.]+) ×, .*? \| ([\d.]+) to ([\d.]+) % \|",
        lambda: top1_and_saving("bench_xs.json", "sgd", "quarter-gain0.5", "sgd-16", "sgd-18"),
    ),
    (
        "../README.md",
        r"all of CIFAR-10, 20 epochs, 3 seeds \| ([\d.]+) %.*? \| ([\d.]+) % at ([\d.]+) ×, .*? "
        r"\| ([\d.]+) % at ([\d.]+) ×",
        lambda: [
            top1_and_saving("bench_m_pairs.json", "sgd", "recommended")[0],
            *(beside_16_epochs()[place] for place in (0, 3, 1, 4)),
        ],
    ),
    (
        "../README.md",
        r"to saturation .*? \| ([\d.]+) % \| ([\d.]+) % at ([\d.]+) ×, .*? \| ([\d.]+) % at 1.25 × \|",
        lambda: top1_and_saving("bench_l_cosine.json", "cosine-sgd", "cosine-recommended", "cosine-sgd-72"),
    ),
    (
        "../README.md",
        r"\(`localized/paper`\) \| ([\d.]+) % \| ([\d.]+) % at ([\d.]+) ×",
        lambda: top1_and_saving("bench_paper_5000.json", "images-5000-sgd", "images-5000-follows"),
    ),
    (
        "../README.md",
        r"\(`localized/paper_literal`\) \| ([\d.]+) % \| ([\d.]+) %:",
        lambda: top1_and_saving("bench_paper_5000.json", "images-5000-sgd", "images-5000-literal")[:2],
    ),
    (
        "performance.md",
        r"gave ([\d.]+ \S+) for ResNet-18, ([\d.]+ \S+) for ResNet-34, ([\d.]+ \S+) for ResNet-50, ([\d.]+ \S+) for "
        r"MobileNetV2 and ([\d.]+ \S+) for VGG-13, and ([\d.]+), ([\d.]+), ([\d.]+), ([\d.]+) and ([\d.]+) times",
        lambda: [
            *(ranged(alone(network)["cpu_time_over_frozen"]) for network in BY_BAR),
            *(f"{alone(network)['cpu_speed_up_over_sgd']['median']:.2f}" for network in BY_BAR),
        ],
    ),
    (
        "performance.md",
        r"then 25 MiB, the plain step takes ([\d.]+) times as long.*? With four ranks: ([\d.]+) \(([\d.–]+)\) times",
        lambda: [
            f"{result('traffic.json')['steps'][0]['step_in_default_buckets_over_step']['median']:.2f}",
            *ranged(result("traffic_ranks4.json")["steps"][0]["step_in_default_buckets_over_step"])[:-1].split(" ("),
        ],
    ),
    (
        "../README.md",
        r"(\d+) % of the exchange beside the backward pass; DDP's own buckets take ([\d.]+) × the time",
        lambda: [
            f"{100 * result('traffic.json')['steps'][0]['gradients_hidden']:.0f}",
            f"{result('traffic.json')['steps'][0]['step_in_default_buckets_over_step']['median']:.2f}",
        ],
    ),
    (
        "performance.md",
        r"(\d+) % with four ranks\), an eighth at T = 75 %",
        lambda: [f"{100 * result('traffic_ranks4.json')['steps'][0]['gradients_hidden']:.0f}"],
    ),
    (
        "performance.md",
        r"differ by (\d+) ms\. At T = 75 % (\d+) ms of replicas add (\d+) ms \((\d+) % hidden\), with four ranks (\d+) "
        r"ms add (\d+) \((\d+) %\),\s+beside gradients in bfloat16 (\d+) ms add (\d+) \((\d+) %",
        lambda: [
            f"{added(result('traffic.json')['steps'][0]):.0f}",
            *(
                figure
                for name in ("traffic.json", "traffic_ranks4.json", "traffic_bf16.json")
                for step in result(name)["steps"][-1:]
                for figure in (
                    f"{step['milliseconds']['replicas alone']:.0f}",
                    f"{added(step):.0f}",
                    f"{100 * step['replicas_hidden']:.0f}",
                )
            ),
        ],
    ),
    (
        "results.md",
        r"SGD of 17 epochs, .*? ends at ([\d.]+) % for ([\d.]+) times fewer",
        on_all_of_cifar10,
    ),
    (
        "results.md",
        r"on a cosine ([\d.]+) ± ([\d.]+) points below plain SGD for ([\d.]+) times fewer operations, where 72 epochs "
        r"of plain SGD lose ([\d.]+) ± ([\d.]+) for ([\d.]+) times",
        to_saturation,
    ),
    (
        "results.md",
        r"from epoch 20 on end ([\d.]+) ± ([\d.]+) points below plain SGD for ([\d.]+) times fewer operations, the "
        r"preset ([\d.]+) ± ([\d.]+) for ([\d.]+) times.*? stands at ([\d.]+) % after 25 of the 90 epochs, for "
        r"([\d.]+) times fewer operations, and at ([\d.]+) % at the end",
        on_the_printed_schedule,
    ),
    ("results.md", r"a cosine of as many epochs gains ([\d.]+) points", gained_by_a_cosine),
    (
        "results.md",
        r"to a tenth of a point\*\*: ([\d.]+) against ([\d.]+) %, seed by seed ([\d.]+ ± [\d.]+) points below, for "
        r"([\d.]+) times fewer operations than 20 epochs of plain SGD \(its 16 epochs: ([\d.]+) times\), in "
        r"([\d.]+) times less processor time than those",
        beside_16_epochs,
    ),
    (
        "results.md",
        r"Against plain SGD of 20 epochs the preset costs ([\d.]+ ± [\d.]+) points, "
        r"a schedule of 16 epochs ([\d.]+ ± [\d.]+);",
        behind_20_epochs,
    ),
    ("results.md", r"seed 0 alone, plain SGD ended at ([\d.]+) % and the preset at ([\d.]+) %", on_another_machine),
    (
        "performance.md",
        r"at T = 75 % ([\d.]+ \([\d.–]+\)) times as long: (\d+) ms instead of (\d+), for (\d+) ms of exchange",
        lambda: [
            figure
            for step in result("refresh_exchange.json")["steps"][-1:]
            for figure in (
                ranged(step["behind_over_step"]),
                *(f"{step['milliseconds'][side]:.0f}" for side in ("behind", "step", "region alone")),
            )
        ],
    ),
    (
        "performance.md",
        r"plain step takes ([\d.]+ \([\d.–]+\)) of its\s+time by compiling .*?ΔW on an eighth ([\d.]+ \([\d.–]+\)), "
        r"frozen ([\d.]+ \([\d.–]+\))\s+times",
        lambda: [
            ranged(at_three_quarters("step_time_compiled.json")["ResNet-18"][mode]["cpu_speed_up_over_sgd"])
            for mode in ("sgd, not compiled", "hebbian 1/8", "frozen")
        ],
    ),
    (
        "results.md",
        r"have a cosine of (\S+) to (\S+), whatever .*? difference is (\S+) to (\S+) times .*? "
        r"share is (\S+) to (\S+) % .*? \(cosine (\S+) to (\S+)\)",
        prefix_gradients,
    ),
    (
        "results.md",
        r"stands at (\S+) % after 25 of the 90 epochs, then between (\S+) and (\S+) %, and ends at (\S+) %, .*? "
        r"in those (\d+) epochs .*? saves (\S+) times",
        after_the_drops,
    ),
    ("results.md", r"\(`localized.rule=none`\) \| (\d+) of (\d+) \| ([\d.]+) % \|", lambda: screen("none")),
    ("results.md", r"η = .01 \(`hebbian`\) \| (\d+) of (\d+) \| ([\d.]+) % \|", lambda: screen("hebbian")),
    (
        "results.md",
        r"LoCal\+SGD falls ([\d.]+ ± [\d.]+) points short of it \(η = .001: ([\d.]+ ± [\d.]+), "
        r"static: ([\d.]+ ± [\d.]+)\), freezing ([\d.]+ ± [\d.]+) and random ([\d.]+ ± [\d.]+), .* "
        r"falls ([\d.]+ ± [\d.]+) short",
        lambda: behind_sgd(
            "local-dynamic", "local-dynamic-eta0.001", "local-static", "freezing", "random", "stochastic-depth"
        ),
    ),
    (
        "results.md",
        r"10 Hz trace / without = ([\d.]+) \(median; ([\d.]+) to ([\d.]+):",
        lambda: ratio(result("monitor_overhead.json")["ratio_with_trace_10hz"]),
    ),
    (
        "results.md",
        r"whose tensors are counted: ([\d.]+) \(([\d.]+) to ([\d.]+)\)",
        lambda: ratio(result("monitor_overhead.json")["ratio_measured_step"]),
    ),
    (
        "strategies.md",
        r"in turn: ([\d.]+) of its time \(median of 12 pairs, ([\d.]+)–([\d.]+)\)",
        lambda: ratio(result("stochastic_depth.json")["ratio"]),
    ),
]


@pytest.mark.parametrize(
    ("page", "pattern", "expected"), IN_TEXT, ids=[f"{page}-{number}" for number, (page, *_) in enumerate(IN_TEXT)]
)
def test_figures_in_the_text(page: str, pattern: str, expected: Callable[[], list[str]]) -> None:
    text = " ".join((ROOT / "docs" / page).read_text(encoding="utf-8").split())
    found = re.search(pattern, text)
    assert found is not None, "the sentence is gone: take its entry out too"
    assert list(found.groups()) == expected()
