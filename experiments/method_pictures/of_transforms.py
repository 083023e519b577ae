"""Pictures of the transforms: what each does to channels, to tokens and to the output's error before anything is quantized."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from matplotlib.axes import Axes

from experiments.method_pictures.canvas import (
    BLUE,
    DARK,
    GREEN,
    ORANGE,
    PALE,
    PINK,
    RED,
    SKY,
    Drawn,
    label,
    legend,
    panels,
    percents,
    plain_logs,
)
from experiments.method_pictures.material import BLOCK, GROUP, TOKEN, Material, Read
from group_methods.kmeans import ChannelRange, max_std_features
from group_methods.kmeans import cluster as clusters_of
from group_methods.reorder import expand, order_of, ranges_of
from ptq.network.norms import gain_offset
from quantize.codecs.registry import codec_of
from quantize.grid.affine import fake_quantize
from quantize.grid.ranges import static_grid
from quantize.modules.online_maps import OnlineBlocks, OnlineKronecker
from quantize.modules.simulated import fake_quantize_dynamic
from quantize.solvers.awq import RATIOS, awq_scale
from quantize.solvers.clip import INPUT_RATIOS, input_clip_ratio
from quantize.spec.quant_spec import QuantSpec
from quantize.transforms.affine import affine_from_moments, affine_from_scale, cost_of, learned_affine
from quantize.transforms.hadamard import hadamard_matrix, random_signs
from quantize.transforms.residual import fold_gain, rotate_reader
from quantize.transforms.rounding_cost import RoundingCost
from quantize.transforms.smooth import smoothing_scale
from quantize.transforms.wush import wush as moments_alike

ALPHA = 0.5
CLUSTERS = 8
DAMPING = 0.01
STATIC = QuantSpec(4, granularity="tensor", symmetric=False)
"""Inputs with one static range."""
SIGNS = 0
"""Seed of a Hadamard matrix's signs."""
NONE, HADAMARD, BEGUN, LEARNED, FULL, BLOCKS = (
    "no map", "Hadamard", "affine, where it begins", "affine, learned", "WUSH", "WUSH in blocks of 64",
)  # fmt: skip
COLOUR = {NONE: RED, HADAMARD: GREEN, BEGUN: PINK, LEARNED: BLUE, FULL: ORANGE, BLOCKS: SKY}
"""Of each map, wherever it is drawn."""
OnlineMap = OnlineBlocks | OnlineKronecker
MEASURED = 1 << 18
"""Numbers of an input on which the cost of rounding is measured, about."""


def smooth(material: Material) -> Drawn:
    """Greatest magnitude of each channel of an input and of the columns that read it, before and after."""
    read = material.reads["q, k, v"]
    inputs, columns = read.x.abs().amax(0), read.weight.abs().amax(0)
    scale = smoothing_scale(inputs, columns, ALPHA)
    order = inputs.argsort(descending=True)
    figure, axes = panels(f"smooth: channels of the input of q, k and v in block {BLOCK}, alpha {ALPHA:g}", sharey=True)
    lines = []
    for axis, words, x, w in (
        (axes[0], "before", inputs, columns),
        (axes[1], "after", inputs / scale, columns * scale),
    ):
        axis.plot(w[order].tolist(), "o", color=RED, markersize=4, markeredgewidth=0, label="column of the weights")
        axis.plot(x[order].tolist(), "o", color=BLUE, markersize=2, markeredgewidth=0, label="channel of the input")
        ratio = float(x.max() / x.median()), float(w.max() / w.median())
        label(
            axis,
            f"{words}: greatest input {ratio[0]:.1f} x the median",
            "channels, by their input",
            "greatest magnitude" if axis is axes[0] else "",
        )
        lines.append(
            f"{words}: greatest channel over the median {ratio[0]:.2f} of the input, {ratio[1]:.2f} of the columns"
        )
    axes[0].set_yscale("log")
    plain_logs(axes[0])
    legend(figure, axes[0])
    return Drawn(figure, lines)


