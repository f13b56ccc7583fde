"""YAML 1.2: plain words stay text, and nothing in a file is dropped silently."""

import re
from pathlib import Path
from typing import Any, ClassVar

import yaml


class DocumentError(ValueError):
    """A file or text that is not YAML, or that gives a key twice."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the core schema of YAML 1.2 instead of 1.1's, where ``no`` is false and ``010`` eight.

    Underscores in integers stay: notebooks write 10_000, too.
    """

    yaml_implicit_resolvers: ClassVar[dict] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in lines:
                    again = f"{key.value!r} is given twice, first in line {lines[key.value] + 1}"
                    raise yaml.constructor.ConstructorError(None, None, again, key.start_mark)
                lines[key.value] = key.start_mark.line
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes text that either version would read as another type."""


def _integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    return int(text[2:], 8 if text[1] == "o" else 16) if text[:2] in ("0o", "0x") else int(text)


_Loader.add_constructor("tag:yaml.org,2002:int", _integer)
for _name, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+(_[0-9]+)*|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.")),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(rf"^(?:{_pattern})$"), _first)


def parse(text: str) -> Any:
    """Parse a YAML (or JSON) document; an empty one is None.

    Raises:
        DocumentError: not YAML, or a key of a mapping is given twice.
    """
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:  # as !!bool 5
        raise DocumentError(" ".join(str(error).split())) from error


def load(file: str | Path) -> Any:
    """Read a YAML file in UTF-8; see `parse`.

    Raises:
        DocumentError: not readable, not YAML, or a key given twice; the message names the file.
    """
    try:
        return parse(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, DocumentError) as error:
        raise DocumentError(f"{file}: cannot be read as YAML ({error}).") from error


def dump(value: Any) -> str:
    """Serialise a value as YAML that `parse` and readers of YAML 1.1 read back unchanged."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False)
