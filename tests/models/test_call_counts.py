"""How many Python calls inside svit an inference makes, and how deep they go: a count, not a time. It matters where
Python takes longer than the kernels, whose bodies are left out."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch

import svit
from svit.ops import _self_check, triton
from svit.ops.conv_ffn import onednn

PACKAGE = str(Path(svit.__file__).parent) + os.sep
BLOCK, MODEL, DEPTH = 70, 1000, 6


def calls(run: Callable[[], object]) -> list[str]:
    """Names of the functions of svit that `run` calls, in their order."""
    names = []

    def note(frame, event, _):
        code = frame.f_code
        if event == "call" and (code.co_filename.startswith(PACKAGE) or code is launch.__code__):
            names.append(code.co_name)

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return names


depths: list[int] = []


def launch(kernel, *args, **constants) -> None:
    """In the place of the function that launches kernels: how many of svit's functions led here, this included."""
    frame, depth = sys._getframe(1), 1
    while frame is not None:
        depth += frame.f_code.co_filename.startswith(PACKAGE)
        frame = frame.f_back
    depths.append(depth)


class Right(dict):
    """Verdicts of the self-check: all are right."""

    def get(self, key, default=None) -> str:
        return ""


@pytest.fixture(params=["no kernels", "kernels", "kernels alone"])
def way(request, monkeypatch) -> str:
    """Triton's kernels on a CPU, launched but not run, beside oneDNN or, as on a GPU, alone."""
    if request.param == "no kernels":
        monkeypatch.setattr(triton.BACKEND, "usable", lambda op, x: (triton.usable(op, x), (False, ""))[1])
        return request.param
    if not triton.available:
        pytest.skip("needs Triton")
    from svit.ops import _kernels

    monkeypatch.setattr(triton.BACKEND, "usable", lambda op, x: (triton.usable(op, x), (True, ""))[1])
    monkeypatch.setattr(_kernels, "launch", launch)
    monkeypatch.setattr(_self_check, "verdicts", Right())
    if request.param == "kernels alone":
        monkeypatch.setattr(onednn.BACKEND, "usable", lambda *_, **__: (False, "it is switched off"))
    return request.param


@torch.inference_mode()
def test_few_calls_and_a_short_way(way):
    model = timm.create_model("svit_small").eval()
    x = torch.randn(1, 3, 64, 64)
    block, maps = model.stages[0].blocks[0], model.stem(x)
    model(x)
    depths.clear()
    of_block = calls(lambda: block(maps))
    assert len(of_block) <= BLOCK
    assert all(depth <= DEPTH for depth in depths)
    assert len(calls(lambda: model(x))) <= MODEL
    assert of_block.count("launch") == {"no kernels": 0, "kernels": 5, "kernels alone": 6}[way]
