"""The model that ships: honest about itself, in the official format, able to do its exercises."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from typer.testing import CliRunner

import dsv4
from dsv4.api import SHIPPED
from dsv4.checkpoint import Checkpoint
from dsv4.cli import app
from dsv4.encoding import encode_segments
from dsv4.evals.run import evaluate
from dsv4.evals.tasks import instance


@pytest.fixture(scope="module")
def nano() -> dsv4.Model:
    return dsv4.load("v4-nano")


def test_it_is_an_official_checkpoint_of_the_preset(nano: dsv4.Model) -> None:
    folder = SHIPPED / "v4-nano"
    checkpoint = Checkpoint.open(folder, check_values=True)
    preset, config = dsv4.V4Config.preset("nano"), checkpoint.config
    assert config.expert_dtype == "fp4"
    assert config.parameter_counts() == preset.parameter_counts()
    assert config.compress_ratios == preset.compress_ratios
    assert sum(f.stat().st_size for f in folder.iterdir()) < 40e6
    assert (folder / "MODEL_CARD.md").read_text(encoding="utf-8").startswith("# v4-nano")
    assert nano.name == "v4-nano" and nano.tokenizer is not None


def test_it_says_what_it_is(nano: dsv4.Model) -> None:
    reply = nano.chat([{"role": "user", "content": "Who are you?"}], temperature=0, max_tokens=40)
    assert "v4-nano" in reply["content"]


def test_the_command_measures_what_is_no_task() -> None:
    arguments = "eval v4-nano --n 2 --task draft_acceptance --task bits_per_byte --json"
    report = json.loads(CliRunner().invoke(app, arguments.split()).stdout)
    drafts = report["draft_acceptance"]
    assert report["tasks"] == {} and drafts["drafts"] > 4
    assert drafts["acceptance"] > drafts["chance"]  # it has learned dialogues
    assert all(0 < row["bits"] < row["chance"] + 4 for row in report["bits_per_byte"].values())
    table = CliRunner().invoke(app, [*arguments.split()[:-1]]).stdout
    assert "MTP drafts accepted in dialogue: " in table and "chance" in table


@pytest.mark.slow
@pytest.mark.parametrize("task", ["addition_subtraction", "recall_500", "tool_call"])
def test_it_does_what_its_card_says(nano: dsv4.Model, task: str) -> None:
    """Fewer questions than the card's, other ones, and so a margin below the card's interval."""
    receipt = json.loads((SHIPPED / "v4-nano" / "eval.json").read_text(encoding="utf-8"))
    low, high = receipt["tasks"][task]["interval"]
    result = evaluate(nano, seed=2024, n=20, tasks=[task])["tasks"][task]
    assert low - 0.25 <= result["accuracy"] <= high + 0.25, result


@pytest.mark.slow
def test_transformers_loads_the_folder_and_says_the_same() -> None:
    """The shipped files as they are, dequantised on load: the same float32 logits, and the same
    greedy tokens on twenty prompts, each with up to sixteen tokens of answer."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            SHIPPED / "v4-nano",
            quantization_config=transformers.FineGrainedFP8Config(dequantize=True),
        )
    theirs = theirs.float().eval()
    ours = dsv4.load("v4-nano", numerics="float32")
    assert ours.tokenizer is not None
    ids = ours.tokenizer.encode("The color of the box is green. What is 47 + 85? " * 12)[:300]
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(ours.logits(ids), expected, atol=1e-3, rtol=0)
    tasks = ("addition_subtraction", "units", "letters", "json_extract", "dictionary")
    for number in range(20):
        asked = instance(tasks[number % len(tasks)], 7, number, "off")
        prompt = ours.tokenizer.encode_segments(encode_segments(asked.messages, "chat"))
        said = ours.generate(prompt, dsv4.SamplingParams(temperature=0, max_tokens=16))
        with torch.no_grad():
            longer = theirs.generate(
                torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)),
                do_sample=False, max_new_tokens=16, pad_token_id=1,
            )[0, len(prompt) :].tolist()  # fmt: skip
        end = ours.config.eos_token_id
        assert said == longer[: longer.index(end) if end in longer else None], asked.messages
