"""Run the notebooks from top to bottom, without a browser, and say how long each took.

    python scripts/run_notebooks.py                         # all of notebooks/, with small settings
    python scripts/run_notebooks.py 1_lenet5 --full         # one, as a reader runs it
    python scripts/run_notebooks.py --out build/notebooks   # keep the executed ones, for the docs
    python scripts/run_notebooks.py --strip                 # only take the outputs out, in place

Each runs in a kernel and an empty directory of its own. An error in a cell is shown with the cell's
name, and the exit code is 1. Needs nbclient and ipykernel (the extra `docs`).
"""

import argparse
import concurrent.futures
import copy
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cnnjax.errors import UserError, unknown_name
from cnnjax.paths import expand_flags
from cnnjax.run.exits import one_line_errors
from cnnjax.run.files import make_directory

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
SMALL_VARIABLE = "CNNJAX_NOTEBOOK_SMALL"
LONGEST_CELL_SECS = 1800


def main(argv: Sequence[str] | None = None) -> int:
    """Runs or strips the notebooks; returns 1 where a cell failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="notebooks; by default all")
    parser.add_argument("--full", action="store_true", help="with the settings of a reader")
    parser.add_argument("--out", type=Path, help="folder for the executed notebooks")
    parser.add_argument("--jobs", type=int, default=2, help="how many run at a time")
    parser.add_argument("--strip", action="store_true", help="take outputs out, and run nothing")
    options = parser.parse_args(expand_flags(argv))
    if options.jobs < 1:
        raise UserError(f"--jobs {options.jobs}: give 1 or more.")
    paths = chosen(options.names)
    if options.strip:
        for path in paths:
            write(path, stripped(read(path)))
        return 0
    check_packages()
    if options.out:
        make_directory(options.out, "the folder of the executed notebooks", "--out")
    began = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        running = [pool.submit(run, path, options.out, small=not options.full) for path in paths]
        failed = sum(not each.result() for each in running)
    total = time.perf_counter() - began
    print(f"{len(paths) - failed} of {len(paths)} notebooks ran, {total:.0f} s in all")
    return 1 if failed else 0


def chosen(names: Sequence[str]) -> list[Path]:
    """Returns the notebooks of these names, with or without `.ipynb`; all if there are none.

    Raises:
      UserError: there is no such notebook.
    """
    known = {path.stem: path for path in sorted(NOTEBOOKS.glob("*.ipynb"))}
    wanted = [Path(name).stem for name in names] or list(known)
    for name in wanted:
        if name not in known:
            raise unknown_name("notebook", name, known)
    return [known[name] for name in wanted]


def check_packages() -> None:
    """Raises a UserError where what runs notebooks is not installed."""
    try:
        import ipykernel  # noqa: F401
        import nbclient  # noqa: F401
    except ImportError as error:
        raise UserError(f"{error}: install it by pip install '.[docs]'.") from None


def read(path: Path) -> Any:
    """Returns a notebook as nbformat has it."""
    import nbformat

    return nbformat.read(path, as_version=4)


def write(path: Path, notebook: Any) -> None:
    """Writes a notebook as Git keeps it: indented by one, with a line end."""
    import nbformat

    nbformat.write(notebook, path)


def stripped(notebook: Any) -> Any:
    """Returns the notebook without outputs, counts and times of cells."""
    notebook = copy.deepcopy(notebook)
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return notebook


def run(path: Path, out: Path | None, *, small: bool) -> bool:
    """Runs one notebook, prints its seconds, and returns whether no cell failed.

    Args:
      path: the notebook; it is not changed.
      out: folder for the executed copy, or None.
      small: whether to set the variable that its cell of settings reads.
    """
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    notebook = read(path)
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        SMALL_VARIABLE: "1" if small else "",
        # A page shows no widgets, or fetches what draws them.
        "CNNJAX_PROGRESS": "lines",
    }
    began, problem = time.perf_counter(), ""
    with tempfile.TemporaryDirectory(prefix=f"{path.stem}-") as directory:
        client = NotebookClient(
            notebook, timeout=LONGEST_CELL_SECS, kernel_name="python3", config=_sockets(directory)
        )
        try:
            client.execute(cwd=directory, env=environment)
        except CellExecutionError as error:
            problem = str(error)
    print(f"{'FAILED ' if problem else ''}{path.stem}: {time.perf_counter() - began:.0f} s")
    if problem:
        cell = next(cell for cell in notebook.cells if _failed(cell))
        print(f"cell {cell.id} of {path}:\n{problem}", file=sys.stderr)
    elif out:
        write(out / path.name, notebook)
    return not problem


def _sockets(directory: str) -> Any:
    """Returns the settings with which a kernel is spoken to by files, which no other has.

    Of TCP, which Windows needs, kernels warn on every start that it is not encrypted.
    """
    from traitlets.config import Config

    if os.name == "nt":
        return Config()
    return Config({"KernelManager": {"transport": "ipc", "ip": f"{directory}/kernel"}})


def _failed(cell: Any) -> bool:
    return any(output.output_type == "error" for output in cell.get("outputs", ()))


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
