"""One change at a time: what a recipe's key does not say is changed in the case's own process before it trains."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass


def _nothing() -> None:
    """The recipe says it all."""


def _no_reason() -> str:
    return ""


@dataclass(frozen=True, kw_only=True)
class Change:
    """What is different from the baseline."""

    what: str
    overrides: tuple[str, ...] = ()
    patch: Callable[[], None] = _nothing
    """In the case's process."""
    why_not: Callable[[], str] = _no_reason
    """Why it cannot be made here; asked without opening a device."""
    methods: tuple[str, ...] = ("full", "lora", "qlora")


def _chunk(mib: int) -> Callable[[], None]:
    def patch() -> None:
        from distft.model import cross_entropy

        cross_entropy.CHUNK_BYTES = mib * 2**20

    return patch


def _missing(*modules: str) -> Callable[[], str]:
    def why_not() -> str:
        absent = [name for name in modules if not importlib.util.find_spec(name.partition(".")[0])]
        return f"{', '.join(absent)} is not installed" if absent else ""

    return why_not


def _repeated_keys() -> None:
    from distft.model import attention

    attention._varlen_parameters = lambda: frozenset()  # type: ignore[assignment]  # as under torch < 2.12


def _no_grouped() -> str:
    import inspect

    from torch.nn.attention import varlen

    grouped = "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters
    return "" if grouped else "this torch's varlen attention always wants keys repeated"


def _fa3() -> None:
    from torch.nn import attention

    attention.activate_flash_attention_impl("FA3")  # type: ignore[attr-defined]


def _no_fa3() -> str:
    from torch.nn import attention

    if not hasattr(attention, "activate_flash_attention_impl"):
        return "this torch has no activate_flash_attention_impl"
    return _missing("flash_attn_interface")()


def _no_flash_package() -> str:
    """Either of them; which one, `distft.model.attention.choose` decides by the device."""
    lacking = [_missing(package)() for package in ("flash_attn", "flash_attn_interface")]
    return "; ".join(lacking) if all(lacking) else ""


def _plain_lora() -> None:
    """PEFT's own forward."""
    products = importlib.import_module("distft.model.adapters.products")
    lora = importlib.import_module("distft.model.adapters.lora")

    def keep(wrapped: object, adapter: str) -> None:
        """PEFT's forward stays."""

    products.fuse = keep  # type: ignore[attr-defined]
    if hasattr(lora, "fuse"):
        lora.fuse = keep  # type: ignore[attr-defined]


def _no_fused_lora() -> str:
    found = importlib.util.find_spec("distft.model.adapters.products")
    return "" if found else "this version has no fused LoRA product: the baseline is PEFT's forward"


CHANGES = {
    "compile-off": Change(what="without torch.compile", overrides=("train.compile=false",)),
    "chunk-128": Change(what="head chunks of 128 MiB of logits", patch=_chunk(128)),
    "chunk-512": Change(what="head chunks of 512 MiB", patch=_chunk(512)),
    "chunk-1024": Change(what="head chunks of 1 GiB", patch=_chunk(1024)),
    "gqa-repeated": Change(what="keys and values repeated", patch=_repeated_keys, why_not=_no_grouped),
    "flash": Change(
        what="the flash-attn packages' attention", overrides=('model.attention="flash"',), why_not=_no_flash_package
    ),
    "varlen": Change(what="torch's varlen FlashAttention 2", overrides=('model.attention="varlen"',)),
    "fa3": Change(
        what="FlashAttention 3 below torch's varlen attention",
        overrides=('model.attention="varlen"',),
        patch=_fa3,
        why_not=_no_fa3,
    ),
    "liger": Change(
        what="Liger's fused loss", overrides=('model.cross_entropy="fused"',), why_not=_missing("liger_kernel")
    ),
    "lora-unfused": Change(
        what="PEFT's own LoRA forward", patch=_plain_lora, why_not=_no_fused_lora, methods=("lora", "qlora")
    ),
}
