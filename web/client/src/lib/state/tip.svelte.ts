/** The one tooltip of the page: what it says and which box it points at. Shown on hover and on keyboard focus alike. */

export interface Tip {
  lines: string[];
  box: DOMRect;
}

class TipState {
  shown: Tip | null = $state.raw(null);

  show(element: Element, lines: string[]): void {
    this.shown = { lines, box: element.getBoundingClientRect() };
  }

  hide(): void {
    this.shown = null;
  }
}

export const tip = new TipState();
