"""onnxruntime's ``MatMulNBits`` on CPUs, an optional extra: 4-bit weights in groups, also with inputs of 8 bits in the same groups."""

import functools
import os
from typing import Any

import torch

from quantize.codecs.packing import pack
from quantize.kernels.floating import Product, StoredWeight, group_of, lacks, register_floating
from quantize.spec.quant_spec import QuantSpec

GROUPS = (256, 128, 64, 32, 16)
"""Group sizes that it takes."""
PACKAGES = ("onnxruntime", "onnx")
FLOAT32, INT8 = 1, 4
"""Its accuracy levels: the activation as float32, or rounded to int8 by absmax in the weight's groups."""
OPSET, IR_VERSION = 17, 10
"""Versions of the ONNX file that describes the product: both are years old, so that every onnxruntime reads them."""


class MatMulNBits:
    """One session a Linear, all on one pool of threads. Codes lie packed in it."""

    name = "onnxruntime"
    rounds = True

    def refusal(
        self,
        weight: QuantSpec,
        inputs: QuantSpec | None,
        shape: tuple[int, int],
        device: torch.device,
        dtype: torch.dtype,
    ) -> str | None:
        """Integers up to 4 bits with inputs in floating point, or up to 8 with int8 inputs in the same groups."""
        if device.type != "cpu":
            return f"it runs on CPUs, not on {device.type}"
        if not weight.affine or weight.granularity not in {"channel", "tensor", "group"}:
            return "it takes integers with one scale a row or a group"
        if group_of(weight, shape[1], GROUPS) is None:
            return f"it takes groups of {', '.join(map(str, sorted(GROUPS)))}"
        if inputs is None and weight.bits > 4:
            return "it is slow above 4 bits with inputs in floating point"
        if inputs is not None and not _rounds_so(inputs, weight):
            return "it rounds inputs to int8 by absmax in the groups of the weight, and in no other way"
        if dtype not in {torch.float32, torch.bfloat16, torch.float16}:
            return f"it multiplies no {dtype}".replace("torch.", "")
        return lacks(PACKAGES, "onnxruntime")

    def held_bits(self, weight: QuantSpec, dtype: torch.dtype) -> float:
        """Packed codes in 4 or 8 bits, a float32 scale a group."""
        return _container(weight) + 32 / (weight.group_size or min(GROUPS))

    def prepare(self, weight: StoredWeight) -> Product:
        """Makes the session."""
        session, (rows, _) = _session(weight), weight.shape

        def multiply(x: torch.Tensor) -> torch.Tensor:
            if not len(x):
                return x.new_zeros(0, rows)
            wide = x.detach().float().contiguous().numpy()
            return torch.from_numpy(session.run(None, {"x": wide})[0]).to(x.dtype)

        return multiply


def _rounds_so(inputs: QuantSpec, weight: QuantSpec) -> bool:
    plain = inputs.affine and inputs.bits == 8 and inputs.symmetric and inputs.dynamic and not inputs.full_range
    same = inputs.granularity == "group" and inputs.group_size == weight.group_size
    return plain and same and inputs.clip == 1 and inputs.range == "minmax"


def _container(spec: QuantSpec) -> int:
    return 4 if spec.bits <= 4 else 8


def _session(weight: StoredWeight) -> Any:
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    spec, (rows, columns) = weight.spec, weight.shape
    group, bits = group_of(spec, columns, GROUPS) or min(GROUPS), _container(spec)
    blocks = columns // group
    # Symmetric codes count from the middle, where it expects its zero point unless it is given others.
    codes = (weight.codes().int() + 2 ** (bits - 1) if spec.symmetric else weight.codes()).to(torch.uint8)
    scale = weight.scales().repeat_interleave(blocks // weight.scales().shape[1], 1)
    tensors = {"codes": pack(codes.view(rows, blocks, group), bits), "scale": scale.contiguous()}
    zero = weight.zeros()
    if zero is not None:
        tensors["zero"] = pack(zero.repeat_interleave(blocks // zero.shape[1], 1), bits)
    node = helper.make_node(
        "MatMulNBits", ["x", *tensors], ["y"], domain="com.microsoft", K=columns, N=rows, bits=bits, block_size=group,
        accuracy_level=FLOAT32 if weight.inputs is None else INT8,
    )  # fmt: skip
    graph = helper.make_graph(
        [node], "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", rows])],
        [numpy_helper.from_array(tensor.cpu().numpy(), name) for name, tensor in tensors.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    count = threads()
    if _pool(count):
        options.use_per_session_threads = False
    else:
        options.intra_op_num_threads = count
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def threads() -> int:
    """Returns how many threads it has: torch's number where there are cores for both, or where torch's sleep when they are done; else one.

    OpenMP's threads spin for milliseconds behind each product of torch's, on the cores that these would need: with two threads on
    two cores a token took three times as long as with torch's asleep (docs/speed.md).
    """
    wanted = torch.get_num_threads()
    asleep = os.environ.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE" or os.environ.get("GOMP_SPINCOUNT") == "0"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return wanted if asleep or cores >= 2 * wanted else 1


@functools.cache
def _pool(threads: int) -> bool:
    """Makes one pool of threads for all sessions. Returns whether there is one: not where onnxruntime was used before."""
    import onnxruntime

    try:
        onnxruntime.set_global_thread_pool_sizes(threads, 1)
    except RuntimeError:
        return False
    return True


register_floating(MatMulNBits())
