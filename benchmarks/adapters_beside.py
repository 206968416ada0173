"""Fifty adapters beside one base: memory, time to switch, and a batch whose rows have different adapters.

    python benchmarks/adapters_beside.py FOLDER [NUM_ADAPTERS]

A random Llama of 24 layers (168 of them adapted); ratios are of one process and interleaved.
"""

from __future__ import annotations

import resource
import statistics
import sys
import time
from pathlib import Path

import torch


def base_and_adapter(folder: Path) -> Path:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=512, intermediate_size=1408, num_hidden_layers=24, num_attention_heads=8,
                         num_key_value_heads=4, vocab_size=8192, tie_word_embeddings=True)  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    lm = LlamaForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    made = get_peft_model(lm, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, param in made.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(param, 0, 0.02)
    made.save_pretrained(folder / "adapter")
    return folder / "adapter"


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def milliseconds(work: object, times: int) -> list[float]:
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        work()  # type: ignore[operator]
        taken.append(1e3 * (time.perf_counter() - began))
    return taken


@torch.no_grad()
def main() -> None:
    from distft.model.adapters.pool import FIRST, AdapterPool

    folder, count = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 50
    adapter = base_and_adapter(folder)
    pool = AdapterPool(adapter, dtype=torch.float32)
    before = resident()
    began = time.perf_counter()
    names = [FIRST]
    for number in range(1, count):
        names.append(f"a{number}")
        pool.add(names[-1], adapter)
    loading = time.perf_counter() - began
    base, each = pool.num_bytes(None), pool.num_bytes(FIRST)
    held = sum(param.numel() * param.element_size() for param in pool.model.parameters())
    print(f"base {base / 2**20:.1f} MiB, adapter {each / 2**20:.2f} MiB, {count} beside it: {held / 2**20:.1f} MiB of "
          f"parameters ({held == base + count * each}), {(resident() - before) / 2**20:.0f} MiB more resident for "
          f"{(count - 1) * each / 2**20:.0f} MiB, loaded in {loading:.1f} s")  # fmt: skip

    def switched(name: str) -> float:
        began = time.perf_counter()
        with pool.using(name):
            return 1e3 * (time.perf_counter() - began)

    ours = [switched(name) for name in names * 3]
    theirs = milliseconds(lambda: pool.model.set_adapter(names[len(names) // 2]), 5)
    print(f"switch: median {statistics.median(ours):.3f} ms, worst {max(ours):.3f} ms; PEFT's set_adapter "
          f"{statistics.median(theirs):.1f} ms")  # fmt: skip
    ids = torch.randint(0, 8192, (8, 64))
    rows = [*names[1:8], None]
    mixed, single, plain = [], [], []
    for _ in range(5):
        with pool.rows_of(rows) as model:
            mixed += milliseconds(lambda lm=model: lm(input_ids=ids), 1)
        with pool.using(FIRST) as model:
            plain += milliseconds(lambda lm=model: lm(input_ids=ids), 1)
        began = time.perf_counter()
        outputs = []
        for row, name in enumerate(rows):
            with pool.using(name) as model:
                outputs.append(model(input_ids=ids[row : row + 1]).logits)
        single.append(1e3 * (time.perf_counter() - began))
    with pool.rows_of(rows) as model:
        off = (model(input_ids=ids).logits - torch.cat(outputs)).abs().max()
    print(f"8 rows under 8 adapters: {statistics.median(mixed) / statistics.median(plain):.2f} of a batch under one "
          f"adapter, {statistics.median(mixed) / statistics.median(single):.2f} of row by row; largest difference of a "
          f"logit {float(off):.1e}")  # fmt: skip


if __name__ == "__main__":
    main()
