"""The kernels for GPUs against the portable path: on a GPU, or in the interpreter of Triton, in a process of its own,
as that must be chosen before Triton is imported."""

import os
import subprocess
import sys
from importlib import metadata

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from visionattn.layers import HaloAttention2d, NeighborhoodAttention2d, local_attention, size_constant
from visionattn.layers.window_attention import window_attention

INTERPRETED, GPU = os.environ.get("TRITON_INTERPRET") == "1", torch.cuda.is_available()
DEVICE = "cuda" if GPU and not INTERPRETED else "cpu"
runs = pytest.mark.skipif(not (GPU or INTERPRETED), reason="the test of the interpreter runs it")


def version() -> tuple[int, ...]:
    try:
        return tuple(map(int, metadata.version("triton").split(".")[:2]))
    except metadata.PackageNotFoundError:
        return (0,)


@pytest.mark.skipif(
    INTERPRETED or version() < (3, 7), reason="needs Triton, and 3.6 interprets no loops with NumPy 2.4"
)
def test_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def kernel(monkeypatch):
    """A switch between the paths, on any device."""
    monkeypatch.setattr(size_constant, "_kept", type(size_constant._kept)())
    calls = []

    def switch(on: bool) -> list:
        def takes(q, k, v, plan, dropout) -> bool:
            calls.append(on)
            return on and not dropout

        monkeypatch.setattr(local_attention, "takes_kernel", takes)
        return calls

    monkeypatch.setattr("visionattn.layers.tile_kernel.PROGRAMS", 4)
    make = local_attention._plan

    @torch.compiler.assume_constant_result
    def plan(axis, rows, cols, device, heads):
        made = make(axis, rows, cols, device, heads)
        return local_attention.for_kernel(made, axis(*rows), axis(*cols))

    monkeypatch.setattr(local_attention, "_plan", plan)
    return switch


def agree(kernel, function, *tensors, rtol=0.0, atol=2e-5):
    """Outputs and gradients of both paths; in half precision both are held to float32."""
    results = []
    for on in (False, True):
        calls = kernel(on)
        given = [x.detach().requires_grad_() for x in tensors]
        out = function(*given)
        assert calls[-1] == on
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        grads = torch.autograd.grad((out * weight).sum(), given, allow_unused=True)
        results.append([out, *(grad for grad in grads if grad is not None)])
    for ours, expected in zip(results[1], results[0], strict=True):
        assert ours.shape == expected.shape and ours.dtype == expected.dtype
        scale = expected.abs().max().clamp(min=1.0)
        torch.testing.assert_close(ours / scale, expected / scale, rtol=rtol, atol=atol)
    return results[1]


def on_module(kernel, module, x, **tolerance):
    names = [name for name, _ in module.named_parameters()]

    def function(x, *parameters):
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), x)

    return agree(kernel, function, x, *module.parameters(), **tolerance)


NEIGHBORHOODS = {
    "plain": ((8, 3), (1, 3), {}),
    "dilated": ((4, 15), (2, 3), {"dilation": (1, 2)}),
    "padded": ((2, 9), (1, 5), {}),
    "strided": ((5, 9), (1, 4), {"stride": (2, 4)}),
    "no bias": ((8, 3), (2, 3), {"rel_pos_bias": False}),
    "several blocks": ((10, 8), (1, 5), {}),
    "tiny": ((1, 2), (1, 3), {}),
}


@runs
@pytest.mark.parametrize("name", NEIGHBORHOODS)
def test_neighborhood_attention(name, kernel):
    size, (heads, window), options = NEIGHBORHOODS[name]
    layer = NeighborhoodAttention2d(heads * 12, heads, window, device=DEVICE, **options)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    on_module(kernel, layer, torch.randn(2, *size, heads * 12, device=DEVICE))


@runs
@pytest.mark.parametrize("rel_pos_bias", [True, False])
def test_tiles_that_share_a_bias(rel_pos_bias, kernel, monkeypatch):
    monkeypatch.setattr(local_attention, "MAX_PAIRS", 0)
    layer = NeighborhoodAttention2d(16, 2, 2, rel_pos_bias=rel_pos_bias, device=DEVICE)
    on_module(kernel, layer, torch.randn(2, 17, 2, 16, device=DEVICE))


