"""What a probe looks at, as pictures."""

import torch
from PIL import Image
from torch import nn

from ..data.drawing import to_image
from ..data.preprocessing import model_preprocessing
from ..errors import VisionattnError
from ..explain.capture import Images, as_batch
from ..explain.map import HEAD_GATE, Map
from ..explain.pictures import panel_of, sheet
from .features import last_block
from .heads import AttentiveProbe


@torch.no_grad()
def attention_map(probe: AttentiveProbe, model: nn.Module, images: Images, class_token: bool = False) -> Map:
    """What every query of a probe weighs the places of images by: (batch, head, row, col).

    Args:
        probe: the head.
        model: the frozen backbone that it was trained for.
        images: prepared, (B, C, H, W) or (C, H, W); or pictures, which are prepared as the model's weights want.
        class_token: the probe takes the class token besides the patches; the weights are without that of this one.

    Raises:
        VisionattnError: if the probe is no `AttentiveProbe` or of other features, or there is no class token.
    """
    if not isinstance(probe, AttentiveProbe):
        raise VisionattnError(f"an AttentiveProbe has attention, a {type(probe).__name__} has none")
    patches, token = last_block(model, as_batch(model, images))
    x = patches.flatten(2).mT
    if class_token:
        if token is None:
            raise VisionattnError(f"{type(model).__name__} has no class token")
        x = torch.cat([token[:, None], x], 1)
    if x.shape[2] != probe.queries.shape[2]:
        told = f"{type(model).__name__} gives {x.shape[2]}"
        raise VisionattnError(f"the probe is for features of {probe.queries.shape[2]} channels, {told}")
    weights = probe.attention(x.to(probe.queries))
    values = weights[..., int(class_token) :].unflatten(2, patches.shape[2:])
    return Map("attention", values, HEAD_GATE, layer="probe")


def draw_attention(
    probe: AttentiveProbe, model: nn.Module, image: Image.Image | torch.Tensor, class_token: bool = False
) -> Image.Image:
    """A sheet of what the queries of a probe look at in an image: their mean, then each, 24 pictures at most.

    Args:
        probe: the head.
        model: the frozen backbone that it was trained for.
        image: a picture, which is prepared as the model's weights want; or prepared, (C, H, W).
        class_token: the probe takes the class token besides the patches.

    Raises:
        VisionattnError: as `attention_map`.
    """
    batch, own = as_batch(model, image), model_preprocessing(model)
    found = attention_map(probe, model, batch, class_token)
    shown = to_image(batch[0].cpu(), own["mean"], own["std"])
    heads = (None, *range(found.size("head")))
    return sheet([panel_of(found, shown, head) for head in heads])
