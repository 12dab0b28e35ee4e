"""Templates rendered from the cache: the same text as lm_eval's to the byte, the same errors, the same changes of documents."""

from __future__ import annotations

import ast
import copy
import random
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import hypothesis.strategies as st
import jinja2
import lm_eval.utils
import pytest
from hypothesis import example, given, settings

from ddp_eval.tasks.templates import TemplateCache, _is_pure, parse_literal

SEED = 0
ADDRESS = "0x[0-9a-f]+"


@pytest.fixture
def cache() -> TemplateCache:
    return TemplateCache(lm_eval.utils.env)


class Counted:
    """A field that counts how often it is rendered."""

    def __init__(self) -> None:
        self.renders = 0

    def __str__(self) -> str:
        self.renders += 1
        return f"<{self.renders}>"


def render_or_error(render: Callable[[str, Any], str], template: str, document: Any) -> Any:
    """The text, or the error's type and message; without addresses, which differ between two copies of a document."""
    try:
        return re.sub(ADDRESS, "", render(template, document))
    except Exception as error:
        return type(error), re.sub(ADDRESS, "", str(error))


Step = tuple[str, int]  # a template, and which document it is rendered for


def render_all(render: Callable[[str, Any], str], steps: Sequence[Step], documents: Sequence[Any]) -> list[Any]:
    """The outcome of each step, then the random state: one draw too many changes whatever is drawn next."""
    random.seed(SEED)
    return [*(render_or_error(render, template, documents[index]) for template, index in steps), random.getstate()]


def check_against_lm_eval(steps: Sequence[Step], documents: Sequence[Any], kept: Sequence[int] = ()) -> list[Any]:
    """Render by lm_eval and from a cache, each on its own copy of the documents, and compare. Returns each step's outcome."""
    theirs, ours = copy.deepcopy(documents), copy.deepcopy(documents)
    cache = TemplateCache(lm_eval.utils.env)
    cache.keep(ours[index] for index in kept)
    expected = render_all(lm_eval.utils.apply_template, steps, theirs)
    assert render_all(cache.render, steps, ours) == expected
    assert repr(ours) == repr(theirs)  # equal even where a document holds itself
    return expected[:-1]


# Rendered once


def test_kept_document_is_rendered_once_for_each_template(cache: TemplateCache) -> None:
    """Catches a cache that renders every time, or returns the text of another template."""
    document = {"field": Counted()}
    cache.keep([document])
    assert [cache.render("a {{ field }}", document) for _ in range(3)] == ["a <1>"] * 3
    assert [cache.render("b {{ field }}", document) for _ in range(3)] == ["b <2>"] * 3
    assert document["field"].renders == 2


def test_other_documents_are_rendered_each_time(cache: TemplateCache) -> None:
    """Catches text kept for a document that was not given to `keep` and may change."""
    document = {"field": "first"}
    assert cache.render("{{ field }}", document) == "first"
    document["field"] = "second"
    assert cache.render("{{ field }}", document) == "second"


def test_documents_that_are_equal_but_not_the_same(cache: TemplateCache) -> None:
    """Catches documents looked up by value: 1, 1.0 and True are equal and have different texts, and copies may change."""
    documents: list[dict[str, Any]] = [{"field": value} for value in (1, 1.0, True)]
    cache.keep(documents[:2])
    assert [cache.render("{{ field }}", document) for document in documents * 2] == ["1", "1.0", "True"] * 2
    one, other = {"field": ["a"]}, {"field": ["a"]}
    cache.keep([one])
    assert cache.render("{{ field }}", one) == "['a']"
    other["field"].append("b")
    assert cache.render("{{ field }}", other) == "['a', 'b']"


def test_document_kept_twice(cache: TemplateCache) -> None:
    """Catches a second `keep`, for another task with the same examples, that loses texts or stores them twice."""
    document = {"field": Counted()}
    cache.keep([document, document])
    assert cache.render("{{ field }}", document) == "<1>"
    cache.keep([document])
    assert cache.render("{{ field }}", document) == "<1>"
    cache.forget_documents()
    assert cache.render("{{ field }}", document) == "<2>"


def test_forgotten_documents_may_change(cache: TemplateCache) -> None:
    """Catches text that is still reused when the documents may change: while metrics are computed."""
    document = {"field": "first"}
    cache.keep([document])
    assert cache.render("{{ field }}", document) == "first"
    cache.forget_documents()
    document["field"] = "second"
    assert cache.render("{{ field }}", document) == "second"
    cache.keep([document])
    document["field"] = "third"
    assert cache.render("{{ field }}", document) == "third"


