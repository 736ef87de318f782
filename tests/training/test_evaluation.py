import pytest
import torch
import torch.nn.functional as F
from torch import nn

from svit.training.evaluation import evaluate

CPU = torch.device("cpu")


class Lookup(nn.Module):
    """Logits that stand in the image itself, weighted so that a mirror image has others."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert not self.training
        return images[:, 0, 0] * torch.arange(1, images.shape[-1] + 1)


def data(num_classes: int, sizes: tuple[int, ...] = (7, 7, 3)) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(n, 3, 2, num_classes, generator=generator),
            torch.randint(num_classes, (n,), generator=generator),
        )
        for n in sizes
    ]


def expected(logits: torch.Tensor, classes: torch.Tensor) -> dict[str, float]:
    """The same computed the long way, an image at a time."""
    places = [sorted(row.tolist(), reverse=True).index(row[c]) for row, c in zip(logits, classes, strict=True)]
    return {
        "top1": 100 * sum(p == 0 for p in places) / len(places),
        "top5": 100 * sum(p < 5 for p in places) / len(places),
        "loss": F.cross_entropy(logits, classes).item(),
    }


@pytest.mark.parametrize("num_classes", [2, 5, 12])
@pytest.mark.parametrize("flip", [False, True])
def test_figures_are_those_of_a_direct_computation(num_classes, flip):
    batches = data(num_classes)
    images, classes = (torch.cat(parts) for parts in zip(*batches, strict=True))
    logits = images[:, 0, 0] * torch.arange(1, num_classes + 1)
    if flip:
        logits = (logits + images[:, 0, 0].flip(-1) * torch.arange(1, num_classes + 1)) / 2
    found = evaluate(Lookup(), batches, num_classes, CPU, flip=flip)
    for name, value in expected(logits, classes).items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-6), name
    assert found.count == 17
    assert found.class_counts == classes.bincount(minlength=num_classes).tolist()
    right = classes[logits.argmax(1) == classes]
    assert found.class_hits == right.bincount(minlength=num_classes).tolist()
    assert found.hits == len(right)
    assert 0 < found.hits < 17
    assert found.top5 == 100 or num_classes > 5


def test_counts_are_summed_over_processes():
    """Another process with the same batches: twice the images, the same accuracy."""
    alone, both = (evaluate(Lookup(), data(6), 6, CPU, reduce=reduce) for reduce in (torch.clone, lambda t: 2 * t))
    assert (both.count, both.hits, both.hits5) == (2 * alone.count, 2 * alone.hits, 2 * alone.hits5)
    assert (both.top1, both.top5) == (alone.top1, alone.top5)
    assert both.loss == pytest.approx(alone.loss)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_in_its_mode(training):
    model = Lookup().train(training)
    evaluate(model, data(3), 3, CPU)
    assert model.training is training
    with pytest.raises(ValueError):
        evaluate(model, data(3), 2, CPU)
    assert model.training is training


@pytest.mark.parametrize("wrong", [-1, 3])
def test_a_class_that_the_model_does_not_have(wrong):
    images, classes = data(3)[0]
    classes[4] = wrong
    with pytest.raises(ValueError, match=f"class: expected 0 to 2, got {wrong}"):
        evaluate(Lookup(), [(images, classes)], 3, CPU)


def test_no_images():
    with pytest.raises(ValueError, match="there is no image"):
        evaluate(Lookup(), [], 3, CPU)


def test_memory_format_and_autocast_reach_the_model():
    seen = []

    class Model(Lookup):
        def forward(self, images):
            seen.append((images.is_contiguous(memory_format=torch.channels_last), torch.is_autocast_enabled("cpu")))
            return super().forward(images)

    evaluate(Model(), data(4)[:1], 4, CPU, lambda: torch.autocast("cpu", torch.bfloat16), channels_last=True)
    evaluate(Model(), data(4)[:1], 4, CPU)
    assert seen == [(True, True), (False, False)]
