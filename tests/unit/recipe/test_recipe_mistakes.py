"""Every mistake a recipe can hold: the message, and the line it names."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from distft.core.errors import RecipeError
from distft.recipe import Recipe

Parse = Callable[..., Recipe]
MARK = "# <-"

BASE = """\
name = "run"
[model]
path = "base"
[[data.train]]
path = "train.jsonl"
"""

ADDED = {
    # types and ranges
    "text for a number": (
        '[data]\nmax_length = "2048" # <-',
        '[data] max_length = "2048"  must be a whole number >= 8  without quotes: 2048',
    ),
    "number for text": ("[log]\nwandb = 3 # <-", "must be text", 'in quotes: "3"'),
    "text for a boolean": ('[data]\npacking = "True" # <-', "must be true or false  without quotes: true"),
    "number for a boolean": ("[train]\ncompile = 1 # <-", "[train] compile = 1  must be true or false"),
    "boolean for a number": ("[train]\nepochs = true # <-", "[train] epochs = true  must be a number > 0"),
    "float for an integer": ("[train]\nmax_steps = 1e3 # <-", "must be a whole number >= 1  write 1000"),
    "negative": ("[train]\nglobal_batch_size = -4 # <-", "= -4  must be a whole number >= 1"),
    "zero": ("[train]\nmax_steps = 0 # <-", "must be a whole number >= 1"),
    "below the least": ("[data]\nmax_length = 4 # <-", "must be a whole number >= 8"),
    "a spike's action": (
        '[guard]\nloss_spike = { action = "rolback" } # <-',
        'did you mean "rollback"?',
    ),
    "best without evaluations": (
        "[checkpoint]\nbest = true # <-",
        "[checkpoint] best = true  needs evaluations during training  add a [[data.eval]] source and [eval]",
    ),
    "number or word": ('[train]\nmicro_batch_size = "all" # <-', 'must be a whole number >= 1 or "auto"'),
    "number or off": ("[train]\nmax_grad_norm = 0 # <-", 'must be a number > 0 or "off"'),
    "not finite": ("[train]\nmax_grad_norm = nan # <-", "= nan  must be a finite number"),
    "not finite in an array": ("[optim]\nbetas = [0.9, inf] # <-", "must be a finite number"),
    "beyond 64 bits": ("[train]\nmax_steps = 99999999999999999999 # <-", "does not fit 64 bits"),
    "a date": ("[data]\ncache_dir = 2024-01-31 # <-", "= 2024-01-31  is a date or time", "text needs quotes"),
    "no day of the calendar": (
        '[data]\ndate = "2026-02-31" # <-',
        '[data] date = "2026-02-31"  is no day of the calendar  write it as YYYY-MM-DD',
    ),
    "a date in another notation": ('[data]\ndate = "31.1.2026" # <-', '[data] date = "31.1.2026"  must be text'),
    "what becomes of special tokens": (
        '[data]\nspecial_tokens_in_content = "escap" # <-',
        'did you mean "escape"?',
    ),
    "a zero byte": ('[log]\nwandb = "a\\u0000b" # <-', "holds a character that is not text"),
    "empty text": ('[log]\nwandb = "" # <-', "must be text that is not empty"),
    "deep nesting": ("[log]\nwandb = [[[[[[[[[1]]]]]]]]] # <-", "is nested too deeply"),
    "array of wrong length": ("[optim]\nbetas = [0.9] # <-", "[optim] betas = [0.9]  must be a list of 2 numbers"),
    "array of wrong things": (
        '[method]\nname = "lora"\ntarget_modules = ["q_proj", 3] # <-',
        'target_modules = ["q_proj", 3]  must be "all-linear" or a list of text',
    ),
    "table in an array of numbers": ("[optim]\nbetas = [0.9, { a = 1 }] # <-", "must be a list of 2 numbers"),
    "array over several lines": (
        '[method]\nname = "lora"\nmodules_to_save = [ # <-\n  "lm_head",\n  3,\n]',
        "modules_to_save",
        "must be a list of text",
    ),
    "value for a table": ("[data.train.columns]\nq = 1 # <-", "columns.q = 1  must be text"),
    # words from a list
    "unknown word": (
        '[data]\nloss_on = "asistent" # <-',
        'must be one of "assistant", "completion", "last_turn", "all", did you mean "assistant"?',
    ),
    "number for a word": ("[data]\nlong_rows = 3 # <-", 'must be one of "drop", "truncate", "error"'),
    "array for a word": ('[log]\nconsole = ["rich"] # <-', 'must be one of "auto", "rich", "plain", "off"'),
    # keys and tables
    "unknown key": (
        "[train]\nepoch = 3 # <-",
        '[train] epoch = 3  unknown key, did you mean "epochs"?  allowed: epochs,',
    ),
    "key of another table": ("[train]\nmax_length = 512 # <-", "unknown key here; it belongs to [data]"),
    "key of a chosen table": ("[train]\nlearning_rate = 1e-4 # <-", "unknown key here; it belongs to [optim]"),
    "key of another trainer": (
        "[train]\nper_device_train_batch_size = 2 # <-",
        "unknown key, here it is called [train] micro_batch_size",
    ),
    "unknown table": ('[optimizer] # <-\nname = "adamw"', "[optimizer]  unknown table, did you mean [optim]?"),
    "unknown array of tables": ('[[evals]] # <-\npath = "a"', "unknown table, did you mean [eval]?"),
    "weight of held-out rows": (
        '[[data.eval]]\npath = "valid.jsonl"\nweight = 2.0 # <-',
        "[[data.eval]] weight = 2.0  unknown key here; it belongs to [[data.train]]",
    ),
    "source without path": (
        '[[data.eval]] # <-\nformat = "text"',
        "[[data.eval]] path  is required",
        'path = "train.jsonl"',
    ),
    # chosen parts
    "unknown part": (
        '[optim]\nname = "admaw" # <-',
        '[optim] name = "admaw"  unknown optimizer, did you mean "adamw"?  allowed: adamw, adamw_8bit, adafactor, muon',
    ),
    "unknown part far from all": (
        '[engine]\nname = "megatron" # <-',
        "unknown engine  allowed: auto, solo, ddp, zero3",
    ),
    "part that is no text": ("[schedule]\nname = 3 # <-", "name = 3  unknown schedule  allowed: constant, linear"),
    "parameter of another part": (
        '[method]\nname = "full"\nr = 16 # <-',
        '[method] r = 16  has no effect with name = "full"; it belongs to lora, qlora',
        'remove it, or choose name = "lora"',
    ),
    "parameter of another part, by default": ("[method]\nr = 16 # <-", 'has no effect with name = "full"'),
    "quant under lora": (
        '[method]\nname = "lora"\nquant = { type = "nf4" } # <-',
        'quant = { type = "nf4" }  has no effect with name = "lora"; it belongs to qlora',
    ),
    "unknown parameter": (
        "[optim]\nlearning_rat = 1e-4 # <-",
        'did you mean "learning_rate"?  allowed with name = "adamw": name, learning_rate,',
    ),
    "another trainer's parameter": ("[optim]\nlr = 1e-4 # <-", "here it is called [optim] learning_rate"),
    "parameter out of range": ('[method]\nname = "lora"\ndropout = 1 # <-', "must be a number >= 0 and < 1"),
    "inside an inline table": (
        '[method]\nname = "qlora"\nquant = { type = "nf8" } # <-',
        '[method] quant.type = "nf8"  must be one of "nf4", "fp4", did you mean "nf4"?',
    ),
    "key inside an inline table": (
        '[method]\nname = "qlora"\nquant = { doubl = true } # <-',
        '[method] quant.doubl = true  unknown key, did you mean "double"?  allowed: type, double',
    ),
    "required parameter": ('[optim] # <-\nname = "muon"', "[optim] momentum  is required"),
    "a part's own rule": (
        "[schedule]\nwarmup_ratio = 0.1 # <-\nwarmup_steps = 9",
        "warmup_steps cannot be set together with warmup_ratio",
    ),
    # rules between keys
    "micro-batch": (
        "[train]\nglobal_batch_size = 60\nmicro_batch_size = 8 # <-",
        "micro_batch_size = 8  does not divide global_batch_size = 60  try 4, 5, 6, 10",
    ),
    "epochs and max_steps": (
        "[train]\nepochs = 2\nmax_steps = 9 # <-",
        "max_steps = 9  cannot be set together with epochs",
    ),
    "warm-up without end": (
        "[schedule]\nwarmup_steps = 100 # <-\n[train]\nmax_steps = 100",
        "warmup_steps = 100  is not shorter than the run: max_steps = 100",
    ),
    "weight and share": (
        '[[data.train]]\npath = "b"\nshare = 0.1\nweight = 2.0 # <-',
        "[[data.train]] weight = 2.0  cannot be set together with share",
    ),
    "share beyond one": ('[[data.train]]\npath = "b"\nshare = 1.5 # <-', "share = 1.5  must be a number > 0 and < 1"),
    "only shares": ("share = 0.5 # <-", "leaves no source whose rows give the length of an epoch"),
    "shares without room": (
        '[[data.train]]\npath = "b"\nshare = 0.5\n[[data.train]]\npath = "c"\nshare = 0.5 # <-',
        "brings the shares to 1 of an epoch",
        "must sum to less than 1",
    ),
    "the same source twice": (
        '[[data.train]]\npath = "./train.jsonl" # <-',
        'path = "./train.jsonl"  is already a source of [[data.train]]  to repeat rows set weight',
    ),
    "evaluation on trained rows": ('[[data.eval]]\npath = "train.jsonl" # <-', "is also trained on, in [[data.train]]"),
    "overlap with nothing": ('[data]\noverlap = "error" # <-', "has no effect without a [[data.eval]] source"),
    "evaluation without rows": ("[eval]\nevery_steps = 9 # <-", "has no effect without a [[data.eval]] source"),
    "turns in plain text": (
        'format = "text"\n[data]\nloss_on = "completion" # <-',
        'loss_on = "completion"  cannot be found in rows of format = "text"',
    ),
    "unknown format": (
        'format = "messagess" # <-',
        'unknown format, did you mean "messages"?  allowed: auto, messages,',
    ),
    "unknown template": (
        '[data]\nchat_template = "chatlm" # <-',
        'unknown template, did you mean "chatml"?  allowed: auto, chatml, llama3, plain, or a file ending in .jinja',
    ),
    "optimizer under a flattening engine": (
        '[optim]\nname = "adafactor" # <-\n[engine]\nname = "zero3"',
        'needs whole matrices (rows and columns), but engine "zero3" gives each rank pieces  '
        "allowed: engine solo, ddp, or optimizer adamw, adamw_8bit",
    ),
}
"""What is added to BASE, and parts of the one message; the message names the marked line."""

WHOLE = {
    "no name": (BASE.removeprefix('name = "run"\n'), "name  is required", 'for example: name = "my-run"'),
    "no model": ('name = "a"\n[[data.train]]\npath = "b"\n', "[model] path  is required", 'path = "meta-llama/'),
    "model without path": ('name = "a"\n[model] # <-\n[[data.train]]\npath = "b"\n', "[model] path  is required"),
    "no data": (
        'name = "a"\n[model]\npath = "b"\n',
        "[data] train  is required",
        '[[data.train]] path = "train.jsonl"',
    ),
    "no sources": (
        'name = "a"\n[model]\npath = "b"\n[data]\ntrain = [] # <-',
        "must be a list of tables that is not empty",
    ),
    "sources that are no tables": (
        'name = "a"\n[model]\npath = "b"\n[data]\ntrain = ["x"] # <-',
        "must be a list of tables",
    ),
    "name that escapes": (
        BASE.replace('"run"', '"../run" # <-'),
        'name = "../run"  must be a plain folder name',
        'try "run"',
    ),
    "name with a separator": (BASE.replace('"run"', '"a/b" # <-'), 'try "a-b"'),
    "hidden name": (BASE.replace('"run"', '".run" # <-'), "no dot in front", 'try "run"'),
    "empty name": (BASE.replace('"run"', '"" # <-'), "must be a plain folder name"),
    "long name": (BASE.replace('"run"', f'"{"a" * 101}" # <-'), "up to 100 letters"),
    "key above the tables": ("epochs = 3 # <-\n" + BASE, "epochs = 3  unknown key here; it belongs to [train]"),
    "misspelt top key": (
        "sead = 3 # <-\n" + BASE,
        'did you mean "seed"?  allowed above the tables: name, seed, output_dir',
    ),
    "seed": ("seed = -1 # <-\n" + BASE, "must be a whole number >= 0 and <= 4294967295"),
    "part instead of table": (
        'method = "lora" # <-\n' + BASE,
        'must be a table  write [method] and below it name = "lora"',
    ),
    "value instead of table": ("train = 3 # <-\n" + BASE, "train = 3  must be a table"),
    "text without quotes": ("name = run # <-", "not valid TOML: invalid value  text needs quotes"),
    "no value": ("name = # <-", "not valid TOML: invalid value"),
    "a table twice": (BASE + "[train]\n[train] # <-\n", "[train]", "not valid TOML: cannot declare"),
    "a key twice": (BASE + "[train]\nepochs = 1\nepochs = 2 # <-\n", "not valid TOML: cannot overwrite a value"),
    "open string": (BASE + '[log]\nwandb = """a # <-', "not valid TOML: unterminated string"),
    "open header": (BASE + "[train # <-\n", "not valid TOML: expected ']'"),
}
"""Whole recipes with one mistake; without a mark, the message has no line because the text has none for it."""

