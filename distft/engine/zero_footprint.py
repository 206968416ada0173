"""What DeepSpeed's ZeRO stages cost, by the library's own rules for partitions, buckets and copies."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import prod

from distft.engine.footprint import (
    FP32,
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
    trained_in_block,
    unit_bytes,
)
from distft.engine.params import Zero3Params

BUCKET_ELEMENTS = 50_000_000
"""Largest communication bucket: 100 MB in bf16, enough to fill an NVLink or a 400 Gb/s link."""
ZERO3_SUB_GROUP = 1_000_000_000
"""Elements of a rank's partition that DeepSpeed updates at a time (`sub_group_size`)."""
ZERO12_ALIGNMENT = 2
"""DeepSpeed pads a flat group to a multiple of this many elements for each rank (`nccl_start_alignment_factor`)."""


def bucket_elements(total: int, largest: int) -> int:
    """Return a communication bucket's elements, for `total` elements whose largest tensor has `largest`.

    DeepSpeed takes multiples of the alignment alone, and a value layer's bias makes a total odd.
    """
    return -(-max(largest, min(BUCKET_ELEMENTS, total)) // ZERO12_ALIGNMENT) * ZERO12_ALIGNMENT


class Zero1Footprint(Footprint):
    """Whole weights; optimizer state of each group laid end to end, padded and cut into equal parts."""

    shards_state = True
    sums_stay_on_device = True
    _shards_gradients = False

    def storage(self, shards: int) -> str:
        """Describe what a rank keeps: whole weights."""
        return f"whole; optimizer state of 1/{shards}"

    def state(self, model: ModelSizes, shards: int, rank: int, rule: GradientRule) -> State:
        """Lay each group end to end, padded and cut into `shards` equal parts."""
        trained = [param for param in model.params if param.trained]
        weights = sum(param.stored_bytes for param in model.params if not param.trained)
        item = model.item_bytes  # DeepSpeed converts the module, adapters of another type too
        updated, gradients = [], 0
        for group in _groups(trained):
            numel = sum(param.numel for param in group)
            padded = -(-numel // (ZERO12_ALIGNMENT * shards)) * ZERO12_ALIGNMENT * shards
            part = padded // shards
            weights += padded * item
            updated.append((part,))
            # fp32 ones are added into this rank's part, without what its tensors have beyond it.
            gradients += FP32 * part if rule.fp32 else item * _gradients_touching(group, rank * part, part)
        whole = (FP32 if rule.fp32 else item) * sum(param.numel for param in trained)
        unsharded = whole + (gradients if rule.fp32 else 0)
        largest_item = max((param.item_bytes for param in trained), default=FP32)
        return State(
            weights=weights,
            quant_constants=constants_bytes(model),
            gradients=gradients,
            # stage 1 reduces at the end of the step only, so it keeps every gradient until then; fp32: into its part
            accumulating=gradients if self._shards_gradients else unsharded,
            kept_gradients=0,
            master=FP32 * sum(part for (part,) in updated),
            update=0 if rule.fp32 else _flattened(updated, largest_item),
            updated=tuple(updated),
        )

    def load_bytes(self, model: ModelSizes, state: State) -> int:
        """Count the flat copy beside the parameters it replaces."""
        trained = sum(param.stored_bytes for param in model.params if param.trained)
        return state.weights + state.quant_constants + trained

    def gathered(self, model: ModelSizes, setup: EngineSetup) -> GatheredLayers:
        """Count the buckets."""
        filled = self._bucket_item_bytes(model, setup)
        sent = setup.reduced_bytes if setup.reduced_bytes != filled else 0
        bucket = _bucket(model)
        return GatheredLayers(
            num_bytes=bucket * (2 * filled + sent),
            formula=f"2 reduce buckets (one fills, one is on the wire) x {bucket:,} elements x {filled} bytes"
            + (f" + what is sent of one x {sent} bytes" if sent else ""),
        )

    def sent(self, model: ModelSizes, setup: EngineSetup) -> Sent:
        """Count gradients to their owners and weights back, once a step."""
        return Sent(step=(_reduced_bytes(model, setup) + _trained_bytes(model)) * _others(setup.world))

    def _bucket_item_bytes(self, model: ModelSizes, setup: EngineSetup) -> int:
        return FP32 if self.keeps_fp32_gradients(setup) else model.item_bytes


class Zero2Footprint(Zero1Footprint):
    """Stage 1, and each gradient on its owner alone."""

    saves_memory = 1
    traffic = "gradients reduced to their owners"
    _shards_gradients = True

    def storage(self, shards: int) -> str:
        """Describe what a rank keeps: whole weights."""
        return f"whole; optimizer state and gradients of 1/{shards}"

    def sent(self, model: ModelSizes, setup: EngineSetup) -> Sent:
        """Count gradients to their owners in every micro-batch, weights back once a step."""
        others = _others(setup.world)
        return Sent(micro=_reduced_bytes(model, setup) * others, step=_trained_bytes(model) * others)

    def _bucket_item_bytes(self, model: ModelSizes, setup: EngineSetup) -> int:
        return model.item_bytes


class Zero3Footprint(Footprint):
    """Elements of every tensor on each rank, padded; masters always, even of fp32 weights."""

    shards_state = True
    saves_memory = 3
    gathers_inside_blocks = True
    traffic = "weights gathered for forward and backward, gradients scattered: 3 x bytes x (n - 1) / n"

    def storage(self, shards: int) -> str:
        """Describe what a rank keeps of each tensor: elements."""
        return f"ceil(numel / {shards}) of each tensor"

    def state(self, model: ModelSizes, shards: int, rank: int, rule: GradientRule) -> State:
        """Count ceil(numel / shards) elements of every tensor on every rank."""
        trained = [param for param in model.params if param.trained]
        updated = [(numel,) for group in _groups(trained) for numel in _sub_groups(group, shards)]
        local = sum(numel for (numel,) in updated)
        item = FP32 if rule.fp32 else model.item_bytes  # one buffer, whatever adapters compute in
        gradients = local * item
        return State(
            weights=sum(_share(param, shards) * param.item_bytes for param in model.params),
            quant_constants=constants_bytes(model),
            gradients=gradients,
            accumulating=gradients,
            kept_gradients=gradients,  # one flat buffer, made once
            master=FP32 * local,
            update=_flattened(updated, item),
            updated=tuple(updated),
        )

    def load_bytes(self, model: ModelSizes, state: State) -> int:
        """Count a unit as whole until it is sharded."""
        return super().load_bytes(model, state) + unit_bytes(model)

    def gathered(self, model: ModelSizes, setup: EngineSetup) -> GatheredLayers:
        """Count layers up to `max_live_parameters`, the second copy of the weights, and the reduce bucket."""
        item, bucket = model.item_bytes, _bucket(model)
        stored = sum(param.stored_numel for param in model.params)
        live = min(stored, max(2 * bucket, 2 * block_bytes(model) // item))
        largest_trained = max((param.numel for param in model.params if param.trained), default=0)
        gradients = trained_in_block(model) if model.atomic else largest_trained
        over = _second_copy_over(setup)
        second = -(-stored // over) if over else 0
        return GatheredLayers(
            num_bytes=(live + gradients + second) * item + bucket * setup.reduced_bytes,
            formula=f"({live:,} gathered (max_live_parameters = 2 buckets) + gradients of what was gathered last "
            f"{gradients:,}"
            + (f" + second copy of the weights over {over} ranks {second:,}" if second else "")
            + f") elements x {item} bytes + reduce bucket {bucket:,} x {setup.reduced_bytes} bytes",
        )

    def fresh_gradient_bytes(self, model: ModelSizes, *, added: bool) -> int:
        """Return None: it is counted with what was gathered."""
        return 0

    def sent(self, model: ModelSizes, setup: EngineSetup) -> Sent:
        """Count weights for forward and backward and gradients, in every micro-batch.

        With groups (`shard_within`) the backward pass gathers second copies over the group's own link: of what is
        trained they are stale after a step, of frozen weights never.
        """
        stored = sum(param.stored_bytes for param in model.params)
        trained, reduced = _trained_bytes(model), _reduced_bytes(model, setup)
        others, over = _others(setup.world), _second_copy_over(setup)
        if over:
            return Sent(micro=(trained + reduced) * others, micro_inside=(2 * stored - trained) * (over - 1) / over)
        return Sent(micro=(2 * stored + reduced) * others)

    def sent_in_forward(self, model: ModelSizes, setup: EngineSetup) -> float:
        """Return the bytes of a gather of every weight."""
        return sum(param.stored_bytes for param in model.params) * _others(setup.world)


def _second_copy_over(setup: EngineSetup) -> int:
    """Return the ranks that keep a second copy of the weights among them; 0: there is none."""
    assert isinstance(setup.params, Zero3Params)
    group = setup.group(setup.params.shard_within)
    return group if group < setup.world else 0


def _bucket(model: ModelSizes) -> int:
    return bucket_elements(model.total, max(param.numel for param in model.params))


def _trained_bytes(model: ModelSizes) -> int:
    return sum(param.stored_bytes for param in model.params if param.trained)


def _reduced_bytes(model: ModelSizes, setup: EngineSetup) -> int:
    return setup.reduced_bytes * model.trained


def _others(world: int) -> float:
    return (world - 1) / world


def _share(param: ParamSizes, shards: int) -> int:
    return -(-param.stored_numel // shards)


def _sub_groups(group: list[ParamSizes], shards: int) -> Iterator[int]:
    """Yield a group's local elements, cut after the tensor that reaches ZERO3_SUB_GROUP of them."""
    if sum(param.numel for param in group) <= ZERO3_SUB_GROUP:
        yield sum(_share(param, shards) for param in group)
        return
    filled = 0
    for param in group:
        filled += _share(param, shards)
        if filled >= ZERO3_SUB_GROUP or param is group[-1]:
            yield filled
            filled = 0


def _flattened(updated: list[tuple[int]], item: int) -> int:
    """Count gradients that DeepSpeed lays end to end and converts to fp32, one group at a time."""
    return (FP32 + (item if item != FP32 else 0)) * max((prod(shape) for shape in updated), default=0)


def _gradients_touching(group: list[ParamSizes], start: int, part: int) -> int:
    """Return the elements of every gradient that [start, start + part) of the group touches, whole, and of the padding.

    DeepSpeed keeps views of whole gradients: of a tensor that two ranks share, each holds all of it.
    """
    held, offset, end = 0, 0, start + part
    for param in group:
        if offset < end and offset + param.numel > start:
            held += param.numel
        offset += param.numel
    return held + max(0, end - max(offset, start))


def _groups(trained: Iterable[ParamSizes]) -> list[list[ParamSizes]]:
    """Return the optimizer's parameter groups (see `core.types.UpdateRule.groups`); empty ones are left out."""
    groups = {(decays, is_faster): list[ParamSizes]() for decays in (True, False) for is_faster in (False, True)}
    for param in trained:
        groups[param.decayed, param.faster].append(param)
    return [group for group in groups.values() if group]
