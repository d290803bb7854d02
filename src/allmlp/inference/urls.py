"""Images at URLs, fetched with limits: of size, of time, and to public addresses.

A service that predicts for others must not read its own network for them. So the addresses of a host are checked, and
the connection goes to one that was checked, also after a redirect; no credentials are sent, and no proxy is used.
"""

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable
from urllib.parse import SplitResult, urljoin, urlsplit

from PIL import Image

from allmlp.data.decode import UnreadableImage, decode, unreadable_image
from allmlp.device import first_line

SCHEMES = ("http://", "https://")
MAX_URL_BYTES = 100 << 20
MAX_REDIRECTS = 5
SECONDS_TO_CONNECT, SECONDS_IN_ALL = 10.0, 60.0
REDIRECTS = (301, 302, 303, 307, 308)
NAT64 = ipaddress.ip_network("64:ff9b::/96")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def is_url(text: str) -> bool:
    return text.lower().startswith(SCHEMES)


def is_public(text: str) -> bool:
    """Whether an IP address belongs to the public internet, as does the one that it may stand for."""
    address: Address = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        inside = address.ipv4_mapped or address.sixtofour or (address.teredo or (None, None))[1]
        if address in NAT64:
            inside = ipaddress.IPv4Address(address.packed[-4:])
        if inside is not None:
            return is_public(str(inside))
    return address.is_global and not address.is_multicast


class Download:
    """A store of images at URLs: the name is the URL."""

    in_memory = False

    def __init__(self, allowed: Callable[[str], bool] = is_public) -> None:
        self.allowed = allowed

    def open(self, name: str, max_pixels: int, min_side: int | None = None) -> Image.Image:
        return decode(fetch(name, self.allowed), name, max_pixels, min_side)

    def missing(self, name: str) -> bool:
        return False


def fetch(url: str, allowed: Callable[[str], bool] = is_public) -> bytes:
    """The bytes at a URL.

    Args:
        url: of HTTP or HTTPS.
        allowed: whether an IP address may be connected to.

    Raises:
        UnreadableImage: a URL that is not valid, a server that fails or is not public, more than 100 MB, or no answer
            in time.
    """
    deadline, at = time.monotonic() + SECONDS_IN_ALL, url
    try:
        for _ in range(MAX_REDIRECTS + 1):
            connection = connect(urlsplit(at), url, allowed)
            timer = threading.Timer(deadline - time.monotonic(), shut_down, args=(connection,))
            timer.daemon = True
            timer.start()
            try:
                target = urlsplit(at)._replace(scheme="", netloc="", fragment="").geturl() or "/"
                connection.request("GET", target, headers={"User-Agent": "allmlp", "Accept": "image/*,*/*"})
                answer = connection.getresponse()
                if answer.status not in REDIRECTS:
                    return read(answer, url, deadline)
                at = urljoin(at, answer.getheader("Location") or "")
            finally:
                timer.cancel()
                connection.close()
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, UnreadableImage):
            raise
        reason = f"it could not be fetched ({first_line(error)})"
        raise unreadable_image(url, reason, "check the address, or download it") from error
    raise unreadable_image(url, f"it redirects more than {MAX_REDIRECTS} times", "give its final address")


def shut_down(connection: http.client.HTTPConnection) -> None:
    """Ends a connection whose server sends too slowly."""
    with contextlib.suppress(OSError):
        connection.sock.shutdown(socket.SHUT_RDWR)


def connect(parts: SplitResult, url: str, allowed: Callable[[str], bool]) -> http.client.HTTPConnection:
    """A connection to a checked address of the host."""
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise unreadable_image(url, "it leads to no address of HTTP or HTTPS", "give one that begins with https://")
    if parts.username or parts.password:
        raise unreadable_image(url, "it holds a user name or password", "download it, and give the file")
    secure = parts.scheme == "https"
    port = parts.port or (443 if secure else 80)
    addresses = [str(found[4][0]) for found in socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)]
    private = [address for address in addresses if not allowed(address)]
    if private or not addresses:
        reason = f"{parts.hostname} ({private[0]}) is not a public address" if private else "its host has no address"
        raise unreadable_image(url, reason, "download it, and give the file")
    raw = socket.create_connection((addresses[0], port), timeout=SECONDS_TO_CONNECT)
    connection = http.client.HTTPConnection(parts.hostname, port, timeout=SECONDS_TO_CONNECT)
    connection.sock = raw
    if secure:
        try:
            connection.sock = ssl.create_default_context().wrap_socket(raw, server_hostname=parts.hostname)
        except OSError:
            raw.close()
            raise
    return connection


def read(answer: http.client.HTTPResponse, url: str, deadline: float) -> bytes:
    """The body of an answer, within the limits."""
    if answer.status != 200:
        raise unreadable_image(url, f"the server answers {answer.status} {answer.reason}", "check the address")
    pieces, size = [], 0
    while piece := answer.read1(1 << 16):
        pieces.append(piece)
        size += len(piece)
        if size > MAX_URL_BYTES:
            raise unreadable_image(url, f"it has more than {MAX_URL_BYTES:,} bytes", "download it, and give the file")
        if time.monotonic() > deadline:
            raise unreadable_image(url, f"it takes more than {SECONDS_IN_ALL:g} s", "download it, and give the file")
    return b"".join(pieces)
