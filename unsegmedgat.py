"""UnSegMedGAT in plain PyTorch: unsupervised segmentation of medical photographs.

Paper: A. Mudit Adityaja, S. J. Shigwan and N. Kumar, "UnSegMedGAT: Unsupervised Medical Image Segmentation using Graph
Attention Networks Clustering". The patches of one image are the nodes of a graph. A small graph attention network is
optimised on that image alone, without labels, until the clusters that it assigns have a high modularity.

    python unsegmedgat.py image.png -o mask.png                        # one photograph
    python unsegmedgat.py photos/ -o masks/ --overlay                  # a folder, with overlays to look at
    torchrun --nproc-per-node=8 unsegmedgat.py photos/ -o masks/       # the same on several cores, GPUs or machines

First comes the paper, equations (1) to (8) in their order; then what leads from a photograph to a mask.
Shapes: B images, N = h * w patches (the paper's n), C features (F), K clusters (k), H heads (Z) of width D; the paper's
matrix C is the assignment (N,K). A resized image is (3,s,t), as in the paper; a photograph is (height,width,4), RGBA.
Coordinates are (y, x) px; only the box and the point that the user gives are (x, y).
"""

import argparse
import contextlib
import dataclasses
import functools
import logging
import math
import os
import runpy
import socket
import sys
import tempfile
import threading
import warnings
from datetime import timedelta
from numbers import Integral, Real
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin
from scipy import ndimage, special
from torch import distributed, nn
from torch.utils.checkpoint import checkpoint

import bilateral

log = logging.getLogger("unsegmedgat")  # warnings and errors for the user; they go to stderr unless configured

PATCH = 8  # px, the side of a patch: ViT-S/8
ACTIVATIONS = {"silu": nn.SiLU, "selu": nn.SELU, "relu": nn.ReLU}


