"""Evaluate UnSegMedGAT on your images and masks, beside the methods of the paper's Table I and trivial baselines.

    python eval.py images/ masks/                               # blind: no ground truth reaches a method
    python eval.py images/ masks/ --protocol point              # a point in the object is given; or box
    python eval.py images/ masks/ --oracle-features 1           # with features made from the ground truth
    python eval.py images/ masks/ --protocol official --preset official --reference isic2018      # as Table I was made
    python eval.py images/ masks/ --csv scores.csv --resume     # continue an interrupted run
    torchrun --nproc-per-node=8 eval.py images/ masks/          # on several cores, GPUs or machines
    python eval.py bench                                        # time every stage; needs no images

All clusterings get the same graph, and the same steps make masks of their clusters, so rows differ in the clustering
alone. The row unsegmedgat is what the program makes. Ground truth is used in this file only.
Shapes: N = h * w patches, C features, K clusters; masks are (height,width) bool; boxes are (x0, y0, x1, y1) px.
"""

import argparse
import contextlib
import csv
import dataclasses
import functools
import hashlib
import importlib.util
import json
import logging
import math
import multiprocessing
import os
import re
import sys
import time
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
    """k-means on the features, the best of ten runs from k-means++ seeds; the graph is not used."""
    x, seeds = features.cpu().numpy().astype(np.float64), [(config.seed + n) % 2**32 for n in range(10)]
    runs = [scipy.cluster.vq.kmeans2(x, config.clusters, iter=30, minit="++", seed=seed) for seed in seeds]
    _, labels = min(runs, key=lambda run: np.square(x - run[0][run[1]]).sum())
    return one_hot(labels, features, config)


def one_hot(labels, features, config):
    """Labels (N,) as an assignment (N,K) with the dtype and device of the features."""
    return F.one_hot(torch.as_tensor(labels).long(), config.clusters).to(features)


def normalise(adjacency):
    """D^-1/2 A D^-1/2 (N,N), where D are the degrees (Kipf and Welling 2017); their A + I is A, with self-loops."""
    scale = adjacency.sum(1).clamp(min=1e-12).rsqrt()
    return scale[:, None] * adjacency * scale


def dsm(features, adjacency, config):
    """Deep spectral methods (Melas-Kyriazi et al. 2022): the sign of the normalised Laplacian's Fiedler vector.

    For K > 2: k-means on the Laplacian's lowest K eigenvectors, which are the top ones of `normalise(A)`.
    """
    # All eigenvectors: where a graph has many components its largest eigenvalue is multiple, and solvers for a few fail
    _, vectors = torch.linalg.eigh(normalise(adjacency.cpu().double()))  # ascending; some devices have no float64
    vectors = vectors[:, -config.clusters :].to(features)  # (N,K)
    return one_hot(vectors[:, 0] > 0, features, config) if config.clusters == 2 else kmeans(vectors, adjacency, config)


class GCNLayer(nn.Module):
    """A X W (Kipf and Welling 2017); with `skip`, A X W + X V (Bianchi et al. 2020, section 4.1)."""

    def __init__(self, in_features, out_features, activation, skip=False):
        super().__init__()
        self.W, self.activation = nn.Linear(in_features, out_features), activation
        self.V = nn.Linear(in_features, out_features, bias=False) if skip else None

    def forward(self, x, propagation):  # (N,in), (N,N) -> (N,out)
        message = propagation @ self.W(x)
        return self.activation(message if self.V is None else message + self.V(x))


class ARMALayer(nn.Module):
    """ARMA graph convolution (Bianchi et al. 2021, eqs. (6), (7)): the mean of stacks of X' = sigma(A X W + X0 V)."""

    def __init__(self, in_features, out_features, activation, stacks=2):
        super().__init__()
        self.first = nn.Parameter(torch.empty(stacks, in_features, out_features))
        self.W = nn.Parameter(torch.empty(stacks, out_features, out_features))
        self.V = nn.Parameter(torch.empty(stacks, in_features, out_features))
        self.activation = activation
        for matrix in [matrix for parameter in self.parameters() for matrix in parameter]:
            nn.init.xavier_uniform_(matrix)

    def forward(self, x, propagation):  # (N,in), (N,N) -> (N,out)
        skip = x @ self.V  # (stacks,N,out)
        state = self.activation(propagation @ (x @ self.first) + skip)
        return self.activation(propagation @ (state @ self.W) + skip).mean(0)


def optimise(features, adjacency, config, layer_class, loss):
    """The assignment (N,K) of one graph convolution and a perceptron that minimise a loss, over all epochs.

    layer_class: GCNLayer or ARMALayer. loss: a function with the arguments of `unsegmedgat.modularity_loss`.
    The width, the perceptron's hidden layer and five times the learning rate are ours (at 1x unseggnet loses 7 points).
    """
    width, activation = config.fc_dim, u.ACTIVATIONS[config.activation]()
    with u.seeded(config.seed):
        perceptron = nn.Sequential(nn.Linear(width, width), activation, nn.Linear(width, config.clusters))
        network = nn.ModuleList([layer_class(features.shape[1], width, activation), perceptron]).to(features.device)
    optimizer = torch.optim.AdamW(network.parameters(), 5 * config.lr, weight_decay=config.weight_decay)
    propagation, x, layer = normalise(adjacency), u.centre_and_scale(features, adjacency), network[0]
    for _ in range(config.epochs):
        assignment = perceptron(layer(x, propagation)).softmax(1)
        objective = loss(assignment, adjacency, config.resolution, config.collapse_weight)
        optimizer.zero_grad()
        objective.backward()
        optimizer.step()
    with torch.no_grad():
        return perceptron(layer(x, propagation)).softmax(1)


