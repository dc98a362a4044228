// Runs the script of the page (argument 1) with stand-ins for the browser's elements and for the
// server, does what a user does, and prints what there is to see after each act.
import fs from "node:fs";

const page = fs.readFileSync(process.argv[2], "utf8");

class Element {
  constructor(tag) {
    Object.assign(this, {tag, children: [], parent: null, textContent: "", className: "", value: "",
                         scrollTop: 0, scrollHeight: 0, clientHeight: 0});
  }
  append(...added) {
    for (const each of added) { this.children.push(each); each.parent = this; }
    if (this.tag === "select" && !this.value && added.length) this.value = added[0].value;
  }
  replaceChildren(...added) { this.children = []; this.append(...added); }
  remove() { this.parent.children = this.parent.children.filter(each => each !== this); }
  setAttribute() {}
  focus() {}
  requestSubmit() { return this.onsubmit({preventDefault() {}}); }
}

const ids = {};
for (const [tag, name, id] of page.matchAll(/<(\w+)[^>]*\bid="(\w+)"[^>]*>/g)) {
  ids[id] = new Element(name);
  ids[id].value = (tag.match(/value="([^"]*)"/) || [])[1] || "";
}
ids.mode.value = "chat";
globalThis.document = {
  getElementById: id => { if (!ids[id]) throw new Error(`no element ${id}`); return ids[id]; },
  createElement: tag => new Element(tag),
  querySelectorAll: () => [],
};
const kept = {};
globalThis.sessionStorage = {getItem: key => kept[key] ?? null, setItem: (key, value) => { kept[key] = value; }};

const asked = [];
const frame = data => `data: ${JSON.stringify(data)}\n\n`;
globalThis.fetch = async (path, options) => {
  if (path === "v1/models") return Response.json({data: [{id: "base"}, {id: "mine"}]});
  const body = JSON.parse(options.body), key = options.headers.Authorization || null;
  asked.push({path, body, key});
  const text = body.prompt || body.messages.at(-1).content;
  if (text === "refuse") return Response.json({error: {message: "no <b>"}}, {status: 400});
  const piece = (content, finish_reason = null) =>
    ({choices: [{delta: {content}, text: content, finish_reason}]});
  const frames = [": ping\n\n", frame(piece(`${body.model} says <i>`)), frame(piece("né😀"))];
  if (text === "break") frames.push(frame({error: {message: "the engine failed"}}));
  else if (text !== "lose") frames.push(frame(piece(null, "stop")), frame({choices: [], usage: {}}), "data: [DONE]\n\n");
  const bytes = new TextEncoder().encode(frames.join(""));
  let at = 0;
  return new Response(new ReadableStream({
    pull(stream) {  // few bytes at a time, so that characters and lines are cut
      if (options.signal.aborted) return stream.error(options.signal.reason);
      if (text === "wait" && at > 60) return new Promise(() => options.signal.addEventListener(
        "abort", () => stream.error(options.signal.reason)));
      if (at >= bytes.length) return stream.close();
      stream.enqueue(bytes.slice(at, at += 3));
    },
  }));
};

const seen = {};
const see = act => { seen[act] = ids.panels.children.map(section => section.children[1].children.map(each => [each.className, each.textContent])); };
const send = text => { ids.text.value = text; return ids.form.requestSubmit(); };

new Function(page.match(/<script>([\s\S]*)<\/script>/)[1])();
await new Promise(done => setTimeout(done, 20));
await send("one"); see("one");
ids.key.value = "secret"; ids.key.onchange();
ids.beside.onclick(); ids.system.value = "be nice"; await send("two"); see("two");
ids.reset.onclick(); see("reset");
ids.beside.onclick();
const waits = send("wait"); setTimeout(() => ids.stop.onclick(), 50); await waits; see("stopped");
ids.reset.onclick(); await send("refuse"); see("refused");
ids.reset.onclick(); await send("break"); see("broken");
ids.reset.onclick(); await send("lose"); see("lost");
ids.reset.onclick(); ids.mode.value = "text"; await send("go on"); see("text");
console.log(JSON.stringify({seen, asked, kept}));
