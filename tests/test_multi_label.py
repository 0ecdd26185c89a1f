"""Images with any number of labels: their files, and training, validation and prediction with them."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torchmetrics.functional.classification import multilabel_average_precision

from visionattn.cli import main
from visionattn.data.config import AugmentConfig, DataConfig
from visionattn.data.images import ImageSet
from visionattn.data.labels import Labelled, labels_of, load_labelled, load_labelled_validation
from visionattn.errors import VisionattnError
from visionattn.tasks.classification import ClassificationLoss, MultiLabelMetrics
from visionattn.tasks.config import LossConfig
from visionattn.tasks.views import Predictor
from visionattn.training.config import parse_train, parse_validate
from visionattn.training.evaluation import options_of, validate
from visionattn.training.run import train
from visionattn.weights.description import read_description


def pairs(count: int) -> tuple[list[Image.Image], list[list[str]]]:
    """Images of two digits side by side, and the names of both."""
    digits, rng = load_digits(), np.random.default_rng(0)
    chosen = rng.integers(0, len(digits.target), (count, 2))
    pixels = [(np.concatenate(digits.images[pair], 1) * 15.9).astype(np.uint8) for pair in chosen]
    return [Image.fromarray(image).resize((32, 32)) for image in pixels], [
        sorted({str(digits.target[i]) for i in pair}) for pair in chosen
    ]


def save(root: Path, images: list[Image.Image], rows: list[list[str]], file: str = "labels.csv") -> Path:
    """Images as 0.png, 1.png, ... and a CSV file of the rows."""
    root.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images):
        image.save(root / f"{number}.png")
    with open(root / file, "w", newline="") as opened:
        csv.writer(opened).writerows(rows)
    return root


def png(image: Image.Image) -> dict:
    """An image as Hugging Face keeps it."""
    file = io.BytesIO()
    image.save(file, "png")
    return {"bytes": file.getvalue(), "path": None}


def named(config: DataConfig, images: ImageSet) -> list[tuple[str, list[str]]]:
    """Files and the names of their classes."""
    loaded = [(images.place(i), images.source[images.indices[i]][1]) for i in range(len(images))]
    root = Path(config.root)
    present = [[images.classes[c] for c in vector.nonzero()[:, 0]] for _, vector in loaded]
    return [(str(Path(path).relative_to(root)), names) for (path, _), names in zip(loaded, present, strict=True)]


BLANK = [Image.new("RGB", (8, 8), (40 * i, 0, 0)) for i in range(4)]
LISTS = [["file", "labels"], ["0.png", "cat;dog"], ["1.png", ""], ["2", "emu | cat"], ["3.png", "['dog']"]]
FLAGS = [["file", "dog", "cat"], ["0.png", "1", "1"], ["1.png", "0", "0"], ["2.png", "0", "1"], ["3.png", "1", "0"]]


@pytest.mark.parametrize(
    ("rows", "classes", "expected"),
    [
        (LISTS, ["cat", "dog", "emu"], [["cat", "dog"], [], ["cat", "emu"], ["dog"]]),
        (FLAGS, ["dog", "cat"], [["dog", "cat"], [], ["cat"], ["dog"]]),
        (
            [["a", "b"], ["0.png", "cat"], ["0.png", "dog"], ["1.png", "dog"], ["2.png", "cat"], ["3.png", "cat"]],
            ["cat", "dog"],
            [["cat", "dog"], ["dog"], ["cat"], ["cat"]],  # of a file with several rows, all
        ),
    ],
)
def test_a_part_of_the_rows_is_held_out(tmp_path: Path, rows: list, classes: list[str], expected: list):
    config = DataConfig(root=str(save(tmp_path, BLANK, rows)), labels="labels.csv", val_fraction=0.5)
    train_images, val_images = load_labelled(config)
    assert train_images.classes == val_images.classes == classes and len(train_images) == len(val_images) == 2
    found = dict(named(config, train_images) + named(config, val_images))
    assert [found[f"{i}.png"] for i in range(4)] == expected
    assert named(config, load_labelled_validation(config)) == named(config, val_images)


def test_a_column_or_the_folders_tell_the_splits(tmp_path: Path):
    rows = [[*row, split] for row, split in zip(FLAGS, ["split", "train", "valid", "train", "test"], strict=True)]
    config = DataConfig(root=str(save(tmp_path / "one", BLANK, rows)), labels="labels.csv")
    assert [named(config, part) for part in load_labelled(config)] == [
        [("0.png", ["dog", "cat"]), ("2.png", ["cat"])],
        [("1.png", [])],
    ]
    for part in (load_labelled(config)[1], load_labelled_validation(config)):
        assert len(part) == len(part.source)  # validate.py tells no share of data.val_fraction
    save(tmp_path / "two" / "train", BLANK, FLAGS, "_classes.csv")
    save(tmp_path / "two" / "valid", BLANK, [["file", "cat", "dog"], ["2.png", "1", "0"]], "_classes.csv")
    config = DataConfig(root=str(tmp_path / "two"), labels="_classes.csv")
    train_images, val_images = load_labelled(config)
    assert len(train_images) == 4 and val_images.classes == ["dog", "cat"]
    assert named(config, val_images) == [("valid/2.png", ["cat"])]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "holds no labels"),
        ("file,labels\n", "holds no labels"),
        ("file\n0.png\n", "holds no labels"),
        ("file,a,b\n0.png,1\n", "row 2 has another number of columns"),
        ("file,a,a\n0.png,1,0\n", "two columns called a"),
        ("file,a,b\n0.png,1,2\n", "row 2: expected 0 or 1 for the class b, got '2'"),
        ("file,a,b\n0.png,1,0\n0.png,0,1\n", "row 3: 0.png has a row already"),
        ("file,labels\n9.png,a;b\n", "row 2: there is no image 9.png"),
        ("file,labels\n../secret.png,a;b\n", "row 2: ../secret.png is outside of"),
        ("file,labels\n/etc/passwd,a;b\n", "row 2: /etc/passwd is outside of"),
        ("file,labels\n0.png,\n", "gives no image a label"),
        ("file,labels\n0.png,haze primary\n1.png,road\n", "'haze primary' one class or several"),
        ("file,labels,split\n0.png,a;b,train\n", "leaves no images for the split validation"),
        ('file,labels\n0.png,"a\n', "cannot read .*unexpected end of data"),
        ("file,labels\n0.png,caf\xe9", "cannot read .*utf-8"),
    ],
)
def test_a_table_that_is_wrong_is_told_by_its_row(tmp_path: Path, text: str, told: str):
    save(tmp_path / "data", BLANK, [])
    BLANK[0].save(tmp_path / "secret.png")
    (tmp_path / "data" / "labels.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(VisionattnError, match=told) as caught:
        load_labelled(DataConfig(root=str(tmp_path / "data"), labels="labels.csv"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--loss.multi_label"], "which digits does not have: give data.labels"),
        (["--data.labels", "labels.csv", "--data.root", "."], "add --loss.multi_label"),
        (["--data.labels", "no.csv", "--data.root", ".", "--loss.multi_label"], "no.csv does not exist: expected"),
        (["--data.labels", "labels.csv", "--loss.multi_label"], "data.labels is a file of image folders"),
        (["--loss.multi_label", "--distill.model", "test_van"], "goes without distillation"),
        (["--task", "detection", "--data.labels", "labels.csv"], "data.labels is of no use to detection"),
        (["--task", "segmentation", "--data.labels", "labels.csv"], "data.labels is of no use to segmentation"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path: Path, monkeypatch, options: list[str], told: str):
    monkeypatch.chdir(save(tmp_path, BLANK, LISTS))
    with pytest.raises(VisionattnError, match=told):
        train(*parse_train(["--output", "runs", "--data.num_workers", "0", *options]))
    assert not Path("runs").exists()


def test_lists_of_a_hugging_face_dataset(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("lists")  # a name with "test" in it would be taken for a split
    datasets, pyarrow = pytest.importorskip("datasets"), pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    features = datasets.Features(
        image=datasets.Image(), tags=datasets.Sequence(datasets.ClassLabel(names=["cat", "dog", "emu"]))
    )
    for split, tags in (("train", [[0, 1], [2]]), ("validation", [[], [1, 2]])):
        rows = [{"image": png(image), "tags": numbers} for image, numbers in zip(BLANK, tags, strict=False)]
        table = pyarrow.Table.from_pylist(rows, schema=features.arrow_schema)
        parquet.write_table(table, folder / f"{split}.parquet")
    config = DataConfig(name=f"hfds/{folder}", root=str(folder / "cache"))
    config.labels = labels_of(config)
    train_images, val_images = load_labelled(config)
    assert config.labels == "tags" and train_images.classes == ["cat", "dog", "emu"]
    assert [train_images.load(i)[1].tolist() for i in range(2)] == [[1, 1, 0], [0, 0, 1]]
    assert [val_images.load(i)[1].tolist() for i in range(2)] == [[0, 0, 0], [0, 1, 1]]
    assert load_labelled_validation(config).load(1)[0].size == (8, 8)
    config.labels = "image"
    with pytest.raises(VisionattnError, match="no column image of lists of classes; it has tags"):
        load_labelled_validation(config)


def test_average_precision_is_that_of_torchmetrics():
    scores = torch.randn(200, 6).mul(3).round()  # many are equal
    targets = (torch.rand(200, 6) < torch.tensor([0.5, 0.1, 0.02, 0.9, 1.0, 0.3])).float()
    whole, *shares = (MultiLabelMetrics() for _ in range(3))
    for start in range(0, 200, 64):
        whole.update(scores[start : start + 64], targets[start : start + 64])
    for rank, share in enumerate(shares):
        share.update(scores[rank::2], targets[rank::2])
    expected = multilabel_average_precision(scores, targets.long(), 6, average=None)
    computed = whole.compute()
    torch.testing.assert_close(whole.average, expected)
    assert computed["mAP"] == pytest.approx(100 * expected.mean().item())
    assert [entry["images"] for entry in whole.per_class()] == targets.sum(0).tolist()
    shares[0].share(lambda mine: [*mine, torch.cat(shares[1].parts, 1)])
    assert shares[0].compute() == computed


def test_a_class_without_images_does_not_count():
    metrics = MultiLabelMetrics()
    metrics.update(torch.tensor([[2.0, 0.0], [1.0, 0.0]]), torch.tensor([[0, 0], [1, 0]]))
    assert metrics.compute()["mAP"] == 50
    assert metrics.per_class() == [{"images": 1, "AP": 50.0}, {"images": 0, "AP": None}]


def test_vectors_are_mixed_smoothed_and_weighted():
    source = Labelled([io.BytesIO()] * 4, [[0, 1], [0], [0, 2], []], 3)
    images = ImageSet(source, [0, 1, 2, 3], ["a", "b", "c"], "images", several=True)
    loss = LossConfig(multi_label=True, smoothing=0.2, class_weights="balanced")
    made = ClassificationLoss(loss, AugmentConfig(mixup=1.0, cutmix=1.0), images, 0, lambda loss, *_: loss)
    torch.testing.assert_close(made.criterion.weight, torch.tensor([5 / 9, 5 / 3, 5 / 3]))
    pictures, targets = torch.randn(4, 3, 8, 8), torch.stack([source[i][1] for i in range(4)])
    seen, logits = [], torch.randn(4, 3)

    def model(mixed):
        seen.append(mixed)
        return logits

    found = made(model, pictures.clone(), targets, 3)
    # A mixture of pairs: the share of the other image, from what became of the image.
    assert not torch.equal(seen[0], pictures)
    own = torch.linspace(0, 1, 100001)
    mixtures = own[:, None, None] * targets + (1 - own[:, None, None]) * targets.flip(0)
    smoothed = mixtures * 0.8 + 0.1
    losses = torch.nn.functional.binary_cross_entropy_with_logits(
        logits.expand_as(smoothed), smoothed, made.criterion.weight, reduction="none"
    ).mean((1, 2))
    assert (losses - found).abs().min() < 1e-5 and found not in (losses[0], losses[-1])


def test_views_are_averaged_by_class():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    images = torch.randn(2, 4, 3, 2, 2)
    mean = torch.stack([model(view).sigmoid() for view in images.unbind(1)]).mean(0)
    averaged = Predictor(model, [2, 0], several=True)(images)
    torch.testing.assert_close(averaged.sigmoid(), mean[:, [2, 0]])


def test_two_digits_are_learnt_in_one_image(tmp_path: Path, capsys):
    images, labels = pairs(600)
    rows = [["image", "digits"], *([f"{i}.png", ";".join(names)] for i, names in enumerate(labels))]
    root = save(tmp_path / "pairs", images, rows)
    options = ["--data.root", str(root), "--data.labels", "labels.csv", "--loss.multi_label", "--data.num_workers", "0"]
    options += ["--augment.mixup", "0.1", "--augment.scale", "[0.9,1]", "--data.batch_size", "32", "--epochs", "4"]
    options += ["--optim.lr", "4e-3", "--schedule.warmup_epochs", "0.5", "--loss.class_weights", "balanced"]
    dry = ["--dry_run", "--output", str(tmp_path / "dry")]
    folder = train(*parse_train([*options, "--output", str(tmp_path / "runs")]))
    with open(folder / "metrics.csv") as file:
        scores = [float(row["val_mAP"]) for row in csv.DictReader(file)]
    assert max(scores) > 55, scores  # 20 by chance
    best = folder / "checkpoints" / "best.safetensors"
    assert read_description(best)["multi_label"] and read_description(best)["data"]["labels"] == "labels.csv"
    capsys.readouterr()
    argv = ["--checkpoint", str(best), "--data.num_workers", "0", "--output", str(tmp_path / "r.json")]
    figures = validate(parse_validate(argv, options_of))
    assert f"mAP        {max(scores):.4f} %" in capsys.readouterr().out
    assert figures == read_description(best)["metrics"]
    written = json.loads((tmp_path / "r.json").read_text())
    assert written["mAP"] == figures["mAP"] and "top1" not in written
    assert sum(entry["images"] for entry in written["per_class"].values()) > written["images"]
    argv[-1] = str(tmp_path / "r.csv")
    validate(parse_validate([*argv, "--tta.flip"], options_of))
    assert "mAP" in (tmp_path / "r.csv").read_text().splitlines()[0]
    capsys.readouterr()
    assert main(["predict", str(root / "0.png"), str(root / "1.png"), "--checkpoint", str(best)]) == 0
    for line in capsys.readouterr().out.splitlines():
        assert all(float(share) >= 50 for share in line.split()[2::3])
    assert main(["predict", str(root / "0.png"), "--checkpoint", str(best), "--threshold", "1"]) == 0
    assert "no class at 100 %" in capsys.readouterr().out
    train(*parse_train(["--resume", str(folder), "--epochs", "5"]))
    assert train(*parse_train([*options, *dry])) is None and not (tmp_path / "dry").exists()
