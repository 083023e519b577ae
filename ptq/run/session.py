"""What every command needs before its work: the model as a network, its stream, its tokens, the store."""

import pathlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import transformers

from ptq.config.schema import Recipe
from ptq.config.scheme import check_scheme
from ptq.data.sampling import Tokens, sample_tokens
from ptq.files.scratch import remove_stale
from ptq.files.source_digest import package_digest
from ptq.files.store import Store, store_of
from ptq.models.loading import LoadedModel, load
from ptq.network.block_stream import BlockStream
from ptq.network.links import Trace, describe, trace_links
from ptq.network.network import Network, build_network
from ptq.run.journal import Journal


@dataclass
class Session:
    """A loaded model, ready to be streamed, with the recipe that asked for it."""

    recipe: Recipe
    journal: Journal
    loaded: LoadedModel
    network: Network
    stream: BlockStream
    store: Store

    def calibration_tokens(self) -> Tokens:
        """Draws the calibration samples of the recipe."""
        c = self.recipe.calibration
        return sample_tokens(
            self.loaded.tokenizer, self.recipe.data.calibration, c.samples, c.length, c.sampling, c.seed, c.bos,
            self.network.max_positions, "data.calibration",
        )  # fmt: skip

    def evaluation_tokens(self) -> Tokens:
        """Draws the evaluation windows of the recipe."""
        e = self.recipe.evaluation
        return sample_tokens(
            self.loaded.tokenizer, self.recipe.data.evaluation, e.windows, e.length, "contiguous", e.seed, e.bos,
            self.network.max_positions, "data.evaluation",
        )  # fmt: skip

    def key(self, tokens: Tokens) -> dict[str, object]:
        """Returns everything that hidden states and statistics of these tokens depend on, for the store.

        Sums are taken in another order by another number of threads, another processor, or another precision of products.
        """
        device = self.stream.device
        where: dict[str, object] = {"device": device.type}
        if device.type == "cpu":
            where |= {"threads": torch.get_num_threads(), "capability": torch.backends.cpu.get_cpu_capability()}
        elif device.type == "cuda":
            where |= {"gpu": torch.cuda.get_device_name(device), "tf32": torch.backends.cuda.matmul.allow_tf32}
        return {
            "source": package_digest(),
            "weights": self.loaded.fingerprint,
            "baseline": self.loaded.baseline_dtype,
            "arithmetic": self.loaded.arithmetic_dtype,
            "precision": torch.get_float32_matmul_precision(),
            "tokens": tokens.fingerprint,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            **where,
        }

    def identity(self, *tokens: Tokens) -> dict[str, object]:
        """Returns everything that the results of this recipe depend on, where its files go left out."""
        plain = {key: value for key, value in self.recipe.as_dict().items() if key not in {"outputs", "store"}}
        return {"recipe": plain, "threads": torch.get_num_threads(), "tokens": [self.key(t) for t in tokens]}

    def about(self, tokens: Tokens) -> str:
        """Returns in a few words for people what `key` stands for."""
        samples, length = tokens.ids.shape
        return f"{self.recipe.model.path}, {tokens.source}, {samples} x {length} tokens"

    def trace(self, sums: bool = False) -> dict[int, Trace]:
        """Finds the links of every block, and the sums where asked, and logs what the links allow."""
        traces = trace_links(self.network, self.stream, sums)
        for line in describe(traces):
            self.journal.note(line)
        self.journal.console.print(describe(traces)[0], markup=False)
        return traces


@contextmanager
def open_session(recipe: Recipe, journal: Journal) -> Iterator[Session]:
    """Loads the model of `recipe` and gives a `Session`; its memory-mapped files go when the context ends.

    Raises:
        UserError: for a model that cannot be loaded or a scheme that does not fit its shapes.
    """
    store = store_of(recipe, journal.say)
    store.sweep()
    remove_stale(pathlib.Path(tempfile.gettempdir()))
    with journal.phase("load"):
        loaded = load(recipe.model, recipe.execution, store)
        network = build_network(loaded.model)
    if coverage := network.coverage():
        journal.say(coverage)
    check_scheme(recipe.scheme, network.shapes, network.head_dim)
    device = device_of(recipe)
    stream = BlockStream(network, loaded.weights, device, recipe.execution.hidden_states, journal.progress)
    journal.say(
        f"{recipe.model.path}: {len(network.blocks)} blocks, {network.parameters / 1e6:.1f} M parameters, "
        f"baseline {loaded.baseline_dtype}, arithmetic {loaded.arithmetic_dtype} on {device}, weights {recipe.execution.weights}"
    )
    try:
        yield Session(recipe, journal, loaded, network, stream, store)
    finally:
        stream.close()


def device_of(recipe: Recipe) -> torch.device:
    """Returns the device that the recipe asks for; ``auto`` is CUDA where there is one."""
    name = recipe.execution.device
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
