"""Put a block of visionattn in the place of the attention of a timm ViT, and train one step.

python examples/swap_attention.py
"""

import timm
import torch
from torch import nn

from visionattn.layers import NeighborhoodAttention2d


class OnGrid(nn.Module):
    """A block of maps for tokens: (B, N, C) to the same, the tokens being a square map in row-major order.

    Args:
        block: of (B, H, W, C).
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor, **_) -> torch.Tensor:  # timm's blocks name a mask, which there is none of here
        side = round(x.shape[1] ** 0.5)
        return self.block(x.unflatten(1, (side, side))).flatten(1, 2)


def main() -> None:
    model = timm.create_model("vit_tiny_patch16_224", class_token=False, global_pool="avg", num_classes=10, depth=4)
    for block in model.blocks:
        block.attn = OnGrid(NeighborhoodAttention2d(model.embed_dim, model.embed_dim // 32, kernel_size=7))
    images, labels = torch.randn(2, 3, 224, 224), torch.tensor([1, 7])
    loss = nn.functional.cross_entropy(model(images), labels)
    loss.backward()
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
