"""What `make docs` makes: the reference in docs/reference/, of the code, and the site, of README.md and docs/."""
