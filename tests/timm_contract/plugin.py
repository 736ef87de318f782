"""Points timm's own tests/test_models.py, unmodified, at our architectures; for a pytest run of its own, with -p."""

import pytest
import timm
import timm.models

import svit  # noqa: F401  registers the architectures

list_models = timm.list_models


def list_our_models(filter="", module="", **kwargs) -> list[str]:
    """timm's `list_models` of our architectures; `module` is ignored: timm's tests name only timm's own there."""
    return list_models(filter, "svit", **kwargs)


def list_our_pretrained(filter="", exclude_filters="") -> list[str]:
    return list_our_models(filter, exclude_filters=exclude_filters, pretrained=True)


# Replaced now: test_models.py takes them from timm on import, for its parametrize decorators.
for package in (timm, timm.models):
    package.list_models = list_our_models
    package.list_pretrained = list_our_pretrained


def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.hasplugin("timeout"):
        config.addinivalue_line("markers", "timeout(seconds): without effect where pytest-timeout is not in use")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out the tests of timm's own models: those with fixed names, and those without a name."""
    names = {*list_our_models(), *list_our_models(include_tags=True)}
    ours, theirs = [], []
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        (ours if params.get("model_name") in names else theirs).append(item)
    config.hook.pytest_deselected(items=theirs)
    items[:] = ours
