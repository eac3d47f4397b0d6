"""How well does it work on your images? Every method of the paper's Table I, beside baselines that cost nothing.

    python eval.py images/ masks/                               # the headline: no ground truth reaches a method
    python eval.py images/ masks/ --protocol point              # a point in the object is given; or box
    python eval.py images/ masks/ --plant 1                     # how good would a backbone that knows the object be?
    python eval.py images/ masks/ --protocol official --preset official --reference isic2018      # as Table I was made
    python eval.py images/ masks/ --csv scores.csv --resume     # goes on where an interrupted run stopped
    torchrun --nproc-per-node=8 eval.py images/ masks/          # on many cores, GPUs or machines
    python eval.py bench                                        # how fast it is on your machine; needs no images

All clusterings get the same features and the same graph, and the paper's own steps turn their clusters into masks, so a
difference between two rows is the clustering alone; the first row is the program as it ships, with its colour steps.
Ground truth exists in this file only.
Shapes: B images, N = h * w patches, C features, K clusters; masks are (H,W) bool. Boxes are (x0, y0, x1, y1) px, ends
excluded.
"""

import argparse
import contextlib
import csv
import dataclasses
import functools
import hashlib
import json
import logging
import math
import multiprocessing
import os
import platform
import re
import sys
import time
import zlib
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import scipy.cluster.vq
import scipy.sparse.linalg
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from scipy import ndimage
from scipy.spatial import KDTree
from torch import nn

import bilateral
import unsegmedgat as u

log = logging.getLogger("eval")


# ---------------------------------------------------------------------------------------------------------------
# Methods: (features X (N,C), adjacency A (N,N), config) -> assignment (N,K), rows summing to 1
# ---------------------------------------------------------------------------------------------------------------

METHODS = {}


def method(name):
    """Enter a function as the method `name`; that is all it takes to add one."""
    return lambda function: METHODS.setdefault(name, function)


SHIPPED = "as-shipped"  # the row that keeps the config's colour steps; the others go without


@method("unsegmedgat")
@method(SHIPPED)
def unsegmedgat(features, adjacency, config):
    """The paper's method, each image alone: what `unsegmedgat.segment` does."""
    return u.fit(features, adjacency, config)[0]


@method("unsegmedgatc")
def unsegmedgatc(features, adjacency, config, shared):
    """The paper's collective method, from the parameters `shared` of `unsegmedgat.fit_collective`."""
    return u.fit(features, adjacency, collective(config), shared)[0]


def collective(config):
    """The config of the collective method: T0 = 5 as in section III of the paper, unless it is set."""
    return config if config.collective else dataclasses.replace(config, collective=5)


RESTARTS = 10  # of k-means; the best is kept


@method("vit-kmeans")
def kmeans(features, adjacency, config):
    """Lloyd's algorithm from k-means++ seeds (Arthur and Vassilvitskii 2007) on the features; the graph is not used."""
    x = features.cpu().numpy().astype(np.float64)
    runs = []
    for seed in range(config.seed, config.seed + RESTARTS):
        # 10 steps are SciPy's default; 30 are past convergence here.
        centres, labels = scipy.cluster.vq.kmeans2(x, config.clusters, iter=30, minit="++", seed=seed)
        runs.append((np.square(x - centres[labels]).sum(), labels))
    return one_hot(min(runs, key=lambda run: run[0])[1], features, config)


def one_hot(labels, features, config):
    """Labels (N,) as an assignment (N,K) of the features' type and device."""
    return F.one_hot(torch.as_tensor(labels).long(), config.clusters).to(features)


def normalise(adjacency):
    """D^-1/2 A D^-1/2 (N,N), D the degrees; a node without edges keeps a row of zeros.

    The symmetric normalisation of Kipf and Welling 2017. Their A + I is here A itself: eq. (1) has the self-loops.
    """
    degree = adjacency.sum(1)
    scale = torch.where(degree > 0, degree.clamp(min=1e-12).rsqrt(), 0)
    return scale[:, None] * adjacency * scale


@method("dsm")
def dsm(features, adjacency, config):
    """Deep spectral methods (Melas-Kyriazi et al. 2022): the Fiedler vector of the normalised Laplacian, split at 0.

    For K > 2, k-means on the first K eigenvectors. The Laplacian is I - D^-1/2 A D^-1/2, so its smallest eigenvectors
    are the largest of `normalise(A)`. The colour affinities that their paper may add to the graph are left out.
    """
    matrix = normalise(adjacency).cpu().numpy().astype(np.float64)
    start = np.random.default_rng(config.seed).standard_normal(len(matrix))  # ones could be an eigenvector already
    _, vectors = scipy.sparse.linalg.eigsh(matrix, k=config.clusters, which="LA", v0=start)  # (N,K), ascending
    if config.clusters == 2:
        return one_hot(vectors[:, 0] > 0, features, config)
    return kmeans(torch.from_numpy(vectors).to(features), adjacency, config)


class Convolution(nn.Module):
    """A X W, Kipf and Welling 2017; with `skip`, A X W + X V, as in Bianchi et al. 2020, section 4.1."""

    def __init__(self, in_features, out_features, activation, skip=False):
        super().__init__()
        self.W = nn.Linear(in_features, out_features)
        self.V = nn.Linear(in_features, out_features, bias=False) if skip else None
        self.activation = activation

    def forward(self, x, propagation):  # (N,in), (N,N) -> (N,out)
        message = propagation @ self.W(x)
        return self.activation(message if self.V is None else message + self.V(x))


class Arma(nn.Module):
    """ARMA graph convolution, Bianchi et al. 2021, eqs. (6) and (7): parallel stacks of recursive filters, averaged.

    Each iterates X' = sigma(A X W + X0 V), A normalised, T times; after the first, the iterations share W.
    """

    def __init__(self, in_features, out_features, activation, stacks=2, iterations=2):
        super().__init__()
        self.first = nn.Parameter(torch.empty(stacks, in_features, out_features))
        self.W = nn.Parameter(torch.empty(stacks, out_features, out_features))
        self.V = nn.Parameter(torch.empty(stacks, in_features, out_features))
        for parameter in self.parameters():
            for stack in parameter:
                nn.init.xavier_uniform_(stack)
        self.iterations, self.activation = iterations, activation

    def forward(self, x, propagation):  # (N,in), (N,N) -> (N,out)
        skip = x @ self.V  # (stacks,N,out)
        state = self.activation(propagation @ (x @ self.first) + skip)
        for _ in range(self.iterations - 1):
            state = self.activation(propagation @ (state @ self.W) + skip)
        return state.mean(0)


class Clusterer(nn.Module):
    """One graph convolution, then a perceptron with one hidden layer, to K soft clusters. The widths are ours."""

    def __init__(self, convolution, config):
        super().__init__()
        self.convolution = convolution
        width, activation = config.projection, u.ACTIVATIONS[config.activation]()
        self.perceptron = nn.Sequential(nn.Linear(width, width), activation, nn.Linear(width, config.clusters))

    def forward(self, x, propagation):  # (N,C), (N,N) -> (N,K)
        return self.perceptron(self.convolution(x, propagation)).softmax(1)


