"""What a frontend knows of a model it serves: tokenizer, chat template, limits and the model's own defaults."""

import hashlib
import time
from collections.abc import Sequence
from typing import Any

import msgspec

from cableway.frontend.template import ChatTemplate
from cableway.frontend.tokens import Tokenizer
from cableway.ipc import modelfiles
from cableway.ipc.config import FrontendConfig

_DEFAULTS = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "repetition_penalty": float,
    "max_new_tokens": int,
}
"""Keys of generation_config.json that are taken as a request's defaults."""


class ServedModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model as its clients see it; one a served name."""

    name: str
    path: str
    tokenizer: Tokenizer
    template: ChatTemplate
    max_model_len: int
    vocab_size: int
    defaults: dict[str, Any]
    eos_token_ids: Sequence[int]
    decoder_prompt: Sequence[int] = ()
    """What the decoder begins with, where the model has an encoder, which then takes the prompt."""
    created: int  # seconds since 1970
    fingerprint: str


def load(config: FrontendConfig, version: str) -> dict[str, ServedModel]:
    """Everything this frontend serves, by name; ModelError when the model's files are broken."""
    files = modelfiles.locate(config.model, load_format="dummy")  # weights are the workers' business
    tokenizer = Tokenizer.load(files)
    template = ChatTemplate.load(files, config.chat_template or None)
    digest = hashlib.sha256(f"{version} {files.path} {config.max_model_len}".encode()).hexdigest()
    return {
        name: ServedModel(
            name=name,
            path=files.path,
            tokenizer=tokenizer,
            template=template,
            max_model_len=config.max_model_len,
            vocab_size=config.vocab_size,
            defaults=sampling_defaults(files.generation_config) if config.generation_config == "auto" else {},
            eos_token_ids=tokenizer.eos_token_ids,
            decoder_prompt=decoder_prompt(files),
            created=int(time.time()),
            fingerprint=f"fp_{digest[:12]}",
        )
        for name in config.engines
    }


def decoder_prompt(files: modelfiles.ModelFiles) -> list[int]:
    """What the decoder of an encoder-decoder begins with; nothing for other models. ModelError when it is not said."""
    if not files.config.get("is_encoder_decoder"):
        return []
    start, forced = (
        files.generation_config.get(name, files.config.get(name))
        for name in ("decoder_start_token_id", "forced_bos_token_id")
    )
    start = files.config.get("bos_token_id") if start is None else start
    if not isinstance(start, int):
        raise modelfiles.ModelError(f"config: decoder_start_token_id is {start!r}, not a token id")
    return [start, forced] if isinstance(forced, int) else [start]


def sampling_defaults(generation_config: dict[str, Any]) -> dict[str, Any]:
    """What a model's authors would have as defaults of a request; ModelError when one is no number."""
    given = {name: generation_config.get(name) for name in _DEFAULTS}
    for name, value in given.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise modelfiles.ModelError(f"generation_config: {name} is no number: {value!r}")
    return {name: _DEFAULTS[name](value) for name, value in given.items() if value is not None}
