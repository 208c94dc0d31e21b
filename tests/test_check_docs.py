"""Commands and Python of the guides: what scripts/check_docs.py finds in them, and what it refuses.

All of it runs in CI: `python scripts/check_docs.py`.
"""

import sys
from pathlib import Path

import pytest

from cnnjax.errors import UserError

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

import check_docs
from documented import ROOT, Shown, flags_in_prose, python_blocks, shell_lines
from documented_runs import shortened

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


def test_a_command_is_shortened_to_a_smoke_run():
    words = shortened("python -m experiments.mnist_lenet --resume RUN")
    assert words[1:] == ["-m", "experiments.mnist_lenet", "--resume", "runs/shown", "--smoke"]
    words = shortened("cnnjax evaluate --run RUN1 RUN2 --calibrate")
    assert words[2:] == ["cnnjax", "evaluate", "--run", "runs/shown", "runs/shown", "--calibrate"]
    assert shortened("gcloud compute tpus") == []
