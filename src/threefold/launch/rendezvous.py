"""The machines of a run find each other.

torchrun's agents meet at one address, where the first machine keeps a store. This is torchrun's static rendezvous with
messages: which address does not answer, which machine is missing, which runs another recipe.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from contextlib import closing
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed import DistError
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo

from threefold.errors import ConfigError
from threefold.launch.layout import Layout

_POLL_SECONDS = 0.2
_STORE_TIMEOUT = timedelta(seconds=10)


class Meeting(RendezvousHandler):
    """Where the launchers of a run meet: the first machine listens, the others connect, each says who it is.

    Args:
        layout: of this machine.
        timeout_seconds: launch.rdzv_timeout_seconds.
        digest: of the recipe; the same on all machines.
        trouble: asked while waiting; a text ends the wait with it as the error.
        on_met: called once all have met.
    """

    def __init__(
        self,
        layout: Layout,
        timeout_seconds: float,
        digest: str,
        trouble: Callable[[], str] = lambda: "",
        on_met: Callable[[], None] = lambda: None,
    ) -> None:
        self.layout = layout
        self.timeout_seconds = timeout_seconds
        self.digest = digest
        self.trouble = trouble
        self.on_met = on_met
        self.port = layout.port
        self.hosts: dict[int, str] = {}
        self._store: TCPStore | None = None

    @property
    def address(self) -> str:
        """HOST:PORT."""
        return f"{self.layout.host}:{self.port}"

    def next_rendezvous(self) -> RendezvousInfo:
        """Meet.

        Raises:
            ConfigError: the address does not answer or cannot be listened on, a machine is missing, two have one
                number, or one runs another recipe.
        """
        end = time.monotonic() + self.timeout_seconds
        self._store = self._listen() if self.layout.node_rank == 0 else self._connect(end)
        self.port = self._store.port
        try:
            self._introduce(self._store)
            self._wait_for_all(self._store, end)
        except DistError as error:
            raise ConfigError(
                f"launch.rdzv_endpoint = {self.address}: machine 0 has gone while the machines met; it says why"
            ) from error
        self.on_met()
        where = RendezvousStoreInfo(self.layout.host, self.port)
        return RendezvousInfo(PrefixStore("agents", self._store), self.layout.node_rank, self.layout.nodes, where)

    def _listen(self) -> TCPStore:
        try:
            return TCPStore(
                self.layout.host,
                self.layout.port,
                is_master=True,
                wait_for_workers=False,
                timeout=_STORE_TIMEOUT,
                multi_tenant=True,
            )
        except DistError as error:
            raise ConfigError(
                f"launch.rdzv_endpoint = {self.address}: this machine cannot listen there "
                f"({_reason(error)}): is another run using it? Choose another port"
            ) from error

    def _connect(self, end: float) -> TCPStore:
        """Wait until the address answers. A plain connection finds that out without torch's warnings."""
        reason = "no answer"
        while time.monotonic() < end:
            self._demand_no_trouble()
            try:
                with closing(socket.create_connection((self.layout.host, self.layout.port), timeout=2.0)):
                    pass
                return self.connection()
            except (OSError, DistError) as error:
                reason = _reason(error)
            time.sleep(_POLL_SECONDS)
        raise ConfigError(
            f"launch.rdzv_endpoint = {self.address} could not be reached within launch.rdzv_timeout_seconds = "
            f"{self.timeout_seconds:g} ({reason}): is threefold running there with --node-rank 0, and is the port open?"
        )

    def connection(self) -> TCPStore:
        """A connection to the store of its own: one that waits for an answer holds up all who share it."""
        return TCPStore(self.layout.host, self.port, is_master=False, wait_for_workers=False, timeout=_STORE_TIMEOUT)

    def _introduce(self, store: Store) -> None:
        me = self.layout.node_rank
        if store.add(f"claimed/{me}", 1) > 1:
            raise ConfigError(
                f"launch.node_rank = {me}: another machine at {self.address} has this number already: give each its own"
            )
        about = {"host": socket.gethostname(), "nodes": self.layout.nodes, "digest": self.digest}
        store.set(f"machine/{me}", json.dumps(about))

    def _wait_for_all(self, store: Store, end: float) -> None:
        missing = set(range(self.layout.nodes))
        while missing:
            for node in sorted(missing):
                if store.check([f"machine/{node}"]):
                    self._acquaint(node, json.loads(store.get(f"machine/{node}")))
                    missing.remove(node)
            if not missing:
                return
            self._demand_no_trouble()
            if time.monotonic() > end:
                numbers = ", ".join(str(node) for node in sorted(missing))
                raise ConfigError(
                    f"launch.nodes = {self.layout.nodes}, and only {self.layout.nodes - len(missing)} met at "
                    f"{self.address} within launch.rdzv_timeout_seconds = {self.timeout_seconds:g}: missing is "
                    f"--node-rank {numbers}: is threefold running there, and can it reach this address?"
                )
            time.sleep(_POLL_SECONDS)

    def _acquaint(self, node: int, about: dict[str, Any]) -> None:
        self.hosts[node] = about["host"]
        if about["nodes"] != self.layout.nodes:
            raise ConfigError(
                f"launch.nodes = {self.layout.nodes} here, and {about['nodes']} on machine {node} ({about['host']}): "
                "run the same command on all machines, but for --node-rank"
            )
        if about["digest"] != self.digest:
            raise ConfigError(
                f"machine {node} ({about['host']}) at {self.address} runs another recipe than this one, "
                f"{self.layout.node_rank}: run the same command with the same files on all"
            )

    def _demand_no_trouble(self) -> None:
        text = self.trouble()
        if text:
            raise ConfigError(text)

    def get_backend(self) -> str:
        """Name of the rendezvous."""
        return "static"

    @property
    def use_agent_store(self) -> bool:
        """Whether the processes meet in this store too."""
        return True

    def is_closed(self) -> bool:
        """A meeting stays open."""
        return False

    def set_closed(self) -> None:
        """Nothing is to be done: see `is_closed`."""

    def num_nodes_waiting(self) -> int:
        """Nobody joins later."""
        return 0

    def get_run_id(self) -> str:
        """A name, which the address makes unique."""
        return "threefold"

    def shutdown(self) -> bool:
        """The store goes with this process."""
        return True


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return "the port is in use" if "EADDRINUSE" in text else text[:200]
