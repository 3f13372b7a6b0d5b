"""Plans of a run that is killed again and again, and what must be there afterwards."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _faults_rank import Job, Kill, slay, start, warm_up
from torch.distributed.elastic.utils.distributed import get_free_port

from m3i_scale.checkpoint.layout import checkpoints, read_meta, step_name, step_of
from m3i_scale.checkpoint.manifest import newest_good, verify
from m3i_scale.checkpoint_tools.consolidate import saved_weights
from m3i_scale.config import load_run

STEPS, SAVE_EVERY, GLOBAL, RANKS = 12, 2, 8, 2
TOLERANCE = 1e-5
"""Of losses on other numbers of ranks, relative: additions in another order."""
KILLS_A_PLAN = 5
WAIT_S = 180.0
SAVES, SAVES_BEFORE = STEPS // SAVE_EVERY, 2
"""Of a run; how many of them a job may have begun when it is killed in one."""
LOAD_OPERATIONS = 100
IN_A_SAVE, END = ("open", "write", "commit"), 12
RUN = f"""
extends: m3i
name: faults
recipe:
  decoders:
    dense: {{kind: transformer, width: 32, heads: 1, depth: 1, position: relative}}
    pool: {{kind: attention_pool, width: 32}}
backbone:
  config: {{image_size: 32, patch_size: 8, hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2,
           intermediate_size: 64}}
text:
  config: {{hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 64}}
  max_tokens: 16
data: {{streams: 4}}
optim: {{batch_size: {GLOBAL}, steps: {STEPS}, warmup_steps: 2, lr: 1.0e-3}}
deepspeed: zero3_cpu_fp32
checkpoint: {{every_steps: {SAVE_EVERY}, keep_latest: 2}}
hardware: {{peak_tflops: 1.0}}
log: {{every_steps: 1, progress: false}}
"""


@dataclass
class Found:
    """Over all plans so far."""

    kills: int = 0
    by: Counter[str] = field(default_factory=Counter)
    """Victims and phases."""
    points: set[str] = field(default_factory=set)
    """Different operations, on different files, at which a job was killed."""
    in_a_save: int = 0
    lost_commits: int = 0
    torn: int = 0
    """Folders under a step's name that do not verify."""
    older_resumes: int = 0
    """Jobs that did not go on from the newest committed step."""
    refused: int = 0
    """Jobs that were refused because one of before still held the directory; they must be."""
    resumes: int = 0
    plans: int = 0
    plans_on_other_ranks: int = 0
    non_identical: int = 0
    non_identical_on_other_ranks: int = 0
    largest_loss_difference: float = 0.0
    faults: list[str] = field(default_factory=list)

    def good(self) -> bool:
        """Whether nothing was lost."""
        return not (self.lost_commits or self.torn or self.older_resumes or self.non_identical or self.faults) and (
            not self.non_identical_on_other_ranks
        )


