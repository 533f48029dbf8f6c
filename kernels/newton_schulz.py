"""Newton-Schulz iteration on a stack of matrices: X <- aX + (bA + cA²)X with A = XX^T, which brings all singular values near one.

Jordan et al., Muon (2024), https://kellerjordan.github.io/posts/muon/. A and A² are symmetric, so only the blocks of one triangle are computed, and mirrored;
the two sums are made where the products are, before anything is written.
"""
import importlib.util

import torch

from . import dispatch, interpreted

__all__ = ['COEFFICIENTS', 'EPS', 'TYPES', 'square', 'combine', 'newton_schulz']

COEFFICIENTS = 3.4445, -4.7750, 2.0315
EPS = 1e-7  # norms below it count as this
TYPES = torch.float32, torch.bfloat16  # of what the kernels read and write; they add in float32


def check_stack(name, x):
    if x.ndim != 3: raise ValueError(f'{name} has {x.ndim} dimensions: give a stack of matrices, (count, rows, columns).')
    if not x.is_floating_point(): raise ValueError(f'{name} is {x.dtype}: give floating-point numbers.')


def check_like(name, t, x, sides):
    "A second operand must fit the first."
    if tuple(t.shape) != (len(x), *sides): raise ValueError(f'{name} has the shape {tuple(t.shape)} where {(len(x), *sides)} is needed.')
    if t.dtype != x.dtype or t.device != x.device: raise ValueError(f'{name} is {t.dtype} on {t.device}, x {x.dtype} on {x.device}: give both alike.')


def square_reference(
    x: torch.Tensor,  # X: (count, m, n), any floating type
    add: torch.Tensor | None = None,  # C: (count, m, m), symmetric
    alpha: float = 1.,
    beta: float = 1.,
) -> torch.Tensor:  # alpha X X^T + beta C: (count, m, m)
    "The symmetric product of each matrix with itself."
    check_stack('x', x)
    if add is None: return torch.bmm(x, x.mT).mul_(alpha) if alpha != 1 else torch.bmm(x, x.mT)
    check_like('add', add, x, (x.shape[1], x.shape[1]))
    return torch.baddbmm(add, x, x.mT, beta=beta, alpha=alpha)


def combine_reference(
    x: torch.Tensor,  # X: (count, m, n)
    b: torch.Tensor,  # B: (count, m, m)
    a: float = 1.,
) -> torch.Tensor:  # a X + B X: (count, m, n)
    "Each matrix, and its product with another from the left."
    check_stack('x', x)
    check_like('b', b, x, (x.shape[1], x.shape[1]))
    return torch.baddbmm(x, b, x, beta=a)


def start(g, steps, coefficients, dtype, eps):
    "The stack to iterate on: of norm one, wide, contiguous."
    check_stack('g', g)
    if not (isinstance(steps, int) and steps >= 0): raise ValueError(f'steps is {steps}: give a whole number of at least 0.')
    if len(coefficients) != 3: raise ValueError(f'coefficients are {coefficients}: give three numbers, a, b and c.')
    wide = torch.promote_types(g.dtype, torch.float32)
    norm = torch.linalg.vector_norm(g, dim=(1, 2), keepdim=True, dtype=wide)
    x = (g.to(wide) / norm.clamp(min=eps)).to(dtype or g.dtype)
    return (x.mT if g.shape[1] > g.shape[2] else x).contiguous()


def iterate(square, combine, g, steps, coefficients, dtype, eps):
    x, (a, b, c) = start(g, steps, coefficients, dtype, eps), coefficients
    for _ in range(steps):
        product = square(x)
        x = combine(x, square(product, product, c, b), a)
    return x.mT if g.shape[1] > g.shape[2] else x


def newton_schulz_reference(
    g: torch.Tensor,  # (count, m, n), any floating type and strides
    steps: int = 5,
    coefficients: tuple = COEFFICIENTS,  # a, b, c
    dtype: torch.dtype | None = None,  # of the iteration and of what it gives; None: g's
    eps: float = EPS,  # least norm that is divided by
) -> torch.Tensor:  # (count, m, n)
    "Each matrix with its singular vectors, and its singular values brought near one."
    return iterate(square_reference, combine_reference, g, steps, coefficients, dtype, eps)


