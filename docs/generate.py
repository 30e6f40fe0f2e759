"""Fill the generated parts of README and docs: the table of methods, and every table of measured figures.

    python -m docs.generate             writes them
    python -m docs.generate --check     changes nothing; ends with 1 and names the files that are out of date

A generated part stands between `<!-- begin:BLOCK -->` and `<!-- end:BLOCK -->`, where BLOCK is one of

    methods             every method of leantrain.registry with its card
    result ROOM/NAME    one table of benchmarks/results/ROOM/NAME.json
    results             all of them, each under its title
    readme              the README, for the site's first page
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from benchmarks.result import read_results
from leantrain.atomic import write_text
from leantrain.registry import METHODS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
NOT_MEASURED = "*not measured yet*"
_BLOCK = re.compile(
    r"(?P<begin><!-- begin:(?P<name>[^>]+?) -->\n)(?P<body>.*?)(?P<end><!-- end:(?P=name) -->)", re.DOTALL
)


def main() -> int:
    stale = [file for file in pages() if filled(file) != file.read_text(encoding="utf-8")]
    if "--check" in sys.argv[1:]:
        for file in stale:
            print(f"{file.relative_to(ROOT)} is out of date: run `make generated`", file=sys.stderr)
        return bool(stale)
    for file in stale:
        write_text(file, filled(file))
        print(f"wrote {file.relative_to(ROOT)}")
    return 0


def pages() -> list[Path]:
    """README first: the site's first page is made from it."""
    return [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]


def filled(file: Path) -> str:
    """The text of a page with all its generated parts made anew.

    Raises:
        ValueError: a part that has no name known here, or a begin without its end.
    """
    text = file.read_text(encoding="utf-8")
    begun = re.findall(r"<!-- begin:(.+?) -->", text)
    if len(begun) != len(_BLOCK.findall(text)):
        raise ValueError(f"{file} has a generated part without its end: {begun}")
    return _BLOCK.sub(lambda block: f"{block['begin']}{content(block['name'], file)}\n{block['end']}", text)


def content(block: str, file: Path) -> str:
    """What belongs into the generated part `block` of the page `file`."""
    kind, _, name = block.partition(" ")
    if block == "methods":
        return methods(file)
    if block == "readme":
        return readme()
    if block == "results":
        found = read_results()
        return "\n\n".join(f"## {result.title}\n\n{result.markdown()}" for result in found.values()) or NOT_MEASURED
    if kind == "result" and name:
        found = read_results()
        return found[name].markdown() if name in found else NOT_MEASURED
    raise ValueError(f"{file} has a generated part {block!r}; known are methods, readme, results and result ROOM/NAME")


def methods(file: Path) -> str:
    """Every method, what it does, its room and its source, with links that work from `file`."""
    lines = ["| method | what it does | room | source |", "| --- | --- | --- | --- |"]
    for method in METHODS:
        card = Path(os.path.relpath(DOCS / method.card, file.parent)).as_posix()
        lines.append(f"| [{method.name}]({card}) | {method.summary} | `{method.room}/` | {method.source} |")
    return "\n".join(lines)


def readme() -> str:
    """The README as it reads from inside docs/: links lose their docs/, and links out of docs/ become plain words."""
    text = filled(ROOT / "README.md")
    text = re.sub(r"<!-- (begin|end):.+? -->\n", "", text)
    text = text.replace("](docs/", "](")
    return re.sub(r"\[([^\]]+)\]\((?:CONTRIBUTING|CHANGELOG|LICENSE)[^)]*\)", r"\1", text).rstrip()


if __name__ == "__main__":
    sys.exit(main())
