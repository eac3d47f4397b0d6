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
from pathlib import Path

import numpy as np
import PIL
import scipy.cluster.vq
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps
from scipy import ndimage
from scipy.spatial import KDTree
from torch import distributed, nn

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
    with u.seeded(config.seed):
        perceptron = nn.Sequential(nn.Linear(width, width), activation, nn.Linear(width, config.clusters))
        network = nn.ModuleList([layer_class(features.shape[1], width, activation), perceptron]).to(features.device)
    optimizer = u.make_optimizer(network, dataclasses.replace(config, lr=5 * config.lr))
    propagation, x, layer = normalise(adjacency), u.centre_and_scale(features, adjacency), network[0]
    for _ in range(config.epochs):
        assignment = perceptron(layer(x, propagation)).softmax(1)
        objective = loss(assignment, adjacency, propagation, config)
        optimizer.zero_grad()
        objective.backward()
        optimizer.step()
    with torch.no_grad():
        return perceptron(layer(x, propagation)).softmax(1)


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
ROWS = (LOCATED, "everything foreground", "trivial ellipse")


def ellipse(shape, box):
    """The ellipse inscribed in a box: (height,width) bool, True for the pixels whose centre lies inside."""
    x0, y0, x1, y1 = box
    y, x = np.ogrid[: shape[0], : shape[1]]
    return ((2 * x + 1 - x0 - x1) / (x1 - x0)) ** 2 + ((2 * y + 1 - y0 - y1) / (y1 - y0)) ** 2 <= 1


def trivial_baselines(protocol, shape, prompt):
    """{row: mask (height,width)} of guesses that look at no pixel: everything, and an ellipse.

    prompt: the point or box in px, or None. The ellipse is inscribed in the box, or a disc around the point with 0.3
    of the shorter side as its diameter, or centred and half as wide and high as the image.
    """
    (h, w), everything = shape, np.ones(shape, bool)
    box = (0.25 * w, 0.25 * h, 0.75 * w, 0.75 * h) if prompt is None else prompt
    if protocol == "point":
        x, y, r = prompt[0] + 0.5, prompt[1] + 0.5, 0.15 * min(shape)
        box = x - r, y - r, x + r, y + r
    elif protocol == "box":  # whoever is given a box marks nothing outside it
        everything = np.zeros(shape, bool)
        everything[box[1] : box[3], box[0] : box[2]] = True
    return dict(zip(ROWS[1:], (everything, ellipse(shape, box))))


