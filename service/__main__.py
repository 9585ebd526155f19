"""`python -m service` and the `tminus` script."""

import service.cli_reproduce
import service.cli_train  # noqa: F401  importing these two adds their commands
from service.cli import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
