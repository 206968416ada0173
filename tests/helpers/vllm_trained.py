"""A small model that is trained in this process, whose answers come from a server."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from generating import ALONE, RULE
from tiny import CPU, build, documents
from transformers import AutoModelForCausalLM, LlamaConfig

from distft.engine.params import EngineParams
from distft.engine.solo import SoloEngine, open_engine
from distft.export import final
from distft.generation import GENERATORS, GeneratorInputs
from distft.generation.completion import Prompt, SamplingParams
from distft.generation.vllm_generator import VllmGenerator
from distft.model.adapters import METHODS
from distft.model.load import WRAPPER

PROMPTS = [Prompt(seed_key=f"{number}\n{answer}", ids=ids) for number, ids in enumerate(documents([9, 4, 17]))
           for answer in range(2)]  # fmt: skip
HOW = SamplingParams(max_new_tokens=12, temperature=1.0, seed=3, logprobs=True)


@dataclass(frozen=True)
class Trained:
    """A model that is trained in this process, and what a generator is given of it."""

    base: Path
    engine: SoloEngine
    inputs: GeneratorInputs

    def open(self, server: str, **params: object) -> VllmGenerator:
        spec = GENERATORS["vllm"]
        given = {"url": server, "restart_timeout_s": 1.0} | params
        opened = spec.open(spec.params.model_validate(given), self.inputs)
        assert isinstance(opened, VllmGenerator)
        return opened

    def update(self, scale: float = 0.3) -> None:
        """Move every trained weight, by much unless told otherwise: no answer stays as it was."""
        torch.manual_seed(5)
        with torch.no_grad():
            for param in self.engine.model.parameters():
                if param.requires_grad:
                    param += scale * torch.randn_like(param)


def made(tmp_path: Path, method_name: str, *, tied: bool = False) -> Trained:
    """Return a random model of two layers with one method."""
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2, bos_token_id=None, eos_token_id=7,
        tie_word_embeddings=tied,
    )  # fmt: skip
    base, is_lora = tmp_path / "base", method_name == "lora"
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    built = build(base, method_name, fill=False, params={"r": 4} if is_lora else {}, init="pretrained")
    named = [(name, param) for name, param in built.module.named_parameters() if param.requires_grad]
    shapes = {name.removeprefix(WRAPPER): (tuple(param.shape), param.dtype) for name, param in named}
    engine = open_engine("solo", EngineParams(), replace(ALONE, device=CPU))
    engine.setup(built, RULE, micros_per_step=1)

    def write_model(folder: Path) -> None:
        final.write_model(folder, engine, shapes, prefix=WRAPPER, layout=built.layout, save_rest=lambda aside: None)

    def write_adapter(folder: Path) -> None:
        method = METHODS["lora"]
        final.write_adapter(
            folder,
            engine,
            shapes,
            prefix=WRAPPER,
            starts_at_zero=method.starts_at_zero,
            save_adapter=lambda aside, tensors: method.save_adapter(built.module.lm, aside, tensors),
            save_rest=lambda aside: None,
            is_trained=False,
        )

    inputs = GeneratorInputs(
        engine=engine,
        module=built.module,
        decode=lambda ids: " ".join(map(str, ids)),
        stop_ids=(7,),
        stop=lambda: False,
        dtype="float32",
        folder=tmp_path / "rollouts",
        write_adapter=write_adapter if is_lora else None,
        write_model=None if is_lora else write_model,
    )
    return Trained(base, engine, inputs)
