"""Train a classifier, as python -m experiments.classify does: for who has the package alone.

    cnnjax train                                         (a small network, on the shipped MNIST)
    cnnjax train --model resnet18 --dataset folder:photos --image-size 64
    cnnjax train --model my_nets:Net --epochs 20 --run-dir runs/mine
    cnnjax train --resume runs/mine

The flags are those of every experiment, with the same meaning. The run is one of
experiments.classify: each of the two resumes what the other started.
"""

from collections.abc import Sequence

from cnnjax.run import classifier, cli, settings


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, resumes or prints help; exits with the run's code."""
    flags = list(argv or ())
    if {"-h", "--help"} & set(flags):
        cli.parse(classifier.Config, flags, program="cnnjax train", description=__doc__)
    settings.launch(classifier.Config, classifier.main, flags)
