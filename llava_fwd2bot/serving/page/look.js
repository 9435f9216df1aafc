"use strict";
// The heat maps of “Look”; after script.js, whose names it uses.

$("show").addEventListener("click", acting(async () => {
  if (!state.picture?.data) throw new Error("Drop a picture in “Ask” first: there is no map of a stored summary.");
  $("show").disabled = true;
  try {
    const told = await (await post("/v1/look", { image: state.picture.url })).json();
    const image = new Image();
    image.src = state.picture.shown;
    await image.decode();
    $("maps").replaceChildren(...told.maps.map((map, i) => heat(map, i, image)));
  } finally {
    $("show").disabled = false;
  }
}));

function heat(map, number, image) {
  const figure = document.createElement("figure"), canvas = document.createElement("canvas"), told = document.createElement("figcaption");
  const side = 224, paint = canvas.getContext("2d"), others = map.flat().slice(1), most = Math.max(...others), least = Math.min(...others);  // the first position takes attention whatever it holds
  canvas.width = canvas.height = side;
  const edge = Math.min(image.naturalWidth, image.naturalHeight);  // what the model sees: the middle square
  paint.drawImage(image, (image.naturalWidth - edge) / 2, (image.naturalHeight - edge) / 2, edge, edge, 0, 0, side, side);
  const small = document.createElement("canvas"), cells = map.length;
  small.width = small.height = cells;
  const pixels = small.getContext("2d").createImageData(cells, cells);
  map.flat().forEach((value, i) => pixels.data.set([255, 60, 0, Math.round(215 * Math.min(1, (value - least) / (most - least || 1)))], 4 * i));
  small.getContext("2d").putImageData(pixels, 0, 0);
  paint.imageSmoothingEnabled = true;
  paint.drawImage(small, 0, 0, side, side);
  const share = map.flat().reduce((sum, value) => sum + value, 0);
  told.textContent = `token ${number + 1}: ${(100 * share).toFixed(1)} %`;
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `Heat map of summary token ${number + 1}`);
  figure.append(canvas, told);
  return figure;
}
