"""Links: one tensor inside a block, who produces it and which Linears read it. Found by tracing, proved by a probe."""

import json
import pathlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ptq.files.bounded import parse_json
from ptq.network.block_stream import BlockStream, Flow
from ptq.network.experts.recorded import Seen, record_block
from ptq.network.experts.routing import evenly, routed_by
from ptq.network.experts.twins import Twins, in_stages
from ptq.network.network import Block, Network, is_linear, weight_of
from ptq.network.precise import Call, change_error, precise_block, telling_dtype, tolerance_of
from ptq.network.replaced import hooked
from ptq.network.residual import find_norm_sums, find_rests, find_sums, find_weighed_sums

PROBE_SCALES = (1 / 64, 1.0, 64.0)
"""Powers of two: scaling by them is exact, so a true link shows no error but the summation's."""


@dataclass(frozen=True)
class Link:
    """One tensor inside a block.

    Attributes:
        kind: ``norm``, ``activation`` (an activation function that is a module) or ``linear`` (v -> o, up -> down).
        block: index of the block.
        producer: full name of the module that writes the tensor.
        readers: full names of the Linears that read it, in the order of the calls; before them, of the gates that do.
        repeat: for v -> o with grouped-query attention, how many query heads read one value head; otherwise 1.
        head_dim: channels of a head, for v -> o; otherwise 0.
        source: for kind ``activation``, the Linear whose output the activation function reads, or "".
        homogeneous: whether the activation function is proved to commute with positive scales, as ReLU does.
    """

    kind: str
    block: int
    producer: str
    readers: tuple[str, ...]
    repeat: int = 1
    head_dim: int = 0
    source: str = ""
    homogeneous: bool = False

    def reader_scale(self, scale: torch.Tensor) -> torch.Tensor:
        """Returns what the readers' input channels are scaled by when the producer's output channels are by `scale`."""
        if self.repeat == 1:
            return scale
        return scale.view(-1, 1, self.head_dim).expand(-1, self.repeat, -1).reshape(-1)


