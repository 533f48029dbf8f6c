"""A linear layer whose matrix is a thin product and a sparse part, W = scale * B A + S: its output and its gradients, without W and without the gradient of W.

Han et al., SLTrain: a sparse plus low-rank approach for parameter and memory efficient pretraining (2024), https://arxiv.org/abs/2406.02214.
A row of S has k values. Their places come from a key, by a hash, or are read from a table. In the kernels, tiles of S and of the gradient exist on chip only, and the thin
product is multiplied factor by factor; the reference makes a few rows of W at a time.
"""
import importlib.util

import torch

from . import dispatch, interpreted

__all__ = ['TYPES', 'places', 'sltrain_forward', 'sltrain_forward_reference', 'sltrain_backward', 'sltrain_backward_reference', 'sltrain_linear']

TYPES = torch.float32, torch.bfloat16, torch.float16  # of what the kernels read; they add up in float32
ROWS = 128  # of W that the reference makes at a time, at most: a quarter of all where there are fewer
WORD = 0xFFFFFFFF


def mixed(key, row, part):
    "32 bits that look random, as int64: the same as in the kernels."
    h = (key + row * 0x9E3779B1 + part * 0x85EBCA77) & WORD
    for shift, factor in (16, 0x7FEB352D), (15, 0x846CA68B):
        h = h ^ (h >> shift)
        h = (h * factor) & WORD
    return h ^ (h >> 16)


