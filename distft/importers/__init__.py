"""A configuration file of another tool goes in; a recipe with comments comes out: one file per tool, one line here."""

from distft.core.registry import Registry
from distft.importers import axolotl, llama_factory, openai, torchtune, trl
from distft.importers.importing import import_config
from distft.importers.spec import Imported, ImporterSpec, ImportOptions, Remark

IMPORTERS: Registry[ImporterSpec] = Registry("importer")
IMPORTERS.add(axolotl.SPEC)
IMPORTERS.add(llama_factory.SPEC)
IMPORTERS.add(trl.SPEC)
IMPORTERS.add(torchtune.SPEC)
IMPORTERS.add(openai.SPEC)

__all__ = ["IMPORTERS", "ImportOptions", "Imported", "ImporterSpec", "Remark", "import_config"]
