"""Tests: each part against an independent reference, on tiny inputs. Run `python -m pytest -q`."""

import argparse
import contextlib
import functools
import hashlib
import io
import json
import math
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: on inputs so small, threads that wait for each other cost more

import networkx
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage
from scipy.spatial.distance import cdist
from torch import nn
from torchvision.transforms.functional import normalize

import bilateral
import eval as evaluator
import unsegmedgat as u

HERE = Path(__file__).parent
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
QUICK = ["--size", "64", "--epochs", "40", "--backbone", "builtin", "--device", "cpu"]  # under 100 patches


@pytest.fixture(autouse=True)
def seeded():
    """The same random numbers for each test, alone or among others."""
    torch.manual_seed(0)


def random_graph(n, dtype=torch.float64, isolated=None):
    """A symmetric weighted adjacency with self-loops, about half of the edges present; one node may have none."""
    a = torch.rand(n, n, dtype=dtype)
    a = (a + a.T) / 2
    a = (a * (a > 0.5)).fill_diagonal_(1)
    if isolated is not None:
        a[isolated], a[:, isolated] = 0, 0
    return a


def lesion(height=96, width=128, seed=0):
    """A brown ellipse on noisy skin: (H,W,3) uint8 and the truth (H,W) bool."""
    y, x = np.mgrid[:height, :width]
    truth = ((y - height * 0.5) / (height * 0.28)) ** 2 + ((x - width * 0.45) / (width * 0.25)) ** 2 < 1
    rgb = np.where(truth[..., None], (120, 70, 50), (225, 180, 160)).astype(float)
    rgb += np.random.default_rng(seed).normal(0, 4, rgb.shape)
    return rgb.clip(0, 255).astype(np.uint8), truth


def disc(row, column, radius, h=28, w=37):
    """A filled circle: (h,w) bool."""
    y, x = np.ogrid[:h, :w]
    return np.hypot(y - row, x - column) <= radius


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


def segment(image, backbone="builtin", point=None, box=None, **settings):
    config = u.Config(**{"size": 64} | settings)
    return u.segment(image, config, backbone=backbone, device="cpu", point=point, box=box)


@pytest.fixture
def photo(tmp_path):
    Image.fromarray(lesion()[0]).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


# Settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [dict(tau=0.0), dict(tau=1.0), dict(tau=math.nan), dict(clusters=1), dict(heads=3), dict(heads=0), dict(size=8),
     dict(stride=3), dict(epochs=0), dict(epochs=2.5), dict(epochs=2.0), dict(epochs=True), dict(lr=math.inf),
     dict(lr=0), dict(widths=()), dict(widths=128), dict(widths=(128.0,)), dict(layers=0), dict(shared_epochs="5"),
     dict(activation="tanh"), dict(colour=1.1), dict(shared_epochs=60), dict(keep_components=-1), dict(seed=-1),
     dict(bilateral_lambda=-1), dict(mask_blur=1e6), dict(refine="no")],
    ids=str,
)  # fmt: skip
def test_config_refuses_what_is_out_of_range_and_names_it(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong)).replace("heads", "heads|widths")):
        u.Config(**wrong)


@pytest.mark.parametrize(
    "flags, settings",
    [("", {}),
     ("--tau 0.5 --widths 32,64 --no-refine --invert", dict(tau=0.5, widths=(32, 64), refine=False, invert=True)),
     ("--preset paper --bilateral-lambda 7", u.PRESETS["paper"] | dict(bilateral_lambda=7.0))],
)  # fmt: skip
def test_every_setting_is_a_flag_with_the_same_default_and_help_and_wins_over_the_preset(flags, settings):
    parser = u.build_parser()
    options = u.parse_args(parser, ["a.png", "-o", "b.png", *flags.split()])
    assert u.config_from_args(options) == u.Config(**settings)
    text = " ".join(parser.format_help().split())
    assert "--weight-decay" in text and "default 60 [paper, III" in text


# Graph, eq. (1); attention, eqs. (2) to (4); network, eq. (5) --------------------------------------------------


def test_graph_is_the_thresholded_cosine_times_the_weights_of_both_nodes():
    f, weights = torch.randn(7, 5), torch.rand(7)
    cosine = 1 - torch.from_numpy(cdist(f, f, "cosine")).float()
    expected = torch.where(cosine > 0.3, cosine, 0)
    torch.testing.assert_close(u.build_graph(f, 0.3), expected)
    torch.testing.assert_close(u.build_graph(f, 0.3, weights), expected * torch.outer(weights, weights))


@pytest.mark.parametrize("attend", [u.attention, u.BlockwiseAttention.apply], ids=["plain", "blockwise"])
def test_graph_attention_layer_against_loops_over_the_papers_equation_2(attend):
    layer, x = u.GraphAttention(5, 6, heads=2, residual=False), torch.randn(8, 5)
    adjacency = random_graph(8, torch.float32, isolated=3)
    layer.attend, expected, alpha = attend, torch.zeros(8, 6), torch.full((2, 8, 8), 1 / 8)
    for z in range(2):
        w = layer.W.weight[3 * z : 3 * z + 3]  # W^z
        a = torch.cat([layer.a_dst[z], layer.a_src[z]])
        for i in {*range(8)} - {3}:
            neighbours = [j for j in range(8) if adjacency[i, j] > 0]
            scores = [F.leaky_relu(a @ torch.cat([w @ x[i], w @ x[j]]), 0.2) for j in neighbours]
            alpha[z, i] = 0
            alpha[z, i, neighbours] = torch.stack(scores).softmax(0)
            expected[i, 3 * z : 3 * z + 3] = alpha[z, i, neighbours] @ (x[neighbours] @ w.T)
    torch.testing.assert_close(u.attention_weights(*layer.project(x)[1:], adjacency), alpha)
    for edges in (adjacency, adjacency > 0, torch.where(adjacency > 0, adjacency, -1)):  # only their sign counts
        torch.testing.assert_close(layer(x, edges), expected)
    layer.residual = True
    torch.testing.assert_close(layer(x, adjacency), expected + layer.W(x))


@pytest.mark.parametrize("scale", [1, 20, 200, 1e4])
@pytest.mark.parametrize("device, n", [("cpu", 150), pytest.param("cuda", 2100, marks=GPU)])  # over two row blocks
def test_blockwise_attention_equals_the_plain_one_forward_and_backward_however_far_scores_rank_apart(device, n, scale):
    shapes = ((2, n, 3), 1), ((2, n), scale), ((2, n), scale), ((2, n, 3), 1)
    *inputs, upstream = ((by * torch.randn(*shape)).double().to(device).requires_grad_() for shape, by in shapes)
    adjacency, results = random_graph(n, isolated=3).to(device), []
    for attention in (u.attention, u.BlockwiseAttention.apply):
        out = attention(*inputs, adjacency)
        results.append((out, *torch.autograd.grad(out, inputs, upstream)))
        single = attention(*(x.float() for x in inputs), adjacency)  # in which exp(scale) overflows
        torch.testing.assert_close(single.double(), out, rtol=0, atol=1e-4 if scale < 1e4 else 1e-2)
    torch.testing.assert_close(*results)
    assert (results[0][0][:, 3] == 0).all()


@pytest.mark.parametrize("name, activation", [("silu", F.silu), ("selu", F.selu), ("relu", F.relu)])
def test_network_is_equation_5(name, activation):
    config = u.Config(widths=(8, 4), heads=2, fc_dim=3, clusters=3, activation=name)
    network, x, a = u.UnSegMedGAT(5, config), torch.randn(10, 5), random_graph(10, dtype=torch.float32)
    (one, two), (three, four) = network.series
    first = network.fc_branch[0](activation(two(activation(one(x, a)), a)))
    second = network.fc_branch[1](activation(four(activation(three(x, a)), a)))
    torch.testing.assert_close(network(x, a), network.fc_out(first + second).softmax(1))


# Loss, eqs. (6) to (8), and the fit ----------------------------------------------------------------------------


def test_loss_is_equation_8_with_b_formed_and_its_first_term_the_modularity_of_networkx():
    a, c = random_graph(12), torch.rand(12, 4, dtype=torch.float64).softmax(1)
    d, two_m = a.sum(1), a.sum()
    for g, b in [(1.0, 1.0), (0.5, 2.0)]:
        trace = torch.trace(c.T @ (a - g * torch.outer(d, d) / two_m) @ c)
        expected = -trace / two_m + b * (math.sqrt(4) / 12 * c.sum(0).norm() - 1)
        torch.testing.assert_close(u.modularity_loss(c, a, g, b), expected)
    one = F.one_hot(torch.zeros(12, dtype=int), 2).double()  # all in one of two clusters, without an edge
    assert u.modularity_loss(one, 0 * a).item() == pytest.approx(math.sqrt(2) - 1)
    clusters, loopless = torch.arange(12) % 3, a.clone().fill_diagonal_(0)  # networkx counts a self-loop twice
    graph = networkx.from_numpy_array(loopless.numpy())
    theirs = networkx.community.modularity(graph, [{*np.flatnonzero(clusters == k)} for k in range(3)])
    assert u.modularity(F.one_hot(clusters).double(), loopless).item() == pytest.approx(theirs)


def communities(n=40, groups=2, noise=0.2):
    """Features of so many groups, and which node is in which."""
    group = torch.arange(n) % groups
    return torch.eye(20)[group] + noise * torch.randn(n, 20), group


def test_fit_finds_planted_communities_is_repeatable_and_leaves_the_random_state_alone():
    features, group = communities()
    adjacency = u.build_graph(features, 0.3)
    before = torch.get_rng_state()
    result = u.fit(features, adjacency)
    assert torch.equal(torch.get_rng_state(), before)
    assert (result.assignment.argmax(1) == group).float().mean() in (0, 1)
    assert len(result.losses) < 60 and result.losses[-1] < -0.3
    torch.testing.assert_close(result.network(u.centre_and_scale(features, adjacency), adjacency), result.assignment)
    finer = u.fit(features, adjacency, u.Config(resolution=0.9))  # where a uniform assignment has a loss below 0
    assert (finer.assignment.argmax(1) == group).float().mean() in (0, 1)
    again, other = u.fit(features, adjacency), u.fit(features, adjacency, u.Config(seed=np.int64(1)))
    assert torch.equal(result.assignment, again.assignment) and not torch.equal(result.assignment, other.assignment)
    rising = u.fit(features, adjacency, u.Config(early_stop=0, lr=0.1, epochs=70)).losses  # not stopped though it rises
    assert len(rising) == 70 and any(a < b for a, b in zip(rising, rising[3:]))


@pytest.mark.parametrize(
    "share, common, density",
    [(0.5, 0, 0.5), (0.3, 0, 0.58), (0.3, 0.8, 0.63), (0.3, 0.9, 0.8), (0.08, 0, 0.85), (0.3, 1.1, 1), (0.08, 1.1, 1)],
)
def test_fit_reaches_the_modularity_of_the_leading_eigenvector_on_graphs_of_any_density(share, common, density):
    """Two noisy groups, one of this share of the nodes, with a common part of this length: the longer, the denser."""
    group = (torch.arange(196) < share * 196).long()
    directions = F.normalize(torch.randn(3, 384), dim=1)
    noise = torch.randn(196, 384) / math.sqrt(384)
    features = F.normalize(directions[group] + noise + common * directions[2], dim=1)
    adjacency = u.build_graph(features, 0.3)
    assert (adjacency > 0).float().mean() == pytest.approx(density, abs=0.02)

    d = adjacency.sum(1)
    leading = torch.linalg.eigh(adjacency - torch.outer(d, d) / d.sum())[1][:, -1] > 0  # Newman 2006
    best = u.modularity(F.one_hot(leading.long(), 2).float(), adjacency).item()
    assert u.fit(features, adjacency).modularity >= 0.9 * best > 0


