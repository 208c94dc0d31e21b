"""Build wheel and sdist, install the wheel into a bare environment, run the quick start from it.

    python scripts/check_release.py                           # with this Python
    python scripts/check_release.py --python python3.12 python3.13
    python scripts/check_release.py --reuse .ci/venv          # with packages that are there

The wheel is built from the sdist, so that what both hold is the same. It is installed with its
dependencies, the newest that this Python takes (or with --reuse those of another environment).
Everything is run in an empty directory with nothing of the repository on the path: the README's
loop, a whole run by `cnnjax.run.train`, commands on it, and `cnnjax doctor`.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Of the wheel, besides modules: data, licenses, pages.
WANTED = (
    "cnnjax/py.typed",
    "cnnjax/data/mnist/train-images-idx3-ubyte.gz",
    "cnnjax/export/page/",
    "/licenses/LICENSE",
    "cnnjax/data/mnist/LICENSE",
)
WHOLE_RUN = """
import cnnjax
from cnnjax.tasks.classification import classification

# Of the wheel, not of a checkout.
assert "site-packages" in cnnjax.__file__, cnnjax.__file__
mnist = cnnjax.run.trainer.shrink(cnnjax.data.load("mnist"))
trained = cnnjax.run.train(
    "lenet5", classification(10), mnist, "adam", epochs=1, batch_size=32,
    run_dir="runs/mine", learning_rate=1e-3,
)
print("run.train:", trained.summary["test_accuracy"])
"""
DIGIT = """
from PIL import Image
from cnnjax.data import load

Image.fromarray(255 - load("mnist").test.image[0, :, :, 0]).resize((90, 120)).save("seven.png")
"""
COMMANDS = (
    "--version",
    "train --model lenet5 --smoke --run-dir runs/trained",
    "evaluate --run runs/trained",
    "predict --run runs/trained seven.png",
    "predict --run runs/mine seven.png",
    "cost lenet5 --no-train --device flops=1T,bandwidth=1T",
    "doctor --no-train",
)


def main() -> int:
    """Builds, installs and runs; returns the exit code: that of the first command that fails."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--python", nargs="+", default=[sys.executable], help="interpreters")
    parser.add_argument("--reuse", help="an environment whose packages are used as they are")
    parser.add_argument("--keep", help="directory for what is built (a temporary one)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="release-") as temporary:
        out = Path(options.keep or temporary).absolute()
        wheel = build(out)
        check_content(wheel)
        for python in options.python:
            check_install(python, wheel, Path(temporary), options.reuse)
    return 0


def build(out: Path) -> Path:
    """Builds the sdist, and from it the wheel, which is returned."""
    began = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    run([sys.executable, "-m", "build", "--outdir", str(out), str(ROOT)])
    (wheel,) = out.glob("*.whl")
    (sdist,) = out.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "cnnjax").rglob("*.py")}
    missing = modules - names
    if missing:
        raise SystemExit(f"the sdist lacks {', '.join(sorted(missing))}")
    say(f"built {wheel.name} and {sdist.name}", began)
    return wheel


def check_content(wheel: Path) -> None:
    """Exits unless the wheel holds every module and file of the package, and nothing else."""
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    strangers = {top for top in tops if top != "cnnjax" and not top.endswith(".dist-info")}
    missing = [each for each in WANTED if not any(each in name for name in names)]
    missing += [
        name
        for path in (ROOT / "cnnjax").rglob("*.py")
        if (name := str(path.relative_to(ROOT))) not in names
    ]
    if strangers or missing:
        raise SystemExit(f"{wheel.name} has {sorted(strangers)} besides, and lacks {missing}")


def check_install(python: str, wheel: Path, temporary: Path, reuse: str | None) -> None:
    """Installs the wheel with an interpreter and runs the quick start and the commands."""
    began = time.monotonic()
    version = run([python, "-c", "import platform; print(platform.python_version())"]).strip()
    environment, work = temporary / f"venv-{version}", temporary / f"work-{version}"
    work.mkdir()
    run([python, "-m", "venv", str(environment)])
    bin_ = environment / ("Scripts" if os.name == "nt" else "bin")
    pip = [str(bin_ / "python"), "-m", "pip", "install", "--quiet"]
    if reuse:
        (packages,) = Path(reuse).absolute().glob("lib/python*/site-packages")
        (own,) = environment.glob("lib/python*/site-packages")
        (own / "reused.pth").write_text(f"{packages}\n")
        run([*pip, "--no-deps", "--ignore-installed", str(wheel)])
    else:
        run([*pip, str(wheel)])
    clean = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "XLA_FLAGS")
    }
    clean["PATH"] = f"{bin_}{os.pathsep}{clean['PATH']}"
    versions = run(
        [str(bin_ / "python"), "-c", "import jax, flax; print(jax.__version__, flax.__version__)"],
        env=clean, cwd=work,
    )  # fmt: skip
    jax, flax = versions.split()
    say(f"Python {version}: installed, with jax {jax} and flax {flax}", began)
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    for name, program in (("quick start", block), ("whole run", WHOLE_RUN), ("digit", DIGIT)):
        began = time.monotonic()
        printed = run([str(bin_ / "python"), "-c", program], env=clean, cwd=work)
        say(f"Python {version}: {name}: {(printed.strip() or 'written').splitlines()[-1]}", began)
    for line in COMMANDS:
        began = time.monotonic()
        run([str(bin_ / "cnnjax"), *line.split()], env=clean, cwd=work)
        say(f"Python {version}: cnnjax {line}", began)


def run(command: list[str], **options) -> str:
    """Returns what a command prints; where it fails, shows that and exits with its code."""
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if done.returncode:
        print(done.stdout, done.stderr, sep="\n", file=sys.stderr)
        print(f"failed: {' '.join(command)[:300]}", file=sys.stderr)
        raise SystemExit(done.returncode)
    return done.stdout


def say(text: str, began: float) -> None:
    """Prints a line with the seconds since `began`."""
    print(f"{text} ({time.monotonic() - began:.1f} s)", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
