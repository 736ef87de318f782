"""The CUDA backend: compiled kernels for what Triton cannot express (docs/ops.md). `SVIT_BUILD_CUDA=1` builds them.

It runs each half-block as one kernel, for the sizes of the published models, and has no primitives. This module loads
the library and says what it serves. The operators' folders (attention, conv_ffn) call it; csrc/ holds the sources.
"""

import ctypes
import functools
import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.library import Library

from . import _dispatch

# Channels -> the cell and the channels of a head, as compiled (csrc/super_token_attention.cu).
CELLS = {64: ((8, 8), 64), 96: ((8, 8), 48), 128: ((4, 4), 64), 192: ((4, 4), 64)}
MOST_CELLS = 8  # rows and columns

# The kernels' own schemas, defined beside their calls. A kernel writes its results into tensors that the caller makes.
LIBRARY = Library("svit_cuda", "DEF")


@dataclass
class Compiled:
    """The compiled kernels: whether some use clusters, and the shared memory of a block in bytes."""

    clusters: bool
    attention: dict[tuple[int, int, int, bool], int]  # by channels, rows and columns of cells, use of clusters
    conv_ffn: dict[int, int]  # by channels
    library: ctypes.CDLL


def load(path: Path) -> tuple[Compiled | None, str]:
    """The compiled library or None, and a line of text about it."""
    if not path.exists():
        return None, "no cuda kernels: they were not built (SVIT_BUILD_CUDA=1)"
    try:
        torch.ops.load_library(path)
    except OSError as error:  # a build of PyTorch without CUDA
        return None, f"no cuda kernels: {error}"
    library = ctypes.CDLL(str(path))
    # A table: torch.compile cannot trace a call into the library.
    grids = itertools.product(range(1, MOST_CELLS + 1), range(1, MOST_CELLS + 1), (False, True))
    attention = {
        (C, rows, columns, clusters): library.svit_attention_bytes(C, *CELLS[C][0], rows, columns, clusters)
        for rows, columns, clusters in grids
        for C in CELLS
    }
    conv_ffn = {C: library.svit_conv_ffn_bytes(C) for C in CELLS}
    return Compiled(bool(library.svit_has_clusters()), attention, conv_ffn, library), f"cuda kernels of {path.name}"


PATH = Path(__file__).with_name("_cuda.so")
compiled, version = load(PATH)


@functools.cache
def build() -> str:
    """A digest of the compiled library."""
    return hashlib.sha256(PATH.read_bytes()).hexdigest()[:16]


