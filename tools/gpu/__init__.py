"""The steps of tools/gpu_check.py, one module each, and what they share: items, their processes, the report.

A step module has

    DESCRIPTION: str                                     a sentence for the report
    stages(setup) -> list[Stage] | str                   what there is to do, or why there is nothing
    run(setup, **arguments) -> Iterator[dict]            does an item; yields what it finds, a row of a table at a time

gpu_check.py owns the report and decides what still fits into the time; `run` is called in a process of its own
(worker.py).
"""

from pathlib import Path

ROOT = Path(__file__).parents[2]