def test_standardised_features_have_no_mean_and_length_4_whatever_they_share_nodes_counting_by_degree():
    adjacency = random_graph(50).float()
    degree = adjacency.sum(1)
    x = u.centre_and_scale(torch.randn(50, 7) + 100, adjacency)
    torch.testing.assert_close((degree[:, None] * x).sum(0) / degree.sum(), torch.zeros(7), rtol=0, atol=1e-4)
    assert math.isclose(((degree * x.square().sum(1)).sum() / degree.sum()).sqrt(), 4, rel_tol=1e-4)
    assert (u.centre_and_scale(torch.ones(3, 2), torch.ones(3, 3)) == 0).all()
    assert u.centre_and_scale(x, 0 * adjacency).isfinite().all()  # without edges


def test_collective_phase_is_one_step_an_image_a_pass_with_shared_parameters():
    images = [communities(n)[0] for n in (20, 30)]
    config = u.Config(shared_epochs=3, epochs=10, early_stop=0, widths=(8,), heads=2)
    torch.manual_seed(config.seed)
    network = u.UnSegMedGAT(20, config)
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.lr, weight_decay=1e-2)
    for x in images * 3:
        adjacency = u.build_graph(x, 0.3)
        optimizer.zero_grad()
        u.modularity_loss(network(u.centre_and_scale(x, adjacency), adjacency), adjacency, collapse_weight=0).backward()
        optimizer.step()
    shared = u.fit_collective([(x, torch.ones(len(x))) for x in images], config)
    torch.testing.assert_close(shared, dict(network.state_dict()), check_stride=False)
    kept = {name: tensor.clone() for name, tensor in shared.items()}
    history = u.fit(images[0], u.build_graph(images[0], 0.3), config, shared).losses
    assert len(history) == 7  # the remaining epochs
    torch.testing.assert_close(shared, kept)  # each image starts from the same parameters


# Features ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride, h, w", [(8, 4, 4), (8, 3, 6), (4, 5, 11), (2, 9, 21)])
def test_keys_equal_the_third_of_qkv_after_torchs_own_encoder_layers_row_major(stride, h, w):
    model = u.VisionTransformer(dim=24, depth=3, heads=2, grid=4).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    images = torch.randn(2, 3, (h - 1) * stride + 8, (w - 1) * stride + 8)
    patches = F.unfold(images, 8, stride=stride).mT  # (2,N,3*8*8)
    position = model.pos_embed[:, 1:].reshape(1, 4, 4, 24).permute(0, 3, 1, 2)
    position = F.interpolate(position, size=(h, w), mode="bicubic") if (h, w) != (4, 4) else position
    proj = model.patch_embed.proj
    x = patches @ proj.weight.flatten(1).T + proj.bias + position.flatten(2).mT
    x = torch.cat([(model.cls_token + model.pos_embed[:, :1]).expand(2, 1, 24), x], dim=1)
    for block in model.blocks[:-1]:
        layer = nn.TransformerEncoderLayer(24, 2, 96, 0, "gelu", 1e-6, batch_first=True, norm_first=True).eval()
        layer.self_attn.in_proj_weight, layer.self_attn.in_proj_bias = block.attn.qkv.weight, block.attn.qkv.bias
        layer.self_attn.out_proj, layer.norm1, layer.norm2 = block.attn.proj, block.norm1, block.norm2
        layer.linear1, layer.linear2 = block.mlp.fc1, block.mlp.fc2
        x = layer(x)
    expected = model.blocks[-1].attn.qkv(model.blocks[-1].norm1(x))[:, 1:, 24:48]
    torch.testing.assert_close(model.keys(images, stride), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="multiples of the patch"):
        model.keys(images[..., :-1], stride)


def test_lab_of_known_colours():
    colours = torch.tensor([[1.0, 1, 1], [1, 0, 0], [0, 0, 1], [0, 0, 0]]).T[..., None]
    expected = torch.tensor([[100, 0, 0], [53.24, 80.09, 67.20], [32.30, 79.19, -107.86], [0, 0, 0]]).T[..., None]
    torch.testing.assert_close(u.rgb_to_lab(colours), expected, rtol=0, atol=0.05)


