"""UnSegMedGAT in plain PyTorch: unsupervised segmentation of medical photographs.

A. Mudit Adityaja, S. J. Shigwan and N. Kumar, "UnSegMedGAT: Unsupervised Medical Image Segmentation
using Graph Attention Networks Clustering". Patches of an image become the nodes of a graph, and a small
graph attention network is optimised, for that image alone, until its clusters have high modularity.

    python unsegmedgat.py image.png -o mask.png                        # one photograph
    python unsegmedgat.py image.png -o mask.png --point 210,160        # the object is here
    python unsegmedgat.py photos/ -o masks/ --overlay                  # a folder, with pictures to look at
    torchrun --nproc-per-node=8 unsegmedgat.py photos/ -o masks/       # a data set, on many cores, GPUs or machines

After the settings the first part is the paper in its order: image, features, graph (1), attention (2)-(4), network (5),
loss (6)-(8), fit. What follows is ours: where to look, what is object, pictures and the command line. Of the paper's
own steps the defaults change the weights of the nodes in (1), the residual in (3), the balance in (8) and when the fit
stops: see `Config`; and what the solver trusts: see `finish`. X in (5) is centred and scaled, which the paper leaves
open: see `standardise`.
Shapes: B images, N = h * w patches on a grid, C features, K clusters, H heads.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import logging
import math
import os
import re
import socket
import sys
import threading
import time
import uuid
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from numbers import Integral, Real
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageDraw, ImageFont, UnidentifiedImageError
from scipy import ndimage
from scipy.special import logit
from torch import distributed, nn
from torch.autograd.function import once_differentiable

import bilateral

log = logging.getLogger("unsegmedgat")  # notices for the user; without any set-up they go to stderr

PATCH = 8  # px, the side of a patch: ViT-S/8
MAX_PIXELS = 150_000_000  # larger images are refused before they are decoded: a bomb, or a whole slide
MAX_NODES = 50_000  # larger graphs are refused: A alone would take over 10 GB


# Settings ------------------------------------------------------------------------------------------------------


def setting(default, help, source, low=0, high=sys.float_info.max, choices=None):
    """A field of Config: its default, what it does, where the default comes from; low <= value <= high, or a choice."""
    limits = {"low": low, "high": high, "choices": choices}
    return dataclasses.field(default=default, metadata={"help": help, "source": source, **limits})


ACTIVATIONS = {"silu": nn.SiLU, "selu": nn.SELU, "relu": nn.ReLU}


@dataclass(frozen=True)
class Config:
    """Every hyper-parameter, with its source. Each is a flag, with hyphens. Raises ValueError for what cannot be."""

    size: int = setting(224, "px of the shorter side, rounded to a multiple of 8", "authors' code", low=2 * PATCH)
    stride: int = setting(8, "px between patches: 8, or overlapping at 4 or 2", "paper: p = 8", choices=(8, 4, 2))
    colour: float = setting(0.7, "share of the colour in a node's feature, beside the backbone's; 0: none, 1: colour alone",
                            "ours; paper: 0", 0, 1)
    tau: float = setting(0.3, "similarities up to this are no edge, eq. (1); in (0,1)", "paper, section III", 1e-9, 1 - 1e-9)
    heads: int = setting(4, "attention heads, eq. (4); must divide every width", "ours, the paper gives none", low=1)
    widths: tuple[int, ...] = setting((128, 64), "m_r, the widths of the series of GATs: 128,64", "paper, section III")
    layers: int = setting(2, "t_r, the GAT layers in each series", "paper, section III", low=1)
    projection: int = setting(64, "M, the width in which they are summed, eq. (5)", "paper, section III", low=1)
    clusters: int = setting(2, "K; above 2 the mask is the union of foreground clusters", "paper: a mask", 2, 255)
    activation: str = setting("silu", "the non-linearity of eq. (3)", "paper, section III", choices=tuple(ACTIVATIONS))
    residual: bool = setting(True, "each layer adds the node's own W x to what it gathers", "ours; paper: no")
    epochs: int = setting(60, "optimiser steps for each image, at most", "paper, section III; ISIC: 300", low=1)
    settled: float = setting(0.01, "stop once 3 steps gain less than this share; 0: never", "ours; paper: 0")
    collective: int = setting(0, "T0, how many of the epochs share parameters", "paper: 5 of 10; ColonDB 15 of 70")
    lr: float = setting(1e-3, "AdamW's learning rate", "paper, section III", low=1e-9)
    weight_decay: float = setting(1e-2, "AdamW's weight decay", "paper: decay factor; authors' code: AdamW")
    resolution: float = setting(1.0, "g, the weight of the null model in the modularity", "paper: none, so 1")
    balance: float = setting(0.0, "b, the weight of eq. (8)'s second term, equal clusters", "ours; paper: 1")
    prior: float = setting(1.4, "radii of the place from which on nodes count less; 0: never", "ours")
    evidence: float = setting(
        16.0, "weight of a patch's likeness to its cluster, beside its place, in how sure it is and so how far "
        "the solver trusts it; 0: clusters alone, all trusted alike", "ours", high=1000
    )  # fmt: skip
    refine: bool = setting(True, "refine with the fast bilateral solver", "paper, Fig. 1")
    smoothness: float = setting(256.0, "lambda of the bilateral solver", "authors' code; what it trusts is ours")
    contour: float = setting(
        3.0, "px of the resized image, a blur that smooths the outline; 0: none", "ours", high=100
    )
    components: int = setting(1, "largest pieces of foreground to keep; 0 keeps all", "authors' code")
    invert: bool = setting(False, "swap foreground and background", "ours")
    seed: int = setting(0, "of the network's first parameters", "ours", high=2**32 - 1)

    def __post_init__(self):
        if isinstance(self.widths, list):  # as JSON has it
            object.__setattr__(self, "widths", tuple(self.widths))
        for field in dataclasses.fields(self):
            name, value, kind, info = field.name, getattr(self, field.name), type(field.default), field.metadata
            number = isinstance(value, Real if kind is float else Integral) and not isinstance(value, bool)
            for good, want in [
                (kind is not bool or isinstance(value, bool), "True or False"),
                (kind not in (int, float) or number and info["low"] <= value <= info["high"],
                 f"a {'whole ' if kind is int else ''}number from {info['low']} to {info['high']:g}"),
                (not info["choices"] or value in info["choices"], f"one of {info['choices']}"),
                (name != "widths" or isinstance(value, tuple) and value
                 and all(isinstance(w, int) and w >= 1 and w % self.heads == 0 for w in value),
                 f"positive multiples of the number of heads, {self.heads}"),
                (name != "collective" or number and value < self.epochs, f"below epochs, {self.epochs}"),
            ]:  # fmt: skip
                if not good:
                    raise ValueError(f"{name} must be {want}, got {value!r}")
            if number:  # NumPy's become Python's
                object.__setattr__(self, name, kind(value))


# What the paper does, as far as it says, with the solver of the authors' code. Place, window and field of view stay, as
# the paper's own figures are of images cropped to the object, and so do heads and the scale of X, which it leaves open.
PRESETS = {
    "paper": {"colour": 0.0, "residual": False, "settled": 0.0, "balance": 1.0, "prior": 0.0, "evidence": 0.0, "smoothness": 256.0,
              "contour": 0.0}
}  # fmt: skip


# Images --------------------------------------------------------------------------------------------------------


class ImageError(ValueError):
    """An image that cannot be segmented; the message says why and what to do."""


def reason(error):
    """An exception in one line."""
    return str(error).split("\n")[0] or type(error).__name__


# How pixels are turned for each value of EXIF's orientation tag
TURNS = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270", 7: "TRANSVERSE",
         8: "ROTATE_90"}  # fmt: skip


def turn_upright(image):
    """A PIL image turned by its EXIF orientation; as it is where it has none, or one that cannot be read.

    `ImageOps.exif_transpose` also writes the other EXIF tags anew, and fails where one of them is broken.
    """
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # of many kinds: bytes that are no EXIF
        return image
    return image.transpose(Image.Transpose[turn]) if turn else image


def why_unreadable(error):
    """What to tell of an exception that Pillow raised on opening or decoding a file."""
    if isinstance(error, UnidentifiedImageError):
        return ("it is damaged, or its format is not one that Pillow reads here (DICOM, NIfTI and HEIC are not): "
                "convert it to PNG")  # fmt: skip
    if isinstance(error, OSError) and error.strerror:  # the operating system's
        return error.strerror
    return f"it cannot be decoded ({reason(error)}): is it damaged or incomplete?"


def load_image(source):
    """Read any still image as RGB: uint8 (H,W,3), turned upright by its EXIF orientation.

    source: a path, a PIL image, or an array (H,W) or (H,W,3) of uint8. Grey of more than 8 bits is scaled by
    the image's own range, transparency is laid on white. Raises ImageError for whatever is not one still image.
    """
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim not in (2, 3) or source.shape[2:] not in ((), (3,)):
            raise ImageError(f"an array must be uint8 of shape (H,W) or (H,W,3), got {source.dtype} {source.shape}")
        source = Image.fromarray(source)
    try:
        image = source if isinstance(source, Image.Image) else Image.open(source)
        if image.width * image.height > MAX_PIXELS:
            raise ImageError(f"{image.width} x {image.height} pixels are too many: scale it down first")
        if getattr(image, "is_animated", False) and image.format != "MPO":  # MPO: a phone's photo and its preview
            raise ImageError(f"it holds {image.n_frames} frames: save the one you want as a still image")
        image = turn_upright(image)
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            grey = np.nan_to_num(np.asarray(image, np.float64), posinf=0, neginf=0)
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
    except Exception as error:  # Pillow's decoders raise many kinds on a damaged file
        raise ImageError(why_unreadable(error)) from None
    if min(rgb.shape[:2]) < PATCH:
        raise ImageError(f"{rgb.shape[1]} x {rgb.shape[0]} pixels are too few: each side needs at least {PATCH}")
    return rgb


def patch_grid(sides, stride):
    """How many patches there are along the sides of an image, px: (h,w)."""
    return tuple((side - PATCH) // stride + 1 for side in sides)


def resize_image(rgb, size, stride=PATCH):
    """Scale (H,W,3) uint8 so that the shorter side is `size` px, both rounded to multiples of 8: (3,s,t) in [0,1].

    Raises ImageError where its patches, so many px apart, would make too large a graph.
    """
    height, width = rgb.shape[:2]
    scale = size / min(height, width)
    s, t = (round(side * scale / PATCH) * PATCH for side in (height, width))
    nodes = math.prod(patch_grid((s, t), stride))
    if nodes > MAX_NODES:
        raise ImageError(f"{width} x {height} pixels make {nodes:,} patches, over {MAX_NODES:,}: use a smaller size")
    image = torch.from_numpy(rgb).permute(2, 0, 1)[None].float()
    image = F.interpolate(image, size=(s, t), mode="bilinear", antialias=True, align_corners=False)
    return (image[0] / 255).clamp(0, 1)


def upsample(values, stride):
    """Spread patch values (h,w,K) bilinearly over the resized image that the patches were cut from: (s,t,K)."""
    maps = F.interpolate(values.permute(2, 0, 1)[None], scale_factor=stride, mode="bilinear")  # around patch centres
    return F.pad(maps, [(PATCH - stride) // 2] * 4, mode="replicate")[0].permute(1, 2, 0)


# Features: the keys of DINO's last block -----------------------------------------------------------------------


class Block(nn.Module):
    """A transformer block with multi-head self-attention, its parameters named as DINO names them."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)})
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, 4 * dim), "fc2": nn.Linear(4 * dim, dim)})

    def qkv(self, x):
        """Queries, keys and values of T tokens, before the split into heads: (B,T,C) -> (B,T,3C)."""
        return self.attn["qkv"](self.norm1(x))

    def forward(self, x):  # (B,T,C)
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B,H,T,C/H)
        attended = F.scaled_dot_product_attention(q, k, v)  # (B,H,T,C/H), with no T x T matrix in memory
        x = x + self.attn["proj"](attended.transpose(1, 2).flatten(2))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class VisionTransformer(nn.Module):
    """DINO's ViT-S/8 (Caron et al. 2021), parameters named and shaped as in the published file."""

    def __init__(self, dim=384, depth=12, heads=6, grid=28):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid * grid, dim))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, PATCH, PATCH)})
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)  # not needed for keys, but part of the published file

    def keys(self, images, stride=PATCH):
        """Keys of the last block (section II), before the split into heads: (B,N,C), row-major over the patch grid.

        images: (B,3,H,W), normalised as for ImageNet, sides multiples of the patch. stride: px between patches.
        Raises ValueError for other sides.
        """
        proj = self.patch_embed["proj"]
        if images.shape[2] % PATCH or images.shape[3] % PATCH:
            raise ValueError(f"image sides {tuple(images.shape[2:])} must be multiples of the patch, {PATCH}")
        x = F.conv2d(images, proj.weight, proj.bias, stride=stride)  # (B,C,h,w)
        side = math.isqrt(self.pos_embed.shape[1] - 1)
        position = self.pos_embed[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)  # (1,C,28,28)
        position = F.interpolate(position.cpu(), size=x.shape[2:], mode="bicubic", align_corners=False)  # MPS has none
        x = (x + position.to(x.device)).flatten(2).transpose(1, 2)  # (B,N,C)
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        x = torch.cat([cls, x], dim=1)  # (B,1+N,C)
        for block in self.blocks[:-1]:
            x = block(x)
        _, keys, _ = self.blocks[-1].qkv(x).chunk(3, dim=2)  # the last block's keys
        return keys[:, 1:]  # (B,N,C), without the class token


