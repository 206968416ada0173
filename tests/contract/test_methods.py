"""Every registered method: starts as identity, trains only what it owns, and merges into what it computes."""

import ast
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tiny import CPU, batch, build, documents
from transformers import AutoModelForCausalLM

import distft
from distft.core.errors import DistftError
from distft.model.adapters import METHODS

ADAPTERS = [name for name, spec in METHODS.items() if spec.adapter]
NEEDED = {"peft": {"type": "HRA", "r": 4}}
VARIANTS = [(name, NEEDED.get(name, {})) for name in METHODS if name != "freeze"] + [
    ("lora", {"r": 4, "rslora": True}),
    ("lora", {"r": 4, "dora": True}),
    ("lora", {"r": 4, "target_modules": ["q_proj", "v_proj"]}),
    ("lora", {"r": 4, "modules_to_save": ["lm_head"]}),
    ("lora", {"r": 4, "adapter_dtype": "bfloat16"}),
    ("qlora", {"r": 4, "quant": {"type": "fp4", "double": False}}),
    ("qlora", {"r": 4, "quant": {"storage_dtype": "bfloat16"}}),
    ("vera", {"quant": {}}),
    ("peft", {"type": "BOFT", "boft_block_size": 4, "quant": {}}),
    ("peft", {"type": "MISS", "r": 4, "target_modules": ["q_proj"], "modules_to_save": ["norm"]}),
    ("oft", {"oft_block_size": 4, "module_dropout": 0.5, "quant": {}}),
    ("ia3", {"modules_to_save": ["lm_head"]}),
    ("lokr", {"r": 2, "decompose_both": True, "target_modules": ".*(q|v)_proj"}),
]
EXAMPLE = batch(documents([30, 12]))


def adapted_params(method: str, params: dict):
    return METHODS[method].params.model_validate_json(json.dumps(params))


def losses(model) -> torch.Tensor:
    with torch.no_grad():
        return model.module.eval()(**EXAMPLE.inputs())


@pytest.mark.parametrize(("method", "params"), VARIANTS, ids=lambda value: str(value))
def test_starts_as_identity(tiny_config: Path, method: str, params: dict) -> None:
    adapted = build(tiny_config, method, params=params)
    if METHODS[method].quant(adapted_params(method, params)):  # identity with the quantised base: leave the adapter out
        with adapted.module.lm.disable_adapter():
            base = losses(adapted)
    else:
        base = losses(build(tiny_config))
    assert torch.allclose(losses(adapted), base, atol=1e-5)


@pytest.mark.parametrize(("method", "params"), VARIANTS, ids=lambda value: str(value))
def test_trains_only_what_it_owns(tiny_config: Path, method: str, params: dict) -> None:
    model = build(tiny_config, method, params=params)
    output = model.module(**EXAMPLE.inputs())  # with what a method adds to the loss
    sum(part.sum() for part in (output if isinstance(output, tuple) else (output,))).backward()
    spec = METHODS[method]
    for name, param in model.module.named_parameters():
        own = spec.owns(name) or ".modules_to_save." in name or not spec.adapter
        assert param.requires_grad == own, name
        assert (param.grad is not None) == own, name


@pytest.mark.parametrize(("method", "params"), [v for v in VARIANTS if v[0] == "lora"], ids=str)
def test_merged_equals_unmerged(tiny_config: Path, tmp_path: Path, method: str, params: dict) -> None:
    """Through the saved folder and plain PEFT, as a server would."""
    model = build(tiny_config, method, params=params)
    torch.manual_seed(0)
    for param in model.module.parameters():
        if param.requires_grad:
            param.data.add_(0.05 * torch.randn_like(param))
    base = tmp_path / "base"
    plain = build(tiny_config).module.transformer
    plain.set_attn_implementation("sdpa")
    plain.save_pretrained(base)
    model.module.lm.save_pretrained(tmp_path / "adapter")
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    merged = merged.merge_and_unload()
    ids = torch.tensor([documents([20])[0]])
    bound = 2e-2 if params.get("adapter_dtype") else 1e-4
    with torch.no_grad():
        bounds = torch.tensor([0, 20], dtype=torch.int32)
        ours = model.module.transformer(ids, use_cache=False, cu_seq_lens_q=bounds, max_length_q=20).logits
        assert torch.allclose(merged(ids).logits, ours, atol=bound)


def test_adapters_follow_the_recipes_dtype(tiny_config: Path) -> None:
    for wanted, dtype in (("auto", torch.bfloat16), ("float32", torch.float32)):
        model = build(tiny_config, "lora", params={"r": 4, "adapter_dtype": wanted}, dtype="bfloat16")
        kinds = {p.dtype for n, p in model.module.named_parameters() if ".lora_" in n}
        assert kinds == {dtype}
        frozen = {p.dtype for n, p in model.module.named_parameters() if not p.requires_grad}
        assert frozen == {torch.bfloat16}, "no fp32 upcast of the frozen embedding, head and norms"


