"""What the fast Hadamard transform gains over the product with its explicit matrix on this machine's CPU.

    python -m experiments.bench.hadamard [--rounds 9] [--rows 512]

float32; all in turn in one process, each figure the least of the rounds. `butterflies` is the textbook transform: a pass of sums
and differences for each power of two, one product for the other factor.
"""

import argparse
import math
import time
from functools import partial

import torch

from quantize.kernels.matmul import product
from quantize.transforms.hadamard import factorise, hadamard_matrix, hadamard_transform, stages

WIDTHS = (576, 1536, 2048, 4096, 11008)


def butterflies(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Returns `x` (rows, n) times the orthogonal Kronecker product of Sylvester's matrix and `factor` (m, m)."""
    size = len(factor)
    y = x.reshape(-1, size) @ factor if size > 1 else x
    width = x.shape[-1]
    half = size
    while half < width:
        a, b = y.reshape(-1, 2, half).unbind(1)
        y = torch.stack((a + b, a - b), 1)
        half *= 2
    return y.reshape(x.shape) * math.sqrt(size / width)


def main() -> None:
    """Prints a row for each number of threads and width."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--rows", type=int, default=512)
    options = parser.parse_args()
    print(
        f"{'threads':>7} {'width':>6} {'factors':>14} {'fast':>9} {'butterflies':>12} {'explicit':>10} {'fast is':>10}"
    )
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for width in WIDTHS:
            found = factorise(width)
            x = torch.randn(options.rows, width)
            matrix = hadamard_matrix(width, dtype=torch.float32)
            factor = hadamard_matrix(found.order, dtype=torch.float32)
            sides = {
                "fast": partial(hadamard_transform, x),
                "butterflies": partial(butterflies, x, factor),
                "explicit": partial(product, x, matrix),
            }
            best = dict.fromkeys(sides, math.inf)
            for _ in range(options.rounds):
                for name, side in sides.items():
                    start = time.perf_counter()
                    result = side()
                    best[name] = min(best[name], time.perf_counter() - start)
                    torch.testing.assert_close(result, sides["fast"](), rtol=1e-3, atol=1e-3)
            ms = {name: 1e3 * seconds for name, seconds in best.items()}
            print(
                f"{threads:7} {width:6} {'x'.join(map(str, stages(found))):>14} {ms['fast']:6.2f} ms {ms['butterflies']:9.2f} ms "
                f"{ms['explicit']:7.1f} ms {ms['explicit'] / ms['fast']:6.1f} x",
                flush=True,
            )


if __name__ == "__main__":
    main()
