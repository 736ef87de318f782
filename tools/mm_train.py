"""`svit mm-train`, from a clone."""

from svit import processes
from svit.cli import command

main = command("mm-train")

if __name__ == "__main__":
    processes.run(main)