def view_of(rgb, box=None, stride=8, **fields):
    """A View of a photograph, or of a box in it, at its own size."""
    y0, x0, y1, x1 = box = box or (0, 0, *rgb.shape[:2])
    image = u.resize_image(rgb[y0:y1, x0:x1], min(y1 - y0, x1 - x0), stride)
    _, s, t = image.shape
    return u.View(image, stride, box, torch.ones(s // 8, t // 8), (0, 0, s, t), **fields)


# Ours: where the object is, and what it looks like -------------------------------------------------------------


def test_the_cosine_of_joined_features_is_the_weighted_mean_of_both_cosines():
    deep, colour = (F.normalize(torch.randn(9, n), dim=1) for n in (6, 4))
    joined = u.join_features(deep, colour, 0.7)
    torch.testing.assert_close(joined @ joined.T, 0.3 * deep @ deep.T + 0.7 * colour @ colour.T)
    assert u.join_features(deep, colour, 0) is deep and u.join_features(deep, colour, 1) is colour
    assert u.join_features(None, colour, 0.7) is colour  # the built-in backbone


def test_colours_are_deviations_from_the_background_beside_a_constant():
    lab, background = 30 * torch.randn(7, 3), torch.rand(7)
    deviations = lab.numpy() - np.average(lab, axis=0, weights=background)
    expected = np.concatenate([deviations, np.full((7, 1), 50)], axis=1)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(u.colour_features(lab, background), expected, rtol=1e-4, atol=1e-6)


def test_what_features_say_of_the_position_in_the_frame_is_taken_out_and_an_object_is_left():
    y, x = (side.expand(28, 37).flatten() for side in u.position_in((0, 0, 28, 37), 28, 37))
    trend = torch.stack([3 + x - 2 * y, x * x - x * y, 5 * y * y], dim=1)
    border = (0.05 + y**2 + x**2).clamp(max=1)
    assert u.remove_trend(trend, border, 28, 37).abs().max() < 0.05
    spot = torch.from_numpy(disc(14, 18, 5)).flatten()[:, None] * torch.eye(3)[0]
    left = u.remove_trend(trend + spot, border, 28, 37)[:, 0]
    assert left[spot[:, 0] > 0].mean() > 0.9 and left[spot[:, 0] == 0].abs().mean() < 0.05


BLUE, YELLOW, INK, VEIL, BLOOD = (40, 90, 220), (230, 200, 20), (120, 60, 150), (90, 90, 110), (150, 40, 40)


@pytest.mark.parametrize(
    "marks, colour, hidden, seen",  # each a mask of pixels, or of 8 px cells
    [(np.s_[:0], INK, np.s_[:0], np.s_[:]),
     (np.s_[:, :16], (5, 5, 5), np.s_[:, :2], np.s_[5:14, 7:14]),  # an endoscope's frame
     (np.s_[120:, 184:], BLUE, np.s_[15:, 23:], np.s_[:, :22]),  # a sticker in the corner
     (disc(40, 240, 80, 160, 224), YELLOW, np.s_[1:9, 22:], np.s_[:0]),  # so large that the surface gives way to it
     (np.s_[72:88, 88:104], INK, np.s_[9:11, 11:13], np.s_[:, 16:]),
     (np.s_[72:88, 88:104], VEIL, np.s_[:0], np.s_[:]),
     (np.s_[72:88, 88:104], BLOOD, np.s_[:0], np.s_[:])],
)  # fmt: skip
def test_field_of_view_leaves_out_frames_stickers_and_ink_but_no_tissue(marks, colour, hidden, seen):
    rgb, _ = lesion(160, 224)
    rgb[marks] = colour
    valid = u.find_field_of_view(torch.from_numpy(rgb).permute(2, 0, 1) / 255)
    assert not valid[hidden].any() and valid[seen].all()


def salient(row, column, radius):
    """Unit features (28,37,20) of a disc on another background."""
    noise = torch.randn(28, 37, 20, generator=torch.Generator().manual_seed(0))
    directions = torch.eye(20)[disc(row, column, radius).astype(int)]
    return F.normalize(directions + 0.5 / math.sqrt(20) * noise, dim=2)


def locate(*features, valid=torch.ones(28, 37), area=(0, 0, 28, 37), point=None):
    return u.find_disc([values.permute(2, 0, 1) for values in features], valid, area, point)


@pytest.mark.parametrize("row, column, radius", [(14, 18, 6), (10, 24, 4), (8, 10, 4), (17, 15, 9)])
def test_locate_finds_the_disc_whose_features_differ_from_its_ring_and_from_the_border(row, column, radius):
    features = salient(row, column, radius)
    assert iou(disc(*locate(features)), disc(row, column, radius)) > 0.7
    features[:, column + radius - 1 :] = F.normalize(torch.ones(20), dim=0)  # whose edge is longer
    y, x, _ = locate(features)
    assert disc(row, column, radius)[y, x]


@pytest.mark.parametrize("column, half", [(8, torch.arange(37) < 18), (28, torch.arange(37) >= 18)])
def test_of_two_objects_locate_finds_the_valid_one_the_one_at_the_point_in_the_box_or_on_both_maps(column, half):
    features = torch.where(torch.arange(37)[None, :, None] < 18, salient(14, 8, 5), salient(14, 28, 5))
    found = locate(features, valid=half.float().expand(28, 37))
    assert half[found[1]]
    for point in [(13.0, column + 1), (13.0, column - 1)]:
        assert iou(disc(*locate(features, point=point)), disc(14, column, 5)) > 0.6
    boxed = locate(features, area=(5, column - 8, 23, column + 8))
    assert iou(disc(*boxed), disc(14, column, 5)) > 0.6
    both = locate(features, salient(14, column, 5))
    assert iou(disc(*both), disc(14, column, 5)) > 0.6


@pytest.mark.parametrize("scale, fills", [(1, True), (1.1, True), (1.5, False), (2, False), (9, False)])
def test_a_box_is_tight_or_loose_by_its_rim(scale, fills):
    maps = salient(14, 18, 6).permute(2, 0, 1)
    half = 6.5 * scale
    area = max(0, 14.5 - half), max(0, 18.5 - half), min(28, 14.5 + half), min(37, 18.5 + half)
    assert u.box_is_tight([maps], torch.ones(28, 37), area) == fills
    nothing = torch.randn(5, 28, 37)  # a map that knows nothing does not overrule the user
    assert u.box_is_tight([maps, nothing], torch.ones(28, 37), area) == (fills or scale < 9)


@pytest.mark.parametrize("stride", [8, 4])
def test_a_view_knows_its_patches_and_its_ellipse_and_their_weights(stride):
    view = view_of(np.zeros((160, 240, 3), np.uint8), (32, 64, 128, 192), stride, ellipse=(38.0, 66.0, 30.0, 50.0))
    view.field_of_view[:4] = 0  # the upper 32 rows
    rows = 4 + stride * np.arange((96 - 8) // stride + 1)[:, None]
    columns = 4 + stride * np.arange((128 - 8) // stride + 1)
    rho, valid = np.hypot((rows - 38) / 30, (columns - 66) / 50), (rows >= 32) & (columns > 0)
    np.testing.assert_allclose(view.distance_in_radii(), rho, rtol=1e-5)
    assert np.array_equal(view.inside_ellipse(), rho <= 1)
    assert np.array_equal(view.valid_patches(), valid)
    fade = np.exp(-((rho / 1.5) ** 4) / 2)
    fade[fade <= 1e-6] = 0
    np.testing.assert_allclose(u.weigh_nodes(view, 1.5), (fade * valid).ravel(), rtol=1e-5)
    assert np.array_equal(u.weigh_nodes(view, 0), valid.ravel())  # as in the paper


def test_a_view_of_a_box_shows_its_surroundings_and_knows_where_it_is():
    rgb = np.zeros((200, 300, 3), np.uint8) + 200
    rgb[:, :40] = 0  # a dark frame
    view = u.view_photograph(rgb, u.Config(size=96), (50, 60, 150, 140))
    assert view.crop == (36, 20, 164, 180) and view.image.shape == (3, 96, 120)  # 1.6 times as large
    assert view.search_area == pytest.approx((18, 22.5, 78, 97.5))
    assert not view.field_of_view[:, :1].any() and view.field_of_view[:, 2:].all()
    assert u.view_photograph(rgb, u.Config(size=96)).search_area == (0, 0, 96, 144)


# Weights -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dino_files(tmp_path_factory):
    """Seeded random weights in the published layouts, and what each should load as."""
    folder, branches = tmp_path_factory.mktemp("weights"), {}
    full = {"args": argparse.Namespace(arch="vit_small", patch_size=8), "optimizer": {"state": {}, "param_groups": []}}
    head = {"head.mlp.0.weight": torch.zeros(3, 384), "head.last_layer.weight_g": torch.ones(3, 1)}
    for seed, (branch, prefix) in enumerate([("student", "module."), ("teacher", "")]):
        torch.manual_seed(seed)
        model = u.VisionTransformer()
        nn.init.normal_(model.pos_embed, std=0.02)
        branches[branch] = dict(model.state_dict())
        backbone = {f"backbone.{name}": tensor for name, tensor in branches[branch].items()}
        full[branch] = {prefix + name: tensor for name, tensor in (backbone | head).items()}
    torch.save(full, folder / "full.pth")
    torch.save(branches["teacher"], folder / "backbone.pth")
    return folder, branches


def test_both_published_layouts_load_exactly(dino_files):
    folder, branches = dino_files
    for file, branch in [("backbone.pth", "teacher"), ("full.pth", "teacher"), ("full.pth", "student")]:
        model = u.load_dino(folder / file, branch)
        tensors = dict(model.state_dict())
        torch.testing.assert_close(tensors, branches[branch], rtol=0, atol=0)
        assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert len(tensors) == 150 and sum(t.numel() for t in tensors.values()) == 21_670_272
    assert tensors["pos_embed"].shape == (1, 785, 384) and tensors["blocks.11.attn.qkv.weight"].shape == (1152, 384)
    with pytest.raises(ValueError, match="no student"):
        u.load_dino(folder / "backbone.pth", "student")


class Malicious:
    def __reduce__(self):
        return print, ("code in a pickle has run",)


def save_flipped(path, good):
    torch.save(good, path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x40  # in a tensor, not in the padding
    path.write_bytes(content)


BAD_WEIGHTS = {  # how a file is made from a good state_dict, and the message
    "absent": (lambda path, good: None, "bad.pth: cannot be loaded.* No such file"),
    "empty": (lambda path, good: path.touch(), "loaded safely"),
    "html": (lambda path, good: path.write_text("<!DOCTYPE html><html>404 not found</html>"), "loaded safely"),
    "code": (lambda path, good: torch.save({"cls_token": Malicious()}, path), "loaded safely"),
    "plain pickle": (lambda path, good: path.write_bytes(pickle.dumps(Malicious())), "loaded safely"),
    "flipped bit": (save_flipped, "bad.pth: cannot be loaded safely: .*damaged"),
    "a list": (lambda path, good: torch.save([1, 2], path), "got <class 'list'>"),
    "other network": (lambda path, good: torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7)}, path), "cls_token"),
    "lacks one": (lambda path, good: torch.save(dict(list(good.items())[:-1]), path), "norm.bias"),
    "other shape": (lambda path, good: torch.save(good | {"pos_embed": torch.ones(1, 9, 384)}, path), "pos_embed.* 9,"),
    "not finite": (lambda path, good: torch.save(good | {"norm.bias": torch.full((384,), math.nan)}, path),
                   "norm.bias has values that are not finite"),
}  # fmt: skip


@pytest.mark.parametrize("write, says", BAD_WEIGHTS.values(), ids=BAD_WEIGHTS)
def test_bad_weights_are_refused_with_the_reason(dino_files, tmp_path, capsys, photo, caplog, write, says):
    path = tmp_path / "bad.pth"
    write(path, dino_files[1]["teacher"])
    assert u.main([str(photo), "-o", str(tmp_path / "mask.png"), "--weights", str(path)]) == 2
    assert len(caplog.messages) == 1 and re.search(says, caplog.messages[0]) and "\n" not in caplog.messages[0]
    assert "weights_only" not in caplog.text and "bad.pth" in caplog.text
    assert "code in a pickle has run" not in capsys.readouterr().out
    assert not (tmp_path / "mask.png").exists()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache of torch.hub in place of the user's: the path of DINO's file in it."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    u.load_backbone.cache_clear()
    yield u.cached_dino()
    u.load_backbone.cache_clear()


def test_a_download_is_checked_and_cached_and_a_damaged_file_is_loaded_anew(hub, tmp_path, dino_files, monkeypatch):
    host = shutil.copy(dino_files[0] / "backbone.pth", tmp_path / hub.name)
    monkeypatch.setattr(u, "DINO_URL", host.as_uri())
    with pytest.raises(OSError, match="invalid hash"):
        u.load_dino(progress=False)
    assert not list(hub.parent.iterdir())  # neither the file nor a part of it
    monkeypatch.setattr(u, "DINO_SHA256", hashlib.sha256(host.read_bytes()).hexdigest())
    hub.write_bytes(b"")  # as a full disk leaves it
    for _ in range(2):  # downloaded, then from the cache
        torch.testing.assert_close(dict(u.load_dino(progress=False).state_dict()), dino_files[1]["teacher"])
        host.unlink(missing_ok=True)
    hub.write_text("<html>")
    with pytest.raises(OSError, match=f"failed .*; {hub}: cannot be loaded safely"):
        u.load_dino(progress=False)


@pytest.mark.parametrize("wrong", ["a proxy without a port", "nonsense for an answer", "no answer", "a damaged file"])
def test_auto_falls_back_whatever_is_wrong_and_dino_never_does(hub, monkeypatch, caplog, wrong):
    for name in ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    if wrong == "a proxy without a port":
        monkeypatch.setenv("https_proxy", "http://proxy:port")
    else:
        server = socket.create_server(("127.0.0.1", 0))
        monkeypatch.setattr(u, "DINO_URL", f"http://127.0.0.1:{server.getsockname()[1]}/{hub.name}")
        monkeypatch.setattr(u, "DOWNLOAD_TIMEOUT", 5 if wrong == "nonsense for an answer" else 0.3)

    def answer():
        connection, _ = server.accept()
        connection.recv(9999)
        connection.sendall(b"nonsense\r\n\r\n")
        connection.close()

    if wrong == "nonsense for an answer":
        threading.Thread(target=answer, daemon=True).start()
    if wrong == "a damaged file":
        hub.parent.mkdir(parents=True)
        hub.write_bytes(b"")
    assert segment(lesion()[0], backbone="auto", epochs=1).backbone == "builtin"
    assert len(caplog.messages) == 1 and re.fullmatch(".*failed.*--weights FILE.*", caplog.messages[0])  # in one line
    assert (str(hub) in caplog.text) == (wrong == "a damaged file") and "weights_only" not in caplog.text
    monkeypatch.setattr(u, "DOWNLOAD_TIMEOUT", 0.3)
    with pytest.raises(OSError, match=f"from {u.DINO_URL.split('/')[2]} failed"):
        u.load_backbone("dino", None, "teacher", "cpu")
    monkeypatch.setattr(u, "download_dino", lambda *_: pytest.fail("builtin must not try the network"))
    assert u.load_backbone("builtin", None, "teacher", "cpu").name == "builtin"


def test_dino_gets_the_image_normalised_as_for_imagenet(dino_files):
    view = view_of(lesion()[0], (16, 24, 80, 128))
    image = normalize(view.image, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])[None]
    expected = u.load_dino(dino_files[0] / "backbone.pth").keys(image)[0]
    backbone = u.load_backbone("dino", dino_files[0] / "backbone.pth", "teacher", "cpu")
    torch.testing.assert_close(backbone.extract(view), expected)


# Bilateral solver ----------------------------------------------------------------------------------------------


@pytest.fixture
def guide():
    return np.random.default_rng(0).integers(0, 256, (23, 31, 3)).astype(np.uint8) // 3 + lesion(23, 31)[0] // 3


def test_bilateral_solution_against_a_dense_solve(guide):
    rng = np.random.default_rng(1)
    target, confidence = rng.random((23, 31, 2)), 3 * rng.random((23, 31))
    y, x = np.mgrid[:23, :31].reshape(2, -1)
    bt_601 = [[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]]
    luma, blue, red = np.float32(bt_601) @ guide.reshape(-1, 3).astype(np.float32).T
    cells = np.stack([y / 4, x / 4, luma / 9, (blue + 128) / 7, (red + 128) / 7], axis=1).astype(int)
    vertices, vertex = np.unique(cells, axis=0, return_inverse=True)
    blur = 10 * np.eye(len(vertices)) + (cdist(vertices, vertices, "cityblock") == 1)  # [1 2 1] along the five axes
    grid = bilateral.BilateralGrid(guide, 4, 9, 7)
    assert np.array_equal(grid.pixel_vertex, vertex) and np.array_equal(grid.blur.toarray(), blur)

    splat = np.eye(len(blur))[vertex].T  # S: (V,P)
    n, mass = np.ones(len(blur)), splat.sum(1)
    for _ in range(10):
        n = np.sqrt(n * mass / (blur @ n))
    b_hat = n[:, None] * blur * n
    assert np.abs(b_hat.sum(1) - mass).max() / mass.max() < 0.05  # the iteration has all but converged
    system = 12 * (np.diag(b_hat.sum(1)) - b_hat) + np.diag(splat @ confidence.ravel())
    values = np.linalg.solve(system, splat @ (confidence[..., None] * target).reshape(-1, 2))
    cg_kwargs = dict(smoothness=12, iterations=500, tolerance=1e-12)
    both, one = (bilateral.solve(x, guide, confidence, 4, 9, 7, **cg_kwargs) for x in (target, target[..., 1]))
    np.testing.assert_allclose(both, values[vertex].reshape(23, 31, 2), atol=1e-8)
    np.testing.assert_array_equal(both[..., 1], one)


def test_bilateral_keys_do_not_collide_at_the_largest_sizes():
    guide = np.zeros((2, 70_000, 3), np.uint8)
    guide[0, :, 0], guide[1, :, 2] = 255, 255
    assert bilateral.BilateralGrid(guide, 1, 1, 1).vertices == 140_000
    assert bilateral.BilateralGrid(guide, 70_000, 1, 1).vertices == 2


def test_bilateral_keeps_constants_follows_edges_and_takes_zero_confidence(guide):
    np.testing.assert_allclose(bilateral.solve(np.full((23, 31), 0.7), guide), 0.7, atol=1e-6)
    target = np.random.default_rng(0).random((23, 31))
    for image in guide, guide * 0:
        np.testing.assert_allclose(bilateral.solve(target, image, confidence=0), target.mean(), atol=1e-9)
    rgb, truth = lesion()
    known = np.random.default_rng(0).random(truth.shape) < 0.1  # one pixel in ten is enough
    filled = bilateral.solve(np.where(known, truth, 0.5), rgb, confidence=known * 0.99, smoothness=1)
    assert iou(filled > 0.5, truth) > 0.9


@pytest.mark.parametrize(
    "change, says",
    [(dict(target=np.zeros((3, 3))), "same height"), (dict(target=np.full((23, 31), np.nan)), "finite"),
     (dict(confidence=-0.5), "confidence"), (dict(confidence=np.inf), "confidence"),
     (dict(confidence=np.nan), "confidence"), (dict(sigma_luma=0), "sigma_luma"), (dict(smoothness=-1), "smoothness"),
     (dict(guide=np.zeros((23, 31), np.uint8)), "guide"), (dict(confidence=1e-200), "1e100 times"),
     (dict(target=np.where(np.eye(23, 31) > 0, 1e308, -1e308)), "scale them down"),
     (dict(target=np.ma.zeros((23, 31))), "masked arrays"),
     (dict(confidence=np.ma.zeros((23, 31))), "masked arrays"),
     (dict(guide=np.zeros((23, 31, 3))), "guide"), (dict(sigma_spatial=1e-9, sigma_luma=1e-4), "larger sigmas"),
     (dict(sigma_luma=5e-4, sigma_chroma=5e-4, sigma_spatial=1e-4), "larger sigmas")],
    ids=str,
)  # fmt: skip
def test_bilateral_refuses_what_makes_no_sense(guide, change, says):
    with pytest.raises(ValueError, match=says):
        bilateral.solve(**dict(target=np.zeros((23, 31)), guide=guide) | change)


@pytest.mark.parametrize("unit", [1e-300, 1e-160, 1e160, 1e300])
def test_bilateral_solution_does_not_depend_on_the_unit(guide, unit):
    target, confidence = np.random.default_rng(0).random((23, 31)), np.random.default_rng(1).random((23, 31))
    usual = bilateral.solve(target, guide, confidence, smoothness=2)
    np.testing.assert_allclose(bilateral.solve(target * unit, guide, confidence, smoothness=2) / unit, usual, atol=1e-6)
    scaled = bilateral.solve(target, guide, confidence * unit, smoothness=2 * unit)
    np.testing.assert_allclose(scaled, usual, atol=1e-6)


def test_bilateral_needs_no_torch():
    script = "import sys; sys.modules['torch'] = None; import bilateral"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=HERE)


