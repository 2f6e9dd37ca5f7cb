"""Streams of tokens become the text that the whole sequence is, whatever the cuts, and never half a character."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from cableway.frontend.errors import RequestError
from cableway.frontend.tokens import Detokenizer, Tokenizer

from .samples import TEXTS, sentence_piece, smollm2, texts

TOKENIZERS = {"byte-level": smollm2, "sentencepiece": sentence_piece}
kinds = pytest.mark.parametrize("kind", TOKENIZERS)


def feed_in_parts(detokenizer: Detokenizer, ids: list[int], cuts: list[int]) -> list[str]:
    edges = [0, *sorted(cut % (len(ids) + 1) for cut in cuts), len(ids)]
    return [detokenizer.feed(ids[start:end]) for start, end in pairwise(edges)]


def token_ids(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    """Tokens of texts, and any tokens at all: models say things that are no UTF-8."""
    any_ids = st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=30)
    return st.one_of(any_ids, texts().map(tokenizer.encode))


@kinds
def test_any_cuts_give_the_same_text(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]()

    @settings(max_examples=300, deadline=None)
    @given(token_ids(tokenizer), st.lists(st.integers(0, 99), max_size=12), st.booleans())
    def same(ids: list[int], cuts: list[int], skip: bool) -> None:
        detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip)
        parts = feed_in_parts(detokenizer, ids, cuts)
        assert "".join(parts) + detokenizer.finish() == tokenizer.decode(ids, skip)

    same()


@kinds
def test_text_goes_out_at_once_and_whole(kind: str) -> None:
    """A valid text is never held back longer than a character takes, and no U+FFFD shows on the way."""
    tokenizer = TOKENIZERS[kind]()
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        detokenizer = Detokenizer(tokenizer, skip_special_tokens=False)
        sent = ""
        for i, token_id in enumerate(ids):
            sent += detokenizer.feed([token_id])
            assert text.startswith(sent)
            whole = tokenizer.decode(ids[: i + 1], skip_special_tokens=False)
            assert sent == whole.rstrip("\ufffd")
        assert (sent, detokenizer.finish()) == (text, "")


def test_equals_transformers_on_any_ids() -> None:
    """Invalid UTF-8 included: both put one U+FFFD for each part that can be no character."""
    tokenizer = smollm2()
    oracle = PreTrainedTokenizerFast(tokenizer_object=tokenizer._library)

    @settings(max_examples=300, deadline=None)
    @given(token_ids(tokenizer), st.booleans())
    def equal(ids: list[int], skip: bool) -> None:
        expected = oracle.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
        assert tokenizer.decode(ids, skip) == expected

    equal()


@kinds
@pytest.mark.parametrize("text", ["Once upon a time", "naïve 😀👍🏽 end", "한국어 텍스트", "a\n b"])
def test_goes_on_after_a_prompt(kind: str, text: str) -> None:
    """Wherever the prompt ends, even within a character, the output is what the whole text adds to it."""
    tokenizer = TOKENIZERS[kind]()
    ids = tokenizer.encode(text)
    for cut in range(1, len(ids) + 1):
        prompt = Detokenizer(tokenizer)
        shown = prompt.feed(ids[:cut])
        detokenizer = Detokenizer(tokenizer, ids[:cut])
        assert shown + detokenizer.feed(ids[cut:]) + detokenizer.finish() == tokenizer.decode(ids)


def test_leading_space_is_lost_only_at_the_very_start() -> None:
    tokenizer = sentence_piece()
    (*_, word) = tokenizer.encode("the", add_special_tokens=False)
    assert Detokenizer(tokenizer).feed([word, word]) == "the the"
    assert Detokenizer(tokenizer, [1]).feed([1, word]) == "the"  # special tokens that are not shown are no start
    assert Detokenizer(tokenizer, [1], skip_special_tokens=False).feed([word]) == " the"
    assert Detokenizer(tokenizer, [word]).feed([word]) == " the"


def test_incomplete_character_at_the_end_is_one_mark() -> None:
    tokenizer = smollm2()
    ids = tokenizer.encode("ok 👍🏽")
    detokenizer = Detokenizer(tokenizer)
    assert "\ufffd" not in detokenizer.feed(ids[:-1])
    assert detokenizer.finish() == "\ufffd"


@kinds
def test_bytes_of_tokens_make_the_text(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        spelled = b"".join(map(tokenizer.token_bytes, ids))
        assert spelled.decode().removeprefix(" " if tokenizer.strips_start and text else "") == text
    assert tokenizer.token_bytes(tokenizer.eos_token_ids[0]).decode() == tokenizer.special_tokens["eos_token"]


def test_unknown_ids_are_nothing() -> None:
    tokenizer = smollm2()
    for unknown in (-1, tokenizer.vocab_size, 2**31, 2**70):
        assert tokenizer.token_bytes(unknown) == b""
        assert tokenizer.token_text(unknown) == ""
        assert tokenizer.token_name(unknown) is None
        assert tokenizer.decode([unknown]) == ""


def test_unpaired_surrogates_are_the_clients_fault() -> None:
    with pytest.raises(RequestError, match="Unicode") as caught:
        smollm2().encode("a\ud800b")
    assert caught.value.status == 400


def test_long_texts_take_linear_time() -> None:
    for text in ("x" * 1_000_000, " " * 1_000_000, "1" * 300_000, "é" * 300_000, "\n" * 300_000):
        assert len(smollm2().encode(text)) > 100
