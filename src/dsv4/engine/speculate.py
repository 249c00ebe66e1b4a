"""Speculation: the MTP block guesses the token after the next, the trunk's next pass checks it.

A pass feeds a request's newest token and, behind it, the guess of the one that comes next. If the
token that is sampled after the first is the guess, the logits after the second are already there
and give one more token; if not, the guess is taken back. Which token is sampled depends on the
trunk's logits and on the number that belongs to its position (``sample``), as without speculation,
and native kernels compute a row with the same bits whatever stands beside it: so the answer is the
same, bit for bit. The guess is what the request would sample if the block's logits were the
trunk's, with the same number.

Here is what decides for whom it is worth it, without a tensor but for the block's window:

    Trail      what the block needs of one timeline
    Odds       how often one request's guesses came true lately
    Judge      what passes cost and so who gets guesses
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from ..config import V4Config
from ..kernels import Span
from ..kernels.looking import Place
from .kvstate import Tail

WARM = 16  # tokens of a timeline that the block sees before its first guess
RECENT = 0.9  # how much of the past remains after each guess of a request ...
LONG = 0.99  # ... and of all requests together
PRIOR = 2.0  # guesses that what is known of all requests counts for
MARGIN = 1.03  # a gain that cannot be told from noise is none
SAMPLES = 9  # times of the same kind of pass that are remembered
ENOUGH = 3  # of them say what it takes: the first may be slow
COMPARE = 64  # steps with guesses after which one without them is timed again
TRY = 4  # guesses in a new try of what did not pay
RETRY, RETRY_MOST = 128, 1024  # steps between tries; twice as many after each that failed


class Trail:
    """What the block needs of one timeline: its own window, and the trunk's streams that it has
    not seen yet.

    It is only a help for guessing, so it is not kept with the timeline: after a hit, a restart or
    a preemption it begins anew with the streams at hand. Implements ``protocols.WindowState``.
    """

    def __init__(self, window: int) -> None:
        self._keep = window - 1
        self._window: Tail | None = None
        self._unseen: deque[Tensor] = deque()
        self.unseen = 0

    def add(self, streams: Tensor) -> None:
        """Streams ``[n, h, d]`` of the timeline's newest tokens; the last WARM at most are kept."""
        rows = streams[-WARM:].clone()  # the pass they come from may be long
        self._unseen.append(rows)
        self.unseen += len(rows)
        if len(rows) < len(streams):
            self._window = None
        while self.unseen - len(self._unseen[0]) >= WARM:
            self.unseen -= len(self._unseen.popleft())
            self._window = None  # of tokens that are not followed by these

    def take_back(self, tokens: int) -> None:
        """Forget so many of the streams added last; fewer than the last ``add`` brought."""
        if tokens:
            self._unseen[-1] = self._unseen[-1][:-tokens]
            self.unseen -= tokens

    def take(self) -> Tensor:
        """The streams ``[n, h, d]`` not yet seen, which the block sees now."""
        streams = torch.cat(tuple(self._unseen)) if len(self._unseen) > 1 else self._unseen[0]
        self._unseen.clear()
        self.unseen = 0
        return streams

    def window(self, kv: Tensor) -> Span:
        if self._window is None:
            self._window = Tail(kv[:, :0])
        return self._window.window(kv.shape[1], self._keep)

    @property
    def begun(self) -> bool:
        return self._window is not None

    def places(self, count: int) -> list[Place]:
        assert self._window is not None
        return [Place(*where) for where in self._window.windows(count, self._keep)]


class Odds:
    """How likely a guess comes true for one request, from its recent ones and those of all.

    ``guesses`` and ``hits`` count all of its guesses and those that came true.
    """

    def __init__(self, everyone: Odds | None = None) -> None:
        self._everyone = everyone
        self._decay = LONG if everyone is None else RECENT
        # of all requests: hopeful at first
        self._tries, self._true = (0.0, 0.0) if everyone else (PRIOR, 0.75 * PRIOR)
        self.guesses = self.hits = 0
        self.waited = 0  # steps since it had a guess

    @property
    def likely(self) -> float:
        if self._everyone is None:
            return self._true / self._tries
        true = self._true + PRIOR * self._everyone.likely
        return true / (self._tries + PRIOR)

    def seen(self, hit: bool) -> None:
        """A guess came true, or did not."""
        self.guesses, self.hits = self.guesses + 1, self.hits + hit
        self._tries = self._decay * self._tries + 1
        self._true = self._decay * self._true + hit
        if self._everyone is not None:
            self._everyone.seen(hit)


class Weights:
    """Bytes of weights that a pass reads, and of them experts: what it costs before it is timed.

    The rows of a pass share what they read, but for the experts: of ``E`` experts each row takes
    ``K``, and rows that choose alike share them. As if they chose by chance, ``rows`` rows take
    ``E (1 - (1 - K / E) ** rows)`` different ones.
    """

    def __init__(self, config: V4Config) -> None:
        counts = config.parameter_counts()
        self._experts, self._chosen = config.n_routed_experts, config.num_experts_per_tok
        self._layers = config.num_hidden_layers
        matrices = 3 * config.hidden_size * config.moe_intermediate_size
        self._expert = matrices * (17 / 32 if config.expert_dtype == "fp4" else 1.0)
        head = config.vocab_size * config.hidden_size
        self._dense = counts.active - self._layers * self._chosen * matrices + head  # head: BF16
        self._draft = counts.mtp - self._experts * matrices + 2 * head

    def expert_bytes(self, rows: int, layers: int | None = None) -> float:
        """Of the experts that so many rows take in the trunk, or in so many layers."""
        taken = self._experts * (1 - (1 - self._chosen / self._experts) ** rows)
        return (self._layers if layers is None else layers) * taken * self._expert

    def trunk(self, rows: int) -> float:
        return self._dense + self.expert_bytes(rows)

    def block(self, rows: int) -> float:
        return self._draft + self.expert_bytes(rows, 1)


