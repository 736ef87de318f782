"""The order of images, what an epoch is made of, images that cannot be read."""

import json
import pickle
import shutil
import tarfile
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import NAME_TO_OP, AugmentOp

import image_data
from svit.errors import InputError
from svit.images import MODES
from svit.training.data import (
    MOVES,
    Loader,
    ResumableBatchSampler,
    check_splits,
    classes_of,
    collate,
    eval_transform,
    image_mode,
    lost_readers_as_error,
    on_colours,
    open_dataset,
    print_contents,
    seed_all,
    train_transform,
)

PREPROCESSING = {
    "input_size": (3, 16, 16),
    "interpolation": "bilinear",
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "crop_pct": 1.0,
    "crop_mode": "center",
}
AUGMENT = create_transform((3, 16, 16), is_training=True, color_jitter=0.4, re_prob=0.5, re_mode="pixel")


def loader(open_data, batch_size=8, transform=AUGMENT, training=True, **arguments) -> Loader:
    return Loader(open_data(), transform, batch_size, training, reopen=open_data, seed=3, **arguments)


def equal(a: list, b: list) -> bool:
    """Whether two lists of batches hold the same images and classes."""
    return len(a) == len(b) and all(map(torch.equal, sum(map(tuple, a), ()), sum(map(tuple, b), ())))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return image_data.folder(tmp_path_factory.mktemp("digits") / "data")


@pytest.fixture
def train(root):
    return partial(open_dataset, "folder", str(root), "train")


def test_order_takes_each_image_once_an_epoch_and_another_order_in_the_next():
    order = ResumableBatchSampler(20, 6, rank=0, world=1, seed=0)
    first = [key for batch in order for key in batch]
    assert len(order) == 3
    assert [place for _, place, _ in first] == list(range(18))
    indices = [index for _, _, index in first]
    assert len(set(indices)) == 18
    assert indices != sorted(indices)
    order.epoch = 1
    again = [key for batch in order for key in batch]
    assert {epoch for epoch, _, _ in again} == {1}
    assert [index for _, _, index in again] != indices


def test_processes_share_the_images_of_a_batch():
    """Two processes of 4 images an update see what one of 8 sees."""
    one = list(ResumableBatchSampler(50, 8, rank=0, world=1, seed=5))
    two = [list(ResumableBatchSampler(50, 4, rank=rank, world=2, seed=5)) for rank in (0, 1)]
    assert [sorted(a + b) for a, b in zip(*two, strict=True)] == [sorted(batch) for batch in one]


def test_evaluation_sees_every_image_once_in_any_number_of_processes():
    seen = [
        k for rank in range(3) for batch in ResumableBatchSampler(20, 4, rank, 3, None, drop_last=False) for k in batch
    ]
    assert sorted(index for _, _, index in seen) == list(range(20))


def test_repeated_augmentation_repeats_images_within_an_epoch_of_the_same_length():
    batches = list(ResumableBatchSampler(30, 6, rank=0, world=1, seed=0, repeats=3))
    assert len(batches) == 5
    for batch in batches:
        a, b = batch[0][2], batch[3][2]
        assert [index for _, _, index in batch] == [a, a, a, b, b, b]
        assert len({place for _, place, _ in batch}) == 6  # each copy has random numbers of its own
    assert len({index for batch in batches for _, _, index in batch}) == 10


