"""What is explained is what the models compute, and is where the evidence is."""

import io
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import visionattn
from visionattn.cli import main
from visionattn.cli.explain import _most_but
from visionattn.errors import VisionattnError
from visionattn.explain import attention_maps, cam_layers, grad_cam, layer_maps, rollout
from visionattn.explain.capture import capture
from visionattn.explain.map import IN_WINDOWS, NOWHERE, OF_TOKENS, ON_MAP
from visionattn.explain.maps import LAYERS, entry_of
from visionattn.layers import (
    AgentAttention,
    AggregatedAttention,
    AttentiveConv2d,
    CausalSelfAttention,
    CogAttention,
    ContMix2d,
    CosineAttention,
    FlowAttention,
    HaloAttention2d,
    HiLoAttention,
    KeyDrivenGQA,
    LinearLogNormalAttention,
    MixtureOfHeadAttention,
    NeighborhoodAttention2d,
    NormAwareLinearAttention,
    PolarizedSelfAttention,
    ReducedAttention,
    ReversedAttention,
    SelectiveSelfAttention,
    SelfAttention,
    ShiftedWindowAttention2d,
    SparseAttention,
    StripeAttention2d,
    SubspaceAttention,
    TokenAttentiveConv2d,
    TokenFocalModulation,
    TokenNeighborhoodAttention,
    TokenRelPosAttention,
    WindowAttention2d,
)
from visionattn.models.mixers import MIXERS