def hyperparameter(default, help, source, low=0, high=1e9, choices=None):
    """A field of Config: its default, its help text, the source of the default, and its range or its choices."""
    metadata = {"help": help, "source": source, "range": (low, high), "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Config:
    """Every hyper-parameter, with the source of its default; each is also a flag. Raises ValueError if out of range."""

    tau: float = hyperparameter(0.3, "similarities up to tau give no edge, eq. (1)", "paper, III", 1e-9, 1 - 1e-9)
    widths: tuple[int, ...] = hyperparameter((128, 64), "m_r, width of each series of GAT layers", "paper, III", low=1)
    layers: int = hyperparameter(2, "t_r, the number of GAT layers in each series", "paper, III", low=1)
    fc_dim: int = hyperparameter(64, "M, the width in which the series are summed, eq. (5)", "paper, III", low=1)
    clusters: int = hyperparameter(2, "K; above 2 the mask is the union of foreground clusters", "ours", 2, 8)
    activation: str = hyperparameter("silu", "non-linearity of eq. (3)", "paper, III", choices=tuple(ACTIVATIONS))
    epochs: int = hyperparameter(60, "largest number of optimiser steps for an image", "paper, III; ISIC: 300", low=1)
    lr: float = hyperparameter(1e-3, "learning rate of AdamW", "paper, III", low=1e-9)
    weight_decay: float = hyperparameter(1e-2, "weight decay of AdamW", "paper: decay factor; authors' code: AdamW")
    shared_epochs: int = hyperparameter(0, "T0, epochs of shared parameters: UnSegMedGATc", "ours; paper: 5 or 15")
    refine: bool = hyperparameter(True, "refine the mask with the fast bilateral solver", "paper, Fig. 1")
    size: int = hyperparameter(224, "px, shorter side of the resized image", "authors' code", low=2 * PATCH)
    bilateral_lambda: float = hyperparameter(256.0, "lambda, the bilateral solver's smoothness weight", "authors' code")
    keep_components: int = hyperparameter(1, "how many of the largest regions to keep; 0 keeps all", "authors' code")
    stride: int = hyperparameter(8, "px between patches; at 4 or 2 they overlap", "ours; authors: 4", choices=(8, 4, 2))
    colour: float = hyperparameter(0.7, "weight of the colour beside learned features", "ours; paper: 0", high=1)
    heads: int = hyperparameter(2, "Z, attention heads, eq. (4); must divide every width", "ours; authors: 1", low=1)
    residual: bool = hyperparameter(True, "add the node's own W h to what eq. (3) aggregates", "ours; paper: no")
    early_stop: float = hyperparameter(0.01, "stop at less than this share of progress in 3 epochs", "ours; paper: 0")
    resolution: float = hyperparameter(1.0, "gamma, the modularity's resolution", "paper; authors: 0.5")
    collapse_weight: float = hyperparameter(0.0, "weight of eq. (8)'s second term", "ours; paper: 1")
    fade_radii: float = hyperparameter(1.4, "radii around the object beyond which node weights fade", "ours; paper: 0")
    similarity_weight: float = hyperparameter(16.0, "weight of mean similarities; 0: the clusters", "ours; paper: 0")
    mask_blur: float = hyperparameter(3.0, "px, standard deviation of a blur of the outline", "ours; paper: 0", high=99)
    seed: int = hyperparameter(0, "seed of the network's initial parameters", "ours", high=2**32 - 1)

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, kind, choices = getattr(self, field.name), type(field.default), field.metadata["choices"]
            items, (low, high) = value if isinstance(value, tuple) else (value,), field.metadata["range"]
            number = {float: Real, str: str}.get(kind, Integral)
            valid = all(isinstance(n, number) and (n in choices if choices else low <= n <= high) for n in items)
            # A bool is an Integral too
            if not (valid and items and all(isinstance(value, t) == (kind is t) for t in (tuple, bool))):
                raise ValueError(f"{field.name} must be {choices or f'from {low:.10g} to {high:.10g}'}, got {value!r}")
        if any(width % self.heads for width in self.widths):
            raise ValueError(f"widths must be multiples of heads, {self.heads}, got {self.widths}")
        if self.shared_epochs >= self.epochs:
            raise ValueError(f"shared_epochs must be below epochs, {self.epochs}, got {self.shared_epochs}")


# The paper's values, where it states them: not the object's location, the field of view, the heads or the scale of X.
PRESETS = {"paper": {"colour": 0.0, "residual": False, "early_stop": 0.0, "collapse_weight": 1.0, "fade_radii": 0.0,
                     "similarity_weight": 0.0, "mask_blur": 0.0}}  # fmt: skip


# The paper, section II, from the features of the patches to their clusters =====================================
# Graph, eq. (1); attention, eqs. (2) to (4); network, eq. (5) --------------------------------------------------


def build_graph(features, tau, node_weights=None):
    """The graph of eq. (1) from features (N,C): their cosine similarities, 0 up to tau.

    node_weights: (N,) in [0,1], optional and ours; A_ij is multiplied by w_i w_j.
    Returns the adjacency A, (N,N), symmetric; every node has a self-loop unless its weight or its feature is 0.
    """
    f = F.normalize(features, dim=1)
    adjacency = F.threshold_(f @ f.T, tau, 0.0)  # eq. (1): A = f f^T * (f f^T > tau), (N,N)
    return adjacency if node_weights is None else adjacency.mul_(node_weights).mul_(node_weights[:, None])


BLOCK_BYTES, BLOCK_ROWS = 2**26, 256  # (H,N,N) tensors over BLOCK_BYTES are computed BLOCK_ROWS rows at a time


def attention_weights(score_dst, score_src, adjacency):
    """The attention weights alpha of eq. (2), for every head, of n nodes that are updated.

    score_dst (H,n), score_src (H,N): the two parts of a^T [W h_i || W h_j], which is score_dst_i + score_src_j.
    adjacency: (n,N); its positive entries are the edges. Their weights are not used.
    Returns (H,n,N); row i sums to 1 over the neighbours j of node i, and is uniform for a node without neighbours.
    """
    e = F.leaky_relu(score_dst[:, :, None] + score_src[:, None], 0.2)  # (H,n,N); slope: Velickovic et al. 2018
    no_edge = torch.where(adjacency > 0, e.new_zeros(()), torch.finfo(e.dtype).min)  # (n,N), added: faster than to mask
    return (e + no_edge).softmax(dim=2)  # eq. (2)


def attention(Wh, score_dst, score_src, adjacency):
    """What each of n nodes aggregates from its neighbours: the sum in eq. (3), for every head.

    Wh: the transformed node features W h, (H,N,D). Other arguments as for `attention_weights`.
    Returns (H,n,D); 0 for a node without neighbours.
    """
    connected = (adjacency.amax(dim=1) > 0)[:, None]  # (n,1)
    return attention_weights(score_dst, score_src, adjacency) @ Wh * connected  # eq. (3), before the non-linearity


def needs_blocks(heads, n):
    """Whether the (H,N,N) tensors of attention, float32, are so large that it is computed in blocks of rows."""
    return 4 * heads * n * n > BLOCK_BYTES


class GraphAttention(nn.Module):
    """A multi-head graph attention layer, heads concatenated: eqs. (2) to (4), without the non-linearity.

    The vector a of eq. (2) is [a_dst || a_src]: a_dst for the node i that is updated, a_src for its neighbour j.
    residual: add the node's own W h (ours). Attention ignores edge weights, so in a nearly complete graph all nodes
    aggregate nearly the same average; the residual keeps them distinct.
    """

    def __init__(self, in_features, out_features, heads, residual=True):
        super().__init__()
        self.heads, self.residual = heads, residual
        self.W = nn.Linear(in_features, out_features, bias=False)  # W^z of all heads z, stacked
        self.a_dst, self.a_src = (nn.Parameter(torch.empty(heads, out_features // heads)) for _ in range(2))
        for parameter in self.parameters():
            nn.init.xavier_uniform_(parameter)  # Velickovic et al. 2018, for a as in PyTorch Geometric

    def project(self, h):
        """h (N,in) -> W h (H,N,D) and the two parts of its scores, (H,N) each."""
        Wh = self.W(h).unflatten(1, (self.heads, -1)).transpose(0, 1).contiguous()  # (H,N,D)
        return Wh, torch.einsum("hnd,hd->hn", Wh, self.a_dst), torch.einsum("hnd,hd->hn", Wh, self.a_src)

    def forward(self, h, adjacency):
        """h (N,in), adjacency (N,N) whose positive entries are the edges -> (N,out)."""
        Wh, score_dst, score_src = self.project(h)
        if needs_blocks(*score_dst.shape):  # no block is kept for the backward pass, each is computed again in it
            attend = functools.partial(checkpoint, attention, use_reentrant=False, preserve_rng_state=False)
            blocks = zip(score_dst.split(BLOCK_ROWS, dim=1), adjacency.split(BLOCK_ROWS))
            aggregated = torch.cat([attend(Wh, dst, score_src, rows) for dst, rows in blocks], dim=1)  # (H,N,D)
        else:
            aggregated = attention(Wh, score_dst, score_src, adjacency)  # eqs. (2), (3): (H,N,D)
        aggregated = aggregated + Wh if self.residual else aggregated
        return aggregated.transpose(0, 1).flatten(1)  # eq. (4), before the non-linearity: (N,out)


class UnSegMedGAT(nn.Module):
    """R parallel series of graph attention layers, each with a linear layer; another maps their sum to C: eq. (5)."""

    def __init__(self, in_features, config=Config()):
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]()
        self.series = nn.ModuleList()
        for width in config.widths:
            inputs = [in_features] + [width] * (config.layers - 1)
            self.series.append(nn.ModuleList(GraphAttention(n, width, config.heads, config.residual) for n in inputs))
        self.fc_branch = nn.ModuleList(nn.Linear(width, config.fc_dim) for width in config.widths)
        self.fc_out = nn.Linear(config.fc_dim, config.clusters)

    def forward(self, features, adjacency):
        """X (N,C), adjacency (N,N) -> C (N,K), rows summing to 1. Only edges count, so A serves as the paper's A^."""
        total = 0
        for layers, fc in zip(self.series, self.fc_branch):
            h = features
            for layer in layers:
                h = self.activation(layer(h, adjacency))  # sigma of eqs. (3), (4); GAT^(r) of eq. (5): (N,m_r)
            total = total + fc(h)  # H^(r) of eq. (5): (N,M)
        return self.fc_out(total).softmax(dim=1)  # C of eq. (5): (N,K)


# Loss, eqs. (6) to (8), and its optimisation, section III ------------------------------------------------------

MIN_MODULARITY = 1e-4  # below it a graph has no communities, as where colours differ by at most 5 grey levels


def modularity(assignment, adjacency, resolution=1.0):
    """The modularity Q, a scalar tensor: eq. (6) for clusters C (N,K) that are one-hot, eq. (7) for soft ones.

    adjacency: A (N,N), symmetric. resolution: gamma, the weight of the null model (Reichardt and Bornholdt 2006).
    The N x N matrix B = A - gamma d d^T / 2m is not formed, as Tr(C^T B C) / 2m = Tr(C^T A C) / 2m - gamma |C^T d|^2 /
    (2m)^2, where d are the degrees, and 2m = sum(A) is the paper's 2|E| for weighted edges.
    """
    degree = adjacency.sum(1)  # d: (N,)
    two_m = degree.sum().clamp(min=torch.finfo(degree.dtype).tiny)  # 0 only for a graph without edges
    within = (assignment * (adjacency @ assignment)).sum() / two_m  # Tr(C^T A C) / 2m
    expected = ((degree @ assignment) / two_m).square().sum()  # |C^T d|^2 / (2m)^2
    return within - resolution * expected  # eqs. (6), (7)


def modularity_loss(assignment, adjacency, resolution=1.0, collapse_weight=1.0):
    """The loss of eq. (8), a scalar tensor, with a weight for its second term; other arguments as for `modularity`."""
    n, k = assignment.shape
    collapse = math.sqrt(k) / n * assignment.sum(0).norm() - 1
    return -modularity(assignment, adjacency, resolution) + collapse_weight * collapse  # eq. (8)


def centre_and_scale(features, adjacency):
    """The node features X (N,C) of eq. (5) from f (N,C): mean 0 and root mean square norm 4, both weighted by degree.

    The paper leaves the scale open. A mean far larger than the deviations from it, as in DINO's keys, saturates the
    softmax of eq. (5) within a few steps.
    """
    share = F.normalize(adjacency.sum(1), p=1, dim=0)  # (N,)
    x = features - share @ features
    return x * (4 / (share @ x.square().sum(1)).sqrt().clamp(min=1e-12))


@dataclasses.dataclass(frozen=True)
class Fit:
    """What `fit` returns."""

    assignment: torch.Tensor  # C (N,K), rows summing to 1; all 1 / K where the modularity is below MIN_MODULARITY
    losses: list  # the loss before every step
    modularity: float  # Q of the most likely clusters, eq. (6)
    network: UnSegMedGAT  # after the last step


def fit(features, adjacency, config=Config(), shared=None):
    """Optimise the network on one image alone; returns a Fit.

    features: f (N,C). adjacency: (N,N). shared: a state_dict from `fit_collective`, the initial parameters;
    config.shared_epochs of the epochs are then done already.
    """
    with standard_torch():  # gradients and float32, whatever the caller has set
        x, device = centre_and_scale(features, adjacency), adjacency.device
        with seeded(config.seed):
            network = UnSegMedGAT(x.shape[1], config).to(device)
        if shared is not None:
            network.load_state_dict(shared)
        adamw_kwargs = {"weight_decay": config.weight_decay, "fused": True, "capturable": device.type == "cuda"}
        optimizer = torch.optim.AdamW(network.parameters(), config.lr, **adamw_kwargs)
        losses, epochs = [], config.epochs - (config.shared_epochs if shared is not None else 0)

        def step():
            loss = modularity_loss(network(x, adjacency), adjacency, config.resolution, config.collapse_weight)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss.detach()

        for epoch in range(epochs):
            if epoch == 3 and device.type == "cuda" and not needs_blocks(config.heads, len(x)):
                step = capture_cuda_graph(step, device)
            losses.append(step().item())
            improvement = (config.resolution - 1) / config.clusters - losses[-1]  # over the loss at C_ik = 1 / K
            slow = epoch >= 3 and losses[-4] - losses[-1] < config.early_stop * improvement
            if slow and config.early_stop and improvement > MIN_MODULARITY:  # at first the loss is on a plateau
                break
        with torch.no_grad():
            assignment = network(x, adjacency)
            clusters = F.one_hot(assignment.argmax(1), config.clusters).to(assignment)
            q = modularity(clusters, adjacency).item()  # eq. (6)
    if q < MIN_MODULARITY:  # then no cluster is the object's
        assignment = torch.full_like(assignment, 1 / config.clusters)
    return Fit(assignment, losses, q, network)


def fit_collective(node_sets, config=Config(), device="cpu", quiet=True):
    """The first phase of UnSegMedGATc, section III: config.shared_epochs passes over all images, a step for each.

    node_sets: a list of functions that return the features f (N,C) and the node weights (N,) of an image; N may differ.
    An image whose function fails is left out. Of the graphs only one is in memory. quiet: show no progress bar.
    Returns the state_dict that `fit` takes as `shared`, on the CPU; None without an image.
    """
    nodes = []
    for node_set in node_sets:
        with contextlib.suppress(Exception):  # it is reported when the image itself is segmented
            nodes.append([tensor.cpu() for tensor in node_set()])
    if not nodes:
        return None
    with standard_torch(), torch.hub.tqdm(total=len(nodes) * config.shared_epochs, disable=quiet) as bar:
        with seeded(config.seed):
            network = UnSegMedGAT(nodes[0][0].shape[1], config).to(device)
        optimizer = torch.optim.AdamW(network.parameters(), config.lr, weight_decay=config.weight_decay, fused=True)
        for features, node_weights in nodes * config.shared_epochs:
            features = features.to(device)
            adjacency = build_graph(features, config.tau, node_weights.to(device))
            assignment = network(centre_and_scale(features, adjacency), adjacency)
            loss = modularity_loss(assignment, adjacency, config.resolution, config.collapse_weight)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            bar.update(1)
    return {name: tensor.cpu() for name, tensor in network.state_dict().items()}


# The paper ends here. What follows leads from a photograph to a mask ===========================================

LOCK = threading.Lock()  # for torch's random state, which all threads share, and for CUDA graph capture


@contextlib.contextmanager
def seeded(seed):
    """Torch's random numbers on the CPU begin at a seed inside, and go on as before after it."""
    with LOCK, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(seed))  # torch.manual_seed would also seed the caller's GPUs
        yield


def capture_cuda_graph(function, device):
    """function(), which has run a few times, as a CUDA graph: to launch its 300 kernels takes longer than they run."""
    graph = torch.cuda.CUDAGraph()
    with LOCK, torch.cuda.device(device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = function()  # each replay writes its result into this tensor
    return lambda: (graph.replay(), result)[1]


@contextlib.contextmanager
def standard_torch():
    """Torch as this file needs it, whatever its caller has set: gradients, no autocast, float32, the CPU."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with (torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"),
              torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False)):  # fmt: skip
            yield
    finally:
        torch.set_default_dtype(dtype)


# From a photograph to what a backbone sees ---------------------------------------------------------------------

MAX_NODES = 60_000  # larger graphs are refused: the adjacency alone would take over 14 GB
BOX_MARGIN = 20  # px around the user's box that serve as known background, at least; the margin of the authors' code


def one_line(error):
    """The message of an exception, or another text, in one line of at most 300 characters."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def decode_image(source):
    """A path, PIL image or array as a decoded PIL image, turned upright by its EXIF orientation. Raises ValueError."""
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # some ICC profiles exceed Pillow's 1 MiB
    try:
        source = Image.fromarray(source) if isinstance(source, np.ndarray) else source
        image = source if isinstance(source, Image.Image) else Image.open(source)
        image.load()
    except Exception as error:  # Pillow's decoders raise many kinds on a damaged file
        hint = f"{one_line(error)} (is it damaged? DICOM, NIfTI and HEIC are not read)"
        raise ValueError(f"it cannot be read: {getattr(error, 'strerror', None) or hint}") from None
    if getattr(image, "is_animated", False) and image.format != "MPO":  # MPO: a phone's photo and its preview
        raise ValueError(f"it holds {image.n_frames} frames: save one as a still image")
    with contextlib.suppress(Exception):  # of many kinds, for bytes that are not EXIF
        image = ImageOps.exif_transpose(image)
    return image


def load_image(source):
    """Read a still image as RGBA: uint8 (height,width,4), turned upright by its EXIF orientation. Raises ValueError.

    source: a path, a PIL image, or an array that Pillow takes, as uint8 (height,width[,3 or 4]). Grey images of more
    than 8 bits are scaled by their 0.1 and 99.9 percentiles. Alpha becomes 255, or 0 for pixels more than half
    transparent, which get the mean colour of the others.
    """
    image = decode_image(source)
    if image.mode[0] in "IF":  # 16 or 32 bits
        grey = np.nan_to_num(np.asarray(image, np.float64), posinf=0, neginf=0)
        low, high = np.percentile(grey, (0.1, 99.9))  # a single hot pixel would leave the rest black
        image = Image.fromarray(((grey - low) * (255 / max(high - low, 1e-12))).clip(0, 255).round().astype(np.uint8))
    rgba = np.array(image.convert("RGBA"))
    opaque = rgba[..., 3] >= 128
    if not opaque.any():
        raise ValueError("it is transparent everywhere")
    rgba[..., 3] = opaque * 255
    rgba[~opaque, :3] = rgba[opaque, :3].mean(0)
    return rgba


def resize_image(photo, size):
    """(height,width,C) uint8 -> (C,s,t) in [0,1], multiples of 8: the shorter `size` px, or the longer 4 `size`."""
    height, width = photo.shape[:2]
    scale = min(size / min(height, width), 4 * size / max(height, width))
    shape = [max(1, round(side * scale / PATCH)) * PATCH for side in (height, width)]
    image = torch.from_numpy(photo).permute(2, 0, 1)[None].float()
    return (F.interpolate(image, size=shape, mode="bilinear", antialias=True)[0] / 255).clamp(0, 1)


@dataclasses.dataclass
class View:
    """The photograph, or the surroundings of the user's box in it, resized: all that a backbone sees."""

    image: torch.Tensor  # (3,s,t) in [0,1]
    stride: int  # px between patches
    crop: tuple  # (y0, x0, y1, x1) px of the photograph, ends excluded: the part that the image shows
    allowed: np.ndarray  # (height,width) bool, pixels of the photograph that can be object: opaque, in the user's box
    search_area: tuple  # (y0, x0, y1, x1) px of the image: the user's box, or the whole image
    field_of_view: torch.Tensor  # (h,w), 1 for the patches that can be object, else 0
    ellipse: tuple = None  # (y0, x0, y1, x1) px of the image, the sides of the ellipse where the object is, roughly
    prompt: str = ""  # what the ellipse was taken from: "box", "point", or "" for a disc found without either

    @property
    def grid(self):
        """The number of patches: (h,w)."""
        return tuple((side - PATCH) // self.stride + 1 for side in self.image.shape[1:])

    def centres(self):
        """The centres of the patches, px of the image: (h,1) and (1,w)."""
        y, x = (torch.arange(n) * self.stride + PATCH / 2 for n in self.grid)
        return y[:, None], x[None]

    def position_in(self, area):
        """The positions of the patches in an area (y0, x0, y1, x1): (h,1) and (1,w), -1 and 1 on its sides."""
        (y, x), (y0, x0, y1, x1) = self.centres(), area
        return 2 * (y - y0) / (y1 - y0) - 1, 2 * (x - x0) / (x1 - x0) - 1

    def distance_in_radii(self):
        """The distance of each patch from the centre of the ellipse, (h,w): 1 on the ellipse."""
        return torch.hypot(*self.position_in(self.ellipse))

    def inside_ellipse(self):
        """1 for the patches whose centre lies inside the ellipse, at least the nearest one, else 0: (h,w)."""
        distance = self.distance_in_radii()
        return (distance <= distance.min().clamp(min=1)).float()


def rgb_to_lab(image):
    """sRGB (3,s,t) in [0,1] to CIE Lab (3,s,t), L in [0,100], white point D65 (IEC 61966-2-1, CIE 15)."""
    linear = torch.where(image > 0.04045, ((image + 0.055) / 1.055) ** 2.4, image / 12.92)
    to_xyz = image.new_tensor([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = torch.einsum("dc,chw->dhw", to_xyz / to_xyz.sum(1, keepdim=True), linear)  # relative to white
    x, y, z = torch.where(xyz > 0.008856, xyz.clamp(min=1e-6) ** (1 / 3), 7.787 * xyz + 16 / 116)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def find_field_of_view(image):
    """Which cells of 8 px of an image (3,s,t) can be object: (s/8,t/8), 0 in dark frames, stickers, drapes, else 1."""
    brightness = F.avg_pool2d(image.amax(0)[None], PATCH)[0].numpy()  # (s/8,t/8)
    chroma = F.avg_pool2d(rgb_to_lab(image)[1:], PATCH).numpy()  # (2,s/8,t/8)
    y, x = (np.abs((np.arange(n) + 0.5) / n * 2 - 1) for n in brightness.shape)  # 0 in the middle, 1 at the border
    distance = np.maximum.outer(y, x)

    def border_components(cells, min_distance):  # that touch the border, cover under 90 %, and are farther out
        labels, _ = ndimage.label(cells)
        touching = np.unique([*labels[0], *labels[-1], *labels[:, 0], *labels[:, -1]])
        kept = [n for n in touching if n and (labels == n).mean() < 0.9 and distance[labels == n].mean() > min_distance]
        return np.isin(labels, kept)

    # The thresholds are tuned. A sticker or drape has another hue than the middle, and stays near the border
    dark = border_components(brightness < 0.275 * max(np.quantile(brightness, 0.9), 0.3), 0)
    other_hue = np.hypot(*(chroma - np.median(chroma[:, distance < 0.5], axis=1)[:, None, None])) > 36
    return torch.from_numpy(~(dark | border_components(other_hue & ~dark, 0.6))).float()


def view_photograph(photo, config, box=None, point=None):
    """The View of a photograph (height,width,4) uint8, or of the surroundings of a box (y0, x0, y1, x1) in it.

    Nothing in the box is excluded as frame or sticker, and nothing at all if the point (y, x) lies on one.
    """
    height, width = photo.shape[:2]
    y0, x0, y1, x1 = box or (0, 0, height, width)
    dy, dx = (max(BOX_MARGIN, 0.3 * side) for side in (y1 - y0, x1 - x0))
    top, left = max(0, round(y0 - dy)), max(0, round(x0 - dx))
    bottom, right = min(height, round(y1 + dy)), min(width, round(x1 + dx))
    if config.size**2 * min(4, max(height / width, width / height)) > MAX_NODES * config.stride**2:
        raise ValueError(f"there are over {MAX_NODES:,} patches: use a smaller --size, or a larger --stride")
    inside = np.zeros((height, width), bool)
    inside[round(y0) : round(y1), round(x0) : round(x1)] = True
    cells = find_field_of_view(resize_image(photo, config.size)[:3])  # of the whole photograph
    seen = F.interpolate(cells[None, None], (height, width))[0, 0].numpy() > 0  # (height,width)
    if box or (point and not seen[int(point[0]), int(point[1])]):
        seen |= inside
    opaque = photo[..., 3] > 0
    photo = np.dstack([photo[..., :3], (seen & opaque) * np.uint8(255)])[top:bottom, left:right]
    image = resize_image(photo, config.size)  # (4,s,t)
    field_of_view = (F.avg_pool2d(image[3:], PATCH, config.stride)[0] >= 0.5).float()  # (h,w)
    sy, sx = image.shape[1] / (bottom - top), image.shape[2] / (right - left)  # px of the image in one px
    search_area = (y0 - top) * sy, (x0 - left) * sx, (y1 - top) * sy, (x1 - left) * sx
    return View(image[:3], config.stride, (top, left, bottom, right), opaque & inside, search_area, field_of_view)


# Features: the keys of DINO's last block, or another backbone's ------------------------------------------------
# A backbone is a function extract(view): View -> features (N,C), row-major, of any norm. Its __name__ is reported.

DINO_URL = "https://dl.fbaipublicfiles.com/dino/dino_deitsmall8_pretrain/dino_deitsmall8_pretrain.pth"
DINO_SHA256 = "55c8b267f479b614ec20858947ce361ba804846c193e20be74263a096bb6d75e"
DOWNLOAD_TIMEOUT = 10  # s without an answer from the host


class Block(nn.Module):
    """A transformer block with multi-head self-attention, its parameters named as in DINO's file."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = (nn.LayerNorm(dim, eps=1e-6) for _ in range(2))
        self.attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, 4 * dim), "fc2": nn.Linear(4 * dim, dim)})

    def forward(self, x):  # (B,T,C), T tokens
        qkv = self.attn["qkv"](self.norm1(x))  # (B,T,3C)
        q, k, v = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B,H,T,D) each
        attended = F.scaled_dot_product_attention(q, k, v)  # (B,H,T,D)
        x = x + self.attn["proj"](attended.transpose(1, 2).flatten(2))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class VisionTransformer(nn.Module):
    """DINO's ViT-S/8 (Caron et al. 2021), its parameters named and shaped as in the published file."""

    def __init__(self, dim=384, depth=12, heads=6, grid=28):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid * grid, dim))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, PATCH, PATCH)})
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)  # not needed for keys, but part of the published file

    def keys(self, images, stride=PATCH):
        """The keys of the last block, all heads: (B,N,C), row-major. images: (B,3,s,t), normalised as for ImageNet."""
        proj = self.patch_embed["proj"]
        x = F.conv2d(images, proj.weight, proj.bias, stride=stride)  # (B,C,h,w)
        side = math.isqrt(self.pos_embed.shape[1] - 1)
        position = self.pos_embed[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)  # (1,C,28,28)
        position = F.interpolate(position.cpu(), size=x.shape[2:], mode="bicubic")  # (1,C,h,w); MPS does not have it
        x = (x + position.to(x.device)).flatten(2).transpose(1, 2)  # (B,N,C)
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        x = torch.cat([cls, x], dim=1)  # (B,1+N,C)
        for block in self.blocks[:-1]:
            x = block(x)
        last = self.blocks[-1]
        _, keys, _ = last.attn["qkv"](last.norm1(x)).chunk(3, dim=2)  # the last block's keys
        return keys[:, 1:]  # (B,N,C), without the class token