@dataclass
class Bench:
    """What all plans share."""

    folder: Path
    shards: Path
    draw: random.Random
    found: Found = field(default_factory=Found)
    operations: list[dict[str, int]] = field(default_factory=list)
    """Of the run that was left alone: by rank, how many operations a phase has."""
    seconds: float = 0.0
    """That run took."""
    wanted: dict[int, float] = field(default_factory=dict)
    weights: str = ""

    def left_alone(self) -> None:
        """Run once without a kill; how many operations every phase has is counted on the way."""
        (self.folder / "run.yaml").write_text(RUN, encoding="utf-8")
        warm_up(load_run(str(self.folder / "run.yaml"), [f"data.datasets.shapes.path={self.shards}"]))
        output, started = self.folder / "whole", time.monotonic()
        code, ledger = self._finish(self._job(output, RANKS, "first"))
        self.seconds = time.monotonic() - started
        ends = {line["rank"]: line for line in ledger if line["event"] == "end"}
        if code or len(ends) != RANKS:
            raise RuntimeError(f"the run that is left alone ended with {code}; {self.folder}")
        self.operations = [ends[rank]["counts"] for rank in range(RANKS)]
        self.wanted, self.weights = losses(output), weights(output)

    def plan(self, kills: int) -> None:
        """One run, killed at most so often, and brought to its end."""
        found, number = self.found, self.found.plans
        output, committed = self.folder / f"plan-{number}", set[int]()
        elsewhere = self.draw.random() < 0.4
        found.plans += 1
        found.plans_on_other_ranks += elsewhere
        attempt = 0
        while True:
            ranks = self.draw.choice((1, RANKS)) if elsewhere else RANKS
            kill = self._draw_kill(ranks, first=attempt == 0) if kills > 0 else None
            job = self._job(output, ranks, f"{attempt:02d}", kill)
            before = newest_good(output / "checkpoints")[0]
            code, ledger = self._run(job)
            attempt += 1
            self._check(output, ledger, committed, before)
            hit = kill is not None and self._count(kill, ledger, code)
            kills -= hit
            if code == 0:
                break
            if not hit:
                found.faults.append(f"{job.folder} ended with {code} and was not killed")
                return
        self._compare(output, elsewhere=elsewhere)

    def _job(self, output: Path, ranks: int, name: str, kill: Kill | None = None) -> Job:
        arguments = [
            "train",
            str(self.folder / "run.yaml"),
            f"data.datasets.shapes.path={self.shards}",
            f"output_dir={output}",
            f"optim.micro_batch_size={GLOBAL // ranks}",
        ]
        return Job(arguments, ranks, get_free_port(), output.with_name(f"{output.name}-jobs") / name, kill)

    def _draw_kill(self, ranks: int, *, first: bool) -> Kill:
        draw = self.draw
        victims, rank = draw.choice(("rank", "rank", "all", "all", "launcher")), draw.randrange(ranks)
        counts, chance = self.operations[rank], draw.random()
        if chance < 0.15:
            return Kill(victims, rank, after_s=draw.uniform(0.3, 1.1) * self.seconds)
        if chance < 0.25 and not first:  # a load hashes and reads every file; the run that is left alone has none
            return Kill(victims, rank, "load", draw.randint(1, LOAD_OPERATIONS))
        if chance < 0.35 and "prune" in counts:
            return Kill(victims, rank, "prune", draw.randint(1, counts["prune"] * SAVES_BEFORE // SAVES))
        phase = draw.choice([phase for phase in IN_A_SAVE if counts.get(phase, 0) >= SAVES])
        a_save = counts[phase] // SAVES
        # Most operations write a part of a tensor: half of the kills fall among the others, at both ends.
        ends = [*range(1, min(END, a_save) + 1), *range(max(1, a_save - END), a_save + 1)]
        at = draw.choice(ends) if draw.random() < 0.5 else draw.randint(1, a_save)
        return Kill(victims, rank, phase, at + a_save * draw.randrange(SAVES_BEFORE))

    def _run(self, job: Job) -> tuple[int | None, list[dict[str, Any]]]:
        """Start a job and see it end; where it is to be killed at a moment, kill it."""
        launcher, kill = start(job), job.kill
        started = time.monotonic()
        if kill is None or kill.phase is not None:
            return self._wait(job, launcher)
        with contextlib.suppress(ChildProcessError):
            while time.monotonic() - started < kill.after_s:
                if os.waitid(os.P_PID, launcher, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                    return self._wait(job, launcher)
                time.sleep(0.002)
        ranks = json.loads((job.folder / "ranks.json").read_text())
        with contextlib.suppress(ProcessLookupError):
            slay(kill.victims, ranks[0], ranks[kill.rank], launcher)
        return self._wait(job, launcher)

    def _finish(self, job: Job) -> tuple[int | None, list[dict[str, Any]]]:
        return self._wait(job, start(job))

    def _wait(self, job: Job, launcher: int) -> tuple[int | None, list[dict[str, Any]]]:
        """Until nothing of the job runs. Ranks whose launcher was killed hold the directory: a new job is refused."""
        deadline = time.monotonic() + WAIT_S
        while True:
            done, status = os.waitpid(launcher, os.WNOHANG)
            if done:
                break
            if time.monotonic() > deadline:
                self._end(job)
                os.kill(launcher, signal.SIGKILL)
                os.waitpid(launcher, 0)
                self.found.faults.append(f"{job.folder} hung")
                return None, read_ledger(job)
            time.sleep(0.005)
        code = os.waitstatus_to_exitcode(status)
        if code == -signal.SIGKILL:
            self._orphans(job)
        return code, read_ledger(job)

    def _orphans(self, job: Job) -> None:
        """Ranks go on without their launcher: for a while, and never beside another job."""
        if self.draw.random() < 0.5:
            output = Path(next(a for a in job.arguments if a.startswith("output_dir=")).partition("=")[2])
            second = self._job(output, 1, f"{job.folder.name}-second-{time.monotonic_ns()}")
            pid, alive = start(second), _any_alive(job)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            if alive and _any_alive(job):  # all the time, so it held the directory
                text = (second.folder / "rank-0.log").read_text()
                self.found.refused += 1
                if code != 2 or "another job is writing" not in text:
                    self.found.faults.append(f"{second.folder} ran beside another job: {code}")
        else:
            time.sleep(self.draw.uniform(0, 0.5))
        self._end(job)

    def _end(self, job: Job) -> None:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            os.killpg(json.loads((job.folder / "ranks.json").read_text())[0], signal.SIGKILL)
        deadline = time.monotonic() + WAIT_S
        while _any_alive(job):
            if time.monotonic() > deadline:
                raise RuntimeError(f"ranks of {job.folder} do not end")
            time.sleep(0.002)

    def _check(self, output: Path, ledger: list[dict[str, Any]], committed: set[int], before: Path | None) -> None:
        """That everything that was committed is there and good, and nothing torn under a step's name."""
        found, root = self.found, output / "checkpoints"
        for line in ledger:
            if line["event"] == "committed":
                committed.add(line["step"])
            elif line["event"] == "pruned":
                committed.discard(line["step"])
        good = {step_of(path) for path in checkpoints(root) if not verify(path)}
        found.lost_commits += len(committed - good)
        found.torn += len(checkpoints(root)) - len(good)
        loaded = [line["step"] for line in ledger if line["event"] == "loaded"]
        found.resumes += bool(loaded)
        found.older_resumes += any(step_name(step) != (before.name if before else "") for step in loaded)

    def _count(self, kill: Kill, ledger: list[dict[str, Any]], code: int | None) -> bool:
        found, told = self.found, [line for line in ledger if line["event"] == "kill"]
        if kill.phase is not None and not told:
            return False
        if kill.phase is None and code in (0, None):
            return False
        found.kills += 1
        found.by[kill.victims] += 1
        found.by[kill.phase or "at a moment"] += 1
        found.in_a_save += kill.phase in IN_A_SAVE
        found.points |= {f"{line['phase']}: {line['operation']} {line['name']} (rank {line['rank']})" for line in told}
        return True

    def _compare(self, output: Path, *, elsewhere: bool) -> None:
        found, got = self.found, losses(output)
        if got.keys() != self.wanted.keys():
            found.faults.append(f"{output} has steps {sorted(got)}")
        elif elsewhere:
            difference = max(abs(got[step] - loss) / abs(loss) for step, loss in self.wanted.items())
            found.largest_loss_difference = max(found.largest_loss_difference, difference)
            found.non_identical_on_other_ranks += difference > TOLERANCE
        else:
            found.non_identical += (got, weights(output)) != (self.wanted, self.weights)


def read_ledger(job: Job) -> list[dict[str, Any]]:
    """What the ranks of a job have noted."""
    path = job.folder / "ledger.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def losses(output: Path) -> dict[int, float]:
    """By step, of the last time that it was done."""
    records = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: record["loss"] for record in records if record["kind"] == "train"}


def weights(output: Path) -> str:
    """Return a hash of all final weights, including the EMA teacher's."""
    folder = output / "checkpoints" / step_name(STEPS)
    if read_meta(folder)["step"] != STEPS:
        raise RuntimeError(f"{folder} is of another step")
    digest = hashlib.sha256()
    for which in ("student", "ema"):
        for name, tensor in sorted(saved_weights(folder, which).items()):
            digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _any_alive(job: Job) -> bool:
    path = job.folder / "ranks.json"
    return path.exists() and any(map(_runs, json.loads(path.read_text())))


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"
