"""Read a model's tokenizer: from a folder's `tokenizer.json`, or from GGUF metadata."""

from pathlib import Path
from typing import Any, NamedTuple

import tokenizers

from cableway.frontend import gguf_tokenizer
from cableway.frontend.gguf_tokenizer import set_ends
from cableway.ipc.gguf import ModelError, read_header
from cableway.ipc.modelfiles import ModelFiles, read_json

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class TokenizerSource(NamedTuple):
    library: tokenizers.Tokenizer
    special_tokens: dict[str, str]
    """What chat templates may name, such as {"bos_token": "<s>"}."""


def read(files: ModelFiles) -> TokenizerSource:
    """Read or rebuild the tokenizer; ModelError when it is missing, broken or of a kind that is not supported."""
    if files.kind == "gguf":
        metadata = read_header(files.path).metadata
        return TokenizerSource(gguf_tokenizer.build(files.path, metadata), gguf_special_tokens(metadata))
    return _from_folder(Path(files.path))


def gguf_special_tokens(metadata: dict[str, Any]) -> dict[str, str]:
    """Special tokens by name, such as {"bos_token": "<s>"}; empty for a file without a vocabulary."""
    return gguf_tokenizer.special_tokens(metadata) if "tokenizer.ggml.tokens" in metadata else {}


def folder_special_tokens(settings: dict[str, Any]) -> dict[str, str]:
    """The same, from tokenizer_config.json; older files write tokens as objects."""
    found = {name: settings.get(name) for name in SPECIAL_NAMES}
    contents = {name: token.get("content") if isinstance(token, dict) else token for name, token in found.items()}
    return {name: content for name, content in contents.items() if isinstance(content, str)}


def read_settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, or nothing where there is none."""
    path = folder / "tokenizer_config.json"
    return read_json(path) if path.exists() else {}


def _from_folder(folder: Path) -> TokenizerSource:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelError(f"{folder}: no tokenizer.json")
    try:
        library = tokenizers.Tokenizer.from_file(str(path))
        library.encode("a tokenizer that cannot do this can do nothing", add_special_tokens=True)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises plain Exception, and panics where a file contradicts itself
        raise ModelError(f"{path}: not a usable tokenizer: {error}") from None
    library.no_truncation()
    library.no_padding()
    settings = read_settings(folder)
    special_tokens = folder_special_tokens(settings)
    _add_declared_tokens(library, settings, special_tokens)
    _set_declared_ends(library, settings, special_tokens)
    return TokenizerSource(library, special_tokens)


def _add_declared_tokens(library: tokenizers.Tokenizer, settings: dict[str, Any], special: dict[str, str]) -> None:
    """Add tokens that only tokenizer_config.json knows, where their ids follow those of tokenizer.json."""
    declared = settings.get("added_tokens_decoder")
    if not isinstance(declared, dict):
        declared = {}
    for token_id, token in sorted((int(i), token) for i, token in declared.items() if i.isdecimal()):
        content = token.get("content") if isinstance(token, dict) else None
        if isinstance(content, str) and token_id == library.get_vocab_size(with_added_tokens=True):
            flags = {name: token.get(name) is True for name in ("single_word", "lstrip", "rstrip", "normalized")}
            added = tokenizers.AddedToken(content, special=token.get("special") is True, **flags)
            library.add_special_tokens([added]) if added.special else library.add_tokens([added])
    # A named token is special even where tokenizer.json lists it among the ordinary ones.
    named = [content for content in special.values() if library.token_to_id(content) is not None]
    library.add_special_tokens([content for content in named if content not in _special_contents(library)])


def _special_contents(library: tokenizers.Tokenizer) -> set[str]:
    return {token.content for token in library.get_added_tokens_decoder().values() if token.special}


def _set_declared_ends(library: tokenizers.Tokenizer, settings: dict[str, Any], special: dict[str, str]) -> None:
    """`add_bos_token` and `add_eos_token` outrank what tokenizer.json puts around a text."""
    if not any(isinstance(settings.get(f"add_{end}_token"), bool) for end in ("bos", "eos")):
        return
    bos_id, eos_id = (
        library.token_to_id(special[f"{end}_token"])
        if settings.get(f"add_{end}_token") is True and f"{end}_token" in special
        else None
        for end in ("bos", "eos")
    )
    set_ends(library, bos_id, eos_id)
