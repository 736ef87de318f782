"""Annotations in COCO's format: what is corrected, what is refused, and that all else loads and can be evaluated."""

import contextlib
import copy
import io
import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from helpers import needs_mm

needs_mm()

from mmdet.datasets.api_wrappers import COCO, COCOeval  # noqa: E402
from mmengine.config import Config  # noqa: E402
from mmengine.registry import DATASETS  # noqa: E402

from svit.adapters import ConfigError, load_config  # noqa: E402
from svit.adapters.checks import check_data  # noqa: E402

WIDTH, HEIGHT = 64, 48
POLYGON = [5, 5, 25, 5, 25, 15, 5, 15]  # 20 x 10 pixels


def content() -> dict:
    """Four images with an object each, a coin or a dime."""
    images = [dict(id=i, file_name=f"{i}.png", width=WIDTH, height=HEIGHT) for i in range(4)]
    annotations = [
        dict(
            id=i + 1,
            image_id=i,
            category_id=1 + i % 2,
            iscrowd=0,
            area=200.0,
            bbox=[5, 5, 20, 10],
            segmentation=[list(POLYGON)],
        )
        for i in range(4)
    ]
    return dict(images=images, annotations=annotations, categories=[dict(id=1, name="coin"), dict(id=2, name="dime")])


def folder(root: Path, size: tuple[int, int] = (WIDTH, HEIGHT)) -> Path:
    """Four images, the same for each split, and no annotations."""
    (root / "annotations").mkdir(parents=True)
    (root / "images").mkdir()
    for i in range(4):
        Image.fromarray(np.full((size[1], size[0], 3), 50 * i, np.uint8)).save(root / f"images/{i}.png")
    return root


def config(root: Path, base: str = "mask-rcnn_svit-nano_fpn_1x_coco") -> Config:
    options = {"work_dir": str(root / "work")}
    for split in ("train", "val", "test"):
        options[f"{split}_dataloader.dataset.metainfo.classes"] = ("coin", "dime")
        options[f"{split}_dataloader.dataset.ann_file"] = "annotations/a.json"
        options[f"{split}_dataloader.dataset.data_prefix.img"] = "images"
        options[f"{split}_evaluator.ann_file"] = str(root / "annotations/a.json")
    del options["train_evaluator.ann_file"]
    heads = ("bbox_head", "mask_head") if base.startswith("mask") else ()
    options.update({f"model.roi_head.{head}.num_classes": 2 for head in heads})
    if not heads:
        options["model.bbox_head.num_classes"] = 2
    return load_config(base, options, str(root))


@pytest.fixture
def root(tmp_path) -> Path:
    return folder(tmp_path / "data")


def check(root: Path, found: dict, *splits: str, base: str = "mask-rcnn_svit-nano_fpn_1x_coco") -> Config:
    """The config after a check of these annotations."""
    (root / "annotations/a.json").write_text(json.dumps(found))
    checked = config(root, base)
    check_data(checked, *(splits or ("train", "val")))
    return checked


def put_right(checked: Config, split: str = "train") -> dict:
    """The annotations that the config has then."""
    dataset = checked[f"{split}_dataloader"].dataset
    return json.loads(Path(dataset.data_root, dataset.ann_file).read_text())


def test_good_annotations_stay_where_they_are(root):
    with warnings.catch_warnings(record=True) as told:
        checked = check(root, content(), "train", "val", "test")
    assert not [warning for warning in told if "a.json" in str(warning.message)]
    assert checked.train_dataloader.dataset.ann_file == "annotations/a.json"
    assert not (root / "work").exists()