def optimise(convolution, loss, features, adjacency, config):
    """Minimise loss(assignment, A, normalised A) over a Clusterer, for all epochs: the assignment (N,K).

    convolution: a class, called with the widths in and out and the activation; it gets the normalised A.
    """
    propagation = normalise(adjacency)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        layer = convolution(features.shape[1], config.projection, u.ACTIVATIONS[config.activation]())
        network = Clusterer(layer, config).to(features.device)
    x = u.standardise(features)
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    for _ in range(config.epochs):
        optimizer.zero_grad(set_to_none=True)
        loss(network(x, propagation), adjacency, propagation).backward()
        optimizer.step()
    with torch.no_grad():
        return network(x, propagation)


def mincut_loss(assignment, propagation):
    """Cut and orthogonality loss, eq. (9) of Bianchi et al. 2020; a scalar. S (N,K), A normalised (N,N)."""
    within = (assignment * (propagation @ assignment)).sum()  # Tr(S^T A S)
    volume = (propagation.sum(1) @ assignment.square()).sum()  # Tr(S^T D S)
    overlap = assignment.T @ assignment  # (K,K)
    k = len(overlap)
    balance = (overlap / overlap.norm() - torch.eye(k).to(overlap) / math.sqrt(k)).norm()
    return -within / volume.clamp(min=1e-12) + balance


@method("mincutpool")
def mincutpool(features, adjacency, config):
    """MinCutPool (Bianchi et al. 2020), its pooling layer optimised for one image alone."""
    convolution = functools.partial(Convolution, skip=True)
    return optimise(convolution, lambda s, _, normalised: mincut_loss(s, normalised), features, adjacency, config)


@method("unseggnet")
def unseggnet(features, adjacency, config):
    """UnSegGNet (Reddy et al. 2024): a graph convolution (Kipf and Welling 2017) and the modularity loss, eq. (8)."""
    return optimise(Convolution, modularity(config), features, adjacency, config)


@method("unsegarmanet")
def unsegarmanet(features, adjacency, config):
    """UnSeGArmaNet (Reddy et al. 2024): an ARMA convolution (Bianchi et al. 2021) and the modularity loss, eq. (8)."""
    return optimise(Arma, modularity(config), features, adjacency, config)


def modularity(config):
    """The paper's loss in the form that `optimise` takes."""
    return lambda assignment, adjacency, _: u.modularity_loss(assignment, adjacency, config.resolution, config.balance)


# ---------------------------------------------------------------------------------------------------------------
# Rows that cost nothing
# ---------------------------------------------------------------------------------------------------------------

CENTRED = 0.25  # semi-axes of the centred ellipse, as a share of the image's sides; one figure for all data
AROUND = 0.15  # radius of the disc around a given point, as a share of the image's shorter side
EVERYTHING, LOCATED = "everything foreground", "located place"


def ellipse(shape, box):
    """The ellipse inscribed in a box, over an image of shape (H,W): the pixels whose centre lies inside it."""
    x0, y0, x1, y1 = box
    y, x = np.ogrid[: shape[0], : shape[1]]
    return ((2 * x + 1 - x0 - x1) / (x1 - x0)) ** 2 + ((2 * y + 1 - y0 - y1) / (y1 - y0)) ** 2 <= 1


def free_rows(protocol, shape, hint):
    """{row: mask (H,W)} of the guesses that look at no pixel. hint: the point or box in the pixels of `shape`, or None."""
    (h, w), everything = shape, np.ones(shape, bool)
    if protocol == "blind":
        low, high = 0.5 - CENTRED, 0.5 + CENTRED
        return {EVERYTHING: everything, "centred ellipse": ellipse(shape, (low * w, low * h, high * w, high * h))}
    if protocol == "point":
        x, y, r = hint[0] + 0.5, hint[1] + 0.5, AROUND * min(shape)
        return {EVERYTHING: everything, "disc at the point": ellipse(shape, (x - r, y - r, x + r, y + r))}
    x0, y0, x1, y1 = hint
    if protocol == "box":  # nobody who was given a box would mark what lies outside it
        everything[:] = False
        everything[y0:y1, x0:x1] = True
    return {EVERYTHING: everything, "inscribed ellipse": ellipse(shape, hint)}


# ---------------------------------------------------------------------------------------------------------------
# Planted features: what a backbone would see that knows the object
# ---------------------------------------------------------------------------------------------------------------

REGIONS = 4  # of the background


def plant(truth, noise, seed):
    """A Backbone whose features come from the ground truth (H,W) bool, so that pipeline and backbone can be judged apart.

    For a patch that the object covers to the share c in [0,1], in region l of the photograph's own colours and places,
    f = c o + (1 - c) (0.75 e0 + 0.66 r_l) + noise g / sqrt(384), with o = 0.35 e0 + 0.94 e1; e0, e1 and r_1..r_4 are random
    unit directions in 384 dimensions, the same for all images, and g is standard normal. seed: of g, a list.
    """
    directions = np.random.default_rng(0).standard_normal((2 + REGIONS, 384))
    e0, e1, *regions = torch.from_numpy(directions / np.linalg.norm(directions, axis=1, keepdims=True)).float()

    def extract(view):
        y0, x0, y1, x1 = view.window
        covered = torch.from_numpy(truth[y0:y1, x0:x1]).float()[None, None]
        covered = F.interpolate(covered, size=view.image.shape[1:], mode="bilinear", antialias=True)
        c = F.avg_pool2d(covered, u.PATCH, view.stride)[0, 0]  # (h,w)
        lab = F.avg_pool2d(u.rgb_to_lab(view.image), u.PATCH, view.stride)
        row, column = torch.meshgrid(*(torch.linspace(0, 20, side) for side in c.shape), indexing="ij")
        looks = torch.cat([lab, row[None], column[None]]).flatten(1).T.double().numpy()  # (N,5)
        _, label = scipy.cluster.vq.kmeans2(looks, REGIONS, iter=20, minit="++", seed=0)
        background = 0.75 * e0 + 0.66 * torch.stack(regions)[label]  # (N,384)
        g = torch.from_numpy(np.random.default_rng([*seed, *view.window]).standard_normal(background.shape)).float()
        c = c.reshape(-1, 1)
        return c * (0.35 * e0 + 0.94 * e1) + (1 - c) * background + noise / math.sqrt(384) * g

    return u.Backbone(f"planted, noise {noise:g}", extract)


# ---------------------------------------------------------------------------------------------------------------
# Metrics
# ---------------------------------------------------------------------------------------------------------------

METRICS = ("iou", "dice", "precision", "recall", "hd95", "nsd")
WORST = dict.fromkeys(METRICS, 0.0) | {"hd95": 100.0}  # of an image that failed


def contour(mask):
    """Where the border pixels of a mask are: (n,2). They have a 4-neighbour outside the mask or the image."""
    return np.argwhere(mask & ~ndimage.binary_erosion(mask))


