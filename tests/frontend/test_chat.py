"""`cableway chat` through its pipes, with real processes."""

import subprocess
import sys

import psutil

CHAT = [sys.executable, "-P", "-m", "cableway", "chat"]
QUESTION = "What is the capital of France?\n"


def talk(*arguments: str, said: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run([*CHAT, *arguments], input=said, capture_output=True, text=True, timeout=90, check=False)


def test_a_conversation_on_a_server_of_its_own() -> None:
    before = {process.pid for process in psutil.process_iter()}
    told = talk("--temperature", "0", "--max-tokens", "20", said=f"{QUESTION}/retry\n/nonsense\n/exit\nnever said\n")
    assert told.returncode == 0, told.stderr
    assert told.stdout.count("The capital of France is Paris.") == 2
    assert "/system TEXT" in told.stdout
    assert "never said" not in told.stdout
    left = [process for process in psutil.process_iter() if process.pid not in before]
    assert not [process for process in left if "cableway.workers.main" in process.cmdline()]


def test_an_error_is_one_line() -> None:
    for arguments in (("--url", "http://127.0.0.1:9"), ("no-such-model",)):
        told = talk(*arguments)
        assert told.returncode != 0
        assert told.stderr.startswith("cableway: ")
        assert told.stderr.count("\n") == 1
