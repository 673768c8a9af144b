"""What data name is fetched within bounds, and never from where only this machine can reach."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import aiohttp
import pytest
from fledge.conf.schema import EvaluateConfig
from fledge.data_synthesis.prompts import addresses
from fledge.data_synthesis.prompts.addresses import check_foreign, read_address
from fledge.data_synthesis.prompts.rows import read_prompt
from fledge.eval.questions import question


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        port = self.server.server_address[1]
        path = urlsplit(self.path).path  # of a whole URL where a proxy is asked
        self.send_response(302 if path.startswith("/to") else 200)
        places = {
            "/to/inside": f"http://127.0.0.2:{port}/",
            "/to/private": "http://10.0.0.1/",
            "/to/proxied": "http://example.org/",
            "/to/file": "file:///etc/hostname",
        }
        if path in places:
            self.send_header("Location", places[path])
        self.end_headers()
        try:
            for _ in range({"/large": 40, "/slow": 40}.get(self.path, 1)):
                self.wfile.write(b"x" if self.path == "/slow" else b"x" * 2**16)
                time.sleep(0.1 if self.path == "/slow" else 0)
        except OSError:
            pass  # the reader has enough


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    server = ThreadingHTTPServer(("", 0), _Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "localhost", "0x7f000001", "[::ffff:127.0.0.1]"])
def test_hosts_of_this_machines_network_are_asked_only_if_allowed(port, host):
    address = f"http://{host}:{port}/"
    with pytest.raises(ValueError, match=r"in this machine's network; set data\.local_images=true to allow"):
        read_address(address)
    if not host.startswith("["):
        assert len(read_address(address, local=True)) == 2**16


@pytest.mark.parametrize("host", ["10.1.2.3", "192.168.0.1", "169.254.169.254", "[::1]", "[fe80::1]", "100.64.0.1"])
def test_private_link_local_and_shared_addresses_are_refused_without_being_asked(host):
    for scheme in ("https", "HTTPS"):
        with pytest.raises(ValueError, match=r"its host .* is in this machine's network"):
            read_address(f"{scheme}://{host}/latest/meta-data")


def test_a_redirect_leads_no_further_than_an_address_itself(port, monkeypatch):
    inside = addresses._is_inside
    monkeypatch.setattr(addresses, "_is_inside", lambda host: host != "127.0.0.1" and inside(host))
    assert len(read_address(f"http://127.0.0.1:{port}/")) == 2**16
    with pytest.raises(ValueError, match=r"its host 127\.0\.0\.2 is in this machine's network"):
        read_address(f"http://127.0.0.1:{port}/to/inside")
    with pytest.raises(aiohttp.ClientError):
        read_address(f"http://127.0.0.1:{port}/to/file")


def test_what_is_too_large_or_too_slow_is_given_up(port, tmp_path, monkeypatch):
    monkeypatch.setattr(addresses, "MOST_MIB", 1)
    (tmp_path / "large").write_bytes(b"x" * (2**20 + 1))
    (tmp_path / "fits").write_bytes(b"x" * 2**20)
    large = [f"http://127.0.0.1:{port}/large", str(tmp_path / "large"), (tmp_path / "large").as_uri()]
    for address in (*large, "data:," + "x" * (2**20 + 1), "/dev/zero"):
        with pytest.raises(ValueError, match="it is larger than 1 MiB"):
            read_address(address, local=True)
    assert len(read_address(str(tmp_path / "fits"))) == 2**20
    monkeypatch.setattr(addresses, "TIMEOUT_S", 0.5)
    began = time.monotonic()
    with pytest.raises(ValueError, match="it has not come within 0 s"):
        read_address(f"http://127.0.0.1:{port}/slow", local=True)
    assert time.monotonic() - began < 3


def shown(address: str) -> dict:
    parts = [{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {"url": address}}]
    return {"messages": [{"role": "user", "content": parts}]}


FILES = ["/etc/hostname", "images/1.png", "file:///etc/hostname", "FILE:///etc/hostname"]
HOSTS = ["http://10.0.0.1/a.png", "http://localhost/a.png", "HTTP://localhost/a.png"]


@pytest.mark.parametrize("address", [*FILES, *HOSTS])
def test_data_of_the_hub_name_no_files_and_hosts_of_this_machine(address, monkeypatch):
    for refused in (lambda: check_foreign(address), lambda: read_prompt(shown(address), "s", 0, local=False)):
        with pytest.raises(ValueError, match=r"^refers to .*data\.local_images=true"):
            refused()
    assert read_prompt(shown(address), "s", 0, local=True, hosts=address in HOSTS)[0].turns
    row = {"prompt": "What is it?", "images": [address]}
    monkeypatch.setattr(question, "read_rows", lambda *_, **__: iter([("org/exam row 1", row)]))
    with pytest.raises(ValueError, match=r"^evaluate\.questions: org/exam row 1 refers to .*data\.local_images=true"):
        question.load_questions(EvaluateConfig(questions="org/exam"))


@pytest.mark.parametrize("address", ["HTTPS://example.org/a.png", "Data:image/png;base64,AAAA", "http://8.8.8.8/a.png"])
def test_data_of_the_hub_name_addresses_of_the_world(address):
    check_foreign(address)
    assert read_prompt(shown(address), "s", 0, local=False)[0].turns


def test_a_proxy_is_asked_though_it_is_inside(port, monkeypatch):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{port}")
    assert len(read_address("http://example.org/a.png")) == 2**16
    monkeypatch.setenv("no_proxy", "127.0.0.2,127.0.0.3")
    for address in ("http://10.0.0.1/a.png", "http://example.org/to/private", "http://example.org/to/inside"):
        with pytest.raises(ValueError, match="in this machine's network"):
            read_address(address)
    inside = addresses._is_inside
    monkeypatch.setattr(addresses, "_is_inside", lambda host: host != "127.0.0.3" and inside(host))
    assert len(read_address(f"http://127.0.0.3:{port}/to/proxied")) == 2**16


def test_the_server_of_these_tests_is_reached_by_both_addresses(port):
    for host in ("127.0.0.1", "127.0.0.2"):
        socket.create_connection((host, port)).close()