def mincut_loss(assignment, adjacency, *_):
    """Cut and orthogonality loss, eq. (9) of Bianchi et al. 2020, a scalar. S (N,K), A (N,N)."""
    propagation, k = normalise(adjacency), assignment.shape[1]
    within = (assignment * (propagation @ assignment)).sum()  # Tr(S^T A S)
    volume = (propagation.sum(1) @ assignment.square()).sum()  # Tr(S^T D S)
    overlap = assignment.T @ assignment  # (K,K)
    balance = (overlap / overlap.norm() - torch.eye(k).to(overlap) / math.sqrt(k)).norm()
    return -within / volume.clamp(min=1e-12) + balance


METHODS = {
    "unsegmedgat": unsegmedgat,
    "unsegmedgatc": unsegmedgat,  # `score_all` passes the shared parameters
    "vit-kmeans": kmeans,
    "dsm": dsm,
    "mincutpool": functools.partial(optimise, layer_class=functools.partial(GCNLayer, skip=True), loss=mincut_loss),
    "unseggnet": functools.partial(optimise, layer_class=GCNLayer, loss=u.modularity_loss),  # Reddy et al. 2024
    "unsegarmanet": functools.partial(optimise, layer_class=ARMALayer, loss=u.modularity_loss),  # Reddy et al. 2024
}


# Rows beside the methods ---------------------------------------------------------------------------------------

LOCATED = "located ellipse"  # the ellipse itself in place of a clustering, with the same steps after it
EVERYTHING = "everything foreground"
ELLIPSES = {"blind": "centred ellipse", "point": "disc at the point", "box": "inscribed ellipse",
            "official": "inscribed ellipse"}  # fmt: skip


def trivial_baselines(protocol, shape, prompt):
    """{row: mask (height,width)} of guesses that look at no pixel: everything, and an ellipse.

    prompt: the point or box in px, or None. The ellipse is inscribed in the box, or a disc around the point with 0.3
    of the shorter side as its diameter, or centred and half as wide and high as the image.
    """
    y, x = np.ogrid[: shape[0], : shape[1]]
    x0, y0, x1, y1 = shape[1] / 4, shape[0] / 4, 0.75 * shape[1], 0.75 * shape[0]
    everything = np.ones(shape, bool)
    if protocol == "point":
        (x0, y0), (x1, y1) = (np.array(prompt) + 0.5 + radius * min(shape) for radius in (-0.15, 0.15))
    elif prompt:
        x0, y0, x1, y1 = prompt
    if protocol == "box":  # whoever is given a box marks nothing outside it
        everything = (y >= y0) & (y < y1) & (x >= x0) & (x < x1)
    inscribed = ((2 * x + 1 - x0 - x1) / (x1 - x0)) ** 2 + ((2 * y + 1 - y0 - y1) / (y1 - y0)) ** 2 <= 1
    return {EVERYTHING: everything, ELLIPSES[protocol]: inscribed}


def oracle_backbone(truth, noise, seed):
    """A backbone whose features are made from the truth (height,width) bool: an ideal backbone, with noise.

    For a patch of which the object covers the fraction c, in region l of a k-means clustering of colours and positions,
        f = c (0.35 e0 + 0.94 e1) + (1 - c) (0.75 e0 + 0.66 r_l) + noise g / sqrt(384),
    where e0, e1 and r_1..r_4 are random unit vectors of 384 dimensions, the same for all images, and g is standard
    normal. seed: a list of integers, the seed of g.
    """
    directions = np.random.default_rng(0).standard_normal((6, 384))
    e0, e1, *regions = torch.from_numpy(directions / np.linalg.norm(directions, axis=1, keepdims=True)).float()

    def extract(view):
        y0, x0, y1, x1 = view.crop
        covered = torch.from_numpy(truth[y0:y1, x0:x1]).float()[None, None]
        covered = F.interpolate(covered, size=view.image.shape[1:], mode="bilinear", antialias=True)
        c = F.avg_pool2d(covered, u.PATCH, view.stride).reshape(-1, 1)  # (N,1)
        lab = F.avg_pool2d(u.rgb_to_lab(view.image), u.PATCH, view.stride)
        row, column = torch.meshgrid(*(torch.linspace(0, 20, side) for side in view.grid), indexing="ij")
        appearance = torch.cat([lab, row[None], column[None]]).flatten(1).T.double().numpy()  # (N,5)
        _, label = scipy.cluster.vq.kmeans2(appearance, len(regions), iter=20, minit="++", seed=0)
        background = 0.75 * e0 + 0.66 * torch.stack(regions)[label]  # (N,384)
        g = torch.from_numpy(np.random.default_rng([*seed, *view.crop]).standard_normal(background.shape)).float()
        return c * (0.35 * e0 + 0.94 * e1) + (1 - c) * background + noise / math.sqrt(384) * g

    extract.__name__ = f"oracle features from the GROUND TRUTH, noise {noise:g}"
    return extract


