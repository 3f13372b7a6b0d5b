"""The examination: one probe on every host, asked in parallel, in four rounds.

1. Is anybody there; what time is it; what can you tell by yourself?
2. The head opens its port; all connect to it, and read each other's notes in the run's folder.
3. Every two hosts measure their link, then all together do.
4. All clean up.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from m3i_scale.launch.doctor import judge, judge_network
from m3i_scale.launch.doctor.channel import Channel, ProbeError
from m3i_scale.launch.doctor.facts import fingerprint
from m3i_scale.launch.doctor.findings import Finding, fault, good, warning
from m3i_scale.launch.doctor.needs import Needs
from m3i_scale.launch.doctor.network import own_addresses
from m3i_scale.launch.doctor.patient import Patient
from m3i_scale.launch.doctor.shared import note_name

_PYTHON_MISSING = (126, 127)
_CLOCK_ASKED = 3


@dataclass(frozen=True)
class Patience:
    """Seconds that the parts may take."""

    start_s: float = 60.0
    """Until a probe is there; ssh's own limit is `Way.connect_s`."""
    look_s: float = 120.0
    """Imports from a slow file system are most of it."""
    reach_s: float = 3.0
    measure_s: float = 30.0


Tell = Callable[[str], None]


@dataclass
class Examination:
    """One, from start to end: `with Examination(patient) as it: findings = it.findings()`."""

    patient: Patient
    patience: Patience = field(default_factory=Patience)
    tell: Tell = lambda text: None
    _channels: dict[str, Channel] = field(default_factory=dict)
    _pool: ThreadPoolExecutor | None = None
    _token: str = field(default_factory=lambda: secrets.token_hex(4))
    _lost: list[Finding] = field(default_factory=list)

    def __enter__(self) -> Examination:
        self._pool = ThreadPoolExecutor(max(4, len(self.patient.hosts)))
        return self

    def __exit__(self, *_: object) -> None:
        assert self._pool is not None
        for _notes_then_folders in range(2):
            self._ask_all(list(self._channels), 5.0, do="clean")
        list(self._pool.map(lambda channel: channel.end(), self._channels.values()))
        self._pool.shutdown()

    def findings(self) -> list[Finding]:
        """All of them, in the order of the rounds."""
        self.tell(f"starting a probe on {len(self.patient.hosts)} hosts")
        found = self._start()
        offsets = self._clocks()
        self.tell("each host looks at itself")
        answers = self._look()
        if answers:
            found += list(self._judged(answers, offsets))
            self.tell("the hosts meet")
            found += list(self._meet(answers))
        found += self._lost
        order = {check: number for number, check in enumerate(dict.fromkeys(item.check for item in found))}
        return sorted(found, key=lambda item: order[item.check])

    # Round 1

    def _start(self) -> list[Finding]:
        found: dict[str, list[Finding]] = {}

        def start(host: str) -> None:
            try:
                channel = Channel(host, self.patient.way)
            except OSError as error:
                found[host] = [self._not_reached(host, f"{error.filename}: {error.strerror}")]
                return
            try:
                seconds = channel.greet(self.patience.start_s)
            except ProbeError as error:
                channel.end()
                found[host] = list(self._not_started(host, error))
                return
            self._channels[host] = channel
            found[host] = [] if self.patient.way.local else [good("ssh", host, f"reached in {seconds:.1f} s")]

        self._each(self.patient.hosts, start)
        self._channels = {host: self._channels[host] for host in self.patient.hosts if host in self._channels}
        return [item for host in self.patient.hosts for item in found[host]]

    def _not_reached(self, host: str, what: str) -> Finding:
        why = "launchers start ranks on it in the same way, without anybody to type a password"
        fix = f"until `ssh -o BatchMode=yes {host} true` works: key, known_hosts, address, sshd"
        return fault("ssh", host, what, why=why, fix=fix)

    def _not_started(self, host: str, error: ProbeError) -> Iterator[Finding]:
        if not error.reached:
            yield self._not_reached(host, error.what)
            return
        way = self.patient.way
        if not way.local:
            yield good("ssh", host, "reached")
        missing = error.code in _PYTHON_MISSING
        fix = f"{way.python} and the folder {way.workdir} on this host, or --python and --workdir"
        if not missing:
            fix = f"the environment of {way.python} on this host: it must import m3i_scale"
        yield fault("python", host, error.what, why="ranks are started with the same interpreter", fix=fix)

    def _clocks(self) -> dict[str, tuple[float, float]]:
        offsets: dict[str, tuple[float, float]] = {}

        def ask(host: str) -> None:
            for _ in range(_CLOCK_ASKED):
                before = time.time()
                answer = self._ask(host, 10.0, do="time")
                after = time.time()
                if answer is None:
                    return
                error = (after - before) / 2
                if host not in offsets or error < offsets[host][1]:
                    offsets[host] = answer["time"] - (before + after) / 2, error

        self._each(list(self._channels), ask)
        return {host: offsets[host] for host in self._channels if host in offsets}

    def _look(self) -> dict[str, dict[str, Any]]:
        patient = self.patient
        sent = {item.name: fingerprint(item.value) for item in patient.way.variables}

        def ask(host: str) -> dict[str, Any] | None:
            needs = (patient.needs or {}).get(host, Needs(patient.slots[host], sum(patient.slots.values())))
            request = {
                "host": host,
                "hosts": patient.hosts if not patient.way.local else [],
                "needs": needs.to_json(),
                "run": patient.run,
                "overrides": patient.overrides,
                "sent": sent,
                "note": note_name(self._token, patient.hosts.index(host)),
            }
            return self._ask(host, self.patience.look_s, do="look", request=request)

        answers = self._each(list(self._channels), ask)
        for host, answer in answers.items():
            if "missing" in answer:
                why, fix = "ranks there would not start", f"the packages of {patient.way.python} on this host"
                self._lost.append(fault("packages", host, answer["missing"], why=why, fix=fix))
        return {host: answer for host, answer in answers.items() if "missing" not in answer}

    def _judged(
        self, answers: Mapping[str, Mapping[str, Any]], offsets: Mapping[str, tuple[float, float]]
    ) -> Iterator[Finding]:
        patient = self.patient
        yield from judge.python_findings(answers)
        yield from judge.package_findings(answers)
        yield from judge.code_findings(answers)
        yield from judge.config_findings(answers)
        if len(answers) > 1:
            yield from judge.clock_findings({host: offsets[host] for host in answers if host in offsets})
        yield from judge.device_findings(answers, patient.slots)
        for answer in answers.values():
            yield from (Finding(**item) for item in answer["findings"])
        yield from judge_network.interface_findings(answers, patient.interface)
        yield from judge_network.name_findings(answers, chosen=patient.interface is not None)
        yield from judge.variable_findings(answers, [item.name for item in patient.way.variables])
        yield from judge.shard_findings(answers)

    # Rounds 2 and 3

    def _meet(self, answers: Mapping[str, Mapping[str, Any]]) -> Iterator[Finding]:
        patient, head = self.patient, self.patient.head
        address = self._head_address(answers)
        listening = self._ask(head, 10.0, do="listen", address=address, port=patient.port, seconds=60.0)
        known = {
            host: {**answer["note"], "name": note_name(self._token, patient.hosts.index(host))}
            for host, answer in answers.items()
            if "note" in answer
        }
        met = self._each(list(answers), lambda host: self._meet_one(host, address, known, answers))
        self._ask(head, 5.0, do="close")
        yield from self._ports(listening, met, address)
        if known:
            seen = {host: told["shared"] or [] for host, told in met.items()}
            folder = next((answer["output_dir"] for answer in answers.values() if "output_dir" in answer), "")
            yield from judge_network.shared_findings(known, seen, folder)
        joined = [host for host, told in met.items() if "fault" not in told["port"]]
        if len(joined) > 1 and head in joined:
            yield from self._measured(joined, address)
        elif len(patient.hosts) > 1:
            why = "fewer than two hosts reach the port of the head"
            yield warning("group", "all", "not measured", why=why, fix="mend what stands above first")

    def _ports(
        self, listening: Mapping[str, Any] | None, met: Mapping[str, Mapping[str, Any]], address: str
    ) -> Iterator[Finding]:
        patient = self.patient
        if listening is not None and "fault" in listening:
            why = "rank 0 waits for the others at that address and port"
            fix = "another --master-port, or what --interface and --master-address say of the head"
            value = f"{address}:{patient.port} cannot be opened: {listening['fault']}"
            yield fault("port", patient.head, value, why=why, fix=fix)
        else:
            ports = {host: told["port"] for host, told in met.items()}
            yield from judge_network.port_findings(ports, patient.head, address, patient.port)

    def _meet_one(
        self, host: str, address: str, notes: Mapping[str, Mapping[str, Any]], answers: Mapping[str, Mapping[str, Any]]
    ) -> dict[str, Any] | None:
        names = [note["name"] for note in notes.values() if "fault" not in note]
        folder = answers[host].get("output_dir")
        shared = {"folder": folder, "names": names} if folder else None
        seconds = self.patience.reach_s
        request = {"address": address, "port": self.patient.port, "seconds": seconds, "shared": shared}
        return self._ask(host, seconds + 30.0, do="meet", **request)

    def _head_address(self, answers: Mapping[str, Mapping[str, Any]]) -> str:
        """As launchers take it: as given, that of the interface, else the name of the head."""
        patient = self.patient
        if patient.master_address is not None:
            return patient.master_address
        if patient.interface is not None and patient.head in answers:
            found = own_addresses(answers[patient.head]["interfaces"], patient.interface)
            if found:
                return found[0]
        return "127.0.0.1" if patient.way.local else patient.head

    def _measured(self, hosts: Sequence[str], address: str) -> Iterator[Finding]:
        wait_s = self.patience.measure_s

        def join(host: str) -> dict[str, Any] | None:
            master = host == self.patient.head
            return self._ask(
                host, wait_s + 30.0, do="join", address=address, port=self.patient.port, master=master, seconds=wait_s
            )

        joined = self._each(hosts, join)
        failed = {host: told["fault"] for host, told in joined.items() if "fault" in told}
        if failed:
            yield judge_network.group_finding({"fault": next(iter(failed.values()))}, len(hosts))
            return
        hosts = [host for host in hosts if host in joined]
        pairs: dict[tuple[str, str], Mapping[str, Any]] = {}
        for number, matches in enumerate(rounds(hosts)):
            self.tell(f"measuring links, round {number + 1}")
            round_ = self._each(matches, lambda pair: self._together(pair, "-".join(pair)))
            pairs |= round_
            if all("fault" in told for told in round_.values()):
                break  # each of them has waited for its time to be over, and so would all others
        yield from judge_network.pair_findings(pairs)
        if len(hosts) > 2:
            self.tell("measuring all together")
            yield judge_network.group_finding(self._together(hosts, "all"), len(hosts))

    def _together(self, hosts: Sequence[str], key: str) -> dict[str, Any]:
        """What a group has measured; of what its members say, the slowest."""

        def ask(host: str) -> dict[str, Any] | None:
            request = {"key": key, "rank": hosts.index(host), "world": len(hosts), "seconds": self.patience.measure_s}
            return self._ask(host, 3 * self.patience.measure_s, do="measure", **request)

        with ThreadPoolExecutor(len(hosts)) as pool:
            told = [answer for answer in pool.map(ask, hosts) if answer is not None]
        failed = [answer for answer in told if "fault" in answer]
        if failed or len(told) < len(hosts):
            return failed[0] if failed else {"fault": "a host has stopped answering"}
        slowest = min(told, key=lambda answer: float(answer["all_reduce_gb_s"]))
        return {**slowest, "latency_us": max(answer["latency_us"] for answer in told)}

    # All of them

    def _ask(self, host: str, within_s: float, **request: Any) -> dict[str, Any] | None:
        """The answer; None from a host that has none any more, which is told once."""
        channel = self._channels.get(host)
        if channel is None:
            return None
        try:
            return channel.ask(within_s, **request)
        except ProbeError as error:
            self._channels.pop(host, None)
            channel.end()
            why = f"it did answer at first; asked for `{request['do']}`"
            self._lost.append(fault("probe", host, error.what, why=why, fix="look at this host: load, memory, network"))
            return None

    def _ask_all(self, hosts: Sequence[str], within_s: float, **request: Any) -> dict[str, dict[str, Any]]:
        return self._each(hosts, lambda host: self._ask(host, within_s, **request))

    def _each(self, items: Sequence[Any], work: Callable[[Any], Any]) -> dict[Any, Any]:
        """`work` for all at the same time; what it gave, in their order, without None."""
        assert self._pool is not None
        results = list(self._pool.map(work, items))
        return {item: result for item, result in zip(items, results, strict=True) if result is not None}


def rounds(hosts: Sequence[str]) -> list[list[tuple[str, str]]]:
    """Every two hosts once, in as few rounds as there can be, none of them twice in a round (the circle method)."""
    circle: list[str | None] = [*hosts] if len(hosts) % 2 == 0 else [*hosts, None]
    found = []
    for _ in range(len(circle) - 1):
        half = len(circle) // 2
        matches = zip(circle[:half], reversed(circle[half:]), strict=True)
        found.append([(one, other) for one, other in matches if one is not None and other is not None])
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return found
