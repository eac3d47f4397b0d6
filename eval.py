"""Evaluate UnSegMedGAT on your images and masks, beside the methods of the paper's Table I and trivial baselines.

    python eval.py images/ masks/                               # blind: no ground truth reaches a method
    python eval.py images/ masks/ --protocol point              # a point in the object is given; or box
    python eval.py images/ masks/ --oracle-features 1           # with features made from the ground truth
    python eval.py images/ masks/ --protocol official --preset official --reference isic2018      # as Table I was made
    python eval.py images/ masks/ --csv scores.csv --resume     # continue an interrupted run
    torchrun --nproc-per-node=8 eval.py images/ masks/          # on several cores, GPUs or machines
    python eval.py bench                                        # time every stage; needs no images

All clusterings get the same features and the same graph, and the same steps make masks of their clusters, so the rows
of a table differ in the clustering alone. The row unsegmedgat is what the program makes.
Ground truth is used in this file only.

Shapes: B images, N = h * w patches, C features, K clusters; masks are (height,width) bool; boxes are (x0, y0, x1, y1)
px, ends excluded.
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
from pathlib import Path

import numpy as np
import PIL
import scipy.cluster.vq
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps
from scipy import ndimage
from scipy.spatial import KDTree
from torch import nn

import bilateral
import unsegmedgat as u

log = logging.getLogger("eval")


# Methods: (features X (N,C), adjacency A (N,N), config) -> assignment (N,K), rows summing to 1 -----------------


def unsegmedgat(features, adjacency, config, shared=None):
    """The paper's method; with a `shared` state_dict from `fit_collective` it is UnSegMedGATc."""
    return u.fit(features, adjacency, config, shared).assignment


def kmeans(features, adjacency, config):
    """k-means on the features, the best of ten runs from k-means++ seeds (Arthur and Vassilvitskii 2007).

    The graph is not used. SciPy's default is 10 iterations; 30 are past convergence here.
    """
    x, seeds = features.cpu().numpy().astype(np.float64), [(config.seed + n) % 2**32 for n in range(10)]
    runs = [scipy.cluster.vq.kmeans2(x, config.clusters, iter=30, minit="++", seed=seed) for seed in seeds]
    _, labels = min(runs, key=lambda run: np.square(x - run[0][run[1]]).sum())
    return one_hot(labels, features, config)


def one_hot(labels, features, config):
    """Labels (N,) as an assignment (N,K) with the dtype and device of the features."""
    return F.one_hot(torch.as_tensor(labels).long(), config.clusters).to(features)


def normalise(adjacency):
    """D^-1/2 A D^-1/2 (N,N), where D are the degrees (Kipf and Welling 2017); a row of zeros for a node without edges.

    Their A + I is A here, as eq. (1) has self-loops.
    """
    scale = adjacency.sum(1).clamp(min=1e-12).rsqrt()
    return scale[:, None] * adjacency * scale


def dsm(features, adjacency, config):
    """Deep spectral methods (Melas-Kyriazi et al. 2022): the sign of the normalised Laplacian's Fiedler vector.

    For K > 2 it is k-means on the first K eigenvectors. The Laplacian is I - D^-1/2 A D^-1/2, so its lowest
    eigenvectors are the top ones of `normalise(A)`.
    """
    # All eigenvectors: where a graph has many components its largest eigenvalue is multiple, and solvers for a few fail
    _, vectors = torch.linalg.eigh(normalise(adjacency.cpu().double()))  # ascending; some devices have no float64
    vectors = vectors[:, -config.clusters :].to(features)  # (N,K)
    return one_hot(vectors[:, 0] > 0, features, config) if config.clusters == 2 else kmeans(vectors, adjacency, config)


class GCNLayer(nn.Module):
    """A X W (Kipf and Welling 2017); with `skip`, A X W + X V (Bianchi et al. 2020, section 4.1)."""

    def __init__(self, in_features, out_features, activation, skip=False):
        super().__init__()
        self.W = nn.Linear(in_features, out_features)
        self.V = nn.Linear(in_features, out_features, bias=False) if skip else None
        self.activation = activation

    def forward(self, x, propagation):  # (N,in), (N,N) -> (N,out)
        message = propagation @ self.W(x)
        return self.activation(message if self.V is None else message + self.V(x))


class ARMALayer(nn.Module):
    """ARMA graph convolution (Bianchi et al. 2021, eqs. (6) and (7)): the mean of parallel stacks of recursive filters.

    Each stack iterates X' = sigma(A X W + X0 V) twice, with A normalised.
    """

    def __init__(self, in_features, out_features, activation, stacks=2):
        super().__init__()
        self.first = nn.Parameter(torch.empty(stacks, in_features, out_features))
        self.W = nn.Parameter(torch.empty(stacks, out_features, out_features))
        self.V = nn.Parameter(torch.empty(stacks, in_features, out_features))
        for parameter in self.parameters():
            for stack in parameter:
                nn.init.xavier_uniform_(stack)
        self.activation = activation

    def forward(self, x, propagation):  # (N,in), (N,N) -> (N,out)
        skip = x @ self.V  # (stacks,N,out)
        state = self.activation(propagation @ (x @ self.first) + skip)
        return self.activation(propagation @ (state @ self.W) + skip).mean(0)


def optimise(features, adjacency, config, layer_class, loss):
    """The assignment (N,K) of one graph convolution and a perceptron that minimise a loss, over all epochs.

    layer_class: called with the input and output widths and the activation. loss: a function of the assignment, A
    (N,N), the normalised A, and config. The width, the perceptron's single hidden layer and five times the learning
    rate are ours (at the rate itself unseggnet loses 7 points of mIoU on ISIC).
    """
    width, activation = config.fc_dim, u.ACTIVATIONS[config.activation]()

    def build():
        perceptron = nn.Sequential(nn.Linear(width, width), activation, nn.Linear(width, config.clusters))
        return nn.ModuleList([layer_class(features.shape[1], width, activation), perceptron])

    (layer, perceptron), optimizer = u.seeded_model(build, config, features.device, 5 * config.lr)
    propagation = normalise(adjacency)
    x = u.centre_and_scale(features, adjacency)

    def assign():
        return perceptron(layer(x, propagation)).softmax(1)

    for _ in range(config.epochs):
        u.train_step(optimizer, lambda: loss(assign(), adjacency, propagation, config))
    with torch.no_grad():
        return assign()