# Images, and from assignment to mask ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, mode, tolerance",
    [("g.png", "L", 1), ("ga.png", "LA", 1), ("p.png", "P", 60), ("a.png", "RGBA", 1), ("c.jpg", "CMYK", 6),
     ("16.png", "I;16", 1), ("16.tif", "I;16", 1), ("t.tif", "RGB", 1), ("b.bmp", "RGB", 1), ("f.tif", "F", 1),
     ("1.png", "1", 128)],
)  # fmt: skip
def test_every_kind_of_image_is_read_as_rgb(tmp_path, name, mode, tolerance):
    grey = np.linspace(0, 255, 40 * 30).reshape(30, 40)
    pixels = (100 + 15 * grey).astype(np.uint16) if mode == "I;16" else grey.astype(np.uint8)  # a 12-bit camera's
    Image.fromarray(pixels).convert(mode, dither=Image.Dither.NONE).save(tmp_path / name)
    rgb = u.load_image(tmp_path / name)
    assert rgb.shape == (30, 40, 3) and rgb.dtype == np.uint8
    assert np.abs(rgb - grey[..., None]).max() <= tolerance and rgb.max() >= 254


def test_transparency_is_laid_on_white_and_arrays_are_images_too():
    assert (u.load_image(Image.new("RGBA", (20, 10), (255, 0, 0, 0))) == 255).all()
    with pytest.raises(u.ImageError, match="uint8"):
        u.load_image(lesion()[0] / 255)


