/** The arithmetic of the charts: bars and ticks on a linear or logarithmic axis. */

import type { Histogram } from "$lib/api/types";

export interface Bar {
  x: number; // 0…1
  width: number; // 0…1
  height: number; // 0…1
  low: number;
  high: number;
  count: number;
}

/** The bars of a histogram, empty bins at both ends cut off; heights by count, or by its square root to keep rare bins in sight. */
export function bars(histogram: Histogram, scale: "linear" | "log", root = false): Bar[] {
  const { edges, counts } = histogram;
  const filled = counts.flatMap((n, i) => (n > 0 ? [i] : []));
  if (filled.length === 0) return [];
  const [from, to] = [filled[0]!, filled.at(-1)! + 1];
  const place = scale === "log" ? logPlace(edges[from]!, edges[to]!, edges) : linearPlace(edges[from]!, edges[to]!);
  const tallest = Math.max(...counts);
  return counts.slice(from, to).map((n, offset) => {
    const [low, high] = [edges[from + offset]!, edges[from + offset + 1]!];
    const x = place(low);
    const share = n / tallest;
    return { x, width: place(high) - x, height: root ? Math.sqrt(share) : share, low, high, count: n };
  });
}

function linearPlace(low: number, high: number): (value: number) => number {
  const span = high - low || 1;
  return (value) => (value - low) / span;
}

/** On a log axis an edge of zero (or below) stands one bin to the left of the first positive one. */
function logPlace(low: number, high: number, edges: number[]): (value: number) => number {
  const positive = edges.filter((edge) => edge > 0);
  const step = positive.length > 1 ? positive[1]! / positive[0]! : 10;
  const floor = positive.length > 0 ? positive[0]! / step : 1;
  const log = (value: number) => Math.log10(Math.max(value, floor));
  const span = log(high) - log(low) || 1;
  return (value) => (log(value) - log(low)) / span;
}

/** Where to draw ticks between `low` and `high`, as [place 0…1, value]. */
export function ticks(low: number, high: number, scale: "linear" | "log", wanted = 5): [number, number][] {
  if (!(high > low)) return [];
  if (scale === "log") return logTicks(low, high);
  const rough = (high - low) / wanted;
  const size = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * size).find((s) => (high - low) / s <= wanted) ?? size * 10;
  const out: [number, number][] = [];
  for (let k = Math.ceil(low / step); k * step <= high * (1 + 1e-12); k++) out.push([(k * step - low) / (high - low), k * step]);
  return out;
}

function logTicks(low: number, high: number): [number, number][] {
  if (!(low > 0)) return [];
  const [a, b] = [Math.log10(low), Math.log10(high)];
  const place = (value: number) => (Math.log10(value) - a) / (b - a);
  const steps = b - a > 1.5 ? [1] : b - a > 0.7 ? [1, 2, 5] : [1, 1.5, 2, 3, 4, 5, 7];
  const out: [number, number][] = [];
  for (let decade = Math.floor(a); decade <= Math.ceil(b); decade++) {
    for (const step of steps) {
      const value = step * 10 ** decade;
      if (value >= low * 0.999 && value <= high * 1.001) out.push([place(value), Number(value.toPrecision(3))]);
    }
  }
  return out;
}
