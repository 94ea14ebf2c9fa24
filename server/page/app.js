// The page at `/`: a streamed chat through /v1/chat/completions, and the server's counters out of /metrics.
// Knows the wire format; everything that a server says is put in as text, never as markup.

const POLL_MS = 1000; // between two scrapes
const HISTORY = 60; // scrapes that a line shows
const $ = (id) => document.getElementById(id);

// --- numbers for people ---

function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  for (; value >= 1024 && unit < units.length - 1; unit++) value /= 1024;
  return `${unit ? value.toFixed(1) : value.toFixed(0)} ${units[unit]}`;
}

const percent = (share) => (Number.isFinite(share) ? `${(100 * share).toFixed(1)} %` : "–");
const count = (value) => Math.round(value).toLocaleString("en");

// --- the wire ---

function headers() {
  const key = $("key").value.trim();
  return { "content-type": "application/json", ...(key && { authorization: `Bearer ${key}` }) };
}

/** The sentence of an answer that is an error, whoever on the way gave it. */
async function complaint(response) {
  const text = await response.text();
  try {
    return JSON.parse(text).error.message;
  } catch {
    return `HTTP ${response.status} ${text.slice(0, 200)}`;
  }
}

/** Server-sent events as they come: {data} or {comment}. A part of the body may end anywhere. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data: ")) yield { data: line.slice(6) };
      else if (line.startsWith(": ")) yield { comment: line.slice(2) };
    }
  }
}

/** Chunks of a streamed chat; `onPrefill(done, total)` while the prompt is read. Throws what the server complains of. */
async function* chat(messages, signal, onPrefill) {
  const body = {
    messages,
    stream: true,
    stream_options: { include_usage: true },
    temperature: Number($("temperature").value),
    ...($("max-tokens").value && { max_tokens: Number($("max-tokens").value) }),
  };
  const options = { method: "POST", headers: headers(), body: JSON.stringify(body), signal };
  const response = await fetch("v1/chat/completions", options);
  if (!response.ok) throw new Error(await complaint(response));
  for await (const event of events(response.body)) {
    const prefill = event.comment?.match(/^prefill (\d+)\/(\d+)$/);
    if (prefill) onPrefill(Number(prefill[1]), Number(prefill[2]));
    if (event.data === "[DONE]") return;
    if (event.data === undefined) continue;
    const chunk = JSON.parse(event.data);
    if (chunk.error) throw new Error(chunk.error.message);
    yield chunk;
  }
  throw new Error("The stream ended early; the server has gone.");
}

// --- the chat ---

const conversation = []; // {role, content}
let running = null; // the AbortController of the answer under way

function addTurn(who, text) {
  $("hint")?.remove();
  const turn = $("turn").content.cloneNode(true).firstElementChild;
  turn.classList.add(who);
  turn.querySelector(".who").textContent = who === "user" ? "you" : "model";
  turn.querySelector(".text").textContent = text;
  $("turns").append(turn);
  $("turns").scrollTop = $("turns").scrollHeight;
  return turn;
}

/** Shows the answer to the conversation so far while it comes; resolves to its text. */
async function answer(turn, signal) {
  const [text, progress] = [turn.querySelector(".text"), turn.querySelector("progress")];
  const system = $("system").value.trim();
  const messages = [...(system ? [{ role: "system", content: system }] : []), ...conversation];
  const started = performance.now();
  const onPrefill = (done, total) => Object.assign(progress, { hidden: false, value: done, max: total });
  for await (const chunk of chat(messages, signal, onPrefill)) {
    const content = chunk.choices[0]?.delta.content;
    if (content) {
      progress.hidden = true;
      append(text, content);
    }
    if (chunk.usage) showCost(turn, chunk, (performance.now() - started) / 1000);
  }
}

function append(text, content) {
  const list = $("turns");
  const atEnd = list.scrollHeight - list.scrollTop - list.clientHeight < 40; // do not pull back who scrolled up
  text.append(content);
  if (atEnd) list.scrollTop = list.scrollHeight;
}

