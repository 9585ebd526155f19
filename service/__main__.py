"""`python -m service` and the `tminus` script."""

import service.cli_train  # noqa: F401  importing it adds its two commands
from service.cli import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
