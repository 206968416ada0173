"""What a recipe can say: one frozen class per table, and the `Recipe` that holds them all, defaults filled in.

To add a table: write its class here and give `Recipe` a field of that type. The loader, the printer and the JSON
Schema all read `Recipe`'s fields.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar, get_origin, get_type_hints

from pydantic import Field

from distft.core.registry import Params, Registry, Spec
from distft.recipe.evaluation import EvalTable, SourceTable
from distft.recipe.lines import KeyPath
from distft.recipe.origin import Origin, key_path
from distft.recipe.replacements import Replacement, with_value, write_back
from distft.recipe.resume_policy import Ask, Fixed, Free, ResumePolicy
from distft.recipe.rollout import RolloutTable
from distft.recipe.toml_text import is_array, is_table, toml_text

SpecT = TypeVar("SpecT", bound=Spec)


class RunKeys(Params):
    """The keys above the first table."""

    name: Free[str] = Field(examples=["my-run"])
    """Name of the run; its folder is output_dir/name."""
    seed: Fixed[int] = Field(default=42, ge=0, le=2**32 - 1)
    """Seeds data order, dropout and random weights."""
    output_dir: Free[str] = Field(default="runs", min_length=1)
    """Folder that holds run folders; on several machines, one that all of them see."""


class ModelTable(Params):
    """The weights to start from and how they compute."""

    path: Free[str] = Field(min_length=1, examples=["meta-llama/Llama-3.1-8B"])
    """Model folder or hub id."""
    revision: Free[str | None] = Field(default=None, min_length=1)
    """Hub commit, tag or branch; a commit pins the weights."""
    tokenizer: Free[str | None] = Field(default=None, min_length=1)
    """Tokenizer folder or hub id when it is not the model's."""
    dtype: Fixed[Literal["bfloat16", "float32"]] = "bfloat16"
    """Precision of weights and matrix products."""
    attention: Free[Literal["auto", "flash", "varlen", "sdpa", "eager"]] = "auto"
    """auto = flash-attn if installed, else torch's varlen kernel, else SDPA."""
    init: Fixed[Literal["pretrained", "random"]] = "pretrained"
    """random = build from the config without reading weights: benchmarks and tests."""
    cross_entropy: Free[Literal["auto", "fused", "chunked", "full"]] = "auto"
    """fused = Liger; chunked = never tokens x vocabulary at once; full = plain logits."""
    add_tokens: Fixed[tuple[str, ...] | None] = Field(default=None, min_length=1, examples=[["<tool>", "</tool>"]])
    """Tokens that the tokenizer gets; the embedding and the head get rows for them, which are trained."""
    add_special_tokens: Fixed[tuple[str, ...] | None] = Field(default=None, min_length=1)
    """The same for control tokens: left out of decoded answers, and in chats written by the template alone."""
    new_rows: Fixed[Literal["pieces", "mean"] | None] = None
    """What the rows of added tokens start as: the mean of the tokens that their text was split into (pieces, unless
    set), or of the whole vocabulary (mean)."""
    pad_vocabulary: Fixed[int | None] = Field(default=None, ge=1)
    """The embedding grows to a multiple of this; 64 unless set. Under adapters to the tokenizer's length, as when PEFT
    loads them."""

    @property
    def added(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Tokens that are added: plain ones, special ones."""
        return self.add_tokens or (), self.add_special_tokens or ()


class TrainSourceTable(SourceTable):
    """A source of training rows and how often they are seen."""

    weight: float | None = Field(default=None, gt=0)
    """Times each row is seen per epoch; 1.0 unless `share` is set."""
    share: float | None = Field(default=None, gt=0, lt=1)
    """Fraction of each epoch's rows that come from this source: a fixed share of general rows against forgetting."""


class DataTable(Params):
    """Rows, and how they become sequences of tokens."""

    max_length: Fixed[int] = Field(default=2048, ge=8)
    """Tokens in a sequence, packed or not."""
    packing: Fixed[bool] = True
    """Best-fit packing of documents into sequences; they never attend to each other."""
    loss_on: Fixed[Literal["assistant", "completion", "last_turn", "all"]] = "assistant"
    """Which tokens are trained; `all` by default when every source has format = "text"."""
    chat_template: Fixed[str] = Field(default="auto", min_length=1)
    """auto = the tokenizer's; or a built-in name; or a file ending in .jinja."""
    long_rows: Fixed[Literal["drop", "truncate", "error"]] = "drop"
    """What happens to a row longer than max_length."""
    bad_rows: Fixed[Literal["error", "skip"]] = "error"
    """What happens to a row that is not of the source's format; skipped rows are counted."""
    special_tokens_in_content: Free[Literal["escape", "error", "allow"]] = "escape"
    """Special tokens typed inside messages: escape = they stay text, error = such a row is refused, allow = they become
    the tokens. In raw text they are the tokens, unless error."""
    merge_turns: Free[bool] = False
    """Join neighbouring turns of one role, by a blank line, instead of refusing the row."""
    date: Free[str | None] = Field(default=None, pattern=r"^\d{4}-\d{2}-\d{2}$", examples=["2026-01-31"])
    """What chat templates that write the date are given; the day the run began unless set."""
    overlap: Free[Literal["report", "error"]] = "report"
    """What happens when evaluation rows (equal, of equal prompt, or nearly equal) are also trained on."""
    shuffle: Fixed[bool] = True
    """Draw a new order every epoch, from the seed alone."""
    num_workers: Free[Annotated[int, Field(ge=0)] | Literal["auto"]] = "auto"
    """Processes that prepare data; 0 = the main process does."""
    cache_dir: Free[str | None] = Field(default=None, min_length=1)
    """Folder of prepared data, when not the user's cache folder."""
    train: Free[tuple[TrainSourceTable, ...]] = Field(min_length=1, examples=[[{"path": "train.jsonl"}]])
    """Sources of training rows."""
    eval: Free[tuple[SourceTable, ...]] = ()
    """Sources of held-out rows."""


class TrainTable(Params):
    """How long, in what batches, and with which memory savers."""

    epochs: Ask[float | None] = Field(default=None, gt=0)
    """Passes over the training rows; 1 when max_steps is not set either."""
    max_steps: Ask[int | None] = Field(default=None, ge=1)
    """Optimizer steps, instead of epochs."""
    global_batch_size: Fixed[int] = Field(default=64, ge=1)
    """Sequences per optimizer step over all GPUs, whatever their number."""
    micro_batch_size: Free[Annotated[int, Field(ge=1)] | Literal["auto"]] = "auto"
    """Sequences per forward and backward on one GPU."""
    max_grad_norm: Ask[Annotated[float, Field(gt=0)] | Literal["off"]] = 1.0
    """Gradients are scaled down to this global L2 norm."""
    optimizer_in_backward: Free[bool] = False
    """Update each weight in the backward pass, once its gradient is complete, so that one gradient is there at a time.
    Takes max_grad_norm = "off" and one micro-batch a step; engines solo and fsdp2. The same weights to the bit."""
    activation_checkpointing: Free[Literal["auto", "off", "selective", "full"]] = "auto"
    """Recompute activations in the backward pass instead of keeping them."""
    compile: Free[bool | Literal["auto"]] = "auto"
    """torch.compile, block by block. auto: on a GPU, for packed rows, where a small copy of the model compiles there
    and keeps its numbers. Micro-batches are then filled up to their full length."""
    rehearse: Free[bool] = False
    """Run the worst step first and throw it away, so that what will run out of memory does so in the first minute."""
    deterministic: Free[bool] = False
    """Use deterministic kernels alone, so that a run on GPUs repeats and resumes bit for bit; slower (attention's
    backward by 15 to 40 % as others report). On CPUs every run is."""
    load_best: Free[bool] = False
    """Write the best checkpoint's weights to final/ instead of the last ones; needs [checkpoint] best."""


class CheckpointTable(Params):
    """When training state is saved, and how much of it is kept."""

    every_steps: Annotated[int, Field(ge=1)] | Literal["off"] = 200
    """Optimizer steps between checkpoints; off = only when the run is asked to stop."""
    keep: int = Field(default=3, ge=2)
    """Newest checkpoints to keep; one alone is no safety."""
    asynchronous: bool = True
    """Write in the background: training waits only while state is copied aside."""
    best: bool = False
    """Save whenever an evaluation during training is the best so far, and keep that checkpoint."""
    grace_s: float = Field(default=30.0, gt=0)
    """Seconds between being asked to stop and being killed (torchrun: 30; Slurm: --signal=B:USR1@N); a save that
    takes longer is warned of."""


class SpikeParams(Params):
    """What a spike of the loss is, and what is done about it."""

    action: Literal["stop", "skip", "rollback"] = "skip"
    """skip = leave that step's update out; rollback = go back to the last checkpoint and leave out, on the way here,
    this step and the one before it."""
    factor: float = Field(default=2.0, gt=1)
    """Times the median loss of the last `window` steps."""
    window: int = Field(default=50, ge=5)
    """Steps whose losses are remembered; no spike is seen before there are so many."""


class StragglerParams(Params):
    """When a rank counts as slow."""

    factor: float = Field(default=1.5, gt=1)
    """Times the median rank's time for its data or for a fixed piece of arithmetic."""
    every_steps: int = Field(default=50, ge=1)
    """Optimizer steps between looks."""


class GuardTable(Params):
    """What happens when a run goes wrong."""

    hang_timeout_s: float = Field(default=1800.0, gt=0)
    """Seconds without progress after which the run is ended (exit code 6), the silent rank named and stacks kept."""
    non_finite: Literal["stop", "skip"] = "stop"
    """A loss or gradient norm that is not finite never changes a weight: stop (exit code 5), or leave the step out."""
    patience: int = Field(default=3, ge=1)
    """Steps in a row that are left out, and rollbacks of one start, before the run stops all the same."""
    loss_spike: SpikeParams | None = None
    """What to do about a sudden rise of the loss; off unless set."""
    straggler: StragglerParams = Field(default=StragglerParams())
    """When a slow rank is named; it is never ended."""


class LogTable(Params):
    """Where the numbers of a run go, besides metrics.jsonl."""

    every_steps: int = Field(default=1, ge=1)
    """Optimizer steps between lines."""
    tensorboard: bool = True
    """Write event files to the run folder."""
    console: Literal["auto", "rich", "plain", "off"] = "auto"
    """auto = a progress bar in a terminal, plain lines elsewhere."""
    samples: bool = False
    """List the rows of every step in the run folder's samples/, one file per rank."""
    wandb: str | None = Field(default=None, min_length=1)
    """Weights & Biases project."""


class ExportTable(Params):
    """Forms of the trained model besides final/."""

    also: tuple[dict[str, Any], ...] = ()
    """Each a name and its settings, such as { name = "adapter" }; written to the run folder's exports/NAME/."""


@dataclass(frozen=True, kw_only=True)
class Choice(Generic[SpecT]):
    """A registered part that a table chose by name, and what the table set on it."""

    name: str
    params: Params
    """An instance of the spec's params class."""
    spec: SpecT = field(compare=False, repr=False)
    line: int | None = field(default=None, compare=False, repr=False)
    """1-based line of the name (else of the table) in the file."""


@dataclass(frozen=True, kw_only=True)
class Registries:
    """What a recipe may choose from; handed in by the caller, so that this room imports no other."""

    method: Registry[Any]
    objective: Registry[Any]
    optim: Registry[Any]
    schedule: Registry[Any]
    engine: Registry[Any]
    formats: Registry[Any]
    """Dataset formats: `format` is "auto" or one of these."""
    scores: Registry[Any] = field(default_factory=lambda: Registry[Any]("score"))
    """What `[[eval.answers]] scores` may name."""
    generators: Registry[Any] = field(default_factory=lambda: Registry[Any]("generator"))
    """What `[rollout] generator` may name."""
    exports: Registry[Any] = field(default_factory=lambda: Registry[Any]("export"))
    """What `[export] also` may name."""
    templates: tuple[str, ...] = ()
    """Built-in chat templates: `chat_template` is "auto", one of these, or a .jinja file."""

    load_plugins: Callable[[], object] = field(default=tuple, compare=False)
    """Called before a recipe is read: adds the parts of other packages, once, or raises RecipeError."""
    resolve_paths: Callable[[Recipe], Recipe] = field(default=lambda recipe: recipe, compare=False)
    """Called with a recipe that was read: puts real paths in place of names such as "demo:tiny-llama"."""

    def part(self, table: str) -> Registry[Any]:
        """Return the registry that the table called `table` chooses from."""
        return getattr(self, table)


DEFAULT_PARTS = {"method": "full", "objective": "sft", "optim": "adamw", "schedule": "cosine", "engine": "auto"}
"""The part a table means when it does not say a name."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One run, fully resolved. Two recipes are equal when their content is, wherever they were read from."""

    name: str
    seed: int
    output_dir: str
    model: ModelTable
    method: Fixed[Choice[Any]]
    objective: Fixed[Choice[Any]]
    data: DataTable
    optim: Annotated[Choice[Any], ResumePolicy("fixed", ask=("learning_rate", "weight_decay"))]
    schedule: Ask[Choice[Any]]
    train: TrainTable
    engine: Free[Choice[Any]]
    checkpoint: Free[CheckpointTable]
    guard: Free[GuardTable]
    rollout: Fixed[RolloutTable]
    eval: Free[EvalTable]
    export: Free[ExportTable]
    log: Free[LogTable]
    source: str = field(compare=False)
    """The file it was read from, or what the caller called its text."""
    origin: Origin = field(compare=False, repr=False)
    """Which line or override each value came from."""
    replacements: tuple[Replacement, ...] = field(default=(), compare=False, repr=False)
    """Values that are not written out: `resolved` says what stands in the recipe instead."""

    def with_value(self, key: KeyPath, value: Any) -> Recipe:
        """Return the recipe with another value at `key`, which `resolved`, `to_toml` and `digest` do not show."""
        name, *rest = key
        table = getattr(self, str(name))
        written = table
        for step in rest:
            written = written[step] if isinstance(step, int) else getattr(written, step)
        noted = Replacement(key=key, value=value, written=written)
        changed: Any = {name: with_value(table, rest, value), "replacements": (*self.replacements, noted)}
        return replace(self, **changed)

    def written(self, path: str) -> str:
        """Return what the recipe says where it means this path: "demo:tiny-llama", or the path itself."""
        return next((str(noted.written) for noted in self.replacements if noted.value == path), path)

    @property
    def run_dir(self) -> Path:
        """The run's folder."""
        return Path(self.output_dir) / self.name

    def line_of(self, key: str) -> int | None:
        """Return 1-based line of `table.key` (`data.train.0.path`) in the file; None for a default or an override."""
        return self.origin.lines.get(key_path(key))

    def resolved(self) -> dict[str, Any]:
        """Return the content as plain TOML values, every default filled in; what is off (None) is left out."""
        content: dict[str, Any] = {}
        for table_field in fields(self):
            match getattr(self, table_field.name):
                case Params() as table:
                    content[table_field.name] = _plain(table)
                case Choice(name=name, params=params):
                    content[table_field.name] = {"name": name, **_plain(params)}
                case value if table_field.compare:
                    content[table_field.name] = value
                case _:
                    pass
        for noted in reversed(self.replacements):
            write_back(content, noted)
        if not self.export.also:
            del content["export"]
        if not getattr(self.objective.spec, "writes", False):
            del content["rollout"]
        if not self.data.eval:
            del content["data"]["eval"]
            if not self.eval.answers:  # [eval] has no effect without rows, and to say it again would be an error
                del content["eval"]
        return content

    def to_toml(self) -> str:
        """Return the fully resolved recipe; it loads again to an equal one."""
        return toml_text(self.resolved())

    def digest(self) -> str:
        """Return the hex sha256 of the content: equal for equal recipes, on every machine."""
        canonical = json.dumps(self.resolved(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


@cache
def all_tables() -> tuple[str, ...]:
    """Return the names of all tables, in the order a recipe is written."""
    return tuple(
        table_field.name for table_field in fields(Recipe) if table_field.name in {*fixed_tables(), *chosen_tables()}
    )


@cache
def fixed_tables() -> dict[str, type[Params]]:
    """Return the tables whose keys are always the same, by name."""
    kinds = get_type_hints(Recipe)
    return {name: kind for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, Params)}


@cache
def chosen_tables() -> tuple[str, ...]:
    """Return the tables whose `name` chooses a registered part, and with it the other keys."""
    return tuple(name for name, kind in get_type_hints(Recipe).items() if get_origin(kind) is Choice)


def fill_dependent_defaults(raw: dict[str, Any]) -> None:
    """Set in place the defaults that depend on other keys: no class can state those."""
    train = raw.setdefault("train", {})
    if is_table(train) and "max_steps" not in train:
        train.setdefault("epochs", 1.0)
    data = raw.get("data")
    sources = data.get("train") if is_table(data) else None
    if not is_table(data) or not is_array(sources):
        return
    if sources and all(map(_says_text, sources)):
        data.setdefault("loss_on", "all")
    for source in sources:
        if is_table(source) and "share" not in source:
            source.setdefault("weight", 1.0)


def _plain(table: Params) -> dict[str, Any]:
    return table.model_dump(mode="json", exclude_none=True)


def _says_text(row: object) -> bool:
    return is_table(row) and row.get("format") == "text"
