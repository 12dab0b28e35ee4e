"""What tells one tokenizer from another, wherever it was loaded from: all that decides ids, texts and chat prompts."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from ddp_eval.system.tokenizer_calls import decodes_plainly, is_plain

# Where it came from, and caches that it fills while it works.
_NO_MATTER = (
    "name_or_path", "init_kwargs", "init_inputs", "files_loaded", "_commit_hash", "deprecation_warnings",
    "_in_target_context_manager", "_tokenizer", "_special_tokens_map",
)  # fmt: skip
_KEPT_BY_CALLS = '"added_tokens"'  # before it stand truncation and padding as the last call has left them


def digest_tokenizer(tokenizer: Any) -> str | None:
    """SHA-256 over a tokenizer; None for one of which code of its own, in Python, is a part."""
    own_class = not type(tokenizer).__module__.startswith("transformers.")
    if own_class or not (is_plain(tokenizer) and decodes_plainly(tokenizer)):
        return None
    settings = {name: value for name, value in vars(tokenizer).items() if name not in _NO_MATTER}
    special = {name: str(value) for name, value in tokenizer.special_tokens_map.items()}
    try:
        described = json.dumps([settings, special], sort_keys=True, default=_plain)
    except (TypeError, ValueError):
        return None
    digest = hashlib.sha256(
        f"{type(tokenizer).__module__} {type(tokenizer).__qualname__}\n{described}\n".encode("utf-8", "replace")
    )
    whole = tokenizer.backend_tokenizer.to_str()
    digest.update(whole[max(0, whole.find(_KEPT_BY_CALLS)) :].encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    if type(value).__name__ == "AddedToken":
        return [str(value), *(getattr(value, name) for name in ("lstrip", "rstrip", "normalized", "single_word", "special"))]
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    raise TypeError(f"a tokenizer's {type(value).__name__} cannot be described")
