"""``load`` and ``Model``: the parts put together for people who write Python.

    import dsv4
    m = dsv4.load("v4-nano")
    print(m.chat([{"role": "user", "content": "What is 47 + 85?"}], thinking="high"))
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import encoding, kernels
from .checkpoint import Checkpoint
from .config import FP4_BLOCK, FP8_BLOCK, V4Config
from .engine.experts import Experts, expert_budget, expert_bytes, is_routed
from .engine.memory import available
from .engine.sample import SamplingParams, sample
from .engine.session import Runner, Session, check_ids
from .errors import CheckpointError, ConfigError, ContextLengthError, RequestError
from .model import Pass, Transformer
from .numerics import KV_BLOCK, Numerics, numerics
from .tokenizer import Tokenizer

SHIPPED = Path(__file__).parent / "models"
WORKING = 2 << 30  # bytes of memory for passes and all else that is not weights


def load(
    name_or_path: str | Path = "v4-nano",
    numerics: str = "official",
    *,
    expert_memory: int | None = None,
    beside: int = 0,
) -> Model:
    """A model that ships in the package, by name, or a folder in the official checkpoint format.

    Weights stay as stored and memory-mapped, so loading takes the time of reading headers and
    memory is that of the file's touched pages. ``numerics``: "official" (DeepSeek's roundings) or
    "float32" (none). Raises CheckpointError, ConfigError.

    ``expert_memory``: bytes for routed experts; those that it does not hold are read from disk when
    they are chosen (docs/experts.md). None: enough for all if they fit, else what is available but
    for the other weights, 2 GiB to work in, and ``beside`` bytes for what the caller has in mind.
    """
    checkpoint = Checkpoint.open(find_model(name_or_path))
    budget = expert_memory
    if budget is None:
        budget = expert_budget(checkpoint, available() - WORKING - beside)
    return Model.from_checkpoint(checkpoint, numerics, expert_memory=budget)


def find_model(name_or_path: str | Path) -> Path:
    """The folder of a model: the one given, or that of a model that ships in the package.

    Raises CheckpointError when there is neither.
    """
    path, name = Path(name_or_path), str(name_or_path)
    if not path.is_dir() and (SHIPPED / name).is_dir() and "/" not in name:
        path = SHIPPED / name
    elif not path.exists():
        shipped = sorted(p.name for p in SHIPPED.iterdir()) if SHIPPED.is_dir() else []
        raise CheckpointError(
            f"no model {name}",
            expected=f"a folder, or one of: {', '.join(shipped)}",
            got="neither",
            hint="dsv4 pull deepseek-ai/DeepSeek-V4-Flash, or dsv4 synth to make a random one",
        )
    return path


def check_numerics(nx: Numerics, config: V4Config) -> None:
    """ConfigError when the blocks of official rounding do not divide the model's widths."""
    if not nx.official:
        return
    blocks = {
        "hidden_size": (config.hidden_size, FP8_BLOCK),
        "q_lora_rank": (config.q_lora_rank, FP8_BLOCK),
        "o_groups * o_lora_rank": (config.o_groups * config.o_lora_rank, FP8_BLOCK),
        "moe_intermediate_size": (config.moe_intermediate_size, FP8_BLOCK),
        "head_dim - qk_rope_head_dim": (config.head_dim - config.qk_rope_head_dim, KV_BLOCK),
        "index_head_dim": (config.index_head_dim, FP4_BLOCK),
    }
    for what, (value, block) in blocks.items():
        if value % block:
            raise ConfigError(
                f"official numerics round {what} in blocks",
                expected=f"a multiple of {block}",
                got=value,
                hint='numerics "float32"',
            )


