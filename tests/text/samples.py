"""Texts that tokenizers disagree about, and tokenizers to try them on."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from cableway.frontend import gguf_tokenizer
from cableway.frontend.tokens import Tokenizer
from cableway.ipc import modelfiles
from cableway.ipc.gguf import read_header

TEXTS = [
    "",
    "Hello, world!",
    " leading and trailing ",
    "two  spaces,   three,    four\t\ttabs",
    "\n\n\r\n \n  x\n",
    "a\u00a0b\u3000c\u2028d",
    "I'm you're WE'LL they'd it's 'twas 'S",
    "3.14159 1234567890 1,000,000 ２３ Ⅷ ½ ٣٤",
    "def f(x: int) -> str:\n    return f'{x!r:>10}'  # done\n\n\nif __name__ == '__main__':\n\tmain()\n",
    "for(i=0;i<n;++i){a[i]*=b->c|~d;}",
    "https://example.com/path?q=1&r=%20#frag user@host.org C:\\dir\\file.txt",
    "naïve café Ñandú straße İstanbul ŒUVRE",
    "Съешь ещё этих мягких французских булок",
    "你好,世界!日本語のテキスト、한국어 텍스트",
    "مرحبا بالعالم हिन्दी ไทย",
    "e\u0301 vs \u00e9, A\u030a vs \u00c5, ﬁ, ſ",
    "😀👩‍👩‍👧‍👦🇫🇷👍🏽",
    "zero\u200bwidth \ufeffbom \u0000nul \u001besc",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "<|im_start|><|im_end|><|im_end >< |im_end|>",
    "ALLCAPSword camelCaseWord snake_case_word kebab-case",
    "....... --- ***!!!??? $$$ ~~~ ```python```",
    "x" * 300,
    " " * 100 + "end",
]


def texts() -> st.SearchStrategy[str]:
    """Any Unicode, and mixtures of the samples above cut anywhere."""
    cut = st.tuples(st.sampled_from(TEXTS), st.integers(0, 40), st.integers(0, 40)).map(lambda t: t[0][t[1] : t[2]])
    return st.one_of(st.text(max_size=40), st.lists(cut | st.text(max_size=8), max_size=5).map("".join))


@cache
def smollm2() -> Tokenizer:
    return Tokenizer.load(modelfiles.locate("smollm2-135m"))


@cache
def smollm2_metadata() -> dict[str, Any]:
    return read_header(modelfiles.locate("smollm2-135m").path).metadata


@cache
def sentence_piece_cases() -> dict[str, Any]:
    """A BPE vocabulary trained by the sentencepiece library (0.2.1), and what that library makes of some texts."""
    return json.loads((Path(__file__).parent / "sentencepiece.json").read_text())


def sentence_piece_metadata(**changes: Any) -> dict[str, Any]:
    cases = sentence_piece_cases()
    fields = {
        "model": "llama",
        "tokens": cases["pieces"],
        "scores": cases["scores"],
        "token_type": cases["kinds"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        **changes,
    }
    return {f"tokenizer.ggml.{name}": value for name, value in fields.items()}


def from_metadata(metadata: dict[str, Any]) -> Tokenizer:
    special = gguf_tokenizer.special_tokens(metadata)
    return Tokenizer(gguf_tokenizer.build("test.gguf", metadata), special, [metadata["tokenizer.ggml.eos_token_id"]])


@cache
def sentence_piece() -> Tokenizer:
    return from_metadata(sentence_piece_metadata())
