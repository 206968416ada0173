"""Every method against PEFT's own model in a plain AdamW loop: the same rows, six steps, fp32."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tiny import batch, build, documents
from transformers import AutoModelForCausalLM

from distft.core.types import UpdateRule
from distft.core.virtual_tokens import virtual_ids
from distft.model.adapters import METHODS
from distft.model.adapters.spec import file_key, optimizer_of
from distft.optim import OPTIMIZERS

STEPS, RATE = 6, 2e-3
TEXTS = documents([30, 12, 21])
LINEAR = "all-linear"
EVERYWHERE: dict[str, Any] = {"target_modules": LINEAR, "task_type": "CAUSAL_LM"}


def config(kind: str, **settings: Any) -> Any:
    return getattr(peft, f"{kind}Config")(**{**EVERYWHERE, **settings})


LORA = {"r": 4, "lora_alpha": 32}
METHOD: dict[str, tuple[str, dict[str, Any], Any]] = {
    "lora": ("lora", {"r": 4}, lambda: config("Lora", **LORA)),
    "rslora": ("lora", {"r": 4, "rslora": True}, lambda: config("Lora", **LORA, use_rslora=True)),
    "dora": ("lora", {"r": 4, "dora": True}, lambda: config("Lora", **LORA, use_dora=True)),
    "patterns": (
        "lora",
        {"r": 4, "rank_pattern": {"down_proj": 2}, "alpha_pattern": {"q_proj": 8.0}, "modules_to_save": ["norm"]},
        lambda: config("Lora", **LORA, rank_pattern={"down_proj": 2}, alpha_pattern={"q_proj": 8.0},
                       modules_to_save=["model.norm"]),
    ),
    "adalora": (
        "adalora",
        {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 1},
        lambda: config("AdaLora", init_r=4, target_r=2, lora_alpha=32, tinit=1, tfinal=1, total_step=STEPS),
    ),
    "ia3": ("ia3", {}, lambda: config("IA3", target_modules=["k_proj", "v_proj", "down_proj"],
                                      feedforward_modules=["down_proj"])),
    "vera": ("vera", {"r": 8}, lambda: config("Vera", r=8)),
    "oft": ("oft", {"oft_block_size": 8}, lambda: config("OFT", oft_block_size=8, r=0)),
    "loha": ("loha", {"r": 4}, lambda: config("LoHa", r=4, alpha=METHODS["loha"].params().alpha)),
    "lokr": ("lokr", {"r": 4}, lambda: config("LoKr", r=4, alpha=METHODS["lokr"].params().alpha)),
    "peft HRA": ("peft", {"type": "HRA", "r": 4}, lambda: config("HRA", r=4)),
    "peft BOFT": ("peft", {"type": "BOFT", "boft_block_size": 4}, lambda: config("BOFT", boft_block_size=4)),
    "prompt_tuning": (
        "prompt_tuning", {"num_virtual_tokens": 3},
        lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    ),
    "p_tuning": (
        "p_tuning", {"num_virtual_tokens": 3, "encoder_hidden_size": 24},
        lambda: peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=24, task_type="CAUSAL_LM"),
    ),
    "prefix_tuning": (
        "prefix_tuning", {"num_virtual_tokens": 3},
        lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    ),
}  # fmt: skip
PROMPTS = ("prompt_tuning", "p_tuning", "prefix_tuning")


def plain_loss(model: Any, tokens: int) -> torch.Tensor:
    """The mean over supervised tokens, a text at a time; where PEFT adds to a model's loss, that once."""
    total, count = torch.zeros(()), 0
    for ids in TEXTS:
        logits = model(input_ids=torch.tensor([ids])).logits[0, tokens:]
        total = total + torch.nn.functional.cross_entropy(logits[:-1].float(), torch.tensor(ids[1:]), reduction="sum")
        count += len(ids) - 1
    return total / count


@pytest.mark.parametrize("name", METHOD)
def test_six_steps_are_those_of_peft(base: Path, name: str) -> None:
    method, params, make = METHOD[name]
    spec = METHODS[method]
    chosen = spec.params.model_validate_json(json.dumps(params))
    model = build(base, method, init="pretrained", params=params)
    tokens = spec.virtual_tokens(chosen)
    example = batch([[*virtual_ids(tokens), *text] for text in TEXTS], trained_from=max(tokens + 1, 1))
    torch.manual_seed(0)
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), make())
    theirs.train()
    start_alike(model.module.lm, theirs, name)
    optim = OPTIMIZERS["adamw"]
    settings = optim.params(learning_rate=RATE)
    wrapped: Any = optimizer_of(spec, chosen, optim, STEPS)
    rule = UpdateRule(
        build=lambda groups: wrapped.build(settings, groups), lr_at=lambda _: RATE, weight_decay=0.0,
        decayed=frozenset(), max_grad_norm=None, named=spec.optimizer is not None,
    )  # fmt: skip
    trained = [(key, param) for key, param in model.module.named_parameters() if param.requires_grad]
    ours = rule.build(rule.groups(trained))
    for group in ours.param_groups:
        group["lr"] = RATE
    plain = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    model.module.train()
    first = last = 0.0
    for step in range(1, STEPS + 1):
        output = model.module(**example.inputs())
        parts = output if isinstance(output, tuple) else (output,)
        ours_now = sum(part.sum() for part in parts) / example.num_supervised
        theirs_now = plain_loss(theirs, 0 if name not in ("prompt_tuning", "p_tuning") else tokens)
        if name == "adalora":
            theirs_now = theirs_now + orthogonality(theirs)
        assert torch.allclose(ours_now, theirs_now, rtol=1e-5), (name, step, ours_now, theirs_now)
        for loss, optimizer in ((ours_now, ours), (theirs_now, plain)):
            loss.backward()
            optimizer.step()
        if name == "adalora":
            theirs.base_model.update_and_allocate(step)
        for optimizer in (ours, plain):
            optimizer.zero_grad()
        first, last = first or float(ours_now.detach()), float(ours_now.detach())
    assert abs(last - first) > 1e-4, "it trains"
    if name == "adalora":
        kept = [
            [param != 0 for key, param in each.named_parameters() if "lora_E" in key] for each in (model.module, theirs)
        ]
        assert all(torch.equal(*pair) for pair in zip(*kept, strict=True))
        assert sum(int(mask.sum()) for mask in kept[0]) == 2 * len(kept[0]), "the budget is kept"