def test_repeated_images_are_augmented_differently(train):
    images, classes = next(loader(train, batch_size=3, repeats=3).epoch(0))
    assert classes.unique().numel() == 1
    assert not torch.equal(images[0], images[1])


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_goes_on_from_any_batch(train, workers):
    whole = list(loader(train).epoch(2))
    assert len(whole) == 10
    rest = list(loader(train, workers=workers).epoch(2, start=4))
    assert equal(rest, whole[4:])
    assert not equal(list(loader(train).epoch(3, start=4)), whole[4:])


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_of_shards_goes_on_from_any_batch(tmp_path, workers):
    pytest.importorskip("webdataset")
    root = str(image_data.shards(tmp_path / "shards"))
    shards = partial(open_dataset, "wds/digits", root, "train", is_training=True, batch_size=8, seed=3)
    make = partial(loader, shards, workers=workers)
    whole = list(make().epoch(1))
    assert len(whole) == 10
    assert equal(list(make().epoch(1, start=7)), whole[7:])
    other = make()
    list(other.epoch(0))  # what was read before leaves no trace
    assert equal(list(other.epoch(1)), whole)
    assert not equal(list(make().epoch(2)), whole)


def test_transforms_follow_their_schedule_in_shards_too(tmp_path):
    pytest.importorskip("webdataset")
    root = str(image_data.shards(tmp_path / "shards"))
    shards = partial(open_dataset, "wds/digits", root, "train", is_training=True, batch_size=8, seed=3)
    later = {2: eval_transform({**PREPROCESSING, "input_size": (3, 24, 24)})}
    batches = loader(shards, transform_schedule=later)
    assert [next(batches.epoch(epoch))[0].shape[-1] for epoch in (0, 1, 2, 3)] == [16, 16, 24, 24]


def test_repeated_augmentation_of_shards(tmp_path):
    pytest.importorskip("webdataset")
    root = str(image_data.shards(tmp_path / "shards"))
    shards = partial(open_dataset, "wds/digits", root, "train", is_training=True, batch_size=8, seed=3)
    batches = list(loader(shards, repeats=2).epoch())
    assert len(batches) == 10
    for images, classes in batches:
        assert torch.equal(classes[::2], classes[1::2])
        assert not torch.equal(images[::2], images[1::2])
    once = list(loader(shards, transform=eval_transform(PREPROCESSING)).epoch())
    twice = list(loader(shards, transform=eval_transform(PREPROCESSING), repeats=2).epoch())
    assert torch.equal(torch.cat([images for images, _ in twice])[::2], torch.cat([i for i, _ in once])[:40])


def test_a_tar_file_is_read_as_the_folder_is(tmp_path, root):
    splits = {}
    for split in ("train", "val"):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as tar:
            tar.add(root / split, arcname=".")
        splits[split] = partial(open_dataset, "folder", str(tmp_path / f"{split}.tar"), split)
        from_folder = partial(open_dataset, "folder", str(root), split)
        assert classes_of(splits[split]()) == list(image_data.CLASSES)
        a, b = (list(loader(open_data, workers=2).epoch(1)) for open_data in (splits[split], from_folder))
        assert equal(a, b)
    check_splits(splits["train"](), splits["val"]())
    with tarfile.open(tmp_path / "few.tar", "w") as tar:
        tar.add(root / "val" / "one", arcname="one")
    few = open_dataset("folder", str(tmp_path / "few.tar"), "val")
    with pytest.raises(InputError, match="val: no images of 4 of 5 classes: four, three, two, zero"):
        check_splits(splits["train"](), few)
    (tmp_path / "damaged.tar").write_bytes(b"no tar file" * 100)
    with pytest.raises(InputError, match="damaged.tar, split 'train': cannot be used"):
        open_dataset("folder", str(tmp_path / "damaged.tar"), "train")


def test_a_split_that_is_not_there(tmp_path, root):
    """timm would take all images of the folder."""
    photos = tmp_path / "photos"
    shutil.copytree(root / "train", photos / "train")
    shutil.copytree(root / "val", photos / "test")
    with pytest.raises(InputError, match="photos has no folder of the split 'validation', only test, train"):
        open_dataset("folder", str(photos), "validation")
    assert len(open_dataset("folder", str(photos), "test")) == 5 * image_data.VAL
    assert len(open_dataset("folder", str(photos / "test"), "validation")) == 5 * image_data.VAL
    (photos / "test" / "one").rename(photos / "test" / "train")  # a class of that name
    assert "train" in classes_of(open_dataset("folder", str(photos / "test"), "validation"))


