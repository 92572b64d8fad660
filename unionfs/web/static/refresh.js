// Replaces the content of the page now and then, without losing the place in it.
"use strict";
const seconds = Math.max(Number(document.currentScript.dataset.seconds), 1);
const state = document.getElementById("state");

async function refresh() {
  const main = document.querySelector("main");
  const busy = document.hidden || main.contains(document.activeElement) || !getSelection().isCollapsed;
  if (!busy) {
    try {
      const answer = await fetch(location.href, { signal: AbortSignal.timeout(30000) });
      const page = new DOMParser().parseFromString(await answer.text(), "text/html");
      const fresh = page.querySelector("main");
      if (answer.status === 403 || !fresh) {
        state.textContent = "· another server runs here now: open the address that it has printed";
        return;
      }
      main.replaceWith(fresh);
      document.querySelector("footer").firstChild.replaceWith(page.querySelector("footer").firstChild);
      state.textContent = "";
    } catch {
      state.textContent = "· the server does not answer";
    }
  }
  setTimeout(refresh, seconds * 1000);
}

setTimeout(refresh, seconds * 1000);
