import sys

import numpy as np
import pytest
from sklearn.datasets import load_digits

from svit.errors import InputError
from svit.training.data import classes_of, open_dataset
from svit.training.digits import NAMES, digits


def test_digits_are_real_and_disjoint():
    images = digits()
    data = load_digits()
    assert len(images) == len(data.images) == 1797
    assert sum(name.startswith("val/") for name in images) == 360
    for number, (name, image) in enumerate(images.items()):
        assert name.split("/")[1] == NAMES[data.target[number]]
        small = np.asarray(image.resize((8, 8)), dtype=float) * 16 / 255
        assert np.abs(small - data.images[number]).mean() < 1.5  # of 16
    test = {image.tobytes() for name, image in images.items() if name.startswith("val/")}
    assert not test & {image.tobytes() for name, image in images.items() if name.startswith("train/")}


def test_the_dataset_writes_them_once(tmp_path):
    folder = tmp_path / "new" / "digits"
    assert len(open_dataset("digits", str(folder), "train")) == 1437
    next(folder.rglob("*.png")).unlink()
    val = open_dataset("digits", str(folder), "validation")
    assert len(val) + len(open_dataset("digits", str(folder), "train")) == 1796
    assert classes_of(val) == sorted(NAMES)
    assert [path.name for path in folder.parent.iterdir()] == ["digits"]


def test_without_scikit_learn(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(InputError, match=r"digits needs scikit-learn: pip install 'svit\[demo\]'"):
        open_dataset("digits", str(tmp_path / "digits"), "train")
    assert not list(tmp_path.iterdir())
