"""`svit mm-test`, from a clone."""

from svit import processes
from svit.cli.mm_test import main

if __name__ == "__main__":
    processes.run(main)
