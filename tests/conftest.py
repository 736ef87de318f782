"""What each test file leaves behind is taken back."""

import os

import pytest

REFUSES_OBJECTS = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


@pytest.fixture(autouse=True, scope="module")
def torch_load_as_before():
    """The mm commands set a variable for all of their process; a test process runs other files after theirs."""
    before = os.environ.get(REFUSES_OBJECTS)
    yield
    os.environ.pop(REFUSES_OBJECTS, None)
    if before is not None:
        os.environ[REFUSES_OBJECTS] = before
