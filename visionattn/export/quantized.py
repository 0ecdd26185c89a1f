"""Exported models with int8 values, for CPUs."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from ..errors import optional


def quantize_onnx(file: Path, how: str, calibration: Sequence[Tensor]) -> None:
    """Rewrite an ONNX file with int8 values, by onnxruntime.

    Args:
        file: which is replaced.
        how: "weights" or "static", as for `export`.
        calibration: batches of images.
    """
    import onnx
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_dynamic,
        quantize_static,
    )

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(calibration)

        def get_next(self) -> dict | None:
            batch = next(self.batches, None)
            return None if batch is None else {"image": batch.numpy()}

    model = onnx.load(file)
    about = {entry.key: entry.value for entry in model.metadata_props}
    options = {"per_channel": True, "weight_type": QuantType.QInt8}
    if how == "weights":
        # A matrix for each head is no linear map, and onnxruntime makes nodes of those that it fails at.
        ranks = {tensor.name: len(tensor.dims) for tensor in model.graph.initializer}
        stay = [node.name for node in model.graph.node if any(ranks.get(name, 2) > 2 for name in node.input)]
        quantize_dynamic(model, file, op_types_to_quantize=["MatMul", "Gemm"], nodes_to_exclude=stay, **options)
    else:
        kinds = ["Conv", "MatMul", "Gemm"]
        quantize_static(model, file, Reader(), QuantFormat.QDQ, op_types_to_quantize=kinds, **options)
    model = onnx.load(file)
    onnx.helper.set_model_props(model, about)
    onnx.save(model, file)


def quantize_program(program: ExportedProgram, how: str, calibration: Sequence[Tensor]) -> nn.Module:
    """The module of a graph with int8 values, by torchao's quantizer for x86 CPUs.

    Args:
        program: the graph.
        how: "weights" or "static", as for `export`.
        calibration: batches of images.
    """
    with optional():
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
        from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
            X86InductorQuantizer,
            get_default_x86_inductor_quantization_config,
        )

    quantizer = X86InductorQuantizer()
    quantizer.set_global(get_default_x86_inductor_quantization_config(is_dynamic=how == "weights"))
    prepared = prepare_pt2e(program.module(), quantizer)
    with torch.no_grad():
        for batch in calibration:
            prepared(batch)
    return convert_pt2e(prepared)