# Metrics -------------------------------------------------------------------------------------------------------

METRICS = ("iou", "dice", "precision", "recall", "hd95", "nsd")
FAILED_SCORES = dict.fromkeys(METRICS, 0.0) | {"hd95": 100.0}  # also where exactly one of the masks is empty


def parse_tolerance(text):
    """A tolerance, "2%" of the diagonal or "5px", as (number, unit). Raises ValueError for other texts."""
    match = re.fullmatch(r"(\d+\.?\d*)(%|px)", text)
    if not match:
        raise ValueError(f"{text}: must look like 2% or 5px")
    return float(match[1]), match[2]


def metrics(mask, truth, tolerance=(2.0, "%")):
    """The scores of a mask against the truth, (height,width) bool each: a dictionary of floats.

    iou, dice, precision, recall: of the foreground, in [0,1]. The mean of iou over images is the paper's mIoU.
    hd95: 95th percentile of the distances from the border pixels of either mask to the border of the other, in % of the
        image's diagonal. A border pixel has a 4-neighbour outside the mask or the image.
    nsd: normalised surface Dice (Nikolov et al. 2021), the share of all border pixels that are within the tolerance of
        the other border, in [0,1]. tolerance: from `parse_tolerance`.
    Where one of the masks is empty the scores are 0, and 100 for hd95; where both are, they are perfect.
    """
    if not (mask.any() and truth.any()):
        return dict(FAILED_SCORES) if mask.any() or truth.any() else dict.fromkeys(METRICS, 1.0) | {"hd95": 0.0}
    both, of_mask, of_truth = int((mask & truth).sum()), int(mask.sum()), int(truth.sum())
    a, b = (np.argwhere(area & ~ndimage.binary_erosion(area)) for area in (mask, truth))
    distances = np.concatenate([KDTree(b).query(a)[0], KDTree(a).query(b)[0]])  # px
    percent = math.hypot(*truth.shape) / 100  # px
    return {
        "iou": both / (of_mask + of_truth - both),
        "dice": 2 * both / (of_mask + of_truth),
        "precision": both / of_mask,
        "recall": both / of_truth,
        "hd95": float(np.percentile(distances, 95)) / percent,
        "nsd": float((distances <= tolerance[0] * (percent if tolerance[1] == "%" else 1)).mean()),
    }


def bootstrap_interval(values, groups=None, seed=0, resamples=2000):
    """The 95 % bootstrap interval of the mean of values (n,): (low, high) by the percentile method.

    groups: (n,) labels, optional; whole groups are then resampled, as the frames of one sequence are not independent.
    None for a single value or group.
    """
    _, index = np.unique(range(len(values)) if groups is None else groups, return_inverse=True)
    counts, sums = np.bincount(index), np.bincount(index, values)
    if len(counts) == 1:
        return None
    draws = np.random.default_rng(seed).integers(len(counts), size=(resamples, len(counts)))
    means = sums[draws].sum(1) / counts[draws].sum(1)
    return tuple(np.percentile(means, [2.5, 97.5]).tolist())


# Images and masks on disk --------------------------------------------------------------------------------------

MASK_SUFFIX = re.compile(r"_(segmentation|lesion|mask(_\d+)?)$", re.IGNORECASE)


def by_stem(folder, stems=(), other=()):
    """{stem: path} of the image files in a folder and its subfolders, without `other` paths.

    A stem that is not among `stems`, those of images, is cut by MASK_SUFFIX. ValueError: two of one stem, or no file.
    """
    table = {}
    for path in sorted(Path(folder).rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)  # .ipynb_checkpoints and the like
        if hidden or path in other or not u.is_image(path):
            continue
        stem = path.stem if not stems or path.stem in stems else MASK_SUFFIX.sub("", path.stem)
        if stem in table:
            raise ValueError(f"{path}, {table[stem]}: have the same name; unite masks of several objects in one file")
        table[stem] = path
    if not table:
        raise ValueError(f"{folder}: there is no such folder, or no image in it")
    return table


def pair_files(images, masks):
    """Pair the images and masks of two folders by stem: {stem: (image, mask)}. A warning names what has no partner.

    Extensions may differ, and a mask's stem may end in _segmentation, _lesion or _mask. The folders may be the same.
    Raises ValueError if there is no pair.
    """
    image_of = by_stem(images, other={path for path in masks.rglob("*") if MASK_SUFFIX.search(path.stem)})
    mask_of = by_stem(masks, image_of, {*image_of.values()})
    pairs = {stem: (path, mask_of[stem]) for stem, path in image_of.items() if stem in mask_of}
    if not pairs:
        raise ValueError(f"{images}, {masks}: no image and mask have the same name, as a.jpg and a_mask.png have")
    for stem, path in [*image_of.items(), *mask_of.items()]:
        if stem not in pairs:
            log.warning("%s: has no partner and is left out", path)
    for image, mask in pairs.values():
        if is_turned(image) and not is_turned(mask):
            log.warning("%s: EXIF turns the image and not its mask, which must be drawn on the turned image", image)
    return pairs


