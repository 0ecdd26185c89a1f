"""Running exported files, and comparing them with the models that they were made from."""

import copy
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor

from ..errors import VisionattnError, optional, user_input

Run = Callable[[Tensor], list[Tensor]]
"""Takes images (B, C, H, W) and gives what the model returns."""
NAME = "visionattn"
"""Of the entry of OpenVINO's files that says what they are of."""
EXTRA = f"{NAME}.json"
"""The same in torch.export's files."""
TOLERANCE = 1e-4
"""Of a file's output, to that of the model, times the largest number of the latter if that is above 1."""
IMAGES = 5
"""Of each shape, where most of them count."""


def load(path: str | Path) -> tuple[Run, dict]:
    """An exported file, by what runs it, and what it says of itself.

    Args:
        path: .onnx (onnxruntime), .xml (OpenVINO) or .pt2 (torch.export and AOTInductor).

    Raises:
        VisionattnError: if it cannot be read, or is none of these.
    """
    path = Path(path)
    if path.suffix not in LOADERS:
        raise VisionattnError(f"expected an exported file, one of {', '.join(LOADERS)}, got {path}")
    with optional(), user_input(f"cannot read {path}", Exception):  # runtimes raise whatever they like
        run, about = LOADERS[path.suffix](path)
    return run, {key: _value(text) for key, text in about.items()}


def _value(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _load_onnx(path: Path) -> tuple[Run, dict]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    about = session.get_modelmeta().custom_metadata_map
    return lambda x: [torch.from_numpy(np.asarray(out)) for out in session.run(None, {name: x.numpy()})], about


def _load_openvino(path: Path) -> tuple[Run, dict]:
    import openvino

    core = openvino.Core()
    config = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    model = core.read_model(path)
    compiled = core.compile_model(model, "CPU", config)
    about = json.loads(model.get_rt_info([NAME]).astype(str)) if model.has_rt_info([NAME]) else {}
    return lambda x: [torch.from_numpy(out.copy()) for out in compiled(x.numpy()).values()], about


def _load_pt2(path: Path) -> tuple[Run, dict]:
    if "torchao" not in sys.modules:
        _register_quantized_operations()
    from torch.export.pt2_archive._package import load_pt2

    package = load_pt2(str(path))
    model = package.exported_programs.get("model")
    if model is None:
        compiled = torch._inductor.aoti_load_package(str(path))
        return lambda x: as_list(compiled(x)), {
            key: value for key, value in compiled.get_metadata().items() if not key.startswith("AOTI")
        }
    module = model.module()
    return lambda x: as_list(module(x)), json.loads(package.extra_files.get(EXTRA, "{}"))


def _register_quantized_operations() -> None:
    """What graphs with int8 values call, which torch knows once this is imported."""
    import torch.ao.quantization.fx._decomposed  # noqa: F401


def as_list(out: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """What a model or file returns, as a list."""
    return list(out) if isinstance(out, (list, tuple)) else [out]


LOADERS = {".onnx": _load_onnx, ".xml": _load_openvino, ".pt2": _load_pt2}


@torch.no_grad()
def disagreement(run: Run, model: torch.nn.Module, shapes: Sequence[tuple[int, ...]], seed: int = 0) -> float:
    """How far what a file gives is from what the model does, in parts of the largest number if that is above 1.

    Args:
        run: the file's.
        model: its `traced` module.
        shapes: of the images.
        seed: of the images.
    """
    worst, generator = 0.0, torch.Generator().manual_seed(seed)
    for shape in shapes:
        x = torch.randn(shape, generator=generator)
        found, expected = run(x), as_list(model(x))
        if [tuple(out.shape) for out in found] != [tuple(out.shape) for out in expected]:
            return float("inf")
        for out, theirs in zip(found, expected, strict=True):
            if theirs.numel():
                scale = max(1.0, theirs.abs().max().item())
                if not math.isfinite(far := (out - theirs).abs().max().item() / scale):
                    return float("inf")  # of numbers that are none, max() takes the other
                worst = max(worst, far)
    return worst


def usual_disagreement(run: Run, model: torch.nn.Module, shapes: Sequence[tuple[int, ...]]) -> tuple[float, float]:
    """The disagreement of most images, and how far a model in float32 is at most from itself in float64.

    Where layers go by the rank of values (`by_rank`), what runs a file may put two of them the other way round, as they
    differ in the last digits. On small maps this befalls a few images, on large ones all, and float32 itself as much.

    Args:
        run: the file's.
        model: its `traced` module.
        shapes: of the images.
    """
    precise = copy.deepcopy(model).double()
    sides = run, lambda x: as_list(precise(x.double()))
    file, own = ([[disagreement(f, model, [s], i) for i in range(IMAGES)] for s in shapes] for f in sides)
    return max(map(median, file)), max(map(max, own))
