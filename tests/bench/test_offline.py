"""Results of record, and another engine's beside them."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from cableway.bench import offline
from tests import checkpoints

PEER = [
    {"engine": "vllm", "version": "0.26.0", "model": "x", "start_s": 47.5},
    {
        "engine": "vllm",
        "model": "x",
        "workload": "decode1",
        "seconds": 100.0,
        "output_tok_s": 2.56,
        "input_tok_s": 1.28,
    },
    {"engine": "vllm", "model": "x", "workload": "prefill", "seconds": 9.0, "output_tok_s": 7.0, "input_tok_s": 3.0},
]


def run(tmp_path: Path, lines: list[str], *arguments: str):
    (tmp_path / "peer.jsonl").write_text("\n".join(lines))
    model = checkpoints.tiny(tmp_path, "llama", max_position_embeddings=512)
    options = ["--model", str(model), "--load-format", "dummy", "--device", "cpu", "--repeats", "1"]
    beside = ["--beside", str(tmp_path / "peer.jsonl"), "--record", str(tmp_path / "results.jsonl")]
    return CliRunner().invoke(offline.command, [*options, *beside, *arguments], env={"COLUMNS": "200"})


def test_another_engine_of_the_same_run_stands_beside(tmp_path: Path):
    ran = run(tmp_path, [json.dumps(line) for line in PEER])
    assert ran.exit_code == 0, ran.output
    ours, theirs = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert (ours["engine"], theirs["engine"], theirs["version"]) == ("cableway", "vllm", "0.26.0")
    assert ours["run_id"] == theirs["run_id"]
    assert (theirs["seconds"], theirs["start_s"]) == (100.0, 47.5)
    assert ours["floor_s"] == theirs["floor_s"] > 0
    row = next(line for line in ran.output.splitlines() if "decode1" in line and "│" in line)
    assert f"{100 / ours['seconds']:.2f}" in row


@pytest.mark.parametrize("line", ["{", "[1]", '{"engine": "vllm"}'])
def test_what_is_not_another_engines_is_refused(tmp_path: Path, line: str):
    ran = run(tmp_path, [line, line])
    assert ran.exit_code == 2
    assert "Invalid value for --beside" in ran.output
