"""FLOPs are exact; rates are predictions that must order things rightly and lie near what is published."""

from pathlib import Path

import pytest
from plan_kit import read, recipe_of

from distft.core.accelerators import named
from distft.model import stats
from distft.plan.case import PlanCase, plan
from distft.plan.setup import Machine
from distft.plan.show import details
from distft.plan.speed import Speed

H200 = named("h200-141gb")


def case(model: Path, world: int, *overrides: str, liger: bool = True, nodes: int = 1) -> PlanCase:
    recipe = recipe_of(model, "train.micro_batch_size=1", *overrides)
    return plan(recipe, read(recipe), Machine(gpu=H200, gpus_per_node=world, nodes=nodes), liger=liger)


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_flops_are_those_that_mfu_counts(llama8b: Path, method: str) -> None:
    recipe = recipe_of(llama8b, f'method.name="{method}"')
    inventory = read(recipe)
    planned = case(llama8b, 1, f'method.name="{method}"').speed.flops_per_token
    linears = sum((6.0 if trained else 4.0) * numel for numel, trained in inventory.linears)
    assert planned == linears + 4096 * stats.flops_per_squared_length(inventory.config)


def test_8b_full_is_six_bytes_a_parameter_and_attention(llama8b: Path) -> None:
    no_embedding = 8_030_261_248 - 128256 * 4096
    flops = case(llama8b, 8, 'engine.name="zero3"').speed.flops_per_token
    assert flops == pytest.approx(6 * no_embedding + 7 * 32 * 4096 * 4096, rel=1e-3)


@pytest.mark.parametrize(
    ("overrides", "world", "published", "ceiling"),
    [
        (('engine.name="zero3"', 'train.activation_checkpointing="full"'), 8, 10_471, 12_379),
        (('method.name="lora"', 'train.activation_checkpointing="off"'), 1, 12_473, 23_216),
    ],
)
def test_predictions_lie_between_published_rates_and_the_ceiling(
    llama8b: Path, overrides: tuple[str, ...], world: int, published: float, ceiling: float
) -> None:
    rate = case(llama8b, world, *overrides).speed.tokens_per_s_per_gpu
    assert 0.7 * published < rate < ceiling


def test_what_costs_time_is_slower(llama8b: Path) -> None:
    def rate(*overrides: str, world: int = 8, nodes: int = 1) -> float:
        return case(llama8b, world, *overrides, nodes=nodes).speed.tokens_per_s_per_gpu

    full, off = 'train.activation_checkpointing="full"', 'train.activation_checkpointing="off"'
    zero3 = 'engine.name="zero3"'
    assert rate(zero3, full) < rate(zero3, off)
    assert rate('method.name="qlora"', off) < rate('method.name="lora"', off)
    assert rate(zero3, full, 'engine.offload="all"') < 0.8 * rate(zero3, full)
    assert rate(zero3, full, nodes=8, world=8) <= rate(zero3, full)


def test_hours_follow_steps(llama8b: Path) -> None:
    fast = case(llama8b, 8, 'engine.name="zero3"').speed
    assert fast.hours == pytest.approx(100 * fast.step_s / 3600)
    assert fast.tokens_per_s == pytest.approx(64 * 4096 / fast.step_s)
    assert 0 < fast.mfu < 0.78
    epochs = case(llama8b, 8, 'engine.name="zero3"', "train.max_steps=", "train.epochs=2").speed
    assert epochs.hours is None
    assert epochs.hours_per_billion_tokens == pytest.approx(1e9 / fast.tokens_per_s / 3600)


@pytest.mark.slow
def test_what_an_objective_reads_takes_forwards(llama8b: Path) -> None:
    """A reference is a forward of each micro-batch under adapters, and one pass before full fine-tuning."""

    def objective(name: str, method: str) -> Speed:
        return case(llama8b, 1, f'method.name="{method}"', f'objective.name="{name}"').speed

    supervised, lora, kto = (objective(name, "lora") for name in ("sft", "dpo", "kto"))
    assert supervised.columns_s == 0
    assert 0.2 < lora.columns_s / lora.step_s < 0.4, "a forward beside forward and backward"
    assert kto.columns_s == pytest.approx(3 * lora.columns_s), "KL takes one of the policy and one of the reference"
    assert lora.reference_hours_per_billion_tokens == 0
    full = objective("dpo", "full")
    assert full.columns_s == 0
    assert 0.2 < full.reference_hours_per_billion_tokens / full.hours_per_billion_tokens < 0.5


