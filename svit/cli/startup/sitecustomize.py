"""Python imports this module when it starts, in each process below `svit exec`, which puts its folder first."""

import os
import sys

FOLDER = os.path.dirname(os.path.abspath(__file__))

# The module of this name that this one hides, if there is one, is to run as well.
sys.path[:] = [path for path in sys.path if os.path.abspath(path or os.curdir) != FOLDER]
this = sys.modules.pop("sitecustomize")
try:
    import sitecustomize  # type: ignore[import-not-found]  # noqa: F401
except ImportError:
    sys.modules["sitecustomize"] = this

try:
    import svit  # registers the models when timm is imported
except ImportError:  # svit runs from a checkout and is not installed
    sys.path.append(os.path.dirname(os.path.dirname(os.path.dirname(FOLDER))))
    import svit  # noqa: F401
