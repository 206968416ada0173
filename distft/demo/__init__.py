"""The embedded default: a task, a tokenizer and a tiny model that need no download."""

from distft.demo.files import locate_path, resolve_paths

__all__ = ["locate_path", "resolve_paths"]
