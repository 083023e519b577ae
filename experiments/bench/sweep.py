"""What sweeps cost beside their evaluations, in one process and in two, done again, and killed twenty times.

    python -m experiments.bench.sweep --part cost        a 20-point alpha sweep of SmolLM2 beside 20 evaluations alone, then the same again
    python -m experiments.bench.sweep --part processes   one process with one thread beside two, figures compared
    python -m experiments.bench.sweep --part kills       a tiny model's sweep, killed 20 times, beside an undisturbed one
    python -m experiments.bench.sweep --part page        a page of 200 points: seconds, bytes

Evaluations alone are those of a quantized model in memory on the same tokens: its blocks, and the comparison with the
baseline's hidden states. Every part works in a temporary folder with a store of its own. Costs are given in seconds of the wall and
of the processor, of all processes: beside other work the latter's ratio is the one to go by (OMP_NUM_THREADS=1).
"""

import argparse
import csv
import dataclasses
import json
import math
import os
import pathlib
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import psutil
import yaml

ALPHAS = ",".join(f"{0.025 + 0.05 * i:.3f}" for i in range(20))
CONFIG = ["--config", "smollm2-135m_w8a8", "method=smooth"]
"""Inputs dynamic: with static ranges the samples pass each point's blocks once more, which no evaluation does."""
CLOCK = ("seconds", "folder", "identity", "line")
"""Columns of the table that depend on the clock, or on where a sweep's files are."""


def command(*words: str) -> list[str]:
    """Returns the command line of `ptq` with these words."""
    return [sys.executable, "-m", "ptq", *words]


@dataclasses.dataclass(frozen=True)
class Seconds:
    """Seconds by the wall's clock and by the processor's."""

    wall: float
    cpu: float


def timed(folder: pathlib.Path, *words: str, threads: int | None = None) -> Seconds:
    """Runs `ptq` and returns the seconds of it and of its processes, its start included. Raises `CalledProcessError` where it fails."""
    count = {} if threads is None else {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    begun, spent = time.perf_counter(), _of_children()
    subprocess.run(command(*words), cwd=folder, check=True, stdout=subprocess.DEVNULL, env={**os.environ, **count})
    return Seconds(time.perf_counter() - begun, _of_children() - spent)


def _of_children() -> float:
    """Returns the processor's seconds of all processes that have ended below this one."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def sweep_folder(folder: pathlib.Path) -> pathlib.Path:
    """Returns the only sweep's folder under `folder`."""
    [found] = (folder / "outputs" / "sweeps").glob("*/*")
    return found


def table(folder: pathlib.Path) -> list[dict[str, str]]:
    """Returns the rows of a sweep's table without what depends on the clock and on folders."""
    with (sweep_folder(folder) / "points.csv").open(encoding="utf-8", newline="") as file:
        return [{k: v for k, v in row.items() if k not in CLOCK} for row in csv.DictReader(file)]


def evaluation_alone(folder: pathlib.Path, words: list[str]) -> Seconds:
    """Returns the seconds of one evaluation of a quantized model: the median of three, in a process of its own."""
    code = "import sys, json; from experiments.bench.sweep import evaluate_alone; print(json.dumps(evaluate_alone(sys.argv[1:])))"
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=folder, check=True, capture_output=True, text=True)
    wall, cpu = zip(*json.loads(done.stdout.splitlines()[-1]), strict=True)
    return Seconds(statistics.median(wall), statistics.median(cpu))


def evaluate_alone(words: list[str]) -> list[tuple[float, float]]:
    """Quantizes by a recipe, then evaluates the model that is in memory three times. Returns wall and processor's seconds of each."""
    from ptq.cli import catalog
    from ptq.cli.compose.hydra_edge import compose_jobs
    from ptq.evaluation.token_comparison import compare_tokens
    from ptq.models.loading import load
    from ptq.models.weights import ResidentWeights
    from ptq.network.block_stream import BlockStream, Nothing
    from ptq.network.network import build_network
    from ptq.run.experiment import run_recipe
    from ptq.run.session import device_of, evaluation_draw

    config = catalog.locate(words[words.index("--config") + 1])
    overrides = [w for w in words if "=" in w]
    [job] = compose_jobs(config, overrides)
    # Blocks are found by their floating-point Linears, so before a run has replaced them.
    network = build_network(load(job.recipe.model, job.recipe.execution).model)
    result = run_recipe(job.recipe, force=True)
    tokens = evaluation_draw(job.recipe).tokens(result.tokenizer)
    for block in network.blocks:
        for name, child in result.model.get_submodule(block.name).named_children():
            setattr(block.module, name, child)
    network.model.config.use_cache = False
    stream = BlockStream(network, ResidentWeights(), device_of(job.recipe))
    seconds = []
    for _ in range(3):
        begun, spent = time.perf_counter(), time.process_time()
        flow = stream.open(tokens.ids, job.recipe.evaluation.batch_size, exact=True)
        stream.run([flow], Nothing())
        with stream.heads() as heads:
            compare_tokens(heads, flow.hidden, flow.hidden, tokens.ids, job.recipe.evaluation.chunk)
        seconds.append((time.perf_counter() - begun, time.process_time() - spent))
    return seconds