def test_files_of_one_name_in_several_folders_stay_apart(tmp_path):
    """As Roboflow names all of its own; each is corrected, and has other objects."""
    parts = []
    for number in range(2):
        root, found = folder(tmp_path / str(number)), content()
        for annotation in found["annotations"]:
            del annotation["iscrowd"]
            annotation["bbox"] = [5, 5, 20, 10 + number]
        (root / "annotations/a.json").write_text(json.dumps(found))
        checked = config(root)
        parts.append(checked.train_dataloader.dataset)
    checked.train_dataloader.dataset = dict(type="ConcatDataset", datasets=parts)
    check_data(checked, "train")
    files = [Path(part.ann_file) for part in checked.train_dataloader.dataset.datasets]
    heights = [json.loads(file.read_text())["annotations"][0]["bbox"][3] for file in files]
    assert heights == [10, 11]


def without(key: str, *numbers: int):
    def change(found: dict) -> None:
        for number in numbers or range(4):
            del found["annotations"][number][key]

    return change


def with_value(key: str, value, number: int = 1, part: str = "annotations"):
    def change(found: dict) -> None:
        found[part][number][key] = value

    return change


COMPRESSED = dict(size=[HEIGHT, WIDTH], counts="e7:V10000000000000000000000000000000000000[j1")
RLE = dict(size=[HEIGHT, WIDTH], counts=[5 * HEIGHT + 5, 10, 38, 10, HEIGHT * WIDTH - 5 * HEIGHT - 63])


@pytest.mark.parametrize(
    ("change", "key", "expected", "what"),
    [
        (without("area"), "area", 200.0, "4 objects without area, taken from their masks or boxes: 1, 2, 3, 4"),
        (with_value("area", 0), "area", 200.0, "1 objects without area, .*: 2"),
        (with_value("area", None), "area", 200.0, "1 objects without area, .*: 2"),
        (without("iscrowd", 1), "iscrowd", 0, "1 objects without iscrowd, 0: 2"),
        (without("bbox", 1), "bbox", [5, 5, 20, 10], "1 objects without a bbox, taken from their masks: 2"),
        (with_value("bbox", [5, 5, 0, 0]), "bbox", [5, 5, 20, 10], "whose bbox had no size or lay outside.*: 2"),
        (with_value("bbox", [500, 5, 9, 9]), "bbox", [5, 5, 20, 10], "whose bbox had no size or lay outside.*: 2"),
        (with_value("bbox", [-10, 5, 30, 100]), "bbox", [0, 5, 20, 43], "1 boxes that reached beyond .*: 2"),
        (with_value("id", 0), "id", 5, "whose id was no positive number, renumbered: 0 is now 5"),
        (with_value("id", "x"), "id", 5, "renumbered: 'x' is now 5"),
        (without("id", 1), "id", 5, "renumbered: None is now 5"),
        (with_value("segmentation", POLYGON), "segmentation", [POLYGON], "whose only polygon was not in a list: 2"),
        (
            with_value("segmentation", [[1, 1, 9, 9], POLYGON]),
            "segmentation",
            [POLYGON],
            "with polygons of less than 3 points beside others, which were dropped: 2",
        ),
    ],
)
def test_put_right(root, change, key, expected, what):
    found = content()
    change(found)
    with pytest.warns(UserWarning, match=f"a.json was corrected, in .*train-a.json; by their ids:\n  .*{what}"):
        checked = check(root, found)
    for split in ("train", "val"):
        repaired = put_right(checked, split)
        assert repaired["annotations"][1][key] == expected
        repaired["annotations"][1].pop("segmentation" if key == "area" else key)
        assert repaired["annotations"][0] == content()["annotations"][0]
    assert checked.val_evaluator.ann_file == checked.val_dataloader.dataset.ann_file
    assert json.loads((root / "annotations/a.json").read_text()) == found  # the user's own is left alone


def test_area_of_a_box_and_of_a_mask(root):
    """Where the config needs no mask the box will do; a mask's own area goes first."""
    found = content()
    for entry in found["annotations"]:
        del entry["area"]
    del found["annotations"][0]["segmentation"]
    found["annotations"][1]["segmentation"] = [[5, 5, 25, 5, 25, 15]]  # half of the box
    found["annotations"][2]["segmentation"] = RLE
    with pytest.warns(UserWarning, match="4 objects without area"):
        checked = check(root, found, "train", base="retinanet_svit-s_fpn_1x_coco")
    areas = [entry["area"] for entry in put_right(checked)["annotations"]]
    assert areas[0] == 200
    assert areas[1] == pytest.approx(100, abs=10)
    assert areas[2:] == [20, 200]


