"""What a recipe makes: sizes of images in training and evaluation."""

import pytest
from timm.data import resolve_data_config

import image_data
from svit.errors import InputError
from svit.training.recipe import Recipe
from svit.training.setup import Splits, make_loaders, make_model, open_splits


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


def test_a_model_of_one_size_takes_no_train_size(splits):
    recipe = Recipe(model="swin_tiny_patch4_window7_224", train_size=32)
    with pytest.raises(InputError, match="train_size: expected null, since swin.* one size, got 32"):
        make_model(recipe, splits)
