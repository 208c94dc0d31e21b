"""The bits of a run, held against those since its numbers are arguments of its program.

A digest is that of one program on one kind of processor with one version of the compiler; elsewhere
the test has nothing to compare with.
"""

import hashlib
import os
import subprocess
import sys

import jaxlib
import numpy as np
import pytest

from cnnjax import checkpoint
from cnnjax.devices import host
from cnnjax.trees import named_leaves

# `python -m experiments.mnist_lenet --epochs 1 --seed SEED --devices DEVICES`: parameters and their
# moving average, by (seed, devices).
DIGESTS = {
    (0, 1): "03cfa96d1a4437cc46f61c53e4e2f241",
    (0, 2): "75a37e58000dc6975e79f27d261709cb",
    (1, 1): "7f0323ac3f3b4603d610b6faf1f12109",
    (1, 2): "dd32787b9acf85dd0b751d8587c16834",
}
# Digest of the processor's features (an AMD EPYC with AVX2), version of jaxlib, cores.
MADE_WITH = ("6891bf0b03faa8e2", "0.10.2", 2)


def digest(run):
    items = checkpoint.restore_items(run / "checkpoints", ("params", "ema"))
    found = hashlib.sha256()
    for group in ("params", "ema"):
        for name, leaf in sorted(named_leaves(items[group]).items()):
            found.update(f"{group}/{name}".encode() + np.ascontiguousarray(leaf).tobytes())
    return found.hexdigest()[:32]


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "devices"), DIGESTS)
def test_mnist_lenet_ends_with_the_same_bits(tmp_path, seed, devices):
    features = hashlib.sha256(host.processor_features().encode()).hexdigest()[:16]
    if (features, jaxlib.__version__, len(os.sched_getaffinity(0))) != MADE_WITH:
        pytest.skip(f"the digests were made with {MADE_WITH}")
    command = [sys.executable, "-m", "experiments.mnist_lenet", "--epochs", "1"]
    command += ["--seed", str(seed), "--devices", str(devices), "--run-dir", str(tmp_path / "run")]
    # As a user starts it, not with the cheap programs of tests.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    subprocess.run(command, check=True, env=environment, capture_output=True)
    assert digest(tmp_path / "run") == DIGESTS[seed, devices]
