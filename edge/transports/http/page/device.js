/** Requests to the daemon that served this page, and the events it answers with. */

const TOKEN = "token";

/** An error that the daemon tells of in one sentence. */
export class DeviceError extends Error {
  /** @param {{message: string, code: string, param?: string | null}} error as in the body of a refusal */
  constructor({ message, code, param }) {
    super(message);
    this.code = code;
    this.param = param ?? null;
  }
}

/**
 * Keep the token until the tab is closed.
 * @param {string} token an empty one is forgotten
 */
export function keepToken(token) {
  if (token) sessionStorage.setItem(TOKEN, token);
  else sessionStorage.removeItem(TOKEN);
}

/**
 * @param {string} path
 * @param {RequestInit} options
 * @returns {Promise<Response>} an answer that is no error
 */
async function request(path, options = {}) {
  const token = sessionStorage.getItem(TOKEN);
  const headers = { ...options.headers, ...(token && { Authorization: `Bearer ${token}` }) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new DeviceError({ message: "The device does not answer: is its daemon running?", code: "unreachable" });
  }
  if (!response.ok) throw new DeviceError((await response.json()).error);
  return response;
}

/**
 * @param {string} path
 * @returns {Promise<any>} the object there
 */
export async function get(path) {
  return (await request(path)).json();
}

/**
 * Write a text. To abort hangs up, which cancels the request.
 * @param {Record<string, string>} fields the request's, each as JSON
 * @param {AbortSignal} signal
 * @returns {AsyncGenerator<[string, any]>} events: `snapshot` or `message`, and the object it carries
 */
export async function* complete(fields, signal) {
  const all = { ...fields, stream: "true", snapshots: "true", stream_options: '{"include_usage": true}' };
  const members = Object.entries(all).map(([name, value]) => `${JSON.stringify(name)}: ${value}`);
  const headers = { "Content-Type": "application/json" };
  const body = `{${members.join(", ")}}`;
  const response = await request("/v1/completions", { method: "POST", headers, body, signal });
  for await (const [name, data] of events(response.body)) {
    if (data === "[DONE]") return;
    const message = JSON.parse(data);
    if (message.error) throw new DeviceError(message.error);
    yield [name, message];
  }
  throw new DeviceError({ message: "The device hung up before the text was whole.", code: "unreachable" });
}

/**
 * Server-sent events, as the daemon writes them: at most one line of each field.
 * @param {ReadableStream<Uint8Array> | null} body
 * @returns {AsyncGenerator<[string, string]>} names and data
 */
async function* events(body) {
  const reader = /** @type {ReadableStream<Uint8Array>} */ (body).getReader();
  const decoder = new TextDecoder();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + decoder.decode(value, { stream: true })).split("\n\n");
    rest = blocks.pop() ?? "";
    for (const block of blocks) {
      const fields = Object.fromEntries(block.split("\n").map((line) => line.split(/: (.*)/s)));
      yield [fields.event ?? "message", fields.data];
    }
  }
}
