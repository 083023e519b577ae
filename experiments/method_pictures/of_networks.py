"""Pictures of what shows in more than one Linear: tuned scales, prefix tokens, the cache."""

import copy
from typing import Any

import torch
from matplotlib.patches import Rectangle
from torch import nn

import ptq
from experiments.method_pictures.canvas import BLUE, RED, Drawn, label, legend, panels, percents, plain_logs
from experiments.method_pictures.material import BATCH, BLOCK, Material
from ptq.calibration.statistics import Provenance
from ptq.calibration.statistics_visitor import StatisticsVisitor
from ptq.config.schema import SchemeConfig
from ptq.network.block_stream import Flow
from ptq.network.network import Block
from quantize.error import kl_divergence, relative_error
from quantize.modules.cache import CacheFormat, round_states
from quantize.modules.simulated import QuantLinear

FIRST_BLOCKS = 2
TUNED_STEPS, TUNED_LENGTH = 48, 64
"""Steps of the tuner, and tokens of its samples: fewer than its own defaults, for time."""
SCHEME = "w3a16_g64"
KEPT_BITS, KEPT_GROUP = 2, 32
SHOWN_TOKENS = 64
LAST = "mlp.down_proj"


def tune(material: Material) -> Drawn:
    """How far each scale moved, and the divergence of each held-out token before and after."""
    model = material.session.loaded.model
    exact = _beginning(model)
    held = material.held_out.view(-1, TUNED_LENGTH)[:: len(material.held_out)]
    target = exact(held, use_cache=False).logits
    steps: dict[str, dict[str, Any]] = {"gptq": {}}
    found = []
    for more in ({}, {"tune": {"steps": TUNED_STEPS}}):
        made = _beginning(model)
        ptq.quantize(made, SCHEME, steps | more, material.ids.view(-1, TUNED_LENGTH), BATCH)
        scales = {name: m.scale.flatten() for name, m in made.named_modules() if isinstance(m, QuantLinear)}
        divergence = kl_divergence(made(held, use_cache=False).logits, target)[0].flatten()
        found.append((torch.cat([scales[name] for name in sorted(scales)]), divergence))
    (before, lost), (after, left) = found
    title = (
        f"tune: the first {FIRST_BLOCKS} blocks with final norm and head, 3 bits in groups of 64, {TUNED_STEPS} steps"
    )
    figure, axes = panels(title)
    ratios = after / before
    axes[0].hist(ratios.tolist(), bins=80, color=BLUE)
    for values, words, colour in ((lost, "GPTQ", RED), (left, "GPTQ, scales tuned", BLUE)):
        ordered = values.sort().values
        axes[1].plot(ordered.tolist(), torch.linspace(0, 1, len(ordered)).tolist(), color=colour, label=words)
    axes[1].set_xscale("log")
    axes[1].set_xlim(left=float(torch.cat([lost, left]).quantile(0.01)))
    plain_logs(axes[1], "x")
    percents(axes[1])
    label(axes[0], "every scale over what the solver gave", "tuned scale / solver's scale", "scales")
    label(axes[1], "tokens with at most this divergence", "KL divergence of a token, nats", "held-out tokens")
    legend(figure, *axes)
    ends = [float(ratios.quantile(share)) for share in (0.05, 0.95)]
    return Drawn(
        figure,
        [
            f"nine in ten scales moved to {ends[0]:.4f} to {ends[1]:.4f} of what they were",
            f"mean divergence {float(lost.mean()):.4f} nats before, {float(left.mean()):.4f} after",
        ],
    )


