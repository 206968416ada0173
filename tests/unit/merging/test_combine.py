"""Combinations are made of changes: each way against a formula written here, in fp64; back at a rank with its loss."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from merging_kit import dense_deltas, make_adapter, make_base, oracle, rows, tensors
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM

from distft.adapters_options import HOWS as HOW_FLAGS
from distft.core.errors import RecipeError
from distft.merging.combining import CombineOptions, combine
from distft.merging.hows import HOWS, pruning
from distft.merging.hows.della import chances_to_keep
from distft.merging.low_rank import truncate
from distft.merging.merging import MergeSource, merge

TARGETS = ["q_proj", "down_proj"]
PLAIN = LoraConfig(r=2, target_modules=TARGETS, lora_alpha=4)
STABLE = LoraConfig(r=4, target_modules=TARGETS, lora_alpha=4, use_rslora=True)
WEIGHTS = (0.7, 0.4)
Deltas = list[torch.Tensor]


def options(how: str, *, weights=WEIGHTS, rank=None, whole=False, **params) -> CombineOptions:
    spec = HOWS[how]
    return CombineOptions(how=spec, params=spec.params(**params), weights=weights, rank=rank, whole=whole)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("models") / "base", "llama")


@pytest.fixture(scope="module")
def pair(base: Path) -> list[Path]:
    """A plain adapter of rank 2 and a rank-stabilised one of rank 4."""
    return [
        make_adapter(base.parent / "plain", base, PLAIN, seed=1),
        make_adapter(base.parent / "stable", base, STABLE, seed=2),
    ]


# -- formulas, written again ---------------------------------------------------------------------------------------


def trimmed(delta: torch.Tensor, density: float) -> torch.Tensor:
    threshold = delta.abs().flatten().sort(descending=True).values[int(density * delta.numel()) - 1]
    return torch.where(delta.abs() >= threshold, delta, 0.0)


def plain_sum(deltas: Deltas) -> torch.Tensor:
    return torch.stack([w * d for w, d in zip(WEIGHTS, deltas, strict=True)]).sum(0)


def ties(deltas: Deltas) -> torch.Tensor:
    kept = [trimmed(delta, 0.5) for delta in deltas]
    result = torch.zeros_like(kept[0])
    for index in range(result.numel()):
        values = [(w, float(d.flatten()[index])) for w, d in zip(WEIGHTS, kept, strict=True)]
        sign = 1 if sum(w * v for w, v in values) >= 0 else -1
        agree = [(w, v) for w, v in values if v * sign > 0]
        if agree:
            result.view(-1)[index] = sum(w * v for w, v in agree) / sum(w for w, _ in agree)
    return result


def slerp(deltas: Deltas) -> torch.Tensor:
    a, b = deltas
    angle = math.acos(float((a * b).sum() / (a.norm() * b.norm())))
    return (math.sin(0.7 * angle) * a + math.sin(0.3 * angle) * b) / math.sin(angle)


FORMULAS: dict[str, tuple[Callable[[Deltas], torch.Tensor], dict]] = {
    "linear": (plain_sum, {}),
    "cat": (plain_sum, {}),
    "svd": (plain_sum, {}),
    "ties": (ties, {"density": 0.5}),
    "magnitude_prune": (lambda deltas: plain_sum([trimmed(delta, 0.25) for delta in deltas]), {"density": 0.25}),
    "dare_linear": (plain_sum, {"density": 1.0}),
    "dare_ties": (lambda deltas: plain_sum(deltas), {"density": 1.0}),
    "slerp": (slerp, {"t": 0.3}),
}


@pytest.mark.parametrize("how", ["linear", "cat", "svd", "ties", "magnitude_prune", "dare_linear", "slerp"])
def test_each_way_is_its_formula_on_changes(how: str, base: Path, pair: list[Path], tmp_path: Path) -> None:
    formula, params = FORMULAS[how]
    both = [dense_deltas(folder) for folder in pair]
    wanted = {name: formula([deltas[name] for deltas in both]) for name in both[0]}
    full = None if how == "cat" else 16
    report = combine(pair, base, tmp_path / "adapter", options(how, rank=full, **params))
    ours = dense_deltas(tmp_path / "adapter")
    assert ours.keys() == wanted.keys()
    for name, delta in wanted.items():
        torch.testing.assert_close(ours[name], delta, atol=5e-6, rtol=0)
    assert report.relative_error < 1e-6, "nothing is cut at full rank"
    assert report.rank == (6 if how == "cat" else 16)
    # As a whole model nothing goes through singular values.
    combine(pair, base, tmp_path / "model", options(how, whole=True, **params))
    before, after = tensors(base), tensors(tmp_path / "model")
    for name, tensor in before.items():
        wanted_tensor = tensor.double() + wanted.get(name, torch.zeros(()))
        assert float((after[name].double() - wanted_tensor).abs().max()) <= 1e-6, name
    # What is written is what PEFT loads, and then it predicts what the whole model does.
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "adapter"))
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = torch.tensor(rows(2))
    torch.testing.assert_close(peft(input_ids=ids).logits, whole(input_ids=ids).logits, atol=2e-5, rtol=1e-4)


def test_peft_is_wrong_where_the_decision_says(base: Path, pair: list[Path], tmp_path: Path) -> None:
    """The reasons for doing it here; when one of these fails PEFT is mended, and decision 92 can say so."""
    combine(pair, base, tmp_path / "cat", options("cat"))
    ours = dense_deltas(tmp_path / "cat")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(pair[1]), adapter_name="one")
    stable2 = make_adapter(tmp_path / "stable2", base, STABLE, seed=3)
    model.load_adapter(str(stable2), adapter_name="two")
    name = "model.layers.0.self_attn.q_proj.weight"
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    wanted = 0.7 * dense_deltas(pair[1])[name] + 0.4 * dense_deltas(stable2)[name]
    model.add_weighted_adapter(["one", "two"], list(WEIGHTS), "cat", combination_type="cat")
    theirs = layer.get_delta_weight("cat").detach().double()
    torch.testing.assert_close(theirs, wanted * math.sqrt(8), atol=1e-5, rtol=1e-4)  # sqrt(rank) too large
    model.add_weighted_adapter(["one", "two"], list(WEIGHTS), "linear", combination_type="linear")
    crossed = layer.get_delta_weight("linear").detach().double()
    assert float((crossed - wanted).norm() / wanted.norm()) > 0.3, "cross terms of one's A with the other's B"
    combine([pair[1], stable2], base, tmp_path / "ours", options("cat"))
    torch.testing.assert_close(dense_deltas(tmp_path / "ours")[name], wanted, atol=1e-6, rtol=0)
    assert ours[name].shape == wanted.shape


def test_peft_agrees_where_it_is_right(base: Path, tmp_path: Path) -> None:
    """TIES of plain adapters with weights of 1, by singular values at full rank."""
    two = [make_adapter(tmp_path / f"a{seed}", base, PLAIN, seed=seed) for seed in (1, 2)]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(two[0]), adapter_name="one")
    model.load_adapter(str(two[1]), adapter_name="two")
    model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "t", combination_type="ties_svd", density=0.5, svd_rank=16)
    combine(two, base, tmp_path / "ties", options("ties", weights=(1.0, 1.0), rank=16, density=0.5))
    ours = dense_deltas(tmp_path / "ties")
    for index in (0, 1):
        theirs = model.base_model.model.model.layers[index].mlp.down_proj.get_delta_weight("t").detach().double()
        torch.testing.assert_close(ours[f"model.layers.{index}.mlp.down_proj.weight"], theirs, atol=1e-5, rtol=1e-4)


def test_what_a_rank_leaves_out_is_told(base: Path, pair: list[Path], tmp_path: Path) -> None:
    both = [dense_deltas(folder) for folder in pair]
    reports = {how: combine(pair, base, tmp_path / how, options(how, rank=2)) for how in ("linear", "svd")}
    lost = norm = 0.0
    for tensor in reports["linear"].tensors:
        wanted = plain_sum([deltas[tensor.name] for deltas in both])
        left_out = wanted - dense_deltas(tmp_path / "linear")[tensor.name]
        values = torch.linalg.svdvals(wanted)
        assert float(left_out.norm()) == pytest.approx(float(values[2:].norm()), rel=1e-4), "no rank-2 matrix is nearer"
        assert tensor.relative_error == pytest.approx(float(left_out.norm() / wanted.norm()), rel=1e-4)
        lost, norm = lost + float(left_out.norm()) ** 2, norm + float(wanted.norm()) ** 2
    assert reports["linear"].relative_error == pytest.approx(math.sqrt(lost / norm), rel=1e-4)
    assert reports["svd"].relative_error == pytest.approx(reports["linear"].relative_error, rel=1e-4)
    saved = json.loads((tmp_path / "linear/combine.json").read_text())
    assert saved["relative_error"] == reports["linear"].relative_error
    assert saved["weights"] == list(WEIGHTS)
    assert [len(source["sha256"]) for source in saved["sources"]] == [64, 64]
    for name, delta in dense_deltas(tmp_path / "svd").items():
        torch.testing.assert_close(delta, dense_deltas(tmp_path / "linear")[name], atol=1e-4, rtol=0)


def test_a_negative_weight_takes_away(base: Path, pair: list[Path], tmp_path: Path) -> None:
    combine(pair, base, tmp_path / "sum", options("cat", weights=(1.0, 1.0)))
    combine([tmp_path / "sum", pair[1]], base, tmp_path / "rest", options("cat", weights=(1.0, -1.0)))
    for name, delta in dense_deltas(tmp_path / "rest").items():
        torch.testing.assert_close(delta, dense_deltas(pair[0])[name], atol=1e-6, rtol=0)
    combine([pair[0]], base, tmp_path / "against", options("linear", weights=(-1.0,), rank=2))
    for name, delta in dense_deltas(tmp_path / "against").items():
        torch.testing.assert_close(delta, -dense_deltas(pair[0])[name], atol=5e-6, rtol=0)


def test_adapters_of_different_modules(base: Path, tmp_path: Path) -> None:
    """A tensor that one of them leaves alone is changed by the other's part; ranks are made equal with zeros."""
    one = make_adapter(tmp_path / "one", base, LoraConfig(r=2, target_modules=["q_proj"]), seed=1)
    two = make_adapter(tmp_path / "two", base, LoraConfig(r=3, target_modules=["q_proj", "o_proj"]), seed=2)
    combine([one, two], base, tmp_path / "cat", options("cat"))
    ours, first, second = (dense_deltas(tmp_path / name) for name in ("cat", "one", "two"))
    config = json.loads((tmp_path / "cat/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (5, 5, False)
    assert (config["rank_pattern"], config["target_modules"]) == ({}, ["o_proj", "q_proj"]), "servers read neither"
    name = "model.layers.1.self_attn.o_proj.weight"
    torch.testing.assert_close(ours[name], 0.4 * second[name], atol=1e-6, rtol=0)
    name = "model.layers.1.self_attn.q_proj.weight"
    torch.testing.assert_close(ours[name], 0.7 * first[name] + 0.4 * second[name], atol=1e-6, rtol=0)


def test_whole_tensors_and_magnitudes(base: Path, pair: list[Path], tmp_path: Path) -> None:
    saved = make_adapter(tmp_path / "saved", base, replace(PLAIN, modules_to_save=["lm_head", "norm"]), seed=4)
    dora = make_adapter(tmp_path / "dora", base, replace(PLAIN, use_dora=True), seed=5)
    combine([saved, dora], base, tmp_path / "adapter", options("linear", rank=16))
    merge(MergeSource(adapter=tmp_path / "adapter", base=base), tmp_path / "model", rows=rows(), dtype=torch.float32)
    start, merged = tensors(base), tensors(tmp_path / "model")
    ends = [oracle(base, folder) for folder in (saved, dora)]
    for name, tensor in start.items():
        changes = [weight * (end[name] - tensor.double()) for weight, end in zip(WEIGHTS, ends, strict=True)]
        torch.testing.assert_close(merged[name].double(), tensor.double() + sum(changes), atol=1e-5, rtol=0)
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["modules_to_save"]
    with pytest.raises(RecipeError, match=r"dora: its change of .* is no product of two matrices"):
        combine([pair[0], dora], base, tmp_path / "no", options("cat"))


def test_biases(tmp_path: Path) -> None:
    """Of adapted layers, of all layers, and the bias of B: each is a change of a bias of the base."""
    base = make_base(tmp_path / "base", "qwen", attention_bias=True)
    configs = {"all": replace(PLAIN, bias="all"), "some": replace(PLAIN, bias="lora_only"),
               "shift": LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True)}  # fmt: skip
    made = {name: make_adapter(tmp_path / name, base, config, seed=5) for name, config in configs.items()}
    start = tensors(base)
    for first, second, kind in (
        ("all", "some", "all"),
        ("some", "shift", "lora_only"),
        ("shift", "shift", "lora_only"),
    ):
        out = tmp_path / f"{first}-{second}"
        combine([made[first], made[second]], base, out, options("linear", rank=16))
        assert json.loads((out / "adapter_config.json").read_text())["bias"] == kind
        report = merge(
            MergeSource(adapter=out, base=base), tmp_path / f"{out.name}-merged", rows=rows(), dtype=torch.float32
        )
        assert report.comparison is not None
        assert report.comparison.largest_kl < 2e-6, "PEFT reads the same biases"
        merged, ends = tensors(tmp_path / f"{out.name}-merged"), [oracle(base, made[name]) for name in (first, second)]
        for name, tensor in start.items():
            changes = [weight * (end[name] - tensor.double()) for weight, end in zip(WEIGHTS, ends, strict=True)]
            torch.testing.assert_close(merged[name].double(), tensor.double() + sum(changes), atol=1e-5, rtol=0)


def test_models_that_were_trained_whole(base: Path, pair: list[Path], tmp_path: Path) -> None:
    """Task vectors against the base, among them one of an adapter; the result is a whole model."""
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(7)
    for param in model.parameters():
        param.data += 0.05 * torch.randn_like(param)
    model.save_pretrained(tmp_path / "full")
    start, end, adapter = tensors(base), tensors(tmp_path / "full"), dense_deltas(pair[0])
    for how in ("linear", "ties", "magnitude_prune"):
        formula, params = FORMULAS[how]
        combine([tmp_path / "full", pair[0]], base, tmp_path / how, options(how, **params))
        ours = tensors(tmp_path / how)
        for name, tensor in start.items():
            deltas = [end[name].double() - tensor.double(), adapter.get(name, torch.zeros(tensor.shape).double())]
            if how == "ties" and name not in adapter:
                continue  # an all-zero change: which of its zeros are its largest entries is nobody's business
            wanted = tensor.double() + formula(deltas)
            assert float((ours[name].double() - wanted).abs().max()) <= 1e-6, (how, name)
    assert (tmp_path / "linear/tokenizer.json").is_file()


def test_tied_models(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "qwen", tie_word_embeddings=True)
    plain = make_adapter(tmp_path / "plain", base, PLAIN, seed=1)
    head = make_adapter(tmp_path / "head", base, replace(PLAIN, modules_to_save=["lm_head"]), seed=2)
    combine([plain, plain], base, tmp_path / "tied", options("linear", whole=True))
    assert "lm_head.weight" not in tensors(tmp_path / "tied")
    combine([plain, head], base, tmp_path / "untied", options("linear", whole=True))
    ours, start = tensors(tmp_path / "untied"), tensors(base)["model.embed_tokens.weight"]
    assert torch.equal(ours["model.embed_tokens.weight"], start)
    wanted = start + 0.4 * (oracle(base, head)["lm_head.weight"] - start)
    torch.testing.assert_close(ours["lm_head.weight"].double(), wanted, atol=1e-6, rtol=0)


def test_experts_and_tokens_in_a_whole_model(tmp_path: Path) -> None:
    """What has no place in a plain adapter is combined as a model: the sum of what each merge changes."""
    base = make_base(tmp_path / "base", "moe")
    experts = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])
    tokens = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3, 5])
    two = [make_adapter(tmp_path / f"a{n}", base, config, seed=n) for n, config in enumerate((experts, tokens))]
    ends = []
    for folder in two:
        merge(
            MergeSource(adapter=folder, base=base), tmp_path / f"{folder.name}-merged", rows=None, dtype=torch.float32
        )
        ends.append(tensors(tmp_path / f"{folder.name}-merged"))
    combine(two, base, tmp_path / "model", options("linear", whole=True))
    ours, moved = tensors(tmp_path / "model"), set()
    for name, tensor in tensors(base).items():
        wanted = tensor + sum(weight * (end[name] - tensor) for weight, end in zip(WEIGHTS, ends, strict=True))
        torch.testing.assert_close(ours[name], wanted, atol=1e-6, rtol=0)
        moved |= set() if torch.equal(ours[name], tensor) else {name.split(".")[-2]}
    assert moved == {"q_proj", "down_proj", "embed_tokens"}
    with pytest.raises(RecipeError, match=r"a change of experts is not written as an adapter  add --whole"):
        combine(two, base, tmp_path / "adapter", options("linear"))


