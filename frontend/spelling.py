"""How one token is spelled: the decoders of the `tokenizers` library, taken apart into bytes a token.

The library turns whole sequences into text; a stream needs to know what each token adds, in bytes, since tokens end in
the middle of characters.
"""

import json
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import tokenizers

from cableway.ipc.gguf import ModelError

Spell = Callable[[str], bytes]
"""A token as the vocabulary stores it -> the bytes it stands for."""

_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: bytes that print stand for themselves, the others for characters from U+0100 on."""
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printing]
    return {chr(byte): byte for byte in printing} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


BYTE_ALPHABET = _byte_alphabet()


def spelling(library: tokenizers.Tokenizer) -> tuple[Spell, bool]:
    """How a tokenizer's tokens are spelled, and whether a text loses one space at its start.

    Added tokens are kept as they are written, whatever the vocabulary's alphabet. ModelError for decoders that have
    no spelling token by token.
    """
    spell, strips_start = _compile(json.loads(library.decoder.__getstate__()) if library.decoder else {})
    added = {token.content for token in library.get_added_tokens_decoder().values()}
    return lambda token: token.encode() if token in added else spell(token), strips_start


def _compile(decoder: dict[str, Any]) -> tuple[Spell, bool]:
    match decoder:
        case {} if not decoder:  # words, put together with spaces
            return partial(_spell_word_piece, ""), True
        case {"type": "ByteLevel"}:
            return _spell_bytes, False
        case {"type": "Metaspace", "replacement": mark, "prepend_scheme": scheme}:
            return partial(_spell_replaced, [(mark, " ")], False), scheme != "never"
        case {"type": "WordPiece", "prefix": prefix}:
            return partial(_spell_word_piece, prefix), True
        case {"type": "Sequence", "decoders": [step]}:
            return _compile(step)
        case {"type": "Sequence", "decoders": steps}:
            return _compile_steps(steps)
    raise ModelError(f"the tokenizer's decoder is of a kind that is not supported: {json.dumps(decoder)}")


def _compile_steps(steps: list[dict[str, Any]]) -> tuple[Spell, bool]:
    """A `Sequence` decoder: replacements, then bytes, then perhaps one space less at the start."""
    replacements: list[tuple[str, str]] = []
    has_bytes = is_fused = strips_start = False
    for step in steps:
        match step:
            case {"type": "Replace", "pattern": {"String": old}, "content": new}:
                replacements.append((old, new))
            case {"type": "ByteFallback"}:
                has_bytes = True
            case {"type": "Fuse"}:
                is_fused = True
            case {"type": "Strip", "content": " ", "start": 0 | 1 as start, "stop": 0} if is_fused:
                strips_start = bool(start)
            case _:
                raise ModelError(f"the tokenizer's decoder has a step that is not supported: {json.dumps(step)}")
    return partial(_spell_replaced, replacements, has_bytes), strips_start


def _spell_bytes(token: str) -> bytes:
    try:
        return bytes([BYTE_ALPHABET[character] for character in token])
    except KeyError:
        return token.encode()


def _spell_replaced(replacements: list[tuple[str, str]], has_bytes: bool, token: str) -> bytes:
    if has_bytes and (byte := _BYTE_TOKEN.fullmatch(token)):
        return bytes.fromhex(byte[1])
    for old, new in replacements:
        token = token.replace(old, new)
    return token.encode()


def _spell_word_piece(prefix: str, token: str) -> bytes:
    return (token.removeprefix(prefix) if prefix and token.startswith(prefix) else f" {token}").encode()
