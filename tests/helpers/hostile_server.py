"""A hostile server in place of object storage: an address's first folder, its bucket, chooses how it does harm."""

import os
import socket
import threading
import time
from collections.abc import Callable, Mapping

REMEMBERED = "it_must_not_be_shown"  # what the server knows of its client, and sends back
ABOUT = b'Last-Modified: Wed, 01 Jan 2025 00:00:00 GMT\r\nETag: "a"\r\n\r\n'


def _announce(connection: socket.socket, length: int) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n" % length + ABOUT)


def _garbage(connection: socket.socket, head: bool, port: int) -> None:
    connection.sendall(b"\x00\xff garbage" * 100)


def _close(connection: socket.socket, head: bool, port: int) -> None:
    pass


def _hang(connection: socket.socket, head: bool, port: int) -> None:
    time.sleep(60)


def _loop(connection: socket.socket, head: bool, port: int) -> None:
    place = b"http://localhost:%d/loop/a.jpg" % port
    connection.sendall(
        b"HTTP/1.1 307 Moved\r\nLocation: " + place + b"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    )


def _huge(connection: socket.socket, head: bool, port: int) -> None:
    _announce(connection, 10**15)


def _short(connection: socket.socket, head: bool, port: int) -> None:
    _announce(connection, 100_000)
    if not head:
        connection.sendall(b"x" * 1000)


def _trickle(connection: socket.socket, head: bool, port: int) -> None:
    _announce(connection, 100_000)
    while not head:
        connection.sendall(b"x")
        time.sleep(0.2)


def _echo(connection: socket.socket, head: bool, port: int) -> None:
    if head:
        return _announce(connection, 100_000)
    said = f"<Error><Code>{REMEMBERED}</Code><Message>http://a:{REMEMBERED}@b</Message></Error>".encode()
    connection.sendall(b"HTTP/1.1 403 No\r\nContent-Length: %d\r\n\r\n" % len(said) + said)


WAYS: dict[str, Callable[[socket.socket, bool, int], None]] = {
    "close": _close,
    "garbage": _garbage,
    "hang": _hang,
    "loop": _loop,
    "huge": _huge,
    "short": _short,
    "trickle": _trickle,
    "echo": _echo,
}


class HostileServer:
    """Serves on loopback until the process ends."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = self._socket.getsockname()[1]
        self._serve(self._accept)

    def environment(self) -> Mapping[str, str]:
        """The environment of a process that takes it for its object storage."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        return kept | {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": REMEMBERED,
            "AWS_SECRET_ACCESS_KEY": f"{REMEMBERED}+secret",
            "AWS_SESSION_TOKEN": f"{REMEMBERED}+token",
            "AWS_REGION": "us-east-1",
            "AWS_MAX_ATTEMPTS": "2",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }

    @staticmethod
    def _serve(what: Callable[..., None], *arguments: object) -> None:
        threading.Thread(target=what, args=arguments, daemon=True).start()

    def _accept(self) -> None:
        while True:
            self._serve(self._answer, self._socket.accept()[0])

    def _answer(self, connection: socket.socket) -> None:
        with connection:
            try:
                request = b""
                while b"\r\n\r\n" not in request:
                    if not (more := connection.recv(65536)):
                        return
                    request += more
                method, path, _ = request.split(b" ", 2)
                way = path.split(b"?")[0].split(b"/")[1].decode()
                WAYS[way](connection, method == b"HEAD", self.port)
            except OSError:  # the client gave up
                return
