"""sigmaReparam: weights whose spectral norm is learned, in training, in checkpoints and folded."""

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

import visionattn
from visionattn import fold, sigma_reparam
from visionattn.errors import VisionattnError
from visionattn.layers.pointwise import Mlp
from visionattn.layers.spectral import Reparametrised, advance
from visionattn.training.checkpoint import read_saved, training_state
from visionattn.training.config import options_of, parse_train, parse_validate
from visionattn.training.evaluation import validate
from visionattn.training.logging import RunLog
from visionattn.training.trainer import Trainer
from visionattn.weights import convert_state_dict

QUICK = ["--data.num_workers", "0", "--data.batch_size", "4", "--epochs", "2", "--schedule.warmup_epochs", "0"]
QUICK += ["--trackers", "[]", "--report", "false", "--model", "test_convit", "--save_every", "1", "--sigma_reparam"]


def made(name: str = "test_convit", **options) -> nn.Module:
    torch.manual_seed(0)
    return sigma_reparam(visionattn.create_model(name, num_classes=3).double(), **options)


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def scrambled(module: nn.Module) -> nn.Module:
    for each in module.modules():
        if isinstance(each, Reparametrised):
            nn.init.normal_(each.u)
            nn.init.uniform_(each.gamma, 0.5, 2)
            nn.init.normal_(each._parameters["weight"])
    return module


@pytest.mark.parametrize("layer", [nn.Linear(9, 14), nn.Conv2d(3, 5, (3, 2))])
def test_norms(layer):
    layer = scrambled(sigma_reparam(copy.deepcopy(layer).double()))
    advance(layer, 200)
    W, shape = layer._parameters["weight"], layer.weight.shape
    norm = torch.linalg.matrix_norm(W.flatten(1), 2)
    for mode in (True, False):
        layer.train(mode)
        torch.testing.assert_close(layer.weight, layer.gamma / norm * W, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(torch.linalg.matrix_norm(layer.weight.flatten(1), 2), layer.gamma[0])
    x = torch.randn(2, 3, 9, 9).double()
    out = layer(x)
    with torch.no_grad():
        W.mul_(10)
    torch.testing.assert_close(layer(x), out)
    assert layer.weight.shape == shape


def test_blocks_of_rows_are_matrices_of_their_own():
    layer = nn.Linear(6, 12).double()
    parts = [nn.Linear(6, 4).double() for _ in range(3)]
    for part, weight, bias in zip(parts, layer.weight.chunk(3), layer.bias.chunk(3), strict=True):
        part.load_state_dict({"weight": weight.clone(), "bias": bias.clone()})
    x = torch.randn(2, 6).double()
    model = sigma_reparam(nn.Sequential(layer), 1.5, split={"0": 3})
    wanted = torch.cat([sigma_reparam(part, 1.5)(x) for part in parts], -1)
    torch.testing.assert_close(model(x), wanted)
    assert model[0].gamma.shape == (3,) and model[0].u.shape == (3, 6)
    torch.testing.assert_close(fold(model.eval())(x), wanted)
    with pytest.raises(ValueError, match="is called qkv"):
        sigma_reparam(nn.Sequential(nn.Linear(6, 12)), split={"qkv": 3})
    with pytest.raises(ValueError, match="12 rows, which are no 5 equal blocks"):
        sigma_reparam(nn.Sequential(nn.Linear(6, 12)), split={"*": 5})


def test_what_is_left_as_it_is():
    model = nn.Sequential(
        nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 2)
    )
    nn.init.zeros_(model[4].weight)
    sigma_reparam(model, remove_norms=True)
    kinds = [type(module).__name__ for module in model]
    assert kinds == ["Conv2d", "SigmaConv2d", "Identity", "Flatten", "Linear"]


@pytest.mark.parametrize("name", ["test_convit", "test_davit", "test_halonet", "test_illama"])
@torch.no_grad()
def test_conversion_is_exact_and_folds(name):
    plain, x = visionattn.create_model(name, num_classes=3).double().eval(), torch.randn(2, 3, 64, 64).double()
    keys, out = plain.state_dict().keys(), plain(x)
    model = sigma_reparam(plain)
    assert (model(x) - out).abs().max() < 1e-10 * max(1, out.abs().max())
    out = scrambled(model)(x)
    file = visionattn.create_model(name, num_classes=3).double().eval()
    visionattn.weights.load_pretrained(file, model.state_dict())
    for folded in (fold(copy.deepcopy(model)), copy.deepcopy(model).fuse(), file):
        assert (folded(x) - out).abs().max() < 1e-10 * max(1, out.abs().max())
        assert not any(isinstance(module, Reparametrised) for module in folded.modules())
    assert fold(model).state_dict().keys() == keys


