"""An adapter that was trained before, read from its folder instead of starting as identity."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distft.core.errors import Problem, RecipeError
from distft.model.adapters.lora import ADAPTER
from distft.model.adapters.spec import MethodSpec, file_key

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_MAY_DIFFER = frozenset(
    {"base_model_name_or_path", "inference_mode", "revision", "peft_version", "auto_mapping", "init_lora_weights",
     "init_weights", "lora_dropout", "vera_dropout", "module_dropout", "rank_dropout", "dropout", "adapter_dtype",
     "start", "runtime_config"}
)  # fmt: skip
"""Keys of PEFT's configs (and of ours) that a continued adapter may have other values of."""


_NUMBERS = frozenset({"r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern"})
"""Keys of PEFT's configs that decide what the tensors of a LoRA are multiplied with."""


def from_folder(method: MethodSpec, folder: Path) -> MethodSpec:
    """Return `method` with its own parameters filled from `folder`.

    Raises:
        RecipeError: the folder has no safetensors weights; later, when it is filled: they do not fit the recipe.
    """
    file = folder / WEIGHTS
    if not file.is_file():
        raise RecipeError(str(folder), [Problem(message=f"no {WEIGHTS}", fix="an adapter in PEFT's form")])

    def owns(name: str) -> bool:
        return method.owns(name) or f".modules_to_save.{ADAPTER}." in name

    def attach(lm: Any, params: Any, dtype: torch.dtype) -> nn.Module:
        return method.attach(lm, method.saved(params), dtype)

    def stored(name: str, model: nn.Module, meta: Tensor, generator: torch.Generator) -> Tensor:
        from safetensors import safe_open

        with safe_open(file, framework="pt") as weights:
            tensor = method.stored(weights, name, meta)
        if tensor is None or tensor.shape != meta.shape:
            problem = (
                "lacks it" if tensor is None else f"has it as {tuple(tensor.shape)} instead of {tuple(meta.shape)}"
            )
            raise RecipeError(
                str(file),
                [Problem(message=f"{file_key(name)}: the file {problem}", fix="use the adapter's own recipe")],
            )
        return tensor

    return replace(method, owns=owns, attach=attach, fresh=stored, filled_from=folder)


def evaluated(method: MethodSpec, folder: Path) -> MethodSpec:
    """Return `method` filled from a folder whose numbers mean there what they mean under the recipe.

    Raises:
        RecipeError: as `from_folder`; later, when it is attached: the folder has another rank or scale, so that the
            recipe would compute another adapter than the one in it (a combined one, say).
    """
    filled = from_folder(method, folder)
    try:
        saved = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(str(folder), [Problem(message=f"{CONFIG} cannot be read: {error}")]) from None
    refuse_activated(saved, folder)

    def attach(lm: Any, params: Any, dtype: torch.dtype) -> nn.Module:
        attached = filled.attach(lm, method.settled(params, saved), dtype)
        if differ := _other_settings(saved, attached, _NUMBERS):
            message = f"its settings are not the recipe's: {'; '.join(differ)}"
            fix = f"distft merge {folder} --out DIR, and look at DIR; or an adapter of this recipe"
            raise RecipeError(str(folder), [Problem(message=message, fix=fix)])
        return attached

    return replace(filled, attach=attach)


def refuse_activated(config: dict[str, Any], folder: Path) -> None:
    """Refuse an adapter that acts on some of a row's tokens: everything here computes it on all, or on none.

    Raises:
        RecipeError: it does (aLoRA, https://arxiv.org/abs/2504.12397).
    """
    tokens = config.get("alora_invocation_tokens")
    if tokens is not None:
        message = f"it is an aLoRA, which acts behind the tokens {tokens} alone, and here adapters act on every token"
        fix = "PEFT's own generate computes it, row by row; or train a LoRA"
        raise RecipeError(str(folder), [Problem(message=message, fix=fix)])


def start_folder(start: str) -> Path:
    """Return the adapter folder that `[method] start` names: itself, the final/ of a run, or a hub id's.

    Raises:
        RecipeError: there is none.
    """
    place = Path(start).expanduser()
    for folder in (place, place / "final"):
        if (folder / CONFIG).is_file():
            return folder
    if not place.exists() and start.count("/") == 1 and not start.startswith((".", "/", "~")):
        from distft.core import hub

        try:
            return hub.snapshot(start, None, [CONFIG, WEIGHTS])
        except Exception as error:  # the hub library raises many kinds; all mean: no adapter
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise _mistake(f'"{start}" is no folder here, and the hub does not give it ({first})', _FIX) from None
    raise _mistake(f'"{start}" holds no {CONFIG}, nor does a final/ in it', _FIX)


_FIX = "the folder of an adapter, of a run that trained one, or a hub id owner/name"


def continued(method: MethodSpec, params: Any, lm: Any) -> MethodSpec:
    """Return `method`, filled from the adapter that the recipe's `start` names; itself where it names none.

    Args:
        method: of the recipe, or one that is filled already.
        params: of the method.
        lm: the base.

    Raises:
        RecipeError: it is none of this base, or of other settings; says which.
    """
    start = getattr(params, "start", None)
    if start is None or method.filled_from is not None:
        return method
    folder = start_folder(start)
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _mistake(f"{folder / CONFIG} cannot be read: {error}", "use another adapter") from None
    refuse_activated(config, folder)
    base = config.get("base_model_name_or_path") or ""
    if not _is_same_place(base, lm.name_or_path):
        raise _mistake(
            f"it was trained on {base}, and [model] path is {lm.name_or_path}",
            f"train on its base; if this is the same model elsewhere, write its path into {folder / CONFIG}",
        )
    filled = from_folder(replace(method, saved=lambda chosen: chosen), folder)

    def attach(model: Any, chosen: Any, dtype: torch.dtype) -> nn.Module:
        attached = filled.attach(model, chosen, dtype)
        _refuse_other_settings(config, attached)
        return attached

    return replace(filled, attach=attach)


def _refuse_other_settings(saved: dict[str, Any], attached: Any) -> None:
    """Compare the config of the saved adapter with that of the one that was attached."""
    if differ := _other_settings(saved, attached):
        raise _mistake(f"its settings are not the recipe's: {'; '.join(differ[:4])}", "take over what it has")


def _other_settings(saved: dict[str, Any], attached: Any, keys: frozenset[str] | None = None) -> list[str]:
    """Return the settings in which they differ; `keys`: of these alone."""
    own = getattr(attached, "peft_config", None)
    if own is None:
        here = attached.__dict__.get("bottleneck_config", {})
    else:
        here = json.loads(json.dumps(own[ADAPTER].to_dict(), default=lambda value: sorted(value)))
    differ = []
    is_other_type = here.get("peft_type") != saved.get("peft_type") and "peft_type" in here
    both = here.keys() & saved.keys() - _MAY_DIFFER
    for key in ["peft_type"] if is_other_type else sorted(both if keys is None else both & keys):
        there, mine = (sorted(value) if isinstance(value, list) else value for value in (saved[key], here[key]))
        if there != mine and (there or mine):
            differ.append(f"{key}: {_short(there)} there, {_short(mine)} here")
    return differ


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _is_same_place(one: str, other: str) -> bool:
    return one == other or Path(one).expanduser().resolve() == Path(other).expanduser().resolve()


def _mistake(message: str, fix: str) -> RecipeError:
    return RecipeError("recipe", [Problem(message=f"[method] start: {message}", fix=fix)])
