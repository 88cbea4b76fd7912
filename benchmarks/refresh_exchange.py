"""What it costs to reduce the localized region's gradients in each step, as the preset ``recommended`` does on a link.

    python benchmarks/refresh_exchange.py --link-mbps 600 --output results/refresh_exchange.json

A quarter of each batch backpropagates through the whole network. The region's gradients leave when that pass is over,
beside the pass of the rest ("step"), or when both are over ("behind"); a third side sends nothing. Sides take turns.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from measuring import environment, ratio, spread, write_json
from shaped_link import run_ranks
from traffic import WINDOW, Side, alone, in_turn

from locsgd_dist.distributed import Refresh
from locsgd_dist.localized import LocalizedConfig

PRESET = LocalizedConfig(refresh_every=1, refresh_fraction=0.25, refresh_gain=0.5, refresh_recompute=False)


class BehindBackward(Refresh):
    """Reduces when the whole backward pass is over."""

    _share = 1.0

    def start_reducing(self, share: float = 1.0) -> None:
        self._share = share

    def finish_reducing(self) -> None:
        super().start_reducing(self._share)
        super().finish_reducing()


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    options.fraction, options.sharded_work = 1.0, False
    records = []
    for share in options.boundaries:
        settings: dict[str, Any] = {"replicas": None, "localized": PRESET, "rule": "frozen"}
        step = Side(options, share, reduces=True, **settings)
        behind = Side(options, share, reduces=True, refresh=BehindBackward, **settings)
        nothing = Side(options, share, reduces=False, **settings)
        step()
        step.traffic.take()
        step()
        region_bytes = step.traffic.take().gradient_bytes // WINDOW - step.sgd_region_bytes
        sides = {"step": step, "behind": behind, "without exchange": nothing}
        seconds = in_turn(sides | {"region alone": alone([region_bytes] * WINDOW, broadcast=False)}, options.rounds)
        middle = {name: spread(values)["median"] for name, values in seconds.items()}
        records.append(
            {
                "share_of_layers": share,
                "boundary": step.boundary,
                "region_gradient_bytes_per_step": region_bytes,
                "sgd_region_bytes": step.sgd_region_bytes,
                "milliseconds": {name: 1e3 * value for name, value in middle.items()},
                "behind_over_step": ratio(seconds["behind"], seconds["step"]),
                "step_over_no_exchange": ratio(seconds["step"], seconds["without exchange"]),
            }
        )
        if dist.get_rank() == 0:
            print(json.dumps(records[-1]), file=sys.stderr, flush=True)
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--boundaries", nargs="+", type=float, default=[0.34, 0.75])
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--batch", type=int, default=16, help="images per rank and step")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--link-mbps", type=float)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.result:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", timeout=timedelta(seconds=300))
        records = measure(options)
        if dist.get_rank() == 0:
            options.result.write_text(json.dumps(records))
        dist.destroy_process_group()
        return
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch) / "result.json"
        run_ranks([*sys.argv, "--result", str(result)], options.ranks, options.link_mbps)
        steps = json.loads(result.read_text())
    settings = {key: getattr(options, key) for key in ("ranks", "width", "batch", "rounds", "link_mbps")}
    write_json(options.output, environment(torch.device("cpu")) | settings | {"steps": steps})


if __name__ == "__main__":
    main()
