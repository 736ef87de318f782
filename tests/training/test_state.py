"""The file of a training's state."""

import torch

from svit.training import state
from svit.training.recipe import Recipe

RECIPE = vars(Recipe(model="test_svit", data_dir="data", epochs=1))


def test_a_state_of_the_former_names_is_read(tmp_path):
    """`images` and the recipe's `lr_batch` have other names now; such a training resumes."""
    recipe = {key: value for key, value in RECIPE.items() if key != "lr_base_size"}
    old = {"recipe": {**recipe, "lr_batch": 16}, "images": 8, "epoch": 2}
    torch.save({"state": old, "model": {}}, tmp_path / "state.pt")
    found, tensors = state.read(tmp_path / "state.pt", {**RECIPE, "lr_base_size": 16}, 8)
    assert (found.global_batch_size, found.epoch, tensors) == (8, 2, {"model": {}})
