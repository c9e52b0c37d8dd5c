"""Seconds as protobuf carries them."""

from __future__ import annotations

from google.protobuf import duration_pb2


def duration(seconds: float) -> duration_pb2.Duration:
    """``seconds`` as a Duration, to the nanosecond; a negative one stays negative, for the receiver to refuse."""
    result = duration_pb2.Duration()
    result.FromNanoseconds(int(seconds * 1e9))
    return result
