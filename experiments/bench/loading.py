"""Memory while a real model is loaded, beside what `ptq footprint` predicts.

    python -m experiments.bench.loading [--config smollm2-135m_w8a8]

Saves the recipe's model as fp16 safetensors into a temporary folder, then loads it in fresh processes: by transformers in
fp16 and in fp32, and as a run reads it on the CPU (fp32 arithmetic on weights rounded to fp16); where the recipe's model is a
GGUF file, as a run reads that for the first time too, into a store that is empty. Each counts the bytes of
the loaded tensors, and reads from the kernel how far the process grew over what it held before: in anonymous memory
(sampled every millisecond) and in all, with the pages of mapped weight files, after every page of the model was touched.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import threading
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from ptq.cli import catalog
from ptq.cli.compose.hydra_edge import compose_jobs
from ptq.config.schema import ExecutionConfig, ModelConfig, Recipe
from ptq.files.store import Store
from ptq.footprint.footprint import footprint
from ptq.models.loading import load
from ptq.models.locations import locate
from ptq.network.skeleton import skeleton

GGUF = "GGUF as a run"
FORMS = {"transformers fp16": "fp16", "transformers fp32": "fp32", "as a run": "fp32", GGUF: "fp32"}
"""How it is loaded, with the column of the footprint that it is compared to."""
MEGA = 1e6
PAGE = 1024
"""At this stride every page of a 16- or 32-bit tensor is touched, so that mapped ones are in memory too."""


def status(field: str) -> int:
    """Returns a field of /proc/self/status, such as VmHWM or RssAnon, in bytes."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


class Sampler(threading.Thread):
    """Keeps the greatest anonymous memory of this process until it is stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most = status("RssAnon")
        self._stop_asked = threading.Event()

    def run(self) -> None:
        """Samples every millisecond."""
        while not self._stop_asked.wait(0.001):
            self.most = max(self.most, status("RssAnon"))

    def finish(self) -> int:
        """Stops sampling and returns the greatest value in bytes."""
        self._stop_asked.set()
        self.join()
        return max(self.most, status("RssAnon"))


def measure(form: str, folder: pathlib.Path) -> dict[str, int]:
    """Loads the model of `folder`, or a GGUF file, in this process and returns bytes: of its tensors, held after, peaks."""
    recipe = _bare(folder)
    skeleton(recipe.model)  # imports the architecture, so that its code counts as held before
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts from what is held now
    before, held = status("RssAnon"), status("VmRSS")
    sampler = Sampler()
    sampler.start()
    model = _loaded(form, folder)
    anonymous = sampler.finish()
    after = status("RssAnon") - before
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    for tensor in tensors:
        tensor.flatten()[::PAGE].sum()
    return {
        "tensors": sum(tensor.nbytes for tensor in tensors),
        "after": after,
        "anonymous": anonymous - before,
        "all": status("VmHWM") - held,
    }


def _loaded(form: str, folder: pathlib.Path) -> Any:
    if form == GGUF:
        with tempfile.TemporaryDirectory() as scratch:
            return load(ModelConfig(str(folder)), ExecutionConfig(device="cpu"), Store(pathlib.Path(scratch))).model
    if form == "as a run":
        return load(ModelConfig(str(folder)), ExecutionConfig(device="cpu")).model
    dtype = torch.float16 if form.endswith("fp16") else torch.float32
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def _bare(folder: pathlib.Path, dtype: str = "auto") -> Recipe:
    return Recipe(name="loading", model=ModelConfig(str(folder), dtype=dtype))


def main() -> None:
    """Measures every form in a process of its own and prints a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="smollm2-135m_w8a8", help="a recipe; only its model is used")
    parser.add_argument("--form", choices=list(FORMS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=pathlib.Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.form:
        print(json.dumps(measure(options.form, options.folder)))
        return
    [job] = compose_jobs(catalog.locate(options.config), [])
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        source = load(
            job.recipe.model, ExecutionConfig(device="cpu"), Store(pathlib.Path(job.recipe.store).expanduser())
        )
        source.model.half().save_pretrained(folder)
        source.tokenizer.save_pretrained(folder)
        del source
        print(
            "| loaded | tensors predicted | tensors counted | held after | peak predicted | peak anonymous | peak in all |"
        )
        print("|---|---|---|---|---|---|---|")
        place = locate(job.recipe.model)
        for form, title in FORMS.items():
            if form == GGUF and place.gguf is None:
                continue
            loaded = str(pathlib.Path(place.base) / str(place.gguf)) if form == GGUF else str(folder)
            command = [sys.executable, "-m", "experiments.bench.loading", "--form", form, "--folder", loaded]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            got = json.loads(done.stdout.splitlines()[-1])
            found = footprint(_bare(folder, {"fp16": "float16", "fp32": "float32"}[title]))
            [column] = [c for c in found.columns if c.title == title]
            cells = [column.total, got["tensors"], got["after"], found.peaks[0].bytes, got["anonymous"], got["all"]]
            print(f"| {form} | {' | '.join(f'{cell / MEGA:.1f} MB' for cell in cells)} |")


if __name__ == "__main__":
    main()
