"""A Hub that speaks enough of the upload protocol for a test: repositories, preupload, LFS, commits."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub:
    """What has arrived, and what goes wrong."""

    def __init__(self):
        self.repos, self.objects, self.files, self.commits = {}, {}, {}, []
        self.received, self.tokens, self.requests = [], set(), []
        self.fail_object_after = None
        """Objects whose upload succeeds before all others fail with 500."""
        self.refuse = None
        """Status of every request."""
        self.lock = threading.Lock()

    @property
    def sha(self):
        """Of the last commit."""
        return f"{len(self.commits):040x}"


def handler_of(hub, address):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def _answer(self, values=None, status=200):
            body = json.dumps(values or {}).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _body(self):
            if self.headers.get("Transfer-Encoding") == "chunked":
                parts = []
                while size := int(self.rfile.readline(), 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def do_GET(self):
            hub.requests.append(("GET", self.path))
            name = self.path.partition("?")[0].removeprefix("/api/models/")
            if "/resolve/" in name:
                self._file(name)
            elif name in hub.repos:
                private = hub.repos[name]["visibility"] == "private"
                siblings = [{"rfilename": file} for file in sorted(hub.files)]
                facts = {"_id": "1", "id": name, "private": private, "sha": hub.sha, "siblings": siblings, "tags": []}
                self._answer(facts)
            else:
                self._answer({"error": "not here"}, 404)

        do_HEAD = do_GET

        def _file(self, path):
            """One file of the state that the address names, as the Hub serves what is no LFS object."""
            revision, _, name = path.partition("/resolve/")[2].partition("/")
            content = hub.files.get(name) if revision == hub.sha else None
            if content is None:
                self._answer({"error": "not here"}, 404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", revision)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def do_POST(self):
            body = self._body()
            hub.requests.append(("POST", self.path))
            hub.tokens.add(self.headers.get("Authorization"))
            if hub.refuse is not None:
                self._answer({"error": "refused"}, hub.refuse)
            elif self.path == "/api/repos/create":
                self._create(json.loads(body))
            elif self.path == "/api/validate-yaml":
                self._answer({"errors": [], "warnings": []})
            elif "/preupload/" in self.path:
                files = json.loads(body)["files"]
                mode = {True: "lfs", False: "regular"}
                self._answer(
                    {
                        "files": [
                            {
                                "path": file["path"],
                                "uploadMode": mode[file["path"].endswith((".safetensors", ".pt2", ".onnx"))],
                                "shouldIgnore": False,
                                "oid": None,
                            }
                            for file in files
                        ]
                    }
                )
            elif self.path.endswith("/info/lfs/objects/batch"):
                self._batch(json.loads(body))
            elif "/commit/" in self.path:
                self._commit([json.loads(line) for line in body.splitlines()])
            else:
                self._answer({"error": self.path}, 404)

        def _create(self, values):
            name = "/".join(part for part in (values.get("organization"), values["name"]) if part)
            if name in hub.repos:
                self._answer({"error": "exists", "url": f"{address()}/{name}"}, 409)
                return
            hub.repos[name] = values
            self._answer({"url": f"{address()}/{name}", "name": name, "id": name})

        def _batch(self, values):
            objects = []
            for wanted in values["objects"]:
                found = {"oid": wanted["oid"], "size": wanted["size"]}
                if wanted["oid"] not in hub.objects:
                    found["actions"] = {"upload": {"href": f"{address()}/objects/{wanted['oid']}"}}
                objects.append(found)
            self._answer({"transfer": "basic", "objects": objects})

        def do_PUT(self):
            body = self._body()
            oid = self.path.rpartition("/")[2]
            with hub.lock:
                hub.requests.append(("PUT", self.path))
                if hub.fail_object_after is not None and len(hub.received) >= hub.fail_object_after:
                    self._answer({"error": "broken"}, 400)
                    return
                if hashlib.sha256(body).hexdigest() != oid:
                    self._answer({"error": "another hash"}, 422)
                    return
                hub.objects[oid] = body
                hub.received.append(oid)
            self._answer()

        def _commit(self, lines):
            files = {}
            for line in lines:
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "lfsFile":
                    files[line["value"]["path"]] = hub.objects[line["value"]["oid"]]
            gone = [line["value"]["path"] for line in lines if line["key"] == "deletedFile"]
            parent = next(line["value"].get("parentCommit") for line in lines if line["key"] == "header")
            if parent not in (None, hub.sha) or not {*gone} <= hub.files.keys():
                self._answer({"error": "another state"}, 412)
                return
            hub.files = {name: content for name, content in hub.files.items() if name not in gone} | files
            hub.commits.append(sorted(files) + [f"- {name}" for name in sorted(gone)])
            self._answer(
                {"commitUrl": f"{address()}/user/model/commit/{hub.sha}", "commitOid": hub.sha, "success": True}
            )

    return Handler


@contextmanager
def hub_server():
    """A running server: its state, and its address."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(hub, lambda: f"http://127.0.0.1:{server.server_port}"))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
