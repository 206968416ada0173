"""Mixtures of experts: full, LoRA and QLoRA, the same loss on every engine, resumed bit for bit, saved as the hub does.

Two launches train everything, one continues what was cut, one loads under sharding engines; the rest is reading.
`make test` has each model under each method once, and each method on each engine; `make test-moe` every combination.
"""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from harness import ROOT, STEPS, WHOLE_GRIDS, Bench, Run, relative, run, torchrun
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, GptOssConfig, MixtralConfig, Qwen3MoeConfig

SIZES = {
    "vocab_size": 1024, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "initializer_range": 0.05, "bos_token_id": None, "eos_token_id": 1,
    "pad_token_id": 0, "num_experts_per_tok": 2,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
CONFIGS = {
    "qwen3_moe": Qwen3MoeConfig(**SIZES, head_dim=16, num_experts=5, moe_intermediate_size=32, intermediate_size=96),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4, intermediate_size=48),
    "gpt_oss": GptOssConfig(**SIZES, head_dim=16, num_local_experts=4, intermediate_size=64, rope_parameters=ROPE),
}
EXPERT = {
    "qwen3_moe": "model.layers.1.mlp.experts.4.gate_proj.weight",
    "mixtral": "model.layers.1.block_sparse_moe.experts.3.w3.weight",
    "gpt_oss": "model.layers.1.mlp.experts.gate_up_proj",  # the hub's files of gpt-oss hold experts together
}
METHODS = {
    "full": [],
    "lora": ['method.name="lora"', "method.r=4", "optim.learning_rate=3e-3"],
    "qlora": ['method.name="qlora"', "method.r=4", "optim.learning_rate=3e-3"],
}
pytestmark = pytest.mark.slow
SHARDED = ("zero3", "fsdp2")
CUT = 3


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    made = Bench.make(tmp_path_factory.mktemp("moe"))
    for name, config in CONFIGS.items():
        torch.manual_seed(11)
        AutoModelForCausalLM.from_config(config).save_pretrained(made.folder / name)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (made.folder / name / file).write_bytes((made.folder / "model" / file).read_bytes())
    return made


def overrides(bench: Bench, model: str, method: str, engine: str) -> list[str]:
    return [
        f'model.path="{bench.folder / model}"', 'model.attention="eager"', f'engine.name="{engine}"',
        "train.micro_batch_size=1", 'checkpoint.every_steps="off"', *METHODS[method],
    ]  # fmt: skip


PAIRS = [(model, method) for model in CONFIGS for method in METHODS]


@pytest.fixture(scope="module")
def solo(bench: Bench) -> dict[tuple[str, str], Run]:
    cases = {f"{model}-{method}": overrides(bench, model, method, "solo") for model, method in PAIRS}
    runs = bench.launch(1, cases, tag="solo", timeout_s=1200)
    return {pair: runs["-".join(pair)] for pair in PAIRS}


@pytest.fixture(scope="module")
def spread(bench: Bench) -> dict[tuple[str, str, str], tuple[Run, Run]]:
    """(engine, model, method) -> (the run, the same run cut after CUT steps and continued)."""
    cases, extra = {}, {}
    trios = [(engine, *pair) for engine in SHARDED for pair in PAIRS] + [("ddp", "qwen3_moe", name) for name in METHODS]
    if not WHOLE_GRIDS:
        models, methods = list(CONFIGS), list(METHODS)
        # A Latin square: the n-th engine trains the m-th model under the (n + m)-th method.
        trios = [
            (engine, model, methods[(n + m) % 3])
            for n, engine in enumerate((*SHARDED, "ddp"))
            for m, model in enumerate(models)
            if engine != "ddp" or model == "qwen3_moe"
        ]
    for number, (engine, model, method) in enumerate(trios):
        name = f"{engine}-{model}-{method}"
        cases[name] = overrides(bench, model, method, engine)
        if engine != "ddp" and (WHOLE_GRIDS or number % 2 == 0):
            cases[f"cut-{name}"] = cases[name]
            extra[f"cut-{name}"] = {"fault": f"term:rank=1,point=step,step={CUT};raise:point={name}"}
    runs = bench.launch(2, cases, tag="two", extra=extra, timeout_s=2400)
    stopped = [name for name in cases if name.startswith("cut-")]
    for name in stopped:
        assert f"after step {CUT}; the state is saved" in runs[name].error, (name, runs[name].error)
    continued = bench.launch(2, {name: cases[name] for name in stopped}, tag="two", timeout_s=2400)
    return {
        trio: (runs["-".join(trio)], continued.get(f"cut-{'-'.join(trio)}", runs["-".join(trio)])) for trio in trios
    }


