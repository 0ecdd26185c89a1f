"""Every file in configs/: it parses, names a model that takes its arguments, and trains the first update."""

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from PIL import Image

import visionattn
from visionattn.training.config import TrainConfig, parse_train
from visionattn.training.trainer import Trainer

CONFIGS = Path(__file__).parents[1] / "configs"
RECIPES = sorted((CONFIGS / "classification").glob("*.yaml"))
DENSE = sorted(p for task in ("detection", "segmentation") for p in (CONFIGS / task).glob("*.yaml"))
DENSE = [path for path in DENSE if not path.stem.startswith("scenes")]
NAMES = visionattn.list_models()
MECHANICS = ("drop_path_rate", "drop_rate", "soft_mask_schedule", "soft_mask_epochs", "phase")
"""Arguments of models that a test variant shares with the others of its family; the rest tell its shape."""
SMALL_HEADS = {
    "mask_rcnn": {
        **{"fpn_channels": 64, "box_batch_size_per_image": 16},
        **{"rpn_pre_nms_top_n_train": 100, "rpn_post_nms_top_n_train": 50},
    },
    "retinanet": {"fpn_channels": 64},
    "upernet": {"decoder_channels": 32},
    "fpn": {"pyramid_channels": 32, "segmentation_channels": 32},
}


def read(path: Path) -> TrainConfig:
    return parse_train(["--config", str(path)])[0]


def one_of_each_kind(paths: list[Path]) -> list:
    """All of the recipes, of which those are slow that have their bases, and head, in common with one before."""
    params, seen = [], set()
    for path in paths:
        kind = tuple(re.findall(r"^(?:base|head): .*$", path.read_text(), re.M)) or path.stem
        params.append(pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if kind in seen else []))
        seen.add(kind)
    return params


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of two images for each of two classes."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            (root / part / name).mkdir(parents=True)
            for i in range(2):
                Image.fromarray(rng.integers(0, 255, (36, 40, 3), np.uint8)).save(root / part / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    """File of a dense model to learn from."""
    path = tmp_path_factory.mktemp("teacher") / "dense.pth"
    torch.save(visionattn.create_model("test_sparsifiner", num_classes=2).state_dict(), path)
    return str(path)


@pytest.mark.parametrize("path", one_of_each_kind(RECIPES))
def test_recipes_train(path: Path, images: Path, teacher: str, tmp_path: Path):
    config = read(path)
    with torch.device("meta"):
        visionattn.create_model(config.model, **config.model_kwargs)
        if config.distill.model:
            visionattn.create_model(config.distill.model, **config.distill.kwargs)
    small = f"test_{visionattn.model_info(config.model).family}"
    data = {"batch_size": 4, "num_workers": 0, "img_size": 32, "eval_img_size": None}
    trainer = Trainer(
        replace(
            config,
            model=small,
            model_kwargs={key: value for key, value in config.model_kwargs.items() if key in MECHANICS},
            pretrained=False,
            checkpoint="",
            precision="no",  # CPUs have no fp16
            output=str(tmp_path),
            data=replace(config.data, name="folder", root=str(images), **data),
            optim=replace(config.optim, accumulation=1),
            distill=replace(config.distill, model=config.distill.model and small, checkpoint=teacher),
        )
    )
    assert math.isfinite(next(trainer.run_updates()))
    assert trainer.counted == 1 and trainer.optimizer.state  # the update was made, not skipped


@pytest.mark.parametrize("path", one_of_each_kind([p for p in RECIPES if "# Batch" in p.read_text()]))
def test_recipes_agree_with_their_headers_and_with_the_facts_of_the_model(path: Path):
    config, text = read(path), path.read_text()
    batch = re.search(r"^# Batch (\d+) = (\d+) x 8 processes(?: x (\d+) accumulated)?:$", text, re.M)
    total, images, steps = (int(number or 1) for number in batch.groups())
    assert (total, images, steps) == (8 * images * steps, config.data.batch_size, config.optim.accumulation)
    assert f"--config configs/classification/{path.name}\n" in text
    if path.stem not in NAMES or path.stem == "halonet_h1":
        return  # of other weights, or of another form of the model, than its facts are about
    info = visionattn.model_info(path.stem)
    assert info.top1 is None or f"{info.top1} %" in text
    with torch.device("meta"):  # the same model, even if it starts from the weights of another
        model = visionattn.create_model(config.model, **config.model_kwargs | {"num_classes": 1000})
    assert sum(p.numel() for p in model.parameters()) == info.params
    if "in22k" not in config.model:  # those facts are about pre-training
        ours = vars(config.augment) | vars(config.optim) | {"drop_path_rate": 0.0} | config.model_kwargs
        facts = info.recipe.keys() & ours.keys()
        assert {name: ours[name] for name in facts} == {name: info.recipe[name] for name in facts}


@pytest.mark.parametrize("path", one_of_each_kind(DENSE))
def test_dense_recipes_train(path: Path, tmp_path: Path):
    config = read(path)
    create = visionattn.create_detector if config.task == "detection" else visionattn.create_segmenter
    with torch.device("meta"):
        create(config.model, config.head, 80, backbone_kwargs=config.model_kwargs, **config.head_kwargs)
    joint, data = config.joint, {"name": "scenes", "root": None, "batch_size": 2, "num_workers": 0}
    trainer = Trainer(
        replace(
            config,
            model=f"test_{visionattn.model_info(config.model).family}",
            model_kwargs={key: value for key, value in config.model_kwargs.items() if key in MECHANICS},
            head_kwargs=config.head_kwargs | SMALL_HEADS[config.head],
            pretrained=False,
            checkpoint="",
            precision="no",
            output=str(tmp_path),
            data=replace(config.data, **data),
            annotations=replace(config.annotations, scene_count=10),
            joint=replace(joint, min_size=[size // 8 for size in joint.min_size], crop=joint.crop and joint.crop // 8),
        )
    )
    assert math.isfinite(next(trainer.run_updates()))
    assert trainer.counted == 1 and trainer.optimizer.state


@pytest.mark.parametrize("path", one_of_each_kind(DENSE))
def test_dense_recipes_agree_with_their_headers(path: Path):
    config, text = read(path), path.read_text()
    total, images = map(int, re.search(r"^# Batch (\d+) = (\d+) x 8 processes:$", text, re.M).groups())
    assert (total, images, 1) == (8 * images, config.data.batch_size, config.optim.accumulation)
    assert f"--config configs/{config.task}/{path.name}\n" in text
    assert re.search(r"published .*\d|not published", text.partition("\n")[0])
    assert path.stem.startswith(config.head)
    if config.task == "detection":
        updates = 117_266 // total  # of an epoch
        assert path.stem.split("_")[config.head.count("_") + 1] == {12: "1x", 36: "3x"}[config.epochs]
        assert round(config.schedule.warmup_epochs * updates) == 500
    else:
        updates = 20_210 // total
        length, warmup = config.epochs * updates, round(config.schedule.warmup_epochs * updates)
        assert (length // 40_000, warmup) in ((4, 1500), (2, 0), (1, 0))


@pytest.mark.parametrize("path", sorted((CONFIGS / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_its_files(path: Path):
    assert load_config_from_file(str(path)).num_processes > 1
