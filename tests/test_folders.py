"""The scan of folders, against a plain recursion over random trees: links, loops, hidden folders, numbers in names."""

import os
import shutil
import tempfile
from collections import Counter
from contextlib import contextmanager
from itertools import permutations
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from timm.utils.misc import natural_key as timms_natural_key

from svit.folders import FolderError, find_classes, find_images, natural_key, scan

IMAGES = (".jpg", ".JPEG", ".png", ".webp", ".bmp", ".tif")
HIDDEN = (".ipynb_checkpoints", "@eaDir", "__MACOSX", ".git", "#recycle")


def write(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def below(root: Path, paths) -> list[str]:
    return [os.path.relpath(path, root) for path in paths]


def test_images_of_any_format_in_natural_order(tmp_path):
    names = ["1.png", "2/b.WEBP", "10.tif", "a/9.jpg", "a/10.jpg", "a/b/c/1.bmp"]
    write(tmp_path, *reversed(names))
    assert below(tmp_path, find_images([tmp_path])) == names
    assert all(isinstance(path, Path) for path in find_images([tmp_path]))


def test_files_that_are_named_are_taken_as_they_are(tmp_path):
    write(tmp_path, "notes.txt", ".hidden.jpg", "folder/1.jpg")
    named = [tmp_path / "notes.txt", tmp_path / ".hidden.jpg", tmp_path / "folder", tmp_path / "notes.txt"]
    assert find_images(named) == [*named[:2], tmp_path / "folder" / "1.jpg", named[0]]


def test_what_is_left_out_is_counted_and_said(tmp_path, capsys):
    write(tmp_path, "x.jpg", "._x.jpg", "b/._y.PNG", "labels.csv", "a/more.csv", "clip.MP4", "photo", "Thumbs.db")
    write(
        tmp_path, ".DS_Store", "desktop.ini", "a/@eaDir/x.jpg/SYNOPHOTO_THUMB_M.jpg", "__MACOSX/._x.jpg", ".git/a.png"
    )
    os.mkfifo(tmp_path / "endless.jpg")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    found = scan(tmp_path)
    assert below(tmp_path, found.images) == ["x.jpg"]
    assert found.left_out == {
        ".csv": 2,
        ".mp4": 1,
        "without a suffix": 1,
        "hidden .jpg": 1,
        "hidden .png": 1,
        "@eaDir/": 1,
        "__MACOSX/": 1,
        ".git/": 1,
        ".jpg that is no file": 1,
        "broken link gone": 1,
    }
    assert capsys.readouterr() == ("", "")
    assert below(tmp_path, find_images([tmp_path])) == ["x.jpg"]
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"warning: {tmp_path}: left out 2 .csv, 1 ")
    assert err.count("\n") == 1
    told = []
    find_images([tmp_path, tmp_path / "x.jpg"], told.append)
    assert told == [err.removeprefix("warning: ").strip()]


def test_nothing_is_said_where_there_are_images_alone(tmp_path, capsys):
    find_images([write(tmp_path, "x.jpg", "a/y.png", ".DS_Store", "a/Thumbs.db")])
    assert capsys.readouterr() == ("", "")


def test_folders_without_an_image_and_what_is_not_there(tmp_path):
    write(tmp_path, "raw/1.heic2", "raw/2.heic2")
    for path, message in (
        (tmp_path / "raw", f"{tmp_path / 'raw'}: no images in this folder; left out 2 .heic2"),
        (tmp_path / "none", f"{tmp_path / 'none'}: no such file or folder"),
    ):
        with pytest.raises(FolderError) as error:
            find_images([path])
        assert str(error.value) == message


def test_a_broken_link_to_an_image_is_one_that_cannot_be_read(tmp_path):
    """A data set whose files are not there (git-annex, say) is not smaller in silence."""
    (write(tmp_path, "a.jpg") / "b.jpg").symlink_to(tmp_path / "store" / "b.jpg")
    (tmp_path / "c.jpg").symlink_to(tmp_path / "c.jpg")  # to itself
    assert below(tmp_path, find_images([tmp_path])) == ["a.jpg", "b.jpg", "c.jpg"]


