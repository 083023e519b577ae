"""Where the time of one small W8A8 Linear goes, beside torch's dynamic qint8.

    OMP_NUM_THREADS=1 python -m experiments.bench.one_linear [--rows 1 16 128] [--shapes 576x576 3072x576 576x1536]

Microseconds a call, the least of several rounds in which all take turns, by the process's own clock, so that what else the machine does
counts little: quantizing the activation, each kernel's product of its codes, the packed Linear as a model calls it by each, and torch's
module. Each has so many Linears, one after another, that their weights are not in the second cache, as in a model's pass.
"""

import argparse
import itertools
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from quantize.kernels.base import IntegerWeight, integer_rows, registered
from quantize.kernels.choice import Choice
from quantize.modules.packed import PackedLinear
from quantize.spec.quant_spec import QuantSpec

WEIGHT, INPUT = QuantSpec(bits=8), QuantSpec(bits=8, granularity="token", dynamic=True)
BYTES = 8 << 20
"""Of the weights of one shape together."""
SECONDS = 0.003
"""How long a part is called again and again, in each round."""


def by_torch(weight: torch.Tensor) -> torch.nn.Module:
    """Returns torch's dynamically quantized Linear of `weight` (out, in)."""
    plain = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    plain.weight.data = weight
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.ao.quantization import quantize_dynamic

        made: torch.nn.Module = quantize_dynamic(torch.nn.Sequential(plain), {torch.nn.Linear}, dtype=torch.qint8)
    return next(made.children())


def parts(rows: int, out: int, columns: int) -> dict[str, Callable[[], object]]:
    """Returns what is timed for `rows` rows and weights (out, columns), by name."""
    x, count = torch.randn(rows, columns), max(1, BYTES // (out * columns))
    weights = [torch.randn(out, columns) for _ in range(count)]
    able = {name: k for name, k in registered().items() if k.refusal(WEIGHT, INPUT, (out, columns), x.device) is None}
    taken = integer_rows(x, INPUT, None)
    works: dict[str, Callable[[], object]] = {"quantizing": lambda: integer_rows(x.clone(), INPUT, None)}
    for name, kernel in able.items():
        works[name] = _in_turn([kernel.prepare(_integers(w)) for w in weights], lambda: taken)
    for name in able:
        linears = [PackedLinear.from_weight(w, None, WEIGHT, INPUT) for w in weights]
        for linear in linears:
            linear.use_kernels(Choice(name))
            linear(x)  # packs its weight
        works[f"Linear, {name}"] = _in_turn(linears, x.clone)
    return {**works, "torch qint8": _in_turn([by_torch(w) for w in weights], x.clone)}


def _in_turn(works: Sequence[Callable[[Any], object]], given: Callable[[], object]) -> Callable[[], object]:
    """Returns a call of the next of `works`, with what `given` makes."""
    turn = itertools.cycle(works)
    return lambda: next(turn)(given())


def _integers(weight: torch.Tensor) -> IntegerWeight:
    scale = weight.abs().amax(1, keepdim=True) / 127
    return IntegerWeight((weight / scale).round().to(torch.int8), scale, None)


def least_microseconds(works: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Returns the least time of a call of each, over rounds in which they take turns."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(1 + rounds):
        for name, work in works.items():
            start, calls = time.process_time(), 0
            while calls < 3 or time.process_time() - start < SECONDS:
                work()
                calls += 1
            times[name].append(1e6 * (time.process_time() - start) / calls)
    return {name: min(found[1:]) for name, found in times.items()}


@torch.no_grad()
def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 128])
    parser.add_argument("--shapes", nargs="+", default=["576x576", "3072x576", "576x1536"], metavar="OUTxIN")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    head: list[str] = []
    for rows in options.rows:
        for shape in options.shapes:
            out, columns = map(int, shape.split("x"))
            found = least_microseconds(parts(rows, out, columns), options.rounds)
            if not head:
                head = ["rows", "shape", *found]
                print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
            print(f"| {rows} | {shape} | " + " | ".join(f"{t:.1f}" for t in found.values()) + " |", flush=True)


if __name__ == "__main__":
    main()
