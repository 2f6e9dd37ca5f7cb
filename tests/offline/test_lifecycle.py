"""Begin and end of an offline engine: from a plain script, by any way out, and through the death of a process."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cableway import LLM, SamplingParams
from cableway.frontend.llm import EngineError, RequestOutput
from cableway.ipc.config import ConfigError
from cableway.ipc.modelfiles import ModelError
from tests import checkpoints
from tests.server import wait_for

GREEDY = SamplingParams(temperature=0, max_tokens=120, ignore_eos=True)


def processes(marks: str) -> dict[str, int]:
    """Core and worker of the engine whose command line holds `marks`, its runtime folder."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes().decode()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if marks in command:
            found |= {role: int(entry.name) for role in ("enginecore", "workers") if f"cableway.{role}.main" in command}
    return found


def gone(pids: list[int]) -> bool | None:
    """True when none of these processes runs any more, None otherwise."""
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state != "Z":
            return None
    return True


@pytest.fixture(scope="module")
def own(tiny_folder: Path) -> Iterator[LLM]:
    with LLM(tiny_folder, dtype="float32", num_threads=1, max_num_seqs=4, batch_invariant=True) as llm:
        yield llm


@pytest.mark.parametrize("way", ["with", "garbage"])
def test_its_end_is_the_end_of_its_processes(tiny_folder: Path, way: str) -> None:
    llm = LLM(tiny_folder, dtype="float32", num_threads=1)
    folder = Path(llm.config.core.runtime_dir)
    pids = list(processes(str(folder)).values())
    assert len(pids) == 2
    if way == "with":
        with llm:
            pass
        llm.close()
        with pytest.raises(ValueError, match="closed"):
            llm.generate([5], use_tqdm=False)
        with pytest.raises(ValueError, match="closed"):
            llm.sleep()
    else:
        del llm
        gc.collect()
    assert gone(pids)
    assert not folder.exists()


@pytest.mark.parametrize("victims", [["workers"], ["enginecore"], ["enginecore", "workers"]])
def test_a_death_is_a_pause(own: LLM, victims: list[str]) -> None:
    prompts = [[i, i + 1, i + 2] for i in range(12)]
    undisturbed = own.generate(prompts, GREEDY, use_tqdm=False)
    pids = processes(own.config.core.runtime_dir)
    results: list[RequestOutput] = []
    thread = threading.Thread(target=lambda: results.extend(own.generate(prompts, GREEDY, use_tqdm=False)))
    thread.start()
    time.sleep(0.1)
    for victim in victims:
        os.kill(pids[victim], signal.SIGKILL)
    thread.join(60)
    now = processes(own.config.core.runtime_dir)
    assert {role for role in pids if now[role] != pids[role]} == set(victims)
    assert [r.outputs[0].token_ids for r in results] == [r.outputs[0].token_ids for r in undisturbed]
    assert [r.outputs[0].text for r in results] == [r.outputs[0].text for r in undisturbed]


def test_an_interrupt_stops_what_runs(own: LLM, request: pytest.FixtureRequest) -> None:
    """Ctrl-C ends `generate`, and the engine is free for the next call."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, handler))
    long = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        own.generate([[i % 200] for i in range(2000)], long, use_tqdm=False)
    timer.join()
    started_s = time.perf_counter()
    own.generate([5], SamplingParams(max_tokens=4, ignore_eos=True), use_tqdm=False)
    assert time.perf_counter() - started_s < 5


SCRIPT = """
import sys
from cableway import LLM, SamplingParams
llm = LLM(sys.argv[1], load_format="dummy", dtype="float32", num_threads=1, skip_tokenizer_init=True)
print(len(llm.generate([[1, 2, 3]], SamplingParams(max_tokens=5, ignore_eos=True))[0].outputs[0].token_ids), flush=True)
if len(sys.argv) > 2:
    print(llm.config.core.runtime_dir, flush=True)
    sys.stdin.read()
"""


def test_a_plain_script_needs_no_main_guard(tiny_folder: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run([sys.executable, script, tiny_folder], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("5\n", 0), done.stderr
    assert "Traceback" not in done.stderr
    assert '"level"' not in done.stderr  # nothing is logged when all is well
    assert "leaked" not in done.stderr  # as what was made in C++ says at the end when it is still held


def test_a_killed_script_leaves_nothing(tiny_folder: Path, tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, tiny_folder, "stay"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as script:
        assert script.stdout is not None
        assert script.stdout.readline() == "5\n"
        pids = list(processes(script.stdout.readline().strip()).values())
        assert len(pids) == 2
        script.kill()
    assert wait_for(lambda: gone(pids), 10, lambda: "orphans")


def test_what_cannot_start_is_said_once(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file"):
        LLM(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="no such option"):
        LLM(tiny_folder, max_model_length=5)
    with pytest.raises(ConfigError, match="dtype: expected one of"):
        LLM(tiny_folder, dtype="float12")
    with pytest.raises(ConfigError, match="max_model_len"):
        LLM(tiny_folder, max_model_len=100_000)


def test_broken_weights_are_one_exception(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = checkpoints.tiny(tmp_path / "broken", "llama", tokenizer=True)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(EngineError) as caught:
        LLM(folder, num_threads=1)
    assert "model.safetensors" in str(caught.value)
    assert "Traceback" not in str(caught.value) + capfd.readouterr().err


def test_token_ids_alone(tiny_folder: Path) -> None:
    (tiny_folder / "tokenizer.json").rename(tiny_folder / "hidden.json")
    try:
        with LLM(tiny_folder, num_threads=1, skip_tokenizer_init=True, max_model_len=None) as llm:
            params = SamplingParams(temperature=0, max_tokens=6, logprobs=1, ignore_eos=True)
            (output,) = llm.generate([1, 2, 3], params, use_tqdm=False)[0].outputs
            assert (output.text, len(output.token_ids)) == ("", 6)
            assert output.logprobs is not None
            assert next(iter(output.logprobs[0].values())).decoded_token is None
            for wrong in ("text", {"prompt": "text"}):
                with pytest.raises(ValueError, match="no tokenizer"):
                    llm.generate(wrong, params, use_tqdm=False)
            with pytest.raises(ValueError, match="no tokenizer"):
                llm.generate([1], SamplingParams(stop="x"), use_tqdm=False)
            with pytest.raises(ValueError, match="no tokenizer"):
                llm.chat([{"role": "user", "content": "x"}], params)
    finally:
        (tiny_folder / "hidden.json").rename(tiny_folder / "tokenizer.json")


def test_it_sleeps_and_wakes(own: LLM) -> None:
    (before,) = own.generate("The sea", GREEDY, use_tqdm=False)
    own.sleep()
    with pytest.raises(ValueError, match="sleeps"):
        own.generate("The sea", GREEDY)
    with pytest.raises(ValueError, match="level"):
        own.sleep(level=2)
    own.wake_up()
    (after,) = own.generate("The sea", GREEDY, use_tqdm=False)
    assert after.outputs[0].token_ids == before.outputs[0].token_ids
