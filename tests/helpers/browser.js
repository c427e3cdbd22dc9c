{
  // What is wrong with the page, by demand: an empty object where nothing is.
  wrong(contrast) {
    const all = (selector) => [...document.querySelectorAll(selector)];
    const start = (one) => one.outerHTML.slice(0, 160);
    const found = {
      "a control has no name": all("a, button, input, select, textarea, summary")
        .filter((one) => !(one.getAttribute("aria-label") || one.textContent).trim()).map(start),
      "a picture has no text": all("img:not([alt]), img[alt=''], svg:not([aria-label])").map(start),
      "a picture is not loaded": [...document.images]
        .filter((one) => !(one.complete && one.naturalWidth > 0)).map(start),
      "headings skip a level": this.skipped(all("h1, h2, h3, h4, h5, h6").map((one) => Number(one.tagName[1]))),
      "text is faint": this.faint(contrast),
      "the page is wider than the screen": this.tooWide(all("body *")),
    };
    return Object.fromEntries(Object.entries(found).filter(([, list]) => list.length));
  },

  skipped(levels) {
    const wrong = levels.filter((level, i) => level > (i ? levels[i - 1] : 0) + 1).map((level) => `h${level}`);
    return levels.filter((level) => level === 1).length === 1 ? wrong : [...wrong, "not one h1"];
  },

  // The contrast of WCAG 2.1 of every text that is shown with what is behind it.
  faint(least) {
    const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    const known = {};
    const rgba = (colour) => {
      if (!known[colour]) {
        canvas.clearRect(0, 0, 1, 1);
        canvas.fillStyle = colour;
        canvas.fillRect(0, 0, 1, 1);
        known[colour] = [...canvas.getImageData(0, 0, 1, 1).data];
      }
      return known[colour];
    };
    const linear = (value) => (value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
    const luminance = (colour) => {
      const [r, g, b] = colour.slice(0, 3).map((value) => linear(value / 255));
      return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const behind = (one) => {
      for (let at = one; at; at = at.parentElement) {
        const colour = rgba(getComputedStyle(at).backgroundColor);
        if (colour[3] === 255) return colour;
      }
      return [255, 255, 255, 255];
    };
    const faint = new Set();
    const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (texts.nextNode()) {
      const one = texts.currentNode.parentElement;
      if (!texts.currentNode.data.trim() || !one.checkVisibility() || one.matches("script, style")) continue;
      const style = getComputedStyle(one);
      const lights = [rgba(one.closest("svg") ? style.fill : style.color), behind(one)].map(luminance);
      const contrast = (Math.max(...lights) + 0.05) / (Math.min(...lights) + 0.05);
      if (contrast < least) faint.add(`${contrast.toFixed(2)} ${one.outerHTML.slice(0, 160)}`);
    }
    return [...faint];
  },

  tooWide(elements) {
    const root = document.documentElement, width = root.clientWidth;
    if (root.scrollWidth <= width) return [];
    const beyond = elements.filter((one) => one.getBoundingClientRect().right > width + 1 && !one.closest(".scroll"));
    return [`${root.scrollWidth} pixels`, ...beyond.map((one) => one.outerHTML.slice(0, 160))];
  },

  // The texts of a column; a cell that spans columns is in each of them.
  column(table, place) {
    const rows = [...document.querySelectorAll("table.sortable")[table].tBodies[0].rows];
    const texts = (cell) => Array(cell.colSpan).fill(cell.textContent.trim());
    return rows.map((row) => [...row.cells].flatMap(texts)[place]);
  },
}
