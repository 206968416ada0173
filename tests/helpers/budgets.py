"""What one block and the head of an 8B model cost: operators, bytes read and written, temporaries, waits, graph breaks.

    PYTHONPATH=tests/helpers python tests/helpers/budgets.py [OUT.md]        (make budgets)

Counted on a model of an eighth of Llama-3.1-8B's sizes (hidden 512 of 4,096, 4 heads of 32, rank 2 of 16, vocabulary
16,032 of 128,256) with 512 tokens for 4,096: activations (tokens x width) and weights (width x width) shrink alike, by
64, so bytes per token and unit of width are those of the real one. Without compile every operation that runs is
counted, inputs and outputs once each. Compiled graphs go through inductor's decompositions, partitioner and scheduler,
whose own count of each fused kernel's accesses is taken; nothing is generated, and what runs is the graph itself.

The least possible: each product of a weight reads its operands and writes its result once, attention reads q, k, v and
writes its output, and what is element by element between two of them is one pass over what must be read and written.
"""

from __future__ import annotations

import contextlib
import functools
import json
import sys
import tempfile
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tiny import build
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distft.model.adapters import products

TOKENS, WIDTH, MIDDLE, KEYS, RANK, VOCABULARY = 512, 512, 1792, 128, 2, 16_032
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": WIDTH,
    "intermediate_size": MIDDLE, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 1,
    "head_dim": 128, "initializer_range": 0.02, "tie_word_embeddings": False,
}  # fmt: skip
UNIT = 2 * TOKENS * WIDTH
"""Bytes of one pass over bf16 [tokens, width]: what everything is told in."""
METHODS: dict[str, dict[str, Any]] = {"full": {}, "lora": {"r": RANK}, "qlora": {"r": RANK}}


@dataclass(kw_only=True)
class Count:
    """Of a forward and its backward."""

    operators: int = 0
    """Without views; of compiled graphs, kernels after fusion."""
    passes: float = 0.0
    """Bytes read and written, in passes over bf16 [tokens, width]."""
    largest: float = 0.0
    """Largest result of one operation, in the same unit."""
    waits: int = 0
    """Times the host waits for the device."""
    by_name: dict[str, list[float]] = field(default_factory=dict)
    """Name of an operator -> how often, passes."""

    def add(self, name: str, count: float, largest: float = 0.0) -> None:
        """Take note of one operation of `count` bytes."""
        self.operators += 1
        self.passes += count / UNIT
        self.largest = max(self.largest, largest / UNIT)
        row = self.by_name.setdefault(name, [0, 0.0])
        row[0] += 1
        row[1] += count / UNIT


class Eager(TorchDispatchMode):
    """Counts what runs."""

    def __init__(self) -> None:
        super().__init__()
        self.count = Count()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation; each storage counts once as read and once as written."""
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.count.waits += 1
        elif not func.is_view:
            read = {t.untyped_storage()._cdata: t.nbytes for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
            written = [t.nbytes for t in tree_leaves(out) if isinstance(t, Tensor)]
            self.count.add(func.overloadpacket.__name__, sum(read.values()) + sum(written), max(written, default=0))
        return out


def least(method: str) -> float:
    """Passes of one block that nobody can do without (see above); adapters' own products included."""
    t, e, f, q, k = TOKENS, WIDTH, MIDDLE, WIDTH, KEYS
    weights = [(e, q), (e, k), (e, k), (q, e), (e, f), (e, f), (f, e)]
    one = sum(t * i + i * o + t * o for i, o in weights)  # a product: forward, gradient of the input, of the weight
    attention = t * (2 * q + 2 * k) + t * (3 * q + 2 * k) + t * (q + 2 * k)
    # norm; rotary of q and k; sum and norm; SwiGLU; sum
    forward = t * (2 * e + 2 * (q + k) + 4 * e + 3 * f + 3 * e)
    # SwiGLU; norm and sum; rotary; norm and sum
    backward = t * (5 * f + 5 * e + 2 * (q + k) + 6 * e)
    total = 2 * one + attention + forward + backward
    if method == "full":
        return 2 * (total + one) / UNIT
    # A x; B (A x) onto the product; backward: through B, through A onto the gradient of the input; both weights'.
    low = sum(t * (2 * i + 3 * o) + t * (2 * i + 2 * o) for i, o in weights)
    if method == "qlora":  # codes are read and the weights written, twice
        low += sum(2 * (0.25 * i * o + i * o) for i, o in weights)
    return 2 * (total + low) / UNIT


@contextlib.contextmanager
def _plain_peft(wanted: bool) -> Iterator[None]:
    """PEFT's own forward of its layers."""
    fuse = products.fuse
    if wanted:
        products.fuse = lambda wrapped, adapter: None
    try:
        yield
    finally:
        products.fuse = fuse


