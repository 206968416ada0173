"""What to choose and why: one table, read by the command, by `docs/choosing.md` and by the test that compares the two.

For each thing to decide the first rule that applies gives the value; what was decided before is in `so_far`. Rules name
the methods that they recommend, because the advice is a recipe; what a method is like they ask its spec.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from distft.advise.preference_rules import PREFERENCE_RULES
from distft.advise.situation import Decided, Rule, Situation, SoFar, always, fewer_than, gives, is_adapter, method_spec
from distft.advise.sources import BIDERMAN, DETTMERS, HU, LLAMA2, REPEATED, SCHULMAN

FEW = 50
BIG = 30e9
_CHARS_PER_TOKEN = 3.0
"""English has about 4, code and other scripts fewer."""
_UNSEEN_TOKENS = 300
"""What a row is taken for that was not looked at."""


def _rank_below(rows: int) -> Callable[[Situation, SoFar], bool]:
    return lambda situation, so_far: is_adapter(so_far) and situation.rows < rows


def _batch(situation: Situation, so_far: SoFar) -> int:
    """Return the largest batch of 8 to 64 that leaves 100 steps, rounded up to a multiple of the GPUs."""
    tokens = _UNSEEN_TOKENS if situation.typical_chars is None else situation.typical_chars / _CHARS_PER_TOKEN
    sequences = situation.rows * so_far["epochs"] * min(1.0, tokens / so_far["max_length"])  # packed
    most = 32 if is_adapter(so_far) else 64
    size = max((size for size in (8, 16, 32, 64) if size <= most and sequences >= 100 * size), default=8)
    return -(-size // situation.world) * situation.world


def _length(situation: Situation, so_far: SoFar) -> int:
    if situation.longest_chars is None:
        return 2048
    return next((size for size in (512, 1024, 2048, 4096) if size >= situation.longest_chars / _CHARS_PER_TOKEN), 8192)


RULES: tuple[Rule, ...] = (
    Rule(
        name="facts-are-retrieved",
        decides="approach",
        says="Facts, and above all facts that change: retrieve them and put them into the prompt.",
        why="Retrieval was consistently better than fine-tuning at adding knowledge; what a model does not know it "
        "learns slowly from fine-tuning, and learns to make things up with it.",
        source="Ovadia et al. 2023, https://arxiv.org/abs/2312.05934; Gekhman et al. 2024, "
        "https://arxiv.org/abs/2405.05904; Lewis et al. 2020, https://arxiv.org/abs/2005.11401",
        when=lambda situation, _: situation.goal == "facts",
        gives=gives("retrieve"),
    ),
    Rule(
        name="few-rows-are-a-prompt",
        decides="approach",
        says=f"Fewer than {FEW} rows: put the best of them into the prompt.",
        why="Examples in the prompt work at once and cost nothing to change; OpenAI's fine-tuning guide sees clear "
        "gains from 50 to 100 rows on.",
        source="Brown et al. 2020, https://arxiv.org/abs/2005.14165; "
        "https://platform.openai.com/docs/guides/fine-tuning",
        when=lambda situation, _: situation.rows < FEW and situation.rows_hold != "prompts",
        gives=gives("prompt"),
    ),
    Rule(
        name="else-fine-tune",
        decides="approach",
        says="Otherwise fine-tune, once the best prompt has been measured on the same held-out rows.",
        why="Form, tone, tasks and skills are behaviour, and behaviour is what a small set of good rows "
        "changes; without the prompt's figures nobody can say that the tuning helped.",
        source="Zhou et al. 2023, LIMA, https://arxiv.org/abs/2305.11206",
        when=always,
        gives=gives("fine-tune"),
    ),
    *PREFERENCE_RULES,
    Rule(
        name="a-domain-wants-all-weights",
        decides="methods",
        says="A domain from much text: train all weights; adapters where that does not fit.",
        why="In continued pretraining on code and mathematics LoRA stayed behind full training, at every rank tried.",
        source=BIDERMAN,
        when=lambda situation, _: situation.goal == "domain" and situation.rows >= 10_000,
        gives=gives(("full", "lora", "qlora")),
    ),
    Rule(
        name="an-adapter-is-enough",
        decides="methods",
        says="Everything else: LoRA; QLoRA where the 16-bit base does not fit.",
        why="On data of instruction-tuning size LoRA reaches what full training reaches, forgets less of what the "
        "model could do, and leaves megabytes to keep instead of gigabytes.",
        source=f"{HU}; {SCHULMAN}; {BIDERMAN}",
        when=always,
        gives=gives(("lora", "qlora")),
    ),
    Rule(
        name="the-method-is-chosen",
        decides="method",
        says="A method that was chosen already (`--method`) stays, and the rules below are for it.",
        why="What a setting does depends on the method: the best rate of adapters is about ten times that of full "
        "training.",
        source=SCHULMAN,
        when=lambda situation, _: situation.method is not None,
        gives=lambda situation, _: situation.method,
    ),
    Rule(
        name="four-bits-when-short-of-memory",
        decides="method",
        says="QLoRA when LoRA does not fit: 4-bit NF4 with double quantisation.",
        why="It matched 16-bit fine-tuning in all comparisons, at a quarter of the base's memory; it is slower, so not "
        "without need.",
        source=DETTMERS,
        when=lambda _, so_far: method_spec(so_far["candidate"]).quantized,
        gives=gives("qlora"),
    ),
    Rule(
        name="the-first-that-fits",
        decides="method",
        says="Of the methods in order of preference the first that fits the GPUs, as `distft plan` counts it.",
        why="What does not fit cannot be better.",
        source="docs/results: planned against measured memory",
        when=always,
        gives=lambda _, so_far: so_far["candidate"],
    ),
    Rule(
        name="all-linear-layers",
        decides="target_modules",
        says="Adapters on every linear layer.",
        why="Attention layers alone fall short of full fine-tuning at any rank; all linear layers match it.",
        source=f"{DETTMERS}; {SCHULMAN}",
        when=lambda _, so_far: is_adapter(so_far),
        gives=gives("all-linear"),
    ),
    Rule(
        name="rank-for-a-domain",
        decides="r",
        says="Rank 128 for a domain.",
        why="The higher the rank, the less LoRA stayed behind in continued pretraining.",
        source=BIDERMAN,
        when=lambda situation, so_far: is_adapter(so_far) and situation.goal == "domain",
        gives=gives(128),
    ),
    Rule(
        name="rank-for-thousands",
        decides="r",
        says="Rank 16 below 10,000 rows.",
        why="On small sets the rank makes no difference that could be measured; the smallest trains fastest.",
        source=f"{DETTMERS}; {HU}",
        when=_rank_below(10_000),
        gives=gives(16),
    ),
    Rule(
        name="rank-for-ten-thousands",
        decides="r",
        says="Rank 32 below 50,000 rows.",
        why="Adapters fall behind when the data holds more than they can, so capacity grows with the rows.",
        source=SCHULMAN,
        when=_rank_below(50_000),
        gives=gives(32),
    ),
    Rule(
        name="rank-for-more",
        decides="r",
        says="Rank 64 from there on.",
        why="As above.",
        source=SCHULMAN,
        when=lambda _, so_far: is_adapter(so_far),
        gives=gives(64),
    ),
    Rule(
        name="alpha-is-twice-the-rank",
        decides="alpha",
        says="alpha = 2 r.",
        why="With alpha / r fixed the best learning rate hardly depends on the rank; 2 did well in comparisons.",
        source=f"{BIDERMAN}; {SCHULMAN}",
        when=lambda _, so_far: is_adapter(so_far),
        gives=lambda _, so_far: 2 * so_far["r"],
    ),
    Rule(
        name="rate-of-adapters-on-big-models",
        decides="learning_rate",
        says="Adapters on 30 billion parameters and more: 1e-4.",
        why="What QLoRA used for 33B and 65B.",
        source=DETTMERS,
        when=lambda situation, so_far: is_adapter(so_far) and (situation.parameters or 0) >= BIG,
        gives=gives(1e-4),
    ),
    Rule(
        name="rate-of-adapters",
        decides="learning_rate",
        says="Adapters: 2e-4.",
        why="About ten times the rate of full training is best for LoRA; 2e-4 is what QLoRA used for 7B and 13B.",
        source=f"{SCHULMAN}; {DETTMERS}",
        when=lambda _, so_far: is_adapter(so_far),
        gives=gives(2e-4),
    ),
    Rule(
        name="rate-of-all-weights",
        decides="learning_rate",
        says="All weights: 2e-5.",
        why="What Llama 2's supervised fine-tuning used, at every size.",
        source=LLAMA2,
        when=always,
        gives=gives(2e-5),
    ),
    Rule(
        name="epochs-below-a-thousand-rows",
        decides="epochs",
        says="4 epochs below 1,000 rows.",
        why="Up to four passes are worth nearly as much as new rows; beyond, the gain fades and memorising starts.",
        source=REPEATED,
        when=fewer_than(1000),
        gives=gives(4),
    ),
    Rule(
        name="epochs-for-thousands",
        decides="epochs",
        says="3 epochs below 10,000 rows.",
        why="As above; QLoRA and Alpaca trained as long on sets of this order.",
        source=f"{REPEATED}; {DETTMERS}",
        when=fewer_than(10_000),
        gives=gives(3),
    ),
    Rule(
        name="epochs-for-ten-thousands",
        decides="epochs",
        says="2 epochs below 50,000 rows.",
        why="What Llama 2 took for its 27,540 rows.",
        source=LLAMA2,
        when=fewer_than(50_000),
        gives=gives(2),
    ),
    Rule(
        name="one-epoch-of-many",
        decides="epochs",
        says="1 epoch from there on.",
        why="New rows are worth more than seen ones; a second pass is for when evaluation still falls at the end.",
        source=REPEATED,
        when=always,
        gives=gives(1),
    ),
    Rule(
        name="batches-that-leave-steps",
        decides="global_batch_size",
        says="The largest batch that leaves 100 steps: 8 to 32 packed sequences for adapters, to 64 for all weights.",
        why="Steps are what trains; and LoRA loses more than full training when batches grow.",
        source=f"{SCHULMAN}; {LLAMA2}",
        when=always,
        gives=_batch,
    ),
    Rule(
        name="paged-moments-beside-four-bits",
        decides="optimizer",
        says="QLoRA: 8-bit paged AdamW.",
        why="Its state moves to host memory when one long batch needs the room.",
        source=f"{DETTMERS}; Dettmers et al. 2021, https://arxiv.org/abs/2110.02861",
        when=lambda _, so_far: method_spec(so_far["method"]).quantized,
        gives=gives("paged_adamw_8bit"),
    ),
    Rule(
        name="adamw",
        decides="optimizer",
        says="Else AdamW.",
        why="What the rates above were found with; an adapter's state is small.",
        source=f"Loshchilov and Hutter 2017, https://arxiv.org/abs/1711.05101; {HU}",
        when=always,
        gives=gives("adamw"),
    ),
    Rule(
        name="length-of-the-longest-row",
        decides="max_length",
        says="Sequences as long as the longest row, 512 to 8,192 tokens; 2,048 when the rows were not looked at.",
        why="Shorter would drop rows; longer costs memory. Rows are packed, so short ones waste nothing.",
        source="Krell et al. 2021, packing without cross-contamination, https://arxiv.org/abs/2107.02027",
        when=always,
        gives=_length,
    ),
)


def decide(situation: Situation, names: tuple[str, ...], so_far: dict[str, Any]) -> list[Decided]:
    """Decide each of `names` by the first rule that applies, if one does; `so_far` is filled in."""
    made = []
    for name in names:
        for rule in RULES:
            if rule.decides == name and rule.when(situation, so_far):
                made.append(Decided(rule=rule, value=rule.gives(situation, so_far)))
                so_far[name] = made[-1].value
                break
    return made
