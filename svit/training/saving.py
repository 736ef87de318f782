"""Saving a training, and going on: the state and the weights in its folder, never of numbers that are not finite."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from timm.utils import ModelEmaV3
from torch import nn

from svit.checkpoints import save_model
from svit.convert import CheckpointError, is_finite
from svit.errors import InputError

from . import state as states
from .recipe import Recipe, as_dict


@dataclass
class Saver:
    """Writes and restores what makes a training go on exactly; all processes call it together."""

    folder: Path
    recipe: Recipe
    classes: list[str] | None
    state: states.State
    accelerator: Accelerator
    model: nn.Module  # without the wrappers of `prepare`
    optimizer: torch.optim.Optimizer
    ema: ModelEmaV3 | None
    saved: tuple[int, int] | None  # epoch and update of the newest state

    @property
    def sharded(self) -> bool:
        return self.recipe.parallel == "fsdp"

    def save(self, best: bool = False) -> None:
        """Writes the state and the last weights, and these as the best ones if they are.

        Raises:
            InputError: the loss, a weight or a moment is not finite; in all processes. Nothing is written then.
        """
        self.state.loss = self.finite_loss()
        tensors = states.full_state_dict(self.model, self.optimizer, self.sharded)
        if self.ema is not None:
            tensors["ema"] = self.ema.module.state_dict()
        if self.accelerator.scaler is not None:
            tensors["scaler"] = self.accelerator.scaler.state_dict()
        if self.accelerator.is_main_process:
            # The best first: should the state not follow, it is found to be the best once more.
            for name in ("best", "last") if best else ("last",):
                save_model(
                    self.folder / f"{name}.safetensors",
                    self.model,
                    self.recipe.model,
                    self.classes,
                    tensors[self.recipe.evaluate],
                    recipe=as_dict(self.recipe),  # not the state's, which may have been elsewhere
                    # In the midst of an epoch no accuracy is known.
                    **(self.state.rows[-1] if self.state.rows and not self.state.update else {}),
                )
            states.write(self.folder / states.NAME, self.state, tensors)
        self.saved = self.state.epoch, self.state.update
        self.accelerator.wait_for_everyone()

    def restore(self, tensors: dict[str, Any]) -> None:
        """Loads what `states.read` gave beside the state.

        Raises:
            CheckpointError: it lacks something, or is of another model or optimizer.
        """
        try:
            states.load_full_state_dict(self.model, self.optimizer, self.sharded, tensors)
            if self.ema is not None:
                self.ema.module.load_state_dict(tensors["ema"])
            if self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(tensors["scaler"])
        except CheckpointError:
            raise
        except (KeyError, TypeError, ValueError, RuntimeError) as error:  # PyTorch's, of what does not fit
            raise CheckpointError(f"resume: the state is damaged; {type(error).__name__}: {error}") from error

    def finite_loss(self) -> float:
        """The epoch's loss so far, of all processes, after a look at all that would be saved."""
        parts = {"weights": self.model.state_dict(), "optimizer's state": self.optimizer.state_dict()}
        if self.ema is not None:
            parts["moving average"] = self.ema.module.state_dict()
        lost = [float(not is_finite(part)) for part in parts.values()]
        # One reduction for everything: the processes find out together, or one would wait for the others.
        numbers = torch.tensor([float(self.state.loss), *lost], device=self.accelerator.device)
        loss, *shares = self.accelerator.reduce(numbers, "mean").tolist()
        broken = [f"the {name}" for name, share in zip(parts, shares, strict=True) if share]
        if not math.isfinite(loss):
            raise self.diverged(f"the loss is {loss}")
        if broken:
            raise self.diverged(f"not all numbers of {' and '.join(broken)} are finite")
        return loss

    def diverged(self, what: str) -> InputError:
        """The error that says what to change in the recipe, and where the training can go on."""
        r, state = self.recipe, self.state
        advice = [f"lower lr (now {r.lr:g})", f"raise warmup_epochs (now {r.warmup_epochs:g})"]
        advice.append(f"lower clip_grad (now {r.clip_grad:g})" if r.clip_grad else "set clip_grad=1")
        if r.mixed_precision:
            advice.append(f"set mixed_precision=null (now {r.mixed_precision})")
        kept = "nothing of it is saved"
        if self.saved:
            kept += (
                f": --resume goes on from epoch {self.saved[0]}, update {self.saved[1]}, with the same recipe; another "
                f"one starts from its weights in a new folder, with checkpoint={self.folder / 'last.safetensors'}"
            )
        return InputError(f"{what} in epoch {state.epoch}, update {state.update}; {', '.join(advice)}; {kept}")
