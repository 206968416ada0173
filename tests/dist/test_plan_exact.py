"""The planner's state bytes per rank are those of running processes: every engine, method, optimizer and type.

One launch for each number of processes; every cell is a model adopted, stepped once and counted on its own tensors.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from harness import ROOT, WHOLE_GRIDS, run_ranks
from plan_kit import note_row
from transformers import GPT2Config, LlamaConfig, Qwen2Config, Qwen3MoeConfig

from distft.demo.files import locate_path
from distft.model.adapters import METHODS
from distft.model.adapters.spec import optimizer_of
from distft.optim import OPTIMIZERS
from distft.plan import inventory, state
from distft.recipe import ModelTable

LLAMA = LlamaConfig(
    vocab_size=515, hidden_size=96, intermediate_size=200, num_hidden_layers=5, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256,
)  # fmt: skip
"""Untied; five blocks, so that the plan repeats one; sizes that three ranks do not divide."""
QWEN = Qwen2Config(
    vocab_size=301, hidden_size=72, intermediate_size=130, num_hidden_layers=4, num_attention_heads=6,
    num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True,
)  # fmt: skip
"""Tied embedding, biases in attention, 1-D tensors of odd sizes."""
ANCHOR = LlamaConfig(
    vocab_size=1024, hidden_size=256, intermediate_size=600, num_hidden_layers=6, num_attention_heads=4,
    max_position_embeddings=256,
)  # fmt: skip
"""4,865,280 parameters: the model whose bytes were measured before there was a planner."""

WORDS = LlamaConfig(
    vocab_size=1024, hidden_size=96, intermediate_size=200, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256,
)  # fmt: skip
TIED_WORDS = LlamaConfig(**(WORDS.to_diff_dict() | {"tie_word_embeddings": True}))
"""With a tokenizer beside them."""
MOE = Qwen3MoeConfig(
    vocab_size=301, hidden_size=72, num_hidden_layers=4, num_attention_heads=6, num_key_value_heads=2, head_dim=16,
    max_position_embeddings=256, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=40, intermediate_size=80,
)  # fmt: skip
"""Experts in fused form: three-dimensional weights, stored in 4 bits under QLoRA, with adapters for each expert."""
GPT2 = GPT2Config(vocab_size=301, n_embd=72, n_layer=3, n_head=6, n_positions=256)
"""Transposed weights (Conv1D)."""

RANK_64 = {"r": 64}  # its matrices have more than 4,096 elements: from there on 8-bit moments are 8-bit
METHOD_PARAMS: dict[str, dict[str, Any]] = {"full": {}, "lora": RANK_64, "qlora": RANK_64}
SHARDED = ("zero1", "zero2", "zero3", "fsdp2")
DTYPES = ("float32", "bfloat16")


def cell(
    model: str,
    engine: str,
    method: str,
    optim: str,
    dtype: str,
    *,
    micros: int = 1,
    table: dict[str, Any] | None = None,
    head: str = "lm",
    **params: Any,
) -> dict[str, Any]:
    """`table`: further keys of [model]."""
    chosen = METHOD_PARAMS.get(method, {}) | params
    more = [*map(str, params.values()), *map(str, (table or {}).values()), *["sums"] * (micros > 1)]
    more += [head] if head != "lm" else []
    return {"name": "/".join([model, engine, method, optim, dtype, *more]), "model": model, "engine": engine,
            "method": method, "optim": optim, "dtype": dtype, "params": chosen, "micros": micros,
            "table": table or {}, "head": head}  # fmt: skip


def grid(model: str, engines: tuple[str, ...], optims: tuple[str, ...], *, every: int = 1) -> list[dict[str, Any]]:
    """Every engine, method and optimizer in both types when the whole grid is asked for.

    Else types in turns, and of a large grid `every` so manieth cell: with 7 or 53, which share no factor with the
    numbers of methods and optimizers, each of those is met with many of the others, and each engine several times.
    """
    trios = [
        (engine, method, optim)
        for engine in engines
        for method in METHOD_PARAMS
        for optim in optims
        if OPTIMIZERS[optim].elementwise or engine in ("solo", "ddp")
    ]
    return [
        cell(model, *trio, dtype)
        for number, trio in enumerate(trios)
        if WHOLE_GRIDS or number % every == 0
        for dtype in (DTYPES if WHOLE_GRIDS else DTYPES[number % 2 :][:1])
    ]


ALL = tuple(OPTIMIZERS)
VARIANTS = [
    cell("llama", engine, "qlora", "adamw_8bit", "bfloat16", **params)
    for engine in ("ddp", *SHARDED)
    for params in ({"quant": {"double": False}}, {"adapter_dtype": "float32"})
    if not (engine == "fsdp2" and "adapter_dtype" in params)  # one type a block, fsdp2 asks
]
LITTLE = [
    cell(model, engine, method, "adamw", dtype, **params)
    for number, (method, params) in enumerate(
        [
            ("prompt_tuning", {"num_virtual_tokens": 5}),
            ("p_tuning", {"num_virtual_tokens": 5, "encoder_hidden_size": 24}),
            ("prefix_tuning", {"num_virtual_tokens": 5}),
            ("prefix_tuning", {"num_virtual_tokens": 5, "prefix_projection": True, "encoder_hidden_size": 24}),
            ("bottleneck", {"size": 7}),
            ("ia3", {}),
            ("vera", {"r": 5}),
            ("oft", {"oft_block_size": 4}),
            ("loha", {"r": 3}),
            ("lokr", {"r": 3}),
            ("freeze", {"last_blocks": 2, "norms": True}),
            ("lora", {"r": 4, "lora_plus_ratio": 16.0, "rank_pattern": {"down_proj": 6}}),
            ("peft", {"type": "BOFT", "boft_block_size": 4}),
        ]
    )
    for model, dtype in (("llama", DTYPES[number % 2]),)
    for engine in ("ddp", *SHARDED)
    if WHOLE_GRIDS or engine in ("zero3", "fsdp2") or method in ("lora", "freeze", "prefix_tuning")
]
"""Methods that train a little; oft's and boft's blocks must divide the inputs of llama's layers."""
ADALORA = {
    world: [
        cell("llama", engine, "adalora", optim, dtype, init_r=9, target_r=5)
        for optim in ("adamw", "lion", "adamw_4bit")
        for dtype in DTYPES
    ]
    for world, engine in ((1, "solo"), (2, "ddp"))
}
"""Importances beside each optimizer's own state."""
TOKENS = [
    cell(model, engine, method, optim, dtype, table=table, r=4, **params)
    for model in ("words", "tied words")
    for engine in ("ddp", *SHARDED)
    for method, optim, dtype in (("lora", "adamw", "float32"), ("lora", "adamw_8bit", "bfloat16"),
                                 ("qlora", "adamw", "bfloat16"))
    for table, params in (({"add_tokens": ["<tool>", "</tool>", "<row>"]}, {}), ({}, {"trainable_tokens": ["<pad>"]}))
]  # fmt: skip
"""Rows of tokens that are trained beside LoRA, in the embedding and in a head of its own."""
SUMS = {
    world: [
        cell(model, engine, method, "adamw", "bfloat16", micros=2)
        for model, methods in (("llama", ("full", "lora")), ("qwen", ("full",)))
        for engine in (("solo",) if world == 1 else ("ddp", *SHARDED))
        for method in methods
    ]
    for world in (1, 2, 3)
}
"""Two micro-batches of a step, whose gradients are added in fp32."""
CRITIC = {
    1: [
        cell("llama", "solo", method, optim, "bfloat16", head="lm_critic")
        for method in ("full", "lora", "qlora")
        for optim in ("adamw", "adamw_8bit", "muon", "galore", "apollo")
    ],
    2: [
        cell("llama", "zero3", "full", "adamw", "bfloat16", head="lm_critic"),
        cell("qwen", "fsdp2", "lora", "adamw", "float32", head="lm_critic"),
        *(
            cell(model, engine, method, "adamw", "bfloat16", micros=micros, head="lm_critic")
            for model in ("llama", "qwen")
            for engine in ("ddp", *SHARDED)
            for method in ("full", "lora", "qlora")
            for micros in (1, 2)
            if (model, engine, method, micros) != ("llama", "zero3", "full", 1)
        ),
    ],
}
"""Beside a critic that is a model of its own."""
CELLS = {
    1: (CRITIC[1] if WHOLE_GRIDS else [])
    + SUMS[1]
    + ADALORA[1][:: 1 if WHOLE_GRIDS else 5]
    + grid("llama", ("solo",), ALL, every=7)
    + grid("qwen", ("solo",), ("adamw", "paged_adamw_8bit", "adafactor"))
    + grid("moe", ("solo",), ("adamw", "adamw_8bit"))
    + grid("gpt2", ("solo",), ("adamw",)),
    2: (CRITIC[2] if WHOLE_GRIDS else CRITIC[2][:2])
    + SUMS[2][:: 1 if WHOLE_GRIDS else 7]
    + ADALORA[2][:: 1 if WHOLE_GRIDS else 5]
    + TOKENS[:: 1 if WHOLE_GRIDS else 17]
    + grid("llama", ("ddp", *SHARDED), ALL, every=53)
    + grid("qwen", ("ddp", *SHARDED), ("adamw_8bit",), every=9)
    + grid("moe", ("ddp", "zero2", "zero3", "fsdp2"), ("adamw", "adamw_8bit"), every=11)
    + grid("gpt2", ("zero3", "fsdp2"), ("adamw",), every=11)
    + grid("anchor", ("zero3", "fsdp2"), ("adamw",), every=5)
    + VARIANTS[:: 1 if WHOLE_GRIDS else 5]
    + LITTLE[:: 1 if WHOLE_GRIDS else 9],
    3: SUMS[3]
    + grid("qwen", SHARDED, ("adamw", "paged_adamw_8bit"), every=11)
    + ([] if WHOLE_GRIDS else [cell("qwen", "zero2", "full", "paged_adamw_8bit", "bfloat16")]),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    named = (("llama", LLAMA), ("qwen", QWEN), ("moe", MOE), ("gpt2", GPT2), ("anchor", ANCHOR), ("words", WORDS),
             ("tied words", TIED_WORDS))  # fmt: skip
    for name, config in named:
        folders[name] = tmp_path_factory.mktemp(name)
        config.architectures = [type(config).__name__.replace("Config", "ForCausalLM")]
        config.save_pretrained(folders[name])
        if "words" in name:
            tokens = Path(locate_path("demo:tiny-llama"))
            for file in ("tokenizer.json", "tokenizer_config.json"):
                (folders[name] / file).write_bytes((tokens / file).read_bytes())
    return folders


@pytest.fixture(
    scope="module",
    params=[2, *(pytest.param(world, marks=() if WHOLE_GRIDS else pytest.mark.slow) for world in (1, 3))],
    ids=lambda world: f"{world}-ranks",
)
def counted(
    request: pytest.FixtureRequest, models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, list[dict[str, dict[str, Any]]]]:
    """(world, what each rank counted, by cell)."""
    world, folder = request.param, tmp_path_factory.mktemp("held")
    listed = [one | {"model": str(models[one["model"]])} for one in CELLS[world]]
    (folder / "cases.json").write_text(json.dumps(listed))
    worker = [str(ROOT / "tests/dist/held_worker.py"), str(folder / "cases.json"), str(folder / "held")]
    run_ranks(world, worker, PYTHONPATH=str(ROOT / "tests/helpers"), timeout_s=1200.0)
    return world, [json.loads((folder / f"held.{rank}").read_text()) for rank in range(world)]


def planned(models: dict[str, Path], one: dict[str, Any], world: int, rank: int, read: dict) -> dict[str, int]:
    key = (one["model"], one["method"], one["dtype"], json.dumps([one["params"], one["table"], one["head"]]))
    method = METHODS[one["method"]]
    params = method.params.model_validate_json(json.dumps(one["params"]))
    if key not in read:
        given = {"path": str(models[one["model"]]), "dtype": one["dtype"], "init": "random"} | one["table"]
        table = ModelTable.model_validate_json(json.dumps(given))
        read[key] = inventory.read(table, models[one["model"]], method, params, head=one["head"])
    optim = optimizer_of(method, params, OPTIMIZERS[one["optim"]])
    sums, settings = one["micros"] > 1, OPTIMIZERS[one["optim"]].params()
    found = state.of_rank(read[key], one["engine"], optim, settings, world=world, rank=rank, fp32_gradients=sums)
    # What zero1's sums are reduced into is made during the last micro-batch only.
    parts = found.gradients if one["engine"] == "zero1" else 0
    return {
        "weights_bytes": found.weights,
        "quant_constants_bytes": found.quant_constants,
        "gradients_bytes": found.gradients,
        "accumulating_bytes": found.accumulating - parts if sums else 0,
        "master_bytes": found.master,
        "optimizer_bytes": found.optimizer,
        "pageable_bytes": found.pageable,
    }


def test_every_cell_on_every_rank(
    models: dict[str, Path], counted: tuple[int, list[dict[str, dict[str, Any]]]]
) -> None:
    world, ranks = counted
    read: dict = {}
    wrong = {}
    for one in CELLS[world]:
        for rank, held in enumerate(ranks):
            plan = planned(models, one, world, rank, read)
            if held[one["name"]] != plan:
                wrong[one["name"], rank] = {"held": held[one["name"]], "planned": plan}
    assert not wrong, f"{len(wrong)} of {world * len(CELLS[world])} differ: {list(wrong.items())[:4]}"
    for name, held in ranks[0].items():
        note_row(f"{name} x {world}", *(held[key] for key in held if key != "accumulating_bytes"))
    # Without tensors of more than 4,096 elements no moment would be 8-bit, and this would test nothing of it.
    moments = {}
    for optim in ("adamw", "adamw_8bit" if world == 2 else "paged_adamw_8bit"):
        name = next(name for name in ranks[0] if f"full/{optim}/" in name)
        moments[optim] = ranks[0][name]["optimizer_bytes"]
    fp32, eight_bit = moments.values()
    assert 0 < eight_bit < 0.4 * fp32


ANCHORS = {
    # weights, constants, master, optimizer, gradients
    ("fsdp2", "float32"): (9730560, 0, 0, 19461120, 9730560),
    ("zero3", "float32"): (9730560, 0, 9730560, 19461120, 9730560),
    ("zero3", "bfloat16"): (4865280, 0, 9730560, 19461120, 4865280),
}


@pytest.mark.parametrize(("engine", "dtype"), ANCHORS)
def test_bytes_that_were_measured_before(models: dict[str, Path], engine: str, dtype: str) -> None:
    figures = planned(models, cell("anchor", engine, "full", "adamw", dtype), 2, 0, {})
    keys = ("weights", "quant_constants", "master", "optimizer", "gradients")
    assert tuple(figures[f"{key}_bytes"] for key in keys) == ANCHORS[engine, dtype]