class Model:
    """A V4 model with its tokenizer (if its folder has one). Ids in, logits out; or chat.

    ``config``, ``name`` and ``tokenizer`` may be read; nothing may be written. Safe to use from
    several threads; a session belongs to one at a time.
    """

    def __init__(
        self, net: Transformer, nx: Numerics, name: str, tokenizer: Tokenizer | None
    ) -> None:
        self.config: V4Config = net.config
        self.name = name
        self.tokenizer = tokenizer
        self.numerics = nx.name
        self._net, self._nx = net, nx
        self._checkpoint: Checkpoint | None = None
        self.experts: Experts | None = None  # when not all of them are in memory

    @property
    def net(self) -> Transformer:
        """The network, for those who measure or change it."""
        return self._net

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        numerics_name: str = "official",
        *,
        expert_memory: int | None = None,
    ) -> Model:
        """From an opened checkpoint; its tensors are used where they lie. With ``expert_memory``
        bytes, if they do not hold all routed experts, these are read when they are chosen."""
        nx = numerics(numerics_name)
        check_numerics(nx, checkpoint.config)
        net = Transformer(checkpoint.config)
        names, experts = checkpoint.names(), None
        if expert_memory is not None and expert_memory < expert_bytes(checkpoint):
            experts = Experts(checkpoint, net, expert_memory)
            names = [name for name in names if not is_routed(name)]
        net.load_weights(names, checkpoint.tensor)
        file = checkpoint.path / "tokenizer.json"
        tokenizer = Tokenizer.load(file) if file.exists() else None
        model = cls(net, nx, checkpoint.path.resolve().name, tokenizer)
        model._checkpoint, model.experts = checkpoint, experts
        return model

    @property
    def folder(self) -> Path | None:
        """Where its files are, if it comes from files."""
        return self._checkpoint.path if self._checkpoint else None

    def fingerprint(self) -> str:
        """64 hex digits of all that its numbers depend on: weights, numerics, kernels.

        ConfigError for a model that does not come from files.
        """
        if self._checkpoint is None:
            raise ConfigError(f"{self.name} has no files", hint="save_checkpoint, then load")
        parts = self._checkpoint.fingerprint(), self.numerics, kernels.bits()
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()

    def __repr__(self) -> str:
        total, active, _ = self.config.parameter_counts()
        return (
            f"<dsv4.Model {self.name}: {total / 1e6:,.1f}M parameters, {active / 1e6:,.1f}M active,"
            f" {self.numerics} numerics>"
        )

    # ------------------------------------------------------------ tensors

    def _ids(self, ids: Sequence[int] | Tensor) -> Tensor:
        tokens = ids.tolist() if isinstance(ids, Tensor) else [int(i) for i in ids]
        check_ids(tokens, self.config.vocab_size)
        if len(tokens) > self.config.max_position_embeddings:
            raise ContextLengthError(
                "more tokens than the context holds",
                expected=f"at most {self.config.max_position_embeddings}",
                got=len(tokens),
            )
        return torch.tensor([tokens])

    def _trunk(
        self,
        ids: Sequence[int] | Tensor,
        keep: list[Tensor] | None = None,
        numerics: Numerics | None = None,
    ) -> tuple[Tensor, Pass]:
        run = self._net.start(self._ids(ids), numerics or self._nx)
        return self._net.trunk(run, keep), run

    @torch.inference_mode()
    def logits(self, ids: Sequence[int] | Tensor) -> Tensor:
        """Float32 ``[T, vocab]``: row i predicts the token after ``ids[i]``; one forward pass."""
        streams, run = self._trunk(ids)
        return self._net.logits(streams[0], run)

    @torch.inference_mode()
    def mtp_logits(self, ids: Sequence[int] | Tensor) -> Tensor:
        """Float32 ``[T - 1, vocab]``: row i predicts ``ids[i + 2]`` from the trunk at i and the
        embedding of ``ids[i + 1]``. Needs two tokens and an MTP block."""
        if len(ids) < 2:
            raise RequestError("mtp_logits", expected="at least two tokens", got=len(ids))
        streams, run = self._trunk(ids)
        return self._net.mtp_logits(self._net.mtp_streams(streams, run)[0], run)

    @torch.inference_mode()
    def streams(self, ids: Sequence[int] | Tensor) -> list[Tensor]:
        """The residual streams ``[T, hc_mult, hidden]`` after each block, for receipts.

        In official numerics the norm of the query heads rounds as torch does, place by place
        (docs/numerics.md), so that the last rows of a pass compare with the published code too.
        """
        keep: list[Tensor] = []
        self._trunk(ids, keep, replace(self._nx, placed=True))
        return [s[0] for s in keep]

    def session(self) -> Session:
        """An empty timeline; see ``Session``."""
        return Session(self._net, self._nx)

    def runner(self) -> Runner:
        """What an ``Engine`` runs many timelines on."""
        return Runner(self._net, self._nx)

    # ------------------------------------------------------------ tokens

    def generate(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams | None = None,
        on_token: Callable[[int], object] | None = None,
    ) -> list[int]:
        """Continue ``prompt_ids``; the new ids, without the end token.

        ``on_token`` is called with each id as it comes; returning ``False`` stops.
        """
        p = params or SamplingParams()
        stop = (self.config.eos_token_id,) if p.stop_token_ids is None else p.stop_token_ids
        session = self.session()
        room = self.config.max_position_embeddings - len(prompt_ids)
        if room <= 0:
            raise ContextLengthError(
                "the prompt leaves no room for an answer",
                expected=f"fewer than {self.config.max_position_embeddings} tokens",
                got=len(prompt_ids),
            )
        limit = min(room, p.max_tokens or room)
        row = session.extend(list(prompt_ids), last=True)[-1]
        out: list[int] = []
        while len(out) < limit:
            token = sample(row, p, len(session))
            if token in stop:
                break
            out.append(token)
            if on_token is not None and on_token(token) is False:
                break
            if len(out) < limit:
                row = session.extend([token], last=True)[-1]
        return out

    # ------------------------------------------------------------ text

    def chat(
        self,
        messages: Sequence[dict[str, Any]],
        thinking: str = "off",
        tools: Sequence[dict[str, Any]] | None = None,
        *,
        max_tokens: int | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> dict[str, Any]:
        """The assistant's message: ``content``, ``reasoning_content``, ``tool_calls``.

        ``messages`` and ``tools`` as in the OpenAI API; ``thinking`` "off", "high" or "max".
        Raises ConfigError for a model without a tokenizer, RequestError for bad arguments.
        """
        if self.tokenizer is None:
            raise ConfigError(
                f"{self.name} has no tokenizer", expected="tokenizer.json in its folder", got="none"
            )
        if thinking not in encoding.EFFORTS:
            raise RequestError("thinking", expected=" | ".join(encoding.EFFORTS), got=thinking)
        mode, effort = encoding.EFFORTS[thinking]
        clean = encoding.normalize_messages(list(messages), list(tools or []))
        segments = encoding.encode_segments(
            clean,
            mode,
            drop_thinking=not any(m.get("tool_calls") for m in clean),
            reasoning_effort=effort,
        )
        inside = encoding.generation_mode("".join(text for text, _ in segments))
        parser = encoding.StreamingParser(inside, clean[0].get("tools", []))
        decoder = self.tokenizer.stream()
        eos = self.tokenizer.eos_id
        params = SamplingParams(
            max_tokens, temperature, top_p, seed, (eos,) if eos is not None else None
        )
        count = 0

        def take(token: int) -> None:
            nonlocal count
            count += 1
            parser.feed(decoder.push(token))

        prompt = self.tokenizer.encode_segments(segments)
        self.generate(prompt, params, take)
        parser.feed(decoder.flush())
        cut = max_tokens is not None and count >= max_tokens
        return dict(parser.finish("length" if cut else "stop").message)
