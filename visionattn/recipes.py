"""The recipes that come with the package: `recipe:dinat_tiny`, `recipe:detection/scenes_fcos`."""

import difflib
from functools import cache
from pathlib import Path

from .errors import VisionattnError

PREFIX = "recipe:"
TASKS = ("classification", "detection", "segmentation")


@cache
def folder() -> Path:
    """Where the recipes are: in the package if it was installed from a wheel, beside it in a checkout."""
    here = Path(__file__).parent
    inside = here / "recipes"
    return inside if inside.is_dir() else here.parent / "configs"


@cache
def list_recipes(task: str = "") -> list[str]:
    """Names of the recipes, `<task>/<recipe>`, sorted.

    Args:
        task: only those for this task.
    """
    tasks = (task,) if task else TASKS
    return sorted(f"{each}/{path.stem}" for each in tasks for path in (folder() / each).glob("*.yaml"))


def recipe_path(name: str) -> Path:
    """The file of a recipe.

    Args:
        name: with or without its task.

    Raises:
        VisionattnError: if there is none, or there are several of that name.
    """
    known = list_recipes()
    found = [each for each in known if name in (each, each.rpartition("/")[2])]
    if len(found) == 1:
        return folder() / f"{found[0]}.yaml"
    if found:
        raise VisionattnError(f"there are several recipes {name}: {', '.join(found)}")
    stems = {each.rpartition("/")[2]: each for each in known} | {each: each for each in known}
    near = [stems[each] for each in difflib.get_close_matches(name, stems, 3, 0.5)]
    told = f"; did you mean {', '.join(near)}?" if near else f": there are {', '.join(known[:6])}, ..."
    raise VisionattnError(f"there is no recipe {name}{told}")


def recipes_of(model: str, task: str) -> list[str]:
    """Names of the recipes that a model is trained by: its name is in theirs, and no longer one's.

    Args:
        model: registered name, without a tag.
        task: classification, detection or segmentation.
    """
    return [recipe for recipe in list_recipes(task) if _model_of(recipe) == model]


@cache
def _model_of(recipe: str) -> str:
    from .registry import list_models

    stem = f"_{recipe.rpartition('/')[2]}_"
    return max((name for name in list_models() if f"_{name}_" in stem), key=len, default="")
