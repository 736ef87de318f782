"""`svit visualize`, from a clone."""

from svit import processes
from svit.cli.visualize import main

if __name__ == "__main__":
    processes.run(main)
