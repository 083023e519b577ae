"""Tables of levels: one copy a device."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from quantize.codecs.table import Table


def test_a_table_is_made_once_a_device():
    table = Table((0.0, 0.5, 1.0))
    first = table.on(torch.device("cpu"))
    assert table.on(torch.device("cpu")) is first and first.tolist() == [0.0, 0.5, 1.0]
    assert table.on(torch.device("meta")).is_meta


def test_a_table_made_in_inference_mode_serves_training_too():
    table = Table((1.0, 2.0))
    with torch.inference_mode():
        table.on(torch.device("cpu"))
    weight = torch.ones(2, requires_grad=True)
    (table.on(torch.device("cpu")) * weight).sum().backward()
    assert weight.grad.tolist() == [1.0, 2.0]


def test_a_tracers_stand_in_is_not_kept():
    table = Table((1.0, 2.0))
    with FakeTensorMode():
        table.on(torch.device("cpu"))
    assert type(table.on(torch.device("cpu"))) is torch.Tensor
