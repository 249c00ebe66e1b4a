"""The scheduler: everybody is served, nothing exceeds its bounds, and turns are taken."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4.engine.scheduler import GRAIN, Job, Scheduler, blocks_for
from dsv4.errors import ConfigError, RequestError


@dataclass
class Simulation:
    """A machine that takes ``base + each * rows`` seconds a pass, and remembers what happened.

    What a preempted job computed is found again, but for what is not a whole block.
    """

    scheduler: Scheduler
    base: float = 1.0
    each: float = 0.01
    now: float = 0.0
    steps: int = 0
    answers: dict[Job, int] = field(default_factory=dict)  # tokens still to sample
    kept: dict[Job, int] = field(default_factory=dict)
    finished: dict[Job, float] = field(default_factory=dict)
    first_fed: dict[Job, int] = field(default_factory=dict)
    computed: dict[Job, int] = field(default_factory=dict)

    def submit(self, prompt: int, answer: int, priority: int = 0) -> Job:
        job = Job(prompt, prompt + answer, priority, self.now)
        self.scheduler.add(job)
        self.answers[job] = answer
        return job

    def step(self) -> list[tuple[Job, int]]:
        s = self.scheduler
        before = {job: job.fed for job in s.running}
        preempted, admitted = s.step()
        for job in preempted:
            self.kept[job] = before[job] // GRAIN * GRAIN
        for job in admitted:
            s.resumed(job, min(self.kept.get(job, 0), job.tokens - 1))
        head = min([*s.running, *s.waiting], key=lambda job: job.place, default=None)
        assert head is None or head.running, "the head of the line has no place"
        feed = s.feed()
        rows = sum(n for _, n in feed)
        assert rows <= s.step_tokens and s.used <= s.blocks
        assert len(s.running) <= s.max_running
        assert len({id(job) for job, _ in feed}) == len(feed) and all(n > 0 for _, n in feed)
        for job, n in feed:
            assert job.running and blocks_for(job.fed) <= job.blocks
            self.first_fed.setdefault(job, self.steps)
            self.computed[job] = self.computed.get(job, 0) + n
        fed = [job for job, _ in feed]
        for job in s.running:  # whoever decodes gets a token in every step
            assert job in fed or job.left > 1
        self.now += self.base + self.each * rows
        self.steps += 1
        for job in fed:
            if job.left == 0:
                self.answers[job] -= 1
                if self.answers[job] == 0:
                    s.remove(job)
                    self.finished[job] = self.now
                else:
                    job.tokens += 1
        return feed

    def run(self, most: int = 20_000) -> None:
        while self.scheduler.running or self.scheduler.waiting:
            assert self.steps < most, "somebody waits for ever"
            self.step()


def scheduler(**changes: int) -> Scheduler:
    return Scheduler(**{"max_running": 4, "step_tokens": 256, "blocks": 40, **changes})


jobs = st.tuples(
    st.integers(0, 20),  # steps after the one before
    st.integers(1, 2000),  # prompt
    st.integers(1, 300),  # answer
    st.integers(0, 2),  # priority
    st.sampled_from([None, None, None, 0, 1, 5, 40]),  # cancelled after so many steps
)


@settings(max_examples=30, deadline=None)
@given(
    arriving=st.lists(jobs, min_size=1, max_size=25),
    running=st.integers(1, 6),
    rows=st.integers(6, 600),
    blocks=st.integers(18, 60),
    overhead=st.integers(0, 3),
)
def test_everybody_is_served_within_bounds(
    arriving: list[tuple[int, int, int, int, int | None]], running: int, rows: int, blocks: int,
    overhead: int,
) -> None:
    """Whatever arrives and is cancelled, memory and rows keep their bounds and all ends."""
    s = Scheduler(max_running=running, step_tokens=rows, blocks=blocks + overhead,
                  overhead=overhead, patience=20.0)  # fmt: skip
    simulation = Simulation(s)
    leave: list[tuple[int, Job]] = []
    for wait, prompt, answer, priority, cancelled in arriving:
        for _ in range(wait):
            simulation.step()
        try:
            job = simulation.submit(prompt, answer, priority)
        except RequestError:
            assert prompt + answer > blocks * GRAIN
            continue
        if cancelled is not None:
            leave.append((simulation.steps + cancelled, job))
        for when, other in leave:
            if when <= simulation.steps and other not in simulation.finished:
                s.remove(other)
                simulation.finished[other] = simulation.now
                assert other not in [job for job, _ in simulation.step()]
        leave = [(when, other) for when, other in leave if other not in simulation.finished]
    simulation.run()
    assert set(simulation.finished) == set(simulation.answers)
    assert s.used == 0


def test_equal_prompts_are_fed_equally() -> None:
    simulation = Simulation(scheduler())
    group = [simulation.submit(1000, 5) for _ in range(4)]
    for _ in range(8):
        simulation.step()
        fed = [job.fed for job in group]
        assert max(fed) - min(fed) <= 256
    simulation.run()


def test_a_short_prompt_is_not_behind_a_long_one() -> None:
    simulation = Simulation(scheduler())
    long = simulation.submit(4000, 5)
    for _ in range(2):
        simulation.step()
    short = simulation.submit(50, 5)
    simulation.step(), simulation.step()
    assert simulation.first_fed[short] == 2 or simulation.first_fed[short] == 3
    simulation.run()
    assert simulation.finished[short] < simulation.finished[long]


def test_decoding_goes_on_beside_a_long_prompt() -> None:
    simulation = Simulation(scheduler())
    talker = simulation.submit(10, 60)
    simulation.step()
    long = simulation.submit(4000, 1)
    for _ in range(15):
        feed = dict(simulation.step())
        assert feed[talker] == 1 and feed[long] == 255


def test_a_higher_priority_takes_a_place_and_gives_it_back() -> None:
    simulation = Simulation(scheduler(max_running=1))
    batch = simulation.submit(500, 200)
    for _ in range(5):
        simulation.step()
    urgent = simulation.submit(100, 5, priority=1)
    simulation.step()
    assert urgent.running and not batch.running and batch.preemptions == 1
    simulation.run()
    assert simulation.finished[urgent] < simulation.finished[batch]
    # only what was not a whole block, and not 500 tokens, was computed again
    assert simulation.computed[batch] < 500 + 200 + GRAIN


def test_nobody_waits_for_ever_behind_higher_priorities() -> None:
    simulation = Simulation(Scheduler(max_running=1, step_tokens=64, blocks=40, patience=30.0))
    humble = simulation.submit(60, 3)
    simulation.scheduler.step()
    while humble not in simulation.finished:
        if not simulation.scheduler.waiting:
            simulation.submit(60, 3, priority=1)
        simulation.step()
        assert simulation.steps < 100


def test_answers_that_outgrow_memory_take_it_in_turns() -> None:
    simulation = Simulation(scheduler(blocks=10))
    group = [simulation.submit(300, 700) for _ in range(4)]  # eight blocks each in the end
    simulation.run()
    first, *others = group
    assert first.preemptions == 0 and sum(job.preemptions for job in others) > 0
    assert sorted(simulation.finished, key=lambda job: simulation.finished[job])[0] is first
    for job in group:
        assert simulation.computed[job] <= 1000 + GRAIN * job.preemptions


def test_what_could_never_run_is_refused() -> None:
    s = scheduler(overhead=2)
    with pytest.raises(RequestError, match=f"{38 * GRAIN} tokens"):
        s.add(Job(10, 38 * GRAIN + 1))
    s.add(Job(10, 38 * GRAIN))
    with pytest.raises(ConfigError, match="1 to 3"):
        scheduler(step_tokens=3)
