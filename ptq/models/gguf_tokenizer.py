"""How a GGUF file's byte-level BPE splits a text before it merges, and what it puts around one: as llama.cpp does.

transformers' conversion gives every such tokenizer GPT-2's splitting and no BOS. Here ``tokenizer.ggml.pre`` is honoured, and
``add_bos_token``. Every name below has the tokens of llama.cpp itself on a thousand strings (tests/clients/test_llama_cpp.py).
"""

import difflib
import pathlib
from typing import Any

from tokenizers import Regex, pre_tokenizers, processors

from ptq.files.gguf_header import metadata_of

_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_CASELESS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,%d}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _WORDS, r"\p{N}+", "[0-9][0-9][0-9]")
PATTERNS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("gpt-2", "phi-2", "olmo", "mpt", "jais"), (_WORDS,)),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), (r"\p{N}", _WORDS)
    ),
    **dict.fromkeys(("llama-bpe", "falcon3", "dbrx", "smaug-bpe"), (_CASELESS % 3,)),
    **dict.fromkeys(("qwen2", "stablelm2", "deepseek-r1-qwen"), (_CASELESS % 1,)),
    "default": _DEFAULT,
}  # fmt: skip
"""By llama.cpp's name of a pre-tokenizer, the patterns that split a text one after another; what matches becomes a piece."""
_WITH_BOS = ("llama-bpe", "falcon3")
"""What puts a BOS before a text where the file does not say."""
_PRE, _MODEL, _ADD_BOS, _ADD_EOS = (
    f"tokenizer.ggml.{key}" for key in ("pre", "model", "add_bos_token", "add_eos_token")
)


def as_llama_cpp(tokenizer: Any, path: pathlib.Path) -> str | None:
    """Changes the tokenizer that transformers has read out of the GGUF file `path` to split and begin a text as llama.cpp does.

    Returns:
        What has to be said: that the file names no pre-tokenizer, or one that is not known here. None where all is well.
    """
    found = metadata_of(path, {_PRE, _MODEL, _ADD_BOS, _ADD_EOS})
    pre, backend = found.get(_PRE), getattr(tokenizer, "backend_tokenizer", None)
    if found.get(_MODEL) != "gpt2" or backend is None:
        _put_around(tokenizer, backend, found.get(_ADD_BOS), found.get(_ADD_EOS))
        return None
    _put_around(tokenizer, backend, found.get(_ADD_BOS, pre in _WITH_BOS), found.get(_ADD_EOS, False))
    patterns = PATTERNS.get(str(pre or "default"))
    if patterns is None:
        close = difflib.get_close_matches(str(pre), PATTERNS, n=1)
        nearest = f" (the nearest: {close[0]})" if close else ""
        return (
            f"tokenizer.ggml.pre of {path.name}: {pre!r} is not known here{nearest}: the text is split as GPT-2's, and tokens may "
            "differ from llama.cpp's: name the model's own tokenizer by model.tokenizer"
        )
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return None if pre else f"{path.name} names no pre-tokenizer: its text is split by llama.cpp's default"


def pre_of(splitting: Any) -> str | None:
    """Returns llama.cpp's name for how `as_llama_cpp` has a tokenizer split, by its ``pre_tokenizer`` in tokenizers' JSON; None for
    any other.
    """
    steps = splitting.get("pretokenizers", []) if isinstance(splitting, dict) else []
    patterns = tuple(step["pattern"].get("Regex") for step in steps if step.get("type") == "Split")
    return next((name for name, known in PATTERNS.items() if known == patterns), None)


def _put_around(tokenizer: Any, backend: Any, bos: Any, eos: Any) -> None:
    """Has the tokenizer put its BOS before a text and its EOS after it; None leaves both to transformers."""
    if backend is None or bos is None:
        return
    ends = [
        (token, number)
        for wanted, token, number in (
            (bos, tokenizer.bos_token, tokenizer.bos_token_id), (eos, tokenizer.eos_token, tokenizer.eos_token_id),
        )
        if wanted and number is not None
    ]  # fmt: skip
    before = [ends[0][0]] if bos and tokenizer.bos_token_id is not None else []
    after = [ends[-1][0]] if eos and tokenizer.eos_token_id is not None else []
    backend.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after], pair=[*before, "$A", "$B", *after], special_tokens=list(dict.fromkeys(ends))
    )