# Graph, eq. (1) ------------------------------------------------------------------------------------------------


def build_graph(features, tau, weights=None):
    """Adjacency A (N,N) of the thresholded cosine similarities of features (N,C); symmetric, 0 or above tau, A_ii = 1.

    weights (N,), optional: how much each node matters; A_ij is then multiplied by w_i w_j, and may be below tau. A node
    of weight 0 has no edges.
    """
    f = F.normalize(features, dim=1)
    adjacency = F.threshold_(f @ f.T, tau, 0.0)  # eq. (1): f f^T * (f f^T > tau)
    return adjacency if weights is None else adjacency.mul_(weights).mul_(weights[:, None])


# Graph attention, eqs. (2) to (4) ------------------------------------------------------------------------------

SLOPE = 0.2  # of LeakyReLU: Velickovic et al. 2018


def attention(h, score_src, score_dst, adjacency):
    """What the nodes gather, for every head: eqs. (2) and (3), as the paper writes them, less the activation.

    h: the paper's W h, (H,N,D). score_src, score_dst (H,N): the two halves of a^T [W h_i || W h_j], which is
    score_src_i + score_dst_j. adjacency (N,N): positive entries are the edges; their weights play no part.
    Returns (H,N,D); 0 for a node without neighbours.
    """
    edges = adjacency > 0
    e = F.leaky_relu(score_src[:, :, None] + score_dst[:, None], SLOPE)  # (H,N,N)
    alpha = e.masked_fill(~edges, torch.finfo(e.dtype).min).softmax(dim=2)  # eq. (2)
    return alpha @ h * edges.any(1)[:, None]  # the sum of eq. (3)


class BlockwiseAttention(torch.autograd.Function):
    """The same as `attention`, in less memory and time.

    Rows of a softmax are independent, so blocks of rows that stay in the processor's cache are computed and dropped,
    and computed again for the gradients from the logarithm of each row's denominator: nothing N x N is kept but the
    graph (the idea of FlashAttention, Dao et al. 2022).
    """

    @staticmethod
    def blocks(score_src, score_dst, adjacency):
        """Slices of rows, each with its e_ij of eq. (2), a large negative number where there is no edge: (H,rows,N)."""
        rows = 64 if adjacency.device.type == "cpu" else 2048
        for start in range(0, len(adjacency), rows):
            block = slice(start, start + rows)
            e = F.leaky_relu_(score_src[:, block, None] + score_dst[:, None], SLOPE)
            yield block, e.masked_fill_(adjacency[block] <= 0, -1e30)

    @staticmethod
    def forward(ctx, h, score_src, score_dst, adjacency):  # (H,N,D), (H,N), (H,N), (N,N) -> (H,N,D)
        out, log_total = torch.empty_like(h), torch.empty_like(score_src)
        for block, e in BlockwiseAttention.blocks(score_src, score_dst, adjacency):
            largest = e.amax(2, keepdim=True)
            weight = exp_or_zero(e.sub_(largest))
            total = weight.sum(2, keepdim=True)  # the denominator of eq. (2), over exp(largest)
            connected = largest > -1e30  # a node without neighbours gathers nothing
            out[:, block] = weight @ h / total * connected
            log_total[:, block] = torch.where(connected, largest + total.log(), math.inf)[..., 0]
        ctx.save_for_backward(h, score_src, score_dst, adjacency, out, log_total)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # (H,N,D)
        h, score_src, score_dst, adjacency, out, log_total = ctx.saved_tensors
        # dL/de_ij = alpha_ij (grad_i . h_j - grad_i . out_i), in one product: a column more on either side carries
        # the second term.
        grad_aug = torch.cat([grad, -(grad * out).sum(2, keepdim=True)], dim=2)  # (H,N,D+1)
        h_aug = torch.cat([h, torch.ones_like(h[..., :1])], dim=2).mT.contiguous()  # (H,D+1,N)
        dh, d_src, d_dst = torch.zeros_like(h), torch.empty_like(score_src), torch.zeros_like(score_dst)
        for block, e in BlockwiseAttention.blocks(score_src, score_dst, adjacency):
            alpha = exp_or_zero(e - log_total[:, block, None])  # eq. (2)
            dh.baddbmm_(alpha.mT, grad[:, block])
            de = (grad_aug[:, block] @ h_aug).mul_(alpha)
            de = torch.ops.aten.leaky_relu_backward(de, e, SLOPE, True)  # True: e is the function's value
            d_src[:, block] = de.sum(2)
            d_dst += de.sum(1)
        return dh, d_src, d_dst, None


def exp_or_zero(x):
    """exp(x) in place, and 0 below e^-60, where products would be denormal numbers, on which a CPU is slow."""
    return F.threshold_(x, -60.0, -math.inf).exp_()


