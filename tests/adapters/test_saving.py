"""The hooks in small runs of mmengine: one weight that learns a number, and falls ill when told to."""

import math
import random
import shutil
import signal

import numpy as np
import pytest
import torch

from helpers import needs_mm

needs_mm()

from mmengine.config import Config  # noqa: E402
from mmengine.evaluator import BaseMetric  # noqa: E402
from mmengine.hooks import EMAHook, Hook  # noqa: E402
from mmengine.model import BaseModel  # noqa: E402
from mmengine.runner import Runner  # noqa: E402

from svit.adapters.checkpoints import allow_mmengine_checkpoints  # noqa: E402
from svit.adapters.saving import DivergedError, SeedHook, StopHook, Stopped, seed_epochs  # noqa: E402
from svit.errors import InputError  # noqa: E402


class Model(BaseModel):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2))
        self.register_buffer("count", torch.zeros(1))
        self.loss_factor = 1.0

    def forward(self, inputs, mode):
        if mode == "loss":
            return {"loss_a": ((self.weight - 1) ** 2).mean() * self.loss_factor, "accuracy": torch.tensor(math.nan)}
        return [{}]


class Score(BaseMetric):
    """The numbers of a list, one an evaluation."""

    def __init__(self, scores) -> None:
        super().__init__()
        self.scores = iter(scores)

    def process(self, data_batch, data_samples) -> None:
        self.results.append(0)

    def compute_metrics(self, results):
        return {"score": next(self.scores)}


class Ill(Hook):
    """Does something to the runner after that many iterations, before anything is saved."""

    priority = "LOW"

    def __init__(self, iteration, what) -> None:
        self.iteration, self.what = iteration, what

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        if runner.iter + 1 == self.iteration:
            self.what(runner)


def make(work_dir, *hooks, by_epoch=True, scores=(1.0, 2.0, 3.0, 4.0), total=4, **changes) -> Runner:
    """A run of two iterations an epoch, or of as many in all, each epoch or second iteration saved and evaluated."""
    checkpoint = dict(type="FiniteCheckpointHook", interval=1 if by_epoch else 2, by_epoch=by_epoch, max_keep_ckpts=1)
    loader = dict(batch_size=1, num_workers=0, dataset=[torch.zeros(1)] * 2)
    train = dict(by_epoch=True, max_epochs=total) if by_epoch else dict(by_epoch=False, max_iters=2 * total)
    arguments = dict(
        train_dataloader=dict(loader, sampler=dict(type="DefaultSampler" if by_epoch else "InfiniteSampler")),
        train_cfg=dict(train, val_interval=1 if by_epoch else 2),
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1, momentum=0.9)),
        val_dataloader=dict(loader, sampler=dict(type="DefaultSampler", shuffle=False)),
        val_cfg=dict(),
        val_evaluator=[Score(scores)],
        default_hooks=dict(checkpoint=dict(checkpoint, save_best="score", rule="greater")),
        custom_hooks=list(hooks),
        log_level="ERROR",
        experiment_name=f"{work_dir.name}-{make.count}",
    )
    make.count += 1
    return Runner(Model(), str(work_dir), **{**arguments, **changes})


make.count = 0


def weight(file) -> torch.Tensor:
    allow_mmengine_checkpoints()
    return torch.load(file, weights_only=True)["state_dict"]["weight"]


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.glob("*.pth"))


def poison_weight(runner) -> None:
    runner.model.weight.data[1] = math.nan


def poison_buffer(runner) -> None:
    runner.model.count += math.inf


def poison_moment(runner) -> None:
    runner.optim_wrapper.optimizer.state[runner.model.weight]["momentum_buffer"][0] = -math.inf


def poison_average(runner) -> None:
    (hook,) = [hook for hook in runner.hooks if isinstance(hook, EMAHook)]
    hook.ema_model.module.weight.data[0] = math.nan


