// Links to this page that hold how an image is made.

const TOLD_MS = 2000;

/** Copy the address of this page with another hash; a page that is not secure has no clipboard, and shows it instead. */
export async function copyLink(button, hash) {
  const address = new URL(hash, location.href).href;
  const text = button.textContent;
  try {
    await navigator.clipboard.writeText(address);
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = text), TOLD_MS);
  } catch {
    prompt("The link:", address);
  }
}
