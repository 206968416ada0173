"""Processes and where tensors live: one file per way of spreading a model, behind the protocol in `core.types`."""

from distft.core.registry import Registry
from distft.engine.spec import AutoParams, EngineParams, EngineSpec, Fsdp2Params, Zero3Params, Zero12Params

ENGINES: Registry[EngineSpec] = Registry("engine")
ENGINES.add(EngineSpec(name="auto", params=AutoParams, module="distft.engine.auto"))
ENGINES.add(EngineSpec(name="solo", params=EngineParams, module="distft.engine.solo", max_world=1))
ENGINES.add(EngineSpec(name="ddp", params=EngineParams, module="distft.engine.ddp"))
_ZERO = {"module": "distft.engine.deepspeed", "flattens": True, "library": "deepspeed"}
ENGINES.add(EngineSpec(name="zero1", params=Zero12Params, **_ZERO))
ENGINES.add(EngineSpec(name="zero2", params=Zero12Params, **_ZERO))
ENGINES.add(EngineSpec(name="zero3", params=Zero3Params, **_ZERO))
ENGINES.add(EngineSpec(name="fsdp2", params=Fsdp2Params, module="distft.engine.fsdp2", flattens=True))

__all__ = ["ENGINES", "EngineSpec"]
