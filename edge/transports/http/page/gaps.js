/** Text with gaps: what was given of it, and what was written. */

const GAP = /___(?::(\d+))?/;

/** @typedef {string | {gap: number | null}} Segment a text, or a gap of so many tokens */

/**
 * "Tom had a ___ and it was ___:6." as segments.
 * @param {string} text
 * @returns {Segment[]} the text alone where it has no gap
 */
export function segmentsOf(text) {
  const pieces = text.split(GAP); // text, size, text, size, …, text
  /** @type {Segment[]} */
  const segments = pieces.map((piece, i) => (i % 2 ? { gap: piece ? Number(piece) : null } : piece));
  return segments.filter((segment) => segment !== "");
}

/**
 * Where the given texts stand in a whole one.
 * @param {Segment[]} segments
 * @param {string} text
 * @returns {[number, number][] | null} first and end of each; null where they can be found in more ways than one
 */
export function givenRanges(segments, text) {
  const first = places(segments, text, false);
  const last = places(segments, text, true);
  return first && last && first.every(([from], i) => from === last[i][0]) ? first : null;
}

/**
 * The same, searched from the left or from the right. A text at either end of the segments stands at that end.
 * @param {Segment[]} segments
 * @param {string} text
 * @param {boolean} backward
 * @returns {[number, number][] | null}
 */
function places(segments, text, backward) {
  const order = backward ? [...segments].reverse() : segments;
  /** @type {[number, number][]} */
  const found = [];
  let at = backward ? text.length : 0;
  for (const [i, segment] of order.entries()) {
    if (typeof segment !== "string") continue;
    const near = backward ? at - segment.length : at;
    const far = backward ? 0 : text.length - segment.length;
    const adjacent = i === 0 || typeof order[i - 1] === "string";
    const search = backward ? text.lastIndexOf(segment, near) : text.indexOf(segment, near);
    const from = adjacent ? near : i === order.length - 1 ? far : search;
    if (from < 0 || (backward ? from > near : from < near) || !text.startsWith(segment, from)) return null;
    found.push([from, from + segment.length]);
    at = backward ? from : from + segment.length;
  }
  return backward ? found.reverse() : found;
}