@runs
@pytest.mark.parametrize("size, window", [((6, 4), 3), ((1, 1), 2), ((9, 10), 9)])
def test_window_attention(size, window, kernel):
    def function(qkv, bias):
        return window_attention(qkv, bias, 2, window)

    agree(kernel, function, torch.randn(2, *size, 3 * 20, device=DEVICE), torch.randn(3 * 20, device=DEVICE))


@runs
@pytest.mark.parametrize("stride, mask, size", [(1, "pad", (4, 7)), (2, "all", (7, 6))])
def test_halo_attention(stride, mask, size, kernel):
    layer = HaloAttention2d(
        24, 40, stride, 2, dim_head=12, block_size=4, halo_size=1, mask=mask, scale_pos_embed=True, device=DEVICE
    )
    on_module(kernel, layer, torch.randn(2, 24, *size, device=DEVICE))


@runs
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, kernel):
    rounding = {"atol": 8 * torch.finfo(dtype).eps}
    layer = NeighborhoodAttention2d(24, 2, 3, device=DEVICE, dtype=dtype)
    on_module(kernel, layer, torch.randn(1, 7, 3, 24, device=DEVICE, dtype=dtype), **rounding)
    layer = HaloAttention2d(24, None, 1, 2, block_size=4, halo_size=1, device=DEVICE, dtype=dtype)
    on_module(kernel, layer, torch.randn(1, 24, 4, 8, device=DEVICE, dtype=dtype), **rounding)


@runs
def test_any_strides_and_the_same_bits_in_every_run(kernel):
    layer = NeighborhoodAttention2d(12, 1, 3, device=DEVICE)
    x = torch.randn(3, 12, 7, 2, device=DEVICE).permute(0, 2, 3, 1)
    kernel(True)
    first, second = (torch.autograd.grad(layer(x).sum(), list(layer.parameters())) for _ in range(2))
    kernel(False)
    expected = torch.autograd.grad(layer(x).sum(), list(layer.parameters()))
    for (name, _), a, b, c in zip(layer.named_parameters(), first, second, expected, strict=True):
        assert torch.equal(a, b) or name == "rpb"  # whose gradient torch sums in any order on GPUs
        torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-4)


@runs
def test_compiled(kernel):
    """What compilers are told of the operators is true."""
    layer = NeighborhoodAttention2d(12, 1, 3, device=DEVICE)
    kernel(True)
    x = torch.randn(2, 7, 2, 12, device=DEVICE)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
    ours, expected = (torch.autograd.grad(f(x).square().sum(), list(layer.parameters())) for f in (compiled, layer))
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)


@runs
def test_the_operators(kernel):
    from visionattn.layers.tile_kernel import _attention, _gradients

    plan = local_attention.local_plan(NeighborhoodAttention2d.axes, (7, 2), ((3,), (3,)), torch.device(DEVICE))
    qkv = torch.randn(1, 14, 3, 2, 12, device=DEVICE).permute(2, 0, 3, 1, 4).requires_grad_()
    q, k, v = qkv[0], torch.nn.functional.pad(qkv[1], (0, 0, 0, 7)), torch.nn.functional.pad(qkv[2], (0, 0, 0, 7))
    bias = local_attention.relative_bias(torch.randn(2, 25, device=DEVICE, requires_grad=True), plan)
    tables = [plan.inverse, plan.holders, plan.groups[0].queries, plan.groups[0].keys]
    arguments = q, k, v, tables, bias, None, 0, 0.3
    quick = "test_schema", "test_faketensor"
    torch.library.opcheck(_attention, arguments, test_utils=(*quick, "test_autograd_registration"))
    with torch.no_grad():
        out, lse = _attention(*arguments)
        torch.library.opcheck(_gradients, (out, out, lse, *arguments, True), test_utils=quick)


@runs
def test_recomputed(kernel):
    """Checkpoints give what is saved once."""
    layer = NeighborhoodAttention2d(12, 1, 3, device=DEVICE)
    x = torch.randn(2, 7, 2, 12, device=DEVICE)
    kernel(True)
    ours, expected = (
        torch.autograd.grad(out.square().sum(), list(layer.parameters()))
        for out in (checkpoint(layer, x, use_reentrant=False), layer(x))
    )
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)
