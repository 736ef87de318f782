import pytest
import timm
import torch

from helpers import missing
from svit.ops import sample
from svit.visualize import Association, associations, draw


@pytest.fixture
def model():
    torch.manual_seed(0)
    return timm.create_model("test_svit").train()


def test_associations_are_those_of_the_forward_pass(model):
    image = torch.randn(3, 50, 70)
    seen = []
    layer = model.stages[0].blocks[0].attn
    hook = layer.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    found = associations(model, image)
    hook.remove()
    assert [a.layer for a in found] == ["stages.0.blocks.0.attn", "stages.1.blocks.0.attn"]
    assert [(a.cell, a.size) for a in found] == [((4, 4), (13, 18)), ((2, 2), (7, 9))]
    assert torch.equal(found[0].q, sample(seen[0].permute(0, 2, 3, 1), (4, 4))[1][0])
    assert model.training
    assert not layer._forward_pre_hooks


def test_weights_and_assignment_of_a_known_association():
    q = torch.zeros(2, 2, 9, 4)
    q[..., 4, :] = 1.0  # every pixel belongs to its own cell
    q[0, 0, 4, 3], q[0, 0, 5, 3] = 0.25, 0.75  # but one to the cell on the right
    found = Association("layer", q, (2, 2), (3, 4))
    assert found.assignment().tolist() == [[0, 0, 1, 1], [0, 1, 1, 1], [2, 2, 3, 3]]
    assert found.weights(0, 1).tolist() == [[0, 0, 1, 1], [0, 0.75, 1, 1], [0, 0, 0, 0]]


def test_weights_sum_to_what_stays_inside(model):
    found = associations(model, torch.randn(3, 64, 96))[0]
    hh, ww = found.q.shape[:2]
    shares = torch.stack([found.weights(i, j) for i in range(hh) for j in range(ww)])
    assert torch.equal(shares.argmax(0), found.assignment())
    inner = shares.sum(0)[4:-4, 4:-4]  # around inner cells no neighbour is missing
    torch.testing.assert_close(inner, torch.ones_like(inner))
    with pytest.raises(ValueError, match=r"expected a super token of the 4 x 6 grid, got \(4, 0\)"):
        found.weights(4, 0)


def test_draw_writes_a_picture_or_nothing(model, tmp_path):
    try:
        from matplotlib.image import imread
    except ImportError:
        missing("matplotlib")
    draw(model, torch.randn(2, 3, 40, 40), tmp_path / "picture.png", dpi=40)
    picture = imread(tmp_path / "picture.png")
    assert picture.shape[1] > picture.shape[0] > 100
    assert picture.std() > 0.05
    with pytest.raises(ValueError, match="nosuch"):
        draw(model, torch.randn(1, 3, 40, 40), tmp_path / "picture.nosuch")
    assert [p.name for p in tmp_path.iterdir()] == ["picture.png"]
