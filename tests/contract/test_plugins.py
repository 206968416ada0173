"""Parts from outside, each one spec and one `.add`: an optimizer, methods, objectives, a kind of sample and more.

This file is also the program that registers them and runs the real job: `python test_plugins.py PLAN.json`.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import sys
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from harness import ROOT, Bench, run
from pydantic import Field

import distft
from distft.catalog import REGISTRIES
from distft.core.errors import DistftError
from distft.core.registry import NoParams, Params
from distft.core.types import IGNORE, Batch, LossTerms, Policy, StepReport, TrainState
from distft.data.batch import pack_documents
from distft.data.drafts import RawText
from distft.data.formats import FORMATS
from distft.data.samples import Document, Drafter, FormatSpec, Group, PromptCompletion, text_column
from distft.export import EXPORTS, ExportInputs, ExportSpec
from distft.generation import GENERATORS, GeneratorInputs, GeneratorSpec
from distft.generation.completion import Completion, Prompt, SamplingParams
from distft.generation.engine_generator import engine_generator
from distft.importers import IMPORTERS, ImporterSpec, import_config
from distft.importers.conversion import Conversion
from distft.importers.keys import carried, left, refused, table
from distft.metrics import METRICS, MetricSpec, RunFacts
from distft.model.adapters import METHODS, MethodSpec
from distft.model.adapters.virtual_tokens import VirtualEmbedding
from distft.objectives import OBJECTIVES, ObjectiveSpec, sft
from distft.optim import OPTIMIZERS, OptimizerSpec
from distft.step_sources import STEP_SOURCES, StepSourceInputs, StepSourceSpec

# -- the parts, as somebody else's package would write them ----------------------------------------------------------


class SgdParams(Params):
    learning_rate: float = Field(default=0.1, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    momentum: float = Field(default=0.0, ge=0, lt=1)


SGD = OptimizerSpec(
    name="sgd",
    params=SgdParams,
    build=lambda params, groups: torch.optim.SGD(groups, lr=params.learning_rate, momentum=params.momentum),
)


@dataclass(frozen=True, kw_only=True)
class Exchange(Document):
    """A kind of sample of its own: what is asked, and what is answered to it."""

    q: str
    a: str

    @property
    def is_empty(self) -> bool:
        return not self.a.strip()

    @property
    def question(self) -> str:
        return self.q

    @property
    def answer(self) -> str:
        return self.a

    def write(self, drafter: Drafter) -> list[RawText]:
        return [drafter.raw_text(self.q + self.a, prompt=self.q)]

    def ask(self, drafter: Drafter) -> tuple[str, list[int]]:
        return drafter.ask_raw(self.q)


def convert_qa(row: dict[str, Any]) -> Exchange:
    return Exchange(q=text_column(row, "q"), a=text_column(row, "a"))


QA = FormatSpec(name="qa", needs='"q" and "a"', matches=lambda row: {"q", "a"} <= row.keys(), convert=convert_qa)


def attach_norms(lm: Any, params: NoParams, dtype: torch.dtype) -> Any:
    for name, param in lm.named_parameters():
        param.requires_grad_("norm" in name)
    return lm


NORMS = MethodSpec(name="norms", params=NoParams, attach=attach_norms, owns=lambda name: False)


class VectorsParams(Params):
    target_modules: tuple[str, ...] = ("k_proj", "v_proj")


def attach_vectors(lm: Any, params: VectorsParams, dtype: torch.dtype) -> Any:
    from peft import IA3Config, get_peft_model

    lm.requires_grad_(False)
    wanted = IA3Config(task_type="CAUSAL_LM", target_modules=list(params.target_modules), feedforward_modules=[])
    return get_peft_model(lm, wanted, low_cpu_mem_usage=True, autocast_adapter_dtype=False)


VECTORS = MethodSpec(
    name="vectors",
    params=VectorsParams,
    attach=attach_vectors,
    owns=lambda name: ".ia3_l." in name,
    fresh=lambda name, model, meta, generator: torch.ones(meta.shape),
    base_name=lambda name: name.removeprefix("base_model.model.").replace(".base_layer.", "."),
    adapter=True,
    library="peft",
)


class PromptParams(Params):
    num_virtual_tokens: int = Field(default=4, ge=1)


def attach_prompt(lm: Any, params: PromptParams, dtype: torch.dtype) -> Any:
    lm.requires_grad_(False)
    lm.set_input_embeddings(VirtualEmbedding(lm.get_input_embeddings(), params.num_virtual_tokens, dtype))
    return lm


def save_prompt(lm: Any, folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    from peft import PromptTuningConfig
    from safetensors.torch import save_file

    [prompt] = tensors.values()
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=len(prompt), token_dim=prompt.shape[1])
    config.num_transformer_submodules, config.inference_mode = 1, True
    config.num_attention_heads, config.num_layers = lm.config.num_attention_heads, lm.config.num_hidden_layers
    config.save_pretrained(str(folder))
    save_file({"prompt_embeddings": prompt}, folder / "adapter_model.safetensors")


PROMPT = MethodSpec(
    name="prompt",
    params=PromptParams,
    attach=attach_prompt,
    owns=lambda name: ".virtual." in name,
    fresh=lambda name, model, meta, generator: 0.02 * torch.randn(meta.shape, generator=generator),
    base_name=lambda name: name.replace("embed_tokens.base.", "embed_tokens."),
    adapter=True,
    virtual_tokens=lambda params: params.num_virtual_tokens,
    save_adapter=save_prompt,
)


class FocalParams(Params):
    gamma: float = Field(default=2.0, ge=0)
    """Tokens that are already likely count less: (1 - p) ** gamma. Source: https://arxiv.org/abs/1708.02002"""