def oracle_backbone(truth, noise, seed):
    """A backbone whose features are made from the truth (height,width) bool: an ideal backbone, with noise.

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

    extract.__name__ = f"oracle features from the GROUND TRUTH, noise {noise:g}"
    return extract


# Metrics -------------------------------------------------------------------------------------------------------

METRICS = ("iou", "dice", "precision", "recall", "hd95", "nsd")
FAILED_SCORES = dict.fromkeys(METRICS, 0.0) | {"hd95": 100.0}  # also where exactly one of the masks is empty


def metrics(mask, truth, tolerance=2.0):
    """The scores of a mask against the truth, (height,width) bool each: a dictionary of floats.

    iou, dice, precision, recall: of the foreground, in [0,1]. The mean of iou over images is the paper's mIoU; the
        background's IoU is not averaged in, and pixels are not pooled over images.
    hd95: 95th percentile of the distances from the border pixels of either mask to the border of the other, in % of the
        image's diagonal. A border pixel has a 4-neighbour outside the mask or the image.
    nsd: normalised surface Dice (Nikolov et al. 2021), the share of all border pixels that are within the tolerance of
        the other border, in [0,1]. tolerance: in % of the diagonal.
    Where one of the masks is empty the scores are 0, and 100 for hd95; where both are, they are perfect.
    """
    true_positive = int((mask & truth).sum())
    if not (mask.any() and truth.any()):
        return dict(FAILED_SCORES) if mask.any() or truth.any() else dict.fromkeys(METRICS, 1.0) | {"hd95": 0.0}
    a, b = (np.argwhere(area & ~ndimage.binary_erosion(area)) for area in (mask, truth))
    distances = np.concatenate([KDTree(b).query(a)[0], KDTree(a).query(b)[0]]) / math.hypot(*truth.shape) * 100
    return {
        "iou": true_positive / int((mask | truth).sum()),
        "dice": 2 * true_positive / int(mask.sum() + truth.sum()),
        "precision": true_positive / int(mask.sum()),
        "recall": true_positive / int(truth.sum()),
        "hd95": float(np.percentile(distances, 95)),
        "nsd": float((distances <= tolerance).mean()),
    }


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
    files = [path for path in sorted(folder.rglob("*")) if u.is_image(path)]
    # Not those in .ipynb_checkpoints and the like
    found = [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    if not found:
        raise ValueError(f"{folder}: there is no such folder, or no image in it")
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
    """Pair the images and masks of two folders by stem: {stem: (image, mask)}. Warns of files without a partner.

    Subfolders are searched too, extensions may differ, and a mask's stem may end in _segmentation, _lesion or _mask.
    The folders may be the same. Raises ValueError for two files of one name, or if there is no pair.
    """
    image_paths, mask_paths = files_below(images), files_below(masks)
    both = {path for path in {*image_paths} & {*mask_paths} if MASK_SUFFIX.search(path.stem)}
    image_of = by_stem([path for path in image_paths if path not in both])
    mask_of = by_stem([path for path in mask_paths if path not in {*image_of.values()}], image_of)
    pairs = {stem: (path, mask_of[stem]) for stem, path in image_of.items() if stem in mask_of}
    if not pairs:
        raise ValueError(f"{images}, {masks}: no image and mask have the same name, as a.jpg and a_mask.png have")
    for path in [table[stem] for table in (image_of, mask_of) for stem in table if stem not in pairs]:
        log.warning("%s: has no partner and is left out", path)
    for image, mask in pairs.values():
        if is_turned(image) and not is_turned(mask):
            log.warning("%s: EXIF turns the image and not the mask, which must be drawn on the turned image", mask)
    return pairs


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
        image = u.decode_image(path)
    except u.ImageError as error:
        raise u.ImageError(f"{path}: the mask: {error}") from None
    if image.size != tuple(shape[::-1]):
        (width, height), (h, w) = image.size, shape
        raise u.ImageError(f"{path}: the mask is {width} x {height} pixels, the image {w} x {h}")
    lossy = image.format in ("JPEG", "MPO", "WEBP")
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image.convert("RGBA"))
    values = np.asarray(image if image.mode[0] in "LIF" else image.convert("L"), float)
    levels = np.unique(values)  # a NaN is the last one
    low, high = (0 if lossy else levels[0]), levels[-1]
    share = (values - low) / max(high - low, 1e-12)  # 0 at the darker end, 1 at the brighter one
    unclear = len(levels) > 2 and not lossy if len(levels) <= FEW else (np.abs(share - 0.5) < 0.4).mean() > 0.1
    if unclear or not np.isfinite(high - low):
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


class EvalImage:
    """One image under the protocol of a run: the part that is scored, the prompt, and the masks of the rows.

    run: the command line's arguments, and what `run_evaluation` adds to them.
    Raises an exception if the image, or what the protocol needs of its ground truth, cannot be read.
    """

    def __init__(self, stem, paths, run):
        self.stem, self.mask_path, self.run = stem, paths[1], run
        self.photo, self.scored, self.prompt, self.backbone = u.load_image(paths[0]), np.s_[:, :], None, run.extract
        seed = [run.config.seed, zlib.crc32(os.fsencode(stem))]
        # Here a protocol passes part of the ground truth to a method, and the table's heading says so. In the official
        # protocol the ground truth also chooses between a mask and its inverse.
        if run.protocol != "blind":
            if not self.truth.any():
                raise u.ImageError("the ground truth is empty, so no prompt can be taken from it: "
                                   "use --protocol blind, or leave the image out")  # fmt: skip
            box = x0, y0, x1, y1 = Image.fromarray(self.truth).getbbox()
            if run.protocol == "official":
                top, left = max(0, y0 - u.BOX_MARGIN), max(0, x0 - u.BOX_MARGIN)
                self.scored = np.s_[top : y1 + u.BOX_MARGIN, left : x1 + u.BOX_MARGIN]
                self.prompt = x0 - left, y0 - top, x1 - left, y1 - top
            else:
                prompt = box if run.protocol == "box" else inner_point(self.truth)
                self.prompt = inexact(prompt, run.loosen, run.jitter, self.truth.shape, seed)
        self.crop = self.photo[self.scored]
        size = (run.config.size,) * 2 if run.squash else self.crop.shape[1::-1]
        self.seen = np.array(Image.fromarray(self.crop).resize(size, Image.BILINEAR))  # by the methods
        if run.oracle_features is not None:
            truth = np.array(Image.fromarray(self.truth[self.scored]).resize(size, Image.NEAREST))
            self.backbone = oracle_backbone(truth, run.oracle_features, seed)
        self.trivial = trivial_baselines(run.protocol, self.crop.shape[:2], self.prompt)

    @functools.cached_property
    def truth(self):
        """(height,width) bool. It is read on first use: in the blind protocol after the masks have been made."""
        return load_mask(self.mask_path, self.photo.shape[:2])

    @functools.cached_property
    def graph(self):
        """The View, features, node weights and adjacency, the same for all rows."""
        run = self.run
        prompt = {run.protocol: self.prompt} if run.protocol in ("point", "box") else {}
        view, features, node_weights = u.extract_nodes(self.seen, run.config, self.backbone, run.device, **prompt)
        return view, features, node_weights, u.build_graph(features, run.config.tau, node_weights)

    def masks(self, row):
        """What a row predicts for the part that is scored: [mask]; in the official protocol [mask, inverse]."""
        run = self.run
        if row in self.trivial:
            return [self.trivial[row]]
        if row in run.made:
            if self.stem not in run.made[row]:
                raise u.ImageError(f"there is no prediction named {self.stem}")
            mask = load_mask(run.made[row][self.stem], self.photo.shape[:2])[self.scored]
        else:
            view, features, node_weights, adjacency = self.graph
            if row == LOCATED:
                assignment = one_hot(view.inside_ellipse().flatten(), features, run.config)
            else:
                assignment = run.methods[row](features, adjacency, run.config)
            mask = u.make_mask(view, assignment, adjacency, node_weights, run.config)["mask"]
            mask = np.asarray(Image.fromarray(mask).resize(self.crop.shape[1::-1], Image.NEAREST))
        return [mask, ~mask] if run.protocol == "official" else [mask]


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
        best = max((metrics(mask, truth, run.tolerance) for mask in masks), key=lambda s: s["iou"])
        scores[row] = best | {"seconds": seconds, "error": ""}
    return scores


# Scores on disk, tables and contact sheets ---------------------------------------------------------------------

COLUMNS = ("settings", "image", "method", *METRICS, "seconds", "error")
open_csv = functools.partial(open, newline="", encoding="utf-8", errors="surrogateescape")  # any file name


def begin_csv(path, digest, resume):
    """Begin a CSV file, or continue one: the scores that it holds, {(stem, row): scores}.

    digest: of the settings. Failures and incomplete lines, as a killed run leaves them, are removed from the file.
    Raises ValueError for an existing file without `resume`, and for one of another program or of other settings.
    """
    lines = []
    if path.exists():
        with open_csv(path) as file:
            reader = csv.DictReader(file)
            lines = [line for line in reader if line.get("error") is not None]
        if not resume:
            raise ValueError(f"{path}: exists; add --resume to continue it, or name another file")
        if reader.fieldnames != [*COLUMNS] or any(line["settings"] != digest for line in lines):
            raise ValueError(f"{path}: is of other settings, folders or images, or of another program; name another file")
    lines = [line for line in lines if not line["error"]]
    with u.atomic_write(path) as part, open_csv(part, "w") as file:
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
                means = [values[np.array(labels) == group].mean() for group in set(labels)]
                summary[row][m]["macro"] = float(np.mean(means))
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
    """A table in Markdown from lists of texts; the first one is its head. Short lines are filled with empty cells."""
    lines = [line + [""] * (len(lines[0]) - len(line)) for line in lines]
    rule = ["---"] + ["--:"] * (len(lines[0]) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]])


def percent(value, interval=None, sign=""):
    """A score in %, and its interval in brackets."""
    brackets = " [{0:{2}.1f}, {1:{2}.1f}]".format(*(100 * end for end in interval), sign) if interval else ""
    return f"{100 * value:{sign}.1f}{brackets}"


def markdown(summary, reference=None):
    """The table of a summary, in %, with 95 % intervals in brackets. reference: also these rows of the paper."""
    table = []
    for row, entry in summary.items():
        iou, difference = entry["iou"], ""
        line = {"method": row, "mIoU": percent(iou["mean"], iou["interval"])}
        line["Dice"] = percent(entry["dice"]["mean"], entry["dice"]["interval"])
        if "macro" in iou:
            line |= {"macro mIoU": percent(iou["macro"]), "macro Dice": percent(entry["dice"]["macro"])}
        line |= {name: percent(entry[name]["mean"]) for name in ("precision", "recall")}
        line |= {"HD95": f"{entry['hd95']['mean']:.1f}", "NSD": percent(entry["nsd"]["mean"])}
        if table:
            difference = percent(iou["difference"], iou["difference_interval"], "+")
        line |= {"mIoU minus first row's": difference, "failed": str(len(entry["failed"]))}
        table = table or [[*line]]
        table.append([*line.values()])
    for row, numbers in zip(REFERENCE_ROWS, REFERENCES.get(reference, ())):
        table.append([f"{row} (published)", *(f"{number:.2f}" for number in numbers)])
    return as_table(table)


def contact_sheet(pairs, scores, row, run, columns=4):
    """The best, median and worst images of a row, a line of each: a PIL image. Yellow: truth. Blue: prediction."""
    ranked = sorted((s for s in pairs if not scores[s, row]["error"]), key=lambda stem: -scores[stem, row]["iou"])
    columns, side = min(columns, math.ceil(len(ranked) / 3)), 300  # px, of a tile
    middle, last = (len(ranked) - columns) // 2, len(ranked) - columns
    pictures = []
    for name, begin in (("best", 0), ("median", middle), ("worst", last)):
        for stem in ranked[begin : begin + columns]:
            image = EvalImage(stem, pairs[stem], run)
            truth, drawn = image.truth[image.scored], image.crop[..., :3].copy()
            mask = max(image.masks(row), key=lambda mask: metrics(mask, truth)["iou"])
            for area, colour in ((truth, (255, 220, 0)), (mask, (0, 200, 255))):
                width = max(1, max(area.shape) // side)
                drawn[area ^ ndimage.binary_erosion(area, iterations=width)] = colour
            picture = ImageOps.pad(Image.fromarray(drawn), (side, side), color="white")
            pictures.append((f"{name}: {stem}, IoU {percent(scores[stem, row]['iou'])}", picture))
    return u.captioned_grid(pictures, (side, side), columns)


# Command line --------------------------------------------------------------------------------------------------

# The settings of the authors' published code for ISIC (for ColonDB --tau 0.5; for K clusters --collapse-weight
# 2 / K^(1/4)). Its dropout, extra edge term in the attention, division of the graph by its maximum and features without
# normalisation are not reproduced.
OFFICIAL = u.PRESETS["paper"] | {"tau": 0.35, "stride": 4, "heads": 1, "widths": (32, 64, 128), "layers": 1,
                                 "lr": 1e-4, "epochs": 55, "resolution": 0.5, "collapse_weight": 2 * 2**-0.25,
                                 "squash": True}  # fmt: skip
PRESETS = u.PRESETS | {"official": OFFICIAL}


def build_parser():
    """The parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="eval.py",
        description="Score UnSegMedGAT, the methods of its paper and trivial baselines on your images and masks.",
        epilog="Protocols: " + "; ".join(f"{name}: {text}" for name, text in PROTOCOLS.items()) + ". `eval.py bench` "
        "times every stage on this machine. Exit code: 0 all images done, 1 some failed, 2 wrong use, 130 interrupted.",
    )  # fmt: skip
    add = parser.add_argument
    add("images", type=Path, help="a folder of images")
    add("masks", type=Path, help="a folder of masks with the same names, which may end in _mask and the like")
    add("--protocol", choices=PROTOCOLS, default="blind", help="default blind; see below")
    add("--methods", nargs="+", choices=METHODS, default=[*METHODS], help="default: all")
    add("--predictions", type=lambda text: text.partition("=")[::2], action="append", default=[], metavar="NAME=FOLDER",
        help="also score these masks, made by another program; may be repeated")  # fmt: skip
    add("--squash", action=argparse.BooleanOptionalAction, default=False,
        help="first resize to a square, as the authors' code does; part of --preset official")  # fmt: skip
    add("--loosen", type=float, default=1.0, metavar="FACTOR", help="scale the box about its centre, as users draw "
        "boxes with room to spare, and cut it at the sides of the image; default 1")  # fmt: skip
    add("--jitter", type=int, default=0, metavar="PX",
        help="move the given point, or each side of the given box, by up to PX, seeded")  # fmt: skip
    add("--oracle-features", type=float, metavar="NOISE", help="USES GROUND TRUTH: features made from it, with noise, "
        "in place of a backbone's; the result with an ideal backbone")  # fmt: skip
    add("--tolerance", type=float, default=2.0, help="of the surface Dice, in %% of the image's diagonal; default 2")
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
    u.add_common_flags(parser, PRESETS)
    return parser


