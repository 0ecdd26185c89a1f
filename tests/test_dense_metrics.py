"""Metrics of detection and segmentation against pycocotools and against counts by hand; losses, results, pictures."""

import contextlib
import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as reference_rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn
from torch.nn import functional as F

from visionattn.data.annotations import IGNORED
from visionattn.data.drawing import draw_map, draw_objects, grid, to_image
from visionattn.errors import VisionattnError
from visionattn.tasks.config import LossConfig, TaskConfig
from visionattn.tasks.detection import SUMMARY, Detection, DetectionLoss, DetectionMetrics
from visionattn.tasks.segmentation import PixelLoss, Segmentation, SegmentationMetrics

HEIGHT, WIDTH = 120, 140


def rectangle(box: np.ndarray) -> np.ndarray:
    x1, y1, x2, y2 = box.round().astype(int)
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[y1:y2, x1:x2] = 1
    mask[(y1 + y2) // 2, x1 : (x1 + x2) // 2] = 0  # masks are no boxes
    return mask


def random_image(rng: np.random.Generator, objects: int, found: int, crowd: float = 0.0) -> tuple[dict, dict]:
    """What is there and what was found: some of the objects nearly where they are, and some others."""

    def boxes(count: int) -> np.ndarray:
        corner = rng.uniform(0, 60, (count, 2))
        return np.concatenate([corner, corner + rng.uniform(4, 58, (count, 2))], 1).astype(np.float32)

    there = boxes(objects)
    labels = rng.integers(1, 4, objects)
    areas = np.array([rectangle(box).sum() for box in there], np.float64)
    target = {"boxes": there.astype(np.float64), "labels": labels, "area": areas, "size": np.array([HEIGHT, WIDTH])}
    target["iscrowd"] = (rng.random(objects) < crowd).astype(np.int64)
    target["masks"] = np.stack([rectangle(box) for box in there]) if objects else np.zeros((0, HEIGHT, WIDTH), np.uint8)
    near = rng.integers(objects, size=found) if objects else []
    guesses, guessed = boxes(found), rng.integers(1, 4, found)
    for i, j in enumerate(near):
        if rng.random() < 0.7:
            guesses[i], guessed[i] = (there[j] + rng.uniform(-4, 4, 4)).clip(0, 118), labels[j]
    scores = rng.random(found).astype(np.float32).round(1)  # with ties
    masks = np.stack([rectangle(box) for box in guesses]) if found else np.zeros((0, HEIGHT, WIDTH), np.uint8)
    output = {"boxes": guesses, "labels": guessed, "scores": scores, "masks": masks[:, None].astype(np.float32)}
    output["input_size"] = np.array([HEIGHT, WIDTH])
    return tuple({key: torch.tensor(value) for key, value in each.items()} for each in (output, target))


def pycocotools(pairs: list[tuple[dict, dict]], kind: str) -> COCOeval:
    def xywh(box: torch.Tensor) -> list[float]:
        x1, y1, x2, y2 = box.tolist()
        return [x1, y1, x2 - x1, y2 - y1]

    def encode(mask: torch.Tensor) -> dict:
        return reference_rle.encode(np.asfortranarray((mask.numpy() > 0.5).astype(np.uint8)))

    annotations, results = [], []
    for image, (output, target) in enumerate(pairs):
        for i in range(len(target["labels"])):
            known = {"id": len(annotations) + 1, "image_id": image, "category_id": target["labels"][i].item()}
            known |= {"area": target["area"][i].item(), "iscrowd": target["iscrowd"][i].item()}
            annotations.append(known | {"bbox": xywh(target["boxes"][i]), "segmentation": encode(target["masks"][i])})
        for i in range(len(output["labels"])):
            known = {"image_id": image, "category_id": output["labels"][i].item(), "score": output["scores"][i].item()}
            shape = (
                {"bbox": xywh(output["boxes"][i])}
                if kind == "bbox"
                else {"segmentation": encode(output["masks"][i, 0])}
            )
            results.append(known | shape)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        images = [{"id": i, "height": HEIGHT, "width": WIDTH} for i in range(len(pairs))]
        categories = [{"id": i, "name": str(i)} for i in (1, 2, 3)]
        truth.dataset = {"images": images, "annotations": annotations, "categories": categories, "info": {}}
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def counted(pairs: list[tuple[dict, dict]], masks: bool) -> DetectionMetrics:
    metrics = DetectionMetrics(masks, 3)
    for start in range(0, len(pairs), 3):
        outputs, targets = zip(*pairs[start : start + 3], strict=True)
        if not masks:
            outputs = [{key: value for key, value in output.items() if key != "masks"} for output in outputs]
        metrics.update(outputs, targets)
    return metrics


CASES = {
    "random": [(4, 6)] * 12,
    "crowds": [(5, 8)] * 10,
    "empty": [(0, 0), (3, 0), (0, 4), (4, 5), (2, 3)],
    "many": [(20, 120)] * 2,
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("masks", [False, True])
def test_detection_metrics_agree_with_pycocotools(case: str, masks: bool):
    rng = np.random.default_rng(len(case))
    pairs = [random_image(rng, *counts, crowd=0.3 if case == "crowds" else 0.0) for counts in CASES[case]]
    metrics = counted(pairs, masks)
    computed = metrics.compute()
    for kind, name in (("box", "bbox"), ("mask", "segm"))[: 1 + masks]:
        evaluation = pycocotools(pairs, name)
        for figure, expected in zip(SUMMARY, evaluation.stats, strict=True):
            ours = computed[f"{kind}_{figure}"]
            assert (math.isnan(ours) and expected == -1) or ours == pytest.approx(100 * expected, abs=1e-4), figure
        assert computed[f"{kind}_AP50"] > 5
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    by_class = [100 * p[p > -1].mean() if (p > -1).any() else None for p in np.moveaxis(precision, 2, 0)]
    assert [each["AP"] for each in metrics.per_class()] == pytest.approx(by_class, abs=1e-6)


def test_a_class_without_objects_does_not_count():
    rng = np.random.default_rng(0)
    output, target = random_image(rng, 4, 8)
    target["labels"] = torch.ones_like(target["labels"])
    metrics = counted([(output, target)], masks=False)
    assert metrics.compute()["box_AP"] == pytest.approx(
        100 * pycocotools([(output, target)], "bbox").stats[0], abs=1e-4
    )
    assert metrics.per_class()[0]["AP"] is not None and metrics.per_class()[1:] == [{"AP": None}] * 2


def test_nothing_to_count_is_no_number():
    metrics = counted([random_image(np.random.default_rng(0), 0, 0)], masks=True)
    assert math.isnan(metrics.compute()["mask_AP"])
    assert metrics.per_class() == [{"AP": None}] * 3


def test_detection_counts_images_of_all_processes():
    rng = np.random.default_rng(1)
    pairs = [random_image(rng, 4, 6) for _ in range(7)]
    whole = counted(pairs, masks=True).compute()
    parts = [counted(pairs[rank::2], masks=True) for rank in range(2)]
    states = [part.metric.metric_state for part in parts]
    gathered = iter([[state[name] for state in states] for name in states[0]])
    parts[0].share(lambda mine: next(gathered))
    assert parts[0].compute() == pytest.approx(whole, abs=1e-6, nan_ok=True)


class Finder(nn.Module):
    """Finds the same thing in every image, at a quarter of its sides."""

    def forward(self, images: list[torch.Tensor], targets: list | None = None):
        if targets is not None:
            return {"boxes": torch.tensor(1.5), "classes": torch.tensor(2.0, dtype=torch.bfloat16)}
        found = []
        for image in images:
            height, width = image.shape[-2:]
            mask = torch.zeros(1, 1, height, width)
            mask[..., : height // 4, : width // 4] = 0.9
            box = torch.tensor([[0.0, 0, width // 4, height // 4]])
            found.append({"boxes": box, "labels": torch.tensor([1]), "scores": torch.tensor([0.9]), "masks": mask})
        return found


def test_what_is_found_in_resized_images_counts_in_their_own_pixels():
    task, metrics = detection("mask_rcnn"), DetectionMetrics(True, 1)
    for size, input_size in [((40, 60), (80, 120)), ((40, 60), (20, 28)), ((40, 60), (40, 60))]:
        masks = torch.zeros(1, *size, dtype=torch.uint8)
        masks[:, : size[0] // 4, : size[1] // 4] = 1
        target = {
            "boxes": torch.tensor([[0.0, 0, size[1] / 4, size[0] / 4]]),
            "labels": torch.tensor([1]),
            "masks": masks,
        }
        target |= {"iscrowd": torch.tensor([0]), "area": torch.tensor([150.0]), "size": torch.tensor(size)}
        metrics.update(task.predict(Finder(), [torch.zeros(3, *input_size)]), [target])
    computed = metrics.compute()
    assert computed["box_AP75"] == pytest.approx(100) and computed["mask_AP75"] == pytest.approx(100)
    assert (task.metric, detection("fcos").metric) == ("mask_AP", "box_AP")


def test_detection_loss_is_the_sum():
    assert DetectionLoss()(Finder(), [torch.zeros(3, 8, 8)], [{}], 0).item() == 3.5


def by_hand(outputs: list[torch.Tensor], targets: list[torch.Tensor], classes: int) -> dict[str, float]:
    matrix = np.zeros((classes, classes))
    for logits, target in zip(outputs, targets, strict=True):
        for row, line in enumerate(target.tolist()):
            for place, label in enumerate(line):
                if label != 255:
                    matrix[label, int(logits[:, row, place].numpy().argmax())] += 1
    ious, recalls = [], []
    for c in range(classes):
        union = matrix[c].sum() + matrix[:, c].sum() - matrix[c, c]
        ious += [matrix[c, c] / union] if union else []
        recalls += [matrix[c, c] / matrix[c].sum()] if matrix[c].sum() else []
    accuracy = np.trace(matrix) / matrix.sum()
    return {"mIoU": 100 * np.mean(ious), "pixel_accuracy": 100 * accuracy, "mean_accuracy": 100 * np.mean(recalls)}


def test_segmentation_metrics_agree_with_counts_by_hand():
    generator = torch.Generator().manual_seed(0)
    outputs = [torch.randn(5, 9 + i, 12 - i, generator=generator) for i in range(4)]
    targets = [torch.randint(0, 3, output.shape[-2:], generator=generator) for output in outputs]
    targets[0][2:5] = IGNORED
    targets[1][:] = IGNORED
    outputs = [torch.cat([output[:4], torch.full_like(output[:1], -99)]) for output in outputs]
    metrics, parts = SegmentationMetrics(5), [SegmentationMetrics(5) for _ in range(2)]
    metrics.update(outputs[:3], targets[:3])
    metrics.update(outputs[3:], targets[3:])
    assert metrics.compute() == pytest.approx(by_hand(outputs, targets, 5), abs=1e-6)
    assert metrics.per_class()[3:] == [{"IoU": 0}, {"IoU": None}]  # predicted only; neither
    for rank, part in enumerate(parts):
        part.update(outputs[rank::2], targets[rank::2])
    parts[0].share(lambda mine: [part.confusion for part in parts])
    assert parts[0].compute() == metrics.compute()


def test_logits_are_resized_to_the_map():
    logits = torch.zeros(2, 4, 4)
    logits[0, :, :2] = logits[1, :, 2:] = 1.0
    target = torch.zeros(16, 20, dtype=torch.long)
    target[:, 10:] = 1
    metrics = SegmentationMetrics(2)
    metrics.update([logits], [target])
    assert metrics.compute()["mIoU"] == 100


def detection(head: str) -> Detection:
    return Detection(TaskConfig("detection", head=head))


class Means(nn.Module):
    """Logits that depend on all of the batch, as if padding were seen."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert images.ndim == 4
        return torch.cat([images, images.mean((2, 3), keepdim=True).expand_as(images)], 1)


def test_segmentation_does_not_pad_images_to_each_other():
    images = [torch.randn(3, *size) for size in ((8, 8), (8, 12), (8, 8), (4, 4))]
    task = Segmentation(TaskConfig("segmentation"))
    for image, logits in zip(images, task.predict(Means(), images), strict=True):
        assert torch.equal(logits, task.predict(Means(), [image])[0])


def test_segmentation_loss_ignores_pixels_and_weighs_the_second_head():
    logits, targets = torch.randn(2, 4, 3, 3), torch.randint(0, 4, (2, 3, 3))
    targets[0, 0] = IGNORED
    expected = F.cross_entropy(logits, targets, ignore_index=IGNORED)
    loss, none = PixelLoss(LossConfig(), 4), torch.full_like(targets, IGNORED)
    assert torch.allclose(loss(lambda images: logits, logits, targets, 0), expected)
    assert torch.allclose(loss(lambda images: (logits, logits), logits, targets, 0), 1.4 * expected)
    assert loss(lambda images: logits, logits, none, 0) == 0


def test_segmentation_loss_with_weights_and_dice():
    logits, targets = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.randint(0, 3, (2, 4, 4))
    targets[0, 0] = IGNORED
    weights = torch.tensor([1.0, 2.0, 3.0])
    counted = targets != IGNORED
    each = F.cross_entropy(logits, targets.where(counted, 0), reduction="none") * weights[targets.where(counted, 0)]
    found = PixelLoss(LossConfig(class_weights=(1.0, 2.0, 3.0)), 3)(lambda images: logits, logits, targets, 0)
    assert found.item() == pytest.approx(each[counted].mean().item(), rel=1e-5)
    probabilities = logits.softmax(1).movedim(1, -1)[counted]
    truth = F.one_hot(targets[counted], 3)
    dice = 1 - 2 * (probabilities * truth).sum(0) / (probabilities.sum(0) + truth.sum(0))
    plain, both = (PixelLoss(LossConfig(dice=dice), 3)(lambda i: logits, logits, targets, 0) for dice in (0.0, 0.5))
    assert (both - plain).item() == pytest.approx(0.5 * dice.mean().item(), rel=1e-5)
    for wrong in ("balanced", (1.0, 2.0)):
        with pytest.raises(VisionattnError, match="expected 3 values"):
            PixelLoss(LossConfig(class_weights=wrong), 3)


def test_pictures():
    image = Image.new("RGB", (40, 30), "white")
    box, label = torch.tensor([[5.0, 5, 60, 20]]), torch.tensor([2])
    found = {"boxes": box, "labels": label, "scores": torch.tensor([0.8]), "masks": torch.ones(1, 30, 40)}
    drawn = draw_objects(image, found, ["cat", "dog"])
    assert drawn.size == image.size and drawn.getpixel((1, 28)) != (255, 255, 255)
    assert draw_objects(image, found, ["cat", "dog"], threshold=0.9).tobytes() == image.tobytes()
    labels = torch.full((30, 40), IGNORED)
    classes = ["background", "sky", "grass"]
    assert draw_map(image, labels, classes).tobytes() == image.tobytes()
    labels[:, :20], labels[:, 20:25] = 1, 0
    overlay = draw_map(image, labels, classes)
    assert overlay.getpixel((5, 5)) != (255, 255, 255) and overlay.getpixel((22, 5)) == overlay.getpixel((30, 5)) == (
        255,
        255,
        255,
    )
    assert grid([drawn, overlay, Image.new("RGB", (20, 50))]).size == (84, 104)
    assert to_image(torch.zeros(3, 2, 2), (0.5,) * 3, (0.5,) * 3).getpixel((0, 0)) == (127, 127, 127)
