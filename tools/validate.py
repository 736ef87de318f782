"""`svit validate`, from a clone."""

from svit import processes
from svit.cli import command

main = command("validate")

if __name__ == "__main__":
    processes.run(main)
