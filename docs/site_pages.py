"""What the site is made of besides the guides: API pages, notebooks, docstrings, MathJax."""

import importlib
import importlib.util
import inspect
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import cnnjax
from cnnjax.errors import UserError

COLAB_BADGE = "https://colab.research.google.com/assets/colab-badge.svg"
# Sections of a docstring, whose content is indented and no code.
SECTIONS = ("Args:", "Returns:", "Yields:", "Raises:", "Attributes:", "Example:")
# Modules that loops of one's own import, besides what their rooms export.
USED = {"cnnjax.run.load", "cnnjax.data.fields", "cnnjax.explain.page"}
# Such as [`conv2d`](../cnnjax/ops/convolution.py): a function by its file.
FUNCTION_LINK = re.compile(r"\[`(\w+)`\]\(\.\./(cnnjax/[\w/]+)\.py\)")
MATHJAX = ("sphinx-mathjax-offline", "static/mathjax/tex-svg-full.js")


def write_api(folder: Path, curriculum: Path) -> None:
    """Writes a page for each room of the package, and their index.

    Args:
      folder: where they go.
      curriculum: the page that links to functions by file: these modules are documented too.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    text = curriculum.read_text(encoding="utf-8")
    linked = {path.replace("/", ".") for _, path in FUNCTION_LINK.findall(text)} | USED
    pages = [_write_page(folder, room, linked) for room in cnnjax.__all__]
    lines = ["API", "===", "", "One page for each room. Names are imported when they are used.", ""]
    lines += [".. list-table::", "   :widths: 25 75", ""]
    for room, summary in pages:
        lines += [f"   * - :doc:`cnnjax.{room} <{room}>`", f"     - {summary}"]
    lines += ["", ".. toctree::", "   :hidden:", "", *(f"   {room}" for room, _ in pages), ""]
    (folder / "index.rst").write_text("\n".join(lines), encoding="utf-8")


def _write_page(folder: Path, room: str, linked: set[str]) -> tuple[str, str]:
    """Writes a room's page; returns the room and the first line of its docstring."""
    module = importlib.import_module(f"cnnjax.{room}")
    exported, modules = _public(module)
    if exported:
        # What most need is exported; of the modules behind it those that a page links to.
        modules = [part for part in modules if part.__name__ in linked]
    own = sorted(name for name in linked if name.startswith(f"cnnjax.{room}."))
    own = [name for name in own if name.rpartition(".")[2] not in exported]
    modules += [part for part in map(importlib.import_module, own) if part not in modules]
    title = f"cnnjax.{room}"
    lines = [title, "=" * len(title), "", f".. automodule:: {title}", ""]
    for name in exported:
        kind = "autoclass" if inspect.isclass(getattr(module, name)) else "autofunction"
        lines += [f".. {kind}:: {title}.{name}"]
        lines += ["   :members:"] if kind == "autoclass" else []
        lines += [""]
    shown = {id(getattr(module, name)) for name in exported}
    for part in modules:
        members = [
            name
            for name, value in vars(part).items()
            if _is_own(name, value, part) and id(value) not in shown
        ]
        if not members:
            continue
        heading = part.__name__.removeprefix("cnnjax.")
        lines += [heading, "-" * len(heading), "", f".. automodule:: {part.__name__}"]
        plain = [name for name in members if not hasattr(vars(part)[name], "__wrapped__")]
        lines += [f"   :members: {', '.join(plain)}", ""] if plain else [""]
        # Those that JAX has wrapped are not seen to be functions.
        for name in members:
            if name not in plain:
                lines += [f".. autofunction:: {part.__name__}.{name}", ""]
    (folder / f"{room}.rst").write_text("\n".join(lines), encoding="utf-8")
    first = (module.__doc__ or "").strip().partition("\n\n")[0]
    return room, _escaped(" ".join(first.split()))


def _public(module: ModuleType) -> tuple[list[str], list[ModuleType]]:
    """Returns the functions and classes that a room exports, and its public modules."""
    names = getattr(module, "__all__", None)
    if names is None:
        own = [name for name, value in vars(module).items() if _is_own(name, value, module)]
        return own, []
    values = {name: getattr(module, name) for name in names}
    modules = [value for value in values.values() if inspect.ismodule(value)]
    return [name for name, value in values.items() if _is_documented(value)], modules


def _is_own(name: str, value: Any, module: ModuleType) -> bool:
    is_public = not name.startswith("_") and _is_documented(value)
    return is_public and value.__module__ == module.__name__


def _is_documented(value: Any) -> bool:
    """Whether it is a class or a function, also one that JAX has wrapped."""
    return inspect.isclass(value) or inspect.isfunction(getattr(value, "__wrapped__", value))