def check_args(args):
    """Raise ValueError for wrong use that would give wrong results or overwrite a file."""
    names = {name for name, folder in args.predictions if folder} - {"", *METHODS, *ROWS}
    outputs = [path.resolve() for path in (args.csv, args.json, args.sheet) if path]
    inputs = {Path(folder).resolve() for folder in (args.images, args.masks, *dict(args.predictions).values())}
    movable, backbone = args.protocol in ("point", "box"), args.weights or args.backbone not in ("auto", "builtin")
    for wrong, message in (
        (len(names) < len(args.predictions), "--predictions needs NAME=FOLDER, with distinct names that no row has"),
        (args.jitter and not movable or args.loosen != 1 and args.protocol != "box",
         "--jitter needs --protocol point or box, and --loosen needs --protocol box"),
        (args.oracle_features is not None and backbone, "--oracle-features replaces --backbone and --weights"),
        (args.squash and movable, "--squash distorts the prompt: add --no-squash"),
        (args.limit is not None and args.limit < 1, "--limit must be at least 1"),
        (args.resume and not args.csv, "--resume needs the --csv FILE to continue"),
        (len({*outputs}) < len(outputs), "two outputs have the same name"),
        (any(inputs & {*path.parents} for path in outputs), "an output lies in an input folder; name another file"),
        (any(path.is_dir() or not path.parent.is_dir() for path in outputs), "an output is a folder, or lies in none"),
    ):  # fmt: skip
        if wrong:
            raise ValueError(message)


