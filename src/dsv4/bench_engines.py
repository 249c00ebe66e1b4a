"""The implementations that ``dsv4 bench`` measures, each in a process of its own.

``python -m dsv4.bench_engines NAME WEIGHTS THREADS`` answers questions (``bench.Process``) by the
methods of ``Measured``, or of ``Experts`` with one more argument. Each implementation is driven the
way its own programs drive it, and where it has a clock of its own, that one counts. Tokens are
chosen greedily.
"""

from __future__ import annotations

import atexit
import concurrent.futures
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import httpx
import torch
from torch import Tensor

from . import kernels, peers
from .api import load
from .bench import Report, answer_questions, resident_bytes
from .checkpoint import Checkpoint
from .engine.engine import Engine
from .engine.memory import forget_peak, peak_bytes
from .engine.sample import SamplingParams
from .engine.session import Session
from .kernels import Stored, reference

START = 1  # tokens of context for the fastest decoding there is
EACH_USER = 512  # tokens of context at most
FLYWEIGHT_PIECE = 512  # tokens of a prompt that it is given at once


class Runner(Protocol):
    """What a measured implementation can do; it holds one timeline at a time."""

    def load(self) -> None: ...

    def prefill(self, ids: list[int]) -> float:
        """Seconds for a new timeline of these tokens, the last one's logits included."""

    def decode(self, new: int) -> float:
        """Seconds for so many more tokens."""

    def users(self, prompts: list[list[int]], new: int) -> float:
        """Seconds for prompts that come at once and are continued by ``new`` tokens each."""

    def logits(self, ids: list[int], numerics: str) -> Tensor:
        """``[T, vocab]`` in its "own" numerics, or another that it has; log probabilities do."""

    def kv_bytes(self) -> int | None: ...

    def pid(self) -> int:
        """The process that holds the model."""


class Ours:
    def __init__(self, folder: Path, threads: int) -> None:
        self._folder = folder
        self._session: Session | None = None
        self._engine: Engine | None = None
        self._next = 0

    def load(self) -> None:
        self._model = load(self._folder)

    def prefill(self, ids: list[int]) -> float:
        self._session = None
        begin = time.perf_counter()
        self._session = self._model.session()
        self._next = int(self._session.extend(ids, last=True)[-1].argmax())
        return time.perf_counter() - begin

    def decode(self, new: int) -> float:
        assert self._session is not None
        begin = time.perf_counter()
        for _ in range(new):
            self._next = int(self._session.extend([self._next], last=True)[-1].argmax())
        return time.perf_counter() - begin

    def users(self, prompts: list[list[int]], new: int) -> float:
        if self._engine is None:
            self._engine = Engine(self._model, max_running=len(prompts))
        params = SamplingParams(temperature=0, max_tokens=new, stop_token_ids=())
        begin = time.perf_counter()
        running = [self._engine.submit(prompt, params) for prompt in prompts]
        for generation in running:
            generation.result()
        return time.perf_counter() - begin

    def logits(self, ids: list[int], numerics: str) -> Tensor:
        model = self._model if numerics == "own" else load(self._folder, numerics=numerics)
        return model.logits(ids)

    def kv_bytes(self) -> int | None:
        return self._session.bytes() if self._session is not None else 0

    def pid(self) -> int:
        return os.getpid()


class Transformers:
    def __init__(self, folder: Path, threads: int) -> None:
        import transformers

        self._library: Any = transformers
        self._folder = folder
        self._model: Any = None
        self._cache: Any = None
        self._next = torch.zeros(1, 1, dtype=torch.long)

    def load(self) -> None:
        model = self._library.AutoModelForCausalLM.from_pretrained(
            self._folder, dtype=torch.float32
        )
        self._model = model.eval()

    def prefill(self, ids: list[int]) -> float:
        return self._start([ids])

    @torch.no_grad()
    def _start(self, prompts: list[list[int]]) -> float:
        self._cache = None
        begin = time.perf_counter()
        out = self._model(torch.tensor(prompts), use_cache=True, logits_to_keep=1)
        self._cache, self._next = out.past_key_values, out.logits[:, -1:].argmax(-1)
        return time.perf_counter() - begin

    @torch.no_grad()
    def decode(self, new: int) -> float:
        begin = time.perf_counter()
        for _ in range(new):
            out = self._model(self._next, use_cache=True, past_key_values=self._cache)
            self._next = out.logits[:, -1:].argmax(-1)
        return time.perf_counter() - begin

    def users(self, prompts: list[list[int]], new: int) -> float:
        return self._start(prompts) + self.decode(new - 1)

    @torch.no_grad()
    def logits(self, ids: list[int], numerics: str) -> Tensor:
        logits: Tensor = self._model(torch.tensor([ids])).logits[0]
        return logits

    def kv_bytes(self) -> int | None:
        return None

    def pid(self) -> int:
        return os.getpid()


