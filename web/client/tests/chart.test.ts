import { expect, test } from "vitest";
import { bandName, bandSays } from "$lib/pure/bands";
import { bars, ticks } from "$lib/pure/chart";
import { linesOf, valuesOf } from "$lib/pure/fired";
import { explain } from "$lib/pure/metrics";

test("bars fill the axis, without the empty bins at its ends", () => {
  const drawn = bars({ edges: [0.1, 1, 10, 100, 1000], counts: [0, 4, 1, 0] }, "log");
  expect(drawn.map((bar) => [bar.low, bar.high, bar.count])).toEqual([[1, 10, 4], [10, 100, 1]]);
  expect(drawn[0]!.x).toBeCloseTo(0);
  expect(drawn[1]!.x).toBeCloseTo(0.5);
  expect(drawn[1]!.x + drawn[1]!.width).toBeCloseTo(1);
  expect(drawn.map((bar) => bar.height)).toEqual([1, 0.25]);
  expect(bars({ edges: [0.1, 1, 10], counts: [0, 4] }, "log", true)[0]!.height).toBe(1);
  expect(bars({ edges: [], counts: [] }, "log")).toEqual([]);
  expect(bars({ edges: [0, 1], counts: [0] }, "linear")).toEqual([]);
});

test("a log axis may begin at zero", () => {
  const drawn = bars({ edges: [0, 1, 10], counts: [3, 1] }, "log");
  expect(drawn.every((bar) => Number.isFinite(bar.x) && bar.width > 0)).toBe(true);
});

test("ticks are round and inside", () => {
  expect(ticks(0, 10, "linear").map(([, value]) => value)).toEqual([0, 2, 4, 6, 8, 10]);
  expect(ticks(0.001, 1, "log").map(([, value]) => value)).toEqual([0.001, 0.01, 0.1, 1]);
  expect(ticks(5, 5, "linear")).toEqual([]);
  expect(ticks(0, 1, "log")).toEqual([]);
});

test("bands say how many of how many are shown", () => {
  const band = { kind: "sample" as const, band: 1, sampled: 5, of: 1204, low: 4, high: 8 };
  expect(bandName(band)).toBe("4 – 8");
  expect(bandSays(band)).toContain("Sampled 5 of 1,204 sequences in which it peaks between 4 and 8");
  expect(bandSays({ ...band, sampled: 0, of: 3 })).toContain("are all among the strongest");
  expect(bandSays({ ...band, sampled: 0, of: 0 })).toContain("In no sequence");
  expect(bandSays({ ...band, low: 0, sampled: 2, of: 2 })).toBe("All 2 sequences in which it peaks below 8.");
  expect(bandSays({ ...band, kind: "top", band: -1, sampled: 20 })).toBe("The 20 strongest of 1,204 sequences in which it fires.");
  expect(bandSays({ ...band, kind: "top", band: -1, sampled: 1, of: 1 })).toBe("All 1 sequence in which it fires, strongest first.");
});

test("known metrics come first and explained, unknown ones are kept", () => {
  const shown = explain({ zeal_of_all: 2, cosine: 0.9, fvu: 0.12, L0: 31.9 });
  expect(shown.map((metric) => metric.name)).toEqual(["L0", "FVU", "Cosine", "zeal of all"]);
  expect(shown.map((metric) => metric.headline)).toEqual([true, true, false, false]);
  expect(shown[1]).toMatchObject({ value: "0.120", meaning: expect.stringContaining("variance") });
  expect(explain({})).toEqual([]);
});

test("firings are seen from a token and from a feature", () => {
  const about = (feature: number, peak: number) => ({ feature, layer: null, peak, at: 1, n_tokens: 1, max: 9, density: 0.1, top_token: "a", promotes: [] });
  const encoded = {
    tokens: ["<s>", "a", "b"],
    firings: [[], [{ feature: 7, value: 3 }, { feature: 2, value: 1 }], [{ feature: 2, value: 2 }]],
    features: [about(7, 3), about(2, 2)],
    skipped: 1,
    seconds: 0.1,
  };
  expect(linesOf(encoded, null).map((line) => [line.feature.feature, line.value])).toEqual([[7, 3], [2, 2]]);
  expect(linesOf(encoded, 1).map((line) => [line.feature.feature, line.value])).toEqual([[7, 3], [2, 1]]);
  expect(linesOf(encoded, 9)).toEqual([]);
  const loud = { ...encoded, features: [{ ...about(7, 3), max: 100 }, about(2, 2)] };
  expect(linesOf(loud, null, "share").map((line) => line.feature.feature)).toEqual([2, 7]);
  expect(linesOf(loud, 1, "share").map((line) => line.feature.feature)).toEqual([2, 7]);
  expect(valuesOf(encoded, null)).toEqual([0, 3, 2]);
  expect(valuesOf(encoded, 2)).toEqual([0, 1, 2]);
});
