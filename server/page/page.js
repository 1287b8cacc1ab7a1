// The page is a client of the API like any other. What the server says of sandboxes is text to it, never markup.
"use strict";

const $ = (id) => document.getElementById(id);
const refreshEvery = 3000; // ms
let pages = 1;
let timer = 0;
let turn = 0; // which refresh is the newest: what older ones bring is not shown any more

function key() { return sessionStorage.getItem("key") || ""; }

async function call(method, path, body) {
  const used = key();
  const answer = await fetch(path, {
    method, headers: { "X-API-KEY": used }, body: body && JSON.stringify(body), cache: "no-store",
  });
  if (answer.ok) return answer;
  const said = await answer.json().catch(() => ({}));
  const why = said.message || answer.statusText;
  if (answer.status === 401 && used === key()) leave(why);
  throw new Error(why);
}

// problem shows what went wrong. What a button led to stays until the next one; what a refresh did, until one succeeds.
function problem(text, by) {
  $("problem").textContent = text;
  $("problem").dataset.by = by || "";
  $("problem").hidden = !text;
}

// leave forgets the key, and what was shown by it.
function leave(why) {
  sessionStorage.removeItem("key");
  clearTimeout(timer);
  turn++;
  pages = 1;
  for (const id of ["sandboxes", "times", "sizes"]) $(id).replaceChildren();
  problem(why || "");
  show();
}

function show() {
  const known = key() !== "";
  $("enter").hidden = known;
  $("content").hidden = !known;
  $("leave").hidden = !known;
  if (known) refresh(); else $("key").focus();
}

async function refresh() {
  clearTimeout(timer);
  if (!key()) return;
  const mine = ++turn;
  try {
    const { sandboxes, more } = await load();
    const activity = await (await call("GET", "/cryovisor/v1/activity")).json();
    if (mine !== turn) return;
    if ($("problem").dataset.by === "refresh") problem("");
    showTotals(sandboxes, more, activity);
    showSandboxes(sandboxes);
    $("more").hidden = !more;
    showTimes(activity);
    showSizes(activity);
  } catch (err) {
    if (mine !== turn) return;
    problem(String(err.message || err), "refresh");
  }
  timer = setTimeout(refresh, refreshEvery);
}

// load fetches the pages that are shown; more says whether there are others.
async function load() {
  const sandboxes = [];
  let token = "";
  for (let i = 0; i < pages; i++) {
    const answer = await call("GET", "/v2/sandboxes?limit=100" + (token && "&nextToken=" + encodeURIComponent(token)));
    sandboxes.push(...await answer.json());
    token = answer.headers.get("X-Next-Token") || "";
    if (!token) break;
  }
  return { sandboxes, more: token !== "" };
}

function bytes(n) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let i = 0;
  for (; n >= 1024 && i < units.length - 1; i++) n /= 1024;
  return (i && n < 10 ? n.toFixed(1) : Math.round(n)) + " " + units[i];
}

function milliseconds(n) { return n < 10 ? n.toFixed(1) + " ms" : n < 1000 ? Math.round(n) + " ms" : (n / 1000).toFixed(1) + " s"; }

function median(list) {
  if (!list.length) return "–";
  const sorted = [...list].sort((a, b) => a - b);
  return milliseconds(sorted[Math.floor(sorted.length / 2)]);
}

const pauses = (activity) => activity.filter((e) => e.state === "paused" && e.from === "running" && !e.failed && e.tookMS > 0);
const resumes = (activity) => activity.filter((e) => e.state === "running" && e.from === "paused" && !e.failed);

function showTotals(sandboxes, others, activity) {
  const more = others ? "+" : "";
  $("running").textContent = sandboxes.filter((s) => s.state === "running").length + more;
  $("paused").textContent = sandboxes.filter((s) => s.state === "paused").length + more;
  $("stored").textContent = bytes(sandboxes.reduce((n, s) => n + (s.storedBytes || 0), 0)) + more;
  $("pause-time").textContent = median(pauses(activity).map((e) => e.tookMS));
  $("resume-time").textContent = median(resumes(activity).map((e) => e.tookMS));
}

function cell(row, text, kind) {
  const td = row.insertCell();
  td.textContent = text;
  if (kind) td.className = kind;
  return td;
}

// moment is a time from now; the exact one is its title.
function moment(row, at) {
  const td = cell(row, "");
  if (!at) return;
  const seconds = (Date.parse(at) - Date.now()) / 1000, size = Math.abs(seconds);
  const [unit, of] = size < 90 ? ["second", 1] : size < 5400 ? ["minute", 60] : size < 129600 ? ["hour", 3600] : ["day", 86400];
  td.textContent = new Intl.RelativeTimeFormat("en", { numeric: "always", style: "short" }).format(Math.round(seconds / of), unit);
  td.title = new Date(at).toLocaleString();
}

