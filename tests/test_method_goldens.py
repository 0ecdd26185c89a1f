"""Parity of methods with outputs recorded from their published code, or from the equations of their papers.

A golden names its method and arguments in `create`; `input_*` are what it is given, parameters among them, and
`output_*` what comes of that.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import golden
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from visionattn import probes, sigma_reparam
from visionattn.layers import SoftmaxAttention, clipped_softmax
from visionattn.monitoring import activation_kurtosis, activation_quantizer, attention_entropy, entropy_bound
from visionattn.weights import convert_state_dict

GOLDENS = sorted((Path(__file__).parent / "goldens" / "methods").glob("*.npz"))


def efficient_probing(
    x: Tensor,
    queries: Tensor,
    value_weight: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    head_weight: Tensor,
    head_bias: Tensor,
    value_bias: Tensor | bool,
    **kwargs: int,
) -> dict[str, Tensor]:
    probe = probes.AttentiveProbe(value_bias=value_bias is not False, dtype=x.dtype, **kwargs)
    published = {"0.cls_token": queries[None], "0.v.weight": value_weight, "2.weight": head_weight, "2.bias": head_bias}
    published |= {
        "1.running_mean": running_mean,
        "1.running_var": running_var,
        "1.num_batches_tracked": torch.tensor(0),
    }
    published |= {} if value_bias is False else {"0.v.bias": value_bias}
    probe.load_state_dict(convert_state_dict(published, probe))
    logits, attention = probe.eval()(x, return_attention=True)
    torch.testing.assert_close(probe(x), logits)
    return {
        "pooled": probe.pool(x),
        "attention": attention,
        "logits_eval": probe(x),
        "logits_train": probe.train()(x),
    }


def lars(steps: int, **given: Tensor | float) -> dict[str, Tensor]:
    names = [name.removeprefix("param_") for name in given if name.startswith("param_")]
    params = {name: nn.Parameter(given.pop(f"param_{name}").clone()) for name in names}
    grads, passed = {name: given.pop(f"grad_{name}") for name in names}, {name: [] for name in names}
    optimizer = probes.lars(params.values(), **given)
    for step in range(steps):
        for name, param in params.items():
            param.grad = grads[name][step].clone()
        optimizer.step()
        for name, param in params.items():
            passed[name].append(param.detach().clone())
    return {name: torch.stack(values) for name, values in passed.items()}


def knn_classifier(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, **kwargs) -> dict:
    votes = probes.knn_classifier(train, train_labels, test, **kwargs)
    hits = votes.topk(5).indices == test_labels[:, None]
    top1, top5 = (100 * hits[:, :k].any(1).double().mean() for k in (1, 5))
    return {"votes": votes, "predictions": votes.argmax(1), "top1": top1, "top5": top5}


def clipped(x: Tensor, cotangent: Tensor, configs: list[dict], dim: int) -> dict[str, Tensor]:
    found = {}
    for i, config in enumerate(configs):
        logits = x.clone().requires_grad_()
        found[f"{i}"] = clipped_softmax(logits, **config, dim=dim)
        (found[f"grad_{i}"],) = torch.autograd.grad(found[f"{i}"], logits, cotangent)
    return found


def gated(
    x: Tensor, dim: int, num_heads: int, gate: str, attn_gate_init: float = 0.5, attn_gate_mlp: bool = False,
    **given: Tensor,
) -> dict[str, Tensor]:  # fmt: skip
    assert gate == "conditional_per_token"
    layer = SoftmaxAttention(
        dim, num_heads, True, gate="token_mlp" if attn_gate_mlp else "token", gate_opening=attn_gate_init
    )
    names = {"weight": "2_weight", "bias": "2_bias", "hidden_weight": "0_weight", "hidden_bias": "0_bias"}
    names = names if attn_gate_mlp else {"weight": "weight", "bias": "bias"}
    parts = {name: [given[f"param_alpha_{h}_{theirs}"] for h in range(num_heads)] for name, theirs in names.items()}
    state = {}
    for kind in ("weight", "bias"):
        state[f"qkv.{kind}"] = torch.cat([given[f"param_{part}_proj_{kind}"] for part in "qkv"])
        state[f"proj.{kind}"] = given[f"param_out_proj_{kind}"]
    for name, heads in parts.items():
        state[f"gate.{name}"] = torch.stack(heads).view(getattr(layer.gate, name).shape)
    layer.to(x.dtype).load_state_dict(state)
    return {"y": layer(x), "gate": layer.gate(x)}


def entropies(q: Tensor, k: Tensor, scale: float) -> dict[str, Tensor]:
    found, logits = attention_entropy(q, k, scale), q @ k.mT * scale
    norms = (logits - logits.mean(-1, keepdim=True)).norm(dim=-1)
    return {"entropy": found, "mean_per_head": found.mean((0, 2)), "lower_bound": entropy_bound(norms, k.shape[2])}


def outliers(x: Tensor, eps: float) -> dict[str, Tensor]:
    return {"kurtosis": activation_kurtosis(x, eps), "inf_norm": x.abs().amax(-1)}


def quantised(x: Tensor, x_min: Tensor, x_max: Tensor, n_bits: int) -> dict[str, Tensor]:
    return activation_quantizer(x, x_min, x_max, n_bits)


def reparametrised(module: nn.Module, weight: Tensor, u: Tensor, gamma: Tensor, bias: Tensor) -> nn.Module:
    module = sigma_reparam(module.to(weight.dtype), every_forward=True)
    shape = module.state_dict()["weight"].shape
    module.load_state_dict({"weight": weight.view(shape), "u": u, "gamma": gamma, "bias": bias})
    return module


def sigma_linear(
    x: Tensor, cotangent: Tensor, in_features: int, out_features: int, bias: Tensor, steps: int, stats_only: bool,
    **given: Tensor,
) -> dict[str, Tensor]:  # fmt: skip
    module = reparametrised(nn.Linear(in_features, out_features), **given, bias=bias)
    W, x, ys, us = module._parameters["weight"], x.requires_grad_(), [], []
    for _ in range(steps):
        ys.append(module(x))
        us.append(module.u.clone())

    def norm() -> Tensor:
        return (module.gamma * W).norm() / module.weight.norm()

    last, learned = norm(), {"weight": W, "gamma": module.gamma, "x": x, "bias": module.bias}
    grads = torch.autograd.grad((ys[-1] * cotangent).sum(), list(learned.values()))
    y = module.eval()(x)
    assert torch.equal(module.u, us[-1])
    return {
        "y_steps": torch.stack(ys),
        "u_steps": torch.stack(us),
        **{f"grad_{name}": grad for name, grad in zip(learned, grads, strict=True)},
        "sigma_last": last,
        "y_eval": y,
        "sigma_eval": norm(),
        "sigma_exact": torch.linalg.matrix_norm(W, 2),
    }


def sigma_conv2d(x: Tensor, in_channels: int, out_channels: int, **given: Any) -> dict[str, Tensor]:
    options = {key: value for key, value in given.items() if not isinstance(value, Tensor)}
    tensors = {key: value for key, value in given.items() if isinstance(value, Tensor)}
    module = reparametrised(nn.Conv2d(in_channels, out_channels, **options), **tensors)
    return {"y_train_1": module(x), "y_train_2": module(x), "y_eval": module.eval()(x), "u": module.u}


def sigma_init(weight: Tensor) -> dict[str, Tensor]:
    module = nn.Linear(*weight.shape[::-1], dtype=weight.dtype)
    module.weight.data.copy_(weight)
    module = sigma_reparam(module)
    return {"abs_u": module.u.abs(), "sigma": module.gamma}


METHODS: dict[str, Callable[..., dict[str, Tensor]]] = {
    "activation_kurtosis": outliers,
    "activation_quantizer": quantised,
    "attention_entropy": entropies,
    "clipped_softmax": clipped,
    "efficient_probing": efficient_probing,
    "gated_attention": gated,
    "knn_classifier": knn_classifier,
    "lars": lars,
    "sigma_reparam_conv2d": sigma_conv2d,
    "sigma_reparam_init": sigma_init,
    "sigma_reparam_linear": sigma_linear,
}
"""By the name of a method: what it makes of a file's inputs and options, by the names of the file's outputs."""


@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem)
def test_parity(path):
    meta, arrays = golden.load(path)
    for name, tolerance in meta["tolerance"].items():
        given, expected = {}, {}
        for key, array in arrays.items():
            kind, _, key = key.partition("_")
            tensor = torch.from_numpy(array)
            tensor = tensor.to(getattr(torch, name)) if tensor.is_floating_point() else tensor
            (given if kind == "input" else expected)[key] = tensor if kind == "input" else array
        found = METHODS[meta["create"]["method"]](**meta["create"]["kwargs"] | given)
        assert found.keys() == expected.keys()
        for key, array in expected.items():
            error = np.abs(found[key].detach().numpy().astype(array.dtype) - array).max()
            assert error <= tolerance * np.abs(array).max(), (key, name, error)
