"""Architectures by the name their checkpoints give, and how each is spelled in files."""

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cableway.ipc.modelfiles import ModelError
from cableway.workers.blocks.decoder import Decoder
from cableway.workers.models.config import DecoderConfig, read
from cableway.workers.models.names import Names

Scheme = Names | Callable[[Any], Names]
"""Names of a kind of checkpoint, or what makes them from the config."""

TRANSFORMERS = "logits of transformers' own class"
UNVERIFIED = "unverified"
_LAYERS = {"folder": "model.layers.", "gguf": "blk."}
"""Where layers are. Those past the last, which predict further tokens (MTP), are not used."""


def relative(name: str) -> str:
    """Verified by a relative's checkpoint, rewritten into the family's published names, packing and config."""
    return f"logits of {name}, rewritten"


@dataclass(frozen=True)
class Architecture:
    """A family under one of its names.

    Attributes:
        schemes: kind of checkpoint (folder, gguf) -> naming scheme.
        verified: against what the tests hold its logits.
    """

    name: str
    config: type[DecoderConfig]
    spec: Callable[[Any], Decoder]
    schemes: Mapping[str, Scheme]
    verified: str

    @property
    def file(self) -> str:
        """The family's file."""
        return Path(inspect.getfile(self.spec)).name

    def build(self, config: Mapping[str, Any]) -> Decoder:
        """The model without weights; ModelError when the config is not sound."""
        return self.spec(read(config, self.config))

    def names(self, kind: str, config: Mapping[str, Any]) -> Names:
        """The naming scheme of a checkpoint of this kind."""
        c, scheme = read(config, self.config), self.schemes[kind]
        last, num_further = c.num_hidden_layers, getattr(c, "num_nextn_predict_layers", 0)
        beyond = Names(beyond=tuple(f"{_LAYERS[kind]}{last + i}." for i in range(num_further)))
        return (scheme if isinstance(scheme, Names) else scheme(c)) | beyond


_architectures: dict[str, Architecture] = {}


def arch(
    *names: str, config: type[DecoderConfig], hf: Scheme, gguf: Scheme | None = None, like: str = "",
    verified: str = TRANSFORMERS,
) -> Callable:  # fmt: skip
    """Register a spec under its checkpoints' `architectures` names.

    Args:
        like: the relative that it is verified by, where transformers has no class of that name.
    """
    verified = relative(like) if like else verified
    schemes = {"folder": hf} if gguf is None else {"folder": hf, "gguf": gguf}

    def register(spec: Callable[[Any], Decoder]) -> Callable[[Any], Decoder]:
        for name in names:
            assert name not in _architectures, name
            _architectures[name] = Architecture(name, config, spec, schemes, verified)
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
    near = difflib.get_close_matches(str(name), _architectures, 3, 0.3)
    listed = f"near it: {', '.join(near)}" if near else "`cableway models` lists those that are"
    raise ModelError(f"architecture {name!r} is not supported; {listed}; docs/adding-a-model.md says how to add it")
