"""What mkdocs builds besides the pages as they are: tables, pictures of blocks, the plot of the zoo, the README.

A page takes a part of the README by a line `{{ readme "Heading" }}`, and a whole file of the repository by
`{{ file "CONTRIBUTING.md" }}`. A page of a family names a model of it in its front matter, and gets that model's block,
the variants, recipes, citations and licence below its text.
"""

import json
import re
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from mkdocs.structure.files import File, Files

import visionattn
from visionattn.cli import commands
from visionattn.cli.catalog import bibtex
from visionattn.layers.block import Block
from visionattn.recipes import TASKS, recipes_of

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(HERE))
from draw_block import draw, trace  # noqa: E402

SOURCE = "https://github.com/visionattn/visionattn/blob/main/"
REPLACED = {"docs/": "", "CONTRIBUTING.md": "extending.md"}
"""Where the links of files at the top lead on the site."""


def family_models() -> dict[str, list[str]]:
    """Models by family, without those for tests."""
    found: dict[str, list[str]] = {}
    for name in visionattn.list_models():
        if not name.startswith("test_"):
            found.setdefault(visionattn.model_info(name).family, []).append(name)
    return found


def on_files(files: Files, config) -> Files:
    """Add the pictures."""
    for page in sorted((ROOT / "docs" / "families").glob("*.md")):
        model = re.search(r"^model: (\S+)$", page.read_text(), re.M)[1]
        files.append(File.generated(config, f"families/{page.stem}.svg", content=block_picture(model)))
    plot(ROOT / "build" / "zoo.svg")
    files.append(File.generated(config, "zoo.svg", content=(ROOT / "build" / "zoo.svg").read_text()))
    return files


def on_page_markdown(markdown: str, page, config, files) -> str:
    """Put in what is generated."""
    markdown = re.sub(r'^\{\{ readme "(.+)" \}\}$', lambda found: section(found[1]), markdown, flags=re.M)
    markdown = re.sub(r'^\{\{ file "(.+)" \}\}$', lambda found: whole(found[1]), markdown, flags=re.M)
    markdown = markdown.replace("{{ zoo }}", zoo_table()).replace("](../", f"]({SOURCE}")
    markdown = markdown.replace("{{ commands }}", command_table()).replace("{{ mixers }}", mixer_table())
    if page.file.src_uri.startswith("families/"):
        markdown += family_facts(Path(page.file.src_uri).stem, page.meta["model"])
    return markdown


def section(heading: str) -> str:
    """A section of the README, without its heading."""
    text = (ROOT / "README.md").read_text()
    start = text.index(f"## {heading}\n") + len(f"## {heading}\n")
    return relinked(text[start:].split("\n## ")[0])


def whole(name: str) -> str:
    """A file, without its title."""
    return relinked((ROOT / name).read_text().partition("\n")[2])


def relinked(text: str) -> str:
    """Links of a file at the top as the site has them."""
    for old, new in REPLACED.items():
        text = text.replace(f"]({old}", f"]({new}")
    return text


def block_picture(name: str) -> str:
    """The block of a model as SVG: the last one of its third stage, or its last."""
    with torch.device("meta"):
        model = visionattn.create_model(name).eval()
        images = torch.zeros(1, *model.pretrained_cfg["input_size"])
    last = (model.stages[2].blocks if hasattr(model, "stages") else model.blocks)[-1]
    block = [last, *(each for each in last.modules() if isinstance(each, Block))][-1]  # of a pair, the second
    return draw(trace(block, lambda: model(images)), f"A block of {name}")