def test_id_of_a_kept_document_is_not_used_again(cache: TemplateCache) -> None:
    """Catches the text of a deleted document, returned for a new one at the same address."""
    cache.keep({"field": f"kept {index}"} for index in range(50))
    for index in range(200):
        document = {"field": f"new {index}"}
        assert cache.render("{{ field }}", document) == f"new {index}"
        del document


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("", ""),
        ("Answer:", "Answer:"),
        ("Answer:\n", "Answer:\n"),
        ("{{ ['A', 'B'] }}", "['A', 'B']"),
        ("{# nothing #}{{ 1 + 1 }}", "2"),
        ("{% for letter in 'AB' %}{{ letter }}{% endfor %}", "AB"),
        ("{% set letter = 'A' %}{{ letter }}", "A"),
        ("{% raw %}{{ field }}{% endraw %}", "{{ field }}"),
        ("{{ 'a-b' | regex_replace('-', '+') }}", "a+b"),
    ],
)
def test_constants(template: str, text: str, cache: TemplateCache) -> None:
    """Catches a constant that is wrong, loses its trailing newline, or is right for the first document alone."""
    for document in ({"field": "x"}, {}, {"letter": "Z"}):
        assert cache.render(template, document) == lm_eval.utils.apply_template(template, document) == text


def test_compiled_once_and_constants_rendered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a cache that stores nothing: correct, and as slow as lm_eval."""
    counts = dict.fromkeys(("from_string", "render"), 0)

    def count(owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def counting(*args: Any, **options: Any) -> Any:
            counts[name] += 1
            return function(*args, **options)

        monkeypatch.setattr(owner, name, counting)

    count(jinja2.Environment, "from_string")
    count(jinja2.Template, "render")
    cache = TemplateCache(lm_eval.utils.env)
    for index in range(5):
        assert cache.render("Answer:", {"field": index}) == "Answer:"
    assert counts["from_string"] == 1 and counts["render"] <= 2
    for index in range(5):
        assert cache.render("{{ field }}", {"field": index}) == str(index)
    assert counts["from_string"] == 2 and counts["render"] <= 7


@pytest.mark.parametrize("name", ["range", "dict", "lipsum", "cycler", "joiner", "namespace", "loop", "caller", "varargs"])
def test_field_named_like_a_global(name: str) -> None:
    """Catches a template taken for a constant because jinja knows the name too: a field of that name goes first."""
    template = f"{{{{ {name} }}}}"
    documents = [{name: "1 to 5"}, {name: "6 to 9"}, {"other": 0}]
    steps = [(template, index) for index in (0, 1, 2, 1)]
    for kept in ([], [0, 1, 2]):
        texts = check_against_lm_eval(steps, documents, kept)
        assert texts[:2] == ["1 to 5", "6 to 9"]


def test_constant_in_a_branch_of_a_field(cache: TemplateCache) -> None:
    """Catches a template taken for a constant although a branch, a block or a macro of it reads a field."""
    templates = [
        "{% if field %}{% set x = 1 %}{% endif %}{{ x is defined }}",
        "{% for i in [1] %}{% set x = i %}{% endfor %}{{ x is defined }}",
        "{% block b %}{{ x is defined }}{{ field }}{% endblock %}",
        "{% block b %}{% endblock %}{{ self.b() }}{{ x is defined }}",
        "{% macro m(a=field) %}{{ a }}{{ x is defined }}{% endmacro %}{{ m() }}",
        "{% with a = field %}{{ a }}{{ x is defined }}{% endwith %}",
        "{% filter upper %}{{ field }}{% endfilter %}",
    ]
    documents = [{"field": ""}, {"field": "a"}, {"field": "a", "x": 2}]
    for template in templates:
        steps = [(template, index) for index in (0, 1, 2, 0)]
        check_against_lm_eval(steps, documents)
        check_against_lm_eval(steps, documents, kept=[0, 1, 2])


# Errors


ERRORS = [
    ("{{ missing }}", jinja2.UndefinedError),
    ("{{ field }}{{ missing.inner }}", jinja2.UndefinedError),
    ("{{ field.missing }}", jinja2.UndefinedError),
    ("{{ missing | upper }}", jinja2.UndefinedError),
    ("{{ range(missing) }}", TypeError),
    ("{{ field", jinja2.TemplateSyntaxError),
    ("{% if field %}", jinja2.TemplateSyntaxError),
    ("{% bad %}", jinja2.TemplateSyntaxError),
    ("{{ field | no_such_filter }}", jinja2.TemplateAssertionError),
    ("{% if field %}{{ field | no_such_filter }}{% endif %}", jinja2.TemplateRuntimeError),
    ("{{ 1 / 0 }}", ZeroDivisionError),
    ("{{ field / 2 }}", TypeError),
    ("{% set field.inner = 1 %}", jinja2.TemplateRuntimeError),
    ("{% include 'other' %}", AttributeError),  # lm_eval's environment loads no files
]


@pytest.mark.parametrize(("template", "kind"), ERRORS)
def test_same_error_at_each_call(template: str, kind: type[Exception]) -> None:
    """Catches an error that is raised at the first call alone, or not for a kept document."""
    documents = [{"field": "x"}, {"field": "x"}]
    for kept in ([], [0], [0, 1]):
        errors = check_against_lm_eval([(template, index) for index in (0, 0, 1, 0)], documents, kept)
        assert {error[0] for error in errors} == {kind}


def test_error_of_one_document_is_not_another_ones(cache: TemplateCache) -> None:
    """Catches a failure for one document that is repeated for the others, or text of the others returned for it."""
    documents = [{"field": "a"}, {}, {"field": "b"}]
    for kept in ([], [0, 1, 2]):
        results = check_against_lm_eval([("{{ field }}", index) for index in (1, 0, 1, 2, 0)], documents, kept)
        assert [result for result in results if isinstance(result, str)] == ["a", "b", "a"]


def test_error_after_a_change() -> None:
    """Catches outdated text after a template that changes a kept document and then fails."""
    steps = [("{{ choices | join }}", 0), ("{{ choices.pop() }}{{ missing }}", 0), ("{{ choices | join }}", 0)]
    assert check_against_lm_eval(steps, [{"choices": ["a", "b"]}], kept=[0])[2] == "a"


def test_names_that_a_later_registration_gives(cache: TemplateCache) -> None:
    """Catches a compile error that is remembered: a task's code may register the missing filter later."""
    environment = copy.copy(lm_eval.utils.env)
    environment.filters = dict(environment.filters)
    cache = TemplateCache(environment)
    with pytest.raises(jinja2.TemplateAssertionError):
        cache.render("{{ field | doubled }}", {"field": "a"})
    environment.filters["doubled"] = lambda text: text * 2
    assert cache.render("{{ field | doubled }}", {"field": "a"}) == "aa"


