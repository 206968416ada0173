"""Names that start with "demo:" become files in a cache folder, made on first use.

Cheap afterwards: nothing heavy is imported, and a folder that exists is complete, because it got its name last.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distft.core.errors import FileSystemError, Problem, RecipeError
from distft.core.registry import nearest
from distft.demo import incidents, sums

if TYPE_CHECKING:
    from distft.recipe import Recipe

SCHEME = "demo:"
MODEL = "tiny-llama"
MODEL_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 1024,
    "initializer_range": 0.06,  # narrow layers want more than the usual 0.02, roughly 1 / sqrt(hidden_size)
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "use_cache": True,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "dtype": "float32",
}
"""A Llama of 557,696 parameters. Widths are multiples of 64: bitsandbytes' 4-bit products on a CPU need that, and only
when no gradient is recorded, so another width trains and then fails at the first evaluation (0.50)."""

_FILES = {SCHEME + MODEL: MODEL} | {f"{SCHEME}{name}": f"{name}.jsonl" for name in (*incidents.ROWS, *sums.SIZES)}
_SOURCES = ("files.py", "incidents.py", "sums.py", "tokenizer.py", "wording.py")
"""The modules that decide what the files contain."""


def resolve_paths(recipe: Recipe) -> Recipe:
    """Return the recipe with a real path in place of every "demo:" name; other paths are left as they are.

    Raises:
        RecipeError: names the demo does not have, all at once.
        FileSystemError: the cache folder cannot be written.
    """
    places: list[tuple[tuple[str | int, ...], str | None]] = [
        (("model", "path"), recipe.model.path),
        (("model", "tokenizer"), recipe.model.tokenizer),
        (("objective", "reference"), recipe.objective.spec.reference(recipe.objective.params)),
        (("objective", "teacher"), recipe.objective.spec.teacher(recipe.objective.params)),
        *(
            (("data", split, index, "path"), source.path)
            for split in ("train", "eval")
            for index, source in enumerate(getattr(recipe.data, split))
        ),
        *((("eval", "answers", index, "path"), rows.path) for index, rows in enumerate(recipe.eval.answers)),
    ]
    names = [(key, path) for key, path in places if path is not None and path.startswith(SCHEME)]
    problems = [problem for key, path in names for problem in _problem(path, recipe.line_of(".".join(map(str, key))))]
    if problems:
        raise RecipeError(recipe.source, problems)
    for key, path in names:
        recipe = recipe.with_value(key, locate_path(path))
    return recipe


def locate_path(path: str) -> str:
    """Return a real path for a "demo:" name, and `path` itself for anything else.

    Raises:
        RecipeError: a name the demo does not have.
        FileSystemError: the cache folder cannot be written.
    """
    if problem := _problem(path, None):
        raise RecipeError("recipe", problem)
    return str(_folder() / _FILES[path]) if path.startswith(SCHEME) else path


def _problem(path: str, line: int | None) -> list[Problem]:
    if not path.startswith(SCHEME) or path in _FILES:
        return []
    meant = nearest(path, list(_FILES))
    hint = f'did you mean "{meant}"?  ' if meant else ""
    return [
        Problem(message=f'"{path}" is not in the demo', line=line, fix=f"{hint}allowed: {', '.join(_FILES)}"),
    ]


def _folder() -> Path:
    """Return the folder of this version of the demo; made on first use, by whichever process is first."""
    folder = _cache() / f"demo-{_version()}"
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=".demo-", dir=folder.parent))
        try:
            _write(aside)
            aside.chmod(0o755)  # mkdtemp makes it private; a shared cache must be readable
            aside.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was faster with the same bytes
                raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise FileSystemError(
            f"the demo cannot be written to {folder}: {error.strerror}; name another folder in DISTFT_CACHE"
        ) from error
    return folder


def _cache() -> Path:
    if base := os.environ.get("DISTFT_CACHE"):
        return Path(base).expanduser().resolve()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distft"


def _version() -> str:
    """Return a version that changes with the code that makes the files, so a stale folder is never read."""
    here = Path(__file__).parent
    return hashlib.sha256(b"".join((here / name).read_bytes() for name in _SOURCES)).hexdigest()[:12]


def _write(folder: Path) -> None:
    from distft.demo import tokenizer

    datasets = incidents.datasets()
    for name, rows in (datasets | sums.datasets()).items():
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8", newline="\n")
    model = folder / MODEL
    model.mkdir()
    training = [row for name in incidents.SIZES if name.endswith("/train") for row in datasets[name]]
    tokenizer.train(row["prompt"] + row["completion"] for row in training).save(str(model / "tokenizer.json"))
    for name, content in {"config.json": MODEL_CONFIG, "tokenizer_config.json": tokenizer.CONFIG}.items():
        (model / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8", newline="\n")
