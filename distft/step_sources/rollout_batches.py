"""Micro-batches of a rollout's answers, with what the objective reads of each token and answer.

Shape letters: P prompts of a step on all ranks, N answers to each; S supervised tokens of a micro-batch, D its
documents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from distft.core.ranks import on_rank_zero
from distft.step_sources.rollout_files import Rollout, RolloutFiles, TokenFigures
from distft.step_sources.spec import StepSourceInputs

if TYPE_CHECKING:
    from distft.core.types import Batch


@dataclass(frozen=True)
class RolloutBatches:
    """Makes a rank's micro-batches of a step's answers."""

    inputs: StepSourceInputs
    files: RolloutFiles
    rewards: tuple[str, ...]
    """Names of the rewards."""

    def of(self, rollout: Rollout, *, is_new: bool) -> list[Batch]:
        """Collective: return this rank's micro-batches, as many as every other rank's.

        `is_new`: the weights are those that the answers were written with; else what was measured then is read again.
        """
        micros = self._packed(rollout)
        objective = self.inputs.objective
        if self.inputs.rollout.updates == 1 and not objective.values_tokens:
            return micros
        places = self._places(rollout.number, len(rollout.questions))
        if is_new:
            measured = self._measure(rollout, micros, places)
        else:
            measured = on_rank_zero(self.inputs.engine, lambda: self.files.read_measured(rollout.number))
        columns = {"old_logprob_S": measured.logprobs}
        if objective.values_tokens:
            columns |= self._targets(rollout, measured)
        return self._with_columns(micros, places, columns)

    def _places(self, number: int, prompts: int) -> list[list[tuple[int, int]]]:
        """Return (prompt, answer) of each document of this rank's micro-batches; equally many on every rank."""
        inputs, count = self.inputs, self.inputs.rollout.answers_per_prompt
        first, rows = inputs.steps.slice_of_rank(number)
        begins = range(first, first + rows, inputs.steps.micro_batch_size)
        groups = [range(begin, begin + inputs.steps.micro_batch_size) for begin in begins]
        places = [[(p, n) for p in group if p < prompts for n in range(count)] for group in groups]
        if not inputs.single_documents:
            return places
        flat = [[place] for group in places for place in group]
        return flat + [[] for _ in range(rows * count - len(flat))]

    def _packed(self, rollout: Rollout) -> list[Batch]:
        inputs, count = self.inputs, self.inputs.rollout.answers_per_prompt
        first, _ = inputs.steps.slice_of_rank(rollout.number)
        position = (rollout.number * inputs.steps.global_batch_size + first) * count
        batches: list[Batch] = []
        for chosen in self._places(rollout.number, len(rollout.questions)):
            batches.append(self._batch(rollout, chosen, position))
            position += max(1, len(chosen))
        return batches

    def _batch(self, rollout: Rollout, places: Sequence[tuple[int, int]], position: int) -> Batch:
        import numpy as np
        import torch

        from distft.data.batch import pack_documents

        table = self.inputs.rollout
        count = table.answers_per_prompt
        documents, sampler_S = [], []
        for place in places:
            question, answer = rollout.questions[place[0]], rollout.answers[place[0] * count + place[1]]
            counts = bool(rollout.counted_PN[place])
            trained = [False] * len(question.ids) + [counts] * len(answer.ids)
            documents.append(([*question.ids, *answer.ids], trained))
            sampler_S += answer.logprobs if counts else ()
        batch = pack_documents(
            documents,
            group_sizes=(1,) * len(documents),
            sample_ids=tuple(rollout.questions[place[0]].id for place in places),
            position=position,
            max_length=self.inputs.max_length,
        )
        index = tuple(np.array(places, np.int64).reshape(-1, 2).T)
        judged = [rollout.judged[p * count + n] for p, n in places]
        columns: dict[str, Any] = {
            "advantage_D": rollout.advantage_PN[index],
            "counted_D": rollout.counted_PN[index],
            "reward_total_D": np.nan_to_num(rollout.reward_PN[index]),
            "budget_D": table.max_new_tokens * rollout.counted_PN[index],
            "truncated_D": [not rollout.answers[p * count + n].ended for p, n in places],
            "unscored_D": [bool(one.why) for one in judged],
            "equal_D": rollout.equal_P[index[0]],
            "writing_s_D": [rollout.writing_s] * len(places),
            "judging_s_D": [rollout.judging_s] * len(places),
            "sampler_logprob_S": sampler_S,
        }
        if table.refill:
            columns["refilled_D"] = [place[0] in rollout.replaced for place in places]
            columns["written_per_answer_D"] = [rollout.written / len(rollout.answers)] * len(places)
        for part, reward in enumerate(self.rewards):
            columns[f"reward_{reward}_D"] = [one.parts[part] if one.parts else 0.0 for one in judged]
        return replace(
            batch, columns={name: torch.tensor(np.asarray(values, np.float64)) for name, values in columns.items()}
        )

    def _with_columns(
        self,
        micros: Sequence[Batch],
        places: Sequence[Sequence[tuple[int, int]]],
        columns: Mapping[str, Mapping[str, Sequence[float]]],
    ) -> list[Batch]:
        """Return the micro-batches with columns of tokens, given by the number of each answer."""
        import torch

        count, made = self.inputs.rollout.answers_per_prompt, []
        for micro, chosen in zip(micros, places, strict=True):
            added = {
                name: torch.tensor(
                    [value for p, n in chosen for value in by_answer.get(str(p * count + n), ())], dtype=torch.float32
                )
                for name, by_answer in columns.items()
            }
            made.append(replace(micro, columns={**micro.columns, **added}))
        return made

    def _measure(
        self, rollout: Rollout, micros: Sequence[Batch], places: Sequence[Sequence[tuple[int, int]]]
    ) -> TokenFigures:
        """Collective: compute log-probabilities, and a critic's values, of all ranks' answers that count; keep them.

        A start in the middle of the updates has other weights, and may have other ranks.
        """
        import torch

        engine, policy, objective = self.inputs.engine, self.inputs.policy, self.inputs.objective
        count = self.inputs.rollout.answers_per_prompt
        mine = TokenFigures(logprobs={}, reference={}, values={})
        if objective.values_tokens:
            micros = self.inputs.fill(list(micros))  # the reference, where the objective reads one
        with engine.evaluating():
            for micro, chosen in zip(micros, places, strict=True):
                on_device = engine.place(micro)
                computed: dict[str, torch.Tensor] = {}
                if objective.values_tokens:
                    computed["logprobs"], computed["values"] = policy.token_logprobs_and_values(on_device)
                    if "ref_logprob_S" in micro.columns:
                        computed["reference"] = micro.columns["ref_logprob_S"]
                else:
                    computed["logprobs"] = policy.token_logprobs(on_device)
                listed = {name: values.tolist() for name, values in computed.items()}
                begin = 0
                for place in chosen:
                    index = place[0] * count + place[1]
                    end = begin + (len(rollout.answers[index].ids) if rollout.counted_PN[place] else 0)
                    for name, values in listed.items():
                        getattr(mine, name)[str(index)] = values[begin:end]
                    begin = end
        parts = engine.gather(mine)
        whole = TokenFigures(
            logprobs={index: values for part in parts for index, values in part.logprobs.items()},
            reference={index: values for part in parts for index, values in part.reference.items()},
            values={index: values for part in parts for index, values in part.values.items()},
        )
        if engine.rank == 0 and self.inputs.rollout.updates > 1:
            self.files.write_measured(rollout.number, whole)
        return whole

    def _targets(self, rollout: Rollout, measured: TokenFigures) -> dict[str, dict[str, list[float]]]:
        """Return the columns that follow from rewards and a critic's values, by the number of each answer."""
        import numpy as np

        counted = [index for index in range(rollout.counted_PN.size) if rollout.counted_PN.flat[index]]
        names = [str(index) for index in counted]

        def of(by_answer: Mapping[str, Sequence[float]]) -> list[np.ndarray]:
            return [np.array(by_answer[name], np.float64) for name in names]

        advantages, returns = self.inputs.objective.token_targets(
            [float(rollout.reward_PN.flat[index]) for index in counted],
            of(measured.logprobs),
            of(measured.reference) if measured.reference else None,
            of(measured.values),
        )
        columns = {
            "advantage_S": {name: values.tolist() for name, values in zip(names, advantages, strict=True)},
            "return_S": {name: values.tolist() for name, values in zip(names, returns, strict=True)},
            "old_value_S": measured.values,
        }
        return columns | ({"ref_logprob_S": measured.reference} if measured.reference else {})
