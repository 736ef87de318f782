"""Makes Triton's interpreter right in bfloat16, which it keeps as 16-bit integers and adds up as such.

With the type of ml_dtypes NumPy computes in bfloat16; casts round to nearest, and products run in float32, as on a GPU.
"""

import ml_dtypes
import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from svit.ops import triton as backend

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def is_bfloat16(dtype: tl.dtype) -> bool:
    return dtype.scalar == tl.bfloat16


def install() -> None:
    """Changes the interpreter of this process, and lets the Triton backend accept bfloat16 in it."""
    builder, TensorHandle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    numpy_dtype = interpreter._get_np_dtype
    cast, convert, dot = builder.cast_impl, builder.create_fp_to_fp, builder.create_dot

    def numpy_dtype_of(dtype):
        return BFLOAT16 if is_bfloat16(dtype) else numpy_dtype(dtype)

    def astype(src, dtype):
        return TensorHandle(src.data.astype(numpy_dtype_of(dtype)), dtype.scalar)

    def cast_impl(self, src, dtype):
        return astype(src, dtype) if is_bfloat16(src.dtype) or is_bfloat16(dtype) else cast(self, src, dtype)

    def create_fp_to_fp(self, src, dtype, rounding):
        return (
            astype(src, dtype) if is_bfloat16(src.dtype) or is_bfloat16(dtype) else convert(self, src, dtype, rounding)
        )

    def create_dot(self, a, b, *args):
        a, b = (astype(operand, tl.float32) if is_bfloat16(operand.dtype) else operand for operand in (a, b))
        return dot(self, a, b, *args)

    interpreter._get_np_dtype = numpy_dtype_of
    builder.cast_impl, builder.create_fp_to_fp, builder.create_dot = cast_impl, create_fp_to_fp, create_dot
    backend.DTYPES = (torch.float32, torch.float16, torch.bfloat16)
