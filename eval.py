"""How well does it work on your images? The methods of the paper's Table I but MedSAM, beside baselines for nothing.

    python eval.py images/ masks/                               # the headline: no ground truth reaches a method
    python eval.py images/ masks/ --protocol point              # a point in the object is given; or box
    python eval.py images/ masks/ --plant 1                     # how good would a backbone that knows the object be?
    python eval.py images/ masks/ --protocol official --preset official --reference isic2018      # as Table I was made
    python eval.py images/ masks/ --csv scores.csv --resume     # goes on where an interrupted run stopped
    torchrun --nproc-per-node=8 eval.py images/ masks/          # on many cores, GPUs or machines
    python eval.py bench                                        # how fast it is on your machine; needs no images

All clusterings get the same features and the same graph, and the same steps turn their clusters into masks, so a
difference between two rows is the clustering alone; the row unsegmedgat is what the program makes.
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
import io
import json
import logging
import math
import multiprocessing
import os
import platform
import re
import sys
import time
import timeit
import zlib
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np
import scipy.cluster.vq
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from scipy import ndimage
from scipy.spatial import KDTree
from torch import nn

import bilateral
import unsegmedgat as u

log = logging.getLogger("eval")


# Methods: (features X (N,C), adjacency A (N,N), config) -> assignment (N,K), rows summing to 1 -----------------


def unsegmedgat(features, adjacency, config, shared=None):
    """The paper's method, each image alone; from the parameters `shared` of `fit_collective`, UnSegMedGATc."""
    return u.fit(features, adjacency, config, shared)[0]


def kmeans(features, adjacency, config):
    """Lloyd's algorithm on the features, the best of ten starts from k-means++ seeds; the graph is not used.

    Arthur and Vassilvitskii 2007. 10 steps are SciPy's default; 30 are past convergence here.
    """
    x, seeds = features.cpu().numpy().astype(np.float64), [(config.seed + n) % 2**32 for n in range(10)]
    runs = [scipy.cluster.vq.kmeans2(x, config.clusters, iter=30, minit="++", seed=seed) for seed in seeds]
    _, labels = min(runs, key=lambda run: np.square(x - run[0][run[1]]).sum())
    return one_hot(labels, features, config)


def one_hot(labels, features, config):
    """Labels (N,) as an assignment (N,K) of the features' type and device."""
    return F.one_hot(torch.as_tensor(labels).long(), config.clusters).to(features)


def normalise(adjacency):
    """D^-1/2 A D^-1/2 (N,N), D the degrees; a node without edges keeps a row of zeros.

    The symmetric normalisation of Kipf and Welling 2017. Their A + I is here A itself: eq. (1) has the self-loops.
    """
    scale = adjacency.sum(1).clamp(min=1e-12).rsqrt()
    return scale[:, None] * adjacency * scale


def dsm(features, adjacency, config):
    """Deep spectral methods (Melas-Kyriazi et al. 2022): the Fiedler vector of the normalised Laplacian, split at 0.

    For K > 2, k-means on the first K eigenvectors. The Laplacian is I - D^-1/2 A D^-1/2, so its lowest eigenvectors
    are the top ones of `normalise(A)`. The colour affinities that their paper may add to the graph are left out.
    """
    # All of them: of a graph in pieces the largest eigenvalue is there many times, and solvers for a few then fail
    _, vectors = torch.linalg.eigh(normalise(adjacency.double()))  # ascending
    vectors = vectors[:, -config.clusters :].to(features)  # (N,K)
    return one_hot(vectors[:, 0] > 0, features, config) if config.clusters == 2 else kmeans(vectors, adjacency, config)


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


def optimise(features, adjacency, config, convolution, loss):
    """Minimise a loss over one graph convolution and a perceptron, for all epochs: the assignment (N,K).

    convolution: a class, called with the widths in and out and the activation. loss: of the assignment, A (N,N), A
    normalised and config. The widths, the one hidden layer of the perceptron and five times the learning rate are ours
    (at the rate itself unseggnet loses 7 points of mIoU on ISIC); --settled is of the graph attention network alone.
    """
    width, activation = config.projection, u.ACTIVATIONS[config.activation]()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        layer = convolution(features.shape[1], width, activation)
        perceptron = nn.Sequential(nn.Linear(width, width), activation, nn.Linear(width, config.clusters))
    network = nn.ModuleList([layer, perceptron]).to(features.device)
    propagation = normalise(adjacency)
    x = u.standardise(features, propagation)
    optimizer = torch.optim.AdamW(network.parameters(), lr=5 * config.lr, weight_decay=config.weight_decay)
    for _ in range(config.epochs):
        optimizer.zero_grad(set_to_none=True)
        loss(perceptron(layer(x, propagation)).softmax(1), adjacency, propagation, config).backward()
        optimizer.step()
    with torch.no_grad():
        return perceptron(layer(x, propagation)).softmax(1)


def mincut_loss(assignment, _, propagation, config):
    """Cut and orthogonality loss, eq. (9) of Bianchi et al. 2020; a scalar. S (N,K), A normalised (N,N)."""
    within = (assignment * (propagation @ assignment)).sum()  # Tr(S^T A S)
    volume = (propagation.sum(1) @ assignment.square()).sum()  # Tr(S^T D S)
    overlap, k = assignment.T @ assignment, config.clusters  # (K,K)
    balance = (overlap / overlap.norm() - torch.eye(k).to(overlap) / math.sqrt(k)).norm()
    return -within / volume.clamp(min=1e-12) + balance


def modularity_loss(assignment, adjacency, _, config):
    """The paper's eq. (8)."""
    return u.modularity_loss(assignment, adjacency, config.resolution, config.balance)


skipping = functools.partial(Convolution, skip=True)
METHODS = {  # one more line adds a method
    "unsegmedgat": unsegmedgat,
    "unsegmedgatc": unsegmedgat,  # `score_all` gives it the shared parameters
    "vit-kmeans": kmeans,
    "dsm": dsm,
    "mincutpool": functools.partial(optimise, convolution=skipping, loss=mincut_loss),  # Bianchi et al. 2020
    "unseggnet": functools.partial(optimise, convolution=Convolution, loss=modularity_loss),  # Reddy et al. 2024
    "unsegarmanet": functools.partial(optimise, convolution=Arma, loss=modularity_loss),  # Reddy et al. 2024
}


