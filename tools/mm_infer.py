"""`svit mm-infer`, from a clone."""

from svit import processes
from svit.cli import command

main = command("mm-infer")

if __name__ == "__main__":
    processes.run(main)
