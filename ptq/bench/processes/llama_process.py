"""llama.cpp in a process of its own, so that its threads and torch's are not in each other's way.

    python -m ptq.bench.processes.llama_process LIBRARIES MODEL THREADS CONTEXT

reads lines of JSON, ``{"ids": [...], "tokens": n}``, generates n tokens greedily after the prompt (0: the prompt's pass only), and
answers each with a line: the generated ids.
"""

import json
import os
import pathlib
import sys
from typing import Any

from ptq.bench.processes.line_process import LineProcess


class LlamaProcess:
    """The other end: a model that llama.cpp has loaded.

    Args:
        libraries: folder of its shared libraries.
        model: a GGUF file; read before this returns.
        threads: of prompts and of tokens.
        context: tokens that prompt and answer may have together.

    Raises:
        UserError: when it does not load.
    """

    def __init__(self, libraries: pathlib.Path, model: pathlib.Path, threads: int, context: int):
        command = [
            sys.executable,
            "-m",
            "ptq.bench.processes.llama_process",
            *map(str, (libraries, model, threads, context)),
        ]
        self._process = LineProcess("llama.cpp", command)
        self.generate([1], 0)

    def generate(self, ids: list[int], tokens: int) -> list[int]:
        """Returns `tokens` token ids, the most likely ones after `ids`.

        Raises:
            UserError: when llama.cpp has ended.
        """
        return self._process.ask({"ids": ids, "tokens": tokens})

    def close(self) -> None:
        """Ends the process."""
        self._process.close()


def _serve(libraries: str, model: str, threads: int, context: int) -> None:
    import numpy as np

    from ptq.bench.processes.llama_library import open_library

    llama: Any = open_library(pathlib.Path(libraries))
    loaded = llama.llama_model_load_from_file(model.encode(), llama.llama_model_default_params())
    if not loaded:
        raise SystemExit(f"llama.cpp does not load {model}")
    size = (llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(loaded)),)
    options = llama.llama_context_default_params()
    options.n_ctx = options.n_batch = context
    state = llama.llama_init_from_model(loaded, options)
    llama.llama_set_n_threads(state, threads, threads)
    batch = llama.llama_batch_init(context, 0, 1)

    def feed(ids: list[int], start: int) -> int:
        """Returns the most likely token after `ids`, which stand at `start` and on."""
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, start + i, 1, i == len(ids) - 1
            batch.seq_id[i][0] = 0
        batch.n_tokens = len(ids)
        if llama.llama_decode(state, batch) != 0:
            raise SystemExit("llama_decode failed")
        return int(np.ctypeslib.as_array(llama.llama_get_logits_ith(state, len(ids) - 1), size).argmax())

    for line in sys.stdin:
        request = json.loads(line)
        llama.llama_memory_clear(llama.llama_get_memory(state), True)
        found, place = [feed(request["ids"], 0)], len(request["ids"])
        while len(found) < request["tokens"]:
            found.append(feed(found[-1:], place))
            place += 1
        print(json.dumps(found[: request["tokens"]]), flush=True)
    # The library's destructors outlive what they need when the interpreter takes things down.
    os._exit(0)


if __name__ == "__main__":
    _serve(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