def read_dino(path):
    """ViT-S/8 with the weights of a file: the published backbone, or the full checkpoint, whose teacher is taken."""
    model = VisionTransformer()
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the full checkpoint's command line
            state = torch.load(path, map_location="cpu", weights_only=True)
        if "teacher" in state:  # the full checkpoint, also with a head
            state = {name: state["teacher"][f"backbone.{name}"] for name in model.state_dict()}
        model.load_state_dict(state)
    except Exception as error:  # of many kinds; in its second sentence torch advises to load without weights_only
        reason = one_line(error).split(". ")[0]
        raise ValueError(f"{path}: these are no weights of DINO's ViT-S/8 ({reason}): download {DINO_URL}") from None
    return model.eval().requires_grad_(False)


@standard_torch()
def load_dino(weights=None, progress=True):
    """ViT-S/8 from a file of weights (else ValueError), or torch.hub's cache, after a download if need be (OSError)."""
    if weights:
        return read_dino(weights)
    path, timeout = Path(torch.hub.get_dir()) / "checkpoints" / DINO_URL.split("/")[-1], socket.getdefaulttimeout()
    with contextlib.suppress(ValueError):  # it is missing or damaged
        return read_dino(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)  # torch.hub sets none
        torch.hub.download_url_to_file(DINO_URL, str(path), hash_prefix=DINO_SHA256, progress=progress)
    except Exception as error:  # of many kinds: no connection, a proxy's answer that is not HTTP, another digest
        raise OSError(f"the download from {DINO_URL.split('/')[2]} failed ({one_line(error)})") from None
    finally:
        socket.setdefaulttimeout(timeout)
    return read_dino(path)


