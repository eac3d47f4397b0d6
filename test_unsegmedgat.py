"""Tests: each part against an independent reference, on tiny inputs. Run `python -m pytest -q`."""

import argparse
import hashlib
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
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
QUICK = ["--size", "64", "--epochs", "40", "--backbone", "builtin", "--device", "cpu"]  # under 100 patches


@pytest.fixture(autouse=True)
def fresh():
    """The same random numbers for each test, alone or among others, and no backbone of an earlier one."""
    torch.manual_seed(0)
    u.load_backbone.cache_clear()


def random_graph(n, dtype=torch.float64):
    """A symmetric weighted adjacency with self-loops, about half of the edges present."""
    a = torch.rand(n, n, dtype=dtype)
    return F.threshold((a + a.T) / 2, 0.5, 0.0).fill_diagonal_(1)


def disc(row, column, radius, h=28, w=37, stretch=1.0):
    """A filled circle, or an ellipse whose half axis along the row is `stretch` times longer: (h,w) bool."""
    y, x = np.ogrid[:h, :w]
    return np.hypot(y - row, (x - column) / stretch) <= radius


def photograph(truth, colour=(120, 70, 50), seed=0):
    """An object of one colour on noisy skin: (H,W,3) uint8."""
    noise = np.random.default_rng(seed).normal(0, 4, (*truth.shape, 3))
    return (np.where(truth[..., None], colour, (225, 180, 160)) + noise).clip(0, 255).astype(np.uint8)


def lesion(height=96, width=128, seed=0):
    """A brown ellipse on noisy skin: (H,W,3) uint8 and the truth (H,W) bool."""
    truth = disc(height * 0.5, width * 0.45, height * 0.28, height, width, width * 0.25 / (height * 0.28))
    return photograph(truth, seed=seed), truth


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


def segment(image, backbone="builtin", point=None, box=None, **settings):
    config = u.Config(**{"size": 64} | settings)
    return u.segment(image, config, backbone=backbone, device="cpu", point=point, box=box)


@pytest.fixture
def photo(tmp_path):
    Image.fromarray(lesion()[0]).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


# Section II of the paper -------------------------------------------------------------------------------------


def test_graph_is_the_thresholded_cosine_times_the_weights_of_both_nodes():
    f, weights = torch.randn(7, 5), torch.rand(7)
    cosine = 1 - torch.from_numpy(cdist(f, f, "cosine")).float()
    expected = torch.where(cosine > 0.3, cosine, 0)
    torch.testing.assert_close(u.build_graph(f, 0.3), expected)
    torch.testing.assert_close(u.build_graph(f, 0.3, weights), expected * torch.outer(weights, weights))


@pytest.mark.parametrize("block_bytes", [2**26, 0])  # at once, or in blocks of rows
@pytest.mark.parametrize("scale", [1, 1e4])  # of the scores
def test_graph_attention_layer_and_its_gradient_against_loops_over_equation_2(monkeypatch, scale, block_bytes):
    monkeypatch.setattr(u, "BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(u, "BLOCK_ROWS", 3)
    layer, x = u.GraphAttention(5, 6, heads=2, residual=False).double(), torch.randn(8, 5, dtype=torch.float64)
    layer.a_dst.data, layer.a_src.data = layer.a_dst.data * scale, layer.a_src.data * scale
    adjacency, expected = random_graph(8), torch.zeros(8, 6, dtype=torch.float64)
    adjacency[3], adjacency[:, 3] = 0, 0  # a node without neighbours
    for z in range(2):
        w = layer.W.weight[3 * z : 3 * z + 3]  # W^z
        a = torch.cat([layer.a_dst[z], layer.a_src[z]])
        for i in {*range(8)} - {3}:
            neighbours = [j for j in range(8) if adjacency[i, j] > 0]
            scores = [F.leaky_relu(a @ torch.cat([w @ x[i], w @ x[j]]), 0.2) for j in neighbours]
            expected[i, 3 * z : 3 * z + 3] = torch.stack(scores).softmax(0) @ (x[neighbours] @ w.T)
    torch.testing.assert_close(layer(x, torch.where(adjacency > 0, adjacency, -1)), expected)  # only the sign counts
    layer.residual, expected = True, expected + layer.W(x)
    theirs, ours = (torch.autograd.grad(h.square().sum(), layer.parameters()) for h in (expected, layer(x, adjacency)))
    torch.testing.assert_close(ours, theirs)
    single = layer.float()(x.float(), adjacency.float()).double()  # in which exp(scale) overflows
    torch.testing.assert_close(single, expected, rtol=0, atol=1e-4 if scale == 1 else 1e-2)


@pytest.mark.parametrize("activation", [F.silu, F.selu, F.relu], ids=lambda function: function.__name__)
def test_network_is_equation_5(activation):
    config = u.Config(widths=(8, 4), heads=2, fc_dim=3, clusters=3, activation=activation.__name__)
    network, x, a = u.UnSegMedGAT(5, config), torch.randn(10, 5), random_graph(10, dtype=torch.float32)
    (one, two), (three, four) = network.series
    first = network.fc_branch[0](activation(two(activation(one(x, a)), a)))
    second = network.fc_branch[1](activation(four(activation(three(x, a)), a)))
    torch.testing.assert_close(network(x, a), network.fc_out(first + second).softmax(1))


def test_loss_is_equation_8_with_b_formed_and_its_first_term_the_modularity_of_networkx():
    a, c = random_graph(12), torch.rand(12, 4, dtype=torch.float64).softmax(1)
    d, two_m = a.sum(1), a.sum()
    trace = torch.trace(c.T @ (a - 0.5 * torch.outer(d, d) / two_m) @ c)
    expected = -trace / two_m + 3 * (math.sqrt(4) / 12 * c.sum(0).norm() - 1)
    torch.testing.assert_close(u.modularity_loss(c, a, resolution=0.5, collapse_weight=3), expected)
    clusters, loopless = torch.arange(12) % 3, a.clone().fill_diagonal_(0)  # networkx counts a self-loop twice
    graph = networkx.from_numpy_array(loopless.numpy())
    theirs = networkx.community.modularity(graph, [{*np.flatnonzero(clusters == k)} for k in range(3)])
    assert u.modularity(F.one_hot(clusters).double(), loopless).item() == pytest.approx(theirs)


def communities(n=40, groups=2, noise=0.2):
    """Features of so many groups, and which node is in which."""
    group = torch.arange(n) % groups
    return torch.eye(20)[group] + noise * torch.randn(n, 20), group


@pytest.mark.parametrize("share, common", [(0.5, 0), (0.3, 0.8), (0.3, 1.1), (0.08, 1.1)])  # half to all of the edges
def test_fit_reaches_the_modularity_of_the_leading_eigenvector_at_any_density_and_is_repeatable(share, common):
    """Two noisy groups, one of this share of the nodes, with a common part of this length: the longer, the denser."""
    group = (torch.arange(196) < share * 196).long()
    directions = F.normalize(torch.randn(3, 384), dim=1)
    features = directions[group] + common * directions[2] + torch.randn(196, 384) / math.sqrt(384)
    adjacency = u.build_graph(features, 0.3)
    d = adjacency.sum(1)
    leading = torch.linalg.eigh(adjacency - torch.outer(d, d) / d.sum())[1][:, -1] > 0  # Newman 2006
    best = u.modularity(F.one_hot(leading.long(), 2).float(), adjacency).item()
    before = torch.get_rng_state()
    result, again, other = (u.fit(features, adjacency, u.Config(seed=seed)) for seed in (0, 0, np.int64(1)))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(result.assignment, again.assignment) and not torch.equal(result.assignment, other.assignment)
    assert min(result.modularity, other.modularity) >= 0.9 * best > 0 and len(result.losses) < 60  # stopped early


def test_collective_phase_is_one_step_an_image_a_pass_with_shared_parameters():
    images = [communities(n)[0] for n in (20, 30)]
    config = u.Config(shared_epochs=3, epochs=10, early_stop=0, widths=(8,), heads=2)
    torch.manual_seed(config.seed)
    network = u.UnSegMedGAT(20, config)
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.lr, weight_decay=1e-2)
    for x in images * 3:
        adjacency = u.build_graph(x, 0.3)
        degree = adjacency.sum(1, keepdim=True) / adjacency.sum()
        centred = x - (degree * x).sum(0)
        scaled = 4 * centred / (degree * centred.square()).sum().sqrt()
        optimizer.zero_grad()
        u.modularity_loss(network(scaled, adjacency), adjacency, collapse_weight=0).backward()
        optimizer.step()
    node_sets = [lambda: 1 / 0, *(lambda x=x: (x, torch.ones(len(x))) for x in images)]  # one that fails is left out
    shared = u.fit_collective(node_sets, config)
    torch.testing.assert_close(shared, dict(network.state_dict()), check_stride=False)
    losses = u.fit(images[1], adjacency, config, shared).losses
    assert len(losses) == 7 and losses[0] == pytest.approx(-u.modularity(network(scaled, adjacency), adjacency).item())