def places(
    support: torch.Tensor,  # int64 without dimensions: a key below 2^32; or int32 (m, k): the columns themselves
    k: int,  # values in a row
    n: int,  # columns
    first: int,  # row
    last: int,   # row behind the last one
) -> torch.Tensor:  # int64 (last - first, k): the columns of the values of these rows
    "Where the values stand. From a key: the columns are cut into k strata, as equal as can be, and each has one value somewhere."
    if support.ndim: return support[first:last].long()
    part, row = torch.arange(k, device=support.device), torch.arange(first, last, device=support.device)[:, None]
    start = part * n // k
    return start + mixed(support, row, part) % ((part + 1) * n // k - start)


def check(x, a, b, values, support):
    "Raise ValueError where shapes do not belong together."
    (r, n), (m, s) = a.shape, b.shape
    if s != r: raise ValueError(f'a has the shape {tuple(a.shape)}, b {tuple(b.shape)}: give (r, n) and (m, r).')
    if x.ndim != 2 or x.shape[1] != n: raise ValueError(f'x has the shape {tuple(x.shape)}: give (tokens, {n}).')
    if values.ndim != 1 or not m or values.numel() % m or not 1 <= values.numel() // m <= n: raise ValueError(f'values has the shape {tuple(values.shape)}: give k times {m} numbers, k from 1 to {n}.')
    if support.ndim and support.numel() != values.numel(): raise ValueError(f'support has {support.numel()} places for {values.numel()} values.')
    return r, n, m, values.numel() // m


def rows_of(support, values, b, a, scale, first, last, dtype):
    "Rows of W, and the columns of their values."
    k = values.numel() // len(b)
    at = places(support, k, a.shape[1], first, last)
    return (b[first:last].to(dtype) @ a.to(dtype)).mul_(scale).scatter_add_(1, at, values.view(-1, k)[first:last].to(dtype)), at


def tiles(m):
    "Ranges of rows."
    size = max(1, min(ROWS, m // 4))
    return [(first, min(first + size, m)) for first in range(0, m, size)]


def sltrain_forward_reference(
    x: torch.Tensor,  # (tokens, n)
    a: torch.Tensor,  # (r, n)
    b: torch.Tensor,  # (m, r)
    values: torch.Tensor,  # (m * k,), row by row
    support: torch.Tensor,  # a key or columns: see `places`
    scale: float = 1.,  # of the thin product
) -> torch.Tensor:  # (tokens, m), of x's type
    "x multiplied with the transpose of W."
    m = check(x, a, b, values, support)[2]
    y = x.new_empty(len(x), m)
    for first, last in tiles(m): y[:, first:last] = x @ rows_of(support, values, b, a, scale, first, last, x.dtype)[0].T
    return y


def sltrain_backward_reference(
    g: torch.Tensor,  # (tokens, m), gradient of what the forward pass gave
    x: torch.Tensor,  # the next six as they were given to it
    a: torch.Tensor,
    b: torch.Tensor,
    values: torch.Tensor,
    support: torch.Tensor,
    scale: float = 1.,
    of_x: bool = True,  # which gradients are wanted
    of_factors: bool = True,
    of_values: bool = True,
) -> tuple:  # gradients of x, a, b, values; None where one is not wanted
    "Gradients, with a few rows of W and of its gradient at a time."
    m = check(x, a, b, values, support)[2]
    if g.shape != (len(x), m): raise ValueError(f'g has the shape {tuple(g.shape)}: give {(len(x), m)}.')
    new = dict(dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    to_x, to_a = torch.zeros(x.shape, **new) if of_x else None, torch.zeros(a.shape, **new) if of_factors else None
    to_b, to_values = torch.empty_like(b) if of_factors else None, values.new_empty(m, values.numel() // m) if of_values else None
    for first, last in tiles(m):
        part, rows = g[:, first:last], slice(first, last)
        if of_x:
            w, at = rows_of(support, values, b, a, scale, first, last, x.dtype)
            to_x += part @ w
        else: at = places(support, values.numel() // m, a.shape[1], first, last)
        if not of_factors and not of_values: continue
        to_w = part.T @ x
        if of_values: to_values[rows] = to_w.gather(1, at).to(values.dtype)
        if of_factors:
            to_w.mul_(scale)
            to_a += b[rows].to(x.dtype).T @ to_w
            to_b[rows] = (to_w @ a.to(x.dtype).T).to(b.dtype)
    return to_x if to_x is None else to_x.to(x.dtype), to_a if to_a is None else to_a.to(a.dtype), to_b, to_values if to_values is None else to_values.view(-1)


if importlib.util.find_spec('triton') is not None:
    import triton, triton.language as tl
    from .tiles import dot

    @triton.jit
    def _place(key, row, part, n, k):
        "The column of a row's value in a stratum: `places`, in 32 bits."
        h = key + row.to(tl.uint32) * 0x9E3779B1 + part.to(tl.uint32) * 0x85EBCA77
        h = h ^ (h >> 16)
        h = h * 0x7FEB352D
        h = h ^ (h >> 15)
        h = h * 0x846CA68B
        h = h ^ (h >> 16)
        start = part * n // k
        return start + (h % ((part + 1) * n // k - start).to(tl.uint32)).to(tl.int64)

    @triton.jit
    def _sparse(values, key, row, first, m, n, k, R: tl.constexpr, C: tl.constexpr, STRATA: tl.constexpr):
        "A tile of S: R rows, and C columns from `first` on."
        column = first + tl.arange(0, C)
        tile = tl.zeros([R, C], tl.float32)
        begin = (first * k + k - 1) // n   # the stratum of the first column
        for j in range(STRATA):
            part = begin + j
            value = tl.load(values + row * k + part, mask=(row < m) & (part < k), other=0.).to(tl.float32)
            tile = tl.where(column[None, :] == _place(key, row, part, n, k)[:, None], value[:, None], tile)
        return tile

    @triton.jit
    def _thin(total, left, right, i, j, tokens, size, r, l_row, l_column, r_row, r_column, K: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr):
        "Add a product over r to a tile."
        for first in range(0, r, K):
            q = first + tl.arange(0, K)
            p = tl.load(left + i[:, None] * l_row + q[None, :] * l_column, mask=(i[:, None] < tokens) & (q[None, :] < r), other=0.)
            f = tl.load(right + q[:, None] * r_row + j[None, :] * r_column, mask=(q[:, None] < r) & (j[None, :] < size), other=0.).to(p.dtype)
            total = dot(p, f, total, WIDE, PRECISION)
        return total

    @triton.jit(do_not_specialize=['n', 'k'])  # 1 would be no tensor
    def _forward(x, h, b, values, key, y, tokens, m, n, k, r, x_row, x_column, h_row, h_column, b_row, b_column, y_row, y_column,
                 T: tl.constexpr, R: tl.constexpr, C: tl.constexpr, K: tl.constexpr, STRATA: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr):
        "y = x S' + h B', with h = scale * x A'."
        n, k = n.to(tl.int64), k.to(tl.int64)
        i, row, key = (tl.program_id(0) * T + tl.arange(0, T)).to(tl.int64), (tl.program_id(1) * R + tl.arange(0, R)).to(tl.int64), tl.load(key).to(tl.uint32)
        total = tl.zeros([T, R], tl.float32)
        for first in range(0, n, C):
            c = first + tl.arange(0, C)
            p = tl.load(x + i[:, None] * x_row + c[None, :] * x_column, mask=(i[:, None] < tokens) & (c[None, :] < n), other=0.)
            total = dot(p, tl.trans(_sparse(values, key, row, first, m, n, k, R, C, STRATA).to(p.dtype)), total, WIDE, PRECISION)
        total = _thin(total, h, b, i, row, tokens, m, r, h_row, h_column, b_column, b_row, K, WIDE, PRECISION)
        tl.store(y + i[:, None] * y_row + row[None, :] * y_column, total.to(y.dtype.element_ty), mask=(i[:, None] < tokens) & (row[None, :] < m))

    @triton.jit(do_not_specialize=['n', 'k'])  # 1 would be no tensor
    def _to_x(g, u, a, values, key, out, tokens, m, n, k, r, g_row, g_column, u_row, u_column, a_row, a_column, o_row, o_column,
              T: tl.constexpr, R: tl.constexpr, C: tl.constexpr, K: tl.constexpr, STRATA: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr):
        "out = g S + u A, with u = scale * g B."
        n, k = n.to(tl.int64), k.to(tl.int64)
        first = tl.program_id(1).to(tl.int64) * C
        i, c, key = (tl.program_id(0) * T + tl.arange(0, T)).to(tl.int64), first + tl.arange(0, C), tl.load(key).to(tl.uint32)
        total = tl.zeros([T, C], tl.float32)
        for start in range(0, m, R):
            row = (start + tl.arange(0, R)).to(tl.int64)
            p = tl.load(g + i[:, None] * g_row + row[None, :] * g_column, mask=(i[:, None] < tokens) & (row[None, :] < m), other=0.)
            total = dot(p, _sparse(values, key, row, first, m, n, k, R, C, STRATA).to(p.dtype), total, WIDE, PRECISION)
        total = _thin(total, u, a, i, c, tokens, n, r, u_row, u_column, a_row, a_column, K, WIDE, PRECISION)
        tl.store(out + i[:, None] * o_row + c[None, :] * o_column, total.to(out.dtype.element_ty), mask=(i[:, None] < tokens) & (c[None, :] < n))

    @triton.jit(do_not_specialize=['n', 'k'])  # 1 would be no tensor
    def _to_values(g, x, key, out, tokens, m, n, k, g_row, g_column, x_row, x_column,
                   T: tl.constexpr, R: tl.constexpr, C: tl.constexpr, STRATA: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr):
        "A tile of g' x, of which only the numbers on the support are written. Each stands in one tile: there is nothing to add up."
        n, k = n.to(tl.int64), k.to(tl.int64)
        first = tl.program_id(1).to(tl.int64) * C
        row, c, key = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64), first + tl.arange(0, C), tl.load(key).to(tl.uint32)
        total = tl.zeros([R, C], tl.float32)
        for start in range(0, tokens, T):
            i = (start + tl.arange(0, T)).to(tl.int64)
            p = tl.load(g + i[None, :] * g_row + row[:, None] * g_column, mask=(i[None, :] < tokens) & (row[:, None] < m), other=0.)
            q = tl.load(x + i[:, None] * x_row + c[None, :] * x_column, mask=(i[:, None] < tokens) & (c[None, :] < n), other=0.)
            total = dot(p, q, total, WIDE, PRECISION)
        begin = (first * k + k - 1) // n
        for j in range(STRATA):
            part = begin + j
            place = _place(key, row, part, n, k)
            value = tl.sum(tl.where(c[None, :] == place[:, None], total, 0.), 1)
            tl.store(out + row * k + part, value.to(out.dtype.element_ty), mask=(row < m) & (part < k) & (place >= first) & (place < first + C))


SIZES = dict(forward=(128, 128, 32), x=(128, 64, 64), values=(32, 64, 128))  # tokens, rows and columns of a program; small columns are touched by few strata


def shape_of_tiles(what, n, k):
    "Sizes of a program, and how many strata can touch its columns."
    t, r, c = (16, 32, 16) if interpreted() else SIZES[what]
    how = {} if interpreted() else dict(num_warps=8)
    return dict(T=t, R=r, C=c, STRATA=min(k, (c - 2) // (n // k) + 2), WIDE=interpreted(), PRECISION='ieee', **how)


def check_readable(support, **tensors):
    "Raise ValueError for what the kernels do not read."
    if support.ndim: raise ValueError('support is a table of columns: give a key; the reference takes tables.')
    device = support.device
    for name, t in tensors.items():
        if t.dtype not in TYPES: raise ValueError(f'{name} is {t.dtype}: it must be one of {", ".join(map(str, TYPES))}; the reference takes others.')
        if t.device != device: raise ValueError(f'{name} is on {t.device}, support on {device}: move it there.')
    if not tensors['values'].is_contiguous(): raise ValueError('values is not contiguous: give values.contiguous().')


def sltrain_forward_triton(x, a, b, values, support, scale=1.):
    r, n, m, k = check(x, a, b, values, support)
    check_readable(support, x=x, a=a, b=b, values=values)
    h, y, size = (x @ a.to(x.dtype).T).mul_(scale), x.new_empty(len(x), m), shape_of_tiles('forward', n, k)
    grid = triton.cdiv(len(x), size['T']), triton.cdiv(m, size['R'])
    if y.numel(): _forward[grid](x, h, b, values, support, y, len(x), m, n, k, r, *x.stride(), *h.stride(), *b.stride(), *y.stride(), K=32, **size)
    return y


def sltrain_backward_triton(g, x, a, b, values, support, scale=1., of_x=True, of_factors=True, of_values=True):
    r, n, m, k = check(x, a, b, values, support)
    if g.shape != (len(x), m): raise ValueError(f'g has the shape {tuple(g.shape)}: give {(len(x), m)}.')
    check_readable(support, g=g, x=x, a=a, b=b, values=values)
    to_x = to_a = to_b = to_values = None
    u = (g @ b.to(g.dtype)).mul_(scale) if of_x or of_factors else None
    if of_x:
        to_x, size = torch.empty_like(x, memory_format=torch.contiguous_format), shape_of_tiles('x', n, k)
        grid = triton.cdiv(len(x), size['T']), triton.cdiv(n, size['C'])
        if x.numel(): _to_x[grid](g, u, a, values, support, to_x, len(x), m, n, k, r, *g.stride(), *u.stride(), *a.stride(), *to_x.stride(), K=32, **size)
    if of_factors: to_a, to_b = (u.T @ x).to(a.dtype), (g.T @ (x @ a.to(x.dtype).T).mul_(scale)).to(b.dtype)
    if of_values:
        to_values, size = torch.empty_like(values), shape_of_tiles('values', n, k)
        _to_values[triton.cdiv(m, size['R']), triton.cdiv(n, size['C'])](g, x, support, to_values, len(x), m, n, k, *g.stride(), *x.stride(), **size)
    return to_x, to_a, to_b, to_values


sltrain_forward = dispatch(sltrain_forward_triton, sltrain_forward_reference)
sltrain_backward = dispatch(sltrain_backward_triton, sltrain_backward_reference)


# One operation for autograd and the compiler: it keeps x, the thin matrices, the values and the support, and nothing of the size of W.

def readable(x, *others):
    "Whether the kernels read these; else the reference computes."
    return all(t.dtype in TYPES for t in (x, *others[:-1])) and not others[-1].ndim


@torch.library.custom_op('effpt::sltrain_linear', mutates_args=())
def sltrain_linear(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, values: torch.Tensor, support: torch.Tensor, scale: float) -> torch.Tensor:
    "`sltrain_forward`, with gradients: (tokens, n) to (tokens, m)."
    with torch.autocast(x.device.type, enabled=False):
        return (sltrain_forward if readable(x, a, b, values, support) else sltrain_forward_reference)(x, a, b, values, support, scale)


@torch.library.custom_op('effpt::sltrain_gradients', mutates_args=())
def _gradients(g: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, values: torch.Tensor, support: torch.Tensor, scale: float,
               of_x: bool, of_factors: bool, of_values: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    g = g.to(x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        found = (sltrain_backward if readable(x, a, b, values, support) else sltrain_backward_reference)(g, x, a, b, values, support, scale, of_x, of_factors, of_values)
    return tuple(x.new_empty(0) if t is None else t for t in found)


@sltrain_linear.register_fake
def _(x, a, b, values, support, scale): return x.new_empty(len(x), len(b))


@_gradients.register_fake
def _(g, x, a, b, values, support, scale, of_x, of_factors, of_values):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) if wanted else x.new_empty(0) for t, wanted in zip((x, a, b, values), (of_x, of_factors, of_factors, of_values)))


def _keep(ctx, inputs, output):
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _back(ctx, g):
    x, a, b, values, support = ctx.saved_tensors
    of_x, of_a, of_b, of_values = ctx.needs_input_grad[:4]
    found = _gradients(g, x, a, b, values, support, ctx.scale, of_x, of_a or of_b, of_values)
    return *(t if wanted else None for t, wanted in zip(found, (of_x, of_a, of_b, of_values))), None, None


sltrain_linear.register_autograd(_back, setup_context=_keep)
