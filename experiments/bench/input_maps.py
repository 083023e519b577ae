"""What 4-bit weights and inputs leave at the outputs of one block's Linears, behind each map of their inputs: SmolLM2-135M.

    python -m experiments.bench.input_maps --block 14

Tokens of the calibration text give maps, clip ratios and GPTQ's Hessians; the error is on tokens of a later part of that text, in percent of
the output's energy. Weights per channel, symmetric; inputs per token, with zero points.
"""

import argparse
import contextlib
import pathlib
import tempfile
from collections.abc import Iterator
from dataclasses import replace

import torch

from ptq.calibration.samples import Samples
from ptq.cli.catalog import locate
from ptq.cli.compose.hydra_edge import compose_jobs
from ptq.data.sources import read_text
from ptq.network.network import Block, weight_of
from ptq.run.record.journal import Journal
from ptq.run.session import open_session
from quantize.grid.affine import dequantize, grouped
from quantize.modules.online_maps import OnlineBlocks, OnlineKronecker
from quantize.modules.simulated import fake_quantize_dynamic
from quantize.solvers.clip import input_clip_ratio
from quantize.solvers.gptq import GptqOptions, Hessian, solve
from quantize.spec.quant_spec import QuantSpec
from quantize.transforms.affine import affine_from_moments, affine_from_scale, cost_of, learned_affine
from quantize.transforms.hadamard import hadamard_matrix
from quantize.transforms.rounding_cost import RoundingCost
from quantize.transforms.smooth import smoothing_scale
from quantize.transforms.wush import wush

LENGTH = 512
WEIGHT = QuantSpec(4, range="mse")
INPUT = QuantSpec(4, granularity="token", symmetric=False, dynamic=True)
READERS = {
    "q, k, v": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate, up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}


OnlineMap = OnlineBlocks | OnlineKronecker


class _Seen:
    """A visitor that keeps what one block's Linears read, and their weights."""

    def __init__(self, samples: Samples, number: int):
        self.samples, self.number = samples, number
        self.found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def enter(self, block: Block) -> None:
        """Lets the samples pass through the block that is asked for."""
        if block.index != self.number:
            return
        names = {link: [n for n in block.linears if n.endswith(ends)] for link, ends in READERS.items()}
        rows: dict[str, list[torch.Tensor]] = {link: [] for link in names}
        keep = {
            n[0]: (lambda x, tokens, link=link: rows[link].append(x.flatten(0, -2).clone()))
            for link, n in names.items()
        }
        self.samples.feed(block, keep)
        for link, of in names.items():
            self.found[link] = torch.cat(rows[link]), torch.cat([weight_of(block.linears[n]).float() for n in of])
        raise StopIteration

    def leave(self, block: Block) -> None:
        """Does nothing."""


def read(number: int, calibration: int, held_out: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Returns (tokens, in) and (out, in) of each of `READERS`; the last `held_out` samples' tokens are from later text."""
    [job] = compose_jobs(locate("smollm2-135m_w8a8"), ["data=smol-wt2"])
    with (
        tempfile.TemporaryDirectory() as folder,
        open_session(job.recipe, Journal(pathlib.Path(folder) / "log")) as session,
    ):
        text = read_text(job.recipe.data.calibration, "data.calibration").joined
        half = len(text) // 2
        parts = [(text[:half], calibration), (text[half:], held_out)]
        ids = [
            torch.tensor(
                session.loaded.tokenizer(part[: 8 * n * LENGTH], add_special_tokens=False).input_ids[: n * LENGTH]
            )
            for part, n in parts
        ]
        flow = session.stream.open(torch.cat(ids).view(-1, LENGTH), 4)
        seen = _Seen(Samples(session.stream, flow), number)
        with contextlib.suppress(StopIteration):
            session.stream.run([flow], seen, "links")
        return seen.found


@torch.no_grad()
def maps(x: torch.Tensor, weight: torch.Tensor) -> Iterator[tuple[str, OnlineMap | None]]:
    """Yields the name of each map, and the map."""
    width, hessian, gram = x.shape[1], x.t() @ x / len(x), weight.t() @ weight
    cost = RoundingCost.of(x[:: max(1, x.numel() >> 18)], hessian, weight, INPUT, WEIGHT)
    yield "none", None
    yield "Hadamard", OnlineBlocks(hadamard_matrix(width)[None])
    scale = smoothing_scale(cost.rows.abs().amax(0), weight.abs().amax(0), 0.5)
    starts = [affine_from_scale(scale, "hadamard")]
    starts += [affine_from_moments(hessian, gram, scale, damping=damping)[0] for damping in (0.1, 1.0)]
    start = min(starts, key=lambda a: float(cost_of(a, cost)))
    for name, steps in (("affine, not learned", 0), ("affine, 40 steps", 40)):
        learned = learned_affine(start, cost, steps)[0]
        yield name, OnlineKronecker(learned.left, learned.right, learned.diagonal)
    for name, block in (("wush, blocks of 64", 64), ("wush, all channels", None)):
        yield name, OnlineBlocks(wush(hessian, gram, block, damping=0.01).unit_volume())


@torch.no_grad()
def errors(x: torch.Tensor, kept: torch.Tensor, weight: torch.Tensor, made: OnlineMap | None) -> tuple[float, float]:
    """Returns the error of rounded inputs alone and with weights solved by GPTQ, in percent of the energy of held-out outputs."""
    mapped, held, reads = (x, kept, weight) if made is None else (made(x), made(kept), made.inverse_weight(weight))
    ratio, _ = input_clip_ratio([reads], mapped[::8], lambda y, r: fake_quantize_dynamic(y, replace(INPUT, clip=r)))
    spec = replace(INPUT, clip=ratio)
    rounded, moments = fake_quantize_dynamic(held, spec), Hessian(x.shape[1])
    moments.update(fake_quantize_dynamic(mapped, spec))
    solved = solve(reads, moments.matrix, WEIGHT, GptqOptions(scales="pivots"))
    codes = dequantize(grouped(solved.codes, WEIGHT), solved.grid).reshape(reads.shape)
    wanted = kept @ weight.t()
    found = [float((rounded @ w.t() - wanted).square().sum() / wanted.square().sum()) for w in (reads, codes)]
    return 100 * found[0], 100 * found[1]


def main() -> None:
    """Prints a table: a line a map, two figures a link."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--block", type=int, default=14, help="which block")
    parser.add_argument("--samples", type=int, default=12, help=f"calibration samples of {LENGTH} tokens")
    parser.add_argument("--held-out", type=int, default=4, help="samples that the error is taken on")
    parser.add_argument("--links", nargs="*", default=list(READERS), choices=list(READERS), help="which links")
    asked = parser.parse_args()
    seen = read(asked.block, asked.samples, asked.held_out)
    cells: dict[str, list[str]] = {}
    for link in asked.links:
        rows, weight = seen[link]
        x, kept = rows.float().split([asked.samples * LENGTH, asked.held_out * LENGTH])
        for name, made in maps(x, weight):
            alone, both = errors(x, kept, weight, made)
            cells.setdefault(name, []).append(f"{alone:.3f} / {both:.3f}")
    print(f"| map (inputs alone / with GPTQ's weights) | {' | '.join(asked.links)} |")
    print("|---|" + "---|" * len(asked.links))
    for name, found in cells.items():
        print(f"| {name} | {' | '.join(found)} |")


if __name__ == "__main__":
    main()