@pytest.mark.parametrize("value", [None, 0, "64", math.nan, 64.5, 1e30, 10**400])
def test_size_from_the_file(root, value):
    found = content()
    found["images"][2].update(width=value)
    found["images"][3].pop("height")
    with pytest.warns(UserWarning, match="2 images without width and height, taken from their files: 2, 3"):
        checked = check(root, found)
    assert put_right(checked) == content()


def test_size_of_a_turned_image(root):
    """As the pipeline loads it: stored, or upright where the config wants that."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (WIDTH, HEIGHT)).save(root / "images/0.jpg", exif=exif)
    found = content()
    found["images"][0] = dict(id=0, file_name="0.jpg")
    (root / "annotations/a.json").write_text(json.dumps(found))
    for color_type, size in (("color_ignore_orientation", (WIDTH, HEIGHT)), ("color", (HEIGHT, WIDTH))):
        turned = config(root)
        turned.train_dataloader.dataset.pipeline[0].color_type = color_type
        with pytest.warns(UserWarning, match="1 images without width and height"):
            check_data(turned, "train")
        assert (put_right(turned)["images"][0]["width"], put_right(turned)["images"][0]["height"]) == size


def several(*changes):
    def change(found: dict) -> None:
        for one in changes:
            one(found)

    return change


NO_MASK = "expected polygons of 3 points or more"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("segmentation"), f"4 objects with no segmentation; {NO_MASK}.* trains or evaluates masks: 1, 2, 3, 4"),
        (with_value("segmentation", []), f"1 objects with an empty segmentation; {NO_MASK}.*: 2"),
        (with_value("segmentation", None), f"1 objects with an empty segmentation; {NO_MASK}.*: 2"),
        (
            with_value("segmentation", [[1, 1, 9, 9]]),
            f"1 objects whose polygons have less than 3 points; {NO_MASK}.*: 2",
        ),
        (with_value("segmentation", [[]]), f"1 objects whose polygons have less than 3 points; {NO_MASK}.*: 2"),
        (
            with_value("segmentation", [[1, 1, 9, 9, 5, 5, 7]]),
            "is a polygon of other than pairs of finite numbers.*: 2",
        ),
        (with_value("segmentation", [[1, 1, 9, math.nan, 5, 5]]), "is a polygon of other than pairs of finite.*: 2"),
        (with_value("segmentation", [[[1, 1], [9, 9], [5, 5]]]), "is no list of polygons.*: 2"),
        (with_value("segmentation", "none"), "is neither a list nor an RLE.*: 2"),
        (with_value("segmentation", dict(counts="x")), "is an RLE without counts or size.*: 2"),
        (
            with_value("segmentation", dict(RLE, size=[64, 48])),
            r"is an RLE of \[64, 48\], of an image of \[48, 64\].*: 2",
        ),
        (with_value("segmentation", dict(RLE, counts=[5, 10])), "is an RLE whose counts do not add up.*: 2"),
        (
            with_value("bbox", [1, 2, 3]),
            r"whose bbox is no list of four numbers; expected \[x, y, width, height\].*: 2",
        ),
        (with_value("bbox", [1, 2, math.inf, 4]), "whose bbox is no list of four numbers.*: 2"),
        (
            several(with_value("bbox", [5, 5, 0, 3]), with_value("segmentation", [[5, 5, 5, 9, 5, 7]])),
            "1 objects whose bbox is smaller than one pixel; .*: 2",
        ),
        (
            several(with_value("bbox", [5, 500, 9, 9]), with_value("segmentation", [[5, 500, 9, 500, 9, 509]])),
            "1 objects whose bbox lies outside its image; .*: 2",
        ),
        (
            lambda c: [entry.update(bbox=[40, 40, 60, 46]) for entry in c["annotations"]],
            r"4 boxes that reach beyond their image; expected \[x, y, width, height\] in pixels, not two corners",
        ),
        (with_value("image_id", 9), "1 annotations whose image_id is none of the images': 2"),
        (with_value("image_id", None), "1 annotations whose image_id is none of the images': 2"),
        (with_value("category_id", 7), r"1 annotations whose category_id is none of the categories' \(1, 2\): 2"),
        (with_value("category_id", [1]), "1 annotations whose category_id is none of the categories'"),
        (with_value("id", 1), "1 annotations of the same id as another: 1"),
        (with_value("id", 3, part="images"), "1 images of the same id as another: 3"),
        (with_value("id", "x", part="images"), "1 images whose ids are text where others are numbers: 'x'"),
        (with_value("id", "x", part="categories"), "1 categories whose ids are text where others are numbers: 'x'"),
        (with_value("iscrowd", "no"), "1 objects whose iscrowd is neither 0 nor 1: 2"),
        (with_value("segmentation", dict(COMPRESSED, counts=COMPRESSED["counts"][:-1])), "counts do not add up.*: 2"),
        (with_value("segmentation", dict(COMPRESSED, counts="é")), "counts do not add up to the image.*: 2"),
        (with_value("segmentation", dict(COMPRESSED, counts="")), "counts do not add up to the image.*: 2"),
        (with_value("segmentation", [[1e30, 1, 9, 9, 5, 5]]), "is a polygon far outside of any image.*: 2"),
        (
            with_value("segmentation", [[10**400, 1, 9, 9, 5, 5]]),
            "is a polygon of other than pairs of finite numbers.*: 2",
        ),
        (with_value("bbox", [10**400, 1, 9, 9]), "whose bbox is no list of four numbers.*: 2"),
        (lambda c: c["images"][1].pop("id"), "1 images without an id; by their places in the list: 1"),
        (lambda c: c["images"][1].pop("file_name"), "1 images without a file_name: 1"),
        (
            lambda c: c["images"][1].update(width=0, file_name="absent.png"),
            r"1 images without width and height, whose file cannot be read: 1 \(absent.png\)",
        ),
        (with_value("id", 1, part="categories"), "1 categories of the same id as another: 1"),
        (lambda c: c.update(images=dict(c["images"][0])), "expected images to be a list of objects"),
        (lambda c: c.update(annotations=[[1]]), "expected annotations to be a list of objects"),
        (lambda c: c.update(annotations=[]), "expected annotations, .*a.json has none"),
        (
            lambda c: c["categories"].reverse(),
            r"metainfo.classes: expected the categories of .*a.json in their order, \('dime', 'coin'\), got \('coin'",
        ),
    ],
)
def test_refused(root, change, message):
    found = content()
    change(found)
    with pytest.raises(ConfigError, match=f"(?s)train_dataloader.dataset.*{message}"):
        check(root, found)
    assert not (root / "work").exists()


def test_all_that_is_wrong_in_one_message(root):
    found = content()
    found["annotations"][0]["segmentation"] = []
    found["annotations"][1]["image_id"] = 9
    found["annotations"][2]["category_id"] = 7
    with pytest.raises(ConfigError) as error:
        check(root, found)
    lines = str(error.value).splitlines()
    assert (
        lines[0]
        == f"train_dataloader.dataset.ann_file: {root}/annotations/a.json cannot be used as it is; by their ids:"
    )

    assert sorted(line.rpartition(": ")[2] for line in lines[1:]) == ["1", "2", "3"]


def test_a_box_of_which_less_than_a_pixel_is_in_the_image_is_left_out(root):
    found = content()
    found["annotations"][1].update(bbox=[-5, 10, 5.4, 30], segmentation=[[0, 10, 0.4, 10, 0.4, 40]])
    with pytest.raises(ConfigError, match="1 objects whose bbox has less than one pixel in its image; .*: 2"):
        check(root, found)


def test_what_boxes_alone_do_not_need(root):
    found = content()
    for entry in found["annotations"]:
        del entry["segmentation"]
    with warnings.catch_warnings(record=True) as told:
        check(root, found, "train", "val", base="retinanet_svit-s_fpn_1x_coco")
    assert not [warning for warning in told if "a.json" in str(warning.message)]


def test_objects_that_mmdet_leaves_out(root):
    """One in a thousand, as COCO has them, is named in a warning; more are refused."""
    found = content()
    flat = dict(found["annotations"][0], bbox=[5, 5, 3, 0], segmentation=[[5, 5, 8, 5, 8, 5]])
    found["annotations"] = [dict(found["annotations"][0], id=i) for i in range(1, 1001)] + [dict(flat, id=2000)]
    with pytest.warns(UserWarning, match="(?s)MMDetection leaves out, .*smaller than one pixel.*: 2000"):
        check(root, found, "train")
    found["annotations"].append(dict(flat, id=2001))
    with pytest.raises(ConfigError, match="2 objects whose bbox is smaller than one pixel; .*: 2000, 2001"):
        check(root, found, "train")


def test_no_image_is_left(root):
    found = content()
    for image in found["images"]:
        image.update(width=28)
    for entry in found["annotations"]:
        entry.update(bbox=[5, 5, 20, 10])
    with pytest.raises(
        ConfigError, match=r"of 4 in .*a.json, 4 are smaller than filter_cfg.min_size=32 \(0.png of 28 x"
    ):
        check(root, found, "train")
    found = content()
    found["annotations"] = found["annotations"][:2]
    found["images"][0]["width"] = found["images"][1]["width"] = 28
    with pytest.raises(ConfigError, match="2 are smaller than .*, 2 have no object of the classes .*filter_empty_gt"):
        check(root, found, "train")
    found["images"][0]["width"] = WIDTH
    with pytest.warns(UserWarning, match="of the 4 images in .*a.json, 1 are smaller than .* and left out"):
        check(root, found, "train")


def test_evaluator_of_other_images(root):
    (root / "annotations/b.json").write_text(
        json.dumps(dict(content(), images=content()["images"][:1], annotations=[]))
    )
    (root / "annotations/a.json").write_text(json.dumps(content()))
    other = config(root)
    other.val_evaluator.ann_file = str(root / "annotations/b.json")
    with pytest.raises(
        ConfigError, match="val_evaluator.ann_file: .*b.json lacks 3 images of the data set .*: 1, 2, 3"
    ):
        check_data(other, "val")


@pytest.mark.parametrize("change", [lambda c: c.pop("annotations"), lambda c: c.update(annotations=[])])
def test_test_split_without_annotations(root, change):
    """As COCO's test-dev: the evaluator writes the results; with the data set's own file, not that of val."""
    (root / "annotations/a.json").write_text(json.dumps(content()))
    bare = content()
    change(bare)
    (root / "annotations/image_info.json").write_text(json.dumps(bare))
    unannotated = config(root)
    unannotated.test_dataloader.dataset.ann_file = "annotations/image_info.json"
    with pytest.warns(UserWarning, match="image_info.json has no annotations: results are written to .*/work/results"):
        check_data(unannotated, "test")
    evaluator = unannotated.test_evaluator
    assert evaluator.format_only
    assert evaluator.ann_file == str(root / "annotations/image_info.json")
    assert evaluator.outfile_prefix == str(root / "work/results/image_info")
    assert len(DATASETS.build(unannotated.test_dataloader.dataset)) == 4


# What may stand where a value was: right, wrong, of another type.
NUMBERS = st.one_of(st.integers(-100, 100), st.floats(width=32), st.sampled_from([0, 1, 64, 1e30, -0.0]))
ANYTHING = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=3)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=3), inner, max_size=2)),
    max_leaves=6,
)
POLYGONS = st.lists(st.lists(st.one_of(st.integers(-20, 90), NUMBERS), max_size=10), max_size=3)
RLES = st.fixed_dictionaries(
    dict(size=st.sampled_from([[HEIGHT, WIDTH], [WIDTH, HEIGHT], []])),
    optional=dict(
        counts=st.one_of(
            st.lists(st.integers(-5, 4000), max_size=6), st.just(RLE["counts"]), st.text("PQRab0123", max_size=8)
        )
    ),
)
VALUES = dict(
    images=dict(
        id=st.one_of(st.integers(0, 5), ANYTHING), width=NUMBERS, height=NUMBERS, file_name=st.text(max_size=3)
    ),
    annotations=dict(
        id=st.one_of(st.integers(-1, 6), ANYTHING),
        image_id=st.one_of(st.integers(0, 5), ANYTHING),
        category_id=st.one_of(st.integers(0, 3), ANYTHING),
        bbox=st.one_of(st.lists(st.one_of(st.integers(-20, 90), NUMBERS), min_size=4, max_size=4), ANYTHING),
        area=st.one_of(NUMBERS, ANYTHING),
        iscrowd=st.sampled_from([0, 1, None, True]),
        segmentation=st.one_of(POLYGONS, RLES, ANYTHING),
    ),
    categories=dict(
        id=st.one_of(st.integers(0, 3), ANYTHING), name=st.sampled_from(["coin", "dime", "penny", None, 1])
    ),
)
DROPPED = object()
DAMAGES = st.lists(
    st.sampled_from([(part, key) for part, keys in VALUES.items() for key in keys]).flatmap(
        lambda where: st.tuples(
            st.just(where), st.integers(0, 3), st.one_of(st.just(DROPPED), VALUES[where[0]][where[1]])
        )
    ),
    min_size=1,
    max_size=3,
)


@pytest.fixture(scope="module")
def shared_root(tmp_path_factory) -> Path:
    return folder(tmp_path_factory.mktemp("annotations") / "data")


def evaluate(file: str) -> None:
    """Runs COCO's evaluation against these annotations, of one find an image."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(file)
        for kind in ("bbox", "segm"):
            finds = [
                dict(image_id=i, category_id=c, score=0.5, bbox=[5, 5, 20, 10], segmentation=encoded())
                for i in truth.get_img_ids()
                for c in truth.get_cat_ids()
            ]
            if kind == "segm":
                [find.pop("bbox") for find in finds]
            evaluation = COCOeval(truth, truth.loadRes(finds), kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
    assert np.isfinite(evaluation.stats).all()


def encoded() -> dict:
    from pycocotools import mask

    found = mask.frPyObjects([POLYGON], HEIGHT, WIDTH)[0]
    return dict(found, counts=found["counts"].decode())


@settings(max_examples=150, deadline=None)
@given(damages=DAMAGES)
def test_refused_or_fit_for_training_and_evaluation(shared_root, damages):
    """Whatever is in the file: a message, or a data set whose every image loads, with finite boxes inside of it."""
    found = content()
    for (part, key), number, value in damages:
        entries = found[part]
        entry = entries[number % len(entries)]
        if value is DROPPED:
            entry.pop(key, None)
        else:
            entry[key] = copy.deepcopy(value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            checked = check(shared_root, found)
        except ConfigError as error:
            message = str(error)
        else:
            message = None
        if message is not None:
            assert str(shared_root / "annotations/a.json") in message or "no image" in message
            return
        # Sizes in the file that are not the images', and images that are absent, are CheckImagesHook's business.
        dataset = DATASETS.build(checked.train_dataloader.dataset)
        for i in range(len(dataset)):
            info = dataset.get_data_info(i)
            for instance in info["instances"]:
                left, top, right, bottom = instance["bbox"]
                assert -1 <= left < right <= info["width"] + 1
                assert -1 <= top < bottom <= info["height"] + 1
            if (info["width"], info["height"]) == (WIDTH, HEIGHT) and Path(info["img_path"]).is_file():
                item = dataset[i]["data_samples"].gt_instances
                assert len(item.masks) == len(item.bboxes) == len(item.labels)
    evaluate(checked.val_evaluator.ann_file)
