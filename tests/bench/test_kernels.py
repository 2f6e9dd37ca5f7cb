"""The kernels' benchmark times what the registry holds, and its numbers belong together."""

import json
import time

import pytest
from click.testing import CliRunner

from cableway.bench import kernels as bench
from cableway.kernels.registry import kernels


def run(*flags: str):
    return CliRunner().invoke(bench.command, ["--device", "cpu", "--num-threads", "1", "--case-ms", "1", *flags])


def test_a_json_line_for_every_case_of_the_chosen_kernels():
    ran = run("--json", "--kernel", "index_scores", "--kernel", "silu_mul")
    assert ran.exit_code == 0, ran.output
    lines = [json.loads(line) for line in ran.output.splitlines()]
    chosen = {kernel.name: kernel for kernel in kernels() if kernel.name in ("index_scores", "silu_mul")}
    cases = [(name, case) for name in ("index_scores", "silu_mul") for case in chosen[name].bench_cases]
    assert [line["kernel"] for line in lines] == [name for name, _ in cases]
    assert len({line["case"] for line in lines}) == len(cases)
    for line, (name, case) in zip(lines, cases, strict=True):
        made = chosen[name].make(**case)
        assert line["gb_s"] == pytest.approx(chosen[name].num_bytes(made) / line["us"] / 1e3)
        assert line["copy_frac"] == pytest.approx(line["gb_s"] / line["copy_gb_s"])
        if name == "index_scores":
            assert line["tflop_s"] == pytest.approx(chosen[name].num_flops(made) / line["us"] / 1e6)
        else:
            assert line["tflop_s"] is None


def test_a_table_for_people():
    ran = run("--kernel", "silu_mul")
    assert ran.exit_code == 0, ran.output
    assert "silu_mul" in ran.output
    assert "of copy" in ran.output


def test_an_unknown_kernel_is_named():
    ran = run("--kernel", "silu")
    assert ran.exit_code == 2
    assert "'silu' is none of activation, add_at," in ran.output


def test_the_median_is_of_single_runs():
    """One slow run in three does not show."""
    sleeps = iter([0.03, 0.002, 0.002] * 20)
    us = bench._median_us_of_cpu(iter(lambda: lambda: time.sleep(next(sleeps)), None), case_s=0.001)
    assert 2_000 <= us < 20_000
