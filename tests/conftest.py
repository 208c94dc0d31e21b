"""Eight host devices for every test, set before JAX starts, and a compilation cache to share.

The cache is the one that experiments use, in a directory of its own: tests that compile the same
step, here or in a subprocess, compile it once.
"""

import os
import tempfile

flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in flags:
    os.environ["XLA_FLAGS"] = (
        f"{flags} --xla_force_host_platform_device_count=8"
        # Eight devices on two busy cores may wait for each other longer than the default 40 s.
        " --xla_cpu_collective_call_terminate_timeout_seconds=600"
    ).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")

_cache = tempfile.TemporaryDirectory(prefix="cnnjax-tests-")
os.environ["XDG_CACHE_HOME"] = _cache.name

import jax  # noqa: E402
import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

from cnnjax.devices import backend  # noqa: E402

backend.enable_compilation_cache()

# An example may compile, so none has a deadline. CI tries the same examples each time.
settings.register_profile("cnnjax", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("cnnjax")


@pytest.fixture(scope="module", autouse=True)
def forget_compiled_programs():
    """Programs of one test module are no use to the next, and together they take gigabytes."""
    yield
    jax.clear_caches()
