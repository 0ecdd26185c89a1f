"""Frozen-feature evaluation: probes, their protocol, kept features, and validate.py --probe."""

import copy
import csv
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

import visionattn
from visionattn.cli.scripts import train
from visionattn.cli.scripts import validate as run
from visionattn.errors import VisionattnError
from visionattn.probes import (
    AttentiveProbe,
    LinearProbe,
    draw_attention,
    fit,
    frozen_features,
    knn_classifier,
    load_probe,
    save_probe,
)
from visionattn.probes.features import Stored, has_class_token, stored
from visionattn.probes.protocol import learning_rate
from visionattn.training import probing
from visionattn.weights.files import DESCRIPTION, write_checkpoint

ROOT = Path(__file__).parents[1]
DINAT = partial(visionattn.create_model, "test_dinat", num_classes=3)


def trained(dim: int = 24, classes: int = 5, **kwargs) -> AttentiveProbe:
    """A probe in float64 with statistics of its own."""
    probe = AttentiveProbe(dim, classes, dtype=torch.float64, **kwargs)
    torch.nn.init.normal_(probe.queries)
    probe(torch.randn(7, 9, dim, dtype=torch.float64))
    return probe.eval()


@pytest.mark.parametrize("kwargs", [{"num_queries": 4}, {"num_queries": 6, "d_out": 2, "value_bias": True}])
def test_the_fast_form_is_the_definition(kwargs):
    probe, x = trained(**kwargs), torch.randn(3, 11, 24, dtype=torch.float64)
    A = (probe.queries[0] @ x.mT / 24**0.5).softmax(-1)  # (B, Q, N)
    V = probe.v(x).unflatten(2, (kwargs["num_queries"], -1))  # (B, N, Q, D'/Q)
    y = torch.einsum("bqn,bnqe->bqe", A, V).flatten(1)
    logits, attention = probe(x, return_attention=True)
    for found, expected in (
        (probe.pool(x), y),
        (attention, A),
        (logits, probe.head(probe.norm(y))),
        (probe(x), logits),
    ):
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)


def test_what_pooling_is_blind_to():
    probe, x = trained(num_queries=4), torch.randn(3, 10, 24, dtype=torch.float64)
    same = x[:, :1].expand(-1, 10, -1)
    torch.testing.assert_close(probe.pool(same), probe.v(x[:, 0]))
    torch.testing.assert_close(probe(x[:, torch.randperm(10)]), probe(x))
    torch.testing.assert_close(probe(x.mT.unflatten(2, (2, 5))), probe(x))  # a map, row by row
    each = trained(num_queries=24)  # one channel for each query
    expected = torch.stack([each.attention(x)[:, q] for q in range(24)], 1) @ x
    torch.testing.assert_close(each.pool(x), torch.einsum("bqd,qd->bq", expected, each.v.weight))


@pytest.mark.parametrize("probe", [trained(num_queries=4), LinearProbe(24, 5, dtype=torch.float64)])
def test_folding_the_norm_is_exact(probe):
    x = torch.randn(6, 24, dtype=torch.float64)
    x = x[:, None] if isinstance(probe, AttentiveProbe) else x
    probe.train()(x)
    expected = probe.eval()(x)
    for _ in range(2):
        assert probe.fuse() is probe
        torch.testing.assert_close(probe(x), expected, atol=1e-12, rtol=1e-12)
    assert not list(probe.buffers())


def test_the_probe_is_exported_at_open_sizes():
    probe, sizes = trained(num_queries=4).float(), [torch.export.Dim(name, min=2, max=99) for name in "bn"]
    program = torch.export.export(probe, (torch.randn(3, 10, 24),), dynamic_shapes=({0: sizes[0], 1: sizes[1]},))
    x = torch.randn(5, 17, 24)
    torch.testing.assert_close(program.module()(x), probe(x))


@pytest.mark.slow
def test_the_probe_is_compiled_whole():
    probe, x = trained(num_queries=4).float(), torch.randn(5, 17, 24)
    torch.testing.assert_close(torch.compile(probe, fullgraph=True)(x), probe(x))