# Beside the methods: rows that cost nothing, and the features of a backbone that knows the object --------------

LOCATED = "located place"  # the disc itself in a clustering's place, all steps after it the same


def ellipse(shape, box):
    """The ellipse inscribed in a box, over an image of shape (H,W): the pixels whose centre lies inside it."""
    x0, y0, x1, y1 = box
    y, x = np.ogrid[: shape[0], : shape[1]]
    return ((2 * x + 1 - x0 - x1) / (x1 - x0)) ** 2 + ((2 * y + 1 - y0 - y1) / (y1 - y0)) ** 2 <= 1


def free_rows(protocol, shape, hint):
    """{row: mask (H,W)} of guesses that look at no pixel. hint: the point or box in the pixels of `shape`, or None.

    The sizes are a share of the image's, one figure for all data.
    """
    (h, w), everything = shape, np.ones(shape, bool)
    name, box = "inscribed ellipse", hint
    if protocol == "blind":
        name, box = "centred ellipse", (0.25 * w, 0.25 * h, 0.75 * w, 0.75 * h)
    elif protocol == "point":
        x, y, r = hint[0] + 0.5, hint[1] + 0.5, 0.15 * min(shape)
        name, box = "disc at the point", (x - r, y - r, x + r, y + r)
    elif protocol == "box":  # nobody who was given a box would mark what lies outside it
        y, x = np.ogrid[:h, :w]
        everything = (y >= box[1]) & (y < box[3]) & (x >= box[0]) & (x < box[2])
    return {"everything foreground": everything, name: ellipse(shape, box)}


def plant(truth, noise, seed):
    """A Backbone whose features come from the truth (H,W) bool, so that pipeline and backbone can be judged apart.

    For a patch that the object covers to the share c in [0,1], in region l of the photograph's own colours and places,
    f = c o + (1 - c) (0.75 e0 + 0.66 r_l) + noise g / sqrt(384), with o = 0.35 e0 + 0.94 e1; e0, e1 and r_1..r_4 are
    random unit directions in 384 dimensions, the same for all images, and g is standard normal. seed: of g, a list.
    """
    directions = np.random.default_rng(0).standard_normal((6, 384))
    e0, e1, *regions = torch.from_numpy(directions / np.linalg.norm(directions, axis=1, keepdims=True)).float()

    def extract(view):
        y0, x0, y1, x1 = view.box
        covered = torch.from_numpy(truth[y0:y1, x0:x1]).float()[None, None]
        covered = F.interpolate(covered, size=view.image.shape[1:], mode="bilinear", antialias=True)
        c = F.avg_pool2d(covered, u.PATCH, view.stride)[0, 0]  # (h,w)
        lab = F.avg_pool2d(u.rgb_to_lab(view.image), u.PATCH, view.stride)
        row, column = torch.meshgrid(*(torch.linspace(0, 20, side) for side in c.shape), indexing="ij")
        looks = torch.cat([lab, row[None], column[None]]).flatten(1).T.double().numpy()  # (N,5)
        _, label = scipy.cluster.vq.kmeans2(looks, len(regions), iter=20, minit="++", seed=0)
        background = 0.75 * e0 + 0.66 * torch.stack(regions)[label]  # (N,384)
        g = torch.from_numpy(np.random.default_rng([*seed, *view.box]).standard_normal(background.shape)).float()
        c = c.reshape(-1, 1)
        return c * (0.35 * e0 + 0.94 * e1) + (1 - c) * background + noise / math.sqrt(384) * g

    return u.Backbone(f"planted, noise {noise:g}", extract)


# Metrics -------------------------------------------------------------------------------------------------------

METRICS = ("iou", "dice", "precision", "recall", "hd95", "nsd")
WORST = dict.fromkeys(METRICS, 0.0) | {"hd95": 100.0}  # of an image that failed, or where one mask is empty


def metrics(mask, truth, tolerance="2%"):
    """Scores of a mask (H,W) against the truth (H,W), a dictionary of floats.

    iou, dice, precision, recall: of the foreground, in [0,1]. Averaged over images, iou is the paper's mIoU (no
    average with the background's IoU, no pooling of the images' pixels) and dice its Dice.
    hd95: 95th percentile of the distances from each border pixel of either mask to the other's border, both ways
    pooled, in % of the diagonal of (H,W), as images differ in size.
    Border pixels have a 4-neighbour outside the mask or the image.
    nsd: normalised surface Dice (Nikolov et al. 2021), the share of all border pixels within the tolerance of the other
    border, in [0,1]. tolerance: "2%" of the diagonal, or "5px".
    Where one of the masks is empty: 0, and 100 for hd95. Where both are: a perfect score.
    """
    true_positive = int((mask & truth).sum())
    if not (mask.any() and truth.any()):
        return dict(WORST) if mask.any() or truth.any() else dict.fromkeys(METRICS, 1.0) | {"hd95": 0.0}
    diagonal = math.hypot(*truth.shape)
    a, b = (np.argwhere(area & ~ndimage.binary_erosion(area)) for area in (mask, truth))
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


# Images and masks on disk --------------------------------------------------------------------------------------

MASK_SUFFIX = re.compile(r"_(segmentation|lesion|mask)$", re.IGNORECASE)


