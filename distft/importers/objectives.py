"""Objectives on preferences, from what Axolotl, LLaMA-Factory and TRL call them."""

from __future__ import annotations

from dataclasses import dataclass

from distft.importers.conversion import Conversion
from distft.importers.section import Section

IPO = "the mean per token, as in TRL and LLaMA-Factory; others take the sum of tokens"
ORPO = "beta is the paper's lambda; the likelihood is the answer's alone, and a mean over pairs"
SIMPO = "gamma is the paper's: beta x (difference of mean log-probabilities) - gamma"
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
    smoothing = section.number(keys.label_smoothing)
    if smoothing:
        remark = "cDPO's under sigmoid; TRL 1.16 uses it under robust and exo_pair alone" if here == "sigmoid" else ""
        work.set("objective.label_smoothing", smoothing, (section, keys.label_smoothing), remark)
    weight = section.number(keys.sft_weight)
    if weight:
        remark = "weight of the chosen answer's negative log-likelihood per token (RPO)"
        work.set("objective.sft_weight", weight, (section, keys.sft_weight), remark)


def set_orpo(work: Conversion, section: Section, chosen_by: str, keys: PreferenceKeys) -> None:
    """Set [objective] orpo."""
    if work.part("objective", "orpo", section, chosen_by, "ORPO"):
        work.set("objective.name", "orpo", (section, chosen_by), ORPO)
        _set_beta(work, section, keys)


def set_simpo(work: Conversion, section: Section, chosen_by: str, keys: PreferenceKeys, *, likelihood: bool) -> None:
    """Set [objective] simpo; `likelihood`: the tool adds the chosen answer's, as TRL's CPO trainer does."""
    if not work.part("objective", "simpo", section, chosen_by, "SimPO"):
        return
    work.set("objective.name", "simpo", (section, chosen_by))
    _set_beta(work, section, keys)
    work.set("objective.gamma", section.number(keys.gamma, keys.gamma_default), (section, keys.gamma), SIMPO)
    if likelihood:
        weight = section.number(keys.cpo_weight, keys.cpo_weight_default)
        note = "TRL's trainer adds this times the chosen answer's negative log-likelihood; the paper has 0"
        work.set("objective.sft_weight", weight, (section, keys.cpo_weight), note)


def set_cpo(work: Conversion, section: Section, chosen_by: str, keys: PreferenceKeys) -> None:
    """Set [objective] cpo."""
    if not work.part("objective", "cpo", section, chosen_by, "CPO"):
        return
    if section.number(keys.label_smoothing):
        section.problem(keys.label_smoothing, "cpo has no label smoothing here: another loss", "remove it")
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
    work.set("objective.name", name, (section, chosen_by))
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
