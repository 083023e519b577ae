"""The mutation check: single lines of the arithmetic are made wrong, one at a time, and the tests nearest to them must fail.

    python -m tests.tools.mutations                 # all, in a copy of the tree; a line each, then the count
    python -m tests.tools.mutations affine store    # those whose file's path holds one of these words

A mutation names a piece of a file that occurs once, what stands in its place, and the tests that are run. `tests/test_mutations.py`
holds that all pieces are still there, so that the list does not rot.
"""

import argparse
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass

ROOT = pathlib.Path(__file__).resolve().parents[2]
COPIED = ("configs", "docs", "experiments", "group_methods", "ptq", "quantize", "tests")
LIMIT = 900
"""Seconds that the tests of one mutation may take; a mutation that makes them hang counts as caught."""


@dataclass(frozen=True)
class Mutation:
    """One wrong line.

    Attributes:
        file: from the project's root.
        old: a piece of it that occurs once.
        new: what stands there instead.
        tests: the tests nearest to it, from ``tests/``.
    """

    file: str
    old: str
    new: str
    tests: tuple[str, ...]


_AFFINE = ("quantize/grid/test_affine.py",)
_RANGES = ("quantize/grid/test_ranges.py",)
_GPTQ = ("quantize/solvers/test_gptq.py",)
_FORMATS = ("quantize/codecs/test_block_floats.py", "quantize/codecs/test_codecs.py")
_COMPARISON = ("ptq/evaluation/test_comparison.py",)
_STATISTICS = ("ptq/calibration/test_statistics.py",)
_STORE = ("ptq/files/test_store.py",)
_KEYS = ("ptq/run/test_session.py",)
_KMEANS = ("group_methods/test_kmeans.py",)
_REORDER = ("group_methods/test_reorder.py",)
_GGUF = ("ptq/export/test_gguf.py",)
_Q8 = ("ptq/export/test_q8_files.py",)
_COMPRESSED = ("ptq/export/test_compressed_tensors.py",)