def cost(folder: pathlib.Path, extra: list[str]) -> None:
    """Measures a sweep of 20 points beside 20 evaluations, and the same again."""
    words = [*CONFIG, "outputs=outputs", "store=store", *extra]
    first = timed(folder, "run", *words, "-m", f"steps.smooth.alpha={ALPHAS}")
    again = timed(folder, "run", *words, "-m", f"steps.smooth.alpha={ALPHAS}")
    alone = evaluation_alone(folder, [*words, "steps.smooth.alpha=0.5"])
    for name in ("wall", "cpu"):
        whole, one, next_ = (getattr(seconds, name) for seconds in (first, alone, again))
        print(
            f"{name}: 20 points {whole:.1f} s; one evaluation alone {one:.2f} s, 20 of them {20 * one:.1f} s: {whole / (20 * one):.2f} x"
        )
        print(f"{name}: the same again {next_:.1f} s")


def processes(folder: pathlib.Path, extra: list[str]) -> None:
    """Measures one process with one thread beside two, each with a store of its own."""
    seconds, tables = [], []
    for jobs in (1, 2):
        place = folder / str(jobs)
        place.mkdir()
        words = [*CONFIG, "outputs=outputs", "store=store", *extra, "-m", "steps.smooth.alpha=0.3,0.4,0.5,0.6,0.7,0.8"]
        seconds.append(timed(place, "run", *words, "--jobs", str(jobs), "--threads", "1", threads=1).wall)
        tables.append(table(place))
    print(
        f"one process {seconds[0]:.1f} s, two {seconds[1]:.1f} s: {seconds[0] / seconds[1]:.2f} x; tables equal: {tables[0] == tables[1]}"
    )


