"use strict";
// The page asks the server's own API and nothing else; what it is told is put in as text, never as HTML.

const $ = (id) => document.getElementById(id);
const state = { models: [], k: 0, size: 0, picture: null, turns: [], asking: null };
// picture: {url: data URI or cache://…, name, shown: what <img> shows, bytes, data: whether url is the picture itself}

// ---------------------------------------------------------------- the server
async function call(path, options = {}) {
  const token = sessionStorage.getItem("token");
  const headers = { ...(options.body ? { "Content-Type": "application/json" } : {}), ...(token ? { Authorization: `Bearer ${token}` } : {}) };
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  if (response.status === 401) {
    $("token-form").hidden = false;
    $("token").focus();
  }
  const told = await response.json().catch(() => null);
  throw new Error(told?.error?.message ?? `The server answered ${response.status}.`);
}

const post = (path, body, signal) => call(path, { method: "POST", body: JSON.stringify(body), signal });

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const told = JSON.parse(data);
      if (told.error) throw new Error(told.error.message);
      yield told;
    }
  }
}

function problem(error) {
  $("problem").textContent = error && error.name !== "AbortError" ? error.message : "";
}

// what runs on a user's action: its error is shown, and the last one is gone
const acting = (work) => async (event) => {
  event?.preventDefault?.();
  problem(null);
  try {
    await work(event);
  } catch (error) {
    problem(error);
  }
};

async function begin() {
  const { data } = await (await call("/v1/models")).json();
  const own = data[0].fwd2bot;
  Object.assign(state, { models: data.map((model) => model.id), size: own.hidden_size, steps: steps(own) });
  $("model").textContent = data[0].id;
  $("k").max = state.steps.length - 1;
  $("k").value = state.steps.length - 1;
  $("beside").disabled = data.length < 2;
  $("cache").replaceChildren(...own.caches.map((name) => new Option(name, name)));
  $("token-form").hidden = true;
  showK();
  showPicture();
}

// the numbers of summary tokens on the slider: those of training, and all
const steps = (own) => [...new Set([...(own.trained_k.length > 1 ? own.trained_k : Array.from({ length: own.k }, (_, i) => i + 1)), own.k])];

// ---------------------------------------------------------------- tabs
const tabs = [...document.querySelectorAll("[role=tab]")];

function choose(tab, focus = true) {
  for (const one of tabs) {
    one.setAttribute("aria-selected", one === tab);
    one.tabIndex = one === tab ? 0 : -1;
    $(one.getAttribute("aria-controls")).hidden = one !== tab;
  }
  if (focus) tab.focus();
}

for (const tab of tabs) {
  tab.addEventListener("click", () => choose(tab));
  tab.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (step) choose(tabs[(tabs.indexOf(tab) + step + tabs.length) % tabs.length]);
  });
}

// ---------------------------------------------------------------- the picture
const read = (file) =>
  new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error(`${file.name} cannot be read.`));
    reader.readAsDataURL(file);
  });

async function take(file) {
  const url = await read(file);
  setPicture({ url, shown: url, name: file.name, bytes: file.size, data: true });
}

function setPicture(picture) {
  state.asking?.abort();
  Object.assign(state, { picture, turns: [], dense: null });
  $("turns").replaceChildren();
  $("maps").replaceChildren();
  $("added").textContent = "";
  showPicture();
}

function showPicture() {
  const { picture } = state;
  $("picture").hidden = !picture?.shown;
  if (picture?.shown) $("picture").src = picture.shown;
  $("picture").alt = picture ? picture.name : "";
  $("picture-name").textContent = picture ? picture.name : "Drop a picture here, or choose one.";
  $("add-form").hidden = !(picture?.data && $("cache").options.length);
  if (picture?.data) $("add-id").value = picture.name;
  showSizes();
}

const bytes = (count) => `${count.toLocaleString("en")} bytes`;

function showSizes() {
  $("size-file").textContent = state.picture?.bytes ? bytes(state.picture.bytes) : "–";
  $("size-dense").textContent = state.dense ? `${state.dense} × ${state.size}: ${bytes(state.dense * state.size * 2)}` : "–";
  $("size-summary").textContent = state.picture ? `${state.k} × ${state.size}: ${bytes(state.k * state.size * 2)}` : "–";
}

function showK() {
  state.k = state.steps[Number($("k").value)];
  $("k-value").textContent = state.k;
  $("k").setAttribute("aria-valuetext", `${state.k} summary tokens`);
  showSizes();
}

$("file").addEventListener("change", acting(async ({ target }) => target.files[0] && take(target.files[0])));
for (const kind of ["dragover", "dragleave", "drop"])
  $("drop").addEventListener(kind, acting(async (event) => {
    $("drop").classList.toggle("over", kind === "dragover");
    if (kind === "drop" && event.dataTransfer.files[0]) await take(event.dataTransfer.files[0]);
  }));

$("add-form").addEventListener("submit", acting(async () => {
  const body = { id: $("add-id").value, image: state.picture.url, cache: $("cache").value };
  const told = await (await post("/v1/images", body)).json();
  $("added").textContent = `Stored as ${told.url}.`;
}));

