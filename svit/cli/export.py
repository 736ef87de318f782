"""Exports a model of timm to ONNX, torch.export or AOTInductor, and checks the file against PyTorch.

    svit export svit_small --checkpoint svit_small.safetensors
    svit export svit_small --checkpoint svit_small.safetensors --img-size 384 --static --out svit_384.onnx
    svit export svit_small --checkpoint svit_small.safetensors --format aoti
    svit export svit_small --checkpoint svit_small.safetensors --int8 photos/
    svit export svit_nano.photos20 --outputs super-tokens

The file takes any batch, height and width that the model takes, unless --static. With it come the names of the classes
and the preprocessing. It is loaded again and run at the exported and two other sizes; the differences are printed, and
one that is too large is an error. ONNX needs the extra `export`, AOTInductor a C++ compiler.

`--int8` then turns the ONNX file's convolutions and linear layers into int8, with scales for the values of up to 200
images of that folder. It prints on how many of them the model still finds the same class.

`--outputs super-tokens` adds to the ONNX file, for each stage with super tokens, the association and the attention of
its last block: stage1_association (batch, 9, height, width of the stage's map, padded to whole cells), each pixel's
shares in the 3 x 3 super tokens around its cell, and stage1_attention (batch, heads, N, N), how much each of the N
super tokens attends to each of them. Both are float32.
"""

import argparse
import importlib
import json
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.data import resolve_model_data_config
from timm.utils.model import reparameterize_model
from torch import nn
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler
from torch.export import Dim, ExportedProgram

from svit.checkpoints import class_names, pretrained_cfg, size_argument
from svit.errors import InputError
from svit.files import atomic_write, check_utf8
from svit.folders import find_images
from svit.images import read_image
from svit.layers import SuperTokenAttention
from svit.models import SViT
from svit.ops.super_token import graph
from svit.visualize import WatchedLayer, batch_attention_weights, last_of_stages

from . import install
from .base import (
    add_img_size,
    add_model_arguments,
    at_least,
    check_folder,
    first_line,
    height_and_width,
    make_model,
    make_parser,
    named,
    show,
    warn_of_random_weights,
)

AXES = {0: "batch", 2: "height", 3: "width"}
# Largest difference from PyTorch, relative to the largest output. Another order of summation gives about 1e-6.
TOLERANCE = 1e-3

# Images that set the scales of int8, as many as quantizers usually take; of more, these evenly spaced.
CALIBRATION_IMAGES = 200
# The least share of them in which int8 must find the class that float32 finds.
AGREEMENT = 0.8

# Returns the logits; with --outputs super-tokens a tuple of all outputs.
Run = Callable[[torch.Tensor], Any]


def parser() -> argparse.ArgumentParser:
    parser = make_parser("export", __doc__)
    add_model_arguments(parser)
    parser.add_argument("--format", choices=FORMATS, default="onnx", help="default: onnx")
    parser.add_argument("--out", metavar="FILE", type=Path, help="default: MODEL.onnx or MODEL.pt2")
    add_img_size(parser)
    parser.add_argument(
        "--batch-size", metavar="N", type=at_least(1), default=1, help="default: 1; matters for --static"
    )
    parser.add_argument("--static", action="store_true", help="this batch and image size alone")
    parser.add_argument(
        "--int8", metavar="FOLDER", type=named, help="ONNX in int8, calibrated with the images of this folder"
    )
    parser.add_argument(
        "--outputs",
        choices=("logits", "super-tokens"),
        default="logits",
        help="super-tokens: ONNX with the association and the attention too; default: logits",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    command_line = parser()
    args = command_line.parse_args(argv)
    form = FORMATS[args.format]
    if args.int8 and args.format != "onnx":
        command_line.error(f"--int8: writes ONNX, got --format {args.format}")
    if args.outputs == "super-tokens" and args.format != "onnx":
        command_line.error(f"--outputs super-tokens: writes ONNX, got --format {args.format}")
    if args.outputs == "super-tokens" and args.int8:
        command_line.error("--outputs super-tokens: writes float32, got --int8 too")
    ending = ("_int8" if args.int8 else "") + form.suffix
    out = args.out or Path(re.split("[/:]", args.model.rstrip("/"))[-1] + ending)
    check_target(out, form.suffix)
    form.check()
    images = calibration_images(args.int8) if args.int8 else []
    with warnings.catch_warnings():
        # Of PyTorch's exporters about themselves.
        warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)
        warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
        export(args, form, out, images)
    return 0


