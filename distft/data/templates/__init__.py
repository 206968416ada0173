"""Built-in chat templates, with generation marks around what an assistant turn adds, end-of-turn token included."""

from importlib import resources
from pathlib import Path

from distft.core.errors import DataError
from distft.core.registry import nearest

BUILT_IN = ("chatml", "llama3", "plain")


def read_template(setting: str) -> str | None:
    """Return the Jinja text of a built-in name or a `.jinja` file; None for "auto", which is the tokenizer's own.

    Raises:
        DataError: neither a built-in name nor a readable file.
    """
    if setting == "auto":
        return None
    if setting in BUILT_IN:
        return resources.files(__name__).joinpath(f"{setting}.jinja").read_text(encoding="utf-8")
    if not setting.endswith(".jinja"):
        meant = nearest(setting, BUILT_IN)
        hint = f', did you mean "{meant}"?' if meant else ""
        raise DataError(
            f'chat_template = "{setting}": unknown template{hint}  '
            f"allowed: auto, {', '.join(BUILT_IN)}, or a file ending in .jinja"
        )
    try:
        return Path(setting).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        here = "" if Path(setting).expanduser().is_absolute() else f" (relative to {Path.cwd()})"
        raise DataError(f'chat_template = "{setting}": cannot read it: {error}{here}') from None
