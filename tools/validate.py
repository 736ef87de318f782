"""`svit validate`, from a clone."""

from svit import processes
from svit.cli.validate import main

if __name__ == "__main__":
    processes.run(main)
