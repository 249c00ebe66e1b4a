// Questions to the person at the page. Each dialog is made when it is needed and gone afterwards;
// the browser's own <dialog> keeps the focus inside and gives it back.

import { copyButton, h, iconButton } from "./dom.js";

let count = 0;

// Opens a dialog and resolves with its return value ("" when it was closed without one).
export function openDialog(title, content, buttons = [], more = {}) {
  count += 1;
  const name = `dialog-title-${count}`;
  const form = h(
    "form",
    { method: "dialog" },
    h("div.dialog-head", {}, h("h2", { id: name }, title), iconButton("close", "Close", () => dialog.close(""))),
    h("div.dialog-body", {}, content),
    buttons.length ? h("div.dialog-buttons", {}, buttons) : null,
  );
  const dialog = h("dialog", { "aria-labelledby": name, class: more.class }, form);
  // a click on what is around it closes it
  dialog.addEventListener("mousedown", (event) => {
    if (event.target === dialog) dialog.close("");
  });
  document.body.append(dialog);
  dialog.showModal();
  return new Promise((resolve) => {
    // what was chosen holds at once: the close event comes later, perhaps after the next key
    form.addEventListener("submit", (event) => resolve(event.submitter?.value ?? ""));
    dialog.addEventListener("close", () => {
      dialog.remove();
      resolve(dialog.returnValue);
    });
  });
}

export function submit(label, value, kind = "primary") {
  return h(`button.${kind}`, { value }, label);
}

// Where a link leads is shown before it is opened: the model wrote it, not you.
export async function confirmLink(address) {
  let host = "";
  try {
    host = new URL(address).host;
  } catch {
    // an address that cannot be parsed is still shown
  }
  const open = h(
    "a.button.primary",
    { href: address, target: "_blank", rel: "noopener noreferrer nofollow", onclick: () => open.closest("dialog").close("open") },
    "Open in a new tab",
  );
  await openDialog(
    "Open this link?",
    [
      h("p", {}, "The model wrote this address. It leads to ", h("strong", {}, host || "somewhere else"), ":"),
      h("div.address", {}, h("code", {}, address), copyButton(address, "Copy the address")),
    ],
    [submit("Cancel", "", "plain"), open],
  );
}

export async function confirmDelete(title) {
  const answer = await openDialog(
    "Delete this conversation?",
    h("p", {}, "“", title || "New conversation", "” and all its branches will be gone."),
    [submit("Keep it", "", "plain"), submit("Delete", "delete", "danger")],
  );
  return answer === "delete";
}

export async function askTitle(title) {
  const input = h("input", { type: "text", value: title, maxlength: "200", autofocus: true });
  const answer = await openDialog("Rename", h("label.field", {}, h("span", {}, "Title"), input), [
    submit("Rename", "rename"),
  ]);
  return answer === "rename" ? input.value.trim() : null;
}

export async function askKey(wrong) {
  const input = h("input", { type: "password", autocomplete: "current-password", autofocus: true, required: true });
  const keep = h("input", { type: "checkbox" });
  const answer = await openDialog(
    wrong ? "This key was refused" : "This server asks for a key",
    [
      h("p", {}, "Whoever runs the server makes keys with ", h("code", {}, "dsv4 keys create"), "."),
      h("label.field", {}, h("span", {}, "Key"), input),
      h("label.check", {}, keep, "Keep it on this device"),
    ],
    [submit("Use this key", "use")],
  );
  return answer === "use" && input.value ? { key: input.value.trim(), keep: keep.checked } : null;
}

