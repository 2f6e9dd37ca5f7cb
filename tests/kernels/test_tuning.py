"""Tables of measured configurations, and measuring them: with the interpreter in place of a GPU."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cableway.bench.tune import Launches, command, sheet, tune
from cableway.ipc.errors import UserError
from cableway.kernels import gemv, tuning
from cableway.kernels.tuning import Entry, Table, Tunable, tunables
from tests.kernels import laws
from tests.kernels.test_triton import AbsentGpu

KEY, OTHER = gemv.Key(64, 100, False, 4), gemv.Key(32, 64, True, 4)
FAST, SLOW = gemv.Tuning(8, 4), gemv.Tuning(1, 1)


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A GPU by name and generation, and no tables yet."""
    played = {"name": "NVIDIA H300", "capability": 90}
    monkeypatch.setattr(tuning, "FOLDER", tmp_path / "tunings")
    monkeypatch.setattr(tuning, "device_name", lambda: played["name"])
    monkeypatch.setattr(tuning, "gpu_capability", lambda: played["capability"])
    return played


@pytest.fixture
def chooser(gpu: dict[str, Any]) -> Iterator[Tunable]:
    """That of gemv, with two candidates of which the rule is the slow one."""
    of_gemv = gemv.tuning
    made = Tunable(
        "gemv", gemv.Key, gemv.Tuning, rule=lambda key: SLOW, candidates=lambda key: (FAST, SLOW), make=of_gemv.make,
        launch=of_gemv.launch,
    )  # fmt: skip
    tuning.at_hand.cache_clear()
    yield made
    tuning._tunables["gemv"] = of_gemv
    tuning.at_hand.cache_clear()


def chosen(tunable: Tunable, key: Any) -> Any:
    """As a process that has just begun chooses."""
    tunable._chosen.clear()
    tuning.at_hand.cache_clear()
    return tunable(key)


def test_measured_on_this_gpu_then_on_one_like_it_then_the_rule(gpu: dict[str, Any], chooser: Tunable):
    assert chosen(chooser, KEY) == SLOW
    Table.of("NVIDIA H200", 90).put(chooser, Entry(KEY, gemv.Tuning(2, 2), 1.0))
    assert chosen(chooser, KEY) == gemv.Tuning(2, 2)
    assert chosen(chooser, OTHER) == SLOW
    Table.of("NVIDIA H300", 90).put(chooser, Entry(KEY, FAST, 2.0))
    assert chosen(chooser, KEY) == FAST
    gpu["capability"] = 80
    assert chosen(chooser, KEY) == SLOW


def test_a_table_is_data(gpu: dict[str, Any], chooser: Tunable):
    table = Table.of("NVIDIA H300", 90)
    table.put(chooser, Entry(KEY, SLOW, 2.0))
    table.put(chooser, Entry(OTHER, FAST, None))
    table.put(chooser, Entry(KEY, FAST, 1.238))
    assert table.path.name == "nvidia-h300.json"
    assert json.loads(table.path.read_text()) == {
        "device": "NVIDIA H300",
        "capability": 90,
        "kernels": {
            "gemv": [
                {"key": OTHER._asdict(), "tuning": FAST._asdict(), "us": None},
                {"key": KEY._asdict(), "tuning": FAST._asdict(), "us": 1.24},
            ]
        },
    }
    assert list(Table.read(table.path).entries(chooser)) == [Entry(OTHER, FAST, None), Entry(KEY, FAST, 1.24)]


@pytest.mark.skipif(laws.INTERPRETED, reason="candidates are the GPU's; nothing is run here")
def test_shipped_tables_can_be_read(monkeypatch: pytest.MonkeyPatch):
    triton = pytest.importorskip("triton")
    paths = sorted(tuning.FOLDER.glob("*.json"))
    assert paths
    for path in paths:
        table = Table.read(path)
        assert Table.of(table.device, table.capability).path == path
        monkeypatch.setattr(triton.runtime.driver, "_active", AbsentGpu(table.capability))
        for tunable in tunables().values():
            assert all(entry.tuning in tunable.candidates(entry.key) for entry in table.entries(tunable))


_EXPERTS, _LINEAR, _GROUPED, _DECODE, _PREFILL = (
    tunables()[name].key for name in ("expert_gemv", "linear", "grouped_linear", "paged_decode", "paged_prefill")
)
EXAMPLES = {
    "gemv": [gemv.Key(4096, 1024, False, 2), gemv.Key(3072, 1024, True, 2), gemv.Key(100, 3000, False, 4)],
    "linear": [_LINEAR(4096, 1024, False, 2), _LINEAR(64, 3000, True, 4)],
    "expert_gemv": [_EXPERTS(3, 2048, 768, gated, not gated, 2) for gated in (False, True)],
    "grouped_linear": [_GROUPED(8, 96, 64, True, 2, rows) for rows in (16, 64, 128)],
    "paged_decode": [_DECODE(4, 2, 64, 2, size, most) for size in (1, 2) for most in (16, 96)],
    "paged_prefill": [_PREFILL(4, 2, 64, 2, size) for size in (1, 2)],
}


def test_every_tunable_kernel_has_examples_here():
    assert EXAMPLES.keys() == tunables().keys()


@pytest.mark.skipif(laws.DEVICES == ["cuda"], reason="there is a GPU")
def test_there_is_nothing_to_tune_without_a_gpu():
    with pytest.raises(UserError, match="there is none here"):
        command.main(["smollm2-135m"], standalone_mode=False)


@pytest.mark.skipif(laws.INTERPRETED, reason="nothing is run here")
@pytest.mark.parametrize(("name", "key"), [(name, key) for name, keys in EXAMPLES.items() for key in keys])
def test_a_call_made_for_a_key_asks_for_that_key(name: str, key: Any, monkeypatch: pytest.MonkeyPatch):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton.runtime.driver, "_active", AbsentGpu(100))
    monkeypatch.setattr(triton.runtime.JITFunction, "run", lambda *_, **__: None)
    tunable = tunables()[name]
    monkeypatch.setattr(tunable, "_chosen", {})
    made = tunable.make(key, "cpu")
    tunable.launch(*made.args, **made.kwargs)
    assert tunable.asked == [key]
    assert len(tunable.candidates(key)) > 3
    tunable.launch(*made.args, **made.kwargs, tuned=tunable.candidates(key)[-1])


@pytest.mark.skipif(not laws.INTERPRETED, reason="test_triton.py runs it in the interpreter")
def test_the_fastest_is_kept_and_a_run_goes_on_where_it_was(gpu: dict[str, Any], chooser: Tunable):
    launched = []

    def us_on_cpu(launches: Launches) -> float:
        began_ns = time.perf_counter_ns()
        for launch in launches:
            launch()
        launched.append(len(launches))
        return (time.perf_counter_ns() - began_ns) / 1e3

    def measure(**options: Any) -> list[Any]:
        console = Console(quiet=True)
        table = Table.of("NVIDIA H300", 90)
        return list(tune(table, [chooser], us_on_cpu, console, device="cpu", most_launches=2, **options))

    assert chosen(chooser, KEY) == SLOW
    (finding,) = measure()
    assert (finding.kernel, finding.entry.key, finding.entry.tuning, finding.rule) == ("gemv", KEY, FAST, SLOW)
    assert finding.entry.us < finding.rule_us
    assert launched == [2, 2]
    assert chosen(chooser, KEY) == FAST
    assert chooser(OTHER) == SLOW
    (other,) = measure()
    assert other.entry.key == OTHER
    assert measure() == []
    assert [found.entry.key for found in measure(again=True)] == [OTHER, KEY]
    assert sheet([finding]).row_count == 1
