"""Text to tokens and back: tokenizers of any model folder or GGUF file, incremental detokenizer, stop strings.

A token is spelled in bytes, and text is what those bytes say: tokens end in the middle of characters, and only bytes
can be put together again. Each token's spelling is worked out once, when it is first seen.
"""

import codecs
import contextlib
from collections.abc import Iterable, Sequence

import tokenizers

from cableway.frontend import tokenizer_source
from cableway.frontend.errors import RequestError
from cableway.frontend.spelling import spelling
from cableway.ipc.modelfiles import ModelError, ModelFiles

_MAX_CHARACTER_BYTES = 4


class Tokenizer:
    """A model's tokenizer; use `Tokenizer.load`.

    Args:
        library: the tokenizer proper.
        special_tokens: what templates may name, such as `{"bos_token": "<s>"}`.
        eos_token_ids: tokens that end a sequence.
    """

    def __init__(self, library: tokenizers.Tokenizer, special_tokens: dict[str, str], eos_token_ids: Iterable[int]):
        self.special_tokens = special_tokens
        self.eos_token_ids = tuple(eos_token_ids)
        self.vocab_size: int = library.get_vocab_size(with_added_tokens=True)
        self._library = library
        self._spell, self.strips_start = spelling(library)
        special_ids = {i for i, token in library.get_added_tokens_decoder().items() if token.special}
        self._pieces = (_Pieces(self, skipped=set()), _Pieces(self, skipped=special_ids))

    @classmethod
    def load(cls, files: ModelFiles) -> "Tokenizer":
        """Read `tokenizer.json`, or rebuild it from GGUF metadata; ModelError when that cannot be done."""
        library, special_tokens = tokenizer_source.read(files)
        named = library.token_to_id(special_tokens.get("eos_token", ""))
        eos_ids = [*declared_eos_ids(files), *([] if named is None else [named])]
        try:
            return cls(library, special_tokens, dict.fromkeys(eos_ids))
        except ModelError as error:
            raise ModelError(f"{files.path}: {error}") from None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. Special tokens written out in it are taken as such.

        Args:
            add_special_tokens: put in front (and behind) what the model expects of a text, such as `<s>`; not for
                rendered chat templates, which bring it along.
        """
        try:
            # The batch form frees the GIL, so that a long text in a thread stops nobody, and computes no offsets.
            (encoding,) = self._library.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        except TypeError:
            raise RequestError(400, "The text is not valid Unicode: it holds unpaired surrogates.") from None
        except BaseException as error:
            if (
                type(error).__name__ != "PanicException"
            ):  # the library's Rust panicked; its class has no importable name
                raise
            raise RequestError(400, "The model's tokenizer cannot take this text.") from None
        ids: list[int] = encoding.ids
        return ids

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of a whole sequence; bytes that are no UTF-8 become U+FFFD, unknown ids nothing."""
        detokenizer = Detokenizer(self, skip_special_tokens=skip_special_tokens)
        return detokenizer.feed(token_ids) + detokenizer.finish()

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes one token stands for, special tokens included; b"" for an unknown id."""
        piece = self._pieces[False][token_id]
        return piece if isinstance(piece, bytes) else piece.encode()

    def token_text(self, token_id: int) -> str:
        """One token alone as text, with U+FFFD for a part of a character."""
        piece = self._pieces[False][token_id]
        return piece if isinstance(piece, str) else piece.decode(errors="replace")

    def token_name(self, token_id: int) -> str | None:
        """The token as the vocabulary stores it, such as `Ġthe`; None for an unknown id."""
        if not 0 <= token_id < 1 << 31:
            return None
        name: str | None = self._library.id_to_token(token_id)
        return name

    def pieces(self, skip_special_tokens: bool) -> "_Pieces":
        """Every token's text, or its bytes where these are no whole characters."""
        return self._pieces[skip_special_tokens]

    def spell(self, token_id: int) -> bytes | None:
        """Work out one token's bytes; None for an unknown id."""
        name = self.token_name(token_id)
        return None if name is None else self._spell(name)


def declared_eos_ids(files: ModelFiles) -> list[int]:
    """The tokens that end a sequence as the model's generation config has it: one, several or none."""
    declared = files.generation_config.get("eos_token_id")
    return [i for i in (declared if isinstance(declared, list) else [declared]) if isinstance(i, int)]