def mincut_loss(assignment, _, propagation, config):
    """Cut and orthogonality loss, eq. (9) of Bianchi et al. 2020, a scalar. S (N,K), normalised A (N,N)."""
    within = (assignment * (propagation @ assignment)).sum()  # Tr(S^T A S)
    volume = (propagation.sum(1) @ assignment.square()).sum()  # Tr(S^T D S)
    overlap, k = assignment.T @ assignment, config.clusters  # (K,K)
    balance = (overlap / overlap.norm() - torch.eye(k).to(overlap) / math.sqrt(k)).norm()
    return -within / volume.clamp(min=1e-12) + balance


def modularity_loss(assignment, adjacency, _, config):
    """The paper's eq. (8)."""
    return u.modularity_loss(assignment, adjacency, config.resolution, config.collapse_weight)


METHODS = {
    "unsegmedgat": unsegmedgat,
    "unsegmedgatc": unsegmedgat,  # `score_all` passes the shared parameters
    "vit-kmeans": kmeans,
    "dsm": dsm,
    "mincutpool": functools.partial(optimise, layer_class=functools.partial(GCNLayer, skip=True), loss=mincut_loss),
    "unseggnet": functools.partial(optimise, layer_class=GCNLayer, loss=modularity_loss),  # Reddy et al. 2024
    "unsegarmanet": functools.partial(optimise, layer_class=ARMALayer, loss=modularity_loss),  # Reddy et al. 2024
}


# Rows beside the methods ---------------------------------------------------------------------------------------

LOCATED = "located ellipse"  # the ellipse itself in place of a clustering, with the same steps after it


def ellipse(shape, box):
    """The ellipse inscribed in a box: (height,width) bool, True for the pixels whose centre lies inside."""
    x0, y0, x1, y1 = box
    y, x = np.ogrid[: shape[0], : shape[1]]
    return ((2 * x + 1 - x0 - x1) / (x1 - x0)) ** 2 + ((2 * y + 1 - y0 - y1) / (y1 - y0)) ** 2 <= 1


def trivial_baselines(protocol, shape, prompt):
    """{row: mask (height,width)} of guesses that look at no pixel.

    prompt: the point or box in pixels of `shape`, or None. The sizes are fractions of the image, the same for all data.
    """
    (h, w), everything = shape, np.ones(shape, bool)
    name, box = "inscribed ellipse", prompt
    if protocol == "blind":
        name, box = "centred ellipse", (0.25 * w, 0.25 * h, 0.75 * w, 0.75 * h)
    elif protocol == "point":
        x, y, r = prompt[0] + 0.5, prompt[1] + 0.5, 0.15 * min(shape)
        name, box = "disc at the point", (x - r, y - r, x + r, y + r)
    elif protocol == "box":  # whoever is given a box marks nothing outside it
        y, x = np.ogrid[:h, :w]
        everything = (y >= box[1]) & (y < box[3]) & (x >= box[0]) & (x < box[2])
    return {"everything foreground": everything, name: ellipse(shape, box)}


def oracle_backbone(truth, noise, seed):
    """A Backbone whose features are made from the truth (height,width) bool: an ideal backbone, with noise.

    It separates the quality of the program from that of a backbone. For a patch of which the object covers the fraction
    c, in region l of a k-means clustering of colours and positions,
        f = c o + (1 - c) (0.75 e0 + 0.66 r_l) + noise g / sqrt(384),    o = 0.35 e0 + 0.94 e1,
    where e0, e1 and r_1..r_4 are random unit vectors of 384 dimensions, the same for all images, and g is standard
    normal. seed: a list of integers, the seed of g.
    """
    directions = np.random.default_rng(0).standard_normal((6, 384))
    e0, e1, *regions = torch.from_numpy(directions / np.linalg.norm(directions, axis=1, keepdims=True)).float()

    def extract(view):
        y0, x0, y1, x1 = view.crop
        covered = torch.from_numpy(truth[y0:y1, x0:x1]).float()[None, None]
        covered = F.interpolate(covered, size=view.image.shape[1:], mode="bilinear", antialias=True)
        c = F.avg_pool2d(covered, u.PATCH, view.stride)[0, 0]  # (h,w)
        lab = F.avg_pool2d(u.rgb_to_lab(view.image), u.PATCH, view.stride)
        row, column = torch.meshgrid(*(torch.linspace(0, 20, side) for side in c.shape), indexing="ij")
        appearance = torch.cat([lab, row[None], column[None]]).flatten(1).T.double().numpy()  # (N,5)
        _, label = scipy.cluster.vq.kmeans2(appearance, len(regions), iter=20, minit="++", seed=0)
        background = 0.75 * e0 + 0.66 * torch.stack(regions)[label]  # (N,384)
        g = torch.from_numpy(np.random.default_rng([*seed, *view.crop]).standard_normal(background.shape)).float()
        c = c.reshape(-1, 1)
        return c * (0.35 * e0 + 0.94 * e1) + (1 - c) * background + noise / math.sqrt(384) * g

    return u.Backbone(f"oracle features, noise {noise:g}", extract)


# Metrics -------------------------------------------------------------------------------------------------------

METRICS = ("iou", "dice", "precision", "recall", "hd95", "nsd")
FAILED_SCORES = dict.fromkeys(METRICS, 0.0) | {"hd95": 100.0}  # also where exactly one of the masks is empty


