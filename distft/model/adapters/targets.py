"""The names in a recipe's `target_modules` and `modules_to_save`, held against the modules of the model.

PEFT leaves out a name that matches nothing as long as another one matches, takes `modules_to_save` by the end of a
name whatever stands before it ("norm" is also "input_layernorm"), and gives up with a traceback on layers that it has
no adapter for. Here every name must match, and what it matches must be able to be trained.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from distft.recipe.origin import RecipeMistake

if TYPE_CHECKING:
    from torch import nn

ALL_LINEAR = "all-linear"
_TARGETS, _SAVED = ("method", "target_modules"), ("method", "modules_to_save")
_MANY = 3
"""Names that a message lists."""


def _saved(params: Any) -> tuple[str, ...]:
    """Return the modules trained whole; none where a method has no such key."""
    return getattr(params, "modules_to_save", ())


def are_named(params: Any) -> bool:
    """Return whether a method's settings name any module, so that there is something to look for in the model."""
    tensors = getattr(params, "target_parameters", ())
    return getattr(params, "target_modules", ALL_LINEAR) != ALL_LINEAR or bool(_saved(params)) or bool(tensors)


def name_blocks(params: Any) -> bool:
    """Return whether blocks may differ in what is trained: a name or pattern that says which block it means."""
    targets = getattr(params, "target_modules", ALL_LINEAR)
    names = [targets] if isinstance(targets, str) else list(targets)
    return any(any(char.isdigit() for char in name) for name in [*names, *_saved(params)])


@dataclass(frozen=True, kw_only=True)
class Module:
    """A module of a model, as far as a method may name it."""

    name: str
    kind: str
    """The name of its class."""
    adapts: Literal["linear", "embedding", ""]
    """What kind of low-rank product it can have; "": none."""
    has_params: bool
    """Whether it has parameters itself."""
    trains: bool
    """Whether it has parameters, or a module in it does."""
    head: bool
    """It makes the logits."""
    block: bool
    """It is one of the repeated blocks."""


@dataclass(frozen=True, kw_only=True)
class Listing:
    """Everything in a model that can be named; plain values, so that it can be kept."""

    modules: tuple[Module, ...]
    experts: tuple[str, ...]
    """Names of weights of all experts in one tensor: PEFT and transformers know them by these."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Listing:
        """Build the listing from what `to_json` returned."""
        return cls(modules=tuple(Module(**entry) for entry in fields["modules"]), experts=tuple(fields["experts"]))


def listing(lm: Any) -> Listing:
    """Return the modules of a transformers model, which may be without values."""
    from distft.model.blocks import blocks_of

    head = lm.get_output_embeddings()
    blocks = {id(block) for block in blocks_of(lm)}
    modules = tuple(
        Module(
            name=name,
            kind=type(module).__name__,
            adapts=_adapts(module),
            has_params=any(True for _ in module.parameters(recurse=False)),
            trains=any(True for _ in module.parameters()),
            head=module is head,
            block=id(module) in blocks,
        )
        for name, module in lm.named_modules()
        if name
    )
    experts = dict.fromkeys(name.rpartition(".")[2] for name, param in lm.named_parameters() if param.ndim == 3)
    return Listing(modules=modules, experts=tuple(experts))


def exact(lm: nn.Module, names: Sequence[str]) -> list[str]:
    """Return `modules_to_save` in the form in which PEFT takes these modules and no others.

    A name is a whole one, or its end from a dot on, as in `target_modules`.
    """
    modules = [name for name, _ in lm.named_modules() if name]
    exact_names: list[str] = []
    for name in names:
        meant = [module for module in modules if _ends_with(module, name)]
        same = [module for module in modules if module.endswith(name)]
        exact_names += [name] if same == meant else meant
    return exact_names


def in_blocks(lm: Any, named: str | Sequence[str], indices: Sequence[int], *, without: Sequence[str]) -> list[str]:
    """Return the whole names of targets in some of the blocks.

    Args:
        lm: a transformers model.
        named: the recipe's `target_modules`.
        indices: of the blocks.
        without: what "all-linear" leaves out.

    Raises:
        RecipeError: there is no such block, or none of the targets is in them.
    """
    from distft.core.errors import Problem, RecipeError
    from distft.model.blocks import blocks_of

    blocks = blocks_of(lm)
    outside = [index for index in indices if not 0 <= index < len(blocks)]
    if outside:
        message = f"[method] layers_to_transform: {outside[0]} is no block of the model"
        problem = Problem(message=message, fix=f"it has blocks 0 to {len(blocks) - 1}")
        raise RecipeError("recipe", [problem])
    inside = {id(part) for index in indices for part in blocks[index].modules()}
    names = [name for name, module in lm.named_modules() if id(module) in inside and _adapts(module)]
    if named == ALL_LINEAR:
        chosen = [name for name in names if name not in without]
    elif isinstance(named, str):
        chosen = [name for name in names if re.fullmatch(named, name)]
    else:
        chosen = [name for name in names if any(_ends_with(name, target) for target in named)]
    if not chosen:
        problem = Problem(message="[method] layers_to_transform: none of target_modules is in these blocks")
        raise RecipeError("recipe", [problem])
    return chosen


def faults(listed: Listing, params: Any) -> list[RecipeMistake]:
    """Return the mistakes in the module names of an adapter method for this model, before anything is attached."""
    if not hasattr(params, "target_modules"):
        return []
    names = _Names(listed, bool(getattr(params, "quant", None)))
    mistakes = [*_of_targets(names, params), *_of_tensors(listed, params), *_of_saved(names, params)]
    return mistakes or list(_of_both(names, params))


class _Names:
    """A model's modules by name, and what an adapter can do with each."""

    def __init__(self, listed: Listing, in_4bit: bool) -> None:
        self.modules = {module.name: module for module in listed.modules}
        self.in_4bit = {
            module.name for module in listed.modules if in_4bit and module.adapts == "linear" and not module.head
        }
        self.blocks = [module.name for module in listed.modules if module.block]
        # Also by names of older layouts, with a module for each expert.
        older = {"experts", "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj"}
        self.experts = {*listed.experts, *older} if listed.experts else set[str]()

    def matched(self, name: str) -> list[str]:
        """Return the modules that a name of a list means."""
        return [module for module in self.modules if _ends_with(module, name)]

    def fitting(self, pattern: str) -> list[str]:
        """Return the modules that a regular expression means: it has to fit the whole name, as for PEFT."""
        compiled = re.compile(pattern)
        return [module for module in self.modules if compiled.fullmatch(module)]

    def is_head(self, name: str) -> bool:
        """Return whether this module makes the logits."""
        return self.modules[name].head

    def has_adapter(self, name: str) -> bool:
        """Return whether this module is of a kind that gets a low-rank product."""
        return bool(self.modules[name].adapts)

    def nearest(self, name: str, *, adapted: bool) -> str:
        """Return a hint: what `name` was probably meant to be, else a few of the model's names."""
        candidates: dict[str, None] = {}
        for module in self.modules:
            if self.has_adapter(module) or (not adapted and self.modules[module].has_params):
                parts = [part for part in module.split(".") if not part.isdigit()]
                candidates |= dict.fromkeys([parts[-1], ".".join(parts[-2:])])
        by_lower = {word.lower(): word for word in reversed(candidates)}
        # An end that somebody has cut short ("head"), or a word misspelt.
        ends = [word for word in candidates if "." not in word and word.endswith(f"_{name}")]
        near = [
            by_lower[word]
            for word in difflib.get_close_matches(name.strip().lower(), list(by_lower), _MANY, cutoff=0.6)
        ]
        if suggestions := list(dict.fromkeys([*near, *ends]))[:_MANY]:
            return f"did you mean {_either(suggestions)}?"
        listed = [word for word in candidates if "." not in word]
        return f"the model has {', '.join(listed[:12])}{', ...' if len(listed) > 12 else ''}"

    def below(self, name: str) -> list[str]:
        """Return the short names of what could be named instead of a module that holds others."""
        inside = [module for module in self.modules if module.startswith(f"{name}.") and self.has_adapter(module)]
        return list(dict.fromkeys(module.rpartition(".")[2] for module in inside))


