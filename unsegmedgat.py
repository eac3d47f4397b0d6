"""UnSegMedGAT in plain PyTorch: unsupervised segmentation of medical photographs.

Paper: A. Mudit Adityaja, S. J. Shigwan and N. Kumar, "UnSegMedGAT: Unsupervised Medical Image Segmentation using Graph
Attention Networks Clustering". The patches of one image are the nodes of a graph. A small graph attention network is
optimised on that image alone, without labels, until the clusters that it assigns have a high modularity.

    python unsegmedgat.py image.png -o mask.png                        # one photograph
    python unsegmedgat.py image.png -o mask.png --point 210,160        # with a point inside the object
    python unsegmedgat.py photos/ -o masks/ --overlay                  # a folder, with overlays to look at
    torchrun --nproc-per-node=8 unsegmedgat.py photos/ -o masks/       # a data set, on several cores, GPUs or machines

The first part of the file is section II of the paper, equations (1) to (8) in their order, and section III's collective
phase. The second part leads from a photograph to a mask. Where a default differs from the paper, `Config` says so.

Shapes: B images, N = h * w patches (the paper's n), C features (F), K clusters (k), H heads (Z) of width D. A resized
image is (3,s,t), with the paper's s and t; a photograph is (height,width,3).
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import logging
import math
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import threading
import time
import uuid
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from numbers import Integral, Real
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin, UnidentifiedImageError
from scipy import ndimage
from scipy.special import logit
from torch import distributed, nn
from torch.autograd.function import once_differentiable

import bilateral

log = logging.getLogger("unsegmedgat")  # warnings and errors for the user; they go to stderr unless configured

PATCH = 8  # px, the side of a patch: ViT-S/8


# Hyper-parameters ----------------------------------------------------------------------------------------------


def hyperparameter(default, help, source, low=0, high=sys.float_info.max, choices=None):
    """A field of Config: its default, its help text, the source of the default, and its range or its choices."""
    limits = {"low": low, "high": high, "choices": choices}
    return dataclasses.field(default=default, metadata={"help": help, "source": source, **limits})


ACTIVATIONS = {"silu": nn.SiLU, "selu": nn.SELU, "relu": nn.ReLU}


@dataclasses.dataclass(frozen=True)
class Config:
    """Every hyper-parameter, with the source of its default; each is also a flag. Raises ValueError if out of range."""

    # From the paper
    tau: float = hyperparameter(0.3, "similarities up to tau give no edge, eq. (1)", "paper, III", 1e-9, 1 - 1e-9)
    widths: tuple[int, ...] = hyperparameter((128, 64), "m_r, the width of each series of GAT layers", "paper, III")
    layers: int = hyperparameter(2, "t_r, the number of GAT layers in each series", "paper, III", low=1)
    fc_dim: int = hyperparameter(64, "M, the width in which the series are summed, eq. (5)", "paper, III", low=1)
    clusters: int = hyperparameter(2, "K; above 2 the mask is the union of the foreground clusters", "paper", 2, 255)
    activation: str = hyperparameter("silu", "non-linearity of eq. (3)", "paper, III", choices=tuple(ACTIVATIONS))
    epochs: int = hyperparameter(60, "largest number of optimiser steps for an image", "paper, III; ISIC: 300", low=1)
    lr: float = hyperparameter(1e-3, "learning rate of AdamW", "paper, III", low=1e-9)
    weight_decay: float = hyperparameter(1e-2, "weight decay of AdamW", "paper: decay factor; authors' code: AdamW")
    shared_epochs: int = hyperparameter(0, "T0, how many of the epochs train parameters that all images share "
                                        "(UnSegMedGATc)", "paper: 5 of 10 for ISIC, 15 of 70 for ColonDB")  # fmt: skip
    refine: bool = hyperparameter(True, "refine the mask with the fast bilateral solver", "paper, Fig. 1")

    # From the authors' code, where the paper gives no value
    size: int = hyperparameter(224, "px of the resized image's shorter side, rounded to a multiple of 8",
                               "authors' code", low=2 * PATCH)  # fmt: skip
    bilateral_lambda: float = hyperparameter(256.0, "lambda, the bilateral solver's smoothness weight", "authors' code")
    keep_components: int = hyperparameter(1, "how many of the largest regions to keep; 0 keeps all", "authors' code")

    # Ours
    stride: int = hyperparameter(8, "px between patches; at 4 or 2 they overlap", "ours; authors: 4", choices=(8, 4, 2))
    colour: float = hyperparameter(0.7, "weight of the colour in a patch's feature, beside the backbone's; 0: backbone "
                                   "alone, 1: colour alone", "ours; paper: 0", high=1)  # fmt: skip
    heads: int = hyperparameter(4, "Z, attention heads, eq. (4); must divide every width", "ours; authors: 1", low=1)
    residual: bool = hyperparameter(True, "add the node's own W h to what eq. (3) aggregates", "ours; paper: no")
    early_stop: float = hyperparameter(0.01, "stop when the last 3 epochs bring less than this fraction of the "
                                       "improvement so far; 0 disables", "ours; paper: 0")  # fmt: skip
    resolution: float = hyperparameter(1.0, "gamma, the modularity's resolution", "ours; paper: 1; authors: 0.5")
    collapse_weight: float = hyperparameter(0.0, "weight of eq. (8)'s second term, which asks for clusters of "
                                            "equal size", "ours; paper: 1")  # fmt: skip
    fade_radii: float = hyperparameter(1.4, "distance from the object's centre, in radii, beyond which node weights "
                                       "fade; 0 disables", "ours; paper: 0")  # fmt: skip
    similarity_weight: float = hyperparameter(16.0, "weight of a patch's mean similarity to object and background in "
                                              "its final log-odds; 0 keeps the network's assignment", "ours; paper: 0", high=1000)  # fmt: skip
    mask_blur: float = hyperparameter(3.0, "px of the resized image, standard deviation of a blur that smooths the "
                                      "outline", "ours; paper: 0", high=100)  # fmt: skip
    invert: bool = hyperparameter(False, "swap foreground and background", "ours")
    seed: int = hyperparameter(0, "seed of the network's initial parameters", "ours", high=2**32 - 1)

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, limits, kind = getattr(self, field.name), field.metadata, type(field.default)
            low, high, choices = limits["low"], limits["high"], (True, False) if kind is bool else limits["choices"]
            if choices:
                valid, expected = isinstance(value, kind) and value in choices, f"one of {choices}"
            elif kind is tuple:
                valid = isinstance(value, tuple) and value and all(isinstance(n, Integral) and n >= 1 for n in value)
                expected = "a tuple of positive integers"
            else:
                number = isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
                valid = number and low <= value <= high
                span = f"of at least {low}" if high == sys.float_info.max else f"from {low} to {high}"
                expected = f"{'an integer' if kind is int else 'a number'} {span}"
            if not valid:
                raise ValueError(f"{field.name} must be {expected}, got {value!r}")
        if any(width % self.heads for width in self.widths):
            raise ValueError(f"widths must be multiples of heads, {self.heads}, got {self.widths}")
        if self.shared_epochs >= self.epochs:
            raise ValueError(f"shared_epochs must be below epochs, {self.epochs}, got {self.shared_epochs}")


# The paper's values, where it states them. Not stated, so not changed: the object's location, the field of view, the
# heads, the scale of X. Its scores are of images cropped to the object.
PRESETS = {"paper": {"colour": 0.0, "residual": False, "early_stop": 0.0, "collapse_weight": 1.0, "fade_radii": 0.0,
                     "similarity_weight": 0.0, "mask_blur": 0.0}}  # fmt: skip


# The paper, section II, from the features of the patches to their clusters =====================================


# Graph, eq. (1) ------------------------------------------------------------------------------------------------


def build_graph(features, tau, node_weights=None):
    """The graph of eq. (1): thresholded cosine similarities of the features.

    features: (N,C). tau: similarities up to it become 0.
    node_weights: (N,) in [0,1], optional and ours; A_ij is multiplied by w_i w_j.
    Returns the adjacency A, (N,N), symmetric; every node has a self-loop unless its weight or its feature is 0.
    """
    f = F.normalize(features, dim=1)
    adjacency = F.threshold_(f @ f.T, tau, 0.0)  # eq. (1): A = f f^T * (f f^T > tau), (N,N)
    return adjacency if node_weights is None else adjacency.mul_(node_weights).mul_(node_weights[:, None])


# Graph attention, eqs. (2) to (4) ------------------------------------------------------------------------------

SLOPE = 0.2  # of LeakyReLU: Velickovic et al. 2018


def attention_weights(score_dst, score_src, adjacency):
    """The attention weights alpha of eq. (2), for every head.

    score_dst, score_src: (H,N), the two parts of a^T [W h_i || W h_j], which is score_dst_i + score_src_j.
    adjacency: (N,N); its positive entries are the edges. Their weights are not used.
    Returns (H,N,N); row i sums to 1 over the neighbours j of node i, and is uniform for a node without neighbours.
    """
    e = F.leaky_relu(score_dst[:, :, None] + score_src[:, None], SLOPE)  # (H,N,N)
    return e.masked_fill(adjacency <= 0, torch.finfo(e.dtype).min).softmax(dim=2)  # eq. (2)


def attention(Wh, score_dst, score_src, adjacency):
    """What each node aggregates from its neighbours: the sum in eq. (3), for every head.

    Wh: the transformed node features W h, (H,N,D). Other arguments as for `attention_weights`.
    Returns (H,N,D); 0 for a node without neighbours.
    """
    connected = (adjacency > 0).any(dim=1)[:, None]  # (N,1)
    return attention_weights(score_dst, score_src, adjacency) @ Wh * connected  # eq. (3), before the non-linearity


class BlockwiseAttention(torch.autograd.Function):
    """The same function as `attention`, in less memory and, on a CPU, in less time.

    The rows of a softmax are independent. Blocks of rows that fit into the processor's cache are computed and dropped,
    and computed again for the gradients from the logarithm of each row's denominator, so that no N x N tensor but the
    graph is kept (Dao et al. 2022, FlashAttention).
    """

    NO_EDGE = -1e30  # score of a pair without an edge

    @staticmethod
    def score_blocks(score_dst, score_src, adjacency):
        """Yield slices of rows, each with its scores e of eq. (2), (H,rows,N)."""
        rows = 64 if adjacency.device.type == "cpu" else 2048
        for start in range(0, len(adjacency), rows):
            block = slice(start, start + rows)
            e = F.leaky_relu_(score_dst[:, block, None] + score_src[:, None], SLOPE)
            yield block, e.masked_fill_(adjacency[block] <= 0, BlockwiseAttention.NO_EDGE)

    @staticmethod
    def exp_(x):
        """exp(x) in place, 0 where x <= -60: products of such small numbers are denormal, which is slow on a CPU."""
        return F.threshold_(x, -60.0, -math.inf).exp_()

    @staticmethod
    def forward(ctx, Wh, score_dst, score_src, adjacency):  # (H,N,D), (H,N), (H,N), (N,N) -> (H,N,D)
        out, logsumexp = torch.empty_like(Wh), torch.empty_like(score_dst)
        for block, e in BlockwiseAttention.score_blocks(score_dst, score_src, adjacency):
            row_max = e.amax(dim=2, keepdim=True)
            numerator = BlockwiseAttention.exp_(e.sub_(row_max))  # of eq. (2), divided by exp(row_max)
            row_sum = numerator.sum(dim=2, keepdim=True)
            connected = row_max > BlockwiseAttention.NO_EDGE
            out[:, block] = numerator @ Wh / row_sum * connected
            # For a node without neighbours inf, so that its alpha is 0
            logsumexp[:, block] = torch.where(connected, row_max + row_sum.log(), math.inf)[..., 0]
        ctx.save_for_backward(Wh, score_dst, score_src, adjacency, out, logsumexp)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # (H,N,D)
        Wh, score_dst, score_src, adjacency, out, logsumexp = ctx.saved_tensors
        # dL/de_ij = alpha_ij (grad_i . Wh_j - grad_i . out_i). The extra column of both factors adds the second term.
        grad_aug = torch.cat([grad, -(grad * out).sum(2, keepdim=True)], dim=2)  # (H,N,D+1)
        Wh_aug = torch.cat([Wh, torch.ones_like(Wh[..., :1])], dim=2).mT.contiguous()  # (H,D+1,N)
        d_Wh, d_dst, d_src = torch.zeros_like(Wh), torch.empty_like(score_dst), torch.zeros_like(score_src)
        for block, e in BlockwiseAttention.score_blocks(score_dst, score_src, adjacency):
            alpha = BlockwiseAttention.exp_(e - logsumexp[:, block, None])  # eq. (2); 0 for a pair without an edge
            d_Wh.baddbmm_(alpha.mT, grad[:, block])
            d_e = (grad_aug[:, block] @ Wh_aug).mul_(alpha)
            d_e = torch.ops.aten.leaky_relu_backward(d_e, e, SLOPE, True)  # True: e is the output of LeakyReLU
            d_dst[:, block] = d_e.sum(2)
            d_src += d_e.sum(1)
        return d_Wh, d_dst, d_src, None


PLAIN_BYTES = 2**28  # size of an (H,N,N) tensor up to which CUDA runs `attention`, which is faster and keeps about 12


class GraphAttention(nn.Module):
    """A multi-head graph attention layer, heads concatenated: eqs. (2) to (4), without the non-linearity.

    The vector a of eq. (2) is [a_dst || a_src]: a_dst for the node i that is updated, a_src for its neighbour j.
    residual: add the node's own W h (ours). Attention ignores edge weights, so in a nearly complete graph all nodes
    aggregate nearly the same average; the residual keeps them distinct.
    """

    def __init__(self, in_features, out_features, heads, residual=True):
        super().__init__()
        self.heads, self.residual = heads, residual
        self.attend = None  # `attention` or `BlockwiseAttention.apply`; None: the faster one
        self.W = nn.Linear(in_features, out_features, bias=False)  # W^z of all heads z, stacked
        self.a_dst = nn.Parameter(torch.empty(heads, out_features // heads))
        self.a_src = nn.Parameter(torch.empty(heads, out_features // heads))
        for parameter in self.parameters():
            nn.init.xavier_uniform_(parameter)  # Velickovic et al. 2018, for a as in PyTorch Geometric

    def project(self, h):
        """h (N,in) -> W h (H,N,D) and the two parts of its scores, (H,N) each."""
        Wh = self.W(h).unflatten(1, (self.heads, -1)).transpose(0, 1).contiguous()  # (H,N,D)
        return Wh, torch.einsum("hnd,hd->hn", Wh, self.a_dst), torch.einsum("hnd,hd->hn", Wh, self.a_src)

    def forward(self, h, adjacency):
        """h (N,in), adjacency (N,N) whose positive entries are the edges -> (N,out)."""
        Wh, score_dst, score_src = self.project(h)
        plain = h.is_cuda and self.heads * adjacency.numel() * h.element_size() <= PLAIN_BYTES
        attend = self.attend or (attention if plain else BlockwiseAttention.apply)
        aggregated = attend(Wh, score_dst, score_src, adjacency)  # eqs. (2), (3): (H,N,D)
        if self.residual:
            aggregated = aggregated + Wh
        return aggregated.transpose(0, 1).flatten(1)  # eq. (4), before the non-linearity: (N,out)


# Network, eq. (5) ----------------------------------------------------------------------------------------------


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
        """Node features X (N,C), adjacency (N,N) -> assignment C (N,K), rows summing to 1.

        The paper's normalised adjacency gives the same result, as the layers only use which edges there are.
        """
        total = 0
        for layers, fc in zip(self.series, self.fc_branch):
            h = features
            for layer in layers:
                h = self.activation(layer(h, adjacency))  # sigma of eqs. (3), (4); GAT^(r) of eq. (5): (N,m_r)
            total = total + fc(h)  # H^(r) of eq. (5): (N,M)
        return self.fc_out(total).softmax(dim=1)  # C of eq. (5): (N,K)


# Loss, eqs. (6) to (8) -----------------------------------------------------------------------------------------


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


# Optimisation of one image -------------------------------------------------------------------------------------

NODE_RMS_NORM = 4  # root mean square of the norms of the node features X
MIN_MODULARITY = 1e-4  # below it a graph has no communities, as where colours differ by at most 5 grey levels
LOCK = threading.Lock()  # for torch's random state, which all threads share, and for CUDA graph capture


def centre_and_scale(features, adjacency):
    """The node features X (N,C) of eq. (5) from f (N,C): their mean is subtracted, and their norms are about 4.

    The paper leaves the scale open. A mean far larger than the deviations from it, as in DINO's keys, saturates the
    softmax of eq. (5) within a few steps. Means are weighted by degree, as in eq. (6).
    """
    share = F.normalize(adjacency.sum(1), p=1, dim=0)  # (N,)
    x = features - share @ features
    return x * (NODE_RMS_NORM / (share @ x.square().sum(1)).sqrt().clamp(min=1e-12))


def seeded_model(build, config, device, lr=None):
    """The module that build() returns, with seeded initial parameters, and its AdamW optimiser."""
    with LOCK, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(config.seed))  # torch.manual_seed would also seed the caller's GPUs
        model = build().to(device)
    adamw_kwargs = {"lr": lr or config.lr, "weight_decay": config.weight_decay}
    capturable = torch.device(device).type == "cuda"  # see `capture_cuda_graph`
    return model, torch.optim.AdamW(model.parameters(), fused=True, capturable=capturable, **adamw_kwargs)


def loss_of(network, x, adjacency, config):
    """The loss of eq. (8) of a network on one image, a scalar tensor. x: (N,C) from `centre_and_scale`."""
    return modularity_loss(network(x, adjacency), adjacency, config.resolution, config.collapse_weight)


def train_step(optimizer, compute_loss):
    """One step of the optimiser; returns the loss before it, a scalar tensor."""
    loss = compute_loss()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.detach()


def has_converged(losses, config):
    """Whether the last 3 epochs brought less than config.early_stop of the improvement over a uniform assignment."""
    uniform_loss = (config.resolution - 1) / config.clusters  # eq. (8) at C_ik = 1 / K
    improvement = uniform_loss - losses[-1]
    if not config.early_stop or len(losses) < 4 or improvement <= MIN_MODULARITY:  # at first the loss is on a plateau
        return False
    return losses[-4] - losses[-1] < config.early_stop * improvement


@dataclasses.dataclass(frozen=True)
class Fit:
    """What `fit` returns."""

    assignment: torch.Tensor  # C (N,K), rows summing to 1; all 1 / K if there are no communities
    losses: list  # the loss before every step
    modularity: float  # Q of the most likely clusters, eq. (6)
    has_communities: bool  # whether Q is at least MIN_MODULARITY
    network: UnSegMedGAT  # after the last step


def fit(features, adjacency, config=Config(), shared=None):
    """Optimise the network on one image alone; returns a Fit.

    features: f (N,C). adjacency: (N,N). shared: a state_dict from `fit_collective`, the initial parameters;
    config.shared_epochs of the epochs are then done already.
    """
    with standard_torch():  # gradients and float32, whatever the caller has set
        x, device = centre_and_scale(features, adjacency), adjacency.device
        network, optimizer = seeded_model(lambda: UnSegMedGAT(x.shape[1], config), config, device)
        if shared is not None:
            network.load_state_dict(shared)
        epoch_step = functools.partial(train_step, optimizer, lambda: loss_of(network, x, adjacency, config))
        losses = []
        for epoch in range(config.epochs - (config.shared_epochs if shared is not None else 0)):
            if epoch == 3 and device.type == "cuda":
                epoch_step = capture_cuda_graph(epoch_step, device)
            losses.append(epoch_step().item())
            if has_converged(losses, config):
                break
        with torch.no_grad():
            assignment = network(x, adjacency)
            clusters = F.one_hot(assignment.argmax(1), config.clusters).to(assignment)
            q = modularity(clusters, adjacency).item()  # eq. (6)
    if not (has_communities := q >= MIN_MODULARITY):  # then no cluster is the object's
        assignment = torch.full_like(assignment, 1 / config.clusters)
    return Fit(assignment, losses, q, has_communities, network)


# UnSegMedGATc: the collective phase, section III ---------------------------------------------------------------


def fit_collective(node_sets, config=Config(), device="cpu", quiet=True):
    """The first phase of UnSegMedGATc: config.shared_epochs passes over all images, one step for each, with parameters
    that all images share.

    node_sets: a list of pairs, the features f (N,C) and the node weights (N,) of an image; N may differ. The graph of
    an image is built when its turn comes, so only one is in memory. quiet: show no progress bar.
    Returns the state_dict that `fit` takes as `shared`, on the CPU; None for an empty list.
    """
    if not node_sets:
        return None
    in_features, steps = node_sets[0][0].shape[1], config.shared_epochs * len(node_sets)
    with standard_torch(), torch.hub.tqdm(total=steps, desc="shared", disable=quiet) as bar:
        network, optimizer = seeded_model(lambda: UnSegMedGAT(in_features, config), config, device)
        for features, node_weights in node_sets * config.shared_epochs:
            features = features.to(device)
            adjacency = build_graph(features, config.tau, node_weights.to(device))
            x = centre_and_scale(features, adjacency)
            train_step(optimizer, functools.partial(loss_of, network, x, adjacency, config))
            bar.update(1)
    return {name: tensor.cpu() for name, tensor in network.state_dict().items()}


# The paper ends here. What follows leads from a photograph to a mask ===========================================


# Torch: CUDA graphs, and the caller's settings -----------------------------------------------------------------


capture_stream = functools.cache(torch.cuda.Stream)  # one for each device, as torch keeps a workspace for each


def capture_cuda_graph(function, device):
    """Capture function() as a CUDA graph, without running it, and return a function that replays it.

    Launching its kernels (340 in an epoch) takes longer than running them. Call function() a few times before: the
    first calls allocate the optimiser's state and cuBLAS workspaces, which cannot be captured.
    """
    graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device)  # sets the device of a new thread
    capture = torch.cuda.graph(graph, stream=capture_stream(device), capture_error_mode="thread_local")
    with LOCK, torch.cuda.stream(current), capture:
        result = function()  # each replay writes its result into this tensor
    return lambda: (graph.replay(), result)[1]


caller_torch = {"threads": 0, "dtype": None}  # how many threads are inside `standard_torch`, and the dtype before


@contextlib.contextmanager
def standard_torch():
    """Torch as this file needs it, whatever its caller has set: gradients, no autocast, float32, the CPU.

    The default dtype belongs to the process: the first thread that enters sets float32, the last one that leaves
    restores the caller's.
    """
    with LOCK:
        if not caller_torch["threads"]:
            caller_torch["dtype"] = torch.get_default_dtype()
            torch.set_default_dtype(torch.float32)
        caller_torch["threads"] += 1
    try:
        with (torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"),
              torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False)):  # fmt: skip
            yield
    finally:
        with LOCK:
            caller_torch["threads"] -= 1
            if not caller_torch["threads"]:
                torch.set_default_dtype(caller_torch["dtype"])


# Reading images ------------------------------------------------------------------------------------------------

MAX_PIXELS = 150_000_000  # larger images are refused before they are decoded: a decompression bomb, or a whole slide
MAX_NODES = 50_000  # larger graphs are refused: the adjacency alone would take over 10 GB


class ImageError(ValueError):
    """An image that cannot be segmented; the message says why, and what to do."""


def one_line(error):
    """The message of an exception, or another text, in one line of at most 300 characters."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def turn_upright(image):
    """Turn a PIL image by its EXIF orientation, in place, or leave it if there is none that can be read."""
    image.load()
    with contextlib.suppress(Exception):  # of many kinds, for bytes that are not EXIF, and from rewriting broken tags
        ImageOps.exif_transpose(image, in_place=True)


