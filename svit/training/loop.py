"""The loop of a training: `Training` follows a recipe, from the start or from a state, to the end or a signal."""

import math
import shutil
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, broadcast
from omegaconf import OmegaConf
from timm.data import resolve_data_config
from timm.layers import DropPath
from timm.utils import ModelEmaV3
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.modules.batchnorm import _BatchNorm

from svit import processes
from svit.checkpoints import trained_arguments
from svit.errors import InputError
from svit.files import atomic_write, write_csv

from . import state as states
from .data import check_classes, scheduled, seed_all
from .evaluation import Accuracy, evaluate
from .log import Log
from .recipe import Recipe, as_dict
from .saving import Saver
from .setup import describe, make_loaders, make_mixup, make_model, make_optimizer, make_tasks, open_splits


class Training:
    """One run of a recipe, from the start or from a state.

    Args:
        recipe: of `load_recipe`. It gets the `model_args` of its checkpoint.
        output: the folder of all files, made if it is not there.
        resume: where from, as in `state.find_start`.
        cpu: trains on the CPU even if there is a GPU.

    Raises:
        InputError: the recipe or the data cannot be used, or `output` holds another training.
        CheckpointError: a state or a checkpoint cannot be read.
    """

    def __init__(self, recipe: Recipe, output: Path, resume: str | None, cpu: bool) -> None:
        self.recipe, self.output = recipe, output
        start = states.find_start(output, resume)
        if recipe.checkpoint:
            # A part of the recipe from here on, so that whoever reads the new weights knows of it too.
            arguments = trained_arguments(recipe.checkpoint)
            if recipe.img_size:
                arguments.pop("img_size", None)
            recipe.model_args = {**arguments, **recipe.model_args}

        self.accelerator = Accelerator(
            cpu=cpu or not torch.accelerator.is_available(),  # else its processes would not know each other
            mixed_precision=recipe.mixed_precision or "no",
            gradient_accumulation_steps=recipe.grad_accum,
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        )
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        global_batch_size = recipe.batch_size * recipe.grad_accum * self.world
        settings = as_dict(recipe)
        self.state, tensors, saved = states.State(settings, global_batch_size), None, None
        self.moves = start is not None and start.resolve() != (output / states.NAME).resolve()
        if start is not None:
            self.state, tensors = states.read(start, settings, global_batch_size)
            saved = self.state.epoch, self.state.update
        self.best = states.find_best(start, self.state) if start is not None and self.moves else None

        main = self.accelerator.is_main_process
        self.splits = open_splits(recipe, main, self.accelerator.main_process_first)
        self.num_classes = self.splits.num_classes
        data = describe(self.splits)
        if start is not None:
            states.check_data(start, self.state, data)
        self.state.data = data
        try:
            self.make(global_batch_size)
        except InputError:
            raise
        except (AssertionError, TypeError, ValueError) as error:  # timm's, of what the recipe hands to it
            raise InputError(f"the recipe cannot be followed: {type(error).__name__}: {error}") from error
        self.saver = Saver(
            output,
            recipe,
            self.splits.classes,
            self.state,
            self.accelerator,
            self.plain,
            self.optimizer.optimizer,
            self.ema,
            saved,
        )
        if tensors is not None:
            self.saver.restore(tensors)

    def make(self, global_batch_size: int) -> None:
        """What the recipe says, made for this process; an update has so many images in all."""
        r, device = self.recipe, self.accelerator.device
        sharded = r.parallel == "fsdp"
        seed_all(r.seed)
        model = make_model(r, self.splits)
        if r.channels_last and not sharded:  # shards are of contiguous weights; the images' format decides then
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        preprocessing = resolve_data_config({}, model=model)
        self.train, self.val = make_loaders(r, self.splits, preprocessing, self.rank, self.world)
        self.updates = len(self.train) // r.grad_accum  # an epoch
        if self.updates == 0:
            raise InputError(
                f"batch_size: expected at most the {len(self.train.dataset)} images of the data for one update, "
                f"got {global_batch_size} (batch_size x grad_accum x processes)"
            )
        self.mixup = make_mixup(r, self.num_classes)
        self.plain = model.to(device).train()  # without the wrappers that prepare puts around it
        self.ema = ModelEmaV3(self.plain, r.ema, use_warmup=r.ema_warmup) if r.ema is not None else None
        # Set before a schedule changes them.
        self.drop_paths = [(m, m.drop_prob) for m in self.plain.modules() if isinstance(m, DropPath)]
        if sharded and self.world > 1:
            # Not by Accelerate, which shards on GPUs alone.
            fully_shard(self.plain, mesh=init_device_mesh(device.type, (self.world,)))
        optimizer, self.scheduler = make_optimizer(r, self.plain, global_batch_size, self.updates)
        if r.compile:
            self.plain.compile()
        self.optimizer = self.accelerator.prepare(optimizer)
        self.model = self.plain if sharded else self.accelerator.prepare(self.plain)
        self.tasks = make_tasks(r, self.model, self.splits, preprocessing, device)

    def run(self) -> signal.Signals | None:
        """Trains to the end; returns the signal that ended it before, if one did."""
        with processes.stop_signals() as self.signals:
            return self.train_all()

    def train_all(self) -> signal.Signals | None:
        first = self.accelerator.is_main_process
        if first:
            self.output.mkdir(parents=True, exist_ok=True)
            for part in self.output.glob(".part-*"):  # of a training that was killed while it wrote
                shutil.rmtree(part)
            with atomic_write(self.output / "recipe.yaml") as part:
                part.write_text(OmegaConf.to_yaml(as_dict(self.recipe)), encoding="utf-8")
            if self.state.rows:  # which a kill may have kept from the log
                write_csv(self.output / "log.csv", self.state.rows)
            if self.best is not None:
                states.copy(self.best, self.output / states.BEST)
        if self.moves:
            self.saver.save()
        log = Log(self.output, self.recipe.epochs * self.updates, self.total, first)
        try:
            while self.state.epoch < self.recipe.epochs:
                stopped_by = self.train_epoch(log)
                # Before the evaluation, too: what sends a signal may not wait for the end of a long one.
                self.saver.save()
                stopped_by = stopped_by or self.finish_epoch(log)
                if stopped_by:
                    log.write(f"{stopped_by.name}: saved; --resume goes on from here")
                    return stopped_by
        finally:
            log.close()
        return None

    @property
    def total(self) -> int:
        """Updates done in all."""
        return self.state.epoch * self.updates + self.state.update

    def train_epoch(self, log: Log) -> signal.Signals | None:
        """Trains to the end of the epoch; returns the signal that ended it before, if one did."""
        r, state = self.recipe, self.state
        self.set_drop_path(state.epoch)
        batches = self.train.epoch(state.epoch, state.update * r.grad_accum)
        start, before = time.perf_counter(), state.seconds
        while state.update < self.updates:
            if self.scheduler is not None:
                self.scheduler.step_update(self.total)
            loss = self.step(batches)
            state.update += 1
            state.loss = state.loss + loss  # type: ignore[assignment]  # a tensor, for which nothing waits
            state.seconds = before + time.perf_counter() - start
            log.update()
            if state.update % r.log_every == 0 or state.update == self.updates:
                self.tell(log, loss)
            # To ask all processes takes time: so not after each update.
            if self.world == 1 or self.total % max(10 // r.grad_accum, 1) == 0:
                stopped_by = self.stop_signal()
                if stopped_by:
                    return stopped_by
            if r.save_every and self.total % r.save_every == 0 and state.update < self.updates:
                self.saver.save()
        return None

    def step(self, batches: Iterator) -> torch.Tensor:
        """One update; returns its mean loss on this process, without waiting for it."""
        r = self.recipe
        self.model.train()
        if r.freeze_bn:
            for module in self.model.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        loss = torch.zeros((), device=self.accelerator.device)
        for part in range(r.grad_accum):
            batch = next(batches, None)
            if batch is None:
                raise InputError(
                    f"train: expected {self.updates * r.grad_accum} batches an epoch in each process, got "
                    f"{self.state.update * r.grad_accum + part}; some readers had no shard, or images that cannot be "
                    "read were left out: set fewer workers, or a smaller train_samples"
                )
            images, classes = batch
            check_classes(classes, self.num_classes)  # shards do not tell all theirs before
            # All that is random from here on follows from where the training stands.
            seed_all(r.seed, 1, self.total, part, self.rank)
            images = images.to(
                self.accelerator.device,
                non_blocking=True,
                memory_format=torch.channels_last if r.channels_last else torch.contiguous_format,
            )
            classes = classes.to(self.accelerator.device, non_blocking=True)
            off = r.mixup_off_epoch is not None and self.state.epoch >= r.mixup_off_epoch
            mixup = None if off else self.mixup
            if mixup is not None:
                images, classes = mixup(images, classes)
            with self.accelerator.accumulate(self.model):
                with self.accelerator.autocast():
                    part_loss = self.tasks[mixup is not None](images, classes)["loss"]
                self.accelerator.backward(part_loss)
                if r.clip_grad and self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), r.clip_grad)
                self.optimizer.step()
                self.optimizer.zero_grad()
            loss += part_loss.detach() / r.grad_accum
        if self.ema is not None:
            self.ema.update(self.plain, self.total + 1)
        return loss

    def set_drop_path(self, epoch: int) -> None:
        """Scales the rates of all blocks as the schedule says for this epoch."""
        r = self.recipe
        if r.drop_path_schedule:
            rate = scheduled(r.drop_path_schedule, epoch, r.drop_path)
            for module, original in self.drop_paths:
                module.drop_prob = original * rate / r.drop_path

    def stop_signal(self) -> signal.Signals | None:
        """A signal that any process has received, or None. All processes must call it."""
        if self.world == 1:
            return self.signals[0] if self.signals else None
        received = [float(number in self.signals) for number in processes.STOP_SIGNALS]
        counts = self.accelerator.reduce(torch.tensor(received, device=self.accelerator.device), "sum").tolist()
        return next((number for number, count in zip(processes.STOP_SIGNALS, counts, strict=True) if count), None)

    def tell(self, log: Log, loss: torch.Tensor) -> None:
        """Logs the loss of an update, of all processes.

        Raises:
            InputError: it is not finite, or one before it in this epoch was not, in any process.
        """
        losses = torch.stack([loss, torch.as_tensor(self.state.loss, device=loss.device)])
        value, total = self.accelerator.reduce(losses, "mean").tolist()
        if not math.isfinite(total):
            raise self.saver.diverged(f"the loss is {total}")
        log.loss(self.total, self.state.epoch, value, self.lr)

    @property
    def lr(self) -> float:
        """The largest of the rates."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    def finish_epoch(self, log: Log) -> signal.Signals | None:
        """Evaluates, logs and saves; returns the signal that came before the end of the evaluation, if one did."""
        state = self.state
        found = self.evaluate()
        stopped_by = self.stop_signal()
        if stopped_by:
            return stopped_by
        row = {
            "epoch": state.epoch,
            "lr": self.lr,
            "train_loss": state.loss / self.updates,
            "val_loss": found.loss,
            "top1": found.top1,
            "top5": found.top5,
            "seconds": round(state.seconds, 1),
        }
        state.rows.append(row)
        state.epoch, state.update, state.loss = state.epoch + 1, 0, 0.0
        # Logits that are not finite may seem to be right.
        better = found.top1 > state.best and math.isfinite(found.loss)
        if better:
            state.best = found.top1
        self.saver.save(best=better)
        log.epoch(state.rows, state.best)
        return None

    def evaluate(self) -> Accuracy:
        # Processes may have different numbers of batches, and one may have none. So not the wrapped model, which may
        # wait for the others; and one in shards is put together beforehand, and stays so until the next update.
        model: nn.Module = self.ema.module if self.ema and self.recipe.evaluate == "ema" else self.plain
        if isinstance(model, FSDPModule):
            model.unshard()
            for buffer in self.plain.buffers():  # BatchNorm's statistics, which DDP keeps equal
                broadcast(buffer)
        return evaluate(
            model,
            self.until_stopped(self.val.epoch()),
            self.num_classes,
            self.accelerator.device,
            self.accelerator.autocast,
            channels_last=self.recipe.channels_last,
            reduce=partial(self.accelerator.reduce, reduction="sum"),
        )

    def until_stopped(self, batches: Iterator) -> Iterator:
        """The batches up to the one in which a signal comes to this process."""
        for batch in batches:
            yield batch
            if self.signals:
                return