def test_answers_take_time(llama8b: Path) -> None:
    """Written token by token, each reading all weights; several updates share them; gathering pays most."""

    def rollout(
        *overrides: str, objective: str = "grpo", world: int = 1, engine: str = "ddp", penalty: float | None = 0.0
    ) -> PlanCase:
        beta = "seed=42" if penalty is None else f"objective.beta={penalty}"
        rewards = 'rollout.rewards=[{name="exact_match"}]'
        return case(
            llama8b, world, 'method.name="lora"', f'objective.name="{objective}"', beta, "data.packing=false", rewards,
            "rollout.answers_per_prompt=8", "rollout.max_new_tokens=256", f'engine.name="{engine}"', *overrides,
        )  # fmt: skip

    once = rollout().speed
    answers = 64 * 8
    rows = rollout().memory.rollout.rows
    weights_s = 2 * 8.03e9 / (0.85 * H200.memory_bytes_per_s)  # read once a token
    assert once.rollout_s > -(-answers // rows) * 256 * weights_s * 0.9
    assert once.rollout_s < once.step_s
    assert case(llama8b, 1, 'method.name="lora"').speed.rollout_s == 0
    longer = rollout("rollout.max_new_tokens=448").speed
    assert 1.5 * once.rollout_s < longer.rollout_s
    shared = rollout("rollout.updates=4").speed
    assert once.rollout_s / 4 < shared.rollout_s < once.rollout_s / 2, "a quarter, and log-probabilities measured"
    critic = rollout(objective="ppo").speed
    assert once.rollout_s < critic.rollout_s, "log-probabilities and values are measured for every update"
    assert rollout(world=8, engine="fsdp2").speed.rollout_s > 3 * rollout(world=8).speed.rollout_s
    # The reference: in every update of GRPO; of PPO, whose rewards of tokens hold the penalty, once for all updates.
    each, kept = (rollout("rollout.updates=4", objective=name, penalty=0.1).speed for name in ("grpo", "ppo"))
    assert each.columns_s == pytest.approx(rollout(penalty=0.1).speed.columns_s, rel=1e-6)
    assert kept.columns_s == pytest.approx(each.columns_s / 4, rel=0.01)
    assert any("/ 4 updates" in part.formula for part in kept.parts if part.name.startswith("what the objective reads"))
    # A teacher of the same size: a forward a micro-batch, and its weights, cut in eight, with its head whole.
    alone = rollout(world=8, engine="fsdp2")
    taught = rollout(f'objective.teacher="{llama8b}"', world=8, engine="fsdp2", objective="distill", penalty=None)
    assert taught.speed.columns_s == pytest.approx(
        rollout(world=8, engine="fsdp2", penalty=0.1).speed.columns_s, rel=0.01
    )
    more = {part.name: part.num_bytes for part in taught.memory.parts}
    assert more["teacher"] == pytest.approx(2 * 8_030_261_248 / 8, rel=1e-3)
    assert more["teacher's head"] == 2 * 128_256 * 4096
    assert more["teacher's hidden states"] == 2 * 4096 * taught.setup.tokens * taught.setup.micros_per_step
    grown = taught.memory.phases.steady_step - alone.memory.phases.steady_step
    assert grown > 0.99 * sum(more[name] for name in more if name.startswith("teacher"))
    # Weights of before training, under full fine-tuning.
    kept, without = (rollout('method.name="full"', world=8, engine="zero3", penalty=penalty) for penalty in (0.1, 0.0))
    reference = next(part for part in kept.memory.parts if part.name == "reference")
    assert reference.num_bytes == pytest.approx(2 * 8_030_261_248 / 8, rel=1e-3)
    assert kept.memory.phases.steady_step - without.memory.phases.steady_step > 0.99 * reference.num_bytes
    # A server's cache and time are nobody's here.
    served = rollout('rollout.generator="vllm"', "rollout.updates=4")
    assert served.memory.rollout is None
    assert served.speed.rollout_s == pytest.approx(shared.rollout_s - once.rollout_s / 4, rel=0.01)
    assert "answers: a server writes them" in "\n".join(details(served, price=None, explain=False))
    assert not any("answers" in part.name for part in served.memory.parts)


@pytest.mark.slow
def test_a_critic_of_its_own_is_a_model_more(llama8b: Path) -> None:
    """Weights, masters and moments of its trunk, its forward and backward; answers and a reference do without it."""

    def ppo(critic: str, *overrides: str) -> PlanCase:
        objective = f'objective={{name="ppo", beta=0.1, critic="{critic}"}}'
        return case(
            llama8b, 8, 'method.name="lora"', objective, 'rollout.rewards=[{name="exact_match"}]', "data.packing=false",
            "rollout.answers_per_prompt=8", "rollout.max_new_tokens=256", "rollout.batch_size=4", 'engine.name="fsdp2"',
            'train.activation_checkpointing="full"', "train.micro_batch_size=1", *overrides,
        )  # fmt: skip

    trunk, own = ppo("trunk"), ppo("own")
    products = 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    beside = 128_256 * 4096 + (32 * 2 + 1) * 4096
    flops = 6 * products + 3.5 * 2 * 32 * 4096 * 4096
    assert own.speed.flops_per_token - trunk.speed.flops_per_token == pytest.approx(flops, rel=1e-9)
    for name, item in (("weights", 2), ("master", 4), ("optimizer", 8)):
        more = getattr(own.memory.state, name) - getattr(trunk.memory.state, name)
        assert more == pytest.approx(item * (products + beside) / 8, rel=1e-3), name
    assert own.memory.final == trunk.memory.final
    assert own.memory.activations.saved > 1.9 * trunk.memory.activations.saved
    seconds = [{part.name: part.num_bytes for part in each.speed.parts} for each in (trunk, own)]
    writing, reference, measuring = (
        [next(us for part, us in parts.items() if part.startswith(name)) for parts in seconds]
        for name in ("writing answers", "what the objective reads", "measuring answers")
    )
    assert writing[1] == pytest.approx(writing[0], rel=0.02)
    assert reference[1] == pytest.approx(reference[0], rel=0.1)
    assert 1.6 < measuring[1] / measuring[0] < 2.4
    # What exists between the two backward passes: the critic's gradients, and all that the policy keeps.
    one = ppo("own", "train.global_batch_size=8").memory
    lasting = one.state.weights + one.state.master + one.state.optimizer + one.gathered
    assert one.activations.between > trunk.memory.activations.saved
    assert one.phases.steady_step > lasting + 2 * (products + beside) / 8 + one.activations.between
    kept = ppo("own", 'method.name="full"').memory
    assert next(part for part in kept.parts if part.name == "reference").num_bytes == pytest.approx(
        2 * 8_030_261_248 / 8, rel=1e-3
    )