CASES = {name: (BASE + text, *parts) for name, (text, *parts) in ADDED.items()} | WHOLE


@pytest.mark.row(32, 38)
@pytest.mark.parametrize(
    ("text", "parts"), [pytest.param(text, parts, id=name) for name, (text, *parts) in CASES.items()]
)
def test_one_mistake_is_named_at_its_line(parse: Parse, text: str, parts: list[str]) -> None:
    marked = [number for number, line in enumerate(text.splitlines(), start=1) if MARK in line]
    with pytest.raises(RecipeError) as caught:
        parse(text)
    (problem,) = caught.value.problems
    assert problem.line == (marked[0] if marked else None)
    for part in parts:
        assert part in str(problem).replace(f" {MARK}", "")
    assert "pydantic" not in str(problem)
    assert "Input should" not in str(problem)


def test_the_whole_message(parse: Parse) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(BASE + '[optim]\nname = "admaw"\n[train]\nepoch = 3\n', "seed=x")
    assert str(caught.value).splitlines() == [
        "r.toml: 3 problems",
        '  line 7   [optim] name = "admaw"  unknown optimizer, did you mean "adamw"?  '
        "allowed: adamw, adamw_8bit, adafactor, muon",
        '  line 9   [train] epoch = 3  unknown key, did you mean "epochs"?  allowed: epochs, max_steps, '
        "global_batch_size, micro_batch_size, max_grad_norm, optimizer_in_backward, activation_checkpointing, "
        "compile, rehearse, "
        "deterministic, load_best",
        "  -        --set seed=x  must be a whole number >= 0 and <= 4294967295",
    ]


