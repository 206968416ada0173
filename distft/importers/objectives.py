"""Objectives on preferences, from what Axolotl, LLaMA-Factory and TRL call them."""

from __future__ import annotations

from dataclasses import dataclass

from distft.importers.conversion import Conversion
from distft.importers.section import Section

IPO = "the mean per token, as in TRL and LLaMA-Factory; others take the sum of tokens"
ORPO = "beta is the paper's lambda; the likelihood is the answer's alone, and a mean over pairs"
SIMPO = "gamma is the paper's: beta x (difference of mean log-probabilities) - gamma"
_UNPAIRED_NOTES = {
    "kto": "rewards are measured against the KL of the whole global batch; against a micro-batch's there",
    "bco": "the threshold is that of the global batch; a running mean there, and prompts are not weighed",
}
_DPO_LOSSES = {
    "sigmoid": ("sigmoid", ""),
    "dpo": ("sigmoid", ""),
    "hinge": ("hinge", ""),
    "ipo": ("ipo", IPO),
    "robust": ("robust", ""),
    "exo_pair": ("exo_pair", ""),
    "nca_pair": ("nca_pair", ""),
    "bco_pair": ("bco_pair", "without TRL's running mean of rewards"),
    "sppo_hard": ("sppo_hard", ""),
    "apo_zero": ("apo_zero", ""),
    "apo_down": ("apo_down", ""),
    "discopop": ("discopop", ""),
    "sigmoid_norm": ("sigmoid_norm", ""),
}


@dataclass(frozen=True, kw_only=True)
class PreferenceKeys:
    """What a tool calls the settings of its preference losses, and what they are without them."""

    beta: str
    beta_default: float = 0.1
    label_smoothing: str = "label_smoothing"
    sft_weight: str = "rpo_alpha"
    gamma: str = "simpo_gamma"
    gamma_default: float = 0.5
    cpo_weight: str = "cpo_alpha"
    cpo_weight_default: float = 1.0
    desirable: str = "desirable_weight"
    undesirable: str = "undesirable_weight"


def set_dpo(work: Conversion, section: Section, chosen_by: str, loss: str, keys: PreferenceKeys) -> None:
    """Set [objective] dpo with a loss of a name of TRL's."""
    if loss not in _DPO_LOSSES:
        section.problem(chosen_by, f"loss {loss} is not trained here", f"losses of dpo here: {', '.join(_DPO_LOSSES)}")
        return
    if not work.part("objective", "dpo", section, chosen_by, "DPO"):
        return
    here, note = _DPO_LOSSES[loss]
    work.set("objective.name", "dpo", (section, chosen_by))
    _set_beta(work, section, keys)
    work.set("objective.loss", here, (section, chosen_by), note)
    _set_length_desensitising(work, section)
    smoothing = section.number(keys.label_smoothing)
    if smoothing:
        note = "cDPO's under sigmoid; TRL 1.16 uses it under robust and exo_pair alone" if here == "sigmoid" else ""
        work.set("objective.label_smoothing", smoothing, (section, keys.label_smoothing), note)
    weight = section.number(keys.sft_weight)
    if weight:
        note = "weight of the chosen answer's negative log-likelihood per token (RPO)"
        work.set("objective.sft_weight", weight, (section, keys.sft_weight), note)


def _set_length_desensitising(work: Conversion, section: Section) -> None:
    """Set LD-DPO's weight of the longer answer's further tokens, where dpo has it here."""
    alpha = section.number("ld_alpha")
    if alpha is None:
        return
    if "ld_alpha" in work.registries.objective["dpo"].params.model_fields:
        work.set("objective.ld_alpha", alpha, (section, "ld_alpha"))
    elif alpha != 1:
        section.problem("ld_alpha", "LD-DPO is another loss, which is not here", "remove it")


def dpo_loss(work: Conversion, section: Section, key: str, weights: str, default: str = "sigmoid") -> str:
    """Return the loss that a key names; of a list of sigmoid and sft, the second's weight is RPO's."""
    losses = section.texts(key) or [default]
    if len(losses) == 1:
        return losses[0]
    values = section.raw(weights)
    numbers = [float(value) for value in values if isinstance(value, int | float)] if isinstance(values, list) else []
    if sorted(losses) == ["sft", "sigmoid"] and len(numbers) == 2 and numbers[losses.index("sigmoid")] == 1:
        weight = numbers[losses.index("sft")]
        work.set("objective.sft_weight", weight, (section, weights), "the weight of sft beside sigmoid")
    else:
        section.problem(key, "mixes losses", "one loss, or sigmoid with weight 1 and sft, is trained here")
    return "sigmoid"


