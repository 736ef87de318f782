from itertools import pairwise

import pytest
import timm
import torch

from helpers import missing
from svit.layers import SuperTokenAttention
from svit.ops import sample
from svit.visualize import (
    Association,
    attention_weights,
    borders,
    draw_attention,
    draw_iterations,
    draw_super_tokens,
    last_of_stages,
    mean_colours,
    watch,
)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return timm.create_model("test_svit").train()


@pytest.fixture
def layers(model):
    with watch(model) as layers:
        model(torch.randn(1, 3, 64, 96))
    return layers


def test_layers_are_watched_in_the_forward_pass(model):
    image = torch.randn(1, 3, 50, 70)
    with watch(model) as layers:
        assert not model.training
        seen = model(image)
        assert not seen.requires_grad
    torch.testing.assert_close(seen, model.eval()(image))
    assert [watched.name for watched in layers] == [f"stages.{i}.blocks.0.attn" for i in range(4)]
    assert [(w.layer.cell, tuple(w.x.shape[-2:])) for w in layers] == [
        ((4, 4), (13, 18)),
        ((2, 2), (7, 9)),
        ((1, 1), (4, 5)),
        ((1, 1), (2, 3)),
    ]
    s, q = sample(layers[0].x.permute(0, 2, 3, 1), (4, 4))
    tokens, found = layers[0].sample()
    assert torch.equal(tokens.permute(0, 2, 3, 1), s)
    assert torch.equal(found.q, q[0])
    assert (found.cell, found.size) == ((4, 4), (13, 18))


def test_watching_leaves_no_trace(model):
    with pytest.raises(ValueError, match="one image at a time, got 2"), watch(model):
        model(torch.randn(2, 3, 32, 32))
    assert model.training
    assert not any(m._forward_pre_hooks for m in model.modules() if isinstance(m, SuperTokenAttention))


def test_the_last_layer_of_each_stage():
    model = timm.create_model("svit_nano_32")
    with watch(model) as layers:
        model(torch.randn(1, 3, 32, 32))
    assert len(layers) == 9
    stages = last_of_stages(layers)
    assert [*stages] == ["stage 1", "stage 2", "stage 3", "stage 4"]
    assert [w.name for w in stages.values()] == [f"stages.{i}.blocks.{j}.attn" for i, j in enumerate((0, 1, 3, 1))]
    assert [w.samples for w in stages.values()] == [True, True, False, False]


def known() -> Association:
    q = torch.zeros(2, 2, 9, 4)
    q[..., 4, :] = 1.0  # every pixel belongs to its own cell
    q[0, 0, 4, 3], q[0, 0, 5, 3] = 0.25, 0.75  # but one to the cell on the right
    return Association(q, (2, 2), (3, 4))


