"""Runtimes that lie in other processes or packages answer as sides do, and say in a line when they cannot."""

import json
import sys
import types

import pytest
import torch

from ptq.bench.against import onnxruntime_genai, vllm
from ptq.bench.processes.line_process import LineProcess
from ptq.errors import UserError
from ptq.testing import byte_tokenizer, random_tiny

VLLM = """
import json
class SamplingParams:
    def __init__(self, **options): self.options = options
class LLM:
    def __init__(self, folder, **options):
        config = json.load(open(folder + "/config.json"))
        assert config["quantization_config"]["quant_method"] == "compressed-tensors" and not options["enable_prefix_caching"]
    def generate(self, prompts, options, use_tqdm):
        print("a line of its own")
        made = [type("Made", (), {"token_ids": [p["prompt_token_ids"][0]] * options.options["min_tokens"]}) for p in prompts]
        return [type("Done", (), {"outputs": [one]}) for one in made]
"""


def test_a_process_is_asked_in_lines_and_what_else_it_says_is_passed_over():
    code = "import sys\nfor line in sys.stdin: print('note'); print([len(line)], flush=True)"
    process = LineProcess("echo", [sys.executable, "-c", code])
    assert process.ask("abc") == [6] and process.ask([]) == [3]
    process.close()
    with pytest.raises(UserError, match="--against: echo has ended: it cannot read the model or its libraries"):
        process.ask("abc")
    ended = LineProcess("echo", [sys.executable, "-c", "input()"])
    with pytest.raises(UserError, match="echo has ended"):
        ended.ask("abc")


def test_vllm_reads_our_folder_and_answers_batches(tmp_path, monkeypatch):
    (tmp_path / "vllm.py").write_text(VLLM)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PTQ_VLLM", sys.executable)
    side = vllm.side(random_tiny("llama"), byte_tokenizer())
    assert side.batches and side.name == "vLLM W8A8"
    assert side.decode(torch.tensor([[5, 6], [7, 8]]), 3) == [[5, 5, 5], [7, 7, 7]]
    assert side.prefill(torch.tensor([[9, 2]])) == [[9]]


def test_onnxruntime_genai_generates_with_the_threads_of_the_bench(tmp_path, monkeypatch):
    package = tmp_path / "onnxruntime_genai" / "models"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text("")
    (package / "builder.py").write_text(
        "import sys, pathlib, json\n"
        "given = dict(zip(sys.argv[1::2], sys.argv[2::2]))\n"
        "if not pathlib.Path(given['-i'], 'config.json').is_file(): sys.exit('no model')\n"
        "if given['-i'] != given['-c']: sys.exit('its cache is elsewhere')\n"
        "made = pathlib.Path(given['-o']); made.mkdir()\n"
        "session = {'precision': given['-p'], 'extra': given['--extra_options']}\n"
        "(made / 'genai_config.json').write_text(json.dumps({'model': {'decoder': {'session_options': session}}}))\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    runtime = types.ModuleType("onnxruntime_genai")
    seen = {}

    class Model:
        def __init__(self, folder):
            with open(f"{folder}/genai_config.json") as file:
                seen.update(json.load(file)["model"]["decoder"]["session_options"])

    class GeneratorParams:
        def __init__(self, model):
            self.options = {}

        def set_search_options(self, **options):
            self.options = options

    class Generator:
        def __init__(self, model, params):
            self.options, self.tokens = params.options, []

        def append_tokens(self, ids):
            self.tokens = ids.tolist()

        def generate_next_token(self):
            for one in self.tokens:
                one.append(one[-1])

        def get_sequence(self, index):
            assert len(self.tokens[index]) <= self.options["max_length"]
            return self.tokens[index]

    for made in (Model, GeneratorParams, Generator):
        setattr(runtime, made.__name__, made)
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", runtime)
    side = onnxruntime_genai.side(random_tiny("llama"), byte_tokenizer())
    assert seen == {
        "precision": "int4",
        "extra": "int4_accuracy_level=4",
        "intra_op_num_threads": torch.get_num_threads(),
    }
    assert side.decode(torch.tensor([[1, 2], [3, 4]]), 2) == [[1, 2, 2, 2], [3, 4, 4, 4]]
    assert side.prefill(torch.tensor([[1, 2]])) == [[1, 2, 2]]
    (package / "builder.py").write_text("import sys; sys.exit('an architecture that is not known')")
    with pytest.raises(
        UserError, match="onnxruntime-genai does not build this model: an architecture that is not known"
    ):
        onnxruntime_genai.side(random_tiny("llama"), byte_tokenizer())
