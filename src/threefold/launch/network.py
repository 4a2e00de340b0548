"""Names, addresses and interfaces of this machine."""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct

_SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of an interface


def is_this_machine(host: str) -> bool:
    """Whether a name or an address is one of this machine's."""
    if host in ("localhost", socket.gethostname(), socket.getfqdn()):
        return True
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    return any(_can_bind(address) for address in found)


def _can_bind(address: str) -> bool:
    """Only an address of its own can a machine listen on."""
    version = ipaddress.ip_address(address.split("%")[0]).version
    with socket.socket(socket.AF_INET6 if version == 6 else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def free_port() -> int:
    """A port of this machine that nobody listens on at the moment."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])


def interface_to(host: str) -> str:
    """Name of the interface over which this machine reaches another; empty where that cannot be told.

    gloo would otherwise take the one that the machine's own name leads to, which is often the loopback.
    """
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # sends nothing: only the route is looked up
            own = probe.getsockname()[0]
            for _, name in socket.if_nameindex():
                if _address_of(probe, name) == own:
                    return name
    except OSError:
        return ""
    return "lo" if own.startswith("127.") else ""


def _address_of(probe: socket.socket, interface: str) -> str:
    try:
        answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
    except OSError:
        return ""
    return socket.inet_ntoa(answer[20:24])
