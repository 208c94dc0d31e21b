"""The benchmarks of input and scaling: their tables and figures; slow: tiny real runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import input_peers  # noqa: E402
import scaling  # noqa: E402

sys.path.remove(str(BENCHMARKS))


def found(x):
    """What a worker answers where everything but speed is proportional to the images."""
    return {
        "images_per_sec": 1000.0,
        "data_secs": 2.0 * x,
        "compile_secs": 3.0,
        "start_secs": 3.0 + 2.0 * x,
        "eval_secs": 0.5 * x,
        "data_mib": 1.0 * x,
        "peak_mib": 4.0 * x,
    }


@pytest.mark.slow
def test_smoke_runs_two_points_of_each_series_and_writes_what_is_asked_for(
    monkeypatch, tmp_path, capsys
):
    asked = []

    def run(settings, options):
        asked.append(settings)
        return found(len(asked)) if len(asked) != 2 else {"failed": "exit status 1"}

    monkeypatch.setattr(scaling, "run", run)
    report, picture = tmp_path / "scaling.json", tmp_path / "scaling.png"
    scaling.main(["--smoke", "--json", str(report), "--figure", str(picture)])
    series = scaling.all_series(smoke=True)
    assert len(asked) == 2 * len(series) == 10
    assert max(settings["num_images"] for settings in asked) <= 600
    points = json.loads(report.read_text())["points"]
    assert [point["series"] for point in points] == [name for name in series for _ in range(2)]
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "| lenet5 | 16 | 1,000 | 16.00 |" in printed
    assert "exit status 1" in printed


def test_exponents_say_how_a_value_grows():
    points = [scaling.Measured("images", "lenet5", x, found(x)) for x in (10, 1000)]
    assert scaling.exponent(points, lambda each: each["data_secs"]) == pytest.approx(1.0)
    assert scaling.exponent(points, lambda each: each["compile_secs"]) == pytest.approx(0.0)
    table = scaling.table(scaling.all_series(smoke=False)["images"], [])
    assert table.startswith("| network | images | data, s |")


def test_numbers_on_axes_are_short():
    assert [scaling.short(x) for x in (0.5, 64, 30_000, 1e6)] == ["0.5", "64", "30k", "1M"]


def test_ratios_of_input_pipelines_are_those_of_the_rounds():
    rows = [
        input_peers.Row("cnnjax", [100.0, 300.0], [50.0, 50.0], [10.0, 11.0]),
        input_peers.Row("torch-pil", [50.0, 100.0], [25.0, 25.0], [20.0, 20.0]),
        input_peers.Row("tf.data", [80.0, 80.0], [40.0, 40.0], [5.0, 5.0]),
        input_peers.Row("grain", trouble="missing: needs the package grain"),
    ]
    lines = input_peers.rate_table(rows, cores=2).splitlines()
    assert lines[2] == "| cnnjax | yes | 100 |  | 50 |  | 10 | 11 |"
    assert "| 38 | 2.50 | 25 | 2.00 | 20 | 20 |" in lines[3]
    # Without `cnnjax-plain` there is nothing to compare this one with.
    assert "| 40 |  | 40 |  | 5 | 5 |" in lines[4]
    assert "missing: needs the package grain" in lines[5]


def test_memory_and_time_of_a_process_group_are_read_from_the_system():
    group = os.getpgid(0)
    assert input_peers.group_mib(group) > 10
    assert input_peers.group_cpu_secs(group) > 0


@pytest.mark.exhaustive
def test_tiny_real_runs(tmp_path):
    commands = [
        ["input_peers.py", "--smoke", "--contenders", "cnnjax", "--model", ""],
        ["scaling.py", "--smoke", "--series", "images", "processes"],
    ]
    for script, *flags in commands:
        command = [sys.executable, str(BENCHMARKS / script), *flags]
        command += ["--json", str(tmp_path / "found.json")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        assert "failed" not in done.stdout and "missing" not in done.stdout