LAYOUTS = {
    "clutter": (
        ".ipynb_checkpoints/x.jpg",
        "one/.ipynb_checkpoints/x.jpg",
        "two/@eaDir/x.jpg/M.jpg",
        "__MACOSX/one/x.jpg",
    ),
    "a hidden file of macOS": ("one/._x.jpg", "one/x.jpg", "two/x.jpg"),
    "a picture beside the classes": ("sheet.jpg", "one/x.jpg", "two/x.jpg"),
    "by year": ("one/2020/x.jpg", "one/2021/x.jpg", "two/2020/x.jpg", "two/2020/5/x.jpg"),
    "an empty class": ("one/x.jpg", "two/x.jpg", "void/notes.txt"),
}


@pytest.mark.parametrize("kind", ["folder", "torch/image_folder", "tar", "tar of ./", "tar of a folder", "tar of tars"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_class_is_a_folder_on_the_first_level(tmp_path, kind, layout):
    for split in ("train", "val"):
        for name in (*LAYOUTS[layout], "one/1.png", "two/2.webp", "two/3.tif"):
            file = tmp_path / split / name
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (4, 3)).save(file) if file.suffix != ".txt" else file.touch()
        arcname = {"tar of ./": ".", "tar of a folder": f"{split}/all"}.get(kind, "")
        with tarfile.open(tmp_path / f"{split}.tar", "w") as tar:
            if kind == "tar of tars":
                for name in ("one", "two"):
                    with tarfile.open(tmp_path / f"{name}.tar", "w") as inner:
                        inner.add(tmp_path / split / name, arcname="")
                    tar.add(tmp_path / f"{name}.tar", arcname=f"./{name}.tar")
            else:
                tar.add(tmp_path / split, arcname=arcname)
    if kind.startswith("tar"):
        train, val = (open_dataset("folder", str(tmp_path / f"{split}.tar"), split) for split in ("train", "val"))
    else:
        train, val = (open_dataset(kind, str(tmp_path), split) for split in ("train", "validation"))
    check_splits(train, val)
    assert classes_of(train) == classes_of(val) == ["one", "two"]
    images = {name for name in LAYOUTS[layout] if name.startswith(("one/", "two/")) and not name.count("/.")}
    images = {name for name in images if "@" not in name} | {"one/1.png", "two/2.webp", "two/3.tif"}
    assert len(train) == len(images)
    found = Counter(int(train.reader[index][1]) for index in range(len(train)))
    assert found == Counter(["one", "two"].index(name[:3]) for name in images)
    for index in range(len(train)):
        image, target = train[index]
        assert image.size == (4, 3)


@pytest.mark.parametrize("packed", [False, True])
def test_a_class_map_gives_the_numbers(tmp_path, root, packed):
    data = root / "train"
    if packed:
        data = tmp_path / "train.tar"
        with tarfile.open(data, "w") as tar:
            tar.add(root / "train", arcname=".")
    dataset = open_dataset("folder", str(data), "train", class_map={"two": 0, "one": 1})
    assert classes_of(dataset) == ["two", "one"]
    assert Counter(int(dataset.reader[i][1]) for i in range(len(dataset))) == {0: image_data.TRAIN, 1: image_data.TRAIN}
    assert dataset.filename(0).removeprefix("./") == "one/00.png"


def test_what_has_no_classes_is_refused(tmp_path):
    (tmp_path / "flat" / "train" / "@eaDir").mkdir(parents=True)
    Image.new("L", (4, 3)).save(tmp_path / "flat" / "train" / "1.png")
    with tarfile.open(tmp_path / "flat.tar", "w") as tar:
        tar.add(tmp_path / "flat" / "train", arcname=".")
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    (tmp_path / "photos.zip").touch()
    for name, root, message in (
        ("folder", "flat", "flat/train: no class folders, 1 images in it; expected a folder for each class"),
        ("folder", "flat.tar", "flat.tar: no class folders in it, only 1 images beside the class folders"),
        ("folder", "empty.tar", "empty.tar: no images in it"),
        ("folder", "photos.zip", "expected a folder or a .tar file, got .*photos.zip"),
        (
            "flder",
            "flat",
            "dataset: expected folder, digits, or a name that starts with one of torch/, .*, got 'flder'",
        ),
        ("wsd/x", "flat", "dataset: expected folder, .*got 'wsd/x'"),
        ("torch", "flat", "dataset: expected folder, .*got 'torch'"),
        ("wds/x", "flat", "wds/x .*flat, split 'train': cannot be used"),
    ):
        with pytest.raises(InputError, match=message):
            open_dataset(name, str(tmp_path / root), "train")


def test_the_classes_of_a_split_and_what_was_left_out_are_printed(tmp_path, capsys):
    root = image_data.folder(tmp_path / "data")
    print_contents("train", open_dataset("folder", str(root), "train"))
    counts = "four 16, one 16, three 16, two 16, zero 16"
    assert capsys.readouterr() == (f"train: 5 classes, 80 images: {counts}\n", "")
    (root / "train" / "one" / "00.png").rename(root / "train" / "one" / "00.heic2")
    print_contents("train", open_dataset("folder", str(root), "train"))
    assert capsys.readouterr() == (
        "train: 5 classes, 79 images: four 16, one 15, three 16, two 16, zero 16\n",
        "warning: train: left out 1 .heic2\n",
    )
    for number in range(30):
        (root / "val" / f"more {number}").mkdir()
        shutil.copy(root / "val" / "one" / "00.png", root / "val" / f"more {number}")
    with tarfile.open(tmp_path / "val.tar", "w") as tar:
        tar.add(root / "val", arcname="")
    for data in (root / "val", tmp_path / "val.tar"):
        print_contents("val", open_dataset("folder", str(data), "val"))
        out = capsys.readouterr().out
        assert out.startswith("val: 35 classes, 70 images: four 8, more 0 1, more 1 1, more 2 1, ")
        assert out.endswith("more 18 1 and 15 more; 1 to 8 images a class\n")


def test_splits_of_the_same_images(tmp_path):
    root = image_data.folder(tmp_path / "data")
    (root / "train" / "one" / "1st").mkdir()
    (root / "train" / "one" / "00.png").rename(root / "train" / "one" / "1st" / "00.png")
    train = open_dataset("folder", str(root), "train")
    for val in (root / "train", root / "train" / "one"):
        with pytest.raises(InputError, match="val: its images, those in .*, are images of the training"):
            check_splits(train, open_dataset("folder", str(val), "validation"))


def test_images_and_classes_of_the_evaluation(root):
    data = loader(
        partial(open_dataset, "folder", str(root), "validation"),
        transform=eval_transform(PREPROCESSING),
        training=False,
        batch_size=64,
    )
    ((images, classes),) = data.epoch()
    assert classes.tolist() == sorted(classes.tolist())
    assert classes.bincount().tolist() == [image_data.VAL] * 5
    first = image_data.digits("four", image_data.TRAIN, 1)[0]
    expected = torch.tensor(np.asarray(first).tolist()) / 255 * 2 - 1
    torch.testing.assert_close(images[0], expected.expand(3, 16, 16))


def test_an_unreadable_image_is_named_and_replaced_in_training_and_left_out_else(tmp_path, capfd):
    root = image_data.folder(tmp_path / "data")
    (root / "train" / "one" / "03.png").write_bytes(b"no image")
    (root / "train" / "two" / "00.png").write_bytes((root / "train" / "two" / "01.png").read_bytes()[:80])
    train = partial(open_dataset, "folder", str(root), "train")
    data = loader(train, limit=2)
    for epoch in range(2):
        assert sum(len(classes) for _, classes in data.epoch(epoch)) == 80
    errors = capfd.readouterr().err
    assert errors.count("skipped: one/03.png") == 1  # not in each epoch
    assert errors.count("skipped: two/00.png") == 1
    assert errors.count("skipped") == 2

    counted = loader(train, training=False, limit=2)
    assert sum(len(classes) for _, classes in counted.epoch()) == 78
    with pytest.raises(InputError, match=r"more than 1 images cannot be read \(max_unreadable\): .*one/03.png"):
        list(loader(train, limit=1).epoch())


def test_an_unreadable_image_is_counted_among_all_processes_that_read(tmp_path):
    root = image_data.folder(tmp_path / "data")
    for name in ("one", "two", "three"):
        (root / "train" / name / "05.png").write_bytes(b"")
    train = partial(open_dataset, "folder", str(root), "train")
    with pytest.raises(InputError, match=r"^more than 2 images cannot be read.*: .*05.png$"):  # one line
        list(loader(train, limit=2, workers=2).epoch())


def test_nothing_readable_is_no_batch():
    assert collate([None, None]) is None
    images, classes = collate([None, (torch.ones(3, 2, 2), 4)])
    assert images.shape == (1, 3, 2, 2)
    assert classes.tolist() == [4]


def test_data_that_cannot_be_used(tmp_path, root):
    with pytest.raises(InputError, match="data_dir: no such folder or file: .*nowhere"):
        open_dataset("folder", str(tmp_path / "nowhere"), "train")
    (tmp_path / "empty" / "train").mkdir(parents=True)
    with pytest.raises(InputError, match="empty/train: no class folders, 0 images in it"):
        open_dataset("folder", str(tmp_path / "empty"), "train")
    with pytest.raises(InputError, match="torch/nothing"):
        open_dataset("torch/nothing", str(root), "train")


def test_torchvisions_cifar10(tmp_path, monkeypatch):
    """Its files as they lie on a disk, with 10 images in each."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (10, 3 * 32 * 32), dtype=np.uint8)
    for name in ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"):
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": list(range(10))}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class {i}" for i in range(10)]}))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    train = partial(open_dataset, "torch/cifar10", str(tmp_path), "train", download=True)
    assert len(train()) == 50
    assert classes_of(train()) == [f"class {i}" for i in range(10)]
    val = partial(open_dataset, "torch/cifar10", str(tmp_path), "validation")
    transform = eval_transform({**PREPROCESSING, "input_size": (3, 32, 32)})
    ((images, classes),) = loader(val, batch_size=16, transform=transform, training=False).epoch()
    assert classes.tolist() == list(range(10))
    torch.testing.assert_close(images, torch.tensor(pixels).view(10, 3, 32, 32) / 255 * 2 - 1)


def test_classes_of_torchvisions_imagenet():
    """Cranes are birds and machines: by its names a class would be lost, and all later ones get another's."""

    class ImageNet:
        wnids = ("n01440764", "n02012849", "n03126707")
        class_to_idx = {"tench": 0, "Tinca tinca": 0, "crane": 2}

    assert classes_of(ImageNet()) == ["n01440764", "n02012849", "n03126707"]


def test_the_strongest_augmentation_works_with_this_pillow():
    """Posterizing at its full magnitude keeps no bit; the ImageNet recipes' magnitude gets there now and then."""
    image = image_data.digits("four", 0, 1)[0].convert("RGB")
    for name in ("Posterize", "PosterizeIncreasing", "SolarizeAdd", "SharpnessIncreasing"):
        AugmentOp(name, prob=1.0, magnitude=10)(image)


def sideways(file, form, digit, **options) -> None:
    """Writes a digit turned, with EXIF data that turn it back."""
    exif = Image.Exif()
    exif[0x112] = 6
    digit.transpose(Image.Transpose.ROTATE_90).save(file, form, exif=exif, **options)


@pytest.mark.parametrize("kind", ["folder", "tar", "torch/folder", "wds/digits"])
def test_every_kind_of_data_is_read_upright_and_in_8_bits(kind, tmp_path):
    digit = image_data.digits("four", 0, 1)[0]
    expected = torch.tensor(np.asarray(digit).tolist()) / 255 * 2 - 1
    root = tmp_path / "data"
    folder = root / "val" / "four"
    folder.mkdir(parents=True)
    sideways(folder / "a.png", "PNG", digit)
    sideways(folder / "b.TIF", "TIFF", digit)
    Image.fromarray(np.asarray(digit).astype(np.uint16) * 257).save(folder / "c.png")
    Image.fromarray(np.asarray(digit) / np.float32(255)).save(folder / "d.tiff")
    digit.save(folder / "e.webp", lossless=True)
    digit.save(folder / "f.bmp")
    options = {}
    if kind == "tar":
        with tarfile.open(tmp_path / "data.tar", "w") as tar:
            tar.add(folder, "four")
        kind, root = "folder", tmp_path / "data.tar"
    elif kind.startswith("wds"):
        info = {"name": "validation", "filenames": ["0.tar"], "shard_lengths": [6], "num_samples": 6}
        with tarfile.open(root / "0.tar", "w") as tar:
            for file in sorted(folder.iterdir()):
                image_data.add(tar, file.name, file.read_bytes())
                image_data.add(tar, f"{file.stem}.cls", b"0")
        (root / "_info.json").write_text(json.dumps({"splits": {"validation": info}}))
        options = {"batch_size": 8}
    for channels, mode in MODES.items():
        preprocessing = {**PREPROCESSING, "input_size": (channels, 16, 16)}
        preprocessing.update(mean=(0.5,) * channels, std=(0.5,) * channels)
        assert image_mode(preprocessing) == mode
        val = partial(open_dataset, kind, str(root), "validation", **options)
        ((images, _),) = loader(val, transform=eval_transform(preprocessing), training=False, mode=mode).epoch()
        wanted = expected.expand(6, channels, 16, 16).clone()
        if channels in (2, 4):
            wanted[:, -1] = 1
        torch.testing.assert_close(images, wanted)


def test_an_image_of_a_shard_that_cannot_be_converted_is_left_out(tmp_path, capfd):
    shards = image_data.shards(tmp_path / "shards")
    with tarfile.open(shards / "validation-0.tar", "w") as tar:
        for number, image in enumerate(image_data.digits("four", 0, 2)):
            image.save(tmp_path / "image.png")
            image_data.add(tar, f"{number}.png", (tmp_path / "image.png").read_bytes())
            image_data.add(tar, f"{number}.cls", b"0")
    val = partial(open_dataset, "wds/digits", str(shards), "validation", batch_size=8)
    data = loader(val, transform=eval_transform(PREPROCESSING), training=False, mode="no mode of Pillow's")
    assert list(data.epoch()) == []
    assert capfd.readouterr().err.count("unreadable, skipped: an image of class 0 (") == 2


@pytest.mark.parametrize("channels", MODES)
@pytest.mark.parametrize(
    "policy", [None, "rand-m9-mstd0.5-inc1", "rand-mstd101-t3aw", "original", "v0r", "3a", "augmix", "augmix-b1"]
)
def test_augmentation_of_any_channels(channels, policy):
    values = np.random.default_rng(0).integers(0, 256, (20, 24, channels), np.uint8)
    preprocessing = {"input_size": (channels, 16, 16), "interpolation": "bicubic"}
    preprocessing.update(mean=(0.5,) * channels, std=(0.5,) * channels)
    transform = train_transform(preprocessing, auto_augment=policy, color_jitter=0.4, re_prob=0.5, re_mode="pixel")
    found = []
    for seed in range(40):
        seed_all(seed)
        found.append(transform(Image.fromarray(values.squeeze())))
        assert found[-1].shape == (channels, 16, 16)
        assert found[-1].isfinite().all()
    assert torch.stack(found).std(0).min() > 0
    pickle.loads(pickle.dumps(transform))  # processes that read may be started anew


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
@pytest.mark.parametrize("name", [name for name in NAME_TO_OP if not name.startswith(MOVES)])
def test_what_changes_colours_leaves_alpha_alone(name, mode):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 9, len(mode)), np.uint8))
    op, found = AugmentOp(name, prob=1.0, magnitude=9), []
    for function in (op.aug_fn, partial(on_colours, op.aug_fn)):
        seed_all(1)
        op.aug_fn = function
        found.append(op(image if found else image.convert(mode[:-1])))
    assert found[1].mode == mode
    assert found[1].convert(mode[:-1]).tobytes() == found[0].tobytes()
    assert found[1].getchannel("A").tobytes() == image.getchannel("A").tobytes()


