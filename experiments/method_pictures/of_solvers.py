"""Pictures of the solvers: how each picks a weight's codes and ranges."""

from dataclasses import replace

import torch

from experiments.method_pictures.canvas import (
    BLUE,
    DARK,
    GREEN,
    ORANGE,
    PALE,
    RED,
    Drawn,
    label,
    legend,
    panels,
    percents,
    plain_logs,
)
from experiments.method_pictures.material import BLOCK, GROUP, ROW, Material
from quantize.grid.affine import Grid, dequantize, fake_quantize, grouped
from quantize.grid.ranges import weight_grid
from quantize.solvers.gptq import GptqOptions, solve
from quantize.solvers.hqq import NORM, hqq_grid
from quantize.solvers.lowrank import low_rank_factors

LEARNED_STEPS = 60
"""Steps of the learned solvers: fewer than their own default, for time."""
RANKS = (4, 8, 16, 32, 64, 128)
SHOWN = 64
"""Weights of a row that are drawn one by one."""
BINS = 10


def rtn(material: Material) -> Drawn:
    """Some weights of a row, their grid, and what rounding moves: with one range for the row, and one a group."""
    read = material.reads["gate, up"]
    spread = read.weight.abs().amax(1) / read.weight.std(1)
    row = read.weight[int(spread.argsort()[len(spread) // 2])][None]
    whole, own = (weight_grid(row, replace(spec, bits=3)) for spec in (ROW, GROUP))
    group = int(own.scale.flatten().argsort()[own.scale.numel() // 2])
    part = slice(group * SHOWN, (group + 1) * SHOWN)
    figure, axes = panels(f"rtn: {SHOWN} weights of one row of gate or up, block {BLOCK}, 3 bits", sharey=True)
    lines = []
    for axis, grid, words in (
        (axes[0], whole, "one range for the row"),
        (axes[1], _only(own, group), f"a range for these {SHOWN} weights"),
    ):
        before = row[0, part]
        after = fake_quantize(before, _only(grid, 0))
        for level in _levels(grid):
            axis.axhline(level, color=PALE, linewidth=0.8, zorder=0)
        axis.vlines(
            range(part.start, part.stop),
            before.tolist(),
            after.tolist(),
            color=RED,
            linewidth=1.6,
            label="moved by rounding",
        )
        axis.plot(range(part.start, part.stop), before.tolist(), "o", color=DARK, markersize=3, label="weight")
        axis.grid(False)
        error, step = float((after - before).square().mean().sqrt()), float(grid.scale.flatten()[0])
        label(axis, f"{words}: steps of {step:.3f}", "input channel", "weight" if axis is axes[0] else "")
        lines.append(f"{words}: step {step:.4f}, root mean square error of the {SHOWN} weights {error:.4f}")
    low, high = float(row[0, part].min()), float(row[0, part].max())
    axes[0].set_ylim(low - 0.1 * (high - low), high + 0.1 * (high - low))
    axes[0].plot([], [], color=PALE, label="grid")
    legend(figure, axes[0])
    return Drawn(figure, lines)


def hqq(material: Material) -> Drawn:
    """Histogram of a row, with the grid from minimum to maximum and HQQ's."""
    read = material.reads["gate, up"]
    rounded = [fake_quantize(read.weight, grid(read.weight, ROW)) for grid in (weight_grid, hqq_grid)]
    norms = [(w - read.weight).abs().pow(NORM).mean(1) for w in rounded]
    at = int((norms[1] / norms[0]).argmin())
    row = read.weight[at][None]
    title = f"hqq: the weights of the row of gate or up in block {BLOCK} that gains most, 4 bits"
    figure, axes = panels(title, sharey=True, sharex=True)
    lines = [f"mean |error|^{NORM:g} of all rows falls by {1 - float(norms[1].mean() / norms[0].mean()):.1%}"]
    for axis, grid, words in (
        (axes[0], weight_grid(row, ROW), "minimum to maximum"),
        (axes[1], hqq_grid(row, ROW), "HQQ's range"),
    ):
        off = (fake_quantize(row, grid) - row).abs()
        axis.hist(row[0].tolist(), bins=80, color=PALE, log=True)
        for level in _levels(grid):
            axis.axvline(level, color=RED, linewidth=1.0)
        norm, square = float(off.pow(NORM).mean()), float(off.square().mean().sqrt())
        label(
            axis, f"{words}: mean $|$error$|^{{{NORM:g}}}$ = {norm:.3f}", "weight", "weights" if axis is axes[0] else ""
        )
        lines.append(
            f"{words}: mean |error|^{NORM:g} {norm:.4f}, root mean square {square:.4f}, greatest {float(off.max()):.4f}"
        )
    axes[0].plot([], [], color=RED, label="what codes stand for")
    axes[0].bar([0], [0], color=PALE, label="weights of the row")
    plain_logs(axes[0])
    legend(figure, axes[0])
    return Drawn(figure, lines)


def gptq(material: Material) -> Drawn:
    """Row by row: GPTQ's weights are further from the original than rounded ones, and its outputs nearer."""
    read = material.reads["q, k, v"]
    rounded = fake_quantize(read.weight, weight_grid(read.weight, ROW))
    solution = solve(read.weight, read.hessian, ROW, GptqOptions())
    solved = dequantize(grouped(solution.codes, ROW), solution.grid).reshape(read.weight.shape)
    energy = read.weight.square().sum(1)
    of_weight = [(w - read.weight).square().sum(1) / energy for w in (rounded, solved)]
    of_output = [read.output_error(w, by=0) for w in (rounded, solved)]
    figure, axes = panels(f"gptq: each row of q, k and v of block {BLOCK}, 4 bits, one range a row")
    lines = []
    for axis, (nearest, found), words in ((axes[0], of_weight, "weights"), (axes[1], of_output, "outputs")):
        axis.plot(nearest.tolist(), found.tolist(), "o", color=BLUE, markersize=2.5, alpha=0.6, markeredgewidth=0)
        ends = [float(torch.cat([nearest, found]).min()) / 1.2, float(torch.cat([nearest, found]).max()) * 1.2]
        axis.plot(ends, ends, color="0.4", linewidth=0.8)
        axis.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
        percents(axis, "x")
        percents(axis)
        share = float((found < nearest).float().mean())
        label(axis, f"squared error of the {words}", "rounded to nearest", "GPTQ")
        lines.append(
            f"{words}: mean error {float(nearest.mean()):.3%} by RTN, {float(found.mean()):.3%} by GPTQ; less in {share:.1%} of the rows"
        )
    return Drawn(figure, lines)


def autoround(material: Material) -> Drawn:
    """How often a weight is rounded away from its nearest point, by how near the middle it lies."""
    spec, count, turned = ROW, torch.zeros(BINS), torch.zeros(BINS)
    with material.solved("autoround", {"steps": LEARNED_STEPS}, spec) as (linears, _):
        for read in material.reads.values():
            rows = torch.cat([linears[name].scale for name in read.names])
            zeros = torch.cat([linears[name].zero_point for name in read.names])  # type: ignore[misc]
            codes = torch.cat([linears[name].codes for name in read.names]).float()
            place = read.weight / rows + zeros
            inside = (place > 0) & (place < 2**spec.bits - 1)
            off = (place - place.round()).abs()[inside]
            bins = (off * 2 * BINS).long().clamp(max=BINS - 1)
            other = (codes != place.round())[inside]
            count += torch.bincount(bins, minlength=BINS)
            turned += torch.bincount(bins[other], minlength=BINS)
    figure, [axis] = panels(f"autoround: all weights of block {BLOCK}, 4 bits, {LEARNED_STEPS} steps", 1)
    share = turned / count
    axis.bar([(i + 0.5) / (2 * BINS) for i in range(BINS)], share.tolist(), width=0.9 / (2 * BINS), color=BLUE)
    percents(axis)
    axis.set_xlim(0, 0.5)
    label(
        axis,
        "",
        "distance to the nearest point of the grid, in steps (0.5: half way between two)",
        "rounded to the other point",
    )
    lines = [f"rounded the other way: {float(turned.sum() / count.sum()):.2%} of all weights"]
    return Drawn(figure, [*lines, f"of those at {1 - 1 / BINS:.0%} or more of half a step: {float(share[-1]):.1%}"])


def omniquant(material: Material) -> Drawn:
    """The share of its range that each row keeps, and the scale of each channel behind a norm."""
    figure, axes = panels(
        f"omniquant: what was learned in block {BLOCK}, 4 bits, one range a row, {LEARNED_STEPS} steps"
    )
    lines = []
    with material.solved("omniquant", {"steps": LEARNED_STEPS}, ROW) as (linears, scales):
        for colour, read in zip((BLUE, RED, GREEN, ORANGE), material.reads.values(), strict=True):
            scale = scales.get(read.names[0])
            weight = read.weight if scale is None else read.weight * scale
            plain = weight_grid(weight, ROW).scale.flatten()
            kept = (torch.cat([linears[name].scale for name in read.names]).flatten() / plain).sort().values
            axes[0].plot(torch.linspace(0, 1, len(kept)).tolist(), kept.tolist(), color=colour, label=read.label)
            lines.append(
                f"{read.label}: rows keep {float(kept.min()):.3f} to {float(kept.max()):.3f} of their range, median {float(kept.median()):.3f}"
            )
            if scale is not None:
                axes[1].hist(scale.tolist(), bins=40, histtype="step", color=colour, label=read.label)
                lines.append(f"{read.label}: scales of channels {float(scale.min()):.3f} to {float(scale.max()):.3f}")
    percents(axes[0], "x")
    percents(axes[0])
    label(axes[0], "learned range over minimum to maximum", "rows, ascending", "share kept")
    label(axes[1], "scale between a norm and its readers", "columns of the readers times", "channels")
    legend(figure, *axes)
    return Drawn(figure, lines)


def lowrank(material: Material) -> Drawn:
    """Singular values of what rounding loses, as it is and weighed by the Hessian; and the output error over the rank."""
    read, spec = material.reads["o"], replace(ROW, bits=3)
    rounded = fake_quantize(read.weight, weight_grid(read.weight, spec))
    lost, plain = read.weight - rounded, torch.eye(read.weight.shape[1])
    damped = read.hessian.double() + 0.01 * read.hessian.diagonal().mean() * plain.double()
    figure, axes = panels(f"lowrank: what rounding o of block {BLOCK} to 3 bits loses")
    lines = []
    none = float(read.output_error(rounded))
    cases = (
        ("as it is", plain, lost.double(), RED),
        ("weighed by the inputs", read.hessian, lost.double() @ torch.linalg.cholesky(damped), BLUE),
    )
    for words, hessian, matrix, colour in cases:
        energy = torch.linalg.svdvals(matrix).square()
        share = (energy.cumsum(0) / energy.sum()).tolist()
        axes[0].plot(range(1, len(share) + 1), share, color=colour, label=words)
        errors = [float(read.output_error(rounded + low_rank_factors(lost, hessian, rank).product())) for rank in RANKS]
        axes[1].plot(RANKS, errors, color=colour, marker="o", markersize=3, label=words)
        lines.append(
            f"{words}: first 16 singular values hold {share[15]:.1%}; output error {errors[RANKS.index(16)]:.2%} at rank 16, {none:.2%} without"
        )
    axes[1].axhline(none, color="0.4", linewidth=0.8, linestyle=":", label="no correction")
    axes[1].set_ylim(bottom=0)
    for axis in axes:
        axis.set_xscale("log", base=2)
        percents(axis)
    every = [1, 2, *RANKS, 256]
    axes[0].set_xticks(every, [str(rank) for rank in every])
    axes[1].set_xticks(RANKS, [str(rank) for rank in RANKS])
    label(axes[0], "energy in the greatest singular values", "singular values", "share of the energy")
    label(
        axes[1], "output error with the best correction of a rank", "rank of the correction", "of the outputs' energy"
    )
    legend(figure, *axes)
    return Drawn(figure, lines)


def _only(grid: Grid, group: int) -> Grid:
    """Returns the grid of one of the groups of a row, or of the row."""
    zero = None if grid.zero_point is None else grid.zero_point.flatten()[group].reshape(1)
    return Grid(grid.scale.flatten()[group].reshape(1), zero, grid.low, grid.high)


def _levels(grid: Grid) -> list[float]:
    """Returns the points of a grid of one scale."""
    points: list[float] = dequantize(torch.arange(grid.low, grid.high + 1), _only(grid, 0)).tolist()
    return points
