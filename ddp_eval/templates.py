"""The templates of task files: each compiled once, and rendered once where the outcome is bound to be the same.

`lm_eval.utils.apply_template` (0.4.13) compiles its template anew for every document and every few-shot example: 98,000 times for
MMLU, of a handful of distinct ones. It renders the same examples again for every document, too. `TemplateCache.render` stands in
for it while lm_eval builds requests. What it returns is the same to the byte: nothing is kept of a template that can draw at
random or change a document.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.defaults import DEFAULT_FILTERS

# Methods of strings, lists and mappings that change nothing.
_READING = frozenset({
    "capitalize", "casefold", "center", "count", "endswith", "expandtabs", "find", "format", "get", "index", "isalpha", "isdigit",
    "islower", "isnumeric", "isspace", "istitle", "isupper", "items", "join", "keys", "ljust", "lower", "lstrip", "partition",
    "removeprefix", "removesuffix", "replace", "rfind", "rindex", "rjust", "rpartition", "rsplit", "rstrip", "split",
    "splitlines", "startswith", "strip", "swapcase", "title", "upper", "values", "zfill",
})  # fmt: skip
_PURE_FILTERS = frozenset(DEFAULT_FILTERS) - {"random"} | {"regex_replace"}  # the second is lm_eval's own
_PURE_FUNCTIONS = frozenset({"dict", "namespace", "range"})


class TemplateCache:
    """Compiled templates of one jinja environment, and what they come to for the documents that are given to `keep`."""

    def __init__(self, environment: jinja2.Environment) -> None:
        self._environment = environment
        self._compiled: dict[str, jinja2.Template] = {}
        self._is_pure: dict[str, bool] = {}
        self._constants: dict[str, str] = {}
        self._kept: dict[int, tuple[Any, dict[str, str]]] = {}

    def keep(self, documents: Iterable[Any]) -> None:
        """Render each template once for each of these, which come again and again and which no code changes meanwhile."""
        for document in documents:
            self._kept.setdefault(id(document), (document, {}))

    def forget_documents(self) -> None:
        """From now on documents may change."""
        self._kept.clear()

    def render(self, template: str, doc: Mapping[str, Any]) -> str:
        """As `lm_eval.utils.apply_template`."""
        if (constant := self._constants.get(template)) is not None:
            return constant
        kept = self._kept.get(id(doc))
        if kept is not None and (found := kept[1].get(template)) is not None:
            return found
        compiled = self._compiled.get(template)
        if compiled is None:
            compiled = self._compile(template)
        text = compiled.render(**doc)
        if kept is not None and self._is_pure[template]:
            kept[1][template] = text
        return text

    def _compile(self, template: str) -> jinja2.Template:
        compiled = self._environment.from_string(template)
        tree = self._environment.parse(template)
        self._is_pure[template] = _is_pure(tree)
        if self._is_pure[template] and not meta.find_undeclared_variables(tree):
            self._constants[template] = compiled.render()
        self._compiled[template] = compiled
        return compiled


def _is_pure(tree: nodes.Template) -> bool:
    """Whether a template comes to the same for the same document, and leaves it as it was."""
    if any(node.name not in _PURE_FILTERS for node in tree.find_all(nodes.Filter)):
        return False
    if any(constant.value == "random" for constant in tree.find_all(nodes.Const)):  # map("random")
        return False
    return all(
        (isinstance(call.node, nodes.Getattr) and call.node.attr in _READING)
        or (isinstance(call.node, nodes.Name) and call.node.name in _PURE_FUNCTIONS)
        for call in tree.find_all(nodes.Call)
    )
