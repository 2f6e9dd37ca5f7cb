"""The engine under a synchronous program: no `__main__` guard, no orphans, and failures that say why."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cableway.ipc import control, modelfiles, runtime
from tests.server import wait_for

SCRIPT = """
import sys
from cableway.ipc.config import Options
from cableway.ipc.errors import UserError
from cableway.ipc.server import EngineProcesses
try:
    engine = EngineProcesses(Options(model=sys.argv[1], dtype="float32", max_model_len=256, num_threads=1))
except UserError as error:
    print(f"{error.exit_code} {error}")
    sys.exit()
print(engine.config.core.runtime_dir, flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def model(request: pytest.FixtureRequest, tmp_path: Path, tiny_folder: Path) -> str:
    if getattr(request, "param", "whole") == "whole":
        return str(tiny_folder)
    content = Path(modelfiles.locate("smollm2-135m").path).read_bytes()
    path = tmp_path / "half.gguf"
    path.write_bytes(content[: len(content) // 2])
    return str(path)


@pytest.fixture
def program(model: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", SCRIPT, model]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


def first_line(program: subprocess.Popen[str]) -> str:
    assert program.stdout is not None
    return program.stdout.readline().rstrip("\n")


@pytest.mark.parametrize("end", ["leaves", "is killed"])
def test_processes_end_with_the_program(program: subprocess.Popen[str], end: str) -> None:
    folder = Path(first_line(program))
    answer = control.ask(folder)
    assert answer is not None
    assert [(process.role, process.state) for process in answer.processes[1:]] == [
        ("enginecore", "ready"),
        ("worker", "ready"),
    ]
    children = [psutil.Process(process.pid) for process in answer.processes[1:]]
    if end == "leaves":
        program.communicate("\n", timeout=20)
        assert program.returncode == 0
        assert not folder.exists()
    else:
        program.send_signal(signal.SIGKILL)
    gone, _ = psutil.wait_procs(children, timeout=5)
    assert len(gone) == 2


@pytest.mark.parametrize("model", ["half"], indirect=True)
def test_a_broken_model_is_said(program: subprocess.Popen[str]) -> None:
    line = first_line(program)
    assert line.startswith("3 worker 0: ")
    assert "half.gguf: truncated" in line
    assert program.wait(20) == 0
    wait_for(lambda: not list(runtime.base_folder().glob(f"llm-{program.pid}-*")) or None, 5, lambda: "folder left")
