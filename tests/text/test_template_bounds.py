"""Whatever a template does, rendering it ends soon and in little memory, and an honest one never notices."""

import resource
import subprocess
import sys
import time

import pytest

from cableway.frontend.errors import RequestError
from cableway.frontend.template import ChatTemplate

_BIG = "{% set b = 'a' * 1000000 %}"
_GROW = "{% set ns = namespace(x=START) %}{% for i in range(99) %}{% set ns.x = STEP %}{% endfor %}{{ ns.x }}"


def grow(start: str, step: str) -> str:
    return _GROW.replace("START", start).replace("STEP", step)


BOMBS = {
    "long range": "{% for i in range(10 ** 9) %}x{% endfor %}",
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "looping filter": "{% for i in range(99999) if range(99999) | select('lt', 0) | list %}{% endfor %}",
    "looping test": "{% set x = range(99999) | list %}{{ x | select('in', x) | list | length }}",
    "branching macro": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "endless macro": "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "endless block": "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
    "endless loop": "{% for x in [1] recursive %}{{ loop([1, 1]) }}{% endfor %}",
    "string times": "{{ 'a' * 10 ** 10 }}",
    "times string": "{{ 10 ** 10 * 'a' }}",
    "list times": "{{ ([1] * 10 ** 9) | length }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "squares": grow("10", "ns.x * ns.x"),
    "division of giants": "{{ ('f' * 1000000) | int(0, 16) // 3 }}",
    "doubling by ~": grow("'aaaaaaaa'", "ns.x ~ ns.x"),
    "doubling by +": grow("'aaaaaaaa'", "ns.x + ns.x"),
    "doubling lists": grow("[1]", "ns.x + ns.x"),
    "billion laughs": grow("['a']", "[ns.x, ns.x]"),
    "laughing dicts": grow("['a']", "{'a': ns.x, 'b': ns.x}"),
    "laughing tuples": grow("('a',)", "(ns.x, ns.x)"),
    "hoarded slices": (
        "{% set x = [1] * 100000 %}{% set ns = namespace() %}"
        "{% for i in range(99999) %}{% set ns.x = namespace(before=ns.x, slice=x[1:]) %}{% endfor %}"
    ),
    "deep list": (
        "{% set ns = namespace(x=[]) %}{% for i in range(9999) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x }}"
    ),
    "center": "{{ 'a'.center(10 ** 10) }}",
    "ljust": "{{ 'a'.ljust(width=10 ** 10) }}",
    "zfill": "{{ 'a'.zfill(10 ** 10) }}",
    "expandtabs": "{{ '\t'.expandtabs(10 ** 9) }}",
    "center filter": "{{ 'a' | center(10 ** 10) }}",
    "indent filter": "{{ ('a\n' * 1000) | indent(10 ** 9) }}",
    "batch": "{{ [1] | batch(10 ** 9, 'x') | list }}",
    "slice": "{{ [1] | slice(10 ** 9) | list | length }}",
    "round": "{{ 5.5 | round(10 ** 9, 'ceil') }}",
    "wide percent": "{{ '%1000000000d' % 1 }}",
    "wide star": "{{ '%*d' % (1000000000, 1) }}",
    "wide braces": "{{ '{:1000000000}'.format(1) }}",
    "wide nested braces": "{{ '{:{}}'.format(1, 1000000000) }}",
    "wide format filter": "{{ '%1000000000d' | format(1) }}",
    "many percents": _BIG + "{{ ('%(a)s' * 100000) % {'a': b} }}",
    "many braces": _BIG + "{{ ('{0}' * 100000).format(b) }}",
    "join filter": _BIG + "{{ (range(100000) | join(b)) | length }}",
    "join": _BIG + "{{ b.join(b) | length }}",
    "replace": _BIG + "{{ b.replace('a', b) | length }}",
    "replace nothing": _BIG + "{{ b.replace('', b) | length }}",
    "replace filter": _BIG + "{{ (b | replace('a', b)) | length }}",
    "shared items": _BIG + "{{ range(100000) | map('replace', '', b) | join | length }}",
    "wide json": "{{ [1, [2]] | tojson(indent=10 ** 9) }}",
    "wide json by text": _BIG + "{{ [1, [2]] | tojson(indent=b) }}",
    "deep json": (
        "{% set ns = namespace(x=range(99999) | list) %}{% for i in range(500) %}{% set ns.x = [ns.x] %}{% endfor %}"
        "{{ ns.x | tojson(indent=60) | length }}"
    ),
    "sum of lists": "{{ (range(100000) | batch(1) | sum(start=[])) | length }}",
    "lipsum": "{{ lipsum(n=10 ** 9) }}",
    "bytes": "{{ 'a'.encode().center(10 ** 10) }}",
    "int to bytes": "{{ (5).to_bytes(10 ** 9, 'big') }}",
    "translate": _BIG + "{{ b.translate({97: b}) }}",
    "text in macro": "{% macro f() %}{% for i in range(99999) %}"
    + "x" * 50_000
    + "{% endfor %}{% endmacro %}{{ f() }}",
    "text in set": "{% set x %}{% for i in range(99999) %}" + "x" * 50_000 + "{% endfor %}{% endset %}",
    "text in loop": "{% for i in range(99999) %}" + "x" * 50_000 + "{% endfor %}",
    "callers": (
        "{% macro f() %}{% for i in range(1000) %}{{ caller() }}{% endfor %}{% endmacro %}"
        "{% call f() %}{% call f() %}{% call f() %}x{% endcall %}{% endcall %}{% endcall %}"
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_end_in_time(name: str) -> None:
    template = ChatTemplate({"default": BOMBS[name]}, {}, "test")
    started_s = time.thread_time()
    with pytest.raises(RequestError, match="chat template") as caught:
        template.render([{"role": "user", "content": "x"}])
    assert time.thread_time() - started_s < 5.0  # 1 s is allowed, and the longest step comes on top
    assert caught.value.status == 400
    assert "\n" not in caught.value.message


def test_bombs_end_in_little_memory() -> None:
    """All of them again, in a process that could not hold one that went off; and none may end in a MemoryError."""
    program = (
        "import importlib.util, sys\n"
        "from cableway.frontend.errors import RequestError\n"
        "from cableway.frontend.template import ChatTemplate\n"
        "spec = importlib.util.spec_from_file_location('bounds', sys.argv[1])\n"
        "bounds = importlib.util.module_from_spec(spec); spec.loader.exec_module(bounds)\n"
        "for name, source in bounds.BOMBS.items():\n"
        "    try: ChatTemplate({'default': source}, {}, 'test').render([{'role': 'user', 'content': 'x'}])\n"
        "    except RequestError as error: assert 'MemoryError' not in error.message, name\n"
    )
    limit_bytes = 1 << 30
    subprocess.run(
        [sys.executable, "-c", program, __file__],
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes)),
    )


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "x" * 4_000_000}],
        [{"role": "user", "content": f"message {i}"} for i in range(20_000)],
        [{"role": "user", "content": [{"type": "text", "text": "y" * 1000}] * 500}] * 4,
    ],
    ids=["one long", "many short", "many parts"],
)
def test_honest_templates_may_be_given_much(messages: list[dict[str, object]]) -> None:
    template = ChatTemplate(
        {
            "default": "{% set ns = namespace(all='', seen=[]) %}{% for m in messages %}"
            "{% if m.content is string %}{% set text = m.content | trim %}"
            "{% else %}{% set text = m.content | map(attribute='text') | join('\n') %}{% endif %}"
            "{{ '<|' ~ m.role ~ '|>' }}{{ text.replace('\r', '') + eos_token }}{{ '\n' }}{% endfor %}"
        },
        {"eos_token": "</s>"},
        "test",
    )
    text = template.render(messages)
    assert text.count("</s>") == len(messages)
