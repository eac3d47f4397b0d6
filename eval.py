"""Evaluate UnSegMedGAT on your images and masks, beside the methods of the paper's Table I and trivial baselines.

    python eval.py images/ masks/                               # blind: no ground truth reaches a method
    python eval.py images/ masks/ --protocol point              # a point in the object is given; or box
    python eval.py images/ masks/ --protocol official --preset official --reference isic2018      # as Table I was made
    python eval.py images/ masks/ --csv scores.csv --resume     # continue an interrupted run
    torchrun --nproc-per-node=8 eval.py images/ masks/          # on several cores, GPUs or machines
    python eval.py bench                                        # time the network, mask and solver

All clusterings get the same graph, and the same steps make masks of their clusters, so rows differ in the clustering
alone. The row unsegmedgat is what the program makes. Ground truth is used in this file only.
Shapes: N = h * w patches, C features, K clusters; masks are (height,width) bool; boxes are (x0, y0, x1, y1) px.
"""

import argparse
import csv
import dataclasses
import functools
import json
import logging
import math
import multiprocessing
import os
import re
import sys
import timeit
import zlib
from pathlib import Path

import numpy as np
import scipy.cluster.vq
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
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
        for parameter in self.parameters():
            for matrix in parameter:
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


# Metrics -------------------------------------------------------------------------------------------------------

METRICS = ("iou", "dice", "precision", "recall", "hd95", "nsd")
FAILED_SCORES = dict.fromkeys(METRICS, 0.0) | {"hd95": 100.0}  # also where exactly one of the masks is empty


