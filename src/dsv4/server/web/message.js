// How one message looks, while it comes and afterwards.

import { openCalls, withFiles } from "./conversation.js";
import { announce, copyButton, h, icon, iconButton } from "./dom.js";
import { codeBlock, MarkdownView } from "./markdown.js";

const FINISHES = {
  length: "The answer was cut: it reached the limit of tokens.",
  stopped: "Stopped.",
  insufficient_system_resource: "The server ended this answer early.",
  content_filter: "The server withheld the rest.",
};

// ``page`` is what a message can ask for: retry, edit, select, result; and about, answers.
export class MessageView {
  constructor(page, conversation, message) {
    this.page = page;
    this.conversation = conversation;
    this.message = message;
    this.body = h("div.body");
    this.foot = h("footer");
    this.heading = h("h2.visually-hidden");
    this.element = h(`article.message.${message.role}`, {}, this.heading, this.body, this.foot);
    this.update();
  }

  update() {
    const { message } = this;
    if (this.editing) return;
    if (message.role === "user") this.showUser();
    else this.showAnswer();
    this.showFoot();
  }

  showUser() {
    const { message } = this;
    this.heading.textContent = "You";
    this.body.replaceChildren(
      ...(message.files?.length ? [h("ul.files", { "aria-label": "Files" }, message.files.map(fileChip))] : []),
      ...(message.content ? [h("div.text", {}, message.content)] : []),
    );
  }

  showAnswer() {
    const { message } = this;
    const live = this.page.answers.isLive(message);
    const name = message.answered_by ?? "The model";
    this.heading.textContent = message.edited ? `${name}, edited by you` : name;
    if (!this.prose) this.buildAnswer();
    this.element.classList.toggle("live", live);
    this.element.setAttribute("aria-busy", String(live));

    const thinking = live && !message.content && !message.tool_calls?.length;
    this.reasoning.hidden = !message.reasoning;
    if (message.reasoning) {
      if (!this.touched) this.reasoning.open = thinking;
      if (this.reasoning.open) this.thoughts.update(message.reasoning, !live);
      this.label.textContent = thoughtLabel(message, thinking);
    }
    this.prose.update(message.content, !live);
    this.waiting.hidden = !(thinking && !message.reasoning);
    this.showCalls();
    const note = message.error ?? FINISHES[message.finish] ?? "";
    const empty = message.finish === "stop" && !message.content && !message.tool_calls?.length;
    this.note.textContent = note || (empty ? "The model gave an empty answer." : "");
    this.note.classList.toggle("problem", Boolean(message.error));
    this.note.hidden = !this.note.textContent;
  }

  buildAnswer() {
    const inside = h("div.prose.thoughts");
    this.thoughts = new MarkdownView(inside);
    this.label = h("span");
    const summary = h("summary", {}, this.label, icon("forward"));
    summary.addEventListener("click", () => {
      this.touched = true;
    });
    this.reasoning = h("details.reasoning", {}, summary, inside);
    this.reasoning.addEventListener("toggle", () => {
      if (this.reasoning.open) this.thoughts.update(this.message.reasoning, !this.page.answers.isLive(this.message));
    });
    const prose = h("div.prose");
    this.prose = new MarkdownView(prose);
    this.waiting = h("p.waiting", {}, h("span.dot"), h("span.visually-hidden", {}, "Waiting for the model"));
    this.calls = h("div.calls");
    this.note = h("p.note");
    this.body.replaceChildren(this.reasoning, this.waiting, prose, this.calls, this.note);
    this.shownCalls = "";
  }