def files_below(folder):
    """The image files in a folder and the folders below it, in order. Raises ValueError where there is none."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder")
    found = [p for p in sorted(folder.rglob("*")) if u.is_image(p)]
    if not found:
        raise ValueError(f"{folder}: there is no image in this folder")
    return found


def by_stem(paths, stems=None):
    """{stem: path}; masks lose _mask and the like, but what is in `stems`. Raises ValueError for two of one stem."""
    table = {}
    for path in paths:
        stem = path.stem if stems is None or path.stem in stems else MASK_SUFFIX.sub("", path.stem)
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
    both = {*image_paths} & {*mask_paths}
    marked = {path for path in both if MASK_SUFFIX.search(path.stem)}
    image_of = by_stem([path for path in image_paths if path not in marked])
    mask_of = by_stem([path for path in mask_paths if path not in both - marked], image_of)
    pairs = {stem: (path, mask_of[stem]) for stem, path in image_of.items() if stem in mask_of}
    if not pairs:
        names = "as a.jpg and a.png or a_mask.png have"
        raise ValueError(f"{images}, {masks}: no image and mask have the same name, {names}")
    return pairs, [path for table in (image_of, mask_of) for stem, path in table.items() if stem not in pairs]


def load_mask(path, shape):
    """Read a mask of two values: (H,W) bool, the brighter of them.

    So 0/1, 0/255, 16 bit and palettes all do, and colours; transparency counts as black, EXIF turns it as it does the
    image. Values in between do where they are a soft rim. A JPEG's are cut at half of 255, as it rings around both.
    Raises unsegmedgat.ImageError where it cannot be read, has other values, or its size is not `shape` (H,W).
    """
    try:
        with Image.open(path) as image:
            lossy, image = image.format in ("JPEG", "MPO", "WEBP"), u.turn_upright(image)
            if image.mode in ("P", "PA", "LA", "RGBA", "CMYK") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image).convert("RGB")
            values = np.atleast_3d(np.asarray(image).astype(float))  # (H,W,1) or (H,W,3)
    except Exception as error:  # Pillow's decoders raise many kinds on a damaged file
        raise u.ImageError(f"{path}: the mask cannot be read: {u.why_unreadable(error)}") from None
    if values.shape[:2] != tuple(shape):
        hint = ": was only one of them rotated?" if values.shape[:2] == tuple(shape)[::-1] else ""
        (h, w), (height, width) = values.shape[:2], shape
        raise u.ImageError(f"{path}: the mask is {w} x {h}, the image {width} x {height} pixels{hint}")
    if not np.isfinite(values).all():
        raise u.ImageError(f"{path}: the mask has values that are not finite numbers: make it binary, 0 and 255")
    if lossy:
        if ((values > 32) & (values < 224)).any(2).mean() > 0.2:
            raise u.ImageError(f"{path}: this is no mask of two values but a picture: were images and masks swapped?")
        return values.max(2) > 127.5
    return two_sided(values, path)


RIM = 3  # px, how far the soft rim of a mask may reach: anti-aliasing, or resizing by a small factor
FEW = 16  # values that a mask of several classes may have; a soft rim with noise has more


def two_sided(values, path):
    """The brighter side (H,W) bool of values (H,W,1) or (H,W,3): two of them, perhaps with a soft rim between.

    Where there are many values, those within a tenth of either side are noise, as a JPEG leaves it.
    Raises unsegmedgat.ImageError for other values: classes, a void rim around the object, a soft prediction.
    """
    if (values == values[..., :1]).all():  # grey
        values = values[..., :1]
    _, first, index = np.unique(values @ [1, 1e3, 1e6][: values.shape[2]], return_index=True, return_inverse=True)
    colours, index = values.reshape(-1, values.shape[2])[first], index.reshape(values.shape[:2])
    order = np.lexsort((colours.sum(1), colours.max(1)))  # by the brightest channel, then by all
    low, high = colours[order[0]], colours[order[-1]]
    if len(colours) == 1:
        return np.full(index.shape, bool(high.max() > 0))
    share = (colours - low) @ (high - low) / np.square(high - low).sum()  # 0 on the darker side, 1 on the brighter
    mixed = np.abs(colours - low - share[:, None] * (high - low)).max(1) < 0.05 * np.abs(high - low).max()
    noise = 0.1 if len(colours) > FEW else 0
    dark, bright, near = (share <= noise)[index], (share >= 1 - noise)[index], np.ones((3, 3), bool)
    between = ~dark & ~bright
    rim = ndimage.binary_dilation(dark, near, RIM) & ndimage.binary_dilation(bright, near, RIM)
    if not mixed.all() or (between & ~rim).sum() > 0.1 * between.sum():
        names = ", ".join(",".join(f"{value:g}" for value in colour) for colour in colours[:5])
        raise u.ImageError(f"{path}: the mask has {len(colours)} values ({names}{', ...' if len(colours) > 5 else ''}), "
                           "not two: make it binary, the object 255 and all else 0")  # fmt: skip
    return (share > 0.5)[index]


def inner_point(mask):
    """The pixel (x, y) nearest the centroid of a mask that is not empty."""
    inside = np.argwhere(mask)
    y, x = inside[np.square(inside - inside.mean(0)).sum(1).argmin()]
    return int(x), int(y)


def jittered(hint, jitter, shape, seed):
    """A point, or each side of a box, moved by up to `jitter` px; kept inside an image (H,W), a box not empty."""
    moved = np.array(hint) + np.random.default_rng(seed).integers(-jitter, jitter + 1, size=len(hint))
    moved[:2] = moved[:2].clip(0, [shape[1] - 1, shape[0] - 1])
    if len(hint) == 4:
        moved[2:] = moved[2:].clip(moved[:2] + 1, shape[::-1])
    return tuple(moved.tolist())


def loosened(box, factor, shape):
    """A box scaled about its centre, in whole px, kept inside an image (H,W) and not empty."""
    x0, y0, x1, y1 = box
    half = (x1 - x0) / 2 * (factor - 1), (y1 - y0) / 2 * (factor - 1)
    low = [max(0, round(start - more)) for start, more in zip((x0, y0), half)]
    high = [min(n, max(at + 1, round(stop + more))) for n, at, stop, more in zip(shape[::-1], low, (x1, y1), half)]
    return (*low, *high)


# Prediction under a protocol -----------------------------------------------------------------------------------

PROTOCOLS = {
    "blind": "the whole image; no ground truth reaches a method",
    "point": "USES GROUND TRUTH: its pixel nearest its centroid is given, as a user would click",
    "box": "USES GROUND TRUTH: its bounding box is given, as a user would draw it",
    "official": f"USES GROUND TRUTH: cropped to its bounding box + {u.RING} px, "
    "and the better of mask and inverse is kept",
}


@dataclasses.dataclass(frozen=True)
class Run:
    """What one evaluation is made of."""

    options: argparse.Namespace  # the command line
    config: u.Config
    backbone: u.Backbone
    device: torch.device
    methods: dict  # {row: function}
    predictions: dict  # {row: {stem: mask file}}, made elsewhere


class Scene:
    """One image under the protocol of a run: what of it is scored, what is given away, and the masks of the rows.

    Raises an exception where the image, or what the protocol needs of its truth, cannot be had.
    """

    def __init__(self, stem, paths, run):
        self.stem, self.paths, self.run = stem, paths, run
        self.rgb, self.scored, self.hint, self.backbone = u.load_image(paths[0]), np.s_[:, :], None, run.backbone
        protocol, noise = run.options.protocol, run.options.plant
        seed = [run.config.seed, zlib.crc32(os.fsencode(stem))]
        # Here something of the ground truth goes into a prediction, and the table says so; in the official protocol
        # it also chooses between a mask and its inverse.
        if protocol != "blind":
            if not self.truth.any():
                raise u.ImageError("the ground truth is empty, so it has no place: "
                                   "use --protocol blind, or leave the image out")  # fmt: skip
            box = x0, y0, x1, y1 = Image.fromarray(self.truth).getbbox()
            if protocol == "official":
                top, left = max(0, y0 - u.RING), max(0, x0 - u.RING)
                self.scored = np.s_[top : y1 + u.RING, left : x1 + u.RING]
                self.hint = x0 - left, y0 - top, x1 - left, y1 - top
            else:
                hint = box if protocol == "box" else inner_point(self.truth)
                if protocol == "box":
                    hint = loosened(hint, run.options.loosen, self.truth.shape)
                self.hint = jittered(hint, run.options.jitter, self.truth.shape, seed)
        if noise is not None:
            self.backbone = plant(self.squashed(self.truth[self.scored], Image.NEAREST), noise, seed)
        self.seen = self.rgb[self.scored]
        self.free = free_rows(protocol, self.seen.shape[:2], self.hint)

    @functools.cached_property
    def truth(self):
        """(H,W) bool, read when it is asked for: blind and without --plant by nothing that makes a mask."""
        return load_mask(self.paths[1], self.rgb.shape[:2])

    def squashed(self, array, method):
        """An image or mask as a square if the run says so, as the authors' code does before anything else."""
        size = (self.run.config.size,) * 2
        return np.array(Image.fromarray(array).resize(size, method)) if self.run.options.squash else array

    def nodes(self):
        """The view, features and node weights of what is seen."""
        given = {name: self.hint for name in ("point", "box") if name == self.run.options.protocol}
        rgb = self.squashed(self.seen, Image.BILINEAR)
        return u.extract_nodes(rgb, self.run.config, self.backbone, self.run.device, **given)

    @functools.cached_property
    def graph(self):
        """The view, features and adjacency, the same for all rows."""
        view, features, weights = self.nodes()
        return view, features, u.build_graph(features, self.run.config.tau, weights)

    def masks(self, row):
        """What a row makes of the part that is scored: [mask (H,W)]; in the official protocol, and its inverse."""
        config, predictions = self.run.config, self.run.predictions.get(row, {})
        if row in self.free:
            return [self.free[row]]
        if row in self.run.predictions:
            if self.stem not in predictions:
                raise u.ImageError(f"there is no prediction named {self.stem}")
            mask = load_mask(predictions[self.stem], self.rgb.shape[:2])[self.scored]
        else:
            view, features, adjacency = self.graph
            if row == LOCATED:
                assignment = one_hot(view.inside_ellipse().flatten(), features, config)
            else:
                assignment = self.run.methods[row](features, adjacency, config)
            size = (config.size,) * 2 if self.run.options.squash else self.seen.shape[:2]
            mask = Image.fromarray(u.finish(view, assignment, adjacency, config, size)["mask"])
            mask = np.asarray(mask.resize(self.seen.shape[1::-1], Image.NEAREST))
        return [mask, ~mask] if self.run.options.protocol == "official" else [mask]