def focal_terms(params: FocalParams, policy: Policy, batch: Batch) -> LossTerms:
    logprob_S = policy.token_logprobs(batch)
    loss_sum = (-logprob_S * (1 - torch.exp(logprob_S)) ** params.gamma).sum()
    return LossTerms.of(loss_sum, {"likely": ((logprob_S > -2.0).sum(), batch.num_supervised)})


FOCAL = ObjectiveSpec(
    name="focal", params=FocalParams, denominator=sft.SPEC.denominator, terms=focal_terms, per_token=True
)


def convert_choice(row: dict[str, Any]) -> Group:
    prompt = text_column(row, "q")
    return Group(
        documents=tuple(PromptCompletion(prompt=prompt, completion=text_column(row, name)) for name in ("good", "bad"))
    )


CHOICE = FormatSpec(
    name="choice", needs='"q", "good" and "bad"', matches=lambda row: {"q", "good", "bad"} <= row.keys(),
    convert=convert_choice, group_size=2,
)  # fmt: skip


class MarginParams(Params):
    beta: float = Field(default=0.5, gt=0)


def margin_terms(params: MarginParams, policy: Policy, batch: Batch) -> LossTerms:
    """DPO's loss. Source: https://arxiv.org/abs/2305.18290, equation 7"""
    logprob_D = batch.sum_by_document(policy.token_logprobs(batch))
    gain_D = params.beta * (logprob_D - batch.columns["ref_logprob_D"])
    margin_G = gain_D[0::2] - gain_D[1::2]
    figures = {"accuracy": ((margin_G > 0).sum(), len(margin_G)), "margin": (margin_G.sum(), len(margin_G))}
    return LossTerms.of(-torch.nn.functional.logsigmoid(margin_G).sum(), figures)


MARGIN = ObjectiveSpec(
    name="margin", params=MarginParams, group_size=2, per_token=True, columns=lambda params: ("ref_logprob_D",),
    denominator=lambda params, micros: float(sum(len(micro.group_sizes) for micro in micros)), terms=margin_terms,
)  # fmt: skip


def ranking_terms(params: NoParams, policy: Policy, batch: Batch) -> LossTerms:
    """Bradley-Terry on a scalar head. Source: https://arxiv.org/abs/2203.02155, equation 1"""
    reward_D = policy.scores(batch)
    margin_G = reward_D[0::2] - reward_D[1::2]
    figures = {"accuracy": ((margin_G > 0).sum(), len(margin_G)), "reward": (reward_D.sum(), len(reward_D))}
    return LossTerms.of(-torch.nn.functional.logsigmoid(margin_G).sum(), figures)


RANKING = ObjectiveSpec(
    name="ranking", params=NoParams, head="scalar", group_size=2, denominator=MARGIN.denominator, terms=ranking_terms
)


class NpzParams(Params):
    digits: Literal["float16", "float32"] = "float32"


