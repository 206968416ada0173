"""What to say about a key that nobody knows: another table's, another part's, another trainer's word, or a typo."""

from __future__ import annotations

from distft.core.registry import Params, nearest
from distft.recipe.lines import KeyPath
from distft.recipe.origin import RecipeMistake
from distft.recipe.other_words import NOT_HERE, OTHER_WORDS
from distft.recipe.removed_keys import REMOVED_KEYS
from distft.recipe.schema import (
    Registries,
    RunKeys,
    SourceTable,
    TrainSourceTable,
    all_tables,
    chosen_tables,
    fixed_tables,
)
from distft.recipe.toml_text import toml_value


def unknown_top(key: KeyPath, registries: Registries, *, is_table: bool) -> RecipeMistake:
    """Explain a name at the top of a recipe that is neither a key nor a table."""
    word, tables = str(key[0]), all_tables()
    if is_table:
        near = nearest(word, tables)
        hint = f", did you mean [{near}]?" if near else ""
        allowed = ", ".join(f"[{name}]" for name in tables)
        return RecipeMistake(key=key, message=f"unknown table{hint}", fix=f"allowed: {allowed}")
    keys = list(RunKeys.model_fields)
    return _stray(key, keys, registries, f"allowed above the tables: {', '.join(keys)}")


def unknown_key(
    key: KeyPath, allowed_keys: list[str], registries: Registries, *, part: str | None = None
) -> RecipeMistake:
    """Explain an unknown key of a table with `allowed_keys`; `part` is the name that it chose, if it chooses one."""
    word, table = str(key[-1]), str(key[0])
    allowed = "allowed: " + (", ".join(allowed_keys) if allowed_keys else "nothing")
    if part is not None and len(key) == 2:
        owners = [name for name, spec in registries.part(table).items() if word in spec.params.model_fields]
        if owners:
            message = f"has no effect with name = {toml_value(part)}; it belongs to {', '.join(owners)}"
            return RecipeMistake(key=key, message=message, fix=f"remove it, or choose name = {toml_value(owners[0])}")
        allowed = f"allowed with name = {toml_value(part)}: {', '.join(['name', *allowed_keys])}"
    return _stray(key, allowed_keys, registries, allowed)


def _homes_of(word: str, registries: Registries) -> list[str]:
    """Return the tables that have a key of this name."""
    homes = [f"[{table}]" for table, kind in fixed_tables().items() if word in kind.model_fields]
    homes += ["[[data.train]]"] * (word in TrainSourceTable.model_fields)
    homes += ["[[data.eval]]"] * (word in SourceTable.model_fields)
    homes += [f"[{table}]" for table in chosen_tables() if word in _all_params(table, registries)]
    return homes


def _stray(key: KeyPath, allowed_keys: list[str], registries: Registries, allowed: str) -> RecipeMistake:
    word = str(key[-1])
    if removed := REMOVED_KEYS.get(".".join(map(str, key))):
        message = f"is gone, and means {toml_value(removed.meant)}: {removed.why}"
        return RecipeMistake(key=key, message=message, fix="remove it")
    if word in OTHER_WORDS:
        hint = f"unknown key, here it is called {OTHER_WORDS[word]}"
    elif word in NOT_HERE:
        hint = f"unknown key: {NOT_HERE[word]}"
    elif near := nearest(word, allowed_keys):
        hint = f'unknown key, did you mean "{near}"?'
    elif homes := _homes_of(word, registries):
        hint = f"unknown key here; it belongs to {' or '.join(homes)}"
    else:
        hint = "unknown key"
    return RecipeMistake(key=key, message=hint, fix=allowed)


def _all_params(table: str, registries: Registries) -> set[str]:
    specs = registries.part(table).values()
    kinds: list[type[Params]] = [spec.params for spec in specs]
    return {"name"}.union(*(kind.model_fields for kind in kinds))