def test_what_a_known_association_tells():
    found = known()
    assert found.assignment().tolist() == [[0, 0, 1, 1], [0, 1, 1, 1], [2, 2, 3, 3]]
    assert found.cells().tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3]]
    assert found.weights(0, 1).tolist() == [[0, 0, 1, 1], [0, 0.75, 1, 1], [0, 0, 0, 0]]
    spread = found.spread(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert spread.tolist() == [[1, 1, 2, 2], [1, 1.75, 2, 2], [3, 3, 4, 4]]


@pytest.mark.parametrize(
    ("point", "owner"), [((0, 0), (0, 0)), ((0.3, 0.5), (0, 1)), ((0.2, 0.5), (0, 0)), ((1, 1), (1, 1))]
)
def test_owner_of_a_point(point, owner):
    assert known().owner(point) == owner


@pytest.mark.parametrize("point", [(-0.1, 0.5), (0.5, 1.01), (float("nan"), 0)])
def test_a_point_outside(point):
    with pytest.raises(ValueError, match="point: expected two fractions between 0 and 1"):
        known().owner(point)


def test_weights_sum_to_what_stays_inside(layers):
    found = layers[0].association()
    hh, ww = found.q.shape[:2]
    shares = torch.stack([found.weights(i, j) for i in range(hh) for j in range(ww)])
    assert torch.equal(shares.argmax(0), found.assignment())
    inner = shares.sum(0)[4:-4, 4:-4]  # around inner cells no neighbour is missing
    torch.testing.assert_close(inner, torch.ones_like(inner))
    with pytest.raises(ValueError, match=r"expected a super token of the 4 x 6 grid, got \(4, 0\)"):
        found.weights(4, 0)


def test_pixels_without_cells_own_themselves(layers):
    found = layers[2].association()
    assert found.size == (4, 6)
    assert torch.equal(found.assignment(), torch.arange(24).view(4, 6))
    values = torch.randn(4, 6)
    assert torch.equal(found.spread(values), values)


@pytest.mark.parametrize("index", [1, 2])
def test_attention_weights_are_those_of_the_layer(layers, index):
    layer = layers[index].layer
    tokens, _ = layers[index].sample()
    hh, ww = tokens.shape[-2:]
    with torch.no_grad():
        layer.qkv.weight.mul_(5)  # far from uniform
    weights = attention_weights(layer, tokens)
    assert weights.shape == (layer.num_heads, hh * ww, hh * ww)
    assert weights.std(-1).min() > 0.1 / (hh * ww)
    torch.testing.assert_close(weights.sum(-1), torch.ones(layer.num_heads, hh * ww))

    with torch.no_grad():
        d = layer.dim // layer.num_heads
        v = layer.qkv(tokens).reshape(layer.num_heads, 3, d, hh * ww)[:, 2].transpose(1, 2)
        y = layer.proj((weights @ v).transpose(1, 2).reshape(1, layer.dim, hh, ww))
        torch.testing.assert_close(y, layer.attend(tokens))

    one = layers[index].attention(1, 2)
    torch.testing.assert_close(one.flatten(1), weights[:, ww + 2])


def test_attention_weights_are_those_of_the_unfused_attention(model):
    model.eval()
    for module in model.modules():
        if isinstance(module, SuperTokenAttention):
            module.fused_attn = False
    softmax = []
    layer = model.stages[1].blocks[0].attn
    layer.attn_drop.register_forward_pre_hook(lambda _, args: softmax.append(args[0][0]))
    with watch(model) as layers:
        model(torch.randn(1, 3, 64, 96))
    torch.testing.assert_close(attention_weights(layer, layers[1].sample()[0]), softmax[0])


def test_rounds_of_association(layers):
    # The shares differ in each round; which of them is the largest need not, and depends on the machine's rounding.
    shares = [layers[0].association(n).q for n in (1, 2, 3)]
    assert torch.equal(shares[0], layers[0].association().q)
    changes = [(a - b).abs().max().item() for a, b in pairwise(shares)]
    assert changes[0] > 1e-4
    assert changes[0] / 10 > changes[1] > 1e-6  # rounds converge
    layers[0].layer.n_iter = 2
    assert torch.equal(shares[1], layers[0].association().q)


def test_borders_of_a_known_map():
    labels = torch.tensor([[0, 0, 1], [2, 0, 1]])
    assert sorted(borders(labels).tolist()) == [
        [[0, 1], [1, 1]],  # 0 over 2
        [[1, 1], [1, 2]],  # 2 beside 0
        [[2, 0], [2, 1]],  # 0 beside 1
        [[2, 1], [2, 2]],
    ]
    assert borders(torch.zeros(3, 3)).shape == (0, 2, 2)


@pytest.mark.parametrize(("height", "width"), [(4, 6), (8, 12), (13, 17)])
def test_mean_colours(height, width):
    torch.manual_seed(0)
    photo, labels = torch.rand(height, width, 3), torch.randint(0, 5, (4, 6)) * 2  # not every number is a label
    coloured = mean_colours(photo, labels)
    at = [
        [labels[int((y + 0.5) / height * 4), int((x + 0.5) / width * 6)] for x in range(width)] for y in range(height)
    ]
    at = torch.tensor(at)
    for label in labels.unique():
        expected = photo[at == label].mean(0).expand((at == label).sum(), 3)
        torch.testing.assert_close(coloured[at == label], expected)


def test_figures_show_what_was_found(layers):
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        missing("matplotlib")
    torch.manual_seed(0)
    photo, point, stages = torch.rand(40, 60, 3), (0.3, 0.6), last_of_stages(layers)
    found = layers[1].association()

    axes = draw_super_tokens(photo, stages, point).axes
    assert len(axes) == 2 * 4  # stages 3 and 4 have no cells
    assert [ax.get_ylabel() for ax in axes[::4]] == ["stage 1", "stage 2"]
    lines = axes[5].collections[0].get_segments()
    assert len(lines) == len(borders(found.assignment()))
    colours = torch.from_numpy(axes[6].images[0].get_array().data)
    torch.testing.assert_close(colours, mean_colours(photo, found.assignment()))
    share = torch.from_numpy(axes[7].images[1].get_array().data)
    assert torch.equal(share, found.weights(*found.owner(point)))
    assert axes[7].get_title() == f"share in the marked one: 0 to {share.max():.2f}"

    axes = draw_attention(photo, stages, point).axes
    assert len(axes) == 5
    attention = torch.from_numpy(axes[4].images[1].get_array().data)
    torch.testing.assert_close(attention, layers[3].attention(1, 0).mean(0))  # (0.3, 0.6) of 2 x 3 pixels
    torch.testing.assert_close(attention.sum(), torch.tensor(1.0))
    assert axes[4].get_title() == f"stage 4: 0 to {100 * attention.max():.3g}%"

    axes = draw_iterations(photo, layers[0], 3).axes
    rounds = [layers[0].association(n).assignment() for n in (1, 2, 3)]
    assert [len(ax.collections[0].get_segments()) for ax in axes] == [len(borders(labels)) for labels in rounds]
    assert axes[0].get_title() == "1 round (the model's)"
    assert axes[2].get_title() == f"3 rounds: {(rounds[2] != rounds[1]).float().mean():.1%} moved"

    with pytest.raises(ValueError, match="cells of more than one pixel"):
        draw_super_tokens(photo, {"stage 4": layers[3]})


def test_partition_of_a_map_of_the_image_s_size_is_the_assignment(layers):
    for watched in layers[:2]:
        found = watched.association()
        assert torch.equal(found.partition(found.size), found.assignment())


def test_partition_interpolates_the_shares():
    """Two cells of one pixel, with centres at columns 1.5 and 5.5 of the image and shares of 0.3 and 0.8 in the second
    token. From one to the other the share passes one half at 0.4 of the way: at 3.1."""
    q = torch.zeros(1, 2, 9, 1)
    q[0, 0, [4, 5], 0] = torch.tensor([0.7, 0.3])
    q[0, 1, [3, 4], 0] = torch.tensor([0.2, 0.8])
    found = Association(q, (1, 1), (1, 2))
    assert found.partition((3, 8)).tolist() == [[0, 0, 0, 0, 1, 1, 1, 1]] * 3


def test_partition_numbers_tokens_as_the_assignment_does(model):
    image = torch.randn(1, 3, 72, 104)
    with watch(model) as layers:
        model(image)
    found = layers[0].association()
    labels = found.partition((54, 78))  # three times the map
    assert labels.shape == (54, 78)
    assert torch.equal(labels[1::3, 1::3], found.assignment())  # the centres of its pixels
