"""Recipes: how they are read, changed and checked, and those that come with the project."""

import json
import os

import pytest
import timm

from svit.errors import InputError
from svit.training.recipe import FOLDER, Recipe, differences, load_recipe

SMALL = "model: test_svit\ndata_dir: data\nepochs: 3\n"


@pytest.fixture
def recipe(tmp_path):
    def write(text: str = "", name: str = "recipe.yaml") -> str:
        (tmp_path / name).write_text(SMALL + text)
        return str(tmp_path / name)

    return write


def test_what_a_recipe_does_not_say_is_the_default(recipe):
    assert load_recipe(recipe("lr: 0.1")) == Recipe(model="test_svit", data_dir="data", epochs=3, lr=0.1)


def test_changes_go_before_the_file_also_within_a_key(recipe):
    name = recipe("mixed_precision: bf16\nclip_grad: 1\nmodel_args: {stem_stride: 2, head_width: 8}")
    changes = ["epochs=7", "mixed_precision=null", "model_args.head_width=16", "model_args.depths=[1, 1, 1, 2]"]
    read = load_recipe(name, [*changes, "scale=[0.5, 1]", "drop_path=0.1", "drop_path_schedule={2: 0.3}"])
    assert read.epochs == 7
    assert read.mixed_precision is None
    assert read.clip_grad == 1.0
    assert read.model_args == {"stem_stride": 2, "head_width": 16, "depths": [1, 1, 1, 2]}
    assert read.scale == [0.5, 1.0]
    assert read.drop_path_schedule == {2: 0.3}


@pytest.mark.parametrize(
    ("changes", "sizes", "rates"),
    [
        ([], {2: 24}, {1: 0.2, 3: 0.4}),
        (["train_size_schedule={}", "drop_path_schedule={}"], {}, {}),
        (["train_size_schedule={1: 20}"], {1: 20}, {1: 0.2, 3: 0.4}),
        (["train_size_schedule.4=28", "drop_path_schedule.3=0.5"], {2: 24, 4: 28}, {1: 0.2, 3: 0.5}),
        (["train_size_schedule={'5': 20}"], {5: 20}, {1: 0.2, 3: 0.4}),  # as JSON in the weights has it
    ],
)
def test_a_schedule_takes_the_place_of_the_whole_one_before(recipe, changes, sizes, rates):
    base = recipe("drop_path: 0.1\ndrop_path_schedule: {2: 0.3}\ntrain_size_schedule: {2: 24}", "base.yaml")
    read = load_recipe(recipe(f"base: {base}\ndrop_path_schedule: {{1: 0.2, 3: 0.4}}"), changes)
    assert (read.train_size_schedule, read.drop_path_schedule) == (sizes, rates)


def test_a_mapping_is_set_whole_or_a_key_at_a_time(recipe):
    name = recipe("opt_args: {eps: 1.0e-6, foreach: false}")
    assert load_recipe(name, ["opt_args.eps=1e-5"]).opt_args == {"eps": 1e-5, "foreach": False}
    assert load_recipe(name, ["opt_args={eps: 1e-5}"]).opt_args == {"eps": 1e-5}
    assert load_recipe(name, ["opt_args={}"]).opt_args == {}
    later = recipe(f"base: {name}\nopt_args: {{eps: 1.0e-5}}", "later.yaml")
    assert load_recipe(later).opt_args == {"eps": 1e-5, "foreach": False}


def test_recipes_from_json_and_older_ones_do_not_differ():
    recipe = {**vars(Recipe()), "drop_path": 0.1, "drop_path_schedule": {260: 0.6}}
    assert differences(recipe, json.loads(json.dumps(recipe))) == []
    older = {key: value for key, value in recipe.items() if key != "train_size_schedule"}
    assert differences(older, recipe) == differences(recipe, older) == []
    assert differences(recipe, {**recipe, "drop_path_schedule": {260: 0.5}}) == [
        "drop_path_schedule: {260: 0.6}, now {260: 0.5}"
    ]


