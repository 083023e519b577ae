"""End-to-end tuning of scales (EfficientQAT, Chen et al. 2024, section 3.3): codes stand still, and what they are multiplied by is
learned by the KL divergence of the whole network's predictions to the unquantized network's.

A solver looks at one block at a time, and the sum of what blocks lose is never seen; nor does it see other samples than those it
was fitted to. Here gradients pass through the whole quantized network, on samples of their own where there are some.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.nn.utils import parametrize

from ptq.calibration.samples import shuffled
from ptq.config.options import option, seed_option
from ptq.config.schema import SchemeConfig
from ptq.config.scheme import attention_tensors, tensor_specs
from ptq.errors import UserError
from ptq.network.block_stream import STEPS, BlockStream
from ptq.network.network import Block, replace_module, replaced_forward
from ptq.network.norms import gain_offset
from ptq.network.outside import OutsideState, set_weight
from ptq.ranks.gradient_sum import sum_gradients
from ptq.ranks.reduction import in_shares
from ptq.steps._learning import PRECISIONS, Learned, held_apart
from ptq.steps._step import Context, StepPlan, Tuner, Tuning
from quantize.codecs.registry import codec_of
from quantize.error import kl_divergence
from quantize.kernels.matmul import fast_linears
from quantize.modules.learned import TunedGain, TunedInput, TunedLinear, product_in
from quantize.modules.online import carry_online
from quantize.modules.simulated import InputQuantizer, QuantLinear
from quantize.solvers.rounding import warmed_cosine
from quantize.spec.quant_spec import QuantSpec

CHUNK = 256
"""Tokens of a sample whose logits exist at once."""
LOOKS = 8
"""How often the held out divergence is looked at, and what is kept to go on from."""
BETAS = (0.9, 0.95)
"""Of Adam: some tens of steps are averaged, since there are a hundred or so."""


@dataclass(frozen=True)
class Options:
    """How scales are learned. `calibration.tuning_samples` gives samples of their own to learn from.

    Attributes:
        steps: of Adam, each on one batch; 0 leaves everything as the solver left it.
        batch: samples of a batch.
        rate: of the logarithm of a weight's scale, at its greatest; it rises over the first eighth and falls to 0 by a cosine.
        norm_rate: of the logarithm of what the gains of the blocks' norms are multiplied by; 0 leaves them.
        input_rate: of the logarithm of a static input scale; 0 leaves them.
        held_out: one batch in so many is only looked at; what is kept is the least divergence met on these.
        precision: type of the products: ``float32``, or ``bfloat16``, which some processors multiply faster.
        seed: of the order of the batches.
    """

    steps: int = option(128, least=0)
    batch: int = option(2, least=1)
    rate: float = option(1e-3, least=0, most=0.1)
    norm_rate: float = option(0.0, least=0, most=0.1)
    input_rate: float = option(0.0, least=0, most=0.1)
    held_out: int = option(16, least=2)
    precision: str = option("float32", choices=tuple(PRECISIONS))
    seed: int = seed_option()


class Step(Tuner):
    """Learns scales of the blocks' quantized weights, and of static inputs and gains of norms where asked, by gradients of the whole network."""

    def captures(self, scheme: SchemeConfig) -> frozenset[str]:
        """Needs nothing on the way. `UserError` for what gradients do not pass, and weights that have no scales to tune."""
        specs = tensor_specs(scheme, "weight")
        others = sorted({spec.format for spec in specs if not codec_of(spec).proportional})
        if others or not specs:
            found = f"format: {others[0]!r}" if others else "weight: null"
            raise UserError(f"scheme.{found} has no integer codes whose scales steps.tune could learn: ~steps.tune")
        if self.options.input_rate and not any(map(_static, tensor_specs(scheme, "input"))):
            raise UserError(
                f"steps.tune.input_rate: {self.options.input_rate:g}, but the scheme has no static integer inputs: use 0, or "
                "scheme.input.dynamic=false"
            )
        if rounded := sorted(attention_tensors(scheme)):
            raise UserError(
                f"scheme.{rounded[0]}: rounded inside attentions, where no gradient of steps.tune passes: null, or ~steps.tune"
            )
        return frozenset()

    def passes(self, samples: int) -> tuple[int, int]:
        """Returns how many samples are learned from, each time counted, and how many are looked at."""
        options: Options = self.options
        apart, _ = held_apart(-(-samples // options.batch), options.held_out)
        return options.steps * options.batch, (1 + min(LOOKS, options.steps)) * len(apart) * options.batch

    def tune(self, context: Context, tuning: Tuning) -> StepPlan:
        """Returns what was learned: ``<Linear>|scale``, ``<Linear>|input_scale`` and ``<norm>|weight`` by full names, as they are to
        stand there.
        """
        options = self.options
        batches = -(-len(tuning.flow.ids) // options.batch)
        if batches < 2:
            raise UserError(
                f"steps.tune.batch: {options.batch} makes one batch of {len(tuning.flow.ids)} samples, with nothing to hold out: "
                "use more calibration.tuning_samples, or a lower batch"
            )
        with _tuned(context, options) as tuned, _outside_kept(context.stream):
            parameters = [p for group, _ in tuned.groups(options) for p in group]
            whole = _Whole(context, tuning, options, parameters)
            found = _learn(whole, tuned, tuning, options)
            tensors = tuned.tensors()
        context.note(
            f"tune: {len(tuned.linears)} Linears, {len(tuned.gains)} norms: held out divergence {found.before:.4g} -> "
            f"{found.after:.4g} (step {found.step} of {options.steps})"
        )
        return StepPlan(tensors, {"before": found.before, "after": found.after, "step": found.step})

    @torch.no_grad()
    def apply(self, block: Block, plan: StepPlan, context: Context) -> None:
        """Gives the block's quantized Linears their scales, their inputs theirs, and its norms their gains."""
        for name, module in block.module.named_modules(prefix=block.name):
            if isinstance(module, QuantLinear) and (scale := plan.tensors.get(f"{name}|scale")) is not None:
                module.rescale(scale)
                if (by_input := plan.tensors.get(f"{name}|input_scale")) is not None:
                    module.rescale_input(by_input)
            elif (gain := plan.tensors.get(f"{name}|weight")) is not None:
                set_weight(module, "weight", gain)


@dataclass(frozen=True)
class _Tuned:
    """What is learned: in the places of Linears, and on norms, by full name."""

    linears: Mapping[str, TunedLinear]
    inputs: Mapping[str, TunedInput]
    gains: Mapping[str, tuple[nn.Module, TunedGain]]

    def groups(self, options: Options) -> list[tuple[list[nn.Parameter], float]]:
        """Returns parameters that have one rate, and that rate."""
        scales = [linear.log_ratio for linear in self.linears.values()]
        inputs = [found.log_ratio for found in dict.fromkeys(self.inputs.values())]
        gains = [gain.log_ratio for _, gain in self.gains.values()]
        rated = ((scales, options.rate), (inputs, options.input_rate), (gains, options.norm_rate))
        return [(group, rate) for group, rate in rated if group and rate]

    @torch.no_grad()
    def tensors(self) -> dict[str, torch.Tensor]:
        """Returns what is to stand there in the end, by place."""
        scales = {f"{name}|scale": linear.scale().clone() for name, linear in self.linears.items()}
        scales |= {f"{name}|input_scale": found.scale().clone() for name, found in self.inputs.items()}
        return scales | {f"{name}|weight": norm.weight.clone() for name, (norm, _) in self.gains.items()}  # type: ignore[operator]


@contextmanager
def _tuned(context: Context, options: Options) -> Iterator[_Tuned]:
    """Inside the context what is learned stands in the network; then everything is as it was."""
    model, linears, before = context.network.model, {}, {}
    inputs: dict[str, TunedInput] = {}
    shared: dict[InputQuantizer, TunedInput] = {}
    gains: dict[str, tuple[nn.Module, TunedGain]] = {}
    try:
        for block in context.network.blocks:
            for name, module in list(block.module.named_modules(prefix=block.name)):
                if isinstance(module, QuantLinear) and module.weight_spec is not None:
                    if options.input_rate and module.inputs is not None and _static(module.inputs.spec):
                        inputs[name] = shared.get(module.inputs) or TunedInput(module.inputs)
                        shared[module.inputs] = inputs[name]
                    try:
                        linears[name] = TunedLinear(module, PRECISIONS[options.precision], inputs.get(name))
                    except ValueError as error:
                        raise UserError(f"steps.tune: {name}: {error}") from None
                    carry_online(module, linears[name])
                    before[name] = module
                    replace_module(model, name, linears[name])
                elif options.norm_rate and (offset := _gain_of(module)) is not None:
                    gains[name] = module, TunedGain(module.weight, offset)  # type: ignore[arg-type]
                    parametrize.register_parametrization(module, "weight", gains[name][1])
        yield _Tuned(linears, inputs, gains)
    finally:
        for name, module in before.items():
            replace_module(model, name, module)
        for norm, _ in gains.values():
            parametrize.remove_parametrizations(norm, "weight", leave_parametrized=False)


def _static(spec: QuantSpec) -> bool:
    """Whether an input of this format has static scales of integers."""
    return spec.affine and not spec.dynamic


def _gain_of(module: nn.Module) -> float | None:
    weight = module._parameters.get("weight")
    return None if weight is None or weight.dim() != 1 else gain_offset(module)


@contextmanager
def _outside_kept(stream: BlockStream) -> Iterator[None]:
    """Inside the context what transforms make of embedding, final norm and head is made once, and not each time that it is held."""
    changes = stream.outside
    with stream.hold_outside():
        after = OutsideState.of(stream.network)
    stream.outside = [after.put_back] if changes else []
    try:
        yield
    finally:
        stream.outside = changes


class _Whole:
    """The quantized network beside the unquantized one's final hidden states, a sample at a time; ranks share the samples of a batch."""

    def __init__(self, context: Context, tuning: Tuning, options: Options, parameters: list[nn.Parameter]):
        self._parameters, self._batch = parameters, options.batch
        self._stream, self._flow, self._target = context.stream, tuning.flow, tuning.target
        self._dtype = PRECISIONS[options.precision]
        self._head = context.network.model.get_output_embeddings()

    def __len__(self) -> int:
        return -(-len(self._flow.ids) // self._batch)

    def gradients(self, batch: int) -> None:
        """Gives the parameters the gradients of the mean over the batch's tokens of the KL divergence."""
        samples = self._samples(batch)
        sum_gradients(self._stream.world, self._parameters, samples, partial(self._passed, learn=True))
        for parameter in self._parameters:
            if parameter.grad is not None:
                parameter.grad /= len(samples) * self._flow.ids.shape[1]

    def divergence(self, batches: Sequence[int]) -> float:
        """Returns the mean over the tokens of some batches of the KL divergence."""
        samples = [sample for batch in batches for sample in self._samples(batch)]

        def totals(share: slice) -> tuple[torch.Tensor]:
            return (
                torch.tensor([self._passed(sample, learn=False) for sample in samples[share]], dtype=torch.float64),
            )

        (found,) = in_shares(self._stream.world, len(samples), totals)
        return float(found.sum()) / (len(samples) * self._flow.ids.shape[1])

    def _samples(self, batch: int) -> range:
        return range(batch * self._batch, min((batch + 1) * self._batch, len(self._flow.ids)))

    def _passed(self, sample: int, learn: bool) -> float:
        """Returns the sum over a sample's tokens of the KL divergence; with `learn` the parameters have its gradients."""
        rows = slice(sample, sample + 1)
        with torch.set_grad_enabled(learn), fast_linears():
            # A copy: blocks may write into what they are given.
            hidden = self._flow.hidden[rows].to(self._stream.device, copy=True)
            for block in self._stream.network.blocks:
                hidden = self._stream.call(self._flow, block, sample, hidden)
        total, gradient = self._head_gradient(hidden.detach(), self._target[rows], learn)
        if learn:
            hidden.backward(gradient)  # type: ignore[no-untyped-call]
        return total

    def tell(self, done: int, total: int) -> None:
        """Tells how many steps are done."""
        self._stream.progress(STEPS, done, total)

    def _head_gradient(self, hidden: torch.Tensor, target: torch.Tensor, learn: bool) -> tuple[float, torch.Tensor]:
        """Returns the divergence's sum, and its gradient by a sample's final hidden states (1, length, channels): a mean's would be too small
        for 16-bit floats.
        """
        total, gradient = 0.0, torch.zeros_like(hidden)
        with self._stream.heads() as (wanted, given), self._multiplied(), fast_linears():
            for start in range(0, hidden.shape[1], CHUNK):
                span = slice(start, min(start + CHUNK, hidden.shape[1]))
                aim = wanted(target[:, span].to(hidden))
                with torch.set_grad_enabled(learn):
                    x = hidden[:, span].detach().requires_grad_(learn)
                    logits = given(x)
                divergence, by_logits = kl_divergence(logits.detach(), aim)
                total += float(divergence.sum())
                if learn:
                    gradient[:, span] = torch.autograd.grad(logits, x, by_logits)[0]
        return total, gradient

    @contextmanager
    def _multiplied(self) -> Iterator[None]:
        """Inside the context the head multiplies in the type of the other products, and has a derivative where they are oneDNN's."""
        head = self._head
        if not isinstance(head, nn.Linear):
            yield
            return
        with replaced_forward([head], lambda _: lambda x: product_in(self._dtype, x, head.weight, head.bias)):
            yield


def _learn(whole: _Whole, tuned: _Tuned, tuning: Tuning, options: Options) -> Learned:
    """Takes the steps, from where an interrupted run has come to; leaves the parameters at the least divergence met."""
    groups = tuned.groups(options)
    parameters = [p for group, _ in groups for p in group]
    rates = [rate for _, rate in groups]
    apart, rest = held_apart(len(whole), options.held_out)
    optimizer = torch.optim.Adam([{"params": group, "lr": rate} for group, rate in groups], betas=BETAS)
    looks = {0, *(round(options.steps * k / LOOKS) for k in range(1, LOOKS + 1))}
    state = _State(parameters, optimizer, tuning.started)
    while True:
        if state.done in looks and state.looked < state.done:
            state.look(whole.divergence(apart))
            tuning.keep(state.tensors())
        if state.done >= options.steps or not parameters:
            break
        epoch, place = divmod(state.done, len(rest))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = warmed_cosine(state.done, options.steps, rate)
        whole.gradients(shuffled(rest, options.seed + epoch)[place])
        optimizer.step()
        optimizer.zero_grad()
        state.done += 1
        whole.tell(state.done, options.steps)
    return state.best()


class _State:
    """How far the steps have come, and the best met; as tensors, and out of them."""

    def __init__(
        self,
        parameters: list[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        started: Mapping[str, torch.Tensor] | None,
    ):
        self._parameters, self._optimizer = parameters, optimizer
        self.done, self.looked, self._at = 0, -1, 0
        self._before = self._least = float("inf")
        self._best = [p.detach().clone() for p in parameters]
        if started is not None:
            self._take_up(started)

    def look(self, divergence: float) -> None:
        """Notes the held out divergence of the parameters as they are."""
        if self.done == 0:
            self._before = divergence
        if divergence < self._least:
            self._best, self._least, self._at = [p.detach().clone() for p in self._parameters], divergence, self.done
        self.looked = self.done

    @torch.no_grad()
    def best(self) -> Learned:
        """Leaves the parameters at the least divergence met, and says how it fell."""
        for parameter, value in zip(self._parameters, self._best, strict=True):
            parameter.copy_(value)
        return Learned(self._before, self._least, self._at)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Returns all that going on takes."""
        facts = [self.done, self.looked, self._at, self._before, self._least]
        found = {"facts": torch.tensor(facts, dtype=torch.float64)}
        for i, (parameter, best) in enumerate(zip(self._parameters, self._best, strict=True)):
            found |= {f"{i}|value": parameter.detach(), f"{i}|best": best}
            found |= {f"{i}|{name}": tensor for name, tensor in self._optimizer.state[parameter].items()}
        return found

    @torch.no_grad()
    def _take_up(self, started: Mapping[str, torch.Tensor]) -> None:
        done, looked, at, self._before, self._least = started["facts"].tolist()
        self.done, self.looked, self._at = int(done), int(looked), int(at)
        for i, parameter in enumerate(self._parameters):
            own = {key.partition("|")[2]: t for key, t in started.items() if key.startswith(f"{i}|")}
            parameter.copy_(own.pop("value"))
            self._best[i] = own.pop("best").to(parameter.device)
            # Adam counts its steps on the CPU.
            moments = {name: t if t.dim() == 0 else t.to(parameter.device) for name, t in own.items()}
            if moments:
                self._optimizer.state[parameter] = moments
