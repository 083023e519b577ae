"""The visitor that quantizes a block before the samples pass through it, and measures what that did to each Linear."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from ptq.config.scheme import attention_specs, linear_specs
from ptq.errors import UserError
from ptq.network.attention import AttentionQuantizers
from ptq.network.block_stream import Flow
from ptq.network.network import Block, Network, weight_of
from ptq.network.outside import outside_weights, untied_parameters
from ptq.network.replaced import hooked, modules_of, restore
from ptq.report.results import LayerResult, Size, describe_cached, describe_spec
from ptq.run.kept.block_file import Unbuildable, read_figures, rebuild, write_block
from ptq.steps._attention import quantize_attention
from ptq.steps._proof import Proof, output_before, prove
from ptq.steps._step import SOLVER, TRANSFORM, Context, Step
from quantize.codecs.llm_int8 import outlier_columns
from quantize.codecs.registry import codec_of
from quantize.error import relative_error, sqnr_db
from quantize.kernels.base import SIMULATED
from quantize.kernels.choice import Choice
from quantize.modules.online import online_bytes, output_of
from quantize.modules.simulated import InputQuantizer, QuantLinear

STARVED = 8
"""How many experts with few tokens are named in a line."""
SAMPLED_TOKENS = 512
"""Tokens that pass a block for its Linears' output errors: more are a share of every point of a sweep, and tell the same."""
SAMPLED_ROWS = 128
"""Rows of these on which a Linear's output error is measured."""


