"""What this installation is, what is wrong with it, and how to mend each fault.

    cnnjax doctor
    cnnjax doctor --json > report.json       (for a report of a fault)
    cnnjax doctor --no-train --timeout 20    (starts JAX, trains nothing)

Prints versions, devices, memory, variables, directories and limits, trains LeNet-5 for a second on
each device, and says one line for each fault that it knows, with the mend. It runs where JAX does
not: JAX is tried in a process of its own. Exits with 1 if there is an error among the findings.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence

from cnnjax import commands
from cnnjax.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the report; returns the exit code.

    Raises:
      UserError: an unknown flag, or no time.
    """
    parser = commands.Parser(
        prog="cnnjax doctor",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print facts and findings as JSON")
    parser.add_argument(
        "--no-train", action="store_true", help="start JAX only, without the training check"
    )
    parser.add_argument(
        "--timeout", type=float, default=120.0, help="seconds that JAX gets to answer (120)"
    )
    options = parser.parse_args(argv)
    if not 0 < options.timeout < math.inf:
        raise UserError(f"--timeout {options.timeout:g}: give a number of seconds above 0.")
    from cnnjax.doctor import conflicts, facts, report

    found = facts.collect(train=not options.no_train, timeout_secs=options.timeout)
    findings = conflicts.find(found)
    if options.json:
        content = {**found, "findings": [each._asdict() for each in findings]}
        print(json.dumps(content, indent=2))
    else:
        print(report.text(found, findings))
    return int(any(each.level == "error" for each in findings))
