"""What two runs must have the same bits of."""

import json

import torch
from safetensors.torch import load_file


def results(folder, *but):
    """Everything that must have the same bits, fields of metrics.json named in `but` left out beside seconds, memory and date."""
    metrics = json.loads((folder / "metrics.json").read_text())
    for field in ("seconds", "memory", "made", *but):
        del metrics[field]
    saved = {p.name: load_file(p) for p in sorted((folder / "quantized").glob("block-*.safetensors"))}
    return metrics, (folder / "layers.csv").read_text(), saved


def same(a, b):
    """Asserts that two `results` are equal."""
    assert a[:2] == b[:2]
    assert a[2].keys() == b[2].keys()
    for name, tensors in a[2].items():
        assert tensors.keys() == b[2][name].keys()
        assert all(torch.equal(t, b[2][name][key]) for key, t in tensors.items()), name