class LlamaCpp:
    """llama-server, asked over HTTP for what its own timings say."""

    def __init__(self, file: Path, threads: int) -> None:
        self._file, self._threads = file, threads
        self._server: subprocess.Popen[bytes] | None = None
        self._shape = 0, 0
        self._tokens: list[int] = []
        self._http = httpx.Client()
        atexit.register(self.close)  # the server is a process of its own, and would stay

    def load(self) -> None:
        self._serve(1, 4096)

    def _serve(self, users: int, context: int) -> None:
        """Be a server for so many users with at least so many tokens each."""
        if self._server is not None and self._shape[0] == users and self._shape[1] >= context:
            return
        self.close()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._http.close()
        self._http = httpx.Client(
            base_url=f"http://127.0.0.1:{port}", timeout=3600, trust_env=False
        )
        self._shape = users, context
        threads = str(self._threads)
        self._server = subprocess.Popen([
            peers.llama_server(), "-m", self._file, "-t", threads, "-tb", threads, "-fa", "on",
            "-np", str(users), "-c", str(users * context), "--cache-ram", "0",
            "--no-repack",  # with it, V4 aborts where there is AMX
            "--host", "127.0.0.1", "--port", str(port),
        ], stdin=subprocess.DEVNULL, stdout=sys.stderr)  # fmt: skip
        while True:
            if self._server.poll() is not None:
                raise RuntimeError(f"llama-server ended with {self._server.returncode}")
            try:
                if self._http.get("/health").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.05)

    def close(self) -> None:
        if self._server is not None:
            self._server.terminate()
            self._server.wait()
            self._server = None

    def _ask(self, ids: list[int], new: int, **more: object) -> Any:
        body = {"prompt": ids, "n_predict": new, "temperature": 0, "ignore_eos": True}
        done = self._http.post("/completion", json=body | {"return_tokens": True} | more)
        if done.status_code != 200:
            raise RuntimeError(f"llama-server: {done.text[:300]}")
        return done.json()

    def prefill(self, ids: list[int]) -> float:
        self._serve(1, -(-(len(ids) + 1024) // 4096) * 4096)
        # two tokens, so that the server's timeline ends with one that the next request repeats
        answer = self._ask(ids, 2, cache_prompt=False)
        self._tokens = ids + answer["tokens"]
        return float(answer["timings"]["prompt_ms"]) / 1e3

    def decode(self, new: int) -> float:
        answer = self._ask(self._tokens, new + 1, cache_prompt=True)
        if answer["timings"]["prompt_n"] > 128:
            raise RuntimeError("llama-server read the prompt again")
        self._tokens += answer["tokens"]
        return float(answer["timings"]["predicted_ms"]) / 1e3  # the first came with the prompt

    def first_token(self, ids: list[int], new: int) -> tuple[list[int], int, float]:
        """An answer of ``new`` tokens, how many of the prompt's were computed, and the seconds
        until its first one; what the server has from before, it uses."""
        self._serve(1, -(-(len(ids) + 1024) // 4096) * 4096)
        answer = self._ask(ids, new, cache_prompt=True)
        timings = answer["timings"]
        seconds = (timings["prompt_ms"] + timings["predicted_per_token_ms"]) / 1e3
        return answer["tokens"], int(timings["prompt_n"]), float(seconds)

    def users(self, prompts: list[list[int]], new: int) -> float:
        self._serve(len(prompts), EACH_USER)
        with concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
            begin = time.perf_counter()
            list(pool.map(lambda ids: self._ask(ids, new, cache_prompt=False), prompts))
            return time.perf_counter() - begin

    def logits(self, ids: list[int], numerics: str) -> Tensor:
        self._serve(1, 4096)
        rows = []
        for end in range(1, len(ids) + 1):
            answer = self._ask(ids[:end], 1, cache_prompt=end > 1, n_probs=1 << 20)
            found = answer["completion_probabilities"][0]["top_logprobs"]
            row = torch.full((len(found),), -torch.inf)
            row[torch.tensor([e["id"] for e in found])] = torch.tensor(
                [float(e["logprob"]) for e in found]
            )
            rows.append(row)
        return torch.stack(rows)

    def kv_bytes(self) -> int | None:
        return None

    def pid(self) -> int:
        return self._server.pid if self._server is not None else os.getpid()


class Flyweight:
    def __init__(self, file: Path, threads: int) -> None:
        os.environ["FLYWEIGHT_CPU_THREADS"] = str(threads)
        self._file = file
        self._runtime: Any = None
        self._room = 0
        self._next = 0

    def load(self) -> None:
        from flyweight.v2 import V2Model

        self._model = V2Model(self._file)
        self._begin(4096)

    def _begin(self, room: int) -> None:
        from flyweight.deepseek4 import Deepseek4Runtime

        if room > self._room:
            if self._runtime is not None:
                self._runtime.close()
            self._runtime, self._room = Deepseek4Runtime(self._model, room), room
        self._runtime.reset()

    def prefill(self, ids: list[int]) -> float:
        self._begin(len(ids) + 1024)
        begin = time.perf_counter()
        for at in range(0, len(ids) - 1, FLYWEIGHT_PIECE):
            self._runtime.prefill(ids[at : min(at + FLYWEIGHT_PIECE, len(ids) - 1)])
        self._next = int(self._runtime.forward(ids[-1]).argmax())
        return time.perf_counter() - begin

    def decode(self, new: int) -> float:
        begin = time.perf_counter()
        for _ in range(new):
            self._next = int(self._runtime.forward(self._next).argmax())
        return time.perf_counter() - begin

    def users(self, prompts: list[list[int]], new: int) -> float:
        raise NotImplementedError("one timeline at a time")

    def logits(self, ids: list[int], numerics: str) -> Tensor:
        self._begin(len(ids))
        return torch.stack([torch.from_numpy(self._runtime.forward(i).copy()) for i in ids])

    def kv_bytes(self) -> int | None:
        return None

    def pid(self) -> int:
        return os.getpid()


RUNNERS: dict[str, type[Ours] | type[Transformers] | type[LlamaCpp] | type[Flyweight]] = {
    "dsv4": Ours, "transformers": Transformers, "llama.cpp": LlamaCpp, "flyweight": Flyweight,
}  # fmt: skip


class Measured:
    """The questions about a model."""

    def __init__(self, runner: Runner, weights: Path) -> None:
        self._runner, self._weights = runner, str(weights.resolve())
        self._before = self._peak_before = 0

    def load(self) -> Report:
        for dtype in (torch.float32, torch.bfloat16):  # the libraries' own pages are not the model
            x = torch.ones(64, 256, dtype=dtype)
            (x @ x.T).softmax(-1).sort()
        forget_peak()
        self._before, self._peak_before = resident_bytes(self._weights), peak_bytes()
        begin = time.perf_counter()
        self._runner.load()
        return {"load_seconds": time.perf_counter() - begin}

    def prefill(self, ids: list[int]) -> float:
        """Tokens a second."""
        return len(ids) / self._runner.prefill(ids)

    def decode(self, new: int) -> float:
        return new / self._runner.decode(new)

    def users(self, prompts: list[list[int]], new: int) -> float:
        return len(prompts) * new / self._runner.users(prompts, new)

    def speeds(self, ids: list[int], prompt: int) -> Report:
        new = len(ids) - prompt
        self.prefill(ids[:START])
        start = self.decode(new)
        prefill = self.prefill(ids[:prompt])
        return {"prefill": prefill, "decode_start": start, "decode_prompt": self.decode(new)}

    def memory(self, file_bytes: int) -> Report:
        pid, kv = self._runner.pid(), self._runner.kv_bytes()
        alone = pid == os.getpid()
        resident = resident_bytes(self._weights, pid) - (self._before if alone else 0)
        peak = peak_bytes(pid) - (self._peak_before if alone else 0)
        of_file = (resident - (kv or 0)) / file_bytes
        report = {"resident_bytes": resident, "peak_bytes": peak, "kv_bytes": kv}
        return report | {"resident_without_kv_of_file": of_file}

    def logits(self, ids: list[int], numerics: str, file: str) -> None:
        torch.save(self._runner.logits(ids, numerics).float().clone(), file)


# ---------------------------------------------------------------- experts


class Experts:
    """The routed experts of the first layer of a checkpoint, in ours or in kt-kernel's kernel."""

    def __init__(self, name: str, folder: Path, threads: int) -> None:
        self._folder, self._threads = folder, threads
        self._checkpoint = Checkpoint.open(folder)
        self._config = self._checkpoint.config
        self._kt: Any = None
        if name != "dsv4":
            self._kt = self._open_kt()

    def _open_kt(self) -> Any:
        os.environ["KT_FORCE_SYNC_SUBMIT"] = "1"  # else it returns before it is done
        import kt_kernel

        c, zeros = self._config, torch.zeros
        torch.zeros = lambda *a, pin_memory=False, **k: zeros(*a, **k)  # type: ignore[assignment,misc,unused-ignore]
        try:
            wrapper = kt_kernel.KTMoEWrapper(
                layer_idx=0, num_experts=c.n_routed_experts,
                num_experts_per_tok=c.num_experts_per_tok, hidden_size=c.hidden_size,
                moe_intermediate_size=c.moe_intermediate_size, gpu_experts_mask=None,
                cpuinfer_threads=self._threads, threadpool_count=1, weight_path=str(self._folder),
                chunked_prefill_size=512, method="MXFP4", swiglu_limit=c.swiglu_limit,
            )  # fmt: skip
        finally:
            torch.zeros = zeros
        wrapper.load_weights(torch.arange(c.n_routed_experts))
        return wrapper

    def inputs(self, rows: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        c, random = self._config, torch.Generator().manual_seed(seed)
        x = torch.randn(rows, c.hidden_size, generator=random).to(torch.bfloat16)
        drawn = torch.rand(rows, c.n_routed_experts, generator=random)
        ids = drawn.topk(c.num_experts_per_tok).indices.contiguous()
        return x, ids, torch.full(ids.shape, 1 / ids.shape[1])

    def time(self, rows: int, calls: int, seed: int) -> float:
        """Seconds of one of ``calls`` calls, each with its own choice of experts."""
        work = [self.inputs(rows, seed + i) for i in range(calls)]
        begin = time.perf_counter()
        self._run(work)
        return (time.perf_counter() - begin) / calls

    def error(self, rows: int) -> float:
        """Distance to exact arithmetic on the same weights, relative to the size of the result."""
        x, ids, weights = self.inputs(rows, 0)
        found = self._run([(x, ids, weights)])[0].float()
        limit = self._config.swiglu_limit
        exact = reference.routed_experts(
            x.float(), ids, weights, *self._tables(), limit, False, torch.float32
        )
        return float((found - exact).norm() / exact.norm())

    def _tables(self) -> tuple[_Table, _Table, _Table]:
        if not hasattr(self, "_held"):
            names = [f"layers.0.ffn.experts.{{}}.{w}" for w in ("w1", "w2", "w3")]
            count = self._config.n_routed_experts
            w1, w2, w3 = (_Table(self._checkpoint, name, count) for name in names)
            self._held = w1, w2, w3
        return self._held

    @torch.inference_mode()
    def _run(self, work: Sequence[tuple[Tensor, Tensor, Tensor]]) -> list[Tensor]:
        if self._kt is None:
            limit, dtype = self._config.swiglu_limit, torch.bfloat16
            return [
                kernels.routed_experts(
                    kernels.fp8_round(x), ids, weights, *self._tables(), limit, True, dtype
                )
                for x, ids, weights in work
            ]
        # Its workers need both cores, and waiting in its own `sync` takes one of them.
        outs = [torch.full_like(x, torch.nan) for x, _, _ in work]
        counts = [torch.tensor([len(x)], dtype=torch.int32) for x, _, _ in work]
        for (x, ids, weights), out, count in zip(work, outs, counts, strict=True):
            task = self._kt.moe.forward_task(
                count.data_ptr(), ids.shape[1], ids.data_ptr(), weights.data_ptr(), x.data_ptr(),
                out.data_ptr(), False,
            )  # fmt: skip
            self._kt.cpu_infer.submit(task)
        while outs[-1].isnan().any():
            time.sleep(0.0005)
        self._kt.cpu_infer.sync()
        return outs


class _Table:
    """One matrix of each expert, by number."""

    def __init__(self, checkpoint: Checkpoint, name: str, count: int) -> None:
        self._stored = [
            Stored(*(checkpoint.tensor(f"{name.format(i)}.{part}") for part in ("weight", "scale")))
            for i in range(count)
        ]

    def __len__(self) -> int:
        return len(self._stored)

    def __getitem__(self, expert: int, /) -> Stored:
        return self._stored[expert]


def _prepare() -> object:
    name, weights, threads, *kind = sys.argv[1:]
    torch.set_num_threads(int(threads))
    if kind == ["experts"]:
        return Experts(name, Path(weights), int(threads))
    return Measured(RUNNERS[name](Path(weights), int(threads)), Path(weights))


if __name__ == "__main__":
    answer_questions(_prepare)