def metrics(mask, truth, tolerance="2%"):
    """The scores of a mask against the truth, (height,width) bool each: a dictionary of floats.

    iou, dice, precision, recall: of the foreground, in [0,1]. The mean of iou over images is the paper's mIoU; the
        background's IoU is not averaged in, and pixels are not pooled over images.
    hd95: 95th percentile of the distances from the border pixels of either mask to the border of the other, in % of the
        image's diagonal. A border pixel has a 4-neighbour outside the mask or the image.
    nsd: normalised surface Dice (Nikolov et al. 2021), the share of all border pixels that are within the tolerance of
        the other border, in [0,1]. tolerance: "2%" of the diagonal, or "5px".
    Where one of the masks is empty the scores are 0, and 100 for hd95; where both are, they are perfect.
    """
    true_positive = int((mask & truth).sum())
    if not (mask.any() and truth.any()):
        return dict(FAILED_SCORES) if mask.any() or truth.any() else dict.fromkeys(METRICS, 1.0) | {"hd95": 0.0}
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
    """A tolerance, "2%" of the diagonal or "5px", in px. Raises ValueError for other texts."""
    match = re.fullmatch(r"(\d+\.?\d*)(%|px)", tolerance)
    if not match:
        raise ValueError(f"the tolerance must look like 2% (of the image's diagonal) or 5px, got {tolerance!r}")
    return float(match[1]) * (diagonal / 100 if match[2] == "%" else 1)


def bootstrap_interval(values, groups=None, seed=0, resamples=2000):
    """The 95 % bootstrap interval of the mean of values (n,): (low, high) by the percentile method.

    groups: (n,) labels, optional; whole groups are then resampled, as the frames of one sequence are not independent.
    None for a single value or group.
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

MASK_SUFFIX = re.compile(r"_(segmentation|lesion|mask(_\d+)?)$", re.IGNORECASE)


def files_below(folder):
    """The image files in a folder and its subfolders, sorted. Raises ValueError where there is none."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder")
    hidden = re.compile(r"(^|[/\\])\.")  # .ipynb_checkpoints and the like
    found = [p for p in sorted(folder.rglob("*")) if u.is_image(p) and not hidden.search(str(p.relative_to(folder)))]
    if not found:
        raise ValueError(f"{folder}: there is no image in this folder")
    return found


def by_stem(paths, stems=None):
    """{stem: path}. With the `stems` of images, a mask's stem that is not among them is cut by MASK_SUFFIX.

    Raises ValueError for two files of one stem.
    """
    table = {}
    for path in paths:
        stem = path.stem if stems is None or path.stem in stems else MASK_SUFFIX.sub("", path.stem)
        if stem in table:
            raise ValueError(f"{path}: files are paired by name, and {table[stem]} has the same name: unite masks of "
                             "several objects in one file, or move one away")  # fmt: skip
        table[stem] = path
    return table


def pair_files(images, masks):
    """Pair the images and masks of two folders by stem: ({stem: (image, mask)}, [file without a partner]).

    Subfolders are searched too, extensions may differ, and a mask's stem may end in _segmentation, _lesion or _mask.
    The folders may be the same. Raises ValueError for two files of one name, or if there is no pair.
    """
    image_paths, mask_paths = files_below(images), files_below(masks)
    both = {*image_paths} & {*mask_paths}
    marked = {path for path in both if MASK_SUFFIX.search(path.stem)}
    image_of = by_stem([path for path in image_paths if path not in marked])
    mask_of = by_stem([path for path in mask_paths if path not in both - marked], image_of)
    pairs = {stem: (path, mask_of[stem]) for stem, path in image_of.items() if stem in mask_of}
    if not pairs:
        raise ValueError(f"{images}, {masks}: no image and mask have the same name, as a.jpg and a_mask.png have")
    return pairs, [path for table in (image_of, mask_of) for stem, path in table.items() if stem not in pairs]


def is_turned(path):
    """Whether a file's EXIF orientation turns or mirrors the stored pixels; False for one that cannot be read."""
    with contextlib.suppress(Exception), Image.open(path) as image:
        return image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
    return False


FEW = 16  # values that a mask of several classes may have; a soft rim has more


def load_mask(path, shape):
    """Read a mask of two values: (height,width) bool, True for the brighter one.

    The values may be 0/1, 0/255, 16 bit, colours or a palette; transparency counts as black; EXIF turns the mask like
    the image. A JPEG or WebP file is thresholded at half of its own maximum. More than 16 values, as of a soft rim, are
    thresholded half-way between the two ends, if nine tenths of the pixels lie within a tenth of either end.
    Raises unsegmedgat.ImageError if it cannot be read, has other values, or differs in size from `shape`.
    """
    try:
        with Image.open(path) as image:
            if getattr(image, "is_animated", False) and image.format != "MPO":
                raise ValueError(f"it holds {image.n_frames} frames")
            lossy = image.format in ("JPEG", "MPO", "WEBP")
            u.turn_upright(image)
            if image.has_transparency_data:
                image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image.convert("RGBA"))
            if image.mode in ("1", "P", "RGB", "RGBA", "CMYK", "YCbCr"):
                image = image.convert("RGB").convert("L")
            values = np.asarray(image, float)
    except Exception as error:  # Pillow's decoders raise many kinds on a damaged file
        raise u.ImageError(f"{path}: the mask cannot be read: {u.why_unreadable(error)}") from None
    if values.shape != tuple(shape):
        hint = ": was only one of them rotated?" if values.shape == tuple(shape)[::-1] else ""
        (h, w), (height, width) = values.shape[:2], shape
        raise u.ImageError(f"{path}: the mask is {w} x {h}, the image {width} x {height} pixels{hint}")
    if not np.isfinite(values).all():
        raise u.ImageError(f"{path}: the mask has values that are not finite numbers: make it binary, 0 and 255")
    levels = np.unique(values)
    low, high = (0 if lossy else levels[0]), levels[-1]
    share = (values - low) / max(high - low, 1e-12)  # 0 at the darker end, 1 at the brighter one
    few = len(levels) <= FEW
    if (few and len(levels) > 2 and not lossy) or (not few and (np.abs(share - 0.5) < 0.4).mean() > 0.1):
        names = ", ".join(f"{level:g}" for level in levels[:5]) + (", ..." if len(levels) > 5 else "")
        raise u.ImageError(f"{path}: the mask has {len(levels)} values ({names}), not two: make it binary, the object "
                           "255 and all else 0")  # fmt: skip
    return share > 0.5 if low < high else np.full(values.shape, bool(high > 0))


def inner_point(mask):
    """The pixel (x, y) of a mask that is nearest to its centroid. The mask is not empty."""
    inside = np.argwhere(mask)
    y, x = inside[np.square(inside - inside.mean(0)).sum(1).argmin()]
    return int(x), int(y)