@pytest.mark.row(32)
def test_all_mistakes_are_reported_together(parse: Parse) -> None:
    """Also those between keys of tables that have other mistakes, and without echoes of them."""
    text = """\
name = "../x"
started = 2024-01-01
[model]
dtype = "bf16"
[optimizer]
[method]
r = 16
[optim]
name = "adafactor"
betas = "wide"
[data]
packing = "yes"
[[data.train]]
path = "a"
[[data.train]]
format = "messagess"
[[data.eval]]
path = "./a"
[train]
compile = 3
micro_batch_size = 7
[engine]
name = "zero3"
[log]
every = 3
"""
    with pytest.raises(RecipeError) as caught:
        parse(text)
    assert [problem.line for problem in caught.value.problems] == [1, 2, 3, 4, 5, 7, 9, 10, 12, 15, 16, 18, 20, 21, 25]


def test_a_default_in_place_of_a_mistake_breaks_no_rule(parse: Parse) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(BASE + '[train]\nglobal_batch_size = "60"\nmicro_batch_size = 30\n')  # 30 does not divide the default, 64
    assert [problem.line for problem in caught.value.problems] == [7]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.epoch=3", '--set train.epoch=3  unknown key, did you mean "epochs"?'),
        ("train.epochs=many", "--set train.epochs=many  must be a number > 0"),
        ("method={name='lora', rank=3}", "--set method={name='lora', rank=3}: rank  unknown key"),
        ("optim.name=sgd", "--set optim.name=sgd  unknown optimizer"),
        ("epochs", "--set epochs  has no value  write table.key=value"),
        ("=3", "--set =3  is not a key"),
        ("a..b=3", "--set a..b=3  is not a key"),
        ("name.x=3", "--set name.x=3  name is not a table"),
        ("data.train.2.path=x", "data.train has no position 2  it has 1, counted from 0; 1 appends"),
        ("data.train.first.path=x", "data.train has no position first"),
        ("train.max_steps=", "has nothing to remove: the recipe does not set it"),
        ("name=a\nseed", "--set name=a\\nseed  must be a plain folder name"),
        ("log.wandb=\udc80", "holds a character that is not text"),
    ],
)
def test_mistakes_in_overrides(parse: Parse, override: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(BASE, override)
    (problem,) = caught.value.problems
    assert problem.line is None
    assert said in str(problem)
    assert "\n" not in str(problem)
