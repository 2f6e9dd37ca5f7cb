"""Configuration: `Options` is what a user may say, `Config` what it resolved to (resolve.py), one slice a process.

The resolved slices are frozen, written once to the runtime folder as JSON, and read by each process on its own, so that
a process restarted alone comes up as it was. `cableway serve --config file.toml` takes the names of `Options`.
"""

import os
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from cableway.ipc import runtime
from cableway.ipc.errors import EXIT_OPTIONS, UserError
from cableway.ipc.lifeline import Patience

ENGINE = "0"
"""The one engine of a server today; messages and addresses already name it."""

Port = Annotated[int, Meta(ge=0, le=65535)]
Positive = Annotated[int, Meta(ge=1)]
Count = Annotated[int, Meta(ge=0)]
Seconds = Annotated[float, Meta(gt=0)]


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Every flag of `cableway serve` and every key of a config file; `Meta(description=…)` is the flag's help."""

    # model
    model: Annotated[str, Meta(description="alias, .gguf file, folder, or hub id")] = "smollm2-135m"
    served_model_name: Annotated[list[str], Meta(description="names clients may use; the first is shown")] = []
    load_format: Annotated[str, Meta(pattern="^(auto|dummy)$", description="dummy = random weights")] = "auto"
    dtype: Annotated[str, Meta(pattern="^(auto|float32|float16|bfloat16)$", description="compute dtype")] = "auto"
    device: Annotated[str, Meta(pattern="^(auto|cpu|cuda)$", description="where the workers run")] = "auto"
    max_model_len: Annotated[Count, Meta(description="tokens a sequence may have; 0 = the model's own")] = 0
    generation_config: Annotated[
        str, Meta(pattern="^(auto|none)$", description="use the model's sampling defaults")
    ] = "auto"
    chat_template: Annotated[str, Meta(description="Jinja2 file in place of the model's own")] = ""

    # engine
    max_num_seqs: Annotated[Positive, Meta(description="sequences in one step")] = 64
    max_num_batched_tokens: Annotated[Count, Meta(description="tokens in one step; 0 = auto")] = 0
    block_size: Annotated[
        int, Meta(ge=0, le=256, description="tokens a KV block holds; 0 = 16, or 256 where a block keeps a state")
    ] = 0
    kv_cache_dtype: Annotated[
        str,
        Meta(
            pattern="^(auto|fp8|fp8_e4m3|fp8_e5m2|int8)$",
            description="numbers the KV cache keeps; auto = as dtype, fp8 = fp8_e4m3; 8 bits hold twice the tokens",
        ),
    ] = "auto"
    state_dtype: Annotated[
        str,
        Meta(
            pattern="^(auto|float32|bfloat16)$",
            description="numbers that states of recurrent layers are kept in; auto = float32, bfloat16 takes half",
        ),
    ] = "auto"
    gpu_memory_utilization: Annotated[
        float, Meta(gt=0, le=1, description="part of a GPU's memory for weights, steps and KV cache together")
    ] = 0.9
    kv_cache_memory_bytes: Annotated[
        Count, Meta(description="memory for the KV cache, whatever gpu_memory_utilization says; 0 = auto")
    ] = 0
    num_kv_blocks: Annotated[Count, Meta(description="KV blocks, in place of a memory size; 0 = auto")] = 0
    prefix_cache: Annotated[bool, Meta(description="share the KV of common prefixes")] = True
    scheduling_policy: Annotated[str, Meta(pattern="^(fcfs|priority)$", description="who is served first")] = "fcfs"
    overlap: Annotated[int, Meta(ge=0, le=1, description="steps planned ahead of the one that runs")] = 1
    stream_interval_s: Annotated[
        float,
        Meta(ge=-1, description="tokens drawn within so long may come together; 0 = each alone, -1 = 0.03 on a CPU"),
    ] = -1
    batch_invariant: Annotated[bool, Meta(description="bit-equal results in any batch, at some cost")] = False
    enforce_eager: Annotated[bool, Meta(description="no CUDA graphs: slower steps, a sooner start")] = False
    max_seq_len_to_capture: Annotated[
        Count, Meta(description="steps with longer sequences run without CUDA graphs; 0 = none do")
    ] = 0
    num_threads: Annotated[Count, Meta(description="CPU threads of a worker; 0 = auto")] = 0
    seed: Annotated[Count, Meta(description="of dummy weights")] = 0

    # server
    host: Annotated[str, Meta(description="address to listen on")] = "127.0.0.1"
    port: Annotated[Port, Meta(description="port to listen on; 0 = any free one")] = 8000
    uds: Annotated[str, Meta(description="Unix socket to listen on, in place of host and port")] = ""
    frontends: Annotated[Count, Meta(description="frontend processes; 0 = auto")] = 0
    api_key: Annotated[list[str], Meta(description="keys that open every route but /health")] = []
    enable_sleep_mode: Annotated[
        bool, Meta(description="POST /sleep and /wake_up: give the memory of weights and KV cache back for a while")
    ] = False
    allowed_origins: Annotated[list[str], Meta(description="browser origins let in (CORS); none by default")] = []
    allowed_hosts: Annotated[list[str], Meta(description="Host headers accepted beside the bound address")] = []
    metrics_prefix: Annotated[str, Meta(pattern="^[a-z_]+$", description="prefix of the metric names")] = "cableway"
    max_body_bytes: Annotated[Positive, Meta(description="largest request body")] = 16 << 20
    max_queued_requests: Annotated[Positive, Meta(description="waiting requests before 429")] = 1024
    max_queued_tokens: Annotated[Positive, Meta(description="waiting prompt tokens before 429")] = 4_000_000
    header_timeout_s: Annotated[Seconds, Meta(description="time to send headers and body")] = 30.0
    idle_timeout_s: Annotated[Seconds, Meta(description="idle time of a kept-alive connection")] = 75.0
    max_logprobs: Annotated[Count, Meta(description="largest top_logprobs and prompt_logprobs")] = 20
    access_log: Annotated[bool, Meta(description="log a line a request")] = True

    # processes
    runtime_dir: Annotated[str, Meta(description="folder of sockets and state; auto by address")] = ""
    drain_timeout_s: Annotated[Seconds, Meta(description="time that running requests get at SIGTERM")] = 30.0
    restart_drain_timeout_s: Annotated[
        Seconds, Meta(description="time that a replaced frontend's connections get to end by themselves")
    ] = 3600.0
    heartbeat_timeout_s: Annotated[Seconds, Meta(description="silence after which a process is killed")] = 5.0
    step_timeout_s: Annotated[
        Seconds, Meta(description="a full step longer than this counts as a hang; smaller ones in proportion")
    ] = 120.0
    standby: Annotated[
        bool, Meta(description="hold a prepared process beside the core and each worker: a death is mended faster")
    ] = True
    log_level: Annotated[str, Meta(pattern="^(debug|info|warning|error)$", description="least level logged")] = "info"
    log_format: Annotated[str, Meta(pattern="^(auto|json|console)$", description="auto: console on a terminal")] = (
        "auto"
    )


