"""The tools from end to end, on real images that scikit-learn ships: train, evaluate, classify, look, count.

    python tools/demo.py [--epochs 6] [--out outputs/demo]

Writes scikit-learn's handwritten digits (1,797 images of 8 x 8 pixels, enlarged to 32 x 32; every fifth is kept for the
test) as a folder of images, then runs the other tools on it; each command is printed before it runs.
"""

import argparse
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from svit import processes
from svit.training.digits import digits, write_images

TOOLS = Path(__file__).parent
MODEL = "svit_nano_32"
ZOO = ["svit_tiny", "svit_small", "svit_base", "svit_large"]
OUT = Path("outputs/demo")


def run(tool: str, *arguments: str | Path) -> None:
    """Runs a tool; its failure is the demo's."""
    arguments = [str(argument) for argument in arguments]
    print(f"\n$ {shlex.join(['python', f'tools/{tool}.py', *arguments])}", flush=True)
    status = subprocess.run([sys.executable, TOOLS / f"{tool}.py", *arguments]).returncode
    if status:
        sys.exit(status)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=6, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=OUT, help="a new folder; default: %(default)s, which may be there")
    args = parser.parse_args(argv)
    if args.out == OUT:
        shutil.rmtree(OUT, ignore_errors=True)  # an earlier demo's
    elif args.out.exists():
        parser.error(f"--out: expected a new folder, got {args.out}, which exists")
    data, training, pictures = (args.out / name for name in ("digits", "training", "super_tokens"))
    args.out.mkdir(parents=True)

    images = digits()
    write_images(images, data)
    print(f"wrote {data}: {len(images)} handwritten digits, one folder a class")
    checkpoint = training / "best.safetensors"
    trained = (MODEL, "--checkpoint", checkpoint)
    kept = [data / name for name in images if name.startswith("val/")]
    some = kept[:: len(kept) // 4][:4]
    run("train", "digits", "--data-dir", data, "--output", training, "--set", f"epochs={args.epochs}")
    run("validate", *trained, "--data-dir", data, "--per-class", "--json", args.out / "accuracy.json")
    run("infer", *some, "--top", "2", "--model", *trained)
    run("visualize", *some[:2], "--out", pictures, "--model", *trained)
    run("flops", *ZOO)
    print(f"""
{checkpoint}: the weights, for timm.create_model("{MODEL}", num_classes=10, checkpoint_path=...)
{training / "log.csv"}: the accuracy after each epoch; `tensorboard --logdir {training}` draws it
{pictures / "index.html"}: two digits' cells, learned super tokens, the soft association of one of them

next, from the environment of this demo (`source .venv-demo/bin/activate`):
  python tools/train.py cifar10   # hours on two cores; docs/cifar10.md
  python tools/flops.py svit_small convnext_tiny --img-size 800 1280
  python tools/benchmark.py svit_small upstream:svit_small convnext_tiny --runs 5
  python tools/convert_checkpoint.py stvit-small-224.pth svit_small.safetensors   # the authors' weights""")


if __name__ == "__main__":
    processes.run(main)
