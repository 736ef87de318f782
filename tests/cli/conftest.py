"""Handwritten digits and a small model that tells them apart, for the tools that evaluate and classify."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import image_data
from svit.checkpoints import save_model

MEAN, STD = (0.4, 0.5, 0.6), (0.3, 0.25, 0.2)
MODEL_ARGS = {"stem_stride": 2, "stoken_size": [2, 1, 1, 1]}


def pixels(images: list[Image.Image]) -> torch.Tensor:
    """Images as the model sees them (B, 3, H, W), without any library's transforms."""
    rgb = torch.stack([torch.tensor(np.asarray(image.convert("RGB"))).permute(2, 0, 1) / 255 for image in images])
    return (rgb - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> SimpleNamespace:
    """The folder `root`, a `checkpoint` of test_svit, the `model` itself, `files` and `classes` of the evaluation."""
    folder = tmp_path_factory.mktemp("digits")
    root = image_data.folder(folder / "data")
    torch.manual_seed(0)
    overlay = {"input_size": (3, 16, 16), "crop_pct": 1.0, "mean": MEAN, "std": STD}
    model = timm.create_model("test_svit", num_classes=5, pretrained_cfg_overlay=overlay, **MODEL_ARGS).eval()
    # The statistics of one pass, then a head in closed form: good enough to be right often, and wrong now and then.
    train, targets = [], []
    for number, name in enumerate(image_data.CLASSES):
        train += image_data.digits(name, 0, image_data.TRAIN)
        targets += [number] * image_data.TRAIN
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(pixels(train))
        features = model.eval().forward_head(model.forward_features(pixels(train)), pre_logits=True).flatten(1)
        mean = features.mean(0)
        moments = (features - mean).T @ (features - mean)
        moments += 0.01 * moments.trace() / len(moments) * torch.eye(len(moments))
        wanted = 4 * torch.nn.functional.one_hot(torch.tensor(targets)).float()
        model.head.fc.weight.copy_(torch.linalg.solve(moments, (features - mean).T @ wanted).T)
        model.head.fc.bias.copy_(-model.head.fc.weight @ mean)
    checkpoint = folder / "digits.safetensors"
    save_model(checkpoint, model, "test_svit", list(image_data.CLASSES), recipe={"model_args": MODEL_ARGS})
    files = [path for name in image_data.CLASSES for path in sorted((root / "val" / name).iterdir())]
    classes = torch.arange(5).repeat_interleave(image_data.VAL)
    return SimpleNamespace(root=root, checkpoint=checkpoint, model=model, files=files, classes=classes)


@pytest.fixture
def see():
    """Files as the model sees them, `edge` pixels wide before the middle of `size` pixels is cut out."""

    def see(files: list[Path], size: int = 16, edge: int = 16) -> torch.Tensor:
        start = (edge - size) // 2
        images = [Image.open(file).convert("RGB").resize((edge, edge), Image.BICUBIC) for file in files]
        return pixels([image.crop((start, start, start + size, start + size)) for image in images])

    return see
