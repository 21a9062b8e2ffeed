"""A hub on this machine: the routes that are asked, and what a network does to them.

It runs in a thread of a test, on 127.0.0.1. ``Hub.faults`` says what goes wrong, ``Hub.requests`` what was
asked.
"""

import hashlib
import json
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_verysecrettoken"
LARGE = 4096
"""From this size on a file is listed as LFS has it."""


BIG = bytes(range(256)) * (4 << 10)
"""1 MiB, listed as LFS has it."""
SMALL = b'{"a": 1}\n'


def git_sha1(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Faults:
    """What goes wrong; lists are used up, one entry a request of a file."""

    statuses: list = field(default_factory=list)
    """Status, or (status, Retry-After); None for an answer."""
    cuts: list = field(default_factory=list)
    """Bytes after which the connection is closed."""
    flips: list = field(default_factory=list)
    """Offsets of a byte that is another one."""
    api_statuses: list = field(default_factory=list)
    slow: float = 0.0
    """Seconds between two pieces of 64 KiB."""
    no_range: bool = False
    redirect: str = ""
    """An address to which files are redirected, with the path behind it."""
    pointers: bool = False
    """Files come as LFS pointers, as from a naive mirror."""


@dataclass
class Hub:
    """Repositories by ``models/owner/name``, and what was asked."""

    repos: dict = field(default_factory=dict)
    urls: dict = field(default_factory=dict)
    """Plain files by path, for sources by URL."""
    gated: set = field(default_factory=set)
    private: set = field(default_factory=set)
    closed: set = field(default_factory=set)
    """Gated, and the token's account has not accepted the terms."""
    faults: Faults = field(default_factory=Faults)
    requests: list = field(default_factory=list)
    page: int = 1000
    server: ThreadingHTTPServer | None = None

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server.server_port}"

    def files_asked(self):
        """(path, Range) of each request of a file."""
        return [(path, headers.get("Range", "")) for path, headers in self.requests if "/api/" not in path]

    def start(self):
        handler = type("Handler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()
        return self

    def stop(self):
        self.server.shutdown()
        self.server.server_close()


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_):
        pass

    def refuse(self, status, code="", **headers):
        self.send_response(status)
        for name, value in {"X-Error-Code": code, "Content-Length": "0", **headers}.items():
            if value:
                self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def do_GET(self):
        path, _, query = self.path.partition("?")
        self.hub.requests.append((self.path, dict(self.headers)))
        if path.startswith("/api/"):
            self.api(path.split("/", 5), query)
        elif "/resolve/" in path:
            self.resolve(path)
        elif unquote(path) in self.hub.urls:
            self.body(self.hub.urls[unquote(path)])
        else:
            self.refuse(404)

    def barred(self, key):
        """Whether a request was refused: the hub says 401 for what is private to strangers."""
        sent = self.headers.get("Authorization", "")
        if sent and sent != f"Bearer {TOKEN}":
            self.refuse(401, X_Error_Message="Invalid credentials in Authorization header")
        elif key not in self.hub.repos or (key in self.hub.private and not sent):
            self.refuse(404 if sent else 401, "RepoNotFound")
        else:
            return False
        return True

    def api(self, parts, query):
        if self.hub.faults.api_statuses:
            return self.refuse(self.hub.faults.api_statuses.pop(0), Retry_After=0)
        kind, key = parts[2], "/".join(parts[2:5])
        if self.barred(key):
            return None
        what, _, revision = parts[5].partition("/")
        if what == "revision":
            if unquote(revision) not in ("main", "refs/pr/1", COMMIT):
                return self.refuse(404, "RevisionNotFound")
            return self.json({"id": key.removeprefix(f"{kind}/"), "sha": COMMIT})
        files = sorted(self.hub.repos[key].items())
        begin = int(query.rpartition("cursor=")[2]) if "cursor=" in query else 0
        some = [self.entry(*one) for one in files[begin : begin + self.hub.page]]
        folders = [{"type": "directory", "path": "data", "oid": "0" * 40, "size": 0}]
        more = begin + self.hub.page < len(files)
        link = f'<{self.hub.url}{self.path.partition("?")[0]}?cursor={begin + self.hub.page}>; rel="next"'
        return self.json(folders + some, **({"Link": link} if more else {}))

    def entry(self, name, content):
        found = {"type": "file", "path": name, "size": len(content), "oid": git_sha1(content)}
        if len(content) >= LARGE:
            digest = hashlib.sha256(content).hexdigest()
            found["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 130}
        return found

    def json(self, value, **headers):
        content = json.dumps(value).encode()
        self.send_response(200)
        for name, text in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(content)

    def resolve(self, path):
        before, _, after = unquote(path).partition("/resolve/")
        kind = "" if before.startswith("/datasets/") else "models/"
        key, (commit, _, name) = kind + before[1:], after.partition("/")
        if self.barred(key):
            return None
        if key in self.hub.closed:
            return self.refuse(403, "GatedRepo")
        if key in self.hub.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.refuse(401, "GatedRepo")
        if commit != COMMIT or name not in self.hub.repos[key]:
            return self.refuse(404, "EntryNotFound")
        if self.hub.faults.redirect:
            return self.refuse(302, Location=f"{self.hub.faults.redirect}/{name}?Signature=secret")
        content = self.hub.repos[key][name]
        if self.hub.faults.pointers:
            digest = hashlib.sha256(content).hexdigest()
            content = pointer(digest, len(content))
        return self.body(content)

    def body(self, content):
        faults = self.hub.faults
        found = faults.statuses.pop(0) if faults.statuses else None
        if found:
            status, after = found if isinstance(found, tuple) else (found, "")
            return self.refuse(status, Retry_After=after)
        tag = hashlib.sha256(content).hexdigest()
        begin, asked = 0, self.headers.get("Range", "")
        same = self.headers.get("If-Range", f'"{tag}"') == f'"{tag}"'
        if asked and same and not faults.no_range:
            begin = int(asked.removeprefix("bytes=").rstrip("-"))
            if begin >= len(content):
                return self.refuse(416, Content_Range=f"bytes */{len(content)}")
        self.send_response(206 if begin else 200)
        self.send_header("ETag", f'"{tag}"')
        self.send_header("Content-Length", str(len(content) - begin))
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        return self.send(self.flipped(content)[begin:])

    def flipped(self, content):
        if not self.hub.faults.flips:
            return content
        place = self.hub.faults.flips.pop(0)
        return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]

    def send(self, content):
        cut = self.hub.faults.cuts.pop(0) if self.hub.faults.cuts else None
        for place in range(0, len(content), 1 << 16):
            piece = content[place : place + (1 << 16)]
            if cut is not None and place + len(piece) > cut:
                self.wfile.write(piece[: cut - place])
                self.wfile.flush()
                self.connection.close()
                self.close_connection = True
                return
            try:
                self.wfile.write(piece)
            except OSError:
                return
            time.sleep(self.hub.faults.slow)


def pointer(digest, size):
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {size}\n".encode()
