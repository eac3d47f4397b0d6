"""UnSegMedGAT in plain PyTorch: unsupervised segmentation of medical photographs.

A. Mudit Adityaja, S. J. Shigwan and N. Kumar, "UnSegMedGAT: Unsupervised Medical Image Segmentation
using Graph Attention Networks Clustering". Patches of an image become the nodes of a graph, and a small
graph attention network is optimised, for that image alone, until its clusters have high modularity.

    python unsegmedgat.py image.png -o mask.png              # one photograph
    python unsegmedgat.py photos/ -o masks/ --overlay        # a folder, with pictures to look at
    python unsegmedgat.py image.png -o mask.png --explain    # one picture of every stage
    torchrun --nproc-per-node=8 unsegmedgat.py photos/ -o masks/       # a data set, on many cores, GPUs or machines

The file reads top to bottom as section II of the paper: features, graph (1), attention (2)-(4), network (5),
loss (6)-(8), fit; then which clusters are the object, the refinement, and the command line.
Shapes: B images, N = h * w patches on a grid, C features, K clusters, H heads.
"""

import argparse
import contextlib
import dataclasses
import functools
import logging
import math
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import urllib.request
import warnings
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from scipy import ndimage
from torch import distributed, nn

import bilateral

log = logging.getLogger("unsegmedgat")  # notices for the user; without any set-up they go to stderr

PATCH = 8  # px, the side of a patch: ViT-S/8
MAX_PIXELS = 150_000_000  # larger images are refused before they are decoded: a bomb, or a whole slide
MAX_NODES = 50_000  # larger graphs are refused: A alone would take over 10 GB


# ---------------------------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------------------------


def setting(default, help, source, choices=None, least=None, above=None):
    """A field of Config: its default, what it does, where the default comes from, and what it may be."""
    limits = {"choices": choices, "least": least, "above": above}
    return dataclasses.field(default=default, metadata={"help": help, "source": source, **limits})


ACTIVATIONS = {"silu": nn.SiLU, "selu": nn.SELU, "relu": nn.ReLU}


@dataclass(frozen=True)
class Config:
    """Every hyper-parameter, with its source. Each is a flag of the same name. Raises ValueError when out of range."""

    size: int = setting(
        224, "px of the shorter side that the features see; a multiple of 8", "authors' code", least=2 * PATCH
    )
    stride: int = setting(8, "px between patches: 8, or overlapping at 4 or 2", "paper: p = 8", (8, 4, 2))
    tau: float = setting(0.3, "similarities up to this are no edge, eq. (1); in (0,1)", "paper, section III", above=0)
    heads: int = setting(
        4, "attention heads, eq. (4); must divide every width", "ours: the paper gives no number", least=1
    )
    widths: tuple[int, ...] = setting((128, 64), "m_r, the width of each parallel series of GATs", "paper, section III")
    layers: int = setting(2, "t_r, the GAT layers in each series", "paper, section III", least=1)
    projection: int = setting(64, "M, the width in which the series are summed, eq. (5)", "paper, section III", least=1)
    clusters: int = setting(2, "K; above 2 the mask is the union of the foreground clusters", "paper: a mask", least=2)
    activation: str = setting("silu", "the non-linearity of eq. (3)", "paper, section III", tuple(ACTIVATIONS))
    epochs: int = setting(60, "optimiser steps for each image", "paper, section III", least=1)
    collective: int = setting(
        0, "T0, how many of the epochs are passes with shared parameters: UnSegMedGATc", "paper", least=0
    )
    lr: float = setting(1e-3, "AdamW's learning rate", "paper, section III", above=0)
    weight_decay: float = setting(1e-2, "AdamW's weight decay", "paper: decay factor; authors' code: AdamW", least=0)
    prior: float = setting(
        1.0, "radii, the width of the nodes' weights around the located object; 0: all alike", "ours", least=0
    )
    colour_steps: int = setting(
        8, "steps of the colour model that sharpens the foreground; 0 for none", "ours", least=0
    )
    resolution: float = setting(
        1.0, "g, the weight of the null model in the modularity", "paper; Reichardt 2006", least=0
    )
    balance: float = setting(
        0.0, "b, the weight of the second term of eq. (8), for equal clusters", "ours; paper: 1", least=0
    )
    seed: int = setting(0, "of the network's first parameters", "ours")
    invert: bool = setting(False, "swap foreground and background", "ours")
    refine: bool = setting(True, "refine with the fast bilateral solver", "paper, Fig. 1")
    sigma_spatial: float = setting(11.0, "px, a cell of the bilateral grid", "authors' code", above=0)
    sigma_luma: float = setting(5.0, "grey levels, a cell of the bilateral grid", "authors' code", above=0)
    sigma_chroma: float = setting(5.0, "grey levels, a cell of the bilateral grid", "authors' code", above=0)
    smoothness: float = setting(32.0, "lambda of the bilateral solver", "ours; authors' code: 256", least=0)
    confidence: float = setting(0.999, "how far the solver trusts the assignment; in [0,1]", "authors' code", least=0)
    components: int = setting(1, "largest pieces of foreground to keep; 0 keeps all", "authors' code", least=0)

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, limits = getattr(self, field.name), field.metadata
            choices = limits["choices"]
            kind = type(field.default)
            if kind is tuple:  # lists come from JSON
                object.__setattr__(self, field.name, value := tuple(value))
            if kind is float and not (isinstance(value, (int, float)) and math.isfinite(value)):
                raise ValueError(f"{field.name} must be a finite number, got {value!r}")
            if kind is int and (not isinstance(value, int) or isinstance(value, bool)):
                raise ValueError(f"{field.name} must be a whole number, got {value!r}")
            if choices and value not in choices:
                raise ValueError(f"{field.name} must be one of {', '.join(map(str, choices))}, got {value!r}")
            if limits["least"] is not None and value < limits["least"]:
                raise ValueError(f"{field.name} must be at least {limits['least']}, got {value!r}")
            if limits["above"] is not None and value <= limits["above"]:
                raise ValueError(f"{field.name} must be above {limits['above']}, got {value!r}")
        for name, good, want in [
            ("size", self.size % PATCH == 0, f"a multiple of {PATCH}"),
            ("tau", self.tau < 1, "below 1"),
            ("widths", self.widths and all(w >= 1 and w % self.heads == 0 for w in self.widths),
             f"positive multiples of the number of heads, {self.heads}"),
            ("clusters", self.clusters <= 255, "at most 255"),
            ("seed", 0 <= self.seed < 2**32, "from 0 to 2^32 - 1"),
            ("collective", self.collective < self.epochs, f"below epochs, {self.epochs}"),
            ("confidence", self.confidence <= 1, "at most 1"),
        ]:  # fmt: skip
            if not good:
                raise ValueError(f"{name} must be {want}, got {getattr(self, name)!r}")


# What the paper does, as far as it says, and the authors' code where it does not: without what is ours.
PRESETS = {"paper": {"prior": 0.0, "balance": 1.0, "colour_steps": 0, "smoothness": 256.0}}


# ---------------------------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------------------------


class ImageError(ValueError):
    """An image that cannot be segmented; the message says why and what to do."""


