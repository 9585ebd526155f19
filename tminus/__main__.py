"""`python -m tminus` and the `tminus` script."""

from tminus.service.cli.main import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