// What holds for one conversation: instructions to the model, and tools it may call.
export async function askSetup(settings, parseTools) {
  const instructions = h("textarea", { rows: "4", value: settings.instructions ?? "" });
  const calculator = h("input", { type: "checkbox", checked: Boolean(settings.calculator) });
  const tools = h("textarea.mono", {
    rows: "7",
    spellcheck: "false",
    value: settings.tools ?? "",
    placeholder: '[{"name": "get_weather", "description": "…",\n  "parameters": {"type": "object", "properties": {…}}}]',
    "aria-describedby": "tools-problem",
  });
  const problem = h("p.problem", { id: "tools-problem", role: "alert" });
  const check = () => {
    try {
      parseTools(tools.value);
      problem.textContent = "";
    } catch (error) {
      problem.textContent = error.message;
    }
    tools.setAttribute("aria-invalid", String(problem.textContent !== ""));
    return problem.textContent === "";
  };
  tools.addEventListener("input", () => {
    if (problem.textContent) check();
  });
  const done = submit("Done", "done");
  done.addEventListener("click", (event) => {
    if (check()) return;
    event.preventDefault();
    tools.focus();
  });
  const answer = await openDialog(
    "This conversation",
    [
      h("label.field", {}, h("span", {}, "Instructions"), h("small", {}, "What the model should know or keep to in every answer."), instructions),
      h("label.check", {}, calculator, h("span", {}, "Calculator", h("small", {}, "The model may call it; this page computes the result."))),
      h("label.field", {}, h("span", {}, "Other functions"), h("small", {}, "A JSON list of functions. When the model calls one, you type what it returns."), tools),
      problem,
    ],
    [done],
  );
  if (answer !== "done") return null;
  return { instructions: instructions.value, calculator: calculator.checked, tools: tools.value.trim() };
}

const KEYS = [
  ["Enter", "send; Shift+Enter makes a new line"],
  ["Esc", "stop the answer"],
  ["Ctrl K", "search conversations"],
  ["Ctrl Shift O", "new conversation"],
  ["↑", "in an empty message: edit the last one"],
];

export async function openSettings({ about, exportAll, changeKey, hasKey }) {
  const theme = localStorage.getItem("dsv4.theme") ?? "system";
  const choice = (value, label) => {
    const input = h("input", { type: "radio", name: "theme", value, checked: theme === value });
    input.addEventListener("change", () => setTheme(value));
    return h("label", {}, input, h("span", {}, label));
  };
  const answering = new Map(); // a model -> what it answers to
  for (const { name, model, answers } of about.choices) {
    const entry = answering.get(answers.id) ?? { answers, names: [] };
    entry.names.push(`${name} (${model})`);
    answering.set(answers.id, entry);
  }
  const models = [...answering.values()].map(({ answers, names }) =>
    h("p", {}, h("strong", {}, answers.id), ` answers to ${names.join(" and ")}. ${answers.description}`),
  );
  await openDialog(
    "Settings",
    [
      h("fieldset.theme", {}, h("legend", {}, "Appearance"), h("div.segments", {}, choice("system", "As the system"), choice("light", "Light"), choice("dark", "Dark"))),
      h("section", {}, h("h3", {}, "What answers here"), models),
      h(
        "section",
        {},
        h("h3", {}, "Your data"),
        h("p", {}, "Conversations are kept in this server's database."),
        h("div.row", {}, h("button.plain", { type: "button", onclick: exportAll }, "Export all conversations"), about.keys ? h("button.plain", { type: "button", onclick: changeKey }, hasKey ? "Change the key" : "Enter a key") : null),
      ),
      h("section", {}, h("h3", {}, "Keyboard"), h("dl.keys", {}, KEYS.map(([key, what]) => [h("dt", {}, h("kbd", {}, key)), h("dd", {}, what)]))),
      h("p.small", {}, `dsv4 ${about.version}. With markdown-it, highlight.js, KaTeX and DOMPurify: `, h("a", { href: "/web/vendor/manifest.json", target: "_blank" }, "versions and licences"), "."),
    ],
    [],
    { class: "wide" },
  );
}

function setTheme(value) {
  if (value === "system") {
    localStorage.removeItem("dsv4.theme");
    delete document.documentElement.dataset.theme;
  } else {
    localStorage.setItem("dsv4.theme", value);
    document.documentElement.dataset.theme = value;
  }
}
