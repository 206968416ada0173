"""Writes a model folder as one GGUF file, a tensor at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distft.core.errors import DataError
from distft.export_formats.gguf_architecture import Family, converter, family_of, metadata, rope_factors
from distft.export_formats.gguf_levels import LEVELS, GgufLevel, ModelShape, tensor_type
from distft.export_formats.gguf_vocabulary import Vocabulary, read_vocabulary
from distft.model.tensor_files import TensorFiles

if TYPE_CHECKING:
    import numpy as np

_MARKS = re.compile(r"\{%(-?)\s*(end)?generation\s*(-?)%\}")
_COMPUTED = ".rotary_emb.inv_freq"
"""Old files carry it; it follows from the config."""
_F16_MAX = 65504.0
_ENDS_BY_TEXT = {
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}
"""Key of `tokenizer.ggml` -> texts that llama.cpp takes for that token (`llama_vocab::impl::load`)."""


def write_gguf(
    model: Path,
    file: Path,
    level: GgufLevel,
    *,
    name: str,
    tokenizer: Any,
    stop_ids: tuple[int, ...],
    importance: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the model of a folder.

    Args:
        model: folder of a whole model.
        file: what to write; it does not exist.
        level: how the matrices are stored.
        name: `general.name` of the file.
        tokenizer: the model's fast tokenizer with its chat template.
        stop_ids: tokens that end an answer, the most usual one first.
        importance: name in the folder -> how much an error of each column weighs, fp32 [I], for levels that take it.

    Raises:
        DataError: llama.cpp does not know such a model or tokenizer, the level does not fit its shapes, or a matrix has
            no importance.
        MachineError: the level's quantiser is not there.
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
        _write_tensors(writer, model, config, family, level, importance)
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
    # llama.cpp finds these three by their texts and ends an answer at each. With a stop token in their place it does
    # not look, and an answer goes on behind them as in the source; what is lost is filling in code across files.
    for role, texts in _ENDS_BY_TEXT.items():
        found = {vocabulary.tokens.index(text) for text in texts if text in vocabulary.tokens}
        if found and not found <= set(stop_ids):
            writer.add_uint32(f"tokenizer.ggml.{role}_token_id", stop_ids[0])


def _write_tensors(
    writer: Any, model: Path, config: Any, family: Family, level: GgufLevel, importance: Mapping[str, Tensor] | None
) -> None:
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
    for name, target, _, quant in planned:
        weights = _weights(name, target, quant, importance)
        writer.write_tensor_data(_stored(name, convert(name, files.read(name)), quant, weights))
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
    model_shape = ModelShape(
        arch=family.arch,
        num_layers=config.num_hidden_layers,
        queries_per_key=config.num_attention_heads // config.num_key_value_heads,
        tied=config.tie_word_embeddings,
    )
    for name in sorted(files.entries):
        shape = files.entries[name].shape
        if name.endswith(_COMPUTED) or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise DataError(f"{name}: llama.cpp's {family.arch} has no such tensor  fix: export it as safetensors")
        quant = tensor_type(level, target, len(shape), model_shape)
        yield name, target, shape, gguf.GGMLQuantizationType[quant]


def misfit(model: Path, level: GgufLevel) -> str:
    """Return why rows of the model's matrices cannot be stored at a level; "" where they can."""
    widths = {name: entry.shape[-1] for name, entry in TensorFiles(model).entries.items() if len(entry.shape) > 1}
    for name, width in sorted(widths.items()):
        if width % level.block:
            fit = ", ".join(other.name for other in LEVELS.values() if width % other.block == 0)
            silently = ", and llama.cpp would store them in another type and say nothing" if level.is_mixed else ""
            return f"{name}: rows of {width} numbers are no multiple of {level.block}{silently}  allowed: {fit}"
    return ""


def _add_info(writer: Any, name: str, shape: tuple[int, ...], quant: Any) -> None:
    import gguf
    import numpy as np

    block, size = gguf.GGML_QUANT_SIZES[quant]
    num_bytes = torch.Size(shape).numel() // block * size
    writer.add_tensor_info(name, shape, np.dtype(np.float32), num_bytes, raw_dtype=quant)


def _weights(
    name: str, target: str, quant: Any, importance: Mapping[str, Tensor] | None
) -> np.ndarray[Any, Any] | None:
    """Return the importance of a matrix's columns, where its type takes one.

    An embedding that is no head is read row by row: no input weighs its columns.

    Raises:
        DataError: calibration saw nothing go into the matrix.
    """
    if importance is None or not quant.name.endswith("_K"):
        return None
    if name not in importance and target == "token_embd.weight":
        return None
    if name not in importance:
        raise DataError(
            f"{name}: calibration measured no input of it, and llama.cpp would round it as if none was wanted  "
            "fix: --calibration none"
        )
    return importance[name].float().contiguous().numpy()


def _stored(
    name: str, tensor: Tensor, quant: Any, importance: np.ndarray[Any, Any] | None = None
) -> np.ndarray[Any, Any]:
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
    if quant.name.endswith("_K"):
        from distft.export_formats.llama_cpp_quantizer import quantize_rows

        return quantize_rows(values.contiguous().numpy(), quant.name, importance)
    return gguf.quantize(values.contiguous().numpy(), quant)
