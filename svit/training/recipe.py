"""Recipes: everything that decides how a training comes out, in a YAML file.

A recipe may start from another one: `base: NAME_OR_FILE`.
"""

import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, cast

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from timm.optim import list_optimizers
from yaml import YAMLError

from svit.errors import InputError
from svit.files import check_utf8
from svit.names import did_you_mean

FOLDER = Path(__file__).parent.parent / "recipes"


@dataclass
class Recipe:
    """One training. The comments give units and what a value of null means."""

    # Model
    model: str = MISSING  # any of timm's
    model_args: dict[str, Any] = field(default_factory=dict)  # further arguments of timm.create_model
    num_classes: int | None = None  # null: as many as the data has
    checkpoint: str | None = None  # weights to start from; the head is left out where its size differs
    pretrained: bool = False  # start from timm's weights
    drop_path: float = 0.0
    drop_path_schedule: dict[int, float] = field(default_factory=dict)  # from that epoch on, another drop_path
    freeze_bn: bool = False  # keep BatchNorm's running statistics as they are
    grad_checkpointing: bool = False

    # Data
    dataset: str = "folder"  # or a tar file; digits; else a name of timm's: torch/..., wds/...
    data_dir: str = MISSING
    val_dir: str | None = None  # null: data_dir
    train_split: str = "train"
    val_split: str = "validation"
    download: bool = False
    train_samples: int | None = None  # images an epoch, of streams that do not say
    val_samples: int | None = None
    img_size: int | None = None  # pixels; null: the model's own
    train_size: int | None = None  # pixels in training alone: a smaller one is faster; null: img_size
    train_size_schedule: dict[int, int] = field(default_factory=dict)  # from that epoch on, another train_size
    crop_pct: float | None = None  # of the evaluation; null: the model's own
    interpolation: str | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    max_unreadable: int = 10  # images of a split that may be unreadable and are then skipped

    # Augmentation (timm's)
    augment: bool = True  # off: images are resized and cropped as in the evaluation
    crop: str = "rrc"  # rrc: a random part, resized; rkrr: half the images resized, then cut or padded anywhere
    scale: list[float] = field(default_factory=lambda: [0.08, 1.0])  # share of the area that is seen; rkrr: over 1 too
    ratio: list[float] = field(default_factory=lambda: [3 / 4, 4 / 3])
    hflip: float = 0.5
    color_jitter: float = 0.0
    auto_augment: str | None = None
    random_erasing: float = 0.0
    repeated_augmentation: int = 1  # copies of an image in an epoch, of as many fewer images
    mixup: float = 0.0
    cutmix: float = 0.0
    mixup_prob: float = 1.0
    mixup_switch_prob: float = 0.5
    mixup_off_epoch: int | None = None
    label_smoothing: float = 0.0

    # Teacher
    teacher: str | None = None  # a model of timm whose predictions are learned too
    teacher_checkpoint: str | None = None  # null: timm's weights
    teacher_classes: list[int] | None = None  # its outputs for the data's classes, in their order; null: it has these
    teacher_size: int | None = None  # pixels, to which it gets the images resized; null: as they are
    teacher_weight: float = 0.5  # of the teacher's loss; the labels' has the rest
    temperature: float = 1.0

    # Optimization
    epochs: int = MISSING
    batch_size: int = 128  # images a step and process
    grad_accum: int = 1  # steps an update
    opt: str = "adamw"
    opt_args: dict[str, Any] = field(default_factory=dict)
    lr: float = 1e-3  # at `lr_base_size` images an update
    lr_base_size: int | None = None  # scale lr with the images of an update; null: do not
    weight_decay: float = 0.05
    layer_decay: float | None = None
    clip_grad: float | None = None  # largest norm of the gradient
    sched: str = "cosine"
    warmup_epochs: float = 0
    warmup_lr: float = 1e-6
    min_lr: float = 0.0
    ema: float | None = None  # decay of the moving average of the weights; null: none
    ema_warmup: bool = False
    evaluate: str = "model"  # which weights are evaluated and kept as best: model or ema
    seed: int = 0

    # Machine
    mixed_precision: str | None = None  # bf16 or fp16; null: float32
    channels_last: bool = True
    compile: bool = False
    parallel: str = "ddp"  # among processes: ddp or fsdp
    workers: int = 4  # processes that read images, for each process that trains
    save_every: int | None = None  # updates; null: at the end of each epoch alone
    log_every: int = 50  # updates


# Deprecated keys, and those in their place.
RENAMED = {"lr_batch": "lr_base_size"}

# Keys that may differ when a training resumes: they decide where and how fast it runs, not what comes out.
FREE = {"data_dir", "val_dir", "download", "max_unreadable", "workers", "save_every", "log_every"}

# Keys whose value is a mapping of epochs to values: a later one takes the place of the whole earlier one.
SCHEDULES = ("drop_path_schedule", "train_size_schedule")

