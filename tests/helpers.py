"""Shared by the tests."""

import os

import pytest


def missing(what: str) -> None:
    """Ends a test that needs `what`: skipped on a developer's machine, failed in CI, where nothing may be missing."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(f"missing: {what}")