def start_alike(ours: Any, theirs: Any, name: str) -> None:
    """Give PEFT's adapter the values that ours starts from; a B of zeros would say nothing about its A."""
    mine = {file_key(key): param for key, param in ours.named_parameters() if param.requires_grad}
    mine |= {file_key(key): buffer for key, buffer in ours.named_buffers() if ".default" in key or "vera" in key}
    other = {file_key(key): param for key, param in theirs.named_parameters() if param.requires_grad}
    other |= {file_key(key): b for key, b in theirs.named_buffers() if ".default" in key or "vera" in key}
    torch.manual_seed(1)
    with torch.no_grad():
        if name in PROMPTS:
            alike_prompts(ours, theirs, name)
            return
        assert mine.keys() == other.keys(), mine.keys() ^ other.keys()
        for key, param in mine.items():
            if not param.any() and param.is_floating_point() and "lora_B" in key:
                param.normal_(std=0.02)
            other[key].copy_(param)


def alike_prompts(ours: Any, theirs: Any, name: str) -> None:
    mine = {key: param for key, param in ours.named_parameters() if param.requires_grad}
    encoder = theirs.prompt_encoder["default"]
    if name == "prompt_tuning":
        [prompt] = mine.values()
        encoder.embedding.weight.copy_(prompt)
    elif name == "p_tuning":
        other = dict(encoder.named_parameters())
        for key, param in mine.items():
            match = [value for short, value in other.items() if key.endswith(short)]
            assert len(match) == 1, (key, list(other))
            match[0].copy_(param)
    else:
        weight = torch.cat([mine[key].flatten(1) for key in sorted(mine)], 1)
        assert weight.shape == encoder.embedding.weight.shape, (
            weight.shape,
            encoder.embedding.weight.shape,
            list(mine),
        )
        encoder.embedding.weight.copy_(weight)


def orthogonality(model: Any) -> torch.Tensor:
    """PEFT's own lines (`AdaLoraModel.forward`), which add it where a loss comes out of the model."""
    terms = []
    for name, param in model.named_parameters():
        if ("lora_A" in name or "lora_B" in name) and param.requires_grad:
            product = param @ param.T if "lora_A" in name else param.T @ param
            terms.append(torch.norm(product - torch.eye(len(product))))
    return 0.5 * sum(terms) / len(terms)


def test_every_method_is_compared() -> None:
    """Or is no module of PEFT's: what it trains is held against plain sources elsewhere."""
    elsewhere = {"full", "freeze", "bottleneck", "qlora"}
    assert {method for method, _, _ in METHOD.values()} | elsewhere == set(METHODS)


def test_what_is_saved_of_adalora_is_what_peft_loads(base: Path, tmp_path: Path) -> None:
    """With masked triplets, which stay in the file as zeros."""
    model = build(base, "adalora", init="pretrained", params={"init_r": 4, "target_r": 2})
    own = {name: param for name, param in model.module.lm.named_parameters() if param.requires_grad}
    torch.manual_seed(0)
    with torch.no_grad():
        for param in own.values():
            param.add_(0.1 * torch.randn_like(param))
        for name, param in own.items():
            if "lora_E" in name:
                param[1] = 0.0
    METHODS["adalora"].save_adapter(model.module.lm, tmp_path, {name: param.detach() for name, param in own.items()})
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    loaded = peft.PeftModel.from_pretrained(plain, str(tmp_path)).eval()
    example = batch(TEXTS)
    with torch.no_grad():
        ours = model.module.eval()(**example.inputs()).sum() / example.num_supervised
        assert torch.allclose(ours, plain_loss(loaded, 0), rtol=1e-5)
        again = build(base, "adalora", init="pretrained",
                      params={"init_r": 4, "target_r": 2, "start": str(tmp_path)}).module.eval()  # fmt: skip
        assert torch.allclose(again(**example.inputs()).sum() / example.num_supervised, ours, rtol=1e-6)
