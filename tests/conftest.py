"""Eight host devices for every test, set before JAX starts, and a compilation cache to share.

The cache is the one that experiments use, in a directory of its own: tests that compile the same
step, in any worker or subprocess, compile it once. It ends with the run of pytest, unless
CNNJAX_TEST_CACHE names a directory to keep it in, as CI does for its two runs.
"""

import argparse
import importlib.metadata
import os
import tempfile
import zlib

flags = os.environ.get("XLA_FLAGS", "").split()
named = {flag.partition("=")[0] for flag in flags}
if "--xla_force_host_platform_device_count" not in named:
    flags += [
        "--xla_force_host_platform_device_count=8",
        # Eight devices on two busy cores may wait for each other longer than the default 40 s.
        "--xla_cpu_collective_call_terminate_timeout_seconds=600",
    ]
# Most tests compile for much longer than they run: with these flags for half the time. To test the
# programs that users run, name them with other values: --xla_backend_optimization_level=3 and
# --xla_cpu_use_fusion_emitters=true.
cheap = ["--xla_backend_optimization_level=0"]
if importlib.metadata.version("jaxlib").startswith("0.10."):
    # XLA ends the process at a flag that it no longer has.
    cheap.append("--xla_cpu_use_fusion_emitters=false")
flags += [flag for flag in cheap if flag.partition("=")[0] not in named]
os.environ["XLA_FLAGS"] = " ".join(flags)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# Workers of pytest-xdist have the environment of the process that starts them, and so its cache.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _cache = tempfile.TemporaryDirectory(prefix="cnnjax-tests-")
    os.environ["XDG_CACHE_HOME"] = os.path.abspath(
        os.environ.get("CNNJAX_TEST_CACHE") or _cache.name
    )

import jax  # noqa: E402
import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

from cnnjax.devices import backend  # noqa: E402

backend.enable_compilation_cache()
# Small programs too: a thousand of them are compiled in every module anew, after the one before
# has forgotten its own.
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

# An example may compile, so none has a deadline. CI tries the same examples each time.
settings.register_profile("cnnjax", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("cnnjax")


@pytest.fixture(scope="module", autouse=True)
def forget_compiled_programs():
    """Programs of one test module are no use to the next, and together they take gigabytes."""
    yield
    jax.clear_caches()


def pytest_addoption(parser):
    parser.addoption(
        "--share",
        type=_share,
        metavar="NUMBER/COUNT",
        help="of each test's slow cases take every COUNT-th, from the NUMBER-th on (modulo COUNT), "
        "and so of a file's slow tests that have no cases",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """An exhaustive case of a slow test is exhaustive alone: `-m slow` leaves it out.

    So it counts in no share of the slow ones.
    """
    for item in items:
        if item.get_closest_marker("exhaustive"):
            item.own_markers = [mark for mark in item.own_markers if mark.name != "slow"]
    if config.getoption("--share"):
        left_out = _but_a_share(items, *config.getoption("--share"))
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def _share(text):
    """Returns the number and the count of `NUMBER/COUNT`."""
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(count)):
        raise argparse.ArgumentTypeError(f"{text!r}: give NUMBER/COUNT, such as 1/3")
    return int(number), int(count)


def _but_a_share(items, number, count):
    """Returns the slow tests and cases but every `count`-th of those that are counted together.

    The cases of a test are, and the tests of a file that have none.
    """
    left_out, seen = set(), {}
    for item in items:
        if item.get_closest_marker("slow"):
            test = item.nodeid.partition("[")[0]
            group = test if item.nodeid != test else item.nodeid.partition("::")[0]
            # Each group begins elsewhere, or small ones would all be in the same share.
            position = seen.get(group, zlib.crc32(group.encode()))
            if (position - number) % count:
                left_out.add(item)
            seen[group] = position + 1
    return left_out