if importlib.util.find_spec('triton') is not None:
    import triton, triton.language as tl
    from .tiles import dot

    @triton.jit
    def _triangle(at):
        "Row and column of a place in the lower triangle, counted row by row."
        row = ((tl.sqrt(8. * at.to(tl.float32) + 1.) - 1.) / 2.).to(tl.int32)
        row = tl.where(row * (row + 1) // 2 > at, row - 1, row)   # the root is rounded
        row = tl.where((row + 1) * (row + 2) // 2 <= at, row + 1, row)
        return row, at - row * (row + 1) // 2

    @triton.jit
    def _square(x, add, out, m, n, x_count, x_row, x_column, add_count, add_row, add_column, out_count, out_row, out_column, alpha, beta,
                ADD: tl.constexpr, M: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr):
        row, column = _triangle(tl.program_id(0))
        matrix = tl.program_id(1).to(tl.int64)
        i, j, k = (row * M + tl.arange(0, M)).to(tl.int64), (column * M + tl.arange(0, M)).to(tl.int64), tl.arange(0, K).to(tl.int64)
        left = x + matrix * x_count + i[:, None] * x_row + k[None, :] * x_column
        right = x + matrix * x_count + j[None, :] * x_row + k[:, None] * x_column
        total = tl.zeros([M, M], tl.float32)
        for first in range(0, n, K):
            a = tl.load(left, mask=(i[:, None] < m) & (first + k[None, :] < n), other=0.)
            b = tl.load(right, mask=(j[None, :] < m) & (first + k[:, None] < n), other=0.)
            total = dot(a, b, total, WIDE, PRECISION)
            left += K * x_column
            right += K * x_column
        there = (i[:, None] < m) & (j[None, :] < m)
        total = total * alpha
        if ADD: total += beta * tl.load(add + matrix * add_count + i[:, None] * add_row + j[None, :] * add_column, mask=there, other=0.).to(tl.float32)
        total = total.to(out.dtype.element_ty)
        to = out + matrix * out_count
        tl.store(to + i[:, None] * out_row + j[None, :] * out_column, total, mask=there)
        if row != column: tl.store(to + j[:, None] * out_row + i[None, :] * out_column, tl.trans(total), mask=(j[:, None] < m) & (i[None, :] < m))

    @triton.jit
    def _combine(x, b, out, m, n, x_count, x_row, x_column, b_count, b_row, b_column, out_count, out_row, out_column, a,
                 M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr):
        rows = tl.cdiv(m, M)
        matrix, row, column = tl.program_id(1).to(tl.int64), tl.program_id(0) % rows, tl.program_id(0) // rows
        i, j, k = (row * M + tl.arange(0, M)).to(tl.int64), (column * N + tl.arange(0, N)).to(tl.int64), tl.arange(0, K).to(tl.int64)
        x += matrix * x_count
        left = b + matrix * b_count + i[:, None] * b_row + k[None, :] * b_column
        right = x + k[:, None] * x_row + j[None, :] * x_column
        total = tl.zeros([M, N], tl.float32)
        for first in range(0, m, K):
            p = tl.load(left, mask=(i[:, None] < m) & (first + k[None, :] < m), other=0.)
            q = tl.load(right, mask=(first + k[:, None] < m) & (j[None, :] < n), other=0.)
            total = dot(p, q, total, WIDE, PRECISION)
            left += K * b_column
            right += K * x_row
        there = (i[:, None] < m) & (j[None, :] < n)
        total += a * tl.load(x + i[:, None] * x_row + j[None, :] * x_column, mask=there, other=0.).to(tl.float32)
        tl.store(out + matrix * out_count + i[:, None] * out_row + j[None, :] * out_column, total.to(out.dtype.element_ty), mask=there)


def tiles(
    m: int,  # smaller side of the matrices
    dtype: torch.dtype,
) -> dict:  # sides of a block, depth of a product, and how it is launched
    "Blocks that fit the matrices: large ones read less, small ones leave less empty."
    if dtype == torch.float32: return dict(M=32 if m <= 32 else 64, K=32, num_warps=4, num_stages=2)
    return dict(M=32, K=32, num_warps=4, num_stages=2) if m <= 32 else dict(M=64, K=64, num_warps=4, num_stages=3) if m <= 512 else dict(M=128, K=64, num_warps=8, num_stages=3)


def check_type(name, t):
    if t not in TYPES: raise ValueError(f'{name} is {t}: the kernel takes {" and ".join(map(str, TYPES))}; the reference takes others.')


def square_triton(x, add=None, alpha=1., beta=1.):
    check_stack('x', x)
    check_type('x', x.dtype)
    count, m, n = x.shape
    if add is not None: check_like('add', add, x, (m, m))
    out = torch.empty(count, m, m, dtype=x.dtype, device=x.device)
    how = tiles(m, x.dtype)
    blocks = triton.cdiv(m, how['M'])
    if out.numel(): _square[(blocks * (blocks + 1) // 2, count)](x, x if add is None else add, out, m, n, *x.stride(), *(x if add is None else add).stride(), *out.stride(),
                                                                alpha, beta, ADD=add is not None, WIDE=interpreted(), PRECISION='ieee', **how)
    return out


def combine_triton(x, b, a=1.):
    check_stack('x', x)
    check_type('x', x.dtype)
    count, m, n = x.shape
    check_like('b', b, x, (m, m))
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    how = tiles(m, x.dtype)
    if out.numel(): _combine[(triton.cdiv(m, how['M']) * triton.cdiv(n, how['M']), count)](
        x, b, out, m, n, *x.stride(), *b.stride(), *out.stride(), a, N=how['M'], WIDE=interpreted(), PRECISION='ieee', **how)
    return out


def newton_schulz_triton(g, steps=5, coefficients=COEFFICIENTS, dtype=None, eps=EPS):
    check_type('dtype', dtype or g.dtype)
    return iterate(square_triton, combine_triton, g, steps, coefficients, dtype, eps)


square = dispatch(square_triton, square_reference)
combine = dispatch(combine_triton, combine_reference)
newton_schulz = dispatch(newton_schulz_triton, newton_schulz_reference)
