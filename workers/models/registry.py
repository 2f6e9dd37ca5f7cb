"""Architectures by the name their checkpoints give, and how each is spelled in files."""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cableway.ipc.modelfiles import ModelError
from cableway.workers.blocks.decoder import Decoder
from cableway.workers.models.config import DecoderConfig, read
from cableway.workers.models.names import Names


@dataclass(frozen=True)
class Architecture:
    """A family under one of its names. `names`: kind of checkpoint (folder, gguf) -> naming scheme."""

    name: str
    config: type[DecoderConfig]
    spec: Callable[[Any], Decoder]
    names: Mapping[str, Names]

    def build(self, config: Mapping[str, Any]) -> Decoder:
        """The model without weights; ModelError when the config is not sound."""
        return self.spec(read(config, self.config))


_architectures: dict[str, Architecture] = {}


def arch(*names: str, config: type[DecoderConfig], hf: Names, gguf: Names | None = None) -> Callable:
    """Register a spec under its checkpoints' `architectures` names."""
    schemes = {"folder": hf} if gguf is None else {"folder": hf, "gguf": gguf}

    def register(spec: Callable[[Any], Decoder]) -> Callable[[Any], Decoder]:
        _architectures.update((name, Architecture(name, config, spec, schemes)) for name in names)
        return spec

    return register


def architectures() -> list[Architecture]:
    """Every registered architecture."""
    return list(_architectures.values())


def find(config: Mapping[str, Any]) -> Architecture:
    """The architecture a config names; ModelError with the nearest known ones when there is none."""
    named = config.get("architectures")
    name = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else None
    if name in _architectures:
        return _architectures[name]
    near = difflib.get_close_matches(str(name), _architectures, 3, 0.3) or sorted(_architectures)
    raise ModelError(f"architecture {name!r} is not supported; near it: {', '.join(near)}")