def load_image(source):
    """Read any still image as RGB: uint8 (H,W,3), turned upright by its EXIF orientation.

    source: a path, a PIL image, or an array (H,W) or (H,W,3) of uint8. More than 8 bits a pixel are scaled by
    the image's own range, transparency is laid on white. Raises ImageError for whatever is not one still image.
    """
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim not in (2, 3) or source.shape[2:] not in ((), (3,)):
            raise ImageError(f"an array must be uint8 of shape (H,W) or (H,W,3), got {source.dtype} {source.shape}")
        source = Image.fromarray(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit follows
            image = source if isinstance(source, Image.Image) else Image.open(source)
        if image.width * image.height > MAX_PIXELS:
            raise ImageError(f"{image.width} x {image.height} pixels are too many: scale it down first")
        if getattr(image, "is_animated", False) and image.format != "MPO":  # MPO: a phone's photo and its preview
            raise ImageError(f"it holds {image.n_frames} frames: save the one you want as a still image")
        image = ImageOps.exif_transpose(image)
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            grey = np.nan_to_num(np.asarray(image, np.float64))
            grey = (grey - grey.min()) * (255 / max(np.ptp(grey), 1e-12))
            image = Image.fromarray(np.rint(grey).astype(np.uint8))
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        rgb = np.array(image.convert("RGB"))
    except ImageError:
        raise
    except Image.DecompressionBombError:
        raise ImageError("it would decode to far too many pixels: scale it down first") from None
    except FileNotFoundError:
        raise ImageError("there is no such file") from None
    except IsADirectoryError:
        raise ImageError("it is a folder") from None
    except Exception as error:  # Pillow's decoders raise many kinds on a damaged file
        reason = str(error).split("\n")[0].replace(f" {str(source)!r}", "")
        raise ImageError(f"it cannot be read as an image ({reason}): is it damaged or incomplete?") from None
    if min(rgb.shape[:2]) < PATCH:
        raise ImageError(f"{rgb.shape[1]} x {rgb.shape[0]} pixels are too few: each side needs at least {PATCH}")
    return rgb


def resize_image(rgb, size, stride=PATCH):
    """Scale (H,W,3) uint8 so that the shorter side is `size` px and the longer a multiple of 8: (3,s,t) in [0,1].

    Returns the tensor and the grid (h,w) of its patches, which `upsample` undoes. Raises ImageError for a
    graph that would be too large.
    """
    height, width = rgb.shape[:2]
    scale = size / min(height, width)
    s, t = (max(PATCH, round(side * scale / PATCH) * PATCH) for side in (height, width))
    h, w = ((side - PATCH) // stride + 1 for side in (s, t))
    if h * w > MAX_NODES:
        raise ImageError(f"{width} x {height} pixels make {h * w:,} patches, over {MAX_NODES:,}: use a smaller size")
    image = torch.from_numpy(rgb).permute(2, 0, 1)[None].float()
    image = F.interpolate(image, size=(s, t), mode="bilinear", antialias=True, align_corners=False)
    return (image[0] / 255).clamp(0, 1), (h, w)


def upsample(values, stride, shape, size, patch=PATCH):
    """Spread patch values (h,w,K) bilinearly over an image of shape (H,W), at the true patch centres: (H,W,K) numpy.

    size: (s,t), the resized image's height and width that the patches were cut from.
    """
    weights = []  # two matrices that interpolate: (H,h) and (W,w)
    for patches, pixels, resized in zip(values.shape[:2], shape, size):
        centre = ((np.arange(pixels) + 0.5) * (resized / pixels) - patch / 2) / stride
        weights.append(np.stack([np.interp(centre, np.arange(patches), row) for row in np.eye(patches)], axis=1))
    rows, columns = (w.astype(np.float32) for w in weights)
    return np.stack([rows @ values[..., k] @ columns.T for k in range(values.shape[2])], axis=-1)


# ---------------------------------------------------------------------------------------------------------------
# Features: the keys of DINO's last block
# ---------------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Multi-head self-attention, named as DINO names it."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):  # (B,T,C), T tokens
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B,H,T,C/H)
        x = F.scaled_dot_product_attention(q, k, v)  # (B,H,T,C/H), with no T x T matrix in memory
        return self.proj(x.transpose(1, 2).flatten(2))  # (B,T,C)


class Block(nn.Module):
    def __init__(self, dim, heads, mlp_ratio):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        hidden = dim * mlp_ratio
        self.mlp = nn.Sequential(OrderedDict(fc1=nn.Linear(dim, hidden), act=nn.GELU(), fc2=nn.Linear(hidden, dim)))

    def forward(self, x):  # (B,T,C)
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """DINO's ViT-S/8 (Caron et al. 2021), parameters named and shaped as in the published file."""

    def __init__(self, dim=384, depth=12, heads=6, patch=PATCH, grid=28, mlp_ratio=4):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid * grid, dim))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, patch, patch)})
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)  # not needed for keys, but part of the published file

    def keys(self, images, stride=PATCH):
        """Keys of the last block (section II), before the split into heads: (B,N,C), row-major over the patch grid.

        images: (B,3,H,W), normalised as for ImageNet, sides multiples of the patch. stride: px between patches.
        Raises ValueError for sides that are no multiples of the patch.
        """
        proj = self.patch_embed["proj"]
        patch = proj.kernel_size[0]
        if images.shape[2] % patch or images.shape[3] % patch:
            raise ValueError(f"image sides {tuple(images.shape[2:])} must be multiples of the patch, {patch}")
        x = F.conv2d(images, proj.weight, proj.bias, stride=stride)  # (B,C,h,w)
        side = math.isqrt(self.pos_embed.shape[1] - 1)
        position = self.pos_embed[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)  # (1,C,28,28)
        if x.shape[2:] != position.shape[2:]:
            position = F.interpolate(position, size=x.shape[2:], mode="bicubic", align_corners=False)
        x = (x + position).flatten(2).transpose(1, 2)  # (B,N,C)
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        x = torch.cat([cls, x], dim=1)  # (B,1+N,C)
        for block in self.blocks[:-1]:
            x = block(x)
        last = self.blocks[-1]  # of which only the keys are computed: the middle third of qkv
        _, weight, _ = last.attn.qkv.weight.chunk(3)
        _, bias, _ = last.attn.qkv.bias.chunk(3)
        return F.linear(last.norm1(x), weight, bias)[:, 1:]  # (B,N,C), without the class token


DINO_URL = "https://dl.fbaipublicfiles.com/dino/dino_deitsmall8_pretrain/dino_deitsmall8_pretrain.pth"
DINO_SHA256 = "55c8b267f479b614ec20858947ce361ba804846c193e20be74263a096bb6d75e"
PATIENCE = 10  # s without an answer before a download is given up


