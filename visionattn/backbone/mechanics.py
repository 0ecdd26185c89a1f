"""What a model adds to the training loop."""

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor, nn

from ..errors import VisionattnError


class Mechanics:
    """What a paper adds to the training loop. This base adds nothing, and serves models that know nothing of it.

    Attributes:
        learns_from_teacher: whether the paper says how the model learns from a teacher, see `learn_from`.
    """

    learns_from_teacher: ClassVar[bool] = False

    def advance(self, epoch: float) -> None:
        """Follow the paper's own schedules. Called before every update of a training run.

        Args:
            epoch: time since the start of the run in epochs, 2.5 in the middle of the third.
        """

    def learning_rates(self) -> dict[str, float]:
        """Factors on the peak learning rate for parameters that the paper trains at another one, by pattern of names.

        Warm-up and end of the schedule are as for the others.
        """
        return {}

    def learn_from(self, teacher: nn.Module) -> None:
        """Take a teacher, for `training_loss`. It is not a part of the model, nor trained, moved or saved with it.

        Args:
            teacher: a model of what the paper distils from, on the device of this one.

        Raises:
            VisionattnError: if the model has no use for a teacher, or not for this one.
        """
        raise VisionattnError(f"{type(self).__name__} learns from no teacher")

    def training_loss(
        self, loss: Tensor, images: Tensor, logits: Tensor, criterion: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Add the paper's own terms to the loss of a classifier. Called after a forward pass in training mode.

        Args:
            loss: of the task.
            images: what the model was called with.
            logits: what it returned.
            criterion: the task's loss of other logits for the same images.

        Returns:
            the loss to minimise.
        """
        return loss
