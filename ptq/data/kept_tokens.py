"""Token windows in the store: a text is tokenized once, whichever run asks for its windows next."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ptq.config.schema import TextConfig
from ptq.data.sampling import Draw, Tokens, fingerprint
from ptq.data.sources import Text, read_text
from ptq.files.bounded import parse_json
from ptq.files.source_digest import package_digest
from ptq.files.store import Store
from ptq.files.versions import version_of

KIND = "tokens"


def kept_tokens(draw: Draw, tokenizer: Callable[[], Any], tokenizer_fingerprint: str | None, store: Store) -> Tokens:
    """Returns the windows of `draw`, out of the store where they were drawn before.

    Args:
        draw: which windows of which text. The text is read each time: what it holds now is what counts.
        tokenizer: builds the tokenizer, which kept windows do without.
        tokenizer_fingerprint: of all that the tokenizer depends on; None where that is not known, and nothing is kept.
        store: where windows are kept.

    Raises:
        UserError: for what `Draw.tokens` refuses, and a store that cannot be written.
    """
    if tokenizer_fingerprint is None:
        return draw.tokens(tokenizer())
    texts: dict[TextConfig, Text] = {}

    def read(config: TextConfig, field: str) -> Text:
        if config not in texts:
            texts[config] = read_text(config, field)
        return texts[config]

    parts = [read(config, field) for config, field in draw.parts]
    options = {key: value for key, value in dataclasses.asdict(draw).items() if key not in {"text", "field"}}
    libraries = {name: version_of(name) for name in ("tokenizers", "transformers", "torch")}
    known = {"text": _text_fingerprint(parts), "tokenizer": tokenizer_fingerprint}
    key: dict[str, object] = {**options, **known, "libraries": libraries, "source": package_digest()}
    if (path := store.find(KIND, key)) is not None:
        try:
            return load_tokens(path)
        except ValueError as error:
            store.made_again(KIND, str(error))
    tokens = draw.tokens(tokenizer(), read)
    samples, length = tokens.ids.shape
    store.add(KIND, key, lambda path: save_tokens(tokens, path), f"{tokens.source}, {samples} x {length} tokens")
    return tokens


def save_tokens(tokens: Tokens, path: pathlib.Path) -> None:
    """Writes windows as safetensors: ``ids`` int64 (samples, length), and what is known of them as metadata."""
    facts = {"source": tokens.source, "begin": tokens.begin, "documents": tokens.documents}
    save_file({"ids": tokens.ids.contiguous()}, path, metadata={"kind": KIND, "facts": json.dumps(facts)})


def load_tokens(path: pathlib.Path) -> Tokens:
    """Reads what `save_tokens` wrote. Raises ValueError for anything else."""
    try:
        with safe_open(path, framework="pt") as file:
            ids, facts = file.get_tensor("ids"), parse_json(file.metadata()["facts"])
        documents = facts["documents"]
        return Tokens(
            ids, fingerprint(ids), str(facts["source"]), tuple(facts["begin"]), documents and tuple(documents)
        )
    except (SafetensorError, OSError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"it holds no windows ({' '.join(str(error).split())})") from None


def _text_fingerprint(texts: Sequence[Text]) -> str:
    """Returns the SHA-256 over all that windows take from these texts."""
    digest = hashlib.sha256()
    for text in texts:
        plain = [text.name, text.joiner, text.slices, text.windows, list(map(len, text.documents))]
        digest.update(json.dumps(plain).encode())
        for document in text.documents:
            digest.update(document.encode(errors="surrogatepass"))
    return digest.hexdigest()
