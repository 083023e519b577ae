"""A finished run, asked for again in a process of its own: what it does not need, it does not wait for."""

import os
import subprocess
import sys

import pytest

CODE = """
import sys
from torch.nn.modules.module import register_module_forward_pre_hook
called = []
register_module_forward_pre_hook(lambda module, args: called.append(module))
from ptq.cli.app import run_command
status = run_command(sys.argv[1:])
print("status", status, "forwards", len(called), "models", "transformers.modeling_utils" in sys.modules)
"""


@pytest.fixture(scope="module")
def arguments(tmp_path_factory, tiny_llama):
    folder = tmp_path_factory.mktemp("second")
    return [
        "--config=smollm2-135m_w8a8", f"model.path={tiny_llama}", "calibration.samples=2", "calibration.length=32",
        "evaluation.windows=2", "evaluation.length=32", f"outputs={folder}/outputs", f"store={folder}/store",
    ]  # fmt: skip


def test_a_second_run_passes_nothing_forward_and_imports_no_models(arguments):
    first, second = (_run(CODE, *arguments) for _ in range(2))
    assert "status 0 forwards 0" not in first and "models True" in first
    assert "finished before: perplexity" in second
    assert second.splitlines()[-1] == "status 0 forwards 0 models False"


@pytest.mark.parametrize("words", [["list", "--help"], ["run", "--help"], ["--version"], ["run", "scheme.bitz=3"]])
def test_what_computes_nothing_does_not_wait_for_torch(words):
    code = (
        "import atexit, sys\n"
        "atexit.register(lambda: print('torch', 'torch' in sys.modules))\n"
        "from ptq.cli.app import main\n"
        "main(sys.argv[1:])"
    )
    assert _run(code, *words).splitlines()[-1] == "torch False"


def test_a_mistake_in_a_step_is_told_before_models_are_imported():
    code = "import sys\nfrom ptq.cli.app import main\nprint('status', main(sys.argv[1:]), 'transformers.modeling_utils' in sys.modules)"
    assert _run(code, "run", "+steps.gptqq={}", "--dry-run").splitlines()[-1] == "status 2 False"


def _run(code, *words):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, env=environment, timeout=600, check=True
    )
    return done.stdout
