"""A model from a hub: ranks that share a cache download it once, and those that don't, once for each cache."""

import hashlib
import http.server
import threading
from collections import Counter
from pathlib import Path

import pytest
from launch import QUICK, launch

from ddp_eval import demo

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class _Hub(http.server.BaseHTTPRequestHandler):
    """As much of a hub as transformers asks for: the files of the demo model as the repository lab/model."""

    downloads: Counter

    def do_HEAD(self):
        self._answer(with_body=False)

    def do_GET(self):
        self._answer(with_body=True)

    def _answer(self, with_body):
        path = Path(demo.MODEL_PATH) / self.path.rpartition("/")[2]
        known = self.path.startswith(("/lab/model/resolve/main/", f"/lab/model/resolve/{COMMIT}/")) and path.is_file()
        if not known:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = path.read_bytes()
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.downloads[path.name] += 1
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub():
    """The address of a hub, and how often each file was downloaded from it."""
    downloads: Counter[str] = Counter()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Hub", (_Hub,), {"downloads": downloads}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", downloads
    server.shutdown()
    server.server_close()


def test_one_download_for_all_ranks(hub, tmp_path):
    """Catches ranks that each fetch the weights: 64 times 140 GB. The hub's client keeps them apart with a lock in the cache."""
    address, downloads = hub
    flags = ("--model_args", "pretrained=lab/model", "--tasks", "demo_lambada", "--limit", "2", "--device", "cpu")
    variables = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
    variables |= {"HF_HUB_ETAG_TIMEOUT": "100", "HF_HUB_DOWNLOAD_TIMEOUT": "100"}  # a request that is asked again counts twice
    finished = launch(2, *flags, program=QUICK, **variables)
    assert finished.returncode == 0, str(finished)
    assert downloads["model.safetensors"] == 1, downloads
    assert max(downloads.values()) == 1, downloads