function showCost(turn, { usage, coldstream }, seconds) {
  const tokens = usage.completion_tokens;
  const parts = [`${tokens} tokens in ${seconds.toFixed(1)} s`];
  if (coldstream.decode_s > 0) parts.push(`decode ${(tokens / coldstream.decode_s).toFixed(1)} tokens/s`);
  for (const [tier, read] of Object.entries(coldstream.bytes_read)) parts.push(`${bytes(read)} from ${tier}`);
  if (coldstream.cache_lookups) parts.push(`${percent(coldstream.cache_hits / coldstream.cache_lookups)} hits`);
  const cost = turn.querySelector(".cost");
  cost.textContent = parts.join(" · ");
  cost.hidden = false;
}

async function ask(line) {
  addTurn("user", line);
  conversation.push({ role: "user", content: line });
  const turn = addTurn("assistant", "");
  running = new AbortController();
  setBusy(true);
  try {
    await answer(turn, running.signal);
  } catch (error) {
    showFailure(turn, error);
  }
  keep(turn.querySelector(".text").textContent);
  turn.querySelector("progress").hidden = true;
  running = null;
  setBusy(false);
}

function showFailure(turn, error) {
  const note = document.createElement("p");
  const stopped = error.name === "AbortError";
  note.className = stopped ? "note dim" : "note error";
  note.textContent = stopped ? "(stopped)" : error.message;
  if (!turn.querySelector(".text").textContent) turn.querySelector(".text").hidden = true;
  turn.append(note);
}

/** A question without an answer is forgotten: many chat templates refuse two user messages in a row. */
function keep(text) {
  if (text) conversation.push({ role: "assistant", content: text });
  else conversation.pop();
}

function setBusy(busy) {
  $("send").disabled = $("clear").disabled = busy;
  $("cancel").hidden = !busy;
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const line = $("prompt").value.trim();
  if (!line || running) return;
  $("prompt").value = "";
  ask(line);
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("ask").requestSubmit();
});
document.addEventListener("keydown", (event) => event.key === "Escape" && running?.abort());
$("cancel").addEventListener("click", () => running?.abort());
$("clear").addEventListener("click", () => {
  conversation.length = 0;
  $("turns").replaceChildren();
});
$("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});

// --- the counters ---

/** Samples of Prometheus' text format: [{name, labels, value}], the server's own ones without their prefix. */
function parseMetrics(text) {
  const samples = [];
  for (const line of text.split("\n")) {
    const found = line.match(/^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)/);
    if (!found || line.startsWith("#")) continue;
    const labels = {};
    for (const [, name, value] of (found[2] ?? "").matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)) {
      labels[name] = value.replace(/\\(.)/g, (_, c) => (c === "n" ? "\n" : c));
    }
    samples.push({ name: found[1].replace(/^coldstream_/, ""), labels, value: Number(found[3].replace("Inf", "Infinity")) });
  }
  return samples;
}

const matches = (labels, wanted) => Object.entries(wanted).every(([name, value]) => labels[name] === value);
const series = (scrape, name) => scrape.samples.filter((sample) => sample.name === name);
const sum = (scrape, name, wanted = {}) =>
  series(scrape, name).reduce((total, sample) => total + (matches(sample.labels, wanted) ? sample.value : 0), 0);

/** How a counter grew between two scrapes; one that fell has begun anew, with a new process. */
function increase(before, after, name, wanted) {
  const [then, now] = [sum(before, name, wanted), sum(after, name, wanted)];
  return now >= then ? now - then : now;
}

const histories = new Map(); // line element -> values

function draw(line, value) {
  const values = histories.get(line) ?? [];
  values.push(value);
  if (values.length > HISTORY) values.shift();
  histories.set(line, values);
  const top = Math.max(...values, Number.MIN_VALUE);
  const x = (i) => (100 * (HISTORY - values.length + i)) / (HISTORY - 1);
  line.firstElementChild.setAttribute("points", values.map((v, i) => `${x(i).toFixed(1)},${(23 - (22 * v) / top).toFixed(1)}`).join(" "));
}

/** The card of a template for one key, made at the first call. */
function card(template, key, title) {
  const list = $(`${template}s`);
  let found = [...list.children].find((child) => child.dataset.key === key);
  if (!found) {
    found = $(template).content.cloneNode(true).firstElementChild;
    found.dataset.key = key;
    found.querySelector("h2").textContent = title;
    list.append(found);
  }
  return found;
}

