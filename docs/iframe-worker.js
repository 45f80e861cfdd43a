"use strict";
// Pages that are read from the disk may start no worker, and the theme's search is one: there it runs in a hidden frame.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.append(frame);
      this.scope = frame.contentWindow;
      this.loaded = new Promise((resolve, reject) => {
        const script = this.scope.document.createElement("script");
        script.addEventListener("load", resolve);
        script.addEventListener("error", reject);
        script.src = url;
        // What a worker calls to answer; to its own window, a frame would have to name a target.
        this.scope.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
        this.scope.document.body.append(script);
      });
    }

    postMessage(data) {
      this.loaded.then(() => this.scope.dispatchEvent(new MessageEvent("message", { data })));
    }
  };
}
