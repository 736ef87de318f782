import subprocess
import sys

import pytest
import torch
from torch._subclasses import FakeTensorMode

from svit.ops import triton


@pytest.mark.parametrize(
    ("op", "channels", "dtype", "reason"),
    [
        ("sample", 64, torch.float32, ""),
        ("sample", 1024, torch.bfloat16, ""),
        ("depthwise3x3", 2560, torch.float32, ""),
        ("bias_gelu_affine", 1280, torch.float32, ""),
        ("bias_gelu_affine", 12, torch.float32, "it needs a multiple of 8 channels, not 12"),
        ("sample", 12, torch.float16, "it needs a multiple of 8 channels, not 12"),
        ("depthwise3x3", 4, torch.float32, "it needs a multiple of 8 channels, not 4"),
        ("sample", 1032, torch.float16, "it serves up to 1024 channels in torch.float16, not 1032"),
        ("spread", 520, torch.float32, "it serves up to 512 channels in torch.float32, not 520"),
        ("sample", 64, torch.float64, "it computes in float32, float16, bfloat16, not in torch.float64"),
    ],
)
@pytest.mark.skipif(triton.INTERPRETED, reason="the interpreter has other limits")
def test_a_gpu_that_is_not_there(op, channels, dtype, reason):
    with FakeTensorMode():
        x = torch.empty(1, 8, 8, channels, device="cuda", dtype=dtype)
        assert triton.usable(op, x) == (not reason, reason)


def test_without_triton_everything_runs():
    program = """if True:
        import sys
        sys.modules["triton"] = None  # importing it fails
        import timm, torch, svit
        svit.ops.info()
        print(timm.create_model("test_svit").eval()(torch.zeros(1, 3, 32, 32)).shape)
        try:
            svit.ops.sample(torch.zeros(1, 8, 8, 8), (4, 4), backend="triton")
        except ValueError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    assert "cpu      float32  -> reference, not triton: no triton: " in done.stdout
    assert "torch.Size([1, 1000])" in done.stdout
    assert "backend: 'triton' cannot run sample here: no triton" in done.stdout