def metrics(mask, truth, tolerance="2%"):
    """Scores of a mask (H,W) against the truth (H,W), a dictionary of floats.

    iou, dice, precision, recall: of the foreground, in [0,1]. Averaged over images, iou is the paper's mIoU (no
    average with the background's IoU, no pooling of the images' pixels) and dice its Dice.
    hd95: 95th percentile of the distances from each border pixel of either mask to the other's border, both ways
    pooled, in % of the diagonal of (H,W), as images differ in size.
    nsd: normalised surface Dice (Nikolov et al. 2021), the share of all border pixels within the tolerance of the other
    border, in [0,1]. tolerance: "2%" of the diagonal, or "5px".
    Where one of the masks is empty: 0, and 100 for hd95. Where both are: a perfect score.
    """
    true_positive = int((mask & truth).sum())
    if not (mask.any() and truth.any()):
        return dict(WORST) if mask.any() or truth.any() else dict.fromkeys(METRICS, 1.0) | {"hd95": 0.0}
    diagonal = math.hypot(*truth.shape)
    a, b = contour(mask), contour(truth)
    distances = np.concatenate([KDTree(b).query(a)[0], KDTree(a).query(b)[0]])
    return {
        "iou": true_positive / int((mask | truth).sum()),
        "dice": 2 * true_positive / int(mask.sum() + truth.sum()),
        "precision": true_positive / int(mask.sum()),
        "recall": true_positive / int(truth.sum()),
        "hd95": float(np.percentile(distances, 95)) / diagonal * 100,
        "nsd": float((distances <= pixels(tolerance, diagonal)).mean()),
    }


def pixels(tolerance, diagonal):
    """A tolerance such as "2%" or "5px" in px. Raises ValueError for other texts."""
    match = re.fullmatch(r"(\d+\.?\d*)(%|px)", tolerance)
    if not match:
        raise ValueError(f"the tolerance must look like 2% (of the image's diagonal) or 5px, got {tolerance!r}")
    return float(match[1]) * (diagonal / 100 if match[2] == "%" else 1)


def interval(values, groups=None, seed=0, resamples=2000):
    """The 95 % bootstrap interval of the mean of values (n,): (low, high), percentile method, seeded.

    None for a single value or group, which says nothing of the spread.
    groups (n,), optional: labels; whole groups are then resampled, as the frames of one sequence are not independent.
    """
    groups = range(len(values)) if groups is None else groups
    _, index = np.unique(groups, return_inverse=True)
    counts, sums = np.bincount(index), np.bincount(index, values)
    if len(counts) == 1:
        return None
    draws = np.random.default_rng(seed).integers(len(counts), size=(resamples, len(counts)))
    means = sums[draws].sum(1) / counts[draws].sum(1)
    return tuple(np.percentile(means, [2.5, 97.5]).tolist())


# ---------------------------------------------------------------------------------------------------------------
# Images and masks on disk
# ---------------------------------------------------------------------------------------------------------------

MASK_SUFFIX = re.compile(r"_(segmentation|lesion|mask)$", re.IGNORECASE)


