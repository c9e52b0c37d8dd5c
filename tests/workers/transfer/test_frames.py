import random

import pytest
import torch

from seamount.wire.errors import DataLoss
from seamount.workers.transfer.frames import (
    HEADER_BYTES,
    MAX_FRAME_TOKENS,
    Frame,
    FrameHeader,
    FrameKind,
    FrameShape,
    alive_frame,
    checksum,
    data_frame,
    end_frame,
    is_intact,
    split_payload,
)

SHAPE = FrameShape(num_layers=5, latent_bytes=164, index_bytes=68)


@pytest.fixture
def rng() -> random.Random:
    seed = random.SystemRandom().randrange(2**31)
    print(f"seed {seed}")
    torch.manual_seed(seed)
    return random.Random(seed)


def random_frame(count: int, layer: int = 3, first: int = 77, transfer_id: int = 2**40) -> Frame:
    rows = torch.randint(256, (count, SHAPE.token_bytes), dtype=torch.uint8)
    return data_frame(transfer_id, layer, first, rows[:, : SHAPE.latent_bytes], rows[:, SHAPE.latent_bytes :])


def header_of(frame: Frame, shape: FrameShape = SHAPE) -> FrameHeader:
    return FrameHeader.unpack(frame.header.numpy().tobytes(), shape)


@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, MAX_FRAME_TOKENS])
def test_rows_come_out_as_they_went_in(rng: random.Random, count: int) -> None:
    latent = torch.randint(256, (count, SHAPE.latent_bytes), dtype=torch.uint8)
    index = torch.randint(256, (count, SHAPE.index_bytes), dtype=torch.uint8)
    frame = data_frame(9, 4, 1234, latent, index)
    header = header_of(frame)
    assert (header.kind, header.transfer_id, header.layer, header.first, header.count) == (
        FrameKind.DATA,
        9,
        4,
        1234,
        count,
    )
    assert frame.payload is not None
    assert frame.payload.numel() == SHAPE.payload_bytes(count)
    assert frame.num_bytes == HEADER_BYTES + SHAPE.payload_bytes(count)
    assert is_intact(header, frame.payload)
    got_latent, got_index = split_payload(header, frame.payload)
    assert torch.equal(got_latent, latent)
    assert torch.equal(got_index, index)


def test_the_checksum_is_the_formula(rng: random.Random) -> None:
    frame = random_frame(3)
    header = header_of(frame)
    assert frame.payload is not None
    raw = bytearray(frame.header.numpy().tobytes() + frame.payload.numpy().tobytes())
    raw[40:48] = bytes(8)
    words = [int.from_bytes(raw[i : i + 8], "little") for i in range(0, len(raw), 8)]
    assert header.checksum == sum(word * (2 * i + 1) for i, word in enumerate(words)) % 2**64


def test_every_flipped_bit_is_seen(rng: random.Random) -> None:
    frame = random_frame(5)
    assert frame.payload is not None
    header = header_of(frame)
    for bit in rng.sample(range(frame.payload.numel() * 8), 300):
        frame.payload[bit // 8] ^= 1 << bit % 8
        assert not is_intact(header, frame.payload), bit
        frame.payload[bit // 8] ^= 1 << bit % 8
    assert is_intact(header, frame.payload)


def test_a_damaged_header_is_refused_or_fails_the_checksum(rng: random.Random) -> None:
    for frame in (random_frame(5), end_frame(7), alive_frame()):
        good = frame.header.numpy().tobytes()
        for bit in range(HEADER_BYTES * 8):
            raw = bytearray(good)
            raw[bit // 8] ^= 1 << bit % 8
            try:
                header = FrameHeader.unpack(bytes(raw), SHAPE)
            except DataLoss:
                continue
            assert not is_intact(header, frame.payload), bit


def test_words_that_change_places_are_seen(rng: random.Random) -> None:
    frame = random_frame(64)
    assert frame.payload is not None
    words = frame.payload.view(torch.int64)
    swapped = words.clone()
    swapped[1], swapped[200] = words[200], words[1]
    assert words[1] != words[200]
    assert not is_intact(header_of(frame), swapped.view(torch.uint8))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layer", 5),
        ("layer", 2**32 - 1),
        ("count", 0),
        ("count", MAX_FRAME_TOKENS + 1),
        ("count", 2**32 - 1),
        ("latent_bytes", 165),
        ("index_bytes", 2**32 - 1),
    ],
)
def test_sizes_are_this_ranks_own_never_the_senders(field: str, value: int) -> None:
    fields = {"layer": 1, "first": 0, "count": 1, "latent_bytes": 164, "index_bytes": 68} | {field: value}
    with pytest.raises(DataLoss) as caught:
        FrameHeader.unpack(FrameHeader(kind=FrameKind.DATA, **fields).pack(), SHAPE)
    assert caught.value.reason == "BAD_FRAME"


def test_foreign_bytes_are_refused(rng: random.Random) -> None:
    good = end_frame(1).header.numpy().tobytes()
    for raw in (b"GET " + good[4:], good[:4] + b"\x02\x00" + good[6:], good[:6] + b"\x09\x00" + good[8:], bytes(48)):
        with pytest.raises(DataLoss):
            FrameHeader.unpack(raw, SHAPE)
    with pytest.raises(DataLoss):
        FrameHeader.unpack(FrameHeader(kind=FrameKind.END, count=3).pack(), SHAPE)


def test_frames_without_rows_are_sealed_too() -> None:
    for frame in (end_frame(3), alive_frame()):
        assert frame.payload is None
        assert is_intact(header_of(frame), None)
    assert header_of(end_frame(3)).transfer_id == 3
    assert checksum(header_of(end_frame(3)), None) != checksum(header_of(end_frame(4)), None)
    assert SHAPE.payload_bytes(0) == 0
