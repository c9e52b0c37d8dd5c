"""How two ranks build a process group without a store of their own: its addresses ride on the OpenLink call.

To connect, gloo's group puts one value (where it listens) into a store and reads the peer's. ``Rendezvous`` is that
store: what the group puts goes into the call, what the call brings the group may read. So a link needs no port beside
gRPC's and gloo's own, and whoever opens one has shown the token that gRPC asks for. (A TCPStore has neither lock nor
key, and looks up the name of every peer, which takes seconds where name service is slow.)
"""

from __future__ import annotations

from concurrent.futures import Future
from datetime import timedelta

from torch._C._distributed_c10d import Store
from torch.distributed import ProcessGroupGloo

from seamount.wire.errors import InvalidArgument

MAX_ADDRESS_BYTES = 4096


class Rendezvous(Store):
    """own: completes with what the group of this side published. The group's constructor waits in another thread."""

    def __init__(self, timeout_s: float) -> None:
        super().__init__()
        self.own: Future[bytes] = Future()
        self._peer: Future[bytes] = Future()
        self._values: dict[str, bytes] = {}
        self._timeout_s = timeout_s

    def put_peer(self, address: bytes) -> None:
        """The peer's value. Raises ``InvalidArgument`` unless it is built like this side's own, which must be there."""
        if len(address) > MAX_ADDRESS_BYTES or _rest(address) != _rest(self.own.result(0)):
            raise InvalidArgument(
                f"address ({len(address)} bytes) is none that this rank's communication library could have made",
                field="address",
            )
        self._peer.set_result(address)

    def give_up(self) -> None:
        """There will be no peer: the group's constructor fails at once."""
        if not self._peer.done():
            self._peer.set_exception(ConnectionError("the peer refused the link"))

    def set(self, key: str, value: str | bytes) -> None:
        self._values[key] = value.encode() if isinstance(value, str) else bytes(value)
        self.own.set_result(self._values[key])

    def get(self, key: str) -> bytes:
        own = self._values.get(key)
        return own if own is not None else self._peer.result(self._timeout_s)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        for key in keys:
            self.get(key)


def build_group(rendezvous: Rendezvous, rank: int, host: str, timeout_s: float) -> ProcessGroupGloo:
    """This side's group of two, listening on ``host`` only. Blocks until the peer has built its own; rank 0 calls.

    Raises RuntimeError, or what ``rendezvous`` raises, if that takes longer than ``timeout_s``.
    """
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # missing in torch's stubs
    options._devices = [ProcessGroupGloo.create_device(hostname=host)]
    options._timeout = timedelta(seconds=timeout_s)
    return ProcessGroupGloo(rendezvous, rank, 2, options)


def _rest(address: bytes) -> int:
    """Bytes after the host name that leads the value; -1 if it is cut off."""
    name_bytes = int.from_bytes(address[:8], "little")
    return max(-1, len(address) - 8 - name_bytes)
