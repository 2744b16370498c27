"""Where process 0 of a run is reached, and on which addresses of its machine it listens."""

from __future__ import annotations

import ipaddress
import socket

from hrvlm_jax.core.errors import UserError


def split_address(address: str) -> tuple[str, int]:
  """'host:8482' -> ('host', 8482).

  Raises:
    UserError: not of that form.
  """
  host, _, port = address.rpartition(':')
  if not host or not port.isdigit() or not 0 < int(port) < 65535:
    raise UserError(f"coordinator: found '{address}', expected HOST:PORT, such as localhost:8482")
  return host.strip('[]'), int(port)


def own_addresses(host: str) -> list[str]:
  """Addresses of this machine on which process 0 listens for `host`; [] for all it has.

  All are needed where the name stands for none of its own (a port that is forwarded), or for the
  loopback here and for something else on the other hosts (Debian's 127.0.1.1).
  """
  try:
    found = list(dict.fromkeys(
      info[4][0] for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)))
  except OSError:
    return []
  loopback = [ipaddress.ip_address(address.partition('%')[0]).is_loopback for address in found]
  if any(loopback) and not is_local(host):
    return []
  return [address for address in found if _own(address)]


def is_local(host: str) -> bool:
  """Whether a coordinator's host is written as the loopback: all processes are on this machine."""
  try:
    return ipaddress.ip_address(host).is_loopback
  except ValueError:
    return host == 'localhost' or host.endswith('.localhost')


def _own(address: str) -> bool:
  family = socket.AF_INET6 if ':' in address else socket.AF_INET
  try:
    with socket.socket(family, socket.SOCK_STREAM) as probe:
      probe.bind((address, 0))
    return True
  except OSError:
    return False


def bind_address(address: str) -> str | None:
  """Where JAX's coordinator listens for HOST:PORT; None: on all addresses (`own_addresses`)."""
  host, port = split_address(address)
  own = sorted(own_addresses(host), key=lambda found: ':' in found)  # the older form first
  if not own:
    return None
  return f'[{own[0]}]:{port}' if ':' in own[0] else f'{own[0]}:{port}'
