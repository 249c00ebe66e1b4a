// The server: its routes, the caller's key, and streams of an answer.

const KEY = "dsv4.key";
let askForKey = null; // () -> Promise<boolean>, set by the page

export class Failure extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

export function onKeyNeeded(ask) {
  askForKey = ask;
}

export function hasKey() {
  return Boolean(sessionStorage.getItem(KEY) ?? localStorage.getItem(KEY));
}

export function setKey(key, keep) {
  sessionStorage.removeItem(KEY);
  localStorage.removeItem(KEY);
  if (key) (keep ? localStorage : sessionStorage).setItem(KEY, key);
}

async function send(path, { method = "GET", body, signal, keepalive } = {}, again = true) {
  const headers = {};
  const key = sessionStorage.getItem(KEY) ?? localStorage.getItem(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, {
      method,
      headers,
      signal,
      keepalive,
      body: body === undefined ? undefined : JSON.stringify(body),
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure("The server cannot be reached. Is it still running?");
  }
  if (response.status === 401 && again && askForKey && (await askForKey())) {
    return send(path, { method, body, signal, keepalive }, true);
  }
  if (!response.ok) throw new Failure(await reason(response), response.status);
  return response;
}

async function reason(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answered ${response.status} ${response.statusText}.`;
  }
}

export async function ask(path, options) {
  return (await send(path, options)).json();
}

export async function download(path) {
  return (await send(path)).blob();
}

// The chunks of a streamed answer, as they come. Aborting ``signal`` stops the model's work.
export async function* stream(body, signal) {
  const response = await send("/v1/chat/completions", { method: "POST", body: { ...body, stream: true }, signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  let ended = false;
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      const lines = (held + value).split("\n");
      held = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data:")) continue; // a blank line, or a sign of life
        const data = line.slice(5).trim();
        if (data === "[DONE]") {
          ended = true;
          continue;
        }
        const chunk = JSON.parse(data);
        if (chunk.error) throw new Failure(chunk.error.message);
        yield chunk;
      }
    }
  } catch (error) {
    if (error instanceof TypeError) throw new Failure("The connection broke off.");
    throw error;
  } finally {
    reader.cancel().catch(() => {});
  }
  if (!ended) throw new Failure("The connection broke off.");
}
