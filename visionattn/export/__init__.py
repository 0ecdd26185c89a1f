"""Models as files that run without this package: ONNX, torch.export, AOTInductor and OpenVINO.

Each file says of itself how images are prepared, which classes there are, what the model is called and under which
licence it is. It is compared with the model that it was made from before it is kept.
"""

from .about import about_model as about_model
from .files import Exported as Exported
from .files import export as export
from .files import export_aoti as export_aoti
from .files import export_onnx as export_onnx
from .files import export_openvino as export_openvino
from .files import export_torch as export_torch
from .running import load as load
