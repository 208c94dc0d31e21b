"use strict";

const byId = (id) => document.getElementById(id);
let file = null;

function say(text, isError) {
  byId("state").textContent = text;
  byId("state").className = isError ? "error" : "";
}

async function ask(path, options) {
  const response = await fetch(path, options);
  const said = await response.json();
  if (!response.ok) throw new Error(said.error || response.statusText);
  return said;
}

async function listModels() {
  const { models } = await ask("v1/models");
  for (const model of models) {
    const option = document.createElement("option");
    option.textContent = model.name;
    byId("model").append(option);
  }
}

function show(answer) {
  byId("answer").hidden = false;
  byId("seen").src = answer.image || URL.createObjectURL(file);
  byId("heatmap").hidden = !answer.heat;
  if (answer.heat) {
    byId("heat").src = answer.heat;
    const shown = answer.classes.find((each) => each.label === answer.label);
    byId("of").textContent = `Grad-CAM: what speaks for ${shown ? shown.class_name : answer.label}`;
  }
  byId("classes").replaceChildren(
    ...answer.classes.map((each) => {
      const row = document.createElement("tr");
      row.className = each.label === answer.label ? "class shown" : "class";
      for (const text of [each.class_name, `${(100 * each.probability).toFixed(2)}%`]) {
        const cell = document.createElement("td");
        cell.textContent = text;
        row.append(cell);
      }
      row.addEventListener("click", () => classify(each.label));
      return row;
    }),
  );
  byId("version").textContent = `${answer.model}, version ${answer.version}`;
}

async function classify(label = -1) {
  if (!file) return;
  say("…");
  const path = `v1/models/${encodeURIComponent(byId("model").value)}`;
  const options = { method: "POST", body: file };
  try {
    let answer;
    try {
      answer = await ask(`${path}:explain?top=5&label=${label}`, options);
    } catch (error) {
      if (!/Grad-CAM/.test(error.message)) throw error;
      answer = await ask(`${path}:predict?top=5`, options);
    }
    show(answer);
    say("");
  } catch (error) {
    byId("answer").hidden = true;
    say(error.message, true);
  }
}

function take(files) {
  if (!files.length) return;
  file = files[0];
  classify();
}

const drop = byId("drop");
for (const name of ["dragover", "dragleave", "drop"]) {
  drop.addEventListener(name, (event) => {
    event.preventDefault();
    drop.classList.toggle("over", name === "dragover");
    if (name === "drop") take(event.dataTransfer.files);
  });
}
byId("file").addEventListener("change", (event) => take(event.target.files));
byId("model").addEventListener("change", () => classify());
listModels().catch((error) => say(error.message, true));
