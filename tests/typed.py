"""A user's code, which pyright reads in strict mode (test_printed.py)."""

import torch

import visionattn
from visionattn.layers import FocalModulation, NeighborhoodAttention2d

model = visionattn.create_model("dinat_mini", num_classes=10, features_only=False).eval()
logits = visionattn.quantize(model)(torch.randn(1, 3, 64, 64))
detector = visionattn.create_detector("dinat_mini", "fcos", num_classes=3, anchor_sizes=(8, 16))
segmenter = visionattn.create_segmenter("dinat_mini", "fpn", num_classes=3)
names: list[str] = visionattn.list_models("dinat_*", pretrained=True)
info = visionattn.model_info(names[0])
size: tuple[int, int, int] = info.input_size
top1: float | None = info.top1
transform = visionattn.data.create_transform(model)
block = NeighborhoodAttention2d(64, num_heads=2, kernel_size=7)
out: torch.Tensor = block(torch.randn(1, 8, 8, 64))
visionattn.set_pointwise("auto")
print(logits, detector, segmenter, size, top1, transform, FocalModulation(32, 3, 2), out.shape)
