import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from svit.ops import depthwise3x3


def residual_depthwise(x, weight, bias, gelu=False):
    """In float64, from NHWC to NHWC."""
    x = x.double().permute(0, 3, 1, 2)
    u = F.gelu(x) if gelu else x
    y = u + F.conv2d(u, weight.double(), bias.double(), padding=1, groups=x.shape[1])
    return y.permute(0, 2, 3, 1)


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_depthwise_adds_its_input(dtype, gelu):
    x = torch.randn(2, 5, 6, 4, dtype=dtype)
    weight, bias = torch.randn(4, 1, 3, 3, dtype=dtype), torch.randn(4, dtype=dtype)
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-13, torch.bfloat16: 0.05}[dtype]
    y, expected = depthwise3x3(x, weight, bias, gelu), residual_depthwise(x, weight, bias, gelu)
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)


def test_depthwise_in_16_bit_keeps_the_digits_of_its_centre_tap():
    # 1 + 2**-9 is not a bfloat16: a residual folded into the tap would lose the tap altogether.
    x = torch.full((1, 1, 1, 1), 256.0)
    weight = torch.zeros(1, 1, 3, 3)
    weight[..., 1, 1] = 2.0**-9
    with torch.autocast("cpu", torch.bfloat16):
        y = depthwise3x3(x, weight, torch.zeros(1))
    assert y.item() == 256.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_depthwise_keeps_the_dtype_under_autocast(dtype):
    x = torch.randn(1, 4, 4, 2, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        y = depthwise3x3(x, torch.randn(2, 1, 3, 3), torch.randn(2))
    assert y.dtype == dtype


@pytest.mark.parametrize("gelu", [False, True])
def test_gradients_of_depthwise(gelu):
    x = torch.randn(1, 4, 3, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda *args: depthwise3x3(*args, gelu), (x, weight, bias))
