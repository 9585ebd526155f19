"""Opens the page of a server in the browser of the person who started it."""

import logging
import os
import sys
import webbrowser

log = logging.getLogger(__name__)


def open_page(url: str) -> None:
    """Open a page, if there is a display, or if BROWSER says what to open it with; the log says where it is not opened.

    This may last as long as the browser runs.
    """
    # Without a display webbrowser takes browsers for terminals, and this one is the server's.
    if sys.platform == "linux" and not any(map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"))):
        log.warning("--open-browser: there is no display here; open %s yourself", url)
    elif not webbrowser.open(url):
        log.warning("--open-browser: no browser could be opened; open %s yourself", url)
