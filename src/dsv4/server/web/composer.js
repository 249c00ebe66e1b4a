// Where a message is written: text, dropped files, who answers, and how much it thinks.

import { ask } from "./api.js";
import { announce, h } from "./dom.js";
import { count, fileChip } from "./message.js";

const LARGEST = 4_000_000; // characters of one file; a million tokens are about as many
const touch = matchMedia("(pointer: coarse)");

export class Composer {
  // page: send(text, files), stop(), setup(), changed(settings), editLast()
  constructor(page, about) {
    this.page = page;
    this.about = about;
    this.files = [];
    this.area = document.getElementById("draft");
    this.button = document.getElementById("send");
    this.list = document.getElementById("attached");
    this.picker = document.getElementById("file-picker");
    this.effort = document.getElementById("effort");
    this.form = document.getElementById("composer");
    this.note = document.getElementById("who");
    this.models = this.buildModels();
    this.listen();
  }

  buildModels() {
    const models = document.getElementById("models");
    models.append(
      ...this.about.choices.map(({ name, model, answers }) => {
        const input = h("input", { type: "radio", name: "model", value: model });
        input.addEventListener("change", () => this.changed());
        return h("label", { title: `${model}, answered by ${answers.id}` }, input, h("span", {}, name));
      }),
    );
    return models;
  }

  listen() {
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.busy) this.page.stop();
      else this.submit();
    });
    this.area.addEventListener("input", () => this.fit());
    this.area.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing && !touch.matches) {
        event.preventDefault();
        if (!this.busy) this.submit();
      } else if (event.key === "ArrowUp" && !this.area.value && !this.busy) {
        if (this.page.editLast()) event.preventDefault();
      }
    });
    this.area.addEventListener("paste", (event) => {
      if (event.clipboardData.files.length === 0) return;
      event.preventDefault();
      this.add(event.clipboardData.files);
    });
    this.effort.addEventListener("change", () => this.changed());
    document.getElementById("attach").addEventListener("click", () => this.picker.click());
    document.getElementById("setup").addEventListener("click", () => this.page.setup());
    this.picker.addEventListener("change", () => {
      this.add(this.picker.files);
      this.picker.value = "";
    });
    this.listenToDrops();
  }

  listenToDrops() {
    const zone = document.getElementById("drop");
    const isFiles = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
    let depth = 0;
    const show = (shown) => {
      zone.hidden = !shown;
      if (!shown) depth = 0;
    };
    addEventListener("dragenter", (event) => {
      if (!isFiles(event)) return;
      depth += 1;
      show(true);
    });
    addEventListener("dragleave", (event) => {
      if (isFiles(event) && (depth -= 1) <= 0) show(false);
    });
    addEventListener("dragover", (event) => {
      if (isFiles(event)) event.preventDefault();
    });
    addEventListener("drop", (event) => {
      if (!isFiles(event)) return;
      event.preventDefault();
      show(false);
      this.add(event.dataTransfer.files);
    });
  }

  async add(files) {
    for (const file of files) {
      const text = await readText(file);
      if (text === null) {
        announce(`${file.name} is not a text file, so the model cannot read it.`, true);
      } else if (text.length > LARGEST) {
        announce(`${file.name} is too long: at most ${count(LARGEST)} characters.`, true);
      } else {
        const entry = { name: file.name, text, tokens: undefined };
        this.files.push(entry);
        this.showFiles();
        this.count(entry);
      }
    }
    this.area.focus();
  }

  async count(entry) {
    try {
      entry.tokens = (await ask("/web/tokens", { method: "POST", body: { text: entry.text } })).tokens;
      announce(`${entry.name}: ${count(entry.tokens)} tokens`);
    } catch {
      entry.tokens = null;
    }
    this.showFiles();
  }

  showFiles() {
    this.list.hidden = this.files.length === 0;
    this.list.replaceChildren(
      ...this.files.map((file) =>
        fileChip(file, () => {
          this.files = this.files.filter((f) => f !== file);
          this.showFiles();
          this.area.focus();
        }),
      ),
    );
    const context = this.answers().context_length;
    const total = this.files.reduce((sum, f) => sum + (f.tokens ?? 0), 0);
    const over = total > context;
    document.getElementById("too-long").hidden = !over;
    document.getElementById("too-long").textContent = over
      ? `The files have ${count(total)} tokens, and ${this.answers().id} reads at most ${count(context)}.`
      : "";
    this.fit();
  }

  submit() {
    const text = this.area.value.trim();
    if (!text && this.files.length === 0) return;
    this.page.send(text, this.files);
    this.area.value = "";
    this.files = [];
    this.showFiles();
  }

  // What the person had begun, for when another conversation is looked at meanwhile.
  get draft() {
    return { text: this.area.value, files: this.files };
  }

  set draft({ text = "", files = [] }) {
    this.area.value = text;
    this.files = files;
    this.showFiles();
  }

  set busy(busy) {
    this.isBusy = busy;
    this.button.classList.toggle("stop", busy);
    this.button.setAttribute("aria-label", busy ? "Stop the answer" : "Send");
    this.button.title = busy ? "Stop the answer" : "Send";
    this.fit();
  }

  get busy() {
    return this.isBusy;
  }

  show(settings) {
    for (const input of this.models.querySelectorAll("input")) input.checked = input.value === settings.model;
    this.effort.value = settings.effort;
    const set = Boolean(settings.instructions?.trim() || settings.calculator || settings.tools);
    document.getElementById("setup").classList.toggle("set", set);
    this.explain();
  }

  changed() {
    const model = this.models.querySelector("input:checked")?.value;
    this.page.changed({ model, effort: this.effort.value });
    this.explain();
    this.showFiles();
  }

  answers() {
    const model = this.models.querySelector("input:checked")?.value;
    return (this.about.choices.find((c) => c.model === model) ?? this.about.choices[0]).answers;
  }

  // Who really answers is said, always.
  explain() {
    const { id, description, context_length: context } = this.answers();
    const parts = [h("strong", {}, id), " answers here. "];
    if (this.answers().small) parts.push("A small model, neither DeepSeek-V4-Flash nor -Pro. ");
    if (this.effort.value === "max" && context < 393_216) {
      parts.push(`Max is meant for 384K of context; here there are ${count(context)} tokens. `);
    } else {
      parts.push("It makes mistakes.");
    }
    this.note.replaceChildren(...parts);
    this.note.title = description;
  }

  fit() {
    this.area.style.height = "auto";
    this.area.style.height = `${Math.min(this.area.scrollHeight, innerHeight * 0.4)}px`;
    const empty = !this.area.value.trim() && this.files.length === 0;
    this.button.disabled = !this.isBusy && empty;
  }
}

// The file as text, or null if it is none.
async function readText(file) {
  if (file.size > 4 * LARGEST) return "x".repeat(LARGEST + 1);
  const bytes = await file.arrayBuffer();
  try {
    const text = new TextDecoder("utf-8", { fatal: true }).decode(bytes);
    return text.includes("\0") ? null : text;
  } catch {
    return null;
  }
}
