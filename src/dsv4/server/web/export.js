// Conversations as files.

import { withFiles } from "./conversation.js";

export function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

export function fileName(conversation, ending) {
  const words = (conversation.title || "conversation").replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-+|-+$/g, "");
  return `${words.slice(0, 60) || "conversation"}.${ending}`;
}

// The shown branch, for people.
export function asMarkdown(conversation) {
  const parts = [`# ${conversation.title || "Conversation"}`];
  for (const message of conversation.path()) {
    if (message.role === "user") {
      parts.push("## You", withFiles(message));
    } else if (message.role === "tool") {
      parts.push("### Result", fenced(message.content));
    } else {
      parts.push(`## ${message.answered_by ?? "Model"}`);
      if (message.reasoning) parts.push(quoted(message.reasoning));
      if (message.content) parts.push(message.content);
      for (const { function: call } of message.tool_calls ?? []) {
        parts.push(`### Call of ${call.name}`, fenced(call.arguments, "json"));
      }
    }
  }
  return `${parts.join("\n\n")}\n`;
}

// Everything, all branches included, for programs.
export function asJson(conversation) {
  const { id, title, settings, head, messages } = conversation;
  return `${JSON.stringify({ id, title, settings, head, messages: [...messages.values()] }, null, 1)}\n`;
}

const quoted = (text) => text.trim().split("\n").map((line) => `> ${line}`).join("\n");

function fenced(text, language = "") {
  const fence = "`".repeat(Math.max(3, ...[...text.matchAll(/`+/g)].map((m) => m[0].length + 1)));
  return `${fence}${language}\n${text}\n${fence}`;
}