def test_random_choices() -> None:
    """Unbiased, at the asked density, the same for a seed, others for another tensor."""
    torch.manual_seed(0)
    delta = torch.randn(40, 50)

    def draws(seed: int) -> Callable[[int], torch.Generator]:
        return lambda index: torch.Generator().manual_seed(1000 * seed + index)

    for how, params in (("dare_linear", {}), ("dare_ties", {}), ("della", {"epsilon": 0.2})):
        spec = HOWS[how]
        settings = spec.params(density=0.4, **params)
        many = torch.stack([spec.combine(settings, [delta], [1.0], draws(seed)) for seed in range(400)])
        assert torch.equal(many[3], spec.combine(settings, [delta], [1.0], draws(3)))
        assert not torch.equal(many[3], many[4])
        kept = (many != 0).double().mean(0)
        assert float(kept.mean()) == pytest.approx(0.4, abs=0.01)
        error = (many.mean(0) - delta).norm() / delta.norm()
        assert float(error) < 0.1, "the mean over seeds is the change itself"
        if how == "della":
            large = delta.abs() > delta.abs().median(dim=1, keepdim=True).values
            assert float(kept[large].mean()) > float(kept[~large].mean()) + 0.05
    chance = chances_to_keep(torch.tensor([[3.0, -1.0, 2.0, 0.5, -4.0]]), 0.5, 0.2)
    torch.testing.assert_close(chance, torch.tensor([[0.55, 0.45, 0.5, 0.4, 0.6]]))