def _of_targets(names: _Names, params: Any) -> Iterator[RecipeMistake]:
    targets = params.target_modules
    if targets == ALL_LINEAR:
        return
    if isinstance(targets, str):
        yield from _of_pattern(names, targets, dora=getattr(params, "dora", False))
        return
    if not targets:
        yield RecipeMistake(
            key=_TARGETS, message="names no module", fix=f'"{ALL_LINEAR}" is every linear layer but the head'
        )
    for index, name in enumerate(targets):
        key = (*_TARGETS, index)
        meant = names.matched(name)
        if not meant and name in names.experts:
            continue  # the method looks for these itself
        if not meant:
            is_pattern = any(char in name for char in "*^$|\\[](){}+?")
            fix = (
                f"a regular expression is one text, not in a list: target_modules = '{name}'"
                if is_pattern
                else names.nearest(name, adapted=True)
            )
            yield RecipeMistake(key=key, message=f'"{name}" is no module of the model', fix=fix)
            continue
        yield from _of_kinds(names, key, f'"{name}"', meant, dora=getattr(params, "dora", False))


def _of_pattern(names: _Names, pattern: str, *, dora: bool) -> Iterator[RecipeMistake]:
    try:
        meant = names.fitting(pattern)
    except re.error as error:
        yield RecipeMistake(
            key=_TARGETS, message=f"is no regular expression: {error}", fix='a list of names: ["q_proj"]'
        )
        return
    if meant:
        yield from _of_kinds(names, _TARGETS, "the expression", meant, dora=dora)
    elif names.matched(pattern):
        fix = f'write a list, ["{pattern}"], or ".*{pattern}"'
        yield RecipeMistake(
            key=_TARGETS, message="is one text, so a regular expression for whole names; it fits none", fix=fix
        )
    elif difflib.SequenceMatcher(None, pattern.lower(), ALL_LINEAR).ratio() > 0.75:
        yield RecipeMistake(key=_TARGETS, message="fits no module of the model", fix=f'did you mean "{ALL_LINEAR}"?')
    else:
        yield RecipeMistake(
            key=_TARGETS,
            message="fits no module of the model: it must fit a whole name",
            fix=f"such as {next(filter(names.has_adapter, names.modules), '')}; {names.nearest(pattern, adapted=True)}",
        )