@pytest.mark.parametrize("stride, h, w", [(8, 4, 4), (8, 3, 6), (2, 9, 21)])
def test_keys_equal_the_third_of_qkv_after_torchs_own_encoder_layers_row_major(stride, h, w):
    model = u.VisionTransformer(dim=24, depth=3, heads=2, grid=4).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    images = torch.randn(2, 3, (h - 1) * stride + 8, (w - 1) * stride + 8)
    position = model.pos_embed[:, 1:].reshape(1, 4, 4, 24).permute(0, 3, 1, 2)
    position = F.interpolate(position, size=(h, w), mode="bicubic").flatten(2).mT
    proj = model.patch_embed.proj
    x = F.unfold(images, 8, stride=stride).mT @ proj.weight.flatten(1).T + proj.bias + position
    x = torch.cat([(model.cls_token + model.pos_embed[:, :1]).expand(2, 1, 24), x], dim=1)
    for block in model.blocks[:-1]:
        layer = nn.TransformerEncoderLayer(24, 2, 96, 0, "gelu", 1e-6, batch_first=True, norm_first=True).eval()
        layer.self_attn.in_proj_weight, layer.self_attn.in_proj_bias = block.attn.qkv.weight, block.attn.qkv.bias
        layer.self_attn.out_proj, layer.norm1, layer.norm2 = block.attn.proj, block.norm1, block.norm2
        layer.linear1, layer.linear2 = block.mlp.fc1, block.mlp.fc2
        x = layer(x)
    expected = model.blocks[-1].attn.qkv(model.blocks[-1].norm1(x))[:, 1:, 24:48]
    torch.testing.assert_close(model.keys(images, stride), expected, rtol=1e-4, atol=1e-5)


def test_colour_features_are_lab_minus_the_background_beside_a_constant():
    colours = torch.tensor([[1.0, 1, 1], [1, 0, 0], [0, 0, 1], [0, 0, 0], [0.5, 0.5, 0.5]]).T[..., None]
    lab = torch.tensor([[100, 0, 0], [53.24, 80.09, 67.20], [32.30, 79.19, -107.86], [0, 0, 0], [53.39, 0, 0]])
    torch.testing.assert_close(u.rgb_to_lab(colours), lab.T[..., None], rtol=0, atol=0.05)
    background = torch.rand(5)
    deviations = lab - (background @ lab) / background.sum()
    expected = F.normalize(torch.cat([deviations, torch.full((5, 1), 50.0)], dim=1), dim=1)
    torch.testing.assert_close(u.colour_features(lab, background), expected)


# Where the object may be, and where it is ----------------------------------------------------------------------


def view_of(height=224, width=296, stride=8, **fields):
    """The View of a lesion's photograph at its own size, with other fields."""
    photo, config = u.load_image(lesion(height, width)[0]), u.Config(size=min(height, width), stride=stride)
    return u.dataclasses.replace(u.view_photograph(photo, config), **fields)


@pytest.mark.parametrize(
    "marks, colour, hidden, seen",  # each a mask of pixels, or of 8 px cells
    [(~disc(80, 112, 40, 160, 224), (5, 5, 5), np.s_[:, :7], np.s_[8:12, 12:16]),  # a frame over 86 % of the image
     (np.s_[120:, 184:], (40, 90, 220), np.s_[15:, 23:], np.s_[:, :22]),  # a sticker in the corner
     (~disc(80, 112, 60, 160, 224), (40, 120, 90), np.s_[:, :5], np.s_[8:12, 12:16]),  # a drape over 68 %
     (np.s_[72:, 88:104], (120, 60, 150), np.s_[:0], np.s_[:])],  # no colour is excluded that reaches inland
)  # fmt: skip
def test_field_of_view_leaves_out_frames_stickers_and_drapes_but_nothing_inland(marks, colour, hidden, seen):
    rgb, _ = lesion(160, 224)
    rgb[marks] = colour
    valid = u.find_field_of_view(torch.from_numpy(rgb).permute(2, 0, 1) / 255)
    assert not valid[hidden].any() and valid[seen].all()


def salient(row, column, radius):
    """Unit features (20,28,37) of a disc on another background."""
    features = torch.eye(20)[disc(row, column, radius).astype(int)] + 0.5 / math.sqrt(20) * torch.randn(28, 37, 20)
    return F.normalize(features, dim=2).permute(2, 0, 1)


@pytest.mark.parametrize("row, column, radius", [(14, 8, 5), (10, 8, 4), (12, 28, 6)])
def test_the_disc_that_stands_out_is_found_of_two_the_one_at_the_point_in_the_box_or_on_both_maps(row, column, radius):
    def found(*maps, point=None, **fields):
        y0, x0, y1, x1 = u.find_disc(maps, view_of(**fields), point)
        located = disc((y0 + y1) / 16 - 0.5, (x0 + x1) / 16 - 0.5, (y1 - y0) / 16)
        return iou(located, disc(row, column, radius))

    one, other = salient(row, column, radius), salient(14, 36 - column, 5)
    both = torch.where((torch.arange(37) < 18) == (column < 18), one, other)
    box = (8 * row - 72, 8 * column - 64, 8 * row + 72, 8 * column + 64)
    assert found(one) > 0.7 and found(both, one) > 0.6
    assert found(both, point=(8 * row - 4, 8 * column - 4)) > 0.6 and found(both, search_area=box) > 0.6


def test_contrasts_of_discs_against_loops():
    values, view = torch.randn(2, 6, 7), view_of(48, 56)
    view.field_of_view[0] = 0
    to_ring, to_background = u.disc_contrasts(values, view, torch.tensor([16.0]))
    background = u.background_weights(view)
    common = (values * background).sum((1, 2)) / background.sum()
    for row, column in [(3, 3), (1, 0), (5, 6)]:
        distance, valid = np.hypot(*np.ogrid[-row : 6 - row, -column : 7 - column]), view.field_of_view.numpy() > 0
        inside, around = (distance <= 2) & valid, (distance > 2) & (distance <= 3.5) & valid
        means = [values[:, area].mean(1) for area in (inside, around)]
        seen, of_ring = inside.sum() / 13, around.sum() / 24  # patches of a whole disc and ring
        expected = (means[0] - means[1]).norm().item() * seen * math.sqrt(of_ring)
        assert to_ring[0, row, column].item() == pytest.approx(expected, rel=1e-5)
        torch.testing.assert_close(to_background[0, row, column], (means[0] - common).norm())


