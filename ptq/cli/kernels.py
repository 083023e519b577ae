"""What ``ptq show kernels`` says: who multiplies here, what each takes, and which was the fastest for what was timed."""

import pathlib
from collections.abc import Iterator

from ptq.config.schema import Recipe

ABOUT = "kernels: who multiplies in quantized Linears (docs/speed.md)."


def lines(folder: str | None = None) -> Iterator[str]:
    """Yields the kernels with what they say of themselves, then the winners among the timings that the store `folder` keeps."""
    import torch

    from ptq.files.kernel_timings import KeptTimings, timings_key
    from quantize.kernels.base import registered
    from quantize.kernels.choice import AUTO
    from quantize.kernels.floating import registered_floating

    yield ABOUT
    yield f"\n{AUTO}: the fastest here of those that can, found by a short timing for each shape and number of rows"
    yield "simulated: in floating point, the reference; packed models decode each weight at each call"
    yield "\nintegers (weights and inputs are integers; equal sums, so that the fastest changes no bit):"
    for name, integer in registered().items():
        yield f"  {name}: {_about(integer)}"
    yield "\nwhole Linears of packed models (the product of the rounded operands, to rounding):"
    for name, floating in registered_floating().items():
        yield f"  {name}: {_about(floating)}"
    kept = KeptTimings(torch.device("cpu"), pathlib.Path(folder or Recipe.store).expanduser())
    timings = kept.read()
    where = ", ".join(f"{key} {value}" for key, value in timings_key(kept.device).items() if value is not None)
    yield f"\ntimed here ({where}): {'' if timings else 'nothing yet'}"
    for what, found in sorted(timings.items()):
        order = sorted(found, key=found.__getitem__)
        yield f"  {_short(what)}: " + ", ".join(f"{name} {found[name]:.3g} ms" for name in order)


def _about(kernel: object) -> str:
    """Returns the first sentence of a kernel's docstring and what its `refusal` says that it takes."""
    own = " ".join((type(kernel).__doc__ or "").split())
    takes = " ".join((getattr(type(kernel), "refusal").__doc__ or "").split())  # noqa: B009
    return f"{own} Takes: {takes}"


def _short(what: str) -> str:
    """Returns a timing's key without the fields of a format that are at their defaults."""
    import dataclasses
    import re

    from quantize.spec.quant_spec import QuantSpec

    defaults = {f"{field.name}={field.default!r}" for field in dataclasses.fields(QuantSpec) if field.name != "bits"}

    def kept(match: "re.Match[str]") -> str:
        return "".join(("(", ", ".join(part for part in match[1].split(", ") if part not in defaults), ")"))

    return re.sub(r"QuantSpec\(([^)]*)\)", kept, what)
