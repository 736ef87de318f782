"""`svit flops`, from a clone."""

from svit import processes
from svit.cli.flops import main

if __name__ == "__main__":
    processes.run(main)
