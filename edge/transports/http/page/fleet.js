/** All devices of the broker, in a table that is kept up to date while somebody sees the page. */

import { get } from "./device.js";

/**
 * @typedef {object} Device one of them, as far as it was heard
 * @property {string} device
 * @property {string | null} state
 * @property {string | null} failure
 * @property {string | null} bundle
 * @property {string | null} version
 * @property {string | null} backend
 * @property {number | null} queued
 * @property {number | null} tokens_per_s
 * @property {number | null} watts
 * @property {number | null} seen_s_ago
 */

const REFRESH_MS = 2000;
const WELL = ["idle", "busy"];
const UNITS = /** @type {[number, string][]} */ ([[86400, "d"], [3600, "h"], [60, "min"]]);

const section = at("fleet");
const body = /** @type {HTMLTableSectionElement} */ (section.querySelector("tbody"));
let watched = false;

/** @param {string} id */
function at(id) {
  return /** @type {HTMLElement} */ (document.getElementById(id));
}

/** Show the section, and ask for the devices for as long as the page is open. A page that is not seen does not ask. */
export async function watchFleet() {
  if (watched) return;
  watched = true;
  section.hidden = false;
  for (;;) {
    if (!document.hidden) await get("/fleet").then(show, (error) => say(at("fleet-trouble"), error.message));
    await new Promise((resolve) => setTimeout(resolve, REFRESH_MS));
  }
}

/** @param {{broker: string, connected: boolean, left_out: boolean, devices: Device[]}} fleet */
function show({ broker, connected, left_out, devices }) {
  const there = devices.filter(({ state }) => [...WELL, "degraded"].includes(state ?? "")).length;
  const more = left_out ? ` More than ${devices.length}: the others are left out.` : "";
  say(at("fleet-count"), `${there} of ${devices.length} devices of ${broker} are there.${more}`);
  say(at("fleet-trouble"), connected ? "" : `The broker ${broker} is lost; these are the devices heard last.`);
  at("fleet-table").hidden = !devices.length;
  while (body.rows.length > devices.length) body.deleteRow(-1);
  devices.forEach((device, i) => fill(body.rows[i] ?? newRow(), device));
  const failures = devices.filter(({ failure }) => failure).map(({ device, failure }) => `${device}: ${failure}`);
  const list = at("failures");
  while (list.children.length > failures.length) list.lastElementChild?.remove();
  failures.forEach((failure, i) => say(list.children[i] ?? list.appendChild(document.createElement("li")), failure));
}

/** @returns {HTMLTableRowElement} the last one, empty */
function newRow() {
  const row = body.insertRow();
  const head = document.createElement("th");
  head.scope = "row";
  row.append(head);
  for (let i = 1; i < 9; i += 1) row.insertCell();
  return row;
}

/**
 * @param {HTMLTableRowElement} row
 * @param {Device} device
 */
function fill(row, { device, state, bundle, version, backend, queued, tokens_per_s, watts, seen_s_ago }) {
  const cells = [
    device,
    state,
    bundle,
    version,
    backend,
    queued,
    tokens_per_s?.toFixed(1),
    watts?.toFixed(1),
    seen_s_ago === null ? null : ago(seen_s_ago),
  ];
  cells.forEach((cell, i) => say(row.cells[i], String(cell ?? "–")));
  row.cells[1].className = WELL.includes(state ?? "idle") ? "" : "unwell";
}

/**
 * @param {number} seconds
 * @returns {string} in its largest unit
 */
function ago(seconds) {
  const [unit, name] = UNITS.find(([size]) => seconds >= size) ?? [1, "s"];
  return `${Math.floor(seconds / unit)} ${name} ago`;
}

/**
 * Change what an element says, unless it says so already: what stays is neither drawn nor read again.
 * @param {Element} element
 * @param {string} text
 */
function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}
