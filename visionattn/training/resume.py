"""What a run takes over from its last checkpoint, whatever options have changed since that was written."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..arguments import describe, fits
from ..errors import VisionattnError, user_input
from ..weights import load_checkpoint
from ..weights.description import read_description
from .checkpoint import read_training_state
from .sharding import whole

if TYPE_CHECKING:
    from .trainer import Trainer

POSITION = ("epoch", "update", "train_loss", "counted", "ranking", "last_is_good")
"""Attributes of a Trainer that say where the run is."""
STATE = {
    **dict.fromkeys(("epoch", "update", "counted"), int),
    "train_loss": float,
    "ranking": Sequence[Sequence[float]],
    "last_is_good": bool,
    **dict.fromkeys(("schedule", "guard", "optimizer"), Mapping),
    **dict.fromkeys(("scaler", "raw_weights", "projection"), Mapping | None),
}
"""Entries of a training state."""
RATES = ("lr", "initial_lr", "lr_scale", "weight_decay", "betas", "eps", "momentum", "beta1", "max_lr_snapshot")
"""What groups of an optimizer hold of the options; the rest is its state."""


def state_of(trainer: "Trainer") -> dict[str, Any]:
    """What `restore` needs, besides the weights; complete in the main process alone, but all of them call this."""
    main, scaler = trainer.accelerator.is_main_process, trainer.accelerator.scaler
    distils = trainer.student is not trainer.bare_model
    return {
        **{name: getattr(trainer, name) for name in POSITION},
        "classes": trainer.classes,
        "images_per_update": trainer.sampler.images_per_update,
        "schedule": trainer.schedule.state_dict(),
        "guard": trainer.guard.state_dict(),
        "optimizer": _by_name(whole(trainer.optimizer.state_dict(), main), _names(trainer))
        | {"name": trainer.config.optim.name.lower()},
        "scaler": scaler.state_dict() if scaler else None,
        "raw_weights": whole(trainer.bare_model.state_dict(), main) if trainer.ema else None,
        "projection": trainer.student.projection.state_dict() if distils else None,
    }


def restore(trainer: "Trainer", path: Path) -> None:
    """Bring a run to where it was when a checkpoint was written, as far as its options are still the same.

    Args:
        trainer: Of the run.
        path: Of the checkpoint.

    Raises:
        VisionattnError: If the checkpoint cannot be read, or does not fit the options.
    """
    if not path.is_file():
        raise VisionattnError(f"cannot resume {trainer.folder}: it has no checkpoints/{path.name}")
    state = read_training_state(path)
    for name, kind in STATE.items():
        if not isinstance(state, dict) or not fits(state.get(name, ...), kind):
            told = f"its training state is not what train.py writes (entry {name}: expected {describe(kind)})"
            raise VisionattnError(f"cannot resume from {path}: {told}")
    if state.get("classes", trainer.classes) != trainer.classes:
        raise VisionattnError(f"cannot resume {trainer.folder}: its classes are not those of the data, in their order")
    load_checkpoint(trainer.bare_model, path)
    if trainer.ema:
        trainer.ema.set(trainer.bare_model)
    if state["raw_weights"]:
        trainer.bare_model.load_state_dict(state["raw_weights"])
    if trainer.student is not trainer.bare_model and state["projection"]:
        with user_input(f"cannot resume {trainer.folder} with another teacher", RuntimeError):
            trainer.student.projection.load_state_dict(state["projection"])
    with user_input(f"cannot resume {trainer.folder} with these options", ValueError, KeyError, VisionattnError):
        optimizer = _carried_over(trainer, state["optimizer"])
        trainer.optimizer.load_state_dict(optimizer)
    if trainer.accelerator.scaler is not None and state["scaler"]:
        trainer.accelerator.scaler.load_state_dict(state["scaler"])
    trainer.schedule.load_state_dict(state["schedule"])
    trainer.guard.load_state_dict(state["guard"])
    for name in POSITION:
        setattr(trainer, name, state[name])
    before, now = state.get("images_per_update", 0), trainer.sampler.images_per_update
    if before and before != now:  # the epoch goes on after as many images, to the update
        trainer.update = min(trainer.update * before // now, trainer.updates)
    # Weights are missing where fewer were kept before, or a run was killed between a checkpoint and the next one.
    checkpoints = path.parent
    trainer.ranking = [own for own in trainer.ranking if _is_kept(checkpoints, own[1])]


def _is_kept(checkpoints: Path, epoch: float) -> bool:
    if (checkpoints / f"epoch-{epoch}.safetensors").is_file():
        return True
    try:
        return read_description(checkpoints / "best.safetensors").get("epoch") == epoch
    except VisionattnError:  # missing or damaged
        return False


def _names(trainer: "Trainer") -> list[str]:
    """Name of each parameter of the optimizer, in its order."""
    modules = (trainer.student, trainer.bare_model)
    names = {parameter: name for module in modules for name, parameter in module.named_parameters()}
    return [names[parameter] for group in trainer.optimizer.param_groups for parameter in group["params"]]


def _by_name(state: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """An optimizer's `state_dict` by the names of its parameters, which outlive another choice or order of them."""
    groups = [group | {"params": [names[i] for i in group["params"]]} for group in state["param_groups"]]
    return {**state, "state": {names[i]: values for i, values in state["state"].items()}, "param_groups": groups}


def _carried_over(trainer: "Trainer", saved: dict[str, Any]) -> dict[str, Any]:
    """A saved state as `load_state_dict` takes it of an optimizer whose options or parameters may have changed.

    Rates, decay and the like are those of the options. Parameters that are new to it, and all of those of another
    optimizer, begin afresh.
    """
    fresh, names, optimizer = trainer.optimizer.state_dict(), _names(trainer), trainer.config.optim.name.lower()
    if "name" not in saved:  # by number, as runs of earlier versions have it
        if sum(len(group["params"]) for group in saved["param_groups"]) != len(names):
            raise VisionattnError("the optimizer has other parameters than when it was saved")
        saved = _by_name(saved, names)
    if saved.pop("name", optimizer) != optimizer:
        return fresh
    homes = {name: group for group in saved["param_groups"] for name in group["params"]}
    state = {i: saved["state"][name] for i, name in enumerate(names) if name in saved["state"]}
    groups = []
    for group in fresh["param_groups"]:
        home = next((homes[names[i]] for i in group["params"] if names[i] in homes), {})
        kept = {key: value for key, value in home.items() if key not in RATES}
        groups.append(group | kept | {"params": group["params"]})
    return {**saved, "state": fresh["state"] | state, "param_groups": groups}
