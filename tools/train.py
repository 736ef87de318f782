"""`svit train`, from a clone."""

from svit import processes
from svit.cli import command

main = command("train")

if __name__ == "__main__":
    processes.run(main)