def why_unreadable(error):
    """What to tell the user about an exception that Pillow raised while opening or decoding a file."""
    if isinstance(error, UnidentifiedImageError):
        return ("it is damaged, or its format is not one that Pillow reads here (DICOM, NIfTI and HEIC are not): "
                "convert it to PNG")  # fmt: skip
    return getattr(error, "strerror", None) or f"it cannot be decoded ({one_line(error)}): is it damaged or incomplete?"


def load_image(source):
    """Read any still image as RGBA: uint8 (height,width,4), turned upright by its EXIF orientation.

    source: a path, a PIL image, or a uint8 array (height,width) or (height,width,3). Grey images of more than 8 bits
    are scaled by their 0.1 and 99.9 percentiles. Alpha is 255 or, for pixels more than half transparent, 0; these get
    the mean colour of the others.
    Raises ImageError for anything that is not one still image, and for one that is transparent everywhere.
    """
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim not in (2, 3) or source.shape[2:] not in ((), (3,)):
            raise ImageError(f"an array must be uint8, (height,width[,3]), got {source.dtype} {source.shape}")
        source = Image.fromarray(source)
    try:
        PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # some ICC profiles exceed Pillow's 1 MiB
        image = source if isinstance(source, Image.Image) else Image.open(source)
        if image.width * image.height > MAX_PIXELS:
            raise ImageError(f"{image.width} x {image.height} pixels are too many: scale it down first")
        if getattr(image, "is_animated", False) and image.format != "MPO":  # MPO: a phone's photo and its preview
            raise ImageError(f"it holds {image.n_frames} frames: save the one you want as a still image")
        image = image.copy() if image is source else image  # it is turned in place
        turn_upright(image)
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            grey = np.nan_to_num(np.asarray(image, np.float64), posinf=0, neginf=0)
            low, high = np.percentile(grey, (0.1, 99.9))  # a single hot pixel would leave the rest black
            grey = (grey - low) * (255 / max(high - low, 1e-12))
            image = Image.fromarray(np.rint(grey.clip(0, 255)).astype(np.uint8))
        rgba = np.array(image.convert("RGBA"))
    except ImageError:
        raise
    except Image.DecompressionBombError:
        raise ImageError("it would decode to far too many pixels: scale it down first") from None
    except Exception as error:  # Pillow's decoders raise many kinds on a damaged file
        raise ImageError(why_unreadable(error)) from None
    if min(rgba.shape[:2]) < PATCH:
        raise ImageError(f"{rgba.shape[1]} x {rgba.shape[0]} pixels are too few: each side needs at least {PATCH}")
    opaque = rgba[..., 3] >= 128
    if not opaque.any():
        raise ImageError("it is transparent everywhere")
    rgba[..., 3] = opaque * 255
    rgba[~opaque, :3] = rgba[opaque, :3].mean(0)
    return rgba


