"""What a recipe makes: sizes of images in training and evaluation."""

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.data import resolve_data_config

import image_data
from svit.errors import InputError
from svit.training.recipe import Recipe
from svit.training.setup import Splits, Teacher, make_loaders, make_model, open_splits


@pytest.fixture(scope="module")
def splits(tmp_path_factory) -> Splits:
    folder = image_data.folder(tmp_path_factory.mktemp("digits") / "data")
    return open_splits(Recipe(model="test_svit", data_dir=str(folder), epochs=1), False, lambda: None)


@pytest.mark.parametrize("augment", [True, False])
def test_train_size_is_for_training_alone(splits, augment):
    recipe = Recipe(model="test_svit", img_size=48, train_size=32, augment=augment, batch_size=4, workers=0)
    model = make_model(recipe, splits)
    preprocessing = resolve_data_config({}, model=model)
    train, val = (next(iter(loader.epoch(0)))[0] for loader in make_loaders(recipe, splits, preprocessing, 0, 1))
    assert train.shape == (4, 3, 32, 32)
    assert val.shape == (4, 3, 48, 48)
    assert model.pretrained_cfg["input_size"] == (3, 48, 48)  # with which the weights are saved


@pytest.mark.parametrize("workers", [0, 1])
def test_train_size_follows_its_schedule(splits, workers):
    sizes = {"train_size": 32, "train_size_schedule": {3: 64, 1: 40}}
    recipe = Recipe(model="test_svit", img_size=48, **sizes, batch_size=4, workers=workers)
    train, val = make_loaders(recipe, splits, resolve_data_config({}, model=make_model(recipe, splits)), 0, 1)
    assert [next(iter(train.epoch(epoch)))[0].shape[-1] for epoch in (0, 1, 2, 3, 4, 0)] == [32, 40, 40, 64, 64, 32]
    assert next(iter(val.epoch(4)))[0].shape[-1] == 48


@pytest.mark.parametrize(("key", "value"), [("train_size", 32), ("train_size_schedule", {2: 32})])
def test_a_model_of_one_size_takes_no_train_size(splits, key, value):
    recipe = Recipe(model="swin_tiny_patch4_window7_224", **{key: value})
    with pytest.raises(InputError, match=f"{key}: expected none, since swin.* one size, got {value}"):
        make_model(recipe, splits)


@pytest.mark.parametrize("size", [None, 32, 48])
def test_a_teacher_sees_images_of_its_size(size):
    model = timm.create_model("test_svit", num_classes=4).eval()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    seen = F.interpolate(images, (48, 48), mode="bicubic", antialias=True) if size == 48 else images
    with torch.no_grad():
        found, expected = Teacher(model, [3, 0], size)(images), model(seen)[:, [3, 0]]
    torch.testing.assert_close(found, expected)