def test_all_operations_on_colours_are_kept_from_alpha_and_no_others():
    preprocessing = {"input_size": (4, 8, 8), "interpolation": "bilinear", "mean": (0.5,) * 4, "std": (0.5,) * 4}
    for policy, jitters in (("rand-m9", 0), ("v0", 0), ("augmix", 0), ("3a", 1), (None, 1)):
        _, *steps = train_transform(preprocessing, auto_augment=policy, color_jitter=0.4).transforms
        assert [getattr(step, "func", None) for step in steps].count(on_colours) == jitters
        policies = [getattr(step, "policy", [getattr(step, "ops", [])]) for step in steps]
        ops = [op for policy_of_step in policies for group in policy_of_step for op in group]
        assert bool(ops) == bool(policy)
        for op in ops:
            assert (getattr(op.aug_fn, "func", None) is on_colours) != op.name.startswith(MOVES)


def test_a_class_that_one_split_lacks_is_named(tmp_path):
    root = image_data.folder(tmp_path / "data")
    open_split = partial(open_dataset, "folder", str(root))
    assert classes_of(open_split("train")) == list(image_data.CLASSES)
    check_splits(open_split("train"), open_split("validation"))
    for image in (root / "val" / "one").iterdir():
        image.unlink()
    lists = "train has four, one, three, two, zero; val has four, three, two, zero"
    with pytest.raises(InputError, match=f"^val: no images of 1 of 5 classes: one; {lists}$"):
        check_splits(open_split("train"), open_split("validation"))
    with pytest.raises(InputError, match="train: no images of 1 of 5 classes: one"):
        check_splits(open_split("validation"), open_split("train"))


