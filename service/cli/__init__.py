"""The `tminus` command. Only this package prints to the terminal or exits the process."""
