"""Does a run that is killed and resumed end as one that is not? Try it on your own experiment.

    cnnjax verify-resume experiments.mnist_lenet --smoke
    cnnjax verify-resume experiments.classify --kills 3 --kill-seed 7 \\
        --model cnn_32_64 --epochs 2 --save-every-steps 100

Trains once straight. Trains again, killed with SIGKILL at a random moment of the time that the
straight run took (imports, compilation, saving, evaluation and the end included) and started again
by the same command line, with `--resume`. Then compares every array of the last checkpoints bit by
bit, their metadata, every line of metrics, and the summaries without their seconds.

Exits with 0 if all is the same, 1 if anything differs, and 2 if it could not be tried.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from cnnjax import commands
from cnnjax.errors import UserError

# The flags that this command gives the experiment itself.
OWN_FLAGS = ("--run-dir", "--resume", "--stop-after-epochs")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs, kills, resumes and compares; returns the exit code.

    Raises:
      UserError: an unusable flag, or an experiment that fails.
    """
    options, experiment_argv = _parse(argv)
    # Not before: this imports JAX, which --help does without.
    from cnnjax.run.verify_resume import verify

    kills = {"kills": options.kills, "kill_seed": options.kill_seed}
    if options.directory is None:
        with tempfile.TemporaryDirectory(prefix="verify-resume-") as temporary:
            return int(not verify(options.experiment, experiment_argv, Path(temporary), **kills))
    directory = Path(options.directory)
    if directory.exists() and any(directory.iterdir()):
        raise UserError(f"--directory {directory} is not empty: choose another.")
    same = verify(options.experiment, experiment_argv, directory, **kills)
    print(f"both runs are in {directory}")
    return int(not same)


def _parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = commands.Parser(
        prog="cnnjax verify-resume",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="All other flags are the experiment's.",
    )
    parser.add_argument("experiment", help="a module, such as experiments.mnist_lenet")
    parser.add_argument("--kills", type=int, default=1, help="kills in a row (1)")
    parser.add_argument("--kill-seed", type=int, default=0, help="draws the moments (0)")
    parser.add_argument("--directory", help="keep both runs there (a temporary directory)")
    options, rest = parser.parse_both(argv, OWN_FLAGS)
    if options.kills < 1:
        raise UserError(f"--kills {options.kills}: use 1 or more.")
    return options, rest
