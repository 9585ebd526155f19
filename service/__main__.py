"""`python -m service` and the `tminus` script."""

import service.cli.reproduce
import service.cli.train  # noqa: F401  importing these two adds their commands
from service.cli.main import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