def inexact(prompt, loosen, jitter, shape, seed):
    """A point or box as a user may give it: the box scaled about its centre, each number moved by up to `jitter` px.

    It is rounded to px and kept inside the image, a box not empty.
    """
    corners = np.array(prompt, float).reshape(-1, 2)  # two of a box, or the point
    corners = np.rint(corners.mean(0) + loosen * (corners - corners.mean(0))).astype(int)
    corners += np.random.default_rng(seed).integers(-jitter, jitter + 1, size=corners.shape)
    corners[0] = corners[0].clip(0, [shape[1] - 1, shape[0] - 1])
    corners[1:] = corners[1:].clip(corners[0] + 1, shape[::-1])
    return tuple(corners.flatten().tolist())


# Prediction under a protocol -----------------------------------------------------------------------------------

PROTOCOLS = {
    "blind": "the whole image; no ground truth reaches a method",
    "point": "USES GROUND TRUTH: its pixel nearest to its centroid is given, as a user would click",
    "box": "USES GROUND TRUTH: its bounding box is given, as a user would draw it",
    "official": f"USES GROUND TRUTH: cropped to its bounding box + {u.BOX_MARGIN} px, "
    "and the better of mask and inverse is kept",
}


@dataclasses.dataclass(frozen=True)
class EvalRun:
    """What all images of an evaluation have in common."""

    args: argparse.Namespace  # the command line
    config: u.Config
    backbone: u.Backbone
    device: torch.device
    methods: dict  # {row: function}
    predictions: dict  # {row: {stem: mask file}}, made by other programs


class EvalImage:
    """One image under the protocol of an EvalRun: the part that is scored, the prompt, and the masks of the rows.

    Raises an exception if the image, or what the protocol needs of its ground truth, cannot be read.
    """

    def __init__(self, stem, paths, run):
        self.stem, self.paths, self.run = stem, paths, run
        self.photo, self.scored, self.prompt, self.backbone = u.load_image(paths[0]), np.s_[:, :], None, run.backbone
        protocol, noise = run.args.protocol, run.args.oracle_features
        seed = [run.config.seed, zlib.crc32(os.fsencode(stem))]
        # Here a protocol passes part of the ground truth to a method, and the table's heading says so. In the official
        # protocol the ground truth also chooses between a mask and its inverse.
        if protocol != "blind":
            if not self.truth.any():
                raise u.ImageError("the ground truth is empty, so no prompt can be taken from it: "
                                   "use --protocol blind, or leave the image out")  # fmt: skip
            box = x0, y0, x1, y1 = Image.fromarray(self.truth).getbbox()
            if protocol == "official":
                top, left = max(0, y0 - u.BOX_MARGIN), max(0, x0 - u.BOX_MARGIN)
                self.scored = np.s_[top : y1 + u.BOX_MARGIN, left : x1 + u.BOX_MARGIN]
                self.prompt = x0 - left, y0 - top, x1 - left, y1 - top
            else:
                prompt = box if protocol == "box" else inner_point(self.truth)
                self.prompt = inexact(prompt, run.args.loosen, run.args.jitter, self.truth.shape, seed)
        if noise is not None:
            self.backbone = oracle_backbone(self.squash(self.truth[self.scored], Image.NEAREST), noise, seed)
        self.crop = self.photo[self.scored]
        self.trivial = trivial_baselines(protocol, self.crop.shape[:2], self.prompt)

    @functools.cached_property
    def truth(self):
        """(height,width) bool. It is read on first use: in the blind protocol after the masks have been made."""
        if is_turned(self.paths[0]) and not is_turned(self.paths[1]):
            log.warning("%s: EXIF turns the image and not the mask, which must be drawn on the turned image", self.paths[1])
        return load_mask(self.paths[1], self.photo.shape[:2])

    def squash(self, array, method):
        """An image or mask resized to a square if the run asks for it, as in the authors' code."""
        size = (self.run.config.size,) * 2
        return np.array(Image.fromarray(array).resize(size, method)) if self.run.args.squash else array

    def nodes(self):
        """What `extract_nodes` returns for the part that is scored."""
        prompts = {name: self.prompt for name in ("point", "box") if name == self.run.args.protocol}
        photo = self.squash(self.crop, Image.BILINEAR)
        return u.extract_nodes(photo, self.run.config, self.backbone, self.run.device, **prompts)

    @functools.cached_property
    def graph(self):
        """The View, features, node weights and adjacency, the same for all rows."""
        view, features, node_weights = self.nodes()
        return view, features, node_weights, u.build_graph(features, self.run.config.tau, node_weights)

    def masks(self, row):
        """What a row predicts for the part that is scored: [mask]; in the official protocol [mask, inverse]."""
        config, predictions = self.run.config, self.run.predictions.get(row, {})
        if row in self.trivial:
            return [self.trivial[row]]
        if row in self.run.predictions:
            if self.stem not in predictions:
                raise u.ImageError(f"there is no prediction named {self.stem}")
            mask = load_mask(predictions[self.stem], self.photo.shape[:2])[self.scored]
        else:
            view, features, node_weights, adjacency = self.graph
            if row == LOCATED:
                assignment = one_hot(view.inside_ellipse().flatten(), features, config)
            else:
                assignment = self.run.methods[row](features, adjacency, config)
            maps = u.make_mask(view, assignment, adjacency, node_weights, config)
            mask = np.asarray(Image.fromarray(maps["mask"]).resize(self.crop.shape[1::-1], Image.NEAREST))
        return [mask, ~mask] if self.run.args.protocol == "official" else [mask]