ROOT = Path(__file__).parents[1]
FAMILIES = sorted(visionattn.list_models("test_*"))
BLOCKS = {
    "aggregated": (AggregatedAttention(16, 4, window=5, pool_ratio=3, shared=1, top_k=2), (2, 8, 11, 16)),
    "aggregated linear": (AggregatedAttention(16, 2, pool_size=3, router=None), (2, 7, 2, 16)),
    "agents": (AgentAttention(16, 2, (4, 6), agent_num=9, agent_shape=(2, 4)), (2, 7, 5, 16)),
    "agents of tokens": (AgentAttention(16, 2, (5, 3), agent_num=4, class_token=True), (2, 16, 16), (5, 3)),
    "attentive": (AttentiveConv2d(8), (2, 8, 9, 7)),
    "attentive tokens": (TokenAttentiveConv2d(8), (2, 15, 8), (3, 5)),
    "causal": (CausalSelfAttention(16, 2), (2, 11, 16), None, 0.4),
    "cog": (CogAttention(16, 2, qkv_bias=True), (2, 15, 16), (3, 5)),
    "cosine": (CosineAttention(16, 4, shared=0, top_k=2), (2, 5, 7, 16)),
    "contmix": (ContMix2d(16, 2, kernel_size=7), (2, 16, 9, 13)),
    "contmix small map": (ContMix2d(16, 2, 7, context_dim=3), (2, 16, 4, 6), torch.randn(2, 3, 4, 6)),
    "flow tokens": (FlowAttention(16, 2), (2, 15, 16), (3, 5)),
    "focal tokens": (TokenFocalModulation(8, 3, 2), (2, 15, 8), (3, 5)),
    "halo": (HaloAttention2d(8, num_heads=2, block_size=4, halo_size=2), (2, 8, 9, 11)),
    "halo masked": (HaloAttention2d(8, num_heads=2, block_size=4, halo_size=2, mask="all"), (2, 8, 9, 11)),
    "halo strided": (HaloAttention2d(8, stride=2, num_heads=2, block_size=4, scale_pos_embed=True), (2, 8, 9, 11)),
    "halo pooled": (HaloAttention2d(8, stride=2, num_heads=2, avg_down=True), (2, 8, 9, 11)),
    "hilo": (HiLoAttention(16, 4, window_size=2, alpha=0.25), (2, 7, 5, 16)),
    "key-driven": (KeyDrivenGQA(16, 8, 3, "kdgqa"), (2, 15, 16), (3, 5)),
    "key-driven by samples": (KeyDrivenGQA(16, 8, kind="kdgqa", per_sample=True), (2, 15, 16), (3, 5)),
    "key-driven over time": (KeyDrivenGQA(16, 8, kind="dgqa_ema"), (2, 15, 16), (3, 5)),
    "grouped queries less noise": (KeyDrivenGQA(16, 8, kind="pgqa"), (2, 15, 16), None, torch.rand(4, 2, 30)),
    "log-normal": (LinearLogNormalAttention(16, 2), (2, 15, 16), (3, 5)),
    "log-normal in windows": (
        LinearLogNormalAttention(16, 2, "learnable_scale", window_size=2, per_sample=True),
        (2, 15, 16),
        (3, 5),
    ),
    "log-normal everywhere": (LinearLogNormalAttention(16, 2, block_diagonal=False), (2, 15, 16), (3, 5)),
    "mixture of heads": (MixtureOfHeadAttention(16, 4, 1, 2), (2, 15, 16), (3, 5)),
    "neighbourhood": (NeighborhoodAttention2d(16, 2, kernel_size=(3, 5), stride=(1, 2)), (2, 9, 13, 16)),
    "neighbourhood dilated": (NeighborhoodAttention2d(16, 2, kernel_size=3, dilation=(2, 3)), (2, 11, 14, 16)),
    "neighbourhood unbiased": (NeighborhoodAttention2d(16, 2, rel_pos_bias=False), (1, 30, 33, 16)),
    "neighbourhood large": (NeighborhoodAttention2d(8, 2, kernel_size=7), (1, 75, 81, 8)),
    "neighbourhood small map": (NeighborhoodAttention2d(16, 2, kernel_size=7, dilation=2), (2, 5, 9, 16)),
    "neighbourhood tokens": (TokenNeighborhoodAttention(16, 2, kernel_size=3), (2, 35, 16), (5, 7)),
    "norm-aware": (NormAwareLinearAttention(16, 2), (2, 16, 7, 5)),
    "norm-aware by softmax": (NormAwareLinearAttention(16, 2, "softmax"), (2, 16, 7, 5)),
    "polarized": (PolarizedSelfAttention(8), (2, 8, 5, 7)),
    "polarized in sequence": (PolarizedSelfAttention(16, "sequential"), (2, 16, 5, 7)),
    "reduced": (ReducedAttention(16, 2), (2, 15, 16), (3, 5)),
    "reduced, super": (ReducedAttention(16, 2, "super", 15), (2, 15, 16)),
    "reversed": (ReversedAttention(16, 2), (2, 15, 16), torch.rand(2, 15)),
    "plain": (SelfAttention(16, 4, qk_norm=True, clip=(-0.03, 1.01), gate="token"), (2, 15, 16)),
    "plain with gates of heads": (SelfAttention(16, 4, gate="head"), (2, 15, 16), (3, 5)),
    "relative": (TokenRelPosAttention(16, 2, kernel_size=3), (2, 35, 16), (5, 7)),
    "selective": (SelectiveSelfAttention(16, 2, position="index", on="qkv"), (2, 15, 16), (3, 5)),
    "shifted windows": (ShiftedWindowAttention2d(16, 2, window_size=4, shifted=True), (2, 9, 11, 16)),
    "stripes": (StripeAttention2d(16, 2, 4), (2, 9, 11, 16)),
    "one stripe": (StripeAttention2d(16, 2, None), (2, 5, 7, 16)),
    "subspace": (SubspaceAttention(8, 2), (2, 8, 5, 7)),
    "sparse": (SparseAttention(16, 26, 2), (2, 26, 16), (5, 5)),
    "sparse by threshold": (
        SparseAttention(16, 26, 2, basis_coef_topk=None, attn_score_topk=False, attn_score_threshold=3e-3),
        (2, 26, 16),
        (5, 5),
    ),
    "sparse of pruned": (SparseAttention(16, 26, 2), (2, 11, 16), (5, 5), torch.arange(0, 20, 2).expand(2, -1)),
    "windows": (WindowAttention2d(16, 2, window_size=4), (2, 9, 11, 16)),
}

UNNORMALISED = (
    CausalSelfAttention,
    CogAttention,
    LinearLogNormalAttention,
    NormAwareLinearAttention,
    ReversedAttention,
)


def scramble(module: nn.Module) -> None:
    """Biases, gates and scales that are not those of initialisation."""
    for parameter in module.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, 0.5, 0.3)


