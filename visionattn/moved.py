"""Modules by the names that they had: these still work, with a line of warning."""

import sys
import warnings
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "extractors": "backbone.extractors",
    "files": "weights.files",
    "pickled": "weights.pickled",
    "download": "weights.download",
    "unwrap": "weights.unwrap",
    "description": "weights.description",
    "entries": "weights.entries",
    "sharing": "publish",
    "dense": "heads",
    "dense.features": "heads.pyramid",
    "dense.detection": "heads.detector create",
    "dense.segmentation": "heads.segmenter create",
    "dense.trained": "create",
    "data.datasets": "data.images",
    "data.dense_config": "data.config",
    "data.detection": "data.boxes",
    "data.segmentation": "data.maps",
    "predict": "training.predict",
    "training.folder": "training.checkpoint",
    "training.freeze": "training.build",
    "training.gallery": "training.logging",
    "training.measure": "training.evaluation",
    "training.profiler": "training.logging",
    "training.report": "training.run",
    "training.results": "training.evaluation",
    "training.signals": "training.guard",
}
"""Old names within the package, and those of today: of several modules where a part has gone elsewhere."""


class Moved(MetaPathFinder, Loader):
    """Finds modules by their old names."""

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        package, _, old = name.partition(".")
        if package != __package__ or old not in MOVED:
            return None
        return ModuleSpec(name, self, is_package=any(each.startswith(f"{old}.") for each in MOVED))

    def exec_module(self, module: ModuleType) -> None:
        today = [f"{__package__}.{name}" for name in MOVED[module.__name__.partition(".")[2]].split()]
        warnings.warn(f"{module.__name__} is called {' and '.join(today)} now", FutureWarning, stacklevel=2)
        for own in (import_module(name).__dict__ for name in today):
            module.__dict__.update({name: value for name, value in own.items() if not name.startswith("__")})


sys.meta_path.insert(0, Moved())  # before what finds a folder that an older version left