@pytest.mark.parametrize("target", ["cat", "cat/inner", ".", "..", "/"])
def test_a_link_to_a_folder_that_holds_it_is_cut(tmp_path, target):
    """To the root of all too, where the other split lies, say."""
    root = write(tmp_path, "data/cat/inner/1.jpg", "val/cat/9.jpg") / "data"
    (root / "cat" / "inner" / "again").symlink_to(root / target)
    assert find_classes(root)[:2] == (["cat"], [(str(root / "cat" / "inner" / "1.jpg"), 0)])
    assert find_classes(root).left_out == {"link to a folder that holds it": 1}


def test_links_to_folders_are_followed_also_around_corners(tmp_path):
    """data/cat/far leads to store, and what leads from there back to data/cat is a loop, to store/more is none."""
    write(tmp_path, "data/cat/1.jpg", "store/2.jpg", "more/3.jpg")
    for link, target in (("data/cat/far", "store"), ("store/back", "data/cat"), ("store/on", "more"), ("dogs", "more")):
        (tmp_path / link).symlink_to(tmp_path / target)
    (tmp_path / "data" / "dog").symlink_to(tmp_path / "dogs")
    classes, images, left_out = find_classes(tmp_path / "data")
    assert classes == ["cat", "dog"]
    names = ["cat/1.jpg", "cat/far/2.jpg", "cat/far/on/3.jpg", "dog/3.jpg"]
    assert below(tmp_path / "data", [path for path, _ in images]) == names
    assert [number for _, number in images] == [0, 0, 0, 1]
    assert left_out == {"link to a folder that holds it": 1}
    assert below(tmp_path / "data", find_images([tmp_path / "data"])) == names


def test_a_class_is_a_folder_on_the_first_level(tmp_path):
    write(tmp_path, "cat/2021/a.jpg", "cat/2020/b.jpg", "cat/c.jpg", "dog/x/y/z.png", "sheet.jpg", "notes.txt")
    write(tmp_path, "10/a.jpg", "9/a.jpg", ".hidden/a.jpg", "cat/.ipynb_checkpoints/a.jpg", "empty/note.txt")
    (tmp_path / "void").mkdir()
    classes, images, left_out = find_classes(tmp_path)
    assert classes == ["9", "10", "cat", "dog"]
    names = ["9/a.jpg", "10/a.jpg", "cat/2020/b.jpg", "cat/2021/a.jpg", "cat/c.jpg", "dog/x/y/z.png"]
    assert below(tmp_path, [path for path, _ in images]) == names
    assert [number for _, number in images] == [0, 1, 2, 2, 2, 3]
    assert left_out == {
        ".txt": 2,
        ".hidden/": 1,
        ".ipynb_checkpoints/": 1,
        "images beside the class folders": 1,
        "class folders without an image (empty, void)": 2,
    }


def test_folders_without_classes_are_refused(tmp_path):
    write(tmp_path, "flat/1.jpg", "flat/2.jpg", "flat/@eaDir/3.jpg", "bare/cat/1.mp4", "bare/dog/2.mp4", "bare/3.jpg")
    flat, bare = tmp_path / "flat", tmp_path / "bare"
    for folder, message in (
        (flat, f"{flat}: no class folders, 2 images in it; expected a folder for each class, with its images"),
        (bare, f"{bare}: 0 images in its class folders cat, dog, only 2 .mp4, 1 images beside the class folders"),
        (tmp_path / "none", f"{tmp_path / 'none'}: cannot be read (No such file or directory)"),
        (flat / "1.jpg", f"{flat / '1.jpg'}: cannot be read (Not a directory)"),
    ):
        with pytest.raises(FolderError) as error:
            find_classes(folder)
        assert str(error.value) == message


