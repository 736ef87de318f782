"""`python -m svit`, also `torchrun -m svit`: the command `svit`."""

from svit.cli import run

if __name__ == "__main__":
    run()