class Judge:
    """Decides who gets a guess in the next pass, so that speculation does not cost time.

    With ``m`` requests that decode and guesses for ``s`` of them a step gives ``m`` tokens and one
    more for each guess that comes true, and takes a pass of ``m + s`` rows and one of the block
    for ``s``. The ``s`` likeliest get guesses for which tokens per second are most, none if no
    ``s`` is better than 0. Seconds are those that such passes took lately; numbers of rows not
    timed yet lie on the line through the two nearest that were, or, where one was, take as much
    longer as the bytes of weights that they read are more.

    Who gets none is tried again: one request at a time, for TRY steps, ever more rarely while it
    does not pay.
    """

    def __init__(self, weights: Weights) -> None:
        self.everyone = Odds()
        self._weights = weights
        self._times: dict[tuple[bool, int], deque[float]] = {}
        self._usual: dict[tuple[bool, int], float] = {}
        self._expected: dict[tuple[bool, int], float] = {}  # of other kinds
        self._steps = 0
        self._timed: dict[int, int] = {}  # when passes of so many rows without guesses were
        self._trying: Odds | None = None
        self._tries_left = 0
        self._next_try, self._pause = RETRY, RETRY

    # ------------------------------------------------------------------ what it costs

    def took(self, rows: int, seconds: float, guesses: int) -> None:
        """A pass of the trunk in which every request decodes; ``guesses`` of the rows are such."""
        self._note((False, rows), seconds)
        if not guesses:
            self._timed[rows] = self._steps

    def drafting_took(self, requests: int, seconds: float) -> None:
        """Guesses for so many requests."""
        self._note((True, requests), seconds)

    def _note(self, kind: tuple[bool, int], seconds: float) -> None:
        times = self._times.setdefault(kind, deque(maxlen=SAMPLES))
        times.append(seconds)
        # the lower quartile: a pass may be held up, but it is never too fast
        self._usual[kind] = sorted(times)[len(times) // 4]
        if len(times) <= ENOUGH:
            self._expected.clear()

    def seconds(self, draft: bool, rows: int) -> float:
        """What a pass of the trunk, or of the block, is expected to take."""
        kind = draft, rows
        if len(self._times.get(kind, ())) >= ENOUGH:
            return self._usual[kind]
        if kind not in self._expected:
            self._expected[kind] = self._expect(kind)
        return self._expected[kind]

    def _expect(self, kind: tuple[bool, int]) -> float:
        """Of a kind not timed often enough: by the two nearest numbers of rows that were, or by
        bytes."""
        draft, rows = kind
        few = min(ENOUGH, max(map(len, self._times.values()), default=0))
        known = [k for k, times in self._times.items() if len(times) >= few]
        known.sort(key=lambda k: (k[0] != draft, abs(k[1] - rows)))
        if not known:
            return self._bytes(kind)
        near, usual = known[0], self._usual[known[0]]
        if len(known) > 1 and near[0] == known[1][0] == draft:
            row = (self._usual[known[1]] - usual) / (known[1][1] - near[1])
            return max(usual + row * (rows - near[1]), 0.5 * usual)
        return usual * self._bytes(kind) / self._bytes(near)

    def _bytes(self, kind: tuple[bool, int]) -> float:
        draft, rows = kind
        return self._weights.block(rows) if draft else self._weights.trunk(rows)

    # ------------------------------------------------------------------ who gets guesses

    def choose(self, odds: Sequence[Odds], decoding: int) -> list[int]:
        """Which of these requests, of the ``decoding`` ones of the next pass, get a guess."""
        self._steps += 1
        order = sorted(range(len(odds)), key=lambda i: -odds[i].likely)
        chosen = order[: self._worth([odds[i].likely for i in order], decoding)]
        if chosen and self._steps - self._timed.get(decoding, -COMPARE) > COMPARE:
            chosen = []  # what a step takes without guesses is not known any more
            self._expected.clear()
        else:
            chosen += self._try(odds, chosen)
        for i, each in enumerate(odds):
            each.waited = 0 if i in chosen else each.waited + 1
        return chosen

    def _worth(self, likely: Sequence[float], decoding: int) -> int:
        """How many guesses, likeliest first, give most tokens per second."""
        best, count, tokens = MARGIN * decoding / self.seconds(False, decoding), 0, float(decoding)
        for s, chance in enumerate(likely, 1):
            tokens += chance
            rate = tokens / (self.seconds(False, decoding + s) + self.seconds(True, s))
            if rate > best:
                best, count = rate, s
        return count

    def _try(self, odds: Sequence[Odds], chosen: Sequence[int]) -> list[int]:
        """One that has not been worth it for long, now and then."""
        others = [i for i in range(len(odds)) if i not in chosen]
        if self._trying is not None and self._tries_left == 0:
            paid = any(odds[i] is self._trying for i in chosen)
            self._pause = RETRY if paid else min(2 * self._pause, RETRY_MOST)
            self._next_try, self._trying = self._steps + self._pause, None
        if self._trying is None and others and self._steps >= self._next_try:
            self._trying = odds[max(others, key=lambda i: odds[i].waited)]
            self._tries_left = TRY
        if self._trying is None:
            return []
        self._tries_left -= 1
        return [i for i in others if odds[i] is self._trying]

