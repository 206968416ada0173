"""From a recipe's [model] and [method] to a module on the meta device that fills itself where an engine wants it.

Nothing whole is ever built: an engine asks for one block, gets real tensors for it, shards it, and asks for the
next. Values come from `distft.model.weights`, so every engine, world size and order of filling starts from the same.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distft.core.errors import MachineError
from distft.core.phase import PHASE
from distft.core.ranks import ReadGroup
from distft.model import attention, cross_entropy, load_balancing, new_rows, quantize, skeleton
from distft.model.adapters import MethodSpec, deploy_grids, token_rows, trained
from distft.model.adapters.lora_inits import RESIDUAL
from distft.model.attention_shape import head_size
from distft.model.blocks import blocks_of, ends_of
from distft.model.causal import CausalLM
from distft.model.heads import HEADS, HeadSpec, lm_critic, lm_value, put_head
from distft.model.layout import FileLayout
from distft.model.paths import ForwardPath
from distft.model.random_weights import NoSource, RandomSource, seed_of
from distft.model.shared_reads import SharedReads
from distft.model.tensor_files import mistake
from distft.model.tied_modules import tied_modules
from distft.model.towers import text_parameters
from distft.model.weights import SafetensorsSource, WeightSource, digest, meta_params
from distft.recipe.schema import ModelTable

WRAPPER = "lm."
"""CausalLM's name for the transformers model: the prefix of every parameter name engines see."""


def find_folder(table: ModelTable) -> Path:
    """Return the model's folder; hub ids are downloaded (config, tokenizer and safetensors only).

    Raises:
        RecipeError: neither a folder with a config.json nor a hub id that can be had.
    """
    wanted = ["*.json", "*.jinja", "tokenizer.model", "*.safetensors"]
    if table.init == "random":
        wanted.remove("*.safetensors")
    return skeleton.find(table, wanted)


def read_config(folder: Path) -> Any:
    """Read transformers' config; code that comes with a model is never run.

    How the folder stores its weights (`quantization_config`) is left out: they are dequantised when they are read, and
    what is saved is not quantised.

    Raises:
        RecipeError: the architecture needs code of its own, or transformers does not know it.
    """
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = raw.get("model_type")
    except (ValueError, AttributeError) as error:
        raise mistake(f"{folder}/config.json is not a JSON object", "fetch it again") from error
    if kind not in CONFIG_MAPPING:
        if "auto_map" in raw:
            raise mistake(
                f"{folder}/config.json has auto_map: the model brings its own code, which is not run, "
                f"and transformers does not know model_type {kind!r}",
                "use an architecture that transformers ships",
            )
        raise mistake(
            f"{folder}/config.json: "
            + (f"transformers does not know model_type {kind!r}" if kind else "no model_type"),
            "check the transformers version, or use an architecture that transformers ships",
        )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise mistake(f"{folder}/config.json: {error}", "check the transformers version") from error
    for part in (config, config.get_text_config()):
        for key in ("quantization_config", "compression_config", "auto_map"):
            part.__dict__.pop(key, None)
    return config


