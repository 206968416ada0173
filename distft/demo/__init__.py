"""The embedded default: a task, a tokenizer and a tiny model that need no download."""

from distft.demo.files import locate, locate_path

__all__ = ["locate", "locate_path"]