@dataclass
class Trace:
    """What a tiny input showed of a block: its links, its notes, the roles of its Linears, its `stages` (the Linears in the
    order of their calls, those that read one tensor together), and the `sums` that their outputs, and the norms' (`norm_sums`), are part of.
    `weighed_sums` are those of outputs that a number for each token is multiplied with first: experts', and what a gate weighs.
    `rests` says which module reads what a Linear's output is added to.
    """

    links: list[Link] = field(default_factory=list)
    stages: list[tuple[str, ...]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    roles: dict[str, str] = field(default_factory=dict)
    sums: dict[str, str] = field(default_factory=dict)
    norm_sums: dict[str, str] = field(default_factory=dict)
    weighed_sums: dict[str, str] = field(default_factory=dict)
    rests: dict[str, str] = field(default_factory=dict)


def trace_links(network: Network, stream: BlockStream, sums: bool = False) -> dict[int, Trace]:
    """Traces every block on one tiny input and returns, for each block, its proved links, its notes and the roles of its Linears.

    A norm or an activation function is linked to the Linears whose input is the very object it returned, or tokens of it. A
    Linear whose input nobody returned is tried against the Linears beside it (same parent or expert, fitting shape). Every
    candidate is proved: scaling the producer's output and the readers' input by reciprocal factors must leave the block's
    output alone. All this is computed in float32 or float64, so that a model has the same links whatever it runs in, and
    with every token sent to every expert, so that all of them are looked at.

    Args:
        network: the model.
        stream: carries the tiny input through it.
        sums: whether to look for the sums too: some more passes through each block, which few steps need.
    """
    tracer = Tracer(network, stream, sums)
    stream.run([tracer.flow], tracer, "links")
    return tracer.traces


class Tracer:
    """The visitor that traces a block before its `flow`, of one tiny input, passes through it. Arguments: `trace_links`."""

    def __init__(self, network: Network, stream: BlockStream, sums: bool):
        vocabulary = network.model.get_input_embeddings().num_embeddings
        length = min(8, network.max_positions or 8)
        self.network, self.stream, self.sums = network, stream, sums
        self.flow: Flow = stream.open((torch.arange(1, length + 1) * 7 % vocabulary)[None], 1)
        self.traces: dict[int, Trace] = {}

    def enter(self, block: Block) -> None:
        """Traces the block."""
        hidden = self.flow.hidden[:1].to(self.stream.device)
        with routed_by(evenly):
            dtype = telling_dtype(self.stream, self.flow, block, hidden)
            with precise_block(self.stream, self.flow, block, dtype) as call:
                self.traces[block.index] = self._trace(block, call, hidden.to(dtype))

    def _trace(self, block: Block, call: Call, hidden: torch.Tensor) -> Trace:
        seen = record_block(block, call, hidden)
        trace = Trace(stages=in_stages(block, seen.inputs))
        twins = Twins(block, list(seen.inputs))
        found, free = _readers(seen, twins)
        probe = _Probe(self.network, call, hidden, call(hidden))
        for producer, readers in found.items():
            module = self.network.model.get_submodule(producer)
            if not is_linear(module):
                kind = "norm" if any(True for _ in module.parameters()) else "activation"
                link = Link(kind, block.index, producer, tuple(readers))
                source = seen.producers.get(seen.fed.get(producer, 0), "") if kind == "activation" else ""
                if source and is_linear(self.network.model.get_submodule(source)):
                    link = replace(link, source=source)
                    link = replace(link, homogeneous=probe.holds(replace(link, producer=source)))
                _add(trace, probe, link)
        seen.keep.clear()
        order = [name for stage in trace.stages for name in stage]
        for reader in free:
            if reader in block.linears and not twins.is_twin(reader):
                self._linear_pair(trace, probe, twins, reader, order)
        self._pairs_of_twins(trace, probe, twins)
        _roles(trace, list(seen.inputs), self.network.head_dim)
        if self.sums:
            trace.norm_sums = find_norm_sums(call, block, hidden)
            trace.sums = find_sums(call, block, hidden, trace.norm_sums)
            trace.rests = find_rests(call, block, hidden, trace.sums)
            trace.weighed_sums = find_weighed_sums(call, block, hidden, set(trace.sums))
        return trace

    def leave(self, block: Block) -> None:
        """Does nothing."""

    def _linear_pair(self, trace: Trace, probe: "_Probe", twins: Twins, reader: str, order: list[str]) -> None:
        channels = weight_of(self.network.model.get_submodule(reader)).shape[1]
        beside = [n for n in order[: order.index(reader)] if n != reader and twins.beside(n, reader)]
        for producer in reversed(beside):
            width = weight_of(self.network.model.get_submodule(producer)).shape[0]
            head_dim = self.network.head_dim if width != channels else 0
            if channels % width or (width != channels and (head_dim == 0 or width % head_dim)):
                continue
            link = Link("linear", twins.block.index, producer, (reader,), channels // width, head_dim)
            if _add(trace, probe, link):
                return

    def _pairs_of_twins(self, trace: Trace, probe: "_Probe", twins: Twins) -> None:
        """Links all experts as the first one is: proved together, or one after another where that does not hold."""
        of_first = [x for x in trace.links if x.kind == "linear" and twins.is_first(x.producer)]
        links = [
            replace(link, producer=producer, readers=(reader,))
            for link in of_first
            for producer, reader in twins.of(link.producer, link.readers[0])
        ]
        if links and probe.all_hold(links):
            trace.links += links
            return
        for link in links:
            _add(trace, probe, link)


@dataclass(frozen=True)
class _Probe:
    """Tries links on a block: `call` gives its output, `reference` is that of `hidden` (1, tokens, channels)."""

    network: Network
    call: Call
    hidden: torch.Tensor
    reference: torch.Tensor

    def holds(self, link: Link) -> bool:
        """Returns whether the block's output stays the same when the link is scaled there and back."""
        return self.all_hold([link])

    def all_hold(self, links: list[Link]) -> bool:
        """Returns whether the block's output stays the same when all these links are scaled there and back."""
        with ExitStack() as stack:
            for link in links:
                stack.enter_context(self._scaled(link))
            output = self.call(self.hidden)
        return self._unchanged(output)

    def _scaled(self, link: Link) -> AbstractContextManager[None]:
        model = self.network.model
        channels = weight_of(model.get_submodule(link.readers[0])).shape[1] // link.repeat
        generator = torch.Generator().manual_seed(link.block)
        pick = torch.randint(len(PROBE_SCALES), (channels,), generator=generator)
        scale = torch.tensor(PROBE_SCALES)[pick].to(self.hidden)
        readers = [model.get_submodule(name) for name in link.readers]
        return _scaled(model.get_submodule(link.producer), scale, readers, link.reader_scale(scale))

    def _unchanged(self, output: torch.Tensor) -> bool:
        return change_error(self.hidden, self.reference, output) <= tolerance_of(self.hidden, self.reference)


def _add(trace: Trace, probe: _Probe, link: Link) -> bool:
    proved = probe.holds(link)
    if proved:
        trace.links.append(link)
    elif link.kind != "linear":
        trace.notes.append(f"{link.producer}: read by more than {', '.join(link.readers)}; not a link")
    return proved


def _readers(seen: Seen, twins: Twins) -> tuple[dict[str, list[str]], list[str]]:
    """Returns the readers of each producer whose output they read, or tokens of it, and those whose input nobody returned.

    An expert that got no tokens reads what the others do.
    """
    found: dict[str, list[str]] = {}
    free: list[str] = []
    for name, tensor in (*seen.gate_inputs.items(), *seen.inputs.items()):
        producer = seen.producers.get(id(tensor)) or seen.giver_of(tensor)
        if producer:
            found.setdefault(producer, []).append(name)
        else:
            free.append(name)
    for producer, readers in found.items():
        alike = dict.fromkeys(other for name in readers for other in twins.alike(name))
        found[producer] = [*readers, *(name for name in alike if name not in readers)]
        free = [name for name in free if name not in alike]
    return found, free


@contextmanager
def _scaled(producer: nn.Module, scale: torch.Tensor, readers: list[nn.Module], back: torch.Tensor) -> Iterator[None]:
    with (
        hooked([producer.register_forward_hook(lambda module, args, output: output * scale)]),
        hooked(r.register_forward_pre_hook(lambda module, args: (args[0] / back, *args[1:])) for r in readers),
    ):
        yield


def _roles(trace: Trace, order: list[str], head_dim: int) -> None:
    """Names query, key and value: value is the producer of the attention's v -> o link, query and key are called before it."""
    for link in list(trace.links):
        if link.kind != "linear":
            continue
        norm = next((x for x in trace.links if link.producer in x.readers), None)
        if norm is None:
            continue
        parent = link.producer.rpartition(".")[0]
        beside = [n for n in order if n in norm.readers and n.rpartition(".")[0] == parent]
        if len(beside) == 3:
            others = [n for n in beside if n != link.producer]
            trace.roles.update({others[0]: "query", others[1]: "key", link.producer: "value"})
            trace.links[trace.links.index(link)] = replace(link, head_dim=head_dim)


def describe(traces: Mapping[int, Trace]) -> list[str]:
    """Returns sentences on what the links allow and what they do not, for the log."""
    kinds = {
        kind: sum(x.kind == kind for t in traces.values() for x in t.links) for kind in ("norm", "activation", "linear")
    }
    lines = [
        f"links: {kinds['norm']} from norms, {kinds['activation']} from activation functions, {kinds['linear']} between Linears"
    ]
    if not any(kinds.values()):
        lines.append(
            "no links found: transforms that move scale or order between modules (smooth, reorder) cannot be used; "
            "statistics and rtn work"
        )
    return lines + [note for t in traces.values() for note in t.notes]


def save_traces(traces: Mapping[int, Trace], path: pathlib.Path) -> None:
    """Writes traces as a file without tensors."""
    plain = {str(index): asdict(trace) for index, trace in traces.items()}
    save_file({}, path, metadata={"kind": "links", "traces": json.dumps(plain)})


def load_traces(path: pathlib.Path) -> dict[int, Trace]:
    """Reads what `save_traces` wrote. Raises ValueError for anything else."""
    try:
        with safe_open(path, framework="pt") as file:
            plain = parse_json((file.metadata() or {})["traces"])
        return {int(index): trace_of(facts) for index, facts in plain.items()}
    except (SafetensorError, OSError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"it holds no links ({' '.join(str(error).split())})") from None


def trace_of(facts: Mapping[str, Any]) -> Trace:
    """Returns the trace whose fields, as JSON holds them, these are."""
    links = [Link(**{**link, "readers": tuple(link["readers"])}) for link in facts["links"]]
    stages = [tuple(stage) for stage in facts["stages"]]
    return Trace(**{**facts, "links": links, "stages": stages})
