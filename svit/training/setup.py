"""What a recipe makes: data, model, teacher, optimizer, schedule, losses."""

from collections.abc import Callable, Sized
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.loss import create_classification_loss
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.task import ClassificationTask, DistillationTeacher, LogitDistillationTask
from torch import nn
from torch.utils.data import Dataset, IterableDataset

from svit.checkpoints import create_model, pretrained_cfg, size_argument, start_from
from svit.errors import InputError

from .data import (
    Loader,
    Transform,
    check_splits,
    classes_of,
    eval_transform,
    image_mode,
    open_dataset,
    print_contents,
    train_transform,
)
from .recipe import Recipe


@dataclass
class Splits:
    """The data of a training."""

    train: Dataset
    val: Dataset
    reopen_train: Callable[[], Dataset]
    reopen_val: Callable[[], Dataset]
    classes: list[str] | None  # their names, where the data tells them
    num_classes: int


def open_splits(r: Recipe, main: bool, main_first: Callable[[], AbstractContextManager]) -> Splits:
    """Opens both splits and checks that they fit each other and the recipe.

    Args:
        r: the recipe.
        main: whether this process is the one that prints.
        main_first: makes the context in which that process comes before the others.

    Raises:
        InputError: the data cannot be used, or has other classes than the recipe says.
    """
    kind = r.dataset.partition("/")[0].lower()
    options = {"download": r.download} if kind == "torch" else {}
    streams = {"batch_size": r.batch_size, "seed": r.seed}
    train = partial(open_dataset, r.dataset, r.data_dir, r.train_split, **options)
    val = partial(open_dataset, r.dataset, r.val_dir or r.data_dir, r.val_split, **options)
    if kind in ("wds", "hfids", "tfds"):
        train = partial(train, is_training=True, num_samples=r.train_samples, **streams)
        val = partial(val, num_samples=r.val_samples, **streams)
    with main_first() if r.download else nullcontext():
        train_set, val_set = train(), val()
    if main:
        print_contents("train", train_set)
        print_contents("val", val_set)
    check_splits(train_set, val_set, r.num_classes)
    classes = classes_of(train_set)
    num_classes = r.num_classes or (len(classes) if classes else None)
    if num_classes is None:
        raise InputError("num_classes: expected a number, since the data does not tell its classes, got null")
    outputs = r.model_args.get("num_classes", num_classes)
    if outputs != num_classes:
        raise InputError(f"model_args.num_classes: expected num_classes, {num_classes}, got {outputs}")
    if classes and len(classes) > num_classes:
        raise InputError(f"num_classes: expected the data's {len(classes)}, got {num_classes}")
    return Splits(train_set, val_set, train, val, classes, num_classes)


def describe(splits: Splits) -> dict[str, Any]:
    """What a training remembers of its data: the classes, and how many images each split has, as far as they tell."""
    counts = {
        name: None if isinstance(dataset, IterableDataset) else len(cast(Sized, dataset))
        for name, dataset in (("train", splits.train), ("val", splits.val))
    }
    return {"classes": splits.classes, **counts}


def make_model(r: Recipe, splits: Splits) -> nn.Module:
    """The model, on the CPU, with the weights that it starts from and the data's classes in its `pretrained_cfg`."""
    overlay = {k: getattr(r, k) for k in ("mean", "std", "crop_pct", "interpolation") if getattr(r, k) is not None}
    if splits.classes:
        overlay["label_names"] = splits.classes
    arguments = dict(r.model_args)
    if r.drop_path:
        arguments["drop_path_rate"] = r.drop_path
    overlay = {"pretrained_cfg_overlay": overlay} if overlay else {}
    size = size_argument(r.model, r.img_size)
    model: Any = create_model(
        r.model, pretrained=r.pretrained, num_classes=splits.num_classes, **overlay, **arguments, **size
    )
    if pretrained_cfg(model).get("fixed_input_size"):
        for key, value in (("train_size", r.train_size), ("train_size_schedule", r.train_size_schedule)):
            if value:
                raise InputError(f"{key}: expected none, since {r.model} takes images of one size, got {value}")
    if r.img_size:
        pretrained_cfg(model)["input_size"] = (pretrained_cfg(model)["input_size"][0], r.img_size, r.img_size)
    if r.checkpoint:
        start_from(model, r.checkpoint, arguments)
    if r.grad_checkpointing:
        model.set_grad_checkpointing()
    return model


