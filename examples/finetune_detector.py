"""Train a detector on boxes of one's own in a plain loop; here squares on noise, made as they are asked for.

python examples/finetune_detector.py [--model test_van] [--steps 20]

`visionattn train --task detection --data.root FOLDER` reads COCO, YOLO, VOC and CVAT, validates and saves.
"""

import argparse

import torch
from torch import Tensor

import visionattn


def sample(size: int = 128) -> tuple[Tensor, dict[str, Tensor]]:
    """An image with a bright square, and torchvision's target for it: boxes (1, 4) in pixels, labels from 1."""
    side = int(torch.randint(24, 64, ()))
    x, y = torch.randint(0, size - side, (2,)).tolist()
    image = torch.rand(3, size, size) * 0.3
    image[:, y : y + side, x : x + side] += 0.6
    return image, {"boxes": torch.tensor([[x, y, x + side, y + side]]).float(), "labels": torch.tensor([1])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="test_van")
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    torch.manual_seed(0)
    detector = visionattn.create_detector(args.model, "fcos", num_classes=1, min_size=128, max_size=128)
    optimizer = torch.optim.AdamW(detector.parameters(), 1e-3)
    for step in range(args.steps):
        images, targets = zip(*(sample() for _ in range(4)), strict=True)
        losses = detector(list(images), list(targets))
        sum(losses.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 9 or step == args.steps - 1:
            print(f"step {step + 1}: " + ", ".join(f"{name} {loss.item():.3f}" for name, loss in losses.items()))
    image, target = sample()
    found = detector.eval()([image])[0]
    print(f"{len(found['boxes'])} boxes; there is one at {target['boxes'][0].tolist()}")


if __name__ == "__main__":
    main()