def write_npz(params: NpzParams, inputs: ExportInputs, folder: Path) -> None:
    gathered = dict(inputs.engine.full_tensors(inputs.prefix + name for name in inputs.shapes))
    if inputs.engine.rank == 0:
        folder.mkdir(parents=True)
        arrays = {name.removeprefix(inputs.prefix): tensor.numpy() for name, tensor in gathered.items()}
        np.savez(folder / "model.npz", **{name: array.astype(params.digits) for name, array in arrays.items()})


NPZ = ExportSpec(
    name="npz", params=NpzParams, write=write_npz,
    refuses=lambda params, method, head: "adapters have no npz" if method.adapter else "",
)  # fmt: skip


class LoudGenerator:
    """The engine's own, asked for its tokens' log-probabilities whatever the caller wants."""

    def __init__(self, params: NoParams, inputs: GeneratorInputs) -> None:
        self.own = engine_generator(inputs)

    def generate(self, prompts: Sequence[Prompt], how: SamplingParams) -> list[Completion] | None:
        return self.own.generate(prompts, replace(how, logprobs=True))


LOUD = GeneratorSpec(name="loud", open=LoudGenerator)


class SampledSteps:
    """Answers the rows' prompts with the model as it is; `advantage_D` is an answer's reward less its group's mean."""

    ANSWERS = 4

    def __init__(self, inputs: StepSourceInputs) -> None:
        self.inputs, self.generator = inputs, inputs.generator("loud")
        self.num_steps, self.samples_in, self.epoch_at = (
            inputs.steps.num_steps,
            inputs.steps.samples_in,
            inputs.steps.epoch_at,
        )

    def from_step(self, step: int) -> Iterator[list[Batch]]:
        for number, micros in enumerate(self.inputs.steps.from_step(step), start=step):
            yield [self.answered(micro, number) for micro in micros]

    def answered(self, micro: Batch, step: int) -> Batch:
        bounds, ids, labels = micro.cu_seqlens.tolist(), micro.input_ids_T.tolist(), micro.labels_T.tolist()
        prompts = []
        for row, (begin, end) in enumerate(itertools.pairwise(bounds)):
            first = next(at for at in range(begin, end) if labels[at] != IGNORE)
            prompts += [
                Prompt(seed_key=f"{step} {micro.position} {row} {answer}", ids=ids[begin : first + 1])
                for answer in range(self.ANSWERS)
            ]
        how = SamplingParams(max_new_tokens=8, temperature=1.0, seed=self.inputs.seed)
        answers = self.generator.generate(prompts, how)
        assert answers is not None
        documents = [
            ([*prompt.ids, *answer.ids], [False] * len(prompt.ids) + [True] * len(answer.ids))
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        groups = (self.ANSWERS,) * (len(prompts) // self.ANSWERS)
        batch = pack_documents(
            documents, group_sizes=groups, sample_ids=micro.sample_ids, position=micro.position,
            max_length=self.inputs.max_length,
        )  # fmt: skip
        reward_D = torch.tensor([sum(token < 100 for token in answer.ids) / len(answer.ids) for answer in answers])
        advantage_D = reward_D - reward_D.view(-1, self.ANSWERS).mean(1).repeat_interleave(self.ANSWERS)
        old_logprob_S = torch.tensor([value for answer in answers for value in answer.logprobs])
        columns = {"reward_D": reward_D, "advantage_D": advantage_D, "old_logprob_S": old_logprob_S}
        return replace(batch, columns=columns)


SAMPLED = StepSourceSpec(name="sampled", open=SampledSteps)


def reinforce_terms(params: NoParams, policy: Policy, batch: Batch) -> LossTerms:
    """Source: https://link.springer.com/article/10.1007/BF00992696"""
    logprob_S = policy.token_logprobs(batch)
    gain_D = batch.columns["advantage_D"] * batch.sum_by_document(logprob_S)
    gap = (logprob_S - batch.columns["old_logprob_S"]).abs().sum()
    reward = (batch.columns["reward_D"].sum(), batch.num_documents)
    return LossTerms.of(-gain_D.sum(), {"reward": reward, "sampler_gap": (gap, batch.num_supervised)})


REINFORCE = ObjectiveSpec(
    name="plain_reinforce", params=NoParams, source="sampled", per_token=True, terms=reinforce_terms,
    denominator=lambda params, micros: float(sum(micro.num_documents for micro in micros)),
)  # fmt: skip


class DensityMetric:
    def __init__(self, facts: RunFacts) -> None:
        self._tokens = self._supervised = 0

    def start(self) -> None:
        pass

    def micro(self, batch: Batch, terms: LossTerms) -> None:
        self._tokens += batch.num_tokens
        self._supervised += batch.num_supervised

    def step(self, state: TrainState, report: StepReport) -> None:
        pass

    def read(self) -> dict[str, float | None]:
        return {"tokens_per_supervised": self._tokens / self._supervised}


DENSITY = MetricSpec(name="density", build=DensityMetric)


ACME_KEYS = table(
    net=carried("[model] path"),
    rows=carried("[[data.train]] path"),
    speed=carried("[optim] learning_rate", "in thousandths there"),
    colour=left("recipes have none"),
    noise=refused("noise is not added here: remove it"),
)


def convert_acme(work: Conversion) -> None:
    top = work.top()
    work.set("name", "acme")
    work.set("model.path", top.text("net"), (top, "net"))
    work.set("data.train.0.path", top.text("rows"), (top, "rows"))
    work.set("optim.learning_rate", (top.number("speed") or 0) / 1000, (top, "speed"), "in thousandths there")


ACME = ImporterSpec(
    name="acme", title="Acme Tune", told_by="a key net", detects=lambda file: "net" in file.content,
    convert=convert_acme, keys={"": ACME_KEYS},
)  # fmt: skip


def register() -> None:
    OPTIMIZERS.add(SGD)
    FORMATS.add(QA)
    METHODS.add(NORMS)
    METHODS.add(VECTORS)
    METHODS.add(PROMPT)
    FORMATS.add(CHOICE)
    OBJECTIVES.add(FOCAL)
    OBJECTIVES.add(MARGIN)
    OBJECTIVES.add(RANKING)
    OBJECTIVES.add(REINFORCE)
    STEP_SOURCES.add(SAMPLED)
    GENERATORS.add(LOUD)
    EXPORTS.add(NPZ)
    METRICS.add(DENSITY)
    IMPORTERS.add(ACME)


def main(plan: Path) -> None:
    """Each case of the plan (name -> recipe, overrides): the run folder, or what the recipe's mistakes are.

    A case with a file is imported: the recipe, or what is wrong with the file.
    """
    register()
    said = {}
    for name, case in json.loads(plan.read_text()).items():
        try:
            if "file" in case:
                said[name] = import_config(Path(case["file"]), importers=IMPORTERS, registries=REGISTRIES).toml
                continue
            said[name] = str(distft.train(distft.load_recipe(case["recipe"], overrides=case["overrides"])).folder)
        except DistftError as error:
            said[name] = str(error)
    print(json.dumps(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]))


# -- and what comes of them ------------------------------------------------------------------------------------------

RATE = 0.25
FIRST = ["train.max_steps=1", 'train.max_grad_norm="off"', 'schedule.name="constant"', "schedule.warmup_steps=0"]
PAIRS = [
    "train.max_steps=5", 'objective={name="margin"}', 'method={name="lora", r=4}', "optim.momentum=0.9",
    'data.train.0.path="FOLDER/choices-train.jsonl"', 'data.train.0.format="choice"',
    'data.eval.0.path="FOLDER/choices-valid.jsonl"', "data.max_length=192", "optim.learning_rate=0.005",
]  # fmt: skip
CASES = {
    "norms": [*FIRST, 'method.name="norms"', "optim.momentum=0.0", 'export.also=[{name="npz", digits="float16"}]'],
    "vectors": ["train.max_steps=3", 'method.name="vectors"', "optim.momentum=0.9", 'method.target_modules=["v_proj"]'],
    "prompt": [
        "train.max_steps=6",
        'objective={name="sft"}',
        'method={name="prompt", num_virtual_tokens=5}',
        'optim={name="adamw", learning_rate=0.05}',
        'eval.answers=[{name="a", path="FOLDER/questions.jsonl", scores=[{name="exact_match"}], max_new_tokens=6}]',
    ],
    "gamma0": [*FIRST, "objective.gamma=0.0"],
    "sft": [*FIRST, 'objective={name="sft"}'],
    **{name: [*PAIRS, f"train.micro_batch_size={micro}"] for name, micro in (("pairs", 8), ("pairs-split", 1))},
    **{
        f"ranking-{name}": [*PAIRS, 'objective={name="ranking"}', *overrides]
        for name, overrides in {
            "full": ['method={name="full"}', "optim.learning_rate=0.05"],
            "lora": ["train.micro_batch_size=8"],
            "lora-split": ["train.micro_batch_size=1"],
            "qlora": ['method={name="qlora", r=4}'],
        }.items()
    },
    **{
        f"reinforce{name}": [
            'objective={name="plain_reinforce"}',
            f"train.max_steps={steps}",
            'optim={name="adamw", learning_rate=0.02}',
            'schedule.name="constant"',
            "schedule.warmup_steps=0",
            f"train.micro_batch_size={micro}",
            "checkpoint.every_steps=3",
            "data.eval=[]",
        ]
        for name, steps, micro in (("", 9, 4), ("-split", 2, 1))
    },
    "ranking-answers": [
        *PAIRS,
        'objective={name="ranking"}',
        'eval.answers=[{name="a", path="FOLDER/valid.jsonl", scores=[{name="exact_match"}]}]',
    ],
    "pairs-full": [*PAIRS, 'method={name="full"}'],
    "pairs-sft": [*PAIRS, 'objective={name="sft"}'],
    "exports": [*FIRST, 'method.name="vectors"', 'export.also=[{name="npz"}, {name="model"}]'],
    "mistakes": [
        "optim.momentm=0.9",
        "objective.gama=1.0",
        'data.train.0.format="qas"',
        'method.name="vector"',
        'export.also=[{name="npy"}, {name="npz", digit=1}]',
    ],
}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """The usual tiny model; rows of the outside format, and a recipe that names outside parts."""
    bench = Bench.make(tmp_path_factory.mktemp("plugins"))
    for split in ("train", "valid"):
        path = bench.folder / f"{split}.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps({"q": row["prompt"], "a": row["completion"]}) + "\n" for row in rows))
        (bench.folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))
        answers = [row["completion"] for row in rows]
        pairs = [
            {"q": row["prompt"], "good": " disk" + good, "bad": " cache" + bad}
            for row, good, bad in zip(rows, answers, answers[1:] + answers[:1], strict=True)
        ]
        choices = bench.folder / f"choices-{split}.jsonl"
        choices.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    text = bench.recipe.read_text()
    optim = text[text.index("[optim]") : text.index("[schedule]")]
    text = text.replace(optim, f'[objective]\nname = "focal"\n[optim]\nname = "sgd"\nlearning_rate = {RATE}\n')
    text = text.replace('train.jsonl"', 'train.jsonl"\nformat = "qa"')
    bench.recipe.write_text(text)
    return bench


