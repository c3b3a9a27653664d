// Draws every figure of the page in the colours of the reader's theme, and again when the theme or the width changes.
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
  const themed = (value) => {
    if (typeof value === "string" && value.startsWith("var:")) {
      const [name, alpha] = value.slice(4).split("/");
      return alpha ? colour(name) + alpha : colour(name);
    }
    if (Array.isArray(value)) return value.map(themed);
    if (value && typeof value === "object") return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, themed(v)]));
    return value;
  };
  const base = () => ({
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", autosize: true,
    font: { color: colour("ink"), family: "system-ui, sans-serif", size: 12 },
    margin: { l: 62, r: 16, t: 44, b: 84 }, legend: { orientation: "h", y: -0.3, yanchor: "top" }, hoverlabel: { align: "left" },
  });
  const axis = (given) => ({ gridcolor: colour("grid"), linecolor: colour("line"), zeroline: false, automargin: true, ...given });
  const draw = () => Object.entries(figures).forEach(([id, figure]) => {
    const place = document.getElementById(id);
    if (!place) return;
    const layout = { ...base(), ...themed(figure.layout) };
    layout.title = { font: { size: place.clientWidth < 500 ? 13 : 16 }, ...layout.title };
    Object.keys(layout).filter((key) => /^[xy]axis/.test(key)).forEach((key) => { layout[key] = axis(layout[key]); });
    Plotly.react(place, themed(figure.data), layout, { responsive: true, displayModeBar: false });
  });
  draw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  // On paper: light colours, a sheet's width, everything unfolded; the screen gets its own back.
  let folded = [];
  addEventListener("beforeprint", () => {
    document.documentElement.classList.add("paper");
    folded = [...document.querySelectorAll("section > details:not([open])")];
    folded.forEach((part) => { part.open = true; });
    draw();
  });
  addEventListener("afterprint", () => {
    document.documentElement.classList.remove("paper");
    folded.forEach((part) => { part.open = false; });
    draw();
  });
  document.documentElement.dataset.drawn = Object.keys(figures).length;
})();
