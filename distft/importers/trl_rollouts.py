"""What `trl grpo --config FILE` adds to TRL's keys: how answers are written and rewarded, and learned from."""

from __future__ import annotations

from typing import Any

from distft.importers.conversion import Conversion
from distft.importers.keys import carried, group, left, refused, table
from distft.importers.section import Section

LOSSES = {"dapo": "dapo", "grpo": "grpo", "dr_grpo": "dr_grpo", "cispo": "cispo"}
"""TRL's `loss_type` -> [objective] loss; gspo is the importance sampling of sequences."""
PROMPT_TOKENS = 512
"""Longest prompt that the length of a group is reckoned with where the file has none."""
THEIR_REWARDS = ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward")


ROLLOUT_KEYS = {
    **table(
        reward_funcs=carried(
            "[rollout] rewards",
            "each is called unchanged, by the score trl_function; its None is an answer without reward",
        ),
        reward_weights=carried("[rollout] rewards weight"),
        reward_model_name_or_path=carried("[rollout] rewards", "the score reward_model"),
        num_generations=carried("[rollout] answers_per_prompt"),
        temperature=carried("[rollout] temperature"),
        top_p=carried("[rollout] top_p", "log-probabilities are those of all tokens here and there"),
        num_iterations=carried("[rollout] updates"),
        mask_truncated_completions=carried("[rollout] mask_truncated"),
        epsilon=carried("[objective] clip_low", "and clip_high, where epsilon_high is not set"),
        epsilon_high=carried("[objective] clip_high"),
        scale_rewards=carried("[objective] scale", "true is group, false is none"),
        importance_sampling_level=carried("[objective] loss", "sequence is gspo"),
        use_bias_correction_kl=carried("[objective] unbiased_kl"),
        use_vllm=carried("[rollout] generator", "a server of its own; beside the trainer there"),
        vllm_server_base_url=carried("[rollout] generator url"),
        vllm_importance_sampling_correction=carried("[objective] correction"),
        vllm_importance_sampling_mode=carried("[objective] correction, correction_outside"),
        vllm_importance_sampling_clip_max=carried("[objective] correction_cap"),
        vllm_importance_sampling_clip_min=carried("[objective] correction_floor"),
        steps_per_generation=refused("one step is taken on a batch of answers: remove it, or set num_iterations"),
        generation_batch_size=refused("one step is taken on a batch of answers: remove it, or set num_iterations"),
        top_k=refused("answers are drawn by top_p alone: remove it", off=(None, 0, -1)),
        min_p=refused("answers are drawn by top_p alone: remove it"),
        repetition_penalty=refused("answers are drawn without penalties: remove it", off=(None, 1, 1.0)),
        generation_kwargs=refused("temperature, top_p and stop are what draws have: remove it"),
        delta=refused("a second bound of the ratio is another loss, which is not here: remove it"),
        multi_objective_aggregation=refused(
            "rewards are summed, then compared: remove it", off=(None, "sum_then_normalize")
        ),
        top_entropy_quantile=refused("all tokens of an answer are trained: remove it", off=(None, 1, 1.0)),
        entropy_coef=refused("there is no bonus for entropy: remove it", off=(None, 0, 0.0)),
        use_adaptive_entropy=refused("there is no bonus for entropy: remove it"),
        off_policy_mask_threshold=refused("answers are masked by correction_outside alone: remove it"),
        vllm_structured_outputs_regex=refused("a reward can ask for a form (the score regex); answers are free"),
        max_tool_calling_iterations=refused("answers are one turn: remove it"),
        environment_factory=refused("answers are one turn: remove it"),
        chat_template_kwargs=refused("a template gets the messages alone: remove it"),
        router_aux_loss_coef=refused(
            "is [train] router_aux here, and off for answers: remove it", off=(None, 0.001, 0)
        ),
    ),
    **group(
        "sapo_temperature_neg sapo_temperature_pos vespo_k_pos vespo_lambda_pos vespo_k_neg vespo_lambda_neg "
        "entropy_coef_min entropy_coef_max entropy_coef_delta entropy_target",
        left("belongs to a loss that is not here"),
    ),
    **group(
        "vllm_mode vllm_model_impl vllm_enable_sleep_mode vllm_server_host vllm_server_port vllm_server_timeout "
        "vllm_group_port vllm_gpu_memory_utilization vllm_max_model_length vllm_tensor_parallel_size "
        "ds3_gather_for_generation cache_implementation use_transformers_continuous_batching "
        "transformers_continuous_batching_config use_transformers_paged",
        left("how the server is started, or how answers are written, changes none of them"),
    ),
    **group(
        "log_completions log_multimodal num_completions_to_print log_unique_prompts log_completions_hub_repo",
        left("every answer is in the run's rollouts, and on its page"),
    ),
    **table(
        num_generations_eval=left("held-out prompts get one answer"),
        cast_lm_head_to_fp32=left("log-probabilities are computed in fp32"),
        remove_unused_columns=left("all columns go to the rewards"),
    ),
}


