"""`svit benchmark`, from a clone: with the models' upstream form."""

from svit import processes
from svit.cli import command
from svit.cli.benchmark import FORMS, Setting, build
from upstream_form import upstream_form

__all__ = ["Setting", "build"]  # for gpu_check
FORMS["upstream"] = upstream_form
main = command("benchmark")

if __name__ == "__main__":
    processes.run(main)
