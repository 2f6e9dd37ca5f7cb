"""Tokenizers rebuilt from GGUF metadata, against transformers' and against the sentencepiece library."""

import time
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from transformers import GPT2Tokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer
from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer

from cableway.frontend.pre_tokenizers import PRE_TOKENIZERS
from cableway.frontend.tokens import Tokenizer
from cableway.ipc import modelfiles
from cableway.ipc.gguf import ModelError

from .samples import (
    TEXTS,
    from_metadata,
    sentence_piece,
    sentence_piece_cases,
    sentence_piece_metadata,
    smollm2,
    smollm2_metadata,
    texts,
)


def transformers_tokenizer(pre: str) -> Any:
    """transformers' tokenizer over SmolLM2's vocabulary, cutting words as `pre` says."""
    metadata = smollm2_metadata()
    fields = {name: metadata[f"tokenizer.ggml.{name}"] for name in ("tokens", "merges", "token_type")}
    described = {"tokenizer_type": "gpt2", "pre_tokenizer_type": pre, **fields}
    if pre in ("qwen2", "gpt-2"):
        vocab = {token: i for i, token in enumerate(fields["tokens"])}
        merges = [tuple(merge.split(" ")) for merge in fields["merges"]]
        tokenizer = (Qwen2Tokenizer if pre == "qwen2" else GPT2Tokenizer)(vocab=vocab, merges=merges)
        special = [token for token, kind in zip(fields["tokens"], fields["token_type"], strict=True) if kind == 3]
        tokenizer.add_special_tokens({"additional_special_tokens": special})
        return tokenizer
    backend, _ = convert_gguf_tokenizer("llama", described)
    if pre == "smollm":  # transformers has no pattern for it; the model's own tokenizer.json says this
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "qwen2", "llama-bpe", "tekken", "gpt-4o", "deepseek-r1-qwen"])
def test_equals_transformers(pre: str) -> None:
    oracle = transformers_tokenizer(pre)
    ours = from_metadata({**smollm2_metadata(), "tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": False})
    if PRE_TOKENIZERS[pre].whole_words:
        oracle.backend_tokenizer.model.ignore_merges = True  # as these models' own tokenizer.json has it

    @settings(max_examples=150, deadline=None)
    @given(texts())
    def equal(text: str) -> None:
        assert ours.encode(text) == oracle.encode(text, add_special_tokens=False)

    for text in TEXTS:
        equal.hypothesis.inner_test(text)
        ids = ours.encode(text)
        assert ours.decode(ids, False) == oracle.decode(ids, clean_up_tokenization_spaces=False)
        assert ours.decode(ids) == oracle.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    equal()


def test_every_pre_tokenizer_loses_nothing() -> None:
    """Each pattern compiles, and whatever the cuts, the text comes back (composed, where the model composes it)."""
    metadata = smollm2_metadata()
    distinct = {pre_tokenizer: name for name, pre_tokenizer in PRE_TOKENIZERS.items()}
    for pre_tokenizer, name in distinct.items():
        if pre_tokenizer.nfc:
            continue
        tokenizer = from_metadata({**metadata, "tokenizer.ggml.pre": name, "tokenizer.ggml.add_bos_token": False})
        for text in TEXTS:
            assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text, name


def test_deepseek_v3_cuts() -> None:
    """Its published pattern: digits by three, CJK apart, and a sign goes with the letters behind it."""
    ours = from_metadata({**smollm2_metadata(), "tokenizer.ggml.pre": "deepseek-v3"})
    pieces = ours._library.pre_tokenizer.pre_tokenize_str("ab 12345 .word 你好 x")
    assert [text.replace("Ġ", " ") for text, _ in pieces][:6] == ["ab", " ", "123", "45", " .", "word"]


def test_loads_fast() -> None:
    files = modelfiles.locate("smollm2-135m")
    started_s = time.perf_counter()
    Tokenizer.load(files)
    assert time.perf_counter() - started_s < 1.0  # 0.2 s on a quiet machine


