"""Looks whether hosts that are out of an attempt answer again, beside the attempt."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from m3i_scale.config import RunConfig
from m3i_scale.launch.hosts import Host
from m3i_scale.launch.link import Inbox, connect
from m3i_scale.launch.supervise import Tell
from m3i_scale.launch.transport import Site
from m3i_scale.launch.worlds import World, largest_world


class Watch:
    """Asks every now and then. Use as a context.

    Args:
        run: that goes on meanwhile.
        world: that it goes on with.
        out: hosts that are not in it.
        site: how they are reached.
        every_s: between two rounds.
    """

    def __init__(self, run: RunConfig, world: World, out: Sequence[Host], site: Site, every_s: float) -> None:
        self.back: tuple[str, ...] = ()
        """Hosts that answer and make a larger world; once there are any, the watch is over."""
        self._run, self._world, self._out, self._site, self._every_s = run, world, list(out), site, every_s
        self._stop = threading.Event()
        self._told = False
        self._thread = threading.Thread(target=self._look, daemon=True, name="watch")

    def __enter__(self) -> Watch:
        if self._out:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def tell_once(self, tell: Tell) -> None:
        """Say who is back."""
        if not self._told:
            self._told = True
            tell(f"{', '.join(self.back)} answers again: the run saves, and goes on with it")

    def _look(self) -> None:
        while not self._stop.wait(self._every_s) and not self.back:
            # Not to the end where the attempt is over: an agent that begins after the next one would end its ranks.
            links, _ = connect(self._out, self._site, Inbox(), over=self._stop.is_set)
            for link in links:
                link.close()
            found = tuple(link.host for link in links)
            larger = largest_world(self._run, [*self._world.hosts, *found], len(self._world.hosts))
            if larger is not None and larger.ranks > self._world.ranks:
                self.back = tuple(host.name for host in found if host in larger.hosts)
