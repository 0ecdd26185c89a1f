"""Fine-tune a model on a folder of class folders, in a plain loop of one's own.

python examples/finetune_folder.py folder/of/classes [--model dinat_mini] [--pretrained] [--epochs 3]

`visionattn train --config recipe:finetune` does it with augmentation, validation, checkpoints and resuming.
"""

import argparse

import torch
from timm.optim import create_optimizer_v2
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

import visionattn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder")
    parser.add_argument("--model", default="dinat_mini")
    parser.add_argument("--pretrained", action="store_true")
    parser.add_argument("--epochs", type=int, default=3)
    args = parser.parse_args()
    images = ImageFolder(args.folder)
    model = visionattn.create_model(args.model, pretrained=args.pretrained, num_classes=len(images.classes))
    images.transform = visionattn.data.create_transform(model, is_training=True)
    loader = DataLoader(images, batch_size=16, shuffle=True)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=3e-4, weight_decay=0.05, layer_decay=0.75)
    for epoch in range(args.epochs):
        seen = correct = 0
        for batch, labels in loader:
            logits = model(batch)
            torch.nn.functional.cross_entropy(logits, labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            seen, correct = seen + len(labels), correct + (logits.argmax(1) == labels).sum().item()
        print(f"epoch {epoch + 1}: {100 * correct / seen:.1f} % of the training images")


if __name__ == "__main__":
    main()
