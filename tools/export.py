"""`svit export`, from a clone."""

from svit import processes
from svit.cli.export import main

if __name__ == "__main__":
    processes.run(main)
