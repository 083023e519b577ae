"""The table of measured results: SmolLM2-135M under the protocol smol-wt2, one run a row, printed as Markdown.

    PTQ_DATA=../shared/data python -m experiments.smol_wt2

Every row is a run of the shipped recipes with overrides; finished rows and the baseline come from the store and outputs/.
"""

import argparse
import json
import pathlib

from ptq.cli.catalog import locate
from ptq.cli.hydra_edge import compose_jobs
from ptq.errors import UserError
from ptq.run import output_folder, run

SEARCHED = ["method=smooth", "steps.smooth.search=true"]
"""Every kind of link smoothed, alpha chosen for each by output error; then rounding to nearest."""
ORIGINAL = ["steps.gptq.target=original"]
"""GPTQ against the original outputs."""
EVEN = ["method=smooth_gptq", "steps.smooth.alpha=0", "steps.smooth.beta=0.5", *ORIGINAL]
"""Columns of the weights evened out, then GPTQ."""
BOTH = ["method=smooth_gptq", "steps.smooth.search=true", *ORIGINAL]
ROWS = {
    "RTN": {
        "W8A8, weight per channel, input dynamic per token": ["scheme=w8a8"],
        "W8A8, weight per tensor, input dynamic per tensor": ["scheme=w8a8_tensor"],
        "W8A8, weight per channel, input static per tensor asymmetric": ["scheme=w8a8_static"],
        "W4A16 per channel symmetric": ["scheme=w4a16"],
        "W4A16 groups of 64 asymmetric": ["scheme=w4a16_g64"],
        "W4A4, weight per channel, input dynamic per token": ["scheme=w4a4"],
    },
    "methods": {
        "W8A8, input dynamic per token, smooth": ["scheme=w8a8", *SEARCHED],
        "W8A8, input static per tensor, smooth": ["scheme=w8a8_static", *SEARCHED],
        "W4A16 per channel symmetric, gptq": ["scheme=w4a16", "scheme.weight.range=mse", "method=gptq", *ORIGINAL],
        "W4A16 groups of 64 asymmetric, gptq": [
            "scheme=w4a16_g64",
            "scheme.weight.range=mse",
            "method=gptq",
            *ORIGINAL,
        ],
        "W3A16 groups of 64 asymmetric, gptq": ["scheme=w3a16_g64", "method=gptq", *ORIGINAL],
        "W4A16 per channel symmetric, even columns, gptq": ["scheme=w4a16", "scheme.weight.range=mse", *EVEN],
        "W4A8 per channel symmetric, even columns, gptq": ["scheme=w4a8", *EVEN],
        "W4A8 groups of 64 asymmetric, even columns, gptq": ["scheme=w4a8_g64", *EVEN],
        "W4A4 static, smooth, gptq, no clusters": ["scheme=w4a4_cluster", "scheme.input.granularity=tensor", *BOTH],
        "W4A4 static, smooth, 32 clusters, gptq": ["scheme=w4a4_cluster", "method=smooth_cluster_gptq"],
    },
}


def main() -> None:
    """Runs every row of the tables named on the command line (all without one) and prints them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", choices=[[], *ROWS], help="which tables")
    for name in parser.parse_args().tables or ROWS:
        _table(ROWS[name])


def _table(rows: dict[str, list[str]]) -> None:
    lines = []
    for label, overrides in rows.items():
        made = compose_jobs(locate("smollm2-135m_w8a8"), ["data=smol-wt2", *overrides])[0].recipe
        finished = output_folder(made) / "metrics.json"
        folder: pathlib.Path = finished.parent if finished.is_file() else run(made)
        m = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        lines.append(
            f"| {label} | {m['quantized_perplexity']:.3f} | {m['ratio']:.4f} x | "
            f"{m['difference']:+.3f} [{m['difference_low']:+.3f}, {m['difference_high']:+.3f}] | {m['kl_mean']:.4f} | "
            f"{m['top1_agreement']:.1%} | {m['size']['bits_per_weight']:.3f} |"
        )
    print(f"\nbaseline perplexity {m['baseline_perplexity']:.3f}, {m['windows']} windows, {m['tokens']} targets\n")
    print("| setting | perplexity | ratio | difference, 95% interval | mean KL | top-1 agreement | bits a weight |")
    print("|---|---|---|---|---|---|---|")
    print("\n".join(lines))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
