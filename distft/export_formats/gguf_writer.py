"""Writes a model folder as one GGUF file, a tensor at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distft.core.errors import DataError
from distft.export_formats.gguf_architecture import Family, converter, family_of, metadata, rope_factors
from distft.export_formats.gguf_vocabulary import Vocabulary, read_vocabulary
from distft.model.tensor_files import TensorFiles

if TYPE_CHECKING:
    import numpy as np

_MARKS = re.compile(r"\{%(-?)\s*(end)?generation\s*(-?)%\}")
_COMPUTED = ".rotary_emb.inv_freq"
"""Old files carry it; it follows from the config."""
_F16_MAX = 65504.0


@dataclass(frozen=True, kw_only=True)
class GgufLevel:
    """How exactly the matrices are stored; vectors are fp32 at every level."""

    name: str
    quant: str
    """`gguf.GGMLQuantizationType` of the matrices."""
    file_type: str
    """`gguf.LlamaFileType`."""
    block: int
    """Rows are stored in blocks of so many numbers; a row that is no multiple of it cannot be."""


LEVELS = {
    level.name: level
    for level in (
        GgufLevel(name="F32", quant="F32", file_type="ALL_F32", block=1),
        GgufLevel(name="F16", quant="F16", file_type="MOSTLY_F16", block=1),
        GgufLevel(name="BF16", quant="BF16", file_type="MOSTLY_BF16", block=1),
        GgufLevel(name="Q8_0", quant="Q8_0", file_type="MOSTLY_Q8_0", block=32),
        GgufLevel(name="Q5_1", quant="Q5_1", file_type="MOSTLY_Q5_1", block=32),
        GgufLevel(name="Q4_0", quant="Q4_0", file_type="MOSTLY_Q4_0", block=32),
    )
}
"""Levels that gguf-py writes, most exact first."""


def write_gguf(
    model: Path, file: Path, level: GgufLevel, *, name: str, tokenizer: Any, stop_ids: tuple[int, ...]
) -> None:
    """Write the model of a folder.

    Args:
        model: folder of a whole model.
        file: what to write; it does not exist.
        level: how the matrices are stored.
        name: `general.name` of the file.
        tokenizer: the model's fast tokenizer with its chat template.
        stop_ids: tokens that end an answer, the most usual one first.

    Raises:
        DataError: llama.cpp does not know such a model or tokenizer, or the level does not fit its shapes.
    """
    import gguf
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model, local_files_only=True)
    family = family_of(config)
    vocabulary = read_vocabulary(tokenizer, config.vocab_size)
    if reason := misfit(model, level):
        raise DataError(f"--level {level.name}: {reason}")
    writer = gguf.GGUFWriter(file, family.arch)
    try:
        writer.add_type("model")
        writer.add_name(name)
        writer.add_file_type(gguf.LlamaFileType[level.file_type])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for method, arguments in metadata(config, family):
            getattr(writer, method)(*arguments)
        _add_vocabulary(writer, vocabulary, stop_ids)
        if tokenizer.chat_template:
            writer.add_chat_template(served_template(tokenizer.chat_template))
        _write_tensors(writer, model, config, family, level)
    finally:
        writer.close()


def served_template(template: Any) -> str:
    """Return a chat template without marks of what is trained, which other Jinja readers refuse.

    Raises:
        DataError: there are several, of which a GGUF file holds one.
    """
    if not isinstance(template, str):
        raise DataError("the tokenizer has several chat templates, and one goes into the file  fix: keep one of them")
    return _MARKS.sub(lambda mark: f"{{%{mark[1]} {'endif' if mark[2] else 'if true'} {mark[3]}%}}", template)


def _add_vocabulary(writer: Any, vocabulary: Vocabulary, stop_ids: tuple[int, ...]) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.add_space_prefix)
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    named = {"bos": vocabulary.bos_id, "unk": vocabulary.unk_id, "pad": vocabulary.pad_id}
    named |= dict(zip(("eos", "eot", "eom"), stop_ids, strict=False))  # more than three: the certificate sees
    for role, token in named.items():
        if token is not None:
            getattr(writer, f"add_{role}_token_id")(token)


def _write_tensors(writer: Any, model: Path, config: Any, family: Family, level: GgufLevel) -> None:
    """Write names, shapes and types of all tensors, then one tensor after another."""
    import gguf

    files, convert, factors = TensorFiles(model), converter(config, family), rope_factors(config)
    planned = list(_planned(files, config, family, level))
    for _, target, shape, quant in planned:
        _add_info(writer, target, shape, quant)
    if factors is not None:
        _add_info(writer, "rope_freqs.weight", tuple(factors.shape), gguf.GGMLQuantizationType.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, _, _, quant in planned:
        writer.write_tensor_data(_stored(name, convert(name, files.read(name)), quant))
    if factors is not None:
        writer.write_tensor_data(factors.numpy())


def _planned(
    files: TensorFiles, config: Any, family: Family, level: GgufLevel
) -> Iterator[tuple[str, str, tuple[int, ...], Any]]:
    """Yield name in the folder, name in the file, shape and type of each tensor that is written.

    Raises:
        DataError: llama.cpp has no such tensor.
    """
    import gguf

    arch = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[family.arch]
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name in sorted(files.entries):
        shape = files.entries[name].shape
        if name.endswith(_COMPUTED) or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise DataError(f"{name}: llama.cpp's {family.arch} has no such tensor  fix: export it as safetensors")
        yield name, target, shape, gguf.GGMLQuantizationType[level.quant if len(shape) > 1 else "F32"]


def misfit(model: Path, level: GgufLevel) -> str:
    """Return why rows of the model's matrices cannot be stored at a level; "" where they can."""
    widths = {name: entry.shape[-1] for name, entry in TensorFiles(model).entries.items() if len(entry.shape) > 1}
    for name, width in sorted(widths.items()):
        if width % level.block:
            fit = ", ".join(one.name for one in LEVELS.values() if width % one.block == 0)
            return f"{name}: rows of {width} numbers are no multiple of {level.block}  allowed: {fit}"
    return ""


def _add_info(writer: Any, name: str, shape: tuple[int, ...], quant: Any) -> None:
    import gguf
    import numpy as np

    block, size = gguf.GGML_QUANT_SIZES[quant]
    num_bytes = torch.Size(shape).numel() // block * size
    writer.add_tensor_info(name, shape, np.dtype(np.float32), num_bytes, raw_dtype=quant)


def _stored(name: str, tensor: Tensor, quant: Any) -> np.ndarray[Any, Any]:
    """Return the bytes of a tensor at its level.

    Raises:
        DataError: it holds numbers that are not finite, or too large for the level.
    """
    import gguf

    values = tensor.float()
    if not bool(values.isfinite().all()):
        raise DataError(f"{name}: holds numbers that are not finite; the model is broken, and nothing is written")
    largest = float(values.abs().max())
    if quant == gguf.GGMLQuantizationType.F16 and largest > _F16_MAX:
        raise DataError(f"{name}: holds {largest:g}, more than F16 can ({_F16_MAX:g})  allowed: F32, BF16")
    return gguf.quantize(values.contiguous().numpy(), quant)