class GraphAttention(nn.Module):
    """One multi-head graph attention layer, heads concatenated: eqs. (2) to (4), less the activation.

    The paper's vector a of eq. (2) is [a_src || a_dst]: a_src scores the node that attends, a_dst its neighbour.
    residual: add the node's own W x, ours. The softmax knows of an edge only whether it is there, so where nearly all
    are, all nodes gather the same, and nothing would be left that tells them apart.
    """

    def __init__(self, in_features, out_features, heads, residual=True):
        super().__init__()
        self.heads, self.residual = heads, residual
        self.W = nn.Linear(in_features, out_features, bias=False)  # the heads' W^z of eq. (4), one below the other
        self.a_src = nn.Parameter(torch.empty(heads, out_features // heads))
        self.a_dst = nn.Parameter(torch.empty(heads, out_features // heads))
        for parameter in self.parameters():
            nn.init.xavier_uniform_(parameter)  # Velickovic et al. 2018

    def forward(self, x, adjacency):
        """x (N,in), adjacency (N,N) whose positive entries are the edges -> (N,out)."""
        h = self.W(x).unflatten(1, (self.heads, -1)).transpose(0, 1).contiguous()  # (H,N,out/H)
        s = torch.einsum("hnd,hd->hn", h, self.a_src)  # s_i + t_j is a^T [W x_i || W x_j] of eq. (2): (H,N) each
        t = torch.einsum("hnd,hd->hn", h, self.a_dst)
        gathered = BlockwiseAttention.apply(h, s, t, adjacency)  # the sum of eq. (3): (H,N,out/H)
        if self.residual:
            gathered = gathered + h
        return gathered.transpose(0, 1).flatten(1)  # eq. (4): (N,out)


# Network, eq. (5) ----------------------------------------------------------------------------------------------


class UnSegMedGAT(nn.Module):
    """R parallel series of graph attention layers, summed after a linear layer each, to K soft clusters: eq. (5)."""

    def __init__(self, in_features, config=Config()):
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]()
        self.series = nn.ModuleList(
            nn.ModuleList(
                GraphAttention(in_features if layer == 0 else width, width, config.heads, config.residual)
                for layer in range(config.layers)
            )
            for width in config.widths
        )
        self.first = nn.ModuleList(nn.Linear(width, config.projection) for width in config.widths)
        self.second = nn.Linear(config.projection, config.clusters)

    def forward(self, features, adjacency):
        """features X (N,C), adjacency (N,N) -> assignment (N,K), rows summing to 1.

        For the paper's normalised adjacency this gives the same: of an edge the layers only see that it is there.
        """
        total = 0
        for layers, first in zip(self.series, self.first):
            x = features
            for layer in layers:
                x = self.activation(layer(x, adjacency))  # eq. (3): (N,m_r)
            total = total + first(x)  # H^(r) of eq. (5): (N,M)
        return self.second(total).softmax(dim=1)  # C of eq. (5): (N,K)


LENGTH = 4  # root mean square of the rows' lengths of X


def standardise(features, adjacency):
    """The node features X (N,C) from f (N,C): less their mean, which tells no nodes apart, with rows of length about 4.

    The paper leaves the scale open. A common part longer than the differences, as DINO's keys have one, saturates the
    softmax of eq. (5) within a few steps. Nodes count by their degree, as in the null model of eq. (6).
    """
    share = F.normalize(adjacency.sum(1), p=1, dim=0)  # (N,)
    x = features - share @ features
    return x * (LENGTH / (share @ x.square().sum(1)).sqrt().clamp(min=1e-12))


# Loss, eqs. (6) to (8), and the fit ----------------------------------------------------------------------------


def modularity_loss(assignment, adjacency, resolution=1.0, balance=1.0):
    """L = -Q_g + b (sqrt(K)/n |sum_i C_i| - 1), eq. (8) at g = b = 1; a scalar.

    assignment C (N,K), adjacency A (N,N) symmetric. The modularity of eq. (6), here as eq. (7) with B = A - g d d^T/2m
    never formed: Q_g = Tr(C^T A C)/2m - g |C^T d|^2/(2m)^2; 2m = sum(A), the paper's 2|E| of a weighted graph; d the
    degrees; g the resolution of Reichardt and Bornholdt 2006.
    """
    n, k = assignment.shape
    degree = adjacency.sum(1)  # d: (N,)
    two_m = degree.sum().clamp(min=torch.finfo(degree.dtype).tiny)  # 0 only for a graph without edges
    within = (assignment * (adjacency @ assignment)).sum() / two_m  # Tr(C^T A C) / 2m
    expected = ((degree @ assignment) / two_m).square().sum()  # |C^T d|^2 / (2m)^2
    collapse = math.sqrt(k) / n * assignment.sum(0).norm() - 1
    return -(within - resolution * expected) + balance * collapse  # eqs. (7), (8)


LOCK = threading.Lock()  # for torch's random state, which all threads share, and for recording


def new_network(in_features, config, device):
    """The seeded network and its optimiser."""
    with LOCK, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        network = UnSegMedGAT(in_features, config).to(device)
    how = {"lr": config.lr, "weight_decay": config.weight_decay, "fused": True, "capturable": device.type == "cuda"}
    return network, torch.optim.AdamW(network.parameters(), **how)


def step(network, optimizer, features, adjacency, config):
    """One step of the optimiser on X (N,C) and its graph; returns the loss before it, a scalar tensor."""
    loss = modularity_loss(network(features, adjacency), adjacency, config.resolution, config.balance)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.detach()


@functools.cache
def recorder(device):
    """The stream on which steps are recorded, one a device: torch keeps a workspace for each."""
    return torch.cuda.Stream(device)


def replayed(function, device):
    """On CUDA, a function that does the same from a recording, as launching a step's 340 kernels outlasts running them.

    Call it after a few plain calls, which set up what may not be recorded. Recording takes no step.
    """
    if device.type != "cuda":
        return function
    graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device)  # a thread begins on the first GPU
    record = torch.cuda.graph(graph, stream=recorder(device), capture_error_mode="thread_local")
    with LOCK, torch.cuda.stream(here), record:
        result = function()  # the same tensor each time
    return lambda: (graph.replay(), result)[1]


COMMUNITIES = 1e-4  # modularity below which there are none: the built-in colours then differ by 5 grey levels or less


@torch.inference_mode(False)
@torch.enable_grad()
def fit(features, adjacency, config=Config(), shared=None):
    """Optimise the network for one image alone.

    features f (N,C), adjacency (N,N). shared: parameters from `fit_collective` to start from; the config.collective
    passes they have had are then taken off the epochs.
    Returns the assignment (N,K), the loss before every step taken, and the modularity of the likeliest clusters.
    Where that is below COMMUNITIES, the assignment is the uniform one.
    """
    x = standardise(features, adjacency)
    network, optimizer = new_network(x.shape[1], config, x.device)
    epochs = config.epochs
    if shared is not None:
        network.load_state_dict(shared)
        epochs -= config.collective
    losses, uniform = [], (config.resolution - 1) / config.clusters  # the loss of the uniform assignment
    take = functools.partial(step, network, optimizer, x, adjacency, config)
    for epoch in range(epochs):
        if epoch == 3:
            take = replayed(take, x.device)
        losses.append(take().item())
        gain = uniform - losses[-1]
        begun = len(losses) > 3 and gain > COMMUNITIES  # around the uniform assignment the loss is level
        if config.settled and begun and losses[-4] - losses[-1] < config.settled * gain:
            break
    with torch.no_grad():
        assignment = network(x, adjacency)
    labels = F.one_hot(assignment.argmax(1), config.clusters).to(assignment)
    modularity = -modularity_loss(labels, adjacency, balance=0).item()  # Q, eq. (6)
    if modularity < COMMUNITIES:  # there are none, and of the uniform assignment no mask is made
        assignment = torch.full_like(assignment, 1 / config.clusters)
    return assignment, losses, modularity


@torch.inference_mode(False)
@torch.enable_grad()
def fit_collective(images, config=Config(), device="cpu", quiet=True):
    """The first phase of UnSegMedGATc: config.collective passes, one step an image, with shared parameters.

    images: a list of pairs, f (N,C) and the weights (N,) of the nodes; N may differ. quiet: show no bar.
    Each graph is built anew when its turn comes, so that only one is in memory.
    Returns the state_dict that `fit` takes as `shared`, on the CPU; None where there is no image.
    """
    if not images:
        return None
    network, optimizer = new_network(images[0][0].shape[1], config, torch.device(device))
    with torch.hub.tqdm(total=config.collective * len(images), desc="shared", disable=quiet) as bar:
        for features, weights in images * config.collective:
            features = features.to(device)
            adjacency = build_graph(features, config.tau, weights.to(device))
            step(network, optimizer, standardise(features, adjacency), adjacency, config)
            bar.update(1)
    return {name: tensor.cpu() for name, tensor in network.state_dict().items()}


# The caller's torch -------------------------------------------------------------------------------------------

DTYPE_LOCK, dtype_users, dtype_before = threading.Lock(), 0, None


@contextlib.contextmanager
def usual_torch():
    """torch as this file needs it, whatever its caller has set: gradients, float32, no autocast, tensors on the CPU.

    The default type is the process's, so threads that run at once share its change: the last one sets it back.
    """
    global dtype_users, dtype_before
    with DTYPE_LOCK:
        if not dtype_users:
            dtype_before = torch.get_default_dtype()
            torch.set_default_dtype(torch.float32)
        dtype_users += 1
    try:
        with contextlib.ExitStack() as stack:
            for setting in (torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"),
                            torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False)):  # fmt: skip
                stack.enter_context(setting)
            yield
    finally:
        with DTYPE_LOCK:
            dtype_users -= 1
            if not dtype_users:
                torch.set_default_dtype(dtype_before)


# Ours, not the paper's: what is looked at ------------------------------------------------------------------------


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


def field_of_view(image):
    """The 8 px cells (s/8,t/8) of an image (3,s,t) that can be object, 0 or 1.

    Left out are the dark frame of an endoscope or dermatoscope; what has another hue, touches the border, stays near it
    and is not large: stickers, rulers; and violet ink, anywhere, since tissue that is redder than its surround is
    yellower too: melanin and blood both absorb blue.
    """
    bright = F.avg_pool2d(image.amax(0)[None], PATCH)[0].numpy()
    h, w = bright.shape
    radius = torch.maximum(middle(h)[:, None].abs(), middle(w).abs()).numpy()

    def touching(cells, depth, most):  # the pieces that touch the border, near it and not too large
        pieces, _ = ndimage.label(cells)
        border = set(np.concatenate([pieces[0], pieces[-1], pieces[:, 0], pieces[:, -1]])) - {0}
        small = [n for n in border if radius[pieces == n].mean() > depth and (pieces == n).mean() < most]
        return np.isin(pieces, small)

    dark = touching(bright < 0.275 * max(np.quantile(bright, 0.9), 0.3), 0, 0.5)
    a, b = F.avg_pool2d(rgb_to_lab(image)[1:], PATCH // 2).numpy()  # pen strokes are thinner than a cell
    light = np.kron(~dark, np.ones((2, 2), bool))
    a, b = a - np.median(a[light]), b - np.median(b[light])
    coloured, ink = (x.reshape(h, 2, w, 2).any((1, 3)) for x in (np.hypot(a, b) > 36, (a > 0) & (a - b > 25)))
    return torch.from_numpy(~(dark | touching(coloured & ~dark, 0.6, 0.35) | ink)).float()


@dataclass(frozen=True)
class View:
    """A photograph, or the surroundings of the user's box in it, resized to patches: all that a backbone sees."""

    image: torch.Tensor  # (3,s,t) in [0,1]
    stride: int  # px between patches
    box: tuple  # (y0, x0, y1, x1) px of the photograph, ends excluded: what the image shows
    valid: torch.Tensor  # (s/8,t/8), the cells of 8 px that can be object, 0 or 1
    area: tuple  # (y0, x0, y1, x1) px of the image, inside which the object is: the user's box, or all of the image
    ellipse: tuple = None  # (y, x, ry, rx) px of the image, centre and half axes of the object, roughly; None: not yet
    prompt: str = ""  # what the ellipse rests on: "box", "point", or "" where it was located

    @property
    def grid(self):
        """The number of its patches: (h,w)."""
        return patch_grid(self.image.shape[1:], self.stride)

    def centres(self):
        """Centres of the patches: (h,1) and (1,w), in px of the image."""
        y, x = (torch.arange(n) * self.stride + PATCH / 2 for n in self.grid)
        return y[:, None], x[None]

    def valid_patches(self):
        """The patches (h,w), 0 or 1, whose centre can be object."""
        y, x = ((centres // PATCH).long().flatten() for centres in self.centres())
        return self.valid[y][:, x]

    def distance_in_radii(self):
        """Distances of the patches from the ellipse's centre in its radii, (h,w): 0 at its centre, 1 on the ellipse."""
        (y, x), (cy, cx, ry, rx) = self.centres(), self.ellipse
        return torch.hypot((y - cy) / ry, (x - cx) / rx)

    def inside_ellipse(self):
        """The patches (h,w), 0 or 1, that are mostly object: those inside the ellipse, at least one."""
        distance = self.distance_in_radii()
        return (distance <= distance.min().clamp(min=1)).float()


# Ours: features without learned weights, and the choice of a backbone ------------------------------------------

FLAT = 50  # grey levels, the length of a constant feature


def colour_features(lab, background):
    """Lab colours of patches (N,3) as features (N,4) of length 1; no learned weights.

    Colours are deviations from the mean over the background, weights (N,). The constant fourth feature keeps patches of
    nearly its colour alike, whatever the noise in them, and lets large deviations saturate: eq. (1) compares directions.
    """
    return F.normalize(F.pad(lab - background @ lab / background.sum(), (0, 1), value=FLAT), dim=1)


def join_features(deep, colour, share):
    """A backbone's features (N,C) beside the colour's (N,4), rows of length 1: (N,C+4).

    Their cosine is (1 - share) cos(deep) + share cos(colour), so eq. (1) thresholds the weighted mean of both.
    deep: None for the colour alone.
    """
    if deep is None or share == 1:
        return colour
    return deep if share == 0 else torch.cat([math.sqrt(1 - share) * deep, math.sqrt(share) * colour], dim=1)


@dataclass(frozen=True)
class Backbone:
    """What turns a View of a photograph into patch features."""

    name: str  # "dino" or "builtin", or whatever it is that you hand to `segment`
    extract: Callable | None  # View -> (N,C), row-major over its grid, of any length; None: colour alone


def pick_device(device):
    """A torch.device; "auto" is the current CUDA device, else the CPU. Raises ValueError for one that is not there."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(str(device).partition(":")[0], False):
        raise ValueError(f"device {device} is not available on this machine: use --device auto or cpu")
    return torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else torch.device(device)


DINO_URL = "https://dl.fbaipublicfiles.com/dino/dino_deitsmall8_pretrain/dino_deitsmall8_pretrain.pth"
DINO_SHA256 = "55c8b267f479b614ec20858947ce361ba804846c193e20be74263a096bb6d75e"
PATIENCE = 10  # s without an answer before a download is given up


def cached_dino():
    """Where torch.hub keeps DINO's backbone file; it need not exist."""
    return Path(torch.hub.get_dir()) / "checkpoints" / DINO_URL.rsplit("/", 1)[1]


def download_dino(progress=True):
    """Download DINO's backbone file to torch.hub's cache, and check its SHA-256.

    Raises OSError when the download fails, has another digest, or the host is silent for 10 s.
    """
    path = cached_dino()
    path.parent.mkdir(parents=True, exist_ok=True)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)  # torch.hub sets none
    try:
        torch.hub.download_url_to_file(DINO_URL, str(path), hash_prefix=DINO_SHA256, progress=progress)
    except Exception as error:  # of many kinds: no connection, a proxy's nonsense, another digest
        raise OSError(f"the download from {DINO_URL.split('/')[2]} failed ({reason(error)})") from None
    finally:
        socket.setdefaulttimeout(before)


def read_dino(path, branch):
    """ViT-S/8 with the weights of a file, see `load_dino`. Raises ValueError, which names the file and the remedy."""
    model = VisionTransformer()
    try:
        if zipfile.is_zipfile(path):  # what torch.save writes: it has a CRC of each tensor, which torch does not check
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise ValueError(f"{damaged} is damaged")
        # The full checkpoint also holds its command line, an argparse.Namespace; nothing else is let in
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch thinks of a stranger's pickle: the error below says it
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds; torch's advice in them, to load without care, is not passed on
        why = error.strerror if isinstance(error, OSError) and error.strerror else "it is damaged, or no checkpoint of tensors"
        raise ValueError(f"{path}: cannot be loaded safely: {why}; fetch the file anew") from None
    try:
        if branch in state:  # the full checkpoint, whose branches also have a head
            names = [name for name in state[branch] if "backbone." in name]
            state = {name.rpartition("backbone.")[2]: state[branch][name] for name in names}
        elif branch == "student":
            raise ValueError("there is no student in it; only the full checkpoint holds both branches")
        model.load_state_dict(state)
        for name, tensor in state.items():
            if not tensor.isfinite().all():
                raise ValueError(f"{name} has values that are not finite numbers; fetch the file anew")
    except Exception as error:  # of many kinds: no dictionary, another network
        why = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: is not DINO's ViT-S/8: {why}") from None
    return model.eval().requires_grad_(False)


@usual_torch()
def load_dino(weights=None, branch="teacher", progress=True):
    """ViT-S/8 with DINO's weights, in evaluation mode, without gradients.

    weights: a file (the published backbone, timm's copy of it, or the full checkpoint); None: the backbone from
    torch.hub's cache, downloaded where it is not there or cannot be read.
    branch: of a full checkpoint, "teacher" (which the backbone-only file holds) or "student" (the authors' choice).
    Raises ValueError for a file that is not exactly these weights or cannot be read, OSError where they cannot be
    fetched.
    """
    if branch not in ("teacher", "student"):
        raise ValueError(f"branch must be teacher or student, got {branch!r}")
    if weights:
        return read_dino(Path(weights), branch)
    path, damaged = cached_dino(), ""
    if path.is_file():
        try:
            return read_dino(path, branch)
        except ValueError as error:
            if branch == "student":  # which this file does not hold
                raise
            damaged = f"; {error}"
    try:
        download_dino(progress)
    except OSError as error:
        raise OSError(f"{error}{damaged}") from None
    return read_dino(path, branch)


def load_backbone_file(path):
    """The Backbone that a Python file defines by a function extract: View -> features (N,C), row-major over its grid.

    Raises ValueError, which names the file, where it cannot be run or has no such function.
    """
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except FileNotFoundError as error:
        if error.filename != str(path):  # a file that it wants itself
            raise ValueError(f"backbone {path}: {reason(error)}") from error
        raise ValueError(f"backbone {path}: there is no such file") from None
    except Exception as error:  # whatever is wrong in it
        raise ValueError(f"backbone {path}: {type(error).__name__}: {reason(error)}") from error
    if not callable(getattr(module, "extract", None)):
        raise ValueError(f"backbone {path}: it must define a function extract(view) that returns features (N,C)")
    return Backbone(str(path), module.extract)


@functools.lru_cache(maxsize=1)
def load_backbone(backbone="auto", weights=None, branch="teacher", device="auto", progress=True):
    """The Backbone by name: "dino", "builtin" (colour alone), "auto", which is DINO where its weights can be had, or a
    Python file, see `load_backbone_file`.

    Falls back only for "auto" without `weights`, and says so. The last answer is kept and given again. Raises as
    load_dino and load_backbone_file, and ValueError for other names.
    """
    named = backbone in ("auto", "dino", "builtin")
    if not named and Path(backbone).suffix != ".py":
        raise ValueError(f"backbone must be auto, dino, builtin or a Python file FILE.py, got {backbone}")
    if weights and backbone not in ("auto", "dino"):
        raise ValueError(f"weights are for the dino backbone: leave them out with {backbone}")
    if not named:
        return load_backbone_file(Path(backbone))
    colours = Backbone("builtin", None)
    if backbone == "builtin":
        return colours
    device = pick_device(device)
    try:
        model = load_dino(weights, branch, progress)
    except OSError as error:
        if backbone == "dino":  # with weights given it is a ValueError
            raise
        log.warning(
            "DINO's weights could not be had: %s. Using the built-in colour descriptors instead; "
            "for DINO, download %s elsewhere and give it as --weights FILE.", error, DINO_URL,
        )  # fmt: skip
        return colours
    model.to(device)

    def extract(view):
        mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]  # ImageNet's
        return model.keys(((view.image - mean) / std)[None].to(device), view.stride)[0]

    return Backbone("dino", extract)


# Ours: where the object is, roughly ----------------------------------------------------------------------------

RADII = np.geomspace(0.07, 0.65, 16)  # of the discs that are tried, of the shorter side of the area that is searched
POWER, CLICK_POWER = 0.6, 0.2  # of the radius in a disc's score: larger discs are preferred, less so where one clicked
NEAR = 0.35  # radii, how far the point may be from the middle of its disc
TIGHT, DISTINCT = 0.2, 1.0  # see `fills_box`


def principal(features, components):
    """Features (N,C), centred, on their first principal components: (N,components), or (N,C) where C is less."""
    centred = features - features.mean(0)
    _, axes = torch.linalg.eigh(centred.T @ centred)  # ascending
    return centred @ axes.flip(1)[:, :components]


def position_in(area, h, w):
    """Where the cells (h,w) lie in an area (y0, x0, y1, x1), in cells: (h,1) and (1,w), -1 and 1 on its sides."""
    y0, x0, y1, x1 = area
    y, x = torch.arange(h) + 0.5, torch.arange(w) + 0.5
    return (2 * (y - y0) / (y1 - y0) - 1)[:, None], (2 * (x - x0) / (x1 - x0) - 1)[None]


def remove_trend(features, weight, h, w):
    """Features (N,C) of a grid (h,w) less their quadratic trend over the grid, fitted by least squares; weight (N,).

    Learned features change with the distance from the middle and the sides of any image: zero padding, position
    embeddings. That is no object.
    """
    y, x = (side.expand(h, w).flatten() for side in position_in((0, 0, h, w), h, w))
    terms = torch.stack([torch.ones_like(x), x, y, x * x, x * y, y * y], dim=1)  # (N,6)
    weighted = (terms * weight[:, None]).T
    ridge = 1e-3 * weight.sum() * torch.eye(6)
    return features - terms @ torch.linalg.solve(weighted @ terms + ridge, weighted @ features)


def contrast_maps(deep, colour, share, background, h, w):
    """What is searched for the object: one or two maps (12 or less,h,w), centred, their mean squares as in the graph.

    deep: the backbone's features (N,C), here less their trend, of mean square 1 - share; or None. colour: (N,4), of mean
    square share; or None. background: weights (N,) for the trend.
    """
    maps = [] if deep is None else [(remove_trend(deep, background, h, w), 1 - share)]
    maps += [] if colour is None else [(colour, share)]

    def scaled(values, square):  # on the first components, which keep the distances, nearly
        return principal(values, 12) * (square / values.var(0, correction=0).sum().clamp(min=1e-24)).sqrt()

    return [scaled(values, square if len(maps) > 1 else 1).T.unflatten(1, (h, w)) for values, square in maps]


def disc_contrasts(maps, valid, border, radii):
    """How much the mean over each disc differs from that over the ring around it, and from the border's: (R,h,w) each.

    maps (C,h,w); valid (h,w), 0 or 1; border (h,w), weights; radii: R, in cells. A disc or ring that is not all valid
    counts less.
    """
    h, w = valid.shape
    common = (maps * border).sum((1, 2)) / border.sum().clamp(min=1e-6)
    pad = 2 * h, 2 * w  # room for the convolutions below, which wrap around
    layers = torch.fft.rfft2(torch.cat([maps, torch.ones(1, h, w)]) * valid, s=pad)[:, None]  # C+1: the last counts
    distance = torch.hypot(*torch.meshgrid(*(torch.fft.fftfreq(n, 1 / n) for n in pad), indexing="ij"))
    from_ring, from_border = [], []
    for radius in radii:
        disc = (distance <= radius).float()  # around (0,0)
        ring = (distance <= 1.4 * radius + 0.7).float() - disc
        sums = torch.fft.irfft2(layers * torch.fft.rfft2(torch.stack([disc, ring])), s=pad)[..., :h, :w]  # (C+1,2,h,w)
        count = sums[-1].round()
        means = sums[:-1] / count.clamp(min=1)
        shares = count / torch.stack([disc.sum(), ring.sum()]).clamp(min=1)[:, None, None]  # no ring in a tiny grid
        from_ring.append((means[:, 0] - means[:, 1]).norm(dim=0) * shares[0] * shares[1].sqrt())
        from_border.append((means[:, 0] - common[:, None, None]).norm(dim=0))
    return torch.stack(from_ring), torch.stack(from_border)


def locate(maps, valid, area, point=None):
    """The disc (row, column, radius), in cells, whose features stand out: centre-surround contrast.

    maps: one or two maps (C,h,w); valid (h,w), 0 or 1; area (y0, x0, y1, x1), in cells, is searched. Two steps: the
    most salient point, the centre of the disc that differs most from the ring around it and from the area's border
    alike (Itti, Koch and Niebur 1998; Achanta et al. 2009), and on both maps, as each alone has other things that stand
    out; then the size of the object there, that of the disc near the point which differs most from its ring.
    point (row, column): the user's, in place of the first step.
    """
    h, w = valid.shape
    y, x = position_in(area, h, w)
    border = (0.05 + y**2 + x**2).clamp(max=1) * valid  # how likely each cell is background
    inland = ((1 - y**4).clamp(min=0) * (1 - x**4).clamp(min=0)) ** 2  # what touches the border is seldom the object
    radii = torch.from_numpy(RADII).float() * min(area[2] - area[0], area[3] - area[1])
    contrasts = [disc_contrasts(values, valid, border, radii) for values in maps]
    radii = radii[:, None, None]

    def best(score):  # of all radii: (R,h,w)
        number, row, column = np.unravel_index(int(score.argmax()), score.shape)
        return int(row), int(column), float(radii[number])

    power = POWER if point is None else CLICK_POWER
    if point is None:
        salience = math.prod(from_ring * from_border.sqrt() for from_ring, from_border in contrasts)
        point = best(salience ** (1 / len(maps)) * radii**power * inland)[:2]
    away = torch.hypot(torch.arange(float(h))[:, None] - point[0], torch.arange(float(w)) - point[1])
    from_ring = sum(from_ring.square() for from_ring, _ in contrasts).sqrt()  # of both maps as one
    return best(from_ring * radii**power * torch.exp(-((away / radii / NEAR) ** 2) / 2))


def fills_box(maps, valid, area):
    """Whether the object fills an area (y0, x0, y1, x1), in cells, or is somewhere in it; arguments as in `locate`.

    It does not where, on every map, the rim of the inscribed ellipse is like what lies outside the area, and not like
    the middle: less than TIGHT of the way. Where middle and outside are alike, DISTINCT spreads or less apart, a map
    cannot tell, and the user's word counts.
    """
    y, x = position_in(area, *valid.shape)
    distance, seen = torch.hypot(y, x), valid > 0
    middle, rim = seen & (distance <= 0.5), seen & (distance > 0.7) & (distance <= 1)
    outside = seen & ((y.abs() > 1) | (x.abs() > 1))
    if not (middle.any() and rim.any()):
        return True
    if not outside.any():  # then the area is all there is
        return False
    for values in maps:
        inner, edge, outer = (values[:, cells].mean(1) for cells in (middle, rim, outside))
        axis = F.normalize(inner - outer, dim=0)
        spread = torch.stack([(axis @ values[:, cells]).var(correction=0) for cells in (middle, outside)]).mean().sqrt()
        step = axis @ (inner - outer)
        if step <= DISTINCT * spread or axis @ (edge - outer) > TIGHT * step:
            return True
    return False


def node_weights(view, prior):
    """How much each patch in the field of view matters (N,): ever less from `prior` radii of the place on; 0: alike."""
    fade = torch.exp(-((view.distance_in_radii() / prior) ** 4) / 2) if prior else torch.ones(view.grid)
    return (fade * view.valid_patches()).flatten()


RING = 20  # px around the user's box that are looked at as known background, at least; the margin of the authors' code


def check_prompt(box, point, height, width):
    """A box and a point as tuples of numbers, or None. Raises ValueError where they are not inside the image, or both."""
    if box is not None and point is not None:
        raise ValueError("a box tells the place already: leave the point out")

    def numbers(prompt, count, form):
        with contextlib.suppress(TypeError, ValueError):  # what is no array: ragged lists
            values = np.asarray(prompt)
            if values.shape == (count,) and values.dtype.kind in "iuf":
                x, y = values[0::2].tolist(), values[1::2].tolist()
                if 0 <= x[0] < width and 0 <= y[0] < height and (
                    count == 2 or x[0] < x[1] <= width and y[0] < y[1] <= height
                ):
                    return tuple(values.tolist())
        given = " ".join(str(prompt).split())[:100]
        raise ValueError(f"the {form} inside the image, {width} x {height}; got {given}")

    return (None if box is None else numbers(box, 4, "box must be four numbers x0 < x1, y0 < y1"),
            None if point is None else numbers(point, 2, "point must be two numbers"))  # fmt: skip


def view_photograph(rgb, config, box=None):
    """The View of a photograph (H,W,3) uint8, or of the surroundings of a box (x0, y0, x1, y1) in it."""
    height, width = rgb.shape[:2]
    image = resize_image(rgb, config.size)
    valid, seen, area = field_of_view(image), (0, 0, height, width), None
    if box:
        x0, y0, x1, y1 = box
        half = (y1 - y0) / 2, (x1 - x0) / 2
        reach = [max(side + RING, 1.6 * side, max(half) / 2) for side in half]  # a strip has many patches
        (cy, cx), (dy, dx) = ((y0 + y1) / 2, (x0 + x1) / 2), reach
        seen = max(0, round(cy - dy)), max(0, round(cx - dx)), min(height, round(cy + dy)), min(width, round(cx + dx))
        image = resize_image(rgb[seen[0] : seen[2], seen[1] : seen[3]], config.size, config.stride)
        rows, columns = (np.linspace(start, stop, 2 * n + 1)[1::2] for start, stop, n in  # the centres of its cells
                         zip(seen[:2], seen[2:], (side // PATCH for side in image.shape[1:])))  # fmt: skip
        valid = valid[(rows * valid.shape[0] / height).astype(int)]
        valid = valid[:, (columns * valid.shape[1] / width).astype(int)]
        dy, dx = image.shape[1] / (seen[2] - seen[0]), image.shape[2] / (seen[3] - seen[1])
        area = (y0 - seen[0]) * dy, (x0 - seen[1]) * dx, (y1 - seen[0]) * dy, (x1 - seen[1]) * dx
    return View(image, config.stride, seen, valid, area or (0, 0, *image.shape[1:]))


def extract_features(backbone, view, device):
    """A backbone's features (N,C) of a View, rows of length 1; None for the colour alone.

    Raises ValueError, which names the backbone, where it fails or what it returns is not as said.
    """
    if backbone.extract is None:
        return None
    n = math.prod(view.grid)
    try:
        with torch.no_grad():
            features = backbone.extract(view)
    except Exception as error:
        raise ValueError(f"backbone {backbone.name}: extract failed: {type(error).__name__}: {reason(error)}") from error
    if not isinstance(features, torch.Tensor):
        raise ValueError(f"backbone {backbone.name}: extract must return a torch tensor, got {type(features).__name__}")
    if features.ndim != 2 or len(features) != n or not features.shape[1]:
        want = f"({n},C) for {view.grid[0]} x {view.grid[1]} patches"
        raise ValueError(f"backbone {backbone.name}: extract must return features {want}, got {tuple(features.shape)}")
    features = features.detach().to(device, torch.float32)
    if not features.isfinite().all():
        raise ValueError(f"backbone {backbone.name}: extract returned values that are not finite numbers")
    return F.normalize(features, dim=1)


@usual_torch()
def extract_nodes(rgb, config, backbone, device="cpu", box=None, point=None):
    """The View of the object in a photograph (H,W,3) uint8, its features f (N,C) normalised, its nodes' weights (N,).

    box: (x0, y0, x1, y1) px, ends excluded: the object is inside this rectangle, given by the user; what lies outside it
    is background. point: (x, y) px, near the middle of the object. Without either it is looked for in all the image.
    Raises ValueError for a box or point not in the image, or both, and for a backbone that fails.
    """
    box, point = check_prompt(box, point, *rgb.shape[:2])
    view = view_photograph(rgb, config, box)
    deep = None if config.colour == 1 else extract_features(backbone, view, device)
    lab = F.avg_pool2d(rgb_to_lab(view.image), PATCH, view.stride).flatten(1).T  # (N,3)

    def cells(values):  # of the patches that do not overlap, one a cell
        return values.unflatten(0, view.grid)[:: PATCH // view.stride, :: PATCH // view.stride].flatten(0, 1)

    (h, w), area = view.valid.shape, [side / PATCH for side in view.area]
    y, x = position_in(area, h, w)
    background = ((0.05 + y**2 + x**2).clamp(max=1) * view.valid + 1e-3).flatten()
    colour = None if deep is not None and config.colour == 0 else colour_features(cells(lab), background)
    maps = contrast_maps(None if deep is None else cells(deep).cpu(), colour, config.colour, background, h, w)
    if box and fills_box(maps, view.valid, area):
        y0, x0, y1, x1 = view.area
        ellipse, prompt = ((y0 + y1) / 2, (x0 + x1) / 2, (y1 - y0) / 2, (x1 - x0) / 2), "box"
    else:
        if point:
            y, x = ((at + 0.5) * n / side - 0.5 for at, n, side in zip(point[::-1], (h, w), rgb.shape))
        row, column, radius = locate(maps, view.valid, area, (y, x) if point else None)
        ellipse, prompt = (PATCH * (row + 0.5), PATCH * (column + 0.5), PATCH * radius, PATCH * radius), ""
    view = dataclasses.replace(view, ellipse=ellipse, prompt="point" if point else prompt)
    outside = (view.distance_in_radii() > 1) * view.valid_patches() + 1e-3
    colour = colour_features(lab, outside.flatten()).to(device)
    return view, join_features(deep, colour, config.colour), node_weights(view, config.prior).to(device)


# From photograph to mask ---------------------------------------------------------------------------------------


def clean_mask(mask, components):
    """Fill the holes of a mask (H,W) bool, then keep its `components` largest connected pieces, or all for 0."""
    mask = ndimage.binary_fill_holes(mask)
    if components:
        pieces, _ = ndimage.label(mask)
        area = np.bincount(pieces.ravel())[1:]  # without the background, which may well be the largest
        mask = np.isin(pieces, 1 + np.argsort(-area, kind="stable")[:components])
    return mask


# What the place says of a patch, (L, r): to its log-odds of being object L is added at the centre of the place, 0 at r
# of its radii, -L from 2 r on. An object fills its box, or nearly; a disc is small for its object, less so
# where one clicked. Tuned.
PLACE = {"box": (8, 1.1), "point": (3, 1.4), "": (2, 1.6)}


def choose(view, assignment, adjacency, config):
    """What is object: the assignment (N,K) with its clusters in order, how many are background, the foreground (N,).

    The clusters are ordered from surest background to surest object. The foreground, in [0,1], is the sum of its
    clusters where config.evidence is 0. Else every patch is looked at again, since a modularity gives patches between
    two clusters to the smaller one, as surely as any: its log-odds are config.evidence times the logarithm of its mean
    similarity to the foreground over that to the background, or 0 where that contradicts its cluster, and what its
    place says. What clusters and features agree on wins; the rest is for the place, and then for the colours.
    """
    core, seen = (nodes.flatten().to(assignment) @ assignment / nodes.sum().clamp(min=1)
                  for nodes in (view.inside_ellipse(), view.valid_patches()))  # (K,), how common each cluster is there  # fmt: skip
    # How much commoner it is in the place than in the window. For K = 2 exactly one is above 0, unless they are
    # alike. The rule is ours, as the paper states none; no ground truth is involved.
    score = core / seen.clamp(min=1e-6) - 1
    background = int((score <= 1e-4).sum())  # rounding aside
    assignment = assignment[:, score.argsort()]
    foreground = assignment[:, background:].sum(1)
    if config.evidence and background < config.clusters:
        weights = adjacency.diagonal().clamp(min=1e-24).sqrt()  # w_i, as A_ii = w_i^2
        sides = torch.stack([foreground, 1 - foreground], dim=1)
        likeness = adjacency @ sides / weights[:, None] / (weights @ sides).clamp(min=1e-6)  # means, (N,2) in [0,1]
        likeness = likeness.clamp(min=0.01).log()  # below is noise
        log_odds = config.evidence * (likeness[:, 0] - likeness[:, 1])
        log_odds = torch.where(log_odds * (foreground - 0.5) > 0, log_odds, 0)
        most, radius = PLACE[view.prompt]
        place = most * (1 - view.distance_in_radii() / radius).clamp(min=-1).flatten()
        foreground = torch.sigmoid(log_odds + place.to(assignment))
    return assignment.cpu(), background, foreground.cpu() * view.valid_patches().flatten()


def finish(view, assignment, adjacency, config, size):
    """The clusters of the patches (N,K) as mask, probability and labels (H,W), and the ordered assignment (h,w,K).

    What `choose` makes of them is upsampled to the View's image, refined there by the bilateral solver, which trusts it
    as far as it is sure, cluster by cluster for K > 2, and smoothed; then upsampled to the photograph, binarised and
    cleaned. size: (H,W) of the photograph. Returns a dictionary of fields of `Segmentation`.
    """
    assignment, background, foreground = choose(view, assignment, adjacency, config)
    maps = torch.cat([foreground[:, None], assignment], dim=1).unflatten(0, view.grid)
    maps = upsample(maps, view.stride).numpy()  # (s,t,1+K)
    refined = 1 if config.clusters == 2 else 1 + config.clusters  # for K = 2 one is enough
    if config.refine:
        guide = (view.image * 255).round().byte().permute(1, 2, 0).numpy()
        # A pixel is trusted by the log-odds of the second look: where that is unsure, the colours decide. Twice, so
        # that odds of 5 to 3 count as much as the 0.999 by which the authors' code trusts every pixel, and its lambda
        # holds; what is out of the field of view is surely background. The clip keeps it finite, at most 32.
        trust = 2 * np.abs(logit(maps[..., 0].clip(1e-7, 1 - 1e-7))) if config.evidence else 0.999
        maps[..., :refined] = bilateral.solve(maps[..., :refined], guide, trust, smoothness=config.smoothness)
    maps[..., :refined] = ndimage.gaussian_filter(maps[..., :refined], (config.contour, config.contour, 0))

    y0, x0, y1, x1 = view.box
    seen = y1 - y0, x1 - x0  # H' and W', of what the View shows
    maps = torch.from_numpy(maps).permute(2, 0, 1)[None]
    maps = F.interpolate(maps, size=seen, mode="bilinear", antialias=True)[0].numpy()  # (1+K,H',W')
    scale = [n / side for n, side in zip(seen + seen, view.image.shape[1:] + view.image.shape[1:])]
    top, left, bottom, right = (round(at * by) for at, by in zip(view.area, scale))  # of the user's box
    soft = np.zeros(seen, np.float32)
    soft[top:bottom, left:right] = maps[0, top:bottom, left:right].clip(0, 1)

    mask, probability, labels = (np.zeros(size, kind) for kind in (bool, np.float32, np.uint8))
    probability[y0:y1, x0:x1] = soft
    mask[y0:y1, x0:x1] = clean_mask(soft > 0.5, config.components)
    # The likeliest cluster, of the foreground ones inside the mask and of the others outside it
    chosen = (np.arange(config.clusters) >= background)[:, None, None] == mask[y0:y1, x0:x1]
    labels[y0:y1, x0:x1] = np.where(chosen, maps[1:], -np.inf).argmax(0)
    if config.invert and background < config.clusters:  # without an object there is nothing to swap
        mask, probability, labels = ~mask, 1 - probability, config.clusters - 1 - labels
        assignment = assignment.flip(1)
    assignment = assignment.unflatten(0, view.grid).numpy()
    return {"mask": mask, "probability": probability, "labels": labels, "assignment": assignment}


@dataclass(frozen=True)
class Segmentation:
    """What `segment` returns; H, W are the image's own size after its EXIF rotation."""

    image: np.ndarray  # (H,W,3) uint8, the photograph
    mask: np.ndarray  # (H,W) bool, the object
    probability: np.ndarray  # (H,W) float32 in [0,1], of foreground, before cleaning
    labels: np.ndarray  # (H,W) uint8, 0 to K - 1, from surest background to surest object, as in `finish`
    assignment: np.ndarray  # (h,w,K) float32, of the patches, soft, ordered as the labels
    view: View  # what was looked at, and the object's ellipse
    features: torch.Tensor  # (N,C) f, rows of length 1
    modularity: float  # of the clusters, Q of eq. (6); near 0 where the graph has no communities
    history: list  # the loss before every step taken
    backbone: str  # its name
    seconds: dict  # wall-clock time of each stage


@usual_torch()
def segment(image, config=Config(), *, box=None, point=None, backbone="auto", weights=None, branch="teacher",
            device="auto", shared=None, progress=False):  # fmt: skip
    """Segment one photograph: the whole method.

    image: a path, a PIL image or a uint8 array (H,W,3) or (H,W). box (x0, y0, x1, y1), point (x, y): px, see
    `extract_nodes`. backbone: "auto", "dino", "builtin", a Python file with a function extract, or a Backbone. weights,
    branch: see `load_dino`. device: "auto", "cpu", "cuda" or "mps". shared: parameters from `fit_collective`, without
    which config.collective does nothing. progress: show the bar of a download.
    Returns a Segmentation. Raises ImageError for an image that cannot be segmented, ValueError and OSError for
    settings, weights, a backbone or a device that cannot be had.
    """
    device = pick_device(device)
    if not isinstance(backbone, Backbone):
        backbone = load_backbone(backbone, weights, branch, device, progress)
    name = image if isinstance(image, (str, Path)) else "the image"
    clock = [time.perf_counter()]
    rgb = load_image(image)
    clock.append(time.perf_counter())
    view, features, weights = extract_nodes(rgb, config, backbone, device, box, point)
    clock.append(time.perf_counter())
    adjacency = build_graph(features, config.tau, weights)
    assignment, history, modularity = fit(features, adjacency, config, shared)
    if modularity < COMMUNITIES:
        log.warning("%s: no communities are found in %d epochs, and so no object", name, len(history))
    clock.append(time.perf_counter())
    masks = finish(view, assignment, adjacency, config, rgb.shape[:2])
    clock.append(time.perf_counter())
    seconds = dict(zip(("read", "features", "fit", "refine"), np.diff(clock).tolist()))
    return Segmentation(image=rgb, **masks, view=view, features=features, modularity=modularity, history=history,
                        backbone=backbone.name, seconds=seconds)  # fmt: skip


# Pictures ------------------------------------------------------------------------------------------------------

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


def tile(text, picture, size):
    """A PIL image resized to (width, height) below its caption."""
    blocks = min(picture.size) < min(size) / 2  # patches are shown as squares
    framed = Image.new("RGB", (size[0], size[1] + 24), "white")
    framed.paste(picture.resize(size, Image.NEAREST if blocks else Image.LANCZOS), (0, 24))
    ImageDraw.Draw(framed).text((2, 3), text, "black", ImageFont.load_default(14))
    return framed


def side_by_side(tiles, columns):
    """PIL images of one size in rows of so many columns: a PIL image."""
    from torchvision.transforms.functional import to_pil_image, to_tensor
    from torchvision.utils import make_grid

    return to_pil_image(make_grid([to_tensor(tile) for tile in tiles], nrow=columns, padding=6, pad_value=1.0))


def explain(result, config):
    """One picture of the stages of a Segmentation side by side, each with its caption: a PIL image."""
    view, features = result.view, result.features.cpu()
    (y0, x0, y1, x1), (h, w) = view.box, view.grid
    seen, (y, x, ry, rx) = Image.fromarray((view.image * 255).round().byte().permute(1, 2, 0).numpy()), view.ellipse
    ImageDraw.Draw(seen).ellipse((x - rx, y - ry, x + rx, y + ry), outline=TINT, width=3)

    components = F.pad(principal(features, 3), (0, max(0, 3 - features.shape[1])))
    low, high = components.quantile(0.02, dim=0), components.quantile(0.98, dim=0)
    colours = ((components - low) / (high - low).clamp(min=1e-6)).clamp(0, 1).unflatten(0, (h, w)).numpy()
    weights = node_weights(view, config.prior)
    node = int((torch.from_numpy(result.assignment[..., -1]).flatten() * weights).argmax())
    row = heat(build_graph(features, config.tau, weights)[node].unflatten(0, (h, w)).numpy())
    row[np.unravel_index(node, (h, w))] = (0, 160, 255)

    scale = 256 / min(y1 - y0, x1 - x0)
    size = round((x1 - x0) * scale), round((y1 - y0) * scale)
    tiles = [
        tile("1  where the object is, roughly", seen, size),
        tile(f"2  features ({result.backbone}), PCA", Image.fromarray((colours * 255).astype(np.uint8)), size),
        tile("3  graph: row of the blue patch", Image.fromarray(row), size),
        tile("4  soft assignment", Image.fromarray(heat(result.assignment[..., -1])), size),
        tile("5  refined mask", overlay(result.image[y0:y1, x0:x1], result.mask[y0:y1, x0:x1]), size),
    ]
    return side_by_side(tiles, len(tiles))


# Command line --------------------------------------------------------------------------------------------------

SUFFIXES = {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".tif", ".tiff", ".bmp", ".webp", ".gif", ".ppm", ".pgm", ".pbm"}


def in_colours(labels):
    """Labels (H,W) uint8 as an image whose pixels are the labels, and whose palette makes them visible."""
    picture = Image.fromarray(labels)
    picture.putpalette((PALETTE + PALETTE[3:] * 37)[:768])  # a full one, or Pillow saves fewer bits
    return picture


KINDS = {  # of output: what it is, and the PIL image of a Segmentation
    "probability": ("8 bit", lambda result, _: Image.fromarray(np.rint(result.probability * 255).astype(np.uint8))),
    "labels": ("the clusters in colours", lambda result, _: in_colours(result.labels)),
    "overlay": ("the mask on the image", lambda result, _: overlay(result.image, result.mask)),
    "explain": ("the stages side by side", explain),
    "mask": (None, lambda result, _: Image.fromarray(result.mask.astype(np.uint8) * 255)),
}


def whole_numbers(text):
    """A text such as 1,2,3 as a tuple."""
    return tuple(int(number) for number in text.split(","))


def add_config_flags(parser):
    """A flag for every field of Config, with its help, choices and default."""
    group = parser.add_argument_group("hyper-parameters (source of the default in brackets)")
    for field in dataclasses.fields(Config):
        flag, default, info = "--" + field.name.replace("_", "-"), field.default, field.metadata
        if isinstance(default, bool):
            how = {"action": argparse.BooleanOptionalAction}
        else:
            how = {"type": whole_numbers if isinstance(default, tuple) else type(default), "choices": info["choices"]}
        text = f"{info['help']}; default {default} [{info['source']}]"
        group.add_argument(flag, default=default, help=text, **how)


def add_backbone_flags(parser):
    """The flags that say which features and where, the same for both programs."""
    parser.add_argument("--backbone", default="auto", metavar="NAME", help="features: dino; builtin, colour alone; auto "
                        "(default), DINO's if they can be had; or FILE.py, which defines extract(view)")  # fmt: skip
    parser.add_argument("--weights", type=Path, help="DINO's weights file, not torch.hub's cache or a download")
    parser.add_argument("--branch", choices=["teacher", "student"], default="teacher", help="of a full checkpoint")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")


def config_from(options):
    """The Config that parsed flags ask for. Raises ValueError for a value out of range."""
    return Config(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Config)})


def build_parser():
    parser = argparse.ArgumentParser(
        prog="unsegmedgat.py",
        description="Unsupervised segmentation of medical photographs (UnSegMedGAT). Not a medical device.",
        epilog="Exit code: 0 all done, 1 some image failed, 2 wrong use, 130 interrupted. What is written is whole.",
    )
    add = parser.add_argument
    add("images", nargs="+", type=Path, help="images, or folders of images")
    add("-o", "--output", type=Path, required=True, help="the mask, a .png file, for one image; a folder for several")
    hint = parser.add_mutually_exclusive_group().add_argument
    hint("--point", type=whole_numbers, action="append", metavar="X,Y", help="px, near the middle of the object")
    hint("--box", type=whole_numbers, action="append", metavar="X0,Y0,X1,Y1",
         help="px, around the object, tight or loose; outside it is background")  # fmt: skip
    for kind, (what, _) in KINDS.items():
        if what:
            add(f"--{kind}", action="store_true", help=f"also write MASK_{kind}.png, {what}")
    add_backbone_flags(parser)
    add("--preset", choices=PRESETS, help="the paper's settings, where it gives them")
    add("--skip-existing", action="store_true", help="leave alone the images whose outputs all exist")
    add("--workers", type=int, default=0, metavar="N", help="threads that share several images; default: as many as "
        "torch has, OMP_NUM_THREADS or the cores, at most 4 on a GPU. Of no influence on the outputs")  # fmt: skip
    add("--quiet", action="store_true", help="only warnings and errors")
    add("--verbose", action="store_true", help="seconds of every stage")
    add_config_flags(parser)
    return parser


def parse_options(parser, argv=None, presets=PRESETS):
    """The parsed options, where a preset changes the defaults and the flags given still win."""
    options = parser.parse_args(argv)
    parser.set_defaults(**presets.get(options.preset, {}))
    return parser.parse_args(argv)


def is_image(path):
    """Whether a file in a folder looks like one to segment, by its name."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def warn_of_others(folder):
    """Say in one line how many entries of a folder are no images, and of what kind; nothing where there are none."""
    others = [path for path in folder.iterdir() if not is_image(path) and not path.name.startswith(".")]
    kinds = Counter("folders" if path.is_dir() else path.suffix.lower() or "no suffix" for path in others)
    if others and rank_and_world()[0] == 0:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        log.warning("%s: %d entries are left out, as they are no images that are read here: %s", folder, len(others), kinds)


def plan_outputs(options):
    """Pairs (image, {kind: output path}), checked before any work: one writer an output, and no output is an input."""
    images, output = [], options.output
    for path in options.images:
        inside = [p for p in sorted(path.iterdir()) if is_image(p)] if path.is_dir() else [path]
        if not inside:
            raise ValueError(f"{path}: there is no image in this folder")
        if path.is_dir() and os.path.realpath(path) == os.path.realpath(output):  # the masks would be the next run's images
            raise ValueError(f"{path}: is an input; choose another folder for the masks")
        if path.is_dir():
            warn_of_others(path)
        images += inside
    single = output.suffix.lower() == ".png" and not output.is_dir()
    if single and images != options.images[:1]:
        raise ValueError(f"{output}: several images, or a folder of them, need a folder for the masks")
    if not single and output.suffix and not output.is_dir():
        raise ValueError(f"{output}: a mask's name ends in .png; for a folder of that name, make it first")

    kinds = [kind for kind, (what, _) in KINDS.items() if not what or getattr(options, kind)]
    plan, taken = [], {os.path.realpath(image): "an input" for image in images}
    for image in images:
        mask = output if single else output / f"{image.stem}.png"
        outputs = {kind: mask if kind == "mask" else mask.with_name(f"{mask.stem}_{kind}.png") for kind in kinds}
        for path in outputs.values():
            if path.is_dir() or os.path.realpath(path) in taken:
                what = taken.get(os.path.realpath(path), "a folder")
                raise ValueError(f"{path}: would be written for {image}, but it is {what}; "
                                 "choose another output, or rename an image")  # fmt: skip
            taken[os.path.realpath(path)] = f"written for {image}"
        plan.append((image, outputs))
    folder = output if output.is_dir() else output.parent  # where something is to be written
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{folder}: there is no such folder, or no permission to write there")
    return plan


PART = re.compile(r"\..*\.[0-9a-f]{32}\.part")  # the name of what `whole` writes
STALE = 3600  # s, the age at which a part was left behind by a killed run: writing one takes seconds


@contextlib.contextmanager
def whole(path):
    """A path to write to, beside `path`; then what was written is renamed to it: it appears whole or not at all.

    Each has a name of its own, as two runs may write into one folder.
    """
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def remove_stale_parts(folder):
    """Remove what killed runs left behind of `whole` in a folder."""
    for path in folder.glob(".*.part"):
        with contextlib.suppress(OSError):  # another run may be faster
            if PART.fullmatch(path.name) and time.time() - path.stat().st_mtime > STALE:
                path.unlink()


def say(text):
    """Print a line; where nobody reads any more (`| head`, a closed terminal, a full disk), go on in silence."""
    try:
        print(text, flush=True)
    except OSError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, to the end of the process


def segment_to_files(image, outputs, config, how, verbose):
    """One image from file to files: (what to say of it, None), or (None, why it failed)."""
    start = time.perf_counter()
    try:
        result = segment(image, config, **how)
        for kind, path in outputs.items():
            with whole(path) as part:
                KINDS[kind][1](result, config).save(part, format="PNG")
    except Exception as error:  # whatever becomes of one image, the others go on
        return None, reason(error)
    said = (f"foreground {result.mask.mean():.1%}, modularity {result.modularity:.3f}, backbone {result.backbone}, "
            f"{time.perf_counter() - start:.1f} s")  # fmt: skip
    return said + "".join(f", {stage} {t:.2f} s" for stage, t in result.seconds.items() if verbose), None


def distributed_run():
    """Whether this is one of the processes of a torch.distributed run; some builds of torch have none."""
    return distributed.is_available() and distributed.is_initialized()


def rank_and_world():
    """The number of this process and how many there are in a torch.distributed run; (0, 1) without one."""
    return (distributed.get_rank(), distributed.get_world_size()) if distributed_run() else (0, 1)


def gather(value):
    """The value of every rank of a torch.distributed run, in order; [value] without one."""
    values = [value] * rank_and_world()[1]
    if distributed_run():
        distributed.all_gather_object(values, value)
    return values


def backbone_from(options, device):
    """The Backbone that parsed flags ask for. Raises ValueError where the ranks of a run have different ones."""
    backbone = load_backbone(options.backbone, options.weights, options.branch, device, not options.quiet)
    if len(set(gather(backbone.name))) > 1:
        raise ValueError("DINO's weights are at hand for some ranks only: give --weights, or --backbone builtin")
    return backbone


def run(options):
    """Segment what the options ask for; returns the exit code. Raises ValueError or OSError for wrong use."""
    if options.workers < 0:
        raise ValueError(f"--workers must be at least 0, got {options.workers}")
    hints = {}
    for name, count in ("box", 4), ("point", 2):
        given = getattr(options, name) or [None]
        if len(given) > 1:
            raise ValueError(f"--{name} is given {len(given)} times, but one object is segmented: give it once")
        if given[0] and len(given[0]) != count:
            raise ValueError(f"--{name} needs {count} whole numbers with commas between")
        hints[name] = given[0]
    config, plan, (rank, world) = config_from(options), plan_outputs(options), rank_and_world()
    share = [*enumerate(plan, 1)][rank::world]
    todo = [(number, (image, outputs)) for number, (image, outputs) in share
            if not (options.skip_existing and all(path.exists() for path in outputs.values()))]  # fmt: skip
    if len(todo) < len(share) and not options.quiet:
        say(f"{len(share) - len(todo)} of {len(share)} images are left alone, as their outputs exist")
    if not any(gather(bool(todo))):  # all ranks together: one with nothing to do is waited for below
        return 0
    device = pick_device(options.device)
    backbone = backbone_from(options, device)
    folder = plan[0][1]["mask"].parent
    folder.mkdir(exist_ok=True)
    remove_stale_parts(folder)
    how = hints | {"device": device, "backbone": backbone}
    if config.collective:  # over all the images on every rank: all have the same parameters, also after --skip-existing
        scenes = []
        for image, _ in plan:
            with contextlib.suppress(Exception):  # of which the image's own turn will tell
                scenes.append([x.cpu() for x in extract_nodes(load_image(image), config, backbone, device, **hints)[1:]])
        how["shared"] = fit_collective(scenes, config, device, options.quiet or rank > 0)
    cores, failures = torch.get_num_threads(), []
    workers = options.workers or (min(cores, 4) if device.type == "cuda" else cores)
    # Images run side by side, each on one torch thread (torch lets go of Python's lock): two threads that share an
    # operation wait for each other, and sums keep their order, so that the outputs do not depend on the workers.
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=[1])
    try:
        in_order = pool.map if len(plan) > 1 else map
        done = in_order(lambda item: segment_to_files(*item[1], config, how, options.verbose), todo)
        for (number, (image, outputs)), (said, why) in zip(todo, done):
            if why:
                failures.append(image)
                log.error("%s: %s", image, why)
            elif not options.quiet:
                say(f"[{number}/{len(plan)}] {image} -> {outputs['mask']}  {said}")
    finally:
        pool.shutdown(cancel_futures=True)  # after an interrupt only what is begun is finished
    failures = sum(gather(failures), [])
    if rank > 0:  # the first rank tells: torchrun ends them all as soon as one has failed
        return 0
    if failures and len(plan) > 1:
        log.error("%d failed: %s", len(failures), ", ".join(map(str, failures)))
    return 1 if failures else 0


def exit_code(program, advice):
    """What program() returns; or 2 after an error, which is said in one line, and 130 after an interrupt.

    Under torchrun its processes are connected meanwhile, to share the images: see `rank_and_world`.
    """
    logging.basicConfig(format="%(levelname)s: %(message)s")
    warnings.filterwarnings("ignore", module=r"PIL\.")  # `load_image` has its own limit, and reads what it can
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has not
        sys.stdout.reconfigure(errors="backslashreplace")  # for names of files that the terminal has no letters for
    try:
        if "LOCAL_RANK" in os.environ:
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
            # gloo, as NCCL wants a GPU for each rank; a day for the slowest: torchrun ends them all when one dies
            distributed.init_process_group("gloo", timeout=timedelta(days=1))
        return program()
    except (ValueError, OSError, RuntimeError) as error:
        log.error("%s", reason(error))
        return 2
    except KeyboardInterrupt:
        log.error("interrupted; %s", advice)
        return 130
    finally:
        if distributed_run():
            distributed.destroy_process_group()


def main(argv=None):
    """The command line; returns the exit code."""
    advice = "what is written is whole, and --skip-existing goes on from here"
    return exit_code(lambda: run(parse_options(build_parser(), argv)), advice)


if __name__ == "__main__":
    sys.exit(main())
