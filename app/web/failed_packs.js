// What the page says once a session about node packs that the server could not import.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const TOLD = "taco-dit.failed-packs";

/** A message for each pack: what it lacks, and the command that installs it. */
export async function tellFailedPacks(texts) {
  const answer = await api.fetchApi("/taco_dit/status");
  const { failed_packs: packs = [] } = answer.ok ? await answer.json() : {};
  const names = JSON.stringify(packs.map((pack) => [pack.name, pack.reason]));
  if (!packs.length || sessionStorage.getItem(TOLD) === names) return;
  sessionStorage.setItem(TOLD, names);
  for (const pack of packs) {
    const detail = pack.command ? texts.packNeeds(pack.package, pack.command) : texts.packBroken(pack.reason);
    app.extensionManager.toast.add({ severity: "warn", summary: texts.packFailed(pack.name), detail });
  }
}
