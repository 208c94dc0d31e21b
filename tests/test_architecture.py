"""The direction of imports, the cost of importing, and the sizes of modules."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in ("cnnjax", "experiments")
    for path in sorted((ROOT / folder).rglob("*.py"))
}
MAY_IMPORT = {
    "errors": set(),
    "trees": {"errors"},
    "rng": {"errors"},
    "ops": {"errors", "trees", "rng", "ops"},
    "models": {"errors", "trees", "rng", "ops", "models"},
    "data": {"errors", "rng", "data"},
    "losses": {"errors", "trees", "rng"},
    "metrics": {"errors", "trees", "rng"},
    "schedules": {"errors", "trees", "rng"},
    "optim": {"errors", "trees", "rng", "schedules"},
    "averaging": {"errors"},
    "recalibrate": {"errors", "distributed"},
    "precision": {"errors"},
    "dropout": set(),
    "gradients": {"errors", "ops"},
    "state": {"errors", "trees", "rng", "precision"},
    "steps": {
        "errors",
        "trees",
        "rng",
        "losses",
        "metrics",
        "state",
        "averaging",
        "precision",
        "dropout",
        "gradients",
    },
    "ensemble": {"errors", "steps"},
    "calibration": {"errors"},
    "robust": {
        "errors",
        "ensemble",
        "rng",
        "losses",
        "metrics",
        "dropout",
        "state",
        "steps",
        "evaluate",
        "robust",
    },
    "channel": {"errors"},
    "distributed": {"errors", "channel"},
    "sharding": {"errors", "trees"},
    "parallel": {
        "errors",
        "distributed",
        "trees",
        "rng",
        "state",
        "steps",
        "data",
        "ops",
        "sharding",
    },
    "plan": {"errors", "distributed", "state", "steps", "data", "sharding", "parallel"},
    "checkpoint": {
        "errors",
        "distributed",
        "trees",
        "state",
        "manifest",
        "storage",
        "step_directories",
        "environment",
    },
    "finetune": {"errors", "trees", "rng", "models", "manifest", "checkpoint", "trained_model"}
    | {"step_directories", "finetune", "data", "losses", "optim", "schedules", "state", "steps"},
    "logs": {"errors"},
    "plots": {"errors", "metrics", "plots"},
    "evaluate": {"errors", "distributed", "metrics"},
    "loop": {"errors", "metrics", "state", "steps", "parallel", "evaluate", "checkpoint", "logs"},
}
HEAVY = {
    "tensorflow",
    "tensorflow_datasets",
    "matplotlib",
    "orbax",
    "PIL",
    "tensorboardX",
    "sklearn",
}


def imports(path: Path, *, top_level_only: bool) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module):
    parts = module.split(".")
    room = parts[1] if len(parts) > 1 and parts[0] == "cnnjax" else None
    inside = {
        name.split(".")[1]
        for name in imports(MODULES[module], top_level_only=False)
        if name.startswith("cnnjax.")
    }
    rooms = {name for name in inside if f"cnnjax.{name}" in MODULES}
    assert parts[0] == "experiments" or "experiments" not in {
        name.split(".")[0] for name in imports(MODULES[module], top_level_only=False)
    }
    if room in MAY_IMPORT:
        assert rooms <= MAY_IMPORT[room]


@pytest.mark.parametrize("module", MODULES)
def test_heavy_packages_are_imported_on_use(module):
    roots = {name.split(".")[0] for name in imports(MODULES[module], top_level_only=True)}
    assert not roots & HEAVY


@pytest.mark.parametrize("module", [name for name in MODULES if not name.startswith("cnnjax.data")])
def test_tensorflow_stays_in_the_data_room(module):
    roots = {name.split(".")[0] for name in imports(MODULES[module], top_level_only=False)}
    assert not roots & {"tensorflow", "tensorflow_datasets"}


@pytest.mark.parametrize("module", MODULES)
def test_modules_fit_on_a_few_screens(module):
    assert len(MODULES[module].read_text().splitlines()) <= 420


@pytest.mark.parametrize("module", MODULES)
def test_functions_fit_on_a_screen(module):
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.FunctionDef) and node.name != "fit":
            docstring = ast.get_docstring(node, clean=False) or ""
            code = node.end_lineno - node.lineno + 1 - len(docstring.splitlines())
            assert code <= 80, f"{node.name} has {code} lines"


def test_importing_the_package_loads_nothing_heavy():
    program = (
        "import sys, time, jax; start = time.perf_counter(); import cnnjax; "
        "[getattr(cnnjax, name) for name in ('steps', 'models', 'parallel', 'loop', 'data')]; "
        "print(time.perf_counter() - start, *sorted({name.split('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    _, *loaded = done.stdout.split()
    assert not set(loaded) & (HEAVY - {"orbax"})
    assert "orbax" not in loaded