def awq(material: Material) -> Drawn:
    """What each channel adds to the output's error without and with the scale, and the error over the exponent."""
    figure, axes = panels(f"awq: weights of block {BLOCK} rounded to 4 bits in groups of {GROUP.group_size}")
    lines = []

    def rounded(weight: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
        return codec_of(GROUP).fake_weight(weight, GROUP)

    found = {}
    for read, colour in zip(material.reads.values(), (BLUE, RED, GREEN, ORANGE), strict=True):
        mean = read.x.abs().mean(0)
        found[read.label] = awq_scale(mean, [read.weight], read.hessian, rounded)
        errors, ratio = found[read.label].errors, found[read.label].ratio
        best = min(errors)
        _searched(axes[1], RATIOS, errors, ratio, read.label, colour)
        lines.append(f"{read.label}: exponent {ratio:g}, error {errors[0]:.3%} without, {best:.3%} with the scale")
    read = material.reads["q, k, v"]
    chosen, mean = found[read.label], read.x.abs().mean(0)
    for words, scale, colour in (("no scale", torch.ones_like(mean), RED), ("AWQ's scale", chosen.scale, BLUE)):
        off = rounded(read.weight * scale, read.hessian) / scale - read.weight
        axes[0].plot(mean.tolist(), off.square().mean(0).sqrt().tolist(), ".", color=colour, markersize=3, label=words)
    axes[0].set(xscale="log", yscale="log")
    plain_logs(axes[0], "x")
    plain_logs(axes[0])
    axes[1].set_yscale("log")
    percents(axes[1])
    label(
        axes[0],
        "q, k, v: error of the weights, column by column",
        "mean magnitude of the input's channel",
        "root mean square error",
    )
    label(
        axes[1],
        "output error over the exponent, chosen: dot",
        "exponent of the mean magnitude",
        "of the outputs' energy",
    )
    legend(figure, *axes)
    return Drawn(figure, lines)


def rotate(material: Material) -> Drawn:
    """Ranges of the channels that norms write, before and after the residual stream is turned."""
    read = material.reads["q, k, v"]
    links = material.session.traces(False)[BLOCK].links
    producer = next(link.producer for link in links if read.names[0] in link.readers)
    norm = material.session.network.model.get_submodule(producer)
    gain, offset = norm.weight.detach().float(), gain_offset(norm) or 0.0
    turn = hadamard_matrix(len(gain), random_signs(len(gain), SIGNS), dtype=torch.float32)
    weight, _ = fold_gain(read.weight, None, gain, offset, None)
    turned = rotate_reader(weight, turn)
    figure, axes = panels(f"rotate: the input of q, k and v in block {BLOCK}", sharey=True)
    lines = []
    for axis, words, x, held, w in (
        (axes[0], "before", read.x, read.held_out, read.weight),
        (axes[1], "after", read.x / (gain + offset) @ turn, read.held_out / (gain + offset) @ turn, turned),
    ):
        _ranges(axis, x)
        absmax = x.abs().amax(0)
        ratio, error = (
            float(absmax.max() / absmax.median()),
            float(read.output_error(w, fake_quantize_dynamic(held, TOKEN))),
        )
        label(
            axis,
            f"{words}: 4-bit inputs lose {error:.1%} of the output's energy",
            "input channel",
            "input value" if axis is axes[0] else "",
        )
        lines.append(
            f"{words}: greatest channel over the median {ratio:.2f}, error of 4-bit inputs {error:.3%} of the output's energy"
        )
    legend(figure, axes[0])
    return Drawn(figure, lines)


def wush(material: Material) -> Drawn:
    """Second moments of an input and of the weights that read it, before and behind the map; errors token by token."""
    read = material.reads["gate, up"]
    hessian, gram = read.hessian.double() / 2, read.weight.double().t() @ read.weight.double()
    pair = moments_alike(hessian, gram, damping=DAMPING)
    figure, axes = panels(f"wush: the input of gate and up in block {BLOCK}")
    before = [hessian.diagonal(), gram.diagonal()]
    after = [
        (a[0].t() @ m @ a[0]).diagonal()
        for a, m in ((pair.activation, hessian), (torch.linalg.inv(pair.activation).mT, gram))
    ]
    order = before[0].argsort(descending=True)
    lines = []
    for found, words, styles in ((before, "before", (".", ".")), (after, "behind the map", ("-", "--"))):
        for moments, what, style, colour in zip(found, ("inputs", "weights"), styles, (BLUE, RED), strict=True):
            axes[0].plot(
                moments[order].tolist(), style, color=colour, markersize=3, linewidth=1.8, label=f"{what}, {words}"
            )
            lines.append(f"{what}, {words}: second moments {float(moments.min()):.3g} to {float(moments.max()):.3g}")
    axes[0].set_yscale("log")
    plain_logs(axes[0])
    maps = {
        NONE: None,
        HADAMARD: OnlineBlocks(hadamard_matrix(len(gram))[None]),
        FULL: OnlineBlocks(pair.unit_volume()),
    }
    _token_errors(axes[1], read, maps, lines)
    label(axes[0], "second moment of each channel", "channels, by their input", "")
    legend(figure, *axes)
    return Drawn(figure, lines)


def affine(material: Material) -> Drawn:
    """Errors token by token behind a Kronecker product, before and after it is learned; and what maps cost and leave."""
    read = material.reads["gate, up"]
    hessian, gram = read.hessian / 2, read.weight.t() @ read.weight
    cost = RoundingCost.of(read.x[:: max(1, read.x.numel() // MEASURED)], hessian, read.weight, TOKEN, None)
    scale = smoothing_scale(cost.rows.abs().amax(0), read.weight.abs().amax(0), ALPHA)
    starts = [affine_from_scale(scale, "hadamard"), affine_from_moments(hessian, gram, scale, damping=0.1)[0]]
    start = min(starts, key=lambda made: float(cost_of(made, cost)))
    learned = learned_affine(start, cost)[0]
    maps: dict[str, OnlineMap | None] = {NONE: None, HADAMARD: OnlineBlocks(hadamard_matrix(len(gram))[None])}
    for words, made in ((BEGUN, start), (LEARNED, learned)):
        maps[words] = OnlineKronecker(made.left, made.right, made.diagonal)
    for words, size in ((FULL, None), (BLOCKS, GROUP.group_size)):
        maps[words] = OnlineBlocks(moments_alike(hessian, gram, size, damping=DAMPING).unit_volume())
    sizes = f"{len(learned.left)} x {len(learned.left)} and {len(learned.right)} x {len(learned.right)}"
    figure, axes = panels(f"affine: the input of gate and up in block {BLOCK}, mapped by matrices of {sizes}")
    lines: list[str] = []
    errors = _token_errors(axes[0], read, maps, lines)
    bits = {words: _bits(words, made, read) for words, made in maps.items()}
    for words, taken in bits.items():
        lines.append(f"{words}: {taken:.3f} bits a weight")
        if words != NONE:
            axes[1].plot([taken], [errors[words]], "o", color=COLOUR[words], markersize=6)
    axes[1].set_ylim(0, 1.15 * max(error for words, error in errors.items() if words != NONE))
    percents(axes[1])
    label(
        axes[1],
        "bits of the maps, and the error behind them",
        "bits a weight for the map's numbers",
        "of the outputs' energy",
    )
    legend(figure, axes[0])
    return Drawn(figure, lines)


def clip(material: Material) -> Drawn:
    """One token's values under two ranges, and the output error over the share of the range that is kept."""
    figure, axes = panels(f"clip: 4-bit inputs of block {BLOCK}, one range a token")
    lines = []
    chosen = {}
    for read, colour in zip(material.reads.values(), (BLUE, RED, GREEN, ORANGE), strict=True):
        ratio, errors = input_clip_ratio(
            [read.weight], read.x, lambda x, share: fake_quantize_dynamic(x, replace(TOKEN, clip=share))
        )
        chosen[read.label] = ratio
        _searched(axes[1], INPUT_RATIOS, errors, ratio, read.label, colour)
        lines.append(
            f"{read.label}: keeps {ratio:.0%}, error {errors[0]:.2%} with all of the range, {min(errors):.2%} so"
        )
    read = material.reads["gate, up"]
    absmax = read.x.abs().amax(1) / read.x.std(1)
    token = read.x[int(absmax.argsort()[len(absmax) // 2])]
    axes[0].hist(token.tolist(), bins=80, color=PALE, log=True, label="values of a token")
    low, high, share = float(token.min()), float(token.max()), chosen["gate, up"]
    for part, colour, words in ((1.0, RED, "whole range"), (share, DARK, f"{share:.0%} of it")):
        for end in (low * part, high * part):
            axes[0].axvline(end, color=colour, linewidth=1.2, label=words)
    plain_logs(axes[0])
    axes[1].set_yscale("log")
    percents(axes[1])
    percents(axes[1], "x")
    label(axes[0], "the input of gate and up at one token", "value", "channels")
    label(
        axes[1],
        "output error over the share kept, chosen: dot",
        "share of the range that is kept",
        "of the outputs' energy",
    )
    legend(figure, *axes)
    return Drawn(figure, lines)


def cluster(material: Material) -> Drawn:
    """Channels in the order of their clusters with the range of each, and the error of each channel."""
    read = material.reads["q, k, v"]
    low, high = read.x.amin(0), read.x.amax(0)
    columns = ChannelRange(read.weight.amin(0), read.weight.amax(0), read.weight.std(0))
    features = max_std_features([ChannelRange(low, high, read.x.std(0))], [columns], standardise=False)
    labels = clusters_of(features, CLUSTERS, extent=torch.maximum(-low, high)).labels
    order = order_of(labels)
    own = labels[order]
    figure, axes = panels(f"cluster: the input of q, k and v in block {BLOCK}, {CLUSTERS} clusters")
    below, above = (expand(own, end) for end in ranges_of(own, low[order], high[order]))
    edges = [i - 0.5 for i in range(len(order) + 1)]
    axes[0].stairs(torch.maximum(-below, above).tolist(), edges, color=ORANGE, linewidth=1.5, label="cluster")
    axes[0].plot(
        torch.maximum(-low, high)[order].tolist(), "o", color=DARK, markersize=2, markeredgewidth=0, label="channel"
    )
    axes[0].set_yscale("log")
    plain_logs(axes[0])
    energy = read.held_out.square().sum(0)
    lines = []
    for words, spec, colour in (
        ("one range", STATIC, RED),
        (f"{CLUSTERS} clusters", replace(STATIC, granularity="cluster"), BLUE),
    ):
        clustered = spec.granularity == "cluster"
        grid = static_grid(low, high, spec, labels if clustered else None)
        rounded = fake_quantize(read.held_out, grid.of_channels(labels) if clustered else grid)
        errors = ((rounded - read.held_out).square().sum(0) / energy).sort().values
        axes[1].plot(errors.tolist(), color=colour, label=words)
        total = float(read.output_error(read.weight, rounded))
        lines.append(
            f"{words}: median channel loses {float(errors.median()):.1%} of its energy, the output {total:.2%}"
        )
    axes[1].set_yscale("log")
    percents(axes[1])
    label(
        axes[0], "channels side by side with those of their cluster", "input channel, reordered", "greatest magnitude"
    )
    label(
        axes[1], "what static 4-bit rounding takes from each channel", "channels, ascending", "of the channel's energy"
    )
    legend(figure, *axes)
    return Drawn(figure, lines)


def _searched(
    axis: Axes, tried: Sequence[float], errors: Sequence[float], chosen: float, words: str, colour: str
) -> None:
    """Draws the errors over what a search has tried, and a dot at what it has chosen, which has the least."""
    axis.plot(tried, errors, color=colour, label=words, linewidth=1.2)
    axis.plot([chosen], [min(errors)], "o", color=colour, markersize=5)


def _ranges(axis: Axes, x: torch.Tensor) -> None:
    """Draws the range of each channel of x (tokens, channels), and mean ± std inside it."""
    edges = [i - 0.5 for i in range(x.shape[1] + 1)]
    mean, std = x.mean(0), x.std(0)
    axis.stairs(
        x.amax(0).tolist(), edges, baseline=x.amin(0).tolist(), fill=True, color=PALE, linewidth=0.3, label="min to max"
    )
    axis.stairs(
        (mean + std).tolist(),
        edges,
        baseline=(mean - std).tolist(),
        fill=True,
        color=DARK,
        linewidth=0.3,
        label="mean ± std",
    )


def _bits(words: str, made: OnlineMap | None, read: Read) -> float:
    """Returns the bits that a map's numbers take, for each weight; a Hadamard matrix is known by its width."""
    numbers = 0 if made is None or words == HADAMARD else sum(tensor.numel() for tensor in made.buffers())
    return 16 * numbers / read.weight.numel()


def _token_errors(axis: Axes, read: Read, maps: Mapping[str, OnlineMap | None], lines: list[str]) -> dict[str, float]:
    """Draws the output error of each held-out token whose input is rounded to 4 bits behind each map; returns that of all."""
    whole = {}
    for words, made in maps.items():
        mapped = read.held_out if made is None else made(read.held_out)
        weight = read.weight if made is None else made.inverse_weight(read.weight)
        rounded = fake_quantize_dynamic(mapped, TOKEN)
        each = read.output_error(weight, rounded, by=1).sort().values
        whole[words] = float(read.output_error(weight, rounded))
        axis.plot(each.tolist(), torch.linspace(0, 1, len(each)).tolist(), color=COLOUR[words], label=words)
        lines.append(
            f"{words}: error {whole[words]:.3%} of the output's energy, median token {float(each.median()):.3%}"
        )
    axis.set_xscale("log")
    percents(axis, "x")
    percents(axis)
    label(
        axis,
        "4-bit inputs: tokens with at most this error",
        "output error of a token, of its output's energy",
        "held-out tokens",
    )
    return whole
