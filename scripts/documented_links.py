"""Links of the guides, README and notebooks: whether what they lead to is there.

Files and headings of this repository are looked up. Of the rest of the web nothing is asked, since
CI has no network: an address must only be one.
"""

import functools
import json
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from documented import ROOT, Shown

from cnnjax.errors import UserError, unknown_name

# Text in which brackets and parentheses are no link.
CODE = re.compile(r"^```.*?^```|^ {4}.*?$|`[^`\n]*`", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\(\s*<?([^()\s>]*(?:\([^()\s]*\)[^()\s>]*)*)>?\s*\)")
SOURCE = re.compile(r"<(?:img|a)[^>]+(?:src|href)=\"([^\"]+)\"")


def linked_files() -> list[Path]:
    """Returns the files whose links are checked."""
    found = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "deploy").rglob("*.md")]
    found += [*(ROOT / "cnnjax").rglob("*.md"), *(ROOT / "notebooks").glob("*.ipynb")]
    return sorted(found)


def links(path: Path) -> list[Shown]:
    """Returns the targets of a file's links, in order."""
    text = CODE.sub(lambda code: re.sub(r"[^\n]", " ", code[0]), _prose(path))
    found = [match for pattern in (LINK, SOURCE) for match in pattern.finditer(text)]
    found.sort(key=lambda match: match.start())
    name = str(path.relative_to(ROOT))
    return [Shown(f"{name}:{text[: m.start()].count(chr(10)) + 1}", m[1]) for m in found]


def check_link(link: Shown) -> str:
    """Returns `link`, what was checked; a UserError for one that leads nowhere."""
    here = ROOT / link.where.rpartition(":")[0]
    address = urlsplit(link.text)
    if address.scheme:
        if address.scheme not in ("http", "https", "mailto"):
            raise UserError(f"{link.text} is of no known kind: give https://...")
        if address.scheme != "mailto" and not re.fullmatch(
            r"[\w-]+(\.[\w-]+)+(:\d+)?", address.netloc
        ):
            raise UserError(f"{link.text} has no host")
        return "link"
    path = (here.parent / unquote(address.path)).resolve() if address.path else here
    if not path.exists():
        raise UserError(f"there is no {link.text} beside {here.name}")
    if address.fragment and path.suffix == ".md" and address.fragment not in anchors(path):
        raise unknown_name(f"heading of {path.name}", address.fragment, anchors(path))
    return "link"


@functools.cache
def anchors(path: Path) -> frozenset[str]:
    """Returns the names of a file's headings, as links give them."""
    text = re.sub(
        r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
    )
    found: set[str] = set(re.findall(r"^\(([\w-]+)\)=$", text, re.MULTILINE))
    for heading in re.findall(r"^#+ +(.+?)\s*#*$", text, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        name = re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", plain))
        number, own = 0, name
        while own in found:
            number += 1
            own = f"{name}-{number}"
        found.add(own)
    return frozenset(found)


def _prose(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return text
    cells = json.loads(text)["cells"]
    return "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