def refuse_settings(section: Section, objective: str, *keys: str) -> None:
    """Refuse settings that change a loss, and that an objective does not have here."""
    for key in keys:
        if section.number(key):
            section.problem(key, f"{objective} has no such term here: another loss", "remove it")


def set_orpo(work: Conversion, section: Section, chosen_by: str, keys: PreferenceKeys) -> None:
    """Set [objective] orpo."""
    refuse_settings(section, "orpo", keys.label_smoothing, keys.sft_weight)
    if work.part("objective", "orpo", section, chosen_by, "ORPO"):
        work.set("objective.name", "orpo", (section, chosen_by), ORPO)
        _set_beta(work, section, keys)


def set_simpo(work: Conversion, section: Section, chosen_by: str, keys: PreferenceKeys, *, likelihood: bool) -> None:
    """Set [objective] simpo; `likelihood`: the tool adds the chosen answer's, as TRL's CPO trainer does."""
    refuse_settings(section, "simpo", keys.label_smoothing)
    if not work.part("objective", "simpo", section, chosen_by, "SimPO"):
        return
    work.set("objective.name", "simpo", (section, chosen_by))
    _set_beta(work, section, keys)
    work.set("objective.gamma", section.number(keys.gamma, keys.gamma_default), (section, keys.gamma), SIMPO)
    if likelihood:
        weight = section.number(keys.cpo_weight, keys.cpo_weight_default)
        note = "TRL's trainer adds this times the chosen answer's negative log-likelihood; the paper has 0"
        work.set("objective.sft_weight", weight, (section, keys.cpo_weight), note)
    elif weight := section.number(keys.sft_weight):
        work.set("objective.sft_weight", weight, (section, keys.sft_weight))


def set_cpo(work: Conversion, section: Section, chosen_by: str, keys: PreferenceKeys) -> None:
    """Set [objective] cpo."""
    if not work.part("objective", "cpo", section, chosen_by, "CPO"):
        return
    refuse_settings(section, "cpo", keys.label_smoothing)
    work.set("objective.name", "cpo", (section, chosen_by))
    _set_beta(work, section, keys)
    work.set(
        "objective.sft_weight", section.number(keys.cpo_weight, keys.cpo_weight_default), (section, keys.cpo_weight)
    )


def set_unpaired(
    work: Conversion, section: Section, chosen_by: str, name: str, loss: str, keys: PreferenceKeys
) -> None:
    """Set [objective] kto or bco, where there is one."""
    if not work.part("objective", name, section, chosen_by, name.upper()):
        return
    refuse_settings(section, name, keys.sft_weight)
    work.set("objective.name", name, (section, chosen_by), _UNPAIRED_NOTES[name])
    _set_beta(work, section, keys)
    if name != "kto":
        return
    losses = {"kto": "kto", "apo_zero_unpaired": "apo_zero"}
    if loss not in losses:
        section.problem("loss_type", f"loss {loss} is not trained here", f"known: {', '.join(losses)}")
        return
    if losses[loss] != "kto":
        work.set("objective.loss", losses[loss], (section, "loss_type"))
    for tool_key, ours in ((keys.desirable, "desirable_weight"), (keys.undesirable, "undesirable_weight")):
        value = section.number(tool_key)
        work.set(f"objective.{ours}", value, (section, tool_key))


def set_reward(work: Conversion, section: Section, chosen_by: str, center: str = "center_rewards_coefficient") -> None:
    """Set [objective] reward."""
    if work.part("objective", "reward", section, chosen_by, "a reward model"):
        work.set("objective.name", "reward", (section, chosen_by), "rows' margins are taken where they have some")
        work.set("objective.center", section.number(center) or None, (section, center))


def _set_beta(work: Conversion, section: Section, keys: PreferenceKeys) -> None:
    work.set("objective.beta", section.number(keys.beta, keys.beta_default), (section, keys.beta))
