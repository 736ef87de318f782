"""`svit mm-test`, from a clone."""

from svit import processes
from svit.cli import command

main = command("mm-test")

if __name__ == "__main__":
    processes.run(main)
