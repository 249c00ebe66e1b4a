"""Who computes what in the next step. Pure bookkeeping: no tensor, no thread and no clock.

A job is a number of tokens to feed: its prompt, then one at a time what was sampled. Each step is
one pass of at most ``step_tokens`` rows: first one token for every job that decodes, then guesses
of what comes after these, then, in what is left, chunks of prompts, which take turns.

All jobs stand in one line, which never changes: by time of arrival, where each level of priority is
worth ``patience`` seconds. Whoever has a place runs; places go to the head of the line. There is a
place where fewer than ``max_running`` run and the job's tokens fit in memory, which is counted in
blocks of 128 tokens, with one more to begin its answer. When an answer needs a block that is not
there, or somebody comes who stands before one that runs, the last of the line that runs gives up
its place. What it computed is kept where it can be found again, so it goes on and does not start
anew.

A job alone always fits (``add`` refuses what could not), the head of the line never gives up its
place, and prompts are fed in turns: so every job is finished after finitely many steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from ..errors import ConfigError, RequestError

GRAIN = 128  # tokens of a block


def blocks_for(tokens: int) -> int:
    """Blocks that hold so many tokens."""
    return -(-tokens // GRAIN)


@dataclass(eq=False)
class Job:
    """A request as the scheduler sees it.

    ``tokens``: how many there are to feed by now; the caller adds one for each it samples.
    ``ceiling``: how many there can be in the end. ``priority``: higher is sooner. ``arrived``: in
    seconds. ``guesses``: tokens that may come after these and can be fed with the last of them; the
    scheduler takes away those for which a step or the memory has no room. It keeps the rest.
    """

    tokens: int
    ceiling: int
    priority: int = 0
    arrived: float = 0.0
    guesses: int = 0
    running: bool = field(default=False, init=False)
    fed: int = field(default=0, init=False)
    blocks: int = field(default=0, init=False)  # it may fill
    place: tuple[float, int] = field(default=(0.0, 0), init=False)  # in the line
    turn: int = field(default=0, init=False)  # when it was last fed or admitted, in steps
    preemptions: int = field(default=0, init=False)

    @property
    def left(self) -> int:
        return self.tokens - self.fed


class Step(NamedTuple):
    """What to do, in this order: take these jobs' states away but keep them to be found; give
    these a state (and say ``resumed``); then ``feed``."""

    preempted: list[Job]
    admitted: list[Job]


class Scheduler:
    """``max_running`` jobs at once, ``step_tokens`` rows in a pass, ``blocks`` of memory in all, of
    which each running job takes ``overhead`` beside its rows.

    A step of the caller: ``step``, carry it out and report ``resumed`` where a state was found;
    ``feed`` and one pass; then ``Job.tokens += 1`` for what was sampled, or ``remove``.
    """

    def __init__(
        self, *, max_running: int, step_tokens: int, blocks: int, overhead: int = 0,
        patience: float = 60.0,
    ) -> None:
        if not 1 <= max_running <= step_tokens:
            raise ConfigError(
                "a step has to hold a token of everyone who runs",
                expected=f"max_running of 1 to {step_tokens}", got=max_running,
            )
        self.max_running, self.step_tokens = max_running, step_tokens
        self.blocks, self.overhead, self.patience = blocks, overhead, patience
        self.running: list[Job] = []
        self.waiting: list[Job] = []
        self._jobs = self._steps = 0

    def room(self) -> int:
        """Tokens that the longest job may have."""
        return max(0, self.blocks - self.overhead) * GRAIN

    @property
    def used(self) -> int:
        """Blocks that the running jobs hold or may fill."""
        return sum(job.blocks + self.overhead for job in self.running)

    def add(self, job: Job) -> None:
        """Put a job into the line. RequestError when it could not even run alone."""
        if job.ceiling > self.room():
            raise RequestError(
                "the request needs more memory than there is",
                expected=f"at most {self.room()} tokens of prompt and answer", got=job.ceiling,
                hint="a smaller max_tokens, or a server with more memory for the cache",
            )
        self._jobs += 1
        job.place = (job.arrived - job.priority * self.patience, self._jobs)
        self.waiting.append(job)

    def remove(self, job: Job) -> None:
        """A job is finished, has failed or was cancelled, wherever it is."""
        (self.running if job.running else self.waiting).remove(job)
        job.running = False

    def resumed(self, job: Job, fed: int) -> None:
        """An admitted job goes on after its first ``fed`` tokens; at least one is left."""
        job.fed = fed

    def step(self) -> Step:
        """Who gives up a place and who gets one."""
        self._steps += 1
        preempted, admitted = list[Job](), list[Job]()
        for job in sorted(self.running, key=lambda job: job.place):
            need = blocks_for(job.tokens) - job.blocks
            while job.running and need > self.blocks - self.used:
                preempted.append(self._give_up())
            job.blocks += need if job.running and need > 0 else 0
        for job in sorted(self.waiting, key=lambda job: job.place):
            if job in preempted:
                break
            need = min(blocks_for(job.tokens) + 1, blocks_for(job.ceiling))
            behind = [r for r in self.running if r.place > job.place]
            held = sum(r.blocks + self.overhead for r in behind)
            if need + self.overhead > self.blocks - self.used + held:
                break  # nobody overtakes one that does not fit yet
            if len(self.running) - len(behind) == self.max_running:
                break
            while len(self.running) == self.max_running or (
                need + self.overhead > self.blocks - self.used
            ):
                preempted.append(self._give_up())
            self.waiting.remove(job)
            self.running.append(job)
            admitted.append(job)
            job.running, job.fed, job.blocks, job.turn = True, 0, need, self._steps - 1
        both = [job for job in admitted if not job.running]
        return Step([j for j in preempted if j not in both], [j for j in admitted if j.running])

    def feed(self) -> list[tuple[Job, int]]:
        """How many tokens of whom the next pass feeds, beside its guesses; counted as fed."""
        rows, out = self.step_tokens, list[tuple[Job, int]]()
        spare = rows - sum(job.left == 1 for job in self.running)
        for job in self.running:
            room = min(spare, job.blocks * GRAIN - job.tokens) if job.left == 1 else 0
            job.guesses = max(0, min(job.guesses, room))
            spare, rows = spare - job.guesses, rows - job.guesses
        for job in self._turns():
            n = min(rows, job.left)
            if n:
                out.append((job, n))
                job.fed, job.turn, rows = job.fed + n, self._steps, rows - n
        return out

    def _turns(self) -> Iterator[Job]:
        yield from sorted((j for j in self.running if j.left == 1), key=lambda j: j.place)
        yield from sorted((j for j in self.running if j.left > 1), key=lambda j: (j.turn, j.place))

    def _give_up(self) -> Job:
        """The last of the line that runs waits again."""
        last = max(self.running, key=lambda job: job.place)
        self.running.remove(last)
        self.waiting.append(last)
        last.running, last.fed, last.blocks, last.guesses = False, 0, 0, 0
        last.preemptions += 1
        return last
