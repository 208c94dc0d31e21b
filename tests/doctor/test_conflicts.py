"""Every known fault is found in facts that have it, with its mend, and in no others."""

import copy
import json

import pytest

from cnnjax.doctor import conflicts, facts, packages, probe, report

GPU = {"name": "NVIDIA A100", "driver": "550.54", "total_mb": 80000.0, "used_mb": 500.0}
CPU = {"id": 0, "platform": "cpu", "kind": "cpu", "memory_bytes": None}
STARTED = [
    {"stage": "import jax", "seconds": 1.0},
    {"stage": "start devices", "seconds": 0.1, "devices": [CPU]},
]
HEALTHY = {
    "python": {"executable": "python", "version": "3.12.1", "platform": "Linux"},
    "cnnjax": {"version": "1", "location": "/x/cnnjax"},
    "packages": {
        name: [{"version": "0.10.2", "location": "/x"}] for name in ("jax", "jaxlib", "flax")
    },
    "unmet": [],
    "shadows": [],
    "variables": {},
    "host": {
        "processor": "AMD",
        "cores": 2,
        "memory_bytes": 10**10,
        "memory_available_bytes": 9 * 10**9,
        "descriptors": 1024,
        "descriptors_limit": 4096,
    },
    "gpus": [],
    "gpu_processes": [],
    "nvidia_devices": [],
    "tpu_chips": [],
    "tpu_holders": [],
    "tpu_lock": None,
    "directories": [
        {
            **{"what": what, "path": f"/{what}", "exists": True, "readable": True},
            **{"writable": True, "free_bytes": 10**11},
        }
        for what in ("compile cache", "datasets", "runs", "temporary files")
    ],
    "datasets": ["mnist (shipped)"],
    "probe": {
        **{"stages": STARTED, "failed": None, "error": None, "exit_code": 0, "said": ""},
    },
}


def copies(*versions):
    return [{"version": version, "location": f"/{i}"} for i, version in enumerate(versions)]


def changed(**changes):
    """Healthy facts with other entries; `a__b` is entry b of a."""
    found = copy.deepcopy(HEALTHY)
    for name, value in changes.items():
        outer, _, inner = name.partition("__")
        if inner:
            found[outer][inner.replace("_DASH_", "-")] = value
        else:
            found[outer] = value
    return found


def failed(stage, code=1, error=None, said=""):
    return {"stages": [], "failed": stage, "error": error, "exit_code": code, "said": said}


