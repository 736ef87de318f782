"""`svit push`, from a clone."""

from svit import processes
from svit.cli.push import main

if __name__ == "__main__":
    processes.run(main)
