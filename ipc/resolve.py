"""`resolve()`: the one place where "auto" becomes a value."""

import os
import re
import sys
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from cableway.ipc import machine, modelfiles, runtime
from cableway.ipc.config import (
    ENGINE,
    Config,
    ConfigError,
    CoreConfig,
    FrontendConfig,
    LogConfig,
    Options,
    SupervisorConfig,
    WorkerConfig,
)
from cableway.ipc.lifeline import Patience

LEASE_S = 10.0
"""Silence after which the core takes a frontend for dead."""
_DEFAULT_MODEL_LEN = 2048
_LEAST_BLOCK_SIZE = 8
_CPU_BATCHED_TOKENS = 512
_CUDA_BATCHED_TOKENS, _CUDA_BATCHED_TOKENS_UNWATCHED = 8192, 1 << 14
_MOST_FRONTENDS = 4
_CPU_STREAM_INTERVAL_S = 0.03
_SCALED_ROPE = ("linear", "dynamic", "yarn")
_ROUNDED_BY_BFLOAT16 = ("float32", "float16")

Slice = TypeVar("Slice", bound=msgspec.Struct)


def resolve(options: Options, *, is_watched: bool = True) -> Config:
    """Turn every "auto" into a value and cut the whole into one slice a process.

    `is_watched`: somebody reads tokens as they come, so that long steps would be seen as pauses.

    Reads the model's description, never its weights; `notes` of the result tell each choice made.

    Raises:
        ConfigError: the options contradict each other, the model or the machine.
        ModelError: the model cannot be found or read.
    """
    if 0 < options.block_size < _LEAST_BLOCK_SIZE:
        raise ConfigError(f"block_size: {options.block_size} is below {_LEAST_BLOCK_SIZE}")
    if not all(re.fullmatch(r"\S+", key) for key in options.api_key):
        # An empty one would let everybody in, and no client can send white space.
        raise ConfigError("api_key: a key is empty, or has white space in it; does the variable exist that it is from?")
    files = modelfiles.locate(options.model, options.load_format)
    device, device_note = _device(options)
    dtype, dtype_note = _dtype(options, device, files.config)
    max_model_len, length_note = _max_model_len(options, files.config)
    max_num_batched_tokens, batch_note = _max_num_batched_tokens(options, device, is_watched)
    num_threads, threads_note = _num_threads(options)
    frontends, frontends_note = _frontends(options, device)
    stream_interval_s, interval_note = _stream_interval_s(options, device)
    values = {name: getattr(options, name) for name in options.__struct_fields__} | {
        "model": os.path.abspath(files.path),
        "device": device,
        "dtype": dtype,
        "kv_cache_dtype": {"auto": dtype, "fp8": "fp8_e4m3"}.get(options.kv_cache_dtype, options.kv_cache_dtype),
        "state_dtype": {"auto": "float32"}.get(options.state_dtype, options.state_dtype),
        "max_model_len": max_model_len,
        "max_num_batched_tokens": max_num_batched_tokens,
        "num_threads": num_threads,
        "frontends": frontends,
        "stream_interval_s": stream_interval_s,
        "vocab_size": _vocab_size(files.config),
        "chat_template": _existing_file("chat_template", options.chat_template),
        "uds": os.path.abspath(options.uds) if options.uds else "",
        "runtime_dir": runtime_folder(options),
        "engine": ENGINE,
        "engines": dict.fromkeys(options.served_model_name or [files.name], ENGINE),
        "workers": 1,
        "num_workers": 1,
        "lease_s": LEASE_S,
        "patience": Patience(options.drain_timeout_s, options.heartbeat_timeout_s, options.step_timeout_s),
        "log": _log(options),
    }
    return Config(
        supervisor=_cut(SupervisorConfig, values),
        frontend=_cut(FrontendConfig, values),
        core=_cut(CoreConfig, values),
        worker=_cut(WorkerConfig, values),
        notes=[
            note
            for note in (device_note, dtype_note, length_note, batch_note, threads_note, frontends_note, interval_note)
            if note
        ],
    )


def runtime_folder(options: Options) -> str:
    """The folder named by the options, or else by the address that is listened on."""
    if options.runtime_dir:
        return os.path.abspath(options.runtime_dir)
    return str(runtime.folder_for(options.host, options.port, options.uds))


def _cut(kind: type[Slice], values: dict[str, Any]) -> Slice:
    return kind(**{name: values[name] for name in kind.__struct_fields__})


def _device(options: Options) -> tuple[str, str]:
    if options.device == "cuda" and machine.torch_is_cpu_build():
        raise ConfigError("device: the installed torch is a CPU build")
    if options.device != "auto":
        return options.device, ""
    if not machine.has_nvidia_gpu():
        return "cpu", "device = cpu: no NVIDIA GPU here"
    if machine.torch_is_cpu_build():
        return "cpu", "device = cpu: there is an NVIDIA GPU, but the installed torch is a CPU build"
    return "cuda", "device = cuda: there is an NVIDIA GPU"


