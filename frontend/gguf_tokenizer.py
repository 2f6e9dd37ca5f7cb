"""Rebuild a tokenizer from GGUF metadata: vocabulary, merges or scores, and the kind of text they were made for.

Three kinds are served. `gpt2`: byte-level BPE with merges, whose way of cutting words is named by `tokenizer.ggml.pre`.
`llama`: SentencePiece BPE, which has no merges but scores; of all neighbours that can be joined, those whose whole has
the highest score are joined first. `t5`: SentencePiece's unigrams; a text is cut so that their
scores add up to the most.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from cableway.frontend.pre_tokenizers import PRE_TOKENIZERS
from cableway.ipc.gguf import ModelError

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # of tokenizer.ggml.token_type
_SPECIAL_NAMES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "sep": "seperator", "mask": "mask"}
_SPACE = "▁"
_Made = TypeVar("_Made")


def build(path: str, metadata: dict[str, Any]) -> tokenizers.Tokenizer:
    """The tokenizer that `metadata` describes; ModelError (which names `path`) when it is broken or of another kind."""
    kind = metadata.get("tokenizer.ggml.model")
    try:
        tokens = _strings(metadata, "tokens")
        token_types = _numbers(metadata, "token_type", len(tokens)) or [_NORMAL] * len(tokens)
        if kind == "gpt2":
            library, adds_bos = _byte_level(metadata, tokens)
        elif kind == "llama":
            library, adds_bos = _sentence_piece(metadata, tokens, token_types)
        elif kind == "t5":
            library, adds_bos = _unigram(metadata, tokens), False
        else:
            raise ModelError(f"tokenizers of kind {kind!r} are not supported (gpt2, llama and t5 are)")
        _add_tokens(library, tokens, token_types)
        adds_bos = _flag(metadata, "add_bos_token", adds_bos)
        adds_eos = _flag(metadata, "add_eos_token", kind == "t5")
        set_ends(library, _token_id(metadata, "bos") if adds_bos else None,
                 _token_id(metadata, "eos") if adds_eos else None)  # fmt: skip
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None
    return library


def special_tokens(metadata: dict[str, Any]) -> dict[str, str]:
    """The tokens that chat templates may name, such as `{"bos_token": "<s>"}`."""
    tokens = _strings(metadata, "tokens")
    ids = {name: _token_id(metadata, key) for name, key in _SPECIAL_NAMES.items()}
    return {f"{name}_token": tokens[token_id] for name, token_id in ids.items() if token_id is not None}


def set_ends(library: tokenizers.Tokenizer, bos_id: int | None, eos_id: int | None) -> None:
    """Make the tokenizer put these tokens around a text, in place of what it did before; None = nothing."""
    ends = {"bos": bos_id, "eos": eos_id}
    library.post_processor = processors.TemplateProcessing(
        single=[name for name in ("bos", "$A", "eos") if name == "$A" or ends[name] is not None],
        special_tokens=[
            {"id": name, "ids": [token_id], "tokens": [library.id_to_token(token_id) or name]}
            for name, token_id in ends.items()
            if token_id is not None
        ],
    )


def _byte_level(metadata: dict[str, Any], tokens: list[str]) -> tuple[tokenizers.Tokenizer, bool]:
    name = metadata.get("tokenizer.ggml.pre", "")
    pre = PRE_TOKENIZERS.get(name) if isinstance(name, str) else None
    if pre is None:
        raise ModelError(f"its way of cutting words, {name!r}, is not known")
    merges = []
    for merge in _strings(metadata, "merges"):
        left, separator, right = merge.partition(" ")
        if not separator:
            raise ModelError(f"broken, the merge {merge!r}")
        merges.append((left, right))
    library = _bpe(tokens, merges, ignore_merges=pre.whole_words)
    if pre.nfc:
        library.normalizer = normalizers.NFC()
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(_cut(pattern) for pattern in pre.patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            *(_cut(pattern) for pattern in pre.byte_patterns),
        ]
    )
    library.decoder = decoders.ByteLevel()
    return library, pre.adds_bos


def _cut(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated")


def _sentence_piece(
    metadata: dict[str, Any], tokens: list[str], token_types: list[int]
) -> tuple[tokenizers.Tokenizer, bool]:
    scores = _numbers(metadata, "scores", len(tokens))
    if scores is None:
        raise ModelError("has no tokenizer.ggml.scores")
    unknown_id = _token_id(metadata, "unknown")
    library = _bpe(
        tokens,
        _merges_by_score(tokens, scores, token_types),
        byte_fallback=True,
        fuse_unk=True,
        unk_token=None if unknown_id is None else tokens[unknown_id],
    )
    spaces = normalizers.Replace(" ", _SPACE)
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if _flag(metadata, "add_space_prefix", True):
        library.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        library.normalizer = spaces
    library.decoder = decoders.Sequence(steps)
    return library, True


def _unigram(metadata: dict[str, Any], tokens: list[str]) -> tokenizers.Tokenizer:
    scores, unknown_id = _numbers(metadata, "scores", len(tokens)), _token_id(metadata, "unknown")
    if scores is None or unknown_id is None:
        raise ModelError("has no tokenizer.ggml.scores, or no unknown token")
    steps: list[normalizers.Normalizer] = []
    if charsmap := metadata.get("tokenizer.ggml.precompiled_charsmap"):
        steps.append(_library(lambda: _charsmap(charsmap)))
    if _flag(metadata, "remove_extra_whitespaces", True):
        steps += [normalizers.Strip(), normalizers.Replace(tokenizers.Regex(" {2,}"), " ")]
    prefix = "always" if _flag(metadata, "add_space_prefix", True) else "never"
    library = _library(
        lambda: tokenizers.Tokenizer(
            models.Unigram(list(zip(tokens, map(float, scores), strict=True)), unknown_id, False)
        )
    )
    library.normalizer = normalizers.Sequence(steps)
    library.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, prefix)
    library.decoder = decoders.Metaspace(_SPACE, prefix)
    return library


def _charsmap(charsmap: Any) -> normalizers.Normalizer:
    """How characters are replaced by others, as SentencePiece compiles it; tried, since a broken map shows in use."""
    normalizer = normalizers.Precompiled(bytes(charsmap))
    normalizer.normalize_str("a")
    return normalizer


def _merges_by_score(tokens: list[str], scores: list[float], token_types: list[int]) -> list[tuple[str, str]]:
    """Every way to join two tokens into a third, the best third first. Only plain tokens are ever joined."""
    plain = {token: score for token, score, kind in zip(tokens, scores, token_types, strict=True) if kind == _NORMAL}
    return [
        (left, right)
        for token in sorted(plain, key=plain.__getitem__, reverse=True)
        for cut in range(1, len(token))
        if (left := token[:cut]) in plain and (right := token[cut:]) in plain
    ]


def _bpe(tokens: list[str], merges: list[tuple[str, str]], **settings: Any) -> tokenizers.Tokenizer:
    vocab = {token: i for i, token in enumerate(tokens)}
    return _library(lambda: tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, **settings)))


def _library(make: Callable[[], _Made]) -> _Made:
    try:
        return make()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises nothing narrower, and panics over some bytes
        raise ModelError(f"its vocabulary, merges and maps do not fit together: {error}") from None


def _add_tokens(library: tokenizers.Tokenizer, tokens: list[str], token_types: list[int]) -> None:
    """Control and user-defined tokens stay whole wherever they are in a text; control tokens are not shown."""
    for kinds, is_special in (((_CONTROL, _UNKNOWN), True), ((_USER_DEFINED,), False)):
        added = [
            AddedToken(token, normalized=False, special=is_special)
            for token, kind in zip(tokens, token_types, strict=True)
            if kind in kinds and token
        ]
        (library.add_special_tokens if is_special else library.add_tokens)(added)


def _strings(metadata: dict[str, Any], key: str) -> list[str]:
    values = metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ModelError(f"has no tokenizer.ggml.{key}")
    return values


def _numbers(metadata: dict[str, Any], key: str, count: int) -> list[Any] | None:
    values = metadata.get(f"tokenizer.ggml.{key}")
    if values is None:
        return None
    if not isinstance(values, list) or len(values) != count or not all(isinstance(v, int | float) for v in values):
        raise ModelError(f"broken, tokenizer.ggml.{key} does not fit the {count} tokens")
    return values


def _flag(metadata: dict[str, Any], key: str, default: bool) -> bool:
    value = metadata.get(f"tokenizer.ggml.{key}", default)
    return value if isinstance(value, bool) else default


def _token_id(metadata: dict[str, Any], key: str) -> int | None:
    """The id of a named token, when there is one within the vocabulary."""
    token_id = metadata.get(f"tokenizer.ggml.{key}_token_id")
    num_tokens = len(metadata["tokenizer.ggml.tokens"])
    return token_id if isinstance(token_id, int) and 0 <= token_id < num_tokens else None
