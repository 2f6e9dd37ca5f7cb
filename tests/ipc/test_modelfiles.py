"""Models are found under every name they go by, and everything else is one clear ModelError."""

import hashlib
import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from cableway.ipc.modelfiles import ModelError, locate

CONFIG = {"architectures": ["LlamaForCausalLM"], "hidden_size": 8, "eos_token_id": 2}


def folder(path, files):
    path.mkdir(exist_ok=True)
    for name, content in files.items():
        (path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_alias_from_an_installed_wheel():
    files = locate("smollm2-135m")
    assert files.kind == "gguf"
    assert files.name == "smollm2-135m"
    assert files.config["architectures"] == ["LlamaForCausalLM"]
    assert files.config["tie_word_embeddings"] is True
    assert files.config["vocab_size"] == 49152
    assert files.generation_config["eos_token_id"] == [2]


def test_folder_with_shards(tmp_path):
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"}}
    shards = {"model-1.safetensors": "", "model-2.safetensors": "", "extra.safetensors": ""}
    path = folder(tmp_path / "m", {"config.json": CONFIG, "model.safetensors.index.json": index, **shards})
    files = locate(path)
    assert [weight.rsplit("/", 1)[1] for weight in files.weights] == ["model-1.safetensors", "model-2.safetensors"]
    assert files.generation_config == {"eos_token_id": 2}


def test_safetensors_come_before_bin(tmp_path):
    path = folder(tmp_path / "m", {"config.json": CONFIG, "pytorch_model.bin": "", "model.safetensors": ""})
    assert locate(path).weights == [path + "/model.safetensors"]


def test_dummy_needs_no_weights(tmp_path):
    path = folder(tmp_path / "m", {"config.json": CONFIG})
    assert locate(path, load_format="dummy").weights == []
    with pytest.raises(ModelError, match="dummy"):
        locate(path)


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"config.json": "{"},
        {"config.json": "[]"},
        {"config.json": "[" * 100_000},
        {"config.json": {"hidden_size": 8}},
        {"config.json": {"architectures": "LlamaForCausalLM"}},
        {"config.json": CONFIG},
        {"config.json": CONFIG, "model.safetensors.index.json": {"weight_map": {"a": "../../etc/passwd"}}},
        {"config.json": CONFIG, "model.safetensors.index.json": {"weight_map": {"a": "gone.safetensors"}}},
        {"config.json": CONFIG, "model.safetensors.index.json": {"weight_map": ["a"]}},
        {"config.json": CONFIG, "model.safetensors": "", "generation_config.json": "nonsense"},
    ],
)
def test_broken_folders(tmp_path, files):
    with pytest.raises(ModelError):
        locate(folder(tmp_path / "m", files))


def test_names_that_mean_nothing(tmp_path):
    (tmp_path / "file.txt").write_text("x")
    for name in ("no-such-model", "/no/such/folder", str(tmp_path / "file.txt"), "", "a/b/c"):
        with pytest.raises(ModelError):
            locate(name)


# ---------------------------------------------------------------------------------------------------------------------
# The hub: a local server that speaks the part of its protocol which a download needs

HUB_FILES = {
    "config.json": json.dumps(CONFIG).encode(),
    "model.safetensors": b"weights",
    "README.md": b"not wanted",
}


class Hub(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body=True):
        if self.path.startswith("/api/models/org/tiny"):
            siblings = [{"rfilename": name} for name in HUB_FILES]
            content = json.dumps({"id": "org/tiny", "sha": "a" * 40, "siblings": siblings}).encode()
            if "/tree/" in self.path:
                entries = [
                    {"type": "file", "path": name, "size": len(data), "oid": "b" * 40}
                    for name, data in HUB_FILES.items()
                ]
                content = json.dumps(entries).encode()
        elif "/resolve/" in self.path and (name := self.path.rsplit("/", 1)[1]) in HUB_FILES:
            content = HUB_FILES[name]
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Type", "application/json")
        self.send_header("X-Repo-Commit", "a" * 40)
        self.send_header("ETag", f'"{hashlib.md5(content).hexdigest()}"')
        self.end_headers()
        if body:
            self.wfile.write(content)


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def locate_in_child(model, endpoint, home):
    """huggingface_hub reads its address once, at import: a child process gets the local one."""
    code = (
        "import sys; from cableway.ipc.modelfiles import *\n"
        "try: print(locate(sys.argv[1]).path)\n"
        "except ModelError as error: print('ModelError', error)"
    )
    environment = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "PATH": "/usr/bin", "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, model], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout.strip().splitlines()


def test_download_from_a_hub_then_offline_from_its_cache(hub, tmp_path):
    (path,) = locate_in_child("org/tiny", hub, tmp_path)
    assert sorted(p.name for p in Path(path).iterdir()) == ["config.json", "model.safetensors"]
    assert locate_in_child("org/tiny", "http://127.0.0.1:9", tmp_path) == [path]


def test_hub_errors_are_one_line(hub, tmp_path):
    (line,) = locate_in_child("org/unknown", hub, tmp_path)
    assert line.startswith("ModelError org/unknown")
    (line,) = locate_in_child("org/tiny", "http://127.0.0.1:9", tmp_path / "empty")
    assert line.startswith("ModelError org/tiny")
