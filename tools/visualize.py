"""`svit visualize`, from a clone."""

from svit import processes
from svit.cli import command

main = command("visualize")

if __name__ == "__main__":
    processes.run(main)