def files_below(folder):
    """The image files in a folder and the folders below it, in order. Raises ValueError where there is none."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder")
    found = [p for p in sorted(folder.rglob("*")) if u.is_image(p)]
    if not found:
        raise ValueError(f"{folder}: there is no image in this folder")
    return found


def by_stem(paths, strip):
    """{stem: path}, masks without their _mask and the like. Raises ValueError where two files have one stem."""
    table = {}
    for path in paths:
        stem = MASK_SUFFIX.sub("", path.stem) if strip else path.stem
        if stem in table:
            raise ValueError(f"{path}: pairs go by name, and {table[stem]} has the same; move one of them away")
        table[stem] = path
    return table


def pair_files(images, masks):
    """Pair two folders by stem: ({stem: (image, mask)}, the files without a partner).

    Folders inside are searched too, extensions may differ, and a mask may end in _segmentation, _lesion or _mask. Both
    folders may be the same: what ends like a mask is one. Raises ValueError for two files of one name, or no pair.
    """
    image_paths, mask_paths = files_below(images), files_below(masks)
    both = set(image_paths) & set(mask_paths)
    image_paths = [p for p in image_paths if p not in both or not MASK_SUFFIX.search(p.stem)]
    mask_paths = [p for p in mask_paths if p not in both or MASK_SUFFIX.search(p.stem)]
    image_of, mask_of = by_stem(image_paths, False), by_stem(mask_paths, True)
    pairs = {stem: (path, mask_of[stem]) for stem, path in image_of.items() if stem in mask_of}
    if not pairs:
        raise ValueError(
            f"{images}, {masks}: no image and mask have the same name, as a.jpg and a.png or a_mask.png have"
        )
    alone = [p for p in image_paths if p.stem not in pairs] + [p for stem, p in mask_of.items() if stem not in pairs]
    return pairs, alone


def load_mask(path, shape=None):
    """Read a mask: (H,W) bool, what is brighter than half of its maximum.

    So 0/1, 0/255, 16 bit, palettes and JPEG's ringing all do; colours count by their brightest channel, transparency as
    black. Raises unsegmedgat.ImageError where it cannot be read, or its size is not `shape` (H,W).
    """
    try:
        with Image.open(path) as image:
            jpeg = image.format == "JPEG"
            if image.mode in ("P", "PA", "LA", "RGBA", "CMYK") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image).convert("RGB")
            values = np.asarray(image).astype(np.float32)
    except Exception as error:  # Pillow's decoders raise many kinds on a damaged file
        raise u.ImageError(f"{path}: the mask cannot be read ({u.reason(error)})") from None
    values = values.max(2) if values.ndim == 3 else values
    if shape and values.shape != tuple(shape):
        hint = ": was only one of them rotated?" if values.shape == tuple(shape)[::-1] else ""
        (h, w), (height, width) = values.shape, shape
        raise u.ImageError(f"{path}: the mask is {w} x {h}, the image {width} x {height} pixels{hint}")
    return values > (127.5 if jpeg else values.max() / 2)  # an empty JPEG mask rings around 0


def bounding_box(mask):
    """The box (x0, y0, x1, y1) of a mask, ends excluded. Raises unsegmedgat.ImageError for an empty one."""
    if not mask.any():
        raise u.ImageError("the ground truth is empty, so it has no place: use --protocol blind, or leave the image out")
    (y0, y1), (x0, x1) = ((line.nonzero()[0].min(), line.nonzero()[0].max() + 1) for line in (mask.any(1), mask.any(0)))
    return int(x0), int(y0), int(x1), int(y1)


def inner_point(mask):
    """The pixel (x, y) of a mask nearest its centroid. Raises unsegmedgat.ImageError for an empty one."""
    bounding_box(mask)
    inside = np.argwhere(mask)
    y, x = inside[np.square(inside - inside.mean(0)).sum(1).argmin()]
    return int(x), int(y)


def jittered(hint, jitter, shape, seed):
    """A point, or each side of a box, moved by up to `jitter` px; kept inside an image of shape (H,W), a box not empty."""
    moved = np.array(hint) + np.random.default_rng(seed).integers(-jitter, jitter + 1, size=len(hint))
    if len(hint) == 2:
        return tuple(moved.clip(0, [shape[1] - 1, shape[0] - 1]).tolist())
    x0, y0 = moved[:2].clip(0, [shape[1] - 1, shape[0] - 1])
    x1, y1 = moved[2:].clip([x0 + 1, y0 + 1], shape[::-1])
    return int(x0), int(y0), int(x1), int(y1)


# ---------------------------------------------------------------------------------------------------------------
# Prediction under a protocol
# ---------------------------------------------------------------------------------------------------------------

PROTOCOLS = {
    "blind": "the whole image; no ground truth reaches a method",
    "point": "USES GROUND TRUTH: its pixel nearest its centroid is given, as a user would click",
    "box": "USES GROUND TRUTH: its bounding box is given, as a user would draw it",
    "official": f"USES GROUND TRUTH: cropped to its bounding box + {u.RING} px, and the better of mask and inverse is kept",
}


@dataclass(frozen=True)
class Run:
    """What one evaluation is made of."""

    config: u.Config
    backbone: u.Backbone
    device: torch.device
    protocol: str = "blind"
    squash: bool = False  # resize to a square before anything else, as the authors' code does
    jitter: int = 0  # px
    plant: float = None  # noise of the planted features
    tolerance: str = "2%"
    methods: dict = dataclasses.field(default_factory=lambda: dict(METHODS))  # {row: function}
    predictions: dict = dataclasses.field(default_factory=dict)  # {row: {stem: mask file}}, made elsewhere


def look(rgb, run, backbone, hint=None):
    """The view, features and node weights of an image or crop, squashed if the run says so. hint: a point or box."""
    if run.squash:
        rgb = np.array(Image.fromarray(rgb).resize((run.config.size, run.config.size), Image.BILINEAR))
    given = {run.protocol: hint} if run.protocol in ("point", "box") else {}
    view, features = u.look(rgb, run.config, backbone, run.device, **given)
    return view, features, u.node_weights(view, run.config.prior).to(run.device)


def predict(rgb, rows, run, backbone, hint=None):
    """{row: ([mask (H,W), ...], seconds) or the exception} of the methods named in `rows`. No mask's truth comes in.

    rgb (H,W,3), hint (x, y), (x0, y0, x1, y1) or None. In the official protocol there are two masks, of either polarity.
    """
    if u.is_constant(rgb):
        return {row: ([np.zeros(rgb.shape[:2], bool)], 0.0) for row in rows}
    view, features, weights = look(rgb, run, backbone, hint)
    adjacency = u.build_graph(features, run.config.tau, weights)
    found, made = {}, {}  # rows of one function share its assignment
    for row in rows:
        start = time.perf_counter()
        config = run.config if row == SHIPPED else dataclasses.replace(run.config, colour_steps=0)
        try:
            if row == LOCATED:
                core = view.core(view.stride).flatten()
                assignment = one_hot(core, features, config)
            else:
                function = run.methods[row]
                if function not in made:
                    made[function] = function(features, adjacency, config)
                assignment = made[function]
            masks = []
            for flip in (False, True) if run.protocol == "official" else (False,):
                polarity = dataclasses.replace(config, invert=config.invert != flip)
                mask = Image.fromarray(u.finish(view, assignment, polarity)[0])
                masks.append(np.asarray(mask.resize(rgb.shape[1::-1], Image.NEAREST)))
            found[row] = masks, time.perf_counter() - start
        except Exception as error:
            found[row] = error
    return found


def frame(stem, image, truth_path, run):
    """What is seen of an image: (image (H,W,3), the slices to look at, the point or box within them or None, Backbone).

    Raises an exception where the image, or what the protocol needs, cannot be had.
    """
    rgb = u.load_image(image)
    shape, seen, hint, backbone = rgb.shape[:2], np.s_[:, :], None, run.backbone
    if run.protocol == "blind" and run.plant is None:
        return rgb, seen, hint, backbone
    # The one place where something of the ground truth goes into a prediction; the table says so.
    truth, seed = load_mask(truth_path, shape), [run.config.seed, zlib.crc32(stem.encode())]
    if run.protocol == "official":
        x0, y0, x1, y1 = bounding_box(truth)
        top, left = max(0, y0 - u.RING), max(0, x0 - u.RING)
        seen, hint = np.s_[top : y1 + u.RING, left : x1 + u.RING], (x0 - left, y0 - top, x1 - left, y1 - top)
    elif run.protocol != "blind":
        hint = inner_point(truth) if run.protocol == "point" else bounding_box(truth)
        hint = jittered(hint, run.jitter, shape, seed)
    if run.plant is not None:
        known = Image.fromarray(truth[seen])
        known = known.resize((run.config.size, run.config.size), Image.NEAREST) if run.squash else known
        backbone = plant(np.array(known), run.plant, seed)
    return rgb, seen, hint, backbone


def masks_of(stem, image, truth_path, rows, run):
    """The masks of some rows on one image: ({row: as from `predict`}, the slices that are scored, the image (H,W,3)).

    Raises an exception where none can be made.
    """
    rgb, scored, hint, backbone = frame(stem, image, truth_path, run)
    view = rgb[scored]
    found = {row: ([mask], 0.0) for row, mask in free_rows(run.protocol, view.shape[:2], hint).items() if row in rows}
    for row in run.predictions.keys() & set(rows):
        try:
            if stem not in run.predictions[row]:
                raise u.ImageError(f"there is no prediction named {stem}")
            mask = load_mask(run.predictions[row][stem], rgb.shape[:2])[scored]
            found[row] = ([mask, ~mask] if run.protocol == "official" else [mask]), 0.0
        except Exception as error:
            found[row] = error
    to_run = [row for row in rows if row in run.methods or row == LOCATED]
    try:
        found |= predict(view, to_run, run, backbone, hint)
    except Exception as error:
        found |= dict.fromkeys(to_run, error)
    return found, scored, rgb


def evaluate(stem, image, truth_path, rows, run):
    """Score some rows on one image: {row: {metric: float, "seconds": float, "error": text, empty if all went well}}."""
    try:
        found, scored, rgb = masks_of(stem, image, truth_path, rows, run)
        truth = load_mask(truth_path, rgb.shape[:2])  # blind: read only now that every mask is made
    except Exception as error:
        found = dict.fromkeys(rows, error)
    else:
        if not truth.any():
            log.warning("%s: the ground truth is empty; only an empty mask scores 1, any other 0", truth_path)
        truth = truth[scored]
    scores = {}
    for row in rows:
        if isinstance(found[row], Exception):
            reason = u.reason(found[row])
            log.error("%s: %s: %s", image, row, reason)
            scores[row] = WORST | {"seconds": 0.0, "error": reason}
        else:
            masks, seconds = found[row]
            best = max((metrics(mask, truth, run.tolerance) for mask in masks), key=lambda score: score["iou"])
            scores[row] = best | {"seconds": seconds, "error": ""}
    return scores


# ---------------------------------------------------------------------------------------------------------------
# Scores on disk, and what is made of them
# ---------------------------------------------------------------------------------------------------------------

COLUMNS = ("settings", "image", "method", *METRICS, "seconds", "error")


def prepare_csv(path):
    """Begin a CSV file with its header, or take off the line that a kill has cut short. Raises ValueError for another."""
    header = (",".join(COLUMNS) + "\n").encode()
    with open(path, "a+b") as file:
        file.seek(0)
        content = file.read()
        if content[: len(header)] != header[: len(content)]:
            raise ValueError(f"{path}: its columns are not those of this program; write to another file")
        file.truncate(content.rfind(b"\n") + 1)
        if len(content) < len(header):
            file.write(header)


def read_scores(path, fingerprints):
    """{(stem, row): scores} of the rows in a CSV file that did not fail.

    fingerprints: {row: the settings' digest}. Raises ValueError where a row was made with other settings.
    """
    done = {}
    with open(path, newline="") as file:
        for line in csv.DictReader(file):
            if line["method"] not in fingerprints:
                continue
            if line["settings"] != fingerprints[line["method"]]:
                raise ValueError(
                    f"{path}: holds {line['method']} with other settings; give the same ones, or another file"
                )
            if not line["error"]:
                numbers = {name: float(line[name]) for name in (*METRICS, "seconds")}
                done[line["image"], line["method"]] = numbers | {"error": ""}
    return done


def summarise(scores, stems, rows, groups, seed):
    """What the table and the JSON file say of each row: {row: means, 95 % intervals, difference to the first row}.

    scores: {(stem, row): scores}. groups: {stem: label} or None; then also the mean of the groups' means ("macro").
    """
    labels = [groups[stem] for stem in stems] if groups else None
    table = {row: {m: np.array([scores[stem, row][m] for stem in stems]) for m in METRICS} for row in rows}
    summary = {}
    for row in rows:
        entry = {"failed": [stem for stem in stems if scores[stem, row]["error"]]}
        for m in METRICS:
            values = table[row][m]
            difference = values - table[rows[0]][m]
            entry[m] = {"mean": float(values.mean()), "interval": interval(values, labels, seed)}
            entry[m] |= {
                "difference": float(difference.mean()),
                "difference_interval": interval(difference, labels, seed),
            }
            if groups:
                inside = {g: values[[label == g for label in labels]].mean() for g in dict.fromkeys(labels)}
                entry[m] |= {
                    "groups": {g: float(v) for g, v in inside.items()},
                    "macro": float(np.mean([*inside.values()])),
                }
        summary[row] = entry
    return summary


# Table I of the paper: (mIoU, Dice) in %
REFERENCE_ROWS = ("UnSegMedGATc", "UnSegMedGAT", "UnSeGArmaNet", "UnSegGNet", "MedSAM", "MinCutPool", "DSM", "ViT-KMeans")
REFERENCES = {
    "isic2018": ((74.76, 85.17), (73.75, 84.34), (73.16, 83.16), (73.94, 84.12),
                 (61.36, 73.06), (72.31, 83.24), (72.2, 81.71), (68.6, 78.37)),
    "colondb": ((65.1, 77.31), (57.21, 70.76), (59.35, 72.58), (55.67, 69.18),
                (70.29, 80.50), (56.09, 69.71), (47.46, 63.50), (51.84, 67.23)),
}  # fmt: skip


def markdown(summary, groups, reference=None):
    """The table. In % but for nothing: shares of 1 times 100, and HD95 of the diagonal; 95 % intervals in brackets."""

    def cell(value, bounds, sign=""):
        brackets = f" [{bounds[0] * 100:{sign}.1f}, {bounds[1] * 100:{sign}.1f}]" if bounds else ""
        return f"{value * 100:{sign}.1f}{brackets}"

    macro = ["macro mIoU", "macro Dice"] if groups else []
    head = ["method", "mIoU", "Dice", *macro, "precision", "recall", "HD95", "NSD", "mIoU less first row's", "failed"]
    lines = [head, ["---"] + ["--:"] * (len(head) - 1)]
    for row, entry in summary.items():
        first = row == next(iter(summary))
        line = [row] + [cell(entry[m]["mean"], entry[m]["interval"]) for m in ("iou", "dice")]
        line += [f"{entry[m]['macro'] * 100:.1f}" for m in ("iou", "dice")] if groups else []
        line += [f"{entry[m]['mean'] * 100:.1f}" for m in ("precision", "recall")]
        line += [f"{entry['hd95']['mean']:.1f}", f"{entry['nsd']['mean'] * 100:.1f}"]
        line += ["" if first else cell(entry["iou"]["difference"], entry["iou"]["difference_interval"], "+")]
        lines.append(line + [str(len(entry["failed"]))])
    if reference:
        for row, numbers in zip(REFERENCE_ROWS, REFERENCES[reference]):
            lines.append([f"{row} (published)"] + [f"{number:.2f}" for number in numbers] + [""] * (len(head) - 3))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


TRUE_COLOUR, PREDICTED_COLOUR, TILE = (255, 220, 0), (0, 200, 255), 300


def contact_sheet(pairs, scores, row, run, columns=4):
    """The best, median and worst images of a row, one line each: a PIL image. Yellow: true contour, blue: predicted."""
    ranked = sorted((s for s in pairs if not scores[s, row]["error"]), key=lambda stem: -scores[stem, row]["iou"])
    columns = min(columns, math.ceil(len(ranked) / 3))
    middle = (len(ranked) - columns) // 2
    chosen = ranked[:columns] + ranked[middle : middle + columns] + ranked[len(ranked) - columns :]
    tiles = []
    for number, stem in enumerate(chosen):
        found, scored, rgb = masks_of(stem, *pairs[stem], [row], run)
        if isinstance(found[row], Exception):  # it went well before: the file has changed since
            raise found[row]
        truth = load_mask(pairs[stem][1])[scored]
        mask = max(found[row][0], key=lambda mask: metrics(mask, truth)["iou"])
        drawn = rgb[scored].copy()
        for area, colour in ((truth, TRUE_COLOUR), (mask, PREDICTED_COLOUR)):
            drawn[area ^ ndimage.binary_erosion(area, iterations=max(1, max(area.shape) // TILE))] = colour
        text = f"{('best', 'median', 'worst')[number // columns]}: {stem}, IoU {scores[stem, row]['iou'] * 100:.1f}"
        tiles.append(u.tile(text, ImageOps.pad(Image.fromarray(drawn), (TILE, TILE), color="white"), (TILE, TILE)))
    return u.side_by_side(tiles, columns)


# ---------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------


# The authors' published code with its ISIC settings (for ColonDB, --tau 0.5; for K clusters, --balance 2 / K^(1/4)).
# Not copied are its dropout, its extra edge term in the attention, its division of the graph by the maximum, and its
# features that are not normalised.
OFFICIAL = u.PRESETS["paper"] | {"tau": 0.35, "stride": 4, "heads": 1, "widths": (32, 64, 128), "layers": 1, "lr": 1e-4,
                                 "epochs": 55, "resolution": 0.5, "balance": 2 * 2**-0.25, "squash": True}  # fmt: skip


def named_folder(text):
    """("name", Path) from "name=folder"."""
    name, equals, folder = text.partition("=")
    if not (name and equals and folder) or name in METHODS or name in REFERENCE_ROWS:
        raise argparse.ArgumentTypeError(f"must be NAME=FOLDER, the name not that of a method here; got {text!r}")
    return name, Path(folder)


def build_parser():
    parser = argparse.ArgumentParser(
        prog="eval.py",
        description="Score UnSegMedGAT, the methods of its paper and free baselines on your images and masks.",
        epilog="Protocols: " + "; ".join(f"{name}: {text}" for name, text in PROTOCOLS.items())
        + ". `eval.py bench` times the stages on this machine. Exit code: 0 all done, 1 some image failed, 2 wrong use.",
    )  # fmt: skip
    parser.add_argument("images", type=Path, help="a folder of images")
    parser.add_argument("masks", type=Path, help="a folder of masks with the same names; _mask and the like may follow")
    parser.add_argument("--protocol", choices=PROTOCOLS, default="blind", help="default blind; see below")
    parser.add_argument("--methods", type=lambda text: text.split(","), default=list(METHODS), metavar="A,B",
                        help=f"of {', '.join(METHODS)}; default all")  # fmt: skip
    parser.add_argument("--predictions", type=named_folder, action="append", default=[], metavar="NAME=FOLDER",
                        help="also score these masks, made elsewhere; may be given several times")  # fmt: skip
    parser.add_argument("--preset", choices=["official", *u.PRESETS], help="the authors' code's settings, or the paper's; "
                        "other flags still count")  # fmt: skip
    parser.add_argument("--squash", action=argparse.BooleanOptionalAction, default=False,
                        help="resize to a square first, as the authors' code does; part of --preset official")  # fmt: skip
    parser.add_argument("--jitter", type=int, default=0, metavar="PX",
                        help="move the given point, or each side of the given box, by up to PX, seeded")  # fmt: skip
    parser.add_argument("--plant", type=float, metavar="NOISE", help="USES GROUND TRUTH: features made from it, with "
                        "noise, in the backbone's place; says what a backbone that knows the object would give")  # fmt: skip
    parser.add_argument("--tolerance", default="2%", help="of the surface Dice: 2%% of the diagonal (default), or 5px")
    parser.add_argument("--limit", type=int, metavar="N", help="only N pairs, evenly spread over the list")
    parser.add_argument("--group-by", type=re.compile, metavar="REGEX", help="its first group in an image's name is the "
                        "image's group, as ^(s\\d+)_ for sequences: adds means of the groups' means, and the intervals "
                        "resample groups")  # fmt: skip
    parser.add_argument("--reference", choices=REFERENCES, help="add the paper's published rows")
    parser.add_argument("--csv", type=Path, help="scores of each image and method, written as they come")
    parser.add_argument("--resume", action="store_true", help="keep what the --csv file holds and do the rest")
    parser.add_argument("--json", type=Path, help="the table with all intervals, settings and versions")
    parser.add_argument("--sheet", type=Path, help="a .png: the first row's best, median and worst "
                        "images, the true contour in yellow and the predicted one in blue")  # fmt: skip
    u.add_backbone_flags(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    u.add_config_flags(parser)
    return parser


def check(options):
    """Raise ValueError for wrong use that can be told before any work."""
    unknown = [name for name in options.methods if name not in METHODS]
    for wrong, message in [
        (unknown, f"--methods: there is no {', '.join(unknown)}; choose from {', '.join(METHODS)}"),
        (options.jitter < 0, "--jitter must be at least 0"),
        (options.jitter and options.protocol not in ("point", "box"), "--jitter needs --protocol point or box"),
        (options.plant is not None and not 0 <= options.plant < math.inf, "--plant needs a noise of at least 0"),
        (options.plant is not None and (options.weights or options.backbone == "dino"),
         "--plant stands in for the backbone: leave --backbone dino and --weights out"),
        (options.squash and options.protocol in ("point", "box"), "--squash would distort what is given: add --no-squash"),
        (options.limit is not None and options.limit < 1, "--limit must be at least 1"),
        (options.group_by and options.group_by.groups < 1, "--group-by needs a group in parentheses, as ^(s\\d+)_"),
        (options.resume and not options.csv, "--resume needs the --csv FILE to go on with"),
        (options.csv and options.csv.exists() and not options.resume,
         f"{options.csv}: exists; add --resume to go on with it, or name another file"),
        (options.sheet and options.sheet.suffix.lower() != ".png", f"{options.sheet}: the sheet's name must end in .png"),
    ]:  # fmt: skip
        if wrong:
            raise ValueError(message)
    for path in filter(None, (options.csv, options.json, options.sheet)):
        if not os.access(path.parent, os.W_OK):
            raise ValueError(f"{path}: there is no such folder, or no permission to write there")
    pixels(options.tolerance, 1)
    if "unsegmedgatc" in options.methods and options.epochs <= 5 and not options.collective:
        raise ValueError("unsegmedgatc has 5 shared epochs, so --epochs must be more; or name other --methods")
    u.config_from(options)


def shared_parameters(pairs, run, quiet):
    """The first phase of UnSegMedGATc over all the images; always from the start, so that --resume changes nothing."""
    scenes, (rank, world) = [], u.rank_and_world()
    share = dict(list(pairs.items())[rank::world])
    with torch.hub.tqdm(total=len(share), desc="features", disable=quiet) as bar:
        for stem, (image, truth_path) in share.items():
            try:
                rgb, seen, hint, backbone = frame(stem, image, truth_path, run)
                _, features, weights = look(rgb[seen], run, backbone, hint)
                scenes.append((features.cpu(), weights.cpu()))
            except Exception as error:
                log.debug("%s: %s", image, error)  # `evaluate` meets the same failure, and names the image
                scenes.append(None)
            bar.update(1)
    config = collective(run.config)
    with torch.hub.tqdm(total=config.collective * len(pairs), desc="shared", disable=quiet) as bar:
        return u.fit_collective(u.gather_all(scenes), config, run.device, progress=lambda: bar.update(1))


def settings_of(run, options):
    """All that the scores depend on beside the images, for the fingerprints and the JSON file."""
    weights = options.weights and options.weights.name
    backbone = {"name": run.backbone.name, "branch": options.branch, "weights": weights}
    settings = {name: getattr(run, name) for name in ("protocol", "squash", "jitter", "plant", "tolerance")}
    return settings | {"backbone": backbone, "config": dataclasses.asdict(run.config)}


def fingerprint(row, settings, run, pairs):
    """A digest of the settings of one row; of the collective method, whose scores depend on all the images, also of them."""
    extra = sorted(pairs) if row == "unsegmedgatc" else sorted(map(str, run.predictions.get(row, {}).values()))
    return hashlib.sha256(json.dumps([settings, extra], sort_keys=True).encode()).hexdigest()[:12]


def score_all(pairs, rows, run, options, settings):
    """{(stem, row): scores} of every image and row, written to the CSV file as they come; ranks share the images."""
    fingerprints = {row: fingerprint(row, settings, run, pairs) for row in rows}
    rank, world = u.rank_and_world()
    if options.csv and rank == 0:
        prepare_csv(options.csv)
    u.gather(None)
    scores = read_scores(options.csv, fingerprints) if options.csv else {}
    u.gather(None)  # so no rank reads before the file is ready, or writes before every rank has read
    todo = {stem: missing for stem in pairs if (missing := [row for row in rows if (stem, row) not in scores])}
    if "unsegmedgatc" in rows and (options.sheet or any("unsegmedgatc" in missing for missing in todo.values())):
        shared = shared_parameters(pairs, run, options.quiet)
        run.methods["unsegmedgatc"] = functools.partial(unsegmedgatc, shared=shared)
    share = list(todo)[rank::world]
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(
            torch.hub.tqdm(total=len(share), desc=run.protocol, disable=options.quiet or rank > 0)
        )
        file = stack.enter_context(open(options.csv or os.devnull, "a", newline=""))
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        for stem in share:
            for row, score in evaluate(stem, *pairs[stem], todo[stem], run).items():
                scores[stem, row] = score
                writer.writerow({"settings": fingerprints[row], "image": stem, "method": row} | score)
            file.flush()  # an image's lines in one piece, so that those of several ranks do not mix
            bar.update(1)
    for part in u.gather({(stem, row): scores[stem, row] for stem in share for row in todo[stem]}):
        scores |= part
    return scores


def run_evaluation(options):
    """Score what the options ask for and print the table; returns the exit code. Raises errors for wrong use."""
    check(options)
    u.gather(None)  # no rank writes before every rank has looked what exists
    pairs, alone = pair_files(options.images, options.masks)
    for path in alone:
        log.warning("%s: has no partner and is left out", path)
    if options.limit:
        stems = list(pairs)
        spread = np.unique(np.linspace(0, len(stems) - 1, min(options.limit, len(stems))).round().astype(int))
        pairs = {stems[i]: pairs[stems[i]] for i in spread}
    groups = group_of(pairs, options.group_by) if options.group_by else None
    rank, _ = u.rank_and_world()
    device = u.pick_device(options.device)
    if options.plant is None:
        backbone = u.load_backbone(options.backbone, options.weights, options.branch, device, not options.quiet)
    else:  # of each image its own: see `frame`
        backbone = u.Backbone(f"planted from the GROUND TRUTH, noise {options.plant:g}", None)
    if backbone.name != "dino":
        log.warning("the backbone is %s, not DINO: these numbers are not comparable with the paper's", backbone.name)
    methods = {name: METHODS[name] for name in options.methods}
    predictions = {name: by_stem(files_below(folder), True) for name, folder in options.predictions}
    run = Run(u.config_from(options), backbone, device, options.protocol, options.squash, options.jitter,
              options.plant, options.tolerance, methods, predictions)  # fmt: skip
    hint = (0, 0) if run.protocol == "point" else (0, 0, 1, 1)
    rows = [*methods, *predictions, LOCATED, *free_rows(run.protocol, (1, 1), hint)]
    settings = settings_of(run, options)
    scores = score_all(pairs, rows, run, options, settings)
    summary = summarise(scores, list(pairs), rows, groups, run.config.seed)
    code = 1 if any(entry["failed"] for entry in summary.values()) else 0
    if rank > 0:  # the first rank tells: torchrun ends them all as soon as one has failed
        return 0

    what = PROTOCOLS[run.protocol] if run.plant is None or run.protocol != "blind" else "the whole image"
    what += "" if run.plant is None else "; USES GROUND TRUTH: the features are made from it"
    print(f"**{run.protocol}** protocol: {what}. n = {len(pairs)} images", end="")
    print(f" in {len(set(groups.values()))} groups." if groups else ".")
    changed = {f.name: getattr(run.config, f.name) for f in dataclasses.fields(u.Config)}
    changed = {name: value for name, value in changed.items() if value != getattr(u.Config(), name)}
    changed |= {name: settings[name] for name in ("squash", "jitter") if settings[name]}
    print(f"Backbone: {backbone.name}. Seed {run.config.seed}. Settings: {options.preset or 'default'}", end="")
    print("".join(f", {name} {value:.4g}" if isinstance(value, float) else f", {name} {value}"
                  for name, value in changed.items()) + ".\n")  # fmt: skip
    print(markdown(summary, groups, options.reference))
    print(f"\nIn %; HD95 in % of the diagonal; NSD at a tolerance of {run.tolerance}"
          f"{' of the diagonal' if run.tolerance.endswith('%') else ''}; 95 % bootstrap intervals in brackets. "
          "A failed image counts as 0 (HD95: 100).")  # fmt: skip
    if options.reference:
        print("Published: Table I of the paper, DINO features and the official protocol on the whole data set.")
    if options.json:
        packages = ("torch", "torchvision", "numpy", "scipy", "pillow")
        versions = {"python": platform.python_version()} | {name: version(name) for name in packages}
        facts = {"images": len(pairs), "preset": options.preset, "limit": options.limit, "settings": settings}
        with u.whole(options.json) as part:
            part.write_text(json.dumps(facts | {"versions": versions, "rows": summary}, indent=1) + "\n")
    succeeded = any(not scores[stem, rows[0]]["error"] for stem in pairs)
    if options.sheet and succeeded:
        with u.whole(options.sheet) as part:
            contact_sheet(pairs, scores, rows[0], run).save(part, format="PNG")
    return code


def group_of(stems, pattern):
    """{stem: group}. Raises ValueError for a stem that the pattern does not fit."""
    found = {stem: pattern.search(stem) for stem in stems}
    for stem, match in found.items():
        if not match or match[1] is None:
            raise ValueError(f"--group-by {pattern.pattern}: does not fit the image {stem}")
    return {stem: match[1] for stem, match in found.items()}


# ---------------------------------------------------------------------------------------------------------------
# Benchmark
# ---------------------------------------------------------------------------------------------------------------

SIZES = {784: (224, 8), 3025: (224, 4), 12321: (448, 4)}  # N: (size, stride)
MEGAPIXELS = (1, 3, 12)
MOST_PLAIN, MOST_GEOMETRIC = 3025, 784  # nodes; the others are left out of larger graphs, for their time and memory


def plain_attention(h, s, t, adjacency):
    """Eqs. (2) and (3) in six lines, with every N x N tensor that autograd then keeps; shapes as in MaskedAttention."""
    e = F.leaky_relu(s[:, :, None] + t[:, None, :], u.SLOPE)
    e = e.masked_fill(adjacency <= 0, -torch.inf)
    return e.softmax(dim=2) @ h


def photograph(height, width, seed=0):
    """Something like a lesion on skin, with uneven light, texture and noise: (H,W,3) uint8."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    texture = ndimage.zoom(random.normal(size=(height // 40 + 1, width // 40 + 1)), 40, order=1)[:height, :width]
    lesion = 1 / (1 + np.exp(20 * (np.hypot(x + 0.1, y) - 0.45 - 0.05 * texture)))
    skin = np.array([225, 180, 160]) - 25 * (x**2 + y**2)[..., None]
    rgb = (
        skin + lesion[..., None] * [-95, -105, -105] + 6 * texture[..., None] + random.normal(0, 3, (height, width, 3))
    )
    return rgb.clip(0, 255).astype(np.uint8)


def seconds(function, device, repeats=3):
    """The least wall-clock time of some calls after a first one: what the machine can do, less what disturbs it."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def peak_memory(device):
    """GiB at most so far: of the GPU, or of this whole process."""
    import resource  # which Windows lacks

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on a Mac, else in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def products(n, config, channels, device):
    """The matrix products of one epoch that no implementation can do without, as a function to time.

    For each layer: X W, alpha @ h, and twice as many for the gradients; for the loss, A @ C and its gradient's.
    """

    def of(*shape):
        return torch.rand(*shape, device=device)

    alpha, pairs = of(n, n), []
    for width in config.widths:
        for layer in range(config.layers):
            pairs += [(of(n, channels if layer == 0 else width), of(channels if layer == 0 else width, width))] * 3
            # As one product for all heads: the same number of operations, and the best that a library can do.
            pairs += [(alpha, of(n, width))] * 2 + [(of(n, width), of(width, n))]
    pairs += [(alpha, of(n, config.clusters))] * 2

    def run():
        for a, b in pairs:
            a @ b

    return run


def bench_graph(n, threads, device_name):
    """One row of the stages' table, in a process of its own, so that the peak memory is this row's: a dictionary."""
    torch.set_num_threads(threads)
    device = u.pick_device(device_name)
    size, stride = SIZES[n]
    config, row = u.Config(size=size, stride=stride), {"N": n}
    backbone = u.load_backbone("builtin")
    rgb = photograph(size, size)
    row["features and place, ms"] = 1e3 * seconds(lambda: u.look(rgb, config, backbone, device), device)
    view, features = u.look(rgb, config, backbone, device)
    weights = u.node_weights(view, config.prior).to(device)
    row["graph, ms"] = 1e3 * seconds(lambda: u.build_graph(features, config.tau, weights), device)
    adjacency, x = u.build_graph(features, config.tau, weights), u.standardise(features)
    row["edges, of N x N"] = float((adjacency > 0).float().mean())
    blockwise = u.MaskedAttention.apply
    for heads in (1, 4):
        settings = dataclasses.replace(config, heads=heads)
        network, optimizer = u.new_network(x.shape[1], settings, device)

        def epoch():
            u.gradients(network, x, adjacency, settings)
            optimizer.step()

        name = f"epoch, {heads} head{'s' * (heads > 1)}"
        ours = seconds(epoch, device)
        row[f"{name}, ms"] = 1e3 * ours
        if heads == 4:
            row["peak memory so far, GiB"] = peak_memory(device)
            if n <= MOST_PLAIN:
                start = time.perf_counter()
                row["epochs until settled"] = len(u.fit(features, adjacency, settings)[1])
                row["fit, s"] = time.perf_counter() - start
        row[f"{name}: x its products alone"] = ours / seconds(products(n, settings, x.shape[1], device), device)
        if n <= MOST_PLAIN:
            u.MaskedAttention.apply = plain_attention
            row[f"{name}: plain autograd, x ours"] = seconds(epoch, device, 1) / ours
            u.MaskedAttention.apply = blockwise
        if n <= MOST_GEOMETRIC:
            row[f"{name}: torch_geometric, x ours"] = geometric(x, adjacency, settings, device, ours)
    return row


def geometric(features, adjacency, config, device, ours):
    """How many times `ours` seconds an epoch with torch_geometric's GATConv takes; None where it is not installed."""
    try:
        from torch_geometric.nn import GATConv
    except ImportError:
        return None

    network, _ = u.new_network(features.shape[1], config, device)
    for series, width in zip(network.series, config.widths):
        for layer in range(config.layers):
            into = features.shape[1] if layer == 0 else width
            series[layer] = GATConv(into, width // config.heads, config.heads, add_self_loops=False, bias=False).to(
                device
            )
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.lr)
    edges = adjacency.nonzero().T.contiguous()

    def epoch():
        optimizer.zero_grad()
        u.modularity_loss(network(features, edges), adjacency, config.resolution, config.balance).backward()
        optimizer.step()

    return seconds(epoch, device, 1) / ours


