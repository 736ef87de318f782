"""Tests of timm's tests/test_models.py that have timm's own architectures as fixed names, called with ours."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import timm
import torch

import svit  # noqa: F401  registers the architectures

# Function -> what it takes after the name.
NAMED = {
    "test_reset_classifier_keeps_pool": (),
    "test_head_hidden_size": ({},),
    "test_headless_checkpoint_reload": ({},),
    "test_model_init_weights_after_to_empty": ({},),
    "test_features_only_grad_checkpointing_backward": (),
    "test_features_only_feature_cls_class": (),
    "test_feature_getter_stage_ends_torchscript": (),
    "test_forward_intermediates_stop_early_final_norm": ({},),
    "test_forward_after_prune_intermediate_layers": (),
    "test_prune_intermediate_layers_params_used": (),
    "test_prune_intermediate_layers_last_feature": (True,),
    "test_prune_to_stem_feature": (),
}

# Functions that write the name, or arguments of their own architecture, into their body; what they take.
FIXED = {
    "test_gcvit_batch_consistency": (),
    "test_feature_hook_net_grad_checkpointing_order": (),
    "test_convit_dtype_change_after_forward": (),
    "test_pruned_features_torchscript": ("",),
    "test_model_forward_torchscript_with_features_fx": ("regnetx_002", 1),
    "test_resnet_pruned_grad_checkpointing": (),
    "test_swin_family_reinit_after_to_empty": ("", 64),
    "test_swin_family_dynamic_mask_trace": ("", 64),
}

# Those of timm's pyproject.toml, and pytest-timeout's: --strict-markers asks for them when the module is imported.
MARKERS = ["base", "cfg", "cfg_nonstd", "forward", "backward", "features", "torchscript", "fxforward", "fxbackward"]
MARKERS += ["timeout"]

NAMES = pytest.mark.parametrize("name", ["test_svit", "svit_nano", "svit_nano_32"])


@pytest.fixture(scope="module")
def timm_tests(timm_sdist: Path, pytestconfig: pytest.Config) -> Iterator[ModuleType]:
    for marker in MARKERS:
        pytestconfig.addinivalue_line("markers", f"{marker}: used by timm's tests")
    executor, mode = torch._C._jit_set_profiling_executor(True), torch._C._jit_set_profiling_mode(True)
    spec = importlib.util.spec_from_file_location("_timm_test_models", timm_sdist / "tests" / "test_models.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)  # changes TorchScript's executor
    yield module
    torch._C._jit_set_profiling_executor(executor)
    torch._C._jit_set_profiling_mode(mode)


@NAMES
@pytest.mark.parametrize("function", NAMED)
def test_named(timm_tests: ModuleType, function: str, name: str) -> None:
    getattr(timm_tests, function)(name, *NAMED[function])


@NAMES
@pytest.mark.parametrize("function", FIXED)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_fixed(timm_tests: ModuleType, function: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def create_ours(_, img_size=None, strict_img_size=None, feature_cfg=None, **kwargs):
        kwargs.update(feature_cfg or {})
        if function == "test_feature_hook_net_grad_checkpointing_order":
            kwargs["feature_cls"] = "hook"
        return timm.create_model(name, **kwargs)

    monkeypatch.setattr(timm_tests, "create_model", create_ours)
    monkeypatch.setattr(timm_tests, "_SWIN_KWARGS", {})
    getattr(timm_tests, function)(*FIXED[function])


@NAMES
def test_catavgmax(name: str) -> None:
    """Where timm's test_catavgmax_unsupported expects a refusal, our head takes the doubled width."""
    model = timm.create_model(name, global_pool="catavgmax").eval()
    assert model.head_hidden_size == 2 * model.num_features
    with torch.no_grad():
        features = model.forward_features(torch.randn(2, 3, 64, 64))
        pooled = model.forward_head(features, pre_logits=True)
        torch.testing.assert_close(pooled, torch.cat([features.mean((2, 3)), features.amax((2, 3))], 1))
        torch.testing.assert_close(model.forward_head(features), model.get_classifier()(pooled))
        model.reset_classifier(7, "catavgmax")
        assert model.forward_head(features).shape == (2, 7)
