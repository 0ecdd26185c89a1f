"""The tasks, and what has to be known of each before it is used: its class may need libraries that are optional."""

from typing import Literal, NamedTuple

AUGMENTATION = ("augment", "data.img_size", "data.eval_img_size", "data.interpolation", "data.crop_mode")
"""What images with a class have where those with annotations have joint."""
ANNOTATED = ("probe", "probing", "data.labels", "data.crop_pct", "data.download", *AUGMENTATION)
OF_OTHERS = {"class": ("annotations", "joint"), "objects": ANNOTATED, "map": ANNOTATED}
"""Options of other samples."""


class Known(NamedTuple):
    """A line of `TASKS`.

    Args:
        place: module and name of the class, a `Task`: "package.module:Class".
        sample: what comes with an image: a class, or several; objects; or a map of its pixels. Images with a class are
            prepared by the options augment and data.img_size, those whose annotations move along by joint.
        head: what is built on a backbone where no head is named; empty if there are no heads.
        useless: options that it has no use for, groups of them among them, besides those of other samples and of
            heads that there are none of.
    """

    place: str
    sample: Literal["class", "objects", "map"]
    head: str = ""
    useless: tuple[str, ...] = ()

    @property
    def of_no_use(self) -> tuple[str, ...]:
        """All options that it has no use for."""
        return (*self.useless, *OF_OTHERS[self.sample], *(() if self.head else ("head", "head_kwargs")))


TASKS = {
    "classification": Known(
        "visionattn.tasks.classification:Classification", "class", useless=("loss.dice", "loss.auxiliary")
    ),
    "detection": Known(
        "visionattn.tasks.detection:Detection",
        "objects",
        "fcos",
        ("loss", "tta", "joint.max_class_share", "distill", "fuse", "int8"),
    ),
    "segmentation": Known(
        "visionattn.tasks.segmentation:Segmentation",
        "map",
        "fpn",
        (
            *("loss.smoothing", "loss.bce", "loss.bce_threshold", "loss.bce_sum", "loss.multi_label", "tta.crops"),
            *("joint.detr_crop", "annotations.box_format", "distill", "fuse", "int8", "data.val_fraction"),
        ),
    ),
}
"""By the names that the option task takes. A task from outside the package adds its line before options are read."""
