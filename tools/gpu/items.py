"""What there is to do: items, in batches of one process each, in stages of batches that run beside each other."""

from dataclasses import dataclass, field

# Seconds until a process has imported PyTorch, timm and svit and has a context on the GPU.
START = 8.0


@dataclass
class Item:
    """One thing to find out. It may fail, crash or hang, and no other item suffers.

    Attributes:
        name: unique in its step.
        arguments: of the step's `run`; plain data, which goes to another process as JSON.
        estimate: seconds it is expected to take at most. Where there are fewer left it does not begin.
        limit: seconds after which it is ended.
    """

    name: str
    arguments: dict = field(default_factory=dict)
    estimate: float = 2.0
    limit: float = 60.0


@dataclass
class Batch:
    """Items that one process does one after another; `prefix` is a command that runs the process, a checker say."""

    items: list[Item]
    prefix: list[str] = field(default_factory=list)


@dataclass
class Stage:
    """Batches of which at most `parallel` run at a time. What is timed has the GPU to itself: parallel = 1."""

    batches: list[Batch]
    parallel: int = 1
    environment: dict[str, str] = field(default_factory=dict)


@dataclass
class Setup:
    """What every step needs to know.

    Attributes:
        rehearsal: tiny inputs on the CPU, kernels in Triton's interpreter.
        report: path of the report, without its suffix; logs stand beside it.
        cores: processes that may compile at a time.
    """

    rehearsal: bool
    report: str
    cores: int

    @property
    def device(self) -> str:
        return "cpu" if self.rehearsal else "cuda"


def chunks(items: list[Item], count: int) -> list[Batch]:
    """The items dealt out to at most `count` batches."""
    return [Batch(items[i::count]) for i in range(min(count, len(items)))]
