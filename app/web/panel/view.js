// Draws the state of /taco_dit/status.

/** An element with a class and children (elements or texts). */
function el(tag, className, ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  // append() makes text nodes of strings: nothing here is ever read as HTML
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

function size(bytes) {
  const gib = bytes / 2 ** 30;
  return gib >= 0.95 ? `${gib.toFixed(1)} GiB` : `${Math.round(bytes / 2 ** 20)} MiB`;
}

function milliseconds(value) {
  return `${value >= 100 ? Math.round(value) : value.toFixed(1)} ms`;
}

/** A bar of parts, each a share from 0 to 1 of the whole width. */
function bar(...parts) {
  return el("div", "taco-bar", ...parts.map(([kind, share]) => {
    const part = el("div", `taco-part taco-${kind}`);
    part.style.width = `${Math.min(100, Math.max(0, share * 100)).toFixed(1)}%`;
    return part;
  }));
}

export class Panel {
  constructor(container, texts, clearEvents) {
    this.texts = texts;
    this.root = el("div", "taco-panel", el("div", "taco-quiet", texts.connecting));
    this.clearEvents = clearEvents;
    container.replaceChildren(this.root);
  }

  /** Draw a status; where the reader had scrolled to stays. */
  show(status) {
    const top = this.root.scrollTop;
    const parts = [this.rankSection(status), this.planSection(status), this.stepSection(status),
      this.promptSection(status)].filter(Boolean);
    const failed = status.events.some((event) => event.level === "error");
    if (failed) parts.unshift(this.eventSection(status)); // what needs a hand comes first
    else parts.push(this.eventSection(status));
    this.root.replaceChildren(this.head(status), ...parts);
    this.root.scrollTop = top;
  }

  section(title, aside, ...children) {
    return el("section", "taco-section", el("header", "taco-row", el("h3", "", title), aside), ...children);
  }

  head(status) {
    const busy = status.current_run.sampling;
    const state = el("span", busy ? "taco-state taco-busy" : "taco-state", busy ? this.texts.sampling : this.texts.idle);
    return el("header", "taco-row taco-head", el("h2", "", "TACO-DiT"), state);
  }

  rankSection(status) {
    return this.section(this.texts.ranks, null, ...status.ranks.map((rank) => this.rankCard(rank)));
  }

  rankCard(rank) {
    const t = this.texts;
    const gpu = String(rank.device).startsWith("cuda");
    const late = rank.age > 5 ? el("span", "taco-late", t.late(Math.round(rank.age))) : null;
    const name = rank.name && rank.name.toLowerCase() !== String(rank.device) ? `${rank.device} · ${rank.name}` : rank.device;
    const known = rank.memory_used !== undefined;
    const memory = known ? `${size(rank.memory_used)} / ${size(rank.memory_total)}` : t.none;
    const use = rank.utilisation ?? null;
    const temperature = rank.temperature ?? null;
    const card = el("div", "taco-card",
      el("div", "taco-row", el("strong", "", t.rank(rank.rank)), el("span", "taco-quiet taco-cut", name)),
      late,
      this.meter(gpu ? t.memory : t.processMemory, memory, known ? rank.memory_used / rank.memory_total : 0),
      this.meter(gpu ? t.use : t.cpuUse, use === null ? t.none : `${Math.round(use * 100)} %`, use ?? 0),
      el("div", "taco-row", el("span", "taco-quiet", t.temperature),
        el("span", "taco-number", temperature === null ? t.none : `${temperature} °C`)));
    card.dataset.rank = rank.rank;
    return card;
  }

  meter(label, value, share) {
    return el("div", "taco-meter",
      el("div", "taco-row", el("span", "taco-quiet", label), el("span", "taco-number", value)),
      bar(["used", share]));
  }

  lossyNote(status) {
    return status.lossy?.length ? el("p", "", `${this.texts.lossy}: ${status.lossy.join(", ")}`) : null;
  }

  planSection(status) {
    const t = this.texts, lossy = this.lossyNote(status);
    if (status.world_size === 1) return this.section(t.plan, null, el("p", "taco-quiet", t.oneRank), lossy);
    if (!status.enabled) return this.section(t.plan, null, el("p", "taco-quiet", t.off), lossy);
    if (status.active_plan === null) {
      const last = status.last_run;
      const text = last ? `${t.lastPlan}: ${last.plan}${last.reason ? ` (${last.reason})` : ""}` : t.noPlan;
      return this.section(t.plan, null, el("p", "taco-quiet", text), lossy);
    }
    return this.section(t.plan, el("strong", "taco-plan", status.active_plan), el("p", "", status.reason),
      this.times(status), status.workload ? el("p", "taco-quiet", t.work(status.workload)) : null, lossy,
      this.considered(status));
  }

  times(status) {
    if (status.predicted_ms === null) return null;
    const run = status.current_run;
    const measured = run.calls ? milliseconds(run.mean_call_ms) : null;
    return el("p", "taco-quiet", this.texts.times(milliseconds(status.predicted_ms), measured));
  }

  considered(status) {
    const possible = status.considered.filter((choice) => choice.impossible === undefined);
    if (possible.length < 2) return null;
    const t = this.texts;
    const measured = status.predicted_ms !== null;
    const slowest = Math.max(...possible.map((choice) => choice.relative_time));
    const rows = possible.slice(0, 5).map((choice, place) => el("div", place ? "taco-choice" : "taco-choice taco-chosen",
      el("span", "taco-cut", choice.plan), bar(["used", choice.relative_time / slowest]),
      el("span", "taco-number", measured ? milliseconds(choice.predicted_ms) : choice.relative_time.toFixed(2))));
    const title = measured ? t.predictedTimes(status.world_size) : t.considered(status.world_size);
    const impossible = status.considered.filter((choice) => choice.impossible !== undefined)
      .map((choice) => el("div", "taco-quiet", `${choice.plan}: ${choice.impossible}`));
    return el("div", "taco-choices", el("div", "taco-quiet", title), ...rows, ...impossible);
  }

  stepSection(status) {
    const t = this.texts;
    const run = status.current_run;
    if (!run.calls) return this.section(t.steps, null, el("p", "taco-quiet", t.noPlan));
    const means = run.ranks.map((times) => ({ compute: times.compute / (times.calls || 1), exchange: times.exchange / (times.calls || 1) }));
    const longest = Math.max(...means.map((mean) => mean.compute + mean.exchange)) || 1;
    const rows = means.map((mean, rank) => el("div", "taco-meter",
      el("div", "taco-row", el("span", "", t.rank(rank)),
        el("span", "taco-number", `${milliseconds(mean.compute)} + ${milliseconds(mean.exchange)}`)),
      bar(["compute", mean.compute / longest], ["exchange", mean.exchange / longest])));
    const legend = el("div", "taco-legend", el("i", "taco-compute"), t.compute, el("i", "taco-exchange"), t.exchange);
    const graphs = status.world_size > 1 && status.cuda_graph ? el("p", "taco-quiet", t.graphs) : null;
    const count = el("span", "taco-quiet taco-steps", t.stepCount(run.calls));
    return this.section(t.steps, count, legend, ...rows, graphs);
  }

  promptSection(status) {
    const t = this.texts;
    const prompt = status.last_prompts?.at(-1);
    if (!prompt) return null;
    const parts = [...Object.entries(prompt.phases), ["other", prompt.other]].filter(([, seconds]) => seconds >= 0.005);
    const longest = Math.max(...parts.map(([, seconds]) => seconds)) || 1;
    const rows = parts.map(([name, seconds]) => el("div", "taco-choice",
      el("span", "taco-cut", t.phase[name] ?? name), bar(["used", seconds / longest]),
      el("span", "taco-number", t.seconds(seconds.toFixed(2)))));
    const moved = prompt.counts.weight_bytes ? el("p", "taco-quiet", t.moved(size(prompt.counts.weight_bytes))) : null;
    const total = el("span", "taco-quiet taco-prompt-total", t.seconds(prompt.total.toFixed(2)));
    return this.section(t.prompt, total, el("div", "taco-choices", ...rows), moved);
  }

  eventSection(status) {
    const t = this.texts;
    if (!status.events.length) return this.section(t.events, null, el("p", "taco-quiet", t.noEvents));
    const clear = el("button", "taco-clear", t.clear);
    clear.addEventListener("click", () => this.clearEvents());
    return this.section(t.events, clear, ...status.events.toReversed().map((event) => this.eventCard(event, status)));
  }

  eventCard(event, status) {
    const t = this.texts;
    const when = new Date(event.time * 1000).toLocaleTimeString();
    const where = status.world_size > 1 ? `${t.onRank(event.ranks)} · ` : "";
    const times = event.count > 1 ? ` · ${event.count}×` : "";
    return el("div", `taco-event taco-${event.level}`,
      el("div", "taco-quiet", `${where}${when}${times}`),
      el("div", "taco-message", event.text),
      el("div", "taco-cure", el("span", "taco-quiet", `${t.cure}: `), event.cure));
  }
}
