"""Known faults of installations: rules from facts (`facts.collect`) to findings.

Each rule is a function of the facts alone, so that each can be tried on facts of a machine that is
not at hand.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

Facts = dict[str, Any]
# A Python process, its libraries and a checkpoint being written have some hundred files open; a
# streamed folder, with a thread per core, more.
LEAST_DESCRIPTORS = 1024
LEAST_FREE_BYTES, LEAST_MEMORY_BYTES = 2**30, 2**30
# The first driver that runs programs of this CUDA without a compatibility package:
# https://docs.nvidia.com/deploy/cuda-compatibility, "minor version compatibility".
LEAST_DRIVER = {"12": 525, "13": 580}
LEARNS = 0.9


class Finding(NamedTuple):
    """A fault and its mend, a line each.

    `level` is "error" for what keeps a run from working or from the device that is there, and
    "warning" for what makes it slow, or will stop it later.
    """

    level: str
    text: str
    mend: str


def find(facts: Facts) -> list[Finding]:
    """Returns what is wrong, errors first; nothing twice."""
    found = dict.fromkeys(each for rule in RULES for each in rule(facts))
    return sorted(found, key=lambda each: each.level != "error")


def _unmet(facts: Facts) -> Iterator[Finding]:
    """Packages that are missing, or of a version that another one does not work with."""
    missing: dict[str, list[str]] = {}
    for each in facts["unmet"]:
        if each["found"] is None:
            missing.setdefault(each["by"], []).append(each["needs"])
            continue
        name = re.split(r"[<>=!~]", each["needs"])[0]
        yield Finding(
            "error",
            f"{each['by']} needs {each['needs']}, but {name} {each['found']} is installed",
            f"{_pip(facts)} install --upgrade '{each['needs']}'",
        )
    for by, needs in missing.items():
        quoted = " ".join(f"'{each}'" for each in needs)
        yield Finding(
            "error",
            f"{by} needs {', '.join(needs)}, which {'is' if len(needs) == 1 else 'are'} not "
            "installed",
            f"{_pip(facts)} install {quoted}",
        )


def _copies(facts: Facts) -> Iterator[Finding]:
    """The same package twice: which files are imported depends on the order of the path."""
    for name, copies in facts["packages"].items():
        if len(copies) > 1:
            listed = ", ".join(f"{each['version']} in {each['location']}" for each in copies)
            yield Finding(
                "error",
                f"{name} is installed {len(copies)} times: {listed}",
                f"{_pip(facts)} uninstall {name} until it finds none (and unset PYTHONPATH if it "
                f"names one of these), then {_pip(facts)} install --upgrade {name}",
            )
    if {"tensorflow", "tensorflow-cpu"} <= facts["packages"].keys():
        yield Finding(
            "warning",
            "tensorflow and tensorflow-cpu are both installed, and each wrote over the other",
            f"{_pip(facts)} uninstall tensorflow tensorflow-cpu, then install one of them",
        )


def _shadows(facts: Facts) -> Iterator[Finding]:
    for path in facts["shadows"]:
        yield Finding(
            "error", f"{path} hides the package of that name from programs started here",
            "rename it, or start elsewhere",
        )  # fmt: skip


def _plugins(facts: Facts) -> Iterator[Finding]:
    """JAX's CUDA plugins: one, of the version of jaxlib, and a driver that is new enough."""
    plugins = _plugin_versions(facts)
    jaxlib = _version(facts, "jaxlib")
    if len(plugins) > 1:
        names = " and ".join(f"jax-cuda{cuda}-plugin" for cuda in plugins)
        yield Finding(
            "error",
            f"{names} are both installed, and JAX loads one of them",
            f"{_pip(facts)} uninstall the plugin and pjrt packages of one CUDA version",
        )
    for cuda in plugins:
        for part in ("plugin", "pjrt"):
            name = f"jax-cuda{cuda}-{part}"
            version = _version(facts, name)
            if version != jaxlib:
                yield Finding(
                    "error",
                    f"{name} {version or 'is missing'} does not fit jaxlib {jaxlib}",
                    f"{_pip(facts)} install --upgrade 'jax[cuda{cuda}]=={_version(facts, 'jax')}'",
                )
        for gpu in facts["gpus"][:1]:
            major = int(re.match(r"\d*", gpu["driver"])[0] or 0)  # type: ignore[index]
            if 0 < major < LEAST_DRIVER.get(cuda, 0):
                yield Finding(
                    "error",
                    f"the NVIDIA driver {gpu['driver']} is too old for CUDA {cuda}",
                    f"install driver {LEAST_DRIVER[cuda]} or newer"
                    + (", or jax[cuda12] instead" if cuda == "13" and major >= 525 else ""),
                )