def test_special_tokens_and_ends() -> None:
    tokenizer = smollm2()
    assert tokenizer.special_tokens["bos_token"] == "<|im_start|>"
    assert tokenizer.special_tokens["eos_token"] == "<|im_end|>"
    assert tokenizer.eos_token_ids == (2,)
    assert tokenizer.vocab_size == 49152
    with_ends = from_metadata(
        {**smollm2_metadata(), "tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    )
    assert with_ends.encode("hi") == [1, *tokenizer.encode("hi"), 2]
    assert with_ends.encode("hi", add_special_tokens=False) == tokenizer.encode("hi")


# ---------------------------------------------------------------------------------------------------------------------
# SentencePiece


def test_equals_sentencepiece() -> None:
    tokenizer = sentence_piece()
    for case in sentence_piece_cases()["cases"]:
        if "<|tool|>" not in case["text"]:  # the library puts no space after such a token; GGUF readers do
            assert tokenizer.encode(case["text"], add_special_tokens=False) == case["ids"], case["text"]
        assert tokenizer.decode(case["ids"]) == case["decoded"], case["text"]


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="abn the\n▁é你😀1", max_size=60))
def test_joins_the_best_score_first(text: str) -> None:
    tokenizer = sentence_piece()
    assert tokenizer.encode(text, add_special_tokens=False) == join_by_score(text)


def join_by_score(text: str) -> list[int]:
    """The definition: join the two neighbours whose whole scores best, leftmost first, until none can be joined."""
    cases = sentence_piece_cases()
    ids = {piece: i for i, piece in enumerate(cases["pieces"])}
    plain = {p: s for p, s, kind in zip(cases["pieces"], cases["scores"], cases["kinds"], strict=True) if kind == 1}
    symbols = list("▁" + text.replace(" ", "▁")) if text else []
    while True:
        joined = [(-plain[a + b], i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in plain]
        if not joined:
            break
        _, i = min(joined)
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
    spelled = [[symbol] if symbol in ids else [f"<0x{byte:02X}>" for byte in symbol.encode()] for symbol in symbols]
    return [ids[token] for tokens in spelled for token in tokens]


def test_space_prefix_and_bos() -> None:
    text = "the engine"
    plain = sentence_piece().encode(text, add_special_tokens=False)
    assert sentence_piece().encode(text) == [1, *plain]  # such a vocabulary begins texts unless the file says no
    assert from_metadata(sentence_piece_metadata(add_bos_token=False)).encode(text) == plain
    unprefixed = from_metadata(sentence_piece_metadata(add_space_prefix=False, add_bos_token=False))
    assert unprefixed.encode(" " + text) == plain
    assert unprefixed.decode(plain) == " " + text
    assert sentence_piece().decode(plain) == text


# ---------------------------------------------------------------------------------------------------------------------
# Broken files


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tokens": None}, "has no tokenizer.ggml.tokens"),
        ({"tokens": ["a", 1]}, "has no tokenizer.ggml.tokens"),
        ({"scores": None}, "has no tokenizer.ggml.scores"),
        ({"scores": [0.0]}, "scores does not fit"),
        ({"scores": "x"}, "scores does not fit"),
        ({"token_type": [1, 2]}, "token_type does not fit"),
        ({"model": "wordpiece"}, "'wordpiece' are not supported"),
        ({"model": None}, "None are not supported"),
        ({"model": "gpt2", "merges": ["a b"], "pre": "martian"}, "'martian', is not known"),
        ({"model": "gpt2", "merges": ["a b"], "pre": 7}, "is not known"),
        ({"model": "gpt2", "merges": ["ab"], "pre": "gpt-2"}, "broken, the merge 'ab'"),
        ({"model": "gpt2", "merges": ["no such"], "pre": "gpt-2"}, "do not fit together"),
        ({"model": "gpt2", "pre": "gpt-2"}, "has no tokenizer.ggml.merges"),
    ],
)
def test_broken_metadata_is_said_in_a_line(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError) as caught:
        from_metadata(sentence_piece_metadata(**changes))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_ids_beyond_the_vocabulary_are_no_tokens() -> None:
    metadata = sentence_piece_metadata(bos_token_id=10**9, eos_token_id=2, unknown_token_id=-1)
    assert from_metadata(metadata).special_tokens == {"eos_token": "</s>"}
