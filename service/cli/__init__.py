"""The tminus command: each subcommand in a file. Nothing else prints or exits."""
