"""OpenStack Swift with its S3 API in one process: `python swift_server.py DIRECTORY`.

Keeps accounts, containers and objects under DIRECTORY, which must support user extended
attributes. Listens on 127.0.0.1 and writes its S3 port to DIRECTORY/port; a restart on the same
directory takes the same port and the same data. One proxy, account, container and object server
share one eventlet hub, with one replica and no background daemons.

Swift patches the standard library through eventlet, so nothing else may live in this process.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

ACCESS_KEY = "test:tester"
SECRET_KEY = "a-secret-for-tests-0123456789"
DEVICE = "d1"
BACKENDS = ("account", "container", "object")

BACKEND_CONF = """\
[DEFAULT]
swift_dir = {root}
devices = {root}/devices
mount_check = false
disable_fallocate = true
fallocate_reserve = 0
log_level = WARNING
[pipeline:main]
pipeline = {kind}-server
[app:{kind}-server]
use = egg:swift#{kind}
conn_timeout = 30
node_timeout = 30
container_update_timeout = 60
"""

PROXY_CONF = """\
[DEFAULT]
swift_dir = {root}
log_level = WARNING
[pipeline:main]
pipeline = catch_errors gatekeeper healthcheck listing_formats bulk s3api tempauth slo proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
allow_account_management = true
conn_timeout = 30
node_timeout = 30
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:gatekeeper]
use = egg:swift#gatekeeper
[filter:healthcheck]
use = egg:swift#healthcheck
[filter:listing_formats]
use = egg:swift#listing_formats
[filter:bulk]
use = egg:swift#bulk
[filter:s3api]
use = egg:swift#s3api
location = us-east-1
[filter:tempauth]
use = egg:swift#tempauth
user_test_tester = {secret} .admin
[filter:slo]
use = egg:swift#slo
"""


def write_config(root: Path) -> None:
    (root / "devices" / DEVICE).mkdir(parents=True, exist_ok=True)
    (root / "swift.conf").write_text("[swift-hash]\nswift_hash_path_suffix = farm\n")
    for kind in BACKENDS:
        (root / f"{kind}.conf").write_text(BACKEND_CONF.format(root=root, kind=kind))
    (root / "proxy.conf").write_text(PROXY_CONF.format(root=root, secret=SECRET_KEY))


def write_ring(root: Path, kind: str, port: int) -> None:
    from array import array

    from swift.common.ring import RingData

    device = {
        "id": 0, "region": 1, "zone": 1, "weight": 1.0, "device": DEVICE, "meta": "",
        "ip": "127.0.0.1", "port": port, "replication_ip": "127.0.0.1", "replication_port": port,
    }  # fmt: skip
    RingData([array("H", [0])], [device], 32).save(str(root / f"{kind}.ring.gz"))


def listen(eventlet: Any, root: Path) -> dict[str, Any]:
    """Bind every server first, so that the rings can name real ports."""
    saved = root / "port"
    port = int(saved.read_text()) if saved.exists() else 0
    sockets = {"proxy": eventlet.listen(("127.0.0.1", port))}
    sockets |= {kind: eventlet.listen(("127.0.0.1", 0)) for kind in BACKENDS}
    for kind in BACKENDS:
        write_ring(root, kind, sockets[kind].getsockname()[1])
    partial = root / "port.new"
    partial.write_text(str(sockets["proxy"].getsockname()[1]))
    partial.replace(saved)
    return sockets


def serve(root: Path) -> None:
    import eventlet

    eventlet.monkey_patch()
    import eventlet.wsgi
    from swift.common import utils, wsgi
    from swift.common.http_protocol import SwiftHttpProtocol

    write_config(root)
    utils.set_swift_dir(str(root))
    threads = []
    for kind, sock in listen(eventlet, root).items():
        conf = {"log_name": kind, "log_level": "WARNING"}
        utils.get_logger(conf, kind, log_to_console=True, log_route=kind)
        threads.append(
            eventlet.spawn(
                eventlet.wsgi.server,
                sock,
                wsgi.loadapp(str(root / f"{kind}.conf"), global_conf=conf),
                utils.NullLogger(),
                protocol=SwiftHttpProtocol,
                capitalize_response_headers=False,  # boto3 wants "ETag", not "Etag"
            )
        )
    for thread in threads:
        thread.wait()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    serve(Path(sys.argv[1]).resolve())