def pick_device(device):
    """A torch.device; "auto" is the current CUDA device, else the CPU. RuntimeError, AssertionError: there is none."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.zeros(0, device=device).device  # with the index of the current one


def builtin(view):
    """The backbone without learned weights: no features, (N,0). The colour, else joined to them, stands alone."""
    return torch.zeros(math.prod(view.grid), 0)


@functools.lru_cache(maxsize=1)  # the last one is kept, as `segment` is called for many images
def load_backbone(name="auto", weights=None, device="auto", progress=True):
    """A backbone by name: "dino", "builtin" (the colour alone), "auto", or a Python file that defines extract(view).

    "auto" is DINO if its weights are available, else the colour alone, with a warning. weights: see `load_dino`.
    """
    if name not in ("auto", "dino"):
        if weights:
            raise ValueError(f"weights are for the dino backbone: leave them out with {name}")
        if name == "builtin":
            return builtin
        sys.path.append(str(Path(name).parent.resolve()))  # for modules beside the file
        try:
            extract = runpy.run_path(str(name), run_name=Path(name).stem)["extract"]
            extract.__name__ = str(name)
        except (Exception, SystemExit) as error:  # whatever is wrong in it
            raise ValueError(f"backbone {name}: {error!r}: the file must define extract(view)") from error
        return extract
    try:
        model = load_dino(weights, progress).to(pick_device(device))
    except OSError as error:
        if name == "dino":
            raise
        log.warning("DINO's weights are not available: %s. Using the colour alone instead; for DINO, download %s on "
                    "another machine and pass it as --weights FILE.", error, DINO_URL)  # fmt: skip
        return builtin

    def dino(view):
        mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]  # ImageNet's
        return model.keys(((view.image - mean) / std)[None].to(model.cls_token.device), view.stride)[0]

    return dino


def colour_features(lab, background):
    """Lab colours of patches (N,3), minus their mean weighted by background (N,), as features (N,4) of norm 1."""
    # Eq. (1) compares directions: a constant fourth feature keeps patches of nearly the background's colour similar
    return F.normalize(F.pad(lab - background @ lab / background.sum(), (0, 1), value=50), dim=1)


# Where the object is, roughly ----------------------------------------------------------------------------------

DISC_RADII = np.geomspace(0.07, 0.65, 16)  # in shorter sides of the search area
# Position prior (L, r) for each prompt: log-odds fall linearly from +L at the ellipse's centre, through 0 at r radii,
# to -L at 2 r. An object nearly fills a tight box; a disc is smaller than its object, less so at a point. Tuned.
POSITION_PRIOR = {"box": (8, 1.1), "point": (3, 1.4), "": (2, 1.6)}


def pca(features, components):
    """Features (N,C) on their first principal components: (N,components), or (N,C) where C is smaller."""
    centred = features - features.mean(0)
    return centred @ torch.linalg.eigh(centred.T @ centred)[1].flip(1)[:, :components]  # eigh's order is ascending


def background_weights(view):
    """The weight of each patch as background, (h,w) in [0,1]: large near the sides of the search area, and outside."""
    y, x = view.position_in(view.search_area)
    return (0.05 + y**2 + x**2).clamp(max=1) * view.field_of_view


def remove_trend(features, view):
    """Features (N,C) minus a quadratic fit of the background: learned ones vary with the position in the frame."""
    y, x = (side.expand(view.grid).flatten() for side in view.position_in((0, 0, *view.image.shape[1:])))
    terms = torch.stack([torch.ones_like(x), x, y, x * x, x * y, y * y], dim=1)  # (N,6)
    weighted = (terms * (background_weights(view).flatten()[:, None] + 1e-3)).T
    ridge = 1e-3 * weighted[0].sum() * torch.eye(6)
    return features - terms @ torch.linalg.solve(weighted @ terms + ridge, weighted @ features)


def disc_contrasts(values, view, radii):
    """The distances of the means of values (C,h,w) in all discs, of R radii in px, to those around: (R,h,w) each.

    The first is to the ring around the disc, less at the border of the field of view, the second to the background.
    """
    background = background_weights(view)
    common = (values * background).sum((1, 2)) / background.sum().clamp(min=1e-6)
    layers = torch.cat([values, torch.ones_like(values[:1])]) * view.field_of_view  # (C+1,h,w): the last counts patches
    to_ring, to_background = [], []
    for radius in radii / view.stride:
        outer = 1.4 * radius + 0.7
        side = torch.arange(-int(outer), int(outer) + 1.0)
        distance = torch.hypot(side[:, None], side)
        shapes = torch.stack([distance <= radius, (distance > radius) & (distance <= outer)]).float()  # disc, ring
        sums = F.conv2d(layers[:, None], shapes[:, None], padding=len(side) // 2)  # (C+1,2,h,w)
        means = sums[:-1] / sums[-1].clamp(min=1)
        visible = sums[-1] / shapes.sum((1, 2)).clamp(min=1)[:, None, None]  # 1: all of it
        to_ring.append((means[:, 0] - means[:, 1]).norm(dim=0) * visible[0] * visible[1].sqrt())
        to_background.append((means[:, 0] - common[:, None, None]).norm(dim=0))
    return torch.stack(to_ring), torch.stack(to_background)


def find_disc(maps, view, point=None):
    """The disc that stands out from its surroundings, as the sides (y0, x0, y1, x1) of an ellipse, px.

    Its centre is near the user's point (y, x), or the most salient point: that of the largest contrasts to ring and
    background in all maps (Itti, Koch and Niebur 1998; Achanta et al. 2009).
    """
    (cy, cx), (y, x), (y0, x0, y1, x1) = view.centres(), view.position_in(view.search_area), view.search_area
    inland = ((1 - y**4).clamp(min=0) * (1 - x**4).clamp(min=0)) ** 2  # an object seldom touches the border
    radii = torch.from_numpy(DISC_RADII).float() * min(y1 - y0, x1 - x0)  # px
    contrasts = [disc_contrasts(values, view, radii) for values in maps]
    radii, exponent = radii[:, None, None], 0.6 if point is None else 0.2  # of the radius; tuned

    def best(score):  # (R,h,w)
        number, row, column = np.unravel_index(int(score.argmax()), score.shape)
        return float(cy[row]), float(cx[0, column]), float(radii[number])

    if point is None:
        # The bound keeps the other map's contrasts where one map is constant
        salience = math.prod((to_ring * to_background.sqrt()).clamp(min=1e-12) for to_ring, to_background in contrasts)
        point = best(salience ** (1 / len(maps)) * radii**exponent * inland)[:2]
    near = torch.exp(-((torch.hypot(cy - point[0], cx - point[1]) / radii / 0.35) ** 2) / 2)  # sigma 0.35 radii
    to_ring = sum(to_ring.square() for to_ring, _ in contrasts).sqrt()  # in all maps concatenated
    y, x, radius = best(to_ring * radii**exponent * near)
    return y - radius, x - radius, y + radius, x + radius


def box_is_tight(maps, view):
    """Whether the object fills the user's box; if not, it is somewhere inside.

    It is loose if in every map the middle differs from the outside, by over one standard deviation, but the rim of the
    inscribed ellipse does not: it is less than 0.2 of the way to the middle.
    """
    y, x = view.position_in(view.search_area)
    distance, visible = torch.hypot(y, x), view.field_of_view > 0
    middle, rim = visible & (distance <= 0.5), visible & (distance > 0.7) & (distance <= 1)
    outside = visible & ((y.abs() > 1) | (x.abs() > 1))
    for values in maps:
        axis = F.normalize(values[:, middle].mean(1) - values[:, outside].mean(1), dim=0)
        along = torch.tensordot(axis, values, 1)  # (h,w), from the outside to the middle
        variance = sum((along[part] - along[part].mean()).square().mean() for part in (middle, outside)) / 2
        contrast = along[middle].mean() - along[outside].mean()  # NaN if the box is the whole image: it is loose
        if contrast <= variance.sqrt() or along[rim].mean() - along[outside].mean() > 0.2 * contrast:
            return True
    return False


def locate_object(view, deep, lab, colour_weight, box, point):
    """Set the ellipse of the View, from the backbone's features (N,C) and Lab (N,3): the box if tight, else a disc."""
    maps = []
    colour = colour_features(lab, background_weights(view).flatten() + 1e-3)
    for features, weight in ((remove_trend(deep.cpu(), view), 1 - colour_weight), (colour, colour_weight)):
        if weight:  # weighted as in `extract_nodes`; 12 components nearly keep the distances
            scale = (weight / features.var(0, correction=0).sum().clamp(min=1e-24)).sqrt()
            maps.append((pca(features, 12) * scale).T.unflatten(1, view.grid))  # (12,h,w), or fewer
    if box and box_is_tight(maps, view):
        view.ellipse, view.prompt = view.search_area, "box"
    elif point:
        y, x = (at * side / of for at, side, of in zip(point, view.image.shape[1:], view.allowed.shape))
        view.ellipse, view.prompt = find_disc(maps, view, (y, x)), "point"
        inside = (view.distance_in_radii() <= 1).float()  # what the user marks is never excluded
        view.field_of_view = torch.maximum(view.field_of_view, inside)
    else:
        view.ellipse = find_disc(maps, view)


