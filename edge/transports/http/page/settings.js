/** The form's settings: made from what the daemon takes, and from what its bundle does unless told. */

/**
 * @typedef {object} Schema a JSON schema, as far as it is used here
 * @property {Schema[]} [anyOf]
 * @property {string} [type]
 * @property {string[]} [enum]
 * @property {number} [minimum]
 * @property {number} [exclusiveMinimum]
 * @property {number} [maximum]
 *
 * @typedef {object} Field
 * @property {string} name
 * @property {string} label
 * @property {string} [decoder] the one that alone has it
 * @property {string} [unset] what holds where it is left out, where that is no value of the bundle's
 * @property {boolean} [limited] whether the bundle's limits have a highest value, 0 where it lacks the setting
 */

/** @type {Field[]} */
const FIELDS = [
  { name: "temperature", label: "Temperature" },
  { name: "top_p", label: "Top p" },
  { name: "top_k", label: "Top k", limited: true },
  { name: "max_tokens", label: "Most tokens", unset: "to the end" },
  { name: "seed", label: "Seed", unset: "random" },
  { name: "window", label: "Drafts in a pass", decoder: "blocks", limited: true },
  { name: "guidance", label: "Guidance", decoder: "blocks" },
  { name: "steps", label: "Steps", decoder: "canvas", limited: true },
  { name: "selection", label: "Selection", decoder: "canvas" },
  { name: "threshold", label: "Threshold", decoder: "canvas", unset: "off" },
  { name: "entropy_bound", label: "Entropy bound", decoder: "canvas", unset: "off" },
];
const NUMBER = /^-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?$/;

/** The settings of one device. */
export class Settings {
  /**
   * @param {HTMLElement} place where the fields go
   * @param {any} model as `/v1/models` tells of it
   * @param {Record<string, Schema>} schemas of a request's fields
   */
  constructor(place, model, schemas) {
    this.model = model;
    this.fields = FIELDS.filter((field) => isOffered(field, model, schemas)).map((field) => {
      const schema = schemas[field.name];
      const bounds = schema.anyOf?.find(({ type }) => type !== "null") ?? schema;
      const highest = field.limited ? model.limits[field.name] : bounds.maximum;
      const input = bounds.enum ? choiceOf(bounds.enum) : document.createElement("input");
      input.id = field.name;
      input.autocomplete = "off";
      return { ...field, input, box: labelled(input, field.label, boundsText(bounds, highest)) };
    });
    place.replaceChildren(...this.fields.map(({ box }) => box));
    this.show(model.decoders[0]);
  }

  /**
   * Show the settings that a decoder has, with the bundle's defaults for it.
   * @param {string} decoder
   */
  show(decoder) {
    this.decoder = decoder;
    const { top_k, guidance } = this.model.limits;
    const defaults = { top_k, guidance, ...this.model[decoder] };
    for (const { name, decoder: only, unset, input, box } of this.fields) {
      box.hidden = only !== undefined && only !== decoder;
      const usual = unset ?? String(defaults[name]);
      if (input instanceof HTMLSelectElement) input.options[0].text = usual;
      else input.placeholder = usual;
    }
  }

  /** @returns {boolean} whether drafts are made unless `window` says otherwise */
  get drafts() {
    return this.decoder === "blocks" && this.model.blocks.window > 0;
  }

  /** @returns {Record<string, string>} what is set, as JSON: numbers as typed; the daemon says what is wrong with others */
  get values() {
    /** @type {Record<string, string>} */
    const values = {};
    for (const { name, input, box } of this.fields) {
      const text = input.value.trim();
      if (text && !box.hidden) values[name] = NUMBER.test(text) ? text : JSON.stringify(text);
    }
    if (this.decoder !== this.model.decoders[0]) values.decode = JSON.stringify(this.decoder);
    return values;
  }
}

/**
 * @param {Field} field
 * @param {any} model
 * @param {Record<string, Schema>} schemas
 * @returns {boolean} whether this bundle on this device has it
 */
function isOffered({ name, decoder, limited }, model, schemas) {
  if (name === "guidance" && !model.limits.words && !model.limits.images) return false;
  return name in schemas && (!decoder || model.decoders.includes(decoder)) && (!limited || model.limits[name] > 0);
}

/**
 * @param {string[]} values
 * @returns {HTMLSelectElement} the first of its options is to be the default
 */
function choiceOf(values) {
  const select = document.createElement("select");
  select.append(new Option("", ""), ...values.map((value) => new Option(value)));
  return select;
}

/**
 * @param {Schema} bounds
 * @param {number | undefined} highest
 * @returns {string} "0 to 3", "above 0, to 1"
 */
function boundsText({ minimum, exclusiveMinimum, maximum }, highest = maximum) {
  const from = minimum ?? exclusiveMinimum;
  if (from === undefined) return "";
  if (highest === undefined || highest > Number.MAX_SAFE_INTEGER) return `from ${from}`;
  return minimum === undefined ? `above ${from}, to ${highest}` : `${from} to ${highest}`;
}

/**
 * @param {HTMLInputElement | HTMLSelectElement} input with an id
 * @param {string} text
 * @param {string} bounds
 * @returns {HTMLElement} label, input and bounds
 */
function labelled(input, text, bounds) {
  const box = document.createElement("div");
  const label = document.createElement("label");
  label.htmlFor = input.id;
  label.textContent = text;
  box.append(label, input);
  if (!bounds) return box;
  const hint = document.createElement("p");
  hint.className = "hint";
  hint.id = `${input.id}-hint`;
  hint.textContent = bounds;
  input.setAttribute("aria-describedby", hint.id);
  box.append(hint);
  return box;
}