def is_turned(path):
    """Whether a file's EXIF orientation turns or mirrors the stored pixels; False for one that cannot be read."""
    with contextlib.suppress(Exception), Image.open(path) as image:
        return image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
    return False


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
        raise u.ImageError(f"{path}, the mask: {error}") from None
    if image.size != shape[::-1]:
        raise u.ImageError(f"{path}: the mask is {image.width} x {image.height}, the image {shape[1]} x {shape[0]} px")
    lossy = image.format in ("JPEG", "MPO", "WEBP")
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image.convert("RGBA"))
    values = np.asarray(image if image.mode[0] in "LIF" else image.convert("L"), float)
    levels = np.unique(values)
    low, high = (0 if lossy else levels[0]), levels[-1]
    share = np.nan_to_num(values - low) / max(high - low, 1e-12)  # 0 at the darker end, 1 at the brighter one
    unclear = len(levels) > 2 and not lossy if len(levels) <= 16 else (np.abs(share - 0.5) < 0.4).mean() > 0.1
    if unclear or not np.isfinite(levels).all():
        some = ", ".join(f"{level:g}" for level in levels[:5])
        raise u.ImageError(f"{path}: the mask has {len(levels)} values ({some}), not two: make it 0 and 255")
    return share > 0.5 if low < high else np.full(values.shape, bool(high > 0))


def inexact(prompt, loosen, jitter, shape, seed):
    """A point or box in px as a user may give it: a box scaled about its centre, all moved by up to `jitter` px."""
    corners = np.array(prompt, float).reshape(-1, 2)  # two of a box, or the point
    corners = np.rint(corners.mean(0) + loosen * (corners - corners.mean(0))).astype(int)
    corners += np.random.default_rng(seed).integers(-jitter, jitter + 1, size=corners.shape)
    corners[0] = corners[0].clip(0, [shape[1] - 1, shape[0] - 1])  # inside the image, and a box not empty
    corners[1:] = corners[1:].clip(corners[0] + 1, shape[::-1])
    return tuple(corners.flatten().tolist())


# Prediction under a protocol -----------------------------------------------------------------------------------

PROTOCOLS = {
    "blind": "the whole image; no ground truth reaches a method",
    "point": "USES GROUND TRUTH: its pixel nearest to its centroid is given, as a user would click",
    "box": "USES GROUND TRUTH: its bounding box is given, as a user would draw it",
    "official": "USES GROUND TRUTH: cropped to its bounding box + 20 px; the better of mask and inverse is kept",
}


class EvalImage:
    """One image under the protocol of a run (see `run_evaluation`): the part that is scored, and the masks of the rows.

    Raises an exception if the image, or what the protocol needs of its ground truth, cannot be read.
    """

    def __init__(self, stem, paths, run):
        self.stem, self.mask_path, self.run = stem, paths[1], run
        self.photo, self.scored, prompt = u.load_image(paths[0]), np.s_[:, :], None
        seed = [run.config.seed, zlib.crc32(os.fsencode(stem))]
        if run.protocol != "blind":  # part of the ground truth reaches the methods, and the table's heading says so
            if not self.truth.any():
                raise u.ImageError("the ground truth is empty, so no prompt can be taken from it: leave the image out")
            prompt = x0, y0, x1, y1 = Image.fromarray(self.truth).getbbox()
            if run.protocol == "official":
                top, left = max(0, y0 - u.BOX_MARGIN), max(0, x0 - u.BOX_MARGIN)
                self.scored = np.s_[top : y1 + u.BOX_MARGIN, left : x1 + u.BOX_MARGIN]
                prompt = x0 - left, y0 - top, x1 - left, y1 - top
            else:
                if run.protocol == "point":
                    inside = np.argwhere(self.truth)
                    prompt = inside[np.square(inside - inside.mean(0)).sum(1).argmin()][::-1]  # (x, y)
                prompt = inexact(prompt, run.loosen, run.jitter, self.truth.shape, seed)
        self.crop = self.photo[self.scored]
        size, extract = (run.config.size,) * 2 if run.squash else self.crop.shape[1::-1], run.extract
        if run.oracle_features is not None:
            truth = np.array(Image.fromarray(self.truth[self.scored]).resize(size, Image.NEAREST))
            extract = oracle_backbone(truth, run.oracle_features, seed)
        seen = np.array(Image.fromarray(self.crop).resize(size, Image.BILINEAR))  # by the methods
        given = {run.protocol: prompt} if run.protocol in ("point", "box") else {}
        self.extract_nodes = lambda: u.extract_nodes(seen, run.config, extract, run.device, **given)
        self.trivial = trivial_baselines(run.protocol, self.crop.shape[:2], prompt)

    @functools.cached_property
    def nodes(self):
        """The View, features and node weights, the same for all rows."""
        return self.extract_nodes()

    @functools.cached_property
    def truth(self):
        """(height,width) bool. It is read on first use: in the blind protocol after the masks have been made."""
        return load_mask(self.mask_path, self.photo.shape[:2])

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
            view, features, node_weights = self.nodes
            adjacency = u.build_graph(features, run.config.tau, node_weights)
            if row == LOCATED:
                assignment = one_hot(view.inside_ellipse().flatten(), features, run.config)
            else:
                assignment = run.methods[row](features, adjacency, run.config)
            mask = u.make_mask(view, assignment, adjacency, node_weights, run.config)["mask"]
            mask = np.asarray(Image.fromarray(mask).resize(self.crop.shape[1::-1], Image.NEAREST))
        return [mask, ~mask] if run.protocol == "official" else [mask]