def check_prompt(box, point, height, width):
    """The user's box (x0, y0, x1, y1) as (y0, x0, y1, x1) or point (x, y) as (y, x), the other None, or ValueError."""
    with contextlib.suppress(TypeError, ValueError):  # not numbers, or not so many
        x0, y0, x1, y1 = map(float, box if point is None else (*point, width, height))
        if 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height and (box is None or point is None):
            return ((y0, x0, y1, x1), None) if point is None else (None, (y0, x0))
    given = one_line(f"box {box}, point {point}")
    raise ValueError(f"give one box x0, y0, x1, y1 or one point x, y inside the image, {width} x {height}; got {given}")


@standard_torch()
def extract_nodes(photo, config, extract, device="cpu", box=None, point=None):
    """The nodes of a photograph's graph: its View with the object's ellipse, the features f (N,C), node weights (N,).

    photo: (height,width,4) uint8, as of `load_image`. box, point: as in `segment`. Raises ValueError for a prompt that
    is not inside the image, and for features of a wrong shape.
    """
    if box is not None or point is not None:
        box, point = check_prompt(box, point, *photo.shape[:2])
    view = view_photograph(photo, config, box, point)
    n, copy = math.prod(view.grid), dataclasses.replace(view, image=view.image.clone())  # some normalise in place
    try:
        with torch.no_grad():
            deep = (builtin if config.colour == 1 else extract)(copy).detach().to(device, torch.float32)
        if deep.ndim != 2 or len(deep) != n or not deep.isfinite().all():
            raise ValueError(f"it must return finite features ({n},C), for {n} patches, got {(*deep.shape,)}")
    except Exception as error:
        raise ValueError(f"backbone {getattr(extract, '__name__', 'extract')}: {error!r}") from error
    deep, colour_weight = F.normalize(deep, dim=1), config.colour if deep.shape[1] else 1
    lab = F.avg_pool2d(rgb_to_lab(view.image), PATCH, view.stride).flatten(1).T  # (N,3)
    locate_object(view, deep, lab, colour_weight, box, point)
    distance, node_weights = view.distance_in_radii(), view.field_of_view
    if config.fade_radii:  # smaller weights are 0, as their products are denormal, which is slow on a CPU
        node_weights = node_weights * F.threshold(torch.exp(-((distance / config.fade_radii) ** 4) / 2), 1e-6, 0.0)
    # Again, as the ellipse now tells what is background
    colour = colour_features(lab, ((distance > 1) * view.field_of_view + 1e-3).flatten()).to(device)
    # Joined so, the cosine similarity is the weighted mean of those of both
    features = torch.cat([math.sqrt(1 - colour_weight) * deep, math.sqrt(colour_weight) * colour], dim=1)
    return view, features, node_weights.flatten().to(device)


