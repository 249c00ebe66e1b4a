// The page: which conversation is shown, and what happens when something is clicked.

import { ask, download, Failure, hasKey, onKeyNeeded, setKey } from "./api.js";
import { Answers } from "./answers.js";
import { Composer } from "./composer.js";
import { Conversation } from "./conversation.js";
import { askKey, askSetup, askTitle, confirmDelete, openSettings } from "./dialogs.js";
import { announce, h, icon } from "./dom.js";
import { asJson, asMarkdown, fileName, save } from "./export.js";
import { MessageView } from "./message.js";
import { Sidebar } from "./sidebar.js";
import { parseTools } from "./tools.js";

const PLACE = "/web/conversations";
const SETTINGS = "dsv4.settings"; // the last choices, for the next conversation
const NEAR = 80; // pixels from the end that count as being at the end
const byId = (id) => document.getElementById(id);
const narrow = matchMedia("(max-width: 800px)");

class Page {
  constructor(about) {
    this.about = about;
    this.open_ = new Map(); // id -> Conversation, for those that were looked at
    this.views = new Map(); // message id -> MessageView, of the shown conversation
    this.drafts = new Map(); // id -> what was begun to write
    this.turn = 0; // of showing another conversation
    this.writes = 0; // that have not been answered
    this.saves = new Map(); // conversation id -> the last write, so that writes keep their order
    this.stick = true; // stay at the end while text comes
    this.answers = new Answers({
      changed: (conversation, message) => this.onAnswer(conversation, message),
      save: (conversation, message) => this.saveMessage(conversation, message),
    });
    this.sidebar = new Sidebar(this);
    this.composer = new Composer(
      {
        send: (text, files) => this.send(text, files),
        stop: () => this.answers.stop(this.conversation),
        setup: () => this.setup(),
        changed: (settings) => this.settle(settings),
        editLast: () => this.editLast(),
      },
      about,
    );
    this.listen();
  }

  listen() {
    for (const id of ["new", "new-top"]) byId(id).addEventListener("click", () => this.startNew());
    byId("menu").addEventListener("click", () => this.toggleSidebar());
    byId("shade").addEventListener("click", () => this.toggleSidebar(false));
    byId("settings").addEventListener("click", () => this.settings());
    byId("to-end").addEventListener("click", () => this.toEnd(true));
    const scroller = byId("scroller");
    let top = 0;
    scroller.addEventListener("scroll", () => {
      const now = scroller.scrollTop;
      // toEnd's own moves say nothing of the reader, and the text may have grown since
      if (now !== this.end) {
        if (scroller.scrollHeight - now - scroller.clientHeight < NEAR) this.stick = true;
        else if (now < top) this.stick = false;
      }
      top = now;
      byId("to-end").hidden = this.stick;
    });
    // Not passive: the browser asks before it moves, so that no move to the end comes after that and
    // undoes it.
    scroller.addEventListener("wheel", (event) => {
      if (event.deltaY < 0 && scroller.scrollTop > 0) this.stick = false;
    }, { passive: false });
    addEventListener("hashchange", () => this.fromAddress());
    addEventListener("keydown", (event) => this.onKey(event));
    narrow.addEventListener("change", () => this.toggleSidebar(!narrow.matches, false));
    // thinking is timed on the page, also while no token comes
    setInterval(() => {
      const live = this.answers.of(this.conversation);
      if (live) this.views.get(live.message.id)?.update();
    }, 200);
  }

  onKey(event) {
    const command = event.ctrlKey || event.metaKey;
    if (document.querySelector("dialog[open]")) return;
    if (command && event.key.toLowerCase() === "k") {
      event.preventDefault();
      this.toggleSidebar(true);
      byId("search").focus();
      byId("search").select();
    } else if (command && event.shiftKey && event.key.toLowerCase() === "o") {
      event.preventDefault();
      this.startNew();
    } else if (event.key === "Escape") {
      if (narrow.matches && byId("app").classList.contains("with-sidebar")) this.toggleSidebar(false);
      else if (this.answers.of(this.conversation)) this.answers.stop(this.conversation);
    }
  }

  // ----------------------------------------------------------------- which conversation

  startNew() {
    this.show(new Conversation({ settings: this.lastSettings() }));
    if (location.hash) history.pushState(null, "", location.pathname);
    if (narrow.matches) this.toggleSidebar(false);
    else byId("draft").focus();
  }

