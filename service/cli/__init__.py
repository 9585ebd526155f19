"""The `tminus` command and its subcommands. No other part of the service prints or exits."""
