"""What the kernels of this folder share: functions on tiles, for other kernels to call."""
import importlib.util

__all__ = []

if importlib.util.find_spec('triton') is not None:
    import triton, triton.language as tl

    __all__ = ['dot']

    @triton.jit
    def dot(a, b, total, WIDE: tl.constexpr, PRECISION: tl.constexpr):
        "Add a product of two tiles. The interpreter multiplies the bits of bfloat16: there (WIDE) they are widened first, which changes no product."
        if WIDE: return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision=PRECISION)
        else: return tl.dot(a, b, total, input_precision=PRECISION)