@pytest.fixture(scope="module")
def said(bench: Bench) -> dict[str, str]:
    plan = bench.folder / "plan.json"
    folder = str(bench.folder)
    cases = {
        name: {
            "recipe": str(bench.recipe),
            "overrides": [f'name="{name}"', *(override.replace("FOLDER", folder) for override in overrides)],
        }
        for name, overrides in CASES.items()
    }
    files = {
        "import": "net: demo:tiny-llama\nrows: rows.jsonl\nspeed: 2\ncolour: red\nwheels: 4\n",
        "import-mistakes": "net: demo:tiny-llama\nrows: [a]\nnoise: 3\n",
    }
    for name, text in files.items():
        path = bench.folder / f"{name}.yaml"
        path.write_text(text)
        cases[name] = {"file": str(path)}
    plan.write_text(json.dumps(cases))
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests/helpers")])
    done = run([sys.executable, __file__, str(plan)], PYTHONPATH=path)
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads(done.stdout.splitlines()[-1])


def records(folder: str) -> list[dict]:
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


def test_only_the_methods_own_parameters_changed_by_the_optimizers_rule(said: dict[str, str], bench: Bench) -> None:
    from transformers import AutoModelForCausalLM

    after, before = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict()
        for folder in (said["norms"] + "/final", bench.folder / "model")
    )
    changed = {name for name in before if not torch.equal(after[name], before[name])}
    assert changed == {name for name in before if "norm" in name}
    moved = torch.cat([(after[name] - before[name]).flatten() for name in changed]).norm().item()
    [step] = [record for record in records(said["norms"]) if "loss" in record]
    assert moved == pytest.approx(RATE * step["grad_norm"], rel=1e-4), "plain SGD moves by rate x gradient"


