// Unpacks the plotting library that the page carries, and draws its figures in the colours of the page.
(async () => {
  "use strict";
  const places = [...document.querySelectorAll(".figure")];
  if (!places.length) return;
  const packed = document.getElementById("plotly").textContent.trim();
  try {
    const bytes = Uint8Array.from(atob(packed), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script);
  } catch (error) {
    for (const place of places) place.textContent = "This browser cannot unpack the drawings; the tables have the figures.";
    return;
  }

  const dark = matchMedia("(prefers-color-scheme: dark)");
  const narrow = () => innerWidth < 640;
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  function surroundings(layout) {
    const ink = colour("--ink"), soft = colour("--soft"), line = colour("--line"), card = colour("--card");
    const changed = {
      ...layout,
      autosize: true,
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: soft },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      margin: { l: narrow() ? 50 : 64, r: 16, t: 30, b: 48 },
      hoverlabel: { bgcolor: card, bordercolor: line, font: { color: ink }, namelength: -1 },
      hovermode: layout.hovermode || "closest",
      showlegend: true,
      legend: { orientation: "h", x: 0, y: -0.16 * (360 / layout.height), yanchor: "top", font: { color: ink } },
      annotations: narrow() ? [] : (layout.annotations || []).map((label) => ({ ...label, font: { color: soft, size: 11 } })),
    };
    for (const key of Object.keys(layout).filter((key) => /^[xy]axis/.test(key))) {
      const axis = layout[key];
      changed[key] = { gridcolor: line, linecolor: line, zerolinecolor: line, automargin: true, ...axis };
      changed[key].title = { ...axis.title, font: { size: 12, color: soft }, standoff: 8 };
    }
    return changed;
  }

  const options = { responsive: true, displaylogo: false, displayModeBar: false, scrollZoom: false };
  const figures = places.map((place) => [place, JSON.parse(place.querySelector("script").textContent)]);
  for (const [place, figure] of figures) {
    place.replaceChildren();
    place.classList.remove("is-waiting");
    await Plotly.newPlot(place, figure.data, surroundings(figure.layout), options);
  }
  const redraw = () => figures.forEach(([place, figure]) => Plotly.react(place, figure.data, surroundings(figure.layout), options));
  dark.addEventListener("change", redraw);
  addEventListener("beforeprint", redraw);
  document.documentElement.dataset.drawn = "yes";
})();