def settings_of(run):
    """What the scores depend on beside the images, for the digest and the JSON file: a dictionary."""
    names = ("protocol", "squash", "jitter", "loosen", "oracle_features", "tolerance")
    backbone = {"name": run.extract.__name__, "weights": run.weights and str(run.weights.resolve())}
    if run.extract.__name__.endswith(".py"):
        backbone["file"] = hashlib.sha256(Path(run.extract.__name__).read_bytes()).hexdigest()
    return {name: getattr(run, name) for name in names} | {"backbone": backbone, "config": vars(run.config)}


def score_all(pairs, rows, run):
    """{(stem, row): scores} of every image and row, written to the CSV file as they come; ranks share the images."""
    rank, world = u.rank_and_world()
    folders = [str(Path(folder).resolve()) for folder in (run.images, run.masks, *dict(run.predictions).values())]
    names = [*pairs] if "unsegmedgatc" in rows else []  # it learns from all images
    digest = hashlib.sha256(json.dumps([settings_of(run), folders, names]).encode()).hexdigest()[:12]
    # The first rank reads for all ranks, before any of them writes
    kept = [begin_csv(run.csv, digest, run.resume) if run.csv and rank == 0 else {}]
    if world > 1:
        distributed.broadcast_object_list(kept)
    todo = {stem: missing for stem in pairs if (missing := [row for row in rows if (stem, row) not in kept[0]])}
    if "unsegmedgatc" in rows and (todo or run.sheet):  # over all images, also with --resume
        node_sets = [lambda stem=stem, paths=paths: EvalImage(stem, paths, run).graph[1:3] for stem, paths in pairs.items()]
        shared = u.fit_collective(node_sets, run.config, run.device, run.quiet or rank > 0)
        run.methods["unsegmedgatc"] = functools.partial(unsegmedgat, shared=shared)
    parts = [{}] * world
    bar = torch.hub.tqdm([*todo][rank::world], desc=run.protocol, disable=run.quiet or rank > 0)
    with open_csv(run.csv or os.devnull, "a") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        for stem in bar:
            for row, score in evaluate(stem, pairs[stem], todo[stem], run).items():
                kept[0][stem, row] = score
                writer.writerow({"settings": digest, "image": stem, "method": row} | score)
            file.flush()  # the lines of an image in one piece, so that those of several ranks do not mix
    if world == 1:
        return kept[0]
    distributed.all_gather_object(parts, kept[0])
    return dict(item for part in parts for item in part.items())