function put(parent, what, text) {
  parent.querySelector(`[data-is="${what}"]`).textContent = text;
}

function showTiers(before, after) {
  for (const { labels, value: capacity } of series(after, "neuron_cache_capacity_bytes")) {
    const tier = card("tier", labels.tier, `Neurons in ${labels.tier} memory`);
    const total = (name) => sum(after, name, labels);
    const lookups = increase(before, after, "neuron_cache_lookups_total", labels);
    const hits = increase(before, after, "neuron_cache_hits_total", labels);
    const rate = lookups ? hits / lookups : total("neuron_cache_hits_total") / total("neuron_cache_lookups_total");
    const used = total("neuron_cache_used_bytes");
    put(tier, "hit-rate", percent(rate)); // of the last second; of all time while nothing is asked for
    put(tier, "hits", count(total("neuron_cache_hits_total")));
    put(tier, "lookups", count(total("neuron_cache_lookups_total")));
    put(tier, "used", bytes(used));
    put(tier, "capacity", bytes(capacity));
    tier.querySelector('[data-is="filled"]').style.width = capacity ? percent(used / capacity).replace(" ", "") : "0";
  }
}

function showFlows(before, after, seconds) {
  for (const { labels, value } of series(after, "transfer_bytes_total")) {
    const flow = card("flow", `${labels.src}-${labels.dst}`, `From ${labels.src} to ${labels.dst}`);
    const rate = increase(before, after, "transfer_bytes_total", labels) / seconds;
    put(flow, "rate", `${bytes(rate)}/s`);
    put(flow, "bytes", bytes(value));
    put(flow, "stall", percent(increase(before, after, "stall_seconds_total", { src: labels.src }) / seconds));
    draw(flow.querySelector(".line"), rate);
  }
}

function showRest(before, after, seconds) {
  const rate = increase(before, after, "generation_tokens_total", {}) / seconds;
  $("token-rate").textContent = rate.toFixed(1);
  $("tokens").textContent = count(sum(after, "generation_tokens_total"));
  $("requests").textContent = `${sum(after, "num_requests_running")}, ${sum(after, "num_requests_waiting")}`;
  draw($("token-line"), rate);
  const [resident, budget] = [sum(after, "process_resident_memory_bytes"), sum(after, "memory_budget_bytes", { tier: "cpu" })];
  $("resident").textContent = bytes(resident);
  $("budget").textContent = budget ? bytes(budget) : "–";
  $("memory-bar").style.width = budget ? `${Math.min(100, (100 * resident) / budget)}%` : "0";
}

let last = null; // the scrape before
let refused = null; // the header with the wrong key: asked again only with another

async function scrape() {
  const sent = { ...headers(), accept: "text/plain" };
  if (refused === (sent.authorization ?? "")) return;
  const response = await fetch("metrics", { headers: sent });
  refused = response.status === 401 ? (sent.authorization ?? "") : null;
  if (!response.ok) throw new Error(await complaint(response));
  const now = { at: performance.now(), samples: parseMetrics(await response.text()) };
  if (last) {
    const seconds = (now.at - last.at) / 1000;
    for (const show of [showTiers, showFlows, showRest]) show(last, now, seconds);
  }
  last = now;
  const info = series(now, "info")[0]?.labels ?? {};
  $("model").textContent = [info.model, info.mode, info.io_engine].filter(Boolean).join(" · ");
}

async function health() {
  const { state, stage, share } = await (await fetch("health")).json();
  $("state").textContent = stage ? `${state}: ${stage} ${Math.round(100 * share)} %` : state;
  $("state").dataset.state = state;
}

function complainOfCounters(message) {
  $("counters-error").textContent = message;
  $("counters-error").hidden = !message;
}

async function poll() {
  try {
    await health();
    await scrape().then(() => refused === null && complainOfCounters(""), (error) => complainOfCounters(error.message));
  } catch {
    $("state").textContent = "unreachable";
    $("state").dataset.state = "unreachable";
  }
  setTimeout(poll, document.hidden ? 5 * POLL_MS : POLL_MS);
}

poll();
