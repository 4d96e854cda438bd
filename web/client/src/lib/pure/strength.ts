/** How an activation becomes a shade and an underline. One hue; the strength sets how much of it. */

/** 0…1: how strong `value` is on a scale that ends at `max`. Logarithmic, so that weak firings stay visible. */
export function strength(value: number, max: number): number {
  if (!(value > 0) || !(max > 0)) return 0;
  const ratio = Math.min(value / max, 1);
  return Math.log10(1 + 9 * ratio);
}

/** 0…3: the thickness of the underline, so that strength never rests on colour alone. */
export function level(value: number, max: number): 0 | 1 | 2 | 3 {
  if (!(value > 0) || !(max > 0)) return 0;
  const ratio = value / max;
  return ratio >= 2 / 3 ? 3 : ratio >= 1 / 3 ? 2 : 1;
}

type Rgb = [number, number, number];

/** "#rrggbb" as three numbers from 0 to 255. */
export function parseHex(hex: string): Rgb {
  const value = Number.parseInt(hex.slice(1), 16);
  return [(value >> 16) & 255, (value >> 8) & 255, value & 255];
}

/** `amount` of `top` over `bottom`, as the browser mixes them in sRGB. */
export function mix(bottom: Rgb, top: Rgb, amount: number): Rgb {
  return bottom.map((channel, i) => channel + (top[i]! - channel) * amount) as Rgb;
}

function luminance(colour: Rgb): number {
  const [r, g, b] = colour.map((channel) => {
    const c = channel / 255;
    return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  }) as Rgb;
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

/** The WCAG contrast ratio of two colours, 1…21. */
export function contrast(a: Rgb, b: Rgb): number {
  const [low, high] = [luminance(a), luminance(b)].sort((x, y) => x - y) as [number, number];
  return (high + 0.05) / (low + 0.05);
}
