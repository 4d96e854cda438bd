/**
 * How a token is shown. Its text is never parsed as markup: these functions return plain strings. The server's display strings
 * already show line ends as ↵ and tabs as →; here that is made sure of, and spaces are made visible where they matter.
 */

/** The marks for characters that have no ink: newline ↵, carriage return ␍, tab →. */
export function visible(token: string): string {
  return token.replaceAll("\r\n", "↵").replaceAll("\n", "↵").replaceAll("\r", "␍").replaceAll("\t", "→");
}

/** The same with the lines broken behind each mark, so that what follows it in the token (an indent) begins the next line. */
export function broken(token: string): string {
  return visible(token).replaceAll("↵", "↵\n");
}

/** A token for a list: its text, and its outer spaces as open boxes to draw more faintly. */
export function parts(token: string): { before: string; text: string; after: string } {
  const text = visible(token);
  if (text === "") return { before: "", text: "∅", after: "" };
  const before = /^ */.exec(text)![0].length;
  const after = before === text.length ? 0 : / *$/.exec(text)![0].length;
  return { before: "␣".repeat(before), text: text.slice(before, text.length - after), after: "␣".repeat(after) };
}

/** The same as one string, for labels and tooltips. */
export function quoted(token: string): string {
  const { before, text, after } = parts(token);
  return before + text + after;
}
