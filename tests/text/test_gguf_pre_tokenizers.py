"""Each way of cutting words against the models' own: their tokenizer.json in the library's parts, or their pattern."""

import json
from typing import Any

import pytest
import regex
from hypothesis import given, settings
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import T5Tokenizer

from cableway.ipc.gguf import ModelError

from .samples import TEXTS, from_metadata, smollm2_metadata, texts

BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
DIGIT_BY_DIGIT = pre_tokenizers.Digits(individual_digits=True)


def isolated(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


PUBLISHED: dict[tuple[str, ...], tuple[bool, list[pre_tokenizers.PreTokenizer]]] = {
    ("gpt-2", "phi-2", "jais"): (False, [GPT2]),
    ("olmo", "mpt"): (True, [GPT2]),
    ("starcoder", "smollm", "refact", "exaone"): (False, [DIGIT_BY_DIGIT, GPT2]),
    ("command-r",): (True, [DIGIT_BY_DIGIT, GPT2]),
    ("falcon",): (
        False,
        [
            pre_tokenizers.Punctuation("contiguous"),
            GPT2,
            pre_tokenizers.Digits(individual_digits=False),
            isolated("[0-9][0-9][0-9]"),
        ],
    ),
    ("bloom",): (False, [isolated(" ?[^(\\s|[.,!?…。，、।۔،])]+"), BYTES]),
    ("deepseek-coder",): (
        False,
        [
            isolated("[\r\n]"),
            isolated("\\s?\\p{L}+"),
            isolated("\\s?\\p{P}+"),
            isolated("[一-龥ࠀ-一가-퟿]+"),
            DIGIT_BY_DIGIT,
            BYTES,
        ],
    ),
}
"""GGUF's name -> are characters composed, and the pre-tokenizers of the models' tokenizer.json"""

NUMBERS_BY_THREE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TIKTOKEN = {
    "llama-bpe": NUMBERS_BY_THREE,
    "chatglm-bpe": NUMBERS_BY_THREE,
    "qwen2": NUMBERS_BY_THREE.replace("{1,3}", ""),
    "kimi-k2": (
        r"[\p{Han}]+"
        r"|[^\r\n\p{L}\p{N}]?[[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]--[\p{Han}]]*"
        r"[[\p{Ll}\p{Lm}\p{Lo}\p{M}]--[\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|[^\r\n\p{L}\p{N}]?[[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]--[\p{Han}]]+"
        r"[[\p{Ll}\p{Lm}\p{Lo}\p{M}]--[\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}
"""GGUF's name -> the pattern of models that tiktoken cuts for; its syntax is that of the regex package's version 1"""


def ours(pre: str) -> Any:
    return from_metadata({**smollm2_metadata(), "tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": False})


@pytest.mark.parametrize("pre", [pre for names in PUBLISHED for pre in names])
def test_ids_are_those_of_the_published_parts(pre: str) -> None:
    composes, parts = next(value for names, value in PUBLISHED.items() if pre in names)
    fields = {name: smollm2_metadata()[f"tokenizer.ggml.{name}"] for name in ("tokens", "merges", "token_type")}
    vocab = {token: i for i, token in enumerate(fields["tokens"])}
    reference = Tokenizer(models.BPE(vocab, [tuple(merge.split(" ")) for merge in fields["merges"]]))
    reference.pre_tokenizer = pre_tokenizers.Sequence(parts)
    if composes:
        reference.normalizer = normalizers.NFC()
    special = [token for token, kind in zip(fields["tokens"], fields["token_type"], strict=True) if kind == 3]
    reference.add_special_tokens(special)
    tokenizer = ours(pre)

    @settings(max_examples=100, deadline=None)
    @given(texts())
    def equal(text: str) -> None:
        assert tokenizer.encode(text) == reference.encode(text, add_special_tokens=False).ids

    for text in TEXTS:
        equal.hypothesis.inner_test(text)
    equal()


@pytest.mark.parametrize("pre", TIKTOKEN)
def test_cuts_are_those_of_the_published_pattern(pre: str) -> None:
    cut = ours(pre)._library.pre_tokenizer
    for text in TEXTS:
        pieces = [decoders.ByteLevel().decode([piece]) for piece, _ in cut.pre_tokenize_str(text)]
        assert pieces == regex.findall(TIKTOKEN[pre], text, regex.V1), text


# ---------------------------------------------------------------------------------------------------------------------
# Unigrams


def unigram_metadata(**changes: Any) -> dict[str, Any]:
    """A vocabulary of unigrams, learnt from the samples."""
    learner = Tokenizer(models.Unigram())
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    specials = ["<pad>", "</s>", "<unk>"]
    learner.train_from_iterator(
        TEXTS, trainers.UnigramTrainer(vocab_size=400, special_tokens=specials, unk_token="<unk>", show_progress=False)
    )
    vocab = learner.get_vocab()
    scores = dict(json.loads(learner.to_str())["model"]["vocab"])
    tokens = sorted(vocab, key=vocab.__getitem__)
    fields = {
        "model": "t5",
        "tokens": tokens,
        "scores": [scores[token] for token in tokens],
        "token_type": [3, 3, 2] + [1] * (len(tokens) - 3),
        "eos_token_id": 1,
        "unknown_token_id": 2,
        "padding_token_id": 0,
        **changes,
    }
    return {f"tokenizer.ggml.{name}": value for name, value in fields.items()}


def test_unigrams_are_cut_as_transformers_cuts_them() -> None:
    metadata = unigram_metadata()
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    reference = T5Tokenizer(vocab=list(zip(tokens, scores, strict=True)), extra_ids=0)
    tokenizer = from_metadata(metadata)
    for text in TEXTS:
        plain = " ".join(text.split())  # what is done to other spaces says a map of characters, which this one lacks
        assert tokenizer.encode(plain) == reference.encode(plain), text
        spelled = reference.decode(
            reference.encode(plain), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert tokenizer.decode(tokenizer.encode(plain)) == spelled
    assert tokenizer.encode("the  engine ") == tokenizer.encode("the engine")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"scores": None}, "has no tokenizer.ggml.scores"),
        ({"unknown_token_id": 10**6}, "or no unknown token"),
        ({"precompiled_charsmap": [0, 0, 0, 0]}, "do not fit together"),
        ({"precompiled_charsmap": ["x", 300]}, "do not fit together"),
    ],
)
def test_broken_unigrams_are_said_in_a_line(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError) as caught:
        from_metadata(unigram_metadata(**changes))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
