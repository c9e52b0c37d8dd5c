"""Rope, Hadamard, norms."""

from __future__ import annotations

import math

import pytest
import torch

from seamount.kernels.hadamard import hadamard_transform
from seamount.kernels.norms import layer_norm, rms_norm
from seamount.kernels.rope import (
    apply_rope_half,
    apply_rope_interleaved,
    rope_angles,
    rope_frequencies,
    yarn_frequencies,
)


def test_yarn_frequencies_of_the_published_model() -> None:
    actual = yarn_frequencies(64, theta=10000.0, factor=40.0, original_max_position=4096, dtype=torch.float64)
    for i in range(32):
        plain = 10000.0 ** (-2 * i / 64)
        ramp = min(max((i - 10) / 13, 0), 1)
        assert actual[i].item() == pytest.approx(plain / 40 * ramp + plain * (1 - ramp), rel=1e-12)
    assert torch.allclose(rope_frequencies(64, 10000.0)[:10].double(), actual[:10], rtol=1e-6)


@pytest.mark.parametrize("rows", [0, 1, 65])
@pytest.mark.parametrize("heads", [None, 3])
def test_rope_rotates_pairs(rows: int, heads: int | None, generator: torch.Generator) -> None:
    shape = (rows, 16) if heads is None else (rows, heads, 16)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    positions = torch.randint(0, 100_000, (rows,), generator=generator)
    frequencies = rope_frequencies(16, 10000.0, torch.float64)
    cos, sin = rope_angles(positions, frequencies)
    interleaved, half = apply_rope_interleaved(x, cos, sin), apply_rope_half(x, cos, sin)
    assert interleaved.shape == half.shape == x.shape
    for t in range(rows):
        for i in range(8):
            turn = complex(math.cos(positions[t] * frequencies[i]), math.sin(positions[t] * frequencies[i]))
            for head in [()] if heads is None else [(h,) for h in range(heads)]:
                row, first, second = x[(t, *head)], interleaved[(t, *head)], half[(t, *head)]
                expected = complex(row[2 * i], row[2 * i + 1]) * turn
                assert complex(first[2 * i], first[2 * i + 1]) == pytest.approx(expected, abs=1e-9)
                expected = complex(row[i], row[i + 8]) * turn
                assert complex(second[i], second[i + 8]) == pytest.approx(expected, abs=1e-9)


def test_amplitude_and_dtype() -> None:
    cos, sin = rope_angles(torch.tensor([0, 3]), rope_frequencies(4, 10000.0), amplitude=2.0)
    assert cos.dtype == torch.float32
    assert torch.equal(cos[0], torch.tensor([2.0, 2.0]))
    assert sin[1, 0].item() == pytest.approx(2 * math.sin(3))
    assert apply_rope_half(torch.ones(2, 4, dtype=torch.bfloat16), cos, sin).dtype == torch.bfloat16


@pytest.mark.parametrize("size", [1, 2, 64, 128])
def test_hadamard_is_sylvesters_matrix(size: int, generator: torch.Generator) -> None:
    x = torch.randn((5, 2, size), generator=generator, dtype=torch.float64)
    matrix = torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(size)] for i in range(size)]).double()
    transformed = hadamard_transform(x)
    assert torch.allclose(transformed, x @ matrix / math.sqrt(size), atol=1e-12)
    assert torch.allclose(hadamard_transform(transformed), x, atol=1e-12)
    assert hadamard_transform(x[:0]).shape == (0, 2, size)


def test_hadamard_needs_a_power_of_two() -> None:
    with pytest.raises(ValueError, match="power of two"):
        hadamard_transform(torch.zeros(1, 96))


def test_tables_made_in_inference_mode_serve_outside() -> None:
    with torch.inference_mode():
        hadamard_transform(torch.ones(1, 4, dtype=torch.float64))
    x = torch.ones(1, 4, dtype=torch.float64, requires_grad=True)
    hadamard_transform(x).sum().backward()  # fails on an inference tensor
    assert x.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_norms(dtype: torch.dtype, generator: torch.Generator) -> None:
    x = (torch.randn((7, 40), generator=generator) * 3 + 1).to(dtype)
    weight, bias = torch.randn(40, generator=generator).double(), torch.randn(40, generator=generator).double()
    exact = x.double()
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 0.06}[dtype]
    rms = exact / (exact.pow(2).mean(1, keepdim=True) + 1e-6).sqrt() * weight
    centred = exact - exact.mean(1, keepdim=True)
    layer = centred / (centred.pow(2).mean(1, keepdim=True) + 1e-6).sqrt() * weight + bias
    wide = torch.promote_types(dtype, torch.float32)
    for actual, expected in (
        (rms_norm(x, weight.to(wide), 1e-6), rms),
        (layer_norm(x, weight.to(wide), bias.to(wide), 1e-6), layer),
    ):
        assert actual.dtype == dtype
        assert (actual.double() - expected).abs().max() < tolerance
    assert rms_norm(x[:0], weight.to(wide), 1e-6).shape == (0, 40)
