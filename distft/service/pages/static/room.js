// What the pages need a script for, beside htmx: dropping files, answers as they are written. All works without it too,
// but for seeing an answer grow.
"use strict";

function dropped(zone) {
  const input = zone.querySelector("input[type=file]");
  const over = (on) => (event) => { event.preventDefault(); zone.classList.toggle("over", on); };
  zone.addEventListener("dragenter", over(true));
  zone.addEventListener("dragover", over(true));
  zone.addEventListener("dragleave", over(false));
  zone.addEventListener("drop", (event) => {
    over(false)(event);
    if (!event.dataTransfer.files.length) return;
    input.files = event.dataTransfer.files;
    zone.closest("form").requestSubmit();
  });
}

function busy(form) {
  form.addEventListener("submit", () => {
    const button = form.querySelector("button[data-busy]");
    if (button) { button.textContent = button.dataset.busy; button.setAttribute("aria-busy", "true"); }
  });
}

async function answer(form, pane) {
  const out = pane.querySelector(".answer"), said = pane.querySelector(".said");
  const body = new FormData(form);
  body.set("model", pane.dataset.model);
  out.textContent = "";
  said.textContent = "waiting for the model";
  const began = performance.now();
  try {
    const reply = await fetch("/playground/answer", {
      method: "POST", body, headers: { "x-csrf-token": body.get("csrf") }, credentials: "same-origin",
    });
    if (!reply.ok) {
      const { error } = await reply.json();
      const field = error.param && error.param !== "model" && form.elements[error.param];
      if (field) {
        field.setAttribute("aria-invalid", "true");
        field.closest("details")?.setAttribute("open", "");
      }
      throw new Error(error.message);
    }
    const lines = reply.body.pipeThrough(new TextDecoderStream()).getReader();
    let held = "", pieces = 0, reason = "";
    for (;;) {
      const { done, value } = await lines.read();
      if (done) break;
      held += value;
      const events = held.split("\n\n");
      held = events.pop();
      for (const event of events) {
        const text = event.replace(/^data: /, "");
        if (text === "[DONE]") continue;
        const content = JSON.parse(text);
        if (content.error) throw new Error(content.error.message);
        const choice = content.choices[0];
        if (!choice) continue;
        if (choice.delta.content) { out.textContent += choice.delta.content; pieces += 1; said.textContent = "writing"; }
        reason = choice.finish_reason || reason;
      }
    }
    const seconds = ((performance.now() - began) / 1000).toFixed(1);
    const ends = { length: "cut at the limit of tokens", stop: "ended by itself" };
    if (!out.textContent) out.textContent = "(an empty answer)";
    said.textContent = `${ends[reason] || "ended"}, ${seconds} s`;
  } catch (error) {
    out.textContent = "";
    said.textContent = error.message;
    said.classList.add("bad");
  }
}

function playground(form) {
  form.addEventListener("submit", async (event) => {
    const panes = document.querySelectorAll(".pane");
    if (event.submitter && event.submitter.dataset.plain !== undefined) return;
    event.preventDefault();
    for (const field of form.elements) field.removeAttribute("aria-invalid");
    const models = [form.elements.a.value, form.elements.b.value];
    const link = new URL(location.href);
    for (const name of ["a", "b", "prompt", "system", "seed", "temperature", "max_tokens"])
      link.searchParams.set(name, form.elements[name].value);
    history.replaceState(null, "", link);
    panes.forEach((pane, place) => {
      pane.dataset.model = models[place];
      pane.querySelector("h2").textContent = models[place] || "No model chosen";
      pane.querySelector(".said").classList.remove("bad");
    });
    for (const pane of panes) if (pane.dataset.model) await answer(form, pane);
  });
}

document.addEventListener("submit", (event) => {
  const asked = event.target.dataset && event.target.dataset.confirm;
  if (asked && !window.confirm(asked)) event.preventDefault();
}, true);

document.addEventListener("DOMContentLoaded", () => {
  document.querySelectorAll(".drop").forEach(dropped);
  document.querySelectorAll("form").forEach(busy);
  document.querySelectorAll("form[data-playground]").forEach(playground);
});
