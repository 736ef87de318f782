"""The baseline of the speed claims computes what the authors' code computes."""

import pytest
import timm
import torch

import goldens
import svit  # noqa: F401
from upstream_form import UPSTREAM, upstream_form


def build(variant: str) -> torch.nn.Module:
    model = timm.create_model(f"svit_{variant}").double()
    model.load_state_dict(goldens.state_dict(variant))
    return upstream_form(model)


def test_forward():
    golden = goldens.load("stvit_small_200x264")
    model = build("small").eval()
    with torch.no_grad():
        assert goldens.error(model(goldens.image(1, (2, 3, 200, 264))), golden["logits"]) < 1e-9


@pytest.mark.parametrize(("mode", "seed", "batch"), [("eval", 7, 2), ("train", 8, 4)])
def test_gradients(mode, seed, batch):
    golden = goldens.load(f"stvit_small_grads_{mode}_96")
    model = build("small").train(mode == "train")
    x = goldens.image(seed, (batch, 3, 96, 96)).requires_grad_()
    logits = model(x)
    (logits * goldens.image(100 + seed, tuple(logits.shape))).sum().backward()
    assert goldens.error(logits, golden["logits"]) < 1e-9
    assert goldens.error(x.grad[:, :, :16, :16], golden["grad_input_corner"]) < 1e-9


@pytest.mark.parametrize("n_iter", [3, (2, 3, 1, 1), [1, 4, 2, 2]], ids=str)
def test_several_iterations_equal_ours(n_iter):
    model = timm.create_model("test_svit", n_iter=n_iter).double().eval()
    x = torch.randn(2, 3, 45, 50, dtype=torch.float64)
    expected = model(x)
    torch.testing.assert_close(upstream_form(model)(x), expected, rtol=1e-10, atol=1e-12)


def test_every_shortcut_is_replaced():
    model = upstream_form(timm.create_model("test_svit"))
    assert not [name for name, m in model.named_modules() if type(m) in UPSTREAM]
