"""The visitor that quantizes a block before the samples pass through it, and measures what that did to each Linear."""

import pathlib

import torch
from safetensors.torch import save_file
from torch import nn

from ptq.config.scheme import linear_specs
from ptq.files.atomic import write_atomic
from ptq.network.block_stream import Flow
from ptq.network.network import Block, Network, replace_module, weight_of
from ptq.report.results import LayerResult, Size, describe_spec
from ptq.run.session import Session
from ptq.steps._proof import Proof, prove
from ptq.steps._step import SOLVER, TRANSFORM, Plan, Step
from quantize.codecs.llm_int8 import outlier_columns
from quantize.error import relative_error, sqnr_db
from quantize.modules.simulated import QuantLinear

SAMPLED_ROWS = 128
"""Rows of the first batch on which a Linear's output error is measured."""


class QuantizeVisitor:
    """Applies the steps to each block. `layers` gathers one result a Linear, `stored` the bytes of the quantized ones.

    Every transform is proved: the block's output on real samples, before and after it, may differ by rounding only.

    Args:
        session: model and stream.
        plan: what the steps have planned with.
        steps: by name, in the order of the recipe.
        flow: the evaluation samples that will pass; the first batch is used to measure output errors.
        store: a folder for codes and scales, one file a block, or None to keep nothing.
    """

    def __init__(self, session: Session, plan: Plan, steps: dict[str, Step], flow: Flow, store: pathlib.Path | None):
        self.session, self.plan, self.flow, self.store = session, plan, flow, store
        self.transforms = {name: step for name, step in steps.items() if step.kind == TRANSFORM}
        self.solvers = [step for step in steps.values() if step.kind == SOLVER]
        self.layers: list[LayerResult] = []
        self.proofs: dict[str, Proof] = {name: Proof() for name in self.transforms}
        self.stored = 0
        self.quantized = 0
        self._modules: dict[str, nn.Module] = {}
        self._samples: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._outliers: dict[str, float] = {}
        plan.quantized = self._measure

    def enter(self, block: Block) -> None:
        """Transforms the block, then quantizes it, in place."""
        self._modules = dict(block.module.named_modules(prefix=block.name))
        witness = self.plan.samples.flow if self.plan.samples is not None else self.flow
        for name, step in self.transforms.items():
            self.proofs[name].add(*prove(name, step, block, self.session.stream, witness))
        self._samples = self._sample(block)
        for step in self.solvers:
            step.apply(block)
        self._samples = {}

    def leave(self, block: Block) -> None:
        """Writes the quantized block, and gives the originals back where the block's weights are about to go."""
        if self.store is not None:
            prefix = f"{block.name}."
            # Linears that share an input quantizer share its tensors, which safetensors refuses: each gets a copy.
            tensors = {
                prefix + key: value.clone() if ".inputs." in key else value.contiguous()
                for key, value in block.module.state_dict().items()
            }
            write_atomic(self.store / f"block-{block.index:05d}.safetensors", lambda path: save_file(tensors, path))
        if not self.session.loaded.weights.resident:
            restore(self.session.network.model, self._modules)
        self._modules = {}

    def _sample(self, block: Block) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Runs the unquantized block on the first batch; returns some rows of each Linear's input and output."""
        seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

        def keep(name: str) -> object:
            def hook(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
                inputs, outputs = args[0].flatten(0, -2), output.flatten(0, -2)
                every = max(1, len(inputs) // SAMPLED_ROWS)
                spec = linear_specs(self.plan.scheme, name).input
                if spec is not None and spec.format == "llm_int8":
                    self._outliers[name] = float(outlier_columns(inputs, spec.threshold).float().mean())
                seen[name] = inputs[::every].clone(), outputs[::every].clone()

            return hook

        handles = [module.register_forward_hook(keep(name)) for name, module in block.linears.items()]  # type: ignore[arg-type]
        try:
            _, rows = next(self.flow.slices())
            self.session.stream.call(self.flow, block, 0, self.flow.hidden[rows].to(self.session.stream.device))
        finally:
            for handle in handles:
                handle.remove()
        return seen

    def _measure(self, name: str, original: nn.Module, module: QuantLinear) -> None:
        """Adds the result of one Linear; its original weight may go after that, where it is read from disk anyway."""
        weight = weight_of(original)
        inputs, outputs = self._samples.pop(name)
        role = self.plan.roles.get(name, "")
        bits = 8 * weight.element_size()
        self.stored += module.stored_bytes()
        self.quantized += weight.numel()
        self.layers.append(
            LayerResult(
                name=name,
                role=role,
                weight=describe_spec(module.weight_spec, 16),
                weight_bits=module.bits_per_weight(),
                input=describe_spec(module.input_spec, bits),
                input_bits=module.input_spec.bits if module.input_spec else bits,
                weight_sqnr_db=round(float(sqnr_db(weight, module.weight)), 3),
                output_error=float(relative_error(outputs, module(inputs))),
                parameters=weight.numel(),
                outlier_share=self._outliers.get(name),
            )
        )
        if not self.session.loaded.weights.resident:
            original.weight = nn.Parameter(weight.to("meta"), requires_grad=False)


def restore(model: nn.Module, modules: dict[str, nn.Module]) -> None:
    """Puts every module of `modules` (by full name, parents before children) back in its place where another took it."""
    for name, module in modules.items():
        if model.get_submodule(name) is not module:
            replace_module(model, name, module)


def size_of(network: Network, visitor: QuantizeVisitor, baseline_bytes: int) -> Size:
    """Returns the bytes of the model's weights before and after.

    Args:
        network: the model, for its number of parameters.
        visitor: the visitor that quantized it.
        baseline_bytes: bytes of a baseline weight (2 for fp16).
    """
    before = network.parameters * baseline_bytes
    after = before - visitor.quantized * baseline_bytes + visitor.stored
    bits = 8 * visitor.stored / visitor.quantized if visitor.quantized else 8.0 * baseline_bytes
    return Size(before, after, bits, visitor.quantized, network.parameters)
