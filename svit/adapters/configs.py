"""The configs that come with the package: finds them by name, sets their data folder, adapts them to the machine."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope

import svit
from svit.errors import InputError
from svit.names import did_you_mean

__all__ = ["ConfigError", "config_names", "find_config", "fit_to_machine", "load_config"]


class ConfigError(InputError):
    """A config cannot be found or used. The message names the part and what is wrong with it."""


def configs_folder() -> Path:
    """The folder of the configs: inside the installed package, or beside the package in a clone."""
    package = Path(svit.__file__).parent
    inside = package / "mm_configs"
    return inside if inside.is_dir() else package.parent / "mm_configs"


def config_names() -> list[str]:
    """Names of all configs, such as 'mask-rcnn_svit-s_fpn_1x_coco'."""
    return sorted(path.stem for kind in ("mmdet", "mmseg") for path in (configs_folder() / kind).glob("*.py"))


def find_config(name: str) -> Path:
    """Returns the file of a config. `name` is a path, or the name of one of our configs with or without '.py'.

    Raises:
        ConfigError: there is neither such a file nor such a name.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if path.name == name:
        for kind in ("mmdet", "mmseg"):
            ours = configs_folder() / kind / f"{name.removesuffix('.py')}.py"
            if ours.is_file():
                return ours
    near = did_you_mean(path.name.removesuffix(".py"), config_names())
    raise ConfigError(f"config: no such file or name: {name}{near}")


def load_config(name: str, options: dict[str, Any] | None = None, data_root: str | None = None) -> Config:
    """Reads a config, registers the modules of its package and sets its default scope.

    Args:
        name: as in `find_config`.
        options: values to replace, by dotted names, as mmengine's `Config.merge_from_dict` takes them.
        data_root: folder of the data. It replaces the config's `data_root` everywhere.

    Raises:
        ConfigError: the config does not exist, cannot be read, has no model, does not take the options or has no
            `data_root` to replace, or a package that it needs cannot be imported.
    """
    path = find_config(name)
    try:
        config = Config.fromfile(path)
    except Exception as error:  # a config is a program: anything can happen
        raise ConfigError(f"{path}: cannot be read as a config ({type(error).__name__}: {error})") from error
    if "model" not in config:
        raise ConfigError(f"{path}: expected a config of a detector or segmentor, it has no `model`")
    if data_root is not None:
        if not config.get("data_root"):
            raise ConfigError(f"{path}: has no data_root that {data_root} could replace")
        config = Config(move_data(config.to_dict(), str(config.data_root), data_root), filename=str(path))
    try:
        config.merge_from_dict(options or {})
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: does not take {options}: {error}") from error
    try:
        init_scope(config)
    except (ImportError, AssertionError) as error:  # the latter of a version of mmcv that does not go with the others
        install = "pip install 'svit[mm]', and mmcv"
        raise ConfigError(f"{path}: needs what cannot be imported ({error}): {install}") from error
    return config


def move_data(value: Any, old: str, new: str) -> Any:
    """`value` with every path in the folder `old` moved to the folder `new`."""
    old = old.rstrip("/")

    def move(path: str) -> str:
        if path.rstrip("/") == old:
            return new
        return str(Path(new, path.removeprefix(old + "/"))) if path.startswith(old + "/") else path

    return map_strings(value, move)


def map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """`value` with `change` applied to every string in nested dicts, lists and tuples. Keys do not change."""
    if isinstance(value, dict):
        return type(value)({k: map_strings(v, change) for k, v in value.items()})
    if isinstance(value, (list, tuple)):
        return type(value)(map_strings(v, change) for v in value)
    return change(value) if isinstance(value, str) else value


def init_scope(config: Config) -> None:
    """Registers the modules of the config's package and makes that package the default scope."""
    scope = config.get("default_scope", "mmengine")
    if scope == "mmdet":
        from mmdet.utils import register_all_modules
    elif scope == "mmseg":
        from mmseg.utils import register_all_modules
    else:
        init_default_scope(scope)
        return
    register_all_modules(init_default_scope=True)


def fit_to_machine(config: Config) -> None:
    """Without a GPU, sets gloo as the processes' backend, and replaces SyncBN, which needs a GPU, by BatchNorm."""
    if torch.cuda.is_available():
        return
    config.env_cfg = {**(config.get("env_cfg") or {}), "dist_cfg": dict(backend="gloo")}
    config.model_wrapper_cfg = {
        "type": "MMDistributedDataParallel",
        "broadcast_buffers": False,
        "find_unused_parameters": config.get("find_unused_parameters", False),
        **(config.get("model_wrapper_cfg") or {}),
        "device_ids": None,
    }
    config.sync_bn = None
    config.model = map_strings(config.model, lambda text: "BN" if text == "SyncBN" else text)
