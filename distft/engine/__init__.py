"""Processes and where tensors live: one file per way of spreading a model, behind the protocol in `core.types`."""

from distft.core.registry import Registry
from distft.engine.footprint import SoloFootprint
from distft.engine.fsdp2_footprint import Fsdp2Footprint
from distft.engine.params import AutoParams, EngineParams, Fsdp2Params, Zero3Params, Zero12Params
from distft.engine.spec import EngineSpec
from distft.engine.zero_footprint import Zero1Footprint, Zero2Footprint, Zero3Footprint

ENGINES: Registry[EngineSpec] = Registry("engine")
ENGINES.add(EngineSpec(name="auto", params=AutoParams, module="distft.engine.auto"))
ENGINES.add(
    EngineSpec(
        name="solo",
        params=EngineParams,
        module="distft.engine.solo",
        max_world=1,
        updates_in_backward=True,
        footprint=SoloFootprint(),
    )
)
ENGINES.add(EngineSpec(name="ddp", params=EngineParams, module="distft.engine.ddp"))
_ZERO = {"module": "distft.engine.deepspeed", "flattens": True, "library": "deepspeed"}
ENGINES.add(EngineSpec(name="zero1", params=Zero12Params, footprint=Zero1Footprint(), **_ZERO))
ENGINES.add(EngineSpec(name="zero2", params=Zero12Params, footprint=Zero2Footprint(), **_ZERO))
ENGINES.add(
    EngineSpec(name="zero3", params=Zero3Params, footprint=Zero3Footprint(), parameters="cut by module", **_ZERO)
)
ENGINES.add(
    EngineSpec(
        name="fsdp2",
        params=Fsdp2Params,
        module="distft.engine.fsdp2",
        parameters="cut by block",
        flattens=True,
        updates_in_backward=True,
        footprint=Fsdp2Footprint(),
    )
)

__all__ = ["ENGINES", "EngineSpec"]