def test_fresh_adapters_depend_on_seed_and_name_only(tiny_config: Path) -> None:
    one, same, other = (build(tiny_config, "lora", fill=False, seed=seed) for seed in (1, 1, 2))
    for unit in [*reversed(same.blocks), same.module]:
        same.fill(unit, CPU)
    one.fill(one.module, CPU)
    other.fill(other.module, CPU)
    named = [dict(m.module.named_parameters()) for m in (one, same, other)]
    matrices = [name for name in named[0] if ".lora_A." in name]
    assert all(torch.equal(named[0][name], named[1][name]) for name in matrices)
    assert not any(torch.equal(named[0][name], named[2][name]) for name in matrices)
    assert not torch.equal(named[0][matrices[0]], named[0][matrices[7]])


@pytest.mark.parametrize("init", ["random", "pretrained"])
def test_a_tied_head_that_is_trained_whole_starts_as_the_embeddings(
    tiny_config: Path, tmp_path: Path, init: str
) -> None:
    """The files of a tied model hold no head to start from."""
    folder = tmp_path / "tied"
    folder.mkdir()
    config = json.loads((tiny_config / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    plain = build(folder)
    if init == "pretrained":
        plain.module.transformer.save_pretrained(folder)
    adapted = build(folder, "lora", params={"r": 4, "modules_to_save": ["lm_head"]}, init=init)
    assert torch.allclose(losses(adapted), losses(plain), atol=1e-5)
    head = adapted.module.head.weight
    embeddings = adapted.module.transformer.get_input_embeddings().weight
    assert torch.equal(head, embeddings)
    assert head.requires_grad
    assert not embeddings.requires_grad


def test_no_other_room_tests_a_method_by_its_name() -> None:
    """The spec says what a method is like; code that compares names does not know methods from outside."""
    package = Path(distft.__file__).parent
    tested = [
        f"{path.relative_to(package)}:{node.lineno}"
        for path in sorted(package.rglob("*.py"))
        if package / "model/adapters" not in path.parents
        if package / "importers" not in path.parents  # which compare the words of other tools
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Compare)
        for constant in ast.walk(node)
        if isinstance(constant, ast.Constant) and constant.value in {"lora", "qlora", ".lora_A.", ".lora_B."}
    ]
    assert tested == []


def test_what_starts_at_zero_does(tiny_config: Path) -> None:
    """And is what tells an adapter that was trained from one that was not."""
    for name in ADAPTERS:
        spec, module = METHODS[name], build(tiny_config, name, params=NEEDED.get(name)).module
        zeros = {param for param, tensor in module.named_parameters() if spec.owns(param) and not tensor.any()}
        assert zeros or name in ("ia3", "prompt_tuning", "p_tuning", "prefix_tuning", "peft"), (
            "these start as something else"
        )
        assert zeros == {param for param, _ in module.named_parameters() if spec.starts_at_zero(param)}


@pytest.mark.parametrize("method", ["ia3", "loha"])
def test_an_adapter_that_was_not_trained_is_not_saved(tiny_config: Path, tmp_path: Path, method: str) -> None:
    """Whatever it starts as; an update of one number is enough to be saved."""
    lm = build(tiny_config, method).module.lm
    tensors = {name: param.detach() for name, param in lm.named_parameters() if param.requires_grad}
    with pytest.raises(DistftError, match="still its initial value"):
        METHODS[method].save_adapter(lm, tmp_path, tensors)
    tensors[min(tensors)] = tensors[min(tensors)] + 0.1
    METHODS[method].save_adapter(lm, tmp_path, tensors)
    assert (tmp_path / "adapter_model.safetensors").is_file()


FROZEN = [
    ({"last_blocks": 1}, lambda name: ".layers.1." in name),
    ({"norms": True}, lambda name: "norm" in name),
    ({"parameters": [".*\\.[qk]_proj.weight"]}, lambda name: "q_proj" in name or "k_proj" in name),
    (
        {"parameters": [".*embed.*"], "last_blocks": 2},
        lambda name: name != "lm.model.norm.weight" and "head" not in name,
    ),
]


@pytest.mark.parametrize(("params", "trained"), FROZEN, ids=["last block", "norms", "by name", "both"])
def test_freeze_trains_what_it_names_and_nothing_else(tiny_config: Path, params: dict, trained) -> None:
    model = build(tiny_config, "freeze", params=params)
    assert torch.equal(losses(model), losses(build(tiny_config)))
    model.module(**EXAMPLE.inputs()).sum().backward()
    for name, param in model.module.named_parameters():
        assert param.requires_grad == trained(name) == (param.grad is not None), name
