"""Two processes, each with half of the images, against one with all of them."""

import subprocess
import sys

import torch

from helpers import needs_mm

needs_mm()

STEP = """
import gc
import sys
import torch
import torch.distributed as dist
from mmengine.model import MMDistributedDataParallel
from mmengine.registry import MODELS
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample
from svit.adapters import load_config

torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
config = load_config("svit-nano_fpn_1xb8-1k_camvid-256x256", {
    "model.backbone.norm_eval": True,
    "model.backbone.drop_path_rate": 0.0,
    "model.decode_head.norm_cfg": None,
    "model.decode_head.dropout_ratio": 0.0,
    "model.data_preprocessor.size": (64, 64),
})
torch.manual_seed(0)
model = MODELS.build(config.model).train()
images = torch.randn(4, 3, 64, 64)
masks = torch.randint(0, 11, (4, 1, 64, 64))
rank, world = 0, 1
if dist.is_torchelastic_launched():
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    model = MMDistributedDataParallel(model, device_ids=None)
samples = [SegDataSample(gt_sem_seg=PixelData(data=mask), metainfo=dict(img_shape=(64, 64))) for mask in masks]
losses = model(images[rank::world], samples[rank::world], mode="loss")
losses["decode.loss_ce"].backward()
if rank == 0:
    torch.save({name.removeprefix("module."): p.grad for name, p in model.named_parameters()}, sys.argv[1])
if world > 1:
    del model, losses  # they hold the group, whose threads end when nothing does
    gc.collect()
    dist.destroy_process_group()
"""


def test_gradients(tmp_path):
    (tmp_path / "step.py").write_text(STEP)
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for name, launcher in (("one", []), ("two", two)):
        command = [sys.executable, *launcher, str(tmp_path / "step.py"), str(tmp_path / f"{name}.pth")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
    one, other = (torch.load(tmp_path / f"{name}.pth") for name in ("one", "two"))
    assert len(one) > 200
    assert list(one) == list(other)
    # float64: what remains is the order of the sums
    for name, gradient in one.items():
        torch.testing.assert_close(other[name], gradient, rtol=1e-6, atol=1e-12, msg=name)
    assert sum(bool(g.abs().max() > 1e-6) for g in one.values()) > 0.9 * len(one)


BUFFERS = """
import sys
from types import SimpleNamespace
import torch
import torch.distributed as dist
from mmengine.hooks import EMAHook
from mmengine.model import ExponentialMovingAverage
from svit.adapters.saving import BuffersHook

dist.init_process_group("gloo")
rank = dist.get_rank()
model = torch.nn.BatchNorm2d(3)
average = EMAHook()
average.ema_model = ExponentialMovingAverage(model, update_buffers=True)
model.running_mean += rank + 1
average.ema_model.module.running_mean += rank + 3
weight = model.weight.detach().clone()
BuffersHook().before_val_epoch(SimpleNamespace(model=model, hooks=[average]))
torch.save([model.running_mean, average.ema_model.module.running_mean], f"{sys.argv[1]}/{rank}.pth")
del model, average
dist.destroy_process_group()
"""


def test_all_processes_validate_what_is_saved(tmp_path):
    (tmp_path / "step.py").write_text(BUFFERS)
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [sys.executable, *two, str(tmp_path / "step.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(2):
        model, average = torch.load(tmp_path / f"{rank}.pth")
        assert (model.tolist(), average.tolist()) == ([1.0] * 3, [3.0] * 3)