def make_loaders(
    r: Recipe, splits: Splits, preprocessing: dict[str, Any], rank: int, world: int
) -> tuple[Loader, Loader]:
    """The batches of training, which alone have `train_size`, and of evaluation, for one of `world` processes."""
    common: dict[str, Any] = dict(rank=rank, world=world, seed=r.seed, workers=r.workers, limit=r.max_unreadable)
    common["mode"] = image_mode(preprocessing)
    transform = eval_transform(preprocessing)
    val = Loader(splits.val, transform, r.batch_size, training=False, reopen=splits.reopen_val, **common)
    transform = training_transform(r, preprocessing, r.train_size)
    schedule = {epoch: training_transform(r, preprocessing, size) for epoch, size in r.train_size_schedule.items()}
    common.update(reopen=splits.reopen_train, repeats=r.repeated_augmentation, transform_schedule=schedule)
    return Loader(splits.train, transform, r.batch_size, training=True, **common), val


def training_transform(r: Recipe, preprocessing: dict[str, Any], size: int | None) -> Transform:
    """The transform for images of training, of so many pixels or, with None, of as many as in the evaluation."""
    if size:
        preprocessing = {**preprocessing, "input_size": (preprocessing["input_size"][0], size, size)}
    if not r.augment:
        return eval_transform(preprocessing)
    return train_transform(
        preprocessing,
        train_crop_mode=r.crop,
        scale=r.scale,
        ratio=r.ratio,
        hflip=r.hflip,
        color_jitter=r.color_jitter,
        auto_augment=r.auto_augment,
        re_prob=r.random_erasing,
        re_mode="pixel",
    )


def make_mixup(r: Recipe, num_classes: int) -> Mixup | None:
    if not (r.mixup or r.cutmix):
        return None
    return Mixup(
        mixup_alpha=r.mixup,
        cutmix_alpha=r.cutmix,
        prob=r.mixup_prob,
        switch_prob=r.mixup_switch_prob,
        label_smoothing=r.label_smoothing,
        num_classes=num_classes,
    )


def make_optimizer(
    r: Recipe, model: nn.Module, global_batch_size: int, updates: int
) -> tuple[torch.optim.Optimizer, Scheduler | None]:
    """The optimizer and the schedule of its rates, at the rates of the first update.

    Args:
        r: the recipe.
        model: whose weights it updates.
        global_batch_size: images of an update, in all processes together.
        updates: of an epoch.
    """
    lr = r.lr * global_batch_size / r.lr_base_size if r.lr_base_size else r.lr
    optimizer = create_optimizer_v2(
        model, r.opt, lr=lr, weight_decay=r.weight_decay, layer_decay=r.layer_decay, **r.opt_args
    )
    scheduler, _ = create_scheduler_v2(
        optimizer,
        r.sched,
        num_epochs=r.epochs,
        warmup_epochs=r.warmup_epochs,  # type: ignore[arg-type]  # a fraction of an epoch will do
        warmup_lr=r.warmup_lr,
        min_lr=r.min_lr,
        step_on_epochs=False,
        updates_per_epoch=updates,
    )
    if scheduler is not None:
        scheduler.step_update(0)
    return optimizer, scheduler


