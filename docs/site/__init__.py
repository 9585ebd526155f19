"""The documentation site: what `make docs` builds out of README.md, docs/ and the code."""