class MetaModel:
    """A `core.types.Weights`: the wrapped model without values, and the means to fill it."""

    def __init__(
        self,
        module: CausalLM,
        blocks: list[nn.Module],
        source: WeightSource,
        method: MethodSpec,
        *,
        tied: Mapping[str, tuple[str, nn.Module]],
        layout: FileLayout,
        seed: int,
        dtype: torch.dtype,
        row_starts: new_rows.RowStarts | None = None,
        critic_blocks: list[nn.Module] | None = None,
    ) -> None:
        """`tied`: module that has no weights of its own -> name and meta copy of the one whose weights it shares."""
        self.module = module
        self.rows = [blocks, critic_blocks] if critic_blocks else [blocks]
        """Blocks in the order of a forward: the policy's, and a critic's."""
        self.blocks = [block for row in self.rows for block in row]
        self.ends = ends_of(module)
        self.dtype = dtype
        self.layout = layout
        # Behind a frozen embedding the first block's input has no gradient to wait for, nor have DoRA's norms.
        inputs = module.transformer.get_input_embeddings()
        self.blocks_are_atomic = not method.adapter and all(
            param.requires_grad for unit in (inputs, *self.blocks) for param in unit.parameters()
        )
        self._source, self._method, self._seed, self._row_starts = source, method, seed, row_starts
        self._shared_reads: SharedReads | None = None
        self._names = {id(mod): name.removeprefix(WRAPPER) for name, mod in module.named_modules()}
        self._of_critic = {} if module.critic is None else dict(lm_critic.base_names(module))
        """Name in the base's files of each module of a critic, by id."""
        self._tied = tied
        # Weak: fsdp2 puts its shard in a parameter's place, and the whole one must not live on here.
        self._filled: dict[int, tuple[Tensor, weakref.ref[nn.Parameter]]] = {}
        self._buffers_read: set[int] = set()
        lm, lm_params = module.transformer, list(module.lm.named_parameters())
        kept = {*(lm._keep_in_fp32_modules or ()), *(getattr(lm, "_keep_in_fp32_modules_strict", None) or ())}
        self._in_fp32 = frozenset(kept)
        """Parts of names of buffers that transformers keeps in fp32 whatever the model's dtype."""
        self.starts: dict[str, str] = {}
        """sha256 of what a method's parameters start as, by their names, where none of them starts at zero."""
        own = [name for name, param in lm_params if param.requires_grad and method.owns(name)]
        self._notes_starts = method.adapter and not any(method.starts_at_zero(name) for name in own)

    def fill(self, unit: nn.Module, device: torch.device) -> None:
        """Give every parameter below `unit` that is still meta its value on `device`; tied tensors stay tied."""
        PHASE.enter("weights")
        if self._shared_reads is not None:
            self._shared_reads.read(self._calls_of(unit), device)
        for module in unit.modules():
            if any(True for _ in meta_params(module)):
                self._fill_one(module, device)
            self._fill_buffers(module, device)

    def read_within(self, group: ReadGroup | None) -> None:
        """Let the ranks of `group` read weights of files once; random ones every rank draws for itself."""
        self._shared_reads = None
        if group is not None and isinstance(self._source, SafetensorsSource):
            self._shared_reads = SharedReads(self._source, self._source.tensors, group)

    def _calls_of(self, unit: nn.Module) -> list[tuple[str, nn.Module]]:
        """Return every call of the source's `values` that filling `unit` takes, in order."""
        calls: list[tuple[str, nn.Module]] = []
        met = set(self._filled)
        for module in unit.modules():
            pending = {short: meta for short, meta in meta_params(module) if id(meta) not in met}
            met |= {id(meta) for meta in pending.values()}
            if pending and not self._is_fresh(module):
                calls += self._calls(module, pending)
        return calls

    def _calls(self, module: nn.Module, pending: Mapping[str, Tensor]) -> list[tuple[str, nn.Module]]:
        """Return the calls of the source's `values` for one module: names, and modules with the wanted parameters."""
        calls: list[tuple[str, nn.Module]] = []
        base = self._base_name(module)
        wanted = dict(pending)
        if base in self._tied:
            # The copy of a tied head that an adapter trains whole starts as what the head is tied to.
            calls.append(self._tied[base])
            for short, _ in meta_params(self._tied[base][1]):
                wanted.pop(short, None)
        if len(wanted) == len(list(meta_params(module))):
            calls.append((base, module))
        elif wanted:  # what is its own beside the shared weight, such as a bias
            rest: Any = copy.copy(module)
            rest._parameters = wanted
            calls.append((base, rest))
        return calls

    def _base_name(self, module: nn.Module) -> str:
        """Return its name in the base's files."""
        if id(module) in self._of_critic:
            return self._of_critic[id(module)]
        return self._method.base_name(f"{self._names[id(module)]}.x").removesuffix(".x")

    def _is_fresh(self, module: nn.Module) -> bool:
        """Return whether a module is an adapter's own, which starts from its seed and not from the files.

        Raises:
            MachineError: some of its parameters are the adapter's, and others the base's.
        """
        name = self._names[id(module)]
        if module is self.module.value_head or id(module) in self._of_critic:
            return module is self.module.value_head
        own = {self._method.owns(f"{name}.{short}") for short, param in module._parameters.items() if param is not None}
        if len(own) > 1:
            raise MachineError(f"{name} holds parameters of the base and of the adapter, which are filled apart")
        return own == {True} and self._method.fresh is not None

    def saved_buffers(self) -> list[tuple[str, Tensor]]:
        """Return the buffers that belong to the weights, by their whole names."""
        return [
            (f"{name}.{short}" if name else short, buffer)
            for name, module in self.module.named_modules()
            for short, buffer in module._buffers.items()
            if buffer is not None and short not in module._non_persistent_buffers_set
        ]

    def _fill_buffers(self, module: nn.Module, device: torch.device) -> None:
        """Fill buffers: constructors made them; those that belong to the weights are read once."""
        for short, buffer in module._buffers.items():
            if buffer is None:
                continue
            if short not in module._non_persistent_buffers_set and id(module) not in self._buffers_read:
                name = self._method.base_name(f"{self._names[id(module)]}.{short}".removeprefix("."))
                name = f"{self._of_critic[id(module)]}.{short}" if id(module) in self._of_critic else name
                stored = self._source.buffer(name, device)
                kept = torch.float32 if any(part in name for part in self._in_fp32) else buffer.dtype
                buffer = (buffer if stored is None else stored).to(device, kept, copy=True)
            module._buffers[short] = buffer.to(device)
        self._buffers_read.add(id(module))

    def _fill_one(self, module: nn.Module, device: torch.device) -> None:
        name = self._names[id(module)]
        pending = {}
        for short, meta in list(meta_params(module)):
            if id(meta) in self._filled:
                module._parameters[short] = self._shared(f"{name}.{short}", meta)
            else:
                pending[short] = meta
        if not pending:
            return
        if module is self.module.value_head:
            values = {short: torch.zeros(meta.shape) for short, meta in pending.items()}
        elif self._is_fresh(module):
            assert self._method.fresh is not None
            # Copies, so that no parameter is a view of another.
            values = {
                short: self._method.fresh(
                    f"{name}.{short}", self.module.lm, meta, self._generator(f"{name}.{short}")
                ).clone(memory_format=torch.contiguous_format)
                for short, meta in pending.items()
            }
        else:
            values = {}
            for base, requested in self._calls(module, pending):
                read = (self._shared_reads or self._source).values(base, requested, device)
                if self._row_starts is not None:
                    read = {short: self._row_starts.of(base, value) for short, value in read.items()}
                values |= read
        for short, meta in pending.items():
            real = module._parameters[short] = self._real(module, short, meta, values.pop(short), device)
            if self._notes_starts and meta.requires_grad and id(module) not in self._of_critic:
                self.starts[f"{name}.{short}".removeprefix(".")] = digest(real)

    def _shared(self, name: str, meta: Tensor) -> nn.Parameter:
        """Return the parameter that was filled under another name."""
        real = self._filled[id(meta)][1]()
        if real is None:
            raise MachineError(
                f"{name} is tied to a parameter of another block, which this engine has sharded: use another engine"
            )
        return real

    def _real(self, module: nn.Module, short: str, meta: Tensor, value: Tensor, device: torch.device) -> nn.Parameter:
        if short == "weight" and quantize.is_4bit(module):
            real = quantize.quantized(module, value.to(device, self.dtype))
            if RESIDUAL in module.__dict__:
                module.__dict__[RESIDUAL] = quantize.lost(module, real, value.to(device))
        elif quantize.is_4bit_expert(module, short):
            real = quantize.quantized_expert(module, short, value.to(device, self.dtype))
        else:
            if value.shape != meta.shape:
                raise MachineError(
                    f"{self._names[id(module)]}.{short} has shape {tuple(value.shape)} in the "
                    f"weights and {tuple(meta.shape)} in the config"
                )
            value = deploy_grids.rounded(module, value.to(device, meta.dtype), short)
            real = nn.Parameter(value, requires_grad=meta.requires_grad)
        self._filled[id(meta)] = (meta, weakref.ref(real))  # keeps `meta` alive: its id must not be reused
        return real

    def _generator(self, name: str) -> torch.Generator:
        return torch.Generator().manual_seed(seed_of(self._seed, name))