def _cuda(facts: Facts) -> Iterator[Finding]:
    """A GPU, or its plugin, and JAX computes elsewhere."""
    plugins, gpu_there = _plugin_versions(facts), bool(facts["gpus"] or facts["nvidia_devices"])
    platforms = {each["platform"] for each in _devices(facts)}
    variables = facts["variables"]
    if gpu_there and not plugins:
        yield Finding(
            "warning",
            "a GPU is there, but JAX has no plugin for it: it computes on the CPU",
            f"{_pip(facts)} install 'cnnjax[gpu]'",
        )
    if plugins and not gpu_there:
        yield Finding(
            "warning",
            "JAX's CUDA plugin is installed, but the system shows no NVIDIA GPU",
            "install NVIDIA's driver; start a container with --gpus all; ask the scheduler for one",
        )
    if not (plugins and gpu_there) or not platforms or platforms & {"gpu", "cuda"}:
        return
    hidden = variables.get("CUDA_VISIBLE_DEVICES")
    if hidden in ("", "-1", "none", "NoDevFiles"):
        mend = f"unset CUDA_VISIBLE_DEVICES, which is {hidden!r} and hides all GPUs"
    elif variables.get("JAX_PLATFORMS", "").lower() == "cpu":
        mend = "unset JAX_PLATFORMS, which is 'cpu'"
    elif variables.get("LD_LIBRARY_PATH"):
        mend = "unset LD_LIBRARY_PATH: CUDA's own libraries there may be taken before those of pip"
    else:
        cuda = next(iter(plugins))
        version = _version(facts, "jax")
        mend = f"{_pip(facts)} install --force-reinstall 'jax[cuda{cuda}]=={version}'"
    yield Finding("error", "a GPU and JAX's plugin for it are there, but JAX finds no GPU", mend)


def _gpu_memory(facts: Facts) -> Iterator[Finding]:
    """Memory that other programs hold: JAX takes three quarters of a GPU as it starts."""
    others = [each for each in facts["gpu_processes"] if each["used_mb"]]
    for gpu in facts["gpus"]:
        if not gpu["total_mb"] or (gpu["used_mb"] or 0) <= 0.25 * gpu["total_mb"]:
            continue
        who = ", ".join(f"process {each['pid']} ({each['name']})" for each in others) or "others"
        yield Finding(
            "warning",
            f"{gpu['used_mb']:,.0f} of {gpu['total_mb']:,.0f} MB of the {gpu['name']} are held by "
            f"{who}; JAX reserves 75% at its start",
            "end those that need no GPU, or set XLA_PYTHON_CLIENT_PREALLOCATE=false",
        )
    grows = facts["variables"].get("TF_FORCE_GPU_ALLOW_GROWTH", "").lower() == "true"
    if facts["gpus"] and "tensorflow" in facts["packages"] and not grows:
        yield Finding(
            "warning",
            "this TensorFlow can use the GPU, and takes all of its memory in a program that "
            "imports it before cnnjax (which hides GPUs from it)",
            f"{_pip(facts)} uninstall tensorflow, then install tensorflow-cpu; or set "
            "TF_FORCE_GPU_ALLOW_GROWTH=true",
        )


