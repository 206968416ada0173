"""Adds to the wheel what lies beside the package: recipes, launch files and files for clusters (`distft recipes`).

Everything else is said in pyproject.toml.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = ("recipes", "launch", "cluster")
"""Folders of the repository, which `distft/recipes.py` finds as distft/shipped/ in an installed package."""


class BuildWithShippedFiles(build_py):
    """Copy the folders into distft/shipped/ of what is built; an editable install reads them where they are."""

    def run(self) -> None:
        """Build as usual, then copy."""
        super().run()
        if self.editable_mode:
            return
        for folder in SHIPPED:
            target = Path(self.build_lib, "distft", "shipped", folder)
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(folder, target)


setup(cmdclass={"build_py": BuildWithShippedFiles})
