"""Find the images most like another by the pooled features of a backbone.

python examples/retrieval.py folder/of/images query.jpg [--model dinat_mini] [--pretrained] [--top 5]
"""

import argparse
from pathlib import Path

import torch
from PIL import Image

import visionattn


def features(model: torch.nn.Module, files: list[Path]) -> torch.Tensor:
    """Pooled features of images, of length 1: (N, C)."""
    transform = visionattn.data.create_transform(model)
    with torch.inference_mode():
        rows = [model(transform(Image.open(file).convert("RGB"))[None])[0] for file in files]
    return torch.nn.functional.normalize(torch.stack(rows), dim=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("query", type=Path)
    parser.add_argument("--model", default="dinat_mini")
    parser.add_argument("--pretrained", action="store_true")
    parser.add_argument("--top", type=int, default=5)
    args = parser.parse_args()
    model = visionattn.create_model(args.model, pretrained=args.pretrained, num_classes=0).eval()
    files = sorted(file for file in args.folder.rglob("*") if file.suffix.lower() in (".png", ".jpg", ".jpeg"))
    similarity = features(model, files) @ features(model, [args.query])[0]
    for i in similarity.argsort(descending=True)[: args.top].tolist():
        print(f"{similarity[i]:.3f}  {files[i]}")


if __name__ == "__main__":
    main()