def group_of(stem, pattern):
    """The first group of a regular expression in an image's name. Raises ValueError where there is none."""
    try:
        return re.search(pattern, stem)[1]
    except (re.error, OverflowError, TypeError, IndexError):  # no pattern, no match, no group
        raise ValueError(f"--group-by {pattern}: must be a regular expression with a group ( ) that matches {stem}") from None


def print_report(run, summary, count, groups):
    """Print the settings and the table. count: of the images; groups: how many there are, 0 without groups."""
    what = PROTOCOLS[run.protocol]
    if run.oracle_features is not None:
        what = what.removesuffix("; no ground truth reaches a method")
        what += "; USES GROUND TRUTH: the features are made from it"
    u.print_line(f"**{run.protocol}** protocol: {what}. n = {count} images"
                 + (f" in {groups} groups." if groups else "."))  # fmt: skip
    values, defaults = vars(run) | vars(run.config), {"squash": False, "jitter": 0, "loosen": 1.0} | vars(u.Config())
    changed = [f"{name} {values[name]}" for name, default in defaults.items() if values[name] != default]
    u.print_line(f"Backbone: {run.extract.__name__}. Seed {run.config.seed}. "
                 f"Settings: {', '.join([run.preset or 'default', *changed])}.\n")  # fmt: skip
    u.print_line(markdown(summary, run.reference))
    u.print_line("\nIn %; 95 % bootstrap intervals in brackets. HD95, in % of the diagonal, is one percentile of the "
                 "distances of both borders, pooled, as in MedPy (MONAI takes the larger of two). NSD, the surface Dice at a "
                 f"tolerance of {run.tolerance:g} % of the diagonal, counts border pixels without weights, as MONAI. A failed "
                 "image counts as 0 (HD95: 100).")  # fmt: skip
    if run.reference:
        u.print_line("Published: Table I of the paper, DINO features and the official protocol on the whole data set.")


