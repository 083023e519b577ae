"""The cost of GPTQ against llm-compressor's: same machine, same weights, same tokens, same settings, one after the other.

    python -m experiments.bench.gptq_speed --llmcompressor /path/to/its/venv/bin/python [--samples 64] [--rounds 1]

llm-compressor lives in an environment of its own (``pip install torch==2.13.0 llmcompressor``); this project does not need it.
Settings: W4A16 asymmetric in groups of 64, min-max grids, damping 0.01, blocks of 128, columns in their own order. Ours runs
twice: true sequential, which is our default (each Linear of a block on what the quantized ones before it give), and all
Linears of a block at once on the inputs that the unquantized block gives them, which is what llm-compressor does. Everything is
timed from the loaded model to the quantized one, calibration included.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from experiments.bench.speed import SMOLLM2
from ptq.calibration.samples import Samples
from ptq.config.schema import ExecutionConfig, ModelConfig, SchemeConfig, TextConfig
from ptq.data.sampling import Draw
from ptq.models.loading import load
from ptq.models.weights import ResidentWeights
from ptq.network.block_stream import BlockStream
from ptq.network.links import trace_links
from ptq.network.network import Block, build_network
from ptq.steps._step import Context, StepPlan
from ptq.steps.solvers.gptq import Options, Step
from quantize.spec.quant_spec import QuantSpec

LENGTH, BATCH = 512, 4
SCHEME = SchemeConfig(weight=QuantSpec(bits=4, granularity="group", group_size=64, symmetric=False))
OTHER = pathlib.Path(__file__).with_name("llmcompressor_gptq.py")


class _Apply:
    """The visitor that quantizes each block before the samples pass through it."""

    def __init__(self, step: Step, context: Context):
        self.step, self.context = step, context

    def enter(self, block: Block) -> None:
        self.step.apply(block, StepPlan(), self.context)

    def leave(self, block: Block) -> None:
        pass


def ours(folder: pathlib.Path, tokens: pathlib.Path, sequential: bool) -> float:
    """Returns the seconds of our GPTQ, links and calibration included."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = load_file(tokens)["ids"]
    start = time.perf_counter()
    network = build_network(model)
    stream = BlockStream(network, ResidentWeights(), torch.device("cpu"))
    step = Step(Options(act_order=False, sequential=sequential))
    samples = Samples(stream, stream.open(ids, BATCH))
    context = Context(network, stream, SCHEME, trace_links(network, stream), samples=samples)
    stream.run([samples.flow], _Apply(step, context))
    return time.perf_counter() - start


def theirs(python: str, folder: pathlib.Path, tokens: pathlib.Path) -> float:
    """Returns the seconds of llm-compressor's oneshot, in its own process and environment."""
    command = [python, str(OTHER), str(folder), str(tokens), str(BATCH)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"llm-compressor failed:\n{done.stderr[-2000:]}")
    return float(json.loads(done.stdout.splitlines()[-1])["seconds"])


def main() -> None:
    """Prints the seconds of both sides and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llmcompressor", required=True, help="python of the environment that llm-compressor is in")
    parser.add_argument("--samples", type=int, default=64, help=f"calibration windows of {LENGTH} tokens")
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder, tokens = pathlib.Path(scratch) / "model", pathlib.Path(scratch) / "tokens.safetensors"
        loaded = load(ModelConfig(SMOLLM2), ExecutionConfig())
        loaded.model.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
        drawn = Draw(TextConfig(split="train"), options.samples, LENGTH).tokens(loaded.tokenizer)
        save_file({"ids": drawn.ids}, tokens)
        del loaded
        rounds = [
            (ours(folder, tokens, True), ours(folder, tokens, False), theirs(options.llmcompressor, folder, tokens))
            for _ in range(options.rounds)
        ]
    for sequential, at_once, other in rounds:
        print(
            f"{options.samples} x {LENGTH} tokens: ours {sequential:.1f} s true sequential, {at_once:.1f} s at once, "
            f"llm-compressor {other:.1f} s"
        )
    for label, side in (("true sequential", 0), ("all Linears of a block at once", 1)):
        print(f"{label}: median ratio {statistics.median(r[side] / r[2] for r in rounds):.3f}")


if __name__ == "__main__":
    main()
