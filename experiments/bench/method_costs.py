"""What methods cost beside plain GPTQ: seconds of quantizing the first blocks of SmolLM2-135M, calibration passes included.

    python -m experiments.bench.method_costs [--blocks 4] [--samples 32] [--rounds 1] [--cpu] [names]

Each method quantizes the same blocks on the same samples of 512 tokens, 4-bit weights in groups of 64 (inputs of 4 bits a token beside them
where a method is for inputs); methods take turns, medians of the rounds. Links are traced once a method and counted.
"""

import argparse
import copy
import statistics
import time

from torch import nn

import ptq
from ptq.cli.catalog import locate
from ptq.cli.compose.hydra_edge import compose_jobs
from ptq.data.sampling import Draw
from ptq.models.loading import load

LENGTH = 512
WEIGHTS, INPUTS = ["scheme=w4a16_g64"], ["scheme=w4a4_asym"]
RESIDUAL = ["steps.gptq.target=residual"]
METHODS: dict[str, list[str]] = {
    "gptq": [*WEIGHTS, "method=gptq"],
    "gptq, target residual": [*WEIGHTS, "method=gptq", *RESIDUAL],
    "gptq as the best recipes have it": [*WEIGHTS, "method=best"],
    "rotate, gptq, target residual": [*WEIGHTS, "method=rotate_gptq", "steps.rotate.online=[]", *RESIDUAL],
    "awq, gptq": [*WEIGHTS, "method=awq_gptq"],
    "hqq": [*WEIGHTS, "method=hqq"],
    "autoround (learned)": [*WEIGHTS, "method=autoround"],
    "omniquant (learned)": [*WEIGHTS, "method=omniquant"],
    "autoround, bfloat16 products": [*WEIGHTS, "method=autoround", "steps.autoround.precision=bfloat16"],
    "omniquant, bfloat16 products": [*WEIGHTS, "method=omniquant", "steps.omniquant.precision=bfloat16"],
    "W4A4: gptq, target residual": [*INPUTS, "method=gptq", *RESIDUAL],
    "W4A4: wush, gptq": [*INPUTS, "method=wush_gptq"],
    "W4A4: affine (learned), clip, gptq": [*INPUTS, "method=affine_gptq"],
}
"""Overrides of the recipe smollm2-135m_w8a8."""


def main() -> None:
    """Prints seconds and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *METHODS], help="which methods; all without one")
    parser.add_argument("--blocks", type=int, default=4, help="how many are quantized")
    parser.add_argument("--samples", type=int, default=32, help=f"calibration samples of {LENGTH} tokens")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument(
        "--cpu", action="store_true", help="count CPU seconds: for a busy machine, with OMP_NUM_THREADS=1"
    )
    asked = parser.parse_args()
    clock = time.process_time if asked.cpu else time.perf_counter
    recipes = {
        name: compose_jobs(locate("smollm2-135m_w8a8"), METHODS[name])[0].recipe for name in asked.names or METHODS
    }
    first = next(iter(recipes.values()))
    loaded = load(first.model, first.execution)
    ids = Draw(first.data.calibration, asked.samples, LENGTH).tokens(loaded.tokenizer).ids
    body = loaded.model.model
    body.layers = nn.ModuleList(list(body.layers)[: asked.blocks])
    seconds: dict[str, list[float]] = {name: [] for name in recipes}
    # What a first call imports is nobody's cost: a few tokens pass before the first measurement.
    ptq.quantize(copy.deepcopy(loaded.model), first.scheme, first.steps, ids[:1, :32], 1)
    for _ in range(asked.rounds):
        for name, recipe in recipes.items():
            model = copy.deepcopy(loaded.model)
            start = clock()
            ptq.quantize(model, recipe.scheme, recipe.steps, ids, recipe.calibration.batch_size)
            seconds[name].append(clock() - start)
    base = next(iter(recipes))
    print(
        f"{asked.blocks} blocks, {asked.samples} x {LENGTH} tokens\n\n| method | seconds | over {base} |\n|---|---|---|"
    )
    for name, times in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(times, seconds[base], strict=True))
        print(f"| {name} | {statistics.median(times):.1f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
