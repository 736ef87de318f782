"""Conversion of checkpoint files: what survives it, and what every bad file is told."""

import os
import pickle
from argparse import Namespace
from fractions import Fraction
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from svit.convert import MODELS, OUR_MARK, CheckpointError, convert, find_model
from svit.models.original import MARK, to_original

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def random_bits(name: str = "test_svit", dtype: torch.dtype = torch.float32, seed: int = 0, **kwargs) -> dict:
    """A state dict of ours with random bits in every tensor: NaNs of any payload, infinities and denormals."""
    generator = torch.Generator().manual_seed(seed)
    state_dict = {}
    for key, meta in timm.create_model(name, device="meta", **kwargs).state_dict().items():
        kind = dtype if meta.is_floating_point() else meta.dtype
        data = torch.randint(256, (meta.numel() * kind.itemsize,), dtype=torch.uint8, generator=generator)
        state_dict[key] = data.view(kind).reshape(meta.shape)
    return state_dict


@pytest.fixture(scope="module")
def ours() -> dict:
    return random_bits()


@pytest.fixture(scope="module")
def theirs(ours) -> dict:
    return to_original(ours)


def save_theirs(path: Path, state_dict: dict, **entries) -> Path:
    """A file such as the authors', with their other entries."""
    torch.save({"model": state_dict, "epoch": 299, "args": Namespace(lr=1e-3, model="stvit"), **entries}, path)
    return path


def bits(state_dict: dict) -> dict:
    return {
        k: (v.dtype, tuple(v.shape), v.contiguous().reshape(-1).view(torch.uint8).tolist())
        for k, v in state_dict.items()
    }


def listing(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() if p.is_file() else b"" for p in folder.iterdir()}


