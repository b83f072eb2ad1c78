/** One text on the page, while it is written and after. */

import { givenRanges } from "./gaps.js";

/**
 * @typedef {{text: string, draft?: boolean}} Part a piece of a snapshot
 * @typedef {object} Snapshot how far a text is
 * @property {Part[]} parts
 * @property {number} step passes so far
 * @property {number} masked open places
 * @property {string} [appended] by blocks, what a prompt's text has grown by
 * @property {number} [at_ms] when it came
 *
 * @typedef {{tokens: number, passes: number, ms: number, seed: string}} Cost what a text took to write
 */

const OPEN = "░";
const REPLAY_MS = 300;
const MOST_SNAPSHOTS = 1000;
const MOST_BEHIND = 10;

/** A text with a heading and its figures. */
export class Story {
  /**
   * @param {string} title
   * @param {import("./gaps.js").Segment[]} segments what was given
   */
  constructor(title, segments) {
    this.segments = segments;
    /** @type {Snapshot[]} */
    this.snapshots = [];
    /** @type {Snapshot[]} that were not drawn yet */
    this.waiting = [];
    this.drawn = Promise.resolve();
    this.text = "";
    this.heading = element("h2", "", title);
    this.figures = element("dl", "figures");
    this.body = element("p", "text");
    this.article = element("article", "");
    this.article.append(this.heading, this.figures, this.body);
    this.article.setAttribute("aria-busy", "true");
    this.show([{ text: segments.map((s) => (typeof s === "string" ? s : OPEN.repeat(s.gap ?? 1))).join("") }]);
  }

  /** @param {Snapshot} snapshot how far it is */
  advance(snapshot) {
    snapshot.at_ms = performance.now();
    if (this.snapshots.length < MOST_SNAPSHOTS) this.snapshots.push(snapshot);
    if (this.waiting.push(snapshot) === 1) this.drawn = this.draw();
  }

  /** Show what came, each for a frame at least: several may come between two of them. */
  async draw() {
    while (this.waiting.length) {
      await frame();
      this.waiting = this.waiting.slice(-MOST_BEHIND);
      this.show(this.waiting[0].parts);
      this.tell(progressOf(this.waiting[0], this.snapshots[0]));
      this.waiting.shift();
    }
    await frame();
  }

  /**
   * @param {string} text
   * @param {Cost} cost
   */
  finish(text, cost) {
    this.text = text;
    this.cost = cost;
    this.show([{ text }]);
    this.tell(figuresOf(cost));
    this.end();
  }

  /** Nothing more comes: what is committed stays. */
  end() {
    this.article.setAttribute("aria-busy", "false");
  }

  /**
   * Show the snapshots again, slowly.
   * @param {AbortSignal} signal
   */
  async replay(signal) {
    for (const snapshot of this.snapshots) {
      this.show(snapshot.parts);
      this.tell(progressOf(snapshot, this.snapshots[0]));
      await pause(REPLAY_MS, signal);
      if (signal.aborted) break;
    }
    if (this.cost) this.finish(this.text, this.cost);
  }

  /** @param {Part[]} parts what is committed, drafted and open, in its order */
  show(parts) {
    const given = givenRanges(this.segments, parts.map(({ text }) => text).join("")) ?? [];
    /** @type {HTMLElement[]} */
    const spans = [];
    let at = 0;
    for (const { text, draft } of parts) {
      for (const piece of text.split(/(░+)/).filter(Boolean)) {
        if (piece[0] === OPEN) spans.push(element("span", "open", piece));
        else if (draft) spans.push(element("span", "draft", piece));
        else spans.push(...split(piece, at, given));
        at += piece.length;
      }
    }
    this.body.replaceChildren(...spans);
  }

  /** @param {[string, string][]} figures label and value of each */
  tell(figures) {
    this.figures.replaceChildren(
      ...figures.map(([label, value]) => {
        const group = element("div", label === "seed" ? "minor" : "");
        group.append(element("dt", "", label), element("dd", "", value));
        return group;
      }),
    );
  }
}

/**
 * Committed text, apart what was given and what was written.
 * @param {string} text
 * @param {number} at where it stands in the whole
 * @param {[number, number][]} given
 * @returns {HTMLElement[]}
 */
function split(text, at, given) {
  const cuts = given.flat().map((place) => Math.min(Math.max(place - at, 0), text.length));
  const edges = [0, ...cuts, text.length];
  return edges.slice(1).flatMap((end, i) => {
    const piece = text.slice(edges[i], end);
    return piece ? [element("span", i % 2 ? "given" : "written", piece)] : [];
  });
}

/**
 * @param {Snapshot} snapshot
 * @param {Snapshot} first of the same text
 * @returns {[string, string][]}
 */
function progressOf({ step, masked, appended, at_ms = 0 }, first) {
  /** @type {[string, string][]} */
  const figures = [["passes", String(step)]];
  // A prompt's text by blocks: every place that is no longer open is a token, and the open ones are mere room.
  if (typeof appended !== "string") figures.push(["places open", String(masked)]);
  else if (step > first.step) figures.push(...rates(first.masked - masked, step - first.step, at_ms - (first.at_ms ?? 0)));
  return figures;
}

/**
 * @param {number} tokens
 * @param {number} passes that made them
 * @param {number} ms
 * @returns {[string, string][]}
 */
function rates(tokens, passes, ms) {
  return [
    ["tokens per pass", (tokens / passes).toFixed(2)],
    ["tokens/s", ((tokens / ms) * 1000).toFixed(0)],
  ];
}

/**
 * @param {Cost} cost
 * @returns {[string, string][]}
 */
function figuresOf({ tokens, passes, ms, seed }) {
  return [
    ["tokens", String(tokens)],
    ["passes", String(passes)],
    ...rates(tokens, passes, ms),
    ["seed", seed],
  ];
}

/** @returns {Promise<void>} when the browser is about to draw; at once while nobody sees it */
function frame() {
  return new Promise((resolve) => {
    const drawn = () => {
      document.removeEventListener("visibilitychange", drawn);
      resolve();
    };
    document.addEventListener("visibilitychange", drawn);
    if (document.hidden) drawn();
    else requestAnimationFrame(drawn);
  });
}

/**
 * @param {number} ms
 * @param {AbortSignal} signal ends it early
 * @returns {Promise<void>}
 */
function pause(ms, signal) {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, ms);
    signal.addEventListener("abort", () => resolve(clearTimeout(timer)), { once: true });
  });
}

/**
 * @param {string} tag
 * @param {string} style its class
 * @param {string} [text]
 * @returns {HTMLElement}
 */
function element(tag, style, text = "") {
  const made = document.createElement(tag);
  if (style) made.className = style;
  made.textContent = text;
  return made;
}
