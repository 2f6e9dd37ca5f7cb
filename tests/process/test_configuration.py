"""What the user says and what becomes of it: `Options`, `resolve`, and the command line made of them."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from click.testing import CliRunner

import cableway
from cableway.frontend import cli
from cableway.ipc import config as configuration
from cableway.ipc import machine, resolve
from cableway.ipc.config import ConfigError, Options
from cableway.ipc.modelfiles import ModelError


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"prot": 8000}, "prot: there is no such option"),
        ({"port": "8000"}, "port: expected int, got str"),
        ({"port": 65536}, "port: expected int <= 65535"),
        ({"max_num_seqs": 0}, "max_num_seqs: expected int >= 1"),
        ({"dtype": "int8"}, "dtype: expected one of auto, float32, float16, bfloat16"),
        ({"kv_cache_dtype": "int4"}, "kv_cache_dtype: expected one of auto, fp8, fp8_e4m3, fp8_e5m2, int8"),
        ({"api_key": ["a", 1]}, "api_key[1]: expected str, got int"),
        ({"prefix_cache": 1}, "prefix_cache: expected bool, got int"),
    ],
)
def test_a_wrong_option_is_named(values: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configuration.options(values)
    assert str(caught.value) == complaint


def model(folder: Path, **config: Any) -> str:
    """A model folder that describes itself, without weights."""
    described = {"architectures": ["LlamaForCausalLM"], "vocab_size": 100, "max_position_embeddings": 2048} | config
    (folder / "config.json").write_text(json.dumps(described))
    return str(folder)


def resolved(folder: Path, described: dict[str, Any] | None = None, **values: Any) -> configuration.Config:
    path = model(folder, **(described or {}))
    return resolve.resolve(Options(**{"model": path, "load_format": "dummy", "device": "cpu"} | values))


def test_the_model_gives_length_vocabulary_and_name(tmp_path: Path) -> None:
    config = resolved(tmp_path)
    assert config.frontend.max_model_len == config.core.max_model_len == config.worker.max_model_len == 2048
    assert config.frontend.vocab_size == 100
    assert config.frontend.engines == {tmp_path.name: "0"}
    assert any(note.startswith("max_model_len = 2048") for note in config.notes)


@pytest.mark.parametrize(
    ("said", "resolved_to"), [("auto", "float16"), ("fp8", "fp8_e4m3"), ("fp8_e5m2", "fp8_e5m2"), ("int8", "int8")]
)
def test_numbers_of_the_kv_cache(tmp_path: Path, said: str, resolved_to: str) -> None:
    assert resolved(tmp_path, dtype="float16", kv_cache_dtype=said).worker.kv_cache_dtype == resolved_to


@pytest.fixture
def cuda_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever torch is installed here."""
    monkeypatch.setattr(machine, "torch_is_cpu_build", lambda: False)


def test_a_torch_that_cannot_use_a_gpu_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "torch_is_cpu_build", lambda: True)
    with pytest.raises(ConfigError, match="device: the installed torch is a CPU build"):
        resolved(tmp_path, device="cuda")
    assert resolved(tmp_path, device="auto").worker.device == "cpu"


@pytest.mark.parametrize("key", ["", " ", "two words", "line\n"])
def test_a_key_that_none_can_send_or_everybody(tmp_path: Path, key: str) -> None:
    with pytest.raises(ConfigError, match="api_key"):
        resolved(tmp_path, api_key=["good", key])


@pytest.mark.parametrize(("is_watched", "num_tokens"), [(True, 8192), (False, 16384)])
def test_steps_are_longer_where_nobody_watches(
    tmp_path: Path, cuda_torch: None, is_watched: bool, num_tokens: int
) -> None:
    tiny = resolved(tmp_path)
    asked = Options(model=tiny.worker.model, load_format="dummy", device="cuda")
    assert resolve.resolve(asked, is_watched=is_watched).core.max_num_batched_tokens == num_tokens


