"""A web server for tests, in a process of its own: parts of files on request, and moods that can be changed by a file.

`python range_server.py FOLDER PORT [MOODS]`; each line of MOODS is one answer's mood, taken in turn and then none:
`500` (an error), `cut` (half of the body, then the connection is closed), `silent` (nothing for two seconds), `drip` (in small pieces),
`die` (half of the body, then the whole server is gone as by SIGKILL).
"""

import os
import signal
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

folder, port = Path(sys.argv[1]), int(sys.argv[2])
moods = Path(sys.argv[3]).read_text().split() if len(sys.argv) > 3 else []


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        mood = moods.pop(0) if moods else ""
        path = folder / self.path.lstrip("/")
        if mood == "500":
            return self.send_error(500)
        if mood == "silent":
            time.sleep(2)
        if path.is_dir():
            body, status = "".join(f'<a href="{p.name}">{p.name}</a>\n' for p in path.iterdir()).encode(), 200
        elif not path.is_file():
            return self.send_error(404)
        else:
            first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
            body, status = path.read_bytes()[first : last + 1], 206
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{first + len(body) - 1}/{path.stat().st_size}")
            self.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if mood in ("cut", "die"):
            body = body[: len(body) // 2]
        step = max(1, len(body) // 20) if mood == "drip" else 2**14
        for start in range(0, len(body), step):
            self.wfile.write(body[start : start + step])
            if mood == "drip":
                time.sleep(0.01)
        if mood == "die":
            os.kill(os.getpid(), signal.SIGKILL)


ThreadingHTTPServer.allow_reuse_address = True
ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