def test_what_features_say_of_the_position_in_the_frame_is_taken_out_and_an_object_is_left():
    view = view_of()
    y, x = (side.expand(28, 37).flatten() for side in view.position_in((0, 0, 224, 296)))
    trend = torch.stack([3 + x - 2 * y, x * x - x * y, 5 * y * y], dim=1)
    assert u.remove_trend(trend, view).abs().max() < 0.05
    spot = torch.from_numpy(disc(14, 18, 5)).flatten()[:, None] * torch.eye(3)[0]
    left = u.remove_trend(trend + spot, view)[:, 0]
    assert left[spot[:, 0] > 0].mean() > 0.9 and left[spot[:, 0] == 0].abs().mean() < 0.05


@pytest.mark.parametrize("scale, fills", [(1, True), (1.1, True), (1.5, False), (2, False), (9, False)])
def test_a_box_is_tight_or_loose_by_its_rim(scale, fills):
    half = 8 * 6.5 * scale
    area = max(0, 116 - half), max(0, 148 - half), min(224, 116 + half), min(296, 148 + half)
    assert u.box_is_tight([salient(14, 18, 6)], view_of(search_area=area)) == fills


def test_nodes_fade_with_the_distance_from_the_ellipse_and_have_no_weight_outside_the_field_of_view():
    rgb = lesion(96, 128)[0]
    rgb[:24] = 0  # a dark frame
    view, _, weights = u.extract_nodes(u.load_image(rgb), u.Config(size=96, stride=4, fade_radii=1.5), u.builtin)
    rows, columns = np.arange(4, 96 - 3, 4), np.arange(4, 128 - 3, 4)
    y0, x0, y1, x1 = view.ellipse
    rho = 2 * np.hypot((rows[:, None] - (y0 + y1) / 2) / (y1 - y0), (columns - (x0 + x1) / 2) / (x1 - x0))
    assert np.array_equal(view.inside_ellipse(), rho <= 1)
    fade = np.exp(-((rho / 1.5) ** 4) / 2) * (rows >= 24)[:, None]
    np.testing.assert_allclose(weights, np.where(fade > 1e-6, fade, 0).ravel(), rtol=1e-4)


def test_a_view_of_a_box_shows_its_surroundings_and_what_is_in_the_box_is_never_excluded():
    rgb = u.load_image(np.full((200, 300, 3), 200, np.uint8))
    rgb[:, :80, :3] = 0  # a dark frame, which reaches into the box
    view = u.view_photograph(rgb, u.Config(size=96), (60, 50, 140, 150))
    assert view.crop == (36, 20, 164, 180) and view.image.shape == (3, 96, 120)  # 1.6 times as large
    assert view.search_area == pytest.approx((18, 22.5, 78, 97.5))
    assert view.field_of_view[2:10, 3:].all() and not view.field_of_view[:, :2].any()


def test_any_photograph(caplog):
    """A red lesion, one at the border, one in a round frame, in a drape, or transparent around: each is outlined."""
    middle, edge, small, opening = (disc(60, x, r, 120, 160) for x, r in [(80, 20), (10, 30), (80, 14), (80, 46)])
    red, dark, brown = photograph(middle, (175, 45, 55)), photograph(edge, (45, 31, 29)), photograph(small)
    framed, draped = (np.where(opening[..., None], brown, np.uint8(frame)) for frame in (0, (40, 120, 90)))
    transparent = np.dstack([red, opening * np.uint8(255)])
    tight, loose, left = [60.5, 40, 100, 80], torch.tensor([16, 2, 144, 118]), np.int16([0, 30, 40, 90])
    for image, truth, how in [(red, middle, dict(stride=4)), (red, middle, dict(clusters=4)), (framed, small, {}),
                              (draped, small, {}), (red, middle, dict(box=tight)), (red, middle, dict(box=loose)),
                              (dark, edge, dict(box=left)), (dark, edge, dict(point=(10.5, 60))),
                              (transparent, middle, {})]:  # fmt: skip
        result = segment(image, size=112, **how)
        mask, labels, clusters = result.mask, result.labels, result.assignment.shape[2]
        assert iou(mask, truth) > (0.9 if truth is not small and clusters == 2 else 0.8)
        assert {*labels[mask]}.isdisjoint(labels[~mask]) and clusters == how.get("clusters", 2)
    assert not result.probability[~opening].any() and (result.image[~opening] == red[opening].mean(0) // 1).all()
    assert not caplog.messages and not segment(dark).mask.any()  # without a prompt it is taken for a frame
    assert len(caplog.messages) == 1 and re.search(r"mask is empty: .*; 1?\d % of the image is excluded", caplog.text)


@pytest.fixture(scope="module")
def dino_files(tmp_path_factory):
    """Seeded random weights in the published layouts, and what they should load as."""
    folder, model = tmp_path_factory.mktemp("weights"), u.VisionTransformer()
    nn.init.normal_(model.pos_embed, std=0.02)
    tensors = dict(model.state_dict())
    teacher = {f"backbone.{name}": tensor for name, tensor in tensors.items()} | {"head.weight": torch.zeros(3)}
    torch.save({"args": argparse.Namespace(arch="vit_small"), "teacher": teacher}, folder / "full.pth")
    torch.save(tensors, folder / "backbone.pth")
    return folder, tensors


def test_both_layouts_load_and_dino_gets_the_image_normalised(dino_files):
    for file in ("backbone.pth", "full.pth"):
        model = u.load_dino(dino_files[0] / file)
        torch.testing.assert_close(dict(model.state_dict()), dino_files[1], rtol=0, atol=0)
    view = view_of(64, 104)
    image = normalize(view.image, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])[None]
    torch.testing.assert_close(u.load_backbone("dino", dino_files[0] / file, "cpu")(view), model.keys(image)[0])


def test_a_download_is_checked_and_cached_and_a_damaged_file_is_loaded_anew(tmp_path, dino_files, monkeypatch):
    host = shutil.copy(dino_files[0] / "backbone.pth", tmp_path / "dino.pth")
    hub = tmp_path / "checkpoints" / "dino.pth"
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(u, "DINO_URL", host.as_uri())
    with pytest.raises(OSError, match="invalid hash"):
        u.load_dino(progress=False)
    assert not list(hub.parent.iterdir())  # neither the file nor a part of it
    monkeypatch.setattr(u, "DINO_SHA256", hashlib.sha256(host.read_bytes()).hexdigest())
    hub.write_bytes(b"")  # as a full disk leaves it
    for _ in range(2):  # downloaded, then from the cache
        torch.testing.assert_close(dict(u.load_dino(progress=False).state_dict()), dino_files[1])
        host.unlink(missing_ok=True)


