"""Tests: each part against an independent reference, on tiny inputs. Run `python -m pytest -q`."""

import argparse
import contextlib
import hashlib
import http.server
import json
import math
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import networkx
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage
from scipy.stats import multivariate_normal
from torch import nn

import bilateral
import eval as evaluator
import unsegmedgat as u

HERE = Path(__file__).parent
QUICK = ["--size", "64", "--epochs", "20", "--backbone", "builtin", "--device", "cpu"]  # under 100 patches


def random_graph(n, seed=0, dtype=torch.float64):
    """A symmetric weighted adjacency with self-loops, about half of the edges present."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.rand(n, n, generator=generator, dtype=dtype)
    a = (a + a.T) / 2
    return (a * (a > 0.5)).fill_diagonal_(1)


def lesion(height=96, width=128, seed=0):
    """A brown ellipse on noisy skin: (H,W,3) uint8 and the truth (H,W) bool."""
    y, x = np.mgrid[:height, :width]
    truth = ((y - height * 0.5) / (height * 0.28)) ** 2 + ((x - width * 0.45) / (width * 0.25)) ** 2 < 1
    rgb = np.where(truth[..., None], (120, 70, 50), (225, 180, 160)).astype(float)
    rgb += np.random.default_rng(seed).normal(0, 4, rgb.shape)
    return rgb.clip(0, 255).astype(np.uint8), truth


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


@pytest.fixture
def photo(tmp_path):
    Image.fromarray(lesion()[0]).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


# ---------------------------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [dict(tau=0.0), dict(tau=1.0), dict(tau=math.nan), dict(clusters=1), dict(heads=3), dict(heads=0), dict(size=100),
     dict(stride=3), dict(epochs=0), dict(epochs=2.5), dict(lr=math.inf), dict(lr=0), dict(widths=()), dict(layers=0),
     dict(activation="tanh"), dict(window=0.5), dict(collective=60), dict(components=-1), dict(smoothness=-1),
     dict(seed=-1)],
    ids=str,
)  # fmt: skip
def test_config_refuses_what_is_out_of_range_and_names_it(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong)).replace("heads", "heads|widths")):
        u.Config(**wrong)


def test_every_setting_is_a_flag_with_the_same_default_and_help():
    parser = u.build_parser()
    assert u.config_from(parser.parse_args(["a.png", "-o", "b.png"])) == u.Config()
    flags = ["--tau", "0.5", "--widths", "32,64,96", "--no-refine", "--invert"]
    given = parser.parse_args(["a.png", "-o", "b.png", *flags])
    assert u.config_from(given) == u.Config(tau=0.5, widths=(32, 64, 96), refine=False, invert=True)
    text = " ".join(parser.format_help().split())
    assert "--weight-decay" in text and "default 60 [paper, section III]" in text


# ---------------------------------------------------------------------------------------------------------------
# Graph, eq. (1); attention, eqs. (2) to (4); network, eq. (5)
# ---------------------------------------------------------------------------------------------------------------


def test_graph_is_the_thresholded_cosine():
    f = torch.randn(7, 5)
    expected = torch.zeros(7, 7)
    for i in range(7):
        for j in range(7):
            cosine = f[i] @ f[j] / (f[i].norm() * f[j].norm())
            expected[i, j] = cosine if cosine > 0.3 else 0
    torch.testing.assert_close(u.build_graph(f, 0.3), expected)


def attention_inputs(n=150, heads=2, width=3, scale=1.0):  # over two row blocks
    torch.manual_seed(1)
    return [scale * torch.randn(*shape, dtype=torch.float64) for shape in [(heads, n, width), (heads, n), (heads, n)]]


@pytest.mark.parametrize("scale", [1, 10])
def test_blockwise_attention_equals_the_plain_one_forward_and_backward(scale):
    adjacency, upstream = random_graph(150), torch.randn(2, 150, 3, dtype=torch.float64)
    results = []
    for attention in (evaluator.plain_attention, u.MaskedAttention.apply):
        inputs = [x.requires_grad_() for x in attention_inputs(scale=scale)]
        out = attention(*inputs, adjacency)
        results.append((out, *torch.autograd.grad(out, inputs, upstream)))
    torch.testing.assert_close(*results)


def test_the_hand_written_backward_passes_gradcheck():
    inputs = [x.requires_grad_() for x in attention_inputs(n=9)]
    assert torch.autograd.gradcheck(lambda *x: u.MaskedAttention.apply(*x, random_graph(9)), inputs)


def test_attention_survives_huge_scores_and_isolated_nodes():
    adjacency = random_graph(20, dtype=torch.float32)
    adjacency[3], adjacency[:, 3] = 0, 0
    inputs = [x.float().requires_grad_() for x in attention_inputs(n=20, scale=1e4)]
    out = u.MaskedAttention.apply(*inputs, adjacency)
    out.sum().backward()
    assert all(x.grad.isfinite().all() for x in inputs)
    assert out.isfinite().all() and (out[:, 3] == 0).all()


def test_graph_attention_layer_against_loops_over_the_papers_equation_2():
    torch.manual_seed(0)
    layer, x, adjacency = u.GraphAttention(5, 6, 2, residual=False), torch.randn(8, 5), random_graph(8, dtype=torch.float32)
    expected = torch.zeros(8, 6)
    for z in range(2):
        w = layer.W.weight[3 * z : 3 * z + 3]  # W^z
        a = torch.cat([layer.a_src[z], layer.a_dst[z]])
        for i in range(8):
            neighbours = [j for j in range(8) if adjacency[i, j] > 0]
            scores = [F.leaky_relu(a @ torch.cat([w @ x[i], w @ x[j]]), 0.2) for j in neighbours]
            alpha = torch.stack(scores).softmax(0)
            expected[i, 3 * z : 3 * z + 3] = sum(alpha[n] * (w @ x[j]) for n, j in enumerate(neighbours))
    torch.testing.assert_close(layer(x, adjacency), expected)
    torch.testing.assert_close(layer(x, adjacency > 0), expected)
    skipping = u.GraphAttention(5, 6, 2)
    skipping.load_state_dict(layer.state_dict())
    torch.testing.assert_close(skipping(x, adjacency), expected + layer.W(x))
    torch.testing.assert_close(layer(x, torch.where(adjacency > 0, adjacency, -1)), expected)  # no edge either
    with pytest.raises(ValueError, match="4 heads do not divide the width 6"):
        u.GraphAttention(5, 6, heads=4)


@pytest.mark.parametrize("name, activation", [("silu", F.silu), ("selu", F.selu), ("relu", F.relu)])
def test_network_is_equation_5(name, activation):
    config = u.Config(widths=(8, 4), heads=2, projection=3, clusters=3, activation=name)
    torch.manual_seed(0)
    network, x, a = u.UnSegMedGAT(5, config), torch.randn(10, 5), random_graph(10, dtype=torch.float32)
    (one, two), (three, four) = network.series
    first = network.first[0](activation(two(activation(one(x, a)), a)))
    second = network.first[1](activation(four(activation(three(x, a)), a)))
    assignment = network(x, a)
    torch.testing.assert_close(assignment, network.second(first + second).softmax(1))
    torch.testing.assert_close(assignment.sum(1), torch.ones(10))


# ---------------------------------------------------------------------------------------------------------------
# Loss, eqs. (6) to (8), and the fit
# ---------------------------------------------------------------------------------------------------------------


def test_modularity_against_the_double_sum_of_equation_6_and_networkx():
    a = random_graph(12).fill_diagonal_(0)  # networkx counts a self-loop twice in the degree
    clusters = torch.arange(12) % 3
    hard = F.one_hot(clusters).double()
    d, two_m = a.sum(1), a.sum()
    same = [(i, j) for i in range(12) for j in range(12) if clusters[i] == clusters[j]]
    brute = sum(a[i, j] - d[i] * d[j] / two_m for i, j in same) / two_m
    ours = -u.modularity_loss(hard, a, balance=0)
    theirs = networkx.community.modularity(
        networkx.from_numpy_array(a.numpy()), [set(np.flatnonzero(clusters == k)) for k in range(3)]
    )
    assert math.isclose(ours, brute, abs_tol=1e-12) and math.isclose(ours, theirs, abs_tol=1e-12)


def test_loss_is_equation_8_with_b_formed_and_with_resolution_and_balance():
    a, c = random_graph(10), torch.rand(10, 4, dtype=torch.float64).softmax(1)
    d, two_m = a.sum(1), a.sum()
    for g, b in [(1.0, 1.0), (0.5, 2.0)]:
        trace = torch.trace(c.T @ (a - g * torch.outer(d, d) / two_m) @ c)
        expected = -trace / two_m + b * (math.sqrt(4) / 10 * c.sum(0).norm() - 1)
        torch.testing.assert_close(u.modularity_loss(c, a, g, b), expected)
    one_cluster, halves = torch.eye(2)[torch.zeros(10, dtype=int)].double(), torch.eye(2)[torch.arange(10) % 2].double()
    only_balance = [u.modularity_loss(x, torch.zeros(10, 10).double(), 0, 1).item() for x in (one_cluster, halves)]
    assert only_balance == pytest.approx([math.sqrt(2) - 1, 0])


def two_communities(n=40):
    """Features of two groups, and which node is in which."""
    torch.manual_seed(0)
    group = torch.arange(n) % 2
    return torch.eye(6)[group] + 0.2 * torch.randn(n, 6), group


def test_fit_finds_planted_communities_is_repeatable_and_leaves_the_random_state_alone():
    features, group = two_communities()
    adjacency = u.build_graph(features, 0.3)
    before = torch.get_rng_state()
    assignment, history = u.fit(features, adjacency)
    assert torch.equal(torch.get_rng_state(), before)
    assert (assignment.argmax(1) == group).float().mean() in (0, 1)
    assert u.SOONEST <= len(history) < 60 and history[-1] < history[0]
    again, _ = u.fit(features, adjacency)
    other, _ = u.fit(features, adjacency, u.Config(seed=1))
    assert torch.equal(assignment, again) and not torch.equal(assignment, other)
    assert len(u.fit(features, adjacency, u.Config(settled=0, epochs=70))[1]) == 70


def dense_graph(density, share, n=196):
    """Features of two noisy groups with so long a common part that this share of all pairs is joined, and their graph."""
    generator = torch.Generator().manual_seed(0)
    group = (torch.arange(n) < share * n).long()
    directions = F.normalize(torch.randn(3, 384, generator=generator), dim=1)
    f = directions[group] + torch.randn(n, 384, generator=generator) / math.sqrt(384)
    for common in np.arange(0, 6, 0.1):
        features = F.normalize(f + common * directions[2], dim=1)
        adjacency = u.build_graph(features, 0.3)
        if (adjacency > 0).float().mean() >= density:
            return features, adjacency
    raise AssertionError("never so dense")


def hard_modularity(labels, adjacency):
    """Q of eq. (6) by its matrix, for labels (N,) of two clusters."""
    d, signs = adjacency.sum(1), 2.0 * labels - 1
    return float(signs @ (adjacency - torch.outer(d, d) / d.sum()) @ signs / (2 * d.sum()))


@pytest.mark.parametrize("share", [0.08, 0.3])
@pytest.mark.parametrize("density", [0.5, 0.65, 0.85, 0.999])
def test_fit_reaches_the_modularity_of_the_leading_eigenvector_on_graphs_of_any_density(density, share):
    features, adjacency = dense_graph(density, share)
    d = adjacency.sum(1)
    leading = torch.linalg.eigh(adjacency - torch.outer(d, d) / d.sum())[1][:, -1] > 0  # Newman 2006
    assignment, _ = u.fit(features, adjacency)
    assert hard_modularity(assignment.argmax(1), adjacency) >= 0.9 * hard_modularity(leading, adjacency) > 0


def test_standardised_features_have_no_mean_and_length_4_whatever_they_share():
    features = torch.randn(50, 7) + 100
    x = u.standardise(features)
    torch.testing.assert_close(x.mean(0), torch.zeros(7), rtol=0, atol=1e-4)
    assert math.isclose(x.square().sum(1).mean().sqrt(), 4, rel_tol=1e-4)
    assert (u.standardise(torch.ones(3, 2)) == 0).all()


def test_collective_phase_is_one_step_an_image_a_pass_with_shared_parameters():
    images = [two_communities(n)[0] for n in (20, 30)]
    config = u.Config(collective=3, epochs=10, settled=0, widths=(8,), heads=2)
    torch.manual_seed(config.seed)
    network = u.UnSegMedGAT(6, config)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=1e-2)
    for _ in range(3):
        for x in images:
            adjacency = u.build_graph(x, 0.3)
            optimizer.zero_grad()
            u.modularity_loss(network(u.standardise(x), adjacency), adjacency, balance=0).backward()
            optimizer.step()
    steps = []
    shared = u.fit_collective([(x, torch.ones(len(x))) for x in images], config, progress=lambda: steps.append(1))
    torch.testing.assert_close(shared, dict(network.state_dict()), check_stride=False)
    assert len(steps) == 6
    kept = {name: tensor.clone() for name, tensor in shared.items()}
    _, history = u.fit(images[0], u.build_graph(images[0], 0.3), config, shared)
    assert len(history) == 7  # the remaining epochs
    torch.testing.assert_close(shared, kept)  # each image starts from the same parameters


# ---------------------------------------------------------------------------------------------------------------
# Features
# ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vit():
    """A small ViT with random parameters, and the same blocks as torch's own encoder layers."""
    torch.manual_seed(0)
    model = u.VisionTransformer(dim=24, depth=3, heads=2, grid=4).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    layers = []
    for block in model.blocks:
        layer = nn.TransformerEncoderLayer(24, 2, 96, 0, "gelu", 1e-6, batch_first=True, norm_first=True).eval()
        layer.self_attn.in_proj_weight, layer.self_attn.in_proj_bias = block.attn.qkv.weight, block.attn.qkv.bias
        layer.self_attn.out_proj, layer.norm1, layer.norm2 = block.attn.proj, block.norm1, block.norm2
        layer.linear1, layer.linear2 = block.mlp.fc1, block.mlp.fc2
        layers.append(layer)
    return model, layers


