"""Agent-DeiT, Agent-PVT, Agent-Swin and Agent-CSwin (arXiv 2312.08874) in plain PyTorch: tables of biases are
interpolated and repeated over the batch in every forward pass, all attention weights are formed, and maps are permuted
to and from the layout of the convolutions."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, trunc_normal_


def attend(q, k, v, scale, bias=None):
    attn = (q * scale) @ k.transpose(-2, -1)
    if bias is not None:
        attn = attn + bias
    return attn.softmax(dim=-1) @ v


class AgentAttention(nn.Module):
    def __init__(self, dim, num_heads, size, agent_num, cls_token=False, split_q=False, proj=True, dwc="dwc"):
        super().__init__()
        h, w = size
        self.num_heads, self.size, self.agent_num, self.cls_token = num_heads, size, agent_num, cls_token
        self.pool_size = math.isqrt(agent_num)
        self.scale = (dim // num_heads) ** -0.5
        if split_q:
            self.q = nn.Linear(dim, dim)
            self.kv = nn.Linear(dim, 2 * dim)
        elif proj:
            self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim) if proj else nn.Identity()
        self.dwc_name = dwc
        setattr(self, dwc, nn.Conv2d(dim, dim, 3, padding=1, groups=dim))
        self.pool = nn.AdaptiveAvgPool2d((self.pool_size, self.pool_size))
        self.an_bias = nn.Parameter(torch.zeros(num_heads, agent_num, 7, 7))
        self.na_bias = nn.Parameter(torch.zeros(num_heads, agent_num, 7, 7))
        self.ah_bias = nn.Parameter(torch.zeros(1, num_heads, agent_num, h, 1))
        self.aw_bias = nn.Parameter(torch.zeros(1, num_heads, agent_num, 1, w))
        self.ha_bias = nn.Parameter(torch.zeros(1, num_heads, h, 1, agent_num))
        self.wa_bias = nn.Parameter(torch.zeros(1, num_heads, 1, w, agent_num))
        if cls_token:
            self.ac_bias = nn.Parameter(torch.zeros(1, num_heads, agent_num, 1))
            self.ca_bias = nn.Parameter(torch.zeros(1, num_heads, 1, agent_num))
        for name, p in self.named_parameters(recurse=False):
            if name.endswith("_bias"):
                trunc_normal_(p, std=0.02)
        self._register_load_state_dict_pre_hook(self.resize_tables)

    def resize_tables(self, state_dict, prefix, *args):
        """Fine-tuning at another size: row and column tables follow it."""
        for name, axis in (("ah_bias", 3), ("aw_bias", 4), ("ha_bias", 2), ("wa_bias", 3)):
            key, length = prefix + name, getattr(self, name).shape[axis]
            if state_dict[key].shape[axis] != length:
                state_dict[key] = self.along(state_dict[key], axis, length)

    @staticmethod
    def along(table, axis, length):
        if table.shape[axis] == length:
            return table
        table = table.movedim(axis, -1)
        out = F.interpolate(table.reshape(1, -1, table.shape[-1]), size=length, mode="linear")
        return out.reshape(*table.shape[:-1], length).movedim(-1, axis)

    def forward(self, x, H, W):
        if hasattr(self, "qkv"):
            q, k, v = self.qkv(x).chunk(3, dim=-1)
        else:
            q, (k, v) = self.q(x), self.kv(x).chunk(2, dim=-1)
        return self.proj(self.mix(q, k, v, H, W))

    def mix(self, q, k, v, H, W):
        B, N, C = q.shape
        h, n, first = self.num_heads, self.agent_num, int(self.cls_token)
        agents = self.pool(q[:, first:].permute(0, 2, 1).reshape(B, C, H, W)).reshape(B, C, -1).permute(0, 2, 1)
        agents = agents.reshape(B, n, h, C // h).permute(0, 2, 1, 3)
        v_map = v[:, first:].permute(0, 2, 1).reshape(B, C, H, W)
        q, k, v = (t.reshape(B, N, h, C // h).permute(0, 2, 1, 3) for t in (q, k, v))

        block = F.interpolate(self.an_bias, size=(H, W), mode="bilinear")
        block = block.reshape(1, h, n, H * W).repeat(B, 1, 1, 1)
        lines = self.along(self.ah_bias, 3, H) + self.along(self.aw_bias, 4, W)
        position = block + lines.reshape(1, h, n, H * W).repeat(B, 1, 1, 1)
        if self.cls_token:
            position = torch.cat([self.ac_bias.repeat(B, 1, 1, 1), position], dim=-1)
        agent_v = attend(agents, k, v, self.scale, position)

        block = F.interpolate(self.na_bias, size=(H, W), mode="bilinear")
        block = block.reshape(1, h, n, H * W).permute(0, 1, 3, 2).repeat(B, 1, 1, 1)
        lines = self.along(self.ha_bias, 2, H) + self.along(self.wa_bias, 3, W)
        position = block + lines.reshape(1, h, H * W, n).repeat(B, 1, 1, 1)
        if self.cls_token:
            position = torch.cat([self.ca_bias.repeat(B, 1, 1, 1), position], dim=-2)
        x = attend(q, agents, agent_v, self.scale, position)

        x = x.transpose(1, 2).reshape(B, N, C)
        local = getattr(self, self.dwc_name)(v_map).permute(0, 2, 3, 1).reshape(B, H * W, C)
        return torch.cat([x[:, :1], x[:, 1:] + local], dim=1) if self.cls_token else x + local


class Block(nn.Module):
    def __init__(self, dim, attn, mlp_ratio, drop_path, eps):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x, H, W):
        x = x + self.drop_path(self.attn(self.norm1(x), H, W))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def resize_grid(pos, size, mode):
    """(1, N, C) of a square grid, for another one."""
    side = math.isqrt(pos.shape[1])
    pos = pos.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    return F.interpolate(pos, size=size, mode=mode).permute(0, 2, 3, 1).flatten(1, 2)


class Model(nn.Module):
    def init(self):
        for m in self.modules():
            if isinstance(m, nn.Linear):
                trunc_normal_(m.weight, std=0.02)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)


class Patches(nn.Module):
    def __init__(self, in_chans, dim, patch, norm=True):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, patch, stride=patch)
        self.norm = nn.LayerNorm(dim) if norm else nn.Identity()

    def forward(self, x):
        x = self.proj(x)
        return self.norm(x.flatten(2).transpose(1, 2)), *x.shape[2:]


class AgentDeiT(Model):
    def __init__(self, num_classes, img_size=224, dim=192, heads=3, depth=12, agent_num=49, drop_path_rate=0.0):
        super().__init__()
        side = img_size // 16
        self.side = side
        self.patch_embed = Patches(3, dim, 16, norm=False)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, side * side + 1, dim))
        rates = torch.linspace(0, drop_path_rate, depth).tolist()
        self.blocks = nn.ModuleList(
            Block(dim, AgentAttention(dim, heads, (side, side), agent_num, cls_token=True), 4, rate, 1e-6)
            for rate in rates
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes)
        trunc_normal_(self.cls_token, std=0.02)
        trunc_normal_(self.pos_embed, std=0.02)
        self.init()
        self._register_load_state_dict_pre_hook(self.resize_positions)

    def resize_positions(self, state_dict, prefix, *args):
        pos = state_dict["pos_embed"]
        if pos.shape != self.pos_embed.shape:
            grid = resize_grid(pos[:, 1:], (self.side, self.side), "bicubic")
            state_dict["pos_embed"] = torch.cat([pos[:, :1], grid], dim=1)

    def forward(self, x):
        x, H, W = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x, H, W)
        return self.head(self.norm(x)[:, 0])


class AgentPVT(Model):
    def __init__(self, num_classes, img_size=224, depths=(2, 2, 2, 2), drop_path_rate=0.0):
        super().__init__()
        dims, heads, ratios, agents = (64, 128, 320, 512), (1, 2, 5, 8), (8, 8, 4, 4), (9, 16, 49, 49)
        rates = torch.linspace(0, drop_path_rate, sum(depths)).split(depths)
        for i in range(4):
            side = img_size // 2 ** (i + 2)
            self.add_module(f"patch_embed{i + 1}", Patches(dims[i - 1] if i else 3, dims[i], 2 if i else 4))
            position = nn.Parameter(torch.zeros(1, side * side, dims[i]))
            trunc_normal_(position, std=0.02)
            self.register_parameter(f"pos_embed{i + 1}", position)
            blocks = nn.ModuleList(
                Block(
                    dims[i],
                    AgentAttention(dims[i], heads[i], (side, side), agents[i], split_q=True),
                    ratios[i],
                    rate,
                    1e-6,
                )
                for rate in rates[i].tolist()
            )
            self.add_module(f"block{i + 1}", blocks)
        self.head = nn.Linear(dims[-1], num_classes)
        self.init()

    def forward(self, x):
        for i in range(1, 5):
            x, H, W = getattr(self, f"patch_embed{i}")(x)
            position = getattr(self, f"pos_embed{i}")
            x = x + (position if H == W == math.isqrt(position.shape[1]) else resize_grid(position, (H, W), "bilinear"))
            for block in getattr(self, f"block{i}"):
                x = block(x, H, W)
            if i < 4:
                x = x.reshape(len(x), H, W, -1).permute(0, 3, 1, 2).contiguous()
        return self.head(x.mean(dim=1))


class WindowAttention(nn.Module):
    """Swin's; on maps of another size than the built one windows always shift."""

    def __init__(self, dim, num_heads, side, window, shifted):
        super().__init__()
        self.side, self.window, self.num_heads = side, min(window, side), num_heads
        self.shift = self.window // 2 if shifted else 0
        w = self.window
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * w - 1) ** 2, num_heads))
        trunc_normal_(self.relative_position_bias_table, std=0.02)
        y, x = torch.meshgrid(torch.arange(w), torch.arange(w), indexing="ij")
        coords = torch.stack([y, x]).flatten(1)
        offset = coords[:, :, None] - coords[:, None] + w - 1
        self.register_buffer("relative_position_index", offset[0] * (2 * w - 1) + offset[1], persistent=False)

    def windows(self, x):
        B, H, W, C = x.shape
        w = self.window
        return x.reshape(B, H // w, w, W // w, w, C).permute(0, 1, 3, 2, 4, 5).reshape(-1, w * w, C)

    def mask(self, H, W, shift, device):
        w, region = self.window, torch.zeros(1, H, W, 1, device=device)
        parts = (slice(0, -w), slice(-w, -shift), slice(-shift, None))
        for i, rows in enumerate(parts):
            for j, cols in enumerate(parts):
                region[:, rows, cols] = 3 * i + j
        region = self.windows(region)[..., 0]
        return (region[:, None] != region[:, :, None]) * -100.0

    def forward(self, x, H, W):
        B, N, C = x.shape
        w, shift = self.window, self.shift
        if w == self.side and H == W == self.side:
            shift = 0
        pad_h, pad_w = -H % w, -W % w
        x = F.pad(x.reshape(B, H, W, C), (0, 0, 0, pad_w, 0, pad_h))
        x = torch.roll(x, (-shift, -shift), dims=(1, 2)) if shift else x
        qkv = self.qkv(self.windows(x)).reshape(-1, w * w, 3, self.num_heads, C // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        bias = self.relative_position_bias_table[self.relative_position_index.reshape(-1)]
        bias = bias.reshape(w * w, w * w, -1).permute(2, 0, 1)
        if shift:
            bias = bias + self.mask(H + pad_h, W + pad_w, shift, x.device).repeat(B, 1, 1)[:, None]
        x = self.proj(attend(q, k, v, self.scale, bias).transpose(1, 2).reshape(-1, w * w, C))
        rows, cols = (H + pad_h) // w, (W + pad_w) // w
        x = x.reshape(B, rows, cols, w, w, C).permute(0, 1, 3, 2, 4, 5).reshape(B, rows * w, cols * w, C)
        x = torch.roll(x, (shift, shift), dims=(1, 2)) if shift else x
        return x[:, :H, :W].reshape(B, N, C)


class PatchMerging(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x, H, W):
        x = F.pad(x.reshape(len(x), H, W, -1), (0, 0, 0, W % 2, 0, H % 2))
        x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], dim=-1)
        return self.reduction(self.norm(x.flatten(1, 2))), x.shape[1], x.shape[2]


