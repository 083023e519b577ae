"""What ``ptq sensitivity`` takes, in plain evaluations of the same tokens: ``python -m experiments.bench.sensitivity [key=value ...]``.

SmolLM2's recipe of 4-bit weights, all Linears, the command's own formats: of rounding to nearest, or with ``--solver`` of what the
recipe's GPTQ makes of the weights. Both are timed in one process, quantizing included; loading is not.
"""

import sys
import time

from ptq.allocation.candidates import candidates
from ptq.allocation.sensitivity import measure, open_forward
from ptq.allocation.sensitivity_run import SAMPLES, with_samples
from ptq.allocation.usual_formats import DEFAULTS
from ptq.cli import catalog
from ptq.cli.compose.hydra_edge import compose_jobs
from ptq.cli.threads import limit_threads
from ptq.evaluation.token_comparison import window_losses
from ptq.network.block_stream import Nothing
from ptq.run.experiment import checked
from ptq.run.record.journal import Journal
from ptq.run.session import open_session


def main(overrides: list[str]) -> None:
    """Prints the seconds of both, and their ratio."""
    limit_threads()
    by_solver = "--solver" in overrides
    overrides = [word for word in overrides if word != "--solver"]
    recipe, steps = checked(compose_jobs(catalog.locate("smollm2-135m_w4a16"), overrides)[0].recipe)
    recipe, solved = with_samples(recipe, SAMPLES, by_solver)
    with open_session(recipe, Journal()) as session:
        formats, _ = candidates(DEFAULTS, recipe.scheme, recipe.export, session.network, True)
        session.traces(False)
        ids, stream = session.calibration_tokens().ids[:SAMPLES], session.stream
        start = time.perf_counter()
        flow = stream.open(ids, recipe.evaluation.batch_size, exact=True)
        stream.run([flow], Nothing())
        with stream.head() as head:
            window_losses(head, flow.hidden, ids, recipe.evaluation.chunk)
        plain = time.perf_counter() - start
        start = time.perf_counter()
        found = measure(session, open_forward(session, steps, solved), formats)
        taken = time.perf_counter() - start
        print(
            f"{len(found.costs)} Linears, {len(formats)} formats, {ids.numel()} tokens: evaluation {plain:.1f} s, "
            f"sensitivity {'by the solver' if solved else 'to nearest'} {taken:.1f} s: {taken / plain:.2f} x"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