CHOICES = {
    "crop": ("rrc", "rkrr"),
    "evaluate": ("model", "ema"),
    "mixed_precision": (None, "bf16", "fp16"),
    "parallel": ("ddp", "fsdp"),
    "sched": ("cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant", "none"),
    "interpolation": (None, "nearest", "bilinear", "bicubic", "lanczos"),
}


@dataclass(frozen=True)
class Range:
    """The numbers from `least` to `most`, with or without these two."""

    least: float
    most: float = math.inf
    more: bool = False  # than `least`
    less: bool = False  # than `most`

    def __contains__(self, number: float) -> bool:
        above = number > self.least if self.more else number >= self.least
        below = number < self.most if self.less else number <= self.most
        return above and below

    def __str__(self) -> str:
        above = f"more than {self.least:g}" if self.more else f"at least {self.least:g}"
        below = f"less than {self.most:g}" if self.less else f"at most {self.most:g}"
        return above if self.most == math.inf else f"{above} and {below}"


# Of each number in a key's value.
RANGES = {
    Range(1): (
        "epochs",
        "batch_size",
        "grad_accum",
        "repeated_augmentation",
        "log_every",
        "img_size",
        "train_size",
        "teacher_size",
        "save_every",
        "num_classes",
        "train_samples",
        "val_samples",
        "lr_base_size",
    ),
    Range(0): (
        "workers",
        "max_unreadable",
        "seed",
        "teacher_classes",
        "color_jitter",
        "mixup",
        "cutmix",
        "mixup_off_epoch",
        "lr",
        "warmup_epochs",
        "warmup_lr",
        "min_lr",
        "weight_decay",
    ),
    Range(0, more=True): ("scale", "ratio", "clip_grad", "temperature"),
    Range(0, 1): ("hflip", "random_erasing", "mixup_prob", "mixup_switch_prob", "teacher_weight"),
    Range(0, 1, less=True): ("drop_path", "drop_path_schedule", "label_smoothing", "ema"),
    Range(0, 1, more=True): ("crop_pct", "layer_decay"),
}


def load_recipe(name: str, changes: Sequence[str] = (), data_dir: str | None = None) -> Recipe:
    """Reads a recipe and checks it.

    Args:
        name: a YAML file, or the name of one that comes with the package.
        changes: "key=value" each, applied on top; a value is YAML. A key within another has a dot: `opt_args.eps=1e-6`
            changes one value of a mapping, `opt_args={}` all of it.
        data_dir: in place of the recipe's, taken as it is.

    Raises:
        InputError: no such recipe, an unknown key (the nearest is named), a value of another type or out of range.
    """
    known = {f.name for f in fields(Recipe)}
    for change in changes:
        if "=" not in change:
            raise InputError(f"--set: expected KEY=VALUE, got {change!r}")
    try:
        changed = with_new_keys(OmegaConf.from_dotlist(list(changes)), "--set")
        read: Any = merge(read_yaml(name), changed, [change.partition("=")[0] for change in changes])
        if data_dir is not None:
            read["data_dir"] = data_dir.replace("${", "\\${")  # no name of another key
        for key in read:
            if key not in known:
                raise InputError(f"{name}: no recipe has a key {key!r}{did_you_mean(str(key), known)}")
            if OmegaConf.is_missing(read, key):
                raise InputError(f"{name}: {key}: expected a value, which --set {key}=... gives, got none")
        recipe = cast(Recipe, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Recipe), read)))
    except (OmegaConfBaseException, YAMLError, OSError, TypeError, UnicodeDecodeError) as error:
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise InputError(f"{name}: {what}{where(error)}") from error
    check(recipe, name)
    return recipe


def read_yaml(name: str, seen: tuple[Path, ...] = ()) -> DictConfig:
    """A recipe's keys; those of the recipe that its key `base` names come first."""
    path = find_recipe(name)
    if path in seen:
        raise InputError(f"base: {name} starts from itself")
    read = OmegaConf.load(path)
    if not isinstance(read, DictConfig):
        raise InputError(f"{name}: expected keys and values, got a list")
    base = read.pop("base", None)
    read = with_new_keys(read, name)
    if base is None:
        return read
    if not isinstance(base, str):
        raise InputError(f"{name}: base: expected a file or the name of a recipe, got {base}")
    return merge(read_yaml(base, (*seen, path)), read, SCHEDULES)


def merge(before: DictConfig, after: DictConfig, replaced: Sequence[str]) -> DictConfig:
    """Both, where values of `after` count. Mappings are joined, but for those of the keys `replaced`."""
    for key in replaced:
        if key in before and key in after:
            before.pop(key)
    return cast(DictConfig, OmegaConf.merge(before, after))


def with_new_keys(read: DictConfig, name: str) -> DictConfig:
    """`read` with the new names of deprecated keys, each with a warning, and with numbers for the epochs of schedules.

    `name` says where they stand. JSON, as in the weights, and keys with a dot know text only.
    """
    for key in SCHEDULES:
        if isinstance(read.get(key), DictConfig):
            read[key] = {int(k) if str(k).isdecimal() else k: value for k, value in read[key].items()}
    for old, new in RENAMED.items():
        if old not in read:
            continue
        if new in read:
            raise InputError(f"{name}: {old}: expected {new} alone, whose deprecated name it is, got both")
        warnings.warn(f"{name}: the key {old} is deprecated, use {new}", FutureWarning, stacklevel=2)
        read[new] = read.pop(old)
    return read