def test_one_class_alone_is_a_folder_too_high_up(tmp_path, capsys):
    root = image_data.folder(tmp_path / "data")
    for split in ("train", "val"):
        (root / split).rename(root / "images")
        (root / split).mkdir()
        (root / "images").rename(root / split / "images")
    train, val = (open_dataset("folder", str(root), split) for split in ("train", "validation"))
    with pytest.raises(InputError, match=r"train: one class alone, images, in .*train; expected the folder that holds"):
        check_splits(train, val)
    capsys.readouterr()
    check_splits(train, val, num_classes=5)
    assert capsys.readouterr().err.startswith("warning: train: one class alone, images, in ")


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        ("DataLoader worker (pid 7) is killed by signal: Killed.", "pid 7.* If memory ran short, lower --workers$"),
        (
            "Caught RuntimeError in DataLoader worker process 0.\nTraceback\nRuntimeError: unable to allocate shared "
            "memory(shm) for file </torch_1>: Success (0)",
            "^out of shared memory.* lower --workers, or enlarge /dev/shm",
        ),
        ("Too many open files. Communication with the workers is no longer possible.", "lower --workers.*ulimit -n"),
    ],
)
def test_readers_that_cannot_go_on(problem, message):
    with pytest.raises(InputError, match=message), lost_readers_as_error("--workers"):
        raise RuntimeError(problem)
    with pytest.raises(RuntimeError, match="^other$"), lost_readers_as_error("--workers"):
        raise RuntimeError("other")
