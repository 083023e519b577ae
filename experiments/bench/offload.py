"""Peak memory of the whole work on an OPT-1.3B-shaped checkpoint, offloaded: statistics, RTN W4A4, saving.

    python -m experiments.bench.offload [--folder DIR] [--layers 24] [--no-prefetch]

Writes a random checkpoint of OPT-1.3B's shape (fp16 safetensors in shards, a byte tokenizer) into DIR unless it is there,
then runs gen_act_stat.py's and main.py's work on it in a fresh process and prints that process's peak resident memory.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from ptq.config.building import recipe_from
from ptq.run.record.peak_memory import resident_peak
from ptq.testing import BOS, BYTE_VOCABULARY, EOS, byte_tokenizer

SHARD_TENSORS = 64


def write_checkpoint(folder: pathlib.Path, layers: int) -> None:
    """Writes the random checkpoint, a shard in memory at a time. Vocabulary 50272 as in OPT; bytes use the first 258."""
    from accelerate import init_empty_weights

    config = AutoConfig.for_model(
        "opt", hidden_size=2048, ffn_dim=8192, num_hidden_layers=layers, num_attention_heads=32, word_embed_proj_dim=2048,
        vocab_size=max(50272, BYTE_VOCABULARY), bos_token_id=BOS, eos_token_id=EOS, dtype="float16",
    )  # fmt: skip
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    folder.mkdir(parents=True, exist_ok=True)
    names = [(n, p.shape) for n, p in model.named_parameters() if n != "lm_head.weight"]
    generator = torch.Generator().manual_seed(0)
    shards = [names[i : i + SHARD_TENSORS] for i in range(0, len(names), SHARD_TENSORS)]
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {n: _random(n, shape, generator) for n, shape in shard}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config.architectures = ["OPTForCausalLM"]
    config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def _random(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    if name.endswith("layer_norm.weight"):
        return torch.ones(shape, dtype=torch.float16)
    return (0.02 * torch.randn(shape, generator=generator)).half()


def work(folder: pathlib.Path, prefetch: bool) -> None:
    """Statistics, RTN W4A4 with saved codes, evaluation; prints the peak resident memory of this process."""
    from ptq.run.experiment import collect_statistics, run

    with tempfile.TemporaryDirectory() as scratch:
        recipe = recipe_from(
            {
                "name": "opt-1.3b-shaped",
                "model": {"path": str(folder)},
                "calibration": {"samples": 4, "length": 256, "batch_size": 1},
                "evaluation": {"windows": 2, "length": 256},
                "scheme": {"weight": {"bits": 4}, "input": {"bits": 4, "granularity": "token", "dynamic": True}},
                "steps": {"rtn": {}},
                "execution": {"weights": "offloaded", "hidden_states": "disk", "save": True, "prefetch": prefetch},
                "outputs": scratch,
                "store": scratch,
            }
        )
        collect_statistics(recipe)
        print(f"after statistics: {_peak():.3f} GiB")
        run(recipe)
    print(f"peak resident memory: {_peak():.3f} GiB")


def _peak() -> float:
    return resident_peak() / 2**30


def main() -> None:
    """Makes the checkpoint where it is missing, then measures in a fresh process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=pathlib.Path, default=pathlib.Path(tempfile.gettempdir()) / "ptq-opt-1.3b-shaped"
    )
    parser.add_argument("--layers", type=int, default=24, help="decoder blocks (OPT-1.3B has 24)")
    parser.add_argument("--no-prefetch", action="store_true", help="read no block while the one before computes")
    parser.add_argument("--work", action="store_true", help="only the work, in this process")
    options = parser.parse_args()
    if options.work:
        work(options.folder, not options.no_prefetch)
        return
    if not (options.folder / "tokenizer.json").is_file():
        write_checkpoint(options.folder, options.layers)
    command = [sys.executable, "-m", "experiments.bench.offload", "--work", "--folder", str(options.folder)]
    command += ["--no-prefetch"] if options.no_prefetch else []
    sys.exit(subprocess.run(command, check=False).returncode)


if __name__ == "__main__":
    main()
