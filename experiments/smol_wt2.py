"""The tables of measured results: SmolLM2-135M under the protocol smol-wt2, one run a row, printed as Markdown.

    ptq data smol-wt2                       # which files it needs, and whether they are there
    python -m experiments.smol_wt2          # every row
    python -m experiments.smol_wt2 RTN --docs    # rounding to nearest on the texts that are in every CPython

Every row is a run of the shipped recipes with overrides; finished rows and the baseline come from the store and outputs/.
The protocol has the tokens that transformers reads out of the GGUF file, which keep digits together where the model's own
tokenizer splits them: `model.tokenizer` names a folder with them, outputs/smol-wt2-tokenizer, written here on first use
(`--tokenizer` writes it and no more). On the documentation (`--docs`) the model has its own tokens. `--check` evaluates on twice as
many windows and prints the ratio of each half: nothing is chosen by the second.
"""

import argparse
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

import transformers

from ptq.cli.catalog import locate
from ptq.cli.compose.hydra_edge import compose_jobs
from ptq.errors import UserError
from ptq.files.atomic import write_folder_atomic
from ptq.models.locations import locate as locate_model
from ptq.run.experiment import output_folder, run

WINDOWS = 16
"""Of the protocol."""
SEARCHED = ["method=smooth", "steps.smooth.search=true"]
"""Every kind of link smoothed, alpha chosen for each by output error; then rounding to nearest."""
GPTQ = ["method=gptq", "scheme.weight.range=mse"]
"""GPTQ as published, on grids of least squared error."""
RESIDUAL = [*GPTQ, "steps.gptq.target=residual"]
"""GPTQ against the original outputs and the original residual stream."""
CLUSTERS = ["scheme=w4a4_cluster", "steps.gptq.target=residual"]
"""4-bit weights and static 4-bit inputs."""
RPTQ = ["method=smooth_cluster_gptq", "~steps.smooth", "steps.cluster.method=max_min_kmeans"]
"""Each link clustered by itself, nothing smoothed."""
EVERY = ["scheme.cache.window=0", "scheme.cache.first=0"]
"""No token of the cache stays exact, but those whose group is not full."""
ROTATED = ["method=rotate_clip_gptq"]
"""The stream rotated, what down and o read rotated online, inputs clipped, GPTQ."""
TRELLIS = ["scheme=w2a16_trellis", "method=rotate_gptq", "steps.rotate.online=[]", "steps.gptq.target=residual"]
"""The stream rotated for good, so that weights are near Gaussian; then GPTQ by columns of tiles."""
NARROW = ["steps.tune.precision=bfloat16"]
"""Products of tuning in 16 bits, which a processor with such instructions multiplies two to three times as fast."""
WEIGHT_METHODS = {
    "rtn": ["scheme.weight.range=minmax"],
    "rtn, ranges by the Hessian's diagonal": ["scheme.weight.range=minmax", "+steps.rtn.scales=diagonal"],
    "hqq": ["scheme.weight.range=minmax", "method=hqq"],
    "awq": ["scheme.weight.range=minmax", "method=awq"],
    "awq, gptq": ["scheme.weight.range=minmax", "method=awq_gptq"],
    "autoround": ["scheme.weight.range=minmax", "method=autoround", "steps.autoround.steps=50"],
    "omniquant": ["scheme.weight.range=minmax", "method=omniquant", "steps.omniquant.steps=50"],
    "gptq, target residual": RESIDUAL,
    "gptq, target residual, held out": [*RESIDUAL, "steps.gptq.held_out=8"],
    "gptq, target residual, held out, relative": [*RESIDUAL, "steps.gptq.held_out=8", "steps.gptq.relative=true"],
    "gptq, target residual, pivots, descent 2": [*RESIDUAL, "steps.gptq.scales=pivots", "steps.gptq.descent=2"],
    "rotate, gptq, target residual": [*RESIDUAL, "method=rotate_gptq", "steps.rotate.online=[]"],
}
"""Weight-only methods, each on the same scheme; 50 learned steps a block are what two cores allow."""
BEST_GOALS = {
    "w8a8": "1.004", "w8a8_static": "1.015", "w4a16_g64": "1.055", "w4a16": "1.10", "w4a8": "1.12", "w4a8_g64": "1.07",
    "w3a16_g64": "1.22", "w2a16_g64": "2.5", "w4a4_asym": "1.5", "w4a4_g64": "1.30", "kv4": "1.01", "kv2": "1.08",
    "nvfp4_w4a4": "1.35", "mxfp4_w4a4": "1.45", "w2a16_trellis": "1.8", "w4a4_static": "1.8",
    "w4a4kv4_asym": "1.03 x W4A4",
}  # fmt: skip
"""Schemes for which a recipe was measured as the best so far, `method=best`, and what is aimed at."""
ROWS: dict[str, dict[str, tuple[list[str], str]]] = {
    "best": {f"{scheme}; best": ([f"scheme={scheme}", "method=best"], goal) for scheme, goal in BEST_GOALS.items()},
    "RTN": {
        "W8A8, weight per channel, input dynamic per token": (["scheme=w8a8"], ""),
        "W8A8, weight per tensor, input dynamic per tensor": (["scheme=w8a8_tensor"], ""),
        "W8A8, weight per channel, input static per tensor asymmetric": (["scheme=w8a8_static"], ""),
        "W4A16 per channel symmetric": (["scheme=w4a16"], ""),
        "W4A16 groups of 64 asymmetric": (["scheme=w4a16_g64"], ""),
        "W4A4, weight per channel, input dynamic per token": (["scheme=w4a4"], ""),
    },
    "methods": {
        "W8A8, input dynamic per token; smooth, alpha 0.5": (["scheme=w8a8", "method=smooth"], ""),
        "W8A8, input dynamic per token; smooth, alpha searched": (["scheme=w8a8", *SEARCHED], "1.010"),
        "W8A8, input static per tensor; smooth, alpha 0.5": (["scheme=w8a8_static", "method=smooth"], ""),
        "W8A8, input static per tensor; smooth, alpha searched": (["scheme=w8a8_static", *SEARCHED], "1.10"),
        "W4A16 per channel symmetric; gptq": (["scheme=w4a16", *GPTQ], ""),
        "W4A16 per channel symmetric; gptq, target residual": (["scheme=w4a16", *RESIDUAL], "1.40"),
        "W4A16 g64 asymmetric; gptq": (["scheme=w4a16_g64", *GPTQ], ""),
        "W4A16 g64 asymmetric; gptq, target residual": (["scheme=w4a16_g64", *RESIDUAL], "1.13"),
        "W4A8 per channel symmetric; gptq, target residual": (["scheme=w4a8", *RESIDUAL], "1.45"),
        "W4A8 g64 asymmetric; gptq, target residual": (["scheme=w4a8_g64", *RESIDUAL], "1.15"),
        "W3A16 g64 asymmetric; gptq, target residual": (["scheme=w3a16_g64", *RESIDUAL], "1.8"),
        "W4A4 static per tensor; smooth (alpha 0.5), gptq, target residual": (
            [*CLUSTERS, "scheme.input.granularity=tensor", "method=smooth_gptq"],
            "",
        ),
        "W4A4 static per tensor; smooth (searched), gptq, target residual": (
            [*CLUSTERS, "scheme.input.granularity=tensor", "method=smooth_gptq", "steps.smooth.search=true"],
            "",
        ),
        "W4A4 static, clusters (32 residual, 8 out, 32 mlp); smooth (searched), gptq, target residual": (
            [*CLUSTERS, "method=smooth_cluster_gptq", "steps.smooth.search=true"],
            "half its row above",
        ),
        "W4A4 static, clusters (32 residual, 8 out, 32 mlp); smooth (alpha 0.5), gptq, target residual": (
            [*CLUSTERS, "method=smooth_cluster_gptq"],
            "half its row above",
        ),
        "W4A4 static, RPTQ's clusters (as many); gptq, target residual": (
            [*CLUSTERS, *RPTQ],
            "half a row above",
        ),
        "W4A4 static, RPTQ's clusters, which the weights' rows have scales for too; gptq, target residual": (
            [*CLUSTERS, *RPTQ, "scheme.weight.granularity=cluster"],
            "half a row above",
        ),
    },
    "w4a4": {
        "W4A4 dynamic per token symmetric; rotate, clip, gptq": (
            ["scheme=w4a4", "scheme.weight.range=mse", *ROTATED],
            "1.5",
        ),
        "W4A4 dynamic per token asymmetric; rotate, clip, gptq": (["scheme=w4a4_asym", *ROTATED], "1.5"),
        "W4A4 dynamic per token asymmetric; rotate learned (cayley), clip, gptq": (
            ["scheme=w4a4_asym", *ROTATED, "steps.rotate.learn=cayley"],
            "1.5",
        ),
        "W4A4 dynamic per token asymmetric; affine, clip, gptq": (["scheme=w4a4_asym", "method=affine_gptq"], "1.5"),
        "W4A4 dynamic per token symmetric; affine, clip, gptq": (
            ["scheme=w4a4", "scheme.weight.range=mse", "method=affine_gptq"],
            "1.5",
        ),
        "W4A4 dynamic g64 asymmetric; affine, clip, gptq": (["scheme=w4a4_g64", "method=affine_gptq"], "1.30"),
        "W4A4 dynamic g64 asymmetric; wush of groups, clip, gptq": (["scheme=w4a4_g64", "method=wush_gptq"], "1.30"),
        "MXFP4 weights and inputs; wush of blocks, gptq": (
            ["scheme=mxfp4_w4a4", "method=wush_gptq", "~steps.clip"],
            "1.45",
        ),
        "NVFP4 weights and inputs; wush of blocks, gptq": (
            ["scheme=nvfp4_w4a4", "method=wush_gptq", "~steps.clip"],
            "1.35",
        ),
    },
    "weights": {
        f"{label}; {method}": ([f"scheme={scheme}", *overrides], "")
        for label, scheme in (("W4A16 g64", "w4a16_g64"), ("W3A16 g64", "w3a16_g64"), ("W2A16 g64", "w2a16_g64"))
        for method, overrides in WEIGHT_METHODS.items()
    },
    "tune": {
        **{
            f"{label}; rotate, gptq, tune": ([f"scheme={scheme}", "method=rotate_gptq_tune", *NARROW], goal)
            for label, scheme, goal in (
                ("W4A16 per channel", "w4a16", "1.10"),
                ("W3A16 g64", "w3a16_g64", "1.22"),
                ("W2A16 g64", "w2a16_g64", "2.5"),
            )
        },
        "Trellis, 2 bits; rotate, gptq, tune": (
            [
                "scheme=w2a16_trellis",
                "method=rotate_gptq_tune",
                "steps.gptq.scales=range",
                "steps.gptq.descent=0",
                "steps.tune.rate=2e-3",
                *NARROW,
            ],
            "1.8",
        ),
        "W4A4 per channel, dynamic per token asymmetric; affine, clip, gptq, tune": (
            [
                "scheme=w4a4_asym",
                "method=affine_gptq",
                "+steps.tune={precision: bfloat16}",
                "calibration.tuning_samples=256",
            ],
            "1.5",
        ),
    },
    "cache": {
        "KV 4 bits: keys by channel of 32 tokens, values by token; 128 recent, 4 first exact": (
            ["scheme=kv4", "method=rtn"],
            "1.01",
        ),
        "KV 4 bits, every token rounded, keys by token too": (
            ["scheme=kv4", "scheme.key.granularity=token", "scheme.cache.tokens=null", *EVERY],
            "",
        ),
        "KV 4 bits, every full group rounded": (["scheme=kv4", *EVERY], ""),
        "KV 2 bits: in groups of 32, least squared error; 128 recent, 4 first exact": (["scheme=kv2"], "1.08"),
        "KV 2 bits, keys before rotary embeddings": (["scheme=kv2", "scheme.cache.before_rope=true"], "1.08"),
        "KV 2 bits, ranges of the values": (["scheme=kv2", "scheme.key.range=minmax", "scheme.value.range=minmax"], ""),
        "W4A4KV4 dynamic per token asymmetric; affine, clip, gptq": (
            ["scheme=w4a4kv4_asym", "method=affine_gptq"],
            "1.03 x W4A4",
        ),
        "W4A4KV4 dynamic per token symmetric; rotate, clip, gptq": (
            ["scheme=w4a4kv4", "scheme.weight.range=mse", *ROTATED],
            "1.03 x W4A4",
        ),
    },
    "prefix": {
        "W8A8 static per tensor; smooth, alpha searched": (["scheme=w8a8_static", *SEARCHED], ""),
        "W8A8 static per tensor; prefix, smooth, alpha searched": (
            ["scheme=w8a8_static", "method=prefix_smooth"],
            "1.015",
        ),
    },
    "formats": {
        "W8A16 per channel": (["scheme=w8a16"], ""),
        "Q8_0, groups of 64": (["scheme=q8_0"], "1.002"),
        "LLM.int8(), threshold 6": (["scheme=llm_int8"], ""),
        "LLM.int8(), threshold 3": (["scheme=llm_int8", "scheme.input.threshold=3"], ""),
        "LLM.int8(), threshold 1": (["scheme=llm_int8", "scheme.input.threshold=1"], "1.005"),
        "LLM.int8(), threshold 6; smooth, alpha searched": (["scheme=llm_int8", *SEARCHED], "1.005"),
        "FP8 E4M3": (["scheme=fp8"], ""),
        "MXFP8": (["scheme=mxfp8"], ""),
        "NF4, blocks of 64": (["scheme=nf4"], ""),
        "NF4, double quantization": (["scheme=nf4_dq"], ""),
        "FP4, blocks of 64": (["scheme=fp4"], ""),
        "MXFP4": (["scheme=mxfp4"], ""),
        "NVFP4": (["scheme=nvfp4"], ""),
        "Trellis, 2 bits; rotate, gptq, target residual, held out, relative": (
            [*TRELLIS, "steps.gptq.held_out=8", "steps.gptq.relative=true"],
            "1.8",
        ),
    },
}