function showSandboxes(sandboxes) {
  const focused = document.activeElement && document.activeElement.dataset.action;
  const rows = sandboxes.map((s) => {
    const row = document.createElement("tr");
    cell(row, s.sandboxID, "id");
    cell(row, s.alias || s.templateID);
    cell(row, s.state, s.state);
    cell(row, bytes(s.memoryMB * 1048576));
    cell(row, bytes(s.storedBytes || 0));
    moment(row, s.startedAt);
    moment(row, s.state === "paused" ? "" : s.endAt);
    cell(row, Object.entries(s.metadata).map(([k, v]) => k + "=" + v).join(", "), "meta");
    const actions = cell(row, "", "actions");
    if (s.state === "running") actions.append(button("Pause", s, () => call("POST", "/sandboxes/" + s.sandboxID + "/pause", {})));
    else actions.append(button("Connect", s, () => call("POST", "/v2/sandboxes/" + s.sandboxID + "/connect", {})));
    actions.append(button("Kill", s, () => {
      if (confirm("Kill sandbox " + s.sandboxID + "? All of it is deleted.")) return call("DELETE", "/sandboxes/" + s.sandboxID);
    }));
    return row;
  });
  $("sandboxes").replaceChildren(...rows);
  if (focused) document.querySelectorAll("[data-action]").forEach((b) => b.dataset.action === focused && b.focus());
  $("none").hidden = sandboxes.length > 0;
}

function button(text, sandbox, act) {
  const b = document.createElement("button");
  b.type = "button";
  b.textContent = text;
  b.dataset.action = text + " " + sandbox.sandboxID;
  b.setAttribute("aria-label", b.dataset.action);
  b.addEventListener("click", async () => {
    b.disabled = true;
    problem("");
    try {
      await act();
    } catch (err) {
      problem(String(err.message || err), "button");
    }
    refresh();
  });
  return b;
}

// Charts are as wide as there is room, with some for labels at the left and below.
const chart = { height: 160, left: 56, right: 8, top: 10, bottom: 22 };

function element(name, attributes, text) {
  const e = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [k, v] of Object.entries(attributes)) e.setAttribute(k, v);
  if (text !== undefined) e.textContent = text;
  return e;
}

// draw plots points {at, value, kind, title} over the last hour, on a logarithmic scale with a base.
function draw(into, label, points, base, format) {
  const width = Math.max(into.clientWidth, 240);
  const svg = element("svg", { viewBox: `0 0 ${width} ${chart.height}`, role: "img", "aria-label": label + ": " + points.length + " points" });
  const values = points.length ? points.map((p) => Math.max(p.value, 1e-3)) : [1];
  const log = (v) => Math.log(v) / Math.log(base);
  const from = Math.floor(log(Math.min(...values)) + 1e-9), to = Math.max(from + 1, Math.ceil(log(Math.max(...values)) - 1e-9));
  const bottom = chart.height - chart.bottom;
  const y = (v) => bottom - (bottom - chart.top) * (log(Math.max(v, base ** from)) - from) / (to - from);
  const now = Date.now(), x = (t) => chart.left + (width - chart.left - chart.right) * (1 - (now - t) / 3600000);
  for (let i = from; i <= to; i += Math.ceil((to - from) / 4)) {
    const v = base ** i;
    svg.append(element("line", { class: "axis", x1: chart.left, x2: width - chart.right, y1: y(v), y2: y(v) }));
    svg.append(element("text", { x: chart.left - 6, y: y(v) + 4, "text-anchor": "end" }, format(v)));
  }
  for (const minutes of [60, 40, 20, 0]) {
    const anchor = minutes === 60 ? "start" : minutes ? "middle" : "end";
    svg.append(element("text", { x: x(now - minutes * 60000), y: chart.height - 5, "text-anchor": anchor }, minutes ? "−" + minutes + " min" : "now"));
  }
  for (const p of points) {
    const dot = element("circle", { class: "point " + p.kind, cx: x(p.at), cy: y(p.value), r: 3 });
    dot.append(element("title", {}, p.title));
    svg.append(dot);
  }
  into.replaceChildren(svg);
}

function showTimes(activity) {
  const point = (kind) => (e) => ({ at: Date.parse(e.time), value: e.tookMS, kind, title: kind + " of " + e.sandboxID + ": " + milliseconds(e.tookMS) });
  draw($("times"), "Times of pauses and resumes", [...pauses(activity).map(point("pause")), ...resumes(activity).map(point("resume"))], 10, milliseconds);
}

function showSizes(activity) {
  draw($("sizes"), "Sizes of snapshots", pauses(activity).map((e) => (
    { at: Date.parse(e.time), value: e.storedBytes, kind: "pause", title: e.sandboxID + ": " + bytes(e.storedBytes) })), 16, bytes);
}

$("enter").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("key", $("key").value.trim());
  $("key").value = "";
  problem("");
  show();
});
$("leave").addEventListener("click", () => leave());
$("more").addEventListener("click", () => { pages++; refresh(); });
show();
