"""Saves runs of mmengine so that they can resume after they diverge, are stopped, or are moved or copied."""

import math
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dist import all_reduce, barrier, broadcast, get_comm_device, get_rank, get_world_size, is_main_process
from mmengine.hooks import CheckpointHook, EMAHook, Hook
from mmengine.model import is_model_wrapper
from mmengine.optim import AmpOptimWrapper
from mmengine.registry import FUNCTIONS, HOOKS
from mmengine.runner import Runner, set_random_seed

from svit.convert import is_finite
from svit.errors import InputError
from svit.files import atomic_write

__all__ = ["BuffersHook", "DivergedError", "FiniteCheckpointHook", "SeedHook", "StopHook", "Stopped", "seed_epochs"]


class DivergedError(InputError):
    """The loss, a weight or a moment is not finite. The message says where, and what to change."""


@HOOKS.register_module()
class FiniteCheckpointHook(CheckpointHook):
    """Replaces mmengine's CheckpointHook in runs that may diverge, be moved or be copied.

    A loss that is not finite ends the run at once, in all processes. So does a weight or an optimizer's moment that is
    not finite, before a checkpoint is written or an older one removed. A metric that is not finite is never the best.

    A checkpoint stores the path of the best checkpoint. After a move, a copy or a resume this path may lead to another
    folder. The hook then takes the file of that name in the work dir, or makes a copy there. So the next best
    checkpoint does not remove the file of another run.

    A checkpoint also stores how many images the training has, and a run that resumes must have as many.

    Raises:
        DivergedError: after an iteration, or before a checkpoint would be written.
        InputError: before the training, of a run that resumes with other data.
    """

    def before_train(self, runner: Runner) -> None:
        check_same_data(runner)
        folder = Path(runner.work_dir)
        if self.out_dir is not None:
            folder = Path(self.out_dir, folder.name)
        for key, stored in runner.message_hub.runtime_info.items():
            # A remote store has the same address everywhere.
            if key.startswith("best_ckpt") and stored and "://" not in f"{stored} {self.out_dir}":
                runner.message_hub.update_info(key, own_file(Path(stored), folder))
        super().before_train(runner)

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        # mmengine has already waited for the loss to log it.
        loss = torch.as_tensor((outputs or {}).get("loss", 0.0)).detach().sum().item()
        if any_process(not math.isfinite(loss)):
            raise self.diverged(runner, f"the loss is {loss}")
        super().after_train_iter(runner, batch_idx, data_batch, outputs)

    def _save_checkpoint(self, runner: Runner) -> None:
        self.check(runner)
        super()._save_checkpoint(runner)

    def _save_best_checkpoint(self, runner: Runner, metrics: dict[str, Any]) -> None:
        if self.save_best:
            self.check(runner)
            # mmengine skips None. Infinity would stay the best for ever.
            lost = [k for k, v in metrics.items() if isinstance(v, (float, np.floating)) and not math.isfinite(v)]
            metrics = {**metrics, **dict.fromkeys(lost)}
        super()._save_best_checkpoint(runner, metrics)

    def check(self, runner: Runner) -> None:
        """Raises a DivergedError if the content of a checkpoint is not finite. All processes must call it."""
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        averages = [hook.ema_model.state_dict() for hook in runner.hooks if isinstance(hook, EMAHook)]
        parts = {
            "weights": model.state_dict(),
            "optimizer's state": runner.optim_wrapper.state_dict(),
            "moving average": averages,
        }
        lost = [f"the {name}" for name, part in parts.items() if not is_finite(part)]
        if any_process(bool(lost)):
            what = " and ".join(lost) or "another process"
            raise self.diverged(runner, f"not all numbers of {what} are finite")

    def diverged(self, runner: Runner, what: str) -> DivergedError:
        advice = "lower optim_wrapper.optimizer.lr, lengthen the warmup in param_scheduler, set optim_wrapper.clip_grad"
        if isinstance(runner.optim_wrapper, AmpOptimWrapper):
            advice += ", take --amp bfloat16 or none"
        kept = "nothing of it is saved"
        newest = self.last_ckpt or (runner._load_from if runner._resume else None)
        if newest:
            kept += f": --resume {newest} continues from there, load_from={newest} starts from its weights"
        # The counters of the loop may be ahead.
        epoch, iteration = (runner.message_hub.get_info(key) + 1 for key in ("epoch", "iter"))
        return DivergedError(f"{what} in epoch {epoch}, iteration {iteration}; {advice}; {kept}")