def patch_grid(sides, stride):
    """The number of patches along the sides of an image, px: (h,w)."""
    return tuple((side - PATCH) // stride + 1 for side in sides)


def resize_image(pixels, size, stride=PATCH):
    """Resize (height,width,C) uint8 to a shorter side of about `size` px, or a longer side of 4 `size` if that is less.

    Returns (C,s,t) in [0,1], s and t multiples of 8.
    """
    height, width = pixels.shape[:2]
    scale = min(size / min(height, width), 4 * size / max(height, width))
    s, t = (max(1, round(side * scale / PATCH)) * PATCH for side in (height, width))
    nodes = math.prod(patch_grid((s, t), stride))
    if nodes > MAX_NODES:
        raise ImageError(f"{width} x {height} pixels make {nodes:,} patches, over {MAX_NODES:,}: use a smaller size")
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
    image = F.interpolate(image, size=(s, t), mode="bilinear", antialias=True, align_corners=False)
    return (image[0] / 255).clamp(0, 1)


def upsample(values, stride):
    """Interpolate patch values (h,w,K) over the resized image that the patches were cut from: (s,t,K)."""
    maps = F.interpolate(values.permute(2, 0, 1)[None], scale_factor=stride, mode="bilinear")  # around patch centres
    return F.pad(maps, [(PATCH - stride) // 2] * 4, mode="replicate")[0].permute(1, 2, 0)


# What is segmented: the photograph, or the surroundings of a box -----------------------------------------------

BOX_MARGIN = 20  # px around the user's box that serve as known background, at least; the margin of the authors' code


@dataclasses.dataclass(frozen=True)
class View:
    """The photograph, or the surroundings of the user's box in it, resized: all that a backbone sees."""

    image: torch.Tensor  # (3,s,t) in [0,1]
    stride: int  # px between patches
    crop: tuple  # (y0, x0, y1, x1) px of the photograph, ends excluded: the part that the image shows
    field_of_view: torch.Tensor  # (s/8,t/8), 1 for the cells of 8 px that can be object, else 0
    search_area: tuple  # (y0, x0, y1, x1) px of the image: the user's box, or the whole image
    opaque: np.ndarray  # (height,width) bool, the pixels of the photograph that are not transparent
    ellipse: tuple = None  # (y, x, ry, rx) px of the image, centre and half axes: the object's rough location
    prompt: str = ""  # what the ellipse was taken from: "box", "point", or "" for the image alone

    @property
    def grid(self):
        """The number of patches: (h,w)."""
        return patch_grid(self.image.shape[1:], self.stride)

    def centres(self):
        """The centres of the patches, px of the image: (h,1) and (1,w)."""
        y, x = (torch.arange(n) * self.stride + PATCH / 2 for n in self.grid)
        return y[:, None], x[None]

    def valid_patches(self):
        """1 for the patches whose centre lies in the field of view, else 0: (h,w)."""
        y, x = ((centres // PATCH).long().flatten() for centres in self.centres())
        return self.field_of_view[y][:, x]

    def distance_in_radii(self):
        """The distance of each patch from the centre of the ellipse, (h,w): 1 on the ellipse."""
        (y, x), (cy, cx, ry, rx) = self.centres(), self.ellipse
        return torch.hypot((y - cy) / ry, (x - cx) / rx)

    def inside_ellipse(self):
        """1 for the patches whose centre lies inside the ellipse, at least the nearest one, else 0: (h,w)."""
        distance = self.distance_in_radii()
        return (distance <= distance.min().clamp(min=1)).float()


def position_in(area, h, w):
    """The positions of cells (h,w) in an area (y0, x0, y1, x1), in cells: (h,1) and (1,w), -1 and 1 on its sides."""
    y0, x0, y1, x1 = area
    y, x = torch.arange(h) + 0.5, torch.arange(w) + 0.5
    return (2 * (y - y0) / (y1 - y0) - 1)[:, None], (2 * (x - x0) / (x1 - x0) - 1)[None]


def rgb_to_lab(image):
    """sRGB (3,s,t) in [0,1] to CIE Lab (3,s,t), L in [0,100], white point D65 (IEC 61966-2-1, CIE 15)."""
    linear = torch.where(image > 0.04045, ((image + 0.055) / 1.055) ** 2.4, image / 12.92)
    to_xyz = image.new_tensor([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = torch.einsum("dc,chw->dhw", to_xyz / to_xyz.sum(1, keepdim=True), linear)  # relative to white
    x, y, z = torch.where(xyz > 0.008856, xyz.clamp(min=1e-6) ** (1 / 3), 7.787 * xyz + 16 / 116)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def border_components(cells, min_distance):
    """The connected components of cells (h,w) bool that touch the image's border, as a mask (h,w) bool.

    min_distance: only those whose mean distance from the middle is larger; 1 is the border. Components that cover
    over 90 % of the image are left out.
    """
    y, x = position_in((0, 0, *cells.shape), *cells.shape)
    distance = torch.maximum(y.abs(), x.abs()).numpy()
    labels, _ = ndimage.label(cells)
    touching = set(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])) - {0}
    kept = [n for n in touching if distance[labels == n].mean() > min_distance and (labels == n).mean() < 0.9]
    return np.isin(labels, kept)


def find_field_of_view(image):
    """The cells of 8 px of an image (3,s,t) that can be object: (s/8,t/8), 1 or 0.

    The dark frame of an endoscope or dermatoscope is excluded, and components of another hue than the middle of the
    image that touch the border and stay near it, such as stickers, rulers and drapes.
    """
    brightness = F.avg_pool2d(image.amax(0)[None], PATCH)[0].numpy()
    h, w = brightness.shape
    dark = border_components(brightness < 0.275 * max(np.quantile(brightness, 0.9), 0.3), 0)
    hue = F.avg_pool2d(rgb_to_lab(image)[1:], PATCH).numpy()  # (2,h,w)
    middle = np.zeros((h, w), bool)
    middle[h // 4 : h - h // 4, w // 4 : w - w // 4] = True
    usual = np.median(hue[:, middle & ~dark if (middle & ~dark).any() else middle], axis=1)
    other_hue = np.hypot(*(hue - usual[:, None, None])) > 36
    other_hue = border_components(other_hue & ~dark, 0.6)
    return torch.from_numpy(~(dark | other_hue)).float()


def check_prompt(name, prompt, height, width):
    """A box (x0, y0, x1, y1) or point (x, y) as a tuple of numbers, or None. Raises ValueError for anything else."""
    if prompt is None:
        return None
    numbers = {"box": "four numbers x0 < x1, y0 < y1", "point": "two numbers"}[name]
    with contextlib.suppress(TypeError, ValueError):  # a ragged list is not an array
        array = np.asarray(prompt)
        if array.shape == ((4,) if name == "box" else (2,)) and array.dtype.kind in "iuf":
            values = tuple(array.tolist())
            x0, y0, x1, y1 = (*values, width, height)[:4]
            if 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height:
                return values
    raise ValueError(f"the {name} must be {numbers} inside the image, {width} x {height}; got {one_line(prompt)}")


def view_photograph(photo, config, box=None):
    """The View of a photograph (height,width,3 or 4) uint8, or of the surroundings of a box (x0, y0, x1, y1) in it."""
    height, width = photo.shape[:2]
    image, (top, left, bottom, right) = resize_image(photo, config.size, config.stride), (0, 0, height, width)
    cells = image.shape[1] // PATCH, image.shape[2] // PATCH
    field_of_view = find_field_of_view(image[:3])  # of the whole photograph
    x0, y0, x1, y1 = box or (0, 0, width, height)
    if box:
        reach = [max(side / 2 + BOX_MARGIN, 0.8 * side) for side in (y1 - y0, x1 - x0)]
        top, left = (max(0, round(at - by)) for at, by in zip(((y0 + y1) / 2, (x0 + x1) / 2), reach))
        bottom, right = (min(end, round(at + by))
                         for end, at, by in zip((height, width), ((y0 + y1) / 2, (x0 + x1) / 2), reach))  # fmt: skip
        image = resize_image(photo[top:bottom, left:right], config.size, config.stride)
    _, s, t = image.shape
    rows = np.linspace(top, bottom, s // PATCH + 1) * cells[0] / height  # of the sides of the cells, from 0 to `cells`
    columns = np.linspace(left, right, t // PATCH + 1) * cells[1] / width
    field_of_view = field_of_view[((rows[1:] + rows[:-1]) / 2).astype(int)][:, ((columns[1:] + columns[:-1]) / 2).astype(int)]
    sy, sx = s / (bottom - top), t / (right - left)
    search_area = (y0 - top) * sy, (x0 - left) * sx, (y1 - top) * sy, (x1 - left) * sx
    if box:  # what lies in it is never excluded
        first_row, first_column = int(search_area[0] // PATCH), int(search_area[1] // PATCH)
        field_of_view[first_row : math.ceil(search_area[2] / PATCH), first_column : math.ceil(search_area[3] / PATCH)] = 1
    opaque = np.ones((height, width), bool)
    if photo.shape[2] == 4:
        opaque = photo[..., 3] > 0
        field_of_view *= (F.avg_pool2d(image[3:], PATCH)[0] > 0.5).float()
    return View(image[:3], config.stride, (top, left, bottom, right), field_of_view, search_area, opaque)


# Features: the keys of DINO's last block -----------------------------------------------------------------------


class Block(nn.Module):
    """A transformer block with multi-head self-attention, its parameters named as in DINO's file."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)})
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, 4 * dim), "fc2": nn.Linear(4 * dim, dim)})

    def qkv(self, x):
        """Queries, keys and values of T tokens, before they are split into heads: (B,T,C) -> (B,T,3C)."""
        return self.attn["qkv"](self.norm1(x))

    def forward(self, x):  # (B,T,C)
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B,H,T,D) each
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
        """The keys of the last block (section II), before they are split into heads: (B,N,C), row-major.

        images: (B,3,s,t), normalised as for ImageNet. stride: px. Raises ValueError if s or t is no multiple of 8.
        """
        proj = self.patch_embed["proj"]
        if images.shape[2] % PATCH or images.shape[3] % PATCH:
            raise ValueError(f"image sides {tuple(images.shape[2:])} must be multiples of the patch, {PATCH}")
        x = F.conv2d(images, proj.weight, proj.bias, stride=stride)  # (B,C,h,w)
        side = math.isqrt(self.pos_embed.shape[1] - 1)
        position = self.pos_embed[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)  # (1,C,28,28)
        # On the CPU, as MPS has no bicubic interpolation
        position = F.interpolate(position.cpu(), size=x.shape[2:], mode="bicubic", align_corners=False)  # (1,C,h,w)
        x = (x + position.to(x.device)).flatten(2).transpose(1, 2)  # (B,N,C)
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        x = torch.cat([cls, x], dim=1)  # (B,1+N,C)
        for block in self.blocks[:-1]:
            x = block(x)
        _, keys, _ = self.blocks[-1].qkv(x).chunk(3, dim=2)  # the last block's keys
        return keys[:, 1:]  # (B,N,C), without the class token


DINO_URL = "https://dl.fbaipublicfiles.com/dino/dino_deitsmall8_pretrain/dino_deitsmall8_pretrain.pth"
DINO_SHA256 = "55c8b267f479b614ec20858947ce361ba804846c193e20be74263a096bb6d75e"
DOWNLOAD_TIMEOUT = 10  # s without an answer from the host


def cached_dino():
    """The path of DINO's backbone file in torch.hub's cache, where it need not exist."""
    return Path(torch.hub.get_dir()) / "checkpoints" / DINO_URL.rsplit("/", 1)[1]


def download_dino(progress=True):
    """Download DINO's backbone file into torch.hub's cache and check its SHA-256. Raises OSError if that fails."""
    path = cached_dino()
    path.parent.mkdir(parents=True, exist_ok=True)
    timeout_before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)  # torch.hub sets none
    try:
        torch.hub.download_url_to_file(DINO_URL, str(path), hash_prefix=DINO_SHA256, progress=progress)
    except Exception as error:  # of many kinds: no connection, a proxy's answer that is not HTTP, another digest
        raise OSError(f"the download from {DINO_URL.split('/')[2]} failed ({one_line(error)})") from None
    finally:
        socket.setdefaulttimeout(timeout_before)


def read_checkpoint(path):
    """The contents of a file that torch.save wrote, tensors only. Raises ValueError, which names the file."""
    try:
        if zipfile.is_zipfile(path):  # torch.save writes a CRC of each tensor, which torch.load does not check
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise ValueError(damaged)
        # The full checkpoint also holds its command line, an argparse.Namespace. Nothing else is allowed
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds. torch's advice to load without weights_only is not passed on
        why = getattr(error, "strerror", None) or "it is damaged, or not a checkpoint of tensors: download it again"
        raise ValueError(f"{path}: cannot be loaded safely: {why}") from None


def read_dino(path, branch):
    """ViT-S/8 with the weights of a file; arguments and errors as for `load_dino`."""
    state, model = read_checkpoint(path), VisionTransformer()
    try:
        if branch in state:  # the full checkpoint, whose branches also have a head
            names = [name for name in state[branch] if "backbone." in name]
            state = {name.rpartition("backbone.")[2]: state[branch][name] for name in names}
        elif branch == "student":
            raise ValueError("there is no student in it; only the full checkpoint holds both branches")
        model.load_state_dict(state)
        for name, tensor in state.items():
            if not tensor.isfinite().all():
                raise ValueError(f"{name} has values that are not finite numbers: download it again")
    except Exception as error:  # of many kinds: not a dictionary, another network
        raise ValueError(f"{path}: is not DINO's ViT-S/8: {one_line(error)}") from None
    return model.eval().requires_grad_(False)


@standard_torch()
def load_dino(weights=None, branch="teacher", progress=True):
    """ViT-S/8 with DINO's weights, in evaluation mode, without gradients.

    weights: a file (the published backbone, timm's copy of it, or the full checkpoint). None: the backbone from
        torch.hub's cache; it is downloaded where it is missing or cannot be read.
    branch: of a full checkpoint, "teacher" (which the backbone file holds) or "student" (which the authors use).
    Raises ValueError for a file that cannot be read or holds other weights, OSError if the download fails.
    """
    if branch not in ("teacher", "student"):
        raise ValueError(f"branch must be teacher or student, got {branch!r}")
    if weights:
        return read_dino(Path(weights), branch)
    if branch == "student":
        raise ValueError("the student is only in DINO's full checkpoint: download that and pass it as --weights FILE")
    path, unreadable = cached_dino(), ""
    if path.is_file():
        try:
            return read_dino(path, branch)
        except ValueError as error:
            unreadable = f"; {error}"
    try:
        download_dino(progress)
    except OSError as error:
        raise OSError(f"{error}{unreadable}") from None
    return read_dino(path, branch)


# Features: the colour, and the choice of a backbone ------------------------------------------------------------

CONSTANT_FEATURE = 50  # in units of Lab


def colour_features(lab, background):
    """Lab colours of patches (N,3) as features (N,4) of norm 1; they need no learned weights.

    background: (N,) weights of the mean that is subtracted. Eq. (1) compares directions, so a constant fourth feature
    keeps patches of nearly the background's colour similar, whatever their noise.
    """
    return F.normalize(F.pad(lab - background @ lab / background.sum(), (0, 1), value=CONSTANT_FEATURE), dim=1)


def join_features(deep, colour, colour_weight):
    """The features of a backbone (N,C) beside those of the colour (N,4), rows of norm 1: (N,C+4).

    Their cosine similarity is the weighted mean of both: (1 - colour_weight) cos(deep) + colour_weight cos(colour).
    """
    if deep is None or colour_weight == 1:
        return colour
    if colour_weight == 0:
        return deep
    return torch.cat([math.sqrt(1 - colour_weight) * deep, math.sqrt(colour_weight) * colour], dim=1)


@dataclasses.dataclass(frozen=True)
class Backbone:
    """What turns a View into patch features."""

    name: str  # "dino", "builtin", the path of a Python file, or any name of your own
    extract: Callable | None  # View -> features (N,C), row-major, of any norm; None: the colour alone


def pick_device(device):
    """A torch.device; "auto" is the current CUDA device, else the CPU. Raises ValueError for a kind that is missing."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(str(device).partition(":")[0], False):
        raise ValueError(f"device {device} is not available on this machine: use --device auto or cpu")
    return torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else torch.device(device)


def load_backbone_file(path):
    """The Backbone of a Python file that defines extract(view): a View -> features (N,C). Raises ValueError if not."""
    if path.suffix != ".py":
        raise ValueError(f"backbone must be auto, dino, builtin or a Python file FILE.py, got {path}")
    if not path.is_file():
        raise ValueError(f"backbone {path}: there is no such file")
    spec = importlib.util.spec_from_file_location(f"backbone_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # for dataclasses in it
    sys.path.append(str(path.parent.resolve()))  # for modules beside it
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever is wrong in it
        raise ValueError(f"backbone {path}: {type(error).__name__}: {one_line(error)}") from error
    if not callable(getattr(module, "extract", None)):
        raise ValueError(f"backbone {path}: it must define a function extract(view) that returns features (N,C)")
    return Backbone(str(path), module.extract)


@functools.lru_cache(maxsize=1)
def load_backbone(backbone="auto", weights=None, branch="teacher", device="auto", progress=True):
    """The Backbone by name: "dino"; "builtin", the colour alone; "auto", DINO if its weights are available, else the
    colour alone; or a Python file, see `load_backbone_file`.

    weights, branch: see `load_dino`. Only "auto" without weights falls back, with a warning. The last result is cached;
    after a change of FILE.py call load_backbone.cache_clear().
    Raises ValueError for other names, and what load_dino and load_backbone_file raise.
    """
    if backbone not in ("auto", "dino"):
        if weights:
            raise ValueError(f"weights are for the dino backbone: leave them out with {backbone}")
        return Backbone("builtin", None) if backbone == "builtin" else load_backbone_file(Path(backbone))
    device = pick_device(device)
    try:
        model = load_dino(weights, branch, progress)
    except OSError as error:
        if backbone == "dino":
            raise
        log.warning("DINO's weights are not available: %s. Using the colour alone instead; for DINO, download %s on "
                    "another machine and pass it as --weights FILE.", error, DINO_URL)  # fmt: skip
        return Backbone("builtin", None)
    model.to(device)

    def extract(view):
        mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]  # ImageNet's
        return model.keys(((view.image - mean) / std)[None].to(device), view.stride)[0]

    return Backbone("dino", extract)


def extract_features(backbone, view, device):
    """A backbone's features of a View: (N,C), rows of norm 1, or None for the colour alone. Raises ValueError."""
    if backbone.extract is None:
        return None
    n = math.prod(view.grid)
    try:
        with torch.no_grad():  # a copy of the image, as it may be changed in place
            features = backbone.extract(dataclasses.replace(view, image=view.image.clone()))
    except (Exception, SystemExit) as error:
        message = f"{type(error).__name__}: {one_line(error)}"
        raise ValueError(f"backbone {backbone.name}: extract failed: {message}") from error
    if not isinstance(features, torch.Tensor):
        raise ValueError(f"backbone {backbone.name}: extract must return a torch tensor, got {type(features).__name__}")
    if features.ndim != 2 or len(features) != n or not features.shape[1]:
        expected = f"({n},C) for {view.grid[0]} x {view.grid[1]} patches"
        raise ValueError(f"backbone {backbone.name}: extract must return features {expected}, got {(*features.shape,)}")
    features = features.detach().to(device, torch.float32)
    if not features.isfinite().all():
        raise ValueError(f"backbone {backbone.name}: extract returned values that are not finite numbers")
    return F.normalize(features, dim=1)


# Where the object is, roughly ----------------------------------------------------------------------------------

DISC_RADII = np.geomspace(0.07, 0.65, 16)  # in shorter sides of the search area
SIZE_EXPONENT, POINT_SIZE_EXPONENT = 0.6, 0.2  # a disc's score grows with its radius, less so where a point is given
POINT_SIGMA = 0.35  # radii, how far the point may be from the centre of its disc
RIM_SHARE, DISTINCT = 0.2, 1.0  # see `box_is_tight`
# Position prior (L, r) for each prompt: log-odds fall linearly from +L at the ellipse's centre, through 0 at r radii,
# to -L at 2 r. An object nearly fills a tight box; a disc is smaller than its object, less so at a point. Tuned.
POSITION_PRIOR = {"box": (8, 1.1), "point": (3, 1.4), "": (2, 1.6)}


def pca(features, components):
    """Features (N,C) on their first principal components: (N,components), or (N,C) where C is smaller."""
    centred = features - features.mean(0)
    _, axes = torch.linalg.eigh(centred.T @ centred)  # ascending
    return centred @ axes.flip(1)[:, :components]


def background_weights(area, field_of_view):
    """The weight of each cell (h,w) as background, in [0,1]: large near the sides of an area, in cells, and outside."""
    y, x = position_in(area, *field_of_view.shape)
    return (0.05 + y**2 + x**2).clamp(max=1) * field_of_view


def remove_trend(features, weights, h, w):
    """Features (N,C) of a grid (h,w) minus their quadratic trend over it, a least-squares fit with weights (N,).

    Learned features vary with the position in the frame, because of zero padding or position embeddings.
    """
    y, x = (side.expand(h, w).flatten() for side in position_in((0, 0, h, w), h, w))
    terms = torch.stack([torch.ones_like(x), x, y, x * x, x * y, y * y], dim=1)  # (N,6)
    weighted = (terms * weights[:, None]).T
    ridge = 1e-3 * weights.sum() * torch.eye(6)
    return features - terms @ torch.linalg.solve(weighted @ terms + ridge, weighted @ features)


def feature_map(features, mean_square, h, w):
    """Features (N,C) of a grid (h,w) as a map (C,h,w), centred, of this mean square, with at most 12 channels."""
    scale = (mean_square / features.var(0, correction=0).sum().clamp(min=1e-24)).sqrt()
    return (pca(features, 12) * scale).T.unflatten(1, (h, w))  # PCA nearly keeps the distances


def disc_contrasts(values, field_of_view, background, radii):
    """The contrast of every disc to the ring around it, and to the background: (R,h,w) each, R radii in cells.

    values: (C,h,w). field_of_view: (h,w), 1 or 0. background: (h,w) weights. A contrast is the distance of two means;
    that to the ring is reduced where disc or ring lie partly outside the field of view.
    """
    h, w = field_of_view.shape
    common = (values * background).sum((1, 2)) / background.sum().clamp(min=1e-6)
    layers = torch.cat([values, torch.ones(1, h, w)]) * field_of_view  # (C+1,h,w), the last one counts cells
    to_ring, to_background = [], []
    for radius in radii:
        reach = int(1.4 * radius + 0.7)  # of the ring
        distance = torch.hypot(*torch.meshgrid([torch.arange(-reach, reach + 1.0)] * 2, indexing="ij"))
        disc = (distance <= radius).float()
        ring = (distance <= 1.4 * radius + 0.7).float() - disc
        sums = F.conv2d(layers[:, None], torch.stack([disc, ring])[:, None], padding=reach)  # (C+1,2,h,w)
        count = sums[-1]
        means = sums[:-1] / count.clamp(min=1)
        visible = count / torch.stack([disc.sum(), ring.sum()]).clamp(min=1)[:, None, None]  # a tiny grid has no ring
        to_ring.append((means[:, 0] - means[:, 1]).norm(dim=0) * visible[0] * visible[1].sqrt())
        to_background.append((means[:, 0] - common[:, None, None]).norm(dim=0))
    return torch.stack(to_ring), torch.stack(to_background)


def find_disc(maps, field_of_view, area, point=None):
    """The disc (row, column, radius), in cells, that stands out from its surroundings: centre-surround contrast.

    maps: one or two (C,h,w). field_of_view: (h,w), 1 or 0. area: (y0, x0, y1, x1) in cells, the search area.
    point: (row, column), given by the user.
    First the most salient point: the centre of the disc with the largest product of its contrasts to its ring and to
    the background (Itti, Koch and Niebur 1998; Achanta et al. 2009), over all maps, as the object stands out in each.
    Then the size: of the discs near that point, or near the user's, the one with the largest contrast to its ring.
    """
    h, w = field_of_view.shape
    y, x = position_in(area, h, w)
    inland = ((1 - y**4).clamp(min=0) * (1 - x**4).clamp(min=0)) ** 2  # an object seldom touches the border
    radii = torch.from_numpy(DISC_RADII).float() * min(area[2] - area[0], area[3] - area[1])
    background = background_weights(area, field_of_view)
    contrasts = [disc_contrasts(values, field_of_view, background, radii) for values in maps]
    radii = radii[:, None, None]

    def best(score):  # (R,h,w)
        number, row, column = np.unravel_index(int(score.argmax()), score.shape)
        return int(row), int(column), float(radii[number])

    exponent = SIZE_EXPONENT if point is None else POINT_SIZE_EXPONENT
    if point is None:
        # The bound keeps the other map's contrasts where one map is constant
        salience = math.prod((to_ring * to_background.sqrt()).clamp(min=1e-12) for to_ring, to_background in contrasts)
        point = best(salience ** (1 / len(maps)) * radii**exponent * inland)[:2]
    point_distance = torch.hypot(torch.arange(float(h))[:, None] - point[0], torch.arange(float(w)) - point[1])
    near = torch.exp(-((point_distance / radii / POINT_SIGMA) ** 2) / 2)
    to_ring = sum(to_ring.square() for to_ring, _ in contrasts).sqrt()  # in the maps side by side
    return best(to_ring * radii**exponent * near)


def box_is_tight(maps, field_of_view, area):
    """Whether the object fills the user's box; if not, it is somewhere inside. Arguments as for `find_disc`.

    The box is loose if, in every map, the rim of the inscribed ellipse is similar to the outside of the box: less than
    RIM_SHARE of the way to the middle. It is taken as tight if in a map middle and outside differ by less than DISTINCT
    standard deviations, as such a map cannot tell.
    """
    y, x = position_in(area, *field_of_view.shape)
    distance, visible = torch.hypot(y, x), field_of_view > 0
    middle, rim = visible & (distance <= 0.5), visible & (distance > 0.7) & (distance <= 1)
    outside = visible & ((y.abs() > 1) | (x.abs() > 1))
    if not (middle.any() and rim.any()):
        return True
    if not outside.any():  # the box is the whole photograph
        return False
    for values in maps:
        inner, edge, outer = (values[:, cells].mean(1) for cells in (middle, rim, outside))
        axis = F.normalize(inner - outer, dim=0)
        spread = torch.stack([(axis @ values[:, cells]).var(correction=0) for cells in (middle, outside)]).mean().sqrt()
        step = axis @ (inner - outer)
        if step <= DISTINCT * spread or axis @ (edge - outer) > RIM_SHARE * step:
            return True
    return False


def locate_object(view, deep, lab, config, box=None, point=None):
    """The View with the object's ellipse: the user's box if it is tight, else the disc from `find_disc`.

    deep: a backbone's features (N,C), or None. lab: colours of the patches (N,3). box, point: as in `segment`.
    """

    def cells(values):  # the patches that do not overlap, one for each cell of 8 px
        step = PATCH // view.stride
        return values.unflatten(0, view.grid)[::step, ::step].flatten(0, 1)

    (h, w), area = view.field_of_view.shape, [side / PATCH for side in view.search_area]
    background = (background_weights(area, view.field_of_view) + 1e-3).flatten()
    colour_weight = 1 if deep is None else config.colour
    maps = []  # one or two, weighted as in `join_features`
    if deep is not None:
        maps.append(feature_map(remove_trend(cells(deep).cpu(), background, h, w), 1 - colour_weight, h, w))
    if colour_weight:
        maps.append(feature_map(colour_features(cells(lab), background), colour_weight, h, w))
    if box and box_is_tight(maps, view.field_of_view, area):
        y0, x0, y1, x1 = view.search_area
        ellipse = (y0 + y1) / 2, (x0 + x1) / 2, (y1 - y0) / 2, (x1 - x0) / 2
        return dataclasses.replace(view, ellipse=ellipse, prompt="box")
    searched = view.field_of_view
    if point:
        top, left, bottom, right = view.crop
        point = (point[1] + 0.5) * h / (bottom - top) - 0.5, (point[0] + 0.5) * w / (right - left) - 0.5
        at = min(max(round(point[0]), 0), h - 1), min(max(round(point[1]), 0), w - 1)
        searched = searched if searched[at] else torch.ones(h, w)  # what the user points at is no frame
    row, column, radius = find_disc(maps, searched, area, point)
    ellipse = PATCH * (row + 0.5), PATCH * (column + 0.5), PATCH * radius, PATCH * radius
    view = dataclasses.replace(view, ellipse=ellipse)
    if point:
        distance = torch.hypot(torch.arange(float(h))[:, None] - row, torch.arange(float(w)) - column) / radius
        near = (distance <= POSITION_PRIOR["point"][1]).float()  # the object is larger than the disc
        view = dataclasses.replace(view, prompt="point", field_of_view=torch.maximum(view.field_of_view, near))
    return view


def weigh_nodes(view, fade_radii):
    """The weight of each patch, (N,) in [0,1]: 0 outside the field of view, falling beyond `fade_radii` radii of the
    ellipse; a fade_radii of 0 disables the fall."""
    fade = torch.exp(-((view.distance_in_radii() / fade_radii) ** 4) / 2) if fade_radii else torch.ones(view.grid)
    fade = F.threshold(fade, 1e-6, 0.0)  # products of smaller weights are denormal, which is slow on a CPU
    return (fade * view.valid_patches()).flatten()


@standard_torch()
def extract_nodes(photo, config, backbone, device="cpu", box=None, point=None):
    """The nodes of a photograph's graph: its View with the object's ellipse, the features f (N,C), node weights (N,).

    photo: (height,width,3) uint8, or (height,width,4) from `load_image`. box, point: as in `segment`.
    Raises ValueError for a box or point that cannot be used, or both, and for a backbone that fails.
    """
    if box is not None and point is not None:
        raise ValueError("a box and a point are given: give one of them")
    box, point = check_prompt("box", box, *photo.shape[:2]), check_prompt("point", point, *photo.shape[:2])
    view = view_photograph(photo, config, box)
    deep = None if config.colour == 1 else extract_features(backbone, view, device)
    lab = F.avg_pool2d(rgb_to_lab(view.image), PATCH, view.stride).flatten(1).T  # (N,3)
    view = locate_object(view, deep, lab, config, box, point)
    background = (view.distance_in_radii() > 1) * view.valid_patches() + 1e-3
    colour = colour_features(lab, background.flatten()).to(device)
    features = join_features(deep, colour, config.colour)
    return view, features, weigh_nodes(view, config.fade_radii).to(device)


# From the clusters to a mask -----------------------------------------------------------------------------------

def order_clusters(view, assignment, node_weights):
    """The clusters in order from background to object: the assignment (N,K), and the number of background clusters.

    A cluster is foreground if it is more common inside the ellipse than in the whole graph, nodes counting by weight.
    Of two clusters exactly one is, unless both are equally common. The rule is ours, as the paper states none.
    """
    inside_weights = view.inside_ellipse().flatten().to(node_weights) * node_weights  # (N,)
    inside, overall = (weights @ assignment / weights.sum().clamp(min=1e-6)
                       for weights in (inside_weights, node_weights))  # (K,) each  # fmt: skip
    excess = inside / overall.clamp(min=1e-6) - 1
    return assignment[:, excess.argsort()], int((excess <= 1e-4).sum())  # 1e-4 for rounding


def select_foreground(view, assignment, n_background, adjacency, node_weights, config):
    """The probability of each patch to be object, (N,) in [0,1].

    assignment: (N,K) from `order_clusters`; its first n_background clusters are background. adjacency: (N,N).
    It is the sum of the foreground clusters if config.similarity_weight is 0 or there are none. Otherwise each patch is
    judged again, as modularity assigns patches between two clusters to the smaller one with full confidence. Its
    log-odds are the position prior plus similarity_weight times the logarithm of (mean similarity to the foreground /
    to the background). Nodes of weight 0, which have no edges, are background.
    """
    foreground = assignment[:, n_background:].sum(1)
    if config.similarity_weight and n_background < config.clusters:
        membership = torch.stack([foreground, 1 - foreground], dim=1)  # (N,2)
        mean_similarity = adjacency @ membership  # of patch i: w_i sum_j w_j membership_j f_i f_j
        mean_similarity = mean_similarity / node_weights.clamp(min=1e-12)[:, None]
        mean_similarity = mean_similarity / (node_weights @ membership).clamp(min=1e-6)  # (N,2) in [0,1]
        logs = mean_similarity.clamp(min=0.01).log()  # smaller similarities are noise
        log_odds = config.similarity_weight * (logs[:, 0] - logs[:, 1])
        strength, radius = POSITION_PRIOR[view.prompt]
        prior = strength * (1 - view.distance_in_radii() / radius).clamp(min=-1).flatten()
        foreground = torch.sigmoid(log_odds + prior.to(log_odds))
    return foreground * (node_weights > 0)


def refine_maps(view, maps, config):
    """Maps over the resized image (s,t,M), the foreground first: refined by the bilateral solver and smoothed."""
    if config.refine:
        guide = (view.image * 255).round().byte().permute(1, 2, 0).numpy()
        # Confidence is twice |log-odds| of the foreground: where patches are unsure, colours decide. At odds of 5 to 3
        # it is about the 0.999 that the authors' code gives every pixel, so their lambda holds. Clipped to at most 32.
        confidence = 2 * np.abs(logit(maps[..., 0].clip(1e-7, 1 - 1e-7))) if config.similarity_weight else 0.999
        maps = bilateral.solve(maps, guide, confidence, smoothness=config.bilateral_lambda).astype(np.float32)
    return ndimage.gaussian_filter(maps, (config.mask_blur, config.mask_blur, 0))


def clean_mask(mask, keep_components):
    """A mask (height,width) bool with its holes filled and only its largest connected regions, or all for 0."""
    mask = ndimage.binary_fill_holes(mask)
    if keep_components:
        labels, _ = ndimage.label(mask)
        area = np.bincount(labels.ravel())[1:]  # without label 0, the background
        mask = np.isin(labels, 1 + np.argsort(-area, kind="stable")[:keep_components])
    return mask


def make_mask(view, assignment, adjacency, node_weights, config):
    """The clusters of the patches, assignment (N,K), as maps over the photograph.

    Returns a dictionary: the mask, probability and labels of a Segmentation, and the ordered assignment.
    """
    assignment, n_background = order_clusters(view, assignment, node_weights)
    foreground = select_foreground(view, assignment, n_background, adjacency, node_weights, config)
    maps = torch.cat([foreground[:, None], assignment], dim=1).cpu().unflatten(0, view.grid)
    maps = upsample(maps, view.stride).numpy()  # (s,t,1+K)
    refined = 1 if config.clusters == 2 else 1 + config.clusters  # for two clusters the foreground is enough
    maps = np.concatenate([refine_maps(view, maps[..., :refined], config), maps[..., refined:]], axis=2)

    y0, x0, y1, x1 = view.crop
    shown = y1 - y0, x1 - x0  # height and width of what the View shows
    maps = torch.from_numpy(maps).permute(2, 0, 1)[None]
    maps = F.interpolate(maps, size=shown, mode="bilinear", antialias=True)[0].numpy()  # (1+K,*shown)
    sy, sx = shown[0] / view.image.shape[1], shown[1] / view.image.shape[2]
    top, left, bottom, right = (round(side * by) for side, by in zip(view.search_area, (sy, sx, sy, sx)))

    size = view.opaque.shape
    probability, labels = np.zeros(size, np.float32), np.zeros(size, np.uint8)  # 0 outside the search area
    probability[y0:y1, x0:x1][top:bottom, left:right] = maps[0, top:bottom, left:right].clip(0, 1)
    probability *= view.opaque
    mask = clean_mask(probability > 0.5, config.keep_components) & view.opaque
    # The most likely cluster: of the foreground clusters inside the mask, of the others outside
    allowed = (np.arange(config.clusters) >= n_background)[:, None, None] == mask[y0:y1, x0:x1]
    labels[y0:y1, x0:x1] = np.where(allowed, maps[1:], -np.inf).argmax(0)
    if config.invert and n_background < config.clusters:  # without an object there is nothing to swap
        mask, probability, labels = ~mask, 1 - probability, config.clusters - 1 - labels
        assignment = assignment.flip(1)
    assignment = assignment.cpu().unflatten(0, view.grid).numpy()
    return {"mask": mask, "probability": probability, "labels": labels, "assignment": assignment}


# The whole method ----------------------------------------------------------------------------------------------


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
    network: UnSegMedGAT  # after the last step
    modularity: float  # Q of the clusters, eq. (6); near 0 where the graph has no communities
    losses: list  # the loss before every step
    backbone: str  # its name
    seconds: dict  # wall-clock time of each stage


def why_empty(view, fitted):
    """Why the mask of a View and its Fit is empty: a text."""
    excluded = 1 - view.field_of_view.mean().item()
    if excluded == 1:
        return "all of the image is taken for a dark frame, for a sticker, or transparent"
    if not fitted.has_communities:
        return f"no communities were found in {len(fitted.losses)} epochs"
    return f"nothing is more likely object than background; {excluded:.0%} of the image is excluded as frame or sticker"


@standard_torch()
def segment(image, config=Config(), *, box=None, point=None, backbone="auto", weights=None, branch="teacher",
            device="auto", shared=None, progress=False):  # fmt: skip
    """Segment one photograph: the whole method.

    image: a path, a PIL image, or a uint8 array (height,width,3) or (height,width).
    box: (x0, y0, x1, y1) px, ends excluded: the object is inside this rectangle, tight or loose; the rest is
        background.
    point: (x, y) px, near the middle of the object. Without box and point the object is searched in the whole image.
    backbone: "auto", "dino", "builtin", a Python file, or a Backbone; weights, branch: see `load_backbone`.
    device: "auto", "cpu", "cuda" or "mps".
    shared: a state_dict from `fit_collective`; without it config.shared_epochs has no effect.
    progress: show a progress bar while DINO's weights are downloaded.
    Returns a Segmentation. Raises ImageError for an image that cannot be segmented, and ValueError or OSError for a
    prompt, weights, a backbone or a device that cannot be used.
    """
    device = pick_device(device)
    if not isinstance(backbone, Backbone):
        backbone = load_backbone(backbone, weights, branch, device, progress)
    clock = [time.perf_counter()]
    photo = load_image(image)
    clock.append(time.perf_counter())
    view, features, node_weights = extract_nodes(photo, config, backbone, device, box, point)
    clock.append(time.perf_counter())
    adjacency = build_graph(features, config.tau, node_weights)
    fitted = fit(features, adjacency, config, shared)
    clock.append(time.perf_counter())
    maps = make_mask(view, fitted.assignment, adjacency, node_weights, config)
    clock.append(time.perf_counter())
    if not maps["mask"].any():
        name = image if isinstance(image, (str, Path)) else "the image"
        log.warning("%s: the mask is empty: %s", name, why_empty(view, fitted))
    seconds = dict(zip(("read", "features", "fit", "mask"), np.diff(clock).tolist()))
    return Segmentation(image=photo[..., :3], **maps, view=view, features=features, node_weights=node_weights,
                        network=fitted.network, modularity=fitted.modularity, losses=fitted.losses,
                        backbone=backbone.name, seconds=seconds)  # fmt: skip


# Pictures ------------------------------------------------------------------------------------------------------

MASK_COLOUR = (0, 200, 120)
PALETTE = (0, 0, 0, *MASK_COLOUR, 240, 200, 0, 60, 120, 240, 230, 60, 60, 160, 80, 200, 0, 200, 220, 250, 130, 180)


def draw_contour(rgb, mask, colour, width):
    """Draw the outline of a mask (height,width) bool into an image (height,width,3) uint8, inwards, `width` px."""
    rgb[mask ^ ndimage.binary_erosion(mask, iterations=width)] = colour


def overlay(rgb, mask):
    """The image (height,width,3) uint8 with the mask (height,width) bool tinted and outlined: a PIL image."""
    tinted = np.where(mask[..., None], 0.8 * rgb + np.multiply(0.2, MASK_COLOUR), rgb).astype(np.uint8)
    draw_contour(tinted, mask, MASK_COLOUR, max(1, round(min(mask.shape) / 200)))
    return Image.fromarray(tinted)


def heatmap(values):
    """Values (h,w) in [0,1] as colours from black over red and yellow to white: a PIL image."""
    return Image.fromarray((np.clip(np.asarray(values)[..., None] * 3 - np.arange(3), 0, 1) * 255).astype(np.uint8))


def captioned(text, picture, size):
    """A PIL image resized to (width, height), below its caption."""
    of_patches = min(picture.size) < min(size) / 2  # these are shown as squares
    framed = Image.new("RGB", (size[0], size[1] + 24), "white")
    framed.paste(picture.resize(size, Image.NEAREST if of_patches else Image.LANCZOS), (0, 24))
    ImageDraw.Draw(framed).text((2, 3), text, "black", ImageFont.load_default(14))
    return framed


def image_grid(tiles, columns):
    """PIL images of one size in a grid of so many columns: a PIL image."""
    from torchvision.transforms.functional import to_pil_image, to_tensor  # they take over a second to import
    from torchvision.utils import make_grid

    return to_pil_image(make_grid([to_tensor(tile) for tile in tiles], nrow=columns, padding=6, pad_value=1.0))


def explain(result, config):
    """The stages of a Segmentation side by side: a PIL image. The blue patch is the surest one of the object."""
    view, (h, w) = result.view, result.view.grid
    located, (y, x, ry, rx) = Image.fromarray((view.image * 255).byte().permute(1, 2, 0).numpy()), view.ellipse
    ImageDraw.Draw(located).ellipse((x - rx, y - ry, x + rx, y + ry), outline=MASK_COLOUR, width=3)

    components = F.pad(pca(result.features.cpu(), 3), (0, max(0, 3 - result.features.shape[1])))
    low, high = components.quantile(0.02, dim=0), components.quantile(0.98, dim=0)
    colours = ((components - low) / (high - low).clamp(min=1e-6)).clamp(0, 1).unflatten(0, (h, w)).numpy()

    adjacency = build_graph(result.features, config.tau, result.node_weights)
    x = centre_and_scale(result.features, adjacency)
    node = int((torch.from_numpy(result.assignment[..., -1]).flatten() * result.node_weights.cpu()).argmax())
    with torch.no_grad():
        _, score_dst, score_src = result.network.series[0][0].project(x)  # the first layer of the first series
        alpha = attention_weights(score_dst[:, node : node + 1], score_src, adjacency[node : node + 1])  # (H,1,N)
    rows = []
    for values in (adjacency[node], alpha.mean(0)[0]):
        rows.append(heatmap((values / values.max().clamp(min=1e-12)).unflatten(0, (h, w)).cpu().numpy()))
        rows[-1].putpixel((node % w, node // w), (0, 160, 255))

    y0, x0, y1, x1 = view.crop
    scale = 256 / min(y1 - y0, x1 - x0)
    size = round((x1 - x0) * scale), round((y1 - y0) * scale)
    pictures = {
        "1  where the object is, roughly": located,
        f"2  features ({Path(result.backbone).name}), PCA": Image.fromarray((colours * 255).astype(np.uint8)),
        "3  graph: edges of the blue patch": rows[0],
        "4  its attention, first layer": rows[1],
        "5  soft assignment": heatmap(result.assignment[..., -1]),
        "6  mask": overlay(result.image[y0:y1, x0:x1], result.mask[y0:y1, x0:x1]),
    }
    return image_grid([captioned(text, picture, size) for text, picture in pictures.items()], columns=3)


def palette_image(labels):
    """Labels (height,width) uint8 as a palette image: its pixels are the labels, its palette makes them visible."""
    picture = Image.fromarray(labels)
    picture.putpalette((PALETTE + PALETTE[3:] * 37)[:768])  # all 256 colours, or Pillow would save fewer bits
    return picture


# Command line --------------------------------------------------------------------------------------------------

SUFFIXES = {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".tif", ".tiff", ".bmp", ".webp", ".gif", ".ppm", ".pgm", ".pbm"}
OUTPUTS = {  # what each is, and the function of a Segmentation and a Config that makes its PIL image
    "probability": ("8 bit", lambda result, _: Image.fromarray(np.rint(result.probability * 255).astype(np.uint8))),
    "labels": ("the clusters as a palette image", lambda result, _: palette_image(result.labels)),
    "overlay": ("the mask over the photograph", lambda result, _: overlay(result.image, result.mask)),
    "explain": ("the stages side by side", explain),
    "mask": (None, lambda result, _: Image.fromarray(result.mask.astype(np.uint8) * 255)),
}


def parse_ints(text):
    """A text such as 1,2,3 as a tuple of integers."""
    return tuple(int(number) for number in text.split(","))


def parse_numbers(text):
    """A text such as 1,2.5,3 as a tuple of numbers."""
    return tuple(float(number) for number in text.split(","))


def add_config_flags(parser):
    """Add a flag for every field of Config, with its help, choices and default."""
    group = parser.add_argument_group("hyper-parameters (source of the default in brackets)")
    for field in dataclasses.fields(Config):
        flag, default, info = "--" + field.name.replace("_", "-"), field.default, field.metadata
        if isinstance(default, bool):
            kwargs = {"action": argparse.BooleanOptionalAction}
        else:
            kwargs = {"type": parse_ints if isinstance(default, tuple) else type(default), "choices": info["choices"]}
        text = f"{info['help']}; default {default} [{info['source']}]"
        group.add_argument(flag, default=default, help=text, **kwargs)


def add_backbone_flags(parser):
    """Add the flags that choose the features and the device; both programs have them."""
    parser.add_argument("--backbone", default="auto", metavar="NAME", help="features: dino; builtin, the colour alone; "
                        "auto (default), DINO's if available; FILE.py, which defines extract(view)")  # fmt: skip
    parser.add_argument("--weights", type=Path, help="file with DINO's weights; default: torch.hub's, or a download")
    parser.add_argument("--branch", choices=["teacher", "student"], default="teacher",
                        help="which network of DINO's full checkpoint; default teacher")  # fmt: skip
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")


def config_from_args(args):
    """The Config of parsed arguments. Raises ValueError for a value out of range."""
    return Config(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Config)})


def build_parser():
    """The parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="unsegmedgat.py",
        description="Unsupervised segmentation of medical photographs (UnSegMedGAT). Not a medical device.",
        epilog="Exit code: 0 all images done, 1 some image failed, 2 wrong use, 130 interrupted. Outputs appear whole.",
    )
    add = parser.add_argument
    add("images", nargs="+", type=Path, help="images, or folders of images")
    add("-o", "--output", type=Path, required=True, help="the mask, a .png file, for one image; a folder for several")
    add_prompt = parser.add_mutually_exclusive_group().add_argument
    add_prompt("--point", type=parse_numbers, action="append", metavar="X,Y", help="px, near the middle of the object")
    add_prompt("--box", type=parse_numbers, action="append", metavar="X0,Y0,X1,Y1",
               help="px, a rectangle around the object, tight or loose; the rest is background")  # fmt: skip
    for kind, (what, _) in OUTPUTS.items():
        if what:
            add(f"--{kind}", action="store_true", help=f"also write MASK_{kind}.png, {what}")
    add_backbone_flags(parser)
    add("--preset", choices=PRESETS, help="the paper's settings, where it states them")
    add("--skip-existing", action="store_true", help="skip images whose outputs all exist")
    add("--workers", type=int, default=0, metavar="N", help="processes that segment images side by side, one for two "
        "images at most; default: the number of cores, or OMP_NUM_THREADS, at most 4 on a GPU")  # fmt: skip
    add("--quiet", action="store_true", help="print warnings and errors only")
    add("--verbose", action="store_true", help="print the seconds of every stage")
    add_config_flags(parser)
    return parser


def parse_args(parser, argv=None, presets=PRESETS):
    """The parsed arguments; a preset changes the defaults, and flags that are given override it."""
    args = parser.parse_args(argv)
    parser.set_defaults(**presets.get(args.preset, {}))
    return parser.parse_args(argv)


def is_image(path):
    """Whether a file is taken for an image, by its name."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and not path.is_dir()


def list_images(folder):
    """The images in a folder, sorted. One warning counts the other entries. Raises ValueError where there is none."""
    entries = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    images = [path for path in entries if is_image(path)]
    if not images:
        raise ValueError(f"{folder}: there is no image in this folder")
    kinds = Counter("folder" if path.is_dir() else path.suffix.lower() or "without suffix"
                    for path in {*entries} - {*images})  # fmt: skip
    if kinds and rank_and_world()[0] == 0:
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        log.warning("%s: %d entries are skipped, as they are not images that are read here: %s",
                    folder, kinds.total(), counts)  # fmt: skip
    return images


def plan_outputs(args):
    """Pairs (image, {kind: output path}). Raises ValueError if two outputs share a path, or one overwrites an input."""
    images, output = [], args.output
    folders = {os.path.realpath(path if path.is_dir() else path.parent) for path in args.images}
    if output.is_dir() and os.path.realpath(output) in folders:  # a mask could replace a photograph, or become an input
        raise ValueError(f"{output}: holds input images; choose another folder for the masks")
    for path in args.images:
        images += list_images(path) if path.is_dir() else [path]
    images = [*{os.path.abspath(path): path for path in reversed(images)}.values()][::-1]  # each once
    single = output.suffix.lower() == ".png" and not output.is_dir()
    if single and (len(images) > 1 or args.images[0].is_dir()):
        raise ValueError(f"{output}: several images, or a folder of them, need a folder for the masks")
    if not single and not output.is_dir() and (output.suffix or output.exists()):
        raise ValueError(f"{output}: a mask's name ends in .png; to use a folder of that name, create it first")

    kinds = [kind for kind, (what, _) in OUTPUTS.items() if not what or getattr(args, kind)]
    plan, taken = [], {os.path.realpath(image): "an input" for image in images}
    for image in images:
        mask = output if single else output / f"{image.stem}.png"
        outputs = {kind: mask if kind == "mask" else mask.with_name(f"{mask.stem}_{kind}.png") for kind in kinds}
        for path in outputs.values():
            real = os.path.realpath(path)
            if path.is_dir() or real in taken:
                raise ValueError(f"{path}: would be written for {image}, but it is {taken.get(real, 'a folder')}; "
                                 "choose another output, or rename an image")  # fmt: skip
            taken[real] = f"written for {image}"
        plan.append((image, outputs))
    folder = output if output.is_dir() else output.parent
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise ValueError(f"{folder}: there is no such folder, or no permission to write there")
    return plan


@contextlib.contextmanager
def atomic_write(path):
    """Yield a path in the same folder to write to, then rename it to `path`, which appears whole or not at all."""
    part = path.with_name(f".{uuid.uuid4().hex}.part")  # of its own, as two runs may write into one folder
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def remove_stale_parts(folder):
    """Remove the parts that killed runs have left in a folder: those of over an hour, as writing one takes seconds."""
    for path in folder.glob(f".{'[0-9a-f]' * 32}.part"):
        with contextlib.suppress(OSError):  # another run may remove it first
            if time.time() - path.stat().st_mtime > 3600:
                path.unlink()


def print_line(text):
    """Print a line. If that fails (`| head`, a closed terminal, a full disk), print nothing from then on."""
    try:
        print(text + "\n", end="", flush=True)  # in one piece, as several ranks may print
    except OSError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  it stays open to the end of the process


def segment_to_files(item, config, segment_kwargs, verbose):
    """Segment the image of an item (number, image, outputs): (a message, None), or (None, the error in one line)."""
    start, (_, image, outputs) = time.perf_counter(), item
    try:
        result = segment(image, config, **segment_kwargs)
        for kind, path in outputs.items():
            with atomic_write(path) as part:
                OUTPUTS[kind][1](result, config).save(part, format="PNG")
    except Exception as error:  # whatever happens to one image, the others are done
        return None, one_line(error)
    message = (f"foreground {result.mask.mean():.1%}, modularity {result.modularity:.3f}, backbone {result.backbone}, "
               f"{time.perf_counter() - start:.1f} s")  # fmt: skip
    return message + "".join(f", {stage} {t:.2f} s" for stage, t in result.seconds.items() if verbose), None


def rank_and_world():
    """The rank of this process and the number of processes; (0, 1) outside a torch.distributed run."""
    if not (distributed.is_available() and distributed.is_initialized()):  # some builds of torch have no distributed
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def all_gather(value):
    """The value of every rank of a torch.distributed run, in order; [value] outside one."""
    values = [value] * rank_and_world()[1]
    if len(values) > 1:
        distributed.all_gather_object(values, value)
    return values


def backbone_from_args(args, device):
    """The Backbone of parsed arguments. Raises ValueError if the ranks of a run have different ones."""
    backbone = load_backbone(args.backbone, args.weights, args.branch, device, not args.quiet)
    if len(set(all_gather(backbone.name))) > 1:
        raise ValueError("DINO's weights are available to some ranks only: pass --weights, or --backbone builtin")
    return backbone


def prompts_from_args(args):
    """{"box": four numbers or None, "point": two or None}. Raises ValueError for another number of them."""
    prompts = {}
    for name, count in ("box", 4), ("point", 2):
        given = getattr(args, name) or [None]
        if len(given) > 1:
            raise ValueError(f"--{name} is given {len(given)} times, but one object is segmented: give it once")
        if given[0] and len(given[0]) != count:
            raise ValueError(f"--{name} needs {count} numbers with commas between")
        prompts[name] = given[0]
    return prompts


def shared_parameters(extractors, config, device, quiet):
    """The parameters of the collective phase over all images that can be read.

    extractors: functions that return what `extract_nodes` returns, one for each image. An image that fails is left out
    here; its own turn reports the error.
    """
    node_sets = []
    for extract in extractors:
        with contextlib.suppress(Exception):
            _, features, node_weights = extract()
            node_sets.append((features.cpu(), node_weights.cpu()))
    if len({features.shape[1] for features, _ in node_sets}) > 1:
        raise ValueError("the backbone's features differ in width between images: shared epochs need one width")
    return fit_collective(node_sets, config, device, quiet)


def segment_all(args):
    """Segment the images of parsed arguments; returns the exit code. Raises ValueError or OSError for wrong use."""
    if args.workers < 0:
        raise ValueError(f"--workers must be at least 0, got {args.workers}")
    prompts, config, plan = prompts_from_args(args), config_from_args(args), plan_outputs(args)
    rank, world = rank_and_world()
    share = [(number, image, outputs) for number, (image, outputs) in enumerate(plan, 1)][rank::world]
    todo = [item for item in share if not (args.skip_existing and all(path.exists() for path in item[2].values()))]
    if len(todo) < len(share) and not args.quiet:
        print_line(f"{len(share) - len(todo)} of {len(share)} images are skipped, as their outputs exist")
    if not any(all_gather(bool(todo))):  # of all ranks: those that have nothing to do wait for the others below
        return 0
    device = pick_device(args.device)
    backbone = backbone_from_args(args, device)
    folder = plan[0][1]["mask"].parent
    folder.mkdir(exist_ok=True)
    remove_stale_parts(folder)
    segment_kwargs = {**prompts, "device": device, "backbone": backbone, "weights": args.weights, "branch": args.branch}
    if config.shared_epochs:  # over all images on every rank, so that all ranks have the same parameters
        extractors = [lambda path=path: extract_nodes(load_image(path), config, backbone, device, **prompts)
                      for path, _ in plan]  # fmt: skip
        segment_kwargs["shared"] = shared_parameters(extractors, config, device, args.quiet or rank > 0)
    failures = sum(all_gather(segment_todo(todo, len(plan), config, segment_kwargs, args)), [])
    if rank > 0:  # the first rank reports, as torchrun ends all ranks when one has failed
        return 0
    if failures and len(plan) > 1:
        log.error("%d failed: %s", len(failures), ", ".join(map(str, failures)))
    return 1 if failures else 0


def set_up_messages():
    """Set the format of log messages, and hide Pillow's warnings, as `load_image` has its own limits."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    warnings.filterwarnings("ignore", module=r"PIL\.")


def start_worker():
    """Prepare a worker process, which uses one torch thread and ends when the main process ends, in any way."""
    torch.set_num_threads(1)
    set_up_messages()
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()


def run_pickled(function, item):
    """Call a pickled function. Unpickled, each of its tensors would be sent to a worker as an open file."""
    return pickle.loads(function)(item)


def map_in_workers(count, function, items):
    """Yield from map(function, items), run in `count` processes, or in this one for a count below 2. Raises OSError."""
    if count < 2 or threading.current_thread() is not threading.main_thread():  # which alone can handle interrupts
        yield from map(function, items)
        return
    others = {*multiprocessing.active_children()}  # the caller's own
    try:
        with ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), start_worker) as pool:
            handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # workers inherit it: interrupts come here only
            try:
                task = pickle.dumps(function)
                futures = [pool.submit(run_pickled, task, item) for item in items]
            finally:
                signal.signal(signal.SIGINT, handler)
            try:
                yield from (future.result() for future in futures)
            except (KeyboardInterrupt, GeneratorExit):  # interrupted here, or where the results are used
                for worker in {*multiprocessing.active_children()} - others:
                    worker.kill()
                raise
    except (RuntimeError, OSError, ImportError) as error:
        raise OSError(f"worker processes failed ({one_line(error)}): try fewer --workers; 1 starts none") from None


def segment_todo(todo, count, config, segment_kwargs, args):
    """Segment items (number, image, outputs) of `count` and print a line for each; returns the images that failed."""
    cores, failures = torch.get_num_threads(), []
    workers = args.workers or (min(cores, 4) if segment_kwargs["device"].type == "cuda" else cores)
    workers = min(workers, (len(todo) + 1) // 2)  # starting a worker takes as long as an image or two
    if workers > 1:  # a Backbone holds a function, which cannot be sent to a process
        segment_kwargs = segment_kwargs | {"backbone": segment_kwargs["backbone"].name}
    task = functools.partial(segment_to_files, config=config, segment_kwargs=segment_kwargs, verbose=args.verbose)
    with contextlib.closing(map_in_workers(workers, task, todo)) as results, contextlib.ExitStack() as stack:
        stack.callback(torch.set_num_threads, cores)
        torch.set_num_threads(cores if count == 1 else 1)  # as in a worker, so outputs do not depend on their number
        for (message, error), (number, image, outputs) in zip(results, todo):  # ends when the results do
            if error:
                failures.append(image)
                log.error("%s: %s", image, error)
            elif not args.quiet:
                print_line(f"[{number}/{count}] {image} -> {outputs['mask']}  {message}")
    return failures


def run_program(program, advice):
    """The exit code of program(): what it returns, 2 after an error, logged in one line, or 130 after an interrupt."""
    set_up_messages()
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has not
        sys.stdout.reconfigure(errors="backslashreplace")  # for file names that the terminal cannot show
    try:
        with contextlib.ExitStack() as stack:
            if {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys():  # under torchrun the processes share the images, see `rank_and_world`
                if torch.cuda.is_available():
                    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
                # gloo, as NCCL needs a GPU for each rank; a day, as the slowest rank may be late
                distributed.init_process_group("gloo", timeout=timedelta(days=1))
                stack.callback(distributed.destroy_process_group)
            return program()
    except (ValueError, OSError, RuntimeError) as error:
        log.error("%s", one_line(error))
        return 2
    except KeyboardInterrupt:
        log.error("interrupted; %s", advice)
        return 130


def main(argv=None):
    """The command line; returns the exit code."""
    advice = "the outputs that exist are whole, and --skip-existing continues from here"
    return run_program(lambda: segment_all(parse_args(build_parser(), argv)), advice)


if __name__ == "__main__":
    sys.exit(main())