  showCalls() {
    const { conversation, message, page } = this;
    const calls = message.tool_calls ?? [];
    const results = new Map(
      conversation.path().filter((m) => m.role === "tool").map((m) => [m.tool_call_id, m.content]),
    );
    const open = message.finish === "tool_calls" ? openCalls(conversation, message) : [];
    const state = JSON.stringify([calls, calls.map((c) => results.get(c.id)), open.length]);
    if (state === this.shownCalls) return;
    this.shownCalls = state;
    this.calls.replaceChildren(
      ...calls.map((call) => {
        const result = results.get(call.id);
        const asking = result === undefined && open.includes(call);
        return h(
          "details.call",
          { open: asking },
          h("summary", {}, icon("tool"), h("span", {}, "Called ", h("code", {}, call.function.name)), h("span.result", {}, result === undefined ? "" : oneLine(result)), icon("forward")),
          h("div.call-body", {}, h("p.part", {}, "Arguments"), codeBlock(pretty(call.function.arguments), "json"), result === undefined ? null : [h("p.part", {}, "Result"), codeBlock(result, looksLikeJson(result) ? "json" : "")], asking ? resultForm(call, (text) => page.result(conversation, message, call, text)) : null),
        );
      }),
    );
  }

  showFoot() {
    const { message, conversation, page } = this;
    const live = page.answers.isLive(message);
    this.foot.hidden = live;
    if (live) return;
    const busy = Boolean(page.answers.of(conversation));
    const user = message.role === "user";
    const actions = [];
    // a call that was answered is a step on the way; what can be done is done at the end of it
    const step = message.tool_calls?.length && conversation.children(message.id).length > 0;
    const text = () => (user ? withFiles(message) : message.content);
    const empty = !text(); // a failure has nothing to copy
    if (!step && !empty) actions.push(copyButton(text, user ? "Copy message" : "Copy answer"));
    if (!user && !step) actions.push(iconButton("retry", "Answer again", () => page.retry(conversation, message), { disabled: busy }));
    if (!step && !empty) actions.push(iconButton("edit", user ? "Edit message" : "Edit answer", () => this.edit(), { disabled: busy }));
    const parts = [
      branches(conversation, message, (m) => page.select(conversation, m)),
      actions.length ? h("div.actions", {}, actions) : null,
      user ? null : facts(message, page.about),
    ];
    this.foot.replaceChildren(...parts.filter(Boolean));
  }

  // Editing never overwrites: what was there stays as another branch.
  edit() {
    const { message, conversation, page } = this;
    const user = message.role === "user";
    const area = h("textarea", { value: message.content, "aria-label": user ? "Your message" : "The answer" });
    const end = () => {
      this.editing = false;
      this.element.classList.remove("editing");
      this.prose = null;
      this.update();
      this.foot.querySelector("button[aria-label^=Edit]")?.focus();
    };
    const done = () => {
      const content = area.value.trim();
      if (!content || content === message.content) return end();
      this.editing = false;
      page.edit(conversation, message, content);
    };
    area.addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        event.stopPropagation();
        end();
      } else if (event.key === "Enter" && (user ? !event.shiftKey : event.ctrlKey || event.metaKey) && !event.isComposing) {
        event.preventDefault();
        done();
      }
    });
    this.editing = true;
    this.element.classList.add("editing");
    this.body.replaceChildren(
      h("div.editor", {}, area, h("div.row", {}, h("small", {}, user ? "What was there is kept as another branch." : "The model’s own words are kept as another branch."), h("button.plain", { type: "button", onclick: end }, "Cancel"), h("button.primary", { type: "button", onclick: done }, user ? "Send" : "Save"))),
    );
    this.foot.replaceChildren();
    area.focus();
    area.setSelectionRange(area.value.length, area.value.length);
  }
}

export function fileChip(file, remove) {
  const tokens = file.tokens === undefined ? "counting…" : file.tokens === null ? "" : `${count(file.tokens)} tokens`;
  return h("li.file", {}, icon("file"), h("span.file-name", {}, file.name), h("span.soft", {}, tokens), typeof remove === "function" ? iconButton("close", `Remove ${file.name}`, remove) : null);
}

function thoughtLabel(message, thinking) {
  if (thinking) return `Thinking… ${seconds(Date.now() - (message.began ?? Date.now()))}`;
  return message.times || message.thought ? `Thought for ${seconds(message.times?.thought ?? message.thought)}` : "Thoughts";
}