def _of_kinds(names: _Names, key: Any, subject: str, meant: list[str], *, dora: bool) -> Iterator[RecipeMistake]:
    """Report the first of the matched modules that takes no adapter."""
    without = next((module for module in meant if not names.has_adapter(module)), None)
    if without is not None:
        inside = names.below(without)
        fix = f"name the layers in it: {', '.join(inside[:8])}" if inside else "leave it out"
        if not inside and names.modules[without].trains:
            fix = "leave it out, or train it whole: modules_to_save"
        kind = names.modules[without].kind
        message = f"{subject} means {without}, a {kind}: only linear layers and embeddings take an adapter"
        yield RecipeMistake(key=key, message=message, fix=fix)
        return
    without_dora = [module for module in meant if names.modules[module].adapts == "embedding" or names.is_head(module)]
    if dora and without_dora:
        yield RecipeMistake(
            key=key, message=f"{subject} means {without_dora[0]}: embeddings and the head take no DoRA",
            fix="leave it out, or dora = false", also=(("method", "dora"),),
        )  # fmt: skip


def _of_tensors(listed: Listing, params: Any) -> Iterator[RecipeMistake]:
    """Report names of `target_parameters` that are no weights of all experts in one tensor."""
    for index, name in enumerate(getattr(params, "target_parameters", ())):
        if name.rpartition(".")[2] not in listed.experts:
            has = f"it has {', '.join(listed.experts)}" if listed.experts else "it has none: name its layers"
            yield RecipeMistake(
                key=("method", "target_parameters", index),
                message=f'"{name}" is no weight of all experts in one tensor in this model', fix=has,
            )  # fmt: skip


def _of_saved(names: _Names, params: Any) -> Iterator[RecipeMistake]:
    for index, name in enumerate(_saved(params)):
        key, meant = (*_SAVED, index), names.matched(name)
        if not meant:
            fix = names.nearest(name, adapted=False)
            yield RecipeMistake(key=key, message=f'"{name}" is no module of the model', fix=fix)
            continue
        empty = next((module for module in meant if not names.modules[module].trains), None)
        if empty is not None:
            message = f'"{name}" means {empty}, a {names.modules[empty].kind}, which has nothing to train'
            yield RecipeMistake(key=key, message=message, fix="leave it out")
            continue
        block = next(
            (inner for inner in names.blocks if any(inner == m or inner.startswith(f"{m}.") for m in meant)), None
        )
        if block is not None:
            yield RecipeMistake(
                key=key, message=f'"{name}" holds whole blocks, such as {block}',
                fix='name layers in them, or train all of the model: name = "full"',
            )  # fmt: skip
            continue
        packed = next(
            (inner for inner in names.in_4bit if any(inner == m or inner.startswith(f"{m}.") for m in meant)), None
        )
        if packed is not None:
            yield RecipeMistake(
                key=key, message=f'"{name}" holds {packed}, which is stored in 4 bits and cannot be trained whole',
                fix='leave it out, or name = "lora"', also=(("method", "name"),),
            )  # fmt: skip


def _of_both(names: _Names, params: Any) -> Iterator[RecipeMistake]:
    """Report modules that are both trained whole and given an adapter, which PEFT would leave out."""
    whole = [module for name in _saved(params) for module in names.matched(name)]
    for inner in whole:
        outer = next((module for module in whole if inner.startswith(f"{module}.")), None)
        if outer is not None:
            yield RecipeMistake(
                key=_SAVED, message=f"names {outer} and, inside of it, {inner}", fix="leave one of the two out"
            )
            return
    if params.target_modules == ALL_LINEAR:
        return
    patterns = isinstance(params.target_modules, str)
    targets = [(_TARGETS, params.target_modules)] if patterns else [
        ((*_TARGETS, index), name) for index, name in enumerate(params.target_modules)
    ]  # fmt: skip
    for key, name in targets:
        meant = names.fitting(name) if patterns else names.matched(name)
        if meant and all(any(module == w or module.startswith(f"{w}.") for w in whole) for module in meant):
            yield RecipeMistake(
                key=key, message=f'"{name}" is trained whole by modules_to_save, so its adapter would have no effect',
                fix="name it in one of the two", also=(_SAVED,),
            )  # fmt: skip


def _ends_with(module: str, name: str) -> bool:
    return module == name or module.endswith(f".{name}")


def _adapts(module: Any) -> Literal["linear", "embedding", ""]:
    """Return what kind of adapter a module can have; linear is also GPT-2's transposed layer."""
    from torch import nn

    kind = type(module)
    if isinstance(module, nn.Linear) or (kind.__name__, kind.__module__) == ("Conv1D", "transformers.pytorch_utils"):
        return "linear"
    return "embedding" if isinstance(module, nn.Embedding) else ""


def _either(words: list[str]) -> str:
    quoted = [f'"{word}"' for word in words]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} or {quoted[-1]}"
