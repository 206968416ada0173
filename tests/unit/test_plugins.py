"""Packages with the entry point `distft.plugins`: loaded once before a recipe is read, and named when they fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import pytest

from distft.core.errors import RecipeError
from distft.core.registry import NoParams, Registry
from distft.optim import OptimizerSpec
from distft.plugins import GROUP, Plugin, Plugins

ROOT = Path(__file__).resolve().parents[2]
RECIPE = str(ROOT / "recipes/tiny-lora.toml")
PARTS = """
import torch
from pydantic import Field

from distft.core.registry import Params
from distft.metrics import METRICS, MetricSpec
from distft.optim import OPTIMIZERS, OptimizerSpec


class SgdParams(Params):
    learning_rate: float = Field(default=0.1, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)


OPTIMIZERS.add(OptimizerSpec(
    name="acme_sgd", params=SgdParams,
    build=lambda params, groups: torch.optim.SGD(groups, lr=params.learning_rate),
))
METRICS.add(MetricSpec(name="acme_metric", build=lambda facts: None))
"""


def install(site: Path, name: str, version: str, entry_points: str, modules: dict[str, str]) -> None:
    """What pip leaves of a package: its modules, and a folder of metadata."""
    for module, text in modules.items():
        path = site / module
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\n{entry_points}\n")


def run(site: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": f"{site}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [sys.executable, *words], env=environment, cwd=ROOT, capture_output=True, text=True, check=False, timeout=180
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.fixture
def site(tmp_path: Path) -> Path:
    return tmp_path / "site"


# -- as a user meets them: a package, and commands ---------------------------------------------------------------------


def test_a_package_adds_parts_to_recipes(site: Path) -> None:
    install(site, "acme-parts", "1.5", "sgd = acme.optimizers", {"acme/__init__.py": "", "acme/optimizers.py": PARTS})
    code = """
import sys, distft
from distft.catalog import PLUGINS
assert "acme" not in sys.modules
for _ in range(2):
    recipe = distft.load_recipe(sys.argv[1], overrides=['optim={name = "acme_sgd", learning_rate = 0.5}'])
    assert (recipe.optim.name, recipe.optim.params.learning_rate) == ("acme_sgd", 0.5)
