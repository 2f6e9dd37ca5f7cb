"""Jinja2 in bounds: whatever a template says, rendering it ends within bounded time and memory.

Templates come with models and are somebody else's programs. Jinja's sandbox keeps them from reaching the interpreter,
but not from looping for ever or making a string of 100 GB. Here every step of a template spends from a `Budget`:

- the body of each loop and macro looks at the clock when it is entered, and its text is spent as it is put out;
- each value made by an operator, a call, a filter, a literal or a slice spends its size, *before* it is made where it
  can be larger than what it is made of (`"x" * n`, `center`, `replace`, `join`, formatting …);
- no value may hold more in all, counted as often as it is reached, than the budget began with: printing or comparing a
  list of lists of the same list would otherwise take exponential time within one step.

So the longest step that cannot be interrupted is linear in the budget. What has no such bound is left out.
"""

import json
import re
import time
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any

from jinja2 import TemplateRuntimeError, nodes, pass_context
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

_BASE_UNITS, _UNITS_PER_UNIT = 8_000_000, 64
_BASE_TIME_S, _TIME_PER_UNIT_S = 1.0, 0.5e-6
_STEP_UNITS = 16  # what any step costs; about the bytes that the least value takes
_MAX_INT_BITS = 1 << 14
_MAX_PRECISION = 100
_MAX_SEPARATOR_CHARS = 64
_MAX_FIELD_WIDTH = 9999
_MAX_TIME_FORMAT_CHARS = 256
_WIDE_PERCENT = re.compile(r"%[^a-zA-Z%]*[0-9]{5}")
_WIDE_BRACES = re.compile(r"\{[^{}]*[0-9]{5}")
_NESTED_BRACES = re.compile(r"\{[^{}]*\{")

_LEFT_OUT_FILTERS = ("pprint", "random", "striptags", "urlize", "wordwrap", "xmlattr")
_LEFT_OUT_METHODS = frozenset(("encode", "from_bytes", "maketrans", "striptags", "to_bytes", "translate"))


class TemplateLimitError(TemplateRuntimeError):
    """A template asked for more time or memory than it may have."""


