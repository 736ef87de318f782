"""A look at every file of the data sets before the first iteration."""

from collections.abc import Iterable

from mmengine.dist import all_gather_object, get_dist_info
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from PIL import Image, UnidentifiedImageError

__all__ = ["CheckImagesHook", "ImageError"]


class ImageError(ValueError):
    """Images or masks are missing or cannot be decoded; the message names them."""


@HOOKS.register_module()
class CheckImagesHook(Hook):
    """Opens every image and mask of the training and validation data before training starts.

    Only the header is read, some tenths of a millisecond a file, so that a file that is missing, empty or no image
    stops the run at once instead of after hours. Processes share the work. `custom_hooks=[]` in a config leaves it out,
    for data that Pillow cannot open.

    Args:
        decode: read each file to its end, which also finds those that are cut short, and takes as long as an epoch's
            loading of images.

    Raises:
        ImageError: names the first few such files, and how many there are.
    """

    def __init__(self, decode: bool = False) -> None:
        self.decode = decode

    def before_train(self, runner: Runner) -> None:
        loaders = [runner.train_dataloader]
        if runner.val_loop is not None:
            loaders.append(runner.val_dataloader)
        for loader in loaders:
            check_images(loader.dataset, self.decode)

    def before_test(self, runner: Runner) -> None:
        check_images(runner.test_dataloader.dataset, self.decode)


def check_images(dataset, decode: bool = False) -> None:
    """Opens every file that a data set of mmengine's (`get_data_info`) names."""
    bad = {}
    rank, processes = get_dist_info()
    for info in map(dataset.get_data_info, range(rank, len(dataset), processes)):
        for key in ("img_path", "seg_map_path"):
            file = info.get(key)
            if file is not None and "://" not in str(file):  # a store of another kind is left alone
                problem = problem_with(file, decode)
                if problem:
                    bad[str(file)] = problem
    bad = {file: problem for part in all_gather_object(bad) for file, problem in part.items()}
    if bad:
        raise ImageError(f"{len(bad)} of the images cannot be read: {first(f'{f} ({p})' for f, p in bad.items())}")


def problem_with(file, decode: bool = False) -> str | None:
    """What is wrong with an image, None if nothing is."""
    try:
        with Image.open(file) as image:
            if decode:
                image.load()
            return None
    except FileNotFoundError:
        return "no such file"
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError):
        return "not an image, or a damaged one"


def first(names: Iterable[str], limit: int = 5) -> str:
    names = list(names)
    return ", ".join(names[:limit]) + (" ..." if len(names) > limit else "")
