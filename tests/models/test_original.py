"""The authors' key names and ours."""

import json
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from svit.convert import MODELS
from svit.models.original import MARK, from_original, is_original, to_original

GOLDENS = Path(__file__).parents[1] / "data" / "goldens"
PUBLISHED = ["small", "base", "large"]


def shapes(state_dict: dict) -> dict[str, tuple[int, ...]]:
    return {k: tuple(v.shape) for k, v in state_dict.items()}


def published_keys(size: str) -> dict[str, tuple[int, ...]]:
    keys = json.loads((GOLDENS / f"stvit_{size}_keys.json").read_text())
    return {k: tuple(shape) for k, shape in keys.items()}


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("test_svit").eval()
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(torch.rand_like(tensor), alpha=0.1)  # so that no tensor is constant or as in a new model
    return model


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_keys_are_the_models(size):
    theirs = {k: torch.empty(shape, device="meta") for k, shape in published_keys(size).items()}
    ours = timm.create_model(f"svit_{size}", device="meta").state_dict()
    assert shapes(from_original(theirs)) == shapes(ours)


@pytest.mark.parametrize("size", PUBLISHED)
def test_models_keys_are_the_published(size):
    ours = timm.create_model(f"svit_{size}", device="meta").state_dict()
    assert shapes(to_original(ours)) == published_keys(size)


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back(name):
    ours = timm.create_model(name, device="meta").state_dict()
    theirs = to_original(ours)
    assert not set(theirs) & set(ours)
    back = from_original(theirs)
    assert back.keys() == ours.keys()
    assert all(back[k] is ours[k] for k in ours)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("patch_embed.proj.11.running_var", "stem.layers.11.running_var"),
        ("layers.0.blocks.2.pos_embed.conv.bias", "stages.0.blocks.2.pos_embed.bias"),
        ("layers.2.blocks.10.norm1.norm.weight", "stages.2.blocks.10.norm1.weight"),
        ("layers.2.blocks.0.norm2.running_mean", "stages.2.blocks.0.mlp.norm.running_mean"),
        ("layers.1.blocks.0.attn.stoken_refine.qkv.weight", "stages.1.blocks.0.attn.qkv.weight"),
        ("layers.1.blocks.0.attn.stoken_refine.proj.bias", "stages.1.blocks.0.attn.proj.bias"),
        ("layers.3.blocks.1.mlp2.fc1.weight", "stages.3.blocks.1.mlp.fc1.weight"),
        ("layers.3.blocks.1.mlp2.fc2.bias", "stages.3.blocks.1.mlp.fc2.bias"),
        ("layers.3.blocks.1.mlp2.conv.conv.weight", "stages.3.blocks.1.mlp.dwconv.weight"),
        ("layers.2.blocks.0.gamma_1", "stages.2.blocks.0.ls1.gamma"),
        ("layers.2.blocks.0.gamma_2", "stages.2.blocks.0.ls2.gamma"),
        ("layers.0.downsample.proj.0.weight", "stages.1.downsample.conv.weight"),
        ("layers.2.downsample.proj.1.num_batches_tracked", "stages.3.downsample.norm.num_batches_tracked"),
        ("proj.weight", "final_conv.conv.weight"),
        ("norm.running_var", "final_conv.norm.running_var"),
        ("head.bias", "head.fc.bias"),
    ],
)
def test_names(theirs, ours):
    value = torch.zeros(1)
    assert list(from_original({theirs: value})) == [ours]
    assert theirs in to_original({ours: value})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_one_hot_kernels(dtype):
    theirs = to_original({"stages.1.blocks.3.attn.qkv.weight": torch.zeros(3, 1, 1, 1, dtype=dtype)})
    kernels = [theirs[f"layers.1.blocks.3.attn.{name}.weights"] for name in ("unfold", "fold")]
    for kernel in kernels:
        assert kernel.shape == (9, 1, 3, 3)
        assert kernel.dtype == dtype
        assert [tuple(row) for row in kernel.nonzero().tolist()] == [(i, 0, i // 3, i % 3) for i in range(9)]
        assert kernel.sum() == 9
    assert len(theirs) == 3
    assert kernels[0].data_ptr() != kernels[1].data_ptr()


def test_is_original(model):
    ours = model.state_dict()
    theirs = to_original(ours)
    assert not is_original(ours)
    assert is_original(theirs)
    assert is_original(dict(reversed(theirs.items())))
    assert is_original({"backbone." + k: v for k, v in theirs.items()}, "backbone.")
    assert not is_original({"backbone." + k: v for k, v in theirs.items()})


def test_load_state_dict_takes_the_authors_names(model):
    theirs = to_original(model.state_dict())
    kept = dict(theirs)
    loaded = timm.create_model("test_svit").eval()
    assert not loaded.load_state_dict(dict(reversed(theirs.items()))).missing_keys
    x = torch.randn(2, 3, 40, 56)
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)
    loaded.load_state_dict(theirs)
    assert theirs.keys() == kept.keys()


def test_load_state_dict_inside_another_module(model):
    theirs = {"0." + k: v for k, v in to_original(model.state_dict()).items()}
    outer = nn.Sequential(timm.create_model("test_svit").eval(), nn.Linear(1000, 2))
    theirs.update({"1." + k: v for k, v in outer[1].state_dict().items()})
    outer.load_state_dict(theirs)
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(outer[0](x), model(x), rtol=0, atol=0)


def save(path: Path, state_dict: dict) -> str:
    torch.save({"model": state_dict}, path)
    return str(path)


def test_checkpoint_path_takes_the_authors_file(model, tmp_path):
    path = save(tmp_path / "theirs.pth", to_original(model.state_dict()))
    loaded = timm.create_model("test_svit", checkpoint_path=path).eval()
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)


def test_checkpoint_path_is_strict(model, tmp_path):
    theirs = to_original(model.state_dict())

    missing = {k: v for k, v in theirs.items() if k != "layers.2.blocks.0.gamma_1"}
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"stages\.2\.blocks\.0\.ls1\.gamma\"\."):
        timm.create_model("test_svit", checkpoint_path=save(tmp_path / "missing.pth", missing))

    unexpected = {**theirs, "layers.0.blocks.0.gamma_1": torch.ones(1, 8, 1, 1)}
    with pytest.raises(
        RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"stages\.0\.blocks\.0\.ls1\.gamma\"\."
    ):
        timm.create_model("test_svit", checkpoint_path=save(tmp_path / "unexpected.pth", unexpected))

    shape = {**theirs, "norm.bias": torch.zeros(65)}
    with pytest.raises(RuntimeError, match=r"size mismatch for final_conv\.norm\.bias"):
        timm.create_model("test_svit", checkpoint_path=save(tmp_path / "shape.pth", shape))


def test_without_the_mark_nothing_is_renamed(model):
    theirs = {k: v for k, v in to_original(model.state_dict()).items() if k != MARK}
    with pytest.raises(RuntimeError, match=r"stem\.layers\.0\.weight"):
        timm.create_model("test_svit").load_state_dict(theirs)