@pytest.mark.parametrize("by_epoch", [True, False], ids=["epochs", "iterations"])
@pytest.mark.parametrize(
    ("poison", "message"),
    [
        (poison_weight, "not all numbers of the weights are finite"),
        (poison_buffer, "not all numbers of the weights are finite"),
        (poison_moment, "not all numbers of the optimizer's state are finite"),
        (poison_average, "not all numbers of the moving average are finite"),
    ],
)
def test_nothing_is_saved_over_good_checkpoints(tmp_path, by_epoch, poison, message):
    """Ill in the last iteration before a save, whose loss is still a number; one checkpoint alone is kept."""
    hooks = [Ill(4, poison)] + ([dict(type="EMAHook")] if poison is poison_average else [])
    with pytest.raises(DivergedError, match=message) as error:
        make(tmp_path, *hooks, by_epoch=by_epoch).train()
    unit = "epoch_1" if by_epoch else "iter_2"
    assert names(tmp_path) == [f"best_score_{unit}.pth", f"{unit}.pth"]
    assert weight(tmp_path / f"{unit}.pth").isfinite().all()
    assert (tmp_path / "last_checkpoint").read_text() == str(tmp_path / f"{unit}.pth")
    for part in (
        "iteration 4",
        "lower optim_wrapper.optimizer.lr",
        f"--resume {tmp_path / unit}.pth continues",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_loss_ends_the_run_at_once(tmp_path, factor):
    runner = make(tmp_path, Ill(3, lambda runner: setattr(runner.model, "loss_factor", factor)), by_epoch=False)
    with pytest.raises(DivergedError, match=r"the loss is (nan|inf) in epoch 1, iteration 4"):
        runner.train()
    assert names(tmp_path) == ["best_score_iter_2.pth", "iter_2.pth"]


def test_not_finite_is_never_the_best(tmp_path):
    make(tmp_path, scores=(math.nan, 2.0, math.inf, 1.0)).train()
    assert names(tmp_path) == ["best_score_epoch_2.pth", "epoch_4.pth"]


def test_weights_that_fall_ill_between_two_saves_are_not_the_best(tmp_path):
    """Checkpoints every fourth epoch, evaluations after each."""
    runner = make(tmp_path, Ill(4, poison_weight))
    (hook,) = [hook for hook in runner.hooks if type(hook).__name__ == "FiniteCheckpointHook"]
    hook.interval = 4
    with pytest.raises(DivergedError, match="not all numbers of the weights are finite"):
        runner.train()
    assert names(tmp_path) == ["best_score_epoch_1.pth"]


def test_a_copied_run_leaves_the_other_one_alone(tmp_path):
    """A checkpoint tells the whole path of the best one, which the next best one replaces."""
    a, b = tmp_path / "a", tmp_path / "b"
    make(a, total=2).train()
    shutil.copytree(a, b)
    before = {path.name: path.read_bytes() for path in a.glob("*.pth")}
    make(b, scores=(5.0, 6.0), load_from=str(b / "epoch_2.pth"), resume=True).train()
    assert names(b) == ["best_score_epoch_4.pth", "epoch_4.pth"]
    assert {path.name: path.read_bytes() for path in a.glob("*.pth")} == before


@pytest.mark.parametrize("by_epoch", [True, False], ids=["epochs", "iterations"])
def test_a_run_does_not_go_on_with_other_images(tmp_path, by_epoch):
    make(tmp_path, total=2, by_epoch=by_epoch).train()
    newest = str(tmp_path / ("epoch_2.pth" if by_epoch else "iter_4.pth"))
    sampler = dict(type="DefaultSampler" if by_epoch else "InfiniteSampler")
    more = dict(train_dataloader=dict(batch_size=1, num_workers=0, dataset=[torch.zeros(1)] * 3, sampler=sampler))
    with pytest.raises(InputError, match=f"resume: {newest} is of another training; train: 2 images, now 3"):
        make(tmp_path, by_epoch=by_epoch, load_from=newest, resume=True, **more).train()
    make(tmp_path / "tuned", by_epoch=by_epoch, load_from=newest, **more).train()  # only its weights
    assert weight(newest) is not None


def test_a_run_that_goes_on_elsewhere_takes_its_best_along(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    make(a, total=2).train()
    make(b, scores=(0.5, 0.6), load_from=str(a / "epoch_2.pth"), resume=True).train()
    assert names(b) == ["best_score_epoch_2.pth", "epoch_4.pth"]
    assert (b / "best_score_epoch_2.pth").read_bytes() == (a / "best_score_epoch_2.pth").read_bytes()
    assert names(a) == ["best_score_epoch_2.pth", "epoch_2.pth"]
    a.rename(tmp_path / "c")  # and where the best one is nowhere, the run goes on without
    make(tmp_path / "d", scores=(0.5, 7.0), load_from=str(tmp_path / "c/epoch_2.pth"), resume=True).train()
    assert names(tmp_path / "d") == ["best_score_epoch_4.pth", "epoch_4.pth"]


@pytest.mark.parametrize("by_epoch", [True, False], ids=["epochs", "iterations"])
def test_a_signal_ends_the_run_after_its_iteration(tmp_path, by_epoch):
    """What can be gone on from is saved, here in the fifth iteration, or, by epochs, was saved after the fourth."""
    signals = []
    runner = make(tmp_path, Ill(5, lambda runner: signals.append(signal.SIGINT)), StopHook(signals), by_epoch=by_epoch)
    with pytest.raises(Stopped) as stopped:
        runner.train()
    assert stopped.value.signal == signal.SIGINT
    newest = "epoch_2" if by_epoch else "iter_5"
    best = "epoch_2" if by_epoch else "iter_4"
    assert names(tmp_path) == [f"best_score_{best}.pth", f"{newest}.pth"]
    allow_mmengine_checkpoints()
    assert torch.load(tmp_path / f"{newest}.pth", weights_only=True)["meta"]["iter"] == (4 if by_epoch else 5)
    seen = []
    again = make(
        tmp_path,
        Ill(8, lambda runner: seen.append(runner.iter)),
        by_epoch=by_epoch,
        load_from=str(tmp_path / f"{newest}.pth"),
        resume=True,
    )
    again.train()
    whole = make(tmp_path / "whole", by_epoch=by_epoch)
    whole.train()
    assert torch.equal(again.model.weight, whole.model.weight)
    assert seen == [7]


def test_a_signal_in_an_evaluation(tmp_path):
    signals = []

    class Signal(Hook):
        def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
            signals.append(signal.SIGTERM)

    with pytest.raises(Stopped, match="SIGTERM"):
        make(tmp_path, Signal(), StopHook(signals)).train()
    assert names(tmp_path) == ["epoch_1.pth"]


def test_what_diverges_when_a_signal_comes_is_not_saved(tmp_path):
    signals = []

    def both(runner) -> None:
        poison_weight(runner)
        signals.append(signal.SIGINT)

    with pytest.raises(DivergedError):
        make(tmp_path, Ill(3, both), StopHook(signals), by_epoch=False).train()
    assert names(tmp_path) == ["best_score_iter_2.pth", "iter_2.pth"]


class Draws(Hook):
    """Notes the order of the images in each epoch, and a random number of each kind in each iteration."""

    def __init__(self) -> None:
        self.found = []

    def before_train_epoch(self, runner) -> None:
        self.found.append(list(runner.train_dataloader.sampler))

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        self.found.append((random.random(), np.random.rand(), torch.rand(()).item()))


def test_a_resumed_run_draws_what_the_other_one_drew(tmp_path):
    """Without a seed in the config: that of the checkpoint counts."""

    def draws(folder, **changes) -> list:
        found, images = Draws(), dict(batch_size=1, num_workers=0, dataset=[torch.zeros(1)] * 6)
        loader = dict(images, sampler=dict(type="DefaultSampler"))
        keep = dict(checkpoint=dict(type="CheckpointHook", interval=1))
        arguments = dict(train_dataloader=loader, default_hooks=keep, randomness=dict(seed=None), **changes)
        make(folder, found, SeedHook(), **arguments).train()
        return found.found

    whole = draws(tmp_path / "whole")
    resumed = draws(tmp_path / "resumed", load_from=str(tmp_path / "whole" / "epoch_2.pth"), resume=True)
    assert len(whole) == 4 * 7
    assert resumed == whole[2 * 7 :]
    assert len({drawn for drawn in whole if isinstance(drawn, tuple)}) == 4 * 6  # no epoch repeats another
    assert draws(tmp_path / "other") != whole  # another run, another seed


def test_seed_epochs():
    config = Config(dict(train_dataloader=dict(num_workers=1, persistent_workers=True), train_cfg=dict(max_epochs=2)))
    assert seed_epochs(config)
    assert config.train_dataloader == dict(
        num_workers=1, persistent_workers=False, worker_init_fn=dict(type="keep_seeds")
    )
    config = Config(dict(train_dataloader=dict(persistent_workers=True), train_cfg=dict(max_iters=2)))
    assert not seed_epochs(config)
    assert config.train_dataloader == dict(persistent_workers=True)
