"""`svit convert`, from a clone."""

from svit import processes
from svit.cli.convert import main

if __name__ == "__main__":
    processes.run(main)
