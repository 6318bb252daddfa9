"""Sockets that servers of this package listen on."""

import contextlib
import socket
import sys

from prefect_rollout.errors import ConfigurationError
from prefect_rollout.text import one_line


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens on a TCP address.

    Args:
        host: address or name of this machine.
        port: port; 0 for any that is free.

    Raises:
        ConfigurationError: the port is in use, or the address is not one of this machine.
    """
    with contextlib.ExitStack() as undo:
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            # With the protocol named, unlike in socket.create_server: asyncio turns Nagle's algorithm
            # off only for sockets that know they are TCP, and each answer would take 40 ms more.
            listener = undo.enter_context(socket.socket(family, kind, protocol))
            if sys.platform == "win32":  # another program may share the port otherwise
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
            else:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(2048)
        except (OSError, OverflowError, UnicodeError) as error:
            raise ConfigurationError(
                f"cannot listen on {one_line(host, 80)} port {port}: {error}",
                advice="Choose another port with --port, or end the program that uses it.",
            ) from error
        undo.pop_all()
    return listener