class LogConfig(msgspec.Struct, frozen=True):
    level: str
    as_json: bool | None


class FrontendConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What a frontend process needs. `engines` maps each served name to the engine that serves it."""

    runtime_dir: str
    engines: dict[str, str]
    model: str  # local path of the model, resolved
    max_model_len: int
    vocab_size: int
    generation_config: str
    chat_template: str
    host: str
    port: int
    uds: str
    api_key: list[str]
    allowed_origins: list[str]
    allowed_hosts: list[str]
    metrics_prefix: str
    max_body_bytes: int
    max_queued_requests: int
    max_queued_tokens: int
    header_timeout_s: float
    idle_timeout_s: float
    max_logprobs: int
    max_num_seqs: int
    step_timeout_s: float
    drain_timeout_s: float
    access_log: bool
    log: LogConfig
    patience: Patience = Patience()
    enable_sleep_mode: bool = False


class CoreConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine-core process needs."""

    runtime_dir: str
    engine: str
    num_workers: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    prefix_cache: bool
    scheduling_policy: str
    overlap: int
    stream_interval_s: float
    max_queued_requests: int
    max_queued_tokens: int
    lease_s: float
    step_timeout_s: float
    drain_timeout_s: float
    log: LogConfig
    patience: Patience = Patience()


class WorkerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker process needs."""

    runtime_dir: str
    engine: str
    model: str  # local path of the model, resolved
    load_format: str
    dtype: str  # float32 | float16 | bfloat16
    device: str  # cpu | cuda
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int  # 0: by the state that the model keeps
    kv_cache_memory_bytes: int  # 0 = what memory allows
    num_kv_blocks: int  # 0 = from kv_cache_memory_bytes
    batch_invariant: bool
    enforce_eager: bool
    num_threads: int
    stream_interval_s: float
    seed: int
    log: LogConfig
    patience: Patience = Patience()
    gpu_memory_utilization: float = 0.9
    max_seq_len_to_capture: int = 0  # 0 = any length
    kv_cache_dtype: str  # that of `dtype`, or fp8_e4m3 | fp8_e5m2 | int8
    state_dtype: str = "float32"  # or bfloat16


class SupervisorConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What the supervisor needs to start, watch and stop the others."""

    runtime_dir: str
    frontends: int
    workers: int
    host: str
    port: int
    uds: str
    patience: Patience
    restart_drain_timeout_s: float
    standby: bool
    log: LogConfig


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """The resolved whole: `config.json` in the runtime folder. `notes` says what was chosen automatically, and why."""

    supervisor: SupervisorConfig
    frontend: FrontendConfig
    core: CoreConfig
    worker: WorkerConfig
    notes: list[str] = []


def frontends_address(runtime_dir: str, engine: str) -> str:
    """Where the core of `engine` listens for frontends."""
    return f"ipc://{runtime_dir}/engine-{engine}.frontends.sock"


def workers_address(runtime_dir: str, engine: str) -> str:
    """Where the core of `engine` listens for its workers."""
    return f"ipc://{runtime_dir}/engine-{engine}.workers.sock"


# ---------------------------------------------------------------------------------------------------------------------
# Reading what the user says


class ConfigError(UserError):
    """What the user asked for cannot be."""

    exit_code = EXIT_OPTIONS


def options(values: dict[str, Any]) -> Options:
    """Check names, types and ranges of `values` (a config file's keys and the flags); ConfigError names the culprit."""
    try:
        return msgspec.convert(values, Options)
    except msgspec.ValidationError as error:
        raise ConfigError(_in_plain_words(str(error))) from None


def _in_plain_words(error: str) -> str:
    """`Expected `int`, got `str` - at `$.port`` -> `port: expected int, got str`."""
    what, _, where = error.replace("`", "").partition(" - at $.")
    if unknown := re.fullmatch(r"Object contains unknown field (.*)", what):
        return f"{unknown[1]}: there is no such option"
    if one_of := re.search(r"matching regex '\^\((.*)\)\$'", what):
        what = f"expected one of {one_of[1].replace('|', ', ')}"
    return f"{where or 'options'}: {what[0].lower()}{what[1:]}"


def read_toml(path: str) -> dict[str, Any]:
    """The table of a config file."""
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from None


def write(config: Config) -> str:
    """Put `config.json` into the prepared runtime folder, whole or not at all, for this user alone; its path."""
    path = Path(config.supervisor.runtime_dir) / runtime.CONFIG
    text = msgspec.json.format(msgspec.json.encode(config), indent=2)
    draft = path.with_suffix(f".{os.getpid()}.draft")
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600), "wb") as file:
        file.write(text)
    draft.replace(path)
    return str(path)


def read(path: str) -> Config:
    """The resolved configuration that `write` left."""
    return msgspec.json.decode(Path(path).read_bytes(), type=Config)