def check_same_data(runner: Runner) -> None:
    """Notes the number of images for a run that resumes from this one, or compares it with what that one noted.

    Raises:
        InputError: it is another.
    """
    images = len(runner.train_dataloader.dataset)
    before = runner.message_hub.runtime_info.get("train_images") if runner._resume else None
    if before is not None and before != images:
        raise InputError(f"resume: {runner._load_from} is of another training; train: {before} images, now {images}")
    runner.message_hub.update_info("train_images", images)


class Stopped(Exception):
    """A signal ended the run."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.signal = number


class StopHook(Hook):
    """Ends the run after the iteration in which a signal arrives, so that no checkpoint is cut short.

    A run that counts iterations is saved first. A run that counts epochs is not, since mmengine cannot resume inside an
    epoch.

    Args:
        signals: the received signals, empty at first. The hook does not change it.

    Raises:
        Stopped: in all processes after the same iteration of the training.
    """

    priority = "LOWEST"  # a checkpoint that is due comes first

    def __init__(self, signals: list[signal.Signals]) -> None:
        self.signals = signals

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        # Not after each iteration, since the processes have to agree.
        if get_world_size() > 1 and not self.every_n_train_iters(runner, 10):
            return
        if any_process(bool(self.signals)):
            for hook in runner.hooks:
                if isinstance(hook, CheckpointHook) and not hook.by_epoch:
                    hook._save_checkpoint(runner)
            raise Stopped(self.signals[0] if self.signals else signal.SIGTERM)

    def after_val_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        # Processes may have different numbers of images, so each one decides for itself.
        if self.signals:
            raise Stopped(self.signals[0])


class SeedHook(Hook):
    """Gives each epoch random states of its own, so that a resumed run goes on as if nothing had stopped it.

    mmengine saves no random states. Those of an epoch follow from the run's seed, which a checkpoint holds, from the
    number of the epoch and from that of the process. `seed_epochs` makes the processes that read images follow.
    """

    priority = "VERY_HIGH"  # the epoch's first random number is drawn after this

    def before_train(self, runner: Runner) -> None:
        loader = runner.train_dataloader
        sampler = getattr(loader.batch_sampler, "sampler", loader.sampler)
        if hasattr(sampler, "seed"):  # it was built before the checkpoint gave the seed
            sampler.seed = runner.seed

    def before_train_epoch(self, runner: Runner) -> None:
        state = np.random.SeedSequence((runner.seed, runner.epoch, get_rank())).generate_state(1)
        set_random_seed(int(state[0]))


class BuffersHook(Hook):
    """Gives all processes the first one's buffers before a validation, so that it measures what a checkpoint holds.

    Each process has BatchNorm statistics of its own images, also in a moving average (EMAHook), and the first one's are
    saved. They do not act on a training.
    """

    priority = "VERY_HIGH"  # before EMAHook puts the average in the place of the model

    def before_val_epoch(self, runner: Runner) -> None:
        averages = (hook.ema_model for hook in runner.hooks if isinstance(hook, EMAHook))
        for model in (runner.model, *averages):
            for buffer in model.buffers():
                broadcast(buffer)


@FUNCTIONS.register_module()
def keep_seeds(worker_id: int) -> None:
    """In place of mmengine's function, which gives the processes that read images the same seeds at each start.

    PyTorch has seeded this process by the random state of the one that trains.
    """


def seed_epochs(config: Config) -> bool:
    """Lets the processes that read images start again, with new seeds, in each epoch. False if the run counts none."""
    loader = config.get("train_dataloader")
    if not loader or not (config.get("train_cfg") or {}).get("max_epochs"):
        return False
    loader.persistent_workers = False
    loader.setdefault("worker_init_fn", dict(type="keep_seeds"))
    return True


def own_file(stored: Path, folder: Path) -> str | None:
    """The file of the same name in `folder`, copied there if needed. None if neither file exists."""
    own = folder / stored.name
    if is_main_process() and not own.is_file() and stored.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(own) as part:
            shutil.copyfile(stored, part)
    barrier()
    return str(own) if own.is_file() else None


def any_process(answer: bool) -> bool:
    """Whether `answer` is true in any process. All processes must call it."""
    if get_world_size() == 1:
        return answer
    count = torch.tensor(float(answer), device=get_comm_device())
    all_reduce(count)
    return count.item() > 0
