"""Imports run one way, by folder, and in no circle: those inside functions count too."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent / "visionattn"
ORDER = (
    *(
        "errors version",
        "progress measure",
        "layers data",
        "arguments",
        "backbone",
        "registry quantize",
        "recipes",
        "weights",
    ),
    *(
        "models",
        "heads swap",
        "create",
        "macs",
        "publish explain outward",
        "monitoring",
        "export probes tasks",
        "reports",
        "training",
        "demo",
    ),
    *("cli", "moved __main__", "visionattn"),
)
"""Each imports what is before it and its own folder; those on one place know nothing of each other."""
RANKS = {name: rank for rank, names in enumerate(ORDER) for name in names.split()}


def modules() -> dict[str, Path]:
    found = {path.relative_to(ROOT.parent).with_suffix("").parts: path for path in ROOT.rglob("*.py")}
    return {".".join(parts[:-1] if parts[-1] == "__init__" else parts): path for parts, path in found.items()}


def imported(name: str, path: Path, known: dict[str, Path]) -> Iterator[str]:
    """The modules of ours that a module imports anywhere."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *filter(None, [node.module])])
            names = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base for alias in node.names]
        else:
            continue
        yield from (each for each in names if each in known)


def folder(name: str) -> str:
    return (name.split(".")[1:] or [name])[0]


def test_imports_run_one_way():
    known = modules()
    graph = {name: set(imported(name, path, known)) for name, path in known.items()}
    assert graph["visionattn.create"] >= {"visionattn.registry", "visionattn.heads.detector"}  # the lazy ones
    upward = [
        f"{name} imports {target}"
        for name, targets in graph.items()
        for target in sorted(targets)
        if folder(target) != folder(name) and RANKS[folder(target)] >= RANKS[folder(name)]
    ]
    assert not upward
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_no_class_holds_a_partial_that_python_3_14_takes_for_a_method():
    """It is a descriptor there: `self.made_by(x)` would get `self` too."""
    found = []
    for name, path in modules().items():
        for each in ast.walk(ast.parse(path.read_text())):
            values = [line.value for line in each.body if hasattr(line, "value")] if type(each) is ast.ClassDef else []
            calls = [value.func for value in values if isinstance(value, ast.Call)]
            found += [
                f"{name}.{each.name}" for call in calls if getattr(call, "attr", getattr(call, "id", "")) == "partial"
            ]
    assert not found