def test_queries_that_do_not_divide_the_channels():
    with pytest.raises(VisionattnError, match="32 queries x d_out 1 do not divide 72 channels: 24 queries would"):
        AttentiveProbe(72, 10)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda x, y: AttentiveProbe(24, 5, num_queries=0), "num_queries and d_out from 1 up, got 0 and 1"),
        (lambda x, y: AttentiveProbe(24, 5, d_out=0), "num_queries and d_out from 1 up, got 32 and 0"),
        (lambda x, y: knn_classifier(x, y, x, 0, 0.1, 2), "k from 1 up and a temperature above 0, got 0 and 0.1"),
        (lambda x, y: knn_classifier(x, y, x, 1, 0.0, 2), "k from 1 up and a temperature above 0, got 1 and 0.0"),
        (lambda x, y: knn_classifier(x, y, x, 1, float("nan"), 2), "got 1 and nan"),
        (lambda x, y: knn_classifier(x, y, x[:, 1:], 1, 0.1, 2), r"got \(4, 24\) and \(4, 23\)"),
        (lambda x, y: knn_classifier(x, y[1:], x, 1, 0.1, 2), r"expected 4 classes, got \(3,\)"),
        (lambda x, y: knn_classifier(x, y, x, 1, 0.1, 1), "expected classes from 0 to 0, got 1"),
        (lambda x, y: fit(LinearProbe(24, 2), Stored(x, y), Stored(x, y), epochs=0), "epochs from 1 up, got 0"),
        (lambda x, y: draw_attention(LinearProbe(24, 5), DINAT(), torch.zeros(3, 64, 64)), "a LinearProbe has none"),
        (lambda x, y: draw_attention(trained(num_queries=4), DINAT(), torch.zeros(3, 64, 64)), "24 channels, DiNAT"),
    ],
)
def test_arguments_that_cannot_be(call, told):
    with pytest.raises(VisionattnError, match=told):
        call(torch.randn(4, 24), torch.tensor([0, 1, 1, 0]))


def test_the_rate_goes_up_and_down():
    rates = [learning_rate(epoch, 90) for epoch in (0, 2.5, 10, 50, 90)]
    assert rates == pytest.approx([0, 0.25, 1, 0.5, 0])
    assert learning_rate(1, 9) == 1  # of a short run the warm-up is short


def test_neighbours_vote_as_in_scikit_learn(monkeypatch):
    monkeypatch.setattr("visionattn.probes.knn.MOST", 1000)  # in several parts
    rng = np.random.default_rng(0)
    train, test, labels = rng.normal(size=(200, 16)), rng.normal(size=(90, 16)), rng.integers(0, 7, 200)
    for k in (1, 5, 20, 200):
        for t in (0.07, 0.2):
            theirs = KNeighborsClassifier(
                k, weights=lambda d, t=t: np.exp((1 - d) / t), algorithm="brute", metric="cosine"
            )
            votes = knn_classifier(*map(torch.from_numpy, (train, labels, test)), k, t, 7)
            assert (votes.argmax(1).numpy() == theirs.fit(train, labels).predict(test)).all()
            shares = (votes / votes.sum(1, keepdim=True)).numpy()
            np.testing.assert_allclose(shares, theirs.predict_proba(test), rtol=1e-9)


@pytest.mark.parametrize("probe", [LinearProbe(8, 3), AttentiveProbe(8, 3, num_queries=2)])
def test_a_probe_is_kept_with_its_norm_or_without(probe, tmp_path: Path):
    x = torch.randn(4, 8) if type(probe) is LinearProbe else torch.randn(4, 5, 8)
    expected = probe.eval()(x)
    for _ in range(2):
        save_probe(tmp_path / "probe.safetensors", probe, {"classes": ["a"]})
        again, about = load_probe(tmp_path / "probe.safetensors")
        torch.testing.assert_close(again(x), expected)
        assert about == {"classes": ["a"]}
        probe.fuse()


def test_nothing_of_a_backbone_changes_that_allots_its_heads():
    options = {"mixer": "dgqa_ema", "head_dim": 8}
    model = visionattn.create_model("test_isotropic", **options).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    frozen_features(model, torch.randn(2, 3, 32, 32))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_votes_are_finite():
    x, labels = torch.eye(4), torch.tensor([0, 1, 1, 1])
    for dtype in (torch.float32, torch.bfloat16):
        votes = knn_classifier(x.to(dtype), labels, (x[:2] + 0.5).to(dtype), 4, 1e-4, 2)
        assert votes.isfinite().all() and votes.argmax(1).tolist() == [0, 1]


