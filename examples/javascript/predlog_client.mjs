/**
 * A device's client for predlog: each event becomes its rows exactly once, through outages, kills and power cuts.
 *
 * One module for Node.js 18 or newer and for browsers, without packages. In a program:
 *
 *     const spool = await folder("spool"); // in a browser: browserStorage("spool")
 *     const client = new Client("http://predlog.example:8000", spool);
 *     client.run();
 *     client.put(event); // returns once the event is stored; throws when the spool or the disk is full
 *
  * As a program, it reads one JSON event per line from stdin, and ends when all of them have been answered:
 *
 *     API_TOKEN=... node predlog_client.mjs http://predlog.example:8000 spool/ < events.ndjson
 *
 * A web page of another origin must be listed in the producer's CORS_ORIGINS. The spool is used by one process (in a
 * browser, one tab) at a time. It has these files:
 *
 *     open               events that were never sent, one JSON line each; only appended to
 *     <number>-<random>  a request; it never changes, its name is its Idempotency-Key, it stays until it is answered
 *     refused            the first MB of events that predlog will never take (413, 422), for a person to look at
 *
 * Key and position name an event of a batch, so a retry must repeat the same bytes under the same key. That is why
 * `open` is first renamed to a request, and only then sent. A single waiting event is sent to /process, several as a
 * batch.
 */

const BATCH_LENGTH = 256 * 1024; // characters of one request; predlog takes MAX_BODY_BYTES (8 MiB)
const [SPOOL_BYTES, REFUSED_BYTES] = [256 * 1024 * 1024, 1024 * 1024];
const ANSWER_MS = 30_000; // longer than predlog waits for its broker (CONFIRM_TIMEOUT_MS, 10 s)
const LONGEST_PAUSE_MS = 60_000;
const isRefused = (status) => status === 413 || status === 422; // the event is at fault, so a retry cannot help
const isSettled = (status) => status === 200 || isRefused(status);
const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

export class Client {
  constructor(url, spool, token = "") {
    this.url = url.replace(/\/$/, "");
    this.spool = spool;
    this.fields = token ? { Authorization: `Bearer ${token}` } : {};
    const open = spool.read("open");
    // A kill can leave half a line, from a `put` that never returned.
    if (!open.endsWith("\n")) spool.write("open", open.slice(0, open.lastIndexOf("\n") + 1));
  }

  put(event) {
    const line = JSON.stringify(event) + "\n";
    if (this.spool.size() + line.length > SPOOL_BYTES) throw new Error("the spool is full");
    const open = this.spool.read("open");
    if (open && open.length + line.length > BATCH_LENGTH) this.seal();
    this.spool.append("open", line);
  }

  /** Send what is in the spool, oldest first, until it is empty and `ended()` is true. */
  async run(ended = () => false) {
    for (let attempts = 0; ; ) {
      if (!this.requests().length && this.spool.read("open")) this.seal();
      const [name] = this.requests();
      if (name === undefined) {
        if (ended()) return;
        await pause(50);
        continue;
      }
      const retryAfterMs = await this.send(name);
      if (retryAfterMs === undefined) attempts = 0;
      // A random pause, so that devices which lost their server together do not return together.
      else await pause(retryAfterMs + Math.random() * Math.min(LONGEST_PAUSE_MS, 500 * 2 ** attempts++));
    }
  }

  /** Send one request. Return undefined once it is settled, else the least time until its retry. */
  async send(name) {
    const lines = this.spool.read(name).match(/[^\n]*\n/g);
    const { statuses, retryAfterMs, text } = await this.post(name, lines);
    if (!statuses.every(isSettled)) {
      console.error(`predlog: ${lines.length} event(s) wait: ${text.slice(0, 200)}`);
      return retryAfterMs;
    }
    lines.forEach((line, position) => {
      if (!isRefused(statuses[position])) return;
      console.error(`predlog: ${statuses[position]}, never sent again: ${line.slice(0, 200)}`);
      if (this.spool.read("refused").length + line.length <= REFUSED_BYTES) this.spool.append("refused", line);
    });
    this.spool.remove(name);
  }