@pytest.mark.parametrize("exif, turned", [
    (b"Exif\0\0II", 0), (b"Exif\0\0nonsense", 0), (b"Exif\0\0" + bytes(30), 0),
    (b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0", -1),
    # the same, before a tag whose value lies outside of the file
    (b"Exif\0\0II*\0\x08\0\0\0\x02\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0"
     b"\x32\x01\x02\0\xff\xff\0\0\xff\xff\xff\0\0\0\0\0", -1),
], ids=["cut", "nonsense", "zeros", "sound", "a broken tag"])  # fmt: skip
def test_broken_exif_leaves_the_pixels_and_a_readable_orientation_counts(tmp_path, exif, turned):
    rgb, truth = lesion(64, 96)
    Image.fromarray(rgb).save(tmp_path / "a.png", exif=exif)
    Image.fromarray(truth).save(tmp_path / "mask.png", exif=exif)
    assert np.array_equal(u.load_image(tmp_path / "a.png"), np.rot90(rgb, turned))
    truth = np.rot90(truth, turned)
    assert np.array_equal(evaluator.load_mask(tmp_path / "mask.png", truth.shape), truth)


@pytest.mark.parametrize("stride", [8, 4, 2])
def test_resize_keeps_the_aspect_and_upsample_puts_every_patch_back_at_its_centre(stride):
    s, t = 64, 96
    rgb = np.zeros((2 * s, 2 * t, 3), np.uint8)
    h, w = u.patch_grid((s, t), stride)
    assert u.resize_image(rgb, s, stride).shape == (3, s, t)
    assert F.unfold(torch.zeros(1, 1, s, t), 8, stride=stride).shape[2] == h * w and (t - s) // stride == w - h
    with pytest.raises(u.ImageError, match="patches"):
        u.resize_image(np.zeros((8, 20_000, 3), np.uint8), 224, stride)
    centres = np.mgrid[:h, :w].transpose(1, 2, 0) * stride + 4.0  # in the resized image
    values = u.upsample(torch.from_numpy(centres).float(), stride)
    expected = np.mgrid[:s, :t].transpose(1, 2, 0) + 0.5  # a linear ramp stays one
    assert values.shape == (s, t, 2)
    np.testing.assert_allclose(values[4:-4, 4:-4], expected[4:-4, 4:-4], rtol=1e-5)


def test_clean_mask_fills_holes_and_keeps_the_largest_pieces_not_the_background():
    mask = np.zeros((12, 12), bool)
    mask[1:11, 1:9] = True  # larger than the background
    mask[4:6, 4:6] = False
    mask[2:4, 10:12] = mask[8, 11] = True
    assert [u.clean_mask(mask, components).sum() for components in (1, 2, 0)] == [80, 84, 85]
    assert not u.clean_mask(np.zeros((4, 4), bool), 1).any()


@pytest.mark.parametrize("blur, similarity_weight", [(0.0, 0.0), (3.0, 0.0), (0.0, 16.0)])
def test_the_soft_mask_is_the_solution_of_the_bilateral_solver_blurred(blur, similarity_weight):
    rgb = lesion(96, 96)[0]
    view = view_of(rgb, ellipse=(48.0, 43.0, 27.0, 24.0))
    x = (view.inside_ellipse() + torch.rand(12, 12)) / 2
    assignment = torch.stack([1 - x, x], dim=2).flatten(0, 1)
    settings = [dict(refine=False, mask_blur=0.0), dict(bilateral_lambda=5, mask_blur=blur)]
    raw, soft = (u.make_mask(view, assignment, torch.eye(144), torch.ones(144),
                             u.Config(similarity_weight=similarity_weight, **s), (96, 96))["probability"]
                 for s in settings)  # fmt: skip
    confidence = 2 * np.abs(np.log(raw / (1 - raw))) if similarity_weight else 0.999
    expected = ndimage.gaussian_filter(bilateral.solve(raw, rgb, confidence, smoothness=5), blur)
    np.testing.assert_allclose(soft, expected.clip(0, 1), atol=1e-6)


@GPU
def test_masks_and_losses_on_cuda_where_steps_are_captured_agree_with_the_cpu():
    rgb, config = lesion()[0], u.Config(size=96)
    cpu, cuda = (u.segment(rgb, config, backbone="builtin", device=device) for device in ("cpu", "cuda"))
    assert iou(cpu.mask, cuda.mask) > 0.98
    np.testing.assert_allclose(cpu.losses[:9], cuda.losses[:9], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("size, stride, grid", [(96, 8, (12, 16)), (64, 4, (15, 21))])
def test_segment_finds_the_lesion_and_inverts_on_request(size, stride, grid):
    rgb, truth = lesion()
    result, inverse = (segment(rgb, size=size, stride=stride, invert=invert) for invert in (False, True))
    assert result.mask.shape == result.probability.shape == result.labels.shape == truth.shape
    assert (result.mask.dtype, result.probability.dtype, result.labels.dtype) == (bool, np.float32, np.uint8)
    assert iou(result.mask, truth) > 0.9 and result.modularity > 0.01 and result.backbone == "builtin"
    assert result.probability[truth].mean() > 0.8 and result.probability[~truth].mean() < 0.1
    again = segment(Image.fromarray(rgb), size=size, stride=stride)
    assert np.array_equal(result.probability, again.probability) and result.view.grid == grid
    assert np.array_equal(inverse.mask, ~result.mask) and np.array_equal(inverse.labels, 1 - result.labels)
    assert np.array_equal(inverse.probability, 1 - result.probability)


@pytest.mark.parametrize("clusters", [4, 20])
def test_of_more_clusters_the_last_labels_are_the_mask_and_the_map_is_read_back_as_written(clusters, tmp_path, photo):
    flags = ["--clusters", str(clusters), "--labels", "--keep-components", "0", "--size", "96"]
    assert u.main([str(photo), "-o", str(tmp_path / "mask.png"), *QUICK, *flags]) == 0
    result = segment(photo, size=96, clusters=clusters, keep_components=0, epochs=40)
    written = Image.open(tmp_path / "mask_labels.png")
    assert np.array_equal(np.array(written), result.labels) and len(written.getpalette()) == 768
    assert result.labels.max() < clusters and result.assignment.shape == (12, 16, clusters)
    assert iou(result.mask, lesion()[1]) > 0.8
    assert set(np.unique(result.labels[result.mask])).isdisjoint(np.unique(result.labels[~result.mask]))


def test_of_two_lesions_one_is_found_or_both_or_the_one_pointed_at_or_boxed():
    rgb, truth = lesion()
    both, mirrored = np.concatenate([rgb, rgb[:, ::-1]], axis=1), truth[:, ::-1]
    assert ndimage.label(segment(both).mask)[1] == 1
    two = segment(both, keep_components=2, fade_radii=5).mask
    assert iou(two, np.concatenate([truth, mirrored], axis=1)) > 0.8
    left, right = (segment(both, point=(x, 48)).mask for x in (58, 198))
    assert iou(left[:, :128], truth) > 0.85 and not left[:, 128:].any()
    assert iou(right[:, 128:], mirrored) > 0.85 and not right[:, :128].any()
    box = x0, y0, x1, y1 = Image.fromarray(truth).getbbox()
    boxed = segment(both, box=box)
    assert iou(boxed.mask[:, :128], truth) > 0.9 and not boxed.mask[:, 128:].any()
    boxed.probability[y0:y1, x0:x1] = boxed.labels[y0:y1, x0:x1] = 0
    assert not boxed.probability.any() and not boxed.labels.any()  # nothing outside
    assert segment(rgb, epochs=2, box=(60, 50, 61, 51)).mask.sum() <= 1
    assert segment(np.tile(rgb, (3, 9, 1)), epochs=2, box=(10, 99, 1110, 103)).view.grid[1] < 40  # no strip of patches


@pytest.mark.parametrize("prompt, radius", [("box", 1.1), ("point", 1.4), ("", 1.6)])
def test_a_patch_is_judged_by_its_mean_similarity_to_object_and_background_and_by_its_position(prompt, radius):
    view = view_of(np.zeros((80, 80, 3), np.uint8), ellipse=(40.0, 40.0, 20.0, 20.0), prompt=prompt)
    f, weights, x = F.normalize(torch.randn(100, 4), dim=1), torch.rand(100) + 0.1, torch.rand(100)
    weights[7] = 0  # a node without edges
    x = (x + view.inside_ellipse().flatten()) / 2
    adjacency, config = u.build_graph(f, 0.3, weights), u.Config(similarity_weight=3)
    expected = torch.zeros(100)
    for i in range(100):
        similar = torch.stack([f[i] @ f[j] if f[i] @ f[j] > 0.3 else torch.tensor(0.0) for j in range(100)])
        inside, outside = (np.average(similar, weights=weights * c) for c in (x, 1 - x))
        prior = u.POSITION_PRIOR[prompt][0] * max(-1, 1 - view.distance_in_radii().flatten()[i] / radius)
        odds = (inside / outside) ** 3
        expected[i] = float(1 / (1 + math.exp(-prior) / (odds if (odds > 1) == (x[i] > 0.5) else 1)))
    order, background = u.order_clusters(view, torch.stack([x, 1 - x], dim=1), weights)
    assert background == 1 and torch.equal(order[:, 1], x)
    foreground = u.select_foreground(view, order, background, adjacency, weights, config)
    torch.testing.assert_close(foreground, expected * (weights > 0), rtol=1e-4, atol=1e-6)
    plain = u.Config(similarity_weight=0)
    assert torch.equal(u.select_foreground(view, order, background, adjacency, weights, plain), x * (weights > 0))
    config = u.Config(refine=False, mask_blur=0.0)  # where all patches are alike the prior decides
    alike = u.make_mask(view, order, torch.ones(100, 100), torch.ones(100), config, (80, 80))["mask"]
    assert iou(alike, disc(39.5, 39.5, 20 * radius, 80, 80)) > 0.9


def test_patches_out_of_the_field_of_view_have_no_say_in_what_is_foreground():
    view = view_of(np.zeros((160, 160, 3), np.uint8), ellipse=(80.0, 40.0, 30.0, 30.0))
    view.field_of_view[:, 5:] = 0  # half of the ellipse lies outside of it
    share = torch.where(view.inside_ellipse() > 0, 0.6, 0.3)
    for frame in 0.0, 1.0:
        x = torch.where(view.field_of_view > 0, share, frame).flatten()
        order, background = u.order_clusters(view, torch.stack([1 - x, x], dim=1), u.weigh_nodes(view, 0))
        assert background == 1 and torch.equal(order[:, 1], x)


@pytest.mark.parametrize("prompt", [
    dict(point=(128, 5)), dict(point=(-1, 5)), dict(point=(math.nan, 5)), dict(point="5,5"), dict(point=()),
    dict(point=(5,)), dict(point=[(5, 5), (9, 9)]), dict(point=("5", "5")), dict(point=5), dict(point={1: 2}),
    dict(point=(5, 5), box=(0, 0, 50, 50)), dict(box=(5, 5, 5, 9)), dict(box=(0, 0, 200, 50)), dict(box="0,0,50,50"),
    dict(box=[]), dict(box=(0, 0, 50)), dict(box=[(0, 0, 50, 50)]), dict(box=((0, 0), (50, 50))),
    dict(box=(0, 0, (50,), 50)), dict(box=(0, 0, None, 50))], ids=str)  # fmt: skip
def test_a_prompt_that_cannot_be_is_refused_in_one_line(prompt):
    with pytest.raises(ValueError, match="inside the image, 128 x 96; got|a box and a point are given") as error:
        segment(lesion()[0], **prompt)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", [np.int16, np.uint8, torch.tensor, list])
def test_a_box_may_be_any_four_numbers(kind):
    corners = (20, 12, 96, 84)
    found, expected = (segment(lesion()[0], box=box, epochs=2).probability for box in (kind(corners), corners))
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("loosen", [1, 1.25, 1.5, 2, 9])
def test_a_loose_box_is_as_good_as_none(loosen):
    rgb, truth = lesion()
    box = evaluator.inexact(Image.fromarray(truth).getbbox(), loosen, 0, truth.shape, 0)
    assert iou(segment(rgb, box=box, size=96).mask, truth) > 0.9


@contextlib.contextmanager
def float64_by_default():
    """float64 as torch's default type, as a caller may have set it; it must be left as it was."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("caller", [torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16),
                                    torch.device("meta"), float64_by_default()], ids=type)  # fmt: skip
def test_a_mask_does_not_depend_on_the_torch_of_the_caller(dino_files, caller):
    rgb, weights, masks = lesion()[0], dino_files[0] / "backbone.pth", []
    nodes = communities()[0], torch.ones(40)
    for context in (contextlib.nullcontext(), caller):
        u.load_backbone.cache_clear()
        with context:
            dino = u.segment(rgb, u.Config(size=64), backbone="dino", weights=weights, device="cpu")
            colour = segment(rgb), segment(rgb, shared_epochs=2, point=(58, 48))
            shared = u.fit_collective([nodes], u.Config(shared_epochs=2))["fc_out.weight"]
            masks.append([shared, *(result.probability for result in (dino, *colour))])
    u.load_backbone.cache_clear()
    assert all(map(np.array_equal, *masks))


def test_threads_of_a_caller_with_another_default_type_agree_and_leave_it_as_it_was():
    expected = segment(lesion()[0]).probability
    with float64_by_default(), ThreadPoolExecutor(3) as pool:
        for found in pool.map(lambda _: segment(lesion()[0]).probability, range(6)):
            assert np.array_equal(found, expected)


@pytest.mark.parametrize("ground", [120, 230])
def test_a_faint_object_on_bright_even_ground_is_found(ground):
    skin, truth = np.full((96, 128, 1), ground), disc(50, 60, 20, 96, 128)
    rgb = (skin - 10 * truth[..., None] + np.random.default_rng(0).normal(0, 1, (96, 128, 3))).astype(np.uint8)
    assert iou(segment(rgb, size=96, box=(38, 28, 82, 72)).mask, truth) > 0.9


@pytest.mark.parametrize("height, width", [(8, 8), (9, 40), (16, 12)])
def test_the_smallest_images_are_segmented_too(height, width):
    for point in (None, (width - 1, 0)):
        assert segment(lesion(height, width)[0], point=point).mask.shape == (height, width)
    tiny = [torch.rand(5, 3, 4)], torch.ones(3, 4), (0, 0, 3, 4)  # in which no ring has a cell
    assert u.find_disc(*tiny, (2.0, 3.0))[:2] == (2, 3)


def test_a_backbone_of_ones_own_is_used_beside_the_colour_and_a_fit_without_communities_is_reported(caplog):
    rgb, hidden = lesion()[0], disc(40, 90, 20, 96, 128)  # which the colours do not show

    def extract(view):
        y, x = view.centres()
        return torch.eye(2)[hidden[y.long(), x.long()].flatten().astype(int)] + 0.1

    for image, colour in (rgb, 0), (np.full_like(rgb, 200), 0.7), (np.full_like(rgb, 128), 0.7):  # without any contrast
        result = segment(image, u.Backbone("hidden", extract), size=96, refine=False, colour=colour)
        assert iou(result.mask, hidden) > 0.7 and result.backbone == "hidden" and not caplog.messages
    for number, box in enumerate([None, (20, 20, 90, 80)], 1):
        alike = u.Backbone("alike", lambda view: torch.ones(math.prod(view.grid), 5))
        alike = segment(rgb, alike, box=box, colour=0)
        assert abs(alike.modularity) < 1e-3 and len(caplog.messages) == number and "no communities" in caplog.text
        assert not alike.mask.any() and not alike.labels.any() and (alike.assignment == 0.5).all()


BACKBONE = """
import torch
import torch.nn.functional as F

def extract(view):
    h, w = view.grid
    values = F.unfold(view.image[None], 8, stride=view.stride)[0].T
    {line}
"""


DATACLASS = "from __future__ import annotations\nimport dataclasses\n@dataclasses.dataclass\nclass A:\n    x: int\n"


@pytest.mark.parametrize(
    "text, code, says",
    [(BACKBONE.format(line="return values[1:]"), 1, r"must return features \(88,C\) for 8 x 11 .*, got \(87, 192\)"),
     (BACKBONE.format(line="return values.T.unflatten(1, (h, w))"), 1, r"got \(192, 8, 11\)"),
     (BACKBONE.format(line="return values * float('nan')"), 1, "not finite"),
     (BACKBONE.format(line="return values.numpy()"), 1, "must return a torch tensor, got ndarray"),
     (BACKBONE.format(line="return values[view.no_such]"), 1, "extract failed: AttributeError: .*no_such"),
     (f"{DATACLASS}{BACKBONE.format(line='view.image.zero_(); return values')}", 0, None),  # a copy of the image
     (BACKBONE.format(line="raise SystemExit"), 1, "extract failed: SystemExit"),
     ("raise SystemExit", 2, "SystemExit"),
     ("import no_such_module", 2, "ModuleNotFoundError: No module named 'no_such_module'"),
     ("x = 1", 2, r"must define a function extract\(view\)"),
     (None, 2, "there is no such file")],
)  # fmt: skip
def test_a_backbone_from_a_python_file_and_the_message_for_a_bad_one(tmp_path, photo, caplog, capsys, text, code, says):
    file = tmp_path / "my_backbone.py"
    if text is not None:
        file.write_text(text)
    out = tmp_path / "mask.png"
    assert u.main([str(photo), "-o", str(out), *QUICK[:-2], "--backbone", str(file), "--device", "cpu"]) == code
    if code:
        assert len(caplog.messages) == 1 and re.search(f"backbone .*my_backbone.py: .*{says}", caplog.messages[0])
        assert "\n" not in caplog.messages[0] and not out.exists()
    else:
        assert iou(np.array(Image.open(out)) > 0, lesion()[1]) > 0.8 and "my_backbone.py" in capsys.readouterr().out


# README and command line ---------------------------------------------------------------------------------------


def test_the_python_of_the_readme_runs_and_its_flags_exist(tmp_path, monkeypatch):
    text = (HERE / "README.md").read_text()
    in_python, backbone_file = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Path("assets").symlink_to(HERE / "assets")
    monkeypatch.setattr(u, "load_backbone", lambda name: u.Backbone(name, None))  # without the network
    exec(in_python, names := {})
    image, result = Image.open("assets/image.png"), names["result"]
    assert result.mask.shape == result.labels.shape == image.size[::-1] == Image.open("overlay.png").size[::-1]
    monkeypatch.undo()
    (tmp_path / "resnet.py").write_text(backbone_file.replace('weights="DEFAULT"', ""))  # random ones
    result = segment(lesion()[0], backbone=str(tmp_path / "resnet.py"), epochs=5)
    assert result.features.shape == (math.prod(result.view.grid), 1024 + 4)
    flags = {flag for parser in (u.build_parser(), evaluator.build_parser()) for flag in parser._option_string_actions}
    assert {*re.findall(r"--[a-z][a-z0-9-]+", text)} <= flags | {"--nproc-per-node"}


def test_all_outputs_of_a_folder_with_failures_listed_and_skipped_on_the_second_run(folder, tmp_path, caplog, capsys):
    (folder / "notes.txt").write_text("not an image, and not tried")
    for name in ("a.dcm", "b.dcm", "photo.heic", ".hidden"):
        (folder / name).touch()
    (folder / "more").mkdir()
    out, extras = tmp_path / "out", ["--probability", "--labels", "--overlay", "--explain", "--box", "20,12,96,84"]
    arguments = [str(folder), "-o", str(out), *QUICK, *extras, "--shared-epochs", "3"]
    assert u.main([*arguments, "--quiet"]) == 1
    names = {f"{s}{kind}.png" for s in "0123" for kind in ("", "_probability", "_labels", "_overlay", "_explain")}
    assert {p.name for p in out.iterdir()} == names and capsys.readouterr().out == ""
    skipped = "5 entries are skipped, as they are not images that are read here: 2 .dcm, 1 .heic, 1 .txt, 1 folder"
    assert caplog.messages[0] == f"{folder}: {skipped}"
    assert "2b.png" in caplog.messages[1] and caplog.messages[-1].startswith("1 failed")
    for name in "0123":
        assert iou(np.array(Image.open(out / f"{name}.png")) > 0, lesion()[1]) > 0.9
    assert Image.open(out / "0_overlay.png").size == Image.open(out / "0_labels.png").size == (128, 96)
    (out / "1.png").unlink()
    before = {p: p.stat().st_mtime_ns for p in out.iterdir()}
    assert u.main([*arguments, "--skip-existing"]) == 1
    assert {p.name for p in out.iterdir() if before.get(p) != p.stat().st_mtime_ns} == {n for n in names if n[0] == "1"}
    (folder / "2b.png").unlink()
    capsys.readouterr()
    assert u.main([*arguments, "--skip-existing"]) == 0
    assert capsys.readouterr().out == "4 of 4 images are skipped, as their outputs exist\n"


@pytest.fixture
def folder(tmp_path):
    """Four photographs and a broken file."""
    (tmp_path / "in").mkdir()
    for seed, name in enumerate(["0.png", "1.png", "2.JPG", "3.jfif"]):
        Image.fromarray(lesion(seed=seed)[0]).save(tmp_path / "in" / name, quality=95)
    (tmp_path / "in" / "2b.png").write_text("broken")
    return tmp_path / "in"


def contents(path):
    return {p.name: p.read_bytes() for p in path.iterdir()}


def test_an_interrupt_leaves_whole_files_and_skip_existing_goes_on(tmp_path, request):
    images, out = [tmp_path / f"{n:02}.png" for n in range(9)], tmp_path / "out"
    for seed in [0, *range(3, 9)]:
        Image.fromarray(lesion(seed=seed)[0]).save(images[seed])
    for image in images[1:3]:
        os.mkfifo(image)  # both workers wait for what never comes
    command = [sys.executable, HERE / "unsegmedgat.py", *images, "-o", out, *QUICK, "--workers", "2"]
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a background shell would have it ignored
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    request.addfinalizer(process.kill)
    assert process.stdout.readline().startswith("[1/9]")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 130
    assert errors == "ERROR: interrupted; the outputs that exist are whole, and --skip-existing continues from here\n"
    before = contents(out)
    assert 0 < len(before) < 9 and all(Image.open(path).load() for path in out.iterdir())
    for image in images[1:3]:
        image.unlink()
        Image.fromarray(lesion()[0]).save(image)
    assert u.main([*map(str, command[2:]), "--skip-existing", "--quiet", "--workers", "1"]) == 0
    assert len(contents(out)) == 9 and before.items() <= contents(out).items()


def torchrun(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)


def test_outputs_do_not_depend_on_the_workers_or_torchruns_processes(folder, tmp_path, capsys, monkeypatch):
    arguments, printed, threads = [str(folder), *QUICK, "--shared-epochs", "2", "--probability"], [], set()
    monkeypatch.setattr(u, "fit", lambda *args, fit=u.fit: threads.add(torch.get_num_threads()) or fit(*args))
    torch.set_num_threads(2)
    for workers in "1", "2":
        assert u.main([*arguments, "-o", str(tmp_path / workers), "--workers", workers]) == 1
        printed.append([line.split(" -> ")[0] for line in capsys.readouterr().out.splitlines()])
    assert threads == {1} and torch.get_num_threads() == 2  # as in a worker; the caller's are restored
    torch.set_num_threads(1)
    names = {1: "0.png", 2: "1.png", 3: "2.JPG", 5: "3.jfif"}
    assert printed[0] == printed[1] == [f"[{n}/5] {folder}/{name}" for n, name in names.items()]
    done = torchrun(HERE / "unsegmedgat.py", *arguments, "-o", tmp_path / "ranks")
    assert done.returncode == 1 and "1 failed: " in done.stderr and len(done.stdout.splitlines()) == 4
    one, two, ranks = (contents(tmp_path / name) for name in ("1", "2", "ranks"))
    assert one == two == ranks and len(one) == 8


def test_a_worker_that_the_system_kills_ends_the_run_with_advice():
    with pytest.raises(OSError, match="worker processes failed.* fewer --workers"):
        [*u.map_in_workers(2, os._exit, [1])]


FRAMES = [Image.new("L", (9, 9), grey) for grey in (0, 99)]
BAD_IMAGES = {  # how it is made, and the message
    "missing": (lambda path: None, "No such file"),
    "empty": (lambda path: path.touch(), "not one that Pillow reads"),
    "truncated": (lambda path: (Image.fromarray(lesion()[0]).save(path), os.truncate(path, 3000)), "or incomplete"),
    "DICOM": (lambda path: path.write_bytes(bytes(128) + b"DICM"), "not one that Pillow reads"),
    "HEIC": (lambda path: path.write_bytes(b"\0\0\0\x18ftypheic"), "not one that Pillow reads"),
    "dangling": (lambda path: path.symlink_to("nowhere"), "No such file"),
    "a loop": (lambda path: path.symlink_to(path.name), "bad.png: "),  # what the system says of it differs
    "animated": (lambda path: FRAMES[0].save(path, "GIF", save_all=True, append_images=FRAMES[1:]), "2 frames"),
    "1 x 5000": (lambda path: Image.new("RGB", (1, 5000)).save(path), "1 x 5000 pixels"),
    "large": (lambda path: path.write_text("P4 15000 11000 "), "15000 x 11000 pixels are too many"),  # only a header
    "bomb": (lambda path: path.write_text("P4 40000 40000 "), "too many"),  # so large that Pillow refuses it
    "a folder of none": (lambda path: path.mkdir(), "no image in this folder"),
}


@pytest.mark.parametrize("write, says", BAD_IMAGES.values(), ids=BAD_IMAGES)
def test_bad_images_end_in_one_clear_line_and_no_output(tmp_path, caplog, write, says):
    path = tmp_path / "bad.png"
    write(path)
    assert u.main([str(path), "-o", str(tmp_path / "mask.png"), *QUICK]) == (2 if path.is_dir() else 1)
    assert len(caplog.messages) == 1 and "bad.png" in caplog.messages[0] and says in caplog.messages[0]
    assert "\n" not in caplog.messages[0] and [p for p in tmp_path.iterdir() if p != path] == []


@pytest.mark.parametrize("name", ["flat.png", "flat.jpg"])  # a JPEG of one colour and noise has a level or two more
def test_a_constant_image_gets_an_empty_mask_and_a_word(tmp_path, caplog, name):
    noise = np.random.default_rng(0).integers(0, 2 if name == "flat.jpg" else 1, (48, 64, 3), np.uint8)
    Image.fromarray(np.uint8([200, 150, 140]) + noise).save(tmp_path / name)
    arguments = [str(tmp_path / name), "-o", str(tmp_path / "mask.png"), *QUICK, "--clusters", "3", "--invert"]
    assert u.main([*arguments, "--explain", "--overlay", "--labels", "--probability"]) == 0
    assert len(caplog.messages) == 1 and f"{name}: no communities" in caplog.text
    for kind in ("", "_labels", "_probability"):
        assert not np.array(Image.open(tmp_path / f"mask{kind}.png")).any()


@pytest.mark.parametrize(
    "arguments, says",
    [("{photo} -o {dir}/mask.jpg", "ends in .png"), ("{photo} -o {dir}/mask.npy", "ends in .png"),
     ("{photo} -o {dir}/nowhere/mask.png", "no such folder"), ("{photo} -o {photo}", "it is an input"),
     ("{photo} {dir}/photo.jpg -o {dir}/out", "but it is written for"), ("{photo} {dir} -o {photo}", "need a folder"),
     ("{dir} -o {dir}/mask.png", "need a folder"), ("{dir} -o {dir}/.", "holds input images"),
     ("{photo} -o {dir}", "holds input images"), ("{one} --heads 3", "widths"),
     ("{one} --point 9,9 --point 12,12", "--point is given 2 times"), ("{one} --box 1,2", "--box needs 4 integers"),
     ("{one} --box 1,1,9,9 --box 1,1,9,9", "--box is given 2 times"), ("{one} --no-such", "arguments: --no-such"),
     ("{one} --point 9,9 --box 1,1,9,9", "not allowed with argument"), ("{one} --workers -1", "must be at least 0"),
     ("{one} --backbone builtin --weights x.pth", "dino backbone"), ("{one} --backbone resnet", "FILE.py, got resnet"),
     pytest.param("{one} --device cuda", "device cuda is not available", marks=NO_GPU),
     *[(f"{{one}} {flags}", f"argument {flags.split()[0]}: ")  # as argparse says it
       for flags in ("--widths a", "--epochs x", "--stride 3", "--point nan,1", "--preset x")]],
)  # fmt: skip
def test_wrong_use_is_refused_in_one_line_before_anything_is_written(tmp_path, photo, caplog, capsys, arguments, says):
    content = photo.read_bytes()
    try:
        code = u.main(arguments.format(photo=photo, dir=tmp_path, one=f"{photo} -o {tmp_path}/mask.png").split())
    except SystemExit as stop:  # argparse's
        code = stop.code
    messages = caplog.messages or capsys.readouterr().err.splitlines()[-1:]
    assert code == 2 and len(messages) == 1 and says in messages[0] and "\n" not in messages[0]
    assert photo.read_bytes() == content and [*tmp_path.iterdir()] == [photo]


def test_a_file_name_that_the_terminal_has_no_letters_for_is_told_all_the_same(tmp_path, photo, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    assert u.main([str(photo.rename(tmp_path / "\u03b1.png")), "-o", str(tmp_path / "mask.png"), *QUICK]) == 0
    sys.stdout.flush()
    assert b"\\u03b1.png -> " in sys.stdout.buffer.getvalue()


def test_two_writers_of_one_output_do_not_share_a_part_and_stale_parts_are_removed(tmp_path, photo):
    longest = tmp_path / ("x" * 251 + ".png")
    with u.atomic_write(longest) as one, u.atomic_write(longest) as two:
        one.write_text("one")
        two.write_text("two")
        assert one != two
    assert longest.read_text() == "one"  # the last to end; either is whole
    out = tmp_path / "out"
    out.mkdir()
    parts = [out / f".{n * 32}.part" for n in "ab"]
    for part in [*parts, out / ".mine.part"]:
        part.touch()
    for old in (parts[0], out / ".mine.part"):
        os.utime(old, (1, 1))
    assert u.main([str(photo), "-o", str(out), *QUICK]) == 0
    assert {p.name for p in out.iterdir()} == {"photo.png", parts[1].name, ".mine.part"}  # another run may be writing


def test_all_images_are_done_though_nobody_reads_the_output(folder, tmp_path):
    (folder / "2b.png").unlink()
    command = [sys.executable, str(HERE / "unsegmedgat.py"), str(folder), "-o", str(tmp_path / "out"), *QUICK]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()  # as `| head -0`
    assert process.stderr.read() == b"" and process.wait(timeout=100) == 0
    process.stderr.close()
    assert len(contents(tmp_path / "out")) == 4


def test_dino_is_used_and_torch_may_lack_distributed(photo, tmp_path, dino_files, monkeypatch, capsys):
    monkeypatch.setattr(u.distributed, "is_available", lambda: False)
    monkeypatch.delattr(u.distributed, "is_initialized")
    flags = "--size 64 --stride 4 --epochs 5 --verbose --weights".split()
    assert u.main([str(photo), "-o", str(tmp_path / "mask.png"), *flags, str(dino_files[0] / "full.pth")]) == 0
    assert re.search(r"modularity 0\.\d{3}, backbone dino, .*, mask 0\.", capsys.readouterr().out)
    mask = Image.open(tmp_path / "mask.png")
    assert mask.mode == "L" and mask.size == (128, 96) and set(np.unique(mask)) <= {0, 255}


def test_an_output_that_cannot_be_written_leaves_the_old_one_whole(tmp_path, photo, monkeypatch, caplog):
    def fail_half_way(self, path, **_):
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    out = tmp_path / "mask.png"
    out.write_bytes(b"an earlier result")
    monkeypatch.setattr(Image.Image, "save", fail_half_way)
    assert u.main([str(photo), "-o", str(out), *QUICK]) == 1
    assert out.read_bytes() == b"an earlier result" and sorted(tmp_path.iterdir()) == [out, photo]
    assert "No space left" in caplog.messages[0]


# Evaluator -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_metrics_against_brute_force(seed):
    noise = np.random.default_rng(seed).random((14, 17)) < 0.1
    mask, truth = disc(6, 7, 4, 14, 17) ^ noise, disc(7, 9, 4.5, 14, 17)  # which overlap in part

    def border(m):  # pixels of the mask with a 4-neighbour outside it, or outside the image
        p = np.pad(m, 1)
        return np.argwhere(m & ~(p[1:-1, :-2] & p[1:-1, 2:] & p[:-2, 1:-1] & p[2:, 1:-1]))

    between = cdist(border(mask), border(truth))
    distances = np.concatenate([between.min(0), between.min(1)])
    both, either = (mask & truth).sum(), (mask | truth).sum()
    expected = {
        "iou": both / either,
        "dice": 2 * both / (both + either),
        "precision": both / mask.sum(),
        "recall": both / truth.sum(),
        "hd95": np.percentile(distances, 95) / math.hypot(14, 17) * 100,
        "nsd": (distances <= 1.5).mean(),
    }
    assert evaluator.metrics(mask, truth, tolerance="1.5px") == pytest.approx(expected)
    empty, perfect = mask & False, dict.fromkeys(expected, 1) | {"hd95": 0}
    assert evaluator.metrics(empty, truth) == dict.fromkeys(expected, 0) | {"hd95": 100}
    assert evaluator.metrics(empty, empty) == evaluator.metrics(truth, truth) == perfect


def test_bootstrap_interval_covers_the_mean_and_resamples_whole_groups():
    values = np.random.default_rng(0).normal(0.7, 0.1, 400)
    low, high = evaluator.bootstrap_interval(values)
    assert low < values.mean() < high and math.isclose((high - low) / 2, 1.96 * 0.1 / 20, rel_tol=0.15)
    doubled = np.repeat(values, 2)  # frames of one sequence, all the same: no more certain than the sequences
    assert evaluator.bootstrap_interval(doubled, np.repeat(np.arange(400), 2)) == pytest.approx((low, high))
    for single in (values[:1],), (values[:2], ["a", "a"]):
        assert evaluator.bootstrap_interval(*single) is None  # unknown


def test_gcn_and_arma_layers_against_loops():
    a, x = random_graph(6, dtype=torch.float32), torch.randn(6, 4)
    d = a.sum(1)
    propagation = torch.tensor([[a[i, j] / math.sqrt(d[i] * d[j]) for j in range(6)] for i in range(6)])
    torch.testing.assert_close(evaluator.normalise(a), propagation)
    gcn = evaluator.GCNLayer(4, 3, F.silu, skip=True)
    message = torch.stack([sum(propagation[i, j] * gcn.W(x[j]) for j in range(6)) for i in range(6)])
    torch.testing.assert_close(gcn(x, propagation), F.silu(message + gcn.V(x)))
    arma, total = evaluator.ARMALayer(4, 3, F.silu), 0
    for first, w, v in zip(arma.first, arma.W, arma.V):
        state = F.silu(propagation @ x @ first + x @ v)
        total = total + F.silu(propagation @ state @ w + x @ v)
    torch.testing.assert_close(arma(x, propagation), total / 2)


def test_mincut_loss_in_closed_form():
    config = u.Config(clusters=2)
    a = evaluator.normalise(torch.block_diag(torch.ones(3, 3), torch.ones(3, 3)))  # two components: a perfect cut
    two, one = torch.eye(2)[torch.arange(6) // 3], torch.eye(2)[torch.zeros(6, dtype=int)]
    assert evaluator.mincut_loss(two, None, a, config) == pytest.approx(-1, abs=1e-6)
    orthogonality = math.hypot(1 - 1 / math.sqrt(2), 1 / math.sqrt(2))  # |I/1 - I/sqrt(2)| is left where nothing is cut
    assert evaluator.mincut_loss(one, None, a, config) == pytest.approx(-1 + orthogonality, abs=1e-6)


def test_dsm_is_the_sign_of_the_fiedler_vector_of_a_dense_eigen_solver():
    features, _ = communities()
    a = u.build_graph(features, 0.01)
    d = a.sum(1).numpy()
    fiedler = np.linalg.eigh(np.eye(40) - a.numpy() / np.sqrt(np.outer(d, d)))[1][:, 1] > 0
    ours = evaluator.dsm(features, a, u.Config()).argmax(1).numpy() > 0
    assert np.array_equal(ours, fiedler) or np.array_equal(ours, ~fiedler)


@pytest.mark.parametrize("name, clusters", [*[(name, 2) for name in evaluator.METHODS],
                                            ("unsegmedgat", 4), ("vit-kmeans", 4), ("dsm", 4)])  # fmt: skip
def test_every_method_answers_for_every_graph_and_finds_planted_communities(name, clusters):
    n, config = 30 * clusters, u.Config(clusters=clusters, epochs=30)
    features, group = communities(n, clusters, noise=0.1)
    few, ones = torch.eye(n), torch.ones(n)
    few[:9, :9] = 0.5
    extra = [u.fit_collective([(features, ones)], u.Config(shared_epochs=5))] if name == "unsegmedgatc" else []
    odd = torch.eye(n), few.fill_diagonal_(1), torch.zeros(n, n), torch.ones(n, n)
    for adjacency in (*odd, u.build_graph(features, 0.3)):
        assignment = evaluator.METHODS[name](features, adjacency, config, *extra)
        assert assignment.shape == (n, clusters) and assignment.isfinite().all()
        torch.testing.assert_close(assignment.sum(1), ones)
    found = assignment.argmax(1).tolist()  # in the last graph
    assert len({*zip(found, group.tolist())}) == len({*found}) == clusters  # the same parts, whatever their names


@pytest.fixture
def dataset(tmp_path):
    """Three small images, their masks, and one of each without a partner."""
    images, masks = tmp_path / "images", tmp_path / "masks"
    images.mkdir()
    masks.mkdir()
    for n, ending in enumerate(["_segmentation.png", "_lesion.bmp", ".png"]):
        rgb, truth = lesion(seed=n)
        Image.fromarray(rgb).save(images / f"s{n}_1.jpg", quality=95)
        Image.fromarray(truth.astype(np.uint8) * (1 if n == 0 else 255)).save(masks / f"s{n}_1{ending}")
    Image.fromarray(rgb).save(images / "alone.jpg")
    Image.fromarray(truth).save(masks / "other_mask.png")
    return images, masks


@pytest.fixture
def score(dataset, tmp_path):
    """The evaluator's command line on these images: its exit code, and what it wrote to the JSON file."""

    def run(*flags):
        code = evaluator.main([*map(str, dataset), *QUICK, "--quiet", "--json", str(tmp_path / "out.json"), *flags])
        return code, json.loads((tmp_path / "out.json").read_text()) if code < 2 else None

    return run


def levels(*radii_and_values, rest=0):
    """Discs of these radii and values, the smallest last, on the rest: (96,128) float."""
    values = np.full((96, 128), float(rest))
    for radius, value in radii_and_values:
        values[disc(48, 64, radius, 96, 128)] = value
    return values


def picture(values, mode=None):
    """Values (H,W) or (H,W,3) as a PIL image of a mode; without one of 8 bits."""
    kind = {"I;16": np.uint16, "F": np.float32}.get(mode, np.uint8)
    return Image.fromarray(np.asarray(values).astype(kind)).convert(mode)


DISC, CLASSES, DISTANCE = levels((30, 255)), levels((30, 1), (15, 2)), np.hypot(*np.ogrid[-48:48, -64:64])
BAD_MASKS = {  # an image that is not a mask, how it is saved, and the message
    "object 1, void rim 255": (picture(levels((34, 255), (30, 1))), {}, "3 values .0, 1, 255."),
    "labels 0, 1, 2": (picture(CLASSES), {}, "3 values .0, 1, 2., not two: make it binary"),
    "labels 0, 128, 255": (picture(levels((30, 128), (15, 255))), {}, "3 values"),
    "classes by colour": (u.palette_image(CLASSES.astype(np.uint8)), {}, "3 values .0,0,0, 240,200,0, 0,200,120."),
    "two colours": (picture((CLASSES[..., None] == [1, 2, 3]) * 255), {}, "3 values"),
    "a soft prediction": (picture(255 / (1 + np.exp((DISTANCE - 30) / 8))), {}, "values"),
    "a photograph": (picture(lesion()[0]), {}, "not two: make it binary"),
    "a photograph as JPEG": (picture(lesion()[0]), {"format": "JPEG"}, "are images and masks swapped"),
    "two frames": (FRAMES[0], {"save_all": True, "append_images": FRAMES[1:]}, "2 frames"),
    "not a number": (picture(np.where(DISTANCE < 9, np.nan, DISC), "F"), {}, "not finite"),
    "infinite": (picture(np.where(DISTANCE < 9, np.inf, DISC), "F"), {}, "not finite"),
}


@pytest.mark.parametrize(
    "name, mode, values",
    [("m.png", "L", DISC), ("m.png", "L", DISC / 255), ("m.jpg", "L", DISC), ("m.png", "1", DISC), ("m.png", "P", DISC),
     ("m.png", "RGBA", DISC), ("m.png", "I;16", 200 * DISC), ("m.tif", "F", DISC / 255),
     ("m.png", "L", levels((30, 200), rest=100)), ("m.png", "L", levels((30, 2), rest=1)),
     ("m.png", "L", np.rint(255 / (1 + np.exp(2 * DISTANCE - 60)))), ("m.png", "RGB", DISC[..., None] * [1, 0, 0])],
)  # fmt: skip
def test_the_brighter_value_of_a_mask_is_the_object_with_half_of_its_rim(tmp_path, name, mode, values):
    picture(values, mode).save(tmp_path / name)
    assert np.array_equal(evaluator.load_mask(tmp_path / name, (96, 128)), DISC > 0)
    with pytest.raises(u.ImageError, match="128 x 96"):
        evaluator.load_mask(tmp_path / name, (128, 96))


@pytest.mark.parametrize("image, how, says", BAD_MASKS.values(), ids=BAD_MASKS)
def test_an_image_that_is_no_mask_is_refused_with_its_values(tmp_path, image, how, says):
    image.save(tmp_path / "m.tif", **how)
    with pytest.raises(u.ImageError, match=f"m.tif: .*{says}"):
        evaluator.load_mask(tmp_path / "m.tif", (96, 128))


def test_images_named_like_masks_pair_too(tmp_path):
    images, masks = tmp_path / "images", tmp_path / "masks"
    for path in (images / "a.png", images / ".cache" / "a.png", images / "a_lesion.png", images / "b_lesion.png",
                 masks / "a_mask.png", masks / "a_lesion.png", masks / "b_lesion_mask.png"):  # fmt: skip
        path.parent.mkdir(exist_ok=True, parents=True)
        Image.fromarray(lesion()[1]).save(path)
    pairs, alone = evaluator.pair_files(images, masks)
    assert {*pairs} == {"a", "a_lesion", "b_lesion"} and not alone
    flags = ["--limit", "1", "--methods", "dsm", "--predictions", f"made={masks}", "--quiet"]
    assert evaluator.main([str(images), str(masks), *QUICK, *flags]) == 0  # predictions pair as if all were scored


def test_one_whole_run_with_every_method_and_output_drops_no_file_silently(dataset, score, tmp_path, capsys, caplog):
    shutil.copytree(dataset[1], tmp_path / "made")
    Image.new("L", (128, 96)).save(tmp_path / "made" / "s2_1.png")
    flags = ["--sheet", str(tmp_path / "s.png"), "--predictions", f"made={tmp_path / 'made'}"]
    code, summary = score(*flags, "--group-by", r"^s[01]?(2?_)", "--reference", "isic2018")  # two images, and one
    table = capsys.readouterr().out
    for row in [*evaluator.METHODS, evaluator.LOCATED, "everything foreground", "centred ellipse", "DSM (published)"]:
        assert f"| {row} |" in table
    assert "Backbone: builtin" in table and "blind" in table and "macro mIoU" in table
    assert "not DINO" in caplog.text
    assert all(f"{name}: has no partner" in caplog.text for name in ("alone.jpg", "other_mask.png"))
    assert code == 0 and summary["rows"]["unsegmedgat"]["iou"]["mean"] > 0.8 and summary["images"] == 3
    ours, made, located = (summary["rows"][row]["iou"] for row in ("unsegmedgat", "made", "located ellipse"))
    assert made["groups"] == {"_": 1, "2_": 0} and made["macro"] == 0.5 and made["mean"] == pytest.approx(2 / 3)
    assert made["difference"] == pytest.approx(made["mean"] - ours["mean"]) and located["mean"] > 0.5
    assert Image.open(tmp_path / "s.png").size == (312, 996)  # best, median, worst: one of three images each
    Image.new("L", (9, 9)).save(dataset[1] / "s0_1.png")  # two masks of one image
    assert score()[0] == 2 and "has the same" in caplog.messages[-1]


def test_a_killed_run_resumes_and_other_files_are_left(dataset, score, tmp_path, capsys, monkeypatch):
    file = tmp_path / "scores.csv"
    flags = ["--limit", "2", "--epochs", "5", "--methods", "unsegmedgatc,dsm", "--csv", str(file)]
    flags += ["--sheet", str(tmp_path / "sheet.png")]
    assert score(*flags)[0] == 0
    table, lines = capsys.readouterr().out, file.read_text().splitlines(keepends=True)
    assert {line.split(",")[1] for line in lines[1:]} == {"s0_1", "s2_1"}  # evenly spread
    whole = "".join(lines[:5])
    for begun, kept in [("settings,ima", lines[0]), (whole + lines[5][:20], whole), ("".join(lines), "".join(lines))]:
        file.write_text(begun)  # killed in the middle of the header or of a line, or when all was done
        assert score(*flags, "--resume")[0] == 0 and capsys.readouterr().out == table
        assert file.read_text().startswith(kept) and file.read_text().count("\n") == len(lines)
    assert score(*flags)[0] == 2  # without --resume an existing file is not touched
    monkeypatch.chdir(tmp_path / "images")  # from anywhere
    assert score(*flags, "--resume")[0] == 0
    for other in "--tau 0.4", "--tolerance 3%", "--protocol box", "--oracle-features 1", "--squash":
        assert score(*flags, "--resume", *other.split())[0] == 2  # nor mixed with other settings
    images = shutil.copytree(dataset[0], tmp_path / "other")
    assert evaluator.main([str(images), str(dataset[1]), *QUICK, *flags, "--resume"]) == 2  # or images
    assert file.read_text() == "".join(lines)
    file.unlink()
    assert score(*flags, "--methods", "dsm")[0] == score(*flags, "--resume")[0] == 0  # methods can be added
    assert sorted(line.split(",")[:-2] for line in file.open()) == sorted(line.split(",")[:-2] for line in lines)
    file.write_text("".join(lines[:-1]) + lines[-1].replace(",\n", ",failed\n"))  # what failed is done anew
    assert score(*flags, "--resume")[0] == 0 and sorted(file.read_text().splitlines(True)[:-1]) == sorted(lines[:-1])
    file.write_text("name,age\nAda,36")  # another program's
    assert score(*flags, "--resume")[0] == 2 and file.read_text() == "name,age\nAda,36"


def test_two_processes_of_torchrun_print_the_same_table_and_a_failed_image_counts_as_zero(dataset, tmp_path, capsys):
    (dataset[0] / "s1_1.jpg").write_text("broken")
    arguments = [*map(str, dataset), *QUICK, "--quiet", "--methods", "unsegmedgat,unsegmedgatc"]
    assert evaluator.main([*arguments, "--csv", str(tmp_path / "1.csv")]) == 1
    one = capsys.readouterr().out
    done = torchrun(HERE / "eval.py", *arguments, "--csv", tmp_path / "2.csv", "--json", tmp_path / "2.json")
    assert done.returncode == 1 and done.stdout == one and "| unsegmedgatc | " in one and "s1_1.jpg" in done.stderr

    def lines(name):  # without the seconds, in any order
        return sorted(line.split(",")[:-2] for line in (tmp_path / name).read_text().splitlines())

    assert lines("1.csv") == lines("2.csv")
    row = json.loads((tmp_path / "2.json").read_text())["rows"]["unsegmedgat"]
    assert row["failed"] == ["s1_1"] and row["iou"]["mean"] <= 2 / 3


@pytest.mark.parametrize(
    "flags, order, given, seen",
    [("blind", ["fit", "load_mask"], {}, (96, 128)),
     ("point", ["load_mask", "fit"], {"point": (58, 48)}, (96, 128)),
     ("box", ["load_mask", "fit"], {"box": (26, 22, 90, 75)}, (96, 128)),
     ("box --jitter 3", ["load_mask", "fit"], {"box": (26, 22, 90, 75)}, (96, 128)),
     ("official", ["load_mask", "fit"], {}, (93, 104)),
     ("official --squash", ["load_mask", "fit"], {}, (64, 64))],
)  # fmt: skip
def test_what_protocols_give_away(dataset, score, tmp_path, monkeypatch, capsys, flags, order, given, seen):
    (tmp_path / "inverse").mkdir()
    for n in range(3):
        Image.fromarray(~lesion()[1]).save(tmp_path / "inverse" / f"s{n}_1.png")
    calls, protocol = mock.Mock(), flags.split()[0]
    for module, name in (u, "extract_nodes"), (u, "fit"), (evaluator, "load_mask"):
        spy = mock.Mock(wraps=getattr(module, name))
        calls.attach_mock(spy, name)
        monkeypatch.setattr(module, name, spy)
    assert score("--methods", "unsegmedgat", "--protocol", *flags.split())[0] == 0
    assert [name for name, *_ in calls.mock_calls if name != "extract_nodes"] == order * 3
    for _, (rgb, *_), prompts in calls.extract_nodes.mock_calls:
        assert rgb.shape[:2] == seen and prompts.keys() == given.keys()
        moved = np.abs([np.subtract(prompts[name], given[name]) for name in given]).max(initial=0)
        assert 0 < moved <= 3 if "jitter" in flags else moved == 0
    assert ("USES GROUND TRUTH" in capsys.readouterr().out) == (protocol != "blind")
    code, summary = score("--methods", "dsm", "--protocol", protocol, "--predictions", f"x={tmp_path / 'inverse'}")
    assert summary["rows"]["x"]["iou"]["mean"] == (protocol == "official")  # the better of mask and inverse
    share = math.pi / 4 if "box" in flags else math.pi * 0.28 * 0.25  # of the ellipse in its box, or in the image
    if protocol != "official":
        assert summary["rows"]["everything foreground"]["iou"]["mean"] == pytest.approx(share, rel=0.02)
    if given.keys() == {"box"}:
        assert summary["rows"]["inscribed ellipse"]["iou"]["mean"] > 0.98  # objects are ellipses


def test_an_empty_truth_is_reported_and_gives_no_prompt(dataset, score, caplog):
    Image.new("L", (128, 96)).save(dataset[1] / "s2_1.png")
    code, summary = score("--methods", "dsm", "--protocol", "box")
    assert code == 1 and summary["rows"]["dsm"]["failed"] == ["s2_1"] and "no prompt can be taken" in caplog.text
    assert score("--methods", "dsm")[0] == 0 and "an empty mask scores 1, any other 0" in caplog.text


def test_oracle_features_are_the_stated_formula():
    rgb, truth = lesion(64, 96)
    view = view_of(rgb, (0, 8, 64, 96))
    clean = evaluator.oracle_backbone(truth, 0.0, [1]).extract(view)
    c = F.avg_pool2d(torch.from_numpy(truth[:, 8:])[None].float(), 8).flatten()
    e = np.random.default_rng(0).standard_normal((6, 384))
    e = torch.from_numpy(e / np.linalg.norm(e, axis=1, keepdims=True)).float()
    torch.testing.assert_close(clean[c == 1], (0.35 * e[0] + 0.94 * e[1]).expand(int((c == 1).sum()), -1))
    distances = cdist(clean[c == 0], 0.75 * e[0] + 0.66 * e[2:])  # of the background's patches to its kinds
    assert distances.min(1).max() < 1e-5 and len(set(distances.argmin(1))) > 1
    noisy, again, other = (evaluator.oracle_backbone(truth, 2.0, [seed]).extract(view) for seed in (1, 1, 2))
    g = (noisy - clean) * math.sqrt(384) / 2
    assert math.isclose(g.std(), 1, rel_tol=0.02) and abs(g.mean()) < 0.02
    assert torch.equal(noisy, again) and not torch.equal(noisy, other)


@pytest.mark.parametrize("protocol", ["blind", "point", "box", "official --preset official"])
def test_a_run_with_oracle_features_says_so_and_finds_the_object(score, capsys, monkeypatch, protocol):
    noises, seeds, oracle = set(), set(), evaluator.oracle_backbone
    monkeypatch.setattr(evaluator, "oracle_backbone", lambda truth, noise, seed: (
        noises.add(noise), seeds.add(tuple(seed)), oracle(truth, noise, seed))[2])  # fmt: skip
    code, summary = score("--methods", "unsegmedgat,dsm", "--oracle-features", "0.5", "--protocol", *protocol.split())
    assert code == 0 and "oracle features from the GROUND TRUTH, noise 0.5" in capsys.readouterr().out
    assert summary["rows"]["dsm"]["iou"]["mean"] > 0.8 and summary["settings"]["oracle_features"] == 0.5
    assert summary["settings"]["config"]["heads"] == (1 if "preset" in protocol else 4)
    assert noises == {0.5} and len(seeds) == 3


def test_the_point_is_in_the_object_and_inexact_prompts_are_scaled_and_moved_inside_the_image():
    ring = disc(20, 20, 15, 40, 40)
    ring[10:30, 10:30] = False  # whose centroid is no pixel of it
    x, y = evaluator.inner_point(ring)
    inside = np.argwhere(ring)
    assert ring[y, x] and math.dist((y, x), inside.mean(0)) == cdist(inside, inside.mean(0, keepdims=True)).min()
    moved = {evaluator.inexact((2, 30), 1, 5, (40, 40), seed) for seed in range(20)}
    assert len(moved) > 9 and all(0 <= x <= 7 and 25 <= y <= 35 for x, y in moved)
    loose = [evaluator.inexact((40, 30, 60, 50), factor, 0, (100, 200), 0) for factor in (1, 1.5, 100)]
    assert loose == [(40, 30, 60, 50), (35, 25, 65, 55), (0, 0, 200, 100)]
    x0, y0, x1, y1 = evaluator.inexact((40, 30, 41, 31), 0.1, 0, (100, 200), 0)
    assert (x1 - x0, y1 - y0) == (1, 1)
    around = evaluator.trivial_baselines("point", (40, 60), (30, 20))["disc at the point"]
    assert around[20, 30] and around.sum() == pytest.approx(math.pi * (0.15 * 40) ** 2, rel=0.1)


@pytest.mark.parametrize(
    "flags, says",
    [("--methods sam", "there is no sam"), ("--jitter 3", "--protocol point or box"), ("--limit 0", "--limit"),
     ("--oracle-features nan", "at least 0"), ("--oracle-features 1 --backbone dino", "replaces the backbone"),
     ("--loosen 2", "--protocol box"), ("--loosen 0 --protocol box", "above 0"), ("--tau 2", "tau"),
     ("--resume", "--csv"), ("--tolerance 2", "tolerance"), ("--group-by (x)", "that matches s0_1"),
     ("--group-by s", "--group-by s: must"), ("--group-by (", "a group ( )"), ("--predictions sam", "NAME=FOLDER"),
     ("--group-by (s{9999999999})", "a group ( )"),
     ("--predictions dsm=x", "not rows of the table"), ("--json .", "is a folder"),
     ("--csv a --json a", "two outputs"), ("--predictions a=x --predictions a=y", "with distinct names")],
)  # fmt: skip
def test_wrong_use_of_the_evaluator(score, caplog, flags, says):
    assert score(*flags.split())[0] == 2 and says in caplog.messages[-1]


def test_the_benchmark_prints_both_tables(monkeypatch, capsys):
    monkeypatch.setattr(evaluator, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))  # in this process
    monkeypatch.setattr(evaluator, "GRAPH_SIZES", {49: (56, 8)})
    monkeypatch.setattr(evaluator, "MEGAPIXELS", (0.02,))
    assert evaluator.main(["bench", "--device", "cpu"]) == 0
    table = capsys.readouterr().out
    assert "| epoch, plain attention, ms | " in table and "| solve, s | " in table