class Layer(nn.Module):
    def __init__(self, blocks, downsample):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(self, x, H, W):
        for block in self.blocks:
            x = block(x, H, W)
        return (x, H, W) if self.downsample is None else self.downsample(x, H, W)


class AgentSwin(Model):
    def __init__(self, num_classes, img_size=224, depths=(2, 2, 6, 2), agent_stages=3, drop_path_rate=0.0):
        super().__init__()
        dim, heads, agents, window = 96, (3, 6, 12, 24), (9, 16, 49, 49), max(7, img_size // 32)
        rates = torch.linspace(0, drop_path_rate, sum(depths)).split(depths)
        self.patch_embed = Patches(3, dim, 4)
        layers = []
        for i in range(4):
            width, side = dim * 2**i, img_size // 4 // 2**i
            blocks = [
                Block(
                    width,
                    AgentAttention(width, heads[i], (side, side), agents[i])
                    if i < agent_stages
                    else WindowAttention(width, heads[i], side, window, j % 2 == 1),
                    4,
                    rate,
                    1e-5,
                )
                for j, rate in enumerate(rates[i].tolist())
            ]
            layers.append(Layer(blocks, PatchMerging(width) if i < 3 else None))
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(8 * dim)
        self.head = nn.Linear(8 * dim, num_classes)
        self.init()
        self._register_load_state_dict_pre_hook(self.drop_buffers)

    @staticmethod
    def drop_buffers(state_dict, prefix, *args):
        """The file's indices and masks, which are made here."""
        for key in [key for key in state_dict if key.endswith(("relative_position_index", "attn_mask"))]:
            del state_dict[key]

    def forward(self, x):
        x, H, W = self.patch_embed(F.pad(x, (0, -x.shape[3] % 4, 0, -x.shape[2] % 4)))
        for layer in self.layers:
            x, H, W = layer(x, H, W)
        return self.head(self.norm(x).mean(dim=1))


class StripeAttention(nn.Module):
    def __init__(self, dim, num_heads, stripe):
        super().__init__()
        self.num_heads, self.stripe = num_heads, stripe  # (height, width), None for that of the map
        self.scale = (dim // num_heads) ** -0.5
        self.get_v = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def mix(self, q, k, v, H, W):
        B, N, C = q.shape
        h, w = self.stripe[0] or H, self.stripe[1] or W

        def stripes(x):
            return x.reshape(B, H // h, h, W // w, w, C).permute(0, 1, 3, 2, 4, 5).reshape(-1, h * w, C)

        def heads(x):
            return x.reshape(-1, h * w, self.num_heads, C // self.num_heads).permute(0, 2, 1, 3)

        q, k, v = map(stripes, (q, k, v))
        local = self.get_v(v.transpose(1, 2).reshape(-1, C, h, w).contiguous()).flatten(2).transpose(1, 2)
        x = attend(heads(q), heads(k), heads(v), self.scale).transpose(1, 2).reshape(-1, h * w, C) + local
        return x.reshape(B, H // h, W // w, h, w, C).permute(0, 1, 3, 2, 4, 5).reshape(B, N, C)


class CSwinBlock(nn.Module):
    def __init__(self, dim, attns, drop_path):
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.attns = nn.ModuleList(attns)
        self.mlp = Mlp(dim, 4 * dim)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x, H, W):
        qkv = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        parts = zip(*(t.chunk(len(self.attns), dim=-1) for t in qkv), strict=True)
        out = torch.cat([attn.mix(*part, H, W) for attn, part in zip(self.attns, parts, strict=True)], dim=-1)
        x = x + self.drop_path(self.proj(out))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Merge(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.conv = nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x, H, W):
        x = self.conv(x.transpose(1, 2).reshape(len(x), -1, H, W).contiguous())
        return self.norm(x.flatten(2).transpose(1, 2)), *x.shape[2:]


class AgentCSwin(Model):
    def __init__(self, num_classes, img_size=224, depths=(2, 4, 18, 1), drop_path_rate=0.0):
        super().__init__()
        dim, heads, agents, split = 64, (2, 4, 8, 16), (9, 16), img_size // 32
        rates = torch.linspace(0, drop_path_rate, sum(depths)).split(depths)
        stem = nn.Conv2d(3, dim, 7, stride=4, padding=2)
        self.stage1_conv_embed = nn.ModuleList([stem, nn.Identity(), nn.LayerNorm(dim)])
        for i in range(4):
            width, side = dim * 2**i, img_size // 4 // 2**i
            if i:
                self.add_module(f"merge{i}", Merge(width // 2))
            blocks = []
            for rate in rates[i].tolist():
                if i < 2:
                    attns = [AgentAttention(width, heads[i], (side, side), agents[i], proj=False, dwc="get_v")]
                elif i == 2:
                    attns = [StripeAttention(width // 2, heads[i] // 2, s) for s in ((None, split), (split, None))]
                else:
                    attns = [StripeAttention(width, heads[i], (None, None))]
                blocks.append(CSwinBlock(width, attns, rate))
            self.add_module(f"stage{i + 1}", nn.ModuleList(blocks))
        self.norm = nn.LayerNorm(8 * dim)
        self.head = nn.Linear(8 * dim, num_classes)
        self.init()

    def forward(self, x):
        conv, _, norm = self.stage1_conv_embed
        x = conv(x)
        (H, W), x = x.shape[2:], norm(x.flatten(2).transpose(1, 2))
        for i in range(1, 5):
            for block in getattr(self, f"stage{i}"):
                x = block(x, H, W)
            if i < 4:
                x, H, W = getattr(self, f"merge{i}")(x, H, W)
        return self.head(self.norm(x).mean(dim=1))


SWIN_SMALL = dict(depths=(2, 2, 18, 2), agent_stages=2)
VARIANTS: dict[str, tuple] = {
    "agent_deit_tiny": (AgentDeiT, dict()),
    "agent_deit_small": (AgentDeiT, dict(dim=384, heads=6)),
    "agent_deit_small_448": (AgentDeiT, dict(dim=384, heads=6, img_size=448)),
    "agent_pvt_tiny": (AgentPVT, dict()),
    "agent_pvt_small": (AgentPVT, dict(depths=(3, 4, 6, 3))),
    "agent_pvt_medium": (AgentPVT, dict(depths=(3, 4, 18, 3))),
    "agent_pvt_medium_256": (AgentPVT, dict(depths=(3, 4, 18, 3), img_size=256)),
    "agent_pvt_large": (AgentPVT, dict(depths=(3, 8, 27, 3))),
    "agent_swin_tiny": (AgentSwin, dict()),
    "agent_swin_small": (AgentSwin, SWIN_SMALL),
    "agent_swin_small_288": (AgentSwin, dict(SWIN_SMALL, img_size=288)),
    "agent_cswin_tiny": (AgentCSwin, dict()),
    "agent_cswin_small": (AgentCSwin, dict(depths=(3, 6, 29, 2))),
}


def create_model(name: str, num_classes: int = 1000, **kwargs) -> nn.Module:
    model, options = VARIANTS[name]
    return model(num_classes, **options | kwargs)
