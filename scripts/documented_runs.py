"""Runs what the guides show, shortened: for scripts/check_docs.py."""

import ast
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from documented import ROOT, Outcome, Shown

LONGEST_SECS = 600
# What makes a command take seconds.
SHORT = {
    "explain": "--check 16",
    "show-network": "--steps 8 --points 100 --channels 2",
    "compress": "--epochs 1",
    "export": "--check 32",
    "probe": "--labels 5",
    "search": "--trials 1 --epochs 1 --smoke",
    "cross-validate": "--folds 2 --repeats 1 --smoke",
    "population": "--smoke --epochs 1 --devices 1",
    "serve": "--port 0",
}
# What a line needs that is not here: a text of the line, and why it is not run.
NOT_HERE = {
    "tfds:": "data that are not shipped",
    "folder:": "the reader's own images",
    "fashion": "data that are not shipped",
    "cifar10": "data that are not shipped",
    "imagenet": "data that are not shipped",
    "resnet50.pth": "weights that are not shipped",
    "seresnet50": "weights that are not shipped",
    "lite0": "made by scripts/real_weights.py, hours",
    "LITE0": "made by scripts/real_weights.py, hours",
    "runs/resnet50": "weights that are not shipped",
    "runs/seresnet50": "weights that are not shipped",
    "model.keras": "weights that are not shipped",
    "onnxruntime-web": "an archive of npm's",
    "RUN/faulty": "a run of experiments.planted_fault",
    "FILE": "a file of the reader's",
    "SOURCE": "a file of the reader's",
    "FOLDER": "a folder of the reader's",
    "my_nets": "a network of the reader's",
    "--coordinator": "one process of several",
    "--concept": "the reader's own images",
    "-seed*": "runs of the reader's",
    "runs/a runs/b": "runs of the reader's",
    "resnet.onnx": "a file of the reader's",
    "stage3/block1/conv2": "a run of a residual network",
    "serve-reference": "a run that validates on 1,000 images",
    "HEAD:": "a cluster",
    "--ray": "a cluster",
    "--resume runs/population": "a population of the reader's",
    "python scripts/": "a study of minutes to hours",
    "python benchmarks/": "a benchmark of minutes to hours",
    "--resume runs/search": "a search of the reader's",
    "--search runs/search": "a search of the reader's",
}
# Runs that guides name, for which the prepared one stands.
NAMED = r"\bRUN[123]?\b|runs/(mine|mnist|mnist_lenet|lenet)(?=\s|$)"
# What a server says when it answers.
SERVING = "serving "


def run_blocks(blocks: Sequence[Shown], directory: Path) -> Iterator[Outcome]:
    """Prepares a directory with the runs that guides name, and runs the blocks in it.

    A block that imports a package that is missing here is left out.
    """
    runnable = []
    for block in blocks:
        missing = [name for name in _imported(block.text) if importlib.util.find_spec(name) is None]
        if missing:
            yield Outcome(block, f"left out (no {', '.join(missing)})", 0.0)
        else:
            runnable.append(block)
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "documented_names.py")],
        input=json.dumps([block.text for block in runnable]),
        cwd=directory,
        # What runs for a second is compiled for longer than that, unless in a hurry.
        env=os.environ
        | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": "--xla_backend_optimization_level=0"},
        capture_output=True,
        text=True,
    )
    prepared = Shown("prepared", "runs, weights and pictures that examples name")
    if done.returncode:
        yield Outcome(prepared, "prepared", 0.0, done.stderr)
        return
    answers = json.loads(done.stdout)
    yield Outcome(prepared, "prepared", *answers[0])
    for block, (seconds, problem) in zip(runnable, answers[1:], strict=True):
        yield Outcome(block, "run", seconds, problem)


def _imported(block: str) -> list[str]:
    nodes = list(ast.walk(ast.parse(block)))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    return sorted({name.partition(".")[0] for name in names})


def run_lines(lines: Sequence[Shown], directory: Path) -> Iterator[Outcome]:
    """Runs each command that can be run here, shortened, where `run_blocks` prepared its runs."""
    seen: set[str] = set()
    if lines:
        run = Shown("prepared", "python -m experiments.mnist_lenet --run-dir runs/shown --smoke")
        began = time.perf_counter()
        problem = _call([sys.executable, *shlex.split(run.text)[1:]], directory)
        yield Outcome(run, "prepared", time.perf_counter() - began, problem)
    for line in lines:
        words = shortened(line.text)
        text = " ".join(words)
        if not words or text in seen:
            continue
        seen.add(text)
        reason = next((why for part, why in NOT_HERE.items() if part in line.text), "")
        if reason:
            yield Outcome(line, f"not run ({reason})", 0.0)
            continue
        for out in ("runs/out", "page"):
            shutil.rmtree(directory / out, ignore_errors=True)
        began = time.perf_counter()
        problem = _call(words, directory)
        yield Outcome(Shown(line.where, text), "run", time.perf_counter() - began, problem)


def shortened(text: str) -> list[str]:
    """Returns a line's words as they are run: a smoke run, the prepared directory for RUN; [] if
    it is no command of ours."""
    text = re.sub(NAMED, "runs/shown", text).replace("...", "")
    if "--resume" not in text:  # What goes on stays where it is.
        text = re.sub(r"--(run-dir|out) runs/\S+", r"--\1 runs/out", text)
    # A smoke run has no more than a few steps.
    text = re.sub(r"--profile steps=\d+:\d+", "--profile steps=4:8", text)
    words = shlex.split(text)
    if words[:2] == ["python", "-m"] and words[2].startswith("experiments."):
        smoke = [] if "--smoke" in words else ["--smoke"]
        return [sys.executable, *words[1:], *smoke]
    if words[0] == "cnnjax":
        short = SHORT.get(words[1], "")
        if words[1] == "compress" and "--quantize" in words:
            short = ""  # Its epochs are part of the scheme.
        return [sys.executable, "-m", *words, *shlex.split(short)]
    return [sys.executable, *words[1:]] if words[0] == "python" else []


def _call(words: Sequence[str], directory: Path) -> str:
    """Runs a program; returns the end of what it said if it failed, "" otherwise.

    A server is asked to stop once it answers.
    """
    serves = words[1:4] == ["-m", "cnnjax", "serve"]
    said = directory / "said.txt"
    with said.open("w+", encoding="utf-8") as output:
        process = subprocess.Popen(
            words,
            cwd=directory,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        end = time.monotonic() + LONGEST_SECS
        while process.poll() is None and time.monotonic() < end:
            time.sleep(0.1)
            if serves and SERVING in said.read_text(encoding="utf-8"):
                process.terminate()
                serves = False
        if process.poll() is None:
            process.kill()
            process.wait()
            return f"it takes more than {LONGEST_SECS} s"
    return said.read_text(encoding="utf-8")[-2000:] if process.returncode else ""
