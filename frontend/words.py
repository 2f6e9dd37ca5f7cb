"""Words that may not be said, as token ids, and what they leave."""

from collections.abc import Sequence

from cableway.frontend.tokens import Tokenizer
from cableway.ipc.messages import Sampling, unpack_ints

MAX_WORDS = 256
MAX_WORD_CHARS = 256
MAX_WORD_TOKENS = 32


def ways_to_say(words: Sequence[str], tokenizer: Tokenizer) -> list[list[int]]:
    """Token ids of each word, as it stands at the beginning of a text and after a space, each once.

    After a space it is left out where the space is a token of its own: then the word is said as at the beginning.

    Raises:
        ValueError: a word is empty, or has more than MAX_WORD_TOKENS tokens, or there are more than MAX_WORDS.
    """
    if len(words) > MAX_WORDS:
        raise ValueError(f"there are {len(words)} bad words, and at most {MAX_WORDS} are taken")
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        bare = word.lstrip()
        if not bare:
            raise ValueError("a bad word must not be empty")
        alone, after_space = (tuple(tokenizer.encode(text, add_special_tokens=False)) for text in (bare, f" {bare}"))
        found[alone] = None
        if after_space[-len(alone) :] != alone:
            found[after_space] = None
        if max(len(alone), len(after_space)) > MAX_WORD_TOKENS:
            raise ValueError(f"a bad word has {len(alone)} tokens, and at most {MAX_WORD_TOKENS} are taken")
    return [list(way) for way in found]


def leave_nothing(sampling: Sampling) -> bool:
    """Whether no token can be the first: each that is allowed is a bad word, or would end the text too soon."""
    allowed = set(unpack_ints(sampling.allowed_token_ids).tolist())
    barred = {unpack_ints(word)[0] for word in sampling.bad_words if len(unpack_ints(word)) == 1}
    if sampling.min_tokens:
        barred.update(unpack_ints(sampling.eos_token_ids), unpack_ints(sampling.stop_token_ids))
    return bool(allowed) and allowed <= barred
