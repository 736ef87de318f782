import pickle

import pytest
import torch

from helpers import needs_mm

needs_mm()

from mmengine.logging import HistoryBuffer  # noqa: E402

import svit.adapters  # noqa: E402, F401


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
