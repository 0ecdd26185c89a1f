"""Names, what is known of them, and the doors to timm and torch.hub."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

import visionattn
from visionattn import cli, macs
from visionattn.errors import UnknownArgumentError, UnknownModelError, VisionattnError

ROOT = Path(__file__).parent.parent
ALL = visionattn.list_models()

# Millions, as the papers' code has them.
PARAMS = {
    "agent_deit_tiny": 6.016, "agent_deit_small": 22.647, "agent_deit_base": 88.479, "agent_deit_small_448": 23.070,
    "agent_pvt_tiny": 11.570, "agent_pvt_small": 20.635, "agent_pvt_medium": 35.922, "agent_pvt_medium_256": 36.084,
    "agent_pvt_large": 48.738, "agent_swin_tiny": 28.903, "agent_swin_small": 49.667, "agent_swin_small_288": 49.708,
    "agent_swin_base": 88.095, "agent_swin_base_384": 88.305, "agent_cswin_tiny": 20.459, "agent_cswin_small": 32.814,
    "agent_cswin_base": 73.250, "agent_cswin_base_384": 73.328,
    "nat_mini": 19.984, "nat_tiny": 27.902, "nat_small": 50.743, "nat_base": 89.770, "dinat_mini": 19.984,
    "dinat_tiny": 27.902, "dinat_small": 50.720, "dinat_base": 89.770, "dinat_large": 200.944,
    "dinat_large_384": 200.944, "dinat_large_384_11x11": 201.144, "dinat_large_21k": 200.944,
    "dinat_large_21k_11x11": 201.144, "dinat_s_tiny": 28.288, "dinat_s_small": 49.606, "dinat_s_base": 87.768,
    "dinat_s_large": 196.532, "dinat_s_large_384": 196.532, "dinat_s_large_21k": 196.532,
    "nat_isotropic_small": 22.000, "dinat_isotropic_small": 22.000, "vitrpb_small": 22.080,
    "nat_isotropic_base": 86.466, "dinat_isotropic_base": 86.466, "vitrpb_base": 86.627,
    "van_b0": 4.106, "van_b1": 13.862, "van_b2": 26.578, "van_b3": 44.766, "van_b4": 60.283, "van_b5": 89.968,
    "van_b6": 199.829, "convit_tiny": 5.711, "convit_tiny_plus": 9.973, "convit_small": 27.777,
    "convit_small_plus": 48.980, "convit_base": 86.540, "convit_base_plus": 153.135,
    "davit_tiny": 28.360, "davit_small": 49.746, "davit_base": 87.954, "davit_base_window12_384": 87.954,
    "davit_large": 196.812, "davit_large_window12_384": 196.812, "davit_huge": 348.923,
    "davit_huge_window16_512": 362.685, "davit_giant": 1406.470, "davit_giant_window16_512": 1437.436,
    "davit_base_fl": 90.370, "davit_huge_fl": 360.636,
    "attnet_xxs": 2.854, "attnet_xs": 5.555, "attnet_s": 7.681, "attnet_t1": 13.715, "attnet_t2": 27.011,
    "attnet_t3": 49.176, "attnet_t4": 87.320,
    "halonet26t": 12.480, "halonet50ts": 22.733, "sehalonet33ts": 13.692, "eca_halonext26ts": 10.757,
    "haloregnetz_b": 11.680, "halonet_h0": 5.502, "halonet_h1": 8.100, "halonet_h2": 9.406, "halonet_h3": 11.843,
    "halonet_h4": 19.103, "halonet_h5": 30.719, "halonet_h6": 43.458, "halonet_h7": 67.435,
    "illama_tiny": 5.701, "illama_small": 22.018, "illama_base": 86.502, "illama_base_384": 86.794,
    "illama_large": 310.445, "illama_large_384": 310.834, "sparsifiner_deit_small": 22.252,
    "sparsifiner_deit_base": 86.769, "sparsifiner_lvvit_s": 26.420, "sparsifiner_lvvit_m": 56.166,
    "hornet_tiny_7x7": 22.410, "hornet_tiny_gf": 22.992, "hornet_small_7x7": 49.528, "hornet_small_gf": 50.402,
    "hornet_base_7x7": 87.257, "hornet_base_gf": 88.421, "hornet_base_gf_img384": 92.100,
    "hornet_large_7x7": 194.543, "hornet_large_gf": 196.290, "hornet_large_gf_img384": 201.807,
    "litv2_small": 27.844, "litv2_medium": 48.830, "litv2_base": 86.521, "litv2_base_384": 86.521,
    "litv2_small_alpha00": 28.090, "litv2_small_alpha02": 27.844, "litv2_small_alpha04": 27.697,
    "litv2_small_alpha05": 27.647, "litv2_small_alpha07": 27.697, "litv2_small_alpha09": 27.844,
    "litv2_small_alpha10": 28.090,
    "flowformer": 43.311, "focalnet_tiny_srf": 28.427, "focalnet_tiny_lrf": 28.648, "focalnet_small_srf": 49.891,
    "focalnet_small_lrf": 50.342, "focalnet_base_srf": 88.148, "focalnet_base_lrf": 88.750,
    "focalnet_large_fl3": 239.135, "focalnet_large_fl4": 239.315, "focalnet_xlarge_fl3": 408.787,
    "focalnet_xlarge_fl4": 409.028, "focalnet_huge_fl3": 745.276, "focalnet_huge_fl4": 747.990,
    "focalnet_tiny_iso": 5.880, "focalnet_small_iso": 22.376, "focalnet_base_iso": 87.237,
    "nalaformer_xt": 6.142, "nalaformer_t": 15.908, "nalaformer_s": 25.654, "nalaformer_b": 52.003,
    "nalaformer_l": 95.427,
    "moh_vit_small_75": 49.911, "moh_vit_small_80": 49.911, "moh_vit_base_75": 90.021, "moh_vit_base_50": 90.024,
    "patnet_t0": 3.486, "patnet_t1": 6.145, "patnet_t2": 12.270, "patnet_s": 28.013, "patnet_m": 59.179,
    "patnet_l": 100.641, "patnet_t0_full": 3.558, "patnet_t1_full": 6.145, "patnet_t2_full": 12.651,
    "patnet_s_full": 28.976, "patnet_m_full": 61.367, "patnet_l_full": 104.466,
    "overlock_xt": 17.307, "overlock_t": 34.990, "overlock_s": 58.310, "overlock_b": 98.013,
    "overlock_xt_reparam": 16.791, "overlock_t_reparam": 33.981, "overlock_s_reparam": 56.670,
    "overlock_b_reparam": 95.521,
    "sgformer_s": 22.546, "sgformer_m": 38.689, "sgformer_b": 77.950,
    "isotropic_small": 22.050, "isotropic_xsmall": 0.779, "pyramid_small": 15.604, "pyramid_xsmall": 2.086,
}  # fmt: skip


def test_every_published_variant_is_registered():
    assert set(PARAMS) == {name for name in ALL if not name.startswith("test_")}


@pytest.mark.parametrize("name", [*ALL, "van_b4.in22k_ft_in1k_384", "van_b6.in22k_ft_in1k_384"])
def test_model_info(name):
    info = visionattn.model_info(name)
    published = PARAMS.get(info.name)
    assert info.params / 1e6 == pytest.approx(published, abs=6e-4) if published else info.params < 4e6
    assert info.papers and info.license and info.origin
    for weights in info.weights.values():
        assert weights.urls or weights.hf_hub_id or weights.page or weights.note == "not released"
        assert all(
            re.fullmatch(r"https://[\w.-]+/[^\s]+", url) for url in (*weights.urls, *filter(None, [weights.page]))
        )


@pytest.mark.parametrize(
    "name",
    [
        *(pytest.param(name, marks=[pytest.mark.slow] if PARAMS.get(name, 0) > 30 else []) for name in ALL),
        "van_b4.in22k_ft_in1k_384",
    ],
)
def test_multiply_adds(name):
    info = visionattn.model_info(name)
    assert info.gmacs == pytest.approx(macs.count(name, info.input_size) / 1e9, rel=2e-3)


def test_tags():
    assert visionattn.model_info("van_b5.in22k_ft_in1k_384").input_size == (3, 384, 384)
    model = visionattn.create_model("test_dinat")
    assert model.pretrained_cfg["architecture"] == "test_dinat"
    with torch.device("meta"):
        assert visionattn.create_model("van_b0.in1k").pretrained_cfg["mean"] == (0.5, 0.5, 0.5)
        assert visionattn.create_model("van_b4.in22k").num_classes == 21841
        assert visionattn.create_model("van_tiny").pretrained_cfg["architecture"] == "van_b0"
    with pytest.raises(UnknownModelError, match="van_b0 has no weights tagged in2k; it has in1k"):
        visionattn.create_model("van_b0.in2k")


def test_list_models():
    assert {"test_convit", "test_dinat", "test_van"} <= set(visionattn.list_models("test_*"))
    assert visionattn.list_models(["van_b0", "nat_m*"]) == ["nat_mini", "van_b0"]
    assert "dinat_small.in1k" in visionattn.list_models("dinat_*", pretrained=True)
    assert not visionattn.list_models("van_b6", pretrained=True)
    assert len(ALL) == len(set(ALL))


def test_unknown_names_and_arguments():
    with pytest.raises(UnknownModelError, match="unknown model dinat_smal; did you mean dinat_small"):
        visionattn.create_model("dinat_smal")
    with pytest.raises(UnknownArgumentError, match="test_van got unknown arguments kernel, window; it takes"):
        visionattn.create_model("test_van", window=7, kernel=3)
    with pytest.raises(UnknownArgumentError, match="window"):
        timm.create_model("test_van", window=7)
    with pytest.raises(VisionattnError, match="cannot fetch van_b6.in22k_ft_in1k: no weights were released"):
        visionattn.create_model("van_b6", pretrained=True)


def test_none_stands_for_the_default():
    assert visionattn.create_model("test_van", num_classes=None, drop_rate=None).num_classes == 1000


def test_timm_knows_what_it_lacked():
    assert all(timm.is_model(name) for name in ALL)
    assert type(timm.create_model("test_dinat")) is type(visionattn.create_model("test_dinat"))
    assert timm.create_model("convit_tiny").__module__ == "timm.models.convit"
    assert visionattn.create_model("convit_tiny").__module__ == "visionattn.models.convit"
    assert "dinat_small.in1k" in timm.list_pretrained("dinat_small*")
    with torch.device("meta"):
        assert timm.create_model("van_b0.in1k").pretrained_cfg["crop_pct"] == 0.9


def test_register_model(monkeypatch):
    monkeypatch.setattr("visionattn.registry._entries", dict(visionattn.registry._entries))

    @visionattn.register_model
    def my_backbone(pretrained=False, **kwargs):
        return visionattn.create_model("test_van", **kwargs)

    assert visionattn.create_model("my_backbone", num_classes=3).num_classes == 3
    assert visionattn.model_info("my_backbone").params == visionattn.model_info("test_van").params
    with pytest.raises(VisionattnError, match="my_backbone is registered already"):
        visionattn.register_model(my_backbone)


def test_hub(monkeypatch):
    model = torch.hub.load(str(ROOT), "test_dinat", source="local", num_classes=3)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 3)
    monkeypatch.setattr(torch.hub, "_get_cache_or_reload", lambda *args, **kwargs: str(ROOT))
    assert torch.hub.list("visionattn/visionattn", trust_repo=True) == ALL


def test_import_is_light():
    heavy = "albumentations, accelerate, matplotlib, sklearn, tensorboard, jsonargparse, rich"
    code = f"import sys, visionattn; print([m for m in '{heavy}'.split(', ') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout == "[]\n"


def test_command(capsys):
    assert cli.main(["list", "test_*"]) == 0
    assert capsys.readouterr().out.split() == visionattn.list_models("test_*")
    assert cli.main(["info", "van_b0"]) == 0
    out = capsys.readouterr().out
    assert "4.106 M" in out and "75.4 %" in out and "van_tiny_754.pth.tar" in out and "apache-2.0" in out
    assert cli.main(["info", "van_b7"]) == 2
    assert capsys.readouterr().err.startswith("error: unknown model van_b7; did you mean van_b")
