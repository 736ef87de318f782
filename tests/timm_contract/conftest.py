import os
from pathlib import Path

import pytest
import timm

from helpers import missing


@pytest.fixture(scope="session")
def timm_sdist() -> Path:
    """The unpacked source distribution of the installed timm: unlike the wheel, it has timm's tests."""
    folder = os.environ.get("SVIT_TIMM_SDIST")
    if folder is None or not Path(folder, "tests", "test_models.py").is_file():
        missing(f"SVIT_TIMM_SDIST, the unpacked source distribution of timm {timm.__version__}")
    version = Path(folder, "timm", "version.py").read_text()
    assert f"'{timm.__version__}'" in version, f"{folder} is not the installed version {timm.__version__}: {version}"
    return Path(folder).resolve()