@pytest.mark.parametrize(("said", "resolved_to"), [("auto", "float32"), ("bfloat16", "bfloat16")])
def test_numbers_of_states(tmp_path: Path, said: str, resolved_to: str) -> None:
    assert resolved(tmp_path, dtype="bfloat16", state_dtype=said).worker.state_dtype == resolved_to


@pytest.mark.parametrize(
    ("values", "seconds"),
    [({}, 0.03), ({"stream_interval_s": 0}, 0), ({"stream_interval_s": 1.5}, 1.5), ({"device": "cuda"}, 0)],
)
def test_tokens_come_together_where_they_are_made_on_a_cpu(
    tmp_path: Path, cuda_torch: None, values: dict[str, Any], seconds: float
) -> None:
    config = resolved(tmp_path, **values)
    assert config.core.stream_interval_s == config.worker.stream_interval_s == seconds


def test_served_names_replace_the_models_own(tmp_path: Path) -> None:
    config = resolved(tmp_path, served_model_name=["a", "b"])
    assert list(config.frontend.engines) == ["a", "b"]


def test_max_model_len_may_be_less_but_not_more_than_the_models(tmp_path: Path) -> None:
    assert resolved(tmp_path, max_model_len=100).core.max_model_len == 100
    with pytest.raises(ConfigError, match="max_model_len: 4096 is more than the model's own 2048"):
        resolved(tmp_path, max_model_len=4096)


@pytest.mark.parametrize(
    ("rope", "length"),
    [
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}, 8192),
        ({"type": "linear", "factor": 2.0}, 4096),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 256}, 2048),
    ],
)
def test_rope_scaling_lengthens_what_it_was_meant_to(tmp_path: Path, rope: dict[str, Any], length: int) -> None:
    assert resolved(tmp_path, {"rope_scaling": rope}).core.max_model_len == length


@pytest.mark.parametrize(
    ("stored", "has_bfloat16", "computed"),
    [
        ("bfloat16", True, "bfloat16"),
        ("bfloat16", False, "float32"),
        ("float16", True, "float32"),
        ("float32", True, "float32"),
    ],
)
def test_a_cpu_never_computes_coarser_than_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: str, has_bfloat16: bool, computed: str
) -> None:
    monkeypatch.setattr(machine, "cpu_multiplies_bfloat16", lambda: has_bfloat16)
    assert resolved(tmp_path, {"torch_dtype": stored}).worker.dtype == computed
    assert resolved(tmp_path, {"dtype": stored}).worker.dtype == computed


@pytest.mark.parametrize(
    ("kind", "computed"), [("F32", "float32"), ("F16", "float32"), ("BF16", "bfloat16"), ("Q8_0", "bfloat16")]
)
def test_nor_coarser_than_a_gguf_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, computed: str
) -> None:
    monkeypatch.setattr(machine, "cpu_multiplies_bfloat16", lambda: True)
    path = str(tmp_path / "m.gguf")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_embedding_length(32)
    writer.add_head_count(1)
    writer.add_context_length(64)
    writer.add_token_list(["a", "b"])
    quantized = gguf.GGMLQuantizationType[kind]
    matrix = gguf.quants.quantize(np.zeros((4, 32), np.float32), quantized)
    writer.add_tensor("blk.0.ffn_up.weight", matrix, raw_dtype=quantized)
    writer.add_tensor("output_norm.weight", np.zeros(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert resolve.resolve(Options(model=path, device="cpu")).worker.dtype == computed


@pytest.mark.parametrize(
    ("gpu", "cpu_build", "device", "dtype"), [(True, False, "cuda", "bfloat16"), (True, True, "cpu", "float32")]
)
def test_a_gpu_is_used_when_torch_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: bool, cpu_build: bool, device: str, dtype: str
) -> None:
    monkeypatch.setattr(machine, "has_nvidia_gpu", lambda: gpu)
    monkeypatch.setattr(machine, "torch_is_cpu_build", lambda: cpu_build)
    worker = resolved(tmp_path, {"dtype": "float32"}, device="auto").worker
    assert (worker.device, worker.dtype) == (device, dtype)


@pytest.mark.parametrize(
    ("gpu", "num_cores", "asked", "frontends"), [(False, 16, 0, 1), (True, 2, 0, 1), (True, 16, 0, 4), (True, 16, 8, 8)]
)
def test_as_many_frontends_as_a_gpu_can_keep_busy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: bool, num_cores: int, asked: int, frontends: int
) -> None:
    monkeypatch.setattr(machine, "has_nvidia_gpu", lambda: gpu)
    monkeypatch.setattr(machine, "torch_is_cpu_build", lambda: False)
    monkeypatch.setattr(machine, "num_cores", lambda: num_cores)
    assert resolved(tmp_path, device="auto", frontends=asked).supervisor.frontends == frontends


