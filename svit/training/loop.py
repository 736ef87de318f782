"""The loop of a training: `Training` follows a recipe, from the start or from a state, to the end or a signal."""

import csv
import io
import math
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, broadcast
from omegaconf import OmegaConf
from timm.data import Mixup, resolve_data_config
from timm.layers import DropPath
from timm.loss import create_classification_loss
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask, DistillationTeacher, LogitDistillationTask
from timm.utils import ModelEmaV3
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from svit import processes
from svit.checkpoints import create_model, save_model, start_from, trained_arguments
from svit.convert import is_finite
from svit.errors import InputError
from svit.files import replacing
from svit.training import state as states
from svit.training.data import (
    Loader,
    check_classes,
    check_splits,
    classes_of,
    eval_transform,
    image_mode,
    open_dataset,
    print_contents,
    seed_all,
    train_transform,
)
from svit.training.evaluation import Accuracy, evaluate
from svit.training.recipe import Recipe


class Training:
    """One run of a recipe, from the start or from a state."""

    def __init__(self, recipe: Recipe, output: Path, resume: str | None, cpu: bool) -> None:
        self.recipe, self.output = recipe, output
        start = states.find_start(output, resume)
        if recipe.checkpoint:
            # A part of the recipe from here on, so that whoever reads the new weights knows of it too.
            arguments = trained_arguments(recipe.checkpoint)
            if recipe.img_size:
                arguments.pop("img_size", None)
            recipe.model_args = {**arguments, **recipe.model_args}

        self.sharded = recipe.parallel == "fsdp"
        self.accelerator = Accelerator(
            cpu=cpu or not torch.accelerator.is_available(),  # else its processes would not know each other
            mixed_precision=recipe.mixed_precision or "no",
            gradient_accumulation_steps=recipe.grad_accum,
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        )
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        global_batch_size = recipe.batch_size * recipe.grad_accum * self.world
        self.settings = OmegaConf.to_container(OmegaConf.structured(recipe))
        self.state, tensors = states.State(self.settings, global_batch_size), None
        self.saved = None  # epoch and update of the newest state
        self.moves = start is not None and start.resolve() != (output / states.NAME).resolve()
        if start is not None:
            self.state, tensors = states.read(start, self.settings, global_batch_size)
            self.saved = self.state.epoch, self.state.update
        self.best = states.find_best(start, self.state) if self.moves else None

        self.make_data()
        try:
            self.make_model()
            self.make_optimizer(global_batch_size)
        except InputError:
            raise
        except (AssertionError, TypeError, ValueError) as error:  # timm's, of what the recipe hands to it
            raise InputError(f"the recipe cannot be followed: {type(error).__name__}: {error}") from error
        if tensors is not None:
            self.restore(tensors)

    # What a training is made of

    def make_data(self) -> None:
        r = self.recipe
        kind = r.dataset.partition("/")[0].lower()
        options = {"download": r.download} if kind == "torch" else {}
        streams = {"batch_size": r.batch_size, "seed": r.seed}
        train = partial(open_dataset, r.dataset, r.data_dir, r.train_split, **options)
        val = partial(open_dataset, r.dataset, r.val_dir or r.data_dir, r.val_split, **options)
        if kind in ("wds", "hfids", "tfds"):
            train = partial(train, is_training=True, num_samples=r.train_samples, **streams)
            val = partial(val, num_samples=r.val_samples, **streams)
        with self.accelerator.main_process_first() if r.download else nullcontext():
            self.train_set, self.val_set = train(), val()
        if self.accelerator.is_main_process:
            print_contents("train", self.train_set)
            print_contents("val", self.val_set)
        check_splits(self.train_set, self.val_set, r.num_classes)
        self.classes = classes_of(self.train_set)
        self.num_classes = r.num_classes or (len(self.classes) if self.classes else None)
        if self.num_classes is None:
            raise InputError("num_classes: expected a number, since the data does not tell its classes, got null")
        outputs = r.model_args.get("num_classes", self.num_classes)
        if outputs != self.num_classes:
            raise InputError(f"model_args.num_classes: expected num_classes, {self.num_classes}, got {outputs}")
        if self.classes and len(self.classes) > self.num_classes:
            raise InputError(f"num_classes: expected the data's {len(self.classes)}, got {self.num_classes}")
        self.reopen_train, self.reopen_val = train, val

    def make_model(self) -> None:
        r = self.recipe
        seed_all(r.seed)
        overlay = {k: getattr(r, k) for k in ("mean", "std", "crop_pct", "interpolation") if getattr(r, k) is not None}
        if self.classes:
            overlay["label_names"] = self.classes
        arguments = dict(r.model_args)
        if r.drop_path:
            arguments["drop_path_rate"] = r.drop_path
        overlay = {"pretrained_cfg_overlay": overlay} if overlay else {}
        create = partial(create_model, r.model, pretrained=r.pretrained, num_classes=self.num_classes, **overlay)
        model = create(**arguments)
        if model.pretrained_cfg.get("fixed_input_size") and r.img_size:
            model = create(img_size=r.img_size, **arguments)
        if r.img_size:
            model.pretrained_cfg["input_size"] = (model.pretrained_cfg["input_size"][0], r.img_size, r.img_size)
        if r.checkpoint:
            start_from(model, r.checkpoint, arguments)
        if r.grad_checkpointing:
            model.set_grad_checkpointing()
        if r.channels_last and not self.sharded:  # shards are of contiguous weights; the images' format decides then
            model.to(memory_format=torch.channels_last)
        self.preprocessing = resolve_data_config({}, model=model)

        common = dict(rank=self.rank, world=self.world, seed=r.seed, workers=r.workers, limit=r.max_unreadable)
        common["mode"] = image_mode(self.preprocessing)
        transform = eval_transform(self.preprocessing)
        self.val = Loader(self.val_set, transform, r.batch_size, training=False, reopen=self.reopen_val, **common)
        if r.augment:
            transform = train_transform(
                self.preprocessing,
                train_crop_mode=r.crop,
                scale=r.scale,
                ratio=r.ratio,
                hflip=r.hflip,
                color_jitter=r.color_jitter,
                auto_augment=r.auto_augment,
                re_prob=r.random_erasing,
                re_mode="pixel",
            )
        common.update(reopen=self.reopen_train, repeats=r.repeated_augmentation)
        self.train = Loader(self.train_set, transform, r.batch_size, training=True, **common)
        self.updates = len(self.train) // r.grad_accum  # an epoch
        if self.updates == 0:
            raise InputError(
                f"batch_size: expected at most the {len(self.train.dataset)} images of the data for one update, "
                f"got {self.state.global_batch_size} (batch_size x grad_accum x processes)"
            )
        self.mixup = None
        if r.mixup or r.cutmix:
            self.mixup = Mixup(
                mixup_alpha=r.mixup,
                cutmix_alpha=r.cutmix,
                prob=r.mixup_prob,
                switch_prob=r.mixup_switch_prob,
                label_smoothing=r.label_smoothing,
                num_classes=self.num_classes,
            )
        self.model = model.to(self.accelerator.device).train()
        self.ema = ModelEmaV3(self.model, r.ema, use_warmup=r.ema_warmup) if r.ema is not None else None
        # Set before a schedule changes them.
        self.drop_paths = [(m, m.drop_prob) for m in self.model.modules() if isinstance(m, DropPath)]

    def make_optimizer(self, global_batch_size: int) -> None:
        r = self.recipe
        if self.sharded and self.world > 1:
            # Not by Accelerate, which shards on GPUs alone.
            fully_shard(self.model, mesh=init_device_mesh(self.accelerator.device.type, (self.world,)))
        lr = r.lr * global_batch_size / r.lr_base_size if r.lr_base_size else r.lr
        optimizer = create_optimizer_v2(
            self.model, r.opt, lr=lr, weight_decay=r.weight_decay, layer_decay=r.layer_decay, **r.opt_args
        )
        self.scheduler, _ = create_scheduler_v2(
            optimizer,
            r.sched,
            num_epochs=r.epochs,
            warmup_epochs=r.warmup_epochs,
            warmup_lr=r.warmup_lr,
            min_lr=r.min_lr,
            step_on_epochs=False,
            updates_per_epoch=self.updates,
        )
        if self.scheduler is not None:
            self.scheduler.step_update(0)
        if r.compile:
            self.model.compile()
        self.plain = self.model  # without the wrappers that prepare puts around it
        self.optimizer = self.accelerator.prepare(optimizer)
        if not self.sharded:
            self.model = self.accelerator.prepare(self.model)

        # Mixup gives soft targets with the smoothing in them; where it is off, timm's loss takes classes.
        loss = partial(create_classification_loss, "ce", smoothing=r.label_smoothing)
        task = ClassificationTask
        if r.teacher:
            teacher = DistillationTeacher(self.make_teacher().requires_grad_(False)).to(self.accelerator.device)
            task = partial(
                LogitDistillationTask,
                teacher_model=teacher,
                task_loss_weight=1 - r.teacher_weight,
                distill_loss_weight=r.teacher_weight,
                temperature=r.temperature,
            )
        task = partial(task, self.model, device=self.accelerator.device, verbose=False)
        self.tasks = {soft: task(criterion=loss(soft_targets=soft)) for soft in (False, True)}

    def make_teacher(self) -> nn.Module:
        r = self.recipe
        if r.teacher_checkpoint:
            teacher = create_model(r.teacher, r.teacher_checkpoint, num_classes=self.num_classes)
        else:
            # With timm's number of classes: another one would get a head of random weights.
            teacher = create_model(r.teacher, pretrained=True)
            if teacher.num_classes != self.num_classes:
                raise InputError(
                    f"teacher: expected one of the data's {self.num_classes} classes, got {r.teacher} of "
                    f"{teacher.num_classes}; teacher_checkpoint names weights of your own"
                )
        channels, expected = (config["input_size"][0] for config in (teacher.pretrained_cfg, self.preprocessing))
        if channels != expected:
            raise InputError(f"teacher: expected one for images of {expected} channels, as the model, got {channels}")
        names = teacher.pretrained_cfg.get("label_names")
        if names and self.classes and sorted(names) == sorted(self.classes) and list(names) != self.classes:
            raise InputError(f"teacher: its classes are in another order than the data's: {list(names)[:10]}")
        return teacher

    # Saving and going on

    def save(self, best: bool = False) -> None:
        """Writes the state and the last weights, and these as the best ones if they are.

        Raises:
            InputError: the loss, a weight or a moment is not finite; in all processes. Nothing is written then.
        """
        self.state.loss = self.finite_loss()
        tensors = states.full_state_dict(self.plain, self.optimizer.optimizer, self.sharded)
        if self.ema is not None:
            tensors["ema"] = self.ema.module.state_dict()
        if self.accelerator.scaler is not None:
            tensors["scaler"] = self.accelerator.scaler.state_dict()
        if self.accelerator.is_main_process:
            # The best first: should the state not follow, it is found to be the best once more.
            for name in ("best", "last") if best else ("last",):
                save_model(
                    self.output / f"{name}.safetensors",
                    self.plain,
                    self.recipe.model,
                    self.classes,
                    tensors[self.recipe.evaluate],
                    recipe=self.settings,
                    # In the midst of an epoch no accuracy is known.
                    **(self.state.rows[-1] if self.state.rows and not self.state.update else {}),
                )
            states.write(self.output / states.NAME, self.state, tensors)
        self.saved = self.state.epoch, self.state.update
        self.accelerator.wait_for_everyone()

    def finite_loss(self) -> float:
        """The epoch's loss so far, of all processes, after a look at all that would be saved."""
        parts = {"weights": self.plain.state_dict(), "optimizer's state": self.optimizer.optimizer.state_dict()}
        if self.ema is not None:
            parts["moving average"] = self.ema.module.state_dict()
        lost = [float(not is_finite(part)) for part in parts.values()]
        # One reduction for everything: the processes find out together, or one would wait for the others.
        numbers = torch.tensor([float(self.state.loss), *lost], device=self.accelerator.device)
        loss, *lost = self.accelerator.reduce(numbers, "mean").tolist()
        lost = [f"the {name}" for name, share in zip(parts, lost, strict=True) if share]
        if not math.isfinite(loss):
            raise self.diverged(f"the loss is {loss}")
        if lost:
            raise self.diverged(f"not all numbers of {' and '.join(lost)} are finite")
        return loss

    def diverged(self, what: str) -> InputError:
        r, state = self.recipe, self.state
        advice = [f"lower lr (now {r.lr:g})", f"raise warmup_epochs (now {r.warmup_epochs:g})"]
        advice.append(f"lower clip_grad (now {r.clip_grad:g})" if r.clip_grad else "set clip_grad=1")
        if r.mixed_precision:
            advice.append(f"set mixed_precision=null (now {r.mixed_precision})")
        kept = "nothing of it is saved"
        if self.saved:
            kept += (
                f": --resume goes on from epoch {self.saved[0]}, update {self.saved[1]}, with the same recipe; another "
                f"one starts from its weights in a new folder, with checkpoint={self.output / 'last.safetensors'}"
            )
        return InputError(f"{what} in epoch {state.epoch}, update {state.update}; {', '.join(advice)}; {kept}")

    def restore(self, tensors: dict[str, Any]) -> None:
        states.load_full_state_dict(self.plain, self.optimizer.optimizer, self.sharded, tensors)
        if self.ema is not None:
            self.ema.module.load_state_dict(tensors["ema"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(tensors["scaler"])

    # Training

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
            with replacing(self.output / "recipe.yaml") as part:
                part.write_text(OmegaConf.to_yaml(self.settings))
            if self.state.rows:  # which a kill may have kept from the log
                write_log(self.output / "log.csv", self.state.rows)
            if self.best is not None:
                states.copy(self.best, self.output / states.BEST)
        if self.moves:
            self.save()
        board = SummaryWriter(self.output, purge_step=self.total) if first else None
        bar = tqdm(total=self.recipe.epochs * self.updates, initial=self.total, disable=None if first else True)
        try:
            while self.state.epoch < self.recipe.epochs:
                stopped_by = self.train_epoch(board, bar)
                # Before the evaluation, too: what sends a signal may not wait for the end of a long one.
                self.save()
                stopped_by = stopped_by or self.finish_epoch(board, bar)
                if stopped_by:
                    if first:
                        bar.write(f"{stopped_by.name}: saved; --resume goes on from here")
                    return stopped_by
        finally:
            bar.close()
            if board is not None:
                board.close()
        return None

    @property
    def total(self) -> int:
        """Updates done in all."""
        return self.state.epoch * self.updates + self.state.update

    def train_epoch(self, board: SummaryWriter | None, bar: tqdm) -> signal.Signals | None:
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
            state.loss = state.loss + loss
            state.seconds = before + time.perf_counter() - start
            bar.update()
            if state.update % r.log_every == 0 or state.update == self.updates:
                self.log(board, bar, loss)
            # To ask all processes takes time: so not after each update.
            if self.world == 1 or self.total % max(10 // r.grad_accum, 1) == 0:
                stopped_by = self.stop_signal()
                if stopped_by:
                    return stopped_by
            if r.save_every and self.total % r.save_every == 0 and state.update < self.updates:
                self.save()
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
            images, classes = next(batches)
            check_classes(classes, self.num_classes)  # shards do not tell all theirs before
            # All that is random from here on follows from where the training stands.
            seed_all(r.seed, 1, self.total, part, self.rank)
            images = images.to(
                self.accelerator.device,
                non_blocking=True,
                memory_format=torch.channels_last if r.channels_last else torch.contiguous_format,
            )
            classes = classes.to(self.accelerator.device, non_blocking=True)
            soft = self.mixup is not None and not (r.mixup_off_epoch and self.state.epoch >= r.mixup_off_epoch)
            if soft:
                images, classes = self.mixup(images, classes)
            with self.accelerator.accumulate(self.model):
                with self.accelerator.autocast():
                    part_loss = self.tasks[soft](images, classes)["loss"]
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
        begun = [e for e in self.recipe.drop_path_schedule if e <= epoch]
        if begun:
            rate = self.recipe.drop_path_schedule[max(begun)]
            for module, original in self.drop_paths:
                module.drop_prob = original * rate / self.recipe.drop_path

    def stop_signal(self) -> signal.Signals | None:
        """A signal that any process has received, or None. All processes must call it."""
        if self.world == 1:
            return self.signals[0] if self.signals else None
        received = [float(number in self.signals) for number in processes.STOP_SIGNALS]
        counts = self.accelerator.reduce(torch.tensor(received, device=self.accelerator.device), "sum").tolist()
        return next((number for number, count in zip(processes.STOP_SIGNALS, counts, strict=True) if count), None)

    def log(self, board: SummaryWriter | None, bar: tqdm, loss: torch.Tensor) -> None:
        # The whole epoch's too: one loss that was not finite, in any process, is not forgotten.
        losses = torch.stack([loss, torch.as_tensor(self.state.loss, device=loss.device)])
        value, total = self.accelerator.reduce(losses, "mean").tolist()
        if not math.isfinite(total):
            raise self.diverged(f"the loss is {total}")
        bar.set_postfix(epoch=self.state.epoch, loss=f"{value:.3f}")
        if board is not None:
            board.add_scalar("train/loss", value, self.total)
            board.add_scalar("train/lr", max(group["lr"] for group in self.optimizer.param_groups), self.total)

    def finish_epoch(self, board: SummaryWriter | None, bar: tqdm) -> signal.Signals | None:
        """Evaluates, logs and saves; returns the signal that came before the end of the evaluation, if one did."""
        state = self.state
        found = self.evaluate()
        stopped_by = self.stop_signal()
        if stopped_by:
            return stopped_by
        row = {
            "epoch": state.epoch,
            "lr": max(group["lr"] for group in self.optimizer.param_groups),
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
        self.save(best=better)
        if self.accelerator.is_main_process:
            for key in ("train_loss", "val_loss", "top1", "top5"):
                board.add_scalar(f"epoch/{key}", row[key], state.epoch)
            write_log(self.output / "log.csv", state.rows)
            bar.write(
                f"epoch {row['epoch']}: train loss {row['train_loss']:.3f}, val loss {row['val_loss']:.3f}, "
                f"top-1 {row['top1']:.2f}, top-5 {row['top5']:.2f}, best {state.best:.2f}"
            )
        return None

    def evaluate(self) -> Accuracy:
        # Processes may have different numbers of batches, and one may have none. So not the wrapped model, which may
        # wait for the others; and one in shards is put together beforehand, and stays so until the next update.
        model = self.ema.module if self.recipe.evaluate == "ema" else self.plain
        if isinstance(model, FSDPModule):
            model.unshard()
            for buffer in model.buffers():  # BatchNorm's statistics, which DDP keeps equal
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


def write_log(path: Path, rows: list[dict[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with replacing(path) as part:
        part.write_text(text.getvalue())
