"""The kernels in Triton: one program works on some groups of 128 elements, from load to store.

The bits are the reference's. A group is one block of signs; no group is shared by two parameters.
Numbers are rounded by integer arithmetic, and launches switch fused multiply-add off, although no
multiply stands next to an add.

Of an if on a constant only the branch taken is compiled; what stands after a return is compiled all
the same, and must have its type. So choices of a format are written with else.
"""

# Triton compiles these functions from their source: shapes and types are its own. It goes on past
# an `if` that returns, so that what follows one is in an `else`.
# ruff: noqa: RET505
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

SIGNS = tl.constexpr(0)
GAUSSIAN = tl.constexpr(1)
FP32 = tl.constexpr(0)
PLANES = tl.constexpr(1)
FP16 = tl.constexpr(2)
BF16_8 = tl.constexpr(3)
BF16_SR = tl.constexpr(4)
LOSSLESS = tl.constexpr(3)
FP8 = tl.constexpr(4)
INT8 = tl.constexpr(5)
INT4 = tl.constexpr(6)
NF4 = tl.constexpr(7)
CELLS = tl.constexpr(4096)
SCALED = tl.constexpr(-1)
TILE_GROUPS = tl.constexpr(8)  # of lossless12, that share an entry of its table
TILE_WORDS = tl.constexpr(128)  # of four bytes, that a tile's codes fill
HEAD = tl.constexpr(64)  # bytes before the table
MAGIC = tl.constexpr(0x32314C5A)  # "ZL12" in a word
# What tl.sum and tl.cumsum add with. Interpreted, those two cannot be called in a process that had
# imported Triton before it was to interpret, and of any other function they make a loop.
ADDED = tl.standard._sum_combine
FIELDS = tl.constexpr(4)  # of a draw: seed, low and high, step, probe with stream
# For 1 and multiples of 16 they would be compiled anew, in the middle of a run: with lag the number
# of steps grows, and every unit has as many groups as it has.
NUMBERS = [
    "count", "per_draw", "num_steps", "num_all", "point", "width", "offset", "parameter",
    "elements", "first", "num_bytes",
]  # fmt: skip


@triton.jit
def philox(k0, k1, c0, c1, c2, c3):
    """Ten rounds of Philox4x32 (Salmon et al. 2011) on uint32 tensors of one shape."""
    m0 = tl.full(c0.shape, 0xD2511F53, tl.uint32)
    m1 = tl.full(c0.shape, 0xCD9E8D57, tl.uint32)
    w0 = tl.full((1,), 0x9E3779B9, tl.uint32)
    w1 = tl.full((1,), 0xBB67AE85, tl.uint32)
    k0 = tl.full((1,), 0, tl.uint32) + k0
    k1 = tl.full((1,), 0, tl.uint32) + k1
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, m0), c0 * m0
        high1, low1 = tl.umulhi(c2, m1), c2 * m1
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 += w0
        k1 += w1
    return c0, c1, c2, c3


@triton.jit
def random_words(draw, stream, parameter, block, COUNT: tl.constexpr):
    """Words ``[groups, COUNT, 4]`` of COUNT consecutive blocks a group, in order."""
    k0, k1 = tl.load(draw), tl.load(draw + 1)
    step, probe = tl.load(draw + 2), tl.load(draw + 3)
    c0 = block[:, None] * COUNT + tl.arange(0, COUNT)[None, :].to(tl.uint32)
    zero = c0 * 0
    c1, c2, c3 = zero + parameter[:, None], zero + step, zero + (probe | stream << 16)
    x0, x1, x2, x3 = philox(k0, k1, c0, c1, c2, c3)
    return tl.join(tl.join(x0, x2), tl.join(x1, x3))  # [groups, COUNT, 2, 2]: word 2 i + j


@triton.jit
def random_halves(draw, stream, parameter, block, GROUPS: tl.constexpr):
    """Sixteen-bit lanes ``[groups, 128]``."""
    words = random_words(draw, stream, parameter, block, 16)
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), (GROUPS, 128))


@triton.jit
def random_bytes(draw, stream, parameter, block, GROUPS: tl.constexpr):
    """Bytes ``[groups, 128]``."""
    words = tl.reshape(random_words(draw, stream, parameter, block, 8), (GROUPS, 32))
    shifts = tl.arange(0, 4).to(tl.uint32) * 8
    return tl.reshape(words[:, :, None] >> shifts[None, None, :] & 0xFF, (GROUPS, 128))