def family_facts(family: str, model: str) -> str:
    """Below the text of a family: block, variants, recipes, citation, licence."""
    names = family_models()[family]
    info = visionattn.model_info(model)
    parts = [
        f"\n## Its block\n\n![layers of a block of {model} in the order in which they are computed]({family}.svg)\n\n",
        f"Layers of a block of `{model}` in the order in which they are computed, with the shapes of one image's maps; "
        "what belongs together is framed, and the lines at the left are the residuals.\n",
        "\n## Variants\n\n" + model_table(names),
    ]
    recipes = {name: {task: recipes_of(name, task) for task in TASKS} for name in names}
    for task in TASKS:
        lines = [f"- `{name}`: {links(found[task])}" for name, found in recipes.items() if found[task]]
        if lines:
            title = {"classification": "Recipes", "detection": "Detection", "segmentation": "Segmentation"}[task]
            parts.append(f"\n## {title}\n\n" + "\n".join(lines) + "\n")
    code = "\n\n".join(bibtex(*paper) for paper in info.papers)
    parts.append(f"\n## Citation\n\n```bibtex\n{code}\n```\n")
    parts.append(f"\n## Licence\n\nPublished code and weights: {info.license}, from <{info.origin}>.\n")
    return "".join(parts)


def links(recipes: list[str]) -> str:
    return ", ".join(f"[{recipe.partition('/')[2]}]({SOURCE}configs/{recipe}.yaml)" for recipe in recipes)


def measured() -> dict[str, float]:
    """Images per second by model, as `speed.json` has them."""
    return json.loads((HERE / "speed.json").read_text())["images_per_second"]


def model_table(names: list[str], family: bool = False) -> str:
    """Markdown table of models; the page's script lets it be sorted."""
    speed = measured()
    head = f"| model | {'family | ' if family else ''}params M | GMACs | pixels | top-1 % | images/s |\n"
    lines = [head + "|---" * (7 if family else 6) + "|"]
    for name in names:
        info = visionattn.model_info(name)
        cells = [f"`{name}`", *([f"[{info.family}](families/{info.family}.md)"] if family else [])]
        cells += [f"{info.params / 1e6:.2f}", f"{info.gmacs:g}", str(info.input_size[-1])]
        cells += [f"{info.top1:g}" if info.top1 else "", f"{speed[name]:.1f}" if name in speed else ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def zoo_table() -> str:
    """All models."""
    return model_table([name for names in family_models().values() for name in names], family=True)


def mixer_table() -> str:
    """Every mixer of the skeletons, with its parameters in a block of 384 channels."""
    rows = ["| mixer | parameters | MLP | pyramid | what to know | paper |", "|---|---|---|---|---|---|"]
    for name in visionattn.list_mixers():
        info = visionattn.mixer_info(name, depth=1)
        marks = [info.remark, info.init and f"begins with {info.init}", "fixed number of tokens" if info.fixed else ""]
        paper = f"[{info.paper}](https://arxiv.org/abs/{info.paper})" if info.paper else ""
        cells = (
            f"`{name}`",
            f"{info.mixer_params[0]:,}",
            str(info.hidden[0]),
            "everywhere" if info.everywhere else "late",
        )
        rows.append(f"| {' | '.join((*cells, '; '.join(filter(None, marks)), paper))} |")
    return "\n".join(rows)


def command_table() -> str:
    """The commands, each with what it does."""
    lines = [f"| `visionattn {each.name}` | {each.help} |" for each in commands().values()]
    return "| command | what it does |\n|---|---|\n" + "\n".join(lines) + "\n"


def plot(path: Path) -> None:
    """Accuracy against parameters, multiply-adds and measured speed."""
    speed = measured()
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.6), sharey=True, layout="constrained")
    marks = "osD^v<>ph*XP"
    for (family, names), mark in zip(family_models().items(), marks, strict=False):
        infos = [info for info in map(visionattn.model_info, names) if info.top1 and info.input_size[-1] <= 256]
        rows = ([i.params / 1e6 for i in infos], [i.gmacs for i in infos], [speed.get(i.name) for i in infos])
        for axis, values in zip(axes, rows, strict=True):
            points = sorted((x, i.top1) for x, i in zip(values, infos, strict=True) if x)
            if points:
                axis.scatter(*zip(*points, strict=True), marker=mark, s=30, alpha=0.85, label=family)
    for axis, label in zip(axes, ("parameters, millions", "multiply-adds, 1e9", "images/s, CPU"), strict=True):
        axis.set(xlabel=label, xscale="log")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("published top-1, %")
    axes[1].legend(ncol=2, fontsize=8, loc="lower right")
    path.parent.mkdir(exist_ok=True)
    plt.rcParams["svg.hashsalt"] = "visionattn"  # the same picture, the same file
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
