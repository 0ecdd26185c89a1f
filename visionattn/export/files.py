"""Writing models as files of other programs, each compared with its model before it is kept."""

import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from ..errors import VisionattnError, one_line, optional, require, user_input
from ..quantize import is_quantized
from ..weights.files import place
from .about import about_model, as_text, task_of
from .folder import folder_beside
from .graph import NAMES, graphs_of, make_program, sizes_of, traced
from .quantized import quantize_onnx, quantize_program
from .running import EXTRA, NAME, TOLERANCE, as_list, disagreement, load, usual_disagreement

LARGEST = 2**31 - 2**20
"""Bytes of an ONNX file with its weights inside: protobuf's limit, less the rest of the file."""
REWRITTEN = 10_000
"""Most nodes of an ONNX graph that onnxscript rewrites, whose time goes with their square; larger ones are folded."""
INT8 = ("weights", "static")


@dataclass(frozen=True)
class Exported:
    """A file that was written.

    Args:
        path: of the file.
        disagreement: largest difference from the model at `shapes`, in parts of its largest number if that is above 1;
            of a file with int8 values, that of rounding.
        shapes: of the images that it was compared at.
        about: what the file says of itself.
        usual: where `disagreement` is above `TOLERANCE`, as ranks of values turn on last digits: what most images
            differ by, and by how much float32 itself differs from float64 at most.
    """

    path: Path
    disagreement: float
    shapes: list[tuple[int, ...]]
    about: dict[str, Any]
    usual: tuple[float, float] | None = None


@dataclass(frozen=True)
class Order:
    """What a file is to hold.

    Args:
        model: in eval mode.
        about: what the file says of itself.
        size: of `export`; so are the others.
        int8: likewise.
        calibration: likewise.
        opset: likewise.
    """

    model: nn.Module
    about: dict[str, Any]
    size: tuple[int, int] | None
    int8: str | None
    calibration: Sequence[Tensor]
    opset: int | None


def export(
    model: nn.Module,
    path: str | os.PathLike,
    kind: str = "onnx",
    size: tuple[int, int] | None = None,
    int8: str | None = None,
    calibration: Sequence[Tensor] = (),
    opset: int | None = None,
    overwrite: bool = False,
) -> Exported:
    """Write a model as a file of another program, which is compared with it before it is kept.

    Args:
        model: in eval mode; a classifier, a feature extractor (`features_only=True`), a segmenter or a detector. A
            detector takes one image (1, C, H, W) of a fixed size.
        path: of the file: `*.onnx`, `*.pt2` (torch, aoti) or `*.xml` (openvino).
        kind: "onnx", "torch", "aoti" or "openvino".
        size: fixed height and width; None: they are left open, as the batch always is.
        int8: "weights": linear maps with int8 weights, and inputs that are rounded in every call; "static":
            convolutions too, and inputs rounded by what `calibration` shows. None: float32.
        calibration: images (B, C, H, W), prepared as the model wants them.
        opset: version of ONNX's operators; None: torch's choice.
        overwrite: replace a file that is there.

    Raises:
        VisionattnError: if the model cannot be exported so, or what runs the file does not compute what the model does.
        NotInstalledError: if what writes or runs the file is not installed.
    """
    if kind not in FORMATS:
        raise VisionattnError(f"expected kind one of {', '.join(FORMATS)}, got {kind!r}")
    if opset is not None and kind != "onnx":
        raise VisionattnError(f"opset is of ONNX files: {kind} has none")
    wanted, path = FORMATS[kind], Path(path)
    wanted.check()
    if is_quantized(model):
        raise VisionattnError("graphs do not round inputs as int8 weights want it: export the model itself, with int8")
    module = traced(model)
    check_place(path, wanted.suffix, overwrite)
    if int8 not in (None, *INT8):
        raise VisionattnError(f"expected int8 one of {', '.join(INT8)}, got {int8}")
    if int8 and task_of(model) == "detection":
        raise VisionattnError("int8 is for classifiers, features and segmenters: boxes do not survive the rounding")
    if int8 == "static" and not len(calibration):
        raise VisionattnError("int8 static needs images to find the ranges of values with: give calibration (--data)")
    about = about_model(model) | {
        "format": kind,
        "int8": int8,
        "size": list(size) if size else None,
    }
    shapes = sizes_of(model, size)
    if task_of(model) == "detection":
        about["size"] = list(shapes[0][2:])
    with user_input(f"cannot write {path}", OSError), folder_beside(path) as folder:
        file = folder / path.name
        try:
            with _silence():
                wanted.write(file, Order(model, about, size, int8, calibration, opset))
        except (VisionattnError, OSError):
            raise
        except Exception as error:  # exporters and compilers raise whatever they like
            raise VisionattnError(f"cannot export {about['model']} to {kind}: {one_line(error)}") from error
        run, said = load(file)
        hint = "" if size else ", at open sizes: fix height and width (--size)"
        try:
            far, usual = disagreement(run, module, shapes), None
            unlike = not far <= TOLERANCE and not int8
            if unlike and any(getattr(layer, "by_rank", False) for layer in module.modules()):
                usual = usual_disagreement(run, module, shapes)
        except Exception as error:  # so do those that run what they made
            raise VisionattnError(f"{path} is not kept: {kind} fails with it{hint} ({one_line(error)})") from error
        if unlike and not (usual and usual[0] <= max(TOLERANCE, 2 * usual[1]) < float("inf")):
            if TOLERANCE < disagreement(lambda x: as_list(module(x)), module, shapes) < float("inf"):
                hint = ", which draws noise at every call and so is as far from itself"
            raise VisionattnError(f"{path} is not kept: it is {far:.1e} from what the model computes{hint}")
        written = sorted(folder.iterdir(), key=lambda each: each.name == path.name)  # the file itself comes last
        for each in written:
            place(each, path.with_name(each.name), overwrite)
    return Exported(path, far, shapes, said, usual)