class QuantizeVisitor:
    """Applies the steps to each block. `layers` gathers one result a Linear, `stored` the bytes of the quantized ones.

    Every transform is proved: the block's output on real samples, before and after it, may differ by rounding only.
    Attentions are quantized here, whatever the solver. Results describe the modules that stand in the block afterwards.

    Args:
        context: what the steps see, with their plans.
        steps: by name, in the order of the recipe.
        flow: the evaluation samples that will pass; output errors are measured on the beginning of the first batch. What lies
            outside the blocks is read for that: held by the caller, it is not read twice.
        kernels: who multiplies in the quantized Linears, for these samples and for those that later blocks are calibrated on.
    """

    def __init__(self, context: Context, steps: Mapping[str, Step], flow: Flow, kernels: Choice | None = None):
        self.context, self.flow = context, flow
        self._sampled = _beginning(context, flow)
        self.kernels = Choice(SIMULATED) if kernels is None else kernels
        self.transforms = {name: step for name, step in steps.items() if step.kind == TRANSFORM}
        self.solvers = {name: step for name, step in steps.items() if step.kind == SOLVER}
        self.layers: list[LayerResult] = []
        self.attentions: dict[str, dict[str, str]] = {}
        self.proofs: dict[str, Proof] = {name: Proof() for name, step in self.transforms.items() if step.proved}
        self.stored = 0
        self.quantized = 0
        self.unbuildable = ""
        self._modules: dict[str, nn.Module] = {}
        self._samples: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._outliers: dict[str, float] = {}
        self._from = 0
        self._experts: dict[str, str] = {}
        context.replaced, context.rescaled = self._measure, self._rescaled

    def enter(self, block: Block) -> None:
        """Transforms the block, then quantizes it, in place."""
        self._from, self._modules = len(self.layers), modules_of(block)
        self._experts = {name: expert for expert, names in block.experts.items() for name in names}
        self._transform(block)
        self._samples = self._sample(block)
        if self.solvers:
            quantize_attention(self.context, block)
        for name, step in self.solvers.items():
            step.apply(block, self.context.plans[name], self.context)
        self._samples = {}
        self._note_starved(block)
        self.stored += online_bytes(self.context.module(name) for name in block.linears)
        self._describe_attentions(block)

    def leave(self, block: Block) -> None:
        """Gives the originals back where the block's weights are about to go."""
        if not self.context.stream.weights.resident:
            restore(self.context.network.model, self._modules)
        self._modules = {}

    def write(self, block: Block, path: pathlib.Path) -> None:
        """Writes the finished block with its results."""
        write_block(block, path, self.figures(block))

    def figures(self, block: Block) -> dict[str, Any]:
        """Returns the results of the finished block, and the sums so far, as JSON holds them."""
        names = [name for name in self.attentions if name.startswith(f"{block.name}.")]
        return {
            "layers": [dataclasses.asdict(layer) for layer in self.layers[self._from :]],
            "attentions": {name: self.attentions[name] for name in names},
            "proofs": {name: dataclasses.asdict(proof) for name, proof in self.proofs.items()},
            "stored": self.stored,
            "quantized": self.quantized,
            "kernels": {"ran": self.kernels.ran, "refused": self.kernels.refused},
        }

    def read(self, block: Block, path: pathlib.Path) -> None:
        """Takes up a finished block: its results and, where weights are resident, its modules."""
        if self.context.stream.weights.resident and not self.unbuildable:
            try:
                rebuild(block, path, self.context.network, self.context.stream.device)
            except Unbuildable as error:
                self.unbuildable = str(error)
            for module in block.module.modules():
                if isinstance(module, QuantLinear):
                    module.use_kernels(self.kernels)
        self.take_up(read_figures(path))

    def take_up(self, figures: Mapping[str, Any]) -> None:
        """Takes up the results of a finished block: what `figures` gave."""
        self.layers += [LayerResult(**layer) for layer in figures["layers"]]
        self.attentions |= figures["attentions"]
        self.proofs = {name: Proof(**proof) for name, proof in figures["proofs"].items()}
        self.stored, self.quantized = figures["stored"], figures["quantized"]
        self.kernels.ran, self.kernels.refused = figures["kernels"]["ran"], figures["kernels"]["refused"]

    def _transform(self, block: Block) -> None:
        """Applies the transforms in order, each proved in the basis that the residual stream has before it."""
        if not self.transforms:
            return
        samples, plans = self.context.samples, self.context.plans
        witness = samples.flow if samples is not None else self.flow
        _, rows = next(witness.slices())
        hidden = witness.hidden[rows].to(self.context.stream.device)
        before = None
        if samples is not None and samples.unquantized is not None:
            before = samples.unquantized(block, partial(output_before, block, self.context, witness, hidden))
            witness.ahead[block.index] = {0: before}
        stages = self._stages(hidden, from_first=before is not None)
        for (name, step), stage in zip(self.transforms.items(), stages, strict=True):
            if not step.proved:
                step.apply(block, plans[name], self.context)
                continue
            error, tolerance = prove(name, step, plans[name], block, self.context, witness, stage, before)
            self.proofs[name].add(error, tolerance, block.name)
            before = None
        for name, step in self.transforms.items():
            step.finish(block, plans[name], self.context)

    def _stages(self, hidden: torch.Tensor, from_first: bool) -> list[torch.Tensor]:
        """Returns `hidden` (samples, length, channels) in the basis before each transform; it comes in the first one's, or as all
        of them leave it.
        """
        bases = [self.context.plans[name].basis for name in self.transforms]
        stages = [hidden]
        if from_first:
            for basis in bases[:-1]:
                stages.append(stages[-1] if basis is None else basis.forward(stages[-1]))
            return stages
        for basis in reversed(bases):
            stages.append(stages[-1] if basis is None else basis.back(stages[-1]))
        return stages[:0:-1]

    def _describe_attentions(self, block: Block) -> None:
        """Notes what stands in the block's attentions. Raises `UserError` where the scheme asks for more than stands there."""
        for name in self.context.attentions.get(block.index, []):
            module = self.context.module(name)
            held = [child for child in module.children() if isinstance(child, AttentionQuantizers)]
            found = {t: q.spec for child in held for t, q in child.quantizers.items() if isinstance(q, InputQuantizer)}
            words = {tensor: describe_spec(spec, 32) for tensor, spec in found.items()}
            words |= {t: describe_cached(c) for child in held if child.cache for t, c in child.cache.items()}
            missing = sorted(set(attention_specs(self.context.scheme, name)) - set(words)) if self.solvers else []
            if missing:
                raise UserError(f"scheme.{missing[0]}: {name} was left without a quantizer for it: report this")
            if words:
                self.attentions[name] = words

    def _sample(self, block: Block) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Runs the unquantized block on the first tokens; returns some rows of each Linear's input and output."""
        seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

        def keep(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
                inputs, outputs = args[0].flatten(0, -2), output.flatten(0, -2)
                every = max(1, len(inputs) // SAMPLED_ROWS)
                spec = linear_specs(self.context.scheme, name).input
                if spec is not None and spec.format == "llm_int8":
                    samples = args[0] if args[0].dim() > 2 else args[0][None]
                    columns = torch.stack([outlier_columns(sample, spec.threshold) for sample in samples])
                    self._outliers[name] = float(columns.float().mean())
                seen[name] = inputs[::every].clone(), outputs[::every].clone()

            return hook

        _, rows = next(self._sampled.slices())
        hidden = self.flow.hidden[rows, : self._sampled.ids.shape[1]].to(self.context.stream.device)
        with hooked(module.register_forward_hook(keep(name)) for name, module in block.linears.items()):
            self.context.stream.call(self._sampled, block, 0, hidden)
        return seen

    def _rescaled(self, name: str, scale: torch.Tensor) -> None:
        """Divides the rows of a Linear's input as the step has divided what it reads."""
        if name in self._samples:
            inputs, outputs = self._samples[name]
            self._samples[name] = inputs / scale.to(inputs), outputs

    def _tokens(self, name: str) -> tuple[int | None, int | None]:
        """Returns how many calibration tokens the router sent to the Linear's expert, and how many reached the Linear."""
        context = self.context
        shown = None if context.samples is None else context.samples.flow.experts
        if shown is not None and name in self._experts:
            found = shown.of(self._experts[name])
            if found is not None:
                return found
        seen = None if context.statistics is None else context.statistics.inputs.get(name)
        return None, None if seen is None else seen.count

    def _note_starved(self, block: Block) -> None:
        """Says which experts have seen fewer tokens than they have channels: their moments are not of full rank."""
        own = {layer.name: layer for layer in self.layers[self._from :]}
        few: dict[str, int] = {}
        widths = self.context.network.shapes if block.experts else {}
        for expert, names in block.experts.items():
            layer = next((own[name] for name in names if name in own), None)
            if layer is not None and layer.routed is not None and (layer.tokens or 0) < widths[layer.name][1]:
                few[expert] = layer.tokens or 0
        if few:
            listed = ", ".join(
                f"{name.removeprefix(f'{block.name}.')} ({count})" for name, count in [*few.items()][:STARVED]
            )
            more = f" and {len(few) - STARVED} more" if len(few) > STARVED else ""
            self.context.note(
                f"{block.name}: {len(few)} of {len(block.experts)} experts saw fewer calibration tokens than they have channels: "
                f"{listed}{more}: calibration.experts=all or at-least-N shows them more"
            )

    def _measure(self, name: str, original: nn.Module, module: QuantLinear) -> None:
        """Adds the result of one Linear; its original weight may go after that, where it is read from disk anyway."""
        weight = weight_of(original)
        seen = self._samples.pop(name, None)
        role = self.context.roles.get(name, "")
        routed, tokens = self._tokens(name)
        bits = 8 * weight.element_size()
        module.use_kernels(self.kernels)
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
                output_error=None if seen is None else float(relative_error(seen[1], output_of(module, seen[0]))),
                parameters=weight.numel(),
                outlier_share=self._outliers.get(name),
                tokens=tokens,
                routed=routed,
            )
        )
        if not self.context.stream.weights.resident:
            original.weight = nn.Parameter(weight.to("meta"), requires_grad=False)


