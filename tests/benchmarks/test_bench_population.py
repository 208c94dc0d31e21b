"""The ways to compute a population side by side, in its small form."""

import json
import sys
from pathlib import Path

import pytest

from cnnjax.errors import UserError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import population  # noqa: E402

sys.path.remove(str(BENCHMARKS))


@pytest.mark.exhaustive
def test_every_way_is_compiled_and_takes_its_turn(tmp_path, capsys):
    path = tmp_path / "ways.json"
    population.main(["--smoke", "--ways", "turn", "processes", "runs", "--json", str(path)])
    found = json.loads(path.read_text())
    assert list(found) == ["turn", "processes", "runs"]
    assert all(len(way["ms"]) == 1 and way["ms"][0] > 0 for way in found.values())
    assert "| turn | " in capsys.readouterr().out


def test_ratios_are_medians_over_rounds_to_the_first_way(capsys):
    class Options:
        ways = ("turn", "vmap")

    found = {
        "turn": {"compile_secs": 1.0, "ms": [1.0, 2.0, 4.0]},
        "vmap": {"compile_secs": 2.0, "ms": [3.0, 4.0, 4.0]},
    }
    last = population.table(found, Options).splitlines()[-1]
    assert last == "| vmap | 4.000, 3.000 | 2.00 | 2.0 |"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ways", "turns"], "unknown way 'turns': did you mean turn"),
        (["--rounds", "0"], "--rounds 0: give at least 1"),
    ],
)
def test_flags_of_no_use_are_refused(flags, message):
    with pytest.raises(UserError, match=message):
        population.main(flags)
