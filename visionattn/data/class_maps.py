"""Which of a model's classes those of a data set are, ImageNet's names in their several forms included."""

import re

from timm.data import ImageNetInfo

from ..errors import VisionattnError
from .images import ImageSet

WNID = re.compile(r"n\d{8}")
"""Name of a WordNet synset, as folders of ImageNet and its variants are called."""


def match_classes(images: ImageSet, classes: list[str] | None, num_classes: int, model: str) -> list[int]:
    """The outputs of a model that stand for the classes of a data set, in the order of the data's labels.

    Data of synsets that are a part of the model's classes, as ImageNet-A and -R, are to be judged among these alone
    and get no other outputs. In all other cases the model's other classes follow, so that they can be mistaken for.

    Args:
        images: the data set. Its classes go by the model's names, for ImageNet by synsets (ImageNet-Sketch, -A, -R) or
            by index (ImageNet-V2).
        classes: the model's classes, where its checkpoint tells; else a model of 1000 is taken for one of ImageNet-1k
            if the names of the data say so, and classes that are as many are matched by position.
        num_classes: number of the model's outputs.
        model: name of the model, for errors.

    Raises:
        VisionattnError: if the data has other classes than the model.
    """
    found, synsets = images.classes, ImageNetInfo().label_names()
    if set(found) == {str(index) for index in range(len(synsets))} and "0" not in (classes or ()):
        found = [synsets[int(name)] for name in found]
    if classes is None and num_classes == len(synsets) and set(found) <= set(synsets):
        classes = synsets
    if len(classes or found) != num_classes:
        raise VisionattnError(f"{model} tells {num_classes} classes apart, {images.name} has {len(classes or found)}")
    if classes is None:
        return list(range(num_classes))
    if unknown := sorted(set(found) - set(classes)):
        few = ", ".join(unknown[:5]) + (", ..." if len(unknown) > 5 else "")
        raise VisionattnError(f"{images.name} holds classes that the model was not trained on: {few}")
    position = {name: index for index, name in enumerate(classes)}
    outputs = [position[name] for name in found]
    if all(WNID.fullmatch(name) for name in found):
        return outputs
    return outputs + sorted(set(range(num_classes)) - set(outputs))
