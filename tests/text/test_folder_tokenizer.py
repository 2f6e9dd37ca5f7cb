"""Tokenizers of model folders: tokenizer.json as it is, and what tokenizer_config.json says beside it."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cableway.frontend.tokens import Detokenizer, Tokenizer
from cableway.ipc.gguf import ModelError
from cableway.ipc.modelfiles import ModelFiles

from .samples import TEXTS, smollm2


def folder(path: Path, library: Any, config: Any = None, **generation_config: Any) -> ModelFiles:
    (path / "tokenizer.json").write_text(library if isinstance(library, str) else library.to_str())
    if config is not None:
        (path / "tokenizer_config.json").write_text(json.dumps(config))
    return ModelFiles(
        name="m", kind="folder", path=str(path), config={}, generation_config=generation_config, weights=[]
    )


def words(decoder: Any = None, pre_tokenizer: Any = None) -> tokenizers.Tokenizer:
    """A vocabulary of a few words."""
    vocab = ["<unk>", "<s>", "</s>", "▁the", "▁engine", "▁core", "s", "##s", "the", "engine", "<0xC3>", "<0xA9>", "▁"]
    library = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocab)}, unk_token="<unk>"))
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    library.pre_tokenizer = pre_tokenizer or pre_tokenizers.WhitespaceSplit()
    if decoder is not None:
        library.decoder = decoder
    return library


def test_equals_the_gguf_and_transformers(tmp_path: Path) -> None:
    gguf = smollm2()
    files = folder(tmp_path, gguf._library, {"eos_token": "<|im_end|>"}, eos_token_id=[0, 2])
    tokenizer = Tokenizer.load(files)
    oracle = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == gguf.encode(text) == oracle.encode(text)
        assert tokenizer.decode(ids) == oracle.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert tokenizer.eos_token_ids == (0, 2)


@pytest.mark.parametrize(
    ("declared", "ends"),
    [
        ({}, ([], [])),
        ({"add_bos_token": False, "add_eos_token": False}, ([], [])),
        ({"add_bos_token": True}, ([1], [])),
        ({"add_bos_token": True, "add_eos_token": True}, ([1], [2])),
        ({"add_bos_token": True, "bos_token": None}, ([], [])),
    ],
)
def test_declared_ends_outrank_tokenizer_json(tmp_path: Path, declared: Any, ends: Any) -> None:
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, **declared}
    tokenizer = Tokenizer.load(folder(tmp_path, words(), config))
    (before, after) = ends
    assert tokenizer.encode("the engine") == [*before, 8, 9, *after]
    assert tokenizer.encode("the engine", add_special_tokens=False) == [8, 9]
    assert tokenizer.eos_token_ids == (2,)


def test_truncation_and_padding_are_the_servers_business(tmp_path: Path) -> None:
    library = words()
    library.enable_truncation(1)
    library.enable_padding(length=8)
    assert Tokenizer.load(folder(tmp_path, library)).encode("the engine") == [8, 9]


def test_declared_tokens_are_added(tmp_path: Path) -> None:
    library = words()
    size = library.get_vocab_size()
    declared = {
        str(size + 1): {"content": "<tool>", "special": False},
        str(size): {"content": "<|end|>", "special": True},
        "99": {"content": "<gap>", "special": True},
        "x": {"content": "<x>"},
    }
    tokenizer = Tokenizer.load(folder(tmp_path, library, {"added_tokens_decoder": declared, "eos_token": "<|end|>"}))
    ids = tokenizer.encode("the<|end|><tool>")
    assert ids == [8, size, size + 1]
    assert tokenizer.decode(ids) == "the<tool>"
    assert tokenizer.vocab_size == size + 2
    assert tokenizer.eos_token_ids == (size,)


DECODERS = {
    "none": (None, [8, 9, 6]),
    "WordPiece": (decoders.WordPiece(), [8, 9, 7, 8]),
    "Metaspace": (decoders.Metaspace(), [3, 4, 6, 12, 4]),
    "Metaspace never": (decoders.Metaspace(prepend_scheme="never"), [3, 4, 6]),
    "Llama": (
        decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        ),
        [3, 4, 10, 11, 6, 12, 12, 4],
    ),
    "Gemma": (
        decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]),
        [3, 4, 10, 11, 6],
    ),
    "ByteLevel in a sequence": (decoders.Sequence([decoders.ByteLevel()]), [8, 9, 6]),
}


@pytest.mark.parametrize("name", DECODERS)
def test_decoders_are_spelled_token_by_token(tmp_path: Path, name: str) -> None:
    decoder, ids = DECODERS[name]
    library = words(decoder)
    tokenizer = Tokenizer.load(folder(tmp_path, library))
    for end in range(len(ids) + 1):
        if ids[end - 1 : end] != [10]:  # not in the middle of a character
            assert tokenizer.decode(ids[:end]) == library.decode(ids[:end])
    detokenizer = Detokenizer(tokenizer)
    assert "".join(detokenizer.feed([token_id]) for token_id in [1, *ids, 2]) == library.decode([1, *ids, 2])


def test_added_tokens_keep_their_characters(tmp_path: Path) -> None:
    """Letters that mean bytes in a byte-level vocabulary are just letters in an added token."""
    library = tokenizers.Tokenizer.from_str(smollm2()._library.to_str())
    library.add_tokens([AddedToken("naïveté", normalized=False), AddedToken("<｜tool▁call｜>", normalized=False)])
    tokenizer = Tokenizer.load(folder(tmp_path, library))
    text = "so naïveté <｜tool▁call｜>"
    ids = tokenizer.encode(text)
    assert {library.token_to_id("naïveté"), library.token_to_id("<｜tool▁call｜>")} <= set(ids)
    assert tokenizer.decode(ids) == text


def test_normalizers_are_kept(tmp_path: Path) -> None:
    library = words()
    library.normalizer = normalizers.Lowercase()
    assert Tokenizer.load(folder(tmp_path, library)).encode("THE Engine") == [8, 9]


_CONTRADICTION = (  # the template names a token that the list of special tokens has not
    '{"type":"TemplateProcessing","single":[{"SpecialToken":{"id":"x","type_id":0}}],"pair":[],"special_tokens":{}}'
)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "not a usable tokenizer"),
        ("{}", "not a usable tokenizer"),
        ('{"model": {"type": "BPE"}}', "not a usable tokenizer"),
        ("[" * 100_000, "not a usable tokenizer"),
        (
            words().to_str().replace('"post_processor":null', f'"post_processor":{_CONTRADICTION}'),
            "not a usable tokenizer",
        ),
        (words(decoders.CTC()).to_str(), "not supported"),
        (words(decoders.Sequence([decoders.Strip("x", 2, 2), decoders.Fuse()])).to_str(), "not supported"),
    ],
)
def test_broken_files_are_said_in_a_line(tmp_path: Path, content: str, said: str) -> None:
    with pytest.raises(ModelError) as caught:
        Tokenizer.load(folder(tmp_path, content))
    assert said in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_without_tokenizer_is_said(tmp_path: Path) -> None:
    files = folder(tmp_path, "")
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        Tokenizer.load(files)
