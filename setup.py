"""What pyproject.toml cannot say: a package index shows README.md with absolute links and pictures, of this version."""

import re
import tomllib
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
LINK = re.compile(r"(?P<before>(?P<picture>!\[[^\]]*)?\]\()(?![a-z]+:)(?P<file>[^)\s]+)\)")


def absolute(link: re.Match[str]) -> str:
    """Return a link to a file of the repository as one that holds anywhere."""
    shown_as = "raw" if link["picture"] else "blob"
    return f"{link['before']}{PROJECT['urls']['Source']}/{shown_as}/v{PROJECT['version']}/{link['file']})"


readme = (ROOT / "README.md").read_text("utf-8")
setup(long_description=LINK.sub(absolute, readme), long_description_content_type="text/markdown")