def test_an_importer_from_outside_makes_a_recipe(said: dict[str, str]) -> None:
    made = said["import"]
    assert "a file of Acme Tune" in made
    assert tomllib.loads(made)["optim"] == {"learning_rate": 0.002}
    assert "# in thousandths there\nlearning_rate" in made
    assert 'line 4   colour = "red"  recipes have none' in made
    assert "Not known to this importer:\n#   line 5   wheels = 4" in made
    assert "noise = 3  noise is not added here" in said["import-mistakes"]
    assert 'rows = ["a"]  must be text' in said["import-mistakes"]


def test_an_export_from_outside_is_written_beside_final(said: dict[str, str]) -> None:
    from transformers import AutoModelForCausalLM

    final = AutoModelForCausalLM.from_pretrained(said["norms"] + "/final").state_dict()
    with np.load(said["norms"] + "/exports/npz/model.npz") as arrays:
        assert all(np.array_equal(arrays[name], final[name].numpy().astype("float16")) for name in arrays.files)
        assert "model.norm.weight" in arrays.files
    assert "adapters have no npz" in said["exports"]
    assert 'method "vectors" trains an adapter' in said["exports"]
    resolved = tomllib.loads(Path(said["norms"], "recipe.toml").read_text())
    assert resolved["export"]["also"] == [{"name": "npz", "digits": "float16"}]
    assert "export" not in tomllib.loads(Path(said["vectors"], "recipe.toml").read_text())


