import subprocess
import sys
from pathlib import Path

import demo
import timm
import torch


def test_digits_are_real_and_disjoint():
    train_images, train_classes, test_images, test_classes = demo.digits()
    assert train_images.shape == (1437, 1, 32, 32)
    assert test_images.shape == (360, 1, 32, 32)
    assert torch.equal(torch.cat([train_classes, test_classes]).unique(), torch.arange(10))
    flat = {tuple(x.flatten().tolist()) for x in train_images}
    assert not flat & {tuple(x.flatten().tolist()) for x in test_images}


def test_demo_from_end_to_end(tmp_path):
    done = subprocess.run(
        [sys.executable, demo.__file__, "--epochs", "2", "--out", tmp_path], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    checkpoint, picture = tmp_path / "svit_nano_32_digits.safetensors", tmp_path / "super_tokens.png"
    assert set(tmp_path.iterdir()) == {picture, checkpoint}
    lines = done.stdout.strip().splitlines()
    assert any(line.startswith(f"wrote {checkpoint}") for line in lines)
    assert any(line.startswith(f"wrote {picture}") for line in lines)
    assert [line.split()[:1] for line in lines[-3:]] == [["python"]] * 3
    assert all(name in done.stdout for name in demo.ZOO)
    # The accuracy printed is that of the file.
    model = timm.create_model(demo.MODEL, in_chans=1, num_classes=10, checkpoint_path=str(checkpoint))
    _, _, images, classes = demo.digits()
    accuracy = demo.accuracy(model, images, classes)
    assert f"test accuracy {accuracy:.2%}" in done.stdout
    assert accuracy > 0.5
    assert Path(picture).stat().st_size > 10_000
