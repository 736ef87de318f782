"""A plugin of pytest for machines without Hypothesis: tests that draw their cases are skipped, the others run."""

import sys
from importlib.machinery import ModuleSpec
from unittest.mock import MagicMock

import pytest

hypothesis = MagicMock()
hypothesis.given = lambda *_, **__: pytest.mark.skip(reason="missing: hypothesis")
hypothesis.settings = lambda *_, **__: lambda test: test
hypothesis.__spec__ = ModuleSpec("hypothesis", None)
sys.modules |= {"hypothesis": hypothesis, "hypothesis.strategies": hypothesis.strategies}
