"""The state of a training: one file that holds all that is needed to go on exactly."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from svit.convert import CheckpointError, differences, summary
from svit.files import replacing

from .data import is_reader_gone
from .recipe import RecipeError
from .recipe import differences as recipe_differences

NAME = "state.pt"


@dataclass
class State:
    """Where a training stands, and what of it is no tensor.

    Random numbers are not among it: they are drawn anew at each step from the recipe's seed and the step.
    """

    recipe: dict[str, Any]
    images: int  # an update, in all processes together
    epoch: int = 0
    update: int = 0  # updates done in this epoch
    best: float = -1.0  # per cent, top-1
    loss: float = 0.0  # sum over the updates of this epoch
    seconds: float = 0.0  # of training, in all runs together
    rows: list[dict[str, Any]] = field(default_factory=list)  # of the log, an epoch each


def write(path: Path, state: State, tensors: dict[str, Any]) -> None:
    """Writes the state, whole or not at all.

    Raises:
        OSError: it cannot be written; an older one is left as it was.
    """
    try:
        with replacing(path) as part:
            torch.save({"state": vars(state), **tensors}, part)
    except RuntimeError as error:  # torch.save reports a full disk so
        if is_reader_gone(error):
            raise
        raise OSError(f"{path}: cannot be written ({error})") from error


def read(path: Path, recipe: dict[str, Any], images: int) -> tuple[State, dict[str, Any]]:
    """Reads a state for a training with this recipe.

    Raises:
        CheckpointError: it is missing or damaged.
        RecipeError: it is of another recipe; the message says what differs.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        state = State(**tensors.pop("state"))
    except Exception as error:  # a damaged file can raise nearly anything
        raise CheckpointError(f"{path}: cannot be read; it is damaged or no training's state") from error
    found = recipe_differences(state.recipe, recipe)
    if state.images != images:
        found.append(f"images an update (batch_size x grad_accum x processes): {state.images}, now {images}")
    if found:
        raise RecipeError(f"resume: {path} is of another training; " + "; ".join(found))
    return state, tensors


def gather(model: torch.nn.Module, optimizer: torch.optim.Optimizer, sharded: bool) -> dict[str, Any]:
    """State dicts of model and optimizer; of sharded ones in one piece, on the CPU of the first process."""
    if not sharded:
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, moments = get_state_dict(model, optimizer, options=options)
    return {"model": weights, "optimizer": moments}


def scatter(model: torch.nn.Module, optimizer: torch.optim.Optimizer, sharded: bool, tensors: dict[str, Any]) -> None:
    """Loads what `gather` gave.

    Raises:
        CheckpointError: the model is another.
    """
    weights, moments = tensors["model"], tensors["optimizer"]
    if not sharded:
        problems = summary(differences(weights, model.state_dict()))
        if problems:
            raise CheckpointError(f"resume: the state is of another model; {problems}")
        model.load_state_dict(weights)
        optimizer.load_state_dict(moments)
        return
    options = StateDictOptions(full_state_dict=True)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments, options=options)