class Budget:
    """What one rendering may use: characters, list entries and steps made in all, and time.

    Args:
        given: the template's variables; the more they hold, the larger the budget.
    """

    def __init__(self, given: list[Any]):
        self._weights: dict[int, tuple[int, Any]] = {}  # by id; the value is kept, so that its id stays its own
        given_weight = self.weigh(given)
        self._max_weight = self._left = _BASE_UNITS + _UNITS_PER_UNIT * given_weight
        # Of this thread: a template is not to be refused because others compute, too.
        self._deadline_s = time.thread_time() + _BASE_TIME_S + _TIME_PER_UNIT_S * given_weight

    def allow(self, num_units: int) -> None:
        """Refuse a step that would make more than what is left, before it does."""
        if num_units > self._left:
            raise TemplateLimitError("the chat template makes more text than it may")

    def spend(self, num_units: int) -> None:
        self._left -= num_units + _STEP_UNITS
        if self._left < 0:
            raise TemplateLimitError("the chat template makes more text than it may")
        if time.thread_time() > self._deadline_s:
            raise TemplateLimitError("the chat template takes too long")

    def keep(self, value: Any) -> Any:
        """Spend what a new value takes, and return it."""
        if isinstance(value, str):
            self.spend(len(value))
        elif isinstance(value, list | tuple | dict):
            self.spend(len(value))
            if self.weigh(value) > self._max_weight:
                raise TemplateLimitError("the chat template makes a larger value than it may")
        elif isinstance(value, int):
            self.spend(0)
            if value.bit_length() > _MAX_INT_BITS:
                raise TemplateLimitError("the chat template makes a larger number than it may")
        else:
            self.spend(0)
        return value

    def weigh(self, value: Any) -> int:
        """All that is in a value, each part as often as it is reached: what printing or comparing it would take."""
        if isinstance(value, str):
            return len(value)
        if isinstance(value, int):
            return max(_STEP_UNITS, value.bit_length() // 3)
        if not isinstance(value, list | tuple | dict):
            return _STEP_UNITS
        known = self._weights.get(id(value))
        if known is not None:
            return known[0]
        weight = _STEP_UNITS
        for part in value:
            weight += self.weigh(part)
        if isinstance(value, dict):
            for part in value.values():
                weight += self.weigh(part)
        self._weights[id(value)] = (weight, value)
        return weight


class BoundedContext(Context):
    """The variables of one rendering, and its budget."""

    budget: Budget

    def derived(self, locals: dict[str, Any] | None = None) -> "BoundedContext":
        context = super().derived(locals)
        assert isinstance(context, BoundedContext)
        context.budget = self.budget
        return context


class _BoundedCode(CodeGenerator):
    """Leads literals, slices and `~` through the environment; operators and calls of a sandbox pass there anyway."""

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        if node.ctx != "load":
            super().visit_Tuple(node, frame)
        else:
            self._kept(super().visit_Tuple, node, frame)

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self._kept(super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self._kept(super().visit_Dict, node, frame)

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        if isinstance(node.arg, nodes.Slice):
            self._kept(super().visit_Getitem, node, frame)
        else:
            super().visit_Getitem(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.concatenate(context, ")
        super().visit_Tuple(nodes.Tuple(node.nodes, "load"), frame)
        self.write(")")

    def _kept(self, visit: Callable[[Any, Frame], None], node: nodes.Expr, frame: Frame) -> None:
        self.write("context.budget.keep(")
        visit(node, frame)
        self.write(")")


class _GenerationTag(Extension):
    """`{% generation %} … {% endgeneration %}` marks what to train on; here it only makes a scope."""

    tags = {"generation"}  # noqa: RUF012  (as Jinja declares it)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _TemplateNamespace(Namespace):
    """`namespace()` without its contents when printed: it may hold itself. Private names are refused."""

    def __init__(self, attributes: dict[str, Any]):
        super().__init__()
        for name, value in attributes.items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a namespace cannot hold {name!r}")
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The environment of chat templates: what their authors count on, with a budget."""

    code_generator_class = _BoundedCode
    context_class = BoundedContext
    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols], finalize=_finalize
        )
        del self.globals["lipsum"]
        self.globals |= {
            "dict": _make_dict,
            "namespace": _make_namespace,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }
        self.filters |= {"sum": _sum, "tojson": _tojson}
        self.filters = {
            name: _bounded(function, _FILTER_SIZES.get(name))
            for name, function in self.filters.items()
            if name not in _LEFT_OUT_FILTERS
        }
        self.tests = {name: _bounded(function, None) for name, function in self.tests.items()}

    def call(  # type: ignore[override]  # an environment's contexts are of its context_class
        self, context: BoundedContext, function: Any, /, *args: Any, **kwargs: Any
    ) -> Any:
        """A call in a template: of a macro, a global function or a method."""
        budget = context.budget
        budget.spend(0)
        method = getattr(function, "__wrapped__", function)  # the sandbox wraps str.format
        subject = getattr(method, "__self__", None)
        if isinstance(subject, str) and (size := _METHOD_SIZES.get(method.__name__)) is not None:
            given = {name: value for name, value in kwargs.items() if name not in ("_loop_vars", "_block_vars")}
            args = tuple(_as_list(budget, argument) for argument in args)
            budget.allow(size(budget, subject, *args, **given))
        return budget.keep(super().call(context, function, *args, **kwargs))

    def call_binop(  # type: ignore[override]
        self, context: BoundedContext, operator: str, left: Any, right: Any
    ) -> Any:
        """An operator between two values."""
        if left.__class__ is str and right.__class__ is str and operator == "+":
            context.budget.spend(len(left) + len(right))  # PERF: what templates do most, 3 times as fast as below
            return left + right
        if size := _OPERATOR_SIZES.get(operator):
            context.budget.allow(size(context.budget, left, right))
        return context.budget.keep(super().call_binop(context, operator, left, right))

    def concatenate(self, context: BoundedContext, parts: tuple[Any, ...]) -> str:
        """`a ~ b ~ c`."""
        budget = context.budget
        budget.spend(sum(budget.weigh(part) for part in parts))
        return "".join(str(part) for part in parts)

    def enter(self) -> None:
        """The body of a loop or macro begins. Being called is all that it takes: a call spends, and sees the clock."""

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in _LEFT_OUT_METHODS and super().is_safe_attribute(obj, attr, value)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template = super()._parse(source, name, filename)
        block: Any
        for block in template.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
            for output in block.find_all(nodes.Output):
                output.nodes = [_spent_constant(node) for node in output.nodes]
            call = nodes.Call(nodes.EnvironmentAttribute("enter"), [], [], None, None)
            block.body.insert(0, nodes.ExprStmt(call, lineno=block.lineno))
        return template


def _spent_constant(node: nodes.Expr) -> nodes.Expr:
    """Constant text within a loop is put out as a value, and so is spent each time."""
    return nodes.MarkSafeIfAutoescape(nodes.Const(node.data)) if isinstance(node, nodes.TemplateData) else node


@pass_context
def _finalize(context: BoundedContext, value: Any) -> Any:
    """Every `{{ value }}` passes here before it becomes text."""
    context.budget.spend(context.budget.weigh(value))
    return value


def _bounded(function: Any, size: Callable[..., int] | None) -> Any:
    """A filter or test that spends what it makes, asked beforehand where `size` can tell."""

    @pass_context
    def bounded(context: BoundedContext, *args: Any, **kwargs: Any) -> Any:
        budget = context.budget
        if size is not None:
            args = tuple(_as_list(budget, argument) for argument in args)
            budget.allow(size(budget, *args, **kwargs))
        return budget.keep(context.call(function, *args, **kwargs))

    return bounded


def _as_list(budget: Budget, value: Any) -> Any:
    """Filters hand on generators, which can be looked at only once."""
    return budget.keep(list(value)) if hasattr(value, "__next__") else value


# ---------------------------------------------------------------------------------------------------------------------
# How large a result can get, for each operation whose result can be larger than what it is given


def _text(budget: Budget, value: Any) -> str:
    if isinstance(value, str):
        return value
    budget.allow(budget.weigh(value))
    return str(value)


def _padded(budget: Budget, value: Any, width: int = 80, fillchar: str = " ") -> int:
    return budget.weigh(value) + int(width)


def _expanded(budget: Budget, value: str, tabsize: int = 8) -> int:
    return len(value) + value.count("\t") * int(tabsize)


def _replaced(budget: Budget, value: Any, old: Any, new: Any, count: Any = None) -> int:
    text = _text(budget, value)
    return len(text) + text.count(_text(budget, old)) * budget.weigh(new)


def _joined(budget: Budget, separator: str, items: Iterable[Any]) -> int:
    if isinstance(items, str):
        return len(items) * (1 + len(separator))
    return sum(budget.weigh(item) + len(separator) for item in items)


def _joined_filter(budget: Budget, value: Any, d: str = "", attribute: Any = None) -> int:
    return _joined(budget, _text(budget, d), value)  # an attribute is a part of its item, and so no heavier


def _indented(budget: Budget, s: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> int:
    text = _text(budget, s)
    return len(text) + (len(text.splitlines()) + 1) * (len(width) if isinstance(width, str) else int(width))


def _formatted_by_percent(budget: Budget, value: Any, *args: Any, **kwargs: Any) -> int:
    if not isinstance(value, str):
        return 0  # a remainder
    has_star = "*" in value
    return _formatted(budget, value, value.count("%"), _WIDE_PERCENT, has_star, [*args, *kwargs.values()])


def _formatted_by_braces(budget: Budget, value: str, *args: Any, **kwargs: Any) -> int:
    is_nested = _NESTED_BRACES.search(value) is not None
    return _formatted(budget, value, value.count("{"), _WIDE_BRACES, is_nested, [*args, *kwargs.values()])


def _formatted(
    budget: Budget, value: str, num_fields: int, wide: re.Pattern[str], takes_width: bool, args: list[Any]
) -> int:
    """Every field may hold the largest argument, padded to a width given in the text, or in an argument."""
    widths = [part for argument in args for part in _parts(argument) if isinstance(part, int)] if takes_width else []
    if wide.search(value) or any(abs(width) > _MAX_FIELD_WIDTH for width in widths):
        raise TemplateLimitError("the chat template asks for too wide a field")
    return len(value) + num_fields * (max(map(budget.weigh, args), default=0) + _MAX_FIELD_WIDTH)


def _parts(value: Any) -> Iterable[Any]:
    return value if isinstance(value, list | tuple) else value.values() if isinstance(value, dict) else (value,)


def _added(budget: Budget, left: Any, right: Any) -> int:
    return len(left) + len(right) if isinstance(left, str | list | tuple) and hasattr(right, "__len__") else 0


def _multiplied(budget: Budget, left: Any, right: Any) -> int:
    for value, times in ((left, right), (right, left)):
        if isinstance(value, str | list | tuple) and isinstance(times, int):
            return budget.weigh(value) * max(times, 0)
    return 0


def _raised(budget: Budget, left: Any, right: Any) -> int:
    if isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > _MAX_INT_BITS:
        raise TemplateLimitError("the chat template makes a larger number than it may")
    return 0


def _batched(budget: Budget, value: Any, linecount: int, fill_with: Any = None) -> int:
    return int(linecount)


def _rounded(budget: Budget, value: Any, precision: int = 0, method: str = "common") -> int:
    if abs(int(precision)) > _MAX_PRECISION:
        raise TemplateLimitError("the chat template rounds to more digits than it may")
    return 0


_FILTER_SIZES: dict[str, Callable[..., int]] = {
    "batch": _batched,
    "center": _padded,
    "format": _formatted_by_percent,
    "indent": _indented,
    "join": _joined_filter,
    "replace": _replaced,
    "round": _rounded,
    "slice": _batched,
}
_METHOD_SIZES: dict[str, Callable[..., int]] = {
    "center": _padded,
    "expandtabs": _expanded,
    "format": _formatted_by_braces,
    "format_map": _formatted_by_braces,
    "join": _joined,
    "ljust": _padded,
    "replace": _replaced,
    "rjust": _padded,
    "zfill": _padded,
}
_OPERATOR_SIZES: dict[str, Callable[..., int]] = {
    "+": _added,
    "*": _multiplied,
    "**": _raised,
    "%": _formatted_by_percent,
}


# ---------------------------------------------------------------------------------------------------------------------
# What templates may call


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    if len(format) > _MAX_TIME_FORMAT_CHARS:
        raise TemplateLimitError("the chat template's time format is too long")
    return datetime.now().strftime(format)


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


@pass_context
def _make_namespace(context: BoundedContext, /, *args: Any, **kwargs: Any) -> Namespace:
    return _TemplateNamespace(context.budget.keep(dict(*args, **kwargs)))


@pass_context
def _sum(context: BoundedContext, iterable: Iterable[Any], attribute: str | None = None, start: float = 0) -> Any:
    """The sum of numbers; lists and texts are put together by `+` and `join`."""
    if attribute is not None:
        iterable = context.environment.call_filter("map", iterable, kwargs={"attribute": attribute}, context=context)
    return sum((context.budget.keep(number) for number in iterable), start + 0)


@pass_context
def _tojson(
    context: BoundedContext,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as chat templates expect it: nothing escaped for HTML, and other alphabets left alone."""
    budget = context.budget
    width = indent if isinstance(indent, int) else len(indent or "")
    if width > _MAX_SEPARATOR_CHARS or budget.weigh(separators) > 3 * _MAX_SEPARATOR_CHARS:
        raise TemplateLimitError("the chat template asks for too wide a JSON")
    budget.allow(budget.weigh(value))
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    if indent is None:
        return encoder.encode(value)
    pieces = []
    for piece in encoder.iterencode(value):  # the deeper, the wider: piece by piece
        budget.spend(len(piece))
        pieces.append(piece)
    return "".join(pieces)
