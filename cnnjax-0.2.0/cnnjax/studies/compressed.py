"""What compressing made of a run: sizes, scores, times, layer by layer; as facts and as text."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cnnjax.compress import speed
from cnnjax.models.summary import summary
from cnnjax.paths import read_text
from cnnjax.run import files, report
from cnnjax.studies.compressing import Smaller
from cnnjax.trees import count_parameters, named_leaves

PyTree = Any
BATCHES = (64, 1)
HEADING = "## Compression"


def facts(
    before: tuple[Any, PyTree],
    after: tuple[Any, PyTree],
    image_shape: tuple[int, int, int],
    *,
    done: Mapping[str, Any],
    sizes: tuple[int, int],
    scores: tuple[Mapping[str, Any], Mapping[str, Any]],
    now: Smaller,
) -> dict[str, Any]:
    """Returns what `model.json` records of one compression.

    Args:
      before, after: model and variables.
      image_shape: `[height, width, channels]`.
      done: what was asked.
      sizes: bytes on disk, before and after.
      scores: split -> scores, before and after; {} where the images are not known.
      now: what was done to the network.
    """
    forms = [summary(model, image_shape) for model, _ in (before, after)]
    networks = {"before": before, "after": after}
    nonzero = sum(int(np.count_nonzero(leaf)) for leaf in named_leaves(after[1]["params"]).values())
    return {
        **done,
        "parameters": [count_parameters(variables["params"]) for _, variables in (before, after)],
        "nonzero_parameters": nonzero,
        "macs": [form.macs for form in forms],
        "bytes": list(sizes),
        "scores": list(scores),
        "milliseconds": {
            str(batch): speed.milliseconds(networks, image_shape, batch) for batch in BATCHES
        },
        "layers": _layers(forms[0], forms[1], after[1]["params"]),
        "low_rank_layers": [dataclasses.asdict(row) for row in now.factored],
    }


def _layers(old: Any, new: Any, params: PyTree) -> list[dict[str, Any]]:
    """Returns the layers with a kernel: what they were, and what is left."""
    leaves = named_leaves(params)
    known = {row.path: row for row in old.rows}
    rows = []
    for row in new.rows:
        kernel = leaves.get(f"{row.path}/kernel")
        if kernel is None:
            continue
        was = known.get(row.path)
        rows.append(
            {
                "layer": row.path,
                "features": [was.output_shape[-1] if was else None, row.output_shape[-1]],
                "weights": int(kernel.size),
                "nonzero": int(np.count_nonzero(kernel)),
                "macs": row.macs,
            }
        )
    return rows


def text(found: Mapping[str, Any]) -> str:
    """Returns the facts as lines: what was done, the totals, then the layers."""
    lines = [f"{name:12} {found[name]}" for name in ("prune", "low_rank") if found.get(name)]
    lines += [_change("parameters", found["parameters"], "{:,}")]
    whole, left = found["parameters"][1], found["nonzero_parameters"]
    lines += [f"{'not zero':12} {left:,} ({1 - left / whole:.1%} are zero)"]
    lines += [_change("MACs", found["macs"], "{:,}"), _change("bytes", found["bytes"], "{:,}")]
    for batch, times in found["milliseconds"].items():
        pair = [times["before"], times["after"]]
        lines.append(_change(f"ms, batch {batch}", pair, "{:.3f}"))
    before, after = found["scores"]
    for split in after:
        pair = [before[split]["accuracy"], after[split]["accuracy"]]
        points = f"{100 * (pair[1] - pair[0]):+.2f} points"
        lines.append(f"{split:12} accuracy {pair[0]:.2%} -> {pair[1]:.2%} ({points})")
    if not after:
        lines.append("accuracy     unknown: name images with --dataset")
    width = max((len(row["layer"]) for row in found["layers"]), default=0)
    lines.append("")
    for row in found["layers"]:
        was, now = row["features"]
        features = f"{now} features" if was in (None, now) else f"{now} of {was} features"
        sparsity = 1 - row["nonzero"] / row["weights"]
        lines.append(
            f"{row['layer']:{width}}  {features:>20}  {row['weights']:>10,} weights  "
            f"{sparsity:6.1%} zero  {row['macs']:>12,} MACs"
        )
    return "\n".join(lines)


def _change(name: str, pair: list[Any], form: str) -> str:
    old, new = pair
    times = f"{old / new:.2f} times less" if new and old >= new else f"{new / old:.2f} times more"
    return f"{name:12} {form.format(old)} -> {form.format(new)} ({times})"


def write(directory: Path, found: Mapping[str, Any], earlier: list[Any]) -> None:
    """Adds the facts to `model.json`, and to the summary that training wrote."""
    card = files.read_json(directory / "model.json", f"{directory} is damaged")
    # What was averaged is now the parameters themselves.
    card |= {"compression": [*earlier, dict(found)], "parameters_averaged": False}
    files.write_json(directory / "model.json", card)
    path = directory / "summary.md"
    whole = read_text(path, "summary").partition(HEADING)[0].rstrip()
    figures = "".join(
        f"\n![{name}](figures/{name}.png)\n"
        for name in ("sensitivity",)
        if (directory / "figures" / f"{name}.png").exists()
    )
    path.write_text(f"{whole}\n\n{HEADING}\n\n```\n{text(found)}\n```\n{figures}", encoding="utf-8")


def write_summary(directory: Path, found: Mapping[str, Any], summary_of: dict[str, Any]) -> None:
    """Writes the summary of a run that was not trained."""
    after = found["scores"][1]
    test = {f"test_{name}": value for name, value in after.get("test", {}).items()}
    content = {
        **summary_of,
        **test,
        "monitor": "accuracy",
        "parameters": found["parameters"][1],
        "ended": "compressed",
    }
    if test:
        report.write_summary(directory, content, "Compressed, and not trained again.")
        return
    heading = f"# {content['experiment']}: not scored, because its images are not known\n"
    (directory / "summary.md").write_text(heading, encoding="utf-8")
    files.write_json(directory / "summary.json", content)
