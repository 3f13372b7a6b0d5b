"""The part of the Hugging Face Hub's interface that reading a data set takes, over the files of a folder."""

import contextlib
import hashlib
import json
from urllib.parse import parse_qs, urlsplit

from servers import FaultyServer, _Handler
from typing_extensions import override

REPO = "owner/photos"


class _Hub(_Handler):
    @override
    def do_GET(self):
        path = urlsplit(self.path).path
        if path.startswith(f"/datasets/{REPO}/resolve/main/"):
            self.path = path.removeprefix(f"/datasets/{REPO}/resolve/main")
            self._answer()
        elif path.startswith(f"/api/datasets/{REPO}/tree/main"):
            self._json([self._entry(item) for item in sorted(self.server.folder.iterdir()) if item.is_file()])
        elif path.startswith(f"/api/datasets/{REPO}"):
            self._json({"id": REPO, "sha": "0" * 40, "siblings": []})
        else:
            self._json({"error": "not found"}, 404)

    @override
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        wanted = parse_qs(body)["paths"]
        found = [self.server.folder / name for name in wanted]
        self._json([self._entry(item) for item in found if item.is_file()])

    def _entry(self, path):
        data = path.read_bytes()
        entry = {"type": "file", "path": path.name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
        lfs = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return entry | ({"lfs": lfs} if path.suffix == ".tar" else {})

    def _json(self, value, status=200):
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextlib.contextmanager
def hub(folder):
    server = FaultyServer(folder, _Hub)
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