def _tpu(facts: Facts) -> Iterator[Finding]:
    """A TPU belongs to one process at a time."""
    chips, found_tpu = facts["tpu_chips"], any(d["platform"] == "tpu" for d in _devices(facts))
    if not chips or found_tpu:
        return
    for holder in facts["tpu_holders"]:
        yield Finding(
            "error",
            f"the TPU is held by process {holder['pid']} ({holder['command'][:80]})",
            f"end it (kill {holder['pid']}): a TPU serves one process at a time",
        )
    if facts["tpu_holders"]:
        return
    if "libtpu" not in facts["packages"]:
        yield Finding(
            "error", "a TPU is there, but libtpu is not installed: JAX computes on the CPU",
            f"{_pip(facts)} install 'cnnjax[tpu]'",
        )  # fmt: skip
    elif facts["tpu_lock"]:
        yield Finding(
            "error",
            f"the TPU is locked by {facts['tpu_lock']}, which a program of another user holds or "
            "an ended one left",
            f"end that program; if there is none, remove {facts['tpu_lock']}",
        )


def _directories(facts: Facts) -> Iterator[Finding]:
    mends = {
        "compile cache": (
            "warning",
            "programs are compiled anew at each start",
            "set XDG_CACHE_HOME to a directory that you may write",
        ),
        "runs": ("warning", "runs cannot be left there", "give --run-dir, or start elsewhere"),
        "temporary files": ("error", "many libraries need it", "set TMPDIR to one"),
    }
    for each in facts["directories"]:
        what, path = each["what"], each["path"]
        if what in mends and not each["writable"]:
            level, effect, mend = mends[what]
            yield Finding(level, f"the directory of {what}, {path}, is read-only: {effect}", mend)
        elif what in mends and (each["free_bytes"] or LEAST_FREE_BYTES) < LEAST_FREE_BYTES:
            free = f"{each['free_bytes'] / 1e6:,.0f} MB"
            yield Finding(
                "warning", f"only {free} are free for {what} at {path}",
                "free some space, or choose another disk",
            )  # fmt: skip
        if what == "datasets" and each["exists"] and not each["readable"]:
            yield Finding(
                "error", f"the directory of datasets, {path}, cannot be read",
                "change its permissions, or set TFDS_DATA_DIR to another one",
            )  # fmt: skip
        named = facts["variables"].get("TFDS_DATA_DIR")
        if what == "datasets" and named and not each["exists"]:
            yield Finding(
                "warning", f"TFDS_DATA_DIR is {named}, which does not exist",
                "mount or create it, or unset TFDS_DATA_DIR",
            )  # fmt: skip


def _limits(facts: Facts) -> Iterator[Finding]:
    machine = facts["host"]
    descriptors, most = machine["descriptors"], machine["descriptors_limit"]
    if descriptors is not None and descriptors < LEAST_DESCRIPTORS:
        allowed = 4096 if most is None else min(most, 4096)
        mend = f"ulimit -n {allowed}"
        if allowed < LEAST_DESCRIPTORS:
            mend = f"have an administrator raise the limit of {most} (limits.conf, --ulimit nofile)"
        yield Finding(
            "warning",
            f"a process may open only {descriptors} files: reading and saving may fail",
            mend,
        )
    available = machine["memory_available_bytes"]
    if available is not None and available < LEAST_MEMORY_BYTES:
        yield Finding(
            "warning", f"only {available / 1e6:,.0f} MB of memory are free",
            "end other programs, or give the container more",
        )  # fmt: skip


