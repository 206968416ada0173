"""The flags of `distft merge`, apart from its code: help is instant."""

from __future__ import annotations

from pathlib import Path

from distft.core.command_line import CommandParser, add_json

DTYPES = ("bfloat16", "float16", "float32")


def parser() -> CommandParser:
    """Return the parser of the command line."""
    made = CommandParser(
        prog="distft merge",
        description="Merge an adapter into its base: a whole model folder, compared with the adapter on held-out rows. "
        "LoRA with rsLoRA, DoRA, biases, patterns, modules_to_save, embeddings and experts, IA3, trainable tokens. "
        "Prompts and prefixes are refused: they change no weights.",
    )
    made.add_argument("source", metavar="SOURCE", help="a run's folder, an adapter's folder, or a hub id")
    made.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder that appears, whole or not at all")
    made.add_argument("--base", metavar="MODEL", help="folder or hub id of the base, when it is another than is named")
    made.add_argument("--dtype", choices=DTYPES, help="type of the merged weights (the base's)")
    made.add_argument("--rows", metavar="FILE", help="rows to compare on (the run's held-out rows); none: not compared")
    made.add_argument(
        "--max-kl", type=float, metavar="NATS",
        help="largest KL(adapter || merged) a token, else no folder and exit code 5 (float32 1e-6, float16 5e-4, "
        "bfloat16 5e-3, --quantize 0.05)",
    )  # fmt: skip
    made.add_argument(
        "--quantize", action="store_true", help="of a run with a 4-bit base: store the merged matrices in 4 bits again"
    )
    add_json(made)
    return made