def published(module: nn.Module) -> dict[str, Tensor]:
    """A state dict with the names of the published code."""
    out = {}
    for key, value in module.state_dict().items():
        prefix, _, name = key.rpartition(".")
        prefix = f"{prefix}." if prefix else ""
        if name == "gamma":
            norms = ("effective_spectral_norm", "spectral_normed_weight.spectral_norm")
            out |= {f"{prefix}sigma": value[0], **dict.fromkeys((prefix + norm for norm in norms), value[0])}
        elif name == "u":
            weight = out[f"{prefix}weight"].flatten(1)
            out |= {f"{prefix}weight": weight, f"{prefix}spectral_normed_weight.weight": weight}
            out[f"{prefix}spectral_normed_weight.u"] = value
        else:
            out[key] = value
    return out


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("make", [lambda: nn.Linear(9, 14), lambda: nn.Conv2d(3, 5, (3, 2)), made])
def test_published_names_are_read(make, folded):
    source = scrambled(sigma_reparam(make().double())).eval()
    model = make().double()
    model = fold(model) if folded else sigma_reparam(model)
    file = published(source)
    assert not any(key.endswith("gamma") for key in file) and any(
        key.endswith("spectral_normed_weight.u") for key in file
    )
    x = torch.randn(2, 3, 32, 9 if isinstance(model, nn.Linear) else 32).double()
    for content in (file, {k: v for k, v in file.items() if f"{k.removesuffix('weight')}sigma" not in file}):
        model.load_state_dict(convert_state_dict({"model": content}, model))
        torch.testing.assert_close(model.eval()(x), source(x))


def test_graphs():
    model = sigma_reparam(Mlp(6, 8)).double()
    x = torch.randn(2, 5, 6).double()
    out = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(out, model(x), rtol=0, atol=1e-12)
    grads = (torch.autograd.grad(each.square().sum(), list(model.parameters())) for each in (out, model(x)))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    program = torch.export.export(model.eval(), (x,)).module()
    torch.testing.assert_close(program(x), model(x), rtol=0, atol=1e-12)


def test_checkpoints_and_accumulated_batches():
    x, found = images(8), {}

    def updated(key: str, model: nn.Module, parts: int) -> None:
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(3):
            advance(model)
            for part in x.chunk(parts):
                (model(part).square().mean() / parts).backward()
            optimizer.step()
            optimizer.zero_grad()
        found[key] = model.state_dict()

    for key, parts in {"plain": 1, "parts": 4}.items():
        updated(key, made(), parts)
    model = made()
    model.set_grad_checkpointing()
    updated("checkpoints", model, 1)
    for key in ("parts", "checkpoints"):
        for name, tensor in found["plain"].items():
            torch.testing.assert_close(found[key][name], tensor, rtol=1e-9, atol=1e-11)


def test_models_are_pickled_and_copied():
    model = sigma_reparam(nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Conv2d(3, 4, 3)), split={"0": 2})
    for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert type(again[0]) is type(model[0]) and again.state_dict().keys() == model.state_dict().keys()
        assert torch.equal(again[0].weight, model[0].weight) and torch.equal(again[2].v, model[2].v)
        assert type(fold(again)[0]) is nn.Linear


def test_zeros_stay_zeros():
    layer = nn.Linear(6, 8, bias=False)
    nn.init.zeros_(layer.weight[:4])
    expected = layer.weight.clone()
    layer = sigma_reparam(layer, split={"": 2})
    torch.testing.assert_close(layer.weight, expected)
    layer(torch.randn(2, 6)).square().sum().backward()
    assert layer._parameters["weight"].grad.isfinite().all()


