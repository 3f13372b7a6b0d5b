// Words about what is wrong with what is shown just now: contrast by WCAG 2.2, font size, width, images, headings, charts.
() => {
  const faults = [];
  const shown = element => {
    const box = element.getBoundingClientRect();  // 1 pixel: for screen readers only
    return box.width > 1 && box.height > 1 && element.checkVisibility({checkVisibilityCSS: true, checkOpacity: true});
  };
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
  const rgba = colour => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    const [red, green, blue, alpha] = canvas.getImageData(0, 0, 1, 1).data;
    return [red, green, blue, alpha / 255];
  };
  const over = (above, below) => below.map((part, i) => i < 3 ? above[i] * above[3] + part * (1 - above[3]) : 1);
  const ground = element => {
    if (!element) return rgba("white");
    const own = rgba(getComputedStyle(element).backgroundColor);
    return own[3] === 1 ? own : over(own, ground(element.parentElement));
  };
  const opacity = element => element ? getComputedStyle(element).opacity * opacity(element.parentElement) : 1;
  const luminance = colour => colour.slice(0, 3).map(part => part / 255)
    .map(part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
    .reduce((sum, part, i) => sum + part * [0.2126, 0.7152, 0.0722][i], 0);

  const words = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (words.nextNode()) {
    const text = words.currentNode.data.trim(), element = words.currentNode.parentElement;
    if (!text || !shown(element) || element.closest("script, style, noscript")) continue;
    const style = getComputedStyle(element), behind = ground(element);
    const colour = rgba(element instanceof SVGElement ? style.fill : style.color);
    colour[3] *= opacity(element);
    const [low, high] = [luminance(over(colour, behind)), luminance(behind)].sort((a, b) => a - b);
    const contrast = (high + 0.05) / (low + 0.05);
    if (contrast < 4.5) faults.push(`contrast ${contrast.toFixed(2)}: ${text.slice(0, 60)}`);
    if (parseFloat(style.fontSize) < 12) faults.push(`font of ${style.fontSize}: ${text.slice(0, 60)}`);
  }

  const {scrollWidth, clientWidth} = document.documentElement;
  if (scrollWidth > clientWidth) faults.push(`width ${scrollWidth}, the window has ${clientWidth}`);

  for (const image of document.images) {
    if (!image.alt.trim()) faults.push(`no alt text: ${image.src.slice(0, 60)}`);
    if (shown(image) && !image.naturalWidth) faults.push(`image not loaded: ${image.alt}`);
  }

  let level = 0;
  for (const heading of [...document.querySelectorAll("h1, h2, h3, h4, h5, h6")].filter(shown)) {
    const next = Number(heading.tagName[1]);
    if (next > level + 1 || (next === 1 && level > 0)) faults.push(`h${next} after h${level}: ${heading.textContent}`);
    level = next;
  }

  for (const chart of [...document.querySelectorAll("figure[data-chart]")].filter(shown)) {
    const marks = [...chart.querySelectorAll("svg .overplot > .xy .trace path")];  // without the lines that mark events
    const drawn = marks.some(mark => (mark.getAttribute("d") ?? "").length > 4);
    if (!drawn) faults.push(`empty chart: ${chart.dataset.chart}`);
  }
  return faults;
}
