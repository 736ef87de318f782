"""The state of a training: one file that holds all that is needed to go on exactly, and where it may be written."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from svit.checkpoints import read_metadata
from svit.convert import CheckpointError, differences, is_finite, summary
from svit.errors import InputError
from svit.files import replacing

from .data import is_reader_gone
from .recipe import differences as recipe_differences

NAME = "state.pt"
BEST = "best.safetensors"

# What a training leaves in its folder, by which the folder is known to be taken.
LEFT = (NAME, BEST, "log.csv", "last.safetensors")


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


def find_start(output: Path, resume: str | None) -> Path | None:
    """The state that a training in the folder `output` goes on from; None if it starts anew.

    Args:
        output: the folder, which need not be there.
        resume: None to start anew, "auto" to go on where there is something to go on from, or a file. A file other than
            the folder's own state is taken into a folder that holds no training.

    Raises:
        InputError: the folder holds a training that would be mixed with this one.
    """
    found = [name for name in LEFT if (output / name).exists()]
    if resume is None:
        if found:
            raise InputError(
                f"--output: {output} holds a training already ({found[0]}); go on with --resume or name another"
            )
        return None
    if resume == "auto":
        if NAME in found:
            return output / NAME
        if found and found != ["last.safetensors"]:  # which a kill in the midst of the very first save leaves alone
            raise InputError(
                f"--output: {output} holds a training without its {NAME} ({', '.join(found)}), which cannot go on; "
                "name another folder"
            )
        return None
    state = Path(resume)
    if found and state.resolve() != (output / NAME).resolve():
        raise InputError(
            f"--output: {output} holds a training already ({found[0]}), and {resume} is another state; name an empty "
            "folder to go on with that state, or --resume alone to go on with the folder's own"
        )
    return state


def find_best(path: Path, state: State) -> Path | None:
    """The best weights of the training that this state in the file `path` is of; None if it has none yet.

    Raises:
        InputError: they are not beside the state, or those that are there are not its own.
        CheckpointError: they cannot be read.
    """
    if state.best < 0:
        return None
    best = path.parent / BEST
    if not best.is_file():
        raise InputError(f"resume: {path} has no {BEST} beside it, of top-1 {state.best:.2f}; put it there")
    facts = read_metadata(best)["facts"]
    # Better ones are those of a state that a kill kept from following.
    other = recipe_differences(state.recipe, {**state.recipe, **facts.get("recipe", {})})
    if other or facts.get("top1", -1.0) < state.best:
        raise InputError(f"resume: {best} is not of the training of {path}; expected that of top-1 {state.best:.2f}")
    return best


def copy(source: Path, target: Path) -> None:
    """Copies a file, whole or not at all."""
    with replacing(target) as part:
        shutil.copyfile(source, part)


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
        CheckpointError: it is missing or damaged, or its numbers are not finite.
        InputError: it is of another recipe; the message says what differs.
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
        raise InputError(f"resume: {path} is of another training; " + "; ".join(found))
    if not is_finite(tensors):
        raise CheckpointError(f"{path}: holds weights or moments that are not finite; start anew, with a lower lr")
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