@pytest.mark.parametrize("host", ["127.0.0.1:{}", "host:port"])  # silent, and nonsense
def test_auto_falls_back_whatever_is_wrong_and_dino_never_does(tmp_path, monkeypatch, caplog, host):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(u, "DOWNLOAD_TIMEOUT", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(u, "DINO_URL", f"http://{host.format(server.getsockname()[1])}/dino.pth")
        assert segment(lesion()[0], backbone="auto", epochs=1).backbone == "builtin"
        assert len(caplog.messages) == 1 and re.fullmatch(".*failed.*--weights FILE.*", caplog.messages[0])
        with pytest.raises(OSError, match="the download from .* failed"):
            u.load_backbone("dino", None, "cpu")


def test_bilateral_solution_against_a_dense_solve_in_any_unit_and_a_warning_where_it_is_far():
    rng = np.random.default_rng(1)
    target, confidence = rng.random((23, 31, 2)), 3 * rng.random((23, 31))
    guide = rng.integers(0, 256, (23, 31, 3)).astype(np.uint8) // 3 + lesion(23, 31)[0] // 3
    y, x = np.mgrid[:23, :31].reshape(2, -1)
    bt_601 = [[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]]
    luma, blue, red = np.float32(bt_601) @ guide.reshape(-1, 3).astype(np.float32).T
    cells = np.stack([y / 4, x / 4, luma / 9, (blue + 128) / 7, (red + 128) / 7], axis=1).astype(int)
    vertices, vertex = np.unique(cells, axis=0, return_inverse=True)
    blur = 10 * np.eye(len(vertices)) + (cdist(vertices, vertices, "cityblock") == 1)  # [1 2 1] along the five axes
    splat = np.eye(len(blur))[vertex].T  # S: (V,P)
    n, mass = np.ones(len(blur)), splat.sum(1)
    for _ in range(10):
        n = np.sqrt(n * mass / (blur @ n))
    b_hat = n[:, None] * blur * n
    system = 12 * (np.diag(b_hat.sum(1)) - b_hat) + np.diag(splat @ confidence.ravel())
    values = np.linalg.solve(system, splat @ (confidence[..., None] * target).reshape(-1, 2))
    for unit in (1, 1e-160, 1e160):
        found = bilateral.solve(target * unit, guide, confidence * unit, 4, 9, 7, smoothness=12 * unit, tolerance=1e-12)
        np.testing.assert_allclose(found / unit, values[vertex].reshape(23, 31, 2), atol=1e-8)
    with pytest.warns(RuntimeWarning, match="2 iterations"):
        bilateral.solve(target, guide, confidence, iterations=2, tolerance=1e-12)


def test_bilateral_keys_do_not_collide_at_the_largest_sizes_and_need_no_torch():
    guide = np.zeros((2, 70_000, 3), np.uint8)
    guide[0, :, 0], guide[1, :, 2] = 255, 255
    assert bilateral.BilateralGrid(guide, 1, 1, 1).vertices == 140_000
    with pytest.raises(ValueError, match="use larger sigmas"):
        bilateral.BilateralGrid(guide, 1e-9, 1, 1)
    without_torch = "import sys; sys.modules['torch'] = None; import bilateral"
    subprocess.run([sys.executable, "-c", without_torch], check=True, cwd=HERE)


TURNED = b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"  # orientation 6


@pytest.mark.parametrize(
    "name, mode, exif, tolerance",
    [("g.png", "L", TURNED, 1), ("a.png", "LA", b"II", 1), ("p.png", "P", b"nonsense", 60),
     ("c.jpg", "CMYK", TURNED, 6), ("16.tif", "I;16", b"", 1), ("f.tif", "F", b"", 1), ("1.png", "1", b"", 128)],
)  # fmt: skip
def test_every_kind_of_image_is_read_upright_and_a_hot_pixel_does_not_count(tmp_path, name, mode, exif, tolerance):
    grey = np.linspace(0, 255, 40 * 30).reshape(30, 40)
    pixels = (100 + 15 * grey).astype(np.uint16) if mode == "I;16" else grey.astype(np.uint8)  # a 12-bit camera's
    image = Image.fromarray(pixels).convert(mode, dither=Image.Dither.NONE)
    if mode in ("I;16", "F"):
        image.putpixel((39, 29), 60_000)
    image.save(tmp_path / name, **{"exif": b"Exif\0\0" + exif} if exif else {})
    rgba, grey = u.load_image(tmp_path / name), np.rot90(grey, -1 if exif == TURNED else 0)
    assert rgba.shape == (*grey.shape, 4) and rgba.dtype == np.uint8 and (rgba[..., 3] == 255).all()
    assert np.abs(rgba[..., :3] - grey[..., None]).max() <= tolerance and rgba.max() >= 254


@pytest.mark.parametrize("stride", [8, 4, 2])
def test_upsample_puts_every_patch_back_at_its_centre(stride):
    view = view_of(64, 96, stride)
    assert F.unfold(torch.zeros(1, 1, 64, 96), 8, stride=stride).shape[2] == math.prod(view.grid)
    values = u.upsample(torch.stack(torch.broadcast_tensors(*view.centres())), stride)
    expected = np.mgrid[:64, :96] + 0.5  # a linear ramp stays one
    np.testing.assert_allclose(values[:, 4:-4, 4:-4], expected[:, 4:-4, 4:-4], rtol=1e-5)


def test_a_long_image_is_resized_by_its_longer_side_and_the_smallest_are_segmented():
    for shape, resized in ((200, 300), (64, 96)), ((64, 2000), (8, 256)), ((900, 90), (256, 24)):
        assert u.resize_image(np.zeros((*shape, 3), np.uint8), 64).shape == (3, *resized)
    for height, width in (8, 8), (9, 40), (16, 12):
        assert segment(lesion(height, width)[0], point=(width - 1, 0)).mask.shape == (height, width)


def test_clean_mask_fills_holes_and_keeps_the_largest_pieces_not_the_background():
    mask = np.zeros((12, 12), bool)
    mask[1:11, 1:9] = True  # larger than the background
    mask[4:6, 4:6] = False
    mask[2:4, 10:12] = mask[8, 11] = True
    assert [u.clean_mask(mask, components).sum() for components in (1, 2, 0)] == [80, 84, 85]


@pytest.mark.parametrize("blur, similarity_weight", [(3.0, 0.0), (0.0, 16.0)])
def test_the_soft_mask_is_the_solution_of_the_bilateral_solver_blurred(blur, similarity_weight):
    view = view_of(96, 96, ellipse=(21, 19, 75, 67))
    x = (view.inside_ellipse() + torch.rand(12, 12)).flatten() / 2
    config = u.Config(mask_blur=blur, similarity_weight=similarity_weight, bilateral_lambda=5)
    arguments = view, torch.stack([1 - x, x], dim=1), torch.eye(144), torch.ones(144)
    raw_config = u.dataclasses.replace(config, refine=False, mask_blur=0.0)
    raw, soft = (u.make_mask(*arguments, c)["probability"] for c in (raw_config, config))
    confidence = 2 * np.abs(np.log(raw / (1 - raw))) if similarity_weight else 0.999
    expected = ndimage.gaussian_filter(bilateral.solve(raw, lesion(96, 96)[0], confidence, smoothness=5), blur)
    np.testing.assert_allclose(soft, expected.clip(0, 1), atol=1e-6)


@pytest.mark.parametrize("prompt, radius", [("box", 1.1), ("point", 1.4), ("", 1.6)])
def test_a_patch_is_judged_by_its_mean_similarity_to_object_and_background_and_by_its_position(prompt, radius):
    view = view_of(80, 80, ellipse=(20, 20, 60, 60), prompt=prompt)
    f, weights, expected = F.normalize(torch.randn(100, 4), dim=1), torch.rand(100) + 0.1, torch.zeros(100)
    weights[7] = 0  # a node without edges
    x = (torch.rand(100) + view.inside_ellipse().flatten()) / 2
    for i in {*range(100)} - {7}:
        similar = [f[i] @ f[j] if f[i] @ f[j] > 0.3 else 0.0 for j in range(100)]
        inside, outside = (np.average(similar, weights=weights * c) for c in (x, 1 - x))
        prior = u.POSITION_PRIOR[prompt][0] * max(-1, 1 - view.distance_in_radii().flatten()[i] / radius)
        expected[i] = float(1 / (1 + math.exp(-prior) / (inside / outside) ** 3))
    graph, config = u.build_graph(f, 0.3, weights), u.Config(similarity_weight=3)
    order, background, foreground = u.select_foreground(view, torch.stack([x, 1 - x], 1), graph, weights, config)
    assert background == 1 and torch.equal(order[:, 1], x)
    torch.testing.assert_close(foreground, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_masks_and_losses_on_cuda_where_steps_are_captured_agree_with_the_cpu():
    rgb, config = lesion()[0], u.Config(size=96)
    cpu, cuda = (u.segment(rgb, config, backbone="builtin", device=device) for device in ("cpu", "cuda"))
    assert iou(cpu.mask, cuda.mask) > 0.98
    np.testing.assert_allclose(cpu.fit.losses[:9], cuda.fit.losses[:9], rtol=1e-3, atol=1e-6)


def test_of_two_lesions_one_is_found_or_both_or_the_one_pointed_at_or_boxed():
    rgb, truth = lesion()
    both, left = np.hstack([rgb, rgb[:, ::-1]]), np.hstack([truth, truth & False])
    right = left[:, ::-1]
    assert ndimage.label(segment(both).mask)[1] == 1
    assert iou(segment(both, keep_components=2, fade_radii=5).mask, left | right) > 0.8
    assert iou(segment(both, point=(58, 48)).mask, left) > 0.85 < iou(segment(both, point=(198, 48)).mask, right)
    x0, y0, x1, y1 = box = Image.fromarray(left).getbbox()
    boxed = segment(both, box=box)
    assert iou(boxed.mask, left) > 0.9
    boxed.probability[y0:y1, x0:x1] = boxed.labels[y0:y1, x0:x1] = 0
    assert not boxed.probability.any() and not boxed.labels.any()  # nothing outside


@pytest.mark.parametrize("prompt", [dict(point=(math.nan, 5)), dict(point=5), dict(box=(5, 5, 5, 9)), dict(box=[]),
                                    dict(box=(0, 0, 200, 50)), dict(point=(5, 5), box=(0, 0, 50, 50))])  # fmt: skip
def test_a_prompt_that_cannot_be_is_refused_in_one_line(prompt):
    with pytest.raises(ValueError, match=r"inside the image, 128 x 96; got.*\Z"):
        segment(lesion()[0], **prompt)


def test_a_mask_does_not_depend_on_the_torch_of_the_caller(dino_files, request):
    request.addfinalizer(lambda: torch.set_default_dtype(torch.float32))
    autocast, meta = torch.autocast("cpu", torch.bfloat16), torch.device("meta")
    kwargs, masks = {"backbone": "dino", "weights": dino_files[0] / "full.pth", "device": "cpu"}, []
    for caller in (torch.enable_grad(), torch.no_grad(), torch.inference_mode(), autocast, meta):
        u.load_backbone.cache_clear()  # the weights are loaded in it too
        with caller:
            masks.append(u.segment(lesion()[0], u.Config(size=64, epochs=9), **kwargs).probability)
        assert np.array_equal(masks[-1], masks[0])
        assert torch.get_default_dtype() == (torch.float64 if masks[1:] else torch.float32)  # left as it was
        torch.set_default_dtype(torch.float64)


def test_a_backbone_of_ones_own_is_used_beside_the_colour():
    rgb, hidden = lesion()[0], disc(40, 90, 20, 96, 128)  # which the colours do not show

    def extract(view):
        view.image.zero_()  # it gets a copy
        y, x = view.centres()
        return torch.eye(2)[hidden[y.long(), x.long()].flatten().astype(int)] + 0.1

    for image, colour in (rgb, 0), (np.full_like(rgb, 128), 0.7):  # without any contrast
        result = segment(image, extract, size=96, refine=False, colour=colour)
        assert iou(result.mask, hidden) > 0.7 and result.backbone == "extract" and result.view.image.all()


# README and command line ---------------------------------------------------------------------------------------


def test_the_python_of_the_readme_runs_and_its_flags_exist(tmp_path, monkeypatch):
    text = (HERE / "README.md").read_text()
    in_python, backbone_file = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Path("assets").symlink_to(HERE / "assets")
    with mock.patch.object(u, "load_backbone", lambda *_: u.builtin):  # without the network
        exec(in_python, names := {})
    assert names["result"].mask.shape == Image.open("overlay.png").size[::-1]
    Path("resnet.py").write_text(backbone_file.replace('weights="DEFAULT"', ""))  # random ones
    assert segment(lesion()[0], backbone="resnet.py", epochs=5).features.shape[1] == 1024 + 4
    flags = {flag for parser in (u.build_parser(), evaluator.build_parser()) for flag in parser._option_string_actions}
    assert {*re.findall(r"--[a-z][a-z0-9-]+", text)} <= flags | {"--nproc-per-node"}
    with pytest.raises(ValueError, match="epochs"):
        u.Config(epochs=True)
    config = u.parse_args(u.build_parser(), ["a.png", "-o", "b.png", "--preset", "paper", "--mask-blur", "7"])[1]
    assert config == u.Config(**u.PRESETS["paper"] | {"mask_blur": 7.0})


def contents(path):
    return {p.name: p.read_bytes() for p in path.iterdir()}


def torchrun(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)


def test_a_folder_with_all_outputs_and_failures_then_skipped_then_the_same_from_torchrun(tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")  # alone it changes nothing
    (folder := tmp_path / "in").mkdir()
    for seed, name in enumerate(["0.png", "1.png", "2.JPG"]):
        Image.fromarray(lesion(seed=seed)[0]).save(folder / name, quality=95)
    for name in ("1b.png", "a.dcm", ".hidden.png"):
        (folder / name).touch()
    out, extras = tmp_path / "out", ["--probability", "--labels", "--overlay", "--explain", "--box", "20,12,96,84.5"]
    arguments = [str(folder), *QUICK, *extras, "--shared-epochs", "3", "-o"]
    assert u.main([*arguments, str(out)]) == 1
    kinds, before = ["", "_probability", "_labels", "_overlay", "_explain"], contents(out)
    assert before.keys() == {f"{name}{kind}.png" for name in "012" for kind in kinds} and len(caplog.messages) == 2
    assert caplog.messages[0].startswith(f"{folder}: 1 entries are skipped") and "1b.png: " in caplog.messages[1]
    for name in "012":
        mask, labels = (np.array(Image.open(out / f"{name}{kind}.png")) for kind in ("", "_labels"))
        assert iou(mask > 0, lesion()[1]) > 0.9 and np.array_equal(labels, mask > 0)
    assert Image.open(out / "0_overlay.png").size == (128, 96)
    with mock.patch.object(Image.Image, "save", lambda _, path, **kwargs: path.write_bytes(b"half") / 0):
        assert u.main([*arguments, str(out)]) == 1 and contents(out) == before
    (out / "1.png").unlink()
    (out / "2.png").write_text("kept")
    assert u.main([*arguments, str(out), "--skip-existing"]) == 1
    assert contents(out) == before | {"2.png": b"kept"}
    done = torchrun(HERE / "unsegmedgat.py", *arguments, tmp_path / "ranks")
    assert done.returncode == 1 and "1b.png: it cannot be read" in done.stderr and len(done.stdout.splitlines()) == 3
    assert contents(tmp_path / "ranks") == before


def test_an_interrupt_ends_in_one_line_and_leaves_whole_files(tmp_path, photo, request):
    os.mkfifo(tmp_path / "endless.png")  # it waits for what never comes
    command = [sys.executable, HERE / "unsegmedgat.py", photo, tmp_path / "endless.png", "-o", tmp_path / "out", *QUICK]
    heed = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    request.addfinalizer(process.kill)
    assert process.stdout.readline().startswith("[1/2]")
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=100)[1] == "ERROR: interrupted; what is written is whole\n"
    assert process.returncode == 130 and [*contents(tmp_path / "out")] == ["photo.png"]


BACKBONE = "import beside\ndef extract(view): return view.image[0, 4::8, 4::8].reshape(-1, 1)"
FRAMES = [Image.new("L", (9, 9), grey) for grey in (0, 99)]
BAD_FILES = {  # the exit code, the flag that it is for, how it is made, and the message
    "cut": (1, "", lambda path: path.write_bytes(path.with_name("photo.png").read_bytes()[:3000]), "DICOM, NIfTI and"),
    "absent": (1, "", lambda path: None, "No such file"),
    "animated": (1, "", lambda path: FRAMES[0].save(path, "GIF", save_all=True, append_images=FRAMES[1:]), "2 frames"),
    "large": (1, "", lambda path: path.write_text("P4 15000 12000 "), "exceeds limit"),  # a header
    "transparent": (1, "", lambda path: Image.new("RGBA", (9, 9)).save(path, "PNG"), "transparent everywhere"),
    "no image": (2, "", lambda path: path.mkdir(), "0 images were found"),
    "code": (2, "--weights", lambda path: path.write_bytes(b"cbuiltins\nprint\n(S'run'\ntR."), "load failed): "),
    "network": (2, "--weights", lambda path: torch.save({"conv1.weight": torch.zeros(6, 3)}, path), "cls_token"),
    "rows": (1, "--backbone", lambda path: path.write_text(BACKBONE + "[1:]"), "(88,C), for 88"),
    "nan": (1, "--backbone", lambda path: path.write_text(BACKBONE + " * float('nan')"), "must return finite"),
    "no extract": (2, "--backbone", lambda path: path.write_text("x = 1"), "must define extract(view)"),
}


@pytest.mark.parametrize("code, flag, write, says", BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_ends_in_one_clear_line_and_no_output(tmp_path, photo, caplog, capsys, code, flag, write, says):
    bad, auto = tmp_path / "bad.py", ["--backbone", "auto"] if flag == "--weights" else []
    (tmp_path / "beside.py").touch()
    write(bad)
    arguments = [*QUICK, *auto, str(photo), flag, str(bad)] if flag else [*QUICK, str(bad)]
    assert u.main([*arguments, "-o", str(tmp_path / "mask.png")]) == code and not (tmp_path / "mask.png").exists()
    assert len(caplog.messages) == 1 and "\n" not in caplog.messages[0] and capsys.readouterr().out == ""
    assert says in caplog.messages[0]


def test_a_constant_image_gets_an_empty_mask_and_a_word(tmp_path, caplog):
    noise = np.random.default_rng(0).integers(0, 2, (48, 64, 3), np.uint8)
    Image.fromarray(200 + noise).save(tmp_path / "flat.jpg")  # which has a level or two more
    flags = ["--clusters", "3", "--explain", "--overlay", "--labels", "--probability"]
    assert u.main([str(tmp_path / "flat.jpg"), "-o", str(tmp_path / "mask.png"), *QUICK, *flags]) == 0
    assert len(caplog.messages) == 1 and "flat.jpg: the mask is empty: no communities" in caplog.text
    assert not any(np.array(Image.open(tmp_path / f"mask{kind}.png")).any() for kind in ("", "_labels", "_probability"))


@pytest.mark.parametrize(
    "arguments, says",
    [("{photo} -o {dir}/mask.jpg", "ends in .png"), ("{photo} -o {dir}/nowhere/mask.png", "no such folder"),
     ("{photo} -o {photo}", "overwrite an input"), ("{photo} {dir}/photo.jpg -o {dir}/out", "another output"),
     ("{photo} {photo} -o {dir}/mask.png", "a folder for several"), ("{photo} -o {dir}", "holds input images"),
     ("{one} --point 9,9 --point 12,12", "one --point"), ("{one} --backbone builtin --weights x.pth", "dino backbone"),
     ("{one} --tau nan", "tau must be"), ("{one} --clusters 1", "clusters must be"), ("{one} --lr inf", "lr must be"),
     ("{one} --widths 8.0", "widths must be"), ("{one} --heads 3", "multiples of heads"),
     ("{one} --shared-epochs 60", "below epochs")],
)  # fmt: skip
def test_wrong_use_is_refused_in_one_line_before_anything_is_written(tmp_path, photo, caplog, arguments, says):
    content, one = photo.read_bytes(), f"{photo} -o {tmp_path}/mask.png"
    assert u.main(arguments.format(photo=photo, dir=tmp_path, one=one).split()) == 2
    assert len(caplog.messages) == 1 and says in caplog.messages[0] and "\n" not in caplog.messages[0]
    assert photo.read_bytes() == content and [*tmp_path.iterdir()] == [photo]


def test_all_images_are_done_whatever_the_terminal_cannot_show_or_nobody_reads(tmp_path, photo):
    photos = [shutil.copy(photo, tmp_path / name) for name in ("\u03b1.png", "b.png")]
    read, write = os.pipe()
    os.close(read)  # as `| head -0`
    command = [sys.executable, HERE / "unsegmedgat.py", *photos, "-o", tmp_path / "out", *QUICK]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and done.stderr == b"" and len(contents(tmp_path / "out")) == 2


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
    expected = {"iou": both / either, "dice": 2 * both / (both + either), "precision": both / mask.sum(),
                "recall": both / truth.sum(), "hd95": np.percentile(distances, 95) / math.hypot(14, 17) * 100,
                "nsd": (distances <= 1.5).mean()}  # fmt: skip
    assert evaluator.metrics(mask, truth, tolerance=150 / math.hypot(14, 17)) == pytest.approx(expected)
    empty, perfect = mask & False, dict.fromkeys(expected, 1) | {"hd95": 0}
    assert evaluator.metrics(empty, truth) == dict.fromkeys(expected, 0) | {"hd95": 100}
    assert evaluator.metrics(empty, empty) == evaluator.metrics(truth, truth) == perfect


def test_bootstrap_interval_covers_the_mean_and_resamples_whole_groups():
    values = np.random.default_rng(0).normal(0.7, 0.1, 400)
    low, high = evaluator.bootstrap_interval(values)
    assert low < values.mean() < high and math.isclose((high - low) / 2, 1.96 * 0.1 / 20, rel_tol=0.15)
    doubled = np.repeat(values, 2)  # frames of one sequence, all the same: no more certain than the sequences
    assert evaluator.bootstrap_interval(doubled, np.repeat(np.arange(400), 2)) == pytest.approx((low, high))
    assert evaluator.bootstrap_interval(values[:2], ["a", "a"]) is None  # unknown


def test_gcn_and_arma_layers_are_the_papers_formulas():
    a, x = random_graph(6, dtype=torch.float32), torch.randn(6, 4)
    d = a.sum(1)
    propagation = torch.tensor([[a[i, j] / math.sqrt(d[i] * d[j]) for j in range(6)] for i in range(6)])
    torch.testing.assert_close(evaluator.normalise(a), propagation)
    gcn, arma = evaluator.GCNLayer(4, 3, F.silu, skip=True), evaluator.ARMALayer(4, 3, F.silu)
    torch.testing.assert_close(gcn(x, propagation), F.silu(propagation @ gcn.W(x) + gcn.V(x)))
    states = [F.silu(propagation @ x @ first + x @ v) for first, v in zip(arma.first, arma.V)]
    twice = [F.silu(propagation @ state @ w + x @ v) for state, w, v in zip(states, arma.W, arma.V)]
    torch.testing.assert_close(arma(x, propagation), sum(twice) / 2)


def test_mincut_loss_is_its_closed_form_where_nothing_is_cut():
    a = torch.block_diag(torch.ones(3, 3), torch.ones(3, 3))  # two components: a perfect cut
    two, one = torch.eye(2)[torch.arange(6) // 3], torch.eye(2)[torch.zeros(6, dtype=int)]
    assert evaluator.mincut_loss(two, a) == pytest.approx(-1, abs=1e-6)
    norm = math.hypot(1 - 1 / math.sqrt(2), 1 / math.sqrt(2))  # of diag(1, 0) - I / sqrt(2)
    assert evaluator.mincut_loss(one, a) == pytest.approx(-1 + norm, abs=1e-6)


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
    extra = [u.fit_collective([lambda: (features, ones)], u.Config(shared_epochs=5))] if name == "unsegmedgatc" else []
    odd = torch.eye(n), few.fill_diagonal_(1), torch.zeros(n, n), torch.ones(n, n)
    for adjacency in (*odd, u.build_graph(features, 0.3)):
        assignment = evaluator.METHODS[name](features, adjacency, config, *extra)
        assert assignment.shape == (n, clusters) and assignment.isfinite().all()
        torch.testing.assert_close(assignment.sum(1), ones)
    found = assignment.argmax(1).tolist()  # in the last graph
    assert len({*zip(found, group.tolist())}) == len({*found}) == clusters  # the same parts, whatever their names


@pytest.fixture
def dataset(tmp_path):
    """Three small images and their masks."""
    images, masks = tmp_path / "images", tmp_path / "masks"
    for folder in images, masks:
        folder.mkdir()
    for n, ending in enumerate(["_segmentation.png", "_lesion.bmp", ".png"]):
        rgb, truth = lesion(seed=n)
        Image.fromarray(rgb).save(images / f"s{n}_1.jpg", quality=95)
        Image.fromarray(truth.astype(np.uint8) * (1 if n == 0 else 255)).save(masks / f"s{n}_1{ending}")
    return images, masks


@pytest.fixture
def score(dataset, capsys):
    """The evaluator's command line on these images: its exit code, what it prints, and the table in it, as numbers."""

    def run(*flags):
        code = evaluator.main([*map(str, dataset), *QUICK, "--quiet", *flags])
        text, table = capsys.readouterr().out, {}
        lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
        for row, *cells in lines[2:]:
            table[row] = {column: float(cell.split()[0]) for column, cell in zip(lines[0][1:], cells)}
        return code, text, table

    return run


def picture(values, mode=None):
    """Values (H,W) or (H,W,3) as a PIL image of a mode; without one of 8 bits."""
    kind = {"I;16": np.uint16, "F": np.float32}.get(mode, np.uint8)
    return Image.fromarray(np.asarray(values).astype(kind)).convert(mode)


DISC, DISTANCE = disc(48, 64, 30, 96, 128), np.hypot(*np.ogrid[-48:48, -64:64])


@pytest.mark.parametrize(
    "name, mode, values",
    [("m.png", "L", 255 * DISC), ("m.png", "L", 1 * DISC), ("m.jpg", "L", 255 * DISC), ("m.webp", "L", 255 * DISC),
     ("m.png", "1", 255 * DISC), ("m.png", "P", 255 * DISC), ("m.png", "I;16", 51000 * DISC), ("m.tif", "F", 1 * DISC),
     ("m.png", "L", 100 + 100 * DISC), ("m.png", "L", 1 + DISC), ("m.png", "RGB", 255 * DISC[..., None] * [1, 0, 0]),
     ("m.png", "L", np.rint(255 / (1 + np.exp(2 * DISTANCE - 60))))],
)  # fmt: skip
def test_the_brighter_value_of_a_mask_is_the_object_with_half_of_its_rim(tmp_path, name, mode, values):
    picture(values, mode).save(tmp_path / name)
    assert np.array_equal(evaluator.load_mask(tmp_path / name, (96, 128)), DISC)
    with pytest.raises(ValueError, match="128 x 96"):
        evaluator.load_mask(tmp_path / name, (128, 96))


@pytest.mark.parametrize(
    "image, says",
    [(picture(255 * disc(48, 64, 34, 96, 128) - 254 * DISC), "3 values .0, 1, 255., not two"),  # a rim of 255
     (u.palette_image((1 * DISC + disc(48, 64, 15, 96, 128)).astype(np.uint8)), "3 values"),  # classes by colour
     (picture(255 / (1 + np.exp((DISTANCE - 30) / 8))), "values"),  # probabilities
     (picture(np.where(DISTANCE < 9, np.nan, DISC), "F"), "values"), (picture(lesion()[0]), "not two")],
)  # fmt: skip
def test_an_image_that_is_no_mask_is_refused_with_its_values(tmp_path, image, says):
    image.save(tmp_path / "m.tif")
    with pytest.raises(ValueError, match=f"m.tif: .*{says}"):
        evaluator.load_mask(tmp_path / "m.tif", (96, 128))


def test_images_pair_with_masks_of_the_same_stem_or_one_with_a_suffix(tmp_path, caplog):
    images, masks, both = tmp_path / "images", tmp_path / "masks", tmp_path / "both"
    for path in (images / "a.png", images / "sub" / "a_lesion.png", images / "b_lesion.jpg", images / "alone.png",
                 masks / "a_mask.png", masks / "a_lesion.png", masks / "b_lesion_mask.png", masks / "other_mask.png",
                 both / "c.png", both / "c_mask.png", tmp_path / "odd" / "z.png"):  # fmt: skip
        path.parent.mkdir(exist_ok=True, parents=True)
        path.touch()
    names = {image.stem: mask.name for image, mask in evaluator.pair_files(images, masks).values()}
    assert names == {"a": "a_mask.png", "a_lesion": "a_lesion.png", "b_lesion": "b_lesion_mask.png"}
    assert all(f"{name}: has no partner" in caplog.text for name in ("alone.png", "other_mask.png"))
    assert evaluator.pair_files(both, both) == {"c": (both / "c.png", both / "c_mask.png")}
    (masks / "a_mask_1.png").touch()
    for folders, says in (((images, masks), "unite the masks of one image"), ((masks, both / "no"), "no such folder"),
                          ((both, tmp_path / "odd"), "no image and mask have")):  # fmt: skip
        with pytest.raises(ValueError, match=says):
            evaluator.pair_files(*folders)


def test_one_whole_run_with_every_method_and_output(score, tmp_path):
    flags = ["--sheet", str(tmp_path / "s.png"), "--reference", "isic2018", "--tolerance", "100"]
    with mock.patch.object(u, "fit", wraps=u.fit) as fit:
        code, text, table = score(*flags, "--group-by", "^(s)")
    assert [call.args[3] is None for call in fit.mock_calls[:6]] == [True, False] * 3  # unsegmedgatc: shared parameters
    rows = [*evaluator.METHODS, "located ellipse", "everything foreground", "centred ellipse"]
    assert code == 0 and [*table] == rows + [f"{row} (published)" for row in evaluator.PUBLISHED]
    assert "**blind** protocol" in text and "n = 3 images in 1 groups" in text and " [" not in text  # no intervals
    ours, located = table["unsegmedgat"], table["located ellipse"]
    assert ours["mIoU"] > 80 and ours["NSD"] == 100 and table["DSM (published)"] == {"mIoU": 72.2, "Dice": 81.71}
    assert located["mIoU minus first row's"] == pytest.approx(located["mIoU"] - ours["mIoU"], abs=0.11)  # rounded
    assert Image.open(tmp_path / "s.png").size == (996, 348)  # three images in a row


def test_what_fails_counts_as_zero_and_is_named_and_the_rest_is_done(dataset, score, tmp_path, caplog):
    shutil.copytree(dataset[1], tmp_path / "made")
    (tmp_path / "made" / "s2_1.png").unlink()
    (dataset[0] / "s0_1.jpg").write_text("broken")
    flags = ["--methods", "dsm", "--predictions", f"made={tmp_path / 'made'}"]
    code, text, table = score(*flags)
    assert code == 1 and " [" in text and [table[row]["failed"] for row in ("dsm", "made")] == [1, 2]
    assert table["made"]["mIoU"] == 33.3 and table["made"]["HD95"] == 66.7 and table["dsm"]["mIoU"] < 66.7
    assert "s0_1.jpg: it cannot be read" in caplog.text and "s2_1.jpg, made: there is no" in caplog.text
    Image.new("L", (128, 96)).save(dataset[1] / "s2_1.png")  # an empty truth
    assert score(*flags, "--protocol", "box")[2]["dsm"]["failed"] == 2 and "no prompt can be taken" in caplog.text


def test_a_killed_run_resumes_and_other_files_are_left(score, tmp_path):
    file = tmp_path / "scores.csv"
    flags = ["--limit", "2", "--epochs", "5", "--csv", str(file), "--methods", "dsm,vit-kmeans"]
    code, printed, _ = score(*flags)
    lines = (text := file.read_text()).splitlines(keepends=True)
    assert code == 0 and {line.split(",")[1] for line in lines[1:]} == {"s0_1", "s2_1"}  # evenly spread
    failed = text.replace(lines[3], lines[3].replace(",\n", ",it failed\n"))
    for begun in lines[0], "".join(lines[:5]) + lines[5][:20], failed, text:  # killed, or a failure, or all was done
        file.write_text(begun)
        assert score(*flags, "--resume")[:2] == (0, printed)
        assert sorted(file.read_text().splitlines(keepends=True)) == sorted(lines)
    assert score(*flags[:-1], "dsm,vit-kmeans,mincutpool", "--resume")[0] == 0  # methods can be added
    text = file.read_text()
    assert text.count("\n") == len(lines) + 2
    for other in "", "--resume --tau 0.4", "--resume --tolerance 3", "--resume --squash", "--resume --limit 1":
        assert score(*flags, *other.split())[0] == 2 and file.read_text() == text  # without --resume; other settings
    file.write_text("name,age\nAda,36")  # another program's
    assert score(*flags, "--resume")[0] == 2 and file.read_text() == "name,age\nAda,36"


def test_two_processes_of_torchrun_print_the_same_table(dataset, score, tmp_path):
    (dataset[0] / "s1_1.jpg").write_text("broken")
    flags = ["--methods", "unsegmedgat,unsegmedgatc", "--csv"]
    code, text, table = score(*flags, str(tmp_path / "1.csv"))
    done = torchrun(HERE / "eval.py", *dataset, *QUICK, "--quiet", *flags, tmp_path / "2.csv")
    assert done.returncode == code == 1 and done.stdout == text and table["unsegmedgatc"]["failed"] == 1
    assert sorted((tmp_path / "1.csv").open()) == sorted((tmp_path / "2.csv").open())


@pytest.mark.parametrize(
    "flags, order, given, seen",
    [("blind", ["fit", "load_mask"], {}, (96, 128)),
     ("point", ["load_mask", "fit"], {"point": (58, 48)}, (96, 128)),
     ("box --jitter 3", ["load_mask", "fit"], {"box": (26, 22, 90, 75)}, (96, 128)),
     ("official", ["load_mask", "fit"], {}, (93, 104)),
     ("official --squash", ["load_mask", "fit"], {}, (64, 64))],
)  # fmt: skip
def test_what_protocols_give_away(score, tmp_path, monkeypatch, flags, order, given, seen):
    (tmp_path / "inverse").mkdir()
    for n in range(3):
        Image.fromarray(~lesion()[1]).save(tmp_path / "inverse" / f"s{n}_1.png")
    calls, protocol = mock.Mock(), flags.split()[0]
    for module, name in (u, "extract_nodes"), (u, "fit"), (evaluator, "load_mask"):
        calls.attach_mock(mock.Mock(wraps=getattr(module, name)), name)
        monkeypatch.setattr(module, name, getattr(calls, name))
    code, text, _ = score("--methods", "unsegmedgat", "--protocol", *flags.split())
    assert code == 0 and ("USES GROUND TRUTH" in text) == (protocol != "blind")
    assert [name for name, *_ in calls.mock_calls if name != "extract_nodes"] == order * 3
    for _, (photo, *_), prompts in calls.extract_nodes.mock_calls:
        assert photo.shape[:2] == seen and prompts.keys() == given.keys()
        moved = np.abs([np.subtract(prompts[name], given[name]) for name in given]).max(initial=0)
        assert 0 < moved <= 3 if "jitter" in flags else moved == 0
    table = score("--methods", "dsm", "--protocol", protocol, "--predictions", f"x={tmp_path / 'inverse'}")[2]
    assert table["x"]["mIoU"] == 100 * (protocol == "official")  # the better of mask and inverse
    if protocol == "box":  # objects are ellipses
        assert table["everything foreground"]["mIoU"] == pytest.approx(100 * math.pi / 4, rel=0.02)
        assert table["inscribed ellipse"]["mIoU"] > 98


def test_inexact_prompts_are_scaled_and_moved_inside_the_image():
    moved = {evaluator.inexact((2, 30), 1, 5, (40, 40), seed) for seed in range(20)}
    assert len(moved) > 9 and all(0 <= x <= 7 and 25 <= y <= 35 for x, y in moved)
    loose = [evaluator.inexact((40, 30, 60, 50), factor, 0, (100, 200), 0) for factor in (1, 1.5, 100, 0.01)]
    assert loose == [(40, 30, 60, 50), (35, 25, 65, 55), (0, 0, 200, 100), (50, 40, 51, 41)]  # the last is not empty
    around = evaluator.trivial_baselines("point", (40, 60), (30, 20))["disc at the point"]
    assert around[20, 30] and around.sum() == pytest.approx(math.pi * (0.15 * 40) ** 2, rel=0.1)


@pytest.mark.parametrize(
    "flags, says",
    [("--methods sam", "choose from unsegmedgat"), ("--predictions sam", "NAME=FOLDER"), ("--resume", "--csv"),
     ("--predictions dsm=x", "that no row has"), ("--predictions a=x --predictions a=y", "that no row has"),
     ("--jitter 3", "--protocol point or box"), ("--loosen 2 --protocol point", "--protocol box"), ("--limit 0", "1"),
     ("--squash --protocol box", "--no-squash"), ("--group-by (x)", "a group ( )"), ("--group-by (", "a group"),
     ("--csv .", "must be a file"), ("--csv nowhere/a.csv", "that exists"), ("--sheet {images}/a.png", "outside of")],
)  # fmt: skip
def test_wrong_use_of_the_evaluator(dataset, score, caplog, flags, says):
    assert score(*flags.format(images=dataset[0]).split())[0] == 2 and says in caplog.messages[-1]


def test_the_benchmark_times_each_stage():
    line = evaluator.bench_line(u.Config(size=56))
    assert re.fullmatch(r"49 patches: epoch \S+ ms, fit \S+ s, mask \S+ ms", line)