  async post(key, lines) {
    const [path, type] = lines.length === 1 ? ["/process", "json"] : ["/process/batch", "x-ndjson"];
    const headers = { "Content-Type": `application/${type}`, "Idempotency-Key": key, ...this.fields };
    const signal = AbortSignal.timeout(ANSWER_MS);
    try {
      // "error", because a captive portal's redirect is no answer. Neither is its page, which is not JSON.
      const request = { method: "POST", body: lines.join(""), headers, signal, redirect: "error" };
      const answer = await fetch(this.url + path, request);
      const text = await answer.text();
      const content = answer.ok ? JSON.parse(text) : {};
      const isBatch = answer.status === 207;
      const statuses = isBatch ? content.results.map((each) => each.status) : lines.map(() => answer.status);
      const seconds = Number(answer.headers.get("Retry-After")) || 0;
      return { statuses, retryAfterMs: 1000 * seconds, text: `${answer.status} ${text}` };
    } catch (error) {
      return { statuses: [0], retryAfterMs: 0, text: `no answer (${error.cause ?? error})` }; // the outcome is unknown
    }
  }

  /** Make a request of what is in `open`, before its first attempt. */
  seal() {
    const number = Number.parseInt(this.requests().at(-1) ?? "0", 10) + 1;
    const bytes = [...crypto.getRandomValues(new Uint8Array(16))];
    const random = bytes.map((byte) => byte.toString(16).padStart(2, "0")).join("");
    this.spool.rename("open", `${String(number).padStart(10, "0")}-${random}`);
  }

  requests() {
    return this.spool.names().filter((name) => /^\d/.test(name)).sort();
  }
}

/** A spool in a folder (Node.js). */
export async function folder(path) {
  const fs = await import("node:fs");
  fs.mkdirSync(path, { recursive: true });
  const at = (name) => `${path}/${name}`;
  const synced = (place, flags, text) => {
    const file = fs.openSync(place, flags);
    const { size } = fs.fstatSync(file);
    try {
      if (text !== undefined) fs.writeFileSync(file, text);
      fs.fsyncSync(file);
    } catch (error) {
      if (text !== undefined) fs.ftruncateSync(file, size); // the disk is full; leave no half line
      throw error;
    } finally {
      fs.closeSync(file);
    }
  };
  return {
    names: () => fs.readdirSync(path),
    size: () => fs.readdirSync(path).reduce((sum, name) => sum + fs.statSync(at(name)).size, 0),
    read: (name) => (fs.existsSync(at(name)) ? fs.readFileSync(at(name), "utf8") : ""),
    write: (name, text) => synced(at(name), "w", text),
    append(name, text) {
      const isNew = !fs.existsSync(at(name));
      synced(at(name), "a", text);
      if (isNew) synced(path, "r");
    },
    rename: (from, to) => (fs.renameSync(at(from), at(to)), synced(path, "r")), // a power cut must not undo it
    remove: (name) => fs.unlinkSync(at(name)),
  };
}

/**
  * A spool in the browser's localStorage, of some 5 MB. All files are in one item, so that each change is atomic. The
 * spool outlives tabs. A browser that crashes can lose the changes of its last seconds, and what was put or sent then
 * is lost or stored twice.
 */
export function browserStorage(item) {
  let files = JSON.parse(localStorage.getItem(item) ?? "{}");
  const save = (changed) => {
    localStorage.setItem(item, JSON.stringify(changed)); // throws when it is full
    files = changed;
  };
  return {
    names: () => Object.keys(files),
    size: () => JSON.stringify(files).length,
    read: (name) => files[name] ?? "",
    write: (name, text) => save({ ...files, [name]: text }),
    append: (name, text) => save({ ...files, [name]: (files[name] ?? "") + text }),
    rename: (from, to) => save({ ...files, [to]: files[from], [from]: "" }),
    remove(name) {
      const { [name]: _, ...others } = files;
      save(others);
    },
  };
}

if (globalThis.process?.argv[1]?.endsWith("predlog_client.mjs")) {
  const [url, path] = process.argv.slice(2);
  const client = new Client(url, await folder(path), process.env.API_TOKEN);
  const { createInterface } = await import("node:readline");
  let ended = false;
  const sent = client.run(() => ended);
  for await (const line of createInterface({ input: process.stdin })) {
    try {
      if (line.trim()) client.put(JSON.parse(line));
    } catch (error) {
      console.error(`predlog: an event was dropped: ${error.message}`);
    }
  }
  ended = true;
  await sent;
}
