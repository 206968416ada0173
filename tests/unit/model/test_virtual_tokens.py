"""Methods whose virtual tokens stand before every document: packed, answered and saved, against plain PEFT."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny import CPU, batch, build, documents
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config

from distft.core.errors import DistftError
from distft.core.virtual_tokens import virtual_ids
from distft.generation.batching import pad_left
from distft.model import inference
from distft.model.adapters import METHODS
from distft.model.paths import SINGLE, ForwardPath

COUNT = 5
METHODS_HERE: list[tuple[str, dict[str, Any]]] = [
    ("prompt_tuning", {"init": "random"}),
    ("prompt_tuning", {}),
    ("p_tuning", {"encoder_hidden_size": 24}),
    ("prefix_tuning", {}),
    ("prefix_tuning", {"prefix_projection": True, "encoder_hidden_size": 24}),
]
TEXTS = documents([30, 12, 19])


def trained(folder: Path, method: str, params: dict[str, Any], **more: Any) -> Any:
    model = build(folder, method, params={"num_virtual_tokens": COUNT, **params}, init="pretrained", **more)
    torch.manual_seed(0)
    for param in model.module.parameters():
        if param.requires_grad:
            param.data.add_(0.1 * torch.randn_like(param))
    return model


def by_peft(model: Any, method: str, base: Path, folder: Path) -> Any:
    own = {name: param for name, param in model.module.lm.named_parameters() if param.requires_grad}
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    METHODS[method].save_adapter(model.module.lm, folder, {name: param.detach() for name, param in own.items()})
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder)).eval()


def logprobs(peft: Any, text: list[int]) -> Tensor:
    """Of every token but the first."""
    with torch.no_grad():
        found = peft(input_ids=torch.tensor([text])).logits[0, -len(text) :].log_softmax(-1)
    return found[:-1].gather(1, torch.tensor(text[1:])[:, None])[:, 0]


@pytest.mark.parametrize(("method", "params"), METHODS_HERE, ids=str)
def test_packed_documents_have_each_their_own_virtual_tokens(
    base: Path, tmp_path: Path, method: str, params: dict[str, Any]
) -> None:
    model = trained(base, method, params)
    packed = batch([[*virtual_ids(COUNT), *text] for text in TEXTS], trained_from=COUNT + 1)
    found = model.module(**packed.inputs())
    found.sum().backward()
    peft = by_peft(model, method, base, tmp_path / "saved")
    expected = torch.cat([-logprobs(peft, text) for text in TEXTS])
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, torch.cat([-logprobs(peft.get_base_model(), text) for text in TEXTS]), atol=1e-3)
    for name, param in model.module.named_parameters():
        assert (param.grad is not None and bool(param.grad.any())) == param.requires_grad, name


@pytest.mark.parametrize(("method", "params"), METHODS_HERE[1:], ids=str)
def test_answers_with_and_without_a_cache_are_pefts(
    base: Path, tmp_path: Path, method: str, params: dict[str, Any]
) -> None:
    """Rows of different lengths together, padded on the left; then one more token of each."""
    model = trained(base, method, params)
    model.module.eval()
    peft = by_peft(model, method, base, tmp_path / "saved")
    rows = [[*virtual_ids(COUNT), *text] for text in TEXTS]
    read, again = (pad_left(given, CPU, room=1) for given in (rows, [[*row, 7] for row in rows]))
    with torch.no_grad(), inference.generation_mode(model.module):
        cache, width = inference.new_cache(model.module), read.ids_BL.shape[1]
        last = torch.arange(1, len(rows) + 1) * width - 1
        given = {"position_ids_BL": read.positions_BL, "attention_mask_BK": read.mask_BL[:, :width]}
        first = model.module(input_ids_BL=read.ids_BL, at_S=last, cache=cache, **given)
        second = model.module(
            input_ids_BL=torch.full((len(rows), 1), 7), at_S=torch.arange(len(rows)), cache=cache,
            position_ids_BL=read.positions_BL[:, -1:] + 1, attention_mask_BK=read.mask_BL[:, : width + 1],
        )  # fmt: skip
        whole = model.module(
            input_ids_BL=again.ids_BL, at_S=torch.arange(1, len(rows) + 1) * (width + 1) - 1,
            position_ids_BL=again.positions_BL, attention_mask_BK=again.mask_BL[:, : width + 1],
        )  # fmt: skip
        for index, text in enumerate(TEXTS):
            assert torch.allclose(first[index], peft(input_ids=torch.tensor([text])).logits[0, -1], atol=1e-4)
            longer = peft(input_ids=torch.tensor([[*text, 7]])).logits[0, -1]
            assert torch.allclose(second[index], longer, atol=1e-4)
            assert torch.allclose(whole[index], longer, atol=1e-4)


@pytest.mark.parametrize("path", [ForwardPath(attention="sdpa", documents="single"),
                                  ForwardPath(attention=SINGLE, documents="single", head="own")], ids=str)  # fmt: skip
def test_a_prefix_is_read_on_every_path(base: Path, path: ForwardPath) -> None:
    fast, slow = (trained(base, "prefix_tuning", {}, computed_by=way) for way in (None, path))
    for text in TEXTS:
        alone = batch([[*virtual_ids(COUNT), *text]], trained_from=COUNT + 1)
        assert torch.allclose(slow.module(**alone.inputs()), fast.module(**alone.inputs()), atol=1e-5)


def test_activation_checkpointing_reads_the_same_prefix(base: Path) -> None:
    from distft.model.activation_checkpointing import checkpoint_blocks

    packed = batch([[*virtual_ids(COUNT), *text] for text in TEXTS], trained_from=COUNT + 1)
    grads = []
    for mode in ("off", "full"):
        model = trained(base, "prefix_tuning", {"prefix_projection": True})
        model.module.train()
        checkpoint_blocks(model.module.transformer, mode)
        model.module(**packed.inputs()).sum().backward()
        grads.append({name: param.grad for name, param in model.module.named_parameters() if param.requires_grad})
    assert all(torch.allclose(grads[0][name], grads[1][name], atol=1e-6) for name in grads[0])


def test_attention_that_reads_no_prefix_is_refused(base: Path) -> None:
    model = trained(base, "prefix_tuning", {}, computed_by=ForwardPath(attention="eager", documents="single"))
    alone = batch([[*virtual_ids(COUNT), *TEXTS[0]]], trained_from=COUNT + 1)
    with pytest.raises(DistftError, match=r"attention of 0 of 2 layers has read its prefix"):
        model.module(**alone.inputs())


def test_text_becomes_virtual_tokens(base: Path, tmp_path: Path) -> None:
    """By the tokenizer of the model's folder; without one that is said."""
    from distft.demo.files import locate_path

    with pytest.raises(DistftError, match="has no tokenizer"):
        trained(base, "prompt_tuning", {"init": "text", "init_text": "say it"})
    folder = tmp_path / "with"
    shutil.copytree(base, folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(locate_path("demo:tiny-llama")) / name, folder)
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)("a", add_special_tokens=False)["input_ids"]
    assert max(ids) < 256, "the tiny model has no more rows"
    model = build(folder, "prompt_tuning", params={"num_virtual_tokens": 3, "init": "text", "init_text": "a"},
                  init="pretrained")  # fmt: skip
    embedding = model.module.transformer.get_input_embeddings()
    wanted = [(ids * 3)[index] for index in range(3)]
    assert torch.equal(embedding.virtual.weight, embedding.weight[wanted])


def test_prefixes_of_another_architecture(tmp_path: Path) -> None:
    """GPT-2: biases, fused projections, learned positions that count the prefix."""
    folder = tmp_path / "gpt2"
    config = GPT2Config(vocab_size=256, n_embd=48, n_layer=2, n_head=4, n_positions=64)
    config.architectures = ["GPT2LMHeadModel"]
    config.save_pretrained(folder)
    lm = build(folder).module.transformer
    lm.set_attn_implementation("sdpa")
    lm.save_pretrained(folder)
    model = trained(folder, "prefix_tuning", {})
    model.module.eval()
    packed = batch([[*virtual_ids(COUNT), *text] for text in TEXTS], trained_from=COUNT + 1)
    peft = by_peft(model, "prefix_tuning", folder, tmp_path / "saved")
    expected = torch.cat([-logprobs(peft, text) for text in TEXTS])
    assert torch.allclose(model.module(**packed.inputs()), expected, atol=1e-5)
