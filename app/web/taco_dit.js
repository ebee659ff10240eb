// TACO-DiT in the page: a sidebar tab that shows the ranks at work, the texts of our display nodes, and the first screen.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { nameCancelledJobs } from "./cancelled_jobs.js";
import { tellFailedPacks } from "./failed_packs.js";
import { prepareFirstScreen } from "./first_screen.js";
import { textsFor } from "./panel/texts.js";
import { Panel } from "./panel/view.js";

const EVENT = "taco_dit";
const DISPLAYS = ["TACODiTInfoDisplay", "TACODiTStatsDisplay"];

/** Ask for news over the WebSocket, or no more; answers with the state now. */
async function watch(enabled) {
  const answer = await api.fetchApi("/taco_dit/watch", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ clientId: api.clientId, enabled }),
  });
  return answer.ok ? answer.json() : null;
}

function clearEvents() {
  return api.fetchApi("/taco_dit/events", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ clear: true }),
  });
}

function addStyle() {
  const link = document.createElement("link");
  link.rel = "stylesheet";
  link.href = new URL("./panel/panel.css", import.meta.url).href;
  document.head.append(link);
}

/** The tab: while it is open, the server sends and the panel draws. */
function sidebarTab(texts) {
  let panel = null;
  const show = (status) => status && panel?.show(status);
  api.addEventListener(EVENT, (event) => show(event.detail));
  api.addEventListener("reconnected", () => panel && watch(true).then(show));
  return {
    id: "taco-dit",
    icon: "pi pi-microchip",
    title: "TACO-DiT",
    tooltip: texts.tooltip,
    type: "custom",
    render: (container) => {
      panel = new Panel(container, texts, clearEvents);
      watch(true).then(show);
    },
    destroy: () => {
      panel = null;
      watch(false);
    },
  };
}

/** Say what a workflow that was opened needs and this version lacks: families, formats, nodes. */
async function sayWhatIsMissing(texts) {
  const answer = await api.fetchApi("/taco_dit/missing", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ workflow: app.rootGraph.serialize(), language: app.extensionManager.setting.get("Comfy.Locale") }),
  });
  const { missing, text } = answer.ok ? await answer.json() : { missing: [] };
  if (!missing.some((entry) => entry.kind !== "node")) return; // of nodes alone the page speaks itself
  app.extensionManager.toast.add({ severity: "warn", summary: texts.cannotRun, detail: text });
}

/** Give a display node a field that shows the text of its last run. */
function showTextIn(nodeType) {
  const created = nodeType.prototype.onNodeCreated;
  nodeType.prototype.onNodeCreated = function () {
    created?.apply(this, arguments);
    const field = document.createElement("textarea");
    field.className = "taco-dit-text";
    field.readOnly = true;
    this.tacoText = field;
    this.addDOMWidget("text", "taco_dit_text", field, {
      serialize: false,
      getValue: () => field.value,
      setValue: (value) => {
        field.value = value;
      },
      getMinHeight: () => 120,
    }).serialize = false;
    this.setSize([Math.max(this.size[0], 380), Math.max(this.size[1], 190)]);
  };
  const executed = nodeType.prototype.onExecuted;
  nodeType.prototype.onExecuted = function (output) {
    executed?.apply(this, arguments);
    if (output?.text) this.tacoText.value = [].concat(output.text).join("\n");
  };
}

const badges = []; // of the page's About panel, which reads them when it is opened

async function addBadge() {
  const answer = await api.fetchApi("/system_stats");
  if (!answer.ok) return;
  const { system } = await answer.json();
  badges.push({ label: `TACO-DiT ${system.taco_dit_version}`, url: api.apiURL("/taco_dit/status"), icon: "pi pi-microchip" });
}

app.registerExtension({
  name: "TACO-DiT",
  aboutPageBadges: badges,
  async setup() {
    addBadge();
    addStyle();
    const texts = textsFor(app.extensionManager.setting.get("Comfy.Locale"));
    nameCancelledJobs(app.extensionManager.setting.get("Comfy.Locale"));
    app.extensionManager.registerSidebarTab(sidebarTab(texts));
    await prepareFirstScreen(); // before the page chooses its first workflow
    tellFailedPacks(texts);
  },
  afterConfigureGraph() {
    sayWhatIsMissing(textsFor(app.extensionManager.setting.get("Comfy.Locale")));
  },
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (DISPLAYS.includes(nodeData.name)) showTextIn(nodeType);
  },
});