# Not kept


CHANGING = [
    "{{ choices.append(field) }}",
    "{% set _ = choices.append('x') %}{{ choices | length }}",
    "{{ choices.pop() }}",
    "{{ choices.pop(0) }}{{ choices }}",
    "{{ choices.insert(0, 'x') }}{{ choices }}",
    "{{ choices.extend(['x']) }}{{ choices }}",
    "{{ choices.remove(choices[0]) }}{{ choices }}",
    "{{ choices.sort() }}{{ choices }}",
    "{{ choices.reverse() }}{{ choices }}",
    "{{ choices.clear() }}{{ choices }}",
    "{{ inner.update({'n': inner.n + 1}) }}{{ inner.n }}",
    "{{ inner.setdefault('new', choices | length) }}",
    "{{ inner.popitem() }}",
    "{{ choices['append']('x') }}{{ choices }}",
    "{{ (choices | attr('append'))('x') }}{{ choices }}",
    "{% set add = choices.append %}{{ add('x') }}{{ choices }}",
    "{% set range = choices.append %}{{ range('x') }}{{ choices }}",
    "{% with dict = choices.append %}{{ dict('x') }}{{ choices }}{% endwith %}",
    "{% for namespace in [choices.append] %}{{ namespace('x') }}{% endfor %}{{ choices }}",
    "{% macro add(list) %}{{ list.append('x') }}{{ list }}{% endmacro %}{{ add(choices) }}",
    "{% for choice in choices[:2] %}{{ choices.append(choice) }}{% endfor %}{{ choices }}",
    "{% if choices.append('x') %}{% endif %}{{ choices }}",
    "{{ 'a' if choices.append('x') else 'b' }}{{ choices }}",
    "{{ '%s' | format(choices.pop()) }}",
    "{{ 'a'.join(choices.pop()) }}",
]
DRAWING = [
    "{{ choices | random }}",
    "{{ ['a', 'b', 'c', 'd'] | random }}",
    "{{ [choices] | map('random') | list }}",
    "{{ [[choices]] | map('map', 'random') | map('list') | list }}",
    "{{ [choices] | map('ran' ~ 'dom') | list }}",
    "{{ [choices] | map(filter_name) | list }}",
    "{{ [choices] | map(*['ran' ~ 'dom']) | list }}",
    "{% filter random %}abcdef{% endfilter %}",
    "{% set drawn | random %}abcdef{% endset %}{{ drawn }}",
    "{% macro draw() %}{{ choices | random }}{% endmacro %}{{ draw() }}",
    "{{ lipsum(1, min=3, max=6) }}",
    "{% set text = lipsum %}{{ text(n=1, html=False) }}",
    "{% if [true, false] | random %}{{ field }}{% endif %}",
]
DOCUMENT: dict[str, Any] = {
    "field": "a field", "choices": ["b", "d", "a", "c"], "inner": {"n": 1}, "answer": 2, "filter_name": "random",
}  # fmt: skip
READING = [
    "{{ field }} {{ choices[answer] }}",
    "{{ field.strip().upper() }}{{ field.split(' ') | last }}",
    "{{ choices | sort | join(', ') }}{{ choices | reverse | list }}{{ choices }}",
    "{{ choices.index('a') }}{{ inner.get('m', 0) }}{{ inner.items() | list }}",
    "{% for choice in choices %}{{ loop.index0 }}{{ choice }}{% if not loop.last %}, {% endif %}{% endfor %}",
    "{% for i in range(choices | length) %}{{ 'ABCD'[i] }}. {{ choices[i] }}\n{% endfor %}",
    "{% set ns = namespace(text='') %}{% for c in choices %}{% set ns.text = ns.text + c %}{% endfor %}{{ ns.text }}",
    "{% set ns = namespace(inner) %}{% set ns.n = 5 %}{{ ns.n }}{{ inner.n }}",
    "{% set copied = dict(inner, m=2) %}{{ copied.m }}",
    "{{ field | regex_replace('[aeiou]', '_') }}",
    "{{ choices | map('upper') | list }}{{ [inner] | map(attribute='n') | list }}{{ [choices] | map('default', 'x') | list }}",
    "{{ choices | select('ne', 'a') | list }}{{ [inner] | selectattr('n', 'eq', answer) | list }}",
    "{{ missing | default('none') }}{{ missing is defined }}{{ answer is odd }}",
    "{{ '%s and %s' | format(field, answer) }}{{ '{} {}'.format(field, answer) }}",
    "{% filter indent(2) %}{{ field }}\n{{ field }}{% endfilter %}",
    "{{ field if answer else choices }}{{ choices + [field] }}{{ field ~ answer }}",
]


