"""What a training tells: a progress bar, TensorBoard's events, log.csv."""

from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from svit.files import write_csv


class Log:
    """Tells where a training is; in silence where `main` is false, as in all processes but one.

    Args:
        folder: gets the events and log.csv.
        total: updates of the whole training.
        done: those done before.
    """

    def __init__(self, folder: Path, total: int, done: int, main: bool) -> None:
        self.folder, self.main = folder, main
        self.board = SummaryWriter(folder, purge_step=done) if main else None
        self.bar = tqdm(total=total, initial=done, disable=None if main else True)

    def update(self) -> None:
        """One update is done."""
        self.bar.update()

    def loss(self, total: int, epoch: int, loss: float, lr: float) -> None:
        """The loss and the largest rate of update number `total`."""
        self.bar.set_postfix(epoch=epoch, loss=f"{loss:.3f}")
        if self.board is not None:
            self.board.add_scalar("train/loss", loss, total)
            self.board.add_scalar("train/lr", lr, total)

    def epoch(self, rows: list[dict[str, Any]], best: float) -> None:
        """The newest of the epochs' rows."""
        if self.board is None:
            return
        row = rows[-1]
        for key in ("train_loss", "val_loss", "top1", "top5"):
            self.board.add_scalar(f"epoch/{key}", row[key], row["epoch"] + 1)
        write_csv(self.folder / "log.csv", rows)
        self.bar.write(
            f"epoch {row['epoch']}: train loss {row['train_loss']:.3f}, val loss {row['val_loss']:.3f}, "
            f"top-1 {row['top1']:.2f}, top-5 {row['top5']:.2f}, best {best:.2f}"
        )

    def write(self, text: str) -> None:
        if self.main:
            self.bar.write(text)

    def close(self) -> None:
        self.bar.close()
        if self.board is not None:
            self.board.close()