def test_vit_blocks_equal_torchs_encoder_layer(vit):
    model, layers = vit
    x = torch.randn(2, 9, 24)
    for block, layer in zip(model.blocks, layers):
        torch.testing.assert_close(block(x), layer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stride, h, w", [(8, 4, 4), (8, 3, 6), (4, 5, 11), (2, 9, 21)])
def test_keys_equal_the_third_of_qkv_after_the_other_blocks_row_major(vit, stride, h, w):
    model, layers = vit
    images = torch.randn(2, 3, (h - 1) * stride + 8, (w - 1) * stride + 8)
    position = model.pos_embed[:, 1:].reshape(1, 4, 4, 24).permute(0, 3, 1, 2)
    position = F.interpolate(position, size=(h, w), mode="bicubic")[0] if (h, w) != (4, 4) else position[0]
    tokens = [model.cls_token[0, 0].expand(2, -1) + model.pos_embed[0, 0]]
    for i in range(h):
        for j in range(w):
            patch = images[:, :, i * stride : i * stride + 8, j * stride : j * stride + 8]
            embedded = torch.einsum("bcyx,dcyx->bd", patch, model.patch_embed.proj.weight)
            tokens.append(embedded + model.patch_embed.proj.bias + position[:, i, j])
    x = torch.stack(tokens, dim=1)
    for layer in layers[:-1]:
        x = layer(x)
    expected = model.blocks[-1].attn.qkv(layers[-1].norm1(x))[:, 1:, 24:48]
    torch.testing.assert_close(model.keys(images, stride), expected, rtol=1e-4, atol=1e-5)


def test_keys_refuse_sides_that_are_no_multiples_of_the_patch(vit):
    with pytest.raises(ValueError, match="multiples of the patch"):
        vit[0].keys(torch.zeros(1, 3, 30, 32))


def test_lab_of_known_colours():
    colours = torch.tensor([[1.0, 1, 1], [1, 0, 0], [0, 0, 1], [0, 0, 0]]).T[..., None]
    expected = torch.tensor([[100, 0, 0], [53.24, 80.09, 67.20], [32.30, 79.19, -107.86], [0, 0, 0]]).T[..., None]
    torch.testing.assert_close(u.rgb_to_lab(colours), expected, rtol=0, atol=0.05)


def view_of(rgb, window=None, place=None, box=False, stride=8):
    """A View of a photograph, or a window of it, at its own size."""
    y0, x0, y1, x1 = window = window or (0, 0, *rgb.shape[:2])
    image, grid = u.resize_image(rgb[y0:y1, x0:x1], min(y1 - y0, x1 - x0), stride)
    valid = torch.ones(rgb.shape[0] // 8, rgb.shape[1] // 8)
    return u.View(rgb, window, image, grid, stride, valid, place, box)


@pytest.mark.parametrize("stride, n", [(8, 12 * 16), (4, 23 * 31)])
def test_builtin_descriptors_tell_lesion_from_skin(stride, n):
    rgb, truth = lesion()
    features = u.builtin_descriptors(view_of(rgb, stride=stride))
    assert len(features) == n and features.isfinite().all()
    patch_truth = F.avg_pool2d(torch.from_numpy(truth)[None].float(), 8, stride).flatten()
    adjacency = u.build_graph(features, 0.3)
    inside, outside = patch_truth == 1, patch_truth == 0
    within = min(adjacency[inside][:, inside].mean(), adjacency[outside][:, outside].mean())
    assert within > 0.99 and adjacency[inside][:, outside].mean() < 0.9


# ---------------------------------------------------------------------------------------------------------------
# Ours: where the object is, and what it looks like
# ---------------------------------------------------------------------------------------------------------------


def as_tensor(rgb):
    return torch.from_numpy(rgb).permute(2, 0, 1) / 255


def test_even_light_takes_out_a_quadratic_surface_and_leaves_the_object():
    y, x = torch.meshgrid(u.middle(96), u.middle(128), indexing="ij")
    light = torch.stack([60 + 8 * x - 5 * y * y, 10 + 3 * x * y, 15 - 4 * x * x])
    spot = torch.zeros(96, 128)
    spot[40:64, 56:80] = -30
    even = u.even_light(light + torch.stack([spot, spot * 0, spot * 0]), torch.ones(12, 16))
    torch.testing.assert_close(even[0], spot, rtol=0, atol=0.5)
    torch.testing.assert_close(even[1:], torch.zeros(2, 96, 128), rtol=0, atol=0.2)


def test_even_light_gently_takes_out_strong_vignetting_but_no_mild_light_and_no_dark_middle():
    y, x = torch.meshgrid(u.middle(96), u.middle(128), indexing="ij")
    bowl, none = x * x + y * y, torch.zeros(96, 128)

    def left(lightness):  # the spread that stays, of the spread that was there
        even = u.even_light(torch.stack([lightness, none, none]), torch.ones(12, 16), gently=True)
        return even[0].std() / lightness.std()

    assert left(60 - 40 * bowl) < 0.05  # an endoscope's
    assert left(60 - 40 * bowl + 20 * x - 10 * x * y) < 0.05
    assert left(60 - 4 * bowl) > 0.95  # a photograph's
    assert left(60 + 40 * bowl) > 0.95  # a large dark lesion's


def test_field_of_view_leaves_out_a_dark_frame_and_a_sticker_at_the_border_but_not_the_lesion():
    rgb, _ = lesion(160, 224)
    rgb[:, :16] = 5  # an endoscope's frame
    rgb[120:, 184:] = (40, 90, 220)  # a blue sticker in the corner
    valid = u.field_of_view(as_tensor(rgb))
    assert not valid[:, :2].any() and not valid[15:, 23:].any() and valid[5:14, 7:14].all()
    assert u.field_of_view(as_tensor(lesion(160, 224)[0])).all()


def test_field_of_view_leaves_out_violet_ink_and_a_large_sticker_but_no_blue_grey_veil_and_no_blood():
    for colour, seen in [((120, 60, 150), 0), ((90, 90, 110), 1), ((150, 40, 40), 1)]:
        rgb, _ = lesion(160, 224)
        rgb[72:88, 88:104] = colour  # 2 x 2 cells
        valid = u.field_of_view(as_tensor(rgb))
        assert (valid[9:11, 11:13] == seen).all() and valid[:, 16:].all()
    rgb, _ = lesion(160, 224)
    y, x = np.mgrid[:160, :224]
    rgb[np.hypot(y - 40, x - 240) < 80] = (230, 200, 20)  # so large that the smooth surface gives way to it
    assert not u.field_of_view(as_tensor(rgb))[1:9, 22:].any()
    rgb[:, ::24], rgb[:, 8::24] = (120, 60, 150), (120, 60, 150)  # ink everywhere is no mark
    assert u.field_of_view(as_tensor(rgb)).any()


def salient(h, w, row, column, radius, noise=0.5, dimensions=20):
    """Unit features (h,w,C) of a disc on another background, and the disc (h,w)."""
    generator = torch.Generator().manual_seed(0)
    disc = torch.hypot(torch.arange(h)[:, None] - row, torch.arange(w) - column) <= radius
    directions = torch.eye(dimensions)[:2][disc.long()]
    noise = noise * torch.randn(h, w, dimensions, generator=generator) / math.sqrt(dimensions)
    return F.normalize(directions + noise, dim=2), disc.numpy()


@pytest.mark.parametrize("row, column, radius", [(14.0, 18.0, 6.0), (10.0, 24.0, 4.0), (17.0, 15.0, 9.0)])
def test_locate_finds_the_disc_whose_features_differ(row, column, radius):
    features, disc = salient(28, 37, row, column, radius)
    y, x, r = u.locate(features, torch.ones(28, 37))
    found = np.hypot(*np.ogrid[-y : 28 - y, -x : 37 - x]) <= r
    assert iou(found, disc) > 0.7


def test_locate_prefers_what_differs_from_the_border_too_and_leaves_the_invalid_out():
    features, disc = salient(28, 37, 8.0, 10.0, 4.0)
    features[:, 20:] = F.normalize(torch.ones(20), dim=0)  # half of the frame is of another kind: its edge contrasts
    y, x, _ = u.locate(features, torch.ones(28, 37))
    assert disc[y, x]
    other, _ = salient(28, 37, 20.0, 28.0, 4.0)
    features = torch.where(torch.arange(37)[None, :, None] < 19, salient(28, 37, 8.0, 10.0, 4.0)[0], other)
    for side, valid in (("left", torch.arange(37) < 19), ("right", torch.arange(37) >= 19)):
        _, x, _ = u.locate(features, valid.float().expand(28, 37))
        assert (x < 19) == (side == "left")


def test_a_point_chooses_between_two_objects_and_its_disc_fits():
    left, right = salient(28, 37, 14.0, 8.0, 5.0), salient(28, 37, 14.0, 28.0, 5.0)
    features = torch.where(torch.arange(37)[None, :, None] < 18, left[0], right[0])
    for disc, column in ((left[1], 9), (right[1], 27)):
        y, x, r = u.locate(features, torch.ones(28, 37), point=(13.0, column))
        assert iou(np.hypot(*np.ogrid[-y : 28 - y, -x : 37 - x]) <= r, disc) > 0.6


@pytest.mark.parametrize("stride, patch", [(8, 8), (4, 8), (4, 4)])
def test_a_view_knows_its_patches_place_and_box(stride, patch):
    rgb, place = np.zeros((160, 240, 3), np.uint8), (70.0, 130.0, 30.0, 50.0)
    view = view_of(rgb, (32, 64, 128, 192), place, box=True)
    rows = [32 + patch / 2 + stride * i for i in range((96 - patch) // stride + 1)]
    columns = [64 + patch / 2 + stride * j for j in range((128 - patch) // stride + 1)]
    v, w = (np.array(rows)[:, None] - 70) / 30, (np.array(columns) - 130) / 50
    np.testing.assert_allclose(view.rho(stride, patch), np.hypot(v, w), rtol=1e-5)
    assert np.array_equal(view.core(stride, patch), np.hypot(v, w) <= 1)
    assert np.array_equal(view.allowed(stride, patch), (abs(v) <= 1) & (abs(w) <= 1))
    free = view_of(rgb, (32, 64, 128, 192), place)
    free.valid[:8] = 0  # the upper 64 rows
    assert np.array_equal(free.allowed(stride, patch), np.repeat(np.array(rows)[:, None] >= 64, len(columns), 1))


def test_node_weights_fade_from_the_place():
    view = view_of(np.zeros((80, 160, 3), np.uint8), place=(40.0, 60.0, 20.0, 30.0))
    weights = u.node_weights(view, 1.5).unflatten(0, (10, 20))
    expected = math.exp(-(((36 - 40) / 20) ** 2 + ((100 - 60) / 30) ** 2) / (2 * 1.5**2))
    assert math.isclose(weights[4, 12], expected, rel_tol=1e-5) and (u.node_weights(view, 0) == 1).all()


def test_gaussian_log_ratio_against_scipy():
    torch.manual_seed(0)
    colours, weight = torch.randn(50, 3), torch.rand(50)
    logs = []
    for w in (weight.numpy(), 1 - weight.numpy()):
        mean = np.average(colours.numpy(), axis=0, weights=w)
        covariance = np.cov(colours.numpy().T, aweights=w, ddof=0) + 0.09 * np.eye(3)
        logs.append(multivariate_normal(mean, covariance).logpdf(colours.numpy()))
    ours = u.gaussian_log_ratio(colours, weight, 1 - weight)
    np.testing.assert_allclose(ours, logs[0] - logs[1], atol=1e-4)


def test_outline_recovers_the_lesion_from_a_rough_start_and_stays_in_the_box():
    rgb, truth = lesion(96, 128)
    small = F.avg_pool2d(torch.from_numpy(truth)[None].float(), 4)[0]
    rough = small.roll((2, -3), dims=(0, 1)) * 0.5 + 0.25  # an unsure assignment: the colours settle it
    free = u.outline(view_of(rgb, place=(48.0, 58.0, 24.0, 28.0)), rough, u.Config(trust=1.0))
    assert iou(free.numpy() > 0.5, small.numpy() > 0.5) > 0.85
    boxed = u.outline(view_of(rgb, place=(48.0, 58.0, 27.0, 32.0), box=True), rough, u.Config())
    assert iou(boxed.numpy() > 0.5, small.numpy() > 0.5) > 0.85


def test_in_the_outline_a_sure_cluster_wins_over_the_colours_and_an_unsure_one_does_not():
    rgb, truth = lesion(96, 128)
    small = F.avg_pool2d(torch.from_numpy(truth)[None].float(), 4)[0] > 0.5
    start = small.roll((3, -4), dims=(0, 1))  # of which a part looks like skin
    view = view_of(rgb, place=(48.0, 58.0, 27.0, 32.0))
    sure = u.outline(view, start.float(), u.Config(trust=1000.0)).numpy() > 0.5
    unsure = u.outline(view, start.float(), u.Config(trust=0.0)).numpy() > 0.5
    assert iou(sure, start.numpy()) > 0.85 > 0.8 > iou(unsure, start.numpy())
    assert iou(unsure, small.numpy()) > 0.85


def test_moments_ellipse_is_1_on_the_border_of_an_ellipse_and_half_as_much_on_twice_the_size():
    y, x = np.mgrid[:60, :80].astype(float)
    rho = np.hypot((y - 30) / 12, (x - 45) / 24)
    for grow in 1, 2:
        ours = u.moments_ellipse(torch.from_numpy(rho <= 1).float(), grow).numpy()
        np.testing.assert_allclose(ours, rho / grow, atol=0.05 * rho.max())


def test_the_papers_preset_switches_off_what_is_ours():
    parser = u.build_parser()
    arguments = ["a.png", "-o", "b.png", "--preset", "paper", "--smoothness", "7"]
    config = u.config_from(u.parse_options(parser, arguments))
    paper = dict(residual=False, settled=0.0, lr=1e-3, balance=1.0, prior=0.0, colour_steps=0)
    assert config == u.Config(**paper, smoothness=7.0)
    view, _ = u.look(lesion()[0], config, u.load_backbone("builtin"))
    assert (u.node_weights(view, config.prior) == 1).all()


# ---------------------------------------------------------------------------------------------------------------
# Weights
# ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dino_files(tmp_path_factory):
    """Seeded random weights in the published layouts, and what each should load as."""
    folder = tmp_path_factory.mktemp("weights")
    branches = {}
    for seed, branch in enumerate(["teacher", "student"]):
        torch.manual_seed(seed)
        model = u.VisionTransformer()
        nn.init.normal_(model.pos_embed, std=0.02)
        branches[branch] = model.state_dict()
    torch.save(branches["teacher"], folder / "backbone.pth")
    head = {"head.mlp.0.weight": torch.zeros(3, 384), "head.last_layer.weight_g": torch.ones(3, 1)}
    full = {
        "student": {f"module.backbone.{k}": v for k, v in branches["student"].items()}
        | {f"module.{k}": v for k, v in head.items()},
        "teacher": {f"backbone.{k}": v for k, v in branches["teacher"].items()} | head,
        "args": argparse.Namespace(arch="vit_small", patch_size=8),
        "optimizer": {"state": {}, "param_groups": []},
        "epoch": 800,
    }
    torch.save(full, folder / "full.pth")
    return folder, branches


def test_the_published_backbone_has_150_tensors_and_21_670_272_parameters():
    tensors = u.VisionTransformer().state_dict()
    assert len(tensors) == 150 and sum(t.numel() for t in tensors.values()) == 21_670_272
    assert tensors["pos_embed"].shape == (1, 785, 384) and tensors["blocks.11.attn.qkv.weight"].shape == (1152, 384)


@pytest.mark.parametrize(
    "file, branch", [("backbone.pth", "teacher"), ("full.pth", "teacher"), ("full.pth", "student")]
)
def test_both_layouts_load_exactly(dino_files, file, branch):
    folder, branches = dino_files
    model = u.load_dino(folder / file, branch)
    torch.testing.assert_close(dict(model.state_dict()), dict(branches[branch]), rtol=0, atol=0)
    assert not model.training and not any(p.requires_grad for p in model.parameters())


class Malicious:
    def __reduce__(self):
        return print, ("code in a pickle has run",)


def write_bad_weights(kind, path, good):
    if kind == "html":
        path.write_text("<!DOCTYPE html><html>404 not found</html>")
    elif kind == "code":
        torch.save({"cls_token": Malicious()}, path)
    elif kind == "plain pickle":
        path.write_bytes(pickle.dumps(Malicious()))
    elif kind == "other network":
        torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7)}, path)
    elif kind == "lacks one":
        torch.save({k: v for k, v in good.items() if k != "blocks.3.norm1.bias"}, path)
    elif kind == "other shape":
        torch.save(good | {"pos_embed": torch.zeros(1, 197, 384)}, path)
    elif kind == "a list":
        torch.save([1, 2], path)
    elif kind == "empty":
        path.touch()


@pytest.mark.parametrize(
    "kind, says",
    [("html", "loaded safely"), ("code", "loaded safely"), ("plain pickle", "loaded safely"), ("empty", "loaded safely"),
     ("other network", "cls_token missing"), ("lacks one", "blocks.3.norm1.bias missing"),
     ("other shape", r"pos_embed is \(1, 197, 384\), not \(1, 785, 384\)"), ("a list", "holds a list"),
     ("absent", "no such weights file")],
)  # fmt: skip
def test_bad_weights_are_refused_with_the_reason(dino_files, tmp_path, capsys, photo, caplog, kind, says):
    path = tmp_path / "bad.pth"
    write_bad_weights(kind, path, dino_files[1]["teacher"])
    with pytest.raises((ValueError, OSError), match=says):
        u.load_dino(path)
    assert u.main([str(photo), "-o", str(tmp_path / "mask.png"), "--weights", str(path)]) == 2
    assert len(caplog.messages) == 1 and "\n" not in caplog.messages[0]
    assert "code in a pickle has run" not in capsys.readouterr().out
    assert not (tmp_path / "mask.png").exists()


def test_flipped_bytes_and_values_that_are_not_finite_are_refused(dino_files, tmp_path):
    good = (dino_files[0] / "backbone.pth").read_bytes()
    for position in np.random.default_rng(0).integers(1000, len(good) - 20_000, 6):  # in the tensors, not the padding
        flipped = bytearray(good)
        flipped[position] ^= 0x40
        (tmp_path / "flipped.pth").write_bytes(flipped)
        with pytest.raises(ValueError, match="flipped.pth"):
            u.load_dino(tmp_path / "flipped.pth")
    state = {name: tensor.clone() for name, tensor in dino_files[1]["teacher"].items()}
    state["norm.bias"][7] = math.nan
    torch.save(state, tmp_path / "nan.pth")
    with pytest.raises(ValueError, match="norm.bias has values that are not finite"):
        u.load_dino(tmp_path / "nan.pth")


def test_a_backbone_only_file_has_no_student(dino_files):
    with pytest.raises(ValueError, match="no student"):
        u.load_dino(dino_files[0] / "backbone.pth", "student")


@contextlib.contextmanager
def serve(content):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/dino.pth"
    server.shutdown()


def test_download_is_cached_and_its_digest_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with serve(b"weights") as url:
        monkeypatch.setattr(u, "DINO_URL", url)
        with pytest.raises(RuntimeError, match="invalid hash"):
            u.fetch_dino(progress=False)
        assert not list((tmp_path / "checkpoints").iterdir())  # neither the file nor a part of it
        monkeypatch.setattr(u, "DINO_SHA256", hashlib.sha256(b"weights").hexdigest())
        assert u.fetch_dino(progress=False).read_bytes() == b"weights"
    assert u.fetch_dino(progress=False).name == "dino.pth"  # the host is gone: it came from the cache


def test_auto_falls_back_with_one_clear_line_and_dino_never_does(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(u, "PATIENCE", 0.3)
    silent = socket.create_server(("127.0.0.1", 0))  # accepts, and never answers
    monkeypatch.setattr(u, "DINO_URL", f"http://127.0.0.1:{silent.getsockname()[1]}/dino.pth")
    u.load_backbone.cache_clear()
    result = u.segment(lesion()[0], u.Config(size=64, epochs=2), backbone="auto", device="cpu")
    assert result.backbone == "builtin"
    assert len(caplog.messages) == 1 and "--weights FILE" in caplog.messages[0] and "no answer" in caplog.messages[0]
    with pytest.raises(OSError, match="no answer from 127.0.0.1"):
        u.load_backbone("dino", None, "teacher", "cpu")
    monkeypatch.setattr(u, "fetch_dino", lambda *_: pytest.fail("builtin must not try the network"))
    assert u.load_backbone("builtin", None, "teacher", "cpu").name == "builtin"
    u.load_backbone.cache_clear()


def test_a_whole_run_on_dino_weights_from_a_file(dino_files, tmp_path, photo, capsys):
    out = tmp_path / "mask.png"
    flags = ["--weights", str(dino_files[0] / "full.pth"), "--size", "64", "--stride", "4", "--epochs", "3"]
    assert u.main([str(photo), "-o", str(out), *flags]) == 0
    assert "backbone dino" in capsys.readouterr().out and Image.open(out).size == (128, 96)


# ---------------------------------------------------------------------------------------------------------------
# Bilateral solver
# ---------------------------------------------------------------------------------------------------------------


def reference_grid(guide, sigmas):
    """The bilateral grid by a dictionary of coordinate tuples: vertex of each pixel (P,), blur matrix (V,V)."""
    y, x = np.mgrid[: guide.shape[0], : guide.shape[1]]
    r, g, b = guide.astype(np.float32).reshape(-1, 3).T
    yuv = [0.299 * r + 0.587 * g + 0.114 * b]
    yuv += [-0.168736 * r - 0.331264 * g + 0.5 * b + 128, 0.5 * r - 0.418688 * g - 0.081312 * b + 128]
    axes = [y.ravel() / sigmas[0], x.ravel() / sigmas[0], yuv[0] / sigmas[1], yuv[1] / sigmas[2], yuv[2] / sigmas[2]]
    cells = list(map(tuple, np.stack(axes, 1).astype(int)))
    vertices = sorted(set(cells))
    number = {cell: n for n, cell in enumerate(vertices)}
    blur = np.zeros((len(vertices), len(vertices)))
    for cell, n in number.items():
        blur[n, n] = 10
        for axis in range(5):
            for sign in (-1, 1):
                neighbour = cell[:axis] + (cell[axis] + sign,) + cell[axis + 1 :]
                if neighbour in number:
                    blur[n, number[neighbour]] = 1
    return np.array([number[cell] for cell in cells]), blur


@pytest.fixture
def guide():
    return np.random.default_rng(0).integers(0, 256, (23, 31, 3)).astype(np.uint8) // 3 + lesion(23, 31)[0] // 3


def test_bilateral_grid_against_a_dictionary_of_cells(guide):
    grid = bilateral.BilateralGrid(guide, 4, 9, 7)
    vertex, blur = reference_grid(guide, (4, 9, 7))
    assert np.array_equal(grid.pixel_vertex, vertex)
    assert np.array_equal(grid.blur.toarray(), blur)


def test_bilateral_solution_against_a_dense_solve(guide):
    rng = np.random.default_rng(1)
    target, confidence = rng.random((23, 31)), rng.random((23, 31))
    vertex, blur = reference_grid(guide, (4, 9, 7))
    splat = np.eye(len(blur))[vertex].T  # S: (V,P)
    n, mass = np.ones(len(blur)), splat.sum(1)
    for _ in range(10):
        n = np.sqrt(n * mass / (blur @ n))
    b_hat = n[:, None] * blur * n
    laplacian = np.diag(b_hat.sum(1)) - b_hat
    system = 12 * laplacian + np.diag(splat @ confidence.ravel())
    values = np.linalg.solve(system, splat @ (confidence * target).ravel())
    ours = bilateral.solve(target, guide, confidence, 4, 9, 7, smoothness=12, iterations=500, tolerance=1e-12)
    np.testing.assert_allclose(ours, values[vertex].reshape(23, 31), atol=1e-8)
    assert np.abs(b_hat.sum(1) - mass).max() / mass.max() < 0.05  # the iteration has all but converged


def test_bilateral_keys_do_not_collide_at_the_largest_sizes():
    guide = np.zeros((2, 70_000, 3), np.uint8)
    guide[0, :, 0], guide[1, :, 2] = 255, 255
    assert bilateral.BilateralGrid(guide, 1, 1, 1).vertices == 140_000
    assert bilateral.BilateralGrid(guide, 70_000, 1, 1).vertices == 2


def test_bilateral_keeps_constants_follows_edges_and_takes_zero_confidence(guide):
    np.testing.assert_allclose(bilateral.solve(np.full((23, 31), 0.7), guide), 0.7, atol=1e-6)
    nothing = bilateral.solve(np.eye(23, 31), guide, confidence=0)
    np.testing.assert_allclose(nothing, np.eye(23, 31).mean(), atol=1e-4)
    rgb, truth = lesion()
    known = np.random.default_rng(0).random(truth.shape) < 0.1  # one pixel in ten is enough
    filled = bilateral.solve(np.where(known, truth, 0.5), rgb, confidence=known * 0.99, smoothness=1)
    assert iou(filled > 0.5, truth) > 0.9


def test_bilateral_solves_several_targets_as_each_alone(guide):
    targets = np.random.default_rng(2).random((23, 31, 3))
    together = bilateral.solve(targets, guide)
    for k in range(3):
        np.testing.assert_array_equal(together[..., k], bilateral.solve(targets[..., k], guide))


@pytest.mark.parametrize(
    "change, says",
    [(dict(target=np.zeros((3, 3))), "same height"), (dict(target=np.full((23, 31), np.nan)), "finite"),
     (dict(confidence=1.5), "confidence"), (dict(confidence=np.nan), "confidence"), (dict(sigma_luma=0), "sigma_luma"),
     (dict(smoothness=-1), "smoothness"), (dict(guide=np.zeros((23, 31), np.uint8)), "guide"),
     (dict(guide=np.zeros((23, 31, 3))), "guide"), (dict(sigma_spatial=1e-9, sigma_luma=1e-4), "larger sigmas"),
     (dict(sigma_luma=5e-4, sigma_chroma=5e-4, sigma_spatial=1e-4), "larger sigmas")],
    ids=str,
)  # fmt: skip
def test_bilateral_refuses_what_makes_no_sense(guide, change, says):
    with pytest.raises(ValueError, match=says):
        bilateral.solve(**dict(target=np.zeros((23, 31)), guide=guide) | change)


def test_bilateral_needs_no_torch():
    script = "import sys; sys.modules['torch'] = None; import bilateral"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=HERE)


# ---------------------------------------------------------------------------------------------------------------
# Images, and from assignment to mask
# ---------------------------------------------------------------------------------------------------------------


def grey16(path):
    ramp = np.linspace(100, 4000, 40 * 30).reshape(30, 40).astype(np.uint16)  # a 12-bit camera
    Image.fromarray(ramp).save(path)
    return np.linspace(0, 255, 40 * 30).reshape(30, 40)


def save_mode(mode):
    def save(path):
        grey = np.linspace(0, 255, 40 * 30).reshape(30, 40)
        image = Image.fromarray(grey.astype(np.uint8))
        if mode == "LA":
            image.putalpha(Image.new("L", image.size, 255))
        (image if mode == "LA" else image.convert(mode)).save(path)
        return np.where(grey < 128, 0, 255) if mode == "1" else grey

    return save


@pytest.mark.parametrize(
    "name, save, tolerance",
    [("g.png", save_mode("L"), 1), ("ga.png", save_mode("LA"), 1), ("p.png", save_mode("P"), 60), ("a.png", save_mode("RGBA"), 1),
     ("c.jpg", save_mode("CMYK"), 6), ("16.png", grey16, 1), ("16.tif", grey16, 1), ("1.png", save_mode("1"), 255),
     ("t.tif", save_mode("RGB"), 1), ("b.bmp", save_mode("RGB"), 1), ("f.tif", save_mode("F"), 1)],
)  # fmt: skip
def test_every_kind_of_image_is_read_as_rgb(tmp_path, name, save, tolerance):
    grey = save(tmp_path / name)
    rgb = u.load_image(tmp_path / name)
    assert rgb.shape == (30, 40, 3) and rgb.dtype == np.uint8
    difference = np.abs(rgb.astype(float) - grey[..., None])
    assert difference.max() <= tolerance and rgb.max() >= 254
    if name == "1.png":  # dithered: right on average
        assert difference.mean() < 64


def test_transparency_is_laid_on_white_and_exif_turns_the_image(tmp_path):
    Image.new("RGBA", (20, 10), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (u.load_image(tmp_path / "clear.png") == 255).all()
    rgb, _ = lesion()
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    Image.fromarray(rgb).save(tmp_path / "turned.jpg", quality=95, exif=exif)
    assert u.load_image(tmp_path / "turned.jpg").shape == (128, 96, 3)
    upright = np.rot90(rgb, -1)
    assert np.abs(u.load_image(tmp_path / "turned.jpg").astype(int) - upright).mean() < 5


def test_arrays_and_pil_images_are_images_too_and_other_arrays_are_refused():
    rgb, _ = lesion()
    assert np.array_equal(u.load_image(rgb), rgb)
    assert np.array_equal(u.load_image(Image.fromarray(rgb)), rgb)
    with pytest.raises(u.ImageError, match="uint8"):
        u.load_image(rgb / 255)


@pytest.mark.parametrize("stride", [8, 4, 2])
def test_upsample_puts_every_patch_at_its_centre(stride):
    s, t = 64, 96
    rgb = np.zeros((2 * s, 2 * t, 3), np.uint8)
    image, (h, w) = u.resize_image(rgb, s, stride)
    assert image.shape == (3, s, t) and (h, w) == ((s - 8) // stride + 1, (t - 8) // stride + 1)
    y, x = np.mgrid[:h, :w] * stride + 4.0  # centres in the resized image
    values = u.upsample(np.stack([y, x], -1).astype(np.float32), stride, (2 * s, 2 * t), (s, t))
    rows, columns = np.mgrid[: 2 * s, : 2 * t] / 2 + 0.25
    np.testing.assert_allclose(values[8:-8, 8:-8, 0], rows[8:-8, 8:-8], rtol=1e-5)  # a linear ramp stays one
    np.testing.assert_allclose(values[8:-8, 8:-8, 1], columns[8:-8, 8:-8], rtol=1e-5)


def test_resize_keeps_the_aspect_and_refuses_a_graph_that_is_too_large():
    assert u.resize_image(np.zeros((576, 768, 3), np.uint8), 224)[1] == (28, 37)
    assert u.resize_image(np.zeros((100, 100, 3), np.uint8), 224, 4)[1] == (55, 55)
    with pytest.raises(u.ImageError, match="patches"):
        u.resize_image(np.zeros((8, 20_000, 3), np.uint8), 224)


def test_clean_mask_fills_holes_and_keeps_the_largest_pieces_not_the_background():
    mask = np.zeros((12, 12), bool)
    mask[1:11, 1:9] = True  # larger than the background
    mask[4:6, 4:6] = False
    mask[2:4, 10:12] = mask[8, 11] = True
    assert u.clean_mask(mask, 1).sum() == 80
    assert u.clean_mask(mask, 2).sum() == 84
    assert u.clean_mask(mask, 0).sum() == 85
    assert not u.clean_mask(np.zeros((4, 4), bool), 1).any()


def test_segment_finds_the_lesion_and_inverts_on_request():
    rgb, truth = lesion()
    config = u.Config(size=96, epochs=60)
    result = u.segment(rgb, config, backbone="builtin", device="cpu")
    assert result.mask.shape == result.probability.shape == result.labels.shape == truth.shape
    assert (result.mask.dtype, result.probability.dtype, result.labels.dtype) == (bool, np.float32, np.uint8)
    assert iou(result.mask, truth) > 0.9 and result.modularity > 0.01 and result.backbone == "builtin"
    assert result.probability[truth].mean() > 0.9 and result.probability[~truth].mean() < 0.3
    again = u.segment(rgb, config, backbone="builtin", device="cpu")
    assert np.array_equal(result.probability, again.probability)
    inverted = u.segment(rgb, u.Config(size=96, epochs=60, invert=True), backbone="builtin", device="cpu")
    assert iou(inverted.probability > 0.5, ~truth) > 0.8 and inverted.mask[~truth].mean() > 0.95


def test_more_clusters_give_a_label_map_whose_last_labels_are_the_mask():
    rgb, truth = lesion()
    config = u.Config(size=96, clusters=4, components=0, refine=True)
    result = u.segment(rgb, config, backbone="builtin", device="cpu")
    assert result.labels.max() <= 3 and result.assignment.shape == (12, 16, 4)
    assert iou(result.mask, truth) > 0.8
    assert set(np.unique(result.labels[result.mask])).isdisjoint(np.unique(result.labels[~result.mask]))


def test_a_label_map_of_many_clusters_is_read_back_as_written(tmp_path, photo):
    out = tmp_path / "mask.png"
    assert u.main([str(photo), "-o", str(out), *QUICK, "--clusters", "20", "--labels", "--no-refine"]) == 0
    result = u.segment(photo, u.Config(size=64, epochs=20, clusters=20, refine=False), backbone="builtin", device="cpu")
    assert np.array_equal(np.array(Image.open(tmp_path / "mask_labels.png")), result.labels)
    assert len(Image.open(tmp_path / "mask_labels.png").getpalette()) == 768


def test_several_objects_are_kept_on_request():
    rgb, truth = lesion()
    both, truths = np.concatenate([rgb, rgb], axis=1), np.concatenate([truth, truth], axis=1)
    one = u.segment(both, u.Config(size=96), backbone="builtin", device="cpu").mask
    wide = u.Config(size=96, components=2, window=6, prior=4)
    two = u.segment(both, wide, backbone="builtin", device="cpu").mask
    assert ndimage.label(one)[1] == 1 and iou(two, truths) > 0.8


def test_a_point_says_which_of_two_objects():
    rgb, truth = lesion()
    both = np.concatenate([rgb, rgb[:, ::-1]], axis=1)
    for x, side in ((58, np.s_[:, :128]), (198, np.s_[:, 128:])):
        mask = u.segment(both, u.Config(size=96), point=(x, 48), backbone="builtin", device="cpu").mask
        assert iou(mask[side], truth if x < 128 else truth[:, ::-1]) > 0.85 and mask.sum() == mask[side].sum()


@pytest.mark.parametrize("hint", [dict(point=(128, 5)), dict(point=(-1, 5)), dict(point=(math.nan, 5)),
                                  dict(point=(5, 5), box=(0, 0, 50, 50)), dict(box=(5, 5, 5, 9))], ids=str)  # fmt: skip
def test_a_place_that_cannot_be_is_refused(hint):
    with pytest.raises(ValueError, match="inside the image|leave the point out"):
        u.segment(lesion()[0], u.Config(size=64), backbone="builtin", device="cpu", **hint)


@pytest.mark.parametrize("height, width", [(8, 8), (9, 40), (16, 12)])
def test_the_smallest_images_are_segmented_too(height, width):
    result = u.segment(lesion(height, width)[0], u.Config(size=64), backbone="builtin", device="cpu")
    assert result.mask.shape == (height, width)
    u.segment(lesion(height, width)[0], u.Config(size=64), point=(width - 1, 0), backbone="builtin", device="cpu")


def test_a_fit_without_communities_is_said(caplog):
    alike = u.Backbone("alike", lambda view: torch.ones(math.prod(view.grid), 5))
    result = u.segment(lesion()[0], u.Config(size=64), backbone=alike, device="cpu")
    assert abs(result.modularity) < 1e-3 and len(caplog.messages) == 1 and "no communities" in caplog.messages[0]


def test_any_backbone_decides_what_is_found():
    rgb, truth = lesion()
    hidden = np.hypot(*np.ogrid[-40:56, -90:38]) < 20  # a disc that the colours do not show

    def extract(view):
        y, x = view.centres(view.stride, 8)
        inside = torch.from_numpy(hidden)[y.long(), x.long()].flatten().long()
        return torch.eye(2)[inside] + 0.1

    result = u.segment(rgb, u.Config(size=96, trust=10.0, refine=False), backbone=u.Backbone("hidden", extract), device="cpu")
    assert iou(result.mask, hidden) > 0.7 and result.backbone == "hidden"


def test_a_box_confines_the_object_and_decides_the_polarity():
    rgb, truth = lesion()
    rows, columns = np.flatnonzero(truth.any(1)), np.flatnonzero(truth.any(0))
    box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    both = np.concatenate([rgb, rgb[:, ::-1]], axis=1)  # a second lesion, outside the box
    result = u.segment(both, u.Config(size=96), box=box, backbone="builtin", device="cpu")
    assert iou(result.mask[:, :128], truth) > 0.9 and not result.mask[:, 128:].any()
    outside = np.ones(both.shape[:2], bool)
    outside[box[1] : box[3], box[0] : box[2]] = False
    assert not result.probability[outside].any() and not result.labels[outside].any()
    tiny = u.segment(rgb, u.Config(size=64, epochs=2), box=(60, 50, 61, 51), backbone="builtin", device="cpu")
    assert tiny.mask.sum() <= 1
    with pytest.raises(ValueError, match="inside the image"):
        u.segment(rgb, box=(0, 0, 200, 50), backbone="builtin", device="cpu")


# ---------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------


def test_the_readme_command_as_a_user_types_it(tmp_path, photo):
    out = tmp_path / "mask.png"
    command = [sys.executable, HERE / "unsegmedgat.py", photo, "-o", out, *QUICK, "--verbose"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    assert "backbone builtin" in done.stdout and "refine" in done.stdout
    mask = Image.open(out)
    assert mask.mode == "L" and mask.size == (128, 96) and set(np.unique(mask)) == {0, 255}
    assert iou(np.array(mask) > 0, lesion()[1]) > 0.9


def test_all_outputs_of_a_folder_with_failures_listed_and_skipped_on_the_second_run(tmp_path, caplog, capsys):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for seed in range(2):
        Image.fromarray(lesion(seed=seed)[0]).save(folder / f"{seed}.png")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n then nothing")
    (folder / "notes.txt").write_text("not an image, and not tried")
    extras = ["--probability", "--labels", "--overlay", "--explain"]
    assert u.main([str(folder), "-o", str(out), *QUICK, *extras]) == 1
    names = {f"{s}{kind}.png" for s in "01" for kind in ("", "_probability", "_labels", "_overlay", "_explain")}
    assert {p.name for p in out.iterdir()} == names
    assert "broken.png" in caplog.messages[0] and caplog.messages[-1].startswith("1 failed")
    assert Image.open(out / "0_overlay.png").size == Image.open(out / "0_labels.png").size == (128, 96)
    before = {p: p.stat().st_mtime_ns for p in out.iterdir()}
    (out / "1.png").unlink()
    assert u.main([str(folder), "-o", str(out), *QUICK, *extras, "--skip-existing"]) == 1
    changed = {p.name for p in out.iterdir() if before.get(p) != p.stat().st_mtime_ns}
    assert changed == {n for n in names if n.startswith("1")}
    (folder / "broken.png").unlink()
    capsys.readouterr()
    assert u.main([str(folder), "-o", str(out), *QUICK, *extras, "--skip-existing"]) == 0
    assert capsys.readouterr().out == "2 of 2 images are left alone, as their outputs exist\n"


def test_collective_run_and_box_from_the_command_line(tmp_path, capsys):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for seed in range(2):
        Image.fromarray(lesion(seed=seed)[0]).save(folder / f"{seed}.png")
    assert u.main([str(folder), "-o", str(out), *QUICK, "--collective", "5", "--box", "20,12,96,84", "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    for seed in range(2):
        assert iou(np.array(Image.open(out / f"{seed}.png")) > 0, lesion()[1]) > 0.9


@pytest.fixture
def folder(tmp_path):
    """Four photographs and a broken file."""
    (tmp_path / "in").mkdir()
    for seed in range(4):
        Image.fromarray(lesion(seed=seed)[0]).save(tmp_path / "in" / f"{seed}.png")
    (tmp_path / "in" / "2b.png").write_text("broken")
    return tmp_path / "in"


def contents(path):
    return {p.name: p.read_bytes() for p in path.iterdir()}


def test_order_and_bytes_of_the_outputs_do_not_depend_on_the_number_of_workers(folder, tmp_path, capsys):
    said = []
    for workers in "1", "2":
        out = tmp_path / workers
        assert u.main([str(folder), "-o", str(out), *QUICK, "--probability", "--workers", workers]) == 1
        said.append([line.split(" -> ")[0] for line in capsys.readouterr().out.splitlines()])
    assert contents(tmp_path / "1") == contents(tmp_path / "2") and len(contents(tmp_path / "1")) == 8
    assert said[0] == said[1] == [f"[{n}/5] {folder}/{name}.png" for n, name in ((1, 0), (2, 1), (3, 2), (5, 3))]


def test_an_interrupt_leaves_whole_files_and_skip_existing_goes_on(tmp_path):
    images, out = [tmp_path / f"{n:02}.png" for n in range(9)], tmp_path / "out"
    for seed in [0, *range(3, 9)]:
        Image.fromarray(lesion(seed=seed)[0]).save(images[seed])
    pipes = []  # the second and third image: both workers wait for what never comes
    for image in images[1:3]:
        os.mkfifo(image)
        pipes.append(os.open(image, os.O_RDWR))
    command = [sys.executable, HERE / "unsegmedgat.py", *images, "-o", out, *QUICK, "--workers", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith("[1/9]")
    process.send_signal(signal.SIGINT)
    for image, pipe in zip(images[1:3], pipes):
        image.unlink()  # who opens it from now on finds no file,
        os.close(pipe)  # and who has opened it reads its end: no image, and nobody waits for ever
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 130 and errors == (
        "ERROR: interrupted; what is written is whole, and --skip-existing goes on from here\n"
    )
    before = contents(out)
    assert 0 < len(before) < 9 and all(Image.open(path).load() for path in out.iterdir())
    for image in images[1:3]:
        Image.fromarray(lesion()[0]).save(image)
    assert u.main([*map(str, command[2:]), "--skip-existing", "--quiet"]) == 0
    after = contents(out)
    assert len(after) == 9 and before.items() <= after.items()


def torchrun(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True)


def test_two_processes_of_torchrun_give_the_same_bytes_collective_phase_included(folder, tmp_path):
    arguments = [str(folder), *QUICK, "--collective", "5", "--probability"]
    assert u.main([*arguments, "-o", str(tmp_path / "one"), "--workers", "1", "--quiet"]) == 1
    done = torchrun(HERE / "unsegmedgat.py", *arguments, "-o", tmp_path / "two", "--workers", "1")
    assert done.returncode == 1 and "1 failed: " in done.stderr
    assert len(done.stdout.splitlines()) == 4
    assert contents(tmp_path / "one") == contents(tmp_path / "two") and len(contents(tmp_path / "two")) == 8


def bad_image(kind, path):
    rgb = lesion()[0]
    if kind == "empty":
        path.touch()
    elif kind == "truncated":
        Image.fromarray(rgb).save(path)
        path.write_bytes(path.read_bytes()[:3000])
    elif kind == "not an image":
        path.write_text("hello")
    elif kind == "animated":
        Image.fromarray(rgb).save(path, "GIF", save_all=True, append_images=[Image.fromarray(rgb[::-1])])
    elif kind == "1 x 1":
        Image.new("RGB", (1, 1)).save(path)
    elif kind == "1 x 5000":
        Image.new("RGB", (1, 5000)).save(path)
    elif kind == "bomb":
        Image.new("1", (40_000, 40_000)).save(path)
    elif kind == "a folder of none":
        path.mkdir()


@pytest.mark.parametrize(
    "kind, code, says",
    [("missing", 1, "no such file"), ("empty", 1, "cannot be read"), ("truncated", 1, "cannot be read"),
     ("not an image", 1, "cannot be read"), ("animated", 1, "2 frames"), ("1 x 1", 1, "1 x 1 pixels"),
     ("1 x 5000", 1, "1 x 5000 pixels"), ("bomb", 1, "too many"), ("a folder of none", 2, "no image in this folder")],
)  # fmt: skip
def test_bad_images_end_in_one_clear_line_and_no_output(tmp_path, caplog, kind, code, says):
    path, out = tmp_path / "bad.png", tmp_path / "mask.png"
    bad_image(kind, path)
    assert u.main([str(path), "-o", str(out), *QUICK]) == code
    assert len(caplog.messages) == 1 and "bad.png" in caplog.messages[0] and says in caplog.messages[0]
    assert "\n" not in caplog.messages[0] and [p for p in tmp_path.iterdir() if p != path] == []


def test_a_constant_image_gets_an_empty_mask_and_a_word(tmp_path, caplog):
    Image.new("RGB", (64, 48), (200, 150, 140)).save(tmp_path / "flat.png")
    arguments = [str(tmp_path / "flat.png"), "-o", str(tmp_path / "mask.png"), *QUICK, "--clusters", "3", "--invert"]
    assert u.main([*arguments, "--explain", "--overlay", "--labels"]) == 0
    assert not np.array(Image.open(tmp_path / "mask.png")).any() and "constant" in caplog.text


@pytest.mark.parametrize(
    "arguments, says",
    [(["{photo}", "-o", "{dir}/mask.jpg"], "ends in .png"),
     (["{photo}", "-o", "{dir}/nowhere/mask.png"], "no such folder"),
     (["{photo}", "-o", "{photo}"], "it is an input"),
     (["{photo}", "{dir}/twin/photo.png", "-o", "{dir}/out"], "both"),
     (["{photo}", "{dir}/twin", "-o", "{photo}"], "several images need a folder"),
     (["{dir}/twin", "-o", "{dir}/mask.png"], "several images need a folder"),
     (["{dir}/twin", "-o", "{dir}/twin"], "it is an input"),
     (["{photo}", "-o", "{dir}/mask.png", "--tau", "nan"], "tau"),
     (["{photo}", "-o", "{dir}/mask.png", "--tau", "1"], "tau"),
     (["{photo}", "-o", "{dir}/mask.png", "--clusters", "1"], "clusters"),
     (["{photo}", "-o", "{dir}/mask.png", "--heads", "3"], "widths"),
     (["{photo}", "-o", "{dir}/mask.png", "--backbone", "builtin", "--weights", "x.pth"], "dino backbone"),
     (["{photo}", "-o", "{dir}/mask.png", "--weights", "x.pth"], "x.pth")],
    ids=lambda value: value if isinstance(value, str) else None,
)  # fmt: skip
def test_wrong_use_is_refused_before_anything_is_written(tmp_path, photo, caplog, arguments, says):
    (tmp_path / "twin").mkdir()
    Image.fromarray(lesion()[0]).save(tmp_path / "twin" / "photo.png")
    content = photo.read_bytes()
    assert u.main([a.format(photo=photo, dir=tmp_path) for a in arguments]) == 2
    assert len(caplog.messages) == 1 and says in caplog.messages[0] and "\n" not in caplog.messages[0]
    assert photo.read_bytes() == content and {p.name for p in tmp_path.iterdir()} == {photo.name, "twin"}


@pytest.mark.parametrize(
    "flags", ["--widths a,b", "--epochs many", "--stride 3", "--box 1,2", "--point 1", "--point nan,1", "--no-such", "--preset other"]
)
def test_flags_that_do_not_parse_exit_with_2(tmp_path, photo, flags):
    with pytest.raises(SystemExit) as stop:
        u.main([str(photo), "-o", str(tmp_path / "mask.png"), *flags.split()])
    assert stop.value.code == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_cuda_where_there_is_none_is_refused(tmp_path, photo, caplog):
    assert u.main([str(photo), "-o", str(tmp_path / "mask.png"), "--device", "cuda"]) == 2
    assert "device cuda is not available" in caplog.messages[0]


def test_an_output_that_cannot_be_written_leaves_the_old_one_whole(tmp_path, photo, monkeypatch, caplog):
    out = tmp_path / "mask.png"
    out.write_bytes(b"an earlier result")

    def fail_half_way(self, path, **_):
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail_half_way)
    assert u.main([str(photo), "-o", str(out), *QUICK]) == 1
    assert out.read_bytes() == b"an earlier result" and sorted(p.name for p in tmp_path.iterdir()) == [
        "mask.png",
        "photo.png",
    ]
    assert "No space left" in caplog.messages[0]


# ---------------------------------------------------------------------------------------------------------------
# Evaluator
# ---------------------------------------------------------------------------------------------------------------


def two_masks(seed=0):
    """A predicted and a true blob on 14 x 17 pixels that overlap in part."""
    y, x = np.mgrid[:14, :17]
    noise = np.random.default_rng(seed).random((14, 17)) < 0.1
    return (np.hypot(y - 6, x - 7) < 4) ^ noise, np.hypot(y - 7, x - 9) < 4.5


@pytest.mark.parametrize("seed", range(3))
def test_metrics_against_brute_force(seed):
    mask, truth = two_masks(seed)
    pairs = list(zip(mask.ravel(), truth.ravel()))
    tp, fp, fn = pairs.count((True, True)), pairs.count((True, False)), pairs.count((False, True))

    def border(m):  # pixels of the mask with a 4-neighbour outside it, or outside the image
        p = np.pad(m, 1)
        return [(i, j) for i, j in np.argwhere(m)
                if not (p[i, j + 1] and p[i + 2, j + 1] and p[i + 1, j] and p[i + 1, j + 2])]  # fmt: skip

    a, b = border(mask), border(truth)
    distances = [min(math.dist(p, q) for q in b) for p in a] + [min(math.dist(p, q) for p in a) for q in b]
    ours = evaluator.metrics(mask, truth, tolerance="1.5px")
    expected = {
        "iou": tp / (tp + fp + fn),
        "dice": 2 * tp / (2 * tp + fp + fn),
        "precision": tp / (tp + fp),
        "recall": tp / (tp + fn),
        "hd95": np.percentile(distances, 95) / math.hypot(14, 17) * 100,
        "nsd": sum(d <= 1.5 for d in distances) / len(distances),
    }
    assert ours == pytest.approx(expected)


def test_metrics_of_empty_masks():
    empty, full = np.zeros((4, 4), bool), np.ones((4, 4), bool)
    assert evaluator.metrics(empty, full)["iou"] == 0 and evaluator.metrics(empty, full)["hd95"] == 100
    assert evaluator.metrics(empty, empty)["dice"] == 1 and evaluator.metrics(full, full)["nsd"] == 1


def test_bootstrap_interval_covers_the_mean_and_resamples_whole_groups():
    values = np.random.default_rng(0).normal(0.7, 0.1, 400)
    low, high = evaluator.interval(values)
    assert low < values.mean() < high and math.isclose((high - low) / 2, 1.96 * 0.1 / 20, rel_tol=0.15)
    doubled = np.repeat(values, 2)  # frames of one sequence, all the same: no more certain than the sequences
    assert evaluator.interval(doubled, np.repeat(np.arange(400), 2)) == pytest.approx((low, high))


def test_gcn_and_arma_layers_against_loops():
    a, x = random_graph(6, dtype=torch.float32), torch.randn(6, 4)
    d = a.sum(1)
    propagation = torch.tensor([[a[i, j] / math.sqrt(d[i] * d[j]) for j in range(6)] for i in range(6)])
    torch.testing.assert_close(evaluator.normalise(a), propagation)
    torch.manual_seed(0)
    gcn = evaluator.Convolution(4, 3, F.silu, skip=True)
    message = torch.stack([sum(propagation[i, j] * gcn.W(x[j]) for j in range(6)) for i in range(6)])
    torch.testing.assert_close(gcn(x, propagation), F.silu(message + gcn.V(x)))
    arma = evaluator.Arma(4, 3, F.silu, stacks=2, iterations=3)
    stacks = []
    for first, w, v in zip(arma.first, arma.W, arma.V):
        state = F.silu(propagation @ x @ first + x @ v)
        for _ in range(2):
            state = F.silu(propagation @ state @ w + x @ v)
        stacks.append(state)
    torch.testing.assert_close(arma(x, propagation), (stacks[0] + stacks[1]) / 2)


def test_mincut_loss_in_closed_form():
    a = torch.block_diag(torch.ones(3, 3), torch.ones(3, 3))  # two components: a perfect cut
    hard = torch.eye(2)[torch.arange(6) // 3]
    assert evaluator.mincut_loss(hard, evaluator.normalise(a)) == pytest.approx(-1, abs=1e-6)
    all_in_one = torch.eye(2)[torch.zeros(6, dtype=int)]  # cuts nothing, but |I/1 - I/sqrt(2)| of orthogonality is left
    expected = -1 + math.hypot(1 - 1 / math.sqrt(2), 1 / math.sqrt(2))
    assert evaluator.mincut_loss(all_in_one, evaluator.normalise(a)) == pytest.approx(expected, abs=1e-6)


def test_dsm_is_the_sign_of_the_fiedler_vector_of_a_dense_eigen_solver():
    features, group = two_communities()
    a = u.build_graph(features, 0.01)
    d = a.sum(1).numpy()
    laplacian = np.eye(40) - a.numpy() / np.sqrt(np.outer(d, d))
    fiedler = np.linalg.eigh(laplacian)[1][:, 1] > 0
    ours = evaluator.dsm(features, a, u.Config()).argmax(1).numpy() > 0
    assert np.array_equal(ours, fiedler) or np.array_equal(ours, ~fiedler)


@pytest.mark.parametrize("name", list(evaluator.METHODS))
def test_every_method_finds_planted_communities(name):
    features, group = two_communities()
    a = u.build_graph(features, 0.3)
    extra = [u.fit_collective([(features, None)], u.Config(collective=5))] if name == "unsegmedgatc" else []
    assignment = evaluator.METHODS[name](features, a, u.Config(epochs=150), *extra)
    torch.testing.assert_close(assignment.sum(1), torch.ones(40))
    assert (assignment.argmax(1) == group).float().mean() in (0, 1)


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


TINY = [*QUICK, "--quiet"]


def test_pairs_go_by_stem_and_nothing_is_dropped_silently(dataset):
    pairs, alone = evaluator.pair_files(*dataset)
    assert list(pairs) == ["s0_1", "s1_1", "s2_1"]
    assert sorted(p.name for p in alone) == ["alone.jpg", "other_mask.png"]
    Image.new("L", (9, 9)).save(dataset[1] / "s0_1.png")
    with pytest.raises(ValueError, match="same"):
        evaluator.pair_files(*dataset)


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "JPEG", "01"])
def test_masks_of_every_kind_are_read_the_same(tmp_path, mode):
    truth = lesion()[1]
    image = Image.fromarray(truth.astype(np.uint8) * (1 if mode == "01" else 255))
    path = tmp_path / ("m.jpg" if mode == "JPEG" else "m.png")
    (image if mode in ("L", "01", "JPEG") else image.convert(mode)).save(path)
    assert np.array_equal(evaluator.load_mask(path, truth.shape), truth)
    with pytest.raises(u.ImageError, match="128 x 96"):
        evaluator.load_mask(path, (128, 96))


def test_one_whole_run_with_every_method_and_output(dataset, tmp_path, capsys, caplog):
    out = {
        flag: str(tmp_path / name) for flag, name in [("--csv", "s.csv"), ("--json", "s.json"), ("--sheet", "s.png")]
    }
    flags = [*map(str, dataset), *TINY, *[x for pair in out.items() for x in pair], "--group-by", r"^(s\d)_"]
    assert evaluator.main([*flags, "--reference", "isic2018"]) == 0
    table = capsys.readouterr().out
    for row in [*evaluator.METHODS, "located place", "everything foreground", "centred ellipse", "MedSAM (published)"]:
        assert f"| {row} |" in table
    assert "Backbone: builtin" in table and "blind" in table and "macro mIoU" in table
    assert "not DINO" in caplog.text and "alone.jpg: has no partner" in caplog.text
    summary = json.loads((tmp_path / "s.json").read_text())
    assert summary["rows"]["unsegmedgat"]["iou"]["mean"] > 0.8 and summary["images"] == 3
    assert Image.open(tmp_path / "s.png").size == (312, 996)  # best, median, worst: one of three images each


def test_a_killed_run_resumes_where_it_stopped(dataset, tmp_path, capsys):
    csv_file = tmp_path / "scores.csv"
    flags = [*map(str, dataset), *TINY, "--methods", "vit-kmeans,dsm", "--csv", str(csv_file)]
    assert evaluator.main(flags) == 0
    whole, table = csv_file.read_text(), capsys.readouterr().out
    lines = whole.splitlines(keepends=True)
    csv_file.write_text("".join(lines[:5]) + lines[5][:20])  # killed in the middle of a line
    assert evaluator.main([*flags, "--resume"]) == 0
    assert capsys.readouterr().out == table
    assert csv_file.read_text().startswith("".join(lines[:5])) and len(csv_file.read_text().splitlines()) == len(lines)
    assert evaluator.main(flags) == 2  # without --resume an existing file is not touched
    assert evaluator.main([*flags, "--resume", "--tau", "0.4"]) == 2  # nor mixed with other settings
    flags[-3:] = ["unsegmedgatc", "--csv", str(tmp_path / "c.csv"), "--sheet", str(tmp_path / "sheet.png")]
    assert evaluator.main(flags) == evaluator.main([*flags, "--resume"]) == 0


def test_resume_leaves_another_programs_csv_file_alone_and_mends_a_cut_header(dataset, tmp_path, capsys):
    foreign, begun = tmp_path / "foreign.csv", tmp_path / "begun.csv"
    foreign.write_text("name,age\nAda,36")
    begun.write_text("settings,ima")
    flags = [*map(str, dataset), *TINY, "--methods", "dsm", "--resume", "--csv"]
    assert evaluator.main([*flags, str(foreign)]) == 2 and foreign.read_text() == "name,age\nAda,36"
    assert evaluator.main([*flags, str(begun)]) == 0
    assert begun.read_text().splitlines()[0] == ",".join(evaluator.COLUMNS)


def test_one_value_or_group_has_no_interval():
    assert evaluator.interval(np.array([0.5])) is None
    assert evaluator.interval(np.array([0.5, 0.7]), ["a", "a"]) is None
    low, high = evaluator.interval(np.array([0.5, 0.7]), ["a", "b"])
    assert low < 0.6 < high


def test_two_processes_of_torchrun_print_the_same_table_failures_included(dataset, tmp_path, capsys):
    (dataset[0] / "s1_1.jpg").write_text("broken")
    arguments = [*map(str, dataset), *QUICK, "--quiet", "--methods", "unsegmedgat,unsegmedgatc"]
    assert evaluator.main([*arguments, "--csv", str(tmp_path / "1.csv")]) == 1
    one = capsys.readouterr().out
    done = torchrun(HERE / "eval.py", *arguments, "--csv", tmp_path / "2.csv", "--json", tmp_path / "2.json")
    assert done.returncode == 1 and done.stdout == one and "| unsegmedgatc | " in one

    def lines(name):  # without the seconds, in any order
        return sorted(line.split(",")[:-2] for line in (tmp_path / name).read_text().splitlines())

    assert lines("1.csv") == lines("2.csv")
    assert json.loads((tmp_path / "2.json").read_text())["rows"]["unsegmedgat"]["failed"] == ["s1_1"]


def test_blind_predictions_are_made_before_the_truth_is_read(dataset, monkeypatch, capsys):
    seen, honest, load_mask = [], evaluator.u.fit, evaluator.load_mask

    def fit(features, adjacency, config, *rest):
        seen.append("fit")
        return honest(features, adjacency, config, *rest)

    def read(*arguments):
        seen.append("truth")
        return load_mask(*arguments)

    monkeypatch.setattr(evaluator.u, "fit", fit)
    monkeypatch.setattr(evaluator, "load_mask", read)
    assert evaluator.main([*map(str, dataset), *TINY, "--methods", "unsegmedgat"]) == 0
    assert seen == ["fit", "truth"] * 3
    seen.clear()
    assert evaluator.main([*map(str, dataset), *TINY, "--methods", "unsegmedgat", "--protocol", "box"]) == 0
    assert seen == ["truth", "fit", "truth"] * 3  # the box comes first, and the table says so
    assert "USES GROUND TRUTH" in capsys.readouterr().out


def test_the_inscribed_ellipse_by_hand(tmp_path, capsys):
    for folder in ("i", "m"):
        (tmp_path / folder).mkdir()
    Image.fromarray(lesion(64, 64)[0]).save(tmp_path / "i" / "a.png")
    truth = np.zeros((64, 64), bool)
    truth[20:30, 10:50] = True  # a rectangle, whose inscribed ellipse has pi / 4 of its area, near enough
    Image.fromarray(truth).save(tmp_path / "m" / "a.png")
    assert evaluator.free_rows("box", (64, 64), (10, 20, 50, 30))["inscribed ellipse"].sum() == pytest.approx(
        math.pi / 4 * 400, rel=0.02
    )
    flags = [str(tmp_path / "i"), str(tmp_path / "m"), *TINY, "--methods", "vit-kmeans", "--json", str(tmp_path / "j")]
    assert evaluator.main([*flags, "--protocol", "box"]) == 0
    rows = json.loads((tmp_path / "j").read_text())["rows"]
    assert rows["inscribed ellipse"]["iou"]["mean"] == pytest.approx(math.pi / 4, rel=0.02)
    assert rows["everything foreground"]["iou"]["mean"] == 1  # the box is the truth here
    assert evaluator.main([*flags, "--protocol", "official", "--preset", "official", "--size", "64"]) == 0
    assert json.loads((tmp_path / "j").read_text())["settings"]["config"]["heads"] == 1


def test_planted_features_are_the_stated_formula():
    rgb, truth = lesion(64, 96)
    view = view_of(rgb, (0, 8, 64, 96))
    clean = evaluator.plant(truth, 0.0, [1]).extract(view)
    c = F.avg_pool2d(torch.from_numpy(truth[:, 8:])[None].float(), 8).flatten()
    e = np.random.default_rng(0).standard_normal((6, 384))
    e = torch.from_numpy(e / np.linalg.norm(e, axis=1, keepdims=True)).float()
    torch.testing.assert_close(clean[c == 1], (0.35 * e[0] + 0.94 * e[1]).expand(int((c == 1).sum()), -1))
    kinds = {int((0.75 * e[0] + 0.66 * e[2:] - row).norm(dim=1).argmin()) for row in clean[c == 0]}
    assert max((0.75 * e[0] + 0.66 * e[2:] - row).norm(dim=1).min() for row in clean[c == 0]) < 1e-5 and len(kinds) > 1
    noisy = evaluator.plant(truth, 2.0, [1])
    g = (noisy.extract(view) - clean) * math.sqrt(384) / 2
    assert math.isclose(g.std(), 1, rel_tol=0.02) and abs(g.mean()) < 0.02
    assert torch.equal(noisy.extract(view), noisy.extract(view))
    assert not torch.equal(noisy.extract(view), evaluator.plant(truth, 2.0, [2]).extract(view))


@pytest.mark.parametrize("protocol", ["blind", "point", "box", "official"])
def test_a_planted_run_says_so_and_finds_the_object(dataset, tmp_path, capsys, protocol):
    flags = [*map(str, dataset), *TINY, "--methods", "as-shipped,dsm", "--plant", "0.5", "--json", str(tmp_path / "j")]
    assert evaluator.main([*flags, "--protocol", protocol]) == 0
    assert "planted from the GROUND TRUTH, noise 0.5" in capsys.readouterr().out
    summary = json.loads((tmp_path / "j").read_text())
    assert summary["rows"]["dsm"]["iou"]["mean"] > 0.8 and summary["settings"]["plant"] == 0.5


def test_the_point_is_in_the_object_and_moves_by_no_more_than_the_jitter():
    ring = np.hypot(*np.mgrid[-20:20, -20:20]) < 15
    ring[10:30, 10:30] = False  # whose centroid is no pixel of it
    x, y = evaluator.inner_point(ring)
    inside = np.argwhere(ring)
    assert ring[y, x] and math.dist((y, x), inside.mean(0)) == min(math.dist(p, inside.mean(0)) for p in inside)
    for seed in range(20):
        moved = evaluator.jittered((2, 30), 5, (40, 40), seed)
        assert 0 <= moved[0] <= 7 and 25 <= moved[1] <= 35
    disc = evaluator.free_rows("point", (40, 60), (30, 20))["disc at the point"]
    assert disc[20, 30] and disc.sum() == pytest.approx(math.pi * (0.15 * 40) ** 2, rel=0.1)


def test_a_failed_image_counts_as_zero_and_is_named(dataset, tmp_path, caplog, capsys):
    (dataset[0] / "s1_1.jpg").write_text("not an image")
    flags = [*map(str, dataset), *TINY, "--methods", "dsm", "--json", str(tmp_path / "j")]
    assert evaluator.main(flags) == 1
    row = json.loads((tmp_path / "j").read_text())["rows"]["dsm"]
    assert row["failed"] == ["s1_1"] and "s1_1.jpg" in caplog.text and row["iou"]["mean"] <= 2 / 3


def test_predictions_made_elsewhere_get_their_row(dataset, tmp_path, capsys):
    made = tmp_path / "made"
    made.mkdir()
    for n in range(3):
        Image.fromarray(lesion(seed=n)[1]).save(made / f"s{n}_1.png")
    flags = [*map(str, dataset), *TINY, "--methods", "dsm", "--predictions", f"oracle={made}"]
    assert evaluator.main(flags) == 0
    assert "| oracle | 100.0 [100.0, 100.0] | 100.0" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, says",
    [(["--methods", "sam"], "there is no sam"), (["--jitter", "3"], "--protocol point or box"), (["--plant", "nan"], "noise of at least 0"),
     (["--plant", "1", "--backbone", "dino"], "stands in for the backbone"), (["--resume"], "--csv"),
     (["--tolerance", "much"], "tolerance"), (["--limit", "0"], "--limit"), (["--epochs", "5"], "--epochs"), (["--tau", "2"], "tau"),
     (["--group-by", "(x)"], "does not fit")],
    ids=str,
)  # fmt: skip
def test_wrong_use_of_the_evaluator(dataset, caplog, flags, says):
    assert evaluator.main([*map(str, dataset), *TINY, *flags]) == 2
    assert says in caplog.messages[-1]


def test_the_benchmark_prints_both_tables(monkeypatch, capsys):
    class InThisProcess:
        Pool = lambda self, processes: contextlib.nullcontext(self)  # noqa: E731
        apply = staticmethod(lambda function, arguments: function(*arguments))

    monkeypatch.setattr(evaluator.multiprocessing, "get_context", lambda kind: InThisProcess())
    monkeypatch.setattr(evaluator, "SIZES", {49: (56, 8)})
    monkeypatch.setattr(evaluator, "MEGAPIXELS", (0.02,))
    assert evaluator.main(["bench", "--device", "cpu"]) == 0
    table = capsys.readouterr().out
    assert "| epoch, 4 heads: plain autograd, x ours | " in table and "| whole refinement, s | " in table


# ---------------------------------------------------------------------------------------------------------------
# GPU
# ---------------------------------------------------------------------------------------------------------------

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@cuda
def test_attention_and_masks_on_cuda_agree_with_the_cpu():
    inputs = attention_inputs()
    adjacency = random_graph(150)
    expected = u.MaskedAttention.apply(*inputs, adjacency)
    ours = u.MaskedAttention.apply(*(x.cuda() for x in inputs), adjacency.cuda())
    torch.testing.assert_close(ours.cpu(), expected)
    rgb, _ = lesion()
    masks = [u.segment(rgb, u.Config(size=96), backbone="builtin", device=d).mask for d in ("cpu", "cuda")]
    assert iou(*masks) > 0.98
