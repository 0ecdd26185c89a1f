"""What visionattn raises when it was asked for something it cannot do. The message is one line."""


class VisionattnError(ValueError):
    """A request that cannot be met; says what was given and what is accepted."""


class UnknownModelError(VisionattnError, RuntimeError):
    """No model is registered under a name."""


class UnknownArgumentError(VisionattnError, TypeError):
    """A model does not take an argument of that name."""
