"""The pair bias in the order in which a matrix unit holds its results.

A score tile comes out of the matrix unit spread over the registers of a warp in a fixed pattern. A bias tile read in
plain row order has to be brought into that pattern through shared memory, once for every row of attention that
shares it, which costs more than the two matrix products at head size 32. So the bias is rewritten once per call:

    PACKED[b, h, x/16, y/16, c, lane, v]   c < 8 // V, lane < 32, v < V values of 16 bytes,
    lane = 4 * (x mod 8) + (y/2 mod 4),    8 values c*V + v = 4 * (x/8 mod 2) + 2 * (y/8 mod 2) + (y mod 2)

x counts queries and y keys, or the reverse for the kernel that builds transposed scores. This is the accumulator
pattern of NVIDIA's `mma` and `wgmma`; elsewhere the result is the same and the compiler adds a conversion. Both
axes are padded to TILE; padded keys hold -inf, so that no kernel has to test for the end of the keys.

Vectors along y that are added to every row of a tile (the key mask, and log-sum-exp and delta where scores are
transposed) are permuted in the same spirit, `column_position`: a lane reads the four values of 16 columns that it
needs as one 16-byte vector. Left in plain order the compiler fetches them one by one.
The kernels fetch both one step ahead into registers: led through shared memory by the compiler's pipeline, they
would take more of its bandwidth than everything else.
"""

# ruff: noqa: ANN001, ANN201, ANN202, RUF005 (Triton compiles these functions: an annotation would mean a constant)
# mypy: disable-error-code="no-untyped-def, no-any-return, no-redef, operator, assignment"
import triton
import triton.language as tl

from optimized.ops.names import profiled_as

TILE = 128  # the longest tile of any kernel
PACK = 64  # tile of the packing kernel