def run_evaluation(run, config):
    """Evaluate as the arguments ask and print the table; returns the exit code. Raises ValueError for wrong use.

    run: the arguments. Added to them are the config, device, methods, masks of other programs, and the backbone.
    """
    check_args(run)
    if "unsegmedgatc" in run.methods and not config.shared_epochs:
        config = dataclasses.replace(config, shared_epochs=min(5, config.epochs - 1))  # the paper's T0 for ISIC
    pairs = pair_files(run.images, run.masks)
    run.config, run.device = config, u.pick_device(run.device)
    run.methods = {name: METHODS[name] for name in run.methods}
    run.made = {name: by_stem(files_below(Path(folder)), pairs) for name, folder in run.predictions}
    if run.limit:
        stems = list(pairs)
        spread = np.linspace(0, len(stems) - 1, min(run.limit, len(stems))).round().astype(int)
        pairs = {stems[i]: pairs[stems[i]] for i in spread}
    labels = [group_of(stem, run.group_by) for stem in pairs] if run.group_by else None
    if run.oracle_features is None:
        run.extract = u.load_backbone(run.backbone, run.weights, run.device, not run.quiet)
    else:  # for its name; each image has another one, see EvalImage
        run.extract = oracle_backbone(None, run.oracle_features, [])
    if run.extract.__name__ != "dino":
        log.warning("the backbone is %s, not DINO: these numbers are not comparable with the paper's", run.extract.__name__)
    rows = [*run.methods, *run.made, *ROWS]
    scores = score_all(pairs, rows, run)
    if u.rank_and_world()[0] > 0:  # the first rank reports, as torchrun ends all ranks when one has failed
        return 0
    summary = summarise(scores, list(pairs), rows, labels, config.seed)
    print_report(run, summary, len(pairs), len(set(labels or ())))
    if run.json:
        versions = {package.__name__: package.__version__ for package in (torch, np, scipy, PIL)}
        header = {"images": len(pairs), "preset": run.preset, "limit": run.limit, "settings": settings_of(run)}
        header |= {"versions": versions | {"python": platform.python_version()}, "rows": summary}
        with u.atomic_write(run.json) as part:
            part.write_text(json.dumps(header, indent=1) + "\n")
    if run.sheet and len(summary[rows[0]]["failed"]) < len(pairs):
        with u.atomic_write(run.sheet) as part:
            contact_sheet(pairs, scores, rows[0], run).save(part, format="PNG")
    return 1 if any(entry["failed"] for entry in summary.values()) else 0


