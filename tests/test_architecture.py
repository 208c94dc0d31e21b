"""The direction of imports, the cost of importing, and the sizes of modules."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in ("cnnjax", "experiments")
    for path in sorted((ROOT / folder).rglob("*.py"))
}
# From the ground up: a room imports rooms that stand before it, and itself.
ROOMS = (
    "errors",
    "paths",
    "lazy",
    "aligned",
    "notebook",
    "trees",
    "rng",
    "traced",
    "signatures",
    "spec",
    "losses",
    "metrics",
    "schedules",
    "optim",
    "ops",
    "models",
    "data",
    "augment",
    "devices",
    "plots",
    "tasks",
    "train",
    "cost",
    "checkpoint",
    "evaluation",
    "robust",
    "explain",
    "convert",
    "finetune",
    "compress",
    "distill",
    "export",
    "run",
    "studies",
    "search",
    "serve",
    "doctor",
    "commands",
    "__main__",
)
HEAVY = {
    "tensorflow",
    "tensorflow_datasets",
    "matplotlib",
    "orbax",
    "PIL",
    "tensorboardX",
    "sklearn",
    "onnx",
    "onnxruntime",
    "ai_edge_litert",
    "wandb",
    "mlflow",
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


def room_of(name: str) -> str | None:
    """Returns the room of a module of cnnjax, None of another."""
    package, _, rest = name.partition(".")
    room = rest.partition(".")[0]
    return room if package == "cnnjax" and room and f"cnnjax.{room}" in MODULES else None


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("cnnjax.")])
def test_imports_point_one_way(module):
    room = module.split(".")[1]
    assert room in ROOMS, f"{module} is in no room of DESIGN: put it into one, or list its room"
    imported = imports(MODULES[module], top_level_only=False)
    assert "experiments" not in {name.partition(".")[0] for name in imported}
    below = {name for name in imported if room_of(name) in ROOMS[ROOMS.index(room) + 1 :]}
    assert not below


def test_every_room_that_is_listed_is_there():
    assert {room_of(name) for name in MODULES} - {None} == set(ROOMS)


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("experiments.")])
def test_experiments_use_nothing_private_of_each_other(module):
    tree = ast.parse(MODULES[module].read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("experiments"):
            assert not [alias.name for alias in node.names if alias.name.startswith("_")]


def test_only_the_package_itself_is_installed():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert settings["tool"]["setuptools"]["packages"]["find"]["include"] == ["cnnjax*"]


def test_rooms_are_no_halls():
    for room in ROOMS:
        modules = [
            name
            for name, path in MODULES.items()
            # A room within a room is not one of its modules.
            if name.rpartition(".")[0] == f"cnnjax.{room}" and path.name != "__init__.py"
        ]
        # A family of networks or of names, or a command, a file: these are lists.
        assert room in ("models", "convert", "commands") or len(modules) <= 21, modules


@pytest.mark.parametrize("module", MODULES)
def test_heavy_packages_are_imported_on_use(module):
    roots = {name.split(".")[0] for name in imports(MODULES[module], top_level_only=True)}
    assert not roots & HEAVY


@pytest.mark.parametrize("module", [name for name in MODULES if not name.startswith("cnnjax.data")])
def test_tensorflow_stays_in_the_data_room(module):
    roots = {name.split(".")[0] for name in imports(MODULES[module], top_level_only=False)}
    assert not roots & {"tensorflow", "tensorflow_datasets"}


# Of what these read a program is the author: the system, or cnnjax.
READ_BY_THEMSELVES = ("cnnjax.checkpoint.", "cnnjax.run.", "cnnjax.devices.", "cnnjax.doctor.")


@pytest.mark.parametrize("module", MODULES)
def test_text_files_and_home_directories_are_found_by_one_module(module):
    used = {
        node.func.attr
        for node in ast.walk(ast.parse(MODULES[module].read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    }
    allowed = {"read_text"} if module.startswith(READ_BY_THEMSELVES) else set()
    if module == "cnnjax.paths":
        allowed = {"expanduser"}
    assert not used & {"read_text", "expanduser", "home"} - allowed


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
        "import sys, time, jax; start = time.perf_counter(); import cnnjax, cnnjax.run.trainer; "
        "[getattr(cnnjax, name) for name in ('train', 'models', 'devices', 'data', 'run')]; "
        "print(time.perf_counter() - start, *sorted({name.split('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    _, *loaded = done.stdout.split()
    assert not set(loaded) & (HEAVY - {"orbax"})
    assert "orbax" not in loaded


def test_the_help_of_an_experiment_needs_no_jax():
    program = "import sys, experiments.mnist_lenet; print('jax' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout == "False\n"
