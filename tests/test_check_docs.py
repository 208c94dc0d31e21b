"""Commands and Python of the guides: what scripts/check_docs.py finds in them, and what it refuses.

All of it runs in CI: `python scripts/check_docs.py`.
"""

import sys
from pathlib import Path

import pytest

from cnnjax.errors import UserError

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

import check_docs
import documented_links
from documented import ROOT, Shown, flags_in_prose, python_blocks, shell_lines
from documented_links import anchors, check_link, linked_files, links
from documented_runs import run_lines, shortened

GUIDE = """# A guide

Text with `--epochs 3` and `cnnjax predict --top 2`, and `--no-such-flag`;
`tensorboard --logdir runs`.

    cnnjax predict --run RUN digit.png    # a comment
    python -m experiments.mnist_lenet \\
        --epochs 3
    pip install -e . && python scripts/chaos.py > report.txt
    epoch 1: what a program printed

```bash
cnnjax models 'resnet*'
```

```python
x = 1  # cnnjax predict
```

    cnnjax models NAME
"""


@pytest.fixture
def guide(tmp_path):
    path = tmp_path / "guide.md"
    path.write_text(GUIDE)
    return path


def test_lines_of_the_shell_are_found_and_joined(guide):
    assert [(line.where, line.text) for line in shell_lines(guide)] == [
        ("guide.md:6", "cnnjax predict --run RUN digit.png"),
        ("guide.md:7", "python -m experiments.mnist_lenet --epochs 3"),
        ("guide.md:9", "pip install -e ."),
        ("guide.md:9", "python scripts/chaos.py"),
        ("guide.md:13", "cnnjax models 'resnet*'"),
        ("guide.md:20", "cnnjax models NAME"),
    ]


def test_python_and_flags_in_prose_are_found(guide):
    assert [block.text for block in python_blocks(guide)] == ["x = 1  # cnnjax predict\n"]
    assert [flag.text for flag in flags_in_prose(guide)] == ["--epochs", "--top", "--no-such-flag"]


@pytest.mark.parametrize(
    "text",
    [
        "cnnjax predict --run RUN digit.png --top 2",
        "cnnjax search experiments.mnist_lenet --trials 30 --epochs 3",
        "cnnjax cross-validate experiments.digits_mlp --against '--learning-rate 0.01'",
        "RUN=/a sbatch scripts/launch/slurm.sbatch experiments.classify --model resnet18",
        "srun python -m experiments.mnist_lenet --epochs 2",
        "cnnjax convert SOURCE --model NAME --out RUN [--framework torchvision|timm]",
        "python scripts/prepare_data.py --help",
        "python benchmarks/saving.py",
    ],
)
def test_what_a_parser_takes_passes(text, capsys):
    assert check_docs.checked(Shown("guide.md:1", text)) == "parsed"
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("cnnjax predict --run RUN digit.png --topp 2", "--topp"),
        ("cnnjax predikt --run RUN", "there is no command predikt"),
        ("cnnjax explain --run RUN --top many", "many"),
        ("cnnjax verify-resume experiments.mnist_lenet --kils 2", "--kils"),
        ("cnnjax cross-validate experiments.digits_mlp --against '--learning-rat 1'", "learning"),
        ("python -m experiments.mnist_lenet --epoch 3", "--epoch"),
        ("python scripts/no_such.py", "there is no scripts/no_such.py"),
        ("python scripts/prepare_data.py mnist --no-such", "--no-such"),
        ("python benchmarks/saving.py --no-such", "--no-such"),
    ],
)
def test_what_a_parser_does_not_take_is_refused(text, problem):
    with pytest.raises(UserError) as error:
        check_docs.checked(Shown("guide.md:1", text))
    assert problem in str(error.value)


def test_flags_in_prose_must_be_some_command_s(guide):
    known = check_docs.known_flags()
    unknown = [flag.text for flag in flags_in_prose(guide) if flag.text not in known]
    assert unknown == ["--no-such-flag"]


