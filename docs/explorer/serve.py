"""Serves the site and opens the explorer: `python docs/explorer/serve.py site`.

Any file server will do. This one also sends the headers with which browsers let the model run in several threads.
"""

import sys
import webbrowser
from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Handler(SimpleHTTPRequestHandler):
    def end_headers(self) -> None:
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        super().end_headers()

    def log_message(self, *args: Any) -> None:
        pass


if __name__ == "__main__":
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=sys.argv[1])) as server:
        address = f"http://127.0.0.1:{server.server_port}/explorer.html"
        print(f"{address}; Ctrl-C ends the server")
        webbrowser.open(address)
        with suppress(KeyboardInterrupt):
            server.serve_forever()
