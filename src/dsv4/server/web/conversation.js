// A conversation is a tree of messages: editing or answering again makes a branch, nothing is lost.
// What the page shows, and what the model reads, is the path from a first message to ``head``.

export class Conversation {
  constructor({ id = newId(), title = "", settings = {}, head = null, messages = [] } = {}) {
    this.id = id;
    this.title = title;
    this.settings = settings;
    this.head = head;
    this.saved = messages.length > 0;
    this.messages = new Map(messages.map((m) => [m.id, m]));
    this.chosen = new Map(); // parent -> the child that was last looked at
    for (const message of this.path()) this.chosen.set(message.parent, message.id);
  }

  // The messages that are shown, first to last.
  path() {
    const path = [];
    const seen = new Set();
    for (let at = this.messages.get(this.head); at && !seen.has(at.id); at = this.messages.get(at.parent)) {
      seen.add(at.id);
      path.push(at);
    }
    return path.reverse();
  }

  // The messages that share a parent, oldest first.
  siblings(message) {
    return this.children(message.parent);
  }

  children(parent) {
    return [...this.messages.values()].filter((m) => (m.parent ?? null) === (parent ?? null));
  }

  // Adds a message below ``parent``; it is shown if its parent was the last one shown, or if it
  // begins a new branch beside one that was.
  add(message, parent = this.head) {
    const made = { id: newId(), parent, created: Date.now(), ...message };
    const shown = parent === null || this.path().some((m) => m.id === parent);
    this.messages.set(made.id, made);
    this.chosen.set(parent, made.id);
    if (shown) this.head = made.id;
    return made;
  }

  // Shows the branch through ``message``, down to where it was last left.
  select(message) {
    this.chosen.set(message.parent, message.id);
    let at = message;
    for (;;) {
      const below = this.children(at.id);
      if (below.length === 0) break;
      at = below.find((m) => m.id === this.chosen.get(at.id)) ?? below[below.length - 1];
    }
    this.head = at.id;
  }

  // The path up to ``last`` as the model reads it.
  prompt(last) {
    const path = this.path();
    const upTo = path.slice(0, path.findIndex((m) => m.id === last) + 1);
    const messages = upTo.map(asRequest);
    const instructions = this.settings.instructions?.trim();
    return instructions ? [{ role: "system", content: instructions }, ...messages] : messages;
  }
}

// Calls of the answer ``message`` that have no result on the shown path.
export function openCalls(conversation, message) {
  const answered = new Set(conversation.path().filter((m) => m.role === "tool").map((m) => m.tool_call_id));
  return (message.tool_calls ?? []).filter((call) => !answered.has(call.id));
}

function asRequest(message) {
  if (message.role === "user") return { role: "user", content: withFiles(message) };
  if (message.role === "tool") {
    return { role: "tool", tool_call_id: message.tool_call_id, content: message.content };
  }
  const said = { role: "assistant", content: message.content, reasoning_content: message.reasoning ?? "" };
  if (message.tool_calls?.length) said.tool_calls = message.tool_calls;
  return said;
}

// Files stand before the question, in the form that DeepSeek publishes for its models.
export function withFiles({ content, files = [] }) {
  const texts = files.map(
    (f) => `[file name]: ${f.name}\n[file content begin]\n${f.text}\n[file content end]\n`,
  );
  return texts.join("") + content;
}

// crypto.randomUUID is missing where the page comes from another machine without TLS.
function newId() {
  if (crypto.randomUUID) return crypto.randomUUID();
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  bytes[6] = (bytes[6] & 0x0f) | 0x40;
  bytes[8] = (bytes[8] & 0x3f) | 0x80;
  const hex = [...bytes].map((b) => b.toString(16).padStart(2, "0")).join("");
  return hex.replace(/^(.{8})(.{4})(.{4})(.{4})/, "$1-$2-$3-$4-");
}