def test_seeds_reach_the_tensors(base: Path, pair: list[Path], tmp_path: Path) -> None:
    def made(name: str, folders: list[Path], weights: tuple[float, ...], **params) -> dict[str, torch.Tensor]:
        combine(folders, base, tmp_path / name, options("dare_linear", weights=weights, rank=16, density=0.5, **params))
        return dense_deltas(tmp_path / name)

    one, again = made("one", pair, WEIGHTS, seed=3), made("again", pair, WEIGHTS, seed=3)
    other = made("other", pair, WEIGHTS, seed=4)
    alone = made("alone", pair[:1], (0.7,), seed=3)
    silent = made("silent", pair, (0.7, 0.0), seed=3)
    for name in one:
        assert torch.equal(one[name], again[name])
        assert not torch.allclose(one[name], other[name], atol=1e-3)
        torch.testing.assert_close(alone[name], silent[name], atol=5e-6, rtol=0)
    kept = [name for name in one if (one[name].abs() > 1e-4).float().mean() < 0.9]
    assert kept, "entries were dropped"


def test_elected_signs() -> None:
    deltas = [
        torch.tensor([1.0, -1.0, 2.0, 0.0]),
        torch.tensor([2.0, 3.0, -1.0, 0.0]),
        torch.tensor([-1.0, 1.0, -4.0, 0.0]),
    ]
    mean = pruning.elected(deltas, [1.0, 1.0, 1.0], normalize=True)
    torch.testing.assert_close(mean, torch.tensor([1.5, 2.0, -2.5, 0.0]))  # the paper's disjoint mean
    total = pruning.elected(deltas, [1.0, 1.0, 1.0], normalize=False)
    torch.testing.assert_close(total, torch.tensor([3.0, 4.0, -5.0, 0.0]))
    assert pruning.largest(torch.tensor([1.0, -3.0, 2.0]), 0.01).tolist() == [0.0, -3.0, 0.0]


def test_ends_of_the_arc() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(4, 5), torch.randn(4, 5)
    spec = HOWS["slerp"]

    def at(t: float, *pair: torch.Tensor) -> torch.Tensor:
        return spec.combine(spec.params(t=t), pair, [1.0, 1.0], lambda index: torch.Generator())

    torch.testing.assert_close(at(0.0, a, b), a)
    torch.testing.assert_close(at(1.0, a, b), b)
    unit = [a / a.norm(), b / b.norm()]
    assert float(at(0.5, *unit).norm()) == pytest.approx(1.0, abs=1e-5), "on the sphere all the way"
    torch.testing.assert_close(at(0.25, a, 2 * a), 1.25 * a)  # parallel: a line
    assert torch.equal(at(0.5, a, torch.zeros(4, 5)), a / 2)


def test_a_rank_beyond_what_is_there_is_zeros() -> None:
    cut = truncate(torch.randn(3, 4), 5)
    assert cut.left_MR.shape == (3, 5)
    assert cut.right_RN.shape == (5, 4)
    assert cut.lost == 0.0
    assert truncate(torch.zeros(3, 4), 2).relative_error == 0.0


def test_flags_name_every_way() -> None:
    assert tuple(HOWS) == HOW_FLAGS