def evaluate(stem, paths, rows, run):
    """Score rows on one image: {row: {metric: float, "error": a text, empty for success}}."""
    masks, errors = {}, {}
    try:
        image = EvalImage(stem, paths, run)
        for row in rows:
            try:
                masks[row] = image.masks(row)
            except Exception as error:  # the other rows are scored
                errors[row] = f"{row}: {u.one_line(error)}"
        truth = image.truth[image.scored]
        if not truth.any():
            log.warning("%s: the ground truth is empty: an empty mask scores 1, any other 0", paths[1])
    except Exception as error:
        errors = dict.fromkeys(rows, u.one_line(error))
    for error in dict.fromkeys(errors.values()):
        log.error("%s: %s", paths[0], error)
    scores = {row: FAILED_SCORES | {"error": error} for row, error in errors.items()}
    for row in [row for row in masks if row not in errors]:
        candidates = [metrics(mask, truth, run.tolerance) for mask in masks[row]]
        scores[row] = max(candidates, key=lambda scores: scores["iou"]) | {"error": ""}
    return scores


# Scores on disk, tables and contact sheets ---------------------------------------------------------------------

COLUMNS = ("settings", "image", "method", *METRICS, "error")
open_csv = functools.partial(open, newline="", encoding="utf-8", errors="surrogateescape")  # for any file name


def begin_csv(path, digest, resume):
    """Begin a CSV file, or continue one: the scores that it holds, {(stem, row): scores}. digest: of the settings.

    Failures and incomplete lines are removed. ValueError: it exists without `resume`, or is of other settings.
    """
    kept = []
    if path.exists():
        with open_csv(path) as file:
            reader = csv.DictReader(file)
            lines = [line for line in reader if line.get("error") is not None]
        if not resume or reader.fieldnames != [*COLUMNS] or any(line["settings"] != digest for line in lines):
            raise ValueError(f"{path}: exists; name another, or --resume it with the same settings, folders and images")
        kept = [line for line in lines if not line["error"]]
    with u.atomic_write(path) as part, open_csv(part, "w") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept)
    return {(line["image"], line["method"]): {m: float(line[m]) for m in METRICS} | {"error": ""} for line in kept}


def summarise(scores, stems, rows, labels, seed):
    """The contents of the table and the JSON file: {row: means, 95 % intervals, differences to the first row}.

    scores: {(stem, row): scores}. labels: the group of each stem, or None; with groups also the mean of their means.
    """
    summary = {}
    for row in rows:
        summary[row] = {"failed": [stem for stem in stems if scores[stem, row]["error"]]}
        for m in METRICS:
            values, first = (np.array([scores[stem, r][m] for stem in stems]) for r in (row, rows[0]))
            summary[row][m] = entry = {}
            for name, numbers in (("mean", values), ("difference", values - first)):
                entry |= {name: float(numbers.mean()), f"{name}_interval": bootstrap_interval(numbers, labels, seed)}
            if labels:
                entry["macro"] = float(np.mean([values[np.array(labels) == group].mean() for group in set(labels)]))
    return summary


# Table I of the paper: (mIoU, Dice) in %
PUBLISHED = ("UnSegMedGATc", "UnSegMedGAT", "UnSeGArmaNet", "UnSegGNet", "MedSAM", "MinCutPool", "DSM", "ViT-KMeans")
REFERENCES = {
    "isic2018": ((74.76, 85.17), (73.75, 84.34), (73.16, 83.16), (73.94, 84.12), (61.36, 73.06), (72.31, 83.24),
                 (72.2, 81.71), (68.6, 78.37)),
    "colondb": ((65.1, 77.31), (57.21, 70.76), (59.35, 72.58), (55.67, 69.18), (70.29, 80.50), (56.09, 69.71),
                (47.46, 63.50), (51.84, 67.23)),
}  # fmt: skip
TABLE = (("mIoU", "iou", "mean"), ("Dice", "dice", "mean"), ("precision", "precision", "mean"),
         ("recall", "recall", "mean"), ("HD95", "hd95", "mean"), ("NSD", "nsd", "mean"), ("macro mIoU", "iou", "macro"),
         ("macro Dice", "dice", "macro"), ("mIoU minus first row's", "iou", "difference"))  # fmt: skip
FOOTER = """
In %; 95 % bootstrap intervals in brackets. HD95, in % of the diagonal, is one percentile of the distances of both
borders, pooled, as in MedPy (MONAI takes the larger of two). NSD, the surface Dice at a tolerance of {:g} {}, counts
border pixels without weights, as MONAI. A failed image counts as 0 (HD95: 100)."""


def as_table(lines):
    """A table in Markdown from lists of texts; the first one is its head. Short lines are filled with empty cells."""
    lines = [lines[0], ["---"] + ["--:"] * (len(lines[0]) - 1), *lines[1:]]
    return "\n".join("| " + " | ".join(line + [""] * (len(lines[0]) - len(line))) + " |" for line in lines)


