"""`python -m service` and the `tminus` script."""

from service import cli_train
from service.cli import main

__all__ = ["cli_train", "main"]

if __name__ == "__main__":
    main()
