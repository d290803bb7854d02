"""Images from elsewhere: URLs, within limits and from public addresses alone, and lists on standard input."""

import contextlib
import io
import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

import allmlp
from allmlp.data.decode import MAX_PIXELS, UnreadableImage
from allmlp.inference import images as images_module
from allmlp.inference import urls
from allmlp.inference.listing import read_names
from allmlp.inference.urls import Download, fetch, is_public, is_url


def everything(address: str) -> bool:
    return True


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(file, "PNG")
    return file.getvalue()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        kind, _, rest = self.path.strip("/").partition("/")
        if kind == "loop":
            return self.answer(302, b"", Location=f"/loop/{int(rest or 0) + 1}")
        if kind == "to":
            return self.answer(301, b"", Location=rest)
        if kind == "large":
            return self.answer(200, bytes(3000))
        if kind == "slow":
            time.sleep(1)
        if kind == "drip":  # a header that never ends
            with contextlib.suppress(OSError):
                for _ in range(100):
                    self.wfile.write(b"x")
                    time.sleep(0.05)
            return None
        if kind == "endless":
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                while True:
                    self.wfile.write(bytes(1000))
                    time.sleep(0.01)
            return None
        return self.answer(404 if kind == "none" else 200, png())

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.daemon_threads, running.block_on_close = True, False
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True), ("2606:2800:220:1:248:1893:25c8:1946", True), ("64:ff9b::5db8:d822", True),
        ("127.0.0.1", False), ("10.1.2.3", False), ("172.16.0.1", False), ("192.168.1.1", False), ("0.0.0.0", False),
        ("169.254.169.254", False), ("100.64.0.1", False), ("224.0.0.1", False), ("255.255.255.255", False),
        ("::1", False), ("::", False), ("fe80::1%eth0", False), ("fd00::1", False), ("ff02::1", False),
        ("::ffff:127.0.0.1", False), ("::ffff:10.0.0.1", False), ("64:ff9b::7f00:1", False), ("2002:7f00:1::", False),
    ],
)  # fmt: skip
def test_public_addresses(address: str, public: bool) -> None:
    assert is_public(address) == public


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/a.png", "http://localhost/a.png", "http://2130706433/", "http://0x7f000001/", "http://[::1]/",
        "http://127.1/", "http://[::ffff:127.0.0.1]/", "https://0.0.0.0:443/", "HTTP://LOCALHOST",
    ],
)  # fmt: skip
def test_private_addresses_are_refused(url: str) -> None:
    with pytest.raises(UnreadableImage, match=r"not a public address; download it|could not be fetched"):
        fetch(url)


def test_a_redirect_leads_to_no_private_address(server: str) -> None:
    asked = itertools.count()
    with pytest.raises(UnreadableImage, match="not a public address"):
        fetch(f"{server}/to/http://127.0.0.1:1/secret", lambda address: next(asked) == 0)
    for elsewhere in ("file:///etc/passwd", "ftp://127.0.0.1/x", "gopher://x"):
        with pytest.raises(UnreadableImage, match="no address of HTTP"):
            fetch(f"{server}/to/{elsewhere}", everything)


def test_the_connection_goes_to_the_address_that_was_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that means another address when it is asked again does not help."""
    answers, connected = iter(["93.184.216.34", "127.0.0.1"]), []
    monkeypatch.setattr(urls.socket, "getaddrinfo", lambda *_, **__: [(0, 0, 0, "", (next(answers), 80))])

    def connect(address: tuple[str, int], timeout: float) -> None:
        connected.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr(urls.socket, "create_connection", connect)
    with pytest.raises(UnreadableImage, match="could not be fetched"):
        fetch("http://example.com/a.png")
    assert connected == [("93.184.216.34", 80)]


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/none", "answers 404"),
        ("/loop", "redirects more than 5 times"),
        ("/large", "more than 2,000 bytes"),
        ("/endless", "takes more than 0.3 s|more than 2,000 bytes"),
        ("/drip", "could not be fetched"),
        ("/slow", "could not be fetched"),
    ],
)
def test_limits(server: str, path: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urls, "MAX_URL_BYTES", 2000)
    monkeypatch.setattr(urls, "SECONDS_IN_ALL", 0.3)
    monkeypatch.setattr(urls, "SECONDS_TO_CONNECT", 0.3)
    before = time.monotonic()
    with pytest.raises(UnreadableImage, match=said) as caught:
        fetch(server + path, everything)
    assert time.monotonic() - before < 3
    assert str(caught.value).startswith(f"{server}{path} cannot be read: ")


def test_what_is_no_valid_url() -> None:
    for url in ("http://", "https://user:secret@example.com/a", "http://[::", "http://a:99999999/"):
        with pytest.raises(UnreadableImage):
            fetch(url, everything)
    assert [is_url(text) for text in ("https://a", "HTTP://a", "http:/a", "a/http://b", "file:///a")] == [True] * 2 + [
        False
    ] * 3


def test_urls_are_images_like_others(server: str, mixer, color_weights, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(images_module, "Download", lambda: Download(everything))
    assert Download(everything).open(f"{server}/to/{server}/a", MAX_PIXELS).size == (16, 16)
    model = allmlp.load(color_weights)
    (good, bad) = allmlp.predict(model, [f"{server}/a.png", f"{server}/none"], device="cpu")
    assert good.classes
    assert "answers 404" in (bad.problem or "")
    answer = mixer("predict", color_weights, f"{server}/a.png", f"{server}/none", "--json")
    rows = json.loads(answer.out)["predictions"]
    assert [set(row) for row in rows] == [{"image", "predictions"}, {"image", "problem"}]


# Lists


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (b"a.png\nb c.png\n", ["a.png", "b c.png"]),
        (b"\xef\xbb\xbfa.png\r\n\r\n\nb.png", ["a.png", "b.png"]),
        (b"a\nb.png\0c.png\0", ["a\nb.png", "c.png"]),
        (b"\xff.png\n", ["\udcff.png"]),
        (b"one", ["one"]),
        (b"", []),
        (b"\n\r\n", []),
        (b"x" * 200_000 + b"\ny\n", ["x" * 200_000, "y"]),
    ],
)
def test_names_in_a_list(text: bytes, names: list[str]) -> None:
    assert list(read_names(io.BytesIO(text))) == names
    assert list(read_names(io.BufferedReader(io.BytesIO(text)))) == names  # pyright: ignore[reportArgumentType]


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    def give(data: bytes) -> None:
        monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(data), isatty=lambda: False))

    return give


def test_predict_reads_a_list(mixer, color_weights, pictures, tmp_path: Path, stdin, monkeypatch) -> None:
    """What is missing keeps its row; folders in the list are searched."""
    pictures(tmp_path / "d", {"red": 2, "blue": 1})
    (tmp_path / "d" / "blue" / "notes.txt").touch()
    monkeypatch.chdir(tmp_path)
    stdin(b"d/red/001.png\nno/missing.png\nd/blue\nd/red/000.png\n")
    answer = mixer("predict", color_weights, "-", "--json")
    assert answer.status == 0
    found = json.loads(answer.out)
    assert [row["image"] for row in found["predictions"]] == [
        "d/red/001.png",
        "no/missing.png",
        "d/blue/000.png",
        "d/red/000.png",
    ]
    assert "No such file" in found["predictions"][1]["problem"]
    assert found["left_out"] == {".txt": 1}
    stdin(b"missing.png\n")
    assert mixer("predict", color_weights, "-").status == 2
    stdin(b"\n")
    assert mixer("predict", color_weights, "-").last == "mixer: no images: standard input names none"
    assert "twice" in mixer("predict", color_weights, "-", "-").last