def markdown(summary, reference=None):
    """The table of a summary, in %, with 95 % intervals in brackets. reference: also these rows of the paper."""
    columns = [column for column in TABLE if column[2] in [*summary.values()][0][column[1]]]  # macro with groups only
    lines = [["method", *(title for title, _, _ in columns), "failed"]]
    for row, entry in summary.items():
        line = [row]
        for _, metric, key in columns:
            interval = entry[metric].get(f"{key}_interval") if metric in ("iou", "dice") else None
            brackets = f" [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]" if interval else ""
            scale = 1 if metric == "hd95" else 100
            line.append(f"{scale * entry[metric][key]:.1f}{brackets}")
        lines.append([*line, str(len(entry["failed"]))])
    for row, numbers in zip(PUBLISHED, REFERENCES.get(reference, ())):
        lines.append([f"{row} (published)", *(f"{number:.2f}" for number in numbers)])
    return as_table(lines)


def contact_sheet(pairs, scores, row, run, columns=4):
    """The best, median and worst images of a row, a line of each: a PIL image. Yellow: truth. Blue: prediction."""
    ranked = sorted((s for s in pairs if not scores[s, row]["error"]), key=lambda stem: -scores[stem, row]["iou"])
    columns, side, pictures = min(columns, math.ceil(len(ranked) / 3)), 300, []  # px, of a picture
    for name, begin in (("best", 0), ("median", (len(ranked) - columns) // 2), ("worst", len(ranked) - columns)):
        for stem in ranked[begin : begin + columns]:
            image = EvalImage(stem, pairs[stem], run)
            truth, drawn = image.truth[image.scored], image.crop[..., :3].copy()
            mask = max(image.masks(row), key=lambda mask: metrics(mask, truth)["iou"])
            for area, colour in ((truth, (255, 220, 0)), (mask, (0, 200, 255))):
                drawn[area ^ ndimage.binary_erosion(area, iterations=max(1, max(area.shape) // side))] = colour
            picture = ImageOps.pad(Image.fromarray(drawn), (side, side), color="white")
            pictures.append((f"{name}: {stem}, IoU {100 * scores[stem, row]['iou']:.1f}", picture))
    return u.captioned_grid(pictures, (side, side), columns)


# Command line --------------------------------------------------------------------------------------------------

# The settings of the authors' code for ISIC (ColonDB: --tau 0.5; K clusters: --collapse-weight 2 / K^(1/4)), without
# its dropout, extra edge term in the attention, division of the graph by its maximum and features of any norm
OFFICIAL = {"tau": 0.35, "stride": 4, "heads": 1, "widths": (32, 64, 128), "layers": 1, "lr": 1e-4, "epochs": 55,
            "resolution": 0.5, "collapse_weight": 2 * 2**-0.25, "squash": True}  # fmt: skip
PRESETS = u.PRESETS | {"official": u.PRESETS["paper"] | OFFICIAL}


def build_parser():
    """The parser of the command line."""
    protocols = "; ".join(f"{name}: {text}" for name, text in PROTOCOLS.items())
    text = "Score UnSegMedGAT, the methods of its paper and trivial baselines on your images and masks."
    epilog = f"Protocols: {protocols}. `eval.py bench` times every stage. Exit code: as of unsegmedgat.py."
    parser = argparse.ArgumentParser("eval.py", description=text, epilog=epilog)
    add = parser.add_argument
    add("images", type=Path, help="a folder of images")
    add("masks", type=Path, help="a folder of masks with the same names, which may end in _mask and the like")
    add("--protocol", choices=PROTOCOLS, default="blind", help="default blind; see below")
    add("--methods", type=lambda text: text.split(","), default=[*METHODS], metavar="A,B",
        help=f"of {', '.join(METHODS)}; default all")  # fmt: skip
    add("--predictions", type=lambda text: text.partition("=")[::2], action="append", default=[], metavar="NAME=FOLDER",
        help="also score these masks, made by another program; may be repeated")  # fmt: skip
    add("--squash", action=argparse.BooleanOptionalAction, default=False, help="first resize to a square")
    add("--loosen", type=float, default=1.0, metavar="FACTOR", help="scale the given box about its centre; default 1")
    add("--jitter", type=int, default=0, metavar="PX", help="move the point, or each side of the box, by up to PX")
    add("--oracle-features", type=float, metavar="NOISE", help="USES GROUND TRUTH for features, of an ideal backbone")
    add("--tolerance", type=parse_tolerance, default="2%", help="of the surface Dice: 2%% of the diagonal, or 5px")
    add("--limit", type=int, metavar="N", help="only N pairs, evenly spread over the sorted list")
    add("--group-by", metavar="REGEX", help="its first group, found in an image's name, is the image's group, as "
        "^(s\\d+)_ for video sequences: adds the mean of the groups' means; intervals resample groups")  # fmt: skip
    add("--reference", choices=REFERENCES, help="add the paper's rows, of the official protocol and the whole data set")
    add("--csv", type=Path, help="write the scores of each image and method as they come")
    add("--resume", action="store_true", help="keep the scores in the --csv file and compute the others")
    add("--json", type=Path, help="write the table with all intervals, settings and versions")
    add("--sheet", type=Path, help="write a .png of the first row's best, median and worst images; truth is yellow")
    u.add_common_flags(parser, PRESETS)
    return parser


def check_args(args):
    """Raise ValueError for wrong use that would give wrong results, or overwrite or lose a file."""
    names = {name for name, folder in args.predictions if folder} - {
        "", *METHODS, LOCATED, EVERYTHING, *ELLIPSES.values()}  # fmt: skip
    outputs = [path.resolve() for path in (args.csv, args.json, args.sheet) if path]
    inputs = {Path(folder).resolve() for folder in (args.images, args.masks, *dict(args.predictions).values())}
    movable, backbone = args.protocol in ("point", "box"), args.weights or args.backbone not in ("auto", "builtin")
    for wrong, message in (
        ({*args.methods} - {*METHODS}, f"--methods: choose from {', '.join(METHODS)}"),
        (len(names) < len(args.predictions), "--predictions needs NAME=FOLDER, with distinct names that no row has"),
        (args.jitter and not movable or args.loosen != 1 and args.protocol != "box",
         "--jitter needs --protocol point or box, --loosen needs --protocol box"),
        (args.squash and movable, "--squash distorts the point or box: add --no-squash"),
        (args.oracle_features is not None and backbone, "--oracle-features replaces --backbone and --weights"),
        (args.limit is not None and args.limit < 1, "--limit must be at least 1"),
        (args.resume and not args.csv, "--resume needs the --csv FILE to continue"),
        (len({*outputs}) < len(outputs) or any(path.is_dir() or not path.parent.is_dir() or inputs & {*path.parents}
                                               for path in outputs),
         "each output needs a file of its own, in a folder that exists, outside of the input folders"),
    ):  # fmt: skip
        if wrong:
            raise ValueError(message)


def score_all(pairs, rows, run):
    """{(stem, row): scores} of every image and row, written to the CSV file as they come; ranks share the images."""
    (rank, world), names = u.rank_and_world(), [*pairs] if "unsegmedgatc" in rows else []  # it learns from all images
    inputs = [run.images, run.masks, *dict(run.predictions).values(), *([run.weights] if run.weights else [])]
    inputs = [str(Path(path).resolve()) for path in inputs]
    code = Path(run.extract.__name__).read_text() if run.extract.__name__.endswith(".py") else ""
    digest = hashlib.sha256(json.dumps([run.settings, inputs, names, code]).encode()).hexdigest()[:12]
    kept, quiet = [begin_csv(run.csv, digest, run.resume) if run.csv and rank == 0 else {}], run.quiet or rank > 0
    if world > 1:
        distributed.broadcast_object_list(kept)  # the first rank reads for all, before any of them writes
    scores, parts = kept[0], [None] * world
    todo = {stem: missing for stem in pairs if (missing := [row for row in rows if (stem, row) not in scores])}
    if names and (todo or run.sheet):
        node_sets = [lambda item=item: EvalImage(*item, run).nodes[1:] for item in pairs.items()]
        shared = u.fit_collective(node_sets, run.config, run.device, quiet)
        run.methods["unsegmedgatc"] = functools.partial(unsegmedgat, shared=shared)
    share = [*todo][rank::world]
    with torch.hub.tqdm(total=len(share), disable=quiet) as bar, open_csv(run.csv or os.devnull, "a") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        for stem in share:
            for row, score in evaluate(stem, pairs[stem], todo[stem], run).items():
                scores[stem, row] = score
                writer.writerow({"settings": digest, "image": stem, "method": row} | score)
            file.flush()  # the lines of an image in one piece, so that those of several ranks do not mix
            bar.update(1)
    if world == 1:
        return scores
    distributed.all_gather_object(parts, scores)
    return dict(item for part in parts for item in part.items())


def run_evaluation(run, config):
    """Evaluate as the arguments ask and print the table; returns the exit code. Raises ValueError for wrong use.

    run: the parsed arguments. Set in them, for all that follows, are the config, device, methods as {name: function},
    backbone `extract`, masks `made` by other programs, as {name: {stem: path}}, and the settings of the JSON file.
    """
    check_args(run)
    if "unsegmedgatc" in run.methods and not config.shared_epochs:
        config = dataclasses.replace(config, shared_epochs=min(5, config.epochs - 1))  # the paper's T0 for ISIC
    pairs = pair_files(run.images, run.masks)
    run.config, run.device = config, u.pick_device(run.device)
    run.methods = {name: METHODS[name] for name in run.methods}
    run.made = {name: by_stem(folder, pairs) for name, folder in run.predictions}
    spread = np.linspace(0, len(pairs) - 1, min(run.limit or len(pairs), len(pairs))).round().astype(int)
    pairs = {stem: pairs[stem] for stem in np.array([*pairs], object)[spread]}
    try:
        labels = [re.search(run.group_by, stem)[1] for stem in pairs] if run.group_by else None
    except (re.error, TypeError, IndexError):  # no pattern, no match, no group
        raise ValueError(f"--group-by {run.group_by}: must have a group ( ) and match the name of each image") from None
    if run.oracle_features is None:
        run.extract = u.load_backbone(run.backbone, run.weights, run.device, not run.quiet)
    else:
        run.extract = oracle_backbone(None, run.oracle_features, [])  # for its name; each image has its own
    name = run.extract.__name__
    if name != "dino":
        log.warning("the backbone is %s, not DINO: these numbers are not comparable with the paper's", name)
    settings = ("protocol", "squash", "jitter", "loosen", "oracle_features", "tolerance")
    run.settings = {name: getattr(run, name) for name in settings} | {"backbone": name, "config": vars(config)}
    rows = [*run.methods, *run.made, LOCATED, EVERYTHING, ELLIPSES[run.protocol]]
    scores = score_all(pairs, rows, run)
    if u.rank_and_world()[0] > 0:  # the first rank reports, as torchrun ends all ranks when one has failed
        return 0
    summary = summarise(scores, [*pairs], rows, labels, config.seed)
    what, groups = PROTOCOLS[run.protocol], f" in {len(set(labels))} groups" if labels else ""
    if run.oracle_features is not None and run.protocol == "blind":  # the others say so already
        what = what.replace("no ground truth reaches a method", "USES GROUND TRUTH: the features are made from it")
    u.print_line(f"**{run.protocol}** protocol: {what}. n = {len(pairs)} images{groups}.")
    defaults, values = {"squash": False, "jitter": 0, "loosen": 1.0} | vars(u.Config()), run.settings | vars(config)
    changed = [f"{key} {values[key]}" for key in defaults if values[key] != defaults[key]]
    u.print_line(f"Backbone: {name}. Seed {config.seed}. Settings: {', '.join([run.preset or 'default', *changed])}.\n")
    u.print_line(markdown(summary, run.reference) + "\n" + FOOTER.format(*run.tolerance))
    if run.json:
        versions = {package.__name__: package.__version__ for package in (torch, np, scipy, PIL)}
        header = {"images": len(pairs), "preset": run.preset, "settings": run.settings, "versions": versions}
        with u.atomic_write(run.json) as part:
            part.write_text(json.dumps(header | {"rows": summary}, indent=1) + "\n")
    if run.sheet and len(summary[rows[0]]["failed"]) < len(pairs):
        with u.atomic_write(run.sheet) as part:
            contact_sheet(pairs, scores, rows[0], run).save(part, format="PNG")
    return 1 if any(entry["failed"] for entry in summary.values()) else 0


# Benchmark -----------------------------------------------------------------------------------------------------

BENCH = {784: (224, 8, 1), 3025: (224, 4, 3), 12_321: (448, 4, 12)}  # patches: size, stride, megapixels for the solver


def bench_column(n, device):
    """The times of every stage for n patches, over 10,000 on CUDA only, and of the bilateral solver: {name: number}."""
    import resource  # not on Windows

    (size, stride, megapixels), column = BENCH[n], {"patches": n}
    config = u.Config(size=size, stride=stride)

    def photograph(side):  # noisy skin and a darker square: (side,side,3) uint8
        rgb = np.random.default_rng(0).normal((225, 180, 160), 4, (side, side, 3))
        rgb[side // 3 : -side // 3, side // 3 : -side // 3] -= 80
        return rgb.astype(np.uint8)

    def measure(function):  # ms
        start = time.perf_counter()
        function()
        getattr(torch, device.type).synchronize()
        return 1e3 * (time.perf_counter() - start)

    if n < 10_000 or device.type == "cuda":
        view, features, node_weights = u.extract_nodes(photograph(size), config, u.builtin, device)
        graph = features, u.build_graph(features, config.tau, node_weights)
        fitted = u.fit(*graph, config)
        column["fit, ms"] = measure(lambda: u.fit(*graph, config))  # the second one
        column["epoch, ms"] = column["fit, ms"] / len(fitted.losses)
        column["mask, ms"] = measure(lambda: u.make_mask(view, fitted.assignment, graph[1], node_weights, config))
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB, on Linux
        column["peak memory, GiB"] = torch.cuda.max_memory_allocated() / 2**30 or host
    guide = photograph(round(1000 * math.sqrt(megapixels)))
    column |= {"megapixels": megapixels, "solver, ms": measure(lambda: bilateral.solve(guide[..., 1] < 130, guide))}
    if n == 784 and importlib.util.find_spec("torch_geometric"):  # larger graphs take too much memory
        from torch_geometric.nn import GATConv

        class Attention(GATConv):  # with a list of edges, not a matrix
            def __init__(self, in_features, out_features, heads, residual):
                super().__init__(in_features, out_features // heads, heads, add_self_loops=False, bias=False)

            def forward(self, h, _):
                return super().forward(h, edges)

        u.GraphAttention, u.capture_cuda_graph = Attention, lambda step, _: step  # CUDA cannot capture it
        edges, few = graph[1].nonzero().T, dataclasses.replace(config, epochs=3)
        u.fit(*graph, few)
        column["epoch with GATConv, ms"] = measure(lambda: u.fit(*graph, few)) / few.epochs
    return column


def bench(argv):
    """`python eval.py bench`: print the cost of every stage on this machine. Returns the exit code."""
    parser = argparse.ArgumentParser("eval.py bench", description="Time every stage on a synthetic image.")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    device = u.pick_device(parser.parse_args(argv).device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    u.print_line(f"{name}, torch {torch.__version__}\n")
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:  # each has its own peak memory
        columns = pool.starmap(bench_column, [(n, device) for n in BENCH], chunksize=1)
    lines = [
        [name, *(f"{column[name]:,.{0 if column[name] > 20 else 1}f}" if name in column else "" for column in columns)]
        for name in columns[0]
    ]
    u.print_line(as_table(lines))
    return 0


def main(argv=None):
    """The command line; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["bench"]:
        return u.run_program(lambda: bench(argv[1:]))
    return u.run_program(lambda: run_evaluation(*u.parse_args(build_parser(), argv, PRESETS)))


if __name__ == "__main__":
    sys.exit(main())
