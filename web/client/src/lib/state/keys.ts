/** Keyboard shortcuts: one listener, a map from key to action. Nothing fires while someone types. */

export type Keys = Record<string, () => void>;

/** Listen for single keys; returns the way to stop. Keys with Ctrl, Alt or Cmd belong to the browser. */
export function listenKeys(keys: () => Keys): () => void {
  const pressed = (event: KeyboardEvent) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented || typing(event.target)) return;
    const action = keys()[event.key];
    if (!action) return;
    event.preventDefault();
    action();
  };
  window.addEventListener("keydown", pressed);
  return () => window.removeEventListener("keydown", pressed);
}

function typing(target: EventTarget | null): boolean {
  return target instanceof HTMLElement && (target.isContentEditable || /^(INPUT|TEXTAREA|SELECT)$/.test(target.tagName));
}