def check(layer: nn.Module, args: tuple, kwargs: dict, out: Tensor) -> None:
    maps, made = layer_maps(layer, *args, **kwargs)
    assert (made - out).abs().max() <= 1e-5 * out.abs().max().clamp(min=1)
    unnormalised = isinstance(layer, UNNORMALISED) or getattr(layer, "kind", "") == "super"
    unnormalised |= getattr(layer, "clip", None) is not None
    for found in maps:
        assert found.values.ndim == len(found.axes)
        if found.kind in ("attention", "content", "position") and not unnormalised:
            rows = found.values.flatten(-2 if found.axes == ON_MAP else -1).sum(-1)
            rows = rows[:, :, 1:] if found.patches is not None else rows
            assert (((rows - 1).abs() < 1e-5) | (rows == 0)).all() and rows.mean() > 0.5


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_weights_times_values_are_what_every_layer_of_a_family_returns(name):
    model, outs = visionattn.create_model(name).eval(), []
    scramble(model)
    modules = {each: module for each, module in model.named_modules() if entry_of(module)}
    handles = [m.register_forward_hook(lambda m, args, out: outs.append(out)) for m in modules.values()]
    with capture(model) as found:
        model(torch.randn(2, 3, 45, 61))
    for handle in handles:
        handle.remove()
    assert modules and [call[0] for call in found.calls] == list(modules)
    for (_, layer, args, kwargs, _), out in zip(found.calls, outs, strict=True):
        check(layer, args, kwargs, out[0] if isinstance(out, tuple) else out)


@pytest.mark.parametrize("name", BLOCKS)
@torch.no_grad()
def test_weights_times_values_are_what_a_block_returns(name):
    layer, shape, *rest = BLOCKS[name]
    scramble(layer.eval())
    x = torch.randn(shape)
    out = layer(x, *rest)
    check(layer, (x, *rest), {}, out[0] if isinstance(out, tuple) else out)


def test_every_attention_block_has_maps():
    exported = {each for each in vars(visionattn.layers).values() if isinstance(each, type)}
    without = {each.__name__ for each in exported if not any(base in LAYERS for base in each.__mro__)}
    # What is no attention, or holds a block that has maps, or is a part of one.
    assert without == {
        "ConvPosEnc", "PartialConv2d", "VanAttention", "ConnectivityPredictor", "GlobalLocalFilter", "HeadRouter",
        "ContMixBlock", "DilatedReparamConv2d", "MixerGate", "NiNBlock", "ActivatorGate", "ActivatorBlock",
        "HeadGate",
    }  # fmt: skip


def test_the_page_names_blocks_of_no_family_and_those_whose_rows_do_not_sum_to_one():
    table, _, exceptions = (ROOT / "docs/explain.md").read_text().partition("Rows of attention")
    blocks = (ROOT / "docs/blocks.md").read_text().splitlines()
    alone = [name for line in blocks if "no family" in line or ", alone" in line for name in line.split("`")[1::2]]
    known = [name for name in alone if getattr(visionattn.layers, name, None) in LAYERS]
    assert "ReversedAttention" in known and [name for name in known if f"`{name}`" not in table] == []
    families = {"CausalSelfAttention": "iLLaMA", "NormAwareLinearAttention": "NaLaFormer"}
    assert all(families.get(each.__name__, each.__name__) in exceptions for each in UNNORMALISED)


