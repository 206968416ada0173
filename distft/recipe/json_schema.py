"""The recipe as a JSON Schema, from the same classes that read it, so that editors complete and check keys.

Store it as `recipes/schema.json`; a recipe whose first line is `#:schema ./schema.json` uses it (Taplo's convention).
"""

from __future__ import annotations

import json
from typing import Any

from pydantic.json_schema import models_json_schema

from distft.core.registry import NoParams, Params, Registry
from distft.recipe.evaluation import AnswersTable
from distft.recipe.rollout import RewardTerm
from distft.recipe.schema import (
    DEFAULT_PARTS,
    Recipe,
    Registries,
    RunKeys,
    SourceTable,
    TrainSourceTable,
    chosen_tables,
    fixed_tables,
)
from distft.recipe.schema_text import Schema
from distft.recipe.toml_text import is_array, is_table


def schema_text(registries: Registries) -> str:
    """Return the text of `recipes/schema.json`."""
    return json.dumps(json_schema(registries), indent=2, ensure_ascii=False) + "\n"


def json_schema(registries: Registries) -> Schema:
    """Return a draft 2020-12 schema of a recipe with the parts that are registered now."""
    parts = [spec.params for table in chosen_tables() for spec in registries.part(table).values()]
    scores = [spec.params for spec in registries.scores.values()]
    generators = [spec.params for spec in registries.generators.values()]
    of, defs = _definitions([RunKeys, *fixed_tables().values(), *parts, *scores, *generators, RewardTerm])
    for table in (SourceTable, TrainSourceTable, AnswersTable):
        defs[table.__name__]["properties"]["format"]["enum"] = list(dict.fromkeys(["auto", *registries.formats]))
    _name_templates(defs["DataTable"]["properties"]["chat_template"], registries.templates)
    tables = {table: {"$ref": f"#/$defs/{of[kind]}"} for table, kind in fixed_tables().items()}
    for table in chosen_tables():
        tables[table] = _one_of(registries.part(table), DEFAULT_PARTS[table], {kind: defs[of[kind]] for kind in parts})
    if scores:
        chosen = _one_of(registries.scores, None, {kind: defs[of[kind]] for kind in scores})
        defs["AnswersTable"]["properties"]["scores"]["items"] = chosen
        rewarded = _one_of(registries.scores, None, {kind: defs[of[kind]] for kind in scores})
        for branch in rewarded["oneOf"]:
            branch["properties"] |= defs[of[RewardTerm]]["properties"]
        defs["RolloutTable"]["properties"]["rewards"]["items"] = rewarded
    if generators:
        named = {"enum": list(registries.generators)}
        chosen = _one_of(registries.generators, None, {kind: defs[of[kind]] for kind in generators})
        defs["RolloutTable"]["properties"]["generator"]["anyOf"] = [named, chosen]
    run = defs[of[RunKeys]]
    schema: Schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "distft recipe",
        "description": _first_line(Recipe),
        "type": "object",
        "properties": {**run["properties"], **tables},
        "required": [*run["required"], "model", "data"],
        "additionalProperties": False,
    }
    return {**schema, "$defs": _used(defs, schema)}


def _definitions(kinds: list[type[Params]]) -> tuple[dict[type[Params], str], Schema]:
    """Return the name of each class among the definitions, and the definitions."""
    refs, schema = models_json_schema([(kind, "validation") for kind in dict.fromkeys(kinds)])
    names = {kind: str(ref["$ref"]).rsplit("/", 1)[-1] for (kind, _), ref in refs.items()}
    return {kind: names[kind] for kind in kinds}, _without_null(schema["$defs"])


def _one_of(registry: Registry[Any], default: str | None, params: dict[type[Params], Schema]) -> Schema:
    """Return one closed branch per part, distinguished by `name`, which the default part may leave out."""
    branches: list[Schema] = []
    for name, spec in registry.items():
        part_schema = params[spec.params]
        required = [*([] if name == default else ["name"]), *part_schema.get("required", [])]
        about = {} if spec.params is NoParams else {"description": part_schema.get("description", "")}
        chosen = {"const": name, **({"default": default} if name == default else {})}
        branches.append(
            {
                "title": name,
                **about,
                "type": "object",
                "properties": {"name": chosen, **part_schema.get("properties", {})},
                **({"required": required} if required else {}),
                "additionalProperties": False,
            }
        )
    return {"oneOf": branches}


def _name_templates(node: Schema, templates: tuple[str, ...]) -> None:
    description, default = node.pop("description"), node.pop("default")
    node.clear()
    files = {"type": "string", "pattern": r"\.jinja$"}
    node |= {"anyOf": [{"enum": ["auto", *templates]}, files], "description": description, "default": default}


def _without_null(node: Any) -> Any:
    """Return the schema without what TOML cannot write, and without the titles pydantic makes up from field names."""
    if is_array(node):
        return [_without_null(item) for item in node]
    if not is_table(node):
        return node
    kept: Schema = {}
    for key, value in node.items():
        made_up = key == "title" and isinstance(value, str)
        if not made_up and not (key == "default" and value is None):
            kept[key] = _without_null(value)
    choices = [choice for choice in kept.pop("anyOf", []) if choice != {"type": "null"}]
    if len(choices) == 1:
        return {**choices[0], **kept}
    return {**kept, **({"anyOf": choices} if choices else {})}


def _used(defs: Schema, schema: Schema) -> Schema:
    """Return the definitions that the schema, or another used definition, points to."""
    used: Schema = {}
    reach = [schema]
    while reach:
        text = json.dumps(reach.pop())
        for name, body in defs.items():
            if name not in used and f'"#/$defs/{name}"' in text:
                used[name] = body
                reach.append(body)
    return dict(sorted(used.items()))


def _first_line(kind: type) -> str:
    return (kind.__doc__ or "").strip().partition("\n")[0]
