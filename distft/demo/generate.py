"""Greedy answers of a model folder, with plain transformers and PEFT: nothing of the trainer is used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from peft import PeftModel
    from transformers import PreTrainedModel

BATCH_SIZE = 100
SEED = 0


def answers(model_dir: str | Path, prompts: Sequence[str], max_new_tokens: int = 64) -> list[str]:
    """Return what the model writes after each prompt, up to its end-of-sequence token.

    `model_dir` holds a whole model, an adapter whose base its adapter_config.json names, or a config without weights
    (then the weights are random, from a fixed seed). Its tokenizer lies beside it.
    """
    import torch
    from transformers import AutoTokenizer

    model: Any = _load(Path(model_dir)).eval()  # Any: the stubs take the mixin's `generate` for a tensor
    tokenizer: Any = AutoTokenizer.from_pretrained(str(model_dir), padding_side="left")
    written: list[str] = []
    for start in range(0, len(prompts), BATCH_SIZE):
        batch = tokenizer(list(prompts[start : start + BATCH_SIZE]), return_tensors="pt", padding=True)
        with torch.inference_mode():
            ids = model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        new = ids[:, batch["input_ids"].shape[1] :]
        written += tokenizer.batch_decode(new, skip_special_tokens=True)
    return written


def _load(folder: Path) -> PreTrainedModel | PeftModel:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        from peft import PeftModel

        base: Any = _load(Path(json.loads(adapter.read_text())["base_model_name_or_path"]))
        return PeftModel.from_pretrained(base, str(folder))
    if any(folder.glob("*.safetensors")):
        return AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(str(folder)), dtype=torch.float32)