@torch.no_grad()
def test_convit_equation():
    layer = visionattn.create_model("test_convit").blocks[1].mixer.eval()
    scramble(layer)
    (H, W), x = (3, 4), torch.randn(1, 12, 64)
    attention, content, position, gate = layer_maps(layer, x, (H, W))[0]
    q, k = layer.qk(x)[0].view(12, 2, 4, 16).unbind(1)
    for h in range(4):
        logits = q[:, h] @ k[:, h].T * 16**-0.5
        rel = torch.tensor(
            [[(j % W - i % W, j // W - i // W, (j % W - i % W) ** 2 + (j // W - i // W) ** 2) for j in range(12)]
             for i in range(12)]
        )  # fmt: skip
        places = rel.float() @ layer.pos_proj.weight[h] + layer.pos_proj.bias[h]
        g = torch.sigmoid(layer.gating_param[h])
        wanted = (1 - g) * logits.softmax(1) + g * places.softmax(1)
        torch.testing.assert_close(attention.values[0, h], wanted / wanted.sum(1, keepdim=True), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(gate.values[h], g)
    assert content.kind == "content" and position.kind == "position"


def test_windows_say_which_keys_a_query_sees():
    layer = NeighborhoodAttention2d(8, 2, kernel_size=3, dilation=2).eval()
    (found,), _ = layer_maps(layer, torch.randn(1, 9, 12, 8))
    assert found.axes == IN_WINDOWS and found.values.shape == (1, 2, 9, 12, 9)
    assert found.keys[4, 5].tolist() == [[row, col] for row in (2, 4, 6) for col in (3, 5, 7)]
    (found,), _ = layer_maps(HaloAttention2d(8, num_heads=2, block_size=4, halo_size=1).eval(), torch.randn(1, 8, 8, 8))
    assert found.keys[5, 1].unique(dim=0).tolist() == [[r, c] for r in range(3, 9) for c in range(-1, 5)]
    assert NOWHERE not in found.keys


@torch.no_grad()
def test_named_axes():
    images = torch.randn(2, 3, 64, 96)
    axes = {each.axes for name in FAMILIES for each in attention_maps(visionattn.create_model(name), images)}
    assert axes == {
        ON_MAP,
        IN_WINDOWS,
        OF_TOKENS,
        ("batch", "head", "query_channel", "key_channel"),
        ("batch", "channel", "row", "col"),
        ("batch", "level", "row", "col"),
        ("batch", "head", "row", "col"),
        ("batch", "channel", "kernel_row", "kernel_col"),
        ("batch", "channel"),
        ("batch", "head", "row", "col"),
        ("head",),
    }
    model = visionattn.create_model("test_illama").train()
    found = attention_maps(model, images, "blocks.1.*")[0]
    assert found.grid == (8, 12) and found.class_token == -1 and found.layer == "blocks.1.mixer" and model.training
    places, token = found.spread(torch.zeros(2, 8, 12), torch.ones(2))
    torch.testing.assert_close(places.flatten(2), found.values[:, :, -1, :-1])
    torch.testing.assert_close(token, found.values[:, :, -1, -1])


def test_grad_cam_is_that_of_captum():
    captum = pytest.importorskip("captum.attr")
    model, images = visionattn.create_model("test_focalnet", num_classes=5).eval(), torch.randn(2, 3, 96, 64)
    for layer in ("stages.1", "stages.3"):
        (found,) = grad_cam(model, images, [3, 1], [layer])
        wanted = captum.LayerGradCam(model, model.get_submodule(layer)).attribute(
            images, torch.tensor([3, 1]), relu_attributions=True
        )
        wanted = F.interpolate(wanted.detach(), (96, 64), mode="bilinear")[:, 0]
        torch.testing.assert_close(found.values, wanted / wanted.amax((1, 2), keepdim=True))


def test_rollout_is_the_product_of_the_papers_matrices():
    model, images = visionattn.create_model("test_sparsifiner").eval(), torch.randn(2, 3, 32, 48)
    product = torch.eye(25)
    for found in attention_maps(model, images):
        if found.kind == "attention":
            product = (found.values.mean(1) + torch.eye(25)) / 2 @ product
    wanted = F.interpolate(product[:, 0, 1:].view(2, 1, 4, 6), (32, 48), mode="bilinear")[:, 0]
    torch.testing.assert_close(rollout(model, images)[0].values, wanted / wanted.amax((1, 2), keepdim=True))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_grad_cam_and_rollout(name):
    model, images = visionattn.create_model(name, num_classes=4).eval(), torch.randn(2, 3, 70, 64)
    for found in (*grad_cam(model, images, 2, cam_layers(model)), *rollout(model, images)):
        assert found.values.shape == images[:, 0].shape and 0 <= found.values.min() <= found.values.max() <= 1
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", ["test_isotropic", "test_pyramid"])
@pytest.mark.parametrize("mixer", [name for name in visionattn.list_mixers() if MIXERS[name].state])
def test_blocks_that_hand_something_on_have_grad_cam_and_rollout(name, mixer):
    model, images = visionattn.create_model(name, mixer=mixer).eval(), torch.randn(2, 3, 64, 96)
    for found in (*grad_cam(model, images, 2, cam_layers(model)), *rollout(model, images)):
        assert found.values.shape == images[:, 0].shape and found.values.isfinite().all()
    assert all(found.axes != OF_TOKENS for found in attention_maps(model, images))  # where they are is known


def test_detectors_and_segmenters_have_grad_cam():
    pytest.importorskip("segmentation_models_pytorch")
    images = torch.randn(1, 3, 64, 96)
    segmenter = visionattn.create_segmenter("test_van", "fpn", 4)
    assert grad_cam(segmenter, images)[0].values.shape == (1, 64, 96)
    detector = visionattn.create_detector("test_dinat", "fcos", 3, score_thresh=0.0)
    (found,) = grad_cam(detector, images, 2)
    assert found.values.shape == (1, 64, 96) and found.classes.tolist() == [2]


@cache
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8))


def test_command_writes_pictures(tmp_path, capsys):
    picture().save(tmp_path / "a.png")
    common = ["explain", str(tmp_path / "a.png"), "--model", "test_halonet", "--output", str(tmp_path / "out")]
    assert main([*common, "--class", "7", "--grid", "--gif"]) == 0
    assert "class 7 (" in capsys.readouterr().out
    assert main([*common, "--method", "attention", "--layer", "stages.0.*", "--query", "5,20", "--head", "0"]) == 0
    files = {path.name: path for path in (tmp_path / "out").iterdir()}
    assert set(files) == {"a-gradcam.png", "a-gradcam-grid.png", "a-gradcam.gif", "a-attention.png"}
    assert Image.open(files["a-gradcam.gif"]).n_frames == len(cam_layers(visionattn.create_model("test_halonet")))
    held = files["a-gradcam.png"].read_bytes()
    assert main(common) == 2 and "a-gradcam.png exists" in capsys.readouterr().err
    assert main([*common, "--class", "giraffe-like"]) == 2 and "no class giraffe-like" in capsys.readouterr().err
    assert files["a-gradcam.png"].read_bytes() == held


@pytest.mark.filterwarnings("error")
def test_command_takes_what_predict_takes(tmp_path, capsys, monkeypatch):
    """Folders, whose pictures go by their places, and stdin; what is no image is told, and the others go on."""
    monkeypatch.chdir(tmp_path)
    for name in ("photos/x/a.png", "photos/y/a.png"):
        Path(name).parent.mkdir(parents=True)
        picture().save(name)
    Path("photos/text.png").write_text("no image")
    common = ["explain", "--model", "test_van", "--output", "out"]
    assert main([*common, "photos", "nowhere.png"]) == 1
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2
    *errors, random = err.splitlines()
    assert errors == [
        "error: cannot read photos/text.png: it is no image",
        "error: cannot read nowhere.png: there is no such file or folder",
    ]
    assert random == "test_van has random weights: --pretrained has the published ones"
    assert sorted(map(str, Path("out").rglob("*.png"))) == ["out/x/a-gradcam.png", "out/y/a-gradcam.png"]
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(Path("photos/x/a.png").read_bytes())))
    assert main([*common, "-", "--quiet"]) == 0 and Path("out/stdin-gradcam.png").exists()
    assert not capsys.readouterr().err
    assert main([*common, "photos/x/a.png", "photos/y/a.png"]) == 2
    assert "several images are called a" in capsys.readouterr().err


