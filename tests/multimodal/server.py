"""A loopback file server that misbehaves on request."""

import contextlib
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Site:
    """files: path -> bytes. cut: bytes after which every connection is cut; reset: hard, as a broken network does.
    answers: status codes given before the first file; raw: what is sent as it is, before that.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.cut: int | None = None
        self.reset = False
        self.ranges = True
        self.etag: str | None = '"one"'
        self.answers: list[tuple[int, dict[str, str]]] = []
        self.raw: list[bytes] = []
        self.requests: list[tuple[str, str | None]] = []
        self.url = ""


def _handler(site: Site) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            return

        def do_GET(self) -> None:  # noqa: N802
            path = self.path.partition("?")[0].lstrip("/")
            site.requests.append((path, self.headers.get("Range")))
            if site.raw:
                self.wfile.write(site.raw.pop(0))
                self.close_connection = True
                return None
            if site.answers:
                status, headers = site.answers.pop(0)
                return self._plain(status, headers)
            if path not in site.files:
                return self._plain(404, {})
            content, start = site.files[path], 0
            asked = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
            fresh = self.headers.get("If-Range") in (None, site.etag)
            if asked and site.ranges and fresh:
                start = int(asked[1])
                if start >= len(content):
                    return self._plain(416, {"Content-Range": f"bytes */{len(content)}"})
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            if site.etag:
                self.send_header("ETag", site.etag)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            body = content[start:]
            self.wfile.write(body if site.cut is None else body[: site.cut])
            self.close_connection = True
            if site.reset and site.cut is not None and len(body) > site.cut:
                self.wfile.flush()
                time.sleep(0.05)  # what was sent arrives; then the connection is reset
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()

        def _plain(self, status: int, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", "0")
            self.end_headers()

    return Handler


@contextlib.contextmanager
def serving() -> Iterator[Site]:
    """A running server."""
    site = Site()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(site))
    site.url = f"http://127.0.0.1:{server.server_port}/"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