def set_rollouts(work: Conversion, top: Section) -> None:
    """Set [objective] grpo and [rollout]."""
    loss = _loss(top)
    if loss is not None and work.part("objective", "grpo", top, "loss_type", "GRPO"):
        work.draft.set("objective.name", "grpo")
        origin = "importance_sampling_level" if loss == "gspo" else "loss_type"
        work.set("objective.loss", loss, (top, origin))
    low = top.number("epsilon", 0.2)
    work.set("objective.clip_low", low, (top, "epsilon"))
    high = top.number("epsilon_high", low)
    work.set("objective.clip_high", high, (top, "epsilon_high" if top.has("epsilon_high") else "epsilon"))
    work.set("objective.beta", top.number("beta", 0.0), (top, "beta"))
    work.set("objective.scale", _scale(top), (top, "scale_rewards"))
    if top.has("use_bias_correction_kl"):
        work.set("objective.unbiased_kl", top.flag("use_bias_correction_kl", True), (top, "use_bias_correction_kl"))
    work.set("rollout.answers_per_prompt", top.whole("num_generations", 8, least=2), (top, "num_generations"))
    work.set("rollout.max_new_tokens", top.whole("max_completion_length", 512, least=1), (top, "max_completion_length"))
    work.set("rollout.temperature", top.number("temperature", 1.0), (top, "temperature"))
    if top.has("top_p"):
        work.set("rollout.top_p", top.number("top_p"), (top, "top_p"))
    if top.has("num_iterations"):
        work.set("rollout.updates", top.whole("num_iterations", 1, least=1), (top, "num_iterations"))
    if top.has("mask_truncated_completions"):
        truncated = top.flag("mask_truncated_completions")
        work.set("rollout.mask_truncated", truncated, (top, "mask_truncated_completions"))
    _set_generator(work, top)
    _set_rewards(work, top)


def set_group_length(work: Conversion, top: Section) -> None:
    """Set [data] max_length: the answers to a prompt, each behind it, are one row of a batch here; no dropout."""
    if work.draft.get("method.dropout") and not top.has("lora_dropout"):
        why = "TRL's default is 0.05, which answers are written without"
        work.draft.set("method.dropout", 0.0, note=why)
    answers = work.draft.get("rollout.answers_per_prompt") or 8
    longest = work.draft.get("rollout.max_new_tokens") or 512
    prompt = top.whole("max_prompt_length", PROMPT_TOKENS, least=1) or PROMPT_TOKENS
    said = "" if top.has("max_prompt_length") else "which the file does not limit; "
    note = f"{answers} answers of {longest} tokens, each behind its prompt ({said}{prompt} here)"
    origin = top.path("max_prompt_length") if top.has("max_prompt_length") else ()
    work.draft.set("data.max_length", answers * (prompt + longest), origin=origin, note=note)
    work.draft.set("data.packing", False)


