"""Recipes: YAML and command-line words in, frozen dataclasses out, strictly.

A recipe has sections; each section is a frozen dataclass that stands beside the code it configures. The section called
`""` holds the keys at the top level. A key that no section knows stops the run before anything heavy starts.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings

from ssl_pretrain.errors import UsageError
from ssl_pretrain.named import nearest

Sections = Mapping[str, type]
OPENING = (
    yaml.FlowSequenceStartToken, yaml.FlowMappingStartToken, yaml.BlockSequenceStartToken, yaml.BlockMappingStartToken,
)  # fmt: skip
CLOSING = yaml.FlowSequenceEndToken, yaml.FlowMappingEndToken, yaml.BlockEndToken
MAX_BYTES = 1 << 20
"""Larger files are no recipes."""
MAX_DEPTH = 20
"""Of nested lists and mappings: PyYAML takes seconds for a thousand open brackets."""


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; `UsageError` where there is none."""
    try:
        if os.path.getsize(path) > MAX_BYTES:
            raise UsageError(f"{path} is larger than a recipe can be ({MAX_BYTES >> 20} MiB)")
        text = path.read_text(encoding="utf-8")
        _refuse_bombs(path, text)
        content = yaml.safe_load(text)
    except FileNotFoundError as error:
        near = nearest(path.name, [p.name for p in path.parent.glob("*.y*ml")]) if path.parent.is_dir() else ""
        raise UsageError(f"there is no recipe {path}{near}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the recipe {path}: {error}") from error
    except (
        yaml.YAMLError,
        ValueError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:  # its constructors' own too
        raise UsageError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} is not a recipe: it should hold keys and values such as `backbone: resnet18`")
    return content


def _refuse_bombs(path: Path, text: str) -> None:
    """A few aliases of aliases, or brackets in brackets, are a small file and a large mapping."""
    depth = 0
    for token in yaml.scan(text):
        if isinstance(token, yaml.AliasToken):
            raise UsageError(f"{path}: line {token.start_mark.line + 1}: a recipe has no aliases (*name); write it out")
        if isinstance(token, OPENING):
            depth += 1
        elif isinstance(token, CLOSING):
            depth -= 1
        if depth > MAX_DEPTH:
            raise UsageError(f"{path}: line {token.start_mark.line + 1}: nested deeper than a recipe can be")


def build(given: Mapping[str, Any], words: Sequence[str], sections: Sections) -> dict[str, Any]:
    """One instance per section, from a recipe's mapping and command-line words (`--train.epochs 5`) over it.

    Raises `UsageError` in one line for an unknown key (naming the nearest) or a value of the wrong type.
    """
    known = _keys(sections)
    _check(given, sections, known)
    for word in words:
        name = word.partition("=")[0]
        if name.startswith("--") and name[2:] not in known:
            raise UsageError(f"unknown option {name}{nearest(name, ['--' + key for key in known])}")
    parser = ArgumentParser(exit_on_error=False, prog="recipe")
    add_arguments(parser, sections)
    try:
        values = parser.parse_args(list(words), namespace=parser.parse_object(dict(given)))
    except ArgumentError as error:
        raise UsageError(one_line(str(error))) from error
    return {name: _instance(kind, values[name] if name else values) for name, kind in sections.items()}


def add_arguments(parser: ArgumentParser, sections: Sections) -> None:
    """Every field as an option with the words under it as its help."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    for name, kind in sections.items():
        if name:
            parser.add_class_arguments(kind, name)
        else:
            parser.add_class_arguments(kind)


def flat(sections: Mapping[str, Any]) -> dict[str, Any]:
    """`{"train.epochs": 5, ...}` of the instances that `build` gave; tuples become lists, as in YAML."""
    values = {}
    for name, instance in sections.items():
        for field in dataclasses.fields(instance):
            value = vars(instance)[field.name]
            values[f"{name}.{field.name}" if name else field.name] = list(value) if isinstance(value, tuple) else value
    return values


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """The reverse of the dots: `{"train.epochs": 5}` -> `{"train": {"epochs": 5}}`."""
    tree: dict[str, Any] = {}
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[name] = value
    return tree


def _keys(sections: Sections) -> list[str]:
    return [
        f"{name}.{field.name}" if name else field.name
        for name, kind in sections.items()
        for field in dataclasses.fields(kind)
    ]


def _check(given: Mapping[str, Any], sections: Sections, known: list[str]) -> None:
    top = [key for key in known if "." not in key]
    for key, value in given.items():
        if key in sections and isinstance(value, dict):
            for inner in value:
                if f"{key}.{inner}" not in known:
                    fields = [k.partition(".")[2] for k in known if k.startswith(f"{key}.")]
                    raise UsageError(f"unknown key {inner!r} under {key!r}{nearest(str(inner), fields)}")
        elif key in sections:
            raise UsageError(f"{key!r} is a section: it holds keys and values, not {value!r}")
        elif key not in top:
            raise UsageError(f"unknown key {key!r} in the recipe{nearest(str(key), [*sections, *top])}")


def _instance(kind: type, values: Namespace) -> Any:
    return kind(**{field.name: values[field.name] for field in dataclasses.fields(kind)})


def one_line(message: str) -> str:
    """What jsonargparse says of a wrong value, without its quotes of Python types."""
    message = " ".join(message.split())
    message = re.sub(r'^Parser key "([^"]+)":', r"\1:", message)
    message = re.sub(r"<class '(\w+)'>", r"\1", message).replace("typing.", "").replace("NoneType", "null")
    either = re.compile(
        r"Does not validate against any of the Union subtypes Subtypes: \[(.*?)\] Errors:.*Given value: "
    )
    return either.sub(lambda found: f"Expected {found[1].replace(', ', ' or ')}. Got value: ", message)
