"""The error tree and its one mapping to ``google.rpc.Status``.

    SeamountError
    ├── InvalidArgument       a field is wrong whatever the state: names the field, the limit and the remedy
    ├── NotFound              no such session, turn, model (also: another tenant's)
    ├── AlreadyExists         an idempotency key was used before with another body
    ├── FailedPrecondition    right request, wrong state (missing tool result, session closed …)
    ├── Aborted               lost a race (stale epoch or head, turn in progress): read, then retry
    ├── OutOfRange            a position beyond what exists
    ├── ResourceExhausted     no pages, no quota: retry after ``retry_after_s``
    ├── Unauthenticated       no or wrong credentials
    ├── PermissionDenied      known caller, not allowed
    ├── Unavailable           a part is away (Redis, ranks): retry after ``retry_after_s``
    ├── DeadlineExceeded      the turn's or the call's own deadline passed
    ├── Cancelled             the caller asked for it
    ├── DataLoss              stored state is damaged or missing; never answered by an empty history
    └── Internal              a defect of ours

Every error carries ``ErrorInfo{reason, domain, metadata}``; ``InvalidArgument`` also ``BadRequest``, those with a time
also ``RetryInfo``, ``ResourceExhausted`` also ``QuotaFailure``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

DOMAIN = "seamount"
_STATUS_KEY = "grpc-status-details-bin"


class SeamountError(Exception):
    """Base of the tree.

    reason: constant UPPER_SNAKE name, stable across versions; message: says what is wrong and what to do, never echoes
    content; metadata: figures for programs (counts, limits, ids), strings both.
    """

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL

    def __init__(
        self,
        message: str,
        *,
        reason: str,
        field: str | None = None,
        retry_after_s: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason
        self.field = field
        self.retry_after_s = retry_after_s
        self.metadata = dict(metadata or {})

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.reason}: {self.message})"


class InvalidArgument(SeamountError):
    """A field is wrong: ``field`` names it, the message gives the limit and the remedy."""

    code = grpc.StatusCode.INVALID_ARGUMENT

    def __init__(
        self, message: str, *, field: str, reason: str = "INVALID_FIELD", metadata: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message, reason=reason, field=field, metadata=metadata)


class NotFound(SeamountError):
    code = grpc.StatusCode.NOT_FOUND


class AlreadyExists(SeamountError):
    code = grpc.StatusCode.ALREADY_EXISTS


class FailedPrecondition(SeamountError):
    code = grpc.StatusCode.FAILED_PRECONDITION


class Aborted(SeamountError):
    code = grpc.StatusCode.ABORTED


class OutOfRange(SeamountError):
    code = grpc.StatusCode.OUT_OF_RANGE


class ResourceExhausted(SeamountError):
    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class Unauthenticated(SeamountError):
    code = grpc.StatusCode.UNAUTHENTICATED


class PermissionDenied(SeamountError):
    code = grpc.StatusCode.PERMISSION_DENIED


class Unavailable(SeamountError):
    code = grpc.StatusCode.UNAVAILABLE


class DeadlineExceeded(SeamountError):
    code = grpc.StatusCode.DEADLINE_EXCEEDED


class Cancelled(SeamountError):
    code = grpc.StatusCode.CANCELLED


class DataLoss(SeamountError):
    code = grpc.StatusCode.DATA_LOSS


class Internal(SeamountError):
    code = grpc.StatusCode.INTERNAL


_BY_CODE: dict[grpc.StatusCode, type[SeamountError]] = {cls.code: cls for cls in SeamountError.__subclasses__()}
_CODE_BY_NUMBER: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


def to_status(error: SeamountError) -> status_pb2.Status:
    """The ``google.rpc.Status`` of an error, details included."""
    details: list[Any] = [
        error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata),
    ]
    if error.field is not None:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=error.message)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(int(error.retry_after_s * 1000))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    if isinstance(error, ResourceExhausted):
        quota = error_details_pb2.QuotaFailure.Violation(subject=error.reason, description=error.message)
        details.append(error_details_pb2.QuotaFailure(violations=[quota]))
    status = status_pb2.Status(code=error.code.value[0], message=error.message)
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def from_status(status: status_pb2.Status) -> SeamountError:
    """The inverse of ``to_status``; unknown codes become ``Internal``, unknown details are ignored."""
    code = _CODE_BY_NUMBER.get(status.code, grpc.StatusCode.INTERNAL)
    reason, field, retry_after_s, metadata = code.name, None, None, {}
    for detail in status.details:
        info, bad, retry = (
            error_details_pb2.ErrorInfo(),
            error_details_pb2.BadRequest(),
            error_details_pb2.RetryInfo(),
        )
        if detail.Unpack(info):
            reason, metadata = info.reason, dict(info.metadata)
        elif detail.Unpack(bad) and bad.field_violations:
            field = bad.field_violations[0].field
        elif detail.Unpack(retry):
            retry_after_s = retry.retry_delay.ToMilliseconds() / 1000
    return _make(_BY_CODE.get(code, Internal), status.message, reason, field, retry_after_s, metadata)


def _make(
    cls: type[SeamountError],
    message: str,
    reason: str,
    field: str | None,
    retry_after_s: float | None,
    metadata: Mapping[str, str],
) -> SeamountError:
    error = cls.__new__(cls)
    SeamountError.__init__(error, message, reason=reason, field=field, retry_after_s=retry_after_s, metadata=metadata)
    return error


def from_rpc_error(error: grpc.RpcError) -> SeamountError:
    """The typed error behind a failed call; a broken connection or a foreign server's status maps by its code."""
    call: Any = error  # every RpcError that gRPC raises is a Call too, which its stubs do not say
    for key, value in call.trailing_metadata() or ():
        if key == _STATUS_KEY:
            return from_status(status_pb2.Status.FromString(value))
    code: grpc.StatusCode = call.code()
    cls = _BY_CODE.get(code, Internal)
    return _make(cls, call.details() or code.name, code.name, None, None, {})


def defect() -> Internal:
    """What a client hears of an exception that nobody expected; the log has the rest."""
    return Internal("a defect of the server; its log says more", reason="INTERNAL")


def trailing_metadata(error: SeamountError) -> tuple[tuple[str, bytes], ...]:
    """The trailers that carry the Status beside gRPC's own code and message."""
    return ((_STATUS_KEY, to_status(error).SerializeToString()),)
