import numpy as np
import pytest
import timm
import torch
from timm.layers import set_exportable, set_fused_attn, set_scriptable
from timm.models import save_for_hf
from timm.models._manipulate import group_parameters
from timm.optim import param_groups_weight_decay
from torch import nn

import goldens
import svit
from svit.layers import LayerScale
from svit.models import SViT
from svit.models.original import to_original

PUBLISHED = {"svit_small": 25_495_624, "svit_base": 51_691_288, "svit_large": 94_971_096}
MODELS = [*PUBLISHED, "svit_tiny", "svit_nano", "svit_nano_32", "test_svit"]

FORWARD = [  # variant, file, seed, shape
    ("small", "stvit_small_224", 0, (1, 3, 224, 224)),
    ("base", "stvit_base_224", 0, (1, 3, 224, 224)),
    ("large", "stvit_large_224", 0, (1, 3, 224, 224)),
    ("small", "stvit_small_200x264", 1, (2, 3, 200, 264)),
]


def build(variant: str, path: str = "fused") -> SViT:
    """Float64 with the stand-in weights, on one of the code paths."""
    set_fused_attn(path != "unfused")
    try:
        with set_exportable(path == "exportable"), set_scriptable(path == "scripted"):
            model = timm.create_model(f"svit_{variant}").double()
    finally:
        set_fused_attn(True)
    model.load_state_dict(goldens.state_dict(variant))
    return model.eval()


class TestGoldens:
    @pytest.mark.parametrize(("variant", "file", "seed", "shape"), FORWARD)
    def test_forward_and_stage_maps(self, variant, file, seed, shape):
        golden = goldens.load(file)
        model = build(variant)
        with torch.no_grad():
            x = goldens.image(seed, shape)
            maps = {"stem": model.stem(x)}
            features, stages = model.forward_intermediates(x)
            maps.update({f"stage{i}": x for i, x in enumerate(stages)})
            for name, x in maps.items():
                for key, value in goldens.statistics(x).items():
                    assert goldens.error(value, golden[f"{name}_{key}"]) < 1e-9, f"{name}_{key}"
            assert goldens.error(model.forward_head(features, pre_logits=True), golden["pre_logits"]) < 1e-9
            assert goldens.error(model.forward_head(features), golden["logits"]) < 1e-9

    @pytest.mark.parametrize("path", ["unfused", "exportable", "scripted", "folded", "checkpointed"])
    def test_every_path(self, path):
        _, file, seed, shape = FORWARD[3]
        model = build("small", path)
        if path == "scripted":
            model = torch.jit.script(model)
        elif path == "folded":
            model.fuse()
        elif path == "checkpointed":
            model.set_grad_checkpointing()
        with torch.no_grad():
            logits = model(goldens.image(seed, shape))
        assert goldens.error(logits, goldens.load(file)["logits"]) < 1e-9

    @pytest.mark.parametrize("path", ["fused", "unfused", "checkpointed"])
    @pytest.mark.parametrize(("mode", "seed", "batch"), [("eval", 7, 2), ("train", 8, 4)])
    def test_gradients(self, mode, seed, batch, path):
        golden = goldens.load(f"stvit_small_grads_{mode}_96")
        model = build("small", path).train(mode == "train")
        model.set_grad_checkpointing(path == "checkpointed")
        x = goldens.image(seed, (batch, 3, 96, 96)).requires_grad_()
        logits = model(x)
        (logits * goldens.image(100 + seed, tuple(logits.shape))).sum().backward()
        assert goldens.error(logits, golden["logits"]) < 1e-9
        assert goldens.error(x.grad[:, :, :16, :16], golden["grad_input_corner"]) < 1e-9
        assert goldens.error(x.grad.flatten(1).norm(dim=1), golden["grad_input_norm"]) < 1e-9
        norms = to_original({k: p.grad.norm() for k, p in model.named_parameters()})
        expected = {k.removeprefix("gn/"): v for k, v in golden.items() if k.startswith("gn/")}
        largest = max(expected.values())
        assert expected.keys() <= norms.keys()
        for name, value in expected.items():
            assert abs(norms[name].item() - value) <= 1e-9 * largest, name

    @pytest.mark.parametrize("inference", [True, False], ids=["oneDNN", "reference"])
    @pytest.mark.parametrize("folded", [False, True])
    def test_float32(self, inference, folded):
        _, file, seed, shape = FORWARD[3]
        model = build("small").float()
        if folded:
            model.fuse()
        with torch.inference_mode(inference):
            logits = model(goldens.image(seed, shape).float())
        assert goldens.error(logits, goldens.load(file)["logits"]) < 1e-4

    @pytest.mark.parametrize("inference", [True, False], ids=["oneDNN", "reference"])
    def test_bfloat16_autocast(self, inference):
        _, file, seed, shape = FORWARD[3]
        model = build("small").float()
        with torch.inference_mode(inference), torch.autocast("cpu", torch.bfloat16):
            logits = model(goldens.image(seed, shape).float())
        assert goldens.error(logits, goldens.load(file)["logits"]) < 0.05


