/** Numbers for people. */

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

/** 1234567 → "1,234,567". */
export function count(value: number): string {
  return whole.format(value);
}

/** 1234567 → "1.2M": for places with little room. */
export function short(value: number): string {
  const units: [number, string][] = [[1e9, "B"], [1e6, "M"], [1e3, "k"]];
  for (const [size, letter] of units) {
    if (Math.abs(value) >= size * 0.9995) return `${trim((value / size).toPrecision(3))}${letter}`;
  }
  return trim(value.toPrecision(3));
}

/** Three significant digits, no exponent for everyday sizes: 0.0123, 4.50, 789, 1.2e-7. */
export function number(value: number, digits = 3): string {
  if (!Number.isFinite(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-4) return value.toExponential(digits - 2);
  if (size >= 10 ** digits) return whole.format(value);
  return value.toPrecision(digits).replace("-", "−");
}

/** The same without zeros at the end: for ticks and limits, which are round. */
export function brief(value: number): string {
  return trim(number(value));
}

/** With its sign: +4.5, −0.31. */
export function signed(value: number, digits = 2): string {
  return `${value > 0 ? "+" : ""}${number(value, digits)}`;
}

/** A share as a percentage: 0.00123 → "0.123%", 0.25 → "25.0%". */
export function percent(value: number): string {
  return value === 0 ? "0%" : `${number(value * 100)}%`;
}

/** The same without zeros at the end. */
export function briefPercent(value: number): string {
  return `${brief(value * 100)}%`;
}

/** How rare something is: 0.00123 → "1 in 813". */
export function oneIn(density: number): string {
  if (!(density > 0)) return "never";
  const every = 1 / density;
  return every < 1.5 ? "every token" : `1 token in ${every < 10 ? trim(every.toPrecision(2)) : count(Math.round(every))}`;
}

/** 0.123 → "123 ms", 7.26 → "7.3 s". */
export function duration(seconds: number): string {
  return seconds < 1 ? `${Math.round(seconds * 1000)} ms` : `${seconds.toFixed(1)} s`;
}

/** "1 feature", "2 features". */
export function plural(n: number, noun: string): string {
  return `${count(n)} ${noun}${n === 1 ? "" : "s"}`;
}

function trim(text: string): string {
  if (!text.includes(".") || text.includes("e")) return text;
  return text.replace(/\.?0+$/, "");
}
