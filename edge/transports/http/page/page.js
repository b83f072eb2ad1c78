/** The page: what is asked, what comes of it, and what is said. */

import { complete, get, keepToken } from "./device.js";
import { watchFleet } from "./fleet.js";
import { segmentsOf } from "./gaps.js";
import { Pictures } from "./pictures.js";
import { Settings } from "./settings.js";
import { Story } from "./story.js";

const ask = /** @type {HTMLFormElement} */ (at("ask"));
const unlock = /** @type {HTMLFormElement} */ (at("unlock"));
const prompt = /** @type {HTMLTextAreaElement} */ (at("prompt"));
const token = /** @type {HTMLInputElement} */ (at("token"));
const words = /** @type {HTMLInputElement} */ (at("words"));
const images = /** @type {HTMLInputElement} */ (at("images"));

/** @type {Settings} */
let settings;
/** @type {Pictures} */
let pictures;
/** @type {AbortController | null} */
let running = null;
/**
 * The text that stands there, and the same without drafts once it was asked for. drafted: whether it was drafted.
 * @type {{stories: Story[], fields: Record<string, string>, drafted: boolean} | null}
 */
let last = null;

/** @param {string} id */
function at(id) {
  return /** @type {HTMLElement} */ (document.getElementById(id));
}

/** Learn what the device takes, and make the form of it; without a token that it wants, ask for that. */
async function connect() {
  const [{ data }, { components, paths }, { backend, state, failure }] = await Promise.all(
    ["/v1/models", "/openapi.json", "/health"].map(get),
  );
  const [model] = data;
  settings = new Settings(at("settings"), model, components.schemas.CompletionRequest.properties);
  const trouble = ["idle", "busy"].includes(state) ? [] : [state, failure];
  at("device").textContent = [model.id, backend, ...trouble].filter(Boolean).join(" · ");
  offerDecoders(model.decoders);
  offerConditions(model.limits);
  choose(model.decoders[0]);
  unlock.hidden = true;
  ask.hidden = false;
  prompt.focus();
  if ("/fleet" in paths) watchFleet();
}

/** @param {string[]} decoders what the device writes by, its default first */
function offerDecoders(decoders) {
  /** @type {Record<string, string>} */
  const names = { blocks: "from the left", canvas: "everywhere at once" };
  at("decode").hidden = decoders.length < 2;
  at("decode").replaceChildren(
    at("decode").children[0],
    ...decoders.map((decoder, i) => {
      const label = document.createElement("label");
      const radio = document.createElement("input");
      Object.assign(radio, { type: "radio", name: "decode", value: decoder, checked: i === 0 });
      radio.addEventListener("change", () => choose(decoder));
      label.append(radio, names[decoder] ?? decoder);
      return label;
    }),
  );
}

/** @param {string} decoder what is to write */
function choose(decoder) {
  settings.show(decoder);
  const { words, images } = settings.model.limits;
  at("conditions").hidden = decoder !== "blocks" || !(words || images);
}

/** @param {{words: number, images: number, image_bytes: number, message_bytes: number}} limits of the device */
function offerConditions(limits) {
  at("words-field").hidden = !limits.words;
  at("images-field").hidden = !limits.images;
  at("words-hint").textContent = `At most ${limits.words}, with commas between them.`;
  at("images-hint").textContent = `At most ${limits.images}; they are made small here, before they are sent.`;
  const share = limits.message_bytes / 2 / limits.images; // half of the message is left for text; base64 takes 4/3
  pictures = new Pictures(at("pictures"), images, Math.min(limits.image_bytes, (share * 3) / 4));
}

/**
 * @param {import("./gaps.js").Segment[]} segments with at least one gap, unless they are a prompt
 * @returns {Record<string, string>} the request, each field as JSON
 */
function asked(segments) {
  const fields = settings.values;
  if (segments.some((segment) => typeof segment !== "string")) fields.segments = JSON.stringify(segments);
  else fields.prompt = JSON.stringify(prompt.value);
  if (at("conditions").hidden) return fields;
  const named = words.value.split(",").map((word) => word.trim()).filter(Boolean);
  if (named.length) fields.words = JSON.stringify(named);
  if (pictures.urls.length) fields.images = JSON.stringify(pictures.base64);
  return fields;
}

/**
 * Write a text into a story, until it is whole or stopped.
 * @param {Story} story
 * @param {Record<string, string>} fields
 * @param {AbortSignal} signal
 */