class _Pieces(dict[int, str | bytes]):
    """token id -> its text, or its bytes where these are not whole characters; filled when a token is first seen."""

    def __init__(self, tokenizer: Tokenizer, skipped: set[int]):
        self._tokenizer = tokenizer
        self._skipped = skipped

    def __missing__(self, token_id: int) -> str | bytes:
        spelled = self._tokenizer.spell(token_id)
        if spelled is None:
            return ""  # not kept: a client may ask for any number
        piece: str | bytes = spelled
        if token_id in self._skipped:
            piece = ""
        else:
            with contextlib.suppress(UnicodeDecodeError):
                piece = spelled.decode()
        self[token_id] = piece
        return piece


class Detokenizer:
    """Tokens in, text out, as soon as it is certain: half a character waits for its other half.

    Whatever the cuts, the texts of all `feed` and of `finish` put together are what `Tokenizer.decode` gives.

    Args:
        prompt_ids: what precedes the first token fed (its last few ids are enough): text at a very start loses the
            space that SentencePiece puts there, and a character begun in the prompt is completed.
    """

    __slots__ = ("_decoder", "_is_amid", "_pieces", "_strips_start")

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = (), skip_special_tokens: bool = True):
        self._pieces = tokenizer.pieces(skip_special_tokens)
        self._strips_start = tokenizer.strips_start
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._is_amid = False  # bytes of an unfinished character wait in the decoder
        self._start_after(prompt_ids)

    def feed(self, token_ids: Iterable[int]) -> str:
        """The text that these tokens add."""
        pieces = self._pieces
        text = ""
        for token_id in token_ids:
            piece = pieces[token_id]
            if self._is_amid or piece.__class__ is bytes:
                piece = self._decode(piece)
            text += piece  # type: ignore[operator]
        if self._strips_start and text:
            self._strips_start = False
            return text.removeprefix(" ")
        return text

    def finish(self) -> str:
        """What is left at the end: U+FFFD when the last character is not whole, else nothing."""
        self._is_amid = False
        return self._decoder.decode(b"", True)

    def _decode(self, piece: str | bytes) -> str:
        text = self._decoder.decode(piece if isinstance(piece, bytes) else piece.encode())
        self._is_amid = self._decoder.getstate()[0] != b""
        return text

    def _start_after(self, prompt_ids: Sequence[int]) -> None:
        tail = b""
        for token_id in reversed(prompt_ids):
            piece = self._pieces[token_id]
            tail = (piece if isinstance(piece, bytes) else piece.encode()) + tail
            if len(tail) >= _MAX_CHARACTER_BYTES:
                break
        if tail:
            self._strips_start = False
            self._decode(tail)


class StopStrings:
    """Finds the first of some strings to be completed in a text that comes in parts; no part of one is given out.

    The string that ends first wins; of several that end together, the longest. How the text is cut makes no difference.

    Args:
        stops: none of them empty.
        include_stop: give out the string that was found, too.
    """

    def __init__(self, stops: Sequence[str], include_stop: bool = False):
        self._matchers = [_Matcher(stop) for stop in sorted(dict.fromkeys(stops), key=len, reverse=True)]
        self._first_characters = frozenset(stop[0] for stop in stops)
        self._include_stop = include_stop
        self._held = ""  # may be the beginning of a stop string

    def feed(self, text: str) -> tuple[str, str | None]:
        """The text that is safe to send, and the stop string found; after one was found, feed no more."""
        if not self._held and self._first_characters.isdisjoint(text):
            return text, None
        seen, self._held = self._held + text, ""
        num_new = len(text)
        for position, character in enumerate(text, len(seen) - num_new + 1):
            for matcher in self._matchers:
                if matcher.step(character):
                    cut = position if self._include_stop else position - len(matcher.pattern)
                    return seen[:cut], matcher.pattern
        num_held = max(matcher.num_matched for matcher in self._matchers)
        cut = len(seen) - num_held
        self._held = seen[cut:]
        return seen[:cut], None

    def finish(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held


class _Matcher:
    """Knuth-Morris-Pratt: how much of the pattern the text so far ends with."""

    __slots__ = ("_fallback", "num_matched", "pattern")

    def __init__(self, pattern: str):
        self.pattern = pattern
        self.num_matched = 0
        self._fallback = [0, 0]  # [n]: length of the longest proper prefix of pattern[:n] that is also its suffix
        for end in range(1, len(pattern)):
            longest = self._fallback[end]
            while longest and pattern[longest] != pattern[end]:
                longest = self._fallback[longest]
            self._fallback.append(longest + (pattern[longest] == pattern[end]))

    def step(self, character: str) -> bool:
        """Take one character; True when it completes the pattern."""
        num = self.num_matched
        while num and self.pattern[num] != character:
            num = self._fallback[num]
        self.num_matched = num + (self.pattern[num] == character)
        return self.num_matched == len(self.pattern)
