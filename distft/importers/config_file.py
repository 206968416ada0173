"""A configuration file of another tool, YAML or JSON: its values, and the line of each key."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distft.core.errors import Problem, RecipeError
from distft.core.nearest import nearest
from distft.recipe.lines import KeyPath
from distft.recipe.origin import shown

if TYPE_CHECKING:
    import yaml

_LARGEST_FILE = 1 << 20
_MOST_VALUES = 50_000
"""Values of a file, aliases counted as often as they are used: a few lines of YAML can mean millions."""
_DEEPEST = 32


@dataclass(frozen=True, kw_only=True)
class ConfigFile:
    """A file that was read."""

    path: Path
    content: dict[str, Any]
    """Its values, keys at the top."""
    lines: Mapping[KeyPath, int]
    """1-based line of each key and list element."""

    def line_of(self, key: KeyPath) -> int | None:
        """Return the line of a key, else of what is around it; None for a key that is nowhere."""
        return next((self.lines[key[:depth]] for depth in range(len(key), 0, -1) if key[:depth] in self.lines), None)

    def nested_keys(self) -> Iterator[str]:
        """Yield every key of every mapping, at any depth."""
        waiting: list[Any] = [self.content]
        while waiting:
            value = waiting.pop()
            if isinstance(value, dict):
                yield from value
                waiting += value.values()
            elif isinstance(value, list):
                waiting += value


def read_config(path: Path) -> ConfigFile:
    """Read a YAML or JSON file whose top level is a mapping.

    Raises:
        RecipeError: there is no such file; or it is no YAML, has a key twice, or is no mapping: with the line.
    """
    text = _text(path)
    if path.suffix == ".json" or text.lstrip().startswith("{"):
        content = _json(path, text)
        return ConfigFile(path=path, content=content, lines=_lines_of_json(text))
    return parse_yaml(text, path)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that a configuration names: an object.

    Raises:
        RecipeError: it cannot be read, or is no JSON object.
    """
    return _json(path, _text(path))


def parse_yaml(text: str, path: Path) -> ConfigFile:
    """Read YAML as PyYAML's safe loader does, which the other tools use too; `path` is what messages call it.

    Raises:
        RecipeError: it is no YAML, has a key twice, or is no mapping.
    """
    import yaml

    try:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            lines, problems = _walk(node) if node is not None else ({}, [])
            if problems:
                raise RecipeError(str(path), problems)
            content = loader.construct_document(node) if node is not None else None
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        raise RecipeError(str(path), [_not_yaml(text, error)]) from None
    except yaml.reader.ReaderError as error:  # a character that is not text
        line = text.count("\n", 0, error.position) + 1
        message = f"not valid YAML: character #x{int(error.character):04x}"
        raise RecipeError(str(path), [Problem(message=message, line=line, fix="remove it")]) from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date or number that Python does not have
        raise RecipeError(str(path), [Problem(message=f"not valid YAML: {shown(str(error))}")]) from None
    except RecursionError:
        raise RecipeError(str(path), [Problem(message="nested too deeply")]) from None
    return ConfigFile(path=path, content=_mapping(path, content), lines=lines)


def _text(path: Path) -> str:
    try:
        if path.is_dir():
            files = sorted(file.name for file in path.iterdir() if file.suffix in (".yaml", ".yml", ".json"))
            holds = f"it holds: {', '.join(files)}" if files else ""
            raise RecipeError(str(path), [Problem(message="is a folder, not a file", fix=holds)])
        if not path.is_file():
            beside = sorted(file.name for file in path.parent.glob("*")) if path.parent.is_dir() else []
            near = nearest(path.name, beside)
            fix = f"did you mean {path.parent / near}?" if near else ""
            raise RecipeError(str(path), [Problem(message="no such file", fix=fix)])
        if path.stat().st_size > _LARGEST_FILE:
            raise RecipeError(str(path), [Problem(message="is larger than 1 MiB: no configuration of a run")])
        return path.read_bytes().decode("utf-8-sig")
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name, or no UTF-8
        raise RecipeError(str(path), [Problem(message=f"cannot be read as text: {error}")]) from None