@pytest.mark.parametrize("name", ["test_dinat", "test_convit", "test_illama", "timm/test_vit", "timm/test_convnext"])
def test_features_are_those_of_the_last_block(name: str):
    make = timm.create_model if name.startswith("timm/") else visionattn.create_model
    model = make(name.removeprefix("timm/"), num_classes=3).train()
    size = 160 if name == "timm/test_vit" else 64
    before, x = copy.deepcopy(model.state_dict()), torch.randn(2, 3, size, size)
    patches, mean = frozen_features(model, x), frozen_features(model, x, "mean")
    assert all(module.training for module in model.modules()) and not patches.requires_grad
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    torch.testing.assert_close(patches.mean(1), mean)
    with torch.no_grad():
        model.eval()
        whole = model.forward_features(x)
        if not has_class_token(model):
            norm = getattr(model, "norm", None) or model.norm_pre
            maps = patches.mT.unflatten(2, whole.shape[2:])
            torch.testing.assert_close(norm(maps), whole)
            with pytest.raises(VisionattnError, match="has no class token"):
                frozen_features(model, x, "all")
        else:
            token, everything = frozen_features(model, x, "class"), frozen_features(model, x, "all")
            torch.testing.assert_close(everything, torch.cat([token[:, None], patches], 1))
            last = getattr(model, "class_token_last", False)
            order = torch.cat([patches, token[:, None]], 1) if last else everything
            torch.testing.assert_close(model.norm(order), whole)


def test_a_published_probe_is_read(tmp_path: Path):
    probe = trained(num_queries=4, value_bias=True).float()
    names = {"queries": "0.cls_token", "v": "0.v", "norm": "1", "head": "2"}
    state = {key.replace(top := key.partition(".")[0], names[top], 1): v for key, v in probe.state_dict().items()}
    torch.save(state, tmp_path / "published.pth")
    found, about = load_probe(tmp_path / "published.pth")
    x = torch.randn(2, 9, 24)
    assert about == {} and torch.equal(found(x), probe(x))
    torch.save({"weight": torch.zeros(2, 2)}, tmp_path / "other.pth")
    with pytest.raises(VisionattnError, match="other.pth holds no probe"):
        load_probe(tmp_path / "other.pth")


def test_the_best_epoch_is_kept():
    x, labels = torch.randn(60, 8), torch.arange(60) % 3
    x[:, :3] += 4 * torch.nn.functional.one_hot(labels, 3)
    data, probes = Stored(x, labels), [LinearProbe(8, 3) for _ in range(2)]
    probes[1].load_state_dict(probes[0].state_dict())
    found = [fit(probe, data, data, epochs=36, lr=20, batch_size=16) for probe in probes]
    assert found[0].top1 > 0.9 and torch.equal(probes[0](x), found[0].logits)
    assert found[0].epoch == found[1].epoch and torch.equal(found[0].logits, found[1].logits)


def batches_of(count: int, fail_at: int | None = None):
    for start in range(0, count, 4):
        if start == fail_at:
            raise KeyboardInterrupt
        yield torch.arange(start, start + 4.0)[:, None].half(), torch.arange(start, start + 4)


def test_kept_features_are_whole_or_not_there(tmp_path: Path):
    path = tmp_path / "kept" / "key"
    with pytest.raises(KeyboardInterrupt):
        stored(path, 12, batches_of(12, 8), {})
    assert not list(path.parent.iterdir())
    left = path.with_name(".key.tmp")  # by a process that was killed
    left.mkdir()
    (left / "features.npy").write_bytes(b"half")
    for batches in (batches_of(12), batches_of(12, 0)):  # the second is not asked
        found = stored(path, 12, batches, {"model": "m"})
        assert found.features.dtype == torch.float16 and found.features[:, 0].tolist() == list(range(12))
        assert found.labels.tolist() == list(range(12))
    assert [each.name for each in path.parent.iterdir()] == ["key"]
    with open(path / "features.npy", "r+b") as file:
        file.truncate(140)
    with pytest.raises(VisionattnError, match="key is damaged: remove it"):
        stored(path, 12, batches_of(12), {})