def where(error: Exception) -> str:
    """The key or the line that an error is about, as far as it tells."""
    key, mark = getattr(error, "full_key", None), getattr(error, "problem_mark", None)
    return f" (key {key!r})" if key else f" (line {mark.line + 1})" if mark else ""


def find_recipe(name: str) -> Path:
    """The file of a recipe's path or name."""
    for path in (Path(name), FOLDER / f"{name}.yaml"):
        if path.is_file():
            return path
    raise InputError(f"recipe: no file {name} and no recipe of that name; there are {', '.join(recipe_names())}")


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def check(recipe: Recipe, name: str) -> None:
    for key, text in vars(recipe).items():
        if isinstance(text, str):
            check_utf8(f"{name}: {key}", text)
    for key, choices in CHOICES.items():
        if getattr(recipe, key) not in choices:
            raise InputError(f"{name}: {key}: expected {' or '.join(map(str, choices))}, got {getattr(recipe, key)!r}")
    for allowed, keys in RANGES.items():
        for key in keys:
            value = getattr(recipe, key)
            if value is None:
                continue
            numbers = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
            if not all(map(math.isfinite, numbers)):
                raise InputError(f"{name}: {key}: expected finite numbers, got {value}")
            if not all(number in allowed for number in numbers):
                raise InputError(f"{name}: {key}: expected {allowed}, got {value}")
    if min(recipe.train_size_schedule.values(), default=1) < 1:
        raise InputError(f"{name}: train_size_schedule: expected sizes of at least 1, got {recipe.train_size_schedule}")
    for key in SCHEDULES:
        if min(getattr(recipe, key), default=0) < 0:
            raise InputError(f"{name}: {key}: expected epochs of at least 0, got {getattr(recipe, key)}")
    channels = [3, recipe.model_args.get("in_chans", 3)]  # those of RGB are made into those of other channels
    for key, lengths in {"scale": [2], "ratio": [2], "mean": channels, "std": channels}.items():
        numbers = getattr(recipe, key)
        if numbers is not None and len(numbers) not in lengths:
            raise InputError(f"{name}: {key}: expected {lengths[-1]} numbers, got {numbers}")
        if numbers is not None and not all(map(math.isfinite, numbers)):
            raise InputError(f"{name}: {key}: expected finite numbers, got {numbers}")
    for key in ("scale", "ratio"):
        if getattr(recipe, key)[0] > getattr(recipe, key)[1]:
            raise InputError(f"{name}: {key}: expected the smaller number first, got {getattr(recipe, key)}")
    if recipe.crop == "rrc" and recipe.scale[1] > 1:
        raise InputError(f"{name}: scale: expected at most 1 with crop: rrc, got {recipe.scale}")
    if recipe.std and min(recipe.std) <= 0:
        raise InputError(f"{name}: std: expected numbers above 0, got {recipe.std}")
    optimizers = cast(list[str], list_optimizers())
    if recipe.opt.lower().removeprefix("lookahead_") not in optimizers:
        raise InputError(f"{name}: opt: no optimizer {recipe.opt!r} in timm{did_you_mean(recipe.opt, optimizers)}")
    if recipe.evaluate == "ema" and recipe.ema is None:
        raise InputError(f"{name}: evaluate: expected model, since ema is null, got 'ema'")
    if recipe.ema is not None and recipe.parallel == "fsdp":
        raise InputError(f"{name}: ema: expected null with parallel: fsdp, which shards the weights, got {recipe.ema}")
    if recipe.drop_path_schedule and not recipe.drop_path:
        raise InputError(f"{name}: drop_path: expected more than 0 with a drop_path_schedule, got {recipe.drop_path}")
    if (recipe.mixup or recipe.cutmix) and recipe.batch_size % 2:
        raise InputError(f"{name}: batch_size: expected an even number with mixup or cutmix, got {recipe.batch_size}")


def as_dict(recipe: Recipe) -> dict[str, Any]:
    """A recipe's keys and values, of types that YAML and JSON know."""
    return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.structured(recipe)))


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The differences that keep a training of the one recipe from resuming with the other, a line for each key.

    A key that one of them lacks is newer than that recipe and has its default. Either may come from JSON.
    """
    old, new = (
        {**vars(Recipe()), **{RENAMED.get(key, key): value for key, value in recipe.items()}} for recipe in (old, new)
    )
    return [
        f"{key}: {old.get(key)!r}, now {new.get(key)!r}"
        for key in sorted(set(old) | set(new))
        if key not in FREE and json.loads(json.dumps([old.get(key)])) != json.loads(json.dumps([new.get(key)]))
    ]
