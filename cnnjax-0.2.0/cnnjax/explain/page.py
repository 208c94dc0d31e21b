"""One HTML page of maps: self-contained, without a server, a click for each class and layer."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cnnjax.explain.markup import STYLE, filled, png, uri

# Values above this quantile of a map's absolute values have the full color.
QUANTILE = 0.995
RED, BLUE = np.array([0.84, 0.19, 0.15]), np.array([0.13, 0.40, 0.67])


class Picture(NamedTuple):
    """One image, what the network answers, and its maps.

    Attributes:
      title: such as the file's name.
      image: uint8 `[height, width, 1 or 3]`, as the network sees it.
      answers: (class, probability) of each class that is explained, the likeliest first.
      maps: a map `[height, width]` by method, layer ("" for methods without) and place in
        `answers`.
    """

    title: str
    image: np.ndarray
    answers: Sequence[tuple[str, float]]
    maps: dict[tuple[str, str, int], np.ndarray]


class Table(NamedTuple):
    """A table under the pictures.

    Attributes:
      heading: its title.
      meaning: what it says.
      rows: name -> text; a `verdict` that is not empty marks a row.
    """

    heading: str
    meaning: str
    rows: Sequence[dict[str, Any]]


def painted(image: np.ndarray, map_: np.ndarray) -> np.ndarray:
    """Returns uint8 `[height, width, 3]`: the image in gray, red where the map speaks for, blue
    against; each map has its own scale."""
    gray = image.mean(-1, keepdims=True) / 255
    # Pale, so that both colors are seen on black and on white.
    pale = 0.35 + 0.5 * gray
    map_ = np.nan_to_num(np.asarray(map_, np.float64))
    largest = np.quantile(np.abs(map_), QUANTILE) or np.abs(map_).max() or 1.0
    strength = np.clip(map_ / largest, -1, 1)[..., None]
    color = np.where(strength > 0, RED, BLUE)
    mixed = pale * (1 - np.abs(strength)) + color * np.abs(strength)
    return np.round(255 * mixed).astype(np.uint8)


def write_pictures(pictures: Sequence[Picture], directory: Path) -> list[Path]:
    """Writes each image with the maps of its likeliest class, one PNG beside the other.

    Returns:
      The paths, `0.png`, `1.png` ... in `directory`.
    """
    paths = []
    for number, picture in enumerate(pictures):
        tiles = [np.broadcast_to(picture.image, (*picture.image.shape[:2], 3))]
        tiles += [
            painted(picture.image, map_)
            for (_, _, place), map_ in picture.maps.items()
            if place == 0
        ]
        gap = np.full((picture.image.shape[0], 2, 3), 255, np.uint8)
        row = np.concatenate([part for tile in tiles for part in (tile, gap)][:-1], 1)
        path = directory / f"{number}.png"
        path.write_bytes(png(np.ascontiguousarray(row), 160 * len(tiles)))
        paths.append(path)
    return paths


def write_page(
    path: Path,
    pictures: Sequence[Picture],
    *,
    heading: str,
    facts: Sequence[str] = (),
    tables: Sequence[Table] = (),
) -> Path:
    """Writes the page.

    Args:
      path: of the HTML file.
      pictures: all with the same methods and layers.
      heading: the title.
      facts: lines under it.
      tables: such as that of the checks.
    """
    methods = list(dict.fromkeys(method for method, _, _ in pictures[0].maps))
    layers = list(dict.fromkeys(layer for _, layer, _ in pictures[0].maps if layer))
    content = "\n".join(_figure(number, picture) for number, picture in enumerate(pictures))
    buttons = ""
    if len(layers) > 1:
        buttons = '<p class="layers">Layer: ' + "".join(
            f'<button data-layer="{number}">{html.escape(layer)}</button>'
            for number, layer in enumerate(layers)
        )
    data = [
        {
            f"{methods.index(method)},{layers.index(layer) if layer else -1},{place}": uri(
                png(painted(picture.image, map_), 160)
            )
            for (method, layer, place), map_ in picture.maps.items()
        }
        for picture in pictures
    ]
    values = {
        "TITLE": html.escape(heading),
        "STYLE": STYLE,
        "FACTS": "".join(f"<p>{html.escape(line)}</p>" for line in facts),
        "TABLE": "".join(map(_table, tables)),
        "LAYERS": buttons,
        "FIGURES": content,
        "METHODS": json.dumps(methods).replace("<", "\\u003c"),
        "DATA": json.dumps(data),
        "LAYER": str(len(layers) - 1),
    }
    path.write_text(filled(_PAGE, values), encoding="utf-8")
    return path


def _figure(number: int, picture: Picture) -> str:
    classes = "".join(
        f'<button data-place="{place}">{html.escape(name)} {probability:.1%}</button>'
        for place, (name, probability) in enumerate(picture.answers)
    )
    methods = dict.fromkeys(method for method, _, _ in picture.maps)
    maps = "".join(
        f'<figure><img alt="{html.escape(method)}" data-method="{place}">'
        f"<figcaption>{html.escape(method)}</figcaption></figure>"
        for place, method in enumerate(methods)
    )
    whole = f'<img alt="image" src="{uri(png(picture.image, 160))}">'
    title = html.escape(picture.title)
    return (
        f'<section data-picture="{number}"><h2>{title}</h2><p class="classes">{classes}</p>'
        f'<div class="maps"><figure>{whole}<figcaption>image</figcaption></figure>{maps}</div>'
        "</section>"
    )


def _table(table: Table) -> str:
    names = [name for name in table.rows[0] if name != "verdict"]
    head = "".join(f"<th>{html.escape(name.replace('_', ' '))}</th>" for name in (*names, ""))
    body = "".join(
        f"<tr{' class=fails' if row.get('verdict') else ''}>"
        + "".join(f"<td>{html.escape(str(row.get(name, '')))}</td>" for name in (*names, "verdict"))
        + "</tr>"
        for row in table.rows
    )
    text = f"<h2>{html.escape(table.heading)}</h2><p>{html.escape(table.meaning)}</p>"
    return f"{text}<table><tr>{head}</tr>{body}</table>"


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>@TITLE@</title>
<style>
@STYLE@
.maps { display: flex; flex-wrap: wrap; gap: .6rem; }
figure { margin: 0; } figcaption { font-size: .8rem; max-width: 140px; overflow-wrap: anywhere; }
img { width: 140px; height: auto; image-rendering: pixelated; display: block; }
td:first-child, td:last-child { text-align: left; }
td { white-space: nowrap; } tr.fails { color: #d55e00; }
</style></head><body>
<h1>@TITLE@</h1>@FACTS@@LAYERS@
@FIGURES@
@TABLE@
<script>
const methods = @METHODS@, data = @DATA@;
const layers = document.querySelectorAll("[data-layer]");
let layer = @LAYER@;
function mark(buttons, chosen) {
  buttons.forEach((button, index) => button.classList.toggle("on", index === chosen));
}
function draw(section) {
  const place = Number(section.dataset.place), maps = data[Number(section.dataset.picture)];
  mark(section.querySelectorAll("[data-place]"), place);
  section.querySelectorAll("[data-method]").forEach((image) => {
    const method = image.dataset.method;
    image.src = maps[`${method},${layer},${place}`] || maps[`${method},-1,${place}`];
  });
}
function drawAll() {
  mark(layers, layer);
  document.querySelectorAll("section").forEach(draw);
}
document.querySelectorAll("section").forEach((section) => {
  section.dataset.place = "0";
  section.querySelectorAll("button[data-place]").forEach((button) =>
    button.addEventListener("click", () => {
      section.dataset.place = button.dataset.place;
      draw(section);
    }));
});
layers.forEach((button, index) => button.addEventListener("click", () => {
  layer = index;
  drawAll();
}));
drawAll();
</script></body></html>
"""
