"""The other machines of a run: whether they are alive, what failed there, and whether they have finished.

A thread of each launcher beats in the store of the first machine. A machine that stops beating (killed, without power,
cut off) would otherwise be noticed only when a collective operation times out; over NCCL, so would the failure of a
process elsewhere.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from torch._C._distributed_c10d import Store
from torch.distributed import DistError

from threefold.launch.failures import Failure, Kind
from threefold.launch.rendezvous import Meeting

BEAT_SECONDS = 0.5
SILENT_SECONDS = 15.0
"""A machine that has not beaten for so long is taken for gone."""
SILENT_AFTER_FAILURE_SECONDS = 4.0
"""The same when processes here have lost another, so that something has happened for certain."""
SETTLE_SECONDS = 10.0
"""How long a launcher whose processes have failed asks the others for the cause, and the first keeps the store."""
_POLL_SECONDS = 0.1
_STOP_SECONDS = 2.0


class NeighbourWatch:
    """Beats for this machine and listens to the others, on a thread of its own.

    Args:
        meeting: that has taken place.
        on_failure: called once, on the thread, with the first failure of another machine.
    """

    def __init__(self, meeting: Meeting, on_failure: Callable[[Failure], None]) -> None:
        self._meeting = meeting
        self._me = meeting.layout.node_rank
        self._others = [node for node in range(meeting.layout.nodes) if node != self._me]
        self._on_failure = on_failure
        self._found: Failure | None = None
        self._heard_out: set[int] = set()
        """Machines that have finished, failed or gone: nothing more is expected of them."""
        self._byes: set[int] = set()
        """Machines that have heard of all others that they have finished."""
        self._to_tell: dict[str, str] = {}
        self._silent_seconds = SILENT_SECONDS
        self._last = {node: (b"", time.monotonic()) for node in self._others}
        self._round_at = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        threading.Thread(target=self._time_rounds, daemon=True).start()

    def finished(self) -> Failure | None:
        """Tell the others that this machine has finished, and wait for them; the failure of one that has not."""
        self._to_tell[f"finished/{self._me}"] = "1"
        while self._thread.is_alive() and self._found is None and len(self._heard_out) < len(self._others):
            time.sleep(_POLL_SECONDS)
        # the first machine keeps the store, so it leaves last: when the others have said that they have heard all
        self._to_tell[f"bye/{self._me}"] = "1"
        end = time.monotonic() + SETTLE_SECONDS
        while self._thread.is_alive() and self._found is None and time.monotonic() < end and not self._may_leave():
            time.sleep(_POLL_SECONDS)
        self.stop()
        return self._found

    def _may_leave(self) -> bool:
        return not self._to_tell and (self._me > 0 or len(self._byes) == len(self._others))

    def cause(self, own: Failure) -> Failure:
        """Tell the others how this machine's processes ended, and hear whether one of theirs is the cause."""
        self._silent_seconds = SILENT_AFTER_FAILURE_SECONDS
        self._to_tell[f"failure/{self._me}"] = own.text()
        end = time.monotonic() + SETTLE_SECONDS
        while time.monotonic() < end and self._thread.is_alive():
            knows = own.kind.is_own or (self._found is not None and self._found.kind.is_own)
            if len(self._heard_out) == len(self._others) or (self._me > 0 and knows and not self._to_tell):
                break
            time.sleep(_POLL_SECONDS)
        self.stop()
        return self._found if self._found is not None and not own.kind.is_own else own

    def stop(self) -> None:
        """End the thread."""
        self._ended.set()
        self._thread.join(timeout=_STOP_SECONDS)

    def _run(self) -> None:
        beats = 0
        try:
            store = self._meeting.connection()
            while True:
                beats += 1
                store.set(f"beat/{self._me}", str(beats))
                for name in list(self._to_tell):
                    store.set(name, self._to_tell[name])
                    del self._to_tell[name]
                for node in self._others:
                    self._listen_to(store, node)
                    if self._me == 0 and store.check([f"bye/{node}"]):
                        self._byes.add(node)
                self._round_at = time.monotonic()
                if self._ended.wait(BEAT_SECONDS):
                    return
        except DistError:
            # the first machine keeps the store; where all have finished it may leave before the others have asked
            if 0 not in self._heard_out and not self._ended.is_set():
                self._note(self._gone(0))

    def _time_rounds(self) -> None:
        """Notice that the store gives no answer: over a cut cable its connection is not closed, and asking it hangs."""
        while not self._ended.wait(BEAT_SECONDS):
            if time.monotonic() - self._round_at > self._silent_seconds:
                self._note(self._gone(0))
                return

    def _listen_to(self, store: Store, node: int) -> None:
        if node in self._heard_out:
            return
        if store.check([f"finished/{node}"]):
            self._heard_out.add(node)
        elif store.check([f"failure/{node}"]):
            self._note(Failure.of_text(store.get(f"failure/{node}")))
            self._heard_out.add(node)
        else:
            self._listen_for_beat(store, node)

    def _listen_for_beat(self, store: Store, node: int) -> None:
        beat = store.get(f"beat/{node}") if store.check([f"beat/{node}"]) else b""
        now = time.monotonic()
        if beat != self._last[node][0]:
            self._last[node] = beat, now
        elif now - self._last[node][1] > self._silent_seconds:
            self._note(self._gone(node))
            self._heard_out.add(node)

    def _gone(self, node: int) -> Failure:
        host = self._meeting.hosts[node]
        message = (
            f"machine {node} (host {host}) is not heard of any more: its threefold was killed, or the machine or its "
            "network is down"
        )
        return Failure(Kind.GONE, -1, message, host, node=node)

    def _note(self, failure: Failure) -> None:
        """Keep the likeliest cause; the first failure of all is passed on."""
        first = self._found is None
        if self._found is None or (failure.kind.is_own and not self._found.kind.is_own):
            self._found = failure
        if first:
            self._on_failure(failure)
