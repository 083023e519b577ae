"""What a run gives to Python: metrics, tables, the quantized model, pictures."""

import functools
import pathlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ptq.errors import UserError
from ptq.files.bounded import parse_json
from ptq.run.kept.identity import METRICS

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class Picture:
    """A picture of a run, which a notebook shows.

    Attributes:
        path: the PNG file.
    """

    path: pathlib.Path

    def _repr_png_(self) -> bytes:
        """What a notebook shows."""
        return self.path.read_bytes()


@dataclass
class Result:
    """A finished run.

    Attributes:
        folder: where its files are.
        held: the quantized model and its tokenizer where this process made them, else None.
        why_not: why there is no model in memory, or "".
    """

    folder: pathlib.Path
    held: tuple[Any, Any] | None = field(default=None, repr=False)
    why_not: str = ""

    @functools.cached_property
    def metrics(self) -> dict[str, Any]:
        """What metrics.json holds."""
        found: dict[str, Any] = parse_json((self.folder / METRICS).read_text(encoding="utf-8"))
        return found

    @property
    def model(self) -> Any:
        """The quantized model, simulated, ready for ``generate``.

        Raises:
            UserError: when it is not in memory: the run was finished earlier, or its weights are on disk.
        """
        if self.held is None:
            raise UserError(f"model: {self.why_not or 'not in memory'}: run again with force=True")
        return self.held[0]

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer. Raises `UserError` as `model`."""
        self.model  # noqa: B018 - raises with the reason
        return self.held[1] if self.held is not None else None

    @functools.cached_property
    def layers(self) -> "pandas.DataFrame":
        """One row a quantized Linear: what layers.csv holds."""
        import pandas

        return pandas.read_csv(self.folder / "layers.csv", keep_default_na=True)

    @functools.cached_property
    def tensors(self) -> "pandas.DataFrame":
        """One row a kind of tensor: its format, how many modules have it, its share of the parameters."""
        import pandas

        return pandas.DataFrame(self.metrics["tensors"])

    @functools.cached_property
    def windows(self) -> "pandas.DataFrame":
        """One row a window: the loss of the baseline and of the quantized model, in nats a target."""
        import pandas

        return pandas.DataFrame(self.metrics["window_losses"])

    @property
    def figures(self) -> dict[str, Picture]:
        """The run's pictures by name, such as ``errors``."""
        return {path.stem: Picture(path) for path in sorted(self.folder.glob("*.png"))}

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        import pandas

        m = self.metrics
        names = ("baseline_perplexity", "quantized_perplexity", "ratio", "difference", "kl_mean", "top1_agreement")
        rows = {name: m[name] for name in names} | {"bits_per_weight": m["size"]["bits_per_weight"]}
        return str(pandas.DataFrame({"value": rows}).to_html(float_format="{:.5g}".format))