def test_a_peft_method_from_outside_saves_its_own_adapter(said: dict[str, str], bench: Bench) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(bench.folder / "model")
    model = PeftModel.from_pretrained(base, said["vectors"] + "/final")
    own = {name: param for name, param in model.named_parameters() if ".ia3_l." in name}
    assert len(own) == 2, "one vector for each block's v_proj"
    assert all((param != 1).any() and (param - 1).abs().max() < 1 for param in own.values())
    facts = json.loads(Path(said["vectors"], "manifest.json").read_text())
    assert facts["parameters"]["trainable"] == 2 * 2 * 16  # blocks x key-value heads x head size


def test_virtual_tokens_are_trained_and_read_by_peft(said: dict[str, str], bench: Bench) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    lines = records(said["prompt"])
    facts = json.loads(Path(said["prompt"], "manifest.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(bench.folder / "model")
    assert facts["parameters"]["trainable"] == 5 * base.config.hidden_size
    model = PeftModel.from_pretrained(base, said["prompt"] + "/final").eval()
    tokenizer = AutoTokenizer.from_pretrained(bench.folder / "model")
    loss = tokens = 0.0
    rows = [json.loads(line) for line in (bench.folder / "valid.jsonl").read_text().splitlines()]
    for row in rows:
        alone, ids = tokenizer(row["q"]).input_ids, [*tokenizer(row["q"] + row["a"]).input_ids, tokenizer.eos_token_id]
        start = next((at for at, pair in enumerate(zip(alone, ids, strict=False)) if len({*pair}) > 1), len(alone))
        labels = [-100] * start + ids[start:]
        with torch.no_grad():
            found = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels]))
        loss, tokens = loss + found.loss.item() * (len(ids) - start), tokens + len(ids) - start
    last = [line for line in lines if "eval_loss" in line][-1]
    assert last["eval_loss"] == pytest.approx(loss / tokens, rel=1e-5)
    assert last["eval_loss"] < next(line for line in lines if "eval_loss" in line)["eval_loss"] - 0.05
    [answer] = [json.loads(line) for line in Path(said["prompt"], "eval/after/a.jsonl").read_text().splitlines()][:1]
    ids = torch.tensor([tokenizer(rows[0]["q"]).input_ids])
    with torch.no_grad():
        written = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False, eos_token_id=tokenizer.eos_token_id)
    assert answer["answer"] == tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)


def test_the_objective_is_what_is_minimised(said: dict[str, str]) -> None:
    focal, gamma0, plain = (records(said[name]) for name in ("norms", "gamma0", "sft"))
    assert gamma0[0]["eval_loss"] == pytest.approx(plain[0]["eval_loss"], rel=1e-6)
    assert gamma0[1]["loss"] == pytest.approx(plain[1]["loss"], rel=1e-6)
    assert 0.9 * plain[0]["eval_loss"] < focal[0]["eval_loss"] < 0.9999 * plain[0]["eval_loss"]
    assert focal[-1]["eval_loss"] < focal[0]["eval_loss"]


