"""The table of time and memory by what is trained, in its small form."""

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import fine_tuning  # noqa: E402

sys.path.remove(str(BENCHMARKS))


@pytest.mark.slow
def test_less_is_kept_in_memory_the_less_is_trained(tmp_path, capsys):
    path = tmp_path / "steps.json"
    methods = ["full", "last:1", "head"]
    fine_tuning.main(["--smoke", "--rounds", "2", "--methods", *methods, "--json", str(path)])
    rows = json.loads(path.read_text())["rows"]
    assert [row["method"] for row in rows] == methods
    for name in ("trained_parameters", "temporary_bytes", "peak_bytes"):
        values = [row[name] for row in rows]
        assert values == sorted(values, reverse=True)
        assert values[0] > values[-1]
    assert all(len(row["ms"]) == 2 and min(row["ms"]) > 0 for row in rows)
    assert "| `head` |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workload", "resnet81"], "unknown workload 'resnet81': did you mean resnet18"),
        (["--smoke", "--methods", "haed"], "unknown fine-tuning method 'haed': did you mean head"),
        (["--rounds", "0"], "--rounds 0: give 1 or more"),
        (["--json", "nowhere/m.json"], "nowhere/m.json: there is no directory nowhere"),
    ],
)
def test_flags_of_no_use_are_refused(flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        fine_tuning.main(flags)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
