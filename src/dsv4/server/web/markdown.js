// A model's Markdown becomes elements that can neither run nor load anything.
//
// Three walls, each enough: markdown-it passes no HTML through; DOMPurify lets only the elements
// of text pass; and the server's content security policy forbids scripts, images and connections
// to anywhere else. A link is a button that shows where it leads before anything is opened.

import hljs from "./vendor/highlight.js/highlight.min.js";
import MarkdownIt from "./vendor/markdown-it/markdown-it.esm.min.mjs";
import "./vendor/dompurify/purify.min.js";
import { copyButton, h } from "./dom.js";
import { confirmLink } from "./dialogs.js";
import { mathRule, setFormulas } from "./math.js";

const LONG = 8000; // characters of code that are not coloured again with every new token

const ALLOWED = {
  ALLOWED_TAGS: [
    "a", "blockquote", "br", "code", "del", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "li",
    "ol", "p", "pre", "s", "span", "strong", "table", "tbody", "td", "th", "thead", "tr", "ul",
  ],
  ALLOWED_ATTR: ["class", "href", "start"],
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};

let streaming = false;

const md = new MarkdownIt({ html: false, linkify: true, breaks: true, highlight });
md.use(mathRule);
md.linkify.set({ fuzzyLink: false, fuzzyEmail: false });

function highlight(code, language) {
  if (!language || !hljs.getLanguage(language) || (streaming && code.length > LONG)) return "";
  return hljs.highlight(code, { language, ignoreIllegals: true }).value;
}

// Items of a list of tasks have a box in place of their brackets.
md.core.ruler.after("inline", "tasks", ({ tokens }) => {
  for (let i = 2; i < tokens.length; i += 1) {
    const mark = tokens[i].type === "inline" && tokens[i - 2].type === "list_item_open" && /^\[([ xX])\] /.exec(tokens[i].content);
    if (!mark) continue;
    const [text] = tokens[i].children;
    text.content = (mark[1] === " " ? "☐ " : "☑ ") + text.content.slice(mark[0].length);
    tokens[i - 2].attrJoin("class", "task");
  }
});

// An image is named, never loaded.
md.renderer.rules.image = (tokens, i) => {
  const { escapeHtml } = md.utils;
  const name = tokens[i].content || "without a description";
  return `<a class="image" href="${escapeHtml(tokens[i].attrGet("src") ?? "")}">${escapeHtml(name)}</a>`;
};
for (const cell of ["td_open", "th_open"]) {
  md.renderer.rules[cell] = (tokens, i, options, env, self) => {
    const align = /text-align:(\w+)/.exec(tokens[i].attrGet("style") ?? "")?.[1];
    tokens[i].attrs = align ? [["class", align]] : null;
    return self.renderToken(tokens, i, options);
  };
}

// Shows a text that grows. Finished blocks are left alone, so the cost of a token does not depend
// on how long the answer is; at the end everything is read once more as a whole.
export class MarkdownView {
  constructor(element) {
    this.element = element;
    this.blocks = []; // {html, node}
    this.kept = 0; // blocks that are finished
    this.offset = 0; // where in the text they end
    this.outline = []; // the levels of the headings that are open there
  }

  update(text, final = false) {
    if (final || text.length < this.offset) {
      this.kept = this.offset = 0;
      this.outline = [];
    }
    const tail = text.slice(this.offset);
    streaming = !final;
    const blocks = topBlocks(tail, this.outline);
    blocks.forEach(({ html }, i) => this.put(this.kept + i, html));
    for (const { node } of this.blocks.splice(this.kept + blocks.length)) node.remove();
    if (!final && blocks.length > 1) {
      this.kept += blocks.length - 1;
      this.outline = blocks[blocks.length - 2].outline;
      this.offset += lineStart(tail, blocks[blocks.length - 1].line);
    }
  }

  put(index, html) {
    const before = this.blocks[index];
    if (before?.html === html) return;
    const node = build(html);
    this.blocks[index] = { html, node };
    if (before) before.node.replaceWith(node);
    else this.element.append(node);
    setFormulas(node);
  }
}

// Headings are numbered below the message's own, without gaps; ``outline`` is what stands before.
function topBlocks(text, outline) {
  const env = {};
  let open = [...outline];
  const blocks = [];
  let group = [];
  let depth = 0;
  for (const token of md.parse(text, env)) {
    group.push(token);
    if (token.type === "heading_open") {
      const level = Number(token.tag.slice(1));
      open = [...open.filter((l) => l < level), level];
      token.attrSet("class", `level-${level}`);
    }
    if (token.type.startsWith("heading_")) token.tag = `h${Math.min(6, 2 + open.length)}`;
    depth += token.nesting;
    if (depth > 0) continue;
    const line = group[0].map ? group[0].map[0] : 0;
    blocks.push({ html: md.renderer.render(group, md.options, env), line, outline: open });
    group = [];
  }
  return blocks;
}

function lineStart(text, line) {
  let at = 0;
  for (let i = 0; i < line; i += 1) at = text.indexOf("\n", at) + 1;
  return at;
}

function build(html) {
  const fragment = globalThis.DOMPurify.sanitize(html, ALLOWED);
  for (const link of fragment.querySelectorAll("a")) link.replaceWith(linkButton(link));
  for (const pre of fragment.querySelectorAll("pre")) wrap(pre, codeBox(pre));
  for (const table of fragment.querySelectorAll("table")) {
    wrap(table, h("div.scroll", { tabindex: "0", role: "region", "aria-label": "Table" }));
  }
  const nodes = [...fragment.childNodes].filter((n) => n.nodeType === Node.ELEMENT_NODE);
  return nodes.length === 1 ? nodes[0] : h("div", {}, nodes);
}

function linkButton(link) {
  const address = link.getAttribute("href");
  const image = link.classList.contains("image");
  if (!address && !image) return h("span", {}, ...link.childNodes);
  if (!address) return h("span.image-name", {}, `Image: ${link.textContent}`);
  const onclick = () => confirmLink(address);
  if (!image) return h("button.link", { type: "button", title: address, onclick }, ...link.childNodes);
  const label = `Image, not loaded: ${link.textContent}`;
  return h("button.image-name", { type: "button", title: address, onclick }, label);
}

function codeBox(pre) {
  const code = pre.querySelector("code");
  const language = /language-([\w+#.-]+)/.exec(code?.className ?? "")?.[1] ?? "";
  pre.tabIndex = 0; // so that the keyboard can scroll it
  pre.setAttribute("role", "region");
  pre.setAttribute("aria-label", language ? `Code, ${language}` : "Code");
  const copy = copyButton(() => pre.textContent, "Copy code");
  return h(language ? "div.code" : "div.code.nameless", {}, h("div.code-head", {}, h("span", {}, language), copy));
}

function wrap(inner, box) {
  inner.replaceWith(box);
  box.append(inner);
}

// A text of code outside a message, for instance a call's arguments.
export function codeBlock(text, language) {
  const element = h("div", {});
  const fence = "`".repeat(Math.max(3, ...[...text.matchAll(/`+/g)].map((m) => m[0].length + 1)));
  new MarkdownView(element).update(`${fence}${language}\n${text}\n${fence}`, true);
  return element;
}
