"""Bytes read and written, and the memory of it, of GPTQ W4A16 with an export on a random mixture of experts larger than a block.

    python -m experiments.bench.large_mixture [--gigabytes 8] [--folder DIR] [--samples 8] [--length 512] [--hidden 2048]

Writes a random checkpoint of Qwen3-MoE's shape (fp16, its experts one by one, shards of 1 GB, a byte tokenizer) into DIR unless it is
there, then calibrates, solves and exports it in a fresh process with offloaded weights and hidden states on disk. The goals of
docs/large-models.md: at most two blocks and 1.0 GiB at the peak, and bytes in all over those of checkpoint and export.
"""

import argparse
import json
import math
import pathlib
import shutil
import subprocess
import sys
import tempfile

import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from ptq.config.building import recipe_from
from ptq.run.record.peak_memory import resident_peak
from ptq.testing import BOS, BYTE_VOCABULARY, EOS, byte_tokenizer

SHARD_BYTES = 1_000_000_000
EXPERTS, CHOSEN = 64, 8


def config_of(hidden: int, layers: int) -> object:
    """Returns a config of Qwen3-MoE's shape with this width."""
    return AutoConfig.for_model(
        "qwen3_moe", hidden_size=hidden, intermediate_size=3 * hidden, moe_intermediate_size=3 * hidden // 8,
        num_hidden_layers=layers, num_attention_heads=hidden // 64, num_key_value_heads=max(1, hidden // 512), head_dim=64,
        num_experts=EXPERTS, num_experts_per_tok=CHOSEN, vocab_size=BYTE_VOCABULARY, bos_token_id=BOS, eos_token_id=EOS,
        max_position_embeddings=4096, dtype="float16", architectures=["Qwen3MoeForCausalLM"],
    )  # fmt: skip


def write_checkpoint(folder: pathlib.Path, gigabytes: float, hidden: int) -> None:
    """Writes the random checkpoint, a shard in memory at a time, under the names that published ones have."""
    block = 2 * (EXPERTS * 3 * hidden * (3 * hidden // 8) + 3 * hidden * hidden)
    layers = max(2, math.ceil(gigabytes * 1e9 / block))
    config = config_of(hidden, layers)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    meta = {name: tensor for name, tensor in model.state_dict().items() if name != "rotary"}
    shapes = {name: tuple(t.shape) for name, t in revert_weight_conversion(model, meta).items()}
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[list[str]] = [[]]
    held = 0
    for name, shape in shapes.items():
        if held > SHARD_BYTES:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += 2 * math.prod(shape)
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: _random(name, shapes[name], generator) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config.save_pretrained(folder)  # type: ignore[attr-defined]
    byte_tokenizer().save_pretrained(folder)


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if name.endswith("norm.weight"):
        return torch.ones(shape, dtype=torch.float16)
    return (0.02 * torch.randn(shape, generator=generator)).half()


def work(folder: pathlib.Path, scratch: pathlib.Path, samples: int, length: int) -> None:
    """Runs the recipe; prints what it read, wrote and held."""
    from ptq.run.experiment import run

    recipe = recipe_from(
        {
            "name": "large-mixture",
            "model": {"path": str(folder)},
            "data": {"allow_overlap": True},
            "calibration": {"samples": samples, "length": length, "batch_size": 1},
            "evaluation": {"windows": 2, "length": length},
            "scheme": {"weight": {"bits": 4, "granularity": "group", "group_size": 64}},
            "steps": {"gptq": {}},
            "export": {"format": "compressed-tensors"},
            "execution": {"weights": "offloaded", "hidden_states": "disk"},
            "outputs": str(scratch / "outputs"),
            "store": str(scratch / "store"),
        }
    )
    before = _io()
    done = run(recipe)
    after = _io()
    exported = sum(file.stat().st_size for file in (done / "export").rglob("*") if file.is_file())
    checkpoint = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    h = config["hidden_size"]
    block = 4 * (EXPERTS * 3 * h * (3 * h // 8) + 3 * h * h) / 2**30
    peak = resident_peak() / 2**30
    read, written = (after[key] - before[key] for key in ("rchar", "wchar"))
    print(f"checkpoint {checkpoint / 1e9:.2f} GB, export {exported / 1e9:.2f} GB")
    print(
        f"read {read / 1e9:.2f} GB, written {written / 1e9:.2f} GB: {(read + written) / (checkpoint + exported):.2f} x both"
    )
    print(
        f"peak resident memory {peak:.2f} GiB: two blocks in float32 are {2 * block:.2f} GiB, {peak - 2 * block:+.2f} GiB beside"
    )


def _io() -> dict[str, int]:
    """Returns the bytes that this process has asked to be read and written so far, from the page cache or the disk."""
    lines = pathlib.Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return {key: int(value) for key, value in (line.split(": ") for line in lines)}


def main() -> None:
    """Makes the checkpoint where it is missing, then measures in a fresh process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=8.0)
    parser.add_argument(
        "--folder", type=pathlib.Path, default=pathlib.Path(tempfile.gettempdir()) / "ptq-large-mixture"
    )
    for name, default in {"samples": 8, "length": 512, "hidden": 2048}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--work", type=pathlib.Path, help="only the work, in this process, with this scratch folder")
    options = parser.parse_args()
    if options.work:
        work(options.folder, options.work, options.samples, options.length)
        return
    if not (options.folder / "tokenizer.json").is_file():
        write_checkpoint(options.folder, options.gigabytes, options.hidden)
    with tempfile.TemporaryDirectory(dir=options.folder.parent) as scratch:
        words = [f"--{name}={getattr(options, name)}" for name in ("folder", "samples", "length")]
        command = [sys.executable, "-m", "experiments.bench.large_mixture", "--work", scratch, *words]
        status = subprocess.run(command, check=False).returncode
        shutil.rmtree(scratch, ignore_errors=True)
        pathlib.Path(scratch).mkdir()
    sys.exit(status)


if __name__ == "__main__":
    main()