def _dtype(options: Options, device: str, model: dict[str, Any]) -> tuple[str, str]:
    """Never coarser than the weights on a CPU; on a GPU float32 weights are computed in bfloat16, as is usual there."""
    if options.dtype != "auto":
        return options.dtype, ""
    stored = str(model.get("dtype") or model.get("torch_dtype") or "unknown").removeprefix("torch.")
    if device == "cuda":
        if stored in ("bfloat16", "float16"):
            return stored, f"dtype = {stored}: the model's own"
        return "bfloat16", f"dtype = bfloat16: usual on a GPU; the model's own is {stored}"
    if stored in _ROUNDED_BY_BFLOAT16:
        return "float32", f"dtype = float32: bfloat16 would round this model's {stored} weights"
    if machine.cpu_multiplies_bfloat16():
        return "bfloat16", "dtype = bfloat16: this CPU has instructions for it"
    return "float32", "dtype = float32: this CPU has no bfloat16 instructions"


def _max_model_len(options: Options, model: dict[str, Any]) -> tuple[int, str]:
    own = _own_model_len(model)
    if options.max_model_len > own > 0:
        raise ConfigError(f"max_model_len: {options.max_model_len} is more than the model's own {own}")
    if options.max_model_len:
        return options.max_model_len, ""
    if own:
        return own, f"max_model_len = {own}: the model's own"
    return _DEFAULT_MODEL_LEN, f"max_model_len = {_DEFAULT_MODEL_LEN}: the model names none"


def _own_model_len(model: dict[str, Any]) -> int:
    """Tokens the model was made for, with its RoPE scaling; 0 when its config does not say."""
    length = model.get("max_position_embeddings")
    if length is None:
        return 0
    if not isinstance(length, int) or length < 1:
        raise modelfiles.ModelError(f"config: max_position_embeddings is {length!r}, not a positive integer")
    rope = model.get("rope_parameters") or model.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") if isinstance(rope, dict) else None
    factor = rope.get("factor") if kind in _SCALED_ROPE else None
    if not isinstance(factor, int | float):
        return length
    original = rope.get("original_max_position_embeddings")
    return max(length, int((original if isinstance(original, int) else length) * factor))


def _vocab_size(model: dict[str, Any]) -> int:
    size = model.get("vocab_size")
    if not isinstance(size, int) or not 0 < size < 1 << 31:
        raise modelfiles.ModelError(f"config: vocab_size is {size!r}, not a positive integer")
    return size


def _max_num_batched_tokens(options: Options, device: str, is_watched: bool) -> tuple[int, str]:
    """PERF, H200, prompts with twice as many: 2.5 % faster with 128 experts, dense models no different."""
    if options.max_num_batched_tokens:
        if options.max_num_batched_tokens < options.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens: {options.max_num_batched_tokens} cannot hold one token for each of "
                f"max_num_seqs = {options.max_num_seqs} sequences"
            )
        return options.max_num_batched_tokens, ""
    on_cuda = _CUDA_BATCHED_TOKENS if is_watched else _CUDA_BATCHED_TOKENS_UNWATCHED
    tokens = max(on_cuda if device == "cuda" else _CPU_BATCHED_TOKENS, options.max_num_seqs)
    return tokens, f"max_num_batched_tokens = {tokens}: usual on {device}"


def _num_threads(options: Options) -> tuple[int, str]:
    if options.num_threads:
        return options.num_threads, ""
    cores = machine.num_cores()
    return cores, f"num_threads = {cores}: physical cores this process may use"


def _frontends(options: Options, device: str) -> tuple[int, str]:
    """A frontend sends some 50,000 tokens/s: no CPU makes more, and a GPU does with small models."""
    if options.frontends:
        return options.frontends, ""
    if device == "cpu":
        return 1, "frontends = 1: enough for a CPU"
    number = min(max(machine.num_cores() // 2, 1), _MOST_FRONTENDS)
    return number, f"frontends = {number}: half of the physical cores, {_MOST_FRONTENDS} at most"


def _stream_interval_s(options: Options, device: str) -> tuple[float, str]:
    """Processes that are woken for each token take from a model that is computed on the same cores."""
    if options.stream_interval_s >= 0:
        return options.stream_interval_s, ""
    if device != "cpu":
        return 0.0, ""
    seconds = _CPU_STREAM_INTERVAL_S
    return seconds, f"stream_interval_s = {seconds}: tokens drawn within that come together, where nobody waits"


def _existing_file(name: str, path: str) -> str:
    if path and not Path(path).is_file():
        raise ConfigError(f"{name}: no file {path}")
    return os.path.abspath(path) if path else ""


def _log(options: Options) -> LogConfig:
    as_json = {"json": True, "console": False, "auto": not sys.stderr.isatty()}[options.log_format]
    return LogConfig(options.log_level, as_json)
