"""Chat templates: the same text as transformers makes of them, from wherever a model keeps them."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from cableway.frontend.errors import RequestError
from cableway.frontend.template import ChatTemplate
from cableway.ipc import modelfiles
from cableway.ipc.gguf import ModelError
from cableway.ipc.modelfiles import ModelFiles

from .samples import smollm2_metadata

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
CHAT = [
    {"role": "system", "content": "Be brief.\n"},
    {"role": "user", "content": " Hi <there> & 'you' \"all\" 😀 "},
    {"role": "assistant", "content": "Hello!\n\nHow are you?", "reasoning": "a greeting"},
    {"role": "user", "content": [{"type": "text", "text": "fine"}, {"type": "text", "text": "thanks"}]},
]
TOOLS = [
    {
        "type": "function",
        "function": {"name": "weather", "parameters": {"type": "object", "properties": {"città": {"type": "string"}}}},
    }
]

TEMPLATES = {
    "chatml": (
        "{% for message in messages %}\n"
        "    {%- if loop.first and message.role != 'system' %}{{ '<|system|>default' }}{% endif %}\n"
        "{{ '<|im_start|>' + message['role'] + '\\n' + (message['content'] | string | trim) + '<|im_end|>' }}\n"
        "{% endfor %}\n"
        "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "instruct": (
        "{% set ns = namespace(system='', turns=[]) %}{{ bos_token }}"
        "{% for m in messages %}{% if m.role == 'system' %}{% set ns.system = m.content %}{% continue %}{% endif %}"
        "{% if m.content is string %}{% set text = m.content.strip() %}"
        "{% else %}{% set text = m.content | map(attribute='text') | join(' ') %}{% endif %}"
        "{% set ns.turns = ns.turns + [(m.role, text)] %}{% endfor %}"
        "{% for role, text in ns.turns %}{% if role == 'user' %}"
        "[INST] {% if loop.first and ns.system %}<<SYS>>{{ ns.system }}<</SYS>>{% endif %}{{ text }} [/INST]"
        "{% else %} {{ text ~ eos_token }}{% endif %}{% endfor %}"
    ),
    "tools": (
        "{%- macro show(tool, indent=none) %}{{ tool.function.name }}: "
        "{{ tool | tojson(indent=indent) }}{% endmacro -%}"
        "{% if tools %}# Tools ({{ tools | length }})\n{% for tool in tools %}{{ show(tool) }}\n{{ show(tool, 2) }}\n"
        "{% endfor %}{% endif %}{{ messages[0] | tojson }}{{ messages[1:] | tojson(sort_keys=true) }}"
        "{% for m in messages if m.role in ['user', 'assistant'] %}{{ loop.index0 }}/{{ loop.length }}"
        "{{ m.role | upper }}"
        "{% if not loop.last %}{{ ', ' }}{% else %}.{% break %}{% endif %}{% endfor %}"
    ),
    "features": (
        "{% generation %}{% set hidden = 'in' %}{{ hidden }}{% endgeneration %}{{ hidden is defined }}"
        "{{ '%s and %d' % ('text', 7) }} {{ '{}-{:>4}'.format('a', 'b') }} {{ 'a,b'.split(',') | join('+') }}"
        "{{ 2 ** 10 }} {{ 7 // 2 }} {{ 7 % 4 }} {{ 1.5 * 2 }} {{ 'ab' * 3 }} {{ [1, 2] + [3] }} {{ (1, 'x') }}"
        "{{ {'k': [none, true]} }} {{ 'hello world'.title() }} {{ 'abc' | replace('b', '[b]') }}"
        "{{ 'x\ny' | indent(4) }} {{ 'mid' | center(9) }} {{ 3.14159 | round(2) }} {{ [3, 1, 2] | sort | first }}"
        "{{ [1, 2, 3] | sum }} {{ messages | selectattr('role', 'equalto', 'user') | list | length }}"
        "{{ messages | map(attribute='role') | unique | join('|') }} {{ 'é' | tojson }} {{ '<&>' | tojson }}"
        "{{ messages[-1].content[0].text[::-1] }} {{ undefined_name }} {{ missing.role if missing else 'none' }}"
        "{% set block %}captured {{ 1 + 1 }}{% endset %}{{ block }} {{ range(3) | list }}"
        "{{ dict(a=1).items() | list }}"
        "{% filter upper %}shout{% endfilter %} {{ 'a' if messages else 'b' }} {{ messages | length > 2 and 'many' }}"
        "{% for k, v in {'x': 1, 'y': 2}.items() %}{{ k }}={{ v }};{% else %}none{% endfor %}"
        "{% for x in [] %}{% else %}empty{% endfor %}{{ [['a', 1], ['b', 2]] | map('first') | list }}"
        "{% call(x) each([1, 2]) %}<{{ x }}>{% endcall %}"
    ).replace("{% call", "{% macro each(items) %}{% for i in items %}{{ caller(i) }}{% endfor %}{% endmacro %}{% call"),
}


def ours(source: str) -> ChatTemplate:
    return ChatTemplate({"default": source}, SPECIAL, "test")


def theirs(source: str, messages: list[dict[str, Any]], **options: Any) -> str:
    rendered, _ = render_jinja_template([messages], chat_template=source, **SPECIAL, **options)
    return str(rendered[0])


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_equals_transformers(name: str, tools: list[dict[str, Any]] | None, add_generation_prompt: bool) -> None:
    source = TEMPLATES[name]
    for length in range(1, len(CHAT) + 1):
        chat = CHAT[:length]
        if name == "features" and length < len(CHAT):
            continue  # it looks into the last message's parts
        expected = theirs(source, chat, tools=tools, add_generation_prompt=add_generation_prompt)
        assert ours(source).render(chat, tools=tools, add_generation_prompt=add_generation_prompt) == expected


def test_smollm2_equals_transformers() -> None:
    template = ChatTemplate.load(modelfiles.locate("smollm2-135m"))
    source = smollm2_metadata()["tokenizer.chat_template"]
    chat = [message for message in CHAT if isinstance(message["content"], str)]
    for messages in (chat, chat[1:]):
        assert template.render(messages) == theirs(source, messages, add_generation_prompt=True)
    assert template.render([{"role": "user", "content": "Hi"}]).endswith("user\nHi<|im_end|>\n<|im_start|>assistant\n")


# ---------------------------------------------------------------------------------------------------------------------
# Going on with the last message


@pytest.mark.parametrize("name", ["chatml", "instruct"])
@pytest.mark.parametrize(
    "content", ["The capital is", "trailing space ", "", "two\n\n", [{"type": "text", "text": "x y"}]]
)
def test_continuing_equals_transformers(name: str, content: Any) -> None:
    messages = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": content}]
    if name == "chatml" and not isinstance(content, str):
        pytest.skip("this template prints lists")
    expected = theirs(TEMPLATES[name], messages, continue_final_message=True)
    text = ours(TEMPLATES[name]).render(messages, add_generation_prompt=False, continue_final_message=True)
    assert text == expected
    assert messages[1]["content"] == content  # the caller's messages are left alone


def test_continuing_needs_a_text_that_the_template_keeps() -> None:
    user = {"role": "user", "content": "x"}
    dropping = ours("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}")
    for template, last in ((dropping, {"role": "assistant", "content": "y"}), (dropping, {"role": "assistant"})):
        with pytest.raises(RequestError, match=r"continue") as caught:
            template.render([user, last], add_generation_prompt=False, continue_final_message=True)
        assert caught.value.status == 400
    with pytest.raises(RequestError, match="exclude"):
        dropping.render([user], add_generation_prompt=True, continue_final_message=True)


# ---------------------------------------------------------------------------------------------------------------------
# What goes in


def test_null_is_left_out() -> None:
    template = ours("{% for m in messages %}{{ m.name is defined }}{{ m | tojson }}{% endfor %}")
    assert template.render([{"role": "user", "content": "x", "name": None}]) == 'False{"role": "user", "content": "x"}'


def test_variables_reach_the_template_and_outrank_special_tokens() -> None:
    template = ours("{{ bos_token }}{{ enable_thinking }}{{ messages[0].content }}")
    variables = {"bos_token": "B", "enable_thinking": False, "messages": "taken", "self": 1}
    assert template.render([{"role": "user", "content": "x"}], **variables) == "BFalsex"


def test_no_messages_and_no_template_are_the_clients_fault() -> None:
    with pytest.raises(RequestError, match="at least one message"):
        ours("x").render([])
    with pytest.raises(RequestError, match="no chat template") as caught:
        ChatTemplate({}, {}, "test").render([{"role": "user", "content": "x"}])
    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content.nothing.at_all }}", "no attribute 'nothing'"),
        ("{{ messages[7].role }}", "no element 7"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ 'a' + 1 }}", "TypeError"),
        ("{{ ([] | first).role }}", "No first item"),
        ("{% include 'other' %}", "no loader"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ namespace(__class__=1) }}", "cannot hold '__class__'"),
        ("{{ cycler.__init__.__globals__ }}", "unsafe"),
        ("{{ raise_exception('x' * 100000) }}", "xxx"),
    ],
)
def test_a_template_that_fails_is_told(source: str, said: str) -> None:
    with pytest.raises(RequestError, match="chat template") as caught:
        ours(source).render([{"role": "user", "content": "x"}])
    assert caught.value.status == 400
    assert said in caught.value.message
    assert len(caught.value.message) < 2500


@pytest.mark.parametrize("source", ["{% for %}", "{{ x | no_such_filter }}", "{% if x %}", "(" * 9 + "{{" + "(" * 5000])
def test_a_broken_template_is_said_at_the_start(source: str) -> None:
    with pytest.raises(ModelError, match=r"^test: chat template"):
        ours(source)


# ---------------------------------------------------------------------------------------------------------------------
# Where templates are


def folder(path: Path, **files: Any) -> ModelFiles:
    for name, content in files.items():
        file = path / name.replace("__", "/").replace("_dot_", ".")
        file.parent.mkdir(exist_ok=True)
        file.write_text(content if isinstance(content, str) else json.dumps(content))
    return ModelFiles(name="m", kind="folder", path=str(path), config={}, generation_config={}, weights=[])


def rendered(files: ModelFiles, override: str | None = None, **options: Any) -> str:
    return ChatTemplate.load(files, override).render([{"role": "user", "content": "x"}], **options)


def test_a_folder_keeps_its_template_in_many_places(tmp_path: Path) -> None:
    config = {"chat_template": "config {{ bos_token }}", "bos_token": {"content": "<b>", "lstrip": False}}
    files = folder(tmp_path, tokenizer_config_dot_json=config)
    assert rendered(files) == "config <b>"
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}, {"name": 1}]
    files = folder(tmp_path, tokenizer_config_dot_json={"chat_template": named})
    assert (rendered(files), rendered(files, tools=TOOLS)) == ("plain", "tools")
    files = folder(tmp_path, chat_template_dot_json={"chat_template": "json"})
    assert rendered(files) == "json"
    files = folder(tmp_path, chat_template_dot_jinja="jinja", additional_chat_templates__tool_use_dot_jinja="more")
    assert (rendered(files), rendered(files, tools=TOOLS)) == ("jinja", "more")
    override = tmp_path / "mine.jinja"
    override.write_text("mine")
    assert (rendered(files, str(override)), rendered(files, str(override), tools=TOOLS)) == ("mine", "mine")


def test_an_override_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    files = folder(tmp_path)
    with pytest.raises(ModelError, match="No such file"):
        ChatTemplate.load(files, str(tmp_path / "none.jinja"))
    (tmp_path / "binary.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ModelError, match="not UTF-8"):
        ChatTemplate.load(files, str(tmp_path / "binary.jinja"))