def check_target(out: Path, suffix: str) -> None:
    """Before the work, not after."""
    if out.suffix != suffix:
        raise InputError(f"{out}: expected a name that ends in {suffix}")
    check_utf8(str(out), str(out.absolute()))  # which exporters need
    check_folder(out)
    if out.is_dir():
        raise InputError(f"{out}: is a folder")


def calibration_images(folder: Path) -> list[Path]:
    """Up to `CALIBRATION_IMAGES` images of a folder, from all parts of it.

    Raises:
        InputError: there is no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise InputError(f"--int8: expected a folder of images, got {folder}")
    try:
        found = find_images([folder])
    except InputError as error:
        raise InputError(f"--int8: {error}") from error
    count = min(len(found), CALIBRATION_IMAGES)
    return [found[i * len(found) // count] for i in range(count)]


def export(args: argparse.Namespace, form: "Format", out: Path, images: list[Path]) -> None:
    """Writes `out`, after a check of what was written, and prints how far it is from PyTorch.

    Args:
        images: calibrate the file in int8; none leave it in float32.

    Raises:
        InputError: the model cannot be made or exported, the file cannot be written or computes something else.
    """
    model, in_chans, size = build(args)
    fixed_size = pretrained_cfg(model).get("fixed_input_size")
    # torch.export takes a size of 1 for a fixed one.
    shape = (args.batch_size if args.static else max(args.batch_size, 2), in_chans, *size)
    batches = read_batches(images, model, shape, args.batch_size if args.static else 1)
    about = metadata(model, shape)
    if args.outputs == "super-tokens":
        model = WithSuperTokens(args.model, model)
        about["cells"] = json.dumps(model.cells)
        form = form._replace(write=partial(write_onnx, outputs=model.names))
    try:
        with atomic_write(out) as part:
            with in_words(args.model):
                program = trace(model, shape, () if args.static else (0,) if fixed_size else AXES)
                form.write(program, part, about)
                run = form.load(part)
            for other in check_shapes(program, shape):
                with in_words(args.model):
                    compare(model, run, other)
            if images:
                with in_words(args.model):
                    quantize(part, batches)
                    compare_classes(run, form.load(part), batches, len(images))
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error})") from error
    print(f"wrote {out} ({out.stat().st_size / 1e6:.1f} MB): {args.model}, image {signature(program)}")


def build(args: argparse.Namespace) -> tuple[nn.Module, int, tuple[int, int]]:
    """The model, of plain operations only, the channels and the size of its images."""
    warn_of_random_weights(args)
    size = height_and_width(args.img_size) if args.img_size else None
    model = make_model(args, exportable=True, **size_argument(args.model, size))
    in_chans, *own_size = resolve_model_data_config(model)["input_size"]
    return fused(model), in_chans, size or height_and_width(own_size)


def fused(model: nn.Module) -> nn.Module:
    """The model with what folds exactly folded, as timm does for inference; as it is where it refuses."""
    try:
        # timm folds child after child. An SViT refuses before it changes anything.
        return model.fuse() if isinstance(model, SViT) else reparameterize_model(model, inplace=True)
    except ValueError as error:
        print(f"warning: norms and layer scales are not folded: {first_line(error)}", file=sys.stderr)
        return model


class WithSuperTokens(nn.Module):
    """A model that returns the association and the attention of its super tokens beside the logits.

    They are those of the last layer of each stage, as `svit.visualize` draws them: the association (B, 9, H, W), H and
    W the size of the stage's map padded to whole cells, and the attention (B, heads, N, N) from each of the N super
    tokens, row by row of the grid, to all of them.

    Args:
        name: of the model, for the message.
        model: the model.

    Attributes:
        names: of the outputs: 'logits', 'stage1_association', 'stage1_attention' and so on.
        cells: height and width of the cells in pixels of the map, by the name of the stage, such as 'stage1'.

    Raises:
        InputError: the model has no super tokens.
    """

    def __init__(self, name: str, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        found = [
            WatchedLayer(path, layer, torch.empty(0))
            for path, layer in model.named_modules()
            if isinstance(layer, SuperTokenAttention)
        ]
        stages = {title.replace(" ", ""): watched for title, watched in last_of_stages(found).items()}
        self.watched = {stage: watched for stage, watched in stages.items() if watched.samples}
        if not self.watched:
            raise InputError(f"--outputs super-tokens: expected a model with super tokens, got {name}")
        self.names = ["logits", *(f"{stage}_{what}" for stage in self.watched for what in ("association", "attention"))]
        self.cells = {stage: watched.layer.cell for stage, watched in self.watched.items()}

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        maps: dict[nn.Module, torch.Tensor] = {}

        def keep(layer: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            maps[layer] = args[0]

        with ExitStack() as stack:
            for watched in self.watched.values():
                stack.callback(watched.layer.register_forward_pre_hook(keep).remove)
            outputs = [self.model(image)]
        for watched in self.watched.values():
            layer = watched.layer
            h, w = layer.cell
            # As in the layer itself, so that runtimes compute it once for both.
            tokens, q = graph.sample(maps[layer].permute(0, 2, 3, 1), layer.cell, layer.n_iter)
            padded = (q.shape[1] * h, q.shape[2] * w)
            outputs += [
                graph.from_cells(q, layer.cell, padded),
                batch_attention_weights(layer, tokens.permute(0, 3, 1, 2)),
            ]
        return tuple(outputs)


@contextmanager
def in_words(name: str) -> Iterator[None]:
    """Turns whatever the exporters raise, which is nearly anything, into an InputError; OSErrors pass."""
    try:
        yield
    except (InputError, OSError):
        raise
    except Exception as error:
        raise InputError(f"{name}: cannot be exported: {type(error).__name__}: {first_line(error)}") from error


def trace(model: nn.Module, shape: tuple[int, ...], axes: Iterable[int]) -> ExportedProgram:
    """The program of a model for images of `shape`, of any size along `axes`, as far as the model allows."""
    shapes = (dict.fromkeys(axes, Dim.AUTO),)
    return torch.export.export(model, (torch.zeros(shape),), dynamic_shapes=shapes)


def image(program: ExportedProgram) -> torch.Tensor:
    """The program's input: a tensor without values whose sizes are numbers or symbols."""
    (name,) = program.graph_signature.user_inputs
    return next(node.meta["val"] for node in program.graph.nodes if node.name == name)


