"""An adapter's folder beside its base, through PEFT alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distft.core.errors import Problem, RecipeError
from distft.model.adapters.trained import refuse_activated

if TYPE_CHECKING:
    import torch

CONFIG = "adapter_config.json"


def base_of(folder: Path) -> Path:
    """Return the folder of the base model that an adapter names.

    Raises:
        RecipeError: the config cannot be read, or the base is not on this machine.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        named = config.get("base_model_name_or_path")
    except (OSError, ValueError) as error:
        raise _mistake(folder, f"{CONFIG} cannot be read: {error}", "an adapter in PEFT's form") from None
    if not named:
        raise _mistake(folder, f"{CONFIG} names no base_model_name_or_path", "write the base's folder there")
    place = Path(named).expanduser()
    if place.is_dir():
        return place
    from distft.core import hub

    try:
        return hub.snapshot(named, None, ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"])
    except Exception as error:  # the hub library raises many kinds; all mean: no base
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise _mistake(
            folder, f"its base {named} is no folder here, and the hub does not give it ({first})",
            "write the base's folder into base_model_name_or_path",
        ) from None  # fmt: skip


def load_beside(folder: Path, *, dtype: torch.dtype) -> Any:
    """Return the base with the adapter beside it, not merged, for inference.

    Raises:
        RecipeError: PEFT cannot put this adapter on its base.
    """
    import transformers
    from peft import PeftModel

    base = base_of(folder)
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    refuse_activated(config, folder)
    kind = config.get("task_type")
    rewards = kind == "SEQ_CLS"
    loader: Any = transformers.AutoModelForSequenceClassification if rewards else transformers.AutoModelForCausalLM
    try:
        lm = loader.from_pretrained(base, dtype=dtype, local_files_only=True, **({"num_labels": 1} if rewards else {}))
        return PeftModel.from_pretrained(lm, str(folder)).eval()
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        raise _mistake(
            folder,
            f"PEFT cannot put it on {base}: {(str(error).splitlines() or [''])[0]}",
            "use the base it was trained on",
        ) from error


def _mistake(folder: Path, message: str, fix: str) -> RecipeError:
    return RecipeError(str(folder), [Problem(message=message, fix=fix)])


def low_rank_parts(beside: Any) -> dict[str, tuple[float, Any, Any]]:
    """Return (scale, A, B) of every layer that `load_beside` put a LoRA on; its product is scale * B @ A."""
    parts: dict[str, tuple[float, Any, Any]] = {}
    for name, module in beside.get_base_model().named_modules():
        if "default" in getattr(module, "lora_A", {}):
            down, up = module.lora_A["default"].weight, module.lora_B["default"].weight
            parts[name] = (float(module.scaling["default"]), down.detach(), up.detach())
    return parts


def add_adapter(beside: Any, name: str, folder: Path) -> None:
    """Put a further adapter beside the base, under a name.

    Raises:
        RecipeError: it was trained on another base, or has other shapes.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        refuse_activated(config, folder)
        named = config.get("base_model_name_or_path")
        there = next(iter(beside.peft_config.values())).base_model_name_or_path
        if named != there:
            raise _mistake(folder, f"its base is {named}, and the other adapters' {there}", "take adapters of one base")
        beside.load_adapter(str(folder), adapter_name=name, is_trainable=False)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise _mistake(folder, f"PEFT cannot put it beside the others: {first}", "take adapters of one base") from error
