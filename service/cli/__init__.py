"""The `tminus` command. Each subcommand is a file; no other part of the service prints or exits."""