def export_onnx(model: nn.Module, path: str | os.PathLike, **options: Any) -> Exported:
    """`export` of an ONNX file, with its weights inside unless they are over 2 GB."""
    return export(model, path, "onnx", **options)


def export_torch(model: nn.Module, path: str | os.PathLike, **options: Any) -> Exported:
    """`export` of a program of torch.export, which `torch.export.load(path).module()` runs.

    What it says of itself is the extra file `visionattn.json`. With `int8`, round values stand in the graph for a
    compiler to make use of: AOTInductor or torch.compile; as it is, it computes with them in float32.
    """
    return export(model, path, "torch", **options)


def export_aoti(model: nn.Module, path: str | os.PathLike, **options: Any) -> Exported:
    """`export` of a package of AOTInductor, compiled for the machine that it is made on, which
    `torch._inductor.aoti_load_package(path)` runs without Python code of the model.

    What it says of itself is in `get_metadata()` of the loaded package.
    """
    return export(model, path, "aoti", **options)


def export_openvino(model: nn.Module, path: str | os.PathLike, **options: Any) -> Exported:
    """`export` of OpenVINO's two files, `*.xml` and `*.bin` beside it, by its own converter from ONNX.

    What they say of themselves is in the model's `rt_info` under "visionattn", as JSON.
    """
    return export(model, path, "openvino", **options)


def check_place(path: Path, suffix: str, overwrite: bool) -> None:
    """Refuse a path that cannot be written, before any work.

    Raises:
        VisionattnError: if it ends otherwise, is there, or its folder is not.
    """
    if path.suffix != suffix:
        raise VisionattnError(f"expected a name that ends in {suffix}, got {path}")
    if path.exists() and not overwrite:
        raise VisionattnError(f"{path} exists: choose another name, or replace it with --overwrite")
    if not path.parent.is_dir():
        raise VisionattnError(f"cannot write {path}: {path.parent} is not a folder")


def _write_onnx(file: Path, order: Order) -> None:
    from onnxscript.optimizer import fold_constants, remove_unused_nodes

    names = {"input_names": ["image"], "output_names": order.about["outputs"]}
    options = {"dynamo": True, "opset_version": order.opset, "verbose": False, "optimize": False, **names}
    if task_of(order.model) == "detection":
        program = torch.onnx.export(make_program(order.model, order.size), **options)
    else:  # from the module: graphs of torch.export with open sizes hold for maps of more than one tile alone
        axes = {axis: name for axis, name in NAMES.items() if axis == 0 or order.size is None}
        image = torch.randn(2, *sizes_of(order.model, order.size)[0][1:])
        with torch.no_grad(), graphs_of(order.model):
            program = torch.onnx.export(traced(order.model), (image,), dynamic_shapes=(axes,), **options)
    assert program is not None
    graph = program.model.graph
    if len(graph) > REWRITTEN:
        fold_constants(program.model)
        remove_unused_nodes(program.model)
    else:
        program.optimize()
    program.model.metadata_props.update(as_text(order.about | {"opset": program.model.opset_imports[""]}))
    weights = sum(value.const_value.nbytes for value in graph.initializers.values() if value.const_value is not None)
    program.save(file, external_data=weights > LARGEST)
    if order.int8:
        quantize_onnx(file, order.int8, order.calibration)


def _write_torch(file: Path, order: Order) -> None:
    torch.export.save(_program(order), str(file), extra_files={EXTRA: json.dumps(as_text(order.about))})


def _write_aoti(file: Path, order: Order) -> None:
    options: dict[str, Any] = {"aot_inductor.metadata": as_text(order.about)}
    if order.int8:
        options["freezing"] = True  # which is where int8 products are recognised
    program = _program(order)
    with torch.no_grad():
        torch._inductor.aoti_compile_and_package(program, package_path=str(file), inductor_configs=options)


def _write_openvino(file: Path, order: Order) -> None:
    import openvino

    between = file.with_suffix(".onnx")
    _write_onnx(between, order)
    converted = openvino.convert_model(between)
    converted.set_rt_info(json.dumps(as_text(order.about)), [NAME])
    openvino.save_model(converted, file, compress_to_fp16=False)
    between.unlink()


def _program(order: Order) -> ExportedProgram:
    program = make_program(order.model, order.size)
    if not order.int8:
        return program
    return make_program(order.model, order.size, quantize_program(program, order.int8, order.calibration))


def _check_compiler() -> None:
    if not any(map(shutil.which, (os.environ.get("CXX") or "g++", "clang++"))):
        raise VisionattnError("AOTInductor needs a C++ compiler: install g++, or name one in CXX")


@dataclass(frozen=True)
class Format:
    """What files are of one kind.

    Args:
        suffix: of their names.
        write: writes one.
        check: refuses a machine that lacks what it takes.
    """

    suffix: str
    write: Callable[[Path, Order], None]
    check: Callable[[], None] = lambda: None


ONNX = "onnx", "onnxscript", "onnxruntime"
FORMATS = {
    "onnx": Format(".onnx", _write_onnx, partial(require, *ONNX)),
    "torch": Format(".pt2", _write_torch),
    "aoti": Format(".pt2", _write_aoti, _check_compiler),
    "openvino": Format(".xml", _write_openvino, partial(require, "openvino", *ONNX)),
}


@contextmanager
def _silence() -> Iterator[None]:
    """Exporters log and warn of what a user cannot act on."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), optional():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