@triton.jit
def terms(draw, values, parameter, block, scale, GROUPS: tl.constexpr, DIRECTION: tl.constexpr):
    """``coefficient * scale * z``, fp32 ``[groups, 128]``.

    ``values`` holds, a scale, the coefficient (signs) or its table (gaussian).
    """
    if DIRECTION == SIGNS:
        words = tl.reshape(random_words(draw, 0, parameter, block, 1), (GROUPS, 4))
        shifts = tl.arange(0, 32).to(tl.uint32)
        bits = tl.reshape(words[:, :, None] >> shifts[None, None, :] & 1, (GROUPS, 128))
        coefficient = tl.load(values + scale).to(tl.uint32, bitcast=True)
        return (coefficient[:, None] ^ bits << 31).to(tl.float32, bitcast=True)
    else:
        cell = random_halves(draw, 0, parameter, block, GROUPS) & 0xFFF
        return tl.load(values + scale[:, None] * CELLS + cell.to(tl.int32))


@triton.jit
def canonical(value):
    """The bits of fp32 values, every NaN as one."""
    bits = value.to(tl.uint32, bitcast=True)
    return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC00000, bits).to(tl.uint32)


@triton.jit
def dithered(bits, random):
    """Bits with random ones added below, except to infinities and NaN."""
    special = (bits & 0x7F800000) == 0x7F800000
    return bits + tl.where(special, 0, random).to(tl.uint32)


@triton.jit
def as_float(bits):
    """fp32 values of bits."""
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def seen(wire, FORMAT: tl.constexpr):
    """What the forward sees, in fp32, of loaded wire elements."""
    if FORMAT == FP32:
        return wire
    elif FORMAT == FP16:
        return wire.to(tl.float32)
    else:
        return as_float(wire.to(tl.uint16, bitcast=True).to(tl.uint32) << 16)


@triton.jit
def code_at(codes, group, within, mask):
    """Four-bit codes: of every 128, the first 64 are low halves, the last 64 high halves."""
    byte = tl.load(codes + group.to(tl.int64)[:, None] * 64 + within % 64, mask, 0).to(tl.int32)
    return byte >> within // 64 * 4 & 15


@triton.jit
def fp8_value(code):
    """E4M3 in fp32: by integers where normal, exactly where not."""
    size = code.to(tl.uint32) & 127
    denormal = (size & 7).to(tl.float32) * 0.001953125
    normal = as_float((size << 20) + (120 << 23))
    bits = tl.where(size < 8, denormal, normal).to(tl.uint32, bitcast=True)
    bits = tl.where(size == 127, 0x7FC00000, bits).to(tl.uint32)
    return as_float(bits | (code.to(tl.uint32) & 128) << 24)


