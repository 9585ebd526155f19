// Browsers start no worker from file://. There the script of the search runs in a hidden frame, with a worker's interface.
// Zensical fetches a shim from another host unless a polyfill has this name.
"use strict";
if (location.protocol === "file:") {
  const deliver = (target, message) => {
    const data = structuredClone(message);
    setTimeout(() => target?.onmessage?.(new MessageEvent("message", { data })));
  };
  window.Worker = class {
    onmessage = null;
    onerror = null;

    constructor(url) {
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      document.body.append(this.frame);
      const inside = this.frame.contentWindow;
      // The script posts to itself, as a worker posts to its page. Messages are copies, and come in turns of their own.
      inside.postMessage = (data) => deliver(this, data);
      this.ready = new Promise((resolve) => {
        const script = inside.document.createElement("script");
        script.onload = resolve;
        script.onerror = () => this.onerror?.(new ErrorEvent("error", { filename: String(url) }));
        script.src = url;
        inside.document.body.append(script);
      });
    }

    postMessage(data) {
      this.ready.then(() => deliver(this.frame.contentWindow, data));
    }

    terminate() {
      this.frame.remove();
    }
  };
}
