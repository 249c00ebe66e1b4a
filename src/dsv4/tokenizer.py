"""Text to token ids and back: load an official tokenizer.json, or train a byte-level BPE.

Three things the plain ``tokenizers`` library does not promise are promised here:

* text from outside never becomes a special token unless the caller says so;
* decoding is byte-exact, and streaming it gives the same text as decoding at once;
* a prompt in segments (``encoding.encode_segments``) gets the very ids that its joined text
  would get, except that special tokens spelled inside untrusted segments stay plain text.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from dsv4.encoding import BOS, EOS, PAD, SPECIAL_TOKENS, Segment, Written
from dsv4.errors import CheckpointError, ConfigError, EncodingError

# Qwen2's split, which llama.cpp and others know by name: words with their leading space, single
# digits, punctuation with the newlines after it, runs of newlines.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_symbols() -> dict[str, int]:
    """The printable character that byte-level BPE uses for each byte (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


_BYTE_OF = _byte_symbols()


class Tokenizer:
    """A byte-level BPE tokenizer with DeepSeek-V4's special tokens.

    Make one with ``load`` or ``train``. All methods are pure and safe to call from threads.
    """

    def __init__(self, tokenizer_json: str) -> None:
        """From the text of a tokenizer.json. Raises CheckpointError when it is not one."""
        try:
            self._full = tokenizers.Tokenizer.from_str(tokenizer_json)
            added = json.loads(tokenizer_json)["added_tokens"]
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(
                "not a tokenizer", expected="the text of a tokenizer.json", got=str(error)
            ) from error
        # Official files mark <think> and others as not special; to us they are all the same.
        special = {t["id"]: str(t["content"]) for t in added if _is_special(t)}
        added_ids: dict[int, str] = {t["id"]: str(t["content"]) for t in added}
        self._special_ids: dict[str, int] = {text: i for i, text in special.items()}
        missing = [name for name in (BOS, EOS) if name not in self._special_ids]
        if missing:
            raise CheckpointError(
                "not a DeepSeek-V4 tokenizer", expected=f"{BOS} and {EOS} among added_tokens",
                got=f"no {' and no '.join(missing)}",
            )  # fmt: skip
        self._plain = _without_special_tokens(tokenizer_json)
        self._splitter = re.compile(
            "(" + "|".join(re.escape(t) for t in sorted(self._special_ids, key=len)[::-1]) + ")"
        )
        self._bytes = {
            i: text.encode() if i in added_ids else _token_to_bytes(text)
            for text, i in self._full.get_vocab(with_added_tokens=True).items()
        }
        self._skippable = frozenset(special)
        self._vocab_size = max(self._bytes) + 1

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Reads ``path``, a tokenizer.json or a folder that holds one (CheckpointError if not)."""
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        try:
            return cls(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(
                "no tokenizer here", expected="a tokenizer.json or a folder with one",
                got=f"{path} ({error})",
            ) from error  # fmt: skip

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, progress: bool = True) -> Tokenizer:
        """Trains byte-level BPE on ``texts`` up to ``vocab_size`` tokens, specials included.

        The same texts give the same tokenizer. Ids start with the special tokens in the order
        of ``encoding.SPECIAL_TOKENS`` (BOS 0, EOS 1, PAD 2), then the 256 bytes, so any text
        encodes. A decimal digit is always a token of its own. Few texts may give fewer tokens.
        """
        least = len(SPECIAL_TOKENS) + 256
        if vocab_size < least:
            raise ConfigError(
                "vocabulary too small", expected=f"at least {least}", got=vocab_size,
                hint="every byte and every special token needs an id",
            )  # fmt: skip
        bpe = tokenizers.Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS],
            initial_alphabet=sorted(_BYTE_OF),
            show_progress=progress,
        )
        bpe.train_from_iterator((_well_formed(text) for text in texts), trainer)
        return cls(bpe.to_str())

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json, as transformers reads them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(self._full.to_str(pretty=True), encoding="utf-8")
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": PAD if PAD in self._special_ids else EOS,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 1048576,
        }
        text = json.dumps(config, ensure_ascii=False, indent=2) + "\n"
        (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")

    # ---------------------------------------------------------------- text -> ids

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Token ids of ``text``, without adding BOS.

        Spellings of special tokens become those tokens only with ``allow_special``; otherwise
        they are plain text. Lone surrogates, which no UTF-8 text has, become U+FFFD.
        """
        if allow_special:
            return self.encode_segments([(text, True)])
        if not text:
            return []
        ids: list[int] = self._plain.encode(_well_formed(text), add_special_tokens=False).ids
        return ids

    def encode_segments(self, segments: Iterable[Segment]) -> list[int]:
        """Token ids of (text, allow_special) pieces, as ``encoding.encode_segments`` gives them.

        Text between two special tokens is tokenized as one run, whatever pieces it came in, so
        the ids do not depend on where trusted and untrusted text meet. ``Written`` text keeps the
        tokens it has.
        """
        ids: list[int] = []
        run: list[str] = []
        for text, allow_special in segments:
            if isinstance(text, Written):
                ids += [*self.encode("".join(run)), *text.ids]
                run = []
                continue
            for part in self._splitter.split(text) if allow_special else [text]:
                special = self._special_ids.get(part) if allow_special else None
                if special is None:
                    run.append(part)
                else:
                    ids += self.encode("".join(run))
                    ids.append(special)
                    run = []
        return ids + self.encode("".join(run))

    # ---------------------------------------------------------------- ids -> text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for; EncodingError for an id that is no token."""
        try:
            return self._bytes[token_id]
        except KeyError:
            raise EncodingError(
                "no such token", expected=f"an id below {self.vocab_size}", got=token_id
            ) from None

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Text of ``ids``; U+FFFD stands only where their bytes are not UTF-8."""
        return b"".join(self._token_bytes(ids, skip_special)).decode("utf-8", "replace")

    def stream(self, skip_special: bool = False) -> StreamingDecoder:
        """A decoder that takes ids one by one."""
        return StreamingDecoder(self, skip_special)

    def _token_bytes(self, ids: Iterable[int], skip_special: bool) -> Iterator[bytes]:
        for i in ids:
            if not (skip_special and i in self._skippable):
                yield self.token_bytes(i)

    # ---------------------------------------------------------------- what there is

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id. A model's embedding may have more rows."""
        return self._vocab_size

    @property
    def bos_id(self) -> int:
        return self._special_ids[BOS]

    @property
    def eos_id(self) -> int:
        return self._special_ids[EOS]

    @property
    def special_ids(self) -> dict[str, int]:
        """Id of every special token by its spelling, a copy."""
        return dict(self._special_ids)

    def special_id(self, token: str) -> int:
        """Id of the special token spelled ``token``; EncodingError when this tokenizer has none."""
        try:
            return self._special_ids[token]
        except KeyError:
            raise EncodingError("this tokenizer has no such special token", got=token) from None


class StreamingDecoder:
    """Turns token ids into text as they come.

    Never gives half a character. All results of ``push`` and the final ``flush``, joined, are
    what ``Tokenizer.decode`` makes of all the ids.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = False) -> None:
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that ``token_id`` completes, possibly none."""
        data = b"".join(self._tokenizer._token_bytes((token_id,), self._skip_special))
        return self._utf8.decode(data)

    def flush(self) -> str:
        """The rest: U+FFFD if the last character never was completed. Ready for new ids then."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest


def _is_special(token: dict[str, Any]) -> bool:
    return bool(token.get("special")) or token["content"] in SPECIAL_TOKENS


def _without_special_tokens(tokenizer_json: str) -> Any:
    """The same tokenizer, to which the spelling of a special token is text like any other."""
    content = json.loads(tokenizer_json)
    for token in content["added_tokens"]:
        token["special"] = _is_special(token)
    plain = tokenizers.Tokenizer.from_str(json.dumps(content))
    plain.encode_special_tokens = True
    return plain


def _token_to_bytes(token: str) -> bytes:
    try:
        return bytes(_BYTE_OF[c] for c in token)
    except KeyError:  # not written in the byte alphabet
        return token.encode()


def _well_formed(text: str) -> str:
    """``text`` with surrogate pairs joined and lone surrogates replaced."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
