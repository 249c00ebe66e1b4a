// Answers on their way: one stream per conversation, which goes on while another one is looked at.

import { Failure, stream } from "./api.js";
import { openCalls } from "./conversation.js";
import { computedResult, declaredTools } from "./tools.js";

const ROUNDS = 8; // calls in a row that are answered without the person
const SAVE_EVERY = 4000; // ms: what a crash of the browser can lose

const EFFORTS = {
  off: { thinking: { type: "disabled" } },
  high: { reasoning_effort: "high" },
  max: { reasoning_effort: "max" },
};

export class Answers {
  // changed(conversation, message): something new to show. save(conversation, message): keep it.
  constructor({ changed, save }) {
    this.changed = changed;
    this.save = save;
    this.running = new Map(); // conversation id -> {controller, message}
  }

  of(conversation) {
    return this.running.get(conversation?.id);
  }

  isLive(message) {
    return [...this.running.values()].some((r) => r.message === message);
  }

  stop(conversation) {
    this.of(conversation)?.controller.abort();
  }

  // Answers what ends with the message ``last``, and goes on while the page can answer the calls.
  async ask(conversation, last) {
    for (let round = 0; round < ROUNDS; round += 1) {
      const message = await this.one(conversation, last);
      if (!message.tool_calls?.length || message.finish !== "tool_calls") return message;
      last = this.compute(conversation, message);
      if (last === null) return message;
    }
    return null;
  }

  // Adds the results that the page can compute; the last of them if none is missing now, else null.
  compute(conversation, message) {
    let last = message;
    for (const call of openCalls(conversation, message)) {
      const content = computedResult(call, conversation.settings);
      if (content === null) continue;
      last = conversation.add({ role: "tool", tool_call_id: call.id, content }, last.id);
      this.save(conversation, last);
      this.changed(conversation, last);
    }
    return last !== message && this.allAnswered(conversation, message) ? last.id : null;
  }

  allAnswered(conversation, message) {
    return openCalls(conversation, message).length === 0;
  }

  async one(conversation, last) {
    const { model, effort } = conversation.settings;
    const body = { model, messages: conversation.prompt(last), ...EFFORTS[effort] };
    const tools = declaredTools(conversation.settings);
    if (tools.length) body.tools = tools;
    const controller = new AbortController();
    const message = conversation.add(
      { role: "assistant", content: "", reasoning: "", tool_calls: [], asked: model, effort, finish: null },
      last,
    );
    this.running.set(conversation.id, { controller, message });
    this.changed(conversation, message);
    const clock = new Clock();
    let saved = performance.now();
    try {
      for await (const chunk of stream(body, controller.signal)) {
        take(message, chunk, clock);
        this.changed(conversation, message);
        if (performance.now() - saved > SAVE_EVERY) {
          saved = performance.now();
          this.save(conversation, message);
        }
      }
    } catch (error) {
      if (error.name === "AbortError") message.finish = "stopped";
      else if (error instanceof Failure) Object.assign(message, { finish: "error", error: error.message });
      else throw error;
    } finally {
      message.times = clock.end();
      this.running.delete(conversation.id);
      this.save(conversation, message);
      this.changed(conversation, message);
    }
    return message;
  }
}

// Milliseconds: until the first token, of reasoning, and of everything.
class Clock {
  constructor() {
    this.start = performance.now();
    this.first = this.thought = null;
  }

  token(reasoning) {
    this.first ??= performance.now();
    if (!reasoning) this.thought ??= performance.now();
  }

  end() {
    const end = performance.now();
    const first = this.first ?? end;
    return { first: first - this.start, thought: (this.thought ?? end) - first, total: end - this.start };
  }
}

function take(message, chunk, clock) {
  message.answered_by = chunk.model;
  const [choice] = chunk.choices;
  if (choice) {
    const { reasoning_content: reasoning, content, tool_calls: calls } = choice.delta;
    if (reasoning) {
      clock.token(true);
      message.began ??= Date.now();
      message.reasoning += reasoning;
    }
    if (content) {
      clock.token(false);
      message.content += content;
    }
    for (const part of calls ?? []) {
      clock.token(false);
      addCall(message.tool_calls, part);
    }
    if (choice.finish_reason) message.finish = choice.finish_reason;
  }
  if (chunk.usage) {
    message.usage = {
      prompt: chunk.usage.prompt_tokens,
      cached: chunk.usage.prompt_cache_hit_tokens ?? 0,
      completion: chunk.usage.completion_tokens,
      reasoning: chunk.usage.completion_tokens_details?.reasoning_tokens ?? 0,
    };
  }
}

// A call comes in pieces: first its name, then its arguments.
function addCall(calls, { index, id, function: part = {} }) {
  calls[index] ??= { id: "", type: "function", function: { name: "", arguments: "" } };
  const call = calls[index];
  if (id) call.id = id;
  if (part.name) call.function.name = part.name;
  if (part.arguments) call.function.arguments += part.arguments;
}