def _mapping(path: Path, content: object) -> dict[str, Any]:
    if isinstance(content, dict):
        return content
    kind = "is empty" if content is None else f"is a {'list' if isinstance(content, list) else 'single value'}"
    raise RecipeError(str(path), [Problem(message=f"the file {kind}; expected keys and values at the top", line=1)])


def _walk(top: yaml.Node) -> tuple[dict[KeyPath, int], list[Problem]]:
    """Return the line of each key and list element, and what is wrong with the keys."""
    import yaml

    lines: dict[KeyPath, int] = {}
    problems: list[Problem] = []
    waiting: list[tuple[yaml.Node, KeyPath]] = [(top, ())]
    count = 0
    while waiting:
        node, location = waiting.pop()
        count += 1
        if count > _MOST_VALUES or len(location) > _DEEPEST:
            return lines, [Problem(message="too large, too deep, or refers to itself", line=lines.get(location))]
        if isinstance(node, yaml.SequenceNode):
            for position, element in enumerate(node.value):
                lines[(*location, position)] = _line(element)
                waiting.append((element, (*location, position)))
        elif isinstance(node, yaml.MappingNode):
            first: dict[str, int] = {}
            for key, value in node.value:
                name = key.value if isinstance(key, yaml.ScalarNode) else None
                if name == "<<":  # a merge: the lines are those of the mapping that is merged
                    waiting.append((value, location))
                elif not isinstance(name, str):
                    problems.append(Problem(message="a key must be a word", line=_line(key)))
                elif name in first:
                    message = f"{shown(name)}  is set twice: here and in line {first[name]}"
                    problems.append(Problem(message=message, line=_line(key), fix="keep one of them"))
                else:
                    first[name] = lines[(*location, name)] = _line(key)
                    waiting.append((value, (*location, name)))
                    if key.tag != "tag:yaml.org,2002:str" and location == ():
                        message = f"{shown(name)}  is no text, and no key of any tool"
                        problems.append(Problem(message=message, line=_line(key)))
    return lines, problems


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1 if node.start_mark is not None else 1


def _not_yaml(text: str, error: yaml.MarkedYAMLError) -> Problem:
    mark = error.problem_mark or error.context_mark
    line = mark.line + 1 if mark else None
    lines = text.splitlines()
    written = shown(lines[line - 1].strip()) if line is not None and line <= len(lines) else ""
    what = " ".join(filter(None, (error.context, error.problem)))
    fix = "indent with spaces, not tabs" if "'\\t'" in what else ""
    return Problem(message=f"{written}  not valid YAML: {what}".strip(), line=line, fix=fix)


def _json(path: Path, text: str) -> dict[str, Any]:
    doubled: list[str] = []

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        mapping = dict(pairs)
        if len(mapping) < len(pairs):
            names = [name for name, _ in pairs]
            doubled.extend(name for name in mapping if names.count(name) > 1)
        return mapping

    try:
        content = json.loads(text, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        raise RecipeError(str(path), [Problem(message=f"not valid JSON: {error.msg}", line=error.lineno)]) from None
    except RecursionError:
        raise RecipeError(str(path), [Problem(message="nested too deeply")]) from None
    if doubled:
        problems = [Problem(message=f"{shown(name)}  is set twice", fix="keep one of them") for name in doubled]
        raise RecipeError(str(path), problems)
    return _mapping(path, content)


def _lines_of_json(text: str) -> dict[KeyPath, int]:
    """JSON is YAML, but for tabs; where PyYAML sees it otherwise, messages go without lines."""
    import yaml

    try:
        node = yaml.compose(text.replace("\t", " "), Loader=yaml.SafeLoader)
        return _walk(node)[0] if node is not None else {}
    except (yaml.YAMLError, RecursionError):
        return {}
