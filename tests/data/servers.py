"""Servers that tests start: nginx, S3 (moto), Google's storage (an emulator), and one that fails as it is told."""

from __future__ import annotations

import collections
import contextlib
import http.server
import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path
from urllib.parse import urlencode
from urllib.request import Request, urlopen

from launch import free_port

WAIT_S = 300
STALL_S = 120
ENDLESS_BLOCKS = 1_000
"""Of 64 KiB, so that a reader that reads on fails a test and not the machine."""


class FaultyServer(http.server.ThreadingHTTPServer):
    """Files of a folder over HTTP, with ranges and ETags. `faults[name]` are what happens to the next requests for a
    file: a status, `cut` (half of the body), `reset`, `stall`, `shifted` (the range one byte further), `complete` (the
    file in place of the range), `endless` (the body, and zeros as long as somebody reads them); `always[name]` happens
    every time.
    """

    daemon_threads = True

    def __init__(self, folder: Path, handler: type[http.server.BaseHTTPRequestHandler] | None = None) -> None:
        self.folder = folder
        self.faults: dict[str, collections.deque[str]] = collections.defaultdict(collections.deque)
        self.always: dict[str, str] = {}
        self.log: list[tuple[str, str, str | None]] = []
        self.credentials: list[str] = []
        """The `Authorization` of all requests."""
        self.everywhere = ""
        """A fault of every file, whatever its name."""
        self.ranges = True
        self.versions = True
        """Whether answers tell an ETag."""
        self.headers: dict[str, str] = {}
        """Sent with every status that is a fault."""
        self.over = threading.Event()
        """Ends all stalls, so that no reader outlives its test for long."""
        super().__init__(("127.0.0.1", 0), handler or _Handler)
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fetched(self, name: str) -> int:
        """Requests for the body of a file."""
        return sum(method == "GET" and path == name for method, path, _ in self.log)

    def handle_error(self, request, client_address):
        """Clients that go away are no news."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyServer

    def do_HEAD(self):
        self._answer()

    def do_GET(self):
        self._answer()

    def log_message(self, *_):
        pass

    def _answer(self):
        name = self.path.lstrip("/")
        self.server.log.append((self.command, name, self.headers.get("Range")))
        self.server.credentials.append(self.headers.get("Authorization", ""))
        queue = self.server.faults[name]
        # A fault is for who reads; the question whether the file is there comes before, and is not counted.
        lasting = self.server.always.get(name) or self.server.everywhere
        fault = lasting or (queue.popleft() if queue and self.command == "GET" else None)
        path = self.server.folder / name
        if fault == "stall":
            self.server.over.wait(STALL_S)
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            self.close_connection = True
            for stream in (self.rfile, self.wfile, self.connection):
                stream.close()
            return
        if (fault or "").isdigit() or not path.is_file():
            self.send_response(int(fault or 404))
            for header in self.server.headers.items():
                self.send_header(*header)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self._send(path, fault)

    def _send(self, path, fault):
        data, facts = path.read_bytes(), path.stat()
        total, found = len(data), re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if found and self.server.ranges and fault != "complete":
            shift = int(fault == "shifted")
            first, last = int(found[1]) + shift, min(int(found[2]) + shift, total - 1)
            data = data[first : last + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{total}")
        else:
            self.send_response(200)
        if self.server.versions:
            self.send_header("ETag", f'"{facts.st_mtime_ns:x}-{total:x}"')
        if fault == "endless" and self.command == "GET":
            self.send_header("Connection", "close")
            self.end_headers()
            self.close_connection = True
            for block in itertools.chain([data], itertools.repeat(bytes(1 << 16), ENDLESS_BLOCKS)):
                self.wfile.write(block)
            return
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault == "silent":
            self.wfile.write(data[: len(data) // 2])
            self.server.over.wait(STALL_S)
        if fault == "cut":
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
            return
        self.wfile.write(data)


@contextlib.contextmanager
def faulty_server(folder: Path):
    server = FaultyServer(folder)
    try:
        yield server
    finally:
        server.over.set()
        server.shutdown()
        server.server_close()


def nginx_program() -> str | None:
    return shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")


NGINX = """
daemon off; worker_processes 1; pid {work}/pid; error_log {work}/error.log;
{user}
events {{ worker_connections 128; }}
http {{
  access_log off; client_body_temp_path {work}/b; proxy_temp_path {work}/p; fastcgi_temp_path {work}/f;
  uwsgi_temp_path {work}/u; scgi_temp_path {work}/s;
  server {{
    listen 127.0.0.1:{port};
    root {root};
    location / {{ autoindex on; }}
    location /refused/ {{ alias {root}/; location ~ tar$ {{ return 403; }} }}
    location /broken/ {{ alias {root}/; location ~ tar$ {{ return 500; }} }}
    location /cut/ {{ alias {root}/; location ~ tar$ {{ return 444; }} }}
    location /slow/ {{ alias {root}/; limit_rate 2k; }}
  }}
}}
"""


@contextlib.contextmanager
def nginx(root: Path, work: Path):
    """Address of an nginx that serves `root`; below /refused, /broken, /cut and /slow it does so badly for shards."""
    port = free_port()
    user = "user root;" if os.getuid() == 0 else ""
    (work / "nginx.conf").write_text(NGINX.format(work=work, root=root, port=port, user=user))
    process = subprocess.Popen([nginx_program(), "-c", str(work / "nginx.conf"), "-p", str(work)])
    address = f"http://127.0.0.1:{port}"
    try:
        _await(address)
        yield address
    finally:
        process.send_signal(signal.SIGQUIT)
        process.wait(WAIT_S)


def _await(address: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while True:
        with contextlib.suppress(OSError), urlopen(f"{address}/"):
            return
        if time.monotonic() > deadline:
            raise TimeoutError(address)
        time.sleep(0.05)


@contextlib.contextmanager
def s3(monkeypatch):
    """A boto3 client of an S3 server, which the environment names."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "SECRETKEYID",
        "AWS_SECRET_ACCESS_KEY": "SECRETKEY",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    try:
        yield boto3.client("s3")
    finally:
        server.stop()


@contextlib.contextmanager
def gs(monkeypatch):
    """Address of a server of Google's storage, which the environment names, with one bucket."""
    from gcp_storage_emulator.server import create_server

    port = free_port()
    address = f"http://127.0.0.1:{port}"
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", address)
    monkeypatch.setenv("NO_GCE_CHECK", "true")  # credentials are looked for, but not at the address of a cloud host
    with create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket"):
        yield address


def put(address: str, name: str, data: bytes) -> None:
    """An object of a `gs` server's bucket, written anew."""
    query = urlencode({"uploadType": "media", "name": name})
    with urlopen(Request(f"{address}/upload/storage/v1/b/bucket/o?{query}", data=data, method="POST")):
        pass