def make_tasks(
    r: Recipe, model: nn.Module, splits: Splits, preprocessing: dict[str, Any], device: torch.device
) -> dict[bool, nn.Module]:
    """What computes the loss of a batch: True: of soft targets, as mixup gives them; False: of classes."""
    # Mixup gives soft targets with the smoothing in them; where it is off, timm's loss takes classes.
    loss = partial(create_classification_loss, "ce", smoothing=r.label_smoothing)
    task: Callable[..., nn.Module] = ClassificationTask
    if r.teacher:
        teacher = DistillationTeacher(make_teacher(r, splits, preprocessing).requires_grad_(False)).to(device)
        task = partial(
            LogitDistillationTask,
            teacher_model=teacher,
            task_loss_weight=1 - r.teacher_weight,
            distill_loss_weight=r.teacher_weight,
            temperature=r.temperature,
        )
    task = partial(task, model, device=device, verbose=False)
    return {soft: task(criterion=loss(soft_targets=soft)) for soft in (False, True)}


class Teacher(nn.Module):
    """A model that teaches some of its classes, in another order, from images of another size.

    Args:
        model: (B, C, H, W) to logits.
        classes: which of its logits are returned, in that order; None: all.
        size: pixels, to which square images are resized; None: they stay as they are.
    """

    def __init__(self, model: nn.Module, classes: list[int] | None = None, size: int | None = None) -> None:
        super().__init__()
        self.model, self.classes, self.size = model, classes, size
        self.pretrained_cfg = pretrained_cfg(model)  # timm reads mean and standard deviation from it

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.size is not None and images.shape[-1] != self.size:
            images = F.interpolate(images, (self.size, self.size), mode="bicubic", antialias=True)
        logits = self.model(images)
        return logits if self.classes is None else logits[:, self.classes]


def make_teacher(r: Recipe, splits: Splits, preprocessing: dict[str, Any]) -> Teacher:
    """The model whose predictions are learned.

    Raises:
        InputError: it has other classes or channels than the model that learns, or takes images of another size.
    """
    assert r.teacher is not None
    arguments: dict[str, Any] = {"checkpoint": r.teacher_checkpoint} if r.teacher_checkpoint else {"pretrained": True}
    if r.teacher_checkpoint and r.teacher_classes is None:
        # Else timm's number of classes, or that of the checkpoint: another one would get a head of random weights.
        arguments["num_classes"] = splits.num_classes
    model: Any = create_model(r.teacher, **arguments)
    if r.teacher_classes is None and model.num_classes != splits.num_classes:
        raise InputError(
            f"teacher: expected one of the data's {splits.num_classes} classes, got {r.teacher} of "
            f"{model.num_classes}; teacher_checkpoint names weights of your own, teacher_classes its outputs"
        )
    if r.teacher_classes is not None and not (
        len(r.teacher_classes) == splits.num_classes and max(r.teacher_classes) < model.num_classes
    ):
        raise InputError(
            f"teacher_classes: expected {splits.num_classes} numbers, one for each class of the data, less than the "
            f"{model.num_classes} of {r.teacher}, got {r.teacher_classes}"
        )
    teacher = Teacher(model, r.teacher_classes, r.teacher_size)
    channels, expected = (config["input_size"][0] for config in (teacher.pretrained_cfg, preprocessing))
    if channels != expected:
        raise InputError(f"teacher: expected one for images of {expected} channels, as the model, got {channels}")
    sizes = [(size, size) for size in (r.train_size, *r.train_size_schedule.values()) if size]
    for size in sizes if r.train_size else [tuple(preprocessing["input_size"][1:]), *sizes]:
        try:  # now, not at the epoch of a schedule
            with torch.no_grad():
                teacher(torch.zeros(1, channels, *size))
        except (AssertionError, RuntimeError) as error:
            message = f"teacher: {r.teacher} takes no images of {size[0]} x {size[1]}, as the training has: {error}"
            raise InputError(message) from error
    names = None if r.teacher_classes else teacher.pretrained_cfg.get("label_names")
    if names and splits.classes and sorted(names) == sorted(splits.classes) and list(names) != splits.classes:
        raise InputError(f"teacher: its classes are in another order than the data's: {list(names)[:10]}")
    return teacher
