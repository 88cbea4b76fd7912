"""Tables of docs/performance.md, made of `benchmarks/results/`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from documented_results import MIB, Cells, mib, result

NETWORKS = {
    "ResNet-18": "resnet18",
    "VGG-13": "vgg13",
    "ResNet-34": "resnet34",
    "ResNet-50": "resnet50",
    "MobileNetV2": "mobilenet_v2",
}


def at_three_quarters(name: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Records of a benchmark of steps by network and mode, at 75 % of the layers; plain SGD's are at none."""
    found: dict[str, dict[str, dict[str, Any]]] = {label: {} for label in NETWORKS}
    labels = {network: label for label, network in NETWORKS.items()}
    for record in result(name)["steps"]:
        if record.get("share_of_layers", 0.75) == 0.75:
            found[labels[record["network"]]][record["mode"]] = record
    return found


def ranged(summary: dict[str, float], digits: int = 2) -> str:
    middle, least, most = (f"{summary[key]:.{digits}f}" for key in ("median", "min", "max"))
    return f"{middle} ({least}–{most})"


def step_time(name: str) -> Cells:
    def faster(record: dict[str, Any]) -> str:
        return f"{ranged(record['cpu_speed_up_over_sgd'])}, limit {record['limit']:.2f}"

    return {
        label: [
            f"{modes['sgd']['cpu_milliseconds']:.0f} ms",
            *(faster(modes[mode]) for mode in ("hebbian", "hebbian 1/8", "frozen", "refresh/4")),
            faster(modes["refresh of 1/4 each step"]),
            ranged(modes["hebbian 1/8"]["cpu_time_over_frozen"]),
        ]
        for label, modes in at_three_quarters(name).items()
        if modes
    }


def memory() -> Cells:
    modes_shown = ("frozen", "hebbian 1/8", "refresh of 1/4 each step", "refresh step, recomputed", "refresh step")
    return {
        label: [
            f"{modes['sgd']['peak_bytes'] / MIB:.0f} MiB",
            *(f"{modes[mode]['peak_over_sgd']:.2f}" for mode in modes_shown),
            f"{modes['frozen']['share_of_activations_freed']:.2f}",
            f"{modes['frozen']['share_of_layer_inputs_freed']:.2f}",
        ]
        for label, modes in at_three_quarters("memory.json").items()
    }


def overhead() -> Cells:
    labels = {
        "`locsgd_dist`": "locsgd_dist",
        "bare loop": "bare loop",
        "torchvision's reference, rewritten": "torchvision reference",
        "timm's parts": "timm",
    }
    sides = {side["side"]: side for side in result("overhead.json")["sides"]}
    assert set(sides) == set(labels.values())
    return {
        label: [
            f"{sides[name]['images_per_second']['median']:.0f}",
            ranged(sides[name]["time_over_bare_loop"], 3),
            ranged(sides[name]["cpu_time_over_bare_loop"], 3),
            f"{sides[name]['peak_rss_mib']:.0f} MiB",
        ]
        for label, name in labels.items()
    }


def step_parts() -> Cells:
    """Forward, update, backward and optimizer in per cent of plain SGD's step."""
    modes = ("sgd", "hebbian", "hebbian 1/8", "frozen", "refresh of 1/4 each step")
    assert all(time >= 0 for record in result("step_parts.json")["parts"] for time in record["milliseconds"].values())
    found: dict[str, dict[str, dict[str, float]]] = {}
    for record in result("step_parts.json")["parts"]:
        found.setdefault(record["network"], {})[record["mode"]] = record["milliseconds"]

    def cell(of: dict[str, float], whole: float) -> str:
        return " / ".join(f"{100 * of[part] / whole:.0f}" for part in ("forward", "update", "backward", "optimizer"))

    return {
        label: [cell(found[network][mode], sum(found[network]["sgd"].values())) for mode in modes]
        for label, network in NETWORKS.items()
    }


def operators() -> Cells:
    groups = [
        ["aten::mkldnn_convolution", "aten::_slow_conv2d_forward"],
        ["aten::convolution_backward", "aten::_slow_conv2d_backward"],
        ["aten::native_batch_norm"],
    ]
    labels = {network: label for label, network in NETWORKS.items()}
    rows = {}
    for record in result("profile.json")["profiles"]:
        shares = [sum(record["shares"].get(name, 0.0) for name in group) for group in groups]
        cells = [f"{100 * share:.1f} %" for share in [*shares, 1 - sum(shares)]]
        rows[f"{labels[record['network']]}, {record['mode']}"] = cells
    return rows


def quick_start() -> Cells:
    seconds = result("profile_quickstart.json")["seconds"]
    total = sum(seconds.values())
    return {part: [f"{taken:.1f}", f"{100 * taken / total:.0f} %"] for part, taken in seconds.items()}


def exchange() -> Cells:
    def cells(record: dict[str, Any]) -> list[str]:
        milliseconds = record["milliseconds"]
        alone = milliseconds.get("replicas alone")
        # Less than a few milliseconds cannot be told from the scatter of the step.
        hidden = f"{100 * record['replicas_hidden']:.0f} %" if alone and alone > 10 else "–"
        return [
            mib(record["gradient_bytes_per_step"]),
            f"{milliseconds['gradients alone']:.0f} ms",
            f"{milliseconds['without exchange']:.0f} ms",
            f"{milliseconds['without replicas']:.0f} ms",
            f"{milliseconds['step']:.0f} ms",
            f"{100 * record['gradients_hidden']:.0f} %",
            ranged(record["step_in_default_buckets_over_step"]).replace(" (", " × ("),
            mib(record["replica_bytes_per_step"]),
            f"{alone:.0f} ms" if alone else "–",
            hidden,
        ]

    steps = result("traffic.json")["steps"]
    assert all(step["gradient_bytes_per_step"] == step["sgd_region_bytes"] for step in steps)
    return {f"{100 * step['share_of_layers']:.0f} %": cells(step) for step in steps}


def input_paths() -> Cells:
    return {
        path["path"]: [
            f"{path['images_per_second']['median']:,.0f}",
            f"{path['limit_images_per_second']['median']:,.0f}",
            ranged(path["share_of_limit"]),
        ]
        for path in result("input.json")["paths"]
    }


SPEED_TABLES: dict[str, Callable[[], Cells]] = {
    **{
        name: partial(step_time, name)
        for name in ("step_time.json", "step_time_batch32.json", "step_time_batch64.json")
    },
    "step_parts.json": step_parts,
    "profile.json": operators,
    "profile_quickstart.json": quick_start,
    "traffic.json": exchange,
    "input.json": input_paths,
    "memory.json": memory,
    "overhead.json": overhead,
}