  async fromAddress() {
    const id = location.hash.slice(1);
    if (id && id !== this.conversation?.id) await this.open(id);
    else if (!id && this.conversation?.messages.size) this.startNew();
  }

  async open(id) {
    const turn = (this.turn += 1);
    let conversation;
    try {
      conversation = await this.fetch(id);
    } catch (error) {
      this.failed(error);
      if (!this.conversation) this.startNew();
      return;
    }
    if (turn !== this.turn) return; // something else has been asked for meanwhile
    this.show(conversation);
    if (location.hash.slice(1) !== id) history.pushState(null, "", `#${id}`);
    if (narrow.matches) this.toggleSidebar(false);
    else byId("draft").focus();
  }

  async fetch(id) {
    // what is being answered here is newer than what is stored
    if (this.answers.running.has(id)) return this.open_.get(id);
    const conversation = new Conversation(await ask(`${PLACE}/${encodeURIComponent(id)}`));
    conversation.settings = this.valid(conversation.settings);
    this.open_.set(id, conversation);
    return conversation;
  }

  lastSettings() {
    let last = {};
    try {
      last = JSON.parse(localStorage.getItem(SETTINGS) ?? "{}");
    } catch {
      // not ours; begin afresh
    }
    return this.valid({ model: last.model, effort: last.effort });
  }

  valid(settings) {
    const known = this.about.choices.some((c) => c.model === settings.model);
    return {
      ...settings,
      model: known ? settings.model : this.about.choices[0].model,
      effort: ["off", "high", "max"].includes(settings.effort) ? settings.effort : "high",
    };
  }

  show(conversation) {
    this.turn += 1;
    if (this.conversation) this.drafts.set(this.conversation.id, this.composer.draft);
    this.conversation = conversation;
    this.views.clear();
    this.stick = true;
    this.composer.show(conversation.settings);
    this.composer.draft = this.drafts.get(conversation.id) ?? {};
    this.render();
    this.sidebar.select(conversation.id);
    this.toEnd();
  }

  // ------------------------------------------------------------------------------ showing

  render() {
    const { conversation } = this;
    const path = conversation.path().filter((m) => m.role !== "tool"); // results are shown at their call
    const thread = byId("thread");
    for (const message of path) {
      if (!this.views.has(message.id)) this.views.set(message.id, new MessageView(this, conversation, message));
      else this.views.get(message.id).update();
    }
    const wanted = path.map((m) => this.views.get(m.id).element);
    wanted.forEach((element, i) => {
      if (thread.children[i] !== element) thread.insertBefore(element, thread.children[i] ?? null);
    });
    while (thread.children.length > wanted.length) thread.lastChild.remove();
    byId("app").classList.toggle("empty", path.length === 0);
    byId("welcome").hidden = path.length > 0;
    const title = conversation.title || "New conversation";
    byId("title").textContent = title;
    document.title = `${title} · dsv4`;
    this.composer.busy = Boolean(this.answers.of(conversation));
    if (this.stick) this.toEnd();
  }

  toEnd(smooth = false) {
    this.stick = true;
    byId("to-end").hidden = true;
    const scroller = byId("scroller");
    scroller.scrollTo({ top: scroller.scrollHeight, behavior: smooth ? "smooth" : "instant" });
    this.end = scroller.scrollTop;
  }

  // Something of an answer changed; shown with the next frame, however many tokens came until then.
  onAnswer(conversation, message) {
    if (conversation !== this.conversation) return;
    const live = this.answers.isLive(message);
    if (!this.views.has(message.id) || !live) {
      this.render();
      if (message.role === "assistant") announce(live ? "The model is answering" : spoken(message));
      return;
    }
    if (this.frame) return;
    this.frame = requestAnimationFrame(() => {
      this.frame = null;
      this.views.get(message.id)?.update();
      if (this.stick) this.toEnd();
    });
  }

  toggleSidebar(shown = !byId("app").classList.contains("with-sidebar"), focus = true) {
    const before = byId("app").classList.contains("with-sidebar");
    byId("app").classList.toggle("with-sidebar", shown);
    byId("sidebar").inert = !shown;
    byId("menu").setAttribute("aria-expanded", String(shown));
    byId("main").inert = shown && narrow.matches;
    if (focus && narrow.matches && shown !== before) byId(shown ? "search" : "menu").focus();
  }