def test_pairs_with_a_reference_are_trained_by_one_file_and_one_line(said: dict[str, str], bench: Bench) -> None:
    whole, split = ([line for line in records(said[name]) if "loss" in line] for name in ("pairs", "pairs-split"))
    assert whole[0]["loss"] == pytest.approx(math.log(2), abs=1e-6), "the adapters start as nothing"
    assert whole[0]["margin"] == pytest.approx(0, abs=1e-5)
    for name in ("loss", "grad_norm", "margin", "accuracy", "tokens_loss"):
        assert [line[name] for line in split] == pytest.approx([line[name] for line in whole], rel=1e-4, abs=1e-5), name
    assert whole[0]["tokens_loss"] > 50, "tokens are counted as tokens, whatever the loss is divided by"
    last = [line for line in records(said["pairs"]) if "eval_loss" in line][-1]
    assert last["eval_loss"] < 0.66, "good answers have become likelier beside bad ones"
    rows = [json.loads(line) for line in (bench.folder / "choices-valid.jsonl").read_text().splitlines()]
    gains = [0.5 * gain for gain in reference_gains(said["pairs"] + "/final", bench.folder / "model", rows)]
    margins = torch.tensor([good - bad for good, bad in zip(gains[::2], gains[1::2], strict=True)])
    assert last["eval_loss"] == pytest.approx(-torch.nn.functional.logsigmoid(margins).mean().item(), rel=1e-4)
    assert last["eval_margin"] == pytest.approx(margins.mean().item(), rel=1e-4)
    assert last["eval_accuracy"] == pytest.approx((margins > 0).float().mean().item())


def reference_gains(adapter: str, base: Path, rows: list[dict[str, str]]) -> list[float]:
    """log p(answer) of the trained model minus that of the base, by PEFT and transformers, one text at a time."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    gains = []
    for row in rows:
        for answer in (row["good"], row["bad"]):
            start = len(tokenizer(row["q"]).input_ids)
            ids = torch.tensor([[*tokenizer(row["q"] + answer).input_ids, tokenizer.eos_token_id]])
            logprobs = []
            for context in (contextlib.nullcontext, model.disable_adapter):
                with torch.no_grad(), context():
                    logp = model(input_ids=ids).logits[0].float().log_softmax(-1)
                logprobs.append(logp[start - 1 : -1].gather(1, ids[0, start:, None]).sum().item())
            gains.append(logprobs[0] - logprobs[1])
    return gains


def rewards(folder: str, base: Path, rows: list[dict[str, str]]) -> list[float]:
    """The rewards that transformers and PEFT give each answer, one text at a time."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer, adapter = AutoTokenizer.from_pretrained(base), Path(folder, "adapter_config.json").is_file()
    kind = AutoModelForSequenceClassification
    model = kind.from_pretrained(base, num_labels=1) if adapter else kind.from_pretrained(folder)
    model = (PeftModel.from_pretrained(model, folder) if adapter else model).eval()
    found = []
    for row in rows:
        for answer in (row["good"], row["bad"]):
            ids = torch.tensor([[*tokenizer(row["q"] + answer).input_ids, tokenizer.eos_token_id]])
            with torch.no_grad():
                found.append(model(input_ids=ids).logits[0, 0].item())
    return found


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_scalar_head_is_trained_and_read_by_transformers(said: dict[str, str], bench: Bench, method: str) -> None:
    lines = records(said[f"ranking-{method}"])
    last = [line for line in lines if "eval_loss" in line][-1]
    rows = [json.loads(line) for line in (bench.folder / "choices-valid.jsonl").read_text().splitlines()]
    found = torch.tensor(rewards(said[f"ranking-{method}"] + "/final", bench.folder / "model", rows))
    margins = found[0::2] - found[1::2]
    assert margins.std() > 1e-3, "the head gives different answers different rewards"
    assert last["eval_loss"] == pytest.approx(-torch.nn.functional.logsigmoid(margins).mean().item(), rel=1e-5)
    assert last["eval_reward"] == pytest.approx(found.mean().item(), rel=1e-4, abs=1e-6)
    assert last["eval_accuracy"] == pytest.approx((margins > 0).float().mean().item())
    first = next(line for line in lines if "eval_loss" in line)
    assert last["eval_loss"] < first["eval_loss"]


