"""One HTML page of a network: its layers to click through, its neurons, its test images as points.

Self-contained: it opens without a server or network.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from cnnjax.explain.inside import views
from cnnjax.explain.inside.views import Channel, Layer, Points
from cnnjax.explain.markup import STYLE, filled, png, uri
from cnnjax.plots.embedding import class_palette

# Of a map of points.
SIDE = 420
MARGIN = 12


def write_page(
    path: Path,
    layers: Sequence[Layer],
    *,
    heading: str,
    facts: Sequence[str] = (),
    classes: Sequence[tuple[str, bytes]] = (),
    rows: Mapping[str, Mapping[str, str]] | None = None,
    meaning: str = "",
    points: Points | None = None,
) -> Path:
    """Writes the page.

    Args:
      path: of the HTML file.
      layers: in the order of computation.
      heading: the title.
      facts: lines under it.
      classes: (name, PNG) of the images that were optimized for classes.
      rows: of the table of neurons: layer -> name -> text.
      meaning: what the table means.
      points: of test images.
    """
    buttons = "".join(
        f'<button data-layer="{number}">{html.escape(layer.name)}</button>'
        for number, layer in enumerate(layers)
    )
    values = {
        "TITLE": html.escape(heading),
        "STYLE": STYLE,
        "FACTS": "".join(f"<p>{html.escape(line)}</p>" for line in facts),
        "BUTTONS": f"<p>Layer: {buttons}</p>",
        "LAYERS": "\n".join(_layer(number, layer) for number, layer in enumerate(layers)),
        "CLASSES": _classes(classes),
        "TABLE": _table(rows or {}, meaning),
        "POINTS": _points(points) if points else "",
        "DATA": _data(points),
    }
    path.write_text(filled(_PAGE, values), encoding="utf-8")
    return path


def _picture(content: bytes, caption: str, kind: str) -> str:
    text = html.escape(caption)
    image = f'<img class="{kind}" alt="{text}" src="{uri(content)}">'
    return f"<figure>{image}<figcaption>{text}</figcaption></figure>"


def _layer(number: int, layer: Layer) -> str:
    facts = "".join(f"<li>{html.escape(fact)}</li>" for fact in layer.facts)
    pictures = "".join(_picture(content, caption, "whole") for caption, content in layer.pictures)
    channels = "".join(map(_channel, layer.channels))
    if channels:
        channels = f'<h3>Channels</h3><div class="channels">{channels}</div>'
    name = html.escape(layer.name)
    return (
        f'<section data-of="{number}"><h2>{name}</h2><ul>{facts}</ul>'
        f'<div class="row">{pictures}</div>{channels}</section>'
    )


def _channel(channel: Channel) -> str:
    pictures = [
        _picture(content, caption, kind)
        for content, caption, kind in (
            (channel.crops, "what it responds to most", "crops"),
            (channel.made, "made for it", "made"),
        )
        if content
    ]
    text = f"<b>{channel.number}</b> {html.escape(channel.text)}"
    return f'<div class="channel"><p>{text}</p><div class="row">{"".join(pictures)}</div></div>'


def _classes(classes: Sequence[tuple[str, bytes]]) -> str:
    if not classes:
        return ""
    pictures = "".join(_picture(content, name, "made") for name, content in classes)
    return f'<h2>Images made for classes</h2><div class="row">{pictures}</div>'


def _table(rows: Mapping[str, Mapping[str, str]], meaning: str) -> str:
    if not rows:
        return ""
    names = list(next(iter(rows.values())))
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("layer", *names))
    body = "".join(
        "<tr>"
        + "".join(f"<td>{html.escape(text)}</td>" for text in (layer, *cells.values()))
        + "</tr>"
        for layer, cells in rows.items()
    )
    text = f"<h2>Neurons</h2><p>{html.escape(meaning)}</p>"
    return f"{text}<table><tr>{head}</tr>{body}</table>"


def _points(points: Points) -> str:
    predicted = points.label if points.predicted is None else points.predicted
    wrong = points.label != predicted
    told = f"{int(wrong.sum())} wrong (with a dark edge)"
    if points.predicted is None:
        told = "whose classes are not the network's"
    colors = class_palette(len(points.class_names))
    buttons = "".join(
        f'<button data-map="{number}">{html.escape(name)}</button>'
        for number, name in enumerate(points.maps)
    )
    legend = "".join(
        f'<span><i style="background:{_color(color)}"></i>{html.escape(name)}</span>'
        for name, color in list(zip(points.class_names, colors, strict=True))[:30]
    )
    # The wrong ones last, that none hides them.
    circles = "".join(
        f'<circle data-image="{number}" r="{5 if wrong[number] else 3}" '
        f'class="{"wrong" if wrong[number] else ""}" '
        f'fill="{_color(colors[points.label[number]])}"/>'
        for number in np.argsort(wrong, kind="stable")
    )
    side = SIDE + 2 * MARGIN
    return (
        f"<h2>Test images as points</h2><p>{len(wrong)} test images, {told}. "
        "Point at one to see it; a click keeps it.</p>"
        f'<p>{buttons}</p><div class="row"><svg viewBox="0 0 {side} {side}" width="{side}" '
        f'height="{side}">{circles}</svg><figure><div id="seen"></div>'
        f'<figcaption id="told"></figcaption></figure></div><p class="legend">{legend}</p>'
    )


def _data(points: Points | None) -> str:
    if points is None:
        return "null"
    count, height, width, _ = points.thumbnails.shape
    columns = math.ceil(math.sqrt(count))
    names = [str(name) for name in points.class_names]
    predicted = points.label if points.predicted is None else points.predicted
    data = {
        "maps": [_scaled(each).tolist() for each in points.maps.values()],
        "text": [
            f"{names[label]}" if label == found else f"{names[label]}, taken for {names[found]}"
            for label, found in zip(points.label, predicted, strict=True)
        ],
        "sheet": uri(png(views.sprites(points.thumbnails, columns))),
        "columns": columns,
        "size": [width, height],
    }
    return json.dumps(data).replace("<", "\\u003c")


def _scaled(points: np.ndarray) -> np.ndarray:
    """Returns points within the picture, each axis to its own range."""
    low, high = points.min(0), points.max(0)
    share = (points - low) / np.where(high > low, high - low, 1)
    return np.round(MARGIN + SIDE * np.stack([share[:, 0], 1 - share[:, 1]], 1), 1)


def _color(color: Sequence[float]) -> str:
    return "#" + "".join(f"{round(255 * value):02x}" for value in color[:3])


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>@TITLE@</title>
<style>
@STYLE@
h3 { font-size: .95rem; margin: 1rem 0 .2rem; }
ul { margin: .2rem 0 .6rem; padding-left: 1.2rem; }
.row { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; }
figure { margin: 0; } figcaption { font-size: .8rem; max-width: 30rem; overflow-wrap: anywhere; }
img { display: block; max-width: 100%; }
img.whole { max-height: 24rem; }
img.made, img.crops { height: 7.5rem; image-rendering: pixelated; }
img.crops { object-fit: contain; object-position: left; }
.channels { display: flex; flex-wrap: wrap; gap: .8rem 1.6rem; }
.channel p { margin: .2rem 0; font-size: .85rem; }
td:first-child { text-align: left; }
svg { border: 1px solid #8888; max-width: 100%; height: auto; }
circle { cursor: pointer; } circle.wrong { stroke: CanvasText; stroke-width: 2; }
circle.on { stroke: #d55e00; stroke-width: 4; }
#seen { image-rendering: pixelated; border: 1px solid #8888; }
.legend span { margin-right: .9rem; white-space: nowrap; font-size: .85rem; }
.legend i { display: inline-block; width: .7rem; height: .7rem; margin-right: .3rem; }
</style></head><body>
<h1>@TITLE@</h1>@FACTS@
@BUTTONS@
@LAYERS@
@CLASSES@
@TABLE@
@POINTS@
<script>
const points = @DATA@;
const all = (selector) => [...document.querySelectorAll(selector)];
function choose(buttons, chosen) {
  buttons.forEach((button, index) => button.classList.toggle("on", index === chosen));
}
const layers = all("button[data-layer]");
function show(layer) {
  choose(layers, layer);
  all("section").forEach((section, index) => { section.hidden = index !== layer; });
}
layers.forEach((button, index) => button.addEventListener("click", () => show(index)));
show(layers.length - 1);
if (points) {
  const circles = all("circle"), maps = all("button[data-map]");
  const seen = document.getElementById("seen"), told = document.getElementById("told");
  const [width, height] = points.size, factor = Math.max(1, Math.floor(200 / width));
  let kept = null;
  const arrange = (map) => {
    choose(maps, map);
    circles.forEach((circle) => {
      const [x, y] = points.maps[map][circle.dataset.image];
      circle.setAttribute("cx", x);
      circle.setAttribute("cy", y);
    });
  };
  const look = (circle) => {
    const image = Number(circle.dataset.image);
    const rows = Math.ceil(points.text.length / points.columns);
    const column = image % points.columns, row = Math.floor(image / points.columns);
    seen.style.width = `${width * factor}px`;
    seen.style.height = `${height * factor}px`;
    seen.style.backgroundImage = `url(${points.sheet})`;
    const across = points.columns * width * factor, down = rows * height * factor;
    seen.style.backgroundSize = `${across}px ${down}px`;
    const left = column * width * factor, top = row * height * factor;
    seen.style.backgroundPosition = `-${left}px -${top}px`;
    told.textContent = `test image ${image}: ${points.text[image]}`;
    circles.forEach((other) => other.classList.toggle("on", other === circle));
  };
  circles.forEach((circle) => {
    circle.addEventListener("mouseover", () => { if (!kept) look(circle); });
    circle.addEventListener("click", () => {
      kept = kept === circle ? null : circle;
      look(circle);
    });
  });
  maps.forEach((button, index) => button.addEventListener("click", () => arrange(index)));
  arrange(maps.length - 1);
  look(circles[circles.length - 1]);
}
</script></body></html>
"""
