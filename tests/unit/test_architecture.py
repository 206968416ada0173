"""What import-linter cannot say: doors inside torch, and that a recipe is checked without heavy imports."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2] / "distft"


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_collectives_have_one_door() -> None:
    users = {
        path.relative_to(ROOT).parts[0]
        for path in ROOT.rglob("*.py")
        for name in imported(path)
        if (name + ".").startswith("torch.distributed.") and "torch.distributed.checkpoint" not in name
    }
    assert users == {"engine"}  # checkpoint/ writes DCP's files, and talks to no rank itself


def test_files_stay_one_room() -> None:
    long = {p.name: n for p in ROOT.rglob("*.py") if (n := len(p.read_text(encoding="utf-8").splitlines())) > 400}
    assert not long


def test_the_loop_fits_one_screen_and_names_no_library() -> None:
    text = (ROOT / "loop.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 100
    assert not any(word in text.lower() for word in ("deepspeed", "fsdp", "peft", "backend"))


def test_recipes_are_read_without_torch() -> None:
    code = (
        "import sys, distft; distft.load_recipe('recipes/tiny-full.toml'); "
        "heavy = {'torch', 'transformers', 'deepspeed', 'peft', 'datasets', 'bitsandbytes', 'accelerate'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
