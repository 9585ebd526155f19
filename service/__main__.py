"""`python -m service` and the `tminus` script."""

from service.cli.main import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
