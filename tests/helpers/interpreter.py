"""Triton's interpreter (3.6 to 3.9) with exact bfloat16 and without its largest waste of time, for tests only.

The interpreter keeps a bfloat16 block as uint16 bit patterns in numpy. Left alone it adds and compares those
bits as integers and truncates casts to bfloat16, where a GPU rounds to nearest even. `make_bf16_exact` routes casts,
unary, binary and dot operations that touch bfloat16 through float32 and rounds their result once.

At every launch and at every call of one jitted function by another the interpreter lists all members of Triton's language
again, to replace those that are builtin. `list_builtins_once` remembers them.
"""

import inspect

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def float32_of(bits):
    """uint16 bit patterns -> the float32 numbers they stand for."""
    return torch.from_numpy(np.array(bits, np.uint16).view(np.int16)).view(torch.bfloat16).float().numpy()


def bits_of(numbers):
    """float32 numbers -> bit patterns of the nearest bfloat16 (ties to even), as uint16."""
    rounded = torch.from_numpy(np.array(numbers, np.float32)).to(torch.bfloat16)
    return rounded.view(torch.int16).numpy().view(np.uint16)


def is_bf16(handle):
    return handle.dtype.scalar == tl.bfloat16


def widened(handle):
    """A bfloat16 handle as a float32 one; any other handle as it is."""
    return interpreter.TensorHandle(float32_of(handle.data), tl.float32) if is_bf16(handle) else handle


def narrowed(numbers):
    return interpreter.TensorHandle(bits_of(numbers), tl.bfloat16)


def make_bf16_exact():
    builder = interpreter.InterpreterBuilder
    cast, unary, binary, dot = builder.cast_impl, builder.unary_op, builder.binary_op, builder.create_dot
    convert = builder.create_fp_to_fp

    def exact_cast(self, source, target_type):
        target = target_type.scalar
        if target == tl.bfloat16:
            return source if is_bf16(source) else narrowed(source.data)
        return cast(self, widened(source), target_type)

    def exact_convert(self, source, target_type, rounding_mode):
        if is_bf16(source) or target_type.scalar == tl.bfloat16:
            return exact_cast(self, source, target_type)
        return convert(self, source, target_type, rounding_mode)

    def exact_unary(self, operand, function):
        return narrowed(function(widened(operand).data)) if is_bf16(operand) else unary(self, operand, function)

    def exact_binary(self, left, right, function):
        if not (is_bf16(left) and is_bf16(right)):
            return binary(self, left, right, function)
        result = np.asarray(function(widened(left).data, widened(right).data))
        return interpreter.TensorHandle(result, tl.int1) if result.dtype == np.bool_ else narrowed(result)

    def exact_dot(self, a, b, accumulator, *options):
        return dot(self, widened(a), widened(b), accumulator, *options)

    builder.cast_impl, builder.create_fp_to_fp = exact_cast, exact_convert
    builder.unary_op, builder.binary_op, builder.create_dot = exact_unary, exact_binary, exact_dot


def list_builtins_once():
    language = (tl, tl.core, tl.math, tl.tensor, tl.core.tensor_descriptor_base)
    names = {part: [name for name, member in inspect.getmembers(part) if tl.core.is_builtin(member)] for part in language}
    numpy_types, numpy_type = {}, interpreter._get_np_dtype

    def replace_builtins(part, builder, *scope):
        if not tl.core.is_builtin(getattr(part, names[part][0])):
            return  # replaced by the launch that this call is a part of
        for name in names[part]:
            interpreter._patch_attr(part, name, getattr(part, name), builder, *scope)

    def numpy_type_once(triton_type):
        if (name := str(triton_type)) not in numpy_types:
            numpy_types[name] = numpy_type(triton_type)
        return numpy_types[name]

    interpreter._patch_builtin, interpreter._get_np_dtype = replace_builtins, numpy_type_once
