"""What every command needs before its work: the model as a network, its stream, its tokens, the store."""

import dataclasses
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from ptq.config.schema import Recipe
from ptq.config.scheme import check_scheme
from ptq.data.sampling import Draw, Tokens, check_length
from ptq.errors import UserError
from ptq.evaluation.tasks.task_files import read_tasks
from ptq.files.scratch import remove_stale
from ptq.files.store import Store, store_of
from ptq.models.loading import LoadedModel
from ptq.models.shared import Shared
from ptq.network.block_stream import BlockStream, Flow
from ptq.network.experts.routing import ALL, ROUTED
from ptq.network.links import Trace, load_traces, save_traces, trace_links
from ptq.network.network import Network, build_network
from ptq.network.outside import check_outside
from ptq.ranks.ranked_store import ranked
from ptq.ranks.world import ALONE, World
from ptq.run.kept.identity import digest_of, machine
from ptq.run.kept.kept_pass import RESUME, KeptPass
from ptq.run.record.journal import Journal


@dataclass
class Session:
    """A loaded model, ready to be streamed, with the recipe that asked for it."""

    recipe: Recipe
    journal: Journal
    loaded: LoadedModel
    network: Network
    stream: BlockStream
    store: Store
    folder: pathlib.Path | None = None
    shared: Shared = field(default_factory=Shared)

    @property
    def world(self) -> World:
        """The ranks of the run."""
        return self.stream.world

    def calibration_tokens(self) -> Tokens:
        """Draws the calibration samples of the recipe, once."""
        return self._tokens(calibration_draw(self.recipe))

    def tuning_tokens(self) -> Tokens:
        """Draws what a step learns from on the finished network, once: the samples after the solver's, or these."""
        c = self.recipe.calibration
        return self.seen_tokens().since(c.samples) if c.tuning_samples else self.calibration_tokens()

    def seen_tokens(self) -> Tokens:
        """Draws all that the run learns from, once: calibration samples and what is tuned on."""
        return self._tokens(seen_draw(self.recipe))

    def evaluation_tokens(self) -> Tokens:
        """Draws the evaluation windows of the recipe, once."""
        return self._tokens(evaluation_draw(self.recipe))

    def _tokens(self, draw: Draw) -> Tokens:
        check_length(draw.length, self.network.max_positions, draw.field)
        # Each rank by itself: one may know the windows already that another draws.
        return self.shared.tokens(self.recipe.model, draw, store_of(self.recipe))

    def kept(
        self,
        what: str,
        key: Mapping[str, object] | str,
        flows: list[Flow],
        visitor: Any,
        sum_of: Callable[[pathlib.Path], int] | None = None,
    ) -> KeptPass | None:
        """Returns what the pass `what` keeps of its finished blocks in the run's folder, None for a session without one."""
        if self.folder is None:
            return None
        digest = key if isinstance(key, str) else digest_of(key)
        return KeptPass(self.folder / RESUME / what, digest, flows, visitor, self.journal.say, self.world, sum_of)

    def traces(self, sums: bool) -> dict[int, Trace]:
        """Returns the links of every block, and the `sums` where asked, out of the store where they were found before."""
        found = None if sums else self.store.find("links", self._traces_key(True))
        if (traces := self._read_traces(found)) is not None:
            return traces
        key = self._traces_key(sums)
        with self.store.found_or_mine("links", key, lambda line: self.journal.say(f"links: {line}")) as found:
            if (traces := self._read_traces(found)) is None:
                traces = trace_links(self.network, self.stream, sums)
                self.keep_traces(traces, sums)
        return traces

    def known_traces(self, sums: bool) -> dict[int, Trace] | None:
        """Returns the links of every block where they were found before, with the `sums` where asked, else None."""
        found = self.store.find("links", self._traces_key(True))
        if found is None and not sums:
            found = self.store.find("links", self._traces_key(False))
        return self._read_traces(found)

    def keep_traces(self, traces: Mapping[int, Trace], sums: bool) -> None:
        """Keeps what was found, with `sums` in it or without, for `traces`."""
        key = self._traces_key(sums)
        self.store.add("links", key, lambda path: save_traces(traces, path), self.recipe.model.path)

    def _traces_key(self, sums: bool) -> dict[str, object]:
        known: dict[str, object] = {"weights": self.loaded.fingerprint, "arithmetic": self.loaded.arithmetic_dtype}
        return {**known, **machine(self.stream.device, self.stream.devices), "sums": sums}

    def _read_traces(self, path: pathlib.Path | None) -> dict[int, Trace] | None:
        if path is None:
            return None
        try:
            return load_traces(path)
        except ValueError as error:
            self.store.made_again("links", str(error))
            return None

    def identity(self, sources: Mapping[str, str]) -> str:
        """Returns `identity_of` this run; `sources` are digests of what comes from outside, by step's name."""
        tokens = (self.seen_tokens(), self.evaluation_tokens())
        return identity_of(self.recipe, sources, self.loaded.fingerprint, tokens, self.stream.device)

    def key(self, tokens: Tokens) -> dict[str, object]:
        """Returns everything that hidden states and statistics of these tokens depend on, for the store."""
        return {
            "weights": self.loaded.fingerprint,
            "baseline": self.loaded.baseline_dtype,
            "arithmetic": self.loaded.arithmetic_dtype,
            "tokens": tokens.fingerprint,
            **({} if self.stream.experts == ROUTED else {"experts": self.stream.experts}),
            **machine(self.stream.device, self.stream.devices),
        }

    def about(self, tokens: Tokens) -> str:
        """Returns in a few words for people what `key` stands for."""
        samples, length = tokens.ids.shape
        return f"{self.recipe.model.path}, {tokens.source}, {samples} x {length} tokens"