MUTATIONS = (
    Mutation("quantize/grid/affine.py", "high = 2 ** (bits - 1) - 1", "high = 2 ** (bits - 1)", _AFFINE),
    Mutation("quantize/grid/affine.py", "minimum.float().clamp(max=0)", "minimum.float()", _AFFINE),
    Mutation("quantize/grid/affine.py", "steps = (high - low) / 2 if", "steps = high if", _AFFINE),
    Mutation("quantize/grid/affine.py", "codes = (x.float() / grid.scale).round_()", "codes = (x.float() / grid.scale).floor_()", _AFFINE),
    Mutation("quantize/grid/affine.py", "limit = min(torch.finfo(dtype).max, torch.finfo(values.dtype).max)", "limit = torch.finfo(values.dtype).max", _AFFINE),
    Mutation("quantize/grid/ranges.py", "cut = int(size * (100 - percentile) / 200)", "cut = int(size * (100 - percentile) / 100)", _RANGES),
    Mutation("quantize/grid/ranges.py", "better = error < best", "better = error <= best", _RANGES),
    Mutation("quantize/grid/ranges.py", "MOMENTUM = 0.9\n", "MOMENTUM = 0.99\n", _RANGES),
    Mutation("quantize/grid/ranges.py", "squares *= importance[:, i * size : (i + 1) * size]", "squares *= importance[:, :size][:, : squares.shape[1]]", _RANGES),
    Mutation("quantize/grid/scales.py", "- int(grid.high - grid.low).bit_length()\n        scale = torch.ldexp", "\n        scale = torch.ldexp", ("quantize/grid/test_scales.py",)),
    Mutation("quantize/grid/storage.py", "zero_points=0 if spec.symmetric else scales", "zero_points=scales", ("quantize/grid/test_storage.py",)),
    Mutation("quantize/codecs/packing.py", "(2**bits - 1)) << (lane * bits)", "255) << (lane * bits)", ("quantize/codecs/test_packing.py",)),
    Mutation("quantize/codecs/mx.py", "exponent - 1 - emax", "exponent - emax", _FORMATS),
    Mutation("quantize/codecs/nvfp4.py", "(E2M1_MAX * SCALE_MAX)", "SCALE_MAX", _FORMATS),
    Mutation("quantize/codecs/fp8.py", "return x.clamp(-limit, limit).to(dtype)", "return x.to(dtype)", _FORMATS),
    Mutation("quantize/codecs/codebook.py", "(levels[1:] + levels[:-1]) / 2", "levels[1:]", ("quantize/codecs/test_codebook.py",)),
    Mutation("quantize/codecs/codebook.py", "+ parts[\"scale_mean\"]).clamp_(min=0)", ").clamp_(min=0)", ("quantize/codecs/test_codebook.py", "quantize/codecs/test_codecs.py")),
    Mutation("quantize/codecs/llm_int8.py", "rows.amax(0)) >= threshold", "rows.amax(0)) > threshold", ("quantize/codecs/test_llm_int8.py",)),
    Mutation("quantize/codecs/q8_0.py", "GREATEST = 127\n", "GREATEST = 128\n", ("quantize/codecs/test_q8_0.py",)),
    Mutation("quantize/solvers/factorisation.py", "share = damping * 10**attempt", "share = damping", _GPTQ),
    Mutation("quantize/solvers/factorisation.py", "diagonal.argsort(descending=True, stable=True)", "diagonal.argsort(stable=True)", _GPTQ),
    Mutation("quantize/solvers/gptq.py", ".mul_(2 / max(self.count, 1))", ".mul_(1 / max(self.count, 1))", _GPTQ),
    Mutation("quantize/solvers/gptq.py", "else loss > rtn_loss", "else loss > 100 * rtn_loss", _GPTQ),
    Mutation("quantize/solvers/feedback.py", "columns[end:] -= product", "columns[end:] += product", _GPTQ),
    Mutation("quantize/solvers/correction.py", "damped.diagonal().add_(damping * mean)", "damped.diagonal().add_(mean)", ("quantize/solvers/test_correction.py",)),
    Mutation("quantize/solvers/correction.py", "2 * (gain @ share)", "(gain @ share)", ("quantize/solvers/test_correction.py",)),
    Mutation("quantize/solvers/awq.py", "FLOOR = 1e-4\n", "FLOOR = 1e-2\n", ("quantize/solvers/test_awq.py",)),
    Mutation("quantize/solvers/awq.py", "(alive.amax() * alive.amin()).sqrt()", "alive.amax()", ("quantize/solvers/test_awq.py",)),
    Mutation("quantize/solvers/hqq.py", "(steps.abs().pow_(norm) * scale.pow(norm))", "steps.abs().pow_(norm)", ("quantize/solvers/test_hqq.py",)),
    Mutation("quantize/solvers/clip.py", "better = found < best", "better = found <= best", ("quantize/solvers/test_clip.py",)),
    Mutation("quantize/solvers/damping.py", "key=lambda i: (losses[i], dampings[i])", "key=lambda i: (losses[i], -dampings[i])", ("quantize/solvers/test_damping.py",)),
    Mutation("quantize/solvers/levels.py", "mantissa > math.sqrt(0.5)", "mantissa > 0.75", ("quantize/solvers/test_solve_format.py",)),
    Mutation("quantize/transforms/smooth.py", "FLOOR = 1e-5\n", "FLOOR = 1e-3\n", ("quantize/transforms/test_smooth.py",)),
    Mutation("quantize/transforms/smooth.py", "beta = 1 - alpha if", "beta = alpha if", ("quantize/transforms/test_smooth.py",)),
    Mutation("quantize/transforms/smooth.py", "/ scale - offset)", "/ scale)", ("quantize/transforms/test_smooth.py",)),
    Mutation("group_methods/kmeans.py", "order = np.lexsort((first, key))", "order = np.lexsort((first, -key))", _KMEANS),
    Mutation("group_methods/kmeans.py", "labels.append(own + count)", "labels.append(own)", _KMEANS),
    Mutation("group_methods/reorder.py", "return labels.argsort(stable=True)", "return labels.argsort(stable=True, descending=True)", _REORDER),
    Mutation("group_methods/reorder.py", "back[order] = torch.arange", "back[:] = order[order] * 0 + torch.arange", _REORDER),
    Mutation("group_methods/reorder.py", "values, reduce, include_self=False", "values, reduce, include_self=True", _REORDER),
    Mutation("ptq/calibration/statistics.py", "self.m2 + m2 + delta.square() * (self.count * count / total)", "self.m2 + m2", _STATISTICS),
    Mutation("ptq/calibration/statistics.py", "self.mean / wide, self.m2 / wide.square()", "self.mean / wide, self.m2 / wide", _STATISTICS),
    Mutation("ptq/calibration/statistics.py", "self.min = torch.minimum(self.min, other.min)", "self.min = torch.minimum(self.min, other.max)", _STATISTICS),
    Mutation("ptq/calibration/statistics.py", "shift = chunk[0].float()", "shift = chunk[0].float() * 0", _STATISTICS),
    Mutation("ptq/files/manifest.py", "json.dumps(key, sort_keys=True)", "json.dumps(sorted(key), sort_keys=True)", _STORE),
    Mutation("ptq/files/manifest.py", "same = file_digest(there[name]) == digest", "same = len(file_digest(there[name])) == len(digest)", _STORE),
    Mutation("ptq/run/session.py", '"tokens": tokens.fingerprint,', '"tokens": tokens.source,', _KEYS),
    Mutation("ptq/run/session.py", '"baseline": self.loaded.baseline_dtype,', '"baseline": "",', _KEYS),
    Mutation("ptq/run/session.py", '"weights": self.loaded.fingerprint,\n            "b', '"weights": "",\n            "b', _KEYS),
    Mutation("ptq/run/session.py", '"arithmetic": self.loaded.arithmetic_dtype,\n', '"arithmetic": "",\n', _KEYS),
    Mutation("ptq/evaluation/token_comparison.py", "losses[w] = total / (ids.shape[1] - 1)\n    return losses", "losses[w] = total / ids.shape[1]\n    return losses", _COMPARISON),
    Mutation("ptq/evaluation/comparison.py", "kl_p99=statistics.kl.p99,", "kl_p99=statistics.kl.p95,", _COMPARISON),
    Mutation("ptq/evaluation/token_statistics.py", '"p99": 99,', '"p99": 95,', ("ptq/evaluation/test_token_statistics.py",)),
    Mutation("ptq/evaluation/interval.py", "tail = (1 - confidence) / 2", "tail = 1 - confidence", ("ptq/evaluation/test_interval.py",)),
    Mutation("ptq/evaluation/interval.py", "len(difference) - 1, (1 + confidence) / 2)", "len(difference) - 1, confidence)", ("ptq/evaluation/test_interval.py",)),
    Mutation("ptq/evaluation/paired.py", "residual = sums - mean * sizes", "residual = sums - mean", ("ptq/evaluation/test_paired.py",)),
    Mutation("ptq/evaluation/paired.py", "(len(values) - rank) * values[index]", "len(values) * values[index]", ("ptq/evaluation/test_paired.py",)),
    Mutation("ptq/export/packing/gguf_blocks.py", "nibbles[..., :16] | nibbles[..., 16:] << 4", "nibbles[..., 16:] | nibbles[..., :16] << 4", _GGUF),
    Mutation("ptq/export/to_kuiper.py", "-shape.vocabulary,", "shape.vocabulary,", _Q8),
    Mutation("ptq/export/quantized_tensors.py", "zero_point=module.zero_point if module.weight_spec is not None and affine else None,", "zero_point=None,", _COMPRESSED + _GGUF),
)  # fmt: skip


