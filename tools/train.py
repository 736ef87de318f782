"""`svit train`, from a clone."""

from svit import processes
from svit.cli.train import main

if __name__ == "__main__":
    processes.run(main)