def dynamic_axes(program: ExportedProgram) -> dict[int, str]:
    """The axes of the image that may have any size, with their names."""
    return {axis: name for axis, name in AXES.items() if not isinstance(image(program).shape[axis], int)}


def signature(program: ExportedProgram) -> str:
    """The image's shape in words, and the limits of its sizes where these are more than a pixel or two."""
    shape, axes, limits = image(program).shape, dynamic_axes(program), []
    for axis, name in axes.items():
        allowed = program.range_constraints[shape[axis].node.expr]  # type: ignore[attr-defined]  # a symbol
        if allowed.lower > 2:
            limits.append(f"{name} from {allowed.lower}")
        if allowed.upper < sys.maxsize:
            limits.append(f"{name} to {allowed.upper}")
    words = " x ".join(axes.get(axis, str(size)) for axis, size in enumerate(shape))
    return f"{words} ({', '.join(limits)})" if limits else words


def metadata(model: nn.Module, shape: tuple[int, ...]) -> dict[str, str]:
    """What a user of the file needs to know, each value as JSON: the classes and timm's preprocessing."""
    values = {**resolve_model_data_config(model), "input_size": shape[1:]}
    values.update(architecture=pretrained_cfg(model)["architecture"], class_names=class_names(model))
    return {key: json.dumps(value) for key, value in values.items()}


