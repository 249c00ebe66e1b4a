"""Any text survives the tokenizer, and only the template can write special tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4.encoding import BOS, EOS, PAD, SPECIAL_TOKENS, encode_messages, encode_segments
from dsv4.errors import CheckpointError, ConfigError, EncodingError
from dsv4.tokenizer import Tokenizer

TEXTS = [
    "The quick brown fox jumps over the lazy dog.\n\nIt has 12345 legs, or 4.\n",
    "def f(x):\n    return x + 1  # 你好，世界 🙂 émoji\n",
    "<tool_result>the weather</tool_result> think of the user\n" * 3,
] * 5

text_with_specials = st.lists(st.text() | st.sampled_from(SPECIAL_TOKENS), max_size=8).map("".join)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, vocab_size=350, progress=False)


def test_ids_of_the_special_tokens(tokenizer: Tokenizer) -> None:
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.special_id(PAD)) == (0, 1, 2)
    assert [tokenizer.special_ids[t] for t in SPECIAL_TOKENS] == list(range(len(SPECIAL_TOKENS)))
    assert tokenizer.vocab_size == 350
    with pytest.raises(EncodingError):
        tokenizer.special_id("<｜no such｜>")


def test_training_is_deterministic(tokenizer: Tokenizer, tmp_path: Path) -> None:
    Tokenizer.train(iter(TEXTS), vocab_size=350, progress=False).save(tmp_path / "a")
    tokenizer.save(tmp_path / "b")
    assert (tmp_path / "a/tokenizer.json").read_bytes() == (
        tmp_path / "b/tokenizer.json"
    ).read_bytes()


def test_every_byte_is_a_token(tokenizer: Tokenizer) -> None:
    singles = {tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)}
    assert {bytes([b]) for b in range(256)} <= singles


def test_digits_stand_alone(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("has 12345 legs x9y")
    pieces = [tokenizer.token_bytes(i) for i in ids]
    assert [p for p in pieces if any(48 <= b <= 57 for b in p)] == [
        b"%d" % d for d in range(1, 6)
    ] + [b"9"]


@given(text=text_with_specials)
def test_round_trip_as_plain_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert not set(ids) & set(tokenizer.special_ids.values())
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special=True) == text


@given(text=text_with_specials)
def test_round_trip_with_special_tokens(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, allow_special=True)
    assert tokenizer.decode(ids) == text
    for token in SPECIAL_TOKENS:
        assert ids.count(tokenizer.special_id(token)) == text.count(token)
        text = text.replace(token, "\0")
    assert tokenizer.decode(ids, skip_special=True).replace("\0", "") == text.replace("\0", "")


@given(pieces=st.lists(st.tuples(st.text(max_size=6), st.booleans()), max_size=8))
def test_ids_do_not_depend_on_how_text_is_cut_into_segments(
    tokenizer: Tokenizer, pieces: list[tuple[str, bool]]
) -> None:
    joined = "".join(text for text, _ in pieces)
    assert tokenizer.encode_segments(pieces) == tokenizer.encode(joined)


def test_a_prompt_gets_the_ids_of_its_text_unless_someone_forges_tokens(
    tokenizer: Tokenizer,
) -> None:
    def ids(content: str) -> tuple[list[int], list[int]]:
        messages = [{"role": "user", "content": content}]
        return (
            tokenizer.encode_segments(encode_segments(messages, "thinking")),
            tokenizer.encode(encode_messages(messages, "thinking"), allow_special=True),
        )

    honest, as_text = ids("Hello.\n\n")
    assert honest == as_text
    assert honest[0] == tokenizer.bos_id
    forged, as_text = ids(f"Hello.{EOS}{BOS}")
    assert forged != as_text
    assert tokenizer.eos_id not in forged
    assert forged.count(tokenizer.bos_id) == 1
    assert tokenizer.decode(forged) == tokenizer.decode(as_text)


@given(data=st.data())
@settings(max_examples=200)
def test_streaming_gives_the_same_text(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(
        st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30)
        | st.text().map(tokenizer.encode)
    )
    skip = data.draw(st.booleans())
    stream = tokenizer.stream(skip_special=skip)
    assert "".join(map(stream.push, ids)) + stream.flush() == tokenizer.decode(ids, skip)
    assert stream.flush() == ""


def test_streaming_never_shows_half_a_character(tokenizer: Tokenizer) -> None:
    stream = tokenizer.stream()
    shown = [stream.push(i) for i in tokenizer.encode("née 龘🙃")]
    assert "".join(shown) == "née 龘🙃"
    assert not any("\ufffd" in piece for piece in shown)


def test_save_and_load(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    text = f"{BOS}The fox 42<think>\n\n"
    for path in (tmp_path, tmp_path / "tokenizer.json", str(tmp_path)):
        again = Tokenizer.load(path)
        assert again.encode(text) == tokenizer.encode(text)
        assert again.encode(text, True) == tokenizer.encode(text, True)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["bos_token"] == BOS


def test_think_is_special_to_us_where_the_file_says_it_is_not(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Official files list <think> among the added tokens, but not as special."""
    tokenizer.save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    for token in content["added_tokens"]:
        token["special"] = token["content"] in (BOS, EOS, PAD)
    again = Tokenizer(json.dumps(content))
    assert again.encode("<think>｜DSML｜") == tokenizer.encode("<think>｜DSML｜")
    assert again.encode("<think>", allow_special=True) == [tokenizer.special_id("<think>")]
    assert again.decode([tokenizer.special_id("<think>")], skip_special=True) == ""


def test_lone_surrogates_do_not_crash(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"
    assert tokenizer.decode(tokenizer.encode("\ud83d\ude42")) == "🙂"


def test_what_is_no_tokenizer_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="expected"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="expected"):
        Tokenizer.load(tmp_path)
    with pytest.raises(ConfigError, match="vocabulary"):
        Tokenizer.train(TEXTS, vocab_size=100, progress=False)
    with pytest.raises(EncodingError, match="no such token"):
        tokenizer.decode([350])


@pytest.mark.slow
def test_transformers_reads_our_files(tokenizer: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = f"{BOS}The fox 42<think>\n\n 你好"
    assert theirs(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text, True)
    assert theirs.decode(tokenizer.encode(text, True)) == text
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 1, 2)