def copy_notebooks(sources: Path, executed: Path, folder: Path) -> None:
    """Copies the notebooks to where Sphinx reads them, with outputs if there are current ones.

    The badge's picture becomes a file of the site, and links to guides on GitHub pages of it.

    Args:
      sources: folder of the notebooks.
      executed: folder of those that were run, perhaps of earlier ones.
      folder: where the copies go.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for path in sorted(sources.glob("*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        found = _read(executed / path.name)
        if found and _sources(found) == _sources(notebook):
            notebook = found
        for cell in notebook["cells"]:
            if cell["cell_type"] == "markdown":
                text = "".join(cell["source"]).replace(COLAB_BADGE, "../_static/colab.svg")
                text = re.sub(r"\(https://github\.com/[\w./-]+/docs/(\w+\.md)\)", r"(../\1)", text)
                cell["source"] = text.splitlines(keepends=True)
        (folder / path.name).write_text(json.dumps(notebook), encoding="utf-8")


def _read(path: Path) -> dict[str, Any] | None:
    """Returns a notebook; None where there is none, or one that is not whole."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def _sources(notebook: dict[str, Any]) -> list[str]:
    return ["".join(cell["source"]) for cell in notebook["cells"]]


def copy_guide(path: Path, target: Path) -> None:
    """Copies a guide whose name is that of a page of Sphinx's own, as `search.md` is."""
    target.parent.mkdir(exist_ok=True)
    text = re.sub(r"\]\((?!https?:)([^)]+)\)", r"](../\1)", path.read_text(encoding="utf-8"))
    target.write_text(text, encoding="utf-8")


def for_the_site(app: Any, docname: str, content: list[str]) -> None:
    """Makes of a guide for GitHub one for the site, in place.

    Functions that are linked by their file are linked by their lines, in the site's copy of the
    source; other files outside of docs/ are linked in the repository; the index lists the guides
    that no other list of it has; `search.md` is its copy.
    """
    text = content[0]
    if docname == "index":
        written = set(re.findall(r"^([\w/]+)$", text, re.MULTILINE)) | {"index", "search"}
        more = [path.stem for path in Path(app.srcdir).glob("*.md") if path.stem not in written]
        text = text.replace("MORE GUIDES", "\n".join(sorted(more)))
    text = text.replace("](search.md", "](copied/search_settings.md")
    text = FUNCTION_LINK.sub(
        r'<a class="reference internal" href="_modules/\2.html#\1"><code>\1</code></a>', text
    )
    if "/" not in docname:
        repository = app.config.html_theme_options["repository_url"]
        text = re.sub(r"\]\(\.\./", f"]({repository}/blob/main/", text)
    content[0] = text


def always_outdated(app: Any, *found: Any) -> list[str]:
    """Returns the page that is read on every build: the index, which lists files of the folder."""
    return ["index"]


def copy_mathjax(app: Any, error: Exception | None) -> None:
    """Puts MathJax into the built site; it is read by `mathjax_path`."""
    if error is None and app.builder.format == "html":
        spec = importlib.util.find_spec(MATHJAX[0])
        if spec is None or not spec.submodule_search_locations:
            raise UserError(f"{MATHJAX[0]} is missing: install it by pip install '.[docs]'.")
        source = Path(next(iter(spec.submodule_search_locations))) / MATHJAX[1]
        shutil.copyfile(source, Path(app.outdir) / "_static" / "mathjax.js")


def as_rst(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Makes reStructuredText of a docstring of ours, in place, for Napoleon to go on with.

    Code stands between single backticks, and what is indented after an empty line is code; stars,
    bars and underscores are themselves.
    """
    lines[:] = list(_with_code_blocks(_escaped("\n".join(lines)).split("\n")))


def _escaped(text: str) -> str:
    """Doubles the backticks, and escapes what has a meaning in reStructuredText alone."""
    parts = re.split(r"(``?[^`]+``?)", text)
    for index, part in enumerate(parts):
        if index % 2:
            parts[index] = f"``{part.strip('`')}``"
            # Such as `key`s: a literal ends before a space or punctuation.
            following = parts[index + 1]
            if following and re.match(r"\w", following):
                parts[index] += "\\ "
        else:
            parts[index] = re.sub(r"([*|\\]|_(?=\W|$))", r"\\\1", part)
    return "".join(parts)


def _with_code_blocks(lines: list[str]) -> Iterator[str]:
    """Marks blocks that are indented after an empty line, other than sections, as literal."""
    above, in_code, was_empty = "", -1, False
    for line in lines:
        indent = len(line) - len(line.lstrip())
        if not line.strip():
            was_empty = True
            yield line
            continue
        if in_code >= 0 and indent < in_code:
            in_code = -1
        is_deeper = was_empty and above and indent > _indent(above)
        is_text = above.strip() in SECTIONS or line.lstrip().startswith((">>>", "- "))
        if in_code < 0 and is_deeper and not is_text:
            in_code = indent
            yield f"{' ' * _indent(above)}::"
            yield ""
        is_doctest = line.lstrip().startswith((">>>", "..."))
        yield re.sub(r"\\([*|\\_])", r"\1", line) if in_code >= 0 or is_doctest else line
        above, was_empty = (line if in_code < 0 else above), False


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())
