"""What fsdp2 costs: rows of every tensor on each rank, blocks gathered one by one."""

from __future__ import annotations

from math import prod

from distft.engine.footprint import (
    FP32,
    ROOT,
    EngineSetup,
    Footprint,
    GatheredLayers,
    GradientRule,
    ModelSizes,
    ParamSizes,
    Sent,
    State,
    block_bytes,
    constants_bytes,
    copied_bytes,
    gib_text,
    trained_in_block,
    unit_bytes,
)
from distft.engine.params import Fsdp2Params


class Fsdp2Footprint(Footprint):
    """Each rank of a group keeps its equal chunk of rows; groups repeat each other."""

    shards_state = True
    saves_memory = 2
    traffic = "blocks gathered for forward and backward, the root once, gradients scattered"

    def shards(self, setup: EngineSetup) -> int:
        """Return the ranks of a group."""
        return setup.group(_params(setup).shard_within)

    def storage(self, shards: int) -> str:
        """Describe what a rank keeps of each tensor: rows."""
        return f"ceil(rows / {shards}) of each tensor"

    def keeps_fp32_gradients(self, setup: EngineSetup) -> bool:
        """Return False where the library itself keeps fp32 what is unreduced, or a group's share."""
        if _gathers_once(setup) or self.shards(setup) < setup.world:
            return False
        return super().keeps_fp32_gradients(setup)

    def state(self, model: ModelSizes, shards: int, rank: int, rule: GradientRule) -> State:
        """Return the state of a rank-th chunk of rows; storages are padded to the first rank's chunk."""
        trained = [param for param in model.params if param.trained]
        updated: list[tuple[int, ...]] = []
        masters, stored = 0, []
        for param in trained:
            rows, *rest = param.stored_shape
            chunk = -(-rows // shards)
            own_rows = min(rows, (rank + 1) * chunk) - min(rows, rank * chunk)
            numel = own_rows * prod(rest)
            if numel == 0:
                continue
            updated.append((own_rows, *rest))
            stored.append(numel * rule.item_bytes(param))
            masters += FP32 * numel if param.item_bytes != FP32 else 0
        gradients = sum(stored) if rule.fp32 else sum(_row_shard(param, shards) for param in trained)
        return State(
            weights=sum(_row_shard(param, shards) for param in model.params),
            quant_constants=constants_bytes(model),
            gradients=gradients,
            accumulating=gradients,
            kept_gradients=0,
            master=masters,
            update=copied_bytes([prod(shape) for shape in updated], stored, rule, frees=True),
            updated=tuple(updated),
        )

    def accumulating_bytes(self, model: ModelSizes, setup: EngineSetup, state: State) -> int:
        """Count a group's shares in the type they are reduced in, until groups meet in the last micro-batch."""
        if setup.micros_per_step > 1 and self.shards(setup) < setup.world:
            return state.accumulating * setup.reduced_bytes // model.item_bytes
        return super().accumulating_bytes(model, setup, state)

    def load_bytes(self, model: ModelSizes, state: State) -> int:
        """Count a unit as whole until it is sharded."""
        return super().load_bytes(model, state) + unit_bytes(model)

    def gathered(self, model: ModelSizes, setup: EngineSetup) -> GatheredLayers:
        """Count blocks as they come and go, or all weights over a step."""
        item, sent = model.item_bytes, setup.reduced_bytes
        reduced = trained_in_block(model) * (item + sent)
        if _gathers_once(setup):
            stored = sum(param.stored_bytes for param in model.params)
            unreduced = sent * model.trained if setup.micros_per_step > 1 else 0
            return GatheredLayers(
                num_bytes=stored + max(unreduced, reduced),
                formula=f"all weights {gib_text(stored)}, gathered once a step"
                + (
                    f" + all gradients in {sent} bytes {gib_text(unreduced)}, reduced once a step"
                    if unreduced
                    else f" + a block's gradients in {item} and in {sent} bytes {gib_text(reduced)}"
                ),
            )
        root = sum(param.stored_bytes for param in model.params if param.block == ROOT)
        block = block_bytes(model)
        return GatheredLayers(
            num_bytes=root + 3 * block + reduced,
            formula=f"root {gib_text(root)} (whole from forward to backward) + 3 x a block {gib_text(block)} (one "
            f"computes, one arrives, and the buffer out of which it is copied) + a block's gradients in {item} and in "
            f"{sent} bytes {gib_text(reduced)}",
        )

    def fresh_gradient_bytes(self, model: ModelSizes, *, added: bool) -> int:
        """Return None: it is counted with what was gathered."""
        return 0

    def sent(self, model: ModelSizes, setup: EngineSetup) -> Sent:
        """Count the root (embedding, head, last norm) gathered once for forward and backward, blocks once for each.

        With groups (`shard_within`) what crosses them are gradients alone. All of it is sent in every micro-batch,
        unless `gather = "once_a_step"`.
        """
        world, group = setup.world, self.shards(setup)
        stored = sum(param.stored_bytes for param in model.params)
        root = sum(param.stored_bytes for param in model.params if param.block == ROOT)
        reduced = setup.reduced_bytes * model.trained
        within = (group - 1) / group
        gathers = stored if _gathers_once(setup) else 2 * stored - root
        replicas = world // group
        # a shard's gradients are summed over the groups: an all-reduce of 1 / group of them
        across = 2 * reduced / group * (replicas - 1) / replicas
        inside = gathers * within + reduced * within
        if group == world:
            return Sent(step=inside) if _gathers_once(setup) else Sent(micro=inside)
        if _gathers_once(setup):
            return Sent(step=across, step_inside=inside)
        return Sent(step=across, micro_inside=inside)

    def sent_in_forward(self, model: ModelSizes, setup: EngineSetup) -> float:
        """Return the bytes of a gather of every weight, unless weights stay whole for a step."""
        group = self.shards(setup)
        stored = sum(param.stored_bytes for param in model.params)
        return 0.0 if _gathers_once(setup) else stored * (group - 1) / group


def _params(setup: EngineSetup) -> Fsdp2Params:
    assert isinstance(setup.params, Fsdp2Params)
    return setup.params


def _gathers_once(setup: EngineSetup) -> bool:
    """Return whether weights stay whole, and gradients unreduced, over the micro-batches of a step."""
    return _params(setup).gather == "once_a_step"


def _row_shard(param: ParamSizes, shards: int) -> int:
    rows, *rest = param.stored_shape
    return -(-rows // shards) * prod(rest) * param.item_bytes
