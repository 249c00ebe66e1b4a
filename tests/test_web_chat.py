"""The web chat in a real browser: what a person sees, does and finds again."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from agents import call
from browser import Chat, Tab, browser, chat, context, eventually, running_chat, says, tab
from live_server import Server
from playwright.sync_api import Browser, BrowserContext, Page, Route
from scripted_models import one_torch_thread

from dsv4.api import load
from dsv4.encoding import TASKS
from dsv4.server import LocalBackend

__all__ = ["browser", "chat", "context", "one_torch_thread", "running_chat", "tab"]  # fixtures

pytestmark = pytest.mark.slow
TOUR = """# A tour

Some *words*, `code`, and a price of $5 to $10.

```python
def area(r):  # of a circle
    return 3.14 * r**2
```

The area is $\\pi r^2$, and

$$\\vec{x} = \\sum_{i=1}^{n} \\frac{1}{i}$$

| a | b |
|--:|:-:|
| 1 | 2 |

1. one
   - inside

2. two

- [x] done
- [ ] to do

> said

The end: [here][1].

[1]: https://example.com/there
"""


def test_an_answer_is_shown_as_markdown_with_its_figures(tab: Tab) -> None:
    tab.chat.model.script = f"I weigh **it**.</think>{TOUR}"
    page = tab.open().page
    tab.send("Show me")
    tab.finished()
    answer = page.locator("article.assistant")
    prose = answer.locator(".body > .prose")
    assert prose.locator("h3").inner_text() == "A tour"
    assert prose.locator("pre .hljs-keyword").all_inner_texts() == ["def", "return"]
    page.locator(".math.display .katex").wait_for()
    assert prose.locator(".katex").count() == 2 and "$5 to $10" in prose.inner_text()
    assert prose.locator(".math.display svg").bounding_box()["width"] > 3  # type: ignore[index]
    assert prose.locator("td").all_inner_texts() == ["1", "2"]
    assert prose.locator("ol > li").count() == 2 and prose.locator("ol ul li").count() == 1
    assert prose.locator("li.task").all_inner_texts() == ["☑ done", "☐ to do"]
    reasoning = answer.locator("details.reasoning")
    assert reasoning.locator("summary").inner_text().startswith("Thought for ")
    assert not reasoning.locator(".thoughts").is_visible()
    reasoning.locator("summary").click()
    assert reasoning.locator(".thoughts strong").inner_text() == "it"
    summary = answer.locator(".figures summary")
    for part in ("tokens", "/s", "% cached", "$0.00"):
        assert part in summary.inner_text()
    summary.click()
    rows = answer.locator(".figures dl").inner_text()
    assert "v4-scripted" in rows and "Instant, thinking high" in rows and "First token" in rows
    assert "at the price of deepseek-v4-flash" in rows


def test_who_answers_is_said_before_and_after(tab: Tab) -> None:
    page = tab.open().page
    for choice in ("Instant", "Expert"):
        page.get_by_role("radio", name=choice).check()
        note = page.locator("#who").inner_text()
        assert "v4-scripted answers here" in note and "neither DeepSeek-V4-Flash nor" in note
    assert "not DeepSeek-V4-Flash" in page.locator("#welcome").inner_text()
    tab.send("Hello")
    tab.finished()
    assert page.locator("article.assistant h2").inner_text() == "v4-scripted"
    page.locator(".figures summary").click()
    assert "Expert, thinking high" in page.locator(".figures dl").inner_text()


def test_effort_is_what_the_model_is_told(tab: Tab) -> None:
    prompts: list[str] = []

    def script(prompt: str) -> str:
        prompts.append(prompt)
        return "Yes</think>Yes" if prompt.endswith("<think>") else "No"

    tab.chat.model.script = script
    page = tab.open().page
    for effort in ("off", "high", "max"):
        page.select_option("#effort", effort)
        tab.send(f"With {effort}")
        tab.finished()
    assert tab.answers() == ["No", "Yes", "Yes"]
    assert page.locator("details.reasoning:visible").count() == 2
    asked = {p: "Absolute maximum" in p for p in prompts}
    assert any(asked.values()) and all("With max" in p for p, most in asked.items() if most)
    assert "384K" in page.locator("#who").inner_text()
    page.reload()
    page.locator("article").first.wait_for()
    assert page.input_value("#effort") == "max"


def test_stop_keeps_what_came_and_ends_the_work(tab: Tab) -> None:
    tab.chat.model.script = "word " * 2000
    tab.chat.model.pause = 0.01
    page = tab.open().page
    page.select_option("#effort", "off")
    tab.send("Go on")
    page.locator("article.live .prose p").wait_for()
    assert tab.chat.running() == 1
    page.keyboard.press("Escape")
    tab.finished()
    assert page.locator("article.assistant .note").inner_text() == "Stopped."
    assert tab.answers()[0].startswith("word")
    eventually(lambda: tab.chat.running() == 0)
    page.reload()
    page.locator("article.assistant .note:visible").wait_for()
    assert tab.answers()[0].startswith("word")


def test_answering_again_and_editing_make_branches_that_stay(tab: Tab) -> None:
    page = tab.open().page
    page.select_option("#effort", "off")

    def script(prompt: str) -> str:
        return "To tea" if "tea" in prompt else f"To coffee, {'again' if again else 'first'}"

    again = False
    tab.chat.model.script = script
    tab.send("Coffee?")
    tab.finished()
    again = True
    page.get_by_role("button", name="Answer again").click()
    eventually(lambda: tab.answers() == ["To coffee, again"])
    tab.finished()
    user = page.locator("article.user")
    user.hover()
    user.get_by_role("button", name="Edit message").click()
    page.get_by_role("textbox", name="Your message").fill("Or tea?")
    page.keyboard.press("Enter")
    eventually(lambda: tab.answers() == ["To tea"])
    tab.finished()
    tab.send("More")  # goes on in this branch
    tab.finished()

    def walk() -> list[list[str]]:
        seen = []
        page.get_by_role("button", name="Previous branch").first.click()
        seen.append([*tab.said(), *tab.answers()])
        page.get_by_role("button", name="Previous branch").last.click()
        seen.append([*tab.said(), *tab.answers()])
        page.get_by_role("button", name="Next branch").first.click()
        seen.append([*tab.said(), *tab.answers()])
        return seen

    expected = [
        ["Coffee?", "To coffee, again"],
        ["Coffee?", "To coffee, first"],
        ["Or tea?", "More", "To tea", "To tea"],
    ]
    assert walk() == expected
    tab.settled()
    page.reload()
    page.locator("article").first.wait_for()
    assert tab.said() == ["Or tea?", "More"]
    page.get_by_role("button", name="Previous branch").first.click()
    assert [*tab.said(), *tab.answers()] in expected[:2]


def test_an_answer_can_be_edited_and_the_model_reads_the_edit(tab: Tab) -> None:
    prompts: list[str] = []
    tab.chat.model.script = lambda prompt: prompts.append(prompt) or "The sky is green."
    page = tab.open().page
    page.select_option("#effort", "off")
    tab.send("The sky?")
    tab.finished()
    page.get_by_role("button", name="Edit answer").click()
    page.get_by_role("textbox", name="The answer").fill("The sky is blue.")
    page.get_by_role("button", name="Save").click()
    assert tab.answers() == ["The sky is blue."]
    assert page.locator(".branches span").inner_text() == "2 / 2"
    tab.send("Sure?")
    tab.finished()
    assert "The sky is blue." in prompts[-1] and "green" not in prompts[-1]


def test_conversations_are_found_renamed_exported_and_deleted(tab: Tab, tmp_path: Path) -> None:
    said = {"role": "assistant", "content": "Boil the *pasta*.", "answered_by": "v4-scripted"}
    tab.chat.stored("Cooking", {"role": "user", "content": "Dinner?"}, said)
    tab.chat.stored("Weather", {"role": "user", "content": "Rain?"})
    page = tab.open().page
    page.keyboard.press("Control+k")
    page.keyboard.type("PASTA")
    eventually(lambda: page.locator("#conversations mark").all_inner_texts() == ["pasta"])
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.locator("article").first.wait_for()
    assert page.locator("#title").inner_text() == "Cooking"

    def more(action: str) -> None:
        page.locator("#conversations li").first.hover()
        page.get_by_role("button", name="More for").first.click()
        page.get_by_role("menuitem", name=action).click()

    with page.expect_download() as download:
        more("Export as Markdown")
    download.value.save_as(tmp_path / "one.md")
    assert (tmp_path / "one.md").read_text() == (
        "# Cooking\n\n## You\n\nDinner?\n\n## v4-scripted\n\nBoil the *pasta*.\n"
    )
    assert download.value.suggested_filename == "Cooking.md"
    with page.expect_download() as download:
        more("Export as JSON")
    download.value.save_as(tmp_path / "one.json")
    exported = json.loads((tmp_path / "one.json").read_text())
    assert [m["content"] for m in exported["messages"]] == ["Dinner?", "Boil the *pasta*."]

    more("Rename")
    page.get_by_label("Title").fill("Pasta tonight")
    page.keyboard.press("Enter")
    eventually(lambda: page.locator("#title").inner_text() == "Pasta tonight")
    more("Delete")
    page.get_by_role("button", name="Delete", exact=True).click()
    eventually(lambda: "Nothing found" in page.locator("#conversations").inner_text())
    page.fill("#search", "")
    eventually(lambda: "Weather" in page.locator("#conversations").inner_text())
    assert "Pasta" not in page.locator("#conversations").inner_text()
    page.get_by_role("button", name="Settings").click()
    with page.expect_download() as download:
        page.get_by_role("button", name="Export all conversations").click()
    download.value.save_as(tmp_path / "all.json")
    titles = {c["title"] for c in json.loads((tmp_path / "all.json").read_text())["conversations"]}
    assert "Weather" in titles and "Pasta tonight" not in titles


def test_an_open_menu_outlives_news_of_the_list(tab: Tab) -> None:
    tab.chat.stored("Old name", {"role": "user", "content": "Hello"})
    page = tab.open().page
    page.locator("#conversations li").first.hover()
    page.get_by_role("button", name="More for Old name").first.click()
    tab.chat.stored("Newer", {"role": "user", "content": "Hello"})
    with page.expect_response("**/web/conversations?**"):
        page.evaluate("document.getElementById('search').dispatchEvent(new Event('input'))")
    page.evaluate("new Promise((done) => setTimeout(done, 50))")
    page.get_by_role("menuitem", name="Rename").click(timeout=10_000)
    page.get_by_label("Title").fill("New name")
    page.keyboard.press("Enter")
    titles = page.locator("#conversations .title")
    eventually(lambda: {"Newer", "New name"} <= set(titles.all_inner_texts()))


DROP = """([name, text]) => {
  const files = new DataTransfer();
  files.items.add(new File([text], name));
  for (const kind of ["dragenter", "dragover", "drop"]) {
    document.body.dispatchEvent(new DragEvent(kind, { dataTransfer: files, bubbles: true, cancelable: true }));
  }
}"""  # noqa: E501


def test_dropped_text_files_are_counted_and_read_by_the_model(tab: Tab) -> None:
    prompts: list[str] = []
    tab.chat.model.script = lambda prompt: prompts.append(prompt) or "Read."
    text = "Paris has 3 days of weather.\n"
    page = tab.open().page
    page.evaluate(DROP, ["notes.txt", text])
    tokens = len(tab.chat.model.tokenizer.encode(text))
    eventually(lambda: f"{tokens} tokens" in page.locator("#attached").inner_text())
    page.evaluate(DROP, ["photo.png", "\0\1\2"])
    page.locator("#toast", has_text="photo.png is not a text file").wait_for()
    page.evaluate(DROP, ["long.txt", "word " * 5000])
    page.locator("#too-long", has_text="reads at most 4,096").wait_for()
    page.get_by_role("button", name="Remove long.txt").click()
    page.locator("#too-long").wait_for(state="hidden")
    tab.send("What does it say?")
    tab.finished()
    assert page.locator("article.user .file").inner_text().startswith("notes.txt")
    shown = f"[file name]: notes.txt\n[file content begin]\n{text}\n[file content end]\n"
    assert shown + "What does it say?" in prompts[-1]
    page.reload()
    page.locator("article.user .file").wait_for()


def test_the_calculator_is_called_computed_and_read(tab: Tab) -> None:
    def script(prompt: str) -> str:
        assert '"strict": true' in prompt, "so that the model can call nothing else"
        if "7006652" in prompt:
            return "It is 7006652."
        return call("calculator", {"expression": "1234 * 5678"})

    tab.chat.model.script = script
    page = tab.open().page
    page.select_option("#effort", "off")
    page.get_by_role("button", name="Instructions and tools").click()
    page.get_by_role("checkbox", name="Calculator").check()
    page.get_by_role("button", name="Done").click()
    tab.send("What is 1234 * 5678?")
    eventually(lambda: "It is 7006652." in tab.answers())
    tab.finished()
    summary = page.locator("details.call summary")
    assert summary.inner_text().split() == ["Called", "calculator", "7006652"]
    summary.click()
    assert '"expression": "1234 * 5678"' in page.locator("details.call pre").first.inner_text()


def test_a_declared_function_is_answered_by_hand(tab: Tab) -> None:
    tab.chat.model.script = lambda prompt: (
        "Take an umbrella." if "rain" in prompt else call("get_weather", {"city": "Paris"})
    )
    page = tab.open().page
    page.select_option("#effort", "off")
    page.get_by_role("button", name="Instructions and tools").click()
    functions = page.get_by_label("Other functions")
    functions.fill("{")
    page.get_by_role("button", name="Done").click()
    page.locator("#tools-problem", has_text="This is not JSON").wait_for()
    functions.fill('[{"name": "get_weather", "parameters": {"type": "object"}}]')
    page.get_by_role("button", name="Done").click()
    tab.send("Paris?")
    form = page.locator(".result-form")
    form.locator("textarea").fill("rain")
    form.get_by_role("button", name="Send result").click()
    eventually(lambda: "Take an umbrella." in tab.answers())
    tab.finished()
    page.reload()
    page.locator("details.call").wait_for()
    assert "rain" in page.locator("details.call summary").inner_text()


def test_what_a_dialog_was_told_holds_for_the_very_next_key(tab: Tab) -> None:
    tab.chat.model.script = lambda prompt: "A" if "terse" in prompt else "At length"
    page = tab.open().page
    page.select_option("#effort", "off")
    page.get_by_role("button", name="Instructions and tools").click()
    page.locator("dialog textarea").first.fill("Be terse.")
    page.evaluate(  # before the browser has told anyone that the dialog closed
        """async () => {
            document.querySelector("dialog button.primary").click();
            for (let i = 0; i < 10; i += 1) await null;
            const draft = document.querySelector("#draft");
            draft.value = "Hello";
            draft.dispatchEvent(new KeyboardEvent("keydown", { key: "Enter" }));
        }"""
    )
    tab.finished()
    assert tab.answers() == ["A"]


def test_a_failed_answer_says_why_and_can_be_asked_again(tab: Tab) -> None:
    page = tab.open().page
    tab.send("word " * 6000)
    note = page.locator("article.assistant .note.problem")
    note.wait_for()
    assert "maximum context length is 4096 tokens" in note.inner_text()
    tab.complaints.clear()  # the browser reports the 400
    page.locator("article.user").hover()
    page.get_by_role("button", name="Edit message").click()
    page.get_by_role("textbox", name="Your message").fill("Hello")
    page.keyboard.press("Enter")
    eventually(lambda: tab.answers() == ["Hello, you."])


def test_another_conversation_can_be_read_while_one_is_answered(tab: Tab) -> None:
    other = tab.chat.stored("Other", {"role": "user", "content": "Else"})
    tab.chat.model.script = "word " * 60 + "end"
    tab.chat.model.pause = 0.01
    page = tab.open().page
    page.select_option("#effort", "off")
    tab.send("Go on")
    page.locator("article.live .prose p").wait_for()
    answering = page.url.partition("#")[2]
    page.fill("#draft", "half a thought")
    page.locator(f'#conversations a[href="#{other}"]').click()
    eventually(lambda: tab.said() == ["Else"])
    assert page.input_value("#draft") == ""
    page.locator(f'#conversations a[href="#{answering}"]').click()
    eventually(lambda: tab.said() == ["Go on"])
    assert page.input_value("#draft") == "half a thought"
    eventually(lambda: tab.answers()[0].endswith("end"))


def test_the_last_conversation_that_was_chosen_is_shown(tab: Tab) -> None:
    slow = tab.chat.stored("Slow", {"role": "user", "content": "First"})
    other = tab.chat.stored("Other", {"role": "user", "content": "Second"})
    page = tab.open().page
    held: list[Route] = []
    page.route(f"**/web/conversations/{slow}", lambda route: held.append(route))  # its answer waits
    page.locator(f'#conversations a[href="#{slow}"]').click()
    eventually(lambda: page.evaluate("true") and bool(held))
    page.locator(f'#conversations a[href="#{other}"]').click()
    eventually(lambda: tab.said() == ["Second"])
    with page.expect_response(f"**/web/conversations/{slow}"):
        held[0].continue_()
    page.evaluate("new Promise((done) => setTimeout(done))")
    assert tab.said() == ["Second"] and page.url.endswith(other)


def test_a_server_with_a_key_asks_for_it(browser: Browser, chat: Chat) -> None:
    with Chat(api_key="right") as guarded, browser.new_context() as context:
        guarded.model.script = says("Open.")
        tab = Tab(context.new_page(), guarded).open()
        page = tab.page
        field = page.get_by_label("Key", exact=True)
        field.fill("wrong")
        page.keyboard.press("Enter")
        page.get_by_role("heading", name="This key was refused").wait_for()
        field.fill("right")
        page.get_by_label("Keep it on this device").check()
        page.keyboard.press("Enter")
        page.locator("dialog").wait_for(state="detached")
        tab.send("Hello")
        eventually(lambda: tab.answers() == ["Open."])
        tab.finished()
        again = Tab(context.new_page(), guarded).open()
        again.page.locator("#conversations li").wait_for()
        assert again.page.locator("dialog").count() == 0


def test_v4_nano_itself_answers_and_is_named(context: BrowserContext) -> None:
    """Nothing scripted: the model of the package, from its weights to the page."""
    with Server(LocalBackend(load("v4-nano"))) as server:
        tab = Tab(context.new_page(), server).open()
        page = tab.page
        assert page.locator("#welcome h2").inner_text() == "Ask v4-nano"
        page.get_by_role("button", name="What is 47 + 38?").click()
        tab.finished()
        assert page.locator("article.assistant h2").inner_text() == "v4-nano"
        assert re.fullmatch(r"47 \+ 38 = \d+\.", tab.answers()[0].strip())
        page.locator("details.reasoning summary").click()
        assert page.locator(".thoughts").inner_text()
        assert not tab.complaints and not tab.strangers()


STREAMED = """async ([text, cuts]) => {
  const { MarkdownView } = await import("/web/markdown.js");
  const show = (element, pieces) => {
    const view = new MarkdownView(element);
    let so_far = "";
    for (const piece of pieces) view.update((so_far += piece));
    view.update(so_far, true);
    return element.innerHTML;
  };
  await new Promise((done) => setTimeout(done, 50));
  const whole = show(document.createElement("div"), [text]);
  const wrong = [];
  for (const size of cuts) {
    const pieces = text.match(new RegExp(`[^]{1,${size}}`, "g"));
    const html = show(document.createElement("div"), pieces);
    const bare = (h) => h.replace(/<span class="katex[^]*?<\\/math>[^]*?(?=<\\/p>|,)/g, "");
    if (bare(html) !== bare(whole)) wrong.push(size);
  }
  return [whole.length, wrong];
}"""


def test_a_text_looks_the_same_however_it_was_cut(tab: Tab) -> None:
    length, wrong = tab.open().page.evaluate(STREAMED, [TOUR.replace("$", ""), [1, 2, 3, 7, 50]])
    assert length > 500 and wrong == []


def test_the_calculator_computes_exactly_and_runs_nothing(tab: Tab) -> None:
    cases = {
        "1234 * 5678": "7006652",
        "2 + 3 * -4": "-10",
        "(2 + 3) * 4": "20",
        "-2 ^ 2": "-4",
        "2 ** 3 ** 2": "512",
        "7 / 2": "3.5",
        "0.1 + 0.2": "0.3",
        "1,000 × 1,000": "1000000",
        "99999999999999999999 + 1": "100000000000000000000",
        "1 / 0": "error: division by zero",
        "9 ^ 9 ^ 9": "error: the result is too large",
        "alert(1)": "error: cannot compute “a”",
        "2 3": "error: did not expect “3”",
        "(1": "error: a bracket is missing",
        "": "error: the expression ends too early",
    }
    results = tab.open().page.evaluate(
        """async (expressions) => {
          const { computedResult } = await import("/web/tools.js");
          const call = (e) => ({ function: { name: "calculator", arguments: JSON.stringify({ expression: e }) } });
          return expressions.map((e) => computedResult(call(e), { calculator: true }));
        }""",  # noqa: E501
        list(cases),
    )
    assert dict(zip(cases, results, strict=True)) == cases


def test_a_model_that_knows_titles_gives_one(context: BrowserContext) -> None:
    """Asked with the title task's token after the first answer, as its training had it."""
    with Chat(titles=True) as chat:
        chat.model.script = lambda prompt: (
            '"Weather in  Paris"' if TASKS["title"] in prompt else "It rains."
        )
        tab = Tab(context.new_page(), chat).open()
        page = tab.page
        page.select_option("#effort", "off")
        tab.send("How is the weather in Paris today?")
        eventually(lambda: page.locator("#title").inner_text() == "Weather in Paris")
        eventually(lambda: "Weather in Paris" in page.locator("#conversations").inner_text())
        tab.finished()


def long_answer(tab: Tab) -> Page:
    """A page on which an answer of many lines has begun to grow, and is scrolled along with it."""
    tab.chat.model.script = "line\n\n" * 200
    tab.chat.model.pause = 0.002
    page = tab.open().page
    page.select_option("#effort", "off")
    tab.send("Go on")
    eventually(lambda: page.evaluate("document.getElementById('scroller').scrollTop") > 100)
    return page


def test_who_turns_the_wheel_is_not_taken_back_to_the_end(tab: Tab) -> None:
    page = long_answer(tab)
    scroller = "document.getElementById('scroller')"
    # the page hears of the wheel before anything has moved; the text grows on
    turn = f"{scroller}.dispatchEvent(new WheelEvent('wheel', {{ deltaY: -100 }}))"
    at = page.evaluate(f"{turn}, {scroller}.scrollTop")
    tab.finished()
    assert page.evaluate(f"{scroller}.scrollTop") == at


def test_the_thread_follows_the_answer_unless_one_reads_above(tab: Tab) -> None:
    page = long_answer(tab)
    below = "(() => { const s = document.getElementById('scroller');"
    below += " return s.scrollHeight - s.scrollTop - s.clientHeight; })()"
    scrolled = "document.getElementById('scroller').scrollTop"
    eventually(lambda: page.evaluate(below) < 80)
    page.mouse.move(700, 300)
    page.mouse.wheel(0, -100_000)
    page.locator("#to-end").wait_for()
    eventually(lambda: page.evaluate(scrolled) == 0)
    tab.finished()
    assert page.evaluate(scrolled) == 0
    page.locator("#to-end").click()
    eventually(lambda: page.evaluate(below) < 80)