def fingerprint(device: torch.device) -> str:
    """Identifies the kernels and the device: a verdict of the self-check holds for these."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"cuda kernels {build()}, sm_{major}{minor}"


def usable(
    op: str,
    x: Tensor,
    cell: tuple[int, int] = (1, 1),
    num_heads: int = 1,
    hidden: int = 0,
    residual: bool = True,
    weights: Sequence[Tensor] = (),
) -> tuple[bool, str]:
    """Whether this backend serves `op` on the map x (B, H, W, C), and if not, why.

    Args:
        op: `super_token_attention` or `conv_ffn`.
        x: the map.
        cell: of the attention.
        num_heads: of the attention.
        hidden: channels between the 1x1 convolutions of the conv-FFN.
        residual: whether the conv-FFN adds a residual.
        weights: of the conv-FFN. The op checks them.
    """
    if compiled is None:
        return False, version
    if x.device.type != "cuda":
        return False, f"x is on {x.device.type}, it runs on GPUs"
    if not residual:
        return False, "it adds a residual"
    if x.dtype not in (torch.float16, torch.bfloat16):
        return False, f"it computes in float16 and bfloat16, not in {x.dtype}"
    served, reason = fits(op, tuple(x.shape), tuple(cell), num_heads, hidden)
    # While a model is compiled or exported, x may be a fake tensor on a GPU that does not exist.
    if not served or not torch.cuda.is_available():
        return served, reason
    if torch.cuda.get_device_capability(x.device) < (8, 0):
        return False, "it needs an NVIDIA GPU of compute capability 8.0 (Ampere) or higher"
    if torch.compiler.is_compiling():  # sizes may be symbols
        return True, ""
    _, H, W, C = x.shape
    # The stub of PyTorch lacks this one.
    limit = torch.cuda.get_device_properties(x.device).shared_memory_per_block_optin  # type: ignore[attr-defined]
    if op == "conv_ffn":
        wanted, why = compiled.conv_ffn[C], ""
    else:
        rows, columns = H // cell[0], W // cell[1]
        clusters = max_active_clusters(C, rows, columns, x.device) > 0
        wanted = compiled.attention[C, rows, columns, clusters]
        refused = has_clusters(x.device) and not clusters
        why = f"this GPU cannot run a cluster of {rows} blocks at once, and without clusters " if refused else ""
    if wanted > limit:
        return False, f"{why}a block wants {wanted} bytes of shared memory, this GPU has {limit}"
    return True, ""


def fits(op: str, shape: tuple[int, ...], cell: tuple[int, ...], num_heads: int, hidden: int) -> tuple[bool, str]:
    """Whether kernels of `op` were compiled for maps of this shape, and if not, why."""
    _, H, W, C = shape
    if C not in CELLS:
        return False, f"it has kernels for {', '.join(map(str, CELLS))} channels, not for {C}"
    if op == "conv_ffn":
        return (True, "") if hidden == 4 * C else (False, f"it expands {C} channels to {4 * C}, not to {hidden}")
    (h, w), head = CELLS[C]
    if cell != (h, w) or num_heads * head != C:
        return False, f"of {C} channels it has cells of {h} x {w} and {C // head} heads, not {cell} and {num_heads}"
    if H % h or W % w:
        return False, f"it needs whole cells of {h} x {w}, not a map of {H} x {W}"
    if H // h > MOST_CELLS or W // w > MOST_CELLS:
        return False, f"it has room for {MOST_CELLS} x {MOST_CELLS} cells, not for {H // h} x {W // w}"
    return True, ""


def has_clusters(device: torch.device) -> bool:
    """Whether blocks can access each other's shared memory (clusters), which then holds the whole map."""
    return compiled is not None and compiled.clusters and torch.cuda.get_device_capability(device) >= (9, 0)


def max_active_clusters(C: int, rows: int, columns: int, device: torch.device | str | int) -> int:
    """How many clusters of the attention a GPU runs at a time, one for each image. 0 if none fits or there are none.

    Args:
        C: channels of the map, one of `CELLS`.
        rows: of cells, at most `MOST_CELLS`. A cluster has one block for each row.
        columns: of cells, at most `MOST_CELLS`.
        device: of the map. Nothing is launched on it.

    Raises:
        RuntimeError: the kernels were not built.
        ValueError: there are no kernels for these sizes.
    """
    if compiled is None:
        raise RuntimeError(version)
    if C not in CELLS:
        raise ValueError(f"C: expected one of {', '.join(map(str, CELLS))}, got {C}")
    for name, count in (("rows", rows), ("columns", columns)):
        if not 1 <= count <= MOST_CELLS:
            raise ValueError(f"{name}: expected 1 to {MOST_CELLS} cells, got {count}")
    device = torch.device(device)
    if not has_clusters(device):
        return 0
    return ask_max_active_clusters(
        C, rows, columns, torch.cuda.current_device() if device.index is None else device.index
    )


@functools.cache
def ask_max_active_clusters(C: int, rows: int, columns: int, index: int) -> int:
    assert compiled is not None  # else nobody asks
    with torch.cuda.device(index):
        return compiled.library.svit_attention_max_active_clusters(C, *CELLS[C][0], rows, columns, index)


def aligned(t: Tensor) -> Tensor:
    """t, or a copy, at an address that is a multiple of 16 bytes."""
    return t.clone() if t.data_ptr() % 16 else t


def weight(t: Tensor, x: Tensor) -> Tensor:
    """A matrix in the dtype of x."""
    return aligned(t.to(x.dtype).contiguous())


def parameter(t: Tensor, x: Tensor) -> Tensor:
    """A vector or taps in the dtype of x, else in float32."""
    return aligned(t.contiguous() if t.dtype == x.dtype else t.float().contiguous())


BACKEND = _dispatch.add_backend("cuda", usable, fingerprint)
