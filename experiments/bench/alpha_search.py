"""What a search of SmoothQuant's alpha costs beside the statistics pass, and what its sample of tokens and outputs misses.

    python -m experiments.bench.alpha_search [--config RECIPE] [--whole] [overrides]

Both are of the recipe's calibration samples on its model; seconds are the process's CPU time. With ``--whole`` every candidate is
measured on all tokens that the search keeps and on all outputs as well: how many links choose alike, and by how much the error,
measured on all, of what is chosen is above the least: its mean over links, and the greatest.
"""

import argparse
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from ptq.calibration.statistics import ChannelStatistics
from ptq.cli.catalog import locate
from ptq.cli.compose.hydra_edge import compose_jobs
from ptq.cli.threads import limit_threads
from ptq.run.planning import context_of
from ptq.run.record.journal import Journal
from ptq.run.session import open_session
from ptq.run.statistics_pass import take_statistics
from ptq.steps._registry import build_steps
from ptq.steps._step import Context
from ptq.steps.transforms import smooth
from quantize.spec.quant_spec import QuantSpec

ALL = 1 << 40
T = TypeVar("T")


@dataclass(frozen=True)
class Both:
    """Measures candidates as the search does, and on all tokens and outputs; `errors` takes up both."""

    sampled: smooth.Trial
    whole: smooth.Trial
    errors: list[tuple[float, float]]

    def error(self, scale: torch.Tensor) -> float:
        """Returns the search's error."""
        self.errors.append((self.sampled.error(scale), self.whole.error(scale)))
        return self.errors[-1][0]


class Measured(smooth.Formula):
    """Plans as `smooth` does; `measured` has the errors of each link's candidates, the search's and those on all."""

    def __init__(self, options: smooth.Options, context: Context):
        super().__init__(options, context)
        self.measured: list[list[tuple[float, float]]] = []

    def trial(
        self,
        rows: torch.Tensor,
        readers: Sequence[torch.Tensor],
        weight: QuantSpec | None,
        input: QuantSpec | None,
        statistics: ChannelStatistics,
    ) -> Any:
        """Returns both ways of measuring."""
        sampled, whole = (smooth.Trial.of(rows, readers, weight, input, statistics, *n) for n in ((), (ALL, ALL)))
        self.measured.append([])
        return Both(sampled, whole, self.measured[-1])


def in_cpu_seconds(action: Callable[[], T]) -> tuple[T, float]:
    """Returns what `action` returns, and the CPU seconds of this process that it takes."""
    begun = time.process_time()
    return action(), time.process_time() - begun


def least(errors: Sequence[tuple[float, float]], side: int) -> int:
    """Returns the candidate whose error on this side is the least."""
    return min(range(len(errors)), key=lambda i: errors[i][side])


def main() -> None:
    """Prints the seconds of both and their ratio, or what the sample misses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="smollm2-135m_w8a8", help="a recipe's name, or a path")
    parser.add_argument("--whole", action="store_true", help="measure on all tokens and outputs too")
    parser.add_argument("overrides", nargs="*", help="as of main.py")
    asked = parser.parse_args()
    limit_threads()
    words = ["method=smooth", "steps.smooth.search=true", *asked.overrides]
    [job] = compose_jobs(locate(asked.config), words)
    steps = build_steps({"smooth": job.recipe.steps["smooth"]})
    with open_session(job.recipe, Journal()) as session:
        tokens = session.calibration_tokens()
        network, stream = session.network, session.stream
        context = context_of(network, stream, job.recipe.scheme, steps, lambda line: None, session.traces)
        statistics, taking = in_cpu_seconds(lambda: take_statistics(session, tokens, {}))
        context.statistics, context.ids = statistics, tokens.ids
        context.batch_size = job.recipe.calibration.batch_size
        planning = (Measured if asked.whole else smooth.Formula)(steps["smooth"].options, context)
        _, searching = in_cpu_seconds(lambda: smooth.search(planning, "smooth"))
    if isinstance(planning, Measured):
        chosen = [(least(errors, 0), least(errors, 1)) for errors in planning.measured]
        above = [
            errors[mine][1] / errors[best][1] - 1
            for errors, (mine, best) in zip(planning.measured, chosen, strict=True)
        ]
        counts = Counter(abs(mine - best) for mine, best in chosen)
        print(f"{counts[0]} of {len(chosen)} links choose alike, {counts[1]} the next candidate")
        print(f"error of what is chosen above the least: mean {sum(above) / len(above):.2%}, greatest {max(above):.2%}")
        return
    samples, length = tokens.ids.shape
    print(
        f"statistics pass of {samples} x {length} tokens: {taking:.1f} s; search of alpha: {searching:.1f} s = {searching / taking:.2f} x"
    )


if __name__ == "__main__":
    main()