@triton.jit
def unpacked(codes, scales, nf4, group, within, mask, CODEC: tl.constexpr, PER_SCALE: tl.constexpr):
    """What packed elements with group scales mean, fp32 ``[groups, 128]``; one product each."""
    at = group.to(tl.int64)[:, None] * 128 + within
    bits = tl.load(scales + at // PER_SCALE, mask, 0).to(tl.uint16, bitcast=True)
    scale = as_float(bits.to(tl.uint32) << 16)
    if CODEC == INT8:
        value = tl.load(codes + at, mask, 0).to(tl.int8, bitcast=True).to(tl.float32)
    if CODEC == FP8:
        value = fp8_value(tl.load(codes + at, mask, 0))
    if CODEC == INT4:
        value = ((code_at(codes, group, within, mask) ^ 8) - 8).to(tl.float32)
    if CODEC == NF4:
        value = tl.load(nf4 + code_at(codes, group, within, mask))
    return as_float(canonical(value * scale))


@triton.jit
def padded(num_bytes):
    """To whole lines of 64."""
    return (num_bytes + 63) // 64 * 64


@triton.jit
def num_escaped(words):
    """How many of a word's eight four-bit codes are 15, as int32."""
    words = words.to(tl.uint32, bitcast=True)
    ones = words & words >> 1 & words >> 2 & words >> 3 & 0x11111111
    return (ones * 0x11111111 >> 28).to(tl.int32)


@triton.jit
def header_is_wrong(words, elements, escapes_at, num_bytes):
    """Whether a lossless12 header is not that of a span of so many elements, as int32."""
    kind = tl.load(words + 1)
    mode, top = kind >> 8 & 255, kind >> 16 & 255
    escapes = tl.load(words + 4).to(tl.uint32, bitcast=True).to(tl.int64)
    length = tl.load(words + 6).to(tl.uint32, bitcast=True).to(tl.int64)
    due = tl.where(mode == 1, padded(escapes_at + escapes), HEAD + 2 * elements)
    wrong = (tl.load(words) != MAGIC) | ((kind & 255) != 1) | (mode > 1)
    wrong |= tl.load(words + 2).to(tl.uint32, bitcast=True).to(tl.int64) != elements
    wrong |= tl.where(mode == 1, (escapes > elements) | (top < 14), escapes != 0)
    wrong |= (length != due) | (length > num_bytes)
    high = tl.load(words + 3) | tl.load(words + 5) | tl.load(words + 7)  # of 64 bits each
    return (wrong | (high != 0)).to(tl.int32)


@triton.jit
def lossless(
    packed, words, elements, first, num_bytes, group, inside, damage, GROUPS: tl.constexpr
):
    """What lossless12 means, fp32 ``[groups, 128]`` from group ``first`` of the span on.

    ``words`` are the same bytes, four at a time. Nothing is read beyond ``num_bytes``, whatever
    they say, and ``damage`` is set where they contradict each other.
    """
    elements = elements.to(tl.int64)
    tiles = (elements + 1023) // 1024
    planes = HEAD + padded(4 * (tiles + 1))
    codes = planes + elements
    escapes_at = codes + elements // 2
    wrong = header_is_wrong(words, elements, escapes_at, num_bytes)
    kind = tl.load(words + 1)
    group = group.to(tl.int64) + first
    within = tl.arange(0, 128)[None, :]
    at = group[:, None] * 128 + within
    mask = inside[:, None] & (within >= 0)
    if (kind >> 8 & 255) == 0:
        raw = packed + HEAD + 2 * at
        here = mask & (HEAD + 2 * at + 1 < num_bytes)
        bits = tl.load(raw, here, 0).to(tl.uint32) | tl.load(raw + 1, here, 0).to(tl.uint32) << 8
    else:
        plane = tl.load(packed + planes + at, mask, 0).to(tl.uint32)
        code = code_at(packed + codes, group, within, mask)
        escaped = (code == 15) & mask
        mine = escaped.to(tl.int32)
        tile, place = group // TILE_GROUPS, group % TILE_GROUPS
        word = tl.arange(0, TILE_WORDS)[None, :]
        before_me = inside[:, None] & (word < place[:, None] * (TILE_WORDS // TILE_GROUPS))
        earlier = words + codes // 4 + tile[:, None] * TILE_WORDS + word
        prior = tl.reduce(num_escaped(tl.load(earlier, before_me, 0)), 1, ADDED).to(tl.int64)
        table = words + HEAD // 4 + tile
        begin = tl.load(table, inside, 0).to(tl.uint32, bitcast=True).to(tl.int64)
        end = tl.load(table + 1, inside, 0).to(tl.uint32, bitcast=True).to(tl.int64)
        index = (begin + prior)[:, None] + tl.associative_scan(mine, 1, ADDED) - mine
        here = escaped & (index < num_bytes - escapes_at)
        exponent = tl.load(packed + escapes_at + index, here, 0).to(tl.int32)
        exponent = tl.where(escaped, exponent, (kind >> 16 & 255) - code) & 255
        bits = (plane & 128) << 8 | exponent.to(tl.uint32) << 7 | plane & 127
        # A tile has as many as the table says, and all of them together as many as the header.
        reached = begin + prior + tl.reduce(mine, 1, ADDED).to(tl.int64)
        is_last = (place == TILE_GROUPS - 1) | (group == elements // 128 - 1)
        escapes = tl.load(words + 4).to(tl.uint32, bitcast=True).to(tl.int64)
        bad = (reached > end) | (is_last & (reached != end)) | ((tile == 0) & (begin != 0))
        bad |= (tile == tiles - 1) & (end != escapes)
        wrong += tl.reduce((bad & inside).to(tl.int32), 0, ADDED)
    tl.store(damage, 1, wrong != 0)
    return as_float((bits << 16).to(tl.uint32))


@triton.jit
def to_forward(bits, FORMAT: tl.constexpr):
    """fp32 bits, canonical, as the forward's type: nearest."""
    if FORMAT == FP32:
        return as_float(bits)
    elif FORMAT == FP16:
        half = as_float(bits).to(tl.float16).to(tl.uint16, bitcast=True)
        half = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7E00, half)  # a device has its own
        return half.to(tl.uint16).to(tl.float16, bitcast=True)
    else:
        return ((bits + 0x8000) >> 16).to(tl.uint16).to(tl.int16, bitcast=True)


@triton.jit
def moved(
    value, s, decays, starts, draws, values, per_draw, parameter, block, scale,
    GROUPS: tl.constexpr, DIRECTION: tl.constexpr,
):  # fmt: skip
    """Values after step ``s``, fp32."""
    decay = tl.load(decays + s)
    shrunk = as_float(canonical((value.to(tl.float64) * decay).to(tl.float32)))
    value = tl.where(decay == 1.0, value, shrunk)
    begin, end = tl.load(starts + s), tl.load(starts + s + 1)
    total = tl.full(value.shape, 0.0, tl.float32)
    for d in range(begin, end):
        term = terms(
            draws + d * FIELDS, values + d * per_draw, parameter, block, scale, GROUPS, DIRECTION
        )
        total = tl.where(d == begin, term, total + term)
    return tl.where(end > begin, as_float(canonical(value - total)), value)


@triton.jit(do_not_specialize=NUMBERS)
def work(
    wire,
    rest,
    out,
    table,  # int32 [3, groups]: parameter, block, number of the scale
    count,  # groups
    draws,  # uint32 [draws, FIELDS]
    values,  # fp32 [draws, scales (, CELLS)]
    per_draw,  # elements of `values` a draw
    decays,  # float64 [steps]
    starts,  # int32 [steps + 1]: draws of a step
    roundings,  # uint32 [steps, FIELDS]
    num_steps,  # that masters take
    num_all,  # with those that only the perturbed copy takes, after them
    point,  # draw of the perturbed copy
    scales,  # bits of bfloat16, of a wire whose groups have them
    nf4,  # fp32 [16]
    words,  # int32, the bytes of a lossless12 wire, of which `wire` is the beginning
    elements,  # of its whole span
    first,  # group of it that the stretch begins with
    num_bytes,  # that the wire has
    damage,  # int32 [1], set where they are no lossless12
    GROUPS: tl.constexpr,
    FORMAT: tl.constexpr,
    WIRE: tl.constexpr,  # how the wire's elements are read: as a format's, or (-1) by scales
    CODEC: tl.constexpr,
    PER_SCALE: tl.constexpr,
    DIRECTION: tl.constexpr,
    UPDATES: tl.constexpr,
    PERTURBS: tl.constexpr,
    DITHERS: tl.constexpr,
):
    """Update a stretch's masters, and write one perturbed copy of it."""
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    inside = group < count
    parameter = tl.load(table + group, inside, 0).to(tl.uint32, bitcast=True)
    block = tl.load(table + count + group, inside, 0).to(tl.uint32, bitcast=True)
    scale = tl.load(table + 2 * count + group, inside, 0)
    within = tl.arange(0, 128)[None, :]
    at = group.to(tl.int64)[:, None] * 128 + within
    mask = inside[:, None] & (within >= 0)
    if CODEC == LOSSLESS:
        value = lossless(wire, words, elements, first, num_bytes, group, inside, damage, GROUPS)
    elif WIRE == SCALED:
        value = unpacked(wire, scales, nf4, group, within, mask, CODEC, PER_SCALE)
    else:
        value = seen(tl.load(wire + at, mask, 0), WIRE)
    if UPDATES:
        if FORMAT == FP16:
            value = tl.load(rest + at, mask, 0)
        if FORMAT == PLANES:
            low = tl.load(rest + at, mask, 0).to(tl.int32).to(tl.uint32, bitcast=True)
            value = as_float(value.to(tl.uint32, bitcast=True) + low)
        if FORMAT == BF16_8:
            low = tl.load(rest + at, mask, 0).to(tl.int32).to(tl.uint32, bitcast=True)
            value = as_float(value.to(tl.uint32, bitcast=True) + (low << 8))
        for s in range(num_steps):
            value = moved(
                value, s, decays, starts, draws, values, per_draw, parameter, block, scale,
                GROUPS, DIRECTION,
            )  # fmt: skip
            if FORMAT == BF16_SR:
                random = random_halves(roundings + s * FIELDS, 2, parameter, block, GROUPS)
                bits = dithered(value.to(tl.uint32, bitcast=True), random)
                value = as_float(bits >> 16 << 16)
            if FORMAT == BF16_8:
                random = random_bytes(roundings + s * FIELDS, 2, parameter, block, GROUPS)
                bits = dithered(value.to(tl.uint32, bitcast=True), random)
                value = as_float(bits >> 8 << 8)
        bits = value.to(tl.uint32, bitcast=True)
        if FORMAT == FP16:
            tl.store(rest + at, value, mask)
        if FORMAT == PLANES:
            tl.store(rest + at, bits.to(tl.uint16).to(tl.int16, bitcast=True), mask)
        if FORMAT == BF16_8:
            tl.store(rest + at, (bits >> 8).to(tl.uint8).to(tl.int8, bitcast=True), mask)
        held = to_forward(bits, FORMAT)
        tl.store(wire + at, held, mask)
        value = seen(held, FORMAT)
    if PERTURBS:
        for s in range(num_steps, num_all):
            value = moved(
                value, s, decays, starts, draws, values, per_draw, parameter, block, scale,
                GROUPS, DIRECTION,
            )  # fmt: skip
        draw = draws + point * FIELDS
        term = terms(draw, values + point * per_draw, parameter, block, scale, GROUPS, DIRECTION)
        bits = canonical(value + term)
        if DITHERS:
            bits = dithered(bits, random_halves(draw, 1, parameter, block, GROUPS))
            tl.store(out + at, (bits >> 16).to(tl.uint16).to(tl.int16, bitcast=True), mask)
        else:
            tl.store(out + at, to_forward(bits, FORMAT), mask)


@triton.jit(do_not_specialize=NUMBERS)
def unpack_lossless(
    packed,
    words,
    elements,
    first,
    num_bytes,
    damage,
    out,
    count,  # groups
    GROUPS: tl.constexpr,
    FORMAT: tl.constexpr,  # of what is written
):
    """Decode a stretch of a lossless12 span."""
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    inside = group < count
    value = lossless(packed, words, elements, first, num_bytes, group, inside, damage, GROUPS)
    within = tl.arange(0, 128)[None, :]
    at = group.to(tl.int64)[:, None] * 128 + within
    mask = inside[:, None] & (within >= 0)
    if FORMAT == FP32:
        tl.store(out + at, value, mask)
    else:
        tl.store(out + at, to_forward(canonical(value), FORMAT), mask)


@triton.jit(do_not_specialize=NUMBERS)
def work_rows(
    values,  # [rows, width] of the wire, perturbed in place
    rows,  # int64 [rows]: their numbers in the parameter, or the part of it
    width,
    offset,  # elements of the parameter before the part
    parameter,
    draw,  # uint32 [FIELDS]
    terms_of,  # fp32 [1] or [CELLS]
    GROUPS: tl.constexpr,
    FORMAT: tl.constexpr,
    DIRECTION: tl.constexpr,
):
    """Perturb gathered rows. A row begins anywhere in its first group of 128 elements."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.load(rows + row).to(tl.int64) * width + offset
    group = start // 128 + tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    column = group[:, None] * 128 + tl.arange(0, 128)[None, :] - start
    mask = (column >= 0) & (column < width)
    at = row * width + column
    value = seen(tl.load(values + at, mask, 0), FORMAT)
    block = group.to(tl.uint32)
    index = (block * 0 + parameter).to(tl.uint32)  # a number above 2^31 is passed as 64 bits
    term = terms(draw, terms_of, index, block, tl.arange(0, GROUPS) * 0, GROUPS, DIRECTION)
    tl.store(values + at, to_forward(canonical(value + term), FORMAT), mask)
