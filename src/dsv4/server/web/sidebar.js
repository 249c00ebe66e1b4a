// The list of conversations: newest first, searchable, each with rename, export and delete.

import { h, iconButton } from "./dom.js";

const DAY = 24 * 3600 * 1000;

export class Sidebar {
  // page: list(search, after), open(id), rename(entry), remove(entry), exportAs(entry, kind)
  constructor(page) {
    this.page = page;
    this.element = document.getElementById("sidebar");
    this.list = document.getElementById("conversations");
    this.search = document.getElementById("search");
    this.entries = [];
    this.current = null;
    this.generation = 0;
    let timer;
    this.search.addEventListener("input", () => {
      clearTimeout(timer);
      timer = setTimeout(() => this.load(), 150);
    });
    this.search.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && this.search.value) {
        event.stopPropagation();
        this.search.value = "";
        this.load();
      } else if (event.key === "ArrowDown") {
        this.list.querySelector("a")?.focus();
        event.preventDefault();
      }
    });
    this.list.addEventListener("keydown", (event) => this.move(event));
  }

  async load(more = false) {
    const generation = (this.generation += 1);
    const found = await this.page.list(this.search.value.trim(), more ? this.next : null);
    if (generation !== this.generation) return; // a later search was faster
    this.entries = more ? [...this.entries, ...found.conversations] : found.conversations;
    this.next = found.next;
    this.show();
  }

  select(id) {
    this.current = id;
    this.show();
  }

  show() {
    const open = this.list.querySelector(".popup:popover-open");
    if (open) {
      // a menu stays where it is; the list is shown anew when it closes
      open.addEventListener("toggle", () => this.show(), { once: true });
      return;
    }
    const query = this.search.value.trim();
    const focused = document.activeElement?.closest?.("#conversations li")?.dataset.id;
    const parts = [];
    let period = null;
    let items = null;
    for (const entry of this.entries) {
      const name = query ? "Found" : periodOf(entry.changed);
      if (name !== period) {
        period = name;
        items = h("ul");
        parts.push(h("h2", {}, name), items);
      }
      items.append(this.row(entry, query));
    }
    if (this.entries.length === 0) {
      parts.push(h("p.soft", {}, query ? `Nothing found for “${query}”.` : "Your conversations will be listed here."));
    }
    if (this.next) {
      parts.push(h("button.plain", { type: "button", onclick: () => this.load(true) }, "Show more"));
    }
    this.list.replaceChildren(...parts);
    if (focused) this.list.querySelector(`li[data-id="${CSS.escape(focused)}"] a`)?.focus();
  }

  row(entry, query) {
    const title = entry.title || "New conversation";
    const link = h(
      "a",
      {
        href: `#${entry.id}`,
        "aria-current": entry.id === this.current ? "page" : null,
        onclick: (event) => {
          if (event.ctrlKey || event.metaKey || event.shiftKey) return;
          event.preventDefault();
          this.page.open(entry.id);
        },
      },
      h("span.title", {}, marked(title, query)),
      entry.snippet ? h("span.snippet", {}, marked(entry.snippet, query)) : null,
    );
    const menu = h("div.popup", { popover: "auto", role: "menu", "aria-label": title });
    const action = (label, work) => {
      const run = () => {
        menu.hidePopover();
        work();
      };
      return h("button", { type: "button", role: "menuitem", onclick: run }, label);
    };
    menu.append(
      action("Rename", () => this.page.rename(entry)),
      action("Export as Markdown", () => this.page.exportAs(entry, "md")),
      action("Export as JSON", () => this.page.exportAs(entry, "json")),
      action("Delete", () => this.page.remove(entry)),
    );
    const button = iconButton("more", `More for ${title}`, () => openMenu(menu, button), { "aria-haspopup": "menu", "aria-expanded": "false" });
    menu.addEventListener("toggle", (event) => button.setAttribute("aria-expanded", String(event.newState === "open")));
    return h("li", { "data-id": entry.id }, link, button, menu);
  }

  // Arrow keys go through the list, as they do in a mail program.
  move(event) {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!step) return;
    const menu = event.target.closest(".popup");
    const all = [...(menu ?? this.list).querySelectorAll(menu ? "button" : "li > a")];
    const at = all.indexOf(event.target);
    if (at < 0) return;
    event.preventDefault();
    if (!menu && at + step < 0) this.search.focus();
    else all[Math.max(0, Math.min(all.length - 1, at + step))].focus();
  }
}

function openMenu(menu, button) {
  menu.showPopover();
  const at = button.getBoundingClientRect();
  menu.style.left = `${Math.max(8, Math.min(at.right - menu.offsetWidth, innerWidth - menu.offsetWidth - 8))}px`;
  const below = at.bottom + 4;
  menu.style.top = `${below + menu.offsetHeight > innerHeight ? at.top - menu.offsetHeight - 4 : below}px`;
  menu.querySelector("button").focus();
}

function periodOf(time) {
  const midnight = new Date().setHours(0, 0, 0, 0);
  if (time >= midnight) return "Today";
  if (time >= midnight - DAY) return "Yesterday";
  if (time >= midnight - 6 * DAY) return "Last seven days";
  return "Earlier";
}

// The text with what was searched for marked in it.
function marked(text, query) {
  if (!query) return [text];
  const parts = [];
  const folded = text.toLowerCase();
  const wanted = query.toLowerCase();
  if (folded.length !== text.length) return [text];
  let at = 0;
  for (let found = folded.indexOf(wanted); found >= 0; found = folded.indexOf(wanted, at)) {
    parts.push(text.slice(at, found), h("mark", {}, text.slice(found, found + query.length)));
    at = found + query.length;
  }
  return [...parts, text.slice(at)];
}
