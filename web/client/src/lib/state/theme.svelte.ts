/** Light, dark, or as the system says. The choice is kept in the browser; `public/theme.js` applies it before the first paint. */

type Theme = "light" | "dark";

const system = window.matchMedia("(prefers-color-scheme: dark)");

class ThemeState {
  current: Theme = $state(read());

  constructor() {
    system.addEventListener("change", () => (this.current = read()));
  }

  /** Change to the other theme, and remember it unless it is what the system says anyway. */
  toggle(): void {
    this.current = this.current === "dark" ? "light" : "dark";
    document.documentElement.dataset.theme = this.current;
    try {
      if (this.current === (system.matches ? "dark" : "light")) localStorage.removeItem("theme");
      else localStorage.setItem("theme", this.current);
    } catch {
      // storage is switched off: the choice lasts as long as the page
    }
  }
}

function read(): Theme {
  const chosen = document.documentElement.dataset.theme;
  return chosen === "dark" || chosen === "light" ? chosen : system.matches ? "dark" : "light";
}

export const theme = new ThemeState();
