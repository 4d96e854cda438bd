/** What a text made fire, seen from a token or from a feature. */

import type { Encoded, FiredFeature } from "$lib/api/types";

export interface Line {
  feature: FiredFeature;
  value: number;
}

/** How near a value comes to the feature's maximum on the indexed text; a feature that was silent there counts as at its maximum. */
export function share(line: Line): number {
  return line.feature.max > 0 ? line.value / line.feature.max : 1;
}

/**
 * The features on one token, strongest first; without a token those of the whole text, by their highest value. By "share" the
 * rare ones that come near their own maximum stand before the loud ones that always fire.
 */
export function linesOf(encoded: Encoded, token: number | null, order: "value" | "share" = "value"): Line[] {
  const lines = unordered(encoded, token);
  return order === "value" ? lines : lines.toSorted((a, b) => share(b) - share(a));
}

function unordered(encoded: Encoded, token: number | null): Line[] {
  if (token === null) return encoded.features.map((feature) => ({ feature, value: feature.peak }));
  const known = new Map(encoded.features.map((feature) => [feature.feature, feature]));
  return (encoded.firings[token] ?? []).flatMap(({ feature, value }) => {
    const found = known.get(feature);
    return found ? [{ feature: found, value }] : [];
  });
}

/** One feature's value on every token; without a feature, each token's strongest value. */
export function valuesOf(encoded: Encoded, feature: number | null): number[] {
  return encoded.firings.map((firings) =>
    feature === null ? (firings[0]?.value ?? 0) : (firings.find((firing) => firing.feature === feature)?.value ?? 0),
  );
}