def evaluate(stem, paths, rows, run):
    """Score some rows on one image: {row: {metric: float, "seconds": float, "error": text, empty if all went well}}."""
    made, scores = {}, {}
    try:
        scene = Scene(stem, paths, run)
        for row in rows:
            try:
                if row in run.methods:
                    scene.graph  # what all rows share is not counted
                start = time.perf_counter()
                made[row] = scene.masks(row), time.perf_counter() - start
            except Exception as error:
                log.error("%s: %s: %s", paths[0], row, u.reason(error))
                scores[row] = WORST | {"seconds": 0.0, "error": u.reason(error)}
        truth = scene.truth[scene.scored]
        if not truth.any():
            log.warning("%s: the ground truth is empty; only an empty mask scores 1, any other 0", paths[1])
    except Exception as error:
        log.error("%s: %s", paths[0], u.reason(error))
        return dict.fromkeys(rows, WORST | {"seconds": 0.0, "error": u.reason(error)})
    for row, (masks, seconds) in made.items():
        best = max((metrics(mask, truth, run.options.tolerance) for mask in masks), key=lambda s: s["iou"])
        scores[row] = best | {"seconds": seconds, "error": ""}
    return scores


# Scores on disk, and what is made of them ----------------------------------------------------------------------

COLUMNS = ("settings", "image", "method", *METRICS, "seconds", "error")


