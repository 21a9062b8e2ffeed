"""A registry of images on loopback: the routes of the OCI distribution API that a pull needs."""

import gzip
import hashlib
import io
import json
import tarfile
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
TOKEN = "for-whoever-asks"


def sha256(content):
    return "sha256:" + hashlib.sha256(content).hexdigest()


class Registry:
    """What the server has, how it answers, and what it was asked."""

    def __init__(self):
        self.manifests, self.blobs, self.asked = {}, {}, []
        self.wants_token, self.status, self.realm, self.says_digest = False, None, None, True

    def push(self, name, tag, folder):
        """An image of one layer; its digest."""
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as tar:
            tar.add(folder, arcname=".")
        layer = gzip.compress(packed.getvalue(), compresslevel=1, mtime=0)
        rootfs = {"type": "layers", "diff_ids": [sha256(packed.getvalue())]}
        config = json.dumps({"architecture": "amd64", "os": "linux", "config": {}, "rootfs": rootfs}).encode()
        described = [
            {"mediaType": kind, "digest": sha256(blob), "size": len(blob)}
            for kind, blob in ((CONFIG, config), (LAYER, layer))
        ]
        self.blobs |= {sha256(config): config, sha256(layer): layer}
        text = {"schemaVersion": 2, "mediaType": MANIFEST, "config": described[0], "layers": described[1:]}
        manifest = json.dumps(text).encode()
        self.manifests |= {(name, tag): manifest, (name, sha256(manifest)): manifest}
        return sha256(manifest)

    def respond(self, path, headers):
        """Status, content and headers of an answer."""
        here = f"http://{headers['Host']}"
        if path.startswith("/token?"):
            return 200, json.dumps({"token": TOKEN}).encode(), {}
        if self.status:
            return self.status, b"", {"Location": f"{here}/elsewhere"}
        if self.wants_token and headers.get("Authorization") != f"Bearer {TOKEN}":
            realm = self.realm or f"{here}/token"
            return 401, b"", {"WWW-Authenticate": f'Bearer realm="{realm}",service="loopback"'}
        if path == "/v2/":
            return 200, b"", {}
        return self.found(*path.removeprefix("/v2/").rsplit("/", 2))

    def found(self, name, kind, what):
        content = self.blobs.get(what) if kind == "blobs" else self.manifests.get((name, what))
        if content is None:
            return 404, b"", {}
        form = "application/octet-stream" if kind == "blobs" else MANIFEST
        digest = {"Docker-Content-Digest": sha256(content)} if self.says_digest else {}
        return 200, content, {"Content-Type": form} | digest


@contextmanager
def served(registry):
    """The registry's name, host:port."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_GET(self):
            registry.asked.append((self.command, self.path, dict(self.headers)))
            status, content, headers = registry.respond(self.path, self.headers)
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(content))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def do_HEAD(self):
            self.do_GET()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
