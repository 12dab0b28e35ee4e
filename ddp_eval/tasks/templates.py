"""The templates of task files: each compiled once, and rendered once where the result must be the same.

`lm_eval.utils.apply_template` (0.4.13) compiles its template again for every document and few-shot example: 98,000 times for
MMLU, of a handful of distinct ones. It renders the same examples again for every document, too. `TemplateCache.render` stands in
for it while lm_eval builds requests. What it returns is the same to the byte: nothing is kept of a template that can draw at
random or change a document.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.defaults import DEFAULT_FILTERS, DEFAULT_TESTS

# Methods of strings, lists and mappings that change nothing.
_READING = frozenset({
    "capitalize", "casefold", "center", "count", "endswith", "expandtabs", "find", "format", "get", "index", "isalpha", "isdigit",
    "islower", "isnumeric", "isspace", "istitle", "isupper", "items", "join", "keys", "ljust", "lower", "lstrip", "partition",
    "removeprefix", "removesuffix", "replace", "rfind", "rindex", "rjust", "rpartition", "rsplit", "rstrip", "split",
    "splitlines", "startswith", "strip", "swapcase", "title", "upper", "values", "zfill",
})  # fmt: skip
_KNOWN_FILTERS = frozenset(DEFAULT_FILTERS) | {"regex_replace"}  # the second is lm_eval's own
_KNOWN_TESTS = frozenset(DEFAULT_TESTS)
_PURE_FUNCTIONS = frozenset({"dict", "namespace", "range"})


class TemplateCache:
    """Compiled templates of one jinja environment, and the texts that they give for the documents passed to `keep`."""

    def __init__(self, environment: jinja2.Environment) -> None:
        self._environment = environment
        self._compiled: dict[str, jinja2.Template] = {}
        self._is_pure: dict[str, bool] = {}
        self._constants: dict[str, str] = {}
        self._kept: dict[int, tuple[Any, dict[str, str]]] = {}

    def keep(self, documents: Iterable[Any]) -> None:
        """Render each template once for each of these, which are used many times and which no code changes meanwhile.

        After a template that may change a document, this document is rendered each time.
        """
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
        if kept is not None and not self._is_pure[template]:
            del self._kept[id(doc)]
            kept = None
        text = compiled.render(**doc)
        if kept is not None:
            kept[1][template] = text
        return text

    def _compile(self, template: str) -> jinja2.Template:
        compiled = self._environment.from_string(template)
        compiled.globals = self._environment.globals  # the same, but for a ChainMap over it, which takes long to copy
        if template in self._is_pure:
            return compiled
        tree = self._environment.parse(template)
        self._is_pure[template] = _is_pure(tree)
        # A template that names anything is no constant: a document's field hides a global of the same name, such as `range`.
        if self._is_pure[template] and not list(tree.find_all((nodes.Name, nodes.NSRef))):
            self._constants[template] = compiled.render()
        if _is_known(tree):
            self._compiled[template] = compiled
        return compiled


def _is_known(tree: nodes.Template) -> bool:
    """Whether all of a template's filters and tests are jinja's or lm_eval's.

    Others are registered by a task's code and might draw at random; jinja applies them to constants while it compiles.
    """
    filters, tests = ({node.name for node in tree.find_all(kind)} for kind in (nodes.Filter, nodes.Test))
    environment = tree.environment
    assert environment is not None
    own = environment.filters | environment.tests
    usual = DEFAULT_FILTERS | DEFAULT_TESTS
    replaced = any(own.get(name) is not usual[name] for name in filters | tests if name in usual)
    return filters <= _KNOWN_FILTERS and tests <= _KNOWN_TESTS and not replaced


def parse_literal(text: Any) -> Any:
    """As `ast.literal_eval`, which lm_eval has parse a document's choices again at every use."""
    if not isinstance(text, str):
        return ast.literal_eval(text)
    value = _parse_literal(text)
    if isinstance(value, list) and all(isinstance(one, _UNCHANGING) for one in value):
        return value.copy()
    return value if isinstance(value, _UNCHANGING) else ast.literal_eval(text)


def forget_literals() -> None:
    """Give back the memory of what `parse_literal` has kept."""
    _parse_literal.cache_clear()


_parse_literal = functools.lru_cache(maxsize=2**15)(ast.literal_eval)
_UNCHANGING = (str, int, float, bytes, complex, type(None))


def _is_pure(tree: nodes.Template) -> bool:
    """Whether a template gives the same text for the same document, and does not change it."""
    assert tree.environment is not None
    unsafe = {"random", *(tree.environment.filters.keys() - _KNOWN_FILTERS), *(tree.environment.tests.keys() - _KNOWN_TESTS)}
    filters = list(tree.find_all(nodes.Filter))
    if not _is_known(tree) or any(node.name == "random" for node in filters):
        return False
    if any(constant.value in unsafe for constant in tree.find_all(nodes.Const)):  # map("random")
        return False
    for node in filters:
        if node.name == "map" and (node.dyn_args or not all(isinstance(argument, nodes.Const) for argument in node.args)):
            return False  # the filter's name is known only at run time
    if any(name.name in _PURE_FUNCTIONS and name.ctx != "load" for name in tree.find_all(nodes.Name)):
        return False  # {% set range = choices.append %}
    return all(
        (isinstance(call.node, nodes.Getattr) and call.node.attr in _READING)
        or (isinstance(call.node, nodes.Name) and call.node.name in _PURE_FUNCTIONS)
        for call in tree.find_all(nodes.Call)
    )