  // ------------------------------------------------------------------------------- acting

  async send(text, files) {
    const { conversation } = this;
    const message = conversation.add({ role: "user", content: text, ...(files.length ? { files } : {}) });
    conversation.title ||= firstWords(text || files[0].name);
    this.open_.set(conversation.id, conversation);
    this.stick = true;
    this.render();
    if (location.hash.slice(1) !== conversation.id) history.pushState(null, "", `#${conversation.id}`);
    this.saveMessage(conversation, message);
    await this.answer(conversation, message.id);
  }

  async answer(conversation, last) {
    const fresh = conversation.path().length === 1;
    const waiting = this.answers.ask(conversation, last);
    this.sidebar.current = conversation.id;
    this.saved(conversation).then(() => this.sidebar.load().catch(() => {}));
    await waiting;
    await this.saved(conversation);
    if (fresh && this.about.titles) await this.nameIt(conversation);
    this.sidebar.load().catch(() => {});
  }

  // A title from the model's own title task, where the checkpoint knows it.
  async nameIt(conversation) {
    try {
      const { title } = await ask(`${PLACE}/${conversation.id}/title`, { method: "POST", body: {} });
      if (title) conversation.title = title;
      if (conversation === this.conversation) this.render();
    } catch {
      // the first words stay
    }
  }

  retry(conversation, message) {
    if (this.answers.of(conversation)) return;
    this.stick = true;
    this.answer(conversation, message.parent);
  }

  edit(conversation, message, content) {
    const { role, files, parent } = message;
    if (role === "user") {
      const made = conversation.add({ role, content, ...(files ? { files } : {}) }, parent);
      this.render();
      this.saveMessage(conversation, made);
      this.answer(conversation, made.id);
    } else {
      const made = conversation.add(
        { role, content, reasoning: message.reasoning, answered_by: message.answered_by, finish: "stop", edited: true },
        parent,
      );
      this.render();
      this.saveMessage(conversation, made);
    }
    byId("draft").focus();
  }

  editLast() {
    const last = this.conversation.path().filter((m) => m.role === "user").pop();
    if (!last) return false;
    this.views.get(last.id).edit();
    return true;
  }

  select(conversation, message) {
    conversation.select(message);
    this.stick = false;
    this.render();
    this.views.get(message.id)?.element.scrollIntoView({ block: "nearest" });
    this.saveMeta(conversation);
  }

  // The person typed what a function returned.
  async result(conversation, message, call, content) {
    const results = conversation.path().filter((m) => m.role === "tool");
    const last = results[results.length - 1]?.parent === message.id ? results[results.length - 1] : message;
    const made = conversation.add({ role: "tool", tool_call_id: call.id, content }, last.id);
    this.saveMessage(conversation, made);
    this.render();
    if (this.answers.allAnswered(conversation, message)) await this.answer(conversation, made.id);
  }

  settle(settings) {
    const { conversation } = this;
    Object.assign(conversation.settings, settings);
    localStorage.setItem(SETTINGS, JSON.stringify({ model: conversation.settings.model, effort: conversation.settings.effort }));
    if (conversation.saved) this.saveMeta(conversation);
  }

  async setup() {
    const { conversation } = this;
    const settings = await askSetup(conversation.settings, parseTools);
    if (!settings) return;
    Object.assign(conversation.settings, settings);
    this.composer.show(conversation.settings);
    if (conversation.saved) this.saveMeta(conversation);
  }

  async settings() {
    await openSettings({
      about: this.about,
      hasKey: hasKey(),
      changeKey: () => enterKey(false),
      exportAll: async () => {
        try {
          save(await download(`${PLACE}/export`), "conversations.json");
        } catch (error) {
          this.failed(error);
        }
      },
    });
  }

  // ------------------------------------------------------------------------------- keeping

  saveMessage(conversation, message) {
    conversation.saved = true;
    const { id, parent, role, created, content, ...rest } = message;
    const body = { parent, role, content, details: rest, head: conversation.head, title: conversation.title, settings: conversation.settings };
    return this.write(conversation, `${PLACE}/${conversation.id}/messages/${id}`, body);
  }

