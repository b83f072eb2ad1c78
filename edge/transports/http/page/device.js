/** Requests to the daemon that served this page, and the events it answers with. */

const TOKEN = "token";
const CUT_OFF = "The device hung up before the text was whole.";

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
 * @returns {Promise<Response>} also one that refuses
 */
async function send(path, options = {}) {
  const token = sessionStorage.getItem(TOKEN);
  const headers = { ...options.headers, ...(token && { Authorization: `Bearer ${token}` }) };
  try {
    return await fetch(path, { ...options, headers });
  } catch (error) {
    throw lost(error, "The device does not answer: is its daemon running?");
  }
}

/**
 * @param {any} error what the browser says of a broken connection
 * @param {string} message what is said instead
 * @returns {Error} the browser's own where the request was aborted
 */
function lost(error, message) {
  return error.name === "AbortError" ? error : new DeviceError({ message, code: "unreachable" });
}

/**
 * @param {Response} response
 * @param {any} body null where it is no JSON
 * @returns {DeviceError}
 */
function refusal(response, body) {
  const message = `What answers here is not the device's daemon: HTTP status ${response.status}.`;
  return new DeviceError(body?.error ?? { message, code: "unreachable" });
}

/**
 * @param {string} path
 * @returns {Promise<any>} the object there; of `/health` also that of a device that is out of service
 */
export async function get(path) {
  const response = await send(path);
  const body = await response.json().catch(() => null);
  if (body === null || body.error) throw refusal(response, body);
  return body;
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
  const response = await send("/v1/completions", { method: "POST", headers, body, signal });
  if (!response.ok) throw refusal(response, await response.json().catch(() => null));
  for await (const [name, data] of events(response.body)) {
    if (data === "[DONE]") return;
    const message = JSON.parse(data);
    if (message.error) throw new DeviceError(message.error);
    yield [name, message];
  }
  throw new DeviceError({ message: CUT_OFF, code: "unreachable" });
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
    const { value, done } = await reader.read().catch((error) => {
      throw lost(error, CUT_OFF);
    });
    if (done) return;
    const blocks = (rest + decoder.decode(value, { stream: true })).split("\n\n");
    rest = blocks.pop() ?? "";
    for (const block of blocks) {
      const fields = Object.fromEntries(block.split("\n").map((line) => line.split(/: (.*)/s)));
      yield [fields.event ?? "message", fields.data];
    }
  }
}
