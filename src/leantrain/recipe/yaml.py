"""YAML as data and nothing else: no tags, no anchors, no key twice, and `1e-3` is a number."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from leantrain.errors import UsageError


def load_file(path: Path | str) -> dict[str, Any]:
    """The mapping in the YAML file at `path`.

    Raises:
        UsageError: the file cannot be read, is not YAML as described above, or is not a mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {error}") from error
    loaded = load_text(text, str(path))
    if not isinstance(loaded, dict):
        raise UsageError(f"{path} must hold a mapping of keys to values, got {type(loaded).__name__}")
    return loaded


def load_text(text: str, where: str) -> Any:
    """The value that `text` writes down; `where` it stands is named in the message of the UsageError."""
    try:
        return yaml.load(text, _DataLoader)
    except yaml.YAMLError as error:
        raise UsageError(f"{where}: not understood as YAML: {' '.join(str(error).split())}") from error
    except RecursionError:
        raise UsageError(f"{where}: nested too deeply") from None


def dump(value: Any) -> str:
    """`value` as YAML in the order of its keys; `load_text` gives it back."""
    # allow_unicode would write some line separators bare, which are then read back as blanks.
    return yaml.dump(value, Dumper=_DataDumper, sort_keys=False, allow_unicode=False, width=110)


class _DataLoader(yaml.SafeLoader):
    """PyYAML's safe loader, made stricter."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        # An alias may stand for itself or for a billion others.
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"an alias (*{self.peek_event().anchor}) is not allowed in a recipe")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                raise yaml.YAMLError(f"the key {key_node.value!r} stands twice{key_node.start_mark}")
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


class _DataDumper(yaml.SafeDumper):
    """Quotes the texts that `_DataLoader` would take for numbers, and writes no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _each in (_DataLoader, _DataDumper):
    # YAML 1.1 takes 1e-3 (no point) for text.
    _each.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
        list("-+0123456789"),
    )