def metrics(mask, truth, tolerance=2.0):
    """The scores of a mask against the truth, (height,width) bool each: a dictionary of floats.

    iou, dice, precision, recall: of the foreground, in [0,1]. The mean of iou over images is the paper's mIoU.
    hd95: 95th percentile of the distances from the border pixels of either mask to the border of the other, in % of the
        image's diagonal. A border pixel has a 4-neighbour outside the mask or the image.
    nsd: normalised surface Dice (Nikolov et al. 2021), the share of all border pixels that are within the tolerance of
        the other border, in [0,1].
    tolerance: in % of the diagonal.
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
        "nsd": float((distances <= tolerance * percent).mean()),
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
        if u.is_image(path) and path not in other:
            stem = path.stem if not stems or path.stem in stems else MASK_SUFFIX.sub("", path.stem)
            if stem in table:
                raise ValueError(f"{path}, {table[stem]}: have the same name; unite the masks of one image")
            table[stem] = path
    if not table:
        raise ValueError(f"{folder}: there is no such folder, or no image in it")
    return table


def pair_files(images, masks):
    """Pair the images and masks of two folders by stem: {stem: (image, mask)}. Raises ValueError if there is no pair.

    Extensions may differ, and a mask's stem may end in _segmentation, _lesion or _mask. The folders may be the same.
    """
    image_of = by_stem(images, other={path for path in masks.rglob("*") if MASK_SUFFIX.search(path.stem)})
    mask_of = by_stem(masks, image_of, {*image_of.values()})
    pairs = {stem: (path, mask_of[stem]) for stem, path in image_of.items() if stem in mask_of}
    if not pairs:
        raise ValueError(f"{images}, {masks}: no image and mask have the same name, as a.jpg and a_mask.png have")
    for stem, path in [*image_of.items(), *mask_of.items()]:
        if stem not in pairs:
            log.warning("%s: has no partner and is left out", path)
    return pairs


def load_mask(path, shape):
    """Read a mask of two values: (height,width) bool, True for the brighter one.

    The values may be 0/1, 0/255, 16 bit, colours or a palette; transparency counts as black; EXIF turns the mask like
    the image. A JPEG or WebP file is thresholded at half of its own maximum. More than 16 values, as of a soft rim, are
    thresholded half-way between the two ends, if nine tenths of the pixels lie within a tenth of either end.
    Raises ValueError if it cannot be read, has other values, or differs in size from `shape`.
    """
    try:
        image = u.decode_image(path)
    except ValueError as error:
        raise ValueError(f"{path}, the mask: {error}") from None
    if image.size != shape[::-1]:
        raise ValueError(f"{path}: the mask is {image.width} x {image.height}, the image {shape[1]} x {shape[0]} px")
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
        raise ValueError(f"{path}: the mask has {len(levels)} values ({some}), not two: make it 0 and 255")
    return share > 0.5 if low < high else np.full(values.shape, bool(high > 0))


def inexact(prompt, loosen, jitter, shape, seed):
    """A point or box as a user may give it: a box scaled about its centre, each number moved by up to `jitter` px."""
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


def prepare(stem, paths, run):
    """What all rows share of one image under the protocol of a run (see `run_evaluation`).

    Returns the photograph (height,width,4); its truth (height,width) bool, or None in the blind protocol; the slices of
    the part that is scored; the point or box in that part, or None; and its View, features and node weights.
    """
    photo, truth, scored, prompt, given = u.load_image(paths[0]), None, np.s_[:, :], None, {}
    if run.protocol != "blind":  # part of the truth reaches the methods, and the table's heading says so
        truth = load_mask(paths[1], photo.shape[:2])
        if not truth.any():
            raise ValueError("the ground truth is empty, so no prompt can be taken from it: leave the image out")
        prompt = x0, y0, x1, y1 = Image.fromarray(truth).getbbox()
    if run.protocol == "official":
        top, left = max(0, y0 - u.BOX_MARGIN), max(0, x0 - u.BOX_MARGIN)
        scored = np.s_[top : y1 + u.BOX_MARGIN, left : x1 + u.BOX_MARGIN]
        prompt = x0 - left, y0 - top, x1 - left, y1 - top
    if run.protocol == "point":
        inside = np.argwhere(truth)
        prompt = inside[np.square(inside - inside.mean(0)).sum(1).argmin()][::-1]  # (x, y)
    if run.protocol in ("point", "box"):
        seed = [run.config.seed, zlib.crc32(os.fsencode(stem))]
        given[run.protocol] = prompt = inexact(prompt, run.loosen, run.jitter, truth.shape, seed)
    crop = Image.fromarray(photo[scored])
    seen = np.array(crop.resize((run.config.size,) * 2 if run.squash else crop.size, Image.BILINEAR))  # by the methods
    return photo, truth, scored, prompt, u.extract_nodes(seen, run.config, run.extract, run.device, **given)


def predict(stem, paths, rows, run):
    """What rows predict for one image.

    Returns the part that is scored of the photograph and of the truth, the masks of it {row: (height,width) bool}, and
    errors {row: text}.
    """
    photo, truth, scored, prompt, (view, features, node_weights) = prepare(stem, paths, run)
    crop, masks, errors = photo[scored], {}, {}
    trivial = trivial_baselines(run.protocol, crop.shape[:2], prompt)
    ellipse = one_hot(view.inside_ellipse().flatten(), features, run.config)
    adjacency = u.build_graph(features, run.config.tau, node_weights)

    def mask_of(row):
        if row in trivial:
            return trivial[row]
        if row in run.made and stem not in run.made[row]:
            raise ValueError("there is no mask of that name")
        if row in run.made:
            return load_mask(run.made[row][stem], photo.shape[:2])[scored]
        assignment = ellipse if row == LOCATED else run.methods[row](features, adjacency, run.config)
        mask = u.make_mask(view, assignment, adjacency, node_weights, run.config)["mask"]
        return np.asarray(Image.fromarray(mask).resize(crop.shape[1::-1], Image.NEAREST))

    for row in rows:
        try:
            masks[row] = mask_of(row)
        except Exception as error:  # the other rows are scored
            errors[row] = u.one_line(error)
            log.error("%s, %s: %s", paths[0], row, errors[row])
    truth = (load_mask(paths[1], photo.shape[:2]) if truth is None else truth)[scored]  # blind: read after the masks
    if run.protocol == "official":  # the better of mask and inverse
        for row, mask in masks.items():
            masks[row] = max(mask, ~mask, key=lambda area: (area & truth).sum() / (area | truth).sum())
    return crop, truth, masks, errors


def evaluate(stem, paths, rows, run):
    """Score rows on one image: {row: {metric: float, "error": a text, empty for success}}."""
    try:
        _, truth, masks, errors = predict(stem, paths, rows, run)
    except Exception as error:
        masks, errors = {}, dict.fromkeys(rows, u.one_line(error))
        log.error("%s: %s", paths[0], u.one_line(error))
    scores = {row: metrics(mask, truth, run.tolerance) | {"error": ""} for row, mask in masks.items()}
    return scores | {row: FAILED_SCORES | {"error": error} for row, error in errors.items()}


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
            kept = [line for line in reader if line.get("error") == ""]
        if not resume or reader.fieldnames != [*COLUMNS] or any(line["settings"] != digest for line in kept):
            raise ValueError(f"{path}: exists; name another, or --resume it with the same settings, folders and images")
    with u.atomic_write(path) as part, open_csv(part, "w") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept)
    return {(line["image"], line["method"]): {m: float(line[m]) for m in METRICS} | {"error": ""} for line in kept}


# Table I of the paper: (mIoU, Dice) in %
PUBLISHED = ("UnSegMedGATc", "UnSegMedGAT", "UnSeGArmaNet", "UnSegGNet", "MedSAM", "MinCutPool", "DSM", "ViT-KMeans")
REFERENCES = {
    "isic2018": ((74.76, 85.17), (73.75, 84.34), (73.16, 83.16), (73.94, 84.12), (61.36, 73.06), (72.31, 83.24),
                 (72.2, 81.71), (68.6, 78.37)),
    "colondb": ((65.1, 77.31), (57.21, 70.76), (59.35, 72.58), (55.67, 69.18), (70.29, 80.50), (56.09, 69.71),
                (47.46, 63.50), (51.84, 67.23)),
}  # fmt: skip
HEAD = ("method", "mIoU", "Dice", "precision", "recall", "HD95", "NSD", "mIoU minus first row's", "failed")
FOOTER = """
In %; 95 % bootstrap intervals in brackets. HD95, in % of the diagonal, is one percentile of the distances of both
borders, pooled, as in MedPy (MONAI takes the larger of two). NSD, the surface Dice at a tolerance of {:g} %, counts
border pixels without weights, as MONAI. A failed image counts as 0 (HD95: 100), two empty masks as 100 (HD95: 0)."""


def markdown(scores, stems, rows, labels=None, seed=0, reference=None):
    """The table of scores, {(stem, row): scores}, in Markdown: means over images in %, with 95 % intervals in brackets.

    labels: the group of each stem, for the intervals. reference: also these rows of the paper.
    """

    def column(row, metric):  # in %, (n,)
        return np.array([scores[stem, row][metric] * (1 if metric == "hd95" else 100) for stem in stems])

    def cell(values):
        interval = bootstrap_interval(values, labels, seed)
        return f"{values.mean():.1f}" + (f" [{interval[0]:.1f}, {interval[1]:.1f}]" if interval else "")

    lines = [HEAD, ["---"] + ["--:"] * (len(HEAD) - 1)]
    for row in rows:
        iou, failed = column(row, "iou"), [stem for stem in stems if scores[stem, row]["error"]]
        means = [f"{column(row, metric).mean():.1f}" for metric in METRICS[2:]]
        difference = cell(iou - column(rows[0], "iou"))
        lines.append([row, cell(iou), cell(column(row, "dice")), *means, difference, str(len(failed))])
    for row, (iou, dice) in zip(PUBLISHED, REFERENCES.get(reference, ())):
        lines.append([f"{row} (published)", f"{iou:.2f}", f"{dice:.2f}"] + [""] * (len(HEAD) - 3))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def spread(items, n):
    """At most n items of a list, evenly spread over it."""
    return [items[i] for i in np.linspace(0, len(items) - 1, min(n, len(items))).round().astype(int)]


def contact_sheet(pairs, scores, row, run):
    """Twelve images of a row, from the best to the worst IoU: a PIL image. Yellow: truth. Blue: prediction."""
    pictures, side = [], 300  # px, of a picture
    for stem in spread(sorted(pairs, key=lambda stem: -scores[stem, row]["iou"]), 12):
        crop, truth, masks, _ = predict(stem, pairs[stem], [row], run)
        drawn = crop[..., :3].copy()
        for area, colour in ((truth, (255, 220, 0)), (masks[row], (0, 200, 255))):
            drawn[area ^ ndimage.binary_erosion(area, iterations=max(1, max(area.shape) // side))] = colour
        picture = ImageOps.pad(Image.fromarray(drawn), (side, side), color="white")
        pictures.append((f"{stem}, IoU {100 * scores[stem, row]['iou']:.1f}", picture))
    return u.captioned_grid(pictures, (side, side), columns=4)


# Command line --------------------------------------------------------------------------------------------------

# The settings of the authors' code for ISIC (ColonDB: --tau 0.5; K clusters: --collapse-weight 2 / K^(1/4)), without
# its dropout, extra edge term in the attention, division of the graph by its maximum and features of any norm
OFFICIAL = {"tau": 0.35, "stride": 4, "heads": 1, "widths": (32, 64, 128), "layers": 1, "lr": 1e-4, "epochs": 55,
            "resolution": 0.5, "collapse_weight": 2 * 2**-0.25, "squash": True}  # fmt: skip
PRESETS = u.PRESETS | {"official": u.PRESETS["paper"] | OFFICIAL}


def build_parser():
    """The parser of the command line."""
    protocols = "; ".join(f"{name}: {text}" for name, text in PROTOCOLS.items())
    epilog = f"Protocols: {protocols}. `eval.py bench` times network, mask and solver. Exit code: as of unsegmedgat.py."
    parser = argparse.ArgumentParser("eval.py", description=__doc__.partition("\n")[0], epilog=epilog)
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
    add("--tolerance", type=float, default=2.0, metavar="PERCENT", help="of the surface Dice, in %% of the diagonal")
    add("--limit", type=int, metavar="N", help="only N pairs, evenly spread over the sorted list")
    add("--group-by", metavar="REGEX", help="bootstrap whole groups; ( ) is the group in an image's name: ^(s\\d+)")
    add("--reference", choices=REFERENCES, help="add the paper's rows: DINO, official protocol, the whole set")
    add("--csv", type=Path, help="write the scores of each image and method as they come")
    add("--resume", action="store_true", help="keep the scores in the --csv file and compute the others")
    add("--sheet", type=Path, help="write a .png of twelve images of the first row, best to worst; truth is yellow")
    u.add_common_flags(parser, PRESETS)
    return parser


def check_args(args):
    """Raise ValueError for wrong use that would give wrong results, or overwrite or lose a file."""
    names = {name for name, folder in args.predictions if name and folder}
    taken = {*METHODS, LOCATED, EVERYTHING, *ELLIPSES.values()}
    inputs = {Path(folder).resolve() for folder in (args.images, args.masks, *dict(args.predictions).values())}
    with_prompt = args.protocol in ("point", "box")
    for wrong, message in (
        ({*args.methods} - {*METHODS}, f"--methods: choose from {', '.join(METHODS)}"),
        (len(names - taken) < len(args.predictions), "--predictions needs NAME=FOLDER, with a name that no row has"),
        (args.jitter < 0 or args.jitter and not with_prompt, "--jitter needs --protocol point or box, and at least 0"),
        (not 0 < args.loosen < 1e9 or args.loosen != 1 and args.protocol != "box",
         "--loosen needs --protocol box, and a number above 0"),
        (args.squash and with_prompt, "--squash distorts the point or box: add --no-squash"),
        (args.limit is not None and args.limit < 1, "--limit must be at least 1"),
        (not 0 <= args.tolerance <= 100, "--tolerance must be from 0 to 100"),
        (args.sheet and args.sheet.suffix.lower() != ".png", "--sheet must end in .png"),
        (args.resume and not args.csv, "--resume needs the --csv FILE to continue"),
    ):  # fmt: skip
        if wrong:
            raise ValueError(message)
    for path in (args.csv, args.sheet):
        if path and (path.is_dir() or not path.parent.is_dir() or inputs & {*path.resolve().parents}):
            raise ValueError(f"{path}: an output must be a file in a folder that exists, outside of the input folders")


def score_all(pairs, rows, run):
    """{(stem, row): scores} of every image and row, written to the CSV file as they come; ranks share the images."""
    rank, world = u.rank_and_world()
    quiet = run.quiet or rank > 0
    digest = f"{zlib.crc32(json.dumps([run.settings, [*pairs]], default=str).encode()):08x}"
    kept = [begin_csv(run.csv, digest, run.resume) if run.csv and rank == 0 else {}]
    if world > 1:
        distributed.broadcast_object_list(kept)  # the first rank reads for all, before any of them writes
    scores = kept[0]
    todo = {stem: missing for stem in pairs if (missing := [row for row in rows if (stem, row) not in scores])}
    if "unsegmedgatc" in rows and (todo or run.sheet):
        node_sets = [lambda item=item: prepare(*item, run)[-1][1:] for item in pairs.items()]
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
    parts = [scores] * world
    if world > 1:
        distributed.all_gather_object(parts, scores)
    return dict(item for part in parts for item in part.items())


def run_evaluation(run, config):
    """Evaluate as the arguments ask and print the table; returns the exit code. Raises ValueError for wrong use.

    run: the parsed arguments. To them are added the config, the methods as {name: function}, the backbone `extract`,
    the masks `made` by other programs as {name: {stem: path}}, and the settings that a CSV file is resumed with.
    """
    check_args(run)
    if "unsegmedgatc" in run.methods and not config.shared_epochs:
        config = dataclasses.replace(config, shared_epochs=min(5, config.epochs - 1))  # the paper's T0 for ISIC
    pairs = pair_files(run.images, run.masks)
    run.config, run.device = config, u.pick_device(run.device)
    run.methods = {name: METHODS[name] for name in run.methods}
    run.made = {name: by_stem(folder, pairs) for name, folder in run.predictions}
    pairs = dict(spread([*pairs.items()], run.limit or len(pairs)))
    try:
        labels = [re.search(run.group_by, stem)[1] for stem in pairs] if run.group_by else None
    except (re.error, TypeError, IndexError):  # no pattern, no match, no group
        raise ValueError(f"--group-by {run.group_by}: must have a group ( ) and match the name of each image") from None
    run.extract = u.load_backbone(run.backbone, run.weights, run.device, not run.quiet)
    flags = ("images", "masks", "predictions", "weights", "protocol", "squash", "jitter", "loosen", "tolerance")
    run.settings = {flag: getattr(run, flag) for flag in flags} | {"backbone": run.extract.__name__} | vars(config)
    rows = [*run.methods, *run.made, LOCATED, EVERYTHING, ELLIPSES[run.protocol]]
    scores = score_all(pairs, rows, run)
    if u.rank_and_world()[0] > 0:  # the first rank reports, as torchrun ends all ranks when one has failed
        return 0
    groups = f" in {len(set(labels))} groups" if labels else ""
    u.print_line(f"**{run.protocol}** protocol: {PROTOCOLS[run.protocol]}. n = {len(pairs)} images{groups}.")
    defaults = {"squash": False, "jitter": 0, "loosen": 1.0} | vars(u.Config())
    changed = [f"{key} {run.settings[key]}" for key, value in defaults.items() if run.settings[key] != value]
    settings = ", ".join([run.preset or "default", *changed])
    u.print_line(f"Backbone: {run.extract.__name__}. Seed {config.seed}. Settings: {settings}.\n")
    table = markdown(scores, [*pairs], rows, labels, config.seed, run.reference)
    u.print_line(table + "\n" + FOOTER.format(run.tolerance))
    done = {stem: paths for stem, paths in pairs.items() if not scores[stem, rows[0]]["error"]}
    if run.sheet and done:
        with u.atomic_write(run.sheet) as part:
            contact_sheet(done, scores, rows[0], run).save(part, format="PNG")
    return 1 if any(score["error"] for score in scores.values()) else 0


# Benchmark -----------------------------------------------------------------------------------------------------


def synthetic_photograph(side):
    """Noisy skin and a darker square: (side,side,3) uint8."""
    rgb = np.random.default_rng(0).normal((225, 180, 160), 4, (side, side, 3))
    rgb[side // 3 : -side // 3, side // 3 : -side // 3] -= 80
    return rgb.astype(np.uint8)


def bench_line(config):
    """The times of an epoch, a fit and a mask on one image, in a line."""
    photo, device = u.load_image(synthetic_photograph(config.size)), u.pick_device("auto")
    view, features, node_weights = u.extract_nodes(photo, config, u.builtin, device)
    adjacency = u.build_graph(features, config.tau, node_weights)
    fitted = u.fit(features, adjacency, config)
    fit = timeit.timeit(lambda: u.fit(features, adjacency, config), number=1)  # s, the second one
    mask = timeit.timeit(lambda: u.make_mask(view, fitted.assignment, adjacency, node_weights, config), number=1)
    times = f"epoch {1e3 * fit / len(fitted.losses):.1f} ms, fit {fit:.2f} s, mask {1e3 * mask:.0f} ms"
    return f"{len(features):,} patches: {times}"


def bench():
    """`python eval.py bench`: time the network, a mask and the solver on this machine. Returns the exit code."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    u.print_line(f"{name}, torch {torch.__version__}")
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:  # each size starts fresh
        for line in pool.imap(bench_line, [u.Config(), u.Config(stride=4)]):
            u.print_line(line)
    for megapixels in (1, 3, 12):
        guide = synthetic_photograph(round(1000 * math.sqrt(megapixels)))
        solver = timeit.timeit(lambda guide=guide: bilateral.solve(guide[..., 1] < 130, guide), number=1)
        u.print_line(f"bilateral solver, {megapixels} megapixels: {solver:.1f} s")
    return 0


def main(argv=None):
    """The command line; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv == ["bench"]:
        return u.run_program(bench)
    return u.run_program(lambda: run_evaluation(*u.parse_args(build_parser(), argv, PRESETS)))


if __name__ == "__main__":
    sys.exit(main())