@pytest.mark.parametrize("line", shell_lines(ROOT / "README.md"), ids=lambda line: line.text)
def test_every_command_of_the_readme_parses(line):
    assert check_docs.checked(line) in ("parsed", "not ours")


def test_what_goes_on_stays_where_it_is_and_a_profile_is_of_steps_that_there_are():
    line = "python -m experiments.mnist_lenet --profile steps=100:200 --run-dir RUN"
    assert shortened(line)[-4:] == ["steps=4:8", "--run-dir", "runs/out", "--smoke"]
    line = "python -m experiments.mnist_lenet --run-dir runs/mnist"
    assert shortened(line)[-2:] == ["runs/out", "--smoke"]
    words = shortened(f"{line} --resume runs/mnist")
    assert words[-5:] == ["--run-dir", "runs/shown", "--resume", "runs/shown", "--smoke"]


def test_a_command_is_shortened_to_a_smoke_run():
    words = shortened("python -m experiments.mnist_lenet --resume RUN")
    assert words[1:] == ["-m", "experiments.mnist_lenet", "--resume", "runs/shown", "--smoke"]
    words = shortened("cnnjax evaluate --run RUN1 RUN2 --calibrate")
    assert words[2:] == ["cnnjax", "evaluate", "--run", "runs/shown", "runs/shown", "--calibrate"]
    assert shortened("gcloud compute tpus") == []
    words = shortened('cnnjax compress --run RUN --quantize "int8(samples=5)" --out runs/int8')
    assert words[-2:] == ["--out", "runs/out"]
    assert shortened("cnnjax compress --run RUN --prune x --out y")[-2:] == ["--epochs", "1"]


def test_servers_are_asked_to_stop_once_they_answer(tmp_path, monkeypatch):
    script = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(CODE))\n"
        "print('serving      digits at http://127.0.0.1:1/', flush=True)\n"
        "time.sleep(60)\n"
    )
    # A program of another's name in the place of the package.
    package = tmp_path / "cnnjax"
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.setattr("documented_runs.ROOT", tmp_path)
    for code, said in ((0, ""), (3, "serving      digits")):
        (package / "__main__.py").write_text(script.replace("CODE", str(code)))
        line = Shown("docs/serve.md:1", "cnnjax serve --run RUN")
        outcome = list(run_lines([line], tmp_path))[-1]
        assert (outcome.how, outcome.problem[: len(said)]) == ("run", said)
        assert bool(outcome.problem) == bool(code) and outcome.seconds < 30


LINKED = """# A guide: what it's about

See [here](#a-guide-what-its-about), [there](#nowhere), [a file](other.md#two-words),
[gone](none.md), [![picture](none.png)](https://example.org/a_(b)), [nobody](https:///x),
`[code](none.py)`.

    [indented](none.py)
"""


def test_links_must_lead_somewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(documented_links, "ROOT", tmp_path)
    (tmp_path / "other.md").write_text("## Two *words*\n\n```\n# no heading\n```\n## Two words\n")
    guide = tmp_path / "guide.md"
    guide.write_text(LINKED)
    assert anchors(tmp_path / "other.md") == {"two-words", "two-words-1"}
    found = {}
    for link in links(guide):
        try:
            found[link.text] = check_link(link)
        except UserError as error:
            found[link.text] = str(error)
    assert found == {
        "#a-guide-what-its-about": "link",
        "#nowhere": "unknown heading of guide.md 'nowhere': choose from a-guide-what-its-about.",
        "other.md#two-words": "link",
        "none.md": "there is no none.md beside guide.md",
        "https://example.org/a_(b)": "link",
        "https:///x": "https:///x has no host",
    }


def test_every_link_of_guides_and_notebooks_leads_somewhere():
    found = [link for path in linked_files() for link in links(path)]
    assert {link.where.partition(":")[0] for link in found} >= {"README.md", "docs/tpu.md"}
    for link in found:
        assert check_link(link) == "link"
