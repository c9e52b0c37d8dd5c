"""The block-scaled FP8 product of very few tokens: the weight streams through registers, without tensor cores.

    out[m, n] as in fp8_gemm.py, in float32 throughout

Gluon, Hopper. A program of four warps has 4 weight rows, whose channels (K) the warps share out, or 16, 4 a warp, where
K is short. A thread reads 16 bytes of each of 4 rows at a time, the next ones already on their way, turns them into
float32, multiplies them by the tokens' 16 channels, and adds the sums, by both scales, to its totals. At the end these
are added up, in an order that depends on the shape alone; no K is split over programs. Seven programs fit on a
multiprocessor, which keeps 57 KB of the weight on its way, in runs of 512 bytes of a row or more; as programs are
short, all multiprocessors end at about the same time.
Bytes: N K + 2 M N; the tokens come from the L1, which the weight does not enter.
"""

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

MAX_TOKENS = 2
"""With four, multiplying takes longer than reading."""
_WARPS = 4

# Four e4m3 of a word as four float32.
_UNPACK = gl.constexpr("""{
    .reg .b16 low, high, a, b, c, d;
    .reg .b32 first, second;
    mov.b32 {low, high}, $4;
    cvt.rn.f16x2.e4m3x2 first, low;
    cvt.rn.f16x2.e4m3x2 second, high;
    mov.b32 {a, b}, first;
    mov.b32 {c, d}, second;
    cvt.f32.f16 $0, a;
    cvt.f32.f16 $1, b;
    cvt.f32.f16 $2, c;
    cvt.f32.f16 $3, d;
}""")


@gluon.constexpr_function
def _layout(rows, tokens, warps, warps_k):
    """[rows, tokens, 16-byte pieces of a row, 4 words]: a warp holds 32 adjacent pieces of some rows and all tokens."""
    return gl.BlockedLayout(
        [rows * warps_k // warps, tokens, 1, 4], [1, 1, 32, 1], [warps // warps_k, 1, warps_k, 1], [3, 2, 1, 0]
    )


@gluon.jit
def _unpack(words):
    return gl.inline_asm_elementwise(
        _UNPACK,
        "=f,=f,=f,=f,r",
        [words],
        dtype=(gl.float32, gl.float32, gl.float32, gl.float32),
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _pointers(ptr, last_row, row_words, ROWS: gl.constexpr, PIECES: gl.constexpr, LAYOUT: gl.constexpr):
    """To the words [ROWS, PIECES, 4] of the first pieces of rows, the last one repeated; and each word's K block."""
    row = gl.minimum(gl.arange(0, ROWS, layout=gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT))), last_row)
    piece = gl.arange(0, PIECES, layout=gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))
    word = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))
    at = piece[None, :, None] * 4 + word[None, None, :]
    return ptr + (row[:, None, None] * row_words + at), row[:, None, None] * 0 + at // 32


@gluon.jit
def _read(pointers, blocks, block, num_blocks, WHOLE: gl.constexpr):
    """Weight words, token words and scales from K block ``block`` on; zeros past the end."""
    weights, tokens, x_scales, w_scales = pointers
    of_weights, of_tokens, of_scales = blocks
    if WHOLE:
        w = gl.load(weights + block * 32, cache_modifier=".cg")
        x = gl.load(tokens + block * 32)
        scale = gl.load(x_scales + block) * gl.load(w_scales + block)[None, :]
    else:
        w = gl.load(weights + block * 32, mask=of_weights + block < num_blocks, other=0, cache_modifier=".cg")
        x = gl.load(tokens + block * 32, mask=of_tokens + block < num_blocks, other=0)
        inside = of_scales + block < num_blocks
        scale = gl.load(x_scales + block, mask=inside[None, :], other=0.0)
        scale *= gl.load(w_scales + block, mask=inside, other=0.0)[None, :]
    return w, x, scale