def fetch_dino(progress=True):
    """The path of DINO's backbone file: from torch.hub's cache, else downloaded once, its SHA-256 checked.

    Raises OSError when the host does not answer within 10 s, RuntimeError for another digest.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / DINO_URL.rsplit("/", 1)[1]
    if path.is_file():
        return path
    # A socket's time-out does not cover a name server that keeps silent, so a thread asks first.
    answer = []

    def ask():
        try:
            urllib.request.urlopen(urllib.request.Request(DINO_URL, method="HEAD"), timeout=PATIENCE).close()
            answer.append(None)
        except Exception as error:
            answer.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    if not answer or answer[0]:
        raise OSError(f"no answer from {DINO_URL.split('/')[2]} ({answer[0] if answer else f'after {PATIENCE} s'})")
    path.parent.mkdir(parents=True, exist_ok=True)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)
    try:
        torch.hub.download_url_to_file(DINO_URL, str(path), hash_prefix=DINO_SHA256, progress=progress)
    finally:
        socket.setdefaulttimeout(before)
    return path


def load_dino(weights=None, branch="teacher", progress=True):
    """ViT-S/8 with DINO's weights, in evaluation mode, without gradients.

    weights: a file (the published backbone, timm's copy of it, or the full checkpoint); None fetches the backbone.
    branch: of a full checkpoint, "teacher" (which the backbone-only file holds) or "student" (the authors' choice).
    Raises ValueError for a file that is not exactly these weights, OSError where it cannot be read or fetched.
    """
    if branch not in ("teacher", "student"):
        raise ValueError(f"branch must be teacher or student, got {branch!r}")
    path = Path(weights) if weights else fetch_dino(progress)
    if not path.is_file():
        raise OSError(f"{path}: there is no such weights file")
    try:  # the full checkpoint also holds its command line, an argparse.Namespace; nothing else is let in
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch thinks of a stranger's pickle: the error below says it
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises many kinds on what is not a checkpoint
        reason = str(error).split("\n")[0][:120]
        raise ValueError(f"{path}: not a weights file that can be loaded safely ({reason})") from None
    if isinstance(state, dict) and branch in state and isinstance(state[branch], dict):
        state = {name.removeprefix("module."): tensor for name, tensor in state[branch].items()}
        state = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
        state = {name.removeprefix("backbone."): tensor for name, tensor in state.items()}
    elif branch == "student":
        raise ValueError(f"{path}: no student in this file; only the full checkpoint holds both branches")
    if not isinstance(state, dict):
        raise ValueError(f"{path}: holds a {type(state).__name__}, not a dictionary of tensors")

    model = VisionTransformer()
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(getattr(tensor, "shape", ())) for name, tensor in state.items()}
    wrong = [f"{name} missing" for name in shapes if name not in found]
    wrong += [f"{n} is {found[n]}, not {shape}" for n, shape in shapes.items() if found.get(n, shape) != shape]
    wrong += [f"{name} unexpected" for name in found if name not in shapes]
    if wrong:
        raise ValueError(f"{path}: not DINO's ViT-S/8, {len(wrong)} tensors differ: {'; '.join(wrong[:3])}")
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------------
# Graph, eq. (1)
# ---------------------------------------------------------------------------------------------------------------


def build_graph(features, tau, weights=None):
    """Adjacency A (N,N) of the thresholded cosine similarities of features (N,C); entries 0 or in (tau,1], symmetric.

    weights (N,), optional: how much each node matters; A_ij is then multiplied by w_i w_j, and may be below tau. A node
    of weight 0 has no edges.
    """
    f = F.normalize(features, dim=1)
    adjacency = F.threshold_(f @ f.T, tau, 0.0)  # eq. (1): f f^T * (f f^T > tau)
    return adjacency if weights is None else adjacency.mul_(weights).mul_(weights[:, None])


# ---------------------------------------------------------------------------------------------------------------
# Graph attention, eqs. (2) to (4)
# ---------------------------------------------------------------------------------------------------------------


SLOPE = 0.2  # of LeakyReLU: Velickovic et al. 2018


class MaskedAttention(torch.autograd.Function):
    """alpha @ h for every head, where alpha = softmax over the neighbours j of LeakyReLU(s_i + t_j): eqs. (2), (3).

    Rows of a softmax are independent, so blocks of rows that stay in cache are computed and dropped, forward and again
    backward: nothing N x N is kept but the graph. And LeakyReLU(e) = max(e, 0.2 e), so exp(LeakyReLU(s_i + t_j)) is
    the larger of two rank-one products, exp(s_i) exp(t_j) and exp(.2 s_i) exp(.2 t_j): O(N) exponentials do.
    The plain six lines that this equals stand in eval.py (`plain_attention`).
    """

    @staticmethod
    def row_blocks(adjacency):
        """Slices of rows with the mask N(i) of each as 0 and 1, since a product is faster than a selection."""
        rows = 64 if adjacency.device.type == "cpu" else 2048
        for start in range(0, len(adjacency), rows):
            block = slice(start, start + rows)
            yield block, adjacency[block].clamp(min=0).sign_()

    @staticmethod
    def exponentials(s, t):
        """Factors of exp(LeakyReLU(s_i + t_j) - shift_i), none above 1: (H,N) each."""
        top = t.amax(1, keepdim=True)
        # Whoever is over 60 below the top counts as 60 below: e^-60 beside it, and no sum of weights underflows.
        t = (t - top).clamp(min=-60)
        s = s + top
        shift = F.leaky_relu(s, SLOPE)  # at least LeakyReLU(s_i + t_j) for every j
        return (s - shift).exp(), (SLOPE * s - shift).exp(), t.exp(), (SLOPE * t).exp()

    @staticmethod
    def weights(factors, block, mask):
        """exp(LeakyReLU(s_i + t_j) - shift_i) for the neighbours, else 0: (H,rows,N)."""
        u, u_slope, v, v_slope = factors
        steep = u[:, block, None] * v[:, None]
        flat = u_slope[:, block, None] * v_slope[:, None]
        return torch.maximum(steep, flat, out=steep).mul_(mask)

    @staticmethod
    def forward(ctx, h, s, t, adjacency):  # (H,N,D), (H,N), (H,N), (N,N) -> (H,N,D), D = out/H
        factors = MaskedAttention.exponentials(s, t)
        out, total = torch.empty_like(h), torch.empty_like(h[..., :1])
        for block, mask in MaskedAttention.row_blocks(adjacency):
            weight = MaskedAttention.weights(factors, block, mask)
            total[:, block] = weight.sum(2, keepdim=True)
            out[:, block] = weight @ h
        total = torch.where(total > 0, total, 1)  # a node without neighbours gathers nothing
        out /= total
        ctx.save_for_backward(h, s, t, adjacency, out, total, *factors)
        return out

    @staticmethod
    def backward(ctx, grad):  # (H,N,D)
        h, s, t, adjacency, out, total, *factors = ctx.saved_tensors
        grad = grad / total
        # d e_ij = alpha_ij (grad_i . h_j - grad_i . out_i), in one product: a column more on either side carries
        # the second term.
        grad1 = torch.cat([grad, -(grad * out).sum(2, keepdim=True)], dim=2)  # (H,N,D+1)
        h1 = torch.cat([h, torch.ones_like(h[..., :1])], dim=2).mT.contiguous()  # (H,D+1,N)
        dh, ds, dt = torch.zeros_like(h), torch.empty_like(s), torch.zeros_like(t)
        for block, mask in MaskedAttention.row_blocks(adjacency):
            weight = MaskedAttention.weights(factors, block, mask)  # (H,rows,N)
            dh.baddbmm_(weight.mT, grad[:, block])
            de = (grad1[:, block] @ h1).mul_(weight)
            score = torch.add(s[:, block, None], t[:, None], out=weight)
            de = torch.ops.aten.leaky_relu_backward(de, score, SLOPE, False)
            ds[:, block] = de.sum(2)
            dt += de.sum(1)
        return dh, ds, dt, None


class GraphAttention(nn.Module):
    """One multi-head graph attention layer, heads concatenated, before the activation: eqs. (2) to (4).

    The paper's vector a of eq. (2) is [a_src || a_dst]: a_src scores the node that attends, a_dst its neighbour.
    """

    def __init__(self, in_features, out_features, heads):
        super().__init__()
        if out_features % heads:
            raise ValueError(f"{heads} heads do not divide the width {out_features}")
        self.heads = heads
        self.W = nn.Linear(in_features, out_features, bias=False)
        self.a_src = nn.Parameter(torch.empty(heads, out_features // heads))
        self.a_dst = nn.Parameter(torch.empty(heads, out_features // heads))
        for parameter in self.parameters():
            nn.init.xavier_uniform_(parameter)  # Velickovic et al. 2018

    def forward(self, x, adjacency):
        """x (N,in), adjacency (N,N) whose positive entries are the edges -> (N,out)."""
        h = self.W(x).unflatten(1, (self.heads, -1)).transpose(0, 1).contiguous()  # (H,N,out/H)
        s = torch.einsum("hnd,hd->hn", h, self.a_src)
        t = torch.einsum("hnd,hd->hn", h, self.a_dst)
        return MaskedAttention.apply(h, s, t, adjacency.to(h)).transpose(0, 1).flatten(1)  # eq. (4): (N,out)


# ---------------------------------------------------------------------------------------------------------------
# Network, eq. (5)
# ---------------------------------------------------------------------------------------------------------------


class UnSegMedGAT(nn.Module):
    """R parallel series of graph attention layers, summed after a linear layer each, to K soft clusters: eq. (5)."""

    def __init__(self, in_features, config=Config()):
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]()
        self.series = nn.ModuleList(
            nn.ModuleList(
                GraphAttention(in_features if layer == 0 else width, width, config.heads)
                for layer in range(config.layers)
            )
            for width in config.widths
        )
        self.first = nn.ModuleList(nn.Linear(width, config.projection) for width in config.widths)
        self.second = nn.Linear(config.projection, config.clusters)

    def forward(self, features, adjacency):
        """features X (N,C), adjacency (N,N) -> assignment (N,K), rows summing to 1."""
        total = 0
        for layers, first in zip(self.series, self.first):
            x = features
            for layer in layers:
                x = self.activation(layer(x, adjacency))  # eq. (3): (N,m_r)
            total = total + first(x)  # H^(r): (N,M)
        return self.second(total).softmax(dim=1)  # C: (N,K)


# ---------------------------------------------------------------------------------------------------------------
# Loss, eqs. (6) to (8), and the fit
# ---------------------------------------------------------------------------------------------------------------


def modularity_loss(assignment, adjacency, resolution=1.0, balance=1.0):
    """L = -Q_g + b (sqrt(K)/n |sum_i C_i| - 1), eq. (8) at g = b = 1; a scalar.

    assignment C (N,K), adjacency A (N,N) symmetric. Q_g = Tr(C^T A C)/2m - g |C^T d|^2/(2m)^2 is eq. (7) with
    B = A - g d d^T/2m never formed; 2m = sum(A), d the degrees; g is the resolution of Reichardt and Bornholdt 2006.
    """
    n, k = assignment.shape
    degree = adjacency.sum(1)  # d: (N,)
    two_m = degree.sum().clamp(min=torch.finfo(degree.dtype).tiny)  # 0 only for a graph without edges
    within = (assignment * (adjacency @ assignment)).sum() / two_m  # Tr(C^T A C) / 2m
    expected = ((degree @ assignment) / two_m).square().sum()  # |C^T d|^2 / (2m)^2
    collapse = math.sqrt(k) / n * assignment.sum(0).norm() - 1
    return -(within - resolution * expected) + balance * collapse


def new_network(in_features, config, device):
    """The seeded network and its optimiser."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        network = UnSegMedGAT(in_features, config).to(device)
    return network, torch.optim.AdamW(network.parameters(), lr=config.lr, weight_decay=config.weight_decay)


def gradients(network, features, adjacency, config):
    """Leave the loss's gradients in the network's parameters; returns the loss, a scalar tensor."""
    loss = modularity_loss(network(features, adjacency), adjacency, config.resolution, config.balance)
    network.zero_grad(set_to_none=True)
    loss.backward()
    return loss.detach()


def fit(features, adjacency, config=Config(), shared=None):
    """Optimise the network for one image alone: the assignment (N,K) and the loss at every epoch.

    features (N,C) normalised, adjacency (N,N). shared: parameters from `fit_collective` to start from; the
    config.collective passes they have had are then taken off the epochs.
    """
    network, optimizer = new_network(features.shape[1], config, features.device)
    epochs = config.epochs
    if shared is not None:
        network.load_state_dict(shared)
        epochs -= config.collective
    losses = []
    for _ in range(epochs):
        losses.append(gradients(network, features, adjacency, config))
        optimizer.step()
    with torch.no_grad():
        return network(features, adjacency), torch.stack(losses).tolist()


def rank_and_world():
    """The number of this process and how many there are in a torch.distributed run; (0, 1) without one."""
    return (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)


def gather(value):
    """The value of every rank of a torch.distributed run, in order; [value] without one."""
    if not distributed.is_initialized():
        return [value]
    values = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def fit_collective(images, config=Config(), device="cpu", progress=None):
    """The first phase of UnSegMedGATc: config.collective passes, one step an image, with shared parameters.

    images: a sequence of features (N,C) with the weights (N,) of their nodes, N may differ; None is passed over. Each
    graph is built anew when its turn comes, so that only one is in memory. progress: called after every step.
    Under torch.distributed each rank gives its share, images[rank::world]. The steps follow one another as if one rank
    had them all: whose image it is computes the gradients and broadcasts them, so that the parameters stay the same.
    Returns the state_dict that `fit` takes as `shared`, on the CPU; None where there is no image.
    """
    widths = gather([image and image[0].shape[1] for image in images])  # C of every image of every rank
    found = [width for share in widths for width in share if width]
    if not found:
        return None
    rank, world = rank_and_world()
    network, optimizer = new_network(found[0], config, device)
    for _ in range(config.collective):
        for turn in range(sum(map(len, widths))):
            owner, index = turn % world, turn // world
            if not widths[owner][index]:
                continue
            if owner == rank:
                features, weights = images[index]
                gradients(network, features, build_graph(features, config.tau, weights), config)
            if world > 1:
                for parameter in network.parameters():
                    parameter.grad = torch.empty_like(parameter) if parameter.grad is None else parameter.grad
                    distributed.broadcast(parameter.grad, owner)
            optimizer.step()
            if progress:
                progress()
    return {name: tensor.cpu() for name, tensor in network.state_dict().items()}


# ---------------------------------------------------------------------------------------------------------------
# Ours, not the paper's: where the object is, roughly
# ---------------------------------------------------------------------------------------------------------------


def rgb_to_lab(image):
    """sRGB (3,H,W) in [0,1] to CIE Lab (3,H,W), L in [0,100], white point D65 (IEC 61966-2-1, CIE 15)."""
    linear = torch.where(image > 0.04045, ((image + 0.055) / 1.055) ** 2.4, image / 12.92)
    to_xyz = image.new_tensor([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = torch.einsum("dc,chw->dhw", to_xyz / to_xyz.sum(1, keepdim=True), linear)  # relative to white
    x, y, z = torch.where(xyz > 0.008856, xyz.clamp(min=1e-6) ** (1 / 3), 7.787 * xyz + 16 / 116)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def middle(n):
    """Centres of n cells that divide [-1,1]."""
    return torch.linspace(-1 + 1 / n, 1 - 1 / n, n)


UNEVEN = 6  # grey levels, the spread of the light over an image from which on it is taken out rather than left


def even_light(lab, weight, gently=False):
    """Take uneven light and vignetting out of a Lab image (3,s,t): its deviations from a smooth surface, (3,s,t).

    The surface is a quadratic of the place, fitted by iteratively reweighted least squares to the means of 8 px cells,
    so that what is not background (the object, hairs, highlights) has no say. weight (s/8,t/8): the cells to trust.
    gently: where nobody knows what is background, a large object may bend the surface. Light falls off to all sides, so
    it must not be darkest in the middle, and one that varies by less than about 6 grey levels is hardly taken out.
    """

    def basis(h, w):
        y, x = torch.meshgrid(middle(h), middle(w), indexing="ij")
        return torch.stack([torch.ones_like(x), x, y, x * x, x * y, y * y], dim=-1).to(lab)  # (h,w,6)

    cells = F.avg_pool2d(lab, PATCH).flatten(1).T  # (cells,3)
    terms, weight = basis(*weight.shape).flatten(0, 1), weight.flatten().to(lab)
    robust, ridge = weight, 1e-3 * torch.eye(6).to(lab)
    for _ in range(8):
        weighted = terms.T * robust
        coefficients = torch.linalg.solve(weighted @ terms + robust.mean() * ridge, weighted @ cells)  # (6,3)
        deviation = cells - terms @ coefficients
        spread = 1.4826 * deviation[weight > 0.2 * weight.max()].abs().median(0).values + 0.5  # grey levels
        robust = weight / (1 + (deviation / spread).square().sum(1) / 4) ** 2
    if gently:
        xx, xy, yy = coefficients[3:, 0].tolist()  # of the lightness, whose curvature is made negative
        curvature, axes = torch.linalg.eigh(torch.tensor([[xx, xy / 2], [xy / 2, yy]]))
        bent = (axes * curvature.clamp(max=0)) @ axes.T
        coefficients[3:, 0] = torch.stack([bent[0, 0], 2 * bent[0, 1], bent[1, 1]])
        spread = (terms @ coefficients)[weight > 0, 0].std(correction=0)
        coefficients = coefficients * (spread**4 / (spread**4 + UNEVEN**4))
    return lab - (basis(*lab.shape[1:]) @ coefficients).permute(2, 0, 1)


@dataclass(frozen=True)
class Place:
    """Where the object roughly is, on the 8 px cells (s/8,t/8) of a resized image; floats in [0,1]."""

    core: torch.Tensor  # 1 in a disc or ellipse that is mostly object
    weights: torch.Tensor  # how much a cell matters: fades away from the core, 0 outside the field of view
    box: torch.Tensor = None  # 1 inside the user's box, if there is one

    def outside(self):
        """The cells that are background, as far as the place tells; for `even_light`."""
        grown = F.max_pool2d(self.core[None], 3, 1, 1)[0]
        return (1 - (grown if self.box is None else self.box)) * (self.weights > 0) + 1e-3


def on_patches(cells, grid):
    """A map of 8 px cells (s/8,t/8) read at the centres of the overlapping or not overlapping patches: grid (h,w)."""
    return F.interpolate(cells[None, None], size=tuple(grid), mode="bilinear", align_corners=True)[0, 0]


CHROMA, TEXTURE = 1.5, 0.25  # weights of the descriptors beside lightness


def halved(cells):
    """Cells of 8 px (s/8,t/8) as cells of 4 px (s/4,t/4)."""
    return cells.repeat_interleave(2, 0).repeat_interleave(2, 1)


def closeness(h, w):
    """How close to the middle of an image the cells (h,w) are, in (0,1]: people hold what they photograph there."""
    return torch.exp(-(middle(h)[:, None] ** 2 + middle(w) ** 2) / (2 * 0.7**2))


def field_of_view(image):
    """The 8 px cells (s/8,t/8) of an image (3,s,t) that can be object, 0 or 1.

    Left out are the dark frame of an endoscope or dermatoscope; what differs sharply from the background's smooth
    surface or has another hue, touches the border, stays near it and is not large: stickers, rulers; and violet ink,
    anywhere, since tissue that is redder than its surround is yellower too: melanin and blood both absorb blue.
    """
    bright = F.avg_pool2d(image.amax(0)[None], PATCH)[0].numpy()
    h, w = bright.shape
    y, x = middle(h)[:, None], middle(w)
    radius = torch.maximum(y.abs(), x.abs()).numpy()

    def touching(cells, depth, most):  # the pieces that touch the border, near it and not too large
        pieces, count = ndimage.label(cells)
        border = set(np.concatenate([pieces[0], pieces[-1], pieces[:, 0], pieces[:, -1]])) - {0}
        chosen = [n for n in border if radius[pieces == n].mean() > depth and (pieces == n).mean() < most]
        return np.isin(pieces, chosen)

    dark = touching(bright < 0.275 * max(np.quantile(bright, 0.9), 0.3), 0, 0.5)
    weight = (0.05 + y**2 + x**2).clamp(max=1) * torch.from_numpy(~dark)
    lab = rgb_to_lab(image)
    deviation = F.avg_pool2d(even_light(lab, weight), PATCH)  # (3,h,w)
    spread = 1.4826 * deviation[:, weight > 0.3 * weight.max()].abs().median(1).values + 1
    far = (deviation / spread[:, None, None]).norm(dim=0).numpy() > 6.8
    fine = F.avg_pool2d(lab, PATCH // 2)  # pen strokes are thinner than a cell
    fine = fine - fine[:, halved(torch.from_numpy(~dark))].median(1).values[:, None, None]
    far |= F.avg_pool2d(fine[1:], 2).norm(dim=0).numpy() > 36
    ink = F.max_pool2d(((fine[1] > 0) & (fine[1] - fine[2] > 25)).float()[None], 2)[0].numpy() > 0
    objects = ndimage.binary_dilation(touching(far & ~dark, 0.6, 0.35) | ink)
    if (dark | objects).mean() > 0.9:  # not a few marks: this is how the whole image looks
        objects[:] = False
    return torch.from_numpy(~(dark | objects)).float()


def fade(rho, width):
    """A Gaussian of rho, `width` wide; 1 everywhere for width 0."""
    return torch.exp(-(rho**2) / (2 * width**2)) if width else torch.ones_like(rho)


def locate(image, width):
    """The Place of the object in an image (3,s,t) in [0,1]: the disc that differs most from the ring around it.

    Centre-surround contrast (Itti, Koch and Niebur 1998) of colours under even light, favouring the middle of the
    image, says roughly where the object is and how large. width: radii, of the Gaussian of the weights; 0 for none.
    """
    valid = field_of_view(image)
    h, w = valid.shape
    y, x = middle(h)[:, None], middle(w)
    lab = even_light(rgb_to_lab(image), (0.05 + y**2 + x**2).clamp(max=1) * valid, gently=True)
    colours = F.avg_pool2d(lab, PATCH) * torch.tensor([1, CHROMA, CHROMA])[:, None, None]
    layers = (torch.cat([colours, torch.ones(1, h, w)]) * valid)[:, None]  # (4,1,h,w): the last counts
    best, place = -1.0, (0, 0, 1)
    for radius in min(h, w) * np.array([0.07, 0.11, 0.14, 0.2, 0.27, 0.36]):
        reach = int(1.6 * radius + 0.7)
        steps = torch.arange(-reach, reach + 1.0)
        distance = torch.hypot(steps, steps[:, None])
        disc = (distance <= radius).float()
        ring = (distance <= 1.6 * radius + 0.7).float() - disc
        sums = F.conv2d(layers, torch.stack([disc, ring])[:, None], padding=reach)  # (4,2,h,w)
        means, shares = sums[:3] / sums[3].clamp(min=1), sums[3] / torch.stack([disc.sum(), ring.sum()])[:, None, None]
        contrast = (means[:, 0] - means[:, 1]).norm(dim=0) * shares[0] * shares[1].sqrt()
        score = contrast * closeness(h, w) * valid * radius**0.25
        if score.max() > best:
            best, place = score.max(), (*divmod(int(score.argmax()), w), radius)
    row, column, radius = place
    rho = torch.hypot(torch.arange(float(h))[:, None] - row, torch.arange(float(w)) - column) / radius
    return Place((rho <= 1).float() * valid, fade(rho, width) * valid)


def place_in_box(shape, box, width):
    """The Place for a user's box: the ellipse inscribed in it. shape (s/8,t/8); box (x0,y0,x1,y1) in cells."""
    x0, y0, x1, y1 = box
    y, x = torch.arange(shape[0])[:, None] + 0.5, torch.arange(shape[1]) + 0.5
    # A box smaller than a cell still has one in it: no semi-axis is below 3/4 of a cell.
    v, u = (y - (y0 + y1) / 2) / max((y1 - y0) / 2, 0.75), (x - (x0 + x1) / 2) / max((x1 - x0) / 2, 0.75)
    rho = torch.hypot(v, u)
    inside = (torch.maximum(v.abs(), u.abs()) <= 1).float()
    return Place((rho <= 1).float(), fade(rho, width), inside)


# ---------------------------------------------------------------------------------------------------------------
# Ours: features without learned weights
# ---------------------------------------------------------------------------------------------------------------


def builtin_descriptors(image, stride=PATCH, place=None):
    """Colour, local contrast and oriented gradient energy around each patch; no learned weights.

    image: (3,s,t) in [0,1]. place: see `locate`. Returns (N,C) row-major over the patch grid, less a middle value: the
    cosine of two rows is positive where they deviate from it alike, as eq. (1) needs. The middle is half-way between
    core and surround, or the image's mean where there is no place. The channels keep their natural scale (grey levels
    of Lab), as dividing each by its spread would blow up the noise of those that say nothing; the last is constant,
    the median length of the others, so that patches near the middle value are alike whatever their direction.
    """
    lab = rgb_to_lab(image)
    cells = tuple(side // PATCH for side in lab.shape[1:])
    background = place.outside() if place else torch.ones(cells)
    lab = even_light(lab, background, gently=not (place and place.box is not None))
    padded = F.pad(lab[None, :1], (1, 1, 1, 1), mode="replicate")
    dx = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2
    dy = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2
    angles = [0, math.pi / 4, math.pi / 2, 3 * math.pi / 4]
    energy = torch.cat([(math.cos(a) * dx + math.sin(a) * dy) ** 2 for a in angles], dim=1)  # (1,4,s,t)
    maps = torch.cat([lab, lab[:1] ** 2, energy[0]])  # (8,s,t)
    mean = F.avg_pool2d(maps, PATCH, stride)  # (8,h,w)
    contrast = (mean[3:4] - mean[:1] ** 2).clamp(min=0).sqrt()
    descriptors = torch.cat([mean[:1], CHROMA * mean[1:3], TEXTURE * contrast, TEXTURE * mean[4:].sqrt()])
    x = descriptors.flatten(1).T  # (N,8)
    middle_value = x.mean(0)
    if place:
        core, weights = (on_patches(m, descriptors.shape[1:]).flatten().to(x) for m in (place.core, place.weights))
        inside, around = core * weights, (1 - core) * weights
        middle_value = (inside @ x / inside.sum() + around @ x / around.sum()) / 2
    x = x - middle_value
    return torch.cat([x, x.norm(dim=1).median().expand(len(x), 1)], dim=1)


@dataclass(frozen=True)
class Backbone:
    """What turns an image into patch features."""

    name: str  # "dino" or "builtin"
    extract: Callable  # image (3,s,t) in [0,1], stride, place or None -> (N,C)


@functools.lru_cache(maxsize=1)
def load_backbone(backbone="auto", weights=None, branch="teacher", device="cpu", progress=True):
    """The Backbone by name: "dino", "builtin", or "auto", which is DINO where its weights can be had.

    Falls back only for "auto" without `weights`, and says so. Raises as load_dino, and ValueError for other names.
    """
    if backbone not in ("auto", "dino", "builtin"):
        raise ValueError(f"backbone must be auto, dino or builtin, got {backbone!r}")
    if backbone == "builtin":
        if weights:
            raise ValueError("weights are for the dino backbone: leave them out with builtin")
        return Backbone("builtin", builtin_descriptors)
    try:
        model = load_dino(weights, branch, progress).to(device)
    except (OSError, RuntimeError) as error:
        if backbone == "dino" or weights:
            raise
        log.warning(
            "DINO's weights could not be had: %s. Using the built-in descriptors of colour and texture instead; "
            "for DINO, download %s elsewhere and give it as --weights FILE.", error, DINO_URL,
        )  # fmt: skip
        return Backbone("builtin", builtin_descriptors)

    def extract(image, stride, place=None):
        mean, std = image.new_tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]  # ImageNet's
        with torch.no_grad():
            return model.keys(((image - mean) / std)[None], stride)[0]

    return Backbone("dino", extract)


# ---------------------------------------------------------------------------------------------------------------
# Ours: what the object looks like
# ---------------------------------------------------------------------------------------------------------------


def clean_mask(mask, components):
    """Fill the holes of a mask (H,W) bool, then keep its `components` largest connected pieces, or all for 0."""
    mask = ndimage.binary_fill_holes(mask)
    if components:
        pieces, count = ndimage.label(mask)
        area = np.bincount(pieces.ravel(), minlength=count + 1)
        area[0] = 0  # the background, which may well be the largest
        keep = np.argsort(-area, kind="stable")[:components]
        mask = np.isin(pieces, keep[area[keep] > 0])
    return mask


def gaussian_log_ratio(colours, foreground, background):
    """log p(colour | foreground) / p(colour | background) of colours (P,3), each a full Gaussian, weighted (P,)."""
    logs = []
    for weight in (foreground, background):
        weight = weight / weight.sum().clamp(min=3)
        centred = colours - weight @ colours
        covariance = (centred.T * weight) @ centred + 0.3**2 * torch.eye(3)  # the ridge: 3 grey levels
        mahalanobis = (centred @ torch.linalg.inv(covariance) * centred).sum(1)
        logs.append(-0.5 * (mahalanobis + torch.logdet(covariance)))
    return logs[0] - logs[1]


def moments_ellipse(weight, grow):
    """The ellipse with the moments of weight (h,w), its axes times `grow`: (h,w), 1 on it, 0 in its centre."""
    h, w = weight.shape
    half = min(h, w) / 2
    xy = torch.stack([torch.arange(h)[:, None].expand(h, w), torch.arange(w).expand(h, w)]).flatten(1) / half
    weight = weight.flatten() / weight.sum()
    centred = xy - (xy @ weight)[:, None]
    covariance = 4 * grow**2 * ((centred * weight) @ centred.T + 0.05**2 * torch.eye(2))
    squared = (centred * (torch.linalg.inv(covariance) @ centred)).sum(0)
    return squared.clamp(min=1e-6).sqrt().unflatten(0, (h, w))


def model_colours(image, foreground, place, steps, components=1):
    """Sharpen a foreground map by what the object and its surround look like: expectation maximisation.

    image (3,s,t) in [0,1]; foreground (s/4,t/4) in [0,1], from the graph; place: a Place. One Gaussian of Lab colours
    each for foreground and background, and a soft ellipse for the place: the one with the map's own moments, or the one
    inscribed in the user's box. components: pieces to keep, 0 for all. Returns the probability of foreground (s/4,t/4).
    Ours, in the manner of GrabCut (Rother et al. 2004) without its graph cut, which the bilateral solver replaces.
    """

    def finer(cells):  # from cells of 8 px to 4 px, (P,)
        return halved(cells).flatten()

    def as_mask(p):  # (P,) to (s/4,t/4) numpy
        return clean_mask((p > 0.5).unflatten(0, (h, w)).numpy(), components)

    lab = even_light(rgb_to_lab(image), place.outside(), gently=place.box is None)
    colours = F.avg_pool2d(lab, 4)  # (3,s/4,t/4)
    h, w = colours.shape[1:]
    colours = colours.flatten(1).T / 10
    allowed = finer(place.weights > 0) if place.box is None else finer(place.box)

    def ellipse(weight, grow):  # (P,)
        return moments_ellipse(weight.unflatten(0, (h, w)), grow).flatten()

    p = foreground.flatten() * allowed
    pieces, _ = ndimage.label((p > 0.5).unflatten(0, (h, w)).numpy())
    overlap = np.bincount(pieces.ravel(), finer(place.core).numpy())
    overlap[0] = 0
    if components == 1 and overlap.any():  # start from the piece that the place points at
        p = p * torch.from_numpy(pieces == overlap.argmax()).flatten()
    for _ in range(steps):
        if place.box is None:
            spatial = 2 * (1 - ellipse((p > 0.5) + 1e-4, 1.1)).clamp(-2, 1)
            log_odds = gaussian_log_ratio(colours, p, (1 - p) * allowed)
        else:  # the ring outside the box is surely background, what is inside only half as surely
            spatial = (8 * (1 - ellipse(finer(place.core), 1.05))).clamp(-4, 4)
            log_odds = gaussian_log_ratio(colours, p, torch.where(allowed > 0, 0.5 * (1 - p), 1)).clamp(-4, 4)
        p = torch.sigmoid(log_odds + spatial) * allowed
        if place.box is None:
            p = p * torch.from_numpy(as_mask(p)).flatten()
    # People draw smooth outlines, a little outside what they see: so is this one, its 0.4 contour moved to 0.5.
    mask = as_mask(p)
    radius = math.sqrt(mask.sum() / math.pi)
    p = ndimage.gaussian_filter(mask.astype(np.float32), 0.1 * radius, mode="nearest")
    return torch.from_numpy(0.6 * p / (0.6 * p + 0.4 * (1 - p)))


def separation(image, foreground, place):
    """How well a foreground (s/4,t/4) stands out: the distance of its edge's colours from those of the ring around it.

    In units of their spread, times how close to the middle of the image it lies; 0 for nothing or everything.
    """
    mask = foreground.numpy() > 0.5
    lab = F.avg_pool2d(rgb_to_lab(image), 4) * torch.tensor([1, CHROMA, CHROMA])[:, None, None]
    valid = halved(place.weights > 0).numpy()
    width = max(2, 0.25 * math.sqrt(mask.sum() / math.pi))
    edge = mask & (ndimage.distance_transform_edt(mask) <= width)
    ring = ~mask & (ndimage.distance_transform_edt(~mask) <= width) & valid
    if not (edge.any() and ring.any()):
        return 0.0
    edge, ring = lab[:, torch.from_numpy(edge)], lab[:, torch.from_numpy(ring)]
    spread = (edge.var(1, correction=0) + ring.var(1, correction=0)) / 2 + 1
    distance = ((edge.mean(1) - ring.mean(1)).square() / spread).sum().sqrt()
    return float(distance * closeness(*mask.shape)[torch.from_numpy(mask)].mean())


STARTS = 1.5, 2.2  # sizes of the further starts of `outline`, relative to the first result


def outline(image, foreground, place, steps, components=1):
    """`model_colours` from several starts, of whose results the one that stands out best is kept: (s/4,t/4) in [0,1].

    A small dark core in a larger object is a steady state of its own: so the first result's ellipse, made larger, is
    tried as a start too. A user's box tells the size, so that the first result is then the only one.
    """
    first = model_colours(image, foreground, place, steps, components)
    if place.box is not None or not (first > 0.5).any():
        return first
    results = [first]
    for grow in STARTS:
        start = torch.sigmoid(8 * (1 - moments_ellipse((first > 0.5) + 1e-4, grow)))
        core = F.avg_pool2d((start > 0.5).float()[None], 2)[0]
        wider = dataclasses.replace(place, core=(core > 0.5) * (place.weights > 0).float())
        results.append(model_colours(image, start, wider, steps, components))
    return max(results, key=lambda result: separation(image, result, place))


# ---------------------------------------------------------------------------------------------------------------
# From assignment to mask
# ---------------------------------------------------------------------------------------------------------------


def foreground_score(assignment, core):
    """How much commoner each cluster is in the core than in the image as a whole: (K,), above 0 is foreground.

    assignment (h,w,K); core (h,w) in [0,1], where the object most likely is. For K = 2 exactly one cluster is
    foreground, unless the clusters are alike. The rule is ours, as the paper states none; no ground truth is involved.
    """
    share = assignment.mean((0, 1)).clamp(min=1e-6)
    return (assignment * core[..., None]).sum((0, 1)) / core.sum().clamp(min=1e-6) / share - 1


@dataclass(frozen=True)
class Scene:
    """One image, or the part of it around the user's box, made ready for the graph. s, t: its resized sides."""

    rgb: np.ndarray  # (H,W,3) uint8, the whole image
    window: tuple  # (y0, x0, y1, x1) px, the part that is looked at
    inside: np.ndarray  # (H,W) bool, where the object may be: the box, or everywhere
    grid: tuple  # (h,w) patches
    image: torch.Tensor  # (3,s,t) in [0,1], the window resized
    place: Place  # where the object roughly is
    weights: torch.Tensor  # (N,) of the nodes, from the place
    features: torch.Tensor  # (N,C) f, rows of length sqrt(C): entries of about unit size, as initialisation expects


RING = 20  # px around the user's box that are looked at as known background, at least; the margin of the authors' code


def look(rgb, config, backbone, device="cpu", box=None):
    """The Scene of an image (H,W,3) uint8.

    box: (x0, y0, x1, y1) px, x1 and y1 excluded: a rectangle around the object, given by the user. Only it and a ring
    of 20 px or 30 % are looked at; what lies outside it is background. Raises ValueError for a box not in the image.
    """
    height, width = rgb.shape[:2]
    x0, y0, x1, y1 = (0, 0, width, height) if box is None else map(int, box)
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise ValueError(f"the box {x0},{y0},{x1},{y1} must be x0 < x1, y0 < y1 inside the image, {width} x {height}")
    inside = np.zeros((height, width), bool)
    inside[y0:y1, x0:x1] = True
    ring_x, ring_y = (0 if box is None else max(RING, round(0.3 * side)) for side in (x1 - x0, y1 - y0))
    top, left = max(0, y0 - ring_y), max(0, x0 - ring_x)
    bottom, right = min(height, y1 + ring_y), min(width, x1 + ring_x)
    part = rgb[top:bottom, left:right]
    if min(part.shape[:2]) < PATCH:
        raise ValueError(f"the box {x0},{y0},{x1},{y1} is too small: with its ring, each side needs {PATCH} px")
    image, grid = resize_image(part, config.size, config.stride)
    cells = tuple(side // PATCH for side in image.shape[1:])
    if box is not None:
        to_cells = np.tile([cells[1] / (right - left), cells[0] / (bottom - top)], 2)
        place = place_in_box(cells, (np.array([x0, y0, x1, y1]) - [left, top] * 2) * to_cells, config.prior)
    else:
        place = locate(image, config.prior)
    features = backbone.extract(image.to(device), config.stride, place if config.prior else None)
    features = F.normalize(features, dim=1) * math.sqrt(features.shape[1])
    weights = on_patches(place.weights, grid).flatten().to(device)
    return Scene(rgb, (top, left, bottom, right), inside, grid, image, place, weights, features)


@dataclass(frozen=True)
class Segmentation:
    """What `segment` returns; H, W are the image's own size after its EXIF rotation."""

    mask: np.ndarray  # (H,W) bool, the object
    probability: np.ndarray  # (H,W) float32 in [0,1], of foreground, before holes are filled and pieces dropped
    labels: np.ndarray  # (H,W) uint8, 0 to K - 1, from the surest background cluster to the surest foreground
    assignment: np.ndarray  # (h,w,K) float32, of the patches, soft, ordered as the labels
    scene: Scene  # what the graph was made of
    history: list  # the loss at every epoch
    backbone: str  # "dino" or "builtin"
    seconds: dict  # wall-clock time of each stage


def finish(scene, assignment, config):
    """The clusters of the patches (N,K) as mask, probability and labels (H,W), and the ordered assignment (h,w,K).

    The foreground clusters are chosen, the soft assignment is upsampled and refined by the bilateral solver at the
    image's own resolution, cluster by cluster (for K = 2 one is enough), then binarised, and the mask cleaned.
    """
    assignment = assignment.unflatten(0, scene.grid)  # (h,w,K)
    core = on_patches(scene.place.core, scene.grid).to(assignment)
    score = foreground_score(assignment, core) * (-1 if config.invert else 1)
    assignment = assignment[..., score.argsort()].cpu().numpy()
    background = int((score <= 0).sum())  # the labels from here on are foreground

    y0, x0, y1, x1 = scene.window
    rgb, inside = scene.rgb[y0:y1, x0:x1], scene.inside[y0:y1, x0:x1]
    s, t = scene.image.shape[1:]
    foreground = assignment[..., background:].sum(2, keepdims=True)  # (h,w,1)
    if config.colour_steps and not config.invert:
        foreground = torch.from_numpy(upsample(foreground, config.stride, (s // 4, t // 4), (s, t))[..., 0])
        foreground = outline(scene.image, foreground, scene.place, config.colour_steps, config.components)
        foreground = upsample(foreground[..., None].numpy(), 4, rgb.shape[:2], (s, t), 4)
    else:
        foreground = upsample(foreground, config.stride, rgb.shape[:2], (s, t))
    soft = foreground * inside[..., None]  # (H',W',1), H' and W' of the window
    if config.clusters > 2:
        soft = np.concatenate([soft, upsample(assignment, config.stride, rgb.shape[:2], (s, t))], axis=2)
    if config.refine:
        sigmas = config.sigma_spatial, config.sigma_luma, config.sigma_chroma
        soft = bilateral.solve(soft, rgb, config.confidence, *sigmas, config.smoothness).astype(np.float32)

    labels, probability = np.zeros(scene.inside.shape, np.uint8), np.zeros(scene.inside.shape, np.float32)
    probability[y0:y1, x0:x1] = soft[..., 0].clip(0, 1) * inside
    mask = probability > 0.5
    if config.clusters == 2:
        labels[mask] = 1
    else:  # the likeliest cluster, of the foreground ones inside the mask and of the others outside it
        clusters = soft[..., 1:]
        chosen = (np.arange(config.clusters) >= background) == mask[y0:y1, x0:x1, None]
        labels[y0:y1, x0:x1] = np.where(chosen, clusters, -np.inf).argmax(2)
    return clean_mask(mask, config.components), probability, labels, assignment


def pick_device(device):
    """A torch.device; "auto" is the current CUDA device, else the CPU. Raises ValueError where it is not there."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(torch.device(device).type, False):
        raise ValueError(f"device {device} is not available on this machine: use --device auto or cpu")
    return torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else torch.device(device)


def segment(
    image,
    config=Config(),
    *,
    box=None,
    backbone="auto",
    weights=None,
    branch="teacher",
    device="auto",
    shared=None,
    progress=False,
):
    """Segment one photograph: the whole method.

    image: a path, a PIL image or a uint8 array (H,W,3) or (H,W). box: (x0, y0, x1, y1) px, see `look`.
    backbone: "auto", "dino", "builtin", or a Backbone. weights, branch: see `load_dino`. device: "auto", "cpu", "cuda"
    or "mps". shared: parameters from `fit_collective`. progress: show the bar of a download.
    Returns a Segmentation. Raises ImageError for an image that cannot be segmented, ValueError and OSError for
    settings, weights or a device that cannot be had.
    """
    device = pick_device(device)
    if not isinstance(backbone, Backbone):
        backbone = load_backbone(backbone, weights, branch, device, progress)
    seconds, start = {}, time.perf_counter()

    def lap(stage):
        nonlocal start
        seconds[stage], start = time.perf_counter() - start, time.perf_counter()

    rgb = load_image(image)
    lap("read")
    scene = look(rgb, config, backbone, device, box)
    lap("features")
    if np.ptp(rgb.reshape(-1, 3), axis=0).max() <= 2:  # grey levels: JPEG can make one or two of nothing
        name = image if isinstance(image, (str, Path)) else "the image"
        log.warning("%s is constant: there is no structure to segment, and the mask is empty", name)
        nothing = np.zeros(rgb.shape[:2])
        assignment = np.eye(config.clusters, dtype=np.float32)[np.zeros(scene.grid, int)]
        outcome, history = (nothing > 0, nothing.astype(np.float32), nothing.astype(np.uint8), assignment), []
    else:
        adjacency = build_graph(scene.features, config.tau, scene.weights)
        assignment, history = fit(scene.features, adjacency, config, shared)
        lap("fit")
        outcome = finish(scene, assignment, config)
        lap("refine")
    return Segmentation(*outcome, scene, history, backbone.name, seconds)


# ---------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------


TINT = (0, 200, 120)
PALETTE = (0, 0, 0, 0, 200, 120, 240, 200, 0, 60, 120, 240, 230, 60, 60, 160, 80, 200, 0, 200, 220, 250, 130, 180)


def overlay(rgb, mask):
    """The image (H,W,3) uint8 with the mask (H,W) bool tinted and outlined, to look at: a PIL image."""
    from torchvision.utils import draw_segmentation_masks  # takes over a second to import: only where it is used

    tinted = draw_segmentation_masks(torch.from_numpy(rgb).permute(2, 0, 1), torch.from_numpy(mask), 0.2, TINT)
    tinted = tinted.permute(1, 2, 0).numpy().copy()
    width = max(1, round(min(mask.shape) / 200))
    tinted[mask ^ ndimage.binary_erosion(mask, iterations=width)] = TINT
    return Image.fromarray(tinted)


def heat(values):
    """Numbers (h,w) in [0,1] as colours (h,w,3) uint8, black over red and yellow to white."""
    return (np.clip(np.asarray(values)[..., None] * 3 - np.arange(3), 0, 1) * 255).astype(np.uint8)


def explain(result, config):
    """One picture of the stages of a Segmentation side by side, each with its caption: a PIL image."""
    from torchvision.transforms.functional import to_pil_image, to_tensor
    from torchvision.utils import make_grid

    y0, x0, y1, x1 = result.scene.window
    rgb, mask = result.scene.rgb[y0:y1, x0:x1], result.mask[y0:y1, x0:x1]
    h, w = result.scene.grid
    flat = result.scene.features.cpu()
    centred = flat - flat.mean(0)
    components = centred @ torch.linalg.svd(centred, full_matrices=False)[2][:3].T  # first three principal components
    low, high = components.quantile(0.02, dim=0), components.quantile(0.98, dim=0)
    colours = ((components - low) / (high - low).clamp(min=1e-6)).clamp(0, 1).unflatten(0, (h, w)).numpy()
    node = int((result.assignment[..., -1] * on_patches(result.scene.place.weights, (h, w)).numpy()).argmax())
    row = build_graph(flat, config.tau, result.scene.weights.cpu())[node].unflatten(0, (h, w)).numpy()
    row, column = heat(row), np.unravel_index(node, (h, w))
    row[column] = (0, 160, 255)

    scale = 256 / min(rgb.shape[:2])
    width, height = round(rgb.shape[1] * scale), round(rgb.shape[0] * scale)
    tiles = [
        ("1  image", Image.fromarray(rgb)),
        (f"2  features ({result.backbone}), PCA", Image.fromarray((colours * 255).astype(np.uint8))),
        ("3  graph: row of the blue patch", Image.fromarray(row)),
        ("4  soft assignment", Image.fromarray(heat(result.assignment[..., -1]))),
        ("5  refined mask", overlay(rgb, mask)),
    ]
    font, caption, pictures = ImageFont.load_default(14), 24, []
    for text, picture in tiles:
        patches = picture.width == w
        picture = picture.resize((width, height), Image.NEAREST if patches else Image.LANCZOS)
        tile = Image.new("RGB", (width, height + caption), "white")
        tile.paste(picture, (0, caption))
        ImageDraw.Draw(tile).text((2, 3), text, "black", font)
        pictures.append(to_tensor(tile))
    return to_pil_image(make_grid(pictures, nrow=len(pictures), padding=6, pad_value=1.0))


# ---------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------


SUFFIXES = {".png", ".jpg", ".jpeg", ".jpe", ".tif", ".tiff", ".bmp", ".webp", ".gif", ".ppm", ".pgm"}


def comma_separated(text):
    """Whole numbers from "1,2,3"."""
    return tuple(int(number) for number in text.split(","))


def box_corners(text):
    """Four whole numbers from "x0,y0,x1,y1"."""
    corners = comma_separated(text)
    if len(corners) != 4:
        raise argparse.ArgumentTypeError(f"needs four numbers, x0,y0,x1,y1, got {text!r}")
    return corners


def add_config_flags(parser):
    """A flag for every field of Config, with its help, choices and default."""
    group = parser.add_argument_group("hyper-parameters (source of the default in brackets)")
    for field in dataclasses.fields(Config):
        flag, default, info = "--" + field.name.replace("_", "-"), field.default, field.metadata
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
        text = f"{info['help']}; default {shown} [{info['source']}]".replace("%", "%%")
        if isinstance(default, bool):
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=text)
        elif isinstance(default, tuple):
            group.add_argument(flag, type=comma_separated, default=default, help=text,
                               metavar="INT,INT")  # fmt: skip
        else:
            kind = type(default)
            metavar = None if info["choices"] else kind.__name__.upper()
            group.add_argument(flag, type=kind, choices=info["choices"], default=default, help=text, metavar=metavar)


def config_from(options):
    """The Config that parsed flags ask for. Raises ValueError for a value out of range."""
    return Config(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Config)})


def build_parser():
    parser = argparse.ArgumentParser(
        prog="unsegmedgat.py",
        description="Unsupervised segmentation of medical photographs (UnSegMedGAT). Not a medical device.",
        epilog="Exit code: 0 all done, 1 some image failed, 2 wrong use.",
    )
    parser.add_argument("images", nargs="+", type=Path, help="images, or folders of images")
    parser.add_argument("-o", "--output", type=Path, required=True,
                        help="the mask, a .png file, for one image; a folder for several: one .png per image")  # fmt: skip
    parser.add_argument("--box", type=box_corners, metavar="X0,Y0,X1,Y1",
                        help="px, a rectangle around the object; what lies outside it is background")  # fmt: skip
    parser.add_argument("--probability", action="store_true", help="also write MASK_probability.png, 8 bit")
    parser.add_argument("--labels", action="store_true", help="also write MASK_labels.png, the clusters in colours")
    parser.add_argument("--overlay", action="store_true", help="also write MASK_overlay.png, the mask on the image")
    parser.add_argument("--explain", action="store_true", help="also write MASK_explain.png, the stages side by side")
    parser.add_argument("--backbone", choices=["auto", "dino", "builtin"], default="auto",
                        help="features: DINO's, the built-in descriptors, or DINO's if its weights can be had (auto)")  # fmt: skip
    parser.add_argument("--weights", type=Path, help="DINO's weights file, not torch.hub's cache or a download")
    parser.add_argument("--branch", choices=["teacher", "student"], default="teacher", help="of a full checkpoint")
    parser.add_argument("--preset", choices=PRESETS, help="the paper's settings, without what is ours")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    parser.add_argument("--skip-existing", action="store_true", help="leave alone the images whose outputs all exist")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that share several images, one thread each; "
                        "default: one a core, at most 4 on a GPU. Of no influence on the outputs")  # fmt: skip
    parser.add_argument("--quiet", action="store_true", help="only warnings and errors")
    parser.add_argument("--verbose", action="store_true", help="seconds of every stage")
    add_config_flags(parser)
    return parser


def parse_options(parser, argv=None, presets=PRESETS):
    """The parsed options, where a preset changes the defaults and the flags given still win."""
    options = parser.parse_args(argv)
    if options.preset:
        parser.set_defaults(**presets[options.preset])
        options = parser.parse_args(argv)
    return options


def is_image(path):
    """Whether a file in a folder looks like one to segment, by its name."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def list_images(inputs):
    """Every image named, and those in the folders named (not in folders below them), in order."""
    found = []
    for path in inputs:
        if path.is_dir():
            inside = [p for p in sorted(path.iterdir()) if is_image(p)]
            if not inside:
                raise ValueError(f"{path}: there is no image in this folder")
            found += inside
        else:
            found.append(path)
    return found


def plan_outputs(options):
    """Pairs (image, {kind: output path}), checked before any work: one writer an output, and no output is an input."""
    images, output = list_images(options.images), options.output
    single = len(options.images) == 1 and not options.images[0].is_dir() and not output.is_dir()
    if single and output.suffix.lower() != ".png":
        raise ValueError(f"{output}: the mask is a PNG, so give a name that ends in .png, or an existing folder")
    folder = output.parent if single else output
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: is a file, and a folder is needed here" + ("" if single else " for several masks"))
    if not folder.exists() and (single or not folder.parent.is_dir()):
        raise ValueError(f"{folder if single else folder.parent}: there is no such folder; create it first")
    if not os.access(folder if folder.exists() else folder.parent, os.W_OK):
        raise ValueError(f"{folder}: no permission to write there")
    if not folder.exists() and folder.suffix.lower() in SUFFIXES:
        raise ValueError(f"{folder}: several images need a folder, and this is the name of an image")

    kinds = [kind for kind in ("probability", "labels", "overlay", "explain") if getattr(options, kind)] + ["mask"]
    plan, writer = [], {}
    sources = {image.resolve() for image in images}
    for image in images:
        mask = output if single else folder / f"{image.stem}.png"
        outputs = {kind: mask if kind == "mask" else mask.with_name(f"{mask.stem}_{kind}.png") for kind in kinds}
        for path in outputs.values():
            if path.resolve() in sources:
                raise ValueError(f"{path}: would be written, but it is an input; choose another output")
            if path.is_dir():
                raise ValueError(f"{path}: is a folder, and a file is to be written there")
            other = writer.setdefault(path.resolve(), image)
            if other is not image:
                raise ValueError(f"{path}: would be written for both {other} and {image}; rename one or run them apart")
        plan.append((image, outputs))
    folder.mkdir(exist_ok=True)
    return plan


@contextlib.contextmanager
def whole(path):
    """A path to write to, beside `path`; then what was written is renamed to it: it appears whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_outputs(outputs, result, config):
    """The files asked for, the mask last, so that its presence says that the image is done."""
    for kind, path in outputs.items():
        if kind == "mask":
            picture = Image.fromarray(result.mask.astype(np.uint8) * 255)
        elif kind == "probability":
            picture = Image.fromarray(np.rint(result.probability * 255).astype(np.uint8))
        elif kind == "labels":
            picture = Image.fromarray(result.labels)
            # The pixel is the label, the palette makes it visible; a full one, or Pillow saves fewer bits.
            picture.putpalette((PALETTE + PALETTE[3:] * 37)[:768])
        elif kind == "overlay":
            picture = overlay(result.scene.rgb, result.mask)
        else:
            picture = explain(result, config)
        with whole(path) as part:
            picture.save(part, format="PNG")


def reason(error):
    """An exception in one line."""
    return str(error).split("\n")[0] or type(error).__name__


def segment_to_files(task):
    """One image from file to files, here or in a worker: (what to say of it, None), or (None, why it failed)."""
    image, outputs, config, how = task
    start = time.perf_counter()
    try:
        result = segment(image, config, **how)
        write_outputs(outputs, result, config)
    except Exception as error:  # whatever becomes of one image, the others go on
        return None, reason(error)
    seconds = ", ".join(f"{stage} {t:.2f} s" for stage, t in result.seconds.items())
    said = f"foreground {result.mask.mean():.1%}, backbone {result.backbone}, {time.perf_counter() - start:.1f} s"
    return (said, seconds), None


LOG_FORMAT = "%(levelname)s: %(message)s"


def start_worker():
    """What a worker process does first. Ctrl-C is its parent's business: the worker finishes the image at hand."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(format=LOG_FORMAT)

    def follow():
        multiprocessing.parent_process().join()
        os._exit(1)  # nobody is left to work for

    threading.Thread(target=follow, daemon=True).start()


@contextlib.contextmanager
def worker_map(workers, images):
    """A `map` over images that keeps their order: in this process for one, else in so many worker processes.

    A worker has one thread: two that share a core with other programs wait for each other, up to 30 times slower. And
    sums in one order give the same bytes whatever the number of workers.
    """
    if images == 1:
        yield map
        return
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):  # read by torch and NumPy as the workers import them
        # A fork would inherit the locks of threads that it does not have.
        pool = ProcessPoolExecutor(min(workers, images), multiprocessing.get_context("spawn"), start_worker)
        try:
            yield pool.map
        finally:
            pool.shutdown(cancel_futures=True)  # after an interrupt too, only what is begun is finished


@contextlib.contextmanager
def ranks():
    """`rank_and_world` under torchrun, whose processes share the images."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield rank_and_world()
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group(timeout=timedelta(days=1))  # they wait for the slowest; torchrun minds the dead
    try:
        yield rank_and_world()
    finally:
        distributed.destroy_process_group()


def run(options):
    """Segment what the options ask for; returns the exit code. Raises ValueError or OSError for wrong use."""
    config = config_from(options)
    if options.workers is not None and options.workers < 1:
        raise ValueError(f"workers must be at least 1, got {options.workers}")
    plan = plan_outputs(options)
    with ranks() as (rank, world):
        share = list(enumerate(plan, 1))[rank::world]
        todo = share
        if options.skip_existing:
            todo = [
                (n, (image, outputs)) for n, (image, outputs) in share if not all(p.exists() for p in outputs.values())
            ]
            if len(todo) < len(share) and not options.quiet:
                print(f"{len(share) - len(todo)} of {len(share)} images are left alone, as their outputs exist")
        if not any(gather(bool(todo))):  # all ranks together: none writes before every one has looked what exists
            return 0
        device = pick_device(options.device)
        backbone = load_backbone(options.backbone, options.weights, options.branch, device, not options.quiet)
        if len(set(gather(backbone.name))) > 1:
            raise ValueError("DINO's weights are at hand for some ranks only: give --weights, or --backbone builtin")
        shared = None
        if config.collective:  # over all the images, so that going on after an interruption changes nothing
            scenes = []
            for _, (image, _) in share:
                try:
                    scene = look(load_image(image), config, backbone, device, options.box)
                    scenes.append((scene.features, scene.weights))
                except Exception:  # of which `segment` will tell
                    scenes.append(None)
            quiet = options.quiet or rank > 0
            with torch.hub.tqdm(total=config.collective * len(plan), desc="shared", disable=quiet) as bar:
                shared = fit_collective(scenes, config, device, progress=lambda: bar.update(1))

        most = min(torch.get_num_threads(), 4) if device.type == "cuda" else torch.get_num_threads()
        how = {"box": options.box, "device": str(device), "shared": shared, "weights": options.weights,
               "branch": options.branch, "backbone": backbone.name if len(plan) > 1 else backbone}  # fmt: skip
        tasks, failures = [(image, outputs, config, how) for _, (image, outputs) in todo], []
        with worker_map(options.workers or most, len(plan)) as in_order:
            for (number, (image, outputs)), (said, why) in zip(todo, in_order(segment_to_files, tasks)):
                if why:
                    failures.append(image)
                    log.error("%s: %s", image, why)
                elif not options.quiet:
                    said = ", ".join(said if options.verbose else said[:1])
                    print(f"[{number}/{len(plan)}] {image} -> {outputs['mask']}  {said}", flush=True)
        failures = [image for part in gather(failures) for image in part]
    if rank > 0:  # the first rank tells: torchrun ends them all as soon as one has failed
        return 0
    if failures and len(plan) > 1:
        log.error("%d failed: %s", len(failures), ", ".join(map(str, failures)))
    return 1 if failures else 0


def main(argv=None):
    """The command line; returns the exit code."""
    logging.basicConfig(format=LOG_FORMAT)
    options = parse_options(build_parser(), argv)
    try:
        return run(options)
    except BrokenProcessPool:
        log.error("a worker process died, perhaps out of memory: use fewer --workers, and --skip-existing to go on")
        return 1
    except (ValueError, OSError, RuntimeError) as error:
        log.error("%s", reason(error))
        return 2
    except KeyboardInterrupt:
        log.error("interrupted; what is written is whole, and --skip-existing goes on from here")
        return 130


if __name__ == "__main__":
    sys.exit(main())
