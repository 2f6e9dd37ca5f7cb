"""ChoiceText: how tokens were grouped into updates must not be seen in what comes out."""

import array
import itertools
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from cableway.frontend.job import Update
from cableway.frontend.text import ChoiceText, Delta, TextOptions
from cableway.ipc.messages import Finish, Logprobs, ints
from tests.frontend.running import EOS_ID, TOKENIZER

TEXT = st.text(alphabet=st.sampled_from("ab ñ日👋🇫🇷\n"), max_size=30)
CUTS = st.lists(st.integers(0, 80), max_size=8)


def logprobs_of(token_ids: list[int], first: int) -> Logprobs:
    num = len(token_ids)
    values = array.array("f", [-1.0] * num).tobytes()
    return Logprobs(1, first, num, 1, ints(token_ids), values, ints([1] * num))


def play(token_ids: list[int], cuts: list[int], options: TextOptions, finish: Finish) -> tuple[list[Delta], ChoiceText]:
    """Feed the tokens cut at these places; ends where the choice does."""
    choice = ChoiceText(0, TOKENIZER, [], options)
    borders = sorted({0, len(token_ids), *(cut for cut in cuts if cut < len(token_ids))})
    deltas = []
    for start, end in itertools.pairwise(borders):
        part = token_ids[start:end]
        update = Update(0, part, [logprobs_of(part, start)], finish=finish if end == len(token_ids) else None)
        deltas.append(choice.feed(update))
        if deltas[-1].finish_reason is not None:
            break
    return deltas, choice


def summary(deltas: list[Delta], choice: ChoiceText) -> dict[str, Any]:
    return {
        "text": "".join(delta.text for delta in deltas),
        "logprobs": [entry for delta in deltas for entry in delta.logprobs],
        "token_ids": [token_id for delta in deltas for token_id in delta.token_ids],
        "ended": (deltas[-1].finish_reason, deltas[-1].stop_reason),
        "num_tokens": choice.num_tokens,
    }


@settings(deadline=None, max_examples=150)
@given(
    text=TEXT,
    cuts=CUTS,
    stops=st.lists(st.text(alphabet="ab ñ日👋", min_size=1, max_size=3), max_size=2),
    include_stop=st.booleans(),
    min_tokens=st.integers(0, 4),
    ends_by_eos=st.booleans(),
)
def test_any_grouping_gives_the_same(
    text: str, cuts: list[int], stops: list[str], include_stop: bool, min_tokens: int, ends_by_eos: bool
) -> None:
    token_ids = TOKENIZER.encode(text) + [EOS_ID] * ends_by_eos
    if not token_ids:
        return
    options = TextOptions(stops=stops, include_stop=include_stop, min_tokens=min_tokens, logprobs=True)
    finish = Finish(1, "stop" if ends_by_eos else "length")
    whole = summary(*play(token_ids, [], options, finish))
    assert summary(*play(token_ids, cuts, options, finish)) == whole
    assert summary(*play(token_ids, list(range(80)), options, finish)) == whole
    if not stops:
        assert whole["text"] == text
        assert whole["num_tokens"] == len(token_ids)
        plain = TextOptions(include_stop=include_stop)
        assert summary(*play(token_ids, cuts, plain, finish))["text"] == text
        spelled = b"".join(TOKENIZER.token_bytes(entry.token_id) for _, entry in whole["logprobs"])
        assert spelled.removesuffix(TOKENIZER.token_bytes(EOS_ID)) == text.encode()
    for offset, _ in whole["logprobs"]:
        assert 0 <= offset <= len(whole["text"])


@settings(deadline=None, max_examples=100)
@given(text=TEXT, stop=st.text(alphabet="ab ñ日", min_size=1, max_size=3), cuts=CUTS)
def test_no_part_of_a_stop_string_is_sent(text: str, stop: str, cuts: list[int]) -> None:
    token_ids = TOKENIZER.encode(text + stop + text)
    deltas, choice = play(token_ids, cuts, TextOptions(stops=[stop]), Finish(1, "length"))
    sent = "".join(delta.text for delta in deltas)
    assert sent == (text + stop + text).partition(stop)[0]
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", stop)
    assert choice.num_tokens <= len(token_ids)


def test_half_a_character_at_the_end_is_told_as_such() -> None:
    half = TOKENIZER.encode("👋")[:-1]
    deltas, _ = play(half, [], TextOptions(), Finish(1, "length"))
    assert deltas[-1].text == "�"


def test_a_stop_token_is_no_text_but_counts() -> None:
    token_ids = [*TOKENIZER.encode("a b"), EOS_ID]
    deltas, choice = play(token_ids, [], TextOptions(skip_special_tokens=False), Finish(1, "stop"))
    assert (deltas[-1].text, choice.num_tokens) == ("a b", len(token_ids))
    kept, _ = play(token_ids, [], TextOptions(skip_special_tokens=False, include_stop=True), Finish(1, "stop"))
    assert kept[-1].text == "a b" + TOKENIZER.token_text(EOS_ID)