class TestRegistration:
    def test_names(self):
        assert set(MODELS) <= set(timm.list_models(module="svit"))

    @pytest.mark.parametrize("name", ["small", "base", "large"])
    def test_tags(self, name):
        cfg, cfg_384 = (timm.get_pretrained_cfg(f"svit_{name}.{tag}") for tag in ("in1k", "in1k_384"))
        assert (cfg.input_size, cfg.crop_pct, cfg.interpolation) == ((3, 224, 224), 0.875, "bicubic")
        assert (cfg_384.input_size, cfg_384.crop_pct, cfg_384.interpolation) == ((3, 384, 384), 1.0, "bicubic")
        assert cfg.mean == (0.485, 0.456, 0.406)
        assert timm.create_model(f"svit_{name}.in1k_384", device="meta").default_cfg["input_size"] == (3, 384, 384)

    @pytest.mark.parametrize("size", ["small", "base", "large"])
    def test_old_names_warn(self, size):
        with pytest.warns(UserWarning, match=f"stvit_{size}.*svit_{size}"):
            model = timm.create_model(f"stvit_{size}", device="meta")
        assert sum(p.numel() for p in model.parameters()) == PUBLISHED[f"svit_{size}"]

    @pytest.mark.parametrize("name", PUBLISHED)
    def test_parameter_counts(self, name):
        assert sum(p.numel() for p in timm.create_model(name, device="meta").parameters()) == PUBLISHED[name]

    def test_nano_is_small(self):
        assert sum(p.numel() for p in timm.create_model("svit_nano", device="meta").parameters()) <= 3_000_000

    def test_published_drop_path_is_linear(self):
        model = timm.create_model("svit_small", device="meta", drop_path_rate=0.19)
        rates = [getattr(b.drop_path1, "drop_prob", 0.0) for stage in model.stages for b in stage.blocks]
        assert rates == pytest.approx([0.01 * i for i in range(20)], abs=1e-6)
        assert rates == [getattr(b.drop_path2, "drop_prob", 0.0) for stage in model.stages for b in stage.blocks]