def calibration_draw(recipe: Recipe) -> Draw:
    """Returns which calibration samples a recipe asks for."""
    c = recipe.calibration
    return Draw(recipe.data.calibration, c.samples, c.length, c.sampling, c.seed, c.bos, "data.calibration")


def seen_draw(recipe: Recipe) -> Draw:
    """Returns which windows a run learns from in any way: its calibration samples, and what is tuned on after them."""
    c = recipe.calibration
    least = c.samples + 1 if c.tuning_samples != c.most_tuning_samples else None
    return dataclasses.replace(calibration_draw(recipe), samples=c.samples + c.most_tuning_samples, least=least)


def evaluation_draw(recipe: Recipe) -> Draw:
    """Returns which evaluation windows a recipe asks for."""
    e = recipe.evaluation
    return Draw(recipe.data.evaluation, e.windows, e.length, "contiguous", e.seed, e.bos, "data.evaluation")


def identity_of(
    recipe: Recipe, sources: Mapping[str, str], weights: str, tokens: Sequence[Tokens], device: torch.device
) -> str:
    """Returns a digest of everything that a run's results depend on; where its files go and its name make no difference.

    Args:
        recipe: with its defaults filled in.
        sources: digests of the source of steps from outside, by name.
        weights: the model's fingerprint.
        tokens: what the run learns from, and evaluation windows.
        device: where the arithmetic happens.
    """
    plain = {
        key: value for key, value in recipe.as_dict().items() if key not in {"outputs", "store", "name", "trackers"}
    }
    prints = [t.fingerprint for t in tokens]
    plain["tasks"] = {task.name: task.digest for task in read_tasks(recipe.evaluation.tasks)}
    return digest_of(
        {"recipe": plain, "sources": dict(sources), "weights": weights, "tokens": prints, **machine(device)}
    )


def known_identity(recipe: Recipe, sources: Mapping[str, str], shared: Shared | None = None) -> str:
    """Returns `identity_of` a run before its model is loaded: its windows and its weights' digest are enough, and kept.

    Raises:
        UserError: for a model or a text that cannot be had.
    """
    store, shared = store_of(recipe), shared or Shared()
    tokens = [shared.tokens(recipe.model, draw(recipe), store) for draw in (seen_draw, evaluation_draw)]
    return identity_of(recipe, sources, shared.fingerprint(recipe.model, store), tokens, device_of(recipe))


