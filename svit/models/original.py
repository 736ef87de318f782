"""Key names of the authors' checkpoints (`stvit-{small,base,large}-{224,384}.pth`) and ours.

Only names differ: every tensor keeps its values and its shape. The one-hot kernels `*.unfold.weights` and
`*.fold.weights` are constants of the authors' code. The conversion to our names drops them, and the conversion back
adds them.
"""

import re
from collections.abc import Mapping

import torch

# A key that every model of the authors has, and none of ours.
MARK = "patch_embed.proj.0.weight"

# (theirs, ours): starts of keys, and parts inside of them. A key has at most one of each.
STARTS = [
    ("patch_embed.proj.", "stem.layers."),
    ("layers.", "stages."),
    ("proj.", "final_conv.conv."),
    ("norm.", "final_conv.norm."),
    ("head.", "head.fc."),
]
PARTS = [
    (".downsample.proj.0.", ".downsample.conv."),
    (".downsample.proj.1.", ".downsample.norm."),
    (".pos_embed.conv.", ".pos_embed."),
    (".norm1.norm.", ".norm1."),
    (".attn.stoken_refine.", ".attn."),
    (".norm2.", ".mlp.norm."),
    (".mlp2.conv.conv.", ".mlp.dwconv."),
    (".mlp2.fc", ".mlp.fc"),
    (".gamma_1", ".ls1.gamma"),
    (".gamma_2", ".ls2.gamma"),
]
ONE_HOT = (".attn.unfold.weights", ".attn.fold.weights")


def is_original(state_dict: Mapping[str, torch.Tensor], prefix: str = "") -> bool:
    """Whether the keys that begin with `prefix` are the authors', in any order."""
    return prefix + MARK in state_dict


def from_original(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The authors' state dict under our names."""
    return {_rename(k, 0, 1): v for k, v in state_dict.items() if not k.endswith(ONE_HOT)}


def to_original(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our state dict under the authors' names, with their one-hot kernels."""
    out = {_rename(k, 1, 0): v for k, v in state_dict.items()}
    one_hot = torch.eye(9).reshape(9, 1, 3, 3)
    for key in list(out):
        block, qkv, _ = key.partition(".attn.stoken_refine.qkv.weight")
        if qkv:
            out.update({block + name: one_hot.to(out[key].dtype).clone() for name in ONE_HOT})
    return out


def _rename(key: str, source: int, target: int) -> str:
    for pair in STARTS:
        if key.startswith(pair[source]):
            key = pair[target] + key.removeprefix(pair[source])
            break
    for pair in PARTS:
        if pair[source] in key:
            key = key.replace(pair[source], pair[target])
            break
    # Their downsampling ends a stage, ours begins the next one.
    shift = target - source
    return re.sub(r"(?<=\.)\d+(?=\.downsample\.)", lambda stage: str(int(stage[0]) + shift), key)