def kills(folder: pathlib.Path, count: int, seed: int) -> None:
    """Kills points, the launcher and lease holders of a tiny model's sweep in turn, resumes it, and compares tables.

    Raises:
        RuntimeError: where the resumed sweep's table is another than the undisturbed one's.
    """
    from ptq.testing import tiny_model

    model = tiny_model("llama", pathlib.Path.home() / ".cache" / "ptq-tests")
    drawn = random.Random(seed)
    for name in ("disturbed", "undisturbed"):
        place = folder / name
        place.mkdir()
        content = {
            "model": {"path": str(model)}, "calibration": {"samples": 4, "length": 64}, "evaluation": {"windows": 4, "length": 64},
            "scheme": {"weight": {"bits": 4}, "input": {"bits": 8, "granularity": "tensor", "symmetric": False}},
            "steps": {"smooth": {"alpha": 0.5}, "gptq": {}}, "outputs": "outputs", "store": "store",
        }  # fmt: skip
        (place / "tiny.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    start = ["run", "--config", "tiny.yaml", "-m", "steps.smooth.alpha=0.2,0.4,0.6", "calibration.samples=4,6", "scheme.weight.bits=3,4", "--jobs", "2", "--threads", "1"]  # fmt: skip
    timed(folder / "undisturbed", *start, threads=1)
    place, killed = folder / "disturbed", {"point": 0, "launcher": 0, "lease holder": 0}
    words, begun, starts, dead = start, time.perf_counter(), 0, set[int]()
    while sum(killed.values()) < count:
        process = subprocess.Popen(
            command(*words), cwd=place, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        starts += 1
        while process.poll() is None and sum(killed.values()) < count:
            # Whoever holds a lease does so for a moment: the next one is killed, until a third of all kills were such.
            # What was killed is named by its lease until another takes it over, and is there until its launcher looks.
            holding, working = (
                [pid for pid in _holders(place / name) if _parent(pid) == process.pid and pid not in dead]
                for name in ("store", "outputs")
            )
            kind = min(("point", "launcher"), key=lambda name: (killed[name], name))
            if holding and killed["lease holder"] < math.ceil(count / len(killed)):
                kind, pids = "lease holder", holding
            elif not working or 3 * (killed["point"] + killed["launcher"]) >= 2 * count:
                time.sleep(0.005)
                continue
            else:
                time.sleep(drawn.uniform(0.0, 0.5))
                pids = [process.pid] if kind == "launcher" else working
            pid = drawn.choice(pids)
            if _parent(pid) is None:
                continue
            _kill(pid)
            dead.add(pid)
            killed[kind] += 1
            print(f"{time.perf_counter() - begun:.0f} s: {killed}", flush=True)
            while kind == "launcher" and process.poll() is None:
                time.sleep(0.005)
        process.wait()
        words = ["sweep", "resume", str(sweep_folder(place)), "--jobs", "2", "--threads", "1"]
        if sum(killed.values()) < count and all(row["status"] == "done" for row in table(place)):
            # Again from nothing: of a store that has everything nobody holds a lease.
            shutil.rmtree(place / "store")
            words.append("--force")
    print(f"{starts} starts")
    for _ in range(5):
        ended = subprocess.run(
            command("sweep", "resume", str(sweep_folder(place)), "--threads", "1"), cwd=place, stdout=subprocess.DEVNULL
        )
        if ended.returncode == 0:
            break
    equal = table(place) == table(folder / "undisturbed")
    print(f"kills: {killed}; {len(table(place))} points; the table equals the undisturbed one: {equal}")
    if not equal:
        raise RuntimeError("the resumed sweep's table is another than the undisturbed one's")


def page(folder: pathlib.Path) -> None:
    """Measures the page of 200 points of a model of SmolLM2's Linears."""
    from ptq.report.page.build import build_page
    from ptq.report.page.content import PageInput, PointOfPage

    points = [_point(folder, number) for number in range(1, 201)]
    begun = time.perf_counter()
    text = build_page(
        PageInput("bench", str(folder), "", ["steps.smooth.alpha"], [PointOfPage(*point) for point in points])
    )
    seconds = time.perf_counter() - begun
    print(f"page of {len(points)} points: {len(text.encode()) / 1e6:.2f} MB in {seconds:.2f} s")
    path = folder / "page.html"
    path.write_text(text, encoding="utf-8")
    browser = os.environ.get("PTQ_CHROMIUM", "chromium")
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom", "--virtual-time-budget=20000"]
    try:
        done = subprocess.run(
            [browser, *flags, f"file://{path}"], check=True, capture_output=True, text=True, timeout=120
        )
    except (OSError, subprocess.SubprocessError) as error:
        print(f"not opened: {error}")
        return
    usable = done.stdout.partition('data-usable="')[2].partition('"')[0]
    print(f"its table can be used {usable} ms after it is opened ({browser})")


def _point(folder: pathlib.Path, number: int) -> tuple[dict[str, Any], dict[str, str], str]:
    place = folder / str(number)
    place.mkdir()
    kl = {name: 0.001 * number for name in ("median", "p90", "p95", "p99", "p99_9", "max")}
    metrics = {"baseline_perplexity": 15.0, "token_statistics": {"kl": kl}, "seconds": {"quantize": 2.0, "evaluate": 3.0}, "size": {"before_bytes": 270e6, "after_bytes": 140e6}}  # fmt: skip
    (place / "metrics.json").write_text(json.dumps(metrics))
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip
    rows = "".join(f"model.layers.{b}.{name},{0.001 * (b + number)}\n" for b in range(30) for name in names)
    (place / "layers.csv").write_text(f"name,output_error\n{rows}")
    ranges = {"low": [-1.2345] * 256, "high": [2.3456] * 256}
    links = [
        {"name": f"model.layers.{i}.mlp.down_proj", "step": 6, "before": ranges, "after": ranges} for i in range(3)
    ]
    (place / "channels.json").write_text(json.dumps({"links": links}))
    figures = ("quantized_perplexity", "difference", "difference_low", "difference_high", "kl_mean", "kl_p99", "top1_agreement", "bits_per_weight", "bytes", "model_bits", "seconds")  # fmt: skip
    alpha = f"{number / 201:.4f}"
    values = {"point": number, "status": "done", "steps.smooth.alpha": alpha, **{name: 1.0 + number / 300 for name in figures}, "folder": str(place), "line": ""}  # fmt: skip
    return values, {"steps.smooth.alpha": alpha}, f"python main.py steps.smooth.alpha={alpha}"


def _holders(folder: pathlib.Path) -> list[int]:
    """Returns the processes that hold a lease somewhere below a folder, as far as they live."""
    found = []
    for path in folder.rglob("*.lease"):
        try:
            pid = int(json.loads(path.read_text(encoding="utf-8"))["pid"])
            os.kill(pid, 0)
        except (OSError, ValueError, KeyError):
            continue
        found.append(pid)
    return found


def _parent(pid: int) -> int | None:
    """Returns the process that started `pid`: what a killed launcher leaves behind has another one, until it ends by itself."""
    try:
        return psutil.Process(pid).ppid()
    except psutil.NoSuchProcess:
        return None


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def main() -> None:
    """Runs the part that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["cost", "processes", "kills", "page"], required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*", help="of the SmolLM2 recipe, such as evaluation.windows=4")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ptq-sweep-") as name:
        folder = pathlib.Path(name)
        if given.part == "kills":
            kills(folder, given.kills, given.seed)
        elif given.part == "page":
            page(folder)
        else:
            {"cost": cost, "processes": processes}[given.part](folder, given.overrides)


if __name__ == "__main__":
    main()