# From the clusters to a mask -----------------------------------------------------------------------------------


def select_foreground(view, assignment, adjacency, node_weights, config):
    """Which clusters and patches are object: the assignment (N,K) in order, how many are background, and (N,) in [0,1].

    Foreground are the clusters more common inside the ellipse than in the whole graph, nodes counting by weight: our
    rule. Modularity gives patches between two clusters to the smaller one, so with similarity_weight they are judged
    again: their log-odds are the position prior plus similarity_weight times the logarithm of the ratio of their mean
    similarities to the foreground and to the background.
    """
    inside = view.inside_ellipse().flatten().to(node_weights) * node_weights  # (N,)
    shares = [weights @ assignment / weights.sum().clamp(min=1e-6) for weights in (inside, node_weights)]  # (K,) each
    excess = shares[0] / shares[1].clamp(min=1e-6) - 1
    assignment, n_background = assignment[:, excess.argsort()], int((excess <= 1e-4).sum())  # 1e-4 for rounding
    foreground = assignment[:, n_background:].sum(1)
    if config.similarity_weight and n_background < config.clusters:
        membership = torch.stack([foreground, 1 - foreground], dim=1)  # (N,2)
        similarity = adjacency @ membership / node_weights.clamp(min=1e-12)[:, None]  # sum_j w_j s_ij C_jk
        similarity = similarity / (node_weights @ membership).clamp(min=1e-6)  # (N,2) in [0,1], the mean
        logs = similarity.clamp(min=0.01).log()  # smaller similarities are noise
        strength, radius = POSITION_PRIOR[view.prompt]
        prior = strength * (1 - view.distance_in_radii() / radius).clamp(min=-1).flatten()
        foreground = torch.sigmoid(config.similarity_weight * (logs[:, 0] - logs[:, 1]) + prior.to(logs))
    return assignment, n_background, foreground * (node_weights > 0)  # the others have no edges


