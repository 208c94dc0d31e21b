"""The table of memory and time, in its small form."""

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import step_memory  # noqa: E402

sys.path.remove(str(BENCHMARKS))


@pytest.mark.slow
def test_the_small_table_has_every_variant_and_its_order_of_memory(tmp_path, capsys):
    path = tmp_path / "memory.json"
    step_memory.main(["--smoke", "--rounds", "2", "--json", str(path)])
    rows = {row["variant"]: row for row in json.loads(path.read_text())["rows"]}
    assert list(rows) == list(step_memory.VARIANTS)
    printed = capsys.readouterr().out
    assert "### smoke, batch 8" in printed
    assert printed.count("\n| ") == 1 + len(rows)
    plain = rows["plain"]
    for name in ("accumulate 4", "remat"):
        assert rows[name]["temporary_bytes"] < plain["temporary_bytes"]
    # Without donation the new state lies beside the old one.
    assert rows["no donation"]["peak_bytes"] > plain["peak_bytes"]
    for name in ("no donation", "remat", "all im2col", "all lax"):
        assert rows[name]["first_loss"] == pytest.approx(plain["first_loss"], rel=1e-5)
    assert rows["bfloat16"]["first_loss"] == pytest.approx(plain["first_loss"], rel=0.05)
    assert all(len(row["ms"]) == 2 and min(row["ms"]) > 0 for row in rows.values())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workloads", "resnet81"], "unknown workload 'resnet81': did you mean resnet18"),
        (["--variants", "remmat"], "unknown variant 'remmat': did you mean remat"),
        (["--rounds", "0"], "--rounds 0: give 1 or more"),
        (["--json", "nowhere/m.json"], "nowhere/m.json: there is no directory nowhere"),
    ],
)
def test_flags_of_no_use_are_refused(flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        step_memory.main(flags)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
