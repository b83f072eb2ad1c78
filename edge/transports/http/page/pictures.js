/** Pictures of a request: made small enough for a message, shown, and taken back. */

const SIDES = [512, 384, 256, 192, 128, 64];
const WHITE = "#fff";

/** Pictures that were chosen. */
export class Pictures {
  /**
   * @param {HTMLElement} list where they are shown
   * @param {HTMLElement} input where they are chosen; it has the focus after one is taken back
   * @param {number} most_bytes of each
   */
  constructor(list, input, most_bytes) {
    this.list = list;
    this.input = input;
    this.most_bytes = most_bytes;
    /** @type {string[]} */
    this.urls = [];
    list.replaceChildren();
  }

  /** @returns {string[]} each in base64, as a request carries it */
  get base64() {
    return this.urls.map((url) => url.slice(url.indexOf(",") + 1));
  }

  /** @param {File} file a picture of any kind that the browser reads */
  async add(file) {
    const url = await dataUrl(file, this.most_bytes);
    this.urls.push(url);
    const image = new Image();
    image.src = url;
    image.alt = file.name;
    const remove = document.createElement("button");
    remove.type = "button";
    remove.textContent = "Remove";
    remove.setAttribute("aria-label", `Remove ${file.name}`);
    const item = document.createElement("li");
    item.append(image, remove);
    remove.addEventListener("click", () => {
      this.urls.splice(this.urls.indexOf(url), 1);
      item.remove();
      this.input.focus();
    });
    this.list.append(item);
  }
}

/**
 * A picture as JPEG on white, as large as may be.
 * @param {File} file
 * @param {number} most_bytes
 * @returns {Promise<string>} a data URL
 */
async function dataUrl(file, most_bytes) {
  const bitmap = await createImageBitmap(file).catch(() => {
    throw new Error(`${file.name} is no picture that this browser can read.`);
  });
  for (const side of SIDES) {
    const scale = Math.min(1, side / Math.max(bitmap.width, bitmap.height));
    const canvas = document.createElement("canvas");
    canvas.width = Math.max(1, Math.round(bitmap.width * scale));
    canvas.height = Math.max(1, Math.round(bitmap.height * scale));
    const paint = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
    paint.fillStyle = WHITE; // where it is transparent: JPEG would show black
    paint.fillRect(0, 0, canvas.width, canvas.height);
    paint.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
    const url = canvas.toDataURL("image/jpeg", 0.9);
    if ((url.length * 3) / 4 <= most_bytes) return url;
  }
  throw new Error(`${file.name} cannot be made small enough.`);
}