  saveMeta(conversation) {
    const { title, settings, head } = conversation;
    return this.write(conversation, `${PLACE}/${conversation.id}`, { title, settings, head });
  }

  // One write after the other, each with what was true when it was asked for.
  write(conversation, path, body) {
    const text = structuredClone(body);
    const next = this.saved(conversation).then(() => ask(path, { method: "PUT", body: text }));
    const settled = next
      .catch((error) => this.failed(error, "This could not be saved. "))
      .finally(() => this.writing(-1));
    this.saves.set(conversation.id, settled);
    this.writing(1);
    return settled;
  }

  // The page says while something is not stored yet.
  writing(more) {
    this.writes += more;
    byId("app").classList.toggle("saving", this.writes > 0);
  }

  saved(conversation) {
    return this.saves.get(conversation.id) ?? Promise.resolve();
  }

  // ---------------------------------------------------------------------- the sidebar's wishes

  list(search, after) {
    const query = new URLSearchParams();
    if (search) query.set("search", search);
    if (after) query.set("after", after);
    return ask(`${PLACE}?${query}`);
  }

  async rename(entry) {
    const title = await askTitle(entry.title);
    if (!title) return;
    try {
      await ask(`${PLACE}/${entry.id}`, { method: "PUT", body: { title } });
    } catch (error) {
      this.failed(error);
      return;
    }
    if (entry.id === this.conversation.id) {
      this.conversation.title = title;
      this.render();
    }
    await this.sidebar.load();
  }

  async remove(entry) {
    if (!(await confirmDelete(entry.title))) return;
    const running = this.answers.running.get(entry.id);
    try {
      if (running) {
        running.controller.abort();
        await this.saves.get(entry.id);
      }
      await ask(`${PLACE}/${entry.id}`, { method: "DELETE" });
    } catch (error) {
      this.failed(error);
      return;
    }
    this.open_.delete(entry.id);
    if (entry.id === this.conversation.id) this.startNew();
    announce("Deleted", true);
    await this.sidebar.load();
  }

  async exportAs(entry, kind) {
    try {
      const conversation = await this.fetch(entry.id);
      const text = kind === "md" ? asMarkdown(conversation) : asJson(conversation);
      const type = kind === "md" ? "text/markdown" : "application/json";
      save(new Blob([text], { type }), fileName(conversation, kind));
    } catch (error) {
      this.failed(error);
    }
  }

  failed(error, before = "") {
    if (!(error instanceof Failure)) throw error;
    announce(before + error.message, true);
  }
}

function spoken(message) {
  if (message.error) return `The answer failed: ${message.error}`;
  return `Answer: ${message.content.slice(0, 300)}`;
}

function firstWords(text) {
  const line = text.trim().split("\n")[0].replace(/\s+/g, " ");
  if (line.length <= 60) return line;
  const cut = line.slice(0, 60);
  return `${cut.slice(0, Math.max(cut.lastIndexOf(" "), 40))}…`;
}

let asking = null;

// One question however many requests were refused; true if there is a new key to try.
function enterKey(wrong = hasKey()) {
  asking ??= askKey(wrong)
    .then((given) => {
      if (given) setKey(given.key, given.keep);
      return Boolean(given);
    })
    .finally(() => {
      asking = null;
    });
  return asking;
}

function welcome(page) {
  const { about } = page;
  const [{ answers }] = about.choices;
  byId("welcome-title").textContent = `Ask ${answers.id}`;
  byId("welcome-text").textContent = answers.description;
  byId("examples").replaceChildren(
    ...about.examples.map((text) => h("li", {}, h("button", { type: "button", onclick: () => page.send(text, []) }, text))),
  );
}

function icons() {
  for (const place of document.querySelectorAll("[data-icon]")) place.prepend(icon(place.dataset.icon));
}

async function start() {
  icons();
  onKeyNeeded(enterKey);
  const about = await ask("/web/about");
  const page = new Page(about);
  welcome(page);
  page.toggleSidebar(!narrow.matches, false);
  if (location.hash.length > 1) await page.open(location.hash.slice(1));
  else page.startNew();
  byId("app").hidden = false;
  if (!narrow.matches) byId("draft").focus();
  await page.sidebar.load().catch((error) => page.failed(error));
}

start().catch((error) => {
  byId("app").hidden = false;
  announce(error.message, true);
  throw error;
});
