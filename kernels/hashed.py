"""A matrix whose tiles are read from a bank of shared blocks, at places that a hash tells, each with a hashed sign; and the sum of a gradient over all uses of a block.

Desai, Zhou and Shrivastava, Hardware-Aware Compression with Random Operation Access Specific Tile Hashing (2023), and Desai and Shrivastava,
In defense of parameter sharing for model-compression (2023), https://arxiv.org/abs/2310.11611.

Tiles of all matrices are numbered one after the other, along rows of tiles. `fold` cuts these numbers into pieces as long as the bank and turns each piece round by a hashed
step: every block is used equally often, and who uses it can be told from its number. Without `fold` each tile's place is hashed by itself. Nothing is stored but the seed.
The backward pass needs no atomic addition: each block sums its own uses, in the order of their numbers, so that the same bits come out twice.
"""
import importlib.util
from typing import NamedTuple

import torch

from . import dispatch

__all__ = ['TYPES', 'Place', 'mix', 'salts', 'slots_of', 'signs_of', 'gather', 'gather_reference', 'scatter_add', 'scatter_add_reference']

TYPES = torch.float32, torch.bfloat16, torch.float16  # of what the kernels read; they compute in float32, and leave others to the reference
LOW, FIRST, SECOND = 0xFFFFFFFF, 0x7FEB352D, 0x846CA68B