CUDA = {
    "packages__jax_DASH_cuda12_DASH_plugin": copies("0.10.2"),
    "packages__jax_DASH_cuda12_DASH_pjrt": copies("0.10.2"),
}
ON_GPU = {
    "gpus": [GPU],
    "probe": {
        **HEALTHY["probe"],
        "stages": [{"stage": "start devices", "seconds": 1, "devices": [{"platform": "gpu"}]}],
    },
    **CUDA,
}
READ_ONLY = [{**each, "writable": False} for each in HEALTHY["directories"]]
ABSENT = [{**each, "exists": False} for each in HEALTHY["directories"]]
TORN = {"device": "cpu:0", "first_loss": 2.3, "last_loss": float("nan")}
CASES = {
    "another jaxlib": (
        changed(unmet=[{"by": "jax 0.10.2", "needs": "jaxlib>=0.10.2", "found": "0.9.0"}]),
        "error",
        "jax 0.10.2 needs jaxlib>=0.10.2, but jaxlib 0.9.0 is installed",
        "python -m pip install --upgrade 'jaxlib>=0.10.2'",
    ),
    "missing packages": (
        changed(unmet=[{"by": "cnnjax 1", "needs": n, "found": None} for n in ("jax", "flax>=1")]),
        "error",
        "cnnjax 1 needs jax, flax>=1, which are not installed",
        "python -m pip install 'jax' 'flax>=1'",
    ),
    "two jaxlib builds": (
        changed(packages__jaxlib=copies("0.10.2", "0.9.0")),
        "error",
        "jaxlib is installed 2 times: 0.10.2 in /0, 0.9.0 in /1",
        "python -m pip uninstall jaxlib until it finds none",
    ),
    "a file that hides a package": (
        changed(shadows=["/here/jax.py"]),
        "error",
        "/here/jax.py hides the package",
        "rename it",
    ),
    "GPU without plugin": (
        changed(gpus=[GPU]),
        "warning",
        "JAX has no plugin for it",
        "install 'cnnjax[gpu]'",
    ),
    "plugin without GPU": (changed(**CUDA), "warning", "no NVIDIA GPU", "--gpus all"),
    "plugin that finds no GPU": (
        changed(gpus=[GPU], **CUDA),
        "error",
        "JAX finds no GPU",
        "--force-reinstall 'jax[cuda12]==0.10.2'",
    ),
    "GPU hidden": (
        changed(gpus=[GPU], variables__CUDA_VISIBLE_DEVICES="", **CUDA),
        "error",
        "JAX finds no GPU",
        "unset CUDA_VISIBLE_DEVICES",
    ),
    "other CUDA libraries": (
        changed(gpus=[GPU], variables__LD_LIBRARY_PATH="/usr/local/cuda", **CUDA),
        "error",
        "JAX finds no GPU",
        "unset LD_LIBRARY_PATH",
    ),
    "plugin of another jaxlib": (
        changed(**{**ON_GPU, "packages__jax_DASH_cuda12_DASH_pjrt": copies("0.9.1")}),
        "error",
        "jax-cuda12-pjrt 0.9.1 does not fit jaxlib 0.10.2",
        "'jax[cuda12]==0.10.2'",
    ),
    "old driver": (
        changed(**{**ON_GPU, "gpus": [{**GPU, "driver": "470.82"}]}),
        "error",
        "470.82 is too old for CUDA 12",
        "install driver 525",
    ),
    "GPU memory held": (
        changed(
            **{**ON_GPU, "gpus": [{**GPU, "used_mb": 70000.0}]},
            gpu_processes=[{"pid": 7, "name": "python", "used_mb": 69000.0}],
        ),
        "warning",
        "70,000 of 80,000 MB of the NVIDIA A100 are held by process 7 (python)",
        "XLA_PYTHON_CLIENT_PREALLOCATE=false",
    ),
    "TensorFlow takes the GPU": (
        changed(packages__tensorflow=copies("2.21"), **ON_GPU),
        "warning",
        "takes all of its memory",
        "install tensorflow-cpu",
    ),
    "TPU held": (
        changed(tpu_chips=["/dev/accel0"], tpu_holders=[{"pid": 9, "command": "python train.py"}]),
        "error",
        "the TPU is held by process 9 (python train.py)",
        "kill 9",
    ),
    "TPU locked": (
        changed(tpu_chips=["/dev/accel0"], tpu_lock="/tmp/x", packages__libtpu=copies("0.0.1")),
        "error",
        "locked by /tmp/x",
        "remove /tmp/x",
    ),
    "TPU without libtpu": (
        changed(tpu_chips=["/dev/accel0"]), "error", "libtpu is not installed", "'cnnjax[tpu]'",
    ),
    "read-only cache": (
        changed(directories=READ_ONLY[:1]), "warning", "/compile cache, is read-only",
        "XDG_CACHE_HOME",
    ),
    "dataset folder gone": (
        changed(directories=ABSENT[1:2], variables__TFDS_DATA_DIR="/datasets"), "warning",
        "TFDS_DATA_DIR is /datasets, which does not exist", "mount or create it",
    ),
    "full disk": (
        changed(directories=[{**HEALTHY["directories"][2], "free_bytes": 5_000_000}]), "warning",
        "only 5 MB are free for runs", "free some space",
    ),
    "few descriptors": (
        changed(host__descriptors=256), "warning", "may open only 256 files", "ulimit -n 4096",
    ),
    "few descriptors by the system": (
        changed(host__descriptors=256, host__descriptors_limit=256), "warning",
        "may open only 256 files", "have an administrator raise the limit of 256",
    ),
    "little memory": (
        changed(host__memory_available_bytes=10**8), "warning", "only 100 MB of memory", "end",
    ),
    "a switch left on": (
        changed(variables__JAX_DISABLE_JIT="1"), "warning", "JAX_DISABLE_JIT is set",
        "unset JAX_DISABLE_JIT",
    ),
    "unknown flag of XLA": (
        changed(probe=failed("start devices", -6, said="F1 Unknown flag in XLA_FLAGS: --xla_no")),
        "error", "XLA knows no --xla_no", "take it out of XLA_FLAGS",
    ),
    "no answer": (
        changed(probe=failed("start devices", None)), "error", "does not answer at the stage",
        "whether another process holds the device",
    ),
    "old processor": (
        changed(probe=failed("import jax", -4)), "error", "lacks instructions", "AVX",
    ),
    "a platform that is not there": (
        changed(
            probe=failed("start devices", 1, "RuntimeError: no"), variables__JAX_PLATFORMS="tpu"
        ),
        "error", "no device with JAX_PLATFORMS=tpu: RuntimeError: no", "set JAX_PLATFORMS=cpu",
    ),
    "JAX that cannot be imported": (
        changed(probe=failed("import jax", 1, "ImportError: x")), "error",
        "jax cannot be imported: ImportError: x", "--force-reinstall jax jaxlib",
    ),
    "a device that computes nonsense": (
        changed(probe={**HEALTHY["probe"], "stages": [{"stage": "train", "training": [TORN]}]}),
        "error", "cpu:0 computes, but its network learns nothing", "another jaxlib",
    ),
}  # fmt: skip