@pytest.mark.parametrize("how", [grad_cam, rollout])
def test_extractors_have_no_classes(how):
    model = visionattn.create_model("test_dinat", features_only=True).eval()
    with pytest.raises(VisionattnError, match="expected a classifier, a segmenter or a detector, got an extractor"):
        how(model, torch.randn(1, 3, 64, 64))


def test_a_background_is_not_what_a_map_is_explained_for():
    logits = F.one_hot(torch.tensor([[[0, 0, 0], [0, 2, 1], [0, 1, 0]]]), 4).permute(0, 3, 1, 2).float()
    assert _most_but(0, lambda images: logits, logits) == 1
    assert _most_but(1, lambda images: logits, logits) == 0
    assert _most_but(0, lambda images: logits[:, :1], logits) is None
    assert _most_but(0, lambda images: logits[:, :, 0, 0], logits) is None


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ([], "give --model or --checkpoint"),
        (["--model", "test_van", "--head", "1"], "--head is of no use to --method gradcam"),
        (["--model", "test_van", "--class", "giraffe-like"], "no class giraffe-like"),
        (["--model", "test_van", "--class", "1000"], "expected a class from 0 to 999, got 1000"),
        (["--model", "test_van", "--layer", "stages.9"], "no layer stages.9 for gradcam: there are stages.0,"),
        (["--model", "test_van", "--method", "attention", "--layer", "x"], "no layer x: there are stages.0.blocks.0"),
        (["--model", "test_van", "--kwargs", "in_chans=5"], "a model with in_chans 5 cannot take them"),
        (["--model", "test_dinat", "--method", "attention", "--query", "1"], "expected ROW,COL"),
        (["--model", "test_dinat", "--method", "attention", "--query", "40,1"], "in the model's 32 x 32 pixels"),
        (["--model", "test_dinat", "--method", "attention", "--head", "9"], "has heads 0 to 7, got 9"),
    ],
)
def test_command_refuses_in_one_line(tmp_path, capsys, given, told):
    picture().save(tmp_path / "a.png")
    assert main(["explain", str(tmp_path / "a.png"), "--output", str(tmp_path / "out"), *given]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1 and not list(tmp_path.glob("out/*"))


def planted(count: int, canvas: int, side: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images (N, 1, canvas, canvas) with a digit in noise, the digits, and where they are."""
    load_digits = pytest.importorskip("sklearn.datasets").load_digits
    generator, digits = torch.Generator().manual_seed(seed), load_digits()
    chosen = torch.randint(len(digits.images), (count,), generator=generator)
    drawn = F.interpolate(torch.from_numpy(digits.images[chosen]).float()[:, None] / 16, (side, side), mode="bilinear")
    images = 0.3 * torch.rand(count, canvas, canvas, generator=generator)
    objects = torch.zeros(count, canvas, canvas, dtype=torch.bool)
    for i, (y, x) in enumerate(torch.randint(canvas - side + 1, (count, 2), generator=generator).tolist()):
        images[i, y : y + side, x : x + side] += drawn[i, 0]
        objects[i, y : y + side, x : x + side] = True
    return images[:, None] * 2 - 1, torch.from_numpy(digits.target)[chosen].long(), objects


def train(model: nn.Module, images: Tensor, labels: Tensor, steps: int, lr: float) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.2)
    for _ in range(steps):
        batch = torch.randint(len(images), (32,))
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def density(values: Tensor, objects: Tensor) -> float:
    """How many times as much lies on the objects as elsewhere, place for place."""
    return (values[objects].mean() / values[~objects].mean()).item()


PLANTED = {
    "test_attnet": (
        {
            "depths": (1, 1),
            "dims": (16, 32),
            "exp_rates": (8, 8),
            "kernel_sizes": (3, 3),
            "glu_dconv": (True, True),
            "glu_norm": (True, True),
        },
        48,
        20,
        600,
        5e-3,
    ),
}
"""Arguments, side of the canvas and of the digits, steps and learning rate."""


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANTED)
def test_evidence_is_on_the_object(name):
    """Grad-CAM and rollout of a model that reads planted digits are twice as dense on them as elsewhere."""
    kwargs, canvas, side, steps, lr = PLANTED[name]
    model = visionattn.create_model(name, in_chans=1, num_classes=10, **kwargs)
    train(model, *planted(3000, canvas, side, 0)[:2], steps, lr)
    images, labels, objects = planted(50, canvas, side, 1)
    with torch.no_grad():
        assert (model.eval()(images).argmax(1) == labels).float().mean() > 0.8
    assert density(grad_cam(model, images)[0].values, objects) >= 2
    assert density(rollout(model, images)[0].values, objects) >= 2