@pytest.mark.parametrize("template", CHANGING)
def test_templates_that_change_a_document(template: str) -> None:
    """Catches a change made once instead of each time, and outdated text after it: this template's or another's."""
    assert not _is_pure(lm_eval.utils.env.parse(template))
    between = "{{ choices }}{{ inner }}"
    steps = [(step, 0) for step in (between, template, between, template, between, between)]
    texts = check_against_lm_eval(steps, [DOCUMENT], kept=[0])
    assert texts[0] != texts[2], "the template must change the document for this test to mean anything"


@pytest.mark.parametrize("template", DRAWING)
def test_templates_that_draw_at_random(template: str) -> None:
    """Catches a draw that is reused, and an extra draw while compiling, which would change all prompts that follow."""
    assert not _is_pure(lm_eval.utils.env.parse(template))
    texts = check_against_lm_eval([(template, index) for index in (0, 1) * 8], [DOCUMENT, DOCUMENT], kept=[0])
    assert len(set(texts)) > 1, "the template must draw for this test to mean anything"


@pytest.mark.parametrize("template", READING)
def test_templates_that_only_read_are_kept(template: str, cache: TemplateCache) -> None:
    """Catches a template that only reads and is rendered again all the same: correct, and slow."""
    assert _is_pure(lm_eval.utils.env.parse(template))
    assert len(set(check_against_lm_eval([(template, 0)] * 2, [DOCUMENT], kept=[0]))) == 1
    document = {**DOCUMENT, "counted": Counted()}
    cache.keep([document])
    texts = {cache.render(template + "{{ counted }}", document) for _ in range(3)}
    assert texts == {lm_eval.utils.apply_template(template, DOCUMENT) + "<1>"}