def begin_csv(path, fingerprints):
    """{(stem, row): scores} of what a CSV file holds; it then holds only whole lines, and none of what failed.

    fingerprints: {row: the settings' digest}. Raises ValueError for another program's file, and where a row was made
    with other settings.
    """
    header = ",".join(COLUMNS) + "\n"
    text = path.read_text(encoding="utf-8", errors="surrogateescape") if path.exists() else ""
    if text[: len(header)] != header[: len(text)]:
        raise ValueError(f"{path}: its columns are not those of this program; write to another file")
    text = text[: text.rfind("\n") + 1]  # a kill may have cut the last line short
    lines = [line for line in csv.DictReader(io.StringIO(text)) if line["error"] == ""]
    for row, settings in {(line["method"], line["settings"]) for line in lines}:
        if settings != fingerprints.get(row, settings):
            raise ValueError(f"{path}: holds {row} with other settings, folders or (unsegmedgatc) images; name another")
    with u.whole(path) as part, open(part, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    return {(line["image"], line["method"]): {m: float(line[m]) for m in METRICS} | {"error": ""} for line in lines}


def summarise(scores, stems, rows, labels, seed):
    """What the table and the JSON file say of each row: {row: means, 95 % intervals, difference to the first row}.

    scores: {(stem, row): scores}. labels: the group of each stem, or None; then also the mean of the groups' means.
    """
    summary = {}
    for row in rows:
        summary[row] = {"failed": [stem for stem in stems if scores[stem, row]["error"]]}
        for m in METRICS:
            values, first = (np.array([scores[stem, r][m] for stem in stems]) for r in (row, rows[0]))
            summary[row][m] = {
                "mean": float(values.mean()),
                "interval": interval(values, labels, seed),
                "difference": float((values - first).mean()),
                "difference_interval": interval(values - first, labels, seed),
            }
            if labels:
                means = {g: float(values[np.array(labels) == g].mean()) for g in dict.fromkeys(labels)}
                summary[row][m] |= {"groups": means, "macro": float(np.mean([*means.values()]))}
    return summary


# Table I of the paper: (mIoU, Dice) in %
REFERENCE_ROWS = "UnSegMedGATc UnSegMedGAT UnSeGArmaNet UnSegGNet MedSAM MinCutPool DSM ViT-KMeans".split()
REFERENCES = {
    "isic2018": ((74.76, 85.17), (73.75, 84.34), (73.16, 83.16), (73.94, 84.12),
                 (61.36, 73.06), (72.31, 83.24), (72.2, 81.71), (68.6, 78.37)),
    "colondb": ((65.1, 77.31), (57.21, 70.76), (59.35, 72.58), (55.67, 69.18),
                (70.29, 80.50), (56.09, 69.71), (47.46, 63.50), (51.84, 67.23)),
}  # fmt: skip


def as_table(lines):
    """Lists of texts as a table in Markdown, the first one its head."""
    rule = ["---"] + ["--:"] * (len(lines[0]) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]])


def markdown(summary, reference=None):
    """The table. Scores in %: shares times 100, HD95 of the diagonal; 95 % intervals in brackets."""

    def cell(value, bounds=None, sign=""):
        brackets = f" [{bounds[0] * 100:{sign}.1f}, {bounds[1] * 100:{sign}.1f}]" if bounds else ""
        return f"{value * 100:{sign}.1f}{brackets}"

    lines = []
    for row, entry in summary.items():
        iou, dice = entry["iou"], entry["dice"]
        line = {"method": row, "mIoU": cell(iou["mean"], iou["interval"]), "Dice": cell(dice["mean"], dice["interval"])}
        if "macro" in iou:
            line |= {"macro mIoU": cell(iou["macro"]), "macro Dice": cell(dice["macro"])}
        line |= {name: cell(entry[name]["mean"]) for name in ("precision", "recall")}
        line |= {"HD95": f"{entry['hd95']['mean']:.1f}", "NSD": cell(entry["nsd"]["mean"])}
        difference = cell(iou["difference"], iou["difference_interval"], "+") if lines else ""
        lines.append(line | {"mIoU less first row's": difference, "failed": str(len(entry["failed"]))})
    table = [[*lines[0]], *([*line.values()] for line in lines)]
    if reference:
        for row, numbers in zip(REFERENCE_ROWS, REFERENCES[reference]):
            table.append([f"{row} (published)", *(f"{number:.2f}" for number in numbers), *[""] * (len(lines[0]) - 3)])
    return as_table(table)