def set_prompt_batches(work: Conversion, top: Section) -> None:
    """Turn the global batch, which TRL counts in answers, into prompts."""
    answers, count = work.draft.get("rollout.answers_per_prompt") or 8, work.draft.get("train.global_batch_size")
    if not isinstance(count, int):
        return
    if count % answers:
        key = "per_device_train_batch_size"
        fix = f"num_generations is {answers}; state the GPUs by --gpus N where they make it one"
        top.reading.problem(
            top.path(key) if top.has(key) else (), f"{count} answers a step are no multiple of those to a prompt", fix
        )
        return
    note = f"prompts per optimizer step: TRL counts their answers, {count} = {count // answers} x {answers}"
    work.draft.set("train.global_batch_size", count // answers, note=note)
    work.draft.set("train.micro_batch_size", 1, note="a prompt with its answers; 8 answers there unless set")


def _loss(top: Section) -> str | None:
    level = top.text("importance_sampling_level", "token", allowed=("token", "sequence"))
    named = top.text("loss_type", "dapo") or "dapo"
    if level == "sequence":
        if named == "grpo":
            return "gspo"
        top.problem("importance_sampling_level", "is GSPO with loss_type: grpo alone here", "set loss_type: grpo")
        return None
    if named not in LOSSES:
        top.problem("loss_type", f"loss {named} is not trained here", f"losses of grpo here: {', '.join(LOSSES)}, gspo")
        return None
    return LOSSES[named]


def _scale(top: Section) -> str | None:
    value = top.raw("scale_rewards") if top.has("scale_rewards") else "group"
    if isinstance(value, bool):
        return "group" if value else "none"
    return top.text("scale_rewards", "group", allowed=("group", "batch", "none"))


def _set_generator(work: Conversion, top: Section) -> None:
    if not top.flag("use_vllm"):
        return
    generator: dict[str, Any] = {"name": "vllm"}
    if top.has("vllm_server_base_url"):
        generator["url"] = (top.text("vllm_server_base_url") or "").rstrip("/")
    note = "start the server by hand (docs/guide.md)"
    work.set("rollout.generator", generator, (top, "use_vllm"), note)
    if not top.flag("vllm_importance_sampling_correction", True):
        return
    mode = top.text(
        "vllm_importance_sampling_mode", "sequence_mask",
        allowed=("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
    ) or "sequence_mask"  # fmt: skip
    unit, _, outside = mode.partition("_")
    work.set("objective.correction", unit, (top, "vllm_importance_sampling_mode"))
    work.set("objective.correction_outside", outside, (top, "vllm_importance_sampling_mode"))
    cap = top.number("vllm_importance_sampling_clip_max", 3.0)
    work.set("objective.correction_cap", cap, (top, "vllm_importance_sampling_clip_max"))
    if top.has("vllm_importance_sampling_clip_min"):
        floor = top.number("vllm_importance_sampling_clip_min")
        work.set("objective.correction_floor", floor, (top, "vllm_importance_sampling_clip_min"))


def _set_rewards(work: Conversion, top: Section) -> None:
    rewards: list[dict[str, Any]] = []
    model = top.text("reward_model_name_or_path") if top.has("reward_model_name_or_path") else None
    if model is not None:
        rewards.append({"name": "reward_model", "path": model})
    for name in top.texts("reward_funcs"):
        if name in THEIR_REWARDS:
            rewards.append({"name": "trl_function", "function": f"trl.rewards:{name}"})
        elif "." in name:
            module, _, function = name.rpartition(".")
            rewards.append({"name": "trl_function", "function": f"{module}:{function}"})
        else:
            fix = f"known: {', '.join(THEIR_REWARDS)}, or a dotted path; length is a reward of a function of yours"
            top.problem("reward_funcs", f"{name} is not taken over", fix)
    if not rewards and not top.has("reward_funcs"):
        top.reading.problem((), "there is no reward", "add reward_funcs or reward_model_name_or_path")
    weights = top.raw("reward_weights") if top.has("reward_weights") else None
    if weights is not None:
        if not isinstance(weights, list) or len(weights) != len(rewards):
            top.problem("reward_weights", f"must have a number for each of the {len(rewards)} rewards")
            return
        for reward, weight in zip(rewards, weights, strict=True):
            reward["weight"] = float(weight)
    if rewards:
        origin = top.path("reward_funcs") if top.has("reward_funcs") else top.path("reward_model_name_or_path")
        work.draft.set("rollout.rewards", rewards, origin=origin, note="functions must be importable: PYTHONPATH")
