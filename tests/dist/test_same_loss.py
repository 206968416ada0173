"""One recipe, one loss: every engine, world size, micro-batch split and packing choice agrees with one process."""

import json
import math

import pytest
import torch
from harness import BATCH, LENGTH, SETTINGS, STEPS, WHOLE_GRIDS, Bench, Run, label, relative
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

TOLERANCE = 1e-5
METHODS = {
    "full": [],
    "lora": ['method.name="lora"', "method.r=4", "optim.learning_rate=3e-3"],
    "qlora": ['method.name="qlora"', "method.r=4", "optim.learning_rate=3e-3"],
}
LAYOUTS = [
    *(("solo", 1), ("ddp", 2), ("zero1", 2), ("zero2", 2), ("zero3", 2), ("fsdp2", 2)),
    *(
        pytest.param(layout, marks=pytest.mark.slow)
        for layout in (("fsdp2", 2, "once"), ("fsdp2", 4), ("fsdp2", 4, "halves"), ("zero3", 4, "halves"))
    ),
]


def cases(engine: str, world: int, *settings: str) -> dict[str, list[str]]:
    """Three methods x packed or not x the smallest and the largest micro-batch; under settings packed and small.

    Several processes take each packing with one of the micro-batches, and adapters packed alone, but for the whole
    grid.
    """
    out = {}
    for method, chosen in METHODS.items():
        packed_alone = world > 1 and method != "full" and not WHOLE_GRIDS
        for packing in ("true",) if settings or packed_alone else ("true", "false"):
            micros = sorted({1} if settings else {1, BATCH // world})
            if world > 1 and not WHOLE_GRIDS:
                micros = micros[:1] if packing == "true" else micros[-1:]
            for micro in micros:
                name = f"{method}-{'packed' if packing == 'true' else 'rows'}-micro{micro}"
                out[name] = [
                    f'engine.name="{engine}"',
                    *(SETTINGS[name] for name in settings),
                    f"data.packing={packing}",
                    f"train.micro_batch_size={micro}",
                    *chosen,
                ]
    return out


@pytest.fixture(scope="session")
def solo(bench: Bench) -> dict[str, Run]:
    return bench.launch(1, cases("solo", 1), tag="solo1")


@pytest.fixture(scope="session", params=LAYOUTS, ids=label)
def layout(request: pytest.FixtureRequest, bench: Bench, solo: dict[str, Run]) -> dict[str, Run]:
    world = request.param[1]
    return solo if world == 1 else bench.launch(world, cases(*request.param), tag=label(request.param))


def test_loss_and_norm_equal_solo(layout: dict[str, Run], solo: dict[str, Run]) -> None:
    worst = {}
    for name, run in layout.items():
        reference = solo[name.rsplit("-", 1)[0] + "-micro1"]
        worst[name] = max(relative(run.column(column), reference.column(column)) for column in ("loss", "grad_norm"))
        assert run.column("tokens") == reference.column("tokens")
        assert run.column("tokens_loss") == reference.column("tokens_loss")
        assert run.evals[-1]["eval_loss"] == pytest.approx(reference.evals[-1]["eval_loss"], rel=TOLERANCE)
    assert max(worst.values()) < TOLERANCE, worst


def test_clipping_was_active_and_the_model_learnt(solo: dict[str, Run]) -> None:
    for name, run in solo.items():
        assert max(run.column("grad_norm")) > 0.5, name  # the recipe clips at 0.5
    full = solo["full-packed-micro1"]
    assert full.evals[-1]["eval_loss"] < full.evals[0]["eval_loss"] - 0.5


@pytest.mark.row(36)
def test_final_loads_in_plain_transformers_and_generates(layout: dict[str, Run], bench: Bench) -> None:
    for method in METHODS:
        run = layout[f"{method}-packed-micro1"]
        assert run.folder is not None
        final = run.folder / "final"
        tokenizer = AutoTokenizer.from_pretrained(final)
        if method == "full":
            model = AutoModelForCausalLM.from_pretrained(final)
        else:
            keys = json.loads((final / "adapter_config.json").read_text())
            assert keys["r"] == 4
            base = AutoModelForCausalLM.from_pretrained(keys["base_model_name_or_path"])
            model = PeftModel.from_pretrained(base, final)
            loaded = {name: p for name, p in model.named_parameters() if "lora_" in name}
            assert len(loaded) == 2 * 7 * 2  # A and B, seven projections, two blocks
            assert all(p.numel() for p in loaded.values())
            assert any(p.any() for name, p in loaded.items() if "lora_B" in name)
        inputs = tokenizer("disk queue login:", return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        assert out.shape[1] > inputs["input_ids"].shape[1]


def test_final_weights_equal_solo(layout: dict[str, Run], solo: dict[str, Run]) -> None:
    """The saved full model is the same function whichever engine trained it."""
    mine, theirs = (
        AutoModelForCausalLM.from_pretrained(runs["full-packed-micro1"].folder / "final") for runs in (layout, solo)
    )
    ids = torch.arange(5, 60)[None]
    with torch.no_grad():
        assert torch.allclose(mine(ids).logits, theirs(ids).logits, atol=2e-4)


def _plain_examples(bench: Bench) -> list[tuple[torch.Tensor, int]]:
    """(ids, prompt length) per row, in file order: what the recipe says, spelled out with transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(bench.folder / "model")
    examples = []
    for line in (bench.folder / "train.jsonl").read_text().splitlines():
        row = json.loads(line)
        ids = tokenizer(row["prompt"] + row["completion"])["input_ids"] + [tokenizer.eos_token_id]
        if len(ids) <= LENGTH:  # long_rows = "drop"
            prompt = tokenizer(row["prompt"])["input_ids"]
            # A token that spans the boundary is trained, as in TRL: the prompt is what both tokenisations share.
            shared = next(i for i, token in enumerate([*prompt, None]) if token != ids[i])
            examples.append((torch.tensor(ids), shared))
    return examples


def test_solo_equals_a_plain_pytorch_loop(bench: Bench) -> None:
    ours = bench.launch(1, {"rows": ["data.packing=false", "data.shuffle=false", 'engine.name="solo"']}, tag="plain")
    model = AutoModelForCausalLM.from_pretrained(bench.folder / "model")
    decay = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}])
    examples = _plain_examples(bench)
    losses, norms = [], []
    for step in range(STEPS):
        batch = examples[step * BATCH : (step + 1) * BATCH]
        count = sum(len(ids) - prompt for ids, prompt in batch)
        total = 0.0
        for ids, prompt in batch:
            logits = model(ids[None]).logits[0, prompt - 1 : -1]
            loss = torch.nn.functional.cross_entropy(logits, ids[prompt:], reduction="sum") / count
            loss.backward()
            total += loss.item()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
        losses.append(total)
        warm = (step + 1) / 2 if step < 2 else 0.5 * (1 + math.cos(math.pi * (step - 2) / (STEPS - 2)))
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * warm
        optimizer.step()
        optimizer.zero_grad()
    assert relative(ours["rows"].column("loss"), losses) < TOLERANCE
    assert relative(ours["rows"].column("grad_norm"), norms) < TOLERANCE