def make_images(root: Path) -> Path:
    """Two classes that differ in brightness, in a split to train on and one to validate on."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for name, base in (("dark", 0), ("light", 128)):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(base, base + 100, (40, 36, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture
def probed(tmp_path: Path, monkeypatch):
    """Runs validate.py in a folder with such images."""
    monkeypatch.chdir(tmp_path)
    make_images(tmp_path / "images")

    def call(*options: object) -> None:
        run([*map(str, options), "--data.root", "images", "--data.num_workers", "0", "--quiet"])

    return call


def test_three_probes(probed, monkeypatch, capsys):
    options = ["--model", "test_convit", "--data.img_size", 64, "--output", "r.csv"]
    probed("--probe", "knn", *options)
    assert "k 15       100.00 (T 0.07)" in capsys.readouterr().out
    short = ["--probing.epochs", 9, "--probing.lr", 50, "--probing.batch_size", 8]
    probed("--probe", "linear", *options, *short)
    probed("--probe", "attentive", *options, *short, "--probing.queries", 4, "--probing.tokens", "all")
    told = capsys.readouterr().out
    assert "attentive, on the class token and patches of the last block" in told and "top-1      100.0000 %" in told
    monkeypatch.setattr(probing, "frozen_features", pytest.fail)  # which knn has left for linear
    probed("--probe", "linear", *options[:-1], "again.json", *short)
    with open("r.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["probe"] for row in rows] == ["knn", "linear", "attentive"]
    assert all(row["top1"] == "100.0" and row["images"] == "8" and row["train_images"] == "16" for row in rows)
    record = json.loads(Path("again.json").read_text())
    assert record["per_class"] == {name: {"images": 4, "top1": 100.0} for name in ("dark", "light")}
    assert record["images_per_second"] == 0 and record["loss"] == pytest.approx(float(rows[1]["loss"]))
    probe, about = load_probe("runs/probes/test_convit-random-images-attentive.safetensors")
    assert about["classes"] == ["dark", "light"] and about["features"] == "all" and probe.queries.shape[1] == 4
    assert probe(torch.randn(2, 17, probe.queries.shape[2])).shape == (2, 2)


def test_probes_of_other_weights_and_options_stand_side_by_side(probed):
    """Those of a run are named by it; where names are the same, by what they are made from."""
    model = visionattn.create_model("test_isotropic", num_classes=2)
    for name in ("flow", "moh"):
        Path("runs", name, "checkpoints").mkdir(parents=True)
        torch.save(model.state_dict(), f"runs/{name}/checkpoints/best.pth")
    small = ["--model", "test_isotropic", "--model_kwargs.num_classes", 2, "--data.img_size", 32]
    small += ["--probe", "linear", "--output", "r.csv"]
    for _ in range(2):  # the second time the same files
        probed(*small, "--checkpoint", "runs/*/checkpoints/best.pth", "--probing.epochs", 1)
        probed(*small, "--checkpoint", "runs/moh/checkpoints/best.pth", "--probing.epochs", 2)
    with open("r.csv") as file:
        names = [Path(row["probe_file"]).stem for row in csv.DictReader(file)]
    assert (
        names[:2] == [f"test_isotropic-{run}-best-images-linear" for run in ("flow", "moh")] and names[3:] == names[:3]
    )
    assert names[2].startswith(f"{names[1]}-")
    abouts = [load_probe(f"runs/probes/{name}.safetensors")[1] for name in names[:3]]
    assert [about["epochs"] for about in abouts] == [1, 1, 2]


def test_features_are_not_those_of_another_mixer(probed, monkeypatch):
    """A file says itself which arguments its model has, with which the same weights make other features."""
    model = visionattn.create_model("test_isotropic", num_classes=2)
    for name, kwargs in (("plain", {}), ("flow", {"mixer": "flow"})):
        about = {"model": "test_isotropic", "model_kwargs": kwargs | {"num_classes": 2}}
        write_checkpoint(f"{name}.safetensors", model.state_dict(), {DESCRIPTION: json.dumps(about)})
        probed("--probe", "linear", "--model", f"{name}.safetensors", "--data.img_size", 32, "--probing.epochs", 1)
    assert len(list(Path("runs/probes/features").iterdir())) == 4
    assert {path.name for path in Path("runs/probes").glob("*.safetensors")} == {
        f"test_isotropic-{name}-images-linear.safetensors" for name in ("plain", "flow")
    }


def test_a_probe_of_a_checkpoint_and_of_timm(probed, capsys):
    model = visionattn.create_model("test_dinat", num_classes=10)
    torch.save(model.state_dict(), "w.pth")
    probed("--probe", "knn", "--model", "test_dinat,timm/test_vit,test_convnext", "--probing.k", "[3]")
    probed("--probe", "knn", "--model", "test_dinat", "--model_kwargs.num_classes", 10, "--checkpoint", "w.pth")
    told = [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("model ")]
    assert told == ["test_dinat", "timm/test_vit", "timm/test_convnext", "test_dinat"]


def test_the_attention_of_a_probe_is_drawn():
    model = visionattn.create_model("test_dinat", num_classes=10)
    probe = AttentiveProbe(model.num_features, 10, 2)
    picture = draw_attention(probe, model, torch.randn(3, 64, 96))
    assert picture.width > 900 and len(picture.getcolors(1 << 24)) > 100


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--task", "detection"], "option probe is of no use to detection"),
        (["--tta.flip"], "option tta.flip is of no use to a probe"),
        (["--probing.queries", 8], "option probing.queries is of no use to this probe"),
        (["--probing.k", "[]"], "probing.k is empty"),
        (["--probing.k", "[50]"], "option probing.k: 50 neighbours of 16 training images"),
        (["--probing.tokens", "patches"], "option probing.tokens: --probe knn takes class or mean, got patches"),
        (["--probing.tokens", "class"], "option probing.tokens: test_dinat has no class token for class"),
        (["--model", "timm/no_such"], "timm has no model no_such"),
        (["--model", "test_dinot"], "unknown model test_dinot"),
        (["--probe", "forest"], "option probe"),
        (["--probe", "attentive", "--probing.queries", 7], "7 queries x d_out 1 do not divide 128 channels: 4 queries"),
        (["--probe", "linear", "--probing.batch_size", 1], "two images or more in a batch, got 1 of 16"),
        (["--data.labels", "labels.csv"], "these have several"),
        (["--probing.folder", "images/val/dark/0.png"], "cannot write images/val/dark/0.png"),
    ],
)
def test_bad_requests_are_one_line(probed, options, told: str):
    with pytest.raises(VisionattnError, match=told) as error:
        probed("--probe", "knn", "--model", "test_dinat", *options)
    assert "\n" not in str(error.value)


def test_a_probe_wants_images_to_learn_from(probed):
    Path("images/train").rename("train")
    with pytest.raises(VisionattnError, match="images holds val/ to validate on, but no train/"):
        probed("--probe", "knn", "--model", "test_dinat")


def test_options_of_a_probe_want_one(probed):
    with pytest.raises(VisionattnError, match="option probing.k is of no use without probe"):
        probed("--model", "test_dinat", "--probing.k", "[5]")


def test_frozen_is_frozen():
    model = visionattn.create_model("test_van", num_classes=10).train()  # with batch norms and drop path
    before = copy.deepcopy(model.state_dict())
    x, labels = torch.randn(12, 3, 64, 64), torch.arange(12) % 3
    made = Stored(frozen_features(model, x), labels)
    fit(AttentiveProbe(made.features.shape[2], 3, 4), made, made, epochs=3, batch_size=4)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.slow
def test_a_probe_is_as_good_as_the_models_own_head(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    common = ["--data.num_workers", "0", "--quiet"]
    train(["--epochs", "12", "--trackers", "[]", "--report", "false", *common])
    best = ["--checkpoint", "runs/test_dinat-digits/checkpoints/best.safetensors", *common]
    run([*best, "--output", "head.json"])
    own = json.loads(Path("head.json").read_text())["top1"]
    for probe, options in {"knn": (), "linear": ("--probing.lr", "1"), "attentive": ()}.items():
        run([*best, "--probe", probe, *options, "--output", f"{probe}.json"])
        assert json.loads(Path(f"{probe}.json").read_text())["top1"] >= own - 1
