"""Super Token Vision Transformer for timm. Importing the package registers its models.

It registers them when timm is imported, or at once where timm has been imported before. So the import of this package
alone takes no time, and `svit --help` answers at once.
"""

import importlib
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["models"]
__version__ = "0.2.0"


class _AfterTimm:
    """A finder of modules that lets the others find timm, and imports `svit.models` right after it."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "timm":
            return None
        others = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, others), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            sys.meta_path.remove(self)
            importlib.import_module("svit.models")

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]  # of this loader, which loads timm alone
        return spec


if "timm" in sys.modules:
    from . import models
else:
    sys.meta_path.insert(0, _AfterTimm())


def __getattr__(name: str) -> Any:
    if name == "models":
        return importlib.import_module("svit.models")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
