"""What tminus costs and what it gains, as ratios measured in one run. `python -m bench`, or `make bench`."""