// ---------------------------------------------------------------- ask
function messages(turns) {
  return turns.flatMap(({ question, answer }, i) => {
    const image = i === 0 && state.picture ? [{ type: "image_url", image_url: { url: state.picture.url } }] : [];
    const asked = { role: "user", content: [...image, { type: "text", text: question }] };
    return answer === undefined ? [asked] : [asked, { role: "assistant", content: answer || "…" }];
  });
}

async function stream(model, body, place, signal) {
  let text = "";
  for await (const told of events(await post("/v1/chat/completions", { ...body, model, stream: true, stream_options: { include_usage: true } }, signal))) {
    text += told.choices[0]?.delta?.content ?? "";
    place.textContent = text;
    const image = told.fwd2bot?.images?.[0];
    if (image?.dense_tokens) state.dense = image.dense_tokens;
  }
  showSizes();
  return text;
}

function answerBox(title, boxes) {
  const box = document.createElement("div"), head = document.createElement("h2"), text = document.createElement("p");
  box.className = "answer";
  head.textContent = title;
  box.append(head, text);
  boxes.append(box);
  return text;
}

// the answer to the last turn, anew where it is there already
async function answerLast() {
  state.asking?.abort();
  const control = (state.asking = new AbortController());
  const last = state.turns.at(-1);
  const boxes = last.element.querySelector(".answers");
  boxes.replaceChildren();
  $("turns").setAttribute("aria-busy", "true");
  const turns = [...state.turns.slice(0, -1), { question: last.question }];
  const body = { messages: messages(turns), max_tokens: 128 };
  const works = [stream(state.models[0], { ...body, k: state.k }, answerBox(`${state.k} summary tokens`, boxes), control.signal)];
  if ($("beside").checked) {
    if (state.picture && !state.picture.data) answerBox("base", boxes).textContent = "The base needs the picture itself, not its summary.";
    else works.push(stream(state.models[1], body, answerBox("base, all dense tokens", boxes), control.signal));
  }
  const done = await Promise.allSettled(works);
  if (control.signal.aborted) return;  // another one is being answered
  $("turns").setAttribute("aria-busy", "false");
  if (done[0].status === "fulfilled") last.answer = done[0].value;
  const failed = done.find((one) => one.status === "rejected");
  if (failed) throw failed.reason;
}

$("ask-form").addEventListener("submit", acting(async () => {
  const question = $("question").value.trim();
  if (!question) return;
  const element = document.createElement("div"), asked = document.createElement("div"), boxes = document.createElement("div");
  element.className = "turn";
  asked.className = "asked";
  boxes.className = "answers";
  asked.textContent = question;
  element.append(asked, boxes);
  $("turns").append(element);
  if (state.turns.at(-1) && state.turns.at(-1).answer === undefined) state.turns.pop();
  state.turns.push({ question, element });
  $("question").value = "";
  await answerLast();
}));

$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    $("ask-form").requestSubmit();
  }
});
$("k").addEventListener("input", showK);
$("k").addEventListener("change", acting(async () => state.turns.length && answerLast()));
$("beside").addEventListener("change", acting(async () => state.turns.length && answerLast()));
$("anew").addEventListener("click", () => setPicture(state.picture));

// ---------------------------------------------------------------- search
let alike = null;
$("alike-file").addEventListener("change", acting(async ({ target }) => {
  alike = target.files[0] ? await read(target.files[0]) : null;
  if (alike) {
    $("words").value = "";
    await find();
  }
}));

async function find() {
  const query = $("words").value.trim();
  if (query) alike = null;
  if (!query && !alike) throw new Error("Give words or a picture to search for.");
  const body = { ...(query ? { query } : { image: alike }), top: Number($("top").value), cache: $("cache").value || null, filter: $("filter").value.trim() || null };
  const { data } = await (await post("/v1/search", body)).json();
  $("found").textContent = `${data.length} found`;
  $("gallery").replaceChildren(...data.map(card));
}

function card(hit) {
  const item = document.createElement("li"), button = document.createElement("button"), text = document.createElement("span");
  const none = document.createElement("div");
  none.className = "none";
  none.textContent = hit.file ? "…" : "no file";
  text.textContent = `${hit.id} ${hit.score.toFixed(3)}`;
  button.append(none, text);
  button.setAttribute("aria-label", `Ask about ${hit.id}`);
  item.append(button);
  const picture = { url: hit.url, shown: null, name: hit.id, bytes: hit.bytes, data: false };
  const path = `/v1/thumbnails/${hit.id.split("/").map(encodeURIComponent).join("/")}?cache=${encodeURIComponent(hit.cache)}`;
  if (hit.file)
    call(path).then((response) => response.blob()).then((blob) => {
      const image = document.createElement("img");
      picture.shown = image.src = URL.createObjectURL(blob);
      image.alt = "";
      none.replaceWith(image);
    }, () => { none.textContent = "no file"; });
  button.addEventListener("click", () => {
    setPicture(picture);
    choose(tabs[0]);
    $("question").focus();
  });
  return item;
}

$("search-form").addEventListener("submit", acting(find));

// ----------------------------------------------------------------
$("token-form").addEventListener("submit", acting(async () => {
  sessionStorage.setItem("token", $("token").value.trim());
  await begin();
}));
acting(begin)();
