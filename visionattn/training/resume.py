"""What of a run its checkpoints keep, and what it takes over from them, whatever options have changed since."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from ..arguments import describe, fits
from ..errors import VisionattnError, user_input
from ..weights import load_checkpoint
from ..weights.description import read_description
from .checkpoint import Saved, keep_best, link, make_folder, read_saved, save_checkpoint, training_state, without_nan
from .sharding import whole
from .yaml_text import plain

POSITION = {
    **dict.fromkeys(("epoch", "update", "counted"), int),
    "train_loss": float,
    "ranking": Sequence[Sequence[float]],
    "last_is_good": bool,
}
"""Attributes of a run that say where it is, and their types."""
STATE = POSITION | {
    **dict.fromkeys(("schedule", "guard", "optimizer"), Mapping),
    **dict.fromkeys(("scaler", "raw_weights", "projection"), Mapping | None),
}
"""Entries of a training state."""
RATES = ("lr", "initial_lr", "lr_scale", "weight_decay", "betas", "eps", "momentum", "beta1", "max_lr_snapshot")
"""What groups of an optimizer hold of the options; the rest is its state."""


class Kept:
    """A run as its checkpoints know it; the Trainer makes what it consists of."""

    def __init__(self) -> None:
        self.epoch = self.update = 0  # where the next update is
        self.train_loss, self.counted = 0.0, 0  # sum over the updates of this epoch that were not skipped; how many
        self.ranking: list[list[float]] = []  # (score, epoch) of the best epochs, which are kept
        self.last_is_good = True  # whether a rollback may go to the last checkpoint
        self.has_saved = False  # whether there is more than the run began with

    @property
    def best(self) -> float | None:
        """The best metric of an epoch so far."""
        return self.ranking[0][0] if self.ranking else None

    def told_best(self) -> str:
        """The best metric of an epoch so far, in words."""
        if self.best is None:
            why = ": each ended in skipped updates, try a lower --optim.lr" if self.guard.in_a_row else ""
            return f"no best among {self.epoch} epochs{why}"
        value = self.task.told(self.best if self.best >= 0 else math.nan)
        return f"best {self.task.metric} {value} in {self.epoch} epochs"

    def validated_weights(self) -> nn.Module:
        """The model that is validated and kept."""
        return self.ema.module if self.ema else self.bare_model

    def _begin(self) -> None:
        """Make the run folder, at once with options and a checkpoint in it: it can be resumed from then on."""
        contents = self._contents(state=True)

        def fill(folder: Path) -> None:
            save_checkpoint(folder / "checkpoints" / "last.safetensors", *contents)

        folder = [make_folder(self.config, fill)] if self.accelerator.is_main_process else [None]
        self.folder = broadcast_object_list(folder)[0]

    def _roll_back(self) -> None:
        """Go on from the last good checkpoint, with a lower learning rate."""
        counters, factor, last_is_good = self.guard.state_dict(), self.schedule.factor, self.last_is_good
        last, good = (self.folder / "checkpoints" / f"{name}.safetensors" for name in ("last", "good"))
        path = last if last_is_good or not good.is_file() else good  # no good one where rollbacks were off
        self.go_on_from(read_saved(path))
        self.last_is_good = last_is_good  # which is about the file, and that has not changed
        self.guard.load_state_dict(counters | {"in_a_row": 0})
        self.schedule.factor = factor * self.config.guard.rollback_lr_factor

    def _save_last(self, metrics: dict[str, float] | None = None, regular: bool = True) -> None:
        """Write the checkpoint that a run is resumed from.

        Rollbacks go to those that are written at regular times and have no skipped updates at their end, whether or not
        the run was interrupted in between. The last of these is kept as `good` where it is not `last`.
        """
        last, good = (self.folder / "checkpoints" / f"{name}.safetensors" for name in ("last", "good"))
        is_good = regular and not self.guard.in_a_row
        main = self.accelerator.is_main_process
        if main and self.last_is_good and not is_good and self.config.guard.on_divergence == "rollback":
            link(last, good)
        self.last_is_good = is_good
        self._save("last", metrics, state=True)
        if main and is_good:
            good.unlink(missing_ok=True)

    def _save(self, name: str, metrics: dict[str, float] | None = None, state: bool = False) -> None:
        """Write a checkpoint; with `state`, one that can be resumed."""
        contents = self._contents(metrics, state)
        if self.accelerator.is_main_process:
            save_checkpoint(self.folder / "checkpoints" / f"{name}.safetensors", *contents)
        self.has_saved = self.epoch + self.update > 0

    def _contents(
        self, metrics: dict[str, float] | None = None, state: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any] | None]:
        """What a checkpoint holds: weights, description and training state; complete in the main process alone."""
        config, main = self.config, self.accelerator.is_main_process
        description = self.task.describe(len(self.classes)) | {
            "classes": self.classes,
            "data": plain(config.data),
            "precision": config.precision,
            "epoch": self.epoch,
            "metrics": metrics and without_nan(metrics),
        }
        weights = whole(self.validated_weights().state_dict(), main)
        if not state:
            return weights, description, None
        return weights, description, self._state()

    def _rank(self, score: float, metrics: dict[str, float]) -> None:
        """Keep this epoch's weights if they are among the best."""
        keep, own = self.config.keep_best, [score, self.epoch]
        self.ranking = sorted([*self.ranking, own], key=lambda entry: -entry[0])[:keep]
        name = "best" if keep == 1 else f"epoch-{self.epoch}"
        if own in self.ranking:
            self._save(name, metrics)
        if self.accelerator.is_main_process:
            keep_best(self.folder, [epoch for _, epoch in self.ranking], keep > 1)

    def _state(self) -> dict[str, Any]:
        """What `go_on_from` needs besides the weights; complete in the main process alone, but all call this."""
        main, scaler = self.accelerator.is_main_process, self.accelerator.scaler
        distils = self.student is not self.bare_model
        return {
            **{name: getattr(self, name) for name in POSITION},
            "classes": self.classes,
            "images_per_update": self.sampler.images_per_update,
            "schedule": self.schedule.state_dict(),
            "guard": self.guard.state_dict(),
            "optimizer": _by_name(whole(self.optimizer.state_dict(), main), self._names())
            | {"name": self.config.optim.name.lower()},
            "scaler": scaler.state_dict() if scaler else None,
            "raw_weights": whole(self.bare_model.state_dict(), main) if self.ema else None,
            "projection": self.student.projection.state_dict() if distils else None,
        }

    def go_on_from(self, saved: Saved) -> None:
        """Bring a run to where it was when a checkpoint was written, as far as its options are still the same.

        Args:
            saved: the checkpoint.

        Raises:
            VisionattnError: if the checkpoint cannot be read, or does not fit the options.
        """
        path, state = saved.path, training_state(saved)
        for name, kind in STATE.items():
            if not isinstance(state, dict) or not fits(state.get(name, ...), kind):
                told = f"its training state is not what train.py writes (entry {name}: expected {describe(kind)})"
                raise VisionattnError(f"cannot resume from {path}: {told}")
        if state.get("classes", self.classes) != self.classes:
            raise VisionattnError(f"cannot resume {self.folder}: its classes are not those of the data, in their order")
        load_checkpoint(self.bare_model, path, content=saved.content)
        if self.ema:
            self.ema.set(self.bare_model)
        if state["raw_weights"]:
            self.bare_model.load_state_dict(state["raw_weights"])
        if self.student is not self.bare_model and state["projection"]:
            with user_input(f"cannot resume {self.folder} with another teacher", RuntimeError):
                self.student.projection.load_state_dict(state["projection"])
        with user_input(f"cannot resume {self.folder} with these options", ValueError, KeyError, VisionattnError):
            optimizer = self._carried_over(state["optimizer"])
            self.optimizer.load_state_dict(optimizer)
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.schedule.load_state_dict(state["schedule"])
        self.guard.load_state_dict(state["guard"])
        for name in POSITION:
            setattr(self, name, state[name])
        before, now = state.get("images_per_update", 0), self.sampler.images_per_update
        if before and before != now:  # the epoch goes on after as many images, to the update
            self.update = min(self.update * before // now, self.updates)
        # Weights are missing where fewer were kept before, or a run was killed between a checkpoint and the next one.
        checkpoints = path.parent
        self.ranking = [own for own in self.ranking if _is_kept(checkpoints, own[1])]

    def _names(self) -> list[str]:
        """Name of each parameter of the optimizer, in its order."""
        modules = (self.student, self.bare_model)
        names = {parameter: name for module in modules for name, parameter in module.named_parameters()}
        return [names[parameter] for group in self.optimizer.param_groups for parameter in group["params"]]

    def _carried_over(self, saved: dict[str, Any]) -> dict[str, Any]:
        """A saved state as `load_state_dict` takes it of an optimizer whose options or parameters may have changed.

        Rates, decay and the like are those of the options. Parameters that are new to it, and all of those of another
        optimizer, begin afresh.
        """
        fresh, names, optimizer = self.optimizer.state_dict(), self._names(), self.config.optim.name.lower()
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


def _is_kept(checkpoints: Path, epoch: float) -> bool:
    if (checkpoints / f"epoch-{epoch}.safetensors").is_file():
        return True
    try:
        return read_description(checkpoints / "best.safetensors").get("epoch") == epoch
    except VisionattnError:  # missing or damaged
        return False


def _by_name(state: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """An optimizer's `state_dict` by the names of its parameters, which outlive another choice or order of them."""
    groups = [group | {"params": [names[i] for i in group["params"]]} for group in state["param_groups"]]
    return {**state, "state": {names[i]: values for i, values in state["state"].items()}, "param_groups": groups}