@triton.jit
def packed_head(base, b, h, H, x_length, y_length, TILE: tl.constexpr):
    """Start of one head of packed values, [B, H, x_length, y_length]."""
    squares_x = tl.cdiv(x_length, TILE) * (TILE // 16)
    return base + (b * H + h) * squares_x * (tl.cdiv(y_length, TILE) * (TILE // 16)) * 256


@triton.jit
def packed_pointers(base, x_tile, y_blocks, BX: tl.constexpr):
    """Pointers [BX/16, W] of the first 16 columns of row tile `x_tile` of one head; `y_blocks` blocks a row.

    W is 128 pairs of 16-bit values, as 32-bit integers (a pair kept as such takes one register, not two), or 256
    fp32 values.
    """
    if base.dtype.element_ty == tl.float32:
        W: tl.constexpr = 256
        start = base
    else:
        W: tl.constexpr = 128
        start = base.to(tl.pointer_type(tl.int32))
    start += (tl.full((), 0, tl.int64) + x_tile) * (BX // 16 * y_blocks * W)
    return start + ((tl.arange(0, BX // 16) * (y_blocks * W))[:, None] + tl.arange(0, W)[None, :])


@triton.jit
def _side_by_side(blocks):
    """1, 2, 4 or 8 tensors [A, W] as one [A, N, W]; every value stays in its register."""
    N: tl.constexpr = len(blocks)
    A: tl.constexpr = blocks[0].shape[0]
    W: tl.constexpr = blocks[0].shape[1]
    if N == 1:
        x = blocks[0]
    elif N == 2:
        x = tl.join(blocks[0], blocks[1])
    elif N == 4:
        x = tl.join(tl.join(blocks[0], blocks[2]), tl.join(blocks[1], blocks[3]))
    else:
        even = tl.join(tl.join(blocks[0], blocks[4]), tl.join(blocks[2], blocks[6]))
        odd = tl.join(tl.join(blocks[1], blocks[5]), tl.join(blocks[3], blocks[7]))
        x = tl.join(even, odd)
    return tl.permute(tl.reshape(x, (A, W, N)), (0, 2, 1))


@triton.jit
def load_packed(pointers, y_tile, BY: tl.constexpr):
    """The raw tile at columns y_tile * BY: BY/16 blocks [BX/16, W].

    Each block of 16 columns is a load of its own: W is just what the lanes of a warp read, so that every compiler
    gives a warp whole row blocks, as the matrix unit does. (Of a load of the whole tile, Triton 3.7 gives each
    warp half of the columns, and sends every tile through shared memory.) The blocks stay apart until they are
    used: what a loop only hands to its next step, the compiler's pipeline leaves in registers.
    """
    W: tl.constexpr = pointers.shape[1]
    first = pointers + y_tile * (BY // 16 * W)
    blocks = ()
    for j in tl.static_range(BY // 16):
        blocks = blocks + (tl.load(first + j * W),)
    return blocks


@triton.jit
def unpacked(blocks, BX: tl.constexpr, BY: tl.constexpr, TYPE: tl.constexpr):
    """A raw tile of a bias of dtype TYPE as [BX, BY] in fp32; every value stays in its register."""
    raw = _side_by_side(blocks)
    if TYPE == tl.float32:  # noqa: SIM300
        x = tl.permute(tl.reshape(raw, (BX // 16, BY // 16, 2, 8, 4, 2, 2)), (0, 2, 3, 1, 5, 4, 6))
    else:
        if TYPE == tl.bfloat16:  # noqa: SIM300
            even = (raw << 16).to(tl.float32, bitcast=True)
            odd = (raw & -65536).to(tl.float32, bitcast=True)
        else:
            even = raw.to(tl.int16).to(TYPE, bitcast=True).to(tl.float32)
            odd = (raw >> 16).to(tl.int16).to(TYPE, bitcast=True).to(tl.float32)
        x = tl.reshape(tl.join(even, odd), (BX // 16, BY // 16, 8, 4, 2, 2, 2))
        x = tl.permute(x, (0, 4, 2, 1, 5, 3, 6))
    return tl.reshape(x, (BX, BY))


@triton.jit
def plain_order(x, BY: tl.constexpr, VECTOR: tl.constexpr):
    """Packed values [BY/16, 256] of 16 rows as [16, BY]."""
    if VECTOR == 8:
        x = tl.permute(tl.reshape(x, (BY // 16, 8, 4, 2, 2, 2)), (3, 1, 0, 4, 2, 5))
    else:
        x = tl.permute(tl.reshape(x, (BY // 16, 2, 8, 4, 2, 2)), (1, 2, 0, 4, 3, 5))
    return tl.reshape(x, (16, BY))


@triton.jit
def column_position(y):
    """Where element y of a vector along columns is stored."""
    return y // 16 * 16 + y // 2 % 4 * 4 + y // 8 % 2 * 2 + y % 2


@triton.jit
def load_columns(base, y0, BX: tl.constexpr, BY: tl.constexpr):
    """Columns y0 to y0 + BY of a permuted fp32 vector, for every lane and row block: BY/16 blocks [BX/16, 128]."""
    at = tl.zeros((BX // 16, 1), tl.int32) + (tl.arange(0, 128) % 16)[None, :]
    blocks = ()
    for j in tl.static_range(BY // 16):
        blocks = blocks + (tl.load(base + y0 + j * 16 + at),)
    return blocks


@triton.jit
def spread(blocks, BX: tl.constexpr, BY: tl.constexpr):
    """What `load_columns` read, as [BX, BY]: every row the same."""
    x = tl.reshape(_side_by_side(blocks), (BX // 16, BY // 16, 8, 4, 1, 2, 2))
    x = tl.broadcast_to(x, (BX // 16, BY // 16, 8, 4, 2, 2, 2))
    return tl.reshape(tl.permute(x, (0, 4, 2, 1, 5, 3, 6)), (BX, BY))


@triton.jit
def load_bits(base, y0, BY: tl.constexpr):
    """Bits of the keys y0 to y0 + BY of one row of BITS, in one integer or, for 128 of them, two."""
    start = base + y0 // 16
    if BY == 16:
        words = (tl.load(start).to(tl.int32),)
    elif BY == 32:
        words = (tl.load(start.to(tl.pointer_type(tl.int32))),)
    elif BY == 64:
        words = (tl.load(start.to(tl.pointer_type(tl.int64))),)
    else:
        wide = start.to(tl.pointer_type(tl.int64))
        words = (tl.load(wide), tl.load(wide + 1))
    return words


@triton.jit
def kept(words, BY: tl.constexpr):
    """What `load_bits` read as [BY] booleans. The shift that depends on the lane comes first: it is one for all columns."""
    y = tl.arange(0, BY)
    lane = y // 2 % 4 * 2
    if BY == 128:
        bits = (tl.where(y < 64, words[0], words[1]) >> lane) >> (y % 64 - lane)
    else:
        bits = (words[0] >> lane) >> (y - lane)
    return bits & 1 != 0


@triton.jit
def _packed_order(tile, BX: tl.constexpr, BY: tl.constexpr, VECTOR: tl.constexpr):
    """A tile [BX, BY] as [BX/16, BY/16, 256] in packed order: the inverse of `unpacked`, for values of any dtype."""
    x = tl.reshape(tile, (BX // 16, 2, 8, BY // 16, 2, 4, 2))
    x = tl.permute(x, (0, 3, 2, 5, 1, 4, 6)) if VECTOR == 8 else tl.permute(x, (0, 3, 1, 2, 5, 4, 6))
    return tl.reshape(x, (BX // 16, BY // 16, 256))


@triton.jit
def _apart(x):
    """[A, N, W], N 1, 2, 4 or 8, as N tensors [A, W]: the inverse of `_side_by_side`."""
    A: tl.constexpr = x.shape[0]
    N: tl.constexpr = x.shape[1]
    W: tl.constexpr = x.shape[2]
    x = tl.permute(x, (0, 2, 1))
    if N == 1:
        blocks = (tl.reshape(x, (A, W)),)
    elif N == 2:
        blocks = tl.split(x)
    elif N == 4:
        even, odd = tl.split(tl.reshape(x, (A, W, 2, 2)))
        b0, b2 = tl.split(even)
        b1, b3 = tl.split(odd)
        blocks = (b0, b1, b2, b3)
    else:
        even, odd = tl.split(tl.reshape(x, (A, W, 2, 2, 2)))
        b04, b26 = tl.split(even)
        b15, b37 = tl.split(odd)
        b0, b4 = tl.split(b04)
        b2, b6 = tl.split(b26)
        b1, b5 = tl.split(b15)
        b3, b7 = tl.split(b37)
        blocks = (b0, b1, b2, b3, b4, b5, b6, b7)
    return blocks


@triton.jit
def value_pointers(base, x_tile, y_blocks, BX: tl.constexpr):
    """Pointers [BX/16, 256] to single values of the first 16 columns of row tile `x_tile` of one packed head."""
    start = base + (tl.full((), 0, tl.int64) + x_tile) * (BX // 16 * y_blocks * 256)
    return start + ((tl.arange(0, BX // 16) * (y_blocks * 256))[:, None] + tl.arange(0, 256)[None, :])


@triton.jit
def store_packed(pointers, y_tile, tile, BX: tl.constexpr, BY: tl.constexpr):
    """Write a tile [BX, BY] in packed order at columns y_tile * BY, from where the matrix unit left its values.

    `pointers` as of `value_pointers`, of 16 bits or fp32; a block of 16 columns at a time, as `load_packed` reads.
    """
    TYPE: tl.constexpr = pointers.dtype.element_ty
    VECTOR: tl.constexpr = 4 if TYPE == tl.float32 else 8  # noqa: SIM300
    blocks = _apart(_packed_order(tile.to(TYPE), BX, BY, VECTOR))
    first = pointers + y_tile * (BY // 16 * 256)
    for j in tl.static_range(BY // 16):
        tl.store(first + j * 256, blocks[j])


@triton.jit
def _store_square(base, tile, x_tile, y_tile, y_blocks, P: tl.constexpr, VECTOR: tl.constexpr):
    """Write a square tile [P, P] in packed order."""
    blocks = (x_tile * (P // 16) + tl.arange(0, P // 16))[:, None] * y_blocks
    blocks += (y_tile * (P // 16) + tl.arange(0, P // 16))[None, :]
    tl.store(
        base + (blocks * 256)[:, :, None] + tl.arange(0, 256)[None, None, :],
        _packed_order(tile, P, P, VECTOR),
    )


# Not of the bias's strides and lengths: where they are one and multiples of 16, eight values are read at a time.
@triton.jit(
    repr=profiled_as("attention_prepare"),
    do_not_specialize=["H", "packs", "keep_b", "keep_r", "keep_k", "R"],
)
def prepare_kernel(
    BIAS, PACKED, FLIPPED, KEEP, MASK, BITS, LQ, LK, H, s_b, s_h, s_q, s_k, packs, R, keep_b, keep_r, keep_k,
    STRAIGHT: tl.constexpr, TURNED: tl.constexpr, HAS_MASK: tl.constexpr, HAS_BITS: tl.constexpr,
    TILE: tl.constexpr, P: tl.constexpr, VECTOR: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Packs BIAS [B, H, LQ, LK] of any strides into PACKED, if STRAIGHT, and transposed into FLIPPED, if TURNED; writes
    the additive mask, if there is one.

    The first `packs` programs take one tile each; the others write MASK [B, R, LK padded to TILE] fp32, 0 for kept
    keys and -inf for the rest, from KEEP bytes, KEYS at a time; with HAS_BITS also BITS [B, R, LK padded / 16] of
    16 bits, bit y of word x set where key 16 x + y is kept.
    """
    pid = tl.program_id(0).to(tl.int64)
    q_tiles = tl.cdiv(LQ, TILE) * (TILE // P)
    k_tiles = tl.cdiv(LK, TILE) * (TILE // P)
    if pid < packs:
        k_tile = (pid % k_tiles).to(tl.int32)
        q_tile = (pid // k_tiles % q_tiles).to(tl.int32)
        head = pid // k_tiles // q_tiles
        qi = q_tile * P + tl.arange(0, P)
        ki = k_tile * P + tl.arange(0, P)
        source = BIAS + head // H * s_b + head % H * s_h
        at = qi.to(tl.int64)[:, None] * s_q + ki.to(tl.int64)[None, :] * s_k
        tile = tl.load(source + at, mask=(qi < LQ)[:, None] & (ki < LK)[None, :], other=0.0)
        tile = tl.where((ki < LK)[None, :], tile.to(tl.float32), float("-inf")).to(BIAS.dtype.element_ty)
        size = head * q_tiles * k_tiles * (P * P)
        if STRAIGHT:
            _store_square(PACKED + size, tile, q_tile, k_tile, k_tiles * (P // 16), P, VECTOR)
        if TURNED:
            _store_square(FLIPPED + size, tl.trans(tile), k_tile, q_tile, q_tiles * (P // 16), P, VECTOR)
    elif HAS_MASK:
        padded = tl.cdiv(LK, TILE) * TILE
        chunks = tl.cdiv(padded, KEYS)
        line = (pid - packs) // chunks
        keys = ((pid - packs) % chunks).to(tl.int32) * KEYS + tl.arange(0, KEYS)
        flags = KEEP + line // R * keep_b + line % R * keep_r + keys.to(tl.int64) * keep_k
        keep = tl.load(flags, mask=keys < LK, other=0) != 0
        target = MASK + line * padded + column_position(keys)
        tl.store(target, tl.where(keep, 0.0, float("-inf")), mask=keys < padded)
        if HAS_BITS:
            words = tl.sum(tl.reshape(keep.to(tl.int32), (KEYS // 16, 16)) << tl.arange(0, 16)[None, :], 1)
            word = ((pid - packs) % chunks).to(tl.int32) * (KEYS // 16) + tl.arange(0, KEYS // 16)
            tl.store(BITS + line * (padded // 16) + word, words.to(tl.int16), mask=word < padded // 16)
