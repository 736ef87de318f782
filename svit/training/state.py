"""The state of a training: one file with all that an exact resume needs, and the rules for the output folder."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from svit.checkpoints import read_metadata
from svit.convert import CheckpointError, differences, is_finite, summary
from svit.errors import InputError
from svit.files import atomic_write
from svit.folders import first

from .data import is_reader_gone
from .recipe import differences as recipe_differences

NAME = "state.pt"
BEST = "best.safetensors"

# Files of a training: a folder with any of them holds a training.
LEFT = (NAME, BEST, "log.csv", "last.safetensors")


@dataclass
class State:
    """The position in a training, and all of its state that is no tensor.

    It holds no random states: the random numbers of each step follow from the recipe's seed and the step.
    """

    recipe: dict[str, Any]
    global_batch_size: int  # images of an update, in all processes together
    epoch: int = 0
    update: int = 0  # updates done in this epoch
    best: float = -1.0  # per cent, top-1
    loss: float = 0.0  # sum over the updates of this epoch
    seconds: float = 0.0  # of training, in all runs together
    rows: list[dict[str, Any]] = field(default_factory=list)  # of the log, an epoch each
    data: dict[str, Any] = field(default_factory=dict)  # of `setup.describe`; states of 0.1 lack it


def find_start(output: Path, resume: str | None) -> Path | None:
    """The state that a training in the folder `output` resumes from, or None for a new training.

    Args:
        output: the folder, which need not exist.
        resume: None for a new training, "auto" to resume from the folder's state if there is one, or a file. Another
            state than the folder's own needs a folder that holds no training.

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
    """The best weights of the training whose state is in the file `path`, or None if it has none yet.

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
    # If a kill stopped the program between the two files, the weights are better than the state says.
    other = recipe_differences(state.recipe, {**state.recipe, **facts.get("recipe", {})})
    if other or facts.get("top1", -1.0) < state.best:
        raise InputError(f"resume: {best} is not of the training of {path}; expected that of top-1 {state.best:.2f}")
    return best


def copy(source: Path, target: Path) -> None:
    """Copies a file, whole or not at all."""
    with atomic_write(target) as part:
        shutil.copyfile(source, part)


def write(path: Path, state: State, tensors: dict[str, Any]) -> None:
    """Writes the state, whole or not at all.

    Raises:
        OSError: it cannot be written; an older one is left as it was.
    """
    try:
        with atomic_write(path) as part:
            torch.save({"state": vars(state), **tensors}, part)
    except RuntimeError as error:  # torch.save reports a full disk so
        if is_reader_gone(error):
            raise
        raise OSError(f"{path}: cannot be written ({error})") from error


def read(path: Path, recipe: dict[str, Any], global_batch_size: int) -> tuple[State, dict[str, Any]]:
    """Reads a state for a training with this recipe.

    Raises:
        CheckpointError: it is missing or damaged, or its numbers are not finite.
        InputError: it is of another recipe; the message says what differs.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        stored = tensors.pop("state")
        if "images" in stored:  # the former name
            stored["global_batch_size"] = stored.pop("images")
        state = State(**stored)
    except Exception as error:  # a damaged file can raise nearly anything
        raise CheckpointError(f"{path}: cannot be read; it is damaged or no training's state") from error
    found = recipe_differences(state.recipe, recipe)
    if state.global_batch_size != global_batch_size:
        sizes = f"{state.global_batch_size}, now {global_batch_size}"
        found.append(f"images an update (batch_size x grad_accum x processes): {sizes}")
    if found:
        raise InputError(f"resume: {path} is of another training; " + "; ".join(found))
    if not is_finite(tensors):
        raise CheckpointError(f"{path}: holds weights or moments that are not finite; start again, with a lower lr")
    return state, tensors


def check_data(path: Path, state: State, data: Mapping[str, Any]) -> None:
    """The data of a training that resumes must be what it was: its order, and what the classes mean, follow from it.

    Args:
        path: of the state, for the message.
        state: of `read`.
        data: of `setup.describe`, as it is now.

    Raises:
        InputError: there are other classes, or more or fewer images.
    """
    found = [
        f"{key}: {value} images, now {data[key]}"
        for key, value in state.data.items()
        if key != "classes" and value != data[key]
    ]
    before, now = state.data.get("classes") or [], data["classes"] or []
    if state.data and before != now:
        gone, new = ([n for n in a if n not in b] for a, b in ((before, now), (now, before)))
        changes = f"{first(gone) or 'none'} gone, {first(new) or 'none'} new"
        found.append(f"classes: {changes if gone or new else 'in another order'}")
    if found:
        raise InputError(f"resume: {path} is of another training; {'; '.join(found)}")


def full_state_dict(model: torch.nn.Module, optimizer: torch.optim.Optimizer, sharded: bool) -> dict[str, Any]:
    """State dicts of model and optimizer. Sharded ones are collected on the CPU of the first process."""
    if not sharded:
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, moments = get_state_dict(model, optimizer, options=options)
    return {"model": weights, "optimizer": moments}


def load_full_state_dict(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, sharded: bool, tensors: dict[str, Any]
) -> None:
    """Loads the result of `full_state_dict`.

    Raises:
        CheckpointError: it is of another model.
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
