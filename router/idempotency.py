"""Idempotency keys of RunTurn, by what became of the key's turn:

committed               the stored record is replayed
cancelled               the cancellation is replayed
failed for good         (deadline passed, refused, quarantined …) the failure is replayed
failed for now          (Unavailable, ResourceExhausted, Aborted, Internal, DataLoss) forgotten: a retry runs anew
running                 the caller learns who runs it, and follows it
another request's body  AlreadyExists
"""

from __future__ import annotations

import hashlib

import grpc
from google.protobuf.message import Message
from google.rpc import status_pb2

from seamount.v1 import events_pb2
from seamount.wire.errors import InvalidArgument, from_status

_FAILED_FOR_NOW = frozenset(
    code.value[0]
    for code in (
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.DATA_LOSS,
    )
)


def body_hash(request: Message) -> bytes:
    """SHA-256 that is equal for equal requests; 32 bytes."""
    name = request.DESCRIPTOR.full_name.encode()
    return hashlib.sha256(name + b"\0" + request.SerializeToString(deterministic=True)).digest()


def is_for_good(event: events_pb2.TurnEvent) -> bool:
    """Whether the key is answered by this last event from now on. Raises InvalidArgument (final_event)."""
    match event.WhichOneof("event"):
        case "finished":
            return True
        case "failed":
            status = status_pb2.Status.FromString(event.failed.status.SerializeToString())
            return status.code not in _FAILED_FOR_NOW or from_status(status).reason == "REQUEST_QUARANTINED"
    raise InvalidArgument("a turn ends with `finished` or `failed`", field="final_event")
