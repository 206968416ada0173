"""`ollama`: a GGUF file with a Modelfile: template, stop texts, context, system text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from distft.core.errors import DataError
from distft.core.registry import Params
from distft.export_formats import gguf_file
from distft.export_formats.gguf_vocabulary import puts_bos
from distft.export_formats.spec import Exported, ExportFormatSpec, FormatInputs, Proof

if TYPE_CHECKING:
    from distft.export_formats.source import ModelSource

MODELFILE = "Modelfile"
_QUOTES = '"""'


class OllamaParams(Params):
    """What the Modelfile says besides."""

    system: str = ""
    """System text of chats that have none; empty: none."""
    context: int = Field(default=0, ge=0)
    """num_ctx; 0: as much as the model was made for, at most 8192."""


def _refuses(params: OllamaParams, source: ModelSource) -> str:
    if _QUOTES in params.system:
        return 'system holds """, which ends a text of a Modelfile'
    return gguf_file.SPEC.refuses(None, source)


def _write(params: OllamaParams, inputs: FormatInputs, folder: Path, level: str) -> Exported:
    from distft.export_formats import go_template

    reference = inputs.reference()
    if not reference.tokenizer.chat_template:
        raise DataError("the tokenizer has no chat template, and Ollama serves chats  fix: export it as gguf")
    exported = gguf_file.SPEC.write(None, inputs, folder, level)
    template = go_template.write(go_template.find(lambda chat, ask: _rendered(inputs, chat, ask)))
    file = folder / modelfile_name(level)
    file.write_text(_modelfile(params, inputs, exported.files[0], template), encoding="utf-8")
    name = inputs.source.name.lower()
    commands = (f"ollama create {name} -f PATH/{file.name}", f"ollama run {name}")
    return replace(exported, files=(*exported.files, file.name), commands=commands)


def modelfile_name(level: str) -> str:
    """Return the name of a level's Modelfile."""
    return f"{MODELFILE}.{level}"


def _modelfile(params: OllamaParams, inputs: FormatInputs, file: str, template: str) -> str:
    reference = inputs.reference()
    longest = reference.model.config.max_position_embeddings
    lines = [f"FROM ./{file}", f"TEMPLATE {_QUOTES}{template}{_QUOTES}"]
    if params.system:
        lines.append(f"SYSTEM {_QUOTES}{params.system}{_QUOTES}")
    lines.append(f"PARAMETER num_ctx {params.context or min(longest, 8192)}")
    for token in reference.stop_ids:
        text = reference.tokenizer.convert_ids_to_tokens(token)
        lines.append(f'PARAMETER stop "{text}"')
    return "\n".join(lines) + "\n"


def _rendered(inputs: FormatInputs, chat: Sequence[Mapping[str, Any]], ask: bool) -> str:
    """Render as the source does, without the beginning that llama.cpp puts before every text by itself."""
    tokenizer = inputs.reference().tokenizer
    text = str(tokenizer.apply_chat_template(list(chat), tokenize=False, add_generation_prompt=ask))
    return text.removeprefix(tokenizer.bos_token) if puts_bos(tokenizer) else text


def read_modelfile(file: Path) -> dict[str, list[str]]:
    """Return the values of each instruction of a Modelfile, quotes removed; `PARAMETER stop` is an instruction.

    Raises:
        DataError: a text does not end.
    """
    found: dict[str, list[str]] = {}
    rest = file.read_text(encoding="utf-8")
    while rest.strip():
        word, _, rest = rest.lstrip().partition(" ")
        if word == "PARAMETER":
            name, _, rest = rest.partition(" ")
            word = f"{word} {name}"
        if rest.startswith(_QUOTES):
            value, end, rest = rest[len(_QUOTES) :].partition(_QUOTES)
            if not end:
                raise DataError(f"{file.name}: a text of {word} does not end")
        else:
            value, _, rest = rest.partition("\n")
            value = value.strip().strip('"')
        found.setdefault(word, []).append(value)
    return found


def _prove(params: OllamaParams, inputs: FormatInputs, folder: Path, level: str) -> Proof:
    from distft.export_formats import comparing
    from distft.export_formats.go_template import render_go
    from distft.export_formats.spec import Comparison

    proof = gguf_file.SPEC.prove(None, inputs, folder, level)
    reference, rows = inputs.reference(), inputs.rows()
    said = read_modelfile(folder / modelfile_name(level))
    template = said["TEMPLATE"][0]

    def ids_of(chat: Sequence[dict[str, Any]]) -> list[int]:
        bos = [reference.tokenizer.bos_token_id] if puts_bos(reference.tokenizer) else []
        return bos + list(reference.tokenizer(render_go(template, chat), add_special_tokens=False)["input_ids"])

    rendered = comparing.rendering(reference, rows, ids_of, name="Go template")
    texts = set(said.get("PARAMETER stop", []))
    wanted = {reference.tokenizer.convert_ids_to_tokens(token) for token in reference.stop_ids}
    stops = Comparison(
        name="stop texts", compared="PARAMETER stop against the source's stop tokens", count=len(wanted),
        value=len(texts ^ wanted), bound="0 that differ", ok=texts == wanted, detail=", ".join(sorted(texts ^ wanted)),
    )  # fmt: skip
    runtime = (
        f"{proof.runtime}; the Go template by this project's own evaluator, not by Ollama" if proof.runtime else ""
    )
    return Proof(
        runtime=runtime,
        checks=[*proof.checks, rendered, stops],
        figures=proof.figures,
        task=proof.task,
        unproven=proof.unproven,
    )


SPEC = ExportFormatSpec(
    name="ollama",
    title="a GGUF file with a Modelfile for Ollama",
    write=_write,
    prove=_prove,
    params=OllamaParams,
    levels=gguf_file.SPEC.levels,
    default_level=gguf_file.SPEC.default_level,
    refuses=_refuses,
    calibrates=gguf_file.SPEC.calibrates,
    lacks=gguf_file.SPEC.lacks,
)
