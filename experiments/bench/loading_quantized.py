"""Memory while SmolLM2 is loaded as int8 and NF4, against 1.3 times the final size.

    python -m experiments.bench.loading_quantized [--config smollm2-135m_w8a8]

Saves the recipe's model as fp16 safetensors into a temporary folder, then loads it in fresh processes with
``from_pretrained(folder, quantization_config=PtqConfig(...))``, saves that, and loads what was saved. Read from the kernel as
`experiments.bench.loading` does: how far the process grew over what it held with the libraries and the architecture
imported, in anonymous memory, and in all, which has every page of the mapped checkpoint in it that was read.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

from transformers import AutoModelForCausalLM

from experiments.bench.loading import MEGA, PAGE, Sampler, status
from ptq.cli import catalog
from ptq.cli.compose.hydra_edge import compose_jobs
from ptq.config.schema import ExecutionConfig, ModelConfig
from ptq.files.store import Store
from ptq.integrations.transformers import PtqConfig
from ptq.models.loading import load
from ptq.network.skeleton import skeleton

FORMS = {"int8 per channel": "w8a16", "LLM.int8()": "llm_int8", "NF4, double quantization": "nf4_dq"}
"""What it is loaded as, and the scheme."""
GOAL = 1.3
"""Peak over final size."""


def measure(folder: pathlib.Path, scheme: str | None, save: pathlib.Path | None) -> dict[str, int]:
    """Loads the model of `folder` in this process, quantized by `scheme` or as it was saved, and returns bytes."""
    skeleton(ModelConfig(str(folder.parent / "original")))
    before, held = status("RssAnon"), status("VmRSS")
    sampler = Sampler()
    sampler.start()
    given = {} if scheme is None else {"quantization_config": PtqConfig(scheme)}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **given)
    tensors = list({id(t): t for t in (*model.parameters(), *model.buffers())}.values())
    for tensor in tensors:
        tensor.flatten()[::PAGE].float().sum()
    result = {
        "final": sum(tensor.nbytes for tensor in tensors),
        "anonymous": sampler.finish() - before,
        "all": status("VmHWM") - held,
    }
    if save is not None:
        model.save_pretrained(save)
    return result


def main() -> None:
    """Measures every form in a process of its own and prints a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="smollm2-135m_w8a8", help="a recipe; only its model is used")
    parser.add_argument("--folder", type=pathlib.Path, help=argparse.SUPPRESS)
    parser.add_argument("--scheme", help=argparse.SUPPRESS)
    parser.add_argument("--save", type=pathlib.Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder:
        print(json.dumps(measure(options.folder, options.scheme, options.save)))
        return
    [job] = compose_jobs(catalog.locate(options.config), [])
    with tempfile.TemporaryDirectory() as scratch:
        original = pathlib.Path(scratch) / "original"
        store = Store(pathlib.Path(job.recipe.store).expanduser())
        source = load(job.recipe.model, ExecutionConfig(device="cpu"), store)
        source.model.half().save_pretrained(original)
        source.tokenizer.save_pretrained(original)
        del source
        print(f"| loaded as | final size | {GOAL} x | peak anonymous | ratio | peak in all | ratio |")
        print("|---|---|---|---|---|---|---|")
        for form, scheme in FORMS.items():
            saved = pathlib.Path(scratch) / scheme
            for words, arguments in (
                ("while loading", ["--folder", str(original), "--scheme", scheme, "--save", str(saved)]),
                ("as saved", ["--folder", str(saved)]),
            ):
                print(f"| {form}, {words} | {_line(arguments)} |", flush=True)


def _line(arguments: list[str]) -> str:
    command = [sys.executable, "-m", "experiments.bench.loading_quantized", *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    got = json.loads(done.stdout.splitlines()[-1])
    sizes = [got["final"], GOAL * got["final"]]
    cells = [f"{size / MEGA:.1f} MB" for size in sizes]
    for kind in ("anonymous", "all"):
        cells += [f"{got[kind] / MEGA:.1f} MB", f"{got[kind] / got['final']:.2f} x"]
    return " | ".join(cells)


if __name__ == "__main__":
    main()