def upsample(values, stride):
    """Interpolate patch values (K,h,w) over the resized image that the patches were cut from: (K,s,t)."""
    maps = F.interpolate(values[None], scale_factor=stride, mode="bilinear")  # around the centres of the patches
    return F.pad(maps, [(PATCH - stride) // 2] * 4, mode="replicate")[0]


def clean_mask(mask, keep_components):
    """A mask (height,width) bool with its holes filled and only its largest connected regions, or all for 0."""
    mask = ndimage.binary_fill_holes(mask)
    if keep_components:
        labels, _ = ndimage.label(mask)
        area = np.bincount(labels.ravel())[1:]  # without label 0, the background
        mask = np.isin(labels, 1 + np.argsort(-area, kind="stable")[:keep_components])
    return mask


def make_mask(view, assignment, adjacency, node_weights, config):
    """The clusters (N,K) over the photograph: {mask, probability, labels, assignment (ordered)}, as in Segmentation."""
    assignment, n_background, foreground = select_foreground(view, assignment, adjacency, node_weights, config)
    maps = torch.cat([foreground[:, None], assignment], dim=1).T.cpu().unflatten(1, view.grid)  # (1+K,h,w)
    maps = upsample(maps, view.stride)  # (1+K,s,t)
    soft = maps[0].numpy()
    if config.refine:
        guide = (view.image * 255).round().byte().permute(1, 2, 0).numpy()
        # Confidence is twice |log-odds|, at most 32: where patches are unsure, colours decide. At odds of 5 to 3 it is
        # about the 0.999 that the authors' code gives every pixel, so their lambda holds; else it is that constant.
        confidence = 2 * np.abs(special.logit(soft.clip(1e-7, 1 - 1e-7))) if config.similarity_weight else 0.999
        soft = bilateral.solve(soft, guide, confidence, smoothness=config.bilateral_lambda)
    maps[0] = torch.from_numpy(ndimage.gaussian_filter(soft, config.mask_blur))
    y0, x0, y1, x1 = view.crop
    size = y1 - y0, x1 - x0
    maps = F.interpolate(maps[None], size, mode="bilinear", antialias=True)[0].numpy()  # (1+K,y1-y0,x1-x0)
    probability, labels = np.zeros(view.allowed.shape, np.float32), np.zeros(view.allowed.shape, np.uint8)
    probability[y0:y1, x0:x1] = maps[0].clip(0, 1)
    probability *= view.allowed
    mask = clean_mask(probability > 0.5, config.keep_components) & view.allowed
    # The most likely cluster: of the foreground clusters inside the mask, of the others outside
    allowed = (np.arange(config.clusters) >= n_background)[:, None, None] == mask[y0:y1, x0:x1]
    labels[y0:y1, x0:x1] = np.where(allowed, maps[1:], -np.inf).argmax(0)
    assignment = assignment.cpu().unflatten(0, view.grid).numpy()
    return {"mask": mask, "probability": probability, "labels": labels, "assignment": assignment}


@dataclasses.dataclass(frozen=True)
class Segmentation:
    """What `segment` returns. Height and width are the photograph's own, after its EXIF rotation."""

    image: np.ndarray  # (height,width,3) uint8, the photograph
    mask: np.ndarray  # (height,width) bool, the object
    probability: np.ndarray  # (height,width) float32 in [0,1], of foreground, before cleaning
    labels: np.ndarray  # (height,width) uint8, 0 to K - 1, the clusters in order from background to object
    assignment: np.ndarray  # (h,w,K) float32, soft clusters of the patches, in the order of the labels
    view: View  # the resized image, and the object's ellipse
    features: torch.Tensor  # f (N,C), rows of norm 1
    node_weights: torch.Tensor  # (N,)
    fit: Fit  # the network, its losses and the modularity of its clusters
    backbone: str  # its name


@standard_torch()
def segment(image, config=Config(), *, box=None, point=None, backbone="auto", weights=None, device="auto", shared=None):
    """Segment one photograph: the whole method. Returns a Segmentation; a warning says why a mask is empty.

    image: a path, a PIL image, or a uint8 array (height,width[,3 or 4]).
    box: (x0, y0, x1, y1) px, ends excluded, around the object, tight or loose. point: (x, y) px, near its middle.
    backbone: a name (see `load_backbone`, also for weights), a Python file or a function. device: see `pick_device`.
    shared: a state_dict from `fit_collective`; without it config.shared_epochs has no effect.
    Raises ValueError for an image, a prompt or a backbone that cannot be used, OSError if weights cannot be had.
    """
    device = pick_device(device)
    extract = backbone if callable(backbone) else load_backbone(backbone, weights, device)
    photo = load_image(image)
    view, features, node_weights = extract_nodes(photo, config, extract, device, box, point)
    adjacency = build_graph(features, config.tau, node_weights)
    fitted = fit(features, adjacency, config, shared)
    maps = make_mask(view, fitted.assignment, adjacency, node_weights, config)
    if not maps["mask"].any():
        excluded = (view.field_of_view == 0).float().mean().item()
        reason = "no communities were found" if fitted.modularity < MIN_MODULARITY else "no patch is more likely object"
        log.warning("%s: the mask is empty: %s; %.0f %% of the image is excluded as dark frame, sticker or transparent",
                    image if isinstance(image, (str, Path)) else "the image", reason, 100 * excluded)  # fmt: skip
    return Segmentation(photo[..., :3], **maps, view=view, features=features, node_weights=node_weights, fit=fitted,
                        backbone=getattr(extract, "__name__", "extract"))  # fmt: skip


# Pictures, by torchvision, which is imported where it is used as that takes over a second ----------------------

PALETTE = [(0, 0, 0), (0, 200, 120), (240, 200, 0), (60, 120, 240), (230, 60, 60), (160, 80, 200), (0, 200, 220),
           (250, 130, 180)]  # fmt: skip


def overlay(rgb, mask):
    """The image (height,width,3) uint8 with the mask (height,width) bool tinted: a PIL image."""
    from torchvision.utils import draw_segmentation_masks

    image = torch.from_numpy(rgb.transpose(2, 0, 1).copy())
    tinted = draw_segmentation_masks(image, torch.from_numpy(mask), alpha=0.4, colors=[PALETTE[1]])
    return Image.fromarray(tinted.permute(1, 2, 0).numpy())


def palette_image(labels):
    """Labels (height,width) uint8 as a palette image: its pixels are the labels, its palette makes them visible."""
    picture = Image.fromarray(labels)
    picture.putpalette(np.ravel(PALETTE).tolist())
    return picture


def captioned_grid(pictures, size, columns):
    """Pairs (caption, PIL image), the images resized to (width, height), in a grid of so many columns: a PIL image."""
    from torchvision.transforms.functional import to_pil_image, to_tensor
    from torchvision.utils import make_grid

    # By the nearest neighbour, as patches are squares. The captions are written into the padding
    tiles = [to_tensor(picture.resize(size, Image.NEAREST)) for _, picture in pictures]
    grid = to_pil_image(make_grid(tiles, nrow=columns, padding=24, pad_value=1.0))
    for number, (caption, _) in enumerate(pictures):
        corner = 24 + number % columns * (size[0] + 24), 4 + number // columns * (size[1] + 24)
        ImageDraw.Draw(grid).text(corner, caption, "black", ImageFont.load_default(14))
    return grid


def explain(result, config):
    """The stages of a Segmentation side by side: a PIL image. The blue patch is the surest one of the object."""
    view, object_share = result.view, result.assignment[..., -1].ravel()
    adjacency = build_graph(result.features, config.tau, result.node_weights)
    node = int((object_share * result.node_weights.cpu().numpy()).argmax())
    with torch.no_grad():
        layer = result.fit.network.series[0][0]
        _, score_dst, score_src = layer.project(centre_and_scale(result.features, adjacency))
        alpha = attention_weights(score_dst[:, node : node + 1], score_src, adjacency[node : node + 1])  # (H,1,N)
    components = pca(result.features.cpu(), 3).numpy()
    maps = [(components - components.min(0)) / np.ptp(components, axis=0).clip(min=1e-6)]  # (N,3) in [0,1] each
    for values in (adjacency[node].cpu().numpy(), alpha.mean((0, 1)).cpu().numpy(), object_share):
        share = values[:, None] / max(values.max(), 1e-12)
        maps.append((3 * share - np.arange(3)).clip(0, 1))  # from black for 0 over red and yellow to white
    maps[1][node] = maps[2][node] = 0, 0.63, 1
    located = Image.fromarray((view.image.permute(1, 2, 0) * 255).byte().numpy())
    y0, x0, y1, x1 = view.ellipse
    ImageDraw.Draw(located).ellipse((x0, y0, x1, y1), outline=PALETTE[1], width=3)
    y0, x0, y1, x1 = view.crop
    segmented = overlay(result.image, result.mask).crop((x0, y0, x1, y1)).resize(located.size)
    pictures = [Image.fromarray((values.reshape(*view.grid, 3) * 255).astype(np.uint8)) for values in maps]
    captions = ["1  where the object is, roughly", f"2  features ({Path(result.backbone).name}), PCA",
                "3  graph: edges of the blue patch", "4  its attention, first layer", "5  soft assignment",
                "6  mask"]  # fmt: skip
    return captioned_grid([*zip(captions, [located, *pictures, segmented])], located.size, columns=3)


# Command line --------------------------------------------------------------------------------------------------

SUFFIXES = {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".tif", ".tiff", ".bmp", ".webp", ".gif", ".ppm", ".pgm", ".pbm"}
OUTPUTS = {  # what each is, and the function of a Segmentation and a Config that makes its PIL image
    "mask": ("255 for the object", lambda result, _: Image.fromarray(result.mask.astype(np.uint8) * 255)),
    "probability": ("8 bit", lambda result, _: Image.fromarray((result.probability * 255).round().astype(np.uint8))),
    "labels": ("the clusters as a palette image", lambda result, _: palette_image(result.labels)),
    "overlay": ("the mask over the photograph", lambda result, _: overlay(result.image, result.mask)),
    "explain": ("the stages side by side", explain),
}


def parse_numbers(text):
    """A text such as 10,20.5,80 as a tuple of numbers."""
    return tuple(int(number) if number.strip().isdigit() else float(number) for number in text.split(","))


def add_common_flags(parser, presets):
    """Add the flags that both programs have: the backbone, the device, and one for every field of Config."""
    add = parser.add_argument
    add("--backbone", default="auto", help="dino; builtin, the colour alone; auto (default), either; or FILE.py")
    add("--weights", type=Path, help="file with DINO's weights; default: torch.hub's, or a download")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    add("--quiet", action="store_true", help="print no progress; warnings, errors and the table of eval.py remain")
    add("--preset", choices=presets, help="settings of the paper, where it states them; other flags override them")
    group = parser.add_argument_group("hyper-parameters (source of the default in brackets)")
    for field in dataclasses.fields(Config):
        kind, default, info = type(field.default), field.default, field.metadata
        kwargs = {"type": parse_numbers if kind is tuple else kind, "choices": info["choices"]}
        if kind is bool:
            kwargs = {"action": argparse.BooleanOptionalAction}
        text = f"{info['help']}; default {default} [{info['source']}]"
        group.add_argument("--" + field.name.replace("_", "-"), default=default, help=text, **kwargs)


def parse_args(parser, argv=None, presets=PRESETS):
    """The parsed arguments, and their Config; a preset changes the defaults, flags that are given override it."""
    parser.set_defaults(**presets.get(parser.parse_args(argv).preset, {}))
    args = parser.parse_args(argv)
    return args, Config(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Config)})