def _beginning(context: Context, flow: Flow) -> Flow:
    """Returns how the model calls blocks for the first `SAMPLED_TOKENS` of the flow's first batch; all of it in a mixture, whose
    experts see few of them.
    """
    _, rows = next(flow.slices())
    ids = flow.ids[rows]
    few = ids[: max(1, SAMPLED_TOKENS // ids.shape[1]), :SAMPLED_TOKENS]
    if few.shape == ids.shape or any(block.mixtures for block in context.network.blocks):
        return flow
    return context.stream.open(few, len(few), flow.exact)


def check_quantized(flow: Flow) -> None:
    """Raises `UserError` where NaN or inf has come out of the quantized blocks that the samples have passed."""
    if (place := flow.first_nonfinite()) is not None:
        raise UserError(
            f"NaN or inf in the quantized model from {place} on: try model.dtype=float32, or more bits there"
        )


def size_of(network: Network, visitor: QuantizeVisitor, baseline_bytes: int) -> Size:
    """Returns the bytes of the model's weights before and after.

    Args:
        network: the model, for its number of parameters.
        visitor: the visitor that quantized it.
        baseline_bytes: bytes of a baseline weight (2 for fp16).
    """
    before = network.parameters * baseline_bytes
    outside = [w for w in outside_weights(visitor.context.scheme, network) if w.spec is not None and not w.tied]
    stored = visitor.stored + sum(codec_of(w.spec).layout_bytes(w.shape, w.spec) for w in outside if w.spec is not None)
    quantized = visitor.quantized + sum(w.parameters for w in outside)
    untied = (
        sum(network.model.get_parameter(name).numel() for name in untied_parameters(network.model)) * baseline_bytes
    )
    after = before + untied - quantized * baseline_bytes + stored
    bits = 8 * stored / quantized if quantized else 8.0 * baseline_bytes
    return Size(before, after, untied, bits, quantized, network.parameters)