async function write(story, fields, signal) {
  let text = fields.prompt ? JSON.parse(fields.prompt) : ""; // with gaps the whole text comes back
  /** @type {any} */
  let end;
  for await (const [name, message] of complete(fields, signal)) {
    if (name === "snapshot") story.advance(message);
    else if (message.usage) {
      const { completion_tokens: tokens, steps: passes } = message.usage;
      const ms = end.timing.total_ms - end.timing.queue_ms;
      await story.drawn;
      story.finish(text, { tokens, passes, ms, seed: fields.seed ?? String(end.seed) });
    } else {
      text += message.choices[0].text;
      end = message;
    }
  }
}

/**
 * Do something that can be stopped, and say how it went.
 * @param {string} doing said while it goes on
 * @param {(signal: AbortSignal) => Promise<void>} task
 */
async function perform(doing, task) {
  running = new AbortController();
  complain(null);
  progress(doing, true);
  try {
    await task(running.signal);
    progress("Done.", false);
  } catch (error) {
    progress(error.name === "AbortError" ? "Stopped." : "", false);
    if (error.name !== "AbortError") complain(error);
  } finally {
    running = null;
  }
}

/**
 * Write a text on the page.
 * @param {string} doing
 * @param {Story} story
 * @param {Record<string, string>} fields
 */
async function tell(doing, story, fields) {
  at("verdict").textContent = "";
  at("stories").append(story.article);
  story.article.scrollIntoView({ block: "nearest" });
  await perform(doing, (signal) => write(story, fields, signal));
  story.end();
  if (!story.snapshots.length && !story.cost) story.article.remove();
}

/**
 * @param {string} text what is going on, for eyes and screen readers
 * @param {boolean} busy whether something is that can be stopped
 */
function progress(text, busy) {
  at("status").textContent = text;
  at("write").textContent = busy ? "Stop" : "Write";
  const whole = last?.stories[0].cost !== undefined;
  at("after").hidden = !whole;
  at("compare").hidden = !whole || !last?.drafted;
  for (const id of ["replay", "compare"]) at(id).setAttribute("aria-disabled", String(busy));
}

/** @param {any} error shown as one sentence, at the field that it names if there is one; null: none */
function complain(error) {
  at("error").textContent = error?.message ?? "";
  for (const field of document.querySelectorAll("[aria-invalid]")) field.removeAttribute("aria-invalid");
  const field = error?.param && document.getElementById(error.param);
  if (field) {
    field.setAttribute("aria-invalid", "true");
    field.closest("details")?.setAttribute("open", "");
  }
  if (error?.code === "unauthorized") {
    ask.hidden = true;
    unlock.hidden = false;
    token.focus();
  }
}

ask.addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) {
    running.abort();
    return;
  }
  const segments = segmentsOf(prompt.value);
  const fields = asked(segments);
  const story = new Story("Text", fields.segments ? segments : [...segments, { gap: null }]);
  last = { stories: [story], fields, drafted: settings.drafts && fields.window !== "0" };
  at("stories").replaceChildren();
  tell("Writing…", story, fields);
});

at("compare").addEventListener("click", async () => {
  const [drafted, earlier] = last?.stories ?? [];
  if (running || !last || !drafted?.cost) return;
  const { passes, seed } = drafted.cost;
  const story = new Story("Without drafts", drafted.segments);
  drafted.heading.textContent = "With drafts";
  earlier?.article.remove();
  last.stories = [drafted, story];
  await tell("Writing the same text without drafts…", story, { ...last.fields, seed, window: "0" });
  if (!story.cost) return;
  const same = story.text === drafted.text ? "Both texts are the same" : "The texts differ";
  at("verdict").textContent = `${same}: ${passes} passes with drafts, ${story.cost.passes} without.`;
});

at("replay").addEventListener("click", () => {
  if (running || !last) return;
  const { stories } = last;
  perform("Replaying…", async (signal) => {
    await Promise.all(stories.map((story) => story.replay(signal)));
  });
});

images.addEventListener("change", async () => {
  complain(null);
  for (const file of images.files ?? []) await pictures.add(file).catch(complain);
  images.value = "";
});

unlock.addEventListener("submit", (event) => {
  event.preventDefault();
  keepToken(token.value);
  complain(null);
  connect().catch((error) => {
    keepToken("");
    complain(error);
    if (error.code === "unauthorized") at("error").textContent = "This is not the token of this device.";
  });
});

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !running && !ask.hidden) ask.requestSubmit();
});

connect().catch((error) => {
  complain(error);
  if (error.code === "unauthorized") at("error").textContent = "";
});
