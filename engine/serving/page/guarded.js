// Asking until there is an answer: a missing key is asked for, a busy or absent server asked again.

import * as api from "./api.js";
import { find } from "./dom.js";

const AGAIN = 3000; // milliseconds between two looks for a server that is gone

/** What `ask` answers; `busy` is told what is waited for. */
export async function guarded(ask, { signal = null, busy = () => {} } = {}) {
  for (;;) {
    try {
      return await ask();
    } catch (error) {
      if (signal?.aborted) throw error;
      if (error instanceof api.Offline) await back();
      else if (error.status === 401) await askForKey(error.message);
      else if (error.status === 503) {
        const seconds = error.seconds ?? 1;
        busy(`the server is busy; asking again in ${seconds} s`);
        await pause(1000 * seconds);
      } else throw error;
      signal?.throwIfAborted();
    }
  }
}

const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

let returning = null;

/** Until the server answers again; until then the page says so. */
function back() {
  returning ??= (async () => {
    const banner = find("banner");
    banner.textContent = "The server does not answer. Is it still running? It is asked again every few seconds.";
    banner.hidden = false;
    try {
      for (;;) {
        await pause(AGAIN);
        try {
          await api.alive();
          return;
        } catch (error) {
          if (!(error instanceof api.Offline)) return;
        }
      }
    } finally {
      banner.hidden = true;
      banner.textContent = "";
      returning = null;
    }
  })();
  return returning;
}

let asking = null;

/** Until somebody has given a key. */
export function askForKey(why) {
  asking ??= new Promise((resolve) => {
    const dialog = find("key-dialog");
    const wrong = api.key.get() !== null;
    find("key-why").textContent = wrong ? `That key was refused: ${why}.` : "This server answers only who has a key.";
    find("key-input").value = "";
    dialog.addEventListener("cancel", (event) => event.preventDefault());
    dialog.addEventListener(
      "close",
      () => {
        api.key.set(find("key-input").value);
        find("key").hidden = false;
        asking = null;
        resolve();
      },
      { once: true },
    );
    dialog.showModal();
  });
  return asking;
}
