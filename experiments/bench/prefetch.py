"""Seconds of a run with offloaded weights over those of a resident one, on an OPT-1.3B-shaped checkpoint in the page cache: GPTQ W4A16.

    python -m experiments.bench.prefetch [--folder DIR] [--layers 24] [--repeats 3] [--samples 8] [--length 512]

Resident, offloaded and offloaded without reading ahead take turns, each in a fresh process; a run's seconds are those of all its
phases, from loading to evaluation. The goal: offloaded at most 1.15 x resident.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile

from experiments.bench.offload import write_checkpoint
from ptq.config.building import recipe_from

SIDES = {
    "resident": {"weights": "resident"},
    "offloaded": {"weights": "offloaded"},
    "not read ahead": {"weights": "offloaded", "prefetch": False},
}


def work(folder: pathlib.Path, side: str, samples: int, length: int) -> None:
    """Runs the recipe on one side; prints its seconds."""
    from ptq.run.experiment import run

    with tempfile.TemporaryDirectory() as scratch:
        recipe = recipe_from(
            {
                "name": "prefetch",
                "model": {"path": str(folder)},
                "data": {"allow_overlap": True},
                "calibration": {"samples": samples, "length": length, "batch_size": 1},
                "evaluation": {"windows": 2, "length": length},
                "scheme": {"weight": {"bits": 4, "granularity": "group", "group_size": 64}},
                "steps": {"gptq": {}},
                "execution": SIDES[side],
                "outputs": scratch,
                "store": scratch,
            }
        )
        seconds = json.loads((run(recipe) / "metrics.json").read_text(encoding="utf-8"))["seconds"]
    print(json.dumps({"seconds": sum(seconds.values())}))


def main() -> None:
    """Makes the checkpoint where it is missing, then lets the sides take turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=pathlib.Path, default=pathlib.Path(tempfile.gettempdir()) / "ptq-opt-1.3b-shaped"
    )
    for name, default in {"layers": 24, "repeats": 3, "samples": 8, "length": 512}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--work", choices=SIDES, help="only the work of one side, in this process")
    options = parser.parse_args()
    if options.work:
        work(options.folder, options.work, options.samples, options.length)
        return
    if not (options.folder / "tokenizer.json").is_file():
        write_checkpoint(options.folder, options.layers)
    found: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(options.repeats):
        for side in SIDES:
            words = [f"--{name}={getattr(options, name)}" for name in ("folder", "samples", "length")]
            command = [sys.executable, "-m", "experiments.bench.prefetch", "--work", side, *words]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found[side].append(float(json.loads(done.stdout.splitlines()[-1])["seconds"]))
    medians = {side: statistics.median(values) for side, values in found.items()}
    for side, median in medians.items():
        print(f"{side}: {median:.1f} s ({median / medians['resident']:.2f} x resident), of {len(found[side])} runs")


if __name__ == "__main__":
    main()