def _one_document(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: Any = None, **_: Any) -> Any:
    """Stands for the varlen kernel, which like it does not repeat key-value heads."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True).transpose(1, 2), None


def _block(method: str, *, peft: bool) -> tuple[Any, Callable[[Any], Tensor]]:
    """A block, and what runs it: (its forward) -> its output."""
    from transformers import AttentionInterface

    AttentionInterface.register("one_document", _one_document)
    with tempfile.TemporaryDirectory() as folder, _plain_peft(peft):
        (Path(folder) / "config.json").write_text(json.dumps(CONFIG))
        built = build(Path(folder), method, params=METHODS[method], dtype="bfloat16")
    transformer = built.module.transformer
    transformer.config._attn_implementation = "one_document"
    inner = getattr(transformer, "model", transformer)
    x = torch.randn(1, TOKENS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    rotary = inner.rotary_emb(x, torch.arange(TOKENS)[None])

    def run(forward: Any) -> Tensor:
        out = forward(x, position_embeddings=rotary, attention_mask=None)
        return out[0] if isinstance(out, tuple) else out

    return built.blocks[0], run


def eager(method: str, *, peft: bool = False) -> Count:
    """A block's forward and backward as it runs without compile; `peft`: with PEFT's own layers, as TRL runs it."""
    block, run = _block(method, peft=peft)
    grad = torch.ones(1, TOKENS, WIDTH, dtype=torch.bfloat16)
    with Eager() as seen:
        run(block).backward(grad)
    return seen.count


def compiled(method: str) -> Count:
    """The same compiled in one graph; a graph break raises."""
    count = Count()
    block, run = _block(method, peft=False)
    torch._dynamo.reset()
    forward = torch.compile(types.MethodType(type(block).forward, block), backend=_counting(count), fullgraph=True)
    run(forward).backward(torch.ones(1, TOKENS, WIDTH, dtype=torch.bfloat16))
    return count


def _counting(count: Count) -> Any:
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    return aot_autograd(
        fw_compiler=functools.partial(_lower, count=count, backward=False),
        bw_compiler=functools.partial(_lower, count=count, backward=True),
        decompositions=select_decomp_table(),
        partition_fn=min_cut_rematerialization_partition,
    )


def _lower(graph_module: Any, inputs: Any, *, count: Count, backward: bool) -> Any:
    """Inductor up to its scheduler."""
    from torch._inductor.compile_fx import fake_tensor_prop, view_to_reshape
    from torch._inductor.debug import DebugContext
    from torch._inductor.fx_passes.post_grad import post_grad_passes
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    view_to_reshape(graph_module)
    fake = fake_tensor_prop(graph_module, inputs)
    with V.set_fake_mode(fake):
        post_grad_passes(graph_module, is_inference=False)
    graph = GraphLowering(graph_module, example_inputs=inputs, is_inference=False, is_backward=backward)
    with V.set_graph_handler(graph), V.set_fake_mode(fake), DebugContext(), V.set_extern_kernel_nodes([]):
        graph.run(*inputs)
        graph.init_wrapper_code()
        graph._update_scheduler()
        for node in graph.scheduler.nodes:
            accesses = node.get_read_write_buffers_sizes()
            if accesses:
                inner = getattr(node, "node", None)
                name = getattr(inner, "python_kernel_name", None) or "fused"
                count.add(str(name).rpartition(".")[2] if "mm" in str(name) else str(name), accesses)

    def run(args: list[Any]) -> Any:
        return graph_module.forward(*args)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def head(loss: str) -> Count:
    """The head and its loss, every token supervised; TRL's computes all logits and makes them fp32."""
    from distft.model import cross_entropy

    weight = torch.randn(VOCABULARY, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    hidden = torch.randn(TOKENS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(0, VOCABULARY, (TOKENS,))
    kinds = {"chunked": cross_entropy.chunked_sum, "all logits": cross_entropy.full_loss}
    whole = cross_entropy.CHUNK_BYTES
    cross_entropy.CHUNK_BYTES = whole // 64  # as the logits of an eighth of the tokens and of the vocabulary
    try:
        with Eager() as seen:
            kinds[loss](hidden, weight, None, labels).sum().backward()
    finally:
        cross_entropy.CHUNK_BYTES = whole
    return seen.count


def table() -> str:
    """All counts beside the least, in Markdown."""
    lines = [
        "| one block, forward + backward | operators | passes | of the least | largest result | host waits |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for method in METHODS:
        lines.append(f"| {method}: least | | {least(method):.1f} | 1.00 | | |")
        cases = {"transformers + PEFT (TRL)": eager(method, peft=True), "ours": eager(method)}
        if method != "qlora":  # bitsandbytes' kernels are called outside of graphs
            cases["ours, compiled"] = compiled(method)
        for name, count in cases.items():
            share = count.passes / least(method)
            lines.append(
                f"| {method}: {name} | {count.operators} | {count.passes:.1f} | {share:.2f} | {count.largest:.2f} "
                f"| {count.waits} |"
            )
    lines += ["", "| head and loss | operators | passes | largest result | host waits |"]
    lines += ["| --- | ---: | ---: | ---: | ---: |"]
    for loss in ("all logits", "chunked"):
        count = head(loss)
        lines.append(f"| {loss} | {count.operators} | {count.passes:.1f} | {count.largest:.2f} | {count.waits} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    text = f"{__doc__}\n{table()}"
    print(text)
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(text, encoding="utf-8")
