"""Stop strings: the first to end wins, no part of one is sent, and the cuts of the text make no difference."""

import time
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cableway.frontend.tokens import StopStrings

_LETTERS = st.sampled_from("ab👍")
_STOPS = st.lists(st.text(_LETTERS, min_size=1, max_size=5), min_size=1, max_size=4)
_TEXT = st.text(_LETTERS, max_size=30)


def by_definition(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The stop string that ends first, the longest of those that end there, and the text before it."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end - len(stop)], stop
    return text, None


def run(text: str, stops: list[str], cuts: list[int], include_stop: bool = False) -> tuple[list[str], str | None]:
    finder = StopStrings(stops, include_stop)
    edges = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    sent = []
    for start, end in pairwise(edges):
        safe, stop = finder.feed(text[start:end])
        sent.append(safe)
        if stop is not None:
            return sent, stop
    return [*sent, finder.finish()], None


@settings(max_examples=500)
@given(_TEXT, _STOPS, st.lists(st.integers(0, 99), max_size=30), st.booleans())
def test_any_cuts_find_the_first_stop(text: str, stops: list[str], cuts: list[int], include_stop: bool) -> None:
    before, stop = by_definition(text, stops)
    sent, found = run(text, stops, cuts, include_stop)
    assert found == stop
    assert "".join(sent) == before + (stop or "" if include_stop else "")


@settings(max_examples=300)
@given(_TEXT, _STOPS)
def test_holds_back_just_what_may_become_a_stop(text: str, stops: list[str]) -> None:
    """Character by character: what was sent never ends in a beginning of a stop string, and all else has been sent."""
    finder = StopStrings(stops)
    sent = ""
    for position, character in enumerate(text, 1):
        safe, found = finder.feed(character)
        sent += safe
        if found is not None:
            return
        seen = text[:position]
        beginnings = [stop[:n] for stop in stops for n in range(1, len(stop)) if seen.endswith(stop[:n])]
        assert sent == seen[: len(seen) - max(map(len, beginnings), default=0)]


@pytest.mark.parametrize(
    ("stops", "parts", "sent", "stop"),
    [
        (["\n\n"], ["one\n", "two\n", "\nthree"], "one\ntwo", "\n\n"),
        (["</s>"], ["a<", "/", "b", "</s", "> gone"], "a</b", "</s>"),
        (["END", "ND"], ["the E", "ND"], "the ", "END"),
        (["abcdef", "cd"], ["xab", "cdz"], "xab", "cd"),
        (["aab"], ["aaa", "ab"], "aa", "aab"),
        (["a", "a"], ["bca"], "bc", "a"),
    ],
)
def test_examples(stops: list[str], parts: list[str], sent: str, stop: str) -> None:
    finder = StopStrings(stops)
    out = ""
    for part in parts:
        safe, found = finder.feed(part)
        out += safe
        if found:
            break
    assert (out, found) == (sent, stop)


def test_no_stops_pass_everything() -> None:
    finder = StopStrings([])
    assert (finder.feed("text"), finder.finish()) == (("text", None), "")


def test_time_is_linear_in_the_text() -> None:
    """The worst text for the worst stop: every character begins one."""
    finder = StopStrings(["a" * 5000 + "b"])
    started_s = time.perf_counter()
    for _ in range(20_000):
        finder.feed("aaaa")
    assert time.perf_counter() - started_s < 5.0