class TestWeights:
    @pytest.mark.parametrize(
        ("name", "file"), [("svit_small", "stvit-small-224.pth"), ("svit_base.in1k_384", "stvit-base-384.pth")]
    )
    def test_pretrained_says_where_the_weights_are(self, name, file):
        with pytest.raises(RuntimeError) as error:
            timm.create_model(name, pretrained=True)
        message = str(error.value)
        assert "https://github.com/hhb072/STViT" in message
        assert f"svit convert {file}" in message
        assert "checkpoint_path=" in message
        assert message.endswith("use pretrained=False (encoder_weights=None in segmentation_models_pytorch).")
        assert len(message) < 450

    def test_pretrained_of_a_model_without_weights(self):
        with pytest.raises(
            RuntimeError,
            match=r"test_svit\.untrained: no pretrained weights exist; use pretrained=False \(encoder_weights=None",
        ):
            timm.create_model("test_svit", pretrained=True)

    @pytest.mark.parametrize("layout", ["ours", "theirs"])
    @pytest.mark.parametrize(("in_chans", "num_classes"), [(3, 1000), (1, 5)])
    def test_pretrained_from_a_file(self, tmp_path, layout, in_chans, num_classes):
        source = timm.create_model("test_svit").eval()
        state = source.state_dict() if layout == "ours" else {"model": to_original(source.state_dict())}
        torch.save(state, tmp_path / "weights.pth")
        model = timm.create_model(
            "test_svit",
            pretrained=True,
            pretrained_cfg_overlay=dict(file=str(tmp_path / "weights.pth")),
            in_chans=in_chans,
            num_classes=num_classes,
        ).eval()
        x = torch.randn(1, 3, 40, 40)
        gray = x.mean(1, keepdim=True)
        expected = source.forward_features(x if in_chans == 3 else gray.expand(-1, 3, -1, -1))
        torch.testing.assert_close(model.forward_features(x if in_chans == 3 else gray), expected, rtol=1e-4, atol=1e-4)

    def test_local_directory_round_trip(self, tmp_path):
        model = timm.create_model("test_svit", num_classes=7).eval()
        save_for_hf(model, tmp_path, model_config=dict(architecture="test_svit", num_classes=7))
        loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
        for key, value in model.state_dict().items():
            assert torch.equal(value, loaded.state_dict()[key]), key
        x = torch.randn(1, 3, 33, 47)
        assert torch.equal(model(x), loaded(x))

    def test_rounds_of_each_stage_come_back(self, tmp_path):
        model = timm.create_model("test_svit", num_classes=7, n_iter=(2, 3, 1, 1)).double().eval()
        config = dict(architecture="test_svit", num_classes=7, model_args=dict(n_iter=(2, 3, 1, 1)))
        save_for_hf(model, tmp_path, model_config=config)
        loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).double().eval()
        x = torch.randn(1, 3, 33, 47, dtype=torch.float64)
        torch.testing.assert_close(loaded(x), model(x), rtol=1e-9, atol=0)
        assert [stage.blocks[0].attn.n_iter for stage in loaded.stages] == [2, 3, 1, 1]

    @pytest.mark.parametrize("change", ["missing", "unexpected"])
    @pytest.mark.parametrize("layout", ["ours", "theirs"])
    def test_loading_is_strict(self, tmp_path, layout, change):
        state = timm.create_model("test_svit").state_dict()
        state = state if layout == "ours" else to_original(state)
        key = "stages.1.downsample.norm.weight" if layout == "ours" else "layers.0.downsample.proj.1.weight"
        if change == "missing":
            del state[key]
        else:
            state[key + "_more"] = torch.zeros(1)
        torch.save({"model": state}, tmp_path / "weights.pth")
        with pytest.raises(RuntimeError, match=rf"(?i){change} key.*stages\.1\.downsample\.norm\.weight"):
            timm.create_model("test_svit", checkpoint_path=str(tmp_path / "weights.pth"))

    def test_original_keys_load_inside_another_module(self):
        source = timm.create_model("test_svit")
        holder = nn.ModuleDict({"backbone": timm.create_model("test_svit")})
        holder.load_state_dict({f"backbone.{k}": v for k, v in to_original(source.state_dict()).items()})
        for key, value in source.state_dict().items():
            assert torch.equal(value, holder["backbone"].state_dict()[key])

    def test_start_values(self):
        model = timm.create_model("svit_nano")
        assert not model.head.fc.bias.any()
        assert model.head.fc.weight.std().item() == pytest.approx(0.02, rel=0.02)
        fc1 = model.stages[2].blocks[0].mlp.fc1
        bound = fc1.in_channels**-0.5  # nn.Conv2d's default for a 1x1 convolution
        assert fc1.weight.abs().max() <= bound
        assert fc1.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.03)
        norm = model.stages[0].blocks[0].norm1
        assert (norm.weight == 1).all()
        assert not norm.bias.any()
        scaled = timm.create_model("svit_base", layer_scale_init=(None, None, 1e-6, 0.5), depths=(1, 1, 1, 1))
        assert isinstance(scaled.stages[1].blocks[0].ls1, nn.Identity)
        assert (scaled.stages[2].blocks[0].ls2.gamma == 1e-6).all()
        assert (scaled.stages[3].blocks[0].ls1.gamma == 0.5).all()


