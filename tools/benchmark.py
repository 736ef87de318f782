"""`svit benchmark`, from a clone: with the models' upstream form."""

from svit import processes
from svit.cli.benchmark import FORMS, Setting, build, main
from upstream_form import upstream_form

__all__ = ["Setting", "build"]  # for gpu_check
FORMS["upstream"] = upstream_form

if __name__ == "__main__":
    processes.run(main)
