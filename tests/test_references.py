"""The references that ours are timed against (benchmarks/reference/) compute what the published code does."""

import ast
import importlib.util
from functools import cache
from math import prod
from pathlib import Path
from types import ModuleType

import golden
import numpy as np
import pytest
import torch

import visionattn
from visionattn.weights import convert_state_dict

ROOT = Path(__file__).parent.parent
REFERENCES = {path.stem: path for path in sorted((ROOT / "benchmarks" / "reference").glob("[!_]*.py"))}


@cache
def reference(family: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"reference_{family}", REFERENCES[family])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def covered(family: str) -> list[tuple[Path, dict]]:
    """The goldens of the variants that the reference has, in the layout that it has, the quickest first."""
    paths = sorted((Path(__file__).parent / "goldens" / family).glob("*.npz"))
    found = [(path, golden.load(path)[0]) for path in paths]
    found = [(path, meta) for path, meta in found if meta["create"]["name"] in reference(family).VARIANTS]
    sources = {meta["source"] for _, meta in found}
    layout = "official" if "official" in sources else next(iter(sources), None)  # timm's is HaloNet's only one
    found = [(path, meta) for path, meta in found if meta["source"] == layout]
    return sorted(found, key=lambda pair: pair[1]["num_params"] * prod(pair[1]["input_shape"]))


def blocks(family: str) -> list[tuple[Path, dict]]:
    """The goldens of blocks that the reference has under their published names."""
    paths = sorted((Path(__file__).parent / "goldens" / "mixers").glob("*.npz"))
    found = [(path, golden.load(path)[0]) for path in paths]
    return [(path, meta) for path, meta in found if hasattr(reference(family), meta["published"].partition(" ")[0])]


def cases() -> list:
    """The quickest golden of each family at once, the others when there is time."""
    return [
        pytest.param(family, path, id=path.stem, marks=[pytest.mark.slow] if i else [])
        for family in REFERENCES
        for i, (path, _) in enumerate(covered(family))
    ]


@pytest.mark.parametrize(
    ("family", "path"),
    [pytest.param(family, path, id=path.stem) for family in REFERENCES for path, _ in blocks(family)],
)
def test_parity_of_blocks(family, path):
    meta, arrays = golden.load(path)
    block = getattr(reference(family), meta["published"].partition(" ")[0])(**meta["kwargs"]).eval()
    block.load_state_dict(golden.fill_state_dict(meta["keys"]), strict=True)
    with torch.no_grad():
        found = block(torch.from_numpy(golden.fixed_input(tuple(meta["input_shape"]))).float())
    error = np.abs(found.numpy() - arrays["output"]).max()
    assert error <= meta["tolerance"]["float32"] * np.abs(arrays["output"]).max(), error


@pytest.mark.parametrize("family", [family for family in REFERENCES if not covered(family)])
def test_networks_of_which_only_blocks_have_goldens(family):
    """They are held to our own."""
    name = min(reference(family).VARIANTS, key=lambda name: visionattn.model_info(name).params)
    theirs, ours = reference(family).create_model(name).eval(), visionattn.create_model(name).eval()
    shapes = [[key, tuple(value.shape), str(value.dtype)[6:]] for key, value in theirs.state_dict().items()]
    theirs.load_state_dict(golden.fill_state_dict(shapes), strict=True)
    ours.load_state_dict(convert_state_dict(theirs.state_dict(), ours), strict=True)
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected = ours(x)
        torch.testing.assert_close(theirs(x), expected, rtol=0, atol=1e-4 * expected.abs().max().item())
    theirs.train()(x).square().mean().backward()
    gradient = next(theirs.parameters()).grad
    assert gradient.isfinite().all() and gradient.any()


@pytest.mark.parametrize(("family", "path"), cases())
def test_parity(family, path):
    meta, arrays = golden.load(path)
    name, kwargs = meta["create"]["name"], meta["create"]["kwargs"]
    try:
        model = reference(family).create_model(name, **kwargs)
    except TypeError as error:
        if not kwargs:
            raise
        pytest.skip(f"an option that the reference does not have: {error}")
    model.load_state_dict(golden.fill_state_dict(meta["keys"]), strict=True)
    x = torch.from_numpy(golden.fixed_input(tuple(meta["input_shape"])))
    tolerance = meta["tolerance"]
    dtype = torch.float64 if tolerance["float32"] is None else torch.float32  # a selection may turn on ties
    with torch.no_grad():
        found = model.to(dtype).eval()(x.to(dtype))
    error = np.abs(found.numpy() - arrays["logits"]).max()
    assert error <= tolerance[str(dtype).removeprefix("torch.")] * np.abs(arrays["logits"]).max(), error
    x = x.repeat(2, 1, 1, 1)[:2].float()  # some norms take no batch of one
    model.float().train()(x).square().mean().backward()
    gradient = next(model.parameters()).grad
    assert gradient.isfinite().all() and gradient.any()


@pytest.mark.parametrize("family", REFERENCES)
def test_a_golden_covers_it(family):
    assert covered(family) or blocks(family)
    assert set(reference(family).VARIANTS) <= set(visionattn.list_models())


@pytest.mark.slow
@pytest.mark.parametrize("family", REFERENCES)
def test_variants_are_those_under_60_million_parameters(family):
    infos = [visionattn.model_info(name) for name in visionattn.list_models() if not name.startswith("test_")]
    sizes = {info.name: info.params for info in infos if info.family == family and info.params < 60e6}
    sizes = {name: size for name, size in sizes.items() if not name.endswith("_reparam")}  # merged kernels
    assert {name for name in reference(family).VARIANTS if visionattn.model_info(name).params < 60e6} == set(sizes)
    for name, size in sizes.items():
        assert sum(p.numel() for p in reference(family).create_model(name).parameters()) == size, name


@pytest.mark.parametrize("family", REFERENCES)
def test_independent(family):
    """A reference that took something of ours would be timed against itself."""
    imports = [node for node in ast.walk(ast.parse(REFERENCES[family].read_text())) if hasattr(node, "names")]
    names = {getattr(node, "module", None) or alias.name for node in imports for alias in node.names}
    allowed = {"collections", "functools", "itertools", "math", "timm", "torch", "torchvision"}
    assert {name.split(".")[0] for name in names} <= allowed
