"""A pass that waits at every stage gives what passes that start over give."""

import pytest
import torch

from ptq.calibration.samples import Samples
from ptq.config.schema import SchemeConfig
from ptq.models.weights import ResidentWeights
from ptq.network.block_stream import BlockStream
from ptq.network.links import trace_links
from ptq.network.network import build_network
from ptq.network.staged_pass import StagedPass
from ptq.steps._step import Context, StepPlan
from ptq.steps.solvers import gptq
from ptq.testing import ARCHITECTURES, random_tiny
from quantize.modules.online import attach_input, attach_output
from quantize.spec.quant_spec import QuantSpec

INPUTS = QuantSpec(bits=8, symmetric=False, range="mse")


class Doubled(torch.nn.Module):
    """Twice what comes in."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


class Solver:
    """GPTQ of a tiny model, run as the stream's visitor."""

    def __init__(self, architecture: str, hidden_states: str = "memory", **options: object):
        self.model = random_tiny(architecture)
        self.network = build_network(self.model)
        self.stream = BlockStream(self.network, ResidentWeights(), torch.device("cpu"), hidden_states)
        # Five samples in batches of two: the last batch is shorter.
        ids = torch.randint(3, 60, (5, 12), generator=torch.Generator().manual_seed(1))
        scheme = SchemeConfig(weight=QuantSpec(bits=3, granularity="channel"), input=INPUTS)
        # What a run traces for `target: residual`; without it that target would be `original`.
        traces = trace_links(self.network, self.stream, sums=True)
        self.context = Context(self.network, self.stream, scheme, traces)
        reference = self.stream.open(ids, 2) if options.get("target", "present") != "present" else None
        self.context.samples = Samples(self.stream, self.stream.open(ids, 2), reference)
        self.step = gptq.Step(gptq.Options(**options))  # type: ignore[arg-type]

    def enter(self, block: object) -> None:
        self.step.apply(block, StepPlan(), self.context)  # type: ignore[arg-type]

    def leave(self, block: object) -> None:
        pass

    def solved(self) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Everything that the quantized model holds, and the hidden states after its last block."""
        self.stream.run([self.context.samples.flow], self)  # type: ignore[union-attr]
        state = {name: t.clone() for name, t in self.model.state_dict().items()}
        hidden = self.context.samples.flow.hidden.clone()  # type: ignore[union-attr]
        self.stream.close()
        return state, hidden


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_waiting_pass_gives_the_bits_of_a_pass_for_every_stage(architecture: str) -> None:
    once, again = Solver(architecture).solved(), Solver(architecture, hidden_states="disk").solved()
    assert once[0].keys() == again[0].keys()
    for name, tensor in once[0].items():
        assert tensor.equal(again[0][name]), name
    assert once[1].equal(again[1])


@pytest.mark.parametrize(
    ("architecture", "target"),
    [
        ("llama", "original"),
        ("llama", "residual"),
        ("opt", "residual"),
        ("gpt_neox", "residual"),
        ("mixtral", "residual"),
    ],
)
def test_every_target_gives_the_same_bits_in_one_waiting_pass(architecture: str, target: str) -> None:
    once = Solver(architecture, target=target).solved()
    separate = Solver(architecture, hidden_states="disk", target=target)
    assert all(separate.context.sums(block) for block in separate.network.blocks)
    again = separate.solved()
    assert all(tensor.equal(again[0][name]) for name, tensor in once[0].items())
    assert once[1].equal(again[1])


@pytest.mark.parametrize(("target", "outputs"), [("present", True), ("residual", True), ("residual", False)])
def test_what_acts_at_a_linear_online_acts_once_in_a_waiting_pass(target: str, outputs: bool) -> None:
    # A turn that is its own inverse could hide a second time: neither of these is one.
    solved = []
    for hidden_states in ("memory", "disk"):
        solver = Solver("llama", hidden_states=hidden_states, target=target)
        for block in solver.network.blocks:
            for name in ("self_attn.o_proj", "mlp.down_proj"):
                linear = block.module.get_submodule(name)
                attach_input(linear, torch.nn.Softshrink(0.01))
                if outputs:
                    attach_output(linear, Doubled())
        solved.append(solver.solved())
    once, again = solved
    assert all(tensor.equal(again[0][name]) for name, tensor in once[0].items())
    assert once[1].equal(again[1])


@pytest.mark.parametrize(("target", "passes"), [("present", 1), ("residual", 2)])
def test_every_batch_passes_a_block_once_for_all_its_stages(target: str, passes: int) -> None:
    # With target residual once more as it was before anything was quantized.
    solver = Solver("llama", target=target)
    norms = [block.module.input_layernorm for block in solver.network.blocks]
    seen: list[torch.nn.Module] = []
    for norm in norms:
        norm.register_forward_hook(lambda module, args, output: seen.append(module))
    solver.solved()
    assert len(seen) == 3 * passes * len(norms)


def test_a_failure_half_way_leaves_the_block_and_the_samples_as_they_were() -> None:
    solver = Solver("llama")
    samples, block = solver.context.samples, solver.network.blocks[0]
    assert samples is not None
    before = samples.flow.hidden.clone()
    expected = solver.stream.call(samples.flow, block, 0, before[:2])
    with pytest.raises(KeyError), samples.stage_by_stage(block, solver.context.stages(block)) as present:
        next(present)
        raise KeyError
    assert samples.flow.hidden.equal(before) and not samples.flow.ahead
    assert not any("forward" in vars(module) for module in block.module.modules())
    assert solver.stream.call(samples.flow, block, 0, before[:2]).equal(expected)


def test_stages_in_another_order_than_they_are_called_in_are_reported() -> None:
    solver = Solver("llama")
    block = solver.network.blocks[0]
    flow, stages = solver.context.samples.flow, solver.context.stages(block)  # type: ignore[union-attr]
    with StagedPass(solver.stream, flow, block, stages[::-1]) as paused:
        paused.advance()
        assert paused.stage == stages[-1] and not list(paused.inputs())
        with pytest.raises(RuntimeError, match="called in another order"):
            paused.finish()


def test_a_linear_that_is_never_called_does_not_hold_up_the_pass() -> None:
    solver = Solver("llama")
    block = solver.network.blocks[0]
    block.module.spare = torch.nn.Linear(4, 4)
    flow, stages = solver.context.samples.flow, solver.context.stages(block)  # type: ignore[union-attr]
    with StagedPass(solver.stream, flow, block, [*stages, (f"{block.name}.spare",)]) as paused:
        for _ in stages:
            paused.advance()
            assert len(list(paused.inputs())) == 3
        paused.advance()
        assert not list(paused.inputs())
        paused.finish()
    assert [len(x) for x in flow.ahead[block.index].values()] == [2, 2, 1]
