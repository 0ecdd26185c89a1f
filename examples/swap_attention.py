"""Put a block of visionattn in the place of the attention of a timm ViT, and train one step.

python examples/swap_attention.py
"""

import timm
import torch
from torch import nn

import visionattn


def main() -> None:
    model = timm.create_model("vit_tiny_patch16_224", class_token=False, global_pool="avg", num_classes=10, depth=4)
    visionattn.replace_attention(model, "neighborhood", kernel_size=7)  # of maps, hence no class token
    images, labels = torch.randn(2, 3, 224, 224), torch.tensor([1, 7])
    loss = nn.functional.cross_entropy(model(images), labels)
    loss.backward()
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
