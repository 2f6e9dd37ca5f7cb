"""The benchmark of what processes and HTTP add to a step: three real ways to a token, and the sums."""

import json
from pathlib import Path

from click.testing import CliRunner

from cableway.bench.overhead import command, costs
from tests import checkpoints


def test_costs_are_of_the_better_moments():
    rounds = [
        {"step": 10.0, "offline": 10.5, "http": 12.0},
        {"step": 20.0, "offline": 20.0, "http": 22.0},
        {"step": 10.0, "offline": 10.2, "http": 15.0},
        {"step": 10.0, "offline": 10.2, "http": 12.0},
        {"step": 30.0, "offline": 10.8, "http": 40.0},
    ]
    assert costs(rounds) == {
        "step": {"ms": [10.0, 10.0, 20.0], "cost_percent": 0.0},
        "offline": {"ms": [10.2, 10.5, 10.8], "cost_percent": 2.0},
        "http": {"ms": [12.0, 15.0, 22.0], "cost_percent": 20.0},
    }


def test_the_command(tmp_path: Path):
    model = str(checkpoints.tiny(tmp_path / "model", "llama", tokenizer=True))
    arguments = ("--model", model, "--tokens", "8", "--rounds", "2", "--max-model-len", "128", "--num-threads", "1")
    ran = CliRunner().invoke(command, [*arguments, "--json"])
    assert ran.exit_code == 0, ran.output
    figures = json.loads(ran.stdout.splitlines()[-1])
    assert set(figures) == {"step", "offline", "http"}
    assert all(figure["ms"][0] > 0 for figure in figures.values())