class Place(NamedTuple):
    "Where a matrix's tiles stand in the bank."
    shape: tuple       # of the matrix
    first: int         # number of its first tile, among those of all matrices
    slots: int         # blocks in the bank
    block: int = 16    # side of a tile, a power of two
    seed: int = 0
    fold: bool = True  # whether places are hashed fold by fold, or tile by tile

    @property
    def tiles(self): return tuple(-(-side // self.block) for side in self.shape)  # down, across
    @property
    def count(self): return self.tiles[0] * self.tiles[1]


def mix(
    x,  # an int, or a tensor of int64: only the lower 32 bits count
):  # 32 bits
    "Mix the bits of a number (the finaliser `lowbias32` of Wellons, 2018); a bijection of 32 bits."
    x = x & LOW
    x = ((x ^ (x >> 16)) * FIRST) & LOW
    x = ((x ^ (x >> 15)) * SECOND) & LOW
    return x ^ (x >> 16)


def salts(
    seed: int,
) -> tuple:  # of places, of signs
    "What keeps the hashes of a seed apart."
    return mix(mix(seed) + 1), mix(mix(seed) + 2)


def slots_of(
    tile,  # numbers of tiles, int64
    place: Place,
):  # numbers of blocks
    "The block that each tile reads."
    if not place.fold: return mix(tile ^ salts(place.seed)[0]) % place.slots
    return (mix(tile // place.slots ^ salts(place.seed)[0]) % place.slots + tile % place.slots) % place.slots


def signs_of(tile, place: Place):
    "1 or -1 for each tile."
    return 1 - 2 * (mix(tile ^ salts(place.seed)[1]) & 1)


def check(place: Place, bank=None, grad=None, weight=None):
    "Raise ValueError for what does not fit together."
    if place.block < 1 or place.block & (place.block - 1): raise ValueError(f'block is {place.block}: give a power of two.')
    if place.slots < 1: raise ValueError(f'slots is {place.slots}: give at least 1.')
    if bank is not None and tuple(bank.shape) != (place.slots, place.block ** 2):
        raise ValueError(f'the bank has the shape {tuple(bank.shape)}: give ({place.slots}, {place.block ** 2}), a row for each block.')
    if grad is not None and tuple(grad.shape) != tuple(place.shape): raise ValueError(f'the gradient has the shape {tuple(grad.shape)}, the matrix {tuple(place.shape)}.')
    if weight is not None and tuple(weight.shape) != (place.slots,): raise ValueError(f'weight has the shape {tuple(weight.shape)}: give one number for each of {place.slots} blocks.')


def factors(place, scale, device, dtype):
    "For each tile of the matrix: its block, and by what it is multiplied."
    tile = torch.arange(place.first, place.first + place.count, device=device)
    by = signs_of(tile, place).to(dtype)
    return slots_of(tile, place), by if scale is None else by * (scale.to(by) if torch.is_tensor(scale) else scale)


def gather_reference(
    bank: torch.Tensor,  # (slots, block²)
    place: Place,        # of the matrix
    scale=None,          # on all of it: a number, or a tensor with one
    dtype: torch.dtype | None = None,  # of the matrix; the bank's without it
) -> torch.Tensor:  # the matrix
    "Read a matrix, tile by tile."
    check(place, bank)
    (down, across), side, (rows, columns) = place.tiles, place.block, place.shape
    slot, by = factors(place, scale, bank.device, torch.promote_types(bank.dtype, torch.float32))
    tiles = (bank.index_select(0, slot) * by[:, None]).to(dtype or bank.dtype)
    return tiles.view(down, across, side, side).transpose(1, 2).reshape(down * side, across * side)[:rows, :columns].contiguous()


def scatter_add_reference(
    grad: torch.Tensor,  # of the matrix
    place: Place,
    scale=None,          # as the matrix was read
    weight: torch.Tensor | None = None,  # (slots,), on each block's sum
) -> torch.Tensor:  # (slots, block²), float32 or better
    "The sum over the tiles that read a block, for every block."
    check(place, grad=grad, weight=weight)
    (down, across), side, (rows, columns) = place.tiles, place.block, place.shape
    wide = torch.promote_types(grad.dtype, torch.float32)
    slot, by = factors(place, None, grad.device, wide)
    tiles = torch.nn.functional.pad(grad, (0, across * side - columns, 0, down * side - rows)).view(down, side, across, side).transpose(1, 2).reshape(-1, side * side)
    tiles = tiles.to(wide) * by[:, None]
    out = torch.zeros(place.slots, side * side, dtype=wide, device=grad.device)
    for start, end in pieces(place): out.index_add_(0, slot[start:end], tiles[start:end])
    if scale is not None: out *= scale.to(out) if torch.is_tensor(scale) else scale
    return out if weight is None else out * weight.to(wide)[:, None]


def pieces(place):
    "Runs of the matrix's tiles: fold by fold, no block occurs twice in one."
    if not place.fold: return [(0, place.count)]
    inner = range((place.first // place.slots + 1) * place.slots, place.first + place.count, place.slots)
    edges = [0, *(at - place.first for at in inner), place.count]
    return list(zip(edges, edges[1:]))


if importlib.util.find_spec('triton') is not None:
    import triton, triton.language as tl

    @triton.jit
    def _mix(x):
        x = x.to(tl.uint32)
        x = (x ^ (x >> 16)) * 0x7FEB352D
        x = (x ^ (x >> 15)) * 0x846CA68B
        return x ^ (x >> 16)

    @triton.jit
    def _slot(tile, slots, salt, FOLD: tl.constexpr):
        if FOLD:
            turn = (_mix((tile // slots).to(tl.uint32) ^ salt.to(tl.uint32)) % slots.to(tl.uint32)).to(tl.int64)
            return (turn + tile % slots) % slots
        return (_mix(tile.to(tl.uint32) ^ salt.to(tl.uint32)) % slots.to(tl.uint32)).to(tl.int64)

    @triton.jit
    def _sign(tile, salt):
        return 1. - 2. * (_mix(tile.to(tl.uint32) ^ salt.to(tl.uint32)) & 1).to(tl.float32)

    @triton.jit
    def _gather(bank, out, scale, numbers, rows, columns, B: tl.constexpr, WIDTH: tl.constexpr, FOLD: tl.constexpr):
        "Tiles that stand side by side, WIDTH columns of them."
        first, slots, across, places, signs = tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2), tl.load(numbers + 3), tl.load(numbers + 4)
        down, inside = tl.program_id(0).to(tl.int64), tl.arange(0, B)[:, None]
        column = tl.program_id(1).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
        tile = first + down * across + column // B
        slot, by = _slot(tile, slots, places, FOLD), _sign(tile, signs) * tl.load(scale)
        row = down * B + inside
        there = (row < rows) & (column < columns)[None, :]
        at = slot[None, :] * B * B + inside * B + (column % B)[None, :]
        value = tl.load(bank + at, mask=there, other=0.).to(tl.float32) * by[None, :]
        tl.store(out + row * columns + column[None, :], value, mask=there)

    @triton.jit
    def _scatter(grad, out, scale, weight, numbers, order, starts, rows, columns, by_row, by_column, begin, end, WEIGHTED: tl.constexpr, B: tl.constexpr, WIDTH: tl.constexpr,
                 FOLD: tl.constexpr):
        "Blocks that stand one after the other, WIDTH columns of them: each adds up its uses."
        first, slots, across, places, signs, count = tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2), tl.load(numbers + 3), tl.load(numbers + 4), tl.load(numbers + 5)
        lane, inside = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)[None, :], tl.arange(0, B)[:, None]
        slot, column = lane // B, lane % B
        exists, total = slot < slots, tl.zeros([B, WIDTH], tl.float32)
        if FOLD: most = end
        else:
            at, last = tl.load(starts + slot, mask=exists, other=0), tl.load(starts + slot + 1, mask=exists, other=0)
            most = tl.max(tl.max(last - at, 1), 0)
        for use in range(begin, most):
            if FOLD:
                piece = first * 0 + use
                turn = (_mix(piece.to(tl.uint32) ^ places.to(tl.uint32)) % slots.to(tl.uint32)).to(tl.int64)
                tile = piece * slots + (slot - turn + slots) % slots
                used = exists & (tile >= first) & (tile < first + count)
            else:
                used = exists & (at + use < last)
                tile = first + tl.load(order + at + use, mask=used, other=0)
            local = tile - first
            row, place = local // across * B + inside, local % across * B + column
            there = used & (row < rows) & (place < columns)
            total += tl.load(grad + row * by_row + place * by_column, mask=there, other=0.).to(tl.float32) * _sign(tile, signs)
        total *= tl.load(scale)
        if WEIGHTED: total *= tl.load(weight + slot, mask=exists, other=0.)
        tl.store(out + slot * B * B + inside * B + column, total, mask=exists)


WIDTH = 64  # columns of a program, at least


def arguments(place, scale, device):
    "What both kernels read from memory: the scale, and numbers that may need more than 32 bits."
    one = torch.ones((), dtype=torch.float32, device=device) if scale is None else torch.as_tensor(scale, device=device).float()
    return one, torch.tensor([place.first, place.slots, place.tiles[1], *salts(place.seed), place.count], device=device)


def gather_triton(bank, place, scale=None, dtype=None):
    if not {bank.dtype, dtype or bank.dtype} <= {*TYPES}: return gather_reference(bank, place, scale, dtype)
    check(place, bank)
    out = torch.empty(place.shape, dtype=dtype or bank.dtype, device=bank.device)
    width = max(place.block, WIDTH)
    if out.numel():
        grid = place.tiles[0], triton.cdiv(place.tiles[1] * place.block, width)
        _gather[grid](bank.contiguous(), out, *arguments(place, scale, bank.device), *place.shape, B=place.block, WIDTH=width, FOLD=place.fold)
    return out


def scatter_add_triton(grad, place, scale=None, weight=None):
    if grad.dtype not in TYPES: return scatter_add_reference(grad, place, scale, weight)
    check(place, grad=grad, weight=weight)
    out = torch.empty(place.slots, place.block ** 2, dtype=torch.float32, device=grad.device)
    begin, end, order, starts = place.first // place.slots, (place.first + place.count - 1) // place.slots + 1, out, out
    if not place.fold:
        slot = slots_of(torch.arange(place.first, place.first + place.count, device=grad.device), place)
        order, begin = slot.argsort(stable=True), 0
        starts = torch.searchsorted(slot[order], torch.arange(place.slots + 1, device=grad.device))
    width = max(place.block, WIDTH)
    one, numbers = arguments(place, scale, grad.device)
    _scatter[(triton.cdiv(place.slots * place.block, width),)](grad, out, one, one if weight is None else weight.float().contiguous(), numbers, order, starts, *place.shape,
        *grad.stride(), begin, end, WEIGHTED=weight is not None, B=place.block, WIDTH=width, FOLD=place.fold)
    return out


gather = dispatch(gather_triton, gather_reference)
scatter_add = dispatch(scatter_add_triton, scatter_add_reference)