def _switches(facts: Facts) -> Iterator[Finding]:
    """Variables for finding faults that were left set."""
    slow = {
        "JAX_DISABLE_JIT": "nothing is compiled: training takes a hundred times as long",
        "JAX_DEBUG_NANS": "each step waits for its numbers, and is compiled without donation",
        "JAX_ENABLE_X64": "floats of 64 bits slip in: slow, and other results",
        "JAX_LOG_COMPILES": "each compilation is printed",
    }
    for name, effect in slow.items():
        if facts["variables"].get(name, "").lower() in ("1", "true", "yes", "on", "y", "t"):
            yield Finding("warning", f"{name} is set: {effect}", f"unset {name}")


def _probe(facts: Facts) -> Iterator[Finding]:
    """What became of starting JAX and of the training check."""
    probe = facts["probe"]
    stage, error, code = probe["failed"], probe["error"] or _last_words(probe), probe["exit_code"]
    if stage is None:
        yield from _learning(facts)
        return
    flags = re.search(r"Unknown flags? in XLA_FLAGS: *(.*)", probe["said"])
    if flags:
        text, mend = f"XLA knows no {flags[1].strip()}", "take it out of XLA_FLAGS"
    elif code is None:
        text = f"JAX does not answer at the stage '{stage}'"
        mend = "see whether another process holds the device; JAX_PLATFORMS=cpu goes without it"
    elif code == -4:
        text = f"the processor lacks instructions that are used at the stage '{stage}'"
        mend = "jaxlib needs AVX: choose another machine, or let the virtual one show it"
    elif code == -9:
        text = f"the system ended the check at the stage '{stage}', as it does without memory"
        mend = "end other programs, or give the container more memory"
    elif stage == "start devices":
        given = facts["variables"].get("JAX_PLATFORMS")
        named = f" with JAX_PLATFORMS={given}" if given else ""
        text = f"JAX starts no device{named}: {error}"
        mend = "set JAX_PLATFORMS=cpu, or unset it to take what there is"
    elif stage in ("import jax", "import cnnjax"):
        what = "jax" if stage == "import jax" else "cnnjax"
        text = f"{what} cannot be imported: {error}"
        wanted = {"jax": "jax jaxlib", "cnnjax": "jax jaxlib flax optax"}[what]
        mend = f"{_pip(facts)} install --upgrade --force-reinstall {wanted}"
    else:
        text = f"the training check fails (exit code {code}): {error}"
        mend = "CNNJAX_TRACEBACK=1 python -m experiments.mnist_lenet --smoke says where"
    yield Finding("error", text, mend)


def _learning(facts: Facts) -> Iterator[Finding]:
    for stage in facts["probe"]["stages"]:
        for check in stage.get("training", ()):
            if not check["last_loss"] < LEARNS * check["first_loss"]:
                yield Finding(
                    "error",
                    f"{check['device']} computes, but its network learns nothing: loss "
                    f"{check['first_loss']:.3f} to {check['last_loss']:.3f}",
                    "unset XLA_FLAGS and JAX_ variables; try another jaxlib; test the memory",
                )


RULES = (
    *(_probe, _unmet, _copies, _shadows, _plugins, _cuda, _gpu_memory, _tpu),
    *(_directories, _limits, _switches),
)


def _pip(facts: Facts) -> str:
    return f"{facts['python']['executable']} -m pip"


def _version(facts: Facts, name: str) -> str | None:
    copies = facts["packages"].get(name)
    return copies[0]["version"] if copies else None


def _plugin_versions(facts: Facts) -> dict[str, str | None]:
    """Returns CUDA version -> version of the plugin that is installed for it."""
    names = {cuda: f"jax-cuda{cuda}-plugin" for cuda in LEAST_DRIVER}
    return {c: _version(facts, name) for c, name in names.items() if name in facts["packages"]}


def _devices(facts: Facts) -> list[dict[str, Any]]:
    return [d for stage in facts["probe"]["stages"] for d in stage.get("devices", ())]


def _last_words(probe: dict[str, Any]) -> str:
    lines = [line.strip() for line in probe["said"].splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"