@gluon.jit
def _add(total, w, x, scale):
    w0, w1, w2, w3 = _unpack(w)
    x0, x1, x2, x3 = _unpack(x)
    products = w0[:, None] * x0[None]  # [ROWS, TOKENS, PIECES, 4]
    products += w1[:, None] * x1[None]
    products += w2[:, None] * x2[None]
    products += w3[:, None] * x3[None]
    return total + gl.sum(products, 3) * scale[None]


@gluon.jit(do_not_specialize=["num_rows", "num_blocks"])
def _gemm_kernel(
    x, x_scale, weight, weight_scale, out, num_rows, num_columns, num_blocks,
    TOKENS: gl.constexpr, ROWS: gl.constexpr, WARPS_K: gl.constexpr, WHOLE: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    # Launched before the kernel ahead in the stream has ended; whatever reads or writes memory waits for that end.
    gdc_launch_dependents()
    gdc_wait()
    LAYOUT: gl.constexpr = _layout(ROWS, TOKENS, num_warps, WARPS_K)
    TOTAL: gl.constexpr = gl.SliceLayout(3, LAYOUT)
    SCALES: gl.constexpr = gl.SliceLayout(0, TOTAL)
    OUT: gl.constexpr = gl.SliceLayout(2, TOTAL)
    PIECES: gl.constexpr = WARPS_K * 32
    BLOCKS: gl.constexpr = WARPS_K * 4
    first = gl.program_id(0).to(gl.int64) * ROWS
    last_row = (num_columns - 1 - first).to(gl.int32)
    weight += first * (num_blocks * 32)
    weights, of_weights = _pointers(weight, last_row, num_blocks * 32, ROWS, PIECES, gl.SliceLayout(1, LAYOUT))
    tokens, of_tokens = _pointers(x, num_rows - 1, num_blocks * 32, TOKENS, PIECES, gl.SliceLayout(0, LAYOUT))
    of_scales = gl.arange(0, PIECES, layout=gl.SliceLayout(0, SCALES)) // 8
    token = gl.minimum(gl.arange(0, TOKENS, layout=gl.SliceLayout(1, SCALES)), num_rows - 1)
    x_scales = x_scale + token[:, None] * num_blocks + of_scales[None, :]
    pointers = (weights, tokens, x_scales, weight_scale + first // 128 * num_blocks + of_scales)
    blocks = (of_weights, of_tokens, of_scales)

    total = gl.zeros([ROWS, TOKENS, PIECES], gl.float32, TOTAL)
    w, x_words, scale = _read(pointers, blocks, 0, num_blocks, WHOLE)
    for block in range(BLOCKS, num_blocks, BLOCKS):
        next_w, next_x, next_scale = _read(pointers, blocks, block, num_blocks, WHOLE)
        total = _add(total, w, x_words, scale)
        w, x_words, scale = next_w, next_x, next_scale
    total = gl.sum(_add(total, w, x_words, scale), 2)
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, OUT))[:, None]
    token = gl.arange(0, TOKENS, layout=gl.SliceLayout(0, OUT))[None, :]
    at = out + first + (token.to(gl.int64) * num_columns + row)
    gl.store(at, total.to(gl.bfloat16), mask=(row <= last_row) & (token < num_rows))


def launch_stream(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """``fp8_gemm`` of operands that are not empty, on a Hopper GPU; at most ``MAX_TOKENS`` tokens are quick."""
    (rows, channels), columns = x.shape, weight.shape[0]
    out = torch.empty((rows, columns), dtype=torch.bfloat16, device=x.device)
    warps_k = 4 if channels >= 2048 else 1
    program_rows = 16 // warps_k
    _gemm_kernel[(triton.cdiv(columns, program_rows),)](
        x.view(torch.int32), x_scale, weight.view(torch.int32), weight_scale, out, rows, columns, channels // 128,
        TOKENS=triton.next_power_of_2(rows), ROWS=program_rows, WARPS_K=warps_k,
        WHOLE=channels % (512 * warps_k) == 0, num_warps=_WARPS, launch_pdl=True,
    )  # fmt: skip
    return out
