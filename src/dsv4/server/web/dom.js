// Elements from code. Text only ever becomes text: nothing here parses HTML.

const SVG = "http://www.w3.org/2000/svg";

// h("button.quiet", { type: "button", onclick: go, "aria-label": "Go" }, "text", node, null)
export function h(kind, properties = {}, ...children) {
  const [tag, ...classes] = kind.split(".");
  const element = document.createElement(tag);
  if (classes.length) element.className = classes.join(" ");
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "value") element.value = value;
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.flat(Infinity).filter((c) => c !== null && c !== undefined && c !== false));
  return element;
}

// Strokes in a box of 24 by 24.
const ICONS = {
  attach: "M20 11.5 12 19.4a5 5 0 0 1-7.1-7.1l8.4-8.3a3.4 3.4 0 0 1 4.8 4.8l-8.3 8.2a1.7 1.7 0 0 1-2.4-2.4l7.5-7.4",
  back: "m14.5 6-6 6 6 6",
  chat: "M5 5h14a1.5 1.5 0 0 1 1.5 1.5v9A1.5 1.5 0 0 1 19 17h-7l-4.5 3.5V17H5a1.5 1.5 0 0 1-1.5-1.5v-9A1.5 1.5 0 0 1 5 5Z",
  check: "m5 12.5 4.5 4.5L19 7.5",
  close: "m6.5 6.5 11 11m0-11-11 11",
  copy: "M9 9h9.5A1.5 1.5 0 0 1 20 10.5V19a1.5 1.5 0 0 1-1.5 1.5H10A1.5 1.5 0 0 1 8.5 19V9.5M15.5 9V5A1.5 1.5 0 0 0 14 3.5H5.5A1.5 1.5 0 0 0 4 5v8.5A1.5 1.5 0 0 0 5.5 15h3",
  down: "M12 5v14m-6-6 6 6 6-6",
  edit: "M4.5 19.5h4L19.3 8.7a1.9 1.9 0 0 0 0-2.7l-1.3-1.3a1.9 1.9 0 0 0-2.7 0L4.5 15.5v4ZM13.5 6.5l4 4",
  export: "M12 4v11m-4.5-4L12 15.5 16.5 11M5 19.5h14",
  file: "M6.5 3.5h7l4.5 4.5v11a1.5 1.5 0 0 1-1.5 1.5h-10A1.5 1.5 0 0 1 5 19V5a1.5 1.5 0 0 1 1.5-1.5Zm7 0V8H18",
  forward: "m9.5 6 6 6-6 6",
  menu: "M4.5 7h15m-15 5h15m-15 5h15",
  more: "M6 12h.01M12 12h.01M18 12h.01",
  retry: "M19.5 11.5A7.5 7.5 0 1 0 17.3 17.3M19.5 5.5v6h-6",
  search: "M10.5 17a6.5 6.5 0 1 0 0-13 6.5 6.5 0 0 0 0 13Zm4.800-1.7L20 20",
  send: "M12 19V5.5m-6 6 6-6 6 6",
  settings: "M4 7.5h8m5 0h3M4 16.5h3m5 0h8M14.5 10a2.5 2.5 0 1 0 0-5 2.5 2.5 0 0 0 0 5Zm-5 9a2.5 2.5 0 1 0 0-5 2.5 2.5 0 0 0 0 5Z",
  stop: "M7.5 7.5h9v9h-9z",
  tool: "M14.5 6.5a4 4 0 0 1 5-2.5l-2.7 2.7.4 2.100 2.100.4L22 6.5M14.5 6.5a4 4 0 0 0 .2 2.9l-9.200 9.200a1.600 1.600 0 0 0 2.3 2.3l9.200-9.200a4 4 0 0 0 5-5.200",
};

export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("class", `icon icon-${name}`);
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}

// A button that is only an icon; its name is spoken and shown on hovering.
export function iconButton(name, label, onclick, more = {}) {
  return h("button.icon-button", { type: "button", "aria-label": label, title: label, onclick, ...more }, icon(name));
}

let quiet;

// Says something to screen readers, and shows it for a moment if ``shown``.
export function announce(text, shown = false) {
  const place = document.getElementById("announcer");
  place.textContent = "";
  // a change of text is what is read out, also when the same text comes twice
  requestAnimationFrame(() => {
    place.textContent = text;
  });
  if (!shown) return;
  const toast = document.getElementById("toast");
  toast.textContent = text;
  toast.hidden = false;
  clearTimeout(quiet);
  quiet = setTimeout(() => {
    toast.hidden = true;
  }, 5000);
}

export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // pages that are not served from this machine or over TLS have no clipboard but this one
    const area = h("textarea.visually-hidden", { value: text, "aria-hidden": "true" });
    (document.querySelector("dialog[open]") ?? document.body).append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }
}

export function copyButton(text, label = "Copy") {
  const button = iconButton("copy", label, async () => {
    const done = await copyText(typeof text === "function" ? text() : text);
    announce(done ? "Copied" : "Copying is not possible here", !done);
    if (!done) return;
    button.replaceChildren(icon("check"));
    setTimeout(() => button.replaceChildren(icon("copy")), 1600);
  });
  return button;
}
