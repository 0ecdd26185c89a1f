"""What the benchmarks have in common besides `visionattn.measure`: their parser, and files that are in no package."""

import argparse
import importlib.util
from functools import cache
from pathlib import Path
from types import ModuleType

from visionattn.errors import VisionattnError

REFERENCES = {path.stem: path for path in sorted((Path(__file__).parent / "reference").glob("*.py"))}


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line, as those of the other scripts."""

    def error(self, message: str):
        raise VisionattnError(f"{message}; see --help")


@cache
def reference(family: str) -> ModuleType:
    """benchmarks/reference/<family>.py."""
    return load(REFERENCES[family])


def load(path: Path) -> ModuleType:
    """A module that is in no package."""
    spec = importlib.util.spec_from_file_location(f"_{path.parent.name}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
