"""An outsider agrees: mergekit makes the same models of whole fine-tunes, in each way that both have.

Optional: needs mergekit in the environment (0.1.5 was held against it); installs nothing. What mergekit draws at random
it draws from one generator for everything, so there the entries that are kept are held against the change, and how many
are kept against the density.
"""

import math
from pathlib import Path

import pytest
import torch
from merging_kit import add_tokenizer, make_base, tensors
from transformers import AutoModelForCausalLM

from distft.merging.combining import CombineOptions, combine
from distft.merging.hows import HOWS

pytest.importorskip("mergekit")
WEIGHTS = (0.7, 0.4)
Models = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("models") / "base", "llama")


@pytest.fixture(scope="module")
def tuned(base: Path) -> list[Path]:
    folders = []
    for seed in (1, 2):
        model = AutoModelForCausalLM.from_pretrained(base)
        torch.manual_seed(seed)
        for param in model.parameters():
            param.data += 0.05 * torch.randn_like(param)
        model.save_pretrained(base.parent / f"full{seed}")
        folders.append(base.parent / f"full{seed}")
    return folders


def theirs(method: str, base: Path, folders: list[Path], out: Path, **given: float | bool) -> Models:
    """Return what mergekit makes; settings of an adapter are numbers, those of the whole are true or false."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    each = {key: value for key, value in given.items() if key in ("density", "epsilon", "gamma")}
    whole = {key: value for key, value in given.items() if key not in each}
    models = [
        {"model": str(folder), "parameters": {"weight": weight} | each}
        for folder, weight in zip(folders, WEIGHTS, strict=False)
    ]
    config = {"merge_method": method, "base_model": str(base), "models": models, "dtype": "float32"}
    made = MergeConfiguration.model_validate(config | {"parameters": whole})
    run_merge(made, str(out), MergeOptions(copy_tokenizer=False, quiet=True, random_seed=0))
    return tensors(out)


def ours(how: str, base: Path, folders: list[Path], out: Path, **params: float | bool) -> Models:
    spec = HOWS[how]
    weights = WEIGHTS[: len(folders)]
    combine(folders, base, out, CombineOptions(how=spec, params=spec.params(**params), weights=weights, whole=True))
    return tensors(out)


@pytest.mark.parametrize(
    ("how", "params", "method", "given"),
    [
        ("linear", {}, "task_arithmetic", {"normalize": False}),
        ("cat", {}, "task_arithmetic", {"normalize": False}),
        ("svd", {}, "task_arithmetic", {"normalize": False}),
        ("ties", {"density": 0.5}, "ties", {"density": 0.5, "normalize": True}),
        ("ties", {"density": 0.3, "normalize": False, "scale": 0.6}, "ties",
         {"density": 0.3, "normalize": False, "lambda": 0.6}),
        ("magnitude_prune", {"density": 0.25}, "breadcrumbs", {"density": 0.25, "gamma": 0.0, "normalize": False}),
        ("dare_linear", {"density": 1.0}, "dare_linear", {"density": 1.0, "normalize": False}),
        ("dare_ties", {"density": 1.0}, "dare_ties", {"density": 1.0, "normalize": False}),
        ("della", {"density": 1.0, "epsilon": 0.0}, "della", {"density": 1.0, "epsilon": 0.0, "normalize": False}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_the_same_models(
    how: str, params: dict, method: str, given: dict, base: Path, tuned: list[Path], tmp_path: Path
) -> None:
    want, made = (
        theirs(method, base, tuned, tmp_path / "theirs", **given),
        ours(how, base, tuned, tmp_path / "ours", **params),
    )
    assert want.keys() == made.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(made[name], tensor, atol=1e-6, rtol=0, msg=lambda text, name=name: f"{name}: {text}")
    moved = max(float((tensor - tensors(base)[name]).abs().max()) for name, tensor in want.items())
    assert moved > 0.02, "both did something"


def test_slerp_of_whole_weights(base: Path, tuned: list[Path], tmp_path: Path) -> None:
    """mergekit goes along the arc between weights; between changes it is the same where the base is nothing."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    nothing = AutoModelForCausalLM.from_pretrained(base)
    for param in nothing.parameters():
        param.data.zero_()
    nothing.save_pretrained(tmp_path / "nothing")
    add_tokenizer(tmp_path / "nothing")
    config = {"merge_method": "slerp", "base_model": str(tuned[0]), "dtype": "float32", "parameters": {"t": 0.3}}
    config["models"] = [{"model": str(folder)} for folder in tuned]
    run_merge(
        MergeConfiguration.model_validate(config),
        str(tmp_path / "theirs"),
        MergeOptions(copy_tokenizer=False, quiet=True),
    )
    made = ours("slerp", tmp_path / "nothing", tuned, tmp_path / "ours", t=0.3)
    for name, tensor in tensors(tmp_path / "theirs").items():
        torch.testing.assert_close(made[name], tensor, atol=1e-6, rtol=0)


@pytest.mark.parametrize("how", ["dare_linear", "della"])
def test_random_choices_keep_as_much(how: str, base: Path, tuned: list[Path], tmp_path: Path) -> None:
    """Of one model; mergekit without its rescaling, which is by the norm and not by the chance."""
    density, epsilon = 0.6, 0.2
    params = {"density": density, "seed": 3} | ({"epsilon": epsilon} if how == "della" else {})
    given = {"density": density, "normalize": False, "rescale": False}
    given |= {"epsilon": epsilon / 2} if how == "della" else {}  # theirs is the half
    start, end = tensors(base), tensors(tuned[0])
    want = theirs(how, base, tuned[:1], tmp_path / "theirs", **given)
    made = ours(how, base, tuned[:1], tmp_path / "ours", **params)
    count, kept, large = 0, {"ours": 0, "theirs": 0}, {"ours": 0, "theirs": 0}
    for name, tensor in start.items():
        if tensor.ndim < 2:
            continue
        change = end[name] - tensor
        place = change.abs().argsort(-1).argsort(-1).double() / (change.shape[-1] - 1)
        chance = torch.full_like(place, density) if how != "della" else density - epsilon / 2 + epsilon * place
        for label, found, divided in (("ours", made, chance), ("theirs", want, torch.ones_like(chance))):
            moved = (found[name] - tensor).double()
            is_kept = moved.abs() > 1e-7
            whole = WEIGHTS[0] * change.double() / divided
            torch.testing.assert_close(moved[is_kept], whole[is_kept], atol=1e-6, rtol=0)
            kept[label] += int(is_kept.sum())
            large[label] += int(is_kept[place >= 0.5].sum())
        count += change.numel()
    spread = 5 * math.sqrt(density * (1 - density) / count)
    for label, number in kept.items():
        assert abs(number / count - density) < spread, f"{label}: share kept"
    expected = density + (epsilon / 4 if how == "della" else 0.0)
    shares = {label: 2 * number / count for label, number in large.items()}
    for label, share in shares.items():
        assert abs(share - expected) < 0.03, f"{label}: share of the larger half that is kept: {share:.3f}"
