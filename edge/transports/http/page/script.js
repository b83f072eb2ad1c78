"use strict";

const form = document.getElementById("ask");
const prompt = document.getElementById("prompt");
const token = document.getElementById("token");
const text = document.getElementById("text");
const problem = document.getElementById("error");
let running = null;

// Server-sent events of a response: [name, data] each.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const fields = Object.fromEntries(block.split("\n").map((line) => line.split(/: (.*)/s)));
      yield [fields.event ?? "message", fields.data];
    }
  }
}

function show(parts) {
  text.replaceChildren(...parts.map((part) => {
    const span = document.createElement("span");
    span.textContent = part.text;
    if (part.draft) span.className = "draft";
    return span;
  }));
}

async function ask() {
  running?.abort();
  running = new AbortController();
  problem.textContent = "";
  const headers = { "Content-Type": "application/json" };
  if (token.value) headers.Authorization = `Bearer ${token.value}`;
  const body = JSON.stringify({ prompt: prompt.value, stream: true, snapshots: true });
  const response = await fetch("/v1/completions", { method: "POST", headers, body, signal: running.signal });
  if (!response.ok) {
    token.parentElement.hidden &&= response.status !== 401;
    throw new Error((await response.json()).error.message);
  }
  let written = prompt.value;
  for await (const [name, data] of events(response)) {
    if (data === "[DONE]") break;
    const message = JSON.parse(data);
    if (message.error) throw new Error(message.error.message);
    if (name === "snapshot") {
      show(message.parts);
      continue;
    }
    written += message.choices[0]?.text ?? "";
    if (message.choices[0]?.finish_reason) show([{ text: written }]);
  }
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  ask().catch((error) => {
    if (error.name !== "AbortError") problem.textContent = error.message;
  });
});
