"""Facts and findings as text for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cnnjax.doctor.conflicts import Finding

_LABELS = {
    "compile cache": "cache",
    "datasets": "datasets",
    "runs": "runs",
    "temporary files": "temporary",
}


def text(facts: dict[str, Any], findings: Sequence[Finding]) -> str:
    """Returns the report: a line for each fact, then each finding with its mend."""
    python, machine = facts["python"], facts["host"]
    limit = machine["descriptors_limit"]
    lines = [
        f"cnnjax       {facts['cnnjax']['version']} in {facts['cnnjax']['location']}",
        f"python       {python['version']} ({python['executable']}), {python['platform']}",
        f"packages     {_packages(facts)}",
        f"processor    {machine['processor']}, {machine['cores']} cores to use",
        f"memory       {_size(machine['memory_available_bytes'])} free of "
        f"{_size(machine['memory_bytes'])}",
        f"files        {machine['descriptors'] or 'any number'} open at a time "
        f"(at most {limit or 'any number'})",
    ]
    lines += [_gpu(each) for each in facts["gpus"]]
    lines += [f"TPU          {path}" for path in facts["tpu_chips"]]
    lines += [f"{_LABELS[each['what']]:<12} {_directory(each)}" for each in facts["directories"]]
    lines.append(f"prepared     {', '.join(facts['datasets'])}")
    lines += [f"variable     {name}={value}" for name, value in facts["variables"].items()]
    lines += _probe(facts["probe"])
    lines.append("")
    for each in findings:
        lines += [f"{each.level}: {each.text}", f"  mend: {each.mend}"]
    errors = sum(each.level == "error" for each in findings)
    warnings = len(findings) - errors
    lines.append(
        f"{errors} error{'s' * (errors != 1)}, {warnings} warning{'s' * (warnings != 1)}"
        if findings
        else "nothing is wrong"
    )
    return "\n".join(lines)


def _packages(facts: dict[str, Any]) -> str:
    named = [f"{name} {copies[0]['version']}" for name, copies in facts["packages"].items()]
    return ", ".join(named) or "none of those that are needed"


def _gpu(gpu: dict[str, Any]) -> str:
    used, total = gpu["used_mb"] or 0, gpu["total_mb"] or 0
    return (
        f"GPU          {gpu['name']}, driver {gpu['driver']}, {used:,.0f} of {total:,.0f} MB used"
    )


def _directory(each: dict[str, Any]) -> str:
    state = "there" if each["exists"] else "not made yet"
    state += "" if each["writable"] else ", read-only"
    return f"{each['path']} ({state}, {_size(each['free_bytes'])} free)"


def _probe(probe: dict[str, Any]) -> list[str]:
    lines = []
    for stage in probe["stages"]:
        name = stage["stage"]
        lines.append(f"check        {name}: {stage['seconds']:.1f} s")
        for each in stage.get("devices", ()):
            memory = f", {_size(each['memory_bytes'])}" if each["memory_bytes"] else ""
            lines.append(f"device       {each['platform']}:{each['id']} {each['kind']}{memory}")
        for each in stage.get("training", ()):
            lines.append(
                f"trained      {each['device']}: {each['images_per_sec']:,} images/s of LeNet-5, "
                f"loss {each['first_loss']:.3f} to {each['last_loss']:.3f} in {each['steps']} "
                f"steps, compiled in {each['compile_secs']:.1f} s"
            )
    if probe["failed"]:
        how = "was ended" if probe["exit_code"] is None else f"exit code {probe['exit_code']}"
        lines.append(f"check        {probe['failed']}: FAILED ({how})")
    return lines


def _size(count: float | None) -> str:
    if count is None:
        return "unknown"
    return f"{count / 1e9:,.1f} GB"