def evaluate(stem, paths, rows, run):
    """Score rows on one image: {row: {metric: float, "seconds": float, "error": a text, empty for success}}."""
    predicted, scores = {}, {}
    try:
        image = EvalImage(stem, paths, run)
        for row in rows:
            try:
                if row in run.methods:
                    image.graph  # made before the clock starts, as all rows share it
                start = time.perf_counter()
                predicted[row] = image.masks(row), time.perf_counter() - start
            except Exception as error:
                log.error("%s: %s: %s", paths[0], row, u.one_line(error))
                scores[row] = FAILED_SCORES | {"seconds": 0.0, "error": u.one_line(error)}
        truth = image.truth[image.scored]
        if not truth.any():
            log.warning("%s: the ground truth is empty: an empty mask scores 1, any other 0", paths[1])
    except Exception as error:
        log.error("%s: %s", paths[0], u.one_line(error))
        return dict.fromkeys(rows, FAILED_SCORES | {"seconds": 0.0, "error": u.one_line(error)})
    for row, (masks, seconds) in predicted.items():
        best = max((metrics(mask, truth, run.args.tolerance) for mask in masks), key=lambda s: s["iou"])
        scores[row] = best | {"seconds": seconds, "error": ""}
    return scores


# Scores on disk, tables and contact sheets ---------------------------------------------------------------------

COLUMNS = ("settings", "image", "method", *METRICS, "seconds", "error")


def begin_csv(path, fingerprints):
    """The scores that a CSV file holds, {(stem, row): scores}; incomplete lines and failures are removed from the file.

    fingerprints: {row: digest of the settings}. Raises ValueError for another program's file, and for a row that was
    made with other settings.
    """
    header = ",".join(COLUMNS) + "\n"
    text = path.read_text(encoding="utf-8", errors="surrogateescape") if path.exists() else ""
    if text[: len(header)] != header[: len(text)]:
        raise ValueError(f"{path}: its columns are not those of this program; write to another file")
    text = text[: text.rfind("\n") + 1]  # a killed run may have left half a line
    lines = [line for line in csv.DictReader(io.StringIO(text)) if line["error"] == ""]
    for row, settings in {(line["method"], line["settings"]) for line in lines}:
        if settings != fingerprints.get(row, settings):
            raise ValueError(f"{path}: holds {row} of other settings, folders or (unsegmedgatc) images; name another")
    with u.atomic_write(path) as part, open(part, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    return {(line["image"], line["method"]): {m: float(line[m]) for m in METRICS} | {"error": ""} for line in lines}


def summarise(scores, stems, rows, labels, seed):
    """The contents of the table and the JSON file: {row: means, 95 % intervals, differences to the first row}.

    scores: {(stem, row): scores}. labels: the group of each stem, or None; with groups also the mean of their means.
    """
    summary = {}
    for row in rows:
        summary[row] = {"failed": [stem for stem in stems if scores[stem, row]["error"]]}
        for m in METRICS:
            values, first = (np.array([scores[stem, r][m] for stem in stems]) for r in (row, rows[0]))
            summary[row][m] = {
                "mean": float(values.mean()),
                "interval": bootstrap_interval(values, labels, seed),
                "difference": float((values - first).mean()),
                "difference_interval": bootstrap_interval(values - first, labels, seed),
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
    """A table in Markdown from lists of texts; the first one is its head."""
    rule = ["---"] + ["--:"] * (len(lines[0]) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]])


def markdown(summary, reference=None):
    """The table of a summary, in %, with 95 % intervals in brackets. reference: also these rows of the paper."""

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
        lines.append(line | {"mIoU minus first row's": difference, "failed": str(len(entry["failed"]))})
    table = [[*lines[0]], *([*line.values()] for line in lines)]
    if reference:
        for row, numbers in zip(REFERENCE_ROWS, REFERENCES[reference]):
            table.append([f"{row} (published)", *(f"{number:.2f}" for number in numbers), *[""] * (len(lines[0]) - 3)])
    return as_table(table)