def check_onnx() -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(package)
        except ModuleNotFoundError as error:
            raise InputError(f"--format onnx: needs {error.name}; {install('export')}") from error


def write_onnx(
    program: ExportedProgram, path: Path, metadata: dict[str, str], outputs: Sequence[str] = ("logits",)
) -> None:
    names: dict[str, Any] = dict(
        input_names=["image"], output_names=list(outputs), dynamic_shapes=(dynamic_axes(program),)
    )
    example, _ = program.example_inputs  # goes with the names of the axes, and no further
    onnx_program = torch.onnx.export(program, example, dynamo=True, verbose=False, **names)
    assert onnx_program is not None
    fold_weights(onnx_program.model)
    onnx_program.model.metadata_props.update(metadata)
    onnx_program.save(path)
    drop_shapes(path)
    if len(list(path.parent.iterdir())) > 1:
        raise InputError("the weights do not fit in one ONNX file; --format torch takes them")


def fold_weights(model: Any) -> None:
    """Computes once, in place, what depends on weights alone, whatever its size."""
    from onnxscript import optimizer

    optimizer.optimize(model, input_size_limit=sys.maxsize, output_size_limit=sys.maxsize)


def drop_shapes(path: Path) -> None:
    """Takes the shapes of values inside the graph out of a file.

    The exporter leaves some stale, such as that of a transposed weight: quantizers, which infer shapes, refuse them.
    """
    import onnx

    model = onnx.load(path, load_external_data=False)
    del model.graph.value_info[:]
    onnx.save(model, path)


def load_onnx(path: Path) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(x: torch.Tensor) -> Any:
        found = tuple(torch.from_numpy(output) for output in session.run(None, {"image": x.numpy()}))
        return found if len(found) > 1 else found[0]

    return run


def read_batches(images: list[Path], model: nn.Module, shape: tuple[int, ...], batch_size: int) -> list[torch.Tensor]:
    """The images as the model sees them, in batches of one size; the first ones fill up the last batch."""
    if not images:
        return []
    from svit.training.data import eval_transform, image_mode  # takes a second, and only int8 needs it

    preprocessing = {**resolve_model_data_config(model), "input_size": shape[1:]}
    transform, mode = eval_transform(preprocessing), image_mode(preprocessing)
    tensors = [transform(read_image(image, mode)) for image in images]
    missing = -len(tensors) % batch_size
    tensors += [tensors[i % len(images)] for i in range(missing)]
    return list(torch.stack(tensors).split(batch_size))