TOKENIZER = pathlib.Path("outputs") / "smol-wt2-tokenizer"
"""Where the tokenizer of the protocol is written to, from the working folder."""


def main() -> None:
    """Runs every row of the tables named on the command line (all without one) and prints them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", choices=[[], *ROWS], help="which tables")
    parser.add_argument("--docs", action="store_true", help="on CPython's documentation: needs no files")
    parser.add_argument("--tokenizer", action="store_true", help=f"write {TOKENIZER} and no more")
    parser.add_argument("--check", action="store_true", help=f"{2 * WINDOWS} windows: the ratio of each half")
    options = parser.parse_args()
    if options.tokenizer or not options.docs:
        write_tokenizer(TOKENIZER)
    if options.tokenizer:
        return
    protocol = ["data=docs"] if options.docs else ["data=smol-wt2", f"model.tokenizer={TOKENIZER}"]
    protocol += [f"evaluation.windows={2 * WINDOWS}"] if options.check else []
    for name in options.tables or ROWS:
        _table(ROWS[name], protocol)


def write_tokenizer(folder: pathlib.Path) -> None:
    """Writes the tokenizer that transformers reads out of SmolLM2's GGUF file into a folder, unless it is there."""
    if folder.is_dir():
        return
    place = locate_model(compose_jobs(locate("smollm2-135m_w8a8"), [])[0].recipe.model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(place.base, gguf_file=place.gguf)

    def fill(temporary: pathlib.Path) -> None:
        tokenizer.save_pretrained(temporary)

    write_folder_atomic(folder, fill)


def ratio_of(metrics: Mapping[str, Any], windows: slice) -> float:
    """Returns the quantized model's perplexity over the baseline's on some of a run's windows."""
    losses: Mapping[str, Sequence[float]] = metrics["window_losses"]
    return math.exp(mean(losses["quantized"][windows]) - mean(losses["baseline"][windows]))


def _table(rows: dict[str, tuple[list[str], str]], protocol: list[str]) -> None:
    lines = []
    halves = (slice(WINDOWS), slice(WINDOWS, None))
    for label, (overrides, goal) in rows.items():
        made = compose_jobs(locate("smollm2-135m_w8a8"), [*protocol, *overrides])[0].recipe
        finished = output_folder(made) / "metrics.json"
        folder: pathlib.Path = finished.parent if finished.is_file() else run(made)
        m = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        ratios = (
            [f"{ratio_of(m, half):.4f} x" for half in halves] if m["windows"] > WINDOWS else [f"{m['ratio']:.4f} x"]
        )
        lines.append(
            f"| {label} | {m['quantized_perplexity']:.3f} | {', then '.join(ratios)} | "
            f"{m['difference']:+.3f} [{m['difference_low']:+.3f}, {m['difference_high']:+.3f}] | {m['kl_mean']:.4f} | "
            f"{m['top1_agreement']:.1%} | {m['size']['bits_per_weight']:.3f} | {goal} |"
        )
    print(f"\nbaseline perplexity {m['baseline_perplexity']:.3f}, {m['windows']} windows, {m['tokens']} targets\n")
    print(
        "| setting | perplexity | ratio | difference, 95% interval | mean KL | top-1 agreement | bits a weight | goal |"
    )
    print("|---|---|---|---|---|---|---|---|")
    print("\n".join(lines))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