@pytest.mark.parametrize(
    "options, told",
    [
        ({"gamma": "nrm"}, "^expected gamma 'norm' or a number > 0, got 'nrm'"),
        *(({"gamma": value}, f"'norm' or a number > 0, got {value}") for value in (None, 0, -1.0, float("nan"))),
        *(({"split": {"*": n}}, "an integer number of blocks for '\\*' in split >= 1") for n in (0, -1, 1.5, "x")),
        ({"split": {"b": 3}}, "split: b has 4 rows, which are no 3 equal blocks"),
        ({"split": {"d": 3}}, "split: no linear map or ungrouped convolution is called d"),
        ({"change": lambda m: m.to("meta")}, "^a is on the device meta; expected weights with values"),
        ({"change": lambda m: nn.init.constant_(m["b"].weight, torch.nan)}, "^b has weights that are not finite"),
        ({"change": lambda m: setattr(m["b"], "weight", m["a"].weight)}, "^a and b share a weight, which a gamma"),
        ({"change": lambda m: setattr(m["c"], "weight", m["b"].weight)}, "^b and c share a weight, which a gamma"),
    ],
)
def test_what_cannot_be_changed_stays_as_it_was(options, told):
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "n": nn.LayerNorm(4), "b": nn.Linear(4, 4), "c": nn.Embedding(4, 4)})
    options = dict(options)
    options.pop("change", lambda m: None)(model)
    with pytest.raises(ValueError, match=told):
        sigma_reparam(model, **options, remove_norms=True)
    assert [type(each) for each in model.values()] == [nn.Linear, nn.LayerNorm, nn.Linear, nn.Embedding]


@pytest.mark.parametrize("every_forward", [False, True])
def test_an_iteration_may_come_before_the_backward_pass(every_forward):
    layer = sigma_reparam(nn.Linear(6, 4), every_forward=every_forward)
    y = layer(torch.randn(2, 6))
    advance(layer)
    (y + layer(torch.randn(2, 6))).sum().backward()
    assert layer.gamma.grad.isfinite().all()


def test_mixed_precision_does_not_round_norms():
    layer = sigma_reparam(nn.Linear(64, 64))
    weight = layer.weight
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.weight, weight) and weight.dtype == torch.float32
    layer.to(torch.bfloat16)
    assert layer(torch.randn(2, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


class Killed(BaseException):
    """Stands for a kill."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of images."""
    root = tmp_path_factory.mktemp("images")
    for i, name in enumerate(("train/a", "train/b", "val/a", "val/b")):
        (root / name).mkdir(parents=True)
        for j in range(6):
            pixels = np.random.default_rng([i, j]).integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{j}.png")
    return root


def test_a_run_is_resumed_with_the_same_bits_and_validated(tmp_path: Path, folder: Path, monkeypatch):
    def run(name: str, *more: str) -> Path:
        options = [*QUICK, "--data.root", str(folder), "--output", str(tmp_path), "--name", name, *more]
        return Trainer(*parse_train([*options, "--ema.decay", "0.9"])).fit()

    whole, step, made = run("whole"), RunLog.step, []

    def killed(log: RunLog, count: int) -> None:
        step(log, count)
        made.append(count)
        if len(made) == 5:  # in the second epoch, whose first updates are saved
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "step", killed)
        with pytest.raises(Killed):
            run("part")
    with pytest.raises(VisionattnError, match="sigma_reparam cannot change"):
        parse_train(["--resume", str(tmp_path / "part"), "--sigma_reparam", "false"])
    Trainer(*parse_train(["--resume", str(tmp_path / "part")])).fit()
    one, other = (read_saved(tmp_path / name / "checkpoints" / "last.safetensors") for name in ("whole", "part"))
    assert one.content.keys() == other.content.keys()
    assert all(torch.equal(one.content[key], other.content[key]) for key in one.content)
    groups = training_state(one)["optimizer"]["param_groups"]
    assert all(not group["weight_decay"] for group in groups if any(n.endswith("gamma") for n in group["params"]))

    best = whole / "checkpoints" / "best.safetensors"
    assert {"head.gamma", "head.u", "head.weight"} <= load_file(best).keys()
    arguments = ["--checkpoint", str(best), "--data.root", str(folder)]
    config = parse_validate(arguments, options_of)
    results = validate(config)
    rows = (whole / "metrics.csv").read_text().splitlines()
    columns, losses = (
        rows[0].split(","),
        [dict(zip(rows[0].split(","), row.split(","), strict=True)) for row in rows[1:]],
    )
    assert "val_loss" in columns and any(abs(float(row["val_loss"]) - results["loss"]) < 2e-6 for row in losses)
    model = visionattn.create_model(str(best))
    assert model.state_dict().keys() == visionattn.create_model("test_convit").state_dict().keys()


def test_options():
    with pytest.raises(VisionattnError, match="sigma_gamma is of no use without sigma_reparam"):
        parse_train(["--sigma_gamma", "one"])