def run(mutation: Mutation, tree: pathlib.Path) -> bool:
    """Returns whether the tests nearest to the mutation fail in `tree`, a copy of the project, which is put back."""
    path = tree / mutation.file
    source = path.read_text(encoding="utf-8")
    if source.count(mutation.old) != 1:
        raise SystemExit(f"{mutation.file}: {mutation.old!r} occurs {source.count(mutation.old)} times, and not once")
    path.write_text(source.replace(mutation.old, mutation.new), encoding="utf-8")
    try:
        return _failure(tree, mutation.tests) is not None
    finally:
        path.write_text(source, encoding="utf-8")


def _failure(tree: pathlib.Path, tests: tuple[str, ...]) -> str | None:
    """Returns the end of what pytest said where a test fails, None where all pass."""
    # A folder of its own for what tests write: other runs of pytest clear the common one.
    options = ("-x", "-q", "-p", "no:cacheprovider", f"--basetemp={tree / 'written'}")
    command = [sys.executable, "-m", "pytest", *options, *(f"tests/{t}" for t in tests)]
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return f"no end after {LIMIT} s"
    if done.returncode not in {0, 1}:
        raise SystemExit(f"{' '.join(command)}: exit status {done.returncode}\n{done.stdout.decode()[-2000:]}")
    return None if done.returncode == 0 else done.stdout.decode()[-2000:]


def main() -> None:
    """Runs the chosen mutations, after their tests have passed without any."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="only mutations of files whose path holds one of these")
    words = parser.parse_args().words
    chosen = [m for m in MUTATIONS if not words or any(word in m.file for word in words)]
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        tree = pathlib.Path(folder)
        for name in COPIED:
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "main.py", "gen_act_stat.py", "README.md", "constraints.txt", "Makefile"):
            shutil.copy(ROOT / name, tree / name)
        if (said := _failure(tree, tuple(sorted({test for m in chosen for test in m.tests})))) is not None:
            raise SystemExit(f"{said}\nthe tests fail without any mutation: mend that first")
        caught = 0
        for mutation in chosen:
            found = run(mutation, tree)
            caught += found
            print(
                f"{'caught  ' if found else 'SURVIVED'} {mutation.file}: {mutation.old!r} -> {mutation.new!r}",
                flush=True,
            )
    print(f"{caught} of {len(chosen)} mutations caught")


if __name__ == "__main__":
    main()