def quantize(path: Path, batches: list[torch.Tensor]) -> None:
    """Turns an ONNX file into int8, in place: weights by channel, values by the range they have in `batches`.

    Quantized are dense convolutions and products with weights. Products of two maps, as in attention and the
    association of super tokens, stay in float, and so do depthwise convolutions: of x + conv(x) folded into one, the
    weight of the middle is much larger than its neighbours. With them the outputs of svit_nano_32.cifar10 are three
    times as far from float32, and slower on a processor with VNNI.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Batches(CalibrationDataReader):  # type: ignore[misc]  # which has no types
        def __init__(self) -> None:
            self.rest = iter(batches)

        def get_next(self) -> dict | None:
            batch = next(self.rest, None)
            return None if batch is None else {"image": batch.numpy()}

    model = onnx.load(path)
    grouped = [node.name for node in model.graph.node if any(a.name == "group" and a.i > 1 for a in node.attribute)]
    logging.disable(logging.WARNING)  # it advises a preparation that this file does not need
    try:
        quantize_static(
            path,
            path,
            Batches(),
            op_types_to_quantize=["Conv", "Gemm", "MatMul"],
            nodes_to_exclude=grouped,
            per_channel=True,
            extra_options={"MatMulConstBOnly": True},
        )
    finally:
        logging.disable(logging.NOTSET)
    quantized = onnx.load(path)
    del quantized.metadata_props[:]  # has the quantizer's own entry too, which is not JSON
    quantized.metadata_props.extend(model.metadata_props)
    onnx.save(quantized, path)


def write_torch(program: ExportedProgram, path: Path, metadata: dict[str, str]) -> None:
    torch.export.save(program, path, extra_files=metadata)


def load_torch(path: Path) -> Run:
    return torch.export.load(path).module()


def check_compiler() -> None:
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise InputError("--format aoti: needs a C++ compiler, such as g++, or one that CXX names") from error


def write_aoti(program: ExportedProgram, path: Path, metadata: dict[str, str]) -> None:
    configs = {"aot_inductor.metadata": metadata}
    torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=configs)


def load_aoti(path: Path) -> Run:
    return torch._inductor.aoti_load_package(str(path))


class Format(NamedTuple):
    """What is needed, whether it is there, how a file is written, and how it is run again."""

    suffix: str
    check: Callable[[], None]
    write: Callable[[ExportedProgram, Path, dict[str, str]], None]
    load: Callable[[Path], Run]


FORMATS = {
    "onnx": Format(".onnx", check_onnx, write_onnx, load_onnx),
    "torch": Format(".pt2", lambda: None, write_torch, load_torch),
    "aoti": Format(".pt2", check_compiler, write_aoti, load_aoti),
}


def check_shapes(program: ExportedProgram, shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """`shape` and two others, as far as the program takes others; which ones it refuses is said on stderr."""
    axes = dynamic_axes(program)
    batch, channels, height, width = shape
    yield shape
    # The second is odd: padding, and rounding in the strides.
    for wanted in ((1, channels, height + 32, width + 64), (batch + 1, channels, height + 7, width + 21)):
        other = tuple(new if axis in axes else old for axis, (old, new) in enumerate(zip(shape, wanted, strict=True)))
        if other == shape:
            return
        try:
            program.module()(torch.zeros(other))
        except (AssertionError, RuntimeError) as error:  # a file of another format computes something, but what?
            print(f"warning: images of {show(other)} do not work: {first_line(error)}", file=sys.stderr)
        else:
            yield other


def compare(model: nn.Module, run: Run, shape: tuple[int, ...]) -> None:
    """Prints how far each output of `run` is from the model's on a random image of `shape`.

    Raises:
        InputError: too far.
    """
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    names = model.names if isinstance(model, WithSuperTokens) else [""]
    with torch.no_grad():
        found = zip(names, outputs(model(x)), outputs(run(x)), strict=True)
    for name, expected, actual in found:
        largest = expected.abs().max().item()
        difference = (actual - expected).abs().max().item()
        words = f"max difference from PyTorch {difference:.1e}, largest output {largest:.2g}"
        result = f"{f'{show(shape)} {name}'.rstrip()}: {words}"
        if not difference <= TOLERANCE * largest:  # NaN is an error too
            raise InputError(f"the file is wrong, and is not kept; {result}")
        print(result)


def outputs(found: torch.Tensor | tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


def compare_classes(run: Run, quantized: Run, batches: list[torch.Tensor], count: int) -> None:
    """Prints on how many of the first `count` images of the batches int8 finds the class that float32 finds.

    Raises:
        InputError: on too few.
    """
    expected, actual = (torch.cat([run(batch) for batch in batches])[:count] for run in (run, quantized))
    same = int((actual.argmax(1) == expected.argmax(1)).sum())
    error = ((actual - expected).norm() / expected.norm()).item()
    result = f"int8: the class of float32 on {same} of {count} images, relative error of the outputs {error:.1e}"
    if same < AGREEMENT * count or not actual.isfinite().all():
        raise InputError(f"the file is not kept; {result}; expected {AGREEMENT:.0%} of the images")
    print(result)