# Benchmark -----------------------------------------------------------------------------------------------------

GRAPH_SIZES = {784: (224, 8), 3025: (224, 4), 12_321: (448, 4)}  # N: (size, stride); the last one on CUDA only
MEGAPIXELS = (1, 3, 12)


def synthetic_photo(height, width):
    """A picture like a lesion on skin, with noise: (height,width,3) uint8."""
    lesion = ellipse((height, width), (0.3 * width, 0.3 * height, 0.7 * width, 0.7 * height))
    rgb = np.where(lesion[..., None], (130, 75, 55), (225, 180, 160))
    return (rgb + np.random.default_rng(0).normal(0, 4, rgb.shape)).clip(0, 255).astype(np.uint8)


def best_time(function, device, repeats=3):
    """The shortest wall-clock time of several calls, ms, after a first one that does not count."""
    synchronize = getattr(torch, device.type).synchronize
    return 1e3 * min(timeit.repeat(lambda: (function(), synchronize()), number=1, repeat=repeats + 1)[1:])


def epoch_time(network, x, adjacency, config, capture):
    """The time of one epoch of `fit`, ms. capture: as a CUDA graph."""
    optimizer = u.make_optimizer(network, config)

    def epoch():
        loss = u.modularity_loss(network(x, adjacency), adjacency, config.resolution, config.collapse_weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    for _ in range(3):
        epoch()
    return best_time(u.capture_cuda_graph(epoch, x.device) if capture else epoch, x.device)


def use_geometric(network, edges):
    """Replace every attention layer by torch_geometric's GATConv, which gets a list of edges (2,E), not a matrix."""
    from torch_geometric.nn import GATConv

    for layers in network.series:
        for number, layer in enumerate(layers):
            inputs, width = layer.W.in_features, layer.W.out_features // layer.heads
            conv = GATConv(inputs, width, layer.heads, add_self_loops=False, bias=False).to(edges.device)
            conv.register_forward_pre_hook(lambda _, arguments: (arguments[0], edges))
            layers[number] = conv


def bench_graph(n, device):
    """One column of the table of stages: {name: number}."""
    size, stride = GRAPH_SIZES[n]
    config, photo = u.Config(size=size, stride=stride), synthetic_photo(size, size)
    view, features, node_weights = u.extract_nodes(photo, config, u.builtin, device)
    adjacency = u.build_graph(features, config.tau, node_weights)
    fitted = u.fit(features, adjacency, config)
    x, capture = u.centre_and_scale(features, adjacency), device.type == "cuda" and not u.needs_blocks(config.heads, n)
    column = {
        "patches": n,
        "epoch, ms": epoch_time(fitted.network, x, adjacency, config, capture),
        "fit, ms": best_time(lambda: u.fit(features, adjacency, config), device, 1),
        "epochs of the fit": len(fitted.losses),
        "mask, ms": best_time(lambda: u.make_mask(view, fitted.assignment, adjacency, node_weights, config), device),
        "peak memory, GiB": peak_memory(),
    }
    if n == 784:  # larger graphs take too much memory
        with contextlib.suppress(ImportError):
            use_geometric(fitted.network, adjacency.nonzero().T.contiguous())
            column["epoch with GATConv, ms"] = epoch_time(fitted.network, x, adjacency, config, capture=False)
    return column


def bench_solver(megapixels, device):
    """One column of the table of bilateral.py, which runs on the CPU, on whole photographs: {name: number}."""
    height = round(math.sqrt(megapixels * 1e6 * 3 / 4))
    guide = synthetic_photo(height, height * 4 // 3)
    target = (guide[..., 1] < 130).astype(float)
    solve = best_time(lambda: bilateral.solve(target, guide), torch.device("cpu"), 1)
    return {"megapixels": megapixels, "solver, ms": solve, "peak memory, GiB": peak_memory()}


def peak_memory():
    """The peak memory so far in GiB: of the GPU if it was used, else of this process."""
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, else in KiB
    used = torch.cuda.max_memory_allocated() or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return used / 2**30


def bench(argv):
    """`python eval.py bench`: print the cost of every stage on this machine. Returns the exit code."""
    parser = argparse.ArgumentParser("eval.py bench", description="Time every stage on a synthetic image.")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    device = u.pick_device(parser.parse_args(argv).device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    u.print_line(f"{name}, {torch.get_num_threads()} threads; Python {platform.python_version()}, torch {torch.__version__}")
    graph_sizes = [n for n in GRAPH_SIZES if n < 10_000 or device.type == "cuda"]
    for function, sizes in ((bench_graph, graph_sizes), (bench_solver, MEGAPIXELS)):
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:  # a process each, for its memory
            columns = pool.starmap(function, [(size, device) for size in sizes], chunksize=1)
        lines = [[name, *(f"{column.get(name, math.nan):.4g}" for column in columns)] for name in columns[0]]
        u.print_line("\n" + as_table(lines))
    return 0


def main(argv=None):
    """The command line; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["bench"]:
        return u.run_program(lambda: bench(argv[1:]))
    return u.run_program(lambda: run_evaluation(*u.parse_args(build_parser(), argv, PRESETS)))


if __name__ == "__main__":
    sys.exit(main())
