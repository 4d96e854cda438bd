/** A feature by chance, among those that fire. */

import { getFeatures } from "$lib/api/client";
import type { Summary } from "$lib/api/types";
import { featureAddress, LIST_DEFAULTS } from "$lib/pure/route";
import { router } from "./router.svelte";

export async function goToRandom(summary: Summary): Promise<void> {
  if (summary.n_alive === 0) return;
  const place = Math.floor(Math.random() * summary.n_alive);
  const page = await getFeatures({ ...LIST_DEFAULTS, sort: "feature", descending: false, alive: true }, place, 1);
  const row = page.rows[0];
  if (row) router.go(featureAddress(row.feature));
}
