"""What pyproject.toml cannot say: the recipes of configs/ go into the package."""

from pathlib import Path
from shutil import copytree

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithRecipes(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:  # where they are found beside the package
            copytree("configs", Path(self.build_lib) / "visionattn" / "recipes", dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithRecipes})
