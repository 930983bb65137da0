"""What backends of real interfaces have in common: a namespace, names, and closing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import netns
from backend_contract import key

import wggw

LINK = wggw.Link("", ("10.99.0.1/16", "fd00:99::1/64"), 1420, 51999, b"")


class Opened:
    """The RealInterface of backend_contract; `make` and `end` are those of the kind."""

    def __init__(
        self, make: Callable[[wggw.Link], wggw.Backend], end: Callable[[str], None]
    ) -> None:
        # A WireGuard private key comes back with curve25519's clamping.
        private_key = bytearray(key("private"))
        private_key[0] &= 248
        private_key[31] = private_key[31] & 127 | 64
        self.link = LINK._replace(name=netns.unique(), private_key=bytes(private_key))
        self.backends: list[wggw.Backend] = []
        self._make, self._end = make, end

    def open(self, link: wggw.Link) -> wggw.Backend:
        backend = self._make(link)
        self.backends.append(backend)
        return backend

    def destroy(self) -> None:
        self._end(self.link.name)


@contextlib.contextmanager
def interface(
    make: Callable[[wggw.Link], wggw.Backend], end: Callable[[str], None]
) -> Iterator[Opened]:
    """A RealInterface in a namespace of its own, which the thread is in."""
    opened = None
    try:
        with netns.Namespace() as namespace, namespace.inside():
            opened = Opened(make, end)
            yield opened
            for backend in opened.backends:
                backend.close()
    finally:
        if opened is not None:
            netns.forget_socket(opened.link.name)
