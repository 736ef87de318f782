"""Points timm's own tests/test_models.py, unmodified, at our architectures. For a pytest run of its own (`-p plugin`)."""

import pytest
import timm
import timm.models

import svit  # noqa: F401  registers the architectures

list_models = timm.list_models


def list_our_models(filter="", module="", **kwargs) -> list[str]:
    """timm's `list_models` of our architectures; `module`, by which timm's tests pick families, cannot name ours."""
    return list_models(filter, "svit", **kwargs)


def list_our_pretrained(filter="", exclude_filters="") -> list[str]:
    return list_our_models(filter, exclude_filters=exclude_filters, pretrained=True, include_tags=True)


# The test module takes these names from timm when it is imported, for its parametrize decorators.
for package in (timm, timm.models):
    package.list_models = list_our_models
    package.list_pretrained = list_our_pretrained


def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.hasplugin("timeout"):
        config.addinivalue_line("markers", "timeout(seconds): enforced where pytest-timeout is installed")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Drops the tests of timm's own models: those with fixed names and those without a name."""
    names = {*list_our_models(), *list_our_models(include_tags=True)}
    ours = [item for item in items if getattr(item, "callspec", None) and item.callspec.params.get("model_name") in names]
    config.hook.pytest_deselected(items=[item for item in items if item not in ours])
    items[:] = ours
