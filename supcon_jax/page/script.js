"use strict";
// What is under the pointer: values of curves, images of a map, and one class alone.
const tip = document.getElementById("tip");

function show(event, ...content) {
  tip.replaceChildren(...content);
  tip.hidden = false;
  const left = event.clientX + 16, top = event.clientY + 16;
  tip.style.left = Math.max(4, Math.min(left, innerWidth - tip.offsetWidth - 8)) + "px";
  const below = top + tip.offsetHeight < innerHeight;
  tip.style.top = Math.max(4, below ? top : event.clientY - tip.offsetHeight - 12) + "px";
}

function place(svg, event) {
  const point = new DOMPoint(event.clientX, event.clientY);
  return point.matrixTransform(svg.getScreenCTM().inverse());
}

function follow(svg, move, leave) {
  svg.addEventListener("pointermove", move);
  svg.addEventListener("pointerdown", move);
  svg.addEventListener("pointerleave", () => { tip.hidden = true; leave(); });
}

for (const svg of document.querySelectorAll("svg.lines")) {
  const [x0, x1, y0, y1, left, right, bottom, top] = svg.dataset.frame.split(" ").map(Number);
  const curves = [...svg.querySelectorAll("polyline")].map(line => ({
    name: line.dataset.name, points: [...line.points],
  }));
  const mark = document.createElementNS(svg.namespaceURI, "path");
  mark.setAttribute("class", "axis");
  svg.append(mark);
  const number = value => Number(value.toPrecision(4)).toString();
  follow(svg, event => {
    const x = Math.min(Math.max(place(svg, event).x, left), right);
    mark.setAttribute("d", `M${x} ${top}V${bottom}`);
    const lines = curves.filter(curve => {
      const ends = [curve.points[0].x, curve.points.at(-1).x];
      return ends[0] - 8 <= x && x <= ends[1] + 8;
    }).map(curve => {
      const near = curve.points.reduce((a, b) => Math.abs(b.x - x) < Math.abs(a.x - x) ? b : a);
      return `${curve.name}: ${number(y0 + (bottom - near.y) / (bottom - top) * (y1 - y0))}`;
    });
    const at = number(x0 + (x - left) / (right - left) * (x1 - x0));
    show(event, [`at ${at}`, ...lines].join("\n"));
  }, () => mark.removeAttribute("d"));
}

for (const box of document.querySelectorAll(".maps")) {
  const data = JSON.parse(box.dataset.map);
  const maps = [...box.querySelectorAll("svg.map")].map(svg => [...svg.querySelectorAll("use")]);
  let shown = -1, only = -1;
  const mark = index => {
    for (const points of maps) {
      points[shown]?.classList.remove("at");
      points[index]?.classList.add("at");
    }
    shown = index;
  };
  maps.forEach(points => {
    const svg = points[0].ownerSVGElement;
    const places = points.map(point => [point.x.baseVal.value, point.y.baseVal.value]);
    follow(svg, event => {
      const at = place(svg, event);
      let best = -1, least = 14 * 14;
      places.forEach(([x, y], index) => {
        const far = (x - at.x) ** 2 + (y - at.y) ** 2;
        if (far < least && (only < 0 || data.labels[index] === only)) [best, least] = [index, far];
      });
      mark(best);
      if (best < 0) { tip.hidden = true; return; }
      const tile = document.createElement("i"), index = data.places[best];
      tile.className = `tile g${data.gallery}`;
      tile.style.setProperty("--x", index % data.columns);
      tile.style.setProperty("--y", Math.floor(index / data.columns));
      show(event, tile, data.names[data.labels[best]]);
    }, () => mark(-1));
  });
  for (const key of box.querySelectorAll("button")) {
    key.addEventListener("click", () => {
      only = only === +key.dataset.class ? -1 : +key.dataset.class;
      for (const other of box.querySelectorAll("button"))
        other.setAttribute("aria-pressed", String(+other.dataset.class === only));
      for (const points of maps)
        points.forEach((point, index) =>
          point.classList.toggle("off", only >= 0 && data.labels[index] !== only));
    });
  }
}
