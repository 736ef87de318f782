import pickle
from pathlib import Path

import pytest
import torch

from helpers import needs_mm

needs_mm()

from mmengine.logging import HistoryBuffer  # noqa: E402
from mmengine.runner import CheckpointLoader  # noqa: E402

from svit.adapters import to_safetensors  # noqa: E402
from svit.adapters.checkpoints import find_checkpoint  # noqa: E402
from svit.convert import CheckpointError  # noqa: E402
from svit.models.svit import WEIGHTS  # noqa: E402


def test_history_is_read(tmp_path):
    """What mmengine's checkpoints hold beside tensors."""
    history = HistoryBuffer()
    for value in (3, 1.5, 2):
        history.update(value)
    torch.save({"message_hub": {"loss": history}, "weight": torch.ones(2)}, tmp_path / "a.pth")
    found = torch.load(tmp_path / "a.pth", weights_only=True)["message_hub"]["loss"]
    assert found.data[0].tolist() == [3, 1.5, 2]
    assert found.mean() == pytest.approx(6.5 / 3)


class Foreign:
    pass


class Reduced:
    """Pickled as the call of a function."""

    def __init__(self, *call) -> None:
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


@pytest.mark.parametrize(
    "thing",
    [
        Foreign(),
        print,
        Reduced(getattr, HistoryBuffer, "update"),
        Reduced(getattr, {}, "clear"),
        Reduced(eval, "1 + 1"),
    ],
)
def test_nothing_else(tmp_path, thing):
    torch.save({"a": thing}, tmp_path / "a.pth")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "a.pth", weights_only=True)


def checkpoint(folder: Path) -> Path:
    """As mmengine's Runner writes it: the weights, the classes, the history, the optimizer's state."""
    history = HistoryBuffer()
    history.update(1.5)
    state_dict = {"head.weight": torch.tensor([[1.0, 2.0, 1 / 3]]), "bn.num_batches_tracked": torch.tensor(70000)}
    meta = {"dataset_meta": {"classes": ("WBC", "RBC"), "palette": [(1, 2, 3), (4, 5, 6)]}, "epoch": 4}
    whole = {"state_dict": state_dict, "meta": meta, "message_hub": {"loss": history}, "optimizer": {"state": {}}}
    torch.save(whole, folder / "epoch_4.pth")
    return folder / "epoch_4.pth"


@pytest.mark.parametrize(("dtype", "third"), [(torch.float32, 1 / 3), (torch.float16, 0.333251953125)])
def test_to_safetensors_and_back(tmp_path, monkeypatch, dtype, third):
    to_safetensors(checkpoint(tmp_path), tmp_path / "a.safetensors", dtype)
    monkeypatch.chdir(tmp_path)
    for name in (str(tmp_path / "a.safetensors"), "a.safetensors"):
        found = CheckpointLoader.load_checkpoint(name, map_location="cpu")
        assert found["meta"] == {"dataset_meta": {"classes": ["WBC", "RBC"], "palette": [(1, 2, 3), (4, 5, 6)]}}
        assert list(found["state_dict"]) == ["bn.num_batches_tracked", "head.weight"]
        assert found["state_dict"]["head.weight"].tolist() == [[1.0, 2.0, pytest.approx(third, abs=1e-8)]]
        assert found["state_dict"]["head.weight"].dtype == dtype
        assert found["state_dict"]["bn.num_batches_tracked"].tolist() == 70000


def test_to_safetensors_of_weights_that_share_memory(tmp_path):
    weight = torch.arange(4.0)
    torch.save({"state_dict": {"a": weight, "b": weight, "c": weight[::2]}}, tmp_path / "a.pth")
    to_safetensors(tmp_path / "a.pth", tmp_path / "a.safetensors", torch.float32)
    found = CheckpointLoader.load_checkpoint(str(tmp_path / "a.safetensors"), map_location="cpu")["state_dict"]
    assert {key: value.tolist() for key, value in found.items()} == {
        "a": [0, 1, 2, 3],
        "b": [0, 1, 2, 3],
        "c": [0, 2],
    }


def test_to_safetensors_of_numbers_too_large_for_the_dtype(tmp_path):
    torch.save({"state_dict": {"bn.running_var": torch.tensor([1.0, 70000.0])}}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="a.pth: not all numbers are finite as float16, those of bn.running_var"):
        to_safetensors(tmp_path / "a.pth", tmp_path / "a.safetensors")
    assert not (tmp_path / "a.safetensors").exists()
    to_safetensors(tmp_path / "a.pth", tmp_path / "a.safetensors", torch.bfloat16)


def test_to_safetensors_refuses(tmp_path):
    with pytest.raises(CheckpointError, match="target: expected a name that ends in .safetensors, got .*a.pth"):
        to_safetensors(checkpoint(tmp_path), tmp_path / "a.pth")
    torch.save({"state_dict": {"weight": Foreign()}}, tmp_path / "b.pth")
    with pytest.raises(CheckpointError, match="Foreign"):
        to_safetensors(tmp_path / "b.pth", tmp_path / "b.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.pth", "epoch_4.pth"]
    (tmp_path / "c.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="c.safetensors: cannot be read"):
        CheckpointLoader.load_checkpoint(str(tmp_path / "c.safetensors"))


def test_find_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_checkpoint("svit_nano.photos20") == str(WEIGHTS / "svit_nano.photos20.safetensors")
    for name in ("nothing", "epoch_4.pth", "folder/svit_nano.photos20", "https://host/a.pth"):
        assert find_checkpoint(name) == name
    (tmp_path / "svit_nano.photos20").write_text("")  # a file of that name is what the user means
    assert find_checkpoint("svit_nano.photos20") == "svit_nano.photos20"