def tensors(one: Run) -> str:
    assert one.folder is not None
    digest = hashlib.sha256()
    for file in sorted((one.folder / "final").glob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def test_engines_give_the_loss_of_one_process(solo: dict, spread: dict) -> None:
    gaps = {}
    for (engine, model, method), (one, _) in spread.items():
        gaps[engine, model, method] = relative(one.column("loss"), solo[model, method].column("loss"))
    assert max(gaps.values()) < 1e-5, gaps
    for pair in PAIRS:
        losses = solo[pair].column("loss")
        assert losses[-1] < losses[0] - 1e-3, (pair, "experts and attention learn something")


def test_what_was_cut_goes_on_bit_for_bit(spread: dict) -> None:
    for key, (one, again) in spread.items():
        if key[0] == "ddp":
            continue
        assert again.column("loss") == one.column("loss"), key
        assert len(again.steps) == STEPS
        assert tensors(again) == tensors(one), key


def test_final_is_what_the_hub_has_and_transformers_reads(bench: Bench, solo: dict, spread: dict) -> None:
    for model in CONFIGS:
        spreads = [spread[key][0] for engine in SHARDED if (key := (engine, model, "full")) in spread]
        runs = [solo[model, "full"], *spreads]
        with safe_open(bench.folder / model / "model.safetensors", framework="pt") as base:
            layout = {name: base.get_tensor(name).shape for name in base.keys()}  # noqa: SIM118
        assert EXPERT[model] in layout, "what transformers itself saves"
        states = []
        for one in runs:
            with safe_open(one.folder / "final/model.safetensors", framework="pt") as file:
                assert {name: file.get_tensor(name).shape for name in file.keys()} == layout  # noqa: SIM118
            lm, report = AutoModelForCausalLM.from_pretrained(
                one.folder / "final", output_loading_info=True, dtype=torch.float32
            )
            assert not report["missing_keys"] | report["unexpected_keys"] | report["mismatched_keys"], report
            states.append(lm.state_dict())
        start = AutoModelForCausalLM.from_pretrained(bench.folder / model, dtype=torch.float32).state_dict()
        for name, value in states[0].items():
            assert not torch.equal(value, start[name]), (model, name, "trained")
            for other in states[1:]:
                torch.testing.assert_close(other[name], value, rtol=1e-3, atol=2e-5)


def test_adapters_are_peft_s(bench: Bench, solo: dict) -> None:
    """Plain PEFT on plain transformers computes what was trained: the last evaluation's loss is checked by logits."""
    ids = torch.arange(3, 40)[None]
    for model in CONFIGS:
        final = solo[model, "lora"].folder / "final"
        base = AutoModelForCausalLM.from_pretrained(
            bench.folder / model, dtype=torch.float32, attn_implementation="eager"
        )
        with torch.no_grad():
            before = base(ids, use_cache=False).logits
            adapted = PeftModel.from_pretrained(base, final)
            after = adapted(ids, use_cache=False).logits
            merged = adapted.merge_and_unload()(ids, use_cache=False).logits
        assert (after - before).abs().max() > 1e-3, model
        torch.testing.assert_close(merged, after, rtol=1e-4, atol=1e-4)
        config = json.loads((final / "adapter_config.json").read_text())
        assert {name.rpartition(".")[2] for name in config["target_parameters"]} >= {"gate_up_proj", "down_proj"}


@pytest.mark.slow
def test_no_rank_holds_the_model_while_it_loads(tmp_path: Path) -> None:
    sizes = SIZES | {"num_hidden_layers": 8, "hidden_size": 256}
    config = Qwen3MoeConfig(**sizes, head_dim=64, num_experts=8, moe_intermediate_size=512, intermediate_size=96)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "deep")
    for engine in SHARDED:
        out = tmp_path / engine
        worker = [str(ROOT / "tests/dist/memory_worker.py"), engine, str(tmp_path / "deep"), str(out), "2"]
        done = run([*torchrun(2), *worker], MALLOC_MMAP_THRESHOLD_="65536")  # what is freed goes back at once
        assert done.returncode == 0, done.stderr[-3000:]
        for rank in range(2):
            facts = json.loads(Path(f"{out}.{rank}").read_text())
            assert facts["whole"] > 90e6, "large beside what libraries allocate"
            assert facts["peak"] <= facts["whole"] / 2 + facts["largest_unit"], facts
            # The shard and the block that is filled; 3 MB for what libraries allocate meanwhile, whatever the size.
            assert facts["host_peak"] <= facts["whole"] / 2 + facts["largest_unit"] + 3e6, facts
