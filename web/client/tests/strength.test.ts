import { readFileSync } from "node:fs";
import { expect, test } from "vitest";
import { contrast, level, mix, parseHex, strength } from "$lib/pure/strength";

const css = readFileSync(new URL("../src/app.css", import.meta.url), "utf8");
const pairs = [...css.matchAll(/--([\w-]+): light-dark\((#\w+), (#\w+)\);/g)];
const [light, dark] = [2, 3].map((side) => new Map(pairs.map((pair) => [pair[1]!, pair[side]!]))) as [Map<string, string>, Map<string, string>];

test("strength grows with the value, from nothing to all", () => {
  expect([strength(0, 5), strength(-1, 5), strength(5, 5), strength(9, 5), strength(1, 0), strength(Number.NaN, 1)]).toEqual([0, 0, 1, 1, 0, 0]);
  const values = [0.1, 0.5, 1, 2, 4, 5].map((value) => strength(value, 5));
  expect(values).toEqual([...values].sort((a, b) => a - b));
  expect(strength(0.5, 5)).toBeGreaterThan(0.25);
});

test("the underline has three steps", () => {
  expect([0, 0.1, 1.9, 2, 3.9, 4, 6].map((value) => level(value, 6))).toEqual([0, 1, 1, 2, 2, 3, 3]);
});

test("the contrast of black and white is 21", () => {
  expect(contrast([0, 0, 0], [255, 255, 255])).toBeCloseTo(21);
});

test.each([["light", light], ["dark", dark]] as const)("every text is readable in the %s theme", (_, theme) => {
  const colour = (name: string) => parseHex(theme.get(name)!);
  for (const ground of ["paper", "card", "sunken", "accent-soft"]) {
    for (const text of ["ink", "muted", "accent"]) expect(contrast(colour(text), colour(ground)), `${text} on ${ground}`).toBeGreaterThanOrEqual(4.5);
  }
  for (const text of ["up", "down", "bad"]) expect(contrast(colour(text), colour("card")), text).toBeGreaterThanOrEqual(4.5);
  expect(contrast(colour("paper"), colour("accent"))).toBeGreaterThanOrEqual(4.5);
  for (let amount = 0; amount <= 1; amount += 0.05) {
    const shade = mix(colour("card"), colour("heat"), amount);
    expect(contrast(colour("ink"), shade), `shade ${amount}`).toBeGreaterThanOrEqual(4.5);
    expect(contrast(colour("mark"), shade), `underline on ${amount}`).toBeGreaterThanOrEqual(3);
  }
  expect(contrast(colour("strong-line"), colour("card"))).toBeGreaterThanOrEqual(3);
});