def failure(source: Path, target_name: str = "out.safetensors", model: str | None = "test_svit", **kwargs) -> str:
    """The message of a conversion that fails, and must leave its folder and an older target as they were."""
    target = source.with_name(target_name)
    before = listing(source.parent)
    for older in (None, b"older"):
        if older:
            target.write_bytes(older)
            before[target.name] = older
        with pytest.raises(CheckpointError) as caught:
            convert(source, target, model, **kwargs)
        assert listing(source.parent) == before
    target.unlink()
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_theirs_there_and_back(tmp_path, dtype):
    theirs = to_original(random_bits(dtype=dtype))
    assert any(t.isnan().any() for t in theirs.values())
    source = save_theirs(tmp_path / "theirs.pth", dict(reversed(theirs.items())))
    assert convert(source, tmp_path / "ours.safetensors", "test_svit") == "test_svit"
    assert convert(tmp_path / "ours.safetensors", tmp_path / "back.pth", "test_svit") == "test_svit"

    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert list(back) == ["model"]
    assert bits(back["model"]) == bits(theirs)
    assert set(listing(tmp_path)) == {"theirs.pth", "ours.safetensors", "back.pth"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ours_there_and_back(tmp_path, dtype):
    ours = random_bits(dtype=dtype)
    save_file(ours, tmp_path / "ours.safetensors")
    convert(tmp_path / "ours.safetensors", tmp_path / "theirs.pth", "test_svit")
    convert(tmp_path / "theirs.pth", tmp_path / "back.safetensors", "test_svit")

    theirs = torch.load(tmp_path / "theirs.pth", weights_only=True)["model"]
    assert bits(theirs) == bits(to_original(ours))
    assert bits(load_file(tmp_path / "back.safetensors")) == bits(ours)


def test_mixed_dtypes_are_kept(tmp_path, ours):
    mixed = {k: v.half() if "blocks" in k and v.is_floating_point() else v for k, v in ours.items()}
    save_file(mixed, tmp_path / "ours.safetensors")
    convert(tmp_path / "ours.safetensors", tmp_path / "theirs.pth", "test_svit")
    convert(tmp_path / "theirs.pth", tmp_path / "back.safetensors", "test_svit")
    assert bits(load_file(tmp_path / "back.safetensors")) == bits(mixed)


@pytest.mark.parametrize("entry", ["model", "state_dict", None])
def test_files_of_torch_save_in_our_layout(tmp_path, ours, entry):
    torch.save({entry: ours, "epoch": 3} if entry else ours, tmp_path / "ours.pth")
    convert(tmp_path / "ours.pth", tmp_path / "theirs.pth", "test_svit")
    assert bits(torch.load(tmp_path / "theirs.pth", weights_only=True)["model"]) == bits(to_original(ours))


def test_file_before_the_zip_format(tmp_path, theirs, ours):
    torch.save({"model": theirs}, tmp_path / "theirs.pth", _use_new_zipfile_serialization=False)
    convert(tmp_path / "theirs.pth", tmp_path / "ours.safetensors", "test_svit")
    assert bits(load_file(tmp_path / "ours.safetensors")) == bits(ours)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers_are_dropped(tmp_path, theirs, ours, prefix):
    source = save_theirs(tmp_path / "theirs.pth", {prefix + k: v for k, v in theirs.items()})
    convert(source, tmp_path / "ours.safetensors", "test_svit")
    assert bits(load_file(tmp_path / "ours.safetensors")) == bits(ours)


def test_tensors_strided_shared_and_sliced(tmp_path, ours):
    odd = dict(ours)
    odd["stem.layers.3.weight"] = ours["stem.layers.3.weight"].to(memory_format=torch.channels_last)
    assert not odd["stem.layers.3.weight"].is_contiguous()
    odd["stem.layers.2.bias"] = odd["stem.layers.2.weight"]
    odd["stem.layers.0.bias"] = torch.arange(1e6)[-4:]
    odd["head.fc.bias"] = torch.nn.Parameter(ours["head.fc.bias"])
    torch.save(odd, tmp_path / "ours.pth")
    convert(tmp_path / "ours.pth", tmp_path / "theirs.pth", "test_svit")
    convert(tmp_path / "theirs.pth", tmp_path / "back.safetensors", "test_svit")

    assert bits(load_file(tmp_path / "back.safetensors")) == bits(odd)
    theirs = torch.load(tmp_path / "theirs.pth", weights_only=True)["model"]
    assert all(type(v) is torch.Tensor and v.is_contiguous() for v in theirs.values())
    assert (tmp_path / "theirs.pth").stat().st_size < 2e6 < (tmp_path / "ours.pth").stat().st_size

    save_theirs(tmp_path / "shared.pth", to_original(odd))
    convert(tmp_path / "shared.pth", tmp_path / "shared.safetensors", "test_svit")
    assert bits(load_file(tmp_path / "shared.safetensors")) == bits(odd)


@pytest.mark.parametrize(("key", "ema_key"), [("model", "model_ema"), ("state_dict", "state_dict_ema")])
def test_ema(tmp_path, ours, theirs, key, ema_key):
    averaged = random_bits(seed=1)
    source = tmp_path / "theirs.pth"
    torch.save({ema_key: to_original(averaged), key: theirs}, source)
    convert(source, tmp_path / "ours.safetensors", "test_svit")
    convert(source, tmp_path / "ema.safetensors", "test_svit", ema=True)
    assert bits(load_file(tmp_path / "ours.safetensors")) == bits(ours)
    assert bits(load_file(tmp_path / "ema.safetensors")) == bits(averaged)


def test_ema_of_the_one_hot_kernels_may_drift(tmp_path, ours, theirs):
    drifted = {k: v * (1 - 1e-3) if k.endswith("fold.weights") else v for k, v in theirs.items()}
    source = save_theirs(tmp_path / "theirs.pth", theirs, model_ema=drifted)
    convert(source, tmp_path / "ours.safetensors", "test_svit", ema=True)
    assert bits(load_file(tmp_path / "ours.safetensors")) == bits(ours)


def test_converted_file_is_the_model(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("test_svit").eval()
    averaged = {k: v + 1 for k, v in to_original(model.state_dict()).items()}
    source = save_theirs(tmp_path / "theirs.pth", to_original(model.state_dict()), model_ema=averaged)
    convert(source, tmp_path / "ours.safetensors")
    loaded = timm.create_model("test_svit", checkpoint_path=str(tmp_path / "ours.safetensors")).eval()
    x = torch.randn(2, 3, 48, 64)
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["svit_nano", "svit_nano_32", "test_svit"])
def test_finds_the_model_of_a_file(tmp_path, name):
    ours = random_bits(name, num_classes=7)
    source = save_theirs(tmp_path / "theirs.pth", to_original(ours))
    assert convert(source, tmp_path / "ours.safetensors", num_classes=7) == name
    assert convert(tmp_path / "ours.safetensors", tmp_path / "back.pth", num_classes=7) == name


@pytest.mark.parametrize("name", MODELS)
def test_finds_every_model(name):
    ours = timm.create_model(name, num_classes=1000, device="meta").state_dict()
    original = name.startswith("svit_l")
    assert find_model(Path("x"), to_original(ours) if original else ours, original, None, 1000) == name


def test_models_have_our_mark():
    assert {"svit_small", "svit_base", "svit_large"} < set(MODELS)
    assert to_original({OUR_MARK: torch.ones(1)}).keys() == {MARK}


def test_no_head(tmp_path):
    ours = random_bits(num_classes=0)
    save_file(ours, tmp_path / "ours.safetensors")
    message = failure(tmp_path / "ours.safetensors", "out.pth")
    assert "does not fit test_svit; missing keys: 2 (head.fc.weight, head.fc.bias)" in message
    convert(tmp_path / "ours.safetensors", tmp_path / "theirs.pth", "test_svit", num_classes=0)
    assert bits(torch.load(tmp_path / "theirs.pth", weights_only=True)["model"]) == bits(to_original(ours))


@pytest.mark.parametrize("model", ["test_svit", None])
def test_head_of_another_size(tmp_path, model):
    ours = random_bits(num_classes=10)
    source = save_theirs(tmp_path / "theirs.pth", to_original(ours))
    message = failure(source, model=model)
    assert message == f"{source}: test_svit with 10 classes, expected 1000; --num-classes 10 takes it"
    convert(source, tmp_path / "ours.safetensors", model, num_classes=10)
    assert bits(load_file(tmp_path / "ours.safetensors")) == bits(ours)


def test_head_of_another_width_is_no_matter_of_classes(tmp_path, theirs):
    source = save_theirs(tmp_path / "theirs.pth", {**theirs, "head.weight": torch.ones(10, 63)})
    message = failure(source)
    assert "other shapes: 2 (head.weight: [10, 63], expected [10, 64], head.bias: [1000], expected [10])" in message
    assert "--num-classes" not in message


def test_no_such_file(tmp_path):
    assert failure(tmp_path / "theirs.pth") == f"{tmp_path / 'theirs.pth'}: no such file"
    (tmp_path / "folder.pth").mkdir()
    assert failure(tmp_path / "folder.pth") == f"{tmp_path / 'folder.pth'}: no such file"


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before zip"])
@pytest.mark.parametrize("length", [0, 1, 3, 4, 64, 1000, 0.5, 0.99, -1])
def test_truncated_pth(tmp_path, theirs, zipped, length):
    source = tmp_path / "theirs.pth"
    torch.save({"model": theirs}, source, _use_new_zipfile_serialization=zipped)
    check_truncated(source, length)


@pytest.mark.parametrize("length", [0, 7, 8, 100, 0.5, 0.99, -1])
def test_truncated_safetensors(tmp_path, ours, length):
    source = tmp_path / "ours.safetensors"
    save_file(ours, source)
    check_truncated(source, length)


def check_truncated(source: Path, length: int | float) -> None:
    data = source.read_bytes()
    source.write_bytes(data[: length if isinstance(length, int) else int(length * len(data))])
    message = failure(source, "out.pth" if source.suffix == ".safetensors" else "out.safetensors")
    assert message.startswith(f"{source}: cannot be read (")
    assert "weights_only" not in message


def test_text_under_the_name_of_a_checkpoint(tmp_path):
    for name in ("page.pth", "page.safetensors"):
        (tmp_path / name).write_text("<!DOCTYPE html><title>Too many downloads</title>" * 10)
        assert failure(tmp_path / name, "out.pth").startswith(f"{tmp_path / name}: cannot be read (")


class Touch:
    """Creates a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("form", ["zip", "before zip", "pickle"])
def test_no_code_in_a_file_is_run(tmp_path, theirs, form):
    source, marker = tmp_path / "theirs.pth", tmp_path / "marker"
    checkpoint = {"model": theirs, "args": Touch(marker)}
    if form == "pickle":
        source.write_bytes(pickle.dumps(checkpoint, protocol=2))
        pickle.loads(source.read_bytes())["args"].close()
    else:
        torch.save(checkpoint, source, _use_new_zipfile_serialization=form == "zip")
        torch.load(source, weights_only=False)["args"].close()
    assert marker.exists()  # the file does what it is meant to, unless it is read as weights only
    marker.unlink()

    message = failure(source)
    assert not marker.exists()
    if form == "zip":
        assert message.startswith(f"{source}: holds Python objects other than tensors, which are not loaded: ")
        assert message.endswith("io.open")
    else:
        assert message.startswith(f"{source}: cannot be read (UnpicklingError)")


def test_no_class_of_a_file_is_built(tmp_path, theirs):
    source = save_theirs(tmp_path / "theirs.pth", theirs, accuracy=Fraction(836, 1000), epochs={1, 2})
    message = failure(source)
    assert message == f"{source}: holds Python objects other than tensors, which are not loaded: fractions.Fraction"


def test_no_such_entry(tmp_path, theirs):
    source = tmp_path / "theirs.pth"
    torch.save({"optimizer": {}, "epoch": 3}, source)
    assert failure(source) == f"{source}: no entry 'model'; it has optimizer, epoch"
    torch.save({}, source)
    assert failure(source) == f"{source}: no entry 'model'; it has nothing"
    torch.save({"model": theirs, "epoch": 3}, source)
    assert failure(source, ema=True) == f"{source}: no entry 'model_ema'; it has model, epoch"


def test_no_ema_in_bare_weights(tmp_path, ours):
    source = tmp_path / "ours.safetensors"
    save_file({k: ours[k] for k in list(ours)[:8]}, source)
    message = failure(source, "out.pth", ema=True)
    assert message.startswith(f"{source}: no entry 'model_ema'; it has stem.layers.")
    assert message.endswith(", 2 more")


def test_no_dict(tmp_path):
    source = tmp_path / "theirs.pth"
    torch.save([1, 2], source)
    assert failure(source) == f"{source}: expected a dict, found list"
    torch.save({"model": 3}, source)
    assert failure(source) == f"{source}: expected a dict under 'model', found int"
    torch.save({"model": {}, "model_ema": None}, source)
    assert failure(source, ema=True) == f"{source}: expected a dict under 'model_ema', found NoneType"


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize(
    "value",
    [
        3.0,
        None,
        [torch.ones(8)],
        torch.ones(8).to_sparse(),
        torch.ones(8, device="meta"),
        torch.ones(8, dtype=torch.cfloat),
    ],
    ids=["float", "None", "list", "sparse", "meta", "complex"],
)
def test_no_tensor(tmp_path, theirs, value):
    source = save_theirs(tmp_path / "theirs.pth", {**theirs, "patch_embed.proj.5.bias": value})
    message = failure(source)
    assert message == f"{source}: its state dict holds what is no plain tensor: patch_embed.proj.5.bias"


def test_key_that_is_no_string(tmp_path, theirs):
    source = save_theirs(tmp_path / "theirs.pth", {**theirs, 5: torch.ones(1)})
    assert failure(source) == f"{source}: its state dict holds what is no plain tensor: 5"


def test_key_with_and_without_a_prefix(tmp_path, theirs):
    source = save_theirs(tmp_path / "theirs.pth", {**theirs, "module.head.bias": theirs["head.bias"]})
    assert failure(source) == f"{source}: the same keys with and without a prefix such as 'module.'"


@pytest.mark.parametrize("model", ["test_svit", None])
def test_no_svit(tmp_path, model):
    source = tmp_path / "other.pth"
    torch.save(timm.create_model("resnet18", num_classes=1).state_dict(), source)
    message = failure(source, model=model)
    assert message == (
        f"{source}: holds no SViT: neither 'patch_embed.proj.0.weight' nor 'stem.layers.0.weight' is among its keys"
    )


def test_another_model_than_the_one_named(tmp_path, theirs):
    source = save_theirs(tmp_path / "theirs.pth", theirs)
    message = failure(source, model="svit_nano")
    assert message.startswith(f"{source}: does not fit svit_nano; missing keys: 105 (layers.1.blocks.1.")
    assert "; unexpected keys: 4 (layers.2.blocks.0.gamma_1, layers.2.blocks.0.gamma_2, layers.3" in message
    assert "; other shapes: 121 (patch_embed.proj.0.weight: [4, 3, 3, 3], expected [12, 3, 3, 3], patch" in message


def test_a_model_of_none_of_our_sizes(tmp_path):
    source = tmp_path / "ours.safetensors"
    save_file(random_bits("test_svit", embed_dims=(8, 16, 24, 36)), source)
    message = failure(source, "out.pth", model=None)
    assert message.startswith(f"{source}: fits no model, test_svit best; other shapes: 27 (stages.3.")
    assert message.endswith(", 24 more)")


def test_missing_and_unexpected_keys(tmp_path, ours, theirs):
    changed = {k: v for k, v in theirs.items() if k not in ("norm.bias", "layers.0.blocks.0.attn.fold.weights")}
    changed["layers.9.x"] = torch.ones(1)
    source = save_theirs(tmp_path / "theirs.pth", changed)
    problems = "missing keys: 2 (norm.bias, layers.0.blocks.0.attn.fold.weights); unexpected keys: 1 (layers.9.x)"
    assert failure(source) == f"{source}: does not fit test_svit; {problems}"
    assert failure(source, model=None) == f"{source}: fits no model, test_svit best; {problems}"

    source = tmp_path / "ours.safetensors"
    save_file({**ours, **{f"extra.{i}": torch.ones(1) for i in range(9)}}, source)
    extras = ", ".join(f"extra.{i}" for i in range(3))
    assert failure(source, "out.pth") == f"{source}: does not fit test_svit; unexpected keys: 9 ({extras}, 6 more)"


def test_our_name_among_theirs_is_unexpected(tmp_path, theirs):
    source = save_theirs(tmp_path / "theirs.pth", {**theirs, "head.fc.bias": theirs["head.bias"]})
    assert failure(source) == f"{source}: does not fit test_svit; unexpected keys: 1 (head.fc.bias)"


def test_other_shape(tmp_path, ours):
    source = tmp_path / "ours.safetensors"
    save_file({**ours, "final_conv.norm.bias": torch.ones(64, 1)}, source)
    message = failure(source, "out.pth")
    assert message == (
        f"{source}: does not fit test_svit; other shapes: 1 (final_conv.norm.bias: [64, 1], expected [64])"
    )


@pytest.mark.parametrize("value", [0.4, float("nan")])
def test_kernel_that_is_not_one_hot(tmp_path, theirs, value):
    key = "layers.1.blocks.0.attn.unfold.weights"
    kernel = theirs[key].clone()
    kernel[3, 0, 1, 0] = value
    source = save_theirs(tmp_path / "theirs.pth", {**theirs, key: kernel})
    message = failure(source)
    assert message == f"{source}: does not fit test_svit; kernels that are not one-hot: 1 ({key})"


def test_unknown_model_name(tmp_path, theirs):
    source = save_theirs(tmp_path / "theirs.pth", theirs)
    assert failure(source, model="svit_huge") == f"model: expected one of {', '.join(MODELS)}, got 'svit_huge'"


def test_suffix_of_the_target(tmp_path, ours, theirs):
    source = save_theirs(tmp_path / "theirs.pth", theirs)
    target = tmp_path / "out.pth"
    assert failure(source, "out.pth") == (
        f"{target}: expected a name that ends in .safetensors, since {source} has the authors' key names"
    )
    source = tmp_path / "ours.safetensors"
    save_file(ours, source)
    target = tmp_path / "out.safetensors"
    assert failure(source, "out.safetensors") == (
        f"{target}: expected a name that ends in .pth, since {source} has our key names"
    )


def test_source_is_target(tmp_path, theirs):
    source = tmp_path / "theirs.safetensors"  # theirs in a .safetensors: the one way to ask for the same name
    save_file(theirs, source)
    os.link(source, tmp_path / "link.safetensors")
    before = listing(tmp_path)
    for target in (source, tmp_path / "link.safetensors", tmp_path / ".." / tmp_path.name / source.name):
        with pytest.raises(CheckpointError, match="source and target are the same file"):
            convert(source, target, "test_svit")
        assert listing(tmp_path) == before
    assert convert(source, tmp_path / "ours.safetensors", "test_svit") == "test_svit"


def test_existing_target_is_replaced(tmp_path, ours, theirs):
    source = save_theirs(tmp_path / "theirs.pth", theirs)
    target = tmp_path / "ours.safetensors"
    target.write_bytes(b"older")
    convert(str(source), str(target), "test_svit")
    assert bits(load_file(target)) == bits(ours)


def test_target_is_as_readable_as_any_new_file(tmp_path, theirs):
    source = save_theirs(tmp_path / "theirs.pth", theirs)
    convert(source, tmp_path / "ours.safetensors", "test_svit")
    convert(tmp_path / "ours.safetensors", tmp_path / "back.pth", "test_svit")
    (tmp_path / "new").touch()
    modes = {p.stat().st_mode for p in tmp_path.iterdir()}
    assert len(modes) == 1


@pytest.mark.parametrize("direction", ["to ours", "to theirs"])
@pytest.mark.parametrize("error", [OSError("disk is full"), RuntimeError("disk is full"), KeyboardInterrupt()])
def test_failed_write_leaves_nothing(tmp_path, monkeypatch, ours, theirs, direction, error):
    if direction == "to ours":
        source, name = save_theirs(tmp_path / "theirs.pth", theirs), "out.safetensors"
    else:
        source, name = tmp_path / "ours.safetensors", "out.pth"
        save_file(ours, source)
    moves = []

    def replace(part, target):
        assert Path(part).stat().st_size > 1000
        assert Path(part).is_relative_to(tmp_path)
        moves.append(Path(target))
        raise error

    monkeypatch.setattr("os.replace", replace)
    if isinstance(error, KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / name, "test_svit")
        assert set(listing(tmp_path)) == {source.name}
    else:
        assert failure(source, name) == f"{tmp_path / name}: cannot be written (disk is full)"
    assert set(moves) == {tmp_path / name}


def test_no_folder_for_the_target(tmp_path, theirs):
    source = save_theirs(tmp_path / "theirs.pth", theirs)
    target = tmp_path / "no" / "ours.safetensors"
    with pytest.raises(CheckpointError, match="cannot be written") as caught:
        convert(source, target, "test_svit")
    assert str(caught.value).startswith(f"{target}: ")
    assert set(listing(tmp_path)) == {"theirs.pth"}
