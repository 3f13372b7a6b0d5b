"""Send requests to all hosts in parallel, and answer them: an agent on each host starts
`python -m m3i_scale.elastic.doctor.host VERB`, and ends it.

The request is in the environment, which may contain secrets; the answer is a marked line of the output.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from m3i_scale.config import RunConfig, load_run
from m3i_scale.elastic.link import HostError, Inbox, RemoteShell, connect, receive
from m3i_scale.elastic.wire import Message
from m3i_scale.errors import UserError
from m3i_scale.host import machine
from m3i_scale.launch.hosts import Host
from m3i_scale.run import software
from m3i_scale.text import is_secret, without_secrets

MODULE = "m3i_scale.elastic.doctor.host"
REQUEST = "M3I_SCALE_DOCTOR"
"""Variable with the request, as JSON."""
MARK = "m3i-scale doctor: "
"""Start of the line with the answer, because libraries print too."""
_RELEVANT = re.compile(r"(NCCL|GLOO|TORCH|DS|OMP|CUDA|UCX|HF|XDG)_\w+|LD_LIBRARY_PATH|PYTHONPATH|TZ|LANG|LC_ALL")
_READ_BYTES = 1 << 16
"""Bytes to read of the first shard of every dataset."""
_MAX_CHARACTERS = 300


class Agents:
    """Agents on all hosts: `with Agents(hosts, site, connect_s) as agents`. They leave no process running. The master
    node is the first host. `connect_s` is ssh's connect timeout, `site.connect_s` the startup limit of an agent."""

    def __init__(self, hosts: Sequence[str], site: RemoteShell, connect_s: float) -> None:
        self._site, self._inbox = site, Inbox()
        links, self.errors = connect(
            [Host(host, 1) for host in hosts], site, self._inbox, ssh_timeout_s=connect_s, same_code=False
        )
        """Errors of hosts that do not respond, or no longer do."""
        self._links = {link.host.name: link for link in links}
        self._requests = 0

    def __enter__(self) -> Agents:
        return self

    def __exit__(self, *_: object) -> None:
        for link in self._links.values():
            link.send("end")
        for link in self._links.values():
            link.close()

    @property
    def hosts(self) -> list[str]:
        """Return the hosts with an agent that responds."""
        return [host for host in self._links if host not in self.errors]

    def request(
        self,
        verb: str,
        requests: Mapping[str, Mapping[str, Any]],
        timeout_s: float,
        enough: Callable[[Mapping[str, Mapping[str, Any]]], bool] = lambda answers: False,
    ) -> dict[str, dict[str, Any]]:
        """Return the answers of the hosts that respond, in the order of the requests. `verb` is a verb of `host.py`.
        `enough` returns whether these answers suffice, so that the others need not be awaited."""
        site, texts = self._site, dict.fromkeys(requests, "")
        answers: dict[str, dict[str, Any]] = {}
        waiting = requests.keys() - self.errors.keys()
        for host in waiting:
            variables = {**site.environment, REQUEST: json.dumps(requests[host])}
            command = [site.python, "-u", "-m", MODULE, verb]
            ranks = [{"RANK": str(self._requests)}]  # a number not yet used by this agent
            self._links[host].send("start", ranks=ranks, command=command, cwd=site.workdir, environment=variables)
        self._requests += 1
        for host, message in self._receive(waiting, timeout_s):
            if message["kind"] == "log":
                texts[host] += message["text"]
            elif message["kind"] == "exit":
                waiting.discard(host)
                answer = _answer(texts[host], message["code"])
                if "error" in answer:
                    self.errors[host] = HostError(answer["error"], "agent")
                else:
                    answers[host] = answer
                if enough(answers):
                    waiting.clear()
        return {host: answers[host] for host in requests if host in answers}

    def _receive(self, waiting: set[str], timeout_s: float) -> Iterator[tuple[str, Message]]:
        """Yield messages of agents while an answer is missing; drop hosts that have not answered in time."""
        until = time.monotonic() + timeout_s

        def left_s() -> float:
            return until - time.monotonic() if waiting else 0.0

        for link, message in receive(self._links.values(), self._inbox, left_s):
            host = link.host.name
            if message["kind"] == "gone":
                waiting.discard(host)
                self.errors.setdefault(host, link.error())
            else:
                yield host, message
        for host in waiting:
            self.errors[host] = HostError(f"no answer after {timeout_s:.0f} s", "agent")
            self._links.pop(host).drop()