@contextmanager
def open_session(
    recipe: Recipe,
    journal: Journal,
    folder: pathlib.Path | None = None,
    shared: Shared | None = None,
    world: World = ALONE,
) -> Iterator[Session]:
    """Loads the model of `recipe` and gives a `Session`; its memory-mapped files go when the context ends.

    `folder` is the run's, where passes keep what an interrupted one is taken up from; `shared` has what earlier runs of this
    process have loaded; `world` has the ranks that share the samples.

    Raises:
        UserError: for a model that cannot be loaded or a scheme that does not fit its shapes.
    """
    store, shared = store_of(recipe, journal.say), shared or Shared(models=False)
    store.sweep()
    remove_stale(pathlib.Path(tempfile.gettempdir()))
    with journal.phase("load"):
        loaded = shared.load(recipe.model, recipe.execution, store)
        network = build_network(loaded.model)
    for note in loaded.notes:
        journal.say(f"tokenizer: {note}")
    if coverage := network.coverage():
        journal.say(coverage)
    check_scheme(recipe.scheme, network.shapes, network.head_dim)
    check_outside(recipe.scheme, network)
    device = device_of(recipe)
    check_experts(recipe, network)
    stream = BlockStream(
        network, loaded.weights, device, recipe.execution.hidden_states, journal.progress, world, devices_of(recipe)
    )
    stream.experts = recipe.calibration.experts
    journal.say(
        f"{recipe.model.path}: {len(network.blocks)} blocks, {network.parameters / 1e6:.1f} M parameters, "
        f"baseline {loaded.baseline_dtype}, arithmetic {loaded.arithmetic_dtype} on {device}, weights {recipe.execution.weights}"
    )
    try:
        yield Session(recipe, journal, loaded, network, stream, ranked(store, world), folder, shared)
    finally:
        stream.close()


def check_experts(recipe: Recipe, network: Network) -> None:
    """Raises `UserError` where experts are to see tokens that cannot be shown to them."""
    asked = recipe.calibration.experts
    mixtures = [(block, mixture) for block in network.blocks for mixture in block.mixtures]
    if asked == ROUTED:
        return
    if not mixtures:
        raise UserError(
            f"calibration.experts: {asked!r}, but {recipe.model.path} has no mixture of experts: use routed"
        )
    for block, mixture in mixtures:
        name = f"{block.name}.{mixture.holders[0]}"
        if mixture.routing is None:
            raise UserError(
                f"calibration.experts: {asked!r}, but how {name} hands out tokens is not seen: use routed, and more samples"
            )
        if asked != ALL and mixture.routing.scores is None:
            raise UserError(f"calibration.experts: {asked!r}, but the scores of {name} are not seen: use all or routed")


def device_of(recipe: Recipe) -> torch.device:
    """Returns the device that the recipe asks for; ``auto`` is CUDA where there is one.

    Raises:
        UserError: for a device that this machine has not.
    """
    name, several = recipe.execution.device, devices_of(recipe)
    if several:
        if name not in {"auto", *recipe.execution.devices[:1]}:
            raise UserError(
                f"execution.device: {name!r}, but execution.devices begins with {recipe.execution.devices[0]!r}: use auto"
            )
        return several[0]
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return _device("execution.device", name, "auto, ")


def devices_of(recipe: Recipe) -> tuple[torch.device, ...]:
    """Returns the devices that blocks are computed on in turn, none where a recipe names none.

    Raises:
        UserError: for one that this machine has not, or where the weights stay in memory.
    """
    x = recipe.execution
    if x.devices and x.weights != "offloaded":
        raise UserError(
            f"execution.devices: {', '.join(x.devices)}, but execution.weights is {x.weights}, on one device: use offloaded"
        )
    return tuple(_device(f"execution.devices[{i}]", name) for i, name in enumerate(x.devices))


def _device(field: str, name: str, others: str = "") -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in {"cpu", "cuda"}:
        raise UserError(f"{field}: {name!r:.80} is no device: use {others}cpu, cuda or cuda:0")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"{field}: {name!r}, but this machine has no CUDA device: use {others.replace(', ', ' or ')}cpu"
        )
    if device.type == "cuda" and (device.index or 0) >= (there := torch.cuda.device_count()) > 0:
        raise UserError(f"{field}: {name!r}, but this machine has {there} CUDA devices: use cuda:{there - 1}")
    return device