print([plugin.to_json() for plugin in PLUGINS.load()])
"""
    loaded = run(site, "-c", code, RECIPE)
    assert loaded.returncode == 0, loaded.stderr
    plugin = {
        "distribution": "acme-parts",
        "version": "1.5",
        "entry_point": "sgd",
        "parts": ["optimizer acme_sgd", "metric acme_metric"],
    }
    assert loaded.stdout.strip() == str([plugin])
    mistyped = run(site, "-m", "distft.cli", "plan", RECIPE, "--gpu", "24", "--set", 'optim.name="acme_sdg"')
    assert mistyped.returncode == 2
    assert 'did you mean "acme_sgd"?' in mistyped.stderr
    doctor = run(site, "-m", "distft.doctor", "--short", "--json", "--output-dir", str(site))
    rows = [row for row in json.loads(doctor.stdout)["findings"] if row["check"] == "plugins"]
    assert [(row["verdict"], row["found"]) for row in rows] == [
        ("ok", "acme-parts 1.5 (optimizer acme_sgd, metric acme_metric)")
    ]


OUT = ("--output-dir", "OUT")
COMMANDS = {
    "check": ["check", RECIPE],
    "plan": ["plan", RECIPE, "--gpu", "24"],
    "train": ["train", RECIPE, *OUT],
    "eval": ["eval", RECIPE, "--nproc", "1", *OUT],
    "bench": ["bench", RECIPE, "--output", "OUT"],
    "submit": ["submit", RECIPE, "--gpus-per-node", "1", "--dry-run", *OUT],
    "doctor": ["doctor", "--recipe", RECIPE, *OUT],
}
BY_HAND = ("train", "doctor")
"""What CI asks; the other commands read recipes by the same lines."""


@pytest.mark.parametrize(
    "verb", [*BY_HAND, *(pytest.param(verb, marks=pytest.mark.slow) for verb in COMMANDS if verb not in BY_HAND)]
)
def test_every_command_names_a_plugin_that_fails(site: Path, tmp_path: Path, verb: str) -> None:
    install(site, "acme-parts", "1.5", "sgd = acme", {"acme.py": "import no_such_module_here\n"})
    words = [str(tmp_path) if word == "OUT" else word for word in COMMANDS[verb]]
    done = run(site, "-m", "distft.cli", *words)
    assert done.returncode == 2, done.stderr
    assert f"plugins ({GROUP}): 1 problem" in done.stderr
    assert failure(site) in done.stderr


def failure(site: Path) -> str:
    return (
        "acme-parts 1.5, entry point sgd = acme  ModuleNotFoundError: No module named 'no_such_module_here'  "
        f"({site}/acme.py:1)  correct it, or: pip uninstall acme-parts"
    )


def test_so_does_a_rank_and_help_does_not_load_it(site: Path, tmp_path: Path) -> None:
    install(site, "acme-parts", "1.5", "sgd = acme", {"acme.py": "import no_such_module_here\n"})
    rank = run(site, "-m", "distft.train", RECIPE, "--output-dir", str(tmp_path))
    assert rank.returncode == 2
    assert failure(site) in rank.stderr
    alone = run(site, "-m", "distft.doctor", "--short", "--output-dir", str(site))
    assert alone.returncode == 9
    assert "No module named 'no_such_module_here'" in " ".join(alone.stdout.split())
    assert run(site, "-m", "distft.cli", "train", "--help").returncode == 0
    assert run(site, "-m", "distft.cli", "recipes").returncode == 0


# -- the loader --------------------------------------------------------------------------------------------------------


@pytest.fixture
def registry() -> Registry[OptimizerSpec]:
    made: Registry[OptimizerSpec] = Registry("optimizer")
    made.add(OptimizerSpec(name="adamw", params=NoParams, build=_no_optimizer))
    return made


def _no_optimizer(params: Any, groups: Any) -> Any:
    raise NotImplementedError


@pytest.fixture
def loader(
    site: Path, registry: Registry[OptimizerSpec], monkeypatch: pytest.MonkeyPatch
) -> Callable[[], tuple[Plugin, ...]]:
    """Loads what is in `site`; the modules register with `shared.REGISTRY`."""
    site.mkdir()
    (site / "shared_of_plugins.py").write_text("")
    monkeypatch.syspath_prepend(str(site))
    before = set(sys.modules)
    import shared_of_plugins  # pyright: ignore[reportMissingImports]

    shared_of_plugins.REGISTRY = registry

    def points() -> list[Any]:
        found = distributions(path=[str(site)])
        return [point for one in found for point in one.entry_points if point.group == GROUP]

    yield Plugins(lambda: [registry], points).load  # pyright: ignore[reportReturnType]
    for name in set(sys.modules) - before:
        del sys.modules[name]


def adds(*names: str) -> str:
    lines = [f"REGISTRY.add(OptimizerSpec(name={name!r}, params=NoParams, build=print))" for name in names]
    head = [
        "from shared_of_plugins import REGISTRY",
        "from distft.core.registry import NoParams",
        "from distft.optim import OptimizerSpec",
    ]
    return "\n".join([*head, *lines, ""])


def in_function(name: str, text: str) -> str:
    return f"def {name}():\n" + "".join(f"    {line}\n" for line in text.splitlines())


Loader = Callable[[], tuple[Plugin, ...]]


def test_modules_and_functions_are_loaded_once_in_one_order(
    site: Path, registry: Registry[OptimizerSpec], loader: Loader
) -> None:
    install(site, "zeta", "2.0", "z = zeta_parts:register", {"zeta_parts.py": in_function("register", adds("z"))})
    install(site, "alpha", "1.0", "b = alpha_b\na = alpha_a", {"alpha_a.py": adds("a"), "alpha_b.py": adds("b", "b2")})
    install(site, "quiet", "0.1", "nothing = quiet_parts", {"quiet_parts.py": "VALUE = 1\n"})
    loaded = loader()
    assert [(one.distribution, one.version, one.entry_point, one.parts) for one in loaded] == [
        ("alpha", "1.0", "a", ("optimizer a",)),
        ("alpha", "1.0", "b", ("optimizer b", "optimizer b2")),
        ("quiet", "0.1", "nothing", ()),
        ("zeta", "2.0", "z", ("optimizer z",)),
    ]
    assert loader() is loaded, "a function that registers would fail the second time"
    assert list(registry) == ["adamw", "a", "b", "b2", "z"]
    assert registry.added_by("b2") == "alpha_b"


def test_a_module_that_was_imported_before_keeps_its_parts(
    site: Path, registry: Registry[OptimizerSpec], loader: Loader
) -> None:
    install(site, "alpha", "1.0", "a = alpha_a", {"alpha_a.py": adds("a")})
    import alpha_a  # noqa: F401  # pyright: ignore[reportMissingImports]

    assert loader()[0].parts == ("optimizer a",)


@pytest.mark.parametrize(
    ("entry_point", "text", "said"),
    [
        ("broken", "def oops(:\n", "SyntaxError: "),
        ("broken", "raise RuntimeError('no\\nkey')\n", "RuntimeError: no key  ({site}/broken.py:1)"),
        ("broken", "import sys\nsys.exit(3)\n", "SystemExit: 3  ({site}/broken.py:2)"),
        ("broken:register", "def other(): ...\n", "AttributeError: module 'broken' has no attribute 'register'"),
        ("broken:PARTS", "PARTS = []\n", "TypeError: broken:PARTS is a list; it must be a module or a function"),
        ("broken:Parts", "class Parts: ...\n", "TypeError: broken:Parts is a type; it must be a module or a function"),
        ("broken:register", "def register(registry): ...\n", "TypeError: register() missing 1 required positional"),
        ("absent", "", "ModuleNotFoundError: No module named 'absent'"),
        ("broken", adds("adamw"), f"ValueError: optimizer 'adamw' is registered twice: by {__name__} and by broken"),
        ("broken", adds("new", "new"), "ValueError: optimizer 'new' is registered twice: by broken and by broken"),
    ],
)  # fmt: skip
def test_what_fails_is_named(site: Path, loader: Loader, entry_point: str, text: str, said: str) -> None:
    install(site, "bad-parts", "0.9", f"mine = {entry_point}", {"broken.py": text})
    with pytest.raises(RecipeError) as error:
        loader()
    message = str(error.value)
    assert f"bad-parts 0.9, entry point mine = {entry_point}  {said.format(site=site)}" in message
    assert "pip uninstall bad-parts" in message
    with pytest.raises(RecipeError) as again:
        loader()
    assert again.value is error.value, "half of it may be registered: it does not pass the second time"


def test_two_packages_with_one_name_and_every_other_failure_are_told_at_once(site: Path, loader: Loader) -> None:
    install(site, "alpha", "1.0", "a = alpha_a", {"alpha_a.py": adds("same")})
    install(site, "beta", "2.0", "b = beta_b", {"beta_b.py": adds("same")})
    install(site, "gamma", "3.0", "g = gamma_g", {"gamma_g.py": "1 / 0\n"})
    with pytest.raises(RecipeError) as error:
        loader()
    assert len(error.value.problems) == 2
    assert (
        "beta 2.0, entry point b = beta_b  ValueError: optimizer 'same' is registered twice: by alpha_a and by beta_b"
        in str(error.value)
    )
    assert "gamma 3.0, entry point g = gamma_g  ZeroDivisionError: division by zero" in str(error.value)
