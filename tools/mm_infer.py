"""`svit mm-infer`, from a clone."""

from svit import processes
from svit.cli.mm_infer import main

if __name__ == "__main__":
    processes.run(main)