def test_change_of_one_document_leaves_the_others_kept(cache: TemplateCache) -> None:
    """Catches a task whose template changes its examples and thereby makes every other task slow."""
    changing: dict[str, Any] = {"choices": ["a", "b"], "field": Counted()}
    other: dict[str, Any] = {"choices": ["a"], "field": Counted()}
    cache.keep([changing, other])
    for _ in range(3):
        cache.render("{{ field }}", other)
        cache.render("{{ choices.append('c') }}", changing)
        cache.render("{{ field }}", changing)
    assert (other["field"].renders, changing["field"].renders) == (1, 3)


@pytest.mark.parametrize(
    "template",
    [
        "{% set turn = cycler('a', 'b') %}{{ turn.next() }}{{ turn.next() }}{{ turn.next() }}",
        "{% set comma = joiner(', ') %}{% for choice in choices %}{{ comma() }}{{ choice }}{% endfor %}",
        "{% for choice in choices %}{{ loop.cycle('odd', 'even') }}{{ choice }}{% endfor %}",
        "{% macro letter(i) %}{{ 'ABCD'[i] }}{% endmacro %}{{ letter(answer) }}{{ letter(0) }}",
        "{% macro twice() %}{{ caller() }}{{ caller() }}{% endmacro %}{% call twice() %}{{ field }}{% endcall %}",
        "{% set ns = namespace(n=0) %}{% for c in choices %}{% set ns.n = ns.n + 1 %}{{ ns.n }}{{ c }}{% endfor %}",
        "{% for c in choices recursive %}{{ c }}{% if loop.depth0 < 1 %}{{ loop(choices[:2]) }}{% endif %}{% endfor %}",
        "{% set list = [1, 2] %}{% set _ = list.append(3) %}{{ list }}",
        "{% autoescape true %}{{ '<b>' }}{{ field | safe }}{% endautoescape %}",
    ],
)
def test_state_within_one_rendering(template: str) -> None:
    """Catches state of a compiled template that carries over to the next rendering: a counter, a list that grows."""
    documents = [DOCUMENT, {**DOCUMENT, "field": "other", "answer": 0}]
    for kept in ([], [0, 1]):
        texts = check_against_lm_eval([(template, index) for index in (0, 1, 0, 1, 0)], documents, kept)
        assert texts[0] == texts[2] == texts[4]


@pytest.fixture
def drawing_names() -> Iterator[None]:
    """A filter and a test that draw, registered with lm_eval's environment as a task's code might."""
    environment = lm_eval.utils.env
    environment.filters["drawn"] = lambda values: random.choice(list(values))
    environment.tests["lucky"] = lambda value: random.random() < 0.5
    yield
    del environment.filters["drawn"], environment.tests["lucky"]


@pytest.mark.parametrize(
    "template",
    [
        "{{ choices | drawn }}",
        "{{ [choices, choices] | map('drawn') | list }}",
        "{{ field is lucky }}",
        "{{ choices | select('lucky') | list }}",
        "{{ ['a', 'b'] | drawn }}{{ 1 is lucky }}",
    ],
)
def test_filters_and_tests_of_a_tasks_own(template: str, drawing_names: None) -> None:
    """Catches text reused although a filter or test that a task's code has registered draws at random."""
    assert len(set(check_against_lm_eval([(template, 0)] * 16, [DOCUMENT], kept=[0]))) > 1


@pytest.mark.parametrize(
    "text",
    [
        "['a', 'b']", "[]", "[1, 2.5, None, True, -1]", "[1, True, 1.0]", "[['a'], ['b']]", "[{'a': 1}]", "{'a': [1]}", "{1, 2}",
        "('a', ['b'])", "'a'", "12", " 12", "None", "b'a'", "...", "[", "a", "['a' 'b']", "", "[a]", "1 +",
    ],
)  # fmt: skip
def test_literals(text: str) -> None:
    """Catches a literal parsed to another value or type, an error raised once, and a value that its receiver can change."""
    parsers = (ast.literal_eval, parse_literal, parse_literal)
    results = [render_or_error(lambda text, _, parse=parse: repr(parse(text)), text, None) for parse in parsers]  # type: ignore[misc]
    assert results[0] == results[1] == results[2]
    if isinstance(results[0], str) and isinstance(value := parse_literal(text), list):
        for inner in [value, *(one for one in value if isinstance(one, list))]:
            inner.append("changed")
        assert repr(parse_literal(text)) == results[0]


# Random templates and documents