def prefix(material: Material) -> Drawn:
    """Greatest magnitude of each token's state, and of what each block's last Linear reads, without and with a prefix."""
    stream, ids = material.session.stream, material.ids[:BATCH]
    plain = material.context(SchemeConfig(), {})
    found = {}
    with_prefix = material.context(SchemeConfig(), {"prefix": {}})
    for words, context in (("without", plain), ("with the prefix", with_prefix)):
        flow = stream.open(ids, BATCH)
        found[words] = _Magnitudes(flow, stream.device)
        context.show(found[words], flow, f"prefix: {words}")
    tokens = with_prefix.plans["prefix"].figures["tokens"]
    said = " ".join(repr(material.session.loaded.tokenizer.decode([token])) for token in tokens)
    figure, axes = panels(f"prefix: {len(tokens)} tokens before every sequence")
    lines = [f"tokens: {said}"]
    for (words, seen), colour, size in zip(found.items(), (RED, BLUE), (4, 2), strict=True):
        axes[0].plot(seen.tokens.tolist(), "o", color=colour, markersize=size, markeredgewidth=0, label=words)
        axes[1].plot(seen.ranges, color=colour, marker="o", markersize=size, label=words)
        lines.append(
            f"{words}: greatest state {float(seen.tokens.max()):.0f}, median token's {float(seen.tokens.median()):.1f}, "
            f"greatest input of a last Linear {max(seen.ranges):.0f}"
        )
    for axis in axes:
        axis.set_yscale("log")
        plain_logs(axis)
    label(axes[0], f"state of each token after block {BLOCK}", "token of a sample", "greatest magnitude")
    label(axes[1], "range that a static grid has to span", "block", "greatest input of down")
    legend(figure, *axes)
    return Drawn(figure, lines)


def cache(material: Material) -> Drawn:
    """Keys and values of one head, a group of each, and what rounding them along the one and the other axis loses."""
    model = material.session.loaded.model
    layer = model(material.held_out[:1], use_cache=True).past_key_values.layers[BLOCK]
    figure, axes = panels(f"cache: one head of block {BLOCK}, {KEPT_BITS} bits in groups of {KEPT_GROUP}")
    lines = []
    for axis, name, states in ((axes[0], "keys", layer.keys), (axes[1], "values", layer.values)):
        lost = {
            along: relative_error(states, round_states(states, CacheFormat(KEPT_BITS, KEPT_GROUP, along, search=True)))
            ** 2
            for along in ("tokens", "channels")
        }
        shown = states[0, 0, :SHOWN_TOKENS].abs()
        # The few greatest ones would leave all else white.
        axis.imshow(shown, aspect="auto", cmap="Blues", interpolation="nearest", vmax=float(shown.quantile(0.99)))
        by_channel = name == "keys"
        corner, size = ((20, 0), (1, KEPT_GROUP)) if by_channel else ((0, 20), (KEPT_GROUP, 1))
        edge = (corner[0] - 0.5, corner[1] - 0.5)
        axis.add_patch(Rectangle(edge, *size, fill=False, edgecolor=RED, linewidth=1.5))
        axis.grid(False)
        label(
            axis,
            f"{name}: {lost['tokens']:.1%} lost in groups of tokens, {lost['channels']:.1%} of channels",
            "channel of the head",
            "token",
        )
        lines.append(
            f"{name}: {lost['tokens']:.2%} of their energy lost with groups along tokens, {lost['channels']:.2%} along channels"
        )
    axes[0].plot(
        [], [], color=RED, label="what shares a scale: 32 tokens of a channel of keys, 32 channels of a token of values"
    )
    legend(figure, axes[0])
    return Drawn(figure, lines)


class _Magnitudes:
    """A visitor that keeps the greatest magnitudes of states, and of what the last Linears read."""

    def __init__(self, flow: Flow, device: torch.device):
        self._flow, self._statistics = flow, StatisticsVisitor(device)
        self._blocks: list[str] = []
        self.tokens = torch.zeros(0)

    def enter(self, block: Block) -> None:
        """Begins to look at the block's Linears."""
        self._statistics.enter(block)

    def leave(self, block: Block) -> None:
        """Looks at what has come out of the block."""
        self._statistics.leave(block)
        self._blocks.append(block.name)
        if block.index == BLOCK:
            self.tokens = self._flow.hidden[0].float().abs().amax(-1)

    @property
    def ranges(self) -> list[float]:
        """Greatest magnitude of what each block's last Linear reads."""
        inputs = self._statistics.result(Provenance("", None, "", "", "", 0, 0, "", "")).inputs
        return [float(inputs[f"{name}.{LAST}"].absmax.max()) for name in self._blocks]


def _beginning(model: Any) -> Any:
    """Returns a copy of the model with its first blocks alone."""
    body = model.model
    layers, body.layers = body.layers, nn.ModuleList(list(body.layers)[:FIRST_BLOCKS])
    try:
        return copy.deepcopy(model)
    finally:
        body.layers = layers