def attend_by_definition(layer: nn.Module, x: torch.Tensor, n_iter: int) -> torch.Tensor:
    """Super token attention of a map (C, H, W), pixel by pixel; nine super tokens each, zeros outside the grid."""
    C, H, W = x.shape
    h, w = layer.cell
    hh, ww = -(-H // h), -(-W // w)
    x = nn.functional.pad(x, (0, ww * w - W, 0, hh * h - H))
    pixels = [(i, j) for i in range(hh * h) for j in range(ww * w)]
    near = {(i, j): [(i // h + a, j // w + b) for a in (-1, 0, 1) for b in (-1, 0, 1)] for i, j in pixels}
    outside = x.new_zeros(C)
    tokens = {(a, b): x[:, a * h : (a + 1) * h, b * w : (b + 1) * w].mean((1, 2)) for a in range(hh) for b in range(ww)}
    for _ in range(n_iter):
        q = {
            p: torch.stack([x[:, p[0], p[1]] @ tokens.get(c, outside) for c in near[p]]).mul(C**-0.5).softmax(0)
            for p in near
        }
        total, mass = dict.fromkeys(tokens, 0), dict.fromkeys(tokens, 0)
        for p in pixels:
            for weight, c in zip(q[p], near[p], strict=True):
                if c in tokens:
                    total[c], mass[c] = total[c] + weight * x[:, p[0], p[1]], mass[c] + weight
        tokens = {c: total[c] / (mass[c] + 1e-12) for c in tokens}
    s = layer.attend(torch.stack([tokens[c] for c in tokens], 1).reshape(1, C, hh, ww))[0]
    y = torch.zeros_like(x)
    for p in pixels:
        for weight, (a, b) in zip(q[p], near[p], strict=True):
            if 0 <= a < hh and 0 <= b < ww:
                y[:, p[0], p[1]] += weight * s[:, a, b]
    return y[:, :H, :W]


class TestArguments:
    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            (dict(stoken_size=(8, 4, 1)), r"stoken_size: expected one value for each of the 4 stages, got \(8, 4, 1\)"),
            (dict(stoken_size=8), r"stoken_size: expected one value for each of the 4 stages, got 8"),
            (dict(depths=(1, 1)), r"depths: expected one value for each of the 4 stages, got \(1, 1\)"),
            (dict(num_heads=(1, 1, 1, 1, 1)), r"num_heads: expected one value for each of the 4 stages"),
            (dict(layer_scale_init=(None, 1.0)), r"layer_scale_init: expected one value for each of the 4 stages"),
            (dict(num_heads=(3, 2, 3, 4)), r"num_heads: expected a divisor of dim 8, got 3"),
            (dict(stoken_size=(4, 2, 0, 1)), r"stoken_size: expected a positive int or a pair of them, got 0"),
            (dict(n_iter=0), r"n_iter: expected at least 1, got 0"),
            (dict(n_iter=(2, 0, 1, 1)), r"n_iter: expected at least 1, got 0"),
            (dict(n_iter=(2, 1.5, 1, 1)), r"n_iter: expected at least 1, got 1\.5"),
            (dict(n_iter=(2, 3)), r"n_iter: expected one value for each of the 4 stages, got \(2, 3\)"),
            (dict(n_iter=1.5), r"n_iter: expected one value for each of the 4 stages, got 1\.5"),
            (dict(n_iter=True), r"n_iter: expected at least 1, got True, which is no integer"),
            (dict(n_iter=(1, "1", 1, 1)), r"n_iter: expected at least 1, got '1', which is no integer"),
            (dict(n_iter=np.int64(0)), r"n_iter: expected at least 1, got"),
            (dict(stem_stride=3), r"stem_stride: expected one of \[1, 2, 4\], got 3"),
        ],
    )
    def test_bad_values(self, kwargs, message):
        with pytest.raises(ValueError, match=message):
            timm.create_model("test_svit", **kwargs)

    @pytest.mark.parametrize("scripted", [False, True])
    def test_integers_of_numpy(self, scripted):
        sizes = dict(
            n_iter=2, embed_dims=(8, 8, 8, 8), depths=(1, 2, 1, 1), num_heads=(1, 2, 2, 2),
            stoken_size=((4, 2), (2, 2), (1, 1), (1, 1)), stem_stride=4, head_width=16, in_chans=3, num_classes=5,
        )  # fmt: skip
        numpy = {k: tuple(np.array(v)) if isinstance(v, tuple) else np.int64(v) for k, v in sizes.items()}
        numpy["stoken_size"] = tuple(map(tuple, numpy["stoken_size"]))
        expected = timm.create_model("test_svit", **sizes).eval()
        model = timm.create_model("test_svit", scriptable=scripted, **numpy).eval()
        model.load_state_dict(expected.state_dict())
        x = torch.randn(1, 3, 37, 50)
        with torch.no_grad():
            torch.testing.assert_close((torch.jit.script(model) if scripted else model)(x), expected(x))

    def test_unknown_keyword(self):
        with pytest.raises(TypeError, match="stoken_sizes"):
            timm.create_model("test_svit", stoken_sizes=(8, 4, 1, 1))

    @pytest.mark.parametrize(
        "kwargs",
        [
            dict(stoken_size=((4, 2), [2, 3], 1, (1, 2))),
            dict(n_iter=2),
            dict(n_iter=[2, 3, 1, 1]),
            dict(layer_scale_init=1e-3),
            dict(mlp_ratio=2.5),
            dict(head_width=0),
            dict(stem_stride=1),
            dict(in_chans=5),
            dict(norm_layer="layernorm2d", act_layer="silu"),
            dict(differentiable_association=True),
        ],
        ids=lambda kwargs: "-".join(kwargs),
    )
    def test_options_build_run_and_train(self, kwargs):
        model = timm.create_model("test_svit", **kwargs)
        x = torch.randn(2, model.in_chans, 37, 50)
        logits = model(x)
        assert logits.shape == (2, 1000)
        logits.square().mean().backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())

    def test_without_final_conv_the_norm_acts_on_the_last_stage(self):
        model = timm.create_model("test_svit", head_width=0).eval()
        assert model.num_features == 32
        assert SViT(head_width=None, device="meta").num_features == 512
        x = torch.randn(1, 3, 64, 64)
        last = model.forward_intermediates(x, indices=1, intermediates_only=True)[0]
        expected = nn.functional.silu(model.final_conv.norm(last))
        torch.testing.assert_close(model.forward_features(x), expected)

    def test_dropout_places(self):
        model = timm.create_model("test_svit", proj_drop_rate=0.3, attn_drop_rate=0.2, drop_rate=0.1)
        rates = {name: m.p for name, m in model.named_modules() if isinstance(m, nn.Dropout)}
        block = "stages.0.blocks.0."
        expected = {"stem_drop": 0.3, f"{block}attn.attn_drop": 0.2, f"{block}attn.proj_drop": 0.3}
        expected |= {f"{block}mlp.drop1": 0.3, f"{block}mlp.drop2": 0.3, "head.drop": 0.1}
        assert {k: v for k, v in rates.items() if not k.startswith(("stages.1", "stages.2", "stages.3"))} == expected

    @pytest.mark.parametrize("n_iter", [(2, 3, 1, 1), [1, 2, 1, 1], (3, 1, 5, 7), 2], ids=str)
    def test_rounds_of_each_stage(self, n_iter):
        """Each stage's own number; one of single pixels has no rounds. And the state dict is the same."""
        model = timm.create_model("test_svit", n_iter=n_iter).double().eval()
        other = timm.create_model("test_svit").double().eval()
        other.load_state_dict(model.state_dict())
        x = torch.randn(1, 3, 45, 50, dtype=torch.float64)
        one_round = other(x)
        rounds = n_iter if not isinstance(n_iter, int) else [n_iter] * 4
        for stage, number in zip(other.stages[:2], rounds, strict=False):
            for block in stage.blocks:
                block.attn.n_iter = number
        assert torch.equal(model(x), other(x))
        assert not torch.allclose(model(x), one_round, rtol=1e-9, atol=0)

    def test_rounds_equal_their_definition(self):
        """Each layer's input, taken from the model, through the association pixel by pixel (the maths of the paper)."""
        model = timm.create_model("test_svit", n_iter=(2, 3, 1, 1)).double().eval()
        seen = {}
        for i in (0, 1):
            attn = model.stages[i].blocks[0].attn
            attn.register_forward_hook(lambda m, inputs, output, i=i: seen.update({i: (m, inputs[0][0], output[0])}))
        with torch.no_grad():
            model(torch.randn(1, 3, 24, 40, dtype=torch.float64))
            for i, n_iter in ((0, 2), (1, 3)):
                layer, x, y = seen[i]
                torch.testing.assert_close(y, attend_by_definition(layer, x, n_iter), rtol=1e-9, atol=1e-12)

    def test_differentiable_association_changes_gradients_only(self):
        model = timm.create_model("test_svit").double().eval()
        other = timm.create_model("test_svit", differentiable_association=True).double().eval()
        other.load_state_dict(model.state_dict())
        x = torch.randn(1, 3, 40, 40, dtype=torch.float64, requires_grad=True)
        assert torch.equal(model(x), other(x))
        grads = [torch.autograd.grad(m(x).square().sum(), x)[0] for m in (model, other)]
        assert not torch.allclose(*grads)


class TestInputs:
    @pytest.mark.parametrize("size", [(1, 1), (1, 70), (5, 3), (31, 33), (112, 137)])
    @pytest.mark.parametrize("grad", [True, False])
    def test_any_size(self, size, grad):
        model = timm.create_model("test_svit").eval()
        with torch.set_grad_enabled(grad):
            maps = model.forward_intermediates(torch.randn(1, 3, *size), intermediates_only=True)
        for i, x in enumerate(maps):
            stride = 4 * 2**i
            assert x.shape[2:] == (-(-size[0] // stride), -(-size[1] // stride))
            assert torch.isfinite(x).all()

    @pytest.mark.parametrize("shape", [(3, 32, 32), (1, 1, 3, 32, 32), (1, 3, 0, 32), (1, 3, 32, 0), (1, 4, 32, 32)])
    def test_bad_shapes(self, shape):
        with pytest.raises(ValueError, match=r"x: expected \(B, 3, H, W\) with H and W of at least 1, got \["):
            timm.create_model("test_svit")(torch.zeros(shape))

    @pytest.mark.parametrize("grad", [True, False])
    def test_empty_batch(self, grad):
        model = timm.create_model("test_svit").eval()
        with torch.set_grad_enabled(grad):
            assert model(torch.zeros(0, 3, 64, 64)).shape == (0, 1000)
            assert model.forward_features(torch.zeros(0, 3, 64, 64)).shape == (0, 64, 2, 2)

    def test_nan_passes_through(self):
        model = timm.create_model("test_svit").eval()
        x = torch.randn(2, 3, 64, 64)
        x[0, 0, 10, 10] = float("nan")
        with torch.no_grad():
            y = model(x)
        assert y[0].isnan().all()
        assert torch.isfinite(y[1]).all()

    def test_channels_last_throughout(self):
        model = timm.create_model("test_svit").eval()
        wrong = []

        def check(module, args, output):
            if isinstance(output, torch.Tensor) and output.dim() == 4 and output.stride(1) != 1:
                wrong.append(type(module).__name__)

        for module in model.modules():
            module.register_forward_hook(check)
        with torch.no_grad():
            model(torch.randn(2, 3, 72, 88))
        assert not wrong


class TestFeatures:
    @pytest.mark.parametrize("kwargs", [{}, dict(feature_cls="getter")])
    def test_maps_are_the_stages_before_downsampling(self, kwargs):
        torch.manual_seed(0)
        model = timm.create_model("test_svit").eval()
        torch.manual_seed(0)
        features = timm.create_model("test_svit", features_only=True, **kwargs).eval()
        assert features.feature_info.channels() == [8, 16, 24, 32]
        assert features.feature_info.reduction() == [4, 8, 16, 32]
        x = torch.randn(2, 3, 70, 90)
        expected = model.forward_intermediates(x, intermediates_only=True)
        maps = features(x)
        assert [m.shape for m in maps] == [(2, 8, 18, 23), (2, 16, 9, 12), (2, 24, 5, 6), (2, 32, 3, 3)]
        for actual, wanted in zip(maps, expected, strict=True):
            torch.testing.assert_close(actual, wanted)

    def test_out_indices(self):
        features = timm.create_model("test_svit", features_only=True, out_indices=(1, 3))
        assert [m.shape[1] for m in features(torch.randn(1, 3, 64, 64))] == [16, 32]
        assert timm.create_model("svit_nano_32", features_only=True).feature_info.reduction() == [2, 4, 8, 16]

    def test_bad_output_format(self):
        with pytest.raises(ValueError, match="output_fmt: expected 'NCHW', got 'NHWC'"):
            timm.create_model("test_svit").forward_intermediates(torch.zeros(1, 3, 32, 32), output_fmt="NHWC")

    def test_stop_early(self):
        model = timm.create_model("test_svit").eval()
        x = torch.randn(1, 3, 64, 64)
        last, maps = model.forward_intermediates(x, indices=[1], stop_early=True)
        assert torch.equal(last, maps[0])


class TestTraining:
    def test_groups_end_with_the_head(self):
        model = timm.create_model("test_svit", device="meta")
        for coarse in (False, True):
            groups = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
            last = max(groups.values())
            assert groups["head.fc.weight"] == last
            assert groups["stem.layers.0.weight"] == 0
            assert groups["stages.1.downsample.conv.weight"] < groups["stages.3.blocks.0.mlp.fc1.weight"] < last
        assert model.no_weight_decay() == set()

    def test_weight_decay_acts_on_layer_scale_but_not_on_vectors(self):
        model = timm.create_model("test_svit", device="meta")
        no_decay, decay = param_groups_weight_decay(model, 0.05)
        named = {id(p): name for name, p in model.named_parameters()}
        assert {"stages.2.blocks.0.ls1.gamma", "stages.0.blocks.0.mlp.fc1.weight"} <= {
            named[id(p)] for p in decay["params"]
        }
        assert all(
            named[id(p)].endswith(("bias", "norm1.weight", "norm.weight")) or p.ndim == 1 for p in no_decay["params"]
        )

    def test_reset_classifier(self):
        model = timm.create_model("test_svit", global_pool="max")
        x = torch.randn(2, 3, 64, 64)
        model.reset_classifier(5)
        assert model.head.global_pool.pool_type == "max"
        assert model(x).shape == (2, 5)
        model.reset_classifier(0, "")
        assert model(x).shape == (2, 64, 2, 2)
        assert model.num_classes == 0

    def test_fuse_folds_all_but_the_stem(self):
        model = timm.create_model("test_svit", layer_scale_init=0.3).eval()
        with torch.no_grad():
            for scale in (m for m in model.modules() if isinstance(m, LayerScale)):
                scale.gamma.uniform_(0.2, 2)
            for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
                norm.running_mean.uniform_(-0.2, 0.2)
                norm.running_var.uniform_(0.5, 1.5)
        x = torch.randn(2, 3, 64, 96)
        expected = model(x)
        fused = timm.utils.reparameterize_model(model)
        assert [n for n, m in fused.named_modules() if isinstance(m, nn.BatchNorm2d)] == [
            f"stem.layers.{i}" for i in (2, 5, 8, 11)
        ]
        assert not [n for n, m in fused.named_modules() if isinstance(m, LayerScale)]
        torch.testing.assert_close(fused(x), expected, rtol=1e-4, atol=1e-5)
        assert model.fuse() is model
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_version():
    assert svit.__version__.count(".") == 2
