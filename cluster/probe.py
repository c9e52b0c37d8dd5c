"""Whether the router of this pod says SERVING, over TLS: Kubernetes' own gRPC probe speaks none.

``python -m seamount.cluster.probe NAME``, where NAME is a DNS name of the router's certificate. The settings tell the
port and the files. Ends with 0 where the router is ready, else with 1 and a line that says why.
"""

from __future__ import annotations

import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from seamount.cluster.settings import Settings, load_settings
from seamount.wire.errors import SeamountError

TIMEOUT_S = 3.0


def main() -> None:
    try:
        (name,) = sys.argv[1:]
        why = refusal(load_settings(), name)
    except ValueError:
        why = "usage: python -m seamount.cluster.probe NAME"
    except SeamountError as error:
        why = error.message
    except OSError as error:
        why = str(error)
    if why is not None:
        print(f"probe: {why}", file=sys.stderr)
        sys.exit(1)


def refusal(settings: Settings, name: str) -> str | None:
    """Why the router on this machine is not ready; None if it is.

    The certificate is checked against the ``ca.crt`` beside it. Where clients must show one, the router's own is shown.
    Raises ``OSError`` where a file cannot be read.
    """
    router = settings.router
    if router.tls_certificate_file is None or router.tls_key_file is None:
        return "router.tls_certificate_file is not set: this probe is for routers that speak TLS"
    authority = router.tls_certificate_file.with_name("ca.crt").read_bytes()
    shown = (router.tls_key_file, router.tls_certificate_file) if router.client_ca_file is not None else ()
    credentials = grpc.ssl_channel_credentials(authority, *(file.read_bytes() for file in shown))
    options = [("grpc.ssl_target_name_override", name)]
    with grpc.secure_channel(f"127.0.0.1:{router.port}", credentials, options) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
        except grpc.RpcError as error:
            return f"{error.code().name}: {error.details()}"
    if answer.status == health_pb2.HealthCheckResponse.SERVING:
        return None
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


if __name__ == "__main__":
    main()