def _answer(text: str, code: int) -> dict[str, Any]:
    """Return the answer of an ended process; `error` if it failed."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for line in lines:
        if line.startswith(MARK):
            answer: dict[str, Any] = json.loads(line.removeprefix(MARK))
            return answer
    return {"error": [f"it ended with exit code {code}", *lines][-1][-_MAX_CHARACTERS:]}


def report(request: dict[str, Any]) -> dict[str, Any]:
    """Return facts of this host, and findings that need no other host. `command.py` makes the request."""
    host, needs = request["host"], machine.Needs(**request["needs"])
    devices = _devices()
    findings = machine.machine_findings(host, machine.read_machine(), needs, on_host=devices["kind"] == "cpu")
    answer: dict[str, Any] = {
        "python": software.software_versions(),
        "code": software.code(),
        "interface": request["interface"],
        "interfaces": machine.interfaces(),
        "variables": _variables(),
        "slots": needs.ranks,
        "devices": devices,
    }
    if request["run"] is not None:
        run, answer["config"] = _run_file(request["run"], request["overrides"])
        if run is not None:
            output_dir = run.output_dir.absolute()
            sources = run.data.datasets | {f"validation {name}": of for name, of in run.data.validation.items()}
            shards = {name: _first_shard(run, name, source.path) for name, source in sources.items()}
            answer |= {"output_dir": str(output_dir), "shards": shards}
            findings.append(machine.disk_finding(host, output_dir, needs))
    return {**answer, "findings": [item.to_json() for item in findings]}


def _devices() -> dict[str, Any]:
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    kind = accelerator.device_name()
    if kind == "cpu":
        return {"kind": "cpu", "count": os.cpu_count(), "names": [machine.processor()], "driver": None, "memory": None}
    count = accelerator.device_count()
    names: list[str] = []
    if kind == "cuda":
        import torch

        names = [torch.cuda.get_device_name(number) for number in range(count)]
    memory = [accelerator.total_memory(number) for number in range(count)]
    return {"kind": kind, "count": count, "names": names, "driver": _driver(), "memory": memory}


def _driver() -> str | None:
    for path in (Path("/sys/module/nvidia/version"), Path("/sys/module/amdgpu/version")):
        if path.is_file():
            return path.read_text(encoding="utf-8").strip()
    return None


def _variables() -> dict[str, str]:
    """Return the environment variables that affect computation or communication of a run, without secrets."""
    return {key: value for key, value in os.environ.items() if _RELEVANT.fullmatch(key) and not is_secret(key)}


def _run_file(name: str, overrides: Sequence[str]) -> tuple[RunConfig | None, dict[str, Any]]:
    """Return the run as resolved on this host (see `software.run_values`), or the error."""
    try:
        run = load_run(name, list(overrides))
        return run, software.run_values(run)
    except UserError as error:
        return None, {"error": error.what, "where": error.where, "fix": error.fix}


def _first_shard(run: RunConfig, name: str, shards: str) -> dict[str, Any]:
    """Return the first shard of a dataset and the number of bytes read here, or the error."""
    from m3i_scale.data.remote.access import Access, Url
    from m3i_scale.data.remote.fetch import facts, read_range
    from m3i_scale.data.remote.read_errors import ReadError
    from m3i_scale.data.shards import expand_shards

    began = time.perf_counter()
    first: Any = without_secrets(shards)
    try:
        first, *rest = expand_shards(shards, f"dataset '{name}'")
        if not isinstance(first, Url):
            with first.open("rb") as file:
                read = len(file.read(_READ_BYTES))
        else:
            access = Access(attempts=2, timeout_s=min(run.data.read_timeout_s, 10.0))
            size = facts(first, access).size
            read = len(read_range(first, 0, min(size, _READ_BYTES), access))
    except (UserError, ReadError) as error:
        where = error.where if isinstance(error, UserError) else without_secrets(shards)
        return {"shard": where or without_secrets(shards), "error": without_secrets(str(error).splitlines()[0])}
    except OSError as error:
        return {"shard": str(first), "error": error.strerror or str(error)}
    more = {"shards": 1 + len(rest), "seconds": time.perf_counter() - began}
    return {"shard": str(first), "read": read, **more} | ({} if read else {"error": "the shard is empty"})


def main() -> None:
    """Answer the request in the environment."""
    request = json.loads(os.environ.pop(REQUEST))
    try:
        if sys.argv[1] == "report":
            answer = report(request)
        else:
            from m3i_scale.elastic.doctor.group import measure

            answer = measure(request)
    except Exception as error:  # reported by the caller, with the host
        answer = {"error": f"{type(error).__name__}: {error}"}
    sys.stdout.write(f"\n{MARK}{json.dumps(answer)}\n")  # after all other output
    sys.stdout.flush()
    os._exit(0)  # do not wait for threads of libraries


if __name__ == "__main__":
    main()