def test_a_scalar_head_is_the_same_for_every_split(said: dict[str, str]) -> None:
    whole, split = (
        [line for line in records(said[f"ranking-{name}"]) if "loss" in line] for name in ("lora", "lora-split")
    )
    for name in ("loss", "grad_norm", "reward", "accuracy"):
        assert [line[name] for line in split] == pytest.approx([line[name] for line in whole], rel=1e-4, abs=1e-5), name
    quantised = [line for line in records(said["ranking-qlora"]) if "loss" in line]
    assert len(quantised) == len(whole)
    assert "cannot answer" in said["ranking-answers"]


def test_a_step_source_makes_its_rows_with_the_model_as_it_is(said: dict[str, str]) -> None:
    steps = [line for line in records(said["reinforce"]) if "loss" in line]
    assert all(step["sampler_gap"] < 1e-5 for step in steps), "what was sampled are the weights that are trained"
    rewards = [step["reward"] for step in steps]
    assert sum(rewards[-2:]) > sum(rewards[:2]) + 0.4, rewards
    split = [line for line in records(said["reinforce-split"]) if "loss" in line]
    assert split[0]["tokens_loss"] > 0
    assert len(split) == 2, "a generator runs for every micro-batch"


def test_full_fine_tuning_has_a_reference_too(said: dict[str, str]) -> None:
    full, lora = ([line for line in records(said[name]) if "loss" in line] for name in ("pairs-full", "pairs"))
    assert full[0]["loss"] == pytest.approx(math.log(2), abs=1e-6), "the reference is the model before training"
    assert full[0]["tokens"] == lora[0]["tokens"]
    assert full[-1]["margin"] > 0


def test_what_an_objective_cannot_have_is_said(said: dict[str, str]) -> None:
    assert '"sft" trains 1 document(s) a row together, and the format choice' in said["pairs-sft"]


def test_figures_of_an_objective_are_logged_and_evaluated(said: dict[str, str]) -> None:
    for name in ("norms", "vectors", "gamma0"):
        lines = records(said[name])
        assert all(0 <= line["likely"] <= 1 for line in lines if "loss" in line), name
        assert all(0 <= line["eval_likely"] <= 1 for line in lines if "eval_loss" in line), name
        assert not any("eval_perplexity" in line for line in lines), "exp of this loss is no perplexity"
    lines = records(said["sft"])
    assert not any("likely" in line for line in lines)
    assert any("eval_perplexity" in line for line in lines)


def test_the_metric_is_in_every_steps_line(said: dict[str, str]) -> None:
    for name in ("norms", "vectors", "sft"):
        steps = [record for record in records(said[name]) if "loss" in record]
        last = steps[-1]
        assert all("tokens_per_supervised" in record for record in steps)
        assert last["tokens_per_supervised"] == pytest.approx(last["tokens"] / last["tokens_loss"])


def test_the_run_says_which_parts_it_had(said: dict[str, str]) -> None:
    resolved = Path(said["vectors"], "recipe.toml").read_text()
    for line in (
        'name = "vectors"',
        'name = "sgd"',
        "momentum = 0.9",
        'name = "focal"',
        "gamma = 2.0",
        'format = "qa"',
    ):
        assert line in resolved, line
    facts = json.loads(Path(said["vectors"], "manifest.json").read_text())
    assert (facts["engine"], facts["world"], facts["seed"]) == ("solo", 1, 42)
    assert set(facts["data"]) == {"train", "eval"}
    assert facts["versions"]["torch"] == metadata.version("torch")


def test_mistakes_in_outside_parts_are_explained_like_our_own(said: dict[str, str]) -> None:
    text = said["mistakes"]
    assert "6 problems" in text
    assert 'unknown export "npy", did you mean "npz"' in text or 'did you mean "npz"' in text
    assert 'did you mean "digits"' in text
    assert 'did you mean "momentum"' in text
    assert 'did you mean "gamma"' in text
    assert 'did you mean "qa"' in text
    assert f"allowed: {', '.join(METHODS)}, norms, vectors" in text