@pytest.mark.parametrize(("text", "changes"), [("lr_batch: 16", []), ("", ["lr_batch=16"])])
def test_a_deprecated_key_is_taken(recipe, text, changes):
    with pytest.warns(FutureWarning, match="the key lr_batch is deprecated, use lr_base_size"):
        assert load_recipe(recipe(text), changes).lr_base_size == 16
    assert differences({"lr_batch": 16}, {**vars(Recipe()), "lr_base_size": 16}) == []
    assert differences({"lr_batch": 8}, {**vars(Recipe()), "lr_base_size": 16}) == ["lr_base_size: 8, now 16"]


def test_a_deprecated_key_beside_the_new_one(recipe):
    with pytest.raises(InputError, match="lr_batch: expected lr_base_size alone"):
        load_recipe(recipe("lr_batch: 16\nlr_base_size: 8"))


@pytest.mark.parametrize("data_dir", ["2024_01", "yes", "a #1: [b]", "${lr}", "x=y"])
def test_a_data_dir_of_its_own_is_taken_as_it_is(recipe, data_dir):
    assert load_recipe(recipe(), ["data_dir=other"], data_dir).data_dir == data_dir


def test_a_recipe_starts_from_another(recipe):
    base = recipe("batch_size: 2\nlr: 0.1", "base.yaml")
    middle = recipe(f"base: {base}\nlr: 0.2", "middle.yaml")
    read = load_recipe(recipe(f"base: {middle}\nopt: sgd"), ["epochs=9"])
    assert (read.batch_size, read.lr, read.opt, read.epochs) == (2, 0.2, "sgd", 9)
    recipe(f"base: {middle}", "base.yaml")
    with pytest.raises(InputError, match="middle.yaml starts from itself"):
        load_recipe(middle)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3", "no recipe has a key 'epoch'; did you mean epochs"),
        ("7: 3", "no recipe has a key 7"),
        ("lr: fast", "Value 'fast' of type 'str' could not be converted to Float .key 'lr'"),
        ("batch_size: 1.5", "could not be converted to Integer .key 'batch_size'"),
        ("batch_size: null", "batch_size"),
        ("mean: 0.5", "mean"),
        ("mean: [0.5, 0.5]", r"mean: expected 3 numbers, got \[0.5, 0.5\]"),
        ("std: [0.5, 0.5]\nmodel_args: {in_chans: 4}", r"std: expected 4 numbers, got \[0.5, 0.5\]"),
        ("scale: [0.5]", r"scale: expected 2 numbers, got \[0.5\]"),
        ("img_size: ???", "img_size: expected a value, which --set img_size=... gives, got none"),
        ("workers: -1", "workers: expected at least 0, got -1"),
        ("grad_accum: 0", "grad_accum: expected at least 1, got 0"),
        ("parallel: dp", "parallel: expected ddp or fsdp, got 'dp'"),
        ("sched: cosin", "sched: expected cosine or tanh .* got 'cosin'"),
        ("interpolation: cubic", "interpolation: expected .* got 'cubic'"),
        ("opt: adamww", "opt: no optimizer 'adamww' in timm; did you mean .*adamw"),
        ("evaluate: ema", "evaluate: expected model, since ema is null, got 'ema'"),
        ("drop_path_schedule: {2: 0.1}", "drop_path: expected more than 0 with a drop_path_schedule"),
        ("drop_path: 3", "drop_path: expected at least 0 and less than 1, got 3"),
        ("drop_path: 0.1\ndrop_path_schedule: {2: 6}", "drop_path_schedule: expected .* less than 1, got {2: 6.0}"),
        ("train_size_schedule: {-1: 32}", "train_size_schedule: expected epochs of at least 0, got {-1: 32}"),
        ("clip_grad: -1", "clip_grad: expected more than 0, got -1"),
        ("crop_pct: 87.5", "crop_pct: expected more than 0 and at most 1, got 87.5"),
        ("layer_decay: 0", "layer_decay: expected more than 0 and at most 1, got 0"),
        ("ema: 1", "ema: expected at least 0 and less than 1, got 1"),
        ("label_smoothing: .nan", "label_smoothing: expected finite numbers, got nan"),
        ("hflip: 50", "hflip: expected at least 0 and at most 1, got 50"),
        ("mixup_prob: 2", "mixup_prob: expected at least 0 and at most 1, got 2"),
        ("mixup: -0.8", "mixup: expected at least 0, got -0.8"),
        ("temperature: 0", "temperature: expected more than 0, got 0"),
        ("lr: .nan", "lr: expected finite numbers, got nan"),
        ("weight_decay: .inf", "weight_decay: expected finite numbers, got inf"),
        ("warmup_epochs: .nan", "warmup_epochs: expected finite numbers, got nan"),
        ("min_lr: -1e-6", "min_lr: expected at least 0, got -1e-06"),
        ("num_classes: 0", "num_classes: expected at least 1, got 0"),
        ("lr_base_size: 0", "lr_base_size: expected at least 1, got 0"),
        ("scale: [0, 1]", r"scale: expected more than 0, got \[0.0, 1.0\]"),
        ("scale: [1, 0.5]", r"scale: expected the smaller number first, got \[1.0, 0.5\]"),
        ("scale: [0.1, 1.2]", r"scale: expected at most 1 with crop: rrc, got \[0.1, 1.2\]"),
        ("ratio: [.nan, 1]", r"ratio: expected finite numbers, got \[nan, 1.0\]"),
        ("mean: [0.5, .nan, 0.5]", r"mean: expected finite numbers, got \[0.5, nan, 0.5\]"),
        ("std: [0.5, .nan, 0.5]", r"std: expected finite numbers, got \[0.5, nan, 0.5\]"),
        ("base: [a]", r"base: expected a file or the name of a recipe, got \['a'\]"),
        ("train_size_schedule: {2: 0}", "train_size_schedule: expected sizes of at least 1, got {2: 0}"),
        ("model_args: [1]", "Cannot merge incompatible"),
        ("lr: 1\nlr: 2", "found duplicate key lr .line 5"),
        ("lr: [1", "expected ',' or ']'.* .line"),
    ],
)
def test_what_is_wrong_is_named(recipe, text, message):
    name = recipe(text)
    with pytest.raises(InputError, match=message) as caught:
        load_recipe(name)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{name}: ")