def test_a_healthy_installation_has_no_findings():
    assert conflicts.find(HEALTHY) == []
    working = changed(**ON_GPU)
    assert conflicts.find(working) == []


@pytest.mark.parametrize("case", CASES)
def test_each_known_fault_is_the_only_finding(case):
    found, level, text, mend = CASES[case]
    (finding,) = conflicts.find(found)
    assert finding.level == level
    assert text in finding.text and mend in finding.mend
    assert "\n" not in finding.text + finding.mend


def test_errors_come_before_warnings():
    found = conflicts.find(changed(host__descriptors=10, shadows=["/here/jax.py"]))
    assert [each.level for each in found] == ["error", "warning"]


def test_what_a_probe_printed_says_where_it_ended():
    line = json.dumps({"stage": "import jax", "seconds": 1})
    found = probe.read(f'noise\n3\n{line}\n{{"stage": "star', "last words", -6)
    assert (found["failed"], found["exit_code"], found["said"]) == (
        *("start devices", -6, "last words"),
    )
    both = f"{line}\n" + json.dumps({"stage": "start devices", "seconds": 1})
    assert probe.read(both, "", 0, train=False)["failed"] is None
    assert probe.read(both, "", 0, train=True)["failed"] == "import cnnjax"


def test_secrets_are_not_reported():
    given = {"JAX_PLATFORMS": "cpu", "JAX_API_KEY": "x", "TF_TOKEN": "x", "EDITOR": "vi"}
    assert facts.variables(given) == {"JAX_PLATFORMS": "cpu"}


def test_files_that_hide_packages_are_found(tmp_path):
    (tmp_path / "flax.py").touch()
    (tmp_path / "optax").mkdir()  # No package.
    assert packages.shadows(str(tmp_path)) == [str(tmp_path / "flax.py")]


def test_a_report_says_each_fact_and_finding():
    found = changed(gpus=[GPU], host__descriptors=256)
    text = report.text(found, conflicts.find(found))
    assert "driver 550.54" in text and "2 cores" in text
    assert text.endswith("0 errors, 2 warnings")
    assert text.count("\n  mend: ") == 2