def contact_sheet(pairs, scores, row, run, columns=4):
    """The best, median and worst images of a row, a line of each: a PIL image. Yellow: truth. Blue: prediction."""
    ranked = sorted((s for s in pairs if not scores[s, row]["error"]), key=lambda stem: -scores[stem, row]["iou"])
    columns, side = min(columns, math.ceil(len(ranked) / 3)), 300  # px, of a tile
    middle = (len(ranked) - columns) // 2
    chosen = ranked[:columns] + ranked[middle : middle + columns] + ranked[len(ranked) - columns :]
    tiles = []
    for number, stem in enumerate(chosen):
        image = EvalImage(stem, pairs[stem], run)
        truth, drawn = image.truth[image.scored], image.crop[..., :3].copy()
        mask = max(image.masks(row), key=lambda mask: metrics(mask, truth)["iou"])
        for area, colour in ((truth, (255, 220, 0)), (mask, (0, 200, 255))):
            u.draw_contour(drawn, area, colour, max(1, max(area.shape) // side))
        text = f"{('best', 'median', 'worst')[number // columns]}: {stem}, IoU {scores[stem, row]['iou'] * 100:.1f}"
        picture = ImageOps.pad(Image.fromarray(drawn), (side, side), color="white")
        tiles.append(u.captioned(text, picture, (side, side)))
    return u.image_grid(tiles, columns)


# Command line --------------------------------------------------------------------------------------------------

# The settings of the authors' published code for ISIC (for ColonDB --tau 0.5; for K clusters --collapse-weight
# 2 / K^(1/4)). Its dropout, extra edge term in the attention, division of the graph by its maximum and features without
# normalisation are not reproduced.
OFFICIAL = u.PRESETS["paper"] | {"tau": 0.35, "stride": 4, "heads": 1, "widths": (32, 64, 128), "layers": 1,
                                 "lr": 1e-4, "epochs": 55, "resolution": 0.5, "collapse_weight": 2 * 2**-0.25,
                                 "squash": True}  # fmt: skip


def build_parser():
    """The parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="eval.py",
        description="Score UnSegMedGAT, the methods of its paper and trivial baselines on your images and masks.",
        epilog="Protocols: " + "; ".join(f"{name}: {text}" for name, text in PROTOCOLS.items()) + ". `eval.py bench` "
        "times every stage on this machine. Exit code: 0 all images done, 1 some image failed, 2 wrong use, "
        "130 interrupted.",
    )  # fmt: skip
    add = parser.add_argument
    add("images", type=Path, help="a folder of images")
    add("masks", type=Path, help="a folder of masks with the same names, which may end in _mask and the like")
    add("--protocol", choices=PROTOCOLS, default="blind", help="default blind; see below")
    add("--methods", type=lambda text: text.split(","), default=list(METHODS), metavar="A,B",
        help=f"of {', '.join(METHODS)}; default all")  # fmt: skip
    add("--predictions", type=lambda text: text.partition("=")[::2], action="append", default=[], metavar="NAME=FOLDER",
        help="also score these masks, made by another program; may be repeated")  # fmt: skip
    add("--preset", choices=["official", *u.PRESETS],
        help="settings of the authors' code, or of the paper; other flags override them")  # fmt: skip
    add("--squash", action=argparse.BooleanOptionalAction, default=False,
        help="first resize to a square, as the authors' code does; part of --preset official")  # fmt: skip
    add("--loosen", type=float, default=1.0, metavar="FACTOR", help="with --protocol box: scale the box about its "
        "centre, as users draw boxes with room to spare, and cut it at the sides of the image; default 1")  # fmt: skip
    add("--jitter", type=int, default=0, metavar="PX",
        help="move the given point, or each side of the given box, by up to PX, seeded")  # fmt: skip
    add("--oracle-features", type=float, metavar="NOISE", help="USES GROUND TRUTH: features made from it, with noise, "
        "in place of a backbone's; the result with an ideal backbone")  # fmt: skip
    add("--tolerance", default="2%", help="of the surface Dice: 2%% of the diagonal (default), or 5px")
    add("--limit", type=int, metavar="N", help="only N pairs, evenly spread over the sorted list")
    add("--group-by", metavar="REGEX", help="the regular expression's first group, found in an image's name, is the "
        "image's group, as ^(s\\d+)_ for video sequences: adds the mean of the groups' means, and intervals resample "
        "groups")  # fmt: skip
    add("--reference", choices=REFERENCES, help="add the paper's published rows")
    add("--csv", type=Path, help="write the scores of each image and method as they come")
    add("--resume", action="store_true", help="keep the scores in the --csv file and compute the others")
    add("--json", type=Path, help="write the table with all intervals, settings and versions")
    add("--sheet", type=Path, help="write a .png of the first row's best, median and worst images, the truth outlined "
        "in yellow, the prediction in blue")  # fmt: skip
    u.add_backbone_flags(parser)
    add("--quiet", action="store_true", help="no progress bars")
    u.add_config_flags(parser)
    return parser


def check_args(args):
    """Raise ValueError for wrong use that can be found before any work."""

    def require(condition, message):
        if not condition:
            raise ValueError(message)

    unknown = [name for name in args.methods if name not in METHODS]
    require(not unknown, f"--methods: there is no {', '.join(unknown)}; choose from {', '.join(METHODS)}")
    trivial = trivial_baselines(args.protocol, (1, 1), (0, 0, 1, 1))  # for their names
    names = {name for name, folder in args.predictions if folder} - {"", LOCATED, *METHODS, *trivial}
    require(len(names) == len(args.predictions),
            "--predictions must be NAME=FOLDER, with distinct names that are not rows of the table")  # fmt: skip
    require(args.jitter >= 0, "--jitter must be at least 0")
    require(not args.jitter or args.protocol in ("point", "box"), "--jitter needs --protocol point or box")
    require(0 < args.loosen < math.inf, "--loosen must be above 0")
    require(args.loosen == 1 or args.protocol == "box", "--loosen needs --protocol box")
    if args.oracle_features is not None:
        require(0 <= args.oracle_features < math.inf, "--oracle-features needs a noise of at least 0")
        require(not args.weights and args.backbone in ("auto", "builtin"),
                "--oracle-features replaces the backbone: leave --backbone and --weights out")  # fmt: skip
    require(not args.squash or args.protocol not in ("point", "box"), "--squash distorts the prompt: add --no-squash")
    require(args.limit is None or args.limit >= 1, "--limit must be at least 1")
    require(args.csv or not args.resume, "--resume needs the --csv FILE to continue")
    require(args.resume or not (args.csv and args.csv.exists()),
            f"{args.csv}: exists; add --resume to continue it, or name another file")  # fmt: skip
    require(not args.sheet or args.sheet.suffix.lower() == ".png", f"{args.sheet}: the sheet's name must end in .png")
    pixels(args.tolerance, 1)
    outputs = [path.resolve() for path in (args.csv, args.json, args.sheet) if path]
    inputs = {Path(folder).resolve() for folder in (args.images, args.masks, *dict(args.predictions).values())}
    for path in outputs:
        require(path.parent.is_dir() and os.access(path.parent, os.W_OK),
                f"{path}: there is no such folder, or no permission to write there")  # fmt: skip
        require(not path.is_dir() and outputs.count(path) == 1,
                f"{path}: is a folder, or named for two outputs; name another file")  # fmt: skip
        require(not inputs & {*path.parents}, f"{path}: lies in an input folder; name another file")


def score_settings(run):
    """The settings that the scores depend on, for fingerprints and the JSON file: a dictionary."""
    names = ("protocol", "squash", "jitter", "loosen", "oracle_features", "tolerance")
    weights = run.args.weights and str(run.args.weights.resolve())
    backbone = {"name": run.backbone.name, "branch": run.args.branch, "weights": weights}
    if run.backbone.name.endswith(".py"):
        backbone["file"] = hashlib.sha256(Path(run.backbone.name).read_bytes()).hexdigest()
    settings = {name: getattr(run.args, name) for name in names}
    return settings | {"backbone": backbone, "config": dataclasses.asdict(run.config)}


def row_fingerprint(row, pairs, run):
    """A digest of the settings and the folders' names, not contents; for unsegmedgatc also of the images' names."""
    folders = [run.args.images, run.args.masks, *(folder for name, folder in run.args.predictions if name == row)]
    data = [score_settings(run), [str(Path(folder).resolve()) for folder in folders]]
    if row == "unsegmedgatc":  # it learns from all images
        data.append(sorted(pairs))
    else:
        data[0]["config"]["shared_epochs"] = 0
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:12]


def score_all(pairs, rows, run):
    """{(stem, row): scores} of every image and row, written to the CSV file as they come; ranks share the images."""
    args, (rank, world) = run.args, u.rank_and_world()
    fingerprints = {row: row_fingerprint(row, pairs, run) for row in rows}
    # The first rank reads for all ranks, before any of them writes
    scores = u.all_gather(begin_csv(args.csv, fingerprints) if args.csv and rank == 0 else {})[0]
    todo = {stem: missing for stem in pairs if (missing := [row for row in rows if (stem, row) not in scores])}
    drawn = [rows[0]] if args.sheet else []
    if any("unsegmedgatc" in missing for missing in [drawn, *todo.values()]):  # over all images, also with --resume
        extract = [lambda stem=stem, paths=paths: EvalImage(stem, paths, run).nodes() for stem, paths in pairs.items()]
        shared = u.shared_parameters(extract, run.config, run.device, args.quiet or rank > 0)
        run.methods["unsegmedgatc"] = functools.partial(unsegmedgat, shared=shared)
    share, rank_scores = list(todo)[rank::world], {}
    bar = torch.hub.tqdm(total=len(share), desc=args.protocol, disable=args.quiet or rank > 0)
    with bar, open(args.csv or os.devnull, "a", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        for stem in share:
            for row, score in evaluate(stem, pairs[stem], todo[stem], run).items():
                rank_scores[stem, row] = score
                writer.writerow({"settings": fingerprints[row], "image": stem, "method": row} | score)
            file.flush()  # the lines of an image in one piece, so that those of several ranks do not mix
            bar.update(1)
    for part in u.all_gather(rank_scores):
        scores |= part
    return scores


def print_report(run, summary, count, groups):
    """Print the settings and the table. count: of the images; groups: how many there are, 0 without groups."""
    args, config = run.args, run.config
    what = PROTOCOLS[args.protocol]
    if args.oracle_features is not None:
        what = what.removesuffix("; no ground truth reaches a method")
        what += "; USES GROUND TRUTH: the features are made from it"
    u.print_line(f"**{args.protocol}** protocol: {what}. n = {count} images"
                 + (f" in {groups} groups." if groups else "."))  # fmt: skip
    changed = {name: value for name, value in vars(config).items() if value != getattr(u.Config(), name)}
    changed |= {name: getattr(args, name) for name, default in (("squash", False), ("jitter", 0), ("loosen", 1.0))
                if getattr(args, name) != default}  # fmt: skip
    texts = [f"{name} {f'{value:.4g}' if isinstance(value, float) else value}" for name, value in changed.items()]
    u.print_line(f"Backbone: {run.backbone.name}. Seed {config.seed}. "
                 f"Settings: {', '.join([args.preset or 'default', *texts])}.\n")  # fmt: skip
    u.print_line(markdown(summary, args.reference))
    u.print_line(f"\nIn %; 95 % bootstrap intervals in brackets. HD95, in % of the diagonal, is one percentile of the "
                 "distances of both borders, pooled, as in MedPy (MONAI takes the larger of two). NSD, the surface Dice at a "
                 f"tolerance of {args.tolerance}{' of the diagonal' if args.tolerance.endswith('%') else ''}, counts border "
                 "pixels without weights, as MONAI. A failed image counts as 0 (HD95: 100).")  # fmt: skip
    if args.reference:
        u.print_line("Published: Table I of the paper, DINO features and the official protocol on the whole data set.")


def groups_of(stems, pattern):
    """The group of each image. Raises ValueError for a pattern without a group, or that does not match an image."""
    labels = []
    for stem in stems:
        label = None
        with contextlib.suppress(re.error, OverflowError, TypeError, IndexError):  # no pattern, no match, no group
            label = re.search(pattern, stem)[1]
        if label is None:
            raise ValueError(f"--group-by {pattern}: must be a regular expression with a group ( ) that matches {stem}")
        labels.append(label)
    return labels


def run_evaluation(args):
    """Evaluate as the arguments ask and print the table; returns the exit code. Raises ValueError for wrong use."""
    check_args(args)
    config, device = u.config_from_args(args), u.pick_device(args.device)
    if "unsegmedgatc" in args.methods and not config.shared_epochs:
        config = dataclasses.replace(config, shared_epochs=min(5, config.epochs - 1))  # the paper's T0 for ISIC
    u.all_gather(None)  # no rank writes before every rank has checked what exists
    pairs, unpaired = pair_files(args.images, args.masks)
    for path in unpaired:
        log.warning("%s: has no partner and is left out", path)
    predictions = {name: by_stem(files_below(Path(folder)), pairs) for name, folder in args.predictions}
    if args.limit:
        stems = list(pairs)
        spread = np.linspace(0, len(stems) - 1, min(args.limit, len(stems))).round().astype(int)
        pairs = {stems[i]: pairs[stems[i]] for i in spread}
    labels = groups_of(pairs, args.group_by) if args.group_by else None
    if args.oracle_features is None:
        backbone = u.backbone_from_args(args, device)
    else:  # another one for each image: see EvalImage
        backbone = u.Backbone(f"oracle features from the GROUND TRUTH, noise {args.oracle_features:g}", None)
    if backbone.name != "dino":
        log.warning("the backbone is %s, not DINO: these numbers are not comparable with the paper's", backbone.name)
    run = EvalRun(args, config, backbone, device, {name: METHODS[name] for name in args.methods}, predictions)
    rows = [*run.methods, *predictions, LOCATED, *trivial_baselines(args.protocol, (1, 1), (0, 0, 1, 1))]
    scores = score_all(pairs, rows, run)
    if u.rank_and_world()[0] > 0:  # the first rank reports, as torchrun ends all ranks when one has failed
        return 0

    summary = summarise(scores, list(pairs), rows, labels, config.seed)
    print_report(run, summary, len(pairs), len(set(labels or ())))
    if args.json:
        packages = {"torch": torch, "numpy": np, "scipy": scipy, "pillow": PIL}
        versions = {name: package.__version__ for name, package in packages.items()}
        versions["python"] = platform.python_version()
        header = {"images": len(pairs), "preset": args.preset, "limit": args.limit, "settings": score_settings(run)}
        with u.atomic_write(args.json) as part:
            part.write_text(json.dumps(header | {"versions": versions, "rows": summary}, indent=1) + "\n")
    if args.sheet and len(summary[rows[0]]["failed"]) < len(pairs):
        with u.atomic_write(args.sheet) as part:
            contact_sheet(pairs, scores, rows[0], run).save(part, format="PNG")
    return 1 if any(entry["failed"] for entry in summary.values()) else 0


# Benchmark -----------------------------------------------------------------------------------------------------

GRAPH_SIZES = {784: (224, 8), 3025: (224, 4), 12_321: (448, 4)}  # N: (size, stride); the last one on CUDA only
MEGAPIXELS = (1, 3, 12)


def synthetic_photo(height, width):
    """A picture like a lesion on skin, with uneven light and noise: (height,width,3) uint8."""
    lesion = ellipse((height, width), (0.3 * width, 0.3 * height, 0.7 * width, 0.7 * height))
    light = np.linspace(1, 0.9, width)[:, None]
    rgb = np.where(lesion[..., None], (130, 75, 55), (225, 180, 160)) * light
    return (rgb + np.random.default_rng(0).normal(0, 4, rgb.shape)).clip(0, 255).astype(np.uint8)


def best_time(function, repeats=3):
    """The shortest wall-clock time of several calls, s, after a first one that does not count."""
    available = torch.cuda.is_available(), torch.backends.mps.is_available(), True
    sync = (torch.cuda.synchronize, torch.mps.synchronize, lambda: None)[available.index(True)]
    return min(timeit.repeat(lambda: (function(), sync()), number=1, repeat=repeats + 1)[1:])


def peak_memory():
    """The peak memory so far in GiB: of the GPU if it was used, else of this process."""
    import resource  # not on Windows

    if torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, else in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def bench_graph(n, device):
    """One column of the table of stages: {name: number}."""
    device, (size, stride) = u.pick_device(device), GRAPH_SIZES[n]
    config, backbone, rgb = u.Config(size=size, stride=stride), u.load_backbone("builtin"), synthetic_photo(size, size)
    view, features, node_weights = u.extract_nodes(rgb, config, backbone, device)
    adjacency = u.build_graph(features, config.tau, node_weights)
    fitted = u.fit(features, adjacency, config)

    def mask():
        return u.make_mask(view, fitted.assignment, adjacency, node_weights, config)

    column = {
        "N": n,
        "features and location, ms": 1e3 * best_time(lambda: u.extract_nodes(rgb, config, backbone, device)),
        "graph, ms": 1e3 * best_time(lambda: u.build_graph(features, config.tau, node_weights)),
        "epochs of the fit": len(fitted.losses),
        "fit, s": timeit.timeit(lambda: u.fit(features, adjacency, config), number=1),  # after the first one
        "mask, ms": 1e3 * best_time(mask),
    }
    x = u.centre_and_scale(features, adjacency)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for name, attend in (("blockwise", u.BlockwiseAttention.apply), ("plain", u.attention)):
        network, optimizer = u.seeded_model(lambda: u.UnSegMedGAT(x.shape[1], config), config, device)
        for layer in (layer for layers in network.series for layer in layers):
            layer.attend = attend
        column[f"epoch, {name} attention, ms"] = 1e3 * time_epoch(network, optimizer, x, adjacency, config)
        column[f"peak memory so far, {name}, GiB"] = peak_memory()
    with contextlib.suppress(ImportError):  # without torch_geometric the row is left out
        if n <= 784:  # larger graphs take too much memory
            use_geometric(network, adjacency)
            _, optimizer = u.seeded_model(lambda: network, config, device)
            epoch = time_epoch(network, optimizer, x, adjacency, config, capture=False)  # GATConv cannot be captured
            column["epoch, torch_geometric, ms"] = 1e3 * epoch
    return column


def time_epoch(network, optimizer, x, adjacency, config, capture=True):
    """The seconds of one epoch of `fit`, on CUDA captured as there."""
    epoch = functools.partial(u.train_step, optimizer, lambda: u.loss_of(network, x, adjacency, config))
    for _ in range(3):
        epoch()
    return best_time(u.capture_cuda_graph(epoch, x.device) if capture and x.is_cuda else epoch)


def use_geometric(network, adjacency):
    """Replace every attention layer by torch_geometric's GATConv, which gets a list of edges, not a matrix."""
    from torch_geometric.nn import GATConv

    edges = adjacency.nonzero().T.contiguous()  # (2,E)
    for layers in network.series:
        for number, layer in enumerate(layers):
            width = layer.W.out_features // layer.heads
            conv = GATConv(layer.W.in_features, width, layer.heads, add_self_loops=False, bias=False)
            conv.register_forward_pre_hook(lambda _, inputs: (inputs[0], edges))
            layers[number] = conv.to(adjacency.device)


def bench_solver(megapixels, device):
    """One column of the table of bilateral.py on whole photographs: {name: number}. It runs on the CPU."""
    height = round(math.sqrt(megapixels * 1e6 * 3 / 4))
    guide = synthetic_photo(height, height * 4 // 3)
    target = (guide[..., 1] < 130).astype(float)
    return {
        "megapixels": megapixels,
        "solve, s": best_time(lambda: bilateral.solve(target, guide), 1),
        "peak memory, GiB": peak_memory(),
    }


def bench(argv):
    """`python eval.py bench`: print the cost of every stage on this machine. Returns the exit code."""
    parser = argparse.ArgumentParser("eval.py bench", description="Time every stage on a synthetic image.")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    device = u.pick_device(parser.parse_args(argv).device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    spawn = multiprocessing.get_context("spawn")
    print(f"{name}, {torch.get_num_threads()} threads; Python {platform.python_version()}, torch {torch.__version__}, "
          f"NumPy {np.__version__}")  # fmt: skip
    graph_sizes = [n for n in GRAPH_SIZES if n < 10_000 or device.type == "cuda"]
    for function, sizes in [(bench_graph, graph_sizes), (bench_solver, MEGAPIXELS)]:
        columns = []
        for size in sizes:
            with ProcessPoolExecutor(1, spawn) as pool:  # a process of its own, for its peak memory
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
        return run_evaluation(u.parse_args(build_parser(), argv, u.PRESETS | {"official": OFFICIAL}))

    return u.run_program(program, "with --csv, --resume continues from here")


if __name__ == "__main__":
    sys.exit(main())
