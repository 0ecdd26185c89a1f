"""Classify images with a file of `visionattn export`, without visionattn: python onnx_runtime.py model.onnx cat.jpg"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
about = session.get_modelmeta().custom_metadata_map
how, classes = json.loads(about["preprocessing"]), json.loads(about["classes"])
channels, height, width = how["input_size"]
for path in sys.argv[2:]:
    image = ImageOps.exif_transpose(Image.open(path)).convert("L" if channels == 1 else "RGB")
    scale = max(height / image.height, width / image.width) / how["crop_pct"]
    size = round(image.width * scale), round(image.height * scale)
    image = image.resize(size, Image.Resampling[how["interpolation"].upper()])
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    x = np.asarray(image.crop((left, top, left + width, top + height)), np.float32).reshape(height, width, channels)
    x = ((x / 255 - np.float32(how["mean"])) / np.float32(how["std"])).transpose(2, 0, 1)[None]
    logits = session.run(None, {"image": x})[0][0]
    chances = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    for i in chances.argsort()[::-1][:5]:
        print(f"{path}: {100 * chances[i]:.1f} % {classes[i] if classes else i}")
