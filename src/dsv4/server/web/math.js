// Formulas: a rule for markdown-it that finds them, and KaTeX to set them, loaded when first needed.
// What KaTeX writes is cleaned as a model's HTML would be; its measures are set as properties of the
// elements, because the security policy forbids style attributes.

import "./vendor/dompurify/purify.min.js";

const OPENERS = { "\\(": "\\)", "\\[": "\\]" };

export function mathRule(md) {
  md.inline.ruler.before("escape", "math", (state, silent) => {
    const found = inlineMath(state.src, state.pos, state.posMax);
    if (!found) return false;
    if (!silent) {
      const token = state.push("math", "span", 0);
      token.content = found.tex;
      token.meta = { display: found.display };
    }
    state.pos = found.end;
    return true;
  });

  md.block.ruler.before(
    "fence",
    "math_block",
    (state, startLine, endLine, silent) => {
      const start = state.bMarks[startLine] + state.tShift[startLine];
      const first = state.src.slice(start, state.eMarks[startLine]).trimEnd();
      const opener = ["$$", "\\["].find((o) => first.startsWith(o));
      if (!opener || state.sCount[startLine] - state.blkIndent >= 4) return false;
      const closer = OPENERS[opener] ?? "$$";
      const lines = [first.slice(opener.length)];
      let next = startLine;
      while (!lines[lines.length - 1].trimEnd().endsWith(closer)) {
        next += 1;
        if (next >= endLine || state.sCount[next] < state.blkIndent) return false;
        lines.push(state.src.slice(state.bMarks[next] + state.tShift[next], state.eMarks[next]));
      }
      const tex = lines.join("\n").trimEnd().slice(0, -closer.length).trim();
      if (!tex || tex.includes(closer)) return false;
      if (silent) return true;
      const token = state.push("math_block", "p", 0);
      token.content = tex;
      token.block = true;
      token.map = [startLine, next + 1];
      state.line = next + 1;
      return true;
    },
    { alt: ["paragraph", "blockquote", "list"] },
  );

  const escape = md.utils.escapeHtml;
  md.renderer.rules.math = (tokens, i) =>
    `<span class="math${tokens[i].meta.display ? " display" : ""}">${escape(tokens[i].content)}</span>`;
  md.renderer.rules.math_block = (tokens, i) => `<p class="math display">${escape(tokens[i].content)}</p>`;
}

function inlineMath(text, at, end) {
  const opener = text.slice(at, at + 2);
  const paired = OPENERS[opener] ?? (opener === "$$" ? "$$" : null);
  if (paired) {
    const close = text.indexOf(paired, at + 2);
    if (close < 0 || close + 2 > end) return null;
    const tex = text.slice(at + 2, close).trim();
    return tex ? { tex, display: opener !== "\\(", end: close + 2 } : null;
  }
  if (text[at] !== "$" || /\s/.test(text[at + 1] ?? " ")) return null;
  // a price is no formula: the closing sign follows something and no digit follows it
  for (let close = text.indexOf("$", at + 2); close > 0 && close < end; close = text.indexOf("$", close + 1)) {
    if (text[close - 1] === "\\") continue;
    if (/\s/.test(text[close - 1]) || /\d/.test(text[close + 1] ?? "")) return null;
    return { tex: text.slice(at + 1, close), display: false, end: close + 1 };
  }
  return null;
}

const CLEAN = { FORBID_CONTENTS: ["annotation", "script", "style"], RETURN_DOM_FRAGMENT: true };
let loading = null;

function katex() {
  if (!loading) {
    const styles = document.createElement("link");
    styles.rel = "stylesheet";
    styles.href = "/web/vendor/katex/katex.min.css";
    document.head.append(styles);
    loading = import("./vendor/katex/katex.min.js").then(() => globalThis.katex);
  }
  return loading;
}

// Replaces the TeX in every .math below ``root`` by the formula; what cannot be set stays TeX.
export async function setFormulas(root) {
  const places = root.matches?.(".math") ? [root] : [...root.querySelectorAll(".math")];
  if (places.length === 0) return;
  const library = await katex();
  for (const place of places) {
    const tex = place.textContent;
    const options = {
      displayMode: place.classList.contains("display"),
      output: "htmlAndMathml",
      trust: false,
      strict: "ignore",
      maxSize: 20,
      maxExpand: 300,
    };
    try {
      // a quotation mark in a formula's text is &quot; here, so only attributes are renamed
      const html = library.renderToString(tex, options).replaceAll(' style="', ' data-style="');
      const formula = globalThis.DOMPurify.sanitize(html, CLEAN);
      for (const element of formula.querySelectorAll("[data-style]")) {
        element.style.cssText = element.dataset.style;
        element.removeAttribute("data-style");
      }
      place.replaceChildren(formula);
    } catch {
      place.textContent = tex;
      place.classList.add("broken");
    }
  }
}
