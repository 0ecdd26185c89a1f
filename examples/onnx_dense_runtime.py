"""Draw what a segmenter or a detector finds, with a file of `visionattn export` and without visionattn:

python onnx_dense_runtime.py model.onnx street.jpg found.png
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageDraw, ImageOps

session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
about = session.get_modelmeta().custom_metadata_map
how, classes = json.loads(about["preprocessing"]), json.loads(about["classes"])
channels, size = how["input_size"][0], json.loads(about["size"])
image = ImageOps.exif_transpose(Image.open(sys.argv[2])).convert("L" if channels == 1 else "RGB")

# As large as fits into a file of fixed size, at the top left; zeros, which are the mean colour, beside it.
height, width = size or (image.height, image.width)
scale = min(height / image.height, width / image.width)
small = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.BILINEAR)
pixels = np.asarray(small, np.float32).reshape(small.height, small.width, channels) / 255
x = np.zeros((1, channels, height, width), np.float32)
x[0, :, : small.height, : small.width] = ((pixels - how["mean"]) / how["std"]).transpose(2, 0, 1)
found = dict(zip(json.loads(about["outputs"]), session.run(None, {"image": x}), strict=True))

if about["task"] == "segmentation":
    labels = found["logits"][0].argmax(0)[: small.height, : small.width].astype(np.uint8)
    for label, count in zip(*np.unique(labels, return_counts=True), strict=True):
        print(f"{classes[label] if classes else label}: {100 * count / labels.size:.1f} %")
    Image.fromarray(labels).resize(image.size, Image.Resampling.NEAREST).save(sys.argv[3])
else:
    picture = image.convert("RGB")
    boxes = (found["boxes"] / scale).clip(0, [*image.size, *image.size])
    for box, label, score in zip(boxes, found["labels"], found["scores"], strict=True):
        if score >= 0.5 and (box[2:] > box[:2]).all():  # what lies beside the image has no size left
            ImageDraw.Draw(picture).rectangle(box.tolist(), outline="red", width=2)
            print(f"{classes[label - 1] if classes else label}: {100 * score:.1f} % at {box.round().tolist()}")
    picture.save(sys.argv[3])
