/** What a set of examples is, said honestly: how many are shown of how many there are, and how they were chosen. */

import type { Band } from "$lib/api/types";
import { brief, count } from "./format";

/** The short name, for a tab. */
export function bandName(band: Band): string {
  if (band.kind === "top") return "Strongest";
  return band.low === 0 ? `below ${brief(band.high)}` : `${brief(band.low)} – ${brief(band.high)}`;
}

/** One sentence on what is shown. */
export function bandSays(band: Band): string {
  const sequences = band.of === 1 ? "sequence" : "sequences";
  if (band.kind === "top") {
    if (band.sampled >= band.of) return `All ${count(band.of)} ${sequences} in which it fires, strongest first.`;
    return `The ${count(band.sampled)} strongest of ${count(band.of)} ${sequences} in which it fires.`;
  }
  const range = band.low === 0 ? `below ${brief(band.high)}` : `between ${brief(band.low)} and ${brief(band.high)}`;
  if (band.of === 0) return `In no sequence does it peak ${range}.`;
  if (band.sampled === 0) return `The ${count(band.of)} ${sequences} in which it peaks ${range} are all among the strongest.`;
  if (band.sampled === band.of) return `All ${count(band.of)} ${sequences} in which it peaks ${range}.`;
  return `Sampled ${count(band.sampled)} of ${count(band.of)} ${sequences} in which it peaks ${range}; those among the strongest are left out.`;
}