def build(
    table: ModelTable,
    folder: Path,
    method: MethodSpec,
    params: Any,
    *,
    seed: int,
    device: torch.device,
    per_token: bool = False,
    weights: bool = True,
    config: Any = None,
    path: ForwardPath | None = None,
    head: HeadSpec | None = None,
) -> MetaModel:
    """Build everything on the meta device, attached, wrapped, ready to be filled by an engine.

    `weights=False` leaves the source out: for planning without the files. `config` replaces the folder's. `head`: what
    stands on the hidden states, a language modelling head when None.

    Raises:
        RecipeError: weights are missing, pickled, or do not fit the config.
        MachineError: a kernel that was asked for cannot run here.
    """
    from accelerate import init_empty_weights
    from transformers import GenerationConfig

    dtype: torch.dtype = getattr(torch, table.dtype)
    head = head or HEADS["lm"]
    config = head.prepare(config or read_config(folder))
    rows = new_rows.of_recipe(table, params, adapter=method.adapter)
    of_files, rows_before = config, 0
    if rows is not None:
        config = copy.deepcopy(config)
        rows_before = new_rows.grow(config, rows)
    attention.register()
    kernel = (
        path.attention
        if path is not None
        else attention.choose(table.attention, device, dtype, head_size=head_size(config))
    )
    # Buffers are real: rotary frequencies are computed in constructors and stored nowhere.
    with init_empty_weights(include_buffers=False):
        lm = head.auto_class(config).from_config(config, dtype=dtype, attn_implementation=kernel)
        stored = lm if of_files is config else head.auto_class(of_files).from_config(of_files, dtype=dtype)
    for each in {id(each): each for each in (lm, stored)}.values():
        put_head(each, head)
        each.tie_weights()
    tied, layout = tied_modules(lm), FileLayout(lm)
    if head.generates and (folder / "generation_config.json").is_file():
        lm.generation_config = GenerationConfig.from_pretrained(folder)
    # What an adapter says of its base must lead there from any folder.
    is_folder = table.path.startswith((".", "/", "~")) or Path(table.path).exists()
    lm.name_or_path = os.path.abspath(folder) if is_folder else table.path
    source = _source(table, folder, stored, seed, dtype, head) if weights else NoSource()
    row_starts = None
    if rows is not None:
        row_starts = new_rows.RowStarts(lm, rows, rows_before, generates=head.generates)
        if hasattr(stored, "_weight_conversions"):
            lm._weight_conversions = stored._weight_conversions
        token_rows.mark(lm, rows.trained)
    method = trained.continued(method, params, lm)
    quant = method.quant(params)
    if quant is not None:
        quantize.store_in_4bit(lm, quant, dtype)
    blocks = blocks_of(lm)
    observed, router_loss = head.observe(lm), load_balancing.find(lm) if head.generates else None
    path = path or ForwardPath(attention=kernel, head="chunked" if observed is not None else "own")
    value_head = lm_value.build(lm, path, dtype) if head.values else None
    loss = cross_entropy.choose(table.cross_entropy, device, per_token=per_token)
    reached = text_parameters(lm)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "attach"))  # libraries draw what adapters start from while they attach them
        attached = method.attach(lm, params, dtype)
    for param in lm.parameters():
        if id(param) not in reached and not method.adapter:
            param.requires_grad_(False)
    new_rows.refuse_untrained(lm, row_starts, generates=head.generates)
    penalty = None if method.penalty is None else functools.partial(method.penalty, params)
    parts: dict[str, Any] = {"path": path, "observed": observed, "router": router_loss, "penalty": penalty}
    given: dict[str, Any] = {"tied": tied, "layout": layout, "seed": seed, "dtype": dtype, "row_starts": row_starts}
    if head.critic:
        assert observed is not None  # else `lm_value` has refused it
        with init_empty_weights(include_buffers=False):
            parts["critic"], given["critic_blocks"] = lm_critic.build(
                config, dtype, kernel, observed.trunk, router_loss=router_loss is not None
            )
    module = CausalLM(attached, loss, value_head=value_head, **parts)
    return MetaModel(module, blocks, source, method, **given)


def untrained(config: Any, kernel: str, head: HeadSpec | None = None) -> Any:
    """Return the transformers model of a config, its weights as they come, on the default device."""
    head = head or HEADS["lm"]
    lm = head.auto_class(config).from_config(head.prepare(config), attn_implementation=kernel)
    put_head(lm, head)
    return lm


def _source(table: ModelTable, folder: Path, lm: Any, seed: int, dtype: torch.dtype, head: HeadSpec) -> WeightSource:
    random = RandomSource(lm, seed, dtype)
    return random if table.init == "random" else SafetensorsSource(folder, lm, dtype, head=head, fresh=random)