def build_parser():
    """The parser of the command line."""
    text = "Unsupervised segmentation of medical photographs (UnSegMedGAT). Not a medical device."
    epilog = "Exit code: 0 all images done, 1 some image failed, 2 wrong use, 130 interrupted. Outputs appear whole."
    parser = argparse.ArgumentParser("unsegmedgat.py", description=text, epilog=epilog)
    add = parser.add_argument
    add("images", nargs="+", type=Path, help="images, or folders of images")
    add("-o", "--output", type=Path, required=True, help="the mask, a .png file, for one image; a folder for several")
    prompt = {"type": parse_numbers, "action": "extend", "default": []}
    add("--point", metavar="X,Y", help="px, near the middle of the object", **prompt)
    add("--box", metavar="X0,Y0,X1,Y1", help="px, a rectangle around the object, tight or loose", **prompt)
    for kind in [*OUTPUTS][1:]:
        add(f"--{kind}", action="store_true", help=f"also write MASK_{kind}.png, {OUTPUTS[kind][0]}")
    add("--skip-existing", action="store_true", help="skip images whose outputs all exist")
    add_common_flags(parser, PRESETS)
    return parser


def is_image(path):
    """Whether a file is taken for an image, by its name."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and not path.is_dir()


def plan_outputs(args):
    """Pairs (image, {kind: output path}). Raises ValueError if two outputs share a path, or one overwrites an input."""
    images, output, plan = [], args.output, []
    for path in args.images:
        entries = sorted(path.glob("[!.]*")) if path.is_dir() else [path]
        found = list(filter(is_image, entries)) if path.is_dir() else [path]
        if len(found) < len(entries):
            log.warning("%s: %d entries are skipped, as they are no images", path, len(entries) - len(found))
        images += found
    is_folder = output.is_dir() or not output.suffix
    if not images or not is_folder and (len(images) > 1 or output.suffix.lower() != ".png"):
        raise ValueError(f"{output}: {len(images)} images were found; -o ends in .png for one, is a folder for several")
    if not os.access(output if output.is_dir() else output.parent, os.W_OK):
        raise ValueError(f"{output}: there is no such folder, or no permission to write there")
    taken = {os.path.realpath(image) for image in images}
    if os.path.realpath(output) in map(os.path.dirname, taken):
        raise ValueError(f"{output}: holds input images; choose another folder for the masks")
    for image in images:
        mask = output / f"{image.stem}.png" if is_folder else output
        extras = [kind for kind in OUTPUTS if getattr(args, kind, False)]
        outputs = {"mask": mask} | {kind: mask.with_name(f"{mask.stem}_{kind}.png") for kind in extras}
        for path in outputs.values():
            if path.is_dir() or os.path.realpath(path) in taken:
                raise ValueError(f"{path}: the output for {image} would overwrite an input, a folder or another output")
            taken.add(os.path.realpath(path))
        plan.append((image, outputs))
    return plan


@contextlib.contextmanager
def atomic_write(path):
    """Yield a path to write a file to, then move this to `path`, which appears whole or not at all."""
    with tempfile.TemporaryDirectory(prefix=".", dir=path.parent) as folder:
        part = Path(folder) / "part"  # a name that no program takes for an image
        yield part
        os.replace(part, path)


def print_line(text):
    """Print a line. If that fails (`| head`, a closed terminal, a full disk), print nothing from then on."""
    try:
        print(text + "\n", end="", flush=True)  # in one piece, as several ranks may print
    except OSError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  it stays open to the end of the process


def rank_and_world():
    """The rank of this process and the number of processes; (0, 1) outside a torch.distributed run."""
    several = distributed.is_available() and distributed.is_initialized()  # some builds of torch have no distributed
    return (distributed.get_rank(), distributed.get_world_size()) if several else (0, 1)


def segment_all(args, config):
    """Segment the images of parsed arguments; returns the exit code. Raises ValueError or OSError for wrong use."""
    if (len(args.point), len(args.box)) not in ((0, 0), (2, 0), (0, 4)):
        raise ValueError("one object is segmented: give one --point X,Y or one --box X0,Y0,X1,Y1")
    prompt = {"point": args.point or None, "box": args.box or None}
    plan, (rank, world), device = plan_outputs(args), rank_and_world(), pick_device(args.device)
    backbone, shared, code = load_backbone(args.backbone, args.weights, device, not args.quiet), None, 0
    plan[0][1]["mask"].parent.mkdir(exist_ok=True)
    if config.shared_epochs:  # over all images on every rank, so that all ranks have the same parameters
        nodes = [lambda image=image: extract_nodes(load_image(image), config, backbone, device, **prompt)[1:]
                 for image, _ in plan]  # fmt: skip
        shared = fit_collective(nodes, config, device, args.quiet or rank > 0)
    for number, (image, outputs) in list(enumerate(plan, 1))[rank::world]:
        if args.skip_existing and all(path.exists() for path in outputs.values()):
            continue
        try:
            result = segment(image, config, **prompt, backbone=backbone, device=device, shared=shared)
            for kind, path in outputs.items():
                with atomic_write(path) as part:
                    OUTPUTS[kind][1](result, config).save(part, format="PNG")
            if not args.quiet:
                text = f"foreground {result.mask.mean():.1%}, modularity {result.fit.modularity:.3f}"
                print_line(f"[{number}/{len(plan)}] {image} -> {outputs['mask']}  {text}, backbone {result.backbone}")
        except Exception as error:  # whatever happens to one image, the others are done
            log.error("%s: %s", image, one_line(error))
            code = 1
    if world > 1:
        distributed.barrier()  # as torchrun ends all ranks when one has failed
    return code


def run_program(program):
    """The exit code of program(): what it returns, 2 after an error, logged in one line, or 130 after an interrupt."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    warnings.filterwarnings("ignore", module=r"PIL\.|torch\.serialization")  # what they warn of ends in an error here
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has not
        sys.stdout.reconfigure(errors="backslashreplace")  # for file names that the terminal cannot show
    try:
        if {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys():  # torchrun's: its processes share the images
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
            # gloo, as NCCL needs a GPU for each rank; a day, as the slowest rank may be late
            distributed.init_process_group("gloo", timeout=timedelta(days=1))
        return program()
    except (ValueError, OSError, RuntimeError, AssertionError) as error:  # the last one: no such device
        log.error("%s", one_line(error))
        return 2
    except KeyboardInterrupt:
        log.error("interrupted; what is written is whole")
        return 130


def main(argv=None):
    """The command line; returns the exit code."""
    return run_program(lambda: segment_all(*parse_args(build_parser(), argv)))


if __name__ == "__main__":
    sys.exit(main())
