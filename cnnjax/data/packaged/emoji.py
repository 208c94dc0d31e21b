"""The emoji of Noto Color Emoji as an ordinary folder of classes with fixed splits.

The pictures are those in the font, 136x128 pixels, laid over white; names and classes are those of
Unicode's emoji-test.txt. The classes are its groups (faces, animals, food, ...); files are called
by subgroup and name, so that other classes can be made of them. Of emoji in several skin tones the
yellow one is taken. Emoji that look alike, mirrored or not, and those of one name but for the
person in it, are in one split.
"""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from cnnjax.data.image_files import over_background
from cnnjax.data.packaged import pictures
from cnnjax.data.packaged.archives import deb_files
from cnnjax.errors import UserError

FONT = "usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
NAMES = "usr/share/unicode/emoji/emoji-test.txt"
TERMS = {
    "usr/share/doc/fonts-noto-color-emoji/copyright": "COPYRIGHT-font.txt",
    "usr/share/doc/unicode-data/copyright": "COPYRIGHT-names.txt",
}
CLASSES = (
    *("activities", "animals_nature", "flags", "food_drink", "objects", "people_body"),
    *("smileys_emotion", "symbols", "travel_places"),
)
# Thumbnails whose gray levels correlate so are alike; below it all faces would be, and half of the
# flags.
ALIKE = 0.98
# A second code of which nothing is seen: that the first is to be a picture.
AS_PICTURE = 0xFE0F
_PERSON = re.compile(r"\b(wo)?(man|men)\b|\b(person|people|boy|girl|mother|father|mrs|mr)s?\b")
_LINE = re.compile(r"(?P<codes>[0-9A-F ]+); fully-qualified +# \S+ E\d+\.\d+ (?P<name>.+)")


@dataclasses.dataclass(frozen=True)
class Emoji:
    """One line of emoji-test.txt.

    Attributes:
      group, subgroup, name: as files are called: `food_drink`, `food_fruit`, `red_apple`.
      codes: of Unicode.
    """

    group: str
    subgroup: str
    name: str
    codes: tuple[int, ...]

    @property
    def path(self) -> str:
        """Its `CLASS/FILE`."""
        return f"{self.group}/{self.subgroup}-{self.name}.png"


def prepare(font: Path, names: Path, out: Path) -> dict[str, dict[str, int]]:
    """Makes the folder of two verified packages; returns split -> class -> number of pictures.

    Args:
      font: Debian's package of the font.
      names: Debian's package of Unicode's data.
      out: the folder.

    Raises:
      UserError: a package cannot be unpacked or has not the pictures, or `out` exists.
    """
    pictures.check_new(out)
    wanted = {FONT, NAMES, *TERMS}
    files = {
        name: content
        for deb in (font, names)
        for name, content in deb_files(deb, wanted.__contains__)
    }
    if missing := sorted(wanted - set(files)):
        raise UserError(f"{str(font)!r} and {str(names)!r} have no {missing[0]}")
    drawn = drawings(files[FONT], read_names(files[NAMES].decode("utf-8")))
    return pictures.make_folder(
        out,
        split(drawn),
        lambda path: path,
        lambda path, file: _save(drawn[path], file),
        {kept: files[name] for name, kept in TERMS.items()},
    )


def split(drawn: Mapping[str, np.ndarray]) -> dict[str, list[str]]:
    """Returns split -> paths; see the module for which are in one split."""
    found = pictures.groups(drawn, stem, ALIKE)
    return pictures.split(found, CLASSES, lambda path: path.partition("/")[0], "emoji")


def stem(path: str) -> str:
    """Returns what emoji of one thing by several persons have in common."""
    words = path.replace("_", " ")
    return " ".join(_PERSON.sub(" ", words).split())


def read_names(text: str) -> list[Emoji]:
    """Returns the emoji of emoji-test.txt, without those of a skin tone."""
    group = subgroup = ""
    found: dict[str, Emoji] = {}
    for line in text.splitlines():
        if line.startswith("# group: "):
            group = _word(line.removeprefix("# group: "))
        elif line.startswith("# subgroup: "):
            subgroup = _word(line.removeprefix("# subgroup: "))
        elif (match := _LINE.match(line)) and "skin tone" not in line:
            codes = tuple(int(code, 16) for code in match["codes"].split())
            each = Emoji(group, subgroup, _word(match["name"]), codes)
            if each.path in found:  # Keycaps of signs, whose names have no letters for them.
                each = dataclasses.replace(each, name=f"{each.name}_{codes[0]:x}")
            found[each.path] = each
    return list(found.values())


def drawings(font: bytes, emoji: list[Emoji]) -> dict[str, np.ndarray]:
    """Returns the pictures of a font: path -> RGB `[height, width, 3]` over white.

    Raises:
      UserError: it has no bitmaps in color.
    """
    from fontTools.ttLib import TTFont
    from PIL import Image

    read = TTFont(io.BytesIO(font))
    if "CBDT" not in read:
        raise UserError("the font has no table CBDT: it is not one of color bitmaps")
    bitmaps = read["CBDT"].strikeData[0]
    glyphs = dict(_ligatures(read))
    characters = read.getBestCmap()
    found = {}
    for each in emoji:
        own = tuple(characters.get(code) for code in each.codes if code != AS_PICTURE)
        glyph = own[0] if len(own) == 1 else glyphs.get(own)
        if each.group in CLASSES and glyph in bitmaps:
            image = Image.open(io.BytesIO(bitmaps[glyph].imageData)).convert("RGBA")
            levels = over_background(np.asarray(image), 255.0)
            found[each.path] = np.round(levels).astype(np.uint8)
    return found


def _ligatures(font) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yields (glyphs in a row, the one glyph that is drawn for them)."""
    for lookup in font["GSUB"].table.LookupList.Lookup:
        for table in lookup.SubTable:
            table = getattr(table, "ExtSubTable", table)
            for first, ligatures in getattr(table, "ligatures", {}).items():
                for ligature in ligatures:
                    yield (first, *ligature.Component), ligature.LigGlyph


def _word(text: str) -> str:
    """Returns a name as files are called: lower case, words joined by `_`."""
    return "_".join(re.findall(r"\w+", text.replace("'", "").replace("\u2019", "").lower()))


def _save(picture: np.ndarray, path: Path) -> None:
    from PIL import Image

    Image.fromarray(picture).save(path, format="PNG")