function branches(conversation, message, select) {
  const all = conversation.siblings(message);
  if (all.length < 2) return null;
  const at = all.indexOf(message);
  const go = (step) => () => {
    select(all[at + step]);
    announce(`Branch ${at + step + 1} of ${all.length}`);
  };
  return h(
    "div.branches",
    { role: "group", "aria-label": "Branches" },
    iconButton("back", "Previous branch", go(-1), { disabled: at === 0 }),
    h("span", {}, `${at + 1} / ${all.length}`),
    iconButton("forward", "Next branch", go(1), { disabled: at === all.length - 1 }),
  );
}

function resultForm(call, send) {
  const area = h("textarea.mono", { rows: "3", "aria-label": `What ${call.function.name} returns` });
  const submit = (event) => {
    event.preventDefault();
    send(area.value);
  };
  return h("form.result-form", { onsubmit: submit }, h("p.part", {}, "What does it return?"), area, h("button.primary", {}, "Send result"));
}

// ------------------------------------------------------------------- figures of an answer

function facts(message, about) {
  const { usage, times } = message;
  if (!usage) return null;
  const output = Math.max(times.total - times.first, 1);
  const speed = usage.completion > 1 ? ((usage.completion - 1) / output) * 1000 : null;
  const cached = usage.prompt ? Math.round((100 * usage.cached) / usage.prompt) : 0;
  const cost = costOf(message, about);
  const rate = speed === null ? "" : `${speed < 10 ? speed.toFixed(1) : Math.round(speed)} per second`;
  const short = [`${count(usage.completion)} tokens`, rate.replace(" per second", "/s"), `${cached}% cached`, cost && money(cost.total)];
  const rows = [
    ["Answered by", message.answered_by],
    ["Asked as", `${modelName(message.asked, about)}, thinking ${message.effort}`],
    ["Prompt", `${count(usage.prompt)} tokens, ${count(usage.cached)} of them from the cache`],
    ["Answer", `${count(usage.completion)} tokens, ${count(usage.reasoning)} of them thinking`],
    ["First token", `after ${seconds(times.first)}`],
    ["Speed", rate && `${rate}, ${seconds(times.total)} in all`],
    ["Cost", cost && `${money(cost.total)} at the price of ${message.asked}`],
  ];
  const figures = h(
    "details.figures",
    {},
    h("summary", {}, short.filter(Boolean).join(" · ")),
    h("dl.facts-list", {}, rows.filter(([, value]) => value).map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)])),
  );
  figures.addEventListener("toggle", () => {
    if (figures.open) figures.scrollIntoView({ block: "nearest" });
  });
  return figures;
}

function costOf({ usage, asked, cost }, about) {
  if (cost !== undefined) return { total: cost };
  const price = about.prices?.[asked];
  if (!price) return null;
  const miss = usage.prompt - usage.cached;
  return { total: (usage.cached * price.hit + miss * price.miss + usage.completion * price.output) / 1e6 };
}

function modelName(model, about) {
  return about.choices.find((c) => c.model === model)?.name ?? model;
}

export function count(n) {
  return n.toLocaleString("en");
}

export function money(dollars) {
  if (dollars === 0) return "$0";
  return dollars >= 0.01 ? `$${dollars.toFixed(2)}` : `$${Number(dollars.toPrecision(2)).toFixed(Math.max(4, 1 - Math.floor(Math.log10(dollars))))}`;
}

export function seconds(ms) {
  if (ms < 10_000) return `${(ms / 1000).toFixed(1)} s`;
  const whole = Math.round(ms / 1000);
  return whole < 60 ? `${whole} s` : `${Math.floor(whole / 60)} min ${whole % 60} s`;
}

const oneLine = (text) => (text.length > 60 ? `${text.slice(0, 59)}…` : text).replace(/\s+/g, " ");

function looksLikeJson(text) {
  try {
    return typeof JSON.parse(text) === "object";
  } catch {
    return false;
  }
}

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}
