// Where the server asks for a key: a dialog. The browser keeps the key in a cookie that no script can read.

const element = (id) => document.getElementById(id);
const [dialog, form, field] = ["key-dialog", "key-form", "key"].map(element);
export let signedIn = false;
let pending = null; // several requests are refused at the same time; one dialog serves them all

// Ask for a key until the server knows it. login: where the server takes it.
export function signIn(login) {
  return (pending ??= new Promise((resolve) => {
    form.onsubmit = async (event) => {
      event.preventDefault();
      const problem = await send(login, field.value.trim());
      element("key-error").textContent = problem ?? "";
      if (problem === null) resolve();
      else field.focus();
    };
    dialog.showModal();
  }).then(() => {
    field.value = "";
    pending = null;
    dialog.close();
  }));
}

// What is wrong with a key; null where it is kept now.
async function send(login, key) {
  const options = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ key }) };
  try {
    const response = await fetch(login, options);
    if (response.ok) return null;
    return response.status === 401 ? "The server does not know this key." : `The server answered ${response.status}.`;
  } catch {
    return "There is no connection.";
  }
}

// Say who is signed in, if anybody is, and let them leave. who: what GET /key says.
export function showWho(who, logout) {
  signedIn = who.name !== null;
  element("who").hidden = !signedIn;
  element("who-name").textContent = who.name ?? "";
  element("sign-out").onclick = async () => {
    const response = await fetch(logout, { method: "POST" }).catch(() => null);
    if (!response?.ok) return alert("There was no answer: you are still signed in.");
    sessionStorage.clear(); // what is kept there is of who leaves
    location.replace(location.pathname);
  };
}

// Behind it there is nothing to use yet. A browser closes it by a second Escape whatever is said to the first.
dialog.addEventListener("close", () => pending && dialog.showModal());
