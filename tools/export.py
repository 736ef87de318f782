"""`svit export`, from a clone."""

from svit import processes
from svit.cli import command

main = command("export")

if __name__ == "__main__":
    processes.run(main)
