"""QuaRot (Ashkboos et al. 2024): the residual stream and the heads turned by Hadamard matrices, outliers spread over all channels.

The stream's rotation may be learned on calibration tokens, by SpinQuant's steps (Liu et al. 2024) or DartQuant's; block formats are
turned inside their blocks (MR-GPTQ, Egiazarian et al. 2025).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ptq.calibration.samples import Samples
from ptq.config.options import MOST_SEED, option
from ptq.config.schema import SchemeConfig
from ptq.config.scheme import tensor_specs
from ptq.errors import UserError, nearest
from ptq.network.attention import CHILD, AttentionQuantizers
from ptq.network.basis import Basis
from ptq.network.block_stream import Flow
from ptq.network.links import Link
from ptq.network.network import Block, weight_of
from ptq.network.norms import gain_offset, is_centring
from ptq.network.outside import set_weight
from ptq.steps._step import (
    INPUT,
    KEY,
    QUERY,
    RESIDUAL,
    WEIGHT_INPUT,
    WEIGHT_OUTPUT,
    Context,
    StepPlan,
    Transform,
)
from ptq.steps.transforms._stream_ends import first_norms, last_norm, neutral, turn_ends
from ptq.steps.transforms._stream_rows import StreamRows
from ptq.steps.transforms.smooth import kind_of
from quantize.modules.hadamard import OnlineHadamard
from quantize.modules.online import OnlineShared, attach_input, attach_output
from quantize.spec.quant_spec import QuantSpec
from quantize.transforms.hadamard import factorise, hadamard_matrix, hadamard_transform, random_signs
from quantize.transforms.learned_rotation import LOSSES, STEPS, learned_rotation, rotation_loss
from quantize.transforms.residual import center_writer, fold_gain, rotate_reader, rotate_writer

ONLINE = ("down", "out", "heads")


@dataclass(frozen=True)
class Options:
    """What is turned.

    Attributes:
        residual: turn the residual stream: embedding, readers, writers and head; the norms' gains are folded into their
            readers, a LayerNorm's subtraction of the mean into the writers.
        values: turn each head's value, and the columns of the output projection that read it.
        online: what is turned each time that it is computed: ``down`` (what an MLP's last Linear reads), ``out`` (what an
            attention's output projection reads, across heads, instead of `values`), ``heads`` (query and key after rotary embeddings).
        block: consecutive channels that are turned together, such as the group size of a format with scales for groups; null
            for all.
        seed: of the random signs of the residual stream's rotation.
        seeds: how many are tried, counted from `seed`: the one of least `loss` on calibration tokens is taken.
        learn: steps that change the stream's rotation from there: ``cayley`` (SpinQuant's) or ``qr`` (DartQuant's); null for none.
        loss: what they lower: ``range``, the error that rounding the turned tokens leaves at the outputs of their readers, or
            ``whip``, DartQuant's, which flattens their distribution.
        steps: how many.
        rate: angle of the first, in radians; falls to 0 by a cosine.
    """

    residual: bool = True
    values: bool = True
    online: tuple[str, ...] = option(("down",), choices=ONLINE)
    block: int | None = option(None, least=2)
    seed: int = option(0, least=0, most=MOST_SEED, only_with={"residual": (True,)})
    seeds: int = option(1, least=1, most=1000, only_with={"residual": (True,)})
    learn: str | None = option(None, choices=tuple(STEPS), only_with={"residual": (True,)})
    loss: str = option("range", choices=LOSSES)
    steps: int = option(60, least=1, only_with={"learn": tuple(STEPS)})
    rate: float = option(0.3, least=1e-6, most=1.5, only_with={"learn": tuple(STEPS)})

    def __post_init__(self) -> None:
        if self.loss != "range" and self.learn is None and self.seeds == 1:
            raise UserError(
                f"steps.rotate.loss: {self.loss!r} changes nothing beside learn=null and seeds=1: use steps.rotate.learn=qr, or leave it out"
            )
        for place in self.online:
            if place not in ONLINE:
                raise UserError(
                    f"steps.rotate.online: {place!r} is not valid: expected {', '.join(ONLINE)}{nearest(place, ONLINE)}"
                )
        if not (self.residual or self.values or self.online):
            raise UserError(
                "steps.rotate: turns nothing: set residual, values or online, or remove it with ~steps.rotate"
            )


class Step(Transform):
    """Turns the residual stream, values, and what `online` names."""

    acts: ClassVar[frozenset[str]] = frozenset({RESIDUAL})
    outdates: ClassVar[bool] = True

    def __init__(self, options: Options):
        super().__init__(options)
        acts = {WEIGHT_INPUT, WEIGHT_OUTPUT} if options.values else set()
        acts |= {RESIDUAL} if options.residual else set()
        acts |= {INPUT} if {"down", "out"} & set(options.online) else set()
        acts |= {QUERY, KEY} if "heads" in options.online else set()
        # Of this step and not of all: what its options leave out asks for nothing.
        self.acts = frozenset(acts)  # type: ignore[misc]
        # A matrix that a seed gives is there before any token is.
        self.by_block = options.learn is None and options.seeds == 1  # type: ignore[misc]

    def warned(self, scheme: SchemeConfig, acted: frozenset[str]) -> str | None:
        """Says so of a rotation of the whole stream where inputs are NVFP4: measured, docs/results.md ("NVFP4")."""
        whole = self.options.residual and self.options.block is None
        if not whole or all(spec.format != "nvfp4" for spec in tensor_specs(scheme, "input")):
            return None
        return (
            "rotate: a block of 16 keeps a large channel to itself, and a rotation of the whole stream gives every block its share of it: with "
            "NVFP4 inputs it was found to hurt: ~steps.rotate leaves it out; scheme=nvfp4_w4a4 method=best has what helps"
        )

    def plan(self, context: Context) -> StepPlan:
        """Finds the rotation of the residual stream, and says what widths are made of."""
        for words in self._online_widths(context.network.blocks, context):
            context.note(f"rotate: online: {words}")
        if not self.options.residual:
            return StepPlan(stale=True)
        width, size = self._described(context)
        centred, first = self._check(context, width)
        options, device = self.options, context.stream.device
        written = bool(first) or any(context.norm_sums(b) for b in context.network.blocks)
        if (options.learn or options.seeds > 1) and written:
            field = "learn" if options.learn else "seeds"
            raise UserError(
                f"steps.rotate.{field}: {getattr(options, field)!r}, but norms write to this model's residual stream, and what they "
                "give is turned online by the Hadamard matrix of one seed: use learn=null seeds=1"
            )
        seed, rows = options.seed, None
        if options.learn or options.seeds > 1:
            rows = self._rows(context, width, centred)
        matrix = self._start(width, seed, device)
        if rows is not None and options.seeds > 1:
            tried = range(seed, seed + options.seeds)
            losses = {s: self._loss(rows, self._start(width, s, device), context) for s in tried}
            seed = min(losses, key=lambda s: losses[s])
            context.note(
                f"rotate: seed {seed} of {options.seeds}: loss {losses[seed]:.4g}, {max(losses.values()):.4g} at most"
            )
            matrix = self._start(width, seed, device)
        if rows is not None and options.learn:
            matrix = self._learned(rows, matrix, size, context)
        return StepPlan(basis=Basis.rotation(matrix, centred, first), stale=True)

    def plan_outside(self, context: Context) -> StepPlan:
        """Makes the rotation of its seed; the final norm says whether norms take the mean out, and `plan_block` holds others to it."""
        if not self.options.residual:
            return StepPlan()
        width, _ = self._described(context)
        first = first_norms(context, width)
        matrix = self._start(width, self.options.seed, context.stream.device)
        return StepPlan(basis=Basis.rotation(matrix, is_centring(last_norm(context, width, first)[1]), first))

    def plan_block(self, block: Block, context: Context, flow: Flow | None) -> StepPlan:
        """Finds what the block turns, and says what widths are made of that no block before had."""
        earlier = self._online_widths(context.network.blocks[: block.index], context)
        for words in self._online_widths([block], context):
            if words not in earlier:
                context.note(f"rotate: online: {words}")
        basis = context.outside.basis
        if basis is not None:
            _one_kind({basis.centred, *self._centring(block, context, len(basis.matrix))})
        return StepPlan(stale=True)

    def _described(self, context: Context) -> tuple[int, int]:
        """Returns the residual stream's width, and how many of its channels are turned together; says what they are made of."""
        width = _width(context)
        size = _size("the residual stream", width, self.options.block)
        context.note(f"rotate: residual stream: {_blocks(width, size)}{factorise(size).describe()}")
        return width, size

    def _online_widths(self, blocks: Sequence[Block], context: Context) -> list[str]:
        """Returns what the widths that are turned online in some blocks are made of, each once."""
        found: dict[str, None] = {}
        for block in blocks:
            writers = self._writers(block, context)
            for name in (name for place in ("down", "out") if place in self.options.online for name in writers[place]):
                width = weight_of(context.module(name)).shape[1]
                size = _size(name, width, self.options.block)
                found[f"{_blocks(width, size)}{factorise(size).describe()}"] = None
        return list(found)

    def _start(self, width: int, seed: int, device: torch.device) -> torch.Tensor:
        """Returns the Hadamard matrix of a seed, float64 (width, width)."""
        return hadamard_matrix(width, random_signs(width, seed), self.options.block, device=device)

    def _rows(self, context: Context, width: int, centred: bool) -> torch.Tensor:
        """Returns tokens of the stream as `StreamRows` weighs them."""
        flow = context.drawn("steps.rotate.learn")
        seen = StreamRows(
            context, Samples(context.stream, flow), lambda block: _stream_links(context, block, width), centred
        )
        context.show(seen, flow, "rotate")
        return seen.rows

    def _loss(self, rows: torch.Tensor, matrix: torch.Tensor, context: Context) -> float:
        return float(rotation_loss(rows @ matrix.to(rows), self.options.loss, _dynamic(context)))

    def _learned(self, rows: torch.Tensor, matrix: torch.Tensor, size: int, context: Context) -> torch.Tensor:
        """Returns the rotation that was learned, every block of `size` channels by itself."""
        o, before, after = self.options, 0.0, 0.0
        parts: list[torch.Tensor] = []
        spec = _dynamic(context) if size == len(matrix) else None
        for start in range(0, len(matrix), size):
            own = slice(start, start + size)
            kind = o.learn or ""
            try:
                part, first, last = learned_rotation(
                    rows[:, own], matrix[own, own], o.loss, kind, o.steps, o.rate, spec
                )
            except ValueError as error:
                raise UserError(f"steps.rotate.learn: {error}: use more calibration samples") from None
            parts, before, after = [*parts, part], before + first, after + last
        context.note(
            f"rotate: {o.steps} {o.learn} steps on {len(rows)} tokens: {o.loss} loss of held-out tokens {before:.4g} -> {after:.4g}"
        )
        return torch.block_diag(*parts)

    def _check(self, context: Context, width: int) -> tuple[bool, tuple[str, ...]]:
        """Returns whether the norms take the mean out, and `first_norms`.

        Raises:
            UserError: where the stream's norms or readers are not found.
        """
        with context.stream.hold_outside(changed=False):
            first = first_norms(context, width)
            centring = {is_centring(last_norm(context, width, first)[1])}
        for block in context.network.blocks:
            with context.stream.at(block):
                centring |= self._centring(block, context, width)
        return _one_kind(centring), first

    def _centring(self, block: Block, context: Context, width: int) -> set[bool]:
        """Returns whether each of a block's norms of the stream takes the mean out. Raises `UserError` as `_check` does."""
        links = _stream_links(context, block, width)
        if not links or not context.sums(block):
            raise UserError(
                f"steps.rotate.residual: true, but who reads and writes the residual stream of {block.name} is not found: "
                "use residual=false"
            )
        found = set()
        for link in links:
            norm = context.module(link.producer)
            if gain_offset(norm) is None:
                raise UserError(
                    f"steps.rotate.residual: {link.producer} multiplies by neither w nor 1 + w: use residual=false"
                )
            found.add(is_centring(norm))
        return found

    def outside(self, plan: StepPlan, context: Context) -> None:
        """Turns embeddings and head; the final norm's gain goes into the head, which is no longer tied."""
        basis = plan.basis
        if basis is None:
            return
        turn_ends(context, basis, lambda: self._online(len(basis.matrix)))

    def _online(self, width: int) -> OnlineHadamard:
        """Returns what turns the stream where no weight can."""
        return OnlineHadamard(width, self.options.seed, self.options.block)

    @torch.no_grad()
    def apply(self, block: Block, plan: StepPlan, context: Context) -> None:
        """Turns the block's readers and writers, its values, and what is turned online."""
        if plan.basis is not None:
            self._turn_stream(block, plan.basis, context)
        if self.options.values and "out" not in self.options.online:
            for link in context.links(block):
                if kind_of(link, context.roles) == "v_o" and link.head_dim:
                    _turn_values(
                        link, context, _size(f"a head of {link.producer}", link.head_dim, self.options.block, True)
                    )
        writers = self._writers(block, context)
        for place in ("down", "out"):
            for name in writers[place] if place in self.options.online else ():
                linear = context.module(name)
                width = weight_of(linear).shape[1]
                size = _size(name, width, self.options.block)
                online = OnlineHadamard(width, block=None if size == width else size).to(weight_of(linear).device)
                weight_of(linear).copy_(online(weight_of(linear).double()))
                attach_input(linear, OnlineShared(online))
        if "heads" in self.options.online:
            for name in context.attentions.get(block.index, []):
                device = next(context.module(name).parameters()).device
                turns = {t: OnlineHadamard(context.network.head_dim).to(device) for t in ("query", "key")}
                context.module(name).add_module(CHILD, AttentionQuantizers({}, dict(turns)))

    def _turn_stream(self, block: Block, basis: Basis, context: Context) -> None:
        network, width = context.network, len(basis.matrix)
        for link in _stream_links(context, block, width):
            norm = context.module(link.producer)
            for name in link.readers:
                reader = context.module(name)
                weight, bias = fold_gain(
                    weight_of(reader),
                    getattr(reader, "bias", None),
                    norm.weight,
                    gain_offset(norm) or 0.0,
                    getattr(norm, "bias", None),
                )
                weight_of(reader).copy_(rotate_reader(weight, basis.matrix))
                if bias is not None:
                    set_weight(reader, "bias", bias)
            neutral(network.model, link.producer, norm, basis.centred)
        for name in context.norm_sums(block):
            # Its gain comes after its own division, so what it gives can only be turned online.
            attach_output(context.module(name), self._online(width).to(context.stream.device))
        for name in _writers(block, context):
            writer = context.module(name)
            weight, bias = weight_of(writer), writer.bias
            if basis.centred:
                weight, bias = center_writer(weight, bias)
            weight, bias = rotate_writer(weight, bias, basis.matrix)
            weight_of(writer).copy_(weight)
            if bias is not None:
                writer.bias.copy_(bias)

    def _writers(self, block: Block, context: Context) -> dict[str, list[str]]:
        """Returns the Linears that write to the stream: the MLP's last, or its experts', and the attention's, called before."""
        order = [name for stage in context.stages(block) for name in stage]
        writers = sorted({**context.sums(block), **context.weighed_sums(block)}, key=order.index)
        first = min(1, len(writers) - 1)
        return {"down": writers[first:], "out": writers[:first]}


def _width(context: Context) -> int:
    """Returns the residual stream's channels."""
    return int(context.network.model.config.get_text_config().hidden_size)


def _one_kind(centring: set[bool]) -> bool:
    """Returns whether the norms take the mean out. Raises `UserError` where some do and some do not."""
    if len(centring) > 1:
        raise UserError("steps.rotate.residual: some norms take the mean out and some do not: use residual=false")
    return next(iter(centring))


def _writers(block: Block, context: Context) -> list[str]:
    """Returns the Linears whose output is added to the residual stream itself, with no norm between."""
    norms, sums = context.norm_sums(block), {**context.sums(block), **context.weighed_sums(block)}
    return [name for name, place in sums.items() if place not in norms]


def _stream_links(context: Context, block: Block, width: int) -> list[Link]:
    """Returns the links whose norm reads the residual stream: as wide as it is, and not what an attention's heads have."""
    found = []
    for link in context.links(block):
        if link.kind == "norm" and weight_of(context.module(link.readers[0])).shape[1] == width:
            found.append(link)
    return found


def _size(what: str, width: int, block: int | None, fits: bool = False) -> int:
    """Returns how many channels of `what` are turned together: all, or `block`; all where `fits` and they are fewer."""
    if block is None or (fits and width < block):
        return width
    if width % block:
        close = min((d for d in range(2, width + 1) if width % d == 0), key=lambda d: abs(d - block))
        raise UserError(f"steps.rotate.block: {block} does not divide the {width} channels of {what}: use {close}")
    return block


def _blocks(width: int, size: int) -> str:
    return "" if size == width else f"{width // size} blocks: "


def _dynamic(context: Context) -> QuantSpec | None:
    """Returns the scheme's format of inputs, whose groups and zero points the loss of a rotation has."""
    return context.scheme.input


def _turn_values(link: Link, context: Context, size: int) -> None:
    """Turns each head's value in the rows of v and the columns of o (QuaRot, section 4, stage 1c), `size` channels together."""
    value = context.module(link.producer)
    turned, bias = rotate_writer(weight_of(value), value.bias, lambda rows: hadamard_transform(rows, block=size))
    weight_of(value).copy_(turned)
    if bias is not None:
        value.bias.copy_(bias)
    for name in link.readers:
        weight = weight_of(context.module(name))
        weight.copy_(rotate_reader(weight, lambda rows: hadamard_transform(rows, block=size)))
