"""Mistakes in [method], of those that train a little: the message, and the line it names."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config, LlamaConfig

from distft.catalog import REGISTRIES
from distft.compatibility import refuse_misfits
from distft.core.errors import RecipeError
from distft.demo.files import locate_path
from distft.recipe import parse_recipe
from distft.trained_counts import trained_counts

MARK = "# <-"
BASE = """\
name = "run"
[model]
path = "FOLDER/llama"
[data]
cache_dir = "FOLDER/cache"
[[data.train]]
path = "train.jsonl"
"""

READ = {
    "a type of PEFT's is missing": ('[method] # <-\nname = "peft"', "[method] type  is required"),
    "a type that PEFT does not have": (
        '[method]\nname = "peft"\ntype = "HRAA" # <-',
        'did you mean "HRA"?',
        "it has BEFT, BOFT",
    ),
    "a type that is not trained": (
        '[method]\nname = "peft"\ntype = "OSF" # <-',
        "OSF is not trained here: it starts from",
    ),
    "a type with a method of its own": (
        '[method]\nname = "peft"\ntype = "IA3" # <-',
        'has a method of its own: name = "ia3"',
    ),
    "a field that a type does not have": (
        '[method]\nname = "peft"\ntype = "HRA"\nrr = 4 # <-',
        'unknown key, did you mean "r"?',
    ),
    "a field of another type": (
        '[method]\nname = "peft"\ntype = "HRA"\nr = "4" # <-',
        "must be a whole number  without quotes: 4",
    ),
    "a type that fails beside 4 bits": (
        '[method]\nname = "peft"\ntype = "HRA"\nquant = {} # <-',
        "quant: HRA has not been seen to train rightly beside 4 bits",
    ),
    "PiSSA on 4 bits": (
        '[method]\nname = "qlora"\ninit = "pissa" # <-',
        'changes the base, and 4 bits round it anew: use "loftq"',
    ),
    "LoftQ without 4 bits": (
        '[method]\nname = "lora"\ninit = "loftq" # <-',
        'starts from what 4 bits lose: name = "qlora"',
    ),
    "an odd rank cut in halves": ('[method]\nname = "lora"\nr = 5 # <-\ninit = "orthogonal"', "takes even ranks"),
    "an init that there is not": ('[method]\nname = "lora"\ninit = "pisa" # <-', 'did you mean "pissa"?'),
    "a start and a beginning": (
        '[method]\nname = "lora"\nstart = "runs/a" # <-\ninit = "olora"',
        "start goes on from an adapter, and init begins one",
    ),
    "a network that was not saved": (
        '[method]\nname = "p_tuning"\nstart = "runs/a" # <-',
        'what is saved is not the network; go on with name = "prompt_tuning"',
    ),
    "a projection that was not saved": (
        '[method]\nname = "prefix_tuning"\nstart = "runs/a" # <-\nprefix_projection = true',
        "a saved prefix holds keys and values",
    ),
    "a width of no network": (
        '[method]\nname = "prefix_tuning"\nencoder_hidden_size = 64 # <-',
        "is of the network of prefix_projection = true",
    ),
    "no virtual token": (
        '[method]\nname = "prompt_tuning"\nnum_virtual_tokens = 0 # <-',
        "must be a whole number >= 1",
    ),
    "text that nothing starts from": (
        '[method]\nname = "prompt_tuning"\ninit_text = "say it" # <-',
        'init = "text" and init_text = "..." belong together',
    ),
    "nothing that is not frozen": ('[method] # <-\nname = "freeze"', "nothing is trained: set last_blocks, parameters"),
    "an expression that is none": (
        '[method]\nname = "freeze"\nparameters = ["(q"] # <-',
        '"(q" is no regular expression: missing ), unterminated subpattern',
    ),
    "a vector of a layer that has none": (
        '[method]\nname = "ia3"\ntarget_modules = ["k_proj"] # <-\nfeedforward_modules = ["down_proj"]',
        "feedforward_modules names down_proj, which target_modules does not name",
    ),
    "a place that there is not": (
        '[method]\nname = "bottleneck"\nplacement = "parallelly" # <-',
        'did you mean "parallel"?',
    ),
    "a rank of nothing": (
        '[method]\nname = "lora"\nrank_pattern = { down_proj = 0 } # <-',
        "down_proj = 0 is no rank: from 1 on",
    ),
    "a token that is named twice": (
        '[method]\nname = "full"\n[model]\nadd_tokens = ["<a>", "<a>"] # <-',
        '"<a>" is named twice',
    ),
    "no token": (
        '[method]\nname = "full"\n[model]\nadd_special_tokens = [" "] # <-',
        '" " is no text for a token',
    ),
    "rows of no tokens": (
        '[method]\nname = "full"\n[model]\nnew_rows = "mean" # <-',
        'new_rows = "mean"  has no effect: no tokens are added',
    ),
    "padding that PEFT does not make": (
        '[method]\nname = "lora"\n[model]\nadd_tokens = ["<a>"]\npad_vocabulary = 64 # <-',
        "has no effect under adapters",
    ),
    "experts that are meant already": (
        '[method]\nname = "lora"\ntarget_parameters = ["experts.down_proj"] # <-',
        'target_modules = "all-linear" means every expert tensor already',
    ),
    "ranks that nothing takes away": (
        '[method]\nname = "adalora"\ntarget_r = 12 # <-',
        "target_r: 12 is not less than init_r = 12: nothing is allocated",
    ),
    "dropout that a merged weight has not": (
        '[method]\nname = "lora"\ndeploy = "q4_0" # <-\ndropout = 0.1',
        "deploy: rounds W + BA in every forward, which dropout does not leave as a sum",
    ),
    "a format that there is not": (
        '[method]\nname = "lora"\ndeploy = "q4_k" # <-',
        'did you mean "q4_0"?',
    ),
    "another code than is stored": (
        '[method]\nname = "qlora"\ndeploy = "nf4" # <-\nquant = { type = "fp4" }',
        "constants that are quantised too",
    ),
    "an adapter that acts behind some tokens": (
        '[method]\nname = "lora"\nalora_invocation_tokens = [1] # <-',
        "aLoRA acts behind its last invocation in a row, which packed documents are not",
    ),
    "settings of a start that is another": (
        '[method]\nname = "lora"\nr = 4\neva = { rho = 2.0 } # <-',
        'has no effect without init = "eva"',
    ),
    "ranks that rows give, and a pattern": (
        '[method]\nname = "lora"\ninit = "eva" # <-\nrank_pattern = { q_proj = 4 }',
        "lets layers with equal inputs exchange ranks that differ",
    ),
    "no rate": ('[method]\nname = "lora"\nlora_plus_ratio = 0 # <-', "must be a number > 0"),
}
"""Told when the recipe is read."""

COUNTED = {
    "a block that there is not": (
        '[method]\nname = "lora"\nlayers_to_transform = [5] # <-',
        "layers_to_transform: 5 is no block of the model  it has blocks 0 to 1",
    ),
    "a pattern that fits nothing": (
        '[method]\nname = "lora"\nrank_pattern = { down = 4 } # <-',
        'rank_pattern: "down" fits no layer that gets an adapter',
    ),
    "a rank above the layer's": (
        '[method]\nname = "lora"\nr = 512 # <-\ninit = "pissa"',
        "has a rank of 64  set r = 64 or less",
    ),
    "parameters that fit nothing": (
        '[method]\nname = "freeze"\nparameters = ["q_prj.weight"] # <-',
        "fits no parameter of the model  it must fit a whole name; did you mean '.*q_proj.weight'?",
    ),
    "more blocks than there are": (
        '[method]\nname = "freeze"\nlast_blocks = 3 # <-',
        "last_blocks = 3: the model has 2 blocks",
    ),
    "biases of a model without": (
        '[method]\nname = "freeze"\nbiases = true # <-',
        "biases = true: the model has no biases",
    ),
    "a size that does not divide": (
        '[method]\nname = "peft" # <-\ntype = "C3A"\nblock_size = 48',
        "PEFT: The block size should be a factor of the input size",
    ),
    "no adapter to go on from": (
        '[method]\nname = "lora"\nstart = "FOLDER/cache" # <-',
        "holds no adapter_config.json, nor does a final/ in it",
    ),
    "a token that there is already": (
        '[method]\nname = "lora"\n[model]\nadd_tokens = ["<b>", "login"] # <-',
        'add_tokens: the tokenizer has "login" already, as token',
    ),
    "rows that nothing trains": (
        '[method]\nname = "oft"\n[model]\nadd_tokens = ["<b>"] # <-',
        "under this method the rows of new tokens would not be trained",
    ),
    "a token that there is not": (
        '[method]\nname = "lora"\ntrainable_tokens = ["disk"] # <-',
        '"disk" is no token of the tokenizer',
    ),
    "rows that a format does not cut": (
        '[method]\nname = "lora"\ndeploy = "int4" # <-',
        '"int4" stores 128 numbers of a row together',
        'allowed: "q8_0", "q4_0", "nf4"',
    ),
    "an expression that fits nothing": (
        '[method]\nname = "lora"\ntarget_modules = ".*q_prj" # <-',
        "fits no module of the model: it must fit a whole name",
        "did you mean",
    ),
    "a layer that there is not": (
        '[method]\nname = "qlora"\ntarget_modules = ["q_proj", "v_prj"] # <-',
        '"v_prj" is no module of the model  did you mean "v_proj"',
    ),
    "experts that there are not": (
        '[method]\nname = "lora"\ntarget_modules = ["q_proj"]\ntarget_parameters = ["experts.down_proj"] # <-',
        "is no weight of all experts in one tensor in this model  it has none: name its layers",
    ),
    "a penalty that preferences have no place for": (
        '[method]\nname = "adalora" # <-\n[objective]\nname = "dpo"',
        '"adalora" adds to the loss of tokens, which objective "dpo" has not',
    ),
    "an adapter of another base": (
        '[method]\nname = "lora"\nstart = "FOLDER/adapter" # <-',
        "start: it was trained on /another/base, and [model] path is",
    ),
}
"""Told when the model without values is looked at."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("mistakes")
    llama: Any = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    llama.save_pretrained(made / "llama")
    GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, architectures=["GPT2LMHeadModel"]).save_pretrained(
        made / "gpt2"
    )
    tokens = Path(locate_path("demo:tiny-llama"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (made / "llama" / name).write_bytes((tokens / name).read_bytes())
    (made / "cache").mkdir()
    (made / "adapter").mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": "/another/base", "r": 16}
    (made / "adapter/adapter_config.json").write_text(json.dumps(config))
    return made


def looked_at(text: str) -> None:
    recipe = parse_recipe(text, source="r.toml", registries=REGISTRIES)
    refuse_misfits(recipe)
    trained_counts(recipe)


def told(folder: Path, text: str) -> list[str]:
    """Read the recipe and look at its model; the one problem, and the line that the mark is in."""
    method, _, model = text.partition("[model]\n")
    text = (BASE.replace("[model]\n", f"[model]\n{model}\n" if model else "[model]\n") + method).replace(
        "FOLDER", str(folder)
    )
    marked = next(number for number, line in enumerate(text.splitlines(), start=1) if MARK in line)
    with pytest.raises(RecipeError) as caught:
        looked_at(text)
    (problem,) = caught.value.problems
    assert problem.line == marked, str(problem)
    assert "pydantic" not in str(problem)
    return [str(problem)]


@pytest.mark.parametrize(
    ("text", "parts"), [pytest.param(text, parts, id=name) for name, (text, *parts) in READ.items()]
)
def test_a_mistake_is_named_when_the_recipe_is_read(folder: Path, text: str, parts: list[str]) -> None:
    [said] = told(folder, text)
    for part in parts:
        assert part in said


@pytest.mark.parametrize(
    ("text", "parts"), [pytest.param(text, parts, id=name) for name, (text, *parts) in COUNTED.items()]
)
def test_a_mistake_is_named_before_anything_runs(folder: Path, text: str, parts: list[str]) -> None:
    [said] = told(folder, text)
    for part in parts:
        assert part in said


def test_vectors_of_another_architecture(folder: Path) -> None:
    """The default of ia3 has Llama's names."""
    text = (BASE + '[method]\nname = "ia3"\n').replace("FOLDER/llama", f"{folder}/gpt2").replace("FOLDER", str(folder))
    with pytest.raises(RecipeError, match='"k_proj" is no module of the model'):
        refuse_misfits(parse_recipe(text, source="r.toml", registries=REGISTRIES))
