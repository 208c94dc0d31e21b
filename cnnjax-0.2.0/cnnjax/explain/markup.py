"""What the pages share: pictures within them, their style, and templates."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping

import numpy as np

STYLE = """:root { color-scheme: light dark; }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 80rem; }
body { margin: 1.5rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.05rem; margin: 1.6rem 0 .3rem; }
button { font: inherit; margin: 0 .3rem .3rem 0; padding: .1rem .6rem; cursor: pointer; }
button.on { background: #0072b2; color: white; border-color: #0072b2; }
table { border-collapse: collapse; } th, td { text-align: right; padding: .15rem .7rem; }"""


def png(pixels: np.ndarray, side: int = 0) -> bytes:
    """Returns a PNG file of uint8 pixels; enlarged without smoothing to about `side` pixels."""
    from PIL import Image

    picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    factor = max(1, side // max(picture.size))
    if factor > 1:
        picture = picture.resize(
            (picture.width * factor, picture.height * factor), Image.Resampling.NEAREST
        )
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return file.getvalue()


def uri(content: bytes) -> str:
    """Returns the address that a PNG file has within a page."""
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def filled(template: str, values: Mapping[str, str]) -> str:
    """Returns a template in which `@NAME@` stands for the value of that name."""
    for name, value in values.items():
        template = template.replace(f"@{name}@", value)
    return template