def bench_refinement(megapixels):
    """One row of the refinement's table: a dictionary."""
    height = round(math.sqrt(megapixels * 1e6 * 3 / 4))
    guide, cpu = photograph(height, height * 4 // 3), torch.device("cpu")
    target = (guide[..., 1] < 130).astype(float)
    grid = seconds(lambda: bilateral.BilateralGrid(guide), cpu, 1)
    whole = seconds(lambda: bilateral.solve(target, guide), cpu, 1)
    return {"megapixels": megapixels, "grid, s": grid, "whole refinement, s": whole, "peak memory, GiB": peak_memory(cpu)}


def bench(argv):
    """`python eval.py bench`: print what each stage costs on this machine. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="eval.py bench", description="Time the stages on a drawn image, no files needed."
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    parser.add_argument("--quick", action="store_true", help="only the smallest sizes")
    options = parser.parse_args(argv)
    device = u.pick_device(options.device)
    threads = torch.get_num_threads()
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    print(
        f"{name}, {threads} threads; Python {platform.python_version()}, torch {torch.__version__}, NumPy {np.__version__}"
    )
    spawn = multiprocessing.get_context("spawn")
    for function, sizes, arguments in [
        (bench_graph, SIZES, (threads, str(device))),
        (bench_refinement, MEGAPIXELS, ()),
    ]:
        rows = []
        for size in list(sizes)[: 1 if options.quick else None]:
            with spawn.Pool(1) as pool:  # a process for each, so that its peak memory is its own
                rows.append(pool.apply(function, (size, *arguments)))
        print("\n| " + " | ".join(["", *[cell_text(row.pop(next(iter(row)))) for row in rows]]) + " |")
        print("|---" + "|--:" * len(rows) + "|")
        for name in rows[0]:
            print(f"| {name} | " + " | ".join(cell_text(row.get(name)) for row in rows) + " |")
    return 0


def cell_text(value):
    """A number with three digits, a text as it is."""
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def main(argv=None):
    """The command line; returns the exit code."""
    logging.basicConfig(format=u.LOG_FORMAT)
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv[:1] == ["bench"]:
            return bench(argv[1:])
        options = u.parse_options(build_parser(), argv, u.PRESETS | {"official": OFFICIAL})
        with u.ranks():
            return run_evaluation(options)
    except (ValueError, OSError, RuntimeError) as error:
        log.error("%s", u.reason(error))
        return 2
    except KeyboardInterrupt:
        log.error("interrupted; with --csv, --resume goes on from here")
        return 130


if __name__ == "__main__":
    sys.exit(main())