TEXTS = st.text("ab {}%'\n1", max_size=4)
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "field": st.one_of(TEXTS, st.integers(-1, 3), st.none(), st.booleans(), st.floats(0, 1)),
    "choices": st.lists(TEXTS, min_size=1, max_size=4),
    "inner": st.dictionaries(st.sampled_from(["n", "m", "items"]), st.integers(0, 3), max_size=3),
    "answer": st.one_of(st.integers(0, 1), st.sampled_from(["0", "b"])),
    "filter_name": st.sampled_from(["random", "upper"]),
    "range": st.sampled_from(["1 to 5", 3]),
}
SAFE = [
    "", " ", "\n", "Answer:", "1", "{% raw %}{{ field }}{% endraw %}", "{{ ['A', 'B'] }}",
    "{{ field }}", "{{ choices }}", "{{ inner }}", "{{ answer }}", "{{ choices[answer] }}", "{{ inner | length }}", "{{ range }}",
    "{{ missing is defined }}", "{{ field | default('none') }}", "{{ dict(inner) }}", "{{ inner.items() | list }}",
    "{% set ns = namespace(n=0) %}{% for c in choices %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    *(template for template in READING if len(template) < 60),
]  # fmt: skip
UNSAFE = [
    "{{ missing }}", "{{ field / 2 }}", "{% for i in range(3) %}{{ i }}{{ choices[i] }}{% endfor %}",
    "{{ choices | map(filter_name) | list }}", "{{ field | regex_replace('a', 'b') }}", "{{ cycler(1, 2).next() }}",
    *(template for template in CHANGING + DRAWING if len(template) < 60),
]  # fmt: skip
SAFE_WRAPPERS = [
    "{{% if answer %}}{0}{{% else %}}{1}{{% endif %}}",
    "{{% for choice in choices[:2] %}}{0}{{% endfor %}}{1}",
    "{{% set field = 'set' %}}{0}{1}",
    "{{% filter upper %}}{0}{{% endfilter %}}{1}",
    "{{% with field = choices %}}{0}{{% endwith %}}{1}",
    "{{% block b %}}{0}{{% endblock %}}{1}",
]
UNSAFE_WRAPPERS = [
    "{{% set range = choices.append %}}{0}{{{{ range('y') }}}}{1}",
    "{{% macro m(choices) %}}{0}{{% endmacro %}}{{{{ m(choices) }}}}{1}",
    "{{% filter random %}}{0}z{{% endfilter %}}{1}",
]


@st.composite
def templates(draw: st.DrawFn, leaves: list[str], wrappers: list[str], depth: int = 2) -> str:
    """Fragments, side by side and in one another."""
    kind = draw(st.integers(0, 2)) if depth else 0
    if kind == 0:
        return draw(st.sampled_from(leaves))
    one, other = (draw(templates(leaves, wrappers, depth - 1)) for _ in range(2))
    return one + other if kind == 1 else draw(st.sampled_from(wrappers)).format(one, other)


@st.composite
def renderings(draw: st.DrawFn) -> tuple[list[Step], list[dict[str, Any]], list[int]]:
    """Steps over few templates and documents, so that they come again, and which of the documents are kept.

    Some templates only read, so that their text is kept; others change documents, draw or fail, which may make that text wrong.
    """
    safe = draw(st.lists(templates(SAFE, SAFE_WRAPPERS), min_size=1, max_size=2))
    unsafe = draw(st.lists(templates(SAFE + UNSAFE, SAFE_WRAPPERS + UNSAFE_WRAPPERS), max_size=2))
    documents = draw(st.lists(st.fixed_dictionaries(FIELDS), min_size=1, max_size=2))
    for document in documents:
        for name in draw(st.lists(st.sampled_from(sorted(FIELDS)), max_size=1)):
            del document[name]
    indices = st.integers(0, len(documents) - 1)
    steps = draw(st.lists(st.tuples(st.sampled_from(safe + unsafe), indices), min_size=4, max_size=12))
    return steps, documents, draw(st.lists(indices, max_size=3))


@settings(max_examples=150)
@given(renderings())
@example(([("{{ choices | join }}", 0), ("{{ choices.pop() }}", 0), ("{{ choices | join }}", 0)], [{"choices": ["a", "b"]}], [0]))
@example(([("{{ range }}", 0), ("{{ range }}", 1)], [{"range": "1 to 5"}, {"range": 3}], []))
def test_any_sequence_of_renderings(rendering: tuple[list[Step], list[dict[str, Any]], list[int]]) -> None:
    """Catches combinations that the cases above leave out: templates that read, change, draw and fail, over kept documents."""
    check_against_lm_eval(*rendering)