@given(st.lists(st.text(st.characters(exclude_categories=("Cs", "No", "Nl")), min_size=1, max_size=8), unique=True))
def test_names_are_sorted_as_timm_does_and_in_one_way(names):
    """Classes are numbered in this order, which all published weights go by."""
    found = sorted(names, key=natural_key)
    keys = list(map(timms_natural_key, found))
    assert keys == sorted(keys)
    names.reverse()
    assert sorted(names, key=natural_key) == found


@pytest.mark.parametrize("names", [["1", "1²2", "²"], ["CAT", "Cat", "cat"], ["x001", "x01", "x1"]])
def test_names_that_timm_cannot_sort_or_sorts_by_chance(names):
    assert {tuple(sorted(order, key=natural_key)) for order in permutations(names)} == {tuple(names)}


# A tree: of each folder the names of its files, its folders, and its links, which lead to the folder of that number.
names = st.sampled_from(["a", "b", "B", "2", "10", "x y", "é", *HIDDEN])
files = st.builds(
    str.__add__, st.sampled_from(["1", "02", "10", "x", ".y", "._z"]), st.sampled_from([*IMAGES, ".txt", ""])
)
trees = st.recursive(
    st.tuples(st.frozensets(files, max_size=3), st.just({}), st.just({})),
    lambda inner: st.tuples(
        st.frozensets(files, max_size=3),
        st.dictionaries(names, inner, max_size=3),
        st.dictionaries(st.sampled_from(["l", "m", ".n"]), st.integers(0, 30), max_size=2),
    ),
    max_leaves=8,
)


@contextmanager
def planted(tree):
    """The tree on the disk, as a folder in a folder of its own."""
    folders, links = [], []

    def plant(path: Path, tree) -> None:
        path.mkdir()
        folders.append(path)
        for name, inner in tree[1].items():
            plant(path / name, inner)
        for name in tree[0] - set(tree[1]):
            (path / name).touch()
        links.extend((path / name, number) for name, number in tree[2].items())

    outer = Path(tempfile.mkdtemp()).resolve()
    try:
        plant(outer / "root", tree)
        folders.append(outer)
        for link, number in links:
            if not link.is_dir():
                link.symlink_to(folders[number % len(folders)])
        yield outer / "root"
    finally:
        shutil.rmtree(outer)


def visible(name: str) -> bool:
    return not name.startswith(".") and name not in HIDDEN


def expected(folder: Path, way: tuple[Path, ...] = ()):
    """Images of a folder; `way` holds where the folders really are that were gone through."""
    way = (*way, folder.resolve())
    for path in folder.iterdir():
        target = path.resolve()
        if not visible(path.name):
            continue
        if not path.is_dir():
            if path.suffix in IMAGES:
                yield path
        elif not any(passed.is_relative_to(target) for passed in way):
            yield from expected(path, way)


@settings(max_examples=150, deadline=None)
@given(trees)
def test_any_tree(tree):
    with planted(tree) as root:
        images = list(expected(root))
        assume(len(images) < 500)
        found = scan(root)
        assert Counter(found.images) == Counter(map(str, images))
        assert found.images == sorted(found.images, key=natural_key)
        assert (found.images == [str(path) for path in find_images([root])]) if images else True

        parts = {path: path.relative_to(root).parts for path in images}
        classes = sorted({part[0] for part in parts.values() if len(part) > 1}, key=natural_key)
        if not classes:
            with pytest.raises(FolderError):
                find_classes(root)
            return
        sorted_into = find_classes(root)
        assert sorted_into.classes == classes
        assert {path: classes[number] for path, number in sorted_into.images} == {
            str(path): part[0] for path, part in parts.items() if len(part) > 1
        }
        beside = sum(len(part) == 1 for part in parts.values())
        assert sorted_into.left_out["images beside the class folders"] == beside
