"""KuiperLLama int8 ("version 3"): LLaMA blocks, int8 weights in groups, inputs, embedding and norms in fp32.

Expresses: weights int8 in symmetric groups of one size; inputs unquantized (its kernel multiplies fp32 inputs by
dequantized weights); the head in the same groups. The output matrix is always written apart, because the public loader misreads
the shared form, and is Q8_0 where the scheme leaves it alone; an embedding that is tied to a quantized head holds its rounded
values. Layout: METHODS.md section 9.
"""

import pathlib
import struct
from dataclasses import dataclass
from typing import BinaryIO

import torch

from ptq.config.options import option
from ptq.config.schema import SchemeConfig
from ptq.errors import UserError, nearest
from ptq.export import llama_family as family
from ptq.export.base import Exported
from ptq.export.quantized_tensors import QuantizedTensors
from ptq.files.atomic import write_atomic
from ptq.network.network import Network

BUILDS = {
    "llama2": family.Runtime(
        "kuiper", rope_base=1e4, eps=1e-5, interleaved=True, int8_inputs=False, int8_embedding=False
    ),
    "llama3": family.Runtime(
        "kuiper (build llama3)", rope_base=5e5, eps=1e-5, interleaved=False, int8_inputs=False, int8_embedding=False
    ),
    "qwen2": family.Runtime(
        "kuiper (build qwen2)", rope_base=1e6, eps=1e-6, interleaved=False, int8_inputs=False, int8_embedding=False
    ),
}
"""What each build of the runtime hard-codes."""


@dataclass(frozen=True)
class Options:
    """What reads the file.

    Attributes:
        build: the build of KuiperLLama that will read the file: its default one is llama2.
    """

    build: str = option("llama2", choices=tuple(BUILDS))


class Exporter:
    """Writes ``model.bin``."""

    filename = "model.bin"

    def __init__(self, options: Options):
        if options.build not in BUILDS:
            raise UserError(f"export.options.build: {options.build!r} is no build{nearest(options.build, BUILDS)}")
        self.runtime = BUILDS[options.build]

    def adapt(self, scheme: SchemeConfig) -> SchemeConfig:
        """Returns `scheme`: the format stores float32 scales, as the simulation does."""
        return scheme

    def check(self, scheme: SchemeConfig, network: Network) -> tuple[str, ...]:
        """Refuses other models than this build computes, and other schemes than int8 weights in groups."""
        family.check_model(network, self.runtime)
        family.check_scheme(scheme, network, self.runtime)
        config = network.model.config
        for field in ("hidden_size", "intermediate_size"):
            if getattr(config, field) % 4:
                raise UserError(
                    f"export: kuiper reads rows in fours, and the model's {field} is {getattr(config, field)}: use another format"
                )
        return ()

    def write(self, source: QuantizedTensors, path: pathlib.Path) -> Exported:
        """Writes the model, tensor by tensor."""
        self.check(source.scheme, source.network)
        shape = family.shape_of(source.scheme, source.network)
        errors: list[float | None] = []
        embedding = family.embedding_of(source)

        def fill(file: BinaryIO) -> None:
            file.write(
                struct.pack(
                    "<8i", shape.dim, shape.hidden_dim, shape.layers, shape.heads, shape.kv_heads, -shape.vocabulary,
                    shape.positions, shape.group_size,
                )
            )  # fmt: skip
            for tensors, heads in family.linears_in_order(source, shape, self.runtime.interleaved):
                family.write_linear(file, tensors, heads)
            errors.append(family.write_table(file, family.head_of(source), shape.group_size))
            for piece in (
                (embedding.dense() if embedding.spec else torch.as_tensor(embedding.weight))
                .reshape(-1)
                .split(family.PIECE)
            ):
                family.write_array(file, piece.float())
            for norm in family.norms_in_order(source):
                family.write_array(file, norm)

        write_atomic(path, family.streamed(fill))
        notes = tuple(f"the head is Q8_0: greatest error {error:.3g}" for error in errors if error is not None)
        return Exported(path, path.stat().st_size, notes)