def test_a_name_that_is_no_text(recipe, tmp_path):
    data = os.fsdecode(bytes(tmp_path) + b"/caf\xe9")
    with pytest.raises(InputError, match="data_dir: expected UTF-8"):
        load_recipe(recipe(), data_dir=data)


def test_what_is_no_recipe(tmp_path):
    path = tmp_path / "recipe"
    for content, message in (
        (b"- 1\n- 2", "expected keys and values, got a list"),
        (b"\xff\xfe\x00", "codec can't decode"),
        (b"model: test_svit\nepochs: 1", "missing mandatory value: data_dir"),
        (b"", "missing mandatory value: model"),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match=message):
            load_recipe(str(path))
    with pytest.raises(InputError, match="no file nothing and no recipe of that name; there are .*cifar10"):
        load_recipe("nothing")
    with pytest.raises(InputError, match="--set: expected KEY=VALUE, got 'epochs'"):
        load_recipe("cifar10", ["epochs"])


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.yaml")))
def test_recipes_of_the_project_can_be_followed(name):
    recipe = load_recipe(name, ["checkpoint=file.safetensors"], "data")
    assert timm.is_model(recipe.model)
    assert timm.get_pretrained_cfg(recipe.model) is not None


def test_differences_are_those_that_change_the_result():
    old, new = (
        {**vars(Recipe()), "data_dir": d, "workers": w, "lr": lr} for d, w, lr in (("a", 2, 0.1), ("b", 4, 0.2))
    )
    assert differences(old, new) == ["lr: 0.1, now 0.2"]
    assert differences(old, old) == []
    # A key newer than the old recipe had its default then.
    del old["opt"], old["batch_size"]
    assert differences(old, {**new, "opt": "sgd"}) == ["lr: 0.1, now 0.2", "opt: 'adamw', now 'sgd'"]
