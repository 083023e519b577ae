"""llama2.c version 2 (runq.c): LLaMA blocks, everything but the norms in int8 groups, inputs rounded to int8 at run time.

Expresses: weights int8 in symmetric groups of one size that divides both widths; inputs int8 in the same groups, dynamic.
Embedding and head are int8 in the same groups whether the scheme gives them that format or leaves them alone. Layout: METHODS.md
section 9.
"""

import pathlib
import struct
from dataclasses import dataclass
from typing import BinaryIO

from ptq.config.schema import SchemeConfig
from ptq.export import llama_family as family
from ptq.export.base import Exported
from ptq.export.llama2c_tokenizer import write_tokenizer
from ptq.export.quantized_tensors import QuantizedTensors
from ptq.files.atomic import write_atomic
from ptq.network.network import Network

MAGIC, VERSION, HEADER_BYTES = 0x616B3432, 2, 256
RUNTIME = family.Runtime("llama2c", rope_base=1e4, eps=1e-5, interleaved=True, int8_inputs=True, int8_embedding=True)


@dataclass(frozen=True)
class Options:
    """What is written.

    Attributes:
        tokenizer: write ``tokenizer.bin`` beside the model.
    """

    tokenizer: bool = True


class Exporter:
    """Writes ``model.bin``, and ``tokenizer.bin`` beside it."""

    filename = "model.bin"

    def __init__(self, options: Options):
        self.options = options

    def adapt(self, scheme: SchemeConfig) -> SchemeConfig:
        """Returns `scheme`: the format stores float32 scales, as the simulation does."""
        return scheme

    def check(self, scheme: SchemeConfig, network: Network) -> tuple[str, ...]:
        """Refuses other models than runq.c computes, and other schemes than Q8_0 throughout."""
        family.check_model(network, RUNTIME)
        family.check_scheme(scheme, network, RUNTIME)
        return ()

    def write(self, source: QuantizedTensors, path: pathlib.Path) -> Exported:
        """Writes the model, tensor by tensor, then the tokenizer."""
        self.check(source.scheme, source.network)
        shape = family.shape_of(source.scheme, source.network)
        errors: list[float | None] = []

        def fill(file: BinaryIO) -> None:
            file.write(_header(shape))
            for norm in family.norms_in_order(source):
                family.write_array(file, norm)
            errors.append(family.write_table(file, family.embedding_of(source), shape.group_size))
            for tensors, heads in family.linears_in_order(source, shape, RUNTIME.interleaved):
                family.write_linear(file, tensors, heads)
            if not shape.shared:
                errors.append(family.write_table(file, family.head_of(source), shape.group_size))

        write_atomic(path, family.streamed(fill))
        own = [error for error in errors if error is not None]
        notes = [f"embedding and head are Q8_0 too: greatest error {max(own):.3g}"] if own else []
        if self.options.tokenizer:
            notes += write_tokenizer(source.tokenizer, shape.vocabulary, path.with_name("tokenizer.bin"))
        return Exported(path, path.stat().st_size, tuple(notes))


def _header(shape: family.Shape) -> bytes:
    fields = struct.pack(
        "<Ii7iBi", MAGIC, VERSION, shape.dim, shape.hidden_dim, shape.layers, shape.heads, shape.kv_heads,
        shape.vocabulary, shape.positions, int(shape.shared), shape.group_size,
    )  # fmt: skip
    return fields.ljust(HEADER_BYTES, b"\0")
