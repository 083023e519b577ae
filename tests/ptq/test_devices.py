"""Blocks on several devices in turn, one of them a CUDA device that is not there: nothing mixes devices."""

import json

import pytest
import torch

from ptq.cli.app import main
from ptq.errors import UserError
from ptq.network.block_stream import BlockStream
from ptq.run.experiment import checked, run
from tests.ptq.test_cuda import CASES, cuda, device, make  # noqa: F401
from tests.tools.same_bits import results, same
from tests.tools.virtual_cuda import CUDA

TWO = ["cpu", str(CUDA)]
OFFLOADED = {"weights": "offloaded", "prefetch": False, "save": True}
TURNED = {"rotate": {}, "rtn": {}}
NAMES = ("nf4", "gptq, original target", "nf4, turned", "attention", "cache")


@pytest.mark.parametrize("name", NAMES)
def test_blocks_on_two_devices_in_turn_have_the_bits_of_one(cuda, tmp_path, tiny_llama, monkeypatch, name):  # noqa: F811
    scheme, steps = CASES[name.removesuffix(", turned")]
    steps = TURNED if name.endswith("turned") else steps
    seen, call = set(), BlockStream.call
    # Calibration multiplies by oneDNN on a CPU and by torch elsewhere: rounding that would hide what is looked for here.
    monkeypatch.setattr("quantize.kernels.matmul.by_onednn", lambda *tensors: False)

    def noted(self, flow, block, batch, hidden):
        seen.add((block.index, hidden.device.type))
        return call(self, flow, block, batch, hidden)

    one = run(make(tmp_path / "one", tiny_llama, scheme, steps, execution={"device": "cpu", **OFFLOADED}))
    monkeypatch.setattr(BlockStream, "call", noted)
    two = run(make(tmp_path / "two", tiny_llama, scheme, steps, execution={"devices": TWO, **OFFLOADED}))
    assert seen == {(0, "cpu"), (1, "cuda"), (2, "cpu"), (3, "cuda")}
    (a, layers, theirs), (b, again, ours) = results(one, "identity"), results(two, "identity")
    assert {key for key in a if a[key] != b[key]} <= {"recipe", "environment", "baseline"}
    same(({}, layers, theirs), ({}, again, ours))


def test_the_next_block_is_read_into_its_own_device_while_this_one_computes(tmp_path, tiny_llama, monkeypatch):
    places = []
    from ptq.models import weights

    ahead = weights.ReadAhead

    def noted(names, read, place):
        places.append((names[0].split(".")[2], place))
        return ahead(names, read, torch.device("cpu"))

    monkeypatch.setattr(weights, "ReadAhead", noted)
    scheme, steps = CASES["nf4"]
    execution = {"devices": ["cpu:0", "cpu"], "weights": "offloaded"}
    run(make(tmp_path, tiny_llama, scheme, steps, execution=execution))
    assert set(places) == {("1", torch.device("cpu")), ("2", torch.device("cpu:0")), ("3", torch.device("cpu"))}


@pytest.mark.parametrize(("name", "before", "words"), [
    ("nf4", {"rotate": {"seeds": 2}}, "steps.rotate plans for the whole network first"),
    ("nf4", {"prefix": {}}, "steps.prefix plans for the whole network first"),
])  # fmt: skip
def test_what_sees_the_whole_network_first_is_refused_on_several_devices(tmp_path, tiny_llama, name, before, words):
    scheme, steps = CASES[name]
    steps = {**before, **steps}
    execution = {"devices": ["cpu", "cpu"], "weights": "offloaded"}
    with pytest.raises(UserError, match=rf"execution.devices: cpu, cpu, but .*({words}).*: use execution.device"):
        checked(make(tmp_path, tiny_llama, scheme, steps, execution=execution))


@pytest.mark.parametrize(("execution", "words"), [
    ({"devices": ["cpu", "tpu"], "weights": "offloaded"}, r"execution.devices\[1\]: 'tpu' is no device: use cpu, cuda or cuda:0"),
    ({"devices": ["cpu", "cuda:0"], "weights": "offloaded"}, r"execution.devices\[1\]: 'cuda:0', but this machine has no CUDA device: use cpu"),
    ({"devices": ["cpu"]}, "execution.devices: cpu, but execution.weights is resident, on one device: use offloaded"),
    ({"devices": ["cpu"], "device": "cuda", "weights": "offloaded"}, "execution.device: 'cuda', but execution.devices begins with 'cpu': use auto"),
])  # fmt: skip
def test_devices_that_are_not_there_are_refused_with_what_is(tmp_path, tiny_llama, execution, words):
    scheme, steps = CASES["nf4"]
    execution = {"device": "auto", **execution}
    with pytest.raises(UserError, match=words):
        checked(make(tmp_path, tiny_llama, scheme, steps, execution=execution))


def test_a_number_beyond_those_that_are_there_is_refused_with_the_last_one(tmp_path, tiny_llama, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    scheme, steps = CASES["nf4"]
    recipe = make(
        tmp_path, tiny_llama, scheme, steps, execution={"devices": ["cuda:0", "cuda:2"], "weights": "offloaded"}
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe.as_dict()))
    assert main(["run", "--config", str(path)]) == 2
    assert (
        capsys.readouterr().err
        == "error: execution.devices[1]: 'cuda:2', but this machine has 2 CUDA devices: use cuda:1\n"
    )
