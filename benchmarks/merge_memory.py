"""Peak memory of `distft merge` on a model of a given size: a sparse file of bf16 zeros, an adapter on every layer.

python benchmarks/merge_memory.py FOLDER [--layers 16]

Prints GiB: what the process held when its imports were done, the most it held while merging, of which anonymous (its
own; the rest are pages of mapped files, which the kernel takes back when it needs them), and the size of the model.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from distft.merging import comparison, merging
from distft.merging.base_model import skeleton
from distft.model.heads import HEADS

GIB = 2**30


def make(folder: Path, layers: int) -> int:
    """Write base and adapter; returns the base's bytes."""
    config = LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=5504, num_hidden_layers=layers, num_attention_heads=16,
        num_key_value_heads=16, dtype="bfloat16", architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    base, adapter = folder / "base", folder / "adapter"
    for place in (base, adapter):
        place.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(base)
    (base / "tokenizer.model").write_text("none")
    lm = skeleton(config, HEADS["lm"], torch.bfloat16)
    header, end = {}, 0
    for name, param in lm.named_parameters():
        header[name] = {"dtype": "BF16", "shape": list(param.shape), "data_offsets": [end, end + 2 * param.numel()]}
        end += 2 * param.numel()
    text = json.dumps(header).encode()
    with (base / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    tensors = {}
    for name, module in lm.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(16, module.in_features)
            tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(module.out_features, 16)
    save_file(tensors, adapter / "adapter_model.safetensors")
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    settings = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "target_modules": names}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    return end


def resident() -> tuple[float, float]:
    """Return (all, anonymous) resident memory in GiB."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(int(lines[key].split()[0]) * 1024 / GIB for key in ("VmRSS", "RssAnon"))  # type: ignore[return-value]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=16)
    given = parser.parse_args()
    size = make(given.folder, given.layers)
    assert comparison  # imported before the first reading
    before, peak, done = resident(), [0.0, 0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            for index, value in enumerate(resident()):
                peak[index] = max(peak[index], value)

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.monotonic()
    source = merging.MergeSource(adapter=given.folder / "adapter", base=given.folder / "base")
    merging.merge(source, given.folder / "merged", rows=None)
    done.set()
    watcher.join()
    print(
        f"model {size / GIB:.2f}, before {before[0]:.2f} (anonymous {before[1]:.2f}), peak {peak[0]:.2f} "
        f"(anonymous {peak[1]:.2f}): {peak[0] - before[0]:.2f} more (anonymous {peak[1] - before[1]:.2f}); "
        f"{time.monotonic() - began:.0f} s"
    )


if __name__ == "__main__":
    main()
