"""Distributions moved towards a teacher's: the same numbers and gradients as from whole logits."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import batch, build, documents

from distft.core.types import Batch
from distft.model import cross_entropy
from distft.model.divergence import TeacherHead
from distft.model.policy import ModelPolicy

MIXTURE = 0.3
KINDS = ("forward", "reverse", "js")


def dense(student: torch.Tensor, teacher: torch.Tensor, kind: str) -> torch.Tensor:
    """Return the divergence of each row of logits in float64, by the definition."""
    p, q = (logits.double().softmax(-1) for logits in (student, teacher))
    mixed = MIXTURE * q + (1 - MIXTURE) * p

    def kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a * (a / b).log()).sum(-1)

    return {
        "forward": kl(q, p), "reverse": kl(p, q), "js": MIXTURE * kl(q, mixed) + (1 - MIXTURE) * kl(p, mixed),
    }[kind]  # fmt: skip


def whole_logits(module: Any, micro: Batch) -> torch.Tensor:
    bounds = {"cu_seq_lens_q": micro.cu_seqlens, "max_length_q": micro.max_seqlen}
    ids, positions = micro.input_ids_T[None], micro.position_ids_T[None]
    return module.lm(input_ids=ids, position_ids=positions, use_cache=False, **bounds).logits[0]


@pytest.mark.parametrize("adapted", [False, True], ids=["plain head", "head under LoRA"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_that_of_whole_logits(
    tiny_config: Path, monkeypatch: pytest.MonkeyPatch, kind: Any, adapted: bool
) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 3 * 4 * 128)  # a few tokens at a time
    params = {"r": 4, "target_modules": ["lm_head", "q_proj"]} if adapted else None
    student = build(tiny_config, "lora" if adapted else "full", params=params, seed=1).module
    if adapted:
        torch.manual_seed(3)
        for name, param in student.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(param.data, std=0.3)
    teacher_module = build(tiny_config, seed=2).module
    for param in teacher_module.parameters():
        param.data.mul_(2.0)  # surer than the student
    micro, head, temperature = batch(documents([9, 6, 4])), TeacherHead(), 0.7
    teacher = ModelPolicy(teacher_module.eval(), teacher=head)
    policy = ModelPolicy(student, temperature, head)
    with torch.no_grad():
        hidden = teacher.teacher_hidden(micro)
    assert hidden.shape == (micro.num_supervised, teacher_module.transformer.config.hidden_size)
    divergence, logprob = policy.divergence(micro, hidden, kind, MIXTURE)
    divergence.sum().backward()
    got = {name: param.grad.clone() for name, param in student.named_parameters() if param.grad is not None}
    student.zero_grad()

    at = micro.labels_T != -100
    mine, theirs = (whole_logits(module, micro)[at] / temperature for module in (student, teacher_module))
    right = dense(mine, theirs.detach(), kind)
    torch.testing.assert_close(divergence.double(), right, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(logprob, mine.log_softmax(-1).gather(1, micro.labels_T[at][:, None])[:, 0].detach())
    right.sum().backward()
    grads = {name: param.grad for name, param in student.named_parameters() if param.grad is not None}
    assert got.keys() == grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-3, atol=1e-5, msg=name)


def test_from_itself_it_is_0_and_ids_of_one_model_alone_are_left_out(tiny_config: Path) -> None:
    module, micro, head = build(tiny_config, seed=1).module, batch(documents([9, 6])), TeacherHead()
    policy = ModelPolicy(module, teacher=head)
    hidden = policy.teacher_hidden(micro).detach()
    for kind in KINDS:
        assert float(policy.divergence(micro, hidden, kind, MIXTURE)[0].abs().max()) < 1e-6
    assert head.weight_VE is not None
    head.weight_VE = torch.cat([head.weight_VE, torch.full_like(head.weight_VE[:5], 9.0)])  # filled up further
    for kind in KINDS:
        assert float(policy.divergence(micro, hidden, kind, MIXTURE)[0].abs().max()) < 1e-6
    head.weight_VE = head.weight_VE[:-9]
    assert torch.isfinite(policy.divergence(micro, hidden, "js", MIXTURE)[0]).all()


def test_without_answers_every_parameter_has_a_gradient_of_0(tiny_config: Path) -> None:
    """Ranks run the same collectives."""
    module, head = build(tiny_config, seed=1).module, TeacherHead()
    policy, filled = ModelPolicy(module, teacher=head), batch(documents([9]))
    policy.teacher_hidden(filled)
    empty = batch([[1]])
    assert empty.num_supervised == 0
    hidden = policy.teacher_hidden(empty).detach()
    divergence, _ = policy.divergence(empty, hidden, "reverse", MIXTURE)
    divergence.sum().backward()
    assert all(param.grad is not None and not param.grad.any() for param in module.parameters())
