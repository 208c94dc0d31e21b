"""Every line of README and docs that trains reaches the score that it must: a user's first try.

A line is run as it stands, in an empty directory. The short ones are slow tests, the others
exhaustive ones; what cannot be run here says why.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GUIDES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

# The lowest score on the test set, by the monitored metric; of a study, of `full` with the most
# labels. Seeds differ by less than what lies between it and what was seen.
SHORT = {
    "experiments.classify --model dense_dropout --classes 3,8": 0.98,
    "experiments.classify --model mlp --classes even-odd": 0.97,
    "experiments.mnist_lenet --classes 0,1,2,3,4 --run-dir runs/low": 0.995,
    "experiments.finetune --base runs/low --classes 5,6,7,8,9 --labels-per-class 10"
    " --method lora:4": 0.75,
}
LONG = {
    "experiments.mnist_lenet": 0.99,
    "experiments.mnist_lenet --model-arguments activation=tanh pool=average": 0.985,
    "experiments.mnist_lenet --model lenet5_1998 --image-size 32 --loss lenet1998_map": 0.985,
    "experiments.mnist_lenet --profile steps=100:200": 0.99,
    "experiments.segment_digits": 0.90,
    "experiments.mnist_adversarial": 0.98,
    "experiments.mnist_ensemble": 0.99,
    "experiments.planted_fault": 0.99,
    "experiments.mnist_finetune": 0.9,
    "experiments.mnist_finetune --task digits": 0.9,
    "experiments.mnist_finetune --run-dir runs/wide --no-forgetting --model-arguments"
    ' "widths=(16,32,64)" "dense_widths=(1536,)" padding=SAME norm=batch --methods scratch full'
    ' head "lora(14, norms=True)" "adapter(10, norms=True)" --rates scratch=0.003 full=0.001'
    ' head=0.001 "lora(14, norms=True)=0.003" "adapter(10, norms=True)=0.003"': 0.95,
}
# What a line needs first.
AFTER = {
    "experiments.finetune --base runs/low --classes 5,6,7,8,9 --labels-per-class 10"
    " --method lora:4": "experiments.mnist_lenet --classes 0,1,2,3,4 --run-dir runs/low",
}
NOT_HERE = {
    "tfds:": "a dataset that is not shipped",
    "folder:": "the reader's own photos",
    "experiments.fashion": "a dataset that is not shipped",
    "experiments.cifar10": "a dataset that is not shipped",
    "experiments.imagenet": "a dataset that is not shipped",
    "RUN": "of a run of the reader's",
    "my_nets:Net": "a network of the reader's",
    "--track": "trackers, see tests/run/test_tracking.py",
    "--mesh": "several devices",
    "--coordinator": "several processes",
    "--sweep": "chooses rates, and ends with no score",
    "experiments.dcgan_mnist": "a distance, see its docstring",
    "experiments.simclr_mnist": "a distance; what counts is its probe, see its docstring",
}


def documented():
    """Returns the lines that train, of all guides: what stands behind `python -m`."""
    lines = set()
    for guide in GUIDES:
        text = re.sub(r" *\\\n *", " ", guide.read_text())
        for found in re.findall(
            r"^ {4}(?:pip \S+ \S+ \. && )?python -m (experiments\.\w+.*)$", text, re.MULTILINE
        ):
            line = re.sub(r"\s+#.*", "", found).rstrip(" &")
            if "--plan" not in line and "--smoke" not in line:
                lines.add(" ".join(line.split()))
    return lines


def test_every_documented_line_that_trains_has_its_score():
    lines = documented()
    assert len(lines) > 20
    judged = SHORT.keys() | LONG.keys()
    assert judged <= lines
    for line in lines - judged:
        assert any(reason in line for reason in NOT_HERE), f"{line} has no score to reach"


def run(line, directory):
    if line in AFTER:
        run(AFTER[line], directory)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    subprocess.run(
        [sys.executable, "-m", *shlex.split(line)], cwd=directory, env=environment, check=True
    )


def score(directory):
    """Returns the score of the run that ended last."""
    path = max(directory.glob("runs/*/summary.json"), key=lambda path: path.stat().st_mtime_ns)
    summary = json.loads(path.read_text())
    if "rows" not in summary:
        return summary[f"test_{summary.get('monitor', 'accuracy')}"]
    rows = [row for row in summary["rows"] if row["method"] == "full"]
    return max(rows, key=lambda row: row["labels"])["accuracy"]


@pytest.mark.slow
@pytest.mark.parametrize("line", SHORT)
def test_a_short_line_reaches_its_score(line, tmp_path):
    run(line, tmp_path)
    assert score(tmp_path) >= SHORT[line]


@pytest.mark.exhaustive
@pytest.mark.parametrize("line", LONG)
def test_a_long_line_reaches_its_score(line, tmp_path):
    run(line, tmp_path)
    assert score(tmp_path) >= LONG[line]
