"""The main job from end to end, on real images that scikit-learn ships: train, save, load through timm, evaluate, look.

    python tools/demo.py [--epochs 6] [--out outputs/demo]

Trains `svit_nano_32` on scikit-learn's handwritten digits (1,797 images of 8 x 8 pixels, enlarged to 32 x 32; every
fifth is kept for the test).
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from tqdm import tqdm

import svit  # registers the models
from svit.files import replacing
from svit.visualize import draw_super_tokens, last_of_stages, watch

MODEL = "svit_nano_32"
ZOO = ["svit_tiny", "svit_small", "svit_base", "svit_large"]


def digits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Training images (N, 1, 32, 32) and classes (N,), then those of the test."""
    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 8 - 1  # 0 ... 16 to -1 ... 1
    images = F.interpolate(images, size=(32, 32), mode="bicubic", align_corners=False)
    classes = torch.from_numpy(data.target)
    test = torch.arange(len(images)) % 5 == 0
    return images[~test], classes[~test], images[test], classes[test]


def train(model: torch.nn.Module, images: torch.Tensor, classes: torch.Tensor, epochs: int, batch_size: int) -> None:
    optimizer = create_optimizer_v2(model, opt="adamw", lr=2e-3, weight_decay=0.05)
    steps = epochs * (len(images) // batch_size)
    scheduler = CosineLRScheduler(optimizer, t_initial=steps, warmup_t=steps // 10, warmup_lr_init=1e-5)
    model.train()
    bar = tqdm(total=steps, desc="training", unit="step")
    step = 0
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(batch_size)[: len(images) // batch_size]:
            scheduler.step_update(step)
            scheduler.step(step)
            shift = torch.randint(-2, 3, (2,)).tolist()
            loss = F.cross_entropy(model(images[batch].roll(shift, (2, 3))), classes[batch], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            bar.update()
            bar.set_postfix(loss=f"{loss.item():.3f}")
    bar.close()


@torch.inference_mode()
def accuracy(model: torch.nn.Module, images: torch.Tensor, classes: torch.Tensor) -> float:
    return (model.eval()(images).argmax(1) == classes).float().mean().item()


def save(model: torch.nn.Module, path: Path) -> None:
    """Writes the weights as safetensors; the file appears whole or not at all."""
    with replacing(path) as part:
        save_file(model.state_dict(), part)


def draw(model: torch.nn.Module, image: torch.Tensor, path: Path) -> None:
    """Writes a picture of the super tokens on one image (1, 1, 32, 32); the file appears whole or not at all."""
    with watch(model) as layers:
        model(image)
    photo = (image[0, 0, :, :, None].expand(-1, -1, 3) + 1) / 2
    figure = draw_super_tokens(photo.clamp(0, 1), last_of_stages(layers))
    with replacing(path) as part:
        figure.savefig(part, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("outputs/demo"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    print(f"svit {svit.__version__}, timm {timm.__version__}, torch {torch.__version__}")

    train_images, train_classes, test_images, test_classes = digits()
    model = timm.create_model(MODEL, in_chans=1, num_classes=10)
    print(f"{MODEL} on {len(train_images)} handwritten digits, {len(test_images)} kept for the test")
    start = time.perf_counter()
    train(model, train_images, train_classes, args.epochs, args.batch_size)
    seconds = time.perf_counter() - start

    checkpoint = args.out / f"{MODEL}_digits.safetensors"
    save(model, checkpoint)
    loaded = timm.create_model(MODEL, in_chans=1, num_classes=10, checkpoint_path=str(checkpoint))
    print(f"test accuracy {accuracy(loaded, test_images, test_classes):.2%} after {seconds:.0f} s of training\n")

    flops = Path(__file__).with_name("flops.py")
    subprocess.run([sys.executable, flops, *ZOO], check=True)

    picture = args.out / "super_tokens.png"
    draw(loaded, test_images[:1], picture)
    print(f"""
wrote {checkpoint}: the weights, for timm.create_model("{MODEL}", checkpoint_path=...)
wrote {picture}: a digit's cells, learned super tokens, the soft association of one of them

next, from the environment of this demo (`source .venv-demo/bin/activate`):
  python tools/flops.py svit_small convnext_tiny --img-size 800 1280
  python tools/benchmark.py svit_small plain:svit_small convnext_tiny --runs 5
  python tools/convert_checkpoint.py stvit-small-224.pth svit_small.safetensors   # the authors' weights""")


if __name__ == "__main__":
    main()