def test_a_step_must_hold_a_token_for_each_sequence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_num_batched_tokens: 8"):
        resolved(tmp_path, max_num_batched_tokens=8, max_num_seqs=16)


@pytest.mark.parametrize("described", [{"vocab_size": None}, {"max_position_embeddings": "many"}, {"vocab_size": -1}])
def test_a_hostile_description_is_refused(tmp_path: Path, described: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=next(iter(described))):
        resolved(tmp_path, described)


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    config = resolved(tmp_path, runtime_dir=str(tmp_path), api_key=["secret"])
    path = configuration.write(config)
    assert configuration.read(path) == config
    assert Path(path).stat().st_mode & 0o777 == 0o600


# ---------------------------------------------------------------------------------------------------------------------
# Command line


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Options]:
    """Options that `cableway serve` would have run with."""
    calls: list[Options] = []
    monkeypatch.setattr("cableway.ipc.server.serve", lambda options, show, reread: calls.append(options) or 0)
    return calls


def test_flags_win_over_the_file(tmp_path: Path, served: list[Options]) -> None:
    (tmp_path / "c.toml").write_text('port = 1\nmax-num-seqs = 3\nprefix_cache = true\nmodel = "m"\n')
    flags = ["--port", "2", "--no-prefix-cache", "--api-key", "a", "--api-key", "b", "--drain-timeout-s", "1.5"]
    outcome = CliRunner().invoke(cli.commands, ["serve", "--config", str(tmp_path / "c.toml"), *flags])
    assert outcome.exit_code == 0, outcome.output
    given = Options(model="m", port=2, max_num_seqs=3, prefix_cache=False, api_key=["a", "b"], drain_timeout_s=1.5)
    assert served == [given]


@pytest.mark.parametrize("command", ["serve", "chat", "bench", "bench serve"])
def test_every_command_is_asked_for_help_alike(command: str) -> None:
    short, long = (CliRunner().invoke(cli.commands, [*command.split(), option]) for option in ("-h", "--help"))
    assert short.output.startswith(f"Usage: commands {command} [OPTIONS]")
    assert "-h, --help" in short.output
    assert (short.exit_code, short.output) == (0, long.output)


def test_every_option_has_its_flag() -> None:
    text = CliRunner().invoke(cli.commands, ["serve", "--help"], terminal_width=200).output
    for name in Options.__struct_fields__:
        assert f"--{name.replace('_', '-')}" in text


@pytest.mark.parametrize(
    ("arguments", "exit_code", "complaint"),
    [
        (["--port", "x"], 2, "Error: Invalid value for '--port': 'x' is not a valid integer."),
        (["--port", "70000"], 2, "cableway: port: expected int <= 65535"),
        (["--config", "/no/such.toml"], 2, "cableway: /no/such.toml: No such file or directory"),
        (["/no/such/model"], 3, "cableway: /no/such/model: no such file or folder"),
        (["--chat-template", "/no/such.jinja"], 2, "cableway: chat_template: no file /no/such.jinja"),
    ],
)
def test_a_user_error_is_one_line_and_an_exit_code(
    arguments: list[str],
    exit_code: int,
    complaint: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.argv", ["cableway", "serve", "--port", "0", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == exit_code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[-1].startswith(complaint)
    assert "Traceback" not in captured.err


def test_version() -> None:
    assert cableway.__version__ in CliRunner().invoke(cli.commands, ["--version"]).output
