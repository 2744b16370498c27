"""The thread that drives an engine for many callers: a queue, its limit, cancellation, draining."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
import dataclasses
import queue
import threading
import traceback
from typing import Any

from hrvlm_jax.serving.engine import Engine, State
from hrvlm_jax.serving.requests import Counts, Piece, Prepared


class Full(Exception):
  """As many requests as there may be are waiting; ask again later."""


class Closed(Exception):
  """No new requests are taken: the driver is being closed."""


@dataclasses.dataclass(eq=False)
class Ticket:
  """One request on its way; `tell` is called with every piece, or once with an exception.

  It is called by the driver's thread, which it must not hold up.
  """

  tell: Callable[[Piece | Exception], None]
  prepared: Prepared | None = None
  row: int | None = None
  over: bool = False


@dataclasses.dataclass(frozen=True)
class Snapshot:
  """What a driver is doing: requests on their way, those among them without a slot, slots that are
  taken, and what was done so far; `failures`: times all requests in slots were lost to an error."""

  pending: int
  waiting: int
  busy: int
  counts: Counts
  cancelled: int
  failures: int


class Driver:
  """Takes requests from any thread and gives their tokens back as they come.

  Args:
    engine: driven by this thread alone from now on (`prepare` may be called by all).
    queue: requests that may wait beside those in slots; those being prepared count.
  """

  def __init__(self, engine: Engine, *, queue: int = 32):
    self.engine, self.limit = engine, engine.count + queue
    self._changed = threading.Condition()
    self._waiting: deque[Ticket] = deque()
    self._open: set[Ticket] = set()
    self._closing = False
    self._cancelled = self._failures = 0
    self._before = Counts()  # of states that an error ended
    self._state = engine.start()
    self._thread = threading.Thread(target=self._drive, name='driver', daemon=True)
    self._thread.start()

  def reserve(self, tells: list[Callable[[Piece | Exception], None]]) -> list[Ticket]:
    """Places for so many requests, all of them or none, before any work is done for them.

    Every ticket must be submitted or cancelled.

    Raises:
      Full, Closed
    """
    with self._changed:
      if self._closing:
        raise Closed
      if len(self._open) + len(tells) > self.limit:
        raise Full
      tickets = [Ticket(tell) for tell in tells]
      self._open.update(tickets)
      return tickets

  def submit(self, ticket: Ticket, prepared: Prepared) -> None:
    """Puts a request into the queue; nothing happens if it was cancelled before."""
    with self._changed:
      if not ticket.over:
        ticket.prepared = prepared
        self._waiting.append(ticket)
        self._changed.notify_all()

  def cancel(self, ticket: Ticket) -> None:
    """Gives a request up wherever it is; nothing happens to one that is complete."""
    with self._changed:
      if ticket.over:
        return
      self._over(ticket)
      self._cancelled += 1
      if ticket in self._waiting:
        self._waiting.remove(ticket)
      self._changed.notify_all()

  def stream(self, make: Callable[[], Prepared]) -> Iterator[Piece]:
    """The pieces of one answer as they come; leaving the iterator gives the request up.

    Args:
      make: prepares the request, once there is a place for it.

    Raises:
      Full, Closed, and what `make` or the device raises.
    """
    pieces: queue.SimpleQueue[Piece | Exception] = queue.SimpleQueue()
    ticket = self.reserve([pieces.put])[0]
    try:
      self.submit(ticket, make())
      while True:
        piece = pieces.get()
        if isinstance(piece, Exception):
          raise piece
        yield piece
        if piece.reason:
          return
    finally:
      self.cancel(ticket)

  def snapshot(self) -> Snapshot:
    """See `Snapshot`; of one moment."""
    with self._changed:
      counts = self._before.add(**dataclasses.asdict(self._state.counts))
      return Snapshot(len(self._open), len(self._waiting),
                      sum(ticket.row is not None for ticket in self._open), counts,
                      self._cancelled, self._failures)

  def close(self, timeout: float | None = None) -> bool:
    """Takes no more requests, lets those on their way finish, ends the thread.

    Args:
      timeout: seconds after which the rest is cancelled.

    Returns:
      Whether all of them finished.
    """
    with self._changed:
      self._closing = True
      self._changed.notify_all()
      finished = self._changed.wait_for(lambda: not self._open, timeout)
      left = list(self._open)
    for ticket in left:
      self.cancel(ticket)
    self._thread.join()
    return finished

  def _over(self, ticket: Ticket) -> None:
    ticket.over = True
    self._open.discard(ticket)
    self._changed.notify_all()

  def _drive(self) -> None:
    held: dict[int, Ticket] = {}
    while True:
      with self._changed:
        while not (held or self._waiting):
          if self._closing and not self._open:
            return
          self._changed.wait()
        for row in [row for row, ticket in held.items() if ticket.over]:
          del held[row]
          self._state = self._state.release(row)
        room = self._waiting and len(held) < self.engine.count
        ticket = self._waiting.popleft() if room else None
      try:
        if ticket is not None:
          self._hand_on(held, *self._admitted(held, ticket))
        elif held:
          self._hand_on(held, *self.engine.step(self._state))
      except Exception as error:  # noqa: BLE001 - whatever the device says: the slots are lost
        traceback.print_exc()
        self._lost(held, ticket, error)

  def _admitted(self, held: dict[int, Ticket], ticket: Ticket) -> tuple[State, dict[int, Piece]]:
    state, row, piece = self.engine.admit(self._state, ticket.prepared)
    held[row], ticket.row = ticket, row
    return state, {row: piece}

  def _hand_on(self, held: dict[int, Ticket], state: State, pieces: dict[int, Piece]) -> None:
    self._state = state
    for row, piece in pieces.items():
      ticket = held[row]
      if ticket.over:  # cancelled meanwhile: its slot is freed before the next step
        continue
      if piece.reason:
        del held[row]
        self._state = self._state.release(row)
        with self._changed:
          self._over(ticket)
      ticket.tell(piece)

  def _lost(self, held: dict[int, Ticket], ticket: Ticket | None, error: Exception) -> None:
    """Tells all requests in slots that they failed, and begins anew."""
    lost: list[Any] = [*held.values(), *([] if ticket is None or ticket in held.values()
                                         else [ticket])]
    held.clear()
    with self._changed:
      self._failures += 1
      self._before = self._before.add(**dataclasses.asdict(self._state.counts))
      self._state = self.engine.start()
      lost = [one for one in lost if not one.over]
      for one in lost:
        self._over(one)
    for one in lost:
      one.tell(error)
