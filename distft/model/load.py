"""From a recipe's [model] and [method] to a module on the meta device that fills itself where an engine wants it.

Nothing whole is ever built: an engine asks for one block, gets real tensors for it, shards it, and asks for the
next. Values come from safetensors files (memory-mapped, so processes of one host share the pages) or, with
`init = "random"`, from the model's own initialisation, seeded by each module's name: every engine, world size and
order of filling starts from the same weights.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor, nn

from distft.core import hub
from distft.core.errors import MachineError, Problem, RecipeError
from distft.core.pulse import PULSE
from distft.model import attention, cross_entropy, quantize
from distft.model.adapters import MethodSpec
from distft.model.causal import CausalLM
from distft.recipe.schema import ModelTable

WRAPPER = "lm."
"""CausalLM's name for the transformers model: the prefix of every parameter name engines see."""

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class Source(Protocol):
    """Where base weights come from."""

    def values(self, name: str, module: nn.Module, device: torch.device) -> dict[str, Tensor]:
        """The direct parameters of the base module called `name`, by their short names."""
        ...


def find_folder(table: ModelTable) -> Path:
    """The model's folder; hub ids are downloaded (config, tokenizer and safetensors only).

    Raises:
        RecipeError: neither a folder with a config.json nor a hub id that can be had.
    """
    folder = Path(table.path).expanduser()
    if (folder / "config.json").is_file():
        return folder
    if folder.exists() or table.path.startswith((".", "/", "~")) or table.path.count("/") != 1:
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:6]) if folder.is_dir() else ""
        said = (
            f"the folder has no config.json (it holds: {found or 'nothing'})" if folder.is_dir() else "no such folder"
        )
        raise _mistake(f'[model] path = "{table.path}"  {said}', "a folder with config.json, or a hub id owner/name")
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    wanted = ["*.json", "*.jinja", "tokenizer.model", "*.safetensors"]
    if table.init == "random":
        wanted.remove("*.safetensors")
    try:
        return hub.snapshot(table.path, table.revision, wanted)
    except (HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise _mistake(
            f'[model] path = "{table.path}"  no such folder here, and the hub did not give it: {reason}',
            "log in for gated models, or download it once and give the folder",
        ) from error


def _mistake(message: str, fix: str) -> RecipeError:
    return RecipeError("recipe", [Problem(message=message, fix=fix)])


def read_config(folder: Path) -> Any:
    """Transformers' config; code that comes with a model is never run.

    Raises:
        RecipeError: the architecture needs code of its own, or transformers does not know it.
    """
    from transformers import AutoConfig

    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if "auto_map" in raw:
        raise _mistake(
            f"{folder}/config.json has auto_map: the model brings its own code, which is not run",
            "use an architecture that transformers ships",
        )
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        raise _mistake(f"{folder}/config.json: {error}", "check the transformers version") from error


class SafetensorsSource:
    """Weights from *.safetensors files, read lazily by name."""

    def __init__(self, folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            where: Mapping[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        elif (folder / "model.safetensors").is_file():
            with safe_open(folder / "model.safetensors", framework="pt") as file:
                where = dict.fromkeys(file.keys(), "model.safetensors")
        else:
            pickles = [path.name for pattern in _PICKLES for path in folder.glob(pattern)]
            said = f"only pickled weights ({pickles[0]}), which can run code" if pickles else "no *.safetensors weights"
            raise _mistake(
                f"{folder}: {said}",
                'convert to safetensors, or set [model] init = "random" to start from the config alone',
            )
        missing = sorted({name for name in where.values() if not (folder / name).is_file()})
        if missing:
            raise _mistake(f"{folder}: the index names files that are not there: {', '.join(missing)}", "fetch them")
        self._where = {name: folder / file for name, file in where.items()}
        self._open: dict[Path, Any] = {}

    @property
    def names(self) -> frozenset[str]:
        """Every tensor in the files."""
        return frozenset(self._where)

    def values(self, name: str, module: nn.Module, device: torch.device) -> dict[str, Tensor]:
        """Read from the mapped files, one module at a time."""
        return {short: self._read(f"{name}.{short}" if name else short) for short, _ in _meta_params(module)}

    def _read(self, name: str) -> Tensor:
        path = self._where[name]
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt").__enter__()
        return self._open[path].get_tensor(name)


class StateDictSource:
    """Weights that need transformers' own renaming or fusing on load: read whole on the host, then handed out."""

    def __init__(self, folder: Path, config: Any, dtype: torch.dtype) -> None:
        from transformers import AutoModelForCausalLM

        lm = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=dtype, use_safetensors=True)
        self._state = lm.state_dict()

    def values(self, name: str, module: nn.Module, device: torch.device) -> dict[str, Tensor]:
        """By the loaded model's own names."""
        return {short: self._state[f"{name}.{short}" if name else short] for short, _ in _meta_params(module)}


class RandomSource:
    """The architecture's own initialisation, one module at a time, seeded by its name."""

    def __init__(self, lm: Any, seed: int, dtype: torch.dtype) -> None:
        self._init: Callable[[nn.Module], None] = lm._init_weights
        self._seed, self._dtype = seed, dtype

    def values(self, name: str, module: nn.Module, device: torch.device) -> dict[str, Tensor]:
        """Runs transformers' rule for this module on a stand-in that holds real tensors."""
        stand_in = (
            nn.Linear.__new__(nn.Linear) if quantize.is_4bit(module) else module.__class__.__new__(module.__class__)
        )
        stand_in.__dict__.update({k: v for k, v in module.__dict__.items() if k not in ("_parameters", "_modules")})
        stand_in._modules = {}
        stand_in._parameters = {
            short: nn.Parameter(torch.empty(_whole_shape(module, short, meta), dtype=self._dtype, device=device))
            for short, meta in _meta_params(module)
        }
        for short in module._parameters:
            stand_in._parameters.setdefault(short, None)
        cuda = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda), torch.no_grad():
            torch.manual_seed(_seed_of(self._seed, name))
            self._init(stand_in)
        return {short: param.detach() for short, param in stand_in._parameters.items() if param is not None}


def _whole_shape(module: Any, short: str, meta: Tensor) -> tuple[int, ...]:
    if short == "weight" and quantize.is_4bit(module):
        return (module.out_features, module.in_features)
    return tuple(meta.shape)


def _meta_params(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for short, param in module._parameters.items():
        if param is not None and param.is_meta:
            yield short, param


def _seed_of(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "big")


class MetaModel:
    """A `core.types.Weights`: the wrapped model without values, and the means to fill it."""

    def __init__(
        self,
        module: CausalLM,
        blocks: list[nn.Module],
        source: Source,
        method: MethodSpec,
        *,
        tied: Mapping[str, tuple[str, nn.Module]],
        seed: int,
        dtype: torch.dtype,
    ) -> None:
        """`tied`: module that has no weights of its own -> name and meta copy of the one whose weights it shares."""
        self.module = module
        self.blocks = blocks
        self.dtype = dtype
        # Behind a frozen embedding the first block's input has no gradient to wait for, nor have DoRA's norms.
        self.blocks_are_atomic = not method.adapter
        self._source, self._method, self._seed = source, method, seed
        self._names = {id(mod): name.removeprefix(WRAPPER) for name, mod in module.named_modules()}
        self._tied = tied
        self._filled: dict[int, tuple[Tensor, nn.Parameter]] = {}

    def fill(self, unit: nn.Module, device: torch.device) -> None:
        """Give every parameter below `unit` that is still meta its value on `device`; tied tensors stay tied."""
        PULSE.at("weights")
        for module in unit.modules():
            if any(True for _ in _meta_params(module)):
                self._fill_one(module, device)
            for short, buffer in module._buffers.items():
                if buffer is not None and buffer.device != device:
                    module._buffers[short] = buffer.to(device)

    def _fill_one(self, module: nn.Module, device: torch.device) -> None:
        name = self._names[id(module)]
        pending = {}
        for short, meta in list(_meta_params(module)):
            if id(meta) in self._filled:
                module._parameters[short] = self._filled[id(meta)][1]
            else:
                pending[short] = meta
        if not pending:
            return
        if self._method.owns(f"{name}.x") and self._method.fresh is not None:
            values = {
                short: self._method.fresh(f"{name}.{short}", self.module.lm, meta, self._generator(f"{name}.{short}"))
                for short, meta in pending.items()
            }
        else:
            base = self._method.base_name(f"{name}.x").removesuffix(".x")
            # The copy of a tied head that an adapter trains whole starts as what the head is tied to.
            values = self._source.values(*self._tied.get(base, (base, module)), device)
        for short, meta in pending.items():
            module._parameters[short] = self._real(module, short, meta, values[short], device)

    def _real(self, module: nn.Module, short: str, meta: Tensor, value: Tensor, device: torch.device) -> nn.Parameter:
        if short == "weight" and quantize.is_4bit(module):
            real = quantize.quantized(module, value.to(device, self.dtype))
        else:
            if value.shape != meta.shape:
                raise MachineError(
                    f"{self._names[id(module)]}.{short} has shape {tuple(value.shape)} in the "
                    f"weights and {tuple(meta.shape)} in the config"
                )
            # A copy, so that no parameter is a view of a mapped file or of another parameter.
            real = nn.Parameter(value.to(device, meta.dtype, copy=True), requires_grad=meta.requires_grad)
        self._filled[id(meta)] = (meta, real)  # keeps `meta` alive: its id must not be reused
        return real

    def _generator(self, name: str) -> torch.Generator:
        return torch.Generator().manual_seed(_seed_of(self._seed, name))


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
) -> MetaModel:
    """Everything on the meta device, attached, wrapped, ready to be filled by an engine.

    `weights=False` leaves the source out: for planning without the files. `config` replaces the folder's.

    Raises:
        RecipeError: weights are missing, pickled, or do not fit the config.
        MachineError: a kernel that was asked for cannot run here.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM, GenerationConfig

    dtype: torch.dtype = getattr(torch, table.dtype)
    config = config or read_config(folder)
    attention.register()
    kernel = attention.choose(table.attention, device, dtype)
    # Buffers are real: rotary frequencies are computed in constructors and stored nowhere.
    with init_empty_weights(include_buffers=False):
        lm = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=kernel)
    lm.tie_weights()
    tied = _tied_modules(lm)
    if (folder / "generation_config.json").is_file():
        lm.generation_config = GenerationConfig.from_pretrained(folder)
    # What an adapter says of its base must lead there from any folder.
    is_folder = table.path.startswith((".", "/", "~")) or Path(table.path).exists()
    lm.name_or_path = os.path.abspath(folder) if is_folder else table.path
    source = _source(table, folder, lm, seed, dtype) if weights else _NoSource()
    quant = method.quant(params)
    if quant is not None:
        quantize.swap_linears(lm, quant, dtype)
    blocks = blocks_of(lm)
    module = CausalLM(
        method.attach(lm, params, dtype), cross_entropy.choose(table.cross_entropy, device, per_token=per_token)
    )
    return MetaModel(module, blocks, source, method, tied=tied, seed=seed, dtype=dtype)


def _tied_modules(lm: Any) -> dict[str, tuple[str, nn.Module]]:
    """As `MetaModel` wants them, while all is still meta."""
    found: dict[str, tuple[str, nn.Module]] = {}
    for target, origin in (getattr(lm, "all_tied_weights_keys", None) or {}).items():
        shared, name = target.rpartition(".")[0], origin.rpartition(".")[0]
        owner = lm.get_submodule(name)
        stand_in = copy.copy(owner)
        stand_in._parameters = dict(owner._parameters)
        found[shared] = (name, stand_in)
    return found


class _NoSource:
    def values(self, name: str, module: nn.Module, device: torch.device) -> dict[str, Tensor]:
        raise MachineError("this model was built without weights, for counting only")


def blocks_of(lm: Any) -> list[nn.Module]:
    """The repeated transformer blocks of a transformers model, in order.

    Raises:
        MachineError: the architecture does not say which modules they are.
    """
    kinds = set(lm._no_split_modules or ())
    blocks = [module for module in lm.modules() if type(module).__name__ in kinds]
    if not blocks:
        raise MachineError(f"{type(lm).__name__} does not name its blocks (_no_split_modules), so it cannot be sharded")
    return blocks


def _source(table: ModelTable, folder: Path, lm: Any, seed: int, dtype: torch.dtype) -> Source:
    if table.init == "random":
        return RandomSource(lm, seed, dtype)
    source = SafetensorsSource(folder)
    wanted = {name for name, _ in lm.named_parameters()}
    if wanted <= source.names:
        return source
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    if get_checkpoint_conversion_mapping(lm.config.model_type) is None:
        missing = sorted(wanted - source.names)
        raise _mistake(
            f"{folder}: the weights lack {len(missing)} tensors that the config asks for, first {missing[0]}",
            "the files and config.json belong to different models",
        )
    return StateDictSource(folder, lm.config, dtype)