def contact_sheet(pairs, scores, row, run, columns=4):
    """The best, median and worst images of a row, one line each: a PIL image. Yellow: true contour, blue: predicted."""
    ranked = sorted((s for s in pairs if not scores[s, row]["error"]), key=lambda stem: -scores[stem, row]["iou"])
    columns, side = min(columns, math.ceil(len(ranked) / 3)), 300  # px, of a tile
    middle = (len(ranked) - columns) // 2
    chosen = ranked[:columns] + ranked[middle : middle + columns] + ranked[len(ranked) - columns :]
    tiles = []
    for number, stem in enumerate(chosen):
        scene = Scene(stem, pairs[stem], run)
        truth, drawn = scene.truth[scene.scored], scene.seen.copy()
        mask = max(scene.masks(row), key=lambda mask: metrics(mask, truth)["iou"])
        for area, colour in ((truth, (255, 220, 0)), (mask, (0, 200, 255))):
            drawn[area ^ ndimage.binary_erosion(area, iterations=max(1, max(area.shape) // side))] = colour
        text = f"{('best', 'median', 'worst')[number // columns]}: {stem}, IoU {scores[stem, row]['iou'] * 100:.1f}"
        tiles.append(u.tile(text, ImageOps.pad(Image.fromarray(drawn), (side, side), color="white"), (side, side)))
    return u.side_by_side(tiles, columns)


# Command line --------------------------------------------------------------------------------------------------

# The authors' published code with its ISIC settings (for ColonDB, --tau 0.5; for K clusters, --balance 2 / K^(1/4)).
# Not copied are its dropout, its extra edge term in the attention, its division of the graph by the maximum, and its
# features that are not normalised.
OFFICIAL = u.PRESETS["paper"] | {"tau": 0.35, "stride": 4, "heads": 1, "widths": (32, 64, 128), "layers": 1, "lr": 1e-4,
                                 "epochs": 55, "resolution": 0.5, "balance": 2 * 2**-0.25, "squash": True}  # fmt: skip


def build_parser():
    parser = argparse.ArgumentParser(
        prog="eval.py",
        description="Score UnSegMedGAT, the methods of its paper and free baselines on your images and masks.",
        epilog="Protocols: " + "; ".join(f"{name}: {text}" for name, text in PROTOCOLS.items()) + ". `eval.py bench` "
        "times the stages on this machine. Exit code: 0 all done, 1 some image failed, 2 wrong use.",
    )  # fmt: skip
    add = parser.add_argument
    add("images", type=Path, help="a folder of images")
    add("masks", type=Path, help="a folder of masks with the same names; _mask and the like may follow")
    add("--protocol", choices=PROTOCOLS, default="blind", help="default blind; see below")
    add("--methods", type=lambda text: text.split(","), default=list(METHODS), metavar="A,B",
        help=f"of {', '.join(METHODS)}; default all")  # fmt: skip
    add("--predictions", type=lambda text: text.partition("=")[::2], action="append", default=[], metavar="NAME=FOLDER",
        help="also score these masks (no probabilities), made elsewhere; may be given several times")  # fmt: skip
    add("--preset", choices=["official", *u.PRESETS],
        help="the authors' code's settings, or the paper's; other flags still count")  # fmt: skip
    add("--squash", action=argparse.BooleanOptionalAction, default=False,
        help="resize to a square first, as the authors' code does; part of --preset official")  # fmt: skip
    add("--loosen", type=float, default=1.0, metavar="FACTOR", help="scale the given box about its centre, as people "
        "draw boxes with room to spare; cut at the image's sides; default 1")  # fmt: skip
    add("--jitter", type=int, default=0, metavar="PX",
        help="move the given point, or each side of the given box, by up to PX, seeded")  # fmt: skip
    add("--plant", type=float, metavar="NOISE", help="USES GROUND TRUTH: features made from it, with noise, in the "
        "backbone's place; says what a backbone that knows the object would give")  # fmt: skip
    add("--tolerance", default="2%", help="of the surface Dice: 2%% of the diagonal (default), or 5px")
    add("--limit", type=int, metavar="N", help="only N pairs, evenly spread over the list")
    add("--group-by", metavar="REGEX",
        help="its first group in an image's name is the image's group, as ^(s\\d+)_ for sequences: adds means of the "
        "groups' means, and the intervals resample groups")  # fmt: skip
    add("--reference", choices=REFERENCES, help="add the paper's published rows")
    add("--csv", type=Path, help="scores of each image and method, written as they come")
    add("--resume", action="store_true", help="keep what the --csv file holds and do the rest")
    add("--json", type=Path, help="the table with all intervals, settings and versions")
    add("--sheet", type=Path, help="a .png: the first row's best, median and worst images, the true contour in yellow "
        "and the predicted one in blue")  # fmt: skip
    u.add_backbone_flags(parser)
    add("--quiet", action="store_true", help="no progress bars")
    u.add_config_flags(parser)
    return parser


def check(options):
    """Raise ValueError for wrong use that can be told before any work."""
    unknown = [name for name in options.methods if name not in METHODS]
    names = [name for name, folder in options.predictions if folder]
    free = free_rows(options.protocol, (1, 1), (0, 0, 1, 1))
    for wrong, message in [
        (unknown, f"--methods: there is no {', '.join(unknown)}; choose from {', '.join(METHODS)}"),
        (len({*names} - {"", LOCATED, *METHODS, *free}) < len(options.predictions),
         "--predictions must be NAME=FOLDER, each name another and none that of a row here"),
        (options.jitter < 0, "--jitter must be at least 0"),
        (options.jitter and options.protocol not in ("point", "box"), "--jitter needs --protocol point or box"),
        (not 0 < options.loosen < math.inf, "--loosen must be above 0"),
        (options.loosen != 1 and options.protocol != "box", "--loosen needs --protocol box"),
        (options.plant is not None and not 0 <= options.plant < math.inf, "--plant needs a noise of at least 0"),
        (options.plant is not None and (options.weights or options.backbone == "dino"),
         "--plant stands in for the backbone: leave --backbone dino and --weights out"),
        (options.squash and options.protocol in ("point", "box"),
         "--squash would distort what is given: add --no-squash"),
        (options.limit is not None and options.limit < 1, "--limit must be at least 1"),
        (options.resume and not options.csv, "--resume needs the --csv FILE to go on with"),
        (options.csv and options.csv.exists() and not options.resume,
         f"{options.csv}: exists; add --resume to go on with it, or name another file"),
        (options.sheet and options.sheet.suffix.lower() != ".png",
         f"{options.sheet}: the sheet's name must end in .png"),
    ]:  # fmt: skip
        if wrong:
            raise ValueError(message)
    outputs = [path.resolve() for path in (options.csv, options.json, options.sheet) if path]
    inputs = [options.images, options.masks, *dict(options.predictions).values()]
    for path in outputs:
        if not os.access(path.parent, os.W_OK):
            raise ValueError(f"{path}: there is no such folder, or no permission to write there")
        if path.is_dir() or outputs.count(path) > 1:
            raise ValueError(f"{path}: is a folder, or named for two outputs; name another file")
        if {Path(folder).resolve() for folder in inputs} & {*path.parents}:
            raise ValueError(f"{path}: lies among the images or masks, which are left alone; name another file")
    pixels(options.tolerance, 1)


def settings_of(run):
    """The flags that the scores depend on, for the fingerprints and the JSON file."""
    options = run.options
    settings = {name: getattr(options, name) for name in ("protocol", "squash", "jitter", "loosen", "plant", "tolerance")}
    weights = options.weights and str(options.weights.resolve())
    backbone = {"name": run.backbone.name, "branch": options.branch, "weights": weights}
    if run.backbone.name.endswith(".py"):
        backbone["file"] = hashlib.sha256(Path(run.backbone.name).read_bytes()).hexdigest()
    return settings | {"backbone": backbone, "config": dataclasses.asdict(run.config)}


def score_all(pairs, rows, run):
    """{(stem, row): scores} of every image and row, written to the CSV file as they come; ranks share the images."""
    options, (rank, world), fingerprints = run.options, u.rank_and_world(), {}
    for row in rows:  # a digest of all that its scores depend on
        folders = (options.images, options.masks, dict(options.predictions).get(row, ""))
        facts = [settings_of(run), [str(Path(folder).resolve()) for folder in folders]]
        if row == "unsegmedgatc":  # which learns from all the images
            facts.append(sorted(pairs))
        else:
            facts[0]["config"]["collective"] = 0
        fingerprints[row] = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    # The first rank reads for all, so that none writes before.
    scores = u.gather(begin_csv(options.csv, fingerprints) if options.csv and rank == 0 else {})[0]
    todo = {stem: missing for stem in pairs if (missing := [row for row in rows if (stem, row) not in scores])}
    drawn = [rows[0]] if options.sheet else []
    if any("unsegmedgatc" in missing for missing in [drawn, *todo.values()]):
        scenes = []  # of all the images and from the start, so that --resume changes nothing
        for stem, paths in pairs.items():
            with contextlib.suppress(Exception):  # of which the image's own turn will tell
                scenes.append([x.cpu() for x in Scene(stem, paths, run).nodes()[1:]])
        shared = u.fit_collective(scenes, run.config, run.device, options.quiet or rank > 0)
        run.methods["unsegmedgatc"] = functools.partial(unsegmedgat, shared=shared)
    share, ours = list(todo)[rank::world], {}
    bar = torch.hub.tqdm(total=len(share), desc=options.protocol, disable=options.quiet or rank > 0)
    with bar, open(options.csv or os.devnull, "a", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        for stem in share:
            for row, score in evaluate(stem, pairs[stem], todo[stem], run).items():
                ours[stem, row] = score
                writer.writerow({"settings": fingerprints[row], "image": stem, "method": row} | score)
            file.flush()  # an image's lines in one piece, so that those of several ranks do not mix
            bar.update(1)
    for part in u.gather(ours):
        scores |= part
    return scores


def report(run, summary, count, groups):
    """Print what was asked and the table. count: of the images; groups: how many there are, 0 for none."""
    options, config = run.options, run.config
    what = PROTOCOLS[options.protocol]
    if options.plant is not None:
        what = what.removesuffix("; no ground truth reaches a method")
        what += "; USES GROUND TRUTH: the features are made from it"
    print(f"**{options.protocol}** protocol: {what}. n = {count} images" + (f" in {groups} groups." if groups else "."))
    changed = {name: value for name, value in vars(config).items() if value != getattr(u.Config(), name)}
    extra = {"squash": False, "jitter": 0, "loosen": 1.0}
    changed |= {name: getattr(options, name) for name, usual in extra.items() if getattr(options, name) != usual}
    texts = [f"{name} {f'{value:.4g}' if isinstance(value, float) else value}" for name, value in changed.items()]
    print(f"Backbone: {run.backbone.name}. Seed {config.seed}. "
          f"Settings: {', '.join([options.preset or 'default', *texts])}.\n")  # fmt: skip
    print(markdown(summary, options.reference))
    print(f"\nIn %; HD95 in % of the diagonal; NSD at a tolerance of {options.tolerance}"
          f"{' of the diagonal' if options.tolerance.endswith('%') else ''}; 95 % bootstrap intervals in brackets. "
          "A failed image counts as 0 (HD95: 100).")  # fmt: skip
    if options.reference:
        print("Published: Table I of the paper, DINO features and the official protocol on the whole data set.")


def labels_of(stems, pattern):
    """The group of each image. Raises ValueError for a pattern without a group, or an image that it does not fit."""
    labels = []
    for stem in stems:
        label = None
        with contextlib.suppress(re.error, TypeError, IndexError):  # no pattern, no match, no group
            label = re.search(pattern, stem)[1]
        if label is None:
            raise ValueError(f"--group-by {pattern}: no regular expression with a group ( ) that fits {stem}")
        labels.append(label)
    return labels


def run_evaluation(options):
    """Score what the options ask for and print the table; returns the exit code. Raises errors for wrong use."""
    check(options)
    config, device = u.config_from(options), u.pick_device(options.device)
    if "unsegmedgatc" in options.methods and not config.collective:
        config = dataclasses.replace(config, collective=min(5, config.epochs - 1))  # the paper's T0 for ISIC
    u.gather(None)  # no rank writes before every rank has looked what exists
    pairs, alone = pair_files(options.images, options.masks)
    for path in alone:
        log.warning("%s: has no partner and is left out", path)
    predictions = {name: by_stem(files_below(Path(folder)), pairs) for name, folder in options.predictions}
    if options.limit:
        stems = list(pairs)
        spread = np.linspace(0, len(stems) - 1, min(options.limit, len(stems))).round().astype(int)
        pairs = {stems[i]: pairs[stems[i]] for i in spread}
    labels = labels_of(pairs, options.group_by) if options.group_by else None
    if options.plant is None:
        backbone = u.backbone_from(options, device)
    else:  # of each image its own: see Scene
        backbone = u.Backbone(f"planted from the GROUND TRUTH, noise {options.plant:g}", None)
    if backbone.name != "dino":
        log.warning("the backbone is %s, not DINO: these numbers are not comparable with the paper's", backbone.name)
    run = Run(options, config, backbone, device, {name: METHODS[name] for name in options.methods}, predictions)
    rows = [*run.methods, *predictions, LOCATED, *free_rows(options.protocol, (1, 1), (0, 0, 1, 1))]
    scores = score_all(pairs, rows, run)
    if u.rank_and_world()[0] > 0:  # the first rank tells: torchrun ends them all as soon as one has failed
        return 0

    summary = summarise(scores, list(pairs), rows, labels, config.seed)
    report(run, summary, len(pairs), len(set(labels or ())))
    if options.json:
        packages = ("torch", "torchvision", "numpy", "scipy", "pillow")
        versions = {"python": platform.python_version()} | {name: version(name) for name in packages}
        facts = {"images": len(pairs), "preset": options.preset, "limit": options.limit, "settings": settings_of(run)}
        with u.whole(options.json) as part:
            part.write_text(json.dumps(facts | {"versions": versions, "rows": summary}, indent=1) + "\n")
    if options.sheet and len(summary[rows[0]]["failed"]) < len(pairs):
        with u.whole(options.sheet) as part:
            contact_sheet(pairs, scores, rows[0], run).save(part, format="PNG")
    return 1 if any(entry["failed"] for entry in summary.values()) else 0


# Benchmark -----------------------------------------------------------------------------------------------------

SIZES = {784: (224, 8), 3025: (224, 4)}  # N: (size, stride)
MEGAPIXELS = (1, 3, 12)


def photograph(height, width):
    """Something like a lesion on skin, with uneven light and noise: (H,W,3) uint8."""
    lesion = ellipse((height, width), (0.3 * width, 0.3 * height, 0.7 * width, 0.7 * height))
    light = np.linspace(1, 0.9, width)[:, None]
    rgb = np.where(lesion[..., None], (130, 75, 55), (225, 180, 160)) * light
    return (rgb + np.random.default_rng(0).normal(0, 4, rgb.shape)).clip(0, 255).astype(np.uint8)


def seconds(function, repeats=3):
    """The least wall-clock time of some calls after a first one: what the machine can do, less what disturbs it."""
    available = torch.cuda.is_available(), torch.backends.mps.is_available(), True
    sync = (torch.cuda.synchronize, torch.mps.synchronize, lambda: None)[available.index(True)]
    return min(timeit.repeat(lambda: (function(), sync()), number=1, repeat=repeats + 1)[1:])


def peak_memory():
    """GiB at most so far: of the GPU, if it was used, or of this whole process."""
    import resource  # which Windows lacks

    if torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on a Mac, else in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def bench_graph(n, device):
    """One column of the stages' table: a dictionary."""
    device, (size, stride) = u.pick_device(device), SIZES[n]
    config, backbone, rgb = u.Config(size=size, stride=stride), u.load_backbone("builtin"), photograph(size, size)
    view, features, weights = u.extract_nodes(rgb, config, backbone, device)
    adjacency = u.build_graph(features, config.tau, weights)
    x = u.standardise(features, adjacency)
    network, optimizer = u.new_network(x.shape[1], config, device)

    epoch = functools.partial(u.step, network, optimizer, x, adjacency, config)
    epoch()
    name, ours = f"epoch, {config.heads} heads", seconds(u.replayed(epoch, device))  # as in `fit`
    start = time.perf_counter()
    assignment, losses, _ = u.fit(features, adjacency, config)
    settled = time.perf_counter() - start
    column = {
        "N": n,
        "features and place, ms": 1e3 * seconds(lambda: u.extract_nodes(rgb, config, backbone, device)),
        "graph, ms": 1e3 * seconds(lambda: u.build_graph(features, config.tau, weights)),
        "edges, of N x N": float((adjacency > 0).float().mean()),
        f"{name}, ms": 1e3 * ours,
        "epochs until settled": len(losses),
        "fit, s": settled,
        "refinement, ms": 1e3 * seconds(lambda: u.finish(view, assignment, adjacency, config, rgb.shape[:2])),
        "peak memory, GiB": peak_memory(),
    }
    blockwise, u.BlockwiseAttention.apply = u.BlockwiseAttention.apply, u.attention
    epoch()
    column[f"{name}: plain autograd, x ours"] = seconds(u.replayed(epoch, device), 1) / ours
    u.BlockwiseAttention.apply = blockwise
    with contextlib.suppress(ImportError):  # a column without it, where it is not installed
        if n <= 784:  # for the memory
            use_geometric(network, adjacency)
            optimizer = torch.optim.AdamW(network.parameters(), lr=config.lr)
            epoch = functools.partial(u.step, network, optimizer, x, adjacency, config)
            # not recorded, as GATConv waits for results
            column[f"{name}: torch_geometric, x ours"] = seconds(epoch, 1) / ours
    return column


def use_geometric(network, adjacency):
    """Put torch_geometric's GATConv in the place of every attention layer; it gets a list of edges, not a matrix."""
    from torch_geometric.nn import GATConv

    edges = adjacency.nonzero().T.contiguous()  # (2,E)
    for layers in network.series:
        for number, ours in enumerate(layers):
            width = ours.W.out_features // ours.heads
            theirs = GATConv(ours.W.in_features, width, ours.heads, add_self_loops=False, bias=False)
            theirs.register_forward_pre_hook(lambda _, inputs: (inputs[0], edges))
            layers[number] = theirs.to(adjacency.device)


def bench_solver(megapixels, device):
    """One column of the table of bilateral.py alone, on whole photographs: a dictionary. It runs on the CPU."""
    height = round(math.sqrt(megapixels * 1e6 * 3 / 4))
    guide = photograph(height, height * 4 // 3)
    target = (guide[..., 1] < 130).astype(float)
    return {
        "megapixels": megapixels,
        "grid, s": seconds(lambda: bilateral.BilateralGrid(guide), 1),
        "solve, s": seconds(lambda: bilateral.solve(target, guide), 1),
        "peak memory, GiB": peak_memory(),
    }


def bench(argv):
    """`python eval.py bench`: print what each stage costs on this machine. Returns the exit code."""
    parser = argparse.ArgumentParser("eval.py bench", description="Time the stages on a drawn image, no files needed.")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    options = parser.parse_args(argv)
    device = u.pick_device(options.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    spawn = multiprocessing.get_context("spawn")
    print(f"{name}, {torch.get_num_threads()} threads; Python {platform.python_version()}, torch {torch.__version__}, "
          f"NumPy {np.__version__}")  # fmt: skip
    for function, sizes in [(bench_graph, SIZES), (bench_solver, MEGAPIXELS)]:
        columns = []
        for size in sizes:
            with ProcessPoolExecutor(1, spawn) as pool:  # whose peak memory is this column's
                columns.append(pool.submit(function, size, str(device)).result())
        cells = {name: [f"{column[name]:.4g}" if name in column else "" for column in columns] for name in columns[0]}
        print("\n" + as_table([[name, *numbers] for name, numbers in cells.items()]))
    return 0


def main(argv=None):
    """The command line; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv

    def program():
        if argv[:1] == ["bench"]:
            return bench(argv[1:])
        options = u.parse_options(build_parser(), argv, u.PRESETS | {"official": OFFICIAL})
        return run_evaluation(options)

    return u.exit_code(program, "with --csv, --resume goes on from here")


if __name__ == "__main__":
    sys.exit(main())
