"""Looks and keys of the page."""

from __future__ import annotations

from gspn2_diffusion.webapp.vocabulary import Vocabulary

CSS = """
.gradio-container { max-width: 1240px !important; width: 100% !important; margin: 0 auto !important; }
.g2-head h1 { font-size: 1.35rem; font-weight: 700; margin: 0; }
.g2-head p { margin: .15rem 0 0; opacity: .75; font-size: .9rem; }
.g2-stage { display: flex; align-items: center; justify-content: center; width: 100%;
  height: min(512px, 58vh); border-radius: var(--radius-lg); overflow: hidden;
  background: var(--background-fill-secondary); border: 1px solid var(--border-color-primary); }
.g2-stage img { width: 100%; height: 100%; object-fit: contain; }
.g2-empty { color: var(--body-text-color-subdued); text-align: center; line-height: 1.9; }
.g2-empty kbd { border: 1px solid var(--border-color-primary); border-radius: 4px; padding: 0 .35em; }
.g2-status { font-size: .92rem; min-height: 1.5em; padding: .1rem 0; }
.g2-bar { height: 6px; margin-top: .35rem; border-radius: 3px; overflow: hidden;
  background: var(--border-color-primary); }
.g2-bar div { height: 100%; background: var(--color-accent); transition: width .2s; }
#g2-gallery .grid-wrap { min-height: 0 !important; height: auto !important; max-height: 420px; }
#g2-gallery .grid-container { height: auto !important; padding: 0;
  grid-template-columns: repeat(auto-fill, minmax(132px, 1fr)) !important; }
#g2-gallery .caption-label { font-size: .72rem; padding: .1rem .35rem; left: 4px; right: 4px; bottom: 4px;
  max-width: calc(100% - 8px); }
.g2-details { border: 0 !important; width: 100%; font-size: .88rem; border-collapse: collapse; }
.g2-details th { text-align: left; font-weight: 600; padding: .15rem .8rem .15rem 0; vertical-align: top;
  white-space: nowrap; opacity: .7; }
.g2-details th, .g2-details td, .g2-details tr { border: 0 !important; background: none !important; }
.g2-details td { padding: .15rem 0; overflow-wrap: anywhere; }
.g2-chips .wrap { gap: .35rem !important; }
.g2-chips label { border-radius: 999px !important; padding: .2rem .7rem !important; font-size: .85rem; }
.g2-chips input { display: none !important; }
.g2-chips label.selected { outline: 2px solid var(--color-accent); }
.g2-chips label:has(input:focus-visible) { outline: 2px solid var(--body-text-color); }
.g2-chips label span { margin-left: 0 !important; }
#g2-drop { min-height: 90px; }
/* in line with the fields above and below them */
#g2-buttons, #g2-try, #g2-actions { padding: 0 calc(var(--spacing-xl) + 2px) !important; }
#g2-try .label svg { display: none; }
#g2-actions { display: grid; grid-template-columns: 1fr 1fr; }
#g2-actions button { height: 100%; }
@media (max-width: 1000px) { .min_value, .max_value { display: none; } }
@media (max-width: 700px) {
  .gradio-container { padding: .6rem !important; }
  .g2-stage { height: min(92vw, 50vh); }
  .g2-empty div div { display: none; }  /* no keyboard there */
  #g2-buttons { position: fixed; left: 0; right: 0; bottom: 0; z-index: 50; padding: .5rem .8rem !important;
    background: var(--body-background-fill); border-top: 1px solid var(--border-color-primary);
    flex-wrap: nowrap; }
  .gradio-container { padding-bottom: 5rem !important; }
  /* a slider's number stays beside its label */
  .wrap > .head { flex-wrap: nowrap !important; }
  .head .tab-like-container { margin-bottom: 0 !important; }
  .head input[type=number] { min-width: 2.8rem !important; width: 2.8rem; padding: 0 .2rem !important; }
  .head .reset-button { display: none; }
}
"""

# Ctrl+Enter (Cmd+Enter) draws, Esc stops; wherever the focus is.
HEAD = """
<script>
document.addEventListener("keydown", (event) => {
  const press = (id) => {
    const found = document.getElementById(id);
    const button = found && (found.tagName === "BUTTON" ? found : found.querySelector("button"));
    if (button && !button.disabled) button.click();
  };
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    event.stopPropagation();
    // a text field tells the server what was typed when it loses the focus
    if (document.activeElement && document.activeElement.blur) document.activeElement.blur();
    setTimeout(() => press("g2-generate"), 60);
  } else if (event.key === "Escape") {
    press("g2-stop");
  }
}, true);
// on a phone the picture is below the controls
document.addEventListener("click", (event) => {
  const stage = document.getElementById("g2-stage");
  if (window.innerWidth <= 700 && stage && event.target.closest("#g2-generate")) {
    stage.scrollIntoView({behavior: "smooth", block: "start"});
  }
});
</script>
"""


def chip_css(words: Vocabulary) -> str:
    """A dot of its colour in front of each background's chip."""
    rules = [
        f'#g2-background label:has(input[value="{name}"])::before {{ content: ""; width: .8em; height: .8em; '
        f"border-radius: 50%; background: {colour}; border: 1px solid var(--border-color-primary); "
        f"margin-right: .4em; display: inline-block; }}"
        for name, colour in words.backgrounds
    ]
    return "\n".join(rules)
